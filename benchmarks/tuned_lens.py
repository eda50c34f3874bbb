"""A step of the tuned lens on SmolLM2 beside the forward pass, and what it brings.

    python benchmarks/tuned_lens.py [--rows 4] [--length 128] [--seconds 0]

Prints the CPU seconds of a step at several shares of tokens, the forward pass of the
same batch with the same matrix products, and the parts of a step. With --seconds it
also trains that long at each share, on the everyday texts but for every fifth, and
prints KL(model || lens) on those.
"""

import argparse
import time

import torch
from common import measure

from mechtut.lenses.tuned import TunedLens, _Run, evaluate_lens, token_chunks
from mechtut.models.loading import evaluating, load_model
from mechtut.patching.matmul import fast_matmul
from mechtut.patching.partial import record_blocks
from mechtut.prompts.everyday import everyday_texts

HOW = {
    "n_steps": 10**6,
    "loss": "kl",
    "optimiser": "sgd",
    "scale": 1.0,
    "weight_decay": 1e-3,
    "seed": 42,
}


def steps(model, ids, rows, share, n):
    """CPU seconds of a step, the fastest of some."""
    run = _Run(model, ids, {**HOW, "batch_size": rows, "share": share})
    with evaluating(model.hf), fast_matmul(model):
        return min(measure(run.step)[0] for _ in range(n)), run.cost


def main() -> None:
    """Steps, and perhaps training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model("smollm2", device="cpu")
    texts = list(everyday_texts())
    ids = token_chunks(model, texts, arguments.length).ids
    batch = ids[: arguments.rows]
    model.logits(batch)  # weights are laid out once
    stock = min(measure(lambda: model.logits(batch))[0] for _ in range(3))
    with fast_matmul(model):
        model.logits(batch)
        forward = min(measure(lambda: model.logits(batch))[0] for _ in range(3))
        blocks = min(measure(lambda: record_blocks(model, batch))[0] for _ in range(3))
    print(
        f"{batch.numel()} tokens: forward {forward:.2f} s (stock products {stock:.2f}"
        f" s), blocks alone {blocks:.2f} s"
    )
    n = model.n_layers
    shares = [1 / (2 * n), 1 / n, 2 / n, 4 / n, 1.0]
    for share in shares:
        took, cost = steps(model, ids, arguments.rows, share, 1 if share == 1 else 3)
        print(
            f"share {share:.4f}: {took:.2f} s, {took / forward:.2f} forward passes"
            f" ({took / stock:.2f} of stock products; {cost:.2f} by counting)"
        )
    if not arguments.seconds:
        return
    train = [t for i, t in enumerate(texts) if i % 5]
    held_out = [t for i, t in enumerate(texts) if not i % 5]
    ids = token_chunks(model, train, arguments.length).ids
    how = {"length": arguments.length, "progress": False}
    plain = evaluate_lens(model, held_out, **how)
    print("logit lens", plain.kl.mean(0)[[0, 8, 15, 23, 29]].tolist())
    for share in shares[1:]:
        took, _ = steps(model, ids, arguments.rows, share, 1)
        lens_steps = max(2, round(arguments.seconds / took))
        begun = time.process_time()
        lens = TunedLens.fit(
            model,
            ids,
            n_steps=lens_steps,
            batch_size=arguments.rows,
            share=share,
            progress=False,
        )
        spent = time.process_time() - begun
        kl = lens.evaluate(model, held_out, **how).kl.mean(0)
        print(
            f"share {share:.4f}: {lens_steps} steps in {spent:.0f} s, KL of layers -1,"
            f" 7, 14, 22, 28: {[round(x, 3) for x in kl[[0, 8, 15, 23, 29]].tolist()]},"
            f" mean {float(kl[:-1].mean()):.3f} (logit lens"
            f" {float(plain.kl.mean(0)[:-1].mean()):.3f})"
        )


if __name__ == "__main__":
    main()
