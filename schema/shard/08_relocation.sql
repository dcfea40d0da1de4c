-- This shard's part in relocations. A relocation moves the rows of some buckets between two shards, and each of the two
-- keeps what it may do with them: every step of a switch is a compare-and-set on the part, and changes the ownership of
-- the buckets in the same transaction. Zero rows means: obey what the part says.
--
-- The side that gives away: owned → draining → moved.  The side that takes: incoming → ready → owned.
-- Going back is the same with the sides swapped.
--
-- What a switch goes through is written in PL/pgSQL and never plans for the values at hand: what a session has gone through once
-- is planned. A function in SQL plans at every call, and so does one in PL/pgSQL for the first five.

-- Written by relocation/, mostly through the functions below.
CREATE TABLE therev.relocation_parts (
    -- The number that the control database gave.
    relocation  bigint                    PRIMARY KEY,
    -- What its slots, publications and subscriptions are named after, so that what a lost relocation left is found.
    tag         text                      NOT NULL,
    -- Which side this shard is on, as planned.
    side        text                      NOT NULL CHECK (side IN ('source', 'target')),
    peer        smallint                  NOT NULL CHECK (peer >= 0),
    groups      therev.colocation_group[] NOT NULL,
    buckets     smallint[]                NOT NULL,
    -- Of a bucket's users this one alone; NULL: all, but for those who are placed apart.
    pin         uuid,
    -- Who of the buckets is placed apart, as the source's pins had it when it began: colocation_group, user_id, epoch and the
    -- shard that has them. They do not move along, and the taking side learns of them.
    apart       jsonb                     NOT NULL DEFAULT '[]',
    state       text                      NOT NULL CHECK (state IN ('owned', 'draining', 'moved', 'incoming', 'ready')),
    -- Which try of the switch: grows with each, and a step of an earlier one finds nothing.
    attempt     integer                   NOT NULL DEFAULT 0 CHECK (attempt >= 0),
    -- Which copy, or which undoing of one, if it had to begin anew: what is left of an earlier one finds nothing either.
    copy_round  integer                   NOT NULL DEFAULT 0 CHECK (copy_round >= 0),
    -- In which life of this server the part began. A promoted server may lack the rows that the other side counts on.
    incarnation uuid                      NOT NULL,
    drained_at  timestamptz,
    -- Where this shard's own writes to the buckets begin, in its log.
    since       pg_lsn,
    -- Whether the stream that comes back here was started: once, for a second start would bring twice what had come.
    is_fed_back boolean                   NOT NULL DEFAULT false,
    CONSTRAINT relocation_parts_pin_has_one_bucket CHECK (pin IS NULL OR cardinality(buckets) = 1),
    CONSTRAINT relocation_parts_draining_has_begun CHECK ((state = 'draining') = (drained_at IS NOT NULL))
);

-- One row for each direction, replicated with the rows: who sees there what was written here knows that everything before it
-- has been applied. Written by relocation/.
CREATE TABLE therev.sentinels (
    relocation    bigint  NOT NULL,
    -- Which side writes it.
    side          text    NOT NULL CHECK (side IN ('source', 'target')),
    -- The try of the switch that it was sent for.
    attempt       integer NOT NULL DEFAULT 0,
    -- Grows with every sending.
    beat          bigint  NOT NULL DEFAULT 0,
    -- The least version that a row written there may have: the side that takes the rows writes no smaller ones either.
    version_floor bigint  NOT NULL DEFAULT 0,
    PRIMARY KEY (relocation, side)
);

CREATE TRIGGER guard_truncate BEFORE TRUNCATE ON therev.relocation_parts
    FOR EACH STATEMENT EXECUTE FUNCTION therev.refuse_truncate();
CREATE TRIGGER guard_truncate BEFORE TRUNCATE ON therev.sentinels
    FOR EACH STATEMENT EXECUTE FUNCTION therev.refuse_truncate();

-- Changes the ownership of a part's buckets, or of its user, all of it or (with an error) none.
CREATE FUNCTION therev.set_ownership(
    part therev.relocation_parts, before therev.ownership_state[], after therev.ownership_state, step integer) RETURNS void
    LANGUAGE plpgsql AS
$$
DECLARE
    expected constant integer := cardinality(part.groups) * cardinality(part.buckets);
    found integer := 0;
    changed integer;
    in_group therev.colocation_group;
BEGIN
    IF part.pin IS NOT NULL THEN
        UPDATE therev.pins AS p
           SET state = after, peer = CASE WHEN after IN ('moved', 'incoming') THEN part.peer END, epoch = p.epoch + step
         WHERE p.colocation_group = ANY (part.groups) AND p.user_id = part.pin AND p.state = ANY (before);
        GET DIAGNOSTICS found = ROW_COUNT;
    END IF;
    -- Group by group, so that each bucket is found by the key, whatever the statistics say: writers wait for this.
    FOREACH in_group IN ARRAY part.groups LOOP
        EXIT WHEN part.pin IS NOT NULL;
        UPDATE therev.ownership AS o
           SET state = after, peer = CASE WHEN after IN ('moved', 'incoming') THEN part.peer END, epoch = o.epoch + step
         WHERE o.colocation_group = in_group AND o.bucket = ANY (part.buckets) AND o.state = ANY (before);
        GET DIAGNOSTICS changed = ROW_COUNT;
        found := found + changed;
    END LOOP;
    IF found <> expected THEN
        RAISE EXCEPTION 'relocation % finds % of its % buckets as they should be (%)',
            part.relocation, found, expected, before
            USING ERRCODE = 'TR004';
    END IF;
END
$$;

-- The buckets that some part has already, of these.
CREATE FUNCTION therev.buckets_under_way(of_relocation bigint, in_groups text[], of_buckets smallint[]) RETURNS smallint[]
    LANGUAGE sql STABLE
    RETURN (SELECT array_agg(DISTINCT b.bucket)
              FROM therev.relocation_parts AS p, unnest(p.buckets) AS b (bucket)
             WHERE p.relocation <> of_relocation AND p.groups::text[] && in_groups AND b.bucket = ANY (of_buckets));

-- Who of these buckets is placed apart, by the word of the shard that owns them: where they are, here or away.
CREATE FUNCTION therev.apart_of(in_groups text[], of_buckets smallint[]) RETURNS jsonb
    LANGUAGE sql STABLE
    RETURN (SELECT coalesce(jsonb_agg(jsonb_build_object(
                       'colocation_group', p.colocation_group, 'user_id', p.user_id, 'epoch', p.epoch,
                       'shard', coalesce(p.peer, i.shard))), '[]')
              FROM therev.pins AS p, therev.identity AS i
             WHERE p.colocation_group::text = ANY (in_groups) AND p.bucket = ANY (of_buckets));

-- Begins the part of one user's relocation: the row that says the same of the user as the bucket did, or at the taking side
-- that the user is coming.
CREATE FUNCTION therev.begin_pin(part therev.relocation_parts, epochs bigint[]) RETURNS void
    LANGUAGE sql
BEGIN ATOMIC
    INSERT INTO therev.pins AS p (colocation_group, user_id, bucket, state, peer, epoch)
    SELECT o.colocation_group, (part).pin, o.bucket,
           CASE (part).side WHEN 'source' THEN 'owned' ELSE 'incoming' END::therev.ownership_state,
           CASE (part).side WHEN 'target' THEN (part).peer END,
           -- Numbers of relocations only grow, and one raises an epoch twice at the most: whoever slept and tells of an earlier time
           -- that the user was apart has an older epoch.
           CASE (part).side WHEN 'source' THEN o.epoch + 2 * (part).relocation
                            ELSE epochs[array_position((part).groups, o.colocation_group)] END
      FROM therev.ownership AS o
     WHERE o.colocation_group = ANY ((part).groups) AND o.bucket = ANY ((part).buckets)
       AND ((part).side = 'target' OR o.state = 'owned')
    ON CONFLICT (colocation_group, user_id) DO UPDATE
       SET state = excluded.state, peer = excluded.peer, epoch = excluded.epoch
     WHERE p.state = 'moved' AND excluded.state = 'incoming';
END;

-- Begins this shard's part; once it has begun, nothing. The giving side must own the buckets (the user), the taking side must
-- not; and no bucket is in two relocations. `epochs` are the giving side's, by group, then bucket; of the giving side itself
-- none. Answers with who is placed apart: the giving side says so, and the taking side learns it.
CREATE FUNCTION therev.begin_part(
    of_relocation bigint, of_tag text, on_side text, other smallint, in_groups text[], of_buckets smallint[],
    epochs bigint[], of_pin uuid, those_apart jsonb) RETURNS jsonb
    LANGUAGE plpgsql AS
$$
DECLARE
    part therev.relocation_parts;
    taken smallint[];
BEGIN
    LOCK TABLE therev.relocation_parts IN SHARE ROW EXCLUSIVE MODE;
    SELECT * INTO part FROM therev.relocation_parts AS p WHERE p.relocation = of_relocation AND p.tag = of_tag;
    IF FOUND THEN
        RETURN part.apart;
    END IF;
    taken := therev.buckets_under_way(of_relocation, in_groups, of_buckets);
    IF taken IS NOT NULL THEN
        RAISE EXCEPTION 'in another relocation: % of the buckets, % is one', cardinality(taken), taken[1]
            USING ERRCODE = 'TR005';
    END IF;
    INSERT INTO therev.relocation_parts (relocation, tag, side, peer, groups, buckets, pin, apart, state, incarnation)
    SELECT of_relocation, of_tag, on_side, other, in_groups::therev.colocation_group[], of_buckets, of_pin,
           CASE WHEN of_pin IS NOT NULL THEN '[]'
                WHEN on_side = 'source' THEN therev.apart_of(in_groups, of_buckets) ELSE those_apart END,
           CASE on_side WHEN 'source' THEN 'owned' ELSE 'incoming' END, i.incarnation
      FROM therev.identity AS i
    RETURNING * INTO part;
    IF of_pin IS NOT NULL THEN
        PERFORM therev.begin_pin(part, epochs);
    ELSIF on_side = 'target' THEN
        -- Who is here already stays here.
        INSERT INTO therev.pins AS p (colocation_group, user_id, bucket, state, peer, epoch)
        SELECT a.colocation_group, a.user_id, therev.bucket_of(a.user_id), 'moved', a.shard, a.epoch
          FROM jsonb_to_recordset(those_apart)
                   AS a (colocation_group therev.colocation_group, user_id uuid, epoch bigint, shard smallint),
               therev.identity AS i
         WHERE a.shard <> i.shard
        ON CONFLICT (colocation_group, user_id) DO UPDATE
           SET peer = excluded.peer, epoch = excluded.epoch
         WHERE p.state = 'moved';
        -- It may still point to an owner of before.
        UPDATE therev.ownership AS o
           SET epoch = k.epoch
          FROM (SELECT g.name, b.bucket, epochs[(g.at - 1) * cardinality(of_buckets) + b.at] AS epoch
                  FROM unnest(in_groups) WITH ORDINALITY AS g (name, at),
                       unnest(of_buckets) WITH ORDINALITY AS b (bucket, at)) AS k
         WHERE o.colocation_group::text = k.name AND o.bucket = k.bucket AND o.state = 'moved' AND o.epoch < k.epoch;
    END IF;
    PERFORM therev.set_ownership(
        part, CASE WHEN on_side = 'source' THEN '{owned}' WHEN of_pin IS NULL THEN '{moved}' ELSE '{incoming}' END
                  ::therev.ownership_state[],
        CASE on_side WHEN 'source' THEN 'owned' ELSE 'incoming' END::therev.ownership_state, 0);
    RETURN part.apart;
END
$$;

-- Ends this shard's part, if it is in one of these states: what it takes no part in any more nobody carries on. Buckets that were
-- to come are not coming.
CREATE FUNCTION therev.end_part(of_relocation bigint, in_states text[]) RETURNS boolean
    LANGUAGE plpgsql AS
$$
DECLARE
    part therev.relocation_parts;
BEGIN
    DELETE FROM therev.relocation_parts AS p
     WHERE p.relocation = of_relocation AND p.state = ANY (in_states)
    RETURNING * INTO part;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF part.pin IS NOT NULL THEN
        UPDATE therev.pins AS p
           SET state = 'moved'
         WHERE p.colocation_group = ANY (part.groups) AND p.user_id = part.pin AND p.state = 'incoming';
    ELSIF part.state IN ('incoming', 'ready') THEN
        UPDATE therev.ownership AS o
           SET state = 'moved'
         WHERE o.colocation_group = ANY (part.groups) AND o.bucket = ANY (part.buckets) AND o.state = 'incoming';
    END IF;
    -- What says no more than the bucket does is not needed: who is with the bucket is not placed apart, and who is away is the
    -- affair of the shard that owns the bucket.
    DELETE FROM therev.pins AS p USING therev.ownership AS o
     WHERE p.colocation_group = ANY (part.groups) AND p.bucket = ANY (part.buckets)
       AND o.colocation_group = p.colocation_group AND o.bucket = p.bucket
       AND ((p.state = 'moved' AND o.state NOT IN ('owned', 'draining'))
            OR (p.user_id = part.pin AND p.state = 'owned' AND o.state = 'owned'));
    DELETE FROM therev.sentinels AS s WHERE s.relocation = of_relocation;
    RETURN true;
END
$$;

-- The side that gave the buckets away is to get them back: from now on it is the taking one.
CREATE FUNCTION therev.await_return(of_relocation bigint) RETURNS boolean
    LANGUAGE plpgsql AS
$$
DECLARE
    part therev.relocation_parts;
BEGIN
    UPDATE therev.relocation_parts AS p
       SET state = 'incoming'
     WHERE p.relocation = of_relocation AND p.state = 'moved'
    RETURNING * INTO part;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM therev.set_ownership(part, '{moved}', 'incoming', 0);
    RETURN true;
END
$$;

-- The side that gave the buckets away does not get them back: nobody wants it any more, or a promotion has closed the way. `try`
-- is what was seen of its part before the other side was seen to own them, with no smaller attempt: a try of before is over,
-- and a later one gets no ready here. NULL: the other side was seen to own them after a promotion, which ended every try.
CREATE FUNCTION therev.call_off_return(of_relocation bigint, try integer) RETURNS boolean
    LANGUAGE plpgsql AS
$$
DECLARE
    part therev.relocation_parts;
BEGIN
    UPDATE therev.relocation_parts AS p
       SET state = 'moved'
     WHERE p.relocation = of_relocation AND p.side = 'source' AND p.state IN ('incoming', 'ready')
       AND (try IS NULL OR p.attempt = try)
    RETURNING * INTO part;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM therev.set_ownership(part, '{incoming}', 'moved', 0);
    RETURN true;
END
$$;

-- Whether this server lives the life that the part began in.
CREATE FUNCTION therev.is_same_life(part therev.relocation_parts) RETURNS boolean
    LANGUAGE plpgsql STABLE SET plan_cache_mode = force_generic_plan AS
$$
BEGIN
    RETURN (SELECT i.incarnation = part.incarnation AND i.timeline = therev.current_timeline()
              FROM therev.identity AS i);
END
$$;

-- Steps whose commits wait for nothing: a crash or a promotion that takes one back takes back with it everything that came after
-- it there, and acknowledged is only what was flushed. The steps that others build upon wait for disk and standbys.

-- a. The giving side: writes wait from now on. The sentinel, sent by the same session, takes it to the disk. Only with the part that was
-- seen (`seen` is its attempt then): one that somebody who slept has begun anew counts its tries anew, and gives nothing away.
CREATE FUNCTION therev.drain(of_relocation bigint, seen integer, try integer) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, therev, pg_temp
        SET plan_cache_mode = force_generic_plan AS
$$
DECLARE
    part therev.relocation_parts;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    UPDATE therev.relocation_parts AS p
       SET state = 'draining', attempt = try, drained_at = clock_timestamp()
     WHERE p.relocation = of_relocation AND p.state = 'owned' AND p.attempt BETWEEN seen AND try - 1
       AND therev.is_same_life(p)
    RETURNING * INTO part;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM therev.set_ownership(part, '{owned}', 'draining', 0);
    RETURN true;
END
$$;

-- The giving side: this try is given up, writes go on.
CREATE FUNCTION therev.back_out(of_relocation bigint, try integer) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, therev, pg_temp
        SET plan_cache_mode = force_generic_plan AS
$$
DECLARE
    part therev.relocation_parts;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    UPDATE therev.relocation_parts AS p
       SET state = 'owned', drained_at = NULL
     WHERE p.relocation = of_relocation AND p.state = 'draining' AND p.attempt = try
    RETURNING * INTO part;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM therev.set_ownership(part, '{draining}', 'owned', 0);
    RETURN true;
END
$$;

-- b. The giving side: the sentinel of a try goes out once nobody writes any more who may not know of the draining: of the
-- transactions that were seen at first, or (NULL) are seen now. Answers with those that are left; with NULL when the try is over.
CREATE FUNCTION therev.send_sentinel(of_relocation bigint, try integer, seen text[]) RETURNS text[]
    LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS
$$
DECLARE
    part therev.relocation_parts;
    still text[];
BEGIN
    SELECT * INTO part
      FROM therev.relocation_parts AS p
     WHERE p.relocation = of_relocation AND p.state = 'draining' AND p.attempt = try;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    SELECT coalesce(array_agg(w.writer), '{}') INTO still
      FROM unnest(therev.writers(part.groups::text[])) AS w (writer)
     WHERE seen IS NULL OR w.writer = ANY (seen);
    IF still = '{}' THEN
        UPDATE therev.sentinels AS s
           SET attempt = try, beat = s.beat + 1, version_floor = (SELECT max(f.version_floor) FROM therev.fence AS f)
         WHERE s.relocation = of_relocation AND s.side = part.side;
    END IF;
    RETURN still;
END
$$;

-- c. The taking side: everything that was written before the sentinel of this try is here. Commits synchronously, whatever the
-- session says: what the stream has applied is durable only with it.
CREATE FUNCTION therev.get_ready(of_relocation bigint, try integer) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
        SET plan_cache_mode = force_generic_plan AS
$$
BEGIN
    PERFORM set_config('synchronous_commit', 'on', true);
    UPDATE therev.relocation_parts AS p
       SET state = 'ready', attempt = try
      FROM therev.sentinels AS s
     WHERE p.relocation = of_relocation AND p.state IN ('incoming', 'ready') AND p.attempt <= try
       AND s.relocation = p.relocation AND s.side <> p.side AND s.attempt = try AND therev.is_same_life(p);
    RETURN FOUND;
END
$$;

-- d. The giving side decides: from now on the buckets are the peer's, whoever asks. Of this and `back_out` the first to commit
-- has won.
CREATE FUNCTION therev.decide(of_relocation bigint, try integer) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, therev, pg_temp
        SET plan_cache_mode = force_generic_plan AS
$$
DECLARE
    part therev.relocation_parts;
BEGIN
    PERFORM set_config('synchronous_commit', 'on', true);
    UPDATE therev.relocation_parts AS p
       SET state = 'moved', drained_at = NULL
     WHERE p.relocation = of_relocation AND p.state = 'draining' AND p.attempt = try AND therev.is_same_life(p)
    RETURNING * INTO part;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM therev.set_ownership(part, '{draining}', 'moved', 1);
    RETURN true;
END
$$;

-- e. The taking side owns the buckets, after the other side was seen to have decided. A promotion in between may have
-- learned that already. Versions never go back here either: this server may have had fewer lives than the other one.
CREATE FUNCTION therev.take_over(of_relocation bigint, try integer) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, therev, pg_temp
        SET plan_cache_mode = force_generic_plan AS
$$
DECLARE
    part therev.relocation_parts;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    UPDATE therev.relocation_parts AS p
       SET state = 'owned', since = pg_current_wal_insert_lsn()
     WHERE p.relocation = of_relocation AND p.state = 'ready' AND p.attempt = try
    RETURNING * INTO part;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF part.pin IS NOT NULL
       OR EXISTS (SELECT FROM therev.ownership AS o
                   WHERE o.colocation_group = ANY (part.groups) AND o.bucket = ANY (part.buckets) AND o.state = 'incoming')
    THEN
        PERFORM therev.set_ownership(part, '{incoming}', 'owned', 1);
    END IF;
    UPDATE therev.fence AS f
       SET version_floor = s.version_floor
      FROM therev.sentinels AS s
     WHERE s.relocation = of_relocation AND s.side <> part.side AND f.version_floor < s.version_floor;
    RETURN true;
END
$$;

-- The taking side: its peer begins a life, of this number, and may have lost its decision; `decided` are the relocations of which it
-- knows that it has decided. Of the others nobody takes over any more, however late a call comes that was on its way: one that lies
-- ready is waited for. What it decides in that life stays, for its sentinels have greater versions then.
CREATE FUNCTION therev.lay_down(of_peer smallint, life bigint, decided bigint[]) RETURNS void
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    UPDATE therev.relocation_parts AS p
       SET state = 'incoming'
      FROM therev.sentinels AS s
     WHERE p.peer = of_peer AND p.state = 'ready' AND p.relocation <> ALL (decided)
       AND s.relocation = p.relocation AND s.side <> p.side AND s.version_floor < life << 40;
END;

-- What the part says, which may only be seen yet, is on the disk when this has committed, and with it everything before.
CREATE FUNCTION therev.make_durable(of_relocation bigint) RETURNS void
    LANGUAGE sql
BEGIN ATOMIC
    SELECT set_config('synchronous_commit', 'on', true);
    UPDATE therev.relocation_parts AS p SET attempt = p.attempt WHERE p.relocation = of_relocation;
END;

-- A write that has waited too long gives up the try that it waits for: whoever began it may be dead.
CREATE FUNCTION therev.back_out_late(in_group therev.colocation_group, of_bucket smallint, late_ms integer)
    RETURNS boolean
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce(bool_or(therev.back_out(p.relocation, p.attempt)), false)
      FROM therev.relocation_parts AS p
     WHERE p.state = 'draining' AND in_group = ANY (p.groups) AND of_bucket = ANY (p.buckets)
       AND p.drained_at < clock_timestamp() - make_interval(secs => late_ms / 1000.0);
END;

-- The standbys that follow this server, those that are catching up among them. Archivers and base backups receive the log too, and
-- never say that they have replayed any of it; they count where commits wait for them.
CREATE VIEW therev.standbys AS
SELECT r.pid, r.sync_state, r.replay_lag, pg_wal_lsn_diff(pg_current_wal_lsn(), r.flush_lsn) AS bytes_behind, r.flush_lsn
  FROM pg_stat_replication AS r
 WHERE r.state IN ('streaming', 'catchup') AND (r.replay_lsn IS NOT NULL OR r.sync_state <> 'async')
   AND NOT EXISTS (SELECT FROM pg_replication_slots AS s WHERE s.active_pid = r.pid AND s.slot_type = 'logical');

-- Whether every standby has the log up to there. What a switch counts on must survive a promotion; and a commit whose wait for a
-- synchronous standby was cut short is seen here without being there.
CREATE FUNCTION therev.standbys_have(lsn pg_lsn) RETURNS boolean
    LANGUAGE plpgsql STABLE SET plan_cache_mode = force_generic_plan AS
$$
BEGIN
    RETURN (SELECT coalesce(bool_and(s.flush_lsn >= lsn), true)
                   AND (current_setting('synchronous_standby_names') = ''
                        OR coalesce(bool_or(s.sync_state <> 'async'), false))
              FROM therev.standbys AS s);
END
$$;

-- The try with which this shard gave a bucket away for good: decided, and on its standbys, which have its log up to `lsn`, a
-- position that was asked for after the decision was seen.
CREATE FUNCTION therev.given_away(of_relocation bigint, lsn pg_lsn) RETURNS integer
    LANGUAGE sql STABLE
    RETURN (SELECT p.attempt FROM therev.relocation_parts AS p
             WHERE p.relocation = of_relocation AND p.state = 'moved' AND therev.standbys_have(lsn));

-- Learns who owns buckets that others have moved among themselves: so that a shard points the short way, and may one day be
-- removed though some still point to it. A bucket of its own is never touched.
CREATE FUNCTION therev.learn_owners(in_groups text[], of_buckets smallint[], owners smallint[], epochs bigint[])
    RETURNS bigint
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH learned AS (
        UPDATE therev.ownership AS o
           SET peer = k.owner, epoch = k.epoch
          FROM unnest(in_groups, of_buckets, owners, epochs) AS k (colocation_group, bucket, owner, epoch),
               therev.identity AS i
         WHERE o.colocation_group = k.colocation_group::therev.colocation_group AND o.bucket = k.bucket
           AND o.state = 'moved' AND o.epoch < k.epoch AND k.owner <> i.shard
        RETURNING 1)
    SELECT count(*) FROM learned;
END;

-- Learns where a user of a bucket of its own is by now who is placed apart. A user who is here is never touched. Says in how
-- many groups that was news.
CREATE FUNCTION therev.learn_pin(in_groups text[], of_user uuid, owner smallint, epochs bigint[]) RETURNS bigint
    LANGUAGE sql
BEGIN ATOMIC
    WITH learned AS (
        UPDATE therev.pins AS p
           SET peer = owner, epoch = k.epoch
          FROM unnest(in_groups, epochs) AS k (colocation_group, epoch), therev.identity AS i
         WHERE p.colocation_group = k.colocation_group::therev.colocation_group AND p.user_id = of_user
           AND p.state = 'moved' AND p.epoch < k.epoch AND i.shard <> owner
        RETURNING 1)
    SELECT count(*) FROM learned;
END;

-- A user who is placed apart where the bucket has come meanwhile is with it again: nothing moves. `false`: there is none.
CREATE FUNCTION therev.release_pin(in_groups text[], of_user uuid) RETURNS boolean
    LANGUAGE plpgsql AS
$$
BEGIN
    LOCK TABLE therev.relocation_parts IN SHARE ROW EXCLUSIVE MODE;
    IF therev.buckets_under_way(0, in_groups, ARRAY[therev.bucket_of(of_user)]) IS NOT NULL THEN
        RAISE EXCEPTION 'bucket % is in a relocation', therev.bucket_of(of_user) USING ERRCODE = 'TR005';
    END IF;
    DELETE FROM therev.pins AS p USING therev.ownership AS o
     WHERE p.user_id = of_user AND p.colocation_group::text = ANY (in_groups) AND p.state = 'owned'
       AND o.colocation_group = p.colocation_group AND o.bucket = p.bucket AND o.state = 'owned';
    RETURN FOUND;
END
$$;

-- The tables of these groups and all their partitions; `holds_rows` is false of a partitioned table itself.
CREATE FUNCTION therev.relations_of(of_groups text[])
    RETURNS TABLE (relation regclass, holds_rows boolean, colocation_group text, owner_column text)
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT c.oid::regclass, c.relkind = 'r', t.colocation_group::text, t.owner_column
      FROM therev.owned_tables AS t
      JOIN pg_class AS c ON c.oid = t.table_name::regclass
     WHERE t.colocation_group::text = ANY (of_groups)
    UNION ALL
    SELECT i.inhrelid::regclass, true, t.colocation_group::text, t.owner_column
      FROM therev.owned_tables AS t
      JOIN pg_inherits AS i ON i.inhparent = t.table_name::regclass
     WHERE t.colocation_group::text = ANY (of_groups);
END;

-- The transactions that hold a write lock on the tables of these groups now, leaf partitions included, prepared ones too: by
-- their virtual ids, of which a session never has the same twice. Workers that apply replicated rows are not meant.
CREATE FUNCTION therev.writers(of_groups text[]) RETURNS text[]
    LANGUAGE plpgsql STABLE SET plan_cache_mode = force_generic_plan AS
$$
BEGIN
    RETURN (
        SELECT coalesce(array_agg(DISTINCT l.virtualtransaction), '{}')
          FROM pg_locks AS l
         WHERE l.locktype = 'relation' AND l.granted
           AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
           AND l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
           AND l.relation IN (SELECT r.relation FROM therev.relations_of(of_groups) AS r)
           AND l.pid IS DISTINCT FROM pg_backend_pid()
           AND NOT EXISTS (SELECT FROM pg_stat_subscription AS s WHERE s.pid = l.pid));
END
$$;

REVOKE EXECUTE ON FUNCTION
    therev.set_ownership(therev.relocation_parts, therev.ownership_state[], therev.ownership_state, integer),
    therev.drain(bigint, integer, integer), therev.back_out(bigint, integer), therev.get_ready(bigint, integer),
    therev.decide(bigint, integer), therev.take_over(bigint, integer), therev.lay_down(smallint, bigint, bigint[]),
    therev.back_out_late(therev.colocation_group, smallint, integer),
    therev.learn_owners(text[], smallint[], smallint[], bigint[])
    FROM PUBLIC;
-- Any node may end a switch that a dead one began, or a promotion.
GRANT EXECUTE ON FUNCTION
    therev.take_over(bigint, integer), therev.back_out_late(therev.colocation_group, smallint, integer),
    therev.lay_down(smallint, bigint, bigint[])
    TO therev;
