"""Which layers of a model kernels serve, and the reasons for the others."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
from metal_sim import simulated_kernels
from model_zoo import build

from quire.engine.model.layer_report import LayerReport, report_layers
from quire.engine.model.paged_model import PagedModel
from quire.engine.model.paging import page_model
from quire.kernels.choice.selection import Selector, selecting


def on_a_mac(paged: PagedModel) -> list[LayerReport]:
    """Where nothing has been tuned."""
    on_gpu = mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True)
    with on_gpu, selecting(Selector("metal", None)):
        return report_layers(paged, 16)


def test_layers_alike_are_one_line() -> None:
    (report,) = on_a_mac(page_model(build("qwen3", 0), "qwen3"))
    assert report.decodes == "paged_kernel"
    assert report.prompts == "sdpa_per_chunk"
    assert not report.reason
    assert len(report.layers) > 1


def test_windows_are_told_apart() -> None:
    first, second = on_a_mac(page_model(build("gemma4_text", 0), "gemma4_text"))
    assert ("window" in first.work) != ("window" in second.work)
    assert not set(first.layers) & set(second.layers)
    assert not first.reason
    assert not second.reason


def test_chunks_are_told_apart_and_served_by_kernels() -> None:
    chunked, full = on_a_mac(page_model(build("llama4", 0), "llama4"))
    assert chunked.layers == [0, 1, 2]
    assert "chunks" in chunked.work
    assert full.layers == [3]
    assert "chunks" not in full.work
    assert {chunked.decodes, full.decodes} == {"paged_kernel"}


@pytest.mark.parametrize("family", ["glm4_moe_lite", "deepseek_v3"])
def test_decodes_of_latent_attention_are_by_a_kernel(family: str) -> None:
    for report in on_a_mac(page_model(build(family, 0), family)):
        assert report.decodes == "paged_kernel"
        assert report.prompts == "sdpa_pieces"
        assert not report.reason


def test_a_cpu_has_no_kernels() -> None:
    (report,) = report_layers(page_model(build("qwen3", 0), "qwen3"), 16)
    assert report.reason == "MLX computes on the CPU"


def test_heads_have_their_largest_size() -> None:
    """Those of Gemma 4's global layers still fit."""
    paged = page_model(build("qwen3", 0), "qwen3")
    for dim, reason in ((512, ""), (1024, "no kernel takes heads of these sizes and types")):
        for layer in paged.layers:
            assert layer.shape is not None
            layer.shape = replace(layer.shape, key_dim=dim, value_dim=dim)
        (report,) = on_a_mac(paged)
        assert report.reason == reason


def test_recurrent_layers_are_reported_too() -> None:
    with simulated_kernels(orders=1), selecting(Selector("metal", None)):
        reports = report_layers(page_model(build("qwen3_next", 0), "qwen3_next"), 16)
    found = {report.work.partition(":")[0]: report for report in reports}
    assert {"conv_window", "delta_rule"} < set(found)
    assert found["conv_window"].decodes == "in_place"
    assert found["conv_window"].layers == found["delta_rule"].layers
    # The zoo's heads are narrower than the kernel takes.
    assert found["delta_rule"].decodes == "steps"
    assert found["delta_rule"].reason
    places = [place for report in reports for place in report.layers]
    assert set(places) == set(range(len(set(places))))


def test_a_recurrence_without_a_kernel_says_so() -> None:
    reports = report_layers(page_model(build("rwkv7", 0), "rwkv7"), 16)
    assert any(report.reason == "no kernel knows this recurrence" for report in reports)


def test_a_cpu_is_the_reason_for_states_too() -> None:
    reports = report_layers(page_model(build("lfm2", 0), "lfm2"), 16)
    assert {report.reason for report in reports} == {"MLX computes on the CPU"}
