"""A worker's imports leave out what only tokenizers need."""

from __future__ import annotations

import subprocess
import sys

LEAN = """
import sys
from quire.engine.startup.lean_import import import_mlx_lm
assert import_mlx_lm()
import quire.engine.startup.start, mlx_lm.models.llama, mlx_lm.utils
assert "transformers" not in sys.modules
try:
    mlx_lm.tokenizer_utils.load("nowhere")
except RuntimeError as error:
    print(error)
"""

# A later mlx-lm that asks the tokenizers for more.
GROWN = """
import sys
from quire.engine.startup import lean_import
lean_import._no_tokenizers = lambda: type(sys)("mlx_lm.tokenizer_utils")
assert not lean_import.import_mlx_lm()
import mlx_lm
assert mlx_lm.load and "transformers" in sys.modules
print("whole")
"""


def run(script: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_tokenizers_are_left_out() -> None:
    assert run(LEAN) == "this process was started without mlx-lm's tokenizers"


def test_a_version_that_needs_them_is_imported_whole() -> None:
    assert run(GROWN) == "whole"


def test_a_process_that_has_imported_mlx_lm_keeps_it() -> None:
    script = "import mlx_lm.models; from quire.engine.startup.lean_import import import_mlx_lm"
    assert run(f"{script}; print(import_mlx_lm(), callable(mlx_lm.load))") == "False True"
