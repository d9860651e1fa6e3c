"""Every mesh of eight devices computes the same as one device.

Run by ``test_eight_devices.py`` in a process that has eight.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from proxykd_jax import score
from proxykd_jax.artifacts import read_json
from proxykd_jax.baselines import rollouts
from proxykd_jax.baselines.rollouts import Answering
from proxykd_jax.config import AxesConfig, PreferenceConfig
from proxykd_jax.config.method_section import AnsweringSection
from proxykd_jax.data.collate import TokenRow
from proxykd_jax.data.soft_labels import open_soft_labels
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.generation.label_batch import topk_soft_labels
from proxykd_jax.generation.sampler import Prompt, Sample, sample
from proxykd_jax.generation.samples import SampleStore
from proxykd_jax.models import splash
from proxykd_jax.models.attention import attention
from proxykd_jax.models.config import LoraConfig, ModelConfig
from proxykd_jax.models.decoder import hidden_states
from proxykd_jax.models.hf_weights import load_model, save_model
from proxykd_jax.models.lora import init_adapter, merge
from proxykd_jax.models.params import init_params
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.parallel.sharding import bytes_per_device, move, put_rows, sharding_of
from proxykd_jax.training.batch_objectives import AlignObjective, DistillObjective, NllObjective
from proxykd_jax.training.checkpoint import Checkpoints, Progress
from proxykd_jax.training.model import Model
from proxykd_jax.training.reference import pair_logps
from proxykd_jax.training.stage_run import StageRun
from proxykd_jax.training.state import ModelSpec, abstract_state, init_state
from proxykd_jax.training.steps import make_train_step
from tests.tiny_run import make_files, recipe
from tests.training.conftest import VOCAB, random_distill, random_pairs, random_rows

SHAPES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 4, 1), (4, 1, 2), (1, 4, 2), (1, 2, 4), (2, 2, 2)]
MESHES = {
    "x".join(map(str, shape)): AxesConfig(data=shape[0], fsdp=shape[1], tensor=shape[2])
    for shape in SHAPES
}
PUBLISHED = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 8,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "initializer_range": 0.15,
}
# Together these use every line of the sharding table: biases, q/k norms, embeddings tied or not.
FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "tie_word_embeddings": True,
    },
}
OBJECTIVES = {
    "nll": (NllObjective("example_mean"), random_rows),
    "align": (
        AlignObjective(PreferenceConfig(loss="dpo", beta=0.3), "token_mean", 0.7, 1.3),
        random_pairs,
    ),
    "distill": (DistillObjective(10.0, 1.0, "bucket", "example_mean"), random_distill),
}
ROWS = 16  # two micro-batches with one row per device


def test_there_are_eight_devices():
    assert len(jax.devices()) == 8 and PUBLISHED["vocab_size"] > VOCAB


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> tuple[ModelConfig, Any, Any]:
    """(config, params, adapter) on the host; no parameter is zero."""
    config = ModelConfig.from_hf(PUBLISHED | FAMILIES[request.param])
    config = config.replace(lora=LoraConfig(rank=3, alpha=6.0))
    params = init_params(jax.random.key(0), config)
    adapter = init_adapter(jax.random.key(1), config)
    noise = iter(jax.random.split(jax.random.key(2), 200))
    shaken = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(next(noise), x.shape), (params, adapter)
    )
    return config, *jax.device_get(shaken)


def close(found: Any, expected: Any) -> None:
    """Asserts that arrays are equal within 1e-5 of their largest value."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.fixture(scope="module")
def gradients(model) -> tuple[Any, dict[str, Any]]:
    """A function that computes gradients on a mesh, and its result on one device.

    The gradients are those of an adapter, or of all weights if these have more kinds of arrays.
    """
    config, params, adapter = model
    full = config.qkv_bias or config.qk_norm
    bare = config.replace(lora=None)
    spec = ModelSpec(bare if full else config, "full" if full else "lora", "float32", "full")
    trainable, frozen = (params, {}) if full else (adapter, params)
    objectives = {name: OBJECTIVES[name] for name in (["align"] if full else OBJECTIVES)}

    def on(axes: AxesConfig | None) -> dict[str, Any]:
        found = {}
        for name, (objective, make) in objectives.items():

            def loss(trainable: Any, frozen: Any, batch: Any, objective: Any = objective) -> Any:
                counts = objective.counts(batch)
                bound = spec.bind(frozen, trainable)
                return objective.share(bound, batch, counts, spec, None)[0]

            arguments = (trainable, frozen, make(np.random.default_rng(3), ROWS))
            if axes is not None:
                mesh = make_mesh(axes)
                arguments = (
                    *(move(tree, mesh) for tree in arguments[:2]),
                    put_rows(arguments[2], mesh),
                )
            found[name] = jax.device_get(jax.jit(jax.value_and_grad(loss))(*arguments))
        return found

    return on, on(None)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_losses_and_gradients(gradients, axes):
    on, expected = gradients
    close(on(axes), expected)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_log_probs(model, axes):
    config, params, adapter = model
    if config.qkv_bias:
        pytest.skip("its forward pass is in test_losses_and_gradients, what follows is Llama's")
    spec = ModelSpec(config, "lora", "float32", "none")
    pairs, rows = (make(np.random.default_rng(4), ROWS) for make in (random_pairs, random_rows))
    mesh = make_mesh(axes)
    moved = move(params, mesh), move(adapter, mesh)

    def both(params: Any, adapter: Any, pairs: Any, rows: Any) -> Any:
        return (
            pair_logps(params, adapter, pairs, spec=spec, microbatches=2),
            topk_soft_labels(params, adapter, rows, config=config, top_k=5),
        )

    found = both(*moved, put_rows(pairs, mesh), put_rows(rows, mesh))
    expected = both(params, adapter, pairs, rows)
    close(found[0], expected[0])
    inside = rows.mask_BL
    np.testing.assert_array_equal(found[1][0][inside], expected[1][0][inside])
    close([x[inside] for x in found[1][1:]], [x[inside] for x in expected[1][1:]])


@pytest.mark.parametrize("name", ["2x2x2", "1x8x1", "1x1x8"])
def test_splash_attention(monkeypatch, name):
    """Each device attends for its own rows and heads, bitwise equal to one device."""
    monkeypatch.setattr(splash, "_interpret", True)
    rng = np.random.default_rng(0)
    q, k, v, slope = (
        jnp.asarray(rng.normal(size=(8, 130, heads, 8)), jnp.bfloat16) for heads in (16, 8, 8, 16)
    )
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (8, 130)))[:, ::-1], jnp.int32)

    @jax.jit
    def run(q, k, v, ids, slope):
        attend = functools.partial(
            attention, segment_ids_BL=ids, causal=True, window=50, backend="splash"
        )
        result, pull = jax.vjp(attend, q, k, v)
        return result, *pull(slope)

    mesh = make_mesh(MESHES[name])
    heads = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
    given = *jax.device_put((q, k, v), heads), put_rows(ids, mesh), jax.device_put(slope, heads)
    found = run(*given)
    assert found[0].sharding.shard_shape(found[0].shape)[0] == 8 // (
        mesh.size // mesh.shape["tensor"]
    )
    for one, other in zip(found, run(q, k, v, ids, slope), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("name", ["2x2x2", "1x8x1"])
def test_a_decoder_with_splash_attention(monkeypatch, name):
    """The kernels are inside a scanned, checkpointed layer, in float32 without rounding."""
    monkeypatch.setattr(splash, "_interpret", True)
    monkeypatch.setattr(splash, "obstacle", lambda *_: None)
    config = ModelConfig.from_hf(PUBLISHED | FAMILIES["llama"]).replace(max_positions=130)
    params = init_params(jax.random.key(0), config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 48, (8, 130)).astype(np.int32)
    ids = np.sort(rng.integers(0, 3, (8, 130)))[:, ::-1].astype(np.int32)

    def loss(params: Any, tokens: Any, ids: Any, backend: Any) -> Any:
        hidden_BLD = hidden_states(
            params, None, tokens, config=config, segment_ids_BL=ids, attention=backend
        )
        return jnp.where((ids > 0)[:, :, None], jnp.sin(hidden_BLD), 0).sum()

    step = jax.jit(jax.value_and_grad(loss), static_argnums=3)
    mesh = make_mesh(MESHES[name])
    given = move(params, mesh), *put_rows((tokens, ids), mesh)
    assert "splash_mha_fwd" in str(step.trace(*given, "splash").jaxpr)
    close(step(*given, "splash"), step(params, tokens, ids, "xla"))


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_samples(model, axes):
    """With these weights no two tokens are so near to a tie that rounding matters."""
    config, params, adapter = model
    if config.qkv_bias or config.qk_norm:
        pytest.skip("one family is enough: the cache is the same")
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, 48, rng.integers(1, 9)).astype(np.int32) for _ in range(20)]
    options: dict[str, Any] = {
        "config": config,
        "seed": 3,
        "round_index": 1,
        "settings": DrawSettings(1.0, 1.0, config.vocab_size, (2,)),
        "batch_size": 16,
    }
    asked = [Prompt(prompt, str(i), 12) for i, prompt in enumerate(prompts)]
    mesh = make_mesh(axes)
    found = sample((move(params, mesh), move(adapter, mesh)), asked, mesh=mesh, **options)
    expected = sample((params, adapter), asked, **options)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logps, b.logps, rtol=1e-5, atol=1e-5)


def test_a_student_in_training_answers_on_the_mesh_for_answers(model, monkeypatch, tmp_path):
    """Student and mixed-in scorer are moved there for a draw (2x2x2); ``test_samples`` shows that
    the draw is the same on every mesh."""
    config, params, adapter = model
    trained, draws = make_mesh(MESHES["1x8x1"]), MESHES["2x2x2"]
    files = make_files(tmp_path / "files")
    mesh = {"fsdp": 8, "sample": draws.model_dump()}
    student = Model(
        ModelSpec(config, "lora", "float32", "none"),
        move(params, trained),
        move(adapter, trained),
        tmp_path,
    )
    settings = recipe(
        files, tmp_path, {"mesh": mesh, "method": {"name": "proxy_kd", "student_share": 0.5}}
    )
    nothing: Any = None
    corpus: Any = SimpleNamespace(max_length=16, end_token_ids=(2,), vocab_size=VOCAB)
    run = StageRun("distill", settings, corpus, student, trained, nothing, nothing)
    seen: dict[str, Any] = {}

    def sample(weights: Any, prompts: Any, **options: Any) -> list[Any]:
        seen.update(options, weights=weights)
        return [Sample(np.zeros(1, np.int32), False, np.zeros(1, np.float32)) for _ in prompts]

    monkeypatch.setattr(rollouts, "sample", sample)
    row = TokenRow(np.arange(6, dtype=np.int32), 4, "row")
    assert isinstance(settings.method, AnsweringSection)
    answering = Answering.of(run, settings.method, 1.0)
    answering.answer(student, [row], 0, student.weights)
    assert seen["mesh"] == make_mesh(draws)
    for weights in (seen["weights"], seen["other"]):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(weights), (params, adapter))
        assert {leaf.sharding.mesh for leaf in jax.tree.leaves(weights)} == {make_mesh(draws)}
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(student.weights)} == {trained}


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_each_device_holds_what_the_table_predicts(model, axes):
    config, params, adapter = model
    mesh = make_mesh(axes)
    spec = ModelSpec(config, "lora", "float32", "none")
    optimizer = optax.adam(1e-3)
    frozen, state = move(params, mesh), move(init_state(adapter, optimizer), mesh)
    predicted = bytes_per_device((params, jax.device_get(state)), axes.model_dump())
    held = dict.fromkeys(mesh.devices.flat, 0)
    for leaf in jax.tree.leaves((frozen, state)):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {predicted}

    if config.qkv_bias or config.qk_norm:
        return  # one family is enough, because a step has only these arrays and its batch as inputs
    batch = put_rows(random_rows(np.random.default_rng(0), ROWS), mesh)
    ways = axes.data * axes.fsdp
    rows = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(batch)) // ways
    step = make_train_step(spec, NllObjective("sum"), optimizer, microbatches=1, seed=0)
    program = step.lower(state, frozen, batch).compile()
    # XLA drops arguments that a step does not use, such as positions of rows with one example.
    kept = program.memory_analysis().argument_size_in_bytes
    assert predicted < kept <= predicted + rows


@pytest.mark.parametrize("name", ["1x8x1", "1x1x8", "2x2x2"])
def test_a_base_in_four_bits(name, tmp_path):
    """Each device makes the codes of its part; together they equal those of one device. So does
    the model that is written with the adapter merged in."""
    wide = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 32, "num_hidden_layers": 2}
    wide |= {"initializer_range": 0.05}  # activations of the same size as in the other families
    config = ModelConfig.from_hf(PUBLISHED | FAMILIES["llama"] | wide)
    save_model(tmp_path / "model", config, init_params(jax.random.key(0), config))
    config = config.replace(lora=LoraConfig(rank=3, alpha=6.0))
    noise = iter(jax.random.split(jax.random.key(2), 50))
    adapter = jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(next(noise), x.shape),
        init_adapter(jax.random.key(1), config),
    )
    spec = ModelSpec(config, "lora", "float32", "full")
    objective, rows = NllObjective("example_mean"), random_rows(np.random.default_rng(3), ROWS)
    mesh = make_mesh(MESHES[name])

    def loss(adapter: Any, params: Any, batch: Any) -> Any:
        models = (params, adapter)
        return objective.share(models, batch, objective.counts(batch), spec, None)[0]

    step = jax.jit(jax.value_and_grad(loss))
    _, whole = load_model(tmp_path / "model", quantize="nf4")
    _, parts = load_model(
        tmp_path / "model",
        quantize="nf4",
        sharding=lambda path: sharding_of("/".join(path), mesh),
    )
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(parts), jax.device_get(whole))
    predicted = bytes_per_device(parts, MESHES[name].model_dump())
    held = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(parts)]
    assert sum(held) == predicted
    close(step(move(adapter, mesh), parts, put_rows(rows, mesh)), step(adapter, whole, rows))
    save_model(tmp_path / "merged", config, parts, move(adapter, mesh))
    close(load_model(tmp_path / "merged")[1], merge(whole, adapter, config, "float32"))


def test_a_checkpoint_of_one_mesh_is_restored_on_another(model, tmp_path):
    _, _, adapter = model
    optimizer = optax.adam(1e-3)
    state = init_state(jax.tree.map(jnp.asarray, adapter), optimizer)
    first = make_mesh(MESHES["1x8x1"])
    Checkpoints(tmp_path).save(move(state, first), Progress(step=7))
    for axes in MESHES.values():
        mesh = make_mesh(axes)
        found, _ = Checkpoints(tmp_path).restore_latest(abstract_state(adapter, optimizer, mesh))
        assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(found))
        jax.tree.map(np.testing.assert_array_equal, found, state)


def test_a_run_on_another_mesh_makes_the_same_samples_and_labels(tmp_path):
    """``align`` and ``score``, with another mesh for drawing answers; every step is the same."""
    files = make_files(tmp_path / "files")
    meshes = {
        "plain": {"data": 8},
        "mixed": {"data": 2, "fsdp": 2, "tensor": 2, "sample": {"data": 4, "tensor": 2}},
    }
    stores, labels, losses = [], [], []
    for name, mesh in meshes.items():
        config = recipe(files, tmp_path / "runs", {"mesh": mesh}, name=name)
        score.main(config)
        stores.append(SampleStore(config.folder / "samples" / "round_02"))
        labels.append(open_soft_labels(config.folder / "soft_labels"))
        results = read_json(config.folder / "proxy" / "manifest.json")["results"]
        losses.append([result["nll"] for result in results if "nll" in result])
    first, second = (store.read(range(len(store))) for store in stores)
    assert len(first) > 10
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(*losses, rtol=1e-4)
    for name in ("distill", "fresh"):
        np.testing.assert_allclose(
            *(store.seq_logliks(name) for store in labels), rtol=1e-3, atol=1e-3
        )
