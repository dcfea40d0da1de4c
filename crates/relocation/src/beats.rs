//! Sentinels: rows that travel with the stream, so that what was written before them is known to have arrived.

use crate::error::{Error, Result};
use crate::objects::Stream;
use crate::record::Relocation;
use crate::side::{Pair, Side};
use crate::verify;
use std::time::{Duration, Instant};
use tokio_postgres::Statement;

/// A sentinel that is longer on its way means that the stream does not get on.
const ARRIVAL_LIMIT: Duration = Duration::from_secs(60);
/// From then on the stream's errors are looked at; one that comes again does not pass.
const ERRORS_LOOK: Duration = Duration::from_millis(500);

/// Sends the sentinel of the direction that feeds the taking side, and sees it arrive.
pub(crate) struct Beats<'a> {
    relocation: i64,
    stream: String,
    from: &'a Side,
    to: &'a Side,
    send: Statement,
    seen: Statement,
}

impl<'a> Beats<'a> {
    /// From source to target.
    pub(crate) async fn new(relocation: &Relocation, pair: &'a Pair) -> Result<Beats<'a>> {
        Beats::between(relocation, &pair.source, &pair.target).await
    }

    pub(crate) async fn between(relocation: &Relocation, from: &'a Side, to: &'a Side) -> Result<Beats<'a>> {
        let send = "UPDATE therev.sentinels SET attempt = 0, beat = beat + 1
                     WHERE relocation = $1 AND side = $2 RETURNING beat";
        let seen = "SELECT coalesce(bool_and(s.beat >= $3), false)
                      FROM therev.sentinels AS s WHERE s.relocation = $1 AND s.side = $2";
        let (send, seen) = (from.prepare(send).await?, to.prepare(seen).await?);
        let stream = Stream::from(from.which).name(relocation);
        Ok(Beats { relocation: relocation.relocation, stream, from, to, send, seen })
    }

    async fn send(&self) -> Result<i64> {
        let side = self.from.which.name();
        let rows = self.from.client.query_opt(&self.send, &[&self.relocation, &side]).await;
        let row = rows.map_err(|e| self.from.sql(e))?.ok_or(Error::Taken(self.relocation))?;
        Ok(row.get(0))
    }

    async fn is_seen(&self, beat: i64) -> Result<bool> {
        self.to.says(&self.seen, &[&self.relocation, &self.from.which.name(), &beat]).await
    }

    /// Everything that was written before this call is on the other side when it returns.
    pub(crate) async fn arrive(&self) -> Result<Duration> {
        let (began, beat) = (Instant::now(), self.send().await?);
        let (mut wait, mut errors_at_first) = (Duration::from_millis(1), None);
        while !self.is_seen(beat).await? {
            let does_not_get_on = |reason| Err(Error::Stream { database: self.to.database(), reason });
            if began.elapsed() > ARRIVAL_LIMIT {
                return does_not_get_on(format!("a sentinel did not arrive within {} s", ARRIVAL_LIMIT.as_secs()));
            }
            if began.elapsed() > ERRORS_LOOK {
                let errors = verify::stream_errors(self.to, &self.stream).await?;
                if errors > *errors_at_first.get_or_insert(errors) + 1 {
                    return does_not_get_on("a change cannot be applied there; its server's log says which".to_owned());
                }
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(Duration::from_millis(100));
        }
        Ok(began.elapsed())
    }
}
