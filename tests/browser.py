"""Fixtures for tests in a real browser (headless Chromium): the built site on a local
server, and pages that note what fails. `conftest.py` offers them to every test.
"""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import vendor

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_site"
CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def site() -> Path:
    """The built site; building fails on any warning and on dead internal links. It is
    built once, also if several workers ask for it.
    """
    pytest.importorskip(
        "jupyter_book",
        reason="the site's builder is not installed: pip install -e '.[docs]'",
    )
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"process {os.getpid()}")
    stamp = ROOT / "_build/site.txt"
    stamp.parent.mkdir(exist_ok=True)
    with FileLock(stamp.with_suffix(".lock")):
        if not stamp.exists() or stamp.read_text() != run:
            done = subprocess.run(
                [sys.executable, "tools/build_docs.py"],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            stamp.write_text(run)
    return SITE


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="session")
def address(site):
    """The site on a local server."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    playwright = pytest.importorskip(
        "playwright.sync_api",
        reason="playwright is not installed: pip install -e '.[dev]'",
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


def watched(context, address: str, complaints: list[str]):
    """A page that notes what fails and what is asked of another host."""
    page = context.new_page()

    def console(message) -> None:
        if message.type == "error":
            complaints.append(f"console: {message.text}")

    def request(asked) -> None:
        if not asked.url.startswith((address, "data:", "blob:")):
            complaints.append(f"another host: {asked.url}")

    def response(answer) -> None:
        if answer.status >= 400:
            complaints.append(f"{answer.status}: {answer.url}")

    page.on("console", console)
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("response", response)
    page.on("request", request)
    return page


@pytest.fixture
def visit(browser, address):
    """Open a page; at the end of the test, nothing may have failed and nothing may have
    been asked of another host.
    """
    complaints, contexts = [], []

    def go(path: str, width: int = 1280, scheme: str = "light"):
        size = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, color_scheme=scheme)
        contexts.append(context)
        page = watched(context, address, complaints)
        page.goto(address + path, wait_until="load")
        return page

    yield go
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture(scope="module")
def phone(browser, address):
    """One small screen for all pages, so that scripts and styles are loaded once."""
    context = browser.new_context(viewport={"width": 390, "height": 900})
    complaints: list[str] = []
    page = watched(context, address, complaints)

    def go(path: str):
        complaints.clear()
        page.goto(address + path, wait_until="load")
        return page, complaints

    yield go
    context.close()


def serious(page, rule: str = "") -> list[str]:
    """What axe-core finds serious or worse on an open page, by all rules, by one, or by
    all but one (`-color-contrast`).
    """
    # a colour on its way to the dark one is not what people read
    page.add_style_tag(content="* { transition: none !important }")
    if not page.evaluate("'axe' in window"):
        page.add_script_tag(path=vendor.fetch("axe-core") / "axe.min.js")
    how = {"resultTypes": ["violations"], "preload": False}
    if rule.startswith("-"):
        how["rules"] = {rule[1:]: {"enabled": False}}
    elif rule:
        how["runOnly"] = [rule]
    found = page.evaluate("how => axe.run(how)", how)["violations"]
    return [
        f"{v['id']}: {n['html'][:120]} ({n['failureSummary'][:160]})"
        for v in found
        if v["impact"] in ("serious", "critical")
        for n in v["nodes"]
    ]
