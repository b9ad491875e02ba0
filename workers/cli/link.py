"""`headrace link`: where a person connects a provider, so that whoever has a key gets to data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import click

from app.config.settings import Settings, load
from app.errors import Misconfigured, Unprocessable
from workers.aggregators import junction, terra
from workers.aggregators.junction import linking as junction_linking
from workers.aggregators.requests import Request
from workers.aggregators.terra import linking as terra_linking
from workers.cli import options, output
from workers.fetch.http import Client, HttpResponse
from workers.fetch.retry import NO_ANSWER, retry_after

T = TypeVar("T")


@dataclass(frozen=True)
class Linker:
    """How an aggregator is connected, and what to look at when it refuses."""

    label: str
    key: str  # the variables that its key stands in
    base_url: str  # the variable that its address stands in
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
    """Who is to connect, with what, and where they end up."""

    user: str
    providers: tuple[str, ...] = ()
    redirect_url: str | None = None
    demo: str | None = None


@dataclass(frozen=True)
class Linked:
    """What came of it."""

    aggregator: str
    client_user_id: str
    user_id: str | None = None  # None: Terra gives one when the person has connected
    url: str | None = None  # None: connected already
    token: str | None = None  # for a widget of one's own: Junction's link token, Terra's session
    expires_in: int | None = None  # seconds
    demo: str | None = None


@click.command()
@click.option(
    "--user", required=True, help="your own id of the person: client_user_id at Junction, reference_id at Terra"
)
@click.option("--aggregator", type=click.Choice(tuple(LINKERS)), help="default: the one whose API key is set")
@click.option("--provider", "providers", multiple=True, help="offer only this provider (may be repeated)")
@click.option("--redirect-url", help="where the person comes back to")
@click.option("--demo", metavar="PROVIDER", help="connect a person who does not exist (Junction's sandbox)")
@options.json_option
def link(*, user: str, aggregator: str | None, as_json: bool, **wished: Any) -> None:
    """Get the address at which a person connects a provider.

    Nothing is stored: the connection, its history and its data come by webhook.
    """
    settings = load()
    wish = LinkRequest(user.strip(), **wished)
    name = aggregator or _with_a_key(settings)
    _check(wish, name, settings)
    asked = _Asked(LINKERS[name], settings)
    try:
        linked = MAKERS[name](asked, wish)
    finally:
        asked.close()
    if as_json:
        output.print_json(linked)
    else:
        _print_links(linked)


def _with_a_key(settings: Settings) -> str:
    """The aggregator that is meant where nobody says so. Raises Misconfigured, and click.UsageError for two."""
    if not settings.readable:
        raise Misconfigured(
            "not set, nor is TERRA_API_KEY; set one to what your dashboard shows", setting="JUNCTION_API_KEY"
        )
    if len(settings.readable) > 1:
        raise click.UsageError("JUNCTION_API_KEY and TERRA_API_KEY are both set: say --aggregator junction or terra")
    return settings.readable[0]


def _check(wish: LinkRequest, aggregator: str, settings: Settings) -> None:
    if not wish.user:
        raise click.UsageError("--user is empty")
    if not wish.demo:
        return
    if aggregator != "junction":
        raise click.UsageError("--demo: only Junction has people who do not exist")
    if wish.providers or wish.redirect_url:
        raise click.UsageError("--demo connects at once: --provider and --redirect-url have nothing to say there")
    if (settings.junction_api_key or "").startswith(junction_linking.PRODUCTION):
        raise click.UsageError("--demo works in Junction's sandbox, and JUNCTION_API_KEY is a key of production (pk_)")


class _Asked:
    """An aggregator that is asked once, for an operator who waits: what it refuses becomes one line."""

    def __init__(self, aggregator: Linker, settings: Settings) -> None:
        self._aggregator = aggregator
        self._url, headers = aggregator.connect(settings)
        self._client = Client(self._url, headers)

    def fetch(self, request: Request, read: Callable[[bytes], T]) -> T:
        """What the answer holds. Raises click.ClickException."""
        return self.read(self.answer(request), read)

    def answer(self, request: Request) -> HttpResponse:
        """The answer, whatever it is."""
        return self._client.fetch(request)

    def read(self, answer: HttpResponse, read: Callable[[bytes], T]) -> T:
        """What the answer holds. Raises click.ClickException."""
        if answer.status not in (200, 201):
            raise click.ClickException(self._why(answer))
        try:
            return read(answer.body)
        except Unprocessable as reason:
            said = self._aggregator.read_refusal(answer.body) or str(reason)
            raise click.ClickException(f"{self._aggregator.label} says: {said}") from None

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()

    def _why(self, answer: HttpResponse) -> str:
        about, status = self._aggregator, answer.status
        said = about.read_refusal(answer.body)
        told = f": {said}" if said else ""
        if status == NO_ANSWER:
            return f"{about.label} cannot be reached at {self._url}: check the network and {about.base_url}"
        if status in (401, 403):
            return f"{about.label} refuses the key (status {status}{told}): check {about.key}, for {self._url}"
        if status in (400, 422):
            return (
                f"{about.label} refuses that (status {status}{told}); a provider is named as in its list of providers"
            )
        if status == 429 or status >= 500:
            seconds = retry_after(answer.headers.get("retry-after"), datetime.now(UTC))
            when = "in a while" if seconds is None else f"in {seconds:.0f} s"
            return f"{about.label} cannot answer now (status {status}{told}): try again {when}"
        return f"{about.label} answers with status {status}{told}: check {about.base_url}, which is {self._url}"


def _at_junction(asked: _Asked, wish: LinkRequest) -> Linked:
    """A user is made or, if there is one of that name, found; then the link, or the demo connection."""
    made = asked.answer(junction_linking.user_request(wish.user))
    user_id = _existing(asked, wish.user) if made.status == 400 else None
    user_id = user_id or asked.read(made, junction_linking.read_user)
    if wish.demo:
        asked.fetch(junction_linking.demo_request(user_id, wish.demo), junction_linking.read_demo)
        return Linked("junction", wish.user, user_id, demo=wish.demo)
    request = junction_linking.token_request(user_id, wish.providers, wish.redirect_url)
    given = asked.fetch(request, junction_linking.read_token)
    return Linked("junction", wish.user, user_id, given.url, given.token, given.expires_in)


def _existing(asked: _Asked, name: str) -> str | None:
    """The user of that name; None if there is none, so that the refusal was about something else."""
    found = asked.answer(junction_linking.resolve_request(name))
    return None if found.status == 404 else asked.read(found, junction_linking.read_user)


def _at_terra(asked: _Asked, wish: LinkRequest) -> Linked:
    request = terra_linking.session_request(wish.user, wish.providers, wish.redirect_url)
    given = asked.fetch(request, terra_linking.read_session)
    return Linked("terra", wish.user, None, given.url, given.token, given.expires_in)


MAKERS: Mapping[str, Callable[[_Asked, LinkRequest], Linked]] = {"junction": _at_junction, "terra": _at_terra}


def _print_links(linked: Linked) -> None:
    """What there is, and what happens next."""
    if linked.user_id:
        click.echo(f"user_id   {linked.user_id}")
    if linked.url and linked.expires_in:
        click.echo(f"open      {linked.url}")
        click.echo(f"          within {linked.expires_in // 60} minutes, as {linked.client_user_id}\n")
    label = LINKERS[linked.aggregator].label
    when = f"{linked.client_user_id} is connected with {linked.demo}." if linked.demo else "Once that is done,"
    click.echo(f"{when} {label} sends the connection and its data to your endpoint, /webhooks/{linked.aggregator}:")
    click.echo("    headrace status")
    click.echo(f"    headrace backfill list{f' --user {linked.user_id}' if linked.user_id else ''}")
