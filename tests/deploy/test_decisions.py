"""deploy/docs/decisions and deploy/DESIGN.md: the form of the records, and that the code they name exists."""

import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from pkgutil import resolve_name

from sqlalchemy import Engine, text

from tests.deploy.support import DEPLOY, ROOT, SETTINGS
from tests.support.cases import Failures
from workers.cli.main import COMMANDS

DECISIONS = DEPLOY / "docs" / "decisions"
RECORDS = sorted(DECISIONS.glob("[0-9]*.md"))
INDEX, DESIGN = DECISIONS / "README.md", DEPLOY / "DESIGN.md"
PAGES = [DESIGN, INDEX, *RECORDS]
MAX_LINES = 60
SECTIONS = ("Context", "Decision", "Rejected", "Measured")
HEAD = re.compile(
    r"# (\d{4})\. (\S.*)\n\nDate: (\d{4}-\d\d-\d\d)\nStatus: (accepted|superseded by \d{4})\n\n## Context\n"
)
PATH = re.compile(r"(?:app|workers|tests|deploy)/[\w./-]+|[\w./-]+/[\w.-]+\.\w+")
DOTTED = re.compile(r"(?:app|workers|tests)(?:\.\w+)+")
SQL_NAME = re.compile(r"(?:headrace|health)\.(\w+)(?:\.(\w+))?")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def quoted(page: Path) -> Iterator[str]:
    """The texts in backticks of a page."""
    for found in re.findall(r"`([^`]+)`", page.read_text(encoding="utf-8")):
        yield " ".join(found.split())


def test_a_record_has_its_form() -> None:
    """Breaks if a record lacks its title, date, status or a section, or is longer than a page."""
    failures = Failures()
    for record in RECORDS:
        with failures.of(record.name):
            content = record.read_text(encoding="utf-8")
            head = HEAD.match(content)
            assert head, "the head is not: title, Date, Status, Context"
            assert record.name.startswith(f"{head[1]}-")
            assert date.fromisoformat(head[3])
            sections = re.findall(r"^## (.*)$", content, re.MULTILINE)
            assert sections == [one for one in SECTIONS if one in sections]
            assert "Decision" in sections
            assert all(part.strip() for part in re.split(r"^## .*$", content, flags=re.MULTILINE)), "an empty section"
            assert len(content.splitlines()) <= MAX_LINES
    assert failures == {}
    assert len(DESIGN.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_numbers_have_no_gaps_and_the_index_lists_every_record() -> None:
    """Breaks if two records share a number, or a record is missing from the index or has another title there."""
    assert [int(record.name[:4]) for record in RECORDS] == list(range(1, len(RECORDS) + 1))
    listed = re.findall(r"^\| (\d{4}) \| \[(.+)\]\((.+)\) \| \S.* \|$", INDEX.read_text(encoding="utf-8"), re.MULTILINE)
    titles = [record.read_text(encoding="utf-8").partition("\n")[0] for record in RECORDS]
    assert [(f"# {number}. {title}", file) for number, title, file in listed] == [
        (title, record.name) for title, record in zip(titles, RECORDS, strict=True)
    ]


def test_links_paths_names_commands_and_settings_exist() -> None:
    """Breaks if code, a command or a setting was renamed and a record was not."""
    failures = Failures()
    for page in PAGES:
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            with failures.of(page.name, link):
                assert (page.parent / link).exists()
        for name in quoted(page):
            with failures.of(page.name, name):
                if PATH.fullmatch(name) and not name.startswith("/"):
                    assert (ROOT / name).exists()
                elif DOTTED.fullmatch(name):
                    assert is_defined(name)
                elif name.startswith("headrace "):
                    assert name.split()[1] in COMMANDS
                assert set(re.findall(r"\bHEADRACE_[A-Z_]+\b", name)) <= SETTINGS
    assert failures == {}


def is_defined(name: str) -> bool:
    """Whether a dotted name is a module or an attribute of one."""
    try:
        resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_tables_and_columns_exist(engine: Engine) -> None:
    """Breaks if a table, a view or a column was renamed and a record was not."""
    query = text("""
SELECT table_name, column_name FROM information_schema.columns WHERE table_schema IN ('headrace', 'health')""")
    with engine.connect() as connection:
        columns = {(table, column) for table, column in connection.execute(query)}
    tables = {(table, "") for table, _ in columns}
    named = {found.groups("") for page in PAGES for name in quoted(page) if (found := SQL_NAME.fullmatch(name))}
    assert named
    assert named <= columns | tables
