//! Does one thing and is killed in the middle of it: `cut-off POINT NTH|stop CONTROL_URL PASSWORD OPERATION [ARGUMENT …]`.
//!
//! `SIGKILL` at the nth pass of a fail point: nothing is cleaned up, nothing is flushed. Or `SIGSTOP` at the first: it goes on
//! once it is told to.

use rustix::process::{Signal, getpid, kill_process};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use testkit::PASSWORD;
use therev::generate::Plan;
use therev::planner::By;
use therev::relocation::{Aim, Mover, Options};
use therev::{Actor, AddPlan, Config, NewPost, NewUser, RolePasswords, ShardNo, Therev, add_shard};

/// Whoever comes after a death need not wait as long as in earnest.
const LEASE: Duration = Duration::from_secs(2);

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [point, nth, control, password, operation, rest @ ..] = arguments.as_slice() else {
        return Err("cut-off POINT NTH|stop CONTROL_URL PASSWORD OPERATION [ARGUMENT …]".into());
    };
    let nth: Option<u32> = if nth == "stop" { None } else { Some(nth.parse()?) };
    let passed = AtomicU32::new(0);
    fail::cfg_callback(point.as_str(), move || {
        let pass = passed.fetch_add(1, Ordering::SeqCst) + 1;
        match nth {
            None if pass == 1 => kill_process(getpid(), Signal::STOP).expect("it is stopped"),
            Some(nth) if pass == nth => {
                // The signal ends the process before this call returns; should it fail, the abort does.
                let _ = kill_process(getpid(), Signal::KILL);
                std::process::abort();
            }
            _ => {}
        }
    })?;
    let mut config = Config::new(control.as_str());
    config.password = Some(password.as_str().into());
    config.relay_ms = 0;
    config.claim_timeout_s = 0;
    config.delivery_ms = 5_000;
    run(&therev::connect(config).await?, operation, rest).await
}

async fn run(node: &Therev, operation: &str, rest: &[String]) -> Result<(), Box<dyn std::error::Error>> {
    let operator = Actor::Operator("cut-off".into());
    match (operation, rest) {
        ("register", [user, name]) => {
            let new = NewUser {
                user_id: Some(user.parse()?),
                user_name: name.clone(),
                email: Some(format!("{name}@example.org")),
                ..NewUser::default()
            };
            node.register(new, &operator).await?;
        }
        ("post", [author, thread, post]) => {
            let new = NewPost::new(author.parse()?, thread.parse()?, "cut off");
            node.create_post(NewPost { post_id: Some(post.parse()?), ..new }).await?;
        }
        ("relay", []) => {
            node.relay_once().await?;
        }
        ("import", [folder]) => {
            therev::import::stackexchange(node, folder.as_ref(), "example", &mut |_| {}).await?;
        }
        ("generate", []) => {
            let plan = Plan { users: 300, threads: 40, posts: 12_000, seed: 5, zipf: 1.1 };
            therev::generate::generate(node, plan, &mut |_| {}).await?;
        }
        ("relocate", [number]) => {
            // A machine that is busy with tests takes longer than the product's budget.
            let options = Options { budget: Duration::from_secs(1), lease: LEASE };
            Mover::new(node.shards().clone(), options).drive(number.parse()?, &|_| {}).await?;
        }
        ("add-shard", [address]) => {
            let word = || PASSWORD.to_owned();
            let passwords = RolePasswords { library: word(), admin: word(), mover: word() };
            add_shard(node.shards(), &AddPlan { address: address.clone(), weight: 1.0, passwords }).await?;
        }
        ("remove-shard", [shard]) => {
            therev::remove_shard(node.shards(), ShardNo(shard.parse()?)).await?;
        }
        ("rebalance", []) => {
            let aim = Aim::Balance { by: By::Size, moves_max: None };
            // Tests make the machine slow: a switch may take as long as it does.
            let options = Options { budget: Duration::from_secs(2), lease: LEASE };
            Mover::new(node.shards().clone(), options).rebalance(aim, "cut-off", &|_| {}).await?;
        }
        _ => return Err(format!("what is {operation}?").into()),
    }
    Ok(())
}
