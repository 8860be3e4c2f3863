"""mlx-lm's models and loader without its tokenizers, which bring all of transformers.

A worker computes with token ids and never makes a tokenizer. Without them its imports take half the
time.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import NoReturn

_PACKAGE = "mlx_lm"
_TOKENIZERS = "mlx_lm.tokenizer_utils"


def import_mlx_lm() -> bool:
    """Import ``mlx_lm.utils`` without tokenizers, in a process that has nothing of mlx-lm yet.

    The package's own ``__init__`` is left out: it imports all of mlx-lm. A version that needs more
    of the tokenizers than this one is imported whole.

    Returns:
        Whether the tokenizers were left out.
    """
    if _PACKAGE in sys.modules:
        return False
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None:
        raise ModuleNotFoundError("mlx-lm is not installed", name=_PACKAGE)
    package = importlib.util.module_from_spec(spec)
    package.tokenizer_utils = _no_tokenizers()  # type: ignore[attr-defined]
    sys.modules.update({_PACKAGE: package, _TOKENIZERS: package.tokenizer_utils})
    try:
        importlib.import_module("mlx_lm.utils")
    except (ImportError, AttributeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
            del sys.modules[name]
        importlib.import_module("mlx_lm.utils")
        return False
    return True


def _no_tokenizers() -> ModuleType:
    module = ModuleType(_TOKENIZERS)
    module.TokenizerWrapper = type("TokenizerWrapper", (), {})  # type: ignore[attr-defined]
    module.load = _refuse  # type: ignore[attr-defined]
    return module


def _refuse(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("this process was started without mlx-lm's tokenizers")
