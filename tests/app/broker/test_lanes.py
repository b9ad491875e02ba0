"""The lanes."""

from app.broker.celery import make_celery
from app.broker.lanes import LANES, is_amqp
from app.config.settings import Settings
from tests.support.cases import Failures


def test_lanes_are_declared_and_durable() -> None:
    """Breaks if a lane is missing or not durable, or messages go to a queue without a consumer."""
    failures = Failures()
    for role in ("publisher", "worker"):
        for url in ("redis://h", "rediss://h", "amqp://h", "amqps://h"):
            with failures.of(role, url):
                celery = make_celery(Settings(broker_url=url), role)  # type: ignore[arg-type]
                queues = celery.conf.task_queues
                names = ["live", "download", "backfill", "maintenance", "notify", "derive"]
                assert [queue.name for queue in queues] == list(LANES) == names
                assert all(queue.durable and queue.exchange.durable for queue in queues)
                quorum = {"x-queue-type": "quorum"} if is_amqp(url) else None
                assert [queue.queue_arguments for queue in queues] == [quorum] * len(LANES)
                assert celery.conf.task_create_missing_queues is False
                assert celery.conf.task_default_queue in LANES
    assert failures == {}
