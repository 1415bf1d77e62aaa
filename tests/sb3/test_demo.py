"""What ``make demo`` and ``python -m sb3_bridge.demo`` print, write and return."""

import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
from PIL import Image
from stable_baselines3.common.results_plotter import load_results

import sb3_bridge
from sb3_bridge import GRPO

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "cartpole_sb3.py"
FILES = ["0.monitor.csv", "cartpole.gif", "curve.png", "model.zip"]


def test_demo(tmp_path, capsys, real_compiles):
    out = tmp_path / "demo"
    # A run that is too short, in a process of its own: it fails, and says so, without any other noise.
    command = [sys.executable, "-m", "sb3_bridge.demo", "--out", str(out), "--total-timesteps", "512"]
    short = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert short.returncode == 1, short.stderr
    assert re.fullmatch(r"NOT SOLVED: a mean return of \d+\.\d is below 475", short.stdout.splitlines()[-1])
    assert short.stderr == ""
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert GRPO.load(out / "model.zip").num_timesteps == 512

    # The whole run, over the files of the first.
    main = runpy.run_path(str(EXAMPLE))["main"]
    assert main(["--out", str(out)]) == 0
    printed = capsys.readouterr().out
    means = [
        float(mean) for mean in re.findall(r"^.* ([\d.]+) \+- [\d.]+ of 500", printed, flags=re.MULTILINE)
    ]
    assert len(means) == 3 and all(475 <= mean <= 500 for mean in means)
    assert "20,480 decision steps, 4," in printed and "NOT SOLVED" not in printed
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert GRPO.load(out / "model.zip").num_timesteps == 20_480
    episodes = load_results(str(out))
    assert 15_000 < episodes["l"].sum() <= 20_480
    assert episodes["r"].iloc[:5].mean() < 50 and episodes["r"].iloc[-5:].mean() > 475
    with Image.open(out / "curve.png") as curve:
        assert curve.size == (1050, 630) and np.asarray(curve.convert("L")).std() > 5
    assert (out / "cartpole.gif").stat().st_size < 1 << 20
    with Image.open(out / "cartpole.gif") as gif:
        # Some 240 pictures of 500 steps at 25 a second: pictures that are equal are merged.
        assert gif.size == (600, 400) and gif.n_frames > 150


def test_a_wheel_holds_the_example(tmp_path):
    """Installed from a wheel there is no folder of examples: the package itself holds it."""
    target = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    place = target["force-include"][EXAMPLE.relative_to(ROOT).as_posix()]
    package = Path(sb3_bridge.__file__).parent
    (tmp_path / "sb3_bridge").mkdir()
    shutil.copy(package / "demo.py", tmp_path / "sb3_bridge" / "demo.py")
    shutil.copy(EXAMPLE, tmp_path / place)
    command = [sys.executable, str(tmp_path / "sb3_bridge" / "demo.py"), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "--total-timesteps" in done.stdout, done.stderr
