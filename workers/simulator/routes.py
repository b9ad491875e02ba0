"""Tables of routes."""

from collections.abc import Callable, Iterable

from flask import Blueprint, Flask, Response

Route = tuple[str, str, Callable[..., Response]]  # method, path and view


def add_routes(app: Flask | Blueprint, routes: Iterable[Route]) -> None:
    for method, path, view in routes:
        app.add_url_rule(path, f"{method} {path}", view, methods=[method])
