"""Collecting records against a brute-force collection, on every family; resuming;
memory; hostile input.
"""

import math
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from families import WITH_NEURONS, different, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mechtut.models.hooks import capture
from mechtut.models.loading import load_model
from mechtut.neurons.collect import collect
from mechtut.neurons.records import ActivationRecord, NeuronRecords, _or_zero
from mechtut.neurons.statistics import (
    Reservoir,
    empty_top,
    keep_top,
    moments,
    pack,
    power_sums,
    unpack,
)


def rows(n=40, n_tokens=8, seed=0, vocab=97):
    return torch.randint(
        1, vocab, (n, n_tokens), generator=torch.Generator().manual_seed(seed)
    )


def brute_force(model, tokens, layer):
    """Every activation of a layer, one row at a time."""
    return torch.cat(
        [
            capture(model, row[None], f"mlp_act.{layer}")[f"mlp_act.{layer}"]
            for row in tokens
        ]
    ).double()


def by_definition(x):
    """Mean, variance, skewness, kurtosis and density."""
    d = x.double() - x.double().mean()
    v = (d**2).mean()
    return [
        float(m)
        for m in (
            x.double().mean(),
            v,
            (d**3).mean() / v**1.5,
            (d**4).mean() / v**2,
            (x > 0).double().mean(),
        )
    ]


@pytest.fixture(scope="module")
def model():
    return load_model(tiny("gpt2"))


@pytest.mark.parametrize("kind", different(WITH_NEURONS))
def test_every_family_against_brute_force(kind):
    model, tokens = load_model(tiny(kind)), rows()
    records = collect(
        model, tokens, n_tokens=8, n_top=4, n_random=6, batch_size=7, progress=False
    )
    assert records.n_excerpts == 40 and {layer for layer, _ in records} == set(
        range(model.n_layers)
    )
    for layer in range(model.n_layers):
        full = brute_force(model, tokens, layer)
        assert full.shape[2] * model.n_layers == len(records)
        for neuron in (0, 13, full.shape[2] - 1):
            record, x = records[layer, neuron], full[..., neuron]
            best = x.amax(1).sort(descending=True, stable=True)
            # float32 products of another batch shape differ in the last digits: 1e-4 of
            # values around 1 to 10
            assert np.allclose(
                [max(r.activations) for r in record.top], best.values[:4], atol=1e-4
            )
            for r in [*record.top, *record.random, *record.spare]:
                row = next(i for i, ids in enumerate(tokens.tolist()) if ids == r.ids)
                assert torch.allclose(
                    torch.tensor(r.activations).double(), x[row], atol=1e-4
                )
            found = [
                record.mean,
                record.variance,
                record.skewness,
                record.kurtosis,
                record.density,
            ]
            assert np.allclose(found, by_definition(x), rtol=2e-3, atol=1e-4)


def test_excerpts_are_in_one_place_only(model):
    records = collect(model, rows(60), n_tokens=8, n_top=5, n_random=10, progress=False)
    everywhere = set()
    for at in list(records)[::7]:
        r = records[at]
        ids = [tuple(x.ids) for x in [*r.top, *r.random, *r.spare]]
        assert len(ids) == len(set(ids)) and len(r.top) == 5 and len(r.random) == 10
        assert 0 <= len(r.spare) <= 5
        everywhere |= {tuple(x.ids) for x in r.random}
        assert (
            r.quantile_boundaries == sorted(r.quantile_boundaries)
            and len(r.quantile_boundaries) == 5
        )
        for low, high, group in zip(
            r.quantile_boundaries, r.quantile_boundaries[1:], r.quantiles, strict=False
        ):
            assert all(low - 1e-6 <= max(x.activations) <= high + 1e-6 for x in group)
    assert len(everywhere) <= 15, "the random sample is one sample for all neurons"


def test_tails_of_an_activation_function_make_no_order():
    """They are 0 on one processor and 1e-17 on another, beside activations of 5."""
    found = _or_zero(torch.tensor([-9e-11, -3e-18, 2e-17, 0.0, 1e-5, -0.2, 5.0]), 5.0)
    assert found.tolist() == torch.tensor([0, 0, 0, 0, 1e-5, -0.2, 5.0]).tolist()


def test_quantiles_of_a_short_corpus_are_exact(model):
    tokens = rows(50)
    records = collect(
        model, tokens, n_tokens=8, n_top=5, n_random=10, n_quantiles=4, progress=False
    )
    x = brute_force(model, tokens, 1)[..., 3].amax(1)
    assert np.allclose(
        records[1, 3].quantile_boundaries,
        np.quantile(x.numpy(), [0, 0.25, 0.5, 0.75, 1]),
        atol=1e-4,
    )


def test_token_table(model):
    tokens = rows(30)
    records = collect(
        model,
        tokens,
        n_tokens=8,
        n_top=2,
        n_random=2,
        token_table=True,
        layers=1,
        progress=False,
    )
    x, means = brute_force(model, tokens, 1)[..., 5], records.token_means(1, 5)
    for token in (int(tokens[0, 0]), int(tokens[7, 3])):
        assert means[f"<{token}>"] == pytest.approx(
            float(x[tokens == token].mean()), abs=1e-4
        )
    plain = collect(model, tokens, n_tokens=8, n_top=2, n_random=2, progress=False)
    with pytest.raises(ValueError, match="token_table=True"):
        plain.token_means(1, 5)


# Few different values make many ties; the earlier excerpt must win whatever the
# batches.
@settings(max_examples=60)
@given(
    st.lists(
        st.lists(
            st.sampled_from([-1.5, -0.0, 0.0, 0.5, 2.0, 1e-30]), min_size=3, max_size=3
        ),
        min_size=1,
        max_size=25,
    ),
    st.integers(1, 6),
    st.integers(1, 9),
)
def test_top_k_with_ties(values, k, batch):
    x = torch.tensor(values).unsqueeze(2).expand(-1, -1, 2).contiguous()
    x[..., 1] *= -1
    state = empty_top(2, k, 3, x.device)
    for i in range(0, len(x), batch):
        keep_top(state, x[i : i + batch], x[i : i + batch].amax(1), i)
    kept, order = state["top_keys"].sort(descending=True)
    for neuron in range(2):
        largest = (x[..., neuron].amax(1) + 0.0).tolist()
        wanted = sorted(range(len(x)), key=lambda i: (-largest[i], i))[:k]
        values_kept, ids = unpack(kept[neuron, : len(wanted)])
        assert ids.tolist() == wanted and values_kept.tolist() == [
            largest[i] for i in wanted
        ]
        slots = order[neuron, : len(wanted)]
        assert torch.equal(
            state["top_activations"][:, neuron, slots].T, x[wanted, :, neuron]
        )


@given(
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        min_size=2,
        max_size=20,
    )
)
def test_packed_keys_sort_like_values(values):
    x, ids = torch.tensor(values), torch.arange(len(values))
    keys = pack(x, ids)
    assert keys.argsort(descending=True).tolist() == sorted(
        range(len(x)), key=lambda i: (-float(x[i] + 0.0), i)
    )
    assert torch.equal(unpack(keys)[0], x + 0.0) and torch.equal(unpack(keys)[1], ids)


@given(
    st.integers(1, 20),
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(0, 5),
)
def test_reservoir_does_not_depend_on_batches_nor_on_a_stop(size, batches, seed):
    whole, parts, done = Reservoir(size, seed), Reservoir(size, seed), 0
    whole.offer(0, sum(batches))
    for n in batches:
        won = parts.offer(done, n)
        assert all(parts.ids[slot] == done + row for slot, row in won.items())
        done += n
        parts = Reservoir(size, seed, parts.ids)  # stopped and resumed
    assert sorted(whole.ids) == sorted(parts.ids) and len(whole.ids) == min(size, done)


@given(st.floats(-100, 100), st.floats(0.01, 10))
def test_moments_far_from_zero(offset, scale):
    x = (
        torch.randn(500, 1, generator=torch.Generator().manual_seed(3)) ** 3 * scale
        + offset
    )
    found = moments(power_sums(x, x[0]), x[0].double(), len(x))[:, 0]
    assert np.allclose(found, by_definition(x), rtol=1e-3, atol=1e-5)


class Killed(Exception):
    pass


def read_all(folder):
    manifest = (folder / "manifest.json").read_text()
    return {
        p.name: p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))
    }, manifest


@pytest.mark.parametrize("killed_after", [1, 5, 9])
def test_resuming_gives_identical_shards(model, tmp_path, killed_after):
    tokens, options = (
        rows(48),
        {"n_tokens": 8, "n_top": 3, "n_random": 4, "batch_size": 4, "progress": False},
    )
    whole = collect(
        model, tokens.split(4), folder=tmp_path / "whole", save_every=8, **options
    )

    def dying():
        for i, batch in enumerate(tokens.split(4)):
            if i == killed_after:
                raise Killed
            yield batch

    with pytest.raises(Killed):
        collect(model, dying(), folder=tmp_path / "parts", save_every=8, **options)
    if killed_after > 1:
        with pytest.raises(ValueError, match="unfinished"):
            NeuronRecords.load(tmp_path / "parts")
    calls = []
    hook = model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    again = collect(
        model, tokens.split(4), folder=tmp_path / "parts", save_every=8, **options
    )
    hook.remove()
    assert len(calls) == 12 - killed_after // 2 * 2, (
        "what was saved is not computed again"
    )
    assert read_all(tmp_path / "whole")[0] == read_all(tmp_path / "parts")[0]
    assert all(whole[at] == again[at] for at in list(whole)[::17])
    loaded = NeuronRecords.load(tmp_path / "parts")
    assert (
        loaded[1, 5] == whole[1, 5]
        and loaded.plan == whole.plan
        and loaded.provenance["arguments"]["n_excerpts"] == 48
    )


def test_a_finished_folder_costs_no_forward_pass(model, tmp_path):
    options = {
        "n_tokens": 8,
        "n_top": 3,
        "n_random": 4,
        "progress": False,
        "folder": tmp_path,
    }
    first = collect(model, rows(), **options)
    hook = model.blocks[0].register_forward_hook(
        lambda *_: pytest.fail("ran the model again")
    )
    assert collect(model, rows(), **options)[0, 0] == first[0, 0]
    hook.remove()


def test_another_corpus_or_model_is_refused(model, tmp_path):
    options = {
        "n_tokens": 8,
        "n_top": 3,
        "n_random": 4,
        "progress": False,
        "batch_size": 8,
    }
    collect(model, rows(), folder=tmp_path, **options)
    for other in (rows(seed=1), rows(16)):
        with pytest.raises(ValueError, match="another corpus"):
            collect(model, other, folder=tmp_path, **options)
    with pytest.raises(ValueError, match="other arguments"):
        collect(model, rows(), folder=tmp_path, **{**options, "n_top": 4})
    longer = collect(model, rows(), folder=tmp_path, **options)
    assert longer.n_excerpts == 40
    shutil.rmtree(next(Path(tmp_path).glob("excerpts-*")))
    with pytest.raises(ValueError, match="which is gone"):
        NeuronRecords.load(tmp_path)


def test_damaged_and_older_collections_are_told(model, tmp_path):
    options = {"n_tokens": 8, "n_top": 3, "n_random": 4, "progress": False}
    collect(model, rows(), folder=tmp_path / "one", **options)
    collect(model, rows(seed=1), folder=tmp_path / "other", **options)
    manifest = tmp_path / "one" / "manifest.json"
    (shards,) = (tmp_path / "one").glob("excerpts-*")
    shard = shards / "layer-001.safetensors"
    whole, text = shard.read_bytes(), manifest.read_text()
    for broken in (b"", whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        shard.write_bytes(broken)
        with pytest.raises(ValueError, match=r"layer-001\.safetensors .*delete it"):
            NeuronRecords.load(tmp_path / "one")
    shutil.copy(shards / "layer-000.safetensors", shard)
    with pytest.raises(
        ValueError, match=r"layer-001\.safetensors .*another collection"
    ):
        NeuronRecords.load(tmp_path / "one")
    shard.write_bytes(whole)
    for broken in ("", "{", "[]"):
        manifest.write_text(broken)
        with pytest.raises(ValueError, match=r"manifest\.json .*delete it"):
            collect(model, rows(), folder=tmp_path / "one", **options)
    manifest.write_text('{"shards": "excerpts-1", "n_excerpts": 1, "complete": true}')
    with pytest.raises(ValueError, match="older mechtut.*empty folder"):
        NeuronRecords.load(tmp_path / "one")
    manifest.write_text(text)
    assert len(NeuronRecords.load(tmp_path / "one")) == len(
        NeuronRecords.load(tmp_path / "other")
    )


def test_memory_does_not_grow_with_the_corpus():
    """Python's and numpy's memory for the excerpts' tokens, and the tensors kept: the
    same for 5,000 and 20,000 excerpts.
    """
    model = load_model(tiny("gpt2", n_layer=2))

    def stream(n):
        for i in range(n // 50):
            yield rows(50, 8, seed=i)

    sizes, kept = [], []
    for n in (5000, 20_000):  # at 1,000 the first excerpts are still being collected
        tracemalloc.start()
        records = collect(
            model,
            stream(n),
            n_tokens=8,
            n_top=2,
            n_random=2,
            n_quantiles=2,
            progress=False,
            batch_size=50,
        )
        sizes.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        kept.append(
            {
                (i, name): v.nbytes
                for i, state in records.kept.states.items()
                for name, v in state.items()
            }
        )
        # each of 128 neurons of two layers refers to at most 2 top excerpts, and all of
        # them to the same random sample
        assert (
            records.n_excerpts == n
            and len(records.kept.excerpts) <= 2 * 128 * 2 + records.plan.n_pool
        )
    assert kept[0] == kept[1], (
        "4 times the corpus, and not a byte more in any tensor of any layer"
    )
    assert sizes[1] < 1.5 * sizes[0], (
        "4 times the corpus; token rows are forgotten once nothing needs them"
    )


def test_texts_are_joined_and_cut():
    model = load_model("mini", device="cpu")
    texts = ["In May we met.", "They came in June and left in July."] * 12
    records = collect(
        model, texts, layers=[2], n_tokens=16, n_top=3, n_random=3, progress=False
    )
    joined = "".join(
        f"<|endoftext|> {t}" for t in texts
    )  # this tokenizer writes a space before every word
    for r in [*records[2, 0].top, *records[2, 0].random]:
        assert len(r) == 16 and r.text in joined
        assert model.to_str_tokens(r.ids) == r.tokens
    by_ids = collect(
        model,
        [[0, *model.to_tokens(t).tolist()] for t in texts],
        layers=[2],
        n_tokens=16,
        n_top=3,
        n_random=3,
    )
    assert by_ids[2, 0] == records[2, 0]


def test_long_rows_keep_their_context(model):
    tokens = rows(12, 32)
    records = collect(model, tokens, n_tokens=8, n_top=2, n_random=2, progress=False)
    full = brute_force(model, tokens, 2)[..., 9].reshape(48, 8)
    assert records.n_excerpts == 48
    assert max(records[2, 9].top[0].activations) == pytest.approx(
        float(full.max()), abs=1e-4
    )


def test_half_precision_and_float64_models():
    for dtype in (torch.bfloat16, torch.float64):
        records = collect(
            load_model(tiny("llama", dtype)),
            rows(),
            n_tokens=8,
            n_top=3,
            n_random=3,
            progress=False,
        )
        assert all(math.isfinite(a) for r in records[0, 0].top for a in r.activations)


def test_top_excerpts_alone(model):
    record = collect(
        model, rows(), n_tokens=8, n_top=3, n_random=0, moments=False, progress=False
    )[1, 2]
    assert (
        len(record.top) == 3
        and not record.random
        and not record.spare
        and math.isnan(record.mean)
    )


# ---- hostile input


def test_records_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="at least one token"):
        ActivationRecord([], [])
    with pytest.raises(ValueError, match="2 tokens and 1"):
        ActivationRecord(["a", "b"], [1.0])
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=r"activation 1 \(token 'b'\)"):
            ActivationRecord(["a", "b"], [1.0, bad])
    with pytest.raises(TypeError, match="list of strings"):
        ActivationRecord("ab", [1.0, 2.0])
    assert len(ActivationRecord(["a"], [0.0])) == 1, "one token is fine"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_tokens": 5}, ValueError, "pass a divisor"),
        ({"n_tokens": 65}, ValueError, "must be 1..64"),
        ({"n_tokens": 0}, ValueError, "n_tokens must be a whole number of at least 1"),
        ({"layers": [3]}, IndexError, "layers 0..2"),
        ({"layers": []}, ValueError, "at least one"),
        ({"layers": [1, 1]}, ValueError, "different layers"),
        ({"n_top": 0}, ValueError, "n_top must be a whole number of at least 1"),
        ({"n_top": 41}, ValueError, "only 40 excerpts"),
        ({"n_random": 41}, ValueError, "only 40 excerpts"),
    ],
)
def test_wrong_arguments(model, changes, error, message):
    with pytest.raises(error, match=message):
        collect(
            model,
            rows(),
            **{"n_tokens": 8, "n_top": 3, "n_random": 3, "progress": False, **changes},
        )


@pytest.mark.parametrize(
    "corpus", [[], torch.zeros(0, 8, dtype=torch.long), [[1, 2, 3]]]
)
def test_an_empty_or_tiny_corpus(model, corpus):
    with pytest.raises(ValueError, match="only 0 excerpts|cut into excerpts"):
        collect(model, corpus, n_tokens=8, n_top=1, n_random=1, progress=False)


def test_wrong_sources(model):
    with pytest.raises(TypeError, match="must be a list of strings"):
        collect(model, "In May.", n_tokens=8)
    with pytest.raises(ValueError, match="without a tokenizer"):
        collect(model, ["In May."], n_tokens=8)
    with pytest.raises(ValueError, match="vocabulary is 0..96"):
        collect(model, rows() + 50, n_tokens=8)
    with pytest.raises(ValueError, match="longer than"):
        collect(model, rows(4, 128), n_tokens=8)


def test_a_few_random_excerpts_less_is_said(model):
    with pytest.warns(UserWarning, match="fewer than n_random=10"):
        records = collect(
            model, rows(12), n_tokens=8, n_top=5, n_random=10, progress=False
        )
    assert all(len(records[at].random) >= 7 for at in list(records)[::40])


def test_nan_in_the_model_is_an_error():
    hf = tiny("gpt2")
    model = load_model(hf)
    with torch.no_grad():
        hf.transformer.h[1].mlp.c_fc.bias[5] = math.nan
    with pytest.raises(ValueError, match="neuron 5 of layer 1"):
        collect(
            model, rows(), n_tokens=8, n_top=2, n_random=2, layers=[1], progress=False
        )


def test_unknown_neurons(model):
    records = collect(
        model, rows(), layers=[0], n_tokens=8, n_top=2, n_random=2, progress=False
    )
    with pytest.raises(IndexError, match="not collected"):
        records[1, 0]
    with pytest.raises(IndexError, match=r"neurons 0\.\.127"):
        records[0, 128]
    table = records.to_pandas()
    assert len(table) == len(records) == 128 and {
        "max",
        "mean",
        "kurtosis",
        "density",
    } <= set(table)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_both_ends_of_a_neuron(kind, tmp_path):
    """The negative end is what a plain collection of -x finds; gated MLPs have one."""
    model, tokens = load_model(tiny(kind)), rows()
    options = {"layers": [1], "n_tokens": 8, "n_top": 3, "n_random": 3}
    options |= {"token_table": True, "progress": False}
    found = collect(model, tokens, **options, folder=tmp_path)
    assert found.plan.both_ends == (kind != "gpt2")
    if kind == "gpt2":
        with pytest.raises(ValueError, match="both_ends=True"):
            _ = found.negative
        return
    plain = collect(model, tokens, **options, both_ends=False)
    x = brute_force(model, tokens, 1)  # [row, pos, neuron]
    assert len(found) == len(found.negative) == len(plain) == x.shape[-1]
    loaded = NeuronRecords.load(tmp_path)
    for neuron in (0, 7, x.shape[-1] - 1):
        assert repr(found[1, neuron]) == repr(plain[1, neuron])
        assert found[1, neuron].top == plain[1, neuron].top
        record, again = found.negative[1, neuron], loaded.negative[1, neuron]
        assert record.top == again.top and record.name == f"1.{neuron}-"
        turned = -x[..., neuron].double()
        strongest = turned.amax(1).sort(descending=True).values[:3]
        mine = torch.tensor([max(r.activations) for r in record.top]).double()
        assert torch.allclose(mine, strongest, atol=1e-6)
        wanted = by_definition(turned.flatten())
        moments_ = record.mean, record.variance, record.skewness, record.kurtosis
        assert np.allclose([*moments_, record.density], wanted, rtol=1e-3, atol=1e-5)
        one, other = (r.token_means(1, neuron) for r in (found, found.negative))
        assert np.allclose(list(one.values()), [-v for v in other.values()], atol=1e-6)
    assert set(found.negative.to_pandas()) == set(found.to_pandas())


def test_excerpts_without_special_tokens():
    model = load_model("mini", device="cpu")
    texts, options = ["Riley Martin works."] * 8, {"n_tokens": 4, "layers": [1]}
    options |= {"n_top": 2, "n_random": 2, "progress": False}
    for special in (True, False):
        found = collect(model, texts, **options, special_tokens=special)
        ids = {i for row in found.kept.excerpts.values() for i in row.tolist()}
        assert (0 in ids) == special and found.plan.special_tokens == special
