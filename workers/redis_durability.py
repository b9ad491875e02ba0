"""Whether Redis or Valkey keeps what it confirmed: on its own disk, and on the replicas that could replace it."""

# ruff: noqa: PLC0415 - importing redis costs 0.1 s of CPU; many commands contact no broker
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from app.config import sentinel_url
from app.config.settings import Settings
from app.errors import Misconfigured, TryLater

if TYPE_CHECKING:
    import redis

    from app.broker.sentinel import Address

DURABLE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
WHY = {
    "appendonly": "without it, a restart loses every event that was answered 202",
    "appendfsync": "with any other value, a power cut loses the last second of events that were answered 202",
    "maxmemory-policy": "any other policy deletes events when memory runs out",
}
ASSERT = "set HEADRACE_BROKER_DURABILITY_ASSERTED=true"
TIMEOUT_SECONDS, CONNECT_SECONDS = 3.0, 2.0


def redis_client(url: str, node: "Address | None" = None) -> "redis.Redis":
    """A client with short timeouts, of the primary or of another node with the same login."""
    from app.broker.sentinel import make_client

    return make_client(url, node, timeout=TIMEOUT_SECONDS, connect_timeout=CONNECT_SECONDS)


def need_durable_redis(settings: Settings) -> Sequence[str]:
    """Raises Misconfigured if a confirmed event could be lost, and TryLater if that is not certain at the moment.

    Returns remarks for the operator. Raises redis.RedisError if the primary cannot be reached.
    """
    import redis

    from app.broker.sentinel import has_waitaof

    with redis_client(settings.need_broker()) as client:
        try:
            found = _configuration(client)
            replication, server = client.info("replication"), client.info("server")
        except redis.ResponseError:
            raise Misconfigured(
                "the broker forbids CONFIG GET or INFO, so its durability cannot be checked; if it is configured with "
                f"appendfsync always and noeviction, {ASSERT}",
                setting="BROKER_URL",
            ) from None
    if replication["role"] != "master":
        raise TryLater("the node at this address is a replica, which accepts no messages", setting="BROKER_URL")
    _need_safe("the broker", found)
    return _need_replicas(settings, replication, has_waitaof=has_waitaof(server["redis_version"]))


def _configuration(client: "redis.Redis") -> dict[str, str]:
    return {name: str(client.config_get(name).get(name)) for name in DURABLE}


def _need_safe(node: str, found: dict[str, str]) -> None:
    for name, wanted in DURABLE.items():
        if found[name] != wanted:
            raise Misconfigured(
                f"{node} has {name} {found[name]} but needs {wanted}: {WHY[name]}. "
                f"Fix it with CONFIG SET {name} {wanted}, or {ASSERT}",
                setting="BROKER_URL",
            )


def _need_replicas(settings: Settings, replication: dict[str, Any], *, has_waitaof: bool) -> Sequence[str]:
    wanted, url = settings.broker_replicas, settings.need_broker()
    replicas = [value for name, value in replication.items() if name.removeprefix("slave").isdigit()]
    online = [(str(one["ip"]), int(one["port"])) for one in replicas if one["state"] == "online"]
    if not wanted and (replicas or sentinel_url.is_sentinel(url)):
        raise Misconfigured(
            f"not set, and the broker has {len(replicas)} replicas: a failover would lose events that were answered "
            f"202. Set it to 1 or more, or, if no replica can become the primary, {ASSERT}",
            setting="HEADRACE_BROKER_REPLICAS",
        )
    if wanted > len(online):
        raise TryLater(
            f"set to {wanted}, but only {len(online)} replicas are connected to the broker. No event is accepted "
            "until there are as many; start replicas or lower the setting",
            setting="HEADRACE_BROKER_REPLICAS",
        )
    unknown = [one for one in online if not _is_safe(url, one)] if wanted else []
    names = ", ".join(f"{host}:{port}" for host, port in unknown)
    if unknown and not has_waitaof:
        raise Misconfigured(
            f"the settings of the replicas {names} cannot be read, and before Redis 7.2 a replica does not report what "
            f"it has on disk; if they have appendfsync always, {ASSERT}",
            setting="BROKER_URL",
        )
    return [f"the settings of the replicas {names} cannot be read"] if unknown else []


def _is_safe(url: str, replica: "Address") -> bool:
    """False if the settings of a replica cannot be read. Raises Misconfigured if they are unsafe."""
    import redis

    found = None
    with contextlib.suppress(redis.RedisError), redis_client(url, replica) as client:
        found = _configuration(client)
    if found is not None:
        _need_safe(f"the replica {replica[0]}:{replica[1]}", found)
    return found is not None
