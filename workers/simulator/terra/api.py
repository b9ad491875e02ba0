"""The simulated Terra API, for the same users as the simulated Junction API.

In addition to Terra's own routes there are, without a key:

    POST   /simulate/terra             an incident of an account, with the fields of Incident; its events are sent next
    GET    /simulate/payloads/...      the events to which an s3_payload links
"""

from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Literal
from uuid import uuid4

import msgspec
from flask import Blueprint, Flask, Response, g, request
from werkzeug.exceptions import HTTPException

from workers.simulator.answers import DAY, answer
from workers.simulator.budget import Budget
from workers.simulator.faults import Fault
from workers.simulator.faults import Kind as FaultKind
from workers.simulator.guards import OWN, Dialect, Route, add_routes, reason
from workers.simulator.links import Links
from workers.simulator.people import Record
from workers.simulator.terra import events
from workers.simulator.terra.answers import body_of, problem, refuse
from workers.simulator.terra.data import TerraUser, TerraWorld
from workers.simulator.terra.events import PAYLOADS, Message, described, envelope, large_request
from workers.simulator.terra.objects import KINDS, Kind
from workers.simulator.terra.users import routes_of

NAME = "terra"
DEV_ID, API_KEY = "simulated-dev", "simulated-terra-key"
PREFIX = "/v2"
MAX_DAYS_AT_ONCE, MAX_DAYS, WITHIN_SECONDS = 1825, 6000, 3600.0  # r1 and r2 (Terra: rate limits)
MAX_RESPONSE = timedelta(days=31)  # a longer window is refused with 413
MAX_EVENT = timedelta(days=31)  # a longer window is sent as webhooks in chunks
PROCESSING_SECONDS = 1.0
UNAUTHORIZED = "dev-id or x-api-key headers are missing or wrong"
ACCEPTED = "Large request submitted. The data is being processed and will be sent to your destination in chunks"
PLANNED = KINDS["planned_workout"]
# The fields of a planned workout that is read by its id; fields without a value are left out.
PLAN_SUMMARY = (
    "planned_workout_id", "planned_date", "is_external", "workout_id", "provider_workout_id", "coercion_warnings"
)  # fmt: skip

INCIDENTS = {"reauth": events.reauth, "deauth": events.deauth, "connection_error": events.connection_error}


class Incident(msgspec.Struct, forbid_unknown_fields=True):
    """An incident of an account: connected again under another id, disconnected, or access refused."""

    kind: Literal["reauth", "deauth", "connection_error"]
    user_id: str


class TerraApi:
    """The routes. Keeps each account's rate limit, and which Garmin accounts have had their first request."""

    def __init__(self, terra: TerraWorld, links: Links) -> None:
        self._terra = terra
        self._links = links
        self._budget = Budget(MAX_DAYS, WITHIN_SECONDS)
        self._requested: set[str] = set()

    @property
    def dialect(self) -> Dialect:
        keys = {"dev-id": DEV_ID, "x-api-key": API_KEY}
        return Dialect(keys, _refusal, _possible_faults, self._failed)

    def add_to(self, app: Flask) -> None:
        blueprint = Blueprint(NAME, __name__, url_prefix=PREFIX)
        routes: tuple[Route, ...] = (
            *(("GET", f"/{kind.name}", partial(self._read, kind)) for kind in KINDS.values() if kind != PLANNED),
            ("GET", "/athlete", self._athlete),
            ("GET", f"/{PLANNED.path}", self._plans),
            ("GET", f"/{PLANNED.path}/<planned_workout_id>", self._plan),
            ("GET", "/plannedWorkout", self._plans_in_envelope),
            *routes_of(self._terra, self._links),
        )
        add_routes(blueprint, routes)
        blueprint.after_request(_with_rate)
        app.register_blueprint(blueprint)
        app.add_url_rule(f"{OWN}terra", "incident", self._incident, methods=["POST"])
        app.add_url_rule(f"{PAYLOADS}/<trace_id>", "payload", self._payload)

    def _failed(self, fault: Fault) -> Response | None:
        return self._processing(self._account(), fault.seconds) if fault.kind == "processing" else None

    def _read(self, kind: Kind) -> Response:
        account = self._account()
        start = _moment("start_date") or refuse(400, "missing start_date")
        end = _moment("end_date") or self._terra.world.until
        if start > end:
            refuse(400, "start_date is after end_date")
        self._spend(account, max(1, round((end - start) / timedelta(days=1))))
        if _is_for_webhook():
            return self._send(account, kind, start, end)
        # Terra fetches a Garmin account's data on the first request, and returns it on the next.
        if account.provider.slug == "GARMIN" and account.user_id not in self._requested:
            self._requested.add(account.user_id)
            return self._processing(account, PROCESSING_SECONDS)
        if end - start > MAX_RESPONSE:
            refuse(413, "the answer would be too large: ask for less, or for webhooks")
        with_samples = request.args.get("with_samples", "false") == "true"
        objects = self._terra.objects(account, kind, start, end, with_samples=with_samples)
        return answer(envelope(self._terra, account, kind.name, objects))

    def _plans(self) -> Response:
        """Responds with a bare array, filtered by planned day, both ends included."""
        return answer(self._planned(self._account()))

    def _plans_in_envelope(self) -> Response:
        """The route and form of an earlier version of the API, which Terra's SDKs still use."""
        account = self._account()
        return answer(envelope(self._terra, account, PLANNED.name, self._planned(account)))

    def _planned(self, account: TerraUser) -> list[Record]:
        first, last = request.args.get("start_date", ""), request.args.get("end_date", "9999")
        objects = self._terra.objects(account, PLANNED, self._terra.world.start, self._terra.world.until)
        return [one for one in objects if first <= one["planned_date"] <= last]

    def _plan(self, planned_workout_id: str) -> Response:
        plans = (plan for account in self._terra.accounts() for plan in self._planned(account))
        found = next((plan for plan in plans if plan["planned_workout_id"] == planned_workout_id), None)
        plan = found or refuse(404, "planned workout not found")
        return answer({name: plan[name] for name in PLAN_SUMMARY if plan[name] is not None})

    def _athlete(self) -> Response:
        account = self._account()
        self._spend(account, 1)
        if _is_for_webhook():
            return self._accepted(account, "athlete", [events.athlete(self._terra, account)])
        user = described(self._terra, account)
        return answer({"type": "athlete", "user": user, "athlete": self._terra.athlete(account)})

    def _send(self, account: TerraUser, kind: Kind, start: datetime, end: datetime) -> Response:
        """Queues the data to be sent as webhooks."""
        objects, reference = self._terra.objects(account, kind, start, end), str(uuid4())
        if end - start > MAX_EVENT:
            chunks = list(large_request(self._terra, account, kind, objects, reference))
            return self._accepted(account, kind.name, chunks, message=ACCEPTED)
        return self._accepted(account, kind.name, [events.of_objects(self._terra, account, kind, objects, reference)])

    def _accepted(self, account: TerraUser, name: str, made: list[Message], **more: str) -> Response:
        self._terra.put(*made)
        reference = made[0].reference
        body = {"status": "success", "type": name, "reference": reference, "trace_id": reference, **more}
        return answer(body | {"user": described(self._terra, account)})

    def _processing(self, account: TerraUser, seconds: float) -> Response:
        body = {"type": "processing", "status": "success", "message": "Request is processing, try again later"}
        return answer(body | {"retry_after_seconds": seconds, "user": described(self._terra, account)})

    def _account(self) -> TerraUser:
        user_id = request.args.get("user_id") or refuse(400, "missing user_id")
        return self._terra.account(user_id) or refuse(404, "user not found")

    def _spend(self, account: TerraUser, days: int) -> None:
        """Ends the request with 429 if it asks for too many days at once (r1) or within an hour (r2)."""
        wait = 0 if days > MAX_DAYS_AT_ONCE else self._budget.spend(account.user_id, days)
        if days > MAX_DAYS_AT_ONCE or wait:
            headers = {"X-Terra-RateLimit-Rule": "r2", "Retry-After": str(wait)} if wait else {}
            response = answer({"detail": "rate limit exceeded"}, 429, {"X-Terra-RateLimit-Rule": "r1"} | headers)
            raise HTTPException(response=response)
        left = str(self._budget.left(account.user_id))
        g.rate = {"X-Terra-RateLimit-Limit": str(MAX_DAYS), "X-Terra-RateLimit-Remaining": left}

    def _incident(self) -> Response:
        incident = body_of(Incident)
        account = self._terra.account(incident.user_id) or refuse(404, "user not found")
        self._terra.put(*INCIDENTS[incident.kind](self._terra, account))
        return answer({"ok": True}, 201)

    def _payload(self, trace_id: str) -> Response:
        body = self._terra.payloads.get(trace_id)
        return Response(body, 200, mimetype="application/json") if body else answer({"detail": "expired token"}, 400)


def _possible_faults() -> set[FaultKind]:
    return {"processing"} if request.method == "GET" and not _is_for_webhook() else set()


def _with_rate(response: Response) -> Response:
    response.headers.update(g.get("rate", {}))
    return response


def _refusal(status: int) -> Response:
    return problem(status, UNAUTHORIZED if status == 401 else reason(status))


def _is_for_webhook() -> bool:
    return request.args.get("to_webhook", "true") == "true"


def _moment(name: str) -> datetime | None:
    """A parameter that is a day or ten digits of unix seconds; None if it is missing."""
    text = request.args.get(name)
    if text is None:
        return None
    if len(text) == 10 and text.isdecimal():
        return datetime.fromtimestamp(int(text), UTC)
    try:
        return datetime.fromisoformat(text if DAY.fullmatch(text) else "").replace(tzinfo=UTC)
    except ValueError:
        refuse(400, f"invalid {name}")
