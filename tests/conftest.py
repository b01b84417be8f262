"""Settings and fixtures for the whole suite."""

from __future__ import annotations

from hypothesis import settings

from tests.models import lite_medsam
from tests.server_fixtures import running

__all__ = ["lite_medsam", "running"]

# A loaded machine makes any deadline a matter of luck.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
