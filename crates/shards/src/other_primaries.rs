//! Servers that take writes though another one counts: a standby that was promoted by mistake, or an old primary that came back.

use crate::address::Hosts;
use crate::error::Database;
use crate::reach::reach;
use crate::store::Shards;
use futures_util::future::join_all;
use placement::ShardNo;
use std::time::Duration;
use tokio_postgres::types::Type;
use uuid::Uuid;

const TAKES_WRITES: &str = "
    SELECT NOT pg_is_in_recovery() AND (i.incarnation <> $1 OR i.timeline <> therev.current_timeline()) AS is_another
      FROM therev.identity AS i";

impl Shards {
    /// The hosts of a shard's address that take writes and are not in the life that counts. One that gives no answer is not told.
    pub async fn other_primaries(&self, shard: ShardNo) -> Vec<String> {
        let catalog = self.catalog();
        let Some((at, life)) = catalog.find(Database::Shard(shard)) else { return Vec::new() };
        let hosts: Vec<&str> = at.hosts.split(',').collect();
        if hosts.len() < 2 {
            return Vec::new();
        }
        let limit = Duration::from_millis(self.config().connect_timeout_ms);
        let asked = hosts.into_iter().map(async |host| {
            let one = Hosts { hosts: host.to_owned(), database: at.database.clone() };
            let is_another = tokio::time::timeout(limit, self.is_another(&one, life.incarnation)).await;
            is_another.unwrap_or_default().unwrap_or_default().then(|| host.to_owned())
        });
        join_all(asked).await.into_iter().flatten().collect()
    }

    /// `None`: it does not say.
    async fn is_another(&self, host: &Hosts, counts: Uuid) -> Option<bool> {
        let login = self.inner.lives.login.to(host, false).ok()?;
        let (client, _driven) = reach(&login, None).await.ok()?;
        let row = client.query_typed_opt(TAKES_WRITES, &[(&counts, Type::UUID)]).await.ok()??;
        Some(row.get("is_another"))
    }
}
