"""The grokking networks of tests/golden: weights, and what the authors' helpers say."""

import json
from functools import cache

import numpy as np
import torch
from golden_models import GOLDEN
from safetensors.torch import load_file

from mechtut.grokking.network import ModularAddition
from mechtut.grokking.training import Split

FOLDER = GOLDEN / "grokking"


@cache
def numbers() -> dict:
    return json.loads((FOLDER / "p31.json").read_text())


@cache
def arrays() -> dict[str, torch.Tensor]:
    with np.load(FOLDER / "p31.npz") as z:
        return {k: torch.tensor(z[k]) for k in z.files}


def weights(kind: str) -> dict[str, torch.Tensor]:
    """`init` or `final`, in float32."""
    stored = load_file(FOLDER / "weights.safetensors")
    return {k.split(".")[1]: v for k, v in stored.items() if k.startswith(kind)}


def network(kind: str = "final") -> ModularAddition:
    """In float64."""
    return ModularAddition.from_weights(
        {k: v.double() for k, v in weights(kind).items()}
    )


def split() -> Split:
    """As the file lists it: pairs of training, and the rest."""
    train = [31 * a + b for a, b in numbers()["train_pairs"]]
    rest = sorted(set(range(961)) - set(train))
    return Split(torch.tensor(train), torch.tensor(rest))
