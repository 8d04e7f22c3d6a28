"""A file is read as it was hashed, in any order, or not at all."""

import errno
import io
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.data import hashed_file
from minisft.data.hashed_file import hash_blocks, open_file
from minisft.errors import DATA, UserError

READS = st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.integers(-12, 40), st.integers(-1, 30)), max_size=8)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(hashed_file, "BLOCK", 8)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=35), READS)
def test_every_read_gives_what_a_plain_file_gives(tmp_path_factory, data, reads):
    path = tmp_path_factory.mktemp("file") / "data"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashed_file, "BLOCK", 8)
        with open_file(path, hash_blocks(path)) as ours, open(path, "rb") as plain:
            for whence, offset, count in reads:
                base = (0, plain.tell(), len(data))[whence]
                offset = max(offset, -base)
                assert ours.seek(offset, whence) == plain.seek(offset, whence) == ours.tell()
                assert ours.read(count) == plain.read(count)
            ours.seek(0)
            assert list(ours) == list(io.BytesIO(data))  # lines


@pytest.mark.parametrize("size", [0, 7, 8, 20, 24])
def test_every_change_is_noticed_where_it_is_read_and_only_there(tmp_path, small_blocks, size):
    data, path = bytes(range(size)), tmp_path / "data"
    path.write_bytes(data)
    digests = hash_blocks(path)
    changes = {place: data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :] for place in range(size)}
    changes |= {size: data + b"x"}  # a file that grows
    if size:
        changes |= {size - 1: data[:-1]}  # or shrinks
    for place, changed in changes.items():
        path.write_bytes(changed)
        with (
            open_file(path, digests) as file,
            pytest.raises(UserError, match="changed while it was being read") as caught,
        ):
            file.read()
        assert caught.value.exit_code == DATA and str(path) in caught.value.message
        with open_file(path, digests).detach() as file:  # without the buffer, which reads ahead
            blocks_before = [file.read(8) for _ in range(place // 8)]
            assert b"".join(blocks_before) == data[: place // 8 * 8]
    path.write_bytes(data)
    with open_file(path, digests) as file:
        assert file.read() == data


def test_memory_is_that_of_some_blocks(tmp_path):
    path = tmp_path / "data"
    with open(path, "wb") as file:
        file.truncate(24 * 2**20)
    tracemalloc.start()
    with open_file(path, hash_blocks(path)) as file:
        while file.read(2**16):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * hashed_file.BLOCK, peak


def test_a_disk_that_fails_is_told(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(hashed_file, "open", refuse, raising=False)
    with pytest.raises(UserError, match="data: Input/output error") as caught:
        hash_blocks(tmp_path / "data")
    assert caught.value.exit_code == DATA
