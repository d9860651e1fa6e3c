"""Model folders: bitwise round trips, and one sentence for each kind of damage."""

import json
import shutil
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from proxykd_jax.errors import UserError
from proxykd_jax.models import hf_weights, llama
from proxykd_jax.models.fingerprint import fingerprint, params_fingerprint
from proxykd_jax.models.hf_weights import load_model, save_model
from proxykd_jax.models.lora import merge
from proxykd_jax.models.params import flatten
from proxykd_jax.models.quantized import quantize


def bits(tree):
    return {path: (np.asarray(leaf).dtype, np.asarray(leaf).tobytes()) for path, leaf in tree}


def same(a, b):
    return bits(flatten(a)) == bits(flatten(b))


@pytest.fixture
def model(small_config, helpers):
    config = small_config.replace(lora=None)
    return config, helpers.params(config)


@pytest.fixture
def folder(model, tmp_path):
    save_model(tmp_path / "model", *model)
    return tmp_path / "model"


@pytest.fixture
def sharded(model, tmp_path):
    save_model(tmp_path / "sharded", *model, max_shard_bytes=20_000)
    return tmp_path / "sharded"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_shard_bytes", [5e9, 20_000, 1])
def test_round_trip_is_bitwise(model, tmp_path, dtype, max_shard_bytes):
    config, params = model
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    save_model(tmp_path / "out", config, params, dtype=dtype, max_shard_bytes=max_shard_bytes)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(shards) == 1) == (max_shard_bytes == 5e9)
    found, read = load_model(tmp_path / "out", dtype=dtype)
    assert found == config
    assert same(read, params)
    if len(shards) > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert {shard.name for shard in shards} == set(index["weight_map"].values())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
        assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"


def test_what_transformers_wrote_goes_out_as_it_came_in(each_reference, tmp_path):
    """Names, types, shapes and bits of the tensors stay the same, and transformers loads ours."""
    import transformers

    save_model(tmp_path / "out", each_reference.config, each_reference.params)
    theirs = load_file(each_reference.folder / "model.safetensors")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (tensor.dtype, tensor.shape) == (ours[name].dtype, ours[name].shape)
        assert tensor.tobytes() == ours[name].tobytes(), name
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()), report
    state = each_reference.torch_model.state_dict()
    assert all(bool((value == state[name]).all()) for name, value in loaded.state_dict().items())


def test_transformers_shards_are_read(reference, tmp_path):
    model = reference("qwen2")
    model.torch_model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert same(load_model(tmp_path / "shards")[1], model.params)


def test_casting(model, folder, tmp_path):
    config, params = model
    read = load_model(folder, dtype=jnp.bfloat16)[1]
    assert same(read, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    save_model(tmp_path / "half", config, params, dtype="float16")
    assert load_file(tmp_path / "half" / "model.safetensors")["model.norm.weight"].dtype == "f2"
    assert load_model(tmp_path / "half")[1]["final_norm"]["scale"].dtype == jnp.float32
    for dtype in ("int8", "float64", "nonsense"):
        with pytest.raises(UserError, match="bfloat16"):
            load_model(folder, dtype=dtype)
    with pytest.raises(UserError, match="float16 is a type of files"):
        load_model(folder, dtype="float16")


def test_put_sees_every_leaf_once_and_whole(model, folder):
    config, params = model
    seen = []

    def put(path, array):
        seen.append("/".join(path))
        assert array.flags.c_contiguous
        return jnp.asarray(array)

    assert same(load_model(folder, put=put)[1], params)
    assert seen == ["/".join(path) for path, _ in flatten(llama.param_shapes(config))]


def test_sharded_placement_reads_only_the_parts(model, sharded):
    """Here one device holds a whole array, so the parts are tested on the reader itself."""
    from proxykd_jax.models.hf_weights import StackedTensor
    from proxykd_jax.models.tensor_files import TensorFolder

    params = model[1]
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("fsdp",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    _, read = load_model(sharded, sharding=lambda path: spec)
    assert same(read, params)
    assert all(leaf.sharding == spec for leaf in jax.tree.leaves(read))
    files = TensorFolder(sharded)
    for path, leaf in flatten(params):
        lazy = StackedTensor(files, path, leaf.shape, np.dtype(np.float32))
        index = tuple(slice(size // 3, size // 3 + (size + 1) // 2) for size in leaf.shape)
        np.testing.assert_array_equal(lazy.read(index), np.asarray(leaf)[index])
    with pytest.raises(ValueError, match="not both"):
        load_model(sharded, sharding=lambda path: spec, put=lambda path, array: array)


@pytest.mark.parametrize("method", [None, "nf4"])
def test_an_adapter_is_merged_without_a_whole_merged_model(
    small_config, helpers, tmp_path, monkeypatch, method
):
    """While a tensor is fetched, it is the only array besides the model, in whatever precision."""
    config = small_config
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), helpers.params(config))
    if method is not None:
        for block in params["layers"].values():
            for part in block.values():
                if isinstance(part, dict) and "kernel" in part:
                    part["kernel"] = quantize(part["kernel"], method=method)
    adapter = helpers.adapter(config)
    fetch, seen = hf_weights.fetch, []

    def watched(array):
        seen.append(sum(x.nbytes for x in jax.live_arrays()))
        return fetch(array)

    monkeypatch.setattr(hf_weights, "fetch", watched)
    before = sum(x.nbytes for x in jax.live_arrays())
    save_model(tmp_path / "streamed", config, params, adapter)
    monkeypatch.undo()
    merged = merge(params, adapter, config, "float32")
    kernels = [leaf for path, leaf in flatten(merged) if path[0] == "layers"]
    largest = max(leaf.nbytes // config.num_layers for leaf in kernels)
    assert max(seen) - before <= 2 * largest < sum(x.nbytes for x in kernels) / 4
    _, found = load_model(tmp_path / "streamed")
    expected = dict(flatten(merged))
    for path, leaf in flatten(found):
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-6, atol=1e-7, err_msg=str(path))


def test_tokenizer_files_are_copied_byte_for_byte(model, folder, tmp_path):
    contents = {
        "tokenizer.json": b'{ "odd":   "spacing"}\r\n',
        "tokenizer.model": bytes(range(256)),
        "chat_template.jinja": "{{ 'é' }}".encode(),
        "generation_config.json": b'{"eos_token_id": [1, 2]}',
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    (folder / "notes.txt").write_text("stays")
    save_model(tmp_path / "out", *model, source=folder)
    for name, data in contents.items():
        assert (tmp_path / "out" / name).read_bytes() == data
    assert not (tmp_path / "out" / "notes.txt").exists()
    with pytest.raises(UserError, match="not a folder"):
        save_model(tmp_path / "other", *model, source=tmp_path / "absent")


def test_rows_beyond_the_tokenizer_are_kept(small_config, helpers, tmp_path):
    config = small_config.replace(vocab_size=128, lora=None)
    params = helpers.params(config)
    save_model(tmp_path / "out", config, params)
    assert load_model(tmp_path / "out")[1]["embed"]["embedding"].shape == (128, 32)


def test_a_folder_appears_whole_or_not_at_all(model, folder, tmp_path):
    config, params = model
    before = fingerprint(folder)
    with pytest.raises(UserError, match="not empty"):
        save_model(folder, config, params)
    broken = {**params, "final_norm": {"scale": params["final_norm"]["scale"].at[0].set(np.nan)}}
    for path in (folder, tmp_path / "new"):
        with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN"):
            save_model(path, config, broken, overwrite=True)
    assert fingerprint(folder) == before and not (tmp_path / "new").exists()
    changed = {**params, "final_norm": {"scale": params["final_norm"]["scale"] * 2}}
    save_model(folder, config, changed, overwrite=True)
    assert same(load_model(folder)[1], changed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]

    # A kill after the old folder was moved away and before the new one moved in loses nothing.
    shutil.move(folder, tmp_path / ".model.old.tmp")
    with pytest.raises(UserError, match="not empty"):
        save_model(folder, config, params)
    assert same(load_model(folder)[1], changed)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        save_model(tmp_path / "file", config, params, overwrite=True)


def test_overflow_in_the_type_of_the_file_is_refused(model, tmp_path):
    config, params = model
    big = {**params, "final_norm": {"scale": params["final_norm"]["scale"] * 1e6}}
    with pytest.raises(ValueError, match="float16"), np.errstate(over="ignore"):
        save_model(tmp_path / "out", config, big, dtype="float16")


def test_parameters_of_another_model_are_not_written(model, tmp_path):
    config, params = model
    with pytest.raises(ValueError, match="shape"):
        save_model(tmp_path / "out", config.replace(vocab_size=5), params)
    with pytest.raises(ValueError, match="lm_head/kernel"):
        save_model(tmp_path / "out", config.replace(tie_embeddings=True), params)


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder, **change):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def test_names_and_shapes_are_checked(folder):
    weights = folder / "model.safetensors"
    edit(weights, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"1 tensors are missing.*layers\.1\.mlp\.up_proj"):
        load_model(folder)
    edit(weights, lambda t: t.update({"model.layers.7.x": np.zeros(3, np.float32)}))
    with pytest.raises(UserError, match=r"unexpected, for instance model\.layers\.7\.x"):
        load_model(folder)


def test_shapes_are_checked(folder):
    edit_config(folder, vocab_size=100)
    with pytest.raises(UserError, match=r"has shape \(97, 32\), the config asks for \(100, 32\)"):
        load_model(folder)


def test_old_rotary_buffers_are_ignored(model, folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder / "model.safetensors", lambda t: t.update({name: np.zeros(8, np.float32)}))
    assert same(load_model(folder)[1], model[1])


def test_a_tied_model_with_an_output_matrix(small_config, helpers, tmp_path):
    config = small_config.replace(tie_embeddings=True, lora=None)
    save_model(tmp_path / "tied", config, helpers.params(config))
    weights = tmp_path / "tied" / "model.safetensors"
    edit(weights, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    load_model(tmp_path / "tied")
    edit(weights, lambda t: t.update({"lm_head.weight": 2 * t["lm_head.weight"]}))
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load_model(tmp_path / "tied")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_weights_that_are_not_finite_are_refused(folder, value, dtype):
    def spoil(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(dtype)
        tensors["model.norm.weight"][3] = value

    edit(folder / "model.safetensors", spoil)
    with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN or infinite"):
        load_model(folder)


def test_quantised_tensors_are_refused(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    edit(folder / "model.safetensors", lambda t: t.update({name: t[name].astype(np.int8)}))
    with pytest.raises(UserError, match="I8"):
        load_model(folder)


@pytest.mark.parametrize("damage", ["cut", "empty", "pickle", "header"])
def test_damaged_files_are_refused(sharded, damage):
    victim = sorted(sharded.glob("*.safetensors"))[1]
    data = victim.read_bytes()
    victim.write_bytes(
        {
            "cut": data[: len(data) // 2],
            "empty": b"",
            "pickle": b"\x80\x04\x95" + bytes(40),
            "header": struct.pack("<Q", 2**62) + data[8:],
        }[damage]
    )
    with pytest.raises(UserError, match=rf"{victim.name} is truncated or no safetensors"):
        load_model(sharded)


def change_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/x.safetensors", "a/b", "..\\x", 7])
def test_an_index_that_leaves_the_folder_is_refused(sharded, name):
    change_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(UserError, match="outside"):
        load_model(sharded)


def test_an_index_that_lies_is_refused(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    change_index(
        sharded, lambda index: index["weight_map"].update({"model.norm.weight": shards[0].name})
    )
    with pytest.raises(UserError, match=r"model\.norm\.weight is in .* but it is not there"):
        load_model(sharded)
    shards[1].unlink()
    with pytest.raises(UserError, match=f"{shards[1].name}, which is missing"):
        load_model(sharded)
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        load_model(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        load_model(sharded)


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled weights \(pytorch_model\.bin\)"):
        load_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="no weights"):
        load_model(folder)
    with pytest.raises(UserError, match="does not exist"):
        load_model(folder / "absent")


def test_fingerprints(model, folder, sharded, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text("{}")
    assert fingerprint(folder) == fingerprint(tmp_path / "copy") != fingerprint(sharded)
    params = load_model(sharded)[1]
    assert params_fingerprint(params) == params_fingerprint(model[1])
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert fingerprint(folder) != fingerprint(tmp_path / "copy")
    flipped = load_model(folder)[1]
    assert params_fingerprint(flipped) != params_fingerprint(params)
    before = fingerprint(tmp_path / "copy")
    edit_config(tmp_path / "copy", rms_norm_eps=1e-3)
    assert fingerprint(tmp_path / "copy") != before
    with pytest.raises(UserError, match=r"config\.json"):
        fingerprint(tmp_path / "absent")


def test_stories260k_round_trip(assets, tmp_path):
    folder = assets / "models" / "stories260K"
    config, params = load_model(folder)
    save_model(tmp_path / "out", config, params, source=folder)
    theirs, ours = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()
