-- Who this database is. Every database of a cluster begins with this chapter, so that a program that reaches the
-- wrong one, or one of another cluster, says so instead of reading it.

-- The timeline that the server writes on; NULL on a standby. PostgreSQL begins a new one at each promotion and restore.
CREATE FUNCTION therev.current_timeline() RETURNS integer
    LANGUAGE sql VOLATILE
    RETURN CASE
        WHEN pg_is_in_recovery() THEN NULL
        ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::integer
    END;

-- Written by shards/fresh.rs.
CREATE TABLE therev.identity (
    singleton           boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    cluster_id          uuid    NOT NULL,
    kind                text    NOT NULL CHECK (kind IN ('shard', 'directory', 'control')),
    shard               smallint CHECK (shard >= 0),
    layout              text    NOT NULL CHECK (layout IN ('colocated', 'split')),
    -- Which life of the server this is: made new at each promotion or restore.
    incarnation         uuid    NOT NULL DEFAULT gen_random_uuid(),
    incarnation_counter bigint  NOT NULL DEFAULT 1 CHECK (incarnation_counter BETWEEN 1 AND 4194303),
    -- On which timeline this life began. A server that writes on another one was promoted or restored since, and is closed
    -- until the control database has granted it a life of its own: the number alone does not tell two standbys apart that
    -- were promoted both.
    timeline            integer NOT NULL DEFAULT therev.current_timeline(),
    -- The lives that it has asked for since this one began, the last one on this timeline. Those before were asked for on
    -- timelines that a further promotion has ended; one of them may have been granted, and is then the one that counts.
    candidates          uuid[]  NOT NULL DEFAULT '{}',
    candidate_timeline  integer,
    CONSTRAINT identity_only_shards_have_numbers CHECK ((kind = 'shard') = (shard IS NOT NULL))
);

-- The hash that places everything: PostgreSQL's own hash-partition function with modulus 4096, written with built-in
-- immutable functions only, so that the planner can put it in place of the call.
CREATE FUNCTION therev.bucket_of(key uuid) RETURNS smallint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (((uuid_hash_extended(key, 8816678312871386365) & 4095) + 2275) & 4095)::smallint;

CREATE FUNCTION therev.is_provider(name text) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN name IN ('chatgpt', 'claude', 'gemini', 'perplexity', 'open_source', 'deterministic');

-- Every function that does what its caller may not (SECURITY DEFINER), here and in the other chapters, looks for names in pg_temp
-- last: there a caller may have a type of any name that runs code of its own. Not named, it would be looked in first.

-- The life that this server asks for now.
CREATE FUNCTION therev.candidate(i therev.identity) RETURNS uuid
    LANGUAGE sql IMMUTABLE
    RETURN i.candidates[cardinality(i.candidates)];

-- A promoted server asks for a life of its own: the same one as long as it writes on this timeline. Answers with the lives
-- that it succeeds, the one that it asks for, and since when others may have heard what it lost. No row: it has begun one by
-- now. A second life for one promotion, granted and then not begun, would leave it closed for good.
CREATE FUNCTION therev.ask_for_life() RETURNS TABLE (before uuid[], candidate uuid, lost_after timestamptz)
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    UPDATE therev.identity AS i
       SET candidates = CASE WHEN i.candidate_timeline = therev.current_timeline() THEN i.candidates
                             ELSE i.candidates || gen_random_uuid() END,
           candidate_timeline = therev.current_timeline()
     WHERE i.timeline <> therev.current_timeline()
    RETURNING i.incarnation || trim_array(i.candidates, 1), therev.candidate(i),
              -- Clocks of two servers differ a little. Nothing delivered is kept longer than an hour.
              coalesce(pg_last_xact_replay_timestamp() - interval '1 minute', now() - interval '1 hour');
END;

-- By an operator's word: this server is to take the place of the one whose life counts, and asks for a life as a promoted one does.
CREATE FUNCTION therev.take_its_place(counts uuid) RETURNS void
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    UPDATE therev.identity AS i SET timeline = 0 WHERE i.incarnation <> counts;
END;

-- Begins the life that was granted.
CREATE FUNCTION therev.begin_life(granted uuid, counter bigint) RETURNS void
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    UPDATE therev.identity AS i
       SET incarnation = granted, incarnation_counter = counter, timeline = therev.current_timeline(),
           candidates = '{}', candidate_timeline = NULL
     WHERE therev.candidate(i) = granted;
END;

REVOKE EXECUTE ON FUNCTION therev.ask_for_life(), therev.take_its_place(uuid), therev.begin_life(uuid, bigint) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION therev.ask_for_life(), therev.take_its_place(uuid), therev.begin_life(uuid, bigint) TO therev;

GRANT USAGE ON SCHEMA therev TO PUBLIC;
GRANT SELECT ON therev.identity, therev.schema_versions TO PUBLIC;
