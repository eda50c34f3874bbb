"""Training: plain PyTorch gives the same weights; it can be stopped anywhere; the run
in the package is what its recipe gives.
"""

import random
import signal
from dataclasses import replace

import pytest
import torch
from families import gap
from grokking_golden import numbers
from test_network import whole_sequence
from torch.nn import functional as F

from mechtut.grokking import training
from mechtut.grokking.network import ModularAddition
from mechtut.grokking.training import (
    SMALL,
    GrokkingRecipe,
    put_weights,
    read_small,
    shipped_run,
    train_modular,
    write_small,
)

TINY = GrokkingRecipe(p=7, d_model=16, d_mlp=24, share=0.5, lr=3e-3, seed=5)
QUIET = {"progress": False}


def test_the_split_is_that_of_the_authors():
    recipe = GrokkingRecipe(p=31, share=0.5)
    pairs = [divmod(int(i), 31) for i in recipe.split().train]
    assert pairs == [tuple(pair) for pair in numbers()["train_pairs"]]
    both = torch.cat(list(recipe.split()))
    assert sorted(both.tolist()) == list(range(961))
    state = random.getstate()
    recipe.split()
    assert random.getstate() == state  # a reader's draws are left alone


def test_a_plain_loop_trains_the_same_weights():
    """The whole sequence, autograd, PyTorch's own loop over parameters."""
    run = train_modular(TINY, steps=25, snapshot_every=25, **QUIET)
    made = ModularAddition(7, d_model=16, d_mlp=24, seed=5)
    weights = {
        k: v.detach().clone().requires_grad_() for k, v in made.named_parameters()
    }
    adam = torch.optim.AdamW(
        weights.values(), lr=3e-3, weight_decay=1.0, betas=(0.9, 0.98), fused=False
    )
    warm = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(step / 10, 1))
    train, test = TINY.split()
    ids = made.inputs()
    answers = ids[:, :2].sum(1) % 7
    losses = []
    for step in range(26):
        logits = whole_sequence(weights, ids)
        if step % 10 == 0:
            loss = F.cross_entropy(logits[test].double(), answers[test])
            losses.append(loss.item())
        if step < 25:
            loss = F.cross_entropy(logits[train].double(), answers[train])
            adam.zero_grad()
            loss.backward()
            adam.step()
            warm.step()
    plain = torch.cat([w.detach().flatten() for w in weights.values()])
    assert gap(run.weights[-1], plain) < 1e-4 < gap(run.weights[0], plain)
    assert run.test_loss.tolist() == pytest.approx(losses, abs=1e-4)
    assert run.steps.tolist() == [0, 10, 20] and run.at.tolist() == [0, 25]
    squares = float(run.weights[0].double().square().sum())
    assert float(run.squares[0]) == pytest.approx(squares)


@pytest.mark.parametrize("stops", [[1], [9, 10, 11], [40], [33, 59]])
def test_stopped_anywhere_and_taken_up_again(stops, tmp_path):
    whole = train_modular(TINY, steps=60, snapshot_every=20, **QUIET)
    for stop in [*stops, 60]:
        run = train_modular(
            TINY, steps=stop, snapshot_every=20, folder=tmp_path, **QUIET
        )
        assert int(run.at[-1]) == stop
    for name in ("weights", "steps", "at", "train_loss", "test_accuracy", "squares"):
        assert torch.equal(getattr(run, name), getattr(whole, name)), name


def test_interrupted_at_a_random_moment(tmp_path):
    """Ctrl-C while it runs: nothing is lost, and the numbers are the same."""
    whole = train_modular(TINY, steps=60, snapshot_every=20, **QUIET)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    how = {"snapshot_every": 20, "folder": tmp_path, **QUIET}
    for wait in (0.02, 0.05, 0.03):
        signal.setitimer(signal.ITIMER_REAL, wait)
        try:
            train_modular(TINY, steps=60, **how)
        except KeyboardInterrupt:
            pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    again = train_modular(TINY, steps=60, **how)
    assert torch.equal(again.weights, whole.weights)
    assert torch.equal(again.test_loss, whole.test_loss)


def test_interrupted_before_a_snapshot(tmp_path, monkeypatch):
    """The step is done and in the state, and its snapshot is not there yet."""
    how = {"steps": 40, "snapshot_every": 20, **QUIET}
    whole = train_modular(TINY, **how)
    measure = training._Training.measure

    def interrupted(self):
        if self.step == 20:
            raise KeyboardInterrupt
        measure(self)

    with monkeypatch.context() as patch:
        patch.setattr(training._Training, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_modular(TINY, folder=tmp_path, **how)
    assert not (tmp_path / "step-000020.safetensors").exists()
    again = train_modular(TINY, folder=tmp_path, **how)
    for name in ("weights", "at", "steps", "test_loss"):
        assert torch.equal(getattr(again, name), getattr(whole, name)), name


def test_it_stops_at_a_loss_and_shows_itself():
    whole = train_modular(TINY, steps=100, snapshot_every=10, **QUIET)
    until = float(whole.test_loss.min()) + 1e-9
    end = int(whole.steps[whole.test_loss.argmin()])
    assert 0 < end < 100
    seen = []
    run = train_modular(
        TINY, steps=100, snapshot_every=10, until=until, watch=seen.append, **QUIET
    )
    assert int(run.steps[-1]) == int(run.at[-1]) == end
    assert torch.equal(run.weights, whole.weights[: end // 10 + 1])
    assert [int(r.at[-1]) for r in seen] == list(range(0, end + 1, 10))


def test_damage_is_told(tmp_path):
    how = {"snapshot_every": 10, "folder": tmp_path, **QUIET}
    train_modular(TINY, steps=20, **how)
    with pytest.raises(ValueError, match="holds another run, with seed=5: ask for"):
        train_modular(replace(TINY, seed=6), steps=20, **how)
    with pytest.raises(
        ValueError, match="another run, with lr=0.003, snapshot_every=10"
    ):
        train_modular(replace(TINY, lr=1.0), steps=20, **{**how, "snapshot_every": 5})
    with pytest.raises(ValueError, match="holds 20 steps already"):
        train_modular(TINY, steps=10, **how)
    piece = tmp_path / "step-000010.safetensors"
    raw = piece.read_bytes()
    piece.write_bytes(raw[:-8] + b"\x00" * 4 + raw[-4:])
    with pytest.raises(ValueError, match="does not match its checksum: it is damaged"):
        train_modular(TINY, steps=30, **how)
    piece.unlink()
    with pytest.raises(ValueError, match="lacks step-000010"):
        train_modular(TINY, steps=30, **how)
    piece.write_bytes(raw)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read whole"):
        train_modular(TINY, steps=30, **how)


def test_a_run_is_saved_and_read(tmp_path):
    run = train_modular(TINY, steps=20, snapshot_every=10, **QUIET)
    again = type(run).load(run.save(tmp_path / "run"))
    assert torch.equal(again.weights, run.weights)
    assert again.settings() == TINY
    assert again.network(10).W_E.dtype == torch.float64
    with pytest.raises(ValueError, match="no snapshot of step 14; the next is 10"):
        run.network(14)
    wrong = replace(run, recipe={**run.recipe, "p": 9})
    with pytest.raises(ValueError, match="it is of another p or width"):
        wrong.network()
    with pytest.raises(ValueError, match="it is of another p or width"):
        put_weights(ModularAddition(9), run.weights[0])


def test_a_quarter_of_the_bytes(tmp_path):
    """Eight bits a weight: errors do not add up, however many snapshots there are."""
    run = train_modular(TINY, steps=200, snapshot_every=5, **QUIET)
    write_small(run, tmp_path / "a.safetensors", run.at[1:].tolist())
    again = read_small(tmp_path / "a.safetensors")
    assert again.settings() == TINY and torch.equal(again.at, run.at)
    largest = (run.weights[1:] - run.weights[:-1]).abs().max()
    assert gap(again.weights, run.weights) < float(largest) / 250
    assert gap(again.test_loss, run.test_loss) < 1e-5
    write_small(run, tmp_path / "b.safetensors", [50])
    assert read_small(tmp_path / "b.safetensors").steps.tolist() == [
        0,
        10,
        20,
        30,
        40,
        50,
    ]
    with pytest.raises(ValueError, match="no snapshot of step 7"):
        write_small(run, tmp_path / "c.safetensors", [7])
    raw = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(raw[:-1] + b"\x7f")
    with pytest.raises(ValueError, match="does not match its checksum"):
        read_small(tmp_path / "a.safetensors")


def test_the_run_in_the_package_is_what_its_recipe_gives():
    run = shipped_run()
    assert run.settings() == SMALL
    step = int(run.at[1])
    again = train_modular(SMALL, steps=step, snapshot_every=step, **QUIET)
    assert torch.equal(again.weights[0], run.weights[0])
    # another processor rounds otherwise, and Adam turns a gradient of next to nothing
    # into a whole step of either sign
    moved, wanted = (x.weights[1] - x.weights[0] for x in (again, run))
    assert float(moved @ wanted) > 0.98 * float(moved.norm() * wanted.norm())
    for n, near in ((3, 1e-3), (len(again.steps), 0.05)):
        told = run.test_loss[:n].tolist()
        assert told == pytest.approx(again.test_loss[:n].tolist(), rel=near)
    assert run.first() is not None and run.first(of="train_loss") < run.first() / 2


@pytest.mark.parametrize("share, what", [(1.0, "the test"), (0.01, "training")])
def test_a_share_that_leaves_nothing(share, what):
    with pytest.raises(ValueError, match=f"leaves none for {what}"):
        GrokkingRecipe(p=7, share=share)


def test_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="device='cuda' cannot be used .*; give 'cpu'"):
        train_modular(TINY, steps=1, device="cuda", **QUIET)


@pytest.mark.parametrize("device", ["banana", "mps", "meta", ""])
def test_no_such_device(device):
    with pytest.raises(ValueError, match=f"device='{device}' cannot be used"):
        train_modular(TINY, steps=1, device=device, **QUIET)


def test_no_such_loss():
    run = shipped_run()
    with pytest.raises(ValueError, match="of must be"):
        run.first(of="x")
    with pytest.raises(ValueError, match="what must be"):
        run.plot("x")


def test_wrong_recipes():
    for wrong, message in (
        ({"p": 10}, "p must be odd"),
        ({"p": 3}, "at least 7"),
        ({"d_model": 10}, "n_heads must divide d_model=10"),
        ({"share": 1.2}, "share must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
    ):
        with pytest.raises(ValueError, match=message):
            GrokkingRecipe(**wrong)
