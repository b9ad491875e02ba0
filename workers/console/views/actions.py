"""Actions: a POST shows what an action would do, and a second one with its token carries it out, once."""

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from flask import Blueprint, abort, g, redirect, render_template, request
from werkzeug.wrappers import Response

from app.accounts import Role
from app.errors import HeadraceError
from workers.console import formats, guards, plans
from workers.console.context import console
from workers.console.plans import Asked
from workers.console.sessions import Plan

pages = Blueprint("actions", __name__)


class _Action(NamedTuple):
    build: Callable[[Asked], Plan]
    role: Role = "operator"


ACTIONS = {
    "dead-replay": _Action(plans.dead_replay),
    "dead-drop": _Action(plans.dead_drop),
    **{f"backfill-{verb}": _Action(plans.change_backfills) for verb in plans.BACKFILL_CHANGES},
    "backfill-start": _Action(plans.start_backfills),
    **{f"subscription-{verb}": _Action(plans.change_subscription) for verb in plans.SUBSCRIPTION_CHANGES},
    "subscription-resend": _Action(plans.resend_notifications),
    "reconcile": _Action(plans.reconcile),
    "refresh": _Action(plans.refresh),
    "erase": _Action(plans.erase, "privacy"),
}


@pages.post("/actions/<name>")
def propose(name: str) -> str:
    """The dry run of an action. Its role is checked here only: the plan is kept in the session of this account."""
    if (action := ACTIONS.get(name)) is None:
        abort(404, "There is no such action.")
    guards.require(action.role)
    form = request.form
    numbers = tuple(formats.number("id", value) for value in dict.fromkeys(form.getlist("id")))
    fields = defaultdict(str, {key: value.strip() for key, value in form.items()})
    return _confirmation(action.build(Asked(name, numbers, fields, tuple(form.getlist("resource")))))


def _confirmation(plan: Plan, failed: str = "") -> str:
    token = g.session.propose(plan, console().sessions.clock())
    return render_template("confirm.html", plan=plan, token=token, failed=failed)


@pages.post("/confirm")
def confirm() -> str | Response:
    """Carries out a plan. A second click finds no plan, so nothing is done twice."""
    plan = g.session.confirm(request.form.get("plan", ""), console().sessions.clock())
    if plan is None:
        abort(409, "This action was already confirmed, or its page is older than ten minutes.")
    if plan.typed and request.form.get("typed", "").strip() != plan.typed:
        return _confirmation(plan, "The text does not match. Nothing was done.")
    try:
        g.session.messages.append(("done", plan.run()))
    except HeadraceError as error:
        g.session.messages.append(("failed", str(error)))
    return redirect(plan.back, 303)
