//! A replication slot together with the snapshot from which its stream begins: what makes a copy and a stream fit without a
//! gap or an overlap. PostgreSQL offers the two together only to a connection that speaks the replication protocol.

use crate::address::Login;
use crate::admin::not_connected;
use crate::error::{Database, Error};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_postgres::config::Host;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

/// A logical replication slot that was just made, and the snapshot that it begins at.
pub struct SlotSnapshot {
    /// For `SET TRANSACTION SNAPSHOT`, as long as this value lives.
    pub snapshot: String,
    /// The snapshot goes with this connection.
    _client: Client,
}

/// Makes a slot for `pgoutput`. Waits until every transaction that writes on this server now has ended.
pub(crate) async fn make(
    database: Database,
    config: &tokio_postgres::Config,
    slot: &str,
) -> Result<SlotSnapshot, Error> {
    let sql = |source| Error::of_statement(database, true, source);
    let client = connect(database, config).await?;
    let made = client
        .simple_query(&format!("CREATE_REPLICATION_SLOT {slot} LOGICAL pgoutput (SNAPSHOT 'export')"))
        .await
        .map_err(sql)?;
    let row = made.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get("snapshot_name"),
        _ => None,
    });
    let odd = || Error::Answer { database, reason: "a new slot came without a snapshot".into() };
    Ok(SlotSnapshot { snapshot: row.ok_or_else(odd)?.to_owned(), _client: client })
}

/// Connects to whichever of the hosts takes writes.
async fn connect(database: Database, config: &tokio_postgres::Config) -> Result<Client, Error> {
    let mut last = Error::Down { database, source: None };
    for (host, port) in config.get_hosts().iter().zip(config.get_ports()) {
        match connect_to(database, config, host, *port).await {
            Ok(Some(client)) => return Ok(client),
            Ok(None) => {}
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// `None`: it is a standby.
async fn connect_to(
    database: Database,
    config: &tokio_postgres::Config,
    host: &Host,
    port: u16,
) -> Result<Option<Client>, Error> {
    let down = || Error::Down { database, source: None };
    let Host::Tcp(name) = host else { return Err(Error::Config("a slot is made over TCP".into())) };
    let limit = config.get_connect_timeout().copied().unwrap_or(std::time::Duration::MAX);
    let stream = tokio::time::timeout(limit, TcpStream::connect((name.as_str(), port))).await;
    let stream = stream.map_err(|_| down())?.map_err(|_| down())?;
    // A frozen server takes the connection, too, and says nothing.
    let entered = async {
        let raw = Replicating { stream, first: First::Awaited };
        let (client, connection) =
            config.connect_raw(raw, NoTls).await.map_err(|source| not_connected(database, source))?;
        tokio::spawn(connection);
        let answer = client.simple_query("SELECT pg_is_in_recovery()::text AS it").await;
        Ok::<_, Error>((client, answer.map_err(|source| Error::of_statement(database, false, source))?))
    };
    let (client, answer) = tokio::time::timeout(limit, entered).await.map_err(|_| down())??;
    let is_standby =
        answer.iter().any(|message| matches!(message, SimpleQueryMessage::Row(row) if row.get("it") == Some("true")));
    Ok((!is_standby).then_some(client))
}

impl Login {
    /// How another server reaches this database: libpq's words, password included.
    pub(crate) fn conninfo(config: &tokio_postgres::Config) -> String {
        let quoted = |value: &str| format!("'{}'", value.replace('\\', r"\\").replace('\'', r"\'"));
        let names = config.get_hosts().iter().map(|host| match host {
            Host::Tcp(name) => name.clone(),
            Host::Unix(path) => path.to_string_lossy().into_owned(),
        });
        let hosts: Vec<String> = names.collect();
        let ports: Vec<String> = config.get_ports().iter().map(ToString::to_string).collect();
        let mut words = vec![
            ("host", hosts.join(",")),
            ("port", ports.join(",")),
            ("dbname", config.get_dbname().unwrap_or_default().to_owned()),
            ("user", config.get_user().unwrap_or_default().to_owned()),
            ("target_session_attrs", "read-write".to_owned()),
            ("connect_timeout", "10".to_owned()),
        ];
        if let Some(password) = config.get_password() {
            words.push(("password", String::from_utf8_lossy(password).into_owned()));
        }
        let words: Vec<String> = words.iter().map(|(key, value)| format!("{key}={}", quoted(value))).collect();
        words.join(" ")
    }
}

/// A connection whose first packet asks for the replication protocol too, which the driver does not know.
struct Replicating {
    stream: TcpStream,
    first: First,
}

enum First {
    /// The start-up packet was not written yet.
    Awaited,
    /// It is being written: what is left of it, and how long it was before it was changed.
    Under(Bytes, usize),
    Over,
}

/// The start-up packet with one parameter more: its length, the protocol's version, then pairs of words, then a zero.
fn ask_for_replication(packet: &[u8]) -> io::Result<Bytes> {
    let pairs = packet.get(8..packet.len() - 1).ok_or_else(|| io::Error::other("a start-up packet that is none"))?;
    let more = b"replication\0database\0";
    let mut changed = BytesMut::with_capacity(packet.len() + more.len());
    let length = u32::try_from(packet.len() + more.len()).map_err(io::Error::other)?;
    changed.put_u32(length);
    changed.put_slice(&packet[4..8]);
    changed.put_slice(pairs);
    changed.put_slice(more);
    changed.put_u8(0);
    Ok(changed.freeze())
}

impl AsyncRead for Replicating {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Replicating {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        loop {
            match &mut this.first {
                First::Awaited => this.first = First::Under(ask_for_replication(buf)?, buf.len()),
                First::Under(left, whole) if left.is_empty() => {
                    let whole = *whole;
                    this.first = First::Over;
                    return Poll::Ready(Ok(whole));
                }
                First::Under(left, _) => {
                    let written = ready!(Pin::new(&mut this.stream).poll_write(cx, left))?;
                    left.advance(written);
                }
                First::Over => return Pin::new(&mut this.stream).poll_write(cx, buf),
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_up_packet_gains_one_parameter() {
        let packet = b"\0\0\0\x10\0\x03\0\0user\0me\0\0";
        let changed = ask_for_replication(packet).unwrap();
        assert_eq!(&changed[..], b"\0\0\0\x26\0\x03\0\0user\0me\0replication\0database\0\0");
        assert_eq!(usize::from(changed[3]), changed.len());
    }

    #[test]
    fn a_password_with_quotes_survives() {
        let mut config = tokio_postgres::Config::new();
        config.host("a").port(1).host("b").port(2).dbname("d").user("u").password(r"p'\ w");
        let said = Login::conninfo(&config);
        assert!(said.starts_with("host='a,b' port='1,2' dbname='d'"), "{said}");
        assert!(said.ends_with(r"password='p\'\\ w'"), "{said}");
    }
}
