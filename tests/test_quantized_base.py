"""What a quantised base costs in accuracy, measured on the models of a finished run."""

import pytest

from benchmarks import quantized_base
from tests.tiny_run import changed


def test_more_bits_cost_less(finished_run):
    bases = quantized_base.compare(finished_run, rows=4)
    plain, int8, nf4 = (bases[name] for name in ("none", "int8", "nf4"))
    assert plain.kl.sum() == pytest.approx(0, abs=1e-4)
    assert plain.same.sum() == plain.tokens.sum() > 0
    assert 0 < int8.kl.sum() < nf4.kl.sum()
    assert abs((int8.nll - plain.nll).sum()) < abs(nf4.nll - plain.nll).sum()
    assert plain.bytes_a_weight == 4 > int8.bytes_a_weight > nf4.bytes_a_weight


def test_a_run_without_a_corpus_is_a_sentence(finished_run, tmp_path, capsys):
    from proxykd_jax.config import dump_config

    path = tmp_path / "run.yaml"
    path.write_text(dump_config(changed(finished_run, {"runs_dir": str(tmp_path)})))
    assert quantized_base.main(["--config", str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
