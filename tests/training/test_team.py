"""Several processes: the same bits as one, whoever dies, and whoever goes on."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from extras import needs
from test_train import QUICK, run_of

from minilora.cli.team import Told, ending_together, together
from minilora.spec.optim import clip
from minilora.training import team as team_module
from minilora.training.run_folder import Refused, check_same
from minilora.training.team import ALONE, STARTED_BY, Alone, Team, from_environment, traffic


class Threads:
    """MPI's collective operations among threads, as much of them as a team uses."""

    def __init__(self, size):
        self.size, self.barrier = size, threading.Barrier(size, timeout=30)
        self.values, self.local = [None] * size, threading.local()

    def Get_rank(self):
        return self.local.rank

    def Get_size(self):
        return self.size

    def allgather(self, value):
        self.values[self.local.rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values

    def bcast(self, value):
        return self.allgather(value)[0]

    def Alltoallv(self, send, receive):
        data, counts = send
        parts = np.split(data, np.cumsum(counts)[:-1])
        for_me = [parts[self.local.rank] for parts in self.allgather(parts)]
        assert [part.size for part in for_me] == receive[1]
        receive[0][:] = np.concatenate(for_me)

    def Allgatherv(self, send, receive):
        parts = self.allgather(send)
        assert [part.size for part in parts] == receive[1]
        receive[0][:] = np.concatenate(parts)

    def run(self, work):
        """The results of ``work(team)`` in all ranks."""

        def one(rank):
            self.local.rank = rank
            return work(Team(self))

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))


def groups(n, dtype=np.float32):
    """Gradients of n groups, of several shapes and memory orders, whose sums round."""
    rng = np.random.default_rng(n)

    def drawn(m, k):
        return (rng.standard_normal((m, k)) * 10 ** rng.uniform(-3, 3, (m, k))).astype(dtype)

    return [
        (dtype(rng.standard_normal()), {"b.B": drawn(5, 3), "a.A": drawn(7, 3).T, "n": drawn(1, 1)})
        for _ in range(n)
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("n", [1, 4, 7])
def test_a_team_has_the_sums_of_one_process_bit_for_bit(n, size, dtype):
    parts = groups(n, dtype)
    L, expected = ALONE.sum_gradients(iter(parts), n)
    results = Threads(size).run(lambda team: team.sum_gradients(team.own(parts), n))
    for found_L, found in results:
        assert found_L == L
        assert found_L.dtype == L.dtype
        assert [*found] == [*expected]
        for name, g in found.items():
            assert g.tobytes("A") == expected[name].tobytes("A")
            assert g.flags.f_contiguous == expected[name].flags.f_contiguous
        assert clip(found, 1.0)[1] == clip(expected, 1.0)[1]


def test_another_order_of_the_sums_has_other_bits():
    """What the order is for: as MPI's own sum may add them up."""
    parts = groups(7)
    expected = ALONE.sum_gradients(iter(parts), 7)[1]
    halves = [ALONE.sum_gradients(iter(parts[k::2]), 7)[1] for k in range(2)]
    assert any((halves[0][n] + halves[1][n] != expected[n]).any() for n in expected)


def test_losses_are_added_in_the_order_of_the_groups():
    losses = [np.float32(x) for x in (1e8, 1.0, -1e8, 1.0, 0.5)]
    for size in (2, 3, 4):
        found = Threads(size).run(lambda team: team.sum_losses(iter(team.own(losses)), 5))
        assert found == [sum(losses)] * size
    assert sum(losses[::2]) + sum(losses[1::2]) != sum(losses)
    assert Threads(2).run(lambda team: team.sum_losses([], 0)) == [0, 0]


def test_the_bytes_that_are_sent_are_those_of_the_formula():
    n, size = 8, 4
    parts = [(np.float32(1), {"w": np.ones((4, 25), np.float32)})] * n

    def sent(team):
        team.sum_gradients(team.own(parts), n)
        return team.sent

    assert Threads(size).run(sent) == [traffic(100, n, size)] * size
    assert traffic(100, 1, 1) == 0
    assert traffic(100, 1000, 1000) < 2 * 4 * 100  # two gradients, however many processes


def test_each_group_is_computed_once():
    for size in (1, 2, 3, 8):
        own = Threads(size).run(lambda team: team.own(range(7)))
        assert sorted(i for one in own for i in one) == [*range(7)]


def test_what_one_process_cannot_do_all_know():
    def work(team):
        def fails():
            if team.rank == 1:
                raise ValueError("no such file")
            return "made"

        try:
            return together(team, fails)
        except Told as told:
            return str(told.cause)

    first, second, third = Threads(3).run(work)
    assert first == third == "process 1 of 3: ValueError: no such file"
    assert second == "no such file"
    assert Threads(2).run(lambda team: together(team, lambda: team.rank)) == [0, 1]


def test_an_error_of_one_process_ends_all(capsys):
    class One(Alone):
        size, ended = 2, None

        def end(self, status):
            self.ended = status

    for error, status, said in (
        (MemoryError("12 GB"), 1, "process 0 of 2: MemoryError: 12 GB"),
        (KeyboardInterrupt(), 130, "process 0 of 2: interrupted"),
    ):
        team = One()
        with pytest.raises(type(error)), ending_together(team):
            raise error
        assert team.ended == status
        assert said in capsys.readouterr().err


def test_processes_with_other_data_are_refused():
    run = run_of(QUICK, examples=4)

    def check(team):
        changed = replace(run.data, digest="another") if team.rank == 2 else run.data
        try:
            check_same(replace(run, data=changed, plan=replace(run.plan, team=team)))
        except Refused as refused:
            return str(refused)
        return ""

    for text in Threads(3).run(check):
        assert "process 2 has another run than process 0: the data's files have changed" in text
    assert Threads(2).run(check) == ["", ""]


def test_without_mpi_nothing_is_imported(monkeypatch):
    for name in STARTED_BY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert from_environment() is ALONE
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(ImportError, match=r"started by MPI.*minilora\[mpi\]"):
        from_environment()
    assert from_environment(lambda: Threads(1)) is ALONE


# With MPI itself

mpi = [pytest.mark.slow, needs("mpi4py")]
MPIEXEC = shutil.which("mpiexec", path=os.path.dirname(sys.executable)) or "mpiexec"
TRAIN = (
    *("--learning-rate", "0.01", "--val-fraction", "0.01", "--val-every", "5", "--save-every", "2"),
    *("--dropout", "0.1", "--gradient-accumulation-steps", "2", "--batch-tokens", "3500"),
)  # several groups in a batch


def command(processes, out, *options):
    start = [MPIEXEC, "-n", str(processes)] if processes else []
    return [*start, sys.executable, "-m", "minilora", "train", "--output", out, *TRAIN, *options]


def trained(processes, out, *options, status=0):
    ended = subprocess.run(command(processes, out, *options), capture_output=True, text=True)
    assert ended.returncode == status, ended.stderr
    return ended


def checkpoint(out, step):
    return (out / "checkpoint" / f"step-{step:08}.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    trained(0, out, "--max-steps", "4")
    return out


@pytest.mark.parametrize("processes", [1, 2, 4])
@mpi[0]
@mpi[1]
def test_processes_of_mpi_have_the_same_bits(processes, alone, tmp_path):
    trained(processes, tmp_path / "run", "--max-steps", "4")
    assert checkpoint(tmp_path / "run", 4) == checkpoint(alone, 4)


@mpi[0]
@mpi[1]
def test_a_process_of_mpi_that_dies_ends_the_run_and_another_number_goes_on(alone, tmp_path):
    out = tmp_path / "run"
    killing = """
import os, signal, sys
from minilora.training import loop
from minilora.cli.main import main
step = loop.train_step
def dying(run, state, batches):
    if run.plan.team.rank == 2 and state.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(run, state, batches)
loop.train_step = dying
sys.exit(main(sys.argv[1:]))
"""
    words = command(3, out, "--max-steps", "4")
    at = words.index("-m")
    words[at : at + 2] = ["-c", killing]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0
    assert (out / "checkpoint" / "step-00000002.safetensors").is_file()
    trained(2, out, "--max-steps", "4", "--resume")
    assert checkpoint(out, 4) == checkpoint(alone, 4)


@mpi[0]
@mpi[1]
def test_an_interrupt_of_mpi_saves_the_last_step_and_ends_all(alone, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(2, out, "--max-steps", "4", "--val-every", "1"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not (out / "checkpoint" / "step-00000002.safetensors").is_file():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    if process.returncode:  # it may have been done
        assert "interrupted; saved in" in err
    trained(1, out, "--max-steps", "4", "--val-every", "1", "--resume")
    assert checkpoint(out, 4) == checkpoint(alone, 4)


@mpi[0]
@mpi[1]
def test_a_wrong_option_under_mpi_is_told_once(tmp_path):
    ended = subprocess.run(
        command(3, tmp_path / "run", "--rank", "1000"), capture_output=True, text=True
    )
    assert ended.returncode != 0
    assert ended.stderr.count("rank 1000") == 1


def test_the_team_of_a_plan_is_alone_unless_mpi_says_so():
    assert run_of(QUICK, examples=2).plan.team is team_module.ALONE
