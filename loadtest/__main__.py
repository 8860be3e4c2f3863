"""``python -m quire.loadtest`` is ``quire bench``."""

import argparse
import sys

from quire.loadtest.command import add_arguments, run

parser = argparse.ArgumentParser(prog="quire bench")
add_arguments(parser)
sys.exit(run(parser.parse_args()))
