"""`headrace check`: validates the settings and connects to every service."""

# ruff: noqa: PLC0415 - the libraries of a check are imported by it: together 0.6 s of CPU before the first line
import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from app.broker.lanes import is_amqp
from app.catalogue import catalogue
from app.config.settings import Settings
from app.errors import HeadraceError, Misconfigured, RetryAlone, TryLater
from workers.aggregators.requests import Request
from workers.broker_admin import need_durable, need_redis
from workers.fetch.rate_limits import pauses
from workers.fetch.retry import NO_ANSWER, describe

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

MIN_POSTGRES = 140000
API_SECONDS = 5.0
REPLICATION = "SELECT current_setting('synchronous_commit'), current_setting('synchronous_standby_names')"
# Each lists at most one user: the cheapest authenticated requests. They count against no rate and ignore pauses.
CHEAP_REQUESTS = {
    "junction": Request("/v2/user", (("limit", "1"),)),
    "terra": Request("/subscriptions", (("page", "0"), ("per_page", "1"))),
}


@dataclass(frozen=True)
class Finding:
    what: str
    fine: bool
    text: str
    is_warning: bool = False  # something to correct, although Headrace works


def findings(settings: Settings) -> Iterator[Finding]:
    """Runs every check, even after one has failed."""
    checks: dict[str, Callable[[Settings], str]] = {
        "webhook secrets": _secrets,
        "encryption": _encryption,
        "stored data": _stored,
        "Junction's API": lambda given: _api("junction", given),
        "Terra's API": lambda given: _api("terra", given),
        "broker": _broker,
        "rate limits": _limits,
        "database": _database,
        "Flower": _flower,
    }
    if settings.terra_admin_token:
        checks["Terra's Admin API"] = _terra_admin
    if settings.etl_url or settings.etl_queue:
        checks["ETL pipeline"] = _pipeline
    for what, check in checks.items():
        try:
            yield Finding(what, fine=True, text=check(settings))
        except HeadraceError as error:
            yield Finding(what, fine=False, text=str(error))
    if is_amqp(settings.broker_url or ""):
        yield from _cluster(settings)
    if settings.database_url:
        for text in replication_warnings(settings):
            yield Finding("PostgreSQL replication", fine=True, text=text, is_warning=True)


def _cluster(settings: Settings) -> Iterator[Finding]:
    """Warnings about RabbitMQ's cluster. None about a single broker whose management API cannot be used."""
    from workers.operate import rabbitmq_cluster
    from workers.rabbitmq_management import Unavailable

    what, is_cluster = "RabbitMQ cluster", ";" in settings.need_broker()
    try:
        found = rabbitmq_cluster.warnings(settings)
    except Unavailable as error:
        text = (
            f"members of queues, net_ticktime and delivery limits are not checked ({error}); enable the plugin "
            "rabbitmq_management, or set HEADRACE_BROKER_MANAGEMENT_URL"
        )
        found = [text] if is_cluster else []
    else:
        if not found and is_cluster:
            text = "every queue has a member on every node; RabbitMQ does not show whether "
            yield Finding(what, fine=True, text=f"{text}cluster_partition_handling is pause_minority, as it must be")
    for text in found:
        yield Finding(what, fine=True, text=text, is_warning=True)


def explain() -> list[dict[str, str]]:
    return [
        {"setting": one.metadata["name"], "default": _default(one.default), "meaning": one.metadata["meaning"]}
        for one in fields(Settings)
    ]


def _default(value: Any) -> str:
    return "" if value in (None, ()) else str(value).lower() if isinstance(value, bool) else str(value)


def _secrets(settings: Settings) -> str:
    if settings.etl_url and not (settings.junction_webhook_secrets or settings.terra_signing_secrets):
        return "not set: events arrive through the ETL pipeline, and `headrace web` refuses to start"
    settings.need_webhook_secret()
    counts = {"Junction": settings.junction_webhook_secrets, "Terra": settings.terra_signing_secrets}
    return ", ".join(f"{len(secrets)} for {name}" for name, secrets in counts.items() if secrets)


def _encryption(settings: Settings) -> str:
    if not settings.encryption_keys:
        return "queued bodies are compressed, not encrypted; set HEADRACE_ENCRYPTION_KEY to encrypt them"
    return f"AES-256-GCM, {len(settings.encryption_keys)} key(s)"


def _stored(settings: Settings) -> str:
    if unknown := set(settings.resources) - set(catalogue()):
        raise Misconfigured(f"no such resource: {', '.join(sorted(unknown))}", setting="HEADRACE_RESOURCES")
    return (
        f"{len(settings.resources) or len(catalogue())} resources, {', '.join(settings.providers) or 'all'} providers"
    )


def _api(name: str, settings: Settings) -> str:
    key, base = f"{name.upper()}_API_KEY", f"{name.upper()}_BASE_URL"
    text = f"{key} is not set: workers store events but cannot fetch history"
    if name in settings.readable:
        from workers.aggregators.registry import AGGREGATORS

        base_url, headers = AGGREGATORS[name].connect(settings)
        hint = "set a valid key" + (", and its developer id as TERRA_DEV_ID" if name == "terra" else "")
        _answer(base_url, headers, CHEAP_REQUESTS[name], (key, base), hint, accepted=(200, 429))
        text = f"the key is accepted; history is fetched from {base_url}"
    with contextlib.suppress(TryLater):  # the check of the rate limits reports an unreachable Redis
        _need_accepted_keys(name, settings)
    return text


def _pipeline(settings: Settings) -> str:
    from workers.ingest import rabbitmq_pipeline

    return f"{rabbitmq_pipeline.queue_depth(settings)} messages in {settings.etl_queue}"


def _terra_admin(settings: Settings) -> str:
    from workers.aggregators.terra import admin

    settings.need_terra_api_key()  # without it, workers cannot fetch the data of lost deliveries
    base_url, headers = admin.connect(settings)
    settings_of = ("TERRA_ADMIN_TOKEN", "TERRA_ADMIN_BASE_URL")
    body = _answer(base_url, headers, admin.token_request(), settings_of, "set a valid token", accepted=(200,))
    expires_at = admin.read_token(body).expires_at
    return f"the token is accepted{f'; it expires on {expires_at:%Y-%m-%d}' if expires_at else ''}"


def _answer(
    base_url: str,
    headers: Mapping[str, str],
    request: Request,
    settings: tuple[str, str],
    hint: str,
    *,
    accepted: tuple[int, ...],
) -> bytes:
    """The body of an answer. Raises Misconfigured if the key is refused, or the answer is missing or of another status.

    `settings` are the names of the key's and of the URL's setting.
    """
    from workers.fetch.http import Client

    with contextlib.closing(Client(base_url, headers, timeout=API_SECONDS)) as client:
        response = client.fetch(request)
    status = response.status
    if status in (401, 403):
        raise Misconfigured(f"refused by {base_url} ({describe(status)}); {hint}", setting=settings[0])
    if status == NO_ANSWER or status >= 500:
        what = f"{base_url} is unreachable ({describe(status)}); check the network, DNS and the URL"
        raise Misconfigured(what, setting=settings[1])
    if status not in accepted:
        raise Misconfigured(f"{base_url} answers {describe(status)}; check the URL", setting=settings[1])
    return response.body


def _need_accepted_keys(name: str, settings: Settings) -> None:
    """Raises Misconfigured if another API key than this shell's was refused: it may be the key of the workers."""
    for pause in pauses(settings) if settings.has_redis else ():
        if pause.account == name and pause.kind == "key_refused" and not pause.is_own:
            which = f" for key {pause.key}, which is not the one in this shell" if pause.is_own is False else ""
            raise Misconfigured(
                f"{pause.reason}{which}; set a valid key and restart the workers of lane backfill",
                setting=f"{name.upper()}_API_KEY",
            )


def _broker(settings: Settings) -> str:
    remarks = need_durable(settings)
    if settings.broker_durability_asserted:
        return "durability asserted by the operator"
    return "; ".join(["durable", *remarks])


def _limits(settings: Settings) -> str:
    need_redis(settings.need_redis(), "REDIS_URL" if settings.redis_url else "BROKER_URL")
    return "shared by all workers through Redis"


@contextlib.contextmanager
def _connected(settings: Settings) -> Iterator["tuple[Engine, Connection]"]:
    """Raises TryLater, whose text omits that of the driver, which names user and host."""
    from workers.store.engine import make_engine, transaction

    engine = make_engine(settings, "headrace-check")
    try:
        with transaction(engine) as connection:
            yield engine, connection
    finally:
        engine.dispose()


def _database(settings: Settings) -> str:
    from sqlalchemy import text

    from workers.store.migrate import need_utf8

    try:
        with _connected(settings) as (engine, connection):
            number = int(connection.scalar(text("SELECT current_setting('server_version_num')")) or 0)
            need_utf8(connection)
            migrated = connection.scalar(text("SELECT to_regclass('headrace.schema_version')"))
            unsplit = _unsplit(engine)
    except TryLater as error:
        raise Misconfigured(
            f"cannot connect to the database ({error}). "
            "Check that it is running and that user, password and database name are correct",
            setting="DATABASE_URL",
        ) from None
    if number < MIN_POSTGRES:
        raise Misconfigured(f"PostgreSQL {number // 10000} is too old; 14 or newer is needed", setting="DATABASE_URL")
    if migrated is None:
        raise Misconfigured("the schema is missing; run `headrace migrate`", setting="DATABASE_URL")
    hint = f"; run `headrace migrate --convert` to split {', '.join(unsplit)} into months" if unsplit else ""
    return f"PostgreSQL {number // 10000}, migrated{hint}"


def replication_warnings(settings: Settings) -> list[str]:
    """Settings with which PostgreSQL could lose an applied delivery; none if another check reports that it is away.

    A worker acknowledges a message when its deliveries are committed: what PostgreSQL loses afterwards is not sent
    again. It can be restored from the archive of another copy only, or fetched from the aggregator.
    """
    from sqlalchemy import make_url, text

    try:
        with _connected(settings) as (_, connection):
            commit, standbys = connection.execute(text(REPLICATION)).one()
    except TryLater:
        return []
    if commit == "off":
        return ["synchronous_commit is off: a crash of PostgreSQL loses applied deliveries; set it to on"]
    if "," not in str(make_url(settings.need_database()).query.get("host", "")):
        return []
    loses = "the loss of the primary loses applied deliveries"
    if not standbys:
        return [f"synchronous_standby_names is empty: {loses}; name the standbys, or use Patroni's synchronous_mode"]
    return [f"synchronous_commit is local: {loses}; set it to on"] if commit == "local" else []


def _unsplit(engine: "Engine") -> list[str]:
    """The tables that should be split into months; none if finding them takes too long, or a lock prevents it."""
    from sqlalchemy import text

    from workers.store import partitions
    from workers.store.engine import transaction

    with contextlib.suppress(RetryAlone), transaction(engine) as connection:
        connection.execute(text("SET LOCAL statement_timeout = '5s'"))  # a scan of samples_other
        return partitions.misplaced(connection)
    return []


def _flower(settings: Settings) -> str:
    settings.need_flower_auth()
    return "password set"
