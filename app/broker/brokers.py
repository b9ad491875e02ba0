"""The brokers of BROKER_URL, and the order in which a process tries them."""

import time

from app.broker.lanes import is_amqp

_failures: dict[str, float] = {}  # by URL: when it last failed (monotonic seconds); shared by the whole process


def in_order(url: str) -> list[str]:
    """The RabbitMQ nodes of BROKER_URL in the order in which to try them: failed ones last, in the order of failure.

    Any other URL names one broker.
    """
    return sorted(url.split(";"), key=lambda one: _failures.get(one, 0.0)) if is_amqp(url) else [url]


def mark_failed(broker: str) -> None:
    """Moves a broker to the end of the order."""
    _failures[broker] = time.monotonic()
