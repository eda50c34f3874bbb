"""Future lenses against reference numbers of independent code, and plain hooks."""

import math

import numpy as np
import pytest
import torch
from families import gap, model_of
from golden_models import GOLDEN
from transformers import AutoModelForCausalLM

from mechtut.lenses import future as room
from mechtut.lenses.future import (
    FIXED_PROMPTS,
    FutureLens,
    FutureLinear,
    FutureScores,
    cut_prefixes,
    future_linear,
    future_table,
)
from mechtut.models.loading import load_model
from mechtut.patching.patchscopes import patchscope
from mechtut.patching.places import SoftPrompt, Source, Target

FOLDER = GOLDEN / "patchscopes"
# Llama's norms and rotary tables are float32 also in a float64 model
TOLERANCE = {"gpt2t": 1e-9, "llamat": 1e-6}
QUIET = {"progress": False}
DRAW = torch.Generator().manual_seed(0)
IDS = [torch.randint(5, 90, (n,), generator=DRAW).tolist() for n in (6, 4, 6, 5)]
FAMILIES = ["gpt2", "llama", "gemma2", "granite", "gptj"]


def golden_model(name):
    hf = AutoModelForCausalLM.from_pretrained(
        FOLDER / name, attn_implementation="eager"
    )
    return load_model(hf.double())


def lens_of(model, vectors, layer, target_layer=None, ahead=()):
    fields = room._fields(model, layer, target_layer)
    none = torch.zeros(0)
    return FutureLens(vectors=vectors, losses=none, ahead=ahead, **fields)


def golden_lens(name):
    model, z = golden_model(name), np.load(FOLDER / f"future_lens.{name}.f64.npz")
    layers = int(z["layer"]), int(z["target_layer"])
    return model, z, lens_of(model, torch.from_numpy(z["soft_prompt"]), *layers)


@pytest.mark.parametrize("name", TOLERANCE)
def test_reference_numbers_of_reading(name):
    model, z, lens = golden_lens(name)
    s, near = z["S"].tolist(), TOLERANCE[name]
    seen = lens.read(model, [s], 4, stop=False)
    assert list(seen.tokens[0]) == z["greedy"].tolist()
    assert gap(seen.logits[0], z["greedy_logits"][0]) <= near
    scores = lens.evaluate(model, [s], (0, 1, 2, 3))
    for ours, theirs in {
        "surprisal_of_readout_under_model": "surprisal",
        "kl": "kl_target_readout",
        "rank": "rank_of_phrase",
        "rank_of_next": "rank_of_phrase",
    }.items():
        assert gap(getattr(scores, ours)[:, 0], z[theirs]) <= near
    assert gap(scores.precision(), z["precision_at_1"]) == 0
    given = lens.evaluate(model, [s], (0, 1, 2, 3), following=[z["phrase"].tolist()])
    assert gap(given.kl, scores.kl) == 0 and gap(given.rank_of_next, scores.rank) == 0
    rest = torch.from_numpy(z["phrase"])[None, :3]
    states, own = room._read_source(model, room._Examples([s], rest), lens.layer)
    assert gap(own[0], z["target_logits"]) <= near
    with torch.no_grad():
        read = room._read_out(model, lens.vectors, lens.target_layer, states, rest)
    assert gap(read[0], z["teacher_forced_logits"]) <= near


@pytest.mark.parametrize("name", TOLERANCE)
def test_reference_loss_and_gradient(name):
    model, z, lens = golden_lens(name)
    examples = room._Examples(
        [z["S"].tolist()], torch.from_numpy(z["phrase"])[None, :1]
    )
    layers = lens.layer, lens.target_layer
    work = room._Training(model, examples, *layers, (0, 1), 1, {})
    vectors = lens.vectors.clone().requires_grad_()
    loss = work.loss(vectors, [0])
    assert gap(loss, z["loss_01"]) <= TOLERANCE[name]
    (slope,) = torch.autograd.grad(loss.sum(), vectors)
    assert gap(slope, z["grad_01"]) <= TOLERANCE[name]


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_reference_linear_maps(layer):
    model, z = golden_model("gpt2t"), np.load(FOLDER / "future_linear.gpt2t.f64.npz")
    ids, t, n = z["ids"], int(z["T"]), int(z["n_train"])
    maps = future_linear(model, ids[:n], layer, (0, 1, 2), pos=t)
    test, rest = ids[n:, : t + 1].tolist(), ids[n:, t + 1 :].tolist()
    scores = maps.evaluate(model, test, following=rest)
    surprisals = scores.surprisal_of_readout_under_model.mean(1)
    for i in range(3):
        assert gap(maps.weight[i], z[f"A_{layer}_{i}"]) < 1e-9
        assert gap(maps.bias[i], z[f"b_{layer}_{i}"]) < 1e-9
        wanted = z[f"p1_model_{layer}_{i}"]
        assert float(scores.precision()[i]) == pytest.approx(wanted)
        assert float(surprisals[i]) == pytest.approx(z[f"surprisal_{layer}_{i}"])
        states, _ = room._read_source(
            model, room._Examples(test, torch.zeros(len(test), 0).long()), layer
        )
        said = model.unembed(maps.mapping(6, i)(states)).argmax(-1)
        assert said.tolist() == z[f"pred_{layer}_{i}"].tolist()
        follows = torch.tensor(rest)[:, i]
        hits = (said == follows).float().mean()
        assert float(scores.precision(1, "text")[i]) == pytest.approx(float(hits))


def test_linear_maps_at_every_position():
    model = model_of("llama")
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, 90, (n,), generator=draw).tolist() for n in (20, 20, 14)]
    maps = future_linear(model, rows, 1, (0, 2))
    x, y = [], []
    hidden = []

    def keep(_m, _a, out):
        hidden.append(out[0] if isinstance(out, tuple) else out)

    for ids in rows:
        hidden.clear()
        hooks = [model.blocks[i].register_forward_hook(keep) for i in (1, 2)]
        with torch.no_grad():
            model.hf(torch.tensor([ids]), use_cache=False)
        for hook in hooks:
            hook.remove()
        x.append(hidden[0][0, :-2])
        y.append(hidden[1][0, 2:])
    x, y = torch.cat(x), torch.cat(y)
    ones = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    wanted = torch.linalg.lstsq(ones, y).solution
    assert maps.n == (54, 48)
    assert gap(maps.weight[1], wanted[:-1]) < 1e-8
    assert gap(maps.bias[1], wanted[-1]) < 1e-8


@pytest.mark.parametrize("layers", [(1, 1), (-1, 0), (2, 1)])
@pytest.mark.parametrize("kind", FAMILIES)
def test_teacher_forcing_by_whole_passes(kind, layers):
    """Each N by a pass of its own, under torch's hooks; prefixes of several lengths."""
    model, (layer, target) = model_of(kind), layers
    vectors = torch.randn(3, model.d_model, generator=DRAW).double() * 0.3
    lens = lens_of(model, vectors, layer, target)
    rest = torch.randint(5, 90, (4, 2), generator=DRAW)
    scores = lens.evaluate(model, IDS, (0, 2), following=rest.tolist(), batch_size=3)
    for i, ids in enumerate(IDS):
        seen = {}

        def keep(_m, args, kwargs, seen=seen):
            seen["x"] = args[0] if args else kwargs["hidden_states"]

        def keep_out(_m, _a, out, seen=seen):
            seen["x"] = out[0] if isinstance(out, tuple) else out

        block = model.blocks[max(layer, 0)]
        if layer < 0:
            hook = block.register_forward_pre_hook(keep, with_kwargs=True)
        else:
            hook = block.register_forward_hook(keep_out)
        with torch.no_grad():
            model.hf(torch.tensor([ids]), use_cache=False)
        hook.remove()
        state = seen["x"][0, -1]

        def put(_m, _a, out, state=state):
            x = (out[0] if isinstance(out, tuple) else out).clone()
            x[:, 2] = state
            return (x, *out[1:]) if isinstance(out, tuple) else x

        for row, n in enumerate((0, 2)):
            given = rest[i, :n]
            with torch.no_grad():
                tokens = torch.tensor([ids + given.tolist()])
                own = model.hf(tokens, use_cache=False).logits[0, -1]
                embeds = torch.cat([vectors, model.embed(given)])[None]
                hook = model.blocks[target].register_forward_hook(put)
                read = model.hf(inputs_embeds=embeds, use_cache=False).logits[0, -1]
                hook.remove()
            p, q = own.log_softmax(-1), read.log_softmax(-1)
            assert gap(scores.kl[row, i], (p.exp() * (p - q)).sum()) < 1e-5
            best = own.argmax()
            assert int(scores.rank[row, i]) == int((read > read[best]).sum())
            said = scores.surprisal_of_readout_under_model[row, i]
            assert gap(said, -p[read.argmax()]) < 1e-5
            wanted = -q[best]
            assert gap(scores.surprisal_of_model_under_readout[row, i], wanted) < 1e-5
    # only the first two of the tokens behind a prefix are known
    assert (scores.rank_of_next[0] >= 0).all() and (scores.rank_of_next[1] == -1).all()
    assert scores.precision(1, "text")[1].isnan()


@pytest.mark.parametrize("kind", FAMILIES)
def test_reading_is_a_patchscope_with_a_cache(kind):
    model = model_of(kind)
    vectors = torch.randn(3, model.d_model, generator=DRAW).double() * 0.3
    lens = lens_of(model, vectors, 1)
    seen = lens.read(model, IDS, 3, stop=False)
    target = Target(SoftPrompt(vectors), 1)
    for i, ids in enumerate(IDS):
        how = {"new_tokens": 3, "stop": False, "cache": False}
        alone = patchscope(model, Source([ids], 1), target, **how)
        assert alone.tokens[0] == seen.tokens[i]
        assert gap(alone.logits[0], seen.logits[i]) < 1e-6


def test_a_table_reads_every_token_at_every_layer():
    model = load_model("mini")
    lenses = [FutureLens.of_prompt(model, "Martin works as a", i) for i in (6, 2)]
    prompt = "Riley Martin works"
    table = future_table(model, prompt, lenses, 2)
    assert table.pos.tolist() == [0, 0, 1, 1, 2, 2]
    assert table.layer.tolist() == [2, 6] * 3
    for row in table.itertuples():
        lens = lenses[row.layer == 2]
        seen = lens.read(model, prompt, 2, pos=row.pos, stop=False)
        assert row.text == model.decode(list(seen.tokens[0]))
        assert row.probability == pytest.approx(
            float(seen.logits.softmax(-1).max()), 1e-4
        )
        assert row.token == [" Riley", " Martin", " works"][row.pos]
    with pytest.raises(ValueError, match="lenses holds no lens"):
        future_table(model, prompt, [])


def test_a_written_prompt_is_that_prompt():
    model = load_model("mini")
    lens = FutureLens.of_prompt(model, FIXED_PROMPTS[1], 4)
    prompt = "Riley Martin works as a"
    seen = lens.read(model, prompt, 3)
    wanted = patchscope(
        model, Source(prompt, 4), Target(FIXED_PROMPTS[1], 4), new_tokens=3
    )
    assert seen.text == wanted.text
    assert gap(seen.logits, wanted.logits) < 1e-4
    scores = lens.evaluate(model, prompt)
    assert scores.ahead == (0, 1, 2, 3)
    assert (
        gap(
            wanted.surprisal_of_readout_under_source,
            scores.surprisal_of_readout_under_model[0],
        )
        < 1e-4
    )


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_learning(kind):
    model = model_of(kind)
    model.hf.requires_grad_()
    prefixes = [ids for ids in IDS for _ in range(6)]
    how = {"learning_rate": 0.05, "epochs": 4, "length": 4, **QUIET}
    lens = FutureLens.fit(model, prefixes, 1, ahead=(0, 1), **how)
    assert len(lens.losses) == 12
    assert lens.losses[-3:].mean() < 0.7 * lens.losses[0]
    assert all(p.grad is None and p.requires_grad for p in model.hf.parameters())
    # the first loss is that of the vectors before learning
    begun = FutureLens.fit(model, prefixes, 1, ahead=(0, 1), **{**how, "epochs": 0})
    first = begun.evaluate(model, prefixes).kl.mean()
    last = lens.evaluate(model, prefixes).kl.mean()
    assert last < 0.7 * first
    assert gap(lens.losses[0], first) < 0.5 * float(first)


def test_passes_add_up_to_a_step():
    model = model_of("gpt2")
    how = {"learning_rate": 0.01, "batch_size": 4, **QUIET}
    one, four = (
        FutureLens.fit(model, IDS, 1, ahead=1, accumulate=n, **how) for n in (1, 4)
    )
    assert gap(one.losses, four.losses) < 1e-12
    assert gap(one.vectors, four.vectors) < 1e-9


def test_one_step_of_adamw_written_out():
    model = model_of("gpt2")
    how = {"ahead": (0, 1), "batch_size": 4, **QUIET}
    lens = FutureLens.fit(model, IDS, 1, learning_rate=0.01, weight_decay=0.1, **how)
    start = FutureLens.fit(model, IDS, 1, epochs=0, **how).vectors
    examples = room._continued(model, IDS, None, 1)
    work = room._Training(model, examples, 1, 1, (0, 1), 1, {})
    leaf = start.clone().requires_grad_()
    slope = torch.autograd.grad(work.loss(leaf, [0, 1, 2, 3]).mean(), leaf)[0]
    wanted = start * (1 - 0.01 * 0.1) - 0.01 * slope / (slope.abs() + 1e-8)
    assert gap(lens.vectors, wanted) < 1e-9
    assert 0.015 < float(start.std()) < 0.025


def test_stopped_training_goes_on(tmp_path, monkeypatch):
    model = model_of("gpt2")
    how = {"learning_rate": 0.01, "epochs": 6, "batch_size": 2, **QUIET}
    whole = FutureLens.fit(model, IDS, 1, **how)
    step, done = room._Training.step, []

    def tired(self, *given):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(1)
        return step(self, *given)

    how |= {"folder": tmp_path / "lens", "save_every": 3}
    monkeypatch.setattr(room._Training, "step", tired)
    with pytest.raises(KeyboardInterrupt):
        FutureLens.fit(model, IDS, 1, **how)
    done.clear()
    again = FutureLens.fit(model, IDS, 1, **how)
    assert len(done) == 6, "from step 6 of 12"
    assert torch.equal(again.vectors, whole.vectors)
    assert torch.equal(again.losses, whole.losses)
    with pytest.raises(ValueError, match="holds another sweep"):
        FutureLens.fit(model, IDS, 1, **{**how, "learning_rate": 0.02})


def test_saved_and_read_again(tmp_path):
    model = model_of("gpt2")
    lens = FutureLens.fit(model, IDS, 1, **QUIET)
    same = FutureLens.load(lens.save(tmp_path / "lens"))
    assert torch.equal(same.vectors, lens.vectors) and same.ahead == (1,)
    assert len(lens.to_pandas()) == 1
    maps = future_linear(model, [IDS[0] * 8], 1, (0, 1))
    again = FutureLinear.load(maps.save(tmp_path / "maps"))
    scores = again.evaluate(model, IDS)
    assert torch.equal(scores.kl, maps.evaluate(model, IDS).kl)
    assert maps.to_pandas().ahead.tolist() == [0, 1]
    table = FutureScores.load(scores.save(tmp_path / "scores")).to_pandas()
    assert table.n.tolist() == [4, 4]
    hits = (scores.rank == 0).float()
    wanted = 3.182 * hits.std(1) / 2  # Student's quantile of 3 degrees
    assert gap(torch.tensor(table.half_width), wanted) < 1e-3
    for found in (lens, maps):
        with pytest.raises(ValueError, match="other weights than"):
            found.check(model_of("llama"))
        with pytest.raises(ValueError, match="other weights than"):
            found.evaluate(model_of("llama"), IDS)


def test_padding_is_left_out():
    model = model_of("gpt2")
    lens = FutureLens.of_prompt(model, [5, 6, 7], 1)
    padded = torch.tensor([ids + [0] * (6 - len(ids)) for ids in IDS])
    mask = torch.tensor([[1] * len(ids) + [0] * (6 - len(ids)) for ids in IDS])
    plain = lens.evaluate(model, IDS)
    assert gap(lens.evaluate(model, padded, mask=mask).kl, plain.kl) < 1e-9


def test_prefixes():
    model = load_model("mini")
    texts = ["Riley Martin works as a singer in Paris", "Everyone", "the cat sat " * 90]
    found = cut_prefixes(model, texts, 40, least=3)
    assert found == cut_prefixes(model, texts, 40, least=3)
    assert {ids[0] for ids in found} == {0}
    lengths = {len(ids) for ids in found}
    assert min(lengths) >= 3 and max(lengths) <= 64 and len(lengths) > 5
    whole = [[0, *model.encode(t)] for t in texts]
    assert all(any(row[: len(ids)] == ids for row in whole) for ids in found)
    with pytest.raises(ValueError, match="none of 1 texts has 9 tokens"):
        cut_prefixes(model, texts[1:2], 4, least=9)


def test_what_is_refused():
    model = model_of("gpt2")
    fit = FutureLens.fit
    lens = FutureLens.of_prompt(model, [5, 6], 1)
    soft = SoftPrompt(torch.zeros(2, 32))
    for error, message, call in (
        (IndexError, "layer 3 of the source", lambda: fit(model, IDS, 3, **QUIET)),
        (IndexError, "layer 3 of the target", lambda: fit(model, IDS, 1, 3, **QUIET)),
        (
            ValueError,
            "ahead must be different",
            lambda: fit(model, IDS, 1, ahead=[1, 1]),
        ),
        (ValueError, "ahead must be different", lambda: fit(model, IDS, 1, ahead=[])),
        (ValueError, "ahead must be different", lambda: lens.evaluate(model, IDS, -1)),
        (ValueError, "prefixes holds no prompt", lambda: fit(model, [], 1)),
        (ValueError, "prefixes must be text", lambda: lens.evaluate(model, soft)),
        (ValueError, "texts must be text", lambda: future_linear(model, soft, 1)),
        (
            ValueError,
            "prefix 1 is followed by 1 tokens, but 2 are asked for",
            lambda: lens.evaluate(model, IDS[:2], 2, following=[[5, 6], [5]]),
        ),
        (
            ValueError,
            "prefixes and following must be equally long",
            lambda: lens.evaluate(model, IDS, 1, following=[[5]]),
        ),
        (
            ValueError,
            "a token id of following is outside 0..96",
            lambda: lens.evaluate(model, IDS[:1], 1, following=[[97]]),
        ),
        (
            ValueError,
            "prefix 0 has 64 tokens, and with 1 behind it does not fit into 64",
            lambda: lens.evaluate(model, [[5] * 64], 1),
        ),
        (
            IndexError,
            "pos=3, counted from the start, and 1 tokens ahead do not",
            lambda: future_linear(model, IDS, 1, 1, pos=3),
        ),
        (
            ValueError,
            "no text has more than 7 tokens",
            lambda: future_linear(model, IDS, 1, 7),
        ),
        (
            ValueError,
            "fitted \\(0,\\) tokens ahead, not 2",
            lambda: future_linear(model, [IDS[0] * 8], 1, 0).mapping(3, 2),
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_loss_that_is_not_finite_is_told(monkeypatch):
    model = model_of("gpt2")

    def broken(_self, vectors, which):
        return vectors.sum() * torch.full((len(which),), math.nan)

    monkeypatch.setattr(room._Training, "loss", broken)
    with pytest.raises(
        ValueError, match="loss is nan: check the model, or take a smaller"
    ):
        FutureLens.fit(model, IDS, 1, **QUIET)
