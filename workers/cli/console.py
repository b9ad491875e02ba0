"""`headrace console`: the console's server, and the lines of its accounts."""

import sys
from typing import get_args

import click

from app.accounts import MAX_PASSWORD, MIN_PASSWORD, NAME, Account, Role, hash_password
from app.commands import become, own
from app.config.settings import load
from workers.cli import options
from workers.local.secrets import WITHHELD


@click.group("console", cls=options.Group, invoke_without_command=True)
@click.option("--web", help="URL of the endpoint's operations port, e.g. http://web:8001, to show its state too")
@click.pass_context
def console(context: click.Context, web: str | None) -> None:
    """Run the console, a web page for operators. Its accounts are in HEADRACE_CONSOLE_USERS."""
    if context.invoked_subcommand:
        return
    settings = load()
    settings.need_database()
    settings.need_broker()
    settings.need_console_users()
    become(own("workers.console", *([web] if web else [])), {}, without=WITHHELD["console"])


@console.command()
@click.argument("name")
@click.option(
    "--role",
    required=True,
    type=click.Choice(get_args(Role)),
    help="viewer sees states, counts and ids; operator may also act; privacy may also see values and erase users",
)
def passwd(*, name: str, role: Role) -> None:
    """Ask for a password, and print an account for HEADRACE_CONSOLE_USERS.

    Without a terminal, the password is read from standard input.
    """
    if not NAME.fullmatch(name):
        raise click.BadParameter(f"{name!r} is not a name: use letters, digits, and . _ @ - (63)")
    if sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if len(password) < MIN_PASSWORD or len(password.encode()) > MAX_PASSWORD:
        raise click.ClickException(f"the password must have {MIN_PASSWORD} or more characters")
    click.echo(Account(name, hash_password(password), role).line)
