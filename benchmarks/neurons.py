"""Collecting neuron records against the bare trunk (all blocks, no unembedding), on a
seeded GPT-2-small-shaped model.

python benchmarks/neurons.py [--excerpts 128] [--tokens 64] [--batch 32] [--rounds 3]
[--layers 12] [--vocab 50257] [--threads 1] [--table] [--store] [--transformer-lens]

Every variant reads the same random tokens in the same batches with the same matrix
products as the bare trunk (oneDNN's, unless `--stock`), side by side in each round.
Random tokens are the worst case: the strongest excerpts change for longer than in real
text. Prints CPU seconds (median over rounds), the median of the rounds' ratios, and
peak memory.
"""

import argparse
import resource
import statistics

import torch
from common import gpt2_small, measure

from mechtut.models.hooks import Site
from mechtut.models.loading import Model
from mechtut.neurons.collect import collect
from mechtut.neurons.statistics import run_trunk
from mechtut.patching.matmul import fast_matmul

NOTHING_MORE = {"n_random": 0, "moments": False}
VARIANTS = {
    "top 20": NOTHING_MORE,
    "top 20, moments": {**NOTHING_MORE, "moments": True},
    "top 20, 20 random, quantiles": {"moments": False},
    "top 20, 20 random, quantiles, moments": {},
}


def bare_trunk(model: Model, tokens: torch.Tensor, batch: int) -> None:
    with fast_matmul(model), torch.no_grad():
        for rows in tokens.split(batch):
            run_trunk(
                model, rows, {Site("mlp_act", model.n_layers - 1): lambda x: None}
            )


def store_everything(model: Model, tokens: torch.Tensor, batch: int) -> int:
    """What needs no thought: keep every activation. Returns the bytes kept."""
    kept = []
    with fast_matmul(model), torch.no_grad():
        for rows in tokens.split(batch):
            run_trunk(
                model,
                rows,
                {
                    Site("mlp_act", i): lambda x: kept.append(x.clone())
                    for i in range(model.n_layers)
                },
            )
    return sum(x.nbytes for x in kept)


def lens_cache(bridge, tokens: torch.Tensor, batch: int) -> None:
    """TransformerLens' cache of the same activations, reduced at once to each excerpt's
    maximum.
    """
    with torch.no_grad():
        for rows in tokens.split(batch):
            _, cache = bridge.run_with_cache(
                rows, names_filter=lambda name: name.endswith("mlp.hook_post")
            )
            for values in cache.values():
                values.amax(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("excerpts", 128),
        ("tokens", 64),
        ("batch", 32),
        ("rounds", 3),
        ("layers", 12),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--threads", type=int, default=1)
    for name in ("table", "store", "transformer-lens", "stock"):
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = gpt2_small(
        args.layers, vocab_size=args.vocab, bos_token_id=0, eos_token_id=0
    )
    tokens = torch.randint(
        0,
        args.vocab,
        (args.excerpts, args.tokens),
        generator=torch.Generator().manual_seed(1),
    )
    runs = {"bare trunk": lambda: bare_trunk(model, tokens, args.batch)}
    variants = (
        {**VARIANTS, "all of it and a token table": {"token_table": True}}
        if args.table
        else VARIANTS
    )
    for name, options in variants.items():
        arguments = {
            "n_tokens": args.tokens,
            "batch_size": args.batch,
            "progress": False,
            **options,
        }
        runs[name] = lambda arguments=arguments: collect(model, tokens, **arguments)
    if args.store:
        runs["store every activation"] = lambda: store_everything(
            model, tokens, args.batch
        )
    if args.transformer_lens:
        from transformer_lens.model_bridge import TransformerBridge

        bridge = TransformerBridge.boot_transformers(
            "gpt2", hf_model=gpt2_small(args.layers).hf, dtype=torch.float32
        )
        runs["TransformerLens cache of maxima"] = lambda: lens_cache(
            bridge, tokens, args.batch
        )
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with fast_matmul(model, not args.stock):
        runs["bare trunk"]()  # warm up
        for _ in range(args.rounds):
            for name, run in runs.items():
                seconds[name].append(measure(run)[0])
    kind = "PyTorch's own products" if args.stock else "oneDNN products"
    print(
        f"{args.threads} thread(s), {args.excerpts} x {args.tokens} tokens, batches of"
        f" {args.batch}, {kind}"
    )
    for name, values in seconds.items():
        ratio = statistics.median(
            v / b for v, b in zip(values, seconds["bare trunk"], strict=True)
        )
        print(f"{name:40s} {statistics.median(values):6.2f} CPU s  {ratio:5.2f}x")
    print(
        "peak memory"
        f" {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB"
    )


if __name__ == "__main__":
    main()
