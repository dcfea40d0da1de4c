//! Which of an address' hosts a connection goes to: a primary, and the standbys that may take its place.
//!
//! The driver asks one host after the other and gives each as long as a connection may take, so that a first one that says nothing
//! would keep everybody from the others; and it takes the first that lets itself be written, which may be a primary whose place
//! was taken.

use crate::life::Life;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Config, Error, NoTls};

/// How long a host may say nothing before the next one is asked beside it.
const STAGGER: Duration = Duration::from_millis(200);

/// A connection, and the task that drives it.
pub(crate) type Reached = (Client, JoinHandle<()>);

/// Connects to the host that is in this life, where one is; else to one that takes the connection, which may be a standby that has just
/// taken a silent primary's place. While nobody takes it, the caller minds the time.
pub(crate) async fn reach(config: &Config, life: Option<Life>) -> Result<Reached, Error> {
    let mut hosts = each_host(config).into_iter();
    if hosts.len() < 2 {
        return connect(config).await;
    }
    let mut asked = FuturesUnordered::new();
    let mut second_best: Option<Result<Reached, Error>> = None;
    loop {
        // The next one, now that one has answered in vain or was silent for a while.
        let are_all_asked = hosts.len() == 0;
        asked.extend(hosts.next().map(|host| ask(host, life)));
        match tokio::time::timeout(STAGGER, asked.next()).await {
            Ok(Some((Ok(reached), true))) => return Ok(reached),
            Ok(Some((answer, _))) => second_best = Some(better(second_best, answer)),
            Ok(None) => {
                if let Some(answer) = second_best.take() {
                    return answer;
                }
            }
            Err(_) if are_all_asked => match second_best {
                Some(Ok(reached)) => return Ok(reached),
                other => second_best = other,
            },
            Err(_) => {}
        }
    }
}

/// How long the host of the life that counts may say nothing before another one takes its place.
const SILENT: Duration = Duration::from_secs(1);

/// Whether one of several hosts still lets itself be written in this life or a later one, as far as they say so soon.
pub(crate) async fn is_led(config: &Config, life: Life) -> bool {
    let hosts = each_host(config);
    if hosts.len() < 2 {
        return false;
    }
    let mut asked: FuturesUnordered<_> = hosts.into_iter().map(|host| leads(host, life)).collect();
    let hears = async {
        while let Some(leads) = asked.next().await {
            if leads {
                return true;
            }
        }
        false
    };
    tokio::time::timeout(SILENT, hears).await.unwrap_or(false)
}

/// Connects to one host; says whether it is in this life or a later one.
async fn leads(host: Config, life: Life) -> bool {
    let Ok((client, _)) = connect(&host).await else { return false };
    let leads = "SELECT FROM therev.identity AS i
                  WHERE (i.incarnation = $1 OR i.incarnation_counter > $2) AND i.timeline = therev.current_timeline()";
    let params = [(&life.incarnation as &(dyn ToSql + Sync), Type::UUID), (&life.counter, Type::INT8)];
    client.query_typed_opt(leads, &params).await.is_ok_and(|row| row.is_some())
}

/// Connects to one host; says whether it is in this life.
async fn ask(host: Config, life: Option<Life>) -> (Result<Reached, Error>, bool) {
    let reached = connect(&host).await;
    let is_meant = match (&reached, life) {
        (Ok((client, _)), Some(life)) => is_in(client, life).await,
        (Ok(_), None) => true,
        (Err(_), _) => false,
    };
    (reached, is_meant)
}

/// Whether the server at the other end is in this life.
pub(crate) async fn is_in(client: &Client, life: Life) -> bool {
    let known = "SELECT FROM therev.identity AS i
                  WHERE i.incarnation = $1 AND i.timeline = therev.current_timeline()";
    client.query_typed_opt(known, &[(&life.incarnation, Type::UUID)]).await.is_ok_and(|row| row.is_some())
}

/// A connection rather than none, the earlier host's rather than a later one's; and the word of a server rather than silence.
fn better(known: Option<Result<Reached, Error>>, answer: Result<Reached, Error>) -> Result<Reached, Error> {
    match (known, answer) {
        (Some(Ok(known)), _) => Ok(known),
        (Some(Err(known)), Err(error)) if known.code().is_some() && error.code().is_none() => Err(known),
        (_, answer) => answer,
    }
}

/// A host that is gone without a word is found out in half a minute, also by those who set no deadline.
const KEEPALIVE: Duration = Duration::from_secs(15);

async fn connect(config: &Config) -> Result<Reached, Error> {
    let mut config = config.clone();
    config.keepalives_idle(KEEPALIVE).keepalives_interval(KEEPALIVE / 3).keepalives_retries(3);
    config.tcp_user_timeout(2 * KEEPALIVE);
    let (client, connection) = config.connect(NoTls).await?;
    let driven = tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection ended");
        }
    });
    Ok((client, driven))
}

/// An address for each of the hosts.
fn each_host(config: &Config) -> Vec<Config> {
    let ports = config.get_ports();
    let alone = |(at, host): (usize, &tokio_postgres::config::Host)| {
        let mut alone = Config::new();
        match host {
            tokio_postgres::config::Host::Tcp(name) => alone.host(name),
            tokio_postgres::config::Host::Unix(path) => alone.host_path(path),
        };
        if let Some(port) = ports.get(at).or(ports.first()) {
            alone.port(*port);
        }
        if let Some(user) = config.get_user() {
            alone.user(user);
        }
        if let Some(password) = config.get_password() {
            alone.password(password);
        }
        if let Some(name) = config.get_dbname() {
            alone.dbname(name);
        }
        if let Some(options) = config.get_options() {
            alone.options(options);
        }
        if let Some(name) = config.get_application_name() {
            alone.application_name(name);
        }
        if let Some(limit) = config.get_connect_timeout() {
            alone.connect_timeout(*limit);
        }
        alone.target_session_attrs(config.get_target_session_attrs());
        alone
    };
    config.get_hosts().iter().enumerate().map(alone).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_host_is_asked_as_all_of_them_are() {
        let all: Config =
            "postgresql://role:secret@a:1,b:2/base?application_name=me&options=-c%20jit%3Doff&connect_timeout=3\
             &target_session_attrs=read-write"
                .parse()
                .unwrap();
        let alone: Vec<Config> = ["a:1", "b:2"]
            .iter()
            .map(|host| {
                let address = format!(
                    "postgresql://role:secret@{host}/base?application_name=me&options=-c%20jit%3Doff&connect_timeout=3\
                     &target_session_attrs=read-write"
                );
                address.parse().unwrap()
            })
            .collect();
        assert_eq!(each_host(&all), alone);
    }
}
