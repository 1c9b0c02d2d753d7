"""Keys and values of the texts that a model is writing: rows that join, leave and change places.

They stand in one table a layer, a row for each text or beam. Rows have different lengths and end at the same column, so
that a step writes one column for all of them: what stands before a row's own first column is masked.
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

FIRST_ROWS, FIRST_COLUMNS = 4, 64


class Table(CacheLayerMixin):
    """One layer's keys and values, [rows, heads, columns, channels] each, as transformers' attention asks for them."""

    is_sliding = False

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype
        self._stored: tuple[torch.Tensor, torch.Tensor] | None = None
        self.rows, self.begin, self.end = 0, 0, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """See transformers; space is made when rows join."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *arguments: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one column of all rows: both [rows, heads, 1, channels]; return what attention reads."""
        keys, values = self._reserve(self.rows, self.end + 1)
        keys[: self.rows, :, self.end] = key_states[:, :, 0]
        values[: self.rows, :, self.end] = value_states[:, :, 0]
        self.end += 1
        self._show()
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See transformers: the columns that attention reads, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns of the longest row."""
        return self.end - self.begin

    def get_max_length(self) -> int:
        """None."""
        return -1

    get_max_cache_shape = get_max_length  # its name in some versions of transformers 5

    def join(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put rows of one length below the others: both [rows, heads, columns, channels]."""
        rows, _, columns, _ = keys.shape
        if self._stored is None:
            shape = (FIRST_ROWS, keys.shape[1], 0)
            dtype = self._dtype or keys.dtype
            made = [one.new_zeros((*shape, one.shape[3]), dtype=dtype) for one in (keys, values)]
            self._stored = made[0], made[1]
        if not self.rows:
            self.begin = self.end = 0
        if columns > self.end:  # move what is there to the right
            by, begin, end = columns - self.end, self.begin, self.end
            stored = self._reserve(self.rows + rows, columns)
            for table in stored:
                table[: self.rows, :, begin + by : end + by] = table[: self.rows, :, begin:end].clone()
            self.begin, self.end = begin + by, columns
        stored = self._reserve(self.rows + rows, self.end)
        for table, new in zip(stored, (keys, values), strict=True):
            table[self.rows : self.rows + rows, :, self.end - columns : self.end] = new
        self.rows += rows
        self.begin = min(self.begin, self.end - columns) if self.rows > rows else self.end - columns
        self._show()

    def select(self, index: torch.Tensor) -> None:
        """Let the rows be those of this index, int64 [rows]; one may stand there several times, or not at all."""
        assert self._stored is not None
        kept = [table[index, :, self.begin : self.end] for table in self._stored]
        self.rows = len(index)
        for table, rows in zip(self._reserve(self.rows, self.end), kept, strict=True):
            table[: self.rows, :, self.begin : self.end] = rows
        self._show()

    def cut(self, begin: int) -> None:
        """Let the first column be this one; no row needs those before it."""
        self.begin = begin
        self._show()

    def _reserve(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The stored tensors, with space for so many rows and columns; what is there stays."""
        assert self._stored is not None
        now = self._stored[0].shape
        if rows > now[0] or columns > now[2]:
            size = max(rows, now[0] if rows <= now[0] else 2 * now[0]), max(columns, FIRST_COLUMNS, 2 * now[2])
            grown = []
            for table in self._stored:
                larger = table.new_zeros(
                    (size[0], table.shape[1], size[1] if columns > now[2] else now[2], table.shape[3])
                )
                larger[: now[0], :, : now[2]] = table
                grown.append(larger)
            self._stored = grown[0], grown[1]
        return self._stored

    def _show(self) -> None:
        assert self._stored is not None
        self.keys, self.values = (table[: self.rows, :, self.begin : self.end] for table in self._stored)
        self.is_initialized = True


class Tables(Cache):
    """All layers' tables, which change together, and where each row begins; `dtype` None is that of what joins."""

    def __init__(self, layers: int, dtype: torch.dtype | None = None) -> None:
        self.tables = [Table(dtype) for _ in range(layers)]
        super().__init__(layers=list(self.tables))
        self.lengths = torch.zeros(0, dtype=torch.int64)
        """Columns of each row, int64 [rows]."""

    @property
    def width(self) -> int:
        """Columns that attention reads."""
        return self.tables[0].get_seq_length()

    def join(self, cache: Iterable[Any], length: int, rows: int) -> None:
        """Take over what a forward pass has left in a cache of its own: rows of one length."""
        for table, layer in zip(self.tables, cache, strict=True):
            table.join(layer.keys, layer.values)
        self.lengths = torch.cat([self.lengths, torch.full((rows,), length)])

    def select(self, index: torch.Tensor) -> None:
        """See `Table`; columns that no row needs any more are left out."""
        self.lengths = self.lengths[index]
        longest = int(self.lengths.max()) if len(index) else 0
        for table in self.tables:
            table.select(index)
            table.cut(table.end - longest)

    def mask(self, more: int, device: torch.device) -> torch.Tensor:
        """1 where a row has a column of its own, `more` new ones included: int64 [rows, columns]."""
        columns = torch.arange(self.width + more)
        return (columns >= self.width - self.lengths[:, None]).long().to(device)


WIDE = "tuneserve-wide"
"""The name under which transformers' models find `attend`."""
WIDER = {torch.bfloat16: torch.float32}
"""Number formats of models on the CPU, and of the tables that they attend to faster: bf16's kernels there are made for
many queries at a time, and a step has one a row."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' sdpa, in the number format of the keys, which may be wider than that of the model."""
    wide = key.dtype
    if options.get("position_bias") is not None:
        options["position_bias"] = options["position_bias"].to(wide)
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.to(wide)
    found, none = sdpa_attention_forward(module, query.to(wide), key, value, attention_mask, **options)
    return found.to(query.dtype), none


def widen(model: PreTrainedModel) -> torch.dtype | None:
    """Let a model attend to tables of a wider number format, where that is faster.

    Returns:
        The tables' number format; None for the model's own.
    """
    wider = WIDER.get(model.dtype) if model.device.type == "cpu" else None
    if wider is None or model.config._attn_implementation != "sdpa":
        return None
    AttentionInterface.register(WIDE, attend)
    AttentionMaskInterface.register(WIDE, sdpa_mask)
    model.set_attn_implementation(WIDE)
    return wider if model.config._attn_implementation == WIDE else None
