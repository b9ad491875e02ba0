"""What may use what: held by reading the source, not by convention."""

import ast
import json
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(file for package in ("app", "workers") for file in (ROOT / package).rglob("*.py"))
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}
# The areas from the ground up. A module belongs to the area with the longest name that matches; each may import its own
# area and those before it.
AREAS = (
    "app",
    "app.observability",
    "app.broker",
    "app.signatures",
    "app.web",
    "workers",
    "workers.aggregators",
    "workers.broker_admin",
    "workers.store",
    "workers.migrations",
    "workers.fetch",
    "workers.ingest",
    "workers.backfill",
    "workers.reconcile",
    "workers.local",
    "workers.operate",
    "workers.celery",
    "workers.simulator",
    "workers.verify",
    "workers.cli",
)
WEB = "app.web workers.simulator"
CELERY = "app.broker workers.celery workers.broker_admin workers.operate.watch_view"
MAY_IMPORT = {
    "flask": WEB,
    "werkzeug": WEB,
    "celery": CELERY,
    "kombu": f"{CELERY} workers.ingest.rabbitmq_pipeline",
    "sqlalchemy": "workers.store workers.migrations workers.ingest workers.backfill workers.reconcile workers.operate "
    "workers.celery.context workers.verify workers.cli",
    "alembic": "workers.store.migrate workers.migrations",
    "psycopg": "workers.store.engine workers.store.writer workers.local.embedded_postgres",
    "httpx": "workers.simulator workers.fetch.http",
    "requests": "",
    "aiohttp": "",
    "svix": "workers.simulator",
    "cryptography": "app.sealing",
    "granian": "app.web.__main__",
    "opentelemetry": "app.observability.otel",
    "prometheus_client": "app.observability.metrics",
    "pickle": "",
}
NOT_IN_THE_ENDPOINT = {"sqlalchemy", "alembic", "psycopg", "httpx", "requests", "aiohttp", "opentelemetry", "workers"}


def imports(name: str) -> set[str]:
    """Everything that a module imports, wherever in it; of our own, the modules."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) | ({base} if inner - MODULES.keys() else set())
    return found


def is_within(name: str, allowed: str) -> bool:
    """Whether a module is one of these or in one of these packages."""
    return any(name == one or name.startswith(f"{one}.") for one in allowed.split())


def area_of(name: str) -> int:
    """The place of a module's area in the order."""
    return max((len(one), place) for place, one in enumerate(AREAS) if is_within(name, one))[1]


def test_no_area_imports_a_later_one() -> None:
    """Breaks if a lower area comes to need a higher one, so that neither can be understood or replaced alone."""
    upward = {
        f"{name} -> {one}" for name in MODULES for one in imports(name) & MODULES.keys() if area_of(one) > area_of(name)
    }
    assert upward == set()


def test_every_area_exists() -> None:
    """Breaks if an area of the order was renamed or removed, and its rule holds nothing any more."""
    assert {area_of(name) for name in MODULES} == set(range(len(AREAS)))


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_a_library_is_confined(library: str) -> None:
    """Breaks if a library spreads beyond the few files that hold it, so that it can no longer be replaced there."""
    users = {name for name in MODULES if any(one.split(".")[0] == library for one in imports(name))}
    assert {name for name in users if not is_within(name, MAY_IMPORT[library])} == set()


def test_app_never_imports_workers() -> None:
    """Breaks if the endpoint, through whatever module, brings the workers along."""
    app = {name for name in MODULES if name.split(".")[0] == "app"}
    assert {name for name in app if any(one.split(".")[0] == "workers" for one in imports(name))} == set()


def test_only_the_configuration_reads_the_environment() -> None:
    """Breaks if a setting is read past Settings, unchecked and unlisted."""
    names = {"environ", "environb", "getenv", "putenv"}
    readers = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "os")
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names})
    }
    assert readers == {"app.config.settings"}


def test_there_is_no_import_cycle() -> None:
    """Breaks if two modules need each other, at import or later."""
    list(TopologicalSorter({name: imports(name) & (MODULES.keys() - {name}) for name in MODULES}).static_order())


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is(name: str) -> None:
    """Breaks if a module has no docstring."""
    assert (ast.get_docstring(TREES[name]) or "").strip()


def test_the_endpoint_loads_no_database_and_no_http_client() -> None:
    """Breaks if each process of the endpoint pays for, and is exposed to, what it never uses."""
    program = (
        "import json, sys; from app.web.app import from_environment; from_environment(); "
        "print(json.dumps([n.split('.')[0] for n in list(sys.modules)]))"
    )
    own = {"BROKER_URL": "redis://127.0.0.1:1/0", "TERRA_SIGNING_SECRET": "0123456789abcdef"}
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=kept | own, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert set(json.loads(done.stdout)) & NOT_IN_THE_ENDPOINT == set()
