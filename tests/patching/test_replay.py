"""The engine equals the loop, for any model, any edits; it stays within its memory, and
goes on after a stop.
"""

from functools import cache

import pytest
import torch
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mechtut.models.hooks import Edit, capture, intervene
from mechtut.models.loading import load_model
from mechtut.patching import replay as replay_module
from mechtut.patching.matmul import fast_matmul
from mechtut.patching.replay import Replay, naive_replay

N_POS, ROWS = 7, 2
TOKENS = torch.randint(1, 97, (ROWS, N_POS), generator=torch.Generator().manual_seed(0))


@cache
def model_of(kind, dtype):
    return load_model(tiny(kind, dtype))


@st.composite
def edits(draw, model):
    """A random edit: any site, layer, positions, head, value shape and mode."""
    site = draw(
        st.sampled_from(
            [
                "resid_pre",
                "resid_post",
                "attn_out",
                "mlp_out",
                "mlp_act",
                "q",
                "k",
                "v",
                "z",
            ]
        )
    )
    layer = draw(st.integers(0, model.n_layers - 1))
    pos = draw(
        st.none()
        | st.integers(-N_POS, N_POS - 1)
        | st.lists(st.integers(0, N_POS - 1), min_size=1, max_size=3, unique=True)
    )
    heads = {
        "q": model.n_heads,
        "z": model.n_heads,
        "k": model.n_kv_heads,
        "v": model.n_kv_heads,
    }.get(site)
    head = draw(st.none() | st.integers(0, heads - 1)) if heads else None
    n = N_POS if pos is None else 1 if isinstance(pos, int) else len(pos)
    width = (
        (32,)
        if not heads and site != "mlp_act"
        else (capture(model, TOKENS, f"{site}.0")[f"{site}.0"].shape[-1],)
    )
    middle = (heads,) if heads and head is None else ()
    shape = draw(
        st.sampled_from([(), width, (n, *middle, *width), (ROWS, n, *middle, *width)])
    )
    value = torch.randn(
        shape,
        generator=torch.Generator().manual_seed(draw(st.integers(0, 99))),
        dtype=model.dtype,
    )
    return Edit(
        site,
        layer,
        value,
        pos=pos,
        head=head,
        mode=draw(st.sampled_from(["set", "add"])),
    )


@settings(max_examples=60)
@given(
    st.data(),
    st.sampled_from(
        ["gpt2", "llama", "gemma3_text", "phi", "olmo2", "opt", "gpt_neox"]
    ),
)
def test_any_interventions(data, kind):
    model = model_of(kind, torch.float64)
    interventions = data.draw(
        st.lists(st.lists(edits(model), max_size=4), min_size=1, max_size=6)
    )
    batch_size = data.draw(st.integers(1, 16))
    fast = Replay(model, TOKENS, batch_size=batch_size).run(interventions)[:, :, 0]
    slow = naive_replay(model, TOKENS, interventions)
    # Random edits can push logits to a thousand: relative to that, float64 leaves
    # 1e-12.
    assert (fast - slow).abs().max() <= 1e-12 * max(1.0, float(slow.abs().max()))


@settings(max_examples=20)
@given(st.data())
def test_any_readout_and_noise(data):
    """Several readout positions, and a base run whose embedding is edited."""
    model = model_of("llama", torch.float64)
    readout = sorted(
        data.draw(st.sets(st.integers(0, N_POS - 1), min_size=1, max_size=3))
    )
    noise = Edit(
        "embed",
        None,
        torch.randn(ROWS, 2, 32, generator=torch.Generator().manual_seed(3)),
        pos=[1, 3],
        mode="add",
    )
    interventions = data.draw(
        st.lists(st.lists(edits(model), max_size=3), min_size=1, max_size=4)
    )
    fast = Replay(model, TOKENS, base_edits=[noise], readout=readout).run(interventions)
    for i, intervention in enumerate(interventions):
        with intervene(model, [noise, *intervention]):
            slow = model.logits(TOKENS)[:, readout]
        assert (fast[i] - slow).abs().max() <= 1e-12 * max(1.0, float(slow.abs().max()))


def grid(model, site="mlp_out"):
    return [
        [Edit(site, layer, 0.0, pos=p)]
        for layer in range(model.n_layers)
        for p in range(N_POS)
    ]


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
@pytest.mark.parametrize("enabled", [True, False])
def test_float32_with_and_without_onednn(kind, enabled):
    model = model_of(kind, torch.float32)
    with fast_matmul(model, enabled):
        fast = Replay(model, TOKENS).run(grid(model))[:, :, 0]
    assert (fast - naive_replay(model, TOKENS, grid(model))).abs().max() <= 1e-5


def test_the_model_is_left_as_it_was():
    model = model_of("gpt2", torch.float32)
    before = model.logits(TOKENS)
    attention = model.config._attn_implementation
    Replay(model, TOKENS).run(grid(model))
    assert (
        torch.equal(model.logits(TOKENS), before)
        and model.config._attn_implementation == attention
    )
    assert not any(
        "forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks
        for m in model.hf.modules()
    )


def test_an_error_inside_leaves_the_model_as_it_was():
    model = model_of("gpt2", torch.float32)
    replay, attention = Replay(model, TOKENS), model.config._attn_implementation

    def failing(logits):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay.run(grid(model), failing)
    assert model.config._attn_implementation == attention
    assert not any(
        "forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks
        for m in model.hf.modules()
    )


def test_batch_size_bounds_the_rows_of_a_pass():
    model, rows = model_of("gpt2", torch.float32), []
    hook = model.blocks[1].register_forward_pre_hook(
        lambda _m, args: rows.append(args[0].shape[0])
    )
    try:
        Replay(model, TOKENS, batch_size=6).run(
            [[Edit("resid_post", 0, float(i), pos=2)] for i in range(8)]
        )
    finally:
        hook.remove()
    assert max(rows) == 6


def test_work_is_only_done_in_the_cone():
    """An edit of the last token after layer l runs one token through the layers above
    l, and nothing else.
    """
    model, seen = model_of("gpt2", torch.float32), []
    replay = Replay(model, TOKENS)
    hooks = [
        b.register_forward_pre_hook(
            lambda _m, args, i=i: seen.append((i, args[0].shape[1]))
        )
        for i, b in enumerate(model.blocks)
    ]
    try:
        replay.run([[Edit("resid_post", 0, 0.0, pos=-1)]])
        assert seen == [(1, 1), (2, 1)]
        seen.clear()
        replay.run(
            [[Edit("resid_post", 0, 0.0, pos=3)]]
        )  # the last block: keys and values of 3..5, then token 6
        assert seen == [(1, 4), (2, 3), (2, 1)]
        seen.clear()
        replay.run(
            [[Edit("resid_post", 2, 0.0, pos=3)], [Edit("mlp_out", 2, 0.0, pos=0)]]
        )  # nobody sees these
        assert seen == []
    finally:
        for hook in hooks:
            hook.remove()


def test_shared_beginnings_run_once():
    model, rows = model_of("gpt2", torch.float32), []
    same = Edit("resid_post", 0, torch.ones(32), pos=2)
    last = [Edit("mlp_out", 2, float(i), pos=-1) for i in range(5)]
    replay = Replay(model, TOKENS)
    hook = model.blocks[1].register_forward_pre_hook(
        lambda _m, args: rows.append(args[0].shape[0])
    )
    try:
        replay.run([[same, e] for e in last])
    finally:
        hook.remove()
    assert rows == [ROWS]


def test_interrupted_sweep_goes_on(tmp_path, monkeypatch):
    model, calls, sweep = model_of("gpt2", torch.float32), [], replay_module._sweep

    def metric(logits):
        return logits[..., 0, 0]

    def count(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return sweep(*arguments)

    monkeypatch.setattr(replay_module, "_sweep", count)
    replay = Replay(model, TOKENS)
    with pytest.raises(KeyboardInterrupt):
        replay.run(grid(model), metric, folder=tmp_path)
    done = len(list(tmp_path.glob("group-*.safetensors")))
    assert 0 < done < N_POS
    result = replay.run(grid(model), metric, folder=tmp_path)
    n_calls = len(calls)
    assert torch.equal(result, Replay(model, TOKENS).run(grid(model), metric))
    calls.clear()
    assert torch.equal(replay.run(grid(model), metric, folder=tmp_path), result)
    assert not calls and n_calls == N_POS + 1
    assert not list(tmp_path.glob(".*.part"))


def test_a_folder_belongs_to_one_sweep(tmp_path):
    model = model_of("gpt2", torch.float32)
    Replay(model, TOKENS).run(grid(model)[:2], folder=tmp_path)
    with pytest.raises(ValueError, match="another sweep"):
        Replay(model, TOKENS + 1).run(grid(model)[:2], folder=tmp_path)
    other = load_model(tiny("gpt2"))
    with torch.no_grad():
        other.blocks[0].mlp.c_proj.weight[0] += 1
    with pytest.raises(ValueError, match="another sweep"):
        Replay(other, TOKENS).run(grid(model)[:2], folder=tmp_path)


@pytest.mark.parametrize(
    "edit, error, words",
    [
        (Edit("resid_post", 3, 0.0, pos=0), IndexError, "layers 0..2"),
        (Edit("resid_post", 0, 0.0, pos=7), IndexError, "7 tokens"),
        (Edit("z", 0, 0.0, pos=0, head=4), IndexError, "heads 0..3"),
        (Edit("mlp_out", 0, 0.0, pos=0, head=1), ValueError, "no heads"),
        (Edit("pattern", 0, 0.0, pos=0), ValueError, "cannot edit 'pattern'"),
        (Edit("nonsense", 0, 0.0, pos=0), ValueError, "unknown site 'nonsense'"),
        (Edit("resid_post", None, 0.0, pos=0), ValueError, "needs a layer"),
    ],
)
def test_hostile_edits(edit, error, words):
    with pytest.raises(error, match=words):
        Replay(model_of("gpt2", torch.float32), TOKENS).run([[edit]])


def test_an_edit_is_finite():
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="value must be a finite number"):
            Edit("mlp_out", 0, value, pos=6)
        with pytest.raises(ValueError, match="value must be finite, but 1 of its 4"):
            Edit("mlp_out", 0, torch.tensor([0.0, 1.0, value, 2.0]), pos=6)
    with pytest.raises(TypeError, match="complex"):
        Edit("mlp_out", 0, torch.zeros(4, dtype=torch.complex64))


def test_hostile_arguments():
    model = model_of("gpt2", torch.float32)
    for arguments, words in [
        ({"tokens": TOKENS[None]}, r"\[batch, pos\]"),
        ({"tokens": TOKENS[:, :0]}, r"\[batch, pos\]"),
        ({"tokens": TOKENS, "batch_size": 0}, "batch_size"),
        (
            {"tokens": TOKENS, "base_edits": [Edit("mlp_out", 0, 0.0)]},
            "only edit 'embed'",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            Replay(model, **arguments)
    with pytest.raises(IndexError, match="7 tokens"):
        Replay(model, TOKENS, readout=[9])
    assert Replay(model, TOKENS).run([]).shape[0] == 0
    assert torch.equal(Replay(model, TOKENS[0]).tokens, TOKENS[:1])
