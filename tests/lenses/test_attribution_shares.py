"""Direct logit attribution against plain hooks with norms written out, reference
numbers of independent code, and TransformerLens.
"""

import copy

import numpy as np
import pytest
import torch
from families import CONFIGS, EXPERTS, POST_NORM, WITH_NEURONS, gap, model_of, tiny
from golden_models import GOLDEN
from transformers import AutoModelForCausalLM

from mechtut.lenses.attribution import LogitAttribution, logit_attribution
from mechtut.models.families import as_stored
from mechtut.models.hooks import Edit, intervene
from mechtut.models.loading import load_model
from mechtut.patching.places import SoftPrompt

FOLDER = GOLDEN / "patchscopes"
# Llama's norms and rotary tables are float32 also in a float64 model
GOLDENS = {"gpt2t": 1e-9, "llamat": 1e-6, "neoxt": 1e-9}
DRAW = torch.Generator().manual_seed(0)
IDS = [torch.randint(5, 90, (n,), generator=DRAW).tolist() for n in (6, 4, 6)]
RIGHT, WRONG = [7, 8, 9], [17, 18, 19]


@pytest.mark.parametrize("name", GOLDENS)
def test_reference_numbers(name):
    hf = AutoModelForCausalLM.from_pretrained(
        FOLDER / name, attn_implementation="eager"
    )
    model, z = load_model(hf.double()), np.load(FOLDER / f"dla.{name}.f64.npz")
    wanted = {k: torch.from_numpy(z[k]) for k in z if z[k].dtype == np.float64}
    ids, every = z["input_ids"].tolist(), torch.arange(199)
    found = logit_attribution(model, [ids] * 199, every)
    for ours, theirs in {
        "components": wanted["contribution"].T,
        "heads": wanted["head_contribution"].permute(2, 0, 1),
        "attention_bias": wanted["attn_bias_contribution"].T,
        "constant": wanted["constant"],
        "logit": wanted["logits"],
    }.items():
        assert gap(getattr(found, ours), theirs) <= GOLDENS[name], ours
    names = [
        n.replace("attn_out", "attn").replace("mlp_out", "mlp") for n in found.names
    ]
    assert names == z["components"].tolist()


class ByHooks:
    """What torch's own hooks see at the last position of one prompt."""

    def __init__(self, model, ids):
        family, self.model, self.seen = model.family, model, {}
        hooks = [
            model.blocks[0].register_forward_pre_hook(self.first, with_kwargs=True)
        ]
        for layer in range(model.n_layers):
            for site, path in (("attn", family.attn_out), ("mlp", family.mlp_out)):
                hook = model.part(layer, path).register_forward_hook
                hooks.append(hook(self.keep((site, layer))))
            paths = [("z", family.attn_proj), ("act", family.mlp_proj)]
            for site, path in [p for p in paths if p[1]]:
                hook = model.part(layer, path).register_forward_hook
                hooks.append(hook(self.keep((site, layer), before=True)))
                hooks.append(hook(self.keep((site + "_out", layer))))
        norm = model.hf.get_submodule(family.norm)
        hooks.append(norm.register_forward_hook(self.keep("last", before=True)))
        with torch.no_grad():
            tokens = torch.tensor([ids])
            self.logits = model.hf(tokens, use_cache=False).logits[0, -1]
        for hook in hooks:
            hook.remove()

    def first(self, _block, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        self.seen["embed"] = x[0, -1].clone()

    def keep(self, name, before=False):
        def hook(_module, args, output):
            x = args[0] if before else output
            x = x[0] if isinstance(x, tuple) else x
            self.seen[name] = x.reshape(-1, x.shape[-1])[-1].clone()

        return hook


def written_out(norm, x):
    """Norm of x with its scale held: a linear map, and the bias."""
    name = type(norm).__name__
    gain = getattr(norm, "weight", None)
    gain = torch.ones_like(x) if gain is None else gain
    gain = 1 + gain if name.startswith("Gemma") else gain
    centres = "LayerNorm" in name
    # OLMo's norm has its epsilon in its code
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", 1e-5))

    def centred(v):
        return v - v.mean(-1, keepdim=True) if centres else v

    scale = (centred(x).square().mean() + eps).sqrt()
    bias = getattr(norm, "bias", None)
    bias = torch.zeros_like(x) if bias is None else bias
    return (lambda v: centred(v) / scale * gain), bias


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_every_family_as_plain_hooks_and_written_norms(kind):
    model, ids = model_of(kind), IDS[0]
    family, run = model.family, ByHooks(model, ids)
    seen, scale = run.seen, family.residual_scale
    head = model.hf.get_submodule(family.unembed)
    factor = {"granite": 1 / 0.7, "granitemoe": 1 / 0.7, "cohere": 0.3, "cohere2": 0.3}
    direction = (head.weight[7] - head.weight[17]) * factor.get(kind, 1)
    linear, bias = written_out(model.hf.get_submodule(family.norm), seen["last"])

    def share(v):
        return linear(v) @ direction

    layers = [2] if kind in WITH_NEURONS else []
    found = logit_attribution(model, [ids], 7, 17, neurons=layers)
    components = [share(seen["embed"])]
    for i in range(model.n_layers):
        components += [share(seen[site, i] * scale) for site in ("attn", "mlp")]
    tolerance = 1e-9 if kind in ("gpt2", "gpt_neox", "gptj") else 1e-5
    assert gap(found.components[0], torch.stack(components)) < tolerance
    for i in range(model.n_layers):
        inside, own = (lambda v: v), torch.zeros_like(seen["last"])
        if family.post_norm:
            norm = model.part(i, family.attn_out)
            inside, own = written_out(norm, seen["z_out", i])
        proj = model.part(i, family.attn_proj)
        for h in range(model.n_heads):
            z = seen["z", i].reshape(model.n_heads, -1)
            rest = z.clone()
            rest[h] = 0
            alone = proj(z.flatten()) - proj(rest.flatten())
            wanted = share(inside(alone) * scale)
            assert gap(found.heads[0, i, h], wanted) < tolerance
        rest = share((inside(proj(torch.zeros_like(z.flatten()))) + own) * scale)
        assert gap(found.attention_bias[0, i], rest) < tolerance
    for i in layers:
        inside, proj = (lambda v: v), model.part(i, family.mlp_proj)
        if family.post_norm:
            inside, _ = written_out(model.part(i, family.mlp_out), seen["act_out", i])
        for n in (0, 5):
            rows = as_stored(proj, proj.weight)[n]
            wanted = share(inside(seen["act", i][n] * rows) * scale)
            assert gap(found.neurons[0, 0, n], wanted) < tolerance
    constant = bias @ direction
    if getattr(head, "bias", None) is not None:
        constant = constant + (head.bias[7] - head.bias[17]) * factor.get(kind, 1)
    assert gap(found.constant[0], constant) < tolerance
    logits, cap = run.logits, found.soft_cap
    assert (cap is not None) == (kind == "gemma2")
    logits = cap * torch.atanh(logits / cap) if cap else logits
    assert gap(found.logit[0], logits[7] - logits[17]) < tolerance
    assert gap(found.components.sum(1) + found.constant, found.logit) < tolerance


def test_some_families_have_what_is_special():
    assert {"gemma2", "olmo2"} <= set(POST_NORM)
    assert model_of("gptj").hf.lm_head.bias.abs().max() > 0


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transformer_lens_agrees(kind):
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    hf = tiny(kind)
    if kind == "gpt2":  # they count what biases make of values as no head's
        with torch.no_grad():
            for block in hf.transformer.h:
                block.attn.c_attn.bias[64:] = 0
                block.ln_1.bias.zero_()
    ours = copy.deepcopy(hf)
    hf.config.architectures = [type(hf).__name__]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN / "rome" / "tokenizer.json"),
        eos_token="<|endoftext|>",
    )
    bridge = TransformerBridge.boot_transformers(
        "gpt2", hf_model=hf, tokenizer=tokenizer, dtype=torch.float32
    )
    bridge.enable_compatibility_mode(disable_warnings=True)  # folds gains and biases
    tokens = torch.tensor([IDS[0], IDS[2]])
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
        stack = cache.decompose_resid(pos_slice=-1)
        how = {"pos_slice": -1, "incorrect_tokens": torch.tensor([17, 18])}
        theirs = cache.logit_attrs(stack, torch.tensor([7, 8]), **how)
        heads = cache.stack_head_results(pos_slice=-1)
        heads = cache.logit_attrs(heads, torch.tensor([7, 8]), **how)
    found = logit_attribution(load_model(ours), tokens, [7, 8], [17, 18])
    ours = found.components.T.float()
    if kind == "gpt2":  # positions are a component of their own there
        theirs = torch.cat([theirs[:1] + theirs[1:2], theirs[2:]])
    assert theirs.shape == ours.shape
    assert torch.allclose(theirs, ours, atol=1e-4)
    wanted = found.heads.permute(1, 2, 0).flatten(0, 1).float()
    assert torch.allclose(heads, wanted, atol=1e-4)


def test_prompts_of_unequal_length_and_padding():
    model = model_of("gpt2")
    together = logit_attribution(model, IDS, RIGHT, WRONG, neurons=[1])
    for i, ids in enumerate(IDS):
        alone = logit_attribution(model, [ids], RIGHT[i], WRONG[i], neurons=[1])
        for kind in ("component", "head", "attention_bias", "constant", "neuron"):
            assert gap(alone.values(kind)[0], together.values(kind)[i]) < 1e-9
    padded = torch.tensor([ids + [0] * (6 - len(ids)) for ids in IDS])
    mask = torch.tensor([[1] * len(ids) + [0] * (6 - len(ids)) for ids in IDS])
    masked = logit_attribution(model, padded, RIGHT, WRONG, mask=mask)
    assert gap(masked.components, together.components) < 1e-9
    early = logit_attribution(model, IDS[0], 7, 17, pos=3)
    cut = logit_attribution(model, IDS[0][:4], 7, 17)
    assert gap(early.components, cut.components) < 1e-9


@pytest.mark.parametrize("kind", ["gpt2", "granite", "gemma2"])
def test_a_prompt_of_vectors(kind):
    model = model_of(kind)
    soft = SoftPrompt(torch.randn(5, 32, generator=DRAW).double())
    found = logit_attribution(model, soft, 7, 17)
    logits = model.logits(embeds=soft.vectors[None])[0, -1]
    if cap := found.soft_cap:
        logits = cap * torch.atanh(logits / cap)
    assert gap(found.logit, logits[7] - logits[17]) < 1e-5
    tokens = SoftPrompt(model.embed(torch.tensor(IDS[0])).detach())
    same, plain = (logit_attribution(model, x, 7, 17) for x in (tokens, [IDS[0]]))
    assert gap(same.heads, plain.heads) < 1e-9


def test_rows_of_tokens_are_means():
    model = model_of("gptj")
    row = logit_attribution(model, [IDS[0]], [[7, 8]], [[17]])
    single = [logit_attribution(model, [IDS[0]], t, 17).components for t in (7, 8)]
    assert gap(row.components, sum(single) / 2) < 1e-9
    logits = model.logits(IDS[0])[0, -1]
    assert gap(row.logit, logits[[7, 8]].mean() - logits[17]) < 1e-9


def test_mean_interval_and_table(tmp_path):
    model = model_of("llama")
    found = logit_attribution(model, IDS, RIGHT, WRONG, neurons=[0, 2])
    heads = found.heads
    assert gap(found.mean("head"), heads.mean(0)) < 1e-12
    wanted = 4.303 * heads.std(0) / 3**0.5  # Student's quantile of 2 degrees
    assert gap(found.half_width("head") / wanted, torch.tensor(1.0)) < 1e-3
    table = found.to_pandas().set_index(["kind", "part"])
    assert len(table) == 7 + 12 + 3 + 1 + 2 * 48
    row = table.loc["head", "1.2"]
    assert row["mean"] == pytest.approx(float(heads[:, 1, 2].mean()))
    assert (row["layer"], row["n"]) == (1, 3)
    assert table.loc["neuron", "2.5"]["mean"] == pytest.approx(
        float(found.neurons[:, 1, 5].mean())
    )
    again = LogitAttribution.load(found.save(tmp_path / "found"))
    assert torch.equal(again.components, found.components)
    assert again.names == found.names and again.neuron_layers == (0, 2)
    bars, heat = found.plot(), found.plot("head")
    assert len(bars.patches) == 8 and heat.images[0].get_array().shape == (4, 3)
    with pytest.raises(ValueError, match="has no plot: take to_pandas"):
        found.plot("neuron")
    assert logit_attribution(model, IDS[:1], 7).half_width("constant").isnan()
    assert logit_attribution(model, IDS[:1], 7).plot()


def test_text_targets():
    model = load_model("mini")
    prompts = ["Riley Martin works as a", "Everyone knows that Martin Riley works as a"]
    words = [[" singer", " pilot"], " doctor"]
    found = logit_attribution(model, prompts, *words)
    ids = [model.continuation("a", t)[0] for t in (" singer", " pilot", " doctor")]
    logits = [model.logits(p)[0, -1] for p in prompts]
    wanted = [x[i] - x[ids[2]] for x, i in zip(logits, ids[:2], strict=True)]
    assert gap(found.logit, torch.stack(wanted).double()) < 1e-4
    total = found.components.sum(1) + found.constant
    assert gap(total, found.logit) < 1e-4
    assert (
        gap(found.heads.sum(2) + found.attention_bias, found.components[:, 1::2]) < 1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_up(dtype):
    model = load_model("mini", dtype=dtype, device="cpu")
    found = logit_attribution(model, "Riley Martin works as a", " singer", " pilot")
    assert gap(found.components.sum(1) + found.constant, found.logit) < 0.5
    exact = logit_attribution(
        load_model("mini"), "Riley Martin works as a", " singer", " pilot"
    )
    assert gap(found.components, exact.components) < 0.5
    assert exact.components.max() > 4


def test_what_is_refused():
    model = model_of("gpt2")
    for error, message, given, more in (
        (ValueError, "target and against are the same for prompt 0", (7, 7), {}),
        (ValueError, "names 2 tokens for 3 prompts: give one for all", ([7, 8],), {}),
        (
            ValueError,
            "a token id of target must be at least 0 and at most 96",
            (97,),
            {},
        ),
        (TypeError, "the prompts are not: give target as a token id", (" a",), {}),
        (ValueError, "must be a token, a token for each prompt", (torch.ones(3),), {}),
        (ValueError, "must be a token, a token for each prompt", ([],), {}),
        (IndexError, "position 5 is outside the prompt", (7,), {"pos": 5}),
        (IndexError, "layer 3 does not exist", (7,), {"neurons": [3]}),
    ):
        with pytest.raises(error, match=message):
            logit_attribution(model, IDS, *given, **more)
    with pytest.raises(ValueError, match="mixture of experts"):
        logit_attribution(model_of(EXPERTS[0]), IDS, 7, neurons=[0])
    stream = Edit("resid_post", 1, torch.ones(32), pos=-1)
    with (
        intervene(model, [stream]),
        pytest.raises(ValueError, match="leave `intervene` blocks"),
    ):
        logit_attribution(model, IDS, 7)


def test_an_ablated_head_has_no_share():
    """Edits of what a part writes are seen, and still add up."""
    model = model_of("gemma2")
    with intervene(model, [Edit("z", 1, 0.0, head=2)]):
        found = logit_attribution(model, IDS, RIGHT, WRONG)
    assert found.heads[:, 1, 2].abs().max() == 0 < found.heads[:, 1, 1].abs().min()


def test_a_norm_of_another_kind_is_refused():
    class Cube(torch.nn.Module):
        def forward(self, x):
            return x**3 + 1

    hf = tiny("llama").double()
    hf.model.norm = Cube()
    with pytest.raises(NotImplementedError, match="neither a LayerNorm nor an RMSNorm"):
        logit_attribution(load_model(hf), IDS, 7)
