"""Causal bases against the authors' numbers, energies written out, torch's hooks."""

import numpy as np
import pytest
import torch
from families import gap, model_of, tiny
from golden_models import GOLDEN
from transformers import AutoModelForCausalLM

from mechtut.lenses import causal_basis as room
from mechtut.lenses.causal_basis import (
    CausalBasis,
    CausalFaithfulness,
    causal_basis,
    causal_faithfulness,
    lens_energies,
)
from mechtut.models.loading import load_model
from mechtut.patching.places import SoftPrompt

FOLDER = GOLDEN / "patchscopes"
QUIET = {"progress": False}
DRAW = torch.Generator().manual_seed(0)
IDS = [torch.randint(5, 90, (n,), generator=DRAW).tolist() for n in (6, 4, 6)]


class Affine:
    """A lens as a tuned one: states, and an affine map of them."""

    def __init__(self, d, scale=0.2):
        draw = torch.Generator().manual_seed(1)
        self.weight = torch.randn(d, d, generator=draw).double() * scale
        self.bias = torch.randn(d, generator=draw).double() * scale
        self.weight.requires_grad_()
        self.asked, self.checked = set(), []

    def transport(self, states, layer):
        self.asked.add(layer)
        return states + states @ self.weight + self.bias

    def check(self, model):
        self.checked.append(model)


@torch.no_grad()
def states_by_hooks(model, layer, rows=IDS):
    """All tokens' states: outputs of a block, or the input of the first."""
    found = []
    for ids in rows:
        if layer < 0:
            hook = model.blocks[0].register_forward_pre_hook(
                lambda _m, args, kw: found.append(
                    args[0] if args else kw["hidden_states"]
                ),
                with_kwargs=True,
            )
        else:
            hook = model.blocks[layer].register_forward_hook(
                lambda _m, _a, out: found.append(
                    out[0] if isinstance(out, tuple) else out
                )
            )
        model.hf(torch.tensor([ids]), use_cache=False)
        hook.remove()
    return torch.cat([x[0] for x in found])


def divergence(one, other):
    log_p, log_q = one.log_softmax(-1), other.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def energy_written_out(model, states, others, v, lens=None, layer=0):
    v = v / v.norm()
    removed = torch.stack(
        [h - (h @ v) * v + (o @ v) * v for h, o in zip(states, others, strict=True)]
    )
    if lens is not None:
        states, removed = (lens.transport(x, layer) for x in (states, removed))
    return divergence(model.unembed(states), model.unembed(removed)).mean()


@pytest.mark.parametrize("block", range(4))
def test_the_authors_numbers(block):
    """Their index is the input of a block, ours the output of the one before."""
    hf = AutoModelForCausalLM.from_pretrained(
        FOLDER / "gpt2t", attn_implementation="eager"
    )
    model, z = load_model(hf), np.load(FOLDER / "causal_basis.gpt2t.f32.npz")
    energies = torch.from_numpy(z[f"energies_{block}"])
    vectors = torch.from_numpy(z[f"vectors_{block}"]).T
    given = model, z["data"], block - 1
    assert torch.allclose(lens_energies(*given, vectors), energies, rtol=1e-4)
    basis = causal_basis(*given, 2, **QUIET)
    assert (basis.energies >= energies * 0.98).all()
    alike = float((basis.vectors[0] @ vectors[0]).abs())
    assert alike > 0.99 or basis.energies[0] > energies[0]
    more = causal_basis(*given, 1, starts=4, **QUIET)
    assert more.energies[0] >= basis.energies[0] * 0.999
    assert torch.allclose(lens_energies(*given, more.vectors), more.energies, rtol=1e-4)


def test_more_starts_find_what_one_misses():
    hf = AutoModelForCausalLM.from_pretrained(
        FOLDER / "gpt2t", attn_implementation="eager"
    )
    model, z = load_model(hf), np.load(FOLDER / "causal_basis.gpt2t.f32.npz")
    more = causal_basis(model, z["data"], -1, 1, starts=4, **QUIET)
    assert more.energies[0] > 1.3 * z["energies_0"][0]


@pytest.mark.parametrize("ablate", ["mean", "zero", "resample"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "cohere", "gptj"])
def test_energies_written_out(kind, ablate):
    model = model_of(kind)
    lens = Affine(model.d_model) if kind != "llama" else None
    v = torch.randn(2, model.d_model, generator=DRAW).double()
    for layer in (-1, 1):
        states = states_by_hooks(model, layer)
        found = lens_energies(model, IDS, layer, v, lens, ablate, seed=3)
        if ablate == "resample":
            others = room._Tokens(IDS, states).others("resample", 3)
            same = (others[:, None] == states[None]).all(-1)
            assert same.sum() == 16 and not same.diagonal().any()
            assert (same.sum(0) == 1).all(), "each row is used once"
        else:
            mean = states.mean(0) if ablate == "mean" else torch.zeros_like(v[0])
            others = mean.expand_as(states)
        wanted = [energy_written_out(model, states, others, x, lens, layer) for x in v]
        assert gap(found, torch.stack(wanted)) < 1e-6
        assert found.min() > 1e-4


@pytest.mark.parametrize("lens", ["logit", "affine", "curved"])
def test_a_basis_is_orthonormal_and_at_a_maximum(lens):
    model = model_of("gemma2")
    made = {"logit": None, "affine": Affine(32), "curved": Affine(32)}[lens]
    if lens == "curved":
        made.transport = lambda states, layer: states + torch.tanh(states)
    given = {"lens": made, "ablate": "mean"}
    basis = causal_basis(model, IDS, 1, 4, **given, **QUIET)
    eye = basis.vectors @ basis.vectors.T
    assert gap(eye, torch.eye(4)) < 1e-8
    assert (basis.energies.diff() <= 0).all()
    near = lens_energies(model, IDS, 1, basis.vectors, **given)
    assert gap(near, basis.energies) < 1e-9
    away = torch.randn(60, 32, generator=DRAW).double()
    pushed = basis.vectors[0] + 0.05 * away / away.norm(dim=-1, keepdim=True)
    assert lens_energies(model, IDS, 1, pushed, **given).max() < near[0] * 1.001
    assert lens_energies(model, IDS, 1, away, **given).max() < near[0]
    if lens == "affine":
        assert made.asked == {1} and made.checked[0] is model
        assert made.weight.grad is None


def test_weights_are_left_alone():
    model = load_model(tiny("gpt2").double().train())
    model.hf.requires_grad_()
    causal_basis(model, IDS, 1, 1, **QUIET)
    assert model.hf.training
    assert all(p.requires_grad and p.grad is None for p in model.hf.parameters())


def test_in_parts_is_the_same(monkeypatch):
    model = model_of("gpt2")
    whole = causal_basis(model, IDS, 1, 2, **QUIET)
    faithful = causal_faithfulness(model, whole, IDS, **QUIET)
    monkeypatch.setattr(room, "_NUMBERS", 6 * model.d_vocab)
    parts = causal_basis(model, IDS, 1, 2, **QUIET)
    assert gap(parts.energies, whole.energies) < 1e-6
    assert gap((parts.vectors * whole.vectors).sum(-1).abs(), torch.ones(2)) < 1e-4
    again = causal_faithfulness(model, whole, IDS, **QUIET)
    assert gap(again.model, faithful.model) < 1e-9


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("layer", [-1, 1, 2])
def test_faithfulness_by_torch_hooks(kind, layer):
    model = model_of(kind)
    v = torch.linalg.qr(torch.randn(32, 3, generator=DRAW).double()).Q.T
    basis = CausalBasis(
        vectors=v, energies=torch.ones(3), layer=layer, ablate="mean", n_tokens=1
    )
    found = causal_faithfulness(model, basis, IDS, **QUIET)
    mean = states_by_hooks(model, layer).mean(0)
    for j, direction in enumerate(v):

        def remove(x, direction=direction):
            return x + ((mean - x) @ direction)[..., None] * direction

        def before(_m, args, kwargs, remove=remove):
            if args:
                return (remove(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": remove(kwargs["hidden_states"])}

        def after(_m, _a, out, remove=remove):
            if isinstance(out, tuple):
                return (remove(out[0]), *out[1:])
            return remove(out)

        changes = []
        for ids in IDS:
            tokens = torch.tensor([ids])
            with torch.no_grad():
                own = model.hf(tokens, use_cache=False).logits[0]
                if layer < 0:
                    hook = model.blocks[0].register_forward_pre_hook(
                        before, with_kwargs=True
                    )
                else:
                    hook = model.blocks[layer].register_forward_hook(after)
                changes.append(
                    divergence(own, model.hf(tokens, use_cache=False).logits[0])
                )
                hook.remove()
        assert gap(found.model[j], torch.cat(changes).mean()) < 1e-6
    if layer == 2:  # behind the last block the logit lens is the model
        assert gap(found.lens, found.model) < 1e-6
    else:
        assert gap(found.lens, found.model) > 1e-3


def test_rank_correlation_and_tables(tmp_path):
    found = CausalFaithfulness(
        lens=torch.tensor([3.0, 2.0, 1.0, 1.0]),
        model=torch.tensor([9.0, 1.0, 2.0, 0.5]),
        layer=1,
        ablate="mean",
        n_tokens=4,
    )
    # ranks 4 3 1.5 1.5 and 4 2 3 1
    one, other = np.array([4, 3, 1.5, 1.5]), np.array([4, 2, 3, 1])
    wanted = np.corrcoef(one, other)[0, 1]
    assert found.correlation == pytest.approx(wanted)
    assert list(found.to_pandas()) == ["vector", "lens", "model"]
    assert found.plot().get_title().endswith("0.63")
    basis = causal_basis(model_of("gpt2"), IDS, 1, 2, **QUIET)
    again = CausalBasis.load(basis.save(tmp_path / "basis"))
    assert torch.equal(again.vectors, basis.vectors) and again.layer == 1
    assert len(basis.plot().lines[0].get_xdata()) == len(basis.to_pandas()) == 2


def test_padding_is_left_out():
    model = model_of("gpt2")
    v = torch.randn(1, 32, generator=DRAW).double()
    padded = torch.tensor([ids + [0] * (6 - len(ids)) for ids in IDS])
    mask = torch.tensor([[1] * len(ids) + [0] * (6 - len(ids)) for ids in IDS])
    masked = lens_energies(model, padded, 1, v, mask=mask)
    assert gap(masked, lens_energies(model, IDS, 1, v)) < 1e-12
    basis = causal_basis(model, padded, 1, 1, mask=mask, **QUIET)
    assert basis.n_tokens == 16
    found = causal_faithfulness(model, basis, padded, mask=mask, **QUIET)
    plain = causal_faithfulness(model, basis, IDS, **QUIET)
    assert gap(found.model, plain.model) < 1e-9


def test_half_precision():
    model = load_model("mini", dtype=torch.bfloat16, device="cpu")
    prompts = "Riley Martin works as a"
    basis = causal_basis(model, prompts, 5, 2, **QUIET)
    assert basis.vectors.dtype == torch.float32
    assert gap(basis.vectors @ basis.vectors.T, torch.eye(2)) < 1e-4
    exact = lens_energies(load_model("mini"), prompts, 5, basis.vectors)
    assert torch.allclose(exact, basis.energies, rtol=0.2)


def test_stopped_work_goes_on(tmp_path, monkeypatch):
    model = model_of("gpt2")
    whole = causal_basis(model, IDS, 1, 3, **QUIET)
    search, done = room._best, []

    def tired(*given):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return search(*given)

    monkeypatch.setattr(room, "_best", tired)
    how = {"folder": tmp_path / "basis", **QUIET}
    with pytest.raises(KeyboardInterrupt):
        causal_basis(model, IDS, 1, 3, **how)
    monkeypatch.setattr(room, "_best", search)
    again = causal_basis(model, IDS, 1, 3, **how)
    assert torch.equal(again.vectors, whole.vectors)
    with pytest.raises(ValueError, match="holds another sweep"):
        causal_basis(model, IDS, 2, 3, **how)


def test_what_is_refused():
    model = model_of("gpt2")
    v = torch.eye(32).double()
    for error, message, given, more in (
        (ValueError, "k=33, but the stream has 32 directions", (IDS, 1, 33), {}),
        (ValueError, "prompts must be text or token ids", (SoftPrompt(v), 1, 1), {}),
        (IndexError, "layer 3 of the lens does not exist", (IDS, 3, 1), {}),
        (ValueError, "needs at least two tokens, not 1", ([[5]], 1, 1), {}),
        (
            TypeError,
            "lens must be a LensLike or None",
            (IDS, 1, 1),
            {"lens": 3},
        ),
        (ValueError, "ablate must be one of 'mean'", (IDS, 1, 1), {"ablate": "noise"}),
        (
            ValueError,
            "tolerance must be a number above 0",
            (IDS, 1, 1),
            {"tolerance": 0},
        ),
    ):
        with pytest.raises(error, match=message):
            causal_basis(model, *given, **more, **QUIET)
    with pytest.raises(ValueError, match="direction 1 has length zero"):
        lens_energies(model, IDS, 1, torch.stack([v[0], 0 * v[0]]))
    narrow = CausalBasis(
        vectors=v[:1, :8], energies=v[0, :1], layer=1, ablate="mean", n_tokens=2
    )
    with pytest.raises(ValueError, match="the basis has vectors of 8 numbers"):
        causal_faithfulness(model, narrow, IDS)
    one = [[5]]
    assert lens_energies(model, one, 1, v[:1], ablate="zero").isfinite()
