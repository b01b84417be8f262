"""Settings and fixtures for the whole suite."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.server_fixtures import running

__all__ = ["running"]

# A loaded machine makes any deadline a matter of luck.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where `-n` makes several processes, each file is one's, and so are all tests of the shared server."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            group = "running" if "running" in getattr(item, "fixturenames", ()) else item.path.name
            item.add_marker(pytest.mark.xdist_group(group))
