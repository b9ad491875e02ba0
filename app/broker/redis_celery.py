"""The Celery application for a broker of Redis or Valkey, and its options."""

# ruff: noqa: PLC0415 - importing redis costs 0.1 s of CPU and loads OpenTelemetry where that is installed

from typing import Any, Literal
from urllib.parse import quote

from celery import Celery
from celery.app.amqp import AMQP
from kombu.connection import Connection

from app.config import sentinel_url
from app.config.settings import Settings

TRANSPORTS = "app.broker.redis_transport"
# A worker notices within this time that a broker is frozen or its machine is lost. A slower command is repeated.
WORKER_SECONDS = 3.0
MAX_RESTORE_SECONDS = 5.0


class QuickConnection(Connection):  # type: ignore[misc]
    """A worker tries to connect once per second. Celery's pauses of 2, 4, 6 ... 30 s would delay a failover."""

    def _ensure_connection(
        self,
        errback: Any = None,
        max_retries: int | None = None,
        interval_start: float = 1,
        interval_step: float = 0,
        interval_max: float = 1,
        **options: Any,
    ) -> Any:
        return super()._ensure_connection(errback, max_retries, interval_start, interval_step, interval_max, **options)

    def as_uri(self, include_password: bool = False, **options: Any) -> str:  # noqa: FBT001, FBT002
        """The present primary's URL. Only Flower asks for it with the password, to count messages."""
        name = self.transport_options.get("sentinels")
        if not include_password or name is None:
            return str(super().as_uri(include_password, **options))
        from app.broker.sentinel import finder_named

        found = finder_named(name)
        host, port = found.discover_master(found.url.master)
        login = f"{quote(self.userid or '', safe='')}:{quote(self.password or '', safe='')}"
        return f"{'rediss' if self.ssl else 'redis'}://{login}@{host}:{port}/{self.virtual_host}"


class QuickAMQP(AMQP):  # type: ignore[misc]
    Connection = QuickConnection


class RedisCelery(Celery):  # type: ignore[misc]
    """A Celery application that finds a restarted or promoted broker within a second."""

    amqp_cls = QuickAMQP


def redis_options(settings: Settings, role: Literal["publisher", "worker"]) -> dict[str, Any]:
    url, options = settings.need_broker(), _transport_options(settings, role)
    if not sentinel_url.is_sentinel(url):
        # Kombu connects without TLS otherwise: it reads rediss:// only with a transport of its own.
        tls = {"ssl_cert_reqs": "required"} if url.startswith("rediss:") else None
        return {
            "broker_transport": f"{TRANSPORTS}:Transport",
            "broker_transport_options": options,
            "broker_use_ssl": tls,
        }
    from app.broker.sentinel import finder

    parts = sentinel_url.read(url)
    return {
        "broker_url": parts.first,
        "broker_transport": f"{TRANSPORTS}:SentinelTransport",
        "broker_transport_options": options | {"sentinels": finder(parts).url.name, "master_name": parts.master},
        "broker_use_ssl": None if parts.tls is None else dict(parts.tls),
    }


def _restore_seconds(visibility_timeout: float) -> float:
    """Seconds between two searches for messages of killed workers: a twelfth of the visibility timeout, from 1 to 5.

    A search is one round trip that writes nothing. When it was five commands, two of which the broker synced to disk,
    and ran once a second in each of six workers, it took a third of the CPU time of an idle stack.
    """
    return min(max(visibility_timeout / 12, 1.0), MAX_RESTORE_SECONDS)


def _transport_options(settings: Settings, role: Literal["publisher", "worker"]) -> dict[str, Any]:
    from app.broker.sentinel import CONNECT_SECONDS, KEEPALIVE, PUBLISH_SECONDS

    options: dict[str, Any] = {
        "visibility_timeout": settings.visibility_timeout_seconds,
        # Without these two a killed worker's message is redelivered up to 100 s after the visibility timeout.
        "unacked_restore_interval": _restore_seconds(settings.visibility_timeout_seconds),
        "unacked_restore_throttle": 1,
        # The worker that restores messages holds this lock. If it is killed, kombu's default blocks it for 5 min.
        "unacked_mutex_expire": 5,
        "socket_keepalive": True,
        "socket_keepalive_options": KEEPALIVE,
        "replicas": settings.broker_replicas,
    }
    if role == "publisher":
        options |= {"socket_timeout": PUBLISH_SECONDS, "socket_connect_timeout": CONNECT_SECONDS}
        return options | {"max_retries": 1, "interval_start": 0}
    # Kombu drops a connection whose reply is late by the second interval; its default of 25 s takes up to 51 s.
    return options | {
        "socket_timeout": WORKER_SECONDS,
        "socket_connect_timeout": CONNECT_SECONDS,
        "health_check_interval": WORKER_SECONDS,
    }
