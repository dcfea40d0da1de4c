-- What other databases must hear of, written in the transaction that made it true and delivered later. Events carry
-- states with versions, never increments: delivered twice or out of order they change nothing.

CREATE TABLE therev.outbox (
    outbox_id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    colocation_group therev.colocation_group NOT NULL,
    -- Of the owner that wrote it.
    bucket           smallint    NOT NULL,
    -- user, thread: to the directory; a user's names are confirmed with it, on the shards of their claims.
    -- claim: a name that was given up, to its shard. contribution: to the thread's shard.
    -- totals: sum this thread's participants and tell the directory. audit: to the account's shard (split layout).
    kind             text        NOT NULL
                     CHECK (kind IN ('user', 'thread', 'claim', 'contribution', 'totals', 'audit')),
    key              uuid        NOT NULL,
    -- The second half of the key where it has two: the participant of a thread, the user of a claim.
    member           uuid        NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',
    version          bigint      NOT NULL,
    payload          jsonb       NOT NULL,
    created_at       timestamptz NOT NULL DEFAULT now(),
    delivered_at     timestamptz
);
-- Query: what is undelivered (relay), and what is of one bucket (the writer's own delivery).
CREATE INDEX outbox_pending ON therev.outbox (bucket, outbox_id) WHERE delivered_at IS NULL;
-- Query: delivered an hour ago, to be dropped (maintain).
CREATE INDEX outbox_delivered ON therev.outbox (delivered_at) WHERE delivered_at IS NOT NULL;

-- What the directory holds of a user, and the names that its claims are to confirm.
CREATE FUNCTION therev.user_state(u users) RETURNS jsonb
    LANGUAGE sql STABLE
    RETURN jsonb_build_object(
        'user_id', u.user_id, 'user_name', u.user_name, 'email', u.email,
        'display_name', nullif(concat_ws(' ', u.first_name, u.last_name), ''),
        'profile_pic_url', u.profile_pic_url, 'role', u.role, 'is_active', u.is_active,
        'created_at', u.created_at, 'deleted', u.deleted_at IS NOT NULL, 'version', u.version);

-- What the directory holds of a thread, but for its totals.
CREATE FUNCTION therev.thread_state(t threads) RETURNS jsonb
    LANGUAGE sql STABLE
    RETURN jsonb_build_object(
        'thread_id', t.thread_id, 'author_id', t.author_id, 'title', t.title, 'is_pinned', t.is_pinned,
        'is_locked', t.is_locked, 'moderation', t.moderation, 'created_at', t.created_at,
        'deleted', t.deleted_at IS NOT NULL, 'version', t.version);

-- The key of a name: its first 16 bytes of SHA-256 over kind and normalized value. The same as in community/names.rs.
CREATE FUNCTION therev.claim_key(kind text, value text) RETURNS uuid
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN encode(substr(sha256(convert_to(kind || ':' || value, 'UTF8')), 1, 16), 'hex')::uuid;

-- The names of a user's row, as rows.
CREATE FUNCTION therev.names_of(u users) RETURNS TABLE (kind text, value text)
    LANGUAGE sql IMMUTABLE
BEGIN ATOMIC
    SELECT n.kind, n.value
      FROM (VALUES ('user_name', u.user_name), ('email', u.email)) AS n (kind, value)
     WHERE n.value IS NOT NULL;
END;

-- SECURITY DEFINER: whoever may change a user may not therefore write into the outbox.
CREATE FUNCTION therev.publish_users() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, therev, public AS
$$
BEGIN
    IF TG_OP = 'DELETE' THEN
        INSERT INTO therev.outbox (colocation_group, bucket, kind, key, version, payload)
        SELECT 'account', o.bucket, 'user', o.user_id, o.version + 1,
               therev.user_state(o) || jsonb_build_object('deleted', true, 'version', o.version + 1)
          FROM old_users AS o;
    ELSE
        INSERT INTO therev.outbox (colocation_group, bucket, kind, key, version, payload)
        SELECT 'account', n.bucket, 'user', n.user_id, n.version, therev.user_state(n)
          FROM new_users AS n;
    END IF;
    RETURN NULL;
END
$$;

-- Names that a change or a delete gave up.
CREATE FUNCTION therev.release_names() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, therev, public AS
$$
BEGIN
    INSERT INTO therev.outbox (colocation_group, bucket, kind, key, member, version, payload)
    SELECT 'account', OLD.bucket, 'claim', therev.claim_key(name.kind, name.value), OLD.user_id, v.version,
           jsonb_build_object('user_id', OLD.user_id, 'version', v.version)
      FROM therev.names_of(OLD) AS name,
           (SELECT CASE WHEN TG_OP = 'DELETE' THEN OLD.version + 1 ELSE NEW.version END AS version) AS v
     WHERE TG_OP = 'DELETE'
        OR NOT EXISTS (SELECT FROM therev.names_of(NEW) AS kept
                        WHERE kept.kind = name.kind AND kept.value = name.value);
    RETURN NULL;
END
$$;

CREATE TRIGGER users_publish_insert AFTER INSERT ON users
    REFERENCING NEW TABLE AS new_users FOR EACH STATEMENT EXECUTE FUNCTION therev.publish_users();
CREATE TRIGGER users_publish_update AFTER UPDATE ON users
    REFERENCING NEW TABLE AS new_users FOR EACH STATEMENT EXECUTE FUNCTION therev.publish_users();
CREATE TRIGGER users_publish_delete AFTER DELETE ON users
    REFERENCING OLD TABLE AS old_users FOR EACH STATEMENT EXECUTE FUNCTION therev.publish_users();
CREATE TRIGGER users_release_names_update AFTER UPDATE ON users
    FOR EACH ROW WHEN (OLD.user_name IS DISTINCT FROM NEW.user_name OR OLD.email IS DISTINCT FROM NEW.email)
    EXECUTE FUNCTION therev.release_names();
CREATE TRIGGER users_release_names_delete AFTER DELETE ON users
    FOR EACH ROW EXECUTE FUNCTION therev.release_names();

CREATE FUNCTION therev.publish_threads() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, therev, public AS
$$
BEGIN
    IF TG_OP = 'DELETE' THEN
        INSERT INTO therev.outbox (colocation_group, bucket, kind, key, version, payload)
        SELECT 'content', o.bucket, 'thread', o.thread_id, o.version + 1,
               therev.thread_state(o) || jsonb_build_object('deleted', true, 'version', o.version + 1)
          FROM old_threads AS o;
    ELSE
        INSERT INTO therev.outbox (colocation_group, bucket, kind, key, version, payload)
        SELECT 'content', n.bucket, 'thread', n.thread_id, n.version, therev.thread_state(n)
          FROM new_threads AS n;
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER threads_publish_insert AFTER INSERT ON threads
    REFERENCING NEW TABLE AS new_threads FOR EACH STATEMENT EXECUTE FUNCTION therev.publish_threads();
CREATE TRIGGER threads_publish_update AFTER UPDATE ON threads
    REFERENCING NEW TABLE AS new_threads FOR EACH STATEMENT EXECUTE FUNCTION therev.publish_threads();
CREATE TRIGGER threads_publish_delete AFTER DELETE ON threads
    REFERENCING OLD TABLE AS old_threads FOR EACH STATEMENT EXECUTE FUNCTION therev.publish_threads();
