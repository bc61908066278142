"""``minilora bench``: what a step costs here and elsewhere."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minilora.cli.console import NOT_LOADED, OK, files_of, tell, usage_error, write_file
from minilora.cli.options import add_command, add_files, names_of, split
from minilora.cli.progress import progress_bar

if TYPE_CHECKING:
    from minilora.studies.bench.results import Result

ROUNDS, QUICK_ROUNDS = 15, 3


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "bench",
        "compare the time and memory of a training step, and of generation, with another library",
        "Run the same training step on the same model and batch in minilora and in another "
        "library, then generate from the same prompt. Each runs in its own process, in turn. Print "
        "the ratios minilora / library: below 1, minilora takes less.",
        _run,
        "0 measured, 2 wrong usage, 3 the library or one of its requirements is not installed",
    )
    option = parser.add_argument
    option(
        "--peer",
        action="append",
        metavar="PEER",
        help="peft (default), peft-warm, torch, torch-compile, jax or minilora; repeatable, or a,b",
    )
    option(
        "--kind",
        action="append",
        metavar="KIND",
        help="step, forward or generate (default: all); repeatable, or a,b",
    )
    option(
        "--size",
        action="append",
        metavar="SIZE",
        help="tiny, small, medium, smollm2, smollm2-512, or with adapters in the last 8 layers "
        "smollm2-last, smollm2-last-half, where half of the tokens count (default: all); "
        "repeatable, or a,b",
    )
    option(
        "--threads",
        action="append",
        metavar="N",
        help="threads on either side, such as 1,2 (default: 1)",
    )
    option("--rounds", type=int, metavar="N", help=f"rounds at each size (default: {ROUNDS})")
    option("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds of the small sizes")
    option(
        "--group-tokens",
        type=int,
        metavar="N",
        help="minilora's tokens per group of sequences (default: by the model's width and threads)",
    )
    option("--gradient-checkpointing", action="store_true", help="minilora recomputes activations")
    option("--quantized", action="store_true", help="minilora keeps frozen weights in four bits")
    add_files(option, "the results", "json")


def _run(arguments: argparse.Namespace) -> int:
    import json

    from minilora.studies.bench.results import tables

    plan = _plan_of(arguments)
    files = files_of(arguments, "json")
    results, missing = _measure_all(plan)
    if results:
        tell(f"medians of {plan.rounds} rounds\n{tables(results)}", files)
        for path in files.values():
            write_file(path, json.dumps([r.json() for r in results], indent=1) + "\n")
    for error in missing.values():
        usage_error(error, "bench")
    return NOT_LOADED if missing else OK


@dataclass(frozen=True)
class _Plan:
    """What the options ask for."""

    sizes: list[str]
    peers: list[str]
    threads: list[int]
    kinds: list[str]
    rounds: int
    options: dict[str, Any]


def _plan_of(arguments: argparse.Namespace) -> _Plan:
    """Errors: ValueError that names the option, its value and what was expected."""
    from minilora.studies.bench.cases import KINDS, SIZES
    from minilora.studies.bench.sides import SIDES

    sizes = ["tiny", "small"] if arguments.quick else list(SIZES)
    threads = split(arguments.threads) or ["1"]
    if wrong := [n for n in threads if not n.isdecimal() or int(n) < 1]:
        raise ValueError(f"--threads {', '.join(wrong)}: expected numbers from 1")
    default = QUICK_ROUNDS if arguments.quick else ROUNDS
    rounds = default if arguments.rounds is None else arguments.rounds
    for name, value in (("rounds", rounds), ("group-tokens", arguments.group_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: expected at least 1")
    options = ("group_tokens", "gradient_checkpointing", "quantized")
    return _Plan(
        kinds=names_of(arguments, "kind", KINDS) or list(KINDS),
        sizes=names_of(arguments, "size", SIZES) or sizes,
        peers=names_of(arguments, "peer", SIDES) or ["peft"],
        threads=[int(n) for n in threads],
        rounds=rounds,
        options={name: getattr(arguments, name) for name in options},
    )


def _measure_all(plan: _Plan) -> tuple[list[Result], dict[str, str]]:
    """The results, and what each peer that could not start lacks."""
    import tempfile
    from itertools import product
    from pathlib import Path

    from minilora.studies.bench.cases import SIZES, write_case
    from minilora.studies.bench.measure import measure
    from minilora.studies.bench.sides import Missing

    results: list[Result] = []
    missing: dict[str, str] = {}
    pairs = list(product(plan.peers, plan.threads))
    with progress_bar() as progress:
        for i, size in enumerate(plan.sizes):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                write_case(folder, SIZES[size])
                for j, (peer, threads) in enumerate(pairs):
                    if progress:
                        done = i * len(pairs) + j
                        progress(f"{size}, {peer}:", done, len(plan.sizes) * len(pairs))
                    if peer in missing:
                        continue
                    case = size, folder, peer, threads, plan.rounds, plan.options
                    try:
                        results.append(measure(*case, kinds=plan.kinds))
                    except Missing as error:  # the other peers are measured all the same
                        missing[peer] = str(error)
    return results, missing
