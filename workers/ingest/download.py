"""Downloads events of which the delivery contains only a URL (claim-check pattern). The URL expires in minutes."""

import logging
from datetime import UTC, datetime, timedelta

from msgspec.structs import replace

from app.config.settings import Settings
from app.delivery import Delivery, unpack
from app.errors import TryLater, Unprocessable
from app.observability import tracing
from app.sealing import Sealer
from workers.actions import Download
from workers.aggregators.registry import AGGREGATORS
from workers.fetch.http import Files
from workers.ingest.apply import Applier
from workers.ingest.outcomes import Applied

GRACE = timedelta(seconds=60)  # after the stated expiry; an attempt costs only one request
TRANSIENT = frozenset({0, 408, 425, 429})  # and every 5xx; 0 means no response
log = logging.getLogger(__name__)


class Downloader:
    """Downloads and applies events. One per worker process; it never sleeps."""

    def __init__(self, applier: Applier, settings: Settings, files: Files) -> None:
        self._applier, self._settings, self._files = applier, settings, files
        self._sealer = Sealer(settings.encryption_keys)

    def run(self, packed: str, *, redelivered: bool = False) -> Applied:
        """Downloads the event of a message's one delivery and applies it under that delivery's id and headers.

        The archive stores the downloaded event, so that a replay needs no URL. Raises TryLater if a retry may succeed.
        """
        try:
            (announced,) = unpack(packed)
        except (Unprocessable, ValueError):
            return self._applier.dead_letter_raw(packed.encode(), "not a message with exactly one delivery")
        try:
            body = self._body(announced)
        except Unprocessable as reason:  # only this log line shows which delivery's data is missing
            log.warning("the announced event is lost: %s", reason, extra={"delivery": announced.message_id})
            return self._applier.reject(announced, str(reason))
        fetched = replace(announced, sealed=self._sealer.seal(body, announced.key))
        applied = self._applier.apply_deliveries([fetched], redelivered=redelivered)
        if applied.by_reference:
            return self._applier.reject(announced, "the downloaded event contains only another URL")
        return applied

    def _body(self, announced: Delivery) -> bytes:
        """The downloaded event. Raises TryLater, or Unprocessable if a retry cannot succeed."""
        opened = self._sealer.open(announced.sealed, announced.key)
        actions = AGGREGATORS[announced.aggregator].parse(announced, opened, self._settings).actions
        (download,) = (action for action in actions if isinstance(action, Download))
        expires = announced.received + timedelta(seconds=download.expires_in) + GRACE
        with tracing.client_span("GET", aggregator=announced.aggregator, delivery=announced.message_id):
            answer = self._files.fetch(download.url)
            tracing.set_status(answer.status)
        if answer.status == 200:
            return answer.body
        if answer.status == 413:
            raise Unprocessable("the announced event is larger than HEADRACE_MAX_DOWNLOAD_BYTES")
        reason = f"HTTP {answer.status}" if answer.status else "no response"
        if datetime.now(UTC) > expires or not (answer.status in TRANSIENT or answer.status >= 500):
            raise Unprocessable(f"the announced event could not be downloaded: {reason}")
        raise TryLater(f"the announced event cannot be downloaded now: {reason}")
