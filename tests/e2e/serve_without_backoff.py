"""``quire serve`` whose workers count as healthy at once, so that each restart has the first pause.

Kills that come faster than workers get healthy are a crash loop, which is tested apart.
"""

import sys

from quire.serve import cli, supervisor

if __name__ == "__main__":
    supervisor.HEALTHY_AFTER = 0.0
    sys.exit(cli.main(sys.argv[1:]))
