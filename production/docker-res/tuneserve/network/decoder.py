"""A model that writes, one token of every text at a time: texts may join and leave between any two tokens.

Keys and values of all texts stand in the tables of `cache.py`; of an encoder-decoder the encoder's stand in second
ones, which do not grow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from tuneserve.network.cache import Tables, widen


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
        self._wide = widen(model)
        self._positions: torch.Tensor | None = None
        self.clear()
        if self.pairs:
            self._place_rows()

    def clear(self) -> None:
        """Have no rows."""
        self._written, self._read = Tables(self._layers, self._wide), Tables(self._layers, self._wide)
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
