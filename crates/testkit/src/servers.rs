//! The servers that tests share.

use serde::Deserialize;
use std::sync::OnceLock;

/// Where they are.
#[derive(Debug, Deserialize)]
pub struct TestServers {
    /// A superuser's addresses.
    pub servers: Vec<String>,
    /// A streaming replica of the first.
    pub replica: String,
}

/// The servers that `with-test-servers` started.
pub fn test_servers() -> &'static TestServers {
    static SERVERS: OnceLock<TestServers> = OnceLock::new();
    #[expect(clippy::disallowed_methods, reason = "the one way in")]
    SERVERS.get_or_init(|| serde_json::from_str(&std::env::var("THEREV_TEST_SERVERS").unwrap()).unwrap())
}
