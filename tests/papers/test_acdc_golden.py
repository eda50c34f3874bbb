"""Agreement with the authors' ACDC code, decision by decision, on every run."""

import pytest
import torch
from golden_acdc import (
    CANONICAL,
    EAP,
    NUMBERS,
    RUNS,
    TRACR,
    acdc_model,
    golden_contrast,
    golden_rules,
    prompts,
)

from mechtut.circuits.attribution import attribution_scores
from mechtut.circuits.circuit import counts, node_counts, roc
from mechtut.circuits.graph import Graph, check_edges, visits
from mechtut.circuits.runs import Cuts, circuit_metric
from mechtut.papers.acdc import search

TRACR_SHAPES = {
    "tracr-xproportion": (2, 1),
    "tracr-reverse": (4, 1),
    "docstring": (4, 8),
    "ioi": (12, 12),
    "greaterthan": (12, 12),
}


@pytest.mark.parametrize("tag", RUNS)
def test_every_decision(tag):
    """The same edges in the same order with the same decisions; float64 agrees to
    1e-12, float32 to its rounding.
    """
    run = RUNS[tag]
    contrast = golden_contrast(run)
    circuit = search(contrast, golden_rules(run))
    exact = run["dtype"] == "float64"
    assert (
        exact or run["margin"] > 1e-5 or run["model"] == "tracr_xproportion"
    )  # so no decision hangs on rounding
    assert [(s.parent, s.child, int(s.kept)) for s in circuit.log] == [
        (p, c, k) for p, c, _, _, k in run["log"]
    ]
    assert {(e.parent, e.child) for e in circuit.edges} == {
        tuple(e) for e in run["edges"]
    }
    # 1e-12 is the acceptance in float64; logits of size 10 have float32 steps of 1e-6,
    # and a metric sums a few of them
    tolerance = 1e-12 if exact else 5e-6
    for step, (_, _, metric, delta, _) in zip(circuit.log, run["log"], strict=True):
        assert step.delta == pytest.approx(delta, abs=tolerance)
        assert step.metric_without == pytest.approx(metric, abs=tolerance)
    assert circuit.metric_full == pytest.approx(run["metric_full"], abs=1e-14)
    assert circuit.metric_final == pytest.approx(run["metric_final"], abs=tolerance)
    assert circuit.n_edges_full == run["n_edges_full"]


@pytest.mark.parametrize("name", ["attn2l_ind", "attn2l_rand", "mlp2l_rand"])
def test_float32_makes_the_same_decisions(name):
    """The float64 runs repeated in float32: the same log wherever the run's margin is
    above 1e-5.
    """
    for run in RUNS.values():
        if run["model"] == name and run["dtype"] == "float64" and run["margin"] > 1e-5:
            circuit = search(golden_contrast(run, torch.float32), golden_rules(run))
            assert [(s.parent, s.child, int(s.kept)) for s in circuit.log] == [
                (p, c, k) for p, c, _, _, k in run["log"]
            ]


def test_every_kind_of_run_is_here():
    """The reference covers what these tests claim to cover."""
    seen = {
        key: {str(r[key]) for r in RUNS.values()}
        for key in ("metric", "zero", "abs_value", "remove_redundant")
    }
    assert seen["metric"] == {
        "kl_last",
        "kl_all",
        "kl_masked",
        "nll_masked",
        "match_nll_masked",
        "l2_0",
    }
    assert all(
        seen[key] == {"True", "False"}
        for key in ("zero", "abs_value", "remove_redundant")
    )
    assert {(r["names_mode"], r["indices_mode"]) for r in RUNS.values()} == {
        ("normal", "normal"),
        ("normal", "reverse"),
        ("reverse", "normal"),
        ("reverse", "reverse"),
    }


@pytest.mark.parametrize("name", ["attn2l_ind", "attn2l_rand", "mlp2l_rand"])
def test_models_are_those_of_the_reference(name):
    """Sums over the reference's logits, for clean and corrupted prompts."""
    model, data = acdc_model(name), prompts(name)
    for side in ("clean", "corrupted"):
        logits = model.logits(data[side])
        last, size, first = NUMBERS["data"][name]["logits_sum"][f"{side}_logits"]
        assert float(logits[:, -1].sum()) == pytest.approx(last, abs=1e-9)
        assert float(logits.abs().sum()) == pytest.approx(size, rel=1e-12)
        assert logits[0, -1, :5].tolist() == pytest.approx(first, abs=1e-11)


def test_full_graph_is_the_clean_run():
    """KL of the full graph is zero in every bit, also in float32."""
    for tag in (
        "attn2l_ind-kl_masked-t0.1-f32",
        "mlp2l_rand-kl_all-t0.01-f64-use_pos_embed=True",
    ):
        contrast = golden_contrast(RUNS[tag])
        assert (
            contrast.metric_full == 0 == circuit_metric(contrast, Cuts(contrast.graph))
        )


def test_visited_nodes_are_a_subsequence_of_the_visiting_order():
    for run in RUNS.values():
        config = NUMBERS["models"][run["model"]]["config"]
        graph = Graph(
            config["n_layers"],
            config["n_heads"],
            has_mlp=not config["attn_only"],
            split_positions=run["use_pos_embed"],
        )
        order = iter(visits(graph))
        assert all(node in order for node in run["nodes_visited"])
        assert len(graph.edges) == run["n_edges_full"]


@pytest.mark.parametrize("task", CANONICAL)
def test_canonical_circuits(task):
    """The published circuits are made of edges of our graph, and there are as many of
    everything as the authors count.
    """
    circuit, (n_layers, n_heads) = CANONICAL[task], TRACR_SHAPES[task]
    graph = Graph(
        n_layers,
        n_heads,
        has_mlp=task != "docstring",
        split_positions=len(circuit["edges"]) < 40,
    )
    graph = (
        graph
        if len(graph.edges) == circuit["n_edges_full"]
        else Graph(n_layers, n_heads, has_mlp=task != "docstring")
    )
    assert (len(graph.edges), len(graph.direct)) == (
        circuit["n_edges_full"],
        circuit["n_direct"],
    )
    edges = check_edges(graph, circuit["edges"])
    assert len(set(edges)) == circuit["truth_edges"]
    nodes = node_counts(edges, edges, graph, merge_qkv=False)
    assert (nodes.positives, nodes.positives + nodes.negatives) == (
        circuit["truth_nodes"],
        circuit["n_nodes_full"],
    )
    assert nodes.true_positive == nodes.positives and nodes.false_positive == 0


@pytest.mark.parametrize("ablation", ["zero", "resample"])
def test_compiled_proportion(ablation):
    """Counts, metric and AUC of the sweep on the compiled model: 10 of 10 edges and no
    false one with zero ablation.
    """
    reference, truth = (
        TRACR[f"proportion-{ablation}"],
        CANONICAL["tracr-xproportion"]["edges"],
    )
    run = next(
        r
        for r in RUNS.values()
        if r["model"] == "tracr_xproportion" and r["zero"] == (ablation == "zero")
    )
    contrast, circuits = golden_contrast(run), []
    for row in reference["rows"]:
        circuit = search(contrast, golden_rules({**run, "threshold": row["threshold"]}))
        circuits.append(circuit)
        found, nodes = (
            count(circuit.found, truth, contrast.graph)
            for count in (counts, _split_nodes)
        )
        assert (found.true_positive, found.false_positive) == (
            row["edge"]["true positive"],
            row["edge"]["false positive"],
        )
        assert (nodes.true_positive, nodes.false_positive) == (
            row["node"]["true positive"],
            row["node"]["false positive"],
        )
        assert circuit.metric_final == pytest.approx(row["metric_final"], abs=1e-6)
    curve = roc(circuits, truth, merge_qkv=False)
    assert (curve.edge_auc, curve.node_auc) == pytest.approx(
        (reference["auc"]["edge"], reference["auc"]["node"])
    )
    assert roc(circuits, truth).edge_auc == curve.edge_auc


def _split_nodes(found, truth, graph):
    return node_counts(found, truth, graph, merge_qkv=False)


def test_attribution():
    """EAP-IG on inputs. The authors divide the sum over prompts by their number
    although their metric is a mean already.
    """
    data = prompts("attn2l_ind")
    scores = attribution_scores(
        acdc_model("attn2l_ind"),
        data["clean"],
        data["corrupted"],
        "kl",
        positions=data["mask"],
        method="eap-ig-inputs",
        steps=5,
    )
    assert {(parent, child) for parent, child, _ in EAP} == set(scores)
    for parent, child, score in EAP:
        # the reference's scores carry seven digits (it accumulates them in float32)
        assert scores[parent, child] / len(data["clean"]) == pytest.approx(
            score, rel=1e-5, abs=1e-8
        )
