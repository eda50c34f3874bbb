"""Function vectors beyond the golden numbers: the engine against the plain loop, every
family, saving, hostile input.
"""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import CONFIGS, different, tiny
from golden_fv import TASK, fv_model
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from mechtut.models.hooks import Edit, capture, intervene
from mechtut.models.loading import load_model
from mechtut.papers.function_vectors import (
    CLASSES,
    FunctionVector,
    NoFunction,
    evaluate,
    extract,
    function_vector,
    indirect_effect,
    indirect_effect_by_class,
    inject,
    top_heads,
)
from mechtut.patching.last_token import GROUP, Change, naive_changes, run_changes
from mechtut.prompts import few_shot as icl
from mechtut.prompts.accuracy import known_queries, pooled, target_ranks
from mechtut.prompts.completions import (
    answer_nll,
    complete,
    exact,
    f1,
    first_word,
    mentions,
    reconstruct,
)
from mechtut.prompts.few_shot import (
    ICLPrompt,
    Task,
    Template,
    encode,
    every_query,
    layout,
    load_task,
    sample_prompts,
)
from mechtut.prompts.mean_activations import layer_average, mean_head_activations

MODEL = fv_model(torch.float64)
MINI = load_model("mini", device="cpu")
SHORT = sample_prompts(TASK, 4, 2, seed=1)


def definition(model, prompts, means):
    """One full forward pass per prompt and head."""
    out = torch.empty(len(prompts), model.n_layers, model.n_heads, dtype=torch.float64)
    for i, (ids, target) in enumerate(encode(model, p) for p in prompts):
        tokens = torch.tensor([ids])
        clean = model.logits(tokens)[0, -1].softmax(-1)[target]
        for layer in range(model.n_layers):
            for head in range(model.n_heads):
                with intervene(
                    model, [Edit("z", layer, means[layer, head], pos=-1, head=head)]
                ):
                    out[i, layer, head] = (
                        model.logits(tokens)[0, -1].softmax(-1)[target] - clean
                    )
    return out


# ---- the engine ----------------------------------------------------------------------
# ---------------------------


@pytest.mark.parametrize("kind", different(CONFIGS))
def test_streams_are_the_plain_loop_in_every_family(kind):
    model = load_model(tiny(kind, torch.float64))
    generator = torch.Generator().manual_seed(0)
    tokens, last = (
        torch.randint(1, 97, (3, 12), generator=generator),
        torch.tensor([11, 5, 9]),
    )
    vector = torch.randn(model.d_model, generator=generator, dtype=torch.float64)
    changes = [
        Change(i, vector[: model.d_head], head=h)
        for i in range(model.n_layers)
        for h in range(model.n_heads)
    ]
    changes += [Change(i, vector) for i in range(model.n_layers)] + [
        Change(1, vector, mode="set")
    ]
    fast, slow = (
        run_changes(model, tokens, last, changes),
        naive_changes(model, tokens, last, changes),
    )
    # Eager attention (Gemma 2's only one) takes its softmax in float32, whatever the
    # model's type.
    tolerance = 1e-4 if model.config._attn_implementation == "eager" else 1e-10
    assert (fast - slow).abs().max() <= tolerance
    clean = model.logits(tokens[:1])[0, -1]
    assert all((logits - clean).abs().max() > 1e-3 for logits in fast[0]), (
        "every change changes something"
    )


def test_more_versions_than_fit_into_a_group():
    ids = torch.tensor([encode(MODEL, SHORT[0]).ids])
    values = torch.randn(
        GROUP + 60,
        MODEL.d_head,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )
    changes = [Change(i % 6, v, head=i % 4) for i, v in enumerate(values)]
    last = torch.tensor([ids.shape[1] - 1])
    assert (
        run_changes(MODEL, ids, last, changes)
        - naive_changes(MODEL, ids, last, changes)
    ).abs().max() < 1e-12


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_effects_are_the_definition(batch_size):
    prompts = [
        *SHORT,
        *sample_prompts(TASK, 3, 1, seed=2, corrupt="shuffle"),
    ]  # of many lengths
    means = mean_head_activations(MODEL, prompts)
    ours = indirect_effect(MODEL, prompts, means, batch_size=batch_size)
    assert (ours - definition(MODEL, prompts, means)).abs().max() <= 1e-7
    assert ours.shape == (7, 6, 4)


def test_gpt_j_takes_the_plain_loop():
    model = load_model(tiny("gptj", torch.float64))
    prompts = [([5, 6, 7, 8], 9), ([3, 4], 11)]
    means = mean_head_activations(model, prompts)
    assert (
        indirect_effect(model, prompts, means) - definition(model, prompts, means)
    ).abs().max() <= 1e-7
    assert target_ranks(model, prompts, torch.zeros(model.d_model), [0])[
        :, 0
    ].shape == (2,)


def test_log_probability_and_resuming(tmp_path, monkeypatch):
    means = mean_head_activations(MODEL, SHORT)
    p = indirect_effect(MODEL, SHORT, means, batch_size=1)
    log = indirect_effect(MODEL, SHORT, means, score="log_probability")
    assert torch.equal(log.sign(), p.sign())
    import mechtut.papers.function_vectors as room

    real, calls = room.run_changes, []

    def dies_at_the_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(room, "run_changes", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        indirect_effect(MODEL, SHORT, means, batch_size=1, folder=tmp_path)
    assert torch.equal(
        indirect_effect(MODEL, SHORT, means, batch_size=1, folder=tmp_path), p
    )
    assert len(calls) == 5  # four batches; the interrupted one again, nothing twice
    with pytest.raises(ValueError, match="another sweep"):
        indirect_effect(MODEL, SHORT[:3], means, batch_size=1, folder=tmp_path)


def test_class_effects_of_the_last_token_are_the_head_effects():
    """The query's predictive token is the last one; patching its class patches the last
    token alone.
    """
    means = mean_head_activations(MODEL, SHORT, slots="all")
    by_class = indirect_effect_by_class(MODEL, SHORT[:1], means)
    last = indirect_effect(MODEL, SHORT[:1], means)
    assert (by_class[..., CLASSES.index("query_predictive")] - last).abs().max() <= 1e-7


# ---- the vector ----------------------------------------------------------------------
# ---------------------------


@pytest.mark.parametrize("kind", different(CONFIGS))
def test_all_heads_of_a_layer_write_what_the_layer_writes(kind):
    """With the means of a single prompt the contributions add up to attn_out, also
    behind a norm, but for the bias.
    """
    model = load_model(tiny(kind, torch.float64))
    ids = [5, 17, 3, 80, 9]
    means = mean_head_activations(model, [(ids, 1)])
    for layer in range(model.n_layers):
        ours = function_vector(model, means, [(layer, h) for h in range(model.n_heads)])
        theirs = capture(model, torch.tensor([ids]), f"attn_out.{layer}")[
            f"attn_out.{layer}"
        ][0, -1]
        bias = getattr(model.part(layer, model.family.attn_proj), "bias", None)
        if bias is not None:
            ours = ours + bias * model.family.residual_scale
        assert torch.allclose(ours, theirs, atol=1e-9)


def test_the_bias_quirk_is_the_bias_once_per_head():
    means = mean_head_activations(MODEL, SHORT)
    heads = [(1, 0), (1, 2), (4, 3)]
    quirk = function_vector(MODEL, means, heads, bias_per_head=True) - function_vector(
        MODEL, means, heads
    )
    assert torch.allclose(
        quirk, sum(MODEL.part(layer, "attn.c_proj").bias for layer, _ in heads)
    )


def test_inject_changes_the_output_and_leaves_nothing_behind():
    ids, vector = (
        torch.tensor([encode(MODEL, SHORT[0]).ids]),
        torch.linspace(-1, 1, MODEL.d_model),
    )  # (a constant is invisible)
    clean = MODEL.logits(ids)
    for layer in range(MODEL.n_layers):
        with inject(MODEL, vector, layer):
            under = MODEL.logits(ids)
        assert (
            torch.equal(under[:, :-1], clean[:, :-1])
            and (under[:, -1] - clean[:, -1]).abs().max() > 1e-3
        )
    assert torch.equal(MODEL.logits(ids), clean)
    with inject(MODEL, vector, 5, mode="set"):
        assert torch.allclose(MODEL.logits(ids)[0, -1], MODEL.unembed(vector.double()))


def test_inject_in_a_left_padded_batch_and_in_generate():
    short, long = (
        encode(MODEL, p).ids for p in (ICLPrompt([], "hot", "cold"), SHORT[0])
    )
    pad = len(long) - len(short)
    tokens, mask = (
        torch.tensor([[0] * pad + short, long]),
        torch.ones(2, len(long), dtype=torch.long),
    )
    mask[0, :pad] = 0
    vector = torch.randn(MODEL.d_model, generator=torch.Generator().manual_seed(0))
    with inject(MODEL, vector, 2):
        both = MODEL.logits(tokens, mask)[:, -1]
        alone = [MODEL.logits(torch.tensor([ids]))[0, -1] for ids in (short, long)]
        generated = MODEL.hf.generate(
            torch.tensor([short]), max_new_tokens=4, do_sample=False, pad_token_id=1
        )
        assert generated[0, len(short) :].tolist() == complete(MODEL, (short, 0), 4)
    assert (both - torch.stack(alone)).abs().max() < 1e-10


def test_ranks_are_positions_in_the_sorted_logits():
    vector = torch.randn(MODEL.d_model, generator=torch.Generator().manual_seed(0))
    ranks = target_ranks(MODEL, SHORT, vector, [3])
    for row, (ids, target) in zip(
        ranks.tolist(), (encode(MODEL, p) for p in SHORT), strict=True
    ):
        with inject(MODEL, vector, 3):
            order = (
                MODEL.logits(torch.tensor([ids]))[0, -1]
                .argsort(descending=True)
                .tolist()
            )
        assert row[1] == order.index(target)


def test_a_vector_per_layer():
    hbar = layer_average(MODEL, SHORT)
    together = target_ranks(MODEL, SHORT, hbar)
    one_by_one = [target_ranks(MODEL, SHORT, hbar[i], [i])[:, 1] for i in range(6)]
    assert torch.equal(together[:, 1:], torch.stack(one_by_one, 1))


# ---- the recipe on the embedded model
# ---------------------------------------------------------------------------


def test_extract_save_and_load(tmp_path):
    found = extract(MODEL, TASK, n_prompts=5, n_trials=3, k=4, only_known=False)
    again = FunctionVector.load(found.save(tmp_path))
    assert (
        torch.equal(again.vector, found.vector) and again.provenance == found.provenance
    )
    table = again.to_pandas()
    assert len(table) == 24 and {
        tuple(r) for r in table[table.selected][["layer", "head"]].to_numpy()
    } == set(found.heads)
    assert table.effect.max() == pytest.approx(float(found.average_effect.max()))
    again.plot()


def test_a_table_of_accuracies():
    table = evaluate(
        MODEL,
        torch.zeros(128),
        TASK,
        [0, 5],
        settings=("zero_shot", "few_shot", "random"),
        only_known=False,
    )
    assert (
        len(table) == 6 and set(table.n) == {29} and (table.top1 == table.clean).all()
    )
    assert (table.top1 <= table.top2).all() and (table.top2 <= table.top3).all()
    assert (table.low <= table.top1).all() and (table.high >= table.top1).all()
    both = pooled([table, table])
    assert set(both.n) == {58} and np.allclose(both.top1, table.top1)
    assert (both.high - both.low < table.high - table.low).all()


def test_a_model_without_the_function_is_told_so():
    with pytest.raises(
        NoFunction, match="answers no query of 'toy-antonym'|answers no query of 'task'"
    ):
        extract(MODEL, TASK)
    with pytest.raises(ValueError, match="answers no test query"):
        evaluate(MODEL, torch.zeros(128), TASK)
    assert known_queries(MODEL, TASK, "valid") == []


# ---- tasks and prompts ---------------------------------------------------------------
# ---------------------------


@given(
    st.integers(0, 2**31),
    st.integers(0, 12),
    st.sampled_from([None, "shuffle", "random"]),
)
def test_prompts_keep_their_promises(seed, shots, corrupt):
    true = dict(TASK.pairs)
    prompts = sample_prompts(TASK, 3, shots, seed, corrupt, words=["one", "two"])
    assert prompts == sample_prompts(
        TASK, 3, shots, seed, corrupt, words=["one", "two"]
    )
    for p in prompts:
        shown = [x for x, _ in p.demonstrations]
        assert (
            len(set(shown)) == shots
            and p.query not in shown
            and true[p.query] == p.target
        )
        labels, right = [y for _, y in p.demonstrations], [true[x] for x in shown]
        if corrupt == "random":
            assert set(labels) <= {"one", "two"}
        else:
            assert sorted(labels) == sorted(right) and (corrupt or labels == right)


@given(st.integers(0, 1000), st.integers(4, 200))
def test_a_split_is_a_partition(seed, n):
    pairs = tuple((f"x{i}", f"y{i}") for i in range(n))
    train, valid, test = Task("t", pairs).split(seed)
    assert sorted(train + valid + test) == sorted(pairs) and len(train) == int(
        0.7 * n + 1e-9
    )


def test_roles_cover_every_token():
    for p in sample_prompts(load_task("past"), 3, 4):
        where = layout(MINI, p)
        assert (
            len(where.ids) == len(where.roles) == len(where.slots)
            and where.roles[-1] == "query_predictive"
        )
        assert where.slots == sorted(where.slots) and where.slots[-1] == 6 * 4 + 3


def test_tokenizers_without_bos_and_with_their_own():
    prompt, before = (
        ICLPrompt([("hot", "cold")], "big", "small"),
        encode(MODEL, SHORT[0]).ids[0],
    )
    own, none = fv_model(), fv_model()
    own.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    none = replace(none, add_bos=False)
    with_bos = encode(MODEL, prompt)
    assert with_bos.ids[0] == before == 0
    assert encode(own, prompt) == with_bos and layout(own, prompt) == layout(
        MODEL, prompt
    )
    assert (
        encode(none, prompt) == (with_bos.ids[1:], with_bos.target)
        and layout(none, prompt).roles[0] == "structural"
    )


def test_the_tokenizers_padding_side_does_not_matter():
    prompts = [*SHORT, ICLPrompt([], "hot", "cold")]
    other = fv_model(torch.float64)
    other.tokenizer.padding_side, other.tokenizer.pad_token = "left", "<|endoftext|>"
    assert torch.equal(
        mean_head_activations(other, prompts), mean_head_activations(MODEL, prompts)
    )


def test_tasks_from_files_and_the_authors(tmp_path, monkeypatch):
    file = tmp_path / "shout.json"
    file.write_text(
        json.dumps([{"input": "a", "output": "A"}, {"input": "1", "output": 1}])
    )
    assert (
        load_task(file).pairs == (("a", "A"), ("1", "1"))
        and load_task(str(file)).name == "shout"
    )
    monkeypatch.setattr(icl.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(icl, "_download", lambda name, clone: file.read_bytes())
    assert load_task("todd/shout").pairs == load_task(file).pairs
    monkeypatch.setattr(
        icl, "_download", lambda name, clone: pytest.fail("fetched again")
    )
    assert load_task("todd/shout").name == "shout"
    (tmp_path / ".cache/mechtut/todd/shout.json").write_text("[]")
    with pytest.raises(ValueError, match="not the authors' file"):
        load_task("todd/shout")
    # of the authors' tasks this release knows the sums
    monkeypatch.setattr(icl, "_download", lambda name, clone: file.read_bytes())
    with pytest.raises(ValueError, match="antonym.json is not the authors' file"):
        load_task("todd/antonym")
    assert not (tmp_path / ".cache/mechtut/todd/antonym.json").exists()
    assert len(icl.COMMIT) == 40


def test_the_authors_tasks_come_from_one_commit_of_their_repository(
    tmp_path, monkeypatch
):
    origin = tmp_path / "origin"
    (origin / "dataset_files/abstractive").mkdir(parents=True)
    file = origin / "dataset_files/abstractive/shout.json"
    file.write_text(json.dumps([{"input": "a", "output": "A"}]))

    def git(*arguments):
        who = ["-c", "user.name=t", "-c", "user.email=t@t"]
        done = subprocess.run(
            ["git", "-C", origin, *who, *arguments],
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    monkeypatch.setattr(icl, "COMMIT", git("rev-parse", "HEAD"))
    file.write_text(json.dumps([{"input": "a", "output": "B"}]))
    git("commit", "--quiet", "-am", "two")
    monkeypatch.setattr(icl, "TODD", origin.as_uri())
    monkeypatch.setattr(icl.Path, "home", lambda: tmp_path)
    assert load_task("todd/shout").pairs == (("a", "A"),), (
        "the pinned commit, not the newest"
    )
    with pytest.raises(FileNotFoundError, match=r"no task 'whisper'; they have shout"):
        load_task("todd/whisper")
    monkeypatch.setattr(icl, "COMMIT", "0123456789")
    with pytest.raises(RuntimeError, match="git"):
        icl._download("shout", tmp_path / ".cache/mechtut/todd/function_vectors.git")


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"a": 1}', "must hold a list"),
        ('[{"input": "a"}]', "must hold a list"),
        ('[{"input": "a", "output": ["b"]}]', "words"),
        ('[{"input": "a", "output": " "}]', "words"),
    ],
)
def test_files_that_are_no_tasks(tmp_path, content, words):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        load_task(tmp_path / "bad.json")


# ---- completions ---------------------------------------------------------------------
# ---------------------------


def test_scores_of_texts():
    assert (
        exact(" Cold.\nQ:", "cold"),
        first_word("cold as ice", "Cold"),
        mentions("it is cold", "cold"),
    ) == (1, 1, 1)
    assert (
        exact("very cold", "cold"),
        first_word("very cold", "cold"),
        mentions("scold", "cold"),
    ) == (0, 0, 0)
    assert f1("very cold", "cold") == pytest.approx(2 / 3) and f1("", "cold") == 0


def test_nll_is_the_sum_over_the_answers_tokens():
    prompt = ICLPrompt([("hot", "cold")], "left", "right hand")
    ids, answer = encode(MODEL, prompt).ids, icl.answer_ids(MODEL, prompt)
    assert len(answer) > 1
    steps = [
        MODEL.logits(torch.tensor([ids + answer[:i]]))[0, -1].log_softmax(-1)[a]
        for i, a in enumerate(answer)
    ]
    assert answer_nll(MODEL, prompt) == pytest.approx(-float(sum(steps)) / len(answer))


def test_a_reconstruction_reads_alike():
    vector = 5 * torch.randn(
        128, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    again = reconstruct(MODEL, vector, steps=300)
    p, q = (MODEL.unembed(v).softmax(-1) for v in (vector, again))
    assert (p - q).abs().max() < 0.05 and again.norm() == pytest.approx(
        float(vector.norm())
    )


# ---- hostile input -------------------------------------------------------------------
# ---------------------------

MEANS = mean_head_activations(MODEL, SHORT)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: Task("tiny", TASK.pairs[:3]).split(), "needs at least 4"),
        (lambda: sample_prompts(TASK, 2, 500), "n_shots cannot be 500"),
        (
            lambda: sample_prompts(TASK, 2, -1),
            "n_shots must be a whole .* at least 0, not -1",
        ),
        (lambda: sample_prompts(TASK, 0, 2), "n_prompts must be .* at least 1"),
        (lambda: sample_prompts(TASK, 2, 2, queries=[]), "no query to draw from"),
        (lambda: sample_prompts(TASK, 2, 2, corrupt="both"), "corrupt must be"),
        (lambda: ICLPrompt([("", "a")], "b", "c"), "must not be empty"),
        (lambda: ICLPrompt([], "b", " "), "must not be empty"),
        (lambda: Template.parse("Q:{}"), "two {}"),
        (lambda: encode(MODEL, sample_prompts(TASK, 1, 90)[0]), "reads at most 512"),
        (lambda: encode(MODEL, ([1, 2], 5000)), "outside 0..1199"),
        (lambda: encode(MODEL, ([], 1)), "no tokens"),
        (lambda: mean_head_activations(MODEL, []), "no prompts"),
        (lambda: mean_head_activations(MODEL, SHORT, slots="some"), "slots must be"),
        (
            lambda: mean_head_activations(MODEL, [([1, 2], 3)], slots="all"),
            "need ICLPrompt",
        ),
        (
            lambda: mean_head_activations(
                MODEL, [*SHORT, *every_query(TASK, 1)], slots="all"
            ),
            "number of demonstrations",
        ),
        (
            lambda: mean_head_activations(MODEL, SHORT, batch_size=0),
            "batch_size must be",
        ),
        (lambda: indirect_effect(MODEL, SHORT, MEANS[:, :3]), r"\[layer, head"),
        (lambda: indirect_effect(MODEL, ["hello"], MEANS), "no right answer"),
        (
            lambda: indirect_effect(MODEL, SHORT, MEANS * float("nan")),
            "NaN or infinite",
        ),
        (lambda: indirect_effect(MODEL, SHORT, MEANS, score="logit"), "score must be"),
        (lambda: indirect_effect_by_class(MODEL, SHORT, MEANS), "slots='all'"),
        (lambda: top_heads(torch.zeros(2, 6, 4), 25), "k cannot be 25"),
        (lambda: function_vector(MODEL, MEANS, [(0, 4)]), "head 4 does not exist"),
        (lambda: function_vector(MODEL, MEANS, [(0, 1), (0, 1)]), "different ones"),
        (lambda: function_vector(MODEL, MEANS, []), "at least one"),
        (lambda: function_vector(MODEL, MEANS, [(6, 0)]), "layer 6 does not exist"),
        (lambda: function_vector(MODEL, MEANS, [(-1, 0)]), "layer -1 does not exist"),
        (lambda: inject(MODEL, torch.zeros(64), 0), "d_model is 128 here, not 64"),
        (lambda: inject(MODEL, torch.zeros(128), 6), "layer 6 does not exist"),
        (lambda: target_ranks(MODEL, SHORT, torch.zeros(3, 128)), "the vector must be"),
        (
            lambda: evaluate(
                MODEL, torch.zeros(128), TASK, settings=("one_shot",), only_known=False
            ),
            "must be one of .zero_shot.",
        ),
        (lambda: complete(MODEL, "hello", 600), "do not fit"),
        (lambda: load_task("hypernyms"), "no task 'hypernyms'"),
        (
            lambda: icl._download("../secrets", Path("nowhere")),
            "not the name of a task",
        ),
        (
            lambda: run_changes(
                MODEL,
                torch.tensor([[1]]),
                torch.tensor([0]),
                [Change(0, MEANS[0, 0], head=9)],
            ),
            "head 9",
        ),
    ],
)
def test_clear_errors(call, words):
    with pytest.raises((ValueError, IndexError, FileNotFoundError), match=words):
        call()


def test_one_prompt_instead_of_a_list():
    with pytest.raises(TypeError, match="must be a list"):
        layer_average(MODEL, SHORT[0])


def test_words_that_tokenize_to_nothing():
    """A tokenizer without tokens for some characters, and without an unknown token."""
    mute = fv_model()
    mute.tokenizer.backend_tokenizer.normalizer = __import__(
        "tokenizers"
    ).normalizers.Replace(" hush", "")
    with pytest.raises(ValueError, match="'hush' has no token"):
        layout(mute, ICLPrompt([("hush", "loud")], "big", "small"))
    with pytest.raises(ValueError, match="' hush' adds no token"):
        encode(mute, ICLPrompt([("hot", "cold")], "big", "hush"))


def test_without_a_tokenizer():
    bare = load_model(tiny("gpt2"))
    assert mean_head_activations(bare, [([1, 2, 3], 4)]).shape == (3, 4, 8)
    with pytest.raises(ValueError, match="has no tokenizer"):
        mean_head_activations(bare, SHORT)


def test_a_completion_ends_at_any_of_several_end_tokens(monkeypatch):
    free = complete(MODEL, ([5, 6, 7], 0), 6)
    monkeypatch.setattr(MODEL.hf.generation_config, "eos_token_id", [96, free[2]])
    assert complete(MODEL, ([5, 6, 7], 0), 6) == free[: free.index(free[2]) + 1]


def test_known_queries_are_found_once():
    task, vector = load_task("antonym"), torch.zeros(MINI.d_model)
    known = known_queries(MINI, task, "test")
    assert 0 < len(known) < len(task.split().test) or known
    whole = evaluate(MINI, vector, task, [3])
    assert evaluate(MINI, vector, task, [3], only_known=known).equals(whole)
    assert (evaluate(MINI, vector, task, [3], only_known=known[:2]).n == 2).all()
    with pytest.raises(TypeError, match="only_known"):
        evaluate(MINI, vector, task, [3], only_known=[0.5])
