"""``quire bench``: its sub-commands, their options, and how they end."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import signal
import sys
import tempfile
from pathlib import Path

import msgspec
from rich.console import Console

from quire.loadtest.chat import ServerError
from quire.loadtest.compare import Task, compare
from quire.loadtest.http import BaseURL
from quire.loadtest.kernels.command import add_commands as add_kernel_commands
from quire.loadtest.model_folder import SHAPES, ModelShape, make_model
from quire.loadtest.report import print_comparison, print_load, print_run, print_stall
from quire.loadtest.result_file import save
from quire.loadtest.results import CompareResult, LoadResult, StallResult
from quire.loadtest.serve import LoadOptions, find_target, measure_load
from quire.loadtest.servers import find_openblas, mlx_lm_spec, quire_spec
from quire.loadtest.stall import StallOptions, measure_stall
from quire.loadtest.workloads import WORKLOADS, WorkloadName, WorkloadSpec, conversations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands of ``quire bench`` to ``parser``."""
    commands = parser.add_subparsers(dest="bench_command", required=True, metavar="COMMAND")
    for name, add, summary in (
        ("serve", _add_serve, "measure a running server"),
        ("stall", _add_stall, "measure what a long prompt does to running streams"),
        (
            "compare",
            _add_compare,
            "measure quire and mlx_lm.server on one load, without thinking",
        ),
        ("make-model", _add_make_model, "write a model with random weights"),
    ):
        add(commands.add_parser(name, help=summary, description=summary, allow_abbrev=False))
    add_kernel_commands(commands)


def run(args: argparse.Namespace) -> int:
    """Run the chosen sub-command.

    Returns 0, 1 if requests or kernels failed or became slower, or 2 for bad arguments.
    """
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
        "--system-chars", type=int, help="shared, agent: length of the system prompt (780, 4000)"
    )
    parser.add_argument("--turns", type=int, help="multiturn, agent: turns per chat (4, 12)")
    parser.add_argument(
        "--edit-turn",
        type=int,
        metavar="N",
        help="multiturn, agent: change a message in mid-history in front of this turn, from 0",
    )
    _add_request_options(parser)


def _add_request_options(parser: argparse.ArgumentParser) -> None:
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


def _load_options(args: argparse.Namespace, workload: WorkloadName) -> LoadOptions:
    spec = WorkloadSpec(
        name=workload,
        requests=args.requests,
        max_tokens=args.max_tokens,
        seed=args.seed,
        prompt_chars=args.prompt_chars,
        system_chars=args.system_chars,
        turns=args.turns,
        edit_turn=args.edit_turn,
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
    parser.add_argument(
        "--no-prefix-cache",
        action="store_true",
        help="a cache_salt of its own for every request; an extension not every server takes",
    )
    parser.add_argument(
        "--count-cacheable",
        action="store_true",
        help="ask for token ids, and count what earlier requests had computed of prompts; likewise",
    )
    parser.add_argument("--out", type=Path, help="write figures and raw records as JSON")
    parser.set_defaults(bench_run=_serve)


def _serve(args: argparse.Namespace) -> int:
    options = msgspec.structs.replace(
        _load_options(args, args.workload),
        prefix_cache=not args.no_prefix_cache,
        count_cacheable=args.count_cacheable,
    )
    base, headers = BaseURL.parse(args.url), _headers(args)

    async def measure() -> LoadResult:
        target, server = await find_target(base, args.model, options, headers)
        return await measure_load(target, server, options)

    result = asyncio.run(measure())
    print_load(Console(), result)
    if args.out:
        save(args.out, result)
    return 1 if result.summary.errors else 0


def _add_stall_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stall-prompt-chars", type=int, default=4000, help="length of the long prompt (4000)"
    )
    parser.add_argument(
        "--stall-max-tokens",
        type=int,
        default=2048,
        help="most tokens of a running stream; all are closed at the end (2048)",
    )


def _stall_options(args: argparse.Namespace) -> StallOptions:
    return StallOptions(
        streams=args.clients,
        prompt_chars=args.stall_prompt_chars,
        max_tokens=args.stall_max_tokens,
        seed=args.seed,
    )


def _add_stall(parser: argparse.ArgumentParser) -> None:
    _add_target(parser)
    parser.add_argument("--clients", type=int, default=8, help="running streams (8)")
    parser.add_argument("--seed", type=int, default=0, help="of the generated texts (0)")
    _add_request_options(parser)
    _add_stall_options(parser)
    parser.add_argument("--out", type=Path, help="write figures and raw records as JSON")
    parser.set_defaults(bench_run=_stall)


def _stall(args: argparse.Namespace) -> int:
    base, headers = BaseURL.parse(args.url), _headers(args)
    request = LoadOptions(
        WorkloadSpec(),
        temperature=args.temperature,
        ignore_eos=args.ignore_eos,
        timeout=args.timeout,
    )

    async def measure() -> StallResult:
        target, server = await find_target(base, args.model, request, headers)
        return await measure_stall(target, server, _stall_options(args))

    result = asyncio.run(measure())
    print_stall(Console(), result)
    if args.out:
        save(args.out, result)
    return 0


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, help="model folder; default: a new one as from make-model"
    )
    parser.add_argument(
        "--workloads",
        default="uniform,mixed,shared",
        help=f"comma-separated, of {', '.join(WORKLOADS)} and stall (uniform,mixed,shared)",
    )
    _add_load_options(parser)
    _add_stall_options(parser)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each on each server (2)")
    parser.add_argument(
        "--ready-timeout", type=float, default=300.0, help="seconds for a server to start (300)"
    )
    parser.add_argument("--quire-args", default="", help="more options for quire serve, quoted")
    parser.add_argument("--mlx-lm-args", default="", help="more options for mlx_lm.server, quoted")
    parser.add_argument(
        "--no-preload", action="store_true", help="do not preload OpenBLAS into the servers"
    )
    parser.add_argument(
        "--out", type=Path, help="write figures and raw records as JSON, anew after every run"
    )
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what the servers print")
    parser.set_defaults(bench_run=_compare)


def _tasks(args: argparse.Namespace) -> list[Task]:
    tasks: list[Task] = []
    if args.clients < 1 or args.rounds < 1:
        raise ValueError("--clients and --rounds must be at least 1")
    for item in args.workloads.split(","):
        name = next((name for name in WORKLOADS if name == item), None)
        if name is not None:
            options = _load_options(args, name)
            conversations(options.workload)  # a bad option is an error before a server starts
            tasks.append(options)
        elif item == "stall":
            tasks.append(_stall_options(args))
        else:
            raise ValueError(f"--workloads: {item!r} is none of {', '.join(WORKLOADS)} and stall")
    return tasks


def _compare(args: argparse.Namespace) -> int:
    tasks = _tasks(args)
    preload = None if args.no_preload else find_openblas()
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model
        if model is None:
            model = Path(scratch, "model")
            make_model(model, ModelShape())
        elif not (model / "config.json").is_file():
            raise ValueError(f"--model: {model} has no config.json; it must be a model folder")
        specs = [
            quire_spec(model, args.clients, shlex.split(args.quire_args), preload),
            mlx_lm_spec(model, args.clients, shlex.split(args.mlx_lm_args), preload),
        ]

        if args.logs:
            args.logs.mkdir(parents=True, exist_ok=True)

        def heard(so_far: CompareResult) -> None:
            print_run(console, so_far.runs[-1])
            if args.out:
                save(args.out, so_far)

        async def measure() -> CompareResult:
            # Cancelling, unlike dying, stops the server that is running.
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
            return await compare(
                specs,
                tasks,
                args.rounds,
                probe=_load_options(args, "uniform"),
                ready_seconds=args.ready_timeout,
                on_run=heard,
                logs=args.logs,
            )

        try:
            result = asyncio.run(measure())
        except asyncio.CancelledError:
            return 128 + signal.SIGTERM
    print_comparison(console, result)
    return 1 if any(run.failure for run in result.runs) else 0


def _add_make_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument(
        "--shape", choices=tuple(SHAPES), default="small", help="what the rest changes (small)"
    )
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
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, help=f"({getattr(SHAPES['small'], name)})")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="(float32)")
    parser.add_argument(
        "--bits", type=int, choices=(4, 8), help="quantize every matrix, in groups of 64"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights (0)")
    parser.set_defaults(bench_run=_make_model)


def _make_model(args: argparse.Namespace) -> int:
    changes = {name: getattr(args, name, None) for name in ModelShape.__struct_fields__}
    given = {name: value for name, value in changes.items() if value is not None}
    shape = msgspec.structs.replace(SHAPES[args.shape], **given)
    parameters = make_model(args.folder, shape, args.seed)
    bits = f", {shape.bits}-bit weights" if shape.bits else ""
    print(f"{args.folder}: {parameters / 1e6:.1f} M parameters, {shape.dtype}{bits}")
    return 0
