"""If the vocabulary is sharded over devices, no loss gathers it on any of them."""

import os
import subprocess
import sys

# This runs in its own process, because the number of devices is fixed when jax starts.
PROGRAM = """
import re
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from proxykd_jax import losses

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
rows, split = NamedSharding(mesh, P("data")), NamedSharding(mesh, P("data", None, "model"))
whole = NamedSharding(mesh, P())
logits = jax.random.normal(jax.random.key(0), (4, 8, 64))
labels = jnp.ones((4, 8), jnp.int32)
logps, ids = jax.lax.top_k(jax.nn.log_softmax(1.3 * logits), 3)

cases = {"token_logps": lambda x, labels, logps, ids: losses.token_logps(x, labels).sum()}
for tail in losses.TAILS:
    cases[tail] = lambda x, labels, logps, ids, tail=tail: losses.topk_kl_tokens(
        losses.topk_logps(x, ids), (logps, None), tail=tail).sum()
cases["both"] = lambda x, labels, logps, ids: sum(
    part.sum() for part in losses.topk_and_label_logps(x, ids, labels))
cases["drawn"] = lambda x, labels, logps, ids: losses.drawn_label_tokens(
    x, ids, jnp.ones_like(ids), num_draws=3).sum()
for name, case in cases.items():
    function = jax.value_and_grad(case)
    compiled = jax.jit(function, in_shardings=(split, rows, rows, rows),
                       out_shardings=(whole, split)).lower(logits, labels, logps, ids).compile()
    program = compiled.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in program, (name, collective)
    # Each device holds [2, 8, 32] of the logits; any array with more of the vocabulary is a copy.
    shapes = re.findall(r"(?:f32|pred|s32)\\[([0-9,]+)\\]", program)
    assert all("64" not in shape.split(",") for shape in shapes), name
    value, grad = compiled(*(jax.device_put(a, s) for a, s in zip(
        (logits, labels, logps, ids), (split, rows, rows, rows))))
    want, want_grad = function(logits, labels, logps, ids)
    assert jnp.allclose(value, want, rtol=1e-5) and jnp.allclose(grad, want_grad, atol=1e-6), name
print("ok", len(cases))
"""


def test_a_sharded_vocabulary_stays_sharded():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "ok 7", done.stderr
