"""The methods on real weights, in CPU seconds: what a reader waits for, the plain way
beside it.

    python benchmarks/smollm2.py [trace] [vectors] [circuit] [--threads 1]

`trace`: three components of one fact, 10 samples, against the plain loop (whole passes,
from a tenth of the cells). `vectors`: the indirect effects of all heads of one task, 25
trials, against one pass per head (from a tenth of the heads). `circuit`: ACDC on 16
pairs at a threshold of .02; the plain way is one pass per tested edge (from 20 edges).
Peak memory is that of the process: run one part at a time to read it.
"""

import argparse
import random
import resource

import torch
from common import measure

from mechtut.experiments.smollm2 import EXAMPLE, ioi_batch
from mechtut.models.hooks import Edit, capture, intervene
from mechtut.models.loading import embedding_std, load_model
from mechtut.papers.acdc import acdc
from mechtut.papers.causal_tracing import trace, window_layers
from mechtut.papers.function_vectors import indirect_effect
from mechtut.patching.matmul import fast_matmul
from mechtut.prompts.few_shot import encode, load_task, sample_prompts
from mechtut.prompts.mean_activations import mean_head_activations
from mechtut.prompts.subject_noise import corrupt, find_subject

WINDOW, SAMPLES = 6, 10


def tracing(model) -> None:
    """Three panels of one fact."""
    prompt, subject = EXAMPLE
    ids, span = model.to_tokens(prompt), find_subject(model, prompt, subject)
    noise = corrupt(model, 3.0, SAMPLES, span, 1)
    batch, total = ids.repeat(SAMPLES, 1), 0.0
    answer = int(model.logits(ids)[0, -1].argmax())
    draw = random.Random(0)
    for component in ("resid_post", "mlp_out", "attn_out"):
        options = {"component": component, "window": WINDOW, "n_samples": SAMPLES}
        took, found = measure(lambda o=options: trace(model, prompt, subject, **o))
        total += took
        clean = capture(model, ids, component)[component][:, 0]
        cells = [(p, i) for p in range(len(ids)) for i in range(model.n_layers)]
        some = draw.sample(cells, len(cells) // 10)

        def plain(some=some, clean=clean, component=component, found=found):
            worst = 0.0
            for pos, layer in some:
                around = window_layers(layer, WINDOW, model.n_layers)
                around = [layer] if component == "resid_post" else around
                edits = [Edit(component, i, clean[i, pos], pos=pos) for i in around]
                with intervene(model, [noise.edit(), *edits]):
                    p = model.logits(batch)[:, -1].softmax(-1)[:, answer].mean()
                worst = max(worst, abs(float(p - found.scores[pos, layer])))
            return worst

        slow, worst = measure(plain)
        slow *= len(cells) / len(some)
        print(
            f"{component}: {took:.1f} s, plain {slow:.0f} s ({slow / took:.1f}x),"
            f" {len(cells)} cells, apart by {worst:.1g}",
            flush=True,
        )
    print(f"three panels: {total:.0f} CPU s (wanted: 90)")


def vectors(model) -> None:
    """All heads' indirect effects of one task."""
    task = load_task("everyday/antonym")
    prompts = sample_prompts(task, 25, 5, 42, "shuffle")
    means = mean_head_activations(model, sample_prompts(task, 25, 5))
    took, effects = measure(lambda: indirect_effect(model, prompts, means))
    heads = [(i, h) for i in range(model.n_layers) for h in range(model.n_heads)]
    some = random.Random(0).sample(heads, len(heads) // 10)

    def plain():
        worst = 0.0
        for i, prompt in enumerate(prompts[:5]):
            ids, target = encode(model, prompt)
            before = model.logits(ids)[0, -1].softmax(-1)[target]
            for layer, head in some:
                edit = Edit("z", layer, means[layer, head], pos=-1, head=head)
                with intervene(model, [edit]):
                    after = model.logits(ids)[0, -1].softmax(-1)[target]
                worst = max(worst, abs(float(after - before - effects[i, layer, head])))
        return worst

    slow, worst = measure(plain)
    slow *= 5 * len(heads) / len(some)
    print(
        f"effects: {took:.0f} CPU s (wanted: 60), plain {slow:.0f} s"
        f" ({slow / took:.0f}x), apart by {worst:.1g}"
    )


def circuit(model) -> None:
    """A search on sixteen pairs."""
    shown, _ = ioi_batch(model, 16, 16)
    pair = shown["clean"], shown["corrupted"]
    how = {"threshold": 0.02, "progress": False}
    took, found = measure(lambda: acdc(model, *pair, **how))
    one, _ = measure(lambda: [model.logits(pair[0]) for _ in range(3)])
    slow = one / 3 * len(found.tested)
    print(
        f"ACDC: {took:.0f} CPU s (wanted: 300), {len(found.tested)} edges tested,"
        f" {len(found.found)} kept; a whole pass for each: {slow:.0f} s"
        f" ({slow / took:.0f}x)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {"trace": tracing, "vectors": vectors, "circuit": circuit}
    parser.add_argument("parts", nargs="*", default=list(parts))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model("smollm2", device="cpu")
    with fast_matmul(model):  # the plain ways get the fast products as well
        print(f"noise unit {embedding_std(model):.3f}")
        for part in args.parts:
            parts[part](model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.1f} GB (wanted: 3)")


if __name__ == "__main__":
    main()
