"""The sender: plans and posts notifications for a time slice, to all subscribers at the same time.

Each subscription is leased by one coroutine, with a few requests in flight. An endpoint that hangs occupies only its
own coroutine. Queries run in one thread, so that a slow database does not stop the timeouts of requests. See record
0078.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import ParamSpec, TypeVar

from sqlalchemy import Engine

from app.config.settings import Settings
from app.errors import RetryAlone, Unprocessable
from app.observability import metrics
from app.sealing import Sealer
from workers.fetch.retry import NO_ANSWER
from workers.fetch.webhooks import MAX_POST_SECONDS, Poster, PostResult
from workers.notify import planner
from workers.notify.retries import MAX_ASKED, OPEN_AFTER, endpoint_pause, retry_pause
from workers.notify.signing import body_of, open_secrets, signed_headers
from workers.store import notifications, subscriptions
from workers.store.engine import transaction
from workers.store.notifications import EndpointState, Notification, SendAttempt
from workers.store.subscriptions import Subscription

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
SLICE_SECONDS = 10.0
TICK_SECONDS = 0.25  # between two polls for changes and due notifications
MAX_PAGES = 10  # of changes between two polls for due notifications
# A run without work stays active this long after its last change: often another follows, and a start costs 10 ms.
LINGER_SECONDS = 1.0
MAX_ENDPOINTS = 100  # at once: with MAX_IN_FLIGHT, this limits the notifications in memory
MAX_FAILING = 50  # of these, endpoints with failures, so that hanging ones leave places for others
MAX_IN_FLIGHT = 4  # requests to one endpoint
ANY_FAILURES = 2**31 - 1
GONE, GONE_REASON = 410, "the endpoint answered 410 Gone"
NO_SECRET = PostResult(NO_ANSWER, "the signing secret cannot be opened; check HEADRACE_ENCRYPTION_KEY")


class Notifier:
    """Plans and sends. One run at a time."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        *,
        slice_seconds: float = SLICE_SECONDS,
        make_poster: Callable[[], Poster] = Poster,
    ) -> None:
        self._engine, self._settings = engine, settings
        self._slice_seconds, self._make_poster = slice_seconds, make_poster
        self._sends: set[asyncio.Task[None]] = set()  # one for each claimed subscription

    def run(self, is_stopping: Callable[[], bool] = lambda: False) -> None:
        """Runs for a time slice, or until nothing more is due in it. Raises TryLater.

        While requests hang at the end of the slice, endpoints without failures are served for up to 10 s more. A worker
        that stops cancels its requests; their notifications are sent again.
        """
        self._end, self._planned_at = time.monotonic() + self._slice_seconds, -math.inf
        with ThreadPoolExecutor(1, "notify") as self._database:
            asyncio.run(self._run(is_stopping))

    async def _run(self, is_stopping: Callable[[], bool]) -> None:
        try:
            async with self._make_poster() as poster:
                while not is_stopping() and await self._tick(poster):
                    await self._wait()
                await self._cancel()
        finally:
            await self._cancel()
            await self._query(notifications.end_run, self._engine, self._settings.feed_days)

    async def _tick(self, poster: Poster) -> bool:
        """Plans and starts due notifications. Returns whether the slice continues."""
        self._raise_errors()
        left = self._end - time.monotonic()
        await self._plan()
        if left > 0 or (self._sends and left > -MAX_POST_SECONDS):
            await self._start(poster, MAX_ENDPOINTS, 0)
        if left > 0:
            await self._start(poster, MAX_FAILING, ANY_FAILURES)
        next_due = await self._query(notifications.renew_run, self._engine)
        is_soon = next_due is not None and next_due < left
        return bool(self._sends) or (left > 0 and (is_soon or time.monotonic() < self._planned_at + LINGER_SECONDS))

    async def _plan(self) -> None:
        """A page that PostgreSQL refuses now does not delay due notifications."""
        try:
            for _ in range(MAX_PAGES):
                if not await self._query(planner.plan, self._engine):
                    return
                self._planned_at = time.monotonic()
        except (RetryAlone, Unprocessable) as error:
            log.warning("changes cannot be planned (%s); the next tick tries again", error)

    async def _start(self, poster: Poster, limit: int, max_failures: int) -> None:
        if (free := limit - len(self._sends)) <= 0:
            return
        for one in await self._query(notifications.claim, self._engine, free, max_failures):
            self._sends.add(asyncio.create_task(self._serve(poster, one)))

    async def _wait(self) -> None:
        """Until a subscription has been served, or the next tick."""
        if self._sends:
            await asyncio.wait(self._sends, timeout=TICK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.sleep(TICK_SECONDS)

    def _raise_errors(self) -> None:
        """Ends the run if PostgreSQL is unavailable, but not for a statement about one subscription."""
        done = {one for one in self._sends if one.done()}
        self._sends -= done
        for one in done:
            try:
                one.result()
            except (RetryAlone, Unprocessable) as error:
                log.warning("a subscription waits until its lease ends (%s)", error)

    async def _cancel(self) -> None:
        for one in self._sends:
            one.cancel()
        await asyncio.gather(*self._sends, return_exceptions=True)
        self._sends.clear()

    async def _serve(self, poster: Poster, subscription: Subscription) -> None:
        """Sends the due notifications of a leased subscription, until one fails, none is due or the slice ends."""
        failures = subscription.failures
        try:
            secrets = await self._query(self._secrets, subscription)
            while batch := await self._query(
                notifications.start, self._engine, subscription.id, 1 if failures >= OPEN_AFTER else MAX_IN_FLIGHT
            ):
                results = await asyncio.gather(*(_post(poster, subscription, secrets, one) for one in batch))
                attempts, state = attempts_of(batch, results), state_after(results, failures)
                counts = await self._query(notifications.record, self._engine, subscription.id, attempts, state)
                for status, number in counts.items():
                    metrics.NOTIFICATIONS.labels("failed" if status == "pending" else status).inc(number)
                if state.failures or state.gone or time.monotonic() > self._end:
                    return
                failures = 0
        finally:
            await self._query(notifications.release, self._engine, subscription.id)

    def _secrets(self, subscription: Subscription) -> list[str]:
        """The signing secrets; empty if they cannot be opened."""
        with transaction(self._engine) as connection:
            sealed = subscriptions.sealed_secrets(connection, subscription.id)
        try:
            return open_secrets(Sealer(self._settings.encryption_keys), subscription.name, sealed)
        except Unprocessable:
            return []

    async def _query(self, query: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._database, partial(query, *arguments, **named))


async def _post(poster: Poster, to: Subscription, secrets: Sequence[str], one: Notification) -> PostResult:
    if not secrets:
        return NO_SECRET
    body = body_of(one)
    headers = signed_headers(one.id, body, secrets, datetime.now(UTC))
    return await poster.post(to.url, headers, body, allow_private=to.allow_private)


def attempts_of(batch: Sequence[Notification], results: Sequence[PostResult]) -> list[SendAttempt]:
    """The results to store, with the pause before each next attempt."""
    return [
        SendAttempt(one.id, result.error, max(retry_pause(one.attempts), min(result.retry_after or 0.0, MAX_ASKED)))
        for one, result in zip(batch, results, strict=True)
    ]


def state_after(results: Sequence[PostResult], failures: int) -> EndpointState:
    """The state of an endpoint that had `failures` in a row before these results. One success ends the row."""
    gone = GONE_REASON if any(one.status == GONE for one in results) else ""
    if not all(one.error for one in results):
        return EndpointState(gone=gone, recovered=failures >= OPEN_AFTER)
    asked = max(one.retry_after or 0.0 for one in results)
    pause = endpoint_pause(failures + len(results), asked)
    return EndpointState(len(results), results[-1].error, pause, gone)
