"""ACDC on a model of GPT-2 small's shape, with as many prompts as fit IOI: time and
memory of a whole search.

python benchmarks/acdc_gpt2.py [--share 0.01] [--prompts 50] [--folder FOLDER]
[--minutes M | --limit N] [--threads 1]

12 layers x 12 heads x 768 with seeded random weights (32,923 edges that can be cut), 50
pairs of 15 random tokens that differ at positions 2, 4 and 10, where IOI prompts have
their names; KL at the last token. An edge goes if it adds less than `--share` of what
all edges together carry (the KL of the corrupted run). With `--folder` every finished
node is kept there, and the same command goes on from there after Ctrl-C, `--minutes` or
`--limit` (tests in this run). Prints edges tested and kept, CPU seconds, peak memory,
and an estimate of the plain way: a few timed full forward passes, times the tests.
"""

import argparse
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from acdc import readers_one_by_one
from common import gpt2_small, measure

from mechtut.circuits.graph import Edge
from mechtut.circuits.runs import Contrast, Cuts, circuit_metric
from mechtut.circuits.search import Pruner
from mechtut.models.loading import Model
from mechtut.papers.acdc import Rules, search
from mechtut.patching.matmul import fast_matmul

NAMES = (2, 4, 10)


class Enough(Exception):
    """The time or the number of tests that was asked for is used up."""


def pairs(n: int, length: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of random tokens, and the same with other tokens where the names are."""
    g = torch.Generator().manual_seed(1)
    clean, other = torch.randint(0, vocab, (2, n, length), generator=g)
    return clean, torch.where(
        torch.isin(torch.arange(length), torch.tensor(NAMES)), other, clean
    )


def counted(minutes: float, limit: int) -> list[int]:
    """From now on, count the edges that are asked about in the only entry of this list,
    and raise `Enough` in time.
    """
    count, until, without = [0], time.monotonic() + 60 * minutes, Pruner.without

    def some_more(
        pruner: Pruner, edges: Sequence[Edge], alone: bool = False
    ) -> list[float | None]:
        if count[0] >= limit or time.monotonic() > until:
            raise Enough
        count[0] += len(edges)
        return without(pruner, edges, alone)

    Pruner.without = some_more  # type: ignore[method-assign]
    return count


def plain_seconds(
    model: Model, clean: torch.Tensor, corrupted: torch.Tensor, passes: int
) -> dict[str, float]:
    """CPU seconds of one full forward pass of the graph with all edges present, as the
    plain search runs for each test.
    """
    contrast = Contrast(model, clean, corrupted, trim=False)
    cuts = Cuts(contrast.graph)
    one_by_one = readers_one_by_one(contrast)
    ways: dict[str, tuple[Callable[[], float], bool]] = {
        "reader by reader, stock": (lambda: one_by_one(cuts), False),
        "all heads at once, oneDNN": (
            lambda: circuit_metric(contrast, cuts, everything=True),
            True,
        ),
    }
    found = {}
    for name, (forward, kernels) in ways.items():
        with fast_matmul(model, kernels):
            found[name] = min(measure(forward)[0] for _ in range(passes))
    return found


def run(args: argparse.Namespace) -> None:
    model = gpt2_small(
        initializer_range=0.05
    )  # with GPT-2's own 0.02 the random heads would hardly matter
    clean, corrupted = pairs(args.prompts, 15, 50257)
    with fast_matmul(model):
        setup, contrast = measure(lambda: Contrast(model, clean, corrupted))
        whole = circuit_metric(contrast, Cuts.only(contrast.graph, []))
    threshold = args.share * whole
    print(
        f"GPT-2 small's shape, {len(contrast.graph.edges)} edges, {args.prompts} x 15"
        f" tokens, pairs differ at {NAMES}, {args.threads} thread(s)"
    )
    print(
        f"KL without any edge {whole:.3g}, threshold {args.share:g} of it:"
        f" {threshold:.3g}",
        flush=True,
    )
    count, circuit, wall = counted(args.minutes, args.limit), None, time.perf_counter()

    def searched() -> None:
        nonlocal circuit
        try:
            circuit = search(
                contrast, Rules(threshold), folder=args.folder, progress=True
            )
        except (Enough, KeyboardInterrupt):
            print(
                "stopped early"
                + (
                    f"; the same command goes on from {args.folder}"
                    if args.folder
                    else ""
                )
            )

    seconds, _ = measure(searched)
    wall = time.perf_counter() - wall
    tested = count[0]
    print(
        f"{tested} edges tested here in {seconds:.1f} CPU s"
        f" ({1000 * seconds / max(tested, 1):.1f} ms per test), {wall:.0f} s; contrast"
        f" {setup:.1f} CPU s; load {os.getloadavg()[0]:.1f}"
    )
    if circuit is not None:
        tested = len(circuit.log)
        print(
            f"finished: {tested} edges tested in all, {len(circuit.edges)} kept, KL"
            f" {circuit.metric_final:.3g}"
        )
    print(
        "peak memory"
        f" {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB",
        flush=True,
    )
    if args.passes:
        for name, one in plain_seconds(model, clean, corrupted, args.passes).items():
            print(
                f"ESTIMATE of the plain way, {name}: {one:.2f} CPU s per forward pass x"
                f" {tested} tests = {one * tested:.0f} CPU s"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--limit", type=int, default=10**9)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run(args)


if __name__ == "__main__":
    main()
