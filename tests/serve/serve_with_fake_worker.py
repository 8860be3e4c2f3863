"""``quire serve`` over the scripted worker: ``python serve_with_fake_worker.py MODE [FLAG...]``."""

import sys
from pathlib import Path

from quire.serve import cli, serve_command

if __name__ == "__main__":
    fake_worker = Path(__file__).with_name("fake_worker.py")
    serve_command.WORKER_COMMAND = (sys.executable, str(fake_worker), sys.argv[1])
    sys.exit(cli.main(["serve", *sys.argv[2:]]))
