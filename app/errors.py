"""The errors of Headrace, named by the action that must follow. Every module may import this one.

HeadraceError
├── Misconfigured        stop: the operator must change a setting
├── InvalidSignature     401: the sender did not sign the request
├── PublishFailed        503: the broker did not confirm; the sender retries
├── Unprocessable        dead letter: a retry cannot succeed
│   ├── NotAuthentic     dead letter of the raw message: each of its fields may be forged
│   └── TooLarge         dead letter, or another lane: the body is larger than its reader accepts
├── NotFound             report: the object that a command names does not exist
├── PositionDropped      report: a consumer must read the tables again, because changes that it has not read are dropped
├── UserErased           report: data of this user is neither fetched nor stored again
├── NotYet               ask again: the aggregator answered without the data
└── TryLater             retry: a service is unavailable
    ├── ConnectionLost   retry; the statement may have crashed PostgreSQL's process, so in the end retry it alone
    ├── RetryAlone       retry this delivery in a transaction of its own: PostgreSQL did not execute its statement
    └── CommitUnknown    retry: the connection broke during COMMIT, so the transaction may be committed
"""

from traceback import extract_tb
from typing import Literal

RetryCause = Literal[
    "statement_timeout", "lock_timeout", "conflict", "damaged_page", "storage", "out_of_memory", "other"
]


class HeadraceError(Exception):
    """The root: `except HeadraceError` at a process edge prints one line and ends with status 1, or 4 for NotFound.

    `setting` is the variable that caused the error, or ''; the text begins with its name.
    """

    def __init__(self, text: str = "", *, setting: str = "") -> None:
        super().__init__(f"{setting}: {text}" if setting else text)
        self.setting = setting


class Misconfigured(HeadraceError):
    """A setting is missing or unsafe. The text names the setting and the fix, never the value."""


class InvalidSignature(HeadraceError):
    """A signature is missing, wrong or stale. `reason` is a metric label.

    missing     without a signature
    no_secret   with one, but no secret of the aggregator is configured
    signature   it fits no secret
    stale       it fits, but its time is too old
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class PublishFailed(HeadraceError):
    """The broker did not confirm a delivery in time: the answer must not be 2xx."""


class Unprocessable(HeadraceError):
    """A delivery or message that no retry can apply. The text gives the reason and no value of the body."""


class NotAuthentic(Unprocessable):
    """A body that was not sealed with the key, or not for this delivery: the delivery's other fields may be forged."""


class TooLarge(Unprocessable):
    """A body that is larger than its reader accepts. It is authentic, but was not read to its end."""


class NotFound(HeadraceError):
    """An object that a command names does not exist."""


class PositionDropped(HeadraceError):
    """Retention has dropped changes of the feed that a consumer has not read. Exit status 3."""


class UserErased(HeadraceError):
    """The user was erased, and a command would fetch or store their data."""


class NotYet(HeadraceError):
    """The aggregator answered without the data. `what` says why; the next request may follow in `seconds`.

    processing   the aggregator waits for the provider's answer
    rate_limit   too many requests; applies to the whole account
    no_data      there is no data, or none yet
    accepted     the data will arrive as webhooks
    """

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(f"not yet: {what}")
        self.what, self.seconds = what, seconds


class TryLater(HeadraceError):
    """The database, the broker or an aggregator is unavailable; the same work can succeed later."""


class ConnectionLost(TryLater):
    """The connection broke during a statement: in an outage, or because the statement crashed its server process."""


class RetryAlone(TryLater):
    """PostgreSQL works, but it did not execute a statement of this transaction.

    One delivery of a message may be the cause, so the others must not wait for it. `cause` is a metric label; it also
    decides how many tries a delivery has before it becomes a dead letter.
    """

    def __init__(self, text: str, cause: RetryCause = "other") -> None:
        super().__init__(text)
        self.cause = cause


class CommitUnknown(TryLater):
    """The connection broke after COMMIT was sent and before its answer: the transaction is committed or rolled back.

    Only repeatable work may be retried: work whose second execution finds the effect of the first and changes nothing.
    """


def is_outage(error: Exception) -> bool:
    """Whether an error concerns all work, and not only the statements or deliveries at hand."""
    return isinstance(error, TryLater) and not isinstance(error, RetryAlone)


def describe(error: Exception) -> str:
    """The text of one of our errors; of any other error its class and place, because its text may quote a value."""
    if isinstance(error, HeadraceError):
        return str(error)
    frames = extract_tb(error.__traceback__)
    line = f" at {frames[-1].name}:{frames[-1].lineno}" if frames else ""
    return f"unexpected {type(error).__name__}{line}"
