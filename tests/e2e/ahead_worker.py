"""The worker as it runs on a GPU: a step is encoded on one thread while another schedules."""

import sys
from functools import partial

from quire.engine import worker


class AheadWorker(worker.Worker):
    def run(self, notes: list[str]) -> int:
        from quire.engine import startup  # imports mlx, which BLAS must be in place for

        startup.EngineConfig = partial(startup.EngineConfig, encode_ahead=True)
        return super().run(notes)


if __name__ == "__main__":
    worker.Worker = AheadWorker
    sys.exit(worker.main())
