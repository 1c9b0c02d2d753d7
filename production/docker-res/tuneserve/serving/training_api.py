"""Routes of a server that also trains: ask for a training, and see how it goes."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Response

from tuneserve.errors import ForbiddenError, NotFoundError
from tuneserve.lifecycle.trainer import Job, Trainer


def training_routes(trainer: Trainer, *, keyed: bool) -> APIRouter:
    """The routes; `keyed` says whether the server has an API key, without which nobody may start a training."""
    routes = APIRouter(tags=["training"])

    @routes.post("/retrain", status_code=202)
    def retrain(response: Response) -> dict[str, Any]:
        """Start a training beside the model that answers; 409 while one is running."""
        if not keyed:
            raise ForbiddenError("A training can only be asked for where API_KEY is set.")
        job = trainer.start("POST /retrain")
        response.headers["Location"] = f"/jobs/{job.id}"
        return asdict(job)

    @routes.get("/jobs")
    def jobs() -> list[dict[str, Any]]:
        """The trainings that this store's servers have started, newest first."""
        return [_shown(job, trainer) for job in trainer.jobs()]

    @routes.get("/jobs/{name}")
    def one_job(name: str) -> dict[str, Any]:
        """One training: how far it is, or how it ended."""
        job = trainer.job(name)
        if job is None:
            raise NotFoundError(f"There is no job {name!r}; GET /jobs lists them.")
        return _shown(job, trainer)

    return routes


def _shown(job: Job, trainer: Trainer) -> dict[str, Any]:
    running = trainer.running
    return asdict(job) | ({"progress": trainer.progress()} if running is not None and running.id == job.id else {})
