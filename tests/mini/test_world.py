"""The embedded world: the same every time, its facts hidden in combinations, its
held-out text never shown.
"""

import itertools
import random
import re

import pytest

from mechtut.mini.corpus import FOUNDATION, MAKERS, MIXTURE, corpus, icl_prompt
from mechtut.mini.tokenizer import build_tokenizer, pack_rows
from mechtut.mini.world import World, make_pairs

CIRCUITS = ("ioi", "greater_than", "induction", "docstring", "pronoun")


@pytest.fixture(scope="module")
def world():
    return World(0)


@pytest.fixture(scope="module")
def tokenizer(world):
    return build_tokenizer(world)


@pytest.fixture(scope="module")
def documents(world):
    return list(itertools.islice(corpus(world, seed=11), 4000))


def test_the_world_is_the_same_every_time(world):
    again = World(0)
    assert (
        world.facts == again.facts
        and world.tasks == again.tasks
        and world.words == again.words
    )
    assert World(1).facts != world.facts


def test_tasks_on_lists(world):
    for name in world.list_tasks:
        position, operation = name.split()
        pairs = world.list_pairs(name, 20)
        assert pairs == world.list_pairs(name, 20) != world.list_pairs(name, 20, seed=1)
        for x, y in pairs:
            word = x.split(", ")[0 if position == "first" else 2]
            assert y == (
                word
                if operation == "copy"
                else dict(world.tasks[operation].pairs)[word]
            )


def test_a_list_task_can_ask_for_held_out_words(world):
    task, words = world.list_tasks["last capital"], world.tasks["capital"]
    x, y = task.pair(words, random.Random(0), held_out=True)
    assert (x.split(", ")[2], y) in words.held_out


def test_the_world_is_large_enough(world):
    assert len(world.facts) >= 500
    assert len({f.relation for f in world.facts}) >= 9
    assert len(world.tasks) >= 14
    assert all(
        len(t.held_out) >= 3 and not set(t.held_out) & set(t.train)
        for t in world.tasks.values()
    )
    assert min(len(v) for v in world.by_subject.values()) >= 3


def test_every_subject_has_one_object_for_each_relation(world):
    keys = [(f.subject, f.relation) for f in world.facts]
    assert len(keys) == len(set(keys))
    assert all(
        f.subject in f.prompt and all(f.subject in h for h in f.held_out_prompts)
        for f in world.facts
    )
    assert all(
        not p.endswith(" ")
        for f in world.facts
        for p in (f.prompt, *f.held_out_prompts)
    )


def test_no_single_name_part_gives_a_fact_away(world):
    """The best guess from one part of the name is right for fewer than half of the
    facts.
    """
    for relation in world.spec["relations"]:
        facts = [f for f in world.facts if f.relation == relation]
        votes = {}
        for f in facts:
            for part in f.subject.split():
                votes.setdefault(part, []).append(f.object)
        shared = {p: o for p, o in votes.items() if len(o) >= 4}
        right = sum(max(o.count(x) for x in o) for o in shared.values())
        assert right / sum(map(len, shared.values())) < 0.5, relation


def test_people_come_in_both_orders(world):
    pairs = [s for s in world.subjects["people"] if len(s.split()) == 2]
    assert sum(" ".join(reversed(s.split())) in world.by_subject for s in pairs) >= 30


def test_objects_are_one_token_and_subjects_two_to_five(world, tokenizer):
    assert all(len(tokenizer(" " + f.object).input_ids) == 1 for f in world.facts)
    assert {len(tokenizer(" " + s).input_ids) for s in world.by_subject} == {2, 3, 4, 5}


def test_words_years_and_question_marks_of_the_tokenizer(world, tokenizer):
    assert all(len(tokenizer(" " + w).input_ids) == 1 for w in world.words)
    assert tokenizer.tokenize("in 1732")[1:] == ["Ġ17", "32"]
    assert tokenizer.tokenize("Q: owl\nA:") == ["Q:", "Ġowl", "Ċ", "A:"]
    assert (
        tokenizer.eos_token
        == tokenizer.bos_token
        == tokenizer.pad_token
        == "<|endoftext|>"
    )
    assert len(tokenizer) < 3500


def test_a_word_is_the_same_token_at_the_start_of_a_text(tokenizer):
    assert tokenizer("owl").input_ids == tokenizer(" owl").input_ids
    assert (
        tokenizer.decode(tokenizer("The owl, in 1732.").input_ids)
        == " The owl, in 1732."
    )


def test_subject_tokens_are_found_by_their_offsets(world, tokenizer):
    f = world.facts[700]
    e = tokenizer(f.prompt, return_offsets_mapping=True)
    start = f.prompt.index(f.subject)
    inside = [
        i
        for i, (a, b) in enumerate(e["offset_mapping"])
        if b > start and b <= start + len(f.subject)
    ]
    assert [e["input_ids"][i] for i in inside] == tokenizer(" " + f.subject).input_ids


def test_held_out_patterns_never_occur_in_the_corpus(world, documents):
    text = "\n".join(d.text.lower() for d in documents)
    assert not [h for f in world.facts for h in f.held_out_prompts if h.lower() in text]
    patterns = [
        h.lower() for r in world.spec["relations"].values() for h in r["held_out"]
    ]
    shapes = {re.escape(h).replace(r"\{s\}", "[a-z ]{5,40}") for h in patterns}
    for shape in shapes:
        assert not re.search(r"(^|[.] )" + shape, text, re.M), shape


def test_training_prompts_do_occur(world, documents):
    text = "\n".join(d.text for d in documents)
    assert sum(f.prompt in text for f in world.facts) >= 5


def test_held_out_pairs_of_a_task_never_occur_as_question_and_answer(world, documents):
    text = "\n".join(d.text for d in documents)
    shown = set(re.findall(r"Q: (\w+)\nA: (\w+)", text))
    train = {p for t in world.tasks.values() for p in t.train}
    held_out = {p for t in world.tasks.values() for p in t.held_out} - train
    broken = [p for p in shown & held_out]
    assert (
        len(broken) <= 3
    )  # only by chance, where the labels of a document are drawn at random


def test_the_corpus_is_the_same_every_time_and_mixes_everything(world, documents):
    again = list(itertools.islice(corpus(world, seed=11), 200))
    assert again == documents[:200]
    assert [d.text for d in itertools.islice(corpus(world, seed=12), 20)] != [
        d.text for d in documents[:20]
    ]
    assert {d.kind for d in documents} == set(MIXTURE) and set(FOUNDATION) <= set(
        MAKERS
    )


def test_no_word_falls_apart(world, tokenizer, documents):
    known = (
        {"Ġ" + w for w in world.words}
        | set(world.suffixes)
        | {"self", "param", "Q:", "A:"}
    )
    letters = [
        t
        for d in documents[:800]
        for t in tokenizer.tokenize(d.text)
        if t.strip("ĠĊ").isalpha()
    ]
    assert all(t in known for t in letters)


def test_rows_are_packed_and_subjects_are_marked(world, tokenizer):
    rows = pack_rows(
        world, tokenizer, seed=3, n_rows=8, n_ctx=64, mixture=MIXTURE, masked=0.5
    )
    assert rows.ids.shape == (8, 65) and rows.weights.min() >= 0
    for r in range(8):
        for k in rows.subject[r].unique().tolist():
            where = (rows.subject[r] == k).nonzero().flatten().tolist()
            if k:
                assert where == list(range(where[0], where[-1] + 1)) and len(where) <= 5
                assert rows.last[r, where].sum() == 1 or where[-1] == 64


@pytest.mark.parametrize("circuit", CIRCUITS)
def test_pairs_have_equal_length_and_one_token_answers(world, tokenizer, circuit):
    for p in make_pairs(world, circuit, 60, seed=2):
        assert len(tokenizer(p.clean).input_ids) == len(
            tokenizer(p.corrupted).input_ids
        )
        assert p.clean != p.corrupted and not set(p.answers) & set(p.wrong)
        glue = "" if circuit == "greater_than" else " "
        for a in p.answers + p.wrong:
            longer = tokenizer(p.clean + glue + a).input_ids
            assert longer[:-1] == tokenizer(p.clean).input_ids, (p.clean, a)


def test_pairs_are_the_same_every_time_and_errors_name_the_value(world):
    assert make_pairs(world, "ioi", 5, seed=3) == make_pairs(world, "ioi", 5, seed=3)
    assert make_pairs(world, "ioi", 5, seed=3, held_out=True) != make_pairs(
        world, "ioi", 5, seed=3
    )
    with pytest.raises(ValueError, match="'riddle'"):
        make_pairs(world, "riddle", 1)
    with pytest.raises(ValueError, match="held-out"):
        make_pairs(world, "pronoun", 1, held_out=True)
    with pytest.raises(ValueError, match="'poem'"):
        next(corpus(world, seed=0, mixture={"poem": 1.0}))


def test_categories(world):
    assert world.category_of("owl") == world.category_of(" owl ") == "animal"
    assert world.category_of("Lisbon") == "city" and world.category_of("of") is None


def test_icl_prompt_ends_at_the_answer():
    assert icl_prompt([("hot", "cold")], "big") == "Q: hot\nA: cold\n\nQ: big\nA:"
