"""MONAI Label's pages and its way to the archive, put right.

- The front page, the API's and the log's show nothing but what other hosts send: the quantization page is in
  front, the log is text.
- Lines of the log without bound, a folder of OHIF's page, no archive: faults of the server.
- The way to the archive drops the query, and holds up all other requests while the archive answers: it has
  threads of its own.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Coroutine
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI
from monailabel.config import settings as upstream
from monailabel.endpoints import logs as logs_endpoint
from monailabel.endpoints import ohif as ohif_endpoint
from monailabel.endpoints import proxy as proxy_endpoint
from starlette.requests import Request
from starlette.responses import RedirectResponse

from monailabel_dfqsam.server.gate.guard import Refusal
from monailabel_dfqsam.server.upstream.archive import failing, is_archive, limit_proxy
from monailabel_dfqsam.server.upstream.threads import finished

_MAX_LOG_LINES = 100_000
# A viewer asks for some dozens of images at once; those beyond this wait without a thread.
_PROXIED = 16


def repair_proxy() -> None:
    """Replaces upstream's function; call it once."""
    proxy_dicom, few = proxy_endpoint.proxy_dicom, CapacityLimiter(_PROXIED)

    @functools.wraps(proxy_dicom)
    async def in_thread(request: Request, op: str, path: str) -> Any:
        if not is_archive():
            raise Refusal(404, "the studies of this server are a folder, not a DICOMweb archive")
        query = request.url.query
        # The request keeps its body, and what follows awaits nothing any more.
        await request.body()
        answered = proxy_dicom(request, op, f"{path}?{query}" if query else path)
        return await to_thread.run_sync(_asked, answered, limiter=few)

    limit_proxy()
    proxy_endpoint.proxy_dicom = in_thread


def _asked(answered: Coroutine[Any, Any, Any]) -> Any:
    with failing():
        return finished(answered)


def repair_pages(app: FastAPI) -> None:
    """Replaces upstream's pages; call it once."""
    # Both show what they load from other hosts, and nothing without it.
    app.router.routes[:] = [
        route for route in app.router.routes if getattr(route, "path", "") not in ("/", "/docs")
    ]
    front = f"{upstream.MONAI_LABEL_API_STR}/dfqsam/"
    app.add_api_route("/", lambda: RedirectResponse(front), include_in_schema=False)
    get_logs, get_ohif = logs_endpoint.get_logs, ohif_endpoint.get_ohif

    @functools.wraps(get_logs)
    def bounded_logs(file: str, lines: int | None, html: bool, text: bool, refresh: int | None) -> Any:
        if not 0 < (lines or 0) <= _MAX_LOG_LINES:
            raise Refusal(400, f"lines must be 1 to {_MAX_LOG_LINES}")
        return get_logs(file, lines, False, True, 0)

    @functools.wraps(get_ohif)
    def file_of_page(path: str) -> Any:
        reply = get_ohif(path)
        if os.path.isdir(reply.path):
            raise Refusal(404, "there is no such page")
        return reply

    logs_endpoint.get_logs, ohif_endpoint.get_ohif = bounded_logs, file_of_page
