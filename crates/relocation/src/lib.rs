//! The one way rows move from shard to shard: copy, catch up, verify, switch, finish.
