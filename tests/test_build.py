"""build.py without an engine: its arguments, its names, and what it makes of the engine's messages."""

import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from conftest import serving

import build
import ecr
from tuneserve.tasks.catalog import TASKS

SCRIPT = Path(build.__file__)


# One or more for each rule of https://semver.org/spec/v2.0.0.html.
SEMANTIC = [
    "0.0.0",
    "1.2.3",
    "10.20.30",
    "1.2.0-SNAPSHOT",
    "1.0.0-rc.1",
    "1.0.0-0.3.7",
    "1.0.0-x-y-z.--",
    "1.0.0-0a",
    "1.0.0--",
    "1.0.0+20130313144700",
    "1.0.0-beta+exp.sha.5114f85",
    "1.0.0+001",
]
OTHERS = [
    "1",
    "1.2",
    "1.2.3.4",
    "v1.2.3",
    "01.2.3",
    "1.02.3",
    "1.2.03",
    "1.2.x",
    "1.2.3-",
    "1.2.3-01",
    "1.2.3-a..b",
    "1.2.3+",
    "1.2.3+a+b",
    "1.2.3-é",
    "1.2.3SNAPSHOT",
    "latest",
]


@pytest.mark.parametrize("version", SEMANTIC)
def test_a_semantic_version_is_taken(version: str) -> None:
    assert build.parse_arguments(["--version", version]).version == version


@pytest.mark.parametrize("version", [*OTHERS, "", "1.2.3 ", "1.2.3\n", "\u0661.2.3"])
def test_anything_else_is_refused(version: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build.parse_arguments(["--version", version])
    assert "semantic version" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "prefix", "tags"),
    [
        ("1.2.0", "", ["job:1.2.0", "job:latest"]),
        ("1.2.0", "host:5000/team", ["host:5000/team/job:1.2.0", "host:5000/team/job:latest"]),
        ("1.2.0", "team/", ["team/job:1.2.0", "team/job:latest"]),
        ("1.2.0+build-7", "", ["job:1.2.0_build-7", "job:latest"]),
        ("1.2.0-SNAPSHOT", "", ["job:1.2.0-SNAPSHOT"]),
        ("1.2.0-rc.1+build", "host/team", ["host/team/job:1.2.0-rc.1_build"]),
    ],
)
def test_only_a_release_is_called_latest(version: str, prefix: str, tags: list[str]) -> None:
    assert build.name_tags("job", version, prefix) == tags


PREFIXES = [
    "team",
    "my__team",
    "registry.example.com",
    "registry.example.com/team/a-b",
    "Host.Example.COM/team",
    "127.0.0.1:5000",
    "localhost:5000/x",
    "registry.example.com:443/a/b/",
]
NO_PREFIXES = [
    "https://registry.example.com",
    "registry.example.com/Team",
    "Team",
    "a//b",
    "/team",
    "host:port/x",
    "x:1:2",
    "a___b",
    "registry.example.com/team:1.0.0",
    "registry.example.com/team@sha256",
]


@pytest.mark.parametrize("prefix", [*PREFIXES, ""])
def test_a_prefix_that_docker_takes_is_taken(prefix: str) -> None:
    assert build.parse_arguments(["--image-prefix", prefix]).image_prefix == prefix


@pytest.mark.parametrize("prefix", [*NO_PREFIXES, "a b"])
def test_a_prefix_that_docker_refuses_is_refused(prefix: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        build.parse_arguments(["--image-prefix", prefix])


@pytest.mark.parametrize("name", ["Job", "team/job", "job:1", "-job", "job-", "", "a b"])
def test_a_name_that_docker_refuses_is_refused(name: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        build.parse_arguments(["--name", name])


def test_the_older_spellings_mean_the_same() -> None:
    older = build.parse_arguments(["--image_prefix", "team", "--deploy"])
    assert older == build.parse_arguments(["--image-prefix", "team", "--push"])
    assert older.push


def test_pushing_a_bare_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build.parse_arguments(["--push"])
    assert "--image-prefix" in capsys.readouterr().err


def test_build_arguments_are_split_at_the_first_equals_sign() -> None:
    options = build.parse_arguments(["--build-arg", "A=b=c", "--build-arg", "EMPTY="])
    assert dict(options.build_arg) == {"A": "b=c", "EMPTY": ""}
    for wrong in ("A", "=b"):
        with pytest.raises(SystemExit, match="2"):
            build.parse_arguments(["--build-arg", wrong])


def test_the_version_is_the_packages_own() -> None:
    assert f'__version__ = "{build.parse_arguments([]).version}"' in build.PACKAGE.read_text()


@pytest.mark.parametrize(
    "line", ['__version__ = "1.2.3"', "__version__ = '1.2.3'", '__version__: Final = "1.2.3"  # x']
)
def test_the_version_is_found_without_an_import(line: str, tmp_path: Path) -> None:
    module = tmp_path / "__init__.py"
    module.write_text(f'"""Words with __version__ = "9.9.9" in them."""\n\nimport no_such_library\n\n{line}\n')
    assert build.read_version(module) == "1.2.3"


def test_a_proxy_is_given_in_both_spellings() -> None:
    assert build.name_proxy("http://p:1", "inside") == {
        **{"HTTP_PROXY": "http://p:1", "HTTPS_PROXY": "http://p:1", "NO_PROXY": "inside"},
        **{"http_proxy": "http://p:1", "https_proxy": "http://p:1", "no_proxy": "inside"},
    }


def test_a_build_is_told_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    messages: list[dict[str, Any]] = [
        {"status": "Pulling from library/debian", "id": "bookworm"},
        {"status": "Downloading", "progressDetail": {"current": 1, "total": 9}, "id": "a1"},
        {"status": "Downloading", "progressDetail": {"current": 9, "total": 9}, "id": "a1"},
        {"status": "Pull complete", "progressDetail": {}, "id": "a1"},
        {"status": "Digest: sha256:1"},
        {"stream": "Step 1/2 : RUN pip\n"},
        {"stream": "\x1b[91mWARNING: careful\n\x1b[0m"},
        {"stream": "half a line, "},
        {"stream": "and its end\n"},
        {"aux": {"ID": "sha256:2"}},
        {"stream": "Successfully built 2\n"},
    ]
    assert build.relay(messages, "ID") == "sha256:2"
    assert capsys.readouterr().out.splitlines() == [
        "bookworm: Pulling from library/debian",
        "a1: Downloading",
        "a1: Pull complete",
        "Digest: sha256:1",
        "Step 1/2 : RUN pip",
        "WARNING: careful",
        "half a line, and its end",
        "Successfully built 2",
    ]


def test_a_pushs_result_is_its_digest() -> None:
    messages: list[dict[str, Any]] = [
        {"status": "Pushed", "progressDetail": {}, "id": "a1"},
        {"status": "1.2.3: digest: sha256:3 size: 9"},
        {"progressDetail": {}, "aux": {"Tag": "1.2.3", "Digest": "sha256:3", "Size": 9}},
    ]
    assert build.relay(messages, "Digest") == "sha256:3"


DENIED = {"error": "denied: not for you", "errorDetail": {"message": "denied: not for you"}}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"status": "Preparing", "id": "a1"}, DENIED], "denied: not for you"),
        ([{"aux": {"Digest": "sha256:3"}}, DENIED], "denied: not for you"),
        ([{"status": "Pushing", "id": "a1"}], "fell silent"),
        ([], "fell silent"),
    ],
)
def test_an_error_among_the_messages_is_raised(messages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(build.BuildError, match=words):
        build.relay(messages, "Digest")


def test_what_refused_a_base_image_is_the_error() -> None:
    messages = [
        {"stream": "Step 4/9 : RUN echo REFUSED: no\n"},
        {"stream": "\x1b[91mREFUSED: the base brings torch 1.0\n\x1b[0m"},
        {"stream": "Removing intermediate container 1\n"},
        {"error": "The command '/bin/sh -c ...' returned a non-zero code: 1"},
    ]
    with pytest.raises(build.BuildError, match=r"^the base brings torch 1\.0$"):
        build.relay(messages, "ID")


@pytest.mark.parametrize("host", ["unix:///no/such/socket", "tcp://127.0.0.1:9"])
def test_no_engine_is_an_error_in_one_line(host: str) -> None:
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, env={"DOCKER_HOST": host}, cwd="/", capture_output=True, text=True)
    assert done.returncode == 2
    assert f"no Docker engine answers at {host}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def engine() -> Iterator[str]:
    """As much of a Docker engine as a build asks for before it breaks off."""

    class Engine(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"ApiVersion": "1.44", "MinAPIVersion": "1.24", "Version": "24"}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            """Hang up in the middle of the answer."""
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"40\r\n{")
            self.close_connection = True

        def log_message(self, *arguments: Any) -> None:
            pass

    with serving(Engine) as address:
        yield address.replace("http", "tcp")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"credsStore": "gone"}, "names cannot be asked: install it, or remove its credsStore or credHelpers line"),
        ({"credHelpers": {"registry.example.com": "gone"}}, "names cannot be asked"),
        ({}, "onnection"),
    ],
)
def test_whatever_the_sdk_raises_is_one_sentence(
    config: dict[str, Any], words: str, engine: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    environment = {"DOCKER_HOST": engine, "DOCKER_CONFIG": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_socket_that_may_not_be_opened_is_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def ping(self) -> None:
            raise requests.exceptions.ConnectionError(PermissionError(13, "Permission denied"))

    monkeypatch.setattr(build.docker, "from_env", lambda timeout: Client())
    with pytest.raises(build.NoEngineError, match="Permission denied"):
        build.connect()


def test_the_help_names_every_option_and_shows_examples() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0
    options = ("--name", "--version", "--base-image", "--image-prefix", "--proxy", "--push", "--build-arg", "--bake")
    for option in options:
        assert option in done.stdout
    assert "examples:" in done.stdout


def make_folder(folder: Path, *architectures: str, **files: str) -> Path:
    """A folder that looks like a summarizer, or like what is said."""
    written = {"config.json": json.dumps({"architectures": architectures or ["BartForConditionalGeneration"]})}
    for name, content in (written | {"model.safetensors": "weights"} | files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


SUMMARIZING = ("--task", "summarization")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_every_task_can_be_baked() -> None:
    assert set(build.TASKS) == set(TASKS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--task", "summarization"), "--bake"),
        (("--bake", "org/name", "--task", "summary"), "invalid choice"),
        (("--bake", "org/name", "--target", "sagemaker"), "an image of its own"),
        (("--target", "lambda"), "name the model with --bake"),
        (("--bake", ""), "no such folder"),
        (("--bake", "/no/such/folder"), "no such folder"),
        (("--bake", "./gone"), "no such folder"),
        (("--bake", "~nobody-here/model"), "no such folder"),
        (("--bake", "a/b/c"), "no such folder"),
        (("--bake", "org/name@"), "no such folder"),
        (("--bake", "x" * 5000 + "/"), "no such folder"),
        (("--bake", "empty"), "no config.json"),
        (("--bake", "broken"), "no config.json"),
        (("--bake", "pickled", *SUMMARIZING), "pickles"),
        (("--bake", "model"), "BartForConditionalGeneration, which is not for --task text-classification"),
        (("--bake", "classifier", *SUMMARIZING), "BertForSequenceClassification, which is not for"),
        (("--bake", "decoder", *SUMMARIZING), "GPT2LMHeadModel, which is not for"),
        (("--bake", "classifier", "--task", "text-generation"), "BertForSequenceClassification, which is not for"),
        (("--bake", "version", "--task", "text-classification"), "a version for --task feature-extraction"),
        (("--bake", "unreadable"), "metadata.json cannot be read"),
    ],
)
def test_a_model_that_cannot_be_baked_is_refused_before_the_engine_is_asked(
    arguments: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "connect", lambda: pytest.fail("the engine was asked"))
    (tmp_path / "empty").mkdir()
    make_folder(tmp_path / "broken", **{"config.json": "[]"})
    (make_folder(tmp_path / "pickled", **{"pytorch_model.bin": ""}) / "model.safetensors").unlink()
    make_folder(tmp_path / "model")
    make_folder(tmp_path / "classifier", "BertForSequenceClassification")
    make_folder(tmp_path / "decoder", "GPT2LMHeadModel")
    make_folder(tmp_path / "version", "BertModel", **{"metadata.json": json.dumps({"task": "feature-extraction"})})
    make_folder(tmp_path / "unreadable", **{"metadata.json": "["})
    with pytest.raises(SystemExit, match="2"):
        build.main(arguments)
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertForSequenceClassification", "text-classification"),
        ("T5ForConditionalGeneration", "summarization"),
        ("MarianMTModel", "summarization"),
        ("GPT2LMHeadModel", "text-generation"),
        ("LlamaForCausalLM", "text-generation"),
        ("BertModel", "feature-extraction"),
        ("BertForMaskedLM", "feature-extraction"),
    ],
)
def test_a_model_that_fits_its_task_is_taken(architecture: str, task: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", architecture)
    assert build.parse_arguments(["--bake", str(folder), "--task", task]).model == build.Model("m", folder)


def test_a_version_of_a_store_says_its_task_and_is_sent_whole(tmp_path: Path) -> None:
    about = {"metadata.json": json.dumps({"task": "feature-extraction"}), "engine/weights.bin": "graph", ".hidden": ""}
    folder = make_folder(tmp_path / "version", "BertModel", **about)
    options = build.parse_arguments(["--bake", str(folder)])
    assert options.task == "feature-extraction"
    stream = io.BytesIO(b"".join(build.stream_context(build.CONTEXT / "Dockerfile.bake", options.model.folder)))
    with tarfile.open(fileobj=stream) as archive:
        sent = {name.removeprefix("model/version/") for name in archive.getnames()}
    assert {"config.json", "metadata.json", "model.safetensors", "engine/weights.bin"} < sent
    assert ".hidden" not in sent


@pytest.mark.parametrize(
    ("said", "variable", "model"),
    [
        ("org/Distil_BART-6.6", "", build.Model("org/Distil_BART-6.6")),
        ("org/Distil_BART-6.6", "v1", build.Model("org/Distil_BART-6.6", revision="v1")),
        ("org/Distil_BART-6.6@refs/pr/1", "v1", build.Model("org/Distil_BART-6.6", revision="refs/pr/1")),
    ],
)
def test_a_hub_models_name_and_revision_are_read(
    said: str, variable: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_REVISION", variable)
    options = build.parse_arguments(["--bake", said, *SUMMARIZING])
    assert options.model == model
    assert options.name == "tuneserve-distil-bart-6-6"
    assert build.parse_arguments(["--bake", said, *SUMMARIZING, "--name", "mine"]).name == "mine"


def archive(**files: str) -> bytes:
    """A tar of files."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content.encode()))
    return written.getvalue()


VERSIONS = {"python": "3.12", "torch": "2.13.0+cu130", "transformers": "5.24.0", "cuda": "13.0", "driver": "580"}


class FakeEngine:
    """The SDK's client as far as a build uses it: it keeps what it was asked to build, and what it tagged."""

    def __init__(self) -> None:
        self.builds: list[dict[str, Any]] = []
        self.tags: list[tuple[str, str]] = []
        self.logins: list[tuple[str, str]] = []
        self.api, self.images, self.containers = self, self, self

    def build(self, **asked: Any) -> list[dict[str, Any]]:
        context = asked.get("fileobj")
        self.builds.append(asked | ({"context": b"".join(context)} if context else {}))
        return [{"aux": {"ID": f"image-{len(self.builds)}"}}]

    def get(self, image: str) -> Any:
        about = {"Size": 1e9, "Config": {"Labels": {"tuneserve.task": "of the image below"}}}
        return SimpleNamespace(id=image, attrs=about, tag=lambda tag: self.tags.append((image, tag)))

    def login(self, username: str, password: str, *, registry: str, reauth: bool) -> None:
        assert (username, reauth) == ("AWS", True)
        self.logins.append((registry, password))

    def push(self, repository: str, *, tag: str, auth_config: Any, **_: Any) -> list[dict[str, Any]]:
        self.logins.append((f"{repository}:{tag}", (auth_config or {}).get("password", "")))
        return [{"aux": {"Digest": "sha256:3"}}]

    def create(self, image: str) -> Any:
        metadata = json.dumps({"base_model": {"revision": COMMIT, "sha256": "5ha"}})
        held = {
            "/opt/venv/facts.json": archive(**{"facts.json": json.dumps(VERSIONS)}),
            "/opt/venv/sbom.cdx.json": archive(**{"sbom.cdx.json": '{"bomFormat": "CycloneDX"}'}),
            "/opt/baked/champion": archive(champion="v-1\n"),
            "/opt/baked/versions/v-1/metadata.json": archive(**{"metadata.json": metadata}),
        }
        return SimpleNamespace(get_archive=lambda path: ([held[path]], {}), remove=lambda: None)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine()
    monkeypatch.setattr(build, "connect", lambda: engine)
    return engine


def test_a_folder_is_baked_on_top_of_the_jobs_stage(fake: FakeEngine, tmp_path: Path) -> None:
    folder = make_folder(
        tmp_path / "My $model",
        **{"tokenizer.json": "{}", "1_Pooling/config.json": "{}", "training_args.bin": "no", "pytorch_model.bin": "no"},
        **{"checkpoint-1/model.safetensors": "no", ".cache/x.json": "no"},
    )
    (folder / "weights-2.safetensors").symlink_to(folder / "model.safetensors")  # as the hub's cache has them
    assert build.main(["--bake", str(folder), *SUMMARIZING, "--base-image", "debian:12", "--version", "1.2.3-rc"]) == 0
    job, baked, labelled = fake.builds
    assert (job["target"], job["buildargs"]) == ("job", {"BASE_IMAGE": "debian:12"})
    assert baked["buildargs"] == {"JOB": "image-1", "TASK": "summarization", "BAKED": "/resources/My $model"}
    assert baked["custom_context"]
    with tarfile.open(fileobj=io.BytesIO(baked["context"])) as sent:
        files = {entry.name.removeprefix("model/My $model/"): entry for entry in sent if entry.isfile()}
        assert set(files) == {
            *("Dockerfile", "config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"),
            "weights-2.safetensors",
        }
        assert {entry.mode & 0o444 for entry in sent} == {0o444}
        linked = sent.extractfile(files["weights-2.safetensors"])
        assert linked is not None
        assert linked.read() == b"weights"
    dockerfile = labelled["context"].decode()
    assert dockerfile.startswith("FROM image-2\nLABEL ")
    for label in ('task="summarization"', 'model="My \\$model"', 'model.sha256="5ha"', 'model.version="v-1"'):
        assert f" tuneserve.{label}" in dockerfile
    assert fake.tags == [("image-3", "tuneserve-my-model:1.2.3-rc")]


@pytest.mark.parametrize(("revision", "fixed"), [("", False), ("main", False), (COMMIT, True)])
def test_a_hub_model_is_downloaded_in_the_build_and_asked_for_anew_unless_it_is_fixed(
    fake: FakeEngine, revision: str, fixed: bool
) -> None:
    pinned = f"@{revision}" if revision else ""
    assert build.main(["--bake", f"org/name{pinned}", *SUMMARIZING, "--build-arg", "HF_TOKEN=secret"]) == 0
    arguments = fake.builds[1]["buildargs"]
    assert (arguments.pop("ASKED", None) is None) == fixed
    assert arguments == {
        **{"JOB": "image-1", "TASK": "summarization", "BAKED": "org/name", "MODEL_REVISION": revision},
        "HF_TOKEN": "secret",
    }
    with tarfile.open(fileobj=io.BytesIO(fake.builds[1]["context"])) as sent:
        assert sent.getnames() == ["model", "Dockerfile"]
    assert f'tuneserve.model.revision="{COMMIT}"' in fake.builds[2]["context"].decode()


def test_a_function_takes_its_model_out_of_the_image_that_was_baked(fake: FakeEngine, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "reviews", "BertForSequenceClassification")
    options = ["--target", "lambda", "--base-image", "debian:12", "--build-arg", "ARCH=arm64", "--version", "1.2.3-rc"]
    assert build.main(["--bake", str(folder), *options]) == 0
    *_, labelled, function = fake.builds
    assert labelled["context"].startswith(b"FROM image-2")
    assert (function["dockerfile"], function["target"]) == ("Dockerfile.serve", "lambda")
    arguments = {"BASE_IMAGE": "debian:12", "ARCH": "arm64", "BAKED": "image-3"}
    assert function["buildargs"] == arguments | {"REQUIREMENTS": "requirements-lambda.txt"}
    assert function["labels"]["tuneserve.task"] == "of the image below"
    assert function["labels"]["org.opencontainers.image.description"].startswith("Serves reviews on AWS Lambda")
    assert fake.tags == [("image-4", "tuneserve-reviews-lambda:1.2.3-rc")]


def test_a_server_without_torch_is_one_build_and_a_model_goes_on_top_of_it(fake: FakeEngine, tmp_path: Path) -> None:
    assert build.main(["--target", "serve", "--base-image", "debian:12", "--version", "1.2.3-rc"]) == 0
    [served] = fake.builds
    assert (served["dockerfile"], served["target"]) == ("Dockerfile.serve", "serve")
    assert served["labels"]["org.opencontainers.image.version"] == "1.2.3-rc"
    folder = make_folder(tmp_path / "reviews", "BertForSequenceClassification")
    assert build.main(["--target", "serve", "--bake", str(folder), "--version", "1.2.3-rc"]) == 0
    job, on, baked, labelled = fake.builds[1:]
    assert (job["target"], on["target"]) == ("job", "serve")
    assert (baked["buildargs"]["JOB"], baked["buildargs"]["ON"]) == ("image-2", "image-3")
    assert labelled["context"].startswith(b"FROM image-4")
    assert [tag for _, tag in fake.tags] == ["tuneserve-serve:1.2.3-rc", "tuneserve-reviews-serve:1.2.3-rc"]


@pytest.mark.parametrize(("name", "own"), [("lambda", {"awslambdaric"}), ("serve", set())])
def test_libraries_of_images_without_torch_have_the_jobs_pins(name: str, own: set[str]) -> None:
    names = ("requirements.txt", f"requirements-{name}.txt")
    pins = [(build.CONTEXT / "docker-res" / one).read_text().splitlines() for one in names]
    job, other = ({line for line in lines if not line.startswith("#")} for lines in pins)
    assert {line.partition("==")[0] for line in other - job} == own


LOCKS = build.CONTEXT / "locks"
REQUIREMENTS = sorted(path.name for path in (build.CONTEXT / "docker-res").glob("requirements*.txt"))


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_every_pin_is_locked_with_hashes_but_torchs(name: str) -> None:
    locked = (LOCKS / name).read_text()
    entries = re.findall(r"^([a-z0-9-]+==[^ ;]+).*\\\n((?: +--hash=sha256:[0-9a-f]{64}.*\n)+)", locked, re.MULTILINE)
    assert len(entries) == len(re.findall(r"^\S+==", locked, re.MULTILINE)), "make lock"
    pins = [line for line in (build.CONTEXT / "docker-res" / name).read_text().splitlines() if "==" in line]
    wanted = {pin.replace("_", "-") for pin in pins if not pin.startswith("torch==")}
    assert wanted <= {pin for pin, _ in entries}, "make lock"
    assert not any(pin.startswith(("torch==", "nvidia-")) for pin, _ in entries)


@pytest.mark.parametrize("options", [[], ["--target", "serve"], ["--bake", "org/name"]])
def test_the_list_of_libraries_is_copied_out_of_the_image(options: list[str], fake: FakeEngine, tmp_path: Path) -> None:
    assert build.main([*options, "--sbom", str(tmp_path / "sbom.json")]) == 0
    assert json.loads((tmp_path / "sbom.json").read_text()) == {"bomFormat": "CycloneDX"}


def test_a_list_of_libraries_needs_a_folder_before_the_build(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build.parse_arguments(["--sbom", "/no/such/sbom.json"])
    assert "there is no folder /no/such" in capsys.readouterr().err


def test_without_a_model_there_is_one_build_with_labels(fake: FakeEngine) -> None:
    assert build.main(["--name", "mine", "--version", "1.2.3"]) == 0
    [asked] = fake.builds
    assert "target" not in asked
    assert {"TITLE": "mine", "VERSION": "1.2.3"}.items() <= asked["buildargs"].items()
    assert [tag for _, tag in fake.tags] == ["mine:1.2.3", "mine:latest"]


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (["--transformers", "5.24.0"], {"TRANSFORMERS": "5.24.0"}),
        (["--torch", "2.14.0", "--target", "sagemaker"], {"TORCH": "2.14.0"}),
    ],
)
def test_chosen_libraries_stand_in_the_tag(
    options: list[str], given: dict[str, str], fake: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.main([*options, "--base-image", "ubuntu:24.04", "--version", "1.2.3+4"]) == 0
    assert (given | {"BASE_IMAGE": "ubuntu:24.04"}).items() <= fake.builds[0]["buildargs"].items()
    assert [tag for _, tag in fake.tags] == ["tuneserve:1.2.3_4-transformers5.24.0-torch2.13.0-py312-cu130"]
    assert "transformers 5.24.0, CUDA 13.0, driver 580 or later." in capsys.readouterr().out


def test_a_tag_says_that_there_is_no_cuda() -> None:
    facts = VERSIONS | {"torch": "2.13.0+cpu", "cuda": ""}
    assert build.name_tags("job", "1.2.3-rc", "", facts) == ["job:1.2.3-rc-transformers5.24.0-torch2.13.0-py312-cpu"]


@pytest.mark.parametrize("version", ["newest", ">=5", "5.24.0; rm", "5.24.0+cpu", ""])
@pytest.mark.parametrize("option", ["--transformers", "--torch"])
def test_a_library_is_chosen_by_a_version(option: str, version: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build.parse_arguments([option, version])
    assert "a version as PyPI has it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--transformers", "4.57.6"], "need 5 or later"),
        (["--torch", "2.13.0", "--target", "lambda", "--bake", "org/name"], "neither transformers nor torch"),
    ],
)
def test_libraries_that_no_image_can_have_are_refused(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        build.parse_arguments(options)
    assert words in capsys.readouterr().err


HOSTS = [f"{account}.dkr.ecr.eu-west-1.amazonaws.com" for account in (123456789012, 763104351884)]


class FakeRegistry:
    """Amazon's registry, which has one repository; its password says whose it is."""

    def __init__(self, *, account: str, region: str) -> None:
        self._password = f"{account} {region}"

    def credentials(self) -> tuple[str, str]:
        return "AWS", self._password

    def create(self, name: str) -> bool:
        return name != "team/there"


@pytest.mark.parametrize(("name", "made"), [("there", False), ("new", True)])
def test_amazons_registries_are_logged_in_to_and_given_the_repository(
    name: str, made: bool, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ecr, "Registry", FakeRegistry)
    pushing = ["--image-prefix", f"{HOSTS[0]}/team", "--push", "--name", name, "--version", "1.2.3-rc"]
    assert build.main([*pushing, "--base-image", f"{HOSTS[1]}/pytorch:2"]) == 0
    tag = f"{HOSTS[0]}/team/{name}:1.2.3-rc"
    assert fake.logins == [(HOSTS[1], "763104351884 eu-west-1"), (tag, "123456789012 eu-west-1")]
    said = capsys.readouterr().out
    assert f"Pushed {tag}, digest sha256:3." in said
    assert (f"Made the repository {HOSTS[0]}/team/{name}." in said) == made


def test_other_registries_have_the_login_that_docker_has(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ecr, "Registry", lambda **_: pytest.fail("it was asked"))
    assert build.main(["--image-prefix", "registry.example.com/1", "--push", "--version", "1.2.3-rc"]) == 0
    assert fake.logins == [("registry.example.com/1/tuneserve:1.2.3-rc", "")]


def test_amazons_refusal_is_one_sentence(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert build.main(["--image-prefix", HOSTS[0], "--push"]) == 1
    said = f"build.py: {HOSTS[0]}: a registry of Amazon needs boto3: pip install boto3\n"
    assert capsys.readouterr().err == said
