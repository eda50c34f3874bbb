"""Steering heads: the authors' functions (tests/golden/steering/iti), and by hand."""

import numpy as np
import pytest
import torch
from families import CONFIGS, different, gap, model_of
from golden_steering import NEAR, apart, steering_model, steering_numbers

from mechtut.models.hooks import Where, intervene
from mechtut.prompts.completions import complete
from mechtut.steering.heads import HeadDirections, head_directions

LLAMA = NEAR["llama"]["f64"]


@pytest.fixture(scope="module")
def golden():
    told, z = steering_numbers("iti")
    groups = [0] * len(told["texts"])
    for question, members in enumerate(told["questions"]):
        for i in members:
            groups[i] = question
    test = [i for q in told["val"] for i in told["questions"][q]]
    given = (told["texts"], told["labels"], groups, told["K"], told["alpha"])
    return told, z, steering_model("llama", "f64"), given, test


def test_accuracies_and_heads_of_the_authors(golden):
    told, _, model, given, test = golden
    found = head_directions(model, *given, test=test)
    assert apart(found.accuracy.flatten(), np.array(told["val_accuracy"])) == 0
    assert [list(head) for head in found.heads] == told["top_heads"]
    assert found.items == len(told["val"]) and found.majority == 0.5


def test_displacements_of_the_authors(golden):
    told, z, model, given, test = golden
    found = head_directions(model, *given, test=test, control=False)
    wanted = np.stack([z["displacement"][layer, head] for layer, head in found.heads])
    assert apart(found.displacement, wanted) < LLAMA
    sigma = [told["sigma"][f"{layer}.{head}"] for layer, head in found.heads]
    assert apart(found.sigma, np.array(sigma)) < LLAMA
    means = np.stack([z["com"][layer, head] for layer, head in found.heads])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert apart(found.directions, means) < LLAMA
    sample = head_directions(model, *given, test=test, spread="sample", control=False)
    n = len(told["texts"])
    assert apart(sample.sigma / found.sigma, np.full(4, (n / (n - 1)) ** 0.5)) < 1e-9


def test_probe_directions_of_the_authors(golden):
    """Their fits stop at scikit-learn's default tolerance."""
    _, z, model, given, test = golden
    every = [(layer, head) for layer in range(5) for head in range(4)]
    found = head_directions(
        model, *given, test=test, direction="probe", heads=every, control=False
    )
    wanted = z["probe_coef"].reshape(20, -1)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    assert apart(found.directions, wanted) < 3e-3


@pytest.mark.parametrize(
    ("where", "name"),
    [("last", "logits_last"), (Where("from", 4), "logits_from4")],
)
def test_steered_logits_of_the_authors(golden, where, name):
    told, z, model, given, test = golden
    found = head_directions(model, *given, test=test, control=False)
    with intervene(model, found.edits(where)):
        logits = model.logits([told["prompt_ids"]])[0, -1]
    assert apart(logits, z[name]) < LLAMA
    assert apart(model.logits([told["prompt_ids"]])[0, -1], z["clean"]) < LLAMA


def test_greedy_text_of_the_authors(golden):
    told, _, model, given, test = golden
    found = head_directions(model, *given, test=test, control=False)
    with intervene(model, found.edits("last")):
        written = complete(model, (told["prompt_ids"], 0), 10)
    assert written == told["greedy10_last_token"]


def test_baked_in_bias_is_every_position(golden):
    """As a real bias of the output projections, and as the authors' logits."""
    told, z, model, given, test = golden
    found = head_directions(model, *given, test=test, control=False)
    with intervene(model, found.edits(None)):
        everywhere = model.logits([told["prompt_ids"]])[0, -1]
    assert apart(everywhere, z["logits_all_positions_bias"]) < LLAMA
    bias, copy = found.bias(model), steering_model("llama", "f64")
    for block, vector in zip(copy.blocks, bias, strict=True):
        block.self_attn.o_proj.bias = torch.nn.Parameter(vector)
    baked = copy.logits([told["prompt_ids"]])[0, -1]
    assert apart(baked, z["logits_all_positions_bias"]) < LLAMA


@pytest.mark.parametrize("kind", different(CONFIGS))
def test_bias_in_every_kind_of_family(kind):
    model = model_of(kind)
    ids = torch.randint(1, 97, (12, 6), generator=torch.Generator().manual_seed(0))
    texts = [(row, 0) for row in ids.tolist()]
    heads = [(2, 3), (0, 1), (0, 2)]
    found = head_directions(
        model, texts, [0, 1] * 6, heads=heads, test=0.4, alpha=3.0, control=False
    )
    with intervene(model, found.edits("text")):
        wanted = model.logits(ids[:2])
    bias = found.bias(model)
    projections = [model.part(i, model.family.attn_proj) for i in range(3)]
    handles = [
        p.register_forward_hook(lambda m, args, out, b=b: out + b)
        for p, b in zip(projections, bias, strict=True)
    ]
    got = model.logits(ids[:2])
    for handle in handles:
        handle.remove()
    assert gap(got, wanted) < 1e-9 and gap(wanted, model.logits(ids[:2])) > 1e-3
    assert not bias[1].any()


MODEL = model_of("llama")
DRAW = torch.Generator().manual_seed(1)
ROWS = [torch.randint(1, 97, (4 + i % 5,), generator=DRAW).tolist() for i in range(24)]
TEXTS, LABELS = [(row, 0) for row in ROWS], [1, 0] * 12
GROUPS = [f"q{i // 2}" for i in range(24)]


def _by_hand():
    """z at the last token, text by text, from torch's own hooks."""
    seen = []
    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(
            lambda module, args: seen.append(args[0][0, -1].reshape(4, 8))
        )
        for block in MODEL.blocks
    ]
    for row in ROWS:
        MODEL.hf(torch.tensor([row]))
    for handle in handles:
        handle.remove()
    return torch.stack(seen).detach().reshape(24, 3, 4, 8)


def test_texts_of_unequal_length_are_read_at_their_ends():
    z, heads = _by_hand(), [(1, 2), (0, 3)]
    found = head_directions(MODEL, TEXTS, LABELS, GROUPS, heads=heads, alpha=2.0)
    for i, (layer, head) in enumerate(heads):
        own = z[:, layer, head]
        mean = own[0::2].mean(0) - own[1::2].mean(0)
        theta = mean / mean.norm()
        assert gap(found.directions[i], theta) < 1e-9
        sigma = (own @ theta).std(unbiased=False)
        assert gap(found.displacement[i], 2 * sigma * theta) < 1e-9
    few = head_directions(
        MODEL, TEXTS, LABELS, GROUPS, heads=heads, tuning=TEXTS[:9], control=False
    )
    along = z[:9, 1, 2] @ found.directions[0]
    assert gap(few.sigma[0], along.std(unbiased=False)) < 1e-9


def test_equals_come_later_first_and_random_heads_are_sorted():
    found = head_directions(MODEL, TEXTS, LABELS, GROUPS, k=12)
    keys = [(float(found.accuracy[head]), head) for head in found.heads]
    assert keys == sorted(keys, reverse=True)
    some = [
        head_directions(
            MODEL, TEXTS, LABELS, GROUPS, 5, heads="random", seed=s, control=False
        )
        for s in (0, 0, 1)
    ]
    assert some[0].heads == some[1].heads != some[2].heads
    assert len(set(some[0].heads)) == 5
    random = head_directions(
        MODEL, TEXTS, LABELS, GROUPS, 3, direction="random", control=False
    )
    want = np.random.RandomState(0).randn(3, 4, 8)
    for head, direction in zip(random.heads, random.directions, strict=True):
        assert np.allclose(direction, want[head] / np.linalg.norm(want[head]))


def test_control_finds_nothing_where_the_concept_is_plain():
    """Labels that the last token tells: heads read them, and none reads turned ones."""
    rows = torch.randint(1, 90, (200, 3), generator=DRAW)
    rows[:, -1] = torch.tensor([91, 90] * 100)
    texts, groups = [(row, 0) for row in rows.tolist()], [i // 2 for i in range(200)]
    found = head_directions(MODEL, texts, [1, 0] * 100, groups, k=1, test=0.5)
    assert found.accuracy[0].mean() > 0.85 > 0.65 > found.control[0].mean()
    assert found.items == 50 and found.majority == 0.5


def test_heads_are_kept_and_shown(tmp_path):
    found = head_directions(MODEL, TEXTS, LABELS, GROUPS, k=3)
    again = HeadDirections.load(found.save(tmp_path))
    assert again.heads == found.heads and gap(again.sigma, found.sigma) == 0
    table = again.to_pandas()
    assert table["accuracy"].tolist() == [float(found.accuracy[h]) for h in found.heads]
    assert len(again.plot().collections) == 1
    with pytest.raises(ValueError, match="these heads are of a model with"):
        found.bias(model_of("qwen3"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [1, 0]}, "equally long"),
        ({"labels": [2] * 24}, "a label"),
        ({"labels": [0] * 24}, "all are 0"),
        ({"k": 13}, "k=13 heads are more than the 12"),
        ({"heads": [(0, 4)]}, r"head \(0, 4\) does not exist"),
        ({"heads": [(0, 1), (0, 1)]}, "different ones"),
        ({"heads": []}, "at least one"),
        ({"test": [0, 2]}, "item 'q0' has states in both"),
        ({"test": 0.0}, "holds 0 of 12"),
        ({"texts": TEXTS[:1] * 24, "heads": [(0, 0)]}, "same for both labels"),
        ({"texts": []}, "equally long"),
        ({"alpha": float("nan")}, "alpha"),
    ],
)
def test_heads_refuse(change, message):
    given = {"texts": TEXTS, "labels": LABELS, "groups": GROUPS, "k": 2}
    with pytest.raises((ValueError, IndexError), match=message):
        head_directions(MODEL, **{**given, "control": False, **change})
