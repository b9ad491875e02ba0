{# Fails for each combination of columns or expressions that several rows have. #}
{% test unique_combination(model, columns) %}
SELECT {{ columns | join(", ") }} FROM {{ model }} GROUP BY {{ columns | join(", ") }} HAVING count(*) > 1
{% endtest %}
