"""The command line in a game: self-play, whom a policy is evaluated against, and the game's own pictures."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import grpo_jax
from grpo_jax.cli import main, recorder
from grpo_jax.cli.runs import Run, RunDirectory
from grpo_jax.spaces import Box, Discrete

SMALL = ["--n-envs", "4", "--n-steps", "4", "--batch-size", "16", "--n-epochs", "1", "--horizon", "1"]
SMALL += ["--net-arch", "8", "--learning-rate", "0.05"]
STATES = 16
"""Decision states of an iteration."""


def uniform(params: Any, key: jax.Array, observation: Any, action_mask: Any) -> jax.Array:
    return jax.random.randint(key, (), 0, 3)


@struct.dataclass
class Highest(grpo_jax.World):
    """Both name a number at once; the higher one wins. The picture is white, and black once a number was named."""

    opponent_params: Any = None
    opponent: Any = struct.field(pytree_node=False, default=uniform)
    observation_space = Box(0.0, 1.0, (1,))
    action_space = Discrete(3)

    def reset(self, key):
        return jnp.ones(1), jnp.int32(0)

    def step(self, key, state, action):
        other = self.opponent(self.opponent_params, key, jnp.ones(1), None)
        reward = jnp.sign(action - other).astype(jnp.float32)
        return grpo_jax.Step(jnp.ones(1), state + 1, reward, jnp.bool_(True), jnp.bool_(False))

    def picture(self, state):
        return np.full((30, 40, 3), 255 if state == 0 else 0, np.uint8)


@pytest.fixture(autouse=True)
def games(monkeypatch):
    """A suite of two environments, called pgx."""
    made = {"highest": Highest, "alone": lambda: grpo_jax.make("CartPole-v1")}
    suite = types.SimpleNamespace(ids=lambda: tuple(made), from_id=lambda name: made[name]())
    monkeypatch.setitem(sys.modules, "grpo_jax.worlds.pgx", suite)


def train(out: Path, *arguments: str, iterations: int = 9, game: str = "highest") -> int:
    total = str(iterations * STATES)
    command = ["train", f"pgx/{game}", "--out", str(out), "--total-timesteps", total, "--no-cache"]
    return main([*command, *SMALL, *arguments])


def state_of(out: Path) -> grpo_jax.TrainState:
    directory = RunDirectory(out)
    state = directory.restore(directory.read())[1]
    assert state is not None
    return state


def policy_of(out: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state_of(out).learner.policy)]


def test_self_play_that_was_stopped_ends_like_one_that_was_not(tmp_path, monkeypatch):
    """A signal in mid-game waits until the opponent is the policy, which a checkpoint then holds."""
    whole, parts, alone = (tmp_path / name for name in ("whole", "parts", "alone"))
    every = ["--opponent-every", "4", "--checkpoint-every", "3"]
    assert train(whole, *every) == 0
    run = RunDirectory(whole).read()
    expected, _ = grpo_jax.run(
        run.config,
        Highest(),
        jax.random.key(0),
        run.total_timesteps,
        opponent_every=4,
        callback=lambda _: True,
    )
    for mine, other in zip(policy_of(whole), jax.tree.leaves(expected.learner.policy), strict=True):
        np.testing.assert_array_equal(mine, other)

    record = recorder.Recorder.__call__
    with monkeypatch.context() as patch:

        def pressed(self, chunk, rates):
            record(self, chunk, rates)
            if chunk.iteration == 3:
                import signal

                signal.raise_signal(signal.SIGINT)

        patch.setattr(recorder.Recorder, "__call__", pressed)
        assert train(parts, *every) == 130
    assert int(state_of(parts).iteration) == 4
    assert main(["resume", str(parts), "--no-cache"]) == 0
    for mine, other in zip(policy_of(parts), policy_of(whole), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert (parts / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()

    assert train(alone) == 0
    assert any((a != b).any() for a, b in zip(policy_of(alone), policy_of(whole), strict=True))


def test_a_killed_run_goes_on_from_where_the_opponent_was_the_policy(tmp_path, monkeypatch):
    saved: list[int] = []
    checkpoint = recorder.Recorder.checkpoint

    def counted(self, state, *arguments):
        saved.append(int(state.iteration))
        checkpoint(self, state, *arguments)

    monkeypatch.setattr(recorder.Recorder, "checkpoint", counted)
    assert train(tmp_path, "--opponent-every", "4", "--checkpoint-every", "1", iterations=10) == 0
    assert saved == [0, 4, 8, 10]


def test_a_run_says_whether_it_is_self_play(tmp_path):
    config = grpo_jax.GRPOConfig()
    plain, mine = (Run("pgx/highest", config, 0, 1, 512, opponent_every=every) for every in (None, 3))
    assert "opponent_every" not in plain.to_json()  # older versions read it
    for run in (plain, mine):
        assert Run.from_json(run.to_json()) == (run, True)


@pytest.mark.parametrize(
    ("arguments", "game", "named"),
    [
        (["--opponent-every", "0"], "highest", "opponent_every=0 must be an integer of at least 1"),
        (["--opponent-every", "2", "--n-seeds", "2"], "highest", "opponent_every=2, n_seeds=2: in self-play"),
        (["--opponent-every", "2"], "alone", "has no opponent: self-play needs a game of two"),
    ],
)
def test_what_cannot_be_self_play_is_refused_before_anything_is_written(
    arguments, game, named, tmp_path, capsys
):
    assert train(tmp_path / "run", *arguments, game=game) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_policy_is_evaluated_against_random_moves_and_against_itself(tmp_path, capsys):
    assert train(tmp_path, "--opponent-every", "5", iterations=60) == 0

    def mean(*arguments: str) -> float:
        capsys.readouterr()
        command = ["evaluate", str(tmp_path), "--n-episodes", "512", "--no-cache", *arguments]
        assert main(command) == 0
        lines = capsys.readouterr().out.splitlines()
        return float(next(line for line in lines if line.startswith("  episodes")).split()[1])

    assert mean() == mean("--opponent", "random") == pytest.approx(2 / 3, abs=0.1)
    assert abs(mean("--opponent", "self")) < 0.15
    assert mean("--opponent", "self", "--deterministic") == 0
    assert main(["evaluate", str(tmp_path), "--opponent", "nobody"]) == 2


def test_nobody_to_play_against(tmp_path, capsys):
    assert train(tmp_path, game="alone", iterations=1) == 0
    assert main(["evaluate", str(tmp_path), "--opponent", "self", "--no-cache"]) == 2
    assert "has no opponent" in capsys.readouterr().err


def test_a_world_draws_itself(tmp_path):
    from PIL import Image

    assert train(tmp_path / "run", "--n-seeds", "2", iterations=1) == 0
    gif = tmp_path / "game.gif"
    command = ["evaluate", str(tmp_path / "run"), "--n-episodes", "2", "--render", str(gif), "--no-cache"]
    assert main([*command, "--opponent", "self"]) == 0
    with Image.open(gif) as image:
        assert image.size == (240, 180 + 36)  # whole pixels, and a caption
        assert image.convert("RGB").getpixel((100, 150)) == (0, 0, 0)
