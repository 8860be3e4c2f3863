"""``quire ps``: what a running server serves and how busy it is."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from quire.serve import settings as settings_module
from quire.serve.console import server_url
from quire.serve.settings import SettingsError

TIMEOUT = 10  # seconds; a server answers this while it loads, too
NOT_RUNNING = 3  # the exit code, as of `quire service status`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", metavar="URL", help="the server (default: where `quire serve` would listen)"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """0 if a server answered, 1 if it asks for another key, 3 if there is none."""
    url = args.url or _default_url(os.environ)
    if not url.startswith(("http://", "https://")):
        raise SettingsError(f"--url must begin with http:// or https://, not {url!r}")
    try:
        key = settings_module.load({}, os.environ).api_key
        state = read_state(url.rstrip("/"), key)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403):
            message = f"the server at {url} asks for an API key that it knows: set QUIRE_API_KEY"
            print(f"quire: {message}", file=sys.stderr)
            return 1
        reason = getattr(error, "reason", None) or error
        print(f"quire: no server answers at {url}: {reason}", file=sys.stderr)
        return NOT_RUNNING
    if args.json:
        print(json.dumps(state, indent=1))
    else:
        print("\n".join(f"{name:<10} {value}" for name, value in _lines(url, state)))
    return 0


def read_state(url: str, key: str | None = None) -> dict[str, Any]:
    """Raises OSError or ValueError where no Quire server answers."""
    models = json.loads(_get(f"{url}/v1/models", key))["data"]
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(_get(f"{url}/metrics", key)):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            samples.setdefault(sample.name, {})[labels] = sample.value
    if "quire_build_info" not in samples:
        raise ValueError("it is not a Quire server")

    def total(name: str, **where: str) -> float:
        found = samples.get(f"quire_{name}", {}).items()
        return sum(value for labels, value in found if set(where.items()) <= set(labels))

    ids = [dict(labels)["model"] for labels in samples.get("quire_model_loaded", {})]
    return {
        "version": dict(next(iter(samples["quire_build_info"])))["version"],
        "models": [model["id"] for model in models],
        "loaded": {
            model: {
                "ready": bool(total("model_ready", model=model)),
                "running": int(total("requests_running", model=model)),
                "waiting": int(total("requests_waiting", model=model)),
                "memory": int(
                    total("memory_bytes", kind="active", model=model)
                    + total("memory_bytes", kind="cache", model=model)
                ),
            }
            for model in ids
            if total("model_loaded", model=model)
        },
        "ready": bool(total("model_ready")),
        "running": int(total("requests_running")),
        "waiting": int(total("requests_waiting")),
        "kv_blocks_used": int(total("kv_blocks", state="used")),
        "kv_blocks": int(total("kv_blocks")),
        "memory": int(total("memory_bytes", kind="active") + total("memory_bytes", kind="cache")),
        "generated_tokens": int(total("generated_tokens_total")),
        "worker_restarts": int(total("worker_restarts_total")),
    }


def _lines(url: str, state: Mapping[str, Any]) -> list[tuple[str, str]]:
    used, blocks = state["kv_blocks_used"], state["kv_blocks"]
    return [
        ("server", f"{url}, Quire {state['version']}"),
        ("models", ", ".join(state["models"])),
        *(("loaded", f"{model}: {_loaded(of)}") for model, of in state["loaded"].items()),
        ("state", "ready" if state["ready"] else "not ready"),
        ("requests", f"{state['running']} running, {state['waiting']} waiting"),
        ("KV blocks", f"{used} of {blocks} in use"),
        ("memory", f"{state['memory'] / 2**30:.2f} GiB on the device"),
        ("generated", f"{state['generated_tokens']} tokens"),
        ("restarts", f"{state['worker_restarts']} of the worker"),
    ]


def _loaded(of: Mapping[str, Any]) -> str:
    if not of["ready"]:
        return "not ready"
    requests = f"{of['running']} running, {of['waiting']} waiting"
    return f"{requests}, {of['memory'] / 2**30:.2f} GiB on the device"


def _default_url(environ: Mapping[str, str]) -> str:
    settings = settings_module.load({}, environ)
    return server_url(settings.host, settings.port, tls=settings.tls_cert_file is not None)


def _get(url: str, key: str | None) -> str:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        return str(response.read().decode())
