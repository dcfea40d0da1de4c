//! The examples run.

#[expect(dead_code, reason = "an example's main is not called by a test")]
#[path = "../../examples/quickstart.rs"]
mod quickstart;

use testkit::TestCluster;

#[tokio::test]
async fn quickstart_runs() {
    let cluster = TestCluster::usual().await;
    quickstart::run(cluster.config()).await.expect("the example runs");
    cluster.finish().await;
}
