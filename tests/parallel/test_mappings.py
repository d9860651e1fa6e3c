"""Compiled programs are dropped before a process runs out of memory mappings."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from proxykd_jax.parallel import mappings
from proxykd_jax.parallel.mappings import make_room


@pytest.mark.parametrize("taken, forgotten", [(74, False), (75, True)])
def test_programs_are_forgotten_when_three_quarters_are_taken(
    tmp_path, monkeypatch, taken, forgotten
):
    (tmp_path / "allowed").write_text("100\n")
    (tmp_path / "maps").write_text("a mapping\n" * taken)
    monkeypatch.setattr(mappings, "_ALLOWED", tmp_path / "allowed")
    monkeypatch.setattr(mappings, "_MAPPINGS", tmp_path / "maps")
    double = jax.jit(lambda x: 2 * x)
    double(jnp.ones(3))
    assert make_room() == forgotten
    assert double._cache_size() == (0 if forgotten else 1)
    assert double(jnp.ones(3)).tolist() == [2, 2, 2]


def test_nothing_is_forgotten_where_the_system_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(mappings, "_ALLOWED", tmp_path / "nowhere")
    assert not make_room()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc: not Linux")
def test_a_forgotten_program_gives_its_mappings_back():
    def count() -> int:
        return mappings._MAPPINGS.read_bytes().count(b"\n")

    programs = [jax.jit(lambda x, n=n: jnp.sin(x * n) @ x) for n in range(20)]
    before = count()
    for program in programs:
        program(jnp.ones((4, 4))).block_until_ready()
    kept = count() - before
    assert kept > 40
    jax.clear_caches()
    assert count() < before + kept // 2
