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
    let cluster = TestCluster::usual().await;
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
    let cluster = TestCluster::usual().await;
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
        let cluster = TestCluster::usual().await;
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

/// The rows of a dump of another time, `TIME` for a date that can be read. Post 1 is by a user who is left out.
const OLD: [(&str, &str, &str); 4] = [
    (
        "Users.xml",
        "users",
        r#"<row Id="1" TIME DisplayName="Ada" />
           <row Id="2" DisplayName="Bo" />
           <row Id="3" CreationDate="1969-12-31T23:59:59" />
           <row TIME DisplayName="Cy" />"#,
    ),
    (
        "Posts.xml",
        "posts",
        r#"<row Id="1" PostTypeId="1" TIME OwnerUserId="2" Score="1" Title="t" Body="b" />
           <row Id="2" PostTypeId="1" OwnerUserId="1" Title="t" Body="b" />
           <row Id="3" PostTypeId="2" TIME ParentId="2" Body="b" />
           <row Id="4" PostTypeId="2" TIME ParentId="1" OwnerUserId="nobody" Body="b" />
           <row Id="5" PostTypeId="2" TIME Body="b" />
           <row Id="6" PostTypeId="2" TIME ParentId="1" Score="many" Body="b" />
           <row Id="7" TIME Title="t" Body="b" />"#,
    ),
    (
        "Comments.xml",
        "comments",
        r#"<row Id="1" PostId="4" TIME Text="c" UserId="1" />
           <row Id="2" PostId="2" TIME Text="c" />
           <row Id="3" PostId="6" TIME Text="c" />
           <row Id="4" TIME Text="c" />
           <row Id="5" PostId="1" CreationDate="yesterday" Text="c" />"#,
    ),
    (
        "Votes.xml",
        "votes",
        r#"<row PostId="1" VoteTypeId="2" />
           <row PostId="1" />
           <row PostId="x" VoteTypeId="3" />"#,
    ),
];

/// Rows that lack what they need, or have it in a form that nobody reads, are left out and counted; what refers to them is treated
/// as if they were not there, and everything else comes.
#[tokio::test]
async fn rows_that_cannot_be_used() {
    let folder = tempfile::tempdir().expect("a folder");
    for (file, root, rows) in OLD {
        let rows = rows.replace("TIME", "CreationDate=\"2009-05-01T08:30:00\"");
        std::fs::write(folder.path().join(file), format!("<{root}>{rows}</{root}>")).expect("a file");
    }
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let report = import::stackexchange(&node, folder.path(), "old", &mut |_| {}).await.expect("the import ends");
    assert_eq!(
        ["users", "threads", "answers", "comments"].map(|kind| report.written[kind]),
        [1, 1, 1, 1],
        "{report:?}"
    );
    assert_eq!(["users", "posts", "comments", "votes"].map(|file| report.read[file]), [4, 7, 5, 3]);
    let skipped: Vec<_> = report.skipped.iter().map(|s| (s.kind, s.reason.as_str(), s.count)).collect();
    assert_eq!(
        skipped,
        [
            ("answer", "its question is not in the dump, or was left out", 1),
            ("comment", "its post is not in the dump, or was left out", 2),
            ("comment", "no PostId", 1),
            ("comment", "unreadable CreationDate", 1),
            ("post", "no CreationDate", 1),
            ("post", "no ParentId", 1),
            ("post", "no PostTypeId", 1),
            ("post", "unreadable Score", 1),
            ("user", "no CreationDate", 1),
            ("user", "no Id", 1),
            ("user", "unreadable CreationDate", 1),
            ("vote", "no VoteTypeId", 1),
            ("vote", "unreadable PostId", 1),
        ]
    );
    assert_eq!((report.votes.compared, report.votes.differing), (2, 0), "{:?}", report.votes.examples);
    let again = import::stackexchange(&node, folder.path(), "old", &mut |_| {}).await.expect("the import ends");
    assert_eq!(again.written.values().sum::<u64>(), 0, "{again:?}");
    drop(node);
    cluster.finish().await;
}
