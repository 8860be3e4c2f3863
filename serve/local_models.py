"""Models on this machine: in the shared cache of Hugging Face, and in folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from quire.serve.model_files import check_folder, resolve_model
from quire.serve.model_types import check_type
from quire.serve.served_model import ModelFilesError
from quire.serve.setting_paths import CACHE, DEMO_NAME

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo


@dataclass(frozen=True)
class LocalModel:
    """``size`` is in bytes on the disk; ``problem`` says why Quire cannot serve it, or is empty."""

    name: str
    architecture: str
    size: int
    used: str  # ISO date of the last access
    problem: str


def local_models() -> list[LocalModel]:
    """The demo, then every cached model by name."""
    demo = resolve_model(None).path
    size = sum(file.stat().st_size for file in demo.iterdir())
    found = [_describe(DEMO_NAME, demo, size, "")]
    for repo in sorted(cached_repos(), key=lambda repo: repo.repo_id):
        used = datetime.fromtimestamp(repo.last_accessed, UTC).date().isoformat()
        found.append(_describe(repo.repo_id, _newest(repo), repo.size_on_disk, used))
    return found


def cached_repos() -> list[CachedRepoInfo]:
    """Models in the shared cache, whether or not they can be served."""
    # Slow to import.
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        cached = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return []
    return [repo for repo in cached.repos if repo.repo_type == "model" and repo.revisions]


def _newest(repo: CachedRepoInfo) -> Path:
    return max(repo.revisions, key=lambda revision: revision.last_modified).snapshot_path


def _describe(name: str, folder: Path, size: int, used: str) -> LocalModel:
    try:
        check_folder(folder)
        config = json.loads((folder / "config.json").read_bytes())
        check_type(config)
        return LocalModel(name, config["model_type"], size, used, "")
    except ModelFilesError as error:
        return LocalModel(name, "", size, used, str(error).replace(f"{folder}", name))


def models_in(place: str) -> Iterator[tuple[str, Path]]:
    """Names and folders of models that can be served.

    Args:
        place: "cache", or a folder that has theirs, as NAME or OWNER/NAME, in it.

    Raises:
        ModelFilesError: there is no such folder.
    """
    if place == CACHE:
        found = [(repo.repo_id, _newest(repo)) for repo in cached_repos()]
    else:
        root = Path(place).expanduser().resolve()
        if not root.is_dir():
            raise ModelFilesError(f"{place}: no such folder.")
        configs = (path for depth in ("*", "*/*") for path in root.glob(f"{depth}/config.json"))
        found = [(path.parent.relative_to(root).as_posix(), path.parent) for path in configs]
    for name, folder in sorted(found):
        if not _describe(name, folder, 0, "").problem:
            yield name, folder
