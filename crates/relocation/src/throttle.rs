//! How far a relocation is, told to the control database as it goes; and its brake: a copy makes way for the users of its two
//! servers, and says when it does.

use crate::error::Result;
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

/// The furthest standby, the most that a slot of ours holds back, and whether others are at work in this database at the moment:
/// one alone may be a relay, or whoever refreshes a view. Movers may log in as anybody, so they say by name who they are.
const BEHIND: &str = "
    SELECT coalesce((SELECT max(pg_wal_lsn_diff(pg_current_wal_lsn(), r.replay_lsn))
                       FROM pg_stat_replication AS r
                       LEFT JOIN pg_replication_slots AS s ON s.active_pid = r.pid
                      WHERE s.slot_type IS DISTINCT FROM 'logical'), 0)::bigint AS standby,
           coalesce((SELECT max(pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn))
                       FROM pg_replication_slots AS s
                      WHERE s.slot_name LIKE 'therev\\_%' AND s.database = current_database()), 0)::bigint AS held,
           (SELECT count(*) > 1 FROM pg_stat_activity AS a
             WHERE a.datname = current_database() AND a.backend_type = 'client backend' AND a.state = 'active'
               AND a.application_name <> current_setting('application_name')) AS has_company";

/// Puts the brake on and off, and says whether others are at work, for as long as it is polled.
pub(crate) async fn watch(sides: [&Side; 2], progress: &Progress) -> Result<()> {
    // One bit a look, the last one lowest.
    let (mut seen, mut looks) = (0_u8, 0_u32);
    loop {
        let mut reason = None;
        seen <<= 1;
        looks = looks.saturating_add(1);
        for side in sides {
            let began = Instant::now();
            side.query("SELECT FROM therev.fence", &[]).await?;
            let took = began.elapsed();
            let row = side.one(BEHIND, &[]).await?;
            let (standby, held): (i64, i64) = (row.get("standby"), row.get("held"));
            seen |= u8::from(row.get::<_, bool>("has_company"));
            if took > SLOW {
                reason = Some(format!("shard {} answers in {} ms", side.shard, took.as_millis()));
            } else if standby > STANDBY_LAG_BYTES {
                reason = Some(format!("a standby of shard {} is {} MB behind", side.shard, standby >> 20));
            } else if held > HELD_LOG_BYTES {
                reason = Some(format!("shard {} holds {} MB of log for its streams", side.shard, held >> 20));
            }
        }
        progress.has_company.store(seen.count_ones() >= COMPANY_LOOKS, Ordering::Relaxed);
        progress.brake.store(reason.is_some(), Ordering::Relaxed);
        progress.say(reason.map(|reason| format!("throttled: {reason}")).unwrap_or_default());
        tokio::time::sleep(if looks < COMPANY_LOOKS { FIRST_LOOK } else { LOOK }).await;
    }
}
