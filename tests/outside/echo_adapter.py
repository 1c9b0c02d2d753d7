"""A platform that the package does not know: it wants `GET /ping`, and `POST /invocations` with instances."""

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from tuneserve.errors import TuneserveError
from tuneserve.serving.http.routes import INFERENCE
from tuneserve.serving.service import Service


class Instances(BaseModel):
    instances: list[str]


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=[INFERENCE])

    @router.get("/ping")
    async def ping(response: Response) -> None:
        response.status_code = 200 if service.phase() == "ready" else 503

    @router.post("/invocations")
    async def invoke(wanted: Instances, request: Request) -> dict[str, list[str]]:
        answers = await service.answer(wanted.instances, request_id=request.state.request_id)
        return {"predictions": [str(one) if isinstance(one, TuneserveError) else shown(one) for one in answers]}

    return router


def shown(answer) -> str:
    return answer.verdict[0] if answer.verdict else answer.text
