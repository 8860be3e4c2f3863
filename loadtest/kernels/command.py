"""``quire bench kernels`` and ``quire bench kernels-diff``: options and exit codes.

Nothing here imports MLX before a benchmark runs: other sub-commands must not take the device.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from quire.engine.startup.boot import prepare_mlx

# The names of all specifications, listed without MLX, and one of its own.
OPERATIONS = (
    *("paged_decode", "shared_context", "prompt_attention", "mixed_attention"),
    *("kv_write", "gather_pages", "take_rows", "rotate_and_write", "rotate_and_decode"),
    *("add_rms_norm", "swiglu", "matmul", "quantized_matmul"),
    *("top_experts", "expert_matmul", "quantized_expert_matmul", "weigh_experts"),
    *("conv_window", "delta_rule", "ssm_scan", "sample"),
    "attention_table",
)


def add_commands(commands: Any) -> None:
    """Add both sub-commands to what ``add_subparsers`` returned."""
    for name, add, summary in (
        ("kernels", _add_kernels, "measure the kernels against MLX's own operations"),
        ("kernels-diff", _add_diff, "compare two results of kernels"),
    ):
        add(commands.add_parser(name, help=summary, description=summary, allow_abbrev=False))


def run(args: argparse.Namespace) -> int:
    """Run the chosen sub-command. Returns its exit code, or 2 for bad arguments."""
    try:
        code: int = args.bench_run(args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op",
        action="append",
        choices=OPERATIONS,
        metavar="NAME",
        help=f"measure this operation only; may be repeated: {', '.join(OPERATIONS)}",
    )
    parser.add_argument("--out", type=Path, help="write figures and every sample as JSON")
    parser.add_argument("--plot", type=Path, help="draw them as PNG (needs matplotlib)")
    parser.add_argument("--device", choices=("auto", "cpu", "metal", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes only")
    parser.set_defaults(bench_run=_kernels)


def _kernels(args: argparse.Namespace) -> int:
    """Returns 1 if a variant failed."""
    # Whoever has imported MLX already keeps the BLAS it came with.
    blas = None if "mlx.core" in sys.modules else prepare_mlx(args.device)
    from quire.kernels.cuda_cache import open_cache
    from quire.loadtest.kernels.bench import compile_cases, run_cases
    from quire.loadtest.kernels.cases import Profile, cases_of
    from quire.loadtest.kernels.device import use_device
    from quire.loadtest.kernels.plot import require_matplotlib, save_plot
    from quire.loadtest.kernels.table import print_case, print_kernels
    from quire.loadtest.result_file import save

    if args.plot:
        require_matplotlib()  # now, and not after minutes of measuring
    profile = Profile(use_device(args.device), args.quick)
    console = _console()
    operations = args.op or OPERATIONS
    if cache := open_cache():
        compile_cases(cases_of(operations, profile), cache.collecting())
    result = run_cases(
        cases_of(operations, profile),
        profile,
        blas=blas,
        on_case=lambda case: print_case(console, case),
    )
    print_kernels(console, result)
    if args.out:
        save(args.out, result)
    if args.plot:
        save_plot(args.plot, result)
    return 1 if result.failures else 0


def _console() -> Console:
    """As wide as the tables need where nothing limits it, such as in a file."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def _add_diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.set_defaults(bench_run=_diff)


def _diff(args: argparse.Namespace) -> int:
    """Returns 1 if anything is slower by more than 10 % and that is significant."""
    from quire.loadtest.kernels.diff import compare_kernels, print_comparison
    from quire.loadtest.kernels.results import load_kernels

    old, new = load_kernels(args.old), load_kernels(args.new)
    comparison = compare_kernels(old, new)
    print_comparison(_console(), old, new, comparison)
    return 1 if comparison.regressions else 0
