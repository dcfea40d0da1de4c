//! The audit entry in the transaction of a statement of this crate.

use community::Actor;
use uuid::Uuid;

/// The CTE that leaves an audit entry.
///
/// `$change` names a CTE with `bucket, user_id, target, before, after`, of one row or none; `$note` is the parameter
/// with [`Actor::note`]. AI accounts and tasks are in the audit log's own group, so the fence of the statement is its fence.
macro_rules! audited {
    ($change:literal, $note:literal) => {
        concat!(
            "audited AS (
                 INSERT INTO audit_log (bucket, user_id, audit_id, actor, action, target, before, after)
                 SELECT c.bucket, c.user_id, n.audit_id, n.actor, n.action, c.target, c.before, c.after
                   FROM ",
            $change,
            " AS c,
                        jsonb_to_record(",
            $note,
            "::jsonb) AS n (audit_id uuid, actor text, action text))"
        )
    };
}
pub(crate) use audited;

/// The user who does something; an operator is none.
pub(crate) fn acting_user(actor: &Actor) -> Option<Uuid> {
    match actor {
        Actor::User(id) => Some(id.0),
        Actor::Operator(_) => None,
    }
}
