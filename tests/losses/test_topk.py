"""Top-k KL: values and gradients of the four tails, compared with a reference and the full KL."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from proxykd_jax.losses import (
    TAILS,
    forward_kl,
    topk_and_label_logps,
    topk_kl,
    topk_kl_tokens,
    topk_logps,
    weighted_kl,
)


def tokens_of(student, logps, ids, mask=None, *, proxy_tail=None, **options):
    """`topk_kl_tokens` as a function of the student's logits."""
    return topk_kl_tokens(topk_logps(student, ids, mask), (logps, proxy_tail), mask, **options)


def kl_of(student, logps, ids, mask, *, proxy_tail=None, **options):
    """`topk_kl` as a function of the student's logits."""
    return topk_kl(topk_logps(student, ids, mask), (logps, proxy_tail), mask, **options)


every_tail = pytest.mark.parametrize("tail", TAILS)


def batch(seed=0, *, top_k=3, vocab=8, scale=2.0):
    """Student logits, proxy logits, the proxy's top-k log-probs and ids, log tail mass, mask."""
    rng = np.random.default_rng(seed)
    proxy, student = rng.normal(scale=scale, size=(2, 3, 4, vocab))
    ids = np.argsort(-proxy, axis=-1)[..., :top_k]
    logps = np.take_along_axis(reference.log_softmax(proxy), ids, -1)
    outside = 1 - np.exp(logps).sum(-1)
    tail = np.log(np.maximum(outside, 1e-300))
    mask = np.array([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
    return student, proxy, logps, ids, tail, mask


def expected_positions(student, proxy, ids, tail):
    return np.array([
        [reference.topk_kl(student[b, t], proxy[b, t], ids[b, t], tail) for t in range(4)]
        for b in range(3)
    ])  # fmt: skip


@every_tail
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("stored_tail", [True, False])
def test_matches_reference(tail, reduction, stored_tail):
    student, proxy, logps, ids, tail_logps, mask = batch()
    positions = expected_positions(student, proxy, ids, tail)
    function = functools.partial(kl_of, tail=tail, reduction=reduction)
    kwargs = {"proxy_tail": tail_logps} if stored_tail else {}
    got = jax.jit(function)(student, logps, ids, mask, **kwargs)
    assert got.dtype == jnp.float32 and got.shape == (3,)
    expected = reference.per_example(positions, mask, reduction)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    weight = np.array([0.3, 0.0, 2.0])
    weighted = weighted_kl(got, weight)
    np.testing.assert_allclose(weighted, expected * weight, rtol=1e-5, atol=1e-6)


@every_tail
def test_ids_of_any_integer_type_and_bfloat16(tail):
    student, _, logps, ids, _, mask = batch(1)
    student = jnp.asarray(student, jnp.bfloat16)
    want = kl_of(student.astype(jnp.float32), logps, ids, mask, tail=tail)
    got = kl_of(student, logps, ids.astype(np.uint16), mask.astype(bool), tail=tail)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, want)


@every_tail
@pytest.mark.parametrize("seed", range(3))
def test_all_tails_are_the_full_kl_at_the_whole_vocabulary(tail, seed):
    student, proxy, logps, ids, _, mask = batch(seed, top_k=8, scale=4.0)

    def both(function, *args, **kwargs):
        return jax.value_and_grad(lambda s: function(s, *args, **kwargs).sum())(
            jnp.float32(student)
        )

    nothing = np.full(ids.shape[:-1], -np.inf)
    value, grad = both(kl_of, logps, ids, mask, tail=tail, proxy_tail=nothing)
    full, full_grad = both(lambda s: forward_kl(proxy, s, mask))
    np.testing.assert_allclose(value, full, rtol=2e-6)
    np.testing.assert_allclose(grad, full_grad, atol=1e-6)


@every_tail
def test_gradient_matches_the_formula(tail):
    student, proxy, logps, ids, tail_logps, _ = batch(2)
    grad = jax.grad(lambda s: tokens_of(s, logps, ids, tail=tail, proxy_tail=tail_logps).sum())(
        jnp.float32(student)
    )
    for b in range(3):
        for t in range(4):
            expected = reference.topk_gradient(student[b, t], proxy[b, t], ids[b, t], tail)
            np.testing.assert_allclose(grad[b, t], expected, atol=1e-6)


def test_tails_differ_outside_the_ids():
    """bucket knows the mass of the tail, renormalize ignores it, the other two push it to 0."""
    student, proxy, logps, ids, tail_logps, _ = batch(3)
    hit = np.zeros(student.shape, bool)
    np.put_along_axis(hit, ids, True, -1)
    grads = {
        tail: np.asarray(
            jax.grad(
                lambda s, tail=tail: tokens_of(
                    s, logps, ids, tail=tail, proxy_tail=tail_logps
                ).sum()
            )(jnp.float32(student))
        )
        for tail in TAILS
    }
    np.testing.assert_allclose(grads["renormalize"][~hit], 0, atol=1e-7)
    # The loss uses the ids alone, so the difference above is the rounding of the full softmax.
    blind = jax.grad(
        lambda s: topk_kl_tokens(
            (jnp.take_along_axis(s, ids, -1), None), (logps, None), tail="renormalize"
        ).sum()
    )(jnp.float32(student))
    assert (np.asarray(blind)[~hit] == 0).all()
    np.testing.assert_allclose(blind, grads["renormalize"], atol=1e-6)
    for tail in ("zero", "renormalize_proxy"):
        assert (grads[tail][~hit] > 0).all()
    # If student and proxy are equal, the gradient of bucket is zero, also outside the ids.
    at_proxy = jax.grad(lambda s: tokens_of(s, logps, ids, proxy_tail=tail_logps).sum())(
        jnp.float32(proxy)
    )
    np.testing.assert_allclose(at_proxy, 0, atol=3e-7)
    for tail in ("zero", "renormalize_proxy"):
        elsewhere = jax.grad(lambda s, t=tail: tokens_of(s, logps, ids, tail=t).sum())(
            jnp.float32(proxy)
        )
        assert np.abs(elsewhere).max() > 0.01


def test_zero_points_where_renormalize_proxy_does():
    student, _, logps, ids, _, _ = batch(4)

    def grad(tail):
        return jax.grad(lambda s: tokens_of(s, logps, ids, tail=tail).sum())(jnp.float32(student))

    kept = np.exp(logps).sum(-1, keepdims=True)
    np.testing.assert_allclose(grad("zero"), kept * grad("renormalize_proxy"), atol=1e-6)


def test_zero_can_be_negative_and_bucket_cannot():
    student = jnp.array([[[3.0, 0.0, 0.0, 0.0]]])
    logps = jnp.log(jnp.array([[[0.4]]]))
    ids = jnp.array([[[0]]])
    assert tokens_of(student, logps, ids, tail="zero")[0, 0] < 0
    for seed in range(5):
        student, _, logps, ids, tail_logps, _ = batch(seed)
        assert (tokens_of(student, logps, ids, proxy_tail=tail_logps) > -1e-6).all()


def test_bucket_is_nearest_to_the_full_gradient():
    student, proxy, logps, ids, tail_logps, mask = batch(5, top_k=3, vocab=32, scale=1.0)
    ones = np.ones_like(mask)

    def cosine(tail):
        stored = tail_logps if tail == "bucket" else None
        a = jax.grad(lambda s: kl_of(s, logps, ids, ones, tail=tail, proxy_tail=stored).sum())(
            jnp.float32(student)
        )
        b = jax.grad(lambda s: forward_kl(proxy, s, ones).sum())(jnp.float32(student))
        return (a * b).sum() / jnp.sqrt((a * a).sum() * (b * b).sum())

    cosines = {tail: float(cosine(tail)) for tail in TAILS}
    assert max(cosines, key=cosines.__getitem__) == "bucket"


def test_dropping_the_tail_moves_the_optimum():
    """p = [.5 .3 .1 .06 .04]: dropping the tail pulls the student to [.625 .375 0 0 0]."""
    p = np.array([0.5, 0.3, 0.1, 0.06, 0.04])
    q_logits = jnp.array([[[2, 1.5, 0, -1, -2]]], jnp.float32)
    q = np.exp(reference.log_softmax(q_logits))[0, 0]
    full = jax.grad(
        lambda s: tokens_of(s, np.log(p)[None, None], np.arange(5)[None, None], tail="zero").sum()
    )(q_logits)
    np.testing.assert_allclose(
        full[0, 0], [0.052495757, 0.035105616, -0.025227830, -0.032492856, -0.029880687], atol=1e-7
    )  # fmt: skip
    top2 = np.log(p[:2])[None, None]
    cut = jax.grad(lambda s: tokens_of(s, top2, np.arange(2)[None, None], tail="zero").sum())(
        q_logits
    )
    np.testing.assert_allclose(cut[0, 0] / 0.8, q - [0.625, 0.375, 0, 0, 0], atol=1e-6)


@every_tail
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_leaks_through_the_mask(tail, bad):
    student, _, logps, ids, tail_logps, mask = batch(6)
    inside = mask != 0

    def run(s, p, i, t):
        return jax.value_and_grad(lambda x: kl_of(x, p, i, mask, tail=tail, proxy_tail=t).sum())(
            jnp.float32(s)
        )

    value, grad = run(
        np.where(inside[..., None], student, bad),
        np.where(inside[..., None], logps, bad),
        np.where(inside[..., None], ids, 10**6),
        np.where(inside, tail_logps, bad),
    )
    clean_value, clean_grad = run(student, logps, ids, tail_logps)
    assert value == clean_value
    np.testing.assert_array_equal(grad, clean_grad)
    assert (np.asarray(grad)[~inside] == 0).all()


@every_tail
def test_empty_mask(tail):
    student, _, logps, ids, _, mask = batch(7)
    value, grad = jax.value_and_grad(lambda s: kl_of(s, logps, ids, 0 * mask, tail=tail).sum())(
        jnp.float32(student)
    )
    assert value == 0 and (np.asarray(grad) == 0).all()


EDGES = {
    "an impossible stored token": ([0.0, 1, 2, 0, 0], [-0.1, -np.inf]),
    "all mass kept": ([0.0, 1, 2, 0, 0], [np.log(0.75), np.log(0.25)]),
    "rounded above one": ([0.0, 1, 2, 0, 0], [np.log(0.75) + 1e-3, np.log(0.25)]),
    "a certain proxy": ([0.0, 1, 2, 0, 0], [0.0, -np.inf]),
    "nothing stored": ([0.0, 1, 2, 0, 0], [-np.inf, -np.inf]),
    "the student excludes a stored token": ([-np.inf, 1, 2, 0, 0], [-1.0, -2.0]),
    "the student excludes all stored": ([-np.inf, -np.inf, 2, 0, 0], [-1.0, -2.0]),
    "the student excludes the tail": ([1.0, 2, -np.inf, -np.inf, -np.inf], [-1.0, -2.0]),
    "a certain student": ([500.0, 0, 0, 0, 0], [-1.0, -2.0]),
    "a student certain of the tail": ([0.0, 0, 500, 0, 0], [-1.0, -2.0]),
}


@every_tail
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("from_logps", [False, True])
def test_gradients_are_finite_at_the_edges(tail, edge, from_logps):
    student, logps = (jnp.array([[x]], jnp.float32) for x in EDGES[edge])
    ids = jnp.array([[[0, 1]]])

    def loss(s, p):
        if not from_logps:
            return tokens_of(s, p, ids, tail=tail).sum()
        return topk_kl_tokens((jax.nn.log_softmax(s)[..., :2], None), (p, None), tail=tail).sum()

    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(student, logps)
    assert not np.isnan(value)
    for grad in grads:
        assert np.isfinite(grad).all()
    if "excludes" not in edge:
        assert np.isfinite(value)


def test_a_confident_student_keeps_the_gradient_of_its_tail():
    """At a tail of e-20 the form 1 - sum q has no correct digit; the sum over the tail has all."""
    student = np.array([[[20.0, 1, 0, 0.5, -1]]])
    proxy = np.log(np.array([0.7, 0.2, 0.05, 0.03, 0.02]))
    logps, ids = proxy[None, None, :2], np.array([[[0, 1]]])
    grad = jax.grad(lambda s: tokens_of(s, logps, ids, proxy_tail=np.log([[0.1]])).sum())(
        jnp.float32(student)
    )
    expected = reference.topk_gradient(student[0, 0], proxy, [0, 1], "bucket")
    np.testing.assert_allclose(grad[0, 0], expected, atol=1e-6)


def test_the_students_tail_may_be_left_out():
    student, _, logps, ids, tail_logps, _ = batch(8, scale=1.0)
    want = tokens_of(student, logps, ids, proxy_tail=tail_logps)
    guessed = topk_kl_tokens((topk_logps(student, ids)[0], None), (logps, tail_logps))
    np.testing.assert_allclose(guessed, want, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_packed_rows_give_one_value_a_segment(reduction):
    student, _, logps, ids, tail_logps, _ = batch(11)
    segments = np.array([[1, 1, 2, 0], [1, 2, 2, 2], [1, 1, 1, 1]])
    mask = np.array([[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 1]])
    got = kl_of(
        student,
        logps,
        ids,
        mask,
        proxy_tail=tail_logps,
        reduction=reduction,
        segment_ids_BL=segments,
        num_segments=2,
    )
    alone = [
        kl_of(student, logps, ids, mask * (segments == s), proxy_tail=tail_logps,
              reduction=reduction)
        for s in (1, 2)
    ]  # fmt: skip
    np.testing.assert_allclose(got, np.stack(alone, axis=1), rtol=1e-6)
    weight = np.array([[0.3, 2.0], [1.0, 0.0], [0.5, 0.7]])
    np.testing.assert_allclose(weighted_kl(got, weight), got * weight, rtol=1e-6)


def test_topk_logps():
    student, _, _, ids, _, _ = batch(9)
    logps, tail = topk_logps(student, ids)
    expected = np.take_along_axis(reference.log_softmax(student), ids, -1)
    np.testing.assert_allclose(logps, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tail, np.log(1 - np.exp(expected).sum(-1)), rtol=1e-4)


def plain_logps(logits, ids, labels):
    """The definitions, which JAX differentiates; an id that occurs twice counts once."""
    logps = jax.nn.log_softmax(logits)
    numbers = jnp.arange(logits.shape[-1])[None, None, None, :]
    outside = (ids[..., None] != numbers).all(axis=-2)
    tail = jax.nn.logsumexp(jnp.where(outside, logps, -jnp.inf), axis=-1)
    return (
        jnp.take_along_axis(logps, ids, axis=-1),
        tail,
        jnp.take_along_axis(logps, labels[..., None], axis=-1)[..., 0],
    )


@pytest.mark.parametrize("scale", [0.5, 8.0])
@pytest.mark.parametrize("twice", [False, True])
def test_topk_and_label_logps_have_the_gradient_of_their_definitions(scale, twice):
    """Labels lie among the ids and outside them, and some tails are almost empty."""
    rng = np.random.default_rng(12)
    logits = jnp.float32(scale * rng.normal(size=(3, 5, 19)))
    ids = jnp.argsort(-logits, axis=-1)[..., :4].astype(jnp.int32)
    if twice:
        ids = ids.at[:, 1, 3].set(ids[:, 1, 0])
    labels = jnp.where(jnp.arange(5)[None, :] < 2, ids[..., 2], jnp.argmin(logits, axis=-1))
    cotangents = [
        jnp.float32(rng.normal(size=shape)) for shape in (ids.shape, labels.shape, labels.shape)
    ]
    out, back = jax.vjp(lambda x: topk_and_label_logps(x, ids, labels), logits)
    expected, of_plain = jax.vjp(lambda x: plain_logps(x, ids, labels), logits)
    for found, value in zip(out, expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5)
    grad, wanted = back(tuple(cotangents))[0], of_plain(tuple(cotangents))[0]
    np.testing.assert_allclose(grad, wanted, rtol=1e-5, atol=2e-6)
    # Each output alone has the right gradient.
    alone, back = jax.vjp(lambda x: topk_logps(x, ids), logits)
    np.testing.assert_array_equal(alone[0], out[0])
    zeros = jnp.zeros_like(cotangents[2])
    np.testing.assert_allclose(
        back(tuple(cotangents[:2]))[0],
        of_plain((*cotangents[:2], zeros))[0],
        rtol=1e-5,
        atol=2e-6,
    )


def test_a_label_outside_the_vocabulary_spoils_itself_alone():
    logits = jnp.float32(np.random.default_rng(13).normal(size=(1, 3, 7)))
    ids, labels = jnp.array([[[0, 1]] * 3]), jnp.array([[-1, 2, 7]])

    def masked(logits):
        _, tail, of_labels = topk_and_label_logps(logits, ids, labels)
        return tail.sum() + jnp.where(jnp.isnan(of_labels), 0.0, of_labels).sum()

    of_labels = topk_and_label_logps(logits, ids, labels)[2]
    assert np.isnan(of_labels[0, jnp.array([0, 2])]).all() and np.isfinite(of_labels[0, 1])
    assert np.isfinite(jax.grad(masked)(logits)).all()


def test_weight_zero_takes_an_infinite_example_out():
    student = jnp.array([[[-jnp.inf, 0.0, 1.0]], [[0.0, 0.0, 1.0]]])
    logps, ids = jnp.full((2, 1, 1), -0.5), jnp.zeros((2, 1, 1), jnp.int32)
    value, grad = jax.value_and_grad(
        lambda s: weighted_kl(kl_of(s, logps, ids, jnp.ones((2, 1))), jnp.array([0.0, 1.0])).sum()
    )(student)
    assert np.isfinite(value) and np.isfinite(grad).all() and (grad[0] == 0).all()


def test_mistakes_are_refused():
    student, _, logps, ids, _, mask = batch()
    with pytest.raises(ValueError, match="bucket, renormalize, renormalize_proxy, zero"):
        kl_of(student, logps, ids, mask, tail="drop")
    with pytest.raises(AssertionError):
        kl_of(student, logps, ids[..., :2], mask)
    with pytest.raises(AssertionError):
        kl_of(student[:, :2], logps, ids, mask)
    with pytest.raises(AssertionError):
        weighted_kl(kl_of(student, logps, ids, mask), np.ones(2))


def test_vmap_over_a_leading_axis():
    student, _, logps, ids, _, mask = batch(10)
    stacked = jax.vmap(kl_of)(student[:, None], logps[:, None], ids[:, None], mask[:, None])
    np.testing.assert_allclose(stacked[:, 0], kl_of(student, logps, ids, mask), rtol=1e-6)
