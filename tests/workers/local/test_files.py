"""Waiting for space on a full disk."""

from pathlib import Path

import pytest

from workers.local.files import MIN_FREE_BYTES, POLL_SECONDS, free_bytes, wait_for_space


def test_a_disk_with_space_is_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Breaks if a folder that does not exist yet stops the start, or an ordinary start logs a warning."""
    asked = []

    def free(folder: Path) -> int:
        asked.append(folder)
        return MIN_FREE_BYTES

    wait_for_space(tmp_path / "new" / "data", free)
    assert (asked, caplog.messages) == ([tmp_path], [])


def test_a_full_disk_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Breaks if the start continues on a full disk, or the log does not give the reason once."""
    left, pauses = iter([0, MIN_FREE_BYTES - 1, MIN_FREE_BYTES]), list[float]()
    wait_for_space(tmp_path, lambda _: next(left), pauses.append)
    assert pauses == [POLL_SECONDS, POLL_SECONDS]
    first, last = caplog.messages
    assert "is full: 0 MB are free; waiting for 64 MB" in first
    assert "has space" in last


def test_a_file_system_without_a_size_is_not_full() -> None:
    """Breaks if `headrace up --data-dir /proc/x` waits for ever, instead of saying that it cannot write there."""
    assert free_bytes(Path("/proc")) == MIN_FREE_BYTES
