//! Users of a dump.

use super::ImportError;
use super::dump::UserRow;
use super::names::{user_name_from, with_suffix};
use super::source::{Import, user_id};
use crate::bulk::BulkUser;
use chrono::DateTime;
use placement::UserId;
use serde_json::{Value, json};

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

fn user(import: &mut Import<'_>, row: UserRow) -> Option<BulkUser> {
    import.tally.read("users");
    let user_id = user_id(&import.site, &row.id.to_string());
    if import.users.insert(row.id, user_id).is_some() {
        import.tally.skip("user", "the same id again");
        return None;
    }
    let display = row.display_name.unwrap_or_default();
    let mut metadata = row.rest;
    metadata.insert("site".into(), json!(import.site));
    metadata.insert("source_id".into(), json!(row.id));
    let fits = |text: String, most: usize| (text.chars().count() <= most).then_some(text);
    Some(BulkUser {
        user_id,
        user_names: user_names(&display, &row.id.to_string(), &import.site, user_id),
        first_name: fits(display, 200).filter(|name| !name.is_empty()),
        bio: row.about.and_then(|text| fits(text, 100_000)),
        profile_pic_url: row.profile_image_url.and_then(|url| fits(url, 2_000)),
        metadata: Value::Object(metadata),
        created_at: row.created_at,
    })
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
