"""The small models on which the authors' ACDC code was run, as Hugging Face GPT-2s, and
every decision of those runs.
"""

import gzip
import json
from functools import cache

import numpy as np
import torch
from golden_models import GOLDEN
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from mechtut.circuits.graph import Order
from mechtut.circuits.runs import Contrast
from mechtut.models.loading import Model, load_model
from mechtut.papers.acdc import Rules

FOLDER = GOLDEN / "acdc"
NUMBERS = json.loads(gzip.decompress((FOLDER / "numbers.json.gz").read_bytes()))
RUNS, CANONICAL, TRACR, EAP = (
    NUMBERS[k] for k in ("runs", "canonical", "tracr", "eap")
)
ORDERS = {"normal": "reverse", "reverse": "forward"}  # the authors' words → ours


class NoMLP(nn.Module):
    """What is left of an MLP that was taken out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


@cache
def _weights() -> dict[str, dict[str, torch.Tensor]]:
    """All models' weights: float32 whose four bytes are stored in four rows, which
    compresses better.
    """
    planes = np.load(FOLDER / "weights.npz")["bytes"]
    flat = torch.from_numpy(
        np.ascontiguousarray(planes.T).view(np.float32).ravel().copy()
    )
    found, start = {}, 0
    for name, model in NUMBERS["models"].items():
        found[name] = {}
        for key, shape in model["shapes"].items():
            size = int(np.prod(shape))
            found[name][key] = flat[start : start + size].view(shape).double()
            start += size
    assert start == len(flat)
    return found


def acdc_model(name: str, dtype: torch.dtype = torch.float64) -> Model:
    """One of the models with the reference's weights; heads narrower than GPT-2's are
    padded with zeros.
    """
    config, weights = NUMBERS["models"][name]["config"], _weights()[name]
    d_model, n_heads = config["d_model"], config["n_heads"]
    shape = {
        "n_positions": config["n_ctx"],
        "n_embd": d_model,
        "n_layer": config["n_layers"],
        "n_head": n_heads,
    }
    special = {"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0}
    activation = config["act_fn"] or "gelu"
    gpt2 = GPT2Config(
        vocab_size=config["d_vocab"],
        n_inner=config["d_mlp"],
        activation_function=activation,
        **shape,
        **special,
    )
    hf = GPT2LMHeadModel(gpt2).double()
    bare = config["normalization_type"] is None
    with torch.no_grad():
        hf.transformer.wte.weight.copy_(weights["embed.W_E"])
        hf.transformer.wpe.weight.copy_(weights["pos_embed.W_pos"])
        for layer, block in enumerate(hf.transformer.h):
            mine = {
                k.split(".", 2)[2]: v
                for k, v in weights.items()
                if k.startswith(f"blocks.{layer}.")
            }
            _fill_attention(block.attn, mine, d_model // n_heads)
            _fill_norm(block, "ln_1", mine.get("ln1.w"), mine.get("ln1.b"))
            _fill_norm(block, "ln_2", mine.get("ln2.w"), mine.get("ln2.b"))
            _fill_mlp(block, mine)
        _fill_norm(
            hf.transformer, "ln_f", weights.get("ln_final.w"), weights.get("ln_final.b")
        )
        hf.lm_head = nn.Linear(d_model, weights["unembed.W_U"].shape[1]).double()
        hf.lm_head.weight.copy_(weights["unembed.W_U"].T)
        hf.lm_head.bias.copy_(weights["unembed.b_U"])
    if bare:  # the compiled model looks both ways
        hf.config.is_causal = False
        for block in hf.transformer.h:
            block.attn.is_causal = False
    return load_model(hf.to(dtype))


def _fill_attention(
    attn: nn.Module, weights: dict[str, torch.Tensor], d_head: int
) -> None:
    missing = d_head - weights["attn.W_Q"].shape[2]
    scale = (
        d_head / (d_head - missing)
    ) ** 0.5  # GPT-2 divides scores by the square root of the padded width
    columns, biases = [], []
    for part in "QKV":
        factor = scale if part == "Q" else 1.0
        weight = nn.functional.pad(weights[f"attn.W_{part}"], (0, missing)) * factor
        columns.append(weight.permute(1, 0, 2).flatten(1))
        biases.append(
            nn.functional.pad(weights[f"attn.b_{part}"], (0, missing)).flatten()
            * factor
        )
    attn.c_attn.weight.copy_(torch.cat(columns, 1))
    attn.c_attn.bias.copy_(torch.cat(biases))
    attn.c_proj.weight.copy_(
        nn.functional.pad(weights["attn.W_O"], (0, 0, 0, missing)).flatten(0, 1)
    )
    attn.c_proj.bias.copy_(weights["attn.b_O"])


def _fill_norm(
    parent: nn.Module, name: str, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> None:
    if weight is None:
        setattr(parent, name, nn.Identity())
    else:
        getattr(parent, name).weight.copy_(weight)
        getattr(parent, name).bias.copy_(bias)


def _fill_mlp(block: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    if "mlp.W_in" not in weights:
        block.mlp = NoMLP()
        return
    block.mlp.c_fc.weight.copy_(weights["mlp.W_in"])
    block.mlp.c_fc.bias.copy_(weights["mlp.b_in"])
    block.mlp.c_proj.weight.copy_(weights["mlp.W_out"])
    block.mlp.c_proj.bias.copy_(weights["mlp.b_out"])


def prompts(name: str) -> dict[str, torch.Tensor]:
    """Clean and corrupted prompts, labels and mask."""
    data = {
        k: torch.tensor(v)
        for k, v in NUMBERS["data"][name].items()
        if k != "logits_sum"
    }
    return {**data, "mask": data["mask"].bool()} if "mask" in data else data


def golden_contrast(run: dict, dtype: torch.dtype | None = None) -> Contrast:
    """The contrast of a reference run."""
    model = acdc_model(run["model"], dtype or getattr(torch, run["dtype"]))
    data, (metric, where) = prompts(run["model"]), run["metric"].rsplit("_", 1)
    positions = {
        "masked": data.get("mask"),
        "last": "last",
        "all": "all",
        "0": [1, 2, 3],
    }[where]
    options = {
        "ablation": "zero" if run["zero"] else "resample",
        "split_positions": run["use_pos_embed"],
    }
    if (
        metric == "l2"
    ):  # the compiled model's answer is its first output, from the second position on
        clean = model.logits(data["clean"])[:, 1:, 0]
        return Contrast(
            model,
            data["clean"],
            data["corrupted"],
            lambda x: (x[..., 0] - clean).pow(2).mean(),
            positions,
            **options,
        )
    labels = data["labels"] if "nll" in metric else None
    return Contrast(
        model,
        data["clean"],
        data["corrupted"],
        metric,
        positions,
        labels=labels,
        **options,
    )


def golden_rules(run: dict) -> Rules:
    """The settings of a reference run."""
    order = Order(ORDERS[run["names_mode"]], ORDERS[run["indices_mode"]])
    return Rules(run["threshold"], order, run["abs_value"], run["remove_redundant"])
