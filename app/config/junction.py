"""Junction's regions, by the prefix of an API key."""

REGION_HOSTS = {
    "pk_us_": "https://api.us.junction.com",
    "pk_eu_": "https://api.eu.junction.com",
    "sk_us_": "https://api.sandbox.us.junction.com",
    "sk_eu_": "https://api.sandbox.eu.junction.com",
}
