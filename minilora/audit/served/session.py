"""Asking a server, prompt by prompt, until the answers decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from minilora.audit.served.client import Client, Refused, ServerError
from minilora.audit.served.decision import SHARP, Decision, decide
from minilora.audit.served.forms import FORMS, Answer, Form, Prompt, Texts
from minilora.audit.served.prompts import Prompts
from minilora.audit.served.reference import BASE, Oracle, Setting
from minilora.audit.served.sequential import Choices, Evidence, Values

FACTORS = (0.0, 0.5, 1.0, 2.0)
"""The adapter's factors that the oracle computes at first; others where the answers point."""

WIDER = (-1.0, 4.0, -4.0, 16.0)
"""The factors that follow while the answers point beyond those."""

CHOICE_FACTORS = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""Those for servers that give no log-probabilities, between which nothing is interpolated."""

CLOSE = 1e-6
"""A factor is fitted to this, relative to itself."""

FIT = 8
"""So many further factors are computed to fit one."""

LOOK = 0.25
"""The answers are judged again when they have so many more tokens, as a share."""

IN_A_ROW = 3
"""After so many unusable answers in a row no more is asked."""


@dataclass
class Asked:
    """What a server was asked in one form, and what it answered."""

    form: Form
    answers: list[Answer] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many tokens the answers say something of."""
        known = (int((~np.isnan(answer.logprobs)).sum()) for answer in self.answers)
        return len(self.answers) if self.form.scores == "choice" else sum(known)


class Session:
    """One server, the oracle, and what has been answered so far."""

    def __init__(self, client: Client, model: str, oracle: Oracle, prompts: Prompts) -> None:
        self.client, self.model, self.oracle, self.prompts = client, model, oracle, prompts
        self.texts: Texts = prompts.texts
        self.least = oracle.rounding(prompts.sequences[0])
        self.factors: list[float] = []
        self.since: dict[float, int] = {}

    @staticmethod
    def listed_by(client: Client) -> list[str]:
        """The models that the server lists; none if it lists none.

        Errors: those of `Client.ask` but Refused.
        """
        try:
            answer = client.ask("/models")
        except Refused:
            return []
        data = answer.get("data") if isinstance(answer, dict) else None
        entries = data if isinstance(data, list) else []
        names = [entry.get("id") for entry in entries if isinstance(entry, dict)]
        return [client.shown(name) for name in names if isinstance(name, str)]

    def first_answer(self, forms: Sequence[Form] = FORMS) -> tuple[Asked, list[Prompt]]:
        """The first form that the server answers, with the answer, and the prompts left.

        Errors: ServerError if it answers in none; those of `Client.ask`.
        """
        refused: list[tuple[str, str]] = []
        for form in forms:
            prompts = self.prompts.of(form)
            few = 1 if form.scores == "prompt" else IN_A_ROW
            for k, prompt in enumerate(prompts[:few], 1):
                try:
                    answer = form.ask(self.client, self.model, prompt, self.texts)
                except Refused as error:
                    refused.append((form.name, str(error)))
                    if error.status != 200:
                        break
                else:
                    return Asked(form, [answer]), prompts[k:]
        expected = "log-probabilities, or at least generated text"
        remedy = "check --model and the server's log"
        found = _by_reason(refused) or "no prompt that can be sent"
        raise self.client.error("answers", found, expected, remedy)

    def run(
        self,
        error: float,
        most_tokens: int,
        told: Callable[[int], None] = lambda tokens: None,
        forms: Sequence[Form] = FORMS,
    ) -> tuple[Asked, Decision, Evidence]:
        """Ask until the decision is sharp, or ``most_tokens`` are scored, or no prompt is left.

        Errors: those of `first_answer`. What goes wrong later is an unusable answer.
        """
        asked, left = self.first_answer(forms)
        self.factors, self.since = [], {}
        decision, _ = self._judge(asked, error, True)
        look_at = fit_at = failed = 0
        for prompt in left:
            told(asked.tokens)
            if decision.sharp or asked.tokens >= most_tokens or failed >= IN_A_ROW:
                break
            try:
                asked.answers.append(asked.form.ask(self.client, self.model, prompt, self.texts))
            except (Refused, ServerError) as why:
                failed += 1
                asked.unusable.append(str(why))
                continue
            failed = 0
            if asked.tokens < min(look_at, most_tokens):
                continue
            look_at = math.ceil(asked.tokens * (1 + LOOK))
            fits = asked.tokens >= fit_at  # which takes long: each time for twice as many tokens
            fit_at = 2 * asked.tokens if fits else fit_at
            decision, _ = self._judge(asked, error, fits)
        return (asked, *self._judge(asked, error, True))

    def confirmed(
        self, error: float, most_tokens: int, told: Callable[[int], None] = lambda tokens: None
    ) -> tuple[Asked, Decision, Evidence]:
        """`run`; "something else" by the prompts' log-probabilities is confirmed by answers'.

        Some servers give those of a prompt a place too far. Each of the two has half of the error.

        Errors: those of `run`.
        """
        found = asked, decision, _ = self.run(error / 2, most_tokens, told)
        if decision.serves != "other" or asked.form.scores != "prompt":
            return found
        others = [form for form in FORMS if form.scores != "prompt"]
        try:
            second = self.run(error / 2, most_tokens, told, others)
        except ServerError:
            return found
        if second[1].serves == "other":
            return found
        second[0].unusable.append(
            f"the log-probabilities of prompts ({asked.form.name}) are not those of what it "
            "generates: they were not used"
        )
        return second

    @property
    def _adapted(self) -> bool:
        return self.oracle.has_adapter

    @property
    def _whole(self) -> list[Setting]:
        """The models whose noise in four bits is computed."""
        return [BASE, Setting(1.0)] if self._adapted else [BASE]

    def _judge(self, asked: Asked, error: float, fits: bool) -> tuple[Decision, Evidence]:
        """The decision; if it ``fits``, further factors are computed until one explains it."""
        if self._adapted and not self.factors:
            self.factors = list(CHOICE_FACTORS if asked.form.scores == "choice" else FACTORS)
        evidence = self._evidence(asked)
        decision = decide(evidence, error)
        if not isinstance(evidence, Values) or not self._adapted:
            return decision, evidence
        if not fits:
            return replace(decision, sharp=decision.sharp and not decision.elsewhere), evidence
        kept, estimate = [*self.factors], evidence.estimate()
        for _ in range(FIT):
            if not (further := self._further(decision, evidence)):
                break
            for f in further:
                self.since[f] = 0 if f in WIDER else evidence.tokens
            self.factors = sorted({*self.factors, *further})
            kept += [f for f in further if f in WIDER]
            evidence = self._values(asked.answers)
            decision, estimate = decide(evidence, error), evidence.estimate()
        # What was tried on the way is not computed again; the best of it is bet on from now on.
        best = min(self.factors, key=lambda f: abs(f - estimate))
        self.factors = sorted({*kept, best})
        return decision, evidence

    def _further(self, decision: Decision, evidence: Values) -> list[float]:
        """The factors to compute next: where the answers point, and beyond if that is an end."""
        estimate = evidence.estimate()
        reach = [f for f in (estimate, decision.low, decision.high) if f is not None]
        least, most = min(reach), max(reach)
        if decision.elsewhere and (beyond := self._beyond(least, most, decision.serves == "other")):
            return beyond
        nearest = min(abs(estimate - f) for f in self.factors)
        if nearest > max(CLOSE * max(1.0, abs(estimate)), evidence.precision()):
            return [estimate]
        return self._between(least, most) if decision.elsewhere and not decision.sharp else []

    def _beyond(self, least: float, most: float, all_of_them: bool) -> list[float]:
        """Factors beyond those computed, where the last of these remains."""
        low, high = min(self.factors), max(self.factors)
        beyond = [f for f in WIDER if not low <= f <= high]
        if all_of_them:
            return beyond
        below, above = [f for f in beyond if f < low], [f for f in beyond if f > high]
        return (below if least <= low else above if most >= high else [])[:1]

    def _between(self, least: float, most: float) -> list[float]:
        """The middle of the widest gap between those that are left."""
        ends = zip(self.factors, self.factors[1:], strict=False)
        gaps = [(b - a, (a + b) / 2) for a, b in ends if b >= least and a <= most]
        width, middle = max(gaps)
        return [middle] if width > SHARP / 4 * max(1.0, abs(middle)) else []

    def _evidence(self, asked: Asked) -> Evidence:
        if asked.form.scores == "choice":
            return self._choices(asked.answers)
        return self._values(asked.answers)

    def _values(self, answers: Sequence[Answer]) -> Values:
        y = _joined(answer.logprobs for answer in answers)
        known = ~np.isnan(y)
        sequences = [answer.sequence for answer in answers]

        def scored(setting: Setting) -> np.ndarray:
            logprobs = _joined(s.logprobs for s in self.oracle.score(sequences, setting))
            return np.asarray(logprobs[known])

        curves = [scored(Setting(f)) for f in self.factors]
        noise = [abs(scored(replace(s, coarse=True)) - scored(s)) for s in self._whole]
        coarse = np.maximum.reduce(noise)
        base, nodes = scored(BASE), np.array(self.factors)
        since = np.array([self.since.get(f, 0) for f in self.factors])
        return Values(y[known], base, nodes, np.array(curves), coarse, self.least, since)

    def _choices(self, answers: Sequence[Answer]) -> Choices:
        # The token that follows a beginning is scored by any token in its place.
        sequences = [(*answer.sequence, 0) for answer in answers]
        chosen = [answer.chosen or "" for answer in answers]

        def best(setting: Setting) -> list[int]:
            return [int(s.best[-1]) for s in self.oracle.score(sequences, setting)]

        def right(setting: Setting) -> np.ndarray:
            pairs = zip(chosen, best(setting), strict=True)
            return np.array([self.texts.is_text_of(text, token) for text, token in pairs])

        kept = [np.equal(best(replace(s, coarse=True)), best(s)) for s in self._whole]
        coarse = np.logical_and.reduce(kept)
        curves = np.array([right(Setting(f)) for f in self.factors])
        return Choices(right(BASE), np.array(self.factors), curves, coarse)


def _by_reason(refused: Sequence[tuple[str, str]]) -> str:
    """Each reason once, with a form that was refused for it."""
    forms: dict[str, list[str]] = {}
    for form, why in dict.fromkeys(refused):
        forms.setdefault(why, []).append(form)
    more = {why: f" and {len(names) - 1} more" if names[1:] else "" for why, names in forms.items()}
    return "; ".join(f"{why} ({names[0]}{more[why]})" for why, names in forms.items())


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(part) for part in parts])
