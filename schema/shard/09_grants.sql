-- Least privilege. `therev` is the role of the library: it may not change ownership, truncate, or touch what has been
-- audited. `therev_reader` is for people and reports: it sees no secret. The owner of all this is `therev_admin`.

GRANT SELECT ON ALL TABLES IN SCHEMA public, therev TO therev;
GRANT INSERT, UPDATE, DELETE
    ON users, user_sessions, user_ai_accounts, ai_tasks, threads, posts, therev.claims, therev.id_routes,
       therev.thread_contributions, therev.thread_participants, therev.thread_totals, therev.outbox
    TO therev;
GRANT INSERT, DELETE ON ai_task_logs TO therev;
GRANT INSERT ON audit_log TO therev;

-- Any node sees to the months to come.
GRANT EXECUTE ON FUNCTION therev.make_partitions(integer) TO therev;

-- The mover puts rows where they belong and takes them away; of the rest it touches its own machinery alone.
GRANT SELECT ON ALL TABLES IN SCHEMA public, therev TO therev_mover;
GRANT INSERT, UPDATE, DELETE ON therev.relocation_parts, therev.sentinels TO therev_mover;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA therev TO therev_mover;

-- A stranger's writes are checked with the fence.
GRANT SELECT ON therev.fence, therev.fence_account, therev.fence_content, therev.ownership TO PUBLIC;

GRANT SELECT ON threads, posts, ai_tasks, ai_task_logs, user_ai_summary, ai_task_stats, therev.refreshes,
    therev.thread_contributions, therev.thread_participants, therev.thread_totals, therev.intents, therev.id_routes
    TO therev_reader;
-- Not what e-mail addresses stand in: names, the facts of events, what an audited change was about. Nor what an address can be
-- tried against: a claim's key is made of it, and so is its bucket; events name claims by their keys.
GRANT SELECT (kind, state, created_at, version) ON therev.claims TO therev_reader;
GRANT SELECT (outbox_id, colocation_group, bucket, kind, owners, created_at, delivered_at, first_delivered_at, lost_by)
    ON therev.outbox TO therev_reader;
GRANT SELECT (bucket, user_id, created_at, audit_id, actor, action, target) ON audit_log TO therev_reader;
GRANT SELECT (bucket, user_id, user_name, first_name, last_name, bio, ideology, profile_pic_url, role, is_active,
              created_at, updated_at, deleted_at, was_registered, version) ON users TO therev_reader;
GRANT SELECT (bucket, user_id, session_id, status, expires_at, last_seen_at, created_at) ON user_sessions
    TO therev_reader;
GRANT SELECT (bucket, user_id, account_id, provider, account_type, label, status, is_default, priority, limits,
              requests_remaining, tokens_remaining, limits_reset_at, last_used_at, created_at, updated_at, version)
    ON user_ai_accounts TO therev_reader;
