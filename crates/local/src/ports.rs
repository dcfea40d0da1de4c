//! Ports that nobody else has.

use std::net::{Ipv4Addr, TcpListener};

use crate::Error;

/// So many different free ports on the loopback address. The system picks them; all are held until the last is found,
/// so that none comes twice.
pub(crate) fn free(count: usize) -> Result<Vec<u16>, Error> {
    let held: Vec<TcpListener> = (0..count)
        .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
        .collect::<Result<_, _>>()
        .map_err(|source| Error::NoPort { source })?;
    held.iter()
        .map(|listener| Ok(listener.local_addr()?.port()))
        .collect::<Result<_, _>>()
        .map_err(|source| Error::NoPort { source })
}

/// Whether a server could listen here now.
pub(crate) fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}
