"""Secrets, planted wherever one may be, and looked for in all that a real server writes, sends and answers."""

import json
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import loop
import pytest
import tiny
from conftest import Files, serving
from wire import wait_until


class MLflow(BaseHTTPRequestHandler):
    """As much of an MLflow server as a run asks for; it keeps what it is told."""

    told: list[str]

    def __init__(self, *arguments: Any, told: list[str]) -> None:
        self.told = told
        super().__init__(*arguments)

    def do_POST(self) -> None:
        """Take everything."""
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.told.append(f"{self.path} {content.decode(errors='replace')}")
        info = {"run_id": "0" * 32, "experiment_id": "1", "lifecycle_stage": "active"}
        run = {"info": info | {"artifact_uri": "mlflow-artifacts:/1/0/artifacts"}, "data": {}}
        experiment = {"experiment_id": "1", "name": "tuneserve", "lifecycle_stage": "active"}
        body = json.dumps({"run": run, "experiment": experiment}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST
    do_PUT = do_POST

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """An environment with a secret in every variable that may hold one, and what MLflow is told."""
    tiny.write_csv(tmp_path / "web" / "reviews.csv", tiny.sentences(160))
    told: list[str] = []
    with (
        serving(partial(Files, directory=str(tmp_path / "web"))) as web,
        serving(partial(MLflow, told=told)) as mlflow,
    ):
        yield (
            {
                **tiny.RECIPE,
                "REPORT": "1",
                **tiny.paths(tmp_path),
                "N_EPOCHS": "1",
                "MIN_ACCURACY": "0",
                "HOST": "127.0.0.1",
                "PORT": str(loop.free_port()),
                "BASE_MODEL": str(tiny.make_base_model(tmp_path / "base")),
                "DATASET": f"{web.replace('//', '//me:hunter-1@')}/reviews.csv?sig=hunter-2#hunter-3",
                "INPUT": "https://me:hunter-4/x@ y@host/in.csv?sig=hunter-5",
                "OUTPUT": "s3://key:hunter-6@bucket/out?token=hunter-7",
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://me:hunter-8@127.0.0.1:9",
                "MLFLOW_TRACKING_URI": mlflow.replace("//", "//me:hunter-9@"),
                "HTTP_PROXY": "http://me:hunter-10@127.0.0.1:9",
                "NO_PROXY": "127.0.0.1",
                "API_KEY": "hunter-11",
                "HF_TOKEN": "hunter-12",
                "ACCESS_LOG": "1",
            },
            told,
        )


def test_no_planted_secret_is_stored_logged_sent_or_answered(
    planted: tuple[dict[str, str], list[str]], tmp_path: Path
) -> None:
    environment, told = planted
    service = loop.Service(environment, tmp_path / "out.log")
    service.start()
    answers = []
    try:
        service.wait("/readyz", lambda body: body["phase"] == "ready", timeout_s=240)
        with httpx.Client(base_url=service.url, headers={"X-API-Key": environment["API_KEY"]}) as client:
            wait_until(lambda: client.get("/jobs").json()[0]["state"] == "finished")
            paths = client.get("/openapi.json").json()["paths"]
            for path in [*paths, "/docs", "/openapi.json", "/?sig=hunter-13"]:
                with client.stream("GET", path.replace("{name}", "none")) as answer:
                    endless = answer.headers.get("Content-Type", "").startswith("text/event-stream")
                    answers.append(next(answer.iter_text()) if endless else answer.read().decode())
            answers.append(client.post("/inference", json={"text": "a great film"}).text)
            answers.append(json.dumps(client.get("/model").json()))
    finally:
        service.end()
    assert '"dataset"' in answers[-1]
    assert any("log-batch" in one and '"dataset"' in one for one in told)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in written)
    assert {"metadata.json", "index.html", "README.md"} <= {path.name for path in written}
    found = [path.name for path in written if b"hunter" in path.read_bytes()]
    assert found == []
    assert [one for one in [*told, *answers] if "hunter" in one.replace("hunter-13", "")] == []
