"""ROME: one edit and the key statistics, ours against the plain way, on a seeded
GPT-2-small-shaped model.

    python benchmarks/rome.py [--layer 8] [--texts 64] [--rounds 3]

The plain edit runs the whole model on all 22 prompts for each of the 20 loss
evaluations, reads out every position, and goes back through every layer. The statistics
are compared with nothing but the forward passes over the same texts (without the
unembedding).
"""

import argparse
import statistics

import torch
from common import gpt2_small, measure
from transformers import PreTrainedTokenizerFast

from mechtut.editing.covariance import key_covariance
from mechtut.editing.requests import context_templates, locate
from mechtut.editing.weights import mlp_projection
from mechtut.mini.world import World
from mechtut.models.loading import Model, mask_arguments, pad_right
from mechtut.models.weights import mini_folder
from mechtut.papers.rome import RomeConfig, _optimise, _problem
from mechtut.patching.matmul import fast_matmul
from mechtut.prompts.facts import target_ids

PROMPT, SUBJECT, TARGET = "{} works as a", "Martin Riley", "teacher"


def plain_loop(
    model: Model, layer: int, templates: tuple[str, ...], config: RomeConfig
) -> list[float]:
    """The optimisation of the value as the paper's code does it: whole forward passes,
    all logits.
    """
    goal = target_ids(model, TARGET)
    found = [locate(model, t.format(PROMPT), SUBJECT) for t in templates] + [
        locate(model, config.kl_prompt, SUBJECT)
    ]
    tokens, mask = pad_right([t for t, _ in found])
    at, ends = torch.tensor([p for _, p in found]), mask.sum(1) - 1
    rows = torch.arange(len(found))
    delta = torch.zeros(model.d_model, requires_grad=True)
    adam, clean, losses = torch.optim.Adam([delta], lr=config.learning_rate), {}, []

    def add(_module, _args, out):
        clean.setdefault("value", out[0, at[0]].detach().clone())
        return out.index_put((rows, at), delta.expand(len(rows), -1), accumulate=True)

    hook = mlp_projection(model, layer).register_forward_hook(add)
    for step in range(config.steps):
        log_probs = model.hf(
            input_ids=tokens, use_cache=False, **mask_arguments(mask)
        ).logits.log_softmax(-1)
        after = log_probs[-1, at[-1]]
        before = clean.setdefault("distribution", after.detach())
        nll = -log_probs[rows[:-1], ends[:-1], goal[0]].mean()
        kl = torch.nn.functional.kl_div(
            before[None], after[None], log_target=True, reduction="batchmean"
        )
        length = clean["value"].norm()
        loss = (
            nll + config.kl_factor * kl + config.weight_decay * delta.norm() / length**2
        )
        losses.append(float(loss.detach()))
        if losses[-1] < config.stop_loss or step == config.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            if delta.norm() > config.clamp * length:
                delta.mul_(config.clamp * length / delta.norm())
    hook.remove()
    return losses


def ours(
    model: Model, layer: int, templates: tuple[str, ...], config: RomeConfig
) -> list[float]:
    """The same optimisation from the edited layer up, reading out the positions that
    count.
    """
    with fast_matmul(model):
        problem = _problem(
            model, PROMPT, SUBJECT, TARGET, templates, config.kl_prompt, "subject_last"
        )
        return _optimise(model, problem, layer, config)[1]


def bare(model: Model, texts: list[str]) -> None:
    """Forward passes over the texts, in batches of similar length, without the
    unembedding.
    """
    rows = sorted((model.to_tokens(t) for t in texts), key=len)
    with fast_matmul(model), torch.no_grad():
        for i in range(0, len(rows), 32):
            tokens, mask = pad_right(rows[i : i + 32])
            model.hf.base_model(
                input_ids=tokens, use_cache=False, **mask_arguments(mask)
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, config = (
        gpt2_small(tokenizer=PreTrainedTokenizerFast.from_pretrained(mini_folder())),
        RomeConfig(),
    )
    templates = context_templates(model)
    pairs = [
        (
            measure(lambda: plain_loop(model, args.layer, templates, config))[0],
            measure(lambda: ours(model, args.layer, templates, config))[0],
        )
        for _ in range(args.rounds)
    ]
    plain, fast = (statistics.median(column) for column in zip(*pairs, strict=True))
    a, b = (
        plain_loop(model, args.layer, templates, config),
        ours(model, args.layer, templates, config),
    )
    worst = max(abs(x - y) for x, y in zip(a, b, strict=True))
    print(
        f"one edit at layer {args.layer}: plain {plain:.1f} s, ours {fast:.1f} s,"
        f" {plain / fast:.1f}x"
    )
    print(f"largest difference of a loss {worst:.0e}")
    facts = World().facts
    texts = [" ".join(f.prompt for f in facts[i : i + 8]) for i in range(args.texts)]
    for layer in (args.layer, model.n_layers - 1):
        pairs = [
            (
                measure(lambda: bare(model, texts))[0],
                measure(lambda i=layer: key_covariance(model, texts, i))[0],
            )
            for _ in range(args.rounds)
        ]
        passes, statistic = (
            statistics.median(column) for column in zip(*pairs, strict=True)
        )
        print(
            f"keys of layer {layer}: passes {passes:.1f} s, statistics"
            f" {statistic:.1f} s, {statistic / passes:.2f}x"
        )


if __name__ == "__main__":
    main()
