"""`headrace check`: reads the configuration, connects to everything, says what is wrong and how to mend it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Engine, text

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
    """One thing that was looked at."""

    what: str
    fine: bool
    text: str


def findings(settings: Settings) -> Iterator[Finding]:
    """Looks at everything, each by itself, so that the first fault does not hide the second."""
    looks: list[tuple[str, Callable[[Settings], str]]] = [
        ("webhook secrets", _secrets),
        ("encryption", _encryption),
        ("what is kept", _kept),
        ("Junction's API", _junction),
        ("broker", _broker),
        ("rate limits", _limits),
        ("database", _database),
        ("Flower", _flower),
    ]
    if settings.etl_url or settings.etl_queue:
        looks.append(
            ("ETL pipeline", lambda given: f"{rabbitmq_pipeline.queue_depth(given)} messages wait in {given.etl_queue}")
        )
    for what, look in looks:
        try:
            yield Finding(what, fine=True, text=look(settings))
        except HeadraceError as error:
            yield Finding(what, fine=False, text=str(error))


def explain() -> list[dict[str, str]]:
    """Every setting: its name, its default and what it means."""
    return [
        {"setting": one.metadata["name"], "default": _default(one.default), "meaning": one.metadata["meaning"]}
        for one in fields(Settings)
    ]


def _default(value: Any) -> str:
    return "" if value in (None, ()) else str(value).lower() if isinstance(value, bool) else str(value)


def _secrets(settings: Settings) -> str:
    if settings.etl_url and not (settings.junction_webhook_secrets or settings.terra_signing_secrets):
        return "none: events come by the ETL pipeline, and `headrace web` does not start"
    settings.need_webhook_secret()
    counts = {"Junction": settings.junction_webhook_secrets, "Terra": settings.terra_signing_secrets}
    return ", ".join(f"{len(secrets)} for {name}" for name, secrets in counts.items() if secrets)


def _encryption(settings: Settings) -> str:
    if not settings.encryption_keys:
        return "bodies on the queue are compressed, not encrypted; set HEADRACE_ENCRYPTION_KEY to encrypt them"
    return f"AES-256-GCM, {len(settings.encryption_keys)} key(s)"


def _kept(settings: Settings) -> str:
    if unknown := set(settings.resources) - set(catalogue()):
        raise Misconfigured(f"no such resource: {', '.join(sorted(unknown))}", setting="HEADRACE_RESOURCES")
    resources = f"{len(settings.resources) or len(catalogue())} resources"
    return f"{resources}, {'all' if not settings.providers else ', '.join(settings.providers)} providers"


def _junction(settings: Settings) -> str:
    with contextlib.suppress(TryLater):  # which the broker's own line tells
        for pause in pauses(settings) if settings.has_redis else ():
            if pause.account == "junction" and pause.kind == "key_refused":
                raise Misconfigured(
                    f"{pause.reason}; set another, and restart workers of lane backfill",
                    setting="JUNCTION_API_KEY",
                )
    if not settings.junction_api_key:
        return "JUNCTION_API_KEY is not set here: without it workers store events, and fetch no history"
    return f"history is read from {settings.junction_api_url}"


def _broker(settings: Settings) -> str:
    need_durable(settings)
    return "keeps what it confirms" if not settings.broker_durability_asserted else "its durability is asserted by you"


def _limits(settings: Settings) -> str:
    need_redis(settings.need_redis(), "REDIS_URL" if settings.redis_url else "BROKER_URL")
    return "shared by all workers through Redis"


def _database(settings: Settings) -> str:
    engine: Engine = make_engine(settings, "headrace-check")
    try:
        with transaction(engine) as connection:  # the database's own words would name the user and the host
            number = int(connection.scalar(text("SELECT current_setting('server_version_num')")) or 0)
            migrated = connection.scalar(text("SELECT to_regclass('headrace.schema_version')"))
    except TryLater as error:
        raise Misconfigured(
            f"the database cannot be used ({error}): does it run, are user, password and name right?",
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
    return "has a password"
