"""deploy/docs/sizing.md states what tests/bench/sizes.py computes."""

from tests.bench.sizes import MAX_TABLE_BYTES, Costs, Person, costs_of, table
from tests.support import ROOT

PAGE = (ROOT / "deploy" / "docs" / "sizing.md").read_text(encoding="utf-8")


def test_the_page_has_the_computed_rows() -> None:
    """Breaks if a cost was measured again and the page was not, or the other way round."""
    missing = [row for row in (*table(), *costs_of()) if row not in PAGE]
    assert missing == []


def test_a_partition_above_the_limit_is_marked() -> None:
    """Breaks if the table hides that a month of samples exceeds what PostgreSQL can store in one partition."""
    rows = table(Costs(sample_bytes=117, record_bytes=1, ledger_bytes=1, archive_bytes=1, web_us=1, delivery_us=1))
    assert ["(!)" in row for row in rows] == [False] * 4 + [True]
    assert 31 * Person().samples * 117 * 10**6 < MAX_TABLE_BYTES < 31 * Person().samples * 117 * 10**7
