"""The subscriber of a drill: an endpoint that refuses some notifications and does not answer others."""

import json
import subprocess
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from threading import Event as Flag
from threading import Lock, Thread

from standardwebhooks import Webhook, WebhookVerificationError

from app.commands import own
from app.config.settings import process_environment
from workers.local.supervisor import NotStarted

NAME, EVENT, RESOURCE = "drill", "workouts.changed", "workouts"
REFUSED, HANGING = 0.1, 0.05  # shares of the requests
COMMAND_SECONDS = 60
HANG_SECONDS = 15.0  # longer than a notification waits for its answer
HEADERS = ("webhook-id", "webhook-timestamp", "webhook-signature")


@dataclass(frozen=True)
class SubscriberTotals:
    """Notifications that the subscriber was sent."""

    accepted: int
    refused: int
    unanswered: int
    forged: int  # with a wrong signature, or with another body under the same id
    missing: int  # changed records that no accepted notification names

    @property
    def is_exact(self) -> bool:
        return not self.forged and not self.missing


class Subscriber:
    """The endpoint and its subscription. Accepts everything after `settle`."""

    def __init__(self, data_dir: Path, seed: int) -> None:
        self._rng, self._lock = Random(seed), Lock()  # noqa: S311 - repeatable on purpose
        self._calm = Flag()
        self._bodies: dict[str, bytes] = {}
        self.ids: set[str] = set()  # of the records in accepted notifications
        self._accepted = self._refused = self._unanswered = self._forged = 0
        self._data_dir, self._server = data_dir, _Server(self)
        Thread(target=self._server.serve_forever, daemon=True).start()
        self._verifier = Webhook(_subscribe(data_dir, f"http://127.0.0.1:{self._server.server_port}/"))

    def answer(self, body: bytes, headers: dict[str, str]) -> int | None:
        """The status of the answer to a notification; None: no answer."""
        with self._lock:
            share = 1.0 if self._calm.is_set() else self._rng.random()
            if not self._is_genuine(body, headers):
                self._forged += 1
                return 401
            if share < REFUSED:
                self._refused += 1
                return 503
            if share < REFUSED + HANGING:
                self._unanswered += 1
                return None
            self._accepted += 1
            self.ids.update(json.loads(body)["data"]["ids"])
            return 204

    def _is_genuine(self, body: bytes, headers: dict[str, str]) -> bool:
        try:
            self._verifier.verify(body, headers)
        except WebhookVerificationError:
            return False
        return self._bodies.setdefault(headers["webhook-id"], body) == body

    def hang(self) -> None:
        """Waits longer than the sender, or until the end of the load."""
        self._calm.wait(HANG_SECONDS)

    def settle(self) -> None:
        self._calm.set()

    def close(self) -> None:
        self._calm.set()
        self._server.shutdown()
        self._server.server_close()
        # The database may be the user's, or unavailable after a failed drill.
        _command("remove", NAME, data_dir=self._data_dir)

    def totals(self, changed: set[str]) -> SubscriberTotals:
        """Compares with the ids of the records that have changed."""
        missing = len(changed - self.ids)
        return SubscriberTotals(self._accepted, self._refused, self._unanswered, self._forged, missing)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, subscriber: Subscriber) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.subscriber = subscriber


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status = self.server.subscriber.answer(body, {name: self.headers.get(name, "") for name in HEADERS})
        if status is None:
            self.server.subscriber.hang()
            self.close_connection = True
            return
        self.send_response(status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        pass


def _subscribe(data_dir: Path, url: str) -> str:
    """Adds the subscription with the command, as an operator does. Returns the signing secret."""
    done = _command("add", NAME, "--url", url, "--event", EVENT, "--window", "1", data_dir=data_dir)
    if done.returncode:
        raise NotStarted(done.stderr.strip())
    return next(word for word in done.stdout.split() if word.startswith("whsec_"))


def _command(*words: str, data_dir: Path) -> "subprocess.CompletedProcess[str]":
    command = own("workers.cli", "subscriptions", *words, "--data-dir", str(data_dir))
    return subprocess.run(
        command, env=process_environment(), capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS
    )
