//! Lives of servers. A promoted or restored server may have lost its last commits, ownership marks among them: it is
//! closed until the control database has granted it a life of its own, in which it knows what the others know.

use crate::address::Login;
use crate::admin::connect;
use crate::catalog::Catalog;
use crate::error::{Database, Error};
use crate::owners::{self, Highest};
use crate::pool::{CONFIRM, Pool};
use crate::reach::is_led;
use crate::store::Shards;
use futures_util::future::{BoxFuture, join_all, try_join_all};
use placement::{Bucket, Group, Place, ShardNo};
use schema::Kind;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};
use uuid::Uuid;

/// One life of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    /// Which one.
    pub incarnation: Uuid,
    /// Its number: greater than that of any life that any database was granted before.
    #[serde(rename = "incarnation_counter")]
    pub counter: i64,
}

impl Life {
    pub(crate) fn of(row: &Row) -> Life {
        Life { incarnation: row.get("incarnation"), counter: row.get("incarnation_counter") }
    }
}

/// Settles which life counts. Needs the control database.
pub(crate) struct Lives {
    pub(crate) login: Login,
    pub(crate) control: Arc<Pool>,
}

const IDENTITY: &str = "
    SELECT i.incarnation, i.incarnation_counter, i.timeline = therev.current_timeline() AS is_known
      FROM therev.identity AS i";

/// How many events are marked in one statement.
const MARKED_AT_ONCE: u64 = 500;

/// What a database was told since then is delivered again, oldest first, like anything that was never delivered. What was
/// delivered again since then for the sake of others is not: promotions that follow each other would have ever more to tell.
/// Some at a time, so that what is done stays done where there is no time for all.
const DELIVER_AGAIN: &str = "
    UPDATE therev.outbox AS o
       SET delivered_at = NULL, lost_by = array_append(array_remove(o.lost_by, $2), $2)
      FROM (SELECT n.outbox_id
              FROM therev.outbox AS n
             WHERE (n.delivered_at > $1 AND (n.first_delivered_at > $1 OR $2 = ANY (n.lost_by)))
                -- On its way for the sake of another one: it is noted for this one, too.
                OR (n.delivered_at IS NULL AND n.first_delivered_at > $1 AND ($2 = ANY (n.lost_by)) IS NOT TRUE)
             LIMIT $3) AS lost
     WHERE o.outbox_id = lost.outbox_id";

/// How often whoever follows a shard is looked after, and how long they are waited for.
const FOLLOWED_LOOK: Duration = Duration::from_millis(10);
const FOLLOWED_WITHIN: Duration = Duration::from_millis(200);

/// Which database is at the other end.
const MEANT: &str = "SELECT i.cluster_id, i.kind, i.shard FROM therev.identity AS i";

/// Of a shard that has yet to begin the life that it was granted: the least number that its versions have in it, and the relocations
/// in which it knows that it has given away what it had.
const BEFORE_ITS_LIFE: &str = "
    SELECT greatest($2, (SELECT max(f.version_floor) >> 40 FROM therev.fence AS f) + 1) AS number,
           ARRAY(SELECT p.relocation FROM therev.relocation_parts AS p WHERE p.state = 'moved') AS decided
      FROM therev.identity AS i WHERE therev.candidate(i) = $1";

const ANOTHER: &str = "another server was promoted in its place; make this one a standby of that, or remove it";

/// Waits until those who follow a shard have what it has written: whoever of them is promoted next must know for which life it has
/// asked, or would not be taken for its follower.
async fn followed(client: &Client) -> Result<(), tokio_postgres::Error> {
    let written: String = client.query_one("SELECT pg_current_wal_flush_lsn()::text", &[]).await?.get(0);
    let have = "SELECT therev.standbys_have($1::text::pg_lsn)";
    while !client.query_one(have, &[&written]).await?.get::<_, bool>(0) {
        tokio::time::sleep(FOLLOWED_LOOK).await;
    }
    Ok(())
}

impl Lives {
    /// Asks which life of a database counts, and has the server that is there now begin one if it must and may. What others told it
    /// lately is told again as far as that is done `within` a time, for until the life has begun the server answers nobody.
    ///
    /// Boxed: to ask the control database may be to settle which life of that counts.
    pub(crate) fn settle(&self, database: Database, within: Duration) -> BoxFuture<'_, Result<Life, Error>> {
        Box::pin(self.settle_now(database, within))
    }

    async fn settle_now(&self, database: Database, within: Duration) -> Result<Life, Error> {
        let closed = |reason: &str| Error::Closed { database, reason: reason.to_owned() };
        let catalog = Catalog::read(&self.control).await.map_err(|error| {
            tracing::debug!(%error, "the control database did not say which life of {database} counts");
            closed("its server was promoted or restored, and the control database, which must grant that, is down")
        })?;
        let (at, counts) = catalog.find(database).ok_or_else(|| closed("the control database does not know it"))?;
        let login = self.login.to(at, true)?;
        let client = connect(database, &login, Some(counts)).await?;
        let sql = |source| Error::of_statement(database, false, source);
        let row = client.query_one(IDENTITY, &[]).await.map_err(sql)?;
        let found = Life::of(&row);
        let is_known = row.get("is_known");
        // The control database itself was promoted, and has lost that it granted this life; or the one that this server followed.
        let is_lost = found.counter > counts.counter;
        if is_known && !is_lost {
            return if found.incarnation == counts.incarnation { Ok(counts) } else { Err(closed(ANOTHER)) };
        }
        let counts = if is_lost { found } else { counts };
        // It was met since the one that counts was slow to answer: nothing is taken from that as long as it does.
        if !is_known && is_led(&login, counts).await {
            return Ok(counts);
        }
        if is_lost {
            let params: [&(dyn ToSql + Sync); 3] = [&database.to_string(), &found.incarnation, &found.counter];
            self.control.query("SELECT therev.learn_life($1, $2, $3)", &params, true).await?;
        }
        if is_known {
            return Ok(found);
        }
        let Some(asked) = client.query_opt("SELECT * FROM therev.ask_for_life()", &[]).await.map_err(sql)? else {
            // Another node was quicker: the life that it brought about is there to be read.
            return self.settle(database, within).await;
        };
        self.begin(&client, &catalog, database, &asked, None, within).await
    }

    /// By an operator's word: the server that is at a database's address now is to count in the place of one that is lost for good, and
    /// with it all that only that one had. Refused where a server is in force. Cut off, it is done by the same call again.
    async fn grant_by_hand(&self, database: Database, within: Duration) -> Result<Life, Error> {
        let catalog = Catalog::read(&self.control).await?;
        let (at, counts) = catalog
            .find(database)
            .ok_or_else(|| Error::Config(format!("{database} is not in the control database")))?;
        let login = self.login.to(at, true)?;
        let client = connect(database, &login, Some(counts)).await?;
        let sql = |source| Error::of_statement(database, true, source);
        let meant = client.query_one(MEANT, &[]).await.map_err(sql)?;
        let number = if let Database::Shard(number) = database { Some(number.0) } else { None };
        let kind = if number.is_some() { Kind::Shard } else { Kind::Directory };
        let is_meant = (meant.get("cluster_id"), meant.get("kind"), meant.get("shard"))
            == (catalog.cluster_id, kind.name(), number);
        if !is_meant {
            let reason = "its address leads to another one".to_owned();
            return Err(Error::WrongDatabase { database, reason });
        }
        let in_force = || {
            let reason = format!("a server of {database} is in force");
            Error::in_the_way(reason, "nothing needs to be granted: `therev status` shows how it is")
        };
        let lives_in = async |life: Life| {
            let found = client.query_one(IDENTITY, &[]).await.map_err(sql)?;
            Ok::<bool, Error>(found.get("is_known") && Life::of(&found).incarnation == life.incarnation)
        };
        if lives_in(counts).await? {
            return Err(in_force());
        }
        match self.settle(database, within).await {
            Err(Error::Closed { reason, .. }) if reason == ANOTHER => {}
            // What was granted it before, by this very call perhaps, it has begun just now.
            Ok(life) if lives_in(life).await? => return Ok(life),
            Ok(_) => return Err(in_force()),
            Err(error) => return Err(error),
        }
        if is_led(&login, counts).await {
            return Err(in_force());
        }
        client.query("SELECT therev.take_its_place($1)", &[&counts.incarnation]).await.map_err(sql)?;
        let asked = client.query_opt("SELECT * FROM therev.ask_for_life()", &[]).await.map_err(sql)?;
        let asked = asked.ok_or_else(in_force)?;
        self.begin(&client, &catalog, database, &asked, Some(counts), within).await
    }

    /// Has the server that asked for a life granted it, and begins it there. `lost` counts, and did not know of this one.
    async fn begin(
        &self,
        client: &Client,
        catalog: &Catalog,
        database: Database,
        asked: &Row,
        lost: Option<Life>,
        within: Duration,
    ) -> Result<Life, Error> {
        let (mut before, candidate): (Vec<Uuid>, Uuid) = (asked.get("before"), asked.get("candidate"));
        before.extend(lost.map(|life| life.incarnation));
        fail::fail_point!("life.asked");
        if let Database::Shard(_) = database {
            // Late, or without an answer: only where that one ends and another one takes its place just now, it would be missed.
            let _ = tokio::time::timeout(FOLLOWED_WITHIN, followed(client)).await;
        }
        let params: [&(dyn ToSql + Sync); 3] = [&database.to_string(), &before, &candidate];
        let granted = self.control.query("SELECT * FROM therev.grant_life($1, $2, $3)", &params, true).await?;
        let granted = granted.first().map(Life::of).filter(|life| life.incarnation == candidate);
        let granted = granted.ok_or_else(|| Error::Closed { database, reason: ANOTHER.to_owned() })?;
        fail::fail_point!("life.granted");
        self.deliver_again(catalog, database, asked.get("lost_after"), within).await;
        if let Database::Shard(shard) = database {
            self.begin_shard(client, catalog, shard, granted).await?;
        } else {
            let params: [&(dyn ToSql + Sync); 2] = [&granted.incarnation, &granted.counter];
            let begun = client.query("SELECT therev.begin_life($1, $2)", &params).await;
            begun.map_err(|source| Error::of_statement(database, false, source))?;
        }
        tracing::warn!(%database, counter = granted.counter, "a promoted server has begun a life of its own");
        Ok(granted)
    }

    /// A shard begins its life with the highest epochs that the control database and the other shards know.
    async fn begin_shard(&self, client: &Client, catalog: &Catalog, shard: ShardNo, life: Life) -> Result<(), Error> {
        let database = Database::Shard(shard);
        let of_shard = |source| Error::of_statement(database, true, source);
        let before = client.query_opt(BEFORE_ITS_LIFE, &[&life.incarnation, &life.counter]).await.map_err(of_shard)?;
        // Another node was quicker.
        let Some(before) = before else { return Ok(()) };
        let (number, decided): (i64, Vec<i64>) = (before.get("number"), before.get("decided"));
        let others = catalog.shards.iter().map(|entry| entry.shard).filter(|other| *other != shard);
        let decided = &decided;
        let known = try_join_all(others.map(|other| async move {
            self.owners(catalog, other, (shard, number), decided).await.map_err(|error| {
                tracing::debug!(%error, "shard {other} did not say what it knows");
                let reason =
                    format!("its server was promoted, and shard {other}, which may own buckets of it, is down");
                Error::Closed { database, reason }
            })
        }))
        .await?;
        let highest = Highest::of(catalog.places().chain(known.into_iter().flatten()));
        let owners::Columns { groups, buckets, owners, epochs } = &highest.columns();
        let params: [&(dyn ToSql + Sync); 6] = [&life.incarnation, &life.counter, groups, buckets, owners, epochs];
        client.query("SELECT therev.begin_shard_life($1, $2, $3, $4, $5, $6)", &params).await.map_err(of_shard)?;
        Ok(())
    }

    /// Who owns what, as one shard knows it, after which it takes over nothing from its peer, a shard that begins a life, but for what
    /// that knows to have decided, or decides in that life.
    async fn owners(
        &self,
        catalog: &Catalog,
        shard: ShardNo,
        (peer, life): (ShardNo, i64),
        decided: &Vec<i64>,
    ) -> Result<Vec<((Group, Bucket), Place)>, Error> {
        let database = Database::Shard(shard);
        let sql = |source| Error::of_statement(database, true, source);
        let client = self.connect(catalog, database).await?;
        let params: [&(dyn ToSql + Sync); 3] = [&peer.0, &life, decided];
        client.query("SELECT therev.lay_down($1, $2, $3)", &params).await.map_err(sql)?;
        let owners = owners::known_to(&client, database).await?;
        // What was seen of them is counted on: a step that has just taken over may not be on the disk yet.
        client.batch_execute(CONFIRM).await.map_err(sql)?;
        Ok(owners)
    }

    /// What a database has lost of the derived rows it was told last, it is told again. A shard that cannot be asked now, or has
    /// too much to tell, is left to the repair that follows each promotion.
    async fn deliver_again(
        &self,
        catalog: &Catalog,
        lost: Database,
        since: chrono::DateTime<chrono::Utc>,
        within: Duration,
    ) {
        let tellers = catalog.shards.iter().map(|entry| Database::Shard(entry.shard)).filter(|teller| *teller != lost);
        let told = tellers.map(|teller| async move {
            let told = async {
                let client = self.connect(catalog, teller).await?;
                let (name, at_once) = (lost.to_string(), i64::try_from(MARKED_AT_ONCE).unwrap_or(i64::MAX));
                let params: [&(dyn ToSql + Sync); 3] = [&since, &name, &at_once];
                loop {
                    let marked = client.execute(DELIVER_AGAIN, &params).await;
                    if marked.map_err(|e| Error::of_statement(teller, true, e))? < MARKED_AT_ONCE {
                        return Ok(());
                    }
                }
            };
            let late = Error::Deadline { limit_ms: within.as_millis(), waiting_for: format!("{teller}'s outbox") };
            tokio::time::timeout(within, told).await.unwrap_or(Err(late))
        });
        for outcome in join_all(told).await {
            if let Err(error) = outcome {
                tracing::warn!(%error, "what was delivered to {lost} lately is not delivered again from there");
            }
        }
    }

    async fn connect(&self, catalog: &Catalog, database: Database) -> Result<Client, Error> {
        let (at, life) = catalog
            .find(database)
            .ok_or_else(|| Error::Config(format!("{database} is not in the control database")))?;
        connect(database, &self.login.to(at, true)?, Some(life)).await
    }
}

impl Shards {
    /// Lets the server that is at a shard's or the directory's address now count, in the place of one that is lost for good and that it
    /// never heard of: a standby that was promoted beside another one, or an old primary. What only the lost one had is lost with it.
    ///
    /// Refused ([`Error::InTheWay`]) where a server is in force. Closed lives of standbys that followed begin by themselves.
    pub async fn grant_life(&self, database: Database) -> Result<Life, Error> {
        let deadline = self.inner.config.deadline();
        let granted = tokio::time::timeout(2 * deadline, self.inner.lives.grant_by_hand(database, deadline / 4)).await;
        let granted = granted.unwrap_or_else(|_| {
            let waiting_for = format!("the life of {database}");
            Err(Error::Deadline { limit_ms: (2 * deadline).as_millis(), waiting_for })
        })?;
        self.refresh().await?;
        Ok(granted)
    }
}
