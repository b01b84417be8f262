"""MONAI Label 0.8.5, made safe and exact from outside: what knows its inside is in this package.

`install` runs once, when the app enters server mode, and `quieten` before; they put right:

- `GET …` and `PUT …` parameters become paths, pages of any origin may call: `guard.Guard` in front.
- A request of any size is received, before its sender is known: `bodies.BodyLimit`.
- `POST /infer/{model}` blocks the event loop, takes `image` from its JSON too, leaves uploads behind when it
  fails, and answers unknown models and images with 500: our own route before it, in a worker thread.
- Options of scoring, batches and strategies are only read when they run: checked before anything is started.
- Trainings have runs of their own: `training`.
- The datastore and sessions: `store`; the datastore between processes: `shared`; logins:
  `login`.
- The random strategy fails on images that were all proposed within a second.
- `/proxy/dicom` drops the query.
- The front page, the API's and the log's show nothing but what other hosts send: the quantization page is in
  front, the log is text.
- Lines of the log without bound, a folder of OHIF's page, no graphics card: faults of the server.
- Prompts, image names and paths are logged at INFO: `quieten`.

Each is a replacement by name in a module of a pinned version; a test holds every one against the server.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Annotated, Any
from urllib.parse import urlsplit

import requests
from fastapi import BackgroundTasks, Depends, FastAPI, File, Form, HTTPException, UploadFile
from fastapi.middleware.cors import CORSMiddleware
from monailabel.config import settings as upstream
from monailabel.endpoints import activelearning as activelearning_endpoint
from monailabel.endpoints import batch_infer as batch_endpoint
from monailabel.endpoints import infer as infer_endpoint
from monailabel.endpoints import logs as logs_endpoint
from monailabel.endpoints import ohif as ohif_endpoint
from monailabel.endpoints import proxy as proxy_endpoint
from monailabel.endpoints import scoring as scoring_endpoint
from monailabel.endpoints.user import auth
from monailabel.interfaces.exception import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelError,
    MONAILabelException,
)
from monailabel.interfaces.utils.app import app_instance
from monailabel.tasks.activelearning import random as random_strategy
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse

from monailabel_dfqsam.server.answers.request import FILE_NAME, MASK, MASK_PART, STORED
from monailabel_dfqsam.server.gate.bodies import MAX_UPLOAD, BodyLimit
from monailabel_dfqsam.server.gate.guard import Guard, Refusal, check_name, check_session, check_tag
from monailabel_dfqsam.server.gate.json_input import check_options, check_own, read_object
from monailabel_dfqsam.server.upstream.disk import is_full_disk
from monailabel_dfqsam.server.upstream.login import is_known, login_failure, repair_tokens
from monailabel_dfqsam.server.upstream.store import (
    IMAGE_EXTENSIONS,
    MASK_EXTENSIONS,
    UploadsRemoved,
    check_upload,
    repair_store,
)

_TALKATIVE = (
    "monailabel.endpoints", "monailabel.datastore", "monailabel.utils.sessions", "monailabel.interfaces.app",
    "monailabel.tasks.activelearning", "monailabel.utils.async_tasks.task", "monailabel.transform",
    "monailabel.utils.others.generic", "dicomweb_client", "monailabel.interfaces.tasks", "task_batch_infer",
    "task_scoring",
)  # fmt: skip

# Set by the server about the request, so not by the client within it.
_RESERVED = frozenset({"image", "model", "session", "description", "file", FILE_NAME, MASK, STORED})

# Each chunk costs a change of threads; OHIF asks for whole volumes, 26 MB of which were 400 of them.
_CHUNK = 1 << 20

# The decoder's memory grows with the square of the number of points.
_MAX_POINTS = 1000
_MAX_LOG_LINES = 100_000


def install(app: FastAPI, trusted_hosts: Sequence[str], max_upload: int = MAX_UPLOAD) -> None:
    """Puts MONAI Label's server right.

    Args:
        app: MONAI Label's, starting.
        trusted_hosts: as for `Guard`.
        max_upload: as for `BodyLimit`.
    """
    _put_in_front(app, trusted_hosts, max_upload)
    path = f"{upstream.MONAI_LABEL_API_STR}/infer/{{model}}"
    app.add_api_route(path, _infer, methods=["POST"], include_in_schema=False)
    app.router.routes.insert(0, app.router.routes.pop())
    _check_scoring()
    _check_batch()
    _check_strategies()
    _repair_proxy()
    _repair_pages(app)
    repair_store()
    repair_tokens()


def image_path(store: Any, image: str) -> str:
    """The file or folder of an image by its name; from an archive, it is fetched first.

    Raises:
        HTTPException: 400 when there is none.
    """
    try:
        path = str(store.get_image_uri(image))
    except (IndexError, KeyError):  # how upstream says that the archive has no such series
        path = ""
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
        return login_failure(error) or (502, f"the image archive does not answer ({type(error).__name__})")
    if isinstance(error, json.JSONDecodeError):
        return 400, "a field that must be JSON is not"
    if isinstance(error, FileNotFoundError) and error.filename == "nvidia-smi":
        return 404, "there is no NVIDIA driver on this server"
    return None


def _infer(
    background_tasks: BackgroundTasks,
    model: str,
    image: str = "",
    session_id: str = "",
    params: Annotated[str, Form()] = "{}",
    file: Annotated[UploadFile | None, File()] = None,
    label: Annotated[UploadFile | None, File()] = None,
    output: infer_endpoint.ResultType | None = None,
    user: Annotated[Any, Depends(auth.RBAC(upstream.MONAI_LABEL_AUTH_ROLE_USER))] = None,
) -> Any:
    """Upstream's arguments; `label` is an existing mask to start from."""
    instance = app_instance()
    instance.check_model(model)
    _check_params(params)
    if output is infer_endpoint.ResultType.dicom_seg and not _is_archive():
        raise Refusal(400, "DICOM SEG needs a DICOMweb archive; the studies of this server are a folder")
    if session_id:
        check_session(session_id)
        sessions = instance.sessions()
        if sessions is None or sessions.get_session(session_id) is None:
            raise Refusal(404, "there is no such session; it may have expired: PUT /session/ starts one")
    elif file:
        check_upload(file, IMAGE_EXTENSIONS, "file")
        params = _with(params, FILE_NAME, file.filename)
    elif not image:
        raise Refusal(400, "there is no image: name one with image, or a session with session_id")
    else:
        check_name(image, "image")
    with UploadsRemoved(background_tasks):
        if label:
            params = _with_mask(params, label, background_tasks)
        reply = infer_endpoint.run_inference(
            background_tasks, model, image, session_id, params, file or None, None, output
        )
    if isinstance(reply, FileResponse):
        reply.chunk_size = _CHUNK
    return reply


def _with_mask(params: str, mask: UploadFile, tasks: BackgroundTasks) -> str:
    """The params with the place of an uploaded mask; upstream would let `label`, a name, replace it."""
    check_upload(mask, MASK_EXTENSIONS, MASK_PART)
    suffix = next(end for end in MASK_EXTENSIONS if str(mask.filename).lower().endswith(end))
    with tempfile.NamedTemporaryFile(prefix="dfqsam-", suffix=suffix, delete=False) as file:
        tasks.add_task(os.unlink, file.name)
        shutil.copyfileobj(mask.file, file)
    return _with(params, MASK, file.name)


def _with(params: str, key: str, value: Any) -> str:
    return json.dumps({**json.loads(params or "{}"), key: value})


def _check_params(params: str) -> None:
    values = read_object(params, "params")
    reserved = sorted(_RESERVED & set(values))
    if reserved:
        raise Refusal(400, f"params must not hold {', '.join(reserved)}: these belong into the address")
    if any(isinstance(value, list) and len(value) > _MAX_POINTS for value in values.values()):
        raise Refusal(400, f"params must not hold lists of more than {_MAX_POINTS} points")
    if values.get("label_tag"):
        check_tag(str(values["label_tag"]))


def _is_archive() -> bool:
    return str(upstream.MONAI_LABEL_STUDIES).startswith(("http://", "https://"))


def _check_scoring() -> None:
    run_method, run = scoring_endpoint.run_method, scoring_endpoint.run

    @functools.wraps(run_method)
    def checked_method(method: str, params: dict[str, Any] | None = None, run_sync: bool = False) -> Any:
        check_options(params, run_sync)
        known = app_instance().info()["scoring"]
        if method not in known:
            raise Refusal(
                404, f"there is no scoring method '{method}'; there is: {', '.join(known) or 'none'}"
            )
        return run_method(method, params, False)

    @functools.wraps(run)
    def checked_all(params: dict[str, Any] | None = None, run_sync: bool = False) -> Any:
        check_options(params, run_sync)
        for method in app_instance().info()["scoring"]:
            check_own(params, method)
        return run(params, False)

    scoring_endpoint.run_method, scoring_endpoint.run = checked_method, checked_all


def _check_batch() -> None:
    run = batch_endpoint.run

    @functools.wraps(run)
    def checked(model: str, images: Any, params: dict[str, Any] | None = None, run_sync: bool = False) -> Any:
        check_options(params, run_sync)
        app_instance().check_batch(model, params or {})
        return run(model, images, params, False)

    batch_endpoint.run = checked


def _check_strategies() -> None:
    sample = activelearning_endpoint.sample

    @functools.wraps(sample)
    def checked(strategy: str, params: dict[str, Any] | None = None, user: str | None = None) -> Any:
        check_options(params, False)
        known = app_instance().info()["strategies"]
        if strategy not in known:
            raise Refusal(404, f"there is no strategy '{strategy}'; there is: {', '.join(known)}")
        if "strategy" in (params or {}):
            raise Refusal(400, "params must not hold strategy: it belongs into the address")
        # It is kept in the datastore.
        if not isinstance((params or {}).get("client_id", ""), str):
            raise Refusal(400, "client_id must be text")
        return sample(strategy, params, user)

    activelearning_endpoint.sample = checked
    # Upstream weighs an image by the seconds since it was proposed, and chooses among none when all are 0.
    random_strategy.random = SimpleNamespace(
        choices=lambda images, weights: random.choices(images, [max(weight, 1) for weight in weights])
    )


def _repair_proxy() -> None:
    proxy_dicom = proxy_endpoint.proxy_dicom

    @functools.wraps(proxy_dicom)
    async def with_query(request: Request, op: str, path: str) -> Any:
        if not _is_archive():
            raise Refusal(404, "the studies of this server are a folder, not a DICOMweb archive")
        query = request.url.query
        return await proxy_dicom(request, op, f"{path}?{query}" if query else path)

    proxy_endpoint.proxy_dicom = with_query


def _repair_pages(app: FastAPI) -> None:
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
