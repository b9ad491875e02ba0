"""Warnings about a RabbitMQ cluster, which AMQP does not show: from the HTTP API of RabbitMQ's management plugin."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import msgspec

from app.broker.delays import delay_queue
from app.broker.lanes import LANES
from app.config.settings import Settings
from workers.rabbitmq_management import Unavailable, management_apis

API_SECONDS = 3.0
MAX_TICK_SECONDS = 12  # a node that vanishes counts as alive for up to 1.25 times net_ticktime
UNLIMITED = -1  # of the delivery limit, on RabbitMQ 4
DEFAULT_LIMIT_SINCE = 4  # this major version drops a message after 20 deliveries by default


class _Node(msgspec.Struct):
    name: str
    running: bool = False
    net_ticktime: int = 0
    partitions: list[str] = []


class _Queue(msgspec.Struct):
    name: str
    members: list[str] = []
    effective_policy_definition: Any = None
    arguments: dict[str, Any] = {}


class _Overview(msgspec.Struct):
    rabbitmq_version: str


def warnings(settings: Settings) -> list[str]:
    """The faults of the cluster, each with the command that corrects it. Raises Unavailable."""
    reasons = []
    for api in management_apis(settings):
        try:
            nodes = api.get("/api/nodes", list[_Node], API_SECONDS)
            queues = api.get(f"/api/queues/{api.vhost}", list[_Queue], API_SECONDS)
            version = api.get("/api/overview", _Overview, API_SECONDS).rabbitmq_version
        except Unavailable as error:
            reasons.append(f"{api.url}: {error}")
            continue
        ours = {name for lane in LANES for name in (lane, delay_queue(lane).name)}
        queues = [one for one in queues if one.name in ours]
        return [*_of_nodes(nodes), *_of_members(nodes, queues), *_of_limits(queues, unquote(api.vhost), version)]
    raise Unavailable("; ".join(reasons))


def _of_nodes(nodes: list[_Node]) -> Iterator[str]:
    if stopped := [one.name for one in nodes if not one.running]:
        yield f"node {', '.join(stopped)} does not run"
    if split := [one.name for one in nodes if one.partitions]:
        yield (
            f"{', '.join(split)} has a network partition that it ignores, so messages can be lost: "
            "set cluster_partition_handling = pause_minority and restart the nodes of the smaller side"
        )
    slow = max((one.net_ticktime for one in nodes), default=0)
    if len(nodes) > 1 and slow > MAX_TICK_SECONDS:
        yield (
            f"net_ticktime is {slow} s, the time after which the cluster notices a lost machine: "
            f"set net_ticktime = {MAX_TICK_SECONDS} in rabbitmq.conf of every node"
        )


def _of_members(nodes: list[_Node], queues: list[_Queue]) -> Iterator[str]:
    for node in nodes:
        without = sorted(one.name for one in queues if node.name not in one.members)
        if without:
            yield (
                f"{len(without)} queues have no member on {node.name} ({', '.join(without[:3])} ...), so the loss of "
                f"another machine can stop them: rabbitmq-queues grow {node.name} all"
            )


def _of_limits(queues: list[_Queue], vhost: str, version: str) -> Iterator[str]:
    """Headrace requeues no message repeatedly, but each lost connection counts as a delivery too."""
    default = 20 if int(version.partition(".")[0]) >= DEFAULT_LIMIT_SINCE else UNLIMITED
    limits = {one.name: _limit(one, default) for one in queues}
    limited = sorted(name for name, limit in limits.items() if limit != UNLIMITED)
    if limited:
        pattern = f"^({'|'.join(LANES)})(\\.delayed)?$"
        yield (
            f"RabbitMQ drops a message of {', '.join(limited[:3])} ... after {min(limits[one] for one in limited)} "
            f"deliveries: rabbitmqctl set_policy -p {vhost} headrace '{pattern}' '{{\"delivery-limit\": -1}}' "
            "--priority 10 --apply-to queues"
        )


def _limit(queue: _Queue, default: int) -> int:
    policy = queue.effective_policy_definition  # an empty list if there is none
    found = [policy.get("delivery-limit")] if isinstance(policy, dict) else []
    numbers = [one for one in (queue.arguments.get("x-delivery-limit"), *found) if isinstance(one, int)]
    return min((one for one in numbers if one >= 0), default=UNLIMITED) if numbers else default
