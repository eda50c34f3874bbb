"""Every family: hooks are invisible, values can be written back, the engine equals the
loop, TransformerLens agrees.
"""

import pytest
import torch
from families import CONFIGS, EXPERTS, NO_REGISTRY, tiny

from mechtut.models.families import FAMILIES
from mechtut.models.hooks import ATTENTION_SITES, SITES, Edit, capture, intervene
from mechtut.models.loading import embedding_std, load_model, mask_arguments
from mechtut.patching.replay import Replay, naive_replay

KINDS = sorted(CONFIGS)
TOKENS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))


def sites_of(model):
    """The sites that a family has."""
    lacks = () if model.family.attention_interface else ATTENTION_SITES
    lacks = lacks if model.family.mlp_proj else (*lacks, "mlp_act")  # experts
    return [s for s in SITES if s not in lacks]


def test_every_family_has_a_test():
    assert set(FAMILIES) == set(CONFIGS)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_that_change_nothing_change_no_bit(kind):
    model = load_model(tiny(kind))
    plain = model.hf(TOKENS, use_cache=False).logits
    sites = [
        s for s in sites_of(model) if s != "pattern"
    ]  # asking for the pattern switches to eager attention
    assert torch.equal(capture(model, TOKENS, sites).logits, plain)
    assert torch.equal(model.hf(TOKENS, use_cache=False).logits, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind):
    model = load_model(tiny(kind))
    acts = capture(model, TOKENS, sites_of(model))
    heads, kv, d_head = model.n_heads, model.n_kv_heads, model.d_head
    d_mlp = acts["mlp_act"].shape[-1] if model.family.mlp_proj else 48
    wanted = dict.fromkeys(
        ("resid_pre", "resid_post", "attn_out", "mlp_out"), (3, 2, 9, 32)
    )
    wanted |= {
        "embed": (2, 9, 32),
        "mlp_act": (3, 2, 9, d_mlp),
        "z": (3, 2, 9, heads, d_head),
    }
    wanted |= {
        "q": (3, 2, 9, heads, d_head),
        "k": (3, 2, 9, kv, d_head),
        "v": (3, 2, 9, kv, d_head),
    }
    wanted |= {"pattern": (3, 2, heads, 9, 9)}
    assert d_mlp > 32
    for site in sites_of(model):
        assert tuple(acts[site].shape) == wanted[site], site


@pytest.mark.parametrize("kind", KINDS)
def test_own_value_written_back_changes_nothing(kind):
    model = load_model(tiny(kind))
    plain = model.logits(TOKENS)
    for site in sites_of(model):
        if site in ("embed", "pattern"):
            continue
        value = capture(model, TOKENS, f"{site}.1")[f"{site}.1"]
        with intervene(model, [Edit(site, 1, value)]):
            again = model.logits(TOKENS)
        if model.family.residual_scale == 1:
            assert torch.equal(again, plain), site
        else:  # divided by the scale and multiplied with it again
            assert torch.allclose(again, plain, atol=1e-5), site


@pytest.mark.parametrize("kind", KINDS)
def test_every_edit_does_something_to_every_row(kind):
    """The old `output[0]` idiom edits batch row 0 only; an edit must reach all rows,
    and undo itself.
    """
    model = load_model(tiny(kind))
    plain = model.logits(TOKENS)
    for site in sites_of(model):
        edit = Edit(site, None if site == "embed" else 1, 0.0)
        with intervene(model, [edit]):
            changed = (model.logits(TOKENS) - plain).abs().amax(dim=(1, 2))
        assert (changed > 1e-4).all(), site
        assert torch.equal(model.logits(TOKENS), plain), site


@pytest.mark.parametrize("kind", KINDS)
def test_contributions_add_up(kind):
    """attn_out and mlp_out are what enters the residual stream, whatever norms come
    before or after.
    """
    model = load_model(tiny(kind, torch.float64))
    acts = capture(model, TOKENS, ["resid_pre", "attn_out", "mlp_out", "resid_post"])
    total = acts["resid_pre"] + acts["attn_out"] + acts["mlp_out"]
    assert torch.allclose(total, acts["resid_post"], atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_unembed(kind):
    model = load_model(tiny(kind))
    last = capture(model, TOKENS, "resid_post.2")
    assert torch.equal(model.unembed(last["resid_post.2"]), last.logits)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_embeddings_in_place_of_tokens(kind):
    model = load_model(tiny(kind))
    ids = torch.tensor([[5, 17, 3, 44]])
    given = model.embed(ids).detach()
    same = model.logits(embeds=given)
    assert torch.allclose(same, model.logits(ids), atol=1e-6)
    given[:, 1] = 0.5
    zeroed = model.hf(inputs_embeds=given).logits
    assert torch.allclose(model.logits(embeds=given), zeroed, atol=1e-6)
    assert not torch.allclose(zeroed, same, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_pattern_rows_sum_to_one_and_can_be_written(kind):
    model = load_model(tiny(kind))
    if not model.family.attention_interface:
        with pytest.raises(NotImplementedError, match="AttentionInterface"):
            capture(model, TOKENS, "pattern.0")
        return
    acts = capture(model, TOKENS, ["pattern.1", "v.1", "z.1"])
    totals = acts["pattern.1"].sum(-1)
    if kind == "gpt_oss":  # the rest goes to each head's sink
        assert (totals < 1 - 1e-4).all() and (totals > 0).all()
    else:
        assert torch.allclose(totals, torch.ones(()), atol=1e-5)
    with intervene(model, [Edit("pattern", 1, acts["pattern.1"])]):
        again = capture(model, TOKENS, "z.1")["z.1"]
    assert torch.allclose(again, acts["z.1"], atol=1e-5)
    first = torch.zeros(9)
    first[0] = 1
    with intervene(
        model, [Edit("pattern", 1, first, pos=5, head=2)]
    ):  # look at token 0 only
        z = capture(model, TOKENS, "z.1")["z.1"]
    kv_head = 2 * model.n_kv_heads // model.n_heads
    assert torch.allclose(z[:, 5, 2], acts["v.1"][:, 0, kv_head], atol=1e-5)
    assert torch.allclose(z[:, 4], acts["z.1"][:, 4], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)]
)
def test_engine_equals_loop(kind, dtype, tolerance):
    model = load_model(tiny(kind, dtype))
    if kind in NO_REGISTRY:
        with pytest.raises(NotImplementedError, match="AttentionInterface"):
            Replay(model, TOKENS)
        return
    values = torch.randn(4, 32, dtype=dtype, generator=torch.Generator().manual_seed(1))
    grid = [
        (s, layer, pos)
        for s in ("resid_pre", "resid_post", "attn_out", "mlp_out")
        for layer in range(3)
        for pos in (0, 4, 8)
    ]
    interventions = [
        [Edit(s, layer, values[pos % 4], pos=pos)] for s, layer, pos in grid
    ]
    interventions += [
        [Edit(s, layer, 0.0, pos=[2, 5], head=1)]
        for s in ("q", "k", "v", "z")
        for layer in range(3)
    ]
    if model.family.mlp_proj:
        interventions += [[Edit("mlp_act", layer, 0.0, pos=6)] for layer in range(3)]
    fast = Replay(model, TOKENS).run(interventions)[:, :, 0]
    slow = naive_replay(model, TOKENS, interventions)
    # RMS norms compute in float32 also in a float64 model: whether sums of other sizes
    # round alike depends on the processor
    in_float32 = any(word in repr(model.hf).lower() for word in ("rms", "cohere"))
    tolerance = max(tolerance, 1e-6) if in_float32 else tolerance
    assert (fast - slow).abs().max() <= tolerance * max(1.0, float(slow.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding(kind):
    """A left-padded row gives what the unpadded prompt gives, in a plain forward and in
    the engine.
    """
    # The attention of these overflows to NaN on a fully masked row in float64 (in
    # float32 it does not).
    overflows = kind in ("gemma2", "bloom", "mpt")
    dtype, tolerance = (torch.float32, 1e-4) if overflows else (torch.float64, 1e-6)
    if kind == "gpt_neo":  # it takes its scores in float32
        tolerance = 5e-6
    model = load_model(tiny(kind, dtype))
    short = TOKENS[:1, :5]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1)
    mask = (torch.arange(9) >= 4).long()[None]
    alone = model.logits(short)[:, -1]
    assert torch.allclose(model.logits(padded, mask)[:, -1], alone, atol=tolerance)
    if kind in NO_REGISTRY:
        return
    edits = [[Edit("mlp_out", 1, 0.0, pos=-2)], [Edit("resid_post", 0, 1.0, pos=-3)]]
    replayed = Replay(model, padded, attention_mask=mask).run(edits)[:, :, 0]
    assert torch.allclose(replayed, naive_replay(model, short, edits), atol=tolerance)
    assert mask_arguments(mask)["position_ids"][0, 4:].tolist() == [0, 1, 2, 3, 4]


BRIDGED = [
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "opt",
    "phi",
]


@pytest.mark.parametrize("kind", BRIDGED)
def test_transformer_lens_agrees(kind):
    """The same weights in a TransformerBridge: same logits, and `load_model(bridge)`
    gives them back unwired.
    """
    bridge_module = pytest.importorskip("transformer_lens.model_bridge")
    from golden_models import GOLDEN
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN / "rome" / "tokenizer.json"),
        eos_token="<|endoftext|>",
    )
    plain, wired = load_model(tiny(kind)).logits(TOKENS), tiny(kind)
    wired.config.architectures = [type(wired).__name__]  # what a model from the hub has
    bridge = bridge_module.TransformerBridge.boot_transformers(
        "gpt2", hf_model=wired, tokenizer=tokenizer, dtype=torch.float32
    )
    with torch.no_grad():
        assert torch.allclose(bridge(TOKENS), plain, atol=1e-5)
    ours = load_model(bridge)
    assert torch.allclose(ours.logits(TOKENS), plain, atol=1e-5)
    assert not any("Bridge" in type(m).__name__ for m in ours.hf.modules())


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_have_no_list_of_neurons(kind):
    with pytest.raises(ValueError, match=rf"{kind} has no site 'mlp_act'.*mixture"):
        capture(load_model(tiny(kind)), TOKENS, "mlp_act.1")


@pytest.mark.parametrize("kind", KINDS)
def test_the_spread_of_embeddings_is_that_of_the_site(kind):
    """Noise is measured in it: a scale inside the embedding (Gemma) has to count."""
    model = load_model(tiny(kind))
    everything = torch.arange(97)[None, :64]  # as many as the shortest context
    carried = capture(model, everything, "embed")["embed"]
    with torch.no_grad():
        whole = model.embed(torch.arange(97)) * model.family.embed_scale
    assert torch.equal(carried[0], whole[:64])
    assert embedding_std(model) == pytest.approx(float(whole.double().std()))


@pytest.mark.parametrize(
    "changes, kv_heads",
    [
        ({}, 1),  # Falcon 7B: one key/value head, parallel
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2),  # Falcon 40B
        (
            {
                "new_decoder_architecture": True,
                "num_kv_heads": 2,
                "num_ln_in_parallel_attn": 1,
            },
            2,
        ),  # Falcon 11B
        ({"parallel_attn": False, "multi_query": False, "alibi": True}, 4),  # RW 1B
    ],
)
def test_every_falcon(changes, kv_heads):
    """Its blocks add attention to the MLP's output in place, which must not reach what
    was captured there before.
    """
    model = load_model(tiny("falcon", torch.float64, **changes))
    assert model.n_kv_heads == kv_heads
    acts = capture(model, TOKENS, ["resid_pre", "attn_out", "mlp_out", "resid_post"])
    total = acts["resid_pre"] + acts["attn_out"] + acts["mlp_out"]
    assert torch.allclose(total, acts["resid_post"], atol=1e-12)
    family, layer = model.family, 1
    entering = acts["resid_pre", layer]
    if not family.parallel:
        entering = entering + acts["attn_out", layer]
    with torch.no_grad():
        read = model.part(layer, family.norm_mlp)(entering)
        wrote = model.part(layer, "mlp")(read)
    assert torch.allclose(wrote, acts["mlp_out", layer], atol=1e-12)
    new = torch.randn(32, dtype=torch.float64)
    edits = [Edit("mlp_out", layer, new, pos=3)]
    after = capture(model, TOKENS, f"resid_post.{layer}", edits=edits)
    wanted = acts["resid_post", layer].clone()
    wanted[:, 3] += new - acts["mlp_out", layer][:, 3]
    assert torch.allclose(after["resid_post", layer], wanted, atol=1e-12)


@pytest.mark.parametrize("kind", ["granite", "granitemoe"])
@pytest.mark.parametrize("site", ["attn_out", "mlp_out"])
def test_an_edit_of_a_scaled_site_is_what_the_stream_gets(kind, site):
    model = load_model(tiny(kind, torch.float64))
    new = torch.randn(32, dtype=torch.float64)
    acts = capture(model, TOKENS, ["resid_pre", "attn_out"])
    edit = Edit(site, 1, new, pos=4)
    after = capture(
        model, TOKENS, ["attn_out.1", "mlp_out.1", "resid_post.1"], edits=[edit]
    )
    assert torch.allclose(after[f"{site}.1"][:, 4], new.expand(2, -1), atol=1e-12)
    total = acts["resid_pre", 1] + after["attn_out.1"] + after["mlp_out.1"]
    assert torch.allclose(after["resid_post.1"], total, atol=1e-6)


def test_granites_embedding_is_what_enters_the_stream():
    model = load_model(tiny("granite", torch.float64))
    acts = capture(model, TOKENS, ["embed", "resid_pre.0"])
    assert torch.allclose(acts["embed"], acts["resid_pre.0"], atol=1e-12)
    edit = Edit("embed", None, 2.0, pos=3)
    acts = capture(model, TOKENS, "resid_pre.0", edits=[edit])
    assert torch.allclose(acts["resid_pre.0"][:, 3], torch.full((), 2.0).double())
