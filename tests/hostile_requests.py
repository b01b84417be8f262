"""Hostile requests by name: what `test_server_attack` sends."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.besieged import MAX_UPLOAD
from tests.server_fixtures import OBJECT

MEGABYTE = 1 << 20
CLICK = {"foreground": [list(OBJECT)]}

PATHS = {
    "upwards": "../outside/secret", "upwards encoded": "%2e%2e%2foutside%2fsecret",
    "upwards encoded twice": "%252e%252e%252foutside%252fsecret",
    "upwards encoded three times": "%25252e%25252e%25252foutside%25252fsecret",
    "overlong dots": "%c0%ae%c0%ae%c0%afoutside%c0%afsecret", "overlong slash": "..%e0%80%afsecret",
    "backslashes": "..%5coutside%5csecret", "backslashes encoded twice": "..%255coutside",
    "absolute": "{outside}/secret", "absolute encoded": "%2fetc%2fpasswd", "two slashes": "//etc/passwd",
    "file address": "file://{outside}/secret.txt", "web address": "{elsewhere}/x",
    "NUL": "phantom0%00.nii.gz", "NUL encoded twice": "phantom0%2500", "line end": "a%0d%0aSet-Cookie:%20x=1",
    "up": "..", "up encoded": "%2e%2e", "here": ".", "drive": "C:%5cWindows%5cwin.ini", "drive slash": "C:/x",
    "drive alone": "C:secret", "network share": "%5c%5chost%5cshare", "device": "/dev/zero",
    "home": "~/.ssh/id_rsa", "process": "/proc/self/environ", "long": "a" * 300, "escape": "%1b%5b2J",
}  # fmt: skip

# What is no path for a browser's page or a static folder, and answered like any other unknown name.
_NAMES_ALONE = frozenset(
    {"home", "drive slash", "drive alone", "long", "here", "file address", "web address"}
)


@dataclass(frozen=True)
class Place:
    """Where a path could be put: `target` with {} in it, and what else the request needs."""

    method: str
    target: str
    files: tuple[str, str] | None = None  # field and file name
    data: dict[str, str] | None = None
    without: frozenset[str] = frozenset()


IMAGE, LABEL = ("file", "x.nii.gz"), ("label", "x.nii.gz")
PLACES = {
    "download an image": Place("GET", "/datastore/image?image={}"),
    "ask for an image": Place("HEAD", "/datastore/image?image={}"),
    "an image's info": Place("GET", "/datastore/image/info?image={}"),
    "change an image's info": Place("PUT", "/datastore/image/info?image={}", data={"info": "{}"}),
    "upload an image": Place("PUT", "/datastore/image?image={}", IMAGE),
    "upload an image, old": Place("PUT", "/datastore/?image={}", IMAGE),
    "delete an image": Place("DELETE", "/datastore/image?id={}"),
    "delete an image, old": Place("DELETE", "/datastore/?id={}"),
    "download a label": Place("GET", "/datastore/label?label={}&tag=final"),
    "download a label's tag": Place("GET", "/datastore/label?label=phantom0&tag={}"),
    "ask for a label": Place("HEAD", "/datastore/label?image={}&tag=final"),
    "ask for a label's tag": Place("HEAD", "/datastore/label?image=phantom0&tag={}"),
    "save a label": Place("PUT", "/datastore/label?image={}", LABEL),
    "save a label's tag": Place("PUT", "/datastore/label?image=phantom0&tag={}", LABEL),
    "delete a label": Place("DELETE", "/datastore/label?id={}&tag=final"),
    "delete a label's tag": Place("DELETE", "/datastore/label?id=phantom0&tag={}"),
    "a label's info": Place("GET", "/datastore/label/info?label={}&tag=final"),
    "a label info's tag": Place("GET", "/datastore/label/info?label=phantom0&tag={}"),
    "change a label's info": Place("PUT", "/datastore/label/info?label={}&tag=final", data={"info": "{}"}),
    "change a label info's tag": Place(
        "PUT", "/datastore/label/info?label=phantom0&tag={}", data={"info": "{}"}
    ),
    "change a label's info, old": Place(
        "PUT", "/datastore/updatelabelinfo?label={}&tag=x", data={"params": "{}"}
    ),
    "click on an image": Place("POST", "/infer/dfqsam?image={}", data={"params": json.dumps(CLICK)}),
    "click in a session": Place("POST", "/infer/dfqsam?session_id={}", data={"params": json.dumps(CLICK)}),
    "click with a model": Place("POST", "/infer/{}?image=phantom0", data={"params": json.dumps(CLICK)}),
    "a session": Place("GET", "/session/{}"),
    "a session's image": Place("GET", "/session/{}?image=true"),
    "end a session": Place("DELETE", "/session/{}"),
    "next sample": Place("POST", "/activelearning/{}"),
    "score": Place("POST", "/scoring/{}"),
    "train": Place("POST", "/train/{}"),
    "download a model": Place("GET", "/model/{}"),
    "a model's info": Place("GET", "/model/info/{}"),
    "upload a model": Place("PUT", "/model/{}", ("file", "x.pt")),
    "delete a model": Place("DELETE", "/model/{}"),
    "batch": Place("POST", "/batch/infer/{}"),
    "slides": Place("POST", "/infer/wsi_v2/{}?image=phantom0", data={}),
    "the archive": Place("GET", "/proxy/dicom/{}"),
    "the archive's files": Place("GET", "/proxy/dicom/wado/{}"),
    "store in the archive": Place("POST", "/proxy/dicom/stow/{}"),
    "OHIF": Place("GET", "/ohif/{}", without=_NAMES_ALONE - {"here"}),
    "static files": Place("GET", "/static/{}"),
    "static files of OHIF": Place("GET", "/static/ohif/{}"),
    "a model's report": Place("GET", "/dfqsam/report/{}"),
    "a model's pictures": Place("GET", "/dfqsam/pictures/{}"),
    "choose a model": Place("POST", "/dfqsam/choose/{}"),
}


FILE_NAMES = {
    "program": "x.py", "shell": "x.sh", "pickle": "x.pkl", "weights": "x.pt", "page": "x.html",
    "drawing": "x.svg",
    "settings": "datastore_v2.json", "double": "x.nii.gz.py", "hidden end": "x.nii.gz%00.py",
    "space at the end": "x.nii.gz ", "upwards": "../../x.nii.gz",
    "absolute and upwards": "/tmp/../x.nii.gz", "mixed and upwards": "C:/a\\..\\x.nii.gz",
    "backslashes": "..\\..\\x.nii.gz", "drive": "C:x.nii.gz", "encoded": "%2e%2e%2fx.nii.gz",
    "up": "..", "no name": ".", "long": "a" * 250 + ".nii.gz", "long end": "a." + "b" * 250 + ".nii.gz",
    "archive": "x.zip", "table": "x.mhd", "without": "x", "two bytes a letter": "ü" * 120 + ".nii.gz",
}  # fmt: skip
UPLOADS = {
    "image": ("PUT", "/datastore/image?image=new", "file"),
    "image, old": ("PUT", "/datastore/?image=new", "file"),
    "image named by its file": ("PUT", "/datastore/image", "file"),
    "label": ("PUT", "/datastore/label?image=phantom0", "label"),
    "session": ("PUT", "/session/", "files"),
    "click": ("POST", "/infer/dfqsam", "file"),
    "mask": ("POST", "/infer/dfqsam?image=phantom0", "label"),
}


JSON = {
    "not JSON": "{", "a list": "[1]", "a number": "5", "text": '"x"',
    "deep lists": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"a":' * 5_000 + "1" + "}" * 5_000, "deeper than kept": '{"a":' * 40 + "1" + "}" * 40,
    "NaN": '{"a": NaN}', "infinity": '{"a": -Infinity}', "too large": '{"a": 1e999}',
    "digits": '{"a": ' + "9" * 5_000 + "}", "beyond 64 bit": '{"a": 36893488147419103232}',
    "half a pair": '{"a": "\\ud800"}', "half a pair as a key": '{"\\udfff": 1}',
    "many values": json.dumps({"a": [0] * 20_000}), "XML": "<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>",
    "UTF-7": "+ADw-script+AD4-", "NUL": '{"a": 1}\0',
}  # fmt: skip
FIELDS = {
    "params of a click": ("POST", "/infer/dfqsam?image=phantom0", "params", None),
    "params of an image": ("PUT", "/datastore/image?image=new", "params", IMAGE),
    "params of a label": ("PUT", "/datastore/label?image=phantom0", "params", LABEL),
    "an image's info": ("PUT", "/datastore/image/info?image=phantom0", "info", None),
    "a label's info": ("PUT", "/datastore/label/info?label=phantom0&tag=final", "info", None),
}


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "a strategy of another name": ("/activelearning/random", {"strategy": "first"}),
    "a strategy that is a list": ("/activelearning/random", {"strategy": ["first"]}),
    "a client that is an object": ("/activelearning/random", {"client_id": {"$ne": 1}}),
    "a prototype": ("/activelearning/__proto__", {"__proto__": {"a": 1}}),
    "devices that are a variable": ("/train/dfqsam", {"gpus": "0\nLD_PRELOAD=/tmp/x.so"}),
    "devices that are a list": ("/train/dfqsam", {"gpus": [0]}),
    "an option that is a class": ("/train/dfqsam", {"__class__": "os"}),
    "options that are no object": ("/train/", {"dfqsam": 5}),
    "options beyond a command": ("/train/dfqsam", {"client_id": "x" * 200_000}),
    "iterations without end": ("/train/dfqsam", {"iterations": 10**12}),
    "images without end": ("/train/dfqsam", {"images": 10**9}),
    "no number": ("/train/dfqsam", {"seed": "x; rm -rf /"}),
    "a folder as calibration": ("/train/dfqsam", {"calibration": "/etc"}),
    "at once": ("/train/dfqsam?run_sync=true", {}),
    "all at once": ("/train/?run_sync=true", {}),
    "scoring at once": ("/scoring/dice?run_sync=true", {}),
    "scoring of a module": ("/scoring/os.system", {}),
    "batch": ("/batch/infer/dfqsam", {"image": "/etc/passwd"}),
    "reload": ("/reload", {}),
    "slides": ("/infer/wsi/dfqsam?image=phantom0", {}),
}


PROMPTS: dict[str, dict[str, Any]] = {
    "thousands of points": {"foreground": [list(OBJECT)] * 3_000},
    "a point of thousands": {"foreground": [[1] * 9_000]},
    "a number of many digits": {"foreground": [[10**400, 1, 1]]},
    "an image in the params": {"image": "/etc/passwd", **CLICK},
    "a file in the params": {"file": "/etc/passwd", **CLICK},
    "a mask in the params": {"mask": "/etc/passwd", **CLICK},
    "a session in the params": {"session": {"image": "/etc/passwd"}, **CLICK},
    "a tag upwards": {"save_label": True, "label_tag": "../../x", **CLICK},
    "an ending": {"result_extension": ".nii.gz/../../x.nii", **CLICK},
    "a type": {"result_dtype": "__import__('os')", **CLICK},
    "a window": {"window": {"$gt": ""}, **CLICK},
    "a slice": {"slice": "0 OR 1=1", **CLICK},
    "a label": {"label": {"x": 1}, **CLICK},
}


OTHERS: dict[str, tuple[str, str, dict[str, str], int]] = {
    "TRACE": ("TRACE", "/info/", {}, 405),
    "CONNECT": ("CONNECT", "/info/", {}, 405),
    "another method": ("PROPFIND", "/datastore/", {}, 405),
    "PATCH": ("PATCH", "/datastore/image?image=phantom0", {}, 405),
    "all the log": ("GET", "/logs/?lines=-1", {}, 400),
    "no line of the log": ("GET", "/logs/?lines=0", {}, 400),
    "a log without end": ("GET", "/logs/?lines=99999999999999999999", {}, 400),
    "a checksum of a kind": ("HEAD", "/datastore/image?image=phantom0&check_sum=CRC:1", {}, 400),
    "a dataset of nothing": ("GET", "/datastore/dataset", {}, 404),
    "another host": ("GET", "/info/", {"Host": "evil.example"}, 403),
    "a host within a host": ("GET", "/info/", {"Host": "evil.example@127.0.0.1.evil.example"}, 403),
    "no host": ("GET", "/info/", {"Host": ""}, 403),
    "another site": ("POST", "/train/dfqsam", {"Origin": "http://evil.example"}, 403),
    "no site": ("DELETE", "/train/", {"Origin": "null"}, 403),
    "a site like this": ("POST", "/train/dfqsam", {"Origin": "http://127.0.0.1.evil.example"}, 403),
    "this site by a header": (
        "POST", "/train/dfqsam", {"Origin": "http://evil.example", "X-Forwarded-Host": "evil.example"}, 403,
    ),
    "another method by a header": ("POST", "/datastore/image?id=phantom0",
                                   {"X-HTTP-Method-Override": "DELETE"}, 405),
    "an address by a header": ("GET", "/nowhere", {"X-Original-URL": "/info/"}, 404),
    "a web socket": ("GET", "/info/", {"Connection": "Upgrade", "Upgrade": "websocket",
                                       "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
                                       "Sec-WebSocket-Version": "13"}, 400),
    "a form as text": ("PUT", "/datastore/image?image=new", {"Content-Type": "text/plain"}, 422),
    "a form as XML": ("PUT", "/session/", {"Content-Type": "application/xml"}, 422),
    "a form without a boundary": ("PUT", "/session/", {"Content-Type": "multipart/form-data"}, 400),
    "a form without parts": ("PUT", "/session/", {"Content-Type": "multipart/form-data; boundary=x"}, 422),
    "a boundary without end": ("PUT", "/session/",
                               {"Content-Type": "multipart/form-data; boundary=" + "x" * 5_000}, 400),
    "a click as JSON": ("POST", "/infer/dfqsam", {"Content-Type": "application/json"}, 400),
    "the archive of a folder": ("GET", "/proxy/dicom/studies", {}, 404),
    "an address as a path": ("GET", "{elsewhere}/x", {}, 400),
    "two slashes": ("GET", "//info/", {}, 400),
}  # fmt: skip


LINE = b"POST /train/dfqsam HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
RAW = {
    "two lengths": LINE + b"Content-Length: 2\r\nContent-Length: 40\r\n\r\n{}",
    "a length and chunks": (
        LINE + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n" + LINE + b"\r\n"
    ),
    "chunks twice": LINE + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "chunks of another kind": LINE + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a negative length": LINE + b"Content-Length: -5\r\n\r\n",
    "a length in words": LINE + b"Content-Length: two\r\n\r\n",
    "a negative chunk": LINE + b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n",
    "a folded header": LINE + b"X: a\r\n b: c\r\nContent-Length : 2\r\n\r\n{}",
    "a line end in a header": LINE + b"X: a\rb\nContent-Length: 2\r\n\r\n{}",
    "two hosts": b"GET /info/ HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
    "no host": b"GET /info/ HTTP/1.1\r\n\r\n",
    "a long header": b"GET /info/ HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    "a long address": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "an old protocol": b"GET /info/\r\n\r\n",
    "a NUL in the address": b"GET /info/\0 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a server's address": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}  # fmt: skip


def chunks(total: int, size: int = MEGABYTE) -> bytes:
    one = f"{size:x}\r\n".encode() + bytes(size) + b"\r\n"
    return one * (total // size)


SIZES: dict[str, Callable[[], bytes]] = {
    "JSON of 50 MB": lambda: (
        LINE + f"Content-Length: {50 * MEGABYTE}\r\n\r\n".encode() + b" " * 50 * MEGABYTE
    ),
    "JSON of 50 MB in chunks": lambda: LINE + b"Transfer-Encoding: chunked\r\n\r\n" + chunks(50 * MEGABYTE),
    "JSON of a terabyte": lambda: LINE + b"Content-Length: 1099511627776\r\n\r\n",
    "an upload of a terabyte": lambda: PUT + b"Content-Length: 1099511627776\r\n\r\n",
    "an upload in chunks": lambda: (
        PUT + b"Transfer-Encoding: chunked\r\n\r\n" + PART + chunks(MAX_UPLOAD + 2 * MEGABYTE)
    ),
    "a form of the size of an upload": lambda: (
        PUT.replace(b"multipart/form-data; boundary=x", b"application/x-www-form-urlencoded")
        + b"Content-Length: 8000000\r\n\r\n"
    ),
    "a body where none belongs": lambda: (
        b"DELETE /datastore/image?id=x HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9999999999\r\n\r\n"
    ),
}
PUT = (
    b"PUT /datastore/image?image=new HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Content-Type: multipart/form-data; boundary=x\r\n"
)
_HEAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="x.nii.gz"\r\n\r\n'
PART = f"{len(_HEAD):x}\r\n".encode() + _HEAD + b"\r\n"
