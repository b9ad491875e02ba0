"""Import rules between modules, areas and libraries, checked on the source."""

import ast
import json
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted(file for package in ("app", "workers") for file in (ROOT / package).rglob("*.py"))
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}
# The areas from the lowest to the highest. A module belongs to the area with the longest matching name, and may import
# its own area and lower ones.
AREAS = (
    "app",
    "app.observability",
    "app.broker",
    "app.signatures",
    "app.web",
    "workers",
    "workers.aggregators",
    "workers.rabbitmq_admin",
    "workers.broker_admin",
    "workers.store",
    "workers.migrations",
    "workers.daily",
    "workers.fetch",
    "workers.notify",
    "workers.ingest",
    "workers.backfill",
    "workers.reconcile",
    "workers.local",
    "workers.operate",
    "workers.console",
    "workers.celery",
    "workers.simulator",
    "workers.verify",
    "workers.cli",
)
WEB = "app.web workers.console workers.simulator"
CELERY = "app.broker workers.celery workers.rabbitmq_admin"
MAY_IMPORT = {
    "flask": WEB,
    "werkzeug": WEB,
    "celery": CELERY,
    "kombu": f"{CELERY} workers.ingest.rabbitmq_pipeline",
    "sqlalchemy": "workers.store workers.migrations workers.daily workers.notify workers.ingest workers.backfill "
    "workers.reconcile workers.operate workers.console workers.celery.context workers.verify workers.cli",
    "alembic": "workers.store.migrate workers.migrations",
    "psycopg": "workers.store.engine workers.store.samples",
    "httpx": "workers.simulator workers.fetch.http workers.fetch.webhooks",
    "requests": "",
    "aiohttp": "",
    "svix": "workers.simulator",
    "cryptography": "app.sealing",
    "granian": "app.web.__main__ app.web.rsgi workers.console.server",
    "opentelemetry": "app.observability.otel",
    "prometheus_client": "app.observability.metrics",
    "pickle": "",
}
# With Redis. (redis-py loads OpenTelemetry where that is installed.)
NOT_IN_THE_ENDPOINT = {"sqlalchemy", "alembic", "psycopg", "httpx", "requests", "aiohttp", "workers", "celery", "kombu"}


def imports(name: str) -> set[str]:
    """All imports of a module, at any level of nesting; imports from app and workers are resolved to modules."""
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


def imported_test_modules(node: ast.AST) -> set[str]:
    """The test modules and conftest.py files that a statement imports."""
    if isinstance(node, ast.ImportFrom):
        names = {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    elif isinstance(node, ast.Import):
        names = {alias.name for alias in node.names}
    else:
        return set()
    files = {name: ROOT / (name.replace(".", "/") + ".py") for name in names if name.split(".")[0] == "tests"}
    return {name for name, file in files.items() if file.exists() and file.name.startswith(("test_", "conftest."))}


def is_within(name: str, allowed: str) -> bool:
    """Whether a module is listed or in a listed package."""
    return any(name == one or name.startswith(f"{one}.") for one in allowed.split())


def area_of(name: str) -> int:
    """The index of a module's area in AREAS."""
    return max((len(one), place) for place, one in enumerate(AREAS) if is_within(name, one))[1]


def test_no_area_imports_a_later_one() -> None:
    """Breaks if a lower area imports a higher one, so that neither can be understood or replaced alone."""
    upward = {
        f"{name} -> {one}" for name in MODULES for one in imports(name) & MODULES.keys() if area_of(one) > area_of(name)
    }
    assert upward == set()


def test_every_area_exists() -> None:
    """Breaks if an area was renamed or removed, so that its rule has no effect."""
    assert {area_of(name) for name in MODULES} == set(range(len(AREAS)))


def test_every_library_is_confined() -> None:
    """Breaks if a library is imported outside its listed modules, which makes it harder to replace."""
    outside = {
        f"{name} -> {library}"
        for name in MODULES
        for library in {one.split(".")[0] for one in imports(name)} & MAY_IMPORT.keys()
        if not is_within(name, MAY_IMPORT[library])
    }
    assert outside == set()


def test_app_never_imports_workers() -> None:
    """Breaks if a module of the endpoint imports the workers."""
    app = {name for name in MODULES if name.split(".")[0] == "app"}
    assert {name for name in app if any(one.split(".")[0] == "workers" for one in imports(name))} == set()


def test_only_the_configuration_reads_the_environment() -> None:
    """Breaks if a module bypasses Settings and reads an unchecked environment variable."""
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
    """Breaks if two modules import each other, at module level or in a function."""
    list(TopologicalSorter({name: imports(name) & (MODULES.keys() - {name}) for name in MODULES}).static_order())


def test_every_module_has_a_docstring() -> None:
    """Breaks if a module has no docstring."""
    assert [name for name, tree in TREES.items() if not (ast.get_docstring(tree) or "").strip()] == []


def test_public_class_names_are_unique() -> None:
    """Breaks if two modules define public classes of the same name. The simulator is exempt: it has its own model."""
    places: dict[str, list[str]] = {}
    for name, tree in TREES.items():
        for node in tree.body if not is_within(name, "workers.simulator") else ():
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_no_test_module_is_imported() -> None:
    """Breaks if a test module or a conftest.py is imported: shared helpers belong in tests/support."""
    found = {
        f"{file.relative_to(ROOT)} -> {one}"
        for file in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        for one in imported_test_modules(node)
    }
    assert found == set()


def test_the_endpoint_loads_no_database_no_http_client_and_no_celery() -> None:
    """Breaks if the endpoint loads libraries that it never uses, which cost memory and widen the attack surface."""
    program = (
        "import json, sys; from app.web.app import from_environment; from_environment(); "
        "print(json.dumps([n.split('.')[0] for n in list(sys.modules)]))"
    )
    own = {"BROKER_URL": "redis://127.0.0.1:1/0", "TERRA_SIGNING_SECRET": "0123456789abcdef"}
    inherited = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env=inherited | own, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert set(json.loads(done.stdout)) & NOT_IN_THE_ENDPOINT == set()
