"""Errors and request bodies of the simulated Terra API."""

from http import HTTPStatus
from typing import Any, Never

import msgspec
from flask import Response, request
from werkzeug.exceptions import HTTPException

from workers.simulator.people import Record

# Python 3.13 has another phrase for this status (RFC 9110).
TITLES = {413: "request entity too large"}


def refuse(status: int, detail: str) -> Never:
    """Ends the request with an error in Terra's form."""
    raise HTTPException(response=problem(status, detail))


def problem(status: int, detail: str) -> Response:
    """An error response (RFC 9457)."""
    title = TITLES.get(status) or HTTPStatus(status).phrase.lower()
    path = request.full_path.removesuffix("?")
    body: Record = {"type": "about:blank", "title": title, "instance": path, "detail": detail}
    return Response(msgspec.json.encode(body), status, mimetype="application/problem+json")


def body_of(kind: Any) -> Any:
    """The body of the request; ends it with 400 if it has another form."""
    try:
        return msgspec.json.decode(request.get_data(), type=kind)
    except msgspec.DecodeError as error:
        refuse(400, str(error))
