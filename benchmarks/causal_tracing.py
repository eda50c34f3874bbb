"""Causal tracing: the paper's loop against the engine, side by side, on a seeded
GPT-2-small-shaped model.

    python benchmarks/causal_tracing.py [--rounds 3] [--layers 12] [--threads 1]

One prompt of 12 tokens, a subject of 4, 10 noise samples, every token x layer, for each
component. The paper's loop makes one full forward of 11 rows (a clean one and ten
corrupted) per cell. Prints CPU seconds (median over rounds), their ratio, the
arithmetic that the affected cone needs and what share of it the engine's speed amounts
to, agreement, and peak memory.
"""

import argparse
import resource
import statistics

import torch
from common import gpt2_small, measure

from mechtut.models.hooks import Edit, intervene
from mechtut.models.loading import Model
from mechtut.papers.causal_tracing import Noise, trace, window_layers
from mechtut.patching.matmul import fast_matmul

SUBJECT, N_POS, WINDOW, NOISE = (0, 4), 12, 10, Noise(3.0, std=0.02)
COMPONENTS = ("resid_post", "mlp_out", "attn_out")


def paper_loop(model: Model, ids: torch.Tensor, component: str) -> torch.Tensor:
    """One full forward of 11 rows per (token, layer), as the authors do; returns scores
    [pos, layer].
    """
    batch = ids.repeat(11, 1)
    draws = torch.cat(
        [torch.zeros(1, 4, model.d_model), NOISE.draw(10, 4, model.d_model)]
    )
    noise = Edit("embed", None, draws, pos=range(*SUBJECT), mode="add")
    answer = int(model.logits(batch)[0, -1].argmax())
    width = 1 if component == "resid_post" else WINDOW
    scores = torch.empty(N_POS, model.n_layers)
    for pos in range(N_POS):
        for layer in range(model.n_layers):
            # Row 0 of the same forward is the clean run: copy its value into every row.
            hooks = [
                _copy_row_0(model, component, i, pos)
                for i in window_layers(layer, width, model.n_layers)
            ]
            with intervene(model, [noise]):
                logits = model.logits(batch)
            scores[pos, layer] = logits[1:, -1].softmax(-1)[:, answer].mean()
            for hook in hooks:
                hook.remove()
    return scores


def _copy_row_0(model: Model, component: str, layer: int, pos: int):
    path = {"mlp_out": model.family.mlp_out, "attn_out": model.family.attn_out}.get(
        component
    )
    module = model.blocks[layer] if path is None else model.part(layer, path)

    def hook(_module, _args, output):
        x = output[0] if isinstance(output, tuple) else output
        x[1:, pos] = x[0, pos]

    return module.register_forward_hook(hook)


def cone_flop(model: Model, component: str, rows: int = 10) -> float:
    """Multiply-adds (x2) of the linear layers in the cones of all cells, sharing what
    windows share, plus the readout.
    """
    d, n, vocab = model.d_model, model.n_layers, model.embed.weight.shape[0]
    kv, attn, mlp = (
        2 * d * d,
        4 * d * d,
        8 * d * d,
    )  # weights of: keys and values, all of attention, the MLP

    def full(
        n_tok: int, layer: int
    ) -> (
        int
    ):  # one block on the tokens of a cone; in the last only one token goes all the way
        return (n_tok - 1) * kv + attn + mlp if layer == n - 1 else n_tok * (attn + mlp)

    total = 0
    for pos in range(SUBJECT[0], N_POS):
        n_tok, seen = N_POS - pos, set()
        for layer in range(n):
            window = (
                [layer]
                if component == "resid_post"
                else list(window_layers(layer, WINDOW, n))
            )
            if window[0] == n - 1 and pos < N_POS - 1:
                continue
            start = window[0]
            for at in range(start, n):
                state = (
                    start,
                    min(at, window[-1]) if component != "resid_post" else start,
                    at,
                )
                if state in seen:
                    continue
                seen.add(state)
                if at > start:
                    total += full(n_tok, at)
                elif component == "attn_out":
                    total += mlp  # the edited token's MLP
            total += vocab * d
    return 2.0 * rows * total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--components", nargs="*", default=COMPONENTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = gpt2_small(args.layers)
    ids = torch.randint(0, 50257, (N_POS,), generator=torch.Generator().manual_seed(1))
    x, w = torch.randn(1320, 768), torch.randn(768, 3072)
    seconds, _ = measure(lambda: [x @ w for _ in range(10)])
    print(
        f"{args.threads} thread(s), stock matrix products"
        f" {10 * 2 * 1320 * 768 * 3072 / seconds / 1e9:.0f} GFLOP/s"
    )
    start_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        "component   paper s   stock s  ratio   onednn s  ratio   cone GFLOP  of bound"
        " (stock)  largest difference"
    )
    for component in args.components:
        rows: dict[str, list[float]] = {"paper": [], "stock": [], "onednn": []}
        for _ in range(args.rounds):
            for name, enabled in (("stock", False), ("onednn", True)):
                with fast_matmul(model, enabled):
                    seconds, fast = measure(
                        lambda c=component: trace(
                            model, ids, SUBJECT, component=c, window=WINDOW, noise=NOISE
                        )
                    )
                rows[name].append(seconds)
            seconds, slow = measure(lambda c=component: paper_loop(model, ids, c))
            rows["paper"].append(seconds)
        worst = float((fast.scores - slow).abs().max())
        p, s, o = (statistics.median(rows[k]) for k in ("paper", "stock", "onednn"))
        flop, n_forward = cone_flop(model, component), N_POS * args.layers
        peak = (
            n_forward * 11 * N_POS * 2 * (12 * 768**2 * args.layers + 50257 * 768) / p
        )  # the paper loop's own speed
        print(
            f"{component:10s} {p:8.1f} {s:9.2f} {p / s:5.1f}x {o:10.2f} {p / o:5.1f}x"
            f" {flop / 1e9:12.0f} {s * peak / flop:17.2f} {worst:19.1e}",
            flush=True,
        )
    now_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"peak memory {now_mb:.0f} MB, of which {start_mb:.0f} MB before the first"
        " trace"
    )


if __name__ == "__main__":
    main()
