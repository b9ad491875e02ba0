"""Fetches an event that its sender only announced: a URL that is good for minutes. What is there is the delivery."""

import logging
from datetime import UTC, datetime, timedelta

from msgspec.structs import replace

from app import tracing
from app.actions import Download
from app.config import Settings
from app.delivery import Delivery, unpack
from app.errors import DeadLetter, TryLater
from app.providers import PROVIDERS
from app.sealing import Sealer
from workers.apply import Applied, Applier
from workers.http import Files

GRACE = timedelta(seconds=60)  # beyond what the sender says; it costs one request to know
MAY_PASS = frozenset({0, 408, 425, 429})  # and whatever a server has to do with itself
log = logging.getLogger(__name__)


class Downloader:
    """Follows what a delivery announces. One for the life of a worker process; nothing in it sleeps."""

    def __init__(self, applier: Applier, settings: Settings, files: Files) -> None:
        self._applier, self._settings, self._files = applier, settings, files
        self._sealer = Sealer(settings.encryption_keys)

    def run(self, packed: str, *, again: bool = False) -> Applied:
        """Fetches and applies it under its announcement's id, with its headers. Raises TryLater while that may help.

        From then on it is a delivery like any other: kept as what was fetched, so that a replay needs no URL.
        """
        try:
            (announced,) = unpack(packed)
        except (DeadLetter, ValueError):
            return self._applier.set_aside(packed.encode(), "not one announcement")
        try:
            body = self._body(announced)
        except DeadLetter as reason:  # nothing else tells whose data is missing, and since when
            log.warning("what it announced is lost: %s", reason, extra={"delivery": announced.message_id})
            return self._applier.refuse(announced, str(reason))
        fetched = replace(announced, sealed=self._sealer.seal(body, announced.about))
        applied = self._applier.receive([fetched], again=again)
        if applied.elsewhere:
            return self._applier.refuse(announced, "what it announced is another announcement")
        return applied

    def _body(self, announced: Delivery) -> bytes:
        """What is at the URL. Raises TryLater, and DeadLetter where it cannot be had any more."""
        opened = self._sealer.open(announced.sealed, announced.about)
        actions = PROVIDERS[announced.aggregator].parse(announced, opened, self._settings).actions
        (download,) = (one for one in actions if isinstance(one, Download))
        expires = announced.received + timedelta(seconds=download.expires_in) + GRACE
        with tracing.asking("GET", aggregator=announced.aggregator, delivery=announced.message_id):
            answer = self._files.fetch(download.url)
            tracing.answered(answer.status)
        if answer.status == 200:
            return answer.body
        if answer.status == 413:
            raise DeadLetter("what it announced is larger than HEADRACE_MAX_DOWNLOAD_BYTES")
        reason = f"status {answer.status}" if answer.status else "no answer"
        if datetime.now(UTC) > expires or not (answer.status in MAY_PASS or answer.status >= 500):
            raise DeadLetter(f"what it announced could not be fetched: {reason}")
        raise TryLater(f"what was announced cannot be fetched now: {reason}")
