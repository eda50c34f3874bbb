"""Passes that end early give what whole ones give, and run no block too many."""

from contextlib import ExitStack

import pytest
import torch
from families import CONFIGS, model_of

from mechtut.lenses.causal_basis import _Tokens
from mechtut.models.hooks import capture, hooked
from mechtut.patching.layer_maps import fit_affine
from mechtut.patching.partial import record_blocks
from mechtut.patching.places import Source, read_states

TOKENS = torch.tensor([[5, 9, 40, 2, 77, 31], [8, 8, 3, 60, 11, 4]])


def blocks_run(model, call):
    """Numbers of the blocks that a call runs."""
    seen = set()
    with ExitStack() as hooks:
        for i, block in enumerate(model.blocks):
            hooks.enter_context(hooked(block, lambda *_, i=i: seen.add(i)))
        call()
    return seen


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_pass_up_to_a_block(kind):
    model = model_of(kind)
    whole = capture(model, TOKENS, "resid_pre")
    for until in range(model.n_layers):
        part = record_blocks(model, TOKENS, until=until)
        assert len(part.arguments) == until + 1 == len(part.resid) - 1
        for layer in range(until + 1):
            assert torch.equal(part.resid[layer], whole["resid_pre", layer])
        if until + 1 < model.n_layers:
            assert torch.equal(part.resid[-1], whole["resid_pre", until + 1])
        ran = blocks_run(model, lambda n=until: record_blocks(model, TOKENS, until=n))
        assert ran == set(range(until + 1))


@pytest.mark.filterwarnings("ignore:12 states do not determine a map")
def test_what_reads_early_layers_runs_no_late_block():
    model = model_of("gpt2", n_layer=4)
    place = Source(TOKENS, pos=None)
    for call, last in (
        (lambda: read_states(model, place, [-1]), 0),
        (lambda: read_states(model, place, [1, 0]), 1),
        (lambda: fit_affine(model, place, [(0, 2), (1, 1)]), 2),
        (lambda: _Tokens.read(model, TOKENS, None, 1), 1),
    ):
        assert blocks_run(model, call) == set(range(last + 1))


def test_a_block_that_is_not_there():
    model = model_of("gpt2")
    with pytest.raises(IndexError, match=f"layer {model.n_layers} does not exist"):
        record_blocks(model, TOKENS, until=model.n_layers)
    with pytest.raises(ValueError, match="until must be"):
        record_blocks(model, TOKENS, until=-1)
