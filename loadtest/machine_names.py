"""What a report must not say: names of the user, the machine and its folders, and prompts."""

from __future__ import annotations

import getpass
import os
import platform
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from quire.loadtest.serve import WARMUP_SEED_OFFSET
from quire.loadtest.workloads import WorkloadSpec, conversations

_SHORTEST = 2  # characters; a single letter stands for too many other things


def names_of_this_machine() -> dict[str, str]:
    """What must not leave it, with what stands in its place; the longest first."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = ""
    host = platform.node()
    names = {str(Path.home()): "~", sys.prefix: "<python>", os.getcwd(): "<here>"}
    names |= {str(Path(__file__).parent.parent): "<quire>", tempfile.gettempdir(): "<tmp>"}
    # "ada-mac.local" also appears as "ada-mac".
    names |= {host: "<host>", host.partition(".")[0]: "<host>", user: "<user>"}
    found = [name for name in names if len(name) >= _SHORTEST]
    return {name: names[name] for name in sorted(found, key=len, reverse=True)}


def prompts_of(spec: WorkloadSpec) -> dict[str, str]:
    """Every text that a load of ``spec`` sends, its warm-up's too, with what stands for each."""
    texts = {
        text
        for seed in (spec.seed, spec.seed + WARMUP_SEED_OFFSET)
        for talk in conversations(msgspec.structs.replace(spec, seed=seed))
        for text in (*talk.turns, talk.system)
        if text
    }
    return dict.fromkeys(texts, "<prompt>")


def without_names(value: Any, names: dict[str, str]) -> Any:
    """``value`` with every name replaced in all of its texts, in upper or lower case.

    Paths and texts are found anywhere, names of one word only as words. In keys only paths are
    replaced: a user may be called as a part of the report is.
    """
    if isinstance(value, str):
        for name, instead in names.items():
            pattern = re.escape(name) if _is_long(name) else rf"\b{re.escape(name)}\b"
            value = re.sub(f"(?i){pattern}", lambda _: instead, value)  # noqa: B023
        return value
    if isinstance(value, dict):
        paths = {name: instead for name, instead in names.items() if _is_long(name)}
        return {
            without_names(key, paths): without_names(item, names) for key, item in value.items()
        }
    if isinstance(value, list):
        return [without_names(item, names) for item in value]
    return value


def _is_long(name: str) -> bool:
    return "/" in name or " " in name
