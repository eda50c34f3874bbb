"""Files of steering vectors: the `gguf` package, repeng's numbers, damaged files."""

import random

import gguf
import numpy as np
import pytest
import torch
from families import model_of
from golden_steering import NEAR, apart, steering_model, steering_numbers

from mechtut.prompts.completions import complete
from mechtut.steering.acting import steer
from mechtut.steering.formats import (
    from_gguf,
    from_safetensors,
    to_gguf,
    to_safetensors,
)
from mechtut.steering.vectors import SteeringVector

MODEL = model_of("llama")
DRAW = torch.Generator().manual_seed(0)


def _vector(layers=(1, 2), **how):
    values = torch.randn(len(layers), 32, generator=DRAW)
    return SteeringVector(values=values, layers=tuple(layers), **how)


def test_the_gguf_package_reads_what_is_written(tmp_path):
    v = _vector((2, 1))
    reader = gguf.GGUFReader(to_gguf(v, tmp_path / "v.gguf", MODEL))

    def told(name):
        return reader.get_field(name).contents()

    assert told("general.architecture") == "controlvector"
    assert told("controlvector.model_hint") == "llama"
    assert told("controlvector.layer_count") == 2
    layer_count = reader.get_field("controlvector.layer_count")
    assert layer_count.types == [gguf.GGUFValueType.UINT32]
    found = {t.name: t for t in reader.tensors}
    assert list(found) == ["direction.1", "direction.2"]
    for layer in v.layers:
        tensor = found[f"direction.{layer}"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.shape.tolist() == [32]
        assert np.array_equal(tensor.data, v.at(layer).numpy())
    back = from_gguf(tmp_path / "v.gguf")
    assert back.layers == (1, 2) and torch.equal(back.values, v.of([1, 2]).values)
    assert back.provenance == {"model_hint": "llama"}


def _as_repeng(path, directions, hint="llama"):
    """The calls of repeng's export."""
    writer = gguf.GGUFWriter(str(path), "controlvector")
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(directions))
    for layer, direction in directions.items():
        writer.add_tensor(f"direction.{layer}", direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("half", ["f32", "f64"])
def test_a_file_of_repeng_acts_as_in_repeng(half, tmp_path):
    """Its directions, its layers, its logits and its text."""
    told, z = steering_numbers("repe")
    rows = dict(zip(told["repeng_layers"], z[f"{half}_repeng_pca_diff"], strict=True))
    layers = reversed(rows)  # from the top, as it goes
    file = _as_repeng(tmp_path / "v.gguf", {i: rows[i] for i in layers})
    vector, model = from_gguf(file), steering_model("llama", half)
    assert vector.layers == tuple(told["repeng_layers"])
    control = {"layers": told["repeng_control_layers"], "coefficient": told["coeff"]}
    with steer(model, vector, **control):
        logits = model.logits([told["prompt_ids"]])[0]
        written = complete(model, (told["prompt_ids"], 0), 10)
    assert apart(logits, z[f"{half}_repeng_logits"]) < NEAR["llama"][half]
    assert written == told[f"{half}_repeng_greedy10"]


def test_direction_l_is_added_behind_block_l(tmp_path):
    """By plain hooks, blocks counted from 0, as llama.cpp and repeng count."""
    v, ids = _vector(), torch.randint(1, 97, (1, 5), generator=DRAW)
    file = to_gguf(v, tmp_path / "v.gguf", MODEL)
    rows = {
        int(t.name.split(".")[1]): torch.tensor(t.data).double()
        for t in gguf.GGUFReader(file).tensors
    }
    handles = [
        MODEL.blocks[layer].register_forward_hook(lambda m, a, out, r=row: out + r)
        for layer, row in rows.items()
    ]
    with torch.no_grad():
        wanted = MODEL.hf(ids).logits
    for handle in handles:
        handle.remove()
    with steer(MODEL, from_gguf(file)):
        assert apart(MODEL.logits(ids), wanted.numpy()) < 1e-9
    # the input of block l is the output of the block before
    before = SteeringVector(values=v.values, layers=(2, 3), site="resid_pre")
    four = model_of("llama", num_hidden_layers=4)
    assert from_gguf(to_gguf(before, file, four)).layers == (1, 2)


def test_files_of_others(tmp_path):
    """llama.cpp's generator writes the count as int32; other names may stand there."""
    file = tmp_path / "v.gguf"
    writer = gguf.GGUFWriter(str(file), "controlvector")
    writer.add_string("controlvector.model_hint", "qwen2")
    writer.add_int32("controlvector.layer_count", 1)
    writer.add_custom_alignment(64)
    writer.add_array("general.tags", ["mood", "für alle"])
    writer.add_array("general.numbers", [1, 2, 3])
    writer.add_bool("general.flag", True)
    writer.add_float64("general.scale", 0.5)
    row = np.arange(6, dtype=np.float32)
    writer.add_tensor("direction.7", row)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = from_gguf(file)
    assert found.layers == (7,) and found.values.tolist() == [row.tolist()]
    assert found.provenance["model_hint"] == "qwen2"


def test_layer_0_is_left_out_and_said(tmp_path):
    v = _vector((0, 1, 2))
    with pytest.warns(UserWarning, match="no direction for block 0"):
        file = to_gguf(v, tmp_path / "v.gguf", MODEL)
    assert from_gguf(file).layers == (1, 2)
    with pytest.raises(ValueError, match="layer 0 cannot be written"):
        to_gguf(v, file, MODEL, layers=[0, 1])
    with (
        pytest.warns(UserWarning, match="block 0"),
        pytest.raises(ValueError, match="no layer is left"),
    ):
        to_gguf(_vector((0,)), file, MODEL)


def test_what_cannot_be_a_control_vector(tmp_path):
    file = tmp_path / "v.gguf"
    at = _vector((1,), positions=(4,))
    for vector, message in (
        (at, "positions"),
        (_vector((1, 3)), "layer 3 cannot be written"),
        (SteeringVector(values=torch.ones(1, 7), layers=(1,)), "7 numbers a row"),
    ):
        with pytest.raises(ValueError, match=message):
            to_gguf(vector, file, MODEL)
    assert not file.exists()


def test_every_cut_file_is_refused_and_no_flipped_one_breaks(tmp_path):
    raw = to_gguf(_vector(), tmp_path / "v.gguf", MODEL).read_bytes()
    file = tmp_path / "w.gguf"
    for n in [*range(0, len(raw) - 256, 7), *range(len(raw) - 256, len(raw), 31)]:
        file.write_bytes(raw[:n])
        with pytest.raises(ValueError, match="damaged|not a GGUF"):
            from_gguf(file)
    draw, broken = random.Random(0), 0
    head = len(raw) - 256
    for _ in range(600):
        some = bytearray(raw)
        some[draw.randrange(head)] = draw.randrange(256)
        file.write_bytes(some)
        try:
            from_gguf(file)
        except ValueError:
            broken += 1
    assert broken > 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            (b"\x00controlvector", b"\x00controlvectos"),
            "architecture is 'controlvectos'",
        ),
        ((b"direction.2", b"direction.1"), "direction.1 twice"),
        ((b"direction.2", b"dirction..2"), "no direction"),
        ((b"GGUF\x03", b"GGUF\x01"), "version 1"),
    ],
)
def test_damaged_in_a_known_place(change, message, tmp_path):
    file = to_gguf(_vector(), tmp_path / "v.gguf", MODEL)
    raw = file.read_bytes()
    assert change[0] in raw
    file.write_bytes(raw.replace(*change, 1))
    with pytest.raises(ValueError, match=message):
        from_gguf(file)


def test_other_numbers_than_float32_and_nan(tmp_path):
    file = _as_repeng(tmp_path / "a.gguf", {1: np.ones(32, np.float16)})
    with pytest.raises(ValueError, match="direction.1 of type 1"):
        from_gguf(file)
    nan = np.full(32, np.nan, np.float32)
    with pytest.raises(ValueError, match="NaN or infinity in direction.1"):
        from_gguf(_as_repeng(tmp_path / "b.gguf", {1: nan}))
    two = {1: np.ones(32, np.float32), 2: np.ones(31, np.float32)}
    with pytest.raises(ValueError, match="different widths, at layer 2"):
        from_gguf(_as_repeng(tmp_path / "c.gguf", two))
    with pytest.raises(FileNotFoundError):
        from_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_safetensors_keep_all(dtype, tmp_path):
    v = SteeringVector(
        values=torch.randn(3, 5, generator=DRAW).to(dtype),
        layers=(4,),
        site="resid_pre",
        positions=(0, 1, 2),
        read=("«a» «b»", "c"),
        provenance={"model": "m", "arguments": {"noise": float("inf"), "pad": None}},
    )
    back = from_safetensors(to_safetensors(v, tmp_path / "v.safetensors"))
    assert torch.equal(back.values, v.values) and back.values.dtype == dtype
    for name in ("layers", "site", "positions", "read", "provenance"):
        assert getattr(back, name) == getattr(v, name)


def test_damaged_safetensors(tmp_path):
    from mechtut.models.files import write_tensors

    file = to_safetensors(_vector(), tmp_path / "v.safetensors")
    raw = file.read_bytes()
    for changed in (raw[:-3], raw[:-1] + b"\x00", raw.replace(b"[\\n 1", b"[\\n 2", 1)):
        file.write_bytes(changed)
        with pytest.raises(ValueError, match="damaged"):
            from_safetensors(file)
    write_tensors(file, {"values": torch.ones(1, 2)})
    with pytest.raises(ValueError, match="holds no steering vector"):
        from_safetensors(file)
    with pytest.raises(FileNotFoundError):
        from_safetensors(tmp_path / "none.safetensors")
