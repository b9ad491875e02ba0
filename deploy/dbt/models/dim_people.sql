-- Built last, so that a person who arrives during a build is not missing here:
-- depends_on: {{ ref('fct_days') }}, {{ ref('fct_sleep') }}
WITH people AS (
    SELECT {{ person_id() }} AS person_id, max(client_user_id) AS client_user_id, count(*) AS users,
           min(first_seen) AS first_seen
    FROM {{ source("health", "users") }} WHERE erased_at IS NULL GROUP BY 1
),
connected AS (
    SELECT {{ person_id("users.") }} AS person_id,
           string_agg(DISTINCT provider, ', ' ORDER BY provider) FILTER (WHERE status = 'connected') AS providers,
           count(*) FILTER (WHERE status = 'connected') AS connections,
           count(*) FILTER (WHERE status = 'error') AS connections_in_error
    FROM {{ source("health", "connections") }} JOIN {{ source("health", "users") }} USING (user_id)
    WHERE users.erased_at IS NULL GROUP BY 1
),
days AS (
    SELECT {{ person_id() }} AS person_id, min(local_date) AS first_date, max(local_date) AS last_date,
           count(DISTINCT local_date) AS days_with_data
    FROM {{ source("health", "daily") }} GROUP BY 1
)
SELECT
    person_id,
    client_user_id,
    users,
    first_seen,
    first_date,
    last_date,
    coalesce(days_with_data, 0) AS days_with_data,
    providers,
    coalesce(connections, 0) AS connections,
    coalesce(connections_in_error, 0) AS connections_in_error
FROM people LEFT JOIN connected USING (person_id) LEFT JOIN days USING (person_id)
