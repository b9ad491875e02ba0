"""The providers that the aggregators' public documents name, in lower case. The aggregators add new ones at any time.

Junction: `Providers` and `OAuthProviders` of its OpenAPI document. Terra: docs.tryterra.co, "Supported integrations".
"""

_JUNCTION = """
abbott_libreview accuchek_ble apple_health_kit beurer_api beurer_ble contour_ble cronometer dexcom dexcom_v3
eight_sleep fitbit freestyle_libre freestyle_libre_ble garmin google_fit google_health hammerhead health_connect
ihealth kardia manual map_my_fitness my_fitness_pal my_fitness_pal_v2 omron omron_ble onetouch_ble oura peloton polar
renpho runkeeper samsung_health strava tandem_source ultrahuman wahoo whoop whoop_v2 withings zwift
"""
_TERRA = """
aktiia apple biostrap brytonsport cardiomood clue concept2 coros cronometer cyclinganalytics decathlon dexcom
eatthismuch eight eightsleep fatsecret finalsurge fitbit freestylelibre garmin google google_health hammerhead
health_connect healthgauge huawei ifit inbody ketomojoeu ketomojous komoot lezyne liverowing macrosfirst mira moxy
myfitnesspal nolio nutracheck omron omronus oura peloton polar pul renpho ridewithgps rouvy samsung somnofy strava
suunto technogym tempo todaysplan trainasone trainerroad trainingpeaks trainxhale tredict tridot ultrahuman underarmour
wahoo whoop withings zwift
"""
KNOWN = frozenset(_JUNCTION.split()).union(_TERRA.split())
