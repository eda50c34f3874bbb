"""The documentation site, built and opened in a real browser (headless Chromium)."""

import json
import re
import sys
from pathlib import Path

import pytest
from browser import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from navigation import notebooks

NOTEBOOK_PAGES = [Path(p).with_suffix(".html").as_posix() for p in notebooks()]
OTHER_PAGES = [
    "index.html",
    "api/index.html",
    "api/papers.causal_tracing.html",
    "references.html",
    "CONTRIBUTING.html",
]
# what scrolls sideways and nobody reaches with the keyboard
UNREACHED = """() => [...document.querySelectorAll("article *")].filter(e =>
  e.scrollWidth > e.clientWidth + 13 && e.clientWidth > 0 &&
  /auto|scroll/.test(getComputedStyle(e).overflowX) && e.tabIndex < 0 &&
  ![...e.querySelectorAll("*")].some(x => x.tabIndex >= 0)
).map(e => e.outerHTML.slice(0, 200))"""


def test_every_notebook_has_a_page_with_its_figures(site):
    for path, page in zip(notebooks(), NOTEBOOK_PAGES, strict=True):
        text = (site / page).read_text(encoding="utf-8")
        cells = json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]
        outputs = [o.get("data", {}) for c in cells for o in c.get("outputs", [])]
        pictures = sum("image/png" in o and "text/html" not in o for o in outputs)
        assert text.count("<img alt=") >= pictures, f"{page} lacks figures"


def test_front_page_says_what_this_is_within_one_screen(visit):
    page = visit("index.html")
    figure = page.locator("article img").first
    assert figure.evaluate("i => i.complete && i.naturalWidth > 0")
    box = figure.bounding_box()
    assert box["y"] + box["height"] < 900, "the figure ends below the first screen"
    paths = page.locator(".paths .sd-card")
    assert paths.count() == 2 and paths.first.bounding_box()["y"] < 900
    assert page.locator(".sd-card").count() == 10


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
    assert not page.evaluate(UNREACHED), "scrolls by a mouse only"
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
    cell = page.locator("[title][tabindex]").first
    cell.hover()
    shown = cell.evaluate("e => getComputedStyle(e, '::after').content")
    assert shown == json.dumps(cell.get_attribute("title"), ensure_ascii=False)


def test_chart_leads_to_the_methods(visit):
    page = visit("nbs/guides/01_choosing.html")
    links = page.eval_on_selector_all(
        ".choose a", "all => all.map(a => a.getAttribute('href'))"
    )
    assert len(links) == 19 and all(x.endswith(".html") for x in links)
    page.locator(".choose a").first.click()
    page.wait_for_url("**/models/hooks.html")
