"""Arguments of the right type with a wrong meaning: right, or an error of ours.

`attack.txt` has the calls. Below each stands what must come of it: after `=` the
value, or the error with words of its message. An error counts only if a `raise` of this
package told it, so that no message of a library below gets through.
"""

import ast
import collections
import copy
import importlib
import linecache
import math
import random
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import mechtut
from mechtut.__main__ import main
from mechtut.mini.training import main as mini_main
from mechtut.papers.patchscopes import extract as extract_attribute
from mechtut.patching import places
from mechtut.prompts.accuracy import known_queries
from mechtut.steering.sweeps import sweep as steering_sweep

PACKAGE = str(Path(mechtut.__file__).parent)
# in this order: of two things with one name the later one is meant
ROOMS = {
    "steering": "vectors acting ablation sweeps evaluation reading heads formats",
    "grokking": "network training fourier measures",
    "models": "files weights hooks loading",
    "patching": "checkpoints results partial last_token replay patchscope_texts"
    " places layer_maps patchscopes",
    "prompts": "subject_noise facts few_shot accuracy completions everyday"
    " mean_activations",
    "editing": "covariance evaluation requests weights",
    "circuits": "graph metrics runs circuit attribution baselines refining known",
    "lenses": "probes trajectory attribution causal_basis future jacobian tuned",
    "neurons": "records collect statistics rules scoring judging explainer_prompts",
    "papers": "steering patchscopes rome acdc neuron_explanation function_vectors"
    " causal_tracing",
}
# by their own name: they have things that others have too
WHOLE = [
    "exercises",
    "experiments.smollm2",
    "experiments.report_card",
    "mini.corpus",
    "mini.evaluation",
    "mini.tokenizer",
    "mini.training",
    "mini.world",
]


class Refused(Exception):
    """What the command line says, with exit code 2 and without a traceback."""


def read() -> dict[str, list[tuple[str, str]]]:
    """Calls and what must come of them, by section."""
    found: dict[str, list[tuple[str, str]]] = {}
    lines = Path(__file__).with_name("attack.txt").read_text("utf-8")
    section, call = "", ""
    for line in filter(None, lines.splitlines()):
        if line.startswith("# "):
            section = line[2:]
        elif line.startswith("    "):
            found.setdefault(section, []).append((call, line.strip()))
        else:
            call = line
    return found


TABLE = read()
SEEN = collections.Counter()


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the calls speak of: public names, a model, prompts, records, a graph."""
    every: dict = {}
    for package, rooms in ROOMS.items():
        for room in rooms.split():
            has = importlib.import_module(f"mechtut.{package}.{room}")
            every |= {n: getattr(has, n) for n in has.__all__}
    for module in WHOLE:
        every[module.split(".")[-1]] = importlib.import_module(f"mechtut.{module}")
    every |= {"np": np, "torch": torch, "pd": pd, "math": math, "Path": Path}
    tmp = tmp_path_factory.mktemp("attack")

    def file(name: str, content: str | bytes) -> Path:
        data = content.encode() if isinstance(content, str) else content
        (tmp / name).write_bytes(data)
        return tmp / name

    def changed(case: dict, *path: str, to: object = None, gone: bool = False) -> dict:
        """A record in which one part is another, or gone."""
        out = at = copy.deepcopy(case)
        for name in path[:-1]:
            at = at[name]
        at[path[-1]] = to
        if gone:
            del at[path[-1]]
        return out

    m = every["load_model"]("mini", device="cpu")
    world = every["world"].World()
    fact = world.facts[1]
    prompt, subject = fact.prompt, fact.subject
    ids = m.to_tokens(prompt)
    task = every["load_task"]("antonym")
    texts = [f.prompt for f in world.facts[:40]]
    records = every["collect"](m, texts, layers=[0], n_top=8, n_random=6, n_tokens=8)
    rec = records[0, int(records.to_pandas()["max"].argmax())]
    told = every["collect"](
        m, texts, layers=[0], n_top=2, n_random=1, n_tokens=8, token_table=True
    )
    made = every["induction"](2)
    contrast = every["Contrast"](made.model, made.clean, made.corrupted)
    given = (made.model, made.clean, made.corrupted)
    template = prompt.replace(subject, "{}")
    return every | {
        "tmp": tmp,
        "file": file,
        "changed": changed,
        "m": m,
        "V": m.d_vocab,
        "D": m.d_model,
        "L": m.n_layers,
        "H": m.n_heads,
        "worlds": every["world"],
        "world": world,
        "fact": fact,
        "P": prompt,
        "S": subject,
        "Q": template,
        "T": ids,
        "B": ids[None],
        "N": len(ids),
        "task": task,
        "prompts": every["sample_prompts"](task, 3, 2),
        "means": torch.zeros(m.n_layers, m.n_heads, m.d_head),
        "fv": torch.zeros(m.d_model),
        "fv_evaluate": every["evaluate"],
        "Source": places.Source,
        "extract_attribute": extract_attribute,
        "known": known_queries,
        "case": every["world_cases"](world, 1)[0],
        "cov": torch.eye(4 * m.d_model),
        "texts": texts,
        "recs": records,
        "told": told,
        "rec": rec,
        "none": every["NeuronRecord"](0, 0, [], []),
        "rule": every["explain"](rec),
        "judge": every["SimulatorJudge"](every["RuleSimulator"]()),
        "X": given,
        "made": made,
        "C": contrast,
        "G": contrast.graph,
        "E": made.truth[0],
        "other": every["Graph"](3, 4),
        "es": every["attribution_scores"](*given, steps=1),
        "ps": every["attribution_by_position"](contrast, steps=1),
        "circ": every["acdc"](*given, threshold=0.1, progress=False),
        "tr": every["trace"](m, prompt, subject, n_samples=2),
        "edit": every["fine_tune"](m, template, subject, " nurse", layer=2, steps=1),
        "who": every["evaluation"].Candidate(m),
        "tsk": world.tasks["plural"],
        "rng": random.Random(0),
        "sv": every["mean_difference"](m, [(prompt, "Paris is in")]),
        "steering_sweep": steering_sweep,
        "odds": every["TokenOdds"]((5,), (7,)),
    }


@cache
def statements(file: str) -> list[ast.Raise]:
    tree = ast.parse("".join(linecache.getlines(file)))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]


def told_by_us(error: BaseException) -> bool:
    """Whether a `raise` of this package made an error."""
    last = error.__traceback__
    while last.tb_next:
        last = last.tb_next
    file = last.tb_frame.f_code.co_filename
    return file.startswith(PACKAGE) and any(
        s.lineno <= last.tb_lineno <= s.end_lineno for s in statements(file)
    )


def command(run, capsys):
    """The command line as a function: `Refused` with its last line for exit code 2."""

    def call(*arguments: str) -> int:
        capsys.readouterr()
        try:
            code = run(list(arguments))
        except SystemExit as stop:  # of argparse
            code = stop.code
        said = capsys.readouterr().err.strip().splitlines()
        if code == 2:
            raise Refused(said[-1])
        return code

    return call


def equal(found, wanted) -> bool:
    if isinstance(wanted, torch.Tensor):
        return torch.equal(found, wanted)
    if isinstance(wanted, float) and math.isnan(wanted):
        return math.isnan(found)
    return type(found) is type(wanted) and found == wanted


def attack(call: str, wanted: str, names: dict) -> str:
    """What came of a call: "right" or "clear"; fails for anything else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = eval(call, names)
        except Exception as error:
            ours = isinstance(error, Refused) or told_by_us(error)
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            assert ours, f"{call}: raw {said}"
            kind, _, words = wanted.partition(": ")
            assert type(error).__name__ == kind and words in said, f"{call}: {said}"
            return "clear"
    assert wanted.startswith("= "), f"{call}: let in, {found!r:.200}"
    assert equal(found, eval(wanted[2:], names)), f"{call}: {found!r:.200}"
    return "right"


@pytest.mark.parametrize("section", TABLE)
def test_every_call_is_right_or_clearly_refused(section, names, capsys):
    names = {
        **names,
        "cli": command(main, capsys),
        "mini_cli": command(mini_main, capsys),
    }
    for call, wanted in TABLE[section]:
        SEEN[attack(call, wanted, names)] += 1


def test_counts(capsys):
    n = sum(map(len, TABLE.values()))
    assert n >= 300 and len({c for rows in TABLE.values() for c, _ in rows}) == n
    with capsys.disabled():
        print(f"\n{n} hostile calls: {SEEN['clear']} clear, {SEEN['right']} right")


def test_a_raw_error_and_a_wrong_value_are_noticed(names):
    with pytest.raises(AssertionError, match="raw KeyError"):
        attack("{}['x']", "KeyError: x", names)
    with pytest.raises(AssertionError, match="raw IndexError"):
        attack("torch.zeros(2)[3]", "IndexError: index", names)
    with pytest.raises(AssertionError, match="let in"):
        attack("m.to_tokens('a')", "ValueError: empty", names)
    with pytest.raises(AssertionError):
        attack("len(recs)", "= 1", names)
