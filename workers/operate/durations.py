"""Durations in words."""

from datetime import timedelta


def format_duration(duration: timedelta | None) -> str:
    """The two largest units: 3 d 4 h, 12 min 5 s."""
    if duration is None:
        return "-"
    seconds, parts = int(duration.total_seconds()), list[str]()
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, seconds = divmod(seconds, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def format_short(duration: timedelta) -> str:
    """A duration for a table column: 12 ms, 3.4 s, 2 min 5 s."""
    seconds = duration.total_seconds()
    if seconds < 1:
        return f"{max(seconds, 0) * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 60 else format_duration(duration)
