"""The tables of a run in deploy/docs/benchmarks.md and README.md."""

import msgspec
import pytest

from tests.bench import report
from tests.bench.quote import PAGE, README, Comparison, Level, blocks, fill, markdown, peer_table, readme
from tests.bench.results import Floors, Idle, Live, PipelineRun, Plan, Pss, Results, times

SOME = times([0.001, 0.002])


def measured() -> Results:
    """Results of `floors`, `idle` and `live`."""
    cpu_us = {"endpoint": 500.0, "load generator": 20.0}
    run = PipelineRun("workouts", 128, 9, 2_000, 1_849, 0, 0, SOME, cpu_us, per_message=2.5, per_batch=4)
    floors = Floors(9_000, SOME, 5_000, SOME, 1, {50: 1}, {50: 1_000}, 1, {1: 1})
    idle = Idle(7.6, 60, {"web": Pss(4, 100), "flower": Pss(1, 50)}, {"web": 0.5, "flower": 0.25})
    return Results(Plan(), cores=2, floors=floors, idle=idle, live=Live([run], 1, run, SOME, SOME))


def test_the_page_has_a_block_for_each_part() -> None:
    """Breaks if a part is measured but the page cannot show it."""
    page = PAGE.read_text(encoding="utf-8")
    for name in (*report.TABLES, "targets", "peer"):
        page = fill(page, name, ["| new |"])
    assert page.count("| new |") == len(report.TABLES) + 2


def test_only_the_parts_of_a_run_replace_their_blocks() -> None:
    """Breaks if figures of a part that was not run disappear, or if the targets are judged by a partial run."""
    assert [name for name, _ in blocks(measured())] == ["floors", "idle", "live"]
    before = "<!-- bench: idle -->\n| old |\n<!-- end -->\n<!-- bench: soak -->\n| old |\n<!-- end -->\n"
    after = "<!-- bench: idle -->\n\n| new |\n\n<!-- end -->\n<!-- bench: soak -->\n| old |\n<!-- end -->\n"
    assert fill(before, "idle", ["| new |\n"]) == after
    with pytest.raises(ValueError, match="one block that begins with <!-- bench: live -->"):
        fill(before, "live", [])


def test_a_table_contains_the_figures_of_its_run() -> None:
    """Breaks if a stage, a total, a ratio or the sizes of messages are missing from a table."""
    found = dict(blocks(msgspec.json.decode(msgspec.json.encode(measured()), type=Results)))
    pipeline, cpu = found["live"]
    assert "| 128 | 2,000 | 1,849 | 2.0 / 2.0 |  |  | 2.5 / 4.0 | 0.37 | 0.92 | none |" in pipeline
    assert "| endpoint | 0.500 | 0.500 |" in cpu
    assert "| the stack as a whole | 0.500 | 0.500 |" in cpu
    (idle,) = found["idle"]
    assert "ready after 7.6 s, then 60 s without load" in idle
    assert "| endpoint | 4 | 100 | 0.50 |" in idle
    assert "| all | 5 | 150 | 0.75 |" in idle


def test_markup_of_the_terminal_is_not_quoted() -> None:
    """Breaks if the page shows the colours of the terminal as text."""
    text = markdown(report.targets(measured()), "A run.")
    assert "| no | no (" in text
    assert "[" not in text


def test_the_comparison_with_a_peer() -> None:
    """Breaks if a column is exchanged, or if a comparison without medians of the response time is not accepted."""
    whole = Level(peer=1000, accepted=1200, committed=1100, ratio=1.1, peer_p99=20, p99=10, peer_p50=4, p50=3)
    text = markdown(peer_table(Comparison({8: whole, 32: Level(1000, 2, 1, 1, 30, 40)}, 1.25)), "A run.")
    assert "| 8 | 1,000 | 1,200 | 1,100 | 1.10 | 4.0 / 20.0 | 3.0 / 10.0 |" in text
    assert "| - / 30.0 | - / 40.0 |" in text
    assert "peer: 1.25." in text


def test_the_readme_has_the_figures_of_a_run() -> None:
    """Breaks if README.md is rewritten so that the command no longer finds its figures."""
    text = readme(README.read_text(encoding="utf-8"), measured())
    assert "[1,800 workouts a second]" in text
    assert "is ready after 8 s" in text
    assert "[150 MB and 0.8 % of a core]" in text
