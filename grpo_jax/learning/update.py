"""Update: epochs of minibatches over one batch of groups."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from grpo_jax import shards
from grpo_jax.config import GRPOConfig, scheduled
from grpo_jax.learning import losses
from grpo_jax.noise import as_key, draw_bits
from grpo_jax.policies.policy import Policy, PolicyState
from grpo_jax.types import Batch, Metrics, Params, PyTree


class Learner(struct.PyTreeNode):
    """What learning changes.

    Attributes:
      policy: parameters and observation statistics.
      optimizer: optax state.
      reference: parameters and statistics of pi_ref, or None without a KL term.
      n_updates: int32, optimizer steps that were taken.
    """

    policy: PolicyState
    optimizer: PyTree
    reference: PolicyState | None
    n_updates: jax.Array


NARROW = 32
"""Numbers in a row of a leaf that is copied into a table; what is wider (images) is gathered where it lies."""

_Carry = tuple[jax.Array, Learner, jax.Array, jax.Array]


def make_optimizer(config: GRPOConfig, learning_rate: float | jax.Array) -> optax.GradientTransformation:
    """An optimizer behind a bound on the gradient's norm; Adam unless the config has another."""
    if config.optimizer is None:
        # One flat vector: one fused kernel instead of one a layer.
        optimizer = optax.flatten(optax.adam(learning_rate, eps=1e-5))
    else:
        optimizer = config.optimizer(learning_rate)
    # Episodes are judged by the critic: as in PPO, a value loss that is still large holds the actor back.
    bound = optax.clip_by_global_norm if config.candidates == "episodes" else clip_by_part
    return optax.chain(bound(config.max_grad_norm), optimizer)


def clip_by_part(max_norm: float | jax.Array) -> optax.GradientTransformation:
    """Bounds the norm of the actor's gradient, and that of the critic's.

    One bound for both, as in PPO, lets a value loss of large returns shrink the actor's gradient until Adam's epsilon
    outweighs it; what branches found does not depend on the critic that much. A features extractor that both share
    counts to the actor.
    """

    def clip(gradients: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        del params
        clipped: Params = {}
        for is_critic in (False, True):
            part = {name: leaf for name, leaf in gradients.items() if name.startswith("critic") == is_critic}
            scale = jnp.minimum(1.0, max_norm / jnp.maximum(optax.tree.norm(part), 1e-12))
            clipped |= jax.tree.map(lambda leaf, scale=scale: leaf * scale, part)
        return {name: clipped[name] for name in gradients}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), clip)


def init_learner(config: GRPOConfig, policy: Policy, key: jax.Array) -> Learner:
    """A learner with fresh parameters; the reference starts as their copy."""
    return start_learner(config, policy.init(key))


def start_learner(config: GRPOConfig, state: PolicyState) -> Learner:
    """A learner that starts from given parameters; the reference starts as their copy."""
    return Learner(
        policy=state,
        optimizer=make_optimizer(config, 0.0).init(state.params),
        reference=None if config.kl_coef is None else jax.tree.map(jnp.copy, state),
        n_updates=jnp.int32(0),
    )


def loss(
    params: Params,
    config: GRPOConfig,
    policy: Policy,
    state: PolicyState,
    batch: Batch,
    clip_low: jax.Array | float,
    clip_high: jax.Array | float,
    counts: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """The objective of a (mini)batch, to be minimised, and its metrics.

    - sum over candidates of the surrogate, averaged over the decision states that are ``compared`` and over the others,
    - ent_coef entropy + kl_coef KL(pi || pi_ref) + vf_coef value loss, averaged over all that are ``alive``.

    With ``counts``, :func:`_counts` of a minibatch of all shards, what this shard's part of it adds to each of these means.
    """
    n_alive, n_compared, n_others = (None,) * 3 if counts is None else counts
    state = state.replace(params=params)
    seen, value = (state, batch.observation, batch.action_mask), None
    if batch.value is None:
        parameters = policy.parameters(*seen)
    else:
        parameters, value = policy.parameters_and_value(*seen)
    terms = _terms(config, policy, parameters, batch, clip_low, clip_high)
    average = functools.partial(losses.mean_over, batch.alive, count=n_alive)
    average_compared = functools.partial(losses.mean_over, batch.alive & batch.compared, count=n_compared)
    counted = batch.group.valid & batch.active[:, None]
    objective = losses.SURROGATES[config.surrogate](terms)
    objective = jnp.sum(jnp.where(counted, objective, 0.0), axis=1)
    others = losses.mean_over(batch.alive & ~batch.compared, objective, n_others)
    policy_loss = -average_compared(objective) - others
    entropy = average(policy.distribution.entropy(parameters))
    assert not callable(config.ent_coef), "update() has asked the schedule"
    total = policy_loss - config.ent_coef * entropy
    metrics = {
        "policy_loss": policy_loss,
        "entropy": entropy,
        # With an axis for candidates, as log_prob: XLA then finds out that the softmax is one and the same.
        "approx_kl": average(policy.distribution.kl(batch.distribution[:, None], parameters[:, None])[:, 0]),
    }
    names = ("clip_fraction", "clip_fraction_high", "clip_fraction_low")
    metrics |= dict(zip(names, average_compared(_clipped(config, terms, counted)), strict=True))
    if batch.reference is not None and config.kl_coef is not None:
        metrics["kl"] = average(_kl(config, policy, parameters, terms, batch))
        total = total + config.kl_coef * metrics["kl"]
    if value is not None and batch.value is not None and batch.value_target is not None:
        metrics["value_loss"] = average(
            losses.value_loss(value, batch.value, batch.value_target, config.clip_range_vf)
        )
        total = total + config.vf_coef * metrics["value_loss"]
    metrics["loss"] = total
    return total, metrics


def _terms(
    config: GRPOConfig,
    policy: Policy,
    parameters: jax.Array,
    batch: Batch,
    clip_low: jax.Array | float,
    clip_high: jax.Array | float,
) -> losses.Terms:
    """What the surrogate is made of; candidates that are not valid stay where they were."""
    group = batch.group
    log_prob = policy.distribution.log_prob(parameters[:, None], group.action)
    return losses.Terms(
        log_prob=jnp.where(group.valid, log_prob, group.log_prob),
        old_log_prob=group.log_prob,
        log_weight=group.log_weight,
        advantage=batch.advantage,
        valid=group.valid,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=config.dual_clip,
        sapo_temperature=config.sapo_temperature,
        sapo_temperature_negative=config.sapo_temperature_negative,
        tpo_temperature=config.tpo_temperature,
    )


def _clipped(config: GRPOConfig, terms: losses.Terms, counted: jax.Array) -> jax.Array:
    """Shares of each state's candidates whose ratio is beyond the bounds, as PPO counts; ``[3, B]``.

    All of them; then those above and those below whose gradient is cut, as no other surrogate's is.
    """
    weight = jnp.where(counted, jnp.exp(terms.log_weight), 0.0)
    log_ratio = terms.log_prob - terms.old_log_prob
    above = log_ratio > jnp.log1p(terms.clip_high)
    below = log_ratio < jnp.log1p(-jnp.minimum(terms.clip_low, 1.0))
    cuts = config.surrogate == "ppo"
    high, low = cuts & above & (terms.advantage > 0), cuts & below & (terms.advantage < 0)
    return jnp.sum(weight * jnp.stack([above | below, high, low]), axis=-1)


def _kl(
    config: GRPOConfig, policy: Policy, parameters: jax.Array, terms: losses.Terms, batch: Batch
) -> jax.Array:
    """KL(pi || pi_ref) of each state, ``[B]``, as the config wants it estimated."""
    assert batch.reference is not None
    divergence = losses.Divergence(
        log_prob=terms.log_prob,
        reference_log_prob=policy.distribution.log_prob(batch.reference[:, None], batch.group.action),
        log_weight=terms.log_weight,
        valid=batch.group.valid,
        closed_form=policy.distribution.kl(parameters, batch.reference),
    )
    return losses.KL_ESTIMATORS[config.kl_estimator](divergence)


def update(
    config: GRPOConfig,
    policy: Policy,
    learner: Learner,
    batch: Batch,
    key: jax.Array,
    progress: jax.Array | float,
) -> tuple[Learner, Metrics]:
    """Epochs of minibatch steps, stopped early by ``target_kl``.

    A minibatch whose loss or gradient is not finite changes nothing and is counted in ``nonfinite_updates``.

    Args:
      config: the settings.
      policy: static structure.
      learner: what is learned.
      batch: ``[B, ...]`` with B = n_envs * n_steps.
      key: PRNG key, for the order of the decision states.
      progress: share of the run that is done, in [0, 1], for decaying rates.

    Returns:
      The new learner, and metrics averaged over the optimizer steps.
    """
    n_before = learner.n_updates
    clip_low = scheduled(config.clip_range, config.clip_range_decay, n_before, progress)
    clip_high = clip_low
    if config.clip_range_high is not None:
        clip_high = scheduled(config.clip_range_high, config.clip_range_decay, n_before, progress)
    config = config.replace(ent_coef=scheduled(config.ent_coef, config.ent_coef_decay, n_before, progress))
    rows = _order(config, key)
    counts = _counts(config, batch, rows) if shards.within() else None
    step = _stepper(config, policy, learner.policy, batch, clip_low, clip_high, progress)

    def body(carry: _Carry) -> _Carry:
        i, learner, sums, _ = carry
        at = functools.partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False)
        learner, metrics, finite, too_far = step(learner, at(rows), None if counts is None else at(counts))
        # One vector: XLA compiles a kernel for each number that is added on its own.
        row = jnp.stack([metrics[name] for name in names])
        row = jnp.append(jnp.where(finite, row, 0.0), ~finite)
        return i + 1, learner, sums + row, too_far

    def goes_on(carry: _Carry) -> jax.Array:
        i, _, _, too_far = carry
        remains = i < config.n_updates
        return remains if config.target_kl is None else remains & ~too_far

    shapes = jax.eval_shape(step, learner, rows[0], None if counts is None else counts[0])[1]
    names, dtype = sorted(shapes), shapes["loss"].dtype
    taken, learner, sums, _ = jax.lax.while_loop(
        goes_on, body, (jnp.int32(0), learner, jnp.zeros(len(names) + 1, dtype), jnp.bool_(False))
    )
    means = sums / taken
    metrics = {name: means[i] for i, name in enumerate(names)}
    metrics["nonfinite_updates"] = sums[-1]
    last_rate = scheduled(config.learning_rate, config.learning_rate_decay, learner.n_updates, progress)
    metrics["learning_rate"] = jnp.asarray(last_rate, dtype)
    metrics["clip_range"] = jnp.asarray(clip_low, dtype)
    metrics["ent_coef"] = jnp.asarray(config.ent_coef, dtype)
    metrics["n_updates"] = (learner.n_updates - n_before).astype(dtype)
    return learner, metrics


def _counts(config: GRPOConfig, batch: Batch, rows: jax.Array) -> jax.Array:
    """Decision states of each minibatch, in all shards: those that are alive, of them the compared ones, and the others.

    int32 ``[n_updates, 3]``, in one reduction, so that a minibatch needs no other than that of its gradient.
    """
    alive = batch.alive.at[rows].get(mode="fill", fill_value=False)
    compared = alive & batch.compared.at[rows].get(mode="fill", fill_value=False)
    counts: jax.Array = shards.total(jnp.stack([alive, compared, alive & ~compared]).sum(axis=-1))
    return counts.T


def _order(config: GRPOConfig, key: jax.Array) -> jax.Array:
    """Which decision states each minibatch holds: row numbers ``[n_updates, batch_size]``."""
    size = min(config.batch_size, config.n_states)
    # One sort for all epochs: the order of random words is a random order.
    order = jnp.argsort(draw_bits(as_key(key), (config.n_epochs, config.n_states)), axis=1)
    # The last minibatch of an epoch is filled up with rows that do not exist.
    n_missing = config.n_minibatches * size - config.n_states
    order = jnp.pad(order, ((0, 0), (0, n_missing)), constant_values=config.n_states)
    return order.reshape(config.n_updates, size)


def _stepper(
    config: GRPOConfig,
    policy: Policy,
    state: PolicyState,
    batch: Batch,
    clip_low: jax.Array | float,
    clip_high: jax.Array | float,
    progress: jax.Array | float,
) -> Callable[[Learner, jax.Array, jax.Array | None], tuple[Learner, Metrics, jax.Array, jax.Array]]:
    """An optimizer step: ``(learner, rows, counts) -> (learner, metrics, is finite, goes beyond target_kl)``."""
    gradient = jax.value_and_grad(loss, has_aux=True)
    take_rows = row_taker(batch)

    @jax.jit  # one trace, for the shapes and for the loop
    def step(
        learner: Learner, rows: jax.Array, counts: jax.Array | None
    ) -> tuple[Learner, Metrics, jax.Array, jax.Array]:
        minibatch = take_rows(rows)  # out of range: the last row, not alive
        minibatch = minibatch.replace(alive=minibatch.alive & (rows < config.n_states))
        (total, metrics), gradients = shards.total(
            gradient(learner.policy.params, config, policy, state, minibatch, clip_low, clip_high, counts)
        )
        learning_rate = scheduled(
            config.learning_rate, config.learning_rate_decay, learner.n_updates, progress
        )
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        too_far = jnp.bool_(False)
        if config.target_kl is not None:
            too_far = metrics["approx_kl"] > 1.5 * config.target_kl
        changes, optimizer = make_optimizer(config, learning_rate).update(
            gradients, learner.optimizer, learner.policy.params
        )
        params = optax.apply_updates(learner.policy.params, changes)
        applies = finite & ~too_far
        params, optimizer = _choose(applies, (params, optimizer), (learner.policy.params, learner.optimizer))
        metrics["grad_norm"] = norm
        learner = learner.replace(
            policy=learner.policy.replace(params=params),
            optimizer=optimizer,
            n_updates=learner.n_updates + applies.astype(jnp.int32),
        )
        return learner, metrics, finite, too_far

    return step


def update_reference(config: GRPOConfig, learner: Learner, iteration: jax.Array) -> Learner:
    """Moves pi_ref on after an iteration: never, every ``reference_interval`` iterations, or a little each time."""
    if learner.reference is None or config.reference == "fixed":
        return learner
    if config.reference == "periodic":
        is_due = (iteration + 1) % config.reference_interval == 0
        return learner.replace(reference=_choose(is_due, learner.policy, learner.reference))
    share = 1.0 - config.reference_decay

    def moved(new: jax.Array, old: jax.Array) -> jax.Array:
        # A count of observations is no average: it is the policy's.
        return share * new + (1.0 - share) * old if jnp.issubdtype(new.dtype, jnp.floating) else new

    return learner.replace(reference=jax.tree.map(moved, learner.policy, learner.reference))


def row_taker(batch: Batch) -> Callable[[jax.Array], Batch]:
    """A function from row numbers ``[b]`` to those rows of a batch, ``[b, ...]``.

    Narrow leaves of one dtype lie side by side in a table, out of which one gather takes them all: fewer kernels to
    compile, fewer cache lines to read.
    """
    leaves, structure = jax.tree.flatten(batch)
    tables: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if math.prod(leaf.shape[1:]) <= NARROW:
            tables.setdefault(leaf.dtype, []).append(i)
    joined = {
        dtype: jnp.concatenate([leaves[i].reshape(leaves[i].shape[0], -1) for i in members], axis=1)
        for dtype, members in tables.items()
    }

    def take(rows: jax.Array) -> Batch:
        taken: list[Any] = [None] * len(leaves)
        for dtype, members in tables.items():
            widths = [math.prod(leaves[i].shape[1:]) for i in members]
            parts = jnp.split(joined[dtype][rows], np.cumsum(widths)[:-1], axis=1)
            for i, part in zip(members, parts, strict=True):
                taken[i] = part.reshape(-1, *leaves[i].shape[1:])
        taken = [leaf[rows] if part is None else part for leaf, part in zip(leaves, taken, strict=True)]
        filled: Batch = jax.tree.unflatten(structure, taken)
        return filled

    return take


def _choose(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
