"""The publisher of a process of the endpoint: on the event loop for Redis and Valkey, in a thread for RabbitMQ."""

# ruff: noqa: PLC0415 - importing Celery costs 0.2 s of CPU and 20 MB, and only RabbitMQ needs it
import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from app.broker.lanes import is_amqp
from app.config.settings import Settings
from app.delivery import Delivery

Publish = Callable[[Sequence[Delivery]], Awaitable[None]]
BlockingPublish = Callable[[Sequence[Delivery]], None]
Ping = Callable[[], None]


def make_publisher(settings: Settings) -> tuple[Publish, Ping]:
    """Two functions: one publishes, one checks the broker in the thread of its caller. Both raise PublishFailed."""
    if is_amqp(settings.need_broker()):
        from app.broker.celery import make_celery
        from app.broker.rabbitmq_publisher import RabbitMQPublisher

        publisher = RabbitMQPublisher(make_celery(settings, "publisher"))
        return in_thread(publisher.publish), publisher.ping
    from app.broker.redis_publisher import RedisPublisher

    return RedisPublisher(settings).publish, RedisPublisher(settings).ping


def in_thread(publish: BlockingPublish) -> Publish:
    """The publish function of a client that blocks, run in a thread of its own."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="publisher")  # starts its thread with the first call

    async def publish_in_thread(deliveries: Sequence[Delivery]) -> None:
        context = contextvars.copy_context()  # with the current span
        await asyncio.get_running_loop().run_in_executor(executor, context.run, publish, deliveries)

    return publish_in_thread
