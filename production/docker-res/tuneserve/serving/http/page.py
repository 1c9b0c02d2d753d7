"""The page: the files of `tuneserve/web`, served as they are: no build step, nothing from elsewhere."""

import hashlib
from functools import cache
from html import escape
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

import tuneserve
from tuneserve.errors import NotFoundError
from tuneserve.serving.http.viewer import POLICY

FOLDER = Path(tuneserve.__file__).with_name("web")
KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = (
    "api.js",
    "ask.js",
    "charts.js",
    "dom.js",
    "icon.svg",
    "label.js",
    "model.js",
    "page.js",
    "style.css",
    "table.js",
    "training.js",
)
PATHS = tuple(f"/page/{name}" for name in FILES)


def page_routes() -> APIRouter:
    """The files that `/` names; a browser asks each time whether its copy is still right, since an image may be new."""
    routes = APIRouter(include_in_schema=False)
    contents = {name: (FOLDER / name).read_bytes() for name in FILES}
    tags = {name: f'"{hashlib.sha256(content).hexdigest()[:32]}"' for name, content in contents.items()}

    @routes.get("/page/{name}")
    async def file(name: str, request: Request) -> Response:
        if name not in contents:
            raise NotFoundError(f"There is no file {name!r} here.")
        headers = {"Cache-Control": "no-cache", "ETag": tags[name]}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        return Response(contents[name], media_type=KINDS[Path(name).suffix], headers=headers)

    return routes


@cache
def _index() -> str:
    return (FOLDER / "index.html").read_text(encoding="utf-8")


def index_page(root: str) -> HTMLResponse:
    """The page itself, for a server whose paths begin with `root`; its policy lets it load its own files alone."""
    content = _index().replace("{root}", escape(root))
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache", "Vary": "Accept"}
    return HTMLResponse(content, headers=headers)
