"""Model: what a learned world is trained on, how, and how good it is.

In the order of an iteration: ``measure`` the world on what was just seen, ``remember`` it, ``fit``, and branch in
``model.world`` if it was ``usable``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from grpo_jax.learning.replay import Replay as Replay
from grpo_jax.learning.replay import Transitions as Transitions
from grpo_jax.learning.replay import join_axes
from grpo_jax.learning.replay import remember as remember
from grpo_jax.learning.replay import transitions_of as transitions_of
from grpo_jax.noise import as_key, bits_to_uniform, draw_bits, split
from grpo_jax.spaces import ActionSpace, Box, Space
from grpo_jax.types import Metrics, Params, PyTree
from grpo_jax.worlds.base import RewardFunction
from grpo_jax.worlds.learned import N_MEMBERS, LearnedWorld, Normaliser, Prediction, disagreement, untrained

MAX_ERROR = 0.7
"""Largest ``error`` of a world that is branched in: half of the variance of what happens is explained. It is measured
before the world has learned from these very states, and actions are already ranked well by then."""
MAX_END_ERROR = 1.0
"""Largest ``end_error`` of such a world: ends are rare and have sharp borders, so no more is asked than a good guess."""
RARE = 0.02
"""Ends rarer than this are judged as if they were no rarer: a single one says little about a world."""
MAX_STEPS = 200
"""Optimizer steps of a fit: about 0.3 s of one core for a small task."""
BATCH_SIZE, LEARNING_RATE = 256, 1e-3
HELD_OUT, N_VALIDATED = 0.15, 512  # share of the transitions, and how many of those are looked at
ROUND, PATIENCE = 20, 4  # optimizer steps between validations, validations without 1 % gained
STILL = 0.3  # of a change's standard deviation in training: errors are not measured in smaller units
END_WEIGHT = 5.0  # of the cross-entropy: ends are rare, and are learned last
MARGIN = 0.1  # of the range seen, by which predictions may leave it


class Model(struct.PyTreeNode):
    """A learned world with all that its training needs.

    Attributes:
      world: to branch in.
      replay: what it learns from.
      optimizer: optax state.
    """

    world: LearnedWorld
    replay: Replay
    optimizer: PyTree


def init_model(
    observation_space: Space,
    action_space: ActionSpace,
    key: jax.Array,
    *,
    reward_function: RewardFunction | None = None,
    capacity: int = 50_000,
) -> Model:
    """A model that has seen nothing.

    Args:
      observation_space: a floating Box of D numbers in any shape, no image.
      action_space: any.
      key: PRNG key of the first parameters.
      reward_function: JAX-traceable ``(state, action, next_state) -> []`` for one transition; None: it is learned.
      capacity: transitions that are kept.

    Raises:
      NotImplementedError: observations that are images, categories or dicts.
      ValueError: capacity below 1.
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity} must be at least 1; 50000 transitions are a good start")
    world = untrained(observation_space, action_space, as_key(key), reward_function=reward_function)
    dtype = world.starts.dtype
    observations = jnp.zeros((capacity, world.starts.shape[1]), dtype)
    data = Transitions(
        observation=observations,
        action=jnp.zeros(
            (capacity, *action_space.shape), dtype if isinstance(action_space, Box) else jnp.int32
        ),
        reward=jnp.zeros(capacity, dtype),
        next_observation=observations,
        terminated=jnp.zeros(capacity, bool),
        truncated=jnp.zeros(capacity, bool),
    )
    return Model(world, Replay(data, jnp.int32(0)), _OPTIMIZER.init(world.params))


@jax.jit
def fit(model: Model, key: jax.Array, max_steps: jax.Array | int = MAX_STEPS) -> tuple[Model, Metrics]:
    """Trains the world on its replay, from its last parameters on.

    A fixed share of the transitions is held out. Every member keeps the parameters that were best on them; the fit
    ends where none has gained 1 % for some rounds. One program, whatever the replay holds.

    Args:
      model: with at least one transition.
      key: PRNG key.
      max_steps: optimizer steps at most, in rounds of 20.

    Returns:
      The model, and ``loss`` on what was held out (squared errors of the normalised targets and cross-entropy of
      terminations, averaged over the members), and the optimizer ``steps`` taken.
    """
    replay, data = model.replay, model.replay.data
    draw_key, start_key = split(as_key(key), 2)
    slots = jnp.arange(replay.capacity)
    used = slots < replay.count
    # By slot, in no order: what is held out today was not trained on yesterday.
    held = slots.astype(jnp.uint32) * jnp.uint32(2654435761) < jnp.uint32(HELD_OUT * 2**32)
    train_slots = jnp.nonzero(used & ~held, size=replay.capacity, fill_value=0)[0]
    held_slots = jnp.nonzero(used & held, size=replay.capacity, fill_value=0)[0]
    n_train, n_held = jnp.sum(used & ~held), jnp.sum(used & held)
    validated = _rows(data, held_slots[jnp.arange(N_VALIDATED) * n_held // N_VALIDATED])
    world = dataclasses.replace(model.world, normaliser=_normaliser(model.world, data, used))

    def train(i: jax.Array, carry: tuple[Params, PyTree], uniforms: jax.Array) -> tuple[Params, PyTree]:
        params, optimizer = carry
        minibatch = _rows(data, train_slots[(uniforms[i] * n_train).astype(jnp.int32)])
        gradient = jax.grad(_loss)(params, world, minibatch)
        changes, optimizer = _OPTIMIZER.update(gradient, optimizer, params)
        return optax.apply_updates(params, changes), optimizer

    def one_round(carry: Any) -> Any:
        k, stale, least, best, *learner = carry
        uniforms = bits_to_uniform(draw_bits(jax.random.fold_in(draw_key, k), (ROUND, N_MEMBERS, BATCH_SIZE)))
        # The first round only validates: a second call would be compiled a second time.
        n_steps = jnp.where(k == 0, 0, ROUND)
        learner = jax.lax.fori_loop(0, n_steps, functools.partial(train, uniforms=uniforms), tuple(learner))
        squared, ended, _ = _errors(learner[0], world, validated)
        loss = jnp.mean(squared, axis=(1, 2)) + jnp.mean(ended, axis=1)  # [E]
        better = loss < least  # False for NaN
        best = _choose_members(better, learner[0], best)
        stale = jnp.where(jnp.any(loss < 0.99 * least), 0, stale + 1)
        return k + 1, stale, jnp.where(better, loss, least), best, *learner

    def goes_on(carry: Any) -> jax.Array:
        k, stale, *_ = carry
        return (k * ROUND <= max_steps) & (stale < PATIENCE)

    dtype = world.starts.dtype
    nothing = jnp.full(N_MEMBERS, jnp.inf, dtype)
    params = model.world.params
    k, _, least, best, _, optimizer = jax.lax.while_loop(
        goes_on, one_round, (jnp.int32(0), jnp.int32(0), nothing, params, params, model.optimizer)
    )
    n_starts = world.starts.shape[0]
    drawn = (bits_to_uniform(draw_bits(start_key, (n_starts,))) * replay.count).astype(jnp.int32)
    world = dataclasses.replace(world, params=best, starts=data.observation[drawn])
    metrics = {"loss": jnp.mean(least), "steps": ((k - 1) * ROUND).astype(dtype)}
    return model.replace(world=world, optimizer=optimizer), metrics


@functools.partial(jax.jit, static_argnames="horizon")
def measure(world: LearnedWorld, transitions: Transitions, horizon: int) -> Metrics:
    """How well a world predicts real trajectories that it was not trained on.

    All errors are relative: sqrt(mean over the features of mean squared error / variance of what was to be predicted),
    1 for a world that always predicts the mean. Where a rollout hardly moves, the variance is taken to be that of
    training times 0.3^2 (times H for windows). The members' mean is followed, without noise.

    Args:
      world: trained on other transitions.
      transitions: ``[T, N, *]`` in the order of time.
      horizon: H; windows are shorter where an episode ends, and where T is less.

    Returns:
      ``one_step_error``, of the observation's change in a step; ``h_step_error``, of its change over a window of H real
      actions from every state, predictions fed back; ``reward_error``, of one step's reward (0 where it is given);
      ``end_error``, of one step's termination (with a variance of at least ``RARE``); ``end_recall`` and
      ``end_false_alarms``, share of the terminations and of the other steps that get a probability above 1/2 (NaN
      without any); ``disagreement`` of one step; ``cut``, share of the windows that disagreement cuts; and ``error``,
      the larger one of h_step_error and reward_error, which decides whether the world is ``usable``.
    """
    transitions = join_axes(transitions, world.starts)
    n_steps = transitions.reward.shape[0]
    horizon = min(horizon, n_steps)
    n_starts = n_steps - horizon + 1

    def predict(observation: jax.Array, action: jax.Array) -> tuple[jax.Array, ...]:
        prediction = world.predict(observation, action)
        return *world.reached(observation, action, prediction), disagreement(prediction)

    predict_all = jax.vmap(jax.vmap(predict))

    def follow(carry: Any, h: jax.Array) -> tuple[Any, None]:
        alive, predicted, reached, uncertainty = carry
        now = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, h, n_starts), transitions)
        following, *_, apart = predict_all(predicted, now.action)
        predicted = jnp.where(alive[..., None], following, predicted)
        reached = jnp.where(alive[..., None], now.next_observation, reached)
        uncertainty = uncertainty + jnp.where(alive, apart, 0.0)
        return (alive & ~(now.terminated | now.truncated), predicted, reached, uncertainty), None

    first = transitions.observation[:n_starts]
    alive = jnp.ones(first.shape[:-1], bool)
    carry = (alive, first, first, jnp.zeros(alive.shape, first.dtype))
    (_, predicted, reached, uncertainty), _ = jax.lax.scan(follow, carry, jnp.arange(horizon))

    following, reward, end, apart = predict_all(transitions.observation, transitions.action)
    terminated = transitions.terminated
    rate = jnp.mean(terminated)
    n_features, still = first.shape[-1], STILL * world.normaliser.target_std
    change_floor = still[:n_features]
    metrics = {
        "one_step_error": _relative(
            following - transitions.observation,
            transitions.next_observation - transitions.observation,
            change_floor,
        ),
        "h_step_error": _relative(predicted - first, reached - first, change_floor * horizon**0.5),
        "reward_error": jnp.zeros_like(apart[0, 0]),
        "end_error": jnp.sqrt(
            jnp.mean(jnp.square(end - terminated)) / jnp.maximum(rate * (1.0 - rate), RARE)
        ),
        "end_recall": jnp.sum((end > 0.5) & terminated) / jnp.sum(terminated),
        "end_false_alarms": jnp.sum((end > 0.5) & ~terminated) / jnp.sum(~terminated),
        "disagreement": jnp.mean(apart),
        "cut": jnp.mean(uncertainty > world.max_uncertainty),
    }
    if world.reward_function is None:
        metrics["reward_error"] = _relative(
            reward[..., None], transitions.reward[..., None], still[n_features:]
        )
    return metrics | {"error": jnp.maximum(metrics["h_step_error"], metrics["reward_error"])}


def usable(metrics: Metrics) -> bool:
    """Whether a world may be branched in, by what ``measure`` said of it; see ``MAX_ERROR`` and ``MAX_END_ERROR``."""
    # NaN is not usable.
    return bool(metrics["error"] <= MAX_ERROR) and bool(metrics["end_error"] <= MAX_END_ERROR)


_OPTIMIZER = optax.flatten(optax.adam(LEARNING_RATE))


def _rows(data: Transitions, slots: jax.Array) -> Transitions:
    picked: Transitions = jax.tree.map(lambda leaf: leaf[slots], data)
    return picked


def _targets(world: LearnedWorld, data: Transitions) -> jax.Array:
    """What is predicted, before normalisation; ``[..., D + R]``."""
    change = data.next_observation - data.observation
    if world.reward_function is None:
        return jnp.concatenate([change, data.reward[..., None]], axis=-1)
    return change


def _errors(
    params: Params, world: LearnedWorld, data: Transitions
) -> tuple[jax.Array, jax.Array, Prediction]:
    """Squared errors ``[E, B, D + R]`` and cross-entropies of termination ``[E, B]``, of data ``[B]`` or ``[E, B]``."""
    inputs = world.inputs(data.observation, data.action)
    inputs = jnp.broadcast_to(inputs, (N_MEMBERS, *inputs.shape[-2:]))
    prediction = world.ensemble.apply({"params": params}, inputs)
    assert isinstance(prediction, Prediction)
    targets = (_targets(world, data) - world.normaliser.target_mean) / world.normaliser.target_std
    terminated = jnp.broadcast_to(data.terminated, prediction.end_logit.shape).astype(targets.dtype)
    ended = optax.sigmoid_binary_cross_entropy(prediction.end_logit, terminated)
    return jnp.square(prediction.mean - targets), ended, prediction


def _loss(params: Params, world: LearnedWorld, minibatch: Transitions) -> jax.Array:
    """Sum over the members.

    Means learn by squared errors, variances by the Gaussian likelihood of these (beta-NLL with beta = 1,
    arXiv:2203.09168): where a variance is tiny, the likelihood alone would learn no other mean.
    """
    squared, ended, prediction = _errors(params, world, minibatch)
    log_variance = prediction.log_variance
    likelihood = jax.lax.stop_gradient(squared) * jnp.exp(-log_variance) + log_variance
    bounds = jnp.sum(params["bounds"]["high"] - params["bounds"]["low"])
    return (
        jnp.sum(jnp.mean(squared + likelihood, axis=(1, 2)))
        + END_WEIGHT * jnp.sum(jnp.mean(ended, axis=1))
        + 0.01 * bounds
    )


def _normaliser(world: LearnedWorld, data: Transitions, used: jax.Array) -> Normaliser:
    used = used[:, None]
    mean, std = _moments(data.observation, used)
    target_mean, target_std = _moments(_targets(world, data), used)
    low = jnp.min(jnp.minimum(data.observation, data.next_observation), axis=0, where=used, initial=jnp.inf)
    high = jnp.max(jnp.maximum(data.observation, data.next_observation), axis=0, where=used, initial=-jnp.inf)
    margin = MARGIN * (high - low)
    return Normaliser(mean, std, target_mean, target_std, low - margin, high + margin)


def _moments(values: jax.Array, used: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the rows ``[N, D]`` that are ``used [N, 1]``; 1 for what does not vary."""
    mean = jnp.mean(values, axis=0, where=used)
    std = jnp.sqrt(jnp.mean(jnp.square(values - mean), axis=0, where=used))
    return mean, jnp.where(std > 1e-6 * (1.0 + jnp.abs(mean)), std, 1.0)


def _relative(predicted: jax.Array, real: jax.Array, floor: jax.Array) -> jax.Array:
    """sqrt(mean over the last axis of mean squared error / variance); standard deviations are at least ``floor``."""
    axes = tuple(range(real.ndim - 1))
    squared = jnp.mean(jnp.square(predicted - real), axis=axes)
    scale = jnp.maximum(jnp.std(real, axis=axes), floor)
    return jnp.sqrt(jnp.mean(squared / jnp.square(jnp.where(scale > 0.0, scale, 1.0))))


def _choose_members(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Leaves ``[E, ...]`` by a condition ``[E]``."""

    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(condition.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)
