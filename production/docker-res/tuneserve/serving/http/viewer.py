"""`/docs`: Swagger UI over the API's description, from files of the image, since a browser may have no way out.

The files are those in the package fastapi-offline, of which nothing else is used.
"""

from html import escape
from importlib.metadata import distribution
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, HTMLResponse, Response

from tuneserve.errors import NotFoundError

FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
START = "start.js"
PATHS = ("/docs", *(f"/docs/{name}" for name in (*FILES, START)))

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tuneserve</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{root}/docs/swagger-ui.css">
</head>
<body>
<div id="viewer"></div>
<script src="{root}/docs/swagger-ui-bundle.js"></script>
<script src="{root}/docs/start.js"></script>
</body>
</html>
"""

SCRIPT = """SwaggerUIBundle({
  url: new URL("../openapi.json", document.currentScript.src).href,
  dom_id: "#viewer",
  deepLinking: true,
  persistAuthorization: false,
});
"""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def viewer_routes() -> APIRouter:
    """The page, its two files and its script; the policy lets it load nothing else."""
    routes = APIRouter(include_in_schema=False)
    folder = Path(str(distribution("fastapi-offline").locate_file("fastapi_offline/static")))

    @routes.get("/docs")
    async def page(request: Request) -> HTMLResponse:
        content = PAGE.format(root=escape(request.scope.get("root_path", "")))
        return HTMLResponse(content, headers={"Content-Security-Policy": POLICY})

    @routes.get("/docs/{name}")
    async def file(name: str) -> Response:
        cached = {"Cache-Control": "max-age=86400"}
        if name == START:
            return Response(SCRIPT, media_type="text/javascript", headers=cached)
        if name not in FILES:
            raise NotFoundError(f"There is no file {name!r} here.")
        return FileResponse(folder / name, media_type=FILES[name], headers=cached)

    return routes
