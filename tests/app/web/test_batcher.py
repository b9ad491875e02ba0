"""The batcher: who travels together, who is answered what, and that nobody waits for ever."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from app.delivery import Delivery
from app.errors import PublishFailed
from app.web.batcher import Batcher

LONG = 20.0


class Broker:
    """Takes messages, but only while `open` is set. Fails as it is told to."""

    def __init__(self) -> None:
        self.messages: list[list[str]] = []
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.open.set()
        self.fail: Callable[[list[str]], None] = lambda _: None

    def publish(self, deliveries: Sequence[Delivery]) -> None:
        """What a batcher calls."""
        names = [one.message_id for one in deliveries]
        self.entered.release()
        assert self.open.wait(LONG)
        self.fail(names)
        self.messages.append(names)

    @property
    def published(self) -> list[str]:
        """Everything in the order in which it was taken."""
        return [name for message in self.messages for name in message]


@pytest.fixture
def broker() -> Iterator[Broker]:
    """A broker that lets everything go at the end."""
    broker = Broker()
    yield broker
    broker.open.set()


def batcher_of(broker: Broker, *, deadline: float = LONG, max_deliveries: int = 200, max_bytes: int = 10**6) -> Batcher:
    return Batcher(broker.publish, deadline=deadline, max_deliveries=max_deliveries, max_bytes=max_bytes)


def pending(name: str, size: int = 1) -> Delivery:
    return Delivery("junction", name, 0.0, b"x" * size)


@contextmanager
def queued(broker: Broker, batcher: Batcher, batch: list[Delivery]) -> Iterator[list[Future[None]]]:
    """The deliveries wait, in their order, behind one called `first` whose publish hangs until the block ends."""
    broker.open.clear()
    with ThreadPoolExecutor(len(batch) + 1) as pool:
        waiting = [pool.submit(batcher.publish, pending("first"))]
        assert broker.entered.acquire(timeout=LONG)
        for number, one in enumerate(batch, 1):
            waiting.append(pool.submit(batcher.publish, one))
            until(lambda number=number: batcher._queue.qsize() == number)
        try:
            yield waiting
        finally:
            broker.open.set()


def until(condition: Callable[[], bool]) -> None:
    """Waits for what another thread will do."""
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batcher"]


def test_one_at_a_time_is_one_delivery_per_message(broker: Broker) -> None:
    """Breaks if a lonely request waits for company."""
    batcher = batcher_of(broker)
    names = [str(n) for n in range(20)]
    for name in names:
        batcher.publish(pending(name))
        assert broker.published[-1] == name
    assert broker.messages == [[name] for name in names]


def test_what_arrives_during_a_publish_leaves_together(broker: Broker) -> None:
    """Breaks if concurrent requests cost a message each, or one is lost, doubled or put out of order."""
    batcher = batcher_of(broker)
    batch = [pending(str(n)) for n in range(32)]
    with queued(broker, batcher, batch) as waiting:
        assert not any(one.done() for one in waiting)
    assert [one.result() for one in waiting] == [None] * 33
    assert broker.messages == [["first"], [str(n) for n in range(32)]]


def test_under_load_messages_are_few_and_nothing_is_lost(broker: Broker) -> None:
    """Breaks if 32 requests at a time do not share messages, or some are published twice or never."""
    broker.fail = lambda _: time.sleep(0.005)
    batcher = batcher_of(broker)
    names = [str(n) for n in range(320)]
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda name: batcher.publish(pending(name)), names))
    assert sorted(broker.published) == sorted(names)
    assert len(broker.messages) < 160


def test_nobody_is_answered_before_the_message_is_taken(broker: Broker) -> None:
    """Breaks if a request is answered while its message is still on its way."""
    batcher = batcher_of(broker)
    broker.open.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(batcher.publish, pending("one"))
        assert broker.entered.acquire(timeout=LONG)
        time.sleep(0.05)
        assert not waiting.done()
        broker.open.set()
        assert waiting.result(LONG) is None


def test_a_failure_reaches_all_who_shared_the_message_and_nobody_else(broker: Broker) -> None:
    """Breaks if a request is told that its delivery is safe when another message was."""

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
    """Breaks if a message grows with the load instead of staying what a broker and a worker can hold."""
    batcher = batcher_of(broker, max_deliveries=max_deliveries, max_bytes=max_bytes)
    with queued(broker, batcher, [pending(str(n), size) for n, size in enumerate(sizes)]):
        pass
    assert [len(message) for message in broker.messages] == [1, *expected]
    assert broker.published == ["first", *(str(n) for n in range(len(sizes)))]


def test_a_large_body_does_not_join_a_message_that_it_would_burst(broker: Broker) -> None:
    """Breaks if a message may be larger than the limit although each of its deliveries is smaller."""
    batcher = batcher_of(broker, max_bytes=100)
    with queued(broker, batcher, [pending("0", 60), pending("1", 90)]):
        pass
    assert broker.messages == [["first"], ["0"], ["1"]]


def test_a_publish_that_hangs_is_refused_in_time_and_later_ones_at_once(broker: Broker) -> None:
    """Breaks if a frozen broker makes requests wait longer than their sender, or holds every thread of the server."""
    batcher = batcher_of(broker, deadline=0.3)
    broker.open.clear()
    began = time.monotonic()
    with pytest.raises(PublishFailed, match="not confirmed within the deadline"):
        batcher.publish(pending("hangs"))
    assert 0.25 < time.monotonic() - began < 3
    time.sleep(0.05)
    began = time.monotonic()
    for n in range(50):
        with pytest.raises(PublishFailed, match="longer than the deadline"):
            batcher.publish(pending(f"late {n}"))
    assert time.monotonic() - began < 3  # 15 s if each waited
    assert broker.messages == []


def test_it_recovers_and_does_not_publish_what_was_refused(broker: Broker) -> None:
    """Breaks if a broker that is back stays unused, or gets what its senders are about to send again."""
    batcher = batcher_of(broker, deadline=0.3)
    broker.open.clear()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(batcher.publish, pending("hangs"))]
        assert broker.entered.acquire(timeout=LONG)
        waiting += [pool.submit(batcher.publish, pending(f"abandoned {n}")) for n in range(7)]
        assert all(isinstance(one.exception(LONG), PublishFailed) for one in waiting)
    broker.open.set()
    until(lambda: broker.messages == [["hangs"]])
    until(lambda: batcher._in_flight_since is None)
    batcher.publish(pending("after"))
    assert broker.messages == [["hangs"], ["after"]]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_thread_is_started_again_if_it_died(broker: Broker) -> None:
    """Breaks if one unforeseen error in a publish ends all publishing, or is told to a request as it is."""

    def fail(names: list[str]) -> None:
        if names == ["bad"]:
            raise ZeroDivisionError("canary")

    broker.fail = fail
    batcher = batcher_of(broker)
    batcher.publish(pending("before"))
    with pytest.raises(PublishFailed) as refused:
        batcher.publish(pending("bad"))
    assert "canary" not in str(refused.value)
    assert batcher._thread is not None
    batcher._thread.join(0.3)  # whether it dies of that or goes on is its own affair
    batcher.publish(pending("after"))
    assert broker.published == ["before", "after"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_waits_behind_an_unforeseen_error_is_published(broker: Broker) -> None:
    """Breaks if an unforeseen error also costs the requests that had nothing to do with it."""

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


def test_the_text_of_an_unforeseen_error_is_not_printed() -> None:
    """Breaks if the error of a publish, which may quote what was to be published, reaches the log of the process."""
    program = """
from app.web.batcher import Batcher
from app.delivery import Delivery
from app.errors import PublishFailed
import time

def publish(deliveries):
    raise ValueError("canary")

try:
    Batcher(publish, deadline=5, max_deliveries=1, max_bytes=1).publish(Delivery("junction", "m", 0.0, b"x"))
except PublishFailed:
    time.sleep(0.5)
    print("refused")
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "refused\n"
    assert "canary" not in done.stderr


def test_it_has_no_thread_before_the_first_request(broker: Broker) -> None:
    """Breaks if a thread is started before the server forks, which it does not survive."""
    before = len(threads())
    batcher = batcher_of(broker)
    assert len(threads()) == before
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: batcher.publish(pending(str(n))), range(64)))
    assert len(threads()) == before + 1
