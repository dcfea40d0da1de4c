-- What this shard may do with each bucket: the authority. Changed by init and by relocation, by nobody else.

CREATE TYPE therev.colocation_group AS ENUM ('account', 'content');

-- owned: reads and writes. draining: reads; writes wait for a switch to be decided.
-- moved: neither, the peer owns it. incoming: neither, a copy from the peer is under way.
CREATE TYPE therev.ownership_state AS ENUM ('owned', 'draining', 'moved', 'incoming');

-- The tables whose rows belong to an owner: what a relocation moves, and what the guards guard. Each one's key begins with
-- the bucket and the owner, and chapter 6 sees to it that the bucket is the owner's. Written by this chapter alone.
CREATE TABLE therev.owned_tables (
    table_name       text                    PRIMARY KEY,
    colocation_group therev.colocation_group NOT NULL,
    owner_column     text                    NOT NULL
);
INSERT INTO therev.owned_tables (table_name, colocation_group, owner_column) VALUES
    ('public.users', 'account', 'user_id'),
    ('public.user_sessions', 'account', 'user_id'),
    ('public.user_ai_accounts', 'account', 'user_id'),
    ('public.ai_tasks', 'account', 'user_id'),
    ('public.ai_task_logs', 'account', 'user_id'),
    ('public.audit_log', 'account', 'user_id'),
    ('therev.claims', 'account', 'claim_key'),
    ('therev.id_routes', 'account', 'id'),
    ('public.threads', 'content', 'author_id'),
    ('public.posts', 'content', 'author_id'),
    ('therev.thread_contributions', 'content', 'author_id'),
    ('therev.thread_participants', 'content', 'author_id'),
    ('therev.thread_totals', 'content', 'author_id');

-- A row for every bucket of every group on every shard, so that each of them can point the way.
-- Written by shards/fresh.rs; a relocation changes it by the functions of chapter 8 alone.
CREATE TABLE therev.ownership (
    colocation_group therev.colocation_group NOT NULL,
    bucket           smallint                NOT NULL CHECK (bucket BETWEEN 0 AND 4095),
    state            therev.ownership_state  NOT NULL,
    peer             smallint CHECK (peer >= 0),
    epoch            bigint                  NOT NULL DEFAULT 1 CHECK (epoch > 0),
    PRIMARY KEY (colocation_group, bucket),
    CONSTRAINT ownership_peer_of_the_other_states CHECK ((state IN ('moved', 'incoming')) = (peer IS NOT NULL))
    -- Room beside each row for its next versions, so that a switch, for which writers wait, changes no index.
) WITH (fillfactor = 50);

-- Users placed apart from their bucket: what their row here says counts, and not what their bucket's does. The shard that owns
-- the bucket has a row for each who is away; the shard where a user is has one that says so. While a user changes places, both.
-- Written by the functions of chapter 8 alone.
CREATE TABLE therev.pins (
    colocation_group therev.colocation_group NOT NULL,
    user_id          uuid                    NOT NULL,
    bucket           smallint                NOT NULL CHECK (bucket BETWEEN 0 AND 4095),
    state            therev.ownership_state  NOT NULL,
    peer             smallint CHECK (peer >= 0),
    epoch            bigint                  NOT NULL CHECK (epoch > 0),
    PRIMARY KEY (colocation_group, user_id),
    CONSTRAINT pins_peer_of_the_other_states CHECK ((state IN ('moved', 'incoming')) = (peer IS NOT NULL))
);
-- Query: who of a bucket is placed apart.
CREATE INDEX pins_of_bucket ON therev.pins (colocation_group, bucket);

-- Of the buckets that a shard reads those which it reads with everybody of them: none of whom has another place.
CREATE FUNCTION therev.whole_of(readable bit(4096), pinned uuid[], readers uuid[]) RETURNS bit(4096)
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS
$$
DECLARE
    one uuid;
BEGIN
    FOREACH one IN ARRAY pinned LOOP
        IF one <> ALL (readers) THEN
            readable := set_bit(readable, therev.bucket_of(one), 0);
        END IF;
    END LOOP;
    RETURN readable;
END
$$;

-- Ownership and pins as bitmaps and lists, one row a group: what every statement on owned rows tests, in its own snapshot.
-- Written by shards/fresh.rs, then kept by the triggers below in the transaction that changes the ownership.
CREATE TABLE therev.fence (
    colocation_group therev.colocation_group PRIMARY KEY,
    -- The buckets whose users are all read here: what most reads test, and nothing else.
    whole            bit(4096) NOT NULL GENERATED ALWAYS AS (
                         CASE WHEN pinned <@ readers THEN readable
                              ELSE therev.whole_of(readable, pinned, readers) END) STORED,
    readable         bit(4096) NOT NULL DEFAULT 0::bit(4096),
    writable         bit(4096) NOT NULL DEFAULT 0::bit(4096),
    -- The users who have a row in pins; of these, whose rows are read and written here.
    pinned           uuid[]    NOT NULL DEFAULT '{}',
    readers          uuid[]    NOT NULL DEFAULT '{}',
    writers          uuid[]    NOT NULL DEFAULT '{}',
    -- The least version that a row written in this life of the server may have: versions never go back. It is as great as that
    -- of each shard that rows came from.
    version_floor    bigint    NOT NULL
) PARTITION BY LIST (colocation_group);
-- One row each, which statements go to: by way of the table above the shortest of them would cost 7 % more.
-- A page that may be filled so little is cleared of earlier versions by whoever reads it next, and pages are few since they are soon
-- used again. Written by nobody under this name.
CREATE TABLE therev.fence_account PARTITION OF therev.fence FOR VALUES IN ('account')
    WITH (fillfactor = 10, autovacuum_vacuum_threshold = 10, autovacuum_vacuum_scale_factor = 0);
-- The same. Written by nobody under this name.
CREATE TABLE therev.fence_content PARTITION OF therev.fence FOR VALUES IN ('content')
    WITH (fillfactor = 10, autovacuum_vacuum_threshold = 10, autovacuum_vacuum_scale_factor = 0);
-- However long the lists are: nobody unpacks a bitmap to test it.
ALTER TABLE therev.fence
    ALTER COLUMN whole SET STORAGE PLAIN, ALTER COLUMN readable SET STORAGE PLAIN, ALTER COLUMN writable SET STORAGE PLAIN;

-- Whether this shard reads (writes) an owner's rows: the owner's own place counts before the bucket's. «Not 0» rather than «1»:
-- the planner takes most rows to pass then, as they do, and a page of many ends with its last row. By either table's row.
DO $$
DECLARE
    fence text;
BEGIN
    FOREACH fence IN ARRAY ARRAY['fence', 'fence_account', 'fence_content'] LOOP
        EXECUTE format(
            'CREATE FUNCTION therev.may_read(f therev.%I, of_bucket smallint, of_owner uuid) RETURNS boolean
                 LANGUAGE sql IMMUTABLE
                 RETURN (get_bit(f.readable, of_bucket) <> 0 AND of_owner <> ALL (f.pinned)) OR of_owner = ANY (f.readers)', fence);
        EXECUTE format(
            'CREATE FUNCTION therev.may_write(f therev.%I, of_bucket smallint, of_owner uuid) RETURNS boolean
                 LANGUAGE sql IMMUTABLE
                 RETURN (get_bit(f.writable, of_bucket) <> 0 AND of_owner <> ALL (f.pinned)) OR of_owner = ANY (f.writers)', fence);
    END LOOP;
END
$$;

CREATE FUNCTION therev.epochs_only_grow() RETURNS trigger
    LANGUAGE plpgsql AS
$$
BEGIN
    RAISE EXCEPTION 'epoch of % bucket % may not fall from % to %',
        OLD.colocation_group, OLD.bucket, OLD.epoch, NEW.epoch
        USING ERRCODE = 'check_violation';
END
$$;

CREATE TRIGGER ownership_epochs_only_grow
    BEFORE UPDATE ON therev.ownership
    FOR EACH ROW WHEN (NEW.epoch < OLD.epoch)
    EXECUTE FUNCTION therev.epochs_only_grow();

CREATE FUNCTION therev.rebuild_fence() RETURNS trigger
    LANGUAGE plpgsql AS
$$
BEGIN
    -- The lock first, the bitmaps in the next statement: it sees what the transaction before this one committed.
    PERFORM FROM therev.fence ORDER BY colocation_group FOR UPDATE;

    UPDATE therev.fence AS f
       SET readable = o.readable, writable = o.writable
      FROM (SELECT colocation_group,
                   string_agg(CASE WHEN state IN ('owned', 'draining') THEN '1' ELSE '0' END, '' ORDER BY bucket)
                       ::bit(4096) AS readable,
                   string_agg(CASE WHEN state = 'owned' THEN '1' ELSE '0' END, '' ORDER BY bucket)
                       ::bit(4096) AS writable
              FROM therev.ownership
             GROUP BY colocation_group) AS o
     WHERE f.colocation_group = o.colocation_group
       AND (f.readable, f.writable) IS DISTINCT FROM (o.readable, o.writable);
    RETURN NULL;
END
$$;

-- The same for the buckets that changed alone: writers wait for this one.
CREATE FUNCTION therev.mend_fence() RETURNS trigger
    LANGUAGE plpgsql AS
$$
BEGIN
    UPDATE therev.fence AS f
       SET readable = (f.readable & ~c.touched) | c.readable, writable = (f.writable & ~c.touched) | c.writable
      FROM (SELECT b.colocation_group, bit_or(b.mask) AS touched,
                   bit_or(CASE WHEN b.state IN ('owned', 'draining') THEN b.mask ELSE 0::bit(4096) END) AS readable,
                   bit_or(CASE WHEN b.state = 'owned' THEN b.mask ELSE 0::bit(4096) END) AS writable
              FROM (SELECT colocation_group, state, set_bit(0::bit(4096), bucket, 1) AS mask FROM changed) AS b
             GROUP BY b.colocation_group) AS c
     WHERE f.colocation_group = c.colocation_group;
    RETURN NULL;
END
$$;

CREATE TRIGGER ownership_rebuilds_the_fence
    AFTER INSERT OR DELETE ON therev.ownership
    FOR EACH STATEMENT EXECUTE FUNCTION therev.rebuild_fence();
CREATE TRIGGER ownership_mends_the_fence
    AFTER UPDATE ON therev.ownership
    REFERENCING NEW TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION therev.mend_fence();

CREATE FUNCTION therev.list_pins() RETURNS trigger
    LANGUAGE plpgsql AS
$$
BEGIN
    -- As above: the lock first.
    PERFORM FROM therev.fence ORDER BY colocation_group FOR UPDATE;

    UPDATE therev.fence AS f
       SET pinned = p.pinned, readers = p.readers, writers = p.writers
      FROM (SELECT g.colocation_group, array_remove(array_agg(p.user_id), NULL) AS pinned,
                   coalesce(array_agg(p.user_id) FILTER (WHERE p.state IN ('owned', 'draining')), '{}') AS readers,
                   coalesce(array_agg(p.user_id) FILTER (WHERE p.state = 'owned'), '{}') AS writers
              FROM therev.fence AS g LEFT JOIN therev.pins AS p USING (colocation_group)
             GROUP BY g.colocation_group) AS p
     WHERE f.colocation_group = p.colocation_group
       AND (f.pinned, f.readers, f.writers) IS DISTINCT FROM (p.pinned, p.readers, p.writers);
    RETURN NULL;
END
$$;

CREATE TRIGGER pins_are_listed
    AFTER INSERT OR UPDATE OR DELETE ON therev.pins
    FOR EACH STATEMENT EXECUTE FUNCTION therev.list_pins();

-- Also where rows are written without firing triggers, as a relocation writes them.
ALTER TABLE therev.ownership ENABLE ALWAYS TRIGGER ownership_epochs_only_grow;
ALTER TABLE therev.ownership ENABLE ALWAYS TRIGGER ownership_rebuilds_the_fence;
ALTER TABLE therev.ownership ENABLE ALWAYS TRIGGER ownership_mends_the_fence;
ALTER TABLE therev.pins ENABLE ALWAYS TRIGGER pins_are_listed;

-- A shard begins a life: with versions above all that it wrote before, and with what the control database and the other
-- shards know of its buckets and it has lost: who owns them, by group, bucket and epoch. The higher epoch wins.
CREATE FUNCTION therev.begin_shard_life(
    granted uuid, counter bigint, groups text[], buckets smallint[], owners smallint[], epochs bigint[]) RETURNS void
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    UPDATE therev.ownership AS o
       SET state = CASE WHEN k.owner = i.shard THEN 'owned' ELSE 'moved' END::therev.ownership_state,
           peer = nullif(k.owner, i.shard), epoch = k.epoch
      FROM unnest(groups, buckets, owners, epochs) AS k (colocation_group, bucket, owner, epoch), therev.identity AS i
     WHERE o.colocation_group = k.colocation_group::therev.colocation_group AND o.bucket = k.bucket
       AND o.epoch < k.epoch AND therev.candidate(i) = granted;

    UPDATE therev.fence AS f
       SET version_floor = greatest(counter, (f.version_floor >> 40) + 1) << 40
      FROM therev.identity AS i
     WHERE therev.candidate(i) = granted;

    -- Events of its own number each: who delivered one that a promotion lost may mark it only now.
    SELECT setval(pg_get_serial_sequence('therev.outbox', 'outbox_id')::regclass, counter << 40)
      FROM therev.identity AS i
     WHERE therev.candidate(i) = granted;

    SELECT therev.begin_life(granted, counter);
END;

REVOKE EXECUTE ON FUNCTION therev.begin_shard_life(uuid, bigint, text[], smallint[], smallint[], bigint[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION therev.begin_shard_life(uuid, bigint, text[], smallint[], smallint[], bigint[]) TO therev;
