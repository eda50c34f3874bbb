"""The paper's functions end to end: explain, simulate, score, revise, ablate; pages; a
real `transformers serve`.
"""

import json
import math
import re
import socket
import threading
import urllib.request
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from families import WITH_NEURONS, different, tiny
from scripted_server import Script, serving
from transformers import AutoTokenizer

from mechtut.mini.corpus import corpus
from mechtut.mini.world import World
from mechtut.models.loading import load_model
from mechtut.neurons.client import ServerError, chat
from mechtut.neurons.collect import activations_on, token_ids
from mechtut.neurons.dashboards import (
    NeuronPage,
    index_html,
    scores_by_layer,
    write_pages,
)
from mechtut.neurons.judging import SimulatorJudge, detection, fuzzing
from mechtut.papers import neuron_explanation as paper
from mechtut.papers.neuron_explanation import (
    ActivationRecord,
    Explanation,
    NeuronRecord,
    RuleExplainer,
    RuleSimulator,
    ScoredExplanation,
    Server,
    ServerExplainer,
    ServerJudge,
    ServerSimulator,
    TableExplainer,
    ablation_score,
    collect,
    divergence,
    explain,
    revise,
    score,
    score_explanation,
    simulate,
)

WORLD = World()
SPEC = {
    "collect",
    "NeuronRecords",
    "NeuronRecord",
    "ActivationRecord",
    "discretize",
    "split_records",
    "expected_value",
    "calibrate",
    "Calibration",
    "score",
    "Scores",
    "explain",
    "Explanation",
    "simulate",
    "score_explanation",
    "ScoredExplanation",
}


@pytest.fixture(scope="module")
def mini():
    return load_model("mini", device="cpu")


@pytest.fixture(scope="module")
def records(mini):
    documents = corpus(WORLD, seed=3)
    return collect(
        mini,
        [next(documents).text for _ in range(500)],
        layers=[2, 3],
        n_top=12,
        n_random=9,
        progress=False,
    )


@pytest.fixture(scope="module")
def lively(records):
    """The neuron with the largest activation: whatever the embedded model's weights, it
    is not silent.
    """
    table = records.to_pandas()
    row = table.loc[table["max"].idxmax()]
    return records[int(row.layer), int(row.neuron)]


def planted(n_top=16, n_random=12):
    """A neuron that is 2 on months and 0 elsewhere; half of the random excerpts have
    none.
    """
    names, words = (
        [" May", " June", " April"],
        [" we", " met", " in", " the", " park", "."],
    )

    def excerpt(i, name):
        text = [*words[: i % 4 + 1], name, *words[i % 3 :]]
        return ActivationRecord(text, [2.0 if t in names else 0.0 for t in text])

    random = [excerpt(i, names[i % 3] if i % 2 else " town") for i in range(n_random)]
    top = [excerpt(i, names[i % 3]) for i in range(n_top)]
    return NeuronRecord(
        1, 2, top, random, [[excerpt(i, " town") for i in range(6)]], mean=0.1
    )


def test_the_names_of_the_plan_are_here():
    assert set(paper.__all__) >= SPEC and all(
        hasattr(paper, name) for name in paper.__all__
    )


# ---- explain, simulate, score


def test_a_right_explanation_scores_one_and_a_wrong_one_nothing():
    record, reader = planted(), RuleSimulator(WORLD.category_of)
    said = explain(record, RuleExplainer(WORLD.category_of))
    assert "month words" in said.text
    right = score_explanation(record, said, reader)
    assert right.score == pytest.approx(1) and right.both.correlation == right.score
    assert score_explanation(
        record, "fires on month words", reader, calibration="linear"
    ).both.r2 == pytest.approx(1)
    assert score_explanation(record, "fires on ' the'", reader).score < 0.1
    assert math.isnan(score_explanation(record, "never fires", reader).score), (
        "NaN stays NaN"
    )


def test_scores_are_those_of_the_excerpts():
    scored = score_explanation(planted(), "fires on ' May' and on ' in'", split="test")
    rows = scored.excerpts
    assert (scored.n_top, len(rows)) == (4, 8) and len(scored.to_pandas()) == sum(
        scored.lengths
    )
    top, random = rows[:4], rows[4:]
    for part, scores in (
        (top, scored.top),
        (random, scored.random),
        (rows, scored.both),
    ):
        again = score([r[1] for r in part], [r[2] for r in part])
        assert (
            scores == pytest.approx(again, nan_ok=True)
            if isinstance(scores, float)
            else repr(scores) == repr(again)
        )


@pytest.mark.parametrize("split", ["valid", "test", "calibration"])
def test_splits_are_scored_apart(split):
    record = planted()
    tokens = {"valid": 2, "test": 3, "calibration": 1}[split]
    scored = score_explanation(record, "fires on ' May'", split=split)
    assert scored.excerpts[0][0] == record.top[tokens].tokens


def test_result_survives_the_disk(tmp_path):
    scored = score_explanation(planted(), "fires on ' May'", calibration="linear")
    scored.save(tmp_path)
    again = ScoredExplanation.load(tmp_path)
    assert (
        again.score == scored.score
        and again.excerpts == scored.excerpts
        and again.explanation == scored.explanation
    )


def test_simulating_one_or_several():
    record = planted()
    one = simulate("fires on ' May'", record.top[0])
    assert one == simulate(Explanation("fires on ' May'"), record.top[:1])[0] and len(
        one
    ) == len(record.top[0])
    table = explain(record, TableExplainer())
    assert simulate(table, record.top[0]) == pytest.approx(record.top[0].activations)


class Broken:
    """A simulator that answers with the wrong number of values, or none."""

    def __init__(self, values):
        self.values = values

    def simulate(self, _explanation, excerpts):
        return [self.values(e) for e in excerpts]


@pytest.mark.parametrize(
    "values",
    [lambda e: [0.0] * (len(e) - 1), lambda e: [math.nan] * len(e), lambda e: []],
)
def test_a_broken_simulator_is_an_error(values):
    with pytest.raises(ValueError, match="Broken gave"):
        score_explanation(planted(), "months", Broken(values))


def test_a_simulator_that_forgets_excerpts_is_an_error():
    class Forgetful:
        def simulate(self, _explanation, excerpts):
            return [[0.0] * len(e) for e in excerpts[1:]]

    with pytest.raises(ValueError, match="Forgetful simulated 0 of 1 excerpts"):
        simulate("months", planted().top[0], Forgetful())


def test_hostile_records():
    with pytest.raises(ValueError, match="too few for a valid split"):
        score_explanation(planted(3, 2), "fires on ' May'")
    with pytest.raises(ValueError, match="too few for a train split"):
        explain(NeuronRecord(0, 0, [], []))
    silent = [ActivationRecord(["a", "b"], [0.0, 0.0])] * 8
    with pytest.raises(ValueError, match="never active"):
        explain(NeuronRecord(0, 0, silent, silent))
    assert math.isnan(
        score_explanation(NeuronRecord(0, 0, silent, silent), "fires on 'a'").score
    )
    one_token = [
        ActivationRecord([" May" if i % 3 else " it"], [2.0 if i % 3 else 0.1])
        for i in range(12)
    ]
    assert score_explanation(
        NeuronRecord(0, 0, one_token, one_token), "fires on ' May'"
    ).score == pytest.approx(1)
    with pytest.raises(ValueError, match="Free text needs a language model"):
        score_explanation(planted(), "names of months")


# ---- the model's own opinion


def test_ablation(mini, lively):
    class Oracle:
        def simulate(self, _explanation, excerpts):
            truth = {
                tuple(r.tokens): r.activations for r in [*lively.top, *lively.random]
            }
            return [truth[tuple(e)] for e in excerpts]

    class Mean:
        def simulate(self, _explanation, excerpts):
            return [[1.0] * len(e) for e in excerpts]

    assert ablation_score(mini, lively, "anything", Oracle()) == pytest.approx(
        1, abs=1e-3
    )
    # a constant is calibrated to the mean over the calibration excerpts, which are not
    # the whole corpus
    assert ablation_score(mini, lively, "anything", Mean()) < 0.5


def test_ablation_without_effect_is_nan(mini, lively):
    silent = replace(lively, layer=2, neuron=0)
    down = mini.blocks[2].mlp.c_proj.weight
    kept = down[0].clone()
    with torch.no_grad():
        down[0] = 0
        try:
            assert math.isnan(ablation_score(mini, silent, "fires on ' May'"))
        finally:
            down[0] = kept


def test_divergence_by_definition():
    a, b = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    p, q = a.softmax(-1), b.softmax(-1)
    m = (p + q) / 2
    wanted = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    assert torch.allclose(divergence(a, b), wanted) and torch.allclose(
        divergence(a, a), torch.zeros(5).double()
    )
    assert float(
        divergence(torch.tensor([0.0, -1e4]), torch.tensor([-1e4, 0.0]))
    ) == pytest.approx(math.log(2))


def test_token_ids(mini, lively):
    assert mini.to_str_tokens(token_ids(mini, lively.top[0])) == lively.top[0].tokens
    with pytest.raises(ValueError, match="other tokens than the record's"):
        token_ids(mini, ActivationRecord(["In M", "ay"], [0.0, 1.0]))


@pytest.mark.parametrize("kind", different(WITH_NEURONS))
def test_every_family(kind):
    """Collect, explain, score and ablate on a tiny model of each family (its tokens are
    named by their ids).
    """
    model = load_model(tiny(kind))
    tokens = torch.randint(1, 30, (60, 8), generator=torch.Generator().manual_seed(1))
    records = collect(
        model, tokens, n_tokens=8, n_top=12, n_random=12, layers=[1], progress=False
    )
    record = max(
        (records[at] for at in list(records)[:20]),
        key=lambda r: max(r.top[0].activations),
    )
    said = explain(record, TableExplainer())
    assert -1 <= score_explanation(record, said).score <= 1
    assert ablation_score(model, record, said) <= 1 + 1e-6


# ---- revision, detection, fuzzing


def test_revision_keeps_the_better(mini, lively):
    texts = [r.text for r in lively.top[:2]] + ["In May we met.", "They came by train."]
    start = Explanation("fires on ' of'")
    better, other = revise(mini, lively, start, RuleExplainer(), texts=texts, n=2)
    assert {better.explanation, other.explanation} >= {start.text}
    assert math.isnan(other.score) or better.score >= other.score
    seen = []

    class Watching(RuleExplainer):
        def explain(self, record):
            seen.extend(record.counter_examples)
            return super().explain(record)

    revise(mini, lively, start, Watching(), texts=texts, n=3)
    assert (
        len(seen) == 3
        and seen[0].activations
        == activations_on(mini, lively.layer, lively.neuron, [seen[0].text])[
            0
        ].activations
    )


def test_detection_and_fuzzing():
    record = planted()
    judge = SimulatorJudge(RuleSimulator(WORLD.category_of))
    right, wrong = Explanation("fires on month words"), Explanation("fires on ' the'")
    assert detection(record, right, judge) == fuzzing(record, right, judge) == 1
    assert (
        detection(record, wrong, judge) <= 0.75
        and fuzzing(record, wrong, judge) <= 0.75
    )
    always = replace(record, random=record.top)
    with pytest.raises(ValueError, match="active in every random excerpt"):
        detection(always, right, judge)
    with pytest.raises(ValueError, match="to mark"):
        fuzzing(replace(record, top=[ActivationRecord(["a"], [1.0])] * 8), right, judge)


# ---- with a server


def test_the_whole_way_with_a_server(mini, tmp_path):
    pytest.importorskip("openai", reason="needs the extra 'servers'")
    record = planted()
    with serving(Script()) as url:
        server = Server("parrot", url, cache=tmp_path, backoff=0.01)
        said = explain(record, ServerExplainer(server))
        scored = score_explanation(
            record, said, ServerSimulator(server), calibration="linear"
        )
        assert (
            said.text == "names of months"
            and scored.score == pytest.approx(1, abs=1e-6)
            and scored.author == "parrot"
        )
        assert scored.both.r2 == pytest.approx(1, abs=1e-6)
        assert (
            detection(record, said, ServerJudge(server))
            == fuzzing(record, said, ServerJudge(server))
            == 1
        )
        better, _ = revise(
            mini,
            replace(record, layer=2),
            said,
            ServerExplainer(server),
            ServerSimulator(server),
        )
        assert better.score == pytest.approx(1, abs=1e-6)
        files = len(list(tmp_path.glob("*.json")))
        score_explanation(record, said, ServerSimulator(server), calibration="linear")
        assert len(list(tmp_path.glob("*.json"))) == files, "nothing is asked twice"


# ---- a real server


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A real `transformers serve` in this process, with a tiny random GPT-2 whose
    tokens are bytes.
    """
    pytest.importorskip("openai", reason="needs the extra 'servers'")
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("transformers[serving] is not installed (fastapi, uvicorn)")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.cli.serve import Serve

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(
        models.BPE({c: i for i, c in enumerate(["<|end|>", *alphabet])}, [])
    )
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|end|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor"
        " %}assistant: "
    )
    folder = tmp_path_factory.mktemp("served")
    hf = tiny("gpt2", vocab_size=320, n_positions=4096, n_layer=1)
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = Serve(
        force_model=str(folder),
        host="127.0.0.1",
        port=port,
        device="cpu",
        dtype="float32",
        non_blocking=True,
        log_level="error",
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(200):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1)
            break
        except OSError:
            threading.Event().wait(0.1)
    yield (
        Server(str(folder), f"{url}/v1", retries=1, backoff=0.1),
        hf,
        AutoTokenizer.from_pretrained(folder),
    )
    serve.kill_server()


def test_transformers_serve(served):
    """It chats, ignores log-probabilities, n and JSON mode without a word, and decides
    exactly as its model does.
    """
    server, hf, tokenizer = served
    can = server.capabilities
    assert can.chat and can.decision
    assert (
        can.top_logprobs,
        can.completion_logprobs,
        can.echo_offset,
        can.n,
        can.json_mode,
    ) == (0, 0, None, False, False)
    simulator = ServerSimulator(server)
    assert simulator.chosen == "decision"
    tokens = [" In", " May", "\n"]
    values = simulator.simulate(Explanation("months"), [tokens])[0]
    for i, value in enumerate(values):
        state = f"A neuron reacts to: months. Text: {''.join(tokens)}"
        asked = f"How active is it at token {i}, {[' In', ' May', chr(92) + 'n'][i]!r}?"
        letters = "ABCDEFGHIJK"
        lines = [asked, *(f"{letter}. {n}" for n, letter in enumerate(letters))]
        body = (
            f"{state}\n\n"
            + "\n".join(lines)
            + "\nAnswer with the letter of the level that fits best (A to K) only."
        )
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": body}], return_tensors="pt"
        )["input_ids"]
        with torch.no_grad():
            logits = hf(ids).logits[
                0, -1, tokenizer.convert_tokens_to_ids(list(letters))
            ]
        wanted = float((logits.softmax(-1) * torch.arange(11)).sum())
        assert value == pytest.approx(wanted, abs=1e-4)  # float32 on both sides


def test_transformers_serve_cannot_write_levels(served):
    """A random model's babble is an error, not a row of zeros."""
    server, _, _ = served
    assert server.send([chat([{"role": "user", "content": "hello"}], max_tokens=3)])
    with pytest.raises(ServerError, match="could not be used after 1 attempts"):
        ServerSimulator(server, "text", attempts=1).simulate(
            Explanation("months"), [[" In", " May"]]
        )


# ---- pages


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.found += [v for k, v in attributes if k in ("src", "href") and v]
        if tag not in ("wbr", "meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"


def test_pages(records, lively, tmp_path):
    scored = {
        (2, n): score_explanation(records[2, n], "fires on ' the' and on '<b>'")
        for n in range(3)
    }
    scored[3, 0] = replace(
        scored[2, 0], explanation="<script>alert(1)</script> months", layer=3, neuron=0
    )
    index = write_pages(tmp_path, records, scored, "Layers 2 & 3")
    assert {p.name for p in tmp_path.iterdir()} == {
        "index.html",
        "scores.json",
        "2-0.html",
        "2-1.html",
        "2-2.html",
        "3-0.html",
    }
    for page in tmp_path.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        links = Links()
        links.feed(text)
        assert not links.open and "alert(1)</script> months" not in text, (
            "everything is escaped"
        )
        assert all(
            re.fullmatch(r"\d+-\d+\.html", link) and (tmp_path / link).exists()
            for link in links.found
        )
        assert "http" not in text and "background:Canvas" in text
    assert index.read_text().count("<tr>") == 1 + len(scored)
    assert len(json.loads((tmp_path / "scores.json").read_text())) == 4
    assert (
        "not defined"
        in NeuronPage(lively, score_explanation(lively, "never fires"))._repr_html_()
    )
    assert repr(NeuronPage(lively)) == f"NeuronPage({lively!r})"


def test_every_token_is_on_the_page(lively):
    html = NeuronPage(lively, n_excerpts=1).html()
    for value in lively.top[0].activations[:10]:
        assert f" {value:.2f}" in html
    assert html.count("<div class='excerpt'>") >= 2


def test_index_sorts_undefined_scores_last():
    record = planted()
    good, undefined = (
        score_explanation(record, "fires on ' May'"),
        score_explanation(record, "never fires"),
    )
    text = index_html({(0, 0): undefined, (0, 1): good})
    assert text.index("0-1.html") < text.index("0-0.html")


def test_scores_by_layer_leaves_nan_out():
    import pandas as pd

    ax = scores_by_layer(
        pd.DataFrame({"layer": [0, 0, 0, 1], "rules": [0.2, math.nan, 0.4, 0.5]}),
        ["rules"],
    )
    assert list(ax.lines[0].get_ydata()) == pytest.approx([0.3, 0.5])
