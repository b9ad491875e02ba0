"""Settings. Only this module reads the environment; everything else receives a Settings."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from app.accounts import Account
from app.config import sentinel_url, types
from app.errors import Misconfigured

MIB = 1024 * 1024
STACK_HINT = ", or run `headrace up` for a complete stack"
REDIS_HINT = "; shared rate limits need Redis in addition to an AMQP broker"
KEY_FROM_DASHBOARD = types.text("the key, as the dashboard shows it")
JUNCTION_HOSTS = {  # by the prefix of an API key
    "pk_us_": "https://api.us.junction.com",
    "pk_eu_": "https://api.eu.junction.com",
    "sk_us_": "https://api.sandbox.us.junction.com",
    "sk_eu_": "https://api.sandbox.eu.junction.com",
}


def _setting(name: str, default: Any, kind: types.Type, meaning: str, *, secret: bool = False) -> Any:
    return field(default=default, metadata={"name": name, "type": kind, "meaning": meaning, "secret": secret})


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a process. Its repr omits the secrets."""

    # Services
    database_url: str | None = _setting("DATABASE_URL", None, types.DATABASE_URL, "PostgreSQL", secret=True)
    writer_password: str | None = _setting(
        "HEADRACE_WRITER_PASSWORD",
        None,
        types.text("a password"),
        "password of the login headrace_writer, which `headrace migrate` then creates for the other processes",
        secret=True,
    )
    broker_url: str | None = _setting(
        "BROKER_URL", None, types.BROKER_URL, "the broker; REDIS_URL if not set", secret=True
    )
    redis_url: str | None = _setting(
        "REDIS_URL", None, types.REDIS_URL, "shared rate limits; required with an AMQP broker", secret=True
    )
    broker_replicas: int = _setting(
        "HEADRACE_BROKER_REPLICAS",
        0,
        types.number("replicas", 0, 9),
        "replicas of Redis or Valkey that must have an event on disk before the 202; required if the broker has any",
    )
    broker_management_url: str | None = _setting(
        "HEADRACE_BROKER_MANAGEMENT_URL",
        None,
        types.URL,
        "RabbitMQ's management API, for `headrace check` and `status`; by default port 15672 (amqps: 15671)",
        secret=True,
    )
    broker_durability_asserted: bool = _setting(
        "HEADRACE_BROKER_DURABILITY_ASSERTED",
        False,
        types.BOOLEAN,
        "true: the operator asserts that a broker whose configuration cannot be read keeps what it confirmed",
    )
    data_dir: str = _setting(
        "HEADRACE_DATA_DIR", ".headrace", types.text("a directory"), "directory in which `headrace up` stores its data"
    )

    # Junction and Terra
    junction_webhook_secrets: tuple[str, ...] = _setting(
        "JUNCTION_WEBHOOK_SECRET", (), types.JUNCTION_SECRETS, "signing secrets, comma-separated", secret=True
    )
    junction_api_key: str | None = _setting(
        "JUNCTION_API_KEY", None, KEY_FROM_DASHBOARD, "key for Junction's API, to fetch history", secret=True
    )
    junction_base_url: str | None = _setting(
        "JUNCTION_BASE_URL", None, types.API_URL, "Junction's API; derived from the key's prefix if not set"
    )
    terra_signing_secrets: tuple[str, ...] = _setting(
        "TERRA_SIGNING_SECRET", (), types.TERRA_SECRETS, "signing secrets, comma-separated", secret=True
    )
    terra_dev_id: str | None = _setting(
        "TERRA_DEV_ID", None, types.text("the developer id, as the dashboard shows it"), "developer id of Terra"
    )
    terra_api_key: str | None = _setting(
        "TERRA_API_KEY", None, KEY_FROM_DASHBOARD, "key for Terra's API, to fetch history", secret=True
    )
    terra_base_url: str = _setting("TERRA_BASE_URL", "https://access.tryterra.co/api/v2", types.API_URL, "Terra's API")
    terra_admin_token: str | None = _setting(
        "TERRA_ADMIN_TOKEN",
        None,
        types.text("a token that begins with terra_at_, as the dashboard shows it"),
        "token for Terra's Admin API, to find lost deliveries with `headrace reconcile`",
        secret=True,
    )
    terra_admin_base_url: str = _setting(
        "TERRA_ADMIN_BASE_URL", "https://access.tryterra.co/api/v3/admin", types.API_URL, "Terra's Admin API"
    )
    terra_tolerance_seconds: int = _setting(
        "TERRA_SIGNATURE_TOLERANCE_SECONDS", 300, types.TOLERANCE, "maximum age of a Terra signature"
    )
    etl_url: str | None = _setting(
        "HEADRACE_ETL_URL", None, types.AMQP_URL, "RabbitMQ of Junction's ETL pipeline, for `headrace etl`", secret=True
    )
    etl_queue: str | None = _setting(
        "HEADRACE_ETL_QUEUE",
        None,
        types.text("the queue that is bound to the pipeline's exchange"),
        "queue that `headrace etl` consumes; you declare and bind it",
    )

    # Endpoint
    host: str = _setting("HEADRACE_HOST", "127.0.0.1", types.text("an address"), "address of the endpoint")
    port: int = _setting("HEADRACE_PORT", 8000, types.PORT, "port of the endpoint")
    web_processes: int = _setting("HEADRACE_WEB_PROCESSES", 1, types.PROCESSES, "processes of the endpoint")
    max_body_bytes: int = _setting(
        "HEADRACE_MAX_BODY_BYTES", 64 * MIB, types.BYTES, "maximum body size; a larger body gets a 413"
    )
    body_memory_bytes: int = _setting(
        "HEADRACE_BODY_MEMORY_BYTES",
        256 * MIB,
        types.BYTES,
        "memory for bodies that arrive or are being published, on the whole machine; each process can hold one body",
    )
    max_connections: int = _setting(
        "HEADRACE_MAX_CONNECTIONS",
        0,
        types.number("connections", 0, 1_000_000),
        "connections of all web processes; 0: 16384, or what the limit of open files allows",
    )
    operations_host: str = _setting(
        "HEADRACE_OPERATIONS_HOST", "127.0.0.1", types.text("an address"), "address of every port with metrics"
    )
    operations_port: int = _setting(
        "HEADRACE_OPERATIONS_PORT", 8001, types.PORT_OR_NONE, "port of /metrics, /readyz and /livez; 0: no port"
    )
    enqueue_deadline_seconds: float = _setting(
        "HEADRACE_ENQUEUE_DEADLINE_SECONDS", 4.0, types.DEADLINE, "maximum wait for the broker; then 503"
    )
    message_deliveries: int = _setting(
        "HEADRACE_MESSAGE_DELIVERIES", 200, types.number("deliveries", 1), "maximum number of deliveries in one message"
    )
    message_bytes: int = _setting(
        "HEADRACE_MESSAGE_BYTES", 4 * MIB, types.BYTES, "maximum size of the sealed bodies in one message"
    )

    # Data and privacy
    encryption_keys: tuple[bytes, ...] = _setting(
        "HEADRACE_ENCRYPTION_KEY",
        (),
        types.ENCRYPTION_KEYS,
        "seals bodies on the queue and in the archive; several, comma-separated: the first seals, all open",
        secret=True,
    )
    resources: tuple[str, ...] = _setting(
        "HEADRACE_RESOURCES", (), types.RESOURCES, "store only these resources, comma-separated; all if empty"
    )
    providers: tuple[str, ...] = _setting(
        "HEADRACE_PROVIDERS", (), types.PROVIDERS, "store only these providers (garmin, oura ...); all if empty"
    )
    keep_days: int = _setting(
        "HEADRACE_KEEP_DAYS", 30, types.DAYS, "days that deliveries are archived for `headrace replay`; 0: no archive"
    )
    retention: tuple[tuple[str, int], ...] = _setting(
        "HEADRACE_RETENTION", (), types.RETENTION, "days to store, by resource or for daily; *: all others, 0: no limit"
    )
    ledger_days: int = _setting(
        "HEADRACE_LEDGER_DAYS", 0, types.LEDGER_DAYS, "days that the ledger keeps outcomes; 0: without limit"
    )
    feed_days: int = _setting("HEADRACE_FEED_DAYS", 14, types.FEED_DAYS, "days that the change feed keeps changes")

    # History and downloads
    fetch_history: bool = _setting(
        "HEADRACE_FETCH_HISTORY", True, types.BOOLEAN, "false: announcements of history are recorded but not fetched"
    )
    history_days: int = _setting(
        "HEADRACE_HISTORY_DAYS", 365, types.HISTORY_DAYS, "days of history to fetch if no announcement names a range"
    )
    request_rate: str = _setting(
        "HEADRACE_REQUEST_RATE", "50/second", types.RATE, "maximum request rate of all workers to an aggregator account"
    )
    provider_rate: str | None = _setting(
        "HEADRACE_PROVIDER_RATE", None, types.RATE, "maximum request rate for the data of one provider, if lower"
    )
    backfills_per_user: int = _setting(
        "HEADRACE_BACKFILLS_PER_USER", 4, types.number("backfills", 1), "concurrent backfills of one person"
    )
    backfills_per_account: int = _setting(
        "HEADRACE_BACKFILLS_PER_ACCOUNT", 32, types.number("backfills", 1), "concurrent backfills of one API account"
    )
    reconcile_hours: int = _setting(
        "HEADRACE_RECONCILE_HOURS", 24, types.HOURS, "interval between reconciliations; 0: only on demand"
    )
    download_hosts: tuple[str, ...] = _setting(
        "HEADRACE_DOWNLOAD_HOSTS",
        ("*.amazonaws.com",),
        types.HOSTS,
        "hosts from which announced events (Terra's s3_payload) are downloaded, comma-separated, https only",
    )
    max_download_bytes: int = _setting(
        "HEADRACE_MAX_DOWNLOAD_BYTES", 64 * MIB, types.BYTES, "larger downloads become dead letters"
    )

    # Workers, Flower, logs and metrics
    visibility_timeout_seconds: int = _setting(
        "HEADRACE_VISIBILITY_TIMEOUT_SECONDS",
        60,
        types.VISIBILITY,
        "delay before a killed worker's message returns (Redis)",
    )
    flower_host: str = _setting("HEADRACE_FLOWER_HOST", "127.0.0.1", types.text("an address"), "address of Flower")
    flower_port: int = _setting("HEADRACE_FLOWER_PORT", 5555, types.PORT, "port of Flower")
    flower_auth: str | None = _setting(
        "HEADRACE_FLOWER_AUTH",
        None,
        types.text("user:password with at least 8 characters of password"),
        "user:password for Flower, which does not start without it",
        secret=True,
    )
    console_host: str = _setting(
        "HEADRACE_CONSOLE_HOST", "127.0.0.1", types.text("an address"), "address of the console"
    )
    console_port: int = _setting("HEADRACE_CONSOLE_PORT", 5556, types.PORT, "port of the console")
    console_url: str | None = _setting(
        "HEADRACE_CONSOLE_URL",
        None,
        types.API_URL,
        "URL at which operators reach the console through a proxy with TLS; otherwise only localhost is accepted",
    )
    console_users: tuple[Account, ...] = _setting(
        "HEADRACE_CONSOLE_USERS",
        (),
        types.CONSOLE_USERS,
        "accounts of the console, which does not start without one; `headrace console passwd` prints a line",
        secret=True,
    )
    metrics_port: int = _setting(
        "HEADRACE_METRICS_PORT",
        0,
        types.PORT_OR_NONE,
        "port on which a worker or beat exposes its metrics; 0: no port, and the endpoint's /metrics includes them",
    )
    ready_file: str | None = _setting(
        "HEADRACE_READY_FILE", None, types.text("a file"), "file that a worker creates when it is ready"
    )
    log_level: str = _setting(
        "HEADRACE_LOG_LEVEL", "INFO", types.one_of("DEBUG", "INFO", "WARNING", "ERROR"), "lowest level that is logged"
    )
    log_format: str = _setting(
        "HEADRACE_LOG_FORMAT", "text", types.one_of("text", "json"), "text, or json for one object per line"
    )
    # Not checked as a URL: a cluster may set the variable in another form for all programs, which must not stop this
    # one.
    otlp_endpoint: str | None = _setting(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        None,
        types.text("http://collector:4318"),
        "OpenTelemetry collector for traces, such as http://collector:4318; no traces if empty",
        secret=True,
    )
    otlp_traces_endpoint: str | None = _setting(
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        None,
        types.text("http://collector:4318/v1/traces"),
        "the same as a full URL, http://collector:4318/v1/traces",
        secret=True,
    )

    def __repr__(self) -> str:
        shown = (f"{one.name}={getattr(self, one.name)!r}" for one in fields(self) if not one.metadata["secret"])
        return f"Settings({', '.join(shown)})"

    def keeps(self, resource: str, provider: str) -> bool:
        """Whether this resource of this provider is stored."""
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
        for prefix, host in JUNCTION_HOSTS.items():
            if (self.junction_api_key or "").startswith(prefix):
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
        """The broker's URL and the queue of Junction's ETL pipeline."""
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
