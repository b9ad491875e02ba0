"""Recognises deliveries that are attempts of one in the ledger, by their id or by the digest of what was signed."""

from collections.abc import Sequence
from dataclasses import replace

from msgspec.structs import replace as replace_struct
from sqlalchemy import Engine

from app.sealing import Sealer
from workers.actions import Origin, Parsed
from workers.ingest.outcomes import ParsedDelivery
from workers.store.engine import transaction
from workers.store.ledger import Attempt, FirstArrival, first_arrivals


def as_attempts(
    engine: Engine, sealer: Sealer, batch: Sequence[ParsedDelivery], origin: Origin
) -> list[ParsedDelivery]:
    """The deliveries as attempts of those that the ledger has. Those without `parsed` and `reason` must be parsed.

    - A delivery whose digest is known gets the id of the first one. It is applied only if that one is dead, or by a
      replay: its unsigned ordering time may be another.
    - A delivery keeps the month of its entry, so that its attempts are counted there.
    - A delivery without a time of its sender keeps the time of its first arrival. Otherwise its repetition would be
      newer than an update that arrived in between.

    Raises TryLater.
    """
    attempts = [
        Attempt(one.delivery.aggregator, one.delivery.message_id, one.delivery.received, one.delivery.digest)
        for one in batch
    ]
    asked = [
        attempt
        for one, attempt in zip(batch, attempts, strict=True)
        if not one.is_large and (attempt.digest or _is_undated(one) or attempt.may_be_of_earlier_month())
    ]
    if not asked:
        return list(batch)
    with transaction(engine) as connection:
        known = first_arrivals(connection, asked)
    firsts = (known.get((one.aggregator, one.message_id)) for one in attempts)
    return [_as_attempt(one, first, sealer, origin) if first else one for one, first in zip(batch, firsts, strict=True)]


def _is_undated(one: ParsedDelivery) -> bool:
    return one.parsed is not None and one.parsed.is_undated and not one.is_claim_check


def _as_attempt(one: ParsedDelivery, first: FirstArrival, sealer: Sealer, origin: Origin) -> ParsedDelivery:
    delivery, one = one.delivery, replace(one, month=first.month)
    if first.has_digest and not first.is_dead and origin == "webhook":
        parsed = Parsed(one.parsed.event_type if one.parsed else "")
        return replace(one, delivery=replace_struct(delivery, message_id=first.message_id), parsed=parsed, reason=None)
    # The fields of a dead delivery may be forged, if its key is not configured.
    is_earlier = _is_undated(one) and not first.is_dead and first.received_at < delivery.received_at
    if first.message_id == delivery.message_id and not is_earlier:
        return one
    received_at = first.received_at if is_earlier else None
    named = delivery.with_fields(sealer, message_id=first.message_id, received_at=received_at)
    return replace(one, delivery=named, parsed=None if is_earlier else one.parsed)
