"""MONAI Label 0.8.5, made safe and exact from outside: what knows its inside is in this package.

`quieten` runs first, `install` once the app enters server mode. Each module replaces functions of upstream by
name and says what was wrong with them; a test holds every one against the server:

- `threads`: handlers hold up the event loop.
- `clicks`, `options`, `training`, `pages`, `store`, `login`: what handlers take and answer.
- `dicom`, `archive`, `segmentations`: archives.
- `shared`, `disk`: several processes, several threads, a full disk.
- `start`, `imports`: how the server starts.
- Here: who may ask at all (`gate` in front), what exceptions tell the client, and what is not logged.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import requests
from fastapi import FastAPI, HTTPException
from fastapi.middleware.cors import CORSMiddleware
from monailabel.config import settings as upstream
from monailabel.interfaces.exception import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelError,
    MONAILabelException,
)
from starlette.middleware import Middleware

from monailabel_dfqsam.server.gate.bodies import MAX_UPLOAD, BodyLimit
from monailabel_dfqsam.server.gate.guard import Guard
from monailabel_dfqsam.server.upstream.archive import is_archive
from monailabel_dfqsam.server.upstream.clicks import repair_clicks
from monailabel_dfqsam.server.upstream.disk import is_full_disk
from monailabel_dfqsam.server.upstream.login import is_known, login_failure, repair_tokens
from monailabel_dfqsam.server.upstream.options import repair_tasks
from monailabel_dfqsam.server.upstream.pages import repair_pages, repair_proxy
from monailabel_dfqsam.server.upstream.segmentations import load_in_background
from monailabel_dfqsam.server.upstream.store import repair_store
from monailabel_dfqsam.server.upstream.threads import leave_loop

_TALKATIVE = (
    "monailabel.endpoints", "monailabel.datastore", "monailabel.utils.sessions", "monailabel.interfaces.app",
    "monailabel.tasks.activelearning", "monailabel.utils.async_tasks.task", "monailabel.transform",
    "monailabel.utils.others.generic", "dicomweb_client", "monailabel.interfaces.tasks", "task_batch_infer",
    "task_scoring", "highdicom",
)  # fmt: skip


def install(app: FastAPI, trusted_hosts: Sequence[str], max_upload: int = MAX_UPLOAD) -> None:
    """Puts MONAI Label's server right.

    Args:
        app: MONAI Label's, starting.
        trusted_hosts: as for `Guard`.
        max_upload: as for `BodyLimit`.
    """
    _put_in_front(app, trusted_hosts, max_upload)
    repair_clicks()
    repair_tasks()
    repair_proxy()
    repair_pages(app)
    repair_store()
    repair_tokens()
    leave_loop(app.router)
    if is_archive():
        load_in_background()


def image_path(store: Any, image: str) -> str:
    """The file or folder of an image by its name; from an archive, it is fetched first.

    Raises:
        HTTPException: 400 when there is none; `ArchiveError`, a Refusal, when the archive does not give it.
    """
    path = str(store.get_image_uri(image))
    if not path or not os.path.exists(path):
        raise HTTPException(400, f"there is no image '{image}' in the datastore")
    return path


def quieten() -> None:
    """Has upstream name images, paths and prompts in the log from DEBUG on alone; call it first."""
    if logging.getLogger().getEffectiveLevel() > logging.DEBUG:
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)


def _put_in_front(app: FastAPI, trusted_hosts: Sequence[str], max_upload: int) -> None:
    # Upstream passes pydantic's URLs on, whose trailing slash no browser sends.
    origins = [str(origin).rstrip("/") for origin in upstream.MONAI_LABEL_CORS_ORIGINS]
    # Outermost, so that a page of an allowed origin can also read refusals.
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_credentials=True,
        allow_methods=["*"],
        allow_headers=["*"],
    )
    guard = Middleware(
        Guard,
        origins=origins,
        trusted_hosts=trusted_hosts,
        logins=_login_origins(),
        translate=_translate,
    )
    limit = Middleware(BodyLimit, max_upload=max_upload, is_known=is_known)
    others = [m for m in app.user_middleware if m.cls is not CORSMiddleware]  # type: ignore[comparison-overlap]
    app.user_middleware = [*([cors] if origins else []), guard, limit, *others]
    app.middleware_stack = None  # built again by the first request; start-up itself still runs in the old one


def _login_origins() -> list[str]:
    """Where OHIF logs people in, when they have to."""
    if not upstream.MONAI_LABEL_AUTH_ENABLE:
        return []
    realm = urlsplit(str(upstream.MONAI_LABEL_AUTH_REALM_URI))
    return [f"{realm.scheme}://{realm.netloc}"]


def _translate(error: Exception) -> tuple[int, str] | None:
    if is_full_disk(error):
        return 507, "the server's disk is full: nothing was saved, and what was there before is kept"
    if isinstance(error, ImageNotFoundException | LabelNotFoundException):
        return 404, error.msg
    if isinstance(error, MONAILabelException):
        return (400 if error.error is MONAILabelError.INVALID_INPUT else 500), error.msg
    if isinstance(error, requests.RequestException):
        return login_failure(error) or (502, f"another server does not answer ({type(error).__name__})")
    if isinstance(error, json.JSONDecodeError):
        return 400, "a field that must be JSON is not"
    if isinstance(error, FileNotFoundError) and error.filename == "nvidia-smi":
        return 404, "there is no NVIDIA driver on this server"
    return None
