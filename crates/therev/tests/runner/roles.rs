//! What roles may not do, whatever they bring along.

use crate::strangers::{NO_RIGHT, NOT_OWNED, refused};
use crate::things::user_per_shard;
use testkit::TestCluster;
use therev::{Layout, ThreadId};

/// Types by the names that the guards use: a value of one of them runs code of whoever made it.
const TRAPS: &str = "
    CREATE FUNCTION pg_temp.spring() RETURNS boolean LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'sprung as %', current_user;
    END
    $$;
    CREATE DOMAIN pg_temp.uuid AS pg_catalog.uuid CHECK (pg_temp.spring());
    CREATE DOMAIN pg_temp.text AS pg_catalog.text CHECK (pg_temp.spring());
    CREATE DOMAIN pg_temp.jsonb AS pg_catalog.jsonb CHECK (pg_temp.spring());
    CREATE DOMAIN pg_temp.timestamptz AS pg_catalog.timestamptz CHECK (pg_temp.spring());
    CREATE TEMP TABLE bait (bucket smallint, author_id pg_catalog.uuid, user_id pg_catalog.uuid, version bigint)";

/// The functions of triggers that do what their callers may not.
const DEFINERS: [&str; 5] =
    ["guard('content', 'author_id')", "count_post()", "publish_users()", "publish_threads()", "release_names()"];

#[tokio::test]
async fn nobody_has_the_guards_run_code_of_his_own() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let [ada, bob, ..] = user_per_shard(&node).await;
    let reader = cluster.stranger("shard_0").await;
    reader.batch_execute("SET ROLE therev_reader").await.expect("its rights alone");
    reader.batch_execute(TRAPS).await.expect("anybody may make what is temporary");
    for function in DEFINERS {
        let attach =
            format!("CREATE TRIGGER bait BEFORE INSERT ON bait FOR EACH ROW EXECUTE FUNCTION therev.{function}");
        refused(&reader, &attach, NO_RIGHT).await;
    }

    // Who may write, and has called first what the guard calls.
    let writer = cluster.stranger("shard_0").await;
    writer.batch_execute(TRAPS).await.expect("anybody may make what is temporary");
    let admit = format!("SELECT therev.admit('content', {}::smallint, '{bob}', 'bait')", bob.bucket());
    refused(&writer, &admit, NOT_OWNED).await;
    let insert = |owner| {
        let id = ThreadId::new(owner);
        format!("INSERT INTO threads (author_id, thread_id, title, body) VALUES ('{owner}', '{id}', 't', 'b')")
    };
    refused(&writer, &insert(bob), NOT_OWNED).await;
    writer.batch_execute(&insert(ada)).await.expect("no trap is sprung");
    let change = format!("UPDATE threads SET title = 'changed' WHERE author_id = '{ada}'");
    writer.batch_execute(&change).await.expect("no trap is sprung");
    let change = format!("UPDATE users SET first_name = 'Ada' WHERE user_id = '{ada}'");
    writer.batch_execute(&change).await.expect("no trap is sprung");
    drop((reader, writer, node));
    cluster.finish().await;
}

/// Not of those functions alone that are known to the test above.
#[tokio::test]
async fn whoever_does_what_callers_may_not_looks_into_their_names_last() {
    let cluster = TestCluster::usual().await;
    let unsafe_ones = "
        SELECT p.oid::regprocedure::text
          FROM pg_proc AS p
         WHERE p.pronamespace IN ('therev'::regnamespace, 'public'::regnamespace) AND p.prosecdef
           AND (NOT EXISTS (SELECT FROM unnest(p.proconfig) AS c (setting)
                             WHERE c.setting ~ '^search_path=(.*, )?pg_temp$')
                OR (p.prorettype = 'trigger'::regtype AND has_function_privilege('therev_reader', p.oid, 'EXECUTE')))";
    for part in ["control", "directory", "shard_0"] {
        let client = cluster.stranger(part).await;
        let rows = client.query(unsafe_ones, &[]).await.expect("the catalog answers");
        let found: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
        assert!(found.is_empty(), "{part}: {found:?}");
    }
    cluster.finish().await;
}

#[tokio::test]
async fn a_month_belongs_to_whoever_its_table_does() {
    let cluster = TestCluster::new(Layout::Colocated, 1).await;
    let client = cluster.stranger("shard_0").await;
    client.batch_execute("SET ROLE therev_mover").await.expect("the mover's rights");
    let made = client.query_one("SELECT therev.make_partition('audit_log', '2031-05-01')", &[]).await;
    assert!(made.expect("the mover makes months").get::<_, bool>(0));
    let owners = "
        SELECT count(*) AS months, count(*) FILTER (WHERE c.relowner <> t.relowner) AS of_others
          FROM pg_inherits AS i
          JOIN pg_class AS c ON c.oid = i.inhrelid
          JOIN pg_class AS t ON t.oid = i.inhparent
         WHERE t.oid = 'audit_log'::regclass";
    let row = client.query_one(owners, &[]).await.expect("the catalog answers");
    assert!(row.get::<_, i64>("months") > 4, "those of the schema, and this one");
    assert_eq!(row.get::<_, i64>("of_others"), 0);
    client.batch_execute("SET ROLE therev").await.expect("its rights alone");
    refused(&client, "SELECT therev.make_partition('audit_log', '2031-06-01')", NO_RIGHT).await;
    client.batch_execute("SET ROLE therev_reader").await.expect("its rights alone");
    refused(&client, "SELECT therev.make_partition('audit_log', '2031-06-01')", NO_RIGHT).await;
    refused(&client, "SELECT therev.make_partitions(9)", NO_RIGHT).await;
    drop(client);
    cluster.finish().await;
}
