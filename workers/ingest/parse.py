"""Opens and parses deliveries, and recognises attempts of a delivery that the ledger has."""

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from msgspec.structs import replace as replace_struct
from sqlalchemy import Engine

from app.config.settings import Settings
from app.delivery import Delivery, Receipt, pack, seal, sealed_again, unpack_stored
from app.errors import NotAuthentic, TooLarge, Unprocessable
from app.observability import tracing
from app.sealing import LARGEST, Sealer
from workers.actions import Parsed
from workers.aggregators.registry import AGGREGATORS
from workers.ingest.outcomes import MAX_MESSAGE_BYTES, ParsedDelivery, once_each, reason_of
from workers.store.engine import transaction
from workers.store.ledger import Attempt, FirstArrival, first_arrivals

UNKNOWN = "unknown"  # the aggregator of dead letters that are raw messages
log = logging.getLogger(__name__)


class Parser:
    """Opens and parses deliveries. A delivery that cannot be parsed gets a reason; nothing is raised for it."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self.sealer = Sealer(settings.encryption_keys)

    def parse(self, one: ParsedDelivery) -> ParsedDelivery:
        """The delivery with its content or a reason, unless it already has one of them or is too large."""
        if one.parsed or one.reason or one.is_large:
            return one
        delivery = one.delivery
        aggregator = AGGREGATORS.get(delivery.aggregator)
        if aggregator is None:
            return replace(one, reason="unknown aggregator")
        open_body = delivery.open if one.is_replay else delivery.open_received
        try:
            with tracing.span("open", aggregator=delivery.aggregator, delivery=delivery.message_id):
                body = open_body(self.sealer, one.limit)
                parsed = aggregator.parse(delivery, body, self._settings)
        except Exception as error:  # noqa: BLE001 - whatever the error, the delivery becomes a dead letter
            return self._unopened(one, error)
        opened = replace(one, parsed=parsed, size=len(body))
        if one.is_replay and opened.download:
            return replace(opened, reason="the delivery only contained a URL, which has expired")
        return opened

    def _unopened(self, one: ParsedDelivery, error: Exception) -> ParsedDelivery:
        if isinstance(error, TooLarge) and one.limit < LARGEST:
            return replace(one, is_large=True)
        if isinstance(error, NotAuthentic) and not one.is_replay:
            # Its id may be that of another delivery, so the ledger must not record it under that id.
            return self.raw_message(pack([one.delivery]).encode(), reason_of(error))
        return replace(one, reason=reason_of(error), parsed=self.identify(one.delivery))

    def identify(self, delivery: Delivery) -> Parsed | None:
        """The type and the user of a delivery that cannot be parsed, if they can be read."""
        try:
            return AGGREGATORS[delivery.aggregator].identify(delivery.open(self.sealer))
        except Exception as error:  # noqa: BLE001 - a body that breaks `parse` may break this too, for every retry
            log.debug("a delivery names no event: %s", reason_of(error))
            return None

    def parse_fitting(self, batch: Sequence[ParsedDelivery]) -> list[ParsedDelivery]:
        """The first deliveries, parsed, of which a worker may hold all in its memory."""
        opened, size = list[ParsedDelivery](), 0
        for one in batch:
            if size > MAX_MESSAGE_BYTES:
                break
            opened.append(self.parse(one))
            size += opened[-1].size
        return opened

    def raw_message(self, raw: bytes, reason: str) -> ParsedDelivery:
        """The dead letter of a raw message, with the digest of the message as its id."""
        message = seal(UNKNOWN, Receipt(hashlib.sha256(raw).hexdigest()), raw, self.sealer)
        return ParsedDelivery(message, reason=reason)

    def deliveries_of(self, message: Delivery) -> list[Delivery]:
        """The deliveries of a raw message that became a dead letter. Raises Unprocessable."""
        return [sealed_again(one, self.sealer) for one in extract_deliveries(message.open(self.sealer))]

    def once_each_genuine(self, batch: Iterable[ParsedDelivery]) -> list[ParsedDelivery]:
        """As `once_each`, for a message in which deliveries have the same id: a forged one must not replace another."""
        genuine, unread, forged = [], [], []
        for one in batch:
            try:
                one.delivery.open_received(self.sealer, one.limit)
            except NotAuthentic as error:
                forged.append(self.raw_message(pack([one.delivery]).encode(), reason_of(error)))
            except Unprocessable:  # its key is not configured, or it is large
                unread.append(one)
            else:
                genuine.append(one)
        return [*once_each([*genuine, *unread]), *forged]

    def as_attempts(self, batch: Iterable[ParsedDelivery]) -> list[ParsedDelivery]:
        """The deliveries, parsed, as attempts of those that the ledger has.

        - A delivery whose digest is known gets the id of the first one. It is applied only if that one is dead, or by a
          replay: its unsigned ordering time may be another.
        - A delivery keeps the month of its entry, so that its attempts are counted there.
        - A delivery without a time of its sender keeps the time of its first arrival. Otherwise its repetition would be
          newer than an update that arrived in between.

        Raises TryLater.
        """
        opened = [self.parse(one) for one in batch]
        asked = [
            attempt
            for one in opened
            if not one.is_large
            for attempt in (Attempt(*one.key, received_at=one.delivery.received, digest=one.delivery.digest),)
            if attempt.digest or _is_undated(one) or attempt.may_be_of_earlier_month()
        ]
        if not asked:
            return opened
        with transaction(self._engine) as connection:
            known = first_arrivals(connection, asked)
        return [self.parse(self._as_attempt(one, known[one.key])) if one.key in known else one for one in opened]

    def _as_attempt(self, one: ParsedDelivery, first: FirstArrival) -> ParsedDelivery:
        delivery, one = one.delivery, replace(one, month=first.month)
        if first.has_digest and not first.is_dead and not one.is_replay:
            parsed = Parsed(one.parsed.event_type if one.parsed else "")
            named = replace_struct(delivery, message_id=first.message_id)
            return replace(one, delivery=named, parsed=parsed, reason=None)
        # The fields of a dead delivery may be forged, if its key is not configured.
        is_earlier = _is_undated(one) and not first.is_dead and first.received_at < delivery.received_at
        if first.message_id == delivery.message_id and not is_earlier:
            return one
        received_at = first.received_at if is_earlier else None
        named = delivery.with_fields(self.sealer, message_id=first.message_id, received_at=received_at)
        return replace(one, delivery=named, parsed=None if is_earlier else one.parsed)


def _is_undated(one: ParsedDelivery) -> bool:
    return one.parsed is not None and one.parsed.is_undated and not one.download


def extract_deliveries(raw: bytes) -> list[Delivery]:
    """The deliveries of a raw message, or of the first argument of a Celery task. Raises Unprocessable."""
    with contextlib.suppress(msgspec.DecodeError, LookupError, TypeError, RecursionError, UnicodeError):
        raw = str(msgspec.json.decode(raw, type=list[list[str] | Any])[0][0]).encode()
    return unpack_stored(raw.decode(errors="replace"))
