"""Files that lie, loop or grow: a refusal in bounded time and memory, and never a traceback."""

import resource
import signal
import sys
from contextlib import contextmanager

import pytest
from marks import others_slow
from merge_catalogue.hostile import HOSTILE, right

from minilora.cli.main import main

SECONDS, ROOM = 12, 2**30


@contextmanager
def bounded():
    """Fail after so many seconds of computing, and refuse a gigabyte beyond what is in use."""

    def late(*_):
        raise RuntimeError(f"after {SECONDS} seconds of computing it still goes on")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    old = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


def audit(folder):
    with bounded():
        return main(["audit", "merged", "--base", str(folder / "base"), "--adapter",
                     str(folder / "adapter"), "--merged", str(folder / "merged")])  # fmt: skip


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are set as Linux has them")


def test_the_same_files_without_a_lie_are_right(tmp_path):
    right(tmp_path)
    assert audit(tmp_path) == 0


QUICK = (
    "header of 2 to the 60 bytes",
    "shape whose product overflows",
    "file a pipe",
    "index leaves the folder",
    "shards that link in a loop",
    "config of a gigabyte",
    "pattern without end",
    "gguf of 2 to the 60 tensors",
)


@pytest.mark.parametrize("name", others_slow(list(HOSTILE), *QUICK))
def test_a_hostile_file_is_refused(name, tmp_path, capsys):
    spoil, statuses = HOSTILE[name]
    right(tmp_path)
    spoil(tmp_path)
    assert audit(tmp_path) in statuses
    said = capsys.readouterr()
    assert said.err or said.out


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_ends_the_audits_of_adapters_and_conversions(name, tmp_path):
    spoil, _ = HOSTILE[name]
    right(tmp_path)
    spoil(tmp_path)
    base, adapter, merged = (str(tmp_path / at) for at in ("base", "adapter", "merged"))
    for command in (
        ["adapter", adapter, "--base", base],
        ["adapter", adapter, "--base", merged],
        ["converted", "--from", base, "--to", merged],
        ["converted", "--from", adapter, "--to", adapter],
    ):
        with bounded():
            assert main(["audit", *command]) in (0, 1, 3, 4)
