"""What MLX and Quire's kernels do on this machine: `python -m quire.loadtest.machine_probe`.

A process of its own, since a kernel that a GPU's driver refuses may take the process with it. It
prints one JSON object a line, each a part of the report, so that what came before is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from quire.engine.errors import EngineError
from quire.engine.startup.boot import start_device

_GPU_DTYPES = ("float32", "float16", "bfloat16")


def main() -> int:
    for part in _parts():
        print(json.dumps(part), flush=True)
    return 0


def _parts() -> Iterator[dict[str, Any]]:
    try:
        device, blas = start_device("auto")
    except EngineError as error:
        yield {"device": {"problem": str(error)}}
        return
    import mlx.core as mx

    from quire.engine.memory.machine import usable_memory
    from quire.kernels.choice.check import in_use, list_gaps
    from quire.kernels.choice.chips import current_chip
    from quire.kernels.cuda_cache import open_cache
    from quire.loadtest.kernels.device import copy_bandwidth

    chip = current_chip()
    yield {
        "device": {
            "name": device,
            "chip": chip.name,
            "published_gb_per_s": chip.bandwidth,
            "blas": blas,
            "mlx_says": {key: str(value) for key, value in mx.device_info().items()},
            "usable_bytes": usable_memory(device),
        }
    }
    yield {"copy_gb_per_s": copy_bandwidth(device) / 1e9}
    dtypes = _GPU_DTYPES[:1] if device == "cpu" else _GPU_DTYPES
    yield {"gaps": list_gaps(device, dtypes)}
    cache = open_cache()  # on CUDA a text takes seconds to compile, and there are hundreds
    for use in in_use(device, dtypes, cache.collecting() if cache else None):
        yield {
            "kernel": {
                "operation": use.operation,
                "shape": use.shape,
                "dtype": use.dtype,
                "variant": use.variant,
                "error": use.error,
                "limit": use.limit,
                "problem": use.problem,
                "agrees": use.agrees,
            }
        }


if __name__ == "__main__":
    raise SystemExit(main())
