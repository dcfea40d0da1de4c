//! The same rows by COPY into the same tables, without the library.

use crate::Anyhow;
use crate::cluster::Databases;
use bytes::{Bytes, BytesMut};
use futures_util::future::try_join_all;
use futures_util::{SinkExt, TryStreamExt, pin_mut};
use std::time::Instant;
use tokio_postgres::Client;

/// Users and what they wrote.
pub(crate) const OWN: &[&str] = &["users", "threads", "posts"];
/// Everything that an import leaves behind.
pub(crate) const ALL: &[&str] = &[
    "users",
    "threads",
    "posts",
    "therev.claims",
    "therev.thread_contributions",
    "therev.thread_participants",
    "therev.thread_totals",
    "therev.outbox",
    "user_directory",
    "thread_directory",
];

/// What was copied, and how long it took.
pub(crate) struct Copied {
    pub(crate) rows: u64,
    pub(crate) seconds: f64,
}

/// One table's rows.
struct Table {
    copy: String,
    rows: Bytes,
}

/// Takes the rows of some tables out and copies them back in, all databases side by side: as the library's role, which
/// no guard stops, and without events about them, as the library does it.
pub(crate) async fn copy(databases: &Databases, tables: &[&str]) -> Anyhow<Copied> {
    let clients = databases.with_rows().await?;
    let mut taken = Vec::new();
    for client in &clients {
        let mut of_database = Vec::new();
        for name in tables {
            if let Some(table) = take_out(client, name).await? {
                of_database.push(table);
            }
        }
        client.batch_execute("SET ROLE therev; SET therev.bulk = 'on'").await?;
        taken.push(of_database);
    }
    databases.checkpoint().await?;
    let started = Instant::now();
    let copied = try_join_all(clients.iter().zip(&taken).map(|(client, tables)| copy_in(client, tables))).await?;
    let seconds = started.elapsed().as_secs_f64();
    Ok(Copied { rows: copied.into_iter().sum(), seconds })
}

/// Reads a table's rows and empties it; `None` where this database has no such table.
async fn take_out(client: &Client, name: &str) -> Anyhow<Option<Table>> {
    if client.query_one("SELECT to_regclass($1) IS NULL", &[&name]).await?.get(0) {
        return Ok(None);
    }
    let columns: String = client
        .query_one(
            "SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_attribute
              WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped AND attgenerated = ''",
            &[&name],
        )
        .await?
        .get(0);
    let stream = client.copy_out(&format!("COPY {name} ({columns}) TO STDOUT (FORMAT binary)")).await?;
    let rows = stream.try_fold(BytesMut::new(), |mut all, part| async move {
        all.extend_from_slice(&part);
        Ok(all)
    });
    let rows = rows.await?.freeze();
    // Nothing of the machinery fires for this, the refusal of a TRUNCATE among it.
    let empty = format!("BEGIN; SET LOCAL session_replication_role = replica; TRUNCATE {name} CASCADE; COMMIT");
    client.batch_execute(&empty).await?;
    Ok(Some(Table { copy: format!("COPY {name} ({columns}) FROM STDIN (FORMAT binary)"), rows }))
}

async fn copy_in(client: &Client, tables: &[Table]) -> Result<u64, tokio_postgres::Error> {
    let mut count = 0;
    for table in tables {
        let sink = client.copy_in(&table.copy).await?;
        pin_mut!(sink);
        sink.send(table.rows.clone()).await?;
        count += sink.finish().await?;
    }
    Ok(count)
}
