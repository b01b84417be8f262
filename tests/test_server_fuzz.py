"""What the server's own description allows, and what it forbids, tried by a fuzzer: no fault of the server.

Half of the requests are left as they were made, half get names that exist, so that they come further.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.besieged import Besieged, besieged
from tests.server_fixtures import OBJECT

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

__all__ = ["besieged"]

EXAMPLES = 12  # of each operation, in each of two ways
SECONDS = 30.0

# What at least one request gets through to, so that the fuzzer is known to come further than the door.
REACHED = {
    "GET /info/", "POST /infer/{model}", "POST /activelearning/{strategy}", "GET /session/{session_id}",
    "GET /datastore/image", "GET /datastore/image/info", "PUT /datastore/image/info", "GET /logs/",
    "GET /dfqsam/status", "DELETE /train/",
}  # fmt: skip

_finite = st.floats(allow_nan=False, allow_infinity=False)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | _finite | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_points = st.lists(st.lists(st.integers(-2, 80) | _finite, min_size=2, max_size=4), max_size=4)
_OPTIONS = (
    "foreground", "background", "roi", "slice", "label", "window", "window_center", "window_width",
    "multimask", "largest_cc", "fill_holes", "result_extension", "result_dtype", "result_compress",
    "label_info", "client_id", "save_label", "label_tag", "strategy", "gpus", "checkpoint", "device",
    "max_workers", "iterations",
)  # fmt: skip
# One or two at a time beside a right click, since the first that is wrong ends a request.
_known = st.builds(
    lambda right, more: {**right, **more},
    st.sampled_from([{}, {"foreground": [list(OBJECT)]}]),
    st.dictionaries(st.sampled_from(_OPTIONS), _json | _points, max_size=2),
)


class Findings:
    """What was tried, and what came of it.

    Attributes:
        session: one that is there.
        statuses: operation -> how often each status was answered.
        faults: operation and status -> an answer.
    """

    def __init__(self, session: str) -> None:
        self.session = session
        self.statuses: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self.faults: dict[tuple[str, int], str] = {}

    def send(self, case: Any) -> None:
        answer = case.call(timeout=SECONDS)
        self.statuses[case.operation.label][answer.status_code] += 1
        if answer.status_code >= 500:
            self.faults[case.operation.label, answer.status_code] = f"{case.as_curl_command()}: {answer.text}"

    def explore(self, cases: st.SearchStrategy[Any], examples: int) -> None:
        """Sends that many requests."""

        @seed(4)
        @settings(
            max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=cases, data=st.data())
        def probe(case: Any, data: st.DataObject) -> None:
            if data.draw(st.booleans()):
                _come_further(case, data, self.session)
            _start_nothing(case)
            self.send(case)

        probe()


@pytest.mark.slow
def test_nothing_that_is_described_is_a_fault(besieged: Besieged) -> None:
    schema = schemathesis.openapi.from_url(f"{besieged.server.url}/openapi.json")
    volume = (Path(besieged.server.studies) / "phantom0.nii.gz").read_bytes()
    made = besieged.send_form("PUT", "/session/", {"files": ("own.nii.gz", volume)})
    findings = Findings(json.loads(made.body)["session_id"])
    for found in schema.get_all_operations():
        operation = found.ok()
        # Clicks have the most options.
        examples = EXAMPLES * (4 if operation.path == "/infer/{model}" else 1)
        for mode in schemathesis.GenerationMode:
            findings.explore(operation.as_strategy(generation_mode=mode), examples)
    statuses = findings.statuses
    assert not findings.faults
    assert len(statuses) > 30
    assert min(counts.total() for counts in statuses.values()) >= EXAMPLES // 2, statuses
    assert {label for label, counts in statuses.items() if counts[200]} >= REACHED, statuses
    assert besieged.send("GET", "/info/").status == 200


def _come_further(case: Any, data: st.DataObject, session: str) -> None:
    """Puts names that exist, and options that are known with any value, in place of random ones."""
    names = {"model": "dfqsam", "strategy": "random"}
    if case.method == "GET":
        names["session_id"] = session
    for key in set(names) & set(case.path_parameters or {}):
        case.path_parameters[key] = names[key]
    if case.path.startswith("/datastore"):
        for key in {"image", "label", "tag"} & set(case.query or {}):
            case.query[key] = {"tag": "final"}.get(key, "phantom0")
    if case.method == "POST" and case.path.startswith("/infer/"):
        case.query = {**(case.query or {}), "image": "phantom0"}
        case.query["session_id"] = data.draw(st.sampled_from(["", session]))
        case.query.pop("output", None)
        if isinstance(case.body, dict):
            case.body = {"params": ""}  # files would be refused by their names
    if isinstance(case.body, dict):
        for key in {"params", "info"} & set(case.body):
            case.body[key] = json.dumps(data.draw(_known))
        if case.media_type == "application/json":
            case.body.update(data.draw(_known))


def _start_nothing(case: Any) -> None:
    """A quantization costs a minute; what is wrong with its other options is found all the same."""
    if case.method == "POST" and case.path.startswith("/train") and isinstance(case.body, dict):
        case.body["bits"] = 5
    elif case.method == "POST" and case.path.startswith("/train"):
        case.path_parameters["model"] = "nobody"
