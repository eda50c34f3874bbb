"""The models and numbers in tests/golden/steering."""

import json

import numpy as np
import torch
from golden_models import GOLDEN
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechtut.models.loading import Model, load_model

FOLDER = GOLDEN / "steering"
TYPES = {"f32": torch.float32, "f64": torch.float64}
# How far numbers may be apart, as a share of the largest. The rotary tables of Llama
# are float32 in a model of any type, and the last digit of a cosine depends on the
# processor.
NEAR = {
    "gpt2": {"f32": 2e-5, "f64": 1e-9},
    "llama": {"f32": 2e-5, "f64": 5e-6},
}


def steering_model(kind: str, half: str) -> Model:
    """`llama` or `gpt2`, random weights, in one of two types; eager attention, as the
    reference was made with.
    """
    folder = FOLDER / "models"
    hf = AutoModelForCausalLM.from_pretrained(
        folder / kind, attn_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return load_model(hf.to(TYPES[half]), tokenizer)


def steering_numbers(topic: str, kind: str = "llama"):
    """What was given and told, and the arrays."""
    told = json.loads((FOLDER / topic / f"{kind}.json").read_text())
    return told, np.load(FOLDER / topic / f"{kind}.npz")


def apart(found, wanted) -> float:
    """The largest difference of a tensor and an array of one shape, as a share of the
    largest number there, if that is more than one.
    """
    found = np.asarray(torch.as_tensor(found).detach().double())
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / max(1, np.abs(wanted).max()))
