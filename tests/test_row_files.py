"""Rows of tensors in several files are the tensors, whole or in part, or an error that names what is missing."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from minisft.errors import DATA, UserError
from minisft.model.row_files import lies_in_rows, missing_file, read_rows, row_file
from minisft.model.tensor_files import entry_of


def write(folder: Path, tensors: dict[str, torch.Tensor], count: int, cut: dict[str, list[int]]) -> None:
    """cut: of the tensors that are not whole, the first row of each file and, last, their number of rows."""
    for number in range(count):
        entries, rows = [], {}
        for name, tensor in tensors.items():
            if name in cut:
                first, last = cut[name][number : number + 2]
                rows[name] = (first, len(tensor))
                entries.append(entry_of(name, tensor.dtype, tensor[first:last].shape, tensor[first:last].clone))
            elif number == len(name) % count:
                entries.append(entry_of(name, tensor.dtype, tensor.shape, tensor.clone))
        row_file("model", number, count, entries, rows, other="kept").write(folder)


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    count=st.integers(1, 5),
    rows=st.integers(1, 9),
    dtype=st.sampled_from(["float32", "bfloat16", "int8"]),
)
def test_whole_tensors_and_any_rows_of_them_come_back(data, count, rows, dtype):
    tensors = {
        "a.weight": torch.randn(rows, 3).to(getattr(torch, dtype)),
        "b.weight": torch.arange(rows * 2.0).view(rows, 2, 1),
        "norm.weight": torch.randn(4),
        "a.weight.step": torch.tensor(7.0),
        "none.weight": torch.empty(0, 2),
    }
    cut = {
        name: [0, *sorted(data.draw(st.lists(st.integers(0, rows), min_size=count - 1, max_size=count - 1))), rows]
        for name in ("a.weight", "b.weight")
    }
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), tensors, count, cut)
        assert lies_in_rows(Path(name))
        found, metadata = read_rows(Path(name), "model")
        assert found.keys() == tensors.keys() and metadata["other"] == "kept"
        for key, tensor in tensors.items():
            assert found[key].shape == list(tensor.shape) and torch.equal(found[key][:], tensor)
            assert found[key][:].dtype == tensor.dtype
        first, last = sorted(data.draw(st.lists(st.integers(0, rows + 1), min_size=2, max_size=2)))
        assert torch.equal(found["a.weight"][first:last], tensors["a.weight"][first:last])


def test_one_file_is_read_the_same_way(tmp_path):
    save_file({"a.weight": torch.arange(6.0).view(3, 2), "step": torch.tensor(1)}, tmp_path / "model.safetensors")
    found, _ = read_rows(tmp_path, "model")
    assert not lies_in_rows(tmp_path) and found["a.weight"][1:].tolist() == [[2, 3], [4, 5]] and found["step"][:] == 1


@pytest.mark.parametrize("cut", [[0, 2, 4], [0, 3, 5], [1, 3, 5]])
def test_rows_that_are_missing_or_there_twice_are_refused_by_name(tmp_path, cut):
    tensor = torch.randn(5, 2)
    for number in range(2):
        first, last = cut[number : number + 2]
        piece = tensor[first:last]
        entries = [entry_of("a.weight", piece.dtype, piece.shape, piece.clone)]
        row_file("model", number, 2, entries, {"a.weight": (0 if cut[1] == 3 and number else first, 5)}).write(tmp_path)
    with pytest.raises(UserError, match="the rows of a.weight are not there once each") as caught:
        read_rows(tmp_path, "model")
    assert caught.value.exit_code == DATA


@pytest.mark.parametrize("rows", ["[]", '{"a.weight": 3}', '{"a.weight": [0, "5"]}', '{"a.weight": [-1, 5]}', "{", "3"])
def test_a_list_of_rows_from_a_stranger_is_an_error_and_no_crash(tmp_path, rows):
    name = "model.rows-00001-of-00001.safetensors"
    save_file({"a.weight": torch.zeros(5, 2)}, tmp_path / name, metadata={"rows": rows})
    with pytest.raises(UserError):
        read_rows(tmp_path, "model")


def test_a_missing_file_is_named(tmp_path):
    names = [f"optimizer.rows-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert missing_file(names, "optimizer") is None and missing_file(names, "model") == "model.safetensors"
    for name in names:
        assert missing_file([other for other in names if other != name], "optimizer") == name
    write(tmp_path, {"a.weight": torch.randn(4, 2)}, 2, {"a.weight": [0, 2, 4]})
    (tmp_path / "model.rows-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model.rows-00002-of-00002.safetensors is missing"):
        read_rows(tmp_path, "model")
