"""Trajectories against whole passes with torch's own hooks, and reference numbers.

By hand a state is read by writing it over the last block's output, so that the model
itself puts norm, unembedding, scale and cap on it.
"""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import CONFIGS, different, gap, model_of, stream_of, tiny
from golden_models import GOLDEN, read_json
from torch import nn
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

from mechtut.lenses import trajectory
from mechtut.lenses.trajectory import (
    AffineLens,
    LensTrajectory,
    LogitLens,
    logit_lens,
)
from mechtut.models.families import FAMILIES
from mechtut.models.hooks import Edit, capture, intervene
from mechtut.models.loading import load_model
from mechtut.patching.patchscopes import patchscope
from mechtut.patching.places import SoftPrompt, Source, Target
from mechtut.patching.results import read_result

FOLDER = GOLDEN / "patchscopes"
DRAW = torch.Generator().manual_seed(0)
S, OTHER = (torch.randint(5, 90, (n,), generator=DRAW).tolist() for n in (5, 3))
PARALLEL = ("gpt_neox", "cohere", "cohere2", "phi", "gptj")


def run(model, ids):
    tokens = torch.tensor([ids])
    return model.hf(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False
    ).logits[0]


@torch.no_grad()
def streams(model, ids):
    """Each block's output, and in front the input of block 0."""
    seen = []

    def before(_block, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    def after(_block, _args, output):
        seen.append(stream_of(output).clone())

    hooks = [model.blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [block.register_forward_hook(after) for block in model.blocks]
    run(model, ids)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def read(model, ids, stream):
    """What the model makes of a stream that takes the last block's output's place."""

    def replace(_block, _args, output):
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    hook = model.blocks[-1].register_forward_hook(replace)
    logits = run(model, ids)
    hook.remove()
    return logits


def by_hand(model, ids):
    return torch.stack([read(model, ids, x) for x in streams(model, ids)])


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_layer_equals_torch_hooks(kind):
    model = model_of(kind)
    seen, wanted = logit_lens(model, S, follow=[7]), by_hand(model, S)
    assert seen.layers == (-1, 0, 1, 2) and not any(seen.middle)
    assert gap(seen.logits, wanted) < 1e-10
    own = run(model, S)
    assert gap(seen.logits[-1], own) == 0
    p, q = own.softmax(-1), wanted.softmax(-1)
    log_p, log_q = own.log_softmax(-1), wanted.log_softmax(-1)
    middle = (p + q) / 2
    js = (p * (log_p - middle.log()) + q * (log_q - middle.log())).sum(-1) / 2
    assert gap(seen.entropy, torch.distributions.Categorical(q).entropy()) < 1e-10
    assert gap(seen.kl, (p * (log_p - log_q)).sum(-1)) < 1e-10
    assert gap(seen.kl_reverse, (q * (log_q - log_p)).sum(-1)) < 1e-10
    assert gap(seen.js, js) < 1e-10 and float(seen.js.max()) <= math.log(2)
    top = own.argmax(-1)
    assert torch.equal(seen.final_top, top)
    for ids in (top, torch.full_like(top, 7)):
        picked = wanted.gather(2, ids[None, :, None].expand(4, -1, -1))
        assert torch.equal(seen.rank(ids), (wanted > picked).sum(-1))
        assert (
            gap(
                seen.log_prob(ids),
                (log_q.gather(2, ids.expand(4, -1)[..., None]))[..., 0],
            )
            < 1e-10
        )
    assert gap(seen.log_prob(50), log_q[..., 50]) < 1e-10  # not followed
    assert torch.equal(seen.rank(50), (wanted > wanted[..., [50]]).sum(-1))
    ends = seen.next_ids.tolist()
    assert ends == [*S[1:], -1] and seen.log_prob(seen.next_ids)[:, -1].isnan().all()
    assert gap(seen.log_prob(seen.next_ids)[:, 1], log_q[:, 1, S[2]]) < 1e-10
    assert seen.rank(seen.next_ids)[:, -1].tolist() == [-1] * 4


@pytest.mark.parametrize("kind", different(CONFIGS))
def test_states_between_attention_and_mlp(kind):
    model = model_of(kind)
    if model.family.parallel:
        with pytest.raises(ValueError, match="side by side"):
            logit_lens(model, S, middle=True)
        return
    path = model.family.norm_mlp or "mlp"  # what reads that state
    found = []

    def before(_module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        found.append(x.reshape(1, len(S), -1))  # OPT's has no batch axis

    hooks = [
        model.part(i, path).register_forward_pre_hook(before, with_kwargs=True)
        for i in range(3)
    ]
    run(model, S)
    for hook in hooks:
        hook.remove()
    seen = logit_lens(model, S, middle=True, layers=[-1, 1, 2])
    rows = list(zip(seen.layers, seen.middle, strict=True))
    wanted_rows = [(-1, False), (1, True), (1, False), (2, True), (2, False)]
    assert rows == wanted_rows
    for layer in (1, 2):
        wanted = read(model, S, found[layer])
        assert gap(seen.logits[rows.index((layer, True))], wanted) < 1e-10
    outputs = [i for i, m in enumerate(seen.middle) if not m]
    assert gap(seen.logits[outputs], by_hand(model, S)[[0, 2, 3]]) < 1e-10
    assert "middle" in seen.to_pandas() and len(seen.to_pandas()) == 25


def test_the_list_of_parallel_families_is_whole():
    assert {k for k in CONFIGS if model_of(k).family.parallel} >= set(PARALLEL)
    assert not FAMILIES["llama"].parallel


@pytest.mark.parametrize("name", ["gpt2t", "llamat", "neoxt", "gemma2t"])
def test_reference_numbers(name):
    hf = AutoModelForCausalLM.from_pretrained(
        FOLDER / name, attn_implementation="eager"
    )
    model, z = load_model(hf.double()), np.load(FOLDER / f"logit_lens.{name}.f64.npz")
    seen = logit_lens(model, z["input_ids"].tolist())
    for found, wanted in (
        (seen.logits, "logits"),
        (seen.logits[-1], "model_logits"),
        (seen.entropy, "entropy"),
        (seen.kl, "kl_final_lens"),
        (seen.kl_reverse, "kl_lens_final"),
    ):
        assert np.abs(found.numpy() - z[wanted]).max() < 1e-9, wanted
    assert (seen.final_top.numpy() == z["final_top1"]).all()
    assert (seen.rank().numpy() == z["rank_of_final_top1"]).all()
    assert (seen.top_ids[..., 0].numpy() == z["top1"]).all()
    # the file looks at block outputs only, not at the input
    blocks = logit_lens(model, z["input_ids"].tolist(), layers=range(model.n_layers))
    assert blocks.crossover()[-1] == int(z["crossover_last"][0])
    assert blocks.stable_from()[-1] == int(z["stable_last"][0])


@pytest.mark.parametrize("name", ["gpt2t", "llamat"])
def test_reference_numbers_of_the_affine_lens(name):
    hf = AutoModelForCausalLM.from_pretrained(
        FOLDER / name, attn_implementation="eager"
    )
    model = load_model(hf.double())
    z = np.load(FOLDER / f"affine_to_last.{name}.f64.npz")
    layers = sorted(int(k[2:]) for k in z.files if k.startswith("A_"))
    below = [i for i in layers if i < model.n_layers - 1]
    sources = [
        Source(ids.tolist(), pos=int(p))
        for ids, p in zip(z["fit_ids"], z["fit_positions"], strict=True)
    ]
    lens = AffineLens.fit(model, sources, below)
    seen = logit_lens(model, z["S"].tolist(), lens=lens, positions=int(z["i"]))
    assert seen.layers == (*below, model.n_layers - 1) and seen.lens == "AffineLens"
    for row, layer in enumerate(below):
        wanted = z[f"logits_{layer}"]
        assert np.abs(seen.logits[row, 0].numpy() - wanted).max() < 1e-6
    # the same as writing the carried state over the last block's output
    s, last, i = z["S"].tolist(), model.n_layers - 1, int(z["i"])
    target = Target(s, last, i)
    there = patchscope(model, Source(s, below[0], i), target, mapping=lens, read_at=i)
    assert gap(there.logits[0], seen.logits[0, 0]) < 1e-10
    assert lens.pairs[0] == (below[0], last)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_lengths_and_padding_change_nothing(kind):
    model = model_of(kind)
    rows = [S, OTHER, S[::-1], [9]]
    together = logit_lens(model, rows, target=[1, 2, 3, 4])
    assert together.prompt.tolist() == [0] * 5 + [1] * 3 + [2] * 5 + [3]
    for i, ids in enumerate(rows):
        mine = together.prompt == i
        assert gap(together.logits[:, mine], by_hand(model, ids)) < 1e-10
        alone = logit_lens(model, ids, target=i + 1)
        assert gap(together.log_prob()[:, mine], alone.log_prob()) < 1e-10
    for left in (True, False):
        room = [5 - len(r) for r in rows]
        sides = [(n, 0) if left else (0, n) for n in room]
        ids, mask = (
            torch.stack(
                [
                    pad(torch.tensor(x), side)
                    for x, side in zip(some, sides, strict=True)
                ]
            )
            for some in (rows, [[1] * len(r) for r in rows])
        )
        padded = logit_lens(model, ids, mask=mask)
        assert gap(padded.logits, together.logits) < 1e-10
        assert torch.equal(padded.position, together.position)
    last = logit_lens(model, rows, positions=-1)
    assert last.position.tolist() == [4, 2, 4, 0]
    ends = [4, 7, 12, 13]
    assert gap(last.logits, together.logits[:, ends]) < 1e-10
    with pytest.raises(IndexError, match="outside the prompt"):
        logit_lens(model, rows, positions=2)


def test_pieces_of_the_readout_are_the_whole(monkeypatch):
    model = model_of("gpt2")
    whole = logit_lens(model, [S, OTHER])
    for name, size in (("_IN_CACHE", 1), ("_IN_MEMORY", 4 * 97 * 2), ("_IN_MEMORY", 1)):
        monkeypatch.setattr(trajectory, name, size)
        parts = logit_lens(model, [S, OTHER])
        for number in ("logits", "kl", "js", "entropy", "log_probs"):
            a, b = (getattr(x, number).nan_to_num() for x in (whole, parts))
            assert gap(a, b) < 1e-12
        assert torch.equal(whole.ranks, parts.ranks)


def test_without_logits_only_what_was_followed_is_there(monkeypatch):
    model = model_of("llama")
    whole = logit_lens(model, S, target=11, follow=[12])
    small = logit_lens(model, S, target=11, follow=[12], keep_logits=False)
    assert small.logits is None
    for token in (None, 11, 12, small.final_top, small.next_ids):
        a, b = (x.log_prob(token).nan_to_num() for x in (whole, small))
        assert gap(a, b) == 0
        assert torch.equal(whole.rank(token), small.rank(token))
    assert (
        gap(small.difference(11, 12), whole.logits[..., 11] - whole.logits[..., 12])
        < 1e-10
    )
    with pytest.raises(ValueError, match="token 13 was not followed.*keep_logits=True"):
        small.rank(13)
    with pytest.raises(ValueError, match="keep_logits=True"):
        small.divergence_from(whole)
    monkeypatch.setattr(trajectory, "_KEPT", 4 * 5 * 97 * 8 - 1)
    assert logit_lens(model, S).logits is None
    assert logit_lens(model, S, keep_logits=True).logits is not None


def made(logits):
    """A trajectory of logits that were thought up, by a model that only hands on."""
    logits = torch.tensor(logits, dtype=torch.float64)[:, None]
    n = len(logits)
    log_q = logits.log_softmax(-1)
    top = logits[-1].argmax(-1)
    zero = torch.zeros(n, 1)
    return LensTrajectory(
        layers=tuple(range(n)),
        middle=(False,) * n,
        prompt=torch.tensor([0]),
        position=torch.tensor([0]),
        ids=torch.tensor([1]),
        top_ids=log_q.topk(1).indices,
        top_log_probs=log_q.topk(1).values,
        entropy=zero,
        kl=zero,
        kl_reverse=zero,
        js=zero,
        followed=torch.stack([top, torch.tensor([-1])], dim=1),
        log_probs=log_q[..., [int(top), 0]],
        ranks=(logits > logits[..., [int(top)]]).sum(-1)[..., None].expand(-1, -1, 2),
        has_target=False,
        names={},
        texts={str(i): str(i) for i in range(3)},
        lens="LogitLens",
        logits=logits,
    )


def test_crossover_is_the_first_time_and_stable_the_last():
    """The reference implementation's crossover need not stay."""
    back = made([[3, 0, 0], [0, 3, 0], [3, 0, 0], [3, 1, 0], [3, 2, 0]])
    assert back.crossover() == (0,) and back.stable_from() == (2,)
    assert back.crossover(1) == (1,) and back.stable_from(1) == (None,)
    assert back.crossover(2) == (None,) and back.stable_from(2) == (None,)
    always = made([[3, 0, 0], [3, 0, 0]])
    assert always.crossover() == always.stable_from() == (0,)
    equal = made([[3, 3, 0], [4, 1, 0]])  # ties do not count
    assert equal.rank(1).flatten().tolist() == [0, 1]
    assert equal.crossover(1) == (0,) and equal.rank().flatten().tolist() == [0, 0]


def test_rows_between_are_no_layers_of_a_crossover():
    model = model_of("gpt2")
    whole = logit_lens(model, S)
    halves = logit_lens(model, S, middle=True)
    assert halves.crossover() == whole.crossover()
    assert halves.stable_from() == whole.stable_from()


def test_divergences_have_their_right_names():
    """The authors' "JS" is the symmetrised KL, their "TV" the largest difference."""
    one, other = made([[2, 0, 1], [0, 0, 0]]), made([[0, 1, 0], [0, 0, 9]])
    found = one.divergence_from(other)
    for row in range(2):
        p, q = (x.logits[row, 0].softmax(-1).numpy() for x in (one, other))
        m = (p + q) / 2
        kl = [float((a * np.log(a / b)).sum()) for a, b in ((p, q), (p, m), (q, m))]
        assert float(found.kl[row, 0]) == pytest.approx(kl[0], abs=1e-12)
        assert float(found.js[row, 0]) == pytest.approx((kl[1] + kl[2]) / 2, abs=1e-12)
        assert float(found.tv[row, 0]) == pytest.approx(np.abs(p - q).sum() / 2)
    same = one.divergence_from(one)
    assert all(float(x.abs().max()) == 0 for x in same)
    with pytest.raises(ValueError, match="other layers or tokens"):
        one.divergence_from(made([[1, 2, 3]]))


def test_edits_are_written_in_the_same_pass():
    model = model_of("llama")
    edit = Edit("mlp_out", 1, 0.0, pos=2)
    with intervene(model, [edit]):
        wanted = logit_lens(model, S)
        own = run(model, S)
    found = logit_lens(model, S, edits=[edit])
    assert gap(found.logits, wanted.logits) == 0 and gap(found.logits[-1], own) < 1e-10
    assert gap(found.logits, logit_lens(model, S).logits) > 0.1


def test_one_pass_reads_all():
    model, passes = model_of("gpt2"), []
    hook = model.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    logit_lens(model, [S, S[::-1]], middle=True, layers=[-1, 0, 2])
    hook.remove()
    assert len(passes) == 1


def test_tokens_by_text():
    model = load_model("mini", device="cpu")
    prompts = ["Riley Martin works as a", "Riley Martin works"]
    seen = logit_lens(model, prompts, target=[" singer", " as"], follow=[" teacher"])
    ids = [model.encode(t)[0] for t in (" singer", " as", " teacher")]
    logits = [model.logits(p)[0, -1].log_softmax(-1) for p in prompts]
    for column, row, token in ((4, 0, ids[0]), (7, 1, ids[1])):
        found = float(seen.log_prob()[-1, column])
        assert found == pytest.approx(float(logits[row][token]), abs=1e-5)
    found = float(seen.log_prob(" teacher")[-1, 4])
    assert found == pytest.approx(float(logits[0][ids[2]]), abs=1e-5)
    assert seen.texts[str(ids[0])] == " singer"
    table = seen.top(1)
    cell = table[(table.prompt == 0) & (table.position == 4) & (table.layer == 7)]
    assert cell.token.tolist() == [" singer"] and seen.rank()[-1, 4] == 0
    with pytest.raises(ValueError, match="one for each of the 2 prompts"):
        logit_lens(model, prompts, target=[" singer"] * 3)
    with pytest.raises(ValueError, match="' nurse' was not named"):
        seen.log_prob(" nurse")
    with pytest.raises(ValueError, match="outside 0..2964"):
        logit_lens(model, prompts, target=2965)
    with pytest.raises(ValueError, match="one id for each of the 8 columns"):
        seen.rank(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="without a tokenizer"):
        logit_lens(model_of("gpt2"), S, target=" Paris")


def test_figures():
    model = load_model("mini", device="cpu")
    seen = logit_lens(model, ["Riley Martin works as a", "Paris is"], target=" singer")
    for colour, values in (
        ("prob", seen.log_prob().exp()),
        ("rank", (seen.rank() + 1).double().log10()),
        ("kl", seen.kl),
        ("entropy", seen.entropy),
    ):
        ax = seen.plot(colour, prompt=1)
        image = np.asarray(ax.get_images()[0].get_array())
        assert np.allclose(image, values[:, 5:].flip(0))
        words = [t.get_text() for t in ax.get_xticklabels()]
        assert words == ["Paris", "is"]
        tops = [model.decode([i]).strip() for i in seen.top_ids[-1, 5:, 0].tolist()]
        assert [t.get_text() for t in ax.texts[:2]] == tops
        assert ax.get_yticklabels()[0].get_text() == "7"
    with pytest.raises(IndexError, match="prompt 2 is not there: 0..1"):
        seen.plot(prompt=2)
    assert logit_lens(model_of("gpt2"), S, middle=True).plot().texts  # no tokenizer
    long = logit_lens(model, torch.full((1, 41), 7), layers=[3])
    assert not long.plot().texts
    sys.modules["matplotlib.pyplot"].close("all")


def test_a_trajectory_saves_and_loads(tmp_path):
    seen = logit_lens(load_model("mini", device="cpu"), "Paris is", target=" a")
    again = LensTrajectory.load(seen.save(tmp_path))
    assert torch.equal(again.logits, seen.logits) and again.texts == seen.texts
    assert again.to_pandas().equals(seen.to_pandas())
    assert read_result(tmp_path)[0] == "LensTrajectory"
    small = logit_lens(model_of("gpt2"), S, keep_logits=False)
    assert LensTrajectory.load(small.save(tmp_path / "b")).logits is None


def test_half_precision():
    model = load_model(tiny("gemma2").to(torch.bfloat16))
    seen = logit_lens(model, S, middle=True)
    assert seen.logits.dtype == torch.float32
    assert torch.equal(seen.logits[-1], model.logits(S)[0])
    states = capture(model, torch.tensor([S]), "resid_post.0")["resid_post.0"]
    with torch.no_grad():
        assert gap(seen.logits[2], model.unembed(states[0])) < 0.1


def test_hostile_lenses(tmp_path):
    model, other = model_of("gpt2"), model_of("llama")
    lens = LogitLens.of(model)
    with pytest.raises(ValueError, match="of other weights|with other weights"):
        logit_lens(model_of("llama", vocab_size=97), S, lens=lens)
    changed = tiny("gpt2").double()
    with torch.no_grad():
        changed.transformer.h[1].mlp.c_fc.weight[0, 0] += 1
    with pytest.raises(ValueError, match="other weights.*unembedding is the same"):
        logit_lens(load_model(changed), S, lens=lens)
    changed.lm_head.weight = nn.Parameter(changed.lm_head.weight + 1)
    with pytest.raises(ValueError, match="the unembedding differs, too"):
        logit_lens(load_model(changed), S, lens=lens)
    with pytest.raises(ValueError, match="3 blocks of width 32, but .* has 2 of"):
        lens.check(model_of("gpt2", n_layer=2))
    with pytest.raises(ValueError, match="d_model is 32 here, not 56|56"):
        lens.transport(torch.zeros(2, 56), 1)
    with pytest.raises(ValueError, match="has no layer 3: it has layers -1 to 2"):
        lens.transport(torch.zeros(2, 32), 3)
    with pytest.raises(ValueError, match="states must be finite, but 2"):
        lens.transport(torch.tensor([[torch.nan] * 2 + [0.0] * 30]), 1)
    with pytest.raises(ValueError, match="say which layer"):
        lens(torch.zeros(2, 32))
    with pytest.raises(ValueError, match="to the last block, 2, not to layer 1"):
        lens(torch.zeros(2, 32), 0, 1)
    assert gap(lens(torch.ones(2, 32), 0, 2), torch.ones(2, 32)) == 0
    lens.check(model, model)
    with pytest.raises(ValueError):
        lens.check(model, other)
    ids = torch.randint(5, 90, (40, 4), generator=DRAW)
    affine = AffineLens.fit(model, Source(ids, pos=None), [1])
    with pytest.raises(ValueError, match="has no layer 0: it has layers 1, 2"):
        logit_lens(model, S, lens=affine, layers=[0, 1])
    with pytest.raises(ValueError, match="maps for block outputs only"):
        logit_lens(model, S, lens=affine, middle=True)
    with pytest.raises(ValueError, match="nothing to fit below 2"):
        AffineLens.fit(model, ids, [2])
    again = AffineLens.load(affine.save(tmp_path))
    assert gap(again.weight, affine.weight) == 0 and again.layers == (1, 2)
    with pytest.raises(ValueError, match="holds a AffineLens, not a LogitLens"):
        LogitLens.load(tmp_path)


def test_hostile_calls():
    model = model_of("gpt2")
    with pytest.raises(IndexError, match=r"layer 3 does not exist.*0\.\.2, and -1"):
        logit_lens(model, S, layers=[3])
    with pytest.raises(ValueError, match="layers must be different"):
        logit_lens(model, S, layers=[1, 1])

    def spoil(_block, _args, output):
        stream_of(output)[:, 2, 3] = torch.nan

    hook = model.blocks[1].register_forward_hook(spoil)
    with pytest.raises(ValueError, match="layer 1, position 2, is NaN or infinite"):
        logit_lens(model, S)
    hook.remove()
    with pytest.raises(ValueError, match="k must be at most 97"):
        logit_lens(model, S, k=98)
    with pytest.raises(ValueError, match="holds no prompt"):
        logit_lens(model, [])


@pytest.mark.parametrize("part", ["lm_head", "transformer.ln_f"])
def test_a_readout_that_is_not_the_models_is_refused(part):
    model, calls = model_of("gpt2"), []

    def first_only(_module, _args, output):
        calls.append(1)
        return output * 2 if len(calls) == 1 else None

    module = model.hf.get_submodule(part)
    hook = module.register_forward_hook(first_only)
    with pytest.raises(ValueError, match=r"off by [\d.]+ from the logits of GPT2"):
        logit_lens(model, S)
    hook.remove()
    assert Path(trajectory.__file__).name == "trajectory.py"


def test_logit_lens_on_a_real_model():
    """What independent code saw on SmolLM2, at every layer of three prompts."""
    model = load_model("smollm2", device="cpu")
    for known in read_json("patchscopes/smollm2.f32.json")["logit_lens"]:
        how = {"positions": -1, "target": known["answer"]}
        seen = logit_lens(model, known["S"], **how)
        for row, wanted in enumerate(known["by_layer"]):
            assert seen.layers[row] == wanted["layer"]
            assert int(seen.top_ids[row, 0, 0]) == wanted["top1"][0]
            assert int(seen.rank()[row, 0]) == pytest.approx(
                wanted["rank_answer"], abs=2, rel=2e-3
            )
            for name, key in (
                ("entropy", "entropy"),
                ("kl", "kl_final_lens"),
                ("kl_reverse", "kl_lens_final"),
            ):
                found = float(getattr(seen, name)[row, 0])
                assert found == pytest.approx(wanted[key], abs=2e-3, rel=1e-4)


def test_the_last_layer_alone_and_vectors():
    model = load_model("mini", device="cpu")
    seen = logit_lens(model, "Riley Martin works as a", layers=[7])
    assert seen.layers == (7,) and seen.entropy.shape == (1, 5)
    assert float(seen.kl.abs().max()) < 1e-6
    with pytest.raises(ValueError, match="no tokens"):
        logit_lens(model, SoftPrompt(torch.zeros(3, 192)))
