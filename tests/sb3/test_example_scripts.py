"""Every script of ``examples/`` runs in a short form, prints what it promises and writes what it says."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sb3_bridge import GRPO

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def load(name):
    """A script as a module; unlike ``runpy``, under a name that TorchScript can write."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(capsys):
    """Runs a script in this process; returns what it printed."""

    def run(name, *arguments):
        load(name).main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run


def alone(name, *arguments):
    """Runs a script in a process of its own; returns what it printed."""
    command = [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_says_what_it_shows_and_how_to_run_it(name):
    told = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8")))
    assert re.search(r"python (examples/|-m )", told) or name == "cartpole_sb3"
    for page in ("README.md", "README.ja.md"):
        assert (EXAMPLES / page).read_text(encoding="utf-8").count(f"({name}.py)") == 1


def test_drop_in(run, tmp_path):
    printed = run("drop_in", "--timesteps", 5_120, "--out", tmp_path)
    log = {"tensorboard_log": None}
    assert re.search(r"best model: \d+\.\d \+- \d+\.\d of 500", printed)
    assert GRPO.load(tmp_path / "last_model", **log).num_timesteps == 5_120
    assert GRPO.load(tmp_path / "checkpoints" / "grpo_5000_steps", **log).num_timesteps == 5_000
    assert (tmp_path / "evaluations.npz").is_file() and list(tmp_path.rglob("events.out.tfevents*"))
    assert f"{tmp_path / 'best_model.zip'}" in printed


def test_rl_zoo(tmp_path):
    alone("rl_zoo", "--n-timesteps", 256, "--eval-freq", -1, "--log-folder", tmp_path)
    assert (
        GRPO.load(tmp_path / "grpo" / "CartPole-v1_1" / "CartPole-v1.zip", allow_pickle=True).num_timesteps
        == 256
    )


def test_sweep(run):
    printed = run("sweep", "--timesteps", 512, "--seeds", 2, "--trials", 4)
    assert len(re.findall(r"^ +\S+ +0\.9\d? +\d+ \(\d+ to \d+\)$", printed, re.MULTILINE)) == 6
    assert re.search(r"best: {'learning_rate': .*'gamma': ", printed)
    is_missing = importlib.util.find_spec("optuna") is None
    assert ("Optuna is not installed" in printed) == is_missing
    assert ("Optuna, 4 settings: " in printed) != is_missing


def test_custom_world(run):
    returns = [
        float(one) for one in re.findall(r"return (-\d\.\d+)", run("custom_world", "--timesteps", 20_480))
    ]
    assert len(returns) == 2 and returns[0] < -0.3 < returns[1]  # a crash, and nearly none


def test_masks(run):
    shares = [
        float(one) for one in re.findall(r"(\d+\.\d)% of the value", run("masks", "--timesteps", 3_072))
    ]
    assert len(shares) == 2 and 60 < shares[0] < shares[1] - 3 < 97  # random moves, and the policy


def test_export(run, tmp_path):
    printed = run("export", "--timesteps", 512, "--out", tmp_path)
    assert "torch: all 1,000 actions are equal" in printed
    assert re.search(r"TorchScript, .*policy\.pt: all 1,000 actions are equal", printed)
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        assert f"ONNX: left out, {' and '.join(missing)} not installed" in printed
        pytest.skip(f"{' and '.join(missing)} not installed")
    assert re.search(r"ONNX, .*policy\.onnx: all 1,000 actions are equal", printed)


def test_export_sees_a_difference():
    check = load("export").check
    with pytest.raises(SystemExit, match="torch: 1 of 3 actions differ"):
        check("torch", np.array([0, 1, 1]), np.array([0, 1, 0]))


def test_multi_device():
    printed = alone("multi_device", "--timesteps", 512, "--devices", 4)
    assert re.search(r"^4 devices: return \d+ of 500", printed, re.MULTILINE) and "\n1 devices: " in printed
    assert float(re.search(r"largest difference of a parameter: (\S+)", printed)[1]) < 1e-5
