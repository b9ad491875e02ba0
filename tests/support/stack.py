"""A complete `headrace up` for tests."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import psycopg

from tests.support import ENVIRONMENT, HTTP, message_id, signed, until
from tests.support.servers import server_folder
from workers.local.ports import free_port
from workers.local.stack import _remove_metrics_folder

# Runs each command as the console script does, but all in one interpreter.
RUN_ALL = """
import json, sys
from click.testing import CliRunner
from workers.cli.main import main
options = {"prog_name": "headrace", "catch_exceptions": False}
done = [CliRunner().invoke(main, words, **options) for words in json.loads(sys.argv[1])]
print(json.dumps([(one.exit_code, one.output) for one in done]))
"""


class Stack:
    """A `headrace up` in its own folder. It can be restarted there."""

    def __init__(self, folder: Path, **more: str) -> None:
        self.more = more  # environment variables
        self.data = folder / "data"
        self.output = folder / "output"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the stack, and returns when it is ready."""
        process = self.launch()
        until(lambda: self.file.exists() or process.poll() is not None, 120)
        assert self.file.exists(), self.output.read_text()

    def launch(self) -> "subprocess.Popen[bytes]":
        """Starts `headrace up`, and does not wait until it is ready."""
        command = (sys.executable, "-m", "workers.cli", "up", "--data-dir", str(self.data), "--workers", "1")
        # A killed worker's message is redelivered after 5 s; one process is enough for the endpoint.
        environment = {"HEADRACE_VISIBILITY_TIMEOUT_SECONDS": "5", "HEADRACE_WEB_PROCESSES": "1"}
        # The default ports could be chosen by two stacks that start at the same time; the second one would not start.
        ports = {f"HEADRACE_{name}_PORT": str(free_port()) for name in ("FLOWER", "OPERATIONS")}
        environment |= ports | self.more
        with self.output.open("ab") as out:
            self.process = subprocess.Popen(command, env=ENVIRONMENT | environment, stdout=out, stderr=out)
        return self.process

    def end(self, number: signal.Signals) -> int:
        """Sends a signal; returns the exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)

    @property
    def file(self) -> Path:
        return self.data / "stack.json"

    @property
    def info(self) -> dict[str, Any]:
        """The current stack.json."""
        return dict(json.loads(self.file.read_text()))

    def pid(self, group: str) -> int | None:
        """The process id of the first process of a group, or None."""
        return next(iter(self.info["processes"][group]), None)

    def post(self, body: Any, name: str | None = None, secret: str | None = None) -> httpx.Response:
        """Sends an event as Junction does."""
        info, now = self.info, datetime.now(UTC)
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        headers = signed(raw, name=name or message_id(now), at=now, secret=secret or info["junction_webhook_secret"])
        return HTTP.post(f"{info['web']}/webhooks/junction", content=raw, headers=headers)

    def deliver(self, body: Any) -> None:
        """Sends an event again, as Junction does, until the endpoint accepts it."""
        name = message_id(datetime.now(UTC))

        def is_accepted() -> bool:
            try:
                return self.post(body, name).status_code == 202
            except httpx.TransportError:
                return False

        until(is_accepted)

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Runs a command against the stack's data directory."""
        command = (sys.executable, "-m", "workers.cli", *words, "--data-dir", str(self.data))
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=60, check=False)

    def run_all(self, *commands: Sequence[str]) -> list[tuple[int, str]]:
        """Runs several commands in one process. Returns the exit status and output of each."""
        given = json.dumps([[*words, "--data-dir", str(self.data)] for words in commands])
        command = (sys.executable, "-c", RUN_ALL, given)
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return [(status, output) for status, output in json.loads(done.stdout)]

    @property
    def _environment(self) -> dict[str, str]:
        return ENVIRONMENT | self.more

    def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """The result rows of a query; [] while the database is unavailable."""
        try:
            with psycopg.connect(self.info["database_url"], connect_timeout=5) as connection:
                return connection.execute(query, parameters).fetchall()
        except psycopg.OperationalError:
            return []

    def family(self) -> list[psutil.Process]:
        """Every process of the stack, found by its environment, command line or working directory."""
        found = []
        for one in psutil.process_iter():
            try:
                has_variable = one.environ().get("HEADRACE_DATA_DIR") == str(self.data)
                if has_variable or str(self.data) in " ".join(one.cmdline()) or one.cwd().startswith(str(self.data)):
                    found.append(one)
            except psutil.Error:
                continue
        return [one for one in found if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def started(**more: str) -> Iterator[Stack]:
    """Runs a stack with these environment variables until the block ends."""
    with server_folder("stack") as folder:
        one = Stack(folder, **more)
        try:
            one.start()
            yield one
        finally:
            if one.process is not None and one.process.poll() is None:
                one.end(signal.SIGTERM)
            _remove_metrics_folder(one.data)  # of a stack that was killed
