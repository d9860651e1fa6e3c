"""Checkpoints are exact, complete or absent, and damage is reported."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from proxykd_jax.errors import UserError
from proxykd_jax.training.checkpoint import Checkpoints, DamagedError, Progress
from proxykd_jax.training.metrics import MetricsLog
from proxykd_jax.training.state import init_state


def _state(value: float):
    tree = {"a": jnp.full((3, 5), value), "b": jnp.arange(4.0) * value}
    return init_state(tree, optax.adam(1e-3))


def test_restores_bitwise_with_progress(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path)
    progress = Progress(phase=2, phase_step=3, step=9, best_nll=1.25, best_step=7, kept=[4])
    checkpoints.save(_state(0.1), progress)
    checkpoints.close()
    state, found = Checkpoints(tmp_path).restore_latest(jax.eval_shape(lambda: _state(0.0)))
    jax.tree.map(np.testing.assert_array_equal, state, _state(0.1))
    assert found == progress


def test_no_checkpoint_is_none(tmp_path) -> None:
    assert Checkpoints(tmp_path).restore_latest(jax.eval_shape(lambda: _state(0.0))) is None


def test_flipped_bit_falls_back_loudly(tmp_path, capsys) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(_state(step), Progress(step=step))
    files = [p for p in (tmp_path / "checkpoints" / "2").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(bytes(data))
    with pytest.raises(DamagedError, match="damaged"):
        checkpoints.restore(2, jax.eval_shape(lambda: _state(0.0)))
    state, progress = checkpoints.restore_latest(jax.eval_shape(lambda: _state(0.0)))
    assert progress == Progress(step=1) and "WARNING" in capsys.readouterr().err
    np.testing.assert_array_equal(state.trainable["a"], 1.0)


def test_step_without_digests_does_not_count(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(_state(1), Progress(step=1))
    checkpoints.save(_state(2), Progress(step=2))
    (tmp_path / "digests" / "2.json").unlink()  # as if killed between commit and digests
    again = Checkpoints(tmp_path)
    assert again.steps() == [1]
    again.save(_state(3), Progress(step=2))
    state, _ = again.restore(2, jax.eval_shape(lambda: _state(0.0)))
    np.testing.assert_array_equal(state.trainable["a"], 3.0)


def test_what_a_killed_removal_left_is_removed_on_opening(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(_state(step), Progress(step=step))
    (tmp_path / "digests" / "1.json").unlink()  # this goes first, then the files one by one
    (tmp_path / "checkpoints" / "1" / "state" / "_METADATA").unlink()
    (tmp_path / "digests" / ".4.json.tmp").write_text("{")
    again = Checkpoints(tmp_path)
    state, _ = again.restore_latest(jax.eval_shape(lambda: _state(0.0)))
    np.testing.assert_array_equal(state.trainable["a"], 3.0)
    for folder in ("checkpoints", "digests"):
        assert sorted(path.stem for path in (tmp_path / folder).iterdir()) == ["2", "3"]


def test_other_model_is_a_sentence(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(_state(1), Progress(step=1))
    other = init_state({"a": jnp.zeros((4, 5)), "b": jnp.zeros(4)}, optax.adam(1e-3))
    with pytest.raises(UserError, match="cannot be restored"):
        checkpoints.restore(1, jax.eval_shape(lambda: other))
    with pytest.raises(UserError, match="cannot be restored"):
        checkpoints.restore_model(1, "student", other.trainable)


@pytest.mark.parametrize("several", [False, True])
def test_a_model_is_restored_without_its_optimizer(several, tmp_path) -> None:
    """It is restored alone, or by its role if several models learn."""
    student = _state(0.3).trainable
    trainable = {"student": student, "judge": {"c": jnp.ones(2)}} if several else student
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(init_state(trainable, optax.adam(1e-3)), Progress(step=5))
    like = jax.tree.map(jnp.zeros_like, student)
    found = checkpoints.restore_model(5, "student", like)
    jax.tree.map(np.testing.assert_array_equal, found, student)


def test_prune_keeps_what_it_is_told(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 7):
        checkpoints.save(_state(step), Progress(step=step))
    checkpoints.prune({2, 3})
    assert checkpoints.steps() == [2, 3, 5, 6]


def test_log_drops_what_came_after_a_checkpoint(tmp_path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(3):
        log.write("align", step, {"loss": np.float32(0.5), "bad": float("nan")})
        log.write("score", step, {"n": 1})
    with open(log.path, "a") as file:
        file.write('{"stage": "ali')  # as if killed while writing
    log.resume("align", 2)
    assert log.lines("align") == 2 and log.lines("score") == 3
    assert '"bad": null' in log.path.read_text()
