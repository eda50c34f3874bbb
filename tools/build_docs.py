"""Build the documentation site into _site/: `python tools/build_docs.py [--open]`.

`_quarto.yml` is the one source of navigation. From it, the notebooks (with the outputs
that are saved in them), the texts in `docs/` and the docstrings of the package this
script writes the sources of a Jupyter Book into `_build/book/`, lets jupyter-book turn
them into pages with warnings as errors, and checks every internal link. No notebook
is executed; ONNX Runtime Web is fetched once (`tools/vendor.py`).
"""

import argparse
import base64
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import webbrowser
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

sys.path.insert(0, str(Path(__file__).parent))
import browser_pages
from api_pages import api_pages
from navigation import sidebars
from page_html import (
    alternative,
    finished,
    fold_label,
    is_running_text,
    plain_table,
)

ROOT = Path(__file__).resolve().parents[1]
DRAWINGS = ROOT / "docs/_static/drawings"
BOOK, SITE = ROOT / "_build/book", ROOT / "_site"
ADDRESS = "https://mechtut.github.io/mechtut/"
TEXTS = ("CONTRIBUTING.md", "CHANGELOG.md")
TITLES = {"nbs/index": {"title": "Start here"}}  # in the navigation
# Minutes that a page of the library or a guide takes on one core of a laptop, where it
# is not under a minute. Papers and README state their own.
MINUTES = {"nbs/library/mini/training": 1, "nbs/library/patching/attribution": 1}
WIDE = 500  # pixels; a wider picture scrolls on a phone
DIRECTIVE = re.compile(r"^#\s*\|.*\n?|^# NBVAL_\w+\n?|^#\s*@title.*\n?", re.MULTILINE)
NEVER_SHOWN = re.compile(
    r"^#\s*\|\s*(default_exp\b|include:\s*false)|^# Colab:", re.MULTILINE
)
FOLDED = {
    "hide-cell": re.compile(r"^#\s*\|\s*hide\b", re.MULTILINE),
    "hide-input": re.compile(r"^#\s*\|\s*code-fold", re.MULTILINE),
    "remove-input": re.compile(r"^#\s*\|\s*echo:\s*false", re.MULTILINE),
}


def sections() -> list[dict]:
    """The sections of `navigation.sidebars`, with the pages of the reference, without
    empty parts; pages are named without their suffix.
    """
    found = []
    for bar in sidebars():
        parts = []
        for part in bar["parts"]:
            parts += api_parts() if part["pages"] == ["api/*"] else [part]
        for part in parts:
            part["pages"] = [Path(p).with_suffix("").as_posix() for p in part["pages"]]
        found.append({**bar, "parts": [p for p in parts if p["pages"]]})
    return found


def api_parts() -> list[dict]:
    """The pages of the reference, by package."""
    parts: dict[str, list[str]] = {"": ["api/index.md"]}
    last: dict[str, list[str]] = {"viz": []}
    for file in sorted((BOOK / "api").glob("*.md")):
        package, dot, _ = file.stem.partition(".")
        if file.stem == "index":
            continue
        alone = not dot or package == "viz"  # as in the library's part of _quarto.yml
        where = last if alone else parts
        title = "viz" if alone else package
        where.setdefault(title, []).append(f"api/{file.stem}.md")
    return [{"title": t, "pages": pages} for t, pages in {**parts, **last}.items()]


def contents(found: list[dict]) -> dict:
    """The table of contents of the Jupyter Book, which makes the order of the pages."""
    parts = []
    for section in found:
        pages = [p for part in section["parts"] for p in part["pages"]]
        chapters = [{"file": page, **TITLES.get(page, {})} for page in pages]
        parts.append({"caption": section["title"], "chapters": chapters})
    return {"format": "jb-book", "root": "index", "parts": parts}


def title(page: str) -> str:
    """Title of a page of the book, without the package's name in front."""
    if page in TITLES:
        return TITLES[page]["title"]
    file = BOOK / page
    if (notebook := file.with_name(f"{file.name}.ipynb")).is_file():
        first = json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]
        text = "".join(first["source"])
    else:
        text = file.with_name(f"{file.name}.md").read_text(encoding="utf-8")
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    assert found, f"{page} has no title"
    return found[1].strip("`").removeprefix("mechtut.")


def summary(page: str) -> str:
    """The line under the title of a notebook, as plain text."""
    first = json.loads((BOOK / f"{page}.ipynb").read_text(encoding="utf-8"))["cells"][0]
    found = re.search(r"^> (.+?)(?:\n\n|\Z)", "".join(first["source"]), re.M | re.S)
    return " ".join(found[1].replace("\n> ", " ").split()) if found else ""


def running_time(page: str) -> str:
    """About how long the cells of a page take."""
    minutes = MINUTES.get(page, 0)
    return f"{minutes} minute{'s' * (minutes > 1)}" if minutes else "under a minute"


def with_running_time(first: str, page: str) -> str:
    """The first cell of a page, with the time below the line under its title."""
    said = f"*Runs in {running_time(page)} on one core of a laptop.*"
    return re.sub(r"^> .+(?:\n> .+)*", rf"\g<0>\n\n{said}", first, count=1, flags=re.M)


def library_page(found: list[dict]) -> str:
    """The overview of the library: every package, every module, a line each."""
    lines = ["# Library", ""]
    lines += ["> What the papers are made of, and what you can make your own of.", ""]
    lines += ["Each page is a notebook and a module of the same name. The lowest come"]
    lines += [
        "first; a package imports only what stands above it. A page runs in under a"
    ]
    lines += ["minute on one core of a laptop, unless it says more here.", ""]
    (section,) = (s for s in found if s["title"] == "Library")
    for part in section["parts"]:
        if part["title"]:
            what = importlib.import_module(f"mechtut.{part['title']}").__doc__ or ""
            lines += [f"## {part['title']}", "", what.strip().splitlines()[0], ""]
        for page in part["pages"]:
            if page != "library":
                more = f" *{running_time(page)}*" if page in MINUTES else ""
                lines.append(f"- [{title(page)}]({page}.ipynb): {summary(page)}{more}")
        lines.append("")
    return "\n".join(lines)


def shown(cell: dict, page: Path) -> dict | None:
    """A notebook cell as the site shows it: no directives, hidden ones folded; None for
    cells that are not shown.
    """
    if cell["cell_type"] != "code":
        return {**cell, "source": local_links("".join(cell["source"]), page)}
    source = "".join(cell["source"])
    if NEVER_SHOWN.search(source) or not source.strip():
        return None
    tags = [
        *cell["metadata"].get("tags", []),
        *(tag for tag, mark in FOLDED.items() if mark.search(source)),
    ]
    about: dict = {"image": {"alt": alternative(source)}}
    about["code_prompt_show"] = about["code_prompt_hide"] = fold_label(source)
    outputs = [o for o in cell["outputs"] if o.get("name") != "stderr"]
    if all(is_running_text(printed(o)) for o in outputs):
        tags.append("wrap")
    outputs = [site_output(o, page, about["image"]) for o in outputs]
    return {
        **cell,
        "source": DIRECTIVE.sub("", source).strip(),
        "outputs": outputs,
        "metadata": {"tags": tags, "mystnb": about},
    }


def printed(output: dict) -> str:
    """The text of an output that is shown as text."""
    data = output.get("data", {})
    if "text/html" in data or "image/png" in data:
        return ""
    return "".join(output.get("text", data.get("text/plain", "")))


def local_links(text: str, page: Path) -> str:
    """Links to other pages of the site become relative, so that Sphinx checks them.

    In the notebooks they are absolute, because Colab knows no other files. The badge of
    Colab is a picture from another host, and each page has a button for it.
    """

    def relative(link: re.Match) -> str:
        path, fragment = Path(link[1]), link[2] or ""
        if path.suffix == ".html":
            notebook = (ROOT / path).with_suffix(".ipynb")
            path = path.with_suffix(".ipynb" if notebook.is_file() else ".md")
        return f"]({Path(os.path.relpath(path, page.parent)).as_posix()}{fragment})"

    text = re.sub(r"\[!\[[^\]]*\]\([^)]*colab-badge[^)]*\)\]\([^)]*\)\n*", "", text)
    return re.sub(rf"\]\({re.escape(ADDRESS)}([^)#\s]+)(#[^)\s]+)?\)", relative, text)


def site_output(output: dict, page: Path, image: dict) -> dict:
    """An output with relative links and plain tables; wide pictures are marked."""
    data = output.get("data", {})
    if "image/png" in data:
        png = base64.b64decode("".join(data["image/png"]))
        width = int.from_bytes(png[16:20], "big")
        if width > WIDE:
            image["classes"] = "wide"
    if "text/html" not in data:
        return output
    up = os.path.relpath(".", page.parent)
    text = "".join(data["text/html"]).replace(f'"{ADDRESS}', f'"{up}/')
    return {**output, "data": {**data, "text/html": plain_table(text)}}


def citation(page: str, bibliography: str) -> str:
    """Keys of the entries of references.bib whose `keywords` name this notebook, as a
    citation; "" if there is none.
    """
    entries = re.findall(r"@\w+\{(\S+),(.*?)\n\}", bibliography, re.DOTALL)
    keys = [
        key
        for key, body in entries
        if re.search(rf"keywords = \{{[^}}]*(?<!\S){page}(?![^\s}}])", body)
    ]
    return (
        f"**Cited here:** {', '.join(f'{{cite:t}}`{k}`' for k in keys)}."
        if keys
        else ""
    )


def write_notebook(path: Path, bibliography: str) -> None:
    """Copy one notebook into the book."""
    notebook = json.loads((ROOT / path).read_text(encoding="utf-8"))
    notebook["cells"] = [
        kept for c in notebook["cells"] if (kept := shown(c, path)) is not None
    ]
    page = path.with_suffix("").as_posix()
    runs = any(
        c["cell_type"] == "code"
        and not {"hide-cell", "remove-input"} & set(c["metadata"]["tags"])
        for c in notebook["cells"]
    )
    if runs and page.startswith(("nbs/library/", "nbs/guides/")):
        first = notebook["cells"][0]
        first["source"] = with_running_time(first["source"], page)
    if text := citation(f"{path.parent.name}/{path.stem}", bibliography):
        notebook["cells"].append(
            {"cell_type": "markdown", "id": "cited", "metadata": {}, "source": text}
        )
    target = BOOK / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(notebook), encoding="utf-8")


def mathjax(target: Path) -> None:
    """Copy MathJax and its fonts out of the sphinx-mathjax-offline package, so that the
    site asks no other host for it.
    """
    spec = find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        sys.exit("sphinx-mathjax-offline is not installed; pip install -e '.[docs]'")
    source = Path(spec.origin).parent / "static/mathjax"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "tex-chtml.js", target)
    shutil.copytree(
        source / "output/chtml/fonts", target / "output/chtml/fonts", dirs_exist_ok=True
    )


def write_book() -> None:
    """Write everything that jupyter-book reads."""
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    shutil.rmtree(BOOK, ignore_errors=True)
    shutil.copytree(ROOT / "docs", BOOK)
    browser_pages.fill(BOOK)
    bibliography = (ROOT / "docs/references.bib").read_text(encoding="utf-8")
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            write_notebook(path.relative_to(ROOT), bibliography)
    for name in TEXTS:
        shutil.copy(ROOT / name, BOOK)
    api_pages(BOOK / "api", config["website"]["repo-url"])
    found = sections()
    (BOOK / "library.md").write_text(library_page(found), encoding="utf-8")
    (BOOK / "_toc.yml").write_text(
        yaml.safe_dump(contents(found), sort_keys=False), encoding="utf-8"
    )
    for section in found:
        for part in section["parts"]:
            part["pages"] = [(page, title(page)) for page in part["pages"]]
    book = yaml.safe_load((ROOT / "docs/_config.yml").read_text(encoding="utf-8"))
    book["title"] = config["website"]["title"]
    book["repository"] = {
        "url": config["website"]["repo-url"],
        "branch": "main",
        "path_to_book": "",
    }
    book["sphinx"]["config"]["html_context"]["sections"] = found
    (BOOK / "_config.yml").write_text(
        yaml.safe_dump(book, sort_keys=False), encoding="utf-8"
    )


def build() -> None:
    """Let jupyter-book make the pages and put them into _site/."""
    command = [
        str(Path(sys.executable).parent / "jupyter-book"),
        "build",
        str(BOOK),
        "-W",
        "-n",
        "--keep-going",
        "--all",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        told = [
            line for line in lines if re.search("WARNING|ERROR|error", line)
        ] or lines[-30:]
        sys.exit("jupyter-book failed:\n" + "\n".join(told))
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(
        BOOK / "_build/html", SITE, ignore=shutil.ignore_patterns(".buildinfo")
    )
    for page in SITE.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        where = page.relative_to(SITE).as_posix()
        page.write_text(finished(text, ADDRESS + where, DRAWINGS), encoding="utf-8")
    mathjax(
        SITE / "_static/mathjax"
    )  # not earlier: jupyter-book would load every script below _static on every page
    browser_pages.add(SITE)


class Page(HTMLParser):
    """The links of one page and the places in it that a link can name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.append(value)
            elif value and name == "id":
                self.places.add(value)


def dead_links() -> list[str]:
    """Every internal link of the site that leads nowhere, as "page: link"."""
    pages = {
        p: Page(p.read_text(encoding="utf-8"))
        for p in SITE.rglob("*.html")
        if "_static" not in p.parts
    }
    dead = []
    for page, parsed in pages.items():
        for link in parsed.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            known = pages.get(target)
            if not target.exists() or (
                url.fragment and known and unquote(url.fragment) not in known.places
            ):
                dead.append(f"{page.relative_to(SITE)}: {link}")
    return sorted(set(dead))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Build the documentation site into _site/."
    )
    parser.add_argument(
        "--open", action="store_true", help="show the site in a browser afterwards"
    )
    args = parser.parse_args()
    write_book()
    build()
    if dead := dead_links():
        sys.exit("dead links:\n  " + "\n  ".join(dead))
    print(
        f"{sum(1 for _ in SITE.rglob('*.html'))} pages in {SITE.relative_to(ROOT)}/, no"
        " warning, no dead internal link"
    )
    if args.open:
        webbrowser.open((SITE / "index.html").as_uri())


if __name__ == "__main__":
    main()
