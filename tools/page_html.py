"""What is changed in the HTML of the site: in the tables of outputs, before Jupyter
Book reads them, and in its finished pages.
"""

import html
import re
from pathlib import Path

CARD = "/mechtut/_images/readme-1.png"  # the figure of the front page
GAP = re.compile(r"(?<=\S) {2,}(?=\S)")  # between two columns of a printed table
NUMBER = re.compile(r"[-+−±.,%\d\s×e]*\d[-+−±.,%\d\s×e]*")


def plain_table(text: str) -> str:
    """A pandas table without its column of row numbers, with one row of names above
    it, and with text aligned left.

    >>> plain_table("<tr><th>0</th><td>yes</td></tr><tr><th>1</th><td>-0.0</td></tr>")
    '<tr><td class="text">yes</td></tr><tr><td>0.0</td></tr>'
    """
    if "<tr" not in text:
        return text
    head, body, tail = text.rpartition("<tbody>")
    head = _one_row(head)
    first = re.findall(r"<tr[^>]*>\s*<th\b[^>]*>(.*?)</th>", tail)
    corner = re.search(r"<th\b[^>]*>\s*(.*?)\s*</th>", head)
    unnamed = corner is None or not corner[1]  # a named index is no row number
    if unnamed and first and first == [str(i) for i in range(len(first))]:
        tail = re.sub(r"(<tr[^>]*>)\s*<th\b[^>]*>.*?</th>", r"\1", tail)
        head = re.sub(r"(<tr[^>]*>)\s*<th\b[^>]*>\s*</th>", r"\1", head, count=1)

    def aligned(cell: re.Match) -> str:
        if re.fullmatch(r"-0\.?0*", cell[1]):
            return f"<td>{cell[1][1:]}</td>"
        return f'<td class="text">{cell[1]}</td>' if _is_text(cell[1]) else cell[0]

    head = _aligned_names(head, tail)
    tail = re.sub(r"<td>(.*?)</td>", aligned, tail, flags=re.DOTALL)
    return (head + body + tail).replace('border="1" ', "")


def _is_text(cell: str) -> bool:
    return not NUMBER.fullmatch(cell) and cell not in ("", "NaN")


def _one_row(head: str) -> str:
    """pandas writes the names of an index below those of the columns: here they stand
    beside them.
    """
    rows = re.findall(r"<tr[^>]*>.*?</tr>", head, re.DOTALL)
    if len(rows) != 2 or "colspan" in head:
        return head
    above, below = (re.findall(r"<th\b[^>]*>(.*?)</th>", r, re.DOTALL) for r in rows)
    names = []
    for column, index in zip(above, below, strict=True):
        both = f"{index} / {column} →"  # the columns have a name, too
        names.append(both if column and index else column or index)
    cells = "".join(f"<th>{name}</th>" for name in names)
    return head.replace(rows[0], f"<tr>{cells}</tr>").replace(rows[1], "")


def _aligned_names(head: str, tail: str) -> str:
    """The names above a table, aligned as what stands below them."""
    rows = [
        re.findall(r"<td>(.*?)</td>", row, re.DOTALL)
        for row in re.findall(r"<tr[^>]*>(.*?)</tr>", tail, re.DOTALL)
    ]
    columns = list(zip(*rows, strict=False))
    names = re.findall(r"<th\b[^>]*>", head)
    if "colspan" in head or len(names) < len(columns):
        return head
    of_rows = len(names) - len(columns)
    left = [True] * of_rows + [any(map(_is_text, column)) for column in columns]
    marks = iter(left)
    return re.sub(
        r"<th\b([^>]*)>",
        lambda th: f'<th{th[1]} class="text">' if next(marks) else th[0],
        head,
    )


def fold_label(source: str) -> str:
    """What a folded cell says for itself: its title, or what it defines."""
    if form := re.search(r"^#\s*@title ([^{\n]+)", source, re.MULTILINE):
        return form[1].strip()
    names = re.findall(r"^(?:class|def) (\w+)", source, re.MULTILINE)
    public = [name for name in names if not name.startswith("_")] or names
    if public:
        return f"Code of {', '.join(public[:3])}"
    return "Imports" if re.search(r"^(import|from) ", source, re.MULTILINE) else "Code"


def is_running_text(output: str) -> bool:
    """Whether the lines of an output may be broken: not those of a printed table."""
    columns = [line for line in output.splitlines() if len(GAP.findall(line)) > 1]
    return len(columns) < 2


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
    # on the way to the page that the navigation calls so
    page = page.replace('-title">mechtut</p>', '-title">Start here</p>')
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
    picture = address[: address.index("/mechtut/")] + CARD
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
    """Drawings stand in the page itself, where they take its colours, and scroll on a
    phone, as the front page's figure does.
    """

    def inline(image: re.Match) -> str:
        alt, name = re.search(r'alt="([^"]*)"', image[0]), image[1]
        svg = (folder / f"{name}.svg").read_text(encoding="utf-8")
        svg = re.sub(r"<style class=.alone.>.*?</style>\s*", "", svg, flags=re.DOTALL)
        label = alt[1] if alt else name
        named = f'<svg class="drawing" role="img" aria-label="{label}" '
        return f'<span class="drawn">{svg.replace("<svg ", named, 1)}</span>'

    page = re.sub(
        r'<img[^>]*class="figure"[^>]*>', r'<span class="drawn">\g<0></span>', page
    )
    names = "|".join(sorted(file.stem for file in folder.glob("*.svg")))
    return re.sub(rf'<img[^>]*/({names})\.svg"[^>]*>', inline, page)
