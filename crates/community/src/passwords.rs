//! Password hashes, made and checked on threads where they may take their time.

use crate::error::{Error, Result};
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use argon2::{Algorithm, Argon2, Params, PasswordHash, Version};
use secrecy::{ExposeSecret, SecretString};
use std::num::NonZero;
use std::sync::LazyLock;
use std::time::Duration;
use tokio::sync::Semaphore;

/// Argon2id with m = 19456 KiB, t = 2, p = 1: the design's choice.
fn argon2() -> Result<Argon2<'static>> {
    let params = Params::new(19_456, 2, 1, None).map_err(|e| Error::invalid("password", e.to_string()))?;
    Ok(Argon2::new(Algorithm::Argon2id, Version::V0x13, params))
}

/// As many at once as there are processors: each takes 19 MiB, and more would only take longer.
static TURNS: LazyLock<Semaphore> =
    LazyLock::new(|| Semaphore::new(std::thread::available_parallelism().map_or(4, NonZero::get)));

/// The most characters of a password.
const CHARACTERS_MAX: usize = 1_000;

/// Does the work on a thread where it may take its time, when it is its turn. It ends even where nobody waits for it any more. Whose
/// turn does not come within the deadline of a call hears that, and has cost nothing.
async fn in_turn<T: Send + 'static>(within: Duration, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let late = || shards::Error::Deadline { limit_ms: within.as_millis(), waiting_for: "a turn for a password".into() };
    let turn = tokio::time::timeout(within, TURNS.acquire()).await.map_err(|_| late())?;
    let work = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        work()
    });
    work.await.map_err(|e| Error::invalid("password", e.to_string()))
}

/// Hashes a password.
pub(crate) async fn hash_password(password: SecretString, within: Duration) -> Result<String> {
    let length = password.expose_secret().chars().count();
    if !(8..=CHARACTERS_MAX).contains(&length) {
        return Err(Error::invalid("password", format!("8 to {CHARACTERS_MAX} characters are allowed")));
    }
    in_turn(within, move || {
        let hash = argon2()?.hash_password(password.expose_secret().as_bytes());
        hash.map(|h| h.to_string()).map_err(|e| Error::invalid("password", e.to_string()))
    })
    .await?
}

/// Whether a password fits a hash; without a hash it takes as long and never does.
pub(crate) async fn verify_password(password: SecretString, hash: Option<String>, within: Duration) -> Result<bool> {
    // Nobody has a longer one, and what it would take grows with it.
    let is_too_long = password.expose_secret().chars().nth(CHARACTERS_MAX).is_some();
    let (password, hash) = if is_too_long { (SecretString::default(), None) } else { (password, hash) };
    in_turn(within, move || {
        let bytes = password.expose_secret().as_bytes();
        let Ok(argon2) = argon2() else { return false };
        let Some(hash) = hash else {
            // The outcome does not matter, the time does.
            let _ = argon2.hash_password(bytes);
            return false;
        };
        PasswordHash::new(&hash).is_ok_and(|parsed| argon2.verify_password(bytes, &parsed).is_ok())
    })
    .await
}
