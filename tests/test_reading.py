"""What a reader meets on the site: navigation, words, figures, contrast. In headless
Chromium; axe-core looks for what keeps people out.
"""

import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from browser import ROOT, serious

sys.path.insert(0, str(ROOT / "tools"))

NOTEBOOKS = sorted(
    p.relative_to(ROOT).as_posix()
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in p.parts
)
PAPERS = [p for p in NOTEBOOKS if "/papers/" in p]
# What one style sheet makes: a few of each kind stay (cells and words of code, rows of
# a table), and all that bring a style, an id, a role or a name. Formulas go.
PLAIN = """few => {
  const own = "[style], [id], [role], [tabindex], [aria-label], a", seen = {};
  const many = kind => (seen[kind] = (seen[kind] || 0) + 1) > few;
  const all = (kind, act) => document.querySelectorAll(kind).forEach(act);
  const isPlain = e => !e.matches(own) && !e.querySelector(own) && !e.closest("svg");
  const chain = e => e.tagName == "ARTICLE" ? "" :
    e.tagName + "." + e.className + " " + chain(e.parentElement);
  all("mjx-container", e => e.remove());
  all("article div.cell_input", e => {
    if (many(e.closest(".cell").className)) e.remove();
  });
  all("article table.dataframe tbody", body => [...body.rows].slice(few).forEach(
    row => { if (isPlain(row)) row.remove(); }));
  all("article span, article code, article em", e => {
    const kind = e.closest("div.highlight pre") ? e.className : chain(e);
    if (isPlain(e) && many(kind)) e.replaceWith(...e.childNodes);
  });
}"""


def source(path: str) -> list[dict]:
    notebook = json.loads((ROOT / path).read_text(encoding="utf-8"))
    return [{**c, "source": "".join(c["source"])} for c in notebook["cells"]]


def pages(site: Path) -> list[str]:
    found = [p.relative_to(site).as_posix() for p in site.rglob("*.html")]
    made = ("genindex.html", "search.html", "py-modindex.html")
    return sorted(p for p in found if "_static" not in p and p not in made)


# one of each kind, and all that make colours of their own
COLOURS = [
    *("index.html", "papers.html", "library.html", "CHANGELOG.html"),
    *("nbs/guides/01_choosing.html", "nbs/guides/06_four_circuits.html"),
    *("nbs/library/viz/interactive.html", "nbs/library/circuits/drawing.html"),
    *("nbs/library/neurons/dashboards.html", "api/models.loading.html"),
    *(f"explore/{name}.html" for name in ("traces", "circuits", "neurons", "try")),
    *(Path(p).with_suffix(".html").as_posix() for p in PAPERS),
]


@pytest.mark.parametrize("path", COLOURS)
def test_nothing_keeps_people_out(path, address, browser):
    """By all rules in light, and once more by that for contrast in dark."""
    context = browser.new_context(color_scheme="light")
    page = context.new_page()
    page.goto(address + path, wait_until="load")
    page.evaluate(PLAIN, 3)
    found = {"light": serious(page)}
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.documentElement.dataset.theme == 'dark'")
    found["dark"] = serious(page, "color-contrast")
    context.close()
    assert not any(found.values()), json.dumps(found, indent=1)


VOID = ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta")
VOID += ("source", "track", "wbr")
NAMED = ("a", "button", "summary", "th", "label", "option", "h1", "h2", "h3", "h4")


class Shapes(HTMLParser):
    """What the rules for pages look at: tags with their parents, names of attributes,
    roles, whether what needs a name has one; and the ids, in order.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: set[tuple] = set()
        self.ids: list[str] = []
        self.named: set[str] = set()
        self.open: list[list] = [["", (), ""]]  # tag, names of attributes, its text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given, names = dict(attrs), tuple(sorted(n for n, _ in attrs))
        kind = given.get("type") if tag == "input" else None
        self.seen.add((self.open[-1][0], tag, names, given.get("role"), kind))
        self.ids += [given["id"]] if given.get("id") else []
        for name in ("aria-labelledby", "aria-describedby", "aria-controls", "for"):
            self.named |= set((given.get(name) or "").split())
        if tag in ("img", "svg"):  # have words of their own
            self.handle_data("x")
        if tag not in VOID:
            self.open.append([tag, names, ""])

    def handle_data(self, data):
        self.open[-1][2] += data.strip()

    def handle_endtag(self, tag):
        if tag in [x[0] for x in self.open]:
            while True:
                closed, names, text = self.open.pop()
                if closed in NAMED and not text:
                    self.seen.add((closed, names, "empty"))
                self.open[-1][2] += text
                if closed == tag:
                    break


def test_shapes_of_elements_are_told_apart():
    one = Shapes("<ul><li><a href='x'>word</a></li></ul><th id='a'> </th>")
    assert ("li", "a", ("href",), None, None) in one.seen and one.ids == ["a"]
    assert [s for s in one.seen if s[-1] == "empty"] == [("th", ("id",), "empty")]
    for other in ("<ul><a href='x'>word</a></ul>", "<a role=tab href='x'>word</a>"):
        assert Shapes(other).seen - one.seen
    empty = Shapes("<li><a href='x'><span></span></a></li>").seen
    assert ("a", ("href",), "empty") in empty - one.seen
    assert Shapes("<p aria-controls='a b'>").named == {"a", "b"}


def test_all_other_pages_are_made_of_what_was_looked_at(site, address, browser):
    """The pages above have all shapes of elements that any page has; where one has a
    shape of its own, it is looked at here, by all rules but that for contrast.
    """
    made = {p: Shapes((site / p).read_text(encoding="utf-8")) for p in pages(site)}
    for path, shapes in made.items():
        twice = {i for i in shapes.named if shapes.ids.count(i) > 1}
        assert not twice, f"{path}: ids that are named stand there twice: {twice}"
    seen = set[tuple]().union(*(made.pop(p).seen for p in COLOURS))
    problems, looked_at, page = {}, [], browser.new_page()
    for path in sorted(made, key=lambda p: -len(made[p].seen - seen)):
        if made[path].seen <= seen:
            continue
        seen |= made[path].seen
        looked_at.append(path)
        page.goto(address + path, wait_until="load")
        page.evaluate(PLAIN, 0)
        if found := serious(page, "-color-contrast"):
            problems[path] = found
    page.close()
    assert not problems, json.dumps(problems, indent=1)
    assert len(looked_at) < 20, f"new kinds of pages? add one of each: {looked_at}"


def test_a_fault_is_found(browser):
    """The check itself: grey on white, and a picture without words."""
    page = browser.new_page()
    page.set_content(
        "<html lang=en><title>x</title><main><p style='color:#ccc'>grey</p>"
        "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='></main>"
    )
    found = serious(page)
    assert {f.split(":")[0] for f in found} == {"color-contrast", "image-alt"}
    page.close()


def test_at_most_twenty_links_lead_through_the_site(site):
    for path in pages(site):
        text = (site / path).read_text(encoding="utf-8")
        nav = re.search(r'<nav class="bd-links section-nav".*?</nav>', text, re.DOTALL)
        assert nav, path
        links = re.findall(r"<a href", nav[0])
        assert 6 <= len(links) <= 20, f"{path}: {len(links)} links"
        if path != "index.html":
            assert nav[0].count('aria-current="true"') == 1, path
            assert nav[0].count('aria-current="page"') == 1, path


def test_the_front_page_is_a_page(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    assert 'http-equiv="Refresh"' not in text and "<h1>mechtut" in text
    card = re.search(r'property="og:image" content="[^"]*/mechtut/([^"]+)"', text)
    assert card and (site / card[1]).is_file()
    for path in pages(site):
        text = (site / path).read_text(encoding="utf-8")
        for name in ("og:title", "og:description", "og:url"):
            told = re.search(rf'<meta property="{name}" content="([^"]*)"', text)
            assert told and len(told[1]) > 2, f"{path} has no {name}"
        assert text.count('<meta name="description"') == 1, path


def test_every_figure_says_what_it_shows(site):
    for path in pages(site):
        text = (site / path).read_text(encoding="utf-8")
        article = text[text.find("<article") : text.find("</article>")]
        for image in re.findall(r"<img[^>]*>", article):
            alt = re.search(r'alt="([^"]*)"', image)
            assert alt and len(html.unescape(alt[1])) > 20, f"{path}: {image[:200]}"


def test_drawings_are_those_that_the_script_draws(tmp_path):
    import drawings

    kept, drawings.FOLDER = drawings.FOLDER, tmp_path
    try:
        for draw in drawings.ALL:
            draw()
    finally:
        drawings.FOLDER = kept
    drawn = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert drawn == {p.name: p.read_text() for p in kept.glob("*.svg")}


@pytest.mark.parametrize("path", PAPERS)
def test_a_paper_has_its_drawing(path, site):
    text = (site / path).with_suffix(".html").read_text(encoding="utf-8")
    drawing = re.search(r'<svg class="drawing" role="img" aria-label="([^"]+)"', text)
    assert drawing and len(drawing[1]) > 60


@pytest.mark.parametrize(
    "words",
    [
        "activation patching",
        "path patching",
        "causal mediation",
        "sparse autoencoder",
        "logit lens",
    ],
)
def test_search_finds_the_words_of_the_field(visit, words):
    page = visit(f"search.html?q={words.replace(' ', '+')}")
    page.wait_for_selector("#search-results li")
    assert "Glossary" in page.locator("#search-results").inner_text()


def test_glossary(site):
    text = "\n".join(
        c["source"]
        for c in source("nbs/guides/07_glossary.ipynb")
        if c["cell_type"] == "markdown"
    )
    terms = re.findall(r"^### (.+)\n\n(.+)$", text, re.MULTILINE)
    assert len(terms) >= 60 and f"> {len(terms)} terms" in text
    assert len({t for t, _ in terms}) == len(terms)
    for term, said in terms:
        assert re.search(r"\*In mechtut:\* \[.+?\]\(https://mechtut", said), term
        assert re.search(r"\*From:\* \[.+?\]\(https://", said), term


@pytest.mark.parametrize("path", PAPERS)
def test_exercises_have_one_form(path):
    """Question with difficulty and minutes, starter that runs, hint, worked answer."""
    cells = source(path)
    begin = next(
        i
        for i, c in enumerate(cells)
        if c["cell_type"] == "markdown" and "## Exercises" in c["source"]
    )
    rest = cells[begin:]
    texts = "\n".join(c["source"] for c in rest if c["cell_type"] == "markdown")
    titles = re.findall(
        r"^### (\d+)\. .+\n\n?\*(easy|medium|hard) · \d+ minutes\*", texts, re.M
    )
    assert len(titles) >= 3, f"{path}: {len(titles)} exercises"
    assert texts.count("<summary>Hint") >= len(titles)
    printed = "".join(
        "".join(o.get("text", "")) for c in rest for o in c.get("outputs", [])
    )
    for number, _ in titles:
        assert f"Exercise {number}: nothing to check yet." in printed, number
        assert f"Exercise {number}: right." in printed, f"{path} {number} has no answer"


def test_tables_have_no_column_of_row_numbers(site):
    from page_html import plain_table

    row = "<tr><th>{}</th><td>{}</td></tr>"
    rows = "".join(row.format(i, v) for i, v in enumerate(("yes", "2.5 ± 0.1")))
    head = "<table><thead><tr><th></th><th>a</th></tr></thead><tbody>"
    told = plain_table(head + rows)
    assert (
        len(re.findall(r"<th\b", told)) == 1 and told.count('<td class="text">yes') == 1
    )
    named = plain_table(head + row.format("layer 1", 3))
    assert "<th>layer 1</th>" in named
    frame = pd.DataFrame({"score": [0.5, -0.0], "said": ["a", "b"]})
    frame.index.name = "layer"  # 0 and 1 are layers, and stay
    kept = plain_table(frame.to_html())
    heads = re.findall(r"<th([^>]*)>(\w+)</th>", kept)
    assert heads == [
        *((' class="text"', "layer"), ("", "score"), (' class="text"', "said")),
        *(("", "0"), ("", "1")),
    ]
    assert "-0" not in kept and "NaN" not in kept
    frame.columns.name = "what"
    assert "layer / what →</th>" in plain_table(frame.to_html())
    for path in pages(site):
        text = (site / path).read_text(encoding="utf-8")
        for table in re.findall(r"<table[^>]*dataframe.*?</table>", text, re.DOTALL):
            first = re.findall(r"<tr[^>]*>\s*<th[^>]*>(\d+)</th>", table)
            corner = re.search(r"<th\b[^>]*>(.*?)</th>", table)
            unnamed = corner is None or not corner[1].strip()
            rows = [str(i) for i in range(len(first))]
            assert not (unnamed and first and first == rows), path


def test_pages_state_how_long_they_run(site):
    import build_docs

    for page, minutes in build_docs.MINUTES.items():
        assert (ROOT / f"{page}.ipynb").is_file() and minutes >= 1, page
    run = re.compile(r"Runs in (under a minute|\d+ minutes?) on|\d+ minutes? to run")
    without_code = ("index", "01_choosing", "07_glossary")
    for path in NOTEBOOKS:
        text = (site / path).with_suffix(".html").read_text(encoding="utf-8")
        assert bool(run.search(text)) == (Path(path).stem not in without_code), path


def test_folds_say_what_is_in_them(site):
    for path in pages(site):
        text = (site / path).read_text(encoding="utf-8")
        assert not re.search(r"<p[^>]*>(Show|Hide) code cell", text), path
    text = (site / "nbs/papers/10_causal_tracing.html").read_text(encoding="utf-8")
    assert "Code of CausalTrace" in text and "Worked answer" in text


def test_sentences_are_broken_and_printed_tables_are_not():
    from page_html import is_running_text

    frame = pd.DataFrame({"n": [10, 2], "accuracy": [0.25, 0.5]}, index=["one", "b"])
    assert not is_running_text(frame.to_string())
    assert is_running_text("clean      Eva and Sofia met.\nright answers: 0.5 of 10")
    assert is_running_text("    indented\n    lines") and is_running_text("")


def test_printed_sentences_fit_the_column(phone):
    page, _ = phone("nbs/papers/30_acdc.html")
    wide = "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert page.locator(".tag_wrap .cell_output pre").count() > 10
    assert page.eval_on_selector_all(".tag_wrap .cell_output pre", wide) == 0


def test_words_of_drawings_can_be_read_on_a_phone(phone):
    for path in ("nbs/papers/11_rome.html", "papers.html", "index.html"):
        page, complaints = phone(path)
        drawn = page.locator(".drawn > *").first
        assert drawn.evaluate("e => e.getBoundingClientRect().width") > 500
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator(".drawn").first.get_attribute("tabindex") == "0"
        assert not complaints


def test_figures_are_not_white_boxes_on_a_dark_page(visit):
    page = visit("nbs/papers/10_causal_tracing.html", scheme="dark")
    image = page.locator(".cell_output img").first
    style = image.evaluate("e => [getComputedStyle(e).filter, e.style.background]")
    assert "invert" in style[0]
    ink = page.locator("svg.drawing text").first.evaluate(
        "e => getComputedStyle(e).fill"
    )
    assert min(int(v) for v in re.findall(r"\d+", ink)[:3]) > 150, "dark on dark"


def test_wide_figures_keep_their_size_on_a_phone(phone):
    page, complaints = phone("nbs/papers/10_causal_tracing.html")
    image = page.locator("img.wide").first
    assert image.evaluate("e => e.getBoundingClientRect().width") > 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not complaints


@pytest.mark.parametrize("name", ["20_function_vectors", "30_acdc"])
def test_code_fits_the_column(name, visit):
    """Folded or not: no line of code needs a scrollbar on a wide screen."""
    page = visit(f"nbs/papers/{name}.html")
    page.eval_on_selector_all("details", "all => all.forEach(e => e.open = true)")
    too_wide = page.eval_on_selector_all(
        ".cell_input pre",
        "all => all.filter(e => e.scrollWidth > e.clientWidth + 1)"
        ".map(e => e.innerText.slice(0, 80))",
    )
    assert not too_wide


def test_code_wraps_on_a_phone(phone):
    for path in ("nbs/papers/11_rome.html", "nbs/index.html"):
        page, _ = phone(path)
        too_wide = page.eval_on_selector_all(
            ".cell_input pre, div.highlight-bash pre",
            "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).length",
        )
        assert too_wide == 0, path


def test_readme_pictures_have_words():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[([^\]]*)\]\((docs/figures/[^)]+)\)", text)
    assert len(pictures) >= 3
    for alt, file in pictures:
        assert len(alt) > 40 and (ROOT / file).is_file()


def test_a_report_says_what_it_stands_on():
    command = [sys.executable, "-m", "mechtut", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(
        r"mechtut \d.*Python \d.*torch \d.*transformers \d", said, re.DOTALL
    )
