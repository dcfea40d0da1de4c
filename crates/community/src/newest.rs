//! What a state replaces that is older: the same text for the relay's statements, which take facts, and for those of bulk
//! writes, which take arrays.

/// The newer state of who wrote in a thread replaces the older one, whoever tells it.
macro_rules! newer_participant {
    () => {
        "
         ON CONFLICT (bucket, author_id, thread_id, participant_id) DO UPDATE
            SET posts = excluded.posts, deleted = excluded.deleted, last_post_at = excluded.last_post_at,
                version = excluded.version
          WHERE p.version < excluded.version"
    };
}
pub(crate) use newer_participant;

/// What an author has written in a thread besides, added to the contribution `c` that may be there; its version only grows.
macro_rules! added_contribution {
    () => {
        "
             ON CONFLICT (bucket, author_id, thread_id) DO UPDATE
                SET posts = c.posts + excluded.posts, last_post_at = greatest(c.last_post_at, excluded.last_post_at),
                    version = greatest(c.version + 1, excluded.version)"
    };
}
pub(crate) use added_contribution;

/// `kept`: the sums of `summed`, where they are later ones. A totals' version is the sum of the participants' versions:
/// the later sum is the greater one, whoever made it.
macro_rules! kept_totals {
    () => {
        "kept AS (
         INSERT INTO therev.thread_totals AS t
                (bucket, author_id, thread_id, posts, participants, last_post_at, version)
         SELECT s.bucket, s.author_id, s.thread_id, s.posts, s.participants, s.last_post_at, s.version
           FROM summed AS s
          ORDER BY s.thread_id
         ON CONFLICT (bucket, author_id, thread_id) DO UPDATE
            SET posts = excluded.posts, participants = excluded.participants, last_post_at = excluded.last_post_at,
                version = excluded.version
          WHERE t.version < excluded.version)"
    };
}
pub(crate) use kept_totals;

/// The participants of the threads `$from`, summed: one thread after the other, in the order of their key, so that nothing is
/// sorted. `is_there`: whether the thread has a row here, deleted or not; of one that has none the directory never hears.
macro_rules! summed {
    ($from:literal) => {
        concat!(
            "summed AS (
         SELECT t.bucket, t.author_id, t.thread_id, s.posts, s.participants, s.last_post_at, s.version,
                (SELECT true FROM threads AS h
                  WHERE h.bucket = t.bucket AND h.author_id = t.author_id AND h.thread_id = t.thread_id) IS NOT NULL
                    AS is_there
           FROM (",
            $from,
            ") AS t (bucket, author_id, thread_id)
          CROSS JOIN LATERAL (
                SELECT coalesce(sum(p.posts), 0)::integer AS posts,
                       (count(*) FILTER (WHERE p.posts > 0))::integer AS participants,
                       max(p.last_post_at) AS last_post_at, coalesce(sum(p.version), 1) AS version
                  FROM therev.thread_participants AS p
                 WHERE p.bucket = t.bucket AND p.author_id = t.author_id AND p.thread_id = t.thread_id) AS s)"
        )
    };
}
pub(crate) use summed;

/// `changed`: the directory's totals where those `told` are later ones. Rows are locked in the order of their key, as whoever
/// tells of threads locks them.
macro_rules! changed_totals {
    () => {
        "changed AS (
         UPDATE thread_directory AS d
            SET post_count = t.posts, last_activity_at = greatest(d.created_at, t.last_post_at),
                totals_version = t.version
           FROM (SELECT w.thread_id, n.posts, n.last_post_at, n.version
                   FROM told AS n JOIN thread_directory AS w USING (thread_id)
                  WHERE w.totals_version < n.version
                  ORDER BY w.thread_id
                    FOR UPDATE OF w) AS t
          WHERE d.thread_id = t.thread_id AND d.totals_version < t.version)
     SELECT d.thread_id FROM thread_directory AS d JOIN told AS t USING (thread_id)"
    };
}
pub(crate) use changed_totals;
