"""Results in folders: the old one or the new one, and nothing that is not one."""

import json
import math
import threading
from dataclasses import dataclass, fields

import pytest
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from mechtut.circuits.circuit import Circuit
from mechtut.circuits.known import gate
from mechtut.models.files import FORMAT, read_json, write_json, write_tensors
from mechtut.papers.acdc import acdc
from mechtut.patching.results import Result, half_width, student


@dataclass(frozen=True, eq=False, kw_only=True)
class Numbers(Result):
    """A result with a field of each kind."""

    values: Float[Tensor, "a b"]
    name: str
    count: int
    share: float
    pairs: tuple[tuple[str, int], ...]
    words: list[str]
    maybe: float | None = None
    more: dict[str, float] | None = None


def numbers(n=1, **changes):
    made = {
        "values": torch.full((n, 2), float(n)),
        "name": f"run {n}",
        "count": n,
        "share": math.nan,
        "pairs": (("a", 1), ("b", 2)),
        "words": ["x"],
        "more": {"inf": math.inf, "minus": -math.inf},
        "provenance": {"n": n},
    }
    return Numbers(**{**made, **changes})


def test_all_kinds_of_fields_come_back_as_they_were(tmp_path):
    saved = numbers(values=torch.tensor([[math.nan, 1.0]]))
    again = Numbers.load(saved.save(tmp_path))
    for f in fields(saved):
        assert repr(getattr(again, f.name)) == repr(getattr(saved, f.name)), f.name
    json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)


def test_a_reader_sees_the_old_one_or_the_new_one(tmp_path):
    """One thread saves 80 results over each other, another reads all the while."""
    numbers(1).save(tmp_path)
    done, seen = threading.Event(), set()

    def write():
        for n in range(2, 80):
            numbers(n).save(tmp_path)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        found = Numbers.load(tmp_path)
        assert found.values.shape == (found.count, 2) and found.name[4:] == str(
            found.count
        )
        seen.add(found.count)
    writer.join()
    assert Numbers.load(tmp_path).count == 79 and len(seen) > 2
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def change(folder, **changes):
    head = read_json(folder / "result.json")
    values = {**head.pop("values"), **changes}
    values = {k: v for k, v in values.items() if v is not ...}
    del head["format"]
    write_json(folder / "result.json", {**head, "values": values})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": ...}, "no 'name'"),
        ({"colour": 3}, "an unknown 'colour'"),
        ({"count": "three"}, "a str as 'count'"),
        ({"count": True}, "a bool as 'count'"),
        ({"share": "nan"}, "a str as 'share'"),
        ({"pairs": [["a", "b"]]}, "a tuple as 'pairs'"),
        ({"pairs": 3}, "a int as 'pairs'"),
        ({"more": [1]}, "a tuple as 'more'"),
    ],
)
def test_other_fields_than_the_results_are_told(changes, said, tmp_path):
    numbers().save(tmp_path)
    change(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"result\.json .*{said}.*delete it"):
        Numbers.load(tmp_path)


def test_tensors_of_another_type_or_rank_are_told(tmp_path):
    numbers().save(tmp_path)
    head = read_json(tmp_path / "result.json")
    (file,) = tmp_path.glob("*.safetensors")
    for wrong in (torch.ones(3), torch.ones(1, 2, dtype=torch.int64)):
        write_tensors(file, {"values": wrong})
        with pytest.raises(ValueError, match=r"a Tensor as 'values'.*delete it"):
            Numbers.load(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"names tensors that are not there"):
        Numbers.load(tmp_path)
    assert head["tensors"] == file.name


def test_circuits_take_no_other_fields(tmp_path):
    made = gate("and")
    circuit = acdc(
        made.model, made.clean, made.corrupted, threshold=0.01, ablation="zero"
    )
    circuit.save(tmp_path)
    assert Circuit.load(tmp_path).edges == circuit.edges
    assert Circuit.load(tmp_path).found == circuit.found
    for changes in ({"n_evaluations": None}, {"found": "all"}, {"extra": 1}):
        change(tmp_path, **changes)
        with pytest.raises(ValueError, match=r"result\.json .*is not a Circuit"):
            Circuit.load(tmp_path)
        circuit.save(tmp_path)


def test_a_damaged_a_newer_and_no_result(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no result"):
        Numbers.load(tmp_path)
    numbers().save(tmp_path)
    (tensors,) = tmp_path.glob("*.safetensors")
    whole = tensors.read_bytes()
    for broken in (b"", whole[:-3], whole[:-1] + b"\7"):
        tensors.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"{tensors.name} .*delete it"):
            Numbers.load(tmp_path)
    tensors.write_bytes(whole)
    file = tmp_path / "result.json"
    text = file.read_text()
    file.write_text(text.replace(f'"format": {FORMAT}', f'"format": {FORMAT + 1}'))
    with pytest.raises(ValueError, match=r"result\.json .*newer.*update mechtut"):
        Numbers.load(tmp_path)
    file.write_text(text.replace("run 1", "run 2"))
    with pytest.raises(ValueError, match="does not match its checksum"):
        Numbers.load(tmp_path)
    for broken in ("", "{}", "[]", "{"):
        file.write_text(broken)
        with pytest.raises(ValueError, match=r"result\.json .*delete it"):
            Numbers.load(tmp_path)


def test_results_of_mechtut_0_2_are_still_read(tmp_path):
    """They had no checksums, and bare NaN."""
    old = numbers()
    plain = {f.name: getattr(old, f.name) for f in fields(old) if f.name != "values"}
    (tmp_path / "result.json").write_text(json.dumps({"kind": "Numbers", **plain}))
    save_file({"values": old.values}, tmp_path / "tensors.safetensors")
    again = Numbers.load(tmp_path)
    assert torch.equal(again.values, old.values) and again.pairs == old.pairs
    assert math.isnan(again.share)
    numbers(2).save(tmp_path)
    assert [p.name for p in tmp_path.glob("tensors.*")] == []


def test_a_field_without_a_word_in_json_is_refused_before_anything_is_written(tmp_path):
    numbers(1).save(tmp_path)
    with pytest.raises(TypeError):
        numbers(2, more={"a": object()}).save(tmp_path)
    assert Numbers.load(tmp_path).count == 1
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_quantiles_of_students_distribution():
    """Against printed tables."""
    printed = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228}
    printed |= {20: 2.086, 30: 2.042, 120: 1.980}
    for degrees, quantile in printed.items():
        assert student(degrees) == pytest.approx(quantile, abs=4e-3)


def test_intervals_cover_as_often_as_they_say():
    draw = torch.Generator().manual_seed(0)
    for n in (2, 3, 8):
        x = torch.randn(n, 20000, generator=draw).double()
        covered = (x.mean(0).abs() < half_width(x)).double().mean()
        assert float(covered) == pytest.approx(0.95, abs=0.01)
    assert half_width(torch.ones(1, 2)).isnan().all()
