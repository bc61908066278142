"""The options of ``pytest --pyargs minilora.verify``.

pytest loads this module at the start of every session, by its entry point, so it imports nothing
else of minilora until ``--minilora-implementation`` is given.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--minilora-implementation`` and what goes with it."""
    group = parser.getgroup("minilora", "checks of LoRA: pytest --pyargs minilora.verify")
    group.addoption(
        "--minilora-implementation",
        metavar="TARGET",
        help="implementation to check: a shipped peer, or package.module:name (default: minilora)",
    )
    group.addoption(
        "--minilora-profile", default="ci", metavar="PROFILE", help="quick, ci or nightly"
    )
    group.addoption(
        "--minilora-seed", type=int, default=0, metavar="N", help="draws other cases (default: 0)"
    )
    group.addoption("--minilora-known", metavar="FILE", help="JSON list of known deviations")


def pytest_configure(config: pytest.Config) -> None:
    """Load the implementation, if one is given, before anything is collected."""
    if config.getoption("--minilora-implementation", None):
        from minilora.verify.pytest_suite import from_options

        from_options(config)
