"""The version's own weights behind the seam: the padded model's logits, without its padding."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification

from tuneserve.errors import StoreError
from tuneserve.network.attention import Spans
from tuneserve.serving.batcher import Batcher
from tuneserve.serving.engines.engine import infer
from tuneserve.serving.engines.torch_engine import TorchEngine
from tuneserve.serving.metrics import Metrics
from tuneserve.settings import Settings

PACKED = ["bert", "distilbert", "roberta", "modernbert"]
PADDED = ["deberta-v2", "mpnet"]
LENGTHS = [1, 2, 5, 60, 33, 33, 7, 1]
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."
Make = Callable[..., TorchEngine]


def folder_of(kind: str, folder: Path) -> Path:
    tiny.make_classifier(kind).save_pretrained(folder)
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make_engine(kind: str = "bert", *, max_batch_tokens: int = 256, **environment: str) -> TorchEngine:
        return TorchEngine(
            folder_of(kind, tmp_path / kind),
            Settings.from_environ({"DEVICE": "cpu", "PRECISION": "fp32"} | environment),
            threads=1,
            max_tokens=64,
            max_batch_tokens=max_batch_tokens,
        )

    return make_engine


def texts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    split = tiny.make_split(lengths, seed=seed)
    return [split.text_ids(row).tolist() for row in range(len(split))]


@torch.inference_mode()
def wanted(engine: TorchEngine, texts: list[list[int]], folder: Path) -> Any:
    """What the checkpoint says to each text alone, loaded as anyone would."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return np.concatenate([model(input_ids=torch.tensor([text])).logits.numpy() for text in texts])


@pytest.mark.parametrize("kind", PACKED + PADDED)
def test_a_batch_of_any_lengths_has_the_logits_of_its_texts_alone(kind: str, make: Make, tmp_path: Path) -> None:
    engine = make(kind)
    texts = texts_of(LENGTHS)
    prepared = engine.prepare(texts)
    engine.begin(prepared)
    found = engine.result()
    assert engine.packs == (kind in PACKED)
    assert (prepared.texts, prepared.padded_tokens) == (len(LENGTHS), sum(LENGTHS) if engine.packs else 8 * 60)
    assert found.dtype == np.float32
    assert len(np.unique(found, axis=0)) == len(texts)
    np.testing.assert_allclose(found, wanted(engine, texts, tmp_path / kind), rtol=0, atol=1e-5)


def test_a_head_that_transformers_does_not_know_is_refused_and_not_started_at_random(tmp_path: Path) -> None:
    model = tiny.make_classifier("bert")
    model.classifier = torch.nn.Sequential(model.classifier)
    model.save_pretrained(tmp_path)
    with pytest.raises(StoreError, match=r"no weights classifier\.bias, classifier\.weight"):
        TorchEngine(tmp_path, Settings(device="cpu"), threads=1, max_tokens=64, max_batch_tokens=64)


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_a_batch_may_be_laid_out_while_another_runs(kind: str, make: Make, tmp_path: Path) -> None:
    engine = make(kind)
    batches = [texts_of([3, 9, 30], seed=1), texts_of([60], seed=2), texts_of([5] * 7, seed=3)]
    found, ahead = [], engine.prepare(batches[0])
    for batch in [*batches[1:], None]:
        engine.begin(ahead)
        ahead = engine.prepare(batch) if batch else ahead
        found.append(engine.result())
    for logits, texts in zip(found, batches, strict=True):
        np.testing.assert_allclose(logits, wanted(engine, texts, tmp_path / kind), rtol=0, atol=1e-5)


def test_on_a_cpu_the_work_is_done_when_the_result_is_asked_for(make: Make) -> None:
    """For the batcher measures from `begin` to `result`, and delivers the batch before once the next has begun."""
    engine = make(max_batch_tokens=16384)
    prepared = engine.prepare([[5] * 60] * 250)
    began = time.process_time()
    engine.begin(prepared)
    begun = time.process_time()
    engine.result()
    assert begun - began < 0.2 * (time.process_time() - begun)


def test_bf16_is_a_matter_of_the_weights_and_differs_by_its_rounding(make: Make, tmp_path: Path) -> None:
    engine = make("modernbert", PRECISION="bf16")
    assert {one.dtype for one in engine._forward.model.parameters()} == {torch.bfloat16}
    assert {one.dtype for one in engine._forward.model.buffers()} == {torch.float32}  # the rotary frequencies
    exact = wanted(engine, texts_of(LENGTHS), tmp_path / "modernbert")
    found = infer(engine, texts_of(LENGTHS))
    assert found.dtype == np.float32
    difference = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-6 < difference < 6 * 2**-8


class Questions(TorchDispatchMode):
    """Notes what makes the host wait for a GPU: a figure read, places sought, a tensor made of the host's figures."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name, named = operator.overloadpacket.__name__, named or {}
        masked = name in ("index", "index_put", "index_put_") and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in arguments[1]
        )
        counted = name == "repeat_interleave" and named.get("output_size") is None
        if masked or counted or name in self.WAITING:
            self.asked.append(str(operator))
        return operator(*arguments, **named)


def test_questions_to_the_device_are_seen() -> None:
    with Questions() as questions:
        states = torch.arange(4)
        states[states > 1].sum().item()
        torch.repeat_interleave(states)
        torch.tensor([1, 2])
    assert len(questions.asked) == 4


@pytest.mark.parametrize("kind", [*PACKED, "mean"])
def test_a_packed_pass_asks_the_device_for_nothing(kind: str, make: Make, tmp_path: Path) -> None:
    """So that a GPU's work is queued without waiting for it; the operators are the same on a CPU."""
    engine = make("modernbert" if kind == "mean" else kind)
    engine._forward._mean = kind == "mean"  # type: ignore[union-attr]
    prepared = engine.prepare(texts_of(LENGTHS))
    prepared.inputs[1].blocks(engine._forward.model.config.num_attention_heads)  # which only a CPU needs
    with Questions() as questions:
        engine._compute(prepared)
    assert questions.asked == []


def fail_beyond(engine: TorchEngine, tokens: int) -> list[int]:
    """Let memory run out, as a GPU's does, for batches of more tokens; returns the tokens of those that went well."""
    went_well: list[int] = []

    def look(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        size = named["input_ids"].numel()
        if size > tokens:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        went_well.append(size)

    engine._forward.model.register_forward_pre_hook(look, with_kwargs=True)
    return went_well


def test_out_of_memory_frees_what_the_attempt_held(make: Make) -> None:
    engine = make()
    held: list[Any] = []

    class Marked(torch.Tensor):
        def __del__(self) -> None:
            held.remove(id(self))

    def allocate(*_: Any) -> None:
        tensor = torch.zeros(3).as_subclass(Marked)
        held.append(id(tensor))
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    engine._forward.model.register_forward_pre_hook(allocate)
    engine.begin(engine.prepare([[5, 6]]))
    with pytest.raises(MemoryError, match="Tried to allocate") as caught:
        engine.result()
    assert held == []  # while the error is still at hand, as it is when the batcher tries again
    assert caught.value.__context__ is None


def test_a_batch_too_large_for_memory_is_answered_in_halves(make: Make, tmp_path: Path) -> None:
    engine = make()
    texts = texts_of([40, 30, 20, 10, 20, 30])
    answers = wanted(engine, texts, tmp_path / "bert")
    sizes = fail_beyond(engine, 70)

    async def ask() -> list[Any]:
        batcher = Batcher(engine, Metrics(), max_queue_tokens=10_000)
        try:
            return await batcher.submit(texts, deadline=time.monotonic() + 60)
        finally:
            await asyncio.to_thread(batcher.close)

    np.testing.assert_allclose(np.array(asyncio.run(ask())), answers, rtol=0, atol=1e-5)
    assert len(sizes) > 1
    assert sum(sizes) == 150


def test_warming_up_runs_batches_of_all_sizes_and_finds_the_largest_that_memory_holds(make: Make) -> None:
    engine = make(max_batch_tokens=512)
    sizes = fail_beyond(engine, 512)
    engine.warm_up()
    assert sizes == [512, 256, 128, 64, 32, 16, 8]
    small = make("distilbert", max_batch_tokens=512)
    sizes = fail_beyond(small, 200)
    small.warm_up()
    assert sizes == [128, 64, 32, 16, 8]
    assert small.max_batch_tokens == 128
    none = make("roberta", max_batch_tokens=512)
    fail_beyond(none, 0)
    with pytest.raises(MemoryError):
        none.warm_up()


def test_a_damaged_checkpoint_is_a_store_error(make: Make, tmp_path: Path) -> None:
    make()
    weights = tmp_path / "bert" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(StoreError, match="cannot be loaded"):
        TorchEngine(
            tmp_path / "bert", Settings.from_environ({"DEVICE": "cpu"}), threads=1, max_tokens=8, max_batch_tokens=8
        )


@pytest.fixture
def gpu() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", PACKED)
def test_on_a_gpu_batches_in_bf16_are_queued_without_waiting(kind: str, make: Make, tmp_path: Path, gpu: None) -> None:
    engine = make(kind, DEVICE="cuda", PRECISION="bf16")
    assert engine.packs
    engine.warm_up()
    batches = [texts_of(LENGTHS, seed=seed) for seed in range(4)]
    found = []
    torch.cuda.set_sync_debug_mode("error")
    ahead = engine.prepare(batches[0])
    for batch in [*batches[1:], batches[0]]:
        engine.begin(ahead)
        ahead = engine.prepare(batch)
        found.append(engine.result())
    for logits, texts in zip(found, batches, strict=True):
        exact = wanted(engine, texts, tmp_path / kind)
        assert np.linalg.norm(logits - exact) / np.linalg.norm(exact) < 6 * 2**-8


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bert", "deberta-v2"])
def test_on_a_gpu_fp32_has_the_logits_of_the_checkpoint(kind: str, make: Make, tmp_path: Path, gpu: None) -> None:
    engine = make(kind, DEVICE="cuda")
    texts = texts_of(LENGTHS)
    np.testing.assert_allclose(infer(engine, texts), wanted(engine, texts, tmp_path / kind), rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_a_gpu_that_ran_out_of_memory_goes_on(make: Make, gpu: None) -> None:
    engine = make(DEVICE="cuda", PRECISION="bf16")
    sizes = fail_beyond(engine, 70)
    engine.warm_up()
    assert sizes[0] == 64
    assert infer(engine, [[5, 6, 7]]).shape == (1, 3)


def test_a_kernel_that_this_number_format_lacks_means_padding(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    together = Spans.attend_together

    def lacking(self: Spans, joint: torch.Tensor, *, scaling: float) -> torch.Tensor:
        if joint.dtype == torch.bfloat16:
            raise RuntimeError("no kernel for bf16")
        return together(self, joint, scaling=scaling)

    monkeypatch.setattr(Spans, "attend_together", lacking)
    assert make(PRECISION="fp32").packs
    engine = make(PRECISION="bf16")
    assert not engine.packs
    assert np.isfinite(infer(engine, texts_of(LENGTHS))).all()
