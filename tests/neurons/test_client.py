"""Servers, honest and otherwise: caching, retries, limits, costs, what a server is seen
to do. Loopback only.
"""

import json
import math
import time

import pytest
from scripted_server import Script, serving

pytest.importorskip(
    "openai",
    reason="talking to servers needs the openai package, mechtut's extra 'servers'",
)

from mechtut.neurons.client import (
    Capabilities,
    Server,
    ServerError,
    chat,
    completion,
    texts,
)
from mechtut.neurons.explainer_prompts import (
    SHOTS,
    echo_prompt,
    explain_messages,
    parse_json_levels,
    parse_levels,
    read_echo,
    read_explanation,
    show_excerpt,
)
from mechtut.neurons.explainers import ServerExplainer, ServerJudge, ServerSimulator
from mechtut.neurons.records import ActivationRecord, NeuronRecord
from mechtut.neurons.rules import Explanation

SECRET = "sk-very-secret-0123456789"
MONTHS = Explanation("names of months")
EXCERPTS = [
    ["In", " May", " we", " met", "\n"],
    [" June", "\t", " is", " over"],
    [" nothing"],
]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


def server(url, **options):
    return Server(
        "parrot", url, **{"backoff": 0.01, "retries": 3, "timeout": 5.0, **options}
    )


def ask(count=1, **options):
    return [
        chat([{"role": "user", "content": f"<<<\na {i}"}], max_tokens=5, **options)
        for i in range(count)
    ]


# ---- sending


@pytest.mark.parametrize(
    "fault",
    [429, 500, 503, "garbage", "truncated", (429, {"retry_after": "0.05"}), 408],
)
def test_what_may_pass_is_retried(fault, tmp_path):
    script = Script(faults=[fault, fault])
    with serving(script) as url:
        assert (
            texts(server(url, cache=tmp_path).send(ask())[0]) and len(script.asked) == 3
        )


def test_retry_after_is_honoured():
    with serving(Script(faults=[(429, {"retry_after": "0.5"})])) as url:
        started = time.monotonic()
        server(url).send(ask())
        assert time.monotonic() - started >= 0.5


def test_a_slow_answer_is_asked_for_again():
    script = Script(faults=["slow"])
    with serving(script) as url:
        assert server(url, timeout=0.2).send(ask()) and len(script.asked) == 2


def test_retries_end(tmp_path):
    script = Script(faults=[500] * 4)
    with (
        serving(script) as url,
        pytest.raises(
            ServerError, match="1 of 1 requests failed.*the server answers 500"
        ),
    ):
        server(url, cache=tmp_path).send(ask())
    assert len(script.asked) == 4


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_stays_wrong_is_not_retried(status):
    script = Script(faults=[status] * 99)
    with serving(script) as url, pytest.raises(ServerError, match=str(status)):
        server(url, concurrency=1).send(ask(5))
    if status in (400, 422):
        assert len(script.asked) == 5
    else:
        assert len(script.asked) <= 2, (
            "a wrong key is wrong for all of them (one more may be under way already)"
        )


def test_nothing_paid_for_is_lost(tmp_path):
    """Request 3 fails for good; the other nine answers are kept, and the next call asks
    for one only.
    """
    script = Script(faults=[None, None, None, 400])
    with serving(script) as url:
        parrot = server(url, cache=tmp_path, concurrency=1)
        with pytest.raises(
            ServerError, match="1 of 10 requests failed; 9 answers are kept"
        ):
            parrot.send(ask(10))
        assert len(script.asked) == 10 and parrot.estimate(ask(10)).cached == 9
        assert len(parrot.send(ask(10))) == 10 and len(script.asked) == 11
        again = server(url, cache=tmp_path)  # another process would see the same files
        assert again.send(ask(10)) == parrot.send(ask(10)) and len(script.asked) == 11


def test_a_stopped_run_costs_nothing_twice(tmp_path, monkeypatch):
    script, real, calls = Script(), Server._post, []

    def stopped(server, request):
        calls.append(request)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(server, request)

    with serving(script) as url:
        parrot = server(url, cache=tmp_path, concurrency=1)
        monkeypatch.setattr(Server, "_post", stopped)
        with pytest.raises(KeyboardInterrupt):
            parrot.send(ask(20))
        assert len(calls) < 20, "it does not go on asking"
        monkeypatch.setattr(Server, "_post", real)
        assert parrot.estimate(ask(20)).cached >= 3
        parrot.send(ask(20))
        assert parrot.estimate(ask(20)).cached == 20 and len(script.asked) == 20


def test_the_key_is_written_nowhere(tmp_path):
    with serving(
        Script(faults=[None, 400])
    ) as url:  # the second answer repeats the key it was sent
        parrot = server(url, cache=tmp_path)
        parrot.send(ask())
        with pytest.raises(ServerError) as caught:
            parrot.send(ask(2)[1:])
        written = "".join(p.read_text() for p in tmp_path.rglob("*.json")) + repr(
            parrot
        )
        seen = [caught.value, caught.value.__cause__, caught.value.__cause__.__cause__]
        assert "***" in str(caught.value) and SECRET not in written + "".join(
            map(str, seen)
        )
        with_password = server(
            url.replace("http://", "http://user:hunter2@"), cache=tmp_path
        )
        assert with_password.estimate(ask()).cached == 1, (
            "the same server, whoever asks"
        )
        with_password.send(ask(3))
        assert "hunter2" not in "".join(
            p.read_text() for p in tmp_path.rglob("*.json")
        ) + repr(with_password)


def test_requests_are_concurrent_and_limited():
    with serving(Script(faults=[0.3] * 8)) as url:
        started = time.monotonic()
        server(url, concurrency=8).send(ask(8))
        assert time.monotonic() - started < 1.5, (
            "eight answers of 0.3 s each, one after another, take 2.4 s"
        )
    with serving(Script()) as url:
        started = time.monotonic()
        server(url, requests_per_minute=1200).send(ask(7))
        assert time.monotonic() - started >= 6 * 0.05


def test_costs(tmp_path):
    with serving(Script()) as url:
        parrot = server(url, cache=tmp_path, prices=(1.0, 10.0), budget=1e-6)
        cost = parrot.estimate(ask(4, n=2))
        assert cost.output_tokens == 40 and cost.dollars == pytest.approx(
            (cost.input_tokens + 10 * 40) / 1e6
        )
        with pytest.raises(ValueError, match=r"not within the budget of \$0\.00"):
            parrot.send(ask(4, n=2))
        parrot.budget = 1.0
        parrot.send(ask(4, n=2))
        assert parrot.estimate(ask(4, n=2)).dollars == 0
        with pytest.raises(ValueError, match="give prices"):
            server(url, budget=1.0).send(ask())
        assert math.isnan(server(url).estimate(ask()).dollars)


def test_where_is_the_server(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="OPENAI_BASE_URL"):
        Server("parrot")
    with serving(Script()) as url:
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        assert Server("parrot", retries=0).send(ask())
    with pytest.raises(ServerError, match="Connect"):
        server("http://127.0.0.1:9/v1", retries=0).send(ask())


# ---- what a server is seen to do

ALL = Capabilities(
    chat=True,
    top_logprobs=20,
    completion_logprobs=20,
    echo_offset=0,
    n=True,
    json_mode=True,
    decision=True,
)


@pytest.mark.parametrize(
    ("script", "seen"),
    [
        (Script(decision=True), {}),
        (Script(), {"decision": False}),
        (Script(decision=True, n=False), {"n": False}),
        (Script(decision=True, json_mode=False), {"json_mode": False}),
        (Script(decision=True, echo=1), {"echo_offset": 1}),
        (Script(decision=True, echo=None), {"echo_offset": None}),
        (Script(decision=True, echo=3), {"echo_offset": None}),
        (
            Script(decision=True, chat=False),
            {"chat": False, "top_logprobs": 0, "n": False, "json_mode": False},
        ),
        (
            Script(decision=True, completions=False),
            {"completion_logprobs": 0, "echo_offset": None},
        ),
        *(
            (
                Script(decision=True, **lie),
                {"top_logprobs": 0, "completion_logprobs": 0, "echo_offset": None},
            )
            for lie in (
                {"logprobs": False},
                {"lie": "constant"},
                {"lie": "impossible"},
                {"lie": "positive"},
            )
        ),
        (Script(decision=True, lie="unnormalised"), {"decision": False}),
    ],
)
def test_probing(script, seen):
    with serving(script) as url:
        assert server(url).capabilities == Capabilities(**{**vars(ALL), **seen})


def test_probing_survives_a_busy_server():
    with serving(Script(decision=True, faults=[429, 500, "garbage"])) as url:
        assert server(url).capabilities == ALL


def test_probing_nothing():
    with (
        serving(Script(chat=False, completions=False)) as url,
        pytest.raises(ServerError, match="404"),
    ):
        server(url).capabilities  # noqa: B018
    with (
        serving(Script(faults=[401] * 99)) as url,
        pytest.raises(ServerError, match="401"),
    ):
        server(url).capabilities  # noqa: B018


# ---- simulating

RIGHT = [[0, 8, 0, 0, 0], [8, 0, 0, 0], [0]]


@pytest.mark.parametrize(
    ("script", "way"),
    [
        (Script(), "echo"),
        (Script(echo=1), "echo"),
        (Script(lie="glue"), "echo"),
        (Script(echo=None), "token"),
        (Script(echo=3), "token"),
        (Script(echo=None, chat=False), "token"),
        (Script(logprobs=False, decision=True), "decision"),
        (Script(logprobs=False), "json"),
        (Script(logprobs=False, json_mode=False), "text"),
        (Script(lie="constant"), "json"),
    ],
    ids=[
        "echo",
        "late",
        "glued",
        "token",
        "misaligned",
        "plain",
        "decision",
        "json",
        "text",
        "liar",
    ],
)
def test_every_way_to_simulate(script, way):
    """Tabs and line breaks among the tokens, excerpts of different lengths, one of a
    single token.
    """
    with serving(script) as url:
        simulator = ServerSimulator(server(url))
        values = simulator.simulate(MONTHS, EXCERPTS)
        assert simulator.chosen == way
        for row, right in zip(values, RIGHT, strict=True):
            assert len(row) == len(right) and [v > 3 for v in row] == [
                r > 3 for r in right
            ]
        others = simulator.simulate(Explanation("colours"), EXCERPTS)
        assert max(max(row) for row in others) < 3 or way == "decision", (
            "it is the explanation that matters"
        )


def test_expected_levels_are_those_of_the_log_probabilities():
    p = {8: math.exp(-0.2), 1: math.exp(-2.5)}
    with serving(Script()) as url:
        for way in ("echo", "token"):
            values = ServerSimulator(server(url), way).simulate(MONTHS, EXCERPTS)
            assert values[0][1] == pytest.approx((8 * p[8] + p[1]) / (p[8] + p[1]))


def test_token_at_a_time_asks_once_per_token_with_the_levels_so_far():
    script = Script()
    with serving(script) as url:
        ServerSimulator(server(url), "token").simulate(MONTHS, EXCERPTS)
        asked = [
            b["messages"][-1]["content"]
            for p, b in script.asked
            if b.get("top_logprobs") and b["max_tokens"] == 1
        ]
        last = [a for a in asked if a.endswith(" met\t")]
        assert (
            last and "In\t0\n May\t7\n we\t0\n met\t" in last[0]
        )  # 7.3 expected, so 7


@pytest.mark.parametrize(
    ("script", "way", "message"),
    [
        (Script(lie="no levels"), "token", "no level 0 … 10"),
        (Script(lie="no levels"), "echo", "no level 0 … 10"),
        (Script(logprobs=False), "token", "no log-probabilities"),
        (Script(echo=None), "echo", "no aligned log-probabilities"),
        (
            Script(levels="wrong"),
            "text",
            "3 of 3 answers could not be used after 2 attempts",
        ),
        (Script(levels="wrong"), "json", "3 of 3 answers could not be used"),
        (
            Script(decision=True, lie="unnormalised"),
            "decision",
            "sum to 2, not 1|sum to",
        ),
        (Script(faults=["refusal"] * 99), "text", "refused: I would rather not"),
        (Script(faults=["empty"] * 99), "text", "without text"),
    ],
)
def test_a_failure_is_never_a_number(script, way, message):
    with serving(script) as url, pytest.raises(ServerError, match=message):
        faults, script.faults = script.faults, []
        parrot = server(url)
        parrot.capabilities  # noqa: B018
        script.faults = faults
        ServerSimulator(parrot, way, attempts=2).simulate(MONTHS, EXCERPTS)


def test_unreadable_answers_are_drawn_again(tmp_path):
    script = Script(faults=["empty"])
    with serving(script) as url:
        values = ServerSimulator(
            server(url, cache=tmp_path, concurrency=1), "text"
        ).simulate(MONTHS, EXCERPTS)
        assert values == RIGHT
        second = script.asked[3][1]
        assert (
            len(script.asked) == 4 and second["temperature"] > 0 and second["seed"] == 1
        )


def test_a_server_that_can_do_nothing():
    with (
        serving(Script(chat=False, logprobs=False)) as url,
        pytest.raises(ServerError, match="can do nothing"),
    ):
        ServerSimulator(server(url)).simulate(MONTHS, EXCERPTS)
    with serving(Script()) as url, pytest.raises(ValueError, match="way must be"):
        ServerSimulator(server(url), "telepathy").simulate(MONTHS, EXCERPTS)


# ---- explaining and judging


def record():
    yes = ActivationRecord(["In", " May", " we"], [0.0, 3.0, 0.1])
    no = ActivationRecord(["they", " came", "."], [0.0, 0.0, 0.0])
    return NeuronRecord(2, 3, [yes] * 8, [no] * 6, mean=0.1)


def test_explaining():
    for n in (True, False):
        script = Script(n=n)
        with serving(script) as url:
            assert (
                ServerExplainer(server(url)).explain(record()).text == "names of months"
            )
            many = ServerExplainer(server(url), n_samples=3).explain_many(
                [record()] * 2
            )
            assert [[e.text for e in row] for row in many] == [
                ["names of months"] * 3
            ] * 2
            assert ServerExplainer(server(url)).counter_examples(MONTHS) == [
                "In May we met.",
                "It was June.",
            ]


def test_explaining_a_silent_neuron():
    silent = NeuronRecord(2, 3, [ActivationRecord(["a"], [0.0])] * 8, [])
    with (
        serving(Script()) as url,
        pytest.raises(ValueError, match=r"2\.3 is never active"),
    ):
        ServerExplainer(server(url)).explain(silent)


def test_judging():
    shown = [[" In", " May"], [" nothing"], [" June", " came"]]
    with serving(Script()) as url:
        judge = ServerJudge(server(url), batch=2)
        assert judge.detect(MONTHS, shown) == [True, False, True]
        marks = [[False, True], [True], [False, True]]
        assert judge.fuzz(MONTHS, shown, marks) == [True, False, False]
    with (
        serving(Script(levels="short")) as url,
        pytest.raises(ServerError, match="need 3 answers"),
    ):
        ServerJudge(server(url), attempts=1).detect(MONTHS, shown)


# ---- prompts


def test_the_prompt_has_the_structure_of_the_paper():
    sparse = explain_messages(
        [ActivationRecord(["a", " b", " c", " d", " e", " f"], [0, 0, 0, 0, 0, 2.0])]
    )
    assert [m["role"] for m in sparse] == ["system", *["user", "assistant"] * 3, "user"]
    last = sparse[-1]["content"]
    assert "<<<\na\t0\n b\t0\n c\t0\n d\t0\n e\t0\n f\t10\n>>>" in last, (
        "levels are shown"
    )
    assert "active tokens only:\n<<<\n f\t10\n>>>" in last, (
        "less than a fifth are active: shown again"
    )
    dense = explain_messages(
        [ActivationRecord(["a", " b", " c", " d", " e"], [0, 0, 0, 0, 2.0])]
    )
    assert "active tokens only" not in dense[-1]["content"], (
        "exactly a fifth is not less than a fifth"
    )
    length = sum(len(m["content"]) for m in dense)
    short = explain_messages(
        [ActivationRecord(["a", " b", " c", " d", " e"], [0, 0, 0, 0, 2.0])],
        max_characters=length - 1,
    )
    assert len(short) == len(dense) - 2 and short[0] == dense[0], (
        "a made-up neuron goes first"
    )
    with pytest.raises(ValueError, match="use fewer or shorter"):
        explain_messages(
            [ActivationRecord(["a"] * 900, [1.0] * 900)], max_characters=1000
        )
    assert len(SHOTS) == 3


def test_tokens_that_look_like_the_format():
    tokens = ["\t", "\n", ">>>", "<<<", "a\tb", "\\n", " x"]
    prompt, places = echo_prompt("anything", tokens)
    assert [prompt[p : p + 7] for p in places] == ["unknown"] * 7
    assert prompt.count("\n>>>") == len(SHOTS) + 1, "no token closes an excerpt"
    levels = [0, 1, 2, 3, 4, 5, 6]
    assert parse_levels(show_excerpt(tokens, levels), tokens, max_missing=0) == levels


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Explanation: the neuron is active on words for food.", "words for food"),
        ("It seems to be about weather", "weather"),
        ("\n\n**names**\nmore", "names"),
        ("active voice", "active voice"),
        ("fires when a list ends", "a list ends"),
        ("on and off", "on and off"),
    ],
)
def test_lead_ins_are_removed(text, said):
    assert read_explanation(text) == said


@pytest.mark.parametrize("text", ["", "\n\n", "...", "Explanation:"])
def test_no_explanation(text):
    with pytest.raises(ValueError, match="explains nothing"):
        read_explanation(text)


def test_an_echo_of_something_else():
    prompt, places = echo_prompt("anything", ["a"])
    with pytest.raises(ValueError, match="do not spell the prompt"):
        read_echo(prompt, places, ["something", " else"], [[], []])
    with pytest.raises(ValueError, match="says nothing about the level"):
        read_echo(prompt, places, list(prompt), [[] for _ in prompt])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"levels": 3}',
        '{"levels": {"0": "many"}}',
        '{"levels": [1, 2, 3]}',
        "null",
    ],
)
def test_unusable_json(text):
    with pytest.raises(ValueError):
        parse_json_levels(text, 2)


def test_a_few_lost_lines_are_forgiven():
    tokens = [f" w{i}" for i in range(20)]
    lines = [f"{t}\t{i % 11}" for i, t in enumerate(tokens)]
    found = parse_levels("\n".join(lines[:7] + lines[8:]), tokens)
    assert found == [0 if i == 7 else i % 11 for i in range(20)]
    assert parse_levels("\n".join(lines[:5] + lines[4:]), tokens) == [
        i % 11 for i in range(20)
    ], "a repeated line"
    with pytest.raises(ValueError, match="of 20 levels 3 are missing"):
        parse_levels("\n".join(lines[3:]), tokens)
    halves = json.loads('{"levels": {"0": 1}}')
    assert (
        parse_json_levels(json.dumps(halves), 1) == [1]
        and completion("x").body["max_tokens"] == 1
    )
