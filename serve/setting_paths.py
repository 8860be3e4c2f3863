"""Settings that name files and folders, and models, which are folders or names on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

CACHE: Final = "cache"  # of ``models_from``: the one that all Hugging Face tools share
DEMO_NAME: Final = "quire-demo"
HUB_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def path_at(path: str, folder: Path) -> str:
    """``path`` as seen from ``folder``; links stay, so that they may be changed."""
    return os.path.abspath(folder / os.path.expanduser(path))


def model_at(model: str, folder: Path) -> str:
    """The same of a model, whose name on the Hub stays one unless a folder is called so."""
    path = path_at(model, folder)
    is_name = model == DEMO_NAME or HUB_NAME.fullmatch(model) is not None
    return model if is_name and not os.path.exists(path) else path


def _models_from_at(place: str, folder: Path) -> str:
    return place if place == CACHE else path_at(place, folder)


def _models_at(models: tuple[tuple[str, Mapping[str, Any]], ...], folder: Path) -> Any:
    return tuple((name, _table_at(table, folder)) for name, table in models)


def _table_at(table: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    model = table.get("model")
    if not isinstance(model, str) or not model.strip():
        return table  # which is told when the table is read
    return {**table, "model": model_at(model.strip(), folder)}


FILES: Final = ("api_key_file", "tls_cert_file", "tls_key_file")
# By a setting's name: its value as seen from a folder.
PLACES: Final[Mapping[str, Callable[[Any, Path], Any]]] = {
    "model": model_at,
    "models": _models_at,
    "models_from": _models_from_at,
    **dict.fromkeys(FILES, path_at),
}


def why_no_model(model: str) -> str | None:
    """Why there can be no such model; None if there is a folder, or may be one on the Hub."""
    path = os.path.expanduser(model)
    if os.path.isdir(path) or model == DEMO_NAME:
        return None
    if os.path.exists(path):
        return f"{model} is a file; give the folder with config.json and the *.safetensors files."
    if HUB_NAME.fullmatch(model):
        return None
    return f"{model}: no such folder, and not a Hugging Face owner/name."
