"""What MONAI Label asks a DICOMweb archive, with limits, and with a sentence for whatever goes wrong.

Upstream waits for ever for an archive that does not answer, repeats a question for half a minute, and takes
what came of a series for the whole. Every failure here is an `ArchiveError`: 502 when the archive is away or
answers nonsense, 503 when it keeps us waiting, 404 when it does not have what was asked for.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import requests
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMwebClientX
from monailabel.endpoints import proxy
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from urllib3.exceptions import HTTPError

from monailabel_dfqsam.server.gate.guard import Refusal
from monailabel_dfqsam.server.upstream.threads import slow

_CONNECT_SECONDS = 5.0
# How long an archive may send nothing: some collect a series from elsewhere first.
_SILENT_SECONDS = 60.0
_PATIENCE = (_CONNECT_SECONDS, _SILENT_SECONDS)


# What parsers of JSON, of multipart messages and of DICOM raise for what is none.
_NONSENSE = (ValueError, TypeError, LookupError, AttributeError, EOFError, InvalidDicomError, struct.error)


class ArchiveError(Refusal):
    """The archive did not give what was asked for."""


class ArchiveClient(DICOMwebClientX):  # type: ignore[misc]
    """Upstream's client of an archive, as patient as a person at a viewer."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.set_http_retry_params(retry=False)
        # By this, `get` and `post` ask, too.
        self._session.request = functools.partial(self._session.request, timeout=_PATIENCE)

    def _http_get(self, *arguments: Any, **options: Any) -> requests.Response:
        with failing():
            return _no_page(super()._http_get(*arguments, **options))

    def _http_post(self, *arguments: Any, **options: Any) -> requests.Response:
        with failing():
            return _no_page(super()._http_post(*arguments, **options))

    def search_for_series(self, *arguments: Any, **options: Any) -> list[dict[str, Any]]:
        """Upstream's; raises ArchiveError."""
        with failing():
            found: list[dict[str, Any]] = super().search_for_series(*arguments, **options)
            # Each must be one: an archive may send a list of anything.
            return [entry for entry in found if Dataset.from_json(entry).SeriesInstanceUID]

    def retrieve_series_metadata(self, *arguments: Any, **options: Any) -> list[dict[str, Any]]:
        """Upstream's; raises ArchiveError, also for a series without instances."""
        with failing():
            found: list[dict[str, Any]] = super().retrieve_series_metadata(*arguments, **options)
        if not found:
            raise ArchiveError(404, "the image archive does not have this series any more")
        return found

    def retrieve_series(self, *arguments: Any, **options: Any) -> list[Dataset]:
        """Upstream's; raises ArchiveError."""
        with failing():
            return list(super().retrieve_series(*arguments, **options))

    def store_instances(self, *arguments: Any, **options: Any) -> Dataset:
        """Upstream's; raises ArchiveError, also when the archive says that it did not take one."""
        with failing():
            answer: Dataset = super().store_instances(*arguments, **options)
        if answer.get("FailedSOPSequence"):
            raise ArchiveError(502, "the image archive refused to keep the label")
        return answer


def is_archive() -> bool:
    """Whether the studies of this server are an archive and not a folder."""
    return str(settings.MONAI_LABEL_STUDIES).startswith(("http://", "https://"))


def found_series(client: ArchiveClient, uid: str) -> Dataset:
    """What the archive's list says of a series; raises ArchiveError 404 when that does not have it."""
    entries = map(Dataset.from_json, client.search_for_series(search_filters={"SeriesInstanceUID": uid}))
    # Some archives do not know the filter and answer all that they have.
    found = next((entry for entry in entries if str(entry.SeriesInstanceUID) == uid), None)
    if found is None:
        raise ArchiveError(404, f"the image archive has no series '{uid}'")
    return found


def check_complete(announced: Dataset, received: int) -> None:
    """Refuses a series of which fewer instances came than the archive's list says; raises ArchiveError 502.

    Args:
        announced: the list's entry; many archives do not count.
    """
    count = int(announced.get("NumberOfSeriesRelatedInstances") or 0)
    if received < max(count, 1):
        raise ArchiveError(
            502, f"the image archive sent {received} of the series' {count or 'unknown number of'} instances"
        )


def limit_proxy() -> None:
    """Has upstream's proxy wait no longer than the client above."""
    proxy.requests = SimpleNamespace(
        get=functools.partial(requests.get, timeout=_PATIENCE),
        post=functools.partial(requests.post, timeout=_PATIENCE),
    )


@contextmanager
def failing() -> Iterator[None]:
    """Takes one of the places to wait for the archive; turns failures of asking it into ArchiveErrors."""
    try:
        with slow("the image archive"):
            yield
    except requests.RequestException as error:
        raise _told(error) from None
    except HTTPError as error:  # in the middle of an answer that is read as it comes
        raise ArchiveError(502, f"the image archive broke off its answer ({type(error).__name__})") from None
    except _NONSENSE as error:
        raise ArchiveError(
            502, f"the image archive answered with something that is not DICOMweb ({type(error).__name__})"
        ) from None


def _told(error: requests.RequestException) -> ArchiveError:
    if isinstance(error, requests.Timeout):
        return ArchiveError(503, f"the image archive does not answer within {_SILENT_SECONDS:.0f} s")
    if isinstance(error, json.JSONDecodeError):
        return ArchiveError(502, "the image archive answered with something that is not JSON")
    if error.response is None:
        return ArchiveError(502, f"the image archive does not answer ({type(error).__name__})")
    status = error.response.status_code
    if status in (404, 410):
        return ArchiveError(404, "the image archive does not have this series any more")
    if status in (401, 403):
        return ArchiveError(
            502, f"the image archive does not let this server in ({status}): check its user and password"
        )
    if status in (429, 503):
        return ArchiveError(503, f"the image archive is busy ({status}): try again in a moment")
    return ArchiveError(502, f"the image archive failed ({status})")


def _no_page(response: requests.Response) -> requests.Response:
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise ArchiveError(502, "the image archive answered with a web page: is its DICOMweb address right?")
    return response
