"""Half precision: circuits, traces and edits run, effects are not rounded away, and
what cannot be exact says so.
"""

import warnings

import pytest
import torch
from families import IN_CIRCUITS, tiny

from mechtut.circuits.attribution import attribution_scores
from mechtut.editing.weights import WeightEdit
from mechtut.models.loading import load_model
from mechtut.papers.acdc import acdc
from mechtut.papers.causal_tracing import trace
from mechtut.papers.rome import RomeConfig, edit_fact
from mechtut.patching.last_token import Change, run_changes

TOKENS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
KINDS = [k for k in ("gpt2", "llama", "olmo", "olmo2", "gemma2") if k in IN_CIRCUITS]


@HALF
@pytest.mark.parametrize("kind", KINDS)
def test_methods_run_and_are_near_float32(kind, dtype):
    exact, half = load_model(tiny(kind)), load_model(tiny(kind), dtype=dtype)
    pair = TOKENS, TOKENS.flip(1)
    circuit = acdc(half, *pair, threshold=0.5, progress=False)
    assert circuit.decisions.isfinite().all()
    one, other = (attribution_scores(m, *pair).scores for m in (exact, half))
    assert torch.corrcoef(torch.stack([one, other.to(one)]))[0, 1] > 0.95
    one, other = (trace(m, TOKENS[0], (1, 3), n_samples=2) for m in (exact, half))
    assert other.sample_scores.dtype == torch.float32
    if one.answer == other.answer:
        assert (one.scores - other.scores).abs().max() < 0.1


@HALF
def test_small_effects_are_not_rounded_to_nothing(dtype):
    """Probabilities in the model's own type have steps of 4e-3 near one."""
    model = load_model(tiny("llama"), dtype=dtype)
    small = [Change(2, 0.02 * torch.randn(32), mode="add") for _ in range(40)]
    last = torch.tensor([8, 8])
    nothing = [Change(2, torch.zeros(32))]
    answer = int(model.logits(TOKENS)[0, -1].argmax())

    def p(logits, _prompt):
        return logits.softmax(-1)[:, answer]

    found = run_changes(model, TOKENS, last, [*nothing, *small], p)
    assert found.dtype == torch.float32
    assert ((found[:, 1:] - found[:, :1]) == 0).float().mean() < 0.1


def test_edits_that_bfloat16_swallows_say_so():
    model = load_model("mini", dtype=torch.bfloat16, device="cpu")
    what = {"model": model, "layer": 2, "request": {}}
    weight = model.blocks[2].mlp.c_proj.weight
    tiny_edit = WeightEdit(delta=torch.full(weight.shape, 1e-9), **what)
    with pytest.warns(UserWarning, match="stored weights are unchanged"), tiny_edit:
        pass
    small = WeightEdit(delta=1e-3 * torch.randn(weight.shape), **what)
    with pytest.warns(UserWarning, match="took it with an error of"), small:
        pass
    large = WeightEdit(delta=torch.randn(weight.shape), **what)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with large:
            pass


@pytest.mark.filterwarnings("ignore:the edit is too small")
def test_rome_in_bfloat16():
    """The value is found in float32, so its loss falls as it does there."""
    request = ("{} works as a", "Riley Martin", "pilot")
    how = {"layer": 2, "templates": ["{}"], "covariance": torch.eye(768).double()}
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model("mini", dtype=dtype, device="cpu")
        edit = edit_fact(model, *request, **how, config=RomeConfig(steps=12))
        losses[dtype] = edit.losses
        with edit:
            p = model.logits("Riley Martin works as a")[0, -1].softmax(-1)
        assert p[model.continuation("a", " pilot")[0]] > 0.5
    assert max(abs(a - b) for a, b in zip(*losses.values(), strict=False)) < 0.3


def test_a_loss_that_is_no_number_is_named(monkeypatch):
    model = load_model("mini", device="cpu")
    request = ("{} works as a", "Riley Martin", "pilot")
    how = {"layer": 2, "templates": ["{}"], "covariance": torch.eye(768).double()}
    unembed = type(model).unembed
    calls = []

    def overflowing(self, resid):
        calls.append(1)
        return unembed(self, resid) * (float("nan") if len(calls) > 3 else 1)

    monkeypatch.setattr(type(model), "unembed", overflowing)
    with pytest.raises(ValueError, match=r"loss is nan at step \d+.*float32"):
        edit_fact(model, *request, **how)
