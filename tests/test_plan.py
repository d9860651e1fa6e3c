"""Plans: arguments and arithmetic are exact, and the real compilers find that 70B fits."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from proxykd_jax.models.config import LoraConfig, ModelConfig
from proxykd_jax.models.decoder import forward
from proxykd_jax.models.lora import abstract_adapter
from proxykd_jax.models.operations import answer_flops, cache_bytes, forward_flops, step_flops
from proxykd_jax.models.params import abstract_params
from proxykd_jax.parallel.ahead import Compiled
from proxykd_jax.parallel.collectives import count_collectives
from proxykd_jax.parallel.devices import DEVICES, gpu_target, topology_name
from proxykd_jax.plan import command
from proxykd_jax.planning import Request, StagePlan, render_rows

REPOSITORY = Path(__file__).resolve().parent.parent
TABLES = REPOSITORY / "configs" / "tables"
# Where launch/environment.sh puts the device compilers for the tests.
COMPILERS = Path(sys.prefix) / "compilers"
PUBLISHED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def plan(folder: Path, *arguments: str, compilers: bool = False) -> subprocess.CompletedProcess:
    return python(folder, "-m", "proxykd_jax.plan", *arguments, compilers=compilers)


def python(folder: Path, *arguments: str, compilers: bool = False) -> subprocess.CompletedProcess:
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    if compilers:  # a device's compiler does not accept the CPU's flags
        environment.pop("XLA_FLAGS", None)
    paths = [str(REPOSITORY), *([str(COMPILERS)] if compilers else [])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=REPOSITORY,
    )


@pytest.fixture
def config(tmp_path) -> Path:
    """The config of a run of tiny models, of which only the config.json exists."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(PUBLISHED))
    section = {"path": "nobody/tiny", "config": str(tmp_path / "model"), "dtype": "bfloat16"}
    run = {
        "preset": "paper",
        "name": "tiny",
        "corpus": {"sources": [{"path": "answers.jsonl"}], "max_length": 64},
        "proxy": section,
        "student": dict(section),
        "mesh": {"fsdp": 4, "data": 2, "sample": {"data": 2, "tensor": 4}},
        "align": {"batch_size": 16, "sampling": {"batch_size": 16}},
        "score": {"batch_size": 16},
        "distill": {"batch_size": 16},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def test_without_a_compiler_arguments_are_exact_and_the_rest_is_no_estimate(config, tmp_path):
    out = tmp_path / "plan.json"
    given = ("--config", str(config), "--device", "a100-80gb", "--count", "8", "--json", str(out))
    done = plan(tmp_path, *given)
    assert done.returncode == 0, done.stderr
    assert "no estimate" in done.stdout
    stages = json.loads(out.read_text())
    assert list(stages) == ["warmup", "sample", "reference", "round", "score", "distill"]

    # Count again from shapes: fsdp splits weights and adapter, all axes split rows, not norms.
    model = ModelConfig.from_hf(PUBLISHED).replace(lora=LoraConfig(rank=16))

    def held(tree, ways: int, copies: int = 1) -> int:
        found = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            whole = math.prod(leaf.shape) * leaf.dtype.itemsize * copies
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            found += whole if "norm" in name else whole // ways
        return found

    frozen = held(abstract_params(model, jnp.bfloat16), 4)
    adapter = held(abstract_adapter(model), 4, copies=3)  # with both moments of Adam
    steps = 2 * 4  # the step, and Adam's count
    row = 64 * (4 + 4 + 1) + 1  # tokens, labels, mask, example mask of a row
    expected = frozen + adapter + steps + 16 * row // 8
    found = stages["warmup"]["argument_bytes"]
    assert abs(found - expected) <= 16 * 64 * 8 // 8 + 16, (found, expected)

    for stage in stages.values():
        assert stage["temporaries_estimated"] is False and stage["largest_batch"] is None
        assert stage["hours"] > 0 and stage["flops"] > 0
    assert stages["sample"]["mesh"] == {"data": 2, "fsdp": 1, "tensor": 4}
    assert stages["round"]["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    # While answers are drawn on another mesh, the weights for training stay in memory.
    assert stages["sample"]["resident_bytes"] > frozen
    kept = sorted((tmp_path / "cache").rglob("*.json"))
    times = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) == 8 and plan(tmp_path, *given).returncode == 0
    assert times == [path.stat().st_mtime_ns for path in kept]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--count", "6"], "but there are 6 devices"),
        (["--count", "12"], "whole number of machines"),
        (["--count", "8", "--stage", "warm"], "this run has warmup, sample"),
        (["--count", "8", "--set", "mesh.fsdp=8", "--set", "mesh.data=1",
          "--set", "align.batch_size=12"], "multiple of 8"),
        (["--count", "8", "--set", "proxy.config=null"], "name a folder with its config.json"),
        (["--count", "8", "--utilisation", "1.5"], "share in (0, 1]"),
    ],
)  # fmt: skip
def test_mistakes_are_sentences(config, tmp_path, arguments, sentence):
    done = plan(tmp_path, "--config", str(config), "--device", "a100-80gb", *arguments)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "--table FILE for all rows of a table"),
        (["--config", "a.yaml", "--table", "b.yaml"], "Give --config FILE for a run, or"),
        (["--config", "a.yaml", "--only", "row"], "--only names rows of --table"),
        (["--table", "b.yaml", "--fit", "c.yaml"], "--fit writes one run's config"),
        (["--table", str(TABLES / "table_1.yaml"), "--only", "gpt4"], "these rows run no program"),
        (["--table", str(TABLES / "table_1.yaml"), "--only", "gpt5"], "the rows are gpt4, "),
    ],
)
def test_a_run_or_the_rows_of_a_table(capsys, arguments, sentence):
    assert command(["--device", "a100-80gb", "--count", "8", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_equal_programs_of_several_rows_share_a_line():
    request = Request(None, DEVICES["h100"], 8, (), 10, 20, 30, 0.5, None)  # type: ignore[arg-type]
    compiled = Compiled(0, 0, 0, 0, peak_bytes=3 << 30)
    axes = {"data": 1, "fsdp": 8, "tensor": 1}
    one = StagePlan(
        *("step", "align", 10**9, axes, 4, (compiled,), 1 << 30, True),
        *(1.0, None, (1.0, 0.0, 0.0), 2.5, True),
    )
    large = dataclasses.replace(one, name="round", fits=False)
    text = render_rows("t.yaml", request, {"a": [one], "b": [one, large]})
    assert "| step | 1.0B | 1x8x1 | 4 | 4.0 | 1.0 | yes | 2.50 | a, b |" in text
    assert "| round | 1.0B | 1x8x1 | 4 | 4.0 | 1.0 | NO | 2.50 | b |" in text
    assert "DOES NOT FIT: b." in text and "30 samples of 10 + 20 tokens" in text


def test_arithmetic_is_what_the_compiler_counts():
    """With one layer, because the compiler counts a scan once, and one block of queries."""
    config = ModelConfig.from_hf(PUBLISHED | {"num_hidden_layers": 1})
    params = abstract_params(config)
    tokens = jax.ShapeDtypeStruct((4, 32), jnp.int32)
    counted = jax.jit(lambda p, t: forward(p, None, t, config=config)).lower(params, tokens)
    flops = counted.compile().cost_analysis()["flops"]
    hidden_half = 2.0 * 4 * 32 * 32 * config.num_heads * config.head_dim
    ours = forward_flops(config, 4, 32) + hidden_half
    # The compiler also counts norms, softmax and rotation, a few operations per element.
    assert ours < flops < 1.15 * ours


def test_arithmetic_of_steps_and_answers():
    config = ModelConfig.from_hf(PUBLISHED)
    forward_once = forward_flops(config, 4, 32)
    full = {r: step_flops(config, 4, 32, full=True, remat=r) for r in ("none", "full")}
    assert full["none"] == 3 * forward_once
    assert 3.5 * forward_once < full["full"] < 4 * forward_once
    lora = config.replace(lora=LoraConfig(rank=2))
    assert 2 < step_flops(lora, 4, 32, full=False, remat="none") / forward_once < 2.5
    # Decoding token by token costs as much as the whole row, except for the head on the prompt.
    whole = answer_flops(config, 4, 16, 16)
    assert whole == pytest.approx(forward_flops(config, 4, 32), rel=0.05)
    assert cache_bytes(config, 3, 5, 2) == 2 * 2 * 3 * 8 * 5 * 8 * 2


def test_collectives_are_counted_with_their_loops():
    turns = 'backend_config={"known_trip_count":{"n":"%d"}}'
    program = f"""HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {{
  ROOT %sum = f32[] add(%a, %b)
}}

%inner (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {{
  %gathered = bf16[32,8]{{1,0}} all-gather(%x), dimensions={{0}}
}}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {{
  %start = (bf16[4,8]{{1,0}}, bf16[32,8]{{1,0}}) all-gather-start(%x), dimensions={{0}}
  %done = bf16[32,8]{{1,0}} all-gather-done(%start)
  %again = (s32[]) while(%t), condition=%c, body=%inner, {turns % 3}
}}

ENTRY %main (p: f32[16]) -> f32[16] {{
  %loop = (s32[]) while(%t), condition=%c, body=%body, {turns % 5}
  %reduced = f32[16]{{0}} all-reduce(%p), to_apply=%add
}}
"""
    gathered = 32 * 8 * 2
    assert count_collectives(program) == {
        "all-gather": 5 * (gathered + 3 * gathered),
        "all-reduce": 64,
    }


def test_devices_are_described():
    for device in DEVICES.values():
        assert (device.gpu is None) != (device.tpu is None)
        if device.gpu is not None:
            assert f"device_memory_size: {device.memory_bytes}" in gpu_target(device)
    assert topology_name(DEVICES["h100"], 16) == "1x2x8"
    assert topology_name(DEVICES["h100"], 2) == "1x1x2"
    assert topology_name(DEVICES["v5p"], 8) == "v5p:2x2x2"
    assert topology_name(DEVICES["v5p"], 1) == "v5p:1x1x1"
    assert topology_name(DEVICES["v6e"], 8) == "v6e:2x4"
    with pytest.raises(ValueError, match="slices of"):
        topology_name(DEVICES["v5e"], 6)


# A compilation for a device takes 10 to 40 CPU-seconds. So one process makes them all, and compiles
# a program once that two checks need: the step of the 70B model with several numbers of rows, then
# the other stages of a tiny model.
LOOK = """
import json, sys
from pathlib import Path
from proxykd_jax.parallel.ahead import prepare_process

big, tiny, cache = sys.argv[1:]
prepare_process(8)
from proxykd_jax.config import load_config
from proxykd_jax.parallel.devices import DEVICES
from proxykd_jax.planning.look import Planner, Request

def planner(path, stages, *changes):
    config = load_config(path, changes)
    return Planner(
        Request(config, DEVICES["a100-80gb"], 8, stages, 64, 64, 40000, 0.4, Path(cache))
    )

def warmups(batch):
    plans = planner(big, ("warmup",), f"align.batch_size={batch}")
    (warmup,) = plans.programs
    axes = plans.axes_of(plans.request.config.mesh)

    def look(rows, search=True):
        stage = plans.look(warmup, axes, rows)
        return plans.with_largest_batch(warmup, stage) if search else stage

    return look

look = warmups(32)
found = {8: warmups(8)(8, search=False), 32: look(32)}
found["too many"] = look(2 * found[32].largest_batch)
plans = planner(tiny, ("round", "sample", "distill"))
for program in plans.programs:
    axes = plans.axes_of(plans.request.config.mesh.of(program.work))
    found[program.name] = plans.look(program, axes, program.rows)
print(json.dumps({name: stage.figures() for name, stage in found.items()}))
"""


@pytest.mark.slow
class TestRealCompilers:
    """Programs are compiled for an A100 on a machine without one."""

    @pytest.fixture(autouse=True)
    def there(self):
        if not COMPILERS.is_dir():
            pytest.skip(f"the device compilers are not in {COMPILERS}")

    def test_a_70b_step_fits_eight_a100_until_it_has_too_many_rows(self, config, tmp_path):
        """A prototype of the same step needed 25.9 GiB for 8 rows and 32.3 for 32."""
        recipe = REPOSITORY / "configs" / "llama2_70b_to_7b.yaml"
        command = ["-c", LOOK, str(recipe), str(config), str(tmp_path / "cache")]
        done = python(tmp_path, *command, compilers=True)
        assert done.returncode == 0, done.stderr
        stages = json.loads(done.stdout)
        assert all(stage["temporaries_estimated"] for stage in stages.values())
        few, many, refused = (stages.pop(name) for name in ("8", "32", "too many"))
        for stage in (few, many):
            assert stage["fits"]
            assert stage["peak_bytes"] > stage["argument_bytes"] > 16.3 * 2**30
        peaks = [stage["peak_bytes"] / 2**30 for stage in (few, many)]
        np.testing.assert_allclose(peaks, [25.9, 32.3], rtol=0.06)
        assert many["largest_batch"] > 100
        assert not refused["fits"] and 0 < refused["largest_batch"] < refused["batch"]
        # A tiny model fits.
        assert list(stages) == ["sample", "round", "distill"]
        assert all(stage["fits"] for stage in stages.values())

    def test_fit_finds_meshes(self, config, tmp_path):
        """On two devices, which have three meshes; eight would have ten."""
        fitted = tmp_path / "fitted.yaml"
        # Two kinds of work, each with its own mesh, whose programs are soonest compiled.
        given = (
            "--device", "a100-80gb", "--count", "2", "--stage", "reference", "--stage", "score"
        )  # fmt: skip
        two = ("mesh.data=1", "mesh.fsdp=2", "mesh.sample.data=1", "mesh.sample.tensor=2")
        changes = [word for change in two for word in ("--set", change)]
        done = plan(
            tmp_path, "--config", str(config), *given, *changes, "--fit", str(fitted),
            compilers=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "no estimate" not in done.stdout
        mesh = yaml.safe_load(fitted.read_text())["mesh"]
        for axes in (mesh, mesh["score"]):
            assert math.prod(axes[name] for name in ("data", "fsdp", "tensor")) == 2
        assert plan(
            tmp_path, "--config", str(fitted), *given, compilers=True
        ).returncode == 0  # fmt: skip
