"""Patchscopes against torch's own hooks and whole passes, in float64, tiny models."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from families import CONFIGS, NO_REGISTRY, different, gap, model_of, stream_of, tiny
from golden_models import rome_model
from torch.nn.functional import pad

from mechtut.models.hooks import Edit, intervene
from mechtut.models.loading import load_model
from mechtut.patching import layer_maps, patchscopes
from mechtut.patching.layer_maps import AffineMap, aligned_positions, fit_affine
from mechtut.patching.patchscopes import (
    Patchscope,
    PatchscopeGrid,
    generate,
    patchscope,
    patchscope_grid,
    patchscope_texts,
    precision_at_1,
    surprisal_of_readout_under_source,
    surprisal_of_source_under_readout,
)
from mechtut.patching.places import SoftPrompt, Source, Target, source_tokens

QUIET = {"progress": False}
FEW = ["gpt2", "llama", "gpt_neox", "gemma2"]
DRAW = torch.Generator().manual_seed(0)
S, T, OTHER = (torch.randint(5, 90, (n,), generator=DRAW).tolist() for n in (5, 7, 3))
METRICS = [
    "precision_at_1",
    "surprisal_of_readout_under_source",
    "surprisal_of_source_under_readout",
]


@torch.no_grad()
def run(model, ids, layer=None, pos=None, value=None):
    """Logits of a whole pass by torch's own hooks, with a state overwritten at `pos`;
    without a value, the state at `layer` instead.
    """
    seen = {}

    def before(_block, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        seen["x"] = x = x.clone()
        if value is not None:
            x[:, pos] = value
        if args:
            return (x, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": x}

    def after(_block, _args, output):
        x = stream_of(output).clone()
        seen["x"] = x
        if value is not None:
            x[:, pos] = value
        return (x, *output[1:]) if isinstance(output, tuple) else x

    hook = None
    if layer == -1:
        hook = model.blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    elif layer is not None:
        hook = model.blocks[layer].register_forward_hook(after)
    tokens = torch.tensor([ids])
    logits = model.hf(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False
    ).logits[0]
    if hook is not None:
        hook.remove()
    return logits if layer is None or value is not None else seen["x"][0]


def by_hand(model, s, layer, i, t, end, j, change=lambda h: h):
    """All logits of the target, by torch's own hooks."""
    return run(model, t, end, j, change(run(model, s, layer)[i]))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_pair_of_layers_equals_torch_hooks(kind):
    model = model_of(kind)
    layers = range(-1, model.n_layers)
    grid = patchscope_grid(
        model,
        Source(S, pos=2),
        Target(T, pos=4),
        source_layers=layers,
        target_layers=layers,
        **QUIET,
    )
    own = run(model, S)[2]
    assert grid.source_top.tolist() == [int(own.argmax())]
    for a in layers:
        for b in layers:
            wanted = by_hand(model, S, a, 2, T, b, 4)
            seen = patchscope(model, Source(S, a, 2), Target(T, b, -3), read_at=5)
            assert gap(seen.logits[0], wanted[5]) < 1e-10
            assert gap(seen.source_logits[0], own) < 1e-10
            last, cell = wanted[-1], (0, a + 1, b + 1)
            assert int(grid.top[cell]) == int(last.argmax())
            found = float(grid.surprisal_of_readout_under_source[cell])
            wanted_1 = -float(own.log_softmax(-1)[last.argmax()])
            assert found == pytest.approx(wanted_1, abs=1e-10)
            found = float(grid.surprisal_of_source_under_readout[cell])
            wanted_2 = -float(last.log_softmax(-1)[own.argmax()])
            assert found == pytest.approx(wanted_2, abs=1e-10)


@pytest.mark.parametrize("kind", FEW)
def test_equivalences(kind):
    model = model_of(kind)
    plain, last = model.logits(T)[0], model.n_layers - 1
    for layer in range(-1, model.n_layers):
        for i in (0, 3, 6):
            same = patchscope(model, Source(T, layer, i), Target(T, layer, i))
            assert gap(same.logits[0], plain[-1]) == 0
        # the last layer, read where it is written, is the logit lens
        lens = patchscope(model, Source(S, layer, 1), Target(T, last, 2), read_at=2)
        assert gap(lens.logits[0], model.unembed(run(model, S, layer)[1])) < 1e-12
        # all positions of another prompt: that prompt, from there on
        moved = patchscope(model, Source(T[::-1], layer, None), Target(T, layer, None))
        assert gap(moved.logits[0], model.logits(T[::-1])[0, -1]) == 0
        for read_at in range(4):  # nothing before the patched position changes
            early = patchscope(
                model, Source(S, layer, 1), Target(T, 1, 4), read_at=read_at
            )
            assert gap(early.logits[0], plain[read_at]) == 0
    for read_at in (0, 3, 5, 6):  # the last block's output is nobody else's input
        seen = patchscope(model, Source(S, 0), Target(T, last, 4), read_at=read_at)
        assert gap(seen.logits[0], plain[read_at]) == 0


@pytest.mark.parametrize("kind", FEW)
def test_several_positions_at_once(kind):
    model = model_of(kind)
    states = run(model, S, 1)[[0, 3, 4]]
    wanted = run(model, T, 0, [2, 6, 1], states)
    seen = patchscope(model, Source(S, 1, [0, 3, -1]), Target(T, 0, [2, -1, 1]))
    assert gap(seen.logits[0], wanted[-1]) < 1e-10
    assert gap(seen.source_logits[0], run(model, S)[4]) < 1e-10  # of the last one
    grid = patchscope_grid(
        model,
        Source(S, pos=[0, 3, -1]),
        Target(T, pos=[2, -1, 1]),
        metric=METRICS[2],
        **QUIET,
    )
    own = run(model, S)[4].argmax()
    assert float(grid.mean[1, 0]) == pytest.approx(
        -float(wanted[-1].log_softmax(-1)[own]), abs=1e-10
    )


@pytest.mark.parametrize("kind", FEW)
def test_unequal_lengths_and_padding_change_nothing(kind):
    """The authors' batches read the wrong token of a padded row."""
    model = model_of(kind)
    rows = [S, OTHER, T, S[::-1]]
    alone = [patchscope(model, Source(r, 1, -2), Target(T, 0)).logits[0] for r in rows]
    together = patchscope(model, Source(rows, 1, -2), Target(T, 0)).logits
    grid = patchscope_grid(model, Source(rows, pos=-2), T, **QUIET)
    for i, ids in enumerate(rows):
        wanted = by_hand(model, ids, 1, -2, T, 0, -1)[-1]
        assert gap(alone[i], wanted) < 1e-10 and gap(together[i], wanted) < 1e-10
        assert int(grid.top[i, 1, 0]) == int(wanted.argmax())
    for left in (True, False):
        room = [7 - len(r) for r in rows]
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
        padded = patchscope(model, Source(ids, 1, -2, mask), Target(T, 0)).logits
        assert gap(padded, together) < 1e-12
        targets = patchscope(model, Source(S, 1), Target(ids, 0, -2, mask))
        for i, row in enumerate(rows):
            assert gap(targets.logits[i], by_hand(model, S, 1, -1, row, 0, -2)[-1]) < (
                1e-10
            )


@pytest.mark.parametrize("kind", FEW)
def test_a_target_for_each_source(kind):
    model = model_of(kind)
    sources, targets = [S, OTHER, T], [T, S, T]
    places = [Target(t, pos=j) for t, j in zip(targets, (-1, 2, -1), strict=True)]
    grid = patchscope_grid(model, sources, places, metric=METRICS[2], **QUIET)
    for i, (s, t, j) in enumerate(zip(sources, targets, (-1, 2, -1), strict=True)):
        own = run(model, s)[-1].argmax()
        for a in range(model.n_layers):
            for b in range(model.n_layers):
                q = by_hand(model, s, a, -1, t, b, j)[-1].log_softmax(-1)
                assert float(grid.values[i, a, b]) == pytest.approx(
                    -float(q[own]), abs=1e-10
                )


def test_more_sources_than_go_together(monkeypatch):
    """Authors' batches drop the last part, or fail where the number divides."""
    model = model_of("gpt2")
    sources = torch.randint(5, 90, (6, 4), generator=DRAW)
    whole = patchscope_grid(model, sources, T, **QUIET)
    for size in (1, 3, 4):
        monkeypatch.setattr(patchscopes, "_TOGETHER", size)
        parts = patchscope_grid(model, sources, T, batch_size=2, **QUIET)
        assert torch.equal(parts.top, whole.top)
        for metric in METRICS:
            assert gap(parts.by(metric).values, whole.by(metric).values) < 1e-12


@pytest.mark.parametrize("kind", different(CONFIGS))
@pytest.mark.parametrize("position", [0, 3, -1])
def test_generation_with_cache_equals_the_slow_form(kind, position):
    model = model_of(kind)
    source, target = Source(S, 1, 2), Target(T, 0, position)
    how = {"new_tokens": 6, "stop": False}
    fast = patchscope(model, source, target, **how)
    slow = patchscope(model, source, target, cache=False, **how)
    ids, value = list(T), run(model, S, 1)[2]
    for _ in range(6):  # and by torch's hooks: the same absolute position, each time
        logits = run(model, ids, 0, position % len(T), value)
        ids.append(int(logits[-1].argmax()))
    assert fast.tokens == slow.tokens == (tuple(ids[len(T) :]),)
    assert gap(fast.logits, slow.logits) < 1e-10


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("cache", [True, False])
def test_a_target_of_one_token_is_patched(kind, cache):
    """The authors' code leaves every pass of one token alone."""
    model = model_of(kind)
    how = {"new_tokens": 5, "stop": False, "cache": cache}
    seen = patchscope(model, Source(S, 1), Target([T[0]], 0), **how)
    ids, value = [T[0]], run(model, S, 1)[-1]
    for _ in range(5):
        ids.append(int(run(model, ids, 0, 0, value)[-1].argmax()))
    assert seen.tokens == (tuple(ids[1:]),)
    assert gap(seen.logits[0], model.logits([T[0]])[0, -1]) > 0.1
    grid = patchscope_grid(model, [S, OTHER], [[T[0]], [T[0]]], **QUIET)
    wanted = by_hand(model, OTHER, 1, -1, [T[0]], 0, 0)[-1]
    assert int(grid.top[1, 1, 0]) == int(wanted.argmax())


def test_generation_for_several_prompts_of_several_lengths():
    model = model_of("llama")
    rows = [S, T, OTHER, S[::-1]]
    how = {"new_tokens": 4, "stop": False}
    together = patchscope(model, Source(rows, 2, 0), Target(rows[::-1], 0), **how)
    for i, (s, t) in enumerate(zip(rows, rows[::-1], strict=True)):
        alone = patchscope(model, Source(s, 2, 0), Target(t, 0), **how)
        assert together.tokens[i] == alone.tokens[0]


def test_generation_ends_after_an_end_token():
    model = model_of("gpt2")
    batch = torch.tensor([T, T[::-1]])
    whole = generate(model, batch, 8, stop=False)
    model.config.eos_token_id = whole[0][2]
    first = whole[0].index(whole[0][2])
    found = generate(model, batch, 8)
    assert found[0] == whole[0][: first + 1]
    assert whole[1][: len(found[1])] == found[1]
    model.config.eos_token_id = [whole[0][0], whole[1][0]]
    assert generate(model, batch, 8) == [whole[0][:1], whole[1][:1]]
    seen = patchscope(load_model("mini", device="cpu"), *EMPTY)
    assert seen.tokens == () and seen.text == ()


EMPTY = Source("Riley Martin works as a", 4), Target("Riley Martin works as a", 4)


def test_text_leaves_the_end_token_out():
    model = load_model("mini", device="cpu")
    end = model.config.eos_token_id
    ids = model.to_tokens("Riley Martin works as a").tolist()
    (singer,) = generate(model, torch.tensor([ids]), 1)[0]
    texts = patchscopes._texts(model, [[singer, end], [end], []])
    assert texts == (" singer", "", "")


def test_generation_keeps_to_the_context():
    model = model_of("gpt2")
    with pytest.raises(ValueError, match="do not fit"):
        generate(model, torch.tensor([T]), 58)
    with pytest.raises(IndexError, match="outside the prompt"):
        generate(model, torch.tensor([T]), 2, [Edit("resid_post", 0, 0.0, pos=7)])


def test_same_layers_only_leaves_the_rest_empty():
    model = model_of("gpt2")
    whole = patchscope_grid(model, [S, OTHER], T, **QUIET)
    same = patchscope_grid(model, [S, OTHER], T, target_layers="same", **QUIET)
    eye = torch.eye(3, dtype=torch.bool)
    assert (same.top[:, ~eye] == -1).all() and torch.equal(
        same.top[:, eye], whole.top[:, eye]
    )
    for metric in METRICS:
        a, b = same.by(metric).values, whole.by(metric).values
        assert a[:, ~eye].isnan().all() and gap(a[:, eye], b[:, eye]) < 1e-12
    table = same.to_pandas()
    assert table.source_layer.tolist() == table.target_layer.tolist() == [0, 1, 2]
    assert same.diagonal().equals(whole.diagonal())


def test_layers_named_by_the_places():
    model = model_of("gpt2")
    whole = patchscope_grid(model, S, T, metric=METRICS[1], **QUIET)
    grid = patchscope_grid(
        model, Source(S, 2), Target(T, 0), metric=METRICS[1], **QUIET
    )
    assert grid.source_layers == (2,) and grid.target_layers == (0,)
    assert gap(grid.values[0, 0, 0], whole.values[0, 2, 0]) < 1e-12
    with pytest.raises(ValueError, match="different layers"):
        patchscope_grid(model, [Source(S, 1), Source(S, 2)], T, **QUIET)
    chosen = patchscope_grid(
        model, [Source(S, 1), Source(S, 2)], T, source_layers=[0], **QUIET
    )
    assert chosen.source_layers == (0,)


def test_mean_and_interval():
    values = torch.tensor([[[1.0]], [[0.0]], [[1.0]], [[1.0]]])
    grid = PatchscopeGrid(
        top=torch.ones(4, 1, 1, dtype=torch.long),
        source_top=torch.tensor([1, 0, 1, 1]),
        floor=torch.zeros(4),
        precision_at_1=values,
        surprisal_of_readout_under_source=2 * values,
        surprisal_of_source_under_readout=3 * values,
        source_layers=(5,),
        target_layers=(5,),
    )
    assert float(grid.mean) == 0.75
    # Student's quantile for three degrees; the spread of 1, 0, 1, 1 is 0.5
    assert float(grid.half_width) == pytest.approx(3.182 * 0.5 / 2, rel=3e-3)
    assert float(grid.by(METRICS[2]).mean) == pytest.approx(2.25)
    one = replace(grid, precision_at_1=values[:1], top=grid.top[:1])
    assert one.half_width.isnan().all()


def test_the_floor_is_what_agreement_costs():
    model = model_of("gpt2")
    last = model.n_layers - 1
    grid = patchscope_grid(model, [S, T], T, target_layers=[last], **QUIET)
    for i, ids in enumerate((S, T)):
        floor = -float(run(model, ids)[-1].log_softmax(-1).max())
        assert float(grid.floor[i]) == pytest.approx(floor, abs=1e-10)
        # the last layer's state, written there, is the source's own prediction
        for metric in METRICS[1:]:
            found = float(grid.by(metric).values[i, last, 0])
            assert found == pytest.approx(floor, abs=1e-10)
    assert (grid.precision_at_1[:, last] == 1).all()


def test_metrics_by_hand():
    p = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]]).double()
    q = torch.tensor([[0.0, 4.0, 1.0], [0.0, 1.0, 0.5]]).double()
    assert precision_at_1(p, q).tolist() == [0, 1]
    a, b = p.softmax(-1).log(), q.softmax(-1).log()
    found = surprisal_of_readout_under_source(p, q)
    assert gap(found, torch.stack([-a[0, 1], -a[1, 1]])) < 1e-12
    found = surprisal_of_source_under_readout(p, q)
    assert gap(found, torch.stack([-b[0, 0], -b[1, 1]])) < 1e-12


# maps


def states_of(model, rows, layer):
    return torch.cat([run(model, r, layer) for r in rows])


def test_affine_maps_are_least_squares():
    model = model_of("gpt2")
    rows = torch.randint(5, 90, (12, 6), generator=DRAW).tolist()
    maps = fit_affine(model, Source(rows, pos=None), [(0, 2), (1, 0), (0, 1)])
    assert maps.n == 72 and maps.pairs == ((0, 2), (1, 0), (0, 1))
    for n, (a, b) in enumerate(maps.pairs):
        x, y = states_of(model, rows, a), states_of(model, rows, b)
        x1 = torch.cat([x, torch.ones(72, 1).double()], 1)
        solved = torch.linalg.solve(x1.T @ x1, x1.T @ y)  # the normal equations
        assert gap(maps.weight[n], solved[:-1]) < 1e-8
        assert gap(maps.bias[n], solved[-1]) < 1e-8
        assert gap(maps(x, a, b), x1 @ solved) < 1e-8
        left = ((y - x1 @ solved) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
        assert float(maps.r2[n]) == pytest.approx(1 - float(left), abs=1e-9)


def test_a_map_is_used_between_the_two():
    model = model_of("gpt2")
    rows = torch.randint(5, 90, (12, 6), generator=DRAW).tolist()
    maps = fit_affine(model, Source(rows, pos=None), [(0, 2), (1, 0)])
    wanted = by_hand(model, S, 1, -1, T, 0, -1, lambda h: maps(h, 1, 0))[-1]
    seen = patchscope(model, Source(S, 1), Target(T, 0), mapping=maps)
    assert gap(seen.logits[0], wanted) < 1e-10
    twice = patchscope(model, Source(S, 1), Target(T, 0), mapping=lambda h: 2 * h)
    doubled = by_hand(model, S, 1, -1, T, 0, -1, lambda h: 2 * h)[-1]
    assert gap(twice.logits[0], doubled) < 1e-10
    grid = patchscope_grid(model, S, T, mapping=maps, metric=METRICS[2], **QUIET)
    asked = grid.top[0] >= 0
    assert asked.nonzero().tolist() == [[0, 2], [1, 0]]
    own = run(model, S)[-1].argmax()
    assert float(grid.values[0, 1, 0]) == pytest.approx(
        -float(wanted.log_softmax(-1)[own]), abs=1e-10
    )


def test_a_map_into_a_wider_model():
    small, large = model_of("gpt2"), model_of("llama", hidden_size=48)
    rows = torch.randint(5, 90, (12, 6), generator=DRAW).tolist()
    source = Source(rows, pos=None)
    maps = fit_affine(small, source, [(1, 2)], target_model=large)
    assert maps.weight.shape == (1, 32, 48)
    value = maps(run(small, S, 1)[-1], 1, 2)
    wanted = run(large, T, 2, -1, value)[-1]
    given = {"mapping": maps, "target_model": large}
    seen = patchscope(small, Source(S, 1), Target(T, 2), **given)
    assert gap(seen.logits[0], wanted) < 1e-10
    grid = patchscope_grid(small, S, T, **given, **QUIET)
    assert int(grid.top[0, 1, 2]) == int(wanted.argmax())
    narrow = AffineMap.fit(torch.randn(40, 32), torch.randn(40, 32))
    for mapping in (None, lambda h: h, narrow):
        with pytest.raises(ValueError, match="32|48"):
            patchscope(
                small,
                Source(S, 1),
                Target(T, 2),
                mapping=mapping,
                target_model=large,
            )


def test_maps_of_other_layers_and_models_are_refused(tmp_path):
    model = model_of("gpt2")
    rows = torch.randint(5, 90, (12, 6), generator=DRAW).tolist()
    maps = fit_affine(model, Source(rows, pos=None), [(1, 2)])
    maps = AffineMap.load(maps.save(tmp_path))
    assert maps.pairs == ((1, 2),) and maps.weight.dtype == torch.float64
    patchscope(model, Source(S, 1), Target(T, 2), mapping=maps)
    with pytest.raises(ValueError, match="no map from layer 0 to layer 2"):
        patchscope(model, Source(S, 0), Target(T, 2), mapping=maps)
    other = tiny("gpt2").double()
    with torch.no_grad():
        other.transformer.h[0].ln_1.weight += 0.1
    other = load_model(other)
    for one, two in ((other, model), (model, other)):
        with pytest.raises(ValueError, match="other weights"):
            patchscope(one, Source(S, 1), Target(T, 2), mapping=maps, target_model=two)
    with pytest.raises(ValueError, match="none of these"):
        patchscope_grid(model, S, T, source_layers=[0], mapping=maps, **QUIET)


def test_positions_are_aligned_by_characters():
    one, other = (
        load_model("mini", device="cpu"),
        rome_model("tiny_rand", torch.float32),
    )
    text = "Riley Martin works as a singer in Paris, and lives in Rome."
    pairs = aligned_positions(one, other, text)
    a, b = (m.to_str_tokens(text) for m in (one, other))
    # a token of white space only ends where the one before it did
    ends = [
        {len("".join(x[: i + 1]).strip()): i for i in reversed(range(len(x)))}
        for x in (a, b)
    ]
    wanted = [  # the same word ends at the same place, and is the same
        (ends[0][e], ends[1][e])
        for e in sorted(ends[0].keys() & ends[1].keys())
        if a[ends[0][e]].strip() == b[ends[1][e]].strip()
    ]
    assert pairs == wanted and 0 < len(pairs) < len(b)
    # with a BOS in front of one
    with_bos = replace(one, add_bos=True)
    assert aligned_positions(with_bos, other, text) == [(i + 1, j) for i, j in pairs]
    sources = [Source(text, pos=[i for i, _ in pairs])]
    targets = [Target(text, pos=[j for _, j in pairs])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few states
        maps = fit_affine(one, sources, [(3, 2)], targets=targets, target_model=other)
    assert maps.weight.shape == (1, one.d_model, other.d_model) and maps.n == len(pairs)
    with pytest.raises(ValueError, match="aligned_positions"):
        fit_affine(one, sources, [(3, 2)], target_model=other)
    with pytest.raises(ValueError, match="tokenizer"):
        aligned_positions(one, model_of("gpt2"), text)


def test_too_few_states_are_told():
    model = model_of("gpt2")
    with pytest.warns(UserWarning, match="do not determine"):
        maps = fit_affine(model, Source(T, pos=None), [(0, 1)])
    assert maps.r2.tolist() == pytest.approx([1.0])
    with pytest.raises(ValueError, match="finite"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer_maps.least_squares(torch.full((3, 2), torch.nan), [torch.zeros(3, 2)])


# what is kept


@pytest.mark.parametrize("n", [1, 2])
def test_results_come_back_from_a_folder(tmp_path, n):
    model = load_model("mini", device="cpu")
    people = ["Riley Martin works as a", "Jamie Clark lives in"][:n]
    grid = patchscope_grid(model, people, people[0], target_layers="same", **QUIET)
    back = PatchscopeGrid.load(grid.save(tmp_path / "grid"))
    assert torch.equal(back.top, grid.top) and back.to_pandas().equals(grid.to_pandas())
    assert back.source_layers == tuple(range(8))
    seen = patchscope(model, Source(people, 3), Target(people[0], 3), new_tokens=2)
    again = Patchscope.load(seen.save(tmp_path / "one"))
    assert again.tokens == seen.tokens and again.text == seen.text
    assert again.to_pandas().equals(seen.to_pandas())
    for ax in (grid.plot(), grid.plot(diagonal=True)):
        assert ax.get_xlabel()


def test_a_folder_is_resumed_and_others_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(patchscopes, "_TOGETHER", 2)
    model = model_of("gpt2")
    sources = torch.randint(5, 90, (3, 4), generator=DRAW)
    whole = patchscope_grid(model, sources, T, folder=tmp_path, **QUIET)
    calls = []
    metric = patchscopes._TopAndSome.__call__

    def counted(self, logits):
        calls.append(len(logits))
        return metric(self, logits)

    monkeypatch.setattr(patchscopes._TopAndSome, "__call__", counted)
    again = patchscope_grid(model, sources, T, folder=tmp_path, **QUIET)
    assert sum(calls) == 2  # only the unpatched run of each part
    assert torch.equal(again.top, whole.top)
    with pytest.raises(ValueError, match="another sweep"):
        patchscope_grid(model, sources, S, folder=tmp_path, **QUIET)


def test_families_without_the_engine_keep_no_folder(tmp_path):
    model = model_of(NO_REGISTRY[0])
    with pytest.raises(NotImplementedError, match="leave folder away"):
        patchscope_grid(model, S, T, folder=tmp_path, **QUIET)


# hostile input


def refused(*args, error=ValueError, match, **kwargs):
    model = model_of("gpt2")
    for verb in (patchscope, patchscope_grid):
        more = QUIET if verb is patchscope_grid else {}
        with pytest.raises(error, match=match):
            verb(model, *args, **kwargs, **more)


def test_layers_and_positions_outside_are_refused():
    for layer in (3, -2, 99):
        wrong = {"error": IndexError, "match": "does not exist"}
        refused(Source(S, layer), Target(T, 0), **wrong)
        refused(Source(S, 0), Target(T, layer), **wrong)
    for i in (5, -6, 99, [0, 5]):
        wrong = {"error": IndexError, "match": "outside the prompt"}
        refused(Source(S, 0, i), Target(T, 0), **wrong)
        refused(Source([T, S], 0, i), Target(T, 0), **wrong)
    refused(
        Source(S, 0),
        Target(T, 0),
        read_at=7,
        error=IndexError,
        match="outside the prompt",
    )
    model = model_of("gpt2")
    for places in ((Source(S), Target(T, 0)), (Source(S, 0), Target(T))):
        with pytest.raises(ValueError, match="needs a layer"):
            patchscope(model, *places)
    for layers in ([], [0, 0]):
        with pytest.raises(ValueError, match="different layers"):
            patchscope_grid(model, S, T, source_layers=layers, **QUIET)


def test_prompts_that_do_not_fit_are_refused():
    refused(Source([S, S], 0), Target([T, T, T], 0), match="give as many")
    refused(Source(S, 0, [0, 1]), Target(T, 0), match="needs its place")
    refused(Source([S, T], 0, None), Target(T, 0, None), match="5 to 7 positions")
    refused(Source(S, 0, [1, -4]), Target(T, 0, [0, 1]), match="twice")
    refused(Source([], 0), Target(T, 0), match="at least one")
    refused(Source([[]], 0), Target(T, 0), match="no tokens")
    refused(Source("text", 0), Target(T, 0), match="tokenizer")
    refused(Source([97], 0), Target(T, 0), match="outside 0..96")
    ids = torch.tensor([S, S])
    mask = torch.ones_like(ids)
    refused(Source(ids, 0, -1, mask[:, :4]), Target(T, 0), match="mask is")
    refused(Source(ids, 0, -1, 2 * mask), Target(T, 0), match="1 .* and 0")
    refused(Source(ids, 0, -1, 0 * mask), Target(T, 0), match="all padding")
    mask[0, :3] = 0  # a position in the padding is outside what remains
    refused(Source(ids, 0, 2, mask), Target(T, 0), error=IndexError, match="outside")


def test_padding_without_a_mask_is_refused():
    model = load_model("mini", device="cpu")
    end = model.tokenizer.pad_token_id
    ids = model.to_tokens("Riley Martin works").tolist()
    rows = [[end, *ids], [*ids, ids[0]]]
    with pytest.raises(ValueError, match="looks padded"):
        patchscope(model, Source(rows, 0), Target(ids, 0))
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    seen = patchscope(model, Source(torch.tensor(rows), 0, -1, mask), Target(ids, 0))
    alone = patchscope(model, Source(ids, 0), Target(ids, 0))
    assert gap(seen.logits[0], alone.logits[0]) < 1e-4


def test_states_that_are_not_finite_are_refused():
    broken, model = model_of("gpt2"), model_of("gpt2")
    with torch.no_grad():  # after it was loaded, where it would be refused
        broken.hf.transformer.h[1].mlp.c_proj.bias.fill_(torch.nan)
    for verb, more in ((patchscope, {}), (patchscope_grid, QUIET)):
        with pytest.raises(ValueError, match="source prompt 0 at layer 1 is NaN"):
            verb(broken, Source(S, 1), Target(T, 0), target_model=model, **more)
        with pytest.raises(ValueError, match="NaN or infinite"):
            verb(model, Source(S, 1), Target(T, 0), target_model=broken, **more)
        with pytest.raises(ValueError, match="mapped state is NaN"):
            verb(model, Source(S, 1), Target(T, 0), mapping=lambda h: h / 0, **more)
        with pytest.raises(ValueError, match="mapping must turn"):
            verb(model, Source(S, 1), Target(T, 0), mapping=lambda h: h[0], **more)


class Words:
    """As much of a tokenizer as the comparison of two vocabularies asks for."""

    def __init__(self, words):
        self.words = words

    def __len__(self):
        return len(self.words)

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}

    def batch_decode(self, ids):
        return ["".join(self.words[i] for i in row) for row in ids]

    def decode(self, ids, **_how):
        return "".join(self.words[i] for i in ids)


def test_other_vocabularies_are_compared_by_their_texts():
    """Also where a text has two tokens, none in the other vocabulary, or no text."""
    model, other = model_of("gpt2"), model_of("gpt2", vocab_size=90)
    sources = torch.randint(90, (200, 3), generator=torch.Generator().manual_seed(0))
    places = Source(sources, 1), Target(sources.flip(0), 0, 1)
    tops = patchscope(model, *places, target_model=other)
    tops = [x.argmax(-1).mode().values for x in (tops.source_logits, tops.logits)]
    for seed, each in enumerate((model, other)):
        mixed = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        words = [f" w{i}" for i in mixed.tolist()]
        words += [f"w{i}" for i in range(0, 20)]  # the same texts again
        words += ["\ufffd"] * 4 + [f" only{seed}{i}" for i in range(each.d_vocab - 84)]
        at = words.index(" w7")  # a text that both favour somewhere
        words[at], words[tops[seed]] = words[tops[seed]], words[at]
        object.__setattr__(each, "tokenizer", Words(words))
    one, two = model.tokenizer.words, other.tokenizer.words
    seen = patchscope(model, *places, target_model=other)
    grid = patchscope_grid(model, *places, target_model=other, **QUIET)
    found = seen.to_pandas()
    assert {*found[METRICS[0]]} == {0.0, 1.0}
    assert found[METRICS[1]].map(math.isinf).nunique() == 2
    for n, (p, q) in enumerate(zip(seen.source_logits, seen.logits, strict=True)):
        a, b = one[int(p.argmax())].strip(), two[int(q.argmax())].strip()
        p, q = p.softmax(0), q.softmax(0)
        real = "\ufffd" not in (a, b)
        under_p = sum(float(x) for w, x in zip(one, p, strict=True) if w.strip() == b)
        under_q = sum(float(x) for w, x in zip(two, q, strict=True) if w.strip() == a)
        wanted = [
            float(a == b and real),
            -math.log(under_p) if under_p and b != "\ufffd" else math.inf,
            -math.log(under_q) if under_q and a != "\ufffd" else math.inf,
        ]
        for metric, x in zip(METRICS, wanted, strict=True):
            assert found[metric][n] == pytest.approx(x, abs=1e-9)
            assert float(grid.by(metric).values[n, 0, 0]) == pytest.approx(x, abs=1e-9)
    with pytest.raises(ValueError, match="aligned_positions"):
        fit_affine(model, S, [(0, 0)], target_model=other)


def test_vocabularies_without_tokenizers_are_not_compared():
    model, other = model_of("gpt2"), model_of("gpt2", vocab_size=90)
    seen = patchscope(model, Source(S, 1), Target(T, 0), target_model=other)
    with pytest.raises(ValueError, match="97 tokens and the target 90"):
        _ = seen.precision_at_1
    with pytest.raises(ValueError, match="97 tokens and the target 90"):
        patchscope_grid(model, S, T, target_model=other, **QUIET)
    with pytest.raises(ValueError, match="different vocabularies"):
        fit_affine(model, S, [(0, 0)], target_model=other)


@pytest.mark.parametrize("kind", [*FEW, *NO_REGISTRY])
def test_a_head_into_a_head(kind):
    """What a head gives before the projection, by torch's own hooks on that."""
    model = model_of(kind)
    d, (i, j), (h, g) = model.d_head, (2, 4), (3, 1)
    kept = {}

    def read(_module, args):
        kept["z"] = args[0][:, i, h * d : (h + 1) * d].clone()

    def put(_module, args):
        x = args[0].clone()
        x[:, j, g * d : (g + 1) * d] = kept["z"]
        return (x, *args[1:])

    def proj(layer):
        return model.part(layer, model.family.attn_proj)

    with proj(1).register_forward_pre_hook(read):
        model.logits(torch.tensor([S]))
    with proj(2).register_forward_pre_hook(put):
        wanted = model.logits(torch.tensor([T]))[0, -1]
    source, target = Source(S, 1, i, head=h), Target(T, 2, j, head=g)
    assert gap(patchscope(model, source, target).logits[0], wanted) < 1e-10
    grid = patchscope_grid(model, source, target, **QUIET)
    assert int(grid.top) == int(wanted.argmax())


@pytest.mark.parametrize("kind", [*FEW, "granite", *NO_REGISTRY])
def test_soft_prompts_on_both_sides(kind):
    """The embeddings of tokens are those tokens, and others are `inputs_embeds`."""
    model = model_of(kind)
    with torch.no_grad():
        s, t = (model.embed(torch.tensor(ids)) for ids in (S, T))
    plain = patchscope(model, Source(S, 1, 2), Target(T, 0, 3), new_tokens=3)
    soft = Source(SoftPrompt(s), 1, 2), Target(SoftPrompt(t), 0, 3)
    seen = patchscope(model, *soft, new_tokens=3)
    assert seen.tokens == plain.tokens and gap(seen.logits, plain.logits) < 1e-9
    noise = torch.randn(4, model.d_model, generator=DRAW).double() / 5
    with torch.no_grad():
        wanted = model.hf(inputs_embeds=noise[None]).logits[0, -1]
    itself = Source(SoftPrompt(noise), 1), Target(SoftPrompt(noise), 1)
    assert gap(patchscope(model, *itself).logits[0], wanted) < 1e-9
    grid = patchscope_grid(model, [soft[0], Source(S, 1, 2)], soft[1], **QUIET)
    assert set(grid.top.flatten().tolist()) == {int(plain.top_ids)}


def test_heads_and_soft_prompts_that_do_not_fit():
    model, narrow = model_of("gpt2"), model_of("gpt2", n_embd=16)
    for verb, more in ((patchscope, {}), (patchscope_grid, QUIET)):
        with pytest.raises(ValueError, match="names head 1 and the target head None"):
            verb(model, Source(S, 1, head=1), Target(T, 1), **more)
        with pytest.raises(IndexError, match="head 4 of the source does not exist"):
            verb(model, Source(S, 1, head=4), Target(T, 1, head=0), **more)
        with pytest.raises(IndexError, match="layer -1, the input of block 0"):
            verb(model, Source(S, -1, head=0), Target(T, 1, head=0), **more)
        with pytest.raises(ValueError, match=r"have 8 numbers and .* takes 4"):
            places = Source(S, 1, head=0), Target(T, 1, head=0)
            verb(model, *places, target_model=narrow, **more)
        with pytest.raises(ValueError, match="vectors of 16 numbers"):
            verb(model, Source(SoftPrompt(torch.ones(2, 16)), 1), Target(T, 1), **more)
        with pytest.raises(ValueError, match="has 65 vectors"):
            verb(model, Source(S, 1), Target(SoftPrompt(torch.ones(65, 32)), 1), **more)
    with pytest.raises(ValueError, match="leave head= away"):
        fit_affine(model, Source(S, head=0), [(0, 0)])
    with pytest.raises(ValueError, match="name different heads"):
        two = [Source(S, 1, head=0), Source(S, 1, head=1)]
        patchscope_grid(model, two, Target(T, 1, head=0), **QUIET)


def test_the_grid_refuses_open_edits():
    model = model_of("gpt2")
    with (
        intervene(model, [Edit("resid_post", 0, 0.0)], must_fire=False),
        pytest.raises(RuntimeError, match="intervene"),
    ):
        patchscope_grid(model, S, T, **QUIET)


def test_a_line_needs_equal_layers():
    model = model_of("gpt2")
    grid = patchscope_grid(model, S, T, source_layers=[0], target_layers=[1], **QUIET)
    with pytest.raises(ValueError, match="no pair of equal layers"):
        grid.plot(diagonal=True)


def test_texts_of_all_pairs_are_those_of_single_patchscopes():
    """Of prompts of two lengths, two targets, also of soft prompts and other widths."""
    model = load_model("mini", device="cpu")
    people = ["Riley Martin works as a", "Jamie Clark lives in", "Jamie Clark"]
    with torch.no_grad():
        soft = SoftPrompt(model.embed(model.to_batch(people[2]))[0])
    targets = [Target(people[1]), Target(people[0], pos=2), Target(soft)]
    layers = {"source_layers": [-1, 4], "target_layers": [0, 6]}
    seen = patchscope_texts(model, people, targets, new_tokens=3, **layers, **QUIET)
    for i, (prompt, target) in enumerate(zip(people, targets, strict=True)):
        written = (people[1], people[0], people[2])[i]
        ids = generate(model, model.to_batch(written), 3)[0]
        text = model.decode(ids).removesuffix("<|endoftext|>")
        assert seen.unpatched[i] == text
        for a in (-1, 4):
            for b in (0, 6):
                place = Target(target.prompt, b, target.pos)
                one = patchscope(model, Source(prompt, a), place, new_tokens=3)
                assert seen.at(a, b)[i] == one.text[0]
    assert len(seen.to_pandas()) == 3 * 4
    same = patchscope_texts(model, people[0], people[1], source_layers=[2, 6], **QUIET)
    assert same.to_pandas().source_layer.tolist() == [2, 6]
    with pytest.raises(ValueError, match="nothing was written at 2→6"):
        same.at(2, 6)


@pytest.mark.parametrize("kind", [*FEW, *NO_REGISTRY])
@pytest.mark.parametrize("head", [None, 1])
def test_texts_on_every_family(kind, head):
    """Rows of other layers, several positions, and a beginning that all rows share."""
    model = model_of(kind)
    object.__setattr__(model, "tokenizer", Words([f" {i}" for i in range(97)]))
    sources, target = Source([S, OTHER], pos=[0, 2]), Target(T, pos=[3, -1])
    sources, target = (replace(place, head=head) for place in (sources, target))
    layers = {"source_layers": [0, 2], "target_layers": [0, 1]}
    how = {"new_tokens": 4, "mapping": lambda h: 50 * h}  # so that texts differ
    seen = patchscope_texts(model, sources, target, **how, **layers, **QUIET)
    for a, b in ((0, 0), (0, 1), (2, 0), (2, 1)):
        places = replace(sources, layer=a), replace(target, layer=b)
        assert seen.at(a, b) == patchscope(model, *places, **how).text
    assert len(set(seen.to_pandas().text)) > 1


def test_texts_need_a_tokenizer_and_room():
    with pytest.raises(ValueError, match="without a tokenizer"):
        patchscope_texts(model_of("gpt2"), S, T)
    model = load_model("mini", device="cpu")
    with pytest.raises(ValueError, match="do not fit"):
        patchscope_texts(model, "Paris", "Paris", new_tokens=999, source_layers=[1])


def test_texts_go_where_the_target_says_and_map_all_prompts_at_once():
    model = load_model("mini", device="cpu")
    people = ["Riley Martin works as a", "Jamie Clark lives in", "Everyone knows that"]
    source, target = Source(people, 3), Target(people[0], layer=5, pos=1)
    seen = patchscope_texts(model, source, target, new_tokens=2, **QUIET)
    assert seen.target_layers == (5,)
    assert seen.at(3, 5) == patchscope(model, source, target, new_tokens=2).text
    sizes = []

    def centred(states):
        sizes.append(states.shape)
        return states - states.mean(0, keepdim=True)

    how = {"mapping": centred, "new_tokens": 2}
    seen = patchscope_texts(model, source, target, **how, **QUIET)
    assert seen.at(3, 5) == patchscope(model, source, target, **how).text
    assert set(sizes) == {(3, 1, 192)}


def test_soft_prompts_have_no_tokens():
    model = load_model("mini", device="cpu")
    soft = SoftPrompt(torch.zeros(3, 192))
    with pytest.raises(ValueError, match="no tokens"):
        source_tokens(model, Source(soft))
    mask = torch.tensor([[1, 1, 0]])
    with pytest.raises(ValueError, match="leave mask= away"):
        patchscope(model, Source(soft, 2, mask=mask), Target("Paris", 2))


def test_one_vocabulary_with_empty_rows_behind_it():
    """Models of one tokenizer may have tables of different lengths, as Qwen's."""
    tokenizer = load_model("mini", device="cpu").tokenizer
    small, large = (tiny("gpt2", vocab_size=len(tokenizer) + n) for n in (0, 7))
    weights = small.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = pad(weights[name], (0, 0, 0, 7))
    large.load_state_dict(weights)
    one, other = (load_model(hf.double(), tokenizer) for hf in (small, large))
    both = [
        patchscope_grid(one, "Riley Martin works", "Jamie", target_model=m, **QUIET)
        for m in (one, other)
    ]
    assert torch.equal(both[0].precision_at_1, both[1].precision_at_1)
    assert both[0].precision_at_1.sum() > 0
    with pytest.raises(ValueError, match="different vocabularies"):
        fit_affine(one, "Riley Martin works", [(0, 0)], target_model=other)
