"""The order of a person's sources: lists of priorities first, then the order of source types."""

from collections.abc import Iterable, Sequence

from workers.daily.model import DataSource

SOURCE_TYPES = (
    *("lab", "automatic", "watch", "ring", "chest_strap", "scale", "cuff", "fingerprick", "manual_scan", "phone"),
    *("app", "multiple_sources", "unknown"),
)
ANY = "*"
PLACES = {name: place for place, name in enumerate(SOURCE_TYPES)}
Entry = tuple[str, str]  # provider and source type, each possibly ANY


def in_order(sources: Iterable[DataSource], lists: Sequence[Sequence[Entry]]) -> list[DataSource]:
    """The sources from the best to the worst. Of the lists, the first one with an entry for a source ranks it.

    Sources of one entry, and sources that no list names, follow the order of source types, then their names. A source
    type that the order does not name ranks as `unknown`: Terra's are the types of its objects.
    """
    return sorted(sources, key=lambda source: (*_place(source, lists), *_by_type(source)))


def _place(source: DataSource, lists: Sequence[Sequence[Entry]]) -> tuple[int, int]:
    for number, entries in enumerate(lists):
        for place, (provider, source_type) in enumerate(entries):
            if provider in (ANY, source.provider) and source_type in (ANY, source.source_type):
                return number, place
    return len(lists), 0


def _by_type(source: DataSource) -> tuple[int, str, str]:
    return PLACES.get(source.source_type, PLACES["unknown"]), source.provider, source.source_type
