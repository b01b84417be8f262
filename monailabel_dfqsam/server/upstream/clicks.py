"""`POST /infer/{model}` of MONAI Label, put right.

It takes `image` from its JSON too, leaves uploads behind when it fails, answers unknown models and images
with 500, and lets no mask be sent to start from; its DICOM SEG is wrong, and stays in the temporary folder.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fastapi import BackgroundTasks, UploadFile
from monailabel.endpoints import infer as endpoint
from monailabel.interfaces.utils.app import app_instance
from starlette.responses import FileResponse

from monailabel_dfqsam.files import IMAGE_ENDINGS
from monailabel_dfqsam.server.answers.request import FILE_NAME, MASK, MASK_PART, STORED
from monailabel_dfqsam.server.gate.guard import Refusal, check_name, check_session, check_tag
from monailabel_dfqsam.server.gate.json_input import read_object
from monailabel_dfqsam.server.upstream.archive import is_archive
from monailabel_dfqsam.server.upstream.dicom import not_asking
from monailabel_dfqsam.server.upstream.segmentations import write_segmentation
from monailabel_dfqsam.server.upstream.store import (
    MASK_EXTENSIONS,
    UploadsRemoved,
    check_label_info,
    check_upload,
)

# Set by the server about the request, so not by the client within it.
_RESERVED = frozenset({"image", "model", "session", "description", "file", FILE_NAME, MASK, STORED})

# Each chunk costs a change of threads; OHIF asks for whole volumes, 26 MB of which were 400 of them.
_CHUNK = 1 << 20

# The decoder's memory grows with the square of the number of points.
_MAX_POINTS = 1000


def repair_clicks() -> None:
    """Replaces upstream's function; call it once."""
    run_inference = endpoint.run_inference

    @functools.wraps(run_inference)
    def checked(
        tasks: BackgroundTasks,
        model: str,
        image: str = "",
        session_id: str = "",
        params: str = "{}",
        file: UploadFile | None = None,
        label: UploadFile | None = None,
        output: endpoint.ResultType | None = None,
    ) -> Any:
        """Upstream's arguments; `label` is an existing mask to start from."""
        app_instance().check_model(model)
        _check_params(params)
        _check_source(image, session_id, file)
        if file and not session_id:
            params = _with(params, FILE_NAME, file.filename)
        with UploadsRemoved(tasks), not_asking():
            if label:
                params = _with_mask(params, label, tasks)
            if output is endpoint.ResultType.dicom_seg:
                reply = _segmentation(tasks, model, image, json.loads(params or "{}"))
            else:
                reply = run_inference(tasks, model, image, session_id, params, file or None, None, output)
        if isinstance(reply, FileResponse):
            reply.chunk_size = _CHUNK
        return reply

    endpoint.run_inference = checked


def _check_source(image: str, session_id: str, file: UploadFile | None) -> None:
    if session_id:
        check_session(session_id)
        sessions = app_instance().sessions()
        if sessions is None or sessions.get_session(session_id) is None:
            raise Refusal(404, "there is no such session; it may have expired: PUT /session/ starts one")
    elif file:
        check_upload(file, IMAGE_ENDINGS, "file")
    elif not image:
        raise Refusal(400, "there is no image: name one with image, or a session with session_id")
    else:
        check_name(image, "image")


def _segmentation(tasks: BackgroundTasks, model: str, image: str, params: dict[str, Any]) -> FileResponse:
    """The answer as a DICOM segmentation of the series, which is removed once it is sent."""
    if not is_archive():
        raise Refusal(400, "DICOM SEG needs a DICOMweb archive; the studies of this server are a folder")
    if not image:
        raise Refusal(400, "DICOM SEG needs image: it is made of a series in the archive")
    check_label_info(params)
    result = app_instance().infer({"model": model, "image": image, **params})
    tasks.add_task(os.unlink, result["file"])
    names = result["params"].get("label_names") or {}
    told = params.get("label_info") or [{"name": name, "idx": value} for name, value in names.items()]
    series = Path(app_instance().datastore().get_image_uri(image).removesuffix(".nii.gz"))
    written = write_segmentation(series, Path(result["file"]), told)
    tasks.add_task(os.unlink, written)
    return FileResponse(written, media_type="application/dicom", filename=f"{image}.dcm")


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
