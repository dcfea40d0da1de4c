//! The cluster as a whole.

use std::fs;
use std::path::{Path, PathBuf};

use crate::account::{Account, remove};
use crate::binaries::Binaries;
use crate::place::Place;
use crate::running::Running;
use crate::server::{Server, ServerStatus};
use crate::side_by_side::{side_by_side, tell};
use crate::state::{Lock, State};
use crate::{Addresses, Error, Options, ServerId, ports, replica};

/// The servers of one folder.
///
/// The value holds nothing open: dropping it leaves the servers running, and any other process may [`Cluster::open`]
/// the same folder.
#[derive(Debug)]
pub struct Cluster {
    pub(crate) place: Place,
    pub(crate) state: State,
    pub(crate) account: Account,
}

/// What a promotion came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promoted {
    /// Which server is the primary now.
    pub primary: ServerId,
    /// Since when acknowledged writes may be lost by it, as a sentence; `None`: none is.
    pub may_be_lost: Option<String>,
}

impl Cluster {
    /// Makes what is missing, starts what is down, rebuilds replicas that cannot follow, and returns when all answer.
    ///
    /// `say` hears one line per step. A port that a stranger has taken while its server was down is exchanged, so
    /// compare [`Cluster::shard_urls`] with what was registered elsewhere.
    pub fn up(options: &Options, say: &mut dyn FnMut(&str)) -> Result<Self, Error> {
        options.check()?;
        fs::create_dir_all(&options.dir).map_err(Error::file("make", &options.dir))?;
        let dir = fs::canonicalize(&options.dir).map_err(Error::file("find", &options.dir))?;
        // `pg_ctl` hands paths to a shell between double quotes.
        let is_odd = |text: &str| text.contains(|it: char| it.is_control() || "\"$`\\".contains(it));
        if dir.to_str().is_none_or(is_odd) {
            return Err(Error::OddPath { dir });
        }
        let _lock = Lock::take(&dir, say)?;
        let mut cluster = match State::load(&dir)? {
            Some(state) => Self::again(dir, state, options)?,
            None => Self::anew(dir, options, say)?,
        };
        cluster.place.make(cluster.account)?;
        cluster.check_data()?;
        cluster.state.synchronous = options.synchronous;
        cluster.settle_replicas(options.replicas, say)?;
        cluster.settle_standbys(options.standbys, say)?;
        let mut tries = 1;
        loop {
            cluster.settle_ports(say)?;
            cluster.state.save(&cluster.place.dir)?;
            match cluster.start_all(say) {
                // Somebody took a port between the look at it and the server's start.
                Err(error) if error.is_lost_port() && tries < PORT_TRIES => tries += 1,
                outcome => return outcome.map(|()| cluster),
            }
        }
    }

    fn start_all(&mut self, say: &mut dyn FnMut(&str)) -> Result<(), Error> {
        let (followers, primaries): (Vec<_>, Vec<_>) =
            self.state.servers().into_iter().partition(|it| self.state.source(*it).is_some());
        let made = side_by_side(&primaries, say, |id, to| self.server(id).make(to));
        self.remember_made()?;
        made?;
        side_by_side(&primaries, say, |id, to| {
            let server = self.server(id);
            server.start(to)?;
            replica::promote(&server, to)?;
            server.make_databases()
        })?;
        side_by_side(&followers, say, |id, to| replica::raise(&self.server(id), to))?;
        self.settle_waits()
    }

    /// Remembers which shards have data by now.
    fn remember_made(&mut self) -> Result<(), Error> {
        for shard in self.state.shards().collect::<Vec<_>>() {
            if self.server(self.state.primary(shard)).data().exists() {
                self.state.set_made(shard, true);
            }
        }
        self.state.save(&self.place.dir)
    }

    /// Stops where a shard's data was made and is gone: an empty server in its place would have all copies thrown away that
    /// do not fit it.
    fn check_data(&self) -> Result<(), Error> {
        let is_lost =
            |shard: &u16| self.state.is_made(*shard) && !self.server(self.state.primary(*shard)).data().exists();
        let Some(shard) = self.state.shards().find(is_lost) else { return Ok(()) };
        let replicas = self.state.servers().into_iter().filter(|id| shard == 0 && matches!(id, ServerId::Replica(_)));
        Err(Error::DataGone {
            shard,
            data: self.server(self.state.primary(shard)).data(),
            standby: self.state.members(shard).find(|id| self.server(*id).is_standby()),
            copy: replicas.map(|id| self.server(id).data()).find(|data| data.exists()),
        })
    }

    /// Takes the right to change the cluster, and reads what others have made of it meanwhile.
    fn lock(&self, say: &mut dyn FnMut(&str)) -> Result<(Lock, State), Error> {
        self.place.claim(self.account)?;
        let lock = Lock::take(&self.place.dir, say)?;
        let state = State::load(&self.place.dir)?.ok_or_else(|| Error::NoCluster { dir: self.place.dir.clone() })?;
        Ok((lock, state))
    }

    /// The same cluster with what is remembered of it now.
    fn with(&self, state: State) -> Self {
        Self { place: self.place.clone(), state, account: self.account }
    }

    /// Lets commits wait for the standbys that run by now, where they are to wait.
    fn settle_waits(&self) -> Result<(), Error> {
        let primaries = self.state.shards().map(|shard| self.server(self.state.primary(shard)));
        primaries.filter(|it| self.state.synchronous && it.data().exists()).try_for_each(|it| it.configure_running())
    }

    /// Makes a standby the primary of its shard, the one that has come furthest, and the old primary its standby. An old
    /// primary that still runs is stopped first, in order, so that nothing is lost; where none of its standbys receives what it writes,
    /// that is refused. Says which server it is now, and what may be lost.
    ///
    /// Returns when the new primary takes writes and the others follow it; killed in between, [`Cluster::up`] or another
    /// promotion goes on.
    pub fn promote(&mut self, shard: u16, say: &mut dyn FnMut(&str)) -> Result<Promoted, Error> {
        let new = self.put_first(shard, say)?;
        self.follow(shard, say)?;
        Ok(new)
    }

    /// The second half of [`Cluster::promote`]: all other servers of the shard follow its primary.
    pub fn follow(&self, shard: u16, say: &mut dyn FnMut(&str)) -> Result<(), Error> {
        let (_lock, state) = self.lock(say)?;
        let now = self.with(state);
        let primary = now.state.primary(shard);
        let of_first = |id: &ServerId| shard == 0 && matches!(id, ServerId::Replica(_));
        let followers: Vec<ServerId> = now
            .state
            .servers()
            .into_iter()
            .filter(|id| *id != primary && (now.state.members(shard).any(|member| member == *id) || of_first(id)))
            .collect();
        side_by_side(&followers, say, |id, to| replica::raise(&now.server(id), to))?;
        now.settle_waits()
    }

    /// The first half of [`Cluster::promote`]: the new primary takes writes, nobody follows it yet.
    pub fn put_first(&mut self, shard: u16, say: &mut dyn FnMut(&str)) -> Result<Promoted, Error> {
        let (_lock, state) = self.lock(say)?;
        self.state = state;
        self.port(ServerId::Shard(shard))?;
        let old = self.state.primary(shard);
        if self.server(old).is_standby() {
            match self.end_promotion(old, say) {
                Ok(ended) => return Ok(ended),
                Err(error) => say(&format!("{old} was to become the primary and does not: {error}")),
            }
        }
        let mut standbys: Vec<ServerId> = self.state.members(shard).filter(|it| *it != old).collect();
        standbys.retain(|it| self.server(*it).data().exists());
        // `up` starts nothing that follows a server which does not start. An old primary that was to become a standby, and is none yet,
        // would take writes.
        if self.server(old).running().postmaster().is_none() {
            standbys.retain(|it| self.server(*it).is_standby());
            side_by_side(&standbys, say, |id, to| self.server(id).start(to)).ok();
        }
        let is_running = |it: &ServerId| self.server(*it).running().postmaster().is_some();
        let mut running: Vec<ServerId> = standbys.into_iter().filter(is_running).collect();
        if running.is_empty() {
            return Err(Error::NoStandby { shard });
        }
        // What it wrote last goes out to the standbys before it ends, if it still can.
        let was_down = self.server(old).running().postmaster().is_none();
        let following = if was_down { None } else { replica::following(&self.server(old), &running) };
        let is_left_in_order = following.is_some();
        if let Some(following) = following {
            running = following;
        }
        if running.is_empty() {
            return Err(Error::NoneFollows { shard, primary: old });
        }
        self.server(old).running().stop()?;
        let said = running.iter().filter_map(|it| Some((replica::received(&self.server(*it))?, *it)));
        let said: Vec<(u64, ServerId)> = said.collect();
        let heard: Vec<ServerId> = said.iter().map(|(_, it)| *it).collect();
        // Commits waited for any one of them: what the last one waited for may be on this one alone, which would be made anew.
        if let Some(silent) = running.iter().find(|it| !heard.contains(it))
            && !is_left_in_order
            && self.server(old).waited_for(&running)
        {
            return Err(Error::Silent { shard, standby: *silent });
        }
        let (_, new) = said.into_iter().max().ok_or(Error::NoStandby { shard })?;
        let since = replica::last_commit(&self.server(new)).map_or(" last".to_owned(), |at| format!(" after {at}"));
        // Remembered first: whatever happens now, the old primary does not come back as one.
        self.state.promote(new);
        self.state.save(&self.place.dir)?;
        side_by_side(&[new], say, |id, to| {
            let server = self.server(id);
            server.start(to)?;
            replica::promote(&server, to)
        })?;
        let has_all = is_left_in_order || self.server(old).waited_for(&heard);
        let may_be_lost = (!has_all)
            .then(|| format!("{old} was down and had not waited for {new}: what it acknowledged{since} may be lost"));
        // At once: what comes next may fail, and takes the old primary's data away.
        if let Some(lost) = &may_be_lost {
            say(lost);
        }
        Ok(Promoted { primary: new, may_be_lost })
    }

    /// Ends a promotion that was cut off after it was decided.
    fn end_promotion(&self, new: ServerId, say: &mut dyn FnMut(&str)) -> Result<Promoted, Error> {
        side_by_side(&[new], say, |id, to| {
            let server = self.server(id);
            server.start(to)?;
            replica::promote(&server, to)
        })?;
        let lost = format!("an earlier promotion of {new} was cut off: what was lost by it is not known");
        Ok(Promoted { primary: new, may_be_lost: Some(lost) })
    }

    /// Adds servers for shards until there are so many, each with as many standbys as the others have, and starts what is
    /// down. Killed in between, the same call or [`Cluster::up`] goes on.
    pub fn grow(&mut self, shards: u16, say: &mut dyn FnMut(&str)) -> Result<(), Error> {
        let (_lock, state) = self.lock(say)?;
        self.state = state;
        let standbys = u16::try_from(self.standbys()).unwrap_or(u16::MAX);
        Options { shards, standbys, ..Options::new(&self.place.dir) }.check()?;
        self.place.make(self.account)?;
        self.check_data()?;
        let missing = usize::from(shards).saturating_sub(self.state.shard_ports.len());
        self.state.shard_ports.extend(ports::free(missing)?);
        self.settle_standbys(standbys, say)?;
        self.settle_ports(say)?;
        self.state.save(&self.place.dir)?;
        self.start_all(say)
    }

    /// Stops the servers of the last shard, and removes them with their data. Does nothing where it is not there any more.
    pub fn shrink(&mut self, shard: u16, say: &mut dyn FnMut(&str)) -> Result<(), Error> {
        let (_lock, state) = self.lock(say)?;
        self.state = state;
        if usize::from(shard) + 1 != self.state.shard_ports.len() || shard == 0 {
            return Ok(());
        }
        // First, so that what an interrupted removal has removed is not taken for lost.
        self.state.set_made(shard, false);
        self.state.save(&self.place.dir)?;
        let members: Vec<ServerId> = self.state.members(shard).collect();
        side_by_side(&members, say, |id, to| {
            tell(to, id, "removing it");
            let server = self.server(id);
            server.running().stop()?;
            // Away first: half of it would be taken for a server that does not start.
            let (data, gone) = (server.data(), server.data().with_extension("gone"));
            remove(&gone)?;
            if data.exists() {
                fs::rename(&data, &gone).map_err(Error::file("move away", &data))?;
            }
            remove(&gone)
        })?;
        self.state.forget_last();
        self.state.save(&self.place.dir)
    }

    /// The cluster in this folder, running or not.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let no_cluster = || Error::NoCluster { dir: dir.to_owned() };
        let dir = fs::canonicalize(dir).map_err(|_| no_cluster())?;
        let state = State::load(&dir)?.ok_or_else(no_cluster)?;
        let place = Place::new(dir, state.outside.as_deref());
        Ok(Self { place, state, account: Account::for_servers()? })
    }

    /// Stops every server. Data stays; no process and no socket does.
    pub fn down(&self, say: &mut dyn FnMut(&str)) -> Result<(), Error> {
        self.place.claim(self.account)?;
        let _lock = Lock::take(&self.place.dir, say)?;
        stop_all(&self.place, say)
    }

    /// Stops every server and removes all that [`Cluster::up`] made. What others put into the folder stays.
    pub fn destroy(self, say: &mut dyn FnMut(&str)) -> Result<(), Error> {
        self.place.claim(self.account)?;
        let _lock = Lock::take(&self.place.dir, say)?;
        stop_all(&self.place, say)?;
        self.place.remove()?;
        // Last, so that an interrupted removal can be ended by another one.
        State::remove(&self.place.dir)?;
        remove(&Lock::file_in(&self.place.dir))?;
        // Only succeeds on an empty folder, which is what is meant.
        fs::remove_dir(&self.place.dir).ok();
        Ok(())
    }

    /// Stops and removes the servers of a cluster whose folder was here, and was deleted without [`Cluster::destroy`]: they lie outside.
    /// Says where they were; `None`: there are none.
    pub fn destroy_orphaned(dir: &Path, say: &mut dyn FnMut(&str)) -> Result<Option<PathBuf>, Error> {
        let dir = std::path::absolute(dir).map_err(Error::file("find", dir))?;
        let around = dir.parent().and_then(|parent| fs::canonicalize(parent).ok());
        let dir = around.zip(dir.file_name()).map_or(dir.clone(), |(parent, name)| parent.join(name));
        let Some(orphan) = Place::new(dir, None).orphaned(Account::for_servers()?) else { return Ok(None) };
        stop_all(&orphan, say)?;
        orphan.remove()?;
        Ok(Some(orphan.home))
    }

    /// What each server is doing, shards first.
    pub fn status(&self) -> Vec<ServerStatus> {
        self.state.servers().into_iter().filter_map(|id| self.server(id).status().ok()).collect()
    }

    /// A server's log.
    pub fn logs(&self, server: ServerId) -> Result<PathBuf, Error> {
        self.port(server)?;
        Ok(self.server(server).log())
    }

    /// Stops one server, in order.
    pub fn stop_server(&self, server: ServerId) -> Result<(), Error> {
        let (_lock, state) = self.lock(&mut |_| {})?;
        let now = self.with(state);
        now.port(server)?;
        now.server(server).running().stop()?;
        now.settle_waits()
    }

    /// Starts one server, also after a crash; its port may be another one afterwards.
    pub fn start_server(&mut self, server: ServerId, say: &mut dyn FnMut(&str)) -> Result<(), Error> {
        let (_lock, state) = self.lock(say)?;
        self.state = state;
        self.port(server)?;
        self.place.make(self.account)?;
        self.settle_port(server, say)?;
        self.state.save(&self.place.dir)?;
        side_by_side(&[server], say, |id, to| match self.state.source(id) {
            None => self.server(id).start(to),
            Some(_) => replica::raise(&self.server(id), to),
        })?;
        self.settle_waits()
    }

    /// Gives roles these passwords on every shard's server that has the role: names, each with a password.
    pub fn set_passwords(&self, roles: &[(&str, &str)], say: &mut dyn FnMut(&str)) -> Result<(), Error> {
        let (_lock, state) = self.lock(say)?;
        let now = self.with(state);
        let quoted = |text: &str| format!("'{}'", text.replace('\'', "''"));
        let one = |(role, password): &(&str, &str)| format!("({}, {})", quoted(role), quoted(password));
        // Nothing keeps the statements: who may read what was run, or a log, is not to read them.
        let sql = format!(
            "SET pg_stat_statements.track = 'none'; SET log_statement = 'none'; SET log_min_duration_statement = -1; \
             SET log_min_error_statement = 'panic';\n\
             SELECT format('ALTER ROLE %I PASSWORD %L', role_name, secret) FROM (VALUES {}) AS given (role_name, secret) \
             WHERE EXISTS (SELECT FROM pg_roles WHERE rolname = role_name) \\gexec\n",
            roles.iter().map(one).collect::<Vec<_>>().join(", ")
        );
        let primaries: Vec<ServerId> = now.state.shards().map(|shard| now.state.primary(shard)).collect();
        side_by_side(&primaries, say, |id, _| crate::sql::run(&now, id, &sql).map(drop))
    }

    /// Ends a server as a crash would, with SIGKILL, and returns when its first process is gone.
    pub fn kill(&self, server: ServerId) -> Result<(), Error> {
        self.port(server)?;
        let running = self.server(server).running();
        if let Some(postmaster) = running.postmaster() {
            running.kill(postmaster);
        }
        Ok(())
    }

    /// The server that takes a shard's writes.
    pub fn primary(&self, shard: u16) -> ServerId {
        self.state.primary(shard)
    }

    /// How many standbys each shard is to have. One that was promoted stays, even if there are to be fewer.
    pub fn standbys(&self) -> usize {
        let has = || self.state.standby_ports.first().map_or(0, Vec::len);
        self.state.standbys_wanted.map_or_else(has, usize::from)
    }

    /// How many replicas of shard 0's server there are to be.
    pub fn replicas(&self) -> usize {
        self.state.replicas_wanted.map_or(self.state.replica_ports.len(), usize::from)
    }

    /// Whether commits wait for a standby.
    pub fn is_synchronous(&self) -> bool {
        self.state.synchronous
    }

    /// Whether a shard's data was made, and its removal has not begun.
    pub fn is_made(&self, shard: u16) -> bool {
        self.state.is_made(shard)
    }

    /// How many shards there are.
    pub fn shards(&self) -> usize {
        self.state.shard_ports.len()
    }

    /// The superuser's name and password, the same on all servers.
    pub fn superuser(&self) -> (&str, &str) {
        (&self.state.superuser, &self.state.password)
    }

    /// Where PostgreSQL's programs are.
    pub fn pg_bin(&self) -> &Path {
        &self.state.pg_bin
    }

    /// The cluster's folder.
    pub fn dir(&self) -> &Path {
        &self.place.dir
    }

    /// The address of a database on a server, as psql and drivers take it, with the superuser's name and password.
    pub fn url(&self, server: ServerId, database: &str) -> Result<String, Error> {
        let State { superuser, password, .. } = &self.state;
        Ok(format!("postgresql://{superuser}:{password}@127.0.0.1:{}/{database}", self.port(server)?))
    }

    /// The address of a database on whichever of a shard's servers takes writes. The same before and after a promotion.
    fn writer_url(&self, shard: u16, database: &str) -> Result<String, Error> {
        let State { superuser, password, .. } = &self.state;
        let mut hosts = Vec::new();
        for member in self.state.members(shard) {
            hosts.push(format!("127.0.0.1:{}", self.port(member)?));
        }
        let which = if hosts.len() > 1 { "?target_session_attrs=read-write" } else { "" };
        Ok(format!("postgresql://{superuser}:{password}@{}/{database}{which}", hosts.join(",")))
    }

    /// The address of a shard's database.
    pub fn shard_url(&self, number: u16) -> Result<String, Error> {
        self.writer_url(number, &shard_database(number))
    }

    /// The addresses of all shards' databases, in order.
    pub fn shard_urls(&self) -> Vec<String> {
        (0_u16..).map_while(|number| self.shard_url(number).ok()).collect()
    }

    /// The address of the control database.
    pub fn control_url(&self) -> Result<String, Error> {
        self.writer_url(0, CONTROL_DATABASE)
    }

    /// The address of the directory's database.
    pub fn directory_url(&self) -> Result<String, Error> {
        self.writer_url(0, DIRECTORY_DATABASE)
    }

    /// The addresses of the directory's read replicas, in order.
    pub fn directory_replica_urls(&self) -> Vec<String> {
        (1_u16..).map_while(|number| self.url(ServerId::Replica(number), DIRECTORY_DATABASE).ok()).collect()
    }

    /// All servers' addresses, to pass on to another process.
    pub fn addresses(&self) -> Addresses {
        let on = |server| self.url(server, "postgres").ok();
        Addresses {
            servers: (0_u16..).map_while(|number| on(ServerId::Shard(number))).collect(),
            replica: on(ServerId::Replica(1)),
            pg_bin: self.state.pg_bin.clone(),
        }
    }

    /// The databases that a server has of its own.
    pub(crate) fn databases(server: ServerId) -> Vec<String> {
        match server {
            ServerId::Shard(0) | ServerId::Standby(0, _) => {
                vec![shard_database(0), CONTROL_DATABASE.into(), DIRECTORY_DATABASE.into()]
            }
            ServerId::Shard(number) | ServerId::Standby(number, _) => vec![shard_database(number)],
            ServerId::Replica(_) => Vec::new(),
        }
    }

    pub(crate) fn port(&self, server: ServerId) -> Result<u16, Error> {
        self.state.port(server).ok_or_else(|| Error::UnknownServer { server: server.to_string() })
    }

    fn server(&self, id: ServerId) -> Server<'_> {
        Server { cluster: self, id }
    }

    /// A cluster that was made before, with the programs of the version that made it.
    fn again(dir: PathBuf, mut state: State, options: &Options) -> Result<Self, Error> {
        if state.shard_ports.len() != usize::from(options.shards) {
            return Err(Error::OtherShards { dir, has: state.shard_ports.len(), asked: options.shards });
        }
        // Where it was at first, unless somebody names another place: not all are looked through.
        let at_first =
            Binaries::at(&state.pg_bin).ok().filter(|it| options.pg_bin.is_none() && it.major == state.pg_major);
        state.pg_bin = match at_first {
            Some(same) => same.bin,
            None => Binaries::find(options, Some(state.pg_major))?.bin,
        };
        let place = Place::new(dir, state.outside.as_deref());
        let account = Account::for_servers()?;
        place.claim(account)?;
        Ok(Self { place, state, account })
    }

    /// A cluster that was not there: its state is written before its first server is made.
    fn anew(dir: PathBuf, options: &Options, say: &mut dyn FnMut(&str)) -> Result<Self, Error> {
        let Binaries { bin, major } = Binaries::find(options, None)?;
        let account = Account::for_servers()?;
        let inside = Place::new(dir.clone(), None);
        if let Some(orphan) = inside.orphaned(account).filter(|it| !it.servers().is_empty()) {
            // Whether the folder was deleted or moved nobody can tell from here.
            return Err(Error::Orphaned { home: orphan.home });
        }
        let place = Place::choose(dir, account)?;
        say(&format!("PostgreSQL {major} from {}, servers in {}", bin.display(), place.home.display()));
        let outside = (place.home != inside.home).then(|| place.home.clone());
        let mut state = State::new(major, bin, outside, options.durable);
        state.shard_ports = ports::free(usize::from(options.shards))?;
        // Cut off after this, the next `up` still knows what was asked for.
        state.standbys_wanted = Some(options.standbys);
        state.replicas_wanted = Some(options.replicas);
        state.synchronous = options.synchronous;
        state.save(&place.dir)?;
        Ok(Self { place, state, account })
    }

    /// Gives new replicas their ports, and removes those that are too many.
    fn settle_replicas(&mut self, wanted: u16, say: &mut dyn FnMut(&str)) -> Result<(), Error> {
        self.state.replicas_wanted = Some(wanted);
        let (has, wanted) = (self.state.replica_ports.len(), usize::from(wanted));
        if has > wanted {
            let surplus: Vec<_> = (1_u16..).map(ServerId::Replica).take(has).skip(wanted).collect();
            side_by_side(&[self.state.primary(0)], say, |id, to| self.server(id).start(to))?;
            side_by_side(&surplus, say, |id, to| replica::dismiss(&self.server(id), to))?;
            self.state.replica_ports.truncate(wanted);
        } else {
            self.state.replica_ports.extend(ports::free(wanted - has)?);
        }
        Ok(())
    }

    /// Gives new standbys their ports, and removes those that are too many. A promoted one stays.
    fn settle_standbys(&mut self, wanted: u16, say: &mut dyn FnMut(&str)) -> Result<(), Error> {
        self.state.standbys_wanted = Some(wanted);
        self.state.standby_ports.resize(self.state.shard_ports.len(), Vec::new());
        for shard in self.state.shards().collect::<Vec<_>>() {
            let at = usize::from(shard);
            let has = self.state.standby_ports[at].len();
            let promoted = self.state.promoted.get(at).copied().unwrap_or(0);
            let keep = usize::from(wanted.max(promoted));
            if has > keep {
                let surplus: Vec<_> = self.state.standbys(shard).skip(keep).collect();
                side_by_side(&[self.state.primary(shard)], say, |id, to| self.server(id).start(to))?;
                side_by_side(&surplus, say, |id, to| replica::dismiss(&self.server(id), to))?;
                self.state.standby_ports[at].truncate(keep);
            } else {
                self.state.standby_ports[at].extend(ports::free(keep - has)?);
            }
        }
        Ok(())
    }

    /// Clears up after servers that are down before any is started (numbers of processes come again), and exchanges
    /// ports that were taken meanwhile.
    fn settle_ports(&mut self, say: &mut dyn FnMut(&str)) -> Result<(), Error> {
        self.state.servers().into_iter().try_for_each(|server| self.settle_port(server, say))
    }

    fn settle_port(&mut self, server: ServerId, say: &mut dyn FnMut(&str)) -> Result<(), Error> {
        let running = self.server(server).running();
        let before = self.port(server)?;
        if running.postmaster().is_some() {
            return Ok(());
        }
        running.tidy()?;
        if !ports::is_free(before) {
            let port = ports::free(1)?.first().copied().unwrap_or(before);
            say(&format!("{server}: port {before} is another program's now, taking {port}"));
            self.state.set_port(server, port);
        }
        Ok(())
    }
}

/// How often servers are started again after a port was lost to somebody else.
const PORT_TRIES: u32 = 4;

const CONTROL_DATABASE: &str = "therev_control";
const DIRECTORY_DATABASE: &str = "therev_directory";

fn shard_database(number: u16) -> String {
    format!("therev_shard_{number}")
}

/// Stops every server with data in this place.
fn stop_all(place: &Place, say: &mut dyn FnMut(&str)) -> Result<(), Error> {
    side_by_side(&place.servers(), say, |id, to| {
        let running = Running::new(place, id);
        let ran = running.postmaster().is_some();
        running.stop()?;
        if ran {
            tell(to, id, "stopped");
        }
        Ok(())
    })
}
