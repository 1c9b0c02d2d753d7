"""The exported model: an OpenVINO graph for CPUs, how texts are laid out for it, and how it is run.

    <version>/engine/model.xml, model.bin    the graph
    <version>/engine/int8.xml, int8.bin      the same with int8 products, where that was asked for and accepted
    <version>/engine/engine.json             their layout, and what the comparisons with torch and with int8 gave

`packed`: rows of several texts each, end to end, kept apart by a mask. `padded`: one text a row. Both come in few
shapes, so that a server can warm them all up and nothing is compiled under load.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tuneserve.errors import StoreError
from tuneserve.files import read_json
from tuneserve.hardware import Precision

Array = np.ndarray[Any, np.dtype[Any]]

FOLDER = "engine"
MODEL = "model.xml"
INT8 = "int8.xml"
DESCRIPTION = "engine.json"

ROW_COUNTS = (*range(1, 9), *range(10, 21, 2), *range(24, 41, 4), *range(48, 81, 8), *range(96, 257, 16))
"""Numbers of rows that a batch may have."""

SLACK = 1.25
"""Padded tokens to be expected for each token: texts do not quite fill their rows."""

NARROW = 64
"""Tokens of the narrowest row in batches of several rows; wider ones double."""

EVEN_WIDTH = 640
"""In a row so wide, attention takes as long as all else: measured on a CPU with bf16 matrices, at 128 and 256."""

TOKENS_A_RESULT = (16, 4)
"""The graph reads a result for every 16 or 4 padded tokens: most texts are longer than 16, few shorter than 4."""


def load_openvino() -> Any:
    """The library, without the part that tells its makers of its use."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


@dataclass(frozen=True)
class Prepared:
    """A batch laid out: what its engine computes from, the number of texts, and of tokens, padding included."""

    inputs: tuple[Any, ...]
    texts: int
    padded_tokens: int


class Graph:
    """One exported model, loaded. Batches may be prepared on any thread; one at a time is run.

    Args:
        folder: of the version.
        precision: number format of the products; fp32 is taken where the comparison with torch refused another.
        threads: CPU threads to use.
        max_tokens: the longest text.
        int8: whether to run the quantized graph; `precision` is then that of what it did not quantize.
        states: whether results are what the head reads, float32 [texts, channels], and not what it makes of it.

    Raises:
        StoreError: the files are missing or damaged, or the graph does not give its states.
    """

    def __init__(
        self,
        folder: Path,
        *,
        precision: Precision,
        threads: int,
        max_tokens: int,
        int8: bool = False,
        states: bool = False,
    ) -> None:
        self.max_tokens = max_tokens
        try:
            self.description = read_json(folder / FOLDER / DESCRIPTION)
            self._packed = self.description["layout"] == "packed"
            self._pad_id = int(self.description.get("pad_id", 0))
            self.precision: Precision = (
                precision if precision in self.description.get("formats", [precision]) else "fp32"
            )
            self._output = 1 if states else 0
            if states and self.description.get("states") is not True:
                raise ValueError("it does not give what the head reads")
            core = load_openvino().Core()
            # Weights in memory of one's own: a file that is cut short, or a volume that goes away, under a mapped one
            # would kill the process.
            core.set_property({"ENABLE_MMAP": False})
            model = core.read_model(folder / FOLDER / (INT8 if int8 else MODEL))
            compiled = core.compile_model(
                model,
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[self.precision],
                    "INFERENCE_NUM_THREADS": threads,
                    "NUM_STREAMS": 1,
                },
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise StoreError(f"The engine in {folder / FOLDER} cannot be loaded: {error}") from error
        self._request = compiled.create_infer_request()
        self._widths = row_widths(max_tokens)
        wide = [width for width in self._widths if _is_batch_width(width, max_tokens)]
        self._rows = [next(width for width in wide if width >= length) for length in range(max_tokens + 1)]

    def alike(self, length: int) -> int:
        """What texts have in common that should go together: the row they need, or if padded, their length.

        Packed rows are filled best by texts of all lengths that fit into them.
        """
        return self._rows[length] if self._packed else length

    def prepare(self, texts: Sequence[Sequence[int]]) -> Prepared:
        """Lay texts out, each of them token ids, special tokens included."""
        lengths = [len(text) for text in texts]
        if not self._packed:
            return self._pad(texts, lengths)
        shape, rows = plan(lengths, self._widths)
        return _pack(texts, lengths, shape, rows)

    def begin(self, prepared: Prepared) -> None:
        """Start to compute; other threads may work meanwhile."""
        self._running = prepared
        self._request.start_async(prepared.inputs, share_inputs=True)

    def wait(self, seconds: float) -> None:
        """Wait for what was begun, but no longer than this, in whole milliseconds."""
        self._request.wait_for(int(1000 * seconds))

    def result(self) -> Array:
        """Wait for what was begun: logits float32 [texts, labels], or states."""
        self._request.wait()
        found: Array = self._request.get_output_tensor(self._output).data[: self._running.texts].copy()
        return found

    def warm_up_shapes(self, max_batch_tokens: int, *, seconds: float) -> int:
        """Run the shapes that batches of this size can have, those of single texts first, until the time is over.

        Returns:
            How many were not reached. Their first batches take some 10 ms longer.
        """
        shapes = batch_shapes(self._widths, max_batch_tokens)
        end = time.perf_counter() + seconds
        for index, (rows, width) in enumerate(shapes):
            if time.perf_counter() > end:
                return len(shapes) - index
            self.begin(self.prepare([[0] * width] * rows))
            self.result()
        return 0

    def _pad(self, texts: Sequence[Sequence[int]], lengths: list[int]) -> Prepared:
        width = next(one for one in self._widths if one >= max(lengths))
        rows = _at_least(len(texts))
        input_ids = np.full((rows, width), self._pad_id, dtype=np.int64)
        mask = np.zeros((rows, width), dtype=np.int64)
        mask[:, 0] = 1  # a row of padding alone would attend to nothing
        for row, text in enumerate(texts):
            input_ids[row, : len(text)] = text
            mask[row, : len(text)] = 1
        return Prepared((input_ids, mask), len(texts), rows * width)


def row_widths(max_tokens: int) -> list[int]:
    """Widths that a row may have, up to that of the longest text: steps of a fifth or less, for single texts."""
    widths = [16, 24, 32, 40, 48, 56]
    base = NARROW
    while base < max_tokens:
        widths += [base * step // 4 for step in range(4, 8)]
        base *= 2
    return [*(width for width in widths if width < max_tokens), max_tokens]


def batch_shapes(widths: Sequence[int], max_batch_tokens: int) -> list[tuple[int, int]]:
    """The shapes (rows, width) that batches of this many tokens can have: single rows, then by the work they are."""
    shapes = [(1, width) for width in widths]
    for width in widths:
        if _is_batch_width(width, widths[-1]):
            shapes += [(rows, width) for rows in ROW_COUNTS if rows > 1 and rows * width <= SLACK * max_batch_tokens]
    return sorted(shapes, key=lambda shape: (shape[0] > 1, shape[0] * shape[1]))


def _is_batch_width(width: int, max_tokens: int) -> bool:
    """Whether batches of several rows use this width: 64 and its doubles, and the widest."""
    return width == max_tokens or (width >= NARROW and width & (width - 1) == 0)


def plan(lengths: Sequence[int], widths: Sequence[int]) -> tuple[tuple[int, int], list[list[int]]]:
    """The shape (rows, width) that holds these texts with the least work, and which texts each row gets.

    Args:
        lengths: tokens of each text.
        widths: as `row_widths` gives them.
    """
    total, longest = sum(lengths), max(lengths)
    found = [((1, width), [list(range(len(lengths)))]) for width in widths if width >= total][:1]
    order = sorted(range(len(lengths)), key=lambda text: -lengths[text])
    for width in widths:
        if width >= longest and len(lengths) > 1 and _is_batch_width(width, widths[-1]):
            rows = _first_fit(order, lengths, width)
            found.append(((_at_least(len(rows)), width), rows))
    return min(found, key=lambda way: _work(*way[0]))


def _work(rows: int, width: int) -> int:
    """What a shape costs, in any unit: products for each token, and attention between those of a row."""
    return rows * width * (EVEN_WIDTH + width)


def _first_fit(order: list[int], lengths: Sequence[int], width: int) -> list[list[int]]:
    """Texts in rows: each, the longest first, goes to the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    first_with_room = 0
    for text in order:
        length = lengths[text]
        for row in range(first_with_room, len(rows)):
            if room[row] >= length:
                break
        else:
            row = len(rows)
            rows.append([])
            room.append(width)
        rows[row].append(text)
        room[row] -= length
        while first_with_room < len(rows) and room[first_with_room] < 2:
            first_with_room += 1
    return rows


def _at_least(rows: int) -> int:
    return next((count for count in ROW_COUNTS if count >= rows), rows)


def _result_counts(rows: int, width: int) -> list[int]:
    """Numbers of results that a batch of this shape is read at."""
    counts = {rows * width // tokens for tokens in TOKENS_A_RESULT}
    return sorted(counts | {1} if rows == 1 else counts)


def _pack(
    texts: Sequence[Sequence[int]], lengths: list[int], shape: tuple[int, int], rows: list[list[int]]
) -> Prepared:
    input_ids = np.zeros(shape, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    owners = np.full(shape, -1, dtype=np.int64)
    results = next((count for count in _result_counts(*shape) if count >= len(texts)), len(texts))
    first = np.zeros(results, dtype=np.int64)
    width = shape[1]
    for row, members in enumerate(rows):
        begin = 0
        for text in members:
            end = begin + lengths[text]
            input_ids[row, begin:end] = texts[text]
            positions[row, begin:end] = np.arange(end - begin)
            owners[row, begin:end] = text
            first[text] = row * width + begin
            begin = end
    return Prepared((input_ids, positions, owners, first), len(texts), shape[0] * width)
