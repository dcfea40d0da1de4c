-- Month partitions, and the summaries that are refreshed by a schedule.

-- Makes a table's partition for a month, with its guard against TRUNCATE, which a partition does not inherit. Says whether
-- there was something to make. There is no default partition: a row without a month is an error that somebody sees.
-- SECURITY DEFINER: the mover makes some too, and whose the table is, its months are.
CREATE FUNCTION therev.make_partition(parent text, month date) RETURNS boolean
    -- Who waits for the table keeps all others waiting.
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' AS
$$
DECLARE
    partition_name constant text := parent || to_char(month, '_YYYY_MM');
BEGIN
    -- Two at once would make the same one.
    PERFORM pg_advisory_xact_lock(hashtext('therev.make_partitions'));
    IF to_regclass('public.' || partition_name) IS NOT NULL THEN
        RETURN false;
    END IF;
    EXECUTE format('CREATE TABLE public.%I PARTITION OF public.%I FOR VALUES FROM (%L) TO (%L)',
                   partition_name, parent, month || ' 00:00:00+00',
                   (month + interval '1 month')::date || ' 00:00:00+00');
    EXECUTE format('CREATE TRIGGER guard_truncate BEFORE TRUNCATE ON public.%I
                        FOR EACH STATEMENT EXECUTE FUNCTION therev.refuse_truncate()', partition_name);
    RETURN true;
END
$$;

-- Makes the partitions of this month and of the `ahead` months after it. Says how many there were to make.
-- SECURITY DEFINER: any node sees to it.
CREATE FUNCTION therev.make_partitions(ahead integer) RETURNS integer
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    RETURN (
        SELECT count(*) FILTER (WHERE therev.make_partition(
                   parent, (date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => n))::date))
          FROM unnest(ARRAY['ai_task_logs', 'audit_log']) AS parent, generate_series(0, ahead) AS n);

-- The owner's, and by chapter 9 the mover's and the library's.
REVOKE EXECUTE ON FUNCTION therev.make_partition(text, date), therev.make_partitions(integer) FROM PUBLIC;

-- When each view was last refreshed; shown wherever it is read. Written by community/maintenance.rs.
CREATE TABLE therev.refreshes (
    view_name    text PRIMARY KEY,
    refreshed_at timestamptz NOT NULL
);

-- Accounts by user, provider and status.
CREATE MATERIALIZED VIEW user_ai_summary AS
SELECT a.bucket, a.user_id, a.provider, a.status, count(*) AS accounts, max(a.last_used_at) AS last_used_at
  FROM user_ai_accounts AS a
  JOIN therev.fence AS f ON f.colocation_group = 'account' AND therev.may_read(f, a.bucket, a.user_id)
 GROUP BY a.bucket, a.user_id, a.provider, a.status;
-- The view is made here: nobody waits for it.
-- squawk-ignore require-concurrent-index-creation
CREATE UNIQUE INDEX user_ai_summary_key ON user_ai_summary (bucket, user_id, provider, status);

-- Tasks by user, provider, status and hour. The histogram has 16 classes of doubling width from 1 ms (the first: below
-- 2 ms), so that sums over shards are true; percentiles would not merge.
CREATE MATERIALIZED VIEW ai_task_stats AS
SELECT c.bucket, c.user_id, c.provider, c.status, c.hour,
       sum(c.tasks)::bigint AS tasks, sum(c.errors)::bigint AS errors,
       jsonb_object_agg(c.duration_class, c.tasks) FILTER (WHERE c.duration_class IS NOT NULL) AS run_ms_histogram
  FROM (SELECT t.bucket, t.user_id, coalesce(t.provider, 'none') AS provider, t.status,
               date_trunc('hour', t.created_at, 'UTC') AS hour,
               CASE WHEN t.run_ms IS NULL THEN NULL ELSE least(15, floor(log(2.0, greatest(t.run_ms, 1)))::integer) END
                   AS duration_class,
               count(*) AS tasks, count(t.error) AS errors
          FROM ai_tasks AS t
          JOIN therev.fence AS f ON f.colocation_group = 'account' AND therev.may_read(f, t.bucket, t.user_id)
         GROUP BY 1, 2, 3, 4, 5, 6) AS c
 GROUP BY c.bucket, c.user_id, c.provider, c.status, c.hour;
-- The view is made here: nobody waits for it.
-- squawk-ignore require-concurrent-index-creation
CREATE UNIQUE INDEX ai_task_stats_key ON ai_task_stats (bucket, user_id, provider, status, hour);

SELECT therev.make_partitions(3);
