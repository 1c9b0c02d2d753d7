"""What benchmarks/train.py compares: `contenders.py JSON`, one training in a process of its own, prints one line.

The JSON is a `Run`. `tuneserve` is this job, called as its users call it; the others are transformers.Trainer.
"""

import csv
import json
import os
import resource
import runpy
import sys
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRODUCTION = Path(__file__).resolve().parents[1] / "production" / "docker-res"
sys.path.insert(0, str(PRODUCTION))

from tuneserve.hardware import choose_precision, set_threads

THREADS = set_threads("auto")  # the same number, and the same patience of idle ones, for every contender

import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

GROUPED = {"train_sampling_strategy": "group_by_length"}
TRAINERS = {
    "trainer": {},
    "trainer-tuned": GROUPED,
    "trainer-tuned-compiled": GROUPED | {"torch_compile": True},
}
"""What is not Trainer's default, beside batch, epochs and learning rate; see also `trainer_settings`."""


@dataclass(frozen=True)
class Run:
    """One training: `texts` is a folder of train.csv, valid.csv and test.csv; `folder` is the run's own, and empty."""

    contender: str
    texts: str
    base_model: str
    train_body: bool
    seed: int
    epochs: int
    batch_size: int
    learning_rate: float
    max_tokens: int
    device: str
    folder: str


def train(run: Run) -> dict[str, Any]:
    """One training from its texts to its test.

    Returns:
        `texts`, as many as the epochs asked for hold; `fit_s`, the seconds that learning them took, and `texts_per_s`;
        `tokens_per_s` that went through the model, padding not counted; `padding_share` of all positions that did, or
        None; `test_accuracy`; `precision`.
    """
    return train_with_trainer(run) if run.contender in TRAINERS else train_with_job(run)


def train_with_job(run: Run) -> dict[str, Any]:
    """`run.py train` with an environment; the figures are in the metadata of the version that it saves."""
    models = Path(run.folder, "models")
    os.environ |= {
        "DATASET": run.texts,
        "NUM_TRAIN": "0",  # all that were written
        "NUM_MAX_POSITIONS": str(run.max_tokens),
        "BASE_MODEL": run.base_model,
        "TRAIN_BODY": str(int(run.train_body)),
        "N_EPOCHS": str(run.epochs),
        "MIN_STEPS": "0",
        "BATCH_SIZE": str(run.batch_size),
        "LR": str(run.learning_rate),
        "SEED": str(run.seed),
        "DEVICE": run.device,
        "PROCESSES": "1",
        "MODEL_PATH": str(models),
        "DATA_PATH": str(Path(run.folder, "data")),
        "LOG_PATH": str(Path(run.folder, "logs")),
    }
    sys.argv = ["run.py", "train"]
    try:
        runpy.run_path(str(PRODUCTION / "run.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    champion = (models / "champion").read_text(encoding="utf-8").strip()
    metadata = json.loads((models / "versions" / champion / "metadata.json").read_text(encoding="utf-8"))
    texts = run.epochs * sum(metadata["data"]["counts"]["train"].values())
    return {
        "texts": texts,
        "fit_s": metadata["fit_s"],
        "texts_per_s": texts / metadata["fit_s"],
        "tokens_per_s": metadata["tokens_per_s"],
        "padding_share": metadata.get("padding_share"),
        "test_accuracy": metadata["metrics"]["test"]["accuracy"],
        "precision": metadata["precision"],
    }


def train_with_trainer(run: Run) -> dict[str, Any]:
    """Trainer, its texts tokenized before the clock starts; it saves nothing, and stops for no validation."""
    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(run.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.base_model)
    rows = {name: read_rows(Path(run.texts, f"{name}.csv")) for name in ("train", "test")}
    labels = sorted({label for _, label in rows["train"]})
    tokens = {name: tokenize(tokenizer, some, labels, run.max_tokens) for name, some in rows.items()}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        run.base_model, num_labels=len(labels), dtype=torch.float32
    )
    if not run.train_body:
        freeze_body(model)

    pad = transformers.DataCollatorWithPadding(tokenizer)
    positions: Counter[str] = Counter()

    def collate(features: list[dict[str, Any]]) -> Any:
        batch = pad(features)
        positions["fed"] += batch["input_ids"].numel()
        positions["real"] += int(batch["attention_mask"].sum())
        return batch

    settings = trainer_settings(run.contender, run.device)
    arguments = transformers.TrainingArguments(
        output_dir=run.folder,
        num_train_epochs=run.epochs,
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=run.batch_size,
        learning_rate=run.learning_rate,
        seed=run.seed,
        use_cpu=run.device == "cpu",
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    trainer = transformers.Trainer(
        model, arguments, data_collator=collate, train_dataset=tokens["train"], processing_class=tokenizer
    )
    clock = Clock(run.device)
    trainer.add_callback(clock)
    began = clock.read_s()
    trainer.train()
    ended = clock.read_s()
    speed_s = (arguments.torch_compile and clock.settled_s()) or ended - began
    texts = run.epochs * len(tokens["train"])
    real, fed = positions["real"], positions["fed"]  # the test is padded by the same hands
    answers = trainer.predict(tokens["test"])
    return {
        "texts": texts,
        "fit_s": ended - began,
        "texts_per_s": texts / speed_s,
        "tokens_per_s": real / speed_s,
        "padding_share": 1 - real / fed,
        "test_accuracy": float((answers.predictions.argmax(axis=-1) == answers.label_ids).mean()),
        "precision": "bf16" if settings.get("bf16") else "fp32",
    }


def trainer_settings(contender: str, device: str) -> dict[str, Any]:
    """What this Trainer is told; a tuned one computes in bf16 where the device does, for emulated it is the slower."""
    settings: dict[str, Any] = TRAINERS[contender]
    native = choose_precision("auto", torch.device(device)) == "bf16"
    return settings | {"bf16": True} if settings and native else settings


class Clock(transformers.TrainerCallback):
    """Seconds, read when the device has done all that was asked of it.

    While it is among a Trainer's callbacks it notes when half of the steps are done, and when all but the last: before
    and after, every new shape makes torch.compile compile anew, the last batch being short.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.steps = 0
        self.notes: dict[int, float] = {}

    def read_s(self) -> float:
        """Now."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_end(self, args: Any, state: transformers.TrainerState, control: Any, **_: Any) -> None:
        """Note the time where it is wanted."""
        self.steps = state.max_steps
        if state.global_step in (self.steps // 2, self.steps - 1):
            self.notes[state.global_step] = self.read_s()

    def settled_s(self) -> float:
        """What all steps would take at the pace of those between the two notes; 0 if there were too few to tell."""
        if len(self.notes) < 2:
            return 0.0
        (half, half_s), (last, last_s) = self.notes.items()
        return (last_s - half_s) / (last - half) * self.steps


def read_rows(path: Path) -> list[tuple[str, str]]:
    """Texts and their labels."""
    with path.open(newline="", encoding="utf-8") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


def tokenize(
    tokenizer: PreTrainedTokenizerBase, rows: list[tuple[str, str]], labels: list[str], max_tokens: int
) -> Dataset:
    """Texts as token ids, and with their lengths, which spares a Trainer that groups by them the counting."""
    columns = dict(tokenizer([text for text, _ in rows], truncation=True, max_length=max_tokens))
    lengths = [len(ids) for ids in columns["input_ids"]]
    return Dataset.from_dict(columns | {"length": lengths, "labels": [labels.index(label) for _, label in rows]})


def freeze_body(model: PreTrainedModel) -> None:
    """Leave pooler and classifier to train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "pooler" in name or "classifier" in name


def measure_peak_bytes(device: str) -> int:
    """The most memory that the process held at once: what torch allocated on the GPU, or resident (KiB on Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    run = Run(**json.loads(sys.argv[1]))
    with redirect_stdout(sys.stderr):  # whatever the libraries and the job print
        figures = train(run)
    print(json.dumps(figures | {"peak_bytes": measure_peak_bytes(run.device)}))
