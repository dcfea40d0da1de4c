//! SQL by `psql`: a handful of statements while a cluster starts do not need a driver.

use std::io::Write;
use std::process::Stdio;

use crate::account::plain_command;
use crate::cluster::Cluster;
use crate::{Error, ServerId};

/// Runs SQL as the superuser in the database `postgres` of a server, and returns the rows as text.
pub(crate) fn run(cluster: &Cluster, server: ServerId, sql: &str) -> Result<String, Error> {
    let program = cluster.state.pg_bin.join("psql");
    let failed = |reason: String| Error::Tool { tool: "psql", server, reason };
    let unrun = |source| Error::Program { program: program.clone(), source };
    let mut child = plain_command(&program)
        .args(["-X", "-A", "-t", "-q", "-w", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-d", "postgres"])
        .args(["-p", &cluster.port(server)?.to_string(), "-U", &cluster.state.superuser, "-f", "-"])
        .env("PGPASSWORD", &cluster.state.password)
        // A server that stands still is no reason to do so.
        .env("PGCONNECT_TIMEOUT", "10")
        // A slot or an empty database need not be on a standby, which may be what this is to make.
        .env("PGOPTIONS", "-c synchronous_commit=local")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(unrun)?;
    if let Some(mut input) = child.stdin.take() {
        // What `psql` says of the server is the better reason, when it ended before reading.
        input.write_all(sql.as_bytes()).ok();
    }
    let output = child.wait_with_output().map_err(unrun)?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        Err(failed(last_line(&String::from_utf8_lossy(&output.stderr))))
    }
}

/// The last line that says something: PostgreSQL's tools end with their reason.
pub(crate) fn last_line(text: &str) -> String {
    text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or("no reason given").to_owned()
}
