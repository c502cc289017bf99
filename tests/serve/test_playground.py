"""The page at / in headless Chromium: typed into, clicked, scrubbed by keyboard, on a phone's width."""

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from dtrpo_ray.serve.app import create_app
from tests.serve.test_app import SERVE, make_engine

pytestmark = pytest.mark.extra

DRIVER, CHROMIUM = shutil.which("chromedriver"), shutil.which("chromium")
QUIET = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
PROMPT = "4114"  # both models go on to the most tokens
PHONE = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # W3C WebDriver's name of an element reference


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Browser:
    """The few commands of W3C WebDriver that the test needs."""

    def __init__(self, driver: str, profile: Path) -> None:
        self.http = httpx.Client(base_url=driver, timeout=60)
        options = {"binary": CHROMIUM, "args": [*QUIET, f"--user-data-dir={profile}"]}
        asked = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self.session = f"/session/{self.http.post('/session', json=asked).json()['value']['sessionId']}"

    def call(self, path: str, **body: Any) -> Any:
        value = self.http.post(self.session + path, json=body).json()["value"]
        assert not (isinstance(value, dict) and "error" in value), value
        return value

    def js(self, script: str) -> Any:
        return self.call("/execute/sync", script=f"return {script}", args=[])

    def find(self, selector: str) -> str:
        return str(self.call("/element", using="css selector", value=selector)[ELEMENT])

    def click(self, selector: str) -> None:
        self.call(f"/element/{self.find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        self.call(f"/element/{self.find(selector)}/value", text=text)

    def press(self, key: str) -> None:
        keys = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.call("/actions", actions=[{"type": "key", "id": "keys", "actions": keys}])

    def tab(self, times: int = 1) -> str:
        """Move the focus on; the id of what has it then."""
        for _ in range(times):
            self.press("\ue004")
        return str(self.js("document.activeElement.id"))

    def wait(self, script: str, met: Callable[[Any], bool] = bool) -> Any:
        deadline = time.monotonic() + 60
        while not met(value := self.js(script)):
            assert time.monotonic() < deadline, f"{script} is still {value!r}"
            time.sleep(0.1)
        return value


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app = create_app(make_engine(), SERVE, (), {"base": make_engine(seed=4)})
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if not (DRIVER and CHROMIUM):
        pytest.skip("no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)")
    port = free_port()
    process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{port}/status")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        browser = Browser(f"http://127.0.0.1:{port}", tmp_path)
        yield browser
        browser.http.delete(browser.session)
    finally:
        process.terminate()
        process.wait(10)


def test_watch_scrub_and_compare(url: str, browser: Browser) -> None:
    browser.call("/url", url=url)
    browser.wait("document.querySelector('#left').options.length", lambda n: n == 2)
    browser.type("#prompt", PROMPT)
    browser.click("#right option[value=base]")
    browser.click("#go")
    browser.wait("sides.length === 2 && sides.every(side => side.count !== null)")
    asked = {"prompt": PROMPT, "temperature": 0, "max_tokens": 64, "steps": 4}
    for number, name in enumerate(("tiny", "base")):
        text = httpx.post(f"{url}v1/completions", json={**asked, "model": name}).json()["choices"][0]["text"]
        assert browser.js(f"sides[{number}].text") == text
        shown = browser.js(f"document.querySelectorAll('.tokens')[{number}].textContent")
        assert shown.startswith(text)
    blocks = "document.querySelector('.tokens').querySelectorAll('.block')"
    assert browser.js(f"{blocks}.length") == 64 // 4 - 1  # one line between any two blocks
    assert browser.js(f"[...{blocks}].every(at => [...at.parentNode.children].indexOf(at) % 4 === 0)")
    most = browser.js("longest()")
    status = "document.querySelector('#where').textContent"
    assert browser.js(status) == f"Denoising step {most} of {most}"
    assert "tokens per forward" in browser.js("document.querySelector('.numbers').textContent")

    browser.click("#back")
    assert browser.js(status) == f"Denoising step {most - 1} of {most}"
    browser.js("document.activeElement.blur()")
    for _ in range(most - 2):
        browser.press("\ue012")  # arrow left
    assert browser.js(status) == f"Denoising step 1 of {most}"
    first = browser.js("document.querySelectorAll('.tokens')[0].querySelectorAll('span:not(.mask)').length")
    assert first == 1  # four steps for a block of four: one token each
    browser.press("\ue014")  # arrow right
    assert browser.js(status) == f"Denoising step 2 of {most}"
    if out := os.environ.get("SCREENSHOT"):
        import base64

        browser.call("/window/rect", width=1100, height=900)
        browser.js(f"move({most // 2})")
        Path(out).write_bytes(base64.b64decode(browser.http.get(browser.session + "/screenshot").json()["value"]))


def test_a_phone_and_a_mistake(url: str, browser: Browser) -> None:
    """Nothing sticks out of 390 pixels, long answers side by side included; what the server refuses is said; every
    field has a label."""
    browser.call("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=PHONE)
    browser.call("/url", url=url)
    browser.wait("document.querySelector('#left').options.length", lambda n: n == 2)
    assert browser.js("window.innerWidth") == 390
    browser.type("#prompt", "x")
    browser.click("#go")
    assert "cannot be tokenized" in browser.wait("document.querySelector('#error').textContent")
    browser.type("#prompt", "\ue003" + PROMPT)  # backspace
    browser.click("#right option[value=base]")
    browser.click("#go")
    browser.wait("sides.length === 2 && sides.every(side => side.count !== null)")
    assert browser.js("document.querySelector('#error').textContent") == ""
    assert browser.js("document.documentElement.scrollWidth <= window.innerWidth")
    tops = browser.js("[...document.querySelectorAll('.side')].map(side => side.getBoundingClientRect().top)")
    assert tops[0] < tops[1]  # one under the other
    fields = "[...document.querySelectorAll('form textarea, form input, form select')]"
    assert browser.js(f"{fields}.every(field => field.labels.length === 1)")


def test_all_of_it_goes_by_keyboard(url: str, browser: Browser) -> None:
    """No mouse: from the prompt over every field to the button, and to the steps."""
    browser.call("/url", url=url)
    browser.wait("document.querySelector('#left').options.length", lambda n: n == 2)
    assert browser.tab() == "prompt"
    for letter in PROMPT:
        browser.press(letter)
    assert [browser.tab() for _ in range(2)] == ["left", "right"]
    browser.press("b")  # a select goes to the option that begins so
    assert browser.tab(8) == "go"
    browser.press("\ue007")  # enter
    browser.wait("sides.length === 2 && sides.every(side => side.count !== null)")
    most = browser.js("longest()")
    assert browser.tab() == "back"  # the button that stops is off again
    browser.press("\ue007")
    assert browser.js("shown") == most - 1
    assert browser.tab() == "step"
    browser.press("\ue011")  # home
    assert browser.js("shown") == 0
    browser.press("\ue014")  # arrow right
    assert browser.js("shown") == 1
    assert browser.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
