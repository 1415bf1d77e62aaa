"""The benchmark: ours and its peers on every environment, a process and a JSON row for each run, then the report.

    python benchmarks/bench.py --out runs/bench [--short] [--libraries grpo_jax mctx ...] [--envs ID ...] [--seeds 5]
                               [--peer-seeds 5] [--jobs 1] [--device gpu --n-envs 65536]

The whole benchmark takes some four hours of one quiet core, about half with two jobs, and minutes more to install the
peers. Then the tables and pictures of its rows, and the pages that hold lines of the tables:

    python benchmarks/bench.py --out runs/bench --seeds 10 --peer-seeds 5 --jobs 2 --report docs/results
    python benchmarks/report.py runs/bench --out docs/results --pages README.md README.ja.md docs/benchmark.md docs/benchmark.ja.md

Peers: Stable-Baselines3's and SBX's PPO ("sb3", "sbx") with RL Zoo's settings, rejax's PPO with its own ("rejax") and
with PureJaxRL's ("purejaxrl"), and Gumbel AlphaZero on the simulator ("mctx"). They live in virtual environments of their
own, made from ``peers/requirements-*.txt``; settings are in ``peers/*.toml``. What has a row is not run again, so a
benchmark that was killed goes on where it was: start the same command again. Rows know nothing of the code they measured
but its version: take another folder for other code.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

HERE = pathlib.Path(__file__).resolve().parent
PEERS = HERE / "peers"
OURS = "grpo_jax"
SCRIPTS = {
    OURS: "run_grpo_jax.py",
    "sb3": "run_sb3.py",
    "sbx": "run_sb3.py",
    "rejax": "run_rejax.py",
    "purejaxrl": "run_rejax.py",
    "mctx": "run_mctx.py",
}
LIBRARIES = tuple(SCRIPTS)
VENVS = {"purejaxrl": "rejax"}
"""Where a library's virtual environment has not its own name."""

SETTINGS = {"sb3": "zoo", "sbx": "zoo", "mctx": "mctx"}
"""Files of the settings of those that run only what these name; all others run everything."""

CACHED_ENVS = ("CartPole-v1",)
"""Where ours runs with a cold and a warm compilation cache instead of none."""

MIN_CACHED_SECONDS = "0.5"
"""Programs that compile faster are not kept in the cache; as in ``grpo-jax train``."""

SHORT = {
    "grpo_jax": ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "Catch-bsuite"),
    "sb3": ("CartPole-v1",),
}
SHORT_SEEDS = 2

TAIL = 15
"""Lines of a failed run's error that are shown."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
      library: one of ``LIBRARIES``.
      env: environment id.
      seed: of everything random.
      cache: "off", "cold" (JAX's persistent compilation cache in an empty folder) or "warm" (the second run there).
      device: "cpu" or "gpu".
      n_envs: in place of the settings' own.
      total_timesteps: in place of the settings' own.
    """

    library: str
    env: str
    seed: int
    cache: str = "off"
    device: str = "cpu"
    n_envs: int | None = None
    total_timesteps: int | None = None

    @property
    def name(self) -> str:
        """Of the row; different for different runs."""
        parts = [self.library, self.env, self.cache]
        parts += [self.device] if self.device != "cpu" else []
        parts += [f"n{self.n_envs}"] if self.n_envs else []
        parts += [f"t{self.total_timesteps}"] if self.total_timesteps else []
        return "-".join([*parts, f"seed{self.seed}"])

    @property
    def venv(self) -> str | None:
        """Name of its virtual environment; None: the one of this process."""
        return None if self.library == OURS else VENVS.get(self.library, self.library)


# What to run


def environments() -> list[str]:
    """All ids, those whose runs are long last."""
    ids = list(tomllib.loads((HERE / "references.toml").read_text()))
    return sorted(ids, key=lambda env: env.endswith("MinAtar"))


def can_run(library: str, env: str) -> bool:
    """Whether a library has the environment, or settings for its family."""
    if library not in SETTINGS:
        return True
    known = tomllib.loads((PEERS / f"{SETTINGS[library]}.toml").read_text())
    return not known.keys().isdisjoint((env, env.rsplit("-", 1)[1]))


def caches(library: str, env: str, device: str = "cpu") -> tuple[str, ...]:
    return ("cold", "warm") if library == OURS and env in CACHED_ENVS and device == "cpu" else ("off",)


def jobs_of(
    libraries: Sequence[str],
    envs: Sequence[str],
    n_seeds: int,
    device: str = "cpu",
    n_envs: int | None = None,
    total_timesteps: int | None = None,
    n_peer_seeds: int | None = None,
) -> list[Job]:
    """All runs, environment by environment; peers with as many seeds where it is not said."""
    return [
        Job(library, env, seed, cache, device, n_envs, total_timesteps)
        for env in envs
        for library in libraries
        if can_run(library, env)
        for cache in caches(library, env, device)
        for seed in range(n_seeds if library == OURS or n_peer_seeds is None else n_peer_seeds)
    ]


def short_jobs() -> list[Job]:
    """Some minutes' worth: ours on four environments, and one peer on one."""
    return [job for library, envs in SHORT.items() for job in jobs_of([library], envs, SHORT_SEEDS)]


# Virtual environments


def python_of(venvs: pathlib.Path, name: str | None) -> pathlib.Path:
    """The interpreter that runs a job."""
    return pathlib.Path(sys.executable) if name is None else venvs / name / "bin" / "python"


def make_venv(venvs: pathlib.Path, name: str) -> None:
    """Makes a peer's virtual environment, unless it is there with the same requirements."""
    requirements = PEERS / f"requirements-{name}.txt"
    ready = venvs / name / ".ready"
    if ready.exists() and ready.read_text() == requirements.read_text():
        return
    print(f"{venvs / name}: installing {requirements.name}", flush=True)
    ready.unlink(missing_ok=True)
    python = python_of(venvs, name)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", venvs / name], check=True)
    pip = [python, "-m", "pip", "install", "-q"]
    first = [line for line in requirements.read_text().splitlines() if line.startswith("torch==")]
    for wanted in [first] if first else []:
        subprocess.run([*pip, *wanted], check=True)
    subprocess.run([*pip, "-r", requirements], check=True)
    ready.write_text(requirements.read_text())


# Running


class Runner:
    """Runs jobs that have no row, each in a process of its own that is kept to a core of its own.

    Attributes:
      out: folder; rows are ``out/rows/<name>.json``.
      command: interpreter and script of a job, to which the job and the path of its row are added.
      failed: names of jobs that left no row.
    """

    def __init__(self, out: pathlib.Path, command: Callable[[Job], list[str]], n_jobs: int = 1) -> None:
        self.rows = out / "rows"
        self.rows.mkdir(parents=True, exist_ok=True)
        self.command, self.n_jobs = command, n_jobs
        self.failed: list[str] = []
        self._cores: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        for core in cores(n_jobs):
            self._cores.put(core)
        self._processes: set[subprocess.Popen[str]] = set()
        self._stopped = threading.Event()

    def path(self, job: Job) -> pathlib.Path:
        return self.rows / f"{job.name}.json"

    def run(self, jobs: Sequence[Job]) -> None:
        """Runs what is missing; failures are printed and the others go on."""
        missing = [job for job in jobs if not self.path(job).exists()]
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with (
            Progress("{task.description}", *columns, speed_estimate_period=24 * 3600) as progress,
            ThreadPoolExecutor(self.n_jobs) as pool,
        ):
            task = progress.add_task("", total=len(jobs), completed=len(jobs) - len(missing))
            futures = {pool.submit(self._one, job): job for job in missing}
            try:
                for future in as_completed(futures):
                    job, error = futures[future], future.result()
                    if error is not None:
                        self.failed.append(job.name)
                        progress.print(
                            f"{job.name} failed:\n{error}", markup=False, highlight=False, soft_wrap=True
                        )
                    progress.update(task, advance=1, description=job.name)
                    if not progress.console.is_terminal:
                        print(f"{time.strftime('%H:%M:%S')} {job.name}", flush=True)
            finally:
                self._stop(pool)

    def _stop(self, pool: ThreadPoolExecutor) -> None:
        self._stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self._processes):
            process.kill()  # does nothing to a process that has ended

    def _one(self, job: Job) -> str | None:
        """Runs a job; None, or the end of what it said where it failed."""
        core = self._cores.get()
        try:
            with cache_of(job) as cache:
                if job.cache == "warm":  # fills the folder; what it measured is what "cold" measures
                    error = self._process(job, core, cache, pathlib.Path(cache or "") / "row.json")
                    if error is not None:
                        return error
                return self._process(job, core, cache, self.path(job))
        finally:
            self._cores.put(core)

    def _process(self, job: Job, core: int | None, cache: str | None, path: pathlib.Path) -> str | None:
        if self._stopped.is_set():
            return "stopped"
        fields = {key: value for key, value in dataclasses.asdict(job).items() if value is not None}
        fields |= {"core": None if job.device == "gpu" else core, "started": time.time()}
        process = subprocess.Popen(
            [*self.command(job), json.dumps(fields), str(path)],
            env=environment(job, cache),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._processes.add(process)
        try:
            output, _ = process.communicate()
        finally:
            self._processes.discard(process)
        if process.returncode == 0 and path.exists():
            return None
        return "\n".join([*output.splitlines()[-TAIL:], f"exit status {process.returncode}"])


def cores(n_jobs: int) -> Sequence[int | None]:
    """A core for each job, of those that this process may use; None where they cannot be told apart."""
    if not hasattr(os, "sched_getaffinity"):
        return [None] * n_jobs
    allowed = sorted(os.sched_getaffinity(0))
    if n_jobs > len(allowed):
        raise SystemExit(
            f"--jobs {n_jobs}: only {len(allowed)} cores; runs that share one measure each other"
        )
    return allowed[:n_jobs]


@contextlib.contextmanager
def cache_of(job: Job) -> Iterator[str | None]:
    """An empty folder for JAX's compilation cache, gone after the job; None where there is to be none."""
    if job.cache == "off":
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as folder:
        yield folder


def environment(job: Job, cache: str | None) -> dict[str, str]:
    """Environment variables of a job: single-threaded, its device, its cache, and nothing of ours on the path."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "PYTHON"))
    }
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    jax = {"JAX_PLATFORMS": "cuda" if job.device == "gpu" else "cpu"}
    if cache is not None:
        jax |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": MIN_CACHED_SECONDS,
        }
    return {**kept, **threads, **jax, "PYTHONWARNINGS": "ignore"}


# The door


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/bench"))
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--envs", nargs="+", choices=environments(), default=environments(), metavar="ID")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--peer-seeds", type=int, help="how many for peers; default: --seeds")
    parser.add_argument("--jobs", type=int, default=1, help="side by side, each on a core of its own")
    parser.add_argument("--short", action="store_true", help="some minutes: few environments, two seeds")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--n-envs", type=int, help="in place of the settings' own (ours, rejax and purejaxrl)"
    )
    parser.add_argument("--total-timesteps", type=int, help="in place of the settings' own")
    parser.add_argument("--venvs", type=pathlib.Path, default=pathlib.Path("runs/venvs"))
    parser.add_argument("--report", type=pathlib.Path, help="folder of the report; default: --out")
    parsed = parser.parse_args(arguments)
    if parsed.device == "gpu" and list(parsed.libraries) != [OURS]:
        parser.error("--device gpu: peers' virtual environments are for CPUs, add --libraries grpo_jax")
    if parsed.n_envs and not {*parsed.libraries} <= {OURS, "rejax", "purejaxrl"}:
        parser.error("--n-envs: add --libraries with grpo_jax, rejax or purejaxrl only")
    return parsed


def selected(arguments: argparse.Namespace) -> list[Job]:
    if arguments.short:
        return short_jobs()
    return jobs_of(
        arguments.libraries,
        arguments.envs,
        arguments.seeds,
        arguments.device,
        arguments.n_envs,
        arguments.total_timesteps,
        arguments.peer_seeds,
    )


def write_report(out: pathlib.Path, folder: pathlib.Path) -> None:
    """The report of all rows of ``out``; imported here, for Matplotlib is of no use while things run."""
    sys.path.insert(0, str(HERE))
    import report

    report.write(report.read(out), report.read_references(), folder)
    print(f"{folder / 'benchmark_table.md'} and {folder / 'images'}/bench_*.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing and writes the report; 1 where a run failed."""
    parsed = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else jobs would outlive the benchmark
    jobs = selected(parsed)
    for venv in sorted({job.venv for job in jobs if job.venv is not None}):
        make_venv(parsed.venvs, venv)
    runner = Runner(parsed.out, lambda job: command(parsed.venvs, job), parsed.jobs)
    runner.run(jobs)
    if runner.failed:
        print(f"{len(runner.failed)} runs failed and left no row; start again to try them again")
    write_report(parsed.out, parsed.report or parsed.out)
    return min(len(runner.failed), 1)


def command(venvs: pathlib.Path, job: Job) -> list[str]:
    return [str(python_of(venvs, job.venv).absolute()), str(PEERS / SCRIPTS[job.library])]


if __name__ == "__main__":
    raise SystemExit(main())
