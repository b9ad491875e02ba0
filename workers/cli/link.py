"""`headrace link`: creates the URL at which a user connects a provider."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from app.config.settings import Settings, load
from app.errors import Misconfigured, NotFound, Unprocessable
from workers.aggregators import junction, terra
from workers.aggregators.junction import linking as junction_linking
from workers.aggregators.providers import KNOWN
from workers.aggregators.requests import Request
from workers.aggregators.terra import linking as terra_linking
from workers.cli import options, output
from workers.fetch.http import Client, HttpResponse
from workers.fetch.retry import NO_ANSWER, retry_after

T = TypeVar("T")


@dataclass(frozen=True)
class Linker:
    """How to call an aggregator, and which settings to check when it rejects a request."""

    label: str
    key: str  # the settings of its API key
    base_url: str  # the setting of its address
    connect: Callable[[Settings], tuple[str, Mapping[str, str]]]
    read_refusal: Callable[[bytes], str]


LINKERS: Mapping[str, Linker] = {
    "junction": Linker(
        "Junction", "JUNCTION_API_KEY", "JUNCTION_BASE_URL", junction.connect, junction_linking.read_refusal
    ),
    "terra": Linker(
        "Terra", "TERRA_API_KEY and TERRA_DEV_ID", "TERRA_BASE_URL", terra.connect, terra_linking.read_refusal
    ),
}


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
@click.option("--aggregator", type=click.Choice(tuple(LINKERS)), help="default: the one whose API key is set")
@click.option("--provider", "providers", multiple=True, help="offer only this provider, repeatable")
@options.new_provider_option
@click.option("--redirect-url", help="where the user is sent afterwards")
@click.option("--demo", metavar="PROVIDER", help="connect a demo user instead (Junction's sandbox)")
@options.data_dir_option
@options.json_option
def link(
    *, user: str, aggregator: str | None, new_provider: bool, data_dir: Path | None, as_json: bool, **wished: Any
) -> None:
    """Create the URL at which a user connects a provider.

    Nothing is stored: the connection, its history and its data arrive by webhook.
    """
    settings = load()
    wish = LinkRequest(user.strip(), **wished)
    name = aggregator or _default_aggregator(settings)
    _check(wish, name, settings)
    options.check_providers(wish.providers, KNOWN, new=new_provider)
    wish = replace(wish, user=_own_id(wish.user, data_dir))
    with contextlib.closing(_Api(LINKERS[name], settings)) as api:
        linked = MAKERS[name](api, wish)
    if as_json:
        output.print_json(linked)
    else:
        _print_links(linked)


def _own_id(name: str, data_dir: Path | None) -> str:
    """The client_user_id of a stored user_id or former user_id. Any other name is itself the client_user_id.

    Raises NotFound for a user_id without a client_user_id.
    """
    try:
        settings = options.attached(data_dir, broker=False)
    except Misconfigured:  # no database is configured, and no stack runs here
        return name
    from workers.cli.users import matching_users  # noqa: PLC0415 - only with a database: SQLAlchemy costs 0.4 s of CPU

    found = matching_users(settings, name)
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


class _Api:
    """Calls an aggregator without retries, because an operator is waiting. Errors become one line."""

    def __init__(self, aggregator: Linker, settings: Settings) -> None:
        self._aggregator = aggregator
        self._url, headers = aggregator.connect(settings)
        self._client = Client(self._url, headers)

    def fetch(self, request: Request, read: Callable[[bytes], T]) -> T:
        """The parsed body of a successful response. Raises click.ClickException."""
        return self.read(self.send(request), read)

    def send(self, request: Request) -> HttpResponse:
        return self._client.fetch(request)

    def read(self, response: HttpResponse, read: Callable[[bytes], T]) -> T:
        """The parsed body of a successful response. Raises click.ClickException."""
        if response.status not in (200, 201):
            raise click.ClickException(self._error(response))
        try:
            return read(response.body)
        except Unprocessable as reason:
            text = self._aggregator.read_refusal(response.body) or str(reason)
            raise click.ClickException(f"{self._aggregator.label} reports: {text}") from None

    def close(self) -> None:
        self._client.close()

    def _error(self, response: HttpResponse) -> str:
        label, base_url = self._aggregator.label, self._aggregator.base_url
        if response.status == NO_ANSWER:
            return f"{label} cannot be reached at {self._url}; check the network and {base_url}"
        text = self._aggregator.read_refusal(response.body)
        status = f"status {response.status}" + (f": {text}" if text else "")
        if response.status in (401, 403):
            return f"{label} rejects the API key ({status}); check {self._aggregator.key} for {self._url}"
        if response.status in (400, 422):
            return f"{label} rejects the request ({status}); check that it lists the provider under this name"
        if response.status == 429 or response.status >= 500:
            seconds = retry_after(response.headers.get("retry-after"), datetime.now(UTC))
            when = "later" if seconds is None else f"in {seconds:.0f} s"
            return f"{label} is unavailable ({status}); try again {when}"
        return f"{label} answers unexpectedly ({status}); check {base_url}, which is {self._url}"


def _at_junction(api: _Api, wish: LinkRequest) -> Linked:
    """Creates the user, or finds the existing one, then creates the link or the demo connection."""
    created = api.send(junction_linking.user_request(wish.user))
    user_id = _existing(api, wish.user) if created.status == 400 else None
    user_id = user_id or api.read(created, junction_linking.read_user)
    if wish.demo:
        api.fetch(junction_linking.demo_request(user_id, wish.demo), junction_linking.read_demo)
        return Linked("junction", wish.user, user_id, demo=wish.demo)
    request = junction_linking.token_request(user_id, wish.providers, wish.redirect_url)
    made = api.fetch(request, junction_linking.read_token)
    return Linked("junction", wish.user, user_id, url=made.url, token=made.token, expires_in=made.expires_in)


def _existing(api: _Api, name: str) -> str | None:
    """The existing user_id; None if the user does not exist, so that the 400 had another reason."""
    found = api.send(junction_linking.resolve_request(name))
    return None if found.status == 404 else api.read(found, junction_linking.read_user)


def _at_terra(api: _Api, wish: LinkRequest) -> Linked:
    request = terra_linking.session_request(wish.user, wish.providers, wish.redirect_url)
    made = api.fetch(request, terra_linking.read_session)
    return Linked("terra", wish.user, url=made.url, token=made.token, expires_in=made.expires_in)


MAKERS: Mapping[str, Callable[[_Api, LinkRequest], Linked]] = {"junction": _at_junction, "terra": _at_terra}


def _print_links(linked: Linked) -> None:
    if linked.user_id:
        click.echo(f"user_id   {linked.user_id}")
    if linked.url and linked.expires_in:
        click.echo(f"open      {linked.url}")
        click.echo(f"          within {linked.expires_in // 60} minutes, as {linked.client_user_id}\n")
    label = LINKERS[linked.aggregator].label
    when = f"{linked.client_user_id} is connected with {linked.demo}." if linked.demo else "After that,"
    click.echo(f"{when} {label} sends the connection and its data to your endpoint, /webhooks/{linked.aggregator}:")
    click.echo("    headrace status")
    click.echo(f"    headrace backfill list{f' --user {linked.user_id}' if linked.user_id else ''}")
