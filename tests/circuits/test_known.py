"""Hand-written models do what they say, and their circuits are found, edge for edge."""

import pytest
import torch

from mechtut.circuits import known
from mechtut.circuits.attribution import contrast_scores, select
from mechtut.circuits.circuit import evaluate_circuit, roc
from mechtut.circuits.runs import Contrast
from mechtut.papers.acdc import acdc, sweep

MADE = {"induction": known.induction, "reverse": known.reverse}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", MADE)
def test_they_work(name, seed):
    made = MADE[name](seed=seed)
    said = made.model.logits(made.clean)[made.mask].softmax(-1)
    assert (said.gather(1, made.answers[made.mask][:, None]) > 0.99).all()
    assert made.clean.shape == made.corrupted.shape and not torch.equal(
        made.clean, made.corrupted
    )


@pytest.mark.parametrize("ablation", ["zero", "resample"])
@pytest.mark.parametrize("name", MADE)
def test_recovered_edge_for_edge(name, ablation):
    """No edge too many and none missing, at thresholds far apart."""
    made = MADE[name]()
    options = {"positions": made.mask, "split_positions": True, "ablation": ablation}
    found = sweep(
        made.model,
        made.clean,
        made.corrupted,
        [1e-5, 1e-2, 1.0],
        **options,
        progress=False,
    )
    for circuit in found:
        assert {(e.parent, e.child) for e in circuit.edges} == {
            tuple(e) for e in made.truth
        }
        assert circuit.metric_final < 1e-3
    curve = roc(found, made.truth)
    assert curve.edge_auc == curve.node_auc == 1
    assert (
        evaluate_circuit(
            made.model,
            made.truth,
            made.clean,
            made.corrupted,
            positions=made.mask,
            ablation=ablation,
        )
        < 1e-3
    )


def test_gates():
    """All of an AND gate is found; of an OR gate only one arm, in whatever order."""
    for order in ("reverse", "forward", "shuffle:1"):
        for kind in ("and", "or"):
            made = known.gate(kind)
            options = {
                "positions": made.mask,
                "split_positions": True,
                "ablation": "zero",
                "order": order,
            }
            found = {
                (e.parent, e.child)
                for e in acdc(
                    made.model, made.clean, made.corrupted, threshold=0.01, **options
                ).edges
            }
            assert found <= {tuple(e) for e in made.truth}
            arms = {("a0.0", "m0.in"), ("a0.1", "m0.in")} & found
            assert len(arms) == (2 if kind == "and" else 1)
    with pytest.raises(ValueError, match="'or' or 'and'"):
        known.gate("xor")


def test_gradients_rank_the_induction_circuit_first():
    made = known.induction()
    contrast = Contrast(
        made.model, made.clean, made.corrupted, "kl", made.mask, split_positions=True
    )
    chosen = select(contrast_scores(contrast, "eap-ig-inputs"), n=7)
    assert set(chosen) == set(made.truth)
