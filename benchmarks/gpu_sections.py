"""The sections of benchmarks/gpu.py: `gpu_sections.py NAME JSON` prints a line of JSON for each row, once known.

`materials` leaves in the shared folder what the others take: `data/` with both sets of texts, `bases/` with the base
models, and `models/`, a store with a version that was trained here, on the texts in `growing/`.
"""

import argparse
import asyncio
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
PROJECT = BENCHMARKS.parent
PRODUCTION = PROJECT / "production" / "docker-res"
sys.path.insert(0, str(PRODUCTION))

import load
import made_up
from gpu import About, Row
from servers import CONTENDERS, OURS, BenchError, Server, last_line

from tuneserve.hardware import set_threads

THREADS = set_threads("auto")

NAMES = {"sst2": "SST-2", "imdb": "IMDB"}
OLDEST_TORCH = (2, 10)
BY_DEFAULT, BY_TUNED, MOST_PADDING = 3.0, 1.5, 0.02
SIMILAR = 1.5
"""Times the error of padded rows in bf16 that packed rows may have."""

FRACTION = 0.25
"""Of the card, for the training beside a server."""

CONTEXT_BYTES = 1 << 30
"""What a process takes of the card outside torch's allocator, at most."""

LIMIT_BYTES = 4 << 30
"""Of the card, in which memory is made to run out."""


def row(what: str, measured: str, wanted: str = "", holds: bool | None = None, **figures: Any) -> Row:
    """A row of the table; `figures` are for the JSON alone."""
    return {"what": what, "measured": measured, "wanted": wanted, "holds": holds, "figures": figures}


def only_on_gpu(about: About, holds: bool) -> bool | None:
    """What is not asked of a CPU neither holds nor fails there."""
    return holds if about.device == "cuda" else None


def machine(about: About) -> Iterator[Row]:
    """Which device and which torch."""
    import torch

    from tuneserve.hardware import choose_device, choose_precision

    device, name = choose_device(about.device)
    numbers = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    yield row("torch", torch.__version__, "2.10 or later", numbers >= OLDEST_TORCH)
    precision = choose_precision("auto", device)
    size = f", {torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB" if about.device == "cuda" else ""
    shown = f"{name}{size}" if about.device == "cuda" else f"the CPU, {THREADS} thread(s)"
    yield row("device", f"{shown}; it computes in {precision}", precision=precision)


def materials(about: About) -> Iterator[Row]:
    """Texts, base models and a trained version."""
    work = Path(about.work)
    counts = (120, 80) if about.quick else (7000, 2000)
    said = []
    (work / "data").mkdir()
    for kind, train in zip(NAMES, counts, strict=True):
        folder = Path(about.data or "", kind)
        if about.data and folder.is_dir():
            (work / "data" / kind).symlink_to(folder)
        else:
            made_up.write_texts(work / "data" / kind, kind, train=train, test=train // 4)
            said.append(NAMES[kind])
    yield row("texts", f"made up, with the lengths of {' and '.join(said)}" if said else f"of {about.data}")
    (work / "bases").mkdir()
    bases = made_up.write_bases(work / "bases", layers=1 if about.quick else None)
    yield row("base models", "; ".join(base["shown"] for base in bases.values()))
    shutil.copytree(work / "data" / "sst2", work / "growing")
    began = time.perf_counter()
    run_job("train", environment(about))
    took = time.perf_counter() - began
    yield row("a version is trained, tested and saved", f"{took:.0f} s, {bases['MiniLM']['shown']}")


def tests(about: About) -> Iterator[Row]:
    """The tests that need a GPU, which skip themselves without one."""
    files = [str(path) for path in PROJECT.glob("tests/**/test_*.py") if "pytest.mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *sorted(files)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    summary = last_line(done.stdout or done.stderr).strip("= ")
    passed = done.returncode == 0 and "passed" in summary
    yield row("tests of the GPU", summary, "all pass", only_on_gpu(about, passed), output=done.stdout[-4000:])


def packed(about: About) -> Iterator[Row]:
    """Texts end to end against padded rows: the logits in both number formats, and the engine's speed in bf16."""
    import numpy as np
    import packed as layouts
    import torch

    from tuneserve.network.forward import Packed, Padded, Texts, cast, choose_forward
    from tuneserve.text import TextEncoder
    from tuneserve.training import model as models

    device = torch.device(about.device)
    for name, base in read_bases(about).items():
        encoder = TextEncoder.from_folder(Path(base["folder"]), max_tokens=layouts.MAX_TOKENS)
        count = 6 if about.quick else 256
        texts = [
            text
            for kind in NAMES
            for text in made_up.read_texts(made_up.find_test(Path(about.work, "data", kind)), count)
        ]
        ids = [one.ids for one in encoder.encode(texts)]
        flat = torch.tensor([number for text in ids for number in text], device=device)
        batch = Texts(flat, np.array([*map(len, ids)]))
        model = models.build_model(Path(base["folder"]), ["bad", "good"], dropout=0.0, seed=0, device=device).eval()
        with torch.inference_mode():
            exact = Padded(model)(batch).float()
            forward = choose_forward(model, learns=False)
            if not isinstance(forward, Packed):
                raise BenchError(f"{name} cannot be packed")
            found = {"fp32": forward(batch).float()}
            cast(model, "bf16")
            found["bf16"] = forward(batch).float()
            forward.remove()
            found["bf16, padded"] = Padded(model)(batch).float()
        errors = {key: float((one - exact).norm() / exact.norm()) for key, one in found.items()}
        what = f"packed logits against padded, {base['shown']}"
        fp32, bf16, padded = errors.values()
        yield row(f"{what}, fp32", f"{fp32:.1e} of their norm apart", "under 1e-4", fp32 < 1e-4)
        measured = f"{bf16:.4f} from fp32, padded rows {padded:.4f}"
        near = bf16 <= max(SIMILAR * padded, 2**-8)
        yield row(f"{what}, bf16", measured, f"at most {SIMILAR} times padded rows' error", near)
        folder = Path(about.work, f"packed-{name}")
        cast(model, "fp32")
        model.save_pretrained(folder)
        precision = "bf16" if about.device == "cuda" else "auto"
        engines = {
            one: layouts.load(folder, one, argparse.Namespace(device=about.device, precision=precision))
            for one in ("packed", "padded")
        }
        for size in [8] if about.quick else [32, 256]:
            rates = {one: layouts.rate(engine, ids, size, 0.5) for one, engine in engines.items()}
            times = rates["packed"] / rates["padded"]
            measured = f"{rates['packed']:.0f} texts/s, padded {rates['padded']:.0f}: {times:.2f} times"
            yield row(f"engine, {size} mixed texts in one call, {base['shown']}", measured, rates=rates)


def memory(about: About) -> Iterator[Row]:
    """The fraction that a training beside a server may take, and memory that runs out while serving and training."""
    import torch

    if about.device == "cuda":
        done = subprocess.run([sys.executable, "-c", TAKE], cwd=PRODUCTION, capture_output=True, text=True, check=True)
        measured = done.stdout.strip()
        wanted = "a tenth less can be had, a tenth more cannot"
        yield row(f"RETRAIN_GPU_FRACTION={FRACTION}", measured, wanted, measured == "less: had; more: refused")
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT_BYTES / total))
        limited = f"in {min(LIMIT_BYTES, total) >> 30} GiB"
    else:
        yield row(f"RETRAIN_GPU_FRACTION={FRACTION}", "", "a tenth less can be had, a tenth more cannot")
        limited = "as if memory held 700 tokens"
    yield from run_out_serving(about, limited)
    yield from run_out_training(about, limited)


TAKE = f"""
from tuneserve.hardware import run_in_background
from tuneserve.settings import Settings
run_in_background(Settings.from_environ({{"RETRAIN_GPU_FRACTION": "{FRACTION}", "RETRAIN_NICE": "0"}}))
import torch
free, total = torch.cuda.mem_get_info()
said = []
for name, factor in (("less", 0.9), ("more", 1.1)):
    try:
        torch.empty(int(total * {FRACTION} * factor), dtype=torch.uint8, device="cuda")
        said.append(name + ": had")
    except torch.OutOfMemoryError:
        said.append(name + ": refused")
    torch.cuda.empty_cache()
print("; ".join(said))
"""


def run_out_serving(about: About, limited: str) -> Iterator[Row]:
    """An engine whose largest batch does not fit."""
    import numpy as np
    import torch

    from tuneserve.serving.engines.engine import infer
    from tuneserve.serving.engines.torch_engine import TorchEngine
    from tuneserve.settings import Settings
    from tuneserve.training import model as models

    base, folder = read_bases(about)["MiniLM"], Path(about.work, "out-of-memory")
    cpu = torch.device("cpu")
    models.build_model(Path(base["folder"]), ["bad", "good"], dropout=0.0, seed=0, device=cpu).save_pretrained(folder)
    asked = 1 << 22 if about.device == "cuda" else 2048
    settings = Settings.from_environ({"DEVICE": about.device})
    engine = TorchEngine(folder, settings, threads=THREADS, max_tokens=256, max_batch_tokens=asked)
    texts = [[5 + number % 90] * (3 + number % 40) for number in range(16)]
    before = infer(engine, texts)
    with hear_halvings() as said, fail_beyond(engine._forward.model, about):
        engine.warm_up()
        after = infer(engine, texts)
    apart = float(np.abs(after - before).max())
    measured = f"{len(said)} halvings, {asked} to {engine.max_batch_tokens} tokens a batch; logits {apart:.1e} apart"
    held = bool(said) and engine.max_batch_tokens < asked and apart < 1e-2
    yield row(f"serving out of memory, {limited}", measured, "halves, then the same answers", held)


def run_out_training(about: About, limited: str) -> Iterator[Row]:
    """Steps that do not fit."""
    import math

    import numpy as np
    import torch
    from recipes import NoCheckpoints

    from tuneserve.hardware import choose_precision
    from tuneserve.network.forward import choose_forward
    from tuneserve.training import model as models
    from tuneserve.training.loop import Recipe, Run, fit
    from tuneserve.training.tokens import TokenizedSplit

    device = torch.device(about.device)
    count, length = (1024, 256) if about.device == "cuda" else (32, 60)
    train, valid = (
        TokenizedSplit(
            ids=np.random.default_rng(0).integers(5, 1000, texts * length, dtype=np.int32),
            starts=np.arange(texts + 1) * length,
            label_ids=np.arange(texts) % 2,
            truncated=np.zeros(texts, dtype=bool),
        )
        for texts in (count, 8)
    )
    losses: list[float] = []
    note = lambda step, figures: losses.extend([figures["loss"]] if "loss" in figures else [])  # noqa: E731
    recipe = Recipe(epochs=1, batch_size=count // 2, learning_rate=1e-5, max_norm=1.0, seed=0)
    base = read_bases(about)["MiniLM"]
    model = models.build_model(Path(base["folder"]), ["bad", "good"], dropout=0.0, seed=0, device=device)
    forward = choose_forward(model)
    with hear_halvings() as said, fail_beyond(model, about):
        fit(
            model,
            forward,
            {"train": train, "valid": valid},
            ["bad", "good"],
            recipe,
            Run(NoCheckpoints(), record=note),
            precision=choose_precision("auto", device),
        )
    measured = f"{len(said)} halvings, {len(losses)} of 2 steps, losses {', '.join(f'{one:.3f}' for one in losses)}"
    held = bool(said) and len(losses) == 2 and all(map(math.isfinite, losses))
    yield row(f"training out of memory, {limited}", measured, "halves, then every step", held)


@contextmanager
def hear_halvings() -> Iterator[list[str]]:
    """The warnings of memory that ran out."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    handler.addFilter(lambda record: "out of memory" in record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger().removeHandler(handler)


@contextmanager
def fail_beyond(model: Any, about: About, *, tokens: int = 700) -> Iterator[None]:
    """On a CPU, which has no limit to set, let the first layer fail as a full GPU does when it gets more tokens."""
    import torch

    def look(layer: Any, inputs: Any) -> None:
        if inputs[0].shape[:-1].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory, it is made believe.")

    if about.device == "cuda":
        yield
        return
    hook = model.base_model.encoder.layer[0].register_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


def beside(about: About) -> Iterator[Row]:
    """A server that retrains: what the training takes of the card, and what it costs the answers."""
    import httpx
    from loop import KEY, Load, Service, free_port

    texts = made_up.read_texts(made_up.find_test(Path(about.work, "data", "sst2")), 200)
    variables = environment(about) | {"PORT": str(free_port()), "HOST": "127.0.0.1"}
    variables |= {"API_KEY": KEY["X-API-Key"], "RETRAIN_GPU_FRACTION": str(FRACTION)}
    if about.device == "cpu":  # where the clients leave idle time to nobody
        variables["RETRAIN_NICE"] = "0"
    service = Service(variables, Path(about.work, "beside.log"))
    try:
        service.start()
        service.wait("/readyz", lambda body: body["phase"] == "ready")
        with Load(int(variables["PORT"]), texts, clients=4) as clients:
            time.sleep(2)
            mark = clients.mark()
            time.sleep(2 if about.quick else 4)
            alone, mark = clients.p99(mark), clients.mark()
            made_up.add_texts(Path(about.work, "growing", "train.csv"), 20)
            with Card(about) as card:
                known, _ = service.wait("/jobs", lambda jobs: all(one["state"] != "running" for one in jobs))
                httpx.post(f"{service.url}/retrain", headers=KEY, timeout=10).raise_for_status()
                job, seconds = service.new_job({one["id"] for one in known})
            together = clients.p99(mark)
        failed = {status: count for status, count in clients.statuses.items() if status != "200"}
    finally:
        service.end()
    measured = (
        f"{job['state']} in {seconds:.0f} s; p99 {together:.1f} ms, alone {alone:.1f} ms; {failed or 'no errors'}"
    )
    ended = job["state"] in ("finished", "refused") and not failed
    yield row("retraining beside a server under 4 clients", measured, "ends, every request answered", ended)
    wanted = f"at most {FRACTION:.0%}, and 1 GiB outside torch's allocator"
    if about.device == "cpu":
        yield row("memory of the card that it took", "", wanted)
        return
    measured = f"{card.most / 2**30:.1f} GiB of {card.total / 2**30:.0f}: {card.most / card.total:.1%}"
    yield row("memory of the card that it took", measured, wanted, card.most <= FRACTION * card.total + CONTEXT_BYTES)


class Card:
    """The most memory of the card that was taken at once beyond what was taken before."""

    def __init__(self, about: About) -> None:
        self.most, self.total = 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True) if about.device == "cuda" else None

    def __enter__(self) -> "Card":
        if self._thread:
            import torch

            self._before, self.total = torch.cuda.mem_get_info()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()

    def _watch(self) -> None:
        import torch

        while not self._ended.wait(0.05):
            self.most = max(self.most, self._before - torch.cuda.mem_get_info()[0])


def serving(about: About) -> Iterator[Row]:
    """The engine alone, and over HTTP beside FastAPI with a pipeline, which runs in this very environment."""
    import inference

    store = Path(about.work, "models")
    checkpoint = store / "versions" / (store / "champion").read_text(encoding="utf-8").strip()
    texts = made_up.read_texts(made_up.find_test(Path(about.work, "data", "sst2")), 30 if about.quick else 200)
    seconds, connections = (2, (1, 8, 32)) if about.quick else (3, (1, 32, 256))
    about_engine = {"checkpoint": str(checkpoint), "texts": {"short": texts}, "body": 0, "flops": 1.0, "seconds": 1}
    for one in asyncio.run(inference.engine_alone(**about_engine)):
        measured = f"{one['texts_per_s']:.0f} texts/s, {one['tokens_per_s']:.0f} tokens/s"
        yield row(f"engine alone, {one['at_once']} texts in one call", measured, **one)
    reference = inference.reference(checkpoint=str(checkpoint), texts={"short": texts})["short"]
    pipeline = replace(
        CONTENDERS["fastapi-pipeline"],
        command=(sys.executable, "-m", "uvicorn", "fastapi_pipeline:app", "--port", "{port}"),
    )
    ours = replace(CONTENDERS[OURS], command=(sys.executable, "run.py", "serve"))
    place = {"store": store, "checkpoint": checkpoint, "folder": Path(about.work)}
    found: dict[str, dict[int, Row]] = {}
    for contender in (ours, pipeline):
        device = {"DEVICE": about.device, "DATA_PATH": str(Path(about.work, "cache"))}
        with Server(contender, **place, base=dict(os.environ) | device) as server:
            ready_s = server.wait_until_right(texts, reference)
            seen = load.examine(contender, server.port, texts, reference, reference)
            measured = f"{seen['agreement']:.1%} of {len(texts)}, ready after {ready_s:.1f} s"
            held = seen["agreement"] >= 0.98 if contender is ours else None
            yield row(f"labels as in fp32, {contender.name}", measured, "98%" if contender is ours else "", held)
            bodies = load.write_bodies(contender, texts, Path(about.work, f"{contender.name}.jsonl"))
            press = load.press if load.has_wrk() else load.press_without_wrk
            found[contender.name] = {
                count: press(contender, server.port, bodies, connections=count, seconds=seconds)
                for count in connections
            }
    client = "wrk" if load.has_wrk() else "a Python client, for want of wrk"
    for count in connections:
        mine, other = found[OURS][count], found[pipeline.name][count]
        ratio = f"{mine['requests_per_s'] / other['requests_per_s']:.1f} times" if other["requests_per_s"] else ""
        measured = f"{describe_load(mine)}; FastAPI with a pipeline {describe_load(other)}: {ratio}; {client}"
        well = mine["errors"] == 0 and mine["requests_per_s"] > 0
        yield row(f"HTTP, {count} connection(s)", measured, "answers, no errors", well, ours=mine, other=other)


def describe_load(figures: Row) -> str:
    late = "-" if figures["p99_ms"] is None else f"{figures['p99_ms']:.1f} ms"
    return f"{figures['requests_per_s']:.0f} requests/s, p99 {late}, {figures['errors']} errors"


def writing(about: About) -> Iterator[Row]:
    """Generated text and summaries by models of random weights, over HTTP."""
    import generate

    generate.CACHE = Path(about.work, "writing")
    small = {
        "text": {"vocab_size": 3000, "n_layer": 2, "n_embd": 128, "n_head": 2},
        "summary": {
            "vocab_size": 3000,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "d_model": 64,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
        },
    }
    shapes = {"text": "GPT-2", "summary": "distilbart-cnn-12-6"}
    for kind, shape in shapes.items():
        changed = small[kind] if about.quick else {}
        checkpoint = generate.make_checkpoint(kind, generate.CACHE / f"checkpoint-{kind}", **changed)
        texts = generate.make_texts(kind, checkpoint)
        seconds = 1 if about.quick else 4
        options = argparse.Namespace(device=about.device, connections=[1, 8], seconds=seconds)
        ours = replace(generate.contenders(kind)[OURS], command=(sys.executable, "run.py", "serve"))
        for one in generate.measure(kind, ours, checkpoint, texts, options):
            measured = f"{one['tokens_per_s']:.0f} tokens/s"
            cut = ", made small" if about.quick else ""
            what = f"{kind}, {one['connections']} connection(s), {shape}'s shape{cut}, random weights"
            yield row(what, measured, **one)


def training(about: About) -> Iterator[Row]:
    """The job, Trainer and Trainer tuned, each a process of its own, by turns of base models and texts."""
    import train

    from tuneserve.hardware import choose_device, choose_precision

    precision = choose_precision("auto", choose_device(about.device)[0])
    quick = ["--quick"] if about.quick else ["--num-train-imdb", "2000"]
    given = ["--device", about.device, "--seeds", "1", "--no-compile", "--data", str(Path(about.work, "data")), *quick]
    options = train.parse(given)
    bench = train.Bench(options, dict(os.environ), Path(about.work))
    bases = read_bases(about)
    pairs = [("MiniLM", "sst2"), ("BERT-base", "imdb")] if about.quick else [(n, k) for k in NAMES for n in bases]
    for name, kind in pairs:
        base = bases[name] | {"body": 0, "flops": 1.0, "precision": precision}
        what = f"training, {base['shown']} on {NAMES[kind]}"
        try:
            runs = {run["contender"]: run for run in bench.compete(kind, base)["runs"]}
        except SystemExit as error:
            yield row(what, last_line(str(error)), "runs", only_on_gpu(about, holds=False))
            continue
        ours = runs[train.JOB]
        for other, wanted in (("trainer", BY_DEFAULT), ("trainer-tuned", BY_TUNED)):
            ratio = ours["texts_per_s"] / runs[other]["texts_per_s"]
            measured = f"{ratio:.2f} times ({ours['texts_per_s']:.0f} by {runs[other]['texts_per_s']:.0f} texts/s)"
            holds = only_on_gpu(about, ratio >= wanted)
            yield row(
                f"{what}, by {other}", measured, f"at least {wanted:g} times", holds, ours=ours, other=runs[other]
            )
        padding = ours["padding_share"]
        measured = "-" if padding is None else f"{padding:.1%}"
        holds = padding is not None and padding < MOST_PADDING
        yield row(f"{what}, padding", measured, f"under {MOST_PADDING:.0%}", holds)


def read_bases(about: About) -> dict[str, dict[str, Any]]:
    """What `materials` left.

    Raises:
        BenchError: it did not come so far.
    """
    try:
        bases: dict[str, dict[str, Any]] = json.loads(Path(about.work, "bases", "bases.json").read_text())
    except OSError as error:
        raise BenchError("there are no base models: the section `materials` did not make them") from error
    return bases


def environment(about: About) -> dict[str, str]:
    """The job's variables."""
    work = Path(about.work)
    return {
        "MODEL_PATH": str(work / "models"),
        "DATA_PATH": str(work / "cache"),
        "LOG_PATH": str(work / "logs"),
        "DATASET": str(work / "growing"),
        "NUM_TRAIN": "80" if about.quick else "3000",
        "NUM_TEST": "30" if about.quick else "500",
        "N_EPOCHS": "1",
        "BASE_MODEL": read_bases(about)["MiniLM"]["folder"],
        "DEVICE": about.device,
        "REPORT": "0",
        "PROCESSES": "1",
    }


def run_job(verb: str, variables: dict[str, str]) -> None:
    """`run.py` to its end.

    Raises:
        BenchError: it failed.
    """
    command = [sys.executable, str(PRODUCTION / "run.py"), verb]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"run.py {verb} ended with {done.returncode}: {last_line(done.stderr or done.stdout)}")


SECTIONS = {
    one.__name__: one for one in (machine, materials, tests, packed, memory, beside, serving, writing, training)
}

if __name__ == "__main__":
    name, told = sys.argv[1:]
    out = sys.stdout
    with redirect_stdout(sys.stderr):  # whatever the libraries print
        for one in SECTIONS[name](About(**json.loads(told))):
            print(json.dumps(one, default=str), file=out, flush=True)
