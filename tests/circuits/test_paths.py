"""Path patching against plain hooks: three whole passes for each sender."""

import pytest
import torch
from families import IN_CIRCUITS, different, tiny

from mechtut.circuits.graph import layer_of, number_of
from mechtut.circuits.paths import path_patch_grid
from mechtut.models.hooks import Edit, capture, intervene
from mechtut.models.loading import load_model
from mechtut.patching.grids import AnswerMetric, Grid

QUIET = {"progress": False}
DRAW = torch.Generator().manual_seed(0)
CLEAN, OTHER = (torch.randint(5, 90, (3, 6), generator=DRAW) for _ in range(2))
OTHER[:, 0] = CLEAN[:, 0]  # the first token is the same, as it often is
RIGHT, WRONG = torch.tensor([7, 8, 9]), torch.tensor([17, 18, 19])
METRIC = AnswerMetric("logit_diff", RIGHT, WRONG)
FEW = ["gpt2", "llama", "gpt_neox", "gemma2", "qwen3"]  # 3 layers of 4 heads each
# of these, heads of llama, gemma2 and qwen3 share keys and values
SEVERAL = {
    "gpt2": ["a1.1.k_in", "a2.0.q_in", "a2.3.q_in", "m1.in"],
    "gpt_neox": ["a1.1.k_in", "a2.0.q_in", "a2.3.q_in", "m1.in"],
    "other": ["a1.kv1.k_in", "a2.0.q_in", "a2.kv0.v_in", "m1.in"],
}
ALL = list(range(6))


def model_of(kind, **changes):
    return load_model(tiny(kind, **changes).double())


def difference(logits):
    """The plain logit difference, written out."""
    rows = range(len(logits))
    return logits[rows, -1, RIGHT] - logits[rows, -1, WRONG]


def mixed(clean, other, positions, head=None):
    """The clean value, with the other one at some positions, of one head."""
    out = clean.clone()
    where = (slice(None), positions) if head is None else (slice(None), positions, head)
    out[where] = other[where]
    return out


def second_run(model, base, lender, sender, through, positions):
    """The edits that freeze all but the sender, which has the other run's output."""
    sites = ["z", "mlp_out", "resid_pre.0"]
    here, there = capture(model, base, sites), capture(model, lender, sites)
    edits = []
    for layer in range(model.n_layers):
        z, mlp = here["z", layer], here["mlp_out", layer]
        if sender.startswith(f"a{layer}."):
            z = mixed(z, there["z", layer], positions, number_of(sender))
        edits.append(Edit("z", layer, z))
        if sender == f"m{layer}":
            mlp = mixed(mlp, there["mlp_out", layer], positions)
        if sender == f"m{layer}" or through == "nothing":
            edits.append(Edit("mlp_out", layer, mlp))
    if sender == "embed":
        x = mixed(here["resid_pre.0"], there["resid_pre.0"], positions)
        edits.append(Edit("resid_pre", 0, x))
    return edits


def noted(model, base, edits, reader, where):
    """What a reader reads in the second run, as an edit of the third."""
    layer = layer_of(reader)
    if reader.startswith("m"):  # its own output is not frozen, so that it is seen
        rest = [e for e in edits if (e.site, e.layer) != ("mlp_out", layer)]
        value = capture(model, base, f"mlp_out.{layer}", edits=rest)["mlp_out", layer]
        return Edit("mlp_out", layer, value[:, where], pos=where)
    part, head = reader.split(".")[-1][0], number_of(reader)
    value = capture(model, base, f"{part}.{layer}", edits=edits)[part, layer]
    return Edit(part, layer, value[:, where, head], pos=where, head=head)


def plain(model, sender, receivers, through="mlps", way="noising", sent=ALL, read=ALL):
    """The metric of the third run."""
    base, lender = (CLEAN, OTHER) if way == "noising" else (OTHER, CLEAN)
    edits = second_run(model, base, lender, sender, through, sent)
    if receivers != "out":
        edits = [noted(model, base, edits, reader, read) for reader in receivers]
    with intervene(model, edits):
        return difference(model.logits(base))


def several(kind):
    return SEVERAL.get(kind, SEVERAL["other"])


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("through", ["mlps", "nothing"])
@pytest.mark.parametrize("way", ["noising", "denoising"])
@pytest.mark.parametrize("to", ["out", "several"])
def test_heads_equal_plain_hooks(kind, through, way, to):
    model = model_of(kind)
    receivers = several(kind) if to == "several" else "out"
    how = {"through": through, "direction": way}
    grid = path_patch_grid(model, CLEAN, OTHER, METRIC, receivers, **how, **QUIET)
    assert grid.axes == ("layer", "head") and grid.how == way
    base, lender = (CLEAN, OTHER) if way == "noising" else (OTHER, CLEAN)
    for told, tokens in ((grid.before, base), (grid.target, lender)):
        assert torch.allclose(told, difference(model.logits(tokens)), atol=1e-10)
    for layer in range(model.n_layers):
        for head in range(model.n_heads):
            found = plain(model, f"a{layer}.{head}", receivers, through, way)
            assert torch.allclose(grid.values[:, layer, head], found, atol=1e-10)
    # what comes after the last receiver changes nothing, and the rest does
    reach = 3 if to == "out" else 2
    assert (grid.change[:, reach:] == 0).all()
    assert (grid.change[:, :reach].abs().amax(0) > 1e-6).all()


@pytest.mark.parametrize("kind", different(IN_CIRCUITS))
def test_every_family_in_one_cell_of_each_kind(kind):
    model = model_of(kind)
    shared = "kv1" if model.n_kv_heads < model.n_heads else "1"
    receivers = ["a1.3.q_in", f"a1.{shared}.k_in", f"a2.{shared}.v_in", "m2.in"]
    senders = ["a0.1", "embed", "m0"]
    grid = path_patch_grid(
        model, CLEAN, OTHER, METRIC, receivers, senders=senders, **QUIET
    )
    assert grid.labels == (tuple(senders),) and grid.axes == ("sender",)
    for i, sender in enumerate(senders):
        found = plain(model, sender, receivers)
        assert torch.allclose(grid.values[:, i], found, atol=1e-9)


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("through", ["mlps", "nothing"])
@pytest.mark.parametrize("to", ["out", "several"])
def test_mlps_and_the_embedding_send(kind, through, to):
    model = model_of(kind)
    receivers = several(kind) if to == "several" else "out"
    how = {"through": through, **QUIET}
    grid = path_patch_grid(
        model, CLEAN, OTHER, METRIC, receivers, senders="mlps", **how
    )
    one = path_patch_grid(
        model, CLEAN, OTHER, METRIC, receivers, senders=["embed"], **how
    )
    assert grid.labels == (("0", "1", "2"),)
    for layer in range(3):
        found = plain(model, f"m{layer}", receivers, through)
        assert torch.allclose(grid.values[:, layer], found, atol=1e-10)
    found = plain(model, "embed", receivers, through)
    assert torch.allclose(one.values[:, 0], found, atol=1e-10)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
@pytest.mark.parametrize(
    ("sent", "read"),
    [([3], None), ([2, -1], None), (None, [-1]), ([1, 4], [4, 5]), ([0, 3], [2, 3, 5])],
)
def test_positions(kind, sent, read):
    model, receivers = model_of(kind), several(kind)
    chosen = {"positions": sent, "receiver_positions": read}
    grid = path_patch_grid(model, CLEAN, OTHER, METRIC, receivers, **chosen, **QUIET)
    sent, read = ([p % 6 for p in given or ALL] for given in (sent, read))
    for layer, head in ((0, 1), (1, 2)):
        found = plain(model, f"a{layer}.{head}", receivers, sent=sent, read=read)
        assert torch.allclose(grid.values[:, layer, head], found, atol=1e-10)


def test_one_receiver_does_not_hear_another():
    """Both are held at what was noted, also where the sender wrote nothing new."""
    model = model_of("gpt2")
    receivers, sent = ["a1.0.v_in", "a2.0.q_in"], [2]
    grid = path_patch_grid(
        model, CLEAN, OTHER, METRIC, receivers, positions=sent, **QUIET
    )
    found = plain(model, "a0.0", receivers, sent=sent)
    assert torch.allclose(grid.values[:, 0, 0], found, atol=1e-10)
    edits = second_run(model, CLEAN, OTHER, "a0.0", "mlps", sent)
    both = [noted(model, CLEAN, edits, reader, sent) for reader in receivers]
    with intervene(model, both):  # the second one held at the sender's position only
        heard = difference(model.logits(CLEAN))
    assert (heard - found).abs().max() > 1e-6


def test_the_embedding_straight_to_the_logits_by_arithmetic():
    model = model_of("gpt2")
    grid = path_patch_grid(
        model, CLEAN, OTHER, METRIC, senders=["embed"], through="nothing", **QUIET
    )
    x = capture(model, CLEAN, "resid_post.2")["resid_post.2"][:, -1]
    e, f = (capture(model, t, "resid_pre.0")["resid_pre.0"] for t in (CLEAN, OTHER))
    logits = model.unembed((x - e[:, -1] + f[:, -1])[:, None])
    assert torch.allclose(grid.values[:, 0], difference(logits), atol=1e-10)


@pytest.mark.parametrize("receivers", ["out", ["a2.0.q_in", "m1.in"]])
def test_batches_order_and_folders_change_nothing(receivers, tmp_path):
    model = model_of("llama")
    given = (model, CLEAN, OTHER, METRIC, receivers)
    whole = path_patch_grid(*given, **QUIET)
    for size in (1, 4, 1000):
        grid = path_patch_grid(*given, batch_size=size, **QUIET)
        assert torch.allclose(grid.values, whole.values, atol=1e-12)
    names = ["a1.3", "embed", "m0", "a0.2"]
    some = path_patch_grid(*given, senders=names, **QUIET)
    for i, name in enumerate(names):
        alone = path_patch_grid(*given, senders=[name], **QUIET)
        assert torch.allclose(some.values[:, i], alone.values[:, 0], atol=1e-12)
    assert torch.allclose(some.values[:, 0], whole.values[:, 1, 3], atol=1e-12)
    kept = path_patch_grid(*given, folder=tmp_path / "a", **QUIET)
    again = path_patch_grid(*given, folder=tmp_path / "a", batch_size=2, **QUIET)
    assert torch.equal(kept.values, again.values)
    with pytest.raises(ValueError, match="holds another sweep"):
        path_patch_grid(*given, folder=tmp_path / "a", through="nothing", **QUIET)
    found = Grid.load(whole.save(tmp_path / "b"))
    assert torch.equal(found.values, whole.values)
    assert found.site == ("out" if receivers == "out" else "m1.in, a2.0.q_in")


def test_parts_that_fit_the_memory(monkeypatch):
    from mechtut.circuits import paths

    model, receivers = model_of("gpt2"), several("gpt2")
    whole = path_patch_grid(model, CLEAN, OTHER, METRIC, receivers, **QUIET)
    monkeypatch.setattr(paths, "_per_part", lambda *_: 5)
    parts = path_patch_grid(model, CLEAN, OTHER, METRIC, receivers, **QUIET)
    assert torch.allclose(parts.values, whole.values, atol=1e-12)


def test_work_that_was_stopped_goes_on(tmp_path, monkeypatch):
    from mechtut.circuits import paths

    model = model_of("gpt2")
    given = (model, CLEAN, OTHER, METRIC, ["a2.0.q_in"])
    whole = path_patch_grid(*given, **QUIET)
    monkeypatch.setattr(paths, "_per_part", lambda *_: 5)
    done, follow = [], paths._follow

    def stops(frozen, senders, readers):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(senders)
        return follow(frozen, senders, readers)

    monkeypatch.setattr(paths, "_follow", stops)
    with pytest.raises(KeyboardInterrupt):
        path_patch_grid(*given, folder=tmp_path, **QUIET)
    monkeypatch.setattr(paths, "_follow", follow)
    sizes = []
    measured = paths._measured

    def counts(*given):
        sizes.append(len(given[-1]))
        return measured(*given)

    monkeypatch.setattr(paths, "_measured", counts)
    grid = path_patch_grid(*given, folder=tmp_path, **QUIET)
    assert torch.allclose(grid.values, whole.values, atol=1e-12)
    assert sizes == [5, 2]  # the first part was not done again


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"receivers": ["a2.0.q"]}, "no 'a2.0.q'.*did you mean a2.0.q_in"),
        ({"receivers": "logits"}, "the logits are called 'out'"),
        ({"receivers": ["out", "a2.0.q_in"]}, "a call of its own"),
        ({"receivers": ["a9.0.q_in"]}, "no 'a9.0.q_in'"),
        ({"receivers": ["a2.0.v_in"]}, "did you mean.* a2.kv0.v_in"),
        ({"receivers": ["a2.kv2.v_in"]}, "no 'a2.kv2.v_in'"),
        ({"receivers": ["a2.4.q_in"]}, "no 'a2.4.q_in'"),
        ({"receivers": []}, "receivers must name at least one"),
        ({"receivers": ["m1.in", "m1.in"]}, "names one twice"),
        ({"senders": []}, "senders must name at least one"),
        ({"senders": ["a0.0", "a0.0"]}, "names one twice"),
        ({"senders": ["a0.0.q"]}, "no 'a0.0.q'"),
        ({"senders": "attention"}, "senders must be"),
        ({"receivers": ["a0.0.q_in"]}, "no sender comes before a0.0.q_in"),
        ({"receivers": ["m1.in"], "senders": ["a2.0", "m1"]}, "no sender comes before"),
        ({"receivers": "out", "positions": [2, 3]}, "nothing leaves its position"),
        ({"positions": [1], "receiver_positions": [2]}, "nothing leaves its position"),
        ({"receivers": "out", "receiver_positions": [5]}, "leave receiver_positions"),
        ({"positions": [0]}, "the same up to position 0"),
        ({"positions": [6]}, "position 6 is outside"),
        ({"positions": [1, -5]}, "twice"),
        ({"positions": []}, "no position"),
        ({"through": "attention"}, "through must be 'mlps' or 'nothing'"),
        ({"direction": "both"}, "direction must be '"),
        ({"corrupted": OTHER[:, :5]}, "must have equal length"),
        ({"corrupted": OTHER[:2]}, "must have equal length"),
        ({"corrupted": torch.cat([OTHER[:1], CLEAN[1:]])}, "of pair 1 are the same"),
        ({"clean": CLEAN + 500}, "outside 0..96"),
        ({"metric": lambda logits: logits.sum(-1) * 0}, "on both sides"),
        ({"metric": lambda logits: logits.sum()}, "one number per prompt"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
    ],
)
def test_hostile_input(change, words):
    given = {"clean": CLEAN, "corrupted": OTHER, "metric": METRIC}
    given |= {"receivers": ["a2.0.q_in"]} | change
    with pytest.raises((ValueError, IndexError, TypeError), match=words):
        path_patch_grid(model_of("llama"), **given, **QUIET)


def test_padding_and_what_cannot_be_taken_apart_are_refused():
    mini = load_model("mini", device="cpu")
    pad = mini.tokenizer.pad_token_id
    one = mini.to_batch(["Riley Martin works as a", "Martin Riley works as a"])
    padded = one.flip(0)
    padded[0, :2] = pad
    metric = AnswerMetric("log_probability", one[:, 1])
    with pytest.raises(ValueError, match="padding in row 0"):
        path_patch_grid(mini, padded, one, metric, **QUIET)
    with pytest.raises(NotImplementedError):
        path_patch_grid(model_of("gptj"), CLEAN, OTHER, METRIC, **QUIET)
    model = model_of("gpt2")
    with (
        intervene(model, [Edit("z", 0, 0.0)], must_fire=False),
        pytest.raises(RuntimeError, match="open"),
    ):
        path_patch_grid(model, CLEAN, OTHER, METRIC, **QUIET)


@pytest.mark.parametrize("reader", ["a2.0.q_in", "out"])
def test_a_wiring_that_is_not_the_models_is_refused(reader, monkeypatch):
    from mechtut.circuits import paths

    own, ran = paths.projector, paths.run

    def off(*given):
        return lambda x: own(*given)(x) * 1.01

    def else_(*given):
        found = ran(*given)
        found.out.mul_(1.01)
        return found

    changed = {"a2.0.q_in": ("projector", off), "out": ("run", else_)}
    monkeypatch.setattr(paths, *changed[reader])
    with pytest.raises(NotImplementedError, match=f"{reader} taken apart differs"):
        path_patch_grid(model_of("gpt2"), CLEAN, OTHER, METRIC, reader, **QUIET)
