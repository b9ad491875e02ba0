"""Every error Headrace raises, named by what must happen next. Anybody may import this.

HeadraceError
├── Misconfigured        stop: the operator must change a setting
├── InvalidSignature     401: the request is not from who it claims to be
├── PublishFailed        503: the broker did not confirm; the sender will send again
├── Unprocessable        dead letter: a retry cannot succeed
├── NotFound             tell the operator: what a command names does not exist
├── UserErased           tell the operator: nothing of this user is fetched or stored again
├── NotYet               ask again: the aggregator answers, but not with what was asked for
└── TryLater             put back: something we depend on is away
"""


class HeadraceError(Exception):
    """The root: `except HeadraceError` at a process edge prints one line and ends with status 1.

    `setting` is the variable that the error is about, '' if it is about none; its text begins with that name.
    """

    def __init__(self, text: str = "", *, setting: str = "") -> None:
        super().__init__(f"{setting}: {text}" if setting else text)
        self.setting = setting


class Misconfigured(HeadraceError):
    """A setting is missing or unsafe. The text names the setting and how to mend it, never its value."""


class InvalidSignature(HeadraceError):
    """A signature is missing, wrong or stale. `reason` is one of a fixed set, fit for a metric label."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class PublishFailed(HeadraceError):
    """The broker has not confirmed a delivery in time, so it must not be answered with 2xx."""


class Unprocessable(HeadraceError):
    """A delivery that no number of attempts can apply. The text says why and holds no value of the body."""


class NotFound(HeadraceError):
    """What a command names does not exist."""


class UserErased(HeadraceError):
    """The user was erased. Commands that would fetch or store more of them end with this."""


class NotYet(HeadraceError):
    """An answer that is a word about the data and not the data. `what` is one of a fixed set, `seconds` the wait.

    processing   the aggregator has asked the provider, which has not answered yet
    rate_limit   it asks for less; meant for everybody
    no_data      there is nothing, or nothing yet
    accepted     the data is sent as webhooks instead
    """

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(f"not yet: {what}")
        self.what, self.seconds = what, seconds


class TryLater(HeadraceError):
    """The database, the broker or an aggregator is away; the same work will do later."""
