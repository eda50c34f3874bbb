"""Figures and pages of tokens with a meaning elsewhere: drawn, and as they are."""

import importlib
import inspect
import io
import pkgutil
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hostile import TEXTS, Page, same_page

import mechtut
from mechtut.circuits.attribution import Faithfulness, PositionScores, plot_faithfulness
from mechtut.circuits.circuit import Roc
from mechtut.circuits.heads import HeadReport
from mechtut.neurons.dashboards import scores_by_layer
from mechtut.viz import interactive, plots

pytestmark = pytest.mark.filterwarnings("ignore:Glyph|.*missing from font|.*legend")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def drawn(thing) -> list[str]:
    """Draw it; all texts of the figure."""
    figure = thing if isinstance(thing, plt.Figure) else thing.figure
    figure.savefig(io.BytesIO(), format="png", dpi=30)
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text)]


def a_trace(text: str) -> SimpleNamespace:
    return SimpleNamespace(
        scores=torch.eye(2),
        tokens=[text, text],
        subject_range=(0, 1),
        positions=(0, 1),
        answer=text,
        component="mlp_out",
        window=3,
        corrupted_prob=0.05,
    )


def an_average(text: str) -> SimpleNamespace:
    return SimpleNamespace(
        indirect_effect=torch.eye(2),
        half_width=torch.ones(2, 2),
        roles=(text, "other"),
        component="mlp_out",
        window=3,
        n_facts=7,
    )


def a_table() -> pd.DataFrame:
    return pd.DataFrame({"layer": [0, 1], "top1": 0.5, "low": 0.4, "high": 0.6})


def placed(text: str) -> PositionScores:
    made = PositionScores.__new__(PositionScores)
    scores = {"scores": torch.eye(2), "positions": (0, 1), "names": [("m0", "out")] * 2}
    for name, value in scores.items():
        object.__setattr__(made, name, value)
    return made.plot(tokens=[text, text])


def faithful(text: str):
    made = Faithfulness.__new__(Faithfulness)
    values = {"name": text, "shares": (0.1, 1.0), "values": (0.5, 1.0)}
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return plot_faithfulness([made])


def roc_curve(text: str):
    made = Roc.__new__(Roc)
    object.__setattr__(made, "edges", [(0.0, 0.0), (1.0, 1.0)])
    return made.plot(label=text)


def a_grid(text: str, n_axes: int):
    shape, names = (2,) * n_axes, (text, "head")[:n_axes]
    return plots.grid(
        SimpleNamespace(
            mean=torch.ones(shape),
            half_width=torch.ones(shape),
            axes=names,
            labels=((text, "b"),) * n_axes,
            how="denoising",
        )
    )


FIGURES = {
    "grid": lambda t: a_grid(t, 2),
    "line": lambda t: a_grid(t, 1),
    "heat_map": lambda t: plots.heat_map(np.eye(1), [t], low=0, label=t, xlabel=t),
    "causal_trace": lambda t: plots.causal_trace(a_trace(t)),
    "causal_traces": lambda t: plots.causal_traces([a_trace(t), a_trace(t)]),
    "average_trace": lambda t: plots.average_trace(an_average(t)),
    "average_lines": lambda t: plots.average_lines([an_average(t)]),
    "by_role": lambda t: plots.average_lines([an_average(t)], by_role=True),
    "head_effects": lambda t: plots.head_effects(np.eye(2), label=t),
    "accuracy": lambda t: plots.accuracy_by_layer({t: a_table()}, {t: 0.5}),
    "static": lambda t: interactive.hover_map(np.eye(1), [t], [t], label=t).draw(),
    "static trace": lambda t: interactive.explore_trace(a_trace(t)).draw(),
    "positions": placed,
    "faithfulness": faithful,
    "roc": roc_curve,
    "scores": lambda t: scores_by_layer(pd.DataFrame({"layer": [0], t: [0.5]}), [t]),
}


# enough to break what is not careful; drawing takes a tenth of a second
DRAWN = ["$$", "$x$", r"$\frac{$", r"\frac{", "^_{}%#&~", "<b>", '"', "\x00", "\ud800"]
# the same, in two texts: one that mathtext cannot read, and one that it would change
TOGETHER = [r"$\frac{$", '^_{}%#&~ <b>" \x00 $x_1$ \ud800']


@pytest.mark.parametrize("name", FIGURES)
def test_every_text_can_be_drawn_and_stands_there(name):
    for text in DRAWN if name == "heat_map" else TOGETHER:
        if name == "scores":  # no column of pandas can be called so
            text = text.replace("\ud800", "")
        wanted = plots.written(text.strip() or text)
        assert any(wanted in t for t in drawn(FIGURES[name](text))), text
        plt.close("all")


@pytest.mark.parametrize("name", FIGURES)
def test_latex_never_reads_a_token(name):
    """With `text.usetex`, Matplotlib would hand every label to LaTeX."""
    text = r"\input{/etc/passwd} $x$"
    with matplotlib.rc_context({"text.usetex": True}):
        made = FIGURES[name](text)
    figure = made if isinstance(made, plt.Figure) else made.figure
    texts = figure.findobj(matplotlib.text.Text)
    found = [t for t in texts if "passwd" in t.get_text()]
    assert found and not any(t.get_usetex() or t.get_parse_math() for t in found)


# ---- pages


def pages(text: str) -> dict[str, str]:
    rows, columns = [text, "b"], [text, "1"]
    maps = interactive.hover_map(np.eye(2), rows, columns, label=text, xlabel=text)
    trace = interactive.explore_trace(a_trace(text))
    heads = interactive.explore_heads(np.eye(2), [(0, 0)], label=text)
    report = HeadReport(
        layer=0,
        head=0,
        tokens=(text, "b"),
        pattern=torch.eye(2),
        habits=((text, 0.5, 1, 0.1),),
        promoted=((text, 1.0),),
        demoted=((text, -1.0),),
        read_at=0,
    )
    made = {"hover_map": maps.html, "trace": trace.html, "heads": heads.html}
    return made | {"report": report._repr_html_()}


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_no_text_becomes_a_part_of_an_interactive_page(text, tmp_path):
    for name, html in pages(text).items():
        same_page(html, pages("x")[name])
    figure = interactive.hover_map(np.eye(1), [text], ["0"], label="p")
    page = figure.save(tmp_path / "page.html").read_text(encoding="utf-8")
    told = [v for v in Page(page).values if "layer 0" in v]
    shown = text.encode(errors="replace").decode().strip().replace("\r", "\n")
    # a parser reads NUL and byte order marks as it likes
    assert len(told) == 1 and shown.strip("\0\ufeff\n") in told[0]


COVERED = {
    "circuits.heads.HeadReport._repr_html_",
    "viz.interactive.Interactive._repr_mimebundle_",
    "neurons.dashboards.NeuronPage._repr_html_",
    "neurons.dashboards.NeuronPage.html",
    "neurons.dashboards.index_html",
    "neurons.dashboards.tokens_html",
    "circuits.drawing.to_html",
    "circuits.drawing.to_dot",
    "circuits.circuit.Circuit.to_html",
    "circuits.circuit.Circuit.to_dot",
    "circuits.circuit.Circuit._repr_html_",
}


def test_no_page_escapes_these_tests():
    """Whatever makes HTML, DOT or LaTeX by its name is listed above, and tested here,
    in test_drawing.py or in test_dashboards.py.
    """
    words = ("html", "mimebundle", "dot", "latex", "svg")
    found = set()
    for module in pkgutil.walk_packages(mechtut.__path__, "mechtut."):
        has = importlib.import_module(module.name)
        for name, thing in vars(has).items():
            if getattr(thing, "__module__", "") != module.name:
                continue
            members = vars(thing) if isinstance(thing, type) else {"": thing}
            for key, member in members.items():
                whole = f"{name}.{key}".strip(".")
                last = whole.rpartition(".")[2].strip("_").split("_")
                if inspect.isfunction(member) and set(last) & set(
                    [*words, *("repr " + w for w in words)]
                ):
                    found.add(f"{module.name.removeprefix('mechtut.')}.{whole}")
    assert found == COVERED
