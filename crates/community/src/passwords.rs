//! Password hashes, made and checked on threads where they may take their time.

use crate::error::{Error, Result};
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use argon2::{Algorithm, Argon2, Params, PasswordHash, Version};
use secrecy::{ExposeSecret, SecretString};
use std::num::NonZero;
use std::sync::LazyLock;
use tokio::sync::Semaphore;
use tokio::task::JoinError;

/// Argon2id with m = 19456 KiB, t = 2, p = 1: the design's choice.
fn argon2() -> Result<Argon2<'static>> {
    let params = Params::new(19_456, 2, 1, None).map_err(|e| Error::invalid("password", e.to_string()))?;
    Ok(Argon2::new(Algorithm::Argon2id, Version::V0x13, params))
}

/// As many at once as there are processors: each takes 19 MiB, and more would only take longer.
static TURNS: LazyLock<Semaphore> =
    LazyLock::new(|| Semaphore::new(std::thread::available_parallelism().map_or(4, NonZero::get)));

/// Does the work on a thread where it may take its time, when it is its turn. It ends even where nobody waits for it any more.
async fn in_turn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> std::result::Result<T, JoinError> {
    let turn = TURNS.acquire().await;
    tokio::task::spawn_blocking(move || {
        let _turn = turn;
        work()
    })
    .await
}

/// Hashes a password.
pub(crate) async fn hash_password(password: SecretString) -> Result<String> {
    let length = password.expose_secret().chars().count();
    if !(8..=1_000).contains(&length) {
        return Err(Error::invalid("password", "8 to 1000 characters are allowed"));
    }
    let hashed = in_turn(move || {
        let hash = argon2()?.hash_password(password.expose_secret().as_bytes());
        hash.map(|h| h.to_string()).map_err(|e| Error::invalid("password", e.to_string()))
    });
    hashed.await.map_err(|e| Error::invalid("password", e.to_string()))?
}

/// Whether a password fits a hash; without a hash it takes as long and never does.
pub(crate) async fn verify_password(password: SecretString, hash: Option<String>) -> bool {
    let verified = in_turn(move || {
        let bytes = password.expose_secret().as_bytes();
        let Ok(argon2) = argon2() else { return false };
        let Some(hash) = hash else {
            // The outcome does not matter, the time does.
            let _ = argon2.hash_password(bytes);
            return false;
        };
        PasswordHash::new(&hash).is_ok_and(|parsed| argon2.verify_password(bytes, &parsed).is_ok())
    });
    verified.await.unwrap_or(false)
}
