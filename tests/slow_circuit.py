"""A circuit run the slow way: Hugging Face's own attention and MLP modules, called once
per reader of the graph.

Nothing here uses the library's head-wise weights, rotary embedding, masks or
bookkeeping. So agreement with it means something.
"""

import torch

from mechtut.circuits.graph import Edge, Graph
from mechtut.circuits.runs import Contrast, Cuts
from mechtut.models.families import FAMILIES
from mechtut.models.hooks import attention_tap
from mechtut.models.loading import Model
from mechtut.patching.partial import record_blocks


class _Layers:
    """The model's modules, with the arguments that its blocks got in one run."""

    def __init__(self, model: Model, tokens: torch.Tensor):
        self.model, self.wires = model, FAMILIES[model.config.model_type]
        with attention_tap(model, explicit_mask=True):
            self.arguments = record_blocks(model, tokens).arguments

    def norm(self, layer: int, path: str | None, x: torch.Tensor) -> torch.Tensor:
        return x if path is None else self.model.part(layer, path)(x)

    def attention(
        self, layer: int, x: torch.Tensor, given: dict | None = None
    ) -> tuple[dict, torch.Tensor]:
        """q, k, v that the attention module makes of a stream (replaced by `given` if
        there is any), and z.
        """
        model, seen = self.model, {}

        def look(_layer, q, k, v):
            seen.update(q=q, k=k, v=v)
            return (given["q"], given["k"], given["v"]) if given else (q, k, v)

        def keep(_module, args):
            seen["z"] = args[0]

        hook = model.part(layer, model.family.attn_proj).register_forward_pre_hook(keep)
        wanted = {
            k: v
            for k, v in self.arguments[layer].items()
            if k in ("attention_mask", "position_embeddings", "position_ids")
        }
        try:
            with attention_tap(model, arguments=look, explicit_mask=True):
                model.part(layer, model.family.attn)(
                    self.norm(layer, self.wires.norm_attn, x), **wanted
                )
        finally:
            hook.remove()
        return seen, seen["z"].unflatten(-1, (model.n_heads, -1))

    def head_writes(self, layer: int, z: torch.Tensor, head: int) -> torch.Tensor:
        alone = torch.zeros_like(z)
        alone[:, :, head] = z[:, :, head]
        project = self.model.part(layer, self.model.family.attn_proj)
        return project(alone.flatten(2)) - project(torch.zeros_like(alone.flatten(2)))

    def gain(self, layer: int, z: torch.Tensor) -> torch.Tensor | float:
        """In families with a norm behind attention: what it multiplies the sum of the
        heads with.
        """
        if not self.model.family.attn_out.endswith("norm"):
            return 1.0
        total = self.model.part(layer, self.model.family.attn_proj)(z.flatten(2))
        return self.model.part(layer, self.model.family.attn_out)(total) / total

    def mlp(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        model, block = self.model, self.model.blocks[layer]
        y = self.norm(layer, self.wires.norm_mlp, x)
        if model.config.model_type == "opt":
            return block.fc2(block.activation_fn(block.fc1(y)))
        out = model.part(layer, "mlp")(y)
        return (
            out
            if model.family.mlp_out == "mlp"
            else model.part(layer, model.family.mlp_out)(out)
        )


@torch.no_grad()
def slow_logits(contrast: Contrast, cuts: Cuts) -> torch.Tensor:
    """Logits at all positions of the circuit on `contrast`'s prompts (resample
    ablation).
    """
    model, graph = contrast.model, contrast.graph
    clean, corrupted = contrast.tokens
    layers = _Layers(model, clean)
    theirs, gains, values = _full(layers, corrupted, None)
    _, gains, _ = _full(layers, clean, None)
    return model.unembed(_circuit(layers, graph, cuts, clean, theirs, gains, values))


def _full(
    layers: _Layers, tokens: torch.Tensor, gains: list | None
) -> tuple[dict, list, list]:
    """What every sender writes in a full run, the gains, and q, k, v by layer."""
    model = layers.model
    x = record_blocks(model, tokens).resid[0]
    written, found_gains, values = {"embed": x}, [], []
    for layer in range(model.n_layers):
        seen, z = layers.attention(layer, x)
        values.append(seen)
        found_gains.append(layers.gain(layer, z))
        for head in range(model.n_heads):
            written[f"a{layer}.{head}"] = (
                layers.head_writes(layer, z, head) * found_gains[-1]
            )
        middle = (
            x
            + sum(written[f"a{layer}.{h}"] for h in range(model.n_heads))
            + _bias(layers, layer, x)
        )
        written[f"m{layer}"] = layers.mlp(layer, x if layers.wires.parallel else middle)
        x = middle + written[f"m{layer}"]
        written[f"biases{layer}"] = _bias(layers, layer, x)
    return written, found_gains, values


def _bias(layers: _Layers, layer: int, x: torch.Tensor) -> torch.Tensor:
    project = layers.model.part(layer, layers.model.family.attn_proj)
    bias = getattr(project, "bias", None)
    return torch.zeros_like(x) if bias is None else bias.expand_as(x)


def _circuit(
    layers: _Layers,
    graph: Graph,
    cuts: Cuts,
    clean: torch.Tensor,
    theirs: dict,
    gains: list,
    values: list,
):
    model = layers.model
    now = {"embed": record_blocks(model, clean).resid[0]}

    def reads(receiver: str) -> torch.Tensor:
        total = sum(
            now[s] if cuts.has(Edge(s, receiver)) else theirs[s]
            for s in graph.parents(receiver)
        )
        layer = (
            graph.n_layers
            if receiver == "out"
            else int(receiver[1 : receiver.index(".")])
        )
        layer += receiver.startswith("m") and not graph.parallel
        return total + sum(theirs[f"biases{i}"] for i in range(layer))

    for layer in range(model.n_layers):
        given = {}
        for part in "qkv":
            rows = []
            for head in range(graph.count(part)):
                shared = "kv" if graph.count(part) < graph.n_heads else ""
                node = f"a{layer}.{shared}{head}.{part}"
                kept = not graph.split_qkv or cuts.has(Edge(f"{node}_in", node))
                group = (
                    head if part != "q" else head // (graph.n_heads // graph.count("k"))
                )
                shared = "kv" if graph.count("k") < graph.n_heads else ""
                whole = f"a{layer}.{shared}{group}.in"
                reader = f"{node}_in" if graph.split_qkv else whole
                source = (
                    layers.attention(layer, reads(reader))[0] if kept else values[layer]
                )
                rows.append(source[part][:, head])
            given[part] = torch.stack(rows, 1)
        _, z = layers.attention(layer, now["embed"], given)
        for head in range(model.n_heads):
            now[f"a{layer}.{head}"] = layers.head_writes(layer, z, head) * gains[layer]
        now[f"m{layer}"] = layers.mlp(layer, reads(f"m{layer}.in"))
    return reads("out")
