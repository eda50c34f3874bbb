"""All pairs of layers of token identity on SmolLM2, against whole passes.

    python benchmarks/patchscopes.py [--prompts 20] [--sample 24] [--rows] [--float64]

The plain way writes the states with hooks and runs the whole model once for each pair
of layers, all prompts in one batch, with the same matrix products; its time is
extrapolated from the pairs named by --sample, drawn at random. With --rows it takes one
pass for each prompt and pair instead. With --float64 both are held against whole passes
in double precision, which tells what rounding alone does. The bound is what has to be
computed in any case, the blocks above each target layer for one token and the
unembedding of each cell, at the pace of large batches.
"""

import argparse
import copy
import random
import resource

import torch
from common import measure

from mechtut.models.hooks import Edit, intervene
from mechtut.models.loading import load_model
from mechtut.patching.matmul import fast_matmul
from mechtut.patching.patchscopes import IDENTITY_PROMPT, patchscope_grid

COUNTRIES = ["France", "Japan", "Italy", "Spain", "Germany", "Greece", "Egypt"]
PROMPTS = [
    *(f"The capital of {country} is" for country in COUNTRIES),
    *(f"The largest city in {country} is" for country in COUNTRIES),
    "The opposite of hot is",
    "The opposite of left is",
    "One, two, three, four,",
    "Monday, Tuesday, Wednesday,",
    "The sun rises in the",
    "The Eiffel Tower is in the city of",
]


def last_states(model, prompts):
    """The state of each prompt's last token after every block, one pass each."""
    found = []
    for prompt in prompts:
        seen = []
        hooks = [
            block.register_forward_hook(
                lambda _block, _args, out, seen=seen: seen.append(
                    (out[0] if isinstance(out, tuple) else out)[0, -1]
                )
            )
            for block in model.blocks
        ]
        model.logits(prompt)
        for hook in hooks:
            hook.remove()
        found.append(torch.stack(seen))
    return torch.stack(found)  # [prompt, layer, d_model]


def whole_pass(model, prompts, target, source_layer, target_layer):
    """Logits of the target with each prompt's state written into it by a hook."""
    states = last_states(model, prompts)
    value = states[:, source_layer][:, None]
    with (
        torch.no_grad(),
        intervene(model, [Edit("resid_post", target_layer, value, pos=-1)]),
    ):
        return model.logits(target.expand(len(prompts), -1))[:, -1]


def surprisal(logits, tokens):
    """Of each row's token, in nats."""
    return -logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def main() -> None:
    """The grid beside its plain loop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--sample", type=int, default=24)
    parser.add_argument("--rows", action="store_true")
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model("smollm2", device="cpu")
    prompts = PROMPTS[: arguments.prompts]
    target, n_layers = model.to_batch(IDENTITY_PROMPT), model.n_layers
    n_cells = len(prompts) * n_layers**2
    print(f"{len(prompts)} prompts, {n_cells} cells, {target.shape[1]} target tokens")

    @torch.no_grad()
    def blocks_alone():
        model.hf.model(input_ids=target.expand(24, -1), use_cache=False)

    states = last_states(model, prompts)

    @torch.no_grad()
    def unembedding_alone():
        model.unembed(states[:, :12].flatten(0, 1))

    with fast_matmul(model):
        blocks_alone(), unembedding_alone()
        pace = measure(blocks_alone)[0] / (24 * target.shape[1] * n_layers)
        reading = measure(unembedding_alone)[0] / (12 * len(prompts))
    token_layers = len(prompts) * n_layers * n_layers * (n_layers - 1) / 2
    bound = pace * token_layers + reading * n_cells

    def engine():
        return patchscope_grid(model, prompts, progress=False)

    took, grid = measure(engine)
    pairs = [(a, b) for a in range(n_layers) for b in range(n_layers)]
    some = random.Random(0).sample(pairs, arguments.sample)

    def plain():
        logits = []
        for a, b in some:
            rows = [[i] for i in range(len(prompts))]
            for members in rows if arguments.rows else [range(len(prompts))]:
                value = states[list(members), a][:, None]
                tokens = target.expand(len(members), -1)
                edit = Edit("resid_post", b, value, pos=-1)
                with fast_matmul(model), intervene(model, [edit]):
                    logits.append(model.logits(tokens)[:, -1])
        return torch.cat(logits).unflatten(0, (len(some), -1))

    if arguments.float64:
        exact = load_model(copy.deepcopy(model.hf).double(), model.tokenizer)
        told = {"plain": 0.0, "engine": 0.0}
        for a, b in some:
            cell = grid.surprisal_of_source_under_readout[:, a, b]
            tops, wanted = grid.source_top, whole_pass(exact, prompts, target, a, b)
            apart = surprisal(wanted, tops) - cell
            told["engine"] = max(told["engine"], float(apart.abs().max()))
            apart = surprisal(wanted, tops)
            apart -= surprisal(whole_pass(model, prompts, target, a, b), tops)
            told["plain"] = max(told["plain"], float(apart.abs().max()))
        print("surprisals apart from float64's, nats:", told)
        return

    slow, logits = measure(plain)
    slow *= len(pairs) / len(some)
    apart = 0.0
    for (a, b), found in zip(some, logits, strict=True):
        log_q = found.double().log_softmax(-1)
        wanted = -log_q.gather(1, grid.source_top[:, None])[:, 0]
        told = grid.surprisal_of_source_under_readout[:, a, b]
        apart = max(apart, float((told - wanted).abs().max()))
        assert (log_q.argmax(-1) == grid.top[:, a, b]).all()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"engine {took:.1f} s, plain {slow:.0f} s ({slow / took:.1f}x), bound"
        f" {bound:.1f} s ({took / bound:.2f} of it); surprisals apart by {apart:.1g}"
        f" nats, top tokens equal; peak memory {peak:.1f} GB"
    )


if __name__ == "__main__":
    main()
