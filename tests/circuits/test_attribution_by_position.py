"""Scores by position: they add up to the whole, and say what cutting at one position
does.
"""

import pytest
import torch
from families import tiny

from mechtut.circuits.attribution import (
    PositionScores,
    attribution_by_position,
    contrast_scores,
    cut_at,
)
from mechtut.circuits.graph import Edge
from mechtut.circuits.metrics import logit_diff
from mechtut.circuits.runs import Contrast, Cuts, circuit_metric
from mechtut.models.loading import load_model


def contrast_of(kind="gpt2", differ_from=0, dtype=torch.float64, **options):
    """Three pairs of six-token prompts that differ from position `differ_from` on."""
    clean, corrupted = torch.randint(
        1, 97, (2, 3, 6), generator=torch.Generator().manual_seed(0)
    )
    corrupted[:, :differ_from] = clean[:, :differ_from]
    return Contrast(
        load_model(tiny(kind, dtype)),
        clean,
        corrupted,
        logit_diff(clean[:, 0], clean[:, 1]),
        **options,
    )


@pytest.mark.parametrize("split_qkv", [True, False])
@pytest.mark.parametrize(
    "method", ["eap", "clean-corrupted", "eap-ig-inputs", "eap-ig-activations"]
)
def test_positions_add_up(method, split_qkv):
    contrast = contrast_of(differ_from=2, split_qkv=split_qkv)
    scores, whole = (
        attribution_by_position(contrast, method, 3),
        contrast_scores(contrast, method, 3),
    )
    # sums of some hundred products in float64, in another order
    assert torch.allclose(scores.total().scores, whole.scores, rtol=0, atol=1e-10)
    assert scores.names == whole.names and scores.positions == (2, 3, 4, 5)
    single = contrast_of(differ_from=2, split_qkv=split_qkv, dtype=torch.float32)
    scores, whole = (
        attribution_by_position(single, method, 3),
        contrast_scores(single, method, 3),
    )
    # float32: a few hundred terms of the size of the largest score, 6e-8 each
    assert torch.allclose(
        scores.total().scores,
        whole.scores,
        rtol=0,
        atol=3e-5 * float(whole.scores.abs().max()),
    )


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_they_are_derivatives_of_cutting_at_one_position(kind):
    contrast = contrast_of(kind)
    contrast.differences *= 1e-4
    scores = attribution_by_position(contrast, "eap")
    largest = float(scores.scores.abs().max())
    for edge in [*scores.ranked(8), *scores.ranked()[300:304]]:
        guess = float(scores.scores[scores.names.index(edge[:2]), edge.position])
        measured = cut_at(contrast, edge, edge.position) - contrast.metric_full
        # second-order terms are 1e-4 of the first; some families' norms compute in
        # float32
        assert measured == pytest.approx(guess, abs=2e-2 * largest), edge


def test_nothing_happens_before_the_first_difference():
    """All positions, kept on purpose, against the window: zeros before it, the same
    behind it.
    """
    window, every = contrast_of(differ_from=3), contrast_of(differ_from=3, trim=False)
    inside, all_of_it = (attribution_by_position(c, "eap") for c in (window, every))
    assert inside.positions == (3, 4, 5) and all_of_it.positions == (0, 1, 2, 3, 4, 5)
    assert not all_of_it.scores[:, :3].any() and all_of_it.scores[:, 3:].any(0).all()
    assert torch.allclose(all_of_it.scores[:, 3:], inside.scores, atol=1e-10)


def test_cutting_everywhere_is_cutting():
    """An edge into `out` with a metric at the last position: cut there it is cut, cut
    elsewhere nothing happens.
    """
    contrast = contrast_of()
    last, cuts = Edge("m2", "out"), Cuts(contrast.graph)
    cuts.set(last, False)
    assert cut_at(contrast, last, 5) == pytest.approx(
        circuit_metric(contrast, cuts), abs=1e-12
    )
    assert cut_at(contrast, last, 2) == pytest.approx(contrast.metric_full, abs=1e-12)


def test_spans_tables_and_files(tmp_path):
    scores = attribution_by_position(contrast_of(differ_from=2), "eap")
    table = scores.by_span({"first": [2, 3], "rest": [4, 5], "before": [0, 1]})
    assert torch.allclose(
        torch.tensor(table["first"].to_numpy()), scores.scores[:, :2].sum(1)
    )
    assert (table["before"] == 0).all() and len(table) == len(scores.names)
    with pytest.raises(ValueError, match=r"two spans: \[3\]"):
        scores.by_span({"a": [2, 3], "b": [3]})
    frame = scores.to_pandas()
    assert (
        len(frame) == scores.scores.numel()
        and frame.score.abs().is_monotonic_decreasing
    )
    assert tuple(frame.iloc[0][["parent", "child", "position"]]) == tuple(
        scores.ranked(1)[0]
    )
    again = PositionScores.load(scores.save(tmp_path))
    assert again.ranked(9) == [tuple(e) for e in scores.ranked(9)] and torch.equal(
        again.scores, scores.scores
    )
    assert scores.plot(5, list("abcdef")).get_xticklabels()[0].get_text() == "c"


def test_refusals():
    contrast = contrast_of(differ_from=2)
    with pytest.raises(ValueError, match="unknown method"):
        attribution_by_position(contrast, "gradients")
    with pytest.raises(ValueError, match="steps must be"):
        attribution_by_position(contrast, steps=0)
    with pytest.raises(ValueError, match="position 1 is outside 2..5"):
        cut_at(contrast, ("m0", "out"), 1)
    with pytest.raises(ValueError, match="reads no sum"):
        cut_at(contrast, ("a0.1.q_in", "a0.1.q"), 3)
    with pytest.raises(ValueError, match="no node 'm7'"):
        cut_at(contrast, ("m7", "out"), 3)
    flat = Contrast(contrast.model, *contrast.tokens, "kl")
    with pytest.raises(ValueError, match="gradient of 'kl' is zero"):
        attribution_by_position(flat, "eap")
