"""Circuits by position: with one span for all positions the rule is ACDC's, and cuts at
one position are what they say.
"""

import pytest
import torch
from families import tiny

from mechtut.circuits.attribution import cut_at
from mechtut.circuits.graph import Edge
from mechtut.circuits.refining import PlacedCuts, RefinedCircuit, refine
from mechtut.circuits.runs import Contrast, Cuts, circuit_metric
from mechtut.models.loading import load_model

FAMILIES = [
    "gpt2",
    "gpt_neox",
    "llama",
    "gemma2",
]  # learned and rotary positions, grouped heads, norms behind attention


def contrast_of(kind="gpt2", differ_from=0, **options):
    """Three pairs of six-token prompts that differ from position `differ_from` on."""
    clean, corrupted = torch.randint(
        1, 97, (2, 3, 6), generator=torch.Generator().manual_seed(0)
    )
    corrupted[:, :differ_from] = clean[:, :differ_from]
    return Contrast(
        load_model(tiny(kind, torch.float64)), clean, corrupted, "kl", **options
    )


def some_edges(contrast, share=0.5):
    """A random circuit."""
    draw = (
        torch.rand(
            len(contrast.graph.edges), generator=torch.Generator().manual_seed(1)
        )
        < share
    )
    return [
        e for e, kept in zip(contrast.graph.edges, draw.tolist(), strict=True) if kept
    ]


@pytest.mark.parametrize("split_qkv", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_edges_at_all_positions_are_edges(kind, split_qkv):
    contrast = contrast_of(kind, differ_from=1, split_qkv=split_qkv)
    edges = some_edges(contrast)
    whole, placed = Cuts.only(contrast.graph, edges), PlacedCuts.of(contrast, edges)
    # float64, some thousand terms in another order; Gemma's norms compute in float32
    assert circuit_metric(contrast, placed) == pytest.approx(
        circuit_metric(contrast, whole), abs=1e-5 if kind == "gemma2" else 1e-10
    )


def test_a_cut_at_one_position():
    contrast = contrast_of()
    for edge in (
        Edge("m2", "out"),
        Edge("a0.1", "m1.in"),
        Edge("embed", "a1.0.k_in"),
        Edge("m0", "a2.1.v_in"),
    ):
        for position in (2, 5):
            cuts = PlacedCuts.of(contrast, contrast.graph.edges)
            cuts.place(edge, [position], False)
            assert circuit_metric(contrast, cuts) == pytest.approx(
                cut_at(contrast, edge, position), abs=1e-12
            )


def test_one_span_is_the_rule_of_acdc():
    """Every decision against a plain loop over whole edges."""
    contrast = contrast_of(differ_from=2)
    edges = [
        e for e in some_edges(contrast, 0.9) if e.child in contrast.graph.receiver_index
    ]
    refined = refine(contrast, edges, 0.01, {"all": range(6)}, progress=False)
    cuts = Cuts.only(contrast.graph, edges)
    current = circuit_metric(contrast, cuts)
    assert refined.metric_before == pytest.approx(current, abs=1e-12)
    for edge, step in zip(edges, refined.log, strict=True):
        cuts.set(edge, False)
        without = circuit_metric(contrast, cuts)
        assert (step.parent, step.child, step.span) == (*edge, "all")
        assert step.delta == pytest.approx(
            without - current, abs=1e-10
        ) and step.kept == (not without - current < 0.01)
        cuts.set(edge, step.kept)
        current = current if step.kept else without
    assert refined.metric_final == pytest.approx(current, abs=1e-10)
    assert 0 < sum(s.kept for s in refined.log) < len(edges)


def test_positions_are_refined(tmp_path):
    contrast = contrast_of(differ_from=2)
    edges = [
        ("m2", "out", 0.5),
        ("m1", "m2.in"),
        ("a0.1.q_in", "a0.1.q"),
        ("embed", "m0.in"),
    ]
    refined = refine(contrast, edges, 0.0, progress=False)
    assert refined.spans == {"2": [2], "3": [3], "4": [4], "5": [5]}
    assert [s[2] for s in refined.tested[:4]] == ["5", "4", "3", "2"]
    assert refined.direct == (("a0.1.q_in", "a0.1.q"),) and len(refined.tested) == 3 * 4
    # "last" is read, and `out` hears of other positions only what attention brings,
    # which is cut
    assert all(s.delta == 0 for s in refined.log if s.child == "out" and s.span != "5")
    again = RefinedCircuit.load(refined.save(tmp_path))
    assert again.log == refined.log and again.spans == refined.spans
    table = refined.to_pandas()
    assert list(table.columns) == [
        "2",
        "3",
        "4",
        "5",
    ] and table.notna().sum().sum() == sum(s.kept for s in refined.log)
    assert len(refined.plot().get_yticklabels()) == len(table)


def test_named_spans_and_the_rest():
    refined = refine(
        contrast_of(differ_from=2),
        [("m2", "out")],
        0.1,
        {"early": [0, 1], "end": [5]},
        progress=False,
    )
    assert refined.spans == {
        "end": [5],
        "other": [2, 3, 4],
    }  # nothing can differ at the early ones


def test_refusals():
    contrast = contrast_of()
    with pytest.raises(
        ValueError, match="threshold must be a number of at least 0, not -1"
    ):
        refine(contrast, [("m2", "out")], -1)
    with pytest.raises(ValueError, match="'other' is what no span names"):
        refine(contrast, [("m2", "out")], 0.1, {"other": [3]})
    with pytest.raises(ValueError, match=r"positions \[3\] are in two spans"):
        refine(contrast, [("m2", "out")], 0.1, {"a": [3], "b": [3, 4]})
    with pytest.raises(
        ValueError, match=r"positions \[9\] .* outside the prompts of 6 tokens"
    ):
        refine(contrast, [("m2", "out")], 0.1, {"a": [9]})
    with pytest.raises(ValueError, match="no node 'm9'"):
        refine(contrast, [("m9", "out")], 0.1)
