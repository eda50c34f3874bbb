"""Keys that see every difference, and pieces that are checked."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from families import tiny

from mechtut.models.files import read_json, write_json, write_tensors
from mechtut.models.hooks import Edit
from mechtut.models.loading import load_model, weight_fingerprint
from mechtut.patching.checkpoints import Store, fingerprint, identify
from mechtut.patching.replay import Replay

TOKEN = 3


@dataclass(frozen=True)
class Point:
    x: float
    y: torch.Tensor


def first(logits, token=0, scale=1.0):
    return scale * logits[..., token]


def reads_a_global(logits):
    return logits[..., TOKEN]


def calls_another(logits):
    return first(reads_a_global(logits))


def closure(token):
    return lambda logits: logits[..., token]


class Callable:
    def __init__(self, token):
        self.token = token

    def __call__(self, logits):
        return logits[..., self.token]

    def method(self, logits):
        return logits[..., -self.token]


x = torch.arange(12.0)
DIFFERENT = [
    *(x.view(shape) for shape in ([2, 6], [3, 4], [12], [12, 1])),
    *(x.to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.int64)),
    *(np.arange(12.0).reshape(shape) for shape in ([2, 6], [3, 4])),
    np.arange(12),
    x.tolist(),
    x[:0],
    torch.zeros(0, 3),
    torch.tensor(float("nan")),
    torch.zeros(100_000),
    torch.zeros(100_000).index_fill(0, torch.tensor([50_001]), 1),
    np.zeros(100_000),
    np.where(np.arange(100_000) == 50_001, 1.0, 0.0),
    *("1", 1, 1.0, True, None, b"1", 1j, (), {}, [[]], [None], "", b""),
    *(("a", "b"), ("ab",), (("a",), "b"), ("a", ("b",))),
    *({"a": 1}, {"a": 2}, {"b": 1}, {1, 2}, {1, 3}, slice(1), range(3), range(4)),
    *(Point(1.0, x), Point(1.0, x.view(3, 4)), torch.float32, torch.device("cpu")),
    *(first, reads_a_global, calls_another, torch.relu, torch.sigmoid, len),
    *(closure(1), closure(2), closure(x), closure(x.view(2, 6)), closure(torch.relu)),
    *(lambda y: y + 1, lambda y: y + 2, lambda y: -y, lambda y, z=1: y, lambda y: y),
    *(partial(first, token=1), partial(first, token=2), partial(first, scale=1)),
    *(Callable(1), Callable(2), Callable(1).method, Callable(2).method),
    *(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.GELU()),
]


def test_different_things_have_different_keys():
    keys = [fingerprint(thing) for thing in DIFFERENT]
    twice = [
        (DIFFERENT[i], DIFFERENT[keys.index(k)])
        for i, k in enumerate(keys)
        if keys.index(k) < i
    ]
    assert not twice and len(keys) > 70
    assert keys == [fingerprint(thing) for thing in DIFFERENT]


def test_the_same_made_again_has_the_same_key():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 2]) == fingerprint((1, 2)) != fingerprint(1, 2)
    assert fingerprint(closure(4)) == fingerprint(closure(4))
    assert fingerprint(np.int64(3), np.float64(0.5)) == fingerprint(3, 0.5)
    assert fingerprint(x[::2]) == fingerprint(x[::2].clone())
    assert fingerprint({"b", "a"}) == fingerprint({"a", "b"})


def test_a_function_counts_with_what_it_reads(monkeypatch):
    before = identify(reads_a_global), identify(calls_another), identify(first)
    monkeypatch.setitem(globals(), "TOKEN", 4)
    assert identify(reads_a_global) != before[0]
    assert identify(calls_another) != before[1], "through another function"
    assert identify(first) == before[2]


@pytest.mark.parametrize(
    "thing", [object(), torch.Generator(), iter([1]), (n for n in [1])]
)
def test_what_has_no_identity_is_refused_with_a_folder_only(thing, tmp_path):
    model, tokens = load_model(tiny("gpt2")), torch.arange(1, 5)[None]
    replay, cells = Replay(model, tokens), [[Edit("resid_post", 0, 0.0, pos=1)]]

    def metric(logits):
        assert thing is not None
        return logits[..., 0, 3]

    with pytest.raises(ValueError, match=r"metric .*metric with a folder: .* folder"):
        replay.run(cells, metric, folder=tmp_path, progress=False)
    assert len(replay.run(cells, metric, progress=False)) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda y: y[..., 0, 3], lambda y: y[..., 0, 4]),
        (partial(first, token=3), partial(first, token=4)),
        (closure(3), closure(4)),
        (Callable(3), Callable(4)),
        (Callable(3).method, Callable(4).method),
    ],
)
def test_another_metric_of_the_same_name_is_another_sweep(one, other, tmp_path):
    model, tokens = load_model(tiny("gpt2")), torch.arange(1, 5)[None]
    replay, cells = Replay(model, tokens), [[Edit("resid_post", 0, 0.0, pos=1)]]
    found = replay.run(cells, one, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="another sweep"):
        replay.run(cells, other, folder=tmp_path, progress=False)
    again = replay.run(cells, one, folder=tmp_path, progress=False)
    assert torch.equal(found, again)


def test_values_of_another_shape_are_another_sweep(tmp_path):
    model, tokens = load_model(tiny("gpt2")), torch.arange(1, 5)[None]
    replay, value = Replay(model, tokens), torch.ones(1, 1, model.d_model)
    replay.run([[Edit("resid_post", 0, value, pos=1)]], folder=tmp_path)
    for other in (value[0], value.double(), value.bfloat16()):
        with pytest.raises(ValueError, match="another sweep"):
            replay.run([[Edit("resid_post", 0, other, pos=1)]], folder=tmp_path)


def test_every_weight_and_buffer_counts():
    """One number of each tensor, one column, a sign, two that change places."""
    model = load_model(tiny("gpt2", n_layer=2))
    before, named = weight_fingerprint(model), dict(model.hf.named_parameters())
    named |= dict(model.hf.named_buffers())
    assert len(named) > 20
    for name, weight in named.items():
        flat, saved = weight.data.view(-1), weight.detach().clone()
        for i in {0, len(flat) // 2, len(flat) - 1}:
            bits = flat[i : i + 1].view(torch.uint8)
            bits[0] ^= 1  # the last bit
            assert weight_fingerprint(model) != before, (name, i)
            bits[0] ^= 1
        assert weight_fingerprint(model) == before
        if weight.ndim == 2:
            for change in (
                lambda w: w[:, 1].zero_(),
                lambda w: w[:, 1].neg_(),
                lambda w: w[:2].copy_(w[:2].flip(0)),
                lambda w: w[0, :2].copy_(w[0, :2].flip(0)),
            ):
                change(weight.data)
                assert weight_fingerprint(model) != before, name
                weight.data.copy_(saved)
    half = load_model(tiny("gpt2", torch.bfloat16, n_layer=2))
    assert len({before, weight_fingerprint(half)}) == 2


def test_damaged_and_foreign_pieces_are_told(tmp_path):
    key = fingerprint("demo")
    store, piece = Store(tmp_path, key), tmp_path / "piece.safetensors"
    store.once("piece", lambda: x)
    whole = piece.read_bytes()
    for broken in (b"", whole[:-1], whole[:30], b"x" * 100, whole[:-1] + b"\1"):
        piece.write_bytes(broken)
        with pytest.raises(ValueError, match=r"piece\.safetensors .*delete it"):
            Store(tmp_path, key).once("piece", pytest.fail)
    write_tensors(piece, {"values": x}, {"key": "another", "piece": "piece"})
    with pytest.raises(ValueError, match=r"not the piece 'piece' of this sweep"):
        Store(tmp_path, key).once("piece", pytest.fail)
    piece.unlink()
    assert torch.equal(Store(tmp_path, key).once("piece", lambda: x), x)
    manifest = tmp_path / "sweep.json"
    for broken in ("", "{}", '{"key": 1', "[]"):
        manifest.write_text(broken)
        with pytest.raises(ValueError, match=r"sweep\.json .*delete it"):
            Store(tmp_path, key)
    write_json(manifest, {"key": "another"})
    assert read_json(manifest)["key"] == "another"
    with pytest.raises(ValueError, match="another sweep"):
        Store(tmp_path, key)


def test_what_a_readers_class_gives_its_objects_counts():
    """Methods that `__call__` uses, and values of the class."""

    def made(helper, t):
        class Scaled:
            threshold = t

            def __call__(self, x):
                return self.helper(x) * self.threshold

        Scaled.helper = helper
        return Scaled()

    first = identify(made(lambda self, x: x[..., 3], 1))
    assert identify(made(lambda self, x: x[..., 3], 1)) == first
    assert identify(made(lambda self, x: x[..., 9], 1)) != first
    assert identify(made(lambda self, x: x[..., 3], 7)) != first
