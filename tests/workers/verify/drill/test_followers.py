"""The consumers of a drill: what they have read is compared with the feed."""

from pathlib import Path

import pytest

from workers.verify.drill.followers import Follower, FollowerTotals, read_positions


def follower(folder: Path, written: bytes) -> Follower:
    (folder / "f.positions").write_bytes(written)
    return Follower("f", folder, "postgresql://unused", 3, 1)


@pytest.mark.parametrize(
    ("written", "missed", "repeated"),
    [(b"4\n5\n6\n", 0, 0), (b"4\n6\n", 1, 0), (b"4\n5\n5\n6\n", 0, 1), (b"4\n5\n", 1, 0), (b"4\n5\n6\n7\n", 0, 0)],
)
def test_missed_and_repeated_changes_are_counted(tmp_path: Path, written: bytes, missed: int, repeated: int) -> None:
    """Breaks if the report of a drill hides a change that a consumer missed, or read twice.

    A change that is newer than the comparison counts for nothing.
    """
    totals = follower(tmp_path, written).totals([4, 5, 6])
    assert (totals.missed, totals.repeated, totals.is_exact) == (missed, repeated, not (missed or repeated))


def test_a_line_that_was_cut_off_is_read_again(tmp_path: Path) -> None:
    """Breaks if a consumer that was killed while it wrote takes half a position for one."""
    assert follower(tmp_path, b"4\n5\n1").last() == 5
    assert follower(tmp_path, b"").last() == 3
    assert read_positions(tmp_path / "missing") == []


def test_an_empty_feed_is_exact(tmp_path: Path) -> None:
    assert follower(tmp_path, b"").totals([]) == FollowerTotals("f", kills=0, read=0, missed=0, repeated=0)
