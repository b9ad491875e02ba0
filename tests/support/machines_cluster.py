"""Headrace on three machines, with a broker and PostgreSQL as clusters of these machines."""

import base64
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Literal, get_args

import httpx
import psycopg
import redis

from tests.support import ENCRYPTION_KEY, HTTP, JUNCTION_SECRET, ROOT
from tests.support.machines import MACHINES, SENDER, Machines, ip
from tests.support.machines_brokers import Broker
from tests.support.machines_postgres import patronictl, start_postgres
from workers.simulator.server import API_KEY

LossKind = Literal["power cut", "frozen", "cut off"]
LOSS_KINDS: tuple[LossKind, ...] = get_args(LossKind)
PROVIDER_PORT = 9000  # of the simulated provider, at the senders' place
DATABASES = ",".join(f"{ip(one)}:5432" for one in MACHINES)
DATABASE_URL = f"postgresql://postgres:x@{DATABASES}/headrace?target_session_attrs=read-write"
# Every machine runs every program, also beat: several beats enqueue the same work, and a lease admits one worker.
PROGRAMS = {
    "web": ("web",),
    "live": ("worker", "--lane", "live"),
    "backfill": ("worker", "--lane", "backfill"),
    "maintenance": ("worker", "--lane", "maintenance"),
    "notify": ("worker", "--lane", "notify"),
    "beat": ("beat",),
}
REPLICATION = """
SELECT count(*) FILTER (WHERE state = 'streaming'), bool_or(sync_state = 'sync') FROM pg_stat_replication"""
# A part of the cluster cannot be asked while it starts or is lost.
UNREACHABLE = (
    *(psycopg.Error, httpx.TransportError, redis.RedisError),
    *(subprocess.CalledProcessError, subprocess.TimeoutExpired),
    *(LookupError, ValueError),  # no primary, no queue, or an incomplete table
)
START_SECONDS = 240.0  # also for the return of a machine; a busy computer needs several times as long as an idle one


class Cluster:
    """The services and Headrace's programs on all machines."""

    def __init__(self, machines: Machines, broker: Broker) -> None:
        self.machines, self.broker = machines, broker

    def start(self) -> None:
        """Starts everything, and returns when all of it works.

        The broker's cluster exists before its queues: a quorum queue has the members that exist when it is declared.
        """
        for machine in MACHINES:
            start_postgres(self.machines, machine)
            self.broker.start(machine)
        _wait("PostgreSQL's cluster", self._has_replicas)
        _wait("the broker's cluster", self.broker.is_formed, every=2)
        with psycopg.connect(self.database_of(self.primary()), autocommit=True) as connection:
            connection.execute("CREATE DATABASE headrace")
        self.headrace(1, "migrate")
        for machine in MACHINES:
            self._start_programs(machine)
        _wait("Headrace", self.is_whole, every=2)

    def lose(self, machine: int, kind: LossKind) -> None:
        """Loses a machine."""
        lose = {"power cut": self.machines.power_cut, "frozen": self.machines.freeze, "cut off": self.machines.cut_off}
        lose[kind](machine)

    def bring_back(self, machine: int, kind: LossKind) -> None:
        """Brings a machine back, and returns when the cluster is whole again."""
        if kind == "power cut":
            self.machines.boot(machine)
            start_postgres(self.machines, machine)
            self.broker.start(machine)
            self._start_programs(machine)
        elif kind == "frozen":
            self.machines.thaw(machine)
        else:
            self.machines.plug_in(machine)
        _wait(f"the return of machine {machine}", lambda: self._is_whole_after(machine), every=2)

    def is_whole(self) -> bool:
        """Whether all replicas, queue members, endpoints and consumers work."""
        return (
            self._has_replicas()
            and self._endpoints_are_ready()
            and self.broker.is_formed()
            and self.broker.is_consumed()
        )

    def _is_whole_after(self, machine: int) -> bool:
        """Whether everything works after the return of a machine, with an operator's help."""
        if self.is_whole():
            return True
        self.broker.repair(machine)
        return False

    def primary(self) -> int:
        """The machine of PostgreSQL's primary. Raises LookupError during a failover."""
        for machine in self.machines.working:
            if self._is_primary(machine):
                return machine
        raise LookupError("no machine has a primary")

    def switch_primary(self, to: int) -> None:
        """Makes a machine's PostgreSQL the primary, without a loss."""
        leader, words = f"m{self.primary()}", ("--candidate", f"m{to}", "--force", "headrace")
        patronictl(self.machines, to, "switchover", "--leader", leader, *words)
        _wait(f"the switch to machine {to}", lambda: self.is_whole() and self.primary() == to, every=2)

    def headrace(self, machine: int, *words: str) -> str:
        """The output of a command of Headrace on a machine."""
        command = (sys.executable, "-m", "workers.cli", *words)
        return self.machines.run(machine, *command, environment=self.environment(machine), timeout=120)

    def environment(self, machine: int) -> dict[str, str]:
        """The settings of Headrace on a machine."""
        return {
            "PYTHONPATH": str(ROOT),
            "DATABASE_URL": DATABASE_URL,
            "JUNCTION_WEBHOOK_SECRET": JUNCTION_SECRET,
            "JUNCTION_API_KEY": API_KEY,
            "JUNCTION_BASE_URL": f"http://127.0.0.1:{PROVIDER_PORT}",
            "HEADRACE_ENCRYPTION_KEY": base64.b64encode(ENCRYPTION_KEY).decode(),
            "HEADRACE_HOST": ip(machine),
            "HEADRACE_OPERATIONS_HOST": ip(machine),
            "HEADRACE_WEB_PROCESSES": "1",
            "HEADRACE_RECONCILE_HOURS": "0",
            "HEADRACE_REQUEST_RATE": "5/second",  # so that history is being fetched during the losses
        } | self.broker.environment(machine)

    def _start_programs(self, machine: int) -> None:
        forward = (str(PROVIDER_PORT), ip(SENDER), str(PROVIDER_PORT))
        python = {"PYTHONPATH": str(ROOT)}
        self.machines.start(
            machine, "forward", sys.executable, "-m", "tests.support.forward", *forward, environment=python
        )
        for name, words in PROGRAMS.items():
            command = (sys.executable, "-m", "workers.cli", *words)
            self.machines.start(machine, name, *command, environment=self.environment(machine))

    @staticmethod
    def database_of(machine: int, name: str = "postgres") -> str:
        return f"postgresql://postgres:x@{ip(machine)}:5432/{name}?connect_timeout=2"

    def _is_primary(self, machine: int) -> bool:
        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self.database_of(machine)) as connection:
            return connection.execute("SELECT pg_is_in_recovery()").fetchone() == (False,)
        return False

    def _has_replicas(self) -> bool:
        with psycopg.connect(self.database_of(self.primary())) as connection:
            return connection.execute(REPLICATION).fetchone() == (len(MACHINES) - 1, True)

    def _endpoints_are_ready(self) -> bool:
        return all(HTTP.get(f"http://{ip(one)}:8001/readyz", timeout=5).status_code == 200 for one in MACHINES)


def _wait(what: str, condition: Callable[[], bool], every: float = 0.5) -> None:
    """Waits for a part of the cluster. Raises TimeoutError."""
    reason = "not whole"
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except UNREACHABLE as error:
            reason = type(error).__name__
        time.sleep(every)
    raise TimeoutError(f"no {what} within {START_SECONDS:.0f} s: {reason}")
