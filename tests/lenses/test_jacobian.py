"""The Jacobian lens against its definition, pair by pair of positions with torch's own
hooks, and reference numbers.
"""

from itertools import count

import numpy as np
import pytest
import torch
from families import CONFIGS, gap, model_of, stream_of, tiny
from golden_models import GOLDEN
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

from mechtut.lenses.jacobian import JacobianLens
from mechtut.lenses.trajectory import LogitLens, logit_lens
from mechtut.models.hooks import Edit, hooked, intervene
from mechtut.models.loading import load_model

QUIET = {"progress": False}
DRAW = torch.Generator().manual_seed(0)
A, B, C = (torch.randint(5, 90, (n,), generator=DRAW).tolist() for n in (6, 6, 5))


def streams(model, ids):
    """Each block's output in one recorded pass, by torch's own hooks."""
    seen = []
    hooks = [
        block.register_forward_hook(lambda _b, _a, out: seen.append(stream_of(out)))
        for block in model.blocks
    ]
    tokens = torch.tensor([ids])
    model.hf(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def by_definition(model, prompts, skip):
    """Mean over prompts and t, sum over t' >= t, of every pair's derivative."""
    n, d = model.n_layers, model.d_model
    total = torch.zeros(n - 1, d, d, dtype=torch.float64)
    for ids in prompts:
        *below, last = streams(model, ids)
        where = range(skip, len(ids) - 1)
        for late in where:
            for a in range(d):
                found = torch.autograd.grad(last[0, late, a], below, retain_graph=True)
                for layer, slope in enumerate(found):
                    early = [t for t in where if t <= late]
                    total[layer, a] += slope[0, early].sum(0) / len(where)
    model.hf.zero_grad(set_to_none=True)
    return total / len(prompts)


@pytest.mark.parametrize("name", ["gpt2t", "llamat"])
def test_reference_numbers(name):
    hf = AutoModelForCausalLM.from_pretrained(
        GOLDEN / "patchscopes" / name, attn_implementation="eager"
    )
    z = np.load(GOLDEN / "patchscopes" / f"jacobian_lens.{name}.f64.npz")
    model, prompts = load_model(hf.double()), torch.from_numpy(z["prompts"])
    near = 1e-12 if name == "gpt2t" else 1e-6  # Llama's norms are float32
    for batch_size in (None, 1, 3, 7):
        how = {"skip_first": int(z["skip_first"]), "batch_size": batch_size, **QUIET}
        lens = JacobianLens.fit(model, prompts, **how)
        assert np.abs(lens.weight.numpy() - z["J"]).max() < near
    assert lens.n_prompts == 3 and lens.n_positions == 3 * (10 - 2 - 1)
    seen = logit_lens(model, z["input_ids"].tolist(), lens=lens)
    assert seen.layers == tuple(range(model.n_layers))
    wanted = z["readout_logits"]
    assert np.abs(seen.logits[:-1].numpy() - wanted).max() < max(near, 1e-9)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_family_equals_the_definition(kind):
    model = model_of(kind)
    lens = JacobianLens.fit(model, [A], skip_first=2, **QUIET)
    wanted = by_definition(model, [A], 2)
    exact = float((wanted - lens.weight).abs().max())
    assert exact < 1e-5 * max(1.0, float(wanted.abs().max()))  # some norms are float32
    assert all(p.grad is None for p in model.hf.parameters())
    states = torch.randn(2, 32, dtype=torch.float64, generator=DRAW)
    found = lens.transport(states, 1)
    assert gap(found, torch.einsum("ab,nb->na", wanted[1], states)) < 1e-4
    assert torch.equal(lens.transport(states, 2), states)


@pytest.mark.parametrize("batch_size", [None, 1, 2, 5])
def test_prompts_of_several_lengths(batch_size):
    model = model_of("gpt2")
    wanted = by_definition(model, [A, B, C], 1)
    how = {"skip_first": 1, "batch_size": batch_size, **QUIET}
    lens = JacobianLens.fit(model, [A, B, C], **how)
    assert gap(lens.weight, wanted) < 1e-12
    assert lens.n_positions == 4 + 4 + 3
    ids, mask = (
        torch.stack([pad(torch.tensor(x), (6 - len(x), 0)) for x in some])
        for some in ([A, B, C], [[1] * 6, [1] * 6, [1] * 5])
    )
    padded = JacobianLens.fit(model, ids, mask=mask, **how)
    assert gap(padded.weight, wanted) < 1e-12
    cut = JacobianLens.fit(model, [A, B, C], length=4, **how)
    assert gap(cut.weight, by_definition(model, [A[:4], B[:4], C[:4]], 1)) < 1e-12


def test_it_is_what_a_small_change_does():
    """No derivative is taken here: a state is moved a little, both ways."""
    model = model_of("llama")
    lens = JacobianLens.fit(model, [A], skip_first=4, **QUIET)  # one position: 4
    push = 1e-4 * torch.randn(32, dtype=torch.float64, generator=DRAW)

    def last(sign):
        edits = [Edit("resid_post", 0, sign * push, pos=4, mode="add")]
        with intervene(model, edits), torch.no_grad():
            return streams(model, A)[-1][0, 4]

    moved = (last(1) - last(-1)) / 2
    wanted = lens.transport(push, 0)
    assert gap(moved, wanted) < 1e-3 * float(wanted.abs().max())


@pytest.mark.parametrize("at", [0, 4, 40, 90])
def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch, at):
    model = model_of("gpt2")
    how = {"skip_first": 1, "batch_size": 1, **QUIET}
    whole = JacobianLens.fit(model, [A, B, C], **how)  # 96 passes
    real, passes = torch.autograd.grad, count()

    def interrupt(*given, **named):
        if next(passes) == at:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(torch.autograd, "grad", interrupt)
    with pytest.raises(KeyboardInterrupt):
        JacobianLens.fit(model, [A, B, C], **how, folder=tmp_path)
    assert next(passes) == at + 1
    again = JacobianLens.fit(model, [A, B, C], **how, folder=tmp_path)
    assert next(passes) == at + 2 + 96 - at  # only what was missing
    assert torch.equal(again.weight, whole.weight)
    JacobianLens.fit(model, [A, B, C], **how, folder=tmp_path)
    assert next(passes) == at + 3 + 96 - at  # nothing at all
    with pytest.raises(ValueError, match="holds another sweep"):
        JacobianLens.fit(model, [A, B], **how, folder=tmp_path)


def test_texts():
    model = load_model("mini", device="cpu")
    text = "Riley Martin works as a singer in Paris. " * 20
    assert len(model.encode(text)) > model.n_ctx
    ids = model.encode(text)[:20]
    how = {"skip_first": 15, **QUIET}
    by_text = JacobianLens.fit(model, text, length=20, **how)
    by_ids = JacobianLens.fit(model, [ids], **how)
    assert torch.equal(by_text.weight, by_ids.weight) and by_text.n_positions == 4


def test_half_precision():
    model = load_model(tiny("gemma2").to(torch.bfloat16))
    lens = JacobianLens.fit(model, [A], skip_first=2, **QUIET)
    wide = JacobianLens.fit(load_model(tiny("gemma2")), [A], skip_first=2, **QUIET)
    assert lens.weight.dtype == torch.float32
    assert gap(lens.weight, wide.weight) < 0.1 * float(wide.weight.abs().max())
    assert logit_lens(model, A, lens=lens).kl.isfinite().all()


def test_hostile(tmp_path):
    model = model_of("gpt2")
    with pytest.raises(ValueError, match="no prompt has more than 17 tokens"):
        JacobianLens.fit(model, [A, B])
    with pytest.warns(UserWarning, match="1 of 2 prompts have no more than 5 tokens"):
        lens = JacobianLens.fit(model, [A, C], skip_first=4, **QUIET)
    assert lens.n_prompts == 1
    with pytest.raises(ValueError, match="has one block"):
        JacobianLens.fit(model_of("gpt2", n_layer=1), [A], skip_first=2)
    with pytest.raises(ValueError, match="has no layer -1: it has layers 0, 1, 2"):
        logit_lens(model, A, lens=lens, layers=[-1, 0])
    again = JacobianLens.load(lens.save(tmp_path))
    assert torch.equal(again.weight, lens.weight) and len(again.to_pandas()) == 2
    other = tiny("gpt2").double()
    with torch.no_grad():
        other.transformer.h[2].ln_1.bias[0] += 1
    with pytest.raises(ValueError, match="other weights.*unembedding is the same"):
        logit_lens(load_model(other), A, lens=again)
    with pytest.raises(ValueError, match="holds a JacobianLens, not a LogitLens"):
        LogitLens.load(tmp_path)
    with (
        intervene(model, [Edit("resid_post", 0, 0.0)]),
        pytest.raises(RuntimeError, match="leave the block"),
    ):
        JacobianLens.fit(model, [A], skip_first=2, **QUIET)

    def spoil(_block, _args, output):
        stream_of(output)[:, 2] = torch.inf

    with (
        hooked(model.blocks[1], spoil),
        pytest.raises(ValueError, match="derivative of output 0 is NaN or infinite"),
    ):
        JacobianLens.fit(model, [A], skip_first=2, **QUIET)
