"""CarRacing: a world of Box2D with 300 bodies, sets of bodies that wheels stand on, and pictures drawn from it."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from sb3.clones.kinds import play

from sb3_bridge.clones.snapshot import Cloner, CloneReport

pytest.importorskip("Box2D", reason="box2d is not installed")


def test_replicas_drive_and_draw_as_the_original_does_in_this_track_and_the_last():
    env, alone = gym.make("CarRacing-v3"), gym.make("CarRacing-v3")
    cloner = Cloner(env, CloneReport("attributes"))
    for one in (env, alone):
        one.reset(seed=1)
    actions = [np.array([0.4 * np.sin(t / 5), 0.9, 0.3 * (t % 9 == 0)], np.float32) for t in range(36)]
    kept, rows = [], []
    for t, action in enumerate(actions):
        if t % 12 == 0:
            kept.append((t, cloner.save()))
        rows += play(env, [action])
    assert play(alone, actions) == rows and len({row[1] for row in rows}) > 2
    env.reset()
    replica = cloner.replica()
    for start, snapshot in kept[::-1]:
        cloner.restore(replica, snapshot)
        assert play(replica.layers[0], actions[start : start + 12]) == rows[start : start + 12]
