"""What texts are judged by: right values by hand."""

import pytest

from mechtut.patching.patchscope_texts import (
    PatchscopeTexts,
    TextSuccess,
    rouge_l,
    success_by_string,
    whole_word_success,
)

TEXTS = PatchscopeTexts(
    texts=(
        ((" is the yen", None), (" a covered one", " of yen")),
        ((" the euro", None), ("", " euros")),
        ((" yen, euro", None), ("n", " eu ro")),
    ),
    unpatched=("x", "the yen", "euro"),
    source_layers=(0, 3),
    target_layers=(2, 5),
)
ANSWERS = ["yen", "euro", "euro"]


def test_strings():
    assert success_by_string("The New  York Times", "New York") == 1
    assert success_by_string("the yen", "Yen") == 0
    assert success_by_string("he covered it", "red") == 1
    assert whole_word_success("he covered it", "red") == 0
    assert whole_word_success("red, he said", "red") == 1
    assert whole_word_success("in New York.", " New York") == 1
    assert whole_word_success("NewYork", "New York") == 0
    assert success_by_string("", "red") == whole_word_success("", "red") == 0
    for rule in (success_by_string, whole_word_success):
        with pytest.raises(ValueError, match="empty"):
            rule("text", " ")
    assert rouge_l("", "a") == rouge_l("!", "a") == (0, 0, 0)
    assert rouge_l("a b c d", "A C x") == (0.5, 2 / 3, pytest.approx(4 / 7))
    assert rouge_l("x y", "y x").f == 0.5  # order counts


def test_hits_and_the_answers_of_others():
    found = TEXTS.success(ANSWERS)
    assert found.hits[:, 0, 0].tolist() == [1, 1, 1]
    assert found.hits[:, 1].tolist() == [[0, 1], [0, 1], [0, 1]]
    # the others' answers: euro, yen, yen
    assert found.others[:, 0, 0].tolist() == [0, 0, 1]
    assert found.hits[:, 0, 1].isnan().all() and found.others[:, 0, 1].isnan().all()
    assert found.unpatched.tolist() == [0, 0, 1]
    whole = TEXTS.success(ANSWERS, "whole word")
    assert whole.hits[:, 1, 1].tolist() == [1, 0, 0]  # neither "euros" nor "eu ro"


def test_shares_to_report():
    table = (
        TEXTS.success(["red", "euro", "euro"]).to_pandas().set_index(["where", "what"])
    )
    # red is in covered: some pair succeeds for all three, no single one does
    assert table.share["some pair", "right answer"] == 1
    assert table.share["best pair, 0→2", "right answer"] == pytest.approx(2 / 3)
    assert table.share["some pair", "other answer"] == 0
    assert table.share["unpatched", "right answer"] == pytest.approx(1 / 3)
    # two of three: Student's interval with 2 degrees of freedom
    sd = (2 / 9 * 3 / 2) ** 0.5
    half = table.half_width["best pair, 0→2", "right answer"]
    assert half == pytest.approx(4.3027 * sd / 3**0.5, rel=1e-3)
    best = TEXTS.success(ANSWERS).by_source_layer()
    assert best.target_layer.tolist() == [2, 5] and best.share.tolist() == [1, 1]


def test_one_answer_for_all_has_no_other():
    found = TEXTS.success(["yen"] * 3)
    assert found.others.isnan().all()
    table = found.to_pandas()
    assert table.n[table.what == "other answer"].tolist() == [0, 0]


def test_wrong_answers_are_refused():
    with pytest.raises(ValueError, match="answers"):
        TEXTS.success(["yen"])
    with pytest.raises(ValueError, match="empty"):
        TEXTS.success(["yen", " ", "x"])


def test_saved_and_loaded(tmp_path):
    again = PatchscopeTexts.load(TEXTS.save(tmp_path / "texts"))
    assert again.texts == TEXTS.texts
    found = TEXTS.success(ANSWERS)
    same = TextSuccess.load(found.save(tmp_path / "success"))
    assert same.to_pandas().equals(found.to_pandas())
