"""What the benchmark reads from metrics and from the list of processes."""

from tests.bench.passage import batch_sizes, totals
from tests.bench.processes import SUPERVISOR, groups

EXPOSITION = """
headrace_message_deliveries_sum 12
headrace_message_deliveries_count 4
headrace_outcomes_total{aggregator="junction",outcome="applied"} 10
headrace_outcomes_total{aggregator="junction",outcome="duplicate"} 2
headrace_task_seconds_count{task="headrace.apply"} 2
headrace_task_seconds_count{task="headrace.sweep"} 9
"""


def test_sizes_are_those_of_one_load() -> None:
    """Breaks if earlier loads, duplicates or other tasks change the deliveries per message or per batch."""
    after = totals(EXPOSITION)
    assert batch_sizes({}, after) == (3, 6)
    before = {"headrace_message_deliveries_sum": 2.0, "headrace_message_deliveries_count": 2.0}
    assert batch_sizes(before, after) == (5, 6)
    assert batch_sizes(after, after) == (0, 0)


def test_a_process_belongs_to_its_nearest_listed_ancestor() -> None:
    """Breaks if a worker that was forked from another listed process counts twice, or a helper of `up` is missed."""
    listed = {"web": [10], "live": [11, 21]}
    found = groups(1, listed, [(10, 1), (11, 1), (12, 1), (20, 10), (21, 12), (30, 21), (31, 20)])
    assert found == {1: SUPERVISOR, 12: SUPERVISOR} | dict.fromkeys((10, 20, 31), "web") | dict.fromkeys(
        (11, 21, 30), "live"
    )
