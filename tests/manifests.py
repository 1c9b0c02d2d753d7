"""The Kubernetes manifests, rendered as `kubectl apply -k` renders them."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuneserve.settings import PROJECT

MANIFESTS = PROJECT / "production" / "deploy" / "kubernetes"
OVERLAYS = sorted(folder.name for folder in (MANIFESTS / "overlays").iterdir())
COMPONENTS = sorted(folder.name for folder in (MANIFESTS / "components").iterdir())


def render(folder: Path) -> list[Any]:
    """The objects of a kustomization."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def render_with(components: list[str], folder: Path) -> list[Any]:
    """The base with these components, put together by an overlay in `folder`, as a user does."""
    for part in ("base", "components"):
        shutil.copytree(MANIFESTS / part, folder / part, dirs_exist_ok=True)
    own = folder / "overlays" / "own"
    own.mkdir(parents=True, exist_ok=True)
    content = (MANIFESTS / "overlays" / "cpu" / "kustomization.yaml").read_text()
    kustomization = yaml.safe_load(content) | {"components": [f"../../components/{name}" for name in components]}
    (own / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return render(own)


def find(objects: list[Any], kind: str, name: str) -> Any:
    """The one object of this kind and name."""
    [found] = [one for one in objects if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def pods(objects: list[Any]) -> Iterator[tuple[str, Any]]:
    """The pods that the objects describe: their object's kind and name, and their specification."""
    for one in objects:
        name = f"{one['kind']}/{one['metadata']['name']}"
        match one:
            case {"kind": "Deployment" | "Job", "spec": {"template": {"spec": pod}}}:
                yield name, pod
            case {"kind": "CronJob", "spec": {"jobTemplate": {"spec": {"template": {"spec": pod}}}}}:
                yield name, pod
            case {"kind": "TrainingRuntime", "spec": {"template": {"spec": {"replicatedJobs": [job]}}}}:
                yield name, job["template"]["spec"]["template"]["spec"]
            case {"kind": "ServingRuntime", "spec": pod}:
                yield name, pod


def containers(pod: Any) -> list[Any]:
    """All containers of a pod."""
    return [*pod.get("initContainers", []), *pod["containers"]]
