"""Ctrl-C at every line of opening and closing a block leaves the model as it was."""

import signal
import sys
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from families import tiny

from mechtut.editing import weights
from mechtut.editing.weights import WeightEdit
from mechtut.models import files, hooks, interrupts, loading
from mechtut.models.files import alone_in
from mechtut.models.hooks import Edit, attention_tap, capture, hooked, intervene
from mechtut.models.interrupts import shielded, undisturbed
from mechtut.models.loading import evaluating, load_model
from mechtut.patching import matmul
from mechtut.patching.matmul import fast_matmul

MODEL = load_model(tiny("gpt2"))
TOKENS = torch.arange(1, 5)[None]
DELTA = torch.ones_like(MODEL.blocks[0].mlp.c_proj.weight)
EDITS = [
    Edit("resid_post", 1, 0.0, pos=1),
    Edit("q", 0, 0.0, head=1),
    Edit("pattern", 2, 0.0),
]


def edit():
    return WeightEdit(model=MODEL, layer=0, delta=DELTA, request={})


@contextmanager
def two_edits():
    with edit(), edit():
        yield


@contextmanager
def nested():
    with (
        intervene(MODEL, EDITS[:1], must_fire=False),
        intervene(MODEL, EDITS[1:], must_fire=False),
    ):
        yield


BLOCKS = {
    "intervene": lambda _: intervene(MODEL, EDITS, must_fire=False),
    "nested": lambda _: nested(),
    "attention_tap": lambda _: attention_tap(MODEL, arguments=lambda _, *qkv: qkv),
    "hooked": lambda _: hooked(MODEL.blocks[0], lambda *_: None),
    "evaluating": lambda _: evaluating(MODEL.hf),
    "fast_matmul": lambda _: fast_matmul(MODEL),
    "weights": lambda _: edit(),
    "two edits": lambda _: two_edits(),
    "folder": lambda folder: alone_in(folder),
}
WATCHED = {m.__file__ for m in (files, hooks, interrupts, loading, matmul, weights)}


def state():
    """Everything that a block may change, and must give back."""
    modules = list(MODEL.hf.modules())
    return (
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
        ["forward" in vars(m) for m in modules],
        [m.training for m in modules],
        MODEL.config._attn_implementation,
        MODEL.blocks[0].mlp.c_proj.weight.sum().item(),
        len(vars(MODEL.blocks[0].mlp.c_proj).get("_weight_edits", [])),
        len(hooks._taps),
        len(hooks._open),
        dict(loading._held),
        dict(files._held),
        signal.getsignal(signal.SIGINT),
        interrupts._before,
    )


class Interrupt:
    """Ctrl-C at the n-th line that runs in the watched modules; of lines in a loop the
    first three times count.
    """

    def __init__(self, n):
        self.n, self.seen, self.fired = n, 0, False
        self.times = Counter()

    def __call__(self, frame, event, _arg):
        code = frame.f_code
        if code.co_filename not in WATCHED:
            return None
        if event == "line" and not self.fired and not _first_of_end(frame):
            self.times[code, frame.f_lineno] += 1
            self.seen += self.times[code, frame.f_lineno] <= 3
            if self.seen == self.n:
                self.fired = True
                signal.raise_signal(signal.SIGINT)
        return self

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(None)


def _first_of_end(frame):
    """The very first line of a block's end: nothing that Python offers can shield it,
    and an interrupt has to hit one instruction to find it.
    """
    code = frame.f_code
    lines = [line for *_, line in code.co_lines() if (line or 0) > code.co_firstlineno]
    return code.co_name == "__exit__" and frame.f_lineno == min(lines)


@pytest.fixture(autouse=True)
def an_interrupt_is_an_exception():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    MODEL.hf.train()
    yield
    MODEL.hf.eval()
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", BLOCKS)
def test_interrupted_at_every_line(name, tmp_path):
    before, n, kept, stopped = state(), 0, [], 0
    while True:
        n += 1
        block, at = BLOCKS[name](tmp_path), Interrupt(n)
        try:
            with at, block:
                pass
        except KeyboardInterrupt as error:
            kept.append(error)  # as a notebook does: nothing is collected meanwhile
            stopped += 1
        sys.settrace(None)
        assert state() == before, f"{name}: line {n}, {at.seen} seen"
        if not at.fired:
            break
    assert stopped == n - 1 > 10, "every interrupt arrives, sooner or later"


def test_interrupted_in_the_middle_of_the_work():
    """What is inside can be stopped at once, and everything is given back."""
    before = state()
    clean = MODEL.logits(TOKENS)

    def press(*_):
        signal.raise_signal(signal.SIGINT)

    with hooked(MODEL.blocks[1], press):
        for run in (
            lambda: capture(MODEL, TOKENS, "resid_post", edits=EDITS[:1]),
            lambda: MODEL.logits(TOKENS),
        ):
            with pytest.raises(KeyboardInterrupt), edit(), fast_matmul(MODEL):
                run()
    assert state() == before and torch.equal(MODEL.logits(TOKENS), clean)


def test_another_handler_is_asked():
    """Who handles interrupts otherwise gets them, after the block has been opened."""
    told = []
    signal.signal(signal.SIGINT, lambda *_: told.append(interrupts._before))

    @shielded
    @contextmanager
    def block():
        signal.raise_signal(signal.SIGINT)
        assert not told
        yield

    with block():
        assert told == [None]
    with undisturbed(), undisturbed():
        signal.raise_signal(signal.SIGINT)
        assert len(told) == 1
    assert len(told) == 2


def test_nothing_to_shield_in_other_threads_and_where_interrupts_are_off():
    from concurrent.futures import ThreadPoolExecutor

    def work():
        with undisturbed():
            return signal.getsignal(signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with undisturbed():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
