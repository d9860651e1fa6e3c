"""How processes agree; here a dictionary connects them."""

from __future__ import annotations

import os
import signal

import pytest

from proxykd_jax import artifacts, peers
from proxykd_jax.data.parts import PartFolder
from proxykd_jax.errors import Stopped, UserError


class Told(dict):
    """A channel that never waits: a key must be set before it is read."""

    def put(self, key, text):
        assert key not in self
        self[key] = text

    def get(self, key, meanwhile):
        meanwhile()
        return self[key]

    def any_under(self, key):
        return any(name.startswith(f"{key}/") for name in self)


@pytest.fixture
def as_process():
    """``as_process(index)`` makes this process the one of three with that index."""
    told = Told()

    def become(index):
        peers.leave()
        peers.join(index, 3, told)
        return told

    yield become
    peers.leave()


def test_one_process_runs_it_all(tmp_path):
    assert peers.on_first(lambda: (1, "two")) == (1, "two")
    assert (peers.index(), peers.count(), peers.is_first()) == (0, 1, True)
    artifacts.write_bytes(tmp_path / "file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_the_others_hear_what_the_first_found(as_process):
    as_process(0)
    found = [peers.on_first(lambda n=n: {"n": [n, None, True]}) for n in range(3)]
    for index in (1, 2):
        as_process(index)
        heard = [peers.on_first(lambda: pytest.fail("not on this process")) for _ in range(3)]
        assert heard == found == [{"n": [n, None, True]} for n in range(3)]


def test_a_mistake_is_everybodys(as_process):
    def mistake():
        raise UserError("no such file")

    for index in (0, 1):
        as_process(index)
        with pytest.raises(UserError, match="no such file"):
            peers.on_first(mistake)


def test_calls_inside_are_the_firsts_own_business(as_process):
    as_process(0)
    outer = peers.on_first(lambda: [peers.on_first(lambda: 1), peers.on_first(lambda: 2)])
    after = peers.on_first(lambda: "after")
    as_process(1)
    assert peers.on_first(list) == outer == [1, 2]
    assert peers.on_first(str) == after == "after"


def test_only_the_first_writes(as_process, tmp_path):
    as_process(1)
    artifacts.write_json(tmp_path / "new" / "value.json", [1])
    (tmp_path / ".left.tmp").write_text("")
    artifacts.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".left.tmp"]


def test_stages_and_parts_are_opened_alike(as_process, tmp_path):
    def work():
        opened = artifacts.open_stage(tmp_path / "s", "align", {"a": 1}, {})
        missing = PartFolder(tmp_path / "s" / "parts").resume(2)
        artifacts.complete_stage(tmp_path / "s", counts={"rows": 1})
        return opened, missing, artifacts.open_stage(tmp_path / "s", "align", {"a": 1}, {})

    as_process(0)
    first = work()
    assert first == (False, [0, 1], True)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    as_process(1)
    assert work() == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files


def test_all_stop_at_the_boundary_that_the_first_says(as_process):
    told = as_process(0)
    assert [peers.stop_wanted() for _ in range(3)] == [False] * 3
    told.put("term/2", "")  # process 2 was asked to stop
    assert peers.stop_wanted()
    with pytest.raises(Stopped, match="the same command continues"):
        peers.stop_if_wanted()
    for index in (1, 2):
        as_process(index)
        assert [peers.stop_wanted() for _ in range(5)] == [False] * 3 + [True] * 2


def test_a_process_that_is_told_to_stop_tells_the_first(as_process):
    told = as_process(1)
    told.update({"boundary/0": "go on", "boundary/1": "go on", "call/0": '{"value": 1}'})
    with peers.sigterm_stops():
        assert not peers.stop_wanted() and "term/1" not in told
        os.kill(os.getpid(), signal.SIGTERM)  # nothing is raised, because process 0 decides
        assert peers.on_first(int) == 1
        assert "term/1" in told
        assert not peers.stop_wanted()


def test_the_first_stops_what_the_others_wait_for(as_process):
    as_process(0)
    with peers.sigterm_stops(), pytest.raises(Stopped):
        peers.on_first(lambda: os.kill(os.getpid(), signal.SIGTERM))
    as_process(1)
    with pytest.raises(Stopped):
        peers.on_first(int)


def test_sigterm_waits_for_a_boundary_where_there_is_something_to_save():
    with peers.sigterm_stops():
        with peers.saves_on_stop():
            assert not peers.stop_wanted()
            os.kill(os.getpid(), signal.SIGTERM)
            assert peers.stop_wanted()
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with peers.sigterm_stops():
        assert not peers.stop_wanted()


def test_only_the_first_speaks(as_process, capsys):
    as_process(1)
    peers.say("hidden")
    as_process(0)
    peers.say("shown")
    assert capsys.readouterr().err == "shown\n"
