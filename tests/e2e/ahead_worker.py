"""The worker as it runs on a GPU: a step is encoded on one thread while another schedules."""

import sys
from functools import partial

from quire.engine import worker


class AheadWorker(worker.Worker):
    def run(self, notes: list[str]) -> int:
        from quire.engine.startup import start  # imports mlx, which BLAS must be in place for

        start.EngineConfig = partial(start.EngineConfig, encode_ahead=True)
        return super().run(notes)


if __name__ == "__main__":
    worker.Worker = AheadWorker
    sys.exit(worker.main())
