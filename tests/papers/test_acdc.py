"""ACDC: the engine against slower ways, families, properties, resuming, results,
hostile input.
"""

import json
import random

import pytest
import torch
from families import IN_CIRCUITS, different, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_circuit import slow_logits

from mechtut.circuits import drawing
from mechtut.circuits.circuit import (
    Circuit,
    Roc,
    evaluate_circuit,
    pessimistic_auc,
    roc,
)
from mechtut.circuits.graph import (
    Edge,
    Graph,
    Order,
    check_edges,
    feeds,
    layer_of,
    parse_order,
    visits,
)
from mechtut.circuits.metrics import (
    BoundMetric,
    Metric,
    docstring,
    find_positions,
    greater_than,
    logit_diff,
    nll,
)
from mechtut.circuits.runs import Contrast, Cuts, circuit_logits, circuit_metric
from mechtut.circuits.search import Pruner
from mechtut.models.loading import load_model
from mechtut.papers.acdc import Rules, acdc, search, sweep
from mechtut.patching.checkpoints import Store

FAMILIES = IN_CIRCUITS
# the search asks the engine, which `test_families_agree...` tests on all: one family of
# each kind, and norms of queries and keys, and attention that can look nowhere
SEARCHED = [*different(IN_CIRCUITS), "qwen3", "gpt_oss"]


def prompts(n=3, length=7, seed=0, first=0):
    g = torch.Generator().manual_seed(seed)
    clean, other = torch.randint(1, 97, (2, n, length), generator=g)
    return clean, torch.where(torch.arange(length) >= first, other, clean)


def model_of(kind="gpt2", dtype=torch.float64, **changes):
    return load_model(tiny(kind, dtype, **changes))


def random_cuts(graph, share, seed):
    draw_number = random.Random(seed)
    return Cuts.only(graph, [e for e in graph.edges if draw_number.random() < share])


# ---- the graph, run


@pytest.mark.parametrize("split_qkv", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_families_agree_with_hugging_faces_own_modules(kind, split_qkv):
    """A random circuit, with every reader's q, k, v and MLP computed by the model's own
    modules.
    """
    model, (clean, corrupted) = model_of(kind), prompts()
    contrast = Contrast(model, clean, corrupted, "kl", "all", split_qkv=split_qkv)
    # RMS norms of these families compute in float32 also in a float64 model
    tolerance = 1e-10 if kind in ("gpt2", "gpt_neox", "opt", "phi") else 2e-4
    full = circuit_logits(contrast, Cuts(contrast.graph))
    assert torch.allclose(full, model.logits(clean), atol=tolerance, rtol=0)
    assert contrast.metric_full == 0 == circuit_metric(contrast, Cuts(contrast.graph))
    for share in (0.5, 0.9):
        cuts = random_cuts(contrast.graph, share, seed=1)
        mine, slow = circuit_logits(contrast, cuts), slow_logits(contrast, cuts)
        assert (mine - full).abs().max() > 1e-2, (
            "the cuts change nothing, so agreement would mean nothing"
        )
        assert torch.allclose(mine, slow, atol=tolerance, rtol=0)


SWITCHED = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    ("phi", {"qk_layernorm": True}),
    ("olmo", {"clip_qkv": 0.3}),
    ("olmoe", {"clip_qkv": 0.3}),
    ("cohere", {"use_qk_norm": False}),
    ("cohere", {"attention_bias": True}),
]


@pytest.mark.parametrize("kind, changes", SWITCHED)
def test_what_a_configuration_switches_is_followed(kind, changes):
    """Norms, clips and biases that only some models of a family have."""
    clean, corrupted = prompts()
    contrast = Contrast(model_of(kind, **changes), clean, corrupted, "kl", "all")
    cuts = random_cuts(contrast.graph, 0.7, seed=1)
    mine, slow = circuit_logits(contrast, cuts), slow_logits(contrast, cuts)
    assert torch.allclose(mine, slow, atol=2e-4, rtol=0)
    plain = Contrast(model_of(kind), clean, corrupted, "kl", "all")
    assert (circuit_logits(plain, cuts) - mine).abs().max() > 1e-2


def test_a_bias_inside_a_post_norm_is_refused():
    with pytest.raises(NotImplementedError, match="logits differ"):
        Contrast(model_of("olmo2", attention_bias=True), *prompts())


@pytest.mark.parametrize("kind", SEARCHED)
def test_search_agrees_with_one_forward_per_edge(kind):
    """The same log as the plain algorithm on every family, in float64."""
    clean, corrupted = prompts(first=3)
    contrast = Contrast(model_of(kind), clean, corrupted)
    circuit = search(contrast, Rules(0.003), progress=False)
    assert circuit.log and 0 < len(circuit.edges) < circuit.n_edges_full
    _replay(contrast, circuit)


def _replay(contrast, circuit, tolerance=2e-9):
    """Make the circuit's cuts in order by plain forward passes and compare every
    number.
    """
    cuts, current = Cuts(contrast.graph), contrast.metric_full
    for step in circuit.log:
        cuts.set(Edge(step.parent, step.child), False)
        metric = circuit_metric(contrast, cuts)
        assert step.metric_without == pytest.approx(metric, abs=tolerance)
        assert step.delta == pytest.approx(metric - current, abs=tolerance)
        if step.kept:
            cuts.set(Edge(step.parent, step.child), True)
        else:
            current = metric


@settings(max_examples=15)
@given(
    layers=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
    length=st.integers(2, 6),
    first=st.integers(0, 5),
    seed=st.integers(0, 99),
    ablation=st.sampled_from(["resample", "zero"]),
    split_qkv=st.booleans(),
    split_positions=st.booleans(),
    where=st.sampled_from(["last", "all", "some"]),
    threshold=st.sampled_from([0.0, 1e-3, 0.02, 0.3]),
)
def test_search_is_exact_on_random_models(
    layers,
    heads,
    length,
    first,
    seed,
    ablation,
    split_qkv,
    split_positions,
    where,
    threshold,
):
    """Every number of every search, whatever the shape, the prompts and the options."""
    model = model_of(n_layer=layers, n_head=heads)
    clean, corrupted = prompts(2, length, seed, min(first, length - 1))
    if torch.equal(clean, corrupted):
        return
    positions = [0, length - 1] if where == "some" else where
    options = {
        "ablation": ablation,
        "split_qkv": split_qkv,
        "split_positions": split_positions,
    }
    contrast = Contrast(model, clean, corrupted, "kl", positions, **options)
    rules = Rules(
        threshold, Order("shuffle", "shuffle", seed), remove_redundant=seed % 2 == 0
    )
    _replay(contrast, search(contrast, rules, progress=False))
    untrimmed = Contrast(
        model, clean, corrupted, "kl", positions, **options, trim=False
    )
    cuts = random_cuts(contrast.graph, 0.7, seed)
    assert circuit_metric(contrast, cuts) == pytest.approx(
        circuit_metric(untrimmed, cuts), abs=1e-12
    )
    assert circuit_metric(contrast, cuts, everything=True) == pytest.approx(
        circuit_metric(contrast, cuts), abs=1e-12
    )


@settings(max_examples=6)
@given(seed=st.integers(0, 999), kind=st.sampled_from(["gpt2", "llama", "gpt_neox"]))
def test_rebuilding_the_state_changes_nothing(seed, kind):
    """After random decisions the pruner's values are those that it computes anew from
    the cuts.
    """
    clean, corrupted = prompts(seed=seed, first=2)
    contrast = Contrast(model_of(kind), clean, corrupted)
    cuts, draw_number = Cuts(contrast.graph), random.Random(seed)
    pruner = Pruner(contrast, cuts)
    for receiver in ("out", *(["m2.in"] if draw_number.random() < 0.5 else [])):
        pruner.begin(receiver)
        for parent in contrast.graph.parents(receiver):
            edge = Edge(parent, receiver)
            if (
                pruner.without([edge])[0] is not None
                and draw_number.random() < 0.5
                and parent != "m2"
            ):
                pruner.accept(edge)
                cuts.set(edge, False)
        pruner.finish(receiver)
    before = {name: x.clone() for name, x in pruner.state.x.items()}
    pruner.rebuild()
    assert before.keys() == pruner.state.x.keys()
    assert all(
        torch.allclose(before[name], x, atol=1e-12)
        for name, x in pruner.state.x.items()
    )


def test_cutting_everything_gives_the_corrupted_run():
    clean, corrupted = prompts()
    for kind in ("gpt2", "llama"):
        model = model_of(kind)
        contrast = Contrast(model, clean, corrupted, "kl", "all")
        nothing = circuit_logits(contrast, Cuts.only(contrast.graph, []))
        assert torch.allclose(
            nothing, model.logits(corrupted), atol=1e-6
        )  # float32 inside Llama's norms
    bias_only = Contrast(model_of(), clean, corrupted, "kl", "all", ablation="zero")
    x = circuit_logits(bias_only, Cuts.only(bias_only.graph, []))
    biases = sum(bias_only.model.part(i, "attn.c_proj").bias for i in range(3))
    # what cancels leaves rounding behind, which the final norm makes 1 / sqrt(1e-5) =
    # 300 times larger
    assert torch.allclose(
        x, bias_only.model.unembed(biases.expand(3, 7, -1)), atol=1e-11
    )


def test_grouped_query_attention_shares_key_and_value_nodes():
    contrast = Contrast(model_of("llama"), *prompts())
    graph = contrast.graph
    assert (graph.count("q"), graph.count("k"), graph.count("v")) == (4, 2, 2)
    assert feeds(graph, "a0.kv1.k") == ["a0.2", "a0.3"] and feeds(graph, "a0.1.q") == [
        "a0.1"
    ]
    both = search(contrast, Rules(0.0), progress=False)
    assert {
        e.child
        for e in both.edges
        if e.child.startswith("a2.") and e.child.endswith("k_in")
    } <= {
        "a2.kv0.k_in",
        "a2.kv1.k_in",
    }
    assert not any(".kv" in node for node in both.nodes)  # heads only
    drawn = drawing.arrows(both.found, graph)
    shared = {child for _, child, part, _ in drawn if part in ("k", "v")}
    alive = {parent for parent, _ in both.found}
    assert shared and shared <= alive and shared & {"a0.1", "a0.3", "a1.1", "a1.3"}
    for page in (both.to_html(), both.to_dot()):
        assert "kv" not in page
    networkx = pytest.importorskip("networkx")
    whole = both.to_networkx()
    assert all(networkx.has_path(whole, node, "out") for node in whole)


def test_attention_only_models_have_no_mlp_nodes():
    hf = tiny("gpt2", torch.float64)
    for block in hf.transformer.h:
        block.mlp.c_proj.weight.data.zero_()
        block.mlp.c_proj.bias.data.zero_()
    graph = Contrast(load_model(hf), *prompts()).graph
    assert not graph.has_mlp and not any(s.startswith("m") for s in graph.senders)


# ---- search


def test_first_difference_and_last_read_position_save_work():
    contrast = Contrast(model_of(), *prompts(length=9, first=4), "kl", [6])
    assert (
        contrast.window.start == 4
        and contrast.window.n_pos == 7
        and contrast.differences.shape[2] == 3
    )


def test_resumes_where_it_stopped(tmp_path, monkeypatch):
    """A search that dies in the middle: the second call tests no stored node again and
    ends with the same numbers to the last bit, the count of its work included.
    """
    model, (clean, corrupted) = model_of(), prompts()
    how = {"threshold": 0.01, "positions": "last", "progress": False}
    how["metric"] = lambda logits: -logits[:, -1, 3].mean()
    fresh, asked, write = acdc(model, clean, corrupted, **how), [], Store.write
    once = Pruner.without

    def count(self, *edges, **options):
        asked.append(1)
        return once(self, *edges, **options)

    def die(self, name, values):
        if name == "part-00001":
            raise KeyboardInterrupt
        write(self, name, values)

    monkeypatch.setattr(Pruner, "without", count)
    monkeypatch.setattr(Store, "write", die)
    with pytest.raises(KeyboardInterrupt):
        acdc(model, clean, corrupted, **how, folder=tmp_path)
    monkeypatch.setattr(Store, "write", write)
    assert len(list(tmp_path.glob("part-*.safetensors"))) == 1
    first, asked[:] = len(asked), []
    resumed = acdc(model, clean, corrupted, **how, folder=tmp_path)
    assert len(asked) > 0 and torch.equal(resumed.decisions, fresh.decisions)
    assert resumed.n_evaluations == fresh.n_evaluations
    assert resumed.log == fresh.log and resumed.metric_final == fresh.metric_final
    asked.clear()
    again = acdc(model, clean, corrupted, **how, folder=tmp_path)
    assert first and not asked and again.n_evaluations == fresh.n_evaluations
    with pytest.raises(ValueError, match="another sweep"):
        acdc(model, clean, corrupted, threshold=0.02, folder=tmp_path, progress=False)


def test_sweep_shares_work_and_changes_nothing():
    model, (clean, corrupted) = model_of(), prompts()
    thresholds = [0.5, 0.02, 0.02001, 0.001]
    shared = sweep(model, clean, corrupted, thresholds, progress=False)
    alone = [
        acdc(model, clean, corrupted, threshold=t, progress=False) for t in thresholds
    ]
    for a, b in zip(shared, alone, strict=True):
        assert [(*s[:2], s.kept) for s in a.log] == [(*s[:2], s.kept) for s in b.log]
        assert [s.delta for s in a.log] == pytest.approx(
            [s.delta for s in b.log], abs=1e-11
        )
        assert a.metric_final == pytest.approx(b.metric_final, abs=1e-11)
    assert sum(c.n_evaluations for c in shared) < sum(c.n_evaluations for c in alone)


def test_zero_threshold_keeps_what_raises_the_metric_and_a_huge_one_keeps_nothing():
    model, (clean, corrupted) = model_of(), prompts()
    none = acdc(model, clean, corrupted, threshold=1e9, progress=False)
    assert none.edges == [] and len(none.log) == len(none.to_pandas()) == 13 + 3
    strict = acdc(model, clean, corrupted, threshold=0.0, progress=False)
    assert all(s.kept == (s.delta >= 0) for s in strict.log)
    both = acdc(model, clean, corrupted, threshold=0.01, abs_value=True, progress=False)
    assert all(s.kept == (abs(s.delta) >= 0.01) for s in both.log)


def test_the_same_twice():
    model, (clean, corrupted) = model_of(), prompts()
    a, b = (
        acdc(model, clean, corrupted, threshold=0.01, order="shuffle:3", progress=False)
        for _ in range(2)
    )
    assert a.log == b.log and torch.equal(a.decisions, b.decisions)


def test_orders():
    graph = Graph(2, 2)
    assert graph.parents("out") == ["m1", "a1.1", "a1.0", "m0", "a0.1", "a0.0", "embed"]
    assert graph.parents("out", parse_order("forward")) == list(graph.senders)
    assert graph.parents("m1.in", parse_order("forward-heads")) == [
        "a1.0",
        "a1.1",
        "m0",
        "a0.0",
        "a0.1",
        "embed",
    ]
    assert graph.parents("out", parse_order("forward-groups"))[0] == "embed"
    assert sorted(graph.parents("out", parse_order("shuffle:5"))) == sorted(
        graph.senders
    )
    assert Graph(1, 1, split_positions=True).parents("out") == [
        "m0",
        "a0.0",
        "tok",
        "pos",
    ]
    assert len(list(visits(graph))) == len(set(visits(graph)))


# ---- results


@pytest.fixture(scope="module")
def circuit():
    return acdc(model_of(), *prompts(), threshold=0.01, progress=False)


def test_save_and_load(circuit, tmp_path):
    again = Circuit.load(circuit.save(tmp_path))
    assert (
        again.log == circuit.log
        and again.edges == circuit.edges
        and again.settings == circuit.settings
    )
    assert (again.metric_full, again.metric_final, again.n_evaluations) == (
        0,
        circuit.metric_final,
        circuit.n_evaluations,
    )
    model, pair = model_of(), prompts()
    assert evaluate_circuit(model, again, *pair) == pytest.approx(
        circuit.metric_final, abs=1e-11
    )
    assert roc([again], circuit.edges).edge_auc == 1


def test_edges_evaluate_to_the_final_metric(circuit):
    model, pair = model_of(), prompts()
    plain = [(e.parent, e.child) for e in circuit.edges]
    assert evaluate_circuit(model, plain, *pair, "kl") == pytest.approx(
        circuit.metric_final, abs=1e-11
    )
    contrast = Contrast(model, *pair)
    assert evaluate_circuit(model, contrast.graph.edges, *pair) == 0
    assert evaluate_circuit(model, contrast.graph.edges, *pair, complement=True) > 0.01
    zero = acdc(
        model,
        *pair,
        threshold=0.01,
        ablation="zero",
        split_positions=True,
        progress=False,
    )
    assert evaluate_circuit(model, zero, *pair) == pytest.approx(
        zero.metric_final, abs=1e-11
    )


def test_ways_out(circuit):
    data = json.loads(circuit.to_json())
    assert [tuple(e.values()) for e in data["edges"]] == [
        tuple(e) for e in circuit.edges
    ] and data["nodes"] == circuit.nodes
    networkx = pytest.importorskip("networkx")
    graph = circuit.to_networkx()
    drawn = [e for *_, e in graph.edges(data="effect") if e is not None]
    assert networkx.is_directed_acyclic_graph(graph) and len(drawn) == len(
        circuit.edges
    )
    assert circuit.to_dot().count("->") == len(drawing.arrows(circuit.edges))
    html = circuit.to_html()
    assert (
        html.count("<path") == len(drawing.arrows(circuit.edges))
        and "<script" not in html
        and "http" not in html
    )
    assert "currentColor" in html and all(
        f"{e.effect:.3g}" in html for e in circuit.edges if e.child == "out"
    )
    assert (
        circuit.plot().get_title() == ""
        and drawing.plot([]) is not None
        and "<svg" in drawing.to_html([])
    )


def test_networkx_is_optional(circuit, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "networkx", None)
    with pytest.raises(ImportError, match="pip install networkx"):
        circuit.to_networkx()


def test_roc_by_hand():
    graph = Graph(1, 1, has_mlp=False)
    truth = [("a0.0", "out"), ("embed", "a0.0.v_in")]
    curve = roc([[("a0.0", "out")], [*truth, ("embed", "out")], []], truth, graph=graph)
    assert (
        curve.edges == ((0, 0), (0, 0), (0, 0.5), (1 / 6, 1), (1, 1))
        and len(graph.edges) == 8
    )
    assert curve.edge_auc == pytest.approx(0.5 + 0.5 * 5 / 6)
    assert pessimistic_auc([(0.0, 0.0), (1.0, 1.0)]) == 0 and isinstance(curve, Roc)
    assert curve.plot() is not None
    with pytest.raises(ValueError, match="graph="):
        roc([truth], truth)
    with pytest.raises(ValueError, match="at least one"):
        roc([], truth, graph=graph)


# ---- metrics


def test_metrics_by_hand():
    logits = torch.tensor([[[1.0, 2.0, 0.5]], [[0.0, 0.0, 3.0]]])
    clean = torch.tensor([[[1.5, 2.0, 0.0]], [[0.0, 1.0, 1.0]]])
    tokens, right, wrong = (
        torch.zeros(2, 4).long(),
        torch.tensor([1, 2]),
        torch.tensor([[0, 2], [1, -1]]),
    )
    p, q = clean[:, 0].softmax(-1), logits[:, 0].softmax(-1)

    def value(metric):
        return BoundMetric(metric, "last", tokens).bind(clean).value(logits)

    assert value("kl") == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))
    assert value("l2") == pytest.approx(float((logits - clean).pow(2).mean()))
    assert value(nll(right)) == pytest.approx(
        -float((q[0, 1].log() + q[1, 2].log()) / 2)
    )
    assert value(logit_diff(right, wrong)) == pytest.approx(((0.75 - 2) + (0 - 3)) / 2)
    assert value(docstring(right, wrong)) == pytest.approx(((1 - 2) + (0 - 3)) / 2)
    assert value(greater_than(right, wrong)) == pytest.approx(
        float((q[0, 0] + q[0, 2] - q[0, 1] + q[1, 1] - q[1, 2]) / 2)
    )
    assert value(lambda x: x.sum()) == pytest.approx(6.5)


@pytest.mark.parametrize(
    "positions",
    ["last", "all", torch.tensor([[True, False], [True, True], [False, True]])],
)
def test_the_metrics_of_several_circuits_are_those_of_each(positions):
    clean, *others = torch.randn(
        5, 3, 2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    right, wrong = torch.tensor([1, 2, 3]), torch.tensor([[0, 5], [1, -1], [6, 4]])
    metrics = [
        "kl",
        "l2",
        nll(right),
        logit_diff(right, wrong),
        greater_than(right[:, None], wrong),
        lambda x: x.exp().sum(),
    ]
    for metric in metrics:
        bound = BoundMetric(metric, positions, torch.zeros(3, 2).long())
        seen = [x[:, bound.columns] for x in (clean, *others)]
        bound.bind(seen[0])
        each = bound.each(torch.cat(seen[1:]), 4)
        assert each == pytest.approx(
            [bound.value(x) for x in seen[1:]], rel=1e-12
        )  # float64


def test_looking_ahead_asks_for_what_a_step_by_step_search_asks_for():
    """Metrics without the first edge, the first two, ...

    in one pass, against one pass each; and what may be accepted.
    """
    model, (clean, corrupted) = model_of(), prompts()
    contrast = Contrast(model, clean, corrupted)
    for node in ("out", "m1.in", "a1.0.v_in"):
        edges = [Edge(parent, node) for parent in contrast.graph.parents(node)]
        ahead, alone = (Pruner(contrast, Cuts(contrast.graph)) for _ in range(2))
        for pruner in (ahead, alone):
            pruner.begin("out")
            if node != "out":
                pruner.finish("out")
                pruner.begin(node)
        many = ahead.without(edges[:3])
        for edge, metric in zip(edges[:3], many, strict=True):
            assert alone.without([edge])[0] == pytest.approx(
                metric, abs=1e-12
            )  # float64
            alone.accept(edge)
        ahead.accept(edges[0]), ahead.accept(edges[1])
        assert ahead.has(node) and ahead.without([edges[2]])[0] == pytest.approx(
            many[2], abs=1e-12
        )
        ahead.without(edges[:3])
        ahead.accept(edges[1])  # not before the first: nobody knows what follows
        assert not ahead.has(node) and ahead.stale
        with pytest.raises(ValueError, match=f"begin {node}"):
            ahead.without(edges[:3])


@pytest.mark.parametrize("kind", SEARCHED)
@pytest.mark.parametrize(
    "length", [5, 60]
)  # with room for several circuits in a pass, and (in all rows) without
def test_heads_whose_only_edges_are_tested_in_one_pass(kind, length):
    """Every group of nodes with one edge each, with random decisions: each number is
    that of a plain forward pass.
    """
    clean, corrupted = prompts(length=length)
    contrast = Contrast(model_of(kind), clean, corrupted, "kl", "last")
    cuts, draw, shared = Cuts(contrast.graph), random.Random(0), 0
    pruner, graph = Pruner(contrast, cuts), contrast.graph
    for receiver in visits(graph):
        if receiver in graph.receiver_index and not receiver.startswith("a0"):
            pruner.begin(receiver)
            pruner.finish(receiver)
    for part in ("v", "k", "q", "v_in", "k_in", "q_in"):
        nodes, stream = (
            [
                n
                for n in visits(graph)
                if n.startswith("a0.") and n.endswith(f".{part}")
            ],
            part.endswith("_in"),
        )
        edges = [Edge(graph.parents(n)[0] if stream else f"{n}_in", n) for n in nodes]
        edges = [
            e
            for e in edges
            if not stream or cuts.has(Edge(e.child, e.child.removesuffix("_in")))
        ]  # heard
        while edges:
            pruner.begin(edges[0].child, [e.child for e in edges[1:]])
            asked = [e for e in edges if pruner.has(e.child)]
            shared += len(asked) > 1
            alone = draw.random() < 0.5
            for edge, found in zip(
                asked, pruner.without(asked, alone=alone), strict=True
            ):
                cuts.set(edge, False)
                assert found == pytest.approx(
                    circuit_metric(contrast, cuts), abs=2e-9
                )  # some norms are in float32
                cuts.set(edge, alone)
            goes = draw.choice(asked) if alone else asked[0]
            for edge in asked:
                cuts.set(edge, edge != goes)
            pruner.accept(goes)
            for edge in asked:
                pruner.finish(edge.child)
            edges = edges[len(asked) :]
    before = {name: x.clone() for name, x in pruner.state.x.items()}
    pruner.rebuild()
    worst = {
        name: float((before[name] - x).abs().max())
        for name, x in pruner.state.x.items()
    }
    assert max(worst.values()) < 1e-6, worst
    assert shared, "nothing was tested together"


def test_positions():
    tokens = torch.zeros(2, 4).long()
    assert find_positions("last", tokens)[0] == [3] and find_positions([0, -1], tokens)[
        0
    ] == [0, 3]
    assert find_positions("all", tokens)[0] == [0, 1, 2, 3]
    for wrong, error in (
        ("first", ValueError),
        (4, IndexError),
        (torch.zeros(2, 4).bool(), ValueError),
        ([], IndexError),
    ):
        with pytest.raises(error):
            find_positions(wrong, tokens)


# ---- hostile input


def test_hostile_prompts_and_options():
    model, (clean, corrupted) = model_of(), prompts()
    for match, args, options in [
        ("pos is 7 here, not 6", (clean, corrupted[:, :-1]), {}),
        ("the same", (clean, clean), {}),
        ("at least 0", (clean, corrupted), {"threshold": -0.1}),
        ("at least 0", (clean, corrupted), {"threshold": float("nan")}),
        ("ablation must be", (clean, corrupted), {"ablation": "mean"}),
        ("unknown order", (clean, corrupted), {"order": "sideways"}),
        ("unknown metric", (clean, corrupted), {"metric": "kll"}),
        ("right tokens", (clean, corrupted), {"metric": "nll"}),
        (
            "labels for 2 prompts",
            (clean, corrupted),
            {"metric": "nll", "labels": torch.tensor([1, 2])},
        ),
        ("return one number", (clean, corrupted), {"metric": lambda x: x[:, -1, 0]}),
        ("is nan", (clean, corrupted), {"metric": lambda x: x.sum() * float("nan")}),
        ("outside 0..96", (clean + 100, corrupted), {}),
        (r"clean must be a tensor \[batch, pos\]", (clean[0], corrupted[0]), {}),
    ]:
        with pytest.raises(ValueError, match=match):
            acdc(model, *args, **{"threshold": 0.1, "progress": False, **options})
    quick = {"threshold": 10.0, "progress": False}
    with pytest.raises(TypeError, match="metric must be a string or a Metric or a fun"):
        acdc(model, clean, corrupted, **quick, metric=3)
    with pytest.raises(TypeError, match="clean must be .* whole numbers"):
        acdc(model, clean.float(), corrupted, **quick)
    found = acdc(model, clean.tolist(), corrupted.numpy(), **quick)
    assert found.log == acdc(model, clean, corrupted, **quick).log


def test_metric_that_fails_on_the_way_is_reported():
    """Finite for the model, infinite once an edge is gone."""
    model, (clean, corrupted) = model_of(), prompts()
    own = model.logits(clean)[:, -1:]
    with pytest.raises(ValueError, match="is inf"):
        acdc(
            model,
            clean,
            corrupted,
            threshold=0.1,
            positions="last",
            progress=False,
            metric=lambda x: torch.where(
                torch.allclose(x, own) * torch.ones(()) > 0, 0.0, torch.inf
            ),
        )


def test_unknown_nodes_and_families():
    model, (clean, corrupted) = model_of(), prompts()
    with pytest.raises(ValueError, match=r"no node 'a0.7'; did you mean"):
        evaluate_circuit(model, [("a0.7", "out")], clean, corrupted)
    with pytest.raises(ValueError, match="a2.0 does not feed a0.0.q_in"):
        evaluate_circuit(model, [("a2.0", "a0.0.q_in")], clean, corrupted)
    with pytest.raises(ValueError, match="not the name of a node"):
        layer_of("b0.1")
    with pytest.raises(NotImplementedError, match="gptj does not look its attention"):
        acdc(model_of("gptj"), clean, corrupted, threshold=0.1)
    with pytest.raises(NotImplementedError, match="phi3 keeps its queries"):
        acdc(model_of("phi3"), clean, corrupted, threshold=0.1)
    with pytest.raises(ValueError, match="no learned position embedding"):
        acdc(model_of("llama"), clean, corrupted, threshold=0.1, split_positions=True)
    assert check_edges(Graph(1, 1), [("embed", "out", 3.0)]) == [Edge("embed", "out")]


def test_a_model_that_the_wiring_does_not_describe_is_refused():
    hf = tiny("gpt2", torch.float64)
    hf.transformer.h[1].attn.register_forward_hook(
        lambda m, a, out: (out[0] * 1.5, *out[1:])
    )
    with pytest.raises(NotImplementedError, match="differ from"):
        Contrast(load_model(hf), *prompts())


def test_metric_objects_check_their_labels():
    with pytest.raises(ValueError, match="right and wrong"):
        Metric("logit_diff")
    with pytest.raises(ValueError, match="without labels"):
        Metric("kl", (torch.zeros(1),))


def test_worthless_circuits_and_relative_thresholds():
    model, pair = model_of("gpt2"), prompts()
    contrast = Contrast(model, *pair)
    empty = circuit_metric(contrast, Cuts.only(contrast.graph, []))
    with pytest.warns(UserWarning, match="says nothing: (no path|its metric)") as told:
        worthless = acdc(model, *pair, threshold=100.0, progress=False)
    assert len(told) == len(worthless.problems) == 2
    for found in (worthless.settings["metric_empty"], worthless.metric_final):
        assert found == pytest.approx(empty, abs=1e-12)
    share = acdc(model, *pair, threshold=0.1, relative=True, progress=False)
    plain = acdc(model, *pair, threshold=0.1 * empty, progress=False)
    assert share.found == plain.found
    assert share.threshold == pytest.approx(0.1 * empty)
    assert not share.problems
    (again,) = sweep(model, *pair, [0.1], relative=True, progress=False)
    assert again.found == share.found
