-- Group `account`: a person, and what belongs to nobody else. All of it lies with the person's bucket.

-- Written by community/users.rs, community/names.rs (burials) and community/bulk/. A deleted user leaves its id and its
-- version, so that neither a slow registration nor an old event can raise it again; everything personal is gone.
CREATE TABLE users (
    bucket          smallint    NOT NULL,
    user_id         uuid        NOT NULL,
    user_name       text CHECK (char_length(user_name) BETWEEN 1 AND 40),
    first_name      text CHECK (char_length(first_name) <= 200),
    last_name       text CHECK (char_length(last_name) <= 200),
    email           text CHECK (char_length(email) BETWEEN 3 AND 254),
    password_hash   text,
    bio             text CHECK (char_length(bio) <= 100000),
    ideology        text CHECK (char_length(ideology) <= 200),
    profile_pic_url text CHECK (char_length(profile_pic_url) <= 2000),
    role            text        NOT NULL DEFAULT 'STANDARD'
                    CHECK (role IN ('STANDARD', 'MODERATOR', 'ADMIN', 'SUPER_ADMIN')),
    is_active       boolean     NOT NULL DEFAULT true,
    metadata        jsonb       NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(metadata) = 'object'),
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    deleted_at      timestamptz,
    -- False: an id whose registration was given up before it was written. The same registration may be asked for again.
    was_registered  boolean     NOT NULL DEFAULT true CHECK (was_registered OR deleted_at IS NOT NULL),
    version         bigint      NOT NULL DEFAULT 1 CHECK (version > 0),
    PRIMARY KEY (bucket, user_id),
    CONSTRAINT users_the_living_have_names CHECK (deleted_at IS NOT NULL OR user_name IS NOT NULL),
    CONSTRAINT users_the_deleted_keep_nothing CHECK (
        deleted_at IS NULL
        OR (num_nonnulls(user_name, first_name, last_name, email, password_hash, bio, ideology, profile_pic_url) = 0
            AND metadata = '{}' AND NOT is_active AND role = 'STANDARD'))
);

-- What others see beside the user name.
CREATE FUNCTION therev.display_name(u users) RETURNS text
    LANGUAGE sql STABLE
    RETURN nullif(concat_ws(' ', u.first_name, u.last_name), '');

-- Written by community/sessions.rs; community/users.rs ends and deletes some, community/maintenance.rs what ended long ago. Of a token
-- only its SHA-256 is kept.
CREATE TABLE user_sessions (
    bucket       smallint    NOT NULL,
    user_id      uuid        NOT NULL,
    session_id   uuid        NOT NULL,
    token_hash   bytea       NOT NULL CHECK (octet_length(token_hash) = 32),
    device_info  jsonb       NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(device_info) = 'object'),
    ip_address   inet,
    status       text        NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'expired', 'revoked', 'suspended')),
    expires_at   timestamptz NOT NULL,
    last_seen_at timestamptz NOT NULL DEFAULT now(),
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now(),
    version      bigint      NOT NULL DEFAULT 1 CHECK (version > 0),
    PRIMARY KEY (bucket, user_id, session_id),
    CONSTRAINT user_sessions_user FOREIGN KEY (bucket, user_id) REFERENCES users
);
-- Query: a token names its session, not its user (verify, revoke).
CREATE UNIQUE INDEX user_sessions_by_id ON user_sessions (bucket, session_id);

-- Written by tasks/accounts.rs; community/users.rs deletes.
CREATE TABLE user_ai_accounts (
    bucket             smallint    NOT NULL,
    user_id            uuid        NOT NULL,
    account_id         uuid        NOT NULL,
    provider           text        NOT NULL CHECK (therev.is_provider(provider)),
    account_type       text        NOT NULL CHECK (account_type IN ('api', 'web_automation', 'local_model')),
    label              text        NOT NULL CHECK (char_length(label) BETWEEN 1 AND 100),
    -- Encrypted by a data key of the row, which the key-ring key `kek_id` wraps.
    credentials        bytea,
    kek_id             text,
    status             text        NOT NULL DEFAULT 'pending'
                       CHECK (status IN ('active', 'expired', 'rate_limited', 'invalid_credentials', 'suspended',
                                         'pending')),
    is_default         boolean     NOT NULL DEFAULT false,
    priority           smallint    NOT NULL DEFAULT 5 CHECK (priority BETWEEN 1 AND 10),
    limits             jsonb       NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(limits) = 'object'),
    requests_remaining integer CHECK (requests_remaining >= 0),
    tokens_remaining   bigint CHECK (tokens_remaining >= 0),
    limits_reset_at    timestamptz,
    last_used_at       timestamptz,
    preferences        jsonb       NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(preferences) = 'object'),
    created_at         timestamptz NOT NULL DEFAULT now(),
    updated_at         timestamptz NOT NULL DEFAULT now(),
    version            bigint      NOT NULL DEFAULT 1 CHECK (version > 0),
    PRIMARY KEY (bucket, user_id, account_id),
    CONSTRAINT user_ai_accounts_user FOREIGN KEY (bucket, user_id) REFERENCES users,
    CONSTRAINT user_ai_accounts_key_with_credentials CHECK ((credentials IS NULL) = (kek_id IS NULL)),
    -- Checked at the end of the transaction, so that one statement can hand the mark from one account to another.
    CONSTRAINT user_ai_accounts_one_default
        EXCLUDE (bucket WITH =, user_id WITH =) WHERE (is_default) DEFERRABLE INITIALLY DEFERRED
);
-- Query: an account by its id alone.
CREATE UNIQUE INDEX user_ai_accounts_by_id ON user_ai_accounts (bucket, account_id);

-- What a task may be meant to do. Rows, not an enumeration: a new intent needs no release.
-- Written by this chapter and by operators.
CREATE TABLE therev.intents (
    intent      text PRIMARY KEY CHECK (intent ~ '^[a-z][a-z0-9_]{0,62}$'),
    description text NOT NULL
);
INSERT INTO therev.intents (intent, description) VALUES
    ('write_post', 'write a new post'),
    ('reply_to_post', 'answer a post'),
    ('summarize_thread', 'sum a thread up'),
    ('analyze_sentiment', 'say in what mood a text is'),
    ('navigate_to_thread', 'find and open a thread'),
    ('fill_form', 'fill in a form'),
    ('search_content', 'search threads and posts'),
    ('generate_media', 'make a picture or a sound'),
    ('moderate_content', 'judge a text by the rules'),
    ('extract_data', 'take facts out of a text'),
    ('translate_text', 'translate a text'),
    ('code_assistance', 'write or explain code');

-- Written by tasks/tasks.rs; community/users.rs deletes.
CREATE TABLE ai_tasks (
    bucket             smallint    NOT NULL,
    user_id            uuid        NOT NULL,
    task_id            uuid        NOT NULL,
    task_type          text        NOT NULL
                       CHECK (task_type IN ('automation', 'generation', 'analysis', 'summarization', 'navigation',
                                            'form_filling')),
    intent             text REFERENCES therev.intents,
    intent_confidence  real CHECK (intent_confidence BETWEEN 0 AND 1),
    routing            jsonb       NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(routing) = 'object'),
    priority           smallint    NOT NULL DEFAULT 5 CHECK (priority BETWEEN 1 AND 10),
    status             text        NOT NULL DEFAULT 'pending'
                       CHECK (status IN ('pending', 'queued', 'running', 'retrying', 'completed', 'failed',
                                         'cancelled')),
    input              jsonb       NOT NULL DEFAULT '{}',
    output             jsonb,
    error              text,
    provider           text CHECK (therev.is_provider(provider)),
    account_id         uuid,
    choice_reason      text,
    fallback           jsonb       NOT NULL DEFAULT '[]' CHECK (jsonb_typeof(fallback) = 'array'),
    fallback_position  smallint    NOT NULL DEFAULT 0 CHECK (fallback_position >= 0),
    attempt            integer     NOT NULL DEFAULT 0 CHECK (attempt >= 0),
    max_attempts       integer     NOT NULL DEFAULT 3 CHECK (max_attempts BETWEEN 1 AND 100),
    leased_until       timestamptz,
    run_after          timestamptz NOT NULL DEFAULT now(),
    deadline           timestamptz,
    started_at         timestamptz,
    finished_at        timestamptz,
    queued_ms          bigint CHECK (queued_ms >= 0),
    run_ms             bigint CHECK (run_ms >= 0),
    tokens_used        bigint CHECK (tokens_used >= 0),
    cost_microcents    bigint CHECK (cost_microcents >= 0),
    created_at         timestamptz NOT NULL DEFAULT now(),
    updated_at         timestamptz NOT NULL DEFAULT now(),
    version            bigint      NOT NULL DEFAULT 1 CHECK (version > 0),
    PRIMARY KEY (bucket, user_id, task_id),
    CONSTRAINT ai_tasks_user FOREIGN KEY (bucket, user_id) REFERENCES users,
    CONSTRAINT ai_tasks_running_has_lease CHECK ((status = 'running') = (leased_until IS NOT NULL)),
    CONSTRAINT ai_tasks_ended_has_time
        CHECK ((status IN ('completed', 'failed', 'cancelled')) = (finished_at IS NOT NULL))
);
-- Query: a task by its id alone.
CREATE UNIQUE INDEX ai_tasks_by_id ON ai_tasks (bucket, task_id);

-- Written by tasks/tasks.rs; community/users.rs deletes. The key holds the time because the table is cut by month.
CREATE TABLE ai_task_logs (
    bucket      smallint    NOT NULL,
    user_id     uuid        NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    log_id      uuid        NOT NULL,
    task_id     uuid        NOT NULL,
    attempt     integer     NOT NULL DEFAULT 0 CHECK (attempt >= 0),
    level       text        NOT NULL DEFAULT 'INFO' CHECK (level IN ('DEBUG', 'INFO', 'WARN', 'ERROR', 'FATAL')),
    step        integer CHECK (step >= 0),
    step_name   text,
    message     text        NOT NULL,
    details     jsonb       NOT NULL DEFAULT '{}',
    provider    text CHECK (therev.is_provider(provider)),
    account_id  uuid,
    duration_ms bigint CHECK (duration_ms >= 0),
    PRIMARY KEY (bucket, user_id, created_at, log_id)
) PARTITION BY RANGE (created_at);
-- Query: the log of one task, in order.
CREATE INDEX ai_task_logs_of_task ON ai_task_logs (bucket, task_id, created_at);

-- Written by community/audit.rs and tasks/audit.rs, append-only by grant. The owner is the user whose account or content
-- was changed.
CREATE TABLE audit_log (
    bucket     smallint    NOT NULL,
    user_id    uuid        NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    audit_id   uuid        NOT NULL,
    actor      text        NOT NULL,
    action     text        NOT NULL,
    target     text        NOT NULL,
    before     jsonb       NOT NULL DEFAULT '{}',
    after      jsonb       NOT NULL DEFAULT '{}',
    PRIMARY KEY (bucket, user_id, created_at, audit_id)
) PARTITION BY RANGE (created_at);
-- Query: the newest entries of everybody.
CREATE INDEX audit_log_newest ON audit_log (created_at);

-- Globally unique names, each sharded by the hash of its normalized value. Written by community/names.rs,
-- community/bulk/ and community/repair/.
-- Taken (pending) before the user's row is written, held after it; `version` is the user's version it was taken for.
-- A bulk write holds at once what it takes, and leaves an event by which a relay doubts it should the row not come.
CREATE TABLE therev.claims (
    bucket     smallint    NOT NULL,
    claim_key  uuid        NOT NULL,
    kind       text        NOT NULL CHECK (kind IN ('user_name', 'email')),
    value      text        NOT NULL,
    user_id    uuid        NOT NULL,
    state      text        NOT NULL CHECK (state IN ('pending', 'held')),
    created_at timestamptz NOT NULL DEFAULT now(),
    version    bigint      NOT NULL CHECK (version > 0),
    PRIMARY KEY (bucket, claim_key)
);
-- Query: claims whose registration never ended (relay).
CREATE INDEX claims_pending ON therev.claims (created_at) WHERE state = 'pending';

-- The owner of an id that some other system made and that carries no bucket. Sharded by the hash of the id.
-- Written by nobody yet.
CREATE TABLE therev.id_routes (
    bucket   smallint NOT NULL,
    id       uuid     NOT NULL,
    owner_id uuid     NOT NULL,
    PRIMARY KEY (bucket, id)
);
