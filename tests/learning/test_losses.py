"""Surrogates, KL estimates and value loss against numbers computed by hand; and their extremes."""

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular

from grpo_jax import config
from grpo_jax.groups import advantage
from grpo_jax.learning import losses

jit_or_not = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])

# Four candidates of weight 1/4 with ratios 1/2, 3/2, 1/2, 3/2, and one state more whose ratios are all 1.
RATIO = np.array([[0.5, 1.5, 0.5, 1.5], [1.0, 1.0, 1.0, 1.0]])
OLD = np.log([[0.4, 0.2, 0.4, 0.2], [0.1, 0.2, 0.3, 0.4]])
NEW = OLD + np.log(RATIO)
WEIGHT = np.full((2, 4), np.log(0.25))
ADVANTAGE = np.array([[1.0, 1.0, -1.0, -1.0], [2.0, -2.0, 0.0, 1.0]])
ARGS = (NEW, OLD, WEIGHT, ADVANTAGE)


def surrogate(function, **coefficients):
    """The surrogate as a function of arrays: ``(log_prob, old_log_prob, log_weight, advantage, valid) -> [B, G]``."""
    return lambda *arrays: function(losses.Terms(*arrays, **coefficients))


SAME = [0.5, -0.5, 0.0, 0.25]  # the second state: A / 4 whatever the clipping


@jit_or_not
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"clip_low": 1e9, "clip_high": 1e9}, [0.5, 1.5, -0.5, -1.5]),
        # A > 0: min(rho, 1.3); A < 0: -max(rho, 0.8).
        ({"clip_low": 0.2, "clip_high": 0.3}, [0.5, 1.3, -0.8, -1.5]),
        ({"clip_low": 0.6, "clip_high": 0.1}, [0.5, 1.1, -0.5, -1.5]),
        ({"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 1.25}, [0.5, 1.3, -0.8, -1.25]),
        ({"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0}, [0.5, 1.3, -0.8, -1.5]),
    ],
)
def test_ppo(settings, expected, wrap):
    terms = wrap(surrogate(losses.ppo, **settings))(*ARGS)
    np.testing.assert_allclose(terms, [np.array(expected) / 4, SAME], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"clip_low": 0.2, "clip_high": 0.3}, [0.5, 0.0, 0.0, -1.5]),
        ({"clip_low": 0.6, "clip_high": 0.6}, [0.5, 1.5, -0.5, -1.5]),
        ({"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 1.25}, [0.5, 0.0, 0.0, 0.0]),
    ],
)
def test_ppo_gradient(settings, expected):
    """rho A where nothing is clipped, else nothing."""
    gradient = jax.grad(lambda log_prob: jnp.sum(surrogate(losses.ppo, **settings)(log_prob, *ARGS[1:])))(
        jnp.asarray(NEW)
    )
    np.testing.assert_allclose(gradient, [np.array(expected) / 4, SAME], rtol=1e-5, atol=1e-7)


@jit_or_not
def test_cispo(wrap):
    """min(rho, 1.3) A log pi with a constant weight: the gradient is min(rho, 1.3) A for every candidate."""
    function = surrogate(losses.cispo, clip_high=0.3)
    weight = np.array([[0.5, 1.3, -0.5, -1.3], [2.0, -2.0, 0.0, 1.0]]) / 4
    np.testing.assert_allclose(wrap(function)(*ARGS), weight * NEW, rtol=1e-5, atol=1e-7)
    gradient = wrap(jax.grad(lambda log_prob: jnp.sum(function(log_prob, *ARGS[1:]))))(jnp.asarray(NEW))
    np.testing.assert_allclose(gradient, weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weights", ["enumerated", "sampled"])
def test_cispo_lets_go_of_a_bad_candidate(weights):
    """What pushes a bad candidate down fades with its probability, whatever the clip range."""
    old = np.log(np.full((1, 3), 1 / 3))
    new = np.array([[-20.0, np.log(0.5), np.log(0.5)]])
    weight = old if weights == "enumerated" else np.zeros((1, 3))
    advantage = np.array([[-1.0, 0.5, 0.5]])
    gradient = jax.grad(lambda log_prob: jnp.sum(surrogate(losses.cispo)(log_prob, old, weight, advantage)))(
        jnp.asarray(new)
    )
    assert -1e-7 < gradient[0, 0] < 0 < gradient[0, 1]


@jit_or_not
def test_sapo(wrap):
    """sigmoid(1/2) = 0.62245933, sigmoid(-1/2) = 0.37754067; with tau 2: sigmoid(1) = 0.73105858."""
    function = surrogate(losses.sapo, sapo_temperature=1.0, sapo_temperature_negative=2.0)
    terms = wrap(function)(*ARGS)
    expected = [4 * 0.37754067, 4 * 0.62245933, -2 * 0.26894142, -2 * 0.73105858]
    # At ratio 1: (4 / tau) / 2 A.
    np.testing.assert_allclose(terms, np.array([expected, [4.0, -2.0, 0.0, 2.0]]) / 4, rtol=1e-5, atol=1e-7)
    gradient = wrap(jax.grad(lambda log_prob: jnp.sum(function(log_prob, *ARGS[1:]))))(jnp.asarray(NEW))
    # rho 4 s (1 - s) A: A itself at ratio 1, less on either side.
    gates = [0.5 * 4 * 0.23500371, 1.5 * 4 * 0.23500371, -0.5 * 4 * 0.19661193, -1.5 * 4 * 0.19661193]
    np.testing.assert_allclose(gradient, [np.array(gates) / 4, SAME], rtol=1e-5, atol=1e-7)


@jit_or_not
def test_tpo(wrap):
    """pi_old (1/2, 1/4, 1/4), A (ln 2, 0, ln 4), tau 1: q ~ (1, 1/4, 1); the third is forbidden: q = (4/5, 1/5, 0)."""
    old = np.log([[0.5, 0.25, 0.25]])
    new = np.log([[0.2, 0.2, 0.6]])
    advantage = np.log([[2.0, 1.0, 4.0]])
    valid = np.array([[True, True, True]])
    function = wrap(surrogate(losses.tpo))
    terms = function(new, old, old, advantage, valid)
    q = np.array([4, 1, 4]) / 9
    np.testing.assert_allclose(terms, [q * np.log([0.2, 0.2, 0.6])], rtol=1e-5)
    terms = function(new, old, old, advantage, np.array([[True, True, False]]))
    np.testing.assert_allclose(terms, [[0.8 * np.log(0.5), 0.2 * np.log(0.5), 0.0]], rtol=1e-5)
    # tau 1/2 squares exp(A): q ~ (2, 1/4, 4).
    terms = wrap(surrogate(losses.tpo, tpo_temperature=0.5))(new, old, old, advantage, valid)
    np.testing.assert_allclose(terms, [np.array([8, 1, 16]) / 25 * np.log([0.2, 0.2, 0.6])], rtol=1e-5)


def test_tpo_gradient_on_logits_is_p_minus_q():
    rng = np.random.default_rng(0)
    logits, old_logits, advantage = rng.normal(size=(3, 2, 5))
    old = jax.nn.log_softmax(old_logits)

    def negative(logits):
        return -jnp.sum(
            surrogate(losses.tpo, tpo_temperature=0.7)(jax.nn.log_softmax(logits), old, old, advantage)
        )

    q = tabular.softmax(old_logits + advantage / 0.7)
    np.testing.assert_allclose(
        jax.grad(negative)(jnp.asarray(logits)), tabular.softmax(logits) - q, atol=1e-6
    )


@jit_or_not
def test_mass(wrap):
    np.testing.assert_allclose(wrap(losses.mass)(NEW, OLD, WEIGHT), RATIO / 4, rtol=1e-5)
    # Enumerated: the weight is pi_old, and the mass pi itself, however small pi_old is.
    np.testing.assert_allclose(wrap(losses.mass)(NEW, OLD, OLD), np.exp(NEW), rtol=1e-5)
    tiny = np.full((1, 1), -1e6)
    np.testing.assert_allclose(wrap(losses.mass)(np.log([[0.9]]), tiny, tiny), [[0.9]], rtol=0.1)


def estimated_kl(name, log_prob, reference_log_prob, log_weight):
    """An estimate of KL(pi || pi_ref) ``[B]`` where all candidates are valid."""
    valid = jnp.ones(log_prob.shape, bool)
    return losses.KL_ESTIMATORS[name](losses.Divergence(log_prob, reference_log_prob, log_weight, valid))


@jit_or_not
def test_kl_estimates(wrap):
    """Groups of one: pi = 1/2 (twice), pi_ref = 1/4 and 1: log ratios -ln 2 and ln 2. Then both as one group."""
    args = (np.log([[0.5], [0.5]]), np.log([[0.25], [1.0]]), np.log([[0.25], [0.75]]))
    ln2 = np.log(2)
    expected = {
        "k1": [0.25 * ln2, -0.75 * ln2],
        "k2": [0.25 * ln2**2 / 2, 0.75 * ln2**2 / 2],
        "k3": [0.25 * (0.5 - 1 + ln2), 0.75 * (2 - 1 - ln2)],
    }
    for name, numbers in expected.items():
        estimate = wrap(functools.partial(estimated_kl, name))
        np.testing.assert_allclose(estimate(*args), numbers, rtol=1e-5)
        together = estimate(*(leaf.reshape(1, 2) for leaf in args))
        np.testing.assert_allclose(together, [sum(numbers)], rtol=1e-5)
        forbidden = losses.Divergence(*(leaf.reshape(1, 2) for leaf in args), np.array([[True, False]]))
        np.testing.assert_allclose(losses.KL_ESTIMATORS[name](forbidden), numbers[:1], rtol=1e-5)


def test_the_exact_kl_must_be_given():
    given = losses.Divergence(OLD, OLD, OLD, OLD < 0, closed_form=np.array([1.0, 2.0]))
    np.testing.assert_array_equal(losses.KL_ESTIMATORS["exact"](given), [1.0, 2.0])
    with pytest.raises(ValueError, match="use k1, k2 or k3"):
        losses.KL_ESTIMATORS["exact"](given.replace(closed_form=None))


def test_the_tables_hold_what_the_config_names():
    """The config's names of the pieces are the keys of the tables that the pieces are looked up in."""
    assert set(get_args(config.Surrogate)) == set(losses.SURROGATES)
    assert set(get_args(config.KLEstimator)) == set(losses.KL_ESTIMATORS)
    assert set(get_args(config.Baseline)) == set(advantage.BASELINES)
    assert set(get_args(config.Scale)) == set(advantage.SCALES)
    fields = {field.name: field.default for field in dataclasses.fields(losses.Terms)}
    defaults = config.GRPOConfig()
    for name in ("dual_clip", "sapo_temperature", "sapo_temperature_negative", "tpo_temperature"):
        assert fields[name] == getattr(defaults, name), name
    assert fields["clip_low"] == fields["clip_high"] == defaults.clip_range


def random_policies(seed):
    rng = np.random.default_rng(seed)
    pi, reference = tabular.softmax(rng.normal(size=(2, 4, 6)))
    return pi, reference, np.sum(pi * np.log(pi / reference), axis=1)


def test_kl_estimates_in_the_mean():
    pi, reference, exact = random_policies(0)
    for name in ("k1", "k3"):
        estimate = estimated_kl(name, np.log(pi), np.log(reference), np.log(pi))
        np.testing.assert_allclose(estimate, exact, rtol=1e-4)
    # Each candidate as a group of its own.
    column = [np.log(leaf).reshape(-1, 1) for leaf in (pi, reference, pi)]
    assert np.all(estimated_kl("k3", *column) >= 0.0) and np.all(estimated_kl("k2", *column) >= 0.0)
    assert np.any(estimated_kl("k1", *column) < 0.0)


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_gradient_of_the_kl_estimates(estimator):
    """Where pi is pi_old, k1 and k2 give the gradient of the KL (k1's own one would be 0 in the mean)."""
    pi, reference, exact = random_policies(1)

    def estimate(logits):
        return jnp.sum(estimated_kl(estimator, jax.nn.log_softmax(logits), np.log(reference), np.log(pi)))

    expected = pi * (np.log(pi / reference) - exact[:, None])
    np.testing.assert_allclose(jax.grad(estimate)(jnp.log(pi)), expected, atol=1e-6)


def test_gradient_of_k3():
    """That of KL(pi_ref || pi), as in GRPO's paper: pi - pi_ref on the logits."""
    pi, reference, _ = random_policies(2)

    def estimate(logits):
        return jnp.sum(estimated_kl("k3", jax.nn.log_softmax(logits), np.log(reference), np.log(pi)))

    np.testing.assert_allclose(jax.grad(estimate)(jnp.log(pi)), pi - reference, atol=1e-6)


# Extremes: values and gradients stay finite.

SURROGATES = {name: surrogate(function) for name, function in losses.SURROGATES.items()}
SURROGATES["dual"] = surrogate(losses.ppo, dual_clip=3.0)
EXTREMES = {
    "logits": (np.array([[1e4, -1e4, 0.0]]), np.array([[-1e4, 1e4, 0.0]])),
    "same logits": (np.array([[1e4, -1e4, 0.0]]), np.array([[1e4, -1e4, 0.0]])),
    "old tiny": (np.array([[0.0, 0.0, 0.0]]), np.array([[0.0, -90.0, -200.0]])),
    "new tiny": (np.array([[0.0, -90.0, -200.0]]), np.array([[0.0, 0.0, 0.0]])),
    "masked": (np.array([[0.0, -1e9, 1.0]]), np.array([[1.0, -1e9, 0.0]])),
}
values_of_advantage = [[[1.0, -1.0, 0.5]], [[-1.0, 1.0, -2.0]], [[0.0, 0.0, 0.0]], [[1e4, -1e4, 0.0]]]


def finite(function):
    """The function and its gradient, jitted once, both asserted to be finite."""
    both = jax.jit(lambda *args: (function(*args), jax.grad(lambda *a: jnp.sum(function(*a)))(*args)))

    def run(*args):
        terms, gradient = both(*map(jnp.asarray, args))
        assert np.all(np.isfinite(terms)), terms
        assert np.all(np.isfinite(gradient)), gradient
        return terms, gradient

    return run


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_extremes_of_enumerated_groups(surrogate):
    def function(logits, old_logits, advantage):
        old = jax.nn.log_softmax(old_logits)
        return SURROGATES[surrogate](jax.nn.log_softmax(logits), old, old, advantage, jnp.ones((1, 3), bool))

    check = finite(function)
    for logits, old_logits in EXTREMES.values():
        for worth in values_of_advantage:
            check(logits, old_logits, worth)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_extremes_of_sampled_groups(surrogate):
    """Ratios 0 and inf (log ratios of +-1000), and a single candidate."""
    weight = np.log(np.full((1, 3), 1 / 3))
    old = np.array([[-5.0, -500.0, -2000.0]])
    check = finite(SURROGATES[surrogate])
    for log_ratio in (1e3, -1e3, 0.0):
        for worth in values_of_advantage:
            _, gradient = check(old + log_ratio, old, weight, np.array(worth), np.ones((1, 3), bool))
            if surrogate in ("ppo", "sapo", "dual") and log_ratio < 0:
                np.testing.assert_allclose(gradient, 0.0, atol=1e-6)  # a ratio of 0 has no gradient
    one = np.zeros((1, 1))
    terms, _ = check(one - 1.0, one - 2.0, one, one, np.ones((1, 1), bool))
    assert abs(terms[0, 0]) < 1e-6


def test_tpo_without_any_valid_candidate():
    for terms in finite(SURROGATES["tpo"])(OLD, OLD, WEIGHT, ADVANTAGE, np.zeros((2, 4), bool)):
        np.testing.assert_array_equal(terms, 0.0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_extremes_of_kl_estimates(estimator):
    def function(logits, reference_logits):
        log_prob = jax.nn.log_softmax(logits)
        weight = jax.lax.stop_gradient(log_prob)
        return estimated_kl(estimator, log_prob, jax.nn.log_softmax(reference_logits), weight)

    check = finite(function)
    for logits, reference in EXTREMES.values():
        check(logits, reference)


@jit_or_not
def test_value_loss(wrap):
    value, old, target = np.array([3.0, -1.0, 0.5]), np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.0, 2.0])
    np.testing.assert_allclose(wrap(losses.value_loss)(value, old, target), [9.0, 1.0, 2.25])
    # At most 0.5 away from the old value: 1.5, -0.5, 0.5.
    clipped = wrap(functools.partial(losses.value_loss, clip_range=0.5))(value, old, target)
    np.testing.assert_allclose(clipped, [2.25, 0.25, 2.25])
