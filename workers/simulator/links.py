"""Links at which a person connects a provider: instead of a page with buttons there are addresses to open."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from flask import Flask, Response, request

from workers.simulator.answers import answer, refuse

PATH = "/simulate/links"


@dataclass(frozen=True)
class Wish:
    """What a link is for: one of these providers, what connecting it does, and where the person ends up."""

    providers: tuple[str, ...]
    connect: Callable[[str], object]
    redirect_url: str = ""


class Links:
    """The links that were given out. Each is good once, as a real one is."""

    def __init__(self) -> None:
        self._wishes: dict[str, Wish] = {}

    def add_to(self, app: Flask) -> None:
        """Adds the route under which they are opened, which needs no key: the link is one."""
        app.add_url_rule(f"{PATH}/<token>", "link", self._open)
        app.add_url_rule(f"{PATH}/<token>/<provider>", "choose", self._open)

    def make(self, wish: Wish) -> tuple[str, str]:
        """A link's address on this server, and the token in it."""
        token = secrets.token_urlsafe(12)
        self._wishes[token] = wish
        return f"{request.host_url.rstrip('/')}{PATH}/{token}", token

    def _open(self, token: str, provider: str | None = None) -> Response:
        """Connects the one provider there is, or that was chosen; else says which may be chosen."""
        wish = self._wishes.get(token) or refuse(404, "no such link, or it was used")
        if provider is None and len(wish.providers) > 1:
            return answer({"choose": {one: f"{request.base_url}/{one}" for one in wish.providers}})
        chosen = provider or wish.providers[0]
        if chosen not in wish.providers:
            refuse(404, f"choose one of {', '.join(wish.providers)}")
        del self._wishes[token]
        wish.connect(chosen)
        response = answer({"connected": chosen}, 302 if wish.redirect_url else 200)
        if wish.redirect_url:
            response.headers["Location"] = wish.redirect_url
        return response
