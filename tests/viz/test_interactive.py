"""Figures to point at: self-contained, safe with any token, and refused when names and
numbers do not fit.
"""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechtut.viz.interactive import (
    bars_by_step,
    explore_heads,
    explore_trace,
    hover_map,
)

TEXT = st.text(min_size=0, max_size=8)


class Cells(HTMLParser):
    """What each cell of a map says."""

    def __init__(self, html):
        super().__init__()
        self.told, self.tags = [], set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "i":
            self.told.append(dict(attrs)["title"])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(TEXT, min_size=1, max_size=4), st.lists(TEXT, min_size=1, max_size=4), TEXT
)
def test_any_token_is_shown_as_it_is(rows, columns, label):
    values = np.arange(len(rows) * len(columns), dtype=float).reshape(
        len(rows), len(columns)
    )
    cells = Cells(hover_map(values, rows, columns, label=label).html)
    named = [
        (r, c, v)
        for r, row in zip(rows, values, strict=True)
        for c, v in zip(columns, row, strict=True)
    ]
    wanted = [f"{r.strip()} · layer {c} · {label} {v:.3f}" for r, c, v in named]
    assert cells.told == wanted
    assert cells.tags <= {"div", "style", "b", "i", "u", "p"}, "a token became a tag"


def test_nothing_comes_from_elsewhere_and_two_maps_do_not_style_each_other():
    one, two = (
        hover_map(np.eye(2) * k, ["a", "b"], ["0", "1"], label="p") for k in (1, 2)
    )
    for figure in (one, two):
        assert not re.search(r"<script|https?:|@import|url\(", figure.html)
    ids = [re.search(r'id="(\w+)"', f.html)[1] for f in (one, two)]
    assert ids[0] != ids[1]


def test_a_map_stays_one_without_its_style_sheet():
    """A notebook that is not trusted drops <style> (JupyterLab's sanitiser); what it
    keeps are style attributes with a list of properties, and titles.
    """
    kept = {"display", "gap", "grid-template-columns", "height", "background", "font"}
    kept |= {"position", "max-width", "overflow-x", "padding-bottom", "box-shadow"}
    kept |= {"font-weight", "text-align", "padding-right", "white-space", "margin"}
    kept |= {"text-decoration"}
    figure = hover_map(np.eye(2), ["a", "b"], ["0", "1"], label="p", marked=[(0, 1)])
    bare = re.sub(r"<style>.*?</style>", "", figure.html, flags=re.DOTALL)
    styles = re.findall(r'style="([^"]*)"', bare)
    used = {rule.split(":")[0].strip() for s in styles for rule in s.split(";")}
    assert used <= kept
    assert re.search(r"display: grid.*repeat\(2, ", bare)
    cells = re.findall(r'<i [^>]*style="([^"]*)" title="([^"]*)"', bare)
    assert len(cells) == 4 and all(
        "height" in s and "background" in s for s, _ in cells
    )


def test_static_picture_page_and_bundle(tmp_path):
    figure = explore_heads(np.array([[0.1, -0.2], [0.0, 0.3]]), [(1, 1)])
    bundle = figure._repr_mimebundle_()
    assert bundle["text/html"] == figure.html and bundle["image/png"].startswith(
        b"\x89PNG"
    )
    assert figure.html in figure.save(tmp_path / "page.html").read_text(
        encoding="utf-8"
    )
    assert Cells(figure.html).told[3] == "head 1 · layer 1 · AIE 0.300"


def test_a_constant_map_and_one_without_effects_have_colours():
    for figure in (
        hover_map(np.ones((1, 2)), ["a"], ["0", "1"], label="p"),
        explore_heads(np.zeros((2, 2))),
    ):
        assert "nan" not in figure.html and figure.png()


def test_a_trace_to_explore():
    from mechtut.mini.world import World
    from mechtut.models.loading import load_model
    from mechtut.papers.causal_tracing import trace

    fact = World().facts[0]
    t = trace(load_model("mini", device="cpu"), fact.prompt, fact.subject, n_samples=1)
    told = Cells(explore_trace(t).html).told
    assert len(told) == t.scores.numel()
    assert told[-1].endswith(f"p({t.answer.strip()}) {float(t.scores[-1, -1]):.3f}")


@pytest.mark.parametrize(
    ("values", "rows", "message"),
    [
        (np.zeros((2, 2)), ["a"], "1 row"),
        (np.array([[np.nan, 0.0]]), ["a"], "finite"),
        (np.zeros(2), ["a"], "shape"),
    ],
)
def test_what_does_not_fit_is_refused(values, rows, message):
    with pytest.raises(ValueError, match=message):
        hover_map(values, rows, ["0", "1"], label="p")


def test_small_values_keep_their_digits():
    figure = hover_map(np.array([[0.00031, -0.0002]]), ["a"], ["0", "1"], label="AIE")
    assert Cells(figure.html).told[0] == "a · layer 0 · AIE 0.00031"
    assert "-0.0002 to 0.0003." in figure.html


@settings(max_examples=30, deadline=None)
@given(
    st.lists(TEXT, min_size=1, max_size=3), st.lists(TEXT, min_size=1, max_size=3), TEXT
)
def test_any_name_of_a_bar_is_shown_as_it_is(steps, bars, label):
    values = np.arange(len(steps) * len(bars), dtype=float).reshape(len(steps), -1)
    figure = bars_by_step(values, steps, bars, label=label, captions=steps)
    cells = Cells(figure.html)
    wanted = [
        f"step {s} · {b} · {label} {v:.2f}"
        for s, row in zip(steps, values, strict=True)
        for b, v in zip(bars, row, strict=True)
    ]
    assert cells.told == wanted
    assert cells.tags <= {"div", "style", "input", "i", "p"}, "a name became a tag"
    assert not re.search(r"<script|https?:|@import|url\(", figure.html)
    handlers = re.findall(r' on\w+="([^"]*)"', figure.html)
    assert len(handlers) == 1 and "scrollLeft" in handlers[0]  # no name gets in


def test_bars_stand_on_one_line_without_their_style_sheet():
    """With what JupyterLab's sanitiser keeps, in a notebook that is not trusted."""
    figure = bars_by_step(
        np.array([[1.0, 4.0], [0.0, 2.0]]),
        ["0", "1"],
        ["a", "b"],
        label="n",
        marked=[1],
    )
    bare = re.sub(r"<style>.*?</style>", "", figure.html, flags=re.DOTALL)
    styles = re.findall(r'style="([^"]*)"', bare)
    used = {rule.split(":")[0].strip() for s in styles for rule in s.split(";")}
    kept = {"display", "gap", "grid-template-columns", "height", "background", "font"}
    kept |= {"max-width", "overflow-x", "padding-bottom", "margin", "width"}
    assert used <= kept
    bars = re.findall(r"<i [^>]*height: (\d+)px; margin: (\d+)px 0 0", bare)
    assert [int(h) for h, _ in bars] == [30, 120, 0, 60]
    assert {int(h) + int(m) for h, m in bars} == {120}
    assert figure.png().startswith(b"\x89PNG")


def test_bars_that_do_not_fit_their_names():
    for values in ([[1.0]], [[-1.0, 1.0]]):
        with pytest.raises(ValueError, match="heights|values have shape"):
            bars_by_step(np.array(values), ["0"], ["a", "b"], label="n")
    with pytest.raises(ValueError, match="equally long"):
        bars_by_step(np.ones((1, 2)), ["0"], ["a", "b"], label="n", captions=["", ""])
