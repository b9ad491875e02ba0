"""The processes of the Procfile: what each is started with. What they then do is in the other tests."""

import re

import psutil
import pytest

from app.config.settings import Settings
from app.errors import Misconfigured
from tests.support import JUNCTION_SECRET, program, until
from workers.local import processes
from workers.local.niceness import NICE
from workers.local.ports import free_port

pytestmark = pytest.mark.processes
SESAME = "sesame-open-the-door"


@pytest.mark.parametrize(
    ("run", "settings", "told"),
    [
        (processes.web, Settings(broker_url="redis://h"), "JUNCTION_WEBHOOK_SECRET"),
        (processes.web, Settings(junction_webhook_secrets=(JUNCTION_SECRET,)), "BROKER_URL"),
        (lambda given: processes.worker(given, "live"), Settings(database_url="postgresql://h/d"), "BROKER_URL"),
        (lambda given: processes.worker(given, "live"), Settings(broker_url="redis://h"), "DATABASE_URL"),
        (processes.beat, Settings(), "BROKER_URL"),
        (processes.flower, Settings(flower_auth=f"u:{SESAME}"), "BROKER_URL"),
        (processes.flower, Settings(broker_url="redis://h"), "HEADRACE_FLOWER_AUTH"),
        (processes.flower, Settings(broker_url="redis://h", flower_auth="u:short"), "HEADRACE_FLOWER_AUTH"),
    ],
)
def test_a_process_does_not_start_without_what_it_needs(run: object, settings: Settings, told: str) -> None:
    """Breaks if a process starts and fails at the first event, or Flower starts open to anybody."""
    assert callable(run)
    with pytest.raises(Misconfigured, match=f"^{told}: not set"):
        run(settings)


@pytest.mark.parametrize(
    ("arguments", "becomes"),
    [
        (("worker", "--lane", "backfill"), ["celery", "worker", "--queues backfill", "--pool solo", r"backfill\.\d+@"]),
        (("beat",), ["celery", "beat", "--scheduler celery.beat:Scheduler"]),
        (("flower",), ["workers.celery.flower"]),
    ],
)
def test_a_command_becomes_its_program(broker_url: str, arguments: tuple[str, ...], becomes: list[str]) -> None:
    """Breaks if a process stays behind as parent, which swallows signals, or a secret stands on a command line."""
    environment = {
        "BROKER_URL": broker_url,
        "DATABASE_URL": f"postgresql://u:{SESAME}@127.0.0.1:1/d",
        "HEADRACE_FLOWER_AUTH": f"u:{SESAME}",
        "HEADRACE_FLOWER_PORT": str(free_port()),
    }
    with program("workers.cli", *arguments, **environment) as process:

        def became() -> str:
            line = " ".join(psutil.Process(process.pid).cmdline())
            return "" if "workers.cli" in line else line

        line = until(became, 30)
        assert all(re.search(part, line) for part in becomes), line
        assert psutil.Process(process.pid).nice() == (NICE["backfill"] if "backfill" in arguments else 0)
        assert SESAME not in line
        assert broker_url not in line
