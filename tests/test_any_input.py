"""Whatever a file holds, its reader gives a result or a ``UserError``."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxykd_jax.config import load_config
from proxykd_jax.errors import UserError
from proxykd_jax.models.hf_config import config_from_hf
from proxykd_jax.texts.chat_template import ChatTemplate
from proxykd_jax.texts.files import read_file

KEYS = (
    *("seed", "name", "preset", "method", "method.name", "runs_dir", "tokenizer", "corpus"),
    *("corpus.validation_fraction", "corpus.sources.0.path", "corpus.sources", "corpus.sources.0"),
    *("proxy", "proxy.lora", "student.init", "align", "align.optimizer.b1", "distill.stop"),
    *("evaluate.benchmarks", "export", "mesh.data", "logging", "collect", "corpus.end_tokens"),
)
CONFIG = """\
preset: recommended
name: one
corpus: {sources: [{path: rows.jsonl}]}
proxy: {path: large}
student: {path: little}
"""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)
TAGS = ["int", "float", "bool", "null", "str", "seq", "map", "set"]
SCALARS = st.one_of(
    st.text(max_size=12),
    st.text("0123456789_xXoObBeE.+-:", min_size=1, max_size=12),
    st.builds("!!{} {}".format, st.sampled_from(TAGS), st.text(max_size=6)),
    st.builds(json.dumps, JSON),
)
ATOMS = st.sampled_from(
    [
        *("messages", "m", "m.content", "m['role']", "loop.index", "bos_token", "none", "x"),
        *("7", "-3", "1.5", "'text'", "[]", "{}", "range(99)"),
    ]
)
OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or"]
FILTERS = [
    *("length", "upper", "trim", "join", "list", "tojson", "int", "float", "string"),
    *("first", "last", "sum", "round", "sort"),
]
ACCESSES = ["content", "strip()", "items()", "x", "y.z"]
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(OPERATORS), inner),
        st.builds("({}|{})".format, inner, st.sampled_from(FILTERS)),
        st.builds("{}.{}".format, inner, st.sampled_from(ACCESSES)),
        st.builds("{}[{}]".format, inner, inner | st.sampled_from(["::-1", ":2", "1:"])),
        st.builds("[{}, {}]".format, inner, inner),
    ),
    max_leaves=6,
)
TEMPLATES = st.recursive(
    st.builds("{{{{ {} }}}}".format, EXPRESSIONS) | st.text(max_size=6),
    lambda inner: st.one_of(
        st.builds("{{% for m in {} %}}{}{{% endfor %}}".format, EXPRESSIONS, inner),
        st.builds("{{% if {} %}}{}{{% else %}}{}{{% endif %}}".format, EXPRESSIONS, inner, inner),
        st.builds("{{% set x = {} %}}{}".format, EXPRESSIONS, inner),
        st.builds("{{% generation %}}{}{{% endgeneration %}}".format, inner),
        st.builds("{}{}".format, inner, inner),
    ),
    max_leaves=6,
)

cheap = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.txt"


@cheap
@given(key=st.sampled_from(KEYS), scalar=SCALARS)
def test_a_config_with_any_value(file, key, scalar):
    file.write_text(CONFIG, encoding="utf-8")
    with contextlib.suppress(UserError):
        load_config(file, [f"{key}={scalar}"])
    file.write_text(f"{CONFIG}{key}: {scalar}\n", encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(UserError):
        load_config(file)


@cheap
@given(data=st.binary(max_size=60))
def test_a_config_of_any_bytes(file, data):
    file.write_bytes(data)
    with pytest.raises(UserError):
        load_config(file)


@cheap
@given(
    data=st.binary(max_size=60)
    | st.lists(JSON, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    | JSON.map(lambda value: json.dumps(value).encode())
)
def test_rows_of_any_bytes(file, data):
    file.write_bytes(data)
    try:
        for record, origin in read_file(file):
            assert isinstance(record, dict)
            assert origin.startswith(str(file))
    except UserError:
        pass


@cheap
@given(changes=st.dictionaries(st.sampled_from((
    *("model_type", "architectures", "hidden_size", "num_attention_heads", "rope_scaling"),
    *("rope_theta", "eos_token_id", "tie_word_embeddings", "head_dim", "layer_types", "vocab_size"),
)), JSON, max_size=3))  # fmt: skip
def test_a_model_config_with_any_values(changes):
    good = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    with contextlib.suppress(UserError):
        config_from_hf({**good, **changes})


@cheap
@given(text=TEMPLATES)
def test_any_template(text):
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    try:
        template = ChatTemplate(text, {"bos_token": "<s>"})
        assert isinstance(template.render(messages, add_generation_prompt=False), str)
    except UserError:
        pass
