"""What all tests share: hypothesis's profiles, one BLAS thread per process, the worst figures."""

import os

import pytest
import threadpoolctl
from calculus import WORST
from hypothesis import settings
from releases import changed_since

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# The arrays are small and the test processes may be several: more threads would only wait.
threadpoolctl.threadpool_limits(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Take the figures that the test records along with its report, from any process."""
    WORST.clear()
    try:
        return (yield)
    finally:
        item.user_properties.extend(("worst", entry) for entry in WORST.items())


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """What was "Seen in" one release of a library may be otherwise in another: expect no less."""
    try:
        return (yield)
    except (Exception, pytest.fail.Exception) as error:
        changed = changed_since(pyfuncitem.function.__doc__)
        if changed:
            pytest.xfail(f"no longer so: {'; '.join(changed)}; {error}")
        raise


def pytest_terminal_summary(terminalreporter):
    """Print the greatest figure of each name."""
    worst = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for key, entry in getattr(report, "user_properties", ()):
                if key == "worst" and report.when == "call":
                    name, figure = entry
                    worst[name] = max(worst.get(name, 0.0), figure)
    if worst:
        terminalreporter.section("worst figures")
        for name, figure in sorted(worst.items()):
            terminalreporter.write_line(f"{figure:9.2e}  {name}")
