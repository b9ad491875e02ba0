"""`headrace link`: creates the URL at which a user connects a provider."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import click

from app.config.settings import Settings, load
from app.errors import Misconfigured, NotFound, Unprocessable
from workers.aggregators import junction, terra
from workers.aggregators.junction import linking as junction_linking
from workers.aggregators.providers import KNOWN
from workers.aggregators.terra import linking as terra_linking
from workers.cli import options, output
from workers.cli.deployment import Deployment, query_options
from workers.fetch import http, retry
from workers.store import user_lookup

T = TypeVar("T")


@dataclass(frozen=True)
class LinkRequest:
    user: str
    providers: tuple[str, ...] = ()
    redirect_url: str | None = None
    demo: str | None = None


@dataclass(frozen=True)
class Linked:
    aggregator: str
    client_user_id: str
    user_id: str | None = None  # None: Terra assigns it when the user connects
    url: str | None = None  # None: the demo user is already connected
    token: str | None = None  # for your own widget: Junction's link token or Terra's session
    expires_in: int | None = None  # seconds
    demo: str | None = None


@click.command()
@click.option(
    "--user",
    required=True,
    help="your own user id (Junction's client_user_id, Terra's reference_id), or a known user_id",
)
@click.option("--aggregator", type=click.Choice(("junction", "terra")), help="default: the one whose API key is set")
@click.option("--provider", "providers", multiple=True, help="offer only this provider, repeatable")
@options.new_provider_option
@click.option("--redirect-url", help="where the user is sent afterwards")
@click.option("--demo", metavar="PROVIDER", help="connect a demo user instead (Junction's sandbox)")
@query_options
def link(*, user: str, aggregator: str | None, new_provider: bool, deployment: Deployment, **wished: Any) -> None:
    """Create the URL at which a user connects a provider.

    Nothing is stored: the connection, its history and its data arrive by webhook.
    """
    settings = load()
    wish = LinkRequest(user.strip(), **wished)
    name = aggregator or _default_aggregator(settings)
    _check(wish, name, settings)
    options.check_providers(wish.providers, KNOWN, new=new_provider)
    wish = replace(wish, user=_own_id(wish.user, deployment))
    with contextlib.closing(APIS[name](settings)) as api:
        linked = api.link(wish)
    output.show(linked, _lines(linked, api.label))


def _own_id(name: str, deployment: Deployment) -> str:
    """The client_user_id of a stored user_id or former user_id. Any other name is itself the client_user_id.

    Raises NotFound for a user_id without a client_user_id.
    """
    try:
        with deployment.transaction() as connection:
            found = user_lookup.find(connection, name)
    except Misconfigured:  # no database is configured, and no stack runs here
        return name
    own = {one.client_user_id for one in found}
    if not found or name in own:
        return name
    if len(own) > 1 or None in own:
        raise NotFound(f"{name} is a user_id without a client_user_id; use your own user id")
    return str(own.pop())


def _default_aggregator(settings: Settings) -> str:
    """Raises Misconfigured without an API key, and click.UsageError with two."""
    if not settings.readable:
        raise Misconfigured(
            "not set, and TERRA_API_KEY is not set either; copy one from your dashboard", setting="JUNCTION_API_KEY"
        )
    if len(settings.readable) > 1:
        raise click.UsageError("JUNCTION_API_KEY and TERRA_API_KEY are both set; add --aggregator junction or terra")
    return settings.readable[0]


def _check(wish: LinkRequest, aggregator: str, settings: Settings) -> None:
    if not wish.user:
        raise click.UsageError("--user is empty")
    if not wish.demo:
        return
    if aggregator != "junction":
        raise click.UsageError("--demo works with Junction only")
    if wish.providers or wish.redirect_url:
        raise click.UsageError("--demo connects immediately; it cannot be combined with --provider or --redirect-url")
    if (settings.junction_api_key or "").startswith(junction_linking.PRODUCTION):
        raise click.UsageError(
            "--demo works in Junction's sandbox only, but JUNCTION_API_KEY is a production key (pk_)"
        )


class _Api(ABC):
    """Calls an aggregator without retries, because an operator is waiting. Errors become one line."""

    label: str
    key: str  # the settings of its API key
    base_url: str  # the setting of its address

    def __init__(self, settings: Settings) -> None:
        self._url, headers = self.connect(settings)
        self._client = http.Client(self._url, headers)
        self.send, self.close = self._client.fetch, self._client.close

    @abstractmethod
    def connect(self, settings: Settings) -> tuple[str, Mapping[str, str]]: ...

    @abstractmethod
    def read_refusal(self, body: bytes) -> str: ...

    @abstractmethod
    def link(self, wish: LinkRequest) -> Linked: ...

    def read(self, response: http.HttpResponse, read: Callable[[bytes], T]) -> T:
        """The parsed body of a successful response. Raises click.ClickException."""
        if response.status not in (200, 201):
            raise click.ClickException(self._error(response))
        try:
            return read(response.body)
        except Unprocessable as reason:
            text = self.read_refusal(response.body) or str(reason)
            raise click.ClickException(f"{self.label} reports: {text}") from None

    def _error(self, response: http.HttpResponse) -> str:
        if response.status == retry.NO_ANSWER:
            return f"{self.label} cannot be reached at {self._url}; check the network and {self.base_url}"
        text = self.read_refusal(response.body)
        status = f"status {response.status}" + (f": {text}" if text else "")
        if response.status in (401, 403):
            return f"{self.label} rejects the API key ({status}); check {self.key} for {self._url}"
        if response.status in (400, 422):
            return f"{self.label} rejects the request ({status}); check that it lists the provider under this name"
        if response.status == 429 or response.status >= 500:
            seconds = retry.retry_after(response.headers.get("retry-after"), datetime.now(UTC))
            when = "later" if seconds is None else f"in {seconds:.0f} s"
            return f"{self.label} is unavailable ({status}); try again {when}"
        return f"{self.label} answers unexpectedly ({status}); check {self.base_url}, which is {self._url}"


class _Junction(_Api):
    label, key, base_url = "Junction", "JUNCTION_API_KEY", "JUNCTION_BASE_URL"

    def connect(self, settings: Settings) -> tuple[str, Mapping[str, str]]:
        return junction.connect(settings)

    def read_refusal(self, body: bytes) -> str:
        return junction_linking.read_refusal(body)

    def link(self, wish: LinkRequest) -> Linked:
        """Creates the user, or finds the existing one, then creates the link or the demo connection."""
        created = self.send(junction_linking.user_request(wish.user))
        user_id = self._existing(wish.user) if created.status == 400 else None
        user_id = user_id or self.read(created, junction_linking.read_user)
        if wish.demo:
            connected = self.send(junction_linking.demo_request(user_id, wish.demo))
            self.read(connected, junction_linking.read_demo)
            return Linked("junction", wish.user, user_id, demo=wish.demo)
        answer = self.send(junction_linking.token_request(user_id, wish.providers, wish.redirect_url))
        made = self.read(answer, junction_linking.read_token)
        return Linked("junction", wish.user, user_id, url=made.url, token=made.token, expires_in=made.expires_in)

    def _existing(self, name: str) -> str | None:
        """The existing user_id; None if the user does not exist, so that the 400 had another reason."""
        found = self.send(junction_linking.resolve_request(name))
        return None if found.status == 404 else self.read(found, junction_linking.read_user)


class _Terra(_Api):
    label, key, base_url = "Terra", "TERRA_API_KEY and TERRA_DEV_ID", "TERRA_BASE_URL"

    def connect(self, settings: Settings) -> tuple[str, Mapping[str, str]]:
        return terra.connect(settings)

    def read_refusal(self, body: bytes) -> str:
        return terra_linking.read_refusal(body)

    def link(self, wish: LinkRequest) -> Linked:
        answer = self.send(terra_linking.session_request(wish.user, wish.providers, wish.redirect_url))
        made = self.read(answer, terra_linking.read_session)
        return Linked("terra", wish.user, url=made.url, token=made.token, expires_in=made.expires_in)


APIS: Mapping[str, type[_Api]] = {"junction": _Junction, "terra": _Terra}


def _lines(linked: Linked, label: str) -> Iterator[str]:
    if linked.user_id:
        yield f"user_id   {linked.user_id}"
    if linked.url and linked.expires_in:
        yield f"open      {linked.url}"
        yield f"          within {linked.expires_in // 60} minutes, as {linked.client_user_id}\n"
    when = f"{linked.client_user_id} is connected with {linked.demo}." if linked.demo else "After that,"
    yield f"{when} {label} sends the connection and its data to your endpoint, /webhooks/{linked.aggregator}:"
    yield "    headrace status"
    yield f"    headrace backfill list{f' --user {linked.user_id}' if linked.user_id else ''}"
