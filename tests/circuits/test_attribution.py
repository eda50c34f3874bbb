"""Gradient scores: against finite differences and completeness, selection,
faithfulness, refusals.
"""

import random
import warnings

import pytest
import torch
from families import IN_CIRCUITS, different, tiny

from mechtut.circuits.attribution import (
    EdgeScores,
    Faithfulness,
    attribution_scores,
    contrast_scores,
    faithfulness,
    plot_faithfulness,
    random_scores,
    select,
)
from mechtut.circuits.graph import Edge, feeds, reaches_output
from mechtut.circuits.metrics import logit_diff
from mechtut.circuits.runs import Contrast, Cuts, circuit_metric
from mechtut.models.loading import load_model


def contrast_of(kind="gpt2", metric=None, small=None, **options):
    """Prompts that differ everywhere; with `small`, the corrupted run is that close to
    the clean one.
    """
    g = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(1, 97, (2, 3, 6), generator=g)
    contrast = Contrast(
        load_model(tiny(kind, torch.float64)),
        clean,
        corrupted,
        metric or logit_diff(clean[:, 0], clean[:, 1]),
        **options,
    )
    if small:
        contrast.differences *= small
    return contrast


@pytest.mark.parametrize("split_qkv", [True, False])
@pytest.mark.parametrize("kind", different(IN_CIRCUITS))
def test_eap_is_the_derivative_of_cutting(kind, split_qkv):
    """Where the two runs are very close, cutting an edge changes the metric by its
    score.
    """
    contrast = contrast_of(kind, small=1e-4, split_qkv=split_qkv)
    scores = contrast_scores(contrast, "eap")
    largest = float(scores.scores.abs().max())
    for edge in [*scores.ranked()[:12], *scores.ranked()[100:106]]:
        cuts = Cuts(contrast.graph)
        cuts.set(edge, False)
        measured = circuit_metric(contrast, cuts) - contrast.metric_full
        # second-order terms are 1e-4 of the first; some families' norms compute in
        # float32
        assert measured == pytest.approx(scores[edge], abs=2e-2 * largest), edge


def test_integrated_gradients_are_complete():
    """Over many steps the scores of a group of senders add up to the effect of cutting
    all of its edges.
    """
    contrast = contrast_of()
    graph = contrast.graph
    inputs, activations = (
        contrast_scores(contrast, f"eap-ig-{kind}", 30)
        for kind in ("inputs", "activations")
    )
    for group, tolerance in (
        (["embed"], 0.1),
        (["m1"], 0.05),
        ([f"a1.{h}" for h in range(4)], 0.05),
    ):
        cuts = Cuts(graph)
        cuts.sums[:, [graph.sender_index[s] for s in group]] = False
        effect = circuit_metric(contrast, cuts) - contrast.metric_full
        total = sum(v for (parent, _), v in activations.items() if parent in group)
        assert total == pytest.approx(effect, abs=tolerance * max(1, abs(effect))), (
            group
        )
        if group == ["embed"]:
            assert sum(
                v for (p, _), v in inputs.items() if p == "embed"
            ) == pytest.approx(effect, abs=0.1 * max(1, abs(effect)))


def test_gradients_average_over_both_ends():
    contrast = contrast_of()
    one, both = (
        contrast_scores(contrast, m).scores for m in ("eap", "clean-corrupted")
    )
    start = contrast_scores(
        contrast, "eap-ig-inputs", 1
    ).scores  # one step: the corrupted end
    assert torch.allclose(both, (one + start) / 2, atol=1e-12)


def test_refusals():
    contrast = contrast_of(metric="kl")
    with pytest.raises(ValueError, match="gradient of 'kl' is zero"):
        contrast_scores(contrast, "eap")
    assert contrast_scores(contrast, "eap-ig-inputs").scores.abs().max() > 0
    flat = contrast_of(metric=lambda logits: logits.sum() * 0, positions="last")
    with pytest.raises(ValueError, match="every gradient"):
        contrast_scores(flat, "eap")
    with pytest.raises(ValueError, match="unknown method"):
        contrast_scores(contrast, "gradients")
    with pytest.raises(ValueError, match="steps must be"):
        contrast_scores(contrast, steps=0)
    with pytest.raises(ValueError, match="the same"):
        attribution_scores(contrast.model, contrast.tokens[0], contrast.tokens[0])


def test_selection():
    scores = contrast_scores(contrast_of(), "eap")
    ten = [e for e in select(scores, n=10) if e in scores]
    assert ten == scores.ranked()[:10] and len(select(scores, n=0)) == 0
    carried = {e for e in select(scores, n=10) if e not in scores}
    assert carried == {
        Edge(e.child, e.child.removesuffix("_in"))
        for e in ten
        if e.child.endswith("_in")
    }
    level = abs(scores[ten[-1]])
    assert [e for e in select(scores, threshold=level) if e in scores] == ten
    greedy = [e for e in select(scores, n=30, greedy=True) if e in scores]
    inside = {"out"}
    for parent, child in greedy:
        assert (
            child.split("_")[0].rsplit(".", 1)[0] in inside
            or child.removesuffix(".in") in inside
        )
        inside.add(parent)
    everything = select(scores, n=len(scores), greedy=True)
    assert len([e for e in everything if e in scores]) == len(scores)
    for wrong in ({}, {"n": 1, "threshold": 0.1}):
        with pytest.raises(ValueError, match="either n or threshold"):
            select(scores, **wrong)
    for wrong in ({"n": -1}, {"threshold": -1.0}):
        with pytest.raises(
            ValueError, match="must be a .*number of at least 0, not -1"
        ):
            select(scores, **wrong)


def test_a_greedy_circuit_reaches_shared_keys_through_every_head():
    """Of a group that shares keys and values, any head may be the first one in."""
    contrast = contrast_of("llama")
    graph, found = contrast.graph, {"out"}
    scores = random_scores(graph, seed=3)
    for parent, child in select(scores, n=len(scores), greedy=True):
        if (parent, child) in scores:
            owners = feeds(graph, child.removesuffix("_in")) or [child]
            assert found.intersection(owners), (parent, child)
            found.add(parent)
    assert found >= set(graph.senders)


def test_faithfulness():
    contrast = contrast_of()
    curve = faithfulness(contrast, contrast_scores(contrast, "eap-ig-inputs"))
    assert curve.values[-1] == pytest.approx(1)
    flat = Faithfulness(shares=(0.0, 0.5, 1.0), values=(0.0, 2.0, 1.0), name="x")
    assert (flat.cpr, flat.cmd) == pytest.approx(
        (1.25, 0.75)
    )  # trapezoids of f and |1 - f|
    assert plot_faithfulness([curve, flat]) is not None and len(curve.to_pandas()) == 10
    contrast.metric_full = circuit_metric(contrast, Cuts.only(contrast.graph, []))
    with pytest.raises(ValueError, match="no scale"):
        faithfulness(contrast, random_scores(contrast.graph))


def test_scores_are_a_result(tmp_path):
    scores = contrast_scores(contrast_of(), "eap")
    again = EdgeScores.load(scores.save(tmp_path))
    assert (
        dict(again.items()) == dict(scores.items())
        and again.ranked() == scores.ranked()
    )
    assert (
        random_scores(contrast_of().graph, 1).ranked()
        != random_scores(contrast_of().graph, 2).ranked()
    )


def test_a_circuit_that_leads_nowhere_says_so():
    contrast = contrast_of()
    graph = contrast.graph
    names = graph.sums
    strong = {("embed", "a0.0.q_in"), ("a0.1", "m0.in"), ("m1", "out")}
    values = torch.tensor([float(n in strong) for n in names], dtype=torch.float64)
    direct = tuple((e.parent, e.child) for e in graph.direct)
    scores = EdgeScores(names=names, scores=values, direct=direct, method="mine")
    with pytest.warns(UserWarning, match="no path leads through the 4 selected edges"):
        found = select(scores, n=3)
    empty = circuit_metric(contrast, Cuts.only(graph, []))
    assert circuit_metric(contrast, Cuts.only(graph, found)) == pytest.approx(empty)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select(scores, n=len(scores))
        select(scores, n=0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("split", [True, False])
def test_reaching_the_output_is_what_the_metric_sees(kind, split):
    """Where no path leads to the output the metric is the empty circuit's."""
    contrast = contrast_of(kind, split_qkv=split)
    graph, random_edges = contrast.graph, random.Random(0)
    empty = circuit_metric(contrast, Cuts.only(graph, []))
    answers = []
    for n in (2, 10, 20, 40, 60, 80, 100, 150) * 3:
        edges = random_edges.sample(graph.edges, min(n, len(graph.edges)))
        reaches = reaches_output(graph, edges)
        metric = circuit_metric(contrast, Cuts.only(graph, edges))
        assert reaches or abs(metric - empty) < 1e-9
        assert not reaches or abs(metric - empty) > 1e-9
        answers.append(reaches)
    assert len(set(answers)) == 2
