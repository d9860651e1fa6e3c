"""A checkpoint of many shards reaches its devices without being in host memory as a whole."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.hf_weights import save_model
from proxykd_jax.models.params import flatten, param_shapes, unflatten

SHARD = 40 << 20
PUBLISHED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 4096,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
# Devices are CPUs here, so the arrays are in host memory. The cost is what exceeds them.
PROGRAM = """
import json, sys, threading, time
import jax
from proxykd_jax.config import AxesConfig
from proxykd_jax.models.hf_weights import load_model
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.parallel.sharding import sharding_of

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

mesh = make_mesh(AxesConfig(fsdp=4, tensor=2))
before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

thread = threading.Thread(target=watch)
thread.start()
_, params = load_model(
    sys.argv[1], dtype="bfloat16", sharding=lambda path: sharding_of("/".join(path), mesh))
jax.block_until_ready(params)
done.set()
thread.join()
leaves = jax.tree.leaves(params)
held = {device: 0 for device in jax.devices()}
for leaf in leaves:
    for shard in leaf.addressable_shards:
        held[shard.device] += shard.data.nbytes
print(json.dumps({
    "peak": peak[0] - before, "held": sum(held.values()), "most": max(held.values()),
    "sum": sum(leaf.nbytes for leaf in leaves), "first": float(leaves[0].ravel()[0])}))
"""


@pytest.mark.slow
def test_the_host_holds_little_more_than_a_shard(tmp_path):
    config = ModelConfig.from_hf(PUBLISHED)
    half = np.dtype(ml_dtypes.bfloat16)
    params = unflatten(
        {path: np.full(shape, 0.5, half) for path, shape in flatten(param_shapes(config))}
    )
    save_model(tmp_path / "model", config, params, dtype="bfloat16", max_shard_bytes=SHARD)
    shards = list((tmp_path / "model").glob("*.safetensors"))
    total = sum(path.stat().st_size for path in shards)
    assert len(shards) >= 15 and total > 15 * SHARD
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["first"] == 0.5
    # Norms are on every device; all other arrays are split over eight devices.
    assert found["sum"] <= found["held"] < 1.01 * found["sum"]
    assert found["most"] < 1.01 * found["sum"] / 8
    assert found["peak"] - found["held"] < 2 * SHARD
