"""Build the documentation site into _site/: `python tools/build_docs.py [--open]`.

`_quarto.yml` is the one source of navigation. From it, the notebooks (with the outputs
that are saved in them), the texts in `docs/` and the docstrings of the package this
script writes the sources of a Jupyter Book into `_build/book/`, lets jupyter-book turn
them into pages with warnings as errors, and checks every internal link. Nothing is
fetched or executed.
"""

import argparse
import json
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

ROOT = Path(__file__).resolve().parents[1]
BOOK, SITE = ROOT / "_build/book", ROOT / "_site"
TEXTS = ("CONTRIBUTING.md", "CHANGELOG.md")
DIRECTIVE = re.compile(r"^#\s*\|\s*[\w-]+.*\n?|^# NBVAL_\w+\n?", re.MULTILINE)
NEVER_SHOWN = re.compile(
    r"^#\s*\|\s*(default_exp\b|include:\s*false)|^# Colab:", re.MULTILINE
)
FOLDED = {
    "hide-cell": re.compile(r"^#\s*\|\s*hide\b", re.MULTILINE),
    "hide-input": re.compile(r"^#\s*\|\s*echo:\s*false", re.MULTILINE),
}


def navigation(config: dict) -> dict:
    """The sidebar of `_quarto.yml` as a Jupyter Book table of contents, with the
    landing page and the API reference.
    """
    parts = []
    for item in config["website"]["sidebar"]["contents"]:
        if isinstance(item, str):
            parts.append(
                {
                    "caption": "Start",
                    "chapters": [{"file": Path(item).with_suffix("").as_posix()}],
                }
            )
        else:
            files = [
                {"file": Path(f).with_suffix("").as_posix()} for f in item["contents"]
            ]
            parts.append({"caption": item["section"], "chapters": files})
            if item["section"] == "Papers":
                pages = [{"file": f"explore/{name}"} for name in browser_pages.TABLES]
                parts.append({"caption": "Explore", "chapters": pages})
    api = sorted(
        p.relative_to(BOOK).with_suffix("").as_posix()
        for p in (BOOK / "api").glob("*.md")
    )
    parts.append(
        {
            "caption": "Reference",
            "chapters": [
                {
                    "file": "api/index",
                    "sections": [{"file": f} for f in api if f != "api/index"],
                },
                {"file": "references"},
            ],
        }
    )
    parts.append(
        {
            "caption": "Project",
            "chapters": [{"file": name.removesuffix(".md")} for name in TEXTS],
        }
    )
    return {"format": "jb-book", "root": "landing", "parts": parts}


def shown(cell: dict) -> dict | None:
    """A notebook cell as the site shows it: no directives, hidden ones folded; None for
    cells that are not shown.
    """
    if cell["cell_type"] != "code":
        return cell
    source = "".join(cell["source"])
    if NEVER_SHOWN.search(source) or not source.strip():
        return None
    tags = [
        *cell["metadata"].get("tags", []),
        *(tag for tag, mark in FOLDED.items() if mark.search(source)),
    ]
    outputs = [relinked(o) for o in cell["outputs"] if o.get("name") != "stderr"]
    return {
        **cell,
        "source": DIRECTIVE.sub("", source).strip(),
        "outputs": outputs,
        "metadata": {"tags": tags},
    }


def relinked(output: dict) -> dict:
    """An output in whose HTML links to notebooks lead to their pages (Sphinx does that
    for text, not for outputs).
    """
    if "text/html" not in output.get("data", {}):
        return output
    page = re.sub(
        r'(href="(?!\w+:)[^"]+)\.ipynb(["#])',
        r"\1.html\2",
        "".join(output["data"]["text/html"]),
    )
    return {**output, "data": {**output["data"], "text/html": page}}


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
        kept for c in notebook["cells"] if (kept := shown(c)) is not None
    ]
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
    (BOOK / "_toc.yml").write_text(
        yaml.safe_dump(navigation(config), sort_keys=False), encoding="utf-8"
    )
    book = yaml.safe_load((ROOT / "docs/_config.yml").read_text(encoding="utf-8"))
    book["title"] = config["website"]["title"]
    book["repository"] = {
        "url": config["website"]["repo-url"],
        "branch": "main",
        "path_to_book": "",
    }
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
        page.write_text(
            without_thebe(page.read_text(encoding="utf-8")), encoding="utf-8"
        )
    mathjax(
        SITE / "_static/mathjax"
    )  # not earlier: jupyter-book would load every script below _static on every page
    browser_pages.add(SITE)


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
