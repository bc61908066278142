"""Answers to test vectors, from files or from an implementation, and the report on them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors import safe_open

from minilora.io.errors import FormatError
from minilora.io.files import pack, pack_json, read_json
from minilora.verify import engine, judging
from minilora.verify.checks.inference import log_probabilities
from minilora.verify.checks.registry import CHECKS
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.core.errors import Fault, LoadError, Skip, tidy, type_words
from minilora.verify.core.types import Case, Check, Comparison, Diagnosis, Limits
from minilora.verify.diagnosis.answers import Direct, answers
from minilora.verify.diagnosis.candidates import candidates, mutants_for
from minilora.verify.implementation.contract import CONVENTIONS, LAYOUTS, positional
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.messages import RESULTS
from minilora.verify.mutants.mutant import Mutant
from minilora.verify.report.report import Report
from minilora.verify.report.result import Result
from minilora.verify.vectors.files import VERSION
from minilora.verify.vectors.recorded import FOLDERS, replay_session
from minilora.verify.vectors.tags import NOTES
from minilora.verify.vectors.vector import Vector, gathered, put_files

Array = np.ndarray

FILE = "answers.json"

WHOLE = ("targets", "trainable", "deltas", "load")
"""The methods that answer arrays by names which they choose: none but those expected may be there,
unless it is 0."""


class Answered:
    """The answers in a folder, as an implementation that gives no others.

    ``DTYPE.safetensors``, or ``DTYPE.ANYTHING.safetensors``, holds the answers in a dtype as
    tensors ID.out.NAME. ``answers.json`` may name the implementation and its version, list the ids
    that it refused, and declare conventions. Raises LoadError.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        declared = self._declarations(folder / FILE)
        self.name = tidy(declared.get("name", "answers"), 60)
        self.version = tidy(declared.get("version", ""), 120)
        self.refused = frozenset(map(str, declared.get("refused", ())))
        self.conventions = dict(declared.get("conventions", {}))
        self.arrays: dict[str, dict[str, dict[str, Array]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            dtype = path.name.partition(".")[0]
            if dtype not in DTYPES:
                expected = f"expected DTYPE.safetensors with one of {', '.join(DTYPES)}"
                raise LoadError(f"{path}: {dtype!r} is not a dtype; {expected}")
            self._take(path, self.arrays.setdefault(dtype, {}))
        if not self.arrays:
            kinds = ", ".join(f"{dtype}.safetensors" for dtype in DTYPES)
            raise LoadError(f"{folder} has no answers; expected some of {kinds}")
        self.dtypes = tuple(dtype for dtype in DTYPES if dtype in self.arrays)

    @staticmethod
    def _declarations(path: Path) -> dict[str, Any]:
        if not path.exists():
            return {}
        try:
            declared = read_json(path)
        except FormatError as error:
            raise LoadError(str(error)) from None
        refused, conventions = declared.get("refused", []), declared.get("conventions", {})
        if not isinstance(refused, list):
            raise LoadError(f"{path}: 'refused' is {tidy(refused, 60)}, expected a list")
        for name, value in conventions.items():
            if value not in CONVENTIONS.get(name, ()):
                known = json.dumps(CONVENTIONS)
                raise LoadError(f"{path}: conventions {conventions}, expected some of {known}")
        return declared

    @staticmethod
    def _take(path: Path, arrays: dict[str, dict[str, Array]]) -> None:
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118
                    vector, _, output = name.partition(".out.")
                    arrays.setdefault(vector, {})[output] = file.get_tensor(name)
        except Exception as error:
            raise LoadError(f"{path} is not a safetensors file: {tidy(error)}") from None

    def of(self, vector: str, dtype: str) -> dict[str, Array]:
        """The answers to a vector, by their names."""
        return self.arrays.get(dtype, {}).get(vector, {})


def replayed(subject: GuardedImplementation, vector: Vector, dtype: str) -> dict[str, Array]:
    """An implementation's answers to a vector. Raises Skip or Fault."""
    inputs = {
        n: v.astype(DTYPES[dtype]) if v.dtype.kind == "f" else v for n, v in vector.inputs.items()
    }
    arguments = gathered(vector.settings, inputs)
    if vector.method == "session":
        found = replay_session(subject, arguments)
        refused = {n: v.astype(DTYPES[dtype]) for n, v in found.items() if n.endswith(".refused")}
        return found | refused
    with TemporaryDirectory(prefix="minilora-") as folder:
        put_files(Path(folder), vector.files)
        arguments |= {n: f"{folder}/{arguments[n]}" for n in FOLDERS if n in arguments}
        names = [n for n in positional(vector.method) if n in arguments and n not in ("alpha", "r")]
        args = [arguments.pop(name) for name in names]
        if "settings" in positional(vector.method):
            steps = subject.call(vector.method, *args, arguments)
            count = len(next(iter(vector.outputs.values())).want)
            steps = list(subject.items(steps, count, "the list of steps"))
            return {n: np.stack([subject.entry(s, n) for s in steps]) for n in vector.outputs}
        answer = subject.call(vector.method, *args, **arguments)
    return _arrays(subject, vector, answer, dtype)


def _arrays(
    subject: GuardedImplementation, vector: Vector, answer: Any, dtype: str
) -> dict[str, Array]:
    """An answer as the arrays of a vector. Raises Fault."""
    if vector.method == "logits":
        z = np.asarray(answer, np.float64)
        rows = log_probabilities(z.reshape(-1, z.shape[-1]).T).T
        return {"log_probabilities": rows.reshape(z.shape).astype(DTYPES[dtype])}
    if vector.method in RESULTS:
        return {RESULTS[vector.method]: answer}
    if vector.method in WHOLE and not (vector.method == "trainable" or isinstance(answer, Mapping)):
        raise Fault("missing", f"{vector.method} gave {type_words(answer)}, expected a dict")
    if vector.method == "trainable":
        return {str(name): np.ones((), DTYPES[dtype]) for name in answer}
    if vector.method == "targets":
        return {str(name): np.asarray(pair, DTYPES[dtype]) for name, pair in answer.items()}
    if vector.method == "model_loss":
        grads = subject.entry(answer, "grads")
        loss, z = subject.entry(answer, "loss"), np.asarray(subject.entry(answer, "logits"))
        is_real = vector.inputs["batch.attention_mask"] > 0
        z = z[is_real] if z.shape[:-1] == is_real.shape else z
        return {"loss": loss, "logits": z} | {f"grads.{n}": v for n, v in grads.items()}
    if vector.method in WHOLE:
        return {str(name): array for name, array in answer.items()}
    return {name: answer[name] for name in vector.outputs if name in answer}


def _answers_to(
    subject: GuardedImplementation, vector: Vector, dtype: str
) -> dict[str, Array] | None:
    """The answers to a vector, perhaps none; None where it was refused. Raises Skip or Fault."""
    if isinstance(answered := subject.implementation, Answered):
        return None if vector.id in answered.refused else answered.of(vector.id, dtype)
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
    arrays = _answers_to(subject, vector, dtype)
    if vector.result == "invalid":
        yield _refusal(arrays, vector)
        return
    if arrays is None:
        raise Skip("not supported: refused")
    if not arrays:
        raise Skip("no answer")
    if vector.settings.get("layer", {}).get("groups", 1) > 1 and _lies_otherwise(subject):
        raise Skip("not supported: its adapters of groups have another shape")
    missing, expected = [], vector.expected(conventions)
    for name in sorted(arrays.keys() - expected.keys() if vector.method in WHOLE else ()):
        beside = subject.answer(arrays[name], name)
        yield Comparison(f"beside what was asked, {name}", beside, np.zeros_like(beside))
    for name, output in expected.items():
        if name in arrays:
            array = subject.answer(arrays[name], name, output.want.shape, dtype)
            allowed = Limits(output.max_z, output.rms_z, 0.0)
            yield Comparison(name, array, output.want, output.sigma.get(dtype), allowed)
        elif not output.optional:
            missing.append(f"{vector.id}.out.{name}")
    if missing:
        raise Fault("missing", f"no {', '.join(missing)}")


def _lies_otherwise(subject: GuardedImplementation) -> bool:
    """Whether adapters of convolutions in groups lie otherwise than in vectors."""
    usual = LAYOUTS["conv_groups"][0]
    return bool(subject.conventions.get("conv_groups", usual) != usual)


def _refusal(arrays: Mapping[str, Array] | None, vector: Vector) -> Comparison:
    """That an invalid vector was refused. Raises Skip, or Fault where it was answered."""
    if arrays is None:
        return Comparison("refusal", np.ones(()), np.ones(()))
    if not arrays:
        raise Skip("no answer")
    why = "; ".join(NOTES[flag]["description"] for flag in vector.flags)
    raise Fault("accepts what is invalid", f"{', '.join(arrays)}, where {why}")


def _checks(vectors: Sequence[Vector], conventions: Mapping[str, str]) -> list[Check]:
    """The vectors of each check, as a check whose case i is the i-th of a dtype."""
    titles = {check.id: check.title for check in CHECKS}
    by_check: dict[str, list[Vector]] = {}
    for vector in vectors:
        by_check.setdefault(vector.check, []).append(vector)
    return [_check(of_check, titles.get(id, id), conventions) for id, of_check in by_check.items()]


def _check(vectors: Sequence[Vector], title: str, conventions: Mapping[str, str]) -> Check:
    id, level = vectors[0].check, vectors[0].level

    def of_dtype(dtype: str) -> list[Vector]:
        return [vector for vector in vectors if dtype in vector.dtypes]

    def run(subject: GuardedImplementation, case: Case) -> Iterable[Comparison]:
        vector = of_dtype(case.dtype)[case.number]
        return compared(subject, vector, case.dtype, conventions)

    def diagnose(
        subject: GuardedImplementation, dtype: str, seed: int, known: Sequence[str] = ()
    ) -> tuple[Diagnosis, ...]:
        rounded = [
            Case(id, dtype, i, seed)
            for i, vector in enumerate(of_dtype(dtype))
            if vector.lane == "rounding" and vector.outputs
        ]
        return _diagnosed(check, subject, rounded)

    check = Check(id, level, (), title, run, lambda profile, dtype: len(of_dtype(dtype)))
    return replace(check, diagnose=diagnose)


def _diagnosed(
    check: Check, subject: GuardedImplementation, cases: Sequence[Case]
) -> tuple[Diagnosis, ...]:
    """The mutants that give the same answers to all of these cases that are answered."""
    pairs = [(case, answer) for case in cases if (answer := answers(check, subject, case))]
    theirs = [answer for _, answer in pairs]
    if not any(c.judge().verdict == "fail" for answer in theirs for c in answer.values()):
        return ()

    def ours_of(m: Mutant) -> list[dict[str, Comparison]]:
        mutant = Direct(m.make())
        return [answers(check, mutant, case) for case, _ in pairs]

    mutants = mutants_for(check.level, check)
    return tuple(candidate.named() for candidate in candidates(mutants, theirs, ours_of))


def judge(
    vectors: Sequence[Vector],
    implementation: object,
    *,
    seed: int = 0,
    command: Sequence[str] = (),
    progress: engine.Progress | None = None,
) -> Report:
    """The report on answers (`Answered`), or on an implementation that answers the vectors.

    Where no convention is declared, the one holds under which fewer answers deviate, the same for
    all vectors.
    """
    conventions, notes = _conventions(vectors, Direct(implementation))
    report = engine.run(_checks(vectors, conventions), implementation, progress=progress)
    if isinstance(implementation, Answered):
        notes += _notes_on_unknown(vectors, implementation)
    return replace(
        report,
        profile=f"vectors v{VERSION}",
        seed=seed,
        conventions=conventions,
        notes=notes,
        results=tuple(_named(result, vectors, command) for result in report.results),
    )


def _notes_on_unknown(vectors: Sequence[Vector], answered: Answered) -> tuple[str, ...]:
    """A note on answers to vectors that are not in the set."""
    ids = {id for arrays in answered.arrays.values() for id in arrays} | answered.refused
    if not (unknown := sorted(ids - {vector.id for vector in vectors})):
        return ()
    more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    return (f"not in this set: {', '.join(unknown[:3])}{more}",)


def _conventions(
    vectors: Sequence[Vector], subject: GuardedImplementation
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The conventions that hold, and a note on each that is assumed."""
    usual = {name: values[0] for name, values in CONVENTIONS.items()}
    declared = {k: v for k, v in subject.conventions.items() if v in CONVENTIONS.get(k, ())}
    free = [name for name in CONVENTIONS if name not in declared]
    concerned = [vector for vector in vectors if vector.alternatives]
    if not concerned or not free:
        return usual | declared, ()

    def deviating(chosen: Mapping[str, str]) -> int:
        return sum(
            judged.verdict == "fail"
            for check in _checks(concerned, chosen)
            for dtype in subject.dtypes
            for number in range(check.cases("ci", dtype))
            for judged in judging.judged(check, subject, Case(check.id, dtype, number, 0))[0]
        )

    choices = (
        usual | declared | dict(zip(free, values, strict=True))
        for values in product(*(CONVENTIONS[name] for name in free))
    )
    assumed = min(choices, key=deviating)
    return assumed, tuple(
        f"assumed: {name} {assumed[name]}, which is not declared"
        for name in free
        if assumed[name] != usual[name]
    )


def _named(result: Result, vectors: Sequence[Vector], command: Sequence[str]) -> Result:
    """The result with the vectors' ids in the place of the cases'."""
    ids = [v.id for v in vectors if v.check == result.check and result.dtype in v.dtypes]

    def name(case: str) -> str:
        return ids[int(case.rpartition(":")[2])] if case else ""

    shown = name(result.case or result.worst_case) or ids[0]
    return replace(
        result,
        case=name(result.case),
        worst_case=name(result.worst_case),
        faults=tuple(replace(fault, case=name(fault.case)) for fault in result.faults),
        reproduce=shlex.join([*command, "--case", shown]) if command else shown,
    )


def answer(vectors: Sequence[Vector], implementation: object) -> dict[str, bytes]:
    """The files of answers (`Answered`) that a Python implementation gives."""
    subject = GuardedImplementation(implementation)
    arrays: dict[str, dict[str, Array]] = {}
    refused = set()
    for vector in vectors:
        if not subject.has(vector.method):
            continue
        for dtype in (dtype for dtype in vector.dtypes if dtype in subject.dtypes):
            answered = _answers_or_none(subject, vector, dtype)
            if answered is None:
                refused.add(vector.id)
            for name, array in (answered or {}).items():
                arrays.setdefault(dtype, {})[f"{vector.id}.out.{name}"] = np.asarray(array)
    conventions = {n: v for n, v in subject.conventions.items() if v in CONVENTIONS.get(n, ())}
    declared = {
        "name": subject.name,
        "version": subject.version,
        "refused": sorted(refused),
        "conventions": conventions,
    }
    packed = {
        f"{d}.safetensors": pack(f"{d}.safetensors", of_dtype) for d, of_dtype in arrays.items()
    }
    return {FILE: pack_json(declared), **packed}


def _answers_or_none(
    subject: GuardedImplementation, vector: Vector, dtype: str
) -> dict[str, Array] | None:
    """The answers to a vector; None where it is refused or not supported. Raises Fault."""
    try:
        return _answers_to(subject, vector, dtype)
    except Skip:
        return None
