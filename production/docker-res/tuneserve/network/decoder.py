"""A model that writes, one token of every text at a time: texts may join and leave between any two tokens.

The keys and values of all texts stand in one table a layer, a row for each text or beam. Rows have different lengths
and end at the same column, so that a step writes one column for all of them: what stands before a row's own first
column is masked. Of an encoder-decoder the encoder's keys and values stand in a second table, which does not grow.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

FIRST_ROWS, FIRST_COLUMNS = 4, 64


class Table(CacheLayerMixin):
    """One layer's keys and values, [rows, heads, columns, channels] each, as transformers' attention asks for them."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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

    def join(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put rows of one length below the others: both [rows, heads, columns, channels]."""
        rows, _, columns, _ = keys.shape
        if self._stored is None:
            shape = (FIRST_ROWS, keys.shape[1], 0, keys.shape[3])
            self._stored = keys.new_zeros(shape), values.new_zeros((*shape[:3], values.shape[3]))
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
    """All layers' tables, which change together, and where each row begins."""

    def __init__(self, layers: int) -> None:
        self.tables = [Table() for _ in range(layers)]
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


@dataclass(frozen=True)
class Read:
    """A text that was read and has no row yet.

    Args:
        logits: float32 [1, words] of the token after it.
        written: layers with the keys and values of what the decoder has read.
        length: columns of these.
        read: of an encoder-decoder, layers with the keys and values of what the encoder has read.
        read_length: columns of those.
    """

    logits: torch.Tensor
    written: Sequence[Any]
    length: int
    read: Sequence[Any] = ()
    read_length: int = 0


class _Part(NamedTuple):
    """One layer's keys and values of one row, as a layer of a cache has them."""

    keys: torch.Tensor
    values: torch.Tensor


class Decoder:
    """A loaded model, and the texts that it is writing.

    Args:
        model: a causal language model, or an encoder-decoder, of transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.pairs = bool(model.config.is_encoder_decoder)
        self._layers = len(DynamicCache(config=model.config).layers)
        self._positions: torch.Tensor | None = None
        self.clear()
        if self.pairs:
            self._place_rows()

    def clear(self) -> None:
        """Have no rows."""
        self._written, self._read = Tables(self._layers), Tables(self._layers)
        self._texts: list[int] = []
        """Of each row, which text the encoder has read for it."""
        self._names = count()

    @property
    def rows(self) -> int:
        """Texts and beams that are being written."""
        return len(self._written.lengths)

    @torch.inference_mode()
    def read(self, texts: Sequence[Sequence[int]], begin: Sequence[int] = ()) -> list[Read]:
        """Read texts: prompts, in one pass, or what the encoder reads, one after another.

        Args:
            texts: token ids of each.
            begin: with which the decoder of an encoder-decoder begins.
        """
        return [self._read_pair(ids, begin) for ids in texts] if self.pairs else self._read_prompts(texts)

    def _read_prompts(self, texts: Sequence[Sequence[int]]) -> list[Read]:
        """Shorter prompts are padded behind, where nothing of them looks: a token attends to those before it alone."""
        device, lengths = self.model.device, [len(ids) for ids in texts]
        rows = torch.zeros((len(texts), max(lengths)), dtype=torch.int64, device=device)
        for row, ids in zip(rows, texts, strict=True):
            row[: len(ids)] = torch.tensor(list(ids))
        lasts = sorted({length - 1 for length in lengths})
        cache = self._new_cache()
        kept = torch.tensor(lasts, device=device)
        logits = self.model(input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=kept).logits
        found = []
        for row, length in enumerate(lengths):
            parts = [_Part(*(one[row : row + 1, :, :length] for one in (it.keys, it.values))) for it in cache.layers]
            found.append(Read(logits[row : row + 1, lasts.index(length - 1)].float(), parts, length))
        return found

    def _read_pair(self, ids: Sequence[int], begin: Sequence[int]) -> Read:
        row = torch.tensor([list(ids)], device=self.model.device)
        states = self.model.get_encoder()(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state
        pair = EncoderDecoderCache(self._new_cache(), self._new_cache())
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=torch.ones_like(row),
            decoder_input_ids=torch.tensor([list(begin)], device=row.device),
            past_key_values=pair,
            use_cache=True,
        )
        written, read = pair.self_attention_cache.layers, pair.cross_attention_cache.layers
        return Read(_last(output), written, len(begin), read, len(ids))

    @torch.inference_mode()
    def join(self, text: Read) -> None:
        """Give it a row, the last one."""
        self._written.join(text.written, text.length, 1)
        if self.pairs:
            self._read.join(text.read, text.read_length, 1)
            self._texts.append(next(self._names))

    @torch.inference_mode()
    def select(self, index: Sequence[int]) -> None:
        """Let the rows be those of this index, in its order; a row may stand in it several times or not at all."""
        if list(index) == list(range(self.rows)):
            return
        rows = torch.tensor(list(index), dtype=torch.int64)
        self._written.select(rows)
        if self.pairs:
            texts = [self._texts[one] for one in index]
            if texts != self._texts:  # beams of one text may change places: they share what was read
                self._read.select(rows)
                self._texts = texts

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Write one token to each row; logits float32 [rows, words] of the tokens after them."""
        device = self.model.device
        written = self._written
        ids = torch.tensor(list(tokens), device=device)[:, None]
        positions = written.lengths[:, None].to(device)
        mask = written.mask(1, device)
        if self.pairs:
            self._positions = positions
            width = self._read.width
            blank = torch.zeros((), device=device, dtype=self.model.dtype).expand(self.rows, width, self._channels)
            try:
                output = self.model(
                    encoder_outputs=BaseModelOutput(last_hidden_state=blank),  # its keys and values are in the table
                    attention_mask=self._read.mask(0, device),
                    decoder_input_ids=ids,
                    decoder_attention_mask=mask,
                    past_key_values=EncoderDecoderCache(written, self._read),
                    use_cache=True,
                )
            finally:
                self._positions = None
        else:
            output = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=written, use_cache=True
            )
        written.lengths += 1
        return _last(output)

    def _new_cache(self) -> Any:
        """One that keeps all columns, also of layers that look at the last few alone: their mask says so."""
        return Cache(layers=[DynamicLayer() for _ in range(self._layers)])

    @property
    def _channels(self) -> int:
        return int(getattr(self.model.config, "d_model", None) or self.model.config.hidden_size)

    def _place_rows(self) -> None:
        """Give each row its own positions: these decoders count columns, which rows of several lengths share."""
        embed = getattr(self.model.get_decoder(), "embed_positions", None)
        if embed is None:
            return  # T5's positions are differences between columns

        def place(module: Any, arguments: Any, options: Any, output: torch.Tensor) -> torch.Tensor:
            if self._positions is None:
                return output
            return torch.nn.functional.embedding(self._positions + getattr(module, "offset", 0), module.weight)

        embed.register_forward_hook(place, with_kwargs=True)


def _last(output: Any) -> torch.Tensor:
    logits: torch.Tensor = output.logits[:, -1]
    return logits.float()
