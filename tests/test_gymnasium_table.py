"""The table of Gymnasium: its numbers on hand-made rows, when runs end, its settings, and its trading environment."""

import importlib
import inspect
import json
import math
import pathlib
import sys
import tomllib

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


def load(name):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


columns, runs, table, trading = map(
    load, ("gymnasium_columns", "gymnasium_runs", "gymnasium_table", "trading")
)

CURVE = [[100, 200, 1.0, 0.5, 10.0], [200, 600, 3.0, 1.0, 30.0], [300, 900, 5.0, 3.0, 20.0]]


def make_row(algo="grpo", env_id="CartPole-v1", curve=CURVE, **fields):
    row = {"settings": "defaults", "algo": algo, "id": env_id, "seed": 0, "total_timesteps": 300}
    row |= {"refused": None, "decision_steps": 300, "simulator_steps": 600, "cpu_seconds": 5.0}
    row |= {"compile_seconds": 2.0, "greedy_return": 21.0, "sampled_return": 19.0, "dynamics": None}
    row |= {"said": [], "warnings": [], "versions": {"jax": "0"}, "machine": {"cpus": 1, "platform": "x"}}
    return row | {"curve": curve} | fields


def straight(last, slope=1.0, seconds=10.0, steps=300):
    """A curve of 10 points up to a return, at an equal pace in steps and seconds."""
    return [
        [steps * k / 10, 3 * steps * k / 10, seconds * k / 10, seconds * k / 20, last - slope * (10 - k)]
        for k in range(1, 11)
    ]


def ppo_and(grpo, ppo=100.0, env_id="CartPole-v1", **fields):
    return [
        make_row("ppo", env_id, straight(ppo), cpu_seconds=10.0),
        make_row("grpo", env_id, grpo, **fields),
    ]


def test_what_a_run_had_reached_by_when():
    bar = columns.Bar(target=25.0, seconds=4.0, total_timesteps=250)
    assert columns.measures(make_row(), bar) == {
        "equal_steps": 25.0,
        "equal_seconds": 25.0,
        "equal_no_compile": 20.0,
        "steps_then": 250.0,
        "all_steps_then": 750.0,
        "seconds_to_target": 3.0,
        "no_compile_to_target": 1.0,
        "steps_to_target": 200.0,
    }
    assert columns.measures(make_row(), bar._replace(seconds=1.5))["equal_seconds"] == 15.0
    assert columns.measures(make_row(), bar._replace(seconds=1.5))["equal_no_compile"] == 27.5


def test_ppo_is_taken_at_its_end():
    found = columns.measures(make_row("ppo"), columns.Bar(30.0, 4.0, 250))
    assert (found["equal_seconds"], found["equal_no_compile"]) == (20.0, 20.0)
    assert (found["steps_then"], found["all_steps_then"], found["equal_steps"]) == (300, 900, 25.0)


def test_steps_and_returns_that_were_not_reached():
    found = columns.measures(make_row(), columns.Bar(30.5, 4.0, 301))
    assert found["equal_steps"] is None and found["equal_seconds"] == 25.0
    assert found["seconds_to_target"] == found["steps_to_target"] == math.inf


def test_the_bar_is_the_median_of_ppo():
    ppo = [
        make_row("ppo", curve=[[300, 300, 9.0, 9.0, x]], cpu_seconds=s) for x, s in ((1, 9), (5, 7), (4, 8))
    ]
    assert columns.bar_of(ppo) == (4.0, 8.0, 300)


def test_a_run_without_a_return_is_the_worst_and_the_slowest():
    bar = columns.Bar(25.0, 4.0, 250)
    found = [make_row(curve=[]), make_row(curve=[]), make_row()]
    assert columns.middle(found, bar, "equal_seconds") == -math.inf
    assert columns.middle(found, bar, "seconds_to_target") == math.inf


@pytest.mark.parametrize(
    ("ours", "theirs", "word"),
    [
        (500, 495, "level"),
        (500, 494, "ahead"),
        (-200, -200, "level"),
        (-85, -100, "ahead"),
        (-103, -100, "behind"),
        (0, 0, "level"),
        (0.1, 0, "ahead"),
        (-math.inf, -500, "behind"),
        (-math.inf, -math.inf, "level"),
    ],
)
def test_who_is_ahead(ours, theirs, word):
    assert columns.compare(ours, theirs) == word


def test_goals_are_counted():
    results = [
        # At PPO's 100 after 4 of its 10 seconds, 2 without compiling, and after 120 of its 300 steps.
        *ppo_and(straight(106.0), dynamics="twin"),
        # Level at the end, and as late as PPO.
        *ppo_and(straight(100.0), env_id="Acrobot-v1", dynamics="clone"),
        # Twice as dear: behind at equal seconds, ahead with the same without compiling, never at PPO's return in half the time.
        *ppo_and(straight(104.0, 2.0, seconds=20.0), env_id="Pendulum-v1", dynamics="episodes"),
        # A fourth of the steps and of the seconds.
        *ppo_and(straight(100.0, seconds=2.5, steps=75), env_id="Taxi-v4", dynamics="clone"),
        make_row("grpo", "Hopper-v5", straight(1000.0)),  # PPO has no row: not compared
    ]
    text = "\n".join(columns.goals(results, "defaults"))
    assert "Of 4 environments" in text
    assert "compiling included: ahead on 1 (goal: 12 of 16), level on 2, behind on 1 (Pendulum-v1)" in text
    assert "without compiling: ahead on 2 (goal: 12 of 16), level on 2, behind on 0 (goal: 0)" in text
    assert (
        "took to it on 2 (CartPole-v1, Taxi-v4) (goal: 10); of the CPU seconds that PPO ran for, on 2."
        in text
    )
    assert "Clones or twins were used on 3: PPO's final return in at most a third" in text
    assert "took to it on 1 (Taxi-v4) (goal: all of them)." in text
    assert "auto" not in text and "LunarLander" not in text


def test_never_is_not_half_of_never():
    seeds = [
        make_row("ppo", curve=straight(x), cpu_seconds=10.0) for x in (100.0, 0.0)
    ]  # target 50: one gets there
    text = "\n".join(columns.goals([*seeds, make_row(curve=straight(0.0), dynamics="clone")], "defaults"))
    assert "took to it on 0 (goal: 10); of the CPU seconds that PPO ran for, on 0." in text
    assert "took to it on 0 (goal: all of them)" in text


@pytest.mark.parametrize(("seconds", "counted"), [(4.9, 1), (5.1, 0)])
def test_where_ppo_never_is_at_its_median_its_whole_run_counts(seconds, counted):
    seeds = [make_row("ppo", curve=straight(x), cpu_seconds=10.0) for x in (100.0, 0.0)]  # target 50
    ours = make_row("grpo", curve=straight(50.0, seconds=seconds), dynamics="clone")
    text = "\n".join(columns.goals([*seeds, ours], "defaults"))
    assert f"took to it on {'1 (CartPole-v1)' if counted else '0'} (goal: 10)" in text


@pytest.mark.parametrize(
    ("clone", "episodes", "counted"), [(105, 50, 1), (112, 50, 0), (50, 112, 0), (None, 99, 1)]
)
def test_auto_against_both(clone, episodes, counted):
    refused = {"refused": "threads", "curve": []} if clone is None else {"curve": straight(clone)}
    others = [make_row("grpo-clone", **refused), make_row("grpo-episodes", curve=straight(episodes))]
    text = "\n".join(columns.goals([*ppo_and(straight(100.0)), *others], "defaults"))
    assert f"at equal seconds on {'1 (CartPole-v1)' if counted else '0'} of 1" in text


@pytest.mark.parametrize("kind", ["clone", "episodes"])
def test_what_auto_chose_needs_no_row_of_its_own(kind):
    other = {"clone": "episodes", "episodes": "clone"}[kind]
    results = [*ppo_and(straight(100.0), dynamics=kind), make_row(f"grpo-{other}", curve=straight(50))]
    assert "at equal seconds on 1 (CartPole-v1) of 1" in "\n".join(columns.goals(results, "defaults"))


def test_the_lander_needs_the_steps_and_the_seconds():
    def lands(steps, seconds):
        return make_row(
            "grpo", "LunarLander-v3", [[steps - 1, 0, 0.5, 0.5, 0.0], [steps, 0, seconds, seconds, 200.0]]
        )

    ppo = make_row("ppo", "LunarLander-v3", straight(90.0), cpu_seconds=80.0, total_timesteps=150_000)
    seeds = [lands(50_000, 80.0), lands(50_001, 60.0), lands(40_000, 81.0)]
    (line,) = columns.lander([ppo, *seeds], "defaults")
    assert "50,000 decision steps: 2 of 3 seeds" in line
    assert line.endswith("PPO's 80.0 for 150,000 steps as well: 1.")


def test_the_report_keeps_what_is_missing_in_sight(tmp_path):
    short = make_row(
        curve=straight(90.0, steps=200), said=["GRPO: all"], warnings=["\x1b[33mWARN: of Gymnasium"]
    )
    refused = make_row("grpo-clone", refused="threads", curve=[])
    results = [*ppo_and(straight(104.0), dynamics="clone"), short, refused]
    zoo = [row | {"settings": "zoo"} for row in ppo_and([], env_id="Hopper-v5")]
    text = table.table(results + zoo)
    assert "| CartPole-v1 | GRPO | clone | 2 | not reached by 1 of 2 | 97.0 (90.0 to 104) |" in text
    assert "CartPole-v1, GRPO, dynamics='clone': refused: threads" in text and "SBX has no rows" in text
    assert "- CartPole-v1, GRPO: GRPO: all\n" in text and "WARN" not in text
    assert "| Hopper-v5 | GRPO |  | 1 | not reached by 1 of 1 | not reached by 1 of 1 |" in text
    assert "FrozenLake-v1, Taxi-v4, Trading-v0" in text
    table.draw(results + zoo, tmp_path / "curves.png")
    assert {path.name for path in tmp_path.iterdir()} == {"curves-defaults-1.png", "curves-zoo-1.png"}


def test_bands_are_where_every_seed_has_a_curve():
    other = [[150, 0, 2.0, 2.0, 10.0], [250, 0, 4.0, 4.0, 50.0]]
    x, middle, low, high = np.array(table.band([make_row(), make_row(curve=other)], columns.STEP))
    np.testing.assert_allclose(x, [150, 200, 250])
    np.testing.assert_allclose((middle, low, high), [[15, 30, 37.5], [10, 30, 25], [20, 30, 50]])


class Model:
    """What a callback sees of a model."""

    def __init__(self, n_episodes):
        self.num_timesteps, self.simulator_steps = 0, 50
        self.ep_info_buffer = [{"r": float(i)} for i in range(n_episodes)]


@pytest.fixture
def clock(monkeypatch):
    """CPU seconds that a test sets."""
    now = {"seconds": 100.0}
    monkeypatch.setattr(runs, "cpu_seconds", lambda: now["seconds"])
    monkeypatch.setitem(runs._compiling, "seconds", 7.0)
    return now


def play(curve, clock, step, seconds, starts_rollout=False):
    curve.num_timesteps = step
    clock["seconds"] = 100.0 + seconds
    if starts_rollout:
        curve._on_rollout_start()
    return curve._on_step()


def test_a_run_ends_with_a_rollout_once_it_has_steps_and_seconds(clock):
    curve = runs.Curve(1000, budget=10.0)
    curve.model = Model(0)
    assert play(curve, clock, 900, 11.0, True)  # too few steps
    assert play(curve, clock, 1001, 11.0)  # within a rollout
    assert not play(curve, clock, 1002, 11.0, True)


def test_a_run_goes_on_while_seconds_are_left(clock):
    curve = runs.Curve(1000, budget=10.0)
    curve.model = Model(0)
    assert play(curve, clock, 2000, 9.9, True) and play(curve, clock, 3000, 9.9, True)
    assert not play(curve, clock, 4000, 10.0, True)


def test_a_run_ends_at_the_cap_and_compiling_does_not_count(clock, monkeypatch):
    curve = runs.Curve(1000, budget=10.0)
    curve.model = Model(0)
    assert play(curve, clock, 10, 12.4) and not play(curve, clock, 11, 12.5)
    monkeypatch.setitem(runs._compiling, "seconds", 12.0)
    assert play(curve, clock, 12, 17.4) and not play(curve, clock, 13, 17.5)


def test_points_hold_the_last_episodes(clock, monkeypatch):
    curve = runs.Curve(1000, budget=None)
    curve.model = Model(4)
    play(curve, clock, 10, 1.0)
    assert curve.points == []  # of too few episodes
    curve.model = Model(30)
    monkeypatch.setitem(runs._compiling, "seconds", 7.5)
    assert play(curve, clock, 20, 2.0) and play(curve, clock, 25, 500.0)  # 1% is not over; no budget, no cap
    assert curve.points == [[20, 70, 2.0, 1.5, 19.5]]


def test_others_get_the_seconds_of_ppo(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "run", lambda **job: job)
    arguments = ("defaults", "grpo", "CartPole-v1", 0, 300, str(tmp_path), "")
    with pytest.raises(SystemExit, match="run --algos ppo first"):
        table.train(*arguments)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.json").write_text(json.dumps(make_row("ppo", cpu_seconds=12.5)))
    assert table.train(*arguments)["budget"] == 12.5
    assert table.train("defaults", "ppo", *arguments[2:])["budget"] is None


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    table.check_packages(["CartPole-v1", "Taxi-v4", trading.ID])
    for env_id, package in (
        ("BipedalWalker-v3", "box2d"),
        ("HalfCheetah-v5", "mujoco"),
        ("ALE/Pong-v5", "ale-py"),
    ):
        with pytest.raises(SystemExit, match=package):
            table.check_packages([env_id])


def test_settings_are_those_of_the_zoo():
    rl_zoo = pytest.importorskip("rl_zoo3")
    yaml = importlib.import_module("yaml")
    path = pathlib.Path(inspect.getfile(rl_zoo)).parent / "hyperparams" / "ppo.yml"
    theirs = yaml.safe_load(path.read_text())
    ours = tomllib.loads((BENCHMARKS / "peers" / "zoo.toml").read_text())
    assert set(ours) <= set(runs.STEPS)
    for env_id in runs.STEPS:
        older = [env_id.replace("-v5", f"-v{i}") for i in (4, 2)]
        name = next(
            (
                one
                for one in (env_id, *older, "atari")
                if one in theirs and ("ALE" in env_id or one != "atari")
            ),
            None,
        )
        assert (name is None) == (env_id not in ours), env_id
        if name is None:
            continue
        expected, found = dict(theirs[name]), dict(ours[env_id])
        kwargs = expected.pop("policy_kwargs", "dict()")
        kwargs = eval(kwargs.replace("nn.ReLU", "'relu'").replace("\n", ""), {"dict": dict})
        assert found.pop("policy_kwargs", {}) == kwargs, env_id
        total = expected.pop("n_timesteps")
        assert found.pop("zoo_timesteps", found.pop("total_timesteps")) == total, env_id
        for key in ("policy", "env_wrapper", "frame_stack"):
            expected.pop(key, None)
        found.pop("total_timesteps", None)
        assert found == expected, env_id


def test_ids_are_those_of_gymnasium():
    optional = {env_id for env_id in runs.STEPS if env_id.startswith("ALE/")}
    assert len(runs.STEPS) == 16 and set(runs.STEPS) - optional <= set(gymnasium.registry)


@pytest.mark.filterwarnings("ignore:.*infinity")
def test_the_trading_environment_keeps_its_word():
    check_env(gymnasium.make(trading.ID).unwrapped, skip_render_check=True)
    env = gymnasium.make(trading.ID)
    observation, _ = env.reset(seed=0)
    total, steps, ended = 0.0, 0, False
    while not ended:
        held, newest = observation[-1], observation[-2]
        position = int(np.sign(newest)) if abs(newest) > 0.4 else int(held)
        observation, reward, terminated, ended, _ = env.step(position + 1)
        earned = position * observation[-2] * trading.NOISE - trading.COST * abs(position - held)
        assert reward == pytest.approx(100 * earned, abs=1e-5) and not terminated
        total, steps = total + reward, steps + 1
    assert steps == trading.EPISODE_STEPS and total > 50  # what momentum pays; a coin loses the costs
