"""The stored results on SmolLM2 against a fresh sample of each, and the methods against
plain PyTorch hooks on these real weights.
"""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from mechtut.circuits.circuit import Circuit
from mechtut.circuits.graph import Edge
from mechtut.circuits.runs import Contrast, Cuts, circuit_metric
from mechtut.experiments import smollm2 as results
from mechtut.experiments.smollm2 import (
    compute,
    editing,
    heads_of,
    ioi_batch,
    neuron_scores,
    neurons,
    noise_elsewhere,
    stored,
    well_known,
)
from mechtut.models.loading import embedding_std, load_model
from mechtut.papers.causal_tracing import AverageTrace, CausalTrace, trace
from mechtut.papers.function_vectors import (
    FunctionVector,
    evaluate,
    function_vector,
    indirect_effect,
)
from mechtut.prompts.everyday import everyday_facts
from mechtut.prompts.few_shot import encode, load_task, sample_prompts
from mechtut.prompts.subject_noise import Noise


@pytest.fixture(scope="module")
def model():
    return load_model("smollm2", device="cpu")


@pytest.fixture(scope="module")
def facts(model):
    """The sixty, chosen among all that are about the stored subjects. These come first
    among all of their relation, so the choice among all facts is the same one.
    """
    subjects = set(stored("tracing/noise_elsewhere").subject)
    some = [f for f in everyday_facts() if f.subject in subjects]
    assert len(some) > 60
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "everyday_facts", lambda: some)
        found = well_known(model)
    assert [f.subject for f in found] == list(stored("tracing/noise_elsewhere").subject)
    return found


# --- what the pages show is what is computed


def test_traces_of_a_fact(model, facts):
    """The stored averages keep three scores of every fact."""
    noise = Noise(3.0, std=embedding_std(model, [f.subject for f in facts]))
    average = stored("tracing/attn_out", AverageTrace)
    assert average.n_facts == len(facts) == 60 and not average.skipped
    i = 41
    options = {"component": "attn_out", "window": 6, "n_samples": 3}
    one = trace(model, facts[i].prompt, facts[i].subject, noise=noise, **options)
    last = one.subject_range[1] - 1
    mine = torch.stack([one.scores.max(), one.scores[last].max(), one.scores[-1].max()])
    assert torch.allclose(average.best[i], mine, atol=1e-3)
    assert float(average.clean_probs[i]) == pytest.approx(one.clean_prob, abs=1e-3)
    low = float(average.corrupted_probs[i])
    assert low == pytest.approx(one.corrupted_prob, abs=1e-3)


def test_the_example_and_the_control(model, facts):
    whole = stored("tracing/example-mlp_out", CausalTrace)
    options = {"component": "mlp_out", "window": 6, "tokens": [2]}
    row = trace(model, *results.EXAMPLE, **options)
    assert torch.allclose(row.scores[0], whole.scores[2], atol=1e-3)
    table = stored("tracing/noise_elsewhere")
    std = embedding_std(model, [f.subject for f in facts])
    fresh = noise_elsewhere(model, facts[:3], std=std)
    for column in ("clean", "noise on subject"):
        assert fresh[column].tolist() == pytest.approx(table[column][:3], abs=2e-3)


def test_one_edit(model, facts, tmp_path):
    table = stored("editing/edits")
    row = table[(table.layer == 5) & (table.method == "ROME")].iloc[0]
    fact = next(f for f in facts if f.subject == row.subject)
    fresh = editing(model, [fact], [5], tmp_path, progress=False).iloc[0]
    for column in ("post rewrite diff", "post paraphrase diff", "kl"):
        assert fresh[column] == pytest.approx(row[column], abs=0.02), column


@pytest.mark.parametrize("name", ["capitalize"])
def test_a_vector_at_two_layers(model, name):
    found, table = stored(f"vectors/{name}", FunctionVector), stored(f"vectors/{name}")
    task, layers = load_task(f"everyday/{name}"), [10, 16]
    options = {"n_shots": 5, "only_known": False, "settings": ["zero_shot"]}
    fresh = evaluate(model, found.vector, task, layers, **options)
    mine = table[(table.run == "function vector") & (table.setting == "zero_shot")]
    assert fresh.n.min() >= 40
    wanted = mine.set_index("layer").top1[layers].tolist()
    assert fresh.top1.tolist() == pytest.approx(wanted, abs=0.06)


def test_the_circuit_and_its_heads(model):
    table = stored("circuits/sweep")
    row = table.loc[table.threshold.idxmin()]
    circuit = stored(f"circuits/threshold-{row.threshold:g}", Circuit)
    shown, _ = ioi_batch(model, 16, 32)
    contrast = Contrast(model, shown["clean"], shown["corrupted"], "kl")
    kl = circuit_metric(contrast, Cuts.only(contrast.graph, circuit.found))
    assert kl == pytest.approx(row.KL, abs=5e-3) and not circuit.problems
    assert len(circuit.found) == row.edges


def test_neurons_of_one_layer(model, tmp_path):
    table = stored("neurons/scores")
    records = neurons(model, [10], tmp_path)
    fresh = neuron_scores(model, records, every=384)
    keys = ["layer", "neuron", "end"]
    both = fresh.merge(table, on=keys, suffixes=("", " stored"))
    assert len(both) == len(fresh) == 8
    same = (both["table"] - both["table stored"]).abs() < 0.02
    assert (same | both["table"].isna()).all()


def test_unknown_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is circuits/"):
        stored("tracing/nothing")
    with pytest.raises(ValueError, match="no part 'all'"):
        compute("all", tmp_path, tmp_path)
    assert isinstance(stored("circuits/heads"), pd.DataFrame)
    assert callable(heads_of)


# --- exactness on real weights, against plain hooks


class Hooked:
    """Whole passes with plain PyTorch hooks; nothing of this package."""

    def __init__(self, hf):
        self.hf, self.layers, self.config = hf, hf.model.layers, hf.config

    @torch.no_grad()
    def __call__(self, ids, before=(), after=()):
        """Logits at the end; `before` and `after` are pairs (module, function)."""
        handles = [
            m.register_forward_pre_hook(lambda _, args, f=f: (f(args[0]), *args[1:]))
            for m, f in before
        ]
        handles += [
            m.register_forward_hook(
                lambda _, __, out, f=f: (
                    (f(out[0]), *out[1:]) if isinstance(out, tuple) else f(out)
                )
            )
            for m, f in after
        ]
        try:
            return self.hf(ids, use_cache=False).logits[:, -1]
        finally:
            for handle in handles:
                handle.remove()

    def keep(self, ids, module, side="before"):
        """What goes into or comes out of a module."""
        seen = []
        self(ids, **{side: [(module, lambda x: seen.append(x) or x)]})
        return seen[0]


def test_trace_cells_equal_plain_hooks(model):
    """Three components, four cells each; the noise is written by hand."""
    plain, (prompt, subject) = Hooked(model.hf), results.EXAMPLE
    ids = model.to_tokens(prompt)[None]
    found, kept = {}, {}
    for component in ("resid_post", "mlp_out", "attn_out"):
        options = {"component": component, "window": 4, "tokens": [2, -1]}
        found[component] = trace(model, prompt, subject, n_samples=2, **options)
    first, last = found["mlp_out"].subject_range
    std = 3 * embedding_std(model)
    random = np.random.RandomState(1)
    noise = std * torch.tensor(random.randn(2, last - first, 576))

    def corrupt(x):
        x = x.clone()
        x[:, first:last] = (x[:, first:last] + noise).to(x.dtype)
        return x

    answer = int(plain(ids).argmax())
    embed = model.hf.model.embed_tokens
    parts = {
        "resid_post": lambda layer: layer,
        "mlp_out": lambda layer: layer.mlp,
        "attn_out": lambda layer: layer.self_attn,
    }
    modules = [part(layer) for part in parts.values() for layer in plain.layers]
    plain(ids, after=[(m, partial(kept.setdefault, m)) for m in modules])
    for component, part in parts.items():
        for row, pos in enumerate((2, ids.shape[1] - 1)):
            for layer in (1, 27):
                window = range(max(0, layer - 2), min(30, layer + 2))
                around = [layer] if component == "resid_post" else window
                restore = []
                for i in around:
                    module = part(plain.layers[i])
                    clean = kept[module][:, pos]

                    def put(x, clean=clean, pos=pos):
                        x = x.clone()
                        x[:, pos] = clean
                        return x

                    restore.append((module, put))
                logits = plain(ids.repeat(2, 1), after=[(embed, corrupt), *restore])
                wanted = logits.softmax(-1)[:, answer].mean()
                mine = found[component].scores[row, layer]
                assert abs(float(mine - wanted)) < 1e-5, (component, pos, layer)


def test_head_effects_equal_plain_hooks(model):
    """A head's mean put into broken prompts, against hooks on the output projection."""
    plain, task = Hooked(model.hf), load_task("everyday/antonym")
    prompts = sample_prompts(task, 2, 3, 42, "shuffle")
    means = torch.randn(30, 9, 64, generator=torch.Generator().manual_seed(0))
    effects = indirect_effect(model, prompts, means, progress=False)
    for i, prompt in enumerate(prompts):
        ids, target = encode(model, prompt)
        ids = torch.tensor([ids])
        before = plain(ids).softmax(-1)[0, target]
        for layer, head in ((0, 0), (14, 1), (29, 8)):

            def put(x, layer=layer, head=head):
                x = x.clone()
                x[:, -1, head * 64 : (head + 1) * 64] = means[layer, head]
                return x

            module = plain.layers[layer].self_attn.o_proj
            after = plain(ids, before=[(module, put)]).softmax(-1)[0, target]
            assert abs(float(effects[i, layer, head] - (after - before))) < 1e-5
    vector = function_vector(model, means, [(14, 1), (3, 0)])
    out = [model.hf.model.layers[i].self_attn.o_proj.weight for i in (14, 3)]
    by_hand = out[0][:, 64:128] @ means[14, 1] + out[1][:, :64] @ means[3, 0]
    assert torch.allclose(vector, by_hand, atol=1e-4)


def test_edges_equal_plain_hooks(model):
    """One edge cut at a time: from a head to an MLP, to one head's query, to the
    output, and to the values that a group of heads shares.
    """
    plain, (shown, _) = Hooked(model.hf), ioi_batch(model, 3, 3)
    clean, corrupted = shown["clean"], shown["corrupted"]
    contrast = Contrast(model, clean, corrupted, "kl")

    def writes(node):
        """Clean minus corrupted output of a head or an MLP."""
        layer = plain.layers[int(node[1:].split(".")[0])]
        if node.startswith("m"):
            a, b = (plain.keep(x, layer.mlp, "after") for x in (clean, corrupted))
            return a - b
        head = int(node.split(".")[1])
        some = slice(64 * head, 64 * head + 64)
        weight = layer.self_attn.o_proj.weight[:, some]
        a, b = (
            plain.keep(x, layer.self_attn.o_proj)[..., some] for x in (clean, corrupted)
        )
        return (a - b) @ weight.T

    whole = plain(clean).log_softmax(-1)
    for parent, child in (
        ("a17.4", "m20.in"),
        ("a20.0", "a23.1.q_in"),
        ("a23.1", "out"),
        ("a17.4", "a20.kv0.v_in"),
    ):
        delta = writes(parent)
        if child == "out":
            change = {"before": [(plain.hf.model.norm, lambda x, d=delta: x - d)]}
        elif child.startswith("m"):
            module = plain.layers[20].post_attention_layernorm
            change = {"before": [(module, lambda x, d=delta: x - d)]}
        else:
            layer = plain.layers[int(child[1:].split(".")[0])]
            name = "q_proj" if child.endswith("q_in") else "v_proj"
            stream = plain.keep(clean, layer.input_layernorm)
            project = getattr(layer.self_attn, name)
            with torch.no_grad():
                changed = project(layer.input_layernorm(stream - delta))
            some = slice(64, 128) if child.endswith("q_in") else slice(0, 64)

            def put(x, changed=changed, some=some):
                x = x.clone()
                x[..., some] = changed[..., some]
                return x

            change = {"after": [(project, put)]}
        log_q = plain(clean, **change).log_softmax(-1)
        wanted = float((whole.exp() * (whole - log_q)).sum(-1).mean())
        cuts = Cuts(contrast.graph)
        cuts.set(Edge(parent, child), False)
        assert wanted > 1e-5
        assert circuit_metric(contrast, cuts) == pytest.approx(
            wanted, rel=1e-2, abs=2e-6
        )
