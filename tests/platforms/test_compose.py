"""compose.yaml, and what it starts beside the job: a real Prometheus asks a loaded server, and every panel has data."""

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import loop
import pytest
import tiny
import yaml
from manifests import find, render_with
from wire import wait_until

from tuneserve.serving.http.server import LEAVE_S
from tuneserve.serving.metrics import Metrics
from tuneserve.settings import PROJECT, Settings

from .conftest import Client

COMPOSE = PROJECT / "compose.yaml"
FILES = PROJECT / "production" / "deploy" / "compose"
ALERTS = FILES / "prometheus" / "alerts.yml"
DASHBOARDS = sorted((FILES / "grafana" / "dashboards").glob("*.json"))

CHECK = """
import json, subprocess, sys
command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", sys.argv[1]]
done = subprocess.run(command, capture_output=True, text=True)
print(json.dumps([done.returncode, done.stdout + done.stderr]))
"""


def queries() -> Iterator[tuple[str, str]]:
    """The titles of the dashboards' panels, with what each asks Prometheus."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield panel["title"], target["expr"]


@pytest.fixture
def services() -> Any:
    return yaml.safe_load(COMPOSE.read_text())["services"]


def test_the_file_fits_the_schema_of_compose(client: Client, tmp_path: Path) -> None:
    code, said = client("compose", CHECK, str(COMPOSE))
    assert code == 0, said
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text().replace("read_only:", "readonly:"))
    assert client("compose", CHECK, str(wrong))[0] == 1


def test_the_job_is_started_as_the_image_wants_it(services: Any) -> None:
    dockerfile = (PROJECT / "production" / "Dockerfile").read_text()
    assert services["cpu"]["build"] == "production"
    for name in ("cpu", "gpu"):
        job = services[name]
        assert job["profiles"] == [name]
        assert job["env_file"] == ["config.env", {"path": "secrets.env", "required": False}]
        assert job["ports"] == [f"{Settings().port}:{Settings().port}"]
        assert int(job["stop_grace_period"].removesuffix("s")) > LEAVE_S
        for volume in job["volumes"]:
            assert re.search(rf"install -d .* {volume.partition(':')[2]}\b", dockerfile), volume
        assert ":8000/livez" in job["healthcheck"]["test"][-1]
    # What stands in `environment` goes before config.env: an API_KEY there, though empty, would open the server.
    assert services["gpu"].pop("environment") == {"DEVICE": "cuda"}
    services["gpu"].pop("deploy")
    assert services["gpu"] | {"profiles": ["cpu"]} == services["cpu"]


def test_prometheus_and_grafana_find_what_they_are_given(services: Any) -> None:
    for name in ("prometheus", "grafana"):
        for source, target in (volume.split(":")[:2] for volume in services[name]["volumes"]):
            assert not source.startswith(".") or (COMPOSE.parent / source).is_dir(), source
            assert target.startswith("/")
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])
    [scrape] = yaml.safe_load((FILES / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    [alias] = services["cpu"]["networks"]["default"]["aliases"]
    assert scrape["static_configs"] == [{"targets": [f"{alias}:{Settings().port}"]}]
    provisioning = FILES / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((provisioning / "dashboards" / "tuneserve.yml").read_text())["providers"]
    assert any(volume.split(":")[1] == provider["options"]["path"] for volume in services["grafana"]["volumes"])
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            assert panel["datasource"] == {"type": "prometheus", "uid": source["uid"]}, panel["title"]


def test_every_metric_that_is_shown_or_watched_exists() -> None:
    named = set(re.findall(r"tuneserve_[a-z_]+", ALERTS.read_text() + " ".join(query for _, query in queries())))
    assert len(named) > 15
    metrics = Metrics()
    metrics.seconds.labels("/inference").observe(1)  # its series come with the first request
    assert named <= set(re.findall(r"tuneserve_[a-z_]+", metrics.render().decode()))


def promtool(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)


def test_each_alert_fires_when_it_should_and_else_is_silent() -> None:
    for arguments in (("check", "config", FILES / "prometheus" / "prometheus.yml"), ("check", "rules", ALERTS)):
        done = promtool(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    tests = Path(__file__).with_name("alerts.yml")
    done = promtool("test", "rules", tests)
    assert done.returncode == 0, done.stdout + done.stderr
    [group] = yaml.safe_load(ALERTS.read_text())["groups"]
    fired = {
        one["alertname"]
        for test in yaml.safe_load(tests.read_text())["tests"]
        for one in test["alert_rule_test"]
        if "exp_alerts" in one
    }
    assert fired == {rule["alert"] for rule in group["rules"]}


def test_kubernetes_watches_the_same(tmp_path: Path) -> None:
    rule = find(render_with(["monitoring"], tmp_path), "PrometheusRule", "tuneserve")
    assert rule["spec"] == yaml.safe_load(ALERTS.read_text())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[loop.Service]:
    """The real command on a tiny model."""
    folder = tmp_path_factory.mktemp("server")
    # Drift is judged by a reference of 50 texts or more.
    data = tiny.write_csv(folder / "reviews.csv", tiny.sentences(200))
    tiny.train(data, folder, N_EPOCHS="3", TEST_PCT="0.2", VALID_PCT="0.2")
    environment = tiny.paths(folder) | {
        "HOST": "127.0.0.1",
        "PORT": str(loop.free_port()),
        "API_KEY": loop.KEY["X-API-Key"],
        "DRIFT_WINDOW": "50",
    }
    service = loop.Service(environment, folder / "out.log", verb="serve")
    try:
        service.start()
        service.wait("/readyz", lambda body: body["phase"] == "ready")
        yield service
    finally:
        assert service.process is not None
        service.process.kill()
        service.process.wait()


@pytest.fixture(scope="module")
def prometheus(server: loop.Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Debian's Prometheus with compose's configuration; only the address and the pace are others."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copytree(FILES / "prometheus", folder, dirs_exist_ok=True)
    configuration = yaml.safe_load((folder / "prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration["scrape_configs"][0]["static_configs"][0]["targets"] = [server.url.removeprefix("http://")]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    address = f"127.0.0.1:{loop.free_port()}"
    options = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "out.log").open("wb") as log:
        process = subprocess.Popen(
            ["prometheus", *options, f"--web.listen-address={address}"], stdout=log, stderr=log, cwd=folder
        )
    try:
        with httpx.Client(base_url=f"http://{address}", trust_env=False) as client:
            yield client
    finally:
        process.kill()
        process.wait()


def test_every_panel_and_scaler_has_data_while_a_server_is_loaded(
    server: loop.Service, prometheus: httpx.Client, tmp_path: Path
) -> None:
    scaler = find(render_with(["keda"], tmp_path), "ScaledObject", "serve")
    [trigger] = scaler["spec"]["triggers"]
    # The namespace comes from the cluster's Prometheus.
    wanted = [*queries(), ("KEDA", trigger["metadata"]["query"].replace('{namespace="tuneserve"}', ""))]
    assert len(wanted) > 20
    missing: list[tuple[str, str, str]] = []

    def all_have_data() -> bool:
        missing.clear()
        for title, query in wanted:
            asked = {"query": query.replace("$__rate_interval", "30s")}
            try:
                body = prometheus.get("/api/v1/query", params=asked).json()
            except httpx.TransportError as error:  # it is still starting
                missing.append((title, query, str(error)))
                return False
            assert body["status"] == "success", body
            values = [float(one["value"][1]) for one in body["data"]["result"]]
            if not values or any(math.isnan(value) for value in values):
                missing.append((title, query, str(values)))
        return not missing

    texts = [text for text, _ in tiny.sentences(40)] + ["good " * 50]  # the last one is truncated
    port = int(server.environment["PORT"])
    with loop.Load(port, texts, clients=2, pause_s=0.02) as load:
        wait_until(lambda: len(load.ids) >= 20)
        for identifier, _ in load.ids[:20]:
            body = {"request_id": identifier, "label": "good"}
            assert httpx.post(f"{server.url}/feedback", json=body, headers=loop.KEY).status_code == 200
        try:
            wait_until(all_have_data, seconds=90)
        except AssertionError:
            raise AssertionError(f"without data: {missing}") from None
    [group] = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    assert {(rule["health"], rule.get("lastError", "")) for rule in group["rules"]} == {("ok", "")}
    firing = {alert["labels"]["alertname"] for alert in prometheus.get("/api/v1/alerts").json()["data"]["alerts"]}
    assert "TuneserveDown" not in firing
