"""Which of the GPU's operations have block sizes that a table may hold."""

from collections.abc import Mapping
from typing import Any

from jchameleon.lora.layout import CHUNK_RANK, GroupLayout
from jchameleon.pallas.gpu_attention import DecodeConfig
from jchameleon.pallas.gpu_kv import KvConfig
from jchameleon.pallas.gpu_lora_config import (
    ExpandConfig,
    ShrinkConfig,
    check_expand,
    check_shrink,
)
from jchameleon.pallas.gpu_prefill_attention import PrefillConfig, check_prefill
from jchameleon.pallas.tuned import (
    UNTUNED,
    TunableOp,
    TunedTable,
    read_table,
    table_path,
)


def load_tuned(device: str) -> TunedTable:
    """Return what was measured on this kind of device; nothing is no error.

    Raises:
      ConfigError: there is a table, and it is wrong.
    """
    path = table_path(device)
    return read_table(path, device, TUNABLES) if path.is_file() else UNTUNED


def _check_shrink(config: ShrinkConfig, shape: Mapping[str, Any]) -> None:
    d_in, projections = shape["d_in"], shape["projections"]
    names = tuple(f"p{i}" for i in range(projections))
    group = _group(
        names,
        d_in=d_in,
        a_offset=shape["a_offset"],
        a_shape=(projections, CHUNK_RANK, d_in),
    )
    check_shrink(config, group, shape["page_elems"])


def _check_expand(config: ExpandConfig, shape: Mapping[str, Any]) -> None:
    sizes, starts = shape["columns"], shape["y_columns"]
    if len(sizes) != len(starts) or not sizes:
        raise ValueError(f"columns={sizes} and y_columns={starts} must be as many")
    names = tuple(f"p{i}" for i in range(len(sizes)))
    before = [sum(sizes[:i]) for i in range(len(sizes))]
    group = _group(
        names,
        columns=dict(zip(names, zip(before, sizes, strict=True), strict=True)),
        out_columns=dict(zip(names, zip(starts, sizes, strict=True), strict=True)),
        b_offset=shape["b_offset"],
        b_shape=(CHUNK_RANK, sum(sizes)),
    )
    check_expand(config, group, shape["page_elems"])


def _group(names: tuple[str, ...], **fields: Any) -> GroupLayout:
    """Return a group of which only what a check reads is told."""
    nothing: dict[str, Any] = {
        "d_in": 0,
        "columns": {},
        "out_columns": {},
        "a_offset": 0,
        "a_shape": (0, 0, 0),
        "b_offset": 0,
        "b_shape": (0, 0),
    }
    return GroupLayout(name="table", projections=names, **nothing | fields)


HEADS = ("heads", "kv_heads", "head_dim", "block_tokens")

TUNABLES: dict[str, TunableOp] = {
    "lora_shrink": TunableOp(
        config=ShrinkConfig,
        phases=("decode", "prefill"),
        shape=("tokens", "items", "page_elems", "d_in", "projections", "a_offset"),
        check=_check_shrink,
    ),
    "lora_expand": TunableOp(
        config=ExpandConfig,
        phases=("decode", "prefill"),
        shape=("tokens", "blocks", "page_elems", "b_offset", "columns", "y_columns"),
        lists=("columns", "y_columns"),
        check=_check_expand,
    ),
    "attention_decode": TunableOp(
        config=DecodeConfig,
        phases=("decode",),
        shape=("rows", *HEADS, "max_context_tokens"),
    ),
    "attention_prefill": TunableOp(
        config=PrefillConfig,
        phases=("prefill",),
        shape=("tokens", "query_tokens", *HEADS),
        check=lambda config, shape: check_prefill(config, shape["query_tokens"]),
    ),
    "rope_write": TunableOp(
        config=KvConfig, phases=("any",), shape=("tokens", *HEADS, "norms")
    ),
}
"""By name of the operation; the functions `*_key` beside each kernel make the keys."""
