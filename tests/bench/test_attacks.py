"""The attack program: its selection, its table, its connections, its deliveries and its observation of processes."""

import contextlib
import io
import itertools
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from rich.console import Console

from tests.bench.attacks.__main__ import chosen, table
from tests.bench.attacks.connections import Crowd
from tests.bench.attacks.deliveries import ODD_MESSAGES, odd_tasks, samples, terra_attack
from tests.bench.attacks.good import Good, spread
from tests.bench.attacks.run import ATTACKS, Child, Plan, Row
from tests.bench.attacks.target import Signals, Target
from tests.bench.attacks.watch import Resident, Watch
from tests.support import ROOT, until
from tests.support.junction import parsed
from tests.support.terra import parsed as parsed_terra
from workers.actions import Record, Samples


@pytest.fixture
def target(tmp_path: Path) -> Target:
    """A stack without processes, whose endpoint is closed."""
    stack = tmp_path / "stack.json"
    stack.write_text('{"processes": {}}', encoding="utf-8")
    return Target(stack, "127.0.0.1", 0, "whsec_c2VjcmV0", "secret", "", "")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A server that accepts connections only when a test asks it to."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as found:
        yield found


def test_attacks_are_chosen_by_name_or_first_word() -> None:
    """Breaks if a name runs another attack, or if a misspelt name runs none without an error."""
    assert chosen([]) == list(ATTACKS)
    assert chosen(["idle", "nothing"]) == ["nothing", "idle-2100", "idle-6000"]
    assert chosen(["poison-brackets"]) == ["poison-brackets"]
    with pytest.raises(click.BadParameter, match="no attack is named 'idel'"):
        chosen(["idle", "idel"])


def test_the_table_shows_errors_and_memory() -> None:
    """Breaks if a 5xx, a failed or a lost event is not counted, or if a run without rows cannot be printed."""
    good = Good(9, {"202": 4, "503": 2, "500": 1, "TimeoutError": 2}, spread([0.001, 0.003]), spread([]), lost=3)
    assert (good.server_errors, good.failed) == (3, 2)
    console = Console(width=170, file=io.StringIO())
    console.print(table([Row("idle-6000", good, {"web": Resident(60, 70.4, 61)}, 5, "a note")], Plan()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(one in text for one in ("idle-6000", "3 / 3 / 3", "60 / 70 / 61", "a note", "nan"))


def test_a_crowd_reopens_closed_connections(target: Target, listener: socket.socket) -> None:
    """Breaks if an attack ends as soon as the server closes its connections."""
    crowd = Crowd(Target(target.stack, *listener.getsockname(), "", "", "", ""), 8, b"x")
    crowd.fill()
    accepted = [listener.accept()[0] for _ in range(8)]
    for one in accepted[:3]:
        assert one.recv(10) == b"x"
        one.close()
    until(lambda: crowd.drop_closed() or crowd.closed == 3, 10)
    crowd.fill()
    accepted += [listener.accept()[0] for _ in range(3)]
    crowd.drip()
    assert accepted[-1].recv(10) in (b"x", b"xx")
    crowd.close()
    for one in accepted:
        one.close()


def failing(_: Target, signals: Signals) -> None:
    """A process that fails after it has become ready."""
    signals.ready.set()
    raise SystemExit(1)


def test_a_failed_process_ends_the_measurement(target: Target) -> None:
    """Breaks if a run waits a quarter of an hour for a process that has failed."""
    with Child(failing, target) as child, pytest.raises(RuntimeError, match="failed"):
        child.end()


def test_deaths_are_counted(target: Target) -> None:
    """Breaks if a worker that dies is not noticed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        target.stack.write_text(json.dumps({"processes": {"live": [child.pid], "postgres": [1]}}), encoding="utf-8")
        watch = Watch(target)
        child.kill()
        child.wait()
        memory = watch.stop()
    assert watch.deaths == 1
    assert memory["workers"].before > memory["workers"].after == 0


def test_attacking_deliveries_are_valid() -> None:
    """Breaks if a parser rejects the deliveries of an attack, and the attack therefore tests nothing."""
    (found,) = parsed(samples(61, 3)).actions
    assert isinstance(found, Samples)
    assert len(found.rows) == 3
    kinds = {type(action) for _ in range(50) for action in parsed_terra(terra_attack("w1", "u1")).actions}
    assert Record in kinds
    assert len(kinds) > 1


def test_odd_messages_repeat() -> None:
    """Breaks if the messages depend on anything but the seed, or if most of them are not JSON."""
    found = list(odd_tasks(random.Random(1)))
    assert len(found) == ODD_MESSAGES
    assert found[:99] == list(itertools.islice(odd_tasks(random.Random(1)), 99))
    valid = 0
    for message in found:
        with contextlib.suppress(ValueError):
            valid += isinstance(json.loads(message), dict)
    assert valid > ODD_MESSAGES / 2


def test_a_run_on_a_real_stack(*, full: bool) -> None:
    """Breaks if the program cannot measure a stack."""
    if not full:
        pytest.skip("starts a complete stack: --full")
    command = [sys.executable, "-P", "-m", "tests.bench.attacks", "nothing", "--seconds", "2", "--json"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE)
    (row,) = json.loads(output.stdout)
    assert row["good"]["statuses"] == {"202": row["good"]["sent"]}
    assert (row["good"]["lost"], row["deaths"]) == (0, 0)
