"""The options of ``pytest --pyargs minilora.verify``.

pytest reads a package's own conftest.py too late for options, so this is a plugin that is found by
its entry point, or by ``-p minilora.verify.pytest_plugin`` where the package is not installed.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from minilora.verify import engine
from minilora.verify.implementation.contract import OWN, LoadError, load

_ASKED = pytest.StashKey[tuple[object, dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--implementation`` and what goes with it."""
    group = parser.getgroup("minilora", "checks of LoRA: pytest --pyargs minilora.verify")
    group.addoption(
        "--implementation",
        metavar="TARGET",
        help="what minilora.verify checks: a shipped peer, or package.module:name; without it, "
        "minilora itself",
    )
    group.addoption(
        "--minilora-profile", default="ci", metavar="PROFILE", help="quick, ci or nightly"
    )
    group.addoption(
        "--minilora-seed", type=int, default=0, metavar="N", help="draws other cases (default: 0)"
    )
    group.addoption("--minilora-known", metavar="FILE", help="JSON list of known deviations")


def pytest_configure(config: pytest.Config) -> None:
    """Finds the implementation that is asked for before anything is collected."""
    if config.getoption("--implementation", None):
        asked(config)


def asked(config: pytest.Config) -> tuple[object, dict[str, Any]]:
    """The implementation, and the options of `suite.each`. Raises pytest.UsageError."""
    if _ASKED not in config.stash:
        target = config.getoption("--implementation", None)
        path = config.getoption("--minilora-known", None)
        try:
            options = {
                "profile": config.getoption("--minilora-profile", "ci"),
                "seed": config.getoption("--minilora-seed", 0),
                "known": engine.read_known(path) if path else None,
                "command": ["minilora", "verify", *filter(None, [target])],
            }
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a library's own at its import are no verdict
                config.stash[_ASKED] = load(target or OWN), options
        except (LoadError, engine.UsageError) as error:
            raise pytest.UsageError(f"--implementation: {error}") from None
    return config.stash[_ASKED]
