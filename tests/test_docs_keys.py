"""The page of metrics knows every key that is logged, and no other, in both languages."""

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stable_baselines3.common.logger import KVWriter, Logger
from toys import Line

from grpo_jax.config import GRPOConfig
from grpo_jax.learning.model import init_model, measure
from grpo_jax.spaces import Box, Discrete
from grpo_jax.training.iterate import iteration
from grpo_jax.training.loop import init
from sb3_bridge import GRPO, update

DOCS = Path(__file__).parents[1] / "docs"
BY_SB3 = {"rollout/success_rate"}
"""What SB3 itself logs, where an environment tells of success."""


@pytest.fixture(params=["diagnosis.md", "diagnosis.ja.md"])
def documented(request) -> tuple[set[str], set[str]]:
    """Keys of ``grpo_jax`` and of SB3's log that begin rows of the page's tables."""
    text = (DOCS / request.param).read_text("utf-8")
    rows = re.findall(r"^\| ((?:`[a-z0-9_/]+`(?:, )?)+) \|", text, re.MULTILINE)
    keys = {key for row in rows for key in re.findall(r"`([^`]+)`", row)}
    return {key for key in keys if "/" not in key}, {key for key in keys if "/" in key}


class Keys(KVWriter):
    """Remembers what was written."""

    def __init__(self):
        self.seen: set[str] = set()

    def write(self, key_values, key_excluded, step=0):
        self.seen |= set(key_values)

    def close(self):
        pass


@functools.cache
def core_metrics() -> dict:
    config = GRPOConfig(n_envs=2, n_steps=4, horizon=2, batch_size=8, bootstrap=True, kl_coef=0.1)
    world = Line(Discrete(2))
    state = jax.eval_shape(lambda key: init(config, world, key), jax.eval_shape(lambda: jax.random.key(0)))
    return jax.eval_shape(lambda state: iteration(config, world, state, 1)[1], state)


def world_metrics() -> dict:
    """What a learned world is measured by."""
    space = Box(np.zeros(2), np.ones(2), (2,))
    key = jax.eval_shape(lambda: jax.random.key(0))
    model = jax.eval_shape(lambda key: init_model(space, Discrete(2), key, capacity=4), key)
    seen = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((3, 1, *leaf.shape[1:]), leaf.dtype), model.replay.data
    )
    return jax.eval_shape(lambda world, seen: measure(world, seen, 2), model.world, seen)


def test_keys_of_the_core(documented):
    core, _ = documented
    assert core == set(core_metrics())


def test_keys_behind_sb3s_api(documented):
    """``record`` with all that it may be told of, and a run for what SB3 adds."""
    _, told = documented
    writer = Keys()
    config = GRPOConfig(bootstrap=True, clip_range_vf=0.2, kl_coef=0.1)
    policy = SimpleNamespace(state=SimpleNamespace(params={"actor": {"log_std": jnp.zeros(2)}}))
    world = dict.fromkeys(world_metrics(), 0.0)
    logger = Logger(None, [writer])
    update.record(logger, config, dict.fromkeys(core_metrics(), np.float32(0)), policy, world)
    logger.dump()
    every = writer.seen | ran()
    assert told == every | BY_SB3


@functools.cache
def ran() -> set[str]:
    """Keys of a short run."""
    writer = Keys()
    model = GRPO(
        "MlpPolicy", "Pendulum-v1", candidates="episodes", n_steps=200, n_epochs=1, batch_size=200, seed=0
    )
    model.set_logger(Logger(None, [writer]))
    model.learn(400)
    return writer.seen
