//! Rows by an id that names only the bucket: of whoever lives there, or of a user of that bucket who is placed apart.
//!
//! The shard that owns the bucket says who is away, and each shard that has one of those whether it does. *Nothing* means that
//! all of them answered as owners; where one did not, a user is just changing places.

use crate::error::Error;
use crate::pool::{Errand, Params};
use crate::store::{Route, Shards, found};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use placement::{Bucket, Group, Place, ShardNo, UserId, Whose};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio_postgres::Row;
use uuid::Uuid;

/// How long those who do not have the row are waited for once it is there: a connection on which an answer is still on its way
/// is lost to everybody.
const OTHERS_WITHIN: Duration = Duration::from_millis(20);

/// What a shard said of an id's row.
enum Verdict {
    /// It has the row.
    Found(Vec<Row>),
    /// It does not own the bucket, and has these users' rows.
    NotHome(Vec<Uuid>),
    /// It owns the bucket, and has these users' rows; these others of the bucket are elsewhere, or just changing places.
    Home(Vec<Uuid>, Vec<(UserId, Option<ShardNo>)>),
}

/// What is asked of each shard.
#[derive(Clone, Copy)]
struct Question<'a> {
    sql: &'a str,
    errand: Errand,
    all: &'a Params<'a>,
}

/// What became of a question about users who are placed apart.
enum Apart {
    Found(Vec<Row>),
    /// All of them are where they were looked for, and none has the row.
    Nothing,
    /// These are just changing places, as these shards say.
    OnTheirWay(Vec<(ShardNo, UserId)>),
}

impl Verdict {
    fn of(rows: Vec<Row>) -> Verdict {
        let Some(first) = rows.first() else { return Verdict::NotHome(Vec::new()) };
        if first.get::<_, Option<bool>>("present").is_some() {
            return Verdict::Found(found(rows));
        }
        let here = first.get::<_, Vec<Uuid>>("here");
        if !first.get::<_, bool>("is_home") {
            return Verdict::NotHome(here);
        }
        let users = first.get::<_, Option<Vec<Uuid>>>("apart_user_id").unwrap_or_default();
        let peers = first.get::<_, Option<Vec<Option<i16>>>>("apart_peer").unwrap_or_default();
        let apart = users.into_iter().zip(peers).map(|(user, peer)| (UserId(user), peer.map(ShardNo)));
        Verdict::Home(here, apart.collect())
    }

    fn here(&self) -> &[Uuid] {
        match self {
            Verdict::Found(_) => &[],
            Verdict::NotHome(here) | Verdict::Home(here, _) => here,
        }
    }
}

impl Shards {
    /// The rows that an id names, from whichever shard has them. `all` begins with the bucket.
    pub(crate) async fn by_id(
        &self,
        group: Group,
        bucket: Bucket,
        (quick, sql): (Option<&str>, &str),
        errand: Errand,
        all: &Params<'_>,
    ) -> Result<Vec<Row>, Error> {
        let mut route = Route::new(self, group, bucket.into());
        loop {
            let home = route.place.shard;
            if let Some(quick) = quick
                && let Some(rows) = route.within(self.quick_by_id(group, bucket, home, (quick, errand), all)).await?
            {
                return Ok(rows);
            }
            let question = Question { sql, errand, all };
            let apart = match Verdict::of(route.within(self.ask(home, question)).await?) {
                Verdict::Found(rows) => return Ok(rows),
                Verdict::NotHome(_) => {
                    Box::pin(route.follow()).await?;
                    continue;
                }
                Verdict::Home(_, apart) => apart,
            };
            if apart.is_empty() {
                self.confirm_nothing(&route, errand, [home]).await?;
                return Ok(Vec::new());
            }
            let mut by_shard: BTreeMap<ShardNo, Vec<Uuid>> = BTreeMap::new();
            let mut on_their_way = Vec::new();
            for (user, peer) in apart {
                match peer {
                    Some(peer) => by_shard.entry(peer).or_default().push(user.0),
                    None => on_their_way.push((home, user)),
                }
            }
            let asked: BTreeSet<ShardNo> = by_shard.keys().copied().chain([home]).collect();
            for (shard, users) in by_shard {
                match self.apart_on(&route, shard, users, question).await? {
                    Apart::Found(rows) => return Ok(rows),
                    Apart::Nothing => {}
                    Apart::OnTheirWay(users) => on_their_way.extend(users),
                }
            }
            if on_their_way.is_empty() {
                self.confirm_nothing(&route, errand, asked).await?;
                return Ok(Vec::new());
            }
            route.wait_for(&on_their_way).await?;
        }
    }

    /// That a write found nothing to do may be the doing of the same one before it, whose wait for a standby was cut off.
    async fn confirm_nothing(
        &self,
        route: &Route<'_>,
        errand: Errand,
        owners: impl IntoIterator<Item = ShardNo>,
    ) -> Result<(), Error> {
        for shard in owners.into_iter().filter(|_| errand == Errand::Write) {
            let pool = self.pool(shard).await?;
            route.within(pool.confirm()).await?;
        }
        Ok(())
    }

    async fn ask(&self, shard: ShardNo, Question { sql, errand, all }: Question<'_>) -> Result<Vec<Row>, Error> {
        self.pool(shard).await?.answer(sql, all, errand).await
    }

    /// The row that an id names, of these users, whom the home of their bucket has on this shard. Where one of them has gone on
    /// from there, which home hears in the end, the shard itself says to where.
    async fn apart_on(
        &self,
        route: &Route<'_>,
        shard: ShardNo,
        users: Vec<Uuid>,
        question: Question<'_>,
    ) -> Result<Apart, Error> {
        let group = route.group();
        let verdict = Verdict::of(route.within(self.ask(shard, question)).await?);
        let (here, gone): (Vec<Uuid>, Vec<Uuid>) = users.into_iter().partition(|user| verdict.here().contains(user));
        if let Verdict::Found(rows) = verdict {
            // Of several nobody here knows whose it is; of one the next call goes there at once.
            if let [user] = gone[..] {
                self.learn(group, UserId(user).into(), Place { shard, epoch: 0 }, true);
            }
            return Ok(Apart::Found(rows));
        }
        for whose in here.into_iter().map(|user| Whose::from(UserId(user))) {
            if self.place(group, whose).shard != shard {
                self.learn(group, whose, Place { shard, epoch: 0 }, true);
            }
        }
        let gone: Vec<Whose> = gone.into_iter().map(|user| UserId(user).into()).collect();
        if gone.is_empty() {
            return Ok(Apart::Nothing);
        }
        let (mut on_their_way, mut next) = (Vec::new(), BTreeMap::<ShardNo, Vec<Uuid>>::new());
        for (whose, said) in gone.iter().zip(route.within(self.ownership(shard, group, &gone)).await?) {
            let user = whose.user.into_iter();
            match said.ownership.hint(0).place(shard).filter(|place| said.is_pin && place.shard != shard) {
                Some(place) => next.entry(place.shard).or_default().extend(user.map(|user| user.0)),
                None => on_their_way.extend(user.map(|user| (shard, user))),
            }
        }
        for (next, users) in next {
            let verdict = Verdict::of(route.within(self.ask(next, question)).await?);
            // Between the two, in either direction: whoever is to take over may be the one that points back.
            let not_yet = users.iter().filter(|user| !verdict.here().contains(user));
            on_their_way.extend(not_yet.flat_map(|user| [shard, next].map(|at| (at, UserId(*user)))));
            for whose in users.iter().map(|user| Whose::from(UserId(*user))) {
                self.learn(group, whose, Place { shard: next, epoch: 0 }, true);
            }
            if let Verdict::Found(rows) = verdict {
                return Ok(Apart::Found(rows));
            }
        }
        Ok(if on_their_way.is_empty() { Apart::Nothing } else { Apart::OnTheirWay(on_their_way) })
    }

    /// One round of everybody who may have the row, as far as this node knows; `None`: nobody shows it.
    async fn quick_by_id(
        &self,
        group: Group,
        bucket: Bucket,
        home: ShardNo,
        (quick, errand): (&str, Errand),
        all: &Params<'_>,
    ) -> Result<Option<Vec<Row>>, Error> {
        let map = self.map();
        if !map.has_pins() {
            let rows = self.pool(home).await?.answer(quick, all, errand).await?;
            return Ok(Some(rows).filter(|rows| !rows.is_empty()));
        }
        let shards: BTreeSet<ShardNo> =
            map.pins_of(group, bucket).map(|(_, place)| place.shard).chain([home]).collect();
        let question = Question { sql: quick, errand, all };
        let mut asked: FuturesUnordered<_> = shards.into_iter().map(|shard| self.ask(shard, question)).collect();
        // Whoever has the row ends it: a shard that does not answer matters only where nobody has, and is asked again then.
        while let Some(answer) = asked.next().await {
            if let Some(rows) = answer.ok().filter(|rows: &Vec<Row>| !rows.is_empty()) {
                // The others are about to answer, too: left alone, each would cost its connection.
                let others = async { while asked.next().await.is_some() {} };
                tokio::time::timeout(OTHERS_WITHIN, others).await.ok();
                return Ok(Some(rows));
            }
        }
        Ok(None)
    }
}
