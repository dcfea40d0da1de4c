//! Unique names, taken at the same time or left half taken.

use crate::things::{operator, user};
use futures_util::future::join_all;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use testkit::TestCluster;
use therev::{Config, Error, NewUser, UserChange, UserId};

/// Invariant 8.
#[tokio::test]
async fn one_of_32_gets_the_name() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let mut nodes = Vec::new();
        for _ in 0..4 {
            nodes.push(cluster.node().await);
        }
        let tries = (0..32).map(|n| {
            let node = nodes[n % 4].clone();
            tokio::spawn(async move {
                let new = NewUser { user_name: "the-one".into(), ..NewUser::default() };
                node.register(new, &operator()).await
            })
        });
        let mut winners = Vec::new();
        for outcome in join_all(tries).await {
            match outcome.expect("no panic") {
                Ok(user) => winners.push(user.user_id),
                Err(Error::Conflict { what: "user name", .. }) => {}
                Err(other) => panic!("{other:?}"),
            }
        }
        assert_eq!(winners.len(), 1);
        assert_eq!(nodes[0].user_named("the-one").await.expect("an answer"), Some(winners[0]));
        drop(nodes);
        cluster.finish().await;
    }
}

/// Invariant 8.
#[tokio::test]
async fn a_name_whose_registration_never_ended_is_free_again() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let slow = UserId::new();
    let key = claim_key("left-behind");
    let shard = format!("shard_{}", therev::bucket_of(key).number() % 4);
    let stranger = cluster.stranger(&shard).await;
    stranger
        .execute(
            "INSERT INTO therev.claims (claim_key, kind, value, user_id, state, version)
             VALUES ($1, 'user_name', 'left-behind', $2, 'pending', 1)",
            &[&key, &slow.0],
        )
        .await
        .expect("a claim without a user");
    // The relay decides by a write on the user's shard ...
    let relayed = node.relay_once().await.expect("the relay runs");
    assert_eq!(relayed.claims_settled, 1);
    // ... that the slow registration, coming late, finds in its way: nobody reads its name there.
    assert!(matches!(node.user(slow).await, Err(Error::Gone { .. })));
    let late = |name: &str| NewUser { user_id: Some(slow), user_name: name.into(), ..NewUser::default() };
    assert_ne!(user(&node, "left-behind").await.user_id, slow);
    assert!(matches!(node.register(late("left-behind"), &operator()).await, Err(Error::Conflict { .. })));
    // Asked for again with a free name, the same id is registered all the same; deleted, it never is again.
    node.relay_once().await.expect("the relay runs");
    let raised = node.register(late("late"), &operator()).await.expect("the same registration, asked for again");
    assert_eq!(node.user(slow).await.expect("it lives"), raised.value);
    node.delete_user(slow, false, &operator()).await.expect("deleted");
    assert!(matches!(node.register(late("later"), &operator()).await, Err(Error::Gone { .. })));
    drop((node, stranger));
    cluster.finish().await;
}

/// Invariant 8.
#[tokio::test]
async fn a_name_whose_change_never_came_is_free_again() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let ada = user(&node, "ada").await;
    let key = claim_key("wanted");
    let stranger = cluster.stranger(&format!("shard_{}", therev::bucket_of(key).number() % 4)).await;
    stranger
        .execute(
            "INSERT INTO therev.claims (claim_key, kind, value, user_id, state, version)
             VALUES ($1, 'user_name', 'wanted', $2, 'pending', $3)",
            &[&key, &ada.user_id.0, &(ada.version + 1)],
        )
        .await
        .expect("a claim for a change");
    node.relay_once().await.expect("the relay runs");
    let now = node.user(ada.user_id).await.expect("she is there");
    assert!(now.version > ada.version, "a slow change that expects the old version finds nothing to change");
    assert_eq!(now.user_name, "ada");
    assert_eq!(node.user_named("wanted").await.expect("an answer"), None);
    drop((node, stranger));
    cluster.finish().await;
}

#[tokio::test]
async fn a_name_is_somebodys_once_the_row_has_it() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let ada = user(&node, "ada").await;
    let claims = async |name: &str| {
        let shard = therev::bucket_of(claim_key(name)).number() % 4;
        cluster.stranger(&format!("shard_{shard}")).await
    };
    // A change of name that was cut off before it changed the row ...
    claims("wanted")
        .await
        .execute(
            "INSERT INTO therev.claims (claim_key, kind, value, user_id, state, version)
             VALUES ($1, 'user_name', 'wanted', $2, 'pending', $3)",
            &[&claim_key("wanted"), &ada.user_id.0, &(ada.version + 1)],
        )
        .await
        .expect("a claim for a change");
    assert_eq!(node.user_named("wanted").await.expect("an answer"), None);
    assert!(matches!(node.where_name("wanted").await, Err(Error::NotFound { .. })));
    // ... and one that was cut off before the name was confirmed.
    let pending = "UPDATE therev.claims SET state = 'pending' WHERE value = 'ada'";
    assert_eq!(claims("ada").await.execute(pending, &[]).await.expect("it is pending again"), 1);
    assert_eq!(node.user_named("ada").await.expect("an answer"), Some(ada.user_id));
    drop(node);
    cluster.finish().await;
}

#[tokio::test]
async fn names_go_around() {
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let ada = user(&node, "a").await;
    let rename = |name: &str| UserChange { user_name: Some(name.into()), ..UserChange::default() };
    for name in ["b", "a", "c", "a"] {
        node.change_user(ada.user_id, rename(name), &operator()).await.expect("a change of name");
    }
    let bob = user(&node, "b").await;
    assert!(matches!(node.change_user(bob.user_id, rename("a"), &operator()).await, Err(Error::Conflict { .. })));
    assert_eq!(node.user_named("b").await.expect("an answer"), Some(bob.user_id));
    drop(node);
    cluster.finish().await;
}

/// The key of a user name's claim, as SQL computes it.
pub(crate) fn claim_key(value: &str) -> uuid::Uuid {
    use sha2::Digest;
    let digest = sha2::Sha256::digest(format!("user_name:{value}"));
    uuid::Uuid::from_slice(&digest[..16]).expect("16 bytes")
}

/// A relay that comes when an import has taken names, and not yet written their users, doubts them; they are held again as
/// soon as the users are there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_of_an_import_that_a_relay_has_doubted_are_held_in_the_end() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/community");
    let cluster = TestCluster::usual().await;
    let patient = Config { claim_timeout_s: 60, ..cluster.config() };
    let node = therev::connect(patient.clone()).await.expect("the cluster answers");
    let relay = therev::connect(patient).await.expect("the cluster answers");
    let (doubted, runtime) = (Arc::new(AtomicU64::new(0)), tokio::runtime::Handle::current());
    let count = doubted.clone();
    fail::cfg_callback("bulk.names_taken", move || {
        let relayed = tokio::task::block_in_place(|| runtime.block_on(relay.relay_once())).expect("the relay runs");
        count.fetch_add(relayed.delivered.get("taken").copied().unwrap_or(0), Ordering::Relaxed);
    })
    .expect("a place in the sources");
    therev::import::stackexchange(&node, &folder, "example", &mut |_| {}).await.expect("the import ends");
    fail::remove("bulk.names_taken");
    assert!(doubted.load(Ordering::Relaxed) > 0, "there were names to doubt");
    let report = node.check().await.expect("a look at everything");
    assert!(report.ok, "{report:?}");
    drop(node);
    cluster.finish().await;
}

/// A claim as it is left by whatever was cut off: past the guards, which would choose its version.
async fn left_claim(cluster: &TestCluster, name: &str, user: UserId, version: i64) -> tokio_postgres::Client {
    let key = claim_key(name);
    let client = cluster.stranger(&format!("shard_{}", therev::bucket_of(key).number() % 4)).await;
    client.batch_execute("SET session_replication_role = replica").await.expect("no trigger fires");
    let claim = "INSERT INTO therev.claims (bucket, claim_key, kind, value, user_id, state, version)
                 VALUES (therev.bucket_of($1), $1, 'user_name', $2, $3, 'held', $4)";
    client.execute(claim, &[&key, &name, &user.0, &version]).await.expect("a claim");
    client
}

/// Invariant 8. Wanted back while its release is still on its way, by a change that fails at something else.
#[tokio::test]
async fn a_name_given_up_and_wanted_back_in_vain_is_free() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let email = Some("taken@example.org".to_owned());
    let other = NewUser { user_name: "other".into(), email: email.clone(), ..NewUser::default() };
    node.register(other, &operator()).await.expect("registered");
    let ada = user(&node, "ada").await;
    let renamed = UserChange { user_name: Some("bob".into()), ..UserChange::default() };
    node.change_user(ada.user_id, renamed, &operator()).await.expect("a change of name");
    node.relay_once().await.expect("the relay runs");
    let stranger = left_claim(&cluster, "ada", ada.user_id, ada.version).await;
    let back = UserChange { user_name: Some("ada".into()), email: Some(email), ..UserChange::default() };
    let refused = node.change_user(ada.user_id, back, &operator()).await;
    assert!(matches!(refused, Err(Error::Conflict { what: "e-mail address", .. })), "{refused:?}");
    assert_eq!(node.user_named("ada").await.expect("an answer"), None);
    node.relay_once().await.expect("the relay runs");
    assert_ne!(user(&node, "ada").await.user_id, ada.user_id);
    drop((node, stranger));
    cluster.finish().await;
}

/// A bulk write holds names before it writes their users, and has left an event about that.
#[tokio::test]
async fn names_whose_users_are_on_their_way_are_not_wrong() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let coming = UserId::new();
    let stranger = left_claim(&cluster, "coming", coming, 1).await;
    let report = node.check().await.expect("a look at everything");
    assert!(!report.ok, "nothing says that anybody comes");
    let taken = "INSERT INTO therev.outbox (colocation_group, bucket, kind, owners, ids)
                 VALUES ('account', -1, 'taken', ARRAY[$1::uuid], ARRAY[$2::uuid])";
    stranger.execute(taken, &[&coming.0, &claim_key("coming")]).await.expect("an event");
    let report = node.check().await.expect("a look at everything");
    assert!(report.ok, "{report:?}");
    drop((node, stranger));
    cluster.finish().await;
}
