//! The copy beside bare COPY, what it leaves to others, and what the machinery costs when nothing moves.

use super::scene::{Scene, mix};
use crate::Anyhow;
use crate::figure::{Figure, Pairs, count};
use crate::ground::{Ground, WORKERS};
use bytes::BytesMut;
use futures_util::{SinkExt, TryStreamExt, pin_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use therev::Therev;
use therev::relocation::{Goal, Mover};
use tokio_postgres::Client;

/// How many buckets a copy takes whose speed is measured.
const BUCKETS: usize = 512;
/// How long others work before the copy, with nothing beside them.
const BEFORE: Duration = Duration::from_secs(2);
/// How many bytes go out at once, as the mover does it.
const PIECE: usize = 1 << 18;

/// The same table's rows, out of one shard and into the other.
const TABLES: &str = "
    SELECT t.table_name, string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum)
      FROM therev.owned_tables AS t
      JOIN pg_attribute AS a ON a.attrelid = t.table_name::regclass
     WHERE a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
     GROUP BY t.table_name";

/// What a copy did.
struct Copied {
    rows: i64,
    began: Instant,
    ended: Instant,
}

impl Copied {
    fn rate(&self) -> f64 {
        count(u64::try_from(self.rows).unwrap_or(0)) / self.ended.duration_since(self.began).as_secs_f64()
    }
}

/// How many statements reads and replies take, so many calls of each.
pub(super) async fn statements(scene: &Scene, node: &Therev) -> Anyhow<u64> {
    let all = |node: &Therev| node.shards().statements().values().sum::<u64>();
    let mut fewest = u64::MAX;
    // The relay asks now and then; what a call takes is what the quietest round took.
    for round in 0..20 {
        let before = all(node);
        scene.read(scene.moving[round % scene.moving.len()]).await?;
        scene.write(scene.moving[round % scene.moving.len()], round).await?;
        fewest = fewest.min(all(node) - before);
    }
    Ok(fewest)
}

/// The copy beside COPY, and others' work beside the copy.
pub(super) async fn copies(ground: &Ground<'_>, node: &Therev, mover: &Mover) -> Anyhow<Vec<Figure>> {
    let scene = Scene::new(ground, node, 0, BUCKETS).await?;
    let (mut rates, mut others) = (Pairs::default(), Pairs::default());
    for run in 0..=ground.runs {
        eprintln!("copy {run} of {}", ground.runs);
        ground.databases.checkpoint().await?;
        let bare = by_copy(ground, &scene).await?;
        ground.databases.checkpoint().await?;
        let (ours, _) = Box::pin(by_mover(ground, mover, &scene, || 0)).await?;
        let (before, during, beside) = Box::pin(beside(ground, mover, &scene)).await?;
        eprintln!(
            "  {} rows: COPY {:.0}/s, ours {:.0}/s, beside others {:.0}/s; others {before:.0}/s before, {during:.0}/s during",
            ours.rows,
            bare.rate(),
            ours.rate(),
            beside.rate()
        );
        if run > 0 {
            rates.add(ours.rate(), bare.rate());
            others.add(during, before);
        }
    }
    let note = format!(
        "the whole copy of {BUCKETS} buckets with everything around it; bare: COPY TO, COPY FROM of the same rows"
    );
    let of = format!("{WORKERS} workers of users who do not move, during the copy and before");
    Ok(vec![
        rates.rate("copy", Some(0.7), "rows/s").note(note),
        others.rate("others_throughput", Some(0.75), "calls/s").note(of),
    ])
}

/// What others do in a second, before a copy and during it; and that copy.
async fn beside(ground: &Ground<'_>, mover: &Mover, scene: &Scene) -> Anyhow<(f64, f64, Copied)> {
    let (done, is_over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let workers: Vec<_> = (0..WORKERS)
        .map(|worker| {
            let (scene, done, is_over) = (scene.clone(), done.clone(), is_over.clone());
            tokio::spawn(async move {
                let mut round = 0;
                while !is_over.load(Ordering::Relaxed) {
                    scene.any(mix(worker, round), round).await?;
                    done.fetch_add(1, Ordering::Relaxed);
                    round += 1;
                }
                Anyhow::Ok(())
            })
        })
        .collect();
    let began = Instant::now();
    tokio::time::sleep(BEFORE).await;
    let before = count(done.load(Ordering::Relaxed)) / began.elapsed().as_secs_f64();
    let copied = Box::pin(by_mover(ground, mover, scene, || done.load(Ordering::Relaxed))).await;
    is_over.store(true, Ordering::Relaxed);
    for worker in workers {
        worker.await??;
    }
    let (copied, calls) = copied?;
    let during = count(calls) / copied.ended.duration_since(copied.began).as_secs_f64();
    Ok((before, during, copied))
}

/// Has the mover copy, and undo it. Says by how much a counter grew meanwhile.
async fn by_mover(
    ground: &Ground<'_>,
    mover: &Mover,
    scene: &Scene,
    counter: impl Fn() -> u64,
) -> Anyhow<(Copied, u64)> {
    let control = ground.databases.control_client().await?;
    let state = control.prepare("SELECT state, rows_copied FROM therev.relocations WHERE relocation = $1").await?;
    let plan = mover.plan(&scene.request()).await?;
    let number = mover.begin(&plan, Goal::Switched, "bench").await?.relocation;
    let watched = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(5));
        let (mut began, mut counted) = (None, 0);
        loop {
            ticks.tick().await;
            let row = control.query_one(&state, &[&number]).await?;
            let now = Instant::now();
            match (row.get("state"), began) {
                ("copying", None) => (began, counted) = (Some(now), counter()),
                ("planned", _) | ("copying", Some(_)) => {}
                (_, began) => {
                    let grown = counter() - counted;
                    mover.want(number, Goal::Aborted).await?;
                    let began = began.ok_or("the copy was not seen")?;
                    return Anyhow::Ok((Copied { rows: plan.rows, began, ended: now }, grown));
                }
            }
        }
    };
    let (driven, watched) = tokio::join!(mover.drive(number, &|_| {}), watched);
    driven?;
    watched
}

/// COPY TO into COPY FROM, table after table, and away with the rows again.
async fn by_copy(ground: &Ground<'_>, scene: &Scene) -> Anyhow<Copied> {
    let from = ground.databases.shard(u16::try_from(scene.source.0)?).await?;
    let to = ground.databases.shard(u16::try_from(scene.target.0)?).await?;
    to.batch_execute("SET session_replication_role = replica").await?;
    let list = scene.buckets.iter().map(|bucket| bucket.sql().to_string()).collect::<Vec<_>>().join(",");
    let tables = from.query(TABLES, &[]).await?;
    let (began, mut rows) = (Instant::now(), 0);
    for table in &tables {
        rows += pipe(&from, &to, table.get(0), table.get(1), &list).await?;
    }
    let ended = Instant::now();
    for table in &tables {
        let name: &str = table.get(0);
        to.batch_execute(&format!("DELETE FROM {name} WHERE bucket = ANY ('{{{list}}}')")).await?;
    }
    Ok(Copied { rows: i64::try_from(rows)?, began, ended })
}

async fn pipe(from: &Client, to: &Client, table: &str, columns: &str, buckets: &str) -> Anyhow<u64> {
    let out =
        format!("COPY (SELECT {columns} FROM {table} WHERE bucket = ANY ('{{{buckets}}}')) TO STDOUT (FORMAT binary)");
    let rows = from.copy_out(&out).await?;
    let sink = to.copy_in(&format!("COPY {table} ({columns}) FROM STDIN (FORMAT binary)")).await?;
    pin_mut!(rows, sink);
    let mut piece = BytesMut::with_capacity(PIECE * 2);
    while let Some(row) = rows.try_next().await? {
        piece.extend_from_slice(&row);
        if piece.len() >= PIECE {
            sink.send(piece.split().freeze()).await?;
        }
    }
    sink.send(piece.freeze()).await?;
    Ok(sink.finish().await?)
}
