"""Handlers for helper processes under test, good and bad."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from quire.serve.helper_process import Refused


def make(config: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    if config.get("broken"):
        raise RuntimeError("cannot start")

    def handle(request: dict[str, Any]) -> Any:
        match request["do"]:
            case "echo":
                return [config["name"], request["value"], os.getpid()]
            case "refuse":
                raise Refused({"reason": "no", "path": "a.b"})
            case "fail":
                raise KeyError("missing")
            case "loop":
                while True:
                    pass
            case "allocate":
                held = [bytearray(16 << 20) for _ in range(request["mib"] // 16)]
                return len(held)
            case "allocate at once":
                return len("a" * (request["mib"] << 20))
            case "die":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "sleep":
                time.sleep(request["seconds"])
                return None
            case "print":
                print("not a frame", flush=True)
                return None
        raise AssertionError(request)

    return handle
