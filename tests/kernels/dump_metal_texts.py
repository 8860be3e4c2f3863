"""Writes every Metal text of the specifications into a folder, for Apple's compiler.

python tests/kernels/dump_metal_texts.py FOLDER [--thorough]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# MLX puts the same in front of a kernel, with more of its own that these need not.
PRELUDE = """#include <metal_stdlib>
using namespace metal;
typedef half float16_t;
typedef bfloat bfloat16_t;
"""


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--thorough", action="store_true", help="all combinations of settings")
    args = parser.parse_args()
    import mlx.core as mx
    from metal_sim.every_text import every_text

    mx.set_default_device(mx.cpu)
    args.folder.mkdir(parents=True, exist_ok=True)
    texts = {text.text.text: text.kernel for text in every_text(thorough=args.thorough)}
    for index, (text, kernel) in enumerate(texts.items()):
        (args.folder / f"{kernel}-{index}.metal").write_text(PRELUDE + text)
    print(f"{len(texts)} texts in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
