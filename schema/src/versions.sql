CREATE SCHEMA IF NOT EXISTS therev;

COMMENT ON SCHEMA therev IS 'Machinery of therev. The rows of users and content are in schema public.';

-- Which chapters this database has, and since when. Written by schema/lib.rs.
CREATE TABLE IF NOT EXISTS therev.schema_versions (
    version    integer PRIMARY KEY CHECK (version > 0),
    name       text        NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);
