"""Masks on nodes, head importance and subnetwork probing: against naive forwards,
finite differences and known circuits.
"""

import pytest
import torch
from families import IN_CIRCUITS, POST_NORM, different, tiny

from mechtut.circuits import known
from mechtut.circuits.attribution import faithfulness, select
from mechtut.circuits.baselines import (
    NodeScores,
    Subnetwork,
    edge_scores,
    hard_concrete,
    head_importance,
    maskable,
    masked_logits,
    node_circuit,
    share_open,
    subnetwork_probing,
)
from mechtut.circuits.circuit import evaluate_circuit, node_counts, roc
from mechtut.circuits.metrics import logit_diff
from mechtut.circuits.runs import Contrast, Cuts, circuit_metric
from mechtut.models.loading import load_model


def contrast_of(kind="gpt2", metric=None, differ_from=2, **options):
    clean, corrupted = torch.randint(
        1, 97, (2, 3, 6), generator=torch.Generator().manual_seed(0)
    )
    corrupted[:, :differ_from] = clean[:, :differ_from]
    metric = metric or logit_diff(clean[:, 0], clean[:, 1])
    return Contrast(
        load_model(tiny(kind, torch.float64)), clean, corrupted, metric, **options
    )


def metric_at(contrast, masks):
    return float(contrast.metric(masked_logits(contrast, masks)).detach())


def some_nodes(graph, every=2):
    names = maskable(graph)
    draw = torch.randperm(
        len(names), generator=torch.Generator().manual_seed(1)
    ).tolist()
    return [names[i] for i in draw[: len(names) // every]]


@pytest.mark.parametrize("ablation", ["resample", "zero"])
@pytest.mark.parametrize("split_qkv", [True, False])
@pytest.mark.parametrize("kind", different(IN_CIRCUITS))
def test_masking_nodes_is_cutting_their_edges(kind, split_qkv, ablation):
    """A run with masks of 0 and 1 has the metric of the circuit of the nodes with a 1,
    in every family.
    """
    contrast = contrast_of(kind, split_qkv=split_qkv, ablation=ablation)
    names = maskable(contrast.graph)
    assert metric_at(contrast, torch.ones(len(names), 1).double()) == pytest.approx(
        contrast.metric_full, abs=1e-5
    )
    # Heads with all three masks closed still write what q, k and v make; the circuit
    # writes the corrupted run's value. The
    # two are the same unless biases (zero ablation) or a norm behind attention come in
    # between: its gain is the clean run's here, and the corrupted run's there. So keep
    # a part of each head.
    exact = not split_qkv or (ablation == "resample" and kind not in POST_NORM)
    kept = some_nodes(contrast.graph)
    if not exact:
        kept = sorted({*kept, *(n for n in names if n.endswith(".v"))})
    masks = torch.tensor([[float(n in kept)] for n in names]).double()
    by_edges = circuit_metric(
        contrast, Cuts.only(contrast.graph, node_circuit(contrast.graph, kept))
    )
    # float64 but for some families' norms, which compute in float32
    assert metric_at(contrast, masks) == pytest.approx(by_edges, abs=1e-4)
    assert abs(by_edges - contrast.metric_full) > 1e-2


@pytest.mark.parametrize("split_qkv", [True, False])
@pytest.mark.parametrize("ablation", ["resample", "zero"])
def test_gradients_of_masks_are_finite_differences(ablation, split_qkv):
    """Of `masked_logits`, and for MLPs and whole heads also of a run of the plain model
    with hooks.
    """
    contrast = contrast_of(split_qkv=split_qkv, ablation=ablation)
    names = maskable(contrast.graph)
    point = (
        torch.rand(len(names), 1, generator=torch.Generator().manual_seed(2))
        .double()
        .requires_grad_()
    )
    gradient = torch.autograd.grad(
        contrast.metric(masked_logits(contrast, point)), point
    )[0]
    for i in range(0, len(names), 3):
        step = torch.zeros_like(point)
        step[i] = 1e-5
        slope = (
            metric_at(contrast, point + step) - metric_at(contrast, point - step)
        ) / 2e-5
        # central differences: errors of order 1e-10 from the step and 1e-16 / 1e-5 from
        # rounding, times some thousand
        assert float(gradient[i]) == pytest.approx(slope, abs=1e-6), names[i]


def naive_gradients(contrast, per_prompt):
    """HISP by hand: hooks on the Hugging Face model, (clean - corrupted) · gradient at
    q, k, v and the MLPs' outputs.
    """
    hf, (clean, corrupted) = contrast.model.hf, contrast.tokens
    caught = {}

    def catch(name):
        def hook(_module, _given, out):
            caught[name] = out
            if out.requires_grad:
                out.retain_grad()

        return hook

    hooks = []
    for layer, block in enumerate(hf.transformer.h):
        hooks += [block.attn.c_attn.register_forward_hook(catch(f"a{layer}"))]
        hooks += [block.mlp.register_forward_hook(catch(f"m{layer}"))]
    with torch.no_grad():
        hf(corrupted)
    theirs = {name: x.clone() for name, x in caught.items()}
    embeddings = hf.transformer.wte(clean).detach().requires_grad_()
    right, wrong = clean[:, 0], clean[:, 1]
    with torch.enable_grad():
        logits = hf(inputs_embeds=embeddings).logits[:, -1]
        rows = torch.arange(len(clean))
        (logits[rows, wrong] - logits[rows, right]).mean().backward()
    for hook in hooks:
        hook.remove()
    found = {}
    for name, ours in caught.items():
        product = (
            ((ours - theirs[name]) * ours.grad).detach().sum(1)
        )  # over positions: [batch, d]
        if name.startswith("m"):
            found[name] = product.sum(1)
        else:
            heads = product.view(len(clean), 3, 4, 8).sum(-1)
            found |= {
                f"{name}.{h}.{part}": heads[:, i, h]
                for i, part in enumerate("qkv")
                for h in range(4)
            }
    return {
        n: float(x.abs().sum() if per_prompt else x.sum().abs())
        for n, x in found.items()
    }


@pytest.mark.parametrize("per_prompt", [True, False])
def test_head_importance_by_hand(per_prompt):
    contrast = contrast_of()
    raw = head_importance(contrast, per_prompt=per_prompt, normalise=False)
    by_hand = naive_gradients(contrast, per_prompt)
    assert set(raw) == set(by_hand) and len(raw) == 3 * (12 + 1)
    for node, score in raw.items():
        assert score == pytest.approx(by_hand[node], abs=1e-10), node
    normal = head_importance(contrast, per_prompt=per_prompt)
    for layer in "012":
        mine = torch.tensor(
            [by_hand[n] for n in normal if n[1] == layer], dtype=torch.float64
        )
        scores = torch.tensor(
            [normal[n] for n in normal if n[1] == layer], dtype=torch.float64
        )
        assert torch.allclose(scores, mine / mine.norm(), atol=1e-10) and float(
            scores.norm()
        ) == pytest.approx(1)


def test_subnetwork_probing_finds_the_induction_circuit():
    """Its four inputs that differ between the prompts, for two seeds; nothing for a
    huge penalty, everything for none.
    """
    made = known.induction(n_prompts=12)
    contrast = Contrast(made.model, made.clean, made.corrupted, "kl", made.mask)
    options = {"steps": 200, "lr": 0.05, "progress": False}
    for seed in (0, 1):
        found = subnetwork_probing(contrast, penalty=1, seed=seed, **options)
        assert found.kept == ["a0.0.v", "a1.0.q", "a1.0.k", "a1.0.v"]
        assert (
            found.masks.ge(0) & found.masks.le(1)
        ).all() and found.history.shape == (2, len(found))
    assert subnetwork_probing(contrast, penalty=1000, **options).kept == []
    everything = subnetwork_probing(contrast, penalty=0, **options)
    assert everything.kept == list(maskable(contrast.graph))
    kl = evaluate_circuit(
        made.model,
        node_circuit(contrast.graph, found.kept),
        made.clean,
        made.corrupted,
        positions=made.mask,
    )
    assert kl < 0.01  # the nodes that it keeps do the task; without them it is above 10
    assert circuit_metric(contrast, Cuts.only(contrast.graph, [])) > 5


def test_training_can_be_stopped_and_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr("mechtut.circuits.baselines.PIECE", 10)
    contrast = contrast_of(metric="kl")
    options = {"penalty": 0.1, "lr": 0.02, "progress": False}
    once = subnetwork_probing(contrast, steps=12, **options)
    assert torch.equal(
        once.scores, subnetwork_probing(contrast, steps=12, **options).scores
    )
    assert not torch.equal(
        once.scores, subnetwork_probing(contrast, steps=12, seed=1, **options).scores
    )
    subnetwork_probing(
        contrast, steps=10, folder=tmp_path, **options
    )  # "stopped" after the first piece
    resumed = subnetwork_probing(contrast, steps=12, folder=tmp_path, **options)
    assert (
        torch.equal(resumed.scores, once.scores)
        and len(list(tmp_path.glob("*.safetensors"))) == 2
    )
    with pytest.raises(ValueError, match="another sweep"):
        subnetwork_probing(
            contrast, steps=12, folder=tmp_path, **{**options, "penalty": 0.2}
        )


def test_hard_concrete_masks():
    """Mean of the regulariser against draws, and the value after training."""
    u = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    for theta in (-1.5, 0.0, 1.6):
        drawn = hard_concrete(torch.full_like(u, theta), u)
        # standard error of a share of 40,000 draws: at most 0.0025
        assert float((drawn > 0).float().mean()) == pytest.approx(
            float(share_open(torch.tensor([theta]))), abs=0.01
        )
    assert hard_concrete(torch.tensor([-9.0, 0.0, 9.0])).tolist() == pytest.approx(
        [0, 0.5, 1]
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_circuits_of_nodes(kind):
    contrast = contrast_of(kind)
    graph = contrast.graph
    assert set(node_circuit(graph, maskable(graph))) == set(graph.edges)
    alone = {tuple(e) for e in node_circuit(graph, ["a1.0.q", "m2"])}
    want = {
        ("embed", "out"),
        ("embed", "a1.0.q_in"),
        ("a1.0.q_in", "a1.0.q"),
        ("embed", "m2.in"),
        ("a1.0", "m2.in"),
    }
    assert alone == want | {("a1.0", "out"), ("m2", "out")}
    assert node_circuit(graph, ["a2.3", "embed"]) == node_circuit(
        graph, ["out", "a2.3"]
    )
    # in the Llama two heads share a key/value head, and keeping it keeps both
    group = "3" if kind == "gpt2" else "kv1"
    assert node_circuit(graph, ["a2.3"]) == node_circuit(
        graph, ["a2.3.q", f"a2.{group}.k", f"a2.{group}.v"]
    )
    names = maskable(graph)
    scores = NodeScores(
        names=names, scores=torch.rand(len(names), dtype=torch.float64), method="x"
    )
    ranked, by_edge = scores.ranked(), edge_scores(graph, scores)
    for k in (0, 1, 7, 20, len(names) - 1):
        chosen = select(by_edge, threshold=scores[ranked[k]])
        assert set(chosen) == set(node_circuit(graph, ranked[: k + 1]))


def test_scores_can_be_used_like_those_of_edges(tmp_path):
    made = known.induction()
    wrong = (made.answers[:, -1] + 1) % 12
    metric = logit_diff(made.answers[:, -1], wrong)
    contrast = Contrast(
        made.model, made.clean, made.corrupted, metric, made.mask, split_positions=True
    )
    scores = head_importance(contrast)
    nested = [
        node_circuit(contrast.graph, scores.ranked()[:k]) for k in range(1, len(scores))
    ]
    assert 0 <= roc(nested, made.truth, graph=contrast.graph).edge_auc <= 1
    assert node_counts(nested[-1], made.truth, contrast.graph).true_positive > 0
    assert faithfulness(contrast, edge_scores(contrast.graph, scores)).values[
        -1
    ] == pytest.approx(1)
    again = NodeScores.load(scores.save(tmp_path / "a"))
    assert (
        dict(again.items()) == dict(scores.items())
        and list(scores.to_pandas().node) == scores.ranked()
    )
    trained = subnetwork_probing(contrast, steps=3, progress=False)
    assert Subnetwork.load(trained.save(tmp_path / "b")).kept == trained.kept


def test_refusals():
    contrast = contrast_of(metric="kl")
    with pytest.raises(ValueError, match="gradient of 'kl' is zero"):
        head_importance(contrast)
    with pytest.raises(ValueError, match="every gradient"):
        head_importance(
            contrast_of(metric=lambda logits: logits.sum() * 0, positions="last")
        )
    for wrong in (
        {"steps": 0},
        {"penalty": -1.0},
        {"penalty": float("nan")},
        {"lr": 0.0},
    ):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name} must be a .*number"):
            subnetwork_probing(contrast, **wrong)
    with pytest.raises(ValueError, match="loss is nan"):
        broken = contrast_of(metric=lambda logits: logits.sum(), positions="last")
        broken.metric._own = lambda logits: logits.sum() * float("nan")
        subnetwork_probing(broken, steps=1, progress=False)
    with pytest.raises(ValueError, match=r"'a1.9' is not a node.*did you mean a"):
        node_circuit(contrast.graph, ["a1.9"])
    with pytest.raises(ValueError, match="'a1.0.q' is not a node"):
        node_circuit(contrast_of(split_qkv=False).graph, ["a1.0.q"])
    for shape in ((5, 1), (39,), (39, 2)):
        with pytest.raises(ValueError, match="masks must be"):
            masked_logits(contrast, torch.ones(shape).double())
