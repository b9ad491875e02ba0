SELECT
    {{ person_id() }} AS person_id,
    local_date,
    {% for metric in var("headrace_metrics") -%}
    max(value) FILTER (WHERE metric = '{{ metric }}') AS {{ adapter.quote(metric) }},
    {% endfor -%}
    max(covered_minutes) FILTER (WHERE metric = 'heartrate_avg') AS heartrate_minutes,
    max(provider) FILTER (WHERE metric = 'steps') AS steps_provider,
    bool_and(zone_source <> 'utc') AS is_local_date,
    max(computed_at) AS computed_at
FROM {{ source("health", "daily") }}
WHERE metric IN ('{{ var("headrace_metrics") | join("', '") }}')
GROUP BY 1, 2
