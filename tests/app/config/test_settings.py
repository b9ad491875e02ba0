"""Settings: accepted and rejected values, and messages without values."""

import base64
import traceback
from dataclasses import fields

import pytest

from app.accounts import hash_password
from app.config.settings import Settings, load
from app.errors import Misconfigured
from tests.support import ENCRYPTION_KEY, JUNCTION_SECRET, TERRA_SECRET
from tests.support.cases import Failures

KEY = base64.b64encode(ENCRYPTION_KEY).decode()
OTHER_KEY = base64.b64encode(bytes(range(1, 33))).decode()
OTHER_SECRET = "whsec_" + base64.b64encode(b"another-secret-of-tests").decode()


def test_defaults() -> None:
    """Breaks if an empty environment is rejected or a default changes."""
    settings = load({})
    assert settings == Settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert (settings.max_body_bytes, settings.enqueue_deadline_seconds) == (64 * 1024 * 1024, 4.0)
    assert (settings.terra_tolerance_seconds, settings.visibility_timeout_seconds) == (300, 60)
    assert (settings.message_deliveries, settings.message_bytes) == (200, 4 * 1024 * 1024)
    assert (settings.fetch_history, settings.reconcile_hours) == (True, 24)
    assert (settings.request_rate, settings.provider_rate) == ("50/second", None)
    assert (settings.backfills_per_user, settings.backfills_per_account) == (4, 32)
    assert settings.broker_durability_asserted is False
    assert settings.terra_base_url == "https://access.tryterra.co/api/v2"
    assert (settings.junction_webhook_secrets, settings.terra_signing_secrets, settings.encryption_keys) == ((), (), ())


def test_every_setting_has_its_own_name_and_a_meaning() -> None:
    """Breaks if two settings read the same variable or one has no description."""
    names = [one.metadata["name"] for one in fields(Settings)]
    assert len(set(names)) == len(names)
    assert all(name.isupper() for name in names)
    assert all(one.metadata["meaning"] and one.metadata["type"].want for one in fields(Settings))


@pytest.mark.parametrize("blank", ["", "   ", "\n"])
def test_a_blank_variable_counts_as_not_set(blank: str) -> None:
    """Breaks if `PORT=` in an env file is rejected or counts as a value."""
    assert load({one.metadata["name"]: blank for one in fields(Settings)}) == Settings()


def test_variables_are_read() -> None:
    """Breaks if a documented form is rejected or misread."""
    failures = Failures()
    for name, value, attribute, expected in (
        ("DATABASE_URL", "postgresql://u:p@h/d", "database_url", "postgresql+psycopg://u:p@h/d"),
        ("DATABASE_URL", "postgres://u:p@h/d?x=1", "database_url", "postgresql+psycopg://u:p@h/d?x=1"),
        ("DATABASE_URL", "postgresql+psycopg://u:p@h/d", "database_url", "postgresql+psycopg://u:p@h/d"),
        ("DATABASE_URL", "postgresql:///d?host=/run", "database_url", "postgresql+psycopg:///d?host=/run"),
        ("BROKER_URL", "redis://:p@h:6379/0", "broker_url", "redis://:p@h:6379/0"),
        ("BROKER_URL", "rediss://h", "broker_url", "rediss://h"),
        ("BROKER_URL", "amqp://u:p@h//", "broker_url", "amqp://u:p@h//"),
        ("BROKER_URL", " amqps://h ", "broker_url", "amqps://h"),
        ("REDIS_URL", "redis://h", "redis_url", "redis://h"),
        ("JUNCTION_BASE_URL", "http://127.0.0.1:9", "junction_base_url", "http://127.0.0.1:9"),
        ("JUNCTION_BASE_URL", "http://[::1]:9/x", "junction_base_url", "http://[::1]:9/x"),
        ("TERRA_BASE_URL", "http://localhost:9", "terra_base_url", "http://localhost:9"),
        ("TERRA_ADMIN_BASE_URL", "https://proxy.example/a", "terra_admin_base_url", "https://proxy.example/a"),
        ("TERRA_SIGNATURE_TOLERANCE_SECONDS", "86400", "terra_tolerance_seconds", 86400),
        ("HEADRACE_WEB_PROCESSES", "1", "web_processes", 1),
        ("HEADRACE_KEEP_DAYS", "0", "keep_days", 0),
        ("HEADRACE_FLOWER_HOST", "10.0.0.1", "flower_host", "10.0.0.1"),
        ("JUNCTION_WEBHOOK_SECRET", JUNCTION_SECRET, "junction_webhook_secrets", (JUNCTION_SECRET,)),
        (
            "JUNCTION_WEBHOOK_SECRET",
            f"{OTHER_SECRET}, {JUNCTION_SECRET},",
            "junction_webhook_secrets",
            (OTHER_SECRET, JUNCTION_SECRET),
        ),
        ("TERRA_SIGNING_SECRET", f"{TERRA_SECRET},{'x' * 16}", "terra_signing_secrets", (TERRA_SECRET, "x" * 16)),
        ("HEADRACE_ENCRYPTION_KEY", f"{KEY}, {OTHER_KEY}", "encryption_keys", (ENCRYPTION_KEY, bytes(range(1, 33)))),
        ("HEADRACE_RESOURCES", "workouts, sleep", "resources", ("workouts", "sleep")),
        ("HEADRACE_MAX_BODY_BYTES", "100", "max_body_bytes", 100),
        ("HEADRACE_ENQUEUE_DEADLINE_SECONDS", "0.5", "enqueue_deadline_seconds", 0.5),
        ("HEADRACE_BROKER_DURABILITY_ASSERTED", "Yes", "broker_durability_asserted", True),
        ("HEADRACE_BROKER_DURABILITY_ASSERTED", "0", "broker_durability_asserted", False),
        ("HEADRACE_LOG_LEVEL", "debug", "log_level", "DEBUG"),
        ("JUNCTION_API_KEY", "sk_us_x", "junction_api_key", "sk_us_x"),
        ("HEADRACE_PROVIDERS", "Garmin, OURA,", "providers", ("garmin", "oura")),
        ("HEADRACE_RESOURCES", "Sleep,SLEEP_STREAM", "resources", ("sleep", "sleep_stream")),
        ("HEADRACE_FETCH_HISTORY", "false", "fetch_history", False),
        ("HEADRACE_REQUEST_RATE", "7/minute", "request_rate", "7/minute"),
        ("HEADRACE_PROVIDER_RATE", "10/second", "provider_rate", "10/second"),
        ("HEADRACE_PROVIDER_RATE", "3000/hour", "provider_rate", "3000/hour"),
        ("HEADRACE_BACKFILLS_PER_USER", "9", "backfills_per_user", 9),
        ("HEADRACE_BACKFILLS_PER_ACCOUNT", "99", "backfills_per_account", 99),
        ("HEADRACE_RECONCILE_HOURS", "0", "reconcile_hours", 0),
        ("HEADRACE_RECONCILE_HOURS", "168", "reconcile_hours", 168),
    ):
        with failures.of(name, value, attribute, expected):
            assert getattr(load({name: value}), attribute) == expected
    assert failures == {}


UNUSABLE = [
    ("DATABASE_URL", "mysql://canary@h/d"),
    ("DATABASE_URL", "canary"),
    ("DATABASE_URL", "postgresql://"),
    ("DATABASE_URL", "postgresql+asyncpg://canary@h/d"),
    ("DATABASE_URL", "postgresql://u:canary@[::1/d"),
    ("DATABASE_URL", "postgresql://u:canary@h/d?target_session_attrs=read_write"),
    ("DATABASE_URL", "postgresql://u:canary@a,b/d?target_session_attrs=canary"),
    ("DATABASE_URL", "postgresql://u:canary@a,,b/d"),
    ("DATABASE_URL", "postgresql://u:canary@a:1,b:0/d"),
    ("DATABASE_URL", "postgresql://u:canary@a:1,b:65536/d"),
    ("DATABASE_URL", "postgresql://u:canary@a:1,b:\u0665/d"),
    ("DATABASE_URL", "postgresql://u:canary@/d?host=a,b&port=1,2,3"),
    ("DATABASE_URL", "postgresql://u:canary@a,b/d?canary"),
    ("BROKER_URL", "http://canary"),
    ("BROKER_URL", "memory://canary"),
    ("BROKER_URL", "redis://"),
    ("BROKER_URL", "redis://[canary"),
    ("REDIS_URL", "amqp://canary"),
    ("JUNCTION_BASE_URL", "ftp://canary"),
    ("JUNCTION_BASE_URL", "canary"),
    ("TERRA_BASE_URL", "canary"),
    ("TERRA_ADMIN_BASE_URL", "canary"),
    ("JUNCTION_WEBHOOK_SECRET", "canarycanarycanary"),
    ("JUNCTION_WEBHOOK_SECRET", JUNCTION_SECRET.removeprefix("whsec_")),
    ("JUNCTION_WEBHOOK_SECRET", "whsec_"),
    ("JUNCTION_WEBHOOK_SECRET", "whsec_Y2FuYXJ5"),
    ("JUNCTION_WEBHOOK_SECRET", JUNCTION_SECRET + "%canary"),
    ("JUNCTION_WEBHOOK_SECRET", JUNCTION_SECRET[:-1]),
    ("JUNCTION_WEBHOOK_SECRET", JUNCTION_SECRET + "\u00e9canary"),
    ("JUNCTION_WEBHOOK_SECRET", f"{JUNCTION_SECRET},whsec_canary"),
    ("TERRA_SIGNING_SECRET", "canary"),
    ("TERRA_SIGNING_SECRET", f"{TERRA_SECRET},canary"),
    ("HEADRACE_ENCRYPTION_KEY", "canary"),
    ("HEADRACE_ENCRYPTION_KEY", base64.b64encode(bytes(31)).decode()),
    ("HEADRACE_ENCRYPTION_KEY", base64.b64encode(bytes(33)).decode()),
    ("HEADRACE_ENCRYPTION_KEY", f"{KEY},canary"),
    ("HEADRACE_ENCRYPTION_KEY", KEY[:20] + " " + KEY[20:]),
    ("TERRA_SIGNATURE_TOLERANCE_SECONDS", "canary"),
    ("HEADRACE_MAX_BODY_BYTES", "-1"),
    ("HEADRACE_MAX_BODY_BYTES", "1.5"),
    ("HEADRACE_MAX_BODY_BYTES", "9" * 5000),
    ("HEADRACE_ENQUEUE_DEADLINE_SECONDS", "canary"),
    ("HEADRACE_ENQUEUE_DEADLINE_SECONDS", "0"),
    ("HEADRACE_ENQUEUE_DEADLINE_SECONDS", "-1"),
    ("HEADRACE_ENQUEUE_DEADLINE_SECONDS", "nan"),
    ("HEADRACE_ENQUEUE_DEADLINE_SECONDS", "inf"),
    ("HEADRACE_BROKER_DURABILITY_ASSERTED", "canary"),
    ("HEADRACE_PORT", "canary"),
    ("HEADRACE_WEB_PROCESSES", "two"),
    ("HEADRACE_FLOWER_PORT", "canary"),
    ("HEADRACE_MESSAGE_DELIVERIES", "canary"),
    ("HEADRACE_MESSAGE_BYTES", "canary"),
    ("HEADRACE_VISIBILITY_TIMEOUT_SECONDS", "canary"),
    ("DATABASE_URL", "postgresql:/canary"),
    ("HEADRACE_ENQUEUE_DEADLINE_SECONDS", "60"),
    ("HEADRACE_ENCRYPTION_KEY", ","),
    ("HEADRACE_LOG_LEVEL", "canary"),
    ("BROKER_URL", "redis://h:canary"),
    ("BROKER_URL", "redis:///0"),
    ("HEADRACE_PORT", "70000"),
    ("HEADRACE_RESOURCES", "canary"),
    ("HEADRACE_BACKFILLS_PER_USER", "canary"),
    ("HEADRACE_BACKFILLS_PER_USER", "-1"),
    ("HEADRACE_BACKFILLS_PER_ACCOUNT", "2.5"),
    ("HEADRACE_RECONCILE_HOURS", "-24"),
    ("HEADRACE_RECONCILE_HOURS", "daily"),
    ("HEADRACE_FETCH_HISTORY", "maybe"),
    ("HEADRACE_RESOURCES", "workouts,canary"),
    # Every request to an API carries its key, so http is for this machine only.
    ("JUNCTION_BASE_URL", "http://api.canary.example"),
    ("JUNCTION_BASE_URL", "http://127.0.0.1.canary.example"),
    ("JUNCTION_BASE_URL", "http://10.0.0.1/canary"),
    ("TERRA_BASE_URL", "http://access.canary.example/api/v2"),
    ("TERRA_ADMIN_BASE_URL", "http://0.0.0.0/canary"),
    ("TERRA_BASE_URL", "https://user:canary@h/"),
    ("TERRA_BASE_URL", "https://h/a?canary=1"),
    ("TERRA_BASE_URL", "https://h/a#canary"),
    ("TERRA_BASE_URL", "https://h/canary/../x"),
    # A key of equal bytes is a placeholder.
    ("HEADRACE_ENCRYPTION_KEY", base64.b64encode(bytes(32)).decode()),
    ("HEADRACE_ENCRYPTION_KEY", base64.b64encode(b"k" * 32).decode()),
    ("HEADRACE_ENCRYPTION_KEY", f"{KEY},{base64.b64encode(bytes(32)).decode()}"),
    ("HEADRACE_WEB_PROCESSES", "0"),
    ("HEADRACE_WEB_PROCESSES", "1001"),
    ("HEADRACE_MAX_BODY_BYTES", "0"),
    ("HEADRACE_MAX_BODY_BYTES", "1073741825"),
    ("HEADRACE_MAX_BODY_BYTES", "1_000"),
    ("HEADRACE_MAX_BODY_BYTES", "\u0661\u0662"),
    ("HEADRACE_MAX_DOWNLOAD_BYTES", "0"),
    ("HEADRACE_MESSAGE_BYTES", "0"),
    ("HEADRACE_MESSAGE_DELIVERIES", "0"),
    ("HEADRACE_VISIBILITY_TIMEOUT_SECONDS", "0"),
    ("HEADRACE_VISIBILITY_TIMEOUT_SECONDS", "86401"),
    ("TERRA_SIGNATURE_TOLERANCE_SECONDS", "0"),
    ("TERRA_SIGNATURE_TOLERANCE_SECONDS", "86401"),
    ("HEADRACE_HISTORY_DAYS", "0"),
    ("HEADRACE_HISTORY_DAYS", "1000000"),
    ("HEADRACE_KEEP_DAYS", "1000000"),
    ("HEADRACE_LEDGER_DAYS", "39"),
    ("HEADRACE_RETENTION", "workouts=1000000"),
    ("HEADRACE_RETENTION", "workouts=-1"),
    # HEADRACE_FETCH_HISTORY turns backfills off, not a limit of 0.
    ("HEADRACE_BACKFILLS_PER_USER", "0"),
    ("HEADRACE_BACKFILLS_PER_ACCOUNT", "0"),
]


def test_an_unusable_value_names_its_variable_and_is_not_shown() -> None:
    """Breaks if an invalid value is accepted, or a part of it, possibly a secret, is in the message or traceback."""
    failures = Failures()
    for name, value in UNUSABLE:
        with failures.of(name, value):
            with pytest.raises(Misconfigured) as refused:
                load({name: value})
            error = refused.value
            assert str(error).startswith(f"{name}: not usable; it should be ")
            assert error.__cause__ is None
            assert error.__suppress_context__
            printed = "".join(traceback.format_exception(error))
            assert not any(text in printed for text in ("canary", JUNCTION_SECRET[:-1], TERRA_SECRET, KEY[:20], "999"))
    assert failures == {}


def test_its_repr_hides_secrets() -> None:
    """Breaks if the repr contains a secret or a new secret is not marked as one."""
    secret = {
        "DATABASE_URL": "postgresql://u:canary@h/d",
        "BROKER_URL": "redis://:canary@h",
        "REDIS_URL": "redis://:canary@h",
        "JUNCTION_API_KEY": "sk_us_canary",
        "JUNCTION_WEBHOOK_SECRET": JUNCTION_SECRET,
        "TERRA_API_KEY": "canary",
        "TERRA_ADMIN_TOKEN": "terra_at_canary",
        "TERRA_SIGNING_SECRET": TERRA_SECRET,
        "HEADRACE_ENCRYPTION_KEY": base64.b64encode(ENCRYPTION_KEY).decode(),
        "HEADRACE_FLOWER_AUTH": "canary-canary:canary-canary",
        "HEADRACE_CONSOLE_USERS": f"ada:{hash_password('canary')}:viewer",
        "HEADRACE_WRITER_PASSWORD": "canary",
        "HEADRACE_BROKER_MANAGEMENT_URL": "http://u:canary@h:15672",
        "HEADRACE_ETL_URL": "amqp://u:canary@h",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://u:canary@h",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://u:canary@h/v1/traces",
    }
    settings = load(secret | {"HEADRACE_PORT": "1234"})
    assert {one.metadata["name"] for one in fields(Settings) if one.metadata["secret"]} == set(secret)
    shown = f"{settings!r} {settings}"
    assert "port=1234" in shown
    assert not any(
        value in shown for value in ("canary", "scrypt", JUNCTION_SECRET, TERRA_SECRET, repr(ENCRYPTION_KEY))
    )


def test_the_region_follows_from_the_key() -> None:
    """Breaks if a key is sent to the host of another region or environment."""
    failures = Failures()
    for key, base, url in (
        ("pk_us_x", None, "https://api.us.junction.com"),
        ("pk_eu_x", None, "https://api.eu.junction.com"),
        ("sk_us_x", None, "https://api.sandbox.us.junction.com"),
        ("sk_eu_x", None, "https://api.sandbox.eu.junction.com"),
        ("pk_us_x", "http://localhost:9/", "http://localhost:9"),
        (None, "http://localhost:9", "http://localhost:9"),
    ):
        with failures.of(key, base, url):
            assert Settings(junction_api_key=key, junction_base_url=base).junction_api_url == url
    assert failures == {}


@pytest.mark.parametrize("key", [None, "canary", "pk_ap_canary", "xpk_us_canary"])
def test_an_unknown_region_is_refused(key: str | None) -> None:
    """Breaks if a key of an unknown region is sent to a host or shown."""
    with pytest.raises(Misconfigured, match="JUNCTION_BASE_URL") as refused:
        _ = Settings(junction_api_key=key).junction_api_url
    assert "canary" not in str(refused.value)


def test_keeps() -> None:
    """Breaks if an unwanted resource or provider is stored, or a wanted one is not."""
    failures = Failures()
    for resources, providers, kept in (
        ((), (), True),
        (("workouts",), (), True),
        (("sleep",), (), False),
        ((), ("garmin", "oura"), True),
        ((), ("oura",), False),
        (("workouts",), ("garmin",), True),
        (("workouts",), ("oura",), False),
        (("sleep",), ("garmin",), False),
    ):
        with failures.of(resources, providers, kept):
            assert Settings(resources=resources, providers=providers).keeps("workouts", "garmin") is kept
    assert failures == {}


def test_a_missing_required_setting_is_named() -> None:
    """Breaks if a process starts without a required setting, or the error does not name it."""
    needs = {
        "DATABASE_URL": Settings().need_database,
        "BROKER_URL": Settings().need_broker,
        "JUNCTION_WEBHOOK_SECRET": Settings().need_webhook_secret,
        "HEADRACE_FLOWER_AUTH": Settings().need_flower_auth,
    }
    for name, need in needs.items():
        with pytest.raises(Misconfigured, match=f"^{name}: not set; set it to .*headrace up"):
            need()


def test_a_required_setting_is_returned() -> None:
    """Breaks if the broker does not fall back to REDIS_URL, or one provider's secret is not enough."""
    assert Settings(database_url="d").need_database() == "d"
    assert Settings(broker_url="b", redis_url="r").need_broker() == "b"
    assert Settings(redis_url="r").need_broker() == "r"
    assert Settings(flower_auth="user:pass:word").need_flower_auth() == "user:pass:word"
    Settings(junction_webhook_secrets=(JUNCTION_SECRET,)).need_webhook_secret()
    Settings(terra_signing_secrets=(TERRA_SECRET,)).need_webhook_secret()


@pytest.mark.parametrize("auth", ["canary", "user:", ":canarycanary", "user:canary", ""])
def test_a_weak_flower_password_is_refused(auth: str) -> None:
    """Breaks if Flower, which can end tasks, starts without a user or with a short password."""
    with pytest.raises(Misconfigured, match="HEADRACE_FLOWER_AUTH") as refused:
        Settings(flower_auth=auth).need_flower_auth()
    assert "canary" not in str(refused.value)


def test_a_rate_that_is_none_is_refused() -> None:
    """Breaks if an invalid rate is not detected at start."""
    failures = Failures()
    for value in ("canary", "50", "0/second", "-1/second", "5/day", "5 / second", "1.5/second", "/hour"):
        for name in ("HEADRACE_REQUEST_RATE", "HEADRACE_PROVIDER_RATE"):
            words = f"^{name}: not usable; it should be a rate such as "
            with failures.of(value, name), pytest.raises(Misconfigured, match=words):
                load({name: value})
    assert failures == {}


def test_a_missing_key_is_named() -> None:
    """Breaks if the error of a command that needs a key does not name the setting, or shows a key."""
    with pytest.raises(Misconfigured, match=r"^JUNCTION_API_KEY: not set"):
        Settings().need_junction_api_key()
    assert Settings(junction_api_key="sk_us_x").need_junction_api_key() == "sk_us_x"


def test_a_stream_brings_its_records_along() -> None:
    """Breaks if streams are kept without their records: without the records it is unknown which streams exist."""
    assert load({"HEADRACE_RESOURCES": "sleep_stream,steps,sleep"}).resources == ("sleep_stream", "sleep", "steps")
