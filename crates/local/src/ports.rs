//! Ports that nobody else has.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;

use rand::RngExt;

use crate::Error;

/// Below the ports that systems hand out to outgoing connections, of which there are new ones every moment.
const CHOICE: Range<u16> = 15_000..32_000;
/// How many ports are looked at for each that is wanted.
const LOOKS: usize = 1_000;

/// So many different free ports on the loopback address.
///
/// By chance, so that two who look at the same time hardly find the same.
pub(crate) fn free(count: usize) -> Result<Vec<u16>, Error> {
    let mut random = rand::rng();
    let mut found = BTreeSet::new();
    for _ in 0..count.saturating_mul(LOOKS) {
        if found.len() == count {
            break;
        }
        let port = random.random_range(CHOICE);
        if is_free(port) {
            found.insert(port);
        }
    }
    if found.len() < count {
        let source = std::io::Error::from(std::io::ErrorKind::AddrInUse);
        return Err(Error::NoPort { source });
    }
    Ok(found.into_iter().collect())
}

/// Whether a server could listen here now.
pub(crate) fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}
