"""MONAI Label 0.8.5, made safe and exact from outside: everything that knows its inside is here.

`install` runs once, when the app enters server mode, and `quieten` before; they put right:

- `GET …` and `PUT …` parameters become paths, pages of any origin may call: `security.Guard` in front.
- `POST /infer/{model}` blocks the event loop, takes `image` from its JSON too, leaves uploads behind when it
  fails, and answers unknown models and images with 500: our own route before it, in a worker thread.
- Training options are only read in the training process: checked before it is started.
- Uploads of any extension and archives are taken: only images and labels are.
- Tokens are decoded without naming algorithms, which PyJWT refuses; an administrator is no user.
- `/proxy/dicom` drops the query.
- A DICOMweb label is looked for in the archive under the image's name, although it lies here.
- Prompts, image names and paths are logged at INFO: `quieten`.

Each is a replacement by name in a module of a pinned version; a test holds every one against the server.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Annotated, Any

import jwt
import requests
from fastapi import BackgroundTasks, Depends, FastAPI, File, Form, HTTPException, UploadFile
from fastapi.middleware.cors import CORSMiddleware
from monailabel.config import settings as upstream
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.local import LocalDatastore
from monailabel.endpoints import datastore as datastore_endpoint
from monailabel.endpoints import infer as infer_endpoint
from monailabel.endpoints import proxy as proxy_endpoint
from monailabel.endpoints import session as session_endpoint
from monailabel.endpoints import train as train_endpoint
from monailabel.endpoints.user import auth
from monailabel.interfaces.exception import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelError,
    MONAILabelException,
)
from monailabel.interfaces.utils.app import app_instance
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse

from monailabel_dfqsam.server.request import MASK
from monailabel_dfqsam.server.security import Guard, Refusal, check_name, check_session, check_tag

IMAGE_EXTENSIONS = (".nii.gz", ".nii", ".nrrd", ".mha", ".dcm", ".png", ".jpg", ".jpeg")
MASK_EXTENSIONS = (".nii.gz", ".nii", ".nrrd")
LABEL_EXTENSIONS = (*MASK_EXTENSIONS, ".bin")

# Asymmetric ones alone: the realm's key is public, and must not do as an HMAC secret.
_TOKEN_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512"]

_TALKATIVE = (
    "monailabel.endpoints", "monailabel.datastore", "monailabel.utils.sessions", "monailabel.interfaces.app",
    "monailabel.tasks.activelearning", "monailabel.utils.async_tasks.task", "monailabel.transform",
    "monailabel.utils.others.generic", "dicomweb_client",
)  # fmt: skip

# Set by the server about the request, so not by the client within it.
_RESERVED = frozenset({"image", "model", "session", "description", "file", MASK})

# Each chunk costs a change of threads; OHIF asks for whole volumes, 26 MB of which were 400 of them.
_CHUNK = 1 << 20

_UID = re.compile(r"[0-9][0-9.]{0,63}")

CheckTraining = Callable[[str, Mapping[str, Any]], None]


def install(app: FastAPI, check_training: CheckTraining, trusted_hosts: Sequence[str]) -> None:
    """Puts MONAI Label's server right.

    Args:
        app: MONAI Label's, starting.
        check_training: raises Refusal for a trainer's name or options that cannot be used.
        trusted_hosts: as for `Guard`.
    """
    _put_guard(app, trusted_hosts)
    app.add_api_route("/infer/{model}", _infer, methods=["POST"], include_in_schema=False)
    app.router.routes.insert(0, app.router.routes.pop())
    _check_training(check_training)
    _check_uploads()
    _repair_tokens()
    _repair_proxy()
    _repair_dicomweb()


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


def _put_guard(app: FastAPI, trusted_hosts: Sequence[str]) -> None:
    # Upstream passes pydantic's URLs on, whose trailing slash no browser sends.
    origins = [str(origin).rstrip("/") for origin in upstream.MONAI_LABEL_CORS_ORIGINS]
    guard = Middleware(Guard, origins=origins, trusted_hosts=trusted_hosts, translate=_translate)
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_credentials=True,
        allow_methods=["*"],
        allow_headers=["*"],
    )
    others = [m for m in app.user_middleware if m.cls is not CORSMiddleware]  # type: ignore[comparison-overlap]
    app.user_middleware = [guard, *([cors] if origins else []), *others]
    app.middleware_stack = None  # built again by the first request; start-up itself still runs in the old one


def _translate(error: Exception) -> tuple[int, str] | None:
    if isinstance(error, ImageNotFoundException | LabelNotFoundException):
        return 404, error.msg
    if isinstance(error, MONAILabelException):
        return (400 if error.error is MONAILabelError.INVALID_INPUT else 500), error.msg
    if isinstance(error, requests.RequestException):
        return 502, f"the image archive does not answer ({type(error).__name__})"
    if isinstance(error, json.JSONDecodeError):
        return 400, "a field that must be JSON is not"
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
    if session_id:
        check_session(session_id)
        sessions = instance.sessions()
        if sessions is None or sessions.get_session(session_id) is None:
            raise Refusal(404, "there is no such session; it may have expired: PUT /session/ starts one")
    elif file:
        _check_extension(file.filename, IMAGE_EXTENSIONS, "file")
    elif not image:
        raise Refusal(400, "there is no image: name one with image, or a session with session_id")
    else:
        check_name(image, "image")
    if label:
        params = _with_mask(params, label, background_tasks)
    with _UploadsRemoved(background_tasks):
        reply = infer_endpoint.run_inference(
            background_tasks, model, image, session_id, params, file or None, None, output
        )
    if isinstance(reply, FileResponse):
        reply.chunk_size = _CHUNK
    return reply


def _with_mask(params: str, mask: UploadFile, tasks: BackgroundTasks) -> str:
    """The params with the place of an uploaded mask; upstream would let `label`, a name, replace it."""
    _check_extension(mask.filename, MASK_EXTENSIONS, "label")
    suffix = next(end for end in MASK_EXTENSIONS if str(mask.filename).lower().endswith(end))
    with tempfile.NamedTemporaryFile(prefix="dfqsam-", suffix=suffix, delete=False) as file:
        tasks.add_task(os.unlink, file.name)
        shutil.copyfileobj(mask.file, file)
    return json.dumps({**json.loads(params or "{}"), MASK: file.name})


def _check_params(params: str) -> None:
    try:
        values = json.loads(params or "{}")
    except json.JSONDecodeError as error:
        raise Refusal(400, f"params must be JSON: {error}") from None
    if not isinstance(values, dict):
        raise Refusal(400, "params must be a JSON object")
    reserved = sorted(_RESERVED & set(values))
    if reserved:
        raise Refusal(400, f"params must not hold {', '.join(reserved)}: these belong into the address")
    if values.get("label_tag"):
        check_tag(str(values["label_tag"]))


class _UploadsRemoved:
    """Runs a request's clean-up when its handler fails; upstream only does when it succeeds."""

    def __init__(self, tasks: BackgroundTasks) -> None:
        self._tasks = tasks

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:
            for task in self._tasks.tasks:
                task.func(*task.args, **task.kwargs)


def _check_training(check: CheckTraining) -> None:
    run_model, run = train_endpoint.run_model, train_endpoint.run

    @functools.wraps(run_model)
    def checked_model(
        model: str, params: dict[str, Any] | None = None, run_sync: bool = False, enqueue: bool = False
    ) -> Any:
        if run_sync:
            raise Refusal(400, "run_sync is not offered: it would hold up every other request")
        check(model, params or {})
        return run_model(model, params, False, enqueue)

    @functools.wraps(run)
    def checked_all(params: dict[str, Any] | None = None, run_sync: bool = False) -> Any:
        if run_sync:
            raise Refusal(400, "run_sync is not offered: it would hold up every other request")
        for model in app_instance().info()["trainers"]:
            check(model, params or {})
        return run(params, False)

    train_endpoint.run_model, train_endpoint.run = checked_model, checked_all


def _check_uploads() -> None:
    add_image, save_label = datastore_endpoint.add_image, datastore_endpoint.save_label
    create_session = session_endpoint.create_session

    @functools.wraps(add_image)
    def checked_image(
        tasks: BackgroundTasks, image: str | None, params: str, file: UploadFile, user: str | None = None
    ) -> Any:
        _check_extension(file.filename, IMAGE_EXTENSIONS, "file")
        with _UploadsRemoved(tasks):
            return add_image(tasks, image, params, file, user)

    @functools.wraps(save_label)
    def checked_label(
        tasks: BackgroundTasks, image: str, params: str, tag: str, label: UploadFile, user: str | None = None
    ) -> Any:
        _check_extension(label.filename, LABEL_EXTENSIONS, "label")
        with _UploadsRemoved(tasks):
            return save_label(tasks, image, params, tag, label, user)

    @functools.wraps(create_session)
    def checked_session(
        tasks: BackgroundTasks, uncompress: bool, expiry: int, files: list[UploadFile]
    ) -> Any:
        if uncompress:
            raise Refusal(400, "archives are not unpacked: send the image, or the files of its series")
        if len(files) == 1:
            _check_extension(files[0].filename, IMAGE_EXTENSIONS, "files")
        with _UploadsRemoved(tasks):
            return create_session(tasks, uncompress, expiry, files)

    datastore_endpoint.add_image, datastore_endpoint.save_label = checked_image, checked_label
    session_endpoint.create_session = checked_session


def _check_extension(filename: str | None, allowed: tuple[str, ...], what: str) -> None:
    name = os.path.basename(filename or "")
    check_name(name, f"the file name of {what}")
    if not name.lower().endswith(allowed):
        raise Refusal(400, f"{what} must be a {', '.join(allowed)} file")


def _repair_tokens() -> None:
    roles = (
        upstream.MONAI_LABEL_AUTH_ROLE_ADMIN,
        upstream.MONAI_LABEL_AUTH_ROLE_REVIEWER,
        upstream.MONAI_LABEL_AUTH_ROLE_ANNOTATOR,
        upstream.MONAI_LABEL_AUTH_ROLE_USER,
    )
    from_token = auth.from_token

    @functools.wraps(from_token)
    def with_lesser_roles(token: str) -> Any:
        user = from_token(token)
        highest = min((roles.index(role) for role in user.roles if role in roles), default=len(roles))
        user.roles = sorted({*user.roles, *roles[highest:]})
        return user

    auth.from_token = with_lesser_roles
    auth.jwt = SimpleNamespace(decode=functools.partial(jwt.decode, algorithms=_TOKEN_ALGORITHMS))


def _repair_proxy() -> None:
    proxy_dicom = proxy_endpoint.proxy_dicom

    @functools.wraps(proxy_dicom)
    async def with_query(request: Request, op: str, path: str) -> Any:
        if not str(upstream.MONAI_LABEL_STUDIES).startswith(("http://", "https://")):
            raise Refusal(404, "the studies of this server are a folder, not a DICOMweb archive")
        query = request.url.query
        return await proxy_dicom(request, op, f"{path}?{query}" if query else path)

    proxy_endpoint.proxy_dicom = with_query


def _repair_dicomweb() -> None:
    get_image_uri, get_label_uri = DICOMWebDatastore.get_image_uri, DICOMWebDatastore.get_label_uri
    downloading = threading.Lock()

    @functools.wraps(get_image_uri)
    def whole_image(self: Any, image_id: str) -> str:
        if not _UID.fullmatch(image_id):
            raise Refusal(400, "an image of this server is named by its SeriesInstanceUID")
        folder = os.path.join(self._datastore.image_path(), image_id)
        with downloading:
            known = os.path.isdir(folder)
            try:
                return str(get_image_uri(self, image_id))
            except Exception:
                # What came would be taken for the whole series from then on.
                if not known:
                    shutil.rmtree(folder, ignore_errors=True)
                raise

    @functools.wraps(get_label_uri)
    def local_label(self: Any, label_id: str, label_tag: str, image_id: str = "") -> str:
        found = LocalDatastore.get_label_uri(self, label_id, label_tag)
        if found and os.path.isfile(found):
            return str(found)
        return str(get_label_uri(self, label_id, label_tag, image_id))

    DICOMWebDatastore.get_image_uri, DICOMWebDatastore.get_label_uri = whole_image, local_label
