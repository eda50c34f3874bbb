"""Servers, honest and otherwise: caching, retries, limits, costs, what a server is seen
to do. Loopback only.
"""

import base64
import gc
import gzip
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
import traceback
import weakref
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from scripted_server import Script, serving

pytest.importorskip(
    "openai",
    reason="talking to servers needs the openai package, mechtut's extra 'servers'",
)

from mechtut.models.files import read_json, write_json
from mechtut.neurons import client
from mechtut.neurons.client import (
    Capabilities,
    Request,
    Server,
    ServerError,
    chat,
    completion,
    expected_levels,
    logprobs,
    texts,
)
from mechtut.neurons.explainer_prompts import (
    SHOTS,
    echo_prompt,
    explain_messages,
    parse_answers,
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
        assert server(url, timeout=0.5).send(ask()) and len(script.asked) == 2


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


# ---- what an answer is, and what is remembered


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "the model is loading", "code": 503}},
        {"error": "busy"},
        {"error": {"message": "no"}, "choices": []},
        {"status": "ok"},
        {"choices": None},
        {"choices": ["text"]},
        {"choices": [{"error": {"code": 502}, "message": {"content": ""}}]},
        {"choices": [{"finish_reason": "error", "message": {"content": "half"}}]},
        {"choices": [{"message": {"content": "x"}, "score": math.nan}]},
        {"choices": [{"message": {"content": "x"}, "score": math.inf}]},
    ],
    ids=str,
)
def test_an_error_with_status_200_is_no_answer(body, tmp_path):
    """Neither kept nor returned: it is asked for again, and then it is an error."""
    script = Script(faults=[body])
    with serving(script) as url:
        parrot = server(url, cache=tmp_path)
        assert texts(parrot.send(ask())[0]) and len(script.asked) == 2
        script.faults = [body] * 4
        with pytest.raises(ServerError, match="the answer"):
            parrot.send(ask(2))
        assert parrot.estimate(ask(2)).cached == 1
        assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("code", "asked"), [(401, 1), (400, 1), (429, 4), ("x", 4)])
def test_an_error_in_the_body_is_judged_by_its_code(code, asked):
    script = Script(faults=[{"error": {"code": code, "message": "no"}}] * 9)
    with serving(script) as url, pytest.raises(ServerError) as caught:
        server(url).send(ask())
    assert len(script.asked) == asked
    assert caught.value.__cause__.fatal == (code == 401)


def test_an_error_kept_by_an_earlier_version_is_asked_for_again(tmp_path):
    with serving(Script()) as url:
        parrot = server(url, cache=tmp_path)
        (path,) = (parrot._cache_path(r) for r in ask())
        path.write_text(
            json.dumps({"request": ask()[0].body, "answer": {"error": "busy"}})
        )
        with pytest.warns(UserWarning, match="damaged.*is an error.*sent again"):
            assert texts(parrot.send(ask())[0])


@pytest.mark.parametrize("cached", [True, False])
def test_the_same_request_is_sent_once(cached, tmp_path):
    script = Script()
    with serving(script) as url:
        parrot = server(url, cache=tmp_path if cached else None, prices=(1.0, 1.0))
        batch = [*ask(2), *ask(3), *ask(2)]
        assert parrot.estimate(batch) == parrot.estimate(ask(3))
        answers = parrot.send(batch)
        assert len(script.asked) == 3 and answers[0] == answers[2] == answers[5]
        answers[0]["choices"].clear()
        assert answers[2]["choices"], "answers share nothing that can be changed"


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"{",
        b'{"request": {}',
        b"[]",
        b"{}",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"request": {}, "answer": null}',
        b'{"request": {}, "answer": {"choices": 3}}',
    ],
    ids=lambda b: repr(b[:40]),
)
def test_a_damaged_answer_is_named_and_asked_for_again(damaged, tmp_path):
    script = Script()
    with serving(script) as url:
        parrot = server(url, cache=tmp_path, prices=(1.0, 1.0))
        right = parrot.send(ask())
        (path,) = tmp_path.iterdir()
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=rf"{path.name} is damaged.*sent again"):
            assert parrot.estimate(ask()).cached == 0
        with pytest.warns(UserWarning, match=rf"{path.name} is damaged.*sent again"):
            assert parrot.send(ask()) == right
        assert len(script.asked) == 2 and parrot.send(ask()) == right
        assert len(script.asked) == 2 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "change",
    [
        {"request": {"messages": []}},
        {"model": "another"},
        {"server": "https://another.example/v1"},
        {"path": "completions"},
    ],
    ids=str,
)
def test_the_answer_to_another_request_is_refused(change, tmp_path):
    script = Script()
    with serving(script) as url:
        parrot = server(url, cache=tmp_path)
        parrot.send(ask())
        (path,) = tmp_path.iterdir()
        write_json(path, read_json(path) | change)
        with pytest.raises(
            ValueError, match=f"{path.name} holds the answer to another"
        ):
            parrot.send(ask(2))
        assert len(script.asked) == 1, "and nothing new was paid for"


def test_an_answer_changed_by_hand_is_asked_for_again(tmp_path):
    script = Script()
    with serving(script) as url:
        parrot = server(url, cache=tmp_path)
        right = parrot.send(ask())
        (path,) = tmp_path.iterdir()
        path.write_text(path.read_text().replace('"content"', '"contant"'))
        with pytest.warns(UserWarning, match="does not match its checksum.*sent again"):
            assert parrot.send(ask()) == right
        write_json(path, read_json(path) | {"request": ask(2)[1].body})
        text = path.read_text().replace('"format": 1', '"format": 99')
        path.write_text(text)
        with pytest.raises(ValueError, match="newer mechtut"):
            parrot.send(ask())


def test_a_cache_that_cannot_be_written_is_noticed_before_anything_is_paid(tmp_path):
    (tmp_path / "file").write_text("")
    script = Script()
    with serving(script) as url:
        for folder in (tmp_path / "file", tmp_path / "file/below", "/proc/none"):
            with pytest.raises(ValueError, match="cannot be kept.*nothing was asked"):
                server(url, cache=folder).send(ask())
        assert not script.asked


def test_a_disk_that_is_full_later_stops_the_asking(tmp_path, monkeypatch):
    script, real, written = Script(), client.write_json, []

    def full(path, value):
        written.append(path)
        if len(written) > 3:
            raise OSError(28, "No space left on device")
        real(path, value)

    with serving(script) as url:
        monkeypatch.setattr(client, "write_json", full)
        with pytest.raises(OSError, match="No space left"):
            server(url, cache=tmp_path, concurrency=1).send(ask(20))
        assert len(script.asked) < 6
        monkeypatch.setattr(client, "write_json", real)
        assert server(url, cache=tmp_path).estimate(ask(20)).cached == 2
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("trial*"))


def test_odd_letters_are_paid_for_once(tmp_path):
    odd = [{"role": "user", "content": "\ud800 \u2028 \x00 ü"}]
    script = Script(faults=[{"choices": [{"text": "\udfff"}]}])
    with serving(script) as url:
        parrot = server(url, cache=tmp_path)
        one = parrot.send([chat(odd, max_tokens=3)])
        assert texts(one[0]) == ["\udfff"] and len(script.asked) == 1
        assert parrot.send([chat(odd, max_tokens=3)]) == one
        assert len(script.asked) == 1


def test_an_impossible_token_is_kept_as_it_is(tmp_path):
    tops = {"tokens": ["x"], "top_logprobs": [{"x": 0.0, "y": -math.inf}]}
    script = Script(faults=[{"choices": [{"text": "x", "logprobs": tops}]}])
    with serving(script) as url:
        parrot = server(url, cache=tmp_path)
        for _ in range(2):
            (answer,) = parrot.send([completion("a", top_logprobs=2)])
            assert logprobs(answer)[1] == [[("x", 0.0), ("y", -math.inf)]]
        assert len(script.asked) == 1


def test_what_json_cannot_hold_is_no_request():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    for value in (math.nan, math.inf, object(), {1, 2}, b"x", nested):
        with pytest.raises(ValueError, match="body must be what JSON can hold"):
            Request("completions", {"prompt": value})


# ---- time and size


DRIPPING = 30.0  # seconds: long after a try of 0.3 s has ended


def dripping(handler, text):
    """Write a text letter by letter."""
    for letter in text:
        handler.wfile.write(bytes([letter]))
        handler.wfile.flush()
        time.sleep(DRIPPING / len(text))


def drip(handler):
    """The answer, a space now and then before it."""
    handler.send_response(200)
    handler.end_headers()
    dripping(handler, b" " * 1000)


def drip_headers(handler):
    dripping(handler, b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 1000)


def silence(_handler):
    time.sleep(DRIPPING)


@pytest.mark.parametrize("fault", [drip, drip_headers, silence])
def test_a_try_ends_even_if_a_byte_comes_now_and_then(fault):
    whole = []

    def to_the_end(handler):
        fault(handler)
        whole.append(handler)

    with serving(Script(faults=[to_the_end] * 2)) as url:
        with pytest.raises(ServerError, match="no whole answer within 0.3 s"):
            server(url, timeout=0.3, retries=1).send(ask())
        assert not whole
        assert texts(server(url, timeout=5.0).send(ask())[0])


def flood(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b" " * 2**20)


def bomb(handler):
    """Twice what is taken, compressed."""
    handler.send_response(200)
    handler.send_header("content-encoding", "gzip")
    handler.end_headers()
    handler.wfile.write(gzip.compress(b" " * 2**26))


@pytest.mark.parametrize("fault", [flood, bomb])
def test_an_answer_that_is_too_large_is_given_up(fault):
    script = Script(faults=[fault] * 9)
    with serving(script) as url:
        with pytest.raises(ServerError, match="an answer above 32 MiB"):
            server(url).send(ask())
        assert len(script.asked) == 1


@pytest.mark.parametrize("depth", [60, 900, 100_000])
def test_deep_json_is_no_answer(depth):
    def deep(handler):
        text = '{"choices": ' + "[" * depth + "]" * depth + "}"
        handler.reply(200, text)

    script = Script(faults=[deep] * 4)
    with serving(script) as url:
        with pytest.raises(ServerError, match="not JSON that can be read"):
            server(url).send(ask())
        assert len(script.asked) == 4


def test_deep_json_inside_a_text_is_unreadable():
    for read in (lambda t: parse_json_levels(t, 1), lambda t: parse_answers(t, 1)):
        with pytest.raises(ValueError, match="no JSON object"):
            read('{"levels": ' + "[" * 100_000 + "]" * 100_000 + "}")


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("0.5", 0.5),
        ("7", 7.0),
        ("1e9", 120.0),
        ("inf", 120.0),
        *(
            (bad, 0.0)
            for bad in ("", "soon", "-1", "nan", "-inf", "²", "1;2", "٣ days")
        ),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 99 Oct 2015 07:28:00 GMT", 0.0),
    ],
)
def test_retry_after(said, seconds):
    assert client._seconds(said) == seconds


def test_retry_after_a_date():
    soon = datetime.now(UTC) + timedelta(hours=2)
    assert client._seconds(format_datetime(soon)) == 120


def test_a_bad_retry_after_stops_nothing():
    odd = ["soon", "-5", "nan", "\xb2"]
    script = Script(faults=[(429, {"retry_after": t}) for t in odd])
    with serving(script) as url:
        assert server(url, retries=4).send(ask()) and len(script.asked) == 5


def test_waiting_is_bounded(monkeypatch):
    slept = []
    with serving(Script(faults=[500] * 99)) as url:
        parrot = server(url, retries=40, backoff=1.0)
        monkeypatch.setattr(client.time, "sleep", slept.append)
        with pytest.raises(ServerError):
            parrot.ask(ask()[0])
    assert max(slept) == 120 and len(slept) >= 40


def test_nobody_is_followed_to_another_address():
    stranger = Script()
    with serving(stranger) as there:
        for status in (301, 302, 303, 307, 308):
            script = Script(
                faults=[(status, {"location": f"{there}/chat/completions"})]
            )
            with serving(script) as url, pytest.raises(ServerError) as caught:
                server(url, concurrency=1).send(ask(3))
            assert f"answers {status} and points to {there}" in str(caught.value)
            assert len(script.asked) <= 2, "one more may be under way already"
    assert not stranger.asked


def test_connections_end_with_their_server():
    """Closed within two seconds: nothing is left open on the other side."""
    ended = threading.Event()

    def watch(handler):
        handler.reply(200, json.dumps({"choices": [{"text": "x"}]}))
        handler.connection.settimeout(5)
        if handler.connection.recv(1) == b"":
            ended.set()

    with serving(Script(faults=[watch])) as url:
        parrot = server(url)
        parrot.send(ask())
        gone = weakref.ref(parrot)
        del parrot
        gc.collect()
        assert gone() is None and ended.wait(2)


def test_asking_inside_a_running_event_loop():
    import asyncio

    async def notebook(url):
        return server(url).send(ask(3))

    with serving(Script()) as url:
        assert len(asyncio.run(notebook(url))) == 3


# ---- secrets

KEY = "sk-proj-Zk3_9QpLmN7xVbT2wRy8"
PASSWORD = "pa$$ w0rd/ü"
PIECES = {KEY[i : i + 8] for i in range(len(KEY) - 7)}


BASIC = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
SPELLED = {PASSWORD, "pa$$%20w0rd", "pa%24%24%20w0rd%2F%C3%BC", BASIC, BASIC[:12]}


def leaks(text: str, planted: set[str] = PIECES) -> set[str]:
    return {piece for piece in planted if piece in text}


def told(error: BaseException) -> str:
    """All that an exception can show: itself, its chain whether or not it is hidden,
    and the values of variables along the way.
    """
    seen, todo = [], [error]
    while todo:
        e = todo.pop()
        if e is None or e in seen:
            continue
        seen.append(e)
        todo += [e.__cause__, e.__context__]
    shown = [f"{e!r} {e} {e.args} {vars(e)}" for e in seen]
    for e in seen:
        shown += traceback.TracebackException.from_exception(
            e, capture_locals=True
        ).format()
    own = [line for line in shown if "test_client.py" not in line]
    return "".join(own)


def echoes(handler):
    """Everything back, with status 200, whole and cut."""
    sent = handler.headers["authorization"]
    text = f"you sent {sent}, that is {sent.split()[-1]}"
    handler.reply(
        200, json.dumps({"choices": [{"text": text}]}), **{"x-you-sent": sent}
    )


def cut(status, n):
    def fault(handler):
        sent = handler.headers["authorization"].split()[-1]
        handler.reply(status, "x" * n + sent + "y" + sent[:20] + "z" + sent[3:])

    return fault


def bounce(handler):
    sent = handler.headers["authorization"].split()[-1]
    handler.reply(307, "", location=f"http://127.0.0.1:9/?key={sent}")


MARK = "the secret"  # stands for it in answers
FAULTS = [
    *(
        cut(status, n)
        for status in (200, 400, 401, 429, 500)
        for n in (0, 75, 180, 280)
    ),
    echoes,
    bounce,
    {"error": {"message": f"bad key {MARK}", "code": 400}},
    {"choices": [{"message": {"refusal": f"{'x' * 190}{MARK}"}}]},
    {"choices": [{"message": {"content": [MARK]}}]},
    {"choices": [{"nothing": "x" * 170 + MARK}]},
    "garbage",
    "truncated",
    silence,
    401,
    500,
]


@pytest.mark.parametrize("secret", ["key", "password"])
def test_secrets_are_shown_and_written_nowhere(
    secret, tmp_path, monkeypatch, caplog, capfd
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n" if secret == "key" else "")
    planted, sent_as = (PIECES, KEY) if secret == "key" else (SPELLED, BASIC)
    caplog.set_level(logging.DEBUG)
    shown = []
    for i, fault in enumerate(FAULTS):
        if isinstance(fault, dict):
            fault = json.loads(json.dumps(fault).replace(MARK, sent_as))
        script = Script(faults=[fault] * 2)
        with serving(script) as url:
            if secret == "password":
                quoted = "me:pa$$%20w0rd%2F%C3%BC@"
                url = url.replace("http://", f"http://{quoted}")
            parrot = server(url, cache=tmp_path / str(i), retries=1, timeout=0.4)
            for read in (texts, logprobs, lambda a: expected_levels(a, ["q"])):
                try:
                    shown.append(str(parrot.send(ask())))
                    read(parrot.send(ask())[0])
                except ServerError as error:
                    shown.append(told(error))
            shown.append(repr(parrot) + str(parrot.estimate(ask())))
    assert "".join(shown).count("***") > 20, "secrets did come back"
    assert leaks("".join(shown), planted) == set()
    logged = caplog.text + "".join(str(vars(r)) for r in caplog.records)
    assert "127.0.0.1" in logged and leaks(logged, planted) == set()
    assert leaks("".join(capfd.readouterr()), planted) == set()
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files
    assert leaks("".join(f"{p} {p.read_text()}" for p in files), planted) == set()


def test_a_short_word_as_key_does_not_change_answers(tmp_path, monkeypatch):
    """Local servers are given any word as a key; answers with that word stay."""
    monkeypatch.setenv("OPENAI_API_KEY", "months")
    with serving(Script(faults=[{"choices": [{"text": "names of months"}]}])) as url:
        assert texts(server(url, cache=tmp_path).send(ask())[0]) == ["names of months"]


@pytest.mark.parametrize("key", [KEY[:15] + "\n" + KEY[15:], KEY + "ü", KEY + "\x00"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(key, monkeypatch):
    if "\x00" in key:  # no environment can hold it; a `.env` reader may try
        monkeypatch.setattr(client, "_key", lambda: key)
    else:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    script = Script()
    with serving(script) as url:
        with pytest.raises(
            ServerError, match="OPENAI_API_KEY has characters"
        ) as caught:
            server(url).send(ask(3))
        assert not script.asked and leaks(told(caught.value)) == set()


@pytest.mark.parametrize(
    "url",
    [
        f"me:{KEY}@host/v1",
        f"ftp://me:{KEY}@host/v1",
        f"http://me:{KEY}@",
        f"http://me:{KEY}@host:port/v1",
        f"http://me:{KEY}@[::1/v1",
        f"http://me:{KEY}@host/v1?a=b",
        f"http://me:{KEY}@host/v1 x",
        "",
        "http://",
    ],
)
def test_what_is_no_address_is_refused(url, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="base_url") as caught:
        server(url)
    assert not leaks("".join(traceback.format_exception(caught.value)))
    with pytest.raises((TypeError, ValueError)) as caught:
        server(f"http://me:{KEY}@host/v1", concurrency=0)
    assert not leaks("".join(traceback.format_exception(caught.value)))


def test_a_crash_shows_no_secret():
    """A new interpreter that ends with a traceback, logging all there is."""
    code = (
        "import logging; logging.basicConfig(level=10)\n"
        "from mechtut.neurons.client import *\n"
        "s = Server('m', 'http://127.0.0.1:9/v1', retries=0)\n"
        "s.send([completion('x')])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OPENAI_API_KEY": KEY, "OPENAI_LOG": "debug"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 1 and "ServerError: 1 of 1" in run.stderr
    assert leaks(run.stdout + run.stderr) == set()


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": [{"logprobs": {"content": [{"token": "x", "top_logprobs": [3]}]}}]},
        {"choices": [{"logprobs": {"tokens": ["x"], "top_logprobs": [{"x": "y"}]}}]},
        {"choices": [{"logprobs": {"tokens": ["x"], "top_logprobs": [{"x": "nan"}]}}]},
        {"choices": [{"logprobs": {"tokens": ["x"], "top_logprobs": 3}}]},
        {"choices": {"logprobs": {}}},
        {"choices": [{"logprobs": [1]}]},
        {},
    ],
    ids=str,
)
def test_log_probabilities_that_are_none(answer):
    with pytest.raises(ServerError, match="log-probabilities"):
        logprobs(answer)


def test_probabilities_that_are_none():
    for p in ({"0": math.nan, "1": 1.0}, {"0": math.inf}, {}, {"0": -0.5, "1": 1.5}):
        with pytest.raises(ServerError, match="question 'q'"):
            expected_levels({"answers": {"q": {"probabilities": p}}}, ["q"])


def test_requests_are_concurrent_and_limited():
    together = threading.Barrier(8)  # the first answers wait for the last request
    with serving(Script(faults=[together] * 8)) as url:
        server(url, concurrency=8).send(ask(8))
    assert not together.broken
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
