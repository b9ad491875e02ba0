"""The decision after a response: a pure function of its status, its headers and the number of failed attempts."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum

from workers.aggregators.requests import ApiLimits
from workers.fetch.backoff import backoff

FIRST_PAUSE, MAX_PAUSE = 1.0, 900.0  # seconds
MAX_RETRY_AFTER = 6 * 3600.0
UNAUTHORIZED_PAUSE = 300.0
MAX_ATTEMPTS = 12
RETRYABLE_CLIENT_ERRORS = frozenset({408, 409, 413, 425})
NO_ANSWER, UNREADABLE = 0, 1  # in place of a status: no response arrived, or its body has not the expected form


class FetchAction(StrEnum):
    """What to do next with a request, or with what it was to fetch."""

    USE = "use"  # the response holds the requested data
    WAIT = "wait"  # no request was sent: the account's rate is used up, or the account is paused
    RETRY = "retry"  # send this request again
    PAUSE = "pause"  # pause all requests to this account, then send this request again
    SPLIT = "split"  # the date range was too large or too slow: request half of it
    RESTART = "restart"  # the cursor is no longer valid: begin the date range again
    NOT_FOUND = "not_found"  # the aggregator does not know this user or record any more
    FAIL = "fail"  # a retry cannot succeed
    REJECT = "reject"  # a retry cannot succeed and the response says why: it becomes a dead letter


FINAL = (FetchAction.NOT_FOUND, FetchAction.FAIL, FetchAction.REJECT)


@dataclass(frozen=True)
class Decision:
    """What to do next, and how many seconds to wait before it."""

    action: FetchAction
    seconds: float = 0.0
    reason: str = ""
    counts: bool = True  # as a failed attempt
    key_refused: bool = False  # only a new API key ends this pause


def decide(  # noqa: PLR0911 - a table with one line per case
    status: int,
    headers: Mapping[str, str],
    *,
    attempts: int,
    now: datetime,
    has_cursor: bool = False,
    fault: str = "",
    limits: ApiLimits = ApiLimits(),  # noqa: B008 - it is frozen
) -> Decision:
    """The next action. Junction documents only 200 and 422; the rest follows RFC 9110 and the rate-limit pages.

    429 and 503 pause all workers, because each would get the same response. A refused API key is not the request's
    fault: it counts as no attempt, and the request is retried every five minutes until the operator replaces the key.
    `fault` is why the body of an UNREADABLE response cannot be read, without a value of it.
    """
    reason = describe(status) + (f": {fault}" if fault else "")
    delay = backoff(attempts, base=FIRST_PAUSE, limit=MAX_PAUSE)
    match status:
        case 200:
            return Decision(FetchAction.USE)
        case 401 | 403:
            reason = f"{reason}: the API key is refused"
            return Decision(FetchAction.PAUSE, UNAUTHORIZED_PAUSE, reason, counts=False, key_refused=True)
        case 429 if limits.limited(headers) == "request":
            return Decision(FetchAction.SPLIT, reason=f"{reason}: the date range is too long for one request")
        case 429 | 503:
            asked = retry_after(headers.get("retry-after"), now)
            return Decision(FetchAction.PAUSE, delay if asked is None else asked, reason, counts=asked is None)
        case 404:
            return Decision(FetchAction.NOT_FOUND, reason=reason)
        case 422:
            return Decision(FetchAction.REJECT, reason=reason)
        case 400 | 410 if has_cursor:
            return Decision(FetchAction.RESTART, delay, f"{reason}: the cursor is no longer valid")
    if 400 <= status < 500 and status not in RETRYABLE_CLIENT_ERRORS:
        return Decision(FetchAction.FAIL, reason=reason)
    if attempts + 1 >= MAX_ATTEMPTS:
        return Decision(FetchAction.FAIL, reason=f"{reason}, {MAX_ATTEMPTS} times")
    return Decision(FetchAction.SPLIT if status in limits.split_on_status else FetchAction.RETRY, delay, reason)


def describe(status: int) -> str:
    """A status in words."""
    return {NO_ANSWER: "no answer", UNREADABLE: "a response that cannot be read"}.get(status, f"status {status}")


def is_unavailable(status: int) -> bool:
    """Whether the API, or the network before it, is down. A 503 is not counted here: it pauses the account."""
    return status == NO_ANSWER or (status >= 500 and status != 503)


def retry_after(value: str | None, now: datetime) -> float | None:
    """The seconds that a Retry-After header asks for (RFC 9110, 10.2.3: a number or a date); None without a valid one.

    A tenth of a second is added: a date has whole seconds, and a retry that is early is refused.
    """
    if value is None:
        return None
    try:
        seconds = float(value) if value.strip().isdigit() else (_date(value) - now).total_seconds()
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0) + 0.1, MAX_RETRY_AFTER)


def _date(value: str) -> datetime:
    moment = parsedate_to_datetime(value)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
