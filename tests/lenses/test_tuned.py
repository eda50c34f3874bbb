"""The tuned lens against plain autograd, whole passes, and reference numbers."""

import math
import sys
from itertools import count

import numpy as np
import pytest
import torch
from families import gap, model_of, tiny
from golden_models import GOLDEN
from transformers import AutoModelForCausalLM

from mechtut.lenses import tuned
from mechtut.lenses.trajectory import LogitLens, logit_lens
from mechtut.lenses.tuned import (
    LensEvaluation,
    TunedLens,
    evaluate_lens,
    token_chunks,
)
from mechtut.models.hooks import hooked
from mechtut.models.loading import load_model

QUIET = {"progress": False}
FEW = ["gpt2", "llama", "gemma2", "gpt_neox", "gptj", "granite", "cohere", "olmo2"]
EXACT = ["gpt2", "gpt_neox", "gptj"]
DRAW = torch.Generator().manual_seed(0)
DATA = torch.randint(5, 90, (6, 7), generator=DRAW)


def run(model, ids):
    mask = torch.ones_like(ids)
    return model.hf(input_ids=ids, attention_mask=mask, use_cache=False).logits


@torch.no_grad()
def inputs(model, ids):
    """What each block is given, by torch's own hooks."""
    seen = []

    def before(_block, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    hooks = [
        block.register_forward_pre_hook(before, with_kwargs=True)
        for block in model.blocks
    ]
    run(model, ids)
    for hook in hooks:
        hook.remove()
    return seen


def read(model, ids, stream):
    """What the model makes of a stream that takes the last block's output's place."""

    def replace(_block, _args, output):
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    hook = model.blocks[-1].register_forward_hook(replace)
    logits = run(model, ids)
    hook.remove()
    return logits


def losses_by_hand(model, ids, weight, bias, loss):
    """Each translator's loss, with gradients, through the model's own last steps."""
    with torch.no_grad():
        log_p = run(model, ids).log_softmax(-1)
    found = []
    for h, w, b in zip(inputs(model, ids), weight, bias, strict=True):
        log_q = read(model, ids, h + h @ w.T + b).log_softmax(-1)
        if loss == "kl":
            found.append((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        else:
            picked = log_q[:, :-1].gather(-1, ids[:, 1:, None])
            found.append(-picked.mean())
    return torch.stack(found)


def train_by_hand(model, data, loss, kind, n_steps, batch_size):
    """The recipe in plain PyTorch."""
    n, d = model.n_layers, model.d_model
    weight = torch.zeros(n, d, d, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(n, d, dtype=torch.float64, requires_grad=True)
    rate = 0.1 if kind == "sgd" else 1e-3
    if kind == "sgd":
        how = {"momentum": 0.9, "nesterov": True}
        optimiser = torch.optim.SGD([weight, bias], rate, weight_decay=1e-3, **how)
    else:
        how = {"amsgrad": True, "weight_decay": 1e-3}
        optimiser = torch.optim.Adam([weight, bias], rate, **how)
    seen = []
    for step in range(n_steps):
        ids = data[step * batch_size : (step + 1) * batch_size]
        losses = losses_by_hand(model, ids, weight, bias, loss)
        optimiser.zero_grad()
        losses.sum().backward()
        torch.nn.utils.clip_grad_norm_([weight, bias], 1.0)
        optimiser.param_groups[0]["lr"] = rate * (1 - step / n_steps)
        optimiser.step()
        seen.append(losses.detach())
    model.hf.zero_grad(set_to_none=True)
    return torch.stack(seen), weight.detach(), bias.detach()


def golden():
    hf = AutoModelForCausalLM.from_pretrained(
        GOLDEN / "patchscopes" / "gpt2t", attn_implementation="eager"
    )
    z = np.load(GOLDEN / "patchscopes" / "tuned_lens.gpt2t.f64.npz")
    data = torch.from_numpy(z["data"]).flatten(0, 1)
    return load_model(hf.double()), z, data


def test_reference_numbers():
    model, z, data = golden()
    how = {"batch_size": 4, "seed": None, **QUIET}
    lens = TunedLens.fit(model, data, n_steps=3, **how)
    for found, wanted in (
        (lens.losses, "losses"),
        (lens.weight, "W"),
        (lens.bias, "b"),
    ):
        assert np.abs(found.numpy() - z[wanted]).max() < 1e-12
    one = TunedLens.fit(model, data, n_steps=1, **how)  # rate .1, momentum's 1.9
    for found, wanted in ((one.weight, "W"), (one.bias, "b")):
        gradient = -found.numpy() / 0.19
        assert np.abs(gradient - z[f"clipped_grad_{wanted}_step0"]).max() < 1e-12
    wanted = z["eval_logit_ce_entropy_kl__tuned_ce_entropy_kl"]
    both = (evaluate_lens(model, data[:4], **QUIET), lens.evaluate(model, data[:4]))
    for i, seen in enumerate(both):
        for j, name in enumerate(("cross_entropy", "entropy", "kl")):
            found = getattr(seen, name).mean(0).numpy()
            assert np.abs(found[:-1] - wanted[:, 3 * i + j]).max() < 1e-9
            if j < 2:
                assert found[-1] == pytest.approx(z["model_ce_entropy"][j], abs=1e-9)
    # translator t is the map of layer t - 1
    assert lens.layers == (-1, 0, 1, 2, 3, 4, 5)
    states = torch.ones(2, 40, dtype=torch.float64)
    for layer in range(-1, 5):
        w, b = (torch.from_numpy(z[name][layer + 1]) for name in "Wb")
        assert gap(lens.transport(states, layer), states + states @ w.T + b) < 1e-12
    assert torch.equal(lens.transport(states, 5), states)


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
@pytest.mark.parametrize("kind", FEW)
def test_training_equals_plain_autograd(kind, loss):
    model = model_of(kind)
    optimiser = "adam" if kind in ("llama", "gptj") else "sgd"
    how = {"n_steps": 3, "batch_size": 2, "seed": None, "loss": loss, **QUIET}
    lens = TunedLens.fit(model, DATA, optimiser=optimiser, **how)
    losses, weight, bias = train_by_hand(model, DATA, loss, optimiser, 3, 2)
    near = 1e-12 if kind in EXACT else 1e-6  # some norms are float32 in any model
    assert gap(lens.losses, losses) < near
    assert gap(lens.weight, weight) < near and gap(lens.bias, bias) < near
    assert all(p.grad is None for p in model.hf.parameters())
    seen = logit_lens(model, DATA[0], lens=lens)
    wanted = losses_by_hand(model, DATA[:1], lens.weight, lens.bias, "kl")
    assert gap(seen.kl.mean(1)[:-1], wanted) < near


def test_it_begins_as_the_logit_lens():
    model = model_of("gemma2")
    lens = TunedLens.fit(model, DATA, n_steps=1, batch_size=6, seed=None, **QUIET)
    seen = logit_lens(model, DATA)
    assert gap(lens.losses[0], seen.kl.mean(1)[:-1]) < 1e-10


def test_pieces_of_a_step_are_the_whole(monkeypatch):
    model = model_of("llama")
    for loss in ("kl", "cross_entropy"):
        how = {"n_steps": 2, "batch_size": 3, "loss": loss, "share": 0.5, **QUIET}
        whole = TunedLens.fit(model, DATA, **how)
        before = evaluate_lens(model, DATA, whole, transfer=True, **QUIET)
        for name in ("_OF_A_PASS", "_OF_A_PRODUCT"):
            monkeypatch.setattr(tuned, name, 1)
            parts = TunedLens.fit(model, DATA, **how)
            assert gap(parts.weight, whole.weight) < 1e-12
            after = evaluate_lens(model, DATA, whole, transfer=True, **QUIET)
            for field in ("cross_entropy", "kl", "mean_prob", "transfer_kl"):
                assert gap(getattr(before, field), getattr(after, field)) < 1e-12
        monkeypatch.undo()


def test_a_share_of_tokens_is_fair():
    ids = torch.zeros(3, 5, dtype=torch.long)
    for shifted, able in ((False, 15), (True, 12)):
        often, n = torch.zeros(3, 5), 4000
        for step in range(n):
            chosen = tuned._chosen(ids, step, 0.2, shifted, 7)
            assert int(chosen.sum()) == round(0.2 * able)
            often += chosen
        expected = torch.full((3, 5), round(0.2 * able) / able)
        if shifted:
            expected[:, -1] = 0
        assert gap(often / n, expected) < 0.03  # five standard deviations
    assert int(tuned._chosen(ids, 0, 1e-9, False, 7).sum()) == 1
    assert bool(tuned._chosen(ids, 0, 1.0, False, 7).all())


def test_a_share_is_the_loss_of_its_tokens():
    model = model_of("gpt2")
    how = {"n_steps": 1, "batch_size": 6, "seed": None, "share": 0.3, **QUIET}
    lens = TunedLens.fit(model, DATA, **how)
    chosen = tuned._chosen(DATA, 0, 0.3, False, None).flatten()
    kl = logit_lens(model, DATA).kl[:-1]
    assert gap(lens.losses[0], kl[:, chosen].mean(1)) < 1e-10
    assert gap(lens.losses[0], kl.mean(1)) > 1e-3


def test_every_sequence_is_read_once_before_any_is_read_again():
    ids = torch.arange(7)[:, None]
    rows = [tuned._batch(ids, step, 3, 42).flatten().tolist() for step in range(7)]
    flat = [i for row in rows for i in row]
    for first in (0, 7, 14):
        assert sorted(flat[first : first + 7]) == list(range(7))
    assert flat[:7] != flat[7:14]
    plain = [tuned._batch(ids, step, 3, None).flatten().tolist() for step in range(3)]
    assert plain == [[0, 1, 2], [3, 4, 5], [6, 0, 1]]


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("at", [1, 3])
def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path, optimiser, at):
    model = model_of("gpt2")
    how = {"n_steps": 5, "batch_size": 2, "optimiser": optimiser, "share": 0.5, **QUIET}
    with pytest.warns(UserWarning, match=r"read the 6 sequences 1\.7 times"):
        whole = TunedLens.fit(model, DATA, **how)
        passes = count()

        def interrupt(*_):
            # two passes of the first look at the model, then one a step
            if next(passes) == 2 + at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), hooked(model.blocks[1], interrupt):
            TunedLens.fit(model, DATA, **how, folder=tmp_path)
        passes_again = []
        with hooked(model.blocks[1], lambda *_: passes_again.append(1)):
            again = TunedLens.fit(model, DATA, **how, folder=tmp_path)
    assert len(passes_again) == 2 + 5 - at  # only what was missing
    assert torch.equal(again.weight, whole.weight)
    assert torch.equal(again.bias, whole.bias)
    assert torch.equal(again.losses, whole.losses)
    with pytest.raises(ValueError, match="holds another sweep"):
        TunedLens.fit(model, DATA, **{**how, "n_steps": 3}, folder=tmp_path)


def by_hand(model, ids, lens):
    """Log-probabilities of each layer of a lens, and of the model."""
    with torch.no_grad():
        carried = [
            lens.transport(h, layer)
            for layer, h in enumerate(inputs(model, ids), start=-1)
        ]
        rows = [read(model, ids, x) for x in carried] + [run(model, ids)]
    return torch.stack(rows).log_softmax(-1)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "gptj"])
def test_evaluation(kind):
    model = model_of(kind)
    lens = TunedLens.fit(model, DATA, n_steps=3, batch_size=2, **QUIET)
    seen = lens.evaluate(model, DATA, transfer=True, **QUIET)
    log_q = by_hand(model, DATA, lens)
    log_p, q = log_q[-1], log_q.exp()
    loss = -log_q[:, :, :-1].gather(-1, DATA[None, :, 1:, None].expand(4, -1, -1, 1))
    assert gap(seen.cross_entropy, loss[..., 0].mean(2).T) < 1e-9
    assert gap(seen.entropy, -(q * log_q).sum(-1).mean(2).T) < 1e-9
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert gap(seen.kl, kl.mean(2).T) < 1e-9
    assert gap(seen.mean_prob, q.mean((1, 2))) < 1e-9
    assert gap(seen.mean_log_prob, log_q.mean((1, 2))) < 1e-9
    mean = q.mean((1, 2))
    bias = (mean[-1] * (mean[-1] / mean).log()).sum(-1)
    assert gap(seen.bias, bias) < 1e-9 and float(seen.bias[-1]) == 0
    states = inputs(model, DATA)
    for i in range(3):
        for j in range(3):
            with torch.no_grad():
                moved = states[j] + states[j] @ lens.weight[i].T + lens.bias[i]
                other = read(model, DATA, moved).log_softmax(-1)
            picked = other[:, :-1].gather(-1, DATA[:, 1:, None])
            assert float(seen.transfer_cross_entropy[i, j]) == pytest.approx(
                -float(picked.mean()), abs=1e-9
            )
            wanted = (q[j] * (log_q[j] - other)).sum(-1).mean()
            assert float(seen.transfer_kl[i, j]) == pytest.approx(
                float(wanted), abs=1e-9
            )
    table = seen.to_pandas()
    assert table.layer.tolist() == [-1, 0, 1, 2] and table.kl.iloc[-1] == 0
    spread = seen.kl[:, 0].std() / 6**0.5
    assert table.kl_half_width[0] == pytest.approx(2.571 * float(spread), rel=1e-3)
    with pytest.raises(ValueError, match="known for texts only"):
        seen.to_pandas("bits per byte")


def test_evaluation_without_a_lens_is_the_logit_lens(tmp_path):
    model = model_of("llama")
    seen = evaluate_lens(model, DATA, **QUIET)
    plain = logit_lens(model, DATA).kl.unflatten(1, DATA.shape).mean(2)
    assert gap(seen.kl, plain.T) < 1e-10 and seen.lens == "LogitLens"
    again = LensEvaluation.load(seen.save(tmp_path))
    assert torch.equal(again.mean_prob, seen.mean_prob) and again.transfer_kl is None
    for metric in ("kl", "cross_entropy", "entropy"):
        (line,) = seen.plot(metric).get_lines()
        assert np.allclose(line.get_ydata(), getattr(seen, metric).mean(0))
    sys.modules["matplotlib.pyplot"].close("all")


def test_chunks_of_text():
    model = load_model("mini", device="cpu")
    texts = ["Paris is", "", "Rome is a"]
    ids = [0]
    for text in texts:
        ids += [*model.tokenizer(text)["input_ids"], 0]
    ids = ids[:-1]
    assert len(ids) == 8
    found = token_chunks(model, texts, 3)
    assert found.ids.flatten().tolist() == ids[:6] and found.ids.shape == (2, 3)
    assert found.bits_per_byte == pytest.approx(8 / 17 / math.log(2))
    same = token_chunks(model, DATA, 3)
    assert torch.equal(same.ids, DATA) and same.bits_per_byte is None
    with pytest.raises(ValueError, match="8 tokens in all.*one sequence of 9"):
        token_chunks(model, texts, 9)
    with pytest.raises(ValueError, match="length 129 is more than mini reads: 128"):
        token_chunks(model, texts, 129)
    with pytest.raises(ValueError, match="without a tokenizer: give ids"):
        token_chunks(model_of("gpt2"), texts, 3)
    seen = evaluate_lens(model, texts, length=4, **QUIET)
    bits = seen.to_pandas("bits per byte").cross_entropy.iloc[-1]
    log_p = model.logits(found.ids.new_tensor([ids[:4], ids[4:]])).log_softmax(-1)
    after = torch.tensor([ids[1:4], ids[5:]])[..., None]
    nats = -log_p[:, :-1].gather(-1, after).mean()
    assert bits == pytest.approx(float(nats) * 8 / 17 / math.log(2), rel=1e-4)


def test_half_precision_trains_in_float32():
    model = load_model(tiny("gemma2").to(torch.bfloat16))
    lens = TunedLens.fit(model, DATA, n_steps=2, batch_size=3, **QUIET)
    assert lens.weight.dtype == torch.float32 and float(lens.weight.abs().max()) > 0
    assert logit_lens(model, DATA[0], lens=lens).kl.isfinite().all()
    wide = TunedLens.fit(
        load_model(tiny("gemma2")), DATA, n_steps=2, batch_size=3, **QUIET
    )
    assert gap(lens.losses, wide.losses) < 0.2


def test_hostile_lenses(tmp_path):
    model = model_of("gpt2")
    lens = TunedLens.fit(model, DATA, n_steps=2, batch_size=3, **QUIET)
    again = TunedLens.load(lens.save(tmp_path))
    assert torch.equal(again.weight, lens.weight) and again.readout == lens.readout
    changed = tiny("gpt2").double()
    with torch.no_grad():
        changed.lm_head.weight[5, 3] += 1e-6
    for use in (
        lambda m: logit_lens(m, DATA[0], lens=again),
        lambda m: again.evaluate(m, DATA),
    ):
        with pytest.raises(ValueError, match="the unembedding differs, too"):
            use(load_model(changed))
        with pytest.raises(ValueError, match="3 blocks of width 32, but .* 2 of"):
            use(model_of("gpt2", n_layer=2))
    with pytest.raises(ValueError, match="holds a TunedLens, not a LogitLens"):
        LogitLens.load(tmp_path)
    with pytest.raises(ValueError, match="has no layer 3"):
        lens.transport(torch.zeros(1, 32), 3)
    steps = lens.to_pandas()
    assert len(steps) == 6 and steps.loss[4] == float(lens.losses[1, 1])


def test_hostile_training():
    model = model_of("gpt2")
    with pytest.raises(ValueError, match=r"batch_size 7 is more than .* \(6\)"):
        TunedLens.fit(model, DATA, batch_size=7, **QUIET)
    with pytest.raises(ValueError, match="no next token"):
        TunedLens.fit(model, DATA[:, :1], loss="cross_entropy", batch_size=2, n_steps=1)
    with pytest.raises(ValueError, match="no next token"):
        evaluate_lens(model, DATA[:, :1])
    with pytest.raises(ValueError, match="at step 1 .* try a smaller scale than 1e"):
        TunedLens.fit(model, DATA, scale=1e300, n_steps=3, batch_size=2, **QUIET)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="share must be"):
            TunedLens.fit(model, DATA, share=share)
    with pytest.raises(ValueError, match="token id 97 is outside"):
        TunedLens.fit(model, torch.full((8, 3), 97))
    calls = count()

    def first_only(_module, _args, output):
        return output * 2 if next(calls) == 0 else None

    with (
        hooked(model.hf.get_submodule(model.family.unembed), first_only),
        pytest.raises(ValueError, match="readout of the last block's output is off"),
    ):
        TunedLens.fit(model, DATA, n_steps=1, batch_size=2)
