"""Readiness: whether the broker accepts messages. The state is in memory, so that probes do not load the broker."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from app.config import sentinel_url
from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import PublishFailed
from app.web.publishing import Publish

FRESH_SECONDS = 1.0  # between two checks of the broker while probes arrive
IDLE_SECONDS = 10.0  # the same without probes
SLOW_SECONDS = 2.0  # a check that takes longer means that the broker is frozen
log = logging.getLogger(__name__)


def start_readiness(settings: Settings, ping: Callable[[], None]) -> "Readiness":
    """The readiness of this process. Behind Sentinel, its checks also make the publisher notice a new primary."""
    is_sentinel = sentinel_url.is_sentinel(settings.need_broker())
    readiness = Readiness(ping, idle_seconds=FRESH_SECONDS if is_sentinel else IDLE_SECONDS)
    readiness.start()
    return readiness


class Readiness:
    """The result of the last publish or of the last check, which a thread repeats. A probe only reads it."""

    def __init__(self, ping: Callable[[], None], *, idle_seconds: float = IDLE_SECONDS) -> None:
        """`ping` raises PublishFailed if the broker does not accept messages.

        Without probes, the broker is checked every `idle_seconds`, and the first probe may read a state of that age.
        """
        self._ping, self._idle_seconds = ping, idle_seconds
        self._error: PublishFailed | None = PublishFailed("the broker has not been checked yet")
        self._known_at = self._asked_at = float("-inf")
        self._check_began: float | None = None
        self._asked = threading.Event()

    def start(self) -> None:
        """Starts the thread. Not done by the constructor, because threads do not survive a fork."""
        threading.Thread(target=self._run, name="readiness", daemon=True).start()

    def check(self) -> None:
        """Raises PublishFailed if the broker did not accept messages when it was last used or checked."""
        now = time.monotonic()
        if now - self._asked_at > IDLE_SECONDS:
            self._asked.set()
        self._asked_at = now
        began = self._check_began
        if began is not None and now - began > SLOW_SECONDS and self._known_at < began:
            raise PublishFailed(f"the broker has not answered for {now - began:.0f} s")
        if self._error is not None:
            raise PublishFailed(str(self._error))

    def observed(self, publish: Publish) -> Publish:
        """The publish function, whose result counts as a check."""

        async def observe(deliveries: Sequence[Delivery]) -> None:
            try:
                await publish(deliveries)
            except PublishFailed as error:
                self._learn(error)
                raise
            self._learn(None)

        return observe

    def _run(self) -> None:
        while True:
            if time.monotonic() - self._known_at >= FRESH_SECONDS:
                self._refresh()
            is_idle = time.monotonic() - self._asked_at > IDLE_SECONDS
            self._asked.wait(self._idle_seconds if is_idle else FRESH_SECONDS)
            self._asked.clear()

    def _refresh(self) -> None:
        self._check_began = began = time.monotonic()
        try:
            self._ping()
        except PublishFailed as error:
            if self._known_at < began:  # else a publish since then has shown whether the broker accepts messages
                self._learn(error)
        except Exception as unexpected:  # noqa: BLE001 - the edge of the thread, which must keep running
            log.error("unexpected %s while checking the broker", type(unexpected).__name__)  # noqa: TRY400
            self._learn(PublishFailed("the broker could not be checked"))
        else:
            self._learn(None)
        finally:
            self._check_began = None

    def _learn(self, error: PublishFailed | None) -> None:
        self._error, self._known_at = error, time.monotonic()
