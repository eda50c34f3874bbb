"""The everyday data: enough of it, nothing twice, no gap left open, and in a form that
the rest of the library takes.
"""

import json
import re
from collections import Counter
from importlib.resources import files

import pytest
import torch

from mechtut import WeightEdit, evaluate_edit, load_model
from mechtut.editing.weights import mlp_projection
from mechtut.prompts.everyday import (
    answered,
    everyday_cases,
    everyday_facts,
    everyday_tasks,
    everyday_texts,
    ioi_prompts,
    sentence_pairs,
)
from mechtut.prompts.facts import continues_with, known_fact
from mechtut.prompts.few_shot import ICLPrompt, load_task, sample_prompts

FACTS = everyday_facts()
AT_LEAST = {
    "antonym": 140,
    "country-capital": 80,
    "present-past": 100,
    "singular-plural": 100,
    "english-french": 100,
    "english-spanish": 100,
}
MINI = load_model("mini", device="cpu")


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2, fetched if this machine has not done so before."""
    return load_model("smollm2", device="cpu")


def read(name):
    path = files("mechtut") / "data" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def twice(things):
    return [x for x, n in Counter(things).items() if n > 1]


def test_facts_are_many_and_none_is_there_twice():
    assert len(FACTS) >= 240 and len({f.relation for f in FACTS}) >= 10
    assert not twice((f.relation, f.subject) for f in FACTS)
    assert not twice(f.prompt for f in FACTS)
    for fact in FACTS:
        texts = (fact.subject, fact.answer, fact.new_answer)
        assert all(t and t == t.strip() for t in texts), fact
        assert fact.prompt == fact.prompt.rstrip()


def test_no_prompt_gives_its_answer_away():
    given = {
        f.relation
        for f in FACTS
        if re.search(rf"\b{re.escape(f.answer)}\b", f.prompt, re.IGNORECASE)
    }
    assert not given


def test_every_template_has_one_gap():
    for name, relation in read("facts").items():
        templates = [relation["prompt"], *relation["paraphrases"]]
        assert len(set(templates)) == len(templates) >= 3, name
        for template in templates:
            assert template.count("{}") == 1 and template.count("{") == 1, template
            assert template == template.strip()
    for fact in FACTS:
        assert fact.template == read("facts")[fact.relation]["prompt"]


def test_neighbours_share_the_answer_and_are_others():
    by_prompt = {f.prompt: f for f in FACTS}
    for fact in FACTS:
        near = [by_prompt[p] for p in fact.neighbours]
        assert {(f.relation, f.answer) for f in near} <= {(fact.relation, fact.answer)}
        assert fact not in near and not twice(fact.neighbours)
        same = [f for f in FACTS if f.relation == fact.relation]
        assert len(near) == sum(f.answer == fact.answer for f in same) - 1
    assert sum(bool(f.neighbours) for f in FACTS) > len(FACTS) / 2


def test_new_answers_are_false_ones_drawn_with_a_seed():
    again, other = everyday_facts(), everyday_facts(seed=1)
    assert again == FACTS
    answers = {(f.relation, f.answer) for f in FACTS}
    for fact in (*FACTS, *other):
        assert fact.new_answer != fact.answer
        assert (fact.relation, fact.new_answer) in answers
    differ = sum(
        a.new_answer != b.new_answer for a, b in zip(FACTS, other, strict=True)
    )
    assert differ > len(FACTS) / 2
    assert everyday_facts("book_author") == tuple(
        f for f in FACTS if f.relation == "book_author"
    )


def test_tasks_are_large_enough_and_have_no_input_twice():
    tasks = everyday_tasks()
    assert len(tasks) >= 8
    for name, task in tasks.items():
        assert load_task(name) == task and task.name == name
        assert len(task.pairs) >= AT_LEAST.get(name.removeprefix("everyday/"), 60), name
        assert not twice(x for x, _ in task.pairs), name
        words = [w for pair in task.pairs for w in pair]
        assert all(w and w == w.strip() for w in words), name
    assert {f"everyday/{n}" for n in AT_LEAST} <= tasks.keys()


@pytest.mark.parametrize("name", ["antonym", "english-french", "english-spanish"])
def test_no_pair_is_there_in_both_directions(name):
    pairs = set(everyday_tasks()[f"everyday/{name}"].pairs)
    assert not {(x, y) for x, y in pairs if x != y and (y, x) in pairs}


def test_spelling_tasks_are_what_they_say():
    tasks = everyday_tasks()
    for x, y in tasks["everyday/capitalize"].pairs:
        assert x.islower() and y == x.capitalize()
    for x, y in tasks["everyday/first-letter"].pairs:
        assert y == x[0] and len(x) > 1


def test_plain_names_stay_those_of_the_embedded_world():
    assert load_task("antonym") != load_task("everyday/antonym")
    with pytest.raises(
        FileNotFoundError, match=r"everyday/antonym.*everyday/next-item"
    ):
        load_task("everyday/antonyms")


def test_records_say_the_same_as_their_facts():
    for fact, case in zip(FACTS, everyday_cases(FACTS), strict=True):
        rewrite = case["requested_rewrite"]
        assert rewrite["prompt"].format(rewrite["subject"]) == fact.prompt
        assert rewrite["target_true"]["str"] == fact.answer
        assert rewrite["target_new"]["str"] == fact.new_answer
        assert case["paraphrase_prompts"] and case["reference_texts"]
        assert known_fact(fact) == (fact.prompt, fact.subject, fact.answer)


def test_records_go_through_the_evaluation_of_edits(smollm2):
    facts = [next(f for f in FACTS if f.subject == "Eiffel Tower"), FACTS[-1]]
    shape = mlp_projection(smollm2, 3).weight.T.shape
    edit = WeightEdit(model=smollm2, layer=3, delta=torch.zeros(shape), request={})
    results = [evaluate_edit(smollm2, edit, c) for c in everyday_cases(facts)]
    for measured, fact in zip(results, facts, strict=True):
        assert str(measured["pre"]) == str(measured["post"])  # NaN is not NaN
        near = measured["pre"]["neighborhood_prompts_probs"]
        assert len(near) == min(5, len(fact.neighbours))
    assert results[0]["pre"]["rewrite_success"] == 0  # it is not in the new place


def test_sentence_pairs_differ():
    for name, least in (("sentiment", 60), ("formality", 40), ("tense", 40)):
        pairs = sentence_pairs(name)
        assert len(pairs) >= least
        assert not twice(s for pair in pairs for s in pair)


def test_the_lists_of_the_indirect_objects():
    part = read("sentence_pairs")["ioi"]
    assert len(part["templates"]) >= 48 and len(part["names"]) >= 60
    for key, words in part.items():
        assert not twice(words), key
    for template in part["templates"]:
        gaps = Counter(re.findall(r"\{(\w+)\}", template))
        assert gaps == dict.fromkeys(("A", "B", "S", "place", "object"), 1), template
        assert all(f" {{{name}}}" in template for name in "ABS"), template
        assert template.index("{S}") > template.index("{B}")


def test_indirect_objects_differ_in_names_only(smollm2):
    names = set(read("sentence_pairs")["ioi"]["names"])
    pairs = ioi_prompts(200, seed=3)
    assert pairs == ioi_prompts(200, seed=3) != ioi_prompts(200)
    for pair in pairs:
        clean, corrupted = smollm2.encode(pair.clean), smollm2.encode(pair.corrupted)
        assert len(clean) == len(corrupted)
        differ = [
            (smollm2.decode([a]), smollm2.decode([b]))
            for a, b in zip(clean, corrupted, strict=True)
            if a != b
        ]
        assert len(differ) == 3
        assert {x.removeprefix(" ") for both in differ for x in both} <= names
        (answer,), (wrong,) = pair.answers, pair.wrong
        assert pair.clean.count(f" {wrong}") == 2 and f" {answer} " in pair.clean
        other = set(re.findall(r"\w+", pair.corrupted))
        assert not {answer, wrong} & other
        assert len(other & names) == 3  # two that come, and a third that gives
    first = sum(p.clean.index(p.answers[0]) < p.clean.index(p.wrong[0]) for p in pairs)
    assert 60 < first < 140


def test_every_name_is_one_token(smollm2):
    for name in read("sentence_pairs")["ioi"]["names"]:
        assert len(smollm2.continuation("When", f" {name}")) == 1


def test_texts_are_short_and_many():
    texts = everyday_texts()
    assert len(texts) >= 120 and not twice(texts)
    words = [len(t.split()) for t in texts]
    assert sum(words) >= 8000 and min(words) >= 40 and max(words) <= 90
    assert 0 < len(everyday_texts("code")) < len(texts)


def test_files_are_small_and_one_pair_stands_in_one_line():
    folder = files("mechtut") / "data"
    names = ("facts", "tasks", "sentence_pairs", "texts")
    sources = [(folder / f"{n}.json").read_text(encoding="utf-8") for n in names]
    assert sum(len(s.encode()) for s in sources) < 600_000
    assert '\n   ["Eiffel Tower", "Paris"],\n' in sources[0]
    assert '\n  ["hot", "cold"],\n' in sources[1]


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: everyday_facts("capital"),
        lambda: sentence_pairs("mood"),
        lambda: everyday_texts("politics"),
    ],
)
def test_unknown_names_are_told_the_known_ones(attempt):
    with pytest.raises(ValueError, match=r"there are .*(book_author|formality|sport)"):
        attempt()


def test_answered_agrees_with_one_prompt_at_a_time(smollm2):
    facts = FACTS[::40]
    prompts, answers = [f.prompt for f in facts], [f.answer for f in facts]
    found = answered(smollm2, prompts, answers, batch_size=5)
    pairs = zip(prompts, answers, strict=True)
    assert found == [continues_with(smollm2, p, a)[0] for p, a in pairs]
    assert 0 < sum(found) < len(found)


def test_an_answer_must_not_go_on_as_a_longer_word(smollm2):
    """Tokens of a beginning are right, and yet the word is another one."""
    full = "The capital of Norway is Oslo, and the capital of Ethiopia is"
    assert answered(smollm2, [full], ["Addis Ababa"]) == [True]
    part = smollm2.decode(smollm2.continuation(full, " Addis Ababa")[:-1]).strip()
    assert continues_with(smollm2, full, part)[0]
    assert answered(smollm2, [full], [part]) == [False]


@pytest.mark.parametrize("name", ["mini", "smollm2"])
def test_a_shared_beginning_changes_nothing(name, smollm2):
    model = MINI if name == "mini" else smollm2
    task = load_task("antonym" if name == "mini" else "everyday/present-past")
    shown = sample_prompts(task, 1, n_shots=4, seed=2)[0].demonstrations
    asked = [ICLPrompt(shown, x, y) for x, y in task.split().valid[:8]]
    start = asked[0].text.rpartition("\n\n")[0]
    texts, answers = [p.text for p in asked], [p.target for p in asked]
    whole = answered(model, texts, answers)
    cut = [t.removeprefix(start) for t in texts]
    assert answered(model, cut, answers, start=start, batch_size=3) == whole
    assert any(whole)


def test_a_beginning_ends_between_tokens(smollm2):
    with pytest.raises(ValueError, match="share a token"):
        answered(smollm2, ["el Tower is in"], ["Paris"], start="The Eiff")
