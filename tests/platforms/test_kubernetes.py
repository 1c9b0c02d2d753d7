"""The Kubernetes manifests: valid to Kubernetes, KServe and Kubeflow, hardened, true to image and settings."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import COMPONENTS, MANIFESTS, OVERLAYS, containers, find, pods, render, render_with

import tuneserve
from tuneserve import errors
from tuneserve.serving.http.server import LEAVE_S
from tuneserve.serving.metrics import Metrics
from tuneserve.settings import PROJECT, Settings

from .conftest import Client

VERSIONS = ["1.36", "1.37"]
KSERVES, TRAINERS = ["InferenceService", "ServingRuntime"], ["TrainJob", "TrainingRuntime"]
FOREIGN = [*KSERVES, *TRAINERS, "ServiceMonitor", "PrometheusRule", "ScaledObject"]
SETTINGS = {name.upper() for name in Settings.model_fields}
METRIC = re.compile(r"tuneserve_[a-z_]+")

VALIDATE = """
import json, sys, kubernetes_validate
objects, versions = json.load(open(sys.argv[1])), sys.argv[2:]
found = []
for one in objects:
    for version in versions:
        try:
            assert kubernetes_validate.validate(one, version, strict=True) == version
        except kubernetes_validate.ValidationError as error:
            found.append(f"{one['kind']} {one['metadata']['name']} in {version}: {error.message}")
print(json.dumps(found))
"""

KSERVE = """
import json, re, sys
from kserve import models
from kubernetes import client

def faults(value, kind, path):
    if inner := re.fullmatch(r"list\\[(.+)\\]", kind):
        if not isinstance(value, list):
            return [f"{path}: no list"]
        return [fault for one in value for fault in faults(one, inner[1], path)]
    if inner := re.fullmatch(r"dict\\(str, (.+)\\)", kind):
        return [fault for name, one in value.items() for fault in faults(one, inner[1], f"{path}.{name}")]
    if kind in ("str", "int", "bool"):
        return [] if type(value).__name__ == kind else [f"{path}: {value!r} is no {kind}"]
    model = getattr(models, kind, None) or getattr(client, kind, None)
    if model is None:
        return []  # object, IntOrString
    names = {external: name for name, external in model.attribute_map.items()}
    found = [f"{path}.{name}: unknown to {kind}" for name in value if name not in names]
    return found + [
        fault
        for name, one in value.items() if name in names
        for fault in faults(one, model.openapi_types[names[name]], f"{path}.{name}")
    ]

kinds = {"ServingRuntime": "V1alpha1ServingRuntime", "InferenceService": "V1beta1InferenceService"}
objects = json.load(open(sys.argv[1]))
print(json.dumps([fault for one in objects for fault in faults(one, kinds[one["kind"]], one["kind"])]))
"""

TRAINER = """
import json, sys
from kubeflow_trainer_api import models
for one in json.load(open(sys.argv[1])):
    model = getattr(models, "TrainerV1alpha1" + one["kind"])
    kept = model.from_dict(one).to_dict()  # unknown names are dropped
    assert kept == one, (kept, one)
print("true")
"""


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Each overlay that is there, and two that hold every component; only one of hpa and keda may scale."""
    found = {name: render(MANIFESTS / "overlays" / name) for name in OVERLAYS}
    for scaler, other in (("hpa", "keda"), ("keda", "hpa")):
        names = sorted((name for name in COMPONENTS if name != other), key=lambda name: name == "gpu")
        found[f"all with {scaler}"] = render_with(names, tmp_path_factory.mktemp(scaler))
    return found


@pytest.fixture(scope="module")
def objects(rendered: dict[str, list[Any]]) -> list[Any]:
    """Every object of them, each once."""
    return list({json.dumps(one, sort_keys=True): one for some in rendered.values() for one in some}.values())


def whole(pod: Any, objects: list[Any]) -> Any:
    """What is set for a pod as a whole; KServe takes it from the InferenceService and not from the runtime."""
    return find(objects, "InferenceService", "tuneserve")["spec"]["predictor"] if "protocolVersions" in pod else pod


def filled_in(environment: dict[str, str]) -> dict[str, str]:
    """With the InferenceService's name where KServe puts it."""
    return {name: value.replace("{{.Name}}", "tuneserve") for name, value in environment.items()}


def write(folder: Path, objects: list[Any]) -> str:
    path = folder / "objects.json"
    path.write_text(json.dumps(objects))
    return str(path)


def test_kubernetes_finds_nothing_wrong(client: Client, objects: list[Any], tmp_path: Path) -> None:
    own = [one for one in objects if one["kind"] not in FOREIGN]
    assert client("kubernetes", VALIDATE, write(tmp_path, own), *VERSIONS) == []
    wrong = [one | {"sepc": {}} for one in own if one["kind"] == "Deployment"][:1]
    assert len(client("kubernetes", VALIDATE, write(tmp_path, wrong), *VERSIONS)) == len(VERSIONS)


def test_kserve_finds_nothing_wrong(client: Client, objects: list[Any], tmp_path: Path) -> None:
    own = [one for one in objects if one["kind"] in KSERVES]
    assert sorted(one["kind"] for one in own) == KSERVES
    assert client("kserve", KSERVE, write(tmp_path, own)) == []
    wrong = [one | {"spec": one["spec"] | {"containres": []}} for one in own]
    assert len(client("kserve", KSERVE, write(tmp_path, wrong))) == len(wrong)


def test_the_kubeflow_trainer_finds_nothing_wrong(client: Client, objects: list[Any], tmp_path: Path) -> None:
    own = [one for one in objects if one["kind"] in TRAINERS]
    assert sorted(one["kind"] for one in own) == TRAINERS
    assert client("kubernetes", TRAINER, write(tmp_path, own)) is True
    runtime = find(own, "TrainingRuntime", find(own, "TrainJob", "train-nodes")["spec"]["runtimeRef"]["name"])
    [job] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    [container] = job["template"]["spec"]["template"]["spec"]["containers"]
    assert (job["name"], container["name"]) == ("node", "node")  # where the controller puts PET_*
    assert job["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}


CHECKOV = """
import json, os, subprocess, sys
command = ["-m", "checkov.main", "-f", sys.argv[1], "--framework", "kubernetes", "--skip-download", "-o", "json"]
done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
report = json.loads(done.stdout)
print(json.dumps({
    "failed": [f"{one['check_id']} {one['resource']}" for one in report["results"]["failed_checks"]],
    "skipped": [one["check_result"]["suppress_comment"] for one in report["results"]["skipped_checks"]],
    "passed": report["summary"]["passed"],
}))
"""


def test_checkov_finds_nothing_that_is_not_explained(client: Client, objects: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "objects.yaml"
    path.write_text(yaml.safe_dump_all(objects))
    found = client("checkov", CHECKOV, str(path), timeout_s=300)
    assert found["failed"] == []
    assert found["passed"] > 100
    assert all(len(reason) > 20 for reason in found["skipped"])


def test_every_pod_is_hardened(rendered: dict[str, list[Any]]) -> None:
    for objects in rendered.values():
        for name, pod in pods(objects):
            predictor = (
                find(objects, "InferenceService", "tuneserve")["spec"]["predictor"] if "Serving" in name else pod
            )
            assert predictor["automountServiceAccountToken"] is False, name
            security = predictor["securityContext"]
            assert security["runAsNonRoot"] is True, name
            assert min(security["runAsUser"], security["runAsGroup"], security["fsGroup"]) >= 10000, name
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
            for container in containers(pod):
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                }, name
                for kind in ("requests", "limits"):
                    assert {"cpu", "memory"} <= container["resources"][kind].keys(), name


def test_what_is_written_is_mounted(rendered: dict[str, list[Any]]) -> None:
    dockerfile = (PROJECT / "production" / "Dockerfile").read_text()
    [made] = re.findall(r"install -d .*? ((?:/[a-z]+ ?)+)$", dockerfile, re.MULTILINE)
    folders = {"/tmp", *made.split()} - {"/resources"}  # where base models may be mounted; nothing is written there
    for objects in rendered.values():
        for name, pod in pods(objects):
            mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
            if name.startswith("ServingRuntime"):
                mounts.add("/models")  # MODEL_PATH is below /mnt/models, which KServe mounts
            assert folders <= mounts, name
            volumes = {volume["name"] for volume in pod["volumes"]}
            for container in containers(pod):
                assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, name


def test_every_variable_is_a_setting(rendered: dict[str, list[Any]]) -> None:
    for objects in rendered.values():
        for one in objects:
            assert set(one.get("data", {})) <= SETTINGS, one["metadata"]["name"]
        for name, pod in pods(objects):
            for container in containers(pod):
                values = {variable["name"]: variable.get("value", "") for variable in container.get("env", [])}
                assert values.keys() <= SETTINGS, name
                Settings.from_environ(filled_in(values))


def test_image_ports_and_paths_are_the_images_own(rendered: dict[str, list[Any]]) -> None:
    for objects in rendered.values():
        for name, pod in pods(objects):
            assert {one["image"] for one in containers(pod)} == {f"tuneserve:{tuneserve.__version__}"}, name
            environment = {one["name"]: one.get("value", "") for one in pod["containers"][0].get("env", [])}
            port = Settings.from_environ(filled_in(environment)).port
            for declared in pod["containers"][0].get("ports", []):
                assert declared["containerPort"] == port
                policy = find(objects, "NetworkPolicy", "serve")["spec"]["ingress"][0]
                assert policy["ports"] == [{"port": port}]
    assert f"EXPOSE {Settings().port}" in (PROJECT / "production" / "Dockerfile").read_text()


def test_a_pod_is_given_time_to_drain_and_to_save_a_checkpoint(rendered: dict[str, list[Any]]) -> None:
    for objects in rendered.values():
        for name, pod in pods(objects):
            container = pod["containers"][0]
            sleep_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            assert whole(pod, objects)["terminationGracePeriodSeconds"] >= sleep_s + LEAVE_S, name
            assert bool(sleep_s) is (container["args"] == ["serve"]), name
            probes = {kind: probe["httpGet"]["path"] for kind, probe in container.items() if kind.endswith("Probe")}
            if sleep_s:
                assert probes == {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
            else:
                assert probes == {}, name


def test_every_pod_has_a_network_policy(rendered: dict[str, list[Any]]) -> None:
    for objects in rendered.values():
        covered: set[str] = set()
        for policy in (one["spec"]["podSelector"] for one in objects if one["kind"] == "NetworkPolicy"):
            covered |= set(policy.get("matchLabels", {}).values())
            covered |= {value for rule in policy.get("matchExpressions", []) for value in rule["values"]}
        text = json.dumps(objects)
        assert set(re.findall(r'"app.kubernetes.io/component": "([a-z]+)"', text)) <= covered


def test_the_cronjob_trains_as_the_job_does(rendered: dict[str, list[Any]]) -> None:
    for scaler in ("hpa", "keda"):
        objects = rendered[f"all with {scaler}"]
        job = find(objects, "Job", "train")["spec"]
        again = find(objects, "CronJob", "retrain")["spec"]["jobTemplate"]["spec"]
        assert again["template"]["spec"] == job["template"]["spec"]
        assert again["podFailurePolicy"] == job["podFailurePolicy"]


def test_what_would_only_fail_again_ends_a_job(rendered: dict[str, list[Any]]) -> None:
    codes = {error.exit_code for error in vars(errors).values() if hasattr(error, "exit_code")}
    objects = rendered["all with keda"]
    for job in (one["spec"] for one in objects if one["kind"] == "Job"):
        ignored, failed = job["podFailurePolicy"]["rules"]
        assert ignored == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
        assert set(failed["onExitCodes"]["values"]) < codes
        assert failed["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    score = find(objects, "Job", "score")["spec"]
    shards = {one["name"]: one["value"] for one in score["template"]["spec"]["containers"][0]["env"]}["SHARDS"]
    assert score["completionMode"] == "Indexed"
    assert score["completions"] == int(shards)


def test_one_scaler_alone_sets_the_number_of_servers(rendered: dict[str, list[Any]]) -> None:
    for name, objects in rendered.items():
        if name != "kserve":
            assert ("replicas" in find(objects, "Deployment", "serve")["spec"]) is not name.startswith("all"), name


def test_every_metric_that_is_named_exists(objects: list[Any]) -> None:
    named = [one for one in objects if one["kind"] in ("ScaledObject", "HorizontalPodAutoscaler")]
    assert [METRIC.findall(json.dumps(one)) for one in named] == [["tuneserve_queue_tokens"]] * 2
    assert "tuneserve_queue_tokens" in METRIC.findall(Metrics().render().decode())


def test_the_readme_names_every_overlay_and_component() -> None:
    readme = (MANIFESTS / "README.md").read_text()
    for name in [*OVERLAYS, *COMPONENTS]:
        assert f"`{name}`" in readme, name
