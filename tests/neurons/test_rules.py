"""The small language of rules: writing, reading, simulating and finding them; look-up
tables; hostile input.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechtut.mini.world import World
from mechtut.neurons.records import ActivationRecord, NeuronRecord
from mechtut.neurons.rules import (
    Explanation,
    RuleExplainer,
    RuleSimulator,
    TableExplainer,
    TableSimulator,
    Term,
    features,
    induce,
    read_rule,
    rule_sentence,
)
from mechtut.neurons.scoring import score

WORLD = World()
tokens = st.text(min_size=1, max_size=6)
weights = (
    st.floats(-99, 99).filter(lambda w: abs(w) > 0.01).map(lambda w: float(f"{w:.2g}"))
)
places = st.sampled_from(["on", "after", "before"])
terms = st.one_of(
    st.builds(Term, places, st.just("token"), tokens, weights),
    st.builds(
        Term,
        places,
        st.just("category"),
        st.sampled_from(["month", "person part"]),
        weights,
    ),
    st.builds(Term, places, st.just("line break"), st.just(""), weights),
    st.builds(Term, st.just("on"), st.just("start"), st.just(""), weights),
)


@settings(max_examples=300)
@given(st.lists(terms, max_size=5))
def test_what_is_written_is_what_is_read(rule):
    assert read_rule(rule_sentence(rule)) == rule


@pytest.mark.parametrize(
    "sentence", ["fires on nothing in particular", "", "months", "on 'May", "words"]
)
def test_free_text_is_no_rule(sentence):
    with pytest.raises(ValueError, match="write for example"):
        read_rule(sentence)


def test_a_quotation_is_never_run_as_code():
    assert (
        read_rule("on '__import__(\"os\").getcwd()'")[0].value
        == '__import__("os").getcwd()'
    )


def test_simulating():
    said = Explanation(
        "fires on month words (+3), after ' in' (+1.5), on line breaks and at the start"
        " (-2)"
    )
    values = RuleSimulator(WORLD.category_of).simulate(
        said, [[" In", " May"], [" in", " June", "\n"]]
    )
    assert values == [[-2.0, 3.0], [-2.0, 4.5, 1.0]]
    with pytest.raises(ValueError, match="category_of"):
        RuleSimulator().simulate(said, [["a"]])
    assert RuleSimulator().simulate(Explanation("never fires"), [["a", "b"]]) == [
        [0.0, 0.0]
    ]


def test_features_see_one_token_back():
    assert features(["a", "\n", "b"]) == [
        [("on", "token", "a"), ("on", "start", "")],
        [("on", "token", "\n"), ("on", "line break", ""), ("after", "token", "a")],
        [("on", "token", "b"), ("after", "token", "\n"), ("after", "line break", "")],
    ]


def test_features_look_ahead_only_if_asked():
    assert [f[-1] for f in features(["a", "b"], ahead=True)] == [
        ("before", "token", "b"),
        ("after", "token", "a"),
    ]
    said = Explanation("fires before month words (+2) and before ' in' (-1)")
    assert RuleSimulator(WORLD.category_of).simulate(
        said, [[" met", " in", " May"]]
    ) == [[-1.0, 2.0, 0.0]]


def test_a_neuron_that_fires_before_a_category():
    def early(r):
        """The same words, each activation one token sooner."""
        return ActivationRecord(
            r.tokens,
            [2.0 * (WORLD.category_of(t) == "month") for t in [*r.tokens[1:], ""]],
        )

    plain = months()
    record = NeuronRecord(
        0,
        0,
        [early(r) for r in plain.top],
        [early(r) for r in plain.random],
        plain.quantiles,
    )
    first = [
        read_rule(RuleExplainer(WORLD.category_of, ahead=a).explain(record).text)[0]
        for a in (True, False)
    ]
    assert (first[0].place, first[0].kind, first[0].value) == (
        "before",
        "category",
        "month",
    )
    assert first[1].place != "before", "no term looks ahead unasked"


@given(st.integers(0, 1000))
def test_induction_finds_planted_terms(seed):
    rng = np.random.default_rng(seed)
    columns = np.stack(
        [rng.integers(0, 10, 400), 10 + rng.integers(0, 10, 400)], axis=1
    )
    y = (
        5.0 * (columns == 3).any(1)
        - 4.0 * (columns == 17).any(1)
        + 0.1 * rng.standard_normal(400)
    )
    chosen, weights = induce(y, columns, 20, n_terms=5)
    assert chosen[:2] in ([3, 17], [17, 3]) and len(chosen) == 2, "and stops there"
    found = dict(zip(chosen, weights, strict=True))
    assert found[3] == pytest.approx(5, abs=0.1) and found[17] == pytest.approx(
        -4, abs=0.1
    )


def test_induction_of_a_constant():
    assert induce(np.ones(5), np.zeros((5, 1), int), 1)[0] == []


def months(n_top=20, n_random=20, level=2.0):
    """A neuron for months, in excerpts about other things."""
    names = [" May", " June", " April", " March", " July"]
    words = [" we", " met", " in", " the", " park", "."]

    def excerpt(i, has_month):
        text = (
            words[: i % 5 + 1]
            + ([names[i % 5]] if has_month else [" town"])
            + words[i % 3 :]
        )
        return ActivationRecord(
            text, [level if t in names else 0.1 * (t == ".") for t in text]
        )

    spare = [excerpt(i, i % 2 == 0) for i in range(8)]
    top, random = (
        [excerpt(i, True) for i in range(n_top)],
        [excerpt(i, i % 3 == 0) for i in range(n_random)],
    )
    return NeuronRecord(0, 0, top, random, [spare])


def test_a_category_is_found_where_it_is_the_shorter_story():
    said = RuleExplainer(WORLD.category_of, n_terms=1).explain(months())
    assert [(t.place, t.kind, t.value) for t in read_rule(said.text)] == [
        ("on", "category", "month")
    ]
    tokens_only = RuleExplainer(n_terms=5).explain(months())
    assert {t.value for t in read_rule(tokens_only.text)} <= {
        " May",
        " June",
        " April",
        " March",
        " July",
        ".",
    }


def test_tables():
    record = months()
    held_out = next(r for r in record.random if " May" in r.tokens)
    for pairs in (False, True):
        table = TableExplainer(pairs).explain(record)
        values = TableSimulator().simulate(table, [held_out.tokens, ["never seen"]])
        assert score(held_out.activations, values[0]).correlation > 0.99
        assert values[1] == [pytest.approx(table.table[()])], (
            "the mean, for what is unknown"
        )
    with pytest.raises(ValueError, match="has no table"):
        TableSimulator().simulate(Explanation("fires on ' May'"), [["a"]])


def test_nobody_looks_at_the_excerpts_that_are_scored():
    """Changing everything but the train split and the spare excerpts changes no
    explanation.
    """
    a = months()
    top = [
        r if i % 4 == 0 else ActivationRecord(["?"], [99.0])
        for i, r in enumerate(a.top)
    ]
    b = NeuronRecord(0, 0, top, [ActivationRecord(["!"], [99.0])] * 20, a.quantiles)
    for explainer in (
        RuleExplainer(WORLD.category_of),
        TableExplainer(),
        TableExplainer(True),
    ):
        assert explainer.explain(a) == explainer.explain(b)


def test_silent_neurons_are_refused():
    silent = months(level=0.0)
    silent = NeuronRecord(
        1,
        7,
        [ActivationRecord(r.tokens, [0.0] * len(r)) for r in silent.top],
        silent.random,
    )
    for explainer in (RuleExplainer(), TableExplainer()):
        with pytest.raises(ValueError, match=r"neuron 1\.7 is never active"):
            explainer.explain(silent)
    with pytest.raises(ValueError, match="too few for a train split"):
        RuleExplainer().explain(NeuronRecord(0, 0, months().top[:3], months().random))


def test_one_token_excerpts():
    top = [
        ActivationRecord([" May" if i % 8 else " it"], [2.0 if i % 8 else 0.0])
        for i in range(16)
    ]
    record = NeuronRecord(0, 0, top, [])
    said = RuleExplainer(min_count=1).explain(record)
    assert math.isfinite(RuleSimulator().simulate(said, [[" May"]])[0][0])
