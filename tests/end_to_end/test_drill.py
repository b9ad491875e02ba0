"""`headrace drill` as a separate process."""

import json
import subprocess
import sys

import pytest

from tests.support import ENVIRONMENT
from tests.support.servers import server_place
from workers.verify.drill.plan import plan
from workers.verify.totals import OUTCOMES

pytestmark = pytest.mark.stack
SEED, MINUTES = 3820, 0.2
# With this seed. A killed fetch would only resume after its lease, which takes too long here.
KILLED = ["broker", "live", "notify"]


def test_a_short_drill_passes() -> None:
    """Breaks if a stack loses or duplicates an event when its processes are killed, or the drill does not finish."""
    assert [(one.kind, one.group) for one in plan(SEED, MINUTES * 60)] == [("kill", group) for group in KILLED]
    command = (sys.executable, "-m", "workers.cli", "drill", "--minutes", str(MINUTES), "--seed", str(SEED))
    environment = {"HEADRACE_VISIBILITY_TIMEOUT_SECONDS": "5", "HEADRACE_WEB_PROCESSES": "1"}
    environment |= {"HEADRACE_BACKFILLS_PER_USER": "100", "TMPDIR": str(server_place())}
    done = subprocess.run(
        [*command, "--rate", "20", "--workers", "1", "--json"],
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["holds"], found["exact"], found["lost"], found["doubled"], found["pending"]) == (True, True, 0, 0, 0)
    assert found["accepted"] == sum(found[outcome] for outcome in OUTCOMES) > 200
    assert all(found[outcome] for outcome in ("applied", "duplicate", "ignored", "dead"))
    assert [one["whom"] for one in found["strikes"] if one["pid"]] == KILLED
    assert [(one["missed"], one["repeated"]) for one in found["consumers"]] == [(0, 0)] * 2
    assert all(one["kills"] > 0 and one["read"] > 200 for one in found["consumers"])
    told = found["subscriber"]
    assert (told["forged"], told["missing"]) == (0, 0)
    assert told["accepted"] > 0
    assert f"--seed {SEED}" in done.stderr
    assert "faults 3" in done.stderr
