"""Every variable of the job, declared once: type, default, bounds, meaning. Nothing else reads the environment.

`settings_docs.py` renders `config.env` and the table of variables in `docs/configuration.md` from this module, which is
long because the sentences about all variables are here.
"""

import difflib
import re
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from zoneinfo import ZoneInfo

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
)

from tuneserve.errors import SettingsError
from tuneserve.redaction import redact_url
from tuneserve.text import has_surrogates

PROJECT = Path(__file__).resolve().parents[3]
"""The folder that holds `production/`: the clone's root, and `/` in the image."""

SAMPLE = "sample"
"""The value of DATASET that means the embedded reviews."""


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _bytes(value: Any) -> Any:
    """Of memory, as Docker (`2G`), Kubernetes (`2Gi`) and people (`2 GiB`, `2GB`) write them."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?) ?(?:([KMGT])(i?B?))?", str(value).strip())
    if found is None:
        return value
    power = "KMGT".index(found[2]) + 1 if found[2] else 0
    return int(float(found[1]) * (1000 if found[3] == "B" else 1024) ** power)


ROUTE = r"^(/[\w.~:@/-]*)?$"
"""A path of ours without escapes."""

WORDS = {
    "model_name": "letters, digits, `.`, `_` and `-`",
    "aip_health_route": "a path (`/health`)",
    "aip_predict_route": "a path (`/predict`)",
    "serverless_route": "a path (`/log`)",
    "memory_limit": "bytes, or a number with a unit such as `GiB`",
    "cors_origins": "`*`, or origins as browsers name them (`https://reviews.example`), separated by commas",
    "retrain_schedule": "five fields as crontab has them",
    "retrain_time_zone": "the name of a time zone",
}
"""What a variable may hold where its type does not say it."""

QUOTED = re.compile(r"""(["'])((?:(?!\1).)*)\1""", re.DOTALL)
COMMENT = re.compile(r"\s#")
OF_LIBRARIES = re.compile(
    "(?:AWS|AZURE|GOOGLE|HF|HUGGING_FACE|MLFLOW|OTEL|PET|SAGEMAKER|TUNESERVE)_.*|(?:HTTPS?|ALL|NO)_PROXY|JOB_COMPLETION_INDEX",
    re.IGNORECASE,
)
"""Variables that are read elsewhere; in their values a `#` is theirs to judge."""

Fraction = Annotated[float, Field(gt=0, le=0.5)]
Folder = Annotated[Path, AfterValidator(_absolute)]


class Settings(BaseModel):
    """The resolved configuration of one run. Immutable; saved with every model, without its secrets."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    platform: Literal["none", "sagemaker"] = "none"
    """Whose folders, files and variables `train` and `serve` go by: `sagemaker` is what an image of that stage sets;
    `none`: these variables alone."""

    task: Literal["text-classification", "feature-extraction", "summarization", "text-generation"] = (
        "text-classification"
    )
    """What the model does, by Hugging Face's name. Classifiers are trained here; others are served as MODEL is, or from
    a store into which `import` has put them."""

    model: str = ""
    """A model that `serve` answers with instead of the champion: a Hugging Face folder, or a name on the hub."""

    model_revision: str = ""
    """Commit, tag or branch of MODEL on the hub. Empty: the newest; the commit taken is recorded."""

    models: str = ""
    """A folder whose subfolders are models that `serve` loads on first use, by their names. Empty: one model."""

    memory_limit: Annotated[int, Field(ge=0), BeforeValidator(_bytes)] = 0
    """Memory that a server of many models may take with its children (`6GiB`): for one model more it unloads those that
    were not used for longest. 0: what the container may take."""

    pinned_models: str = ""
    """Models in MODELS that are loaded at the start and not unloaded for others, separated by commas."""

    dataset: str = Field(default=SAMPLE, min_length=1)
    """Labelled texts: `sample` (the embedded reviews), a CSV, TSV, JSON, JSONL, Parquet or Arrow file, perhaps
    compressed (`.gz`, `.bz2`, `.xz`, `.zst`), a folder with `train.*` and optionally `valid.*` and `test.*`, a URL such
    as `s3://bucket/reviews.csv`, or a name on the Hugging Face hub (`owner/name` or `owner/name:configuration`)."""

    text_column: str = ""
    """Column that holds the text. Empty: found by its name, or refused when several could be meant."""

    label_column: str = ""
    """Column that holds the label. Empty: found by its name, or refused when several could be meant."""

    labels: Literal["as-is", "merge"] = "as-is"
    """Labels that differ only in case, spaces, Unicode form or number format (`Positive`, `positive`): `merge` joins
    them under the name that most training texts have; `as-is` keeps them apart and names them in the log."""

    min_class_size: int = Field(default=2, ge=2)
    """Fewest usable training texts of a label; one with fewer is rare."""

    rare_labels: Literal["refuse", "drop", "other"] = "refuse"
    """Rare labels: refuse the data, drop the texts of these labels, or join them as the label `other`."""

    label_issues: Literal["report", "drop", "off"] = "report"
    """Labels that are probably wrong, in training, validation and test texts: `report` lists them, `drop` also leaves
    such training texts out, `off` does not look for them."""

    num_train: int = Field(default=0, ge=0)
    """Training texts to use, drawn by SEED. 0: all."""

    num_test: int = Field(default=0, ge=0)
    """Test texts to use, drawn by SEED. 0: all."""

    valid_pct: Fraction = 0.1
    """Share of the training texts held out for validation when the data bring no `valid.*` (0.1 is 10%)."""

    min_valid: int = Field(default=100, ge=0)
    """Fewest validation texts, for up to 20 labels; more labels want more in proportion. Where VALID_PCT would hold out
    fewer, none is: the job learns from all texts, and cross-validation chooses how long and calibrates. 0: they are
    held out, however few."""

    test_pct: Fraction = 0.1
    """Share of the texts held out for the test when the data bring no `test.*` (0.1 is 10%)."""

    base_model: str = Field(default="sentence-transformers/all-MiniLM-L6-v2", min_length=1)
    """Encoder to fine-tune: a local folder or a name on the Hugging Face hub. The default needs no network."""

    base_model_revision: str = ""
    """Commit, tag or branch of the base model on the hub. Empty: the newest; the commit taken is recorded."""

    num_max_positions: int = Field(default=256, ge=8)
    """Tokens read of each text; longer texts are cut there, and every answer says whether its text was."""

    train_body: bool = True
    """Train the whole network (1), or only what follows the body's last hidden state (0)."""

    n_epochs: int = Field(default=3, ge=1)
    """Passes over the training texts."""

    min_steps: int = Field(default=60, ge=0)
    """Fewest optimizer steps: few texts are passed over more often than N_EPOCHS says, until there are so many."""

    batch_size: int = Field(default=32, ge=1)
    """Texts per optimizer step."""

    lr: float = Field(default=1e-4, gt=0, le=1)
    """Peak learning rate: reached after the warm-up, then falling linearly to zero."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout inside the network while training."""

    max_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""

    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs each class by the inverse of its share, for skewed data."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each text's weight that is spread over all labels, for labels that are not always right."""

    patience: int = Field(default=0, ge=0)
    """Epochs without a better validation after which training ends. 0: never. The best epoch is kept either way."""

    select_by: Literal["macro_f1", "accuracy", "loss"] = "macro_f1"
    """Validation metric that chooses the best epoch; of equally good epochs the one with the lower loss is taken."""

    max_error: float = Field(default=0, ge=0, lt=1)
    """Share of the answers that may be wrong (0.02 is 2%): the validation texts show with 95% certainty how confident
    an answer must be for that, and a less confident one says `"abstain": true`. 0: none does."""

    seed: int = Field(default=1337, ge=0, lt=2**32)
    """Seed of every random choice: splits, order, new weights, dropout."""

    checkpoint_minutes: float = Field(default=10, gt=0)
    """Minutes between checkpoints within an epoch; each epoch ends with one anyway."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. `cuda` fails at once when no GPU can be used; `auto` takes one if it can and says so."""

    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Number format of matrix products. `auto`: bf16 where the device computes in it, else fp32. Weights stay fp32.
    `int8`: as `auto`, but on a CPU an int8 graph answers if it costs less than 0.3 points of validation accuracy; a
    training that is to make it needs requirements-int8.txt."""

    omp_num_threads: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    """CPU threads. `auto`: as many as the container's CPU quota (`--cpus`) and affinity grant."""

    processes: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    """Processes that train together on this machine. `auto`: one for each GPU; on a CPU one. Several machines are
    joined by the `PET_*` variables of torchrun."""

    model_path: Folder = PROJECT / "models"
    """The model store: `versions/`, `checkpoints/` and the `champion` pointer. Keep it on a volume."""

    data_path: Folder = PROJECT / "data"
    """Downloads and prepared texts: a cache that may be deleted at any time."""

    log_path: Folder = PROJECT / "logs"
    """Folder of the log file, which repeats what is printed, and of TensorBoard's event files (in `tensorboard/`)."""

    mlflow_tracking_uri: SecretStr = SecretStr("")
    """MLflow server that is told of every training: `http://host:5000`. Wants the trackers to be installed."""

    mlflow_experiment_name: str = Field(default="tuneserve", min_length=1)
    """MLflow experiment of the runs; its last part is the name that their models are registered under."""

    host: str = Field(default="0.0.0.0", min_length=1)
    """Address to listen on."""

    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""

    model_name: str = Field(default="model", pattern=r"^[\w.-]{1,200}$")
    """Name by which clients of the Open Inference Protocol (KServe, Triton, MLServer) ask for the model. KServe's
    `{{.Name}}` is it there."""

    inference_reply: Literal["full", "ancestor"] = "full"
    """What `POST /inference` answers. `ancestor`: each label with its probability as a string, and nothing else."""

    serverless_route: str = Field(default="", pattern=ROUTE)
    """Path at which `{"log"}` is answered `{"prediction"}`, as the serverless classifier did that this project grew
    from: `/log`. Empty: there is none."""

    aip_http_port: int = Field(default=0, ge=0, le=65535)
    """Port on which Vertex AI, which sets it, asks; it replaces PORT. 0: PORT holds."""

    aip_health_route: str = Field(default="", pattern=ROUTE)
    """Path of the health route that Vertex AI asks, which sets it. Empty: there is none."""

    aip_predict_route: str = Field(default="", pattern=ROUTE)
    """Path to which Vertex AI posts `{"instances"}`, which sets it. Empty: there is none."""

    api_key: SecretStr = SecretStr("")
    """When set, requests want it as `Authorization: Bearer …` or `X-API-Key`."""

    api_key_guards: Literal["api", "everything"] = "api"
    """What wants the API key: everything but health, metrics and the documentation, or really everything."""

    max_body_kb: int = Field(default=1024, ge=1)
    """Largest request body taken, in KiB; beyond it: 413."""

    cors_origins: str = ""
    """Origins whose pages may ask this server from a browser, separated by commas: `https://reviews.example`; `*` for
    every page. Empty: none."""

    max_batch_texts: int = Field(default=4096, ge=1)
    """Texts of one request to `/inference/batch`; beyond it: 413."""

    long_text: Literal["truncate", "error", "window"] = "truncate"
    """Texts longer than NUM_MAX_POSITIONS: read up to there, refuse (422), or read in overlapping windows whose
    probabilities are averaged, up to 512 characters for each of the NUM_MAX_POSITIONS."""

    max_batch_tokens: int = Field(default=0, ge=0)
    """Tokens that the engine takes at once. 0: 1024 on a CPU, 16384 on a GPU."""

    max_queue_tokens: int = Field(default=32768, ge=1)
    """Tokens that may wait for the engine; beyond it: 429 with the seconds until there is room in Retry-After."""

    max_new_tokens: int = Field(default=1024, ge=1)
    """Tokens that a request to a model that writes may ask for."""

    num_beams: Annotated[int, Field(ge=1, le=8)] | Literal["auto"] = "auto"
    """Beams of a text that is written, where its request does not say. `auto`: 3 for summaries, else 1."""

    no_repeat_ngram_size: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Tokens in a row that are not written twice, where a request does not say; 0: any. `auto`: 3 for summaries, else
    0."""

    early_stopping: bool = True
    """End a beam search once as many texts have ended as there are beams, where a request does not say."""

    request_timeout_s: float = Field(default=30, gt=0)
    """Seconds after which a request is given up (504) if its client has not said less in `X-Request-Timeout-S`."""

    log_format: Literal["plain", "json"] = "plain"
    """How lines are logged: for people, or one JSON object each."""

    access_log: bool = False
    """Log every request: route, status, milliseconds and id, never the text."""

    min_accuracy: float = Field(default=0, ge=0, le=1)
    """Gate: share of its test texts that a new version must have right to be served."""

    min_recall: float = Field(default=0, ge=0, le=1)
    """Gate: share of the test texts of each label that a new version must have right."""

    max_accuracy_drop: float = Field(default=0.02, ge=0, le=1)
    """Gate: how much worse than the champion a new version may be on the same test texts, with 95% confidence (0.02 is
    two points). Few test texts leave much to chance, and then only a better version passes."""

    max_latency_increase: float = Field(default=0.5, ge=0)
    """Gate: how much larger and slower than the champion a new version may be (0.5 is half as much again)."""

    report: bool = True
    """Write a report into each version's `report/`; it holds some of the test's texts, and all texts whose labels are
    probably wrong."""

    keep_versions: int = Field(default=10, ge=2)
    """Versions that the store keeps; the champion and the one before it always stay."""

    use_feedback: bool = True
    """Train also on the texts that `POST /feedback` has labelled with the API key; a share of TEST_PCT is held out, and
    the gate judges by it too."""

    keep_texts: bool = False
    """Keep the texts of requests beside their answers, so that a label that names a request teaches something."""

    feedback_max_rows: int = Field(default=1_000_000, ge=1)
    """Answers, and labels of each origin, that are kept for feedback; the oldest go."""

    feedback_max_mb: int = Field(default=1024, ge=1)
    """Size of the feedback database, in MiB; the oldest rows go, answers and anonymous labels first."""

    retrain_schedule: str = ""
    """When `train-serve` trains again, as cron writes it: minute, hour, day, month, weekday (`0 3 * * 1` is Mondays at
    three). Empty: never. What a stopped container missed is caught up once."""

    retrain_time_zone: str = "UTC"
    """Time zone of RETRAIN_SCHEDULE, such as `Europe/Berlin`."""

    retrain_jitter_s: float = Field(default=0, ge=0)
    """Seconds by which a scheduled training is put off, at most, so that many containers do not start at once."""

    retrain_nice: Annotated[int, Field(ge=0, le=19)] | Literal["idle"] = "idle"
    """Niceness of a training beside a model that answers. `idle`: it computes only while a core has nothing else to do,
    gives way at once, and makes no progress while all cores are busy; with a number it may hold up an answer, but gets
    on faster: 10 gives it a tenth of a busy core, 19 a hundredth."""

    retrain_threads: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    """CPU threads of a training beside a model that answers. `auto`: half of them."""

    retrain_gpu_fraction: float = Field(default=0.5, gt=0, le=1)
    """Share of the GPU's memory that a training beside a model that answers may take."""

    drift_window: int = Field(default=500, ge=50, le=100_000)
    """Texts answered last by which `GET /drift` judges whether they are still like those the model was tested on."""

    drift_window_hours: float = Field(default=24, gt=0)
    """Hours after which a text no longer counts for that."""

    retrain_on_drift: bool = False
    """Retrain when the texts that are served are no longer like those that the model was tested on."""

    shadow_requests: int = Field(default=0, ge=0)
    """Texts of live traffic that a version which passed the gate answers beside the champion before it takes over.
    0: none."""

    otel_exporter_otlp_endpoint: str = ""
    """OpenTelemetry collector that is sent a span of every request: `http://collector:4318`. Wants the traces to be
    installed; the SDK's other `OTEL_*` variables hold too."""

    input: str = ""
    """What `predict` scores: a CSV, TSV, JSON, JSONL, Parquet or Arrow file, perhaps compressed (`.gz`, `.bz2`, `.xz`,
    `.zst`), a folder of files of one of these kinds, or the URL of either (`s3://bucket/reviews/`)."""

    output: str = ""
    """Where `predict` writes: a file, if the name ends as INPUT's files do (`.csv.gz` for `.csv.gz`), else a folder for
    parts; or its URL."""

    shard: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Which of SHARDS this process scores, from 0. `auto`: JOB_COMPLETION_INDEX, which Kubernetes sets, else 0."""

    shards: int = Field(default=1, ge=1)
    """Processes that score one INPUT together, each its share of the rows; with several, OUTPUT is a folder."""

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_origins(cls, value: str) -> str:
        origins = [origin.strip() for origin in value.split(",") if origin.strip()]
        if not all(origin == "*" or re.fullmatch(r"https?://[^/\s*?#@]+", origin) for origin in origins):
            raise ValueError("should be origins")
        return ",".join(origins)

    @field_validator("retrain_schedule")
    @classmethod
    def _schedule_is_crons(cls, value: str) -> str:
        if value:
            from cronsim import CronSim, CronSimError

            try:
                CronSim(value if len(value.split()) == 5 else "", datetime(2026, 1, 1, tzinfo=UTC))
            except CronSimError:
                raise ValueError("should be cron's five fields, of times that come") from None
        return value

    @field_validator("retrain_time_zone")
    @classmethod
    def _zone_is_known(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (KeyError, ValueError, OSError, RecursionError):  # the last for a name of thousands of slashes
            raise ValueError("should be an IANA time zone") from None
        return value

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> "Settings":
        """Read the settings from environment variables; an unset or empty one takes its default.

        Raises:
            SettingsError: naming every bad variable at once, its value and what would be right, and every
                unknown variable whose name is close to a known one. One pair of quotes around a value is taken off.
        """
        names = {field.upper(): field for field in cls.model_fields}
        read = {name: unquoted(value) for name, value in environ.items() if name in names}
        values = {names[name]: value for name, value in read.items() if value}
        if "task" not in values and (task := unquoted(environ.get("HF_TASK", ""))):
            values["task"] = task  # what SageMaker's users know it by
        problems = [
            f"  {name}: there is no such variable; did you mean {neighbour}? Rename it or unset it."
            for name in environ
            if name not in names and (neighbour := _neighbour(name, names))
        ]
        problems += [
            f"  {name}: ` #` in a value begins no comment in an environment file. Put a comment on a line of its own, "
            "and a value that holds ` #` in quotes."
            for name, value in environ.items()
            if name in names and COMMENT.search(value.strip()) and not QUOTED.fullmatch(value.strip())
        ]
        problems += [f"  {name.upper()} is not UTF-8 text." for name, value in values.items() if has_surrogates(value)]
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            bad = dict.fromkeys(str(item["loc"][0]) for item in error.errors())
            problems = [_describe(field, values[field]) for field in bad] + problems
        else:
            if settings.api_key_guards == "everything" and not settings.api_key.get_secret_value():
                problems.append("  API_KEY_GUARDS='everything' needs a key to guard with; set API_KEY.")
            if settings.aip_http_port:
                settings = settings.model_copy(update={"port": settings.aip_http_port})
            if settings.model and settings.models:
                problems.append("  MODEL and MODELS are both set; a server has one model, or a folder of them.")
        if problems:
            raise SettingsError("\n".join(["These environment variables cannot be used:", *problems]))
        return settings

    def public(self) -> dict[str, Any]:
        """The settings as JSON values, without secrets."""
        shown = self.model_dump(mode="json", exclude={name for name in type(self).model_fields if is_secret(name)})
        return {name: redact_url(value) if isinstance(value, str) else value for name, value in shown.items()}


def unquoted(value: str) -> str:
    """The value without spaces around it, and without one pair of equal quotes: Docker keeps those of an env-file."""
    value = value.strip()
    return found[2].strip() if (found := QUOTED.fullmatch(value)) else value


def unquote(environ: MutableMapping[str, str]) -> list[str]:
    """Take the quotes off all variables that this job and its libraries read, and name those that had some."""
    names = {field.upper() for field in Settings.model_fields}
    read = [name for name in environ if name in names or OF_LIBRARIES.fullmatch(name)]
    quoted = [name for name in read if QUOTED.fullmatch(environ[name].strip())]
    environ.update({name: unquoted(environ[name]) for name in quoted})
    return quoted


def _neighbour(name: str, names: Mapping[str, str]) -> str | None:
    if name.startswith("OTEL_"):
        return None  # OpenTelemetry has many of these, and several are alike
    close = difflib.get_close_matches(name.upper(), names, n=1, cutoff=0.88)
    return close[0] if close else None


def _describe(field: str, value: str) -> str:
    shown = "(secret)" if is_secret(field) else repr(redact_url(value))
    return f"  {field.upper()}={shown} is not {allowed(field)} (the default is {default(field) or 'empty'})."


def is_secret(field: str) -> bool:
    """Whether a variable's value may not be shown, logged or kept."""
    return Settings.model_fields[field].annotation is SecretStr


def allowed(field: str) -> str:
    """What a variable may hold, in words: `a whole number, 1 or more`."""
    if field in WORDS:
        return WORDS[field]
    info = Settings.model_fields[field]
    return _kind(info.annotation) + _bounds(info.metadata)


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) is Annotated:
        kind, *metadata = get_args(annotation)
        return _kind(kind) + _bounds([item for info in metadata for item in getattr(info, "metadata", [])])
    if parts := get_args(annotation):
        return " or ".join(_kind(part) for part in parts)
    return {int: "a whole number", float: "a number", bool: "`1` or `0`", Path: "a folder"}.get(annotation, "text")


def _bounds(metadata: list[Any]) -> str:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = [
        f"{words[key]} {value}" for item in metadata for key in words if (value := getattr(item, key, None)) is not None
    ]
    return ", " + " and ".join(bounds) if bounds else ""


def default(field: str) -> str:
    """A variable's default as one would write it in the environment; empty for folders, which depend on the machine."""
    value = Settings.model_fields[field].default
    if isinstance(value, SecretStr | Path):
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return format(value, "g") if isinstance(value, float) else str(value)
