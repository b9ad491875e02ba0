{# The person of a row: one `client_user_id` may have several users, and a user may have none. #}
{% macro person_id(of="") -%}
    coalesce({{ of }}client_user_id, {{ of }}user_id)
{%- endmacro %}
