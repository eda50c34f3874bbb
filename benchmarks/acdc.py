"""ACDC: one full forward per tested edge against the library's search, on the same
graph and with the same log.

python benchmarks/acdc.py [--threshold 0.01] [--rounds 3] [--first-difference 0]
[--threads 1]

A seeded model of 4 layers x 8 heads x 256 (1,615 edges), 24 pairs of prompts of 12
random tokens, KL at the last token. The plain search runs the whole graph for every
edge, to the end, in three ways: reader by reader, as the paper's rules and the authors'
hooks do it, with stock kernels; all heads of a layer at once; and that with oneDNN too
(the search itself always has it). The search runs `--rounds` times before them and as
often after them. `--first-difference` is the position from which on the two prompts of
a pair differ (0: everywhere). Prints CPU seconds, whether the logs are identical, and
two ratios: the searches alone, each given its two reference runs, and both with the
making of these runs included.
"""

import argparse
import os
import statistics
from collections.abc import Callable

import torch
from common import measure
from transformers import GPT2Config, GPT2LMHeadModel

from mechtut.circuits._wiring import Run, attend, mlp_out, projector, run
from mechtut.circuits.circuit import Circuit
from mechtut.circuits.graph import Edge, visits
from mechtut.circuits.runs import Contrast, Cuts, circuit_metric, heads_write
from mechtut.models.loading import Model, load_model
from mechtut.papers.acdc import Rules, acdc, search
from mechtut.patching.matmul import fast_matmul

Log = list[tuple[str, str, bool, float]]


def plain_metric(contrast: Contrast, corrupted: Run, present: set[Edge]) -> float:
    """One full forward pass of the graph, as the paper's rules read: a reader gets what
    it gets in the corrupted run, plus what each parent that is still there writes now
    minus what it writes then.
    """
    graph, wiring, rows = contrast.graph, contrast.wiring, contrast.window.rows
    more = {"embed": contrast.differences[0]}

    def read(node: str, stream: torch.Tensor) -> torch.Tensor:
        return stream + sum(
            more[p] for p in graph.parents(node) if (p, node) in present
        )

    for layer in range(graph.n_layers):
        for h in range(graph.n_heads):
            qkv, one = [], torch.tensor([h])
            for part in "qkv":
                name = f"a{layer}.{h}.{part}"
                x = read(f"{name}_in", corrupted.attn_in[layer])[None]
                value = projector(wiring, layer, part, one, rows)(x)
                qkv.append(
                    value
                    if (f"{name}_in", name) in present
                    else corrupted.qkv[layer][part][one]
                )
            z = (
                attend(wiring, layer, *qkv, wiring.masks[layer])
                - corrupted.z[layer][one]
            )
            more[f"a{layer}.{h}"] = heads_write(wiring, layer, z, None, rows, one)[0]
        more[f"m{layer}"] = (
            mlp_out(wiring, layer, read(f"m{layer}.in", corrupted.mlp_in[layer]))
            - corrupted.mlps[layer]
        )
    return contrast.metric.value(
        contrast.read(read("out", corrupted.out)[:, contrast.window.reads])
    )


def plain_search(
    contrast: Contrast, threshold: float, forward: Callable[[Cuts], float]
) -> Log:
    """The algorithm with one full forward pass per edge."""
    graph, cuts, current, log = (
        contrast.graph,
        Cuts(contrast.graph),
        contrast.metric_full,
        [],
    )
    leaving = {
        node: [e for e in graph.edges if e.parent == node] for node in visits(graph)
    }
    dead = set()
    for node in visits(graph):
        behind = [n for n in _placeholders(node, graph.n_heads) if n not in dead]
        edges = (
            [Edge(p, node) for p in graph.parents(node)]
            if node in graph.receiver_index
            else _direct(node)
        )
        if (
            node != "out"
            and not behind
            and not any(cuts.has(e) and e.child not in dead for e in leaving[node])
        ):
            dead.add(node)
            for edge in edges:
                cuts.set(edge, False)
            continue
        for edge in edges:
            cuts.set(edge, False)
            new = forward(cuts)
            kept = not new - current < threshold
            log.append((*edge, kept, new - current))
            cuts.set(edge, kept)
            current = current if kept else new
    return log


def _placeholders(node: str, n_heads: int) -> list[str]:
    if node.endswith((".q", ".k", ".v")):
        return [node[:-2]]
    return [node[:-3]] if node.startswith("m") and node.endswith(".in") else []


def _direct(node: str) -> list[Edge]:
    return [Edge(f"{node}_in", node)] if node.endswith((".q", ".k", ".v")) else []


def small_model() -> Model:
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    shape = {
        "n_layer": 4,
        "n_head": 8,
        "n_embd": 256,
        "vocab_size": 1000,
        "n_positions": 32,
    }
    return load_model(
        GPT2LMHeadModel(GPT2Config(**shape, **special, initializer_range=0.08))
    )


def pairs(
    n: int, length: int, first_difference: int, vocab: int
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    clean, other = torch.randint(0, vocab, (2, n, length), generator=g)
    return clean, torch.where(torch.arange(length) >= first_difference, other, clean)


def readers_one_by_one(contrast: Contrast) -> Callable[[Cuts], float]:
    """The plain forward pass of the benchmark's headline."""
    with torch.no_grad():
        corrupted = run(contrast.wiring, contrast.inputs[1]["embed"])

    @torch.no_grad()
    def forward(cuts: Cuts) -> float:
        return plain_metric(
            contrast, corrupted, {e for e in contrast.graph.edges if cuts.has(e)}
        )

    return forward


def compare(args: argparse.Namespace) -> None:
    model = small_model()
    clean, corrupted = pairs(24, 12, args.first_difference, 1000)
    whole = Contrast(model, clean, corrupted, trim=False)

    contrast, rules = Contrast(model, clean, corrupted), Rules(args.threshold)
    ours = {
        "whole": lambda: acdc(
            model, clean, corrupted, threshold=args.threshold, progress=False
        ),
        "alone": lambda: search(contrast, rules, progress=False),
        "plain's runs": lambda: Contrast(model, clean, corrupted, trim=False),
    }
    circuit: Circuit = ours["whole"]()  # imports and buffers
    ways = {
        "plain, reader by reader, stock     ": (readers_one_by_one(whole), False),
        "plain, all heads at once, stock    ": (
            lambda cuts: circuit_metric(whole, cuts, everything=True),
            False,
        ),
        "plain, all heads at once, oneDNN   ": (
            lambda cuts: circuit_metric(whole, cuts, everything=True),
            True,
        ),
    }

    def rounds() -> list[dict[str, float]]:
        return [
            {name: measure(function)[0] for name, function in ours.items()}
            for _ in range(args.rounds)
        ]

    before, plain = rounds(), {}
    for name, (forward, kernels) in ways.items():
        with fast_matmul(model, kernels):
            forward(Cuts(whole.graph))
            plain[name] = measure(
                lambda forward=forward: plain_search(whole, args.threshold, forward)
            )
    every = [*before, *rounds()]  # a shared machine changes its pace
    seconds = {name: statistics.median(r[name] for r in every) for name in ours}
    print(
        f"{args.threads} thread(s), {len(whole.graph.edges)} edges, 24 x 12 tokens,"
        f" pairs differ from {args.first_difference} on, threshold {args.threshold:g}:"
        f" {len(circuit.log)} edges tested, {len(circuit.edges)} kept; load"
        f" {os.getloadavg()[0]:.1f}"
    )
    print(
        f"search alone {seconds['alone']:.2f} CPU s, with its reference runs"
        f" {seconds['whole']:.2f} CPU s"
    )
    for name, (took, log) in plain.items():
        same = [(s.parent, s.child, s.kept) for s in circuit.log] == [
            row[:3] for row in log
        ]
        worst = max(
            abs(s.delta - d) for s, (*_, d) in zip(circuit.log, log, strict=False)
        )
        both = (took + seconds["plain's runs"]) / seconds["whole"]
        print(
            f"{name}{took:8.2f} CPU s ({1000 * took / len(log):.1f} ms per edge),"
            f" {took / seconds['alone']:.0f}x alone, {both:.0f}x with the runs;"
            f" identical logs: {same}, largest difference of a change {worst:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threshold", type=float, default=0.01)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-difference", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    compare(args)


if __name__ == "__main__":
    main()
