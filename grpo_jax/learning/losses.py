"""Losses over all candidates of a group: surrogates, KL to a reference, value loss.

Written in *probability mass*: m_i = w_i pi(a_i|s) / pi_old(a_i|s), where w_i is the candidate's weight. For an
enumerated group w_i = pi_old(a_i|s), so m_i is pi(a_i|s) itself and nothing overflows where pi_old is tiny.
Shapes ``[B, G]`` throughout: B decision states, G candidates.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from grpo_jax.config import KLEstimator

MAX_LOG_RATIO = 20.0
"""Beyond e^20 a sampled candidate's ratio counts as constant: finite, and without a gradient."""


def mass(log_prob: jax.Array, old_log_prob: jax.Array, log_weight: jax.Array) -> jax.Array:
    """m_i = w_i pi / pi_old; ``[B, G]``."""
    chex.assert_equal_shape([log_prob, old_log_prob, log_weight])
    return jnp.exp(jnp.minimum((log_prob - old_log_prob) + log_weight, MAX_LOG_RATIO))


def ppo(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    log_weight: jax.Array,
    advantage: jax.Array,
    *,
    clip_low: float | jax.Array,
    clip_high: float | jax.Array,
    dual_clip: float | jax.Array | None = None,
) -> jax.Array:
    """w min(rho A, clip(rho, 1-low, 1+high) A) (arXiv:1707.06347, eq. 7; separate bounds: DAPO, arXiv:2503.14476).

    Args:
      log_prob: ``[B, G]`` log pi(a_i|s).
      old_log_prob: ``[B, G]`` log pi_old(a_i|s).
      log_weight: ``[B, G]`` log w_i.
      advantage: ``[B, G]``.
      clip_low: how far the ratio may fall below 1.
      clip_high: how far it may rise above 1.
      dual_clip: c > 1, bounds the term from below by c A where A < 0 (arXiv:1912.09729, eq. 5); None: no bound.

    Returns:
      ``[B, G]`` terms to maximise; their sum over a group is the state's objective.
    """
    m, w = mass(log_prob, old_log_prob, log_weight), jnp.exp(log_weight)
    clipped = jnp.clip(m, w * (1.0 - clip_low), w * (1.0 + clip_high))
    terms = jnp.minimum(m * advantage, clipped * advantage)
    if dual_clip is not None:
        terms = jnp.where(advantage < 0, jnp.maximum(terms, dual_clip * w * advantage), terms)
    return terms


def cispo(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    log_weight: jax.Array,
    advantage: jax.Array,
    *,
    clip_high: float | jax.Array,
) -> jax.Array:
    """w sg(min(rho, 1+high)) A log pi (arXiv:2506.13585, eq. 4): the weight is clipped, no candidate's gradient is lost.

    The weight has no bound from below, as in the paper's experiments: with one, what a bad candidate is pushed down by
    would not fade with its probability, and log pi would fall without end.
    """
    m, w = mass(log_prob, old_log_prob, log_weight), jnp.exp(log_weight)
    return jax.lax.stop_gradient(jnp.minimum(m, w * (1.0 + clip_high))) * advantage * log_prob


def sapo(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    log_weight: jax.Array,
    advantage: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    temperature_negative: float | jax.Array = 1.05,
) -> jax.Array:
    """w (4/tau) sigmoid(tau (rho - 1)) A (arXiv:2511.20347): a soft gate, tau by the advantage's sign."""
    tau = jnp.where(advantage > 0, temperature, temperature_negative)
    ratio = jnp.exp(jnp.clip(log_prob - old_log_prob, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    return jnp.exp(log_weight) * (4.0 / tau) * jax.nn.sigmoid(tau * (ratio - 1.0)) * advantage


def tpo(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    log_weight: jax.Array,
    advantage: jax.Array,
    valid: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    """q log p with the target q ~ w exp(A / tau) and p ~ w pi / pi_old over the group (arXiv:2604.06159).

    For an enumerated group p is the policy and q ~ pi_old exp(A / tau).
    """
    out = -1e9  # the logit of a candidate that is not there
    target = jax.nn.softmax(jnp.where(valid, log_weight + advantage / temperature, out), axis=-1)
    fitted = jax.nn.log_softmax(jnp.where(valid, log_weight + log_prob - old_log_prob, out), axis=-1)
    return jnp.where(valid, jax.lax.stop_gradient(target) * fitted, 0.0)


def kl_estimate(
    log_prob: jax.Array, reference_log_prob: jax.Array, log_weight: jax.Array, estimator: KLEstimator
) -> jax.Array:
    """w times an estimate of KL(pi || pi_ref) at each candidate (Schulman 2020, joschu.net/blog/kl-approx.html).

    k1 = log(pi/pi_ref); k2 = k1^2 / 2; k3 = pi_ref/pi - 1 - log(pi_ref/pi), which is what GRPO's paper uses
    (arXiv:2402.03300, eq. 4). Sum over a group for the state's estimate; ``[B, G]``.
    """
    log_ratio = reference_log_prob - log_prob
    if estimator == "k1":
        # With weights that are constants, k1's own gradient is E[grad log pi] = 0 whatever pi_ref is: take k2's, which
        # is the KL's.
        k2 = 0.5 * log_ratio**2
        estimate = jax.lax.stop_gradient(-log_ratio) + (k2 - jax.lax.stop_gradient(k2))
    elif estimator == "k2":
        estimate = 0.5 * log_ratio**2
    elif estimator == "k3":
        bounded = jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        estimate = jnp.exp(bounded) - 1.0 - bounded
    else:
        raise ValueError(f"kl_estimator={estimator!r} has no form per candidate; use k1, k2 or k3")
    return jnp.exp(log_weight) * estimate


def mean_over(rows: jax.Array, values: jax.Array) -> jax.Array:
    """Means of ``values [..., B]`` over the ``rows [B]`` that are True, whatever stands in the others; 0 without any."""
    share = rows / jnp.maximum(jnp.sum(rows), 1)
    return jnp.sum(jnp.where(rows, values * share, 0.0), axis=-1)


def value_loss(
    value: jax.Array,
    old_value: jax.Array,
    target: jax.Array,
    clip_range: float | jax.Array | None = None,
) -> jax.Array:
    """(V - target)^2 with V kept within ``clip_range`` of the old value, as in SB3's PPO; ``[B]``."""
    chex.assert_equal_shape([value, old_value, target])
    if clip_range is not None:
        value = old_value + jnp.clip(value - old_value, -clip_range, clip_range)
    return (value - target) ** 2
