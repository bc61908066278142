"""``minilora bench``: what a step costs here and elsewhere."""

from __future__ import annotations

import argparse
from typing import Any

from minilora.cli.console import (
    HOLDS,
    NOT_LOADED,
    add_command,
    add_files,
    files_of,
    progress_bar,
    refuse,
    say,
    split,
    write_file,
)

ROUNDS, FEWER = 15, 3


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "bench",
        "measure a LoRA step's time and memory, and generation, beside another library's",
        "Runs the same step on the same model and batch here and in another library, and lets both "
        "go on from the same tokens, each in a process of its own and in turn; prints the ratios: "
        "below 1 is less here.",
        _run,
        "0 it is measured, 2 wrong usage, 3 the library, or what else the other side needs, is not "
        "installed",
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
        help="tiny, small, medium, smollm2 or smollm2-512 (default: all); repeatable, or a,b",
    )
    option(
        "--threads", action="append", metavar="N", help="threads on either side (default: 1); 1,2"
    )
    option("--rounds", type=int, metavar="N", help=f"rounds at each size (default: {ROUNDS})")
    option("--quick", action="store_true", help=f"{FEWER} rounds of the small sizes")
    option(
        "--tokens",
        type=int,
        metavar="N",
        help="of a group of sequences here (default: by the model's width, and threads)",
    )
    option("--recompute", action="store_true", help="form activations again here for the backward")
    option("--quantised", action="store_true", help="keep the frozen weights in four bits here")
    add_files(option, "the results", "json")


def _run(arguments: argparse.Namespace) -> int:
    import json
    import tempfile
    from itertools import product
    from pathlib import Path

    from minilora.studies.bench import KINDS, SIDES, SIZES, Missing, measure, tables, write_case

    sizes = split(arguments.size) or (["tiny", "small"] if arguments.quick else list(SIZES))
    peers = split(arguments.peer) or ["peft"]
    threads = split(arguments.threads) or ["1"]
    usual = FEWER if arguments.quick else ROUNDS
    rounds = usual if arguments.rounds is None else arguments.rounds
    kinds = split(arguments.kind) or list(KINDS)
    chosen = (("kind", kinds, KINDS), ("size", sizes, SIZES), ("peer", peers, SIDES))
    for option, given, known in chosen:
        if unknown := [name for name in given if name not in known]:
            expected = f"expected some of {', '.join(known)}"
            raise ValueError(f"--{option} {', '.join(unknown)}: {expected}")
    if wrong := [n for n in threads if not n.isdecimal() or int(n) < 1]:
        raise ValueError(f"--threads {', '.join(wrong)}: expected numbers from 1")
    for name, value in (("rounds", rounds), ("tokens", arguments.tokens)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: expected at least 1")
    files = files_of(arguments, "json")
    own = {name: getattr(arguments, name) for name in ("tokens", "recompute", "quantised")}
    results, pairs = [], list(product(peers, threads))
    missing: dict[str, str] = {}
    with progress_bar() as progress:
        for i, name in enumerate(sizes):
            with tempfile.TemporaryDirectory() as made:
                folder = Path(made)
                write_case(folder, SIZES[name])
                for j, (peer, n) in enumerate(pairs):
                    if progress:
                        done = i * len(pairs) + j
                        progress(f"{name}, {peer}:", done, len(sizes) * len(pairs))
                    if peer in missing:
                        continue
                    case = name, folder, peer, int(n), rounds, own
                    try:
                        results.append(measure(*case, kinds=kinds))
                    except Missing as error:  # which gives up nothing of the others
                        missing[peer] = str(error)
    if results:
        say(f"medians of {rounds} rounds\n{tables(results)}")
    for path in files.values() if results else ():
        write_file(path, json.dumps([r.json() for r in results], indent=1) + "\n")
    for why in missing.values():
        refuse(why, "bench")
    return NOT_LOADED if missing else HOLDS
