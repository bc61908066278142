"""The checks as tests of pytest: one for each check and dtype, and for each part of many cases.

What the other modules say of a result is said here in pytest's words: a skip with its reason, an
expected failure, a failure that shows the report's own text.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import pytest

from minilora.verify import engine
from minilora.verify.core.errors import LoadError, UsageError
from minilora.verify.core.types import Check
from minilora.verify.diagnosis import investigation
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.known import declared, read_known
from minilora.verify.loading import DEFAULT_TARGET, load, resolve
from minilora.verify.plan import plan
from minilora.verify.report.report import Report
from minilora.verify.report.result import Known
from minilora.verify.report.words import deviation_lines

_SHRUNK: Counter[str] = Counter()
"""How many searches for a smallest counterexample each subject had, up to `MAX_SHRINKS`."""

_OPTIONS = pytest.StashKey[tuple[object, dict[str, Any]]]()


@dataclass(frozen=True)
class OneCheck:
    """A check in one dtype, or the i-th of n parts of its cases, as a test.

    With ``strict``, ``known`` was declared for this check and dtype alone, which must not pass.
    """

    check: Check
    dtype: str
    profile: str = "ci"
    seed: int = 0
    part: tuple[int, int] = (0, 1)
    known: Known | None = None
    strict: bool = False
    command: tuple[str, ...] | None = None

    @property
    def id(self) -> str:
        """The test's name in brackets."""
        i, n = self.part
        return f"{self.check.id}-{self.dtype}" + (f"-{i + 1}of{n}" if n > 1 else "")

    def __call__(self, implementation: object) -> None:
        """Runs the check: it passes, is skipped, fails, or fails as expected."""
        name = GuardedImplementation(implementation).name
        check = self.check
        if _SHRUNK[name] >= investigation.MAX_SHRINKS:
            check = replace(check, smallest=None)
        report = engine.run(
            [check],
            implementation,
            profile=self.profile,
            dtypes=[self.dtype],
            seed=self.seed,
            known={} if self.known is None else {f"{check.id}:{self.dtype}": self.known},
            part=self.part,
            command=self.command,
        )
        _SHRUNK[name] += report.results[0].status == "fail"
        self._pass_to_pytest(report)

    def _pass_to_pytest(self, report: Report) -> None:
        (result,) = report.results
        if result.status == "skip":
            pytest.skip(result.reason)
        if result.status == "known":
            pytest.xfail(self._declared())
        if result.no_longer_fails and self.strict:
            message = f"[XPASS(strict)] no longer fails, though known: {self._declared()}"
            pytest.fail(message, pytrace=False)
        # With --runxfail, xfail does nothing.
        if result.status in ("fail", "error", "known"):
            pytest.fail(_text(report), pytrace=False)

    def _declared(self) -> str:
        return "" if self.known is None else f"{self.known.reason} {self.known.link}".rstrip()


def _text(report: Report) -> str:
    about = f"{report.name} {report.version}".strip()
    return f"{about}: " + "\n".join(deviation_lines(report, report.results[0]))


def check_tests(
    implementation: object,
    *,
    levels: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    profile: str = "ci",
    seed: int = 0,
    known: Mapping[str, Any] | None = None,
    command: Sequence[str] | None = None,
) -> Iterator[OneCheck]:
    """The checks for an implementation, in the dtypes that it takes unless others are asked for.

    More cases than the profile ci has are cut into parts of about as many. Raises UsageError.
    """
    from minilora.verify.checks.registry import CHECKS

    subject = GuardedImplementation(implementation)
    declarations = declared(CHECKS, subject, known or {})
    dtypes_asked = dtypes or subject.dtypes
    for p in plan(CHECKS, levels=levels, profile=profile, dtypes=dtypes_asked, seed=seed):
        n = ceil(len(p.numbers) / (p.check.cases("ci", p.dtype) or len(p.numbers)))
        one = OneCheck(
            check=p.check,
            dtype=p.dtype,
            profile=profile,
            seed=seed,
            known=declarations.of(p.check.id, p.dtype),
            strict=n == 1 and f"{p.check.id}:{p.dtype}" in declarations.entries,
            command=None if command is None else tuple(command),
        )
        yield from (replace(one, part=(i, n)) for i in range(n))


def parametrized(implementations: Sequence[object], **options: Any) -> pytest.MarkDecorator:
    """What `minilora.verify.parametrize_with_checks` gives."""
    parameters = []
    for target in implementations:
        shown = getattr(target, "__qualname__", type(target).__qualname__)
        implementation = load(target) if isinstance(target, str) else resolve(target, shown)
        name = GuardedImplementation(implementation).name
        parameters += [
            pytest.param(implementation, one, id=f"{name}-{one.id}")
            for one in check_tests(implementation, **options)
        ]
    return pytest.mark.parametrize(("implementation", "check"), parameters)


def from_options(config: pytest.Config) -> tuple[object, dict[str, Any]]:
    """The implementation to check, and the options of `each`, from pytest's command line.

    Raises pytest.UsageError if the implementation or the file of known deviations does not load.
    """
    if _OPTIONS not in config.stash:
        target = config.getoption("--minilora-implementation", None)
        path = config.getoption("--minilora-known", None)
        try:
            options = {
                "profile": config.getoption("--minilora-profile", "ci"),
                "seed": config.getoption("--minilora-seed", 0),
                "known": read_known(path) if path else None,
                "command": ["minilora", "verify", *filter(None, [target])],
            }
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a library's warning at import is not a verdict
                config.stash[_OPTIONS] = load(target or DEFAULT_TARGET), options
        except (LoadError, UsageError) as error:
            raise pytest.UsageError(f"--minilora-implementation: {error}") from None
    return config.stash[_OPTIONS]
