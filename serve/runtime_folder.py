"""Where the sockets and temporary files of workers lie: in a folder that only this user can enter.

MLX loads what it compiled for the CPU from a path below TMPDIR that anybody can guess, so that in a
shared /tmp another user could put code there first.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

# The longest name below a worker's folder, "/requests", and the NUL that ends a socket's path. The
# shortest limit of a path is macOS's.
_MAX_FOLDER = 103 - 10
_COMPILED = "mlx"  # MLX's own name of the folder with what it compiles


def make_worker_folder() -> Path:
    """A new folder for one worker, to be its TMPDIR.

    What MLX compiled for earlier ones is linked into it. Raises OSError.
    """
    base = _private_base(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=base))
    if len(os.fsencode(folder)) > _MAX_FOLDER:  # a long TMPDIR does not fit into a socket's path
        folder.rmdir()
        base = _private_base(Path("/tmp"))
        folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=base))
    (base / _COMPILED).mkdir(mode=0o700, exist_ok=True)
    (folder / _COMPILED).symlink_to(Path("..") / _COMPILED)
    return folder


def remove_leftovers() -> None:
    """Remove the folders of processes that could not do so themselves."""
    for parent in {Path(tempfile.gettempdir()), Path("/tmp")}:
        base = parent / _base_name()
        if not _is_private(base):
            continue
        for folder in base.iterdir():
            owner = re.match(r"([0-9]+)-", folder.name)
            if owner and not _is_running(int(owner[1])):
                shutil.rmtree(folder, ignore_errors=True)


def _private_base(parent: Path) -> Path:
    base = parent / _base_name()
    with contextlib.suppress(FileExistsError):
        base.mkdir(mode=0o700)
    if not _is_private(base):
        # Somebody else was first with this name.
        base = Path(tempfile.mkdtemp(prefix="quire-", dir=parent))
    return base


def _base_name() -> str:
    return f"quire-{os.getuid()}"


def _is_private(folder: Path) -> bool:
    try:
        status = folder.lstat()
    except OSError:
        return False
    is_open = status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not is_open


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
