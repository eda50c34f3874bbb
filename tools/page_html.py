"""What is changed in the HTML of the site: in the tables of outputs, before Jupyter
Book reads them, and in its finished pages.
"""

import html
import re
from pathlib import Path

NUMBER = re.compile(r"[-+−±.,%\d\s×e]*\d[-+−±.,%\d\s×e]*")


def plain_table(text: str) -> str:
    """A pandas table without its column of row numbers, and with text aligned left.

    >>> plain_table("<tr><th>0</th><td>yes</td></tr><tr><th>1</th><td>2.5</td></tr>")
    '<tr><td class="text">yes</td></tr><tr><td>2.5</td></tr>'
    """
    if "<tr" not in text:
        return text
    head, body, tail = text.rpartition("<tbody>")
    first = re.findall(r"<tr[^>]*>\s*<th[^>]*>(.*?)</th>", tail)
    if first and first == [str(i) for i in range(len(first))]:
        tail = re.sub(r"(<tr[^>]*>)\s*<th[^>]*>.*?</th>", r"\1", tail)
        head = re.sub(r"(<tr[^>]*>)\s*<th[^>]*>\s*</th>", r"\1", head, count=1)

    def aligned(cell: re.Match) -> str:
        is_text = not NUMBER.fullmatch(cell[1]) and cell[1] not in ("", "NaN")
        return f'<td class="text">{cell[1]}</td>' if is_text else cell[0]

    tail = re.sub(r"<td>(.*?)</td>", aligned, tail, flags=re.DOTALL)
    return (head + body + tail).replace('border="1" ', "")


def alternative(source: str) -> str:
    """What the figure of a cell shows, in words: its `#| fig-alt:` lines."""
    found = re.search(r"^#\| fig-alt: (.+(?:\n#\|   .+)*)", source, re.MULTILINE)
    return " ".join(re.sub(r"\n#\|\s+", " ", found[1]).split()) if found else "figure"


def finished(page: str, address: str, drawings: Path) -> str:
    """A page as it is published.

    Args:
        page: Its HTML.
        address: Where it will be.
        drawings: Folder of the drawings, which are put into the page itself, so that
            they take its colours.
    """
    page = with_description(with_labels(without_thebe(page)), address)
    return with_drawings(page, drawings)


def without_thebe(page: str) -> str:
    """A page without the scripts for live code: we offer none, and jupyter-book writes
    them twice, so that they fail.
    """
    page = re.sub(
        r"\s*<script>const THEBE_JS_URL.*?</script>", "", page, flags=re.DOTALL
    )
    page = re.sub(r"\s*<script[^>]*sphinx-thebe\.js[^>]*></script>", "", page)
    return re.sub(
        r'\s*<script type="text/x-thebe-config">.*?</script>', "", page, flags=re.DOTALL
    )


def with_labels(page: str) -> str:
    """What a screen reader says is what stands there."""
    page = page.replace(' aria-label="Toggle hidden content"', "")
    return page.replace('<div role="list" class="citation-list">', "<div>")


def with_description(page: str, address: str) -> str:
    """Title, summary and picture for search engines and for those who share a link."""
    article = page[page.find("<article") :]
    quote = re.search(r"<blockquote>\s*<div><p>(.*?)</p>", article, re.DOTALL)
    first = quote or re.search(r"<p>(.*?)</p>", article, re.DOTALL)
    told = re.sub(r"<[^>]+>", "", first[1]) if first else "mechtut"
    told = " ".join(html.unescape(told).split())[:200]
    title = re.search(r"<title>(.*?)</title>", page, re.DOTALL)
    name = " ".join(html.unescape(title[1]).split()) if title else "mechtut"
    picture = address[: address.index("/mechtut/")] + "/mechtut/_static/card.png"
    tags = [
        f'<meta name="description" content="{html.escape(told)}">',
        '<meta property="og:type" content="website">',
        '<meta property="og:site_name" content="mechtut">',
        f'<meta property="og:title" content="{html.escape(name)}">',
        f'<meta property="og:description" content="{html.escape(told)}">',
        f'<meta property="og:url" content="{html.escape(address)}">',
        f'<meta property="og:image" content="{picture}">',
        '<meta name="twitter:card" content="summary_large_image">',
    ]
    return page.replace("</head>", "\n".join(tags) + "\n</head>", 1)


def with_drawings(page: str, folder: Path) -> str:
    """Drawings stand in the page itself, where they take its colours."""

    def inline(image: re.Match) -> str:
        alt, name = re.search(r'alt="([^"]*)"', image[0]), image[1]
        svg = (folder / f"{name}.svg").read_text(encoding="utf-8")
        svg = re.sub(r"<style class=.alone.>.*?</style>\s*", "", svg, flags=re.DOTALL)
        label = alt[1] if alt else name
        return svg.replace(
            "<svg ", f'<svg class="drawing" role="img" aria-label="{label}" ', 1
        )

    names = "|".join(sorted(file.stem for file in folder.glob("*.svg")))
    return re.sub(rf'<img[^>]*/({names})\.svg"[^>]*>', inline, page)
