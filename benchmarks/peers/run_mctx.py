"""One run of Gumbel AlphaZero: mctx on gymnax's own simulator. Started by ``benchmarks/bench.py`` in the peer's environment.

The peer that steps a simulator beside its environment, as ours does. In every state of a rollout a search
(``mctx.gumbel_muzero_policy``) chooses the action; the policy learns the search's action weights, the critic
lambda-returns over the values at the searches' roots. What has learned plays twice: the bare policy, sampled, and with
a search for every move, without Gumbel noise. The second needs the simulator to play.
"""

import record

if __name__ == "__main__":
    JOB, PATH = record.read_job()  # before JAX makes its threads

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import gymnax
import jax
import jax.numpy as jnp
import mctx
import numpy as np
import optax

PACKAGES = ("mctx", "gymnax", "jax", "jaxlib", "flax", "optax")


class World:
    """An environment of gymnax with discrete actions, over a batch: every array has a leading axis ``[n]``."""

    def __init__(self, env_id: str) -> None:
        self.env, self.params = gymnax.make(env_id)
        self.n_actions = int(self.env.action_space(self.params).n)

    def reset(self, key: jax.Array, n: int) -> tuple[jax.Array, Any]:
        """Observations, float32 ``[n, n_features]``, and states."""
        observations, states = jax.vmap(self.env.reset, (0, None))(jax.random.split(key, n), self.params)
        return _flat(observations), states

    def step(self, key: jax.Array, states: Any, actions: jax.Array) -> tuple[jax.Array, ...]:
        """Observations before any reset, states, rewards, terminated, truncated; nothing is reset."""
        keys = jax.random.split(key, actions.shape[0])
        observations, states, rewards, terminated, _ = jax.vmap(self.env.step_env, (0, 0, 0, None))(
            keys, states, actions, self.params
        )
        truncated = jax.vmap(self.env.is_truncated, (0, None))(states, self.params)
        return _flat(observations), states, rewards.astype(jnp.float32), terminated, truncated & ~terminated


def _flat(observations: jax.Array) -> jax.Array:
    return observations.reshape(observations.shape[0], -1).astype(jnp.float32)


class Network(nn.Module):
    """Logits ``[n, n_actions]`` and values ``[n]``, of layers that they do not share."""

    n_actions: int
    layers: tuple[int, ...]

    @nn.compact
    def __call__(self, observations: jax.Array) -> tuple[jax.Array, jax.Array]:
        def tower(n_outputs: int, scale: float) -> jax.Array:
            x = observations
            for width in self.layers:
                x = nn.relu(nn.Dense(width, kernel_init=nn.initializers.orthogonal(2**0.5))(x))
            return nn.Dense(n_outputs, kernel_init=nn.initializers.orthogonal(scale))(x)

        return tower(self.n_actions, 0.01), tower(1, 1.0)[:, 0]


class State(NamedTuple):
    """Of the training; ``observations`` and ``states`` are of the rollout's environments."""

    params: Any
    optimizer: Any
    observations: jax.Array
    states: Any
    key: jax.Array
    iteration: jax.Array


class Step(NamedTuple):
    """A step of the rollout: ``[n_steps, n_envs, ...]``."""

    observations: jax.Array
    weights: jax.Array  # the search's, for every action
    root_values: jax.Array  # the search's
    rewards: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    last_values: jax.Array  # the network's, of the observation behind the step


class AlphaZero:
    """Gumbel AlphaZero with one configuration; its methods are pure functions of a ``State``.

    Attributes:
      config: the fields of ``mctx.toml``.
      n_iterations: of the whole training; learning rate and entropy bonus fall linearly to 0 over them.
    """

    def __init__(self, world: World, config: dict[str, Any], n_iterations: int) -> None:
        self.world, self.config, self.n_iterations = world, config, n_iterations
        self.network = Network(world.n_actions, tuple(config["layers"]))
        n_updates = n_iterations * config["n_epochs"] * config["n_minibatches"]
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(config["max_grad_norm"]),
            optax.adam(optax.linear_schedule(config["learning_rate"], 0.0, n_updates)),
        )

    def init(self, key: jax.Array) -> State:
        key, reset_key, network_key = jax.random.split(key, 3)
        observations, states = self.world.reset(reset_key, self.config["n_envs"])
        params = self.network.init(network_key, observations)
        return State(params, self.optimizer.init(params), observations, states, key, jnp.int32(0))

    def search(
        self, params: Any, key: jax.Array, observations: jax.Array, states: Any, gumbel_scale: float = 1.0
    ) -> Any:
        """mctx's search from a batch of states; ``n_simulations`` steps of the simulator for each."""

        def simulate(params: Any, key: jax.Array, actions: jax.Array, states: Any) -> tuple[Any, Any]:
            observations, states, rewards, terminated, _ = self.world.step(key, states, actions)
            logits, values = self.network.apply(params, observations)
            discounts = self.config["gamma"] * (1.0 - terminated)
            return mctx.RecurrentFnOutput(
                reward=rewards, discount=discounts, prior_logits=logits, value=values
            ), states

        logits, values = self.network.apply(params, observations)
        return mctx.gumbel_muzero_policy(
            params,
            key,
            mctx.RootFnOutput(prior_logits=logits, value=values, embedding=states),
            simulate,
            self.config["n_simulations"],
            qtransform=functools.partial(
                mctx.qtransform_completed_by_mix_value,
                value_scale=self.config["value_scale"],
                rescale_values=self.config["rescale_values"],
            ),
            gumbel_scale=gumbel_scale,
        )

    def rollout(self, state: State) -> tuple[State, Step]:
        def one(state: State, _: None) -> tuple[State, Step]:
            key, search_key, step_key, reset_key = jax.random.split(state.key, 4)
            found = self.search(state.params, search_key, state.observations, state.states)
            observations, states, rewards, terminated, truncated = self.world.step(
                step_key, state.states, found.action
            )
            last_values = self.network.apply(state.params, observations)[1]
            step = Step(
                state.observations,
                found.action_weights,
                found.search_tree.node_values[:, found.search_tree.ROOT_INDEX],
                rewards,
                terminated,
                truncated,
                last_values,
            )
            fresh = self.world.reset(reset_key, self.config["n_envs"])
            observations, states = _where(terminated | truncated, fresh, (observations, states))
            return state._replace(observations=observations, states=states, key=key), step

        return jax.lax.scan(one, state, None, self.config["n_steps"])

    def iterate(self, state: State) -> State:
        """A rollout, and ``n_epochs`` over it in minibatches."""
        state, steps = self.rollout(state)
        ent_coef = self.config["ent_coef"] * (1.0 - state.iteration / self.n_iterations)
        targets = lambda_returns(steps, self.config["gamma"], self.config["lambda"])
        batch = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (steps.observations, steps.weights, targets)
        )

        def loss(params: Any, batch: Any) -> jax.Array:
            observations, weights, targets = batch
            logits, values = self.network.apply(params, observations)
            logs = jax.nn.log_softmax(logits)
            policy_loss = ((ent_coef * jnp.exp(logs) - weights) * logs).sum(-1).mean()
            return policy_loss + self.config["vf_coef"] * jnp.square(values - targets).mean()

        def update(state: tuple[Any, Any], batch: Any) -> tuple[tuple[Any, Any], None]:
            params, optimizer = state
            moves, optimizer = self.optimizer.update(jax.grad(loss)(params, batch), optimizer, params)
            return (optax.apply_updates(params, moves), optimizer), None

        def epoch(learner: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
            order = jax.random.permutation(key, targets.size).reshape(self.config["n_minibatches"], -1)
            return jax.lax.scan(update, learner, jax.tree.map(lambda leaf: leaf[order], batch))

        key, epoch_key = jax.random.split(state.key)
        keys = jax.random.split(epoch_key, self.config["n_epochs"])
        (params, optimizer), _ = jax.lax.scan(epoch, (state.params, state.optimizer), keys)
        return state._replace(params=params, optimizer=optimizer, key=key, iteration=state.iteration + 1)

    def returns(self, params: Any, key: jax.Array, n_episodes: int, with_search: bool) -> jax.Array:
        """Undiscounted returns, ``[n_episodes]``: side by side, each until its first end."""

        def going(carry: tuple[Any, ...]) -> jax.Array:
            return carry[3].any()

        def one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            key, observations, states, playing, returns = carry
            key, act_key, step_key = jax.random.split(key, 3)
            if with_search:
                actions = self.search(params, act_key, observations, states, gumbel_scale=0.0).action
            else:
                actions = jax.random.categorical(act_key, self.network.apply(params, observations)[0])
            observations, states, rewards, terminated, truncated = self.world.step(step_key, states, actions)
            returns += rewards * playing
            return key, observations, states, playing & ~(terminated | truncated), returns

        key, reset_key = jax.random.split(key)
        start = key, *self.world.reset(reset_key, n_episodes)
        return jax.lax.while_loop(going, one, (*start, jnp.ones(n_episodes, bool), jnp.zeros(n_episodes)))[-1]


def _where(chosen: jax.Array, these: Any, others: Any) -> Any:
    """``these`` where chosen, ``[n]``, else ``others``; leaves ``[n, ...]``, of the others' types."""

    def one(this: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.where(chosen.reshape(-1, *[1] * (other.ndim - 1)), this, other).astype(other.dtype)

    return jax.tree.map(one, these, others)


def lambda_returns(steps: Step, gamma: float, mix: float) -> jax.Array:
    """Returns that mix the steps' lengths by ``mix`` (lambda), ``[n_steps, n_envs]``.

    The value behind a step is that at the root of the next step's search; the network's at the end of the rollout and where a
    time limit has cut an episode off; none behind a termination.
    """
    next_roots = jnp.concatenate([steps.root_values[1:], steps.last_values[-1:]])
    next_values = jnp.where(steps.truncated, steps.last_values, next_roots)

    def back(later: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        reward, terminated, truncated, value = now
        behind = jnp.where(truncated, value, (1.0 - mix) * value + mix * later)
        found = reward + gamma * (1.0 - terminated) * behind
        return found, found

    now = steps.rewards, steps.terminated, steps.truncated, next_values
    return jax.lax.scan(back, next_values[-1], now, reverse=True)[1]


def run(job: record.Job, clock: record.Clock) -> record.Row:
    """Trains in chunks, and between them both ways to play are evaluated."""
    config, total, settings = record.settings_of(job)
    steps = config["n_envs"] * config["n_steps"]
    n_iterations = -(-total // steps)
    learner = AlphaZero(World(job["env"]), config, n_iterations)
    key, evaluate_key = jax.random.split(jax.random.key(job["seed"]))

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state: State, n: jax.Array) -> State:
        return _strong(jax.lax.fori_loop(0, n, lambda _, state: _strong(learner.iterate(state)), state))

    state = jax.block_until_ready(jax.jit(lambda key: _strong(learner.init(key)))(key))
    train = advance.lower(state, np.int32(0)).compile()
    clock.lap("compile")
    returns = jax.jit(learner.returns, static_argnums=(2, 3))
    curve: list[record.Row] = []
    done, every = 0, record.every(n_iterations)
    while done < n_iterations:
        n = min(every, n_iterations - done)
        state = jax.block_until_ready(train(state, np.int32(n)))
        done += n
        clock.lap("train")
        play = functools.partial(
            returns, state.params, jax.random.fold_in(evaluate_key, done), record.CURVE_EPISODES
        )
        bare, searching = np.asarray(play(False)).tolist(), np.asarray(play(True)).tolist()
        clock.lap("evaluate")
        decisions = done * steps
        point = record.point(clock, decisions, decisions * config["n_simulations"], bare)
        again = record.point(clock, 0, 0, searching)
        curve.append(point | {f"search_{name}": again[name] for name in ("return_mean", "return_std")})
    final = functools.partial(returns, state.params, evaluate_key, record.FINAL_EPISODES)
    bare, searching = np.asarray(final(False)).tolist(), np.asarray(final(True)).tolist()
    clock.lap("evaluate")
    device = jax.devices()[0]
    row = record.row(
        job,
        clock,
        settings=settings,
        config=config,
        total_timesteps=total,
        curve=curve,
        final_returns=bare,
        packages=PACKAGES,
        nonfinite=not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params)),
        device=(device.platform, device.device_kind),
    )
    return row | {
        "search_final_returns": record.finite(searching),
        "search_simulator_steps_a_move": config["n_simulations"],
    }


def _strong(tree: Any) -> Any:
    """Without weak types, which would make another program of the second call."""

    def one(leaf: Any) -> Any:
        return (
            leaf
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jax.lax.convert_element_type(leaf, leaf.dtype)
        )

    return jax.tree.map(one, tree)


if __name__ == "__main__":
    record.measure(JOB, PATH, run)
