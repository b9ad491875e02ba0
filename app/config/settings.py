"""Settings. Only this module reads the environment; everything else receives a Settings."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from types import MappingProxyType
from typing import Any, NoReturn

from app.accounts import Account
from app.config import sentinel_url, types
from app.errors import Misconfigured

MIB = 1024 * 1024
STACK_HINT = ", or run `headrace up` for a complete stack"
REDIS_HINT = "; shared rate limits need Redis in addition to an AMQP broker"
KEY_FROM_DASHBOARD = types.text("the key, as the dashboard shows it")
JUNCTION_HOSTS = {  # by the first six characters of an API key
    "pk_us_": "https://api.us.junction.com",
    "pk_eu_": "https://api.eu.junction.com",
    "sk_us_": "https://api.sandbox.us.junction.com",
    "sk_eu_": "https://api.sandbox.eu.junction.com",
}


def _setting(kind: types.Type, meaning: str, default: Any = None, *, secret: bool = False, **name: str) -> Any:
    return field(default=default, metadata={"type": kind, "meaning": meaning, "secret": secret, **name})


_secret = partial(_setting, secret=True)


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a process, each from the variable HEADRACE_ATTRIBUTE unless it has another `name`.

    The repr omits the secrets.
    """

    # Services
    database_url: str | None = _secret(types.DATABASE_URL, "PostgreSQL", name="DATABASE_URL")
    writer_password: str | None = _secret(
        types.text("a password"),
        "password of the login headrace_writer, which `headrace migrate` then creates for the other processes",
    )
    broker_url: str | None = _secret(types.BROKER_URL, "the broker; REDIS_URL if not set", name="BROKER_URL")
    redis_url: str | None = _secret(
        types.REDIS_URL, "shared rate limits; required with an AMQP broker", name="REDIS_URL"
    )
    broker_replicas: int = _setting(
        types.number("replicas", 0, 9),
        "replicas of Redis or Valkey that must have an event on disk before the 202; required if the broker has any",
        0,
    )
    broker_management_url: str | None = _secret(
        types.URL, "RabbitMQ's management API, for `headrace check` and `status`; by default port 15672 (amqps: 15671)"
    )
    broker_durability_asserted: bool = _setting(
        types.BOOLEAN,
        "true: the operator asserts that a broker whose configuration cannot be read keeps what it confirmed",
        False,
    )
    data_dir: str = _setting(types.text("a directory"), "directory in which `headrace up` stores its data", ".headrace")

    # Junction and Terra
    junction_webhook_secrets: tuple[str, ...] = _secret(
        types.JUNCTION_SECRETS, "signing secrets, comma-separated", (), name="JUNCTION_WEBHOOK_SECRET"
    )
    junction_api_key: str | None = _secret(
        KEY_FROM_DASHBOARD, "key for Junction's API, to fetch history", name="JUNCTION_API_KEY"
    )
    junction_base_url: str | None = _setting(
        types.API_URL, "Junction's API; derived from the key's prefix if not set", name="JUNCTION_BASE_URL"
    )
    terra_signing_secrets: tuple[str, ...] = _secret(
        types.TERRA_SECRETS, "signing secrets, comma-separated", (), name="TERRA_SIGNING_SECRET"
    )
    terra_dev_id: str | None = _setting(
        types.text("the developer id, as the dashboard shows it"), "developer id of Terra", name="TERRA_DEV_ID"
    )
    terra_api_key: str | None = _secret(
        KEY_FROM_DASHBOARD, "key for Terra's API, to fetch history", name="TERRA_API_KEY"
    )
    terra_base_url: str = _setting(
        types.API_URL, "Terra's API", "https://access.tryterra.co/api/v2", name="TERRA_BASE_URL"
    )
    terra_admin_token: str | None = _secret(
        types.text("a token that begins with terra_at_, as the dashboard shows it"),
        "token for Terra's Admin API, to find lost deliveries with `headrace reconcile`",
        name="TERRA_ADMIN_TOKEN",
    )
    terra_admin_base_url: str = _setting(
        types.API_URL, "Terra's Admin API", "https://access.tryterra.co/api/v3/admin", name="TERRA_ADMIN_BASE_URL"
    )
    terra_tolerance_seconds: int = _setting(
        types.TOLERANCE, "maximum age of a Terra signature", 300, name="TERRA_SIGNATURE_TOLERANCE_SECONDS"
    )
    etl_url: str | None = _secret(types.AMQP_URL, "RabbitMQ of Junction's ETL pipeline, for `headrace etl`")
    etl_queue: str | None = _setting(
        types.text("the queue that is bound to the pipeline's exchange"),
        "queue that `headrace etl` consumes; you declare and bind it",
    )

    # Endpoint
    host: str = _setting(types.ADDRESS, "address of the endpoint", "127.0.0.1")
    port: int = _setting(types.PORT, "port of the endpoint", 8000)
    web_processes: int = _setting(types.PROCESSES, "processes of the endpoint", 1)
    max_body_bytes: int = _setting(types.BYTES, "maximum body size; a larger body gets a 413", 64 * MIB)
    body_memory_bytes: int = _setting(
        types.BYTES,
        "memory for bodies that arrive or are being published, on the whole machine; each process can hold one body",
        256 * MIB,
    )
    max_connections: int = _setting(
        types.number("connections", 0, 1_000_000),
        "connections of all web processes; 0: 6144, or what the limit of open files allows",
        0,
    )
    operations_host: str = _setting(types.ADDRESS, "address of every port with metrics", "127.0.0.1")
    operations_port: int = _setting(types.PORT_OR_NONE, "port of /metrics, /readyz and /livez; 0: no port", 8001)
    enqueue_deadline_seconds: float = _setting(types.DEADLINE, "maximum wait for the broker; then 503", 4.0)
    message_deliveries: int = _setting(
        types.number("deliveries", 1), "maximum number of deliveries in one message", 200
    )
    message_bytes: int = _setting(types.BYTES, "maximum size of the sealed bodies in one message", 4 * MIB)

    # Data and privacy
    encryption_keys: tuple[bytes, ...] = _secret(
        types.ENCRYPTION_KEYS,
        "seals bodies on the queue and in the archive; several, comma-separated: the first seals, all open",
        (),
        name="HEADRACE_ENCRYPTION_KEY",
    )
    resources: tuple[str, ...] = _setting(
        types.RESOURCES, "store only these resources, comma-separated; all if empty", ()
    )
    providers: tuple[str, ...] = _setting(
        types.PROVIDERS, "store only these providers (garmin, oura ...); all if empty", ()
    )
    keep_days: int = _setting(types.DAYS, "days that deliveries are archived for `headrace replay`; 0: no archive", 30)
    retention: tuple[tuple[str, int], ...] = _setting(
        types.RETENTION, "days to store, by resource or for daily; *: all others, 0: no limit", ()
    )
    ledger_days: int = _setting(types.LEDGER_DAYS, "days that the ledger keeps outcomes; 0: without limit", 0)
    feed_days: int = _setting(types.DAYS_FROM_1, "days that the change feed keeps changes", 14)

    # History and downloads
    fetch_history: bool = _setting(types.BOOLEAN, "false: announcements of history are recorded but not fetched", True)
    history_days: int = _setting(types.DAYS_FROM_1, "days of history to fetch if no announcement names a range", 365)
    request_rate: str = _setting(
        types.RATE, "maximum request rate of all workers to an aggregator account", "50/second"
    )
    provider_rate: str | None = _setting(types.RATE, "maximum request rate for the data of one provider, if lower")
    backfills_per_user: int = _setting(types.number("backfills", 1), "concurrent backfills of one person", 4)
    backfills_per_account: int = _setting(types.number("backfills", 1), "concurrent backfills of one API account", 32)
    reconcile_hours: int = _setting(types.HOURS, "interval between reconciliations; 0: only on demand", 24)
    download_hosts: tuple[str, ...] = _setting(
        types.HOSTS,
        "hosts from which announced events (Terra's s3_payload) are downloaded, comma-separated, https only",
        ("*.amazonaws.com",),
    )
    max_download_bytes: int = _setting(types.BYTES, "larger downloads become dead letters", 64 * MIB)

    # Workers, Flower, logs and metrics
    visibility_timeout_seconds: int = _setting(
        types.VISIBILITY, "delay before a killed worker's message returns (Redis)", 60
    )
    flower_host: str = _setting(types.ADDRESS, "address of Flower", "127.0.0.1")
    flower_port: int = _setting(types.PORT, "port of Flower", 5555)
    flower_auth: str | None = _secret(
        types.text("user:password with at least 8 characters of password"),
        "user:password for Flower, which does not start without it",
    )
    console_host: str = _setting(types.ADDRESS, "address of the console", "127.0.0.1")
    console_port: int = _setting(types.PORT, "port of the console", 5556)
    console_url: str | None = _setting(
        types.API_URL,
        "URL at which operators reach the console through a proxy with TLS; otherwise only localhost is accepted",
    )
    console_users: tuple[Account, ...] = _secret(
        types.CONSOLE_USERS,
        "accounts of the console, which does not start without one; `headrace console passwd` prints a line",
        (),
    )
    metrics_port: int = _setting(
        types.PORT_OR_NONE,
        "port on which a worker or beat exposes its metrics; 0: no port, and the endpoint's /metrics includes them",
        0,
    )
    ready_file: str | None = _setting(types.text("a file"), "file that a worker creates when it is ready")
    log_level: str = _setting(types.one_of("DEBUG", "INFO", "WARNING", "ERROR"), "lowest level that is logged", "INFO")
    log_format: str = _setting(types.one_of("text", "json"), "text, or json for one object per line", "text")
    # Not checked as a URL: a cluster may set the variable in another form for all programs, which must not stop this
    # one.
    otlp_endpoint: str | None = _secret(
        types.text("http://collector:4318"),
        "OpenTelemetry collector for traces, such as http://collector:4318; no traces if empty",
        name="OTEL_EXPORTER_OTLP_ENDPOINT",
    )
    otlp_traces_endpoint: str | None = _secret(
        types.text("http://collector:4318/v1/traces"),
        "the same as a full URL, http://collector:4318/v1/traces",
        name="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    )

    def __repr__(self) -> str:
        shown = (f"{one.name}={getattr(self, one.name)!r}" for one in fields(self) if not one.metadata["secret"])
        return f"Settings({', '.join(shown)})"

    def keeps(self, resource: str, provider: str) -> bool:
        return (not self.resources or resource in self.resources) and (not self.providers or provider in self.providers)

    @property
    def traces(self) -> bool:
        """Whether an OTLP endpoint is configured."""
        return bool(self.otlp_endpoint or self.otlp_traces_endpoint)

    @property
    def readable(self) -> tuple[str, ...]:
        """The aggregators with an API key: their history can be fetched."""
        keys = {"junction": self.junction_api_key, "terra": self.terra_api_key}
        return tuple(name for name, key in keys.items() if key)

    @property
    def reconcilable(self) -> tuple[str, ...]:
        """The aggregators whose listings can be compared with the stored data. Terra's need a token of their own."""
        return tuple(name for name in self.readable if name == "junction" or self.terra_admin_token)

    @property
    def junction_api_url(self) -> str:
        """The base URL of Junction's API, from the setting or the key's prefix. Raises Misconfigured."""
        if self.junction_base_url:
            return self.junction_base_url.rstrip("/")
        if host := JUNCTION_HOSTS.get((self.junction_api_key or "")[:6]):
            return host
        raise Misconfigured(
            "not set, and the prefix of JUNCTION_API_KEY does not name a region", setting="JUNCTION_BASE_URL"
        )

    @property
    def has_redis(self) -> bool:
        """Whether Redis is configured for shared rate limits and pauses."""
        return (self.redis_url or self.broker_url or "").startswith(("redis", sentinel_url.SCHEME))

    # Each of these returns a required setting, and raises Misconfigured if it is missing.

    def need_database(self) -> str:
        return self.database_url or _missing("database_url")

    def need_broker(self) -> str:
        return self.broker_url or self.redis_url or _missing("broker_url")

    def need_redis(self) -> str:
        """The Redis of shared rate limits and pauses: REDIS_URL, or the broker if it is Redis."""
        return (self.redis_url or self.broker_url or "") if self.has_redis else _missing("redis_url", REDIS_HINT)

    def need_junction_api_key(self) -> str:
        return self.junction_api_key or _missing("junction_api_key", "")

    def need_terra_dev_id(self) -> str:
        return self.terra_dev_id or _missing("terra_dev_id", "")

    def need_terra_api_key(self) -> str:
        return self.terra_api_key or _missing("terra_api_key", "")

    def need_terra_admin_token(self) -> str:
        return self.terra_admin_token or _missing("terra_admin_token", "")

    def need_etl(self) -> tuple[str, str]:
        return self.etl_url or _missing("etl_url", ""), self.etl_queue or _missing("etl_queue", "")

    def need_webhook_secret(self) -> None:
        """Checks that the signatures of at least one aggregator can be verified: verification cannot be turned off."""
        if not (self.junction_webhook_secrets or self.terra_signing_secrets):
            _missing("junction_webhook_secrets", " (or set TERRA_SIGNING_SECRET)" + STACK_HINT)

    def need_flower_auth(self) -> str:
        """Flower's user:password. Flower shows all tasks, so it does not run without a login."""
        user, _, password = (self.flower_auth or "").partition(":")
        return f"{user}:{password}" if user and len(password) >= 8 else _missing("flower_auth")

    def need_console_users(self) -> tuple[Account, ...]:
        return self.console_users or _missing("console_users")


for _one in fields(Settings):
    _one.metadata = MappingProxyType({"name": f"HEADRACE_{_one.name.upper()}", **_one.metadata})


def _missing(attribute: str, hint: str = STACK_HINT) -> NoReturn:
    (setting,) = (one.metadata for one in fields(Settings) if one.name == attribute)
    raise Misconfigured(f"not set; set it to {setting['type'].want}{hint}", setting=setting["name"])


def process_environment() -> dict[str, str]:
    """The whole environment, for a process that starts others."""
    return dict(os.environ)


def replace_environment(environment: Mapping[str, str]) -> None:
    """Replaces the environment of this process, which was forked from a process with another one."""
    os.environ.clear()
    os.environ.update(environment)


def load(environment: Mapping[str, str] | None = None) -> Settings:
    """Reads the settings from the environment. Raises Misconfigured, which names the variable and never its value."""
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    for one in fields(Settings):
        name, kind = one.metadata["name"], one.metadata["type"]
        if text := environment.get(name, "").strip():
            try:
                values[one.name] = kind.read(text)
            except (ValueError, LookupError):  # `from None`: the text of the cause would quote the value
                raise Misconfigured(f"not usable; it should be {kind.want}", setting=name) from None
    return Settings(**values)
