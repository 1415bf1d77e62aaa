"""GRPO for control, in functional JAX. See README.md; the public names are those in ``__all__``."""

from grpo_jax import spaces
from grpo_jax._version import __version__
from grpo_jax.cache import enable_cache
from grpo_jax.config import GRPOConfig
from grpo_jax.counter import to_int as count
from grpo_jax.groups.advantage import Advantages, group_advantages
from grpo_jax.groups.branch import Branches, group_returns
from grpo_jax.groups.candidates import enumerate_actions, sample_actions
from grpo_jax.groups.plan import Plan
from grpo_jax.groups.trajectory import trajectory_advantages
from grpo_jax.learning import losses
from grpo_jax.learning.update import Learner, update
from grpo_jax.policies.policy import Policy, PolicyState, make_policy
from grpo_jax.presets import Expectation, preset, preset_expectation, preset_ids, preset_timesteps
from grpo_jax.shards import gather, make_mesh
from grpo_jax.training.checkpoint import restore, save
from grpo_jax.training.diagnose import NoSpreadWarning
from grpo_jax.training.evaluate import Episodes, evaluate, evaluate_episodes
from grpo_jax.training.faults import NonFiniteError
from grpo_jax.training.iterate import iteration
from grpo_jax.training.loop import TrainState, init
from grpo_jax.training.memory import Memory, memory
from grpo_jax.training.parts import restore_parts, save_parts
from grpo_jax.training.run import Chunk, run
from grpo_jax.training.self_play import against
from grpo_jax.training.sweep import Sweep, sweep
from grpo_jax.training.train import Result, train
from grpo_jax.types import Batch, Group, Step
from grpo_jax.worlds.base import World, override_reward
from grpo_jax.worlds.function import from_function
from grpo_jax.worlds.gymnax import GymnaxWorld
from grpo_jax.worlds.make import env_ids, make

__all__ = [
    "Advantages",
    "Batch",
    "Branches",
    "Chunk",
    "Episodes",
    "Expectation",
    "GRPOConfig",
    "Group",
    "GymnaxWorld",
    "Learner",
    "Memory",
    "NoSpreadWarning",
    "NonFiniteError",
    "Plan",
    "Policy",
    "PolicyState",
    "Result",
    "Step",
    "Sweep",
    "TrainState",
    "World",
    "__version__",
    "against",
    "count",
    "enable_cache",
    "enumerate_actions",
    "env_ids",
    "evaluate",
    "evaluate_episodes",
    "from_function",
    "gather",
    "group_advantages",
    "group_returns",
    "init",
    "iteration",
    "losses",
    "make",
    "make_mesh",
    "make_policy",
    "memory",
    "override_reward",
    "preset",
    "preset_expectation",
    "preset_ids",
    "preset_timesteps",
    "restore",
    "restore_parts",
    "run",
    "sample_actions",
    "save",
    "save_parts",
    "spaces",
    "sweep",
    "train",
    "trajectory_advantages",
    "update",
]
