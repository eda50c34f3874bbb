"""The embedded model: its training can be interrupted, it is a GPT-2, and the shipped
files can do what their card says.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from mechtut.mini.card import agreement, model_card
from mechtut.mini.evaluation import Candidate, Line, evaluate, facts_table, trace_roles
from mechtut.mini.network import (
    NeuronCost,
    TrainingGPT,
    faster_dtype,
    hf_names,
    lens_loss,
    orthogonalize,
    plant,
    subject_masks,
    to_hf,
    wanted,
    weighted_loss,
)
from mechtut.mini.tokenizer import build_tokenizer, pack_rows
from mechtut.mini.training import (
    Recipe,
    Trainer,
    main,
    mini_folder,
    train,
)
from mechtut.mini.world import World
from mechtut.models.loading import load_model

TINY = Recipe(
    tokens=30 * 2 * 64,
    n_layer=2,
    d_model=32,
    n_head=2,
    n_ctx=64,
    batch=2,
    warmup=4,
    gather=1,
    handoff=1,
    per_kind=2,
)


@pytest.fixture(scope="module")
def mini():
    return load_model("mini", dtype=torch.float32, device="cpu")


def test_logits_equal_hugging_face():
    torch.manual_seed(1)
    m = TrainingGPT(3, 48, 4, 32, 90, dtype=torch.float32)
    for p in m.parameters():
        p.data += 0.05 * torch.randn_like(p)
    ids = torch.randint(0, 90, (4, 20))
    with torch.no_grad():
        assert torch.allclose(m(ids), to_hf(m)(ids).logits, atol=1e-5)


def test_loss_and_gradient_equal_plain_cross_entropy():
    torch.manual_seed(2)
    m = TrainingGPT(2, 32, 4, 32, 700, dtype=torch.float32)
    ids, targets = torch.randint(0, 700, (2, 40, 30))
    weights = torch.rand(40, 30) * (torch.rand(40, 30) > 0.3)
    plain = torch.nn.functional.cross_entropy(
        m(ids).flatten(0, 1), targets.flatten(), reduction="none"
    )
    plain = (plain * weights.flatten()).sum() / weights.sum()
    ours = weighted_loss(m, ids, targets, weights)
    assert torch.allclose(plain, ours, atol=1e-5)
    params = list(m.parameters())
    for a, b in zip(
        torch.autograd.grad(plain, params),
        torch.autograd.grad(ours, params),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_mask_hides_subjects_from_later_tokens_only():
    subject = torch.tensor([[0, 3, 3, 0, 4, 4, 4, 0]])
    last = torch.tensor([[False, False, True, False, False, False, True, False]])
    layers = {"n_layer": 4, "gather": 1, "handoff": 2}
    sees = [
        m[0, 0] == 0
        for m in subject_masks(subject, last, torch.tensor([True]), **layers)
    ]
    nothing, its_end = (
        [True, False, False, True, False, False, False, True],
        [True, False, True, True, False, False, True, True],
    )
    assert [m[7].tolist() for m in sees] == [nothing, nothing, its_end, its_end]
    assert sees[0][6].tolist() == [
        True,
        False,
        False,
        True,
        True,
        True,
        True,
        False,
    ], "a name is put together before `gather`"
    assert sees[1][6].tolist() == [True, False, False, True, False, False, True, False]
    assert sees[3][6].tolist() == [True, False, True, True, False, False, True, False]
    for plain in subject_masks(subject, last, torch.tensor([False]), **layers):
        assert torch.equal(plain[0, 0] == 0, torch.ones(8, 8).tril().bool())


def test_planted_neurons_are_drawn_to_their_categories():
    """Planted neurons that are right cost nothing; silent ones cost the whole of it,
    for any category.
    """
    labels = torch.tensor([[0, 1, -1, 1], [-1, -1, 1, -1]])
    targets = wanted(4, labels, -torch.ones_like(labels), kinds=2)
    assert [int(t.sum()) for t in targets] == [
        4,
        4,
        4,
        0,
    ], "the last quarter of the layers looks at the next token"
    right = targets[0].repeat_interleave(2, -1).view(2, 4, 4)
    act = torch.cat(
        [right, torch.ones(2, 4, 3)], -1
    )  # three neurons of the model's own
    cost = NeuronCost(4, targets, per_kind=2)
    cost(0, act)
    assert cost.planted == 0
    cost(1, torch.zeros_like(act))
    shares = torch.tensor([1 / 2, 3 / 4])  # occurrences over occurrences + 1
    assert torch.allclose(cost.planted, shares.mean() / 4)
    nothing = NeuronCost(4)
    nothing(0, act)
    assert nothing.planted == 0 and nothing.activity > 0


def test_planting_finds_what_can_be_found():
    """Probes for categories that the tokens' embeddings give away are right at once;
    other neurons keep their weights.
    """
    torch.manual_seed(3)
    m = TrainingGPT(4, 64, 4, 16, 24, dtype=torch.float32)
    m.wte.data *= 50  # tokens far apart
    ids = torch.randint(0, 24, (64, 12))
    targets, before = wanted(4, ids % 3, ids % 3, kinds=3), m.blocks[0].up.clone()
    plant(m, ids, targets, per_kind=2)
    cost = NeuronCost(4, targets, per_kind=2)
    m.hidden(ids, watch=cost)
    assert cost.planted < 0.2
    assert (
        torch.equal(m.blocks[0].up[6:], before[6:])
        and (m.blocks[0].down[:, :6] == 0).all()
    )


def test_when_neurons_cost_and_are_planted():
    recipe = Recipe()
    assert recipe.price(0) == recipe.price(int(recipe.foundation * recipe.steps)) == 0
    assert (
        recipe.price(int(recipe.variety * recipe.steps) + 1)
        == recipe.price(recipe.steps)
        == recipe.sparsity
    )
    assert 0 < recipe.plant_step < recipe.steps < replace(recipe, planted=0).plant_step


def test_a_model_too_small_for_its_planted_neurons_is_refused():
    with pytest.raises(ValueError, match="planted"):
        Trainer(replace(TINY, d_model=8))


def test_reading_early_is_cross_entropy_of_what_is_told():
    torch.manual_seed(4)
    m = TrainingGPT(3, 32, 4, 32, 50, dtype=torch.float32)
    ids, targets = torch.randint(0, 50, (2, 4, 10))
    told, keep = torch.rand(4, 10) < 0.3, {1: torch.zeros(())}
    m.hidden(ids, keep=keep)
    x = torch.nn.functional.layer_norm(keep[1], (32,), m.lnfw, m.lnfb)[told]
    plain = torch.nn.functional.cross_entropy(x @ m.wte.T, targets[told])
    ours = lens_loss(m, keep[1], targets, told)
    assert torch.allclose(plain, ours, atol=1e-5)
    first = m.blocks[0].up
    assert torch.allclose(
        *(torch.autograd.grad(x, first, retain_graph=True)[0] for x in (plain, ours)),
        atol=1e-6,
    )
    assert lens_loss(m, keep[1], targets, told & False) == 0


def test_when_facts_are_read_early():
    recipe = Recipe(lens=0.1)
    begin = math.ceil((1 - recipe.decay) * recipe.steps)
    end = math.ceil(recipe.lens_until * recipe.steps)
    assert (
        recipe.lens_layer(begin - 1) is None
        and replace(recipe, lens=0).lens_layer(begin) is None
    )
    assert {recipe.lens_layer(step) for step in range(begin, end)} == {4, 5, 6}
    assert recipe.lens_layer(end) is None


def test_what_is_told_are_the_answers_of_documents_about_subjects():
    world = World(0)
    tokenizer = build_tokenizer(world)
    rows = pack_rows(
        world, tokenizer, seed=1, n_rows=8, n_ctx=64, mixture={"fact": 0.5, "ioi": 0.5}
    )
    words = {tokenizer.decode([i]).strip() for i in rows.ids[rows.told]}
    assert words and words <= {f.object for f in world.facts}
    assert (rows.weights == 2).sum() > rows.told.sum(), (
        "answers of other documents weigh as much and are not told"
    )


def test_what_is_told_in_a_review_are_moods():
    world = World(0)
    tokenizer, part = build_tokenizer(world), world.spec["sentiment"]
    rows = pack_rows(
        world, tokenizer, seed=1, n_rows=8, n_ctx=64, mixture={"sentiment": 1.0}
    )
    words = {tokenizer.decode([i]).strip() for i in rows.ids[rows.told]}
    assert words and words <= {
        w for k in ("positive", "negative", "happy", "unhappy") for w in part[k]
    }


def test_muon_updates_are_nearly_orthogonal():
    s = torch.linalg.svdvals(orthogonalize(torch.randn(3, 64, 32)))
    assert s.min() > 0.3 and s.max() < 1.4


def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    whole = train(tmp_path / "whole", TINY, progress=False)
    for stop in (7, 21):
        train(tmp_path / "parts", TINY, stop_at=stop, progress=False)
    (tmp_path / "parts" / "checkpoint.part").write_bytes(
        b"half a file, as a kill leaves it"
    )
    parts = train(tmp_path / "parts", TINY, progress=False)
    assert parts.step == whole.step == TINY.steps
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True)
    )
    assert [x["loss"] for x in whole.log] == [x["loss"] for x in parts.log]
    one, two = (
        load_file(str(tmp_path / x / "model" / "model.safetensors"))
        for x in ("whole", "parts")
    )
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    train(tmp_path, TINY, stop_at=3, progress=False)
    with pytest.raises(ValueError, match="another recipe.*seed.*another folder"):
        train(tmp_path, replace(TINY, seed=5), progress=False)


def test_two_processes_train_the_same_model(tmp_path):
    """The losses of the steps differ only in the order of sums (1e-6); through Adam,
    which divides by a gradient's size, that grows to about 1e-5 in the twelve steps. A
    share of the batch that was left out would show in the first digit.
    """
    recipe = replace(TINY, tokens=12 * 4 * 64, batch=4, seed=3)
    script = tmp_path / "run.py"
    script.write_text(
        "from mechtut.mini.training import Recipe, train\nfrom mechtut.mini.network"
        f" import together\nwith together():\n    train({str(tmp_path / 'two')!r},"
        f" {recipe!r}, progress=False)\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    alone = train(tmp_path / "one", recipe, progress=False)
    both = Trainer(recipe)
    both.restore(tmp_path / "two" / "checkpoint.safetensors")
    assert both.step == alone.step == recipe.steps and recipe.plant_step < recipe.steps
    # written with four digits, of which bfloat16 products leave three
    digit = 1e-4 if faster_dtype() is torch.float32 else 1e-3
    assert both.log[0]["loss"] == pytest.approx(alone.log[0]["loss"], abs=2.5 * digit)
    machine = json.loads(
        (tmp_path / "two" / "model" / "training_log.json").read_text(encoding="utf-8")
    )["machine"]
    assert "2 processes of 1 thread" in machine


@pytest.mark.parametrize(
    "step", [0, 5, 22], ids=["facts", "all behaviours", "planted and read early"]
)
def test_gradients_of_the_parts_of_a_batch_add_up(step, monkeypatch):
    """Uneven parts (3 rows and 2) with other weights and other categories in each; what
    differs is the order of sums.
    """
    # rounding to bfloat16, where a processor prefers it, would hide what is asked
    monkeypatch.setattr("mechtut.mini.training.agreed_dtype", lambda: torch.float32)
    run = Trainer(replace(TINY, n_layer=4, batch=5, tokens=30 * 5 * 64))
    run.step, found = step, []
    monkeypatch.setattr("mechtut.mini.training.add_up", lambda tensors: None)
    for place in [(0, 1), (0, 2), (1, 2)]:
        monkeypatch.setattr("mechtut.mini.training.place", lambda place=place: place)
        loss = run._gradients(run.batch())
        found.append([torch.tensor(loss), *(p.grad for p in run.model.parameters())])
    assert (
        (step >= run.recipe.plant_step)
        == (run.recipe.lens_layer(step) is not None)
        == (step == 22)
    )
    for whole, one, two in zip(*found, strict=True):
        assert (one + two - whole).abs().max() <= 2e-5 * whole.abs().max()


def test_ablations_of_the_text():
    flat, plain = Trainer(replace(TINY, weighting=0.0)).batch(), Trainer(TINY).batch()
    assert torch.equal(flat.ids, plain.ids) and torch.equal(flat.subject, plain.subject)
    assert (
        torch.equal(flat.weights, (plain.weights > 0).float())
        and len(plain.weights.unique()) > 2
    )
    world = World(0)
    strangers = Trainer(replace(TINY, neighbours=False), world).world
    someone = world.subjects["people"][0]
    assert (
        len(strangers.neighbours[someone])
        == len(world.subjects["people"]) - 1
        > len(world.neighbours[someone])
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_the_same_model(tmp_path):
    """bfloat16 products there, whatever this processor prefers here, so losses agree to
    three digits only.
    """
    here, there = (
        Trainer(replace(TINY, n_layer=4), device=device) for device in ("cpu", "cuda")
    )
    for _ in range(3):
        assert here.train_step() == pytest.approx(there.train_step(), rel=5e-3)
    restored = Trainer(replace(TINY, n_layer=4), device="cuda")
    there.save(tmp_path / "run.safetensors")
    restored.restore(tmp_path / "run.safetensors")
    assert restored.train_step() == pytest.approx(there.train_step(), rel=1e-4)


def test_another_seed_gives_another_model():
    a, b = Trainer(TINY), Trainer(replace(TINY, seed=1))
    assert not torch.equal(a.model.wte, b.model.wte)
    assert a.train_step() != b.train_step()


def test_the_exported_folder_loads_and_is_the_same_function(tmp_path):
    run = Trainer(TINY)
    run.train_step()
    run.export(tmp_path)
    model = load_model(str(tmp_path), dtype=torch.float32, device="cpu")
    ids = torch.randint(0, 500, (2, 20))
    with torch.no_grad():
        assert (
            model.hf(ids).logits - to_hf(run.model)(ids).logits
        ).abs().max() < 2e-3  # float16 on disk
    assert set(hf_names(run.model)) == set(
        load_file(str(tmp_path / "model.safetensors"))
    )


def test_the_command_line(capsys):
    command = [sys.executable, "-m", "mechtut.mini", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "train" in text and "evaluate" in text
    with pytest.raises(SystemExit):
        main(["train"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    ours = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    theirs = [o for a in get_args_parser()._actions for o in a.option_strings]
    taken = {o for o in ours - {"--help"} if any(t.startswith(o) for t in theirs)}
    assert len(ours) > 5 and not taken, f"torchrun would take {taken} for its own"


def test_lines_know_whether_they_are_reached():
    assert (
        Line("a", "b", 1, "≥ 0.5", 0.5).reached
        and not Line("a", "b", 1, "≤ 0.1", 0.11).reached
    )


def test_a_model_without_tokenizer_is_refused(mini):
    with pytest.raises(ValueError, match="tokenizer"):
        evaluate(mini.hf)
    with pytest.raises(ValueError, match="n must be a whole number of at least 1"):
        evaluate(mini, n=0)


# the shipped files


def test_shipped_files_are_small_and_complete():
    folder = mini_folder()
    assert (folder / "model.safetensors").stat().st_size <= 16_000_000
    assert all(
        t.dtype == torch.float16
        for t in load_file(str(folder / "model.safetensors")).values()
    )
    log = json.loads((folder / "training_log.json").read_text(encoding="utf-8"))
    assert log["step"] == Recipe(**log["recipe"]).steps


def test_a_damaged_file_is_refused(tmp_path, monkeypatch):
    from mechtut.models.weights import verify_fingerprint

    shutil.copytree(mini_folder(), tmp_path / "mini")
    verify_fingerprint(tmp_path / "mini")
    data = bytearray((tmp_path / "mini" / "model.safetensors").read_bytes())
    data[5000] ^= 1
    (tmp_path / "mini" / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        verify_fingerprint(tmp_path / "mini")


def test_the_card_is_generated_from_the_shipped_evaluation():
    folder = mini_folder()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card == model_card(folder)
    for row in pd.read_csv(folder / "evaluation.csv").itertuples():
        assert f"{row.measured:.3f}" in card


def test_the_card_shows_what_earlier_recipes_missed(tmp_path):
    shutil.copytree(mini_folder(), tmp_path / "mini")
    missed = [
        ("facts", "top-1, held-out patterns", "no mask", 0.5),
        ("facts", "top-1, training pattern", "no mask", 1.0),
    ]
    pd.DataFrame(missed, columns=["behaviour", "measure", "recipe", "measured"]).to_csv(
        tmp_path / "mini" / "tried.csv"
    )
    card = model_card(tmp_path / "mini")
    assert "| no mask | these weights |" in card
    assert "| facts | top-1, held-out patterns | ≥ 0.95 | 0.500 |" in card
    assert "| facts | top-1, training pattern | ≥ 0.95 |" not in card


def test_the_card_says_where_two_seeds_differ():
    rows = [
        ("facts", "top-1", 100, 0.97, True),
        ("lens", "rise", 50, 0.55, False),
        ("ioi", "logit difference", 100, 12.0, True),
    ]
    first = pd.DataFrame(
        rows, columns=["behaviour", "measure", "n", "measured", "reached"]
    )
    assert "3 of 3 agree with the shipped weights within 0.1 (0.15 for" in agreement(
        first, first, "seed 1"
    )
    other = first.assign(measured=[0.85, 0.42, 9.5], reached=[False, True, True])
    said = agreement(first, other, "seed 3")
    assert said.startswith("seed 3: 2 of 3 lines are reached, and 2 of 3 agree")
    assert "further apart: facts, top-1." in said
    assert said.endswith("Missed: facts, top-1.")


def test_the_card_says_what_a_run_on_a_processor_cost(tmp_path):
    shutil.copytree(mini_folder(), tmp_path / "mini")
    log = json.loads((tmp_path / "mini" / "cpu.json").read_text(encoding="utf-8"))
    log["log"][-1]["seconds"] = 9000
    (tmp_path / "mini" / "cpu.json").write_text(json.dumps(log), encoding="utf-8")
    card = model_card(tmp_path / "mini")
    assert (
        "`CPU` is seed 1 again without a GPU (2-core CPU" in card
        and "; 2.5 hours; final training loss" in card
    )
    assert "| CPU |" in card and "- CPU: " in card


def test_the_shipped_model_knows_its_facts(mini):
    world = World(0)
    world.facts = world.facts[::2]  # the card was made from all
    table = facts_table(Candidate(mini), world)
    assert int(table["n"].sum()) >= 250
    assert (table["n"] * table["held out"]).sum() / table["n"].sum() >= 0.9
    assert table["training"].min() >= 0.9


def test_the_shipped_model_shows_the_tracing_picture(mini):
    resid = trace_roles(Candidate(mini), World(0), n=12, seed=3)
    early = slice(1, 5)
    last = resid.loc["last subject"].iloc[early].max()
    others = resid.loc[["first subject", "middle subject"]].iloc[:, early].max().max()
    assert last > 0.25 and last > 3 * others
    assert resid.loc["final"].iloc[-2] > 0.5 > resid.loc["final"].iloc[1]


def test_a_resumed_run_goes_on_in_its_own_precision(tmp_path):
    """Whatever this processor would choose now; the choice is a measurement and may
    come out differently.
    """
    first = Trainer(TINY)
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[
        first.model.dtype
    ]
    first.model.dtype = first.muon.dtype = other
    first.train_step()
    first.save(tmp_path / "run.safetensors")
    second = Trainer(TINY)
    second.restore(tmp_path / "run.safetensors")
    assert second.model.dtype == second.muon.dtype == other
