//! A TCP proxy in front of one server, which spoils connections as it is told.
//!
//! It knows nothing of PostgreSQL but how an error looks: what it takes for a message is what arrives at once, which is how the driver writes
//! its requests and how the server writes its answers.

use std::io;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// How much is taken from a connection at once.
const PIECE: usize = 1 << 16;

/// An `ErrorResponse`: its kind, its length, and its fields.
const LAST_WORDS: &[u8] = b"E\0\0\0\x39SPANIC\0VPANIC\0C53100\0Mcould not write to a log file\0\0";

/// What becomes of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Everything passes.
    Pass,
    /// Everything passes this much later, in both directions.
    Delay(Duration),
    /// Nothing passes until the mode changes, as in a network that lost its way; no connection ends.
    Stall,
    /// Connections that are open go on, new ones end at once.
    Refuse,
    /// All connections end, new ones at once.
    Cut,
    /// A request that holds these bytes breaks its connection; all others pass. Empty: any request does.
    Break(&'static [u8], At),
}

/// Where a connection breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// The server gets half of the request.
    HalfRequest,
    /// The server gets the request and answers; the client gets nothing of it.
    NoAnswer,
    /// The client gets half of the answer.
    HalfAnswer,
    /// Nothing of the request arrives, nor of what comes after it; but the connection does not end, until all do.
    Silence,
    /// The server gets the request and answers; then everything is cut, as if it had crashed after the commit.
    Crash,
    /// The server gets the request and answers; the client gets its last words instead, as of one that found no room for its log
    /// after the commit.
    Panic,
}

#[derive(Clone, Copy)]
struct Way {
    target: u16,
    mode: Mode,
    /// How often all connections were cut: a cut reaches them however soon another mode follows.
    cuts: u64,
}

/// A port of this machine that leads to another one. Gone, with its connections, when it is dropped.
pub struct Proxy {
    port: u16,
    way: Arc<watch::Sender<Way>>,
}

impl Proxy {
    /// Begins to listen, on a port that is free.
    pub async fn start(target: u16) -> io::Result<Proxy> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        let (way, seen) = watch::channel(Way { target, mode: Mode::Pass, cuts: 0 });
        let way = Arc::new(way);
        tokio::spawn(listen(listener, seen, Arc::downgrade(&way)));
        Ok(Proxy { port, way })
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// From now on connections are opened to this port.
    pub fn lead_to(&self, target: u16) {
        self.way.send_modify(|way| way.target = target);
    }

    /// From now on this becomes of connections.
    pub fn set(&self, mode: Mode) {
        self.way.send_modify(|way| way.change(mode));
    }
}

impl Way {
    fn change(&mut self, mode: Mode) {
        self.mode = mode;
        self.cuts += u64::from(mode == Mode::Cut);
    }
}

async fn listen(listener: TcpListener, mut way: watch::Receiver<Way>, change: Weak<watch::Sender<Way>>) {
    loop {
        let client = tokio::select! {
            accepted = listener.accept() => accepted,
            Err(_) = way.changed() => return,
        };
        // An error here is of one connection that ended before it was taken.
        let Ok((client, _)) = client else { continue };
        tokio::spawn(carry(client, way.clone(), change.clone()));
    }
}

/// One connection, to its end. What it ends with, its two sides see for themselves.
async fn carry(client: TcpStream, way: watch::Receiver<Way>, change: Weak<watch::Sender<Way>>) {
    let Way { target, mode, cuts } = *way.borrow();
    if matches!(mode, Mode::Cut | Mode::Refuse) {
        return;
    }
    let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, target)).await else { return };
    // Nothing that is delayed here should come from the system's own gathering.
    client.set_nodelay(true).ok();
    server.set_nodelay(true).ok();
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let broken = Mutex::new(None);
    tokio::select! {
        _ = pump(from_client, to_server, way.clone(), cuts, |mode, request| of_request(mode, request, &broken)) => {}
        _ = pump(from_server, to_client, way, cuts, |_, answer| of_answer(answer, &broken)) => {}
    }
    let crashed = *broken.lock().unwrap_or_else(PoisonError::into_inner) == Some(At::Crash);
    if let (true, Some(change)) = (crashed, change.upgrade()) {
        change.send_modify(|way| way.change(Mode::Cut));
    }
}

/// What becomes of a piece, and of its connection.
enum Fate {
    /// It passes.
    Passes,
    /// So much of it does, and the connection ends.
    EndsAfter(usize),
    /// This does in its place, and the connection ends.
    EndsWith(&'static [u8]),
    /// It does not, and the connection does not end by itself.
    IsLost,
}

fn of_request(mode: Mode, request: &[u8], broken: &Mutex<Option<At>>) -> Fate {
    match mode {
        Mode::Break(sign, at) if holds(request, sign) => match at {
            At::HalfRequest => Fate::EndsAfter(request.len() / 2),
            At::Silence => Fate::IsLost,
            At::NoAnswer | At::HalfAnswer | At::Crash | At::Panic => {
                *broken.lock().unwrap_or_else(PoisonError::into_inner) = Some(at);
                Fate::Passes
            }
        },
        _ => Fate::Passes,
    }
}

fn of_answer(answer: &[u8], broken: &Mutex<Option<At>>) -> Fate {
    match *broken.lock().unwrap_or_else(PoisonError::into_inner) {
        None => Fate::Passes,
        Some(At::HalfAnswer) => Fate::EndsAfter(answer.len() / 2),
        Some(At::Panic) => Fate::EndsWith(LAST_WORDS),
        Some(_) => Fate::EndsAfter(0),
    }
}

/// Carries one direction, to its end.
async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut way: watch::Receiver<Way>,
    since: u64,
    fate: impl Fn(Mode, &[u8]) -> Fate,
) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    while let Some(piece) = next(&mut from, &mut buffer, &mut way, since).await? {
        let mode = way.borrow().mode;
        match fate(mode, piece) {
            Fate::Passes => to.write_all(piece).await?,
            Fate::EndsAfter(count) => return to.write_all(&piece[..count]).await,
            Fate::EndsWith(last) => return to.write_all(last).await,
            // The other direction ends them both.
            Fate::IsLost => return std::future::pending().await,
        }
    }
    Ok(())
}

/// The next bytes, when the mode lets them go; `None` where the connection ends, as by a cut after the first `since`.
async fn next<'a>(
    from: &mut OwnedReadHalf,
    piece: &'a mut [u8],
    way: &mut watch::Receiver<Way>,
    since: u64,
) -> io::Result<Option<&'a [u8]>> {
    let mut ended = way.clone();
    let passed = async {
        let count = from.read(piece).await?;
        let mode = way.borrow().mode;
        if let Mode::Delay(time) = mode {
            tokio::time::sleep(time).await;
        }
        // Of a proxy that is gone the select below takes care.
        way.wait_for(|way| way.mode != Mode::Stall).await.ok();
        Ok::<_, io::Error>(count)
    };
    let count = tokio::select! {
        count = passed => count?,
        // The mode, or the end of the proxy.
        _ = ended.wait_for(|way| way.cuts > since) => 0,
    };
    Ok((count > 0).then(|| &piece[..count]))
}

fn holds(bytes: &[u8], sign: &[u8]) -> bool {
    sign.is_empty() || bytes.windows(sign.len()).any(|part| part == sign)
}
