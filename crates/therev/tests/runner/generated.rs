//! Synthetic communities: the same rows wherever they lie.

use testkit::TestCluster;
use therev::Layout;
use therev::generate::{Plan, generate};

const PLAN: Plan = Plan { users: 300, threads: 80, posts: 6_000, seed: 11, zipf: 1.1 };

/// Everything about users, threads and posts but where they lie and their versions.
const DIGEST: &str = "
    SELECT coalesce(sum(hashtextextended(r.row, 0)), 0)::text
      FROM (SELECT (to_jsonb(u) - '{updated_at,version}'::text[])::text AS row FROM users AS u
            UNION ALL SELECT (to_jsonb(t) - '{updated_at,version}'::text[])::text FROM threads AS t
            UNION ALL SELECT (to_jsonb(p) - '{updated_at,version}'::text[])::text FROM posts AS p) AS r";

#[tokio::test]
async fn the_same_for_the_same_seed_at_any_number_of_shards() {
    let mut digests = Vec::new();
    for (layout, shards) in [(Layout::Colocated, 1), (Layout::Colocated, 4), (Layout::Split, 4)] {
        let cluster = TestCluster::new(layout, shards).await;
        let node = cluster.node().await;
        let first = generate(&node, PLAN, &mut |_| {}).await.expect("a community");
        assert_eq!(first.written.values().sum::<u64>(), 6_380);
        let again = generate(&node, PLAN, &mut |_| {}).await.expect("the same community");
        assert_eq!((again.written.values().sum::<u64>(), again.existing.values().sum::<u64>()), (0, 6_380));
        let mut digest = 0_i128;
        for shard in 0..shards {
            let row = cluster.stranger(&format!("shard_{shard}")).await.query_one(DIGEST, &[]).await.expect("a digest");
            digest += row.get::<_, String>(0).parse::<i128>().expect("a number");
        }
        digests.push(digest);
        drop(node);
        cluster.finish().await;
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
}
