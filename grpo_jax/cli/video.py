"""Pictures as an .mp4 file, by imageio-ffmpeg or by OpenCV, whichever is installed."""

from __future__ import annotations

import importlib
import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def check() -> str:
    """The module that writes videos.

    Raises:
      ModuleNotFoundError: none is installed; says what to install.
    """
    for module in ("imageio_ffmpeg", "cv2"):  # the first writes what every browser plays
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        return module
    raise ModuleNotFoundError(
        "render: an .mp4 file needs imageio-ffmpeg (or OpenCV): `pip install imageio-ffmpeg`; a .gif needs neither"
    )


def write_mp4(path: Path, frames: Iterable[np.ndarray], fps: float) -> int:
    """Writes a video; all of it or nothing.

    Args:
      path: an ``.mp4`` file in a directory that exists; replaced.
      frames: at least one; uint8 ``[height, width, 3]``, of equal shapes.
      fps: frames per second.

    Returns:
      How many frames there were.

    Raises:
      ModuleNotFoundError: nothing that writes videos is installed.
      OSError: it cannot be written.
    """
    # The codec wants even sides: a row or column at the edge is repeated.
    images = [np.pad(f, ((0, f.shape[0] % 2), (0, f.shape[1] % 2), (0, 0)), mode="edge") for f in frames]
    write = _by_ffmpeg if check() == "imageio_ffmpeg" else _by_opencv
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".mp4-") as directory:
        written = Path(directory) / "whole.mp4"
        write(str(written), images, fps)
        os.replace(written, path)
    return len(images)


def _by_ffmpeg(path: str, images: list[np.ndarray], fps: float) -> None:
    ffmpeg: Any = importlib.import_module("imageio_ffmpeg")
    height, width, _ = images[0].shape
    # Run here: its own writer forks, which JAX warns of.
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps}", "-i", "-"]
    target = ["-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", path]
    command = [ffmpeg.get_ffmpeg_exe(), "-y", *source, *target]
    done = subprocess.run(
        command, input=b"".join(map(np.ndarray.tobytes, images)), capture_output=True, check=False
    )
    if done.returncode:
        raise OSError(f"ffmpeg could not write a video: {done.stderr.decode(errors='replace')[-300:]}")


def _by_opencv(path: str, images: list[np.ndarray], fps: float) -> None:
    cv2: Any = importlib.import_module("cv2")
    height, width, _ = images[0].shape
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height))
    if not writer.isOpened():
        raise OSError(f"{path} cannot be written by OpenCV: `pip install imageio-ffmpeg`")
    for image in images:
        writer.write(np.ascontiguousarray(image[..., ::-1]))
    writer.release()
