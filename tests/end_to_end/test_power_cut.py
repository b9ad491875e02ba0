"""A power cut of the broker: kill -9 plus the loss of all unsynced data. Confirmed deliveries must survive it.

kill -9 alone proves nothing, because the kernel still writes the dirty pages of a killed process. Therefore a library
that is preloaded into the real server logs every fsync, and the test truncates the files to their synced length.
"""

import base64
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import redis

from app.config.settings import Settings
from app.delivery import unpack
from app.errors import PublishFailed
from tests.support import delivery, until, workout
from tests.support.broker import BlockingPublisher
from workers.local import embedded_valkey, wheels
from workers.local.supervisor import running

SOURCE = Path(__file__).with_name("synced.c")
THREADS, ENOUGH = 4, 400


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preloaded library that logs the synced length of every file."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and Linux to log the fsyncs of the broker")
    if not wheels.available():
        pytest.skip("no Valkey wheel for this platform")
    built = tmp_path_factory.mktemp("synced") / "synced.so"
    command = (compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(built), str(SOURCE), "-ldl")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return built


@dataclass
class Broker:
    """A Valkey that can be restarted on the same files."""

    folder: Path
    library: Path
    policy: str

    @property
    def log(self) -> Path:
        """The log of the library: inode and synced length, one line per fsync."""
        return self.folder.parent / "synced.log"

    @contextmanager
    def started(self) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
        """The process of the server and its URL."""
        program, url = embedded_valkey.valkey(self.folder, "tests", self.folder.parent / "valkey.log")
        configuration = self.folder / "valkey.conf"
        text = configuration.read_text()
        assert "appendfsync always\n" in text
        configuration.write_text(text.replace("appendfsync always", f"appendfsync {self.policy}"))
        more = {"LD_PRELOAD": str(self.library), "SYNCED_LOG": str(self.log)}
        with running(replace(program, environment={**program.environment, **more})) as process:
            yield process, url

    def synced(self) -> dict[int, int]:
        """The synced length in bytes of each file, by inode."""
        lines = (line.split() for line in self.log.read_text().splitlines())
        return {int(inode): int(length) for inode, length in lines}

    def cut_the_power(self) -> int:
        """Truncates each file to its synced length; returns the number of bytes lost."""
        synced, lost = self.synced(), 0
        for file in (self.folder / "appendonlydir").iterdir():
            length = file.stat().st_size
            on_disk = min(synced.get(file.stat().st_ino, 0), length)
            with file.open("r+b") as opened:
                opened.truncate(on_disk)
            lost += length - on_disk
        return lost

    def queued(self) -> set[str]:
        """The message ids of the deliveries in the queue after a restart."""
        with self.started() as (_, url), redis.Redis.from_url(url) as client:
            messages = [json.loads(raw) for raw in client.lrange("live", 0, -1)]
        packed = [json.loads(base64.b64decode(message["body"]))[0][0] for message in messages]
        return {one.message_id for message in packed for one in unpack(message)}


@dataclass
class Publishers:
    """Publishes until the broker is killed, and collects the confirmed message ids."""

    url: str
    confirmed: set[str] = field(default_factory=set)

    def publish(self) -> None:
        """Publishes one delivery after the other."""
        publisher = BlockingPublisher(Settings(broker_url=self.url))
        try:
            while True:
                one = delivery(workout("u1"))
                publisher.publish([one])
                self.confirmed.add(one.message_id)
        except PublishFailed:
            return
        finally:
            publisher.close()


def confirmed_before_a_kill(broker: Broker) -> set[str]:
    """The message ids confirmed before the broker was killed under load; with `everysec`, late in its second."""
    with broker.started() as (process, url):
        publishers = Publishers(url)
        threads = [threading.Thread(target=publishers.publish) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: len(publishers.confirmed) >= ENOUGH)
            if broker.policy == "everysec":
                since = time.time()
                until(lambda: broker.log.stat().st_mtime > since)
                until(lambda: time.time() - broker.log.stat().st_mtime > 0.2)
        finally:
            process.kill()
            for thread in threads:
                thread.join(30)
        process.wait(30)
    return publishers.confirmed


@pytest.mark.parametrize("policy", ["always", "everysec"])
def test_a_power_cut_loses_no_confirmed_delivery(library: Path, tmp_path: Path, policy: str) -> None:
    """Breaks if a 202 is sent before the event is on disk; with `everysec`, if this test does not detect the loss."""
    broker = Broker(tmp_path / "broker", library, policy)
    confirmed = confirmed_before_a_kill(broker)
    cut = broker.cut_the_power()
    lost = confirmed - broker.queued()
    if policy == "always":
        assert lost == set()
    else:
        assert cut > 0
        assert 0 < len(lost) < len(confirmed)


def test_a_kill_alone_loses_nothing(library: Path, tmp_path: Path) -> None:
    """Breaks if the loss in the test above has another cause than the truncation."""
    broker = Broker(tmp_path / "broker", library, "everysec")
    confirmed = confirmed_before_a_kill(broker)
    assert confirmed - broker.queued() == set()
