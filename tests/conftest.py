"""What holds for every test."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import hypothesis
import pytest

# Machines that run the tests are slow at times, and no test is about that.
hypothesis.settings.register_profile("quire", deadline=None)
hypothesis.settings.load_profile("quire")

# What a virtual machine shows: without simdgroup matrices, and custom kernels give zeros there.
_WITHOUT_FAMILY = "Apple Paravirtual device"


def has_real_gpu() -> bool:
    """Whether there is a GPU whose results mean anything."""
    import mlx.core as mx

    if sys.platform != "darwin":
        return bool(mx.cuda.is_available())
    try:
        return str(mx.device_info()["device_name"]) != _WITHOUT_FAMILY
    except RuntimeError:
        return False


def pytest_configure() -> None:
    if sys.platform == "darwin" and not has_real_gpu():
        import mlx.core as mx

        mx.set_default_device(mx.cpu)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` say by that what they need."""
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if wanting and not has_real_gpu():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and not a virtual one"))


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What this machine's user has tuned must not choose what the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
