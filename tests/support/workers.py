"""A worker of the live lane that the tests of a module share."""

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import redis
from sqlalchemy import Engine, text

from app.broker.celery import make_celery
from app.broker.lanes import PROCESSING, is_amqp
from app.broker.rabbitmq_publisher import RabbitMQPublisher
from app.config.settings import Settings
from app.delivery import Delivery
from tests.support import delivery, event, rows, until, worker
from tests.support.broker import BlockingPublisher
from tests.support.poison import fault

LIVE = "live"
BUSY = "busy"  # the delivery that keeps a worker busy
IS_WAITING = """
SELECT 1 FROM pg_stat_activity
WHERE wait_event = 'PgSleep' AND application_name = 'headrace-worker' AND datname = current_database()"""
# Waits until the advisory lock 7 is free. A worker's wait for a lock would end at its lock_timeout of 3 s.
WAIT = """
WHILE NOT pg_try_advisory_lock_shared(7) LOOP PERFORM pg_sleep(0.02); END LOOP;
PERFORM pg_advisory_unlock_shared(7)"""


def publish(settings: Settings, *messages: list[Delivery]) -> None:
    """Publishes messages to the live lane, as the endpoint does."""
    is_rabbitmq = is_amqp(settings.need_broker())
    publisher = RabbitMQPublisher(make_celery(settings, "publisher")) if is_rabbitmq else BlockingPublisher(settings)
    for deliveries in messages:
        publisher.publish(deliveries)
    publisher.close()


def held(broker: "redis.Redis") -> int:
    """The number of messages in the broker: queued, popped and unacknowledged ones."""
    with broker.pipeline() as pipe:
        return sum(pipe.llen(LIVE).llen(LIVE + PROCESSING).hlen("unacked").execute())


def messages(broker: "redis.Redis") -> list[dict[str, Any]]:
    """The messages in the broker: queued, popped and unacknowledged ones."""
    with broker.pipeline() as pipe:  # one transaction, so that no message moves between the reads
        queued, popped, unacknowledged = (
            pipe.lrange(LIVE, 0, -1).lrange(LIVE + PROCESSING, 0, -1).hvals("unacked").execute()
        )
    return [json.loads(raw) for raw in (*queued, *popped)] + [json.loads(raw)[0] for raw in unacknowledged]


@contextmanager
def consuming(settings: Settings, on_message: Callable[[Any], None]) -> Iterator[Callable[[], None]]:
    """Yields a function that consumes one message of the live lane and passes it to `on_message`."""
    celery = make_celery(settings, "worker")
    lane = next(queue for queue in celery.conf.task_queues if queue.name == LIVE)
    with (
        celery.connection_for_read() as connection,
        connection.channel() as channel,
        celery.amqp.Consumer(channel, [lane], on_message=on_message, accept=["json"]),
    ):
        yield lambda: connection.drain_events(timeout=10)
    celery.close()


def consume_one(settings: Settings, on_message: Callable[[Any], None]) -> None:
    """Consumes one message of the live lane."""
    with consuming(settings, on_message) as consume_next:
        consume_next()


def is_ready(log: Path) -> bool:
    """Whether the log shows that the worker consumes messages."""
    return log.exists() and " ready." in log.read_text()


@dataclass
class SharedWorker:
    """One worker process. After a test that ends it, the next test starts another."""

    settings: Settings
    folder: Path
    module: str = "workers.cli"
    starts: int = 0
    seen: int = 0  # length of the log before this test
    process: "subprocess.Popen[bytes]" = field(init=False)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def log(self) -> Path:
        """The log file; there is one for each start."""
        return self.folder / f"worker-{self.starts}.log"

    @property
    def output(self) -> str:
        """The log since the test began."""
        return self.log.read_text()[self.seen :]

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self.starts > 0 and self.process.poll() is None

    def ready(self) -> Self:
        """Starts the worker if it does not run, and returns when it consumes messages."""
        if not self.is_alive:
            self._stack.close()
            self.starts += 1
            self.process = self._stack.enter_context(worker(self.settings, self.log, module=self.module))
            until(lambda: is_ready(self.log) or not self.is_alive)
        self.seen = len(self.log.read_text())
        return self

    def end(self) -> None:
        """Stops the worker until the next test calls `ready`."""
        self._stack.close()

    @contextmanager
    def busy(self, engine: Engine) -> Iterator[None]:
        """Blocks the worker in the middle of a message, so that it consumes no other."""
        with blocking(engine, BUSY):
            publish(self.settings, [delivery(event("labtest.order.created", BUSY, {}), name=BUSY)])
            until(lambda: rows(engine, IS_WAITING))
            yield


@contextmanager
def blocking(engine: Engine, name: str) -> Iterator[None]:
    """Until the block ends, workers wait in the middle of the delivery with this name, for up to 45 s."""
    with (
        fault(engine, WAIT, f"NEW.message_id = '{name}'", "deliveries"),
        engine.connect() as connection,
        connection.begin(),
    ):
        connection.execute(text("SELECT pg_advisory_xact_lock(7)"))
        yield


def ledger(engine: Engine) -> list[dict[str, object]]:
    """The number of deliveries per outcome and attempts, without BUSY."""
    return rows(
        engine,
        "SELECT outcome, attempts, count(*) AS n FROM health.deliveries WHERE message_id <> :busy GROUP BY 1, 2",
        busy=BUSY,
    )
