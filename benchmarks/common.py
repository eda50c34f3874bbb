"""What the benchmarks share: a seeded model of GPT-2 small's shape, and CPU seconds."""

import gc
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mechtut.models.loading import Model, load_model


def gpt2_small(n_layers: int = 12, tokenizer=None, **config) -> Model:
    """A GPT-2 of the small size with seeded random weights; `config` changes its
    configuration.
    """
    torch.manual_seed(0)
    return load_model(
        GPT2LMHeadModel(GPT2Config(n_layer=n_layers, **config)), tokenizer
    )


def measure(function):
    """CPU seconds and result."""
    gc.collect()
    before = time.process_time()
    result = function()
    return time.process_time() - before, result
