"""Records of kernels, as CUPTI writes them, become times of kernels."""

from __future__ import annotations

import ctypes
import struct

import pytest

from quire.loadtest import cuda_kernels
from quire.loadtest.cuda_kernels import KernelRecords, KernelTime, Ran, by_kernel, read_record


def test_a_record_is_read_where_its_fields_stand() -> None:
    name = ctypes.create_string_buffer(b"custom_kernel_swiglu")
    record = bytearray(200)
    struct.pack_into("QQ", record, 16, 5_000, 7_250)
    struct.pack_into("Q", record, 104, ctypes.addressof(name))
    memory = ctypes.create_string_buffer(bytes(record), len(record))
    assert read_record(ctypes.addressof(memory)) == Ran("custom_kernel_swiglu", 2_250)


def test_runs_are_added_up_by_kernel() -> None:
    runs = [Ran("short", 1_000), Ran("_ZN5quire4longEPKfi", 9_000), Ran("short", 3_000)]
    assert by_kernel(runs, steps=2) == [
        KernelTime("quire::long", 0.5, 4.5),
        KernelTime("short", 1.0, 2.0),
    ]


class FakeCupti:
    """Hands over one buffer of records when it is told to flush."""

    def __init__(self) -> None:
        self.enabled = False
        names = b"first", b"second", b"not ended"
        self.names = [ctypes.create_string_buffer(name) for name in names]

    def cuptiActivityRegisterCallbacks(self, requested, completed):
        self.requested, self.completed = requested, completed
        return 0

    def cuptiActivityEnable(self, kind):
        self.enabled = True
        return 0

    def cuptiActivityDisable(self, kind):
        self.enabled = False
        return 0

    def cuptiActivityFlushAll(self, forced):
        buffer, size, most = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t(9)
        self.requested(ctypes.byref(buffer), ctypes.byref(size), ctypes.byref(most))
        assert buffer.value % 64 == 0
        assert size.value >= 600
        assert most.value == 0
        self.left = []
        for index, name in enumerate(self.names if self.enabled else []):
            record = bytearray(200)
            end = 1_000 * (index + 2) if index < 2 else 0
            struct.pack_into("QQ", record, 16, 1_000, end)
            struct.pack_into("Q", record, 104, ctypes.addressof(name))
            ctypes.memmove(buffer.value + 200 * index, bytes(record), 200)
            self.left.append(buffer.value + 200 * index)
        self.completed(None, 0, buffer, size.value, 200 * len(self.left))
        return 0

    def cuptiActivityGetNextRecord(self, buffer, used, record):
        if not self.left:
            return 1
        record._obj.value = self.left.pop(0)
        return 0


def test_what_was_recorded_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cupti = FakeCupti()
    monkeypatch.setattr(cuda_kernels, "_load", lambda: cupti)
    records = KernelRecords()
    with records.recording() as take:
        assert take() == [Ran("first", 1_000), Ran("second", 2_000)]
        assert len(take()) == 2
    assert not cupti.enabled
    assert records._buffers == {}


def test_without_cupti_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "_FOLDERS", ("/nowhere/*",))
    with pytest.raises(RuntimeError, match="CUPTI"):
        KernelRecords()
