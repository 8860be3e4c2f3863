"""The folder of one model, and what the front end reads from it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

from quire.engine.messages import WorkerConfig
from quire.serve.daemon_thread import in_daemon_thread
from quire.serve.model_files import (
    Fingerprint,
    check_folder,
    download_state,
    fingerprint,
    local_folder,
    resolve_model,
)
from quire.serve.model_metrics import ModelMetrics
from quire.serve.model_options import ModelOptions
from quire.serve.preflight import check_settings
from quire.serve.registry import Served
from quire.serve.served_model import ModelFilesError, ServedModel, load_served_model
from quire.serve.settings import ServeSettings
from quire.serve.supervisor import MAX_BACKOFF
from quire.serve.worker_client import WorkerClient

logger = logging.getLogger("quire.serve")


class ModelSource:
    """``path`` is None until the model has been found, which may take a download."""

    def __init__(self, options: ModelOptions, metrics: ModelMetrics) -> None:
        self.path: Path | None = None
        self._options = options
        self._metrics = metrics
        self._fingerprint: Fingerprint = {}

    async def find(self) -> None:
        """Raises :class:`ModelFilesError` and :class:`SettingsError`."""
        settings = self._options.settings
        # The Hub's client cannot be stopped: its thread must not keep the server from ending.
        files = await in_daemon_thread(lambda: resolve_model(settings.model))
        self.path = files.path
        check_settings(settings, files.path)

    @property
    def folder(self) -> Path:
        assert self.path is not None, "the model has not been found"
        return self.path

    async def read(self) -> Served:
        """What requests need. Raises :class:`ModelFilesError`."""
        return await asyncio.to_thread(self._read)

    async def read_when_sound(self) -> Served:
        """The same as soon as the files are whole, however long that takes."""
        pause = 0.5
        while True:
            try:
                await asyncio.to_thread(check_folder, self.folder)
                return await self.read()
            except ModelFilesError as error:
                logger.error("%s Trying again in %g s.", error, pause)
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_BACKOFF)

    @property
    def is_changed(self) -> bool:
        """Whether the files are others than those that were read."""
        return fingerprint(self.folder) != self._fingerprint

    @property
    def weight_bytes(self) -> int:
        """As the files tell; 0 where there are none yet."""
        model = self._options.settings.model
        if model is None:
            return 0
        folder = self.path or local_folder(model)
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    def what_it_waits_for(self) -> str:
        if self.path is None and (state := download_state(self._options.settings.model)):
            return f"The model {self._options.name} is being downloaded: {state}."
        return "The model is still loading. Try again in a moment."

    def _read(self) -> Served:
        # Before the files themselves: a change in between is found at the next restart.
        self._fingerprint = fingerprint(self.folder)
        settings = self._options.settings
        model = load_served_model(
            self.folder,
            self._options.name,
            tool_parser=settings.tool_parser,
            reasoning_parser=settings.reasoning_parser,
            default_switches=dict(settings.chat_template_kwargs),
            pooling=settings.pooling,
        )
        sampling = self._options.sampling.over(model.default_sampling)
        client = WorkerClient(self._metrics, settings.max_num_seqs + settings.max_queue)
        return Served(replace(model, default_sampling=sampling), client)


def worker_config(settings: ServeSettings, path: Path, model: ServedModel) -> WorkerConfig:
    """The addresses are filled in for each worker by the supervisor."""
    return WorkerConfig(
        model_path=str(path),
        request_address="",
        output_address="",
        device=settings.device,
        block_size=settings.block_size,
        kv_cache_memory=settings.kv_cache_memory,
        memory_fraction=settings.memory_fraction,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        eviction_policy=settings.eviction_policy,
        log_level=settings.log_level,
        eos_token_ids=list(model.eos_token_ids),
    )
