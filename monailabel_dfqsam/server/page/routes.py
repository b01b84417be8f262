"""The quantization page, `/dfqsam/` on the running server: how the model is, make another, choose one back.

MONAI Label has no way for an app to add routes. These are an `APIRouter` that the app includes into
upstream's FastAPI application when it enters server mode, under upstream's own prefix. A sub-application,
mounted, would bring its own error answers and stay out of the API's documentation; a second port would need a
login and a TLS of its own. Included, the routes have what every endpoint of the server has: `Guard`
before them, and upstream's login with its roles. Upstream's only mount is `/static` and its only catch-all
lies below `/ohif`, so that nothing takes these addresses, whenever they are added.

- Looking needs the role of a user, choosing that of an administrator, as with upstream's own endpoints.
  Starting and stopping are upstream's own: the page calls `POST /train/dfqsam` and `DELETE /train/`.
- The page itself, its style and its script hold nothing of the server's and need no login, because a browser
  sends no token when it opens an address: the script then asks for one.
- No address names a file: a model is named by its key, 16 hexadecimal digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse

from monailabel_dfqsam.server.gate.guard import Refusal
from monailabel_dfqsam.server.page.overview import Overview
from monailabel_dfqsam.server.runs.folder import is_key
from monailabel_dfqsam.server.runs.models import ChoiceError, Models
from monailabel_dfqsam.server.runs.queue import RunQueue
from monailabel_dfqsam.server.settings import Settings
from monailabel_dfqsam.server.upstream.login import FOR_ADMINS, FOR_USERS, admin, user

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A report is one page with its style and pictures within it, and runs nothing.
_REPORT_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; sandbox"
)
_FILES = {"": ("page.html", "text/html"), "page.css": ("page.css", "text/css"),
          "page.js": ("page.js", "text/javascript")}  # fmt: skip


def router(models: Models, settings: Settings, queue: RunQueue) -> APIRouter:
    """The routes, to be included once into the server that `models` belongs to."""
    routes = APIRouter(prefix="/dfqsam", tags=["DFQ-SAM"])
    overview = Overview(models, settings, queue)
    for name in _FILES:
        _serve(routes, name)

    @routes.get(
        "/status", summary=f"{FOR_USERS}How the model is, and how quantizations went", dependencies=user()
    )
    def status() -> dict[str, Any]:
        return overview.status()

    @routes.get("/runs/{run}", summary=f"{FOR_USERS}How a run of a trainer is", dependencies=user())
    def run(run: str) -> dict[str, Any]:
        found = models.folder.run(run)
        if found is None:
            raise Refusal(404, "there is no such run, or no more: the id is what POST /train/ answered")
        return found.told()

    @routes.get("/pictures/{key}", summary=f"{FOR_USERS}What a model was calibrated on", dependencies=user())
    def pictures(key: str) -> dict[str, Any]:
        found = overview.pictures(_checked(key))
        if found is None:
            raise Refusal(404, "no report was kept of this model, and so no pictures")
        return found

    @routes.get("/report/{key}", summary=f"{FOR_USERS}A model's report", dependencies=user())
    def report(key: str) -> FileResponse:
        path = models.folder.report(_checked(key))
        if not path.is_file():
            raise Refusal(404, "no report was kept of this model")
        return FileResponse(path, media_type="text/html; charset=utf-8", headers=_headers(_REPORT_POLICY))

    @routes.post(
        "/choose/{key}", summary=f"{FOR_ADMINS}Serve a model that was made earlier", dependencies=admin()
    )
    def choose(key: str) -> Mapping[str, Any]:
        if not models.folder.artifact(_checked(key)).is_file():
            raise Refusal(404, "there is no such model on this server")
        try:
            models.choose(key)
        except ChoiceError as error:
            raise Refusal(409, str(error)) from None
        return models.describe()

    return routes


def _serve(routes: APIRouter, name: str) -> None:
    file, kind = _FILES[name]
    path = Path(__file__).with_name(file)

    def answer() -> FileResponse:
        return FileResponse(path, media_type=f"{kind}; charset=utf-8", headers=_headers(_POLICY))

    routes.add_api_route(f"/{name}", answer, methods=["GET"], include_in_schema=False)


def _checked(key: str) -> str:
    if not is_key(key):
        raise Refusal(400, "a model is named by its key, 16 hexadecimal digits")
    return key


def _headers(policy: str) -> dict[str, str]:
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",  # a page must not meet the script of another version
    }
