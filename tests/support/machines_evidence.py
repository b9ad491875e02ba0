"""What a person needs to explain a failure on the machines, written to a folder before they are removed."""

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import psutil
import psycopg

from tests.support.machines import MACHINES
from tests.support.machines_cluster import UNREACHABLE, Cluster
from tests.support.machines_postgres import patronictl

QUERIES = {
    "activity": "SELECT pid, application_name, client_addr, state, wait_event_type, wait_event, xact_start, query "
    "FROM pg_stat_activity WHERE backend_type = 'client backend'",
    "replication": "SELECT application_name, state, sync_state, sent_lsn, replay_lsn FROM pg_stat_replication",
    "ledger": "SELECT * FROM health.deliveries WHERE message_id = ANY(%(missing)s)",
    "dead_letters": "SELECT id, message_id, reason FROM headrace.dead_letters",
    "backfills": "SELECT * FROM health.backfills WHERE status <> 'complete'",
    "jobs": "SELECT * FROM headrace.jobs",
}


def write_evidence(cluster: Cluster, missing: Collection[str], notes: str) -> Path:
    """Writes the state of queues, database and processes, and all logs, to a new folder. `missing` are message ids."""
    folder = Path(tempfile.mkdtemp(prefix="headrace-evidence-"))
    (folder / "notes.txt").write_text("\n".join((notes, "missing:", *sorted(missing))))
    _write(folder / "broker.txt", lambda: _sections(cluster.broker.describe()))
    for name, query in QUERIES.items():
        _write(folder / f"{name}.txt", lambda query=query: _rows(cluster, query, missing))
    for machine in cluster.machines.working:
        _write(folder / f"m{machine}-patroni.txt", lambda one=machine: patronictl(cluster.machines, one, "list"))
        _write(folder / f"m{machine}-stacks.txt", lambda one=machine: _stacks(cluster, one))
    for machine in MACHINES:
        with contextlib.suppress(shutil.Error, FileNotFoundError):
            shutil.copytree(cluster.machines.disk(machine) / "log", folder / f"m{machine}")
    return folder


def _write(file: Path, read: Callable[[], str]) -> None:
    """Writes a text, or why it cannot be read: the rest of the evidence is needed all the more then."""
    try:
        file.write_text(read())
    except (*UNREACHABLE, OSError) as error:
        file.write_text(f"{type(error).__name__}: {error}")


def _sections(texts: Mapping[str, str]) -> str:
    return "\n".join(f"{title}\n{text}" for title, text in texts.items())


def _rows(cluster: Cluster, query: str, missing: Collection[str]) -> str:
    with psycopg.connect(cluster.database_of(cluster.primary(), "headrace")) as connection:
        found = connection.execute(query, {"missing": [*missing]})
        names = [column.name for column in found.description or ()]
        return "\n".join("\t".join(map(str, row)) for row in (names, *found.fetchall()))


def _stacks(cluster: Cluster, machine: int) -> str:
    """The stacks of Headrace's processes, by py-spy from outside the machine."""
    spy, found = str(Path(sys.executable).with_name("py-spy")), []
    for pid in cluster.machines.processes(machine):
        with contextlib.suppress(psutil.NoSuchProcess):
            line = psutil.Process(pid).cmdline()
            if "workers.cli" in line and line[0] == sys.executable:
                dump = (spy, "dump", "--nonblocking", "--pid", str(pid))
                done = subprocess.run(dump, capture_output=True, text=True, check=False, timeout=30)
                found.append(f"{' '.join(line)}\n{done.stdout}{done.stderr}")
    return "\n".join(found)
