"""Junction's raw summaries: the records of a provider before Junction unifies them."""

from flask import Response, request

from app.catalogue import Resource, catalogue
from workers.simulator.answers import answer, refuse, window
from workers.simulator.data import World
from workers.simulator.people import PROVIDERS
from workers.simulator.query import Query, Record
from workers.simulator.users import known

# The resource by its name in the path, which is also the name of the array in the response.
RESOURCES = {name: name for name in ("activity", "body", "profile", "sleep", "workouts")} | {"devices": "device"}
PRIORITY = 1


def read_raw(world: World, name: str, user_id: str) -> Response:
    """The raw records of a user. A profile is one object, other resources are arrays."""
    resource = catalogue()[RESOURCES.get(name) or refuse(404, "Not Found")]
    user, is_dated = known(world, user_id), resource.kind == "summary" and resource.dates != "none"
    start, end = window(resource, world.until) if is_dated else (world.start, world.until)
    slots = world.within(Query(user, resource, start, end, request.args.get("provider")))
    found = [_raw(resource, world.record(slot)) for slot in slots]
    if name == "profile":
        return answer({name: found[0] if found else refuse(404, "Not found")})
    return answer({name: found})


def _raw(resource: Resource, record: Record) -> Record:
    """A record in the raw form. The simulated providers have no formats of their own: `data` is the unified record."""
    slug = record["source"]["provider"] if "source" in record else record["provider"]
    raw: Record = {
        "id": record["id"],
        "user_id": record["user_id"],
        "data": record,
        "provider_id": record.get("provider_id") or record["id"],
        "source_id": list(PROVIDERS).index(slug) + 1,
        "source": PROVIDERS[slug].described(),
    }
    if resource.kind == "device":
        return raw
    raw |= {"priority_id": PRIORITY, "created_at": record["created_at"], "updated_at": record["updated_at"]}
    if resource.dates != "none":
        at = record.get("time_start") or record.get("bedtime_start") or record["date"]
        raw |= {"timestamp": at, "source_device_id": record.get("source_device_id")}
    if "sport" in record:
        raw |= {"sport": record["sport"], "sport_id": record["sport"]["id"]}
    return raw
