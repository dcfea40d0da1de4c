//! Which server is meant.

use std::fmt;
use std::str::FromStr;

use crate::Error;

/// A server of the cluster. Shards count from 0, replicas of shard 0's server and each shard's standbys from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ServerId {
    /// The first server of this shard; number 0 also holds the control database and the directory.
    Shard(u16),
    /// A server that can take the place of a shard's first one: the shard, and its number.
    Standby(u16, u16),
    /// A streaming replica of shard 0's server, for reads of the directory.
    Replica(u16),
}

impl ServerId {
    /// The name in folders, logs and process lists, and what a person types: `shard-0`.
    pub(crate) fn file_name(self) -> String {
        match self {
            Self::Shard(number) => format!("shard-{number}"),
            Self::Standby(shard, number) => format!("standby-{shard}-{number}"),
            Self::Replica(number) => format!("replica-{number}"),
        }
    }
}

impl fmt::Display for ServerId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shard(number) => write!(out, "shard {number}"),
            Self::Standby(shard, number) => write!(out, "standby {shard}-{number}"),
            Self::Replica(number) => write!(out, "replica {number}"),
        }
    }
}

impl FromStr for ServerId {
    type Err = Error;

    /// Reads `shard 0`, `shard-0`, `0`, `standby 0-1`, `standby-0-1`, `replica 1` and `replica-1`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let unknown = || Error::UnknownServer { server: text.to_owned() };
        let (kind, number) = match text.split_once(['-', ' ']) {
            Some((kind, number)) => (kind, number),
            None => ("shard", text),
        };
        let parse = |number: &str| number.parse().map_err(|_| unknown());
        match kind {
            "shard" => Ok(Self::Shard(parse(number)?)),
            "replica" => Ok(Self::Replica(parse(number)?)),
            "standby" => {
                let (shard, number) = number.split_once('-').ok_or_else(unknown)?;
                Ok(Self::Standby(parse(shard)?, parse(number)?))
            }
            _ => Err(unknown()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        for server in [ServerId::Shard(0), ServerId::Shard(12), ServerId::Standby(3, 1), ServerId::Replica(1)] {
            assert_eq!(server.to_string().parse::<ServerId>().unwrap(), server);
            assert_eq!(server.file_name().parse::<ServerId>().unwrap(), server);
        }
        assert_eq!("3".parse::<ServerId>().unwrap(), ServerId::Shard(3));
        for wrong in ["", "-", "shard", "shard-x", "primary-1", "standby-1", "shard-70000"] {
            assert!(wrong.parse::<ServerId>().is_err(), "{wrong}");
        }
    }
}
