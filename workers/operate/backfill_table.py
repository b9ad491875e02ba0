"""The table of backfills and their progress."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from workers.operate.durations import format_duration
from workers.store.backfill_admin import Backfill

BAR_WIDTH = 20
ERROR_WIDTH = 20  # at least; longer errors are wrapped
RIGHT_ALIGNED = ("id", "records", "per s")
# Left out on a narrow screen, in this order. The errors are then listed below the table.
OPTIONAL = ("progress", "per s", "requested by", "error", "records", "left")


def progress(found: Sequence[Backfill], title: str | None = None) -> RenderableType:
    return _Backfills(found, title) if found else "no backfills"


@dataclass(frozen=True)
class _Backfills:
    """Selects the columns by the width of the screen. The id, which the next command needs, is never cut."""

    found: Sequence[Backfill]
    title: str | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        rows = [_cells(one) for one in self.found]
        widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
        widths["error"] = min(widths["error"], ERROR_WIDTH)
        for name in OPTIONAL:
            if _total(widths) > options.max_width:
                del widths[name]
        room = options.max_width - _total(widths)
        table = Table(title=self.title, title_justify="left", title_style="bold")
        for name, width in widths.items():
            is_whole = name != "error" and (room >= 0 or name == "id")
            table.add_column(
                name,
                justify="right" if name in RIGHT_ALIGNED else "left",
                overflow="fold",
                min_width=width if is_whole else None,
                max_width=width + room if name == "error" else None,
            )
        for one, row in zip(self.found, rows, strict=True):
            bar = ProgressBar(total=1, completed=one.share, width=BAR_WIDTH)
            table.add_row(*(bar if name == "progress" else row[name] for name in widths))
        yield table
        if "error" not in widths:
            yield from (Text(f"{one.id}: {one.error}") for one in self.found if one.error)


def _cells(one: Backfill) -> dict[str, str]:
    return {
        "id": str(one.id),
        "user": one.user_id,
        "provider": one.provider or "any",
        "resource": f"{one.resource} {one.item}".rstrip(),
        "requested by": one.requested_by,
        "status": one.status,
        "progress": " " * BAR_WIDTH,
        "": f"{one.share:.0%}",
        "records": f"{one.records:,}",
        "per s": "" if one.rate is None else f"{one.rate:,.0f}",
        "left": format_duration(one.left),
        "error": one.error or "",
    }


def _total(widths: Mapping[str, int]) -> int:
    """The width of a table, with a line and two spaces for each column."""
    return sum(widths.values()) + 3 * len(widths) + 1
