"""A tiny seeded model of every architecture family."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GATED = {**_SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
_OWN_HEAD_DIM = {**_GATED, "head_dim": 16}
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
    "gemma": _OWN_HEAD_DIM,
    "stablelm": _GATED,
    "phi3": _GATED,
    "smollm3": _GATED,
    "olmo": _GATED,
    "arcee": _GATED,
    "seed_oss": _OWN_HEAD_DIM,
    "starcoder2": {**_GATED, "sliding_window": 4},
    "mixtral": {**_GATED, "num_local_experts": 4},
    "qwen3_moe": {**_OWN_HEAD_DIM, **_EXPERTS},
    "olmoe": {**_GATED, **_EXPERTS},
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
}
EXPERTS = ("mixtral", "qwen3_moe", "olmoe")  # mixtures, without a list of neurons
WITH_NEURONS = sorted(k for k in CONFIGS if k not in EXPERTS)
IN_CIRCUITS = [k for k in CONFIGS if k not in ("gptj", "phi3")]
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def tiny(kind: str, dtype: torch.dtype = torch.float32, **changes):
    """A Hugging Face model of the family with random weights, larger than usual so that
    every part matters.
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
    return hf
