"""``quire bench``: its sub-commands, their options, and how they end."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

from rich.console import Console

from quire.loadtest.chat import ServerError
from quire.loadtest.http import BaseURL
from quire.loadtest.model_folder import ModelShape, make_model
from quire.loadtest.report import print_load
from quire.loadtest.results import save_result
from quire.loadtest.serve import LoadOptions, measure_load
from quire.loadtest.workloads import WORKLOADS, WorkloadSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands of ``quire bench`` to ``parser``."""
    commands = parser.add_subparsers(dest="bench_command", required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="measure a running server"))
    _add_make_model(commands.add_parser("make-model", help="write a model with random weights"))


def run(args: argparse.Namespace) -> int:
    """Run the chosen sub-command. Returns 0, 1 if requests failed, or 2 for bad arguments."""
    try:
        code: int = args.bench_run(args)
    except (ServerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, default=8, help="concurrent clients (8)")
    parser.add_argument("--requests", type=int, default=64, help="requests in all (64)")
    parser.add_argument("--max-tokens", type=int, default=64, help="output length (64)")
    parser.add_argument("--seed", type=int, default=0, help="of the generated texts (0)")
    parser.add_argument("--warmup", type=int, default=8, help="requests sent before (8)")
    parser.add_argument("--prompt-chars", type=int, help="length of each user message")
    parser.add_argument(
        "--system-chars", type=int, default=780, help="shared: length of the system prompt (780)"
    )
    parser.add_argument("--turns", type=int, default=4, help="multiturn: turns per chat (4)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    parser.add_argument(
        "--ignore-eos",
        action="store_true",
        help="ask for answers of exactly max_tokens; an extension not every server takes",
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds for one request (600)"
    )


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server listens")
    parser.add_argument("--model", help="model id; asked from /v1/models if not given")
    parser.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable that holds the API key"
    )


def _load_options(args: argparse.Namespace, workload: str) -> LoadOptions:
    name = next((name for name in WORKLOADS if name == workload), None)
    if name is None:
        raise ValueError(f"unknown workload {workload!r}; there are {', '.join(WORKLOADS)}")
    spec = WorkloadSpec(
        name=name,
        requests=args.requests,
        max_tokens=args.max_tokens,
        seed=args.seed,
        prompt_chars=args.prompt_chars,
        system_chars=args.system_chars,
        turns=args.turns,
    )
    return LoadOptions(
        workload=spec,
        clients=args.clients,
        warmup=args.warmup,
        temperature=args.temperature,
        ignore_eos=args.ignore_eos,
        timeout=args.timeout,
    )


def _headers(args: argparse.Namespace) -> dict[str, str]:
    if not args.api_key_env:
        return {}
    key = os.environ.get(args.api_key_env)
    if not key:
        raise ValueError(f"--api-key-env: {args.api_key_env} is not set")
    return {"Authorization": f"Bearer {key}"}


def _add_serve(parser: argparse.ArgumentParser) -> None:
    _add_target(parser)
    parser.add_argument("--workload", choices=WORKLOADS, default="uniform")
    _add_load_options(parser)
    parser.add_argument("--out", type=Path, help="write figures and raw records as JSON")
    parser.set_defaults(bench_run=_serve)


def _serve(args: argparse.Namespace) -> int:
    options = _load_options(args, args.workload)
    base = BaseURL.parse(args.url)
    result = asyncio.run(measure_load(base, args.model, options, _headers(args)))
    print_load(Console(), result)
    if args.out:
        save_result(args.out, result)
    return 1 if result.summary.errors else 0


def _add_make_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR")
    shape = ModelShape()
    for name in (
        "hidden",
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "intermediate",
        "vocab",
        "max_position",
    ):
        default = getattr(shape, name)
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=default, help=f"({default})")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (0)")
    parser.set_defaults(bench_run=_make_model)


def _make_model(args: argparse.Namespace) -> int:
    shape = ModelShape(**{name: getattr(args, name) for name in ModelShape.__struct_fields__})
    parameters = make_model(args.folder, shape, args.seed)
    print(f"{args.folder}: {parameters / 1e6:.1f} M parameters, {shape.dtype}")
    return 0
