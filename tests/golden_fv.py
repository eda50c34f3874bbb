"""The small model on which the authors' function-vector code was run, rebuilt from its
seed, and their numbers.
"""

import json

import numpy as np
import torch
from golden_models import GOLDEN
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from mechtut.models.loading import Model, load_model
from mechtut.prompts.few_shot import load_task

FOLDER = GOLDEN / "fv"
TEXT = json.loads((FOLDER / "toy-antonym.json").read_text(encoding="utf-8"))
ARRAYS = np.load(FOLDER / "toy-antonym.npz")
TASK = load_task(FOLDER / "task.json")
SEED = 42


def fv_model(dtype: torch.dtype = torch.float32) -> Model:
    """GPT-2, 6 layers x 128, 4 heads, 1200 tokens, seeded random weights."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(FOLDER / "tokenizer.json"),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
    )
    config = GPT2Config(
        vocab_size=1200,
        n_positions=512,
        n_embd=128,
        n_layer=6,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    hf = GPT2LMHeadModel(config)
    hf.load_state_dict(_seeded(hf), strict=False)
    hf.tie_weights()
    # the authors put GPT-2's BOS token in front of every prompt themselves
    return load_model(hf.eval(), tokenizer, dtype=dtype, add_bos=True)


def _seeded(hf: GPT2LMHeadModel) -> dict[str, torch.Tensor]:
    """Numpy's legacy generator, seed 0, parameters by name; rounded to float32 before
    they are scaled.
    """
    random, weights = np.random.RandomState(0), {}
    for name, parameter in sorted(
        hf.transformer.named_parameters(prefix="transformer")
    ):
        draws = torch.tensor(random.randn(*parameter.shape), dtype=torch.float32)
        weights[name] = (".ln_" in name and name.endswith("weight")) + _scale(
            name, parameter.shape[0]
        ) * draws
    return weights


def _scale(name: str, rows: int) -> float:
    if ".ln_" in name:
        return 0.1
    if name.endswith("bias"):
        return 0.05
    if "wte" in name or "wpe" in name:
        return (1.7 if "wte" in name else 0.5) / 128**0.5
    return 1.2 / rows**0.5
