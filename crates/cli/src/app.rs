//! What every command is given: the flags, the environment, the way out, and the cluster when it asks for it.

use crate::cli::Global;
use crate::config::{Environment, Found};
use crate::error::{CliError, Result};
use crate::output::Output;
use serde_json::Value;
use std::path::PathBuf;
use std::time::Duration;
use therev::{Actor, Database, Therev};

/// How long a command waits after its write for the totals that follow from it.
const SETTLE: Duration = Duration::from_secs(2);

/// One run of the program.
pub(crate) struct App {
    /// The flags of every command.
    pub(crate) global: Global,
    /// What the environment says.
    pub(crate) env: Environment,
    /// The folder that the command was given in.
    pub(crate) folder: PathBuf,
    /// Where data and talk go.
    pub(crate) out: Output,
}

impl App {
    pub(crate) fn new(global: Global, env: Environment) -> Result<App> {
        let folder = std::env::current_dir()?;
        let out = Output::new(global.json, env.no_color);
        Ok(App { global, env, folder, out })
    }

    /// The cluster's configuration, and how it was found.
    pub(crate) fn found(&self) -> Result<Found> {
        crate::config::find(self.global.control.as_deref(), &self.env, &self.folder)
    }

    /// The cluster, for one short command: nothing runs in the background.
    pub(crate) async fn open(&self) -> Result<Therev> {
        let found = self.found()?;
        self.open_found(found).await
    }

    /// The cluster, for a long operation that needs a relay beside it.
    pub(crate) async fn open_relaying(&self) -> Result<Therev> {
        let mut config = self.found()?.config;
        config.relay_ms = config.relay_ms.max(200);
        Ok(therev::connect(config).await?)
    }

    /// The cluster of a configuration, for one short command.
    pub(crate) async fn open_found(&self, mut found: Found) -> Result<Therev> {
        found.config.relay_ms = 0;
        therev::connect(found.config).await.map_err(|error| {
            let at_control = matches!(&error, therev::Error::Store(e) if e.database() == Some(Database::Control));
            let error = CliError::from(error);
            if at_control { error.also(&format!("this cluster was found by {}", found.by)) } else { error }
        })
    }

    /// Who works at this command line.
    pub(crate) fn operator(&self) -> Actor {
        Actor::Operator(self.env.operator.clone())
    }

    /// Notes a long operation of an operator in the control database: how it ended, or why it stopped.
    pub(crate) async fn noted<T>(
        &self,
        therev: &Therev,
        action: &str,
        target: &str,
        outcome: Result<T>,
        after: impl FnOnce(&T) -> Value,
    ) -> Result<T> {
        let after = match &outcome {
            Ok(done) => after(done),
            Err(error) => serde_json::json!({ "stopped": error.json() }),
        };
        self.note(therev, action, target, after).await;
        outcome
    }

    /// Notes in the control database what an operator did. It is done whether or not that can be noted: where it cannot, a
    /// warning says so.
    pub(crate) async fn note(&self, therev: &Therev, action: &str, target: &str, after: Value) {
        if let Err(unnoted) = therev.note_operator(&self.operator(), action, target, after).await {
            tracing::warn!(error = %unnoted, "it could not be noted in the control database");
        }
    }

    /// After a write: what follows from it in other databases is there when the command ends, if they answer.
    pub(crate) async fn settle(&self, therev: &Therev) {
        match tokio::time::timeout(SETTLE, therev.relay_once()).await {
            Ok(Ok(relayed)) => tracing::debug!(?relayed, "settled"),
            Ok(Err(error)) => tracing::debug!(%error, "what follows from the write is left to a relay"),
            Err(_) => tracing::debug!("what follows from the write is left to a relay: it took too long"),
        }
    }
}
