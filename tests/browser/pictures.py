"""`python -m tests.browser.pictures`: takes three pictures of the console for the README, from a run of the demo."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.browser.driver import chromium
from tests.support import ROOT, end
from workers.local.files import read_json

PICTURES = ROOT / "deploy" / "pictures"
DATA_DIR = re.compile(r"--data-dir (\S+)")
WIDTH, HEIGHT = 1100, 760


def take(driver: Any, stack: dict[str, str]) -> None:
    """The overview, a person, and a delivery."""
    name, _, password = stack["console_auth"].partition(":")
    driver.set_window_size(WIDTH, HEIGHT)
    driver.get(stack["console"])
    driver.find_element("id", "name").send_keys(name)
    driver.find_element("id", "password").send_keys(password)
    driver.find_element("tag name", "button").click()
    driver.implicitly_wait(10)
    driver.find_element("xpath", "//h1[.='Overview']")
    driver.save_screenshot(str(PICTURES / "console.png"))
    driver.get(f"{stack['console']}/people?name=member-0001")
    driver.find_element("css selector", "td a").click()
    driver.find_element("xpath", "//h2[.='Days']")
    driver.save_screenshot(str(PICTURES / "console-person.png"))
    driver.get(f"{stack['console']}/deliveries?outcome=applied&type=daily.data.*")
    driver.find_element("css selector", "td.id a").click()
    driver.find_element("xpath", "//h2[.='Processing']")
    driver.save_screenshot(str(PICTURES / "console-delivery.png"))


def main() -> None:
    command = [sys.executable, "-P", "-m", "workers.verify.demo", "--keep"]
    with tempfile.TemporaryDirectory() as profile, subprocess.Popen(command, cwd=ROOT, stdout=-1, text=True) as demo:
        assert demo.stdout is not None
        try:
            found = next(found for line in demo.stdout if (found := DATA_DIR.search(line)))
            with chromium(Path(profile)) as driver:
                take(driver, read_json(Path(found[1]) / "stack.json"))
        finally:
            end(demo)


if __name__ == "__main__":
    main()
