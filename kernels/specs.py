"""Every operation that has a choice, in the order in which a step meets them."""

from __future__ import annotations

from quire.kernels.choice.spec import AnySpec
from quire.kernels.conv_window_spec import CONV_WINDOW
from quire.kernels.delta_rule_spec import DELTA_RULE
from quire.kernels.experts_spec import EXPERT_MATMUL, QUANTIZED_EXPERT_MATMUL
from quire.kernels.fused_ops_spec import ADD_RMS_NORM, SWIGLU
from quire.kernels.kv_write_spec import GATHER_PAGES, KV_WRITE
from quire.kernels.matmul_spec import MATMUL
from quire.kernels.mixed_attention_spec import MIXED_ATTENTION
from quire.kernels.paged_decode_spec import PAGED_DECODE
from quire.kernels.prompt_attention_spec import PROMPT_ATTENTION
from quire.kernels.quantized_matmul_spec import QUANTIZED_MATMUL
from quire.kernels.rotate_and_decode_spec import ROTATE_AND_DECODE
from quire.kernels.rotate_spec import ROTATE_AND_WRITE
from quire.kernels.routing_spec import TOP_EXPERTS, WEIGH_EXPERTS
from quire.kernels.sampling_spec import SAMPLE
from quire.kernels.shared_context_spec import SHARED_CONTEXT
from quire.kernels.ssm_scan_spec import SSM_SCAN
from quire.kernels.take_rows_spec import TAKE_ROWS

SPECS: tuple[AnySpec, ...] = (
    PAGED_DECODE,
    SHARED_CONTEXT,
    PROMPT_ATTENTION,
    MIXED_ATTENTION,
    KV_WRITE,
    GATHER_PAGES,
    TAKE_ROWS,
    ROTATE_AND_WRITE,
    ROTATE_AND_DECODE,
    ADD_RMS_NORM,
    SWIGLU,
    MATMUL,
    QUANTIZED_MATMUL,
    TOP_EXPERTS,
    EXPERT_MATMUL,
    QUANTIZED_EXPERT_MATMUL,
    WEIGH_EXPERTS,
    CONV_WINDOW,
    DELTA_RULE,
    SSM_SCAN,
    SAMPLE,
)


def find_spec(name: str) -> AnySpec:
    """The specification of that name.

    Raises:
        ValueError: there is none.
    """
    for spec in SPECS:
        if spec.name == name:
            return spec
    raise ValueError(f"there is no operation {name}")
