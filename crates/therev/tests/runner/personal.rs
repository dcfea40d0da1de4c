//! What belongs to one person: sessions, AI accounts, AI tasks.

use crate::things::{operator, user};
use testkit::TestCluster;
use therev::{
    AccountType, Actor, Error, NewAccount, NewSession, NewTask, NewUser, Provider, SecretString, TaskId, TaskStatus,
    TaskType, UserId,
};

#[tokio::test]
async fn sessions_from_log_in_to_revocation() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let node = cluster.node().await;
        let password = SecretString::from("correct horse");
        let new = NewUser { user_name: "ada".into(), password: Some(password.clone()), ..NewUser::default() };
        let ada = node.register(new, &operator()).await.expect("a user with a password").user_id;

        for (name, wrong) in [("ada", "wrong password"), ("nobody", "correct horse"), ("@!", "correct horse")] {
            let refused = node.log_in(name, &SecretString::from(wrong), NewSession::default()).await;
            assert!(matches!(refused, Err(Error::Credentials)), "{name}: {refused:?}");
        }
        let mut open = Vec::new();
        for _ in 0..3 {
            open.push(node.log_in("Ada", &password, NewSession::default()).await.expect("a log-in"));
        }
        let token = |n: usize| secret(&open[n].token);
        let verified = node.verify_session(&token(0)).await.expect("a session");
        assert_eq!((verified.user_id, verified.session_id), (ada, open[0].session.session_id));
        let mut forged = token(0);
        forged.pop();
        for bad in [forged.as_str(), "", "not a token"] {
            assert!(matches!(node.verify_session(bad).await, Err(Error::Credentials)));
        }
        // Only a hash of the token is kept.
        let stranger = cluster.stranger(&home(layout, ada)).await;
        let rows = stranger.query("SELECT s::text FROM user_sessions AS s", &[]).await.expect("the rows");
        assert!(rows.iter().all(|row| !row.get::<_, &str>(0).contains(&token(0))));

        node.revoke_session(open[0].session.session_id, &Actor::User(ada)).await.expect("revoked");
        assert!(matches!(node.verify_session(&token(0)).await, Err(Error::Credentials)));
        let others = node.revoke_other_sessions(ada, open[2].session.session_id, &Actor::User(ada)).await;
        assert_eq!(others.expect("the others are revoked"), 1);
        assert!(matches!(node.verify_session(&token(1)).await, Err(Error::Credentials)));
        node.verify_session(&token(2)).await.expect("the one that was kept");
        node.set_active(ada, false, &operator()).await.expect("deactivated");
        assert!(matches!(node.verify_session(&token(2)).await, Err(Error::Credentials)));
        assert!(matches!(node.log_in("ada", &password, NewSession::default()).await, Err(Error::Credentials)));
        drop((node, stranger));
        cluster.finish().await;
    }
}

fn secret(token: &SecretString) -> String {
    use secrecy::ExposeSecret;
    token.expose_secret().to_owned()
}

/// The part of a cluster that holds a user's account.
fn home(layout: therev::Layout, user: UserId) -> String {
    format!("shard_{}", layout.first_shard(therev::Group::Account, user.bucket(), 4))
}

#[tokio::test]
async fn accounts_and_tasks() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let node = cluster.node().await;
        let ada = user(&node, "ada").await.user_id;
        let (tasks, owner) = (node.tasks(), Actor::User(ada));
        let first = NewAccount::new(ada, Provider::Claude, AccountType::Api, "work");
        let first = tasks.create_account(NewAccount { is_default: true, ..first }, &owner).await.expect("an account");
        let second = NewAccount::new(ada, Provider::OpenSource, AccountType::LocalModel, "at home");
        let second = tasks.create_account(NewAccount { is_default: true, ..second }, &owner).await.expect("another");
        let defaults = |accounts: Vec<therev::Account>| {
            accounts.into_iter().filter(|a| a.is_default).map(|a| a.account_id).collect::<Vec<_>>()
        };
        assert_eq!(defaults(tasks.accounts(ada).await.expect("both")), [second.account_id]);
        tasks.set_default_account(ada, first.account_id, &owner).await.expect("the mark changes hands");
        assert_eq!(defaults(tasks.accounts(ada).await.expect("both")), [first.account_id]);

        let mut made = Vec::new();
        for n in 0..5 {
            let new = NewTask::new(ada, TaskType::Summarization, serde_json::json!({ "n": n }));
            made.push(tasks.create_task(new).await.expect("a task").task_id);
        }
        let again = NewTask::new(ada, TaskType::Summarization, serde_json::json!({ "n": 4 }));
        let again = tasks.create_task(NewTask { task_id: Some(made[4]), ..again }).await.expect("a retry");
        assert_eq!(again.task_id, made[4]);
        let newest = tasks.tasks(ada, None, None, 3).await.expect("a page");
        let older = tasks.tasks(ada, None, Some(newest[2].task_id), 9).await.expect("the rest");
        assert_eq!(newest.len() + older.len(), 5);

        let cancelled = tasks.cancel_task(made[0], &Actor::User(ada)).await.expect("cancelled");
        assert_eq!(cancelled.status, TaskStatus::Cancelled);
        assert!(matches!(tasks.cancel_task(made[0], &Actor::User(ada)).await, Err(Error::State { .. })));
        assert_eq!(tasks.task_log(made[0]).await.expect("its log").len(), 2);
        assert_eq!(tasks.tasks(ada, Some(TaskStatus::Cancelled), None, 9).await.expect("a page").len(), 1);
        let unknown = NewTask::new(ada, TaskType::Analysis, serde_json::json!({}));
        let unknown = tasks.create_task(NewTask { intent: Some("juggle".into()), ..unknown }).await;
        assert!(matches!(unknown, Err(Error::Invalid { .. })), "{unknown:?}");
        assert!(matches!(tasks.task(TaskId::new(ada)).await, Err(Error::NotFound { .. })));
        let nobody = NewTask::new(UserId::new(), TaskType::Analysis, serde_json::json!({}));
        assert!(matches!(tasks.create_task(nobody).await, Err(Error::NotFound { .. })));

        // Maintenance makes the summaries true; then everything goes with its owner.
        let done = node.maintain_once().await.expect("maintenance");
        assert_eq!((done.views_refreshed, done.shards_down.len()), (8, 0));
        let stranger = cluster.stranger(&home(layout, ada)).await;
        let counted = "SELECT sum(tasks)::bigint FROM ai_task_stats WHERE user_id = $1";
        assert_eq!(stranger.query_one(counted, &[&ada.0]).await.expect("the view").get::<_, i64>(0), 5);
        let noted = "SELECT array_agg(action || ' by ' || actor ORDER BY created_at) FROM audit_log
                      WHERE user_id = $1 AND target LIKE 'account %'";
        let noted: Vec<String> = stranger.query_one(noted, &[&ada.0]).await.expect("the log").get(0);
        let of_ada = |action: &str| format!("{action} by user {ada}");
        assert_eq!(noted, ["create account", "create account", "set default account"].map(of_ada));
        node.delete_user(ada, false, &operator()).await.expect("deleted");
        assert!(matches!(tasks.task(made[1]).await, Err(Error::NotFound { .. })));
        assert!(matches!(tasks.account(first.account_id).await, Err(Error::NotFound { .. })));
        for table in ["user_sessions", "user_ai_accounts", "ai_tasks", "ai_task_logs"] {
            let count = format!("SELECT count(*) FROM {table} WHERE user_id = $1");
            assert_eq!(stranger.query_one(&count, &[&ada.0]).await.expect("a count").get::<_, i64>(0), 0, "{table}");
        }
        drop((node, stranger));
        cluster.finish().await;
    }
}
