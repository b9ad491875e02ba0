"""RabbitMQ's management API: what AMQP does not show."""

import http.client
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import msgspec

from app.broker.lanes import in_order
from app.config.settings import Settings

PORTS = {"amqp": ("http", 15672), "amqps": ("https", 15671)}
MAX_RESPONSE_BYTES = 16 * 1024 * 1024
UNACKED_SECONDS = 1.0  # for an answer about unacknowledged messages: the sweep asks every 5 s
UNUSABLE_SECONDS = 60.0  # an API that did not answer is not asked about them for so long


class Unavailable(Exception):
    """The management API cannot be used. The text gives the reason."""


@dataclass(frozen=True)
class Api:
    """The API of one broker."""

    url: str
    login: str
    vhost: str  # quoted

    def get(self, path: str, kind: Any, seconds: float) -> Any:
        """An answer, decoded. Raises Unavailable."""
        where, login = urlsplit(self.url), {"Authorization": f"Basic {self.login}"}
        make = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
        try:
            with closing(make(where.hostname or "", where.port, timeout=seconds)) as connection:
                connection.request("GET", where.path.rstrip("/") + path, headers=login)
                response = connection.getresponse()
                body = response.read(MAX_RESPONSE_BYTES)
        except (OSError, http.client.HTTPException):
            raise Unavailable("no answer") from None
        if response.status != 200:
            raise Unavailable(f"status {response.status}")
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.DecodeError:
            raise Unavailable("not RabbitMQ's management API") from None


def management_apis(settings: Settings) -> Iterator[Api]:
    """The APIs of the brokers of BROKER_URL in the order of the brokers, or the one that is set."""
    for broker in in_order(settings.need_broker()):
        amqp = urlsplit(broker)
        scheme, port = PORTS[amqp.scheme]
        base = urlsplit(settings.broker_management_url or f"{scheme}://{amqp.hostname}:{port}")
        user = unquote(base.username or amqp.username or "guest")
        password = unquote(base.password or amqp.password or "guest")
        login = b64encode(f"{user}:{password}".encode()).decode()
        url = base._replace(netloc=base.netloc.rpartition("@")[2]).geturl()
        yield Api(url, login, quote(unquote(amqp.path[1:]) or "/", safe=""))
        if settings.broker_management_url:
            return


class Held(msgspec.Struct):
    """The messages of a queue that workers have received and not acknowledged. RabbitMQ does not say since when."""

    name: str
    messages_unacknowledged: int | None = None  # a new queue has no count yet
    message_stats: Any = None  # an object; an empty list if the queue never delivered a message

    @property
    def acknowledgements(self) -> int | None:
        """The number of all acknowledgements so far; None if RabbitMQ does not count them (`rates_mode = none`)."""
        found = self.message_stats.get("ack") if isinstance(self.message_stats, dict) else None
        return found if isinstance(found, int) else None


_unusable_until: dict[str, float] = {}  # by URL, in monotonic seconds


def held_messages(settings: Settings) -> dict[str, Held]:
    """By queue. Empty if no API can be used."""
    for api in management_apis(settings):
        if time.monotonic() < _unusable_until.get(api.url, 0.0):
            continue
        columns = "columns=name,messages_unacknowledged,message_stats.ack"
        try:
            found = api.get(f"/api/queues/{api.vhost}?{columns}", list[Held], UNACKED_SECONDS)
        except Unavailable:
            _unusable_until[api.url] = time.monotonic() + UNUSABLE_SECONDS
            continue
        return {one.name: one for one in found}
    return {}
