"""Durations in words; a number is in seconds."""

from datetime import timedelta


def format_duration(duration: timedelta | float | None) -> str:
    """The two largest units: 3 d 4 h, 12 min 5 s."""
    if duration is None:
        return "-"
    left, parts = int(_seconds(duration)), list[str]()
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def format_short(duration: timedelta | float | None) -> str:
    """A duration for a table column: 12 ms, 3.4 s, 2 min 5 s."""
    if duration is None or (seconds := _seconds(duration)) >= 60:
        return format_duration(duration)
    return f"{seconds:.1f} s" if seconds >= 1 else f"{max(seconds, 0) * 1000:.0f} ms"


def _seconds(duration: timedelta | float) -> float:
    return duration.total_seconds() if isinstance(duration, timedelta) else duration
