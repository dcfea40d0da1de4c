//! Users of a dump.

use super::ImportError;
use super::dump::{Unusable, UserRow};
use super::names::{user_name_from, with_suffix};
use super::source::{Import, too_late, user_id};
use crate::bulk::BulkUser;
use chrono::DateTime;
use placement::UserId;
use serde_json::{Map, Value, json};

pub(super) async fn import(import: &mut Import<'_>) -> Result<(), ImportError> {
    let deleted = deleted_user(import);
    import.writer.users("deleted_users", vec![deleted]).await?;
    while let Some(batch) = import.files.users.recv().await {
        let users = batch?.into_iter().filter_map(|row| user(import, row)).collect();
        import.writer.users("users", users).await?;
        import.say("users");
    }
    Ok(())
}

fn user(import: &mut Import<'_>, row: Result<UserRow, Unusable>) -> Option<BulkUser> {
    let row = import.tally.read("users", "user", row)?;
    if let Some(reason) = too_late(row.created_at) {
        import.tally.skip("user", reason);
        return None;
    }
    let user_id = user_id(&import.site, &row.id.to_string());
    if import.users.insert(row.id, user_id).is_some() {
        import.tally.skip("user", "the same id again");
        return None;
    }
    let display = row.display_name.unwrap_or_default();
    let mut metadata = row.rest;
    metadata.insert("site".into(), json!(import.site));
    metadata.insert("source_id".into(), json!(row.id));
    let user_names = user_names(&display, &row.id.to_string(), &import.site, user_id);
    let display = Some(display).filter(|name| !name.is_empty());
    Some(BulkUser {
        user_id,
        user_names,
        first_name: fitting(display, 200, "DisplayName", &mut metadata),
        bio: fitting(row.about, 100_000, "AboutMe", &mut metadata),
        profile_pic_url: fitting(row.profile_image_url, 2_000, "ProfileImageUrl", &mut metadata),
        metadata: Value::Object(metadata),
        created_at: row.created_at,
    })
}

/// A text that is not too long for its column. One that is stays whole among what else is known, under the dump's name for it.
fn fitting(text: Option<String>, most: usize, attribute: &str, rest: &mut Map<String, Value>) -> Option<String> {
    let text = text?;
    if text.chars().count() <= most {
        return Some(text);
    }
    rest.insert(attribute.to_owned(), Value::String(text));
    None
}

/// The plain name, then with the id in the dump, then with the site as well; the last one is nobody else's for sure.
fn user_names(display: &str, source_id: &str, site: &str, user: UserId) -> Vec<String> {
    let base = user_name_from(display);
    // -1 is a user as well as 1.
    let source_id = source_id.replace('-', "m");
    let with_id = with_suffix(&base, &source_id);
    let with_site = with_suffix(&with_suffix(&base, &user_name_from(site)), &source_id);
    let own = with_suffix("user", &user.0.simple().to_string()[..16]);
    vec![base, with_id, with_site, own]
}

/// The author of what has none: one per site, first so that everything else has a place to go.
fn deleted_user(import: &Import<'_>) -> BulkUser {
    BulkUser {
        user_id: import.deleted_user,
        user_names: user_names("deleted", "deleted", &import.site, import.deleted_user),
        first_name: Some("deleted".into()),
        bio: None,
        profile_pic_url: None,
        metadata: json!({ "site": import.site, "source_id": "deleted" }),
        created_at: DateTime::UNIX_EPOCH,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_kept_beside() {
        let mut rest = Map::new();
        assert_eq!(fitting(Some("Ada".into()), 3, "DisplayName", &mut rest), Some("Ada".into()));
        assert_eq!(fitting(None, 3, "AboutMe", &mut rest), None);
        assert!(rest.is_empty());
        assert_eq!(fitting(Some("Åsa B".into()), 4, "DisplayName", &mut rest), None);
        assert_eq!(rest["DisplayName"], "Åsa B");
    }
}
