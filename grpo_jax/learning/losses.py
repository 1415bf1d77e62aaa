"""Losses over all candidates of a group: surrogates, KL to a reference, value loss.

Written in *probability mass*: m_i = w_i pi(a_i|s) / pi_old(a_i|s), where w_i is the candidate's weight. For an
enumerated group w_i = pi_old(a_i|s), so m_i is pi(a_i|s) itself and nothing overflows where pi_old is tiny.
Shapes ``[B, G]`` throughout: B decision states, G candidates.

Surrogates are functions of :class:`Terms`, KL estimators of :class:`Divergence`; the config's names for them are the keys
of ``SURROGATES`` and ``KL_ESTIMATORS``.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import struct

from grpo_jax import shards
from grpo_jax.config import KLEstimator, Surrogate

MAX_LOG_RATIO = 20.0
"""Beyond e^20 a sampled candidate's ratio counts as constant: finite, and without a gradient."""

ABSENT = -1e9
"""The logit of a candidate that is not there."""


class Terms(struct.PyTreeNode):
    """What a surrogate is made of; each reads the coefficients that it has a use for.

    Attributes:
      log_prob: ``[B, G]`` log pi(a_i|s), which is differentiated.
      old_log_prob: ``[B, G]`` log pi_old(a_i|s).
      log_weight: ``[B, G]`` log w_i.
      advantage: ``[B, G]``.
      valid: ``[B, G]`` bool, or None where all candidates are.
      clip_low: how far the ratio may fall below 1.
      clip_high: how far it may rise above 1.
      dual_clip: c > 1, bounds ppo's term from below by c A where A < 0; None: no bound.
      sapo_temperature: tau where A > 0.
      sapo_temperature_negative: tau elsewhere.
      tpo_temperature: tau of tpo's target.
    """

    log_prob: jax.Array
    old_log_prob: jax.Array
    log_weight: jax.Array
    advantage: jax.Array
    valid: jax.Array | None = None
    clip_low: float | jax.Array = 0.2
    clip_high: float | jax.Array = 0.2
    dual_clip: float | jax.Array | None = None
    sapo_temperature: float | jax.Array = 1.0
    sapo_temperature_negative: float | jax.Array = 1.05
    tpo_temperature: float | jax.Array = 1.0


def mass(log_prob: jax.Array, old_log_prob: jax.Array, log_weight: jax.Array) -> jax.Array:
    """m_i = w_i pi / pi_old; ``[B, G]``."""
    chex.assert_equal_shape([log_prob, old_log_prob, log_weight])
    return jnp.exp(jnp.minimum((log_prob - old_log_prob) + log_weight, MAX_LOG_RATIO))


def ppo(terms: Terms) -> jax.Array:
    """w min(rho A, clip(rho, 1-low, 1+high) A) (arXiv:1707.06347, eq. 7; separate bounds: DAPO, arXiv:2503.14476).

    With ``dual_clip`` at least c w A where A < 0 (arXiv:1912.09729, eq. 5). Returns ``[B, G]`` terms to maximise;
    their sum over a group is the state's objective.
    """
    m, w = mass(terms.log_prob, terms.old_log_prob, terms.log_weight), jnp.exp(terms.log_weight)
    clipped = jnp.clip(m, w * (1.0 - terms.clip_low), w * (1.0 + terms.clip_high))
    objective = jnp.minimum(m * terms.advantage, clipped * terms.advantage)
    if terms.dual_clip is not None:
        bounded = jnp.maximum(objective, terms.dual_clip * w * terms.advantage)
        objective = jnp.where(terms.advantage < 0, bounded, objective)
    return objective


def cispo(terms: Terms) -> jax.Array:
    """w sg(min(rho, 1+high)) A log pi (arXiv:2506.13585, eq. 4): the weight is clipped, no candidate's gradient is lost.

    The weight has no bound from below, as in the paper's experiments: with one, what a bad candidate is pushed down by
    would not fade with its probability, and log pi would fall without end. Returns ``[B, G]``.
    """
    m, w = mass(terms.log_prob, terms.old_log_prob, terms.log_weight), jnp.exp(terms.log_weight)
    weight = jax.lax.stop_gradient(jnp.minimum(m, w * (1.0 + terms.clip_high)))
    return weight * terms.advantage * terms.log_prob


def sapo(terms: Terms) -> jax.Array:
    """w (4/tau) sigmoid(tau (rho - 1)) A (arXiv:2511.20347): a soft gate, tau by the advantage's sign; ``[B, G]``."""
    tau = jnp.where(terms.advantage > 0, terms.sapo_temperature, terms.sapo_temperature_negative)
    ratio = jnp.exp(jnp.clip(terms.log_prob - terms.old_log_prob, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    return jnp.exp(terms.log_weight) * (4.0 / tau) * jax.nn.sigmoid(tau * (ratio - 1.0)) * terms.advantage


def tpo(terms: Terms) -> jax.Array:
    """q log p with the target q ~ w exp(A / tau) and p ~ w pi / pi_old over the group (arXiv:2604.06159).

    For an enumerated group p is the policy and q ~ pi_old exp(A / tau). Returns ``[B, G]``.
    """
    valid = jnp.ones(terms.log_prob.shape, bool) if terms.valid is None else terms.valid
    wanted = terms.log_weight + terms.advantage / terms.tpo_temperature
    target = jax.nn.softmax(jnp.where(valid, wanted, ABSENT), axis=-1)
    reached = terms.log_weight + terms.log_prob - terms.old_log_prob
    fitted = jax.nn.log_softmax(jnp.where(valid, reached, ABSENT), axis=-1)
    return jnp.where(valid, jax.lax.stop_gradient(target) * fitted, 0.0)


SURROGATES: dict[Surrogate, Callable[[Terms], jax.Array]] = {
    "ppo": ppo,
    "cispo": cispo,
    "sapo": sapo,
    "tpo": tpo,
}
"""Objectives, to be maximised, by the names that the config has for them."""


class Divergence(struct.PyTreeNode):
    """What an estimate of KL(pi || pi_ref) is made of.

    Attributes:
      log_prob: ``[B, G]`` log pi(a_i|s).
      reference_log_prob: ``[B, G]`` log pi_ref(a_i|s).
      log_weight: ``[B, G]`` log w_i.
      valid: ``[B, G]`` bool.
      closed_form: ``[B]`` the KL itself, where it is known.
    """

    log_prob: jax.Array
    reference_log_prob: jax.Array
    log_weight: jax.Array
    valid: jax.Array
    closed_form: jax.Array | None = None

    @property
    def log_ratio(self) -> jax.Array:
        """log(pi_ref / pi) of each candidate; ``[B, G]``."""
        return self.reference_log_prob - self.log_prob

    def expected(self, estimate: jax.Array) -> jax.Array:
        """Sum over a group of w times an estimate ``[B, G]`` at each candidate; ``[B]``."""
        return jnp.sum(jnp.where(self.valid, jnp.exp(self.log_weight) * estimate, 0.0), axis=1)


def exact(divergence: Divergence) -> jax.Array:
    """The KL in closed form, ``[B]``."""
    if divergence.closed_form is None:
        raise ValueError("kl_estimator='exact' needs the KL in closed form; without it use k1, k2 or k3")
    return divergence.closed_form


def k1(divergence: Divergence) -> jax.Array:
    """Mean of log(pi/pi_ref) (Schulman 2020, joschu.net/blog/kl-approx.html), ``[B]``; its gradient is that of k2.

    With weights that are constants, k1's own gradient is E[grad log pi] = 0 whatever pi_ref is; k2's is the KL's.
    """
    log_ratio = divergence.log_ratio
    square = 0.5 * log_ratio**2
    return divergence.expected(jax.lax.stop_gradient(-log_ratio) + (square - jax.lax.stop_gradient(square)))


def k2(divergence: Divergence) -> jax.Array:
    """Mean of log(pi/pi_ref)^2 / 2 (Schulman 2020), ``[B]``."""
    return divergence.expected(0.5 * divergence.log_ratio**2)


def k3(divergence: Divergence) -> jax.Array:
    """Mean of pi_ref/pi - 1 - log(pi_ref/pi) (Schulman 2020), as in GRPO's paper (arXiv:2402.03300, eq. 4); ``[B]``."""
    bounded = jnp.clip(divergence.log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return divergence.expected(jnp.exp(bounded) - 1.0 - bounded)


KL_ESTIMATORS: dict[KLEstimator, Callable[[Divergence], jax.Array]] = {
    "exact": exact,
    "k1": k1,
    "k2": k2,
    "k3": k3,
}
"""Estimates of KL(pi || pi_ref) in each decision state, by the names that the config has for them."""


def mean_over(rows: jax.Array, values: jax.Array, count: jax.Array | None = None) -> jax.Array:
    """Means of ``values [..., B]`` over the ``rows [B]`` that are True, whatever stands in the others; 0 without any.

    ``count``: how many there are in all shards; what these rows add to the mean is then returned. None: they are counted.
    """
    share = rows / jnp.maximum(shards.total(jnp.sum(rows)) if count is None else count, 1)
    part = jnp.sum(jnp.where(rows, values * share, 0.0), axis=-1)
    return shards.total(part) if count is None else part


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
