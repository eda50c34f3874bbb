"""The pages of the site in their order, as `_quarto.yml` lists them."""

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def sidebars() -> list[dict]:
    """The sections of the site, each with its title and parts; a part has a title (""
    for the pages in front of the first) and the files of its pages.
    """
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    found = []
    for bar in config["website"]["sidebar"]:
        parts: list[dict] = [{"title": "", "pages": []}]
        for item in bar["contents"]:
            if isinstance(item, dict):
                parts.append({"title": item["section"], "pages": item["contents"]})
            else:
                parts[0]["pages"].append(item)
        found.append({"title": bar["title"], "parts": parts})
    return found


def notebooks() -> list[str]:
    """The notebooks among the pages."""
    parts = [part for bar in sidebars() for part in bar["parts"]]
    return [p for part in parts for p in part["pages"] if p.endswith(".ipynb")]
