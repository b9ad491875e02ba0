{# Fails for each row with a value outside of the limits, which are inclusive. Null passes. #}
{% test within(model, column_name, least=none, most=none) %}
SELECT {{ column_name }} FROM {{ model }} WHERE false
{% if least is not none %} OR {{ column_name }} < {{ least }} {% endif %}
{% if most is not none %} OR {{ column_name }} > {{ most }} {% endif %}
{% endtest %}
