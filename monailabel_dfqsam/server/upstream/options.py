"""Scoring, batches and strategies of MONAI Label, whose options are only read when they run: checked before.

Two that are asked for at once may start twice: one at a time.
"""

from __future__ import annotations

import functools
import random
import threading
from types import SimpleNamespace
from typing import Any

from monailabel.endpoints import activelearning as activelearning_endpoint
from monailabel.endpoints import batch_infer as batch_endpoint
from monailabel.endpoints import scoring as scoring_endpoint
from monailabel.interfaces.utils.app import app_instance
from monailabel.tasks.activelearning import random as random_strategy
from monailabel.utils.async_tasks.task import AsyncTask

from monailabel_dfqsam.server.gate.guard import Refusal
from monailabel_dfqsam.server.gate.json_input import check_options, check_own


def repair_tasks() -> None:
    """Replaces upstream's functions; call it once."""
    _check_scoring()
    _check_batch()
    _check_strategies()
    run, one = AsyncTask.run, threading.Lock()

    def run_alone(*arguments: Any, **options: Any) -> Any:
        with one:
            return run(*arguments, **options)

    AsyncTask.run = staticmethod(run_alone)


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
