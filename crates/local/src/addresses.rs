//! The servers' addresses as one piece of text.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;

/// What another process needs to use the servers: written as JSON, so that it fits one variable.
///
/// The addresses hold the superuser's password, and name the database `postgres`, which every server has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// The shards' servers, in order.
    pub servers: Vec<String>,
    /// The first replica of the first server, if there is one.
    pub replica: Option<String>,
    /// Where PostgreSQL's programs are.
    pub pg_bin: PathBuf,
}

impl fmt::Display for Addresses {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

impl FromStr for Addresses {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        serde_json::from_str(text).map_err(|source| Error::BadAddresses { source })
    }
}
