"""The routes of an application made as the server makes it: `python -m tests.list_routes APP STUDIES`."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from typing import Any

from monailabel.config import settings


def on_loop(dependant: Any) -> Iterator[str]:
    """The functions of MONAI Label among a route's handler and dependencies that run on the event loop."""
    call = dependant.call
    name = f"{call.__module__}.{getattr(call, '__name__', type(call).__name__)}"
    if name.startswith("monailabel.") and any(map(inspect.iscoroutinefunction, (call, type(call).__call__))):
        yield name
    for inner in dependant.dependencies:
        yield from on_loop(inner)


def walk(routes: list[Any]) -> Iterator[tuple[str, str, list[str]]]:
    """Method, path, and what of MONAI Label's runs on the event loop, of each."""
    for route in routes:
        inner = getattr(route, "original_router", None)  # FastAPI keeps included routers whole, or did not
        if inner is not None:
            yield from walk(inner.routes)
        else:
            found = sorted(set(on_loop(route.dependant))) if hasattr(route, "dependant") else []
            for method in sorted(getattr(route, "methods", None) or {"GET"}):
                yield method, route.path, found


if __name__ == "__main__":
    settings.MONAI_LABEL_APP_DIR, settings.MONAI_LABEL_STUDIES = sys.argv[1:]
    # These look at the settings when they are imported.
    from monailabel.app import app
    from monailabel.interfaces.utils.app import app_instance

    app_instance().server_mode(True)
    print(json.dumps(list(walk(app.routes))))
