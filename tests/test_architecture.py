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
WEB = "app app.webhooks app.server workers.simulator"
DATABASE = (
    "workers.store workers.apply workers.backfill workers.tasks workers.status workers.check workers.migrations "
    "workers.demo workers.proof workers.reconcile workers.commands workers.replay workers.erase workers.drill "
    "workers.stack workers.watch workers.observed workers.explain workers.completeness"
)
CELERY = (
    "app.queue app.transport workers.celery_app workers.tasks workers.broker workers.dashboard workers.consumer "
    "workers.watch"
)
MAY_IMPORT = {
    "flask": WEB,
    "werkzeug": WEB,
    "celery": CELERY,
    "kombu": f"{CELERY} workers.etl",
    "sqlalchemy": DATABASE,
    "alembic": "workers.store.engine workers.migrations",
    "psycopg": "workers.store.engine workers.store.writer workers.embedded",
    "httpx": "workers.simulator workers.http",
    "requests": "",
    "aiohttp": "",
    "svix": "workers.simulator",
    "cryptography": "app.sealing",
    "granian": "app.endpoint",
    "opentelemetry": "app.otel",
    "prometheus_client": "app.metrics",
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
    """Whether a module is one of these or in one of these packages; `app` alone is only its own `__init__`."""
    return any(name == one or (one != "app" and name.startswith(f"{one}.")) for one in allowed.split())


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
    assert readers == {"app.config"}


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
        "import json, sys, app; app.from_environment(); print(json.dumps([n.split('.')[0] for n in list(sys.modules)]))"
    )
    own = {"BROKER_URL": "redis://127.0.0.1:1/0", "TERRA_SIGNING_SECRET": "0123456789abcdef"}
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=kept | own, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert set(json.loads(done.stdout)) & NOT_IN_THE_ENDPOINT == set()
