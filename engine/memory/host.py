"""The memory of the machine, or of the container that this process is in. Plain files, no MLX."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of the machine's memory that can be had now; ``root`` holds proc and sys."""
    if sys.platform != "linux":
        return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE")) // 2
    fields = _fields(root / "proc/meminfo")
    spare = [fields["MemAvailable"] * 1024]
    spare += [limit - used for limit, used in _control_groups(root)]
    return max(0, min(spare))


def total_memory(root: Path = Path("/")) -> int:
    """Bytes of the machine's memory, or of the container's if that is less."""
    if sys.platform != "linux":
        return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    total = _fields(root / "proc/meminfo")["MemTotal"] * 1024
    return max(1, min([total, *(limit for limit, _ in _control_groups(root))]))


def _control_groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of every control group with a limit that this process is in.

    Files that were read count as used until somebody needs the memory, so they are taken off.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    base = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, names = base, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mount = base / "memory"
        else:
            continue
        folder = mount / path.lstrip("/")
        # Inside a container the group's own folder is often the mount itself.
        for place in (folder, *folder.parents):
            if place == mount.parent:
                break
            found = _limit(place, *names)
            if found is not None:
                yield found


def _limit(folder: Path, limit: str, used: str, inactive: str) -> tuple[int, int] | None:
    try:
        text = (folder / limit).read_text().strip()
        if text == "max":
            return None
        stat = folder / "memory.stat"
        files = _fields(stat).get(inactive, 0) if stat.exists() else 0
        return int(text), int((folder / used).read_text()) - files
    except (OSError, ValueError):
        return None


def _fields(file: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    words = [line.replace(":", " ").split() for line in file.read_text().splitlines()]
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}
