"""How much a request may send, decided by its address and counted while it arrives.

Only uploads may be large, as only they are kept on disk while they are read; everything else is held in
memory. With logins, an upload without a valid token is refused before it is received.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from monailabel_dfqsam.server.gate.guard import Application, Message, Receive, Refusal, Scope, Send, header

MAX_UPLOAD = 4 << 30
"""Bytes: the largest volume that is read (`segmentation.image.MAX_VOXELS`), of 16 bit and not compressed."""
MAX_PROXIED = 256 << 20
"""Bytes on the way to the archive, which are held in memory: several times a large DICOM SEG."""
MAX_OTHER = 1 << 20
"""Bytes of JSON or of a form without files."""

_UPLOADS = (
    ("POST", re.compile(r"/infer/[^/]+$")),
    ("PUT", re.compile(r"/datastore/(image|label)?$")),
    ("PUT", re.compile(r"/session/?$")),
)
_PROXIED = re.compile(r"/proxy/dicom/")


class BodyLimit:
    """ASGI middleware of the limits above; stands behind `Guard`, which answers what it raises."""

    def __init__(self, app: Application, max_upload: int, is_known: Callable[[str], bool]) -> None:
        """Wraps `app`.

        Args:
            max_upload: bytes of an upload with all its files.
            is_known: whether an Authorization header lets its sender in; '' when there is none.
        """
        self._app = app
        self._max_upload = max_upload
        self._is_known = is_known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands a request on, unless it is or becomes too large."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = await self._limit(scope)
        detail = f"at most {limit >> 20} MB are taken here"
        announced = header(scope, "content-length")
        if announced and int(announced) > limit:
            raise Refusal(413, detail)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                # No Refusal: FastAPI reads a body under a net that lets this exception alone through.
                raise HTTPException(413, detail)
            return message

        await self._app(scope, counted, send)

    async def _limit(self, scope: Scope) -> int:
        method, path = scope["method"], scope["path"]
        is_upload = any(method == m and pattern.search(path) for m, pattern in _UPLOADS)
        is_multipart = header(scope, "content-type").lower().startswith("multipart/form-data")
        is_proxied = method == "POST" and _PROXIED.search(path)
        if not (is_upload and is_multipart) and not is_proxied:
            return MAX_OTHER
        # It may ask the login service for its key.
        if not await run_in_threadpool(self._is_known, header(scope, "authorization")):
            raise Refusal(401, "log in before sending files")
        return MAX_PROXIED if is_proxied else self._max_upload
