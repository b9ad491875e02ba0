"""Three machines with RabbitMQ, PostgreSQL and Headrace lose each machine in turn, under load and with history running.

This runs alone on its computer, because it measures times: `./deploy/test tests/machines`, as root on Linux, with the
Debian packages that the skip names. 4 minutes; with --full every machine is lost in every way.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import Engine

from app.config.settings import load
from tests.support import JUNCTION_SECRET, rabbitmq, rows
from tests.support.machines import ABSENT, MACHINES, SENDER, Machines, available, ip
from tests.support.machines_brokers import RabbitMQCluster, ValkeyCluster
from tests.support.machines_cluster import LOSS_KINDS, PROVIDER_PORT, Cluster, LossKind
from tests.support.machines_evidence import write_evidence
from tests.support.machines_load import NOT_CONNECTED, Answer, BalancedSender, Traffic
from tests.support.machines_postgres import missing_packages
from workers.local import wheels
from workers.local.patience import Patience
from workers.simulator.sender import NO_ANSWER
from workers.simulator.server import Simulator
from workers.store.engine import make_engine
from workers.verify.drill.followers import Follower, FollowerTotals
from workers.verify.expected import history
from workers.verify.totals import prove

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not available(), reason=ABSENT),
    pytest.mark.skipif(
        bool(missing_packages()), reason=f"not installed (Debian: apt-get install {missing_packages()})"
    ),
    pytest.mark.skipif(not wheels.available(), reason="no Valkey wheel for this platform"),
]
RATE = 12.0  # events per second
DAYS, SEED = 2, 17  # of history per user
LEAD_SECONDS = 4.0  # between the announcement of history and the loss
# Longer than every time limit that detects a loss: 20 s for Patroni's leader key, 15 s for RabbitMQ's node.
LOST_SECONDS = 40.0
PATIENCE_SECONDS = 240.0  # without progress, before anything counts as lost
MAX_GAP, MAX_ROW, MAX_ANSWER = 20.0, 60.0, 5.0  # seconds without a 202, from a 202 to its row, and of an answer


@dataclass(frozen=True)
class Loss:
    """A loss: how, and which machine, which is chosen right before it."""

    kind: LossKind
    choose: Callable[[Cluster, frozenset[int]], int]


@dataclass(frozen=True)
class Outage:
    """A machine that was lost from `began` until the cluster was whole again at `ended`, in unix seconds."""

    machine: int
    kind: LossKind
    roles: str
    began: float
    ended: float

    def __str__(self) -> str:
        seconds, roles = self.ended - self.began, self.roles or "no leader"
        return f"{clock(self.began)} machine {self.machine} {self.kind} ({roles}), whole after {seconds:.0f} s"

    def explains(self, answer: Answer) -> bool:
        """Whether the machine of a request was lost, or started again, during the request."""
        return answer.machine == self.machine and answer.began < self.ended and answer.ended > self.began


def clock(at: float) -> str:
    """A time of day in UTC, as in the logs."""
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S.%f")[:-5]


def primary(cluster: Cluster, _left: frozenset[int]) -> int:
    """PostgreSQL's primary."""
    return cluster.primary()


def leader(cluster: Cluster, _left: frozenset[int]) -> int:
    """The leader of queue `live`."""
    return cluster.broker.leader()


def remaining(_cluster: Cluster, left: frozenset[int]) -> int:
    """A machine that was not lost yet."""
    return min(left)


def numbered(machine: int) -> Callable[[Cluster, frozenset[int]], int]:
    """A certain machine."""
    return lambda _cluster, _left: machine


def primary_and_leader(cluster: Cluster, _left: frozenset[int]) -> int:
    """The leader of queue `live`, after it became PostgreSQL's primary as well."""
    machine = cluster.broker.leader()
    if cluster.primary() != machine:
        cluster.switch_primary(machine)
    return machine


# Both leaders move to other machines when theirs is lost. So the leader of `live` is never on the machine that was lost
# first, and each machine is lost once.
SHORT = (Loss("power cut", primary), Loss("frozen", leader), Loss("cut off", remaining))
LONG = (
    *(Loss(kind, numbered(machine)) for kind in LOSS_KINDS for machine in MACHINES),
    Loss("power cut", primary_and_leader),
)


@dataclass
class Run:
    """A cluster with load on it."""

    cluster: Cluster
    provider: Simulator
    traffic: Traffic
    engine: Engine
    follower: Follower  # a consumer of the change feed, which is killed every few seconds
    outages: list[Outage] = field(default_factory=list)

    @property
    def sender(self) -> BalancedSender:
        return self.traffic.sender

    def lose(self, loss: Loss) -> None:
        """Loses a machine while a user's history is fetched, and waits until the cluster is whole again."""
        left = frozenset(MACHINES) - {one.machine for one in self.outages}
        machine = loss.choose(self.cluster, left)
        leaders = {"primary": self.cluster.primary(), "leader of live": self.cluster.broker.leader()}
        roles = " and ".join(name for name, found in leaders.items() if found == machine)
        self.traffic.announce_history()
        time.sleep(LEAD_SECONDS)
        began = time.time()
        self.cluster.lose(machine, loss.kind)
        time.sleep(LOST_SECONDS)
        self.cluster.bring_back(machine, loss.kind)
        self.outages.append(Outage(machine, loss.kind, roles, began, time.time()))
        print(self.outages[-1], flush=True)

    def missing(self) -> set[str]:
        """The ids of accepted deliveries without an outcome."""
        found = rows(self.engine, "SELECT message_id FROM health.deliveries")
        return self.sender.accepted.keys() - {row["message_id"] for row in found}


@contextmanager
def running(broker: type[RabbitMQCluster | ValkeyCluster], losses: int) -> Iterator[Run]:
    """A cluster with load. After a failure, everything that explains it is in a folder."""
    until = datetime.now(UTC) + timedelta(hours=2)  # after the test, so that the world does not change with the time
    with ExitStack() as stack:
        machines = stack.enter_context(Machines())
        cluster = Cluster(machines, broker(machines))
        run: Run | None = None
        try:
            provider = stack.enter_context(
                Simulator(losses, DAYS, SEED, until=until, host=ip(SENDER), port=PROVIDER_PORT, page_size=100)
            )
            cluster.start()
            urls = {machine: f"http://{ip(machine)}:8000/webhooks/junction" for machine in MACHINES}
            traffic = stack.enter_context(Traffic(provider.world, urls, JUNCTION_SECRET, RATE))
            engine = make_engine(load(cluster.environment(MACHINES[0])))
            stack.callback(engine.dispose)
            database_url = cluster.environment(MACHINES[0])["DATABASE_URL"]
            follower = Follower("follower", machines.folder, database_url, 0, SEED)
            stack.callback(follower.stop)
            follower.start()
            run = Run(cluster, provider, traffic, engine, follower)
            yield run
        except BaseException as error:
            error.add_note(f"evidence: {write_evidence(cluster, *described(run))}")
            raise


def described(run: Run | None) -> tuple[set[str], str]:
    """The ids of missing deliveries, and the losses."""
    if run is None:
        return set(), "the cluster did not start"
    try:
        return run.missing(), "\n".join((*map(str, run.outages), *slowest_rows(run), *unexpected_answers(run)))
    except Exception as error:  # noqa: BLE001 - the rest of the evidence is needed all the more then
        return set(), f"the ledger cannot be read: {error}"


def slowest_rows(run: Run) -> list[str]:
    """The ten accepted events whose rows were committed last after their 202."""
    query = "SELECT message_id, extract(epoch FROM applied_at)::float8 AS at, outcome FROM health.deliveries"
    accepted = run.sender.accepted
    found = sorted(
        (row["at"] - accepted[row["message_id"]], row["message_id"], row["outcome"])
        for row in rows(run.engine, query)
        if row["message_id"] in accepted
    )
    return [
        f"{message_id} 202 at {clock(accepted[message_id])}, {outcome} after {seconds:.1f} s"
        for seconds, message_id, outcome in found[-10:]
    ]


def unexpected_answers(run: Run) -> list[str]:
    """Every answer that was not a 202, or slower than a second."""
    return [
        f"{clock(one.began)} machine {one.machine} answered {one.status} after {one.seconds:.1f} s"
        for one in run.sender.answers
        if one.status != 202 or one.seconds > 1
    ]


def wait_for_history(engine: Engine) -> dict[str, int]:
    """The number of backfills by status, after all are complete or there is no progress."""
    patience = Patience(PATIENCE_SECONDS, 900)
    while True:
        found = rows(engine, "SELECT status, count(*) AS n, sum(records) AS records FROM health.backfills GROUP BY 1")
        if {row["status"] for row in found} == {"complete"} or patience.ends(str(found)):
            return {row["status"]: row["n"] for row in found}
        time.sleep(1)


def seconds_to_row(run: Run) -> list[float]:
    """Sorted, for each accepted event: the time from its 202 to the commit of its row."""
    found = rows(run.engine, "SELECT message_id, extract(epoch FROM applied_at)::float8 AS at FROM health.deliveries")
    accepted = run.sender.accepted
    return sorted(row["at"] - accepted[row["message_id"]] for row in found if row["message_id"] in accepted)


def read_changes(run: Run) -> FollowerTotals:
    """What the consumer of the change feed has read, after it has read everything or makes no more progress."""
    run.follower.settle()
    patience = Patience(PATIENCE_SECONDS, 900)
    while True:
        (state,) = rows(run.engine, "SELECT newest, (SELECT count(*) FROM headrace.outbox) AS left FROM headrace.feed")
        last = run.follower.last()
        if (last >= state["newest"] and not state["left"]) or patience.ends(last, str(state)):
            found = rows(run.engine, "SELECT position FROM health.changes ORDER BY position")
            return run.follower.totals([row["position"] for row in found])
        time.sleep(1)


def longest_gap(answers: Sequence[Answer]) -> float:
    """The longest time without a 202 of any endpoint."""
    ended = sorted(one.ended for one in answers if one.status == 202)
    return max(later - earlier for earlier, later in pairwise(ended))


def summary(seconds: Sequence[float]) -> str:
    """Median, 99th percentile and maximum of sorted times."""
    p50, p99 = (seconds[int(len(seconds) * share)] for share in (0.5, 0.99))
    return f"{p50:.2f} / {p99:.2f} / {seconds[-1]:.2f} s"


def check(run: Run, statuses: Mapping[int, int]) -> str:
    """Checks the claim, and returns the figures."""
    sender = run.sender
    backfills = wait_for_history(run.engine)
    totals = prove(run.engine, sender.taken, history(run.provider.world), PATIENCE_SECONDS)
    changes = read_changes(run)
    to_row, gap = seconds_to_row(run), longest_gap(sender.answers)
    to_202 = sorted(sender.accepted[name] - sender.first_sent[name] for name in sender.accepted)
    others = [one for one in sender.answers if not any(outage.explains(one) for outage in run.outages)]
    silent = [one for one in others if one.status in (NO_ANSWER, NOT_CONNECTED)]
    slowest = max(one.seconds for one in others)
    figures = (
        f"{totals.accepted} accepted, {totals.lost} lost, {totals.doubled} doubled, {len(totals.pending)} pending; "
        f"longest time without a 202 {gap:.1f} s; to the 202 {summary(to_202)}; from the 202 to the row "
        f"{summary(to_row)} (p50/p99/max); slowest answer {slowest:.1f} s; "
        f"answers {dict(Counter(one.status for one in sender.answers))}; backfills {backfills}; {changes}"
    )
    print("\n".join(map(str, run.outages)), figures, sep="\n")
    assert set(statuses) == {202}, figures
    assert totals.holds, f"{figures}; {totals}"
    assert set(backfills) == {"complete"}, figures
    assert changes.is_exact, figures
    assert changes.read >= totals.accepted / 4, figures  # duplicates and stale events change nothing
    assert gap <= MAX_GAP, figures
    assert to_row[-1] <= MAX_ROW, figures
    assert not silent, f"{figures}; without an answer of a machine that worked: {silent[:5]}"
    assert slowest <= MAX_ANSWER, figures
    return figures


@pytest.mark.skipif(rabbitmq.binaries() is None, reason=rabbitmq.ABSENT)
def test_losing_any_machine_loses_nothing(record_property: Any, *, full: bool) -> None:
    """Breaks if the loss of one machine loses or doubles an event or history, or if senders or rows wait too long."""
    losses = LONG if full else SHORT
    with running(RabbitMQCluster, len(losses)) as run:
        for loss in losses:
            run.lose(loss)
        assert {one.machine for one in run.outages} == {*MACHINES}
        record_property("figures", check(run, run.traffic.finish()))


def test_losing_any_machine_with_valkey_loses_nothing(record_property: Any, *, full: bool) -> None:
    """Breaks if the same happens with Valkey and Sentinel as the broker, one replica of which confirms every event."""
    if not full:
        pytest.skip("four minutes more: ./deploy/test --full tests/machines")
    with running(ValkeyCluster, len(SHORT)) as run:
        for loss in SHORT:
            run.lose(loss)
        record_property("figures", check(run, run.traffic.finish()))
