//! The servers that all tests of a run share.

use std::path::PathBuf;
use std::sync::OnceLock;

use local::Addresses;
use therev::Layout;

/// Where the shared servers are.
#[derive(Debug)]
pub struct TestServers {
    /// A superuser's addresses, on the database `postgres`.
    pub servers: Vec<String>,
    /// A streaming replica of the first.
    pub replica: String,
    /// Where PostgreSQL's programs are.
    pub pg_bin: PathBuf,
}

impl TestServers {
    /// The variable in which `with-test-servers` passes them on.
    pub const VARIABLE: &str = "THEREV_TEST_SERVERS";
}

/// The servers that `with-test-servers` started. A test that needs them and has none fails with the way to run it.
pub fn test_servers() -> &'static TestServers {
    static SERVERS: OnceLock<TestServers> = OnceLock::new();
    SERVERS.get_or_init(|| {
        #[expect(clippy::disallowed_methods, reason = "a test process is given its servers in no other way")]
        let given = std::env::var(TestServers::VARIABLE).ok();
        let addresses = given.and_then(|text| text.parse::<Addresses>().ok());
        match addresses {
            Some(Addresses { servers, replica: Some(replica), pg_bin }) => TestServers { servers, replica, pg_bin },
            _ => panic!(
                "this test needs servers: run `scripts/test`, or \
                 `cargo run -p testkit --bin with-test-servers -- cargo nextest run`"
            ),
        }
    })
}

/// The layout of clusters whose test is for either: that of the variable `THEREV_TEST_LAYOUT`, colocated without it.
pub(crate) fn usual_layout() -> Layout {
    #[expect(clippy::disallowed_methods, reason = "a test process is told of its run in no other way")]
    let wanted = std::env::var("THEREV_TEST_LAYOUT");
    wanted.map_or(Layout::Colocated, |name| name.parse().expect("THEREV_TEST_LAYOUT names a layout"))
}
