-- Group `content`: what a person wrote, with the author's bucket. No foreign key leads to group `account` (in the split
-- layout it is elsewhere), nor from a post to its thread (it belongs to somebody else).

-- Written by community/threads.rs and community/bulk/. A deleted thread answers as gone; other people's posts in it stay
-- theirs.
CREATE TABLE threads (
    bucket     smallint    NOT NULL,
    author_id  uuid        NOT NULL,
    thread_id  uuid        NOT NULL,
    title      text CHECK (char_length(title) BETWEEN 1 AND 500),
    body       text CHECK (octet_length(body) <= 1048576),
    format     text        NOT NULL DEFAULT 'plain' CHECK (format IN ('plain', 'html')),
    is_pinned  boolean     NOT NULL DEFAULT false,
    is_locked  boolean     NOT NULL DEFAULT false,
    moderation text        NOT NULL DEFAULT 'approved'
               CHECK (moderation IN ('approved', 'pending', 'rejected', 'flagged')),
    score      integer     NOT NULL DEFAULT 0,
    metadata   jsonb       NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(metadata) = 'object'),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz,
    version    bigint      NOT NULL DEFAULT 1 CHECK (version > 0),
    PRIMARY KEY (bucket, author_id, thread_id),
    CONSTRAINT threads_text CHECK ((deleted_at IS NULL) = (title IS NOT NULL AND body IS NOT NULL)),
    CONSTRAINT threads_the_deleted_keep_no_text
        CHECK (deleted_at IS NULL OR (num_nonnulls(title, body) = 0 AND metadata = '{}'))
);
-- Query: a thread by its id alone.
CREATE UNIQUE INDEX threads_by_id ON threads (bucket, thread_id);

-- Written by community/posts.rs and community/bulk/. A deleted post keeps its place and loses its text.
CREATE TABLE posts (
    bucket           smallint    NOT NULL,
    author_id        uuid        NOT NULL,
    post_id          uuid        NOT NULL,
    thread_id        uuid        NOT NULL,
    thread_author_id uuid        NOT NULL,
    parent_post_id   uuid,
    parent_author_id uuid,
    type             text        NOT NULL DEFAULT 'TEXT'
                     CHECK (type IN ('TEXT', 'IMAGE', 'VIDEO', 'LINK', 'POLL', 'AI_GENERATED')),
    body             text CHECK (octet_length(body) BETWEEN 1 AND 1048576),
    format           text        NOT NULL DEFAULT 'plain' CHECK (format IN ('plain', 'html')),
    is_pinned        boolean     NOT NULL DEFAULT false,
    moderation       text        NOT NULL DEFAULT 'approved'
                     CHECK (moderation IN ('approved', 'pending', 'rejected', 'flagged')),
    score            integer     NOT NULL DEFAULT 0,
    metadata         jsonb       NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(metadata) = 'object'),
    created_at       timestamptz NOT NULL DEFAULT now(),
    updated_at       timestamptz NOT NULL DEFAULT now(),
    deleted_at       timestamptz,
    version          bigint      NOT NULL DEFAULT 1 CHECK (version > 0),
    -- Query: an author's posts, newest first (ids sort by time).
    PRIMARY KEY (bucket, author_id, post_id),
    CONSTRAINT posts_parent_with_author CHECK ((parent_post_id IS NULL) = (parent_author_id IS NULL)),
    CONSTRAINT posts_text CHECK ((deleted_at IS NULL) = (body IS NOT NULL)),
    CONSTRAINT posts_the_deleted_keep_no_text CHECK (deleted_at IS NULL OR metadata = '{}')
);
-- Query: a post by its id alone.
CREATE UNIQUE INDEX posts_by_id ON posts (bucket, post_id);
-- Query: this shard's share of a thread's page.
CREATE INDEX posts_of_thread ON posts (thread_id, created_at, post_id);

-- The rules of what every post writes besides itself. PostgreSQL reads and compiles the CHECKs of a table anew for each
-- statement, those of a domain once a connection.
CREATE DOMAIN therev.tally AS integer CONSTRAINT tally_is_not_negative CHECK (VALUE >= 0);
CREATE DOMAIN therev.version AS bigint CONSTRAINT version_is_positive CHECK (VALUE > 0);

-- How much an author wrote in a thread: owned by the author, falls to zero, never away.
-- Written by community/posts.rs and community/bulk/, in the post's own transaction; counted anew by community/repair/.
CREATE TABLE therev.thread_contributions (
    bucket           smallint       NOT NULL,
    author_id        uuid           NOT NULL,
    thread_id        uuid           NOT NULL,
    thread_author_id uuid           NOT NULL,
    -- Posts that can be read, and places of deleted ones.
    posts            therev.tally   NOT NULL,
    deleted          therev.tally   NOT NULL DEFAULT 0,
    last_post_at     timestamptz    NOT NULL,
    version          therev.version NOT NULL,
    PRIMARY KEY (bucket, author_id, thread_id)
);

-- Who wrote in a thread: owned by the thread's author, a copy of each participant's contribution, newest version wins.
-- Written by community/delivery.rs, community/bulk/ and community/repair/. Tells a page which shards to ask.
CREATE TABLE therev.thread_participants (
    bucket         smallint       NOT NULL,
    author_id      uuid           NOT NULL,
    thread_id      uuid           NOT NULL,
    participant_id uuid           NOT NULL,
    posts          therev.tally   NOT NULL,
    deleted        therev.tally   NOT NULL DEFAULT 0,
    last_post_at   timestamptz    NOT NULL,
    version        therev.version NOT NULL,
    PRIMARY KEY (bucket, author_id, thread_id, participant_id)
);

-- The sum of a thread's participants, made by the relay, at most once a second: no hot row per reply.
-- Written by community/newest.rs and community/repair/.
CREATE TABLE therev.thread_totals (
    bucket       smallint     NOT NULL,
    author_id    uuid         NOT NULL,
    thread_id    uuid         NOT NULL,
    posts        therev.tally NOT NULL,
    participants therev.tally NOT NULL,
    last_post_at timestamptz,
    -- The sum of the participants' versions: they only grow, so a later sum is a greater one, whoever made it.
    version      numeric(40)  NOT NULL,
    PRIMARY KEY (bucket, author_id, thread_id)
);
