"""Terra's simulated Admin API: the deliveries of the simulated sender, the users, and the token.

Tests can change the token's scopes and times, and the path segment of the deliveries, which are attributes of
`AdminApi`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Never
from uuid import NAMESPACE_URL, uuid5

import msgspec
from flask import Blueprint, Flask, Response, request
from werkzeug.exceptions import HTTPException

from workers.simulator.answers import answer
from workers.simulator.guards import Dialect
from workers.simulator.people import Record
from workers.simulator.terra.api import DEV_ID
from workers.simulator.terra.data import TerraUser, TerraWorld
from workers.simulator.terra.events import Message

NAME = "terra-admin"
PREFIX = "/v3/admin"
TOKEN = "terra_at_simulated"  # noqa: S105 - the token that the simulator accepts
SCOPES = ("events:read", "connections:read")
MAX_PAGE = 100
RETENTION = timedelta(days=14)
CODES = {400: "validation_failed", 401: "unauthorized", 404: "not_found", 429: "rate_limited"}
CODES |= {500: "internal_error", 503: "service_unavailable"}


@dataclass(frozen=True)
class Delivery:
    """A delivery after its last attempt."""

    user: Mapping[str, Any]
    row: Record

    @property
    def is_delivered(self) -> bool:
        return 200 <= int(self.row.get("http_status", 0)) < 300


class AdminApi:
    """The routes, and the recorded deliveries."""

    def __init__(self, terra: TerraWorld) -> None:
        self._terra = terra
        self._deliveries: list[Delivery] = []
        self.segment = "events"  # webhook-events: the path of September 2026
        self.scopes = set(SCOPES)
        self.expires_at: datetime | None = datetime.now(UTC) + timedelta(days=30)
        self.approved_at = datetime.now(UTC)

    @property
    def dialect(self) -> Dialect:
        return Dialect({"Authorization": f"Bearer {TOKEN}"}, _problem, set)

    def add_to(self, app: Flask) -> None:
        routes = Blueprint(NAME, __name__, url_prefix=PREFIX)
        routes.add_url_rule("/me", "me", self._me)
        environment = "/environments/<dev_id>"
        routes.add_url_rule(f"{environment}/users", "users", self._users)
        for segment in ("events", "webhook-events"):
            routes.add_url_rule(f"{environment}/{segment}", segment, partial(self._events, segment))
        app.register_blueprint(routes)

    def record(self, message: Message, status: int) -> None:
        """Records a delivery and the status of its last attempt, 0 without an answer."""
        event = message.event
        if event["type"] == "s3_payload":
            event = msgspec.json.decode(self._terra.payloads[message.trace_id])
        user = event.get("user") or event.get("new_user") or {}
        row = {
            "event_id": str(uuid5(NAMESPACE_URL, message.trace_id)),
            "sent_at": datetime.fromtimestamp(message.ordering_ms / 1000, UTC).isoformat(timespec="milliseconds"),
            "data_type": event["type"],
            "provider": user.get("provider", "").lower(),
            "destination_type": "webhook",
            "response_time_ms": 10,
            "bytes": len(msgspec.json.encode(message.event)),
            "connection_id": str(uuid5(NAMESPACE_URL, user.get("user_id", "")).int % 2**63),
        }
        self._deliveries.append(Delivery(user, row | ({"http_status": status} if status else {})))

    def _me(self) -> Response:
        about = {"token_id": str(uuid5(NAMESPACE_URL, TOKEN)), "kind": "admin", "customer_id": "simulated"}
        times = {"expires_at": _text(self.expires_at), "grant_anchor_at": _text(self.approved_at), "last_used_at": None}
        rest = {"dev_ids": None, "name": "headrace", "created_via": "dashboard", "user": None, "staff": False}
        return answer(about | times | rest | {"scopes": sorted(self.scopes)})

    def _events(self, segment: str, dev_id: str) -> Response:
        self._check(dev_id, "events:read")
        if segment != self.segment:
            refuse(404, "no such route")
        user_id, reference_id = request.args.get("user_id"), request.args.get("reference_id")
        known = {account.user_id for account in self._terra.accounts()}
        known |= {one.user.get("user_id", "") for one in self._deliveries}
        if user_id and user_id not in known:
            refuse(404, "user not found")
        oldest = datetime.now(UTC) - RETENTION
        since, until = _moment("since") or oldest, _moment("until") or datetime.max.replace(tzinfo=UTC)
        outcome = {"delivered": True, "failed": False, None: None}[request.args.get("outcome")]
        found = [
            one.row
            for one in self._deliveries
            if max(since, oldest) <= datetime.fromisoformat(one.row["sent_at"]) <= until
            and outcome in (None, one.is_delivered)
            and all(
                request.args.get(name, one.row[name]).lower() == one.row[name] for name in ("provider", "data_type")
            )
            and user_id in (None, one.user.get("user_id"))
            and reference_id in (None, one.user.get("reference_id"))
        ]
        rows = sorted(found, key=lambda row: (row["sent_at"], row["event_id"]), reverse=True)
        if segment == "events":  # the newer name
            rows = [{"created_at" if name == "sent_at" else name: row[name] for name in row} for row in rows]
        return _page(rows, "event_id")

    def _users(self, dev_id: str) -> Response:
        self._check(dev_id, "connections:read")
        user_id = request.args.get("user_id")
        accounts = [one for one in self._terra.accounts() if user_id in (None, one.user_id)]
        return _page([self._user(one) for one in accounts], "user_id")

    def _user(self, account: TerraUser) -> Record:
        return {
            "user_id": account.user_id,
            "reference_id": account.person.client_user_id,
            "provider": account.provider.slug.lower(),
            "active": True,
            "created_at": _text(account.since),
            "last_updated_at": _text(self._terra.world.until),
            "most_recent_data_at": _text(self._terra.newest(account)),
        }

    def _check(self, dev_id: str, scope: str) -> None:
        if dev_id != DEV_ID:
            refuse(404, "unknown or not owned", "dev_id_not_found")
        if scope not in self.scopes:
            refuse(403, f"the token lacks the scope {scope}", "scope_missing")


def refuse(status: int, detail: str, code: str = "") -> Never:
    """Ends the request with an error in the form of the Admin API."""
    raise HTTPException(response=_problem(status, detail, code))


def _problem(status: int, detail: str = "simulated", code: str = "") -> Response:
    code = code or CODES.get(status, "internal_error")
    title, instance = code.replace("_", " "), request.path
    body = {"type": "about:blank", "title": title, "instance": instance, "code": code, "detail": detail}
    return Response(msgspec.json.encode(body), status, mimetype="application/problem+json")


def _page(rows: list[Record], key: str) -> Response:
    """A page of rows. A cursor is the key of the last row before it: new rows do not move it."""
    after, size = request.args.get("cursor"), min(int(request.args.get("limit", MAX_PAGE)), MAX_PAGE)
    begin = next((n + 1 for n, row in enumerate(rows) if row[key] == after), 0) if after else 0
    some = rows[begin : begin + size]
    more = begin + size < len(rows)
    return answer({"data": some, "has_more": more, "next_cursor": some[-1][key] if more else None})


def _moment(name: str) -> datetime | None:
    text = request.args.get(name)
    try:
        return datetime.fromisoformat(text) if text else None
    except ValueError:
        refuse(400, f"{name}: not a date-time")


def _text(at: datetime | None) -> str | None:
    return at.isoformat() if at else None
