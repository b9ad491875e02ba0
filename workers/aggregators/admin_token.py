"""The state of the token of Terra's Admin API. A module of its own, which `headrace status` imports."""

from datetime import datetime, timedelta

import msgspec

GRANT = timedelta(days=90)  # after this time a person has to approve a new token


class TokenFault(msgspec.Struct, frozen=True):
    """The error of the last reconciliation with this token."""

    fault: str = ""  # '': none
    do: str = ""  # the operator's action
    checked_at: datetime | None = None
    key: str = ""  # an id of the token, which does not reveal it


class Token(TokenFault, frozen=True):
    """The state of the token, as the last reconciliation stored it for `headrace status`."""

    expires_at: datetime | None = None  # None: never, or unknown
    approved_at: datetime | None = None  # `grant_anchor_at`: when a person last approved it

    @property
    def approve_by(self) -> datetime | None:
        """Until then the token can be rotated; after that, a person has to approve a new one."""
        return self.approved_at + GRANT if self.approved_at else None
