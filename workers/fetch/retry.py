"""What must happen after a response: a pure decision from its status and headers and the number of failed attempts."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum

from workers.aggregators.requests import ApiLimits

FIRST_PAUSE, MAX_PAUSE = 1.0, 900.0
MAX_RETRY_AFTER = 6 * 3600.0
UNAUTHORIZED_PAUSE = 300.0
MAX_ATTEMPTS = 12
MAY_PASS = frozenset({408, 409, 413, 425})
NO_ANSWER, NOT_JSON = 0, 1  # stand for a status: nothing came back, or something that is no JSON


class FetchAction(StrEnum):
    """What to do next with a request, or with what it was to fetch."""

    USE = "use"  # the response holds what was asked for
    WAIT = "wait"  # nothing was requested: the account's rate is used up, or the account is paused
    RETRY = "retry"  # send this request again
    PAUSE = "pause"  # pause all requests to this account, then send this request again
    SPLIT = "split"  # the date range was too large or too slow: request half of it
    RESTART = "restart"  # the cursor is no longer valid: begin the date range again
    NOT_FOUND = "not_found"  # the aggregator does not know this user or record any more
    FAIL = "fail"  # a retry cannot succeed
    REJECT = "reject"  # nor can it here, and the response says why: it becomes a dead letter


@dataclass(frozen=True)
class Decision:
    """What to do next, and how many seconds to wait before it."""

    action: FetchAction
    seconds: float = 0.0
    reason: str = ""
    counts: bool = True  # as a failed attempt
    key_refused: bool = False  # only the operator can end this pause


def decide(  # noqa: PLR0911 - a table, a line a case
    status: int,
    headers: Mapping[str, str],
    *,
    attempts: int,
    now: datetime,
    has_cursor: bool = False,
    terms: ApiLimits = ApiLimits(),  # noqa: B008 - it is frozen
) -> Decision:
    """Junction declares 200 and 422 only; the rest is what HTTP (RFC 9110) and the rate-limit pages say.

    A 429 or 503 is for everybody: other workers would only be told the same. A refused key is not this request's
    fault, so it costs no attempt, and is tried again rarely, in case somebody mends it.
    """
    reason = {NO_ANSWER: "no answer", NOT_JSON: "an answer that is no JSON"}.get(status, f"status {status}")
    pause = backoff(attempts)
    match status:
        case 200:
            return Decision(FetchAction.USE)
        case 401 | 403:
            why = f"{reason}: the API key is refused"
            return Decision(FetchAction.PAUSE, UNAUTHORIZED_PAUSE, why, counts=False, key_refused=True)
        case 429 if terms.limited(headers) == "request":
            return Decision(FetchAction.SPLIT, reason=f"{reason}: more than one request may ask for")
        case 429 | 503:
            asked = retry_after(headers.get("retry-after"), now)
            return Decision(FetchAction.PAUSE, pause if asked is None else asked, reason, counts=asked is None)
        case 404:
            return Decision(FetchAction.NOT_FOUND, reason=reason)
        case 422:
            return Decision(FetchAction.REJECT, reason=reason)
        case 400 | 410 if has_cursor:
            return Decision(FetchAction.RESTART, pause, f"{reason}: the cursor is no longer good")
    if 400 <= status < 500 and status not in MAY_PASS:
        return Decision(FetchAction.FAIL, reason=reason)
    if attempts + 1 >= MAX_ATTEMPTS:
        return Decision(FetchAction.FAIL, reason=f"{reason}, {MAX_ATTEMPTS} times")
    return Decision(FetchAction.SPLIT if status in terms.split_on_status else FetchAction.RETRY, pause, reason)


def backoff(attempts: int) -> float:
    """Seconds: doubling from one to fifteen minutes, jittered by half, so that workers do not come back at once."""
    limit: float = min(MAX_PAUSE, FIRST_PAUSE * 2.0 ** min(attempts, 20))
    return limit * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret


def retry_after(value: str | None, now: datetime) -> float | None:
    """Seconds that a Retry-After asks for (RFC 9110, 10.2.3: a number or a date); None if there is none to read.

    Rounded up by a tenth: a date has whole seconds, and being early is worse than being late.
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
