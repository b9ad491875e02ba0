"""The download lane: large deliveries, and events of which the delivery contains only a URL (claim-check pattern).

The URL expires in minutes.
"""

import logging
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from app.config.settings import Settings
from app.delivery import Delivery, unpack
from app.errors import TryLater, Unprocessable
from app.observability import tracing
from app.sealing import LARGEST, Sealer
from workers.actions import Download
from workers.fetch.http import Files
from workers.ingest.apply import Applier
from workers.ingest.outcomes import MAX_LIVE_BYTES, Applied, ParsedDelivery

GRACE = timedelta(seconds=60)  # after the stated expiry; an attempt costs only one request
TRANSIENT = frozenset({0, 408, 425, 429})  # and every 5xx; 0 means no response
log = logging.getLogger(__name__)


class Downloader:
    """Applies the messages of the download lane. One per worker process; it never sleeps."""

    def __init__(self, applier: Applier, settings: Settings, files: Files) -> None:
        self._applier, self._settings, self._files = applier, settings, files
        self._sealer = Sealer(settings.encryption_keys)

    def run(self, packed: str, *, redelivered: bool = False, failures: int = 0) -> Applied:
        """Applies the one delivery of a message. If it contains only a URL, the event is downloaded first.

        The archive stores the downloaded event, so that a replay needs no URL. Raises TryLater if a retry may succeed.
        """
        try:
            (announced,) = unpack(packed)
        except (Unprocessable, ValueError):
            return self._applier.dead_letter_raw(packed.encode(), "not a message with exactly one delivery")
        opened = self._applier.parse(ParsedDelivery(announced, limit=MAX_LIVE_BYTES))
        download = opened.download
        if download is None:
            # An event, or invalid; or a large delivery, which is parsed only after its possible crash is counted.
            batch = [replace(opened, limit=LARGEST, is_large=False)]
            applied = self._applier.apply_batch(batch, redelivered=redelivered, failures=failures)
            download = self._applier.parse(ParsedDelivery(announced)).download if applied.for_download else None
            if download is None:
                return applied
        try:
            body = self._body(announced, download)
        except Unprocessable as reason:  # only this log line shows which delivery's data is missing
            log.warning("the announced event is lost: %s", reason, extra={"delivery": announced.message_id})
            return self._applier.reject(announced, str(reason))
        fetched = ParsedDelivery(announced.with_body(body, self._sealer))
        applied = self._applier.apply_batch([fetched], redelivered=redelivered, failures=failures)
        if applied.for_download:
            return self._applier.reject(announced, "the downloaded event contains only another URL")
        return applied

    def _body(self, announced: Delivery, download: Download) -> bytes:
        """The downloaded event. Raises TryLater, or Unprocessable if a retry cannot succeed."""
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
