"""Drawings of circuits whose names mean something to HTML, DOT or Matplotlib."""

import re

import matplotlib.pyplot as plt
import pytest
from hostile import TEXTS, same_page

from mechtut.circuits import drawing

# DOT: a quoted string, in which only a backslash hides a quote
QUOTED = r'"((?:[^"\\]|\\.)*)"'


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_dot_takes_names_of_nodes_only_and_quotes_them(text):
    names = [n for n in (text, f"m0{text}") if "." not in n]
    for name in names:
        with pytest.raises(ValueError, match="is not the name of a node"):
            drawing.to_dot([(name, "out", 0.5)])
        found = re.fullmatch(QUOTED, drawing._quoted(name))
        assert found, f"the name leaves its quotes: {name!r}"
        read = re.sub(r"\\(.)", r"\1", found[1])
        assert read == drawing.written(name), "and it is the name"


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_titles_and_names_stay_texts(text):
    edges = [("m0", "a1.0.q_in", 0.5), ("a1.0", "out", 1.0)]
    same_page(drawing.to_html(edges, title=text), drawing.to_html(edges, title="x"))
    ax = drawing.plot(edges, title=text)
    ax.figure.canvas.draw()
    assert ax.get_title() == drawing.written(text)
    plt.close("all")
    for bad in (f"m0{text}", f"a0.0{text}", f"a{text}"):
        for draw in (drawing.to_html, drawing.plot):
            with pytest.raises(ValueError, match="not the name of a node"):
                draw([(bad, "out", 1.0)])


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_a_box_escapes_whatever_it_is_named(text):
    """Names of nodes cannot be like this today; the page does not rely on it."""
    made, plain = (drawing._box(t, 0, 0, []) for t in (text, "x"))
    same_page(made, plain)
    assert re.fullmatch(r"[\w-]*", drawing._id(text), re.ASCII)
    line = drawing._line({text: (0, 0), "out": (0, 1)}, (text, "out", "", 1.0), 1.0)
    same_page(
        line, drawing._line({"x": (0, 0), "out": (0, 1)}, ("x", "out", "", 1.0), 1)
    )


def test_a_notebook_that_is_not_trusted_shows_a_sentence_instead_of_loose_words():
    """Its sanitiser drops <style> and <svg> tags, and keeps `hidden` (JupyterLab)."""
    page = drawing.to_html([("m0", "out", 1.0)], title="one edge")
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "[hidden]{display:block!important}" in style, "with the style it is there"
    assert ".untrusted{display:none}" in style
    bare = page.replace(f"<style>{style}</style>", "")
    hidden = re.search(r"<div hidden>(.*)</div></div>", bare, re.DOTALL)[1]
    assert "m0 → out: 1" in hidden
    seen = re.sub(r"<[^>]*>", " ", bare.replace(hidden, ""))
    assert seen.split()[:4] == ["A", "drawing", "that", "answers"]
    assert "m0" not in seen and "one edge" in seen
