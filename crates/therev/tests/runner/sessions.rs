//! Sessions, and what is changed beside them.

use crate::things::{operator, until_somebody_waits};
use testkit::TestCluster;
use therev::{Error, NewSession, NewUser, SecretString};

/// Whoever knows only the password before the last one opens no session after the change.
#[tokio::test]
async fn a_log_in_that_a_change_of_the_password_overtakes_is_refused() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let password = SecretString::from("correct horse");
    let new = NewUser { user_name: "ada".into(), password: Some(password.clone()), ..NewUser::default() };
    let ada = node.register(new, &operator()).await.expect("a user with a password").user_id;
    let part = format!("shard_{}", ada.bucket().number() % 4);
    let (change, looks) = (cluster.stranger(&part).await, cluster.stranger(&part).await);
    let another = "BEGIN; UPDATE users SET password_hash = 'of another password'";
    change.batch_execute(another).await.expect("a change under way");
    // The password fits the hash of before; the session waits for the row.
    let late = node.clone();
    let late = tokio::spawn(async move { late.log_in("ada", &password, NewSession::default()).await });
    until_somebody_waits(&looks).await;
    change.batch_execute("COMMIT").await.expect("the password is changed");
    let refused = late.await.expect("no panic");
    assert!(matches!(refused, Err(Error::Credentials)), "{refused:?}");
    assert_eq!(node.sessions(ada).await.expect("a list"), []);
    drop((node, change, looks));
    cluster.finish().await;
}
