"""Finds the folder of the model to serve and checks its files before a worker touches them."""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import math
import os
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from quire.serve.model_types import check_type
from quire.serve.served_model import ModelFilesError
from quire.serve.setting_paths import DEMO_NAME, HUB_NAME, why_no_model

MAX_HEADER = 100 * 10**6  # bytes; the limit of the safetensors format itself
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
# The files that are read, wherever a folder has them.
_READ_FILES = ("*.json", "*.jinja", "*.safetensors", "tokenizer.model")
# Sizes in config.json that make loops and arrays.
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "num_experts", "num_local_experts"),
)
_PACKED = 16  # at most so many numbers of quantised weights lie in one stored number
_OTHER_WEIGHTS = {".gguf": "GGUF", ".bin": "PyTorch .bin", ".pt": "PyTorch .pt", ".npz": "NumPy"}
# Bits of one element. F4 and F6 types are left to the loader: they are packed.
_DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


# Of each file that is read: size in bytes, time of change in ns, inode.
Fingerprint = dict[str, tuple[int, int, int]]


class DownloadFailed(ModelFilesError):
    """The Hub cannot be reached, or not now; trying again later may help."""


@dataclass(frozen=True)
class ModelFiles:
    path: Path  # absolute
    name: str  # what to call the model unless the user says otherwise


def resolve_model(model: str | None) -> ModelFiles:
    """The checked folder of ``model``: a folder, or a name on the Hub; the demo's name or None.

    Downloads a Hub model that is not in the local cache. Raises :class:`ModelFilesError` with
    one line that says what is wrong.
    """
    if model is None or (model == DEMO_NAME and not Path(model).is_dir()):
        demo = Path(str(importlib.resources.files("quire.engine.demo") / DEMO_NAME))
        files = ModelFiles(demo, DEMO_NAME)
    elif (reason := why_no_model(model)) is not None:
        raise ModelFilesError(reason)
    elif (folder := Path(model).expanduser()).is_dir():
        folder = folder.resolve()
        files = ModelFiles(folder, folder.name)
    else:
        files = ModelFiles(download(model), model)
    check_folder(files.path)
    return files


def local_folder(model: str) -> Path:
    """Where the files of ``model`` are if they are on this machine; nothing is downloaded."""
    if HUB_NAME.fullmatch(model) and not Path(model).expanduser().is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json")
        if isinstance(found, str):
            return Path(found).parent
    return Path(model).expanduser()


def download(name: str) -> Path:
    """The folder of a Hub model, downloaded unless it is in the cache.

    Raises :class:`ModelFilesError`.
    """
    if not HUB_NAME.fullmatch(name):
        raise ModelFilesError(f"{name} is not a Hugging Face owner/name.")
    # Slow to import, and a folder does not need it.
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    try:
        # By its small file first: some cannot be served, and weights are large.
        with contextlib.suppress(errors.EntryNotFoundError):
            config = _read_object(Path(hf_hub_download(name, "config.json")))
            if "model_type" in config:
                check_type(config)
        folder = snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"])
    except ModelFilesError:
        raise
    except Exception as error:
        raise hub_error(name, error) from error
    return Path(folder)


def hub_error(name: str, error: Exception) -> ModelFilesError:
    """What the Hub's client says, in one line."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return ModelFilesError(
            f"{name} is gated: accept its terms on its Hugging Face page, then set HF_TOKEN."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelFilesError(
            f"{name} is neither a folder here nor a model on Hugging Face that you may read "
            "(private ones need HF_TOKEN)."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        is_offline = constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if is_offline else "the Hugging Face Hub cannot be reached"
        return DownloadFailed(f"{name} is not in the local cache and {reason}.")
    # Whatever the network and the client library come up with ends here, as one line.
    summary = " ".join(str(error).split())[:300]
    return DownloadFailed(f"Cannot download {name}: {type(error).__name__}: {summary}")


def is_hub_name(model: str) -> bool:
    """Whether no folder is meant."""
    return HUB_NAME.fullmatch(model) is not None and not Path(model).expanduser().is_dir()


def download_state(model: str | None) -> str | None:
    """How far the download of a Hub model is; None for a folder."""
    if model is None or not HUB_NAME.fullmatch(model) or Path(model).expanduser().is_dir():
        return None
    from huggingface_hub import constants

    blobs = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "blobs"
    size = 0
    for blob in blobs.glob("*"):
        with contextlib.suppress(OSError):
            size += blob.stat().st_size
    return f"{size / 1e9:.2f} GB so far"


def check_folder(folder: Path) -> None:
    """Raise :class:`ModelFilesError` if ``folder`` cannot hold a complete, safe model."""
    if not folder.is_dir():
        raise ModelFilesError(f"{folder}: no such folder.")
    _check_kinds(folder)
    config = _read_object(folder / "config.json")
    if config.get("model_file") is not None:
        raise ModelFilesError(
            f"{folder / 'config.json'} asks to run {config['model_file']!r}; "
            "Quire does not run code from a model folder."
        )
    weights = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        _check_index(index)
    if not weights:
        others = {_OTHER_WEIGHTS[f.suffix] for f in folder.iterdir() if f.suffix in _OTHER_WEIGHTS}
        found = f" ({', '.join(sorted(others))} weights are not supported)" if others else ""
        raise ModelFilesError(f"{folder} has no *.safetensors files{found}.")
    tensors = [tensor for file in weights for tensor in check_safetensors(file)]
    _check_sizes(folder / "config.json", config, tensors)


def fingerprint(folder: Path) -> Fingerprint:
    """Differs when a file that is read has changed; empty for a folder that has gone."""
    prints = {}
    for file in _read_files(folder):
        with contextlib.suppress(OSError):
            status = file.stat()
            prints[file.name] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return prints


def _read_files(folder: Path) -> list[Path]:
    return sorted({file for pattern in _READ_FILES for file in folder.glob(pattern)})


def _check_kinds(folder: Path) -> None:
    """Opening a pipe would never end, and a link could show any file of this machine."""
    root = folder.resolve()
    # In the Hub's cache files are links into a folder beside the snapshots.
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for file in _read_files(folder):
        target = file.resolve()
        if not any(target.is_relative_to(allowed) for allowed in roots):
            raise ModelFilesError(
                f"{file} links out of its folder; put the file itself there, or link the folder."
            )
        try:
            regular = stat.S_ISREG(file.stat().st_mode)
        except OSError as error:
            raise ModelFilesError(f"Cannot read {file}: {error.strerror}.") from error
        if not regular:
            raise ModelFilesError(f"{file} is not a regular file.")


def _check_sizes(file: Path, config: Mapping[str, object], tensors: Sequence[int]) -> None:
    """A configuration that claims more than its weights could hold would load without an end."""
    largest = _PACKED * max(tensors, default=0)
    text = config.get("text_config")
    for scope in (config, text if isinstance(text, dict) else {}):
        layers = scope.get("num_hidden_layers")
        if isinstance(layers, int) and layers > len(tensors):
            raise ModelFilesError(
                f"{file} claims {layers} layers; the weights have {len(tensors)} tensors."
            )
        for name in _SIZES:
            size = scope.get(name)
            if isinstance(size, int) and size > largest:
                raise ModelFilesError(
                    f"{file} claims a {name} of {size}; no tensor of the weights is that large."
                )


def _read_object(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelFilesError(
            f"{path.parent} has no {path.name}; it is not a model folder."
        ) from error
    except OSError as error:
        raise ModelFilesError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelFilesError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ModelFilesError(f"{path} must hold a JSON object.")
    return value


def _check_index(index: Path) -> None:
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise ModelFilesError(f"{index} has no usable weight_map.")
    names = sorted(set(weight_map.values()))
    if any(name != os.path.basename(name) for name in names):
        raise ModelFilesError(f"{index} names files outside its folder.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelFilesError(
            f"{index.parent} is incomplete: {missing[0]}{more} missing. Download it again."
        )


def check_safetensors(path: Path) -> list[int]:
    """Compare the header of one file with its size; no tensor is read.

    Returns the number of stored numbers of each tensor. Raises :class:`ModelFilesError`.

    The format: 8 bytes little-endian length, that many bytes of JSON, then the tensors back to
    back (https://github.com/huggingface/safetensors#format).
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
            if length > MAX_HEADER:
                raise ModelFilesError(f"{path} is not a safetensors file: its header is too large.")
            if length < 2 or 8 + length > size:
                raise ModelFilesError(f"{path} is cut off or no safetensors file.")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ModelFilesError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelFilesError(f"{path} has a broken header: {error}.") from error
    end = _data_end(path, header)
    if end != size - 8 - length:
        state = "cut off" if end > size - 8 - length else "longer than its header says"
        raise ModelFilesError(
            f"{path} is {state}: {size} bytes instead of {8 + length + end}. Download it again."
        )
    return [math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__"]


def _data_end(path: Path, header: object) -> int:
    """Where the last tensor ends; checks that the tensors lie back to back and fit their shapes."""
    if not isinstance(header, dict):
        raise ModelFilesError(f"{path} has a broken header: not a JSON object.")
    spans = [(0, 0)]
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = tensor["data_offsets"]
            elements = math.prod(tensor["shape"])
            bits = _DTYPE_BITS.get(tensor["dtype"])
            fits = bits is None or 8 * (end - begin) == bits * elements
            sound = 0 <= begin <= end and fits
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise ModelFilesError(f"{path} has a broken header: tensor {name!r} does not add up.")
        spans.append((begin, end))
    spans.sort()
    if any(left[1] != right[0] for left, right in pairwise(spans)):
        raise ModelFilesError(f"{path} has a broken header: its tensors overlap or leave gaps.")
    return spans[-1][1]
