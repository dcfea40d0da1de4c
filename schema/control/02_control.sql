-- The catalog: where everything is. The shards alone decide whether.

-- Written by shards/init.rs, shards/add_shard.rs and shards/remove_shard.rs. Hosts, no passwords: the roles are the same on
-- all servers.
CREATE TABLE therev.shards (
    shard     smallint PRIMARY KEY CHECK (shard >= 0),
    -- host:port, several separated by commas; the one that accepts writes is found by asking.
    hosts     text     NOT NULL CHECK (hosts <> ''),
    database  text     NOT NULL,
    pool_size smallint NOT NULL DEFAULT 16 CHECK (pool_size > 0),
    -- How much it should hold beside the others; 0: nothing, it is being drained.
    weight    real     NOT NULL DEFAULT 1 CHECK (weight BETWEEN 0 AND 1000)
);

-- Written by shards/init.rs.
CREATE TABLE therev.directories (
    directory smallint PRIMARY KEY CHECK (directory >= 0),
    is_writer boolean  NOT NULL,
    hosts     text     NOT NULL CHECK (hosts <> ''),
    database  text     NOT NULL
);
CREATE UNIQUE INDEX directories_one_writer ON therev.directories (is_writer) WHERE is_writer;

-- Which life of each shard and of the directory's writer counts. A server of another one is closed until it has been
-- granted a life here; of several that ask, the first one is, and the others are refused, unless by an
-- operator's word.
-- Written by shards/init.rs, shards/add_shard.rs, shards/remove_shard.rs and community/settle.rs, and through the functions
-- below.
CREATE TABLE therev.incarnations (
    database            text    PRIMARY KEY,
    incarnation         uuid    NOT NULL,
    incarnation_counter bigint  NOT NULL CHECK (incarnation_counter BETWEEN 1 AND 4194303),
    -- What other databases hold of it agrees with it again. A relay brings that about after a life has begun.
    is_settled          boolean NOT NULL DEFAULT true,
    -- Until then a relay is at it.
    settling_until      timestamptz
);

-- What a control database that lost its last commits learns from the others: a later life than it knows.
CREATE FUNCTION therev.learn_life(of_database text, learned uuid, counter bigint) RETURNS void
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    UPDATE therev.incarnations AS i
       SET incarnation = learned, incarnation_counter = counter, is_settled = false, settling_until = NULL
     WHERE i.database = of_database AND i.incarnation_counter < counter;
END;

-- Bucket to shard, by group. Only a higher epoch replaces a row. Written by shards/init.rs; relocations and repairs change it
-- by the function below alone.
CREATE TABLE therev.placement (
    colocation_group text     NOT NULL CHECK (colocation_group IN ('account', 'content')),
    bucket           smallint NOT NULL CHECK (bucket BETWEEN 0 AND 4095),
    shard            smallint NOT NULL REFERENCES therev.shards,
    epoch            bigint   NOT NULL DEFAULT 1 CHECK (epoch > 0),
    PRIMARY KEY (colocation_group, bucket)
);

-- Records what a switch has decided; it may come late, and twice. Says how many places were news.
CREATE FUNCTION therev.record_placement(in_groups text[], buckets smallint[], owner smallint, epochs bigint[]) RETURNS bigint
    LANGUAGE sql
BEGIN ATOMIC
    WITH recorded AS (
        UPDATE therev.placement AS p
           SET shard = owner, epoch = k.epoch
          FROM unnest(in_groups, buckets, epochs) AS k (colocation_group, bucket, epoch)
         WHERE p.colocation_group = k.colocation_group AND p.bucket = k.bucket AND p.epoch < k.epoch
        RETURNING 1)
    SELECT count(*) FROM recorded;
END;

-- Users placed apart from their buckets. The shards alone decide; nodes learn it here before they are told by one. Written by
-- this chapter's functions alone.
CREATE TABLE therev.pins (
    colocation_group text     NOT NULL CHECK (colocation_group IN ('account', 'content')),
    user_id          uuid     NOT NULL,
    bucket           smallint NOT NULL CHECK (bucket BETWEEN 0 AND 4095),
    shard            smallint NOT NULL REFERENCES therev.shards,
    epoch            bigint   NOT NULL CHECK (epoch > 0),
    PRIMARY KEY (colocation_group, user_id)
);

-- Records where a user is; who is with the bucket is not placed apart. It may come late, and twice: a higher epoch stays. Where one
-- is left that no shard knows of (this database was put back to an older state), a repair forgets it before it records anew.
CREATE FUNCTION therev.record_pin(in_groups text[], of_user uuid, of_bucket smallint, owner smallint, epochs bigint[])
    RETURNS void
    LANGUAGE sql
BEGIN ATOMIC
    INSERT INTO therev.pins AS p (colocation_group, user_id, bucket, shard, epoch)
    SELECT k.colocation_group, of_user, of_bucket, owner, k.epoch
      FROM unnest(in_groups, epochs) AS k (colocation_group, epoch)
    ON CONFLICT (colocation_group, user_id) DO UPDATE SET shard = excluded.shard, epoch = excluded.epoch
     WHERE p.epoch <= excluded.epoch;

    DELETE FROM therev.pins AS p USING therev.placement AS b
     WHERE p.user_id = of_user AND p.colocation_group = ANY (in_groups)
       AND b.colocation_group = p.colocation_group AND b.bucket = p.bucket AND b.shard = p.shard;
END;

-- Forgets where users were said to be that no shard says, unless something else has been recorded since. Says how many there
-- were.
CREATE FUNCTION therev.forget_pins(in_groups text[], users uuid[], owners smallint[], epochs bigint[]) RETURNS bigint
    LANGUAGE sql
BEGIN ATOMIC
    WITH forgotten AS (
        DELETE FROM therev.pins AS p
         USING unnest(in_groups, users, owners, epochs) AS k (colocation_group, user_id, owner, epoch)
         WHERE p.colocation_group = k.colocation_group AND p.user_id = k.user_id AND p.shard = k.owner AND p.epoch = k.epoch
        RETURNING 1)
    SELECT count(*) FROM forgotten;
END;

-- Relocations: what is moved from where to where, how far it is, and who is at it. Written by relocation/.
CREATE TABLE therev.relocations (
    relocation   bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- In the names of its slots, publications and subscriptions: no two relocations ever have the same, not even where this
    -- database has lost its last commits.
    tag          text        NOT NULL UNIQUE DEFAULT left(replace(gen_random_uuid()::text, '-', ''), 16),
    groups       text[]      NOT NULL CHECK (cardinality(groups) > 0 AND groups <@ ARRAY['account', 'content']),
    buckets      smallint[]  NOT NULL CHECK (cardinality(buckets) > 0),
    -- Of its one bucket this user alone.
    pin          uuid,
    -- Who of the buckets is placed apart and does not move along; see relocation_parts on the shards.
    apart        jsonb       NOT NULL DEFAULT '[]',
    -- A shard that was removed since is still named here.
    source       smallint    NOT NULL CHECK (source >= 0),
    target       smallint    NOT NULL CHECK (target >= 0),
    state        text        NOT NULL DEFAULT 'planned'
                 CHECK (state IN ('planned', 'copying', 'catching_up', 'verified', 'switching', 'switched', 'finishing',
                                  'done', 'aborted', 'reversed')),
    -- What the operator wants of it: to be done, to stop at switched, to be undone before the switch, to go back after it.
    goal         text        NOT NULL DEFAULT 'done' CHECK (goal IN ('done', 'switched', 'aborted', 'reversed')),
    is_paused    boolean     NOT NULL DEFAULT false,
    -- How long writers may be kept waiting by one try of the switch, whoever makes it.
    budget_ms    integer     NOT NULL DEFAULT 25 CHECK (budget_ms > 0),
    -- The lives of the two servers that it counts on. A promotion before the switch makes it begin anew.
    source_life  uuid,
    target_life  uuid,
    copy_round   integer     NOT NULL DEFAULT 0,
    rows_total   bigint      NOT NULL DEFAULT 0 CHECK (rows_total >= 0),
    rows_copied  bigint      NOT NULL DEFAULT 0 CHECK (rows_copied >= 0),
    bytes_copied bigint      NOT NULL DEFAULT 0 CHECK (bytes_copied >= 0),
    -- How far the stream's other end is behind.
    lag_bytes    bigint,
    -- What it waits for, or why it is slow.
    note         text        NOT NULL DEFAULT '',
    -- How the switch went: how often it was tried, and how long writes waited in the one that succeeded.
    attempts     integer     NOT NULL DEFAULT 0,
    pause_ms     double precision,
    -- Of the processes that could work at it, the one that does.
    worker       uuid,
    leased_until timestamptz,
    actor        text        NOT NULL DEFAULT '',
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now(),
    ended_at     timestamptz,
    CONSTRAINT relocations_pin_has_one_bucket CHECK (pin IS NULL OR cardinality(buckets) = 1),
    CONSTRAINT relocations_between_two CHECK (source <> target),
    CONSTRAINT relocations_ended_has_time
        CHECK ((state IN ('done', 'aborted', 'reversed')) = (ended_at IS NOT NULL))
);
-- Query: those under way (workers, and whoever plans another one).
CREATE INDEX relocations_under_way ON therev.relocations (relocation) WHERE ended_at IS NULL;

-- The load of each node that has any, as it told it last: operations in a window, and the users whom most of them were for. A
-- user in none of the lists is none of the busiest. Written by shards/load.rs.
CREATE TABLE therev.nodes (
    node            uuid             PRIMARY KEY,
    told_at         timestamptz      NOT NULL DEFAULT now(),
    window_s        double precision NOT NULL CHECK (window_s > 0),
    operations      bigint           NOT NULL CHECK (operations >= 0),
    users           uuid[]           NOT NULL,
    user_operations bigint[]         NOT NULL,
    CONSTRAINT nodes_a_number_for_each_user CHECK (cardinality(users) = cardinality(user_operations))
);

-- What operators did. Append-only by grant. Written by community/audit.rs and shards/init.rs.
CREATE TABLE therev.operator_log (
    created_at timestamptz NOT NULL DEFAULT now(),
    audit_id   uuid        NOT NULL DEFAULT gen_random_uuid(),
    actor      text        NOT NULL,
    action     text        NOT NULL,
    target     text        NOT NULL,
    before     jsonb       NOT NULL DEFAULT '{}',
    after      jsonb       NOT NULL DEFAULT '{}',
    PRIMARY KEY (created_at, audit_id)
);

-- Grants a life to the server that had one of the lives before: the last one that it began, or one that it was granted since
-- and promoted away before it began. Answers with the one that counts now. Its number is greater than those of all databases:
-- rows that moved may have versions of another shard's life.
CREATE FUNCTION therev.grant_life(of_database text, before uuid[], candidate uuid)
    RETURNS TABLE (incarnation uuid, incarnation_counter bigint)
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH granted AS (
        UPDATE therev.incarnations AS i
           SET incarnation = grant_life.candidate,
               incarnation_counter = (SELECT max(o.incarnation_counter) + 1 FROM therev.incarnations AS o),
               is_settled = false, settling_until = NULL
         WHERE i.database = of_database AND i.incarnation = ANY (grant_life.before)
        RETURNING i.incarnation, i.incarnation_counter)
    INSERT INTO therev.operator_log (actor, action, target, before, after)
    SELECT session_user, 'grant life', of_database, jsonb_build_object('incarnations', grant_life.before),
           jsonb_build_object('incarnation', g.incarnation, 'counter', g.incarnation_counter)
      FROM granted AS g;

    SELECT i.incarnation, i.incarnation_counter FROM therev.incarnations AS i WHERE i.database = of_database;
END;

-- The public face of the providers' breakers. Written by nobody yet.
CREATE TABLE ai_provider_health (
    provider             text        NOT NULL CHECK (therev.is_provider(provider)),
    -- Nil: the provider as a whole.
    account_id           uuid        NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',
    status               text        NOT NULL DEFAULT 'healthy'
                         CHECK (status IN ('healthy', 'degraded', 'down', 'maintenance')),
    error_rate_5m        real        NOT NULL DEFAULT 0 CHECK (error_rate_5m BETWEEN 0 AND 1),
    mean_response_ms     real CHECK (mean_response_ms >= 0),
    consecutive_failures integer     NOT NULL DEFAULT 0 CHECK (consecutive_failures >= 0),
    checked_at           timestamptz NOT NULL DEFAULT now(),
    created_at           timestamptz NOT NULL DEFAULT now(),
    updated_at           timestamptz NOT NULL DEFAULT now(),
    version              bigint      NOT NULL DEFAULT 1 CHECK (version > 0),
    PRIMARY KEY (provider, account_id)
);

REVOKE EXECUTE ON FUNCTION therev.grant_life(text, uuid[], uuid), therev.learn_life(text, uuid, bigint) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION therev.grant_life(text, uuid[], uuid), therev.learn_life(text, uuid, bigint) TO therev;
GRANT UPDATE (is_settled, settling_until) ON therev.incarnations TO therev;

GRANT SELECT ON ALL TABLES IN SCHEMA public, therev TO therev, therev_reader;
GRANT INSERT ON therev.operator_log TO therev;
GRANT INSERT, UPDATE ON ai_provider_health TO therev;
GRANT INSERT, UPDATE, DELETE ON therev.nodes TO therev;
-- The mover works as a role of its own, which on the shards may do much more.
GRANT SELECT ON ALL TABLES IN SCHEMA public, therev TO therev_mover;
GRANT INSERT, UPDATE ON therev.relocations TO therev_mover;
GRANT UPDATE ON therev.placement TO therev_mover;
GRANT INSERT ON therev.operator_log TO therev_mover;
