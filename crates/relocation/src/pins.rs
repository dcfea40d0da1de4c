//! Users placed apart from their buckets: to another shard, back again, and those whose load asks for it.

use crate::error::{Error, Result};
use crate::mover::Mover;
use crate::plan::Request;
use crate::record::{Goal, Relocation};
use crate::side::{Side, Which};
use placement::planner::{BUSIEST, Isolation, Shard, UserLoad, isolate_told};
use placement::{Bucket, Group, Layout, Map, ShardNo, UserId, Whose};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio_postgres::types::ToSql;

/// How often it is looked whether somebody should be.
const ISOLATE_EVERY: Duration = Duration::from_secs(60);
/// Where shards have fewer operations a second than this, on average, nobody is too much for one.
const QUIET: f64 = 100.0;
/// Where a shard has so many users apart, or owns the buckets of so many who are away, no more are placed apart by themselves: the
/// fence goes through them, row by row.
const APART_MAX: usize = 100;
/// Operations are counted in thousandths of one a second.
const LOAD_UNIT: f64 = 1_000.0;

/// The groups in which a user is apart on the shard that owns the bucket, by shard.
fn beside_its_bucket(map: &Map, user: UserId) -> BTreeMap<ShardNo, Vec<Group>> {
    let mut by_shard: BTreeMap<ShardNo, Vec<Group>> = BTreeMap::new();
    for group in Group::ALL {
        let shard = map.place(group, user.bucket()).shard;
        if map.pins_of(group, user.bucket()).any(|(pinned, place)| pinned == user && place.shard == shard) {
            by_shard.entry(shard).or_default().push(group);
        }
    }
    by_shard
}

impl Mover {
    /// What moves a user to a shard, apart from its bucket: one request for each shard that has rows of the user now.
    ///
    /// To the shard that owns the bucket is back to the bucket. In the split layout accounts go to shards with accounts, content to
    /// the others.
    pub async fn pin_requests(&self, user: UserId, target: ShardNo) -> Result<Vec<Request>> {
        self.shards.refresh().await?;
        let (map, layout) = (self.shards.map(), self.shards.catalog().layout);
        let has_accounts = Bucket::all().any(|bucket| map.place(Group::Account, bucket).shard == target);
        let may_go = |group| layout == Layout::Colocated || (group == Group::Account) == has_accounts;
        let requests = self.requests(user, |group| may_go(group).then_some(target)).await?;
        if requests.is_empty() {
            return Err(Error::refused(
                format!("what this user can have on shard {target} is there already"),
                "`therev where ID` says where everybody is",
            ));
        }
        Ok(requests)
    }

    /// What moves a user back to its bucket.
    pub async fn unpin_requests(&self, user: UserId) -> Result<Vec<Request>> {
        self.shards.refresh().await?;
        let map = self.shards.map();
        let requests = self.requests(user, |group| Some(map.place(group, user.bucket()).shard)).await?;
        if requests.is_empty() {
            return Err(Error::refused("this user is with its bucket", "`therev move user` places a user apart"));
        }
        Ok(requests)
    }

    /// Whether a user's bucket has come to the shard where the user is apart, so that [`Mover::release`] brings them together.
    pub async fn may_release(&self, user: UserId) -> Result<bool> {
        self.shards.refresh().await?;
        Ok(!beside_its_bucket(&self.shards.map(), user).is_empty())
    }

    /// Has a user be with the bucket again whose bucket has come to the shard where the user is apart: nothing moves. `false`:
    /// it is not so.
    pub async fn release(&self, user: UserId) -> Result<bool> {
        self.shards.refresh().await?;
        let (map, bucket) = (self.shards.map(), user.bucket());
        let mut is_released = false;
        for (shard, groups) in beside_its_bucket(&map, user) {
            let side = Side::connect(&self.admin()?, Which::Source, shard).await?;
            let names: Vec<&str> = groups.iter().map(|group| group.name()).collect();
            // Of all groups at once: where one went with the bucket and another stayed, they could not be brought together again.
            let released = side.one("SELECT therev.release_pin($1, $2)", &[&names, &user.0]).await?;
            is_released |= released.get::<_, bool>(0);
            let epochs: Vec<i64> = groups.iter().map(|group| map.place_of(*group, user.into()).epoch.max(1)).collect();
            let record = "SELECT therev.record_pin($1, $2, $3, $4, $5)";
            let params: [&(dyn ToSql + Sync); 5] = [&names, &user.0, &bucket.sql(), &shard.0, &epochs];
            let recorded = self.control().await?.query(record, &params).await;
            recorded.map_err(|source| Error::Sql { database: shards::Database::Control, source })?;
        }
        self.shards.refresh().await?;
        Ok(is_released)
    }

    /// What brings the rows of a user's groups to where each is to be; `None`: it stays. Where an open relocation has brought them there
    /// already, that is what it was begun for.
    async fn requests(&self, user: UserId, target: impl Fn(Group) -> Option<ShardNo>) -> Result<Vec<Request>> {
        let whose = Whose::from(user);
        let mut by_ends: BTreeMap<(ShardNo, ShardNo), Vec<Group>> = BTreeMap::new();
        for group in Group::ALL {
            let Some(target) = target(group) else { continue };
            // The shard's own word, for the map may be old.
            let mut source = self.shards.map().place_of(group, whose);
            for _ in 0..self.shards.numbers().len() {
                let said = self.shards.ownership(source.shard, group, &[whose]).await?;
                match said.first().and_then(|said| said.ownership.hint(source.epoch).place(source.shard)) {
                    Some(place) if place.shard != source.shard => source = place,
                    _ => break,
                }
            }
            if source.shard != target {
                by_ends.entry((source.shard, target)).or_default().push(group);
            }
        }
        let brought = |one: &Relocation| {
            let is_there = |group: &Group| {
                target(*group) == Some(one.target) && !by_ends.values().any(|on_their_way| on_their_way.contains(group))
            };
            one.pin == Some(user) && one.groups.iter().all(is_there)
        };
        let open = self.list(true).await?.into_iter().filter(brought);
        let begun: Vec<_> = open.map(|one| ((one.source, one.target), one.groups)).collect();
        let buckets = vec![user.bucket()];
        let request =
            |((source, target), groups)| Request { groups, buckets: buckets.clone(), pin: Some(user), source, target };
        Ok(begun.into_iter().chain(by_ends).map(request).collect())
    }

    /// Who should be placed apart by the load that all nodes have told lately, and where.
    pub async fn plan_isolation(&self) -> Result<Vec<Isolation>> {
        self.shards.refresh().await?;
        let told = self.shards.hot_users(BUSIEST).await?;
        let (catalog, map) = (self.shards.catalog(), self.shards.map());
        let shards = u32::try_from(catalog.shards.len()).unwrap_or(u32::MAX);
        if told.operations_per_s < QUIET * f64::from(shards) {
            return Ok(Vec::new());
        }
        // Accounts have one shard in the split layout, and nobody counts what is done there.
        let group = if catalog.layout == Layout::Split { Group::Content } else { Group::Account };
        let users = told.users.iter().map(|one| {
            let user = UserId(one.user_id);
            let shard = map.place_of(group, user.into()).shard;
            UserLoad { user, bucket: user.bucket(), shard, bytes: 0, load: load(one.operations_per_s) }
        });
        let users: Vec<UserLoad> = users.collect();
        // Shards that have none of these rows are no place for them: in the split layout the accounts'. But for those that
        // have users of this group apart.
        let places = || map.places(group).map(|(bucket, place)| (bucket, place.shard));
        let holding: BTreeSet<ShardNo> =
            places().map(|(_, shard)| shard).chain(users.iter().map(|user| user.shard)).collect();
        let shards: Vec<Shard> = catalog
            .shards
            .iter()
            .filter(|entry| catalog.layout == Layout::Colocated || holding.contains(&entry.shard))
            .map(|entry| Shard { shard: entry.shard, weight: crate::rebalance::whole(entry.weight) })
            .collect();
        isolate_told(&shards, places(), &users, load(told.operations_per_s))
            .map_err(|error| Error::refused(error.to_string(), "`therev shard list` shows where everything is"))
    }

    /// Places users apart whose load has asked for it in two looks, for as long as it is polled: begun here, carried through by whoever
    /// carries on. Nobody takes a user back who was busy for a moment.
    pub async fn isolate_hot(&self) {
        let mut before = BTreeSet::new();
        loop {
            tokio::time::sleep(ISOLATE_EVERY).await;
            let outcome = async {
                let hot = self.plan_isolation().await?;
                let now: BTreeSet<UserId> = hot.iter().map(|one| one.user).collect();
                let still = hot.into_iter().filter(|one| before.contains(&one.user)).collect();
                before = now;
                self.isolate(still, "therev").await
            };
            match outcome.await {
                Ok(begun) => begun.iter().for_each(|one| {
                    tracing::info!(relocation = one.relocation, user = ?one.pin, "a hot user is placed apart");
                }),
                Err(error) => tracing::warn!(error = %crate::mover::chain(&error), "no hot user is placed apart"),
            }
        }
    }

    /// Places these users apart; says what was begun. While a user is on the way nobody else sets out: the load is looked at anew after.
    pub async fn isolate(&self, hot: Vec<Isolation>, actor: &str) -> Result<Vec<Relocation>> {
        let mut begun = Vec::new();
        if self.list(true).await?.iter().any(|open| open.pin.is_some() && !open.rests()) {
            return Ok(begun);
        }
        for one in hot {
            match self.isolate_one(one, actor).await {
                Ok(more) => begun.extend(more),
                // Its bucket is on the way, perhaps with another hot user's, a shard has no room, or says nothing: its turn comes,
                // and the others' is now.
                Err(error) => {
                    tracing::warn!(user = %one.user, error = %crate::mover::chain(&error), "a hot user is not placed apart now");
                }
            }
        }
        Ok(begun)
    }

    /// Begins what places a user apart. Nothing for one who has no rows: somebody asks for an id that nobody has.
    async fn isolate_one(&self, one: Isolation, actor: &str) -> Result<Vec<Relocation>> {
        let mut begun = Vec::new();
        for request in self.pin_requests(one.user, one.to).await? {
            self.may_have_more_apart(&request)?;
            let plan = self.plan(&request).await?;
            if plan.rows > 0 {
                begun.push(self.begin(&plan, Goal::Done, actor).await?);
            }
        }
        Ok(begun)
    }

    /// Refuses where it would be one too many for the shard that takes the user, or for the one that owns the bucket.
    fn may_have_more_apart(&self, request: &Request) -> Result<()> {
        let map = self.shards.map();
        for group in &request.groups {
            let home = |bucket| map.place(*group, bucket).shard;
            let bucket = request.buckets.first().copied();
            for shard in [Some(request.target), bucket.map(home)].into_iter().flatten() {
                let of_group = map.pins().iter().filter(|((of, _), _)| of == group);
                let apart =
                    of_group.flat_map(|((_, bucket), users)| users.values().map(|at| (home(*bucket), at.shard)));
                if apart.filter(|(from, to)| *from == shard || *to == shard).count() >= APART_MAX {
                    return Err(Error::refused(
                        format!("shard {shard} has to do with {APART_MAX} users apart from their buckets already"),
                        "`therev user unpin ID` brings one back who is no more as busy",
                    ));
                }
            }
        }
        Ok(())
    }

    /// What moves the users that a shard has apart from their buckets, by its own word, back to these, where another shard owns them.
    pub(crate) async fn pins_on(&self, shard: ShardNo) -> Result<Vec<Request>> {
        let map = self.shards.map();
        let side = Side::connect(&self.admin()?, Which::Source, shard).await?;
        let here =
            "SELECT DISTINCT p.user_id FROM therev.pins AS p WHERE p.state IN ('owned', 'draining') ORDER BY p.user_id";
        let mut requests = Vec::new();
        for row in side.query(here, &[]).await? {
            let user = UserId(row.get("user_id"));
            requests.extend(self.requests(user, |group| Some(map.place(group, user.bucket()).shard)).await?);
        }
        requests.retain(|request| request.source == shard);
        Ok(requests)
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "operations a second fit by far")]
fn load(operations_per_s: f64) -> u64 {
    (operations_per_s * LOAD_UNIT).round() as u64
}
