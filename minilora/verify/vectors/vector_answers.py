"""Answers to test vectors, from files or from an implementation, and the report on them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from minilora.io.errors import FormatError
from minilora.io.files import pack, pack_json, read_json
from minilora.verify import engine
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import Fault, LoadError, Skip, tidy
from minilora.verify.core.types import Case, Check, Comparison, Diagnosis, Limits
from minilora.verify.diagnosis.diagnose import Direct, answers, candidates
from minilora.verify.implementation.contract import CONVENTIONS, positional
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.messages import RESULTS
from minilora.verify.mutants.mutant import Mutant
from minilora.verify.report.report import Report
from minilora.verify.report.result import Result
from minilora.verify.vectors.files import VERSION
from minilora.verify.vectors.tags import NOTES
from minilora.verify.vectors.vector import Vector, gathered

Array = np.ndarray

FILE = "answers.json"


class Answered:
    """The answers in a folder, as an implementation that gives no others.

    ``DTYPE.safetensors``, or ``DTYPE.ANYTHING.safetensors``, holds the answers in a dtype as
    tensors ID.out.NAME. ``answers.json`` may name the implementation and its version, list the ids
    that it refused, and declare conventions. Raises LoadError.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        said = self._said(folder / FILE)
        self.name = tidy(said.get("name", "answers"), 60)
        self.version = tidy(said.get("version", ""), 120)
        self.refused = frozenset(map(str, said.get("refused", ())))
        self.conventions = dict(said.get("conventions", {}))
        self.arrays: dict[str, dict[str, dict[str, Array]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            dtype = path.name.partition(".")[0]
            if dtype not in DTYPES:
                says = f"{dtype!r} is no dtype; answers stand in DTYPE.safetensors"
                raise LoadError(f"{path}: {says}, with one of {', '.join(DTYPES)}")
            self._take(path, self.arrays.setdefault(dtype, {}))
        if not self.arrays:
            kinds = ", ".join(f"{dtype}.safetensors" for dtype in DTYPES)
            raise LoadError(f"{folder} has no answers; expected some of {kinds}")
        self.dtypes = tuple(dtype for dtype in DTYPES if dtype in self.arrays)

    @staticmethod
    def _said(path: Path) -> dict[str, Any]:
        if not path.exists():
            return {}
        try:
            said = read_json(path)
        except FormatError as error:
            raise LoadError(str(error)) from None
        if not isinstance(said.get("refused", []), list):
            raise LoadError(f"{path}: 'refused' is {tidy(said['refused'], 60)}, expected a list")
        for name, value in (conventions := said.get("conventions", {})).items():
            if value not in CONVENTIONS.get(name, ()):
                known = json.dumps(CONVENTIONS)
                raise LoadError(f"{path}: conventions {conventions}, expected of {known}")
        return said

    @staticmethod
    def _take(path: Path, arrays: dict[str, dict[str, Array]]) -> None:
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118
                    own, _, what = name.partition(".out.")
                    arrays.setdefault(own, {})[what] = file.get_tensor(name)
        except Exception as error:
            raise LoadError(f"{path} is no safetensors file: {tidy(error)}") from None

    def of(self, own: str, dtype: str) -> dict[str, Array]:
        """The answers to a vector, by their names."""
        return self.arrays.get(dtype, {}).get(own, {})


def replayed(subject: GuardedImplementation, vector: Vector, dtype: str) -> dict[str, Array]:
    """What an implementation answers to a vector. Raises Skip or Fault."""
    kinds = {"f": DTYPES[dtype], "u": np.dtype(bool)}
    given = {n: v.astype(kinds.get(v.dtype.kind, v.dtype)) for n, v in vector.inputs.items()}
    arguments = gathered(vector.settings, given)
    names = [n for n in positional(vector.method) if n in arguments and n not in ("alpha", "r")]
    args = [arguments.pop(name) for name in names]
    if vector.method == "optimizer_steps":
        args, arguments = [*args, arguments], {}
    answer = subject.call(vector.method, *args, **arguments)
    if vector.method in RESULTS:
        return {RESULTS[vector.method]: answer}
    if vector.method == "optimizer_steps":
        return {name: np.stack([step[name] for step in answer]) for name in vector.outputs}
    return {name: answer[name] for name in vector.outputs if name in answer}


def _given(subject: GuardedImplementation, vector: Vector, dtype: str) -> dict[str, Array] | None:
    """The answers to a vector, perhaps none; None where it was refused."""
    if isinstance(given := subject.implementation, Answered):
        return None if vector.id in given.refused else given.of(vector.id, dtype)
    if not subject.has(vector.method):
        raise Skip(f"not supported: no method {vector.method}")
    try:
        return replayed(subject, vector, dtype)
    except Fault as fault:
        if fault.kind == "raises" and vector.result == "invalid":
            return None
        raise


def compared(
    subject: GuardedImplementation, vector: Vector, dtype: str, conventions: Mapping[str, str]
) -> Iterator[Comparison]:
    """The answers to a vector beside the true ones. Raises Skip or Fault."""
    given = _given(subject, vector, dtype)
    if given is None and vector.result == "invalid":
        yield Comparison("refusal", np.ones(()), np.ones(()))
        return
    if given is None:
        raise Skip("not supported: refused")
    if not given:
        raise Skip("no answer")
    if vector.result == "invalid":
        what = "; ".join(NOTES[flag]["description"] for flag in vector.flags)
        raise Fault("accepts what is invalid", f"{', '.join(given)}, where {what}")
    missing = []
    for name, output in vector.expected(conventions).items():
        if name in given:
            array = subject.answer(given[name], name, output.want.shape, dtype)
            sigma = output.sigma.get(dtype)
            allowed = Limits(output.max_z, output.rms_z, 0.0)
            yield Comparison(name, array, output.want, sigma, allowed)
        elif not output.optional:
            missing.append(f"{vector.id}.out.{name}")
    if missing:
        raise Fault("missing", f"no {', '.join(missing)}")


def _checks(given: Sequence[Vector], conventions: Mapping[str, str]) -> list[Check]:
    """The vectors of each check, as a check whose case i is the i-th of a dtype."""
    from minilora.verify.checks.registry import CHECKS

    titles = {check.id: check.title for check in CHECKS}
    by_check: dict[str, list[Vector]] = {}
    for vector in given:
        by_check.setdefault(vector.check, []).append(vector)
    return [_check(own, titles.get(name, name), conventions) for name, own in by_check.items()]


def _check(own: Sequence[Vector], title: str, conventions: Mapping[str, str]) -> Check:
    name, level = own[0].check, own[0].level

    def of(dtype: str) -> list[Vector]:
        return [vector for vector in own if dtype in vector.dtypes]

    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        return compared(subject, of(case.dtype)[case.number], case.dtype, conventions)

    def diagnose(subject: GuardedImplementation, dtype: str, seed: int) -> tuple[Diagnosis, ...]:
        there = [i for i, v in enumerate(of(dtype)) if v.lane == "rounding" and v.outputs]
        return _diagnosed(plain, subject, [Case(name, dtype, i, seed) for i in there])

    plain = Check(name, level, (), title, run, lambda profile, dtype: len(of(dtype)))
    return replace(plain, diagnose=diagnose)


def _diagnosed(
    check: Check, subject: GuardedImplementation, cases: Sequence[Case]
) -> tuple[Diagnosis, ...]:
    """The mutants that give the same answers to all of these cases that are answered."""
    answered = [(case, found) for case in cases if (found := answers(check, subject, case))]
    theirs = [found for _, found in answered]
    if not any(each.judge().verdict == "fail" for found in theirs for each in found.values()):
        return ()

    def ours_of(m: Mutant) -> list[dict[str, Comparison]]:
        wrong = Direct(m.make())
        return [answers(check, wrong, case) for case, _ in answered]

    return tuple(each.named() for each in candidates(check.level, theirs, ours_of))


def judge(
    given: Sequence[Vector],
    implementation: object,
    *,
    seed: int = 0,
    command: Sequence[str] = (),
    progress: engine.Progress | None = None,
) -> Report:
    """The report on answers (`Answered`), or on an implementation that is put the vectors.

    Where no convention is declared, that one holds under which fewer answers deviate; it is the
    same for all.
    """
    subject = Direct(implementation)
    conventions, notes = _conventions(given, subject)
    report = engine.run(_checks(given, conventions), implementation, progress=progress)
    if isinstance(implementation, Answered):
        ids = {vector.id for vector in given}
        theirs = {own for arrays in implementation.arrays.values() for own in arrays}
        if strange := sorted((theirs | implementation.refused) - ids):
            more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
            notes += (f"not asked here: {', '.join(strange[:3])}{more}",)
    return replace(
        report,
        profile=f"vectors v{VERSION}",
        seed=seed,
        conventions=conventions,
        notes=notes,
        results=tuple(_named(result, given, command) for result in report.results),
    )


def _conventions(
    given: Sequence[Vector], subject: GuardedImplementation
) -> tuple[dict[str, str], tuple[str, ...]]:
    declared = subject.conventions.get("dora_norm")
    concerned = [vector for vector in given if vector.alternatives]
    if declared in CONVENTIONS["dora_norm"] or not concerned:
        return {"dora_norm": declared or "detached"}, ()

    def deviating(value: str) -> int:
        checks = _checks(concerned, {"dora_norm": value})
        return sum(
            judged.verdict == "fail"
            for check in checks
            for dtype in subject.dtypes
            for number in range(check.cases("ci", dtype))
            for judged in engine.judged(check, subject, Case(check.id, dtype, number, 0))[0]
        )

    found = min(CONVENTIONS["dora_norm"], key=deviating)
    if found == "detached":
        return {"dora_norm": found}, ()
    return {"dora_norm": found}, (f"taken for it: dora_norm {found}, which is not declared",)


def _named(result: Result, given: Sequence[Vector], command: Sequence[str]) -> Result:
    """The result with the vectors' ids in the place of the cases'."""
    own = [v.id for v in given if v.check == result.check and result.dtype in v.dtypes]

    def name(case: str) -> str:
        return own[int(case.rpartition(":")[2])] if case else ""

    shown = name(result.case or result.worst_case) or own[0]
    return replace(
        result,
        case=name(result.case),
        worst_case=name(result.worst_case),
        faults=tuple(replace(fault, case=name(fault.case)) for fault in result.faults),
        reproduce=shlex.join([*command, "--case", shown]) if command else shown,
    )


def answer(given: Sequence[Vector], implementation: object) -> dict[str, bytes]:
    """The files of answers (`Answered`) that a Python implementation gives."""
    subject = GuardedImplementation(implementation)
    arrays: dict[str, dict[str, Array]] = {}
    refused = set()
    for vector in given:
        for dtype in vector.dtypes:
            if dtype in subject.dtypes and subject.has(vector.method):
                try:
                    found = _given(subject, vector, dtype)
                except Skip:
                    found = None
                refused |= {vector.id} if found is None else set()
                for name, array in (found or {}).items():
                    arrays.setdefault(dtype, {})[f"{vector.id}.out.{name}"] = np.asarray(array)
    said: dict[str, Any] = {"name": subject.name, "version": subject.version}
    declared = {n: v for n, v in subject.conventions.items() if v in CONVENTIONS.get(n, ())}
    said |= {"refused": sorted(refused), "conventions": declared}
    packed = {f"{d}.safetensors": pack(f"{d}.safetensors", own) for d, own in arrays.items()}
    return {FILE: pack_json(said), **packed}
