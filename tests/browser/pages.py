"""What a person does on the console's pages: follow links, fill in fields, press buttons."""

import json
from typing import Any

from tests.support.console import PASSWORD

try:
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait
except ImportError:  # the tests are skipped
    Keys = WebDriverWait = WebDriverException = None

RUN_AXE = """
const done = arguments[arguments.length - 1];
const brief = one => [one.impact, one.id, one.nodes.map(node => node.html)];
axe.run(document, {runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}).then(
    found => done(JSON.stringify(found.violations.map(brief))))"""


class Console:
    """A browser on the console. Scripts of pages do not run, except in `violations`."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url
        driver.delete_all_cookies()
        driver.set_window_size(1200, 900)
        self._scripts(False)
        self.open("/login")
        driver.delete_all_cookies()

    def _scripts(self, on: bool) -> None:
        self.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not on})

    def open(self, path: str) -> None:
        self.driver.get(self.url + path)

    def log_in(self, role: str) -> None:
        self.open("/login")
        self.fill("name", f"{role}-1")
        self.fill("password", PASSWORD)
        self.press("Log in")
        assert self.heading != "Headrace console", self.text

    def fill(self, name: str, value: str) -> None:
        """Types into the field with this id, which must have a label."""
        field = self.driver.find_element("id", name)
        assert self.driver.find_element("css selector", f"label[for={name}]").text
        if field.tag_name == "input":
            field.clear()
        field.send_keys(value)

    def choose(self, name: str, *values: str) -> None:
        for value in values:
            self.driver.find_element("xpath", f"//select[@id='{name}']/option[normalize-space()='{value}']").click()

    def tick(self, label: str) -> None:
        self.driver.find_element("css selector", f"input[aria-label='{label}']").click()

    def press(self, button: str) -> None:
        self._leave(f"//button[normalize-space()='{button}']")

    def follow(self, link: str) -> None:
        self._leave(f"//a[normalize-space()='{link}']")

    def _leave(self, xpath: str) -> None:
        """Clicks, and waits for the next page: without scripts, a click returns before the page is left."""
        old = self.driver.find_element("tag name", "html")
        self.driver.find_element("xpath", xpath).click()
        WebDriverWait(self.driver, 20, 0.02).until(lambda _: _is_left(old))

    def keys(self, *keys: str) -> None:
        """Presses keys in the element that has the focus."""
        for key in keys:
            self.focused.send_keys(key)

    def tab_to(self, label: str) -> None:
        """Moves the focus with the tab key to an element with this text or label, and checks that it is visible."""
        for _ in range(60):
            self.keys(Keys.TAB)
            if label in (self.focused.text, self.focused.accessible_name):
                assert self.focused.value_of_css_property("outline-style") != "none", label
                return
        raise AssertionError(f"the tab key does not reach {label}")

    def submit(self) -> None:
        """Presses enter in the focused element, and waits for the next page."""
        old = self.driver.find_element("tag name", "html")
        self.keys(Keys.ENTER)
        WebDriverWait(self.driver, 20, 0.02).until(lambda _: _is_left(old))

    @property
    def focused(self) -> Any:
        return self.driver.switch_to.active_element

    def has(self, button: str) -> bool:
        return bool(self.driver.find_elements("xpath", f"//button[normalize-space()='{button}']"))

    @property
    def text(self) -> str:
        return str(self.driver.find_element("tag name", "body").text)

    @property
    def heading(self) -> str:
        return str(self.driver.find_element("tag name", "h1").text)

    def violations(self, axe: str, scheme: str) -> list[Any]:
        """Serious and critical findings of axe-core on the present page, in a colour scheme."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self._scripts(True)
        try:
            self.driver.execute_script(axe)
            found = json.loads(self.driver.execute_async_script(RUN_AXE))
        finally:
            self._scripts(False)
        return [one for one in found if one[0] in ("serious", "critical")]

    def overflow(self) -> int:
        """The pixels by which the page is wider than the window."""
        self._scripts(True)
        try:
            return int(self.driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth"))
        finally:
            self._scripts(False)


def _is_left(page: Any) -> bool:
    """Whether the browser shows another page than that of this element. It has several errors for that."""
    try:
        page.is_enabled()
    except WebDriverException:
        return True
    return False
