-- What an event is about, and who must hear of it.
-- user, thread: to the directory; a user's names are confirmed with it, on the shards of their claims.
-- claim: a name that was given up, to its shard. contribution: to the thread's shard.
-- taken: names that a bulk write holds for users whose rows it has yet to write; told only if it did not come to that.
-- totals: sum this thread's participants and tell the directory. audit: to the account's shard (split layout).
CREATE TYPE therev.event_kind AS ENUM ('user', 'thread', 'claim', 'taken', 'contribution', 'totals', 'audit');

CREATE DOMAIN therev.facts AS jsonb CHECK (jsonb_typeof(VALUE) = 'array');
-- Of the owner that wrote it; -1: of several owners, whom one statement wrote for.
CREATE DOMAIN therev.bucket_or_several AS smallint CHECK (VALUE BETWEEN -1 AND 4095);

-- What other databases must hear of, written in the transaction that made it true and delivered later. An event is what
-- one statement made true of one kind: facts, which are states with versions, never increments. Delivered twice or out
-- of order they change nothing.
-- Written by community/posts.rs, community/audit.rs, community/delivery.rs and community/bulk/; community/relay.rs marks,
-- shards/life.rs takes marks back, and community/maintenance.rs deletes.
CREATE TABLE therev.outbox (
    outbox_id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    colocation_group therev.colocation_group NOT NULL,
    bucket           therev.bucket_or_several NOT NULL,
    kind             therev.event_kind NOT NULL,
    facts            therev.facts,
    -- Instead of the facts, whose they are: a bulk write names the rows and tells their states itself. Only where it did
    -- not come to that are they read here, as they are by then. Side by side: owners, and the ids of their rows (their
    -- threads, for a contribution; their claims, for names taken); of a user the owner is all.
    owners           uuid[],
    ids              uuid[],
    created_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    delivered_at     timestamptz,
    -- When it was delivered for the first time, and the databases that have lost it since, by a promotion, as far as anybody can
    -- know. For the sake of one it is delivered again, to all; for the others that was nothing new.
    first_delivered_at timestamptz,
    lost_by          text[],
    CONSTRAINT outbox_facts_or_whose CHECK ((facts IS NULL) <> (owners IS NULL)),
    CONSTRAINT outbox_ids_beside_owners CHECK (ids IS NULL OR cardinality(ids) = cardinality(owners))
);
-- Random ids do not get shorter.
ALTER TABLE therev.outbox ALTER owners SET STORAGE EXTERNAL, ALTER ids SET STORAGE EXTERNAL;
-- Query: what is undelivered (relay), and what is of one bucket (the writer's own delivery).
CREATE INDEX outbox_pending ON therev.outbox (bucket, outbox_id) WHERE delivered_at IS NULL;
-- Query: delivered an hour ago, to be dropped (maintain).
CREATE INDEX outbox_delivered ON therev.outbox (delivered_at) WHERE delivered_at IS NOT NULL;

-- The bucket of an event whose facts lie between these two buckets.
CREATE FUNCTION therev.common_bucket(least_bucket smallint, greatest_bucket smallint) RETURNS smallint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN least_bucket = greatest_bucket THEN least_bucket ELSE -1::smallint END;

-- What the directory holds of a user, and the names that its claims are to confirm.
CREATE FUNCTION therev.user_state(u users) RETURNS jsonb
    LANGUAGE sql STABLE
    RETURN jsonb_build_object(
        'user_id', u.user_id, 'user_name', u.user_name, 'email', u.email,
        'display_name', therev.display_name(u),
        'profile_pic_url', u.profile_pic_url, 'role', u.role, 'is_active', u.is_active,
        'created_at', u.created_at, 'deleted', u.deleted_at IS NOT NULL, 'version', u.version);

-- What the directory holds of a thread, but for its totals.
CREATE FUNCTION therev.thread_state(t threads) RETURNS jsonb
    LANGUAGE sql STABLE
    RETURN jsonb_build_object(
        'thread_id', t.thread_id, 'author_id', t.author_id, 'title', t.title, 'is_pinned', t.is_pinned,
        'is_locked', t.is_locked, 'moderation', t.moderation, 'created_at', t.created_at,
        'deleted', t.deleted_at IS NOT NULL, 'version', t.version);

-- What an event tells: its facts, or the states by now of the rows that it names.
CREATE FUNCTION therev.facts_of(o therev.outbox) RETURNS jsonb
    LANGUAGE sql STABLE
    RETURN CASE
        WHEN o.facts IS NOT NULL THEN o.facts
        WHEN o.kind = 'user' THEN (
            SELECT coalesce(jsonb_agg(therev.user_state(u)), '[]')
              FROM unnest(o.owners) AS k (user_id)
              JOIN users AS u ON u.bucket = therev.bucket_of(k.user_id) AND u.user_id = k.user_id)
        WHEN o.kind = 'thread' THEN (
            SELECT coalesce(jsonb_agg(therev.thread_state(t)), '[]')
              FROM unnest(o.owners, o.ids) AS k (author_id, thread_id)
              JOIN threads AS t
                ON t.bucket = therev.bucket_of(k.author_id) AND t.author_id = k.author_id AND t.thread_id = k.thread_id)
        WHEN o.kind = 'contribution' THEN (
            SELECT coalesce(jsonb_agg(to_jsonb(c)), '[]')
              FROM unnest(o.owners, o.ids) AS k (author_id, thread_id)
              JOIN therev.thread_contributions AS c
                ON c.bucket = therev.bucket_of(k.author_id) AND c.author_id = k.author_id AND c.thread_id = k.thread_id)
        WHEN o.kind = 'taken' THEN (
            SELECT coalesce(jsonb_agg(jsonb_build_object('user_id', k.user_id, 'claim_key', k.claim_key)), '[]')
              FROM unnest(o.owners, o.ids) AS k (user_id, claim_key))
        WHEN o.kind = 'totals' THEN (
            SELECT coalesce(jsonb_agg(jsonb_build_object('author_id', k.author_id, 'thread_id', k.thread_id)), '[]')
              FROM unnest(o.owners, o.ids) AS k (author_id, thread_id))
    END;

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

-- Of 500 rows at the most, one event.
-- SECURITY DEFINER: whoever may change a user may not therefore write into the outbox.
CREATE FUNCTION therev.publish_users() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, therev, public, pg_temp AS
$$
BEGIN
    IF TG_OP = 'DELETE' THEN
        INSERT INTO therev.outbox (colocation_group, bucket, kind, facts)
        SELECT 'account', therev.common_bucket(min(s.bucket), max(s.bucket)), 'user', jsonb_agg(s.fact)
          FROM (SELECT o.bucket, (row_number() OVER () - 1) / 500 AS part,
                       therev.user_state(o) || jsonb_build_object('deleted', true, 'version', o.version + 1) AS fact
                  FROM old_users AS o) AS s
         GROUP BY s.part;
    ELSE
        INSERT INTO therev.outbox (colocation_group, bucket, kind, facts)
        SELECT 'account', therev.common_bucket(min(s.bucket), max(s.bucket)), 'user', jsonb_agg(s.fact)
          FROM (SELECT n.bucket, (row_number() OVER () - 1) / 500 AS part, therev.user_state(n) AS fact
                  FROM new_users AS n) AS s
         GROUP BY s.part;
    END IF;
    RETURN NULL;
END
$$;

-- Names that a change or a delete gave up.
CREATE FUNCTION therev.release_names() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, therev, public, pg_temp AS
$$
BEGIN
    INSERT INTO therev.outbox (colocation_group, bucket, kind, facts)
    SELECT 'account', OLD.bucket, 'claim',
           jsonb_build_array(jsonb_build_object(
               'claim_key', therev.claim_key(name.kind, name.value), 'user_id', OLD.user_id,
               'held', false, 'version', v.version))
      FROM therev.names_of(OLD) AS name,
           (SELECT CASE WHEN TG_OP = 'DELETE' THEN OLD.version + 1 ELSE NEW.version END AS version) AS v
     WHERE TG_OP = 'DELETE'
        OR NOT EXISTS (SELECT FROM therev.names_of(NEW) AS kept
                        WHERE kept.kind = name.kind AND kept.value = name.value);
    RETURN NULL;
END
$$;

-- A bulk write of the library leaves an event of its own.
CREATE TRIGGER users_publish_insert AFTER INSERT ON users
    REFERENCING NEW TABLE AS new_users FOR EACH STATEMENT
    WHEN (current_user <> 'therev' OR current_setting('therev.bulk', true) IS DISTINCT FROM 'on')
    EXECUTE FUNCTION therev.publish_users();
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
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, therev, public, pg_temp AS
$$
BEGIN
    IF TG_OP = 'DELETE' THEN
        INSERT INTO therev.outbox (colocation_group, bucket, kind, facts)
        SELECT 'content', therev.common_bucket(min(s.bucket), max(s.bucket)), 'thread', jsonb_agg(s.fact)
          FROM (SELECT o.bucket, (row_number() OVER () - 1) / 500 AS part,
                       therev.thread_state(o) || jsonb_build_object('deleted', true, 'version', o.version + 1) AS fact
                  FROM old_threads AS o) AS s
         GROUP BY s.part;
    ELSE
        INSERT INTO therev.outbox (colocation_group, bucket, kind, facts)
        SELECT 'content', therev.common_bucket(min(s.bucket), max(s.bucket)), 'thread', jsonb_agg(s.fact)
          FROM (SELECT n.bucket, (row_number() OVER () - 1) / 500 AS part, therev.thread_state(n) AS fact
                  FROM new_threads AS n) AS s
         GROUP BY s.part;
    END IF;
    IF TG_OP = 'INSERT' THEN
        -- Posts were here first (somebody restores in that order, or a promotion lost the thread and it is made again): what they
        -- told was of a thread that is nowhere.
        INSERT INTO therev.outbox (colocation_group, bucket, kind, facts)
        SELECT 'content', therev.common_bucket(min(n.bucket), max(n.bucket)), 'totals',
               jsonb_agg(jsonb_build_object('thread_id', n.thread_id, 'author_id', n.author_id))
          FROM new_threads AS n
         WHERE EXISTS (SELECT FROM therev.thread_participants AS p
                        WHERE p.bucket = n.bucket AND p.author_id = n.author_id AND p.thread_id = n.thread_id)
        HAVING count(*) > 0;
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER threads_publish_insert AFTER INSERT ON threads
    REFERENCING NEW TABLE AS new_threads FOR EACH STATEMENT
    WHEN (current_user <> 'therev' OR current_setting('therev.bulk', true) IS DISTINCT FROM 'on')
    EXECUTE FUNCTION therev.publish_threads();
CREATE TRIGGER threads_publish_update AFTER UPDATE ON threads
    REFERENCING NEW TABLE AS new_threads FOR EACH STATEMENT EXECUTE FUNCTION therev.publish_threads();
CREATE TRIGGER threads_publish_delete AFTER DELETE ON threads
    REFERENCING OLD TABLE AS old_threads FOR EACH STATEMENT EXECUTE FUNCTION therev.publish_threads();

-- Nobody puts them on a table of their own: that takes this right, and to fire them where they are takes none.
REVOKE EXECUTE ON FUNCTION therev.publish_users(), therev.release_names(), therev.publish_threads() FROM PUBLIC;
