"""Which format a weight matrix is packed in, and the memory that takes; see matrix.h. Needs no torch."""

from __future__ import annotations

from baton.config import WeightChoice
from baton.engine.native.library import Format, Source

OWN_GRIDS = {
    "Q4_0": (Source.Q4_0, Format.INT4),
    "Q4_1": (Source.Q4_1, Format.INT4),
    "Q8_0": (Source.Q8_0, Format.INT8),
}
"""By GGUF's name of a tensor's type: those that a format holds exactly."""
_CHOSEN = {"bf16": Format.BF16, "int8": Format.INT8, "int4": Format.INT4}
_PANEL, _GROUP, _LINE = 16, 32, 64
_GROUP_BYTES = {Format.BF16: 1024, Format.INT8: 544, Format.INT4: 320}
"""Of a group of 32 inputs for a panel of 16 outputs."""


def format_of(choice: WeightChoice, own: tuple[Source, Format] | None, is_outside: bool) -> Format:
    """The format of a matrix whose own grid is `own`; `is_outside` for embedding and head."""
    if choice == "auto":
        return own[1] if own is not None else Format.BF16  # nobody asked for other weights than the file's
    if choice == "int4" and (is_outside or own is not None):
        return own[1] if own is not None else Format.INT8  # the head decides what is said: it keeps 8 bits
    return _CHOSEN[choice]


def packed_bytes(form: Format, outputs: int, inputs: int) -> int:
    """Memory of a packed matrix: whole panels of whole groups, each panel in whole cache lines."""
    panel = -(-inputs // _GROUP) * _GROUP_BYTES[form]
    return -(-outputs // _PANEL) * -(-panel // _LINE) * _LINE
