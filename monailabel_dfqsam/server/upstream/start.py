"""Starts MONAI Label's server where its own command fails or dawdles.

- With `MONAI_LABEL_CORS_ORIGINS` set, that command ends at once: it writes its settings out as JSON, and the
  addresses among them are objects since pydantic 2.10. Here they are written as text.
- When it is told to end, it waits for clients to close their connections, half a minute for one that is gone
  without TLS' farewell, and for ever for one that is not. Here it waits a few seconds.
- It loads MONAI, which takes most of the time until it answers: see `imports`. A fifth of the rest is
  the search for garbage in what is being loaded, which is put off.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import sys
from types import SimpleNamespace
from typing import NoReturn

from monailabel_dfqsam.server.upstream import imports

logger = logging.getLogger(__name__)

# Less than the ten after which a container is killed.
_FAREWELL_SECONDS = 5
_TURN_SECONDS = 0.001


def start() -> None:
    """What `monailabel` does with the command line."""
    gc.disable()  # until `settle`
    imports.defer()
    import uvicorn
    from monailabel import main

    main.json = SimpleNamespace(dumps=functools.partial(json.dumps, default=str))
    main.uvicorn = SimpleNamespace(
        run=functools.partial(uvicorn.run, timeout_graceful_shutdown=_FAREWELL_SECONDS)
    )
    main.Main().run()


def end_with(error: Exception) -> NoReturn:
    """Lets the server end at its start with a sentence, and without the trace of where it was raised."""
    logger.error("%s", error)
    logging.getLogger("uvicorn.error").addFilter(lambda record: "Traceback" not in record.getMessage())
    raise error


def settle() -> None:
    """To be called when all is loaded: none of it is searched for garbage, and threads take short turns."""
    gc.freeze()
    gc.enable()
    # A click takes turns with whatever else runs: a fifth of Python's own turn is a fifth of the wait.
    sys.setswitchinterval(_TURN_SECONDS)


if __name__ == "__main__":
    start()
