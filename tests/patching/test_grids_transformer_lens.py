"""The helpers of `transformer_lens.patching` on a bridge with the same weights: equal
tables, cell by cell.
"""

import pytest
import torch
from families import tiny
from golden_models import GOLDEN

from mechtut.models.loading import load_model
from mechtut.patching.grids import AnswerMetric, patch_grid

DRAW = torch.Generator().manual_seed(0)
CLEAN, OTHER = (torch.randint(5, 90, (4, 6), generator=DRAW) for _ in range(2))
RIGHT, WRONG = torch.tensor([7, 8, 9, 10]), torch.tensor([17, 18, 19, 20])
METRIC = AnswerMetric("logit_diff", RIGHT, WRONG)

# their helper, our site, our cells, and the order of their axes
HELPERS = {
    "get_act_patch_resid_pre": ("resid_pre", "position", (0, 1)),
    "get_act_patch_resid_mid": ("resid_mid", "position", (0, 1)),
    "get_act_patch_attn_out": ("attn_out", "position", (0, 1)),
    "get_act_patch_mlp_out": ("mlp_out", "position", (0, 1)),
    "get_act_patch_attn_head_out_all_pos": ("z", "head", (0, 1)),
    "get_act_patch_attn_head_q_all_pos": ("q", "head", (0, 1)),
    "get_act_patch_attn_head_k_all_pos": ("k", "head", (0, 1)),
    "get_act_patch_attn_head_v_all_pos": ("v", "head", (0, 1)),
    "get_act_patch_attn_head_pattern_all_pos": ("pattern", "head", (0, 1)),
    "get_act_patch_attn_head_out_by_pos": ("z", "head_position", (0, 2, 1)),
    "get_act_patch_attn_head_q_by_pos": ("q", "head_position", (0, 2, 1)),
    "get_act_patch_attn_head_k_by_pos": ("k", "head_position", (0, 2, 1)),
    "get_act_patch_attn_head_v_by_pos": ("v", "head_position", (0, 2, 1)),
    "get_act_patch_attn_head_pattern_by_pos": ("pattern", "head_position", (0, 1, 2)),
    "get_act_patch_attn_head_pattern_dest_src_pos": (
        "pattern",
        "head_query_key",
        (0, 1, 2, 3),
    ),
}


# with keys and values that heads share
SHARED = [f"get_act_patch_attn_head_{x}_all_pos" for x in ("out", *"qkv", "pattern")]
CASES = [("gpt2", helper) for helper in HELPERS]
CASES += [("llama", helper) for helper in ("get_act_patch_resid_mid", *SHARED)]


@pytest.fixture(scope="module")
def both(request):
    """A bridge, its cache of the clean prompts, and our model."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    hf = tiny(request.param)
    hf.config.architectures = [type(hf).__name__]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN / "rome" / "tokenizer.json"),
        eos_token="<|endoftext|>",
    )
    bridge = TransformerBridge.boot_transformers(
        "gpt2", hf_model=hf, tokenizer=tokenizer, dtype=torch.float32
    )
    bridge.eval()
    with torch.no_grad():
        _, cache = bridge.run_with_cache(CLEAN)
    return bridge, cache, load_model(tiny(request.param))


def difference(logits):
    rows = range(len(logits))
    return (logits[rows, -1, RIGHT] - logits[rows, -1, WRONG]).mean()


@pytest.mark.parametrize(("both", "helper"), CASES, indirect=["both"])
def test_their_helper_gives_our_grid(both, helper):
    from transformer_lens import patching

    bridge, cache, model = both
    site, by, order = HELPERS[helper]
    with torch.no_grad():
        theirs = getattr(patching, helper)(bridge, OTHER, cache, difference)
    grid = patch_grid(model, CLEAN, OTHER, METRIC, site, by=by, progress=False)
    ours = grid.values.mean(0).permute(order)
    assert theirs.shape == ours.shape
    assert torch.allclose(theirs, ours, atol=1e-4)
    assert (ours - ours.flatten()[0]).abs().max() > 1e-3, "not one number everywhere"
