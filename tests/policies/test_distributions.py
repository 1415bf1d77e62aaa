from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from grpo_jax import spaces
from grpo_jax.policies.distributions import Categorical, Gaussian, for_space

SPACES = {
    "Discrete": spaces.Discrete(5),
    "MultiDiscrete": spaces.MultiDiscrete((2, 4, 3)),
    "MultiBinary": spaces.MultiBinary(3),
    "One": spaces.MultiDiscrete((4,)),
}
LOWEST, HIGHEST = np.float32(2.0**-24), np.float32(1 - 2.0**-24)
RNG = np.random.default_rng(0)


@pytest.fixture(params=SPACES)
def space(request):
    return SPACES[request.param]


def table(space, logits):
    """Probability of every action of the product space, by enumeration in float64: ``{action: p}``."""
    factors = np.split(np.asarray(logits, np.float64), np.cumsum(space.nvec)[:-1])
    factors = [np.exp(f - f.max()) / np.exp(f - f.max()).sum() for f in factors]
    choices = itertools.product(*(range(n) for n in space.nvec))
    return {c: float(np.prod([f[i] for f, i in zip(factors, c, strict=True)])) for c in choices}


def logits_of(space, seed=0, scale=1.5):
    size = sum(space.nvec)
    return np.random.default_rng(seed).normal(size=size).astype(np.float32) * np.float32(scale)


def test_for_space():
    assert for_space(spaces.Discrete(3)) == Categorical((3,), ())
    assert for_space(spaces.MultiDiscrete((3,))) == Categorical((3,), (1,))
    assert for_space(spaces.MultiBinary(2)) == Categorical((2, 2), (2,))
    assert for_space(spaces.Box(-1, 1, (2, 3))) == Gaussian((2, 3))


@pytest.mark.parametrize(
    ("name", "n_parameters", "n_uniforms", "n_actions"),
    [("Discrete", 5, 1, 5), ("MultiDiscrete", 9, 3, 24), ("MultiBinary", 6, 3, 8), ("One", 4, 1, 4)],
)
def test_sizes(name, n_parameters, n_uniforms, n_actions):
    d = for_space(SPACES[name])
    assert (d.n_parameters, d.n_uniforms, d.n_actions) == (n_parameters, n_uniforms, n_actions)


def test_actions_are_the_product_space_in_the_order_of_index(space, compiled):
    d = for_space(space)
    actions = d.actions()
    assert actions.dtype == np.int32
    expected = np.array(list(itertools.product(*(range(n) for n in space.nvec))))
    np.testing.assert_array_equal(actions, expected.reshape(d.n_actions, *space.shape))
    index = compiled(d.index)(jnp.asarray(actions))
    assert index.dtype == jnp.int32
    np.testing.assert_array_equal(index, np.arange(d.n_actions))


def test_categorical_log_prob_entropy_and_kl_by_enumeration(space, compiled):
    d = for_space(space)
    p_logits, q_logits = logits_of(space, 1), logits_of(space, 2)
    p, q = (np.array(list(table(space, logits).values())) for logits in (p_logits, q_logits))
    log_prob = compiled(d.log_prob)(jnp.asarray(p_logits), jnp.asarray(d.actions()))
    np.testing.assert_allclose(log_prob, np.log(p), rtol=1e-5)
    np.testing.assert_allclose(compiled(d.entropy)(p_logits), scipy.stats.entropy(p), rtol=1e-5)
    np.testing.assert_allclose(compiled(d.kl)(p_logits, q_logits), scipy.stats.entropy(p, q), rtol=1e-5)
    np.testing.assert_allclose(compiled(d.kl)(p_logits, p_logits), 0.0, atol=1e-6)


def test_categorical_batches(space):
    d = for_space(space)
    logits = np.stack([logits_of(space, seed) for seed in range(6)]).reshape(2, 3, -1)
    actions = d.actions()[RNG.integers(0, d.n_actions, (2, 3))]
    uniforms = RNG.random((2, 3, d.n_uniforms), np.float32)

    @jax.jit
    def everything(logits, other, action, uniforms):
        numbers = [d.log_prob(logits, action), d.entropy(logits), d.kl(logits, other)]
        return numbers, [d.sample(logits, uniforms), d.mode(logits)]

    numbers, choices = everything(logits, logits[::-1], actions, uniforms)
    for choice in choices:
        assert choice.shape == (2, 3, *space.shape)
        assert choice.dtype == jnp.int32
    for i, j in itertools.product(range(2), range(3)):
        expected = everything(logits[i, j], logits[1 - i, j], actions[i, j], uniforms[i, j])
        np.testing.assert_allclose([part[i, j] for part in numbers], expected[0], rtol=1e-5)
        np.testing.assert_array_equal([part[i, j] for part in choices], expected[1])


def test_mode_is_the_likeliest_action(space, compiled):
    d = for_space(space)
    logits = logits_of(space, 3)
    probabilities = table(space, logits)
    best = max(probabilities, key=probabilities.get)
    np.testing.assert_array_equal(np.ravel(compiled(d.mode)(logits)), best)


def test_categorical_frequencies_are_the_probabilities(space, compiled):
    d = for_space(space)
    logits, n = logits_of(space, 4, scale=0.7), 40_000
    uniforms = jax.random.uniform(jax.random.key(1), (n, d.n_uniforms), minval=LOWEST)
    index = d.index(compiled(d.sample)(logits, uniforms))
    observed = np.bincount(index, minlength=d.n_actions)
    expected = n * np.array(list(table(space, logits).values()))
    assert scipy.stats.chisquare(observed, expected * (n / expected.sum())).pvalue > 1e-3


def test_a_hand_written_quantile_table(compiled):
    d = Categorical((3,), ())
    logits = jnp.log(jnp.array([0.25, 0.5, 0.25]))
    uniforms = jnp.array([LOWEST, 0.2, 0.3, 0.7, 0.8, HIGHEST])[:, None]
    np.testing.assert_array_equal(compiled(d.sample)(logits, uniforms), [0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize("n", [2, 33])
def test_masked_actions_are_never_drawn(n, compiled):
    d = Categorical((n,), ())
    rng = np.random.default_rng(n)
    rows = 500
    logits = rng.normal(size=(rows, n)).astype(np.float32) * 3
    mask = rng.random((rows, n)) < 0.4
    mask[np.arange(rows), rng.integers(0, n, rows)] = True
    masked = compiled(d.apply_mask)(logits, mask)
    uniforms = np.concatenate([[LOWEST, HIGHEST, 0.5], rng.random(100)]).astype(np.float32)
    actions = compiled(d.sample)(masked, np.broadcast_to(uniforms[:, None, None], (len(uniforms), rows, 1)))
    assert mask[np.arange(rows), actions].all()
    assert mask[np.arange(rows), d.mode(masked)].all()
    probabilities = np.exp(d.log_prob(masked[:, None], jnp.arange(n)))
    assert np.all(probabilities[~mask] == 0.0)
    np.testing.assert_allclose(probabilities.sum(-1), 1.0, rtol=1e-5)
    left = np.where(mask, logits, -np.inf)
    np.testing.assert_allclose(
        d.entropy(masked), scipy.stats.entropy(np.exp(left), axis=1), rtol=1e-4, atol=1e-5
    )
    # The same states again, as they are in a minibatch: the KL to itself is 0, and nothing is NaN.
    np.testing.assert_allclose(d.kl(masked, masked), 0.0, atol=1e-5)


def test_masks_of_several_factors():
    d = Categorical((2, 3), (2,))
    masked = d.apply_mask(jnp.zeros(5), jnp.array([False, True, True, False, True]))
    uniforms = jnp.array(list(itertools.product([LOWEST, 0.3, 0.6, HIGHEST], repeat=2)))
    actions = {tuple(action) for action in np.asarray(d.sample(masked, uniforms)).tolist()}
    assert actions == {(1, 0), (1, 2)}
    np.testing.assert_allclose(d.entropy(masked), np.log(2.0), rtol=1e-6)


def test_a_mask_of_a_wrong_size_is_refused():
    with pytest.raises(AssertionError):
        Categorical((3,), ()).apply_mask(jnp.zeros(3), jnp.ones(2, bool))
    with pytest.raises(AssertionError):
        Categorical((3,), ()).entropy(jnp.zeros(4))


def test_extreme_logits_give_finite_values_and_gradients(compiled):
    d = Categorical((3,), ())
    other = jnp.array([0.0, 1e4, -1e4])

    def everything(logits, other):
        log_probs = d.log_prob(logits, jnp.arange(3))
        return jnp.sum(jnp.exp(log_probs) * log_probs) + d.entropy(logits) + d.kl(logits, other)

    with_gradients = compiled(jax.value_and_grad(everything, argnums=(0, 1)))
    for logits in ([1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, -1e4], [-1e9, -1e9, 3.0]):
        value, gradients = with_gradients(jnp.array(logits), other)
        assert np.isfinite(value), logits
        assert np.all(np.isfinite(gradients)), logits
        assert 0 <= float(d.entropy(jnp.array(logits))) <= np.log(3) + 1e-6


def test_the_gradient_of_log_prob_is_one_hot_minus_probabilities(compiled):
    d = Categorical((4,), ())
    logits = jnp.array([0.1, -0.7, 1.3, 0.4])
    gradient = compiled(jax.grad(lambda logits: d.log_prob(logits, jnp.int32(2))))(logits)
    p = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(gradient, np.eye(4)[2] - p, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1,), (2, 2)])
def test_gaussian_against_scipy(shape, compiled):
    d = Gaussian(shape)
    size = int(np.prod(shape))
    assert (d.n_uniforms, d.n_parameters) == (size, 2 * size)
    rng = np.random.default_rng(size)
    p, q = (rng.normal(size=(5, 2 * size)).astype(np.float32) * 0.7 for _ in range(2))
    (mean, log_std), (other_mean, other_log_std) = (np.split(np.float64(x), 2, axis=-1) for x in (p, q))
    action = rng.normal(size=(5, *shape)).astype(np.float32)
    normal = scipy.stats.norm(mean, np.exp(log_std))
    expected = normal.logpdf(action.reshape(5, size)).sum(-1)
    np.testing.assert_allclose(compiled(d.log_prob)(p, action), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(compiled(d.entropy)(p), normal.entropy().sum(-1), rtol=1e-5, atol=1e-6)
    # KL as a cross entropy, integrated by Gauss-Hermite quadrature (exact for polynomials).
    nodes, weights = np.polynomial.hermite_e.hermegauss(10)
    x = mean[..., None] + np.exp(log_std)[..., None] * nodes
    cross = scipy.stats.norm(other_mean[..., None], np.exp(other_log_std)[..., None]).logpdf(x)
    kl = -(normal.entropy() + (cross * weights).sum(-1) / weights.sum()).sum(-1)
    np.testing.assert_allclose(compiled(d.kl)(p, q), kl, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(compiled(d.kl)(p, p), 0.0, atol=1e-6)
    np.testing.assert_array_equal(compiled(d.mode)(p), p[:, :size].reshape(5, *shape))


def test_gaussian_samples_have_the_moments_and_the_shape(compiled):
    d = Gaussian((2, 1))
    parameters = jnp.array([1.0, -2.0, np.log(0.5), np.log(3.0)])
    uniforms = jax.random.uniform(jax.random.key(2), (40_000, 2), minval=LOWEST)
    samples = compiled(d.sample)(parameters, uniforms)
    assert samples.shape == (40_000, 2, 1)
    flat = np.asarray(samples)[..., 0]
    for column, mean, std in ((0, 1.0, 0.5), (1, -2.0, 3.0)):
        assert scipy.stats.kstest(flat[:, column], scipy.stats.norm(mean, std).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(flat.T)[0, 1]) < 0.02


def test_gaussian_quantiles(compiled):
    d = Gaussian((1,))
    uniforms = jnp.array([LOWEST, 0.1586553, 0.5, 0.8413447, HIGHEST])[:, None]
    samples = compiled(d.sample)(jnp.array([10.0, np.log(2.0)]), uniforms)[:, 0]
    assert np.all(np.isfinite(samples))
    np.testing.assert_allclose(samples[1:4], [8.0, 10.0, 12.0], rtol=1e-5)
    np.testing.assert_allclose(samples[0] + samples[4], 20.0, rtol=1e-5)
    assert samples[0] < 10 - 2 * 5.2


@pytest.mark.parametrize(
    "space",
    [spaces.Discrete(4), spaces.MultiDiscrete((3, 2)), spaces.Box(-1, 1, (2,))],
    ids=lambda s: type(s).__name__,
)
def test_equal_uniforms_couple_equal_policies_and_nearly_couple_similar_ones(space):
    d = for_space(space)
    rng = np.random.default_rng(7)
    parameters = rng.normal(size=d.n_parameters).astype(np.float32)
    uniforms = rng.random((2000, d.n_uniforms), np.float32)
    first = np.asarray(d.sample(parameters, uniforms))
    np.testing.assert_array_equal(
        first, d.sample(np.broadcast_to(parameters, (2000, d.n_parameters)), uniforms)
    )
    close = np.asarray(d.sample(parameters + np.float32(0.01) * (np.arange(d.n_parameters) % 2), uniforms))
    different = np.abs(first - close).reshape(2000, -1).max(-1)
    assert different.max() > 0
    assert (different > 0.2).mean() < 0.02


def test_distributions_are_static_under_jit():
    traces = []
    entropy = jax.jit(lambda d, x: (traces.append(d), d.entropy(x))[1], static_argnums=0)
    for _ in range(2):
        entropy(for_space(spaces.Discrete(3)), jnp.zeros(3))
        entropy(for_space(spaces.Box(-1, 1, (2,))), jnp.zeros(4))
    assert len(traces) == 2
