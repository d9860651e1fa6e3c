"""Parts: whole or absent, verified, resumable, and the same bytes every time."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from proxykd_jax.data.parts import Part, PartFolder, digest_arrays
from proxykd_jax.errors import UserError


def some_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "flags": rng.random(5) < 0.5,
        "ids": rng.integers(0, 65_536, (7, 3)).astype(np.uint16),
        "logps": -rng.random((7, 3)).astype(np.float16),
        "sums": rng.normal(size=4),
        "offsets": np.arange(4, dtype=np.int64),
        "nothing": np.zeros((0, 3), np.float32),
    }


def test_reads_back_what_was_written(tmp_path):
    folder = PartFolder(tmp_path)
    digest = folder.commit(0, some_arrays(), {"rows": [1, 2], "name": "é"})
    part = folder.open(0)
    for name, array in some_arrays().items():
        np.testing.assert_array_equal(part.arrays[name], array)
        assert part.arrays[name].dtype == array.dtype
    assert part.metadata == {"rows": [1, 2], "name": "é"}
    assert part.digest == digest == digest_arrays(some_arrays())
    part.verify()
    with pytest.raises(ValueError):
        part.arrays["sums"][0] = 1.0


def test_other_readers_of_the_format_agree(tmp_path):
    from safetensors.numpy import load_file

    PartFolder(tmp_path).commit(3, some_arrays())
    loaded = load_file(tmp_path / "part_00003.safetensors")
    for name, array in some_arrays().items():
        np.testing.assert_array_equal(loaded[name], array)


def test_transposed_and_strided_arrays_keep_their_values(tmp_path):
    x = np.arange(12, dtype=np.int32).reshape(3, 4)
    folder = PartFolder(tmp_path)
    folder.commit(0, {"t": x.T, "s": x[:, ::2]})
    np.testing.assert_array_equal(folder.open(0).arrays["t"], x.T)
    np.testing.assert_array_equal(folder.open(0).arrays["s"], x[:, ::2])


def test_the_bytes_are_a_function_of_the_content(tmp_path):
    PartFolder(tmp_path / "a").commit(0, some_arrays(), {"b": 1, "a": 2})
    backwards = dict(reversed(some_arrays().items()))
    code = (
        "import sys, numpy as np; sys.path.insert(0, sys.argv[1]);"
        "from proxykd_jax.data.parts import PartFolder, Part; from pathlib import Path;"
        "part = Part(Path(sys.argv[2]) / 'a/part_00000.safetensors');"
        "PartFolder(Path(sys.argv[2]) / 'b').commit(0, part.arrays, {'a': 2, 'b': 1})"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    subprocess.run([sys.executable, "-c", code, root, str(tmp_path)], check=True)
    PartFolder(tmp_path / "c").commit(0, backwards, {"a": 2, "b": 1})
    files = [(tmp_path / n / "part_00000.safetensors").read_bytes() for n in "abc"]
    assert files[0] == files[1] == files[2]


def test_resume_names_the_missing_parts_and_removes_leftovers(tmp_path):
    folder = PartFolder(tmp_path / "new")
    assert folder.complete() == []
    assert folder.resume(3) == [0, 1, 2]
    folder.commit(0, some_arrays())
    folder.commit(2, some_arrays())
    (folder.folder / ".part_00001.safetensors.tmp").write_bytes(b"half")
    (folder.folder / "manifest.json").write_text("{}")
    assert folder.complete() == [0, 2]
    assert folder.resume(3) == [1]
    assert not list(folder.folder.glob(".*.tmp"))
    with pytest.raises(UserError, match="beyond the 2 parts"):
        folder.resume(2)


@pytest.mark.parametrize("where", [20, -1])
def test_a_flipped_bit_is_found(tmp_path, where):
    folder = PartFolder(tmp_path)
    folder.commit(0, some_arrays())
    data = bytearray(folder.path(0).read_bytes())
    data[where] ^= 4
    folder.path(0).write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"part_00000\.safetensors is damaged"):
        folder.resume(2)


def test_truncation_anywhere_is_found_on_opening(tmp_path):
    folder = PartFolder(tmp_path)
    folder.commit(0, some_arrays())
    data = folder.path(0).read_bytes()
    for length in range(0, len(data), 7):
        folder.path(0).write_bytes(data[:length])
        with pytest.raises(UserError, match="damaged"):
            folder.open(0)
    with pytest.raises(UserError, match="does not exist"):
        Part(tmp_path / "absent")


def test_types_that_cannot_be_mapped_are_refused(tmp_path):
    with pytest.raises(ValueError, match="complex"):
        PartFolder(tmp_path).commit(0, {"x": np.zeros(2, np.complex64)})


def test_kill_while_writing_leaves_whole_parts_only(tmp_path):
    code = (
        "import sys, numpy as np; sys.path.insert(0, sys.argv[1]);"
        "from proxykd_jax.data.parts import PartFolder\n"
        "folder = PartFolder(sys.argv[2]); folder.resume(10**6); i = 0\n"
        "while True:\n"
        "    folder.commit(i % 50, {'x': np.full(1_000_000, i % 50, np.int32)}); i += 1"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    for delay in (0.05, 0.2):
        child = subprocess.Popen([sys.executable, "-c", code, root, str(tmp_path / "p")])
        deadline = time.monotonic() + 60
        while not PartFolder(tmp_path / "p").complete() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        folder = PartFolder(tmp_path / "p")
        folder.resume(10**6)
        assert folder.complete()
        for index in folder.complete():
            assert (folder.open(index).arrays["x"] == index).all()


def test_two_may_commit_the_same_part_at_once(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    arrays = {"a": np.arange(200_000, dtype=np.uint64)}
    folder = PartFolder(tmp_path, one_of_several=True)
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(folder.commit, 0, arrays) for _ in range(40)]
    assert len({attempt.result() for attempt in done}) == 1
    folder.open(0).verify()
    np.testing.assert_array_equal(folder.open(0).arrays["a"], arrays["a"])
    assert [path.name for path in tmp_path.iterdir()] == ["part_00000.safetensors"]
