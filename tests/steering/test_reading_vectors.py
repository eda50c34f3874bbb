"""Reading concepts: signs, orders, scans, what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import model_of

from mechtut import load_model
from mechtut.steering.reading import LatScan, Method, Readers, reading_vectors

METHODS = Method.__args__
MODEL = model_of("llama")
DRAW = torch.Generator().manual_seed(0)
# pairs that share all but one token in the middle, 40 before 41 or the other way round
IDS = torch.randint(1, 39, (24, 7), generator=DRAW)
IDS[1::2] = IDS[0::2]
IDS[:, 4] = torch.tensor([40, 41] * 12)
TEXTS, LABELS = IDS.tolist(), [1, 0] * 12


def _states(texts=TEXTS):
    """The last token's stream behind every block, by transformers' own output."""
    ids = torch.tensor(texts)
    with torch.no_grad():
        hidden = MODEL.hf(ids, output_hidden_states=True).hidden_states
    return torch.stack(hidden[1:], 1)[:, :, -1]  # the last of them is normalised


@pytest.mark.parametrize("method", METHODS)
def test_positive_is_more_of_the_concept(method):
    readers = reading_vectors(MODEL, TEXTS, LABELS, method)
    assert (readers.train_accuracy >= 0.5).all()
    assert torch.allclose(readers.directions.norm(dim=-1), torch.ones(3, 1).double())
    other = reading_vectors(MODEL, TEXTS, [0, 1] * 12, method)
    told = readers.train_accuracy != 0.5  # a tie keeps the sign that came
    assert torch.allclose(other.directions[told], -readers.directions[told], atol=1e-7)
    # where a text stands in its pair does not count, but for the shuffle's draw
    order = [i ^ (i % 4 < 2) for i in range(24)]
    turned = reading_vectors(
        MODEL, [TEXTS[i] for i in order], [LABELS[i] for i in order], method
    )
    assert torch.allclose(turned.directions, readers.directions, atol=1e-7)
    states = _states()[:, 0]
    gaps = (states[0::2] - states[1::2]) @ readers.directions[0, 0]
    assert float(readers.scale[0, 0]) == pytest.approx(float(gaps.mean()))
    assert float(readers.train_accuracy[0, 0]) == pytest.approx(
        float((gaps > 0).double().mean())
    )


def test_centring_takes_away_what_shuffling_keeps():
    mean = reading_vectors(MODEL, TEXTS, LABELS, "mean").directions[:, 0]

    def cosine(method, **how):
        found = reading_vectors(MODEL, TEXTS, LABELS, method, **how)
        return (found.directions[:, 0] * mean).sum(-1).abs()

    kept = [cosine(m) for m in ("pca", "pca_symmetric", "pca_center")]
    lost = cosine("pca_diff")
    assert all((found > 0.75).all() for found in kept)
    assert all((found > lost + 0.1).all() for found in kept)
    # texts that are in order already: the same as repeng's
    assert torch.allclose(cosine("pca", shuffle=False), lost)


def test_pca_is_numpys_of_the_shuffled_differences():
    coins = np.random.default_rng(3).integers(0, 2, 12) * 2 - 1
    states = _states().numpy()[:, 1]
    turned = (states[0::2] - states[1::2]) * coins[:, None]
    off = turned - turned.mean(0)
    values, vectors = np.linalg.eigh(off.T @ off)
    readers = reading_vectors(MODEL, TEXTS, LABELS, seed=3, components=2, layers=[1])
    for k in (0, 1):
        direction = readers.directions[0, k].numpy()
        assert abs(direction @ vectors[:, -1 - k]) == pytest.approx(1, abs=1e-9)
        share = values[-1 - k] / values.sum()
        assert float(readers.explained[0, k]) == pytest.approx(share)
    assert np.allclose(readers.centre[0], turned.mean(0))
    centred = reading_vectors(MODEL, TEXTS, LABELS, centre="states", layers=[1])
    assert np.allclose(centred.centre[0], states.mean(0))


def test_random_is_numpys():
    readers = reading_vectors(MODEL, TEXTS, LABELS, "random", seed=5, components=2)
    want = np.random.RandomState(5).randn(3, 2, 32)
    want /= np.linalg.norm(want, axis=-1, keepdims=True)
    assert np.allclose(readers.directions * readers.signs[..., None], want)


def test_last_layer_behind_the_norm_and_before():
    plain = reading_vectors(MODEL, TEXTS, LABELS, "mean")
    normed = reading_vectors(MODEL, TEXTS, LABELS, "mean", normed_last=True)
    states = _states()
    differences = (states[0::2] - states[1::2]).mean(0)
    raw = normed.directions[:, 0] * normed.scale
    assert torch.allclose(raw, differences)  # as transformers tells it
    assert not torch.allclose(plain.directions[-1], normed.directions[-1], atol=1e-2)
    assert torch.equal(plain.directions[:-1], normed.directions[:-1])
    assert normed.vector().layers == (0, 1) and plain.vector().layers == (0, 1, 2)
    with pytest.raises(ValueError, match="layer 2 was read behind the final norm"):
        normed.vector(layers=[2])


def test_scan_is_a_pass_for_each_prefix():
    readers = reading_vectors(MODEL, TEXTS, LABELS, layers=[0, 2])
    text = TEXTS[3]
    scan = readers.scan(text)
    for pos in range(len(text)):
        end = _states([text[: pos + 1]])[0, 0]
        score = (end - readers.centre[0]) @ readers.directions[0, 0]
        assert float(scan.scores[0, pos]) == pytest.approx(float(score), abs=1e-9)
    assert len(scan.to_pandas()) == 14 and scan.layers == (0, 2)


def test_accuracy_by_hand_with_pairs_and_with_choices():
    readers = reading_vectors(MODEL, TEXTS, LABELS, layers=[0])
    new = torch.randint(1, 39, (12, 7), generator=DRAW).tolist()
    scores = _states(new)[:, 0] @ readers.directions[0, 0]
    pairs = (scores[0::2] > scores[1::2]).double().mean()
    assert float(readers.accuracy(new)) == pytest.approx(float(pairs))
    other = readers.accuracy(new, [0, 1] * 6)
    assert float(other) == pytest.approx(1 - float(pairs))
    right = [2, 0, 1, 2]
    best = scores.reshape(4, 3).argmax(1)
    share = (best == torch.tensor(right)).double().mean()
    labels = np.eye(3, dtype=int)[right]
    assert float(readers.accuracy(new, labels, choices=3)) == pytest.approx(
        float(share)
    )
    same = readers.accuracy([new[0], new[0]])
    assert float(same) == 0  # a tie is not right


def test_detection_is_as_told():
    scores = torch.randn(3, 60, generator=DRAW)
    scores[:, 7] = 300.0  # beyond five standard deviations of the median
    scan = LatScan(scores=scores, tokens=tuple("x" * 60), layers=(4, 5, 6))
    x = scores[[0, 2]].mean(0).numpy() - 0.2
    x[7] = np.sort(x)[29]  # torch's median is the lower of the middle two
    assert np.allclose(scan.detection([4, 6], 0.2), x / x.std(), atol=1e-5)
    with pytest.raises(ValueError, match="layer 0 was not scanned"):
        scan.detection([0])


def test_what_is_kept_knows_no_model(tmp_path):
    mini = load_model("mini", device="cpu")
    texts = ["Riley Martin works for", "Riley Martin was born in"] * 2
    readers = reading_vectors(mini, texts, LABELS[:4], "mean")
    assert readers.read[0] == " Riley Martin works« for»"
    again = Readers.load(readers.save(tmp_path))
    assert torch.equal(again.directions, readers.directions)
    assert again.to_pandas().equals(readers.to_pandas())
    with pytest.raises(ValueError, match="know no model"):
        again.scan("Riley Martin")
    scan = again.scan("Riley Martin", model=mini)
    assert torch.equal(scan.scores, readers.scan("Riley Martin").scores)
    with pytest.raises(ValueError, match="other weights"):
        again.scan("Riley Martin", model=replace(MODEL, tokenizer=mini.tokenizer))
    assert len(scan.plot(clip=2.3).images) == 1 and readers.plot().lines


SOME = ["Riley Martin works for", "Riley Martin was born in"]


@pytest.mark.parametrize(
    ("texts", "labels", "how", "message"),
    [
        ([], [], {}, "not 0 texts"),
        (SOME * 2, [1, 0, 1], {}, "equally long"),
        ([*SOME, SOME[0]], [1, 0, 1], {}, "not 3 texts"),
        (SOME * 2, [1, 0, 1, 1], {}, r"texts 2 to 3 have labels \[1, 1\]"),
        (SOME * 2, [0, 0, 0, 0], {}, r"texts 0 to 1 have labels \[0, 0\]"),
        (SOME, [2, 0], {}, "a label"),
        ([SOME[0]] * 4, [1, 0, 1, 0], {}, "leave the same states at layer 0"),
        ([SOME[0], ""], [1, 0], {}, "no tokens"),
        (SOME, [1, 0], {}, "'pca' finds 0 of 1 directions in 1 pairs"),
        (SOME * 2, [1, 0, 0, 1], {"method": "mean"}, "the differences cancel"),
        (SOME, [1, 0], {"method": "mean", "components": 2}, "one direction, not 2"),
        (SOME * 3, [1, 0] * 3, {"components": 2}, "finds 1 of 2 directions"),
        (SOME, [1, 0], {"method": "mean", "layers": [8]}, "layer 8 does not exist"),
        (SOME, [1, 0], {"method": "mean", "pos": -5}, "position -5"),
    ],
)
def test_reading_refuses(texts, labels, how, message):
    with pytest.raises((ValueError, IndexError), match=message):
        reading_vectors(load_model("mini", device="cpu"), texts, labels, **how)


def test_texts_of_training_are_no_test():
    readers = reading_vectors(MODEL, TEXTS, LABELS, layers=[0])
    new = torch.randint(1, 39, (2, 7), generator=DRAW).tolist()
    with pytest.raises(ValueError, match="1 of 2 test texts were trained on"):
        readers.accuracy([new[0], TEXTS[5]])
    with pytest.raises(ValueError, match="not 3 texts"):
        readers.accuracy([*new, new[0]])
    with pytest.raises(ValueError, match="component"):
        readers.scan(new[0], component=1)
