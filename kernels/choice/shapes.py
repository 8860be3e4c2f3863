"""What selection knows of a call: one small tuple per operation.

``bucket`` rounds sizes up to powers of two, and leaves out what neither support nor speed depends
on, so that a process meets few different ones.
"""

from __future__ import annotations

from typing import NamedTuple


class DecodeShape(NamedTuple):
    """One query row per sequence over its pages."""

    rows: int
    context: int  # tokens that a row sees, on average
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    window: bool = False
    sinks: bool = False
    softcap: bool = False

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    def bucket(self) -> DecodeShape:
        """Key heads count as rows: to a device, rows x key heads is what there is to share out."""
        return DecodeShape(
            _round_up(self.rows * self.kv_heads),
            _round_up(self.context),
            self.heads // self.kv_heads,
            1,
            *self[4:],
        )


class SharedShape(NamedTuple):
    """Rows that begin with the same tokens, one query each."""

    rows: int
    context: int  # tokens that all rows share
    own: int  # tokens of a row behind them, on average
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    sinks: bool = False

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    def bucket(self) -> SharedShape:
        """Key heads count as rows, as in :meth:`DecodeShape.bucket`."""
        return SharedShape(
            _round_up(self.rows * self.kv_heads),
            _round_up(self.context),
            _round_up(self.own),
            self.heads // self.kv_heads,
            1,
            *self[5:],
        )


class PromptShape(NamedTuple):
    """Consecutive rows of one sequence over its pages."""

    rows: int
    context: int  # tokens, the rows included
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    from_start: bool = True  # nothing of the context precedes the rows
    window: bool = False
    sinks: bool = False
    softcap: bool = False

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    def bucket(self) -> PromptShape:
        """Heads count by their groups: every key head does the same work."""
        return PromptShape(
            _round_up(self.rows),
            _round_up(self.context),
            self.heads // self.kv_heads,
            1,
            *self[4:],
        )


class MixedShape(NamedTuple):
    """One query row per sequence, and prompt chunks beside them."""

    rows: int  # of decodes
    context: int  # tokens that the longest of them sees
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    window: bool = False
    sinks: bool = False
    softcap: bool = False

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    def bucket(self) -> MixedShape:
        return MixedShape(_round_up(self.rows), _round_up(self.context), *self[2:])


class WriteShape(NamedTuple):
    """New keys and values of all rows into their slots."""

    rows: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    keep_rows: bool = False  # the rows are returned too

    def bucket(self) -> WriteShape:
        return WriteShape(_round_up(self.rows), *self[1:])


class GatherShape(NamedTuple):
    """Whole blocks of several sequences into contiguous keys and values."""

    sequences: int
    blocks: int  # of each
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int

    def bucket(self) -> GatherShape:
        return GatherShape(_round_up(self.sequences), _round_up(self.blocks), *self[2:])


class RowsShape(NamedTuple):
    """Rows of several arrays by a list of indices; rows of two arrays by one."""

    rows: int
    dim: int

    def bucket(self) -> RowsShape:
        return RowsShape(_round_up(self.rows), self.dim)


class RotateShape(NamedTuple):
    """Head norms, rotary embeddings and KV writes of a step's projected rows."""

    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    block_size: int
    norms: bool = False  # of each head of queries and keys
    traditional: bool = False  # pairs are neighbours
    keep_rows: bool = False  # new keys and values are returned too

    def bucket(self) -> RotateShape:
        return RotateShape(_round_up(self.rows), *self[1:])


class RotatingDecodeShape(NamedTuple):
    """What a decode step does between a block's projections: rotation, KV write and attention."""

    rows: int
    context: int  # tokens that a row sees, its own included, on average
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    block_size: int
    norms: bool = False  # of each head of queries and keys
    traditional: bool = False  # pairs are neighbours
    window: bool = False

    def bucket(self) -> RotatingDecodeShape:
        return RotatingDecodeShape(_round_up(self.rows), _round_up(self.context), *self[2:])


class NormShape(NamedTuple):
    """The sum of (rows, dim) arrays, and its RMS norm."""

    rows: int
    dim: int

    def bucket(self) -> NormShape:
        return NormShape(_round_up(self.rows), self.dim)


class GateShape(NamedTuple):
    """silu(gate) * up of (rows, dim) gates and as many others."""

    rows: int
    dim: int

    def bucket(self) -> GateShape:
        return GateShape(_round_up(self.rows), self.dim)


class DenseShape(NamedTuple):
    """(rows, dim) times a dense (outputs, dim) matrix, transposed."""

    rows: int
    outputs: int
    dim: int

    def bucket(self) -> DenseShape:
        return DenseShape(_round_up(self.rows), _round_up(self.outputs), self.dim)


class MatmulShape(NamedTuple):
    """(rows, inputs) times a quantised (outputs, inputs) matrix, transposed."""

    rows: int
    outputs: int
    inputs: int
    bits: int
    group_size: int

    def bucket(self) -> MatmulShape:
        return MatmulShape(
            _round_up(self.rows), _round_up(self.outputs), _round_up(self.inputs), *self[3:]
        )


class SampleShape(NamedTuple):
    """One token per row of (rows, vocab) logits."""

    rows: int
    vocab: int
    filtered: bool = True  # some row has a top-k, top-p or min-p
    greedy: bool = False  # every row takes its likeliest token

    def bucket(self) -> SampleShape:
        return SampleShape(_round_up(self.rows), _round_up(self.vocab), *self[2:])


AnyShape = (
    DecodeShape
    | SharedShape
    | PromptShape
    | MixedShape
    | WriteShape
    | GatherShape
    | RowsShape
    | RotateShape
    | RotatingDecodeShape
    | NormShape
    | GateShape
    | DenseShape
    | MatmulShape
    | SampleShape
)

SHAPES: dict[str, type[AnyShape]] = {
    "paged_decode": DecodeShape,
    "shared_context": SharedShape,
    "prompt_attention": PromptShape,
    "mixed_attention": MixedShape,
    "kv_write": WriteShape,
    "gather_pages": GatherShape,
    "take_rows": RowsShape,
    "rotate_and_write": RotateShape,
    "rotate_and_decode": RotatingDecodeShape,
    "add_rms_norm": NormShape,
    "swiglu": GateShape,
    "matmul": DenseShape,
    "quantized_matmul": MatmulShape,
    "sample": SampleShape,
}

# Rounded up in a bucket, so that a limit on them is known only up to a power of two.
ROUNDED = {"rows", "context", "own", "sequences", "blocks", "outputs", "inputs", "vocab"}
# Rows of a bucket of these do not count rows alone.
HEADS_IN_ROWS = {"paged_decode", "shared_context"}
# Hardly change how long a call takes: timed without them.
UNTIMED = ("sinks", "softcap")


def timing_bucket(shape: AnyShape) -> AnyShape:
    """The bucket under which ``shape`` is timed."""
    fields = shape.bucket()._asdict()
    return type(shape)(**fields | {name: False for name in UNTIMED if name in fields})


def describe(shape: AnyShape) -> str:
    """One line for people: sizes first, then the flags that are set."""
    parts = []
    for name, value in shape._asdict().items():
        if isinstance(value, bool):
            parts += [name] if value else []
        else:
            parts.append(f"{name} {value}")
    return ", ".join(parts)


def _round_up(size: int) -> int:
    """The smallest power of two of at least ``size``."""
    return 1 << (size - 1).bit_length() if size > 1 else 1
