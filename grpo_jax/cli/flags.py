"""What can be typed on the command line: commands, options, and every field of the config as a flag."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import textwrap
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, Union, get_args, get_type_hints

from grpo_jax._version import __version__
from grpo_jax.cli.help import EXAMPLES, STAGES
from grpo_jax.config import GRPOConfig, Schedule
from grpo_jax.files import read_bounded
from grpo_jax.groups.plan import Plan
from grpo_jax.presets import DEFAULT_TIMESTEPS, preset, preset_ids, preset_timesteps

_MAX_CONFIG_BYTES = 1 << 20

FINAL_EPISODES = 128
"""Episodes of each seed that a run is judged by at its end."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Several processes, on one host or many, that share a run."""

    distributed: bool = False
    """This process is one of several that were all started with this command: their devices share the environments (or
    seeds and settings), the first process writes. JAX finds the others on SLURM, cloud TPUs and Open MPI; elsewhere the
    next three flags name them."""
    coordinator: str | None = None
    """HOST:PORT of process 0, as the others reach it; the port must be free there."""
    num_processes: int | None = None
    """How many there are."""
    process_id: int | None = None
    """Which of them this one is, from 0."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Train in an environment of gymnax, from the settings of its preset, or of another suite."""

    env: str
    """Environment id, such as CartPole-v1 or brax/ant; `grpo-jax envs` lists them."""
    total_timesteps: int
    """Decision steps of each seed, rounded up to whole iterations."""
    out: Path
    """Directory of the run."""
    n_seeds: int = 1
    """Seeds that are trained side by side."""
    seed: int = 0
    """Seed of the run; several seeds are split off it."""
    overwrite: bool = False
    """Replace the run that --out already holds."""
    checkpoint_every: str = "10s"
    """How often a checkpoint is written: seconds, as in 60s, or iterations, as in 100."""
    keep: int = 1
    """How many of the last checkpoints stay, in checkpoints/; the best one stays besides, as best.msgpack."""
    sweep: tuple[str, ...] = ()
    """Fields and the values to try, such as learning_rate=1e-4,3e-4,1e-3 gamma=0.9,0.99: every combination is trained with
    every seed. The best one is written as best_config.json."""
    zipped: bool = False
    """The values of --sweep belong together: the first of each field, the second of each, and so on."""
    devices: str = "1"
    """Devices that share the work: a number, or all. They share the seeds, if there are several; else the environments, in as
    many parts (--n-shards)."""
    memory_limit: str | None = None
    """Most that the work may take of each device's memory, such as 8GiB: fewer branches and seeds are followed side by side
    then, and a run that cannot keep to it is refused. Results do not depend on it but by rounding."""
    hosts: Hosts = Hosts()
    from_config: Path | None = None
    """Start from the settings in this file, such as a sweep's best_config.json, instead of the preset's; flags change them."""
    opponent_every: int | None = None
    """Self-play in a game: the opponent is the policy as it was at each multiple of so many iterations. Checkpoints are
    written at these alone, and Ctrl-C waits for the next one; None: the game's own opponent."""
    cache: bool = True
    """Keep compiled programs in the user's cache directory."""
    # In a subclass that `parse` makes: config, whose attributes are GRPOConfig's fields, not validated yet.


@dataclasses.dataclass(frozen=True)
class Resume:
    """Go on with a run that was stopped; it ends like one that was not, bit for bit."""

    directory: Path
    """Directory of the run."""
    total_timesteps: int | None = None
    """A new length of the whole run; None: as before. Decaying rates follow the new length."""
    checkpoint_every: str | None = None
    """How often a checkpoint is written: seconds, as in 60s, or iterations, as in 100; None: as before."""
    keep: int | None = None
    """How many of the last checkpoints stay; None: as before."""
    devices: str = "1"
    """Devices that share the work, which may be others than before: a number, or all."""
    memory_limit: str | None = None
    """Most that the work may take of each device's memory, such as 8GiB: fewer branches and seeds are followed side by side
    then, and a run that cannot keep to it is refused. Results do not depend on it but by rounding."""
    hosts: Hosts = Hosts()
    new_metrics: bool = False
    """Go on although rows of metrics.csv are lost or damaged: what is left of it is set aside."""
    cache: bool = True
    """Keep compiled programs in the user's cache directory."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Play whole episodes with a run's last checkpoint, or with another one of it."""

    directory: Path
    """Directory of the run."""
    checkpoint: Path | None = None
    """Another checkpoint of the run: its best.msgpack, or one in its checkpoints/."""
    n_episodes: int = FINAL_EPISODES
    """Episodes of each seed."""
    deterministic: bool = False
    """Take the most probable action (or the mean) instead of a sampled one."""
    plan: bool = False
    """Act by comparison: follow the candidates of every state before one is taken."""
    plan_horizon: int | None = None
    """Steps of these branches; None: 64, or the run's own horizon where that is longer."""
    plan_rollouts: int = Plan.n_rollouts
    """Branches of each candidate."""
    seed: int | None = None
    """Seed of the episodes; None: the run's, which plays those of the table at the end of training."""
    opponent: Literal["random", "self"] = "random"
    """Whom a game is played against: random moves, or the policy itself (with --deterministic it is, too)."""
    render: Path | None = None
    """Also draw one episode (of the first seed) into this .gif or .mp4 file."""
    cache: bool = True
    """Keep compiled programs in the user's cache directory."""


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draw the learning curves of runs, or what the policy of one run compares."""

    run: tuple[Path, ...]
    """Directories of runs; those of equal settings and other seeds are one curve."""
    out: Path = Path("plot.png")
    """The picture: a .png, .svg or .pdf file, replaced."""
    key: str = "episode_return"
    """What is drawn: a column of metrics.csv."""
    x: Literal["decision_steps", "simulator_steps", "seconds"] = "decision_steps"
    """Against what: steps of each seed, or seconds of training without compiling (those of all seeds of a run together)."""
    log_x: bool = False
    """Make the x axis logarithmic."""
    group: bool = False
    """Draw the group of one decision state instead: its candidates, followed by the policy."""
    map: tuple[int, int] | None = None
    """Draw which action is better where instead, and by how much, over these two numbers of the observation (from 0)."""
    checkpoint: Path | None = None
    """With --group or --map: another checkpoint of the run, such as its best.msgpack."""
    step: int = 10
    """With --group: the decision state is the one after so many steps of an episode."""
    dimension: int | None = None
    """With --group: the number of the observation that is drawn (from 0); None: what was earned so far."""
    horizon: int | None = None
    """With --group or --map: steps of a branch; None: the run's own horizon."""
    branches: int = 24
    """With --group or --map: branches of each candidate."""
    seed: int = 0
    """With --group or --map: seed of the episodes and branches."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Print a table of runs: what they came to, what that took, and how their settings differ."""

    run: tuple[Path, ...]
    """Directories of runs; those of equal settings and other seeds are one line."""
    out: Path | None = None
    """Also write the table into this .md file, replaced."""


@dataclasses.dataclass(frozen=True)
class Envs:
    """List the environments."""

    suite: str = "gymnax"
    """Whose: gymnax or another suite that is installed, such as brax."""


Command = Train | Resume | Evaluate | Plot | Report | Envs
_COMMANDS: tuple[type, ...] = get_args(Command)


def parse(argv: list[str]) -> Command:
    """The command and its options; the defaults of ``train`` are those of its environment's preset.

    Raises:
      SystemExit: help was asked for (0), or the arguments cannot be understood (2).
      ValueError, TypeError, OSError: of the file that --from-config names.
    """
    name = next(iter(argv), "")
    if name == "--version":
        print(f"grpo-jax {__version__}, jax {version('jax')}")
        raise SystemExit(0)
    names = [kind.__name__.lower() for kind in _COMMANDS]
    if not name.startswith("-") and name and name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=1)
        hint = f": did you mean {near[0]}?" if near else ";"
        raise ValueError(f"there is no command {name!r}{hint} there are {', '.join(names)}")
    env_id = next((argument for argument in argv if argument in preset_ids()), "")
    try:
        return _parse_all(argv, env_id)
    except SystemExit as stop:
        if not stop.code:  # help was asked for
            examples = EXAMPLES[name if name in names else ""]
            print(f"examples:{examples}")
        raise


def _parse_all(argv: list[str], env_id: str) -> Command:
    options = _parse_with(argv, env_id)
    if isinstance(options, Train) and options.env != env_id:  # the id stood elsewhere, or has no preset
        options = _parse_with(argv, options.env)
    if isinstance(options, Train) and options.from_config is not None:
        options = _parse_with(argv, options.env, _config_in(options.from_config))
    return options


def swept(arguments: Sequence[str]) -> dict[str, list[Any]]:
    """The fields of ``--sweep`` and their values.

    Raises:
      ValueError: an argument that names no values, or a field twice.
    """
    fields: dict[str, list[Any]] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        name = name.strip().replace("-", "_")
        if not (name and equals and text) or name in fields:
            raise ValueError(
                f"--sweep {argument!r} must be a field and its values, each field once: gamma=0.9,0.99"
            )
        try:
            fields[name] = list(ast.literal_eval(f"[{text}]"))
        except (ValueError, SyntaxError):  # words, such as baseline=policy,mean
            fields[name] = [_literal(word.strip()) for word in text.split(",")]
    return fields


def _literal(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


def _config_in(path: Path) -> GRPOConfig:
    try:
        return GRPOConfig.from_json(read_bounded(path, _MAX_CONFIG_BYTES).decode())
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"from_config={str(path)!r} holds no settings, as best_config.json of a sweep does ({error})"
        ) from error


def _parse_with(argv: list[str], env_id: str, config: GRPOConfig | None = None) -> Command:
    import tyro

    # A twin of GRPOConfig, stage by stage: numbers where schedules could stand, and no validation inside of the parser.
    has_preset = env_id in preset_ids()
    docs, hints = _field_docs(), get_type_hints(GRPOConfig)
    defaults = config or (preset(env_id) if has_preset else GRPOConfig())

    def stage(title: str, doc: str, names: Sequence[str]) -> tuple[str, Any, Any]:
        flags = []
        for name in names:
            kinds = [kind for kind in get_args(hints[name]) if kind != Schedule]
            plain = Union[tuple(kinds)] if Schedule in get_args(hints[name]) else hints[name]  # noqa: UP007
            help_ = tyro.conf.arg(help=docs.get(name, ""))
            flags.append((name, Annotated[plain, help_], getattr(defaults, name)))
        settings = dataclasses.make_dataclass(title.title(), flags, namespace={"__doc__": doc})
        return title, settings, dataclasses.field(default_factory=settings)

    listed = {name for _, names in STAGES.values() for name in names} | {"optimizer"}  # a function: not typed
    stages = STAGES | {"more": ("", [name for name in hints if name not in listed])}
    parts = [stage(title, doc, names) for title, (doc, names) in stages.items() if names]

    def all_settings(self: Any) -> Any:
        return SimpleNamespace(**{k: v for title, *_ in parts for k, v in vars(getattr(self, title)).items()})

    train = dataclasses.make_dataclass(
        "Train", parts, bases=(Train,), frozen=True, namespace={"config": property(all_settings)}
    )
    default = train(
        env=tyro.MISSING,
        total_timesteps=preset_timesteps(env_id) if has_preset else DEFAULT_TIMESTEPS,
        out=Path("runs") / (env_id or "ENV"),
    )
    commands: Any = [
        Annotated[train, tyro.conf.subcommand("train", description=Train.__doc__, default=default)],
        *(Annotated[kind, tyro.conf.subcommand(kind.__name__.lower())] for kind in _COMMANDS[1:]),
    ]
    command: Any = Union[tuple(commands)]  # noqa: UP007
    options: Command = tyro.cli(
        command,
        prog="grpo-jax",
        description="GRPO for control, in functional JAX.",
        args=argv,
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.PositionalRequiredArgs,
            tyro.conf.PositionalMetavarFromFieldName,
        ),
    )
    return options


def _field_docs() -> dict[str, str]:
    """The docstrings of GRPOConfig's fields, each as one line."""
    source: Any = ast.parse(textwrap.dedent(inspect.getsource(GRPOConfig)))
    documented: list[tuple[Any, Any]] = [
        pair
        for pair in itertools.pairwise(source.body[0].body)
        if isinstance(pair[0], ast.AnnAssign) and isinstance(pair[1], ast.Expr)
    ]
    return {
        field.target.id: " ".join(doc.value.value.replace("[traced]", "").split())
        for field, doc in documented
    }
