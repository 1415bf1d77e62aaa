"""The zip of a model: SB3's layout, parameters without pickle, and a JSON that is read without running code.

Entries: ``data`` (JSON), one ``<name>.msgpack`` for each tree of parameters, the versions, ``system_info.txt``. A value that
JSON would change is an object of up to three keys: ``:plain:`` (see :mod:`sb3_bridge.files.plain`, the only one that is read
back unless ``allow_pickle=True``), ``:type:`` and ``:serialized:`` (SB3's pickle, so that SB3's own tools read the file).
The zip's comment is a seal: the format's version, and the checksum of all that is before it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import pathlib
import pickle
import pkgutil
import re
import time
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import flax
import jax
import msgpack
import numpy as np
import stable_baselines3
from flax import serialization
from flax.traverse_util import flatten_dict
from stable_baselines3.common import utils
from stable_baselines3.common.save_util import open_path

import grpo_jax
from grpo_jax.files import check_regular, remove_temporaries, write_atomically
from grpo_jax.types import PyTree
from sb3_bridge.files.plain import KIND, NotPlainError, decode, encode, refuse_key, trusted_name

PLAIN, TYPE, PICKLED = ":plain:", ":type:", ":serialized:"
PARAMETERS = ".msgpack"
FORMAT = 2
"""The version of the format; files of version 1 have neither an entry ``_format`` nor a seal."""
MAX_BYTES = 2**29
"""The largest file that is read, or written; assign it for larger networks."""
_UNPACKED = 2**26  # bytes by which a file may grow where somebody compressed it: we store it as it is
_MOST_ITEMS, _MOST_NAMES = 10**6, 10**4  # in the JSON; in one dict of parameters
_STALE_SECONDS = 600.0
_SEAL = re.compile(rb"grpo-jax model (\d{1,9}) ([0-9a-f]{64})")

File = str | pathlib.Path | io.BufferedIOBase


def save_zip(path: File, data: dict[str, Any], params: dict[str, PyTree]) -> None:
    """Writes a model; a save that fails leaves the old file as it was.

    ``path`` is treated as by SB3, or is a writable binary file object; ``data`` holds attributes by name, see
    :func:`encode` for what is loaded again without a pickle; ``params`` nested dicts of arrays and plain numbers. What
    cannot be stored is a TypeError.
    """
    attributes = {_checked_name(name): _to_entry(name, value) for name, value in data.items()}
    versions = {"JAX": jax.__version__, "Flax": flax.__version__, "GRPO-JAX": grpo_jax.__version__}
    info = utils.get_system_info(print_info=False)[1] + "".join(f"- {x}: {versions[x]}\n" for x in versions)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("data", json.dumps(attributes, indent=4, allow_nan=False))
        for name, tree in params.items():
            plain = _storable(tree, f"params[{name!r}]")
            archive.writestr(_checked_name(name) + PARAMETERS, serialization.msgpack_serialize(plain))
        archive.writestr("_stable_baselines3_version", stable_baselines3.__version__)
        archive.writestr("_grpo_jax_version", grpo_jax.__version__)
        archive.writestr("_format", str(FORMAT))
        archive.writestr("system_info.txt", info)
        archive.comment = b"grpo-jax model %d %s" % (FORMAT, b"0" * 64)
    if content.tell() > MAX_BYTES:
        raise ValueError(
            f"{path} would have {content.tell():,} bytes, more than model_zip.MAX_BYTES={MAX_BYTES:,}"
        )
    content.seek(-64, os.SEEK_END)
    content.write(hashlib.sha256(content.getbuffer()[:-64]).hexdigest().encode())
    if isinstance(path, str | pathlib.Path):
        target = _target(pathlib.Path(path))
        remove_temporaries(target)
        for left in target.parent.glob(
            ".*.zip.????????.tmp"
        ):  # of killed saves of other names: nobody writes for so long
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                    left.unlink()
        write_atomically(target, content.getvalue())
    else:
        open_path(path, "w").write(content.getvalue())


def load_zip(
    path: File,
    *,
    custom_objects: dict[str, Any] | None = None,
    allow_pickle: bool = False,
    load_data: bool = True,
    print_system_info: bool = False,
) -> tuple[dict[str, Any], dict[str, PyTree]]:
    """Reads what :func:`save_zip` wrote, running nothing that the file brings unless ``allow_pickle`` is set.

    Args:
      path: the file, also without its ``.zip``, or a readable binary file object.
      custom_objects: attributes that replace those of the file, which are then not read at all.
      allow_pickle: unpickles what has no plain form. A pickle runs whatever its author wants: for trusted files only.
      load_data: False: parameters alone, ``data`` is ``{}``.
      print_system_info: prints what the file was saved with.

    Returns:
      data (without what is stored as a pickle only; one warning names all of these), and params (writable NumPy arrays).

    Raises:
      ValueError: not such a file, a damaged one, one that is too large or no file at all, or another algorithm's: names the
        path, the entry and the fix.
    """
    if custom_objects is not None and not isinstance(custom_objects, dict):
        raise ValueError(f"custom_objects={custom_objects!r} must be a dict (attribute -> object) or None")
    params, attributes = {}, None
    with contextlib.ExitStack() as stack:
        if isinstance(path, str | pathlib.Path):
            file: Any = stack.enter_context(_opened(pathlib.Path(path)))
        else:
            file = open_path(path, "r")  # the user's
        with _blamed(f"{path} is not a zip file, or is cut off or damaged"):
            archive = stack.enter_context(zipfile.ZipFile(file))
        names = archive.namelist()
        _check_seal(path, file, archive)
        if print_system_info:
            print("== SAVED MODEL SYSTEM INFO ==")
            known = "system_info.txt" in names
            print(archive.read("system_info.txt").decode() if known else f"{path} has no system_info.txt")
        for name in names:
            if name.endswith(PARAMETERS):
                with _blamed(f"{path}: entry {name!r} is damaged"):
                    tree = _restored(archive.read(name))
                params[name.removesuffix(PARAMETERS)] = tree
        if "data" in names and (load_data or not params):
            with _blamed(f"{path}: entry 'data' is damaged"):
                content = archive.read("data")
                if sum(map(content.count, (b"[", b"{", b","))) > _MOST_ITEMS:
                    raise ValueError(f"it has more than {_MOST_ITEMS:,} items")
                attributes = json.loads(content)
                if not isinstance(attributes, dict):
                    raise TypeError(f"expected an object, got {type(attributes).__name__}")
    if not params:
        raise _no_parameters(path, names, attributes or {})
    if not load_data:
        return {}, params
    if attributes is None:
        raise ValueError(f"{path} has no entry 'data': it is not a model's or policy's file, or was damaged")
    return _from_entries(path, attributes, custom_objects or {}, allow_pickle), params


def _opened(path: pathlib.Path) -> Any:
    """Where SB3's ``open_path`` would read; but nothing that is no plain file, and nothing that is too large."""
    if not path.exists() and path.suffix != ".zip":
        path = pathlib.Path(f"{path}.zip")
    check_regular(path, MAX_BYTES)
    return path.open("rb")


def _check_seal(path: File, file: Any, archive: zipfile.ZipFile) -> None:
    """Raises a ValueError where a byte changed, or where more would be unpacked than the file holds."""
    size, seal = file.seek(0, os.SEEK_END), _SEAL.fullmatch(archive.comment)
    if seal is not None:
        file.seek(0)
        digest, left = hashlib.sha256(), size - 64
        while left > 0 and (part := file.read(min(left, 2**20))):
            digest.update(part)
            left -= len(part)
        if digest.hexdigest().encode() != seal[2]:
            raise ValueError(f"{path} is damaged: its checksum does not fit what it holds")
        if int(seal[1]) != FORMAT:
            raise ValueError(
                f"{path} has version {int(seal[1])} of the format, which is newer than {FORMAT}: upgrade grpo-jax"
            )
    elif "_format" in archive.namelist():  # else it is of an earlier version
        raise ValueError(f"{path} is damaged, or was packed anew by another program: its seal is gone")
    if (unpacked := sum(entry.file_size for entry in archive.infolist())) > min(size, MAX_BYTES) + _UNPACKED:
        raise ValueError(
            f"{path} has {size:,} bytes, but would be unpacked to {unpacked:,}: it is no model's file"
        )


def _target(path: pathlib.Path) -> pathlib.Path:
    """Where SB3's ``open_path`` would write, with its warnings."""
    if path.suffix == "":
        path = pathlib.Path(f"{path}.zip")
    while path.is_dir():
        warnings.warn(f"{path} is a folder: saving to {path}_2 instead", stacklevel=3)
        path = pathlib.Path(f"{path}_2")
    if not path.parent.exists():
        warnings.warn(f"the folder {path.parent} does not exist: making it", stacklevel=3)
        path.parent.mkdir(parents=True, exist_ok=True)
    # A link goes on pointing to the file it points to.
    return pathlib.Path(os.path.realpath(path))


@contextlib.contextmanager
def _blamed(what: str, fix: str = "") -> Iterator[None]:
    """Turns any error (a damaged zip raises many) into one that says what is wrong with the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} ({type(error).__name__}: {error}){fix}") from error


_ALGORITHMS = {
    "clip_range": "PPO",
    "target_entropy": "SAC",
    "policy_delay": "TD3",
    "exploration_schedule": "DQN",
}
_ALGORITHMS |= {"gae_lambda": "A2C"}
"""An attribute that a file holds -> SB3's algorithm that wrote it; the first that fits."""


def _no_parameters(path: File, names: list[str], attributes: dict[str, Any]) -> ValueError:
    if not any(name.endswith(".pth") for name in names):
        found = ", ".join(names) or "none"
        return ValueError(f"{path} holds no parameters (no entry *{PARAMETERS}; it has {found})")
    if "sb3_contrib" in str(attributes.get("policy_class")):
        owner = "the algorithm of sb3_contrib that saved it"
    else:
        known = (f"stable_baselines3.{name}" for key, name in _ALGORITHMS.items() if key in attributes)
        owner = next(known, "the Stable-Baselines3 algorithm that saved it")
    return ValueError(f"{path} holds torch parameters (*.pth) of another algorithm: load it with {owner}")


def _storable(tree: PyTree, where: str) -> PyTree:
    """The tree as msgpack takes it; native byte order, because msgpack's form has none."""
    if isinstance(tree, dict):
        return {_checked_name(name): _storable(branch, f"{where}[{name!r}]") for name, branch in tree.items()}
    if tree is None or type(tree) in (bool, int, float):
        return tree
    if not isinstance(tree, np.ndarray | np.generic | jax.Array):
        raise TypeError(
            f"{where} is a {type(tree).__name__}: parameters are nested dicts of NumPy or JAX arrays"
        )
    refuse_key(tree, where)
    array = np.asarray(tree)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    with contextlib.suppress(TypeError):
        if np.dtype(array.dtype.name) == array.dtype and not array.dtype.hasobject:
            return array[()] if isinstance(tree, np.generic) else array
    raise TypeError(f"{where} has dtype {array.dtype}, which cannot be stored: cast it to numbers")


def _restored(content: bytes) -> PyTree:
    """Nested dicts of writable arrays and numbers, without NaN."""
    n_items = 0

    def counted(pairs: list[tuple[str, Any]]) -> None:
        nonlocal n_items
        n_items += 1 + len(pairs)
        if n_items > _MOST_ITEMS:
            raise ValueError(f"it has more than {_MOST_ITEMS:,} items")

    # Twice: what it holds is counted before it is made.
    limits: Any = {"max_array_len": _MOST_NAMES, "max_map_len": _MOST_NAMES, "raw": False}
    msgpack.unpackb(content, object_pairs_hook=counted, ext_hook=lambda code, data: None, **limits)
    return _writable(serialization.msgpack_restore(content))


def _writable(tree: PyTree) -> PyTree:
    if isinstance(tree, dict):
        return {name: _writable(branch) for name, branch in tree.items()}
    if isinstance(tree, np.ndarray):
        return tree.copy()
    if tree is None or isinstance(tree, bool | int | float | np.generic):
        return tree
    raise TypeError(f"unexpected {type(tree).__name__}")


def checked(path: File, params: dict[str, PyTree], own: dict[str, Any]) -> dict[str, PyTree]:
    """Parameters of a file by owner, where their numbers are of the kinds that a model's ``own`` are, and without NaN.

    Raises:
      ValueError: names the owner and the leaf. An optimizer may hold infinity, to compare with.
    """
    own = own | {"reference": own["policy"]}
    for owner, tree in params.items():
        if owner not in own and owner != "world":
            raise ValueError(f"{path}: Key {owner} is an invalid object name.")
        for name, leaf in flatten_dict(tree, sep=".").items():
            array, mine = np.asarray(leaf), own.get(owner, {}).get(name)
            is_float = array.dtype.kind in "fcV"
            if mine is not None and (kind := np.asarray(mine).dtype.kind) != array.dtype.kind:
                raise ValueError(
                    f"{path}: {owner}[{name!r}] holds {array.dtype}, expected numbers of kind {kind!r}"
                )
            may_be_infinite = owner not in ("policy", "reference")
            if is_float and not (np.isfinite(array) | (may_be_infinite & ~np.isnan(array))).all():
                raise ValueError(
                    f"{path}: {owner}[{name!r}] holds NaN or infinity: it was saved by a run that had failed"
                )
    return params


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise TypeError(f"the name {name!r} must be a string, and not an empty one")
    return name


class _Pickler(cloudpickle.Pickler):
    """Keeps JAX's functions by name: jitted ones are otherwise taken apart, and load as other functions."""

    def reducer_override(self, value: Any) -> Any:
        found = trusted_name(value)
        if found is None:
            return super().reducer_override(value)
        return pkgutil.resolve_name, (":".join(found),)


def _to_entry(name: str, value: Any) -> Any:
    entry: dict[str, Any] = {TYPE: str(type(value))}
    try:
        entry[PLAIN] = encode(value)
        if KIND not in json.dumps(entry[PLAIN]):  # JSON knows it
            return value
    except (NotPlainError, RecursionError):  # a container that holds itself recurses
        pass
    except TypeError as error:
        raise TypeError(f"data[{name!r}]: {error}") from error
    content = io.BytesIO()
    try:
        _Pickler(content).dump(value)
        entry[PICKLED] = base64.b64encode(content.getvalue()).decode()
    except Exception as error:
        if PLAIN not in entry:
            raise TypeError(
                f"{name!r} ({type(value).__name__}) can be stored neither in a plain form nor as a pickle"
                f" ({type(error).__name__}: {error}); leave it out: save(path, exclude=[{name!r}])"
            ) from error
    return entry


def _from_entries(
    path: File, attributes: dict[str, Any], custom_objects: dict[str, Any], allow_pickle: bool
) -> dict[str, Any]:
    data, left_out = {}, []
    for name, entry in attributes.items():
        fix = f"pass custom_objects={{{name!r}: ...}}"
        if name in custom_objects:
            data[name] = custom_objects[name]
        elif not isinstance(entry, dict) or not {PLAIN, PICKLED} & entry.keys():
            data[name] = entry
        elif PLAIN in entry:
            with _blamed(
                f"{path}: {name!r} in entry 'data' cannot be read", f"; if the rest is sound, {fix}"
            ):
                data[name] = decode(entry[PLAIN])
        elif not allow_pickle:
            left_out.append(name)
        else:
            try:
                data[name] = pickle.loads(base64.b64decode(entry[PICKLED]))
            except Exception as error:
                why = f"cannot be read ({type(error).__name__}: {error}) and was left out; {fix} in its place"
                warnings.warn(f"{path}: the pickle of {name!r} {why}", stacklevel=3)
    if left_out:
        objects = ", ".join(f"{name!r}: ..." for name in left_out)
        warnings.warn(
            f"{path}: left out {', '.join(left_out)}, stored as a pickle, which could run any code: pass"
            f" custom_objects={{{objects}}} or, if you trust the file, allow_pickle=True",
            stacklevel=3,
        )
    return data
