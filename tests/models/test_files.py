"""Files: whole or not at all, every damage is told with the file's name, and numbers
that are not finite survive.
"""

import json
import math
import os
import shutil
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechtut.__main__ import main
from mechtut.models import files
from mechtut.models.files import (
    FORMAT,
    alone_in,
    read_json,
    read_tensors,
    write_file,
    write_json,
    write_tensors,
)

DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
]
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inside: (
        st.lists(inside, max_size=3) | st.dictionaries(st.text(), inside, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=40)
@given(value=plain)
def test_json_comes_back_as_it_was(value, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "value.json"
    write_json(file, {"value": value})
    json.loads(file.read_text(), parse_constant=pytest.fail)  # no bare NaN
    assert repr(read_json(file)["value"]) == repr(value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
def test_tensors_come_back_as_they_were(dtype, shape, tmp_path):
    x = torch.randint(0, 2, shape).to(dtype)
    pair = {"x": x, "turned": x.mT if x.ndim > 1 else x, "again": x}
    first = write_tensors(tmp_path / "a.safetensors", pair, {"b": "ä\n", "a": "1"})
    found, about = read_tensors(tmp_path / "a.safetensors")
    assert about == {"a": "1", "b": "ä\n"} and list(found) == sorted(pair)
    for name, tensor in pair.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor)
    again = write_tensors(tmp_path / "b.safetensors", pair, {"a": "1", "b": "ä\n"})
    a, b = ((tmp_path / f"{n}.safetensors").read_bytes() for n in "ab")
    assert first == again and a == b


def test_every_flipped_bit_of_every_byte_is_told(tmp_path):
    """Of a small file of each kind: 8 bits of each byte, one at a time; and every place
    where it could be cut.
    """
    tensors, words = tmp_path / "a.safetensors", tmp_path / "a.json"
    write_tensors(tensors, {"x": torch.arange(3.0)}, {"key": "k"})
    write_json(words, {"key": "k", "numbers": [1.5, math.nan]})
    n = 0
    for file, read in ((tensors, read_tensors), (words, read_json)):
        whole = file.read_bytes()
        broken = [whole[:i] for i in range(len(whole))]
        for i in range(len(whole)):
            for bit in range(8):
                changed = bytearray(whole)
                changed[i] ^= 1 << bit
                broken.append(bytes(changed))
        for data in broken:
            file.write_bytes(data)
            try:
                found = read(file)
            except ValueError as error:
                assert file.name in str(error) and (
                    "delete it" in str(error) or "update mechtut" in str(error)
                )
                n += 1
                continue
            # what still reads says the same: only the white space at the end differs
            file.write_bytes(whole)
            assert repr(found) == repr(read(file)), data
    assert n > 3000


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"{", b'{"a": 1}', b"[" * 9999]
)
def test_foreign_json_is_told(data, tmp_path):
    file = tmp_path / "result.json"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"result\.json .*delete it"):
        read_json(file, "kind")


def test_a_newer_format_says_so(tmp_path):
    words = tmp_path / "a.json"
    write_json(words, {"a": 1})
    words.write_text(words.read_text().replace(f": {FORMAT}", f": {FORMAT + 1}"))
    with pytest.raises(ValueError, match=r"a\.json .*newer.*update mechtut"):
        read_json(words)
    tensors = tmp_path / "a.safetensors"
    write_tensors(tensors, {"x": torch.ones(1)}, {"mechtut": str(FORMAT + 1)})
    with pytest.raises(ValueError, match=r"a\.safetensors .*newer.*update mechtut"):
        read_tensors(tensors)


def test_what_cannot_be_written_changes_nothing(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert read_json(file)["a"] == 1 and os.listdir(tmp_path) == ["a.json"]
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(OSError, match=r"folder\.json"):
        write_file(tmp_path / "folder.json", "text")
    assert sorted(os.listdir(tmp_path)) == ["a.json", "folder.json"]
    with pytest.raises(OSError, match="kept"):
        write_file(tmp_path / "a.json" / "b.json", "text")


def test_check_command(tmp_path, capsys):
    write_json(tmp_path / "sweep.json", {"key": "k"})
    piece = tmp_path / "in" / "piece.safetensors"
    write_tensors(piece, {"x": torch.ones(1000)})
    (tmp_path / "page.html").write_text("<p>")
    (tmp_path / "scores.json").write_text("[1]")
    assert main(["check", str(tmp_path)]) == 0
    assert "2 files whole, 0 damaged, 2 without" in capsys.readouterr().out
    raw = bytearray(piece.read_bytes())
    raw[-9] ^= 4
    piece.write_bytes(raw)
    assert main(["check", "--quick", str(tmp_path)]) == 0
    assert main(["check", str(tmp_path)]) == 1
    assert "piece.safetensors does not match" in capsys.readouterr().out
    piece.write_bytes(raw[:-1])
    assert main(["check", "--quick", str(tmp_path)]) == 1
    assert "bytes instead of" in capsys.readouterr().out
    piece.write_bytes(b"")
    (tmp_path / "sweep.json").write_text("")
    assert main(["check", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "sweep.json is empty" in said and "2 damaged" in said
    shutil.rmtree(tmp_path / "in")
    assert main(["check", str(tmp_path / "in")]) == 2


def test_the_shipped_results_are_whole(capsys):
    from importlib.resources import files

    assert main(["check", str(files("mechtut") / "data")]) == 0
    assert " 0 damaged" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_a_killed_process_was_starting_is_waited_for(tmp_path):
    """Between fork and exec a child has its parent's lock, whatever became of that."""
    child = os.fork()
    if not child:
        files._lock(tmp_path)
        if not os.fork():
            time.sleep(0.5)
            (tmp_path / "started").touch()
        os._exit(0)
    os.waitpid(child, 0)
    with alone_in(tmp_path):
        assert (tmp_path / "started").exists()
