-- Who this database is. Every database of a cluster begins with this chapter, so that a program that reaches the
-- wrong one, or one of another cluster, says so instead of reading it.


-- Written by shards/init.rs.
CREATE TABLE therev.identity (
    singleton           boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    cluster_id          uuid    NOT NULL,
    kind                text    NOT NULL CHECK (kind IN ('shard', 'directory', 'control')),
    shard               smallint CHECK (shard >= 0),
    layout              text    NOT NULL CHECK (layout IN ('colocated', 'split')),
    -- Which life of the server this is: made new at each promotion or restore.
    incarnation         uuid    NOT NULL DEFAULT gen_random_uuid(),
    incarnation_counter bigint  NOT NULL DEFAULT 1 CHECK (incarnation_counter BETWEEN 1 AND 4194303),
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

GRANT USAGE ON SCHEMA therev TO PUBLIC;
GRANT SELECT ON therev.identity, therev.schema_versions TO PUBLIC;
