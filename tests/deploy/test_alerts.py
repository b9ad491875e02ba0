"""deploy/prometheus/alerts.yml, evaluated by promtool. test_observability.py compares the names with real metrics."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.support.promql import ALERTS

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="not installed (Debian: prometheus)")

HOURS = 6  # one sample a minute
NONE, EACH_MINUTE, EACH_SECOND = (f"0+{step}x{HOURS * 60}" for step in (0, 1, 60))
WRONG, SOME = "HeadraceWrongSignatures", "HeadraceSomeWrongSignatures"


def requests(aggregator: str, *, accepted: str = NONE, **refused: str) -> dict[str, str]:
    """The series of an endpoint: accepted requests, and refused ones of one reason."""
    found = {f'headrace_refused_total{{aggregator="{aggregator}",reason="{name}"}}': refused[name] for name in refused}
    found[f'headrace_answers_total{{aggregator="{aggregator}",status="401"}}'] = next(iter(refused.values()))
    found[f'headrace_answers_total{{aggregator="{aggregator}",status="202"}}'] = accepted
    if accepted != NONE:
        found[f'headrace_last_publish_timestamp_seconds{{aggregator="{aggregator}"}}'] = f"0+60x{HOURS * 60}"
    return found


def fired(folder: Path, alert: str, series: dict[str, str], at: int = HOURS * 60) -> set[str]:
    """The aggregators for which an alert fires at a minute: promtool, which expects none, lists them."""
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": f"{at}m", "alertname": alert, "exp_alerts": []}],
    }
    YAML().dump({"rule_files": [str(ALERTS)], "tests": [test]}, folder / "test.yml")
    command = ["promtool", "test", "rules", str(folder / "test.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    found = set(re.findall(rf'Labels:{{aggregator="(\w+)", alertname="{alert}"', done.stdout + done.stderr))
    assert found or done.returncode == 0, done.stdout + done.stderr
    return found


def test_requests_without_a_signature_raise_no_alert(tmp_path: Path) -> None:
    """Breaks if a client without any secret wakes the operator."""
    series = requests("junction", missing=EACH_SECOND) | requests("terra", accepted=EACH_MINUTE, missing=EACH_SECOND)
    assert fired(tmp_path, WRONG, series) == fired(tmp_path, SOME, series) == set()


def test_forged_signatures_raise_no_critical_alert_while_deliveries_are_accepted(tmp_path: Path) -> None:
    """Breaks if a sender that knows the form of the headers can raise it beside an aggregator that is well."""
    series = requests("junction", accepted=EACH_MINUTE, signature=EACH_SECOND)
    assert fired(tmp_path, WRONG, series) == set()
    assert fired(tmp_path, SOME, series) == {"junction"}


def test_a_wrong_secret_of_one_aggregator_is_alerted(tmp_path: Path) -> None:
    """Breaks if the deliveries of the other aggregator hide it, or it is not noticed before senders give up."""
    series = requests("junction", signature=EACH_MINUTE) | requests("terra", accepted=EACH_MINUTE, signature=NONE)
    assert fired(tmp_path, WRONG, series) == {"junction"}


def test_a_secret_that_becomes_wrong_is_alerted_within_two_hours(tmp_path: Path) -> None:
    """Breaks if a rotation at the aggregator alone is noticed late: Terra retries for 8.5 hours."""
    series = requests("terra", accepted=f"0+1x120 120x{HOURS * 60}", signature=f"0x120 0+1x{HOURS * 60}")
    series['headrace_last_publish_timestamp_seconds{aggregator="terra"}'] = f"0+60x120 7200x{HOURS * 60}"
    assert fired(tmp_path, WRONG, series, at=120) == set()
    assert fired(tmp_path, WRONG, series, at=240) == {"terra"}
