//! AI accounts, created and removed.

use crate::things::{operator, user};
use testkit::TestCluster;
use therev::{AccountId, AccountType, Error, NewAccount, Provider};

#[tokio::test]
async fn a_late_retry_brings_no_removed_account_back() {
    for layout in TestCluster::LAYOUTS {
        let cluster = TestCluster::new(layout, 4).await;
        let node = cluster.node().await;
        let ada = user(&node, "ada").await.user_id;
        let id = AccountId::new(ada);
        let work = || NewAccount::new(ada, Provider::Claude, AccountType::Api, "work");
        let create =
            async || node.tasks().create_account(NewAccount { account_id: Some(id), ..work() }, &operator()).await;
        create().await.expect("an account");
        create().await.expect("the same one");
        node.tasks().remove_account(id, &operator()).await.expect("removed");
        let late = create().await;
        assert!(matches!(late, Err(Error::Gone { what: "account", .. })), "{late:?}");
        let another = node.tasks().create_account(work(), &operator()).await.expect("another account of the same kind");
        assert_eq!(node.tasks().accounts(ada).await.expect("a list"), [another]);
        drop(node);
        cluster.finish().await;
    }
}
