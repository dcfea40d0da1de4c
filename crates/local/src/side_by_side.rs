//! Work on several servers at once.

use std::sync::mpsc::{Sender, channel};
use std::thread;

use crate::{Error, ServerId};

/// Where a worker says what it does.
pub(crate) type Tell = Sender<String>;

/// Does the work for each server, all at the same time, and passes on what is said. When some fail the others still
/// end their work, and the first failure is returned.
pub(crate) fn side_by_side<W>(servers: &[ServerId], say: &mut dyn FnMut(&str), work: W) -> Result<(), Error>
where
    W: Fn(ServerId, &Tell) -> Result<(), Error> + Sync,
{
    thread::scope(|scope| {
        let (tell, told) = channel::<String>();
        let work = &work;
        let workers: Vec<_> = servers
            .iter()
            .map(|server| {
                let tell = tell.clone();
                scope.spawn(move || work(*server, &tell))
            })
            .collect();
        drop(tell);
        for line in told {
            say(&line);
        }
        let results = workers.into_iter().map(|worker| match worker.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        results.fold(Ok(()), Result::and)
    })
}

/// Says something; that nobody listens any more does not matter.
pub(crate) fn tell(to: &Tell, server: ServerId, what: &str) {
    to.send(format!("{server}: {what}")).ok();
}
