"""The embedded model for a browser: `python tools/browser_model.py FILE` writes it as
ONNX, with residual streams and attention as outputs and patches as inputs.

The weights are those that the package ships, as float16; the graph turns them into
float32 when it is loaded, and all arithmetic is in float32.
"""

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechtut import load_model

INPUTS = ("ids", "patch_mask", "patch_value")
OUTPUTS = ("lens", "residual", "attention")
HALF_FROM = 1024  # weights of at least so many numbers are written as float16


class Patchable(nn.Module):
    """A GPT-2 of Hugging Face's, written out: GPT-2's arithmetic with a place to write
    into the residual stream before the first block and after each one.
    """

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.inner, self.n_heads = hf.transformer, hf.config.n_head

    def attention(
        self, block: Any, x: Float[Tensor, "pos d"]
    ) -> tuple[Float[Tensor, "pos d"], Float[Tensor, "head pos pos"]]:
        """What a block's attention adds, and where its heads look."""
        n, d = x.shape
        d_head = d // self.n_heads
        q, k, v = (
            part.reshape(n, self.n_heads, d_head).transpose(0, 1)
            for part in _affine(block.attn.c_attn, block.ln_1(x)).split(d, -1)
        )
        scores = q @ k.transpose(1, 2) * d_head**-0.5
        at = torch.arange(n)
        pattern = scores.masked_fill(at[None, :] > at[:, None], -1e9).softmax(-1)
        z = (pattern @ v).transpose(0, 1).reshape(n, d)
        return _affine(block.attn.c_proj, z), pattern

    def forward(
        self,
        ids: Int[Tensor, "1 pos"],
        patch_mask: Float[Tensor, "level pos 1"],
        patch_value: Float[Tensor, "level pos d"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run one prompt.

        Args:
            ids: Token ids.
            patch_mask: 1 where the stream is replaced, 0 elsewhere; level 0 is the
                embedding, level i + 1 the output of block i.
            patch_value: By what.

        Returns:
            Logits read from every level through the final norm (the last level's are
            the model's own), the streams, and the attention patterns by layer.
        """

        def patched(level: int, x: Tensor) -> Tensor:
            return torch.where(patch_mask[level] > 0, patch_value[level], x)

        model, patterns = self.inner, []
        x = model.wte(ids[0]) + model.wpe(torch.arange(ids.shape[1]))
        stream = [patched(0, x)]
        for i, block in enumerate(model.h):
            added, pattern = self.attention(block, stream[-1])
            x = stream[-1] + added
            hidden = F.gelu(_affine(block.mlp.c_fc, block.ln_2(x)), approximate="tanh")
            stream.append(patched(i + 1, x + _affine(block.mlp.c_proj, hidden)))
            patterns.append(pattern)
        residual = torch.stack(stream)
        lens = model.ln_f(residual) @ model.wte.weight.T
        return lens, residual, torch.stack(patterns)


def _affine(layer: Any, x: Tensor) -> Tensor:
    """A `Conv1D`, whose weight is stored as [in, out]."""
    return x @ layer.weight + layer.bias


def halved(graph: Any) -> None:
    """Keep the large weights of an ONNX graph as float16, and cast them when it is
    loaded. Refuses weights that float16 does not hold exactly.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for weight in graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < HALF_FROM:
            continue
        half = values.astype(np.float16)
        if not (half.astype(np.float32) == values).all():
            raise ValueError(f"{weight.name} does not fit into float16")
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
        casts.append(
            helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT)
        )
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])
    # a value's old description as an input or initializer is not its output's
    kept = [v for v in graph.value_info if v.name not in {c.output[0] for c in casts}]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def export(file: Path) -> Path:
    """Write the embedded model as ONNX.

    Args:
        file: Where to.

    Returns:
        The same path.

    Raises:
        ImportError: If onnx or onnxscript is missing.
    """
    import onnx

    model = load_model("mini", device="cpu")
    module = Patchable(model.hf).eval()
    n, levels = 7, model.n_layers + 1
    example = (
        torch.arange(n)[None],
        torch.zeros(levels, n, 1),
        torch.zeros(levels, n, model.d_model),
    )
    length = torch.export.Dim("n", min=1, max=model.n_ctx)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        exported = torch.onnx.export(
            module,
            example,
            input_names=INPUTS,
            output_names=OUTPUTS,
            dynamic_shapes=({1: length}, {1: length}, {1: length}),
            dynamo=True,
            verbose=False,
        )
    made = exported.model_proto
    halved(made.graph)
    onnx.checker.check_model(made)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(made.SerializeToString())
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Export the embedded model.")
    parser.add_argument("file", type=Path)
    done = export(parser.parse_args().file)
    print(f"{done}: {done.stat().st_size / 1e6:.1f} MB")
