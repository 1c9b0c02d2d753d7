"""The versions of the store: what each is, which one answers, and what changes that by hand."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from tuneserve.artifact import Version
from tuneserve.errors import ConflictError, ForbiddenError, NotFoundError, StoreError
from tuneserve.lifecycle.decision import read_decision
from tuneserve.lifecycle.evidence import read_examples
from tuneserve.lifecycle.store import Store
from tuneserve.serving.http.schemas import ChampionResponse, Examples, Problem, PromoteRequest, RollbackRequest
from tuneserve.serving.service import Service
from tuneserve.tasks.catalog import task_of
from tuneserve.tasks.task import Task

UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "There is no version of this name."}}
CHANGE_PROBLEMS: dict[int | str, dict[str, Any]] = {
    403: {"model": Problem, "description": "The server has no API key, without which nobody may change the champion."},
    409: {"model": Problem, "description": "The version is damaged, or the store has changed meanwhile."},
}


def version_routes(service: Service, store: Store, task: Task, *, keyed: bool) -> APIRouter:
    """Of a server of a store; `keyed` says whether it has an API key, without which nobody may change anything."""
    routes = APIRouter(tags=["versions"])

    def find(name: str) -> Version:
        try:
            return store.version(name)
        except StoreError:
            raise NotFoundError(f"There is no version {name!r}; GET /versions lists them.") from None

    def require_key() -> None:
        if not keyed:
            raise ForbiddenError("Which version answers can only be changed where API_KEY is set.")

    @routes.get("/versions")
    def versions() -> dict[str, Any]:
        """All versions, newest first, each with its figures and what was decided about it."""
        roles = _roles(store)
        found = [summary(one, roles) for one in reversed(store.versions())]
        return {"answers": service.version_id(), "versions": found}

    @routes.get("/versions/{name}", responses=UNKNOWN)
    def one_version(name: str) -> dict[str, Any]:
        """One version: its metadata, its role and the whole decision about it."""
        version = find(name)
        return {**summary(version, _roles(store)), "metadata": version.metadata}

    @routes.get("/examples")
    def examples() -> Examples:
        """A few short texts of the test of the version that answers, to try it with."""
        name = service.version_id()
        return Examples(texts=read_examples(store.evidence_folder / name) if name is not None else [])

    @routes.post("/promote", responses={**UNKNOWN, **CHANGE_PROBLEMS})
    def promote(wanted: PromoteRequest) -> ChampionResponse:
        """Let a version answer, whatever the gate decided."""
        require_key()
        version = find(wanted.version)
        try:
            if (other := task_of(version)) is not task:
                raise ConflictError(f"Version {version.id} is for the task {other.name!r}; this server is not.")
            if store.champion_id() == version.id:
                raise ConflictError(f"Version {version.id} is the champion already.")
            store.promote(version.id)
        except StoreError as error:
            raise ConflictError(str(error)) from None
        return ChampionResponse(champion=version.id)

    @routes.post("/rollback", responses=CHANGE_PROBLEMS)
    def rollback(wanted: RollbackRequest) -> ChampionResponse:
        """Withdraw the version that answers, for good, and return to the one before it."""
        require_key()
        try:
            version, withdrawn = store.rollback(wanted.version)
        except StoreError as error:
            raise ConflictError(str(error)) from None
        return ChampionResponse(champion=version.id, withdrawn=withdrawn)

    return routes


def summary(version: Version, roles: Mapping[str, str]) -> dict[str, Any]:
    """What a list says of a version, with its role if it has one."""
    metadata = version.metadata
    decision = read_decision(version)
    return {
        "id": version.id,
        "role": roles.get(version.id),
        "created_at": metadata.get("created_at"),
        "duration_s": metadata.get("duration_s"),
        "labels": version.labels,
        "test": _figures(metadata),
        "train_texts": _train_texts(metadata),
        "decision": asdict(decision) if decision is not None else None,
        **({"abstention": said} if (said := metadata.get("abstention")) else {}),
    }


def _roles(store: Store) -> dict[str, str]:
    roles = {before.id: "previous"} if (before := store.previous()) else {}
    for role, pointer in (("challenger", store.challenger_id), ("champion", store.champion_id)):
        with suppress(StoreError):
            if (name := pointer()) is not None:
                roles[name] = role
    return roles


def _figures(metadata: Mapping[str, Any]) -> dict[str, Any]:
    test = metadata.get("metrics", {}).get("test", {})
    return {name: test[name] for name in ("accuracy", "macro_f1", "log_loss", "ece", "count") if name in test}


def _train_texts(metadata: Mapping[str, Any]) -> int | None:
    counts = metadata.get("data", {}).get("counts", {}).get("train", {})
    return sum(counts.values()) or None
