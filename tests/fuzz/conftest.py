"""The seeds of the fuzzers: a fixed one, and with `--full` also the new one that the run prints at its start."""

import os

import pytest

from tests.support.fuzzing import FIXED_SEED, SEED_VARIABLE


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a fuzzer once per seed. The ids do not contain the new seed, because all processes must collect the same."""
    if "fuzz_seed" in metafunc.fixturenames:
        seeds = ["fixed", "new"] if metafunc.config.getoption("full") else ["fixed"]
        metafunc.parametrize("fuzz_seed", seeds, indirect=True, scope="module")


@pytest.fixture(scope="module")
def fuzz_seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run. A failed test prints it."""
    seed = FIXED_SEED if request.param == "fixed" else int(os.environ[SEED_VARIABLE])
    print(f"{SEED_VARIABLE}={seed}")
    return seed
