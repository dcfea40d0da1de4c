//! Sessions, and what is changed beside them.

use crate::things::{operator, until_somebody_waits, user, user_per_shard};
use testkit::TestCluster;
use therev::{Actor, Error, ExposeSecret, NewSession, NewUser, OpenSession, SecretString, UserChange, UserId};

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

/// A new password ends all sessions but the one that it is changed in, and of whoever was deactivated none is open afterwards.
#[tokio::test]
async fn what_ends_with_a_password_and_with_being_active() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let node = cluster.node().await;
        let ada = user(&node, "ada").await.user_id;
        let open = async || node.open_session(ada, NewSession::default()).await.expect("a session");
        let is_open = async |session: &OpenSession| match node.verify_session(session.token.expose_secret()).await {
            Ok(_) => true,
            Err(Error::Credentials) => false,
            Err(error) => panic!("{error}"),
        };
        let (own, stolen) = (open().await, open().await);
        let change = UserChange {
            password: Some(SecretString::from("another horse")),
            keep_session: Some(own.session.session_id),
            ..UserChange::default()
        };
        node.change_user(ada, change, &Actor::User(ada)).await.expect("a new password");
        assert_eq!((is_open(&own).await, is_open(&stolen).await), (true, false));
        for is_active in [false, true] {
            node.set_active(ada, is_active, &operator()).await.expect("changed");
            assert!(!is_open(&own).await);
        }
        assert!(is_open(&open().await).await);
        drop(node);
        cluster.finish().await;
    }
}

#[tokio::test]
async fn a_session_opened_again_by_its_token_is_the_same() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let node = cluster.node().await;
        let ada = user(&node, "ada").await.user_id;
        let token = NewSession::token_for(ada);
        let with = |token: &SecretString| NewSession { token: Some(token.clone()), ..NewSession::default() };
        let open = node.open_session(ada, with(&token)).await.expect("a session");
        assert_eq!(open.token.expose_secret(), token.expose_secret());
        let again = node.open_session(ada, with(&token)).await.expect("a retry");
        assert_eq!(again.session, open.session);
        assert_eq!(node.sessions(ada).await.expect("a list"), std::slice::from_ref(&open.session));
        assert_eq!(node.verify_session(token.expose_secret()).await.expect("it is good"), open.session);
        // The same id, and another secret after it.
        let mut other = token.expose_secret().to_owned();
        let last = if other.pop() == Some('A') { 'B' } else { 'A' };
        let refused = node.open_session(ada, with(&SecretString::from(format!("{other}{last}")))).await;
        assert!(matches!(refused, Err(Error::Conflict { what: "id", .. })), "{refused:?}");
        let mut others = std::iter::repeat_with(UserId::new).filter(|id| id.bucket() != ada.bucket());
        let others = NewSession::token_for(others.next().expect("one of another bucket"));
        for wrong in [others, SecretString::from("none")] {
            let refused = node.open_session(ada, with(&wrong)).await;
            assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
        }
        drop(node);
        cluster.finish().await;
    }
}

/// Nobody has to come back for a stolen session to end: it does with the password.
#[tokio::test]
async fn a_session_ends_with_the_password_and_not_after_it() {
    let cluster = TestCluster::usual().await;
    let node = cluster.node().await;
    let ada = user(&node, "ada").await.user_id;
    let stolen = node.open_session(ada, NewSession::default()).await.expect("a session");
    fail::cfg("user.changed", "panic").expect("a place in the sources");
    let dies = tokio::spawn({
        let node = node.clone();
        let password = Some(SecretString::from("another horse"));
        async move { node.change_user(ada, UserChange { password, ..UserChange::default() }, &operator()).await.map(drop) }
    });
    assert!(dies.await.is_err(), "it dies when the password is changed");
    fail::remove("user.changed");
    let refused = node.verify_session(stolen.token.expose_secret()).await;
    assert!(matches!(refused, Err(Error::Credentials)), "{refused:?}");
    drop(node);
    cluster.finish().await;
}

/// What ended long ago goes; what can still be used is listed, however many came after it.
#[tokio::test]
async fn sessions_that_ended_long_ago_are_removed() {
    let cluster = TestCluster::colocated().await;
    let node = cluster.node().await;
    let [ada, ..] = user_per_shard(&node).await;
    let open = node.open_session(ada, NewSession::default()).await.expect("a session");
    let shard = cluster.stranger("shard_0").await;
    let ended = "
        INSERT INTO user_sessions (bucket, user_id, session_id, token_hash, expires_at, status, updated_at, version)
        SELECT s.bucket, s.user_id, overlay(s.session_id::text PLACING lpad(n::text, 6, '0') FROM 31)::uuid, s.token_hash,
               CASE WHEN n % 2 = 0 THEN now() - interval '40 days' ELSE s.expires_at END,
               CASE WHEN n % 2 = 0 THEN 'active' ELSE 'revoked' END, now() - interval '35 days', s.version
          FROM user_sessions AS s, generate_series(0, 1199) AS n WHERE s.session_id = $1";
    shard.batch_execute("SET session_replication_role = replica").await.expect("no trigger fires");
    shard.execute(ended, &[&open.session.session_id.0]).await.expect("they ended long ago");
    let listed = node.sessions(ada).await.expect("a list");
    assert!(listed.len() == 1_000 && listed.iter().any(|one| one.session_id == open.session.session_id));
    assert_eq!(node.maintain_once().await.expect("maintenance").sessions_removed, 1_200);
    let listed = node.sessions(ada).await.expect("a list");
    assert!(listed.len() == 1 && listed[0].session_id == open.session.session_id);
    let too_long = SecretString::from("x".repeat(2_000_000));
    let refused = node.log_in("user-0", &too_long, NewSession::default()).await;
    assert!(matches!(refused, Err(Error::Credentials)), "{refused:?}");
    drop((shard, node));
    cluster.finish().await;
}
