"""Actions: a POST shows what an action would do, and a second one with its token carries it out, once."""

from collections.abc import Callable
from typing import NamedTuple

from flask import Blueprint, abort, g, redirect, render_template, request
from werkzeug.wrappers import Response

from app.accounts import Role
from app.errors import HeadraceError
from workers.console import formats, guards, people_plans, plans
from workers.console.context import console
from workers.console.plans import Asked
from workers.console.sessions import Plan
from workers.store import backfill_admin

pages = Blueprint("actions", __name__)


class _Action(NamedTuple):
    role: Role
    build: Callable[[Asked], Plan]


PAUSE = "These backfills stop after their current page."
RESUME = "These backfills continue where they stopped."
CANCEL = "These backfills end after their current page; fetched data stays stored."
ACTIONS = {
    "dead-replay": _Action("operator", plans.dead_replay),
    "dead-drop": _Action("operator", plans.dead_drop),
    "backfill-pause": _Action("operator", plans.change_backfills("pause", backfill_admin.pause, PAUSE)),
    "backfill-resume": _Action("operator", plans.change_backfills("resume", backfill_admin.resume, RESUME)),
    "backfill-cancel": _Action("operator", plans.change_backfills("cancel", backfill_admin.cancel, CANCEL)),
    "backfill-start": _Action("operator", plans.start_backfills),
    "subscription-pause": _Action("operator", plans.change_subscription("pause")),
    "subscription-resume": _Action("operator", plans.change_subscription("resume")),
    "subscription-resend": _Action("operator", plans.resend),
    "reconcile": _Action("operator", people_plans.reconcile),
    "refresh": _Action("operator", people_plans.refresh),
    "erase": _Action("privacy", people_plans.erase),
}


@pages.post("/actions/<name>")
def propose(name: str) -> str:
    """The dry run of an action."""
    if (action := ACTIONS.get(name)) is None:
        abort(404, "There is no such action.")
    guards.require(action.role)
    form = request.form
    numbers = tuple(formats.number("id", value) for value in dict.fromkeys(form.getlist("id")))
    fields = {key: value.strip() for key, value in form.items() if key not in {"id", "resource", "csrf"}}
    return _confirmation(action.build(Asked(console(), name, numbers, fields, tuple(form.getlist("resource")))))


def _confirmation(plan: Plan, failed: str = "") -> str:
    token = g.session.propose(plan, console().sessions.clock())
    return render_template("confirm.html", plan=plan, token=token, failed=failed)


@pages.post("/confirm")
def confirm() -> str | Response:
    """Carries out a plan. A second click finds no plan, so nothing is done twice."""
    plan = g.session.confirm(request.form.get("plan", ""), console().sessions.clock())
    if plan is None:
        abort(409, "This action was already confirmed, or its page is older than ten minutes.")
    guards.require(plan.role)
    if plan.typed and formats.field("typed") != plan.typed:
        return _confirmation(plan, "The text does not match. Nothing was done.")
    try:
        g.session.messages.append(("done", plan.run()))
    except HeadraceError as error:
        g.session.messages.append(("failed", str(error)))
    return redirect(plan.back, 303)
