"""The built book in a real browser: nothing fails, nothing is fetched from elsewhere, search and formulas work.

Chromium is spoken to through its debugging pipe, which needs no driver and no package. It resolves no name but the
loopback address, so a page that asked another machine for anything would show it here.
"""

from __future__ import annotations

import base64
import functools
import http.server
import itertools
import json
import os
import re
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync",
    "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "--remote-debugging-pipe", "about:blank",
)  # fmt: skip
SECONDS = 60
"""Longest wait for anything."""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(PROGRAM is None, reason=f"no Chromium found ({', '.join(NAMES)})"),
]


class Browser:
    """One headless Chromium with one tab. It reads commands on its descriptor 3 and answers on 4: JSON between NULs."""

    def __init__(self, folder: Path):
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()

        def connect() -> None:
            high = [os.dup(commands), os.dup(answers)]  # out of the way: either may be 3 or 4 itself
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self._process = subprocess.Popen(
            [PROGRAM, f"--user-data-dir={folder}", *FLAGS], pass_fds=(3, 4), preexec_fn=connect,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self._buffer, self._ids, self._session = b"", itertools.count(1), {}
        self.events: list[dict] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._session = {}
        self.call("Browser.close")
        self._process.wait(SECONDS)
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, **parameters: object) -> dict:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer.get('error')}"
        return answer["result"]

    def _receive(self) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], SECONDS)
            chunk = os.read(self._read, 2**16) if ready else b""
            assert chunk, "the browser does not answer"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def evaluate(self, expression: str) -> object:
        """Value of a JavaScript expression in the page; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Until a JavaScript expression is true; pages may come and go meanwhile."""
        until = time.monotonic() + SECONDS
        expression = f"Boolean({condition})"
        while not self.call("Runtime.evaluate", expression=expression)["result"].get("value"):
            assert time.monotonic() < until, f"never true: {condition}"
            time.sleep(0.05)

    def visit(self, url: str) -> None:
        """Open a page and wait until it is loaded and its formulas are set."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href.startsWith({url.split('#')[0]!r}) && document.readyState === 'complete'")
        self.evaluate("window.MathJax && MathJax.startup ? MathJax.startup.promise.then(() => true) : true")
        self.evaluate("new Promise(resolve => setTimeout(() => resolve(true), 150))")

    def problems(self) -> list[str]:
        """Uncaught exceptions, errors on the console, failed requests and requests to other machines since `visit`."""
        found = []
        for event in self.events:
            method, facts = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                details = facts["exceptionDetails"]
                found.append(f"exception: {details['text']} {details.get('exception', {}).get('description', '')}")
            elif method == "Runtime.consoleAPICalled" and facts["type"] in ("error", "assert"):
                found.append(f"console: {[argument.get('value') for argument in facts['args']]}")
            elif method == "Log.entryAdded" and facts["entry"]["level"] == "error":
                found.append(f"log: {facts['entry']['text']} {facts['entry'].get('url', '')}")
            elif method == "Network.requestWillBeSent":
                address = urlsplit(facts["request"]["url"])
                if address.scheme not in ("data", "blob") and address.hostname != "127.0.0.1":
                    found.append(f"request to {address.hostname}: {address.geturl()[:100]}")
        return found

    def screenshot(self, width: int, height: int) -> bytes:
        self.resize(width, height)
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.fixture
def wide(browser) -> Browser:
    browser.resize(1280, 900)
    return browser


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def serve() -> Iterator:
    """Function: folder -> address on loopback."""
    servers = []

    def start(folder: Path) -> str:
        handler = functools.partial(Quiet, directory=str(folder))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def address(site, serve) -> str:
    return serve(site)


def written(site: Path) -> list[str]:
    """Addresses of the pages that we wrote, relative to the book."""
    files = [file for part in ("book", "notebooks") for file in (site / part).glob("*.html")]
    return sorted(file.relative_to(site).as_posix() for file in files)


def test_the_browser_sees_what_goes_wrong(wide, serve, tmp_path):
    """Otherwise its silence would mean nothing."""
    scripts = "<script>console.error('oops')</script><script>nope()</script><script src=missing.js></script>"
    (tmp_path / "bad.html").write_text(f"<p>x</p><img src='https://example.org/x.png'>{scripts}")
    wide.visit(f"{serve(tmp_path)}/bad.html")
    seen = "\n".join(wide.problems())
    assert all(sign in seen for sign in ("oops", "nope is not defined", "404", "request to example.org"))


def test_pages_load_without_error_and_without_the_network(wide, address, site):
    for page in written(site):
        wide.visit(f"{address}/{page}")
        assert wide.problems() == [], page
        assert wide.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)"), page


def test_index_leads_to_the_title_page(wide, address):
    wide.call("Page.navigate", url=f"{address}/index.html")
    wide.wait_for("location.pathname.endsWith('/book/intro.html') && document.readyState === 'complete'")
    assert wide.evaluate("document.querySelector('article h1').innerText").startswith("What Reality Said")


def test_search_finds_the_chapter(wide, address):
    wide.visit(f"{address}/search.html?q=induction")
    wide.wait_for("document.querySelector('#search-results a[href*=\"notebooks/01_induction.html\"]')")
    assert wide.problems() == []


def test_formulas_are_set_with_local_fonts(wide, address):
    wide.visit(f"{address}/book/method.html")
    assert wide.evaluate("document.querySelectorAll('mjx-container').length") >= 10
    assert wide.evaluate("document.querySelectorAll('article .math:not(:has(mjx-container))').length") == 0
    assert wide.evaluate("document.fonts.ready.then(() => document.fonts.check('16px MJXTEX-I'))")
    assert wide.problems() == []


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_pages_do_not_scroll_sideways(browser, address, site, width, height):
    """Wide tables and figures scroll by themselves; the page does not."""
    browser.resize(width, height)
    for page in written(site):
        browser.visit(f"{address}/{page}")
        assert browser.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, (
            f"{page} at {width} px"
        )


def test_light_and_dark_are_readable(wide, address, site):
    """Text stands out from its ground in both modes, at least 4.5 to 1 (WCAG AA)."""
    for page, mode in itertools.product(written(site), ("light", "dark")):
        wide.visit(f"{address}/{page}")
        wide.evaluate(f"document.documentElement.dataset.theme = document.documentElement.dataset.mode = {mode!r}")
        faint = [pair for pair in wide.evaluate(COLOURS) if contrast(*pair[:2]) < 4.5]
        assert faint == [], f"{page}, {mode}"


COLOURS = r"""
[...document.querySelectorAll('article :is(p, li, td, th, dt, dd, h1, h2, h3, a, code, .pasted-text, .entry-date)')]
  .filter(e => !e.closest('pre, mjx-container, .headerlink') && e.innerText && e.innerText.trim())
  .map(e => {
    const ground = e => getComputedStyle(e).backgroundColor;
    let below = e;
    while (below.parentElement && /rgba\(.*, 0\)|transparent/.test(ground(below))) below = below.parentElement;
    return [getComputedStyle(e).color, ground(below), e.innerText.slice(0, 30)];
  })
"""
"""Colour, colour of the ground and beginning of every piece of text."""


def contrast(text: str, ground: str) -> float:
    """WCAG contrast ratio of two CSS colours."""
    light, dark = sorted((_luminance(text), _luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = [float(number) / 255 for number in re.findall(r"[\d.]+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_can_be_photographed(browser, address, width):
    browser.visit(f"{address}/book/intro.html")
    picture = browser.screenshot(width, 900)
    assert struct.unpack(">II", picture[16:24]) == (width, 900)
    assert len(picture) > 20_000  # a blank page compresses to less
