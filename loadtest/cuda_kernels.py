"""How long each kernel of an NVIDIA GPU ran, by the activity records of CUPTI, its profiling
interface: part of the CUDA toolkit, and used only where it is asked for.

While records are kept, kernels run one after another and each takes a microsecond more.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

_FOLDERS = ("/usr/local/cuda*/targets/*/lib", "/usr/local/cuda*/extras/CUPTI/lib64")
_BUFFER_BYTES = 8 << 20
_ALIGNMENT = 64
_CONCURRENT_KERNEL = 10  # CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL
_FORCED = 1  # CUPTI_ACTIVITY_FLAG_FLUSH_FORCED
# Where the fields of CUpti_ActivityKernel stand, the same in all of its versions since CUDA 10.
_START, _NAME = 16, 104

_Requested = ctypes.CFUNCTYPE(
    None,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.POINTER(ctypes.c_size_t),
)
_Completed = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
)


class Ran(msgspec.Struct, frozen=True):
    """One run of a kernel."""

    name: str  # as compiled
    ns: int


class KernelTime(msgspec.Struct, frozen=True):
    """All runs of a kernel in one step."""

    name: str
    calls: float
    us: float  # of all of them


def by_kernel(runs: Iterable[Ran], steps: int) -> list[KernelTime]:
    """What takes longest comes first."""
    calls: dict[str, int] = {}
    ns: dict[str, int] = {}
    for run in runs:
        calls[run.name] = calls.get(run.name, 0) + 1
        ns[run.name] = ns.get(run.name, 0) + run.ns
    longest = sorted(ns, key=lambda name: -ns[name])
    return [
        KernelTime(_demangled(name), calls[name] / steps, round(ns[name] / steps / 1e3, 2))
        for name in longest
    ]


class KernelRecords:
    """Records kernels of this process. One of them exists at a time."""

    def __init__(self) -> None:
        """Raises RuntimeError where CUPTI is not installed."""
        self._cupti = _load()
        self._runs: list[Ran] = []
        self._buffers: dict[int, ctypes.Array[ctypes.c_char]] = {}
        # CUPTI keeps pointers to them.
        self._callbacks = _Requested(self._requested), _Completed(self._completed)
        self._call("cuptiActivityRegisterCallbacks", *self._callbacks)

    @contextmanager
    def recording(self) -> Iterator[Callable[[], list[Ran]]]:
        """Yields what takes those recorded so far; the device has to be done with them."""
        self._call("cuptiActivityEnable", _CONCURRENT_KERNEL)
        try:
            yield self._take
        finally:
            self._call("cuptiActivityDisable", _CONCURRENT_KERNEL)
            self._take()

    def _take(self) -> list[Ran]:
        self._call("cuptiActivityFlushAll", _FORCED)
        runs = list(self._runs)
        self._runs.clear()
        return runs

    def _call(self, function: str, *args: object) -> None:
        if status := getattr(self._cupti, function)(*args):
            raise RuntimeError(f"{function} of CUPTI reports error {status}")

    def _requested(self, buffer: object, size: object, most: object) -> None:
        memory = ctypes.create_string_buffer(_BUFFER_BYTES + _ALIGNMENT)
        address = -(-ctypes.addressof(memory) // _ALIGNMENT) * _ALIGNMENT
        self._buffers[address] = memory
        for pointer, value in ((buffer, address), (size, _BUFFER_BYTES), (most, 0)):
            pointer[0] = value  # type: ignore[index]

    def _completed(self, context: int, stream: int, buffer: int, size: int, used: int) -> None:
        record = ctypes.c_void_p()
        arguments = ctypes.c_void_p(buffer), ctypes.c_size_t(used), ctypes.byref(record)
        while used and self._cupti.cuptiActivityGetNextRecord(*arguments) == 0:
            assert record.value is not None
            run = read_record(record.value)
            self._runs += [run] if run.ns > 0 else []  # else it has not ended yet
        self._buffers.pop(buffer)


def read_record(address: int) -> Ran:
    """The CUpti_ActivityKernel that stands there."""
    fields = ctypes.string_at(address, _NAME + 8)
    start, end = struct.unpack_from("QQ", fields, _START)
    (name,) = struct.unpack_from("Q", fields, _NAME)
    return Ran(ctypes.string_at(name).decode(errors="replace") if name else "?", end - start)


def _demangled(name: str) -> str:
    """As C++ writes it, without its arguments."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    found = library.__cxa_demangle(name.encode(), None, None, None)
    if not found:
        return name
    whole = ctypes.string_at(found).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(found))
    return whole.removeprefix("void ").partition("(")[0]


def _load() -> ctypes.CDLL:
    found = [path for each in _FOLDERS for path in Path("/").glob(f"{each[1:]}/libcupti.so*")]
    if not found:
        raise RuntimeError("CUPTI, a part of the CUDA toolkit, is not installed")
    library = ctypes.CDLL(str(max(found, key=lambda path: path.name)))
    library.cuptiActivityGetNextRecord.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.POINTER(ctypes.c_void_p),
    ]
    return library
