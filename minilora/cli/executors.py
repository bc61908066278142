"""Where work goes that several processes share: here, to Dask's workers, or to MPI's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

DASK, MPI = "dask://", "mpi"
"""``dask://HOST:PORT`` names a scheduler of Dask; ``mpi``, the processes that MPI has started."""

CONNECT_SECONDS = 10
"""So long a scheduler is waited for."""


def add_executor(option: Any) -> None:
    """Add the option that says where the processes are."""
    text = (
        "dask://HOST:PORT sends the work to a Dask scheduler's workers, mpi to the processes of "
        "mpiexec -n N python -m mpi4py.futures -m minilora (default: processes here)"
    )
    option("--executor", metavar="WHERE", help=text)


@contextmanager
def opened_executor(name: str | None) -> Iterator[Executor | None]:
    """The executor of this name; None for processes here, which whoever works with it starts.

    Errors: ValueError for a name that there is not, or without a scheduler at its address;
    ImportError that names the extra.
    """
    if name is None:
        yield None
    elif name == MPI:
        with _of_mpi() as executor:
            yield executor
    elif name.startswith(DASK):
        with _client(name) as client:
            # Not pure: a cell that is asked for again is trained again, from its checkpoint.
            yield client.get_executor(pure=False)
    else:
        raise ValueError(f"--executor {name}: expected {DASK}HOST:PORT or {MPI}")


def _client(name: str) -> Any:
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError(_missing("distributed", "dask")) from error
    start = "start one by dask scheduler, and workers by dask worker --nthreads 1"
    try:
        client = Client(f"tcp://{name.removeprefix(DASK)}", timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        found = f"found no scheduler of Dask there ({error})"
        raise ValueError(f"--executor {name}: {found}: {start}") from None
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except OSError:
        client.close()
        raise ValueError(f"--executor {name}: found a scheduler without workers: {start}") from None
    return client


def _of_mpi() -> Any:
    try:
        from mpi4py import MPI as mpi
        from mpi4py.futures import MPIPoolExecutor
    except ImportError as error:
        raise ImportError(_missing("mpi4py", "mpi")) from error
    if mpi.COMM_WORLD.Get_size() < 2:
        raise ValueError(
            "--executor mpi: found one process: start it by mpiexec -n N python -m mpi4py.futures "
            "-m minilora, with N at least 2: one for the work of the command, the others work"
        )
    return MPIPoolExecutor()


def _missing(library: str, extra: str) -> str:
    return f"--executor needs the library {library}: python -m pip install 'minilora[{extra}]'"
