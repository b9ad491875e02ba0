"""What a user allowed a provider to share (Junction: `resource_availability` of a connection)."""

from typing import Any, Literal

import msgspec

from workers.aggregators.listings import EntryReader

Available = Literal["available", "unavailable"]  # unavailable: the user denied a scope that the resource requires


class _Resource(msgspec.Struct):
    status: Available


def read_grants(given: msgspec.Raw) -> tuple[tuple[tuple[str, bool], ...], int]:
    """The resources, each with whether the user granted it, and the number of entries that could not be read.

    The enum of `status` is not exhaustive: an entry with another status is left out.
    """
    reader = EntryReader()
    try:
        entries = msgspec.json.decode(given, type=dict[str, msgspec.Raw] | None)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return (), 1
    return tuple(reader.named(entries or {}, _Resource, _grant)), reader.unread


def _grant(name: str, resource: Any) -> tuple[str, bool]:
    return name, resource.status == "available"
