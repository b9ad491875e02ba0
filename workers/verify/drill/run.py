"""Runs a drill: sends load and injects faults, waits until everything has settled, then reports."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from threading import Event as Flag
from typing import Literal

from app.errors import TryLater
from workers.local.patience import Patience
from workers.local.temporary import Stack
from workers.simulator import Simulator
from workers.simulator.events import Event
from workers.simulator.server import API_KEY
from workers.verify.drill.faults import FaultInjector, Injected
from workers.verify.drill.followers import Follower
from workers.verify.drill.ledger import LedgerReader, queued_ids
from workers.verify.drill.load import ObservingSender, events, is_usable
from workers.verify.drill.plan import Options, plan
from workers.verify.drill.provider import FAULTS, Pause
from workers.verify.drill.report import Report, Snapshot, max_response, rate_limit_violations
from workers.verify.drill.subscriber import RESOURCE, Subscriber
from workers.verify.expected import expected, history, wanted
from workers.verify.totals import Totals, reconcile_totals

LEASE_SECONDS, MARGIN_SECONDS = 60, 60  # the lease of a killed fetch, and time for the remaining work
MAX_SETTLE_SECONDS = 1200.0  # less than PROVIDER_SLOWNESS, after which the simulated present moves


def environment(simulator: Simulator, options: Options) -> dict[str, str]:
    """The stack's settings. Reconciliation is off: it would repair, and so hide, a loss."""
    return {
        "JUNCTION_BASE_URL": simulator.url,
        "JUNCTION_API_KEY": API_KEY,
        "HEADRACE_VISIBILITY_TIMEOUT_SECONDS": str(options.visibility_seconds),
        "HEADRACE_RECONCILE_HOURS": "0",
        "HEADRACE_FETCH_HISTORY": "true",
        "HEADRACE_RESOURCES": "",
        "HEADRACE_PROVIDERS": "",
    }


class Drill:
    """One drill on a running stack. `show` is called with the progress, `on_progress` with each injected fault."""

    def __init__(
        self,
        simulator: Simulator,
        pauses: list[Pause],
        stack: Stack,
        options: Options,
        *,
        show: Callable[[Snapshot], None],
        on_progress: Callable[[Injected], None],
    ) -> None:
        info = stack.info()
        self._simulator, self._pauses, self._options, self._show = simulator, pauses, options, show
        self._broker_url = info["broker_url"]
        self._ledger = LedgerReader(info["database_url"], [user.user_id for user in simulator.world.members])
        self._injector = FaultInjector(stack, plan(options.seed, options.seconds), on_progress)
        self._stop = Flag()
        url, secret = f"{info['web']}/webhooks/junction", info["junction_webhook_secret"]
        self._sender = ObservingSender(url, secret, options.seed, self._stop)
        # The newest positions of the change feed at the beginning, and when everything was read: days may still change.
        self._begin, self._end = 0, 0
        self._followers: list[Follower] = []
        self._stack = stack
        self._last: tuple[list[tuple[str, str]], Counter[str]] = ([], Counter())

    def run(self) -> Report:
        """Runs the drill. Ctrl-C ends it at once."""
        self._ledger.need_empty()
        self._begin = self._ledger.newest_position()
        subscriber = Subscriber(self._stack.data, self._options.seed)
        for fault in FAULTS:
            self._simulator.faults.put(fault)
        try:
            self._follow()
            self._load()
            return self._report(self._settle(subscriber), subscriber)
        finally:
            self._stop.set()
            for one in self._followers:
                one.stop()
            subscriber.close()
            self._sender.close()
            self._ledger.close()

    def _follow(self) -> None:
        url = self._stack.info()["database_url"]
        for number in (1, 2):
            one = Follower(f"follower-{number}", self._stack.folder, url, self._begin, self._options.seed + number)
            self._followers.append(one)
            one.start()

    def _load(self) -> None:
        options, began = self._options, time.monotonic()
        load = events(self._simulator.world, options.seed, options.seconds, options.rate)
        with ThreadPoolExecutor(2) as pool:
            injecting = pool.submit(self._injector.run, self._stop)
            sending = pool.submit(self._sender.send_all, load, options.rate)
            try:
                while not (injecting.done() and sending.done()):
                    seconds = time.monotonic() - began
                    self._snapshot("load", seconds, options.seconds - seconds)
                    if injecting.done():
                        injecting.result()  # an error of the injector ends the drill
                    time.sleep(0.5)
                sending.result()
            except BaseException:
                self._stop.set()  # otherwise the pool would wait for the end of the load
                raise

    def _settle(self, subscriber: Subscriber) -> float | None:
        """Waits until all deliveries and backfills have ended and all changes were read and notified. Returns the time.

        Returns None if there is no progress for too long.
        """
        subscriber.settle()
        for one in self._followers:
            one.settle()
        patience = Patience(self._options.visibility_seconds + LEASE_SECONDS + MARGIN_SECONDS, MAX_SETTLE_SECONDS)
        while True:
            ledger, backfills = self._snapshot("settling", patience.waited, patience.left)
            is_done = self._sender.taken.keys() <= {name for name, _ in ledger} and not _open(backfills)
            with contextlib.suppress(TryLater):
                if is_done and self._is_read(subscriber):
                    return time.time()
            read = [*(one.last() for one in self._followers), len(subscriber.ids)]
            if patience.ends(len(ledger), backfills, len(self._simulator.requests), read):
                return None
            time.sleep(0.5)

    def _is_read(self, subscriber: Subscriber) -> bool:
        """Whether every change is numbered, and the consumers and the subscriber have it. Raises TryLater."""
        if self._ledger.unnumbered():
            return False
        changed, self._end = self._ledger.changed_ids(RESOURCE, self._begin), self._ledger.newest_position()
        return changed <= subscriber.ids and all(one.last() >= self._end for one in self._followers)

    def _snapshot(
        self, phase: Literal["load", "settling", "counting"], seconds: float, left: float
    ) -> tuple[list[tuple[str, str]], Counter[str]]:
        """Shows the progress. While the database is unavailable, its last result is used."""
        with contextlib.suppress(TryLater):
            self._last = self._ledger.settled(), self._ledger.backfills()
        ledger, backfills = self._last
        self._show(
            Snapshot(
                phase,
                seconds,
                left=max(left, 0.0),
                acked=len(self._sender.taken),
                settled=len(ledger),
                applied=sum(outcome == "applied" for _, outcome in ledger),
                faults=len(self._injector.injected),
                backfills_open=_open(backfills),
            )
        )
        return ledger, backfills

    def _report(self, settled_at: float | None, subscriber: Subscriber) -> Report:
        self._snapshot("counting", 0.0, 0.0)
        injected, requests = self._injector.injected, self._simulator.requests
        asked = [datetime.fromisoformat(one["time"]).timestamp() for one in requests]
        slowest, whole = max_response(self._sender.answers, injected)
        found, excused = rate_limit_violations(self._pauses, asked, injected)
        last = max((one.ended for one in injected), default=settled_at or 0.0)
        positions = [one for one in self._ledger.positions(self._begin) if settled_at is None or one <= self._end]
        return Report(
            seed=self._options.seed,
            totals=self._totals(self._sender.taken),
            faults=self._injector.made,
            statuses=dict(Counter(one.status for one in self._sender.answers)),
            max_response=slowest,
            max_response_with_freezes=whole,
            never_taken=len(self._sender.given_up),
            settled_after=None if settled_at is None else settled_at - last,
            backfills=dict(self._ledger.backfills()),
            provider_requests=len(requests),
            provider_refused=sum(one["status"] != 200 for one in requests),
            rate_limit_violations=found,
            excused=excused,
            followers=[one.totals(positions) for one in self._followers],
            subscriber=subscriber.totals(self._ledger.changed_ids(RESOURCE, self._begin)),
        )

    def _totals(self, taken: Mapping[str, Event]) -> Totals:
        ledger = self._ledger.settled()
        is_settled = taken.keys() <= {name for name, _ in ledger}
        return reconcile_totals(
            taken,
            ledger=ledger,
            dead_letters=self._ledger.dead_letters(),
            queued=set() if is_settled else queued_ids(self._broker_url),
            newest=wanted(_usable(taken), history(self._simulator.world)),
            rows=self._ledger.rows(),
            optional=expected(_usable(self._sender.given_up)).keys(),
            unusable=taken.keys() - _usable(taken),
        )


def _open(backfills: Counter[str]) -> int:
    return backfills["pending"] + backfills["running"]


def _usable(sent: Mapping[str, Event]) -> dict[str, Event]:
    return {name: event for name, event in sent.items() if is_usable(event)}
