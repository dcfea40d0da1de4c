//! How far a relocation is, told to the control database as it goes; and its brake: a copy makes way for the users of its two
//! servers, and says when it does.

use crate::error::Result;
use crate::objects::Stream;
use crate::record::Relocation;
use crate::side::Side;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

/// What is known of a relocation under way, shared by those who work at it.
#[derive(Debug)]
pub(crate) struct Progress {
    pub(crate) rows_total: AtomicI64,
    pub(crate) rows: AtomicI64,
    pub(crate) bytes: AtomicI64,
    /// -1: not known.
    pub(crate) lag_bytes: AtomicI64,
    note: Mutex<String>,
    brake: AtomicBool,
    /// Whether others were at work lately on one of the two servers.
    has_company: AtomicBool,
}

impl Default for Progress {
    fn default() -> Progress {
        Progress {
            rows_total: AtomicI64::default(),
            rows: AtomicI64::default(),
            bytes: AtomicI64::default(),
            lag_bytes: AtomicI64::new(-1),
            note: Mutex::default(),
            brake: AtomicBool::default(),
            has_company: AtomicBool::default(),
        }
    }
}

impl Progress {
    /// Says what it waits for or why it is slow; nothing when all is well.
    pub(crate) fn say(&self, note: impl Into<String>) {
        *self.note.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = note.into();
    }

    pub(crate) fn note(&self) -> String {
        self.note.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Begins to count anew.
    pub(crate) fn reset(&self, rows_total: i64) {
        self.rows_total.store(rows_total, Ordering::Relaxed);
        self.rows.store(0, Ordering::Relaxed);
        self.bytes.store(0, Ordering::Relaxed);
    }

    /// Whether others are at work, for whose sake a copy rests now and then.
    pub(crate) fn has_company(&self) -> bool {
        self.has_company.load(Ordering::Relaxed)
    }

    /// Waits as long as the brake is on.
    pub(crate) async fn make_way(&self) {
        while self.brake.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// The longest rest: what was braked, or whose server did not answer, has not worked all the time.
pub(crate) const REST_MAX: Duration = Duration::from_millis(400);
/// How often the servers are looked at; and at first, when nothing is known of them.
const LOOK: Duration = Duration::from_millis(100);
const FIRST_LOOK: Duration = Duration::from_millis(25);
/// A read by key that takes longer than this means that users wait.
const SLOW: Duration = Duration::from_millis(50);
/// A standby that is further behind than this is waited for.
const STANDBY_LAG_BYTES: i64 = 256 << 20;
/// So much log held for slots, and the copy lets the streams catch up.
const HELD_LOG_BYTES: i64 = 4 << 30;

/// Others are at work if so many of the last eight looks have seen them there: a relay that clears up comes and goes.
const COMPANY_LOOKS: u32 = 3;

/// The standby that lacks most of the log (one that replays it late has it all the same), and whether others are at work in this
/// database at the moment: one alone may be a relay, or whoever refreshes a view. Movers may log in as anybody, so they say by name who they are.
const BEHIND: &str = "
    SELECT coalesce((SELECT max(s.bytes_behind) FROM therev.standbys AS s), 0)::bigint AS standby,
           (SELECT count(*) > 1 FROM pg_stat_activity AS a
             WHERE a.datname = current_database() AND a.backend_type = 'client backend' AND a.state = 'active'
               AND a.application_name <> current_setting('application_name')) AS has_company";

/// The slots of ours in this database, what each holds back, and how much more may be written before the server takes that
/// away all the same: NULL where `max_slot_wal_keep_size` sets no limit.
const SLOTS: &str = "
    SELECT s.slot_name::text AS name, s.active AS is_read, s.safe_wal_size AS spare, coalesce(s.wal_status = 'lost', false) AS is_lost,
           coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn), 0)::bigint AS held,
           coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), s.confirmed_flush_lsn), 0)::bigint AS behind
      FROM pg_replication_slots AS s
     WHERE s.slot_name LIKE 'therev\\_%' AND s.database = current_database()";

/// A slot, in bytes of its server's log.
struct Slot {
    name: String,
    is_read: bool,
    held: i64,
    /// How much of it its stream has yet to take: a transaction that is open for hours holds log that nobody waits for.
    behind: i64,
    spare: Option<i64>,
    is_lost: bool,
}

async fn slots_of(side: &Side) -> Result<Vec<Slot>> {
    let rows = side.query(SLOTS, &[]).await?;
    let slot = |row: &tokio_postgres::Row| Slot {
        name: row.get("name"),
        is_read: row.get("is_read"),
        held: row.get("held"),
        behind: row.get("behind"),
        spare: row.get("spare"),
        is_lost: row.get("is_lost"),
    };
    Ok(rows.iter().map(slot).collect())
}

/// The most log that is held for a stream which gets on while the copy rests. Its own does not, nor that of another copy: they are
/// read only when the copy is done, so that to wait for them is to wait for ever.
fn held_for_streams(slots: &[Slot]) -> i64 {
    slots.iter().filter(|slot| slot.is_read).map(|slot| slot.behind).max().unwrap_or(0)
}

/// What people must hear of the log that the copy's own stream begins in, while they can do something about it: less than a
/// quarter of what the server holds for a slot is left.
fn own_in_danger(slots: &[Slot], own: &str) -> Option<String> {
    let slot = slots.iter().find(|slot| slot.name == own)?;
    if slot.is_lost {
        return Some("has dropped the log that this copy's stream begins in (max_slot_wal_keep_size)".to_owned());
    }
    let spare = slot.spare?;
    (spare < slot.held.saturating_add(spare) / 4).then(|| {
        let left = spare.max(0) >> 20;
        format!("drops the log of this copy's stream after {left} MB more: raise max_slot_wal_keep_size there")
    })
}

/// Rests after some work on one server that nobody waits for: where others are at work there, or its standbys are behind, three times
/// as long as it has worked, like a copy.
pub(crate) async fn rest_after(worked: Duration, side: &Side) -> Result<()> {
    let row = side.one(BEHIND, &[]).await?;
    if row.get("has_company") || row.get::<_, i64>("standby") > STANDBY_LAG_BYTES {
        tokio::time::sleep((worked * 3).min(REST_MAX)).await;
    }
    Ok(())
}

/// Puts the brake on and off, and says whether others are at work, for as long as it is polled.
pub(crate) async fn watch(relocation: &Relocation, sides: [&Side; 2], progress: &Progress) -> Result<()> {
    // One bit a look, the last one lowest.
    let (mut seen, mut looks) = (0_u8, 0_u32);
    loop {
        let (mut reason, mut danger): (Option<String>, Option<String>) = (None, None);
        seen <<= 1;
        looks = looks.saturating_add(1);
        for side in sides {
            let began = Instant::now();
            side.query("SELECT FROM therev.fence", &[]).await?;
            let took = began.elapsed();
            let row = side.one(BEHIND, &[]).await?;
            let standby: i64 = row.get("standby");
            seen |= u8::from(row.get::<_, bool>("has_company"));
            let (slots, own) = (slots_of(side).await?, Stream::from(side.which).name(relocation));
            let held = held_for_streams(&slots);
            if took > SLOW {
                reason = Some(format!("shard {} answers in {} ms", side.shard, took.as_millis()));
            } else if standby > STANDBY_LAG_BYTES {
                reason = Some(format!("a standby of shard {} is {} MB behind", side.shard, standby >> 20));
            } else if held > HELD_LOG_BYTES {
                reason = Some(format!("shard {} holds {} MB of log for its streams", side.shard, held >> 20));
            }
            if let Some(what) = own_in_danger(&slots, &own) {
                danger = Some(format!("shard {} {what}", side.shard));
            }
        }
        progress.has_company.store(seen.count_ones() >= COMPANY_LOOKS, Ordering::Relaxed);
        progress.brake.store(reason.is_some(), Ordering::Relaxed);
        let throttled = reason.map(|reason| format!("throttled: {reason}"));
        progress.say(throttled.into_iter().chain(danger).collect::<Vec<String>>().join("; "));
        tokio::time::sleep(if looks < COMPANY_LOOKS { FIRST_LOOK } else { LOOK }).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = "therev_0123456789abcdef_forward";
    const OTHER: &str = "therev_fedcba9876543210_forward";

    fn slot(name: &str, held: i64, spare: Option<i64>) -> Slot {
        Slot { name: name.to_owned(), is_read: false, held, behind: held, spare, is_lost: false }
    }

    #[test]
    fn a_copy_waits_for_streams_that_are_read_alone() {
        let unread = || slot(OWN, 2 * HELD_LOG_BYTES, None);
        let read = |held| Slot { is_read: true, ..slot(OTHER, held, None) };
        assert_eq!(held_for_streams(&[]), 0);
        assert_eq!(held_for_streams(&[unread()]), 0);
        assert_eq!(held_for_streams(&[unread(), read(7), read(3)]), 7);
    }

    #[test]
    fn a_server_that_is_about_to_drop_the_copys_log_is_told_of() {
        let said = |held, spare| own_in_danger(&[slot(OTHER, 1, Some(0)), slot(OWN, held, spare)], OWN);
        assert_eq!(said(1 << 40, None), None, "no limit");
        assert_eq!(said(1 << 30, Some(1 << 30)), None, "as much again");
        let near = said(3 << 30, Some(900 << 20)).expect("less than a quarter is left");
        assert!(near.contains("after 900 MB more"), "{near}");
        let over = said(5 << 30, Some(-(1 << 30))).expect("it goes with the next checkpoint");
        assert!(over.contains("after 0 MB more"), "{over}");
        let lost = Slot { is_lost: true, ..slot(OWN, 0, None) };
        assert!(own_in_danger(&[lost], OWN).is_some_and(|said| said.starts_with("has dropped")));
        assert_eq!(own_in_danger(&[slot(OTHER, 1, Some(0))], OWN), None, "not the copy's");
    }
}
