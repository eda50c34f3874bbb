"""Every paper's main path on an accelerator that is not there: the same numbers as on
the CPU, and no tensor of the CPU where one of the accelerator is expected.
"""

import pytest
import torch
from families import tiny
from pretend import CPU, DeviceMix, accelerator, set_up, to_pretend

from mechtut.circuits.attribution import attribution_scores
from mechtut.circuits.baselines import subnetwork_probing
from mechtut.circuits.runs import Contrast
from mechtut.editing.covariance import key_covariance
from mechtut.editing.weights import fine_tune
from mechtut.models import loading
from mechtut.models.hooks import Edit, capture, intervene
from mechtut.models.loading import embedding_std, load_model, weight_fingerprint
from mechtut.neurons.collect import activations_on, collect
from mechtut.papers.acdc import acdc
from mechtut.papers.causal_tracing import trace
from mechtut.papers.function_vectors import evaluate, extract
from mechtut.papers.rome import edit_fact
from mechtut.patching.last_token import Change, run_changes
from mechtut.patching.replay import Replay
from mechtut.prompts.few_shot import Task
from mechtut.prompts.mean_activations import layer_average
from mechtut.prompts.subject_noise import Noise

try:
    set_up()
except ImportError as error:
    pytest.skip(
        f"this PyTorch has no Python back ends: {error}", allow_module_level=True
    )

KINDS = ["gpt2", "llama", "gemma3_text", "opt"]
PROMPT = "Riley Martin works as a"
TOKENS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))
PAIRS = "hot cold big small up down in out good bad fast slow old young rich poor"
PAIRS = f"{PAIRS} hard soft full empty loud quiet wet dry".split()
TASK = Task("tiny", tuple(zip(PAIRS[::2], PAIRS[1::2], strict=True)))


def words_of_mini(kind):
    """A tiny model of the family that reads the embedded tokenizer's text."""
    mini = load_model("mini", device="cpu")
    return tiny(kind, vocab_size=mini.d_vocab), mini.tokenizer


@pytest.fixture(scope="module", params=KINDS)
def both(request):
    """The model on the CPU and a copy on the accelerator."""
    here = load_model(*words_of_mini(request.param))
    with accelerator():
        there = load_model(to_pretend(words_of_mini(request.param)[0]), here.tokenizer)
    return here, there


def close(one, other, atol=1e-4):
    """Whether two results are the same numbers; both may be on a device."""
    one, other = torch.as_tensor(one), torch.as_tensor(other)
    return torch.allclose(one.cpu().double(), other.cpu().double(), atol=atol)


def _tracing(model):
    traces = [trace(model, PROMPT, "Riley Martin", n_samples=3)]
    options = {"component": "mlp_out", "window": 2, "sever": "attn_out"}
    traces += [trace(model, PROMPT, "Riley Martin", n_samples=2, **options)]
    return [t.sample_scores for t in traces]


def _noise(model):
    rows = model.embed.weight.detach()[:200]
    noise = Noise.like_embeddings(rows.cpu())
    shaped = trace(model, PROMPT, "Riley Martin", n_samples=2, noise=noise)
    drawn = torch.full((2, 2, model.d_model), 0.1)
    given = trace(model, PROMPT, "Riley Martin", noise=drawn)
    return [shaped.sample_scores, given.sample_scores, embedding_std(model)]


def _hooks(model):
    acts = capture(model, TOKENS, ["resid_post", "z.1", "q.1", "pattern.0"])
    edits = [Edit("v", 1, 0.2, pos=2), Edit("resid_post", 0, torch.ones(32), pos=[1])]
    with intervene(model, edits):
        edited = model.logits(TOKENS.tolist())
    return [acts["resid_post"], acts["z.1"], acts["pattern.0"], acts.logits, edited]


def _replay(model):
    value = torch.randn(32, generator=torch.Generator().manual_seed(1))
    sweep = [[Edit("resid_post", i, value, pos=p)] for i in range(3) for p in (2, 8)]
    sweep += [[Edit("z", 1, 0.0, head=1)], [Edit("k", 0, 0.0, pos=3)]]
    replay = Replay(model, TOKENS)
    changes = [Change(1, torch.zeros(model.d_head), head=0), Change(1, value)]
    last = torch.tensor([8, 6], device=model.device)
    changed = run_changes(model, TOKENS.to(model.device), last, changes)
    return [replay.run(sweep), changed]


def _vectors(model):
    options = {"n_prompts": 3, "n_trials": 2, "n_shots": 2, "k": 2}
    found = extract(model, TASK, only_known=False, **options)
    how = {"n_shots": 2, "only_known": False}
    table = evaluate(model, found.vector, TASK, [0, 2], **how)
    prompts = ["Riley Martin works", "Paris is"]
    return [found.effects, found.vector, table.top3, layer_average(model, prompts)]


def _circuits(model):
    pair = TOKENS, TOKENS.flip(1)
    circuit = acdc(model, *pair, threshold=0.3, progress=False)
    scores = attribution_scores(model, *pair)
    contrast = Contrast(model, *(x.to(model.device) for x in pair), "kl")
    probed = subnetwork_probing(contrast, steps=2, progress=False)
    return [circuit.decisions[:, 0], scores.scores, probed.scores]


def _editing(model):
    texts = [f"{PROMPT} singer and {w}." for w in ("Ana", "Ben", "pilot")] * 3
    covariance = key_covariance(model, texts, 1)
    covariance = covariance + 0.1 * torch.eye(len(covariance)).double()
    request = ("{} works as a", "Riley Martin", "chef")
    how = {"layer": 1, "covariance": covariance, "templates": ["{}", "Then {}"]}
    edit = edit_fact(model, *request, **how)
    with edit:
        after = model.logits(PROMPT)[0, -1].softmax(-1)
    tuned = fine_tune(model, *request, layer=1, steps=3)
    return [covariance, edit.losses, after, tuned.losses]


def _neurons(model):
    options = {"layers": [1], "n_tokens": 3, "n_top": 2, "n_random": 2}
    found = collect(model, TOKENS, **options, progress=False)
    record = found[1, 3]
    text = activations_on(model, 1, 3, [PROMPT])[0]
    return [record.top[0].activations, record.variance, text.activations]


PATHS = {
    f.__name__.strip("_"): f
    for f in (
        _tracing,
        _noise,
        _hooks,
        _replay,
        _vectors,
        _circuits,
        _editing,
        _neurons,
    )
}


@pytest.mark.parametrize("path", PATHS)
def test_papers_on_an_accelerator(both, path):
    here, there = both
    wanted = PATHS[path](here)
    with accelerator():
        found = PATHS[path](there)
        for one, other in zip(wanted, found, strict=True):
            assert close(one, other, atol=2e-3 if path == "editing" else 1e-4)


@pytest.mark.parametrize("path", ["tracing", "hooks", "vectors", "neurons", "circuits"])
def test_an_accelerator_without_float64(monkeypatch, path):
    """As Apple's: sums are in float32 there."""
    hf, tokenizer = words_of_mini("llama")
    wanted = PATHS[path](load_model(hf, tokenizer))
    with accelerator(float64=False):
        apple = torch.device("mps")
        from mechtut.models import precision

        real = precision.widest
        for module in _modules_with("widest"):
            monkeypatch.setattr(
                module, "widest", lambda d: real(apple if d.type == "pretend" else d)
            )
        there = load_model(to_pretend(words_of_mini("llama")[0]), tokenizer)
        for one, other in zip(wanted, PATHS[path](there), strict=True):
            assert close(one, other, atol=1e-3)


def _modules_with(name):
    import sys

    return [
        m
        for key, m in list(sys.modules.items())
        if key.startswith("mechtut.") and name in vars(m)
    ]


def test_what_was_stored_comes_back_on_the_device(both, tmp_path):
    here, there = both
    edits = [[Edit("z", 1, 0.0, head=h)] for h in range(3)]
    with accelerator():
        replay = Replay(there, TOKENS)
        first = replay.run(edits, folder=tmp_path)
        again = replay.run(edits, folder=tmp_path)
        assert first.device == again.device == there.device and close(first, again)
        assert weight_fingerprint(there) == weight_fingerprint(here)


def test_the_accelerator_refuses_what_a_gpu_refuses():
    """The test tool itself: without this rule the tests above could not fail."""
    with accelerator():
        x = torch.ones(2, device="pretend")
        with pytest.raises(DeviceMix):
            _ = x + torch.ones(2)
        with pytest.raises(TypeError):
            x.numpy()
        assert (x + torch.tensor(1.0)).device.type == "pretend"
        assert x.cpu().device == CPU
    with accelerator(float64=False), pytest.raises(TypeError, match="float64"):
        torch.ones(2, device="pretend").double()


def test_accelerators_are_found(monkeypatch):
    class Backend:
        def is_available(self):
            return True

    for name in ("cuda", "mps", "xpu"):
        monkeypatch.setattr(torch, name, None, raising=False)
    assert loading._fastest_device() == CPU
    for name in ("xpu", "mps", "cuda"):
        monkeypatch.setattr(torch, name, Backend())
        assert loading._fastest_device().type == name
