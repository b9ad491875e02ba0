"""The batcher: batches, errors and deadlines."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import PublishFailed
from app.web.batcher import Batcher
from app.web.publishing import in_thread

LONG = 20.0


class Broker:
    """Records messages while `open` is set; raises the error of `fail`."""

    def __init__(self) -> None:
        self.messages: list[list[str]] = []
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.open.set()
        self.fail: Callable[[list[str]], None] = lambda _: None

    def publish(self, deliveries: Sequence[Delivery]) -> None:
        names = [one.message_id for one in deliveries]
        self.entered.release()
        assert self.open.wait(LONG)
        self.fail(names)
        self.messages.append(names)

    @property
    def published(self) -> list[str]:
        """All deliveries in the order of publishing."""
        return [name for message in self.messages for name in message]


@pytest.fixture
def broker() -> Iterator[Broker]:
    """A broker that is opened at the end of the test."""
    broker = Broker()
    yield broker
    broker.open.set()


def batcher_of(broker: Broker, *, deadline: float = LONG, max_deliveries: int = 200, max_bytes: int = 10**6) -> Batcher:
    limits = Settings(enqueue_deadline_seconds=deadline, message_deliveries=max_deliveries, message_bytes=max_bytes)
    return Batcher(limits, in_thread(broker.publish))


def pending(name: str, size: int = 1) -> Delivery:
    return Delivery("junction", name, 0.0, b"x" * size)


@contextmanager
def queued(broker: Broker, batcher: Batcher, batch: list[Delivery]) -> Iterator[list[Future[None]]]:
    """The deliveries are queued behind one named `first`, whose publish blocks until the end of the block."""
    broker.open.clear()
    with ThreadPoolExecutor(len(batch) + 1) as pool:
        waiting = [pool.submit(batcher.publish_from_thread, pending("first"))]
        assert broker.entered.acquire(timeout=LONG)
        for number, one in enumerate(batch, 1):
            waiting.append(pool.submit(batcher.publish_from_thread, one))
            until(lambda number=number: len(batcher._waiting) == number)
        try:
            yield waiting
        finally:
            broker.open.set()


def until(condition: Callable[[], bool]) -> None:
    """Waits for another thread."""
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("publisher")]


def test_requests_that_are_ready_together_share_a_message(broker: Broker) -> None:
    """Breaks if the first of several requests in one round of the event loop is published alone."""

    async def requests() -> None:
        batcher = batcher_of(broker)
        await asyncio.gather(*(batcher.publish(pending(str(n))) for n in range(5)))

    asyncio.run(requests())
    assert broker.messages == [["0", "1", "2", "3", "4"]]


def test_one_at_a_time_is_one_delivery_per_message(broker: Broker) -> None:
    """Breaks if a single request lingers."""
    batcher = batcher_of(broker)
    names = [str(n) for n in range(20)]
    for name in names:
        batcher.publish_from_thread(pending(name))
        assert broker.published[-1] == name
    assert broker.messages == [[name] for name in names]


def test_deliveries_that_arrive_during_a_publish_share_a_message(broker: Broker) -> None:
    """Breaks if concurrent requests do not share a message, or one is lost, duplicated or reordered."""
    batcher = batcher_of(broker)
    batch = [pending(str(n)) for n in range(32)]
    with queued(broker, batcher, batch) as waiting:
        assert not any(one.done() for one in waiting)
    assert [one.result() for one in waiting] == [None] * 33
    assert broker.messages == [["first"], [str(n) for n in range(32)]]


def test_under_load_messages_are_few_and_nothing_is_lost(broker: Broker) -> None:
    """Breaks if 32 concurrent requests do not share messages, or a delivery is lost or duplicated."""
    broker.fail = lambda _: time.sleep(0.005)
    batcher = batcher_of(broker)
    names = [str(n) for n in range(320)]
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda name: batcher.publish_from_thread(pending(name)), names))
    assert sorted(broker.published) == sorted(names)
    assert len(broker.messages) < 160


def test_no_request_is_answered_before_its_message_is_published(broker: Broker) -> None:
    """Breaks if a request is answered before its message is published."""
    batcher = batcher_of(broker)
    broker.open.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(batcher.publish_from_thread, pending("one"))
        assert broker.entered.acquire(timeout=LONG)
        time.sleep(0.05)
        assert not waiting.done()
        broker.open.set()
        assert waiting.result(LONG) is None


def test_a_failure_reaches_the_requests_of_its_message_only(broker: Broker) -> None:
    """Breaks if a request succeeds because another message was published."""

    def fail(names: list[str]) -> None:
        if "2" in names:
            raise PublishFailed("full")

    broker.fail = fail
    batcher = batcher_of(broker, max_deliveries=2)
    with queued(broker, batcher, [pending(str(n)) for n in range(6)]) as waiting:
        pass
    answers = [one.exception() for one in waiting]
    assert [isinstance(error, PublishFailed) for error in answers] == [False, False, False, True, True, False, False]
    assert str(answers[3]) == "full"
    assert broker.messages == [["first"], ["0", "1"], ["4", "5"]]


@pytest.mark.parametrize(
    ("max_deliveries", "max_bytes", "sizes", "expected"),
    [
        (4, 10**6, [1] * 10, [4, 4, 2]),
        (1, 10**6, [1] * 3, [1, 1, 1]),
        (0, 10**6, [1] * 2, [1, 1]),
        (100, 50, [10] * 10, [5, 5]),
        (100, 50, [500, 20, 30, 500, 1], [1, 2, 1, 1]),
        (100, 0, [1, 1], [1, 1]),
    ],
)
def test_a_message_has_a_size(
    broker: Broker, max_deliveries: int, max_bytes: int, sizes: list[int], expected: list[int]
) -> None:
    """Breaks if a message exceeds the maximum number of deliveries."""
    batcher = batcher_of(broker, max_deliveries=max_deliveries, max_bytes=max_bytes)
    with queued(broker, batcher, [pending(str(n), size) for n, size in enumerate(sizes)]):
        pass
    assert [len(message) for message in broker.messages] == [1, *expected]
    assert broker.published == ["first", *(str(n) for n in range(len(sizes)))]


def test_a_large_body_does_not_join_a_message_that_it_would_burst(broker: Broker) -> None:
    """Breaks if a message of small deliveries exceeds the maximum size."""
    batcher = batcher_of(broker, max_bytes=100)
    with queued(broker, batcher, [pending("0", 60), pending("1", 90)]):
        pass
    assert broker.messages == [["first"], ["0"], ["1"]]


def test_a_publish_that_hangs_is_refused_in_time_and_later_ones_at_once(broker: Broker) -> None:
    """Breaks if a frozen broker blocks requests longer than the deadline."""
    batcher = batcher_of(broker, deadline=0.3)
    broker.open.clear()
    began = time.monotonic()
    with pytest.raises(PublishFailed, match="not confirmed within the deadline"):
        batcher.publish_from_thread(pending("hangs"))
    assert 0.25 < time.monotonic() - began < 3
    time.sleep(0.05)
    began = time.monotonic()
    for n in range(50):
        with pytest.raises(PublishFailed, match="longer than the deadline"):
            batcher.publish_from_thread(pending(f"late {n}"))
    assert time.monotonic() - began < 3  # 15 s if each waited
    assert broker.messages == []


def test_it_recovers_and_does_not_publish_rejected_deliveries(broker: Broker) -> None:
    """Breaks if a recovered broker is not used, or receives abandoned deliveries."""
    batcher = batcher_of(broker, deadline=0.3)
    broker.open.clear()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(batcher.publish_from_thread, pending("hangs"))]
        assert broker.entered.acquire(timeout=LONG)
        waiting += [pool.submit(batcher.publish_from_thread, pending(f"abandoned {n}")) for n in range(7)]
        assert all(isinstance(one.exception(LONG), PublishFailed) for one in waiting)
    broker.open.set()
    until(lambda: broker.messages == [["hangs"]])
    until(lambda: batcher._in_flight_since is None)
    batcher.publish_from_thread(pending("after"))
    assert broker.messages == [["hangs"], ["after"]]


def test_an_unexpected_error_does_not_stop_it(broker: Broker) -> None:
    """Breaks if an unexpected error of a publish stops the batcher, or reaches a request with its text."""

    def fail(names: list[str]) -> None:
        if names == ["bad"]:
            raise ZeroDivisionError("canary")

    broker.fail = fail
    batcher = batcher_of(broker)
    batcher.publish_from_thread(pending("before"))
    with pytest.raises(PublishFailed) as refused:
        batcher.publish_from_thread(pending("bad"))
    assert "canary" not in str(refused.value)
    batcher.publish_from_thread(pending("after"))
    assert broker.published == ["before", "after"]


def test_a_delivery_queued_behind_an_unexpected_error_is_published(broker: Broker) -> None:
    """Breaks if an unexpected error also fails the requests of the next message."""

    def fail(names: list[str]) -> None:
        if names == ["first"]:
            raise ZeroDivisionError("canary")

    broker.fail = fail
    batcher = batcher_of(broker, deadline=2)
    with queued(broker, batcher, [pending("behind")]) as waiting:
        pass
    assert isinstance(waiting[0].exception(), PublishFailed)
    assert waiting[1].exception() is None
    assert broker.published == ["behind"]


def test_the_text_of_an_unexpected_error_is_not_printed() -> None:
    """Breaks if the text of a publish error, which may quote a body, is logged."""
    program = """
from app.web.batcher import Batcher
from app.web.publishing import in_thread
from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import PublishFailed
import asyncio

async def publish(deliveries):
    raise ValueError("canary")

try:
    batcher = Batcher(Settings(), publish)
    asyncio.run(batcher.publish(Delivery("junction", "m", 0.0, b"x")))
except PublishFailed:
    print("refused")
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "refused\n"
    assert "canary" not in done.stderr


def test_it_has_no_thread_before_the_first_request(broker: Broker) -> None:
    """Breaks if a thread starts before the server forks: threads do not survive a fork."""
    before = set(threads())
    batcher = batcher_of(broker)
    assert set(threads()) <= before
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: batcher.publish_from_thread(pending(str(n))), range(64)))
    assert len(set(threads()) - before) == 1
