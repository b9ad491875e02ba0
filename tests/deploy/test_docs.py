"""README.md, deploy/docs and .github: their links, commands, settings, paths and queries are valid."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from sqlalchemy import Engine, text

from app.config.settings import Settings
from tests.deploy.support import DEPLOY, ROOT, SETTINGS, documents, parse
from tests.support.cases import Failures
from workers.cli.main import COMMANDS
from workers.store.roles import WRITER_LOGIN

DOCS = DEPLOY / "docs"
GITHUB = ROOT / ".github"
README = ROOT / "README.md"
PAGES = sorted(DOCS.glob("*.md"))
# Decision records may name former files and commands; only their links are checked.
CURRENT = [README, DEPLOY / "RUNBOOK.md", *PAGES, *sorted(GITHUB.rglob("*.md"))]
LINKED = sorted({*CURRENT, *DEPLOY.glob("*.md"), *DOCS.rglob("*.md")})
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$|((?:^ {4,}[^\n]*\n)+)", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:\w+=\S+ )*(?:\S*/)?headrace (.+)")
PATH = re.compile(r"(?:app|workers|tests|deploy|\.github)/[\w./@-]*\w")
OF_THE_OPERATOR = {"deploy/.env"}  # the operator copies it from deploy/env.example


def prose(file: Path) -> str:
    """A page without its code blocks."""
    return BLOCK.sub("\n", file.read_text(encoding="utf-8"))


def code(file: Path) -> Iterator[str]:
    """The lines of a page's code blocks."""
    for block in BLOCK.finditer(file.read_text(encoding="utf-8")):
        yield from map(str.strip, (block[2] or block[3]).splitlines())


def spans(file: Path) -> list[str]:
    """A page's text in backticks."""
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose(file))]


def anchors(file: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(file), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def arguments(line: str) -> list[str]:
    """The arguments of a `headrace` command up to a pipe, without placeholders; empty if it is another command."""
    if not (found := COMMAND.fullmatch(line)):
        return []
    words = shlex.split(found[1], comments=True)
    end = next((n for n, word in enumerate(words) if word in ("|", "||", "&&")), len(words))
    return [word for word in words[:end] if word != "..."]


def usage_error(words: list[str], *, is_prose: bool) -> str:
    """The error of a command line, empty if there is none. Prose may name a command without its arguments."""
    try:
        parse(words)
    except (click.MissingParameter, click.exceptions.NoArgsIsHelpError) as error:
        return "" if is_prose else error.format_message()
    except click.UsageError as error:
        return error.format_message()
    return ""


def default(value: Any) -> str:
    """A default as documented."""
    if value is None or isinstance(value, tuple):
        return ",".join(value or ())
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_the_readme_is_short() -> None:
    """Breaks if text is added to README.md that belongs in deploy/docs."""
    words = README.read_text(encoding="utf-8")
    assert (words.count("\n") <= 150, len(words.split()) <= 1200) == (True, True)


def test_every_link_has_a_target() -> None:
    """Breaks if a file or heading was renamed and a link to it was not."""
    failures = Failures()
    for file in LINKED:
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(file))):
            if re.match(r"https?:", link):
                continue
            with failures.of(file.name, link):
                path, _, anchor = link.partition("#")
                target = (file.parent / path).resolve() if path else file
                assert target.is_relative_to(ROOT)
                assert target.exists()
                assert not anchor or anchor in anchors(target)
                assert file not in PAGES or target.is_relative_to(DOCS)  # MkDocs only sees deploy/docs
    assert failures == {}


def test_every_command_exists() -> None:
    """Breaks if a page shows a command or an option that does not exist."""
    failures, count = Failures(), 0
    for file in CURRENT:
        typed = [(line, arguments(line)) for line in code(file)]
        named = [(span, arguments(span)) for span in spans(file)]
        for line, words in filter(lambda one: one[1], [*typed, *named]):
            count += 1
            with failures.of(file.name, line):
                assert usage_error(words, is_prose=(line, words) in named) == ""
    assert failures == {}
    assert count > 100


def test_every_command_is_documented() -> None:
    """Breaks if a command is added that neither commands.md nor install.md names."""
    pages = prose(DOCS / "commands.md") + prose(DOCS / "install.md")
    assert {name for name in COMMANDS if f"`headrace {name}" not in pages} == set()


def test_every_setting_exists() -> None:
    """Breaks if a setting was renamed and a page was not."""
    for file in CURRENT:
        named = re.findall(r"\b(?:HEADRACE|JUNCTION|TERRA)_[A-Z_]+\b", file.read_text(encoding="utf-8"))
        assert (file.name, set(named) - SETTINGS) == (file.name, set())


def test_every_setting_is_documented_with_its_default() -> None:
    """Breaks if a setting is added or a default is changed without deploy/docs/configuration.md."""
    row = re.compile(r"^\| `([A-Z_]+)` \| (?:`(.*?)` )?\|", re.MULTILINE)
    documented = dict(row.findall((DOCS / "configuration.md").read_text(encoding="utf-8")))
    assert documented == {one.metadata["name"]: default(one.default) for one in fields(Settings)}


def test_every_path_exists() -> None:
    """Breaks if a file was moved and a page still names its old path."""
    for file in CURRENT:
        lines = [line for line in (*spans(file), *code(file)) if not line.startswith("kubectl") or " -k " in line]
        words = {word.removeprefix("./") for line in lines for word in line.split()}
        missing = {word for word in words if PATH.fullmatch(word) and not (ROOT / word).exists()}
        assert (file.name, missing - OF_THE_OPERATOR) == (file.name, set())


@pytest.mark.parametrize(
    "file", [file for file in CURRENT if "```sql" in file.read_text(encoding="utf-8")], ids=lambda file: file.name
)
def test_every_query_runs(engine: Engine, file: Path) -> None:
    """Breaks if a query of a page names a view, column, partition or PostgreSQL setting that does not exist."""
    queries = [block[2] for block in BLOCK.finditer(file.read_text(encoding="utf-8")) if block[1] == "sql"]
    with engine.connect() as connection:
        connection.execute(text(f"CREATE ROLE {WRITER_LOGIN}"))
        for statement in filter(str.strip, ";".join(queries).split(";")):
            connection.execute(text(statement))
        connection.rollback()


def test_every_quoted_reason_exists() -> None:
    """Breaks if the text of a dead letter's reason was changed, so that `--reason` selects none."""
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "app").rglob("*.py"))
    with pytest.raises(msgspec.DecodeError) as malformed:
        msgspec.json.decode(b"{]")
    for file in CURRENT:
        for reason in re.findall(r"--reason '([^']+)'", file.read_text(encoding="utf-8")):
            assert reason in sources + str(malformed.value)


def test_every_test_of_the_threat_model_exists() -> None:
    """Breaks if a promise of SECURITY.md names a test that was renamed or removed."""
    named = [span for span in spans(GITHUB / "SECURITY.md") if span.startswith("tests/")]
    assert len(named) > 20
    failures = Failures()
    for span in named:
        with failures.of(span):
            file, _, function = span.partition("::")
            assert not function or f"def {function}(" in (ROOT / file).read_text(encoding="utf-8")
    assert failures == {}


def test_the_site_has_every_page() -> None:
    """Breaks if a page is missing in the navigation of mkdocs.yml."""
    (site,) = documents(DEPLOY / "mkdocs.yml")
    assert {DEPLOY / site["docs_dir"] / page for page in site["nav"]} == {*PAGES, DOCS / "decisions" / "README.md"}


def test_old_links_to_the_runbook_still_work() -> None:
    """Breaks if deploy/RUNBOOK.md, where the text was until 0.1, lacks a heading of the runbook."""
    sections = re.findall(r"^## (.+)$", prose(DOCS / "runbook.md"), re.MULTILINE)
    assert re.findall(r"^## (.+)$", prose(DEPLOY / "RUNBOOK.md"), re.MULTILINE) == sections


def test_the_forms_and_the_workflow_are_valid() -> None:
    """Breaks if GitHub would reject a file, a form does not warn against real data, or CI runs another command."""
    forms = [GITHUB / "ISSUE_TEMPLATE" / name for name in ("bug.yml", "question.yml")]
    workflow = GITHUB / "workflows" / "test.yml"
    for schema, files in (
        ("github-issue-forms", forms),
        ("github-issue-config", [GITHUB / "ISSUE_TEMPLATE" / "config.yml"]),
        ("github-workflows", [workflow]),
    ):
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, files)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout
    for form in forms:
        assert "Never paste real payloads" in form.read_text(encoding="utf-8")
    (jobs,) = (document["jobs"] for document in documents(workflow))
    steps = jobs["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["./deploy/test"]
    assert all(re.fullmatch(r"[\w/-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
