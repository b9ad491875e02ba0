"""Links with which a user connects a provider: opening the URL replaces a page with buttons."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from flask import Flask, Response, request

from workers.simulator.answers import answer, refuse

PATH = "/simulate/links"


@dataclass(frozen=True)
class Link:
    """A link for one of these providers: the function that connects it, and where the browser is sent afterwards."""

    providers: tuple[str, ...]
    connect: Callable[[str], object]
    redirect_url: str = ""


class Links:
    """The links that were issued. Each works once, as a real one does."""

    def __init__(self) -> None:
        self._links: dict[str, Link] = {}

    def add_to(self, app: Flask) -> None:
        """Adds the routes that open links. They need no key: the token is the key."""
        app.add_url_rule(f"{PATH}/<token>", "link", self._open)
        app.add_url_rule(f"{PATH}/<token>/<provider>", "choose", self._open)

    def make(self, link: Link) -> tuple[str, str]:
        """Issues a link: its URL on this server, and its token."""
        token = secrets.token_urlsafe(12)
        self._links[token] = link
        return f"{request.host_url.rstrip('/')}{PATH}/{token}", token

    def url_of(self, token: str, provider: str) -> str | None:
        """The URL that connects this provider; None if no open link has the token, or the link is for others."""
        link = self._links.get(token)
        if link is None or provider not in link.providers:
            return None
        return f"{request.host_url.rstrip('/')}{PATH}/{token}/{provider}"

    def _open(self, token: str, provider: str | None = None) -> Response:
        """Connects the chosen provider, or the only one; otherwise lists the choices."""
        link = self._links.get(token) or refuse(404, "no such link, or it was used")
        if provider is None and len(link.providers) > 1:
            return answer({"choose": {one: f"{request.base_url}/{one}" for one in link.providers}})
        chosen = provider or link.providers[0]
        if chosen not in link.providers:
            refuse(404, f"choose one of {', '.join(link.providers)}")
        del self._links[token]
        link.connect(chosen)
        target = {"Location": link.redirect_url} if link.redirect_url else None
        return answer({"connected": chosen}, 302 if target else 200, target)
