-- The cross-shard reference tables: one writer, any number of streaming replicas. Rows come from the shards' outboxes;
-- the newer version wins, and a deleted row stays as a mark so that an old event cannot raise it. Neither table holds a
-- shard's number: placement says that.

-- Written by community/delivery.rs and community/bulk/; community/repair/ sets versions back to 0 before it delivers.
CREATE TABLE user_directory (
    user_id         uuid PRIMARY KEY,
    user_name       text,
    display_name    text,
    profile_pic_url text,
    role            text        NOT NULL CHECK (role IN ('STANDARD', 'MODERATOR', 'ADMIN', 'SUPER_ADMIN')),
    is_active       boolean     NOT NULL,
    -- Of times without end the library can read none.
    created_at      timestamptz NOT NULL CHECK (isfinite(created_at)),
    is_deleted      boolean     NOT NULL,
    version         bigint      NOT NULL,
    CONSTRAINT user_directory_the_living_have_names CHECK (is_deleted OR user_name IS NOT NULL)
);
-- Query: names by prefix, in order.
CREATE INDEX user_directory_by_name ON user_directory (user_name text_pattern_ops) WHERE NOT is_deleted;

-- Written by community/delivery.rs, community/bulk/, community/repair/ and, its totals, community/newest.rs.
CREATE TABLE thread_directory (
    thread_id        uuid PRIMARY KEY,
    author_id        uuid        NOT NULL,
    title            text,
    is_pinned        boolean     NOT NULL,
    is_locked        boolean     NOT NULL,
    moderation       text        NOT NULL CHECK (moderation IN ('approved', 'pending', 'rejected', 'flagged')),
    created_at       timestamptz NOT NULL CHECK (isfinite(created_at)),
    is_deleted       boolean     NOT NULL,
    version          bigint      NOT NULL,
    -- Totals come by events of their own, with a version of their own.
    post_count       integer     NOT NULL DEFAULT 0,
    last_activity_at timestamptz NOT NULL CHECK (isfinite(last_activity_at)),
    totals_version   numeric(40) NOT NULL DEFAULT 0,
    search           tsvector GENERATED ALWAYS AS (to_tsvector('simple', coalesce(title, ''))) STORED,
    CONSTRAINT thread_directory_the_living_have_titles CHECK (is_deleted OR title IS NOT NULL)
);
-- Query: newest threads.
CREATE INDEX thread_directory_newest ON thread_directory (created_at, thread_id) WHERE NOT is_deleted;
-- Query: most active threads.
CREATE INDEX thread_directory_most_active ON thread_directory (post_count, thread_id) WHERE NOT is_deleted;
-- Query: an author's threads, newest first.
CREATE INDEX thread_directory_by_author ON thread_directory (author_id, created_at, thread_id) WHERE NOT is_deleted;

GRANT SELECT, INSERT, UPDATE, DELETE ON user_directory, thread_directory TO therev;
GRANT SELECT ON user_directory, thread_directory TO therev_reader;
