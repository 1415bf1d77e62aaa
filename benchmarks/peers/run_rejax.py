"""One run of rejax's PPO on gymnax. Started by ``benchmarks/bench.py`` in the peer's virtual environment.

rejax evaluates within its one program. Here its own ``train_iteration`` runs in chunks and the evaluation is a program
of its own, so that the time of each can be told. The library "purejaxrl" is rejax's PPO as well, with PureJaxRL's
published settings and with what those need and rejax has not: see ``LikePureJaxRL``.
"""

import record

if __name__ == "__main__":
    JOB, PATH = record.read_job()  # before JAX makes its threads

import functools
import zlib
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.training.train_state import TrainState
from rejax.algos import PPO
from rejax.algos.algorithm import register_init
from rejax.evaluate import evaluate_single

PACKAGES = ("rejax", "gymnax", "jax", "jaxlib", "flax", "distrax")


class OfGymnax1:
    """An environment of gymnax 1.0 as rejax expects it: five values from ``step``, arrays to observe.

    A time limit ends an episode like any other end, which is what gymnax 0.0.9 did.
    """

    def __init__(self, env: Any, params: Any) -> None:
        self.env = env
        space = env.observation_space(params)
        self.n_states = int(space.n) if isinstance(space, gymnax.environments.spaces.Discrete) else None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by copies, before there is an env
            raise AttributeError(name)
        return getattr(self.env, name)

    def _observe(self, observation: jax.Array) -> jax.Array:
        if self.n_states is not None:
            return jax.nn.one_hot(observation, self.n_states)
        return jnp.atleast_1d(observation).astype(jnp.float32)

    def reset(self, key: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        observation, state = self.env.reset(key, params)
        return self._observe(observation), state

    def step(self, key: jax.Array, state: Any, action: jax.Array, params: Any) -> tuple[Any, ...]:
        observation, state, reward, terminated, truncated, info = self.env.step(key, state, action, params)
        return self._observe(observation), state, reward, terminated | truncated, info

    def observation_space(self, params: Any) -> Any:
        space = self.env.observation_space(params)
        shape = jnp.shape(self._observe(jnp.zeros(space.shape, space.dtype)))
        return gymnax.environments.spaces.Box(-jnp.inf, jnp.inf, shape, jnp.float32)


def make(env_id: str) -> tuple[Any, Any]:
    """The environment and its parameters."""
    env, params = gymnax.make(env_id)
    return OfGymnax1(env, params), params


def _last_gradient() -> optax.GradientTransformation:
    """Moves nothing and keeps the gradient as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradient, state, params=None: (jax.tree.map(jnp.zeros_like, gradient), gradient),
    )


class LikePureJaxRL(PPO):
    """rejax's PPO with PureJaxRL's start and optimizer.

    Orthogonal layers; one Adam (epsilon 1e-5) for policy and critic, their gradient clipped by its joint norm (rejax
    clips every entry); a learning rate that may fall linearly to 0, a step an iteration. The losses are rejax's, which are
    the same as PureJaxRL's.
    """

    n_iterations: int | None = struct.field(pytree_node=False, default=None)
    """Iterations over which the learning rate falls; None: it stays."""

    @property
    def optimizer(self) -> optax.GradientTransformation:
        def rate(count: jax.Array) -> Any:
            if self.n_iterations is None:
                return self.learning_rate
            iteration = count // (self.num_epochs * self.num_minibatches)
            return self.learning_rate * (1.0 - iteration / self.n_iterations)

        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), optax.adam(rate, eps=1e-5))

    def init_state(self, rng: jax.Array) -> Any:
        state = super().init_state(rng)
        params = orthogonal((state.actor_ts.params, state.critic_ts.params), jax.random.fold_in(rng, 1))
        states = [TrainState.create(apply_fn=(), params=of, tx=_last_gradient()) for of in params]
        # rejax starts with integers here, which no scan takes once they have become floats.
        rewards = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), state.rew_rms_state)
        return state.replace(
            actor_ts=states[0], critic_ts=states[1], joint=self.optimizer.init(params), rew_rms_state=rewards
        )

    @register_init
    def initialize_joint(self, rng: jax.Array) -> dict[str, Any]:
        """A field of the training state; ``init_state`` fills it."""
        return {"joint": ()}

    def update(self, ts: Any, batch: Any) -> Any:
        ts = super().update(ts, batch)  # keeps the two gradients
        params = ts.actor_ts.params, ts.critic_ts.params
        moves, joint = self.optimizer.update(
            (ts.actor_ts.opt_state, ts.critic_ts.opt_state), ts.joint, params
        )
        actor, critic = optax.apply_updates(params, moves)
        return ts.replace(
            actor_ts=ts.actor_ts.replace(params=actor),
            critic_ts=ts.critic_ts.replace(params=critic),
            joint=joint,
        )


def orthogonal(params: Any, key: jax.Array) -> Any:
    """PureJaxRL's start: kernels orthogonal of scale sqrt(2), the policy's last 0.01, the critic's last 1."""

    def draw(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if not name.endswith("['kernel']"):
            return leaf
        scale = 0.01 if "action" in name else 1.0 if leaf.shape[-1] == 1 else 2**0.5
        return jax.nn.initializers.orthogonal(scale)(
            jax.random.fold_in(key, zlib.crc32(name.encode())), leaf.shape
        )

    return jax.tree_util.tree_map_with_path(draw, params)


def settings_of(job: record.Job) -> tuple[dict[str, Any], int, str]:
    """Settings, decision steps and where they are from."""
    config, total, settings = record.settings_of(job)
    if job.get("n_envs"):
        config["num_envs"], settings = job["n_envs"], f"{settings}, num_envs {job['n_envs']}"
    return config, total, settings


def algorithm_of(job: record.Job, config: dict[str, Any], total: int) -> Any:
    """The algorithm, in the job's environment."""
    env, params = make(job["env"])
    if job["library"] == "rejax":
        return PPO.create(env=env, env_params=params, **config)
    config = dict(config)
    if config.pop("anneal"):
        config["n_iterations"] = -(-total // (config["num_envs"] * config["num_steps"]))
    return LikePureJaxRL.create(env=env, env_params=params, **config)


def strong(tree: Any) -> Any:
    """Without weak types, which would make another program of the second call."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, jnp.asarray(leaf).dtype), tree)


def evaluator(algorithm: Any, n_episodes: int) -> Any:
    """``(training state, key) -> returns [n_episodes]`` of the sampled policy, jitted."""

    @jax.jit
    def evaluate(state: Any, key: jax.Array) -> jax.Array:
        env, params = algorithm.env, algorithm.env_params
        one = functools.partial(evaluate_single, algorithm.make_act(state), env, params)
        return jax.vmap(lambda key: one(key, params.max_steps_in_episode)[1])(
            jax.random.split(key, n_episodes)
        )

    return evaluate


def trainer(algorithm: Any, key: jax.Array) -> tuple[Any, Any]:
    """The first training state, and ``(state, n) -> state`` after n more iterations, compiled."""

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state: Any, n: jax.Array) -> Any:
        return strong(jax.lax.fori_loop(0, n, lambda _, state: algorithm.train_iteration(state), state))

    state = jax.block_until_ready(jax.jit(lambda key: strong(algorithm.init_state(key)))(key))
    return state, advance.lower(state, np.int32(0)).compile()


def run(job: record.Job, clock: record.Clock) -> record.Row:
    """Trains in chunks, and evaluates the sampled policy between them."""
    config, total, settings = settings_of(job)
    algorithm = algorithm_of(job, config, total)
    steps = algorithm.num_envs * algorithm.num_steps
    n_iterations = -(-total // steps)
    key, evaluate_key = jax.random.split(jax.random.PRNGKey(job["seed"]))
    state, train = trainer(algorithm, key)
    clock.lap("compile")
    evaluate = evaluator(algorithm, record.CURVE_EPISODES)
    curve, done, every = [], 0, record.every(n_iterations)
    while done < n_iterations:
        n = min(every, n_iterations - done)
        state = jax.block_until_ready(train(state, np.int32(n)))
        done += n
        clock.lap("train")
        returns = np.asarray(evaluate(state, jax.random.fold_in(evaluate_key, done))).tolist()
        clock.lap("evaluate")
        curve.append(record.point(clock, done * steps, 0, returns))
    final = np.asarray(evaluator(algorithm, record.FINAL_EPISODES)(state, evaluate_key))
    weights = jax.tree.leaves((state.actor_ts.params, state.critic_ts.params))
    clock.lap("evaluate")
    device = jax.devices()[0]
    return record.row(
        job,
        clock,
        settings=settings,
        config={**config, "num_envs": algorithm.num_envs, "num_steps": algorithm.num_steps},
        total_timesteps=total,
        curve=curve,
        final_returns=final.tolist(),
        packages=PACKAGES,
        nonfinite=not all(bool(jnp.isfinite(leaf).all()) for leaf in weights),
        device=(device.platform, device.device_kind),
    )


if __name__ == "__main__":
    record.measure(JOB, PATH, run)
