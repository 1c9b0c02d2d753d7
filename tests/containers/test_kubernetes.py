"""What the manifests make of the image: containers started, probed and ended as the kubelet would, without a cluster.

Of a rendered pod each container gets its command, environment, user, mounts, limits and read-only root, and its end is
preStop, SIGTERM and the grace period. Claims are volumes that are group-owned by fsGroup, emptyDirs are tmpfs.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import tiny
from manifests import MANIFESTS, find, pods, render, render_with

from tuneserve.serving.http.server import LEAVE_S

from .conftest import Job, eventually

HASTY = {"LR": "0.003", "N_EPOCHS": "1", "BATCH_SIZE": "16", "TRAIN_BODY": "0", "NUM_TRAIN": "64", "NUM_TEST": "32"}
HASTY |= {"MIN_VALID": "0", "MIN_STEPS": "0"}
TINY = {
    "DATASET": "/resources/reviews.csv",
    "BASE_MODEL": "/resources/tiny",
    "NUM_MAX_POSITIONS": "32",
    "TRAIN_BODY": "1",
    "CHECKPOINT_MINUTES": "0.001",
}
ANY_VERSION = {"MAX_ACCURACY_DROP": "1", "MAX_LATENCY_INCREASE": "100"}
KEY = "a-key-of-the-tests"
UNITS = {"Mi": 2**20, "Gi": 2**30}


class Kubelet:
    """Starts the containers of rendered pods."""

    def __init__(
        self, engine: Any, start: Callable[..., Job], volume: Callable[[], str], resources: Path, objects: list[Any]
    ) -> None:
        self._engine, self._start, self._volume, self._resources = engine, start, volume, resources
        self.objects, self.pods = objects, dict(pods(objects))
        self._claims: dict[str, str] = {}

    def elsewhere(self, objects: list[Any] | None = None) -> "Kubelet":
        """A cluster of its own, with other manifests where they are given, whose claims are empty."""
        return Kubelet(self._engine, self._start, self._volume, self._resources, objects or self.objects)

    def start(self, pod: str, container: str, environment: dict[str, str] | None = None, **options: Any) -> Job:
        """A container of a pod; `environment` is what the user has put into job.env, or a controller has added."""
        spec = self.pods[pod]
        one = next(c for c in [*spec.get("initContainers", []), *spec["containers"]] if c["name"] == container)
        group = spec["securityContext"]["fsGroup"]
        assert one["securityContext"]["readOnlyRootFilesystem"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        binds: dict[str, Any] = {str(self._resources): {"bind": "/resources", "mode": "ro"}}
        tmpfs = {}
        for mount in one["volumeMounts"]:
            match volumes[mount["name"]]:
                case {"persistentVolumeClaim": {"claimName": claim}}:
                    mode = "ro" if mount.get("readOnly") else "rw"
                    binds[self.claim(claim, group)] = {"bind": mount["mountPath"], "mode": mode}
                case {"emptyDir": _}:
                    tmpfs[mount["mountPath"]] = f"gid={group},mode=2775"
        limits = one["resources"]["limits"]
        port = next((str(port["containerPort"]) for port in one.get("ports", [])), None)
        return self._start(
            one.get("args"),
            entrypoint=one.get("command"),
            environment=self._environment(one) | (environment or {}),
            user=f"{spec['securityContext']['runAsUser']}:{spec['securityContext']['runAsGroup']}",
            group_add=[str(group)],
            read_only=True,
            cap_drop=one["securityContext"]["capabilities"]["drop"],
            security_opt=["no-new-privileges"],
            mem_limit=bytes_of(limits["memory"]),
            nano_cpus=int(min(cores_of(limits["cpu"]), self._engine.info()["NCPU"]) * 1e9),
            volumes=binds,
            tmpfs=tmpfs,
            ports={f"{port}/tcp": ("127.0.0.1", None)} if port else {},
            **options,
        )

    def probe(self, job: Job, pod: str, kind: str) -> None:
        """Ask until the probe succeeds, as often as it may fail."""
        probe = self.pods[pod]["containers"][0][kind]
        path = probe["httpGet"]["path"]
        patience_s = max(120, probe["periodSeconds"] * probe["failureThreshold"])
        assert eventually(lambda: job.get(path)[0] == 200, within_s=patience_s), job.log

    def end(self, job: Job, pod: str) -> int:
        """PreStop, SIGTERM, SIGKILL when the grace period is over; the exit code."""
        spec = self.pods[pod]
        before_s = spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        # The sleep itself is left out: what counts is what is left of the grace period after it.
        job.container.stop(timeout=spec["terminationGracePeriodSeconds"] - before_s)
        return job.ends()

    def claim(self, name: str, group: int = 10001) -> str:
        """The volume behind a claim, with fsGroup applied to it."""
        if name not in self._claims:
            self._claims[name] = self._volume()
            own = self._start(
                # A new disk has its folder of lost files, which only root may read.
                ["-c", f"mkdir -m 0700 /claim/lost+found && chgrp {group} /claim && chmod 2775 /claim"],
                entrypoint="/bin/sh",
                user="0",
                volumes={self._claims[name]: {"bind": "/claim"}},
                ports={},
            )
            assert own.ends() == 0, own.log
        return self._claims[name]

    def _environment(self, container: Any) -> dict[str, str]:
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            if "configMapRef" in source:
                found |= find(self.objects, "ConfigMap", source["configMapRef"]["name"])["data"]
        for variable in container.get("env", []):
            found[variable["name"]] = variable.get("value", KEY)  # the Secret has one
        return found


def bytes_of(quantity: str) -> int:
    """2Gi → 2147483648."""
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def cores_of(quantity: str) -> float:
    """100m → 0.1."""
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


@pytest.fixture(scope="module")
def kubelet(
    engine: Any, start: Callable[..., Job], volume: Callable[[], str], tmp_path_factory: pytest.TempPathFactory
) -> Kubelet:
    folder = tmp_path_factory.mktemp("kubernetes")
    for file in tiny.make_base_model(folder / "resources" / "tiny").iterdir():
        file.chmod(0o644)  # safetensors' own files are the writer's alone
    tiny.write_csv(folder / "resources" / "reviews.csv", tiny.sentences(160))
    objects = render_with(["train", "retrain", "score", "trainjob"], folder / "manifests")
    return Kubelet(engine, start, volume, folder / "resources", objects)


@pytest.fixture(scope="module")
def served(kubelet: Kubelet) -> Job:
    """A server that has waited for the first model, which the Job has trained."""
    waiting = kubelet.start("Deployment/serve", "first-model")
    trained = kubelet.start("Job/train", "train", HASTY)
    assert trained.ends() == 0, trained.log
    assert waiting.ends() == 0, waiting.log
    job = kubelet.start("Deployment/serve", "serve")
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        kubelet.probe(job, "Deployment/serve", kind)
    return job


def test_the_deployment_serves_what_the_job_has_trained(served: Job) -> None:
    ask = {"text": "A warm and clever film."}
    assert served.post("/inference", ask)[0] == 401
    status, answer = served.post("/inference", ask, {"X-API-Key": KEY})
    assert (status, answer["label"] in answer["scores"]) == (200, True)
    mine = served.container.exec_run(["id"]).output.decode()
    assert re.match(r"uid=10001.* gid=10001", mine), mine
    for path in ("/production", "/models", "/var"):
        assert served.container.exec_run(["touch", f"{path}/x"]).exit_code != 0, path
    assert served.container.exec_run(["touch", "/tmp/x", "/data/x", "/logs/x"]).exit_code == 0


def test_the_server_swaps_in_what_the_cronjob_trains(kubelet: Kubelet, served: Job) -> None:
    trained = kubelet.start("CronJob/retrain", "train", HASTY | TINY | ANY_VERSION)
    assert trained.ends() == 0, trained.log
    version = trained.read("/models/champion").strip()
    assert eventually(lambda: served.get("/readyz")[1].get("model_version") == version, within_s=300), served.log


def test_a_version_that_the_gate_refuses_ends_the_job(kubelet: Kubelet, served: Job) -> None:
    job = find(kubelet.objects, "CronJob", "retrain")["spec"]["jobTemplate"]["spec"]
    [rule] = [rule for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    refused = kubelet.start("CronJob/retrain", "train", HASTY | TINY | {"LR": "1e-6", "MIN_ACCURACY": "1"})
    assert refused.ends() == 10, refused.log
    assert 10 in rule["onExitCodes"]["values"]


def test_each_pod_of_the_indexed_job_scores_its_share(kubelet: Kubelet, served: Job, tmp_path: Path) -> None:
    job = find(kubelet.objects, "Job", "score")
    count = job["spec"]["completions"]
    scored = [kubelet.start("Job/score", "score", {"JOB_COMPLETION_INDEX": str(index)}) for index in range(count)]
    for one in scored:
        assert one.ends() == 0, one.log
    assert "label" in scored[0].read("/rows/scored/part-00000-00000000.csv").splitlines()[0]


def test_a_training_that_is_put_out_resumes(kubelet: Kubelet) -> None:
    longer = HASTY | TINY | ANY_VERSION | {"N_EPOCHS": "60", "SEED": "9"}
    job = kubelet.start("Job/train", "train", longer)
    job.says("epoch=2;")
    assert kubelet.end(job, "Job/train") == 143, job.log
    again = kubelet.start("Job/train", "train", longer)
    assert again.ends() == 0, again.log
    assert "resuming in epoch" in again.log


def test_kserve_finds_the_store_where_it_mounts_it(kubelet: Kubelet, served: Job) -> None:
    """KServe adds to its runtime what the storage URI says, and the predictor's security context."""
    objects = render(MANIFESTS / "overlays" / "kserve")
    predictor = find(objects, "InferenceService", "tuneserve")["spec"]["predictor"]
    assert predictor["model"]["storageUri"] == "pvc://models"
    kserve = kubelet.elsewhere(objects)
    kserve._claims = kubelet._claims
    spec = kserve.pods["ServingRuntime/tuneserve"]
    spec |= {key: predictor[key] for key in ("securityContext", "terminationGracePeriodSeconds")}
    spec["volumes"].append({"name": "model", "persistentVolumeClaim": {"claimName": "models"}})
    mount = {"name": "model", "mountPath": "/mnt/models", "readOnly": True}
    spec["containers"][0]["volumeMounts"].append(mount)
    job = kserve.start("ServingRuntime/tuneserve", "kserve-container", {"MODEL_NAME": "tuneserve"})
    for kind in ("startupProbe", "readinessProbe"):
        kserve.probe(job, "ServingRuntime/tuneserve", kind)
    assert kserve.end(job, "ServingRuntime/tuneserve") == 0, job.log


def commands(job: Job) -> list[str]:
    """The programs that run in a container."""
    return [row[1] for row in job.container.top(ps_args="-eo pid,comm")["Processes"]]


@pytest.mark.parametrize(("container", "code"), [("first-model", 143), ("serve", 0)])
def test_a_pod_ends_within_its_grace_period(kubelet: Kubelet, served: Job, container: str, code: int) -> None:
    spec = kubelet.pods["Deployment/serve"]
    grace_s = spec["terminationGracePeriodSeconds"]
    assert grace_s > spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"] + LEAVE_S
    if container == "first-model":
        job = kubelet.elsewhere().start("Deployment/serve", container)
        # Before it sleeps the shell has no trap, and a process 1 without one passes signals over.
        assert eventually(lambda: "sleep" in commands(job), within_s=30)
    else:
        job = served
    assert kubelet.end(job, "Deployment/serve") == code, job.log


@pytest.fixture
def network(engine: Any, jobs: list[Job]) -> Iterator[str]:
    """Where the two nodes find each other by name."""
    made = engine.networks.create(f"tuneserve-test-{uuid4().hex}")
    yield made.name
    for job in jobs:
        job.container.reload()
        if made.name in job.container.attrs["NetworkSettings"]["Networks"]:
            made.disconnect(job.container, force=True)
    made.remove()


def test_a_trainjob_one_of_whose_nodes_is_killed_ends_with_the_same_weights(kubelet: Kubelet, network: str) -> None:
    learns = HASTY | TINY | {"N_EPOCHS": "60"}
    pod = "TrainingRuntime/tuneserve"
    runtime = find(kubelet.objects, "TrainingRuntime", "tuneserve")["spec"]
    trainer = find(kubelet.objects, "TrainJob", "train-nodes")["spec"]["trainer"]
    assert trainer["numNodes"] == runtime["mlPolicy"]["numNodes"] == 2
    assert runtime["template"]["spec"]["failurePolicy"]["maxRestarts"] > 0

    def nodes(cluster: Kubelet, name: str) -> list[Job]:
        """Both nodes, with what the Trainer's controller puts into the container `node`."""
        name += f"-{uuid4().hex[:8]}"
        return [
            cluster.start(
                pod,
                "node",
                learns
                | {
                    "PET_NNODES": "2",
                    "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
                    "PET_NODE_RANK": str(rank),
                    "PET_MASTER_ADDR": f"{name}-node-0-0",
                    "PET_MASTER_PORT": "29400",
                },
                hostname=f"{name}-node-0-{rank}",
                name=f"{name}-node-0-{rank}",
                network=network,
            )
            for rank in range(2)
        ]

    def weights(leader: Job) -> str:
        version = leader.read("/models/champion").strip()
        chunks, _ = leader.container.get_archive(f"/models/versions/{version}/model.safetensors")
        return hashlib.sha256(b"".join(chunks)[512:]).hexdigest()

    disturbed = kubelet.elsewhere()
    leader, other = nodes(disturbed, "killed")
    leader.says("epoch=2;")
    other.container.kill("SIGKILL")
    assert other.ends() == 137
    # JobSet's failure policy: all pods go, and come again.
    disturbed.end(leader, pod)
    again, also = nodes(disturbed, "restarted")
    assert again.ends() == 0, again.log
    assert also.ends() == 0, also.log
    assert "resuming in epoch" in again.log

    calm = nodes(kubelet.elsewhere(), "calm")
    assert [node.ends() for node in calm] == [0, 0], calm[0].log
    assert weights(again) == weights(calm[0])
