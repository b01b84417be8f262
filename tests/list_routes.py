"""The routes of an application made as the server makes it: `python -m tests.list_routes APP STUDIES`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from monailabel.config import settings


def walk(routes: list[Any]) -> Iterator[tuple[str, str]]:
    """Method and path of each."""
    for route in routes:
        inner = getattr(route, "original_router", None)  # FastAPI keeps included routers whole, or did not
        if inner is not None:
            yield from walk(inner.routes)
        else:
            yield from ((method, route.path) for method in sorted(getattr(route, "methods", None) or {"GET"}))


if __name__ == "__main__":
    settings.MONAI_LABEL_APP_DIR, settings.MONAI_LABEL_STUDIES = sys.argv[1:]
    # These look at the settings when they are imported.
    from monailabel.app import app
    from monailabel.interfaces.utils.app import app_instance

    app_instance().server_mode(True)
    print(json.dumps(list(walk(app.routes))))
