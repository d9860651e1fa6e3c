"""Times of stages: one line an attempt, whatever its end."""

import pytest

from proxykd_jax.training.times import FILE, read_times, timed


def test_each_attempt_has_a_line(tmp_path):
    with pytest.raises(KeyError), timed(tmp_path, "align"):
        raise KeyError
    with timed(tmp_path, "align"):
        pass
    with timed(tmp_path, "prepare", on_devices=False):
        pass
    with open(tmp_path / FILE, "a") as file:
        file.write('{"stage": "di')  # a kill
    lines = read_times(tmp_path)
    assert [(line["stage"], line["ended"]) for line in lines] == [
        ("align", "stopped"), ("align", "finished"), ("prepare", "finished"),
    ]  # fmt: skip
    assert all(line["seconds"] >= 0 and line["host"] and line["processes"] == 1 for line in lines)
    assert lines[0]["devices"] >= 1 and "device" not in lines[2]
    assert read_times(tmp_path / "none") == []
