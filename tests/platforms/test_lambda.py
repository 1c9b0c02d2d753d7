"""AWS Lambda: the runtime's own client in its emulator, events by SAM's constructors, and what checks templates."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from loop import free_port
from platforms.conftest import Client
from wire import wait_until

from tuneserve.settings import PROJECT, Settings

RES = PROJECT / "production" / "docker-res"
DEPLOY = PROJECT / "production" / "deploy" / "lambda"
CLIENTS = PROJECT / ".venv" / "clients"

EVENTS = """
import json, sys
from flask import Flask, request
from samcli.local.apigw.event_constructor import construct_v1_event, construct_v2_event_http

app, made = Flask(__name__), []

def note(**_):
    made.append(construct_v1_event(request, 3000, [], stage_name="Prod"))
    made.append(construct_v2_event_http(request, 3000, [], stage_name="$default", route_key="$default"))
    return ""

for path in ("/inference", "/log", "/readyz"):
    app.add_url_rule(path, endpoint=path, view_func=note, methods=["GET", "POST"])
client = app.test_client()
client.post("/inference", json={"text": "a great film"})
client.post("/log", json={"log": "a great film"})
client.post("/inference", json={})
client.get("/readyz")
print(json.dumps(made, default=str))
"""


class Emulated:
    """A function in the emulator of its runtime's interface, started by the image's own script."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        port, api = free_port(), free_port()
        emulator = next((CLIENTS / "sam").glob("lib/python*/site-packages/samcli/local/rapid/aws-lambda-rie-x86_64"))
        options = f"--runtime-interface-emulator-address 127.0.0.1:{port} --runtime-api-address 127.0.0.1:{api}"
        self.url = f"http://127.0.0.1:{port}/2015-03-31/functions/function/invocations"
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [RES / "lambda.sh", "function.handler"],
                env={
                    "PATH": "/usr/bin:/bin",
                    "PYTHON": str(CLIENTS / "lambda" / "bin" / "python"),
                    "LAMBDA_EMULATOR": f"{emulator} {options}",
                    "PYTHONDONTWRITEBYTECODE": "1",
                    "HOME": "/nowhere",
                    "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "512",
                    **environment,
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_until(self.listens)

    def listens(self) -> bool:
        try:
            httpx.get(self.url.partition("/2015")[0], trust_env=False)  # any method calls the function at its own path
        except httpx.TransportError:
            assert self.process.poll() is None, self.log.read_text()
            return False
        return True

    def ask(self, event: Any) -> Any:
        return httpx.post(self.url, content=json.dumps(event), timeout=60, trust_env=False).json()

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which nothing may be written."""
    folder = tmp_path_factory.mktemp("lambda")
    tiny.train(tiny.write_csv(folder / "reviews.csv", tiny.sentences(200)), folder)
    return folder / "MODEL"


@pytest.fixture
def emulate(tmp_path: Path) -> Iterator[Callable[..., Emulated]]:
    """Start a function with these variables."""
    for name in ("sam", "lambda"):
        if not (CLIENTS / name / ".made").exists():
            pytest.skip(f"{CLIENTS / name} is not there: make test-platforms makes it")
    with ExitStack() as stack:

        def start(**environment: str) -> Emulated:
            function = Emulated(tmp_path, environment)
            stack.callback(function.close)
            return function

        yield start


def contents(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_the_runtime_answers_events_that_sam_makes(
    emulate: Callable[..., Emulated], store: Path, client: Client
) -> None:
    before = contents(store)
    emulated = emulate(MODEL_PATH=str(store), SERVERLESS_ROUTE="/log", API_KEY="a-long-key")
    events = client("sam", EVENTS)
    assert [event.get("version", "1.0") for event in events] == ["1.0", "2.0"] * 4
    for event in events:
        event["headers"] = {**event["headers"], "X-API-Key": "a-long-key"}
    replies = [emulated.ask(event) for event in events]
    statuses = [reply.get("statusCode") for reply in replies]
    assert statuses == [200, 200, 200, 200, 422, 422, 200, 200], emulated.log.read_text()
    bodies = [json.loads(reply["body"]) for reply in replies]
    assert bodies[0] == bodies[1]
    assert bodies[0]["label"] == "good"
    assert bodies[2] == bodies[3] == {"prediction": "good"}
    assert replies[2]["headers"]["Access-Control-Allow-Origin".lower()] == "*"
    assert bodies[6]["phase"] == "ready"
    assert emulated.ask({"log": "an awful film"}) == {"prediction": "bad"}
    assert emulated.ask({"text": "a great film"}) == bodies[0]

    failed = emulated.ask({"txt": "film"})
    assert failed["errorType"] == "InvocationError"
    assert failed["errorMessage"].startswith("422 ")
    assert emulated.ask(events[0] | {"headers": {}, "multiValueHeaders": {}})["statusCode"] == 401
    assert contents(store) == before
    assert "a-long-key" not in emulated.log.read_text()


def test_an_init_that_fails_says_why(emulate: Callable[..., Emulated], tmp_path: Path) -> None:
    said = emulate(MODEL_PATH=str(tmp_path / "none")).ask({"text": "film"})
    assert said["errorType"] == "NoModelError"
    assert "There is no model in MODEL_PATH" in said["errorMessage"]


def test_where_a_lambda_is_the_emulator_is_not_started() -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": "/bin/echo", "LAMBDA_EMULATOR": "/bin/false"}
    done = subprocess.run([RES / "lambda.sh"], env=environment | {"AWS_LAMBDA_RUNTIME_API": "a:1"}, capture_output=True)
    assert done.stdout.decode().split() == ["-m", "awslambdaric", "function.handler"]
    assert subprocess.run([RES / "lambda.sh"], env=environment).returncode == 1


MEASURE = """
import json, re, sys, time
import function
class Context:
    aws_request_id = "a"
    def get_remaining_time_in_millis(self): return 60000
init_s = time.process_time()
answer = function.handler({"text": "a great film"}, Context())
peak_kb = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]  # getrusage's is the parent's before exec
print(json.dumps({"init_s": init_s, "peak_mb": int(peak_kb) / 1024, "label": answer["label"],
                  "loaded": sorted({name.split(".")[0] for name in sys.modules})}))
"""


def test_it_starts_within_the_platforms_bounds_without_torch(store: Path, client: Client) -> None:
    found = client(
        "lambda",
        f"import os, sys\nsys.path.insert(0, {str(RES)!r})\n"
        f"os.environ.update(MODEL_PATH={str(store)!r}, OMP_NUM_THREADS='1')\n{MEASURE}",
    )
    assert found["label"] == "good"
    assert not {"torch", "transformers", "uvicorn", "multiprocessing"} & set(found["loaded"])
    assert found["init_s"] < 3  # CPU seconds
    assert found["peak_mb"] < 512


TRANSLATE = """
import json, sys
from samtranslator.public.translator import ManagedPolicyLoader
from samtranslator.translator.transform import transform
from samcli.yamlhelper import yaml_parse
class NoPolicies:
    def load(self): return {}
image = {"ImageUri": "1.dkr.ecr.eu-west-1.amazonaws.com/a@sha256:b"}
made = transform(yaml_parse(open(sys.argv[1]).read()), image, NoPolicies())
print(json.dumps({name: one["Type"] for name, one in made["Resources"].items()}))
"""


def lint(template: Path) -> None:
    done = subprocess.run([CLIENTS / "sam" / "bin" / "cfn-lint", template], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_template_is_one_by_sams_translator_and_cfn_lint(client: Client) -> None:
    template = DEPLOY / "template.yaml"
    made = client("sam", "import os\nos.environ['AWS_DEFAULT_REGION'] = 'eu-west-1'\n" + TRANSLATE, str(template))
    assert {"AWS::Lambda::Function", "AWS::ApiGatewayV2::Api", "AWS::Logs::LogGroup"} <= set(made.values())
    lint(template)


def test_osls_makes_of_the_other_file_what_cfn_lint_takes(tmp_path: Path) -> None:
    osls = CLIENTS / "osls" / "node_modules" / ".bin" / "osls"
    if not osls.exists():
        pytest.skip(f"{osls} is not there: make test-platforms makes it")
    shutil.copy(DEPLOY / "serverless.yml", tmp_path)
    image = f"123456789012.dkr.ecr.eu-west-1.amazonaws.com/reviews@sha256:{'a' * 64}"
    done = subprocess.run(
        [osls, "package", "--package", "made", "--region", "eu-west-1"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "IMAGE": image, "SLS_TELEMETRY_DISABLED": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    template = tmp_path / "made" / "cloudformation-template-update-stack.json"
    resources = json.loads(template.read_text())["Resources"]
    function = resources["PredictLambdaFunction"]["Properties"]
    assert function["Code"]["ImageUri"] == image
    assert Settings.from_environ(function["Environment"]["Variables"]).serverless_route == "/log"
    assert resources["ApiGatewayResourceLog"]["Properties"]["PathPart"] == "log"
    lint(template)
