"""Cores and caches are read from the files of Linux."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from proxykd_jax.parallel.cpu import _l2_cache_bytes, cores, l2_cache_bytes


def core(folder: Path, number: int, caches: list[tuple[str, str, str]]) -> None:
    for index, (level, size, shared_by) in enumerate(caches):
        cache = folder / f"cpu{number}/cache/index{index}"
        cache.mkdir(parents=True)
        for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared_by)):
            (cache / name).write_text(text + "\n")


def test_a_cache_that_two_cores_share_counts_once(tmp_path: Path) -> None:
    for number in range(4):
        pair = "0-1" if number < 2 else "2-3"
        core(tmp_path, number, [("1", "48K", str(number)), ("2", "2M", pair), ("3", "64M", "0-3")])
    assert _l2_cache_bytes(tmp_path, (0, 1, 2, 3)) == 4 << 20
    assert _l2_cache_bytes(tmp_path, (0, 1)) == 2 << 20


@pytest.mark.parametrize("caches", [[], [("1", "48K", "0")], [("2", "?", "0")], [("2", "", "0")]])
def test_where_the_system_does_not_tell_it_is_one_mebibyte_a_core(
    tmp_path: Path, caches: list[tuple[str, str, str]]
) -> None:
    core(tmp_path, 0, caches)
    assert _l2_cache_bytes(tmp_path, (0,)) == 1 << 20


def test_of_this_machine() -> None:
    assert 1 <= len(cores()) <= (os.cpu_count() or 1)
    assert l2_cache_bytes() >= 1 << 18
