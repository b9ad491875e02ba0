"""The offset from UTC of samples and records that have none: that of the nearest one in time that has one."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

from workers.daily.model import MAX_OFFSET


class OffsetTimeline:
    """The known offsets of a person, from which the nearest one to any moment is read.

    The points between two equal ones may be left out: the nearest offset is the same.
    """

    def __init__(self, points: Iterable[tuple[int, int]]) -> None:
        """`points` are moments with the offset in seconds, in any order."""
        known = sorted({point for point in points if abs(point[1]) <= MAX_OFFSET})
        self._moments = [moment for moment, _ in known]
        self._offsets = [offset for _, offset in known]

    def nearest(self, moment: int) -> int | None:
        """The offset of the nearest point; None without points.

        Of two points at the same distance the earlier one decides, of two at one moment the smaller offset.
        """
        if not self._moments:
            return None
        after = bisect_right(self._moments, moment)
        if after == len(self._moments) or (
            after > 0 and moment - self._moments[after - 1] <= self._moments[after] - moment
        ):
            after -= 1
        return self._offsets[bisect_left(self._moments, self._moments[after])]
