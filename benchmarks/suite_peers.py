"""Peers in the environments of other suites: rejax's PPO, and the PPO that a suite ships. ``suite_presets.py`` runs them.

rejax' PPO plays our worlds: with its own settings where it has some for the id or for one of its family, and with those of our
episodes where it has none, then with PureJaxRL's start and optimizer (``peers/run_rejax.py``). It knows no masks, and what
it takes for an end may be a time limit. Brax' and Navix' own PPO play their own environments, with published settings.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import brax_ppo
import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces as gymnax_spaces

import grpo_jax
from grpo_jax import spaces

sys.path.insert(0, str(Path(__file__).with_name("peers")))

Row = dict[str, float]


class Job(NamedTuple):
    """One run: where, our settings of it, decision steps, seed, and episodes to judge it by."""

    env_id: str
    world: grpo_jax.World
    config: grpo_jax.GRPOConfig
    total_timesteps: int
    seed: int
    n_episodes: int


_BRAX = {
    "max_grad_norm": 0.5,
    "clip_eps": 0.2,
    "ent_coef": 0.01,
    "vf_coef": 0.5,
    "normalize_observations": True,
}
_CHEETAH = _BRAX | {
    "agent_kwargs": {"activation": "tanh"},
    "num_envs": 32,
    "num_steps": 32,
    "num_epochs": 2,
    "num_minibatches": 2,
    "learning_rate": 1.72e-3,
    "max_grad_norm": 5.0,
    "gamma": 0.99,
    "gae_lambda": 0.8,
}
REJAX: dict[str, dict[str, Any]] = {
    "brax/ant": _CHEETAH
    | {
        "num_envs": 64,
        "num_steps": 64,
        "num_epochs": 8,
        "num_minibatches": 16,
        "learning_rate": 1.084e-4,
        "max_grad_norm": 0.5,
        "gamma": 0.98,
    },
    "brax/halfcheetah": _CHEETAH,
    "brax/hopper": _CHEETAH
    | {"num_epochs": 9, "learning_rate": 2.567e-4, "max_grad_norm": 1.0, "gamma": 0.995, "gae_lambda": 0.95},
    "brax/reacher": _CHEETAH
    | {
        "num_envs": 128,
        "num_steps": 128,
        "num_epochs": 8,
        "num_minibatches": 64,
        "learning_rate": 2.752e-4,
        "max_grad_norm": 0.1,
        "gamma": 0.95,
        "gae_lambda": 0.95,
    },
    "navix/Navix-DoorKey-5x5-v0": _BRAX
    | {
        "num_envs": 128,
        "num_steps": 32,
        "num_epochs": 2,
        "num_minibatches": 32,
        "learning_rate": 3e-4,
        "max_grad_norm": 10.0,
        "gamma": 0.95,
        "gae_lambda": 0.9,
    },
    "navix/Navix-Empty-8x8-v0": _BRAX
    | {
        "num_envs": 64,
        "num_steps": 128,
        "num_epochs": 8,
        "num_minibatches": 1,
        "learning_rate": 3e-4,
        "max_grad_norm": 10.0,
        "gamma": 0.99,
        "gae_lambda": 0.8,
    },
}
"""rejax' own, from its configs (brax/*.yaml; of Navix those of DoorKey-8x8 and Empty-Random-8x8)."""

BRAX: dict[str, dict[str, Any]] = {
    "brax/inverted_pendulum": brax_ppo.ANT | {"num_envs": 2048, "batch_size": 1024}
}
"""Of Brax' training notebook. One iteration of the others there, and of those that Playground has for its ids, takes minutes on a
core: they are for a GPU (``brax_ppo.py``)."""


class _Params(NamedTuple):
    max_steps_in_episode: int


class OfWorld:
    """A world as rejax expects an environment: it starts over by itself, and what it shows is one array."""

    def __init__(self, world: grpo_jax.World) -> None:
        self.world, self.default_params = world, _Params(100_000)

    def __deepcopy__(self, memo: Any) -> OfWorld:  # rejax copies its settings, as it traces
        return self

    def _observe(self, observation: Any) -> jax.Array:
        leaves = [jnp.asarray(leaf, jnp.float32) for leaf in jax.tree.leaves(observation)]
        return leaves[0] if len(leaves) == 1 else jnp.concatenate([leaf.ravel() for leaf in leaves])

    def reset(self, key: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        observation, state = self.world.reset(key)
        return self._observe(observation), state

    def step(self, key: jax.Array, state: Any, action: jax.Array, params: Any) -> tuple[Any, ...]:
        key, reset_key = jax.random.split(key)
        step = self.world.step(key, state, jnp.reshape(action, self.world.action_space.shape))
        done = step.terminated | step.truncated
        first = self.reset(reset_key, params)
        observation, state = jax.tree.map(
            lambda new, old: jnp.where(done, new, old), first, (self._observe(step.observation), step.state)
        )
        return observation, state, step.reward, done, {}

    def observation_space(self, params: Any) -> Any:
        shape = jax.eval_shape(lambda: self.reset(jax.random.key(0), params))[0].shape
        return gymnax_spaces.Box(-jnp.inf, jnp.inf, shape, jnp.float32)

    def action_space(self, params: Any) -> Any:
        space = self.world.action_space
        if isinstance(space, spaces.Box):
            return gymnax_spaces.Box(
                jnp.asarray(space.low), jnp.asarray(space.high), space.shape, jnp.float32
            )
        return gymnax_spaces.Discrete(int(np.prod(space.nvec)))


def translated(config: grpo_jax.GRPOConfig) -> dict[str, Any]:
    """Our settings of episodes as rejax names them."""
    return {
        "agent_kwargs": {"activation": config.activation},
        "num_envs": config.n_envs,
        "num_steps": config.n_steps,
        "num_epochs": config.n_epochs,
        "num_minibatches": config.n_states // config.batch_size,
        "learning_rate": config.learning_rate,
        "max_grad_norm": config.max_grad_norm,
        "gamma": config.gamma,
        "gae_lambda": config.gae_lambda,
        "clip_eps": config.clip_range,
        "ent_coef": config.ent_coef,
        "vf_coef": config.vf_coef,
    }


def rejax(job: Job) -> Row:
    """One run of rejax's PPO: steps, CPU seconds of training, return of the sampled policy."""
    import run_rejax
    from rejax.algos import PPO

    settings = dict(REJAX.get(job.env_id) or translated(job.config))
    steps = settings["num_envs"] * settings["num_steps"]
    n_iterations = max(1, job.total_timesteps // steps)
    env = OfWorld(job.world)
    if job.env_id in REJAX:
        algorithm = PPO.create(env=env, **settings)
    else:
        decay = n_iterations if job.config.learning_rate_decay == "linear" else None
        algorithm = run_rejax.LikePureJaxRL.create(env=env, n_iterations=decay, **settings)
    key, evaluate_key = jax.random.split(jax.random.PRNGKey(job.seed))
    state, train = run_rejax.trainer(algorithm, key)
    start = time.process_time()
    state = jax.block_until_ready(train(state, np.int32(n_iterations)))
    seconds = time.process_time() - start
    returns = run_rejax.evaluator(algorithm, job.n_episodes)(state, evaluate_key)
    return _row(n_iterations * steps, seconds, float(np.mean(returns)))


def own(job: Job) -> Row:
    """One run of the PPO that the suite ships, at least one of its iterations."""
    return _navix(job) if job.env_id.startswith("navix/") else _brax(job)


def has_own(env_id: str) -> bool:
    """Whether the suite ships a PPO that a CPU can run."""
    return env_id in BRAX or env_id.startswith("navix/")


def _brax(job: Job) -> Row:
    from brax.training.agents.ppo.train import train

    brax_ppo.mend_jax()
    settings = BRAX[job.env_id]
    steps = settings["batch_size"] * settings["num_minibatches"] * settings["unroll_length"]
    steps *= settings["action_repeat"]
    wanted = max(1, round(job.total_timesteps / steps))
    n_iterations = max(2, wanted)  # the first one compiles: the seconds are those of the others
    clock, seconds, returns = [0.0], [], []

    def trained(*_: Any) -> None:
        seconds.append(time.process_time() - clock[0])

    def judged(_: int, metrics: Any) -> None:
        returns.append(float(metrics["eval/episode_reward"]))
        clock[0] = time.process_time()

    train(
        job.world.world.env,
        num_timesteps=n_iterations * steps,
        num_evals=n_iterations + 1,
        num_eval_envs=job.n_episodes,
        seed=job.seed,
        progress_fn=judged,
        policy_params_fn=trained,
        **settings,
    )
    # Both are called once before training, too.
    return _row(wanted * steps, wanted * statistics.median(seconds[2:]), returns[wanted])


def _navix(job: Job) -> Row:
    import navix
    from navix.agents import PPO, PPOHparams, models

    env = navix.make(job.env_id.partition("/")[2])
    see, space = env.observation_fn, env.observation_space  # as one row: its network has dense layers
    env = env.replace(
        observation_fn=lambda state: jnp.ravel(see(state)),
        observation_space=space.replace(shape=(int(np.prod(space.shape)),)),
    )
    settings = PPOHparams(budget=job.total_timesteps)
    steps = settings.num_envs * settings.num_steps
    network = models.ActorCritic(action_dim=len(env.action_set))
    agent = PPO(hparams=settings, network=network, env=env)
    key, evaluate_key = jax.random.split(jax.random.PRNGKey(job.seed))
    train = jax.jit(lambda key: agent.train(key)[0].params).lower(key).compile()
    start = time.process_time()
    params = jax.block_until_ready(train(key))
    seconds = time.process_time() - start

    def play(key: jax.Array) -> jax.Array:
        def step(carry: Any, key: jax.Array) -> Any:
            timestep, is_over, total = carry
            policy = network.apply(params, timestep.observation, method="policy")
            new = env._step(timestep, policy.sample(seed=key))
            total += jnp.where(is_over, 0.0, new.reward)
            return (new, is_over | new.is_done(), total), None

        keys = jax.random.split(key, env.max_steps + 1)
        first = env.reset(keys[0])
        return jax.lax.scan(step, (first, jnp.asarray(False), jnp.asarray(0.0)), keys[1:])[0][2]

    returns = jax.jit(jax.vmap(play))(jax.random.split(evaluate_key, job.n_episodes))
    return _row(job.total_timesteps // steps * steps, seconds, float(np.mean(returns)))


def _row(steps: int, seconds: float, value: float) -> Row:
    return {
        "decision_steps": steps,
        "simulator_steps": 0,
        "cpu_seconds": round(seconds, 2),
        "return": round(value, 3),
    }
