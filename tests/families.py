"""A tiny seeded model of every architecture family."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mechtut.models.families import FAMILIES
from mechtut.models.loading import load_model

_SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GATED = {**_SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
_OWN_HEAD_DIM = {**_GATED, "head_dim": 16}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.2,
    "logits_scaling": 0.7,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CONFIGS = {
    "gpt2": {
        "vocab_size": 97,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
    },
    "gpt_neox": {**_SMALL, "intermediate_size": 48},
    "llama": _GATED,
    "mistral": {**_GATED, "sliding_window": 4},
    "qwen2": _GATED,
    "qwen3": _OWN_HEAD_DIM,
    "gemma2": {**_OWN_HEAD_DIM, "sliding_window": 4},
    "gemma3_text": {**_OWN_HEAD_DIM, "sliding_window": 4},
    "olmo2": _GATED,
    "olmo3": {
        **_GATED,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma": _OWN_HEAD_DIM,
    "stablelm": _GATED,
    "phi3": _GATED,
    "smollm3": {**_GATED, "no_rope_layers": [1, 0, 1]},
    "olmo": _GATED,
    "arcee": _GATED,
    "seed_oss": _OWN_HEAD_DIM,
    "starcoder2": {**_GATED, "sliding_window": 4},
    "mixtral": {**_GATED, "num_local_experts": 4},
    "qwen3_moe": {**_OWN_HEAD_DIM, **_EXPERTS},
    "olmoe": {**_GATED, **_EXPERTS},
    "gpt_oss": {
        **_OWN_HEAD_DIM,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
    },
    "granite": {**_GATED, **_GRANITE},
    "granitemoe": {
        **_GATED,
        **_GRANITE,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "cohere": {**_GATED, "logit_scale": 0.3, "use_qk_norm": True},
    "cohere2": {
        **_GATED,
        "logit_scale": 0.3,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "opt": {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {**_SMALL, "intermediate_size": 48},
    "gptj": {
        "vocab_size": 97,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "rotary_dim": 4,
    },
    "gpt_neo": {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 4,
    },
    "falcon": _SMALL,
    "bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "mpt": {
        "vocab_size": 97,
        "d_model": 32,
        "n_layers": 3,
        "n_heads": 4,
        "max_seq_len": 64,
    },
}
# mixtures, without a list of neurons
EXPERTS = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe")
WITH_NEURONS = sorted(k for k in CONFIGS if k not in EXPERTS)
# their attention is not in transformers' registry
# their configuration scales the stream, or what the unembedding gives
SCALED = ("granite", "granitemoe", "cohere", "cohere2")
NO_REGISTRY = ("gptj", "gpt_neo", "falcon", "bloom", "mpt")
IN_CIRCUITS = [k for k in CONFIGS if k not in (*NO_REGISTRY, "phi3")]
POST_NORM = [k for k in CONFIGS if FAMILIES[k].post_norm]


def different(kinds):
    """One family for each way in which rows differ other than by the modules' names.

    `models/test_families.py` runs every site on every family. What is made of sites
    knows a family by its row only; there, two families with one set of these answers
    take the same path. A row that answers anew is a family more, without a change here.
    """
    seen = dict[tuple, str]()
    for kind in kinds:
        row = FAMILIES[kind]
        parts = (row.attn_proj, row.mlp_proj, row.positions, row.embed_norm)
        norms = (row.norm_attn, row.norm_mlp, row.norm_attn == row.norm_mlp)
        answers = [row.attention_interface, row.parallel, row.post_norm]
        answers += [row.first_position, row.adds_in_place, kind in SCALED]
        answers += [row.attn_out == row.attn, row.mlp_out == row.mlp_proj]
        answers += [x is None or x is True for x in (*parts, *norms)]
        seen.setdefault(tuple(answers), kind)
    return list(seen.values())


SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def tiny(kind: str, dtype: torch.dtype = torch.float32, **changes):
    """A Hugging Face model of the family with random weights, larger than usual so that
    every part matters; norms and biases differ from place to place.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**CONFIGS[kind], **SPECIAL, **changes})
    if kind in EXPERTS:
        config._experts_implementation = "eager"  # the grouped product knows no float64
    hf = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return hf


def model_of(kind: str, **changes):
    """The same in float64, loaded."""
    return load_model(tiny(kind, **changes).double())


def gap(a, b) -> float:
    """The largest difference of two tensors."""
    return float((torch.as_tensor(a) - torch.as_tensor(b)).detach().abs().max())


def stream_of(output):
    """The residual stream that a block gives, as torch's own hooks see it."""
    return output[0] if isinstance(output, tuple) else output
