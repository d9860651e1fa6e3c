"""The hand-written codec against protobuf's own."""

import numpy as np
import pytest

from proxykd_jax.data.example_codec import (
    decode_example,
    decode_varints,
    encode_example,
    encode_varints,
)


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
@pytest.mark.parametrize("largest", [1, 127, 128, 16383, 16384, 200_000, 2**31 - 1, 2**62])
def test_varints_round_trip(count, largest):
    values = np.random.default_rng(count).integers(0, largest, count, endpoint=True)
    np.testing.assert_array_equal(decode_varints(encode_varints(values)), values)


def test_agrees_with_protobuf():
    import tensorflow as tf
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "prompt_length": tfds.features.Scalar(np.int32),
            "row_id": tfds.features.Text(),
        }
    )
    for tokens in ([1], [0, 127, 128, 70_000, 3], list(range(1000))):
        theirs = features.serialize_example(
            {"tokens": tokens, "prompt_length": 300, "row_id": "ab" * 32}
        )
        ours = encode_example(
            {
                "tokens": np.array(tokens, np.int32),
                "prompt_length": np.array([300]),
                "row_id": b"ab" * 32,
            }
        )
        # Protobuf does not promise an order of the entries; ours are sorted.
        assert tf.train.Example.FromString(ours) == tf.train.Example.FromString(theirs)
        assert len(ours) == len(theirs)
        decoded = decode_example(theirs)
        np.testing.assert_array_equal(decoded["tokens"], tokens)
        np.testing.assert_array_equal(decoded["prompt_length"], [300])
        assert decoded["row_id"] == b"ab" * 32


def test_damaged_bytes_are_an_error():
    data = encode_example({"tokens": np.arange(300), "row_id": b"x"})
    for cut in range(len(data)):
        with pytest.raises(ValueError):
            decode_example(data[:cut])
