"""Edits as functions of what is there, and positions that differ from row to row."""

import pytest
import torch
from families import tiny

from mechtut.models.hooks import Edit, Where, capture, intervene
from mechtut.models.loading import load_model
from mechtut.patching.replay import Replay

DRAW = torch.Generator().manual_seed(7)
TOKENS = torch.randint(1, 97, (2, 6), generator=DRAW)
V = torch.randn(32, generator=DRAW, dtype=torch.float64)
UNIT = V / V.norm()


def along(x):
    return (x @ UNIT)[..., None]


BY_HAND = {
    "set": (dict(mode="set", amount=2.0), lambda x: (2 * V).expand_as(x)),
    "add": (dict(mode="add", amount=-0.5), lambda x: x - 0.5 * V),
    "ablate": (dict(mode="ablate", amount=9.0), lambda x: x - along(x) * UNIT),
    "project": (dict(mode="project", amount=0.3), lambda x: x - 0.3 * along(x) * UNIT),
    "piecewise": (
        dict(mode="piecewise", amount=2.0),
        lambda x: x + along(x).sign() * 2 * V,
    ),
    "apply": (dict(mode="apply", value=torch.tanh), torch.tanh),
}


def plain(model, layer, columns, change):
    """Logits with a forward hook on a block that changes some columns."""

    def hook(_module, _args, output):
        x = (output[0] if isinstance(output, tuple) else output).clone()
        x[:, columns] = change(x[:, columns])
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = model.blocks[layer].register_forward_hook(hook)
    try:
        return model.logits(TOKENS)
    finally:
        handle.remove()


@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_modes_are_what_their_words_say(kind, name, keep_norm):
    model = load_model(tiny(kind), dtype=torch.float64)
    given, by_hand = BY_HAND[name]

    def change(x):
        new = by_hand(x)
        if not keep_norm:
            return new
        return new * x.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True)

    wanted = plain(model, 0, [1, 4], change)
    given = {"value": V, **given, "keep_norm": keep_norm}
    edit = Edit("resid_post", 0, pos=[1, 4], **given)
    with intervene(model, [edit]):
        assert torch.allclose(model.logits(TOKENS), wanted, atol=1e-10)
    found = Replay(model, TOKENS).run([[edit]])[0, :, 0]
    assert torch.allclose(found, wanted[:, -1], atol=1e-10)
    assert not torch.allclose(found, model.logits(TOKENS)[:, -1], atol=1e-4)


def test_the_engine_tells_edits_apart_that_differ_in_amount_or_norm_only():
    model = load_model(tiny("gpt2"), dtype=torch.float64)
    edits = [
        [Edit("resid_post", 0, V, mode="add", amount=a, keep_norm=k)]
        for a in (1.0, 2.0)
        for k in (False, True)
    ]
    found = Replay(model, TOKENS).run(edits)[:, :, 0]
    for row, edit in zip(found, edits, strict=True):
        with intervene(model, edit):
            assert torch.allclose(row, model.logits(TOKENS)[:, -1], atol=1e-10)


@pytest.mark.parametrize("mode", ["add", "ablate", "project", "piecewise"])
def test_half_precision_computes_in_float32(mode):
    model = load_model(tiny("llama"), dtype=torch.bfloat16)
    v = V.float()
    with intervene(model, []):
        before = capture(model, TOKENS, "resid_post.1")["resid_post.1"]
    edit = Edit("resid_post", 1, v, mode=mode)
    after = capture(model, TOKENS, "resid_post.1", edits=[edit])["resid_post.1"]
    x, c = before.float(), (before.float() @ v)[..., None]
    share = c / v.square().sum() * v
    wanted = {
        "add": x + v,
        "ablate": x - share,
        "project": x - share,
        "piecewise": x + c.sign() * v,
    }[mode]
    assert torch.equal(after, wanted.bfloat16())


@pytest.mark.parametrize("mode", ["ablate", "project", "piecewise", "add", "apply"])
def test_gradients_go_through_every_edit(mode):
    model = load_model(tiny("gpt2"), dtype=torch.float64)
    v = V.clone().requires_grad_(True)
    value = (lambda x: x * v) if mode == "apply" else v

    def loss(v):
        value = (lambda x: x * v) if mode == "apply" else v
        edit = Edit("resid_post", 0, value, pos="last", mode=mode, keep_norm=True)
        with intervene(model, [edit]):
            return model.logits(TOKENS, gradients=True)[:, -1, 5].sum()

    (slope,) = torch.autograd.grad(loss(v), v)
    step = 1e-6 * torch.randn(32, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        rise = float(loss(V + step) - loss(V - step)) / 2
    assert callable(value) == (mode == "apply")
    assert float(slope @ step) == pytest.approx(rise, rel=1e-5)


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(value=torch.tanh), "mode 'set' does not fit"),
        (dict(value=V, mode="apply"), "mode 'apply' does not fit"),
        (dict(value=V, mode="remove"), "mode must be one of 'set'"),
        (dict(value=V, amount=float("nan")), "amount"),
    ],
)
def test_edits_that_contradict_themselves(given, words):
    with pytest.raises((ValueError, TypeError), match=words):
        Edit("resid_post", 0, **given)


def test_a_function_must_keep_the_shape_and_a_direction_may_not_be_zero():
    model = load_model(tiny("gpt2"))
    wrong = Edit("resid_post", 0, lambda x: x[..., :3], mode="apply")
    with pytest.raises(ValueError, match="must give"), intervene(model, [wrong]):
        model.logits(TOKENS)
    zero = Edit("resid_post", 0, torch.zeros(32), mode="ablate")
    with pytest.raises(ValueError, match="value is zero"), intervene(model, [zero]):
        model.logits(TOKENS)


# --- positions that differ from row to row


def rows_of(model, batch, mask, edit):
    return capture(model, batch, "resid_post.1", edits=[edit], attention_mask=mask)[
        "resid_post.1"
    ]


@pytest.mark.parametrize("given", ["rows", "mask", "Where"])
def test_each_row_has_its_own_positions_and_values(given):
    model = load_model(tiny("llama"), dtype=torch.float64)
    v = torch.randn(2, 2, 32, generator=DRAW, dtype=torch.float64)
    rows = torch.tensor([[0, 3], [2, -1]])
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, [0, 3]] = mask[1, [2, 5]] = True
    pos = {"rows": rows, "mask": mask, "Where": Where("rows", rows=((0, 3), (2, 5)))}
    edit = Edit("resid_post", 1, v, pos=pos[given], mode="add")
    found = rows_of(model, TOKENS, None, edit)
    wanted = capture(model, TOKENS, "resid_post.1")["resid_post.1"].clone()
    wanted[0, [0, 3]] += v[0]
    wanted[1, [2, 5]] += v[1]
    assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", ["front", "mid", "back"])
def test_rules_count_in_each_prompt_also_with_padding(rule, side):
    model = load_model(tiny("llama"), dtype=torch.float64)
    v = torch.randn(2, 32, generator=DRAW, dtype=torch.float64)
    edit = Edit("resid_post", 1, v, pos=Where(rule, width=2), mode="add")
    short = TOKENS[:1, :5]
    first = {"front": 0, "mid": 1, "back": 3}[rule]
    wanted = capture(model, short, "resid_post.1")["resid_post.1"][0].clone()
    wanted[first : first + 2] += v
    pad, real = torch.zeros(1, 1, dtype=torch.long), torch.ones_like(short)
    left = side == "left"
    tokens = torch.cat(
        [torch.cat([pad, short] if left else [short, pad], 1), TOKENS[1:]]
    )
    mask = torch.cat(
        [torch.cat([pad, real] if left else [real, pad], 1), torch.ones(1, 6)]
    )
    found = rows_of(model, tokens, mask.long(), edit)[0]
    assert torch.allclose(found[1:] if left else found[:5], wanted, atol=1e-9)


def test_prompt_rules_do_not_touch_what_is_generated():
    model = load_model(tiny("gpt2"), dtype=torch.float64)
    v = 5 * torch.randn(2, 32, generator=DRAW, dtype=torch.float64)
    seen = []

    def watch(_module, _args, output):
        x = output[0] if isinstance(output, tuple) else output
        seen.append(x.clone())

    edit = Edit("resid_post", 0, v, pos=Where("back", width=2), mode="add")
    given = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with intervene(model, [edit]):
        steered = model.hf.generate(TOKENS, **given)
    clean = capture(model, steered[:, :6], "resid_post.0")["resid_post.0"]
    clean[:, 4:6] += v

    # by hand: the prompt's block output replaced, the new tokens left alone
    def hook(_module, _args, output):
        x = output[0] if isinstance(output, tuple) else output
        if x.shape[1] > 1:
            x = clean
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = model.blocks[0].register_forward_hook(hook)
    by_hand = model.hf.generate(TOKENS, **given)
    handle.remove()
    assert torch.equal(steered, by_hand)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Where("front"), "width=0 does not fit"),
        (lambda: Where("text", width=2), "width=2 does not fit"),
        (lambda: Where("rows"), "rows=.. does not fit"),
        (lambda: Where("new", rows=((1,),)), "does not fit the rule 'new'"),
        (lambda: Where("from", -1), "start"),
    ],
)
def test_rules_that_contradict_themselves(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_rows_that_do_not_fit_the_batch():
    model = load_model(tiny("gpt2"))
    for pos, error, words in (
        (Where("rows", rows=((0,),)), ValueError, "positions for 1 rows"),
        (Where("rows", rows=((0,), (9,))), IndexError, "position 9 is outside"),
        (Where("front", width=7), ValueError, "needs 7 positions, and a prompt has 6"),
        (Where("from", (1, 2, 3)), ValueError, "begins at 3 positions"),
    ):
        edit = Edit("resid_post", 0, 1.0, pos=pos)
        with pytest.raises(error, match=words), intervene(model, [edit]):
            model.logits(TOKENS)


def test_the_engine_refuses_what_it_cannot_follow():
    model = load_model(tiny("gpt2"))
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
    rows = Edit("resid_post", 0, 1.0, pos=torch.tensor([[0], [1]]))
    with pytest.raises(ValueError, match="differs from row to row"):
        Replay(model, TOKENS).run([[rows]])
    last = Edit("resid_post", 0, 1.0, pos="last")
    with pytest.raises(ValueError, match="counts from the ends"):
        Replay(model, TOKENS, attention_mask=mask).run([[last]])
    from_rows = Edit("resid_post", 0, 1.0, pos=Where("from", (2, 4)), mode="add")
    with intervene(model, [from_rows]):
        both = model.logits(TOKENS)
    for i, start in enumerate((2, 4)):
        one = Edit("resid_post", 0, 1.0, pos=slice(start, None), mode="add")
        with intervene(model, [one]):
            assert torch.allclose(
                model.logits(TOKENS[i : i + 1]), both[i : i + 1], atol=1e-5
            )


# --- found by a reader who tried to break it


@pytest.mark.parametrize("given", [{"mode": "ablate"}, {"keep_norm": True}])
@pytest.mark.parametrize(
    "place", [{"site": "mlp_act", "neuron": 3}, {"site": "pattern"}]
)
def test_what_has_no_vectors_cannot_be_projected(given, place):
    with pytest.raises(ValueError, match="needs a vector at each position"):
        Edit(layer=0, value=1.0, **given, **place)


def test_keep_norm_has_a_slope_where_the_new_state_is_zero():
    model = load_model(tiny("gpt2"), dtype=torch.float64)
    v = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    edit = Edit("resid_post", 0, v, pos=[1], keep_norm=True)
    with intervene(model, [edit]):
        value = model.logits(TOKENS, gradients=True)[:, -1].sum()
    (slope,) = torch.autograd.grad(value, v)
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize("rule", ["prompt", "new", "last"])
def test_rules_of_a_prompt_that_was_not_seen_whole_are_refused(rule):
    model = load_model(tiny("llama"))
    edit = Edit("resid_post", 1, 1.0, pos=rule, mode="add")
    outside = model.hf(TOKENS[:, :4], use_cache=True).past_key_values
    with (
        pytest.raises(ValueError, match="not seen whole"),
        intervene(model, [edit], must_fire=False),
    ):
        model.hf(TOKENS[:, 4:5], past_key_values=outside, use_cache=True)
    with (
        pytest.raises(ValueError, match="not seen whole"),
        intervene(model, [edit], must_fire=False),
    ):
        first = model.hf(TOKENS[:, :2], use_cache=True).past_key_values
        model.hf(TOKENS[:, 2:4], past_key_values=first, use_cache=True)
    with intervene(model, [edit], prompt_length=6, must_fire=False):  # told
        first = model.hf(TOKENS[:, :2], use_cache=True).past_key_values
        pieces = model.hf(TOKENS[:, 2:], past_key_values=first, use_cache=True)
        whole = model.logits(TOKENS)
    assert torch.allclose(pieces.logits[:, -1], whole[:, -1], atol=1e-5)
