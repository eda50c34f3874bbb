"""Write README.md from nbs/index.ipynb: text as it is, code with its printed output,
figures as files.

`python tools/readme.py` writes, `python tools/readme.py --check` only says whether the
two agree.
"""

import base64
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from page_html import alternative

ROOT = Path(__file__).resolve().parents[1]
FIGURES = "docs/figures"
DIRECTIVE = re.compile(r"^#\s*\|.*\n?|^# NBVAL_\w+\n?", re.MULTILINE)
HIDDEN = re.compile(r"^#\s*\|\s*(hide|default_exp)\b", re.MULTILINE)


def text_of(value: str | list[str]) -> str:
    """Notebook files keep a text as one string or as a list of lines."""
    return value if isinstance(value, str) else "".join(value)


def code(cell: dict, figures: dict[str, bytes]) -> str:
    """A code cell and what it printed; pictures are added to `figures` and linked."""
    source = text_of(cell["source"])
    tags = cell.get("metadata", {}).get("tags", [])
    silent = {"remove-input", "hide-input"} & set(tags) or "#| echo: false" in source
    if HIDDEN.search(source) or {"remove-cell", "hide-cell"} & set(tags):
        return ""
    parts = []
    if not silent:
        parts.append(f"```python\n{DIRECTIVE.sub('', source).strip()}\n```")
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            name = f"{FIGURES}/readme-{len(figures) + 1}.png"
            figures[name] = base64.b64decode(text_of(data["image/png"]))
            parts.append(f"![{alternative(source)}]({name})")
        elif "text/markdown" in data:
            parts.append(text_of(data["text/markdown"]).strip())
        elif text := text_of(data.get("text/plain", output.get("text", ""))).rstrip():
            parts.append(f"```\n{text}\n```")
    return "\n\n".join(parts)


def convert(notebook: dict) -> tuple[str, dict[str, bytes]]:
    """README text and the figure files it links to."""
    figures: dict[str, bytes] = {}
    parts = [
        "<!-- Written by tools/readme.py from nbs/index.ipynb: change that file. -->"
    ]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append(text_of(cell["source"]).strip())
        elif cell["cell_type"] == "code":
            parts.append(code(cell, figures))
    return "\n\n".join(p for p in parts if p) + "\n", figures


def main() -> None:
    text, figures = convert(
        json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))
    )
    files = {"README.md": text.encode(), **figures}
    if "--check" in sys.argv:
        stale = [
            f
            for f, data in files.items()
            if not (ROOT / f).is_file() or (ROOT / f).read_bytes() != data
        ]
        if stale:
            sys.exit(
                f"not as nbs/index.ipynb has it: {', '.join(stale)}. Run `python"
                " tools/readme.py`."
            )
        return
    for old in (ROOT / FIGURES).glob("readme-*.png"):
        old.unlink()
    for name, data in files.items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_bytes(data)


if __name__ == "__main__":
    main()
