"""Where an output may go, and how it gets there: the folder takes its name in one step, or nothing changes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from merger.checkpoint.disk import disk_error, sync
from merger.errors import RecipeError, ResourceError, system_reason


def partial_of(path: Path) -> Path:
    """The folder in which an output is made."""
    return path.with_name(path.name + ".partial")


def check_output(path: Path, inputs: Iterable[Path], *, neighbours: Iterable[Path] = (), force: bool) -> None:
    """Raises RecipeError for an output that is occupied, or that would touch an input; see `output_fault`."""
    if fault := output_fault(path, inputs, neighbours=neighbours, force=force):
        raise RecipeError(f"output.path: {fault}")


def output_fault(
    path: Path, inputs: Iterable[Path], *, neighbours: Iterable[Path] = (), force: bool = False
) -> str | None:
    """Says why no output can go to ``path``; None where one can. Symbolic links are followed first.

    An output must not lie in a folder of ``inputs`` nor replace it. ``neighbours`` are files and folders that an output
    may lie in or next to, but must not replace. No folder can replace a mount point.
    """
    try:
        real = path.resolve()
        for folder in inputs:
            directory = folder.resolve()
            if real == directory or directory in real.parents or real in directory.parents:
                return f"{path} is, holds or lies in the input {folder}; choose another folder"
        for neighbour in neighbours:
            if real in (neighbour.resolve(), *neighbour.resolve().parents):
                return f"{path} is or holds {neighbour}; choose another folder"
        if is_occupied(path) and not force:
            return occupied(path)
        if is_mount_point(path):
            inside = path / "model"
            return f"{path} is a mount point, which no folder can take the place of; write to a folder in it: {inside}"
    except (OSError, RuntimeError) as error:  # names too long, links in a circle
        reason = system_reason(error) if isinstance(error, OSError) else str(error)
        return f"{path}: cannot be used: {reason}"
    return None


def is_occupied(path: Path) -> bool:
    """Whether anything but an empty folder has this name."""
    if path.is_symlink() or not path.is_dir():
        return path.is_symlink() or path.exists()
    return any(path.iterdir())


def occupied(path: Path) -> str:
    """The fault of an output that is there already."""
    return f"{path} is there already; choose another folder, or replace it with force=True"


def is_mount_point(path: Path) -> bool:
    """Whether a file system is mounted on a folder, such as a volume of a container."""
    if path.is_symlink() or not path.is_dir():
        return False
    if os.path.ismount(path):
        return True
    try:  # a folder that is mounted within its own file system (bind mount) shows in this list alone
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    real = os.fsencode(path.resolve())
    return any(_unescaped(line.split()[4]) == real for line in lines)


def _unescaped(name: bytes) -> bytes:
    r"""A path of the kernel's list of mounts, in which a space is written \040."""
    return re.sub(rb"\\(\d{3})", lambda code: bytes([int(code[1], 8)]), name)


def take_place(folder: Path, path: Path, spare: Path, *, force: bool) -> None:
    """Renames ``folder`` to ``path``; with ``force`` an existing ``path`` moves to ``spare``, or to ``folder``.

    If the new names cannot be put on disk, both folders are back where they were. Raises RecipeError if the name is
    taken, and ResourceError if the disk fails.
    """
    undo: Callable[[], object]
    try:
        if not is_occupied(path):
            os.rename(folder, path)  # over an empty folder too
            undo = partial(os.rename, path, folder)
        elif not force:
            raise RecipeError(f"output.path: {occupied(path)}")
        elif _exchange(folder, path):
            undo = partial(_exchange, folder, path)
        else:
            _rename_both((path, spare), (folder, path))
            undo = partial(_rename_both, (path, folder), (spare, path))
    except OSError as error:
        raise disk_error(path, error) from None
    try:
        sync(path.parent)
    except ResourceError:
        with contextlib.suppress(OSError):
            undo()
        raise


def _rename_both(first_move: tuple[Path, Path], second_move: tuple[Path, Path]) -> None:
    """Renames twice, or not at all."""
    os.rename(*first_move)
    try:
        os.rename(*second_move)
    except BaseException:
        os.rename(*reversed(first_move))
        raise


def _exchange(folder: Path, path: Path) -> bool:
    """Swaps two names in one step, which only Linux can (renameat2); returns False on other systems."""
    working_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None or rename(working_folder, os.fsencode(folder), working_folder, os.fsencode(path), exchange) == 0:
        return rename is not None
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):  # EPERM: a sandbox that forbids the call
        return False
    raise OSError(code, os.strerror(code), str(path))
