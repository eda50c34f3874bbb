"""Habits of heads, counted query by query, and what one head says, by raw weights."""

import pytest
import torch
from families import tiny

from mechtut.circuits.heads import (
    HeadReport,
    HeadScores,
    head_scores,
    inspect_head,
    repeated_sequences,
)
from mechtut.models.hooks import capture
from mechtut.models.loading import load_model

TOKENS = torch.tensor([[5, 6, 7, 5, 6, 9, 7, 5], [8, 8, 4, 3, 4, 8, 1, 2]])
KINDS = ["previous_token", "duplicate_token", "induction"]


def model_of(kind, dtype=torch.float64):
    return load_model(tiny(kind).to(dtype))


def wanted_keys(tokens, query, kind):
    """The keys that count for one query, told in words."""
    keys = []
    for key in range(query):
        copy = tokens[key] == tokens[query]
        behind = key > 0 and tokens[key - 1] == tokens[query]
        if {"previous_token": key == query - 1, "duplicate_token": copy}.get(
            kind, behind
        ):
            keys.append(key)
    return keys


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_scores_are_counted_query_by_query(kind, family):
    model = model_of(family)
    scores = head_scores(model, kind, TOKENS)
    patterns = capture(model, TOKENS, "pattern")["pattern"]
    for row, tokens in enumerate(TOKENS.tolist()):
        paid, even = [], []
        for query in range(len(tokens)):
            keys = wanted_keys(tokens, query, kind)
            if keys:
                paid.append(patterns[:, row, :, query, keys].sum(-1))
                even.append(len(keys) / (query + 1))
        assert torch.allclose(scores.values[row], torch.stack(paid).mean(0))
        assert float(scores.chance[row]) == pytest.approx(sum(even) / len(even))


def test_names_are_looked_at_from_the_last_token():
    model = model_of("llama")
    right, wrong = torch.tensor([6, 4]), torch.tensor([7, 8])
    patterns = capture(model, TOKENS, "pattern")["pattern"][..., -1, :]
    to_right = head_scores(model, "name_mover", TOKENS, right=right).values
    to_wrong = head_scores(model, "s_inhibition", TOKENS, wrong=wrong).values
    assert torch.allclose(to_right[0], patterns[:, 0, :, [1, 4]].sum(-1))
    assert torch.allclose(to_right[1], patterns[:, 1, :, [2, 4]].sum(-1))
    assert torch.allclose(to_wrong[0], patterns[:, 0, :, 6])  # the last 7
    assert torch.allclose(to_wrong[1], patterns[:, 1, :, 5])  # the last 8


def test_padding_counts_for_nothing():
    model, mask = model_of("llama"), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    for kind in KINDS:
        padded = head_scores(model, kind, TOKENS, attention_mask=mask)
        try:
            alone = head_scores(model, kind, TOKENS[:1, 3:])
        except ValueError:
            continue
        assert torch.allclose(padded.values[:1], alone.values, atol=1e-6)
        assert torch.allclose(padded.chance[:1], alone.chance)


def test_sequences_repeat_and_hold_no_special_tokens():
    model = load_model("mini", device="cpu")
    tokens = repeated_sequences(model, n=40, length=30)
    assert torch.equal(tokens[:, 1:31], tokens[:, 31:]) and tokens.shape == (40, 61)
    special = set(model.tokenizer.all_special_ids)
    assert special and not special & set(tokens[:, 1:].flatten().tolist())
    assert set(tokens[:, 0].tolist()) <= special
    assert not torch.equal(tokens, repeated_sequences(model, 40, 30, seed=1))
    with pytest.raises(ValueError, match="reads at most 128"):
        repeated_sequences(model, 1, 5000)


def test_a_head_that_is_built_to_look_back_is_found():
    """The first layer's head 0 is made to look at the token before by its positions."""
    model = model_of("gpt2")
    attn, d = model.blocks[0].attn, model.d_model
    with torch.no_grad():
        wte, wpe = model.hf.transformer.wte.weight, model.hf.transformer.wpe.weight
        wte.zero_()
        wpe.zero_()
        angle = torch.arange(len(wpe)).double() * 0.5
        wpe[:, 0], wpe[:, 1] = angle.cos(), angle.sin()  # where a token is
        attn.c_attn.weight.zero_()
        attn.c_attn.bias.zero_()
        turn = torch.tensor(0.5).double()  # back by one
        rotate = [[turn.cos(), -turn.sin()], [turn.sin(), turn.cos()]]
        attn.c_attn.weight[:2, :2] = 40 * torch.tensor(rotate).double()
        attn.c_attn.weight[0, d] = attn.c_attn.weight[1, d + 1] = 1.0
    tokens = torch.arange(5, 15)[None]
    scores = head_scores(model, "previous_token", tokens)
    assert scores.ranked()[0] == (0, 0)
    assert scores.mean[0, 0] > 0.8 > 0.5 > scores.mean[0, 1]


@pytest.mark.parametrize("where", [(1, 2, -1), (2, 0, 3)])
def test_what_a_head_says_is_the_difference_it_makes_to_the_last_stream(where):
    layer, head, at = where
    model = model_of("gpt2")
    report = inspect_head(model, TOKENS[0], layer, head, read_at=at, n=3)
    acts = capture(model, TOKENS[:1], ["z", "resid_post"])
    weight = model.blocks[layer].attn.c_proj.weight.view(4, -1, model.d_model)
    written = acts["z", layer][0, at, head] @ weight[head]
    stream = acts["resid_post", 2][0, at]

    def unembed(x):
        return model.hf.lm_head(model.hf.transformer.ln_f(x))

    effect = unembed(stream) - unembed(stream - written)
    assert [e for _, e in report.promoted] == pytest.approx(
        effect.topk(3).values.tolist()
    )
    assert [e for _, e in report.demoted] == pytest.approx(
        (-(-effect).topk(3).values).tolist()
    )


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "granite"])
def test_a_norm_behind_attention_is_of_the_other_heads(family):
    """Torch's hook zeroes the head; what attention adds changes by what it wrote."""
    model, layer, head, added = model_of(family), 1, 2, []
    report = inspect_head(model, TOKENS[0], layer, head, read_at=4, n=3)
    block, width = model.blocks[layer], model.d_head

    def without(_, args):
        z = args[0].clone()
        z[..., head * width : (head + 1) * width] = 0
        return (z,)

    norm = getattr(block, "post_attention_layernorm", None)
    place = block.self_attn if family == "granite" else norm
    scale = getattr(model.config, "residual_multiplier", 1.0)
    for hook in (None, without):
        proj = block.self_attn.o_proj
        handles = [proj.register_forward_pre_hook(hook)] if hook else []
        handles.append(
            place.register_forward_hook(
                lambda _, args, out: added.append(
                    (out[0] if isinstance(out, tuple) else out) * scale
                )
            )
        )
        model.logits(TOKENS[:1])
        for handle in handles:
            handle.remove()
    stream = capture(model, TOKENS[:1], "resid_post.2")["resid_post.2"][0, 4]
    wrote = (added[0] - added[1])[0, 4]
    with torch.no_grad():
        effect = model.unembed(stream) - model.unembed(stream - wrote)
    assert [e for _, e in report.promoted] == pytest.approx(
        effect.topk(3).values.tolist()
    )


def test_results_are_kept_and_shown(tmp_path):
    model = load_model("mini", device="cpu")
    report = inspect_head(model, "Riley Martin works as a", 5, 0)
    again = HeadReport.load(report.save(tmp_path / "report"))
    assert again.habits == report.habits and again.promoted == report.promoted
    assert torch.equal(again.pattern, report.pattern)
    page = again._repr_html_()
    assert "Head 5.0" in page and "induction" in page and "raises at 4" in page
    scores = head_scores(model, "induction")
    kept = HeadScores.load(scores.save(tmp_path / "scores"))
    table = kept.to_pandas()
    assert len(table) == 48 and table["mean"].is_monotonic_decreasing
    assert list(zip(table.layer, table["head"], strict=True)) == scores.ranked()
    assert kept.plot().get_xlabel() == "layer" and report.plot().get_ylabel() == "from"
    assert report.to_pandas().attention.between(0, 1).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: head_scores(m, "name_mover", TOKENS), "needs prompts, and right="),
        (lambda m: head_scores(m, "s_inhibition"), "needs prompts, and wrong="),
        (
            lambda m: head_scores(m, "induction", TOKENS[:, 2:4]),
            "prompt 0 has no place",
        ),
        (lambda m: head_scores(m, "lookback", TOKENS), "kind must be one of"),
        (
            lambda m: head_scores(
                m, "name_mover", TOKENS, right=torch.tensor([50, 51])
            ),
            "prompt 0 has no place for 'name_mover'",
        ),
        (
            lambda m: head_scores(m, "induction", TOKENS, attention_mask=TOKENS[:, :3]),
            "attention_mask is",
        ),
        (
            lambda m: head_scores(m, "name_mover", TOKENS, right=torch.tensor([6])),
            "right",
        ),
        (lambda m: inspect_head(m, TOKENS[0], 1, 4), "head must be"),
        (lambda m: inspect_head(m, TOKENS[0], 3, 0), "layer 3 does not exist"),
        (lambda m: inspect_head(m, TOKENS[0], 0, 0, read_at=8), "read_at must be"),
    ],
)
def test_what_cannot_be_asked_is_refused(call, words):
    with pytest.raises((ValueError, IndexError), match=words):
        call(model_of("gpt2"))
