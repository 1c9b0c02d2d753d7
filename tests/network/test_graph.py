"""How texts are laid out for the graph."""

import numpy as np
import pytest

from tuneserve.network import graph


@pytest.mark.parametrize("max_tokens", [8, 32, 64, 100, 256, 512])
def test_every_length_has_a_width_and_no_text_wastes_much(max_tokens: int) -> None:
    widths = graph.row_widths(max_tokens)
    assert widths == sorted(set(widths))
    assert widths[-1] == max_tokens
    for length in range(16, max_tokens + 1):
        width = next(one for one in widths if one >= length)
        assert width - length <= max(8, length / 3)


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_every_text_once_and_little_padding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 60, rng.integers(1, 40)).tolist()
    (rows, width), members = graph.plan(lengths, graph.row_widths(256))
    assert sorted(text for row in members for text in row) == list(range(len(lengths)))
    assert len(members) <= rows
    assert all(sum(lengths[text] for text in row) <= width for row in members)
    if sum(lengths) > 500:
        assert sum(lengths) / (rows * width) > 0.8


def test_narrow_rows_are_taken_unless_they_waste_what_they_save() -> None:
    widths = graph.row_widths(256)
    assert graph.plan([25] * 8, widths)[0] == (4, 64)  # 256 places where one row has 224, but of a quarter's attention
    assert graph.plan([100] * 2, widths)[0] == (1, 224)
    assert graph.plan([100], widths)[0] == (1, 112)


@pytest.mark.parametrize("max_tokens", [32, 100, 256])
def test_the_shapes_of_a_server_are_few_and_known_before(max_tokens: int) -> None:
    rng = np.random.default_rng(0)
    widths = graph.row_widths(max_tokens)
    shapes = []
    for _ in range(2000):
        lengths, room = [], 1024
        while (length := int(rng.integers(3, max_tokens + 1))) <= room and rng.random() < 0.97:
            lengths.append(length)
            room -= length
        if lengths:
            shapes.append(graph.plan(lengths, widths)[0])
    known = graph.batch_shapes(widths, 1024)
    assert len(set(shapes)) < 40
    assert sum(shape in known for shape in shapes) > 0.98 * len(shapes)
    assert len(known) == len(set(known)) <= 40
    assert known[: len(widths)] == [(1, width) for width in widths]


def test_a_start_warms_up_what_fits_into_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[int, ...]] = []
    engine = graph.Graph.__new__(graph.Graph)
    engine.max_tokens, engine._widths, engine._packed = 256, graph.row_widths(256), True
    monkeypatch.setattr(engine, "begin", lambda prepared: ran.append(prepared.inputs[0].shape))
    monkeypatch.setattr(engine, "result", lambda: None)
    shapes = graph.batch_shapes(engine._widths, 1024)
    assert engine.warm_up_shapes(1024, seconds=60) == 0
    assert ran == shapes
    clock = iter(range(100))
    monkeypatch.setattr(graph.time, "perf_counter", lambda: next(clock))
    ran.clear()
    assert engine.warm_up_shapes(1024, seconds=5) == len(shapes) - 5
    assert ran == shapes[:5]


def test_rows_of_texts_of_all_lengths_that_fit_are_filled_better_than_rows_of_equal_ones() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 160).tolist()

    def places(order: list[int]) -> int:
        shapes = [graph.plan(order[begin : begin + 40], graph.row_widths(256))[0] for begin in range(0, 160, 40)]
        return sum(rows * width for rows, width in shapes)

    assert places(lengths) < 0.95 * places(sorted(lengths))
