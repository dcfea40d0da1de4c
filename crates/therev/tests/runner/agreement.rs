//! The hash in Rust, in SQL and in PostgreSQL's own hash partitioning.

use testkit::TestCluster;
use therev::bucket_of;
use uuid::Uuid;

#[tokio::test]
async fn sql_and_rust_and_postgresql_place_alike() {
    let cluster = TestCluster::usual().await;
    let client = cluster.stranger("shard_0").await;
    let ids: Vec<Uuid> = (0..100_000).map(|_| Uuid::new_v4()).collect();
    let rows = client
        .query("SELECT k, therev.bucket_of(k) FROM unnest($1::uuid[]) AS k", &[&ids])
        .await
        .expect("the function is there");
    assert_eq!(rows.len(), ids.len());
    for row in &rows {
        assert_eq!(bucket_of(row.get(0)).sql(), row.get::<_, i16>(1));
    }

    // PostgreSQL itself: a row of the remainder's partition, for both moduli that are used.
    client
        .batch_execute("CREATE TABLE hashed (k uuid) PARTITION BY HASH (k)")
        .await
        .expect("a hash-partitioned table is made");
    let disagreeing: i64 = client
        .query_one(
            "SELECT count(*) FROM unnest($1::uuid[]) AS k
              WHERE NOT satisfies_hash_partition('hashed'::regclass, 4096, therev.bucket_of(k), k)
                 OR NOT satisfies_hash_partition('hashed'::regclass, 4, therev.bucket_of(k) % 4, k)",
            &[&ids],
        )
        .await
        .expect("PostgreSQL says where rows belong")
        .get(0);
    assert_eq!(disagreeing, 0);
    client.batch_execute("DROP TABLE hashed").await.expect("the table goes");
    drop(client);
    cluster.finish().await;
}

/// Invariant 10.
#[tokio::test]
async fn no_foreign_key_crosses_a_group() {
    let cluster = TestCluster::usual().await;
    let client = cluster.stranger("shard_0").await;
    let crossing = client
        .query(
            "SELECT conname FROM pg_constraint
              WHERE contype = 'f' AND conparentid = 0
                AND (conrelid IN ('threads'::regclass, 'posts'::regclass)
                     OR confrelid IN ('threads'::regclass, 'posts'::regclass))",
            &[],
        )
        .await
        .expect("the catalog answers");
    assert!(crossing.is_empty(), "content refers to nothing and nothing to content");
    drop(client);
    cluster.finish().await;
}
