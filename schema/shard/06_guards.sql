-- Writers that are not therev's own role (psql, scripts) are fenced too, by triggers; the WHEN clause keeps these off
-- the path of therev's own statements, which carry the fence in themselves.

-- Fills bucket and version, and refuses a row that this shard does not own.
--
-- The writer already holds a lock on the table, and under READ COMMITTED this check takes a snapshot of its own: a mark
-- set before the check is seen here, one set after it waits for the lock. An older snapshot would miss the mark.
CREATE FUNCTION therev.guard() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, therev, public AS
$$
DECLARE
    guarded constant therev.colocation_group := TG_ARGV[0];
    owner_column constant text := TG_ARGV[1];
    image jsonb;
    row_bucket smallint;
    floor bigint;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'writes to % need READ COMMITTED, this transaction is %',
            TG_TABLE_NAME, current_setting('transaction_isolation')
            USING ERRCODE = 'TR002', HINT = 'Begin the transaction with ISOLATION LEVEL READ COMMITTED.';
    END IF;

    IF TG_OP IN ('INSERT', 'UPDATE') THEN
        row_bucket := therev.bucket_of((to_jsonb(NEW) ->> owner_column)::uuid);
        floor := therev.admit(guarded, row_bucket, (to_jsonb(NEW) ->> owner_column)::uuid, TG_TABLE_NAME);
        image := jsonb_build_object('bucket', row_bucket, 'version', floor);
        IF TG_OP = 'UPDATE' THEN
            image := image || jsonb_build_object(
                'version', greatest((to_jsonb(OLD) ->> 'version')::bigint + 1, floor), 'updated_at', now());
        END IF;
        NEW := jsonb_populate_record(NEW, image);
    END IF;
    IF TG_OP IN ('UPDATE', 'DELETE') THEN
        PERFORM therev.admit(
            guarded, (to_jsonb(OLD) ->> 'bucket')::smallint, (to_jsonb(OLD) ->> owner_column)::uuid, TG_TABLE_NAME);
    END IF;
    RETURN CASE WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END;
END
$$;

-- The least version of a row of this owner, or an error that says where the owner's rows are.
CREATE FUNCTION therev.admit(guarded therev.colocation_group, row_bucket smallint, row_owner uuid, table_name text)
    RETURNS bigint
    LANGUAGE plpgsql STABLE AS
$$
DECLARE
    floor bigint;
    said text;
BEGIN
    SELECT f.version_floor INTO floor
      FROM therev.fence AS f
     WHERE f.colocation_group = guarded AND therev.may_write(f, row_bucket, row_owner);
    IF NOT FOUND THEN
        SELECT coalesce(p.state || ' shard ' || p.peer, p.state::text, o.state || ' shard ' || o.peer, o.state::text) INTO said
          FROM therev.ownership AS o
          LEFT JOIN therev.pins AS p ON p.colocation_group = guarded AND p.user_id = row_owner
         WHERE o.colocation_group = guarded AND o.bucket = row_bucket;
        RAISE EXCEPTION 'shard % does not own % bucket % of this row of %: %',
            (SELECT shard FROM therev.identity), guarded, row_bucket, table_name,
            coalesce(said, 'it was never placed here')
            USING ERRCODE = 'TR001', HINT = 'Ask `therev where ID` which shard owns it.';
    END IF;
    RETURN floor;
END
$$;

CREATE FUNCTION therev.refuse_truncate() RETURNS trigger
    LANGUAGE plpgsql AS
$$
BEGIN
    RAISE EXCEPTION 'TRUNCATE of % is refused: it holds what many owners need', TG_TABLE_NAME
        USING ERRCODE = 'TR003', HINT = 'Delete the rows that you mean.';
END
$$;

-- A post that a stranger writes is counted like any other.
CREATE FUNCTION therev.count_post() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, therev, public AS
$$
BEGIN
    IF TG_OP IN ('UPDATE', 'DELETE') THEN
        PERFORM therev.contribute(OLD, -1);
    END IF;
    IF TG_OP IN ('INSERT', 'UPDATE') THEN
        PERFORM therev.contribute(NEW, 1);
    END IF;
    RETURN NULL;
END
$$;

CREATE FUNCTION therev.contribute(p posts, sign integer) RETURNS void
    LANGUAGE sql
BEGIN ATOMIC
    WITH contribution AS (
        INSERT INTO therev.thread_contributions AS c
               (bucket, author_id, thread_id, thread_author_id, posts, deleted, last_post_at, version)
        SELECT p.bucket, p.author_id, p.thread_id, p.thread_author_id,
               CASE WHEN p.deleted_at IS NULL THEN 1 ELSE 0 END,
               CASE WHEN p.deleted_at IS NULL THEN 0 ELSE 1 END, p.created_at, f.version_floor
          FROM therev.fence AS f
         WHERE f.colocation_group = 'content'
        ON CONFLICT (bucket, author_id, thread_id) DO UPDATE
           SET posts = c.posts + sign * excluded.posts,
               deleted = c.deleted + sign * excluded.deleted,
               last_post_at = greatest(c.last_post_at, excluded.last_post_at),
               version = greatest(c.version + 1, excluded.version)
        RETURNING *)
    INSERT INTO therev.outbox (colocation_group, bucket, kind, facts)
    SELECT 'content', c.bucket, 'contribution', jsonb_build_array(to_jsonb(c))
      FROM contribution AS c;
END;

-- Every owned row lies in its owner's bucket. What `bucket_of` computes is written out: of a function the server would read the
-- text for every statement anew, an eighth of what a short one takes.
DO $$
DECLARE
    guarded   record;
    of_a_key  text := substr(pg_get_function_sqlbody('therev.bucket_of(uuid)'::regprocedure), length('RETURN '));
BEGIN
    FOR guarded IN SELECT * FROM therev.owned_tables
    LOOP
        EXECUTE format(
            'ALTER TABLE %s ADD CONSTRAINT %I CHECK (bucket = %s)',
            guarded.table_name, split_part(guarded.table_name, '.', 2) || '_bucket',
            regexp_replace(of_a_key, '\mkey\M', guarded.owner_column));
        EXECUTE format(
            'CREATE TRIGGER guard BEFORE INSERT OR UPDATE OR DELETE ON %s
                 FOR EACH ROW WHEN (current_user <> ''therev'') EXECUTE FUNCTION therev.guard(%L, %L)',
            guarded.table_name, guarded.colocation_group, guarded.owner_column);
        EXECUTE format(
            'CREATE TRIGGER guard_truncate BEFORE TRUNCATE ON %s
                 FOR EACH STATEMENT EXECUTE FUNCTION therev.refuse_truncate()', guarded.table_name);
    END LOOP;
END
$$;

-- Nor is the machinery ever emptied.
CREATE TRIGGER guard_truncate BEFORE TRUNCATE ON therev.ownership
    FOR EACH STATEMENT EXECUTE FUNCTION therev.refuse_truncate();
CREATE TRIGGER guard_truncate BEFORE TRUNCATE ON therev.fence
    FOR EACH STATEMENT EXECUTE FUNCTION therev.refuse_truncate();
CREATE TRIGGER guard_truncate BEFORE TRUNCATE ON therev.outbox
    FOR EACH STATEMENT EXECUTE FUNCTION therev.refuse_truncate();

CREATE TRIGGER count_post AFTER INSERT OR UPDATE OR DELETE ON posts
    FOR EACH ROW WHEN (current_user <> 'therev') EXECUTE FUNCTION therev.count_post();
