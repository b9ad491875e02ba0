"""`headrace check`: validates the settings and connects to every service."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import text

from app.catalogue import catalogue
from app.config.settings import Settings
from app.errors import HeadraceError, Misconfigured, TryLater
from workers.broker_admin import need_durable, need_redis
from workers.fetch.rate_limits import pauses
from workers.ingest import rabbitmq_pipeline
from workers.store.engine import make_engine, transaction

MIN_POSTGRES = 140000


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    what: str
    fine: bool
    text: str


def findings(settings: Settings) -> Iterator[Finding]:
    """Runs every check, even after one has failed."""
    checks: dict[str, Callable[[Settings], str]] = {
        "webhook secrets": _secrets,
        "encryption": _encryption,
        "stored data": _stored,
        "Junction's API": _junction,
        "broker": _broker,
        "rate limits": _limits,
        "database": _database,
        "Flower": _flower,
    }
    if settings.etl_url or settings.etl_queue:
        checks["ETL pipeline"] = lambda given: f"{rabbitmq_pipeline.queue_depth(given)} messages in {given.etl_queue}"
    for what, check in checks.items():
        try:
            yield Finding(what, fine=True, text=check(settings))
        except HeadraceError as error:
            yield Finding(what, fine=False, text=str(error))


def explain() -> list[dict[str, str]]:
    """Every setting: its name, its default and its meaning."""
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


def _junction(settings: Settings) -> str:
    with contextlib.suppress(TryLater):  # the check of the rate limits reports an unreachable Redis
        for pause in pauses(settings) if settings.has_redis else ():
            if pause.account == "junction" and pause.kind == "key_refused":
                raise Misconfigured(
                    f"{pause.reason}; set a valid key and restart the workers of lane backfill",
                    setting="JUNCTION_API_KEY",
                )
    if not settings.junction_api_key:
        return "JUNCTION_API_KEY is not set: workers store events but cannot fetch history"
    return f"history is fetched from {settings.junction_api_url}"


def _broker(settings: Settings) -> str:
    need_durable(settings)
    return "durability asserted by the operator" if settings.broker_durability_asserted else "durable"


def _limits(settings: Settings) -> str:
    need_redis(settings.need_redis(), "REDIS_URL" if settings.redis_url else "BROKER_URL")
    return "shared by all workers through Redis"


def _database(settings: Settings) -> str:
    engine = make_engine(settings, "headrace-check")
    try:
        with transaction(engine) as connection:  # its TryLater omits the driver's text, which names user and host
            number = int(connection.scalar(text("SELECT current_setting('server_version_num')")) or 0)
            migrated = connection.scalar(text("SELECT to_regclass('headrace.schema_version')"))
    except TryLater as error:
        raise Misconfigured(
            f"cannot connect to the database ({error}). "
            "Check that it is running and that user, password and database name are correct",
            setting="DATABASE_URL",
        ) from None
    finally:
        engine.dispose()
    if number < MIN_POSTGRES:
        raise Misconfigured(f"PostgreSQL {number // 10000} is too old; 14 or newer is needed", setting="DATABASE_URL")
    if migrated is None:
        raise Misconfigured("the schema is missing; run `headrace migrate`", setting="DATABASE_URL")
    return f"PostgreSQL {number // 10000}, migrated"


def _flower(settings: Settings) -> str:
    settings.need_flower_auth()
    return "password set"
