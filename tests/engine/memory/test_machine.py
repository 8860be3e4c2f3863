"""What a machine says of its memory: control groups of both kinds, and devices."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import pytest

from quire.engine.device import select_device
from quire.engine.errors import EngineError
from quire.engine.memory.host import available_memory, total_memory
from quire.engine.memory.machine import usable_memory

MIB = 1 << 20


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 8000 kB\nMemAvailable:    4194304 kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {}, 4096),
        ("0::/\n", {"memory.max": "max\n", "memory.current": "5\n"}, 4096),
        ("0::/\n", {"memory.max": f"{1000 * MIB}\n", "memory.current": f"{200 * MIB}\n"}, 800),
        # A limit stands further up, and files that were read are no use of memory.
        (
            "0::/user.slice/app.service\n",
            {
                "user.slice/memory.max": f"{1000 * MIB}\n",
                "user.slice/memory.current": f"{900 * MIB}\n",
                "user.slice/memory.stat": f"anon 5\ninactive_file {300 * MIB}\n",
                "user.slice/app.service/memory.max": "max\n",
                "user.slice/app.service/memory.current": "5\n",
            },
            400,
        ),
        (
            "5:cpu:/\n4:memory:/docker/abc\n",
            {
                "memory/docker/abc/memory.limit_in_bytes": f"{600 * MIB}\n",
                "memory/docker/abc/memory.usage_in_bytes": f"{100 * MIB}\n",
                "memory/docker/abc/memory.stat": f"total_inactive_file {50 * MIB}\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.usage_in_bytes": "5\n",
            },
            550,
        ),
        # A container whose own group is the mount itself.
        (
            "4:memory:/docker/abc\n",
            {
                "memory/memory.limit_in_bytes": f"{300 * MIB}\n",
                "memory/memory.usage_in_bytes": f"{100 * MIB}\n",
            },
            200,
        ),
        ("0::/\n", {"memory.max": "100\n", "memory.current": "200\n"}, 0),
    ],
)
def test_the_tightest_limit_counts(
    cgroup: str, files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    assert available_memory(machine(tmp_path, cgroup, files)) // MIB == expected


def test_a_device_tells_or_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 7})
    assert usable_memory("metal") == 7
    held = mx.get_active_memory() + mx.get_cache_memory()
    monkeypatch.setattr(mx, "device_info", lambda: {"free_memory": 5})
    assert usable_memory("cuda") == 5 + held
    monkeypatch.setattr(mx, "device_info", dict)
    with pytest.raises(EngineError, match="does not tell"):
        usable_memory("metal")


def test_metal_without_a_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX says that Metal is there wherever it was built for it."""

    def no_device() -> dict[str, object]:
        raise RuntimeError("[metal::Device] No Metal device available.\nHelp.")

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", no_device)
    for wanted in ("auto", "metal"):
        with pytest.raises(EngineError, match=r"No Metal device available\. Help\..*--device cpu"):
            select_device(wanted)
    assert select_device("cpu") == "cpu"


def test_the_limit_of_a_container_is_all_there_is(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("other systems have no control groups")
    files = {"memory.max": f"{4 * MIB}\n", "memory.current": "5\n"}
    assert total_memory(machine(tmp_path, "0::/\n", files)) == 4 * MIB
