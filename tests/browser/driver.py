"""Starts Debian's Chromium, which selenium drives."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage")


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A browser with an empty profile in this folder. Skips the test without selenium or a browser."""
    selenium = pytest.importorskip("selenium.webdriver", reason="no selenium: ./deploy/setup browser")
    options = selenium.ChromeOptions()
    options.binary_location = _found("chromium", "chromium-browser", "google-chrome")
    service = selenium.ChromeService(_found("chromedriver"))
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = selenium.Chrome(options, service)
    try:
        yield driver
    finally:
        driver.quit()


def _found(*names: str) -> str:
    """The path of a program."""
    for name in names:
        if path := shutil.which(name):
            return path
    pytest.skip(f"no {names[0]}: apt-get install chromium chromium-driver")
