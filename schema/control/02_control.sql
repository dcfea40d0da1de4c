-- The catalog: where everything is. The shards alone decide whether.

-- Written by shards/init.rs. Hosts, no passwords: the roles are the same on all servers.
CREATE TABLE therev.shards (
    shard     smallint PRIMARY KEY CHECK (shard >= 0),
    -- host:port, several separated by commas; the one that accepts writes is found by asking.
    hosts     text     NOT NULL CHECK (hosts <> ''),
    database  text     NOT NULL,
    pool_size smallint NOT NULL DEFAULT 16 CHECK (pool_size > 0)
);

-- Written by shards/init.rs.
CREATE TABLE therev.directories (
    directory smallint PRIMARY KEY CHECK (directory >= 0),
    is_writer boolean  NOT NULL,
    hosts     text     NOT NULL CHECK (hosts <> ''),
    database  text     NOT NULL
);
CREATE UNIQUE INDEX directories_one_writer ON therev.directories (is_writer) WHERE is_writer;

-- Bucket to shard, by group. Only a higher epoch replaces a row. Written by shards/init.rs.
CREATE TABLE therev.placement (
    colocation_group text     NOT NULL CHECK (colocation_group IN ('account', 'content')),
    bucket           smallint NOT NULL CHECK (bucket BETWEEN 0 AND 4095),
    shard            smallint NOT NULL REFERENCES therev.shards,
    epoch            bigint   NOT NULL DEFAULT 1 CHECK (epoch > 0),
    PRIMARY KEY (colocation_group, bucket)
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

GRANT SELECT ON ALL TABLES IN SCHEMA public, therev TO therev, therev_reader;
GRANT INSERT ON therev.operator_log TO therev;
GRANT INSERT, UPDATE ON ai_provider_health TO therev;
