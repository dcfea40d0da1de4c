-- Writers that are not therev's own role (psql, scripts) are fenced too, by triggers; the WHEN clause keeps these off
-- the path of therev's own statements, which carry the fence in themselves.

-- Fills bucket and version, and refuses a row that this shard does not own.
--
-- The writer already holds a lock on the table, and under READ COMMITTED this check takes a snapshot of its own: a mark
-- set before the check is seen here, one set after it waits for the lock. An older snapshot would miss the mark.
CREATE FUNCTION therev.guard() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, therev, public, pg_temp AS
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
        PERFORM therev.admit_times(TG_RELID, to_jsonb(NEW));
        PERFORM therev.admit_json(TG_RELID, to_jsonb(NEW));
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

-- The least version of a row of this owner, or an error that says where the owner's rows are. Types are named whole: anybody may
-- call it, and with the types that a session's first call finds for its variables the guard calls it too.
CREATE FUNCTION therev.admit(guarded therev.colocation_group, row_bucket smallint, row_owner uuid, table_name text)
    RETURNS bigint
    LANGUAGE plpgsql STABLE AS
$$
DECLARE
    floor bigint;
    said pg_catalog.text;
BEGIN
    SELECT f.version_floor INTO floor
      FROM therev.fence AS f
     WHERE f.colocation_group = guarded AND therev.may_write(f, row_bucket, row_owner);
    IF NOT FOUND THEN
        SELECT coalesce(p.state || ' shard ' || p.peer, p.state::pg_catalog.text,
                        o.state || ' shard ' || o.peer, o.state::pg_catalog.text) INTO said
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

-- Refuses times that the library cannot read (`infinity` above all), and of what is listed by its time those that no list
-- reaches. The library itself writes no such times, so that no CHECK, which each of its statements would compile, has to look.
CREATE FUNCTION therev.admit_times(of_table oid, image jsonb) RETURNS void
    LANGUAGE plpgsql STABLE AS
$$
DECLARE
    wrong pg_catalog.text;
BEGIN
    SELECT format('%s = %s', t.name, t.told) INTO wrong
      FROM (SELECT a.attname AS name,
                   -- NULL of what is no time.
                   CASE WHEN a.atttypid = 'pg_catalog.timestamptz'::regtype THEN image ->> a.attname::text END AS told
              FROM pg_catalog.pg_attribute AS a
             WHERE a.attrelid = of_table AND a.attnum > 0) AS t
     WHERE t.told::timestamptz NOT BETWEEN '1700-01-01 00:00:00+00'
               AND CASE WHEN t.name IN ('created_at', 'last_post_at') THEN '9900-01-01 00:00:00+00'::timestamptz
                        ELSE '10000-01-01 00:00:00+00'::timestamptz END
     LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'no time of a row of %: %', of_table::regclass, wrong
            USING ERRCODE = 'check_violation', HINT = 'Times are between the years 1700 and 9900.';
    END IF;
END
$$;

-- The same of JSON: numbers beyond what the library counts with, and what nests deeper than it reads.
CREATE FUNCTION therev.admit_json(of_table oid, image jsonb) RETURNS void
    LANGUAGE plpgsql STABLE AS
$$
DECLARE
    wrong pg_catalog.text;
BEGIN
    SELECT j.name INTO wrong
      FROM (SELECT a.attname AS name,
                   -- NULL of what is no JSON.
                   CASE WHEN a.atttypid = 'pg_catalog.jsonb'::regtype THEN image -> a.attname::text END AS told
              FROM pg_catalog.pg_attribute AS a
             WHERE a.attrelid = of_table AND a.attnum > 0) AS j
     WHERE jsonb_path_exists(j.told, '$.**{127 to last}')
        OR jsonb_path_exists(
               j.told, '$.** ? (@.type() == "number" && (@ > 1.7976931348623157e308 || @ < -1.7976931348623157e308))')
     LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'no JSON of a row of % that can be read: %', of_table::regclass, wrong
            USING ERRCODE = 'check_violation', HINT = 'Numbers are below 1.8e308, and it nests 127 deep at the most.';
    END IF;
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
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, therev, public, pg_temp AS
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
CREATE TRIGGER guard_truncate BEFORE TRUNCATE ON therev.pins
    FOR EACH STATEMENT EXECUTE FUNCTION therev.refuse_truncate();
CREATE TRIGGER guard_truncate BEFORE TRUNCATE ON therev.fence
    FOR EACH STATEMENT EXECUTE FUNCTION therev.refuse_truncate();
CREATE TRIGGER guard_truncate BEFORE TRUNCATE ON therev.fence_account
    FOR EACH STATEMENT EXECUTE FUNCTION therev.refuse_truncate();
CREATE TRIGGER guard_truncate BEFORE TRUNCATE ON therev.fence_content
    FOR EACH STATEMENT EXECUTE FUNCTION therev.refuse_truncate();
CREATE TRIGGER guard_truncate BEFORE TRUNCATE ON therev.outbox
    FOR EACH STATEMENT EXECUTE FUNCTION therev.refuse_truncate();

CREATE TRIGGER count_post AFTER INSERT OR UPDATE OR DELETE ON posts
    FOR EACH ROW WHEN (current_user <> 'therev') EXECUTE FUNCTION therev.count_post();

-- Nobody puts them on a table of their own: that takes this right, and to fire them where they are takes none.
REVOKE EXECUTE ON FUNCTION therev.guard(), therev.count_post() FROM PUBLIC;
