"""The small models behind tests/golden: rebuilt from a seed where they are random, read
where they were trained.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from mechtut.models.loading import Model, load_model

GOLDEN = Path(__file__).parent / "golden"


def rome_model(name: str, dtype: torch.dtype) -> Model:
    """`tiny_rand` or `tiny_facts`: GPT-2, 4 layers x 64, on which the authors' ROME
    code was run.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN / "rome" / "tokenizer.json"),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    hf = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=512,
            n_positions=64,
            n_embd=64,
            n_layer=4,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    stored = (
        {}
        if name == "tiny_rand"
        else load_file(GOLDEN / "rome" / f"{name}.safetensors")
    )
    hf.load_state_dict(stored or _seeded(hf), strict=False)
    hf.tie_weights()
    return load_model(hf.eval(), tokenizer, dtype=dtype)


def _seeded(hf: GPT2LMHeadModel) -> dict[str, torch.Tensor]:
    """tiny_rand: numpy's legacy generator, seed 1234, parameters by name; norms are
    scattered around 1.
    """
    random, weights = np.random.RandomState(1234), {}
    for name, parameter in sorted(
        hf.transformer.named_parameters(prefix="transformer")
    ):
        norm = ".ln_" in name and name.endswith("weight")
        scale = (
            0.6
            if "wte" in name
            else (
                0.3 if "wpe" in name else 0.1 if name.endswith("bias") or norm else 0.25
            )
        )
        weights[name] = torch.tensor(
            norm + scale * random.randn(*parameter.shape), dtype=torch.float32
        )
    return weights


def read_json(name: str):
    """A JSON file below tests/golden."""
    return json.loads((GOLDEN / name).read_text())
