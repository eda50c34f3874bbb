"""The documentation site, built and opened in a real browser (headless Chromium)."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

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

pytest.importorskip(
    "jupyter_book",
    reason="the site's builder is not installed: pip install -e '.[docs]'",
)


def listed() -> list[str]:
    """Notebooks in the sidebar of _quarto.yml, in its order."""
    contents = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"][
        "contents"
    ]
    return [
        f
        for item in contents
        for f in ([item] if isinstance(item, str) else item["contents"])
    ]


NOTEBOOK_PAGES = [Path(p).with_suffix(".html").as_posix() for p in listed()]
OTHER_PAGES = [
    "index.html",
    "api/index.html",
    "api/papers.causal_tracing.html",
    "references.html",
    "CONTRIBUTING.html",
]


@pytest.fixture(scope="module")
def site() -> Path:
    """The built site; building fails on any warning and on dead internal links."""
    done = subprocess.run(
        [sys.executable, "tools/build_docs.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return SITE


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
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


def test_every_notebook_has_a_page_with_its_figures(site):
    for path, page in zip(listed(), NOTEBOOK_PAGES, strict=True):
        text = (site / page).read_text(encoding="utf-8")
        cells = json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]
        outputs = [o.get("data", {}) for c in cells for o in c.get("outputs", [])]
        pictures = sum("image/png" in o and "text/html" not in o for o in outputs)
        assert text.count("<img alt=") >= pictures, f"{page} lacks figures"


def test_index_page_says_what_this_is_within_one_screen(visit):
    page = visit("index.html")
    assert page.locator(".sd-card").count() == 4
    last = page.locator(".sd-card").last.bounding_box()
    assert last["y"] < 900, "the cards begin below the first screen"
    assert page.get_by_text("python3 tools/go.py trace").count()
    assert page.locator("article img").first.evaluate(
        "i => i.complete && i.naturalWidth > 0"
    )


@pytest.mark.parametrize("path", NOTEBOOK_PAGES + OTHER_PAGES)
def test_page_works_on_a_phone(phone, path):
    page, complaints = phone(path)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390, "the page itself scrolls sideways"
    broken = page.eval_on_selector_all(
        "article img",
        "all => all.filter(i => { i.loading = 'eager'; return i.complete &&"
        " !i.naturalWidth }).map(i => i.src)",
    )
    assert not broken
    assert not complaints


def test_search_finds_indirect_effect(visit):
    page = visit("search.html?q=indirect+effect")
    page.wait_for_selector("#search-results li")
    assert "Causal tracing" in page.locator("#search-results").inner_text()


def test_dark_mode_switches(visit):
    page = visit("index.html")
    seen = []
    for _ in range(3):
        page.locator("button.theme-switch-button").first.click()
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        seen.append((page.evaluate("document.documentElement.dataset.theme"), colour))
    colours = dict(seen)
    assert set(colours) == {"light", "dark"} and colours["light"] != colours["dark"]


def test_math_is_rendered(visit):
    page = visit("nbs/papers/11_rome.html")
    page.wait_for_selector(
        "article mjx-container"
    )  # headings are in the menu, too, which may be folded
    assert page.locator("article mjx-container").count() > 2
    assert page.locator("mjx-merror").count() == 0


@pytest.mark.parametrize("path", [p for p in NOTEBOOK_PAGES if "/papers/" in p])
def test_colab_and_source_links(visit, path):
    links = visit(path).eval_on_selector_all("a[href]", "all => all.map(a => a.href)")
    notebook = path.replace(".html", ".ipynb")
    assert (
        f"https://colab.research.google.com/github/mechtut/mechtut/blob/main/{notebook}"
        in links
    )
    assert any(
        re.match(
            rf"https://mybinder.org/v2/gh/mechtut/mechtut/main\?.*{Path(notebook).name}",
            x,
        )
        for x in links
    )


def test_interactive_figure_tells_the_cell_that_is_pointed_at(visit):
    page = visit("nbs/library/viz/interactive.html")
    cell = page.locator("[data-is]").first
    cell.hover()
    shown = cell.evaluate("e => getComputedStyle(e, '::after').content")
    assert shown == json.dumps(cell.get_attribute("data-is"), ensure_ascii=False)


def test_chart_leads_to_the_methods(visit):
    page = visit("nbs/guides/01_choosing.html")
    links = page.eval_on_selector_all(
        ".choose a", "all => all.map(a => a.getAttribute('href'))"
    )
    assert len(links) == 8 and all(x.endswith(".html") for x in links)
    page.locator(".choose a").first.click()
    page.wait_for_url("**/10_causal_tracing.html")
