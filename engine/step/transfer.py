"""A step's numbers on their way to the device, and its tokens on their way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quire.kernels.download import Download
from quire.kernels.tree import HostArray, Span, join, spans, split, unpack
from quire.kernels.upload import Staging

Tree = TypeVar("Tree")

Uploaded = mx.array | list[mx.array]  # all arrays in a row, (n,) int32, or one by one


class Form(NamedTuple, Generic[Tree]):
    """All about a tree but the numbers in its arrays: steps of one form are one graph."""

    static: Any
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class HostTree(Generic[Tree]):
    """A tree taken apart."""

    form: Form[Tree]
    arrays: list[HostArray]

    @classmethod
    def of(cls, tree: Tree) -> HostTree[Tree]:
        arrays, static = split(tree)
        return cls(Form(static, spans(arrays)), arrays)


class Transfer:
    """Moves the arrays of steps. At most one step runs while another is built."""

    def __init__(self) -> None:
        self._staging = Staging()

    def begin_step(self) -> None:
        """A step is about to be built, and all but the one before it have ended."""
        self._staging.begin_step()

    def upload(self, arrays: Sequence[HostArray]) -> Uploaded:
        """The arrays on the device. One upload is one launch on CUDA; on the CPU it is a copy of
        each array, and slices would cost more."""
        if mx.default_device() == mx.cpu:
            return [mx.array(array) for array in arrays]
        return self._staging.upload([array.reshape(-1).view(np.int32) for array in arrays])

    def upload_one(self, array: npt.NDArray[np.int32]) -> mx.array:
        """The array on the device."""
        uploaded = self.upload([array])
        return uploaded.reshape(array.shape) if isinstance(uploaded, mx.array) else uploaded[0]

    def download(self, tokens: mx.array) -> Download:
        return Download(tokens, self._staging)


def received(form: Form[Tree], uploaded: Uploaded) -> Tree:
    """The tree whose arrays were uploaded."""
    arrays = unpack(uploaded, form.spans) if isinstance(uploaded, mx.array) else uploaded
    tree: Tree = join(arrays, form.static)
    return tree
