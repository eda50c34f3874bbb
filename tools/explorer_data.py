"""Write what the pages below docs/explore show: `python tools/explorer_data.py [PART]`.

From SmolLM2, the embedded model and the results that the package stores, into
docs/_static/explore/.

Ten minutes of one core. `tests/test_explore.py` computes an entry of each file again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from mechtut import Edit, Model, Replay, World, capture, load_model
from mechtut.circuits.circuit import Circuit
from mechtut.circuits.drawing import arrows
from mechtut.experiments.smollm2 import (
    NEURON_LAYERS,
    THRESHOLDS,
    ioi_batch,
    neurons,
    stored,
    well_known,
)
from mechtut.models.loading import embedding_std, weight_fingerprint
from mechtut.neurons.records import NeuronRecords
from mechtut.papers.causal_tracing import window_layers
from mechtut.prompts.everyday import EverydayFact
from mechtut.prompts.subject_noise import Noise, corrupt, find_subject
from mechtut.viz.plots import COMPONENTS

ROOT = Path(__file__).resolve().parents[1]
INTO = ROOT / "docs/_static/explore"
FACTS = (0, 7, 10, 11, 15, 31, 36, 49)  # of the sixty that the page averages over
TRACING = {"n_samples": 3, "seed": 1, "window": 6}  # as on the page
N_EXAMPLES, N_TOP = 3, 3
N_SEARCH, N_HELD_OUT = 16, 32  # pairs of prompts behind the stored circuits
EXAMPLES = (  # name, source, target, level, position
    (
        "A job",
        "Everyone knows that Martin Riley works as a",
        "Everyone knows that Taylor James works as a",
        4,
        4,
    ),
    (
        "A pronoun",
        "Ruth is a good friend, and",
        "Victor is a good friend, and",
        4,
        0,
    ),
    (
        "Who gets it",
        "While Sofia and Frank sat in the market, Frank brought a map to",
        "While Sofia and Frank sat in the market, Helen brought a map to",
        5,
        13,
    ),
    (
        "A maker",
        "Everyone knows that the Tovara Mini is made by",
        "Everyone knows that the Pixota Mini is made by",
        6,
        9,
    ),
)


class Words:
    """Tokens as text, each kept once; `number` is what the files say instead."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        """The number of a token's text, a new one if it has none."""
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(text)
        return self._numbers[text]


def about(model: Model) -> dict[str, Any]:
    """What every file says about where it comes from."""
    return {
        "model": model.name,
        "weights": weight_fingerprint(model),
        "made_by": "tools/explorer_data.py",
    }


def rounded(values: torch.Tensor) -> list[float]:
    """All values in one list, with four digits behind the point."""
    return [round(v, 4) for v in values.flatten().tolist()]


def noise_of(model: Model, facts: list[EverydayFact]) -> Noise:
    """The page's noise: three standard deviations of these subjects' embeddings."""
    return Noise(3.0, std=embedding_std(model, [f.subject for f in facts]))


def trace_cells(
    model: Model, fact: EverydayFact, noise: Noise, component: str
) -> tuple[torch.Tensor, int]:
    """What the model says with each state restored, mean over noise samples.

    Returns:
        A row per position and layer and one for the corrupted run: the probability of
        the answer, then the likeliest tokens, then their probabilities. And the answer.
    """
    ids = model.to_tokens(fact.prompt)
    span = find_subject(model, fact.prompt, fact.subject)
    n_samples, window = TRACING["n_samples"], TRACING["window"]
    drawn = corrupt(model, noise, n_samples, span, TRACING["seed"])
    clean = capture(model, ids[None], component)
    answer, states = int(clean.logits[0, -1].argmax()), clean[component][:, 0]

    def said(logits: torch.Tensor) -> torch.Tensor:
        p = logits[..., -1, :].softmax(-1).mean(1)  # over samples
        top = p.topk(N_TOP)
        return torch.cat([p[:, [answer]], top.indices.to(p), top.values], -1)

    width = 1 if component == "resid_post" else window
    cells = []
    for pos in range(len(ids)):
        for layer in range(model.n_layers):
            around = window_layers(layer, width, model.n_layers)
            cells.append([Edit(component, i, states[i, pos], pos=pos) for i in around])
    replay = Replay(model, ids.repeat(n_samples, 1), base_edits=[drawn.edit()])
    found = replay.run(cells, said, progress=False)
    return torch.cat([found, said(replay.base_logits()[None])]), answer


def traces(model: Model) -> dict[str, Any]:
    """Eight facts, traced cell by cell."""
    known, words = well_known(model), Words()
    noise, out = noise_of(model, known), []
    for fact in (known[i] for i in FACTS):
        ids = model.to_tokens(fact.prompt)
        clean = model.logits(ids)[0, -1].softmax(-1)
        parts = {}
        for component in COMPONENTS:
            found, answer = trace_cells(model, fact, noise, component)
            tokens = found[:, 1 : 1 + N_TOP].long().flatten().tolist()
            parts[component] = {
                "p": rounded(found[:-1, 0]),
                "top": [words.number(model.decode([t])) for t in tokens],
                "top_p": rounded(found[:, 1 + N_TOP :]),
            }
        top = clean.topk(N_TOP)
        out.append(
            {
                "prompt": fact.prompt,
                "relation": fact.relation,
                "tokens": model.to_str_tokens(ids),
                "subject": find_subject(model, fact.prompt, fact.subject),
                "answer": model.decode([answer]),
                "clean": round(float(clean[answer]), 4),
                "clean_top": [
                    words.number(model.decode([t])) for t in top.indices.tolist()
                ],
                "clean_top_p": rounded(top.values),
                "corrupted": round(float(found[-1, 0]), 4),
                "parts": parts,
            }
        )
        print(fact.prompt, flush=True)
    settings = {**TRACING, "noise": str(noise), "layers": model.n_layers}
    return {**settings, "words": words.texts, "facts": out}


def circuits(model: Model) -> dict[str, Any]:
    """The stored circuits of indirect objects, and where each head looks."""
    found = [stored(f"circuits/threshold-{t:g}", Circuit) for t in THRESHOLDS]
    measured = stored("circuits/sweep").to_dict("records")
    _, held = ioi_batch(model, N_SEARCH, N_HELD_OUT)
    ids = held["clean"][0]
    pattern = capture(model, ids[None], "pattern")["pattern"][:, 0]
    lower = torch.ones(len(ids), len(ids)).tril().bool()
    return {
        "layers": model.n_layers,
        "heads": model.n_heads,
        "n_edges": found[0].n_edges_full,
        "n_search": N_SEARCH,
        "n_held_out": N_HELD_OUT,
        "prompt": model.to_str_tokens(ids),
        "corrupted": model.to_str_tokens(held["corrupted"][0]),
        "right": model.decode([int(held["right"][0])]),
        "wrong": model.decode([int(held["wrong"][0])]),
        "circuits": [
            {
                **row,
                "problems": circuit.problems,
                "arrows": [
                    [a, b, part, float(f"{effect:.3g}")]
                    for a, b, part, effect in arrows(circuit.edges, circuit.graph)
                ],
            }
            for circuit, row in zip(found, measured, strict=True)
        ],
        "effects": {
            row["head"]: {k: v for k, v in row.items() if k != "head"}
            for row in stored("circuits/heads").to_dict("records")
        },
        # thousandths, the lower triangle row by row
        "patterns": {
            f"{layer}.{head}": (1000 * pattern[layer, head][lower])
            .round()
            .int()
            .tolist()
            for layer in range(model.n_layers)
            for head in range(model.n_heads)
        },
    }


def example_rows(
    records: NeuronRecords, numbers: dict[tuple[str, ...], int], at: tuple[int, int]
) -> tuple[float, list[list[int]]]:
    """A neuron's largest activation, and its strongest excerpts: the excerpt's number,
    then each token's activation in thousandths of the largest (negative ones as 0).
    """
    top = records[at].top[:N_EXAMPLES]
    largest = max(top[0].activations)
    return largest, [
        [numbers[tuple(r.tokens)]]
        + [
            max(0, round(1000 * a / largest)) if largest > 0 else 0
            for a in r.activations
        ]
        for r in top
    ]


def neuron_entries(model: Model, folder: Path | None) -> dict[str, Any]:
    """The stored neurons with their strongest excerpts."""
    records = neurons(model, NEURON_LAYERS, folder)
    ends = {1: records, -1: records.negative}
    vocabulary, words = records.vocabulary, Words()
    excerpts = {
        i: tuple(vocabulary[int(t)] for t in row)
        for i, row in sorted(records.kept.excerpts.items())
    }
    numbers: dict[tuple[str, ...], int] = {}
    for tokens in excerpts.values():
        numbers.setdefault(tokens, len(numbers))
    entries, table = [], stored("neurons/scores")
    spoken = table[table.sentence.notna()]
    for row in spoken.to_dict("records"):
        at = int(row["layer"]), int(row["neuron"])
        largest, examples = example_rows(ends[row["end"]], numbers, at)
        scores = [row[k] for k in ("rules", "table", "neighbour's rules")]
        entries.append(
            {
                "at": [*at, row["end"]],
                "rule": row["sentence"],
                # a score is missing where the neuron or its simulation does not vary
                "scores": [None if s != s else round(s, 3) for s in scores],
                "density": row["density"],
                "max": float(f"{largest:.3g}"),
                "examples": examples,
            }
        )
    return {
        "layers": list(NEURON_LAYERS),
        "silent": len(table) - len(spoken),
        "excerpts": [[words.number(t) for t in tokens] for tokens in numbers],
        "words": words.texts,
        "neurons": entries,
    }


def carried(model: Model, example: dict[str, Any]) -> torch.Tensor:
    """Probabilities of the next token of an example's second prompt, with the state of
    the first one carried over.
    """
    site, layer = ("resid_post", example["level"] - 1)
    source, target = (model.to_tokens(example[k]) for k in ("source", "target"))
    state = capture(model, source[None], site)[site, layer][0, example["from"]]
    edit = Edit(site, layer, state, pos=example["to"])
    return capture(model, target[None], [], edits=[edit]).logits[0, -1].softmax(-1)


def examples(model: Model) -> dict[str, Any]:
    """Pairs of prompts for the embedded model, its words, and what Python says."""
    world, out = World(), []

    def likeliest(p: torch.Tensor) -> list[list[Any]]:
        top = p.topk(N_TOP)
        pairs = zip(top.indices.tolist(), rounded(top.values), strict=True)
        return [[model.decode([token]), value] for token, value in pairs]

    for name, source, target, level, at in EXAMPLES:
        one = {"name": name, "source": source, "target": target}
        one |= {"level": level, "from": at, "to": at}
        for key in ("source", "target"):
            p = model.logits(model.to_tokens(one[key]))[0, -1].softmax(-1)
            one[f"{key}_says"] = likeliest(p)
        out.append({**one, "carried_says": likeliest(carried(model, one))})
    words = {w.strip() for w in world.words if len(model.encode(w.strip())) == 1}
    known = {
        "words": sorted(w for w in words if w.isalpha()),
        "endings": sorted(world.suffixes),
    }
    return {**known, "examples": out}


def main() -> None:
    parts = {
        "traces": traces,
        "circuits": circuits,
        "neurons": lambda m: neuron_entries(m, None),
        "examples": examples,
    }
    parser = argparse.ArgumentParser(description="Data of the pages to explore.")
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[])
    asked = parser.parse_args().parts or list(parts)
    INTO.mkdir(parents=True, exist_ok=True)
    for name in asked:
        model = load_model("mini" if name == "examples" else "smollm2", device="cpu")
        data = {**about(model), **parts[name](model)}
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        (INTO / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(f"{name}.json: {len(text.encode()) / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
