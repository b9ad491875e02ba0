"""Settings: the only reader of the environment. Everything else is handed a Settings."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from app.config import types
from app.config.junction import REGION_HOSTS
from app.errors import Misconfigured


def _setting(
    name: str, default: Any, read: Callable[[str], Any], meaning: str, *, want: str = "", secret: bool = False
) -> Any:
    about = {"name": name, "read": read, "meaning": meaning, "want": want or meaning, "secret": secret}
    return field(default=default, metadata=about)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a process was told. Secrets are left out of its repr."""

    database_url: str | None = _setting(
        "DATABASE_URL",
        None,
        types.database_url,
        "PostgreSQL",
        want="postgresql://user:password@host/database",
        secret=True,
    )
    broker_url: str | None = _setting(
        "BROKER_URL",
        None,
        types.url("redis", "rediss", "amqp", "amqps"),
        "the broker; falls back to REDIS_URL",
        want="redis://, rediss://, amqp:// or amqps:// and a host",
        secret=True,
    )
    redis_url: str | None = _setting(
        "REDIS_URL",
        None,
        types.url("redis", "rediss"),
        "shared rate limits; needed beside an AMQP broker",
        want="redis:// or rediss:// and a host",
        secret=True,
    )
    junction_api_key: str | None = _setting(
        "JUNCTION_API_KEY", None, types.text, "reads history from Junction's API", secret=True
    )
    junction_base_url: str | None = _setting(
        "JUNCTION_BASE_URL", None, types.url("http", "https"), "derived from the key's prefix unless set", want="a URL"
    )
    junction_webhook_secrets: tuple[str, ...] = _setting(
        "JUNCTION_WEBHOOK_SECRET",
        (),
        types.junction_secrets,
        "one or several signing secrets, comma-separated",
        want="whsec_ and at least 16 bytes in base64, as the dashboard shows it",
        secret=True,
    )
    terra_dev_id: str | None = _setting("TERRA_DEV_ID", None, types.text, "the developer id of a Terra account")
    terra_api_key: str | None = _setting(
        "TERRA_API_KEY", None, types.text, "reads history from Terra's API", secret=True
    )
    terra_base_url: str = _setting(
        "TERRA_BASE_URL", "https://access.tryterra.co/api/v2", types.url("http", "https"), "Terra's API", want="a URL"
    )
    terra_signing_secrets: tuple[str, ...] = _setting(
        "TERRA_SIGNING_SECRET",
        (),
        types.terra_secrets,
        "one or several signing secrets, comma-separated",
        want="at least 16 characters each",
        secret=True,
    )
    terra_tolerance_seconds: int = _setting(
        "TERRA_SIGNATURE_TOLERANCE_SECONDS",
        300,
        types.whole_number,
        "how old a signature of Terra's may be",
        want="seconds",
    )
    encryption_keys: tuple[bytes, ...] = _setting(
        "HEADRACE_ENCRYPTION_KEY",
        (),
        types.encryption_keys,
        "seals bodies on the queue; several, comma-separated: the first seals, all open",
        want="32 bytes in base64 (python3 -c 'import base64,os; print(base64.b64encode(os.urandom(32)).decode())')",
        secret=True,
    )
    max_body_bytes: int = _setting(
        "HEADRACE_MAX_BODY_BYTES",
        64 * 1024 * 1024,
        types.whole_number,
        "a larger body is answered 413",
        want="a number of bytes",
    )
    max_download_bytes: int = _setting(
        "HEADRACE_MAX_DOWNLOAD_BYTES",
        256 * 1024 * 1024,
        types.whole_number,
        "a larger event that waits at a URL (Terra's s3_payload) becomes a dead letter",
        want="a number of bytes",
    )
    download_hosts: tuple[str, ...] = _setting(
        "HEADRACE_DOWNLOAD_HOSTS",
        ("*.amazonaws.com",),
        types.hosts,
        "where an event may wait at a URL, comma-separated; only there is it fetched, by https",
        want="names of hosts, such as bucket.s3.eu-west-2.amazonaws.com or *.amazonaws.com",
    )
    resources: tuple[str, ...] = _setting(
        "HEADRACE_RESOURCES",
        (),
        types.resources,
        "keep only these resources, comma-separated; all if empty",
        want="names of the catalogue, such as workouts,sleep,heartrate",
    )
    providers: tuple[str, ...] = _setting(
        "HEADRACE_PROVIDERS", (), types.providers, "keep only these providers (garmin, oura ...); all if empty"
    )
    enqueue_deadline_seconds: float = _setting(
        "HEADRACE_ENQUEUE_DEADLINE_SECONDS",
        4.0,
        types.seconds,
        "no confirmation by then is 503",
        want="seconds, 4 or less",
    )
    message_deliveries: int = _setting(
        "HEADRACE_MESSAGE_DELIVERIES", 200, types.whole_number, "deliveries that may share one message", want="a number"
    )
    message_bytes: int = _setting(
        "HEADRACE_MESSAGE_BYTES",
        4 * 1024 * 1024,
        types.whole_number,
        "bytes of sealed bodies that may share one message",
    )
    visibility_timeout_seconds: int = _setting(
        "HEADRACE_VISIBILITY_TIMEOUT_SECONDS",
        60,
        types.whole_number,
        "after this a killed worker's message is given to another (Redis)",
        want="seconds",
    )
    fetch_history: bool = _setting(
        "HEADRACE_FETCH_HISTORY",
        True,
        types.boolean,
        "false: history comes by another way (an ETL pipeline), announcements are only recorded",
        want="true or false",
    )
    history_days: int = _setting(
        "HEADRACE_HISTORY_DAYS",
        365,
        types.positive,
        "how far back history is fetched where nobody announces a range (Terra, when somebody connects)",
        want="a number of days",
    )
    request_rate: str = _setting(
        "HEADRACE_REQUEST_RATE",
        "50/second",
        types.rate,
        "requests to one aggregator account, by all workers",
        want="a rate such as 50/second",
    )
    provider_rate: str | None = _setting(
        "HEADRACE_PROVIDER_RATE",
        None,
        types.rate,
        "requests about the data of one provider (garmin, oura ...), where it should be less than the account's",
        want="a rate such as 10/second",
    )
    backfills_per_user: int = _setting(
        "HEADRACE_BACKFILLS_PER_USER",
        4,
        types.positive,
        "backfills of one person that may run side by side",
        want="a number",
    )
    backfills_per_account: int = _setting(
        "HEADRACE_BACKFILLS_PER_ACCOUNT",
        32,
        types.positive,
        "backfills of one aggregator account that may run side by side",
        want="a number",
    )
    etl_url: str | None = _setting(
        "HEADRACE_ETL_URL",
        None,
        types.url("amqp", "amqps"),
        "the RabbitMQ into which Junction's ETL pipeline puts events, for `headrace etl`",
        want="amqp:// or amqps:// and a host",
        secret=True,
    )
    etl_queue: str | None = _setting("HEADRACE_ETL_QUEUE", None, types.text, "the queue there; you make and bind it")
    keep_days: int = _setting(
        "HEADRACE_KEEP_DAYS",
        30,
        types.whole_number,
        "how long applied deliveries are kept, sealed, for `headrace replay`; 0: not at all",
        want="a number of days",
    )
    retention: tuple[tuple[str, int], ...] = _setting(
        "HEADRACE_RETENTION",
        (),
        types.retention,
        "how many days stored data is kept, by resource; * stands for all others, 0 is for ever",
        want="days by resource, such as heartrate=365,workouts=0,*=3650",
    )
    ledger_days: int = _setting(
        "HEADRACE_LEDGER_DAYS",
        0,
        types.ledger_days,
        "how long the ledger remembers what became of a delivery; 0: for ever",
        want="a number of days, 40 or more, or 0",
    )
    reconcile_hours: int = _setting(
        "HEADRACE_RECONCILE_HOURS",
        24,
        types.whole_number,
        "how often stored history is compared with what the aggregator says it has; 0: only on demand",
        want="a number of hours",
    )
    broker_durability_asserted: bool = _setting(
        "HEADRACE_BROKER_DURABILITY_ASSERTED",
        False,
        types.boolean,
        "true: the operator vouches that a broker which cannot be inspected keeps what it confirmed",
        want="true or false",
    )
    host: str = _setting("HEADRACE_HOST", "127.0.0.1", types.text, "the address that web and Flower listen on")
    metrics_port: int = _setting(
        "HEADRACE_METRICS_PORT",
        0,
        types.port_or_none,
        "where a worker or beat shows its metrics; 0: nowhere, and the endpoint's /metrics shows its machine's",
        want="a port, or 0",
    )
    port: int = _setting("HEADRACE_PORT", 8000, types.port, "the port that web listens on", want="a port")
    web_processes: int = _setting(
        "HEADRACE_WEB_PROCESSES", 2, types.whole_number, "processes of the endpoint", want="a number"
    )
    flower_port: int = _setting(
        "HEADRACE_FLOWER_PORT", 5555, types.port, "the port that Flower listens on", want="a port"
    )
    flower_auth: str | None = _setting(
        "HEADRACE_FLOWER_AUTH", None, types.text, "user:password of Flower, which never starts without", secret=True
    )
    data_dir: str = _setting("HEADRACE_DATA_DIR", ".headrace", types.text, "where `headrace up` keeps everything")
    ready_file: str | None = _setting(
        "HEADRACE_READY_FILE", None, types.text, "a worker makes this file when it is ready; `headrace up` sets it"
    )
    log_level: str = _setting("HEADRACE_LOG_LEVEL", "INFO", types.log_level, "DEBUG, INFO, WARNING or ERROR")
    log_format: str = _setting(
        "HEADRACE_LOG_FORMAT", "text", types.log_format, "text for people, json for programs", want="text or json"
    )

    otlp_endpoint: str | None = _setting(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        None,
        types.text,  # a cluster may set it for everybody, in a form that is not ours: that must stop nothing
        "where traces go, by OTLP over HTTP: http://collector:4318; none without. OpenTelemetry's others hold too",
        secret=True,
    )
    otlp_traces_endpoint: str | None = _setting(
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        None,
        types.text,
        "the same, in full: http://collector:4318/v1/traces",
        secret=True,
    )

    def __repr__(self) -> str:
        shown = (f"{one.name}={getattr(self, one.name)!r}" for one in fields(self) if not one.metadata["secret"])
        return f"Settings({', '.join(shown)})"

    def keeps(self, resource: str, provider: str) -> bool:
        """Whether the operator wants this resource from this provider."""
        return (not self.resources or resource in self.resources) and (not self.providers or provider in self.providers)

    @property
    def traces(self) -> bool:
        """Whether somebody wants to see what processes are at."""
        return bool(self.otlp_endpoint or self.otlp_traces_endpoint)

    @property
    def readable(self) -> tuple[str, ...]:
        """The aggregators whose history can be fetched: those with a key."""
        keys = {"junction": self.junction_api_key, "terra": self.terra_api_key}
        return tuple(name for name, key in keys.items() if key)

    @property
    def junction_api_url(self) -> str:
        """The base of Junction's API, from the setting or the key's prefix. Raises Misconfigured."""
        if self.junction_base_url:
            return self.junction_base_url.rstrip("/")
        for prefix, host in REGION_HOSTS.items():
            if (self.junction_api_key or "").startswith(prefix):
                return host
        raise Misconfigured(
            "not set, and the prefix of JUNCTION_API_KEY does not tell the region", setting="JUNCTION_BASE_URL"
        )

    def need_database(self) -> str:
        """The database's URL. Raises Misconfigured if there is none."""
        return self.database_url or _missing("DATABASE_URL", "postgresql://user:password@host/database")

    def need_broker(self) -> str:
        """The broker's URL. Raises Misconfigured if there is none."""
        return self.broker_url or self.redis_url or _missing("BROKER_URL", "redis://host:6379/0 or amqp://host")

    @property
    def has_redis(self) -> bool:
        """Whether there is a place for shared rates and pauses."""
        return (self.redis_url or self.broker_url or "").startswith("redis")

    def need_redis(self) -> str:
        """Where rates and pauses are shared: REDIS_URL, or a broker that is one. Raises Misconfigured."""
        if not self.has_redis:
            _missing("REDIS_URL", "redis://host:6379/0; beside an AMQP broker, rates are shared through it")
        return self.redis_url or self.broker_url or ""

    def need_junction_api_key(self) -> str:
        """The key of Junction's API. Raises Misconfigured if there is none."""
        return self.junction_api_key or _missing("JUNCTION_API_KEY", "your team's key, as the dashboard shows it", "")

    def need_terra_dev_id(self) -> str:
        """The developer id of Terra's API. Raises Misconfigured if there is none."""
        return self.terra_dev_id or _missing("TERRA_DEV_ID", "your developer id, as the dashboard shows it", "")

    def need_terra_api_key(self) -> str:
        """The key of Terra's API. Raises Misconfigured if there is none."""
        return self.terra_api_key or _missing("TERRA_API_KEY", "your key, as the dashboard shows it", "")

    def need_etl(self) -> tuple[str, str]:
        """Where Junction's ETL pipeline puts events: a broker and a queue. Raises Misconfigured."""
        url = self.etl_url or _missing("HEADRACE_ETL_URL", "amqps://user:password@host/vhost", "")
        return url, self.etl_queue or _missing("HEADRACE_ETL_QUEUE", "the queue that the pipeline's exchange feeds", "")

    def need_webhook_secret(self) -> None:
        """Raises Misconfigured if no aggregator's signatures could be verified: there is no way to switch that off."""
        if not (self.junction_webhook_secrets or self.terra_signing_secrets):
            _missing("JUNCTION_WEBHOOK_SECRET", "the endpoint's signing secret (or TERRA_SIGNING_SECRET)")

    def need_flower_auth(self) -> str:
        """Flower's user:password. Raises Misconfigured: without, anybody could read and end tasks."""
        user, _, password = (self.flower_auth or "").partition(":")
        if not user or len(password) < 8:
            _missing("HEADRACE_FLOWER_AUTH", "user:password with at least 8 characters of password")
        return f"{user}:{password}"


def process_environment() -> dict[str, str]:
    """The whole environment, for a process that starts others."""
    return dict(os.environ)


def _missing(name: str, want: str, otherwise: str = ", or run `headrace up` for a complete stack") -> str:
    raise Misconfigured(f"not set; set it to {want}{otherwise}", setting=name)


def load(environment: Mapping[str, str] | None = None) -> Settings:
    """Reads the settings from the environment. Raises Misconfigured, naming the variable and never its value."""
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    for one in fields(Settings):
        text = environment.get(one.metadata["name"], "").strip()
        if not text:
            continue
        try:
            values[one.name] = one.metadata["read"](text)
        except (ValueError, LookupError):
            # `from None`: the cause's text would quote the value.
            wanted = f"not usable; it should be {one.metadata['want']}"
            raise Misconfigured(wanted, setting=one.metadata["name"]) from None
    return Settings(**values)
