"""Fetches an event that its sender only announced: a URL that is good for minutes. What is there is the delivery."""

import logging
from datetime import UTC, datetime, timedelta

from msgspec.structs import replace

from app.config.settings import Settings
from app.delivery import Delivery, unpack
from app.errors import TryLater, Unprocessable
from app.observability import tracing
from app.sealing import Sealer
from workers.actions import Download
from workers.aggregators import AGGREGATORS
from workers.fetch.http import Files
from workers.ingest.apply import Applier
from workers.ingest.outcomes import Applied

GRACE = timedelta(seconds=60)  # beyond what the sender says; it costs one request to know
MAY_PASS = frozenset({0, 408, 425, 429})  # and whatever a server has to do with itself
log = logging.getLogger(__name__)


class Downloader:
    """Follows what a delivery announces. One for the life of a worker process; nothing in it sleeps."""

    def __init__(self, applier: Applier, settings: Settings, files: Files) -> None:
        self._applier, self._settings, self._files = applier, settings, files
        self._sealer = Sealer(settings.encryption_keys)

    def run(self, packed: str, *, redelivered: bool = False) -> Applied:
        """Fetches and applies it under its announcement's id, with its headers. Raises TryLater while that may help.

        From then on it is a delivery like any other: kept as what was fetched, so that a replay needs no URL.
        """
        try:
            (announced,) = unpack(packed)
        except (Unprocessable, ValueError):
            return self._applier.dead_letter_raw(packed.encode(), "not one announcement")
        try:
            body = self._body(announced)
        except Unprocessable as reason:  # nothing else tells whose data is missing, and since when
            log.warning("what it announced is lost: %s", reason, extra={"delivery": announced.message_id})
            return self._applier.reject(announced, str(reason))
        fetched = replace(announced, sealed=self._sealer.seal(body, announced.key))
        applied = self._applier.apply_deliveries([fetched], redelivered=redelivered)
        if applied.by_reference:
            return self._applier.reject(announced, "what it announced is another announcement")
        return applied

    def _body(self, announced: Delivery) -> bytes:
        """What is at the URL. Raises TryLater, and Unprocessable where it cannot be had any more."""
        opened = self._sealer.open(announced.sealed, announced.key)
        actions = AGGREGATORS[announced.aggregator].parse(announced, opened, self._settings).actions
        (download,) = (one for one in actions if isinstance(one, Download))
        expires = announced.received + timedelta(seconds=download.expires_in) + GRACE
        with tracing.client_span("GET", aggregator=announced.aggregator, delivery=announced.message_id):
            answer = self._files.fetch(download.url)
            tracing.set_status(answer.status)
        if answer.status == 200:
            return answer.body
        if answer.status == 413:
            raise Unprocessable("what it announced is larger than HEADRACE_MAX_DOWNLOAD_BYTES")
        reason = f"status {answer.status}" if answer.status else "no answer"
        if datetime.now(UTC) > expires or not (answer.status in MAY_PASS or answer.status >= 500):
            raise Unprocessable(f"what it announced could not be fetched: {reason}")
        raise TryLater(f"what was announced cannot be fetched now: {reason}")
