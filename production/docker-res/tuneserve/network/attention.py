"""Attention over texts that lie end to end, without padding.

On a GPU it is torch's own kernel for rows of different lengths (`torch.nn.attention.varlen`, flash attention 2);
elsewhere, and for number formats which that kernel lacks, the texts are taken in blocks whose scores stay in the cache.
transformers' encoders call `attend` through their `AttentionInterface` under the name `IMPLEMENTATION`.

Longer than most modules: layout, forward and backward pass of one kernel are read together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

Array = np.ndarray[Any, np.dtype[Any]]

IMPLEMENTATION = "tuneserve_packed"

HALVES = (torch.bfloat16, torch.float16)
CHANNELS = range(8, 257, 8)
"""Number formats and channels of a head that flash attention knows."""

BLOCK_SCORES = 400_000
"""Scores computed at a time on a CPU, over all heads: in bf16 they fit into a core's cache."""
BLOCK_SLACK = 0.15
"""Texts share a block if the shortest is at most this much shorter than the longest."""
MASKED = -1e9
"""Added to a score that must not count; finite, so that a row of nothing else has no NaN."""


def upload(array: Array, device: torch.device) -> torch.Tensor:
    """The array as a tensor on the device. For a GPU the copy is only queued, behind what the GPU has to do already."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Block:
    """Texts of like length that are attended to together, as rows of `longest` tokens, padding included.

    `index` int64 [texts · longest] says which token is where in the rows, `filled` where it is no padding; both are
    None, as is `mask` [texts, 1, 1, longest] (added to the scores), where all texts are equally long.
    """

    first: int
    last: int
    texts: int
    longest: int
    index: torch.Tensor | None = None
    filled: torch.Tensor | None = None
    mask: torch.Tensor | None = None


class Layout(Protocol):
    """How texts lie in a batch whose tokens are one row; what layers that know of several texts ask."""

    @property
    def first(self) -> torch.Tensor:
        """The index of each text's first token, int64 [texts]."""
        ...

    @property
    def positions(self) -> torch.Tensor:
        """Each token's position in its text, int64 [tokens]."""
        ...

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        window: int = -1,
        first_only: bool = False,
    ) -> torch.Tensor:
        """Attention of every token, or of each text's first one, to its own text.

        Query [tokens or texts, heads, channels], key and value [tokens, heads, channels] → as query. Tokens further
        apart than `window` do not see each other; -1 is no limit.
        """
        ...

    def attend_together(self, joint: torch.Tensor, *, scaling: float) -> torch.Tensor:
        """The same of queries, keys and values in one: [tokens, 3, heads, channels] → [tokens, heads, channels]."""
        ...

    def mean(self, states: torch.Tensor) -> torch.Tensor:
        """The mean state of each text: [tokens, channels] → [texts, channels]."""
        ...


class Spans:
    """Where each text lies in a packed batch: `lengths` tokens each, one after the other."""

    def __init__(self, lengths: Array, device: torch.device) -> None:
        self.lengths = lengths
        self.starts = np.r_[0, np.cumsum(self.lengths)]
        self.device = device

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """Where each text begins, and the end: int32 [texts + 1], as flash attention takes it."""
        return upload(self.starts.astype(np.int32), self.device)

    @cached_property
    def one_each(self) -> torch.Tensor:
        """The same for a single query a text."""
        return torch.arange(len(self.lengths) + 1, dtype=torch.int32, device=self.device)

    @cached_property
    def first(self) -> torch.Tensor:
        """The index of each text's first token, int64 [texts]."""
        return upload(self.starts[:-1], self.device)

    @cached_property
    def positions(self) -> torch.Tensor:
        """Each token's position in its text, int64 [tokens]."""
        positions = np.arange(self.starts[-1]) - np.repeat(self.starts[:-1], self.lengths)
        return upload(positions, self.device)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return int(self.lengths.max())

    def upload(self) -> None:
        """Send what the layers will ask for, so that none of them waits for it."""
        _ = self.first, self.one_each, self.cu_seqlens, self.positions  # cached properties: reading one makes it

    def blocks(self, heads: int) -> list[Block]:
        """The texts in blocks of at most BLOCK_SCORES scores; neighbours of like length share one."""
        if not hasattr(self, "_blocks"):
            self._blocks = list(self._cut(BLOCK_SCORES / heads))
        return self._blocks

    def _cut(self, scores: float) -> Iterator[Block]:
        begin = 0
        while begin < len(self.lengths):
            end, shortest, longest = begin, self.lengths[begin], self.lengths[begin]
            while end < len(self.lengths):
                low, high = min(shortest, self.lengths[end]), max(longest, self.lengths[end])
                if end > begin and ((end - begin + 1) * high**2 > scores or low < high * (1 - BLOCK_SLACK) - 3):
                    break
                end, shortest, longest = end + 1, low, high
            yield self._block(begin, end, int(longest))
            begin = end

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        window: int = -1,
        first_only: bool = False,
    ) -> torch.Tensor:
        """See `Layout.attend`."""
        if _has_kernel(query):
            found = varlen_attn(
                query.contiguous(),
                key.contiguous(),
                value.contiguous(),
                self.one_each if first_only else self.cu_seqlens,
                self.cu_seqlens,
                1 if first_only else self.longest,
                self.longest,
                scale=scaling,
                window_size=(window, window),
            )
        else:
            found = _InBlocks.apply(  # type: ignore[no-untyped-call]
                query, key, value, self, scaling, window, first_only
            )
        assert isinstance(found, torch.Tensor)
        return found

    def attend_together(self, joint: torch.Tensor, *, scaling: float) -> torch.Tensor:
        """See `Layout.attend_together`."""
        if _has_kernel(joint):
            query, key, value = joint.unbind(1)
            return self.attend(query, key, value, scaling=scaling)
        found = _TogetherInBlocks.apply(joint, self, scaling)  # type: ignore[no-untyped-call]
        assert isinstance(found, torch.Tensor)
        return found

    def mean(self, states: torch.Tensor) -> torch.Tensor:
        """See `Layout.mean`."""
        lengths = self.cu_seqlens.diff().long()
        exact = states.to(torch.promote_types(states.dtype, torch.float32))  # a sum in bf16 stops growing
        sums = exact.new_zeros(len(lengths), states.shape[1])
        sums = sums.index_add(0, torch.repeat_interleave(lengths, output_size=len(exact)), exact)
        return (sums / lengths[:, None]).to(states.dtype)

    def _block(self, begin: int, end: int, longest: int) -> Block:
        span = int(self.starts[begin]), int(self.starts[end]), end - begin, longest
        if (self.lengths[begin:end] == longest).all():
            return Block(*span)
        offsets = np.arange(longest)
        filled = offsets < self.lengths[begin:end, None]
        index = np.where(filled, self.starts[begin:end, None] + offsets, self.starts[begin])
        mask = np.where(filled, 0.0, MASKED)[:, None, None, :]
        return Block(
            *span,
            upload(index.reshape(-1), self.device),
            upload(np.flatnonzero(filled), self.device),
            upload(mask, self.device),
        )


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    spans: "Layout",
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Let every token attend to its own text.

    Args:
        module: the layer that asks.
        query: [1, heads, tokens, channels].
        key: likewise.
        value: likewise.
        attention_mask: not looked at; the spans say what belongs together.
        spans: where each text lies.
        scaling: of the scores; by default 1/√channels.
        sliding_window: half the window plus one, as transformers counts it: tokens further apart do not see each other.

    Returns:
        [1, tokens, heads, channels] and, as transformers wants it, the absent weights.
    """
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = -1 if sliding_window is None else sliding_window - 1
    return spans.attend(query, key, value, scaling=scaling, window=window).unsqueeze(0), None


def register() -> None:
    """Make `attend` known to transformers."""
    AttentionInterface.register(IMPLEMENTATION, attend)


def _has_kernel(states: torch.Tensor) -> bool:
    """Whether torch's attention over rows of different lengths takes such states."""
    return states.device.type == "cuda" and states.dtype in HALVES and states.shape[-1] in CHANNELS


class _TogetherInBlocks(torch.autograd.Function):
    """Attention in plain torch, block by block, over queries, keys and values that lie together.

    A block is gathered once; what the backward pass needs of it, the three and the weights, is kept as gathered.
    """

    @staticmethod
    def forward(ctx: Any, joint: torch.Tensor, spans: Spans, scaling: float) -> torch.Tensor:
        """Joint [tokens, 3, heads, channels] → [tokens, heads, channels]."""
        tokens, _, heads, channels = joint.shape
        out = joint.new_empty(tokens, heads, channels)
        kept = []
        for block in spans.blocks(heads):
            size = block.texts * heads, block.longest, channels
            three = _rows(joint, block).permute(2, 0, 3, 1, 4).reshape(3, *size)
            scores = torch.bmm(three[0], three[1].transpose(1, 2)).mul_(scaling)
            if block.mask is not None:
                scores.view(block.texts, heads, block.longest, -1).add_(block.mask.to(scores.dtype))
            weights = scores.softmax(-1)
            found = torch.bmm(weights, three[2])
            _put(out, found.view(block.texts, heads, block.longest, channels), block)
            kept += [three, weights]
        ctx.save_for_backward(*kept)
        ctx.spans, ctx.scaling = spans, scaling
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of the joint projection."""
        tokens, heads, channels = gradient.shape
        of_joint = gradient.new_empty(tokens, 3, heads, channels)
        kept = ctx.saved_tensors
        for number, block in enumerate(ctx.spans.blocks(heads)):
            three, weights = kept[2 * number : 2 * number + 2]
            incoming = _take(gradient, block, empty=0.0).reshape(three.shape[1:])
            found = torch.empty_like(three)
            torch.bmm(weights.transpose(1, 2), incoming, out=found[2])
            of_weights = torch.bmm(incoming, three[2].transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scaling)
            torch.bmm(of_scores, three[1], out=found[0])
            torch.bmm(of_scores.transpose(1, 2), three[0], out=found[1])
            rows = found.view(3, block.texts, heads, block.longest, channels).permute(1, 3, 0, 2, 4)
            if block.filled is None:
                of_joint[block.first : block.last].view(rows.shape).copy_(rows)
            else:
                of_joint[block.first : block.last] = rows.reshape(-1, 3, heads, channels)[block.filled]
        return of_joint, None, None


def _rows(states: torch.Tensor, block: Block) -> torch.Tensor:
    """States [tokens, ...] → [texts, longest, ...]; padding repeats another token."""
    rows = states[block.first : block.last] if block.index is None else states[block.index]
    return rows.view(block.texts, block.longest, *states.shape[1:])


class _InBlocks(torch.autograd.Function):
    """Attention in plain torch, block by block; the weights are kept for the backward pass, in the inputs' format."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spans: Spans,
        scaling: float,
        window: int,
        first_only: bool,
    ) -> torch.Tensor:
        """Query [tokens or texts, heads, channels], key and value [tokens, heads, channels] → as query."""
        out = query.new_empty(query.shape)
        weights = []
        blocks = spans.blocks(query.shape[1])
        text = 0
        for block in blocks:
            own = _one_each(block, text) if first_only else block
            text += block.texts
            scores = torch.matmul(_take(query, own) * scaling, _take(key, block).transpose(2, 3))
            if block.mask is not None:
                scores += block.mask.to(scores.dtype)
            if 0 <= window < block.longest:
                scores += _band(block.longest, window, scores)[: scores.shape[2]]
            weights.append(scores.softmax(-1))
            _put(out, torch.matmul(weights[-1], _take(value, block)), own)
        ctx.save_for_backward(query, key, value)
        ctx.weights, ctx.blocks, ctx.scaling, ctx.first_only = weights, blocks, scaling, first_only
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of query, key and value."""
        query, key, value = ctx.saved_tensors
        of_query, of_key, of_value = (states.new_empty(states.shape) for states in (query, key, value))
        text = 0
        for block, weights in zip(ctx.blocks, ctx.weights, strict=True):
            own = _one_each(block, text) if ctx.first_only else block
            text += block.texts
            gradient_here = _take(gradient, own, empty=0.0)
            _put(of_value, torch.matmul(weights.transpose(2, 3), gradient_here), block)
            of_weights = torch.matmul(gradient_here, _take(value, block).transpose(2, 3))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype) * ctx.scaling
            _put(of_query, torch.matmul(of_scores, _take(key, block)), own)
            _put(of_key, torch.matmul(of_scores.transpose(2, 3), _take(query, own)), block)
        return of_query, of_key, of_value, None, None, None, None


def _one_each(block: Block, text: int) -> Block:
    """The first tokens of a block's texts, which lie one after the other from index `text` on."""
    return Block(text, text + block.texts, block.texts, 1)


def _take(states: torch.Tensor, block: Block, empty: float | None = None) -> torch.Tensor:
    """States [tokens, heads, channels] → [texts, heads, longest, channels]; `empty` fills the padding."""
    if block.index is None or block.filled is None:
        rows = states[block.first : block.last]
    elif empty is None:
        rows = states[block.index]
    else:
        rows = states.new_full((block.texts * block.longest, *states.shape[1:]), empty)
        rows[block.filled] = states[block.first : block.last]
    return rows.view(block.texts, block.longest, *states.shape[1:]).transpose(1, 2)


def _put(out: torch.Tensor, found: torch.Tensor, block: Block) -> None:
    """The inverse of `_take`, into `out`."""
    rows = found.transpose(1, 2)
    if block.filled is None:
        out[block.first : block.last].view(rows.shape).copy_(rows)
    else:
        out[block.first : block.last] = rows.reshape(-1, *out.shape[1:])[block.filled]


def _band(longest: int, window: int, scores: torch.Tensor) -> torch.Tensor:
    index = torch.arange(longest, device=scores.device)
    apart = (index[:, None] - index[None, :]).abs()
    return torch.zeros_like(apart, dtype=scores.dtype).masked_fill(apart > window, MASKED)
