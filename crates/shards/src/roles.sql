-- The roles of therev on one server, and its ownership of this database. The passwords come as settings of the session.
DO $$
DECLARE
    needed record;
BEGIN
    -- Roles and what they may are the whole server's. Two clusters may be set up on one server at the same time, and of two that
    -- change one row of these catalogs at once PostgreSQL fails one: the second one waits.
    IF (SELECT r.rolsuper FROM pg_roles AS r WHERE r.rolname = current_user) THEN
        LOCK TABLE pg_authid IN SHARE ROW EXCLUSIVE MODE;
    END IF;
    FOR needed IN
        SELECT *
          FROM (VALUES ('therev_reader', NULL),
                       ('therev', current_setting('therev.password')),
                       ('therev_admin', current_setting('therev.admin_password')),
                       ('therev_mover', current_setting('therev.mover_password'))) AS r (role_name, secret)
    LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = needed.role_name) THEN
            EXECUTE format('CREATE ROLE %I', needed.role_name);
            -- Only of a role that is made here: another cluster on this server logs in with the password it has.
            IF needed.secret IS NOT NULL THEN
                EXECUTE format('ALTER ROLE %I LOGIN PASSWORD %L', needed.role_name, needed.secret);
            END IF;
        END IF;
    END LOOP;
    EXECUTE format('ALTER DATABASE %I OWNER TO therev_admin', current_database());
    GRANT pg_monitor TO therev, therev_admin, therev_mover;
    -- The mover makes slots, publications and subscriptions, and writes rows without firing triggers. As the owner's member
    -- it may touch the tables. Before PostgreSQL 16 a subscription takes a superuser.
    GRANT therev_admin TO therev_mover;
    ALTER ROLE therev_mover REPLICATION;
    GRANT SET ON PARAMETER session_replication_role TO therev_mover;
    -- What it says when it subscribes holds its password, and is for no log.
    GRANT SET ON PARAMETER log_statement, log_min_error_statement, log_min_duration_statement TO therev_mover;
    IF current_setting('server_version_num')::integer < 160000 THEN
        ALTER ROLE therev_mover SUPERUSER;
    ELSE
        GRANT pg_create_subscription TO therev_mover;
        GRANT EXECUTE ON FUNCTION pg_replication_origin_advance(text, pg_lsn) TO therev_mover;
    END IF;
    -- Where the server was started with it; without it there is only less to see.
    IF current_setting('shared_preload_libraries') LIKE '%pg_stat_statements%' THEN
        CREATE EXTENSION IF NOT EXISTS pg_stat_statements;
        GRANT SET ON PARAMETER pg_stat_statements.track TO therev_mover;
    END IF;
END
$$;
