//! The commands, as they are typed.

mod audit;
mod bench;
mod check;
mod cluster;
mod completions;
mod generate;
mod hot;
mod import;
mod init;
mod life;
mod maintain;
mod man;
mod move_rows;
mod post;
mod rebalance;
mod relay;
mod relocation;
mod schema;
mod shard;
mod simulate;
mod status;
mod thread;
mod user;
mod where_is;

use crate::app::App;
use crate::error::Result;
use clap::Subcommand;
use std::process::ExitCode;

/// What can be done.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Cluster(cluster::Args),
    Init(init::Args),
    Life(life::Args),
    Schema(schema::Args),
    Status(status::Args),
    Check(check::Args),
    Where(where_is::Args),
    User(user::Args),
    Thread(thread::Args),
    Post(post::Args),
    Import(import::Args),
    Generate(generate::Args),
    Simulate(simulate::Args),
    Maintain(maintain::Args),
    Relay(relay::Args),
    Shard(shard::Args),
    Rebalance(rebalance::Args),
    Move(move_rows::Args),
    Relocation(relocation::Args),
    Hot(hot::Args),
    Audit(audit::Args),
    Bench(bench::Args),
    Completions(completions::Args),
    Man(man::Args),
}

/// Runs one of them.
pub(crate) async fn run(app: &App, command: Command) -> Result<ExitCode> {
    match command {
        Command::Bench(args) => return bench::run(args, app.out.json),
        Command::Cluster(args) => return cluster::run(app, args).await,
        Command::Schema(args) => return schema::run(app, args).await,
        Command::Status(args) => return status::run(app, args).await,
        Command::Check(args) => return check::run(app, args).await,
        Command::Maintain(args) => return maintain::run(app, args).await,
        Command::Relay(args) => return relay::run(app, args).await,
        Command::Init(args) => init::run(app, args).await?,
        Command::Life(args) => life::run(app, args).await?,
        Command::Where(args) => where_is::run(app, args).await?,
        Command::User(args) => Box::pin(user::run(app, args)).await?,
        Command::Thread(args) => thread::run(app, args).await?,
        Command::Post(args) => post::run(app, args).await?,
        Command::Import(args) => import::run(app, args).await?,
        Command::Generate(args) => generate::run(app, args).await?,
        Command::Shard(args) => Box::pin(shard::run(app, args)).await?,
        Command::Rebalance(args) => Box::pin(rebalance::run(app, args)).await?,
        Command::Move(args) => Box::pin(move_rows::run(app, args)).await?,
        Command::Relocation(args) => Box::pin(relocation::run(app, args)).await?,
        Command::Simulate(args) => simulate::run(app, args)?,
        Command::Hot(args) => hot::run(app, args).await?,
        Command::Audit(args) => audit::run(app, args).await?,
        Command::Completions(args) => completions::run(args)?,
        Command::Man(args) => man::run(args)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Success, or 1 when something is wrong that the data tells.
pub(crate) fn unless_wrong(is_well: bool) -> ExitCode {
    if is_well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
