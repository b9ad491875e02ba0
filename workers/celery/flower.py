"""Flower, read-only, with a password on every page, /metrics included, and a bounded history."""

import asyncio
import base64
import functools
import hmac
import os
import time
from pathlib import Path
from typing import Any

import flower
from flower import urls
from flower.api import BaseApiHandler
from flower.app import Flower
from flower.views import BaseHandler
from flower.views.auth import LoginHandler, LogoutHandler
from flower.views.error import NotFoundErrorHandler
from flower.views.monitor import Healthcheck
from tornado.web import HTTPError, RequestHandler, StaticFileHandler

from app.broker.celery import make_celery
from app.config import sentinel_url
from app.config.settings import load, process_environment
from app.errors import Misconfigured
from workers.celery.guesses import Guesses

settings = load()
celery = make_celery(settings, "worker")  # without the tasks, whose libraries take 25 MB; events name them
# With --app: otherwise Celery's command line would load the module that the variable APP names.
APP = f"{__name__}:celery"
OPTIONS = ["--persistent=False", "--max_tasks=5000", "--max_workers=500", "--purge_offline_workers=60"]
OPTIONS.append("--enable_events=False")  # our workers always send events; Flower would ask for them every five seconds
READ_ONLY = ("GET", "HEAD", "OPTIONS")
SCRIPT = "js/flower.js"
guesses = Guesses()


async def check_password(handler: BaseHandler) -> None:
    """Raises HTTPError 401 without the password, for every handler that is not public.

    Compares in constant time, once per request. A request without credentials does not count as a guess. Flower's own
    comparison answers 500 to a non-ASCII password.
    """
    handler.current_user = None
    if isinstance(handler, PUBLIC):
        return
    header = handler.request.headers.get("Authorization", "")
    if not header:
        raise HTTPError(401)
    address = handler.request.remote_ip or ""
    seconds = guesses.wait(address, time.monotonic())
    if seconds is None:
        raise HTTPError(429)
    if seconds:  # no `await` from here to `record`: another guess must not be compared in between
        await asyncio.sleep(seconds)
    scheme, _, encoded = header.partition(" ")
    try:
        credentials = base64.b64decode(encoded, validate=True) if scheme.lower() == "basic" else b""
    except ValueError:  # also for text that is not ASCII
        credentials = b""
    is_right = hmac.compare_digest(credentials, settings.need_flower_auth().encode())
    guesses.record(address, time.monotonic(), is_right=is_right)
    if not is_right:
        raise HTTPError(401)
    handler.current_user = True


class Static(StaticFileHandler):
    """Flower's static files. In its script, the table of tasks sends GET instead of POST."""

    @classmethod
    def get_content(cls, abspath: str, start: int | None = None, end: int | None = None) -> Any:
        content = super().get_content(abspath, start, end)
        return _script()[start:end] if abspath.endswith(SCRIPT) else content


@functools.cache
def _script() -> bytes:
    """The changed script, as long as the original. Raises Misconfigured if the table of tasks would be empty."""
    text = (Path(flower.__file__).parent / "static" / SCRIPT).read_bytes()
    head, table, rest = text.partition(b"url: url_prefix() + '/tasks/datatable'")
    before, post, between = head.rpartition(b"type: 'POST',")
    if not table or not post or between.strip():
        raise Misconfigured("this version of Flower has another script; install the version in the lock file")
    return before + b"type: 'GET',".ljust(len(post)) + between + table + rest


PUBLIC = (Healthcheck, LoginHandler, LogoutHandler, NotFoundErrorHandler)


def protect() -> None:
    """Makes Flower read-only, and puts every page behind the password: /metrics as well, which Flower 2.2 leaves open.

    Raises Misconfigured for a version of Flower with another script.
    """
    RequestHandler.SUPPORTED_METHODS = READ_ONLY  # Tornado answers 405 to every other method, before the handler runs
    BaseHandler.prepare = BaseApiHandler.prepare = check_password
    _script()
    urls.settings["static_handler_class"] = Static


def main() -> None:
    """Runs Flower until SIGTERM."""
    settings.need_flower_auth()
    if not process_environment().get("FLOWER_BASIC_AUTH"):
        raise Misconfigured("not set; start Flower with `headrace flower`, which sets it", setting="FLOWER_BASIC_AUTH")
    if sentinel_url.is_sentinel(settings.need_broker()):
        # Flower keeps the first result, which is the address of an old primary after a failover.
        Flower.broker_uri_with_password = property(lambda app: app.capp.connection().as_uri(include_password=True))
    else:
        celery.conf.broker_transport = None  # Flower selects its broker API by the transport, and does not know ours
    protect()
    where = [f"--address={settings.flower_host}", f"--port={settings.flower_port}"]
    # Without --conf, Flower would execute a `flowerconfig.py` in the current directory.
    where.append(f"--conf={process_environment().get('FLOWER_CONF', os.devnull)}")
    # Without --broker, Celery's command line would replace the URL by BROKER_URL of the environment.
    celery.start(["--app", APP, "--broker", celery.conf.broker_url, "flower", *where, *OPTIONS, "--logging=warning"])


if __name__ == "__main__":
    main()
