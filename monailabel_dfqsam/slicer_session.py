"""A client that speaks to a MONAI Label server as 3D Slicer's plugin does, call by call.

For the demo, for tests, and for scripts: one annotator's session without a viewer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

import requests
from requests_toolbelt.multipart.decoder import MultipartDecoder  # type: ignore[import-untyped]

_TIMEOUT_SECONDS = 120.0
_POLL_SECONDS = 0.5


class ServerAnswer(Exception):
    """An answer other than 200; `status` is its number, `detail` the server's sentence."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail


@dataclass(frozen=True)
class InferReply:
    """What the server answers to a click.

    Attributes:
        params: label names, model, score, latencies.
        file_name: of the mask, whose ending says its format.
        image: the mask file's bytes.
    """

    params: dict[str, Any]
    file_name: str
    image: bytes


class SlicerSession:
    """One annotator at one server."""

    def __init__(self, url: str, client_id: str = "user-xyz", token: str | None = None) -> None:
        """Connects to nothing yet; `url` like 'http://127.0.0.1:8000', `token` for servers with a login."""
        self.url = url.rstrip("/")
        self._client_id = client_id
        self._http = requests.Session()
        self._http.trust_env = False  # no proxy between an annotator and the server
        if token is not None:
            self._http.headers["Authorization"] = f"Bearer {token}"

    def info(self) -> dict[str, Any]:
        """What the server offers: labels, models, trainers, strategies, statistics."""
        return self._json("GET", "/info/")

    def is_training(self) -> bool:
        """Whether a quantization is running."""
        return self._call("GET", "/train/", params={"check_if_running": "true"}).status_code == 200

    def next_sample(self, strategy: str = "random") -> dict[str, Any]:
        """The image that a strategy proposes, its name under 'id'."""
        return self._json("POST", f"/activelearning/{strategy}", json=self._with_id({}))

    def download_image(self, image: str) -> bytes:
        """An image's file."""
        return self._checked("GET", "/datastore/image", params={"image": image}).content

    def create_session(self, path: Path) -> str:
        """Uploads an own volume; answers the session's id."""
        with path.open("rb") as file:
            files = [("files", (path.name, file))]
            answer = self._json("PUT", "/session/", files=files, data=self._with_id({}))
        return str(answer["session_id"])

    def infer(
        self,
        image: str,
        foreground: Sequence[Sequence[int]] = (),
        background: Sequence[Sequence[int]] = (),
        *,
        label: str = "organ",
        slice_index: int | None = None,
        roi: Sequence[int] | None = None,
        session_id: str | None = None,
        model: str = "dfqsam",
        **options: Any,
    ) -> InferReply:
        """A click, or several on one slice.

        Args:
            image: its name; with a session, the volume's own.
            foreground: [N][3] voxel indices (i, j, k) inside the object.
            background: the same, outside it.
            slice_index: k; None takes the last point's, as Slicer does.
            roi: (i0, i1, j0, j1, k0, k1) voxel indices of a box.
            options: the model's config entries.

        Raises:
            ServerAnswer: when the server refuses.
        """
        params: dict[str, Any] = {
            "label": label,
            "foreground": [list(point) for point in foreground],
            "background": [list(point) for point in background],
            **options,
        }
        if roi is not None:
            params["roi"] = list(roi)
        points = params["foreground"] or params["background"]
        if slice_index is None and points and len(points[-1]) > 2:
            slice_index = points[-1][2]
        params["slice"] = slice_index
        params.setdefault("result_extension", ".nrrd")
        params.setdefault("result_dtype", "uint8")
        return self.infer_raw(image, params, session_id=session_id, model=model)

    def infer_raw(
        self, image: str, params: Mapping[str, Any], *, session_id: str | None = None, model: str = "dfqsam"
    ) -> InferReply:
        """`infer` with the request's parameters as they go over the wire."""
        query = {"image": image, **({"session_id": session_id} if session_id else {})}
        # A part without a file name: what Slicer sends, and `requests` writes only so.
        fields = {"params": (None, json.dumps(self._with_id(params)))}
        answer = self._checked("POST", f"/infer/{model}", params=query, files=fields)
        return _parse_multipart(answer.headers["content-type"], answer.content)

    def save_label(
        self, image: str, label: Path, label_info: Sequence[Mapping[str, Any]] = ()
    ) -> dict[str, Any]:
        """Submits a finished label; `label_info` names the values in it."""
        params = json.dumps(self._with_id({"label_info": [dict(entry) for entry in label_info]}))
        with label.open("rb") as file:
            files = {"params": (None, params), "label": (label.name, file)}
            return self._json("PUT", "/datastore/label", params={"image": image}, files=files)

    def train(self, trainer: str = "dfqsam", **options: Any) -> str:
        """Asks for a run of a trainer; answers its id."""
        return str(self._json("POST", f"/train/{trainer}", json=self._with_id(options))["id"])

    def run(self, identity: str) -> dict[str, Any]:
        """A run's record, as `server.runs.record.Run` describes it."""
        return self._json("GET", f"/dfqsam/runs/{identity}")

    def overview(self) -> dict[str, Any]:
        """What the quantization page is told, see `server.overview`."""
        return self._json("GET", "/dfqsam/status")

    def ended_run(
        self, identity: str, look: Callable[[dict[str, Any]], None] = lambda run: None
    ) -> dict[str, Any]:
        """Waits until a run has ended; its record then.

        Args:
            look: called with the record now and then; what it raises ends the waiting.
        """
        while True:
            run = self.run(identity)
            look(run)
            if run["state"] not in ("queued", "running"):
                return run
            time.sleep(_POLL_SECONDS)

    def settled(self, look: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Waits until the server has made up its mind which model answers; `overview` then.

        It has when its start is over, which may have asked for a run, and what was published is loaded.

        Args:
            look: called now and then; what it raises ends the waiting.
        """
        while True:
            overview = self.overview()
            if not overview["changing"]:
                return overview
            look()
            time.sleep(_POLL_SECONDS)

    def train_status(self) -> dict[str, Any]:
        """The last quantization; raises ServerAnswer 404 when there was none."""
        return self._json("GET", "/train/")

    def stop_training(self) -> Any:
        """Stops a running quantization."""
        return self._checked("DELETE", "/train/").json()

    def _with_id(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {**params, "client_id": self._client_id}

    def _call(self, method: str, path: str, **arguments: Any) -> requests.Response:
        return self._http.request(method, self.url + path, timeout=_TIMEOUT_SECONDS, **arguments)

    def _checked(self, method: str, path: str, **arguments: Any) -> requests.Response:
        answer = self._call(method, path, **arguments)
        if answer.status_code != 200:
            raise ServerAnswer(answer.status_code, _detail(answer))
        return answer

    def _json(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._checked(method, path, **arguments).json()
        return found


def _detail(answer: requests.Response) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return answer.text


def _parse_multipart(content_type: str, body: bytes) -> InferReply:
    params: dict[str, Any] = {}
    name, image = "", b""
    for part in MultipartDecoder(body, content_type).parts:
        header = Message()
        header["Content-Disposition"] = part.headers[b"Content-Disposition"].decode()
        if file_name := header.get_filename():
            name, image = file_name, part.content
        else:
            params = json.loads(part.content)
    if not name:
        raise ValueError("the server's answer holds no image")
    return InferReply(params, name, image)
