"""A scripted OpenAI-compatible server on the loopback, honest or not, with a tiny
deterministic "language model" inside.
"""

import json
import re
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MONTHS = ("April", "May", "June", "July")


class Script:
    """What the server can do, and which faults it shows: `faults` are used up one per
    request, first come first served.
    """

    def __init__(
        self,
        *,
        chat=True,
        completions=True,
        logprobs=True,
        echo=0,
        n=True,
        json_mode=True,
        decision=False,
        lie=None,
        levels="right",
        faults=(),
    ):
        self.chat, self.completions, self.logprobs, self.echo, self.n = (
            chat,
            completions,
            logprobs,
            echo,
            n,
        )
        self.json_mode, self.decision, self.lie, self.levels = (
            json_mode,
            decision,
            lie,
            levels,
        )
        self.faults, self.asked, self.lock = list(faults), [], threading.Lock()

    # -- the language model

    def distribution(self, before: str) -> list[tuple[str, float]]:
        """The likeliest next tokens after a text; a level if it ends with a tab."""
        if self.lie == "constant":
            return [("0", -2.4), ("1", -2.4), ("2", -2.4)]
        if self.lie == "impossible":
            return [("0", -0.1), ("1", -0.2), ("2", -0.3)]
        if self.lie == "positive":
            return [("0", 0.5), ("1", -1.0)]
        if before.endswith("\t") and self.lie != "no levels":
            token = before[:-1].rsplit("\n", 1)[-1]
            likely = (
                8
                if token.strip() in MONTHS
                and "month" in before.rsplit("reacts to:", 1)[-1]
                else 0
            )
            return [(str(likely), -0.2), ("1", -2.5), ("unknown", -3.5)]
        key = len(before) % 7  # something that tells places apart
        return [(" 8" if key % 2 else " 9", -0.3 - key / 10), (",", -2.5 - key / 10)]

    def level(self, token: str, said: str) -> int:
        return 8 if token.strip() in MONTHS and "month" in said else 0

    def write(self, body: dict) -> str:
        last = body["messages"][-1]["content"]
        if "What is this neuron about" in last:
            return "This neuron fires on names of months.\nFor example, May."
        if "sentences" in last:
            return "In May we met.\nIt was June.\n"
        if "Answer with this JSON" in last:
            return (
                '{"levels": [3]}'
                if self.json_mode and "response_format" in body
                else "Sure! The levels are 3."
            )
        said, _, listed = last.partition("\n")
        if "answers" in body["messages"][0]["content"]:
            lines = [
                any(m in line for m in MONTHS)
                and ("«" not in line or any(f"« {m}»" in line for m in MONTHS))
                for line in listed.split("\n")
            ]
            return json.dumps(
                {"answers": lines if self.levels == "right" else lines[1:]}
            )
        lines = [x for x in listed.split("\n") if x not in ("<<<", ">>>")]
        if "JSON" in body["messages"][0]["content"]:
            levels = {
                i: self.level(t, said)
                for i, t in (line.split("\t", 1) for line in lines)
            }
            return (
                json.dumps({"levels": levels})
                if self.levels == "right"
                else '{"levels": [1, 2'
            )
        rows = [f"{t}\t{self.level(t, said)}" for t in lines]
        if self.levels == "lossy":
            rows = rows[:-1] + rows[:1]
        return (
            "\n".join(rows) if self.levels != "wrong" else "I think it is mostly quiet."
        )

    # -- the endpoints

    def answer(self, path: str, body: dict) -> dict | None:
        if path.endswith("chat/completions") and self.chat:
            n = int(body.get("n", 1)) if self.n else 1
            if not body.get("logprobs") or not self.logprobs:
                choice = {
                    "message": {"role": "assistant", "content": self.write(body)},
                    "finish_reason": "stop",
                }
                return {"choices": [choice] * n}
            top = self.distribution(body["messages"][-1]["content"])
            tops = [{"token": t, "logprob": lp} for t, lp in top]
            content = [{"token": top[0][0], "logprob": top[0][1], "top_logprobs": tops}]
            message = {"role": "assistant", "content": top[0][0]}
            return {
                "choices": [
                    {
                        "message": message,
                        "logprobs": {"content": content},
                        "finish_reason": "length",
                    }
                ]
            }
        if path.endswith("/completions") and "chat" not in path and self.completions:
            return {"choices": [self.complete(body)]}
        if path.endswith("/systemone") and self.decision:
            return {
                "answers": {
                    k: self.decide(q["instructions"])
                    for k, q in body["questions"].items()
                }
            }
        return None

    def complete(self, body: dict) -> dict:
        prompt = body["prompt"]
        following = self.distribution(prompt)[0][0]
        if not body.get("logprobs") or not self.logprobs:
            return {"text": following, "logprobs": None}
        tokens, tops = [following], [dict(self.distribution(prompt))]
        if body.get("echo") and self.echo is not None:
            pieces = (
                re.findall(r"unknown|\t|\n| ?\w+|.", prompt, re.DOTALL)
                if self.lie != "glue"
                else re.findall(r"\tunknown|\n| ?\w+|.", prompt, re.DOTALL)
            )
            starts = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
            here = [
                None,
                *(
                    {
                        self.prefix(p) + t: lp
                        for t, lp in self.distribution(prompt[:s] + self.prefix(p))
                    }
                    for p, s in list(zip(pieces, starts, strict=True))[1:]
                ),
            ]
            tokens, tops = pieces + tokens, [None] * self.echo + here + tops
            tops = tops[: len(tokens)] if self.echo else tops
        return {
            "text": "".join(tokens),
            "logprobs": {"tokens": tokens, "top_logprobs": tops},
        }

    def prefix(self, piece: str) -> str:
        return "\t" if piece == "\tunknown" else ""

    def decide(self, question: str) -> dict:
        level = 8 if any(m in question for m in MONTHS) else 0
        p = {str(i): 0.05 for i in range(11)} | {str(level): 0.5}
        return {
            "type": "score",
            "probabilities": (
                p if self.lie != "unnormalised" else {k: 2 * v for k, v in p.items()}
            ),
        }


class _Handler(BaseHTTPRequestHandler):
    script: Script

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.script.lock:
            self.script.asked.append((self.path, body))
            fault = self.script.faults.pop(0) if self.script.faults else None
        if fault == "slow":
            time.sleep(2.0)
        elif isinstance(fault, threading.Barrier):  # answers when all are there
            fault.wait(60)
        elif callable(fault):  # whatever it writes to the socket
            with suppress(OSError):
                fault(self)
            self.close_connection = True
            return None
        elif isinstance(fault, dict):  # an answer of its own, with status 200
            return self.reply(200, json.dumps(fault), **self.echoed())
        elif fault == "truncated":
            return self.reply(200, '{"choices": [{"mess', length=500)
        elif fault == "garbage":
            return self.reply(200, "<html>oops</html>")
        elif fault == "refusal":
            message = {"content": None, "refusal": "I would rather not"}
            return self.reply(200, json.dumps({"choices": [{"message": message}]}))
        elif fault == "empty":
            return self.reply(200, json.dumps({"choices": []}))
        elif fault:
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            return self.reply(
                status,
                json.dumps(
                    {"error": {"message": f"key {self.headers['authorization']}"}}
                ),
                **headers,
            )
        answer = self.script.answer(self.path, body)
        self.reply(
            *(
                (200, json.dumps(answer))
                if answer
                else (404, '{"error": "no such endpoint"}')
            )
        )

    def echoed(self):
        """The credentials it was sent, as a header of the answer."""
        return {"x-you-sent": self.headers.get("authorization", "nothing")}

    def reply(self, status, text, length=None, **headers):
        data = text.encode()
        self.send_response(status)
        kind = "text/html" if text.startswith("<") else "application/json"
        for name, value in {
            "content-type": kind,
            "content-length": str(length or len(data)),
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        with suppress(OSError):  # the client may have hung up
            self.wfile.write(data)
        self.close_connection = length is not None

    def log_message(self, *_args):
        pass


@contextmanager
def serving(script: Script):
    """The address of a running server."""
    handler = type("Handler", (_Handler,), {"script": script})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.daemon_threads = True
    threading.Thread(
        target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    ).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/v1"
    finally:
        httpd.shutdown()
        httpd.server_close()
