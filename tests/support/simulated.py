"""Shared by the tests of the simulator: the end of its simulated time, API keys, and a webhook endpoint."""

import json
import threading
from datetime import UTC, datetime

from flask import Flask, request
from werkzeug.serving import make_server

from workers.simulator import server
from workers.simulator.terra.api import API_KEY, DEV_ID

UNTIL = datetime(2026, 11, 20, 12, 34, 56, tzinfo=UTC)
KEY = server.API_KEY
KEYS = {"dev-id": DEV_ID, "x-api-key": API_KEY}  # headers of Terra's API


class Endpoint:
    """A webhook endpoint that responds with the statuses in `answers`, then with 202.

    `received` contains a pair for each request: the result of `verify(headers, body)`, and the event.
    """

    def __init__(self, verify):
        self.received, self.answers = [], []
        self._verify = verify
        app = Flask("endpoint")
        app.add_url_rule("/webhooks", "webhooks", self._receive, methods=["POST"])
        self._server = make_server("127.0.0.1", 0, app, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.port}/webhooks"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _receive(self):
        body = request.get_data()
        self.received.append((self._verify(request.headers, body), json.loads(body)))
        return "", self.answers.pop(0) if self.answers else 202
