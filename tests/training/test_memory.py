"""Memory: the estimate is that of the compiled program, and limits are kept to without changing a number."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from toys import Line

import grpo_jax
from grpo_jax.spaces import Discrete
from grpo_jax.training.memory import bounded, memory, size
from grpo_jax.training.run import _chunk

SMALL = grpo_jax.GRPOConfig(n_envs=8, n_steps=4, batch_size=16, n_epochs=1, horizon=4, net_arch=(8,))


@pytest.mark.parametrize("max_branches", [0, 1 << 16])
def test_the_estimate_is_near_what_the_compiled_program_takes(only_on_a_cpu, real_compiles, max_branches):
    env = grpo_jax.make("CartPole-v1")
    config = SMALL.replace(n_envs=2048, n_steps=16, batch_size=8192, horizon=50, net_arch=(64, 64))
    config = config.replace(max_branches=max_branches)
    state = jax.eval_shape(lambda: grpo_jax.init(config, env, jax.random.key(0)))
    program = _chunk.lower(config, env, state, np.int32(0), np.int32(9), None, False, None).compile()
    taken = program.memory_analysis()
    measured = taken.argument_size_in_bytes + taken.output_size_in_bytes + taken.temp_size_in_bytes
    estimated = memory(config, env)
    assert 0.7 < estimated.total / measured < 1.6, (measured, estimated)
    assert estimated.n_branches == (max_branches or 4096)


def test_a_limit_lowers_branches_and_blocks_and_changes_no_number():
    env, key = Line(Discrete(2)), jax.random.key(0)
    wide = SMALL.replace(horizon=400)
    need = memory(wide, env)
    assert need.branch * need.n_branches > need.update
    limit = need.total - need.branch * need.n_branches // 2
    narrow, block = bounded(wide, env, limit)
    assert 0 < narrow.max_branches <= need.n_branches // 2 and block == 1
    assert memory(narrow, env).total <= limit
    steps = 3 * SMALL.n_states
    ends = [grpo_jax.run(wide, env, key, steps, memory_limit=bound)[0] for bound in (None, limit)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ends[0].params, ends[1].params)

    of_eight = memory(SMALL, env, n_agents=8, block=8)
    config, block = bounded(SMALL, env, of_eight.total - 1, n_agents=8)
    assert block < memory(SMALL, env, n_agents=8).block and config == SMALL
    with pytest.raises(ValueError, match="memory_limit"):  # a block that was asked for is not changed
        bounded(SMALL, env, of_eight.state + 1, n_agents=8, block=8)


def test_shards_and_agents_lie_in_parts_on_the_devices():
    env = Line(Discrete(2))
    devices = np.array(jax.devices() * 2)
    mesh = jax.sharding.Mesh(devices, ("devices",))
    config = SMALL.replace(n_envs=64, batch_size=64, n_shards=4)
    whole, half = memory(config, env), memory(config, env, mesh=mesh)
    assert half.n_branches == whole.n_branches // 2
    assert half.total < whole.total
    apart = memory(SMALL, env, n_agents=4, block=2, mesh=mesh)
    assert apart.state == memory(SMALL, env, n_agents=2, block=2).state


@pytest.mark.parametrize(
    ("changes", "named"),
    [({}, "n_envs"), ({"candidates": "episodes"}, "update"), ({"n_shards": 2}, "batch_size")],
)
def test_what_cannot_fit_is_refused_with_its_numbers(changes, named):
    env = Line(Discrete(2))
    with pytest.raises(ValueError, match=rf"memory_limit=0.0 MiB is less than .*{named}"):
        grpo_jax.run(SMALL.replace(**changes), env, jax.random.key(0), 64, memory_limit="1kB")
    with pytest.raises(ValueError, match="memory_limit=0.0 MiB is less than"):
        grpo_jax.sweep(SMALL, env, jax.random.key(0), 64, memory_limit=1000, learning_rate=[0.1, 0.2])


def test_more_decision_states_than_an_iteration_can_count_are_refused():
    with pytest.raises(ValueError, match=r"n_envs=268435456 times n_steps=8 must be less than 2\*\*31"):
        grpo_jax.run(SMALL.replace(n_envs=1 << 28, n_steps=8), Line(Discrete(2)), jax.random.key(0), 1 << 31)


def test_sizes():
    assert [size(text) for text in ("8GiB", "1.5 MB", "100", 7, "2kib")] == [8 << 30, 1_500_000, 100, 7, 2048]
    for bad in ("", "8 bananas", "-1", 0, True, "GiB", "1.2.3"):
        with pytest.raises(ValueError, match=r"memory_limit=.* must be bytes"):
            size(bad)
