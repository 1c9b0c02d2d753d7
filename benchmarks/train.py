"""Training side by side: the job and Hugging Face Trainer on the same texts, base model, batch, epochs, learning rate.

    make bench-train                                  SST-2, IMDB and a frozen body, on the CPU: an hour on two cores
    make bench-train ARGS="--device cuda"             on a GPU: MiniLM and BERT-base
    make bench-train ARGS="--quick --tasks sst2"      whether it runs: a minute

Contenders: `tuneserve`, `run.py train` with its defaults; `trainer`, transformers.Trainer with its defaults (fp32,
random order, the model's dropout); `trainer-tuned`, Trainer with texts grouped by length, in bf16 where the device
computes in it (emulated, bf16 is slower than fp32); `trainer-tuned-compiled`, the same with torch.compile. Each
training is a process of its own, with the same threads; one of each contender makes a round, a round has one seed,
each round begins with another.

texts/s        texts of the epochs asked for, by the seconds of `fit`; where it compiles, at the pace of its second half
tokens/s       tokens that went through the model, padding left out, by the same seconds (with a frozen body the job
               sends each text through it once, then trains the head alone until it no longer improves)
of bf16 rate   the share of the measured rate of bf16 products (of square matrices, 2,048 on a CPU, 8,192 on a GPU) that
               these tokens need; on a device without bf16 the title says fp32, and the rate is that of fp32 products.
               6 operations a token for every weight outside embeddings, pooler and classifier, 2 where the body is
               frozen; the products inside attention, which have no weights, are left out
padding        padding among the positions that the model was fed
fit            seconds of Trainer.train(), its texts tokenized before, without validation and saving; of the job its
               `fit_s`, which is the same
process        seconds of the whole process: imports, tokens, training, test; of the job also checks, validation,
               calibration, saving, and loading what was saved
peak memory    resident, of the process; on a GPU what torch allocated there
test accuracy  on the same test texts, in the precision of the training

Cells are mean ± standard deviation over the seeds; ratios are taken within a round, and their median is shown with the
lowest and the highest.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCHMARKS.parent / "production" / "docker-res"))

from tables import compare, tabulate

from tuneserve.settings import Settings

MINILM, BERT = "sentence-transformers/all-MiniLM-L6-v2", "google-bert/bert-base-uncased"
JOB, COMPILED = "tuneserve", "trainer-tuned-compiled"
CONTENDERS = [JOB, "trainer", "trainer-tuned", COMPILED]
QUICK_TEXTS = 96


@dataclass(frozen=True)
class Task:
    """Which texts, and what is trained on them."""

    texts: str
    train_body: bool = True
    epochs: int | None = None


TASKS = {"sst2": Task("sst2"), "imdb": Task("imdb"), "head": Task("sst2", train_body=False, epochs=5)}


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    environment = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
    if options.device == "cuda":
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would take all, and a larger batch with them
    record: dict[str, Any] = {"options": vars(options), "results": []}
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(options, environment, Path(temporary))
        for name in options.base_model:
            base = bench.survey(name)
            print(f"# {name}{'' if base['pretrained'] else ', its weights drawn by chance'}\n", flush=True)
            print(f"{describe_machine(base)}\n", flush=True)
            for task in options.tasks:
                result = bench.compete(task, base)
                record["results"].append({"base_model": name, "task": task, "base": base, **result})
                if options.output:
                    options.output.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
                print(f"\n## {task}\n\n{describe(result, options)}\n")
                print(f"{tabulate(result['runs'], CONTENDERS, base['precision'])}\n")
                print(f"{compare(result['runs'], CONTENDERS)}\n", flush=True)
    if not options.compile:
        print(f"{COMPILED} was left out, since compiling takes minutes on a CPU: --compile takes it in.")


class Bench:
    """The options, and what several tasks share: texts and environment."""

    def __init__(self, options: argparse.Namespace, environment: dict[str, str], temporary: Path) -> None:
        self.options, self.environment, self.temporary = options, environment, temporary
        self.prepared: dict[str, dict[str, int]] = {}

    def survey(self, name: str) -> dict[str, Any]:
        """Find a base model and measure the machine."""
        folder = str(self.temporary / "random-bert")
        return self._run("conditions.py", "survey", name=name, folder=folder, device=self.options.device)

    def compete(self, name: str, base: dict[str, Any]) -> dict[str, Any]:
        """All rounds of a task."""
        task, options = TASKS[name], self.options
        folder = self.temporary / task.texts
        if task.texts not in self.prepared:
            wanted = {"num_train": getattr(options, f"num_train_{task.texts}"), "num_test": options.num_test}
            about = {"texts": task.texts, "data": str(options.data), "folder": str(folder)}
            self.prepared[task.texts] = self._run("conditions.py", "prepare", **about, **wanted)
        contenders = CONTENDERS if options.compile else [one for one in CONTENDERS if one != COMPILED]
        epochs = task.epochs or options.epochs
        runs = []
        for seed in range(options.seeds):
            turn = seed % len(contenders)
            for contender in contenders[turn:] + contenders[:turn]:
                runs.append(self._train(contender, seed, epochs, task, folder, base))
                print(f"{name}, seed {seed}, {contender}: {runs[-1]['process_s']:.0f} s", file=sys.stderr, flush=True)
        return {"texts": self.prepared[task.texts], "epochs": epochs, "runs": runs}

    def _train(
        self, contender: str, seed: int, epochs: int, task: Task, texts: Path, base: dict[str, Any]
    ) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=self.temporary) as folder:
            began = time.perf_counter()
            figures = self._run(
                "contenders.py",
                contender=contender,
                texts=str(texts),
                base_model=base["folder"],
                train_body=task.train_body,
                seed=seed,
                epochs=epochs,
                batch_size=self.options.batch_size,
                learning_rate=self.options.lr,
                max_tokens=self.options.max_tokens,
                device=self.options.device,
                folder=folder,
            )
            process_s = time.perf_counter() - began
        if not base["pretrained"]:
            figures["test_accuracy"] = None
        operations = (6 if task.train_body else 2) * base["body"]
        return {
            "contender": contender,
            "seed": seed,
            **figures,
            "rate_share": figures["tokens_per_s"] * operations / base["flops"],
            "process_s": process_s,
        }

    def _run(self, program: str, *verb: str, **values: Any) -> dict[str, Any]:
        command = [sys.executable, str(BENCHMARKS / program), *verb, json.dumps(values)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-4000:]}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


def describe_machine(base: dict[str, Any]) -> str:
    """The base model's size, and what was measured of the machine."""
    rates = ", ".join(f"{flops / 1e12:.2f} TFLOP/s in {kind}" for kind, flops in base["rates"].items())
    return f"{base['body'] / 1e6:.1f}M weights in the body; products: {rates}; it computes in {base['precision']}."


def describe(result: dict[str, Any], options: argparse.Namespace) -> str:
    """What was asked of every contender."""
    texts = result["texts"]
    return (
        f"{texts['train']} training texts, {result['epochs']} epoch(s), batch {options.batch_size}, LR {options.lr:g}, "
        f"{options.max_tokens} tokens; {texts['test']} test texts; {options.seeds} seed(s)."
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, with the defaults that depend on others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data/bench"),
        help="folder with sst2/ and imdb/, each with train.csv (columns text and label) and perhaps valid.csv (or "
        "dev.csv) and test.csv; what is not there comes from the Hugging Face hub (default: %(default)s)",
    )
    parser.add_argument("--tasks", type=_tasks, default=list(TASKS), help="some of sst2,imdb,head (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="rounds (default: %(default)s)")
    for texts, count in (("sst2", 7000), ("imdb", 1000)):
        parser.add_argument(
            f"--num-train-{texts}",
            type=int,
            default=count,
            help="texts to draw for training and validation; 0: all (default: %(default)s)",
        )
    parser.add_argument("--num-test", type=int, default=1000, help="test texts to draw; 0: all (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=1, help="of sst2 and imdb; head has 5 (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate of all (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="where texts are cut (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--base-model",
        type=lambda names: names.split(","),
        help=f"folders or hub names, with commas between (default: {MINILM}; on a GPU also {BERT}, with weights drawn "
        "by chance if the hub is out of reach)",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help=f"run {COMPILED} too (default: on a GPU only)",
    )
    parser.add_argument("--quick", action="store_true", help=f"one seed and {QUICK_TEXTS} texts: only whether it runs")
    parser.add_argument("--output", type=Path, help="file for all runs as JSON, written after each task")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    options.base_model = options.base_model or ([MINILM, BERT] if on_gpu else [MINILM])
    options.compile = on_gpu if options.compile is None else options.compile
    if options.quick:
        options.seeds, options.num_test = 1, QUICK_TEXTS
        options.num_train_sst2 = options.num_train_imdb = QUICK_TEXTS
    return options


def _tasks(names: str) -> list[str]:
    chosen = names.split(",")
    if unknown := set(chosen) - set(TASKS):
        raise argparse.ArgumentTypeError(f"there is no task {', '.join(sorted(unknown))}; use {', '.join(TASKS)}")
    return chosen


if __name__ == "__main__":
    main(sys.argv[1:])
