"""Steering against plain hooks: where it acts, what it measures, what it refuses."""

import numpy as np
import pytest
import torch
from families import CONFIGS, NO_REGISTRY, POST_NORM, different, model_of

from mechtut import load_model
from mechtut.models.hooks import Edit, Where, capture
from mechtut.prompts.completions import complete
from mechtut.steering.ablation import (
    ablation_direction,
    orthogonalise,
    select_direction,
    token_log_odds,
)
from mechtut.steering.acting import (
    next_logits,
    steer,
    steered_tokens,
    steering_edits,
)
from mechtut.steering.evaluation import (
    SteeringReport,
    bootstrap_mean,
    evaluate_steering,
    price_of_edits,
    shuffled_labels,
    steerability,
)
from mechtut.steering.sweeps import (
    Sweep,
    TokenOdds,
    predict_effect,
    random_like,
    sweep,
)
from mechtut.steering.vectors import (
    SteeringVector,
    act_add,
    equal_norms,
    mean_difference,
    relative_strength,
)

DRAW = torch.Generator().manual_seed(3)
ODDS = TokenOdds((5, 9), (7, 11, 13))
PAIRS = [
    (torch.randint(1, 97, (n,), generator=DRAW).tolist(), [*range(40, 40 + n)])
    for n in (4, 6, 6, 5)
]
PROMPTS = [torch.randint(1, 97, (n,), generator=DRAW).tolist() for n in (7, 5, 7, 6)]
PLACES = {  # rule -> the steered columns of a prompt of n tokens
    "all": lambda n: slice(None),
    "last": lambda n: slice(n - 1, None),
    "from 2": lambda n: slice(2, None),
    "one": lambda n: slice(1, 2),
}
RULES = {"all": "all", "last": "last", "from 2": slice(2, None), "one": 1}


def pushed(model, layer, change, prompts=PROMPTS):
    """Last logits of each prompt with a block's output changed by a plain hook."""
    found = []
    for prompt in prompts:

        def hook(_module, _args, output, prompt=prompt):
            x = (output[0] if isinstance(output, tuple) else output).clone()
            change(x, len(prompt))
            return (x, *output[1:]) if isinstance(output, tuple) else x

        handle = model.blocks[layer].register_forward_hook(hook)
        with torch.no_grad():
            found.append(model.hf(torch.tensor([prompt])).logits[0, -1])
        handle.remove()
    return torch.stack(found)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
def test_a_sweep_is_one_full_pass_per_cell(kind, rule):
    model = model_of(kind)
    v = mean_difference(model, PAIRS)
    swept = sweep(model, v, PROMPTS, ODDS, [0, 2], (-1.5, 2.0), 2, where=RULES[rule])
    plain = ODDS(pushed(model, 0, lambda x, n: None))
    assert torch.allclose(swept.baseline, plain, atol=1e-10)
    directions = [v, *random_like(v.of([0, 2]), 2)]
    for i, direction in enumerate(directions):
        for j, layer in enumerate((0, 2)):
            row = direction.of([layer]).values[0]
            for k, c in enumerate((-1.5, 2.0)):

                def change(x, n, push=c * row):
                    x[:, PLACES[rule](n)] += push

                logits = pushed(model, layer, change)
                found = swept.effects[i, j, k]
                assert torch.allclose(found, ODDS(logits) - plain, atol=1e-9)
                mass = swept.mass[i, j, k]
                assert torch.allclose(mass, ODDS.mass(logits), atol=1e-10)


def test_random_directions_are_as_stated():
    v = mean_difference(model_of("gpt2"), PAIRS)
    draw = np.random.RandomState(7)
    for found in random_like(v, 2, seed=7):
        wanted = torch.tensor(draw.randn(3, 32))
        cosine = torch.cosine_similarity(found.values.double(), wanted)
        assert torch.allclose(cosine, torch.ones(3).double(), atol=1e-12)
        assert torch.allclose(found.norms, v.norms)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_prediction_is_the_slope(kind, rule):
    model = model_of(kind)
    v = mean_difference(model, PAIRS)
    found = predict_effect(model, v, PROMPTS, ODDS, where=RULES[rule])
    # norms of a Llama compute in float32, also in a float64 model
    step, near = (1e-4, 1e-5) if kind == "gpt2" else (1e-2, 5e-3)
    for layer in range(3):
        rise, row = [], v.values[layer]
        for c in (-step, step):

            def change(x, n, push=c * row):
                x[:, PLACES[rule](n)] += push

            rise.append(ODDS(pushed(model, layer, change)))
        slope = (rise[1] - rise[0]) / (2 * step)
        assert torch.allclose(found[layer], slope, rtol=near, atol=near / 5)


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    model = model_of("gpt2")
    v = mean_difference(model, PAIRS)
    given = (model, v, PROMPTS, ODDS, [0, 1], (1.0,), 1)
    whole = sweep(*given)
    from mechtut.steering import sweeps

    made, real = [], sweeps.Replay

    def counted(*args, **kwargs):
        made.append(1)
        if len(made) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(sweeps, "Replay", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep(*given, folder=tmp_path)
    again = sweep(*given, folder=tmp_path)
    assert torch.equal(again.effects, whole.effects)
    with pytest.raises(ValueError, match="another sweep"):
        sweep(model, 2 * v, *given[2:], folder=tmp_path)


def test_the_price_is_that_of_whole_texts():
    model = model_of("llama")
    v = mean_difference(model, PAIRS)
    edits = [steering_edits(model, v, 1, c) for c in (0, 1.5)]
    found = price_of_edits(model, edits, PROMPTS[:2])
    for i, text in enumerate(PROMPTS[:2]):
        ids = torch.tensor([text])
        plain = model.hf(ids).logits[0, :-1].log_softmax(-1)
        handle = model.blocks[1].register_forward_hook(
            lambda _m, _a, out: out + 1.5 * v.at(1)
        )
        after = model.hf(ids).logits[0, :-1].log_softmax(-1)
        handle.remove()
        rows = torch.arange(len(text) - 1)
        nll = (plain - after)[rows, ids[0, 1:]].mean()
        kl = (plain.exp() * (plain - after)).sum(-1).mean()
        assert torch.allclose(found[1, i], torch.stack([nll, kl]), atol=1e-10)
        assert torch.allclose(found[0, i], torch.zeros(2).double(), atol=1e-12)


def test_slopes_residuals_and_ranks():
    x = np.array([-1.0, 0.0, 0.5, 2.0])
    y = np.random.RandomState(0).randn(6, 4) + np.outer([2, 1, 0.2, -1, -2, 0], x)
    found = steerability(torch.tensor(y), x.tolist())
    for row, slope, left in zip(y, found.slopes, found.residuals, strict=True):
        (a, _), (square,), *_ = np.polyfit(x, row, 1, full=True)
        assert float(slope) == pytest.approx(a)
        assert float(left) == pytest.approx((square / 4) ** 0.5)
    ranks = [np.corrcoef(np.argsort(np.argsort(row)), range(4))[0, 1] for row in y]
    assert np.allclose(found.rank, ranks)
    assert found.anti_steerable == np.mean(found.slopes.numpy() < 0)
    turning = steerability(
        torch.tensor(
            [[0.0, 1, 2, 3], [0.0, 2, 3, 1], [3.0, 2, 1, 0], [0.0, 2, -1, -2]]
        ),
        x.tolist(),
    )
    assert turning.turning == 0.5
    order = [2, 0, 3, 1]
    mixed = steerability(torch.tensor(y[:, order]), x[order].tolist())
    assert torch.allclose(mixed.slopes, found.slopes)
    assert mixed.turning == found.turning


def test_the_bootstrap_covers_the_mean():
    draw, hits = np.random.RandomState(1), 0
    for seed in range(200):
        x = torch.tensor(draw.randn(30) + 3)
        low, high = bootstrap_mean(x, 500, seed)
        hits += low < 3 < high
    assert 0.88 < hits / 200 < 0.99


def test_shuffled_labels_cancel_what_pairs_share():
    model = model_of("gpt2")
    shared = [([1, 2, 3, 4, a], [1, 2, 3, 4, b]) for a, b in [(5, 6)] * 4]
    v = mean_difference(model, shared)
    with pytest.raises(ValueError, match="cannot be shuffled"):
        shuffled_labels(model, shared[:1], v)
    mixed = [
        ([1, 2, 3, 4, a], [1, 2, 3, 4, b])
        for a, b in zip(range(5, 15), range(20, 30), strict=True)
    ]
    v = mean_difference(model, mixed)
    control = shuffled_labels(model, mixed, v, seed=1)
    assert torch.allclose(control.norms, v.norms)
    swapped = np.random.RandomState(1).permutation(10)[:5]
    turned = [pair[::-1] if i in swapped else pair for i, pair in enumerate(mixed)]
    wanted = mean_difference(model, turned)
    cosine = torch.cosine_similarity(control.values, wanted.values)
    assert torch.allclose(cosine, torch.ones(3).double(), atol=1e-10)


def test_shuffled_labels_of_equal_differences_are_refused():
    model = model_of("gpt2")
    same = [([1, 2, 3, 4, 5], [1, 2, 3, 4, 6])] * 4
    v = mean_difference(model, same)
    with pytest.raises(ValueError, match="cancel"):
        shuffled_labels(model, same, v)


def report_of(model, **how):
    v = mean_difference(model, PAIRS)
    given = {"coefficients": (-1.0, 2.0), "controls": 3, **how}
    return v, evaluate_steering(model, v, PROMPTS, ODDS, 1, PROMPTS[:2], **given)


def test_a_report_holds_what_its_parts_say(tmp_path):
    model = model_of("llama")
    v, report = report_of(model, other_layer=0)
    swept = sweep(model, v, PROMPTS, ODDS, [1], (-1.0, 2.0), 0)
    assert torch.allclose(report.effects[0], swept.effects[0, 0], atol=1e-10)
    edits = [steering_edits(model, v, 1, c) for c in (-1.0, 2.0)]
    price = price_of_edits(model, edits, PROMPTS[:2])
    assert torch.allclose(report.nll[0], price[..., 0])
    other = v.of([0]).unit().values * v.norms[1]
    again = steering_edits(model, other[0], 1, 2.0)
    change = ODDS(next_logits(model, PROMPTS, again)) - report.baseline
    assert torch.allclose(report.effects[-1, 1], change, atol=1e-9)
    table = report.to_pandas()
    assert list(table.direction.unique()) == [
        *("vector", "random 1", "random 2", "random 3", "layer 0")
    ]
    row = table[(table.direction == "vector") & (table.coefficient == 2)].iloc[0]
    others = report.effects[1:4, 1].mean(-1)
    z = (report.effects[0, 1].mean() - others.mean()) / others.std()
    assert row.z == pytest.approx(float(z))
    assert row.perplexity_factor == pytest.approx(float(report.nll[0, 1].mean().exp()))
    kept = SteeringReport.load(report.save(tmp_path / "report"))
    assert torch.equal(kept.kl, report.kl) and kept.names == report.names
    assert np.isnan(report.solved_plain)
    saved = Sweep.load(swept.save(tmp_path / "sweep"))
    assert torch.equal(saved.effects, swept.effects)
    assert torch.equal(SteeringVector.load(v.save(tmp_path / "v")).values, v.values)


def test_relative_strength_is_an_axis():
    """With the coefficient's sign and in order, whatever order was asked for."""
    model = model_of("llama")
    v, report = report_of(model, coefficients=(2.0, -1.0, 0.5))
    swept = sweep(model, v, PROMPTS, ODDS, [0, 2], (2.0, -1.0, 0.5), 1)
    unit = relative_strength(model, v, PROMPTS)
    lines = {line.get_label(): line for line in report.plot(by="strength").lines}
    wanted = unit[1] * torch.tensor([-1.0, 0.5, 2.0])
    assert np.allclose(lines["vector"].get_xdata(), wanted)
    assert np.allclose(
        lines["vector"].get_ydata(), report.effects[0].mean(-1)[[1, 2, 0]]
    )
    lines = {line.get_label(): line for line in swept.plot(by="strength").lines}
    for i, layer in enumerate((0, 2)):
        line = lines[f"layer {layer}"]
        wanted = unit[layer] * torch.tensor([-1.0, 0.5, 2.0])
        assert np.allclose(line.get_xdata(), wanted)
        assert np.allclose(line.get_ydata(), swept.effects[0, i].mean(-1)[[1, 2, 0]])
    for result in (report, swept):
        with pytest.raises(ValueError, match="by must be"):
            result.plot(by="size")


def test_measured_on_training_texts_it_is_refused():
    model = model_of("gpt2")
    v = mean_difference(model, PAIRS)
    for prompts in ([PAIRS[0][0]], [PAIRS[1][1][:3]]):
        with pytest.raises(ValueError, match="was read to make the vector"):
            sweep(model, v, prompts, ODDS)
    with pytest.raises(ValueError, match="was read to make the vector"):
        evaluate_steering(model, v, PROMPTS, ODDS, 1, [PAIRS[0][0]])


# --- acting


@pytest.mark.parametrize("mode", ["add", "project", "piecewise", "ablate"])
def test_generation_with_a_cache_is_generation_without(mode):
    model = model_of("llama")
    v = mean_difference(model, PAIRS)
    prompt = (PROMPTS[0], 0)
    for where in (
        "all",
        "last",
        "prompt",
        "new",
        slice(3, None),
        Where("back", width=2),
    ):
        how = {"coefficient": 3.0, "where": where, "mode": mode}
        with steer(model, v, [0, 1], **how):
            fast = complete(model, prompt, 6)
        with steer(model, v, [0, 1], **how, prompt_length=len(PROMPTS[0])):
            slow = complete(model, prompt, 6, cache=False)
        assert fast == slow, where


def test_the_first_rows_of_a_batch_are_not_all():
    """Hooks of transformers 5 get a tensor: `output[0]` would be the first row."""
    model = model_of("llama")
    v = mean_difference(model, PAIRS)
    batch = torch.tensor([PROMPTS[0], PROMPTS[2]])
    with steer(model, v, 1, 2.0):
        both = model.logits(batch)
        for row, prompt in zip(both, (PROMPTS[0], PROMPTS[2]), strict=True):
            assert torch.allclose(row, model.logits(prompt)[0], atol=1e-10)


def test_what_is_captured_is_not_changed_by_steering():
    model = model_of("gpt2")
    v = mean_difference(model, PAIRS)
    before = capture(model, PROMPTS[0], "resid_post.1")["resid_post.1"]
    kept = before.clone()
    with steer(model, v, 1, 5.0):
        model.logits(PROMPTS[0])
    assert torch.equal(before, kept)


def test_toward_leaves_the_component_of_another_state():
    model = model_of("llama")
    d, mean = (torch.randn(32, generator=DRAW, dtype=torch.float64) for _ in range(2))
    with steer(model, d, 1, mode="ablate", toward=mean):
        found = capture(model, PROMPTS[0], "resid_post.1")["resid_post.1"][0]
    unit = d / d.norm()
    assert torch.allclose(found @ unit, (mean @ unit).expand(len(found)))


@pytest.mark.parametrize("kind", different(CONFIGS))
def test_out_of_the_weights_is_the_same_as_by_hooks(kind):
    model = model_of(kind)
    d = torch.randn(32, generator=torch.Generator().manual_seed(0)).double()
    tokens = torch.tensor([PROMPTS[0]])
    before = {k: p.clone() for k, p in model.hf.named_parameters()}
    refused = kind in POST_NORM or kind == "bloom" or model.family.mlp_proj is None
    if refused:
        with pytest.raises(NotImplementedError, match="use steer|use\\s+steer"):
            orthogonalise(model, d)
        return
    changed = orthogonalise(model, d)
    with steer(model, d, mode="ablate"):
        wanted = model.logits(tokens)
    # norms of some families compute in float32 also in a float64 model
    assert torch.allclose(changed.logits(tokens), wanted, atol=1e-5)
    assert not torch.allclose(model.logits(tokens), wanted, atol=1e-3)
    states = capture(changed, tokens, "resid_post")["resid_post"]
    assert float((states @ (d / d.norm())).abs().max()) < 1e-6
    assert all(torch.equal(before[k], p) for k, p in model.hf.named_parameters())


@pytest.mark.parametrize("kind", [k for k in NO_REGISTRY if k != "mpt"][:2])
def test_steering_needs_no_attention_registry(kind):
    model = model_of(kind)
    with steer(model, torch.ones(32).double(), 1, 2.0):
        found = model.logits([PROMPTS[0]])
    wanted = pushed(model, 1, lambda x, n: x.add_(2.0), PROMPTS[:1])
    assert torch.allclose(found[:, -1], wanted, atol=1e-10)


# --- vectors


def test_mean_differences_are_those_of_transformers():
    model = model_of("llama")
    v = mean_difference(model, PAIRS, layers=[0, 1], pos=-2)
    rows = []
    for pair in PAIRS:
        hidden = [
            model.hf(torch.tensor([text]), output_hidden_states=True).hidden_states
            for text in pair
        ]
        rows.append(
            torch.stack([hidden[0][i][0, -2] - hidden[1][i][0, -2] for i in (1, 2)])
        )
    assert torch.allclose(v.values, torch.stack(rows).mean(0), atol=1e-12)


def test_the_arithmetic_of_vectors():
    a = SteeringVector(values=torch.randn(2, 4), layers=(1, 3))
    b = SteeringVector(values=torch.randn(2, 4), layers=(1, 3))
    assert torch.allclose((a + b * 2 - a / 2).values, a.values / 2 + b.values * 2)
    assert torch.allclose((-a).values, -a.values)
    assert torch.equal(a.of([3]).values[0], a.at(3))
    scaled = equal_norms([a, b])
    assert torch.allclose(scaled[0].norms, scaled[1].norms)
    assert torch.allclose(scaled[0].norms, (a.norms + b.norms) / 2)
    zero = SteeringVector(values=torch.zeros(1, 4), layers=(1,))
    with pytest.raises(ValueError, match="row 0 of the vector is zero"):
        zero.unit()
    with pytest.raises(ValueError, match="belong to one layer"):
        SteeringVector(values=torch.zeros(2, 4), layers=(1, 3), positions=(0, 1))


def test_relative_strength_leaves_the_first_token_out():
    model = model_of("gpt2")
    v = mean_difference(model, PAIRS, layers=[1])
    hidden = [
        model.hf(torch.tensor([p]), output_hidden_states=True).hidden_states[2][0, 1:]
        for p in PROMPTS
    ]
    mean = torch.cat(hidden).norm(dim=-1).mean()
    found = relative_strength(model, v, PROMPTS)
    assert torch.allclose(found, v.norms / mean, atol=1e-10)


def test_activation_addition_needs_room():
    model = load_model("mini", device="cpu")
    v = act_add(model, "Riley Martin works as a singer", " pilot", 3, pad="pad")
    with (
        pytest.raises(ValueError, match="needs 7 positions, and a prompt has 2"),
        steer(model, v),
    ):
        model.logits("Paris is")
    edits = steering_edits(model, v, where="back")
    text = "It is said that Riley Martin works as a"
    assert steered_tokens(model, text, edits).count("«") == 7
    with pytest.raises(ValueError, match="a row for each of 7 positions"):
        steering_edits(model, v, where=[1, 2])


def test_candidates_do_not_need_equal_numbers():
    model = model_of("gpt2")
    made = ablation_direction(model, PROMPTS[:3], PROMPTS[3:], [-2, -1], layers=[1, 2])

    def mean(prompts, pos, layer):
        states = [
            model.hf(torch.tensor([p]), output_hidden_states=True).hidden_states[layer]
            for p in prompts
        ]
        return torch.stack([s[0, pos] for s in states]).mean(0)

    for i, pos in enumerate((-2, -1)):
        for j, layer in enumerate((1, 2)):
            wanted = mean(PROMPTS[:3], pos, layer) - mean(PROMPTS[3:], pos, layer)
            assert torch.allclose(made.values[i, j], wanted, atol=1e-10)
    assert made.vector(-1, 2).site == "resid_pre"
    edit = steering_edits(model, made.vector(-1, 2))[0]
    assert isinstance(edit, Edit) and (edit.site, edit.layer) == ("resid_pre", 2)


# --- found by a reader who tried to break it


def test_a_vector_of_one_row_is_ablated_everywhere():
    model = model_of("llama")
    made = ablation_direction(model, PROMPTS[:2], PROMPTS[2:])
    v = made.vector(-1, 1)
    with steer(model, v, mode="ablate"):
        found = model.logits(PROMPTS[0])
    with steer(model, v.values[0], mode="ablate"):
        assert torch.equal(found, model.logits(PROMPTS[0]))
    wanted = orthogonalise(model, v).logits(PROMPTS[0])
    assert torch.allclose(found, wanted, atol=1e-5)


def test_a_component_is_replaced_and_the_length_kept():
    model = model_of("gpt2")
    d, mean = (torch.randn(32, generator=DRAW, dtype=torch.float64) for _ in range(2))
    before = capture(model, PROMPTS[0], "resid_post.1")["resid_post.1"]
    how = {"mode": "ablate", "toward": mean, "keep_norm": True}
    with steer(model, d, 1, **how):
        after = capture(model, PROMPTS[0], "resid_post.1")["resid_post.1"]
    assert torch.allclose(after.norm(dim=-1), before.norm(dim=-1))


def test_sums_remember_what_both_read():
    model = model_of("gpt2")
    a, b = mean_difference(model, PAIRS[:2]), mean_difference(model, PAIRS[2:])
    assert set((a + b).read) == {*a.read, *b.read}
    other = mean_difference(model_of("llama"), PAIRS[:2])
    with pytest.raises(ValueError, match="cannot be added"):
        a + other


def test_candidates_are_not_chosen_on_the_prompts_that_made_them():
    model = model_of("gpt2")
    made = ablation_direction(model, PROMPTS[:2], PROMPTS[2:])
    with pytest.raises(ValueError, match="was read to make the vector"):
        select_direction(model, made, [PROMPTS[1]], [[1, 2]], token_log_odds([3]))


def test_shuffled_labels_of_a_blocks_input():
    model = model_of("gpt2")
    pre = SteeringVector(
        values=mean_difference(model, PAIRS, layers=[0]).values,
        layers=(1,),
        site="resid_pre",
    )
    post = mean_difference(model, PAIRS, layers=[0])
    found = shuffled_labels(model, PAIRS, pre)
    assert torch.allclose(found.values, shuffled_labels(model, PAIRS, post).values)
    assert found.site == "resid_pre"


def test_controls_are_brought_to_the_vectors_length():
    model = model_of("gpt2")
    v = mean_difference(model, PAIRS)
    given = (model, v, PROMPTS, ODDS, 1, PROMPTS[:1])
    how = {"coefficients": (1.0,), "controls": 1}
    one = evaluate_steering(*given, **how, shuffled=-v)
    long = evaluate_steering(*given, **how, shuffled=v * -100)
    assert torch.allclose(one.effects, long.effects, atol=1e-9)
    v2 = mean_difference(model_of("llama"), PAIRS)
    with pytest.raises(ValueError, match="was read in"):
        evaluate_steering(*given, **how, shuffled=v2)


def test_slopes_of_small_coefficients():
    y = torch.tensor([[4.0, 1.0, 0.0, -1.0, 3.0]])
    x = [-4.0, -1.0, 0.0, 1.0, 4.0]
    assert float(steerability(y, x, within=1.0).slopes) == pytest.approx(-1.0)
    assert steerability(y, x, within=1.0).turning == 1.0
    with pytest.raises(ValueError, match="leaves fewer than two"):
        steerability(y, x, within=0.5)


def test_the_pareto_curve_is_of_each_sign():
    model = model_of("gpt2")
    _, report = report_of(model, coefficients=(-2.0, -1.0, 1.0, 2.0))
    kept = report.pareto()
    table = report.to_pandas().query("direction == 'vector'")
    for sign in (-1, 1):
        rows = table[np.sign(table.coefficient) == sign]
        for _, row in rows.iterrows():
            better = (rows.effect * sign > row.effect * sign) & (rows.kl <= row.kl)
            assert (row.coefficient in set(kept.coefficient)) == (not better.any())


def test_nothing_is_read_under_steering():
    model = model_of("gpt2")
    v = mean_difference(model, PAIRS)
    reads = (
        lambda: mean_difference(model, PAIRS),
        lambda: act_add(model, [1, 2], [3, 4], 1),
        lambda: ablation_direction(model, PROMPTS[:1], PROMPTS[1:]),
        lambda: predict_effect(model, v, PROMPTS, ODDS),
    )
    for read in reads:
        with pytest.raises(RuntimeError, match="leave the block"), steer(model, v, 1):
            read()
