"""``quire`` with the worker of ``ahead_worker.py``."""

import sys
from pathlib import Path

from quire.serve import cli, serve_command

if __name__ == "__main__":
    script = Path(__file__).with_name("ahead_worker.py")
    serve_command.WORKER_COMMAND = (sys.executable, str(script))
    sys.exit(cli.main(sys.argv[1:]))
