//! Communities of other sites.

use std::path::{Path, PathBuf};
use testkit::TestCluster;
use therev::import;

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/community")
}

/// The dump of a real site; where it does not lie beside the checkout the example stands for it.
#[tokio::test]
async fn a_real_site_comes_whole() {
    let real = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/stackexchange-quantumcomputing");
    let (folder, counts) =
        if real.is_dir() { (real, [3_461, 612, 1_060, 3_413]) } else { (example(), [13, 6, 12, 20]) };
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let report = import::stackexchange(&node, &folder, "real", &mut |_| {}).await.expect("the import ends");
    assert_eq!(["users", "threads", "answers", "comments"].map(|kind| report.written[kind]), counts, "{report:?}");
    let again = import::stackexchange(&node, &folder, "real", &mut |_| {}).await.expect("the import ends");
    assert_eq!(again.written.values().sum::<u64>(), 0, "{again:?}");
    drop(node);
    cluster.finish().await;
}

/// The same people on several sites, and a user -1 on each: everybody gets a name.
#[tokio::test]
async fn sites_that_share_their_people() {
    let folder = example();
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    for site in ["one", "two", "three", "four"] {
        let report = import::stackexchange(&node, &folder, site, &mut |_| {}).await.expect("the import ends");
        assert_eq!(report.written["users"], report.read["users"], "{site}");
    }
    drop(node);
    cluster.finish().await;
}

/// A dump that holds a row twice, of another time: it is read on, the second one is named, and what belongs to the row finds the
/// first.
#[tokio::test]
async fn a_row_twice() {
    let example = example();
    for (twice, kind) in [("Comments.xml", "comment"), ("Posts.xml", "post")] {
        let folder = tempfile::tempdir().expect("a folder");
        for file in ["Users.xml", "Posts.xml", "Comments.xml", "Votes.xml"] {
            let text = std::fs::read_to_string(example.join(file)).expect("a file of the example");
            let first = text.lines().find(|line| file == twice && line.trim_start().starts_with("<row"));
            let later = |row: &str| row.replacen("CreationDate=\"20", "CreationDate=\"30", 1);
            let text =
                first.map_or_else(|| text.clone(), |row| text.replacen(row, &format!("{row}\n{}", later(row)), 1));
            std::fs::write(folder.path().join(file), text).expect("a file");
        }
        let cluster = TestCluster::colocated().await;
        let node = cluster.node().await;
        let report =
            import::stackexchange(&node, folder.path(), "example", &mut |_| {}).await.expect("the import ends");
        let again = report.skipped.iter().find(|s| s.kind == kind && s.reason == "the same id again");
        assert_eq!(again.map(|s| s.count), Some(1), "{:?}", report.skipped);
        assert_eq!(["threads", "answers", "comments"].map(|kind| report.written[kind]), [6, 12, 20]);
        drop(node);
        cluster.finish().await;
    }
}
