"""Pages of neurons whose tokens, explanations and authors are written by strangers."""

import json
import re

import pytest
import torch
from hostile import TEXTS, Page, same_page

from mechtut.neurons.dashboards import NeuronPage, index_html, tokens_html, write_pages
from mechtut.neurons.records import ActivationRecord, NeuronRecord
from mechtut.neurons.scoring import ScoredExplanation


def a_record(text: str) -> NeuronRecord:
    excerpts = [ActivationRecord([text, "b"], [1.0, v]) for v in (0.5, 0.25, -1.0)]
    return NeuronRecord(1, 2, excerpts[:2], excerpts[2:], quantiles=[excerpts[:1]])


def a_score(text: str) -> ScoredExplanation:
    return ScoredExplanation(
        explanation=text,
        author=text,
        layer=1,
        neuron=2,
        split="valid",
        calibration="linear",
        true=torch.tensor([1.0, 0.0, 0.5, 0.0]),
        simulated=torch.tensor([0.5, 0.0, 0.5, 0.0]),
        tokens=(text, "b", text, "b"),
        lengths=(2, 2),
        n_top=1,
    )


def pages(text: str) -> dict[str, str]:
    record, scored = a_record(text), a_score(text)
    return {
        "tokens": tokens_html([text], [0.5], 1.0),
        "record": NeuronPage(record).html(),
        "scored": NeuronPage(record, scored, other_end=record).html(),
        "notebook": NeuronPage(record, scored)._repr_html_(),
        "index": index_html({(1, 2): scored}, title=text),
    }


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_no_text_becomes_a_part_of_a_page(text):
    harmless = pages("x")
    for name, html in pages(text).items():
        same_page(html, harmless[name])
        assert Page(html).code == Page(harmless[name]).code
    read = "".join(Page(pages(text)["index"]).texts)
    shown = text.replace("\r", "\n").strip("\0\ufeff\n")
    assert read.count(shown) >= 3, "title, heading and explanation are what was said"


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_every_page_can_be_written(text, tmp_path):
    record, scored = a_record(text), a_score(text)
    index = write_pages(tmp_path, {(1, 2): record}, {(1, 2): scored}, title=text)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["1-2.html", "index.html", "scores.json"]
    same_page(index.read_text(encoding="utf-8"), pages("x")["index"])
    (row,) = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert row["explanation"] == text


@pytest.mark.parametrize(
    "place",
    [("<script>", 2), (1, "2'><script>"), ("../../x", 1), (1.5, 2), (-1, 2), (True, 2)],
)
def test_a_place_that_is_none_is_refused_before_anything_is_written(place, tmp_path):
    scored = {place: a_score("x")}
    for make in (
        lambda: index_html(scored),
        lambda: write_pages(tmp_path / "new", {place: a_record("x")}, scored),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(str(place[0])[:3])):
            make()
    assert not (tmp_path / "new").exists()
