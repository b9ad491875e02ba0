"""What must happen after an answer of a provider: a pure decision from the answer and the number of failed attempts."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

from app.providers.request import Terms

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 900.0
LONGEST_RETRY_AFTER = 6 * 3600.0
UNAUTHORIZED_PAUSE = 300.0
MOST_ATTEMPTS = 12
MAY_PASS = frozenset({408, 409, 413, 425})
NO_ANSWER, NOT_JSON = 0, 1  # stand for a status: nothing came back, or something that is no JSON


@dataclass(frozen=True)
class Decision:
    """What to do next, and how many seconds to wait before it.

    use      the answer holds what was asked for
    wait     nothing was asked: the account's rate is used up, or it keeps silent
    again    this request once more
    hush     nobody asks this account for anything until the time is over, then this request once more
    halve    the slice was too large or too slow: ask for half of it
    restart  the cursor is no longer good: begin the slice again
    gone     the provider does not know this person or thing any more
    fail     asking again cannot help
    dead     nor can it, and the answer says why: it is kept as a dead letter
    """

    what: Literal["use", "wait", "again", "hush", "halve", "restart", "gone", "fail", "dead"]
    seconds: float = 0.0
    reason: str = ""
    counts: bool = True  # as a failed attempt


def decide(  # noqa: PLR0911 - a table, a line a case
    status: int,
    headers: Mapping[str, str],
    *,
    attempts: int,
    now: datetime,
    has_cursor: bool = False,
    terms: Terms = Terms(),  # noqa: B008 - it is frozen
) -> Decision:
    """Junction declares 200 and 422 only; the rest is what HTTP (RFC 9110) and the rate-limit pages say.

    A 429 or 503 is for everybody: other workers would only be told the same. A refused key is not this request's
    fault, so it costs no attempt, and is tried again rarely, in case somebody mends it.
    """
    reason = {NO_ANSWER: "no answer", NOT_JSON: "an answer that is no JSON"}.get(status, f"status {status}")
    pause = backoff(attempts)
    match status:
        case 200:
            return Decision("use")
        case 401 | 403:
            return Decision("hush", UNAUTHORIZED_PAUSE, f"{reason}: the API key is refused", counts=False)
        case 429 if terms.limited(headers) == "request":
            return Decision("halve", reason=f"{reason}: more than one request may ask for")
        case 429 | 503:
            asked = retry_after(headers.get("retry-after"), now)
            return Decision("hush", pause if asked is None else asked, reason, counts=asked is None)
        case 404:
            return Decision("gone", reason=reason)
        case 422:
            return Decision("dead", reason=reason)
        case 400 | 410 if has_cursor:
            return Decision("restart", pause, f"{reason}: the cursor is no longer good")
    if 400 <= status < 500 and status not in MAY_PASS:
        return Decision("fail", reason=reason)
    if attempts + 1 >= MOST_ATTEMPTS:
        return Decision("fail", reason=f"{reason}, {MOST_ATTEMPTS} times")
    return Decision("halve" if status in terms.too_much else "again", pause, reason)


def backoff(attempts: int) -> float:
    """Seconds: doubling from one to fifteen minutes, jittered by half, so that workers do not come back at once."""
    longest: float = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(attempts, 20))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret


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
    return min(max(seconds, 0.0) + 0.1, LONGEST_RETRY_AFTER)


def _date(value: str) -> datetime:
    moment = parsedate_to_datetime(value)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
