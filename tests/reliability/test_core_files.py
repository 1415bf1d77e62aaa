"""Sealed files: every bit counts, and nothing is read that is not a plain file of a fitting size."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from grpo_jax import files

CONTENT = files.seal("policy", 2, b"some payload\n\x00\xff")


def test_round_trip(tmp_path: Path) -> None:
    files.write_sealed(tmp_path / "x", "policy", 2, b"some payload\n\x00\xff")
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert files.read_sealed(tmp_path / "x", "policy", (1, 2), 14 + 1) == (2, b"some payload\n\x00\xff")


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    for bit in range(8 * len(CONTENT)):
        flipped = bytearray(CONTENT)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="x is (damaged|not a grpo-jax policy)"):
            files.unseal(tmp_path / "x", bytes(flipped), "policy", (2,))
    for length in range(len(CONTENT)):
        with pytest.raises(ValueError, match="x is (damaged|not a grpo-jax policy)"):
            files.unseal(tmp_path / "x", CONTENT[:length], "policy", (2,))
    with pytest.raises(ValueError, match="16 bytes of 15 are there"):
        files.unseal(tmp_path / "x", CONTENT + b"\n", "policy", (2,))


def test_another_kind_version_or_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a grpo-jax policy, not a grpo-jax checkpoint"):
        files.unseal(tmp_path / "x", CONTENT, "checkpoint", (2,))
    with pytest.raises(ValueError, match=r"has version 2 of the policy format.*it knows 1.*a newer one"):
        files.unseal(tmp_path / "x", CONTENT, "policy", (1,))
    with pytest.raises(ValueError, match="is not a grpo-jax policy"):
        files.unseal(tmp_path / "x", b"old content", "policy", (1,))
    assert files.unseal(tmp_path / "x", b"old", "policy", (1,), unsealed=True) == (files.UNSEALED, b"old")
    with pytest.raises(ValueError, match="its first line is no seal"):
        files.unseal(tmp_path / "x", b"grpo-jax policy 1\nold", "policy", (1,), unsealed=True)


@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "socket", "sparse"])
def test_what_must_not_be_read_is_refused_before(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = tmp_path / "x", f"is a {kind}, not a plain file"
    if kind == "pipe":
        os.mkfifo(path)  # reading it would wait for ever
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # a socket's path must be short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("x")
    else:
        path.touch()
        os.truncate(path, 4 << 30)
        expected = "has 4,294,967,296 bytes, more than the 1,000 that it can need"
    with pytest.raises(ValueError, match=expected):
        files.read_bounded(path, 1000)


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"mine")
    (tmp_path / "x").symlink_to("outside")
    files.write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "outside").read_bytes() == b"mine"
    assert (tmp_path / "x").read_bytes() == b"new" and not (tmp_path / "x").is_symlink()


@pytest.mark.parametrize("call", ["mkstemp", "fsync", "replace"])
def test_a_write_that_fails_keeps_the_old_file_and_names_it(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "x"
    path.write_bytes(b"old")
    monkeypatch.setattr(files.tempfile if call == "mkstemp" else files.os, call, full)
    with pytest.raises(OSError, match=r"No space left on device.*/x'") as raised:
        files.write_atomically(path, b"new")
    assert raised.value.errno == 28
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


def test_what_killed_saves_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    others = ("x", ".y.abcd1234.tmp", ".x.abcd1234.old", ".x.abcd12345", "x.abcd1234.tmp")
    for name in (*others, ".x.abcd1234.tmp", ".x.ab_d1234"):
        (tmp_path / name).touch()
    (tmp_path / ".x.aaaaaaaa.tmp").symlink_to("x")
    files.remove_temporaries(tmp_path / "x")
    assert sorted(os.listdir(tmp_path)) == sorted((*others, ".x.aaaaaaaa.tmp"))
    files.remove_temporaries(tmp_path / "nowhere" / "x")
