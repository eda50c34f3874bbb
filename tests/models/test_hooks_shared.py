"""What several contexts, threads and generation do to one model: all edits apply, each
where it belongs, and everything is given back. Right values come from plain hooks.
"""

import threading
from contextlib import ExitStack

import pytest
import torch
from families import tiny
from torch import nn

from mechtut.circuits.runs import Contrast
from mechtut.models.hooks import Edit, Where, capture, intervene
from mechtut.models.loading import load_model
from mechtut.papers.causal_tracing import trace
from mechtut.patching.last_token import Change, run_changes
from mechtut.patching.matmul import fast_matmul
from mechtut.patching.partial import record_blocks, resume, resume_at
from mechtut.patching.replay import Replay

TOKENS = torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(0))
KINDS = ["gpt2", "llama", "gemma2", "olmo2", "phi"]


def inside(model, *edits):
    """Several nested blocks, one edit each."""
    stack = ExitStack()
    for edit in edits:
        stack.enter_context(intervene(model, [edit]))
    return stack


# --- several taps


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_captured_under_an_edit_of_its_inputs(kind):
    model = load_model(tiny(kind))
    one = Edit("k", 1, 0.3, pos=2)
    both = capture(model, TOKENS, ["pattern.1", "z.1"], edits=[one])
    with intervene(model, [one]):
        nested = capture(model, TOKENS, ["pattern.1", "z.1"])
    plain = capture(model, TOKENS, "pattern.1")
    keys = capture(model, TOKENS, ["q.1", "k.1"], edits=[one])
    assert (keys["k.1"][:, 2] == 0.3).all()
    for site in both:
        assert torch.equal(both[site], nested[site])
    assert (both["pattern.1"] - plain["pattern.1"]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_nested_edits_all_apply(kind):
    model = load_model(tiny(kind))
    edits = [
        Edit("q", 0, 0.2, pos=3),
        Edit("v", 1, 0.1, pos=1),
        Edit("k", 1, 0.4, pos=4),
    ]
    with intervene(model, edits):
        together = model.logits(TOKENS)
    with inside(model, *edits):
        nested = model.logits(TOKENS)
    assert torch.equal(together, nested)
    for left_out in edits:
        with intervene(model, [e for e in edits if e is not left_out]):
            assert not torch.equal(model.logits(TOKENS), together)


@pytest.mark.parametrize("shared", [False, True])
def test_two_models_at_once(shared):
    """Also two whose configuration is one object."""
    first = load_model(tiny("llama"))
    hf = type(first.hf)(first.config) if shared else tiny("llama", num_hidden_layers=2)
    second = load_model(hf)
    alone = [
        capture(m, TOKENS, "z.1", edits=[Edit("v", 1, x)])["z.1"]
        for m, x in ((first, 0.5), (second, -0.5))
    ]
    plain = second.logits(TOKENS)
    with intervene(first, [Edit("v", 1, 0.5)]):
        assert torch.equal(second.logits(TOKENS), plain)
        with intervene(second, [Edit("v", 1, -0.5)]):
            found = [capture(m, TOKENS, "z.1")["z.1"] for m in (first, second)]
    assert all(map(torch.equal, alone, found))
    assert {m.config._attn_implementation for m in (first, second)} == {"sdpa"}


def test_two_patterns_written_in_turn():
    model = load_model(tiny("gpt2"))
    look = torch.zeros(6)
    look[0] = 1
    with inside(
        model, Edit("pattern", 1, look, head=0), Edit("pattern", 1, look, head=2)
    ):
        p = capture(model, TOKENS, "pattern.1")["pattern.1"]
    assert (p[:, [0, 2], :, 0] == 1).all()
    assert (p[:, [1, 3], 3, 0] < 1).all()


# --- engines inside an open block


def _trace(model):
    trace(model, TOKENS[0], (1, 3), n_samples=2)


def _contrast(model):
    Contrast(model, TOKENS, TOKENS.flip(1), "kl")


def _changes(model):
    run_changes(model, TOKENS, torch.tensor([5, 5]), [Change(1, torch.zeros(32))])


@pytest.mark.parametrize("engine", [_trace, _contrast, _changes])
@pytest.mark.parametrize("root", ["model", "module"])
def test_engines_refuse_an_open_intervention(engine, root):
    model = load_model(tiny("gpt2"))
    replay, kept = Replay(model, TOKENS), record_blocks(model, TOKENS, keys=True)
    edit, opened = Edit("mlp_out", 1, 0.0), model
    if root == "module":
        opened, edit = model.hf, Edit("transformer.h.1.mlp", None, 0.0)
    positions = torch.arange(6).expand(2, -1)
    with intervene(opened, [edit], must_fire=False):
        for run in (
            lambda: engine(model),
            lambda: replay.run([[Edit("z", 0, 0.0)]]),
            lambda: resume(model, kept, 1, kept.resid[1]),
            lambda: resume_at(model, kept, 1, kept.resid[1], positions),
        ):
            with pytest.raises(RuntimeError, match="open `intervene` block"):
                run()
        engine(load_model(tiny("gpt2")))  # another model is none of its business
    engine(model)


# --- generation


def plain_generation(model, tokens, n, change):
    """Greedy decoding by whole passes without a cache; `change(x)` edits the output of
    block 1 in place.
    """

    def hook(_module, _args, out):
        x = (out[0] if isinstance(out, tuple) else out).clone()
        change(x)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    handle = model.blocks[1].register_forward_hook(hook)
    try:
        for _ in range(n):
            ones = torch.ones_like(tokens)
            out = model.hf(tokens, attention_mask=ones, use_cache=False).logits
            tokens = torch.cat([tokens, out[:, -1:].argmax(-1)], 1)
    finally:
        handle.remove()
    return tokens, out[:, -1]


PUSH = 3 * torch.randn(32, generator=torch.Generator().manual_seed(5))
WHERE = {
    "first": (0, slice(0, 1)),
    "inside": (3, slice(3, 4)),
    "two": ([1, 7], [1, 7]),
    "prompt": ("prompt", slice(0, 6)),
    "new": ("new", slice(6, None)),
    "last": ("last", slice(5, None)),
    "from": (slice(4, None), slice(4, None)),
    "from new": (Where("from", 8), slice(8, None)),
    "all": (None, slice(None)),
    "text": ("text", slice(None)),
}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", WHERE)
def test_positions_count_in_the_sequence(kind, name):
    model = load_model(tiny(kind))
    pos, index = WHERE[name]

    def change(x):
        if isinstance(index, list):
            for i in index:
                x[:, i : i + 1] += PUSH
        else:
            x[:, index] += PUSH

    wanted, last = plain_generation(model, TOKENS, 5, change)
    edit = Edit("resid_post", 1, PUSH, pos=pos, mode="add")
    given = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    given |= {"min_new_tokens": 5, "eos_token_id": None}
    with intervene(model, [edit]):
        ones = torch.ones_like(TOKENS)
        found = model.hf.generate(TOKENS, attention_mask=ones, **given)
    assert torch.equal(found, wanted)
    with intervene(model, [edit], prompt_length=6):  # without a cache
        given["use_cache"] = False
        slow = model.hf.generate(TOKENS, attention_mask=ones, **given)
    assert torch.equal(slow, wanted)
    if name not in ("all", "text", "prompt", "first", "from"):
        assert not torch.equal(
            plain_generation(model, TOKENS, 5, lambda x: None)[1], last
        )


@pytest.mark.parametrize("site", ["k", "v"])
def test_cached_keys_and_values_are_edited_too(site):
    model = load_model(tiny("llama"))
    edit = Edit(site, 1, 1.0, pos=2)
    with intervene(model, [edit]):
        whole = model.logits(TOKENS)[:, -1]
        first = model.hf(TOKENS[:, :4], use_cache=True)
        cache = first.past_key_values
        step = model.hf(TOKENS[:, 4:], past_key_values=cache, use_cache=True)
    assert torch.allclose(step.logits[:, -1], whole, atol=1e-5)
    assert not torch.allclose(whole, model.logits(TOKENS)[:, -1], atol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rules_leave_padding_alone(side):
    model = load_model(tiny("llama"))
    short = TOKENS[:1, :4]
    pad = torch.zeros(1, 2, dtype=torch.long)
    real = torch.ones_like(short)
    parts = (pad, short) if side == "left" else (short, pad)
    tokens = torch.cat([torch.cat(parts, 1), TOKENS[1:]])
    mask = torch.cat(parts := (pad, real) if side == "left" else (real, pad), 1)
    mask = torch.cat([mask, torch.ones(1, 6, dtype=torch.long)])
    columns = slice(2, 6) if side == "left" else slice(0, 4)
    for rule in ("text", "last", "prompt"):
        edit = Edit("resid_post", 1, PUSH, pos=rule, mode="add")
        alone = capture(model, short, "resid_post.1", edits=[edit])["resid_post.1"]
        both = capture(
            model, tokens, "resid_post.1", edits=[edit], attention_mask=mask
        )["resid_post.1"]
        assert torch.allclose(both[0, columns], alone[0], atol=1e-5), rule
        unpadded = capture(model, TOKENS[1:], "resid_post.1", edits=[edit])
        assert torch.allclose(both[1], unpadded["resid_post.1"][0], atol=1e-5)


def test_an_edit_that_the_sequence_never_reaches_is_an_error():
    model = load_model(tiny("gpt2"))
    with (
        pytest.raises(RuntimeError, match="never reached"),
        intervene(model, [Edit("mlp_out", 1, 0.0, pos="new")]),
    ):
        model.logits(TOKENS)
    with (
        pytest.raises(RuntimeError, match=r"never reached \(30,\) of mlp_out.1"),
        intervene(model, [Edit("mlp_out", 1, 0.0, pos=30)]),
    ):
        model.hf.generate(TOKENS, max_new_tokens=2, do_sample=False)
    with (
        pytest.raises(IndexError, match="position 30"),
        intervene(model, [Edit("mlp_out", 1, 0.0, pos=30)]),
    ):
        model.logits(TOKENS)


@pytest.mark.parametrize(
    "pos, words",
    [("newest", "unknown rule 'newest'"), (slice(0, 4, 2), "step 1"), ([], "no pos")],
)
def test_rules_that_there_are_not(pos, words):
    with pytest.raises(ValueError, match=words):
        Edit("mlp_out", 1, 0.0, pos=pos)


def test_the_engine_knows_the_rules():
    model = load_model(tiny("gpt2"))
    for pos in ("prompt", "last", slice(2, None), slice(1, 3)):
        edit = Edit("resid_post", 1, PUSH, pos=pos, mode="add")
        with intervene(model, [edit]):
            wanted = model.logits(TOKENS)[:, -1]
        found = Replay(model, TOKENS).run([[edit]])[0, :, 0]
        assert torch.allclose(found, wanted, atol=1e-4), pos


# --- threads


def in_threads(*jobs):
    """Run jobs at the same time; their results, or the first error."""
    found, errors = [None] * len(jobs), []

    def run(i, job):
        try:
            found[i] = job()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i, j)) for i, j in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def test_threads_do_not_see_each_others_edits():
    """Ten rounds: each thread edits and captures another head of the same model."""
    model = load_model(tiny("llama"))

    def job(head):
        def run():
            out = []
            for site in ("q", "z", "pattern"):
                edits = [Edit(site, 1, 0.25, head=head), Edit("v", 0, 0.1 * head)]
                with fast_matmul(model):
                    acts = capture(model, TOKENS, ["z.1", "pattern.1"], edits=edits)
                out += [acts["z.1"], acts.logits, acts["pattern.1"]]
            return out

        return run

    alone = [job(h)() for h in range(4)]
    for _ in range(10):
        for one, other in zip(alone, in_threads(*map(job, range(4))), strict=True):
            for a, b in zip(one, other, strict=True):
                assert torch.allclose(a, b, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"
    for module in model.hf.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_traces_in_threads():
    model = load_model(tiny("gpt2"))

    def job(i):
        return lambda: trace(model, TOKENS[i], (1, 3), n_samples=3, seed=i).scores

    alone = [job(i % 2)() for i in range(4)]
    found = in_threads(*(job(i % 2) for i in range(4)))
    assert all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(alone, found, strict=True)
    )


# --- the user's model stays as it was


class Recorder(nn.Dropout):
    """Dropout that would be noticed."""


@pytest.mark.parametrize("kind", ["gpt2", "phi"])
def test_a_model_in_training_mode_is_evaluated_and_left_in_it(kind):
    changes = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    hf = tiny(kind, **changes).train()
    plain = hf.eval()(TOKENS).logits.detach()
    hf.train()
    model = load_model(hf)
    assert hf.training and all(p.requires_grad for p in hf.parameters())
    edits = [[Edit("mlp_out", 1, 0.0, pos=2)]]
    contrast = Contrast(model, TOKENS, TOKENS.flip(1), "kl")
    found = Replay(model, TOKENS).run(edits)
    assert torch.equal(model.logits(TOKENS), plain)
    assert all(m.training for m in hf.modules())
    hf.eval()
    with intervene(model, edits[0]):
        assert torch.allclose(found[0, :, 0], model.logits(TOKENS)[:, -1], atol=1e-4)
    again = Contrast(model, TOKENS, TOKENS.flip(1), "kl")
    assert again.metric_full == contrast.metric_full
    assert all(p.grad is None and p.requires_grad for p in hf.parameters())


def test_compiled_and_offloaded_models_are_refused():
    hf = tiny("gpt2")
    with pytest.raises(TypeError, match="compiled._orig_mod"):
        load_model(torch.compile(hf))
    with pytest.raises(ValueError, match="offloaded, or on the meta device"):
        load_model(hf.to("meta"))
