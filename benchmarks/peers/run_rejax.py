"""One run of rejax's PPO on gymnax. Started by ``benchmarks/bench.py`` in the peer's virtual environment.

rejax evaluates within its one program. Here its own ``train_iteration`` runs in chunks and the evaluation is a program
of its own, so that the time of each can be told.
"""

import record

if __name__ == "__main__":
    JOB, PATH = record.read_job()  # before JAX makes its threads

import functools
import importlib.metadata
import pathlib
import tomllib
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import rejax
from rejax.evaluate import evaluate_single

GYMNAX = importlib.metadata.version("gymnax")
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
    """The environment and its parameters, in either version of gymnax."""
    env, params = gymnax.make(env_id)
    return (env, params) if GYMNAX.startswith("0.") else (OfGymnax1(env, params), params)


def settings_of(job: record.Job) -> tuple[dict[str, Any], int, str]:
    """Settings, decision steps and where they are from: rejax's own of that id, of its family, or its defaults."""
    tables = tomllib.loads(pathlib.Path(__file__).with_name("rejax.toml").read_text())
    family = job["env"].rsplit("-", 1)[1]
    known = next((tables[name] for name in (job["env"], family) if name in tables), tables["defaults"])
    config = {name: value for name, value in known.items() if name not in ("settings", "total_timesteps")}
    settings = known["settings"]
    if job.get("n_envs"):
        config["num_envs"], settings = job["n_envs"], f"{settings}, num_envs {job['n_envs']}"
    if not GYMNAX.startswith("0."):
        settings += f"; gymnax {GYMNAX} through an adapter"
    return config, job.get("total_timesteps") or known["total_timesteps"], settings


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


def run(job: record.Job, clock: record.Clock) -> record.Row:
    """Trains in chunks, and evaluates the sampled policy between them."""
    config, total, settings = settings_of(job)
    env, params = make(job["env"])
    algorithm = rejax.get_algo("ppo").create(env=env, env_params=params, **config)
    steps = algorithm.num_envs * algorithm.num_steps
    n_iterations = -(-total // steps)
    key, evaluate_key = jax.random.split(jax.random.PRNGKey(job["seed"]))

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state: Any, n: jax.Array) -> Any:
        return strong(jax.lax.fori_loop(0, n, lambda _, state: algorithm.train_iteration(state), state))

    state = jax.block_until_ready(jax.jit(lambda key: strong(algorithm.init_state(key)))(key))
    train = advance.lower(state, np.int32(0)).compile()
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
