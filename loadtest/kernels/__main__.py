"""``python -m quire.loadtest.kernels`` has the kernel sub-commands of ``quire bench`` only.

It needs neither a server nor what a client of one imports: MLX, numpy, msgspec and rich do.
"""

import argparse
import sys

from quire.loadtest.kernels.command import add_commands, run

parser = argparse.ArgumentParser(prog="quire bench", allow_abbrev=False)
add_commands(parser.add_subparsers(required=True, metavar="COMMAND"))
sys.exit(run(parser.parse_args()))
