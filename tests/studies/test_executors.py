"""Work on other machines' processes: the same results, also where a worker is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from extras import needs

from minilora.cli.executors import opened_executor
from minilora.cli.main import main
from minilora.studies.processes import MOST_LOST, in_processes
from minilora.verify.selftest import _all_done

SWEEP = (
    *("sweep", "--ranks", "1,2", "--learning-rates", "0.01", "--seeds", "0,1", "--max-steps", "30"),
    *("--val-fraction", "0.01"),
)


def square(x):
    return x * x


def once_killed(item):
    """The first time, the process is killed in its work."""
    x, mark = item
    if x == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return x * x


def killed(x):
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_executor_is_asked_by_the_interface_of_concurrent_futures():
    with ThreadPoolExecutor(2) as pool:
        assert dict(in_processes(square, [3, 4, 5], 1, pool)) == {0: 9, 1: 16, 2: 25}
        jobs = [("alarms", ("linear", "float64", 0, seed, 2)) for seed in (0, 1)]
        there = list(_all_done(jobs, 1, None, pool))
    assert there == list(_all_done(jobs, 1, None, None))


@pytest.mark.slow
def test_the_work_of_a_killed_process_is_begun_again(tmp_path):
    items = [(x, tmp_path / "mark") for x in range(5)]
    assert dict(in_processes(once_killed, items, 2)) == {x: x * x for x in range(5)}
    assert (tmp_path / "mark").exists()


@pytest.mark.slow
def test_work_that_kills_each_process_is_an_error():
    with pytest.raises(MemoryError, match=f"{MOST_LOST} workers were killed"):
        list(in_processes(killed, [1], 1))


@pytest.mark.parametrize("name", ["local", "dask", "tcp://x:1"])
def test_another_name_is_refused(name):
    with pytest.raises(ValueError, match="expected dask://HOST:PORT or mpi"), opened_executor(name):
        pass


def test_a_missing_library_is_named_with_its_extra(monkeypatch, capsys):
    for name, module, extra in (
        ("dask://127.0.0.1:9", "distributed", "dask"),
        ("mpi", "mpi4py", "mpi"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        assert main(["selftest", "--level", "linear", "--executor", name]) == 3
        assert f"minilora[{extra}]" in capsys.readouterr().err


def rows(out):
    """The sweep's results, without what differs from run to run."""
    found = json.loads((out / "sweep.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    out = tmp_path_factory.mktemp("local") / "sweep"
    assert main([*SWEEP, "--jobs", "1", "--output", str(out)]) == 0
    return out


ON_DASK = """
import os, signal, sys, threading, time
from pathlib import Path

from distributed import Client, LocalCluster

from minilora.cli.main import main

if __name__ == "__main__":
    out = Path(sys.argv[1])
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address.replace("tcp://", "dask://")

        def kill_one():
            while not list(out.glob("*/checkpoint/*")):
                time.sleep(0.02)
            with Client(cluster.scheduler_address) as client:
                busy = {at for at, tasks in client.processing().items() if tasks}
                pids = client.run(os.getpid, workers=list(busy))
            print("killed", os.kill(next(iter(pids.values())), signal.SIGKILL))

        killing = threading.Thread(target=kill_one)
        killing.start()
        status = main([*sys.argv[2:], "--output", str(out), "--executor", address])
        killing.join()
    sys.exit(status)
"""


@pytest.mark.slow
@needs("distributed")
def test_the_cells_of_a_sweep_on_dask_survive_a_killed_worker(local, tmp_path):
    out, script = tmp_path / "sweep", tmp_path / "on_dask.py"
    script.write_text(ON_DASK)
    words = [sys.executable, str(script), str(out), *SWEEP]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "killed None" in ended.stdout
    assert rows(out) == rows(local)


@pytest.mark.slow
@needs("mpi4py")
def test_the_processes_of_mpi_have_the_same_rows(local, tmp_path):
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or "mpiexec"
    out = tmp_path / "sweep"
    words = [mpiexec, "-n", "3", sys.executable, "-m", "mpi4py.futures", "-m", "minilora", *SWEEP]
    words += ["--output", str(out), "--executor", "mpi"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert rows(out) == rows(local)
