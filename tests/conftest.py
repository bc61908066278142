"""What all tests share: hypothesis's profiles, one BLAS thread per process, the worst figures."""

import gc
import os
import signal
import traceback
import warnings

import pytest
import threadpoolctl
from calculus import WORST
from hypothesis import settings
from releases import changed_since, changed_since_finding

from minilora.cli import progress

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# The arrays are small and the test processes may be several: more threads would only wait.
threadpoolctl.threadpool_limits(1)

progress.LOG_SECONDS = float("inf")  # a slow run prints no more than a quick one

# A shell starts a job in the background with SIGINT ignored; the tests that interrupt need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Take the figures that the test records along with its report, from any process."""
    WORST.clear()
    try:
        return (yield)
    finally:
        item.user_properties.extend(("worst", entry) for entry in WORST.items())


def pytest_collection_finish(session):
    """What is there now stays: the collections of garbage below need not look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def collected():
    """Report a stream that was left open among the tests that opened it, not among others."""
    yield
    gc.collect()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Free what a failed test has left open, or the warning about it would fail another test."""
    report = yield
    if report.failed and call.excinfo and not item.config.getoption("usepdb"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traceback.clear_frames(call.excinfo.tb)
            for frame, _ in traceback.walk_tb(call.excinfo.tb):
                assert frame.f_locals is not None  # a look at them lets go of what was cleared
            gc.collect()
    return report


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """What was seen in one release of a library may be otherwise in another: expect no less."""
    try:
        return (yield)
    except (Exception, pytest.fail.Exception) as error:
        mark = pyfuncitem.get_closest_marker("finding")
        changed = (
            changed_since_finding(*mark.args)
            if mark
            else changed_since(pyfuncitem.function.__doc__)
        )
        if changed:
            pytest.xfail(f"no longer so: {'; '.join(changed)}; {error}")
        raise


def pytest_report_teststatus(report, config):
    """Print no dot for a test that passed or was skipped, unless asked by -v."""
    if config.get_verbosity() <= 0 and report.outcome != "failed":
        expected = hasattr(report, "wasxfail")
        category = {"passed": "xpassed", "skipped": "xfailed"} if expected else {}
        if report.when == "call" or report.skipped:
            return category.get(report.outcome, report.outcome), "", ""
    return None


SHOWN = 5


def pytest_terminal_summary(terminalreporter, config):
    """Print the greatest of the figures that the tests recorded, all of them by -v."""
    worst = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for key, entry in getattr(report, "user_properties", ()):
                if key == "worst" and report.when == "call":
                    name, figure = entry
                    worst[name] = max(worst.get(name, 0.0), figure)
    shown = sorted(worst.items(), key=lambda item: -item[1])
    if config.get_verbosity() <= 0:
        shown = shown[:SHOWN]
    if shown:
        terminalreporter.section(f"{len(shown)} worst figures of {len(worst)}")
        for name, figure in shown:
            terminalreporter.write_line(f"{figure:9.2e}  {name}")
