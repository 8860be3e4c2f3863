"""``quire models``: the models on this machine, in the cache that all Hugging Face tools share."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from quire.serve.local_models import cached_repos, local_models
from quire.serve.model_files import check_folder, download
from quire.serve.served_model import ModelFilesError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="show the models on this machine")
    listing.add_argument("--json", action="store_true", help="for programs")
    pull = actions.add_parser("pull", help="download a model from the Hugging Face Hub")
    pull.add_argument("name", metavar="OWNER/NAME")
    remove = actions.add_parser("rm", help="delete a downloaded model")
    remove.add_argument("name", metavar="OWNER/NAME")
    remove.add_argument("-y", "--yes", action="store_true", help="do not ask")


def run(args: argparse.Namespace) -> int:
    """0 if done, 1 if it could not be."""
    try:
        if args.action == "list":
            return _list(args.json)
        if args.action == "pull":
            return _pull(args.name)
        return _remove(args.name, ask=not args.yes)
    except ModelFilesError as error:
        print(f"quire: error: {error}", file=sys.stderr)
        return 1


def _list(as_json: bool) -> int:
    models = local_models()
    if as_json:
        print(json.dumps([asdict(model) for model in models], indent=1))
        return 0
    table = Table(box=None, pad_edge=False)
    for column in ("NAME", "TYPE", "SIZE", "LAST USED"):
        table.add_column(column, no_wrap=True, justify="right" if column == "SIZE" else "left")
    served = [model for model in models if not model.problem]
    for model in served:
        table.add_row(model.name, model.architecture, _size(model.size), model.used)
    # Not cut off where the output is no terminal.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    if hidden := len(models) - len(served):
        print(f"{hidden} more in the cache cannot be served; --json says why.", file=sys.stderr)
    return 0


def _pull(name: str) -> int:
    folder = download(name)
    check_folder(folder)
    print(f"{name} is here. Serve it: quire serve {name}")
    return 0


def _confirmed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:  # nobody is there to answer
        print("\nNobody answered; --yes asks for no answer.")
        return False


def _remove(name: str, ask: bool) -> int:
    from huggingface_hub import constants, scan_cache_dir

    repos = [repo for repo in cached_repos() if repo.repo_id == name]
    if not repos:
        raise ModelFilesError(f"{name} is not in the cache; quire models list shows what is.")
    size = _size(repos[0].size_on_disk)
    if ask and not _confirmed(f"Delete {name}, {size}? [y/N] "):
        print("Nothing was deleted.")
        return 1
    revisions = [revision.commit_hash for repo in repos for revision in repo.revisions]
    scan_cache_dir(constants.HF_HUB_CACHE).delete_revisions(*revisions).execute()
    print(f"Deleted {name}, {size}.")
    return 0


def _size(size: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1000:.0f} kB"
