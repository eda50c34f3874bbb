"""The network: a plain pass over the whole sequence gives the same logits and
gradients, and the authors' weights the authors' numbers.
"""

import pytest
import torch
from families import gap
from grokking_golden import arrays, network, weights
from torch.nn import functional as F

from mechtut.grokking.network import WEIGHTS, ModularAddition
from mechtut.models.hooks import Edit, capture, intervene

SMALL = {"d_model": 12, "n_heads": 3, "d_mlp": 20}


def whole_sequence(w, ids, rate=1.0):
    """All positions, with a causal mask, as the authors write it."""
    x = w["W_E"][:, ids].permute(1, 2, 0) + w["W_pos"]
    q, k, v = (torch.einsum("hed,npd->nhpe", w[n], x) for n in ("W_Q", "W_K", "W_V"))
    mask = torch.tril(torch.ones(3, 3, dtype=x.dtype))
    scores = q @ k.transpose(-1, -2) * mask - 1e10 * (1 - mask)
    pattern = (scores / q.shape[-1] ** 0.5).softmax(-1)
    pattern = rate * pattern + (1 - rate) * mask / mask.sum(1, keepdim=True)
    x = x + (pattern @ v).transpose(1, 2).flatten(2) @ w["W_O"].T
    act = F.relu(x @ w["W_in"].T + w["b_in"])
    x = x + act @ w["W_out"].T + w["b_out"]
    return (x @ w["W_U"])[:, -1]


@pytest.mark.parametrize("p", [7, 9, 11])  # 9 is no prime
@pytest.mark.parametrize("rate", [1.0, 0.3, 0.0])
def test_the_last_position_alone_is_the_whole_function(p, rate):
    model = ModularAddition(p, **SMALL, seed=3, attention=rate).double()
    with torch.no_grad():
        for bias in (model.b_in, model.b_out):
            bias.normal_(generator=torch.Generator().manual_seed(1))
    ids = model.inputs()[torch.randperm(p * p)]
    plain = whole_sequence(dict(model.named_parameters()), ids, rate)
    ours = model(ids)
    assert gap(ours, plain) < 1e-12
    answers = ids[:, :2].sum(1) % p
    slopes = [
        torch.autograd.grad(F.cross_entropy(x, answers), list(model.parameters()))
        for x in (ours, plain)
    ]
    for one, other in zip(*slopes, strict=True):
        assert gap(one, other) < 1e-12
    assert sum(float(g.abs().sum()) > 0 for g in slopes[0]) == len(WEIGHTS) - 2 * (
        rate == 0
    )


def test_numbers_of_the_authors():
    model, known = network(), arrays()
    assert gap(model.all_logits(), known["logits"]) < 1e-9
    acts = capture(model, model.inputs(), ["pattern", "mlp_act"])
    assert gap(acts["mlp_act"][:, 0, :8], known["neuron_acts_first8"]) < 1e-9
    pattern = acts["pattern"][:, :, 0].reshape(31, 31, 4, 3)
    assert gap(pattern[:8, :8], known["attn_to_a_b_eq"]) < 1e-9


def test_first_weights_are_drawn_as_by_the_authors():
    model = ModularAddition(31, d_model=32, d_mlp=96, seed=0)
    for name, value in weights("init").items():
        assert torch.equal(getattr(model, name), value), name
    assert not torch.equal(ModularAddition(31, seed=1).W_E, ModularAddition(31).W_E)


def test_all_inputs_come_in_the_order_of_a():
    ids = ModularAddition(7, **SMALL).inputs()
    assert ids.tolist() == [[a, b, 7] for a in range(7) for b in range(7)]


def test_places_have_names():
    """Patching all of the MLP's input moves its output, and the last place decides."""
    model = ModularAddition(7, **SMALL).double()
    one, other = model.inputs()[:5], model.inputs()[20:25]
    there = capture(model, other, ["embed", "resid_mid", "resid_post", "z"])
    for place in ("embed", "resid_mid", "resid_post"):
        with intervene(model, [Edit(place, None, there[place])]):
            assert gap(model(one), model(other)) < 1e-12
    with intervene(model, [Edit("z", None, there["z"])]):  # "=" itself is the same
        assert gap(model(one), model(other)) < 1e-12
    mixed = torch.cat([other[:, :1], one[:, 1:]], 1)
    assert gap(model(one), model(mixed)) > 1e-3
    with intervene(model, [Edit("embed", None, there["embed"][:, :1], pos=0)]):
        changed = model(one)
    assert gap(changed, model(mixed)) < 1e-12


@pytest.mark.parametrize("p, message", [(8, "p must be odd, not 8"), (5, "at least 7")])
def test_a_modulus_without_all_waves(p, message):
    with pytest.raises(ValueError, match=message):
        ModularAddition(p)


def test_weights_that_do_not_belong_together():
    state = dict(ModularAddition(7, **SMALL).state_dict())
    other = ModularAddition(11, **SMALL).state_dict()
    with pytest.raises(
        ValueError, match=r"W_U has shape \[12, 12\], but W_E is of p = 7"
    ):
        ModularAddition.from_weights({**state, "W_U": other["W_U"]})
    with pytest.raises(ValueError, match="the weights lack W_out, b_in"):
        ModularAddition.from_weights(
            {k: v for k, v in state.items() if k not in ("b_in", "W_out")}
        )
    with pytest.raises(ValueError, match="W_Q must have 3 axes, not 2"):
        ModularAddition.from_weights({**state, "W_Q": state["W_Q"].flatten(0, 1)})
    for wrong in (float("nan"), float("inf")):
        bad = state["W_out"].clone()
        bad[3, 4] = wrong
        with pytest.raises(ValueError, match="W_out holds NaN or infinity"):
            ModularAddition.from_weights(state | {"W_out": bad})
    with pytest.raises(ValueError, match="p must be odd, not 8"):
        ModularAddition.from_weights(state | {"W_E": torch.zeros(12, 9)})
    with pytest.raises(ValueError, match="n_heads must divide d_model=12"):
        ModularAddition(7, d_model=12, n_heads=5)


def test_the_type_of_the_weights_stays():
    state = {k: v.double() for k, v in ModularAddition(7, **SMALL).state_dict().items()}
    model = ModularAddition.from_weights(state)
    assert model(model.inputs()).dtype == torch.float64
