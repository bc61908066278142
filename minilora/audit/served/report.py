"""What a session found, as a report."""

from __future__ import annotations

import math

import numpy as np

from minilora.audit.result import Entry, Figure
from minilora.audit.served.decision import Decision
from minilora.audit.served.reference import BASE, Oracle, Setting
from minilora.audit.served.sequential import Choices, Evidence, Values
from minilora.audit.served.session import Asked, Session

VERDICTS = {"adapter": "fine", "base": "not-applied", "factor": "factor", "other": "mismatch"}
"""The verdict of each thing that a server may serve; "base" where an adapter is expected."""

REMEDIES = {
    "base": "check that the server loads the adapter, that its names fit the model, and that the "
    "request names it: minilora audit adapter A --base B tells what does not fit",
    "factor": "compare lora_alpha, r and use_rslora in adapter_config.json with what the server "
    "reads of them",
    "other": "check which model and which adapter the server has loaded, and its version of them",
    "": "give texts on which the adapter acts by --text, or more tokens by --tokens",
}


def summary(decision: Decision, evidence: Evidence, session: Session, error: float) -> Entry:
    """The entry that says what the server serves."""
    adapted = session.oracle.has_adapter
    verdict = VERDICTS.get(decision.serves, "undecided")
    if decision.serves == "base" and not adapted:
        verdict = "fine"
    factor = decision.factor if adapted else None
    figures: dict[str, Figure] = {"tokens": decision.tokens, "error_rate": error}
    if adapted:
        figures |= {"factor": factor, "low": _finite(decision.low), "high": _finite(decision.high)}
    if decision.more is not None:
        figures["more_tokens"] = decision.more
    if isinstance(evidence, Values):
        figures |= _noise(decision, evidence, adapted)
    text = _text(decision, evidence, figures, session, error)
    return Entry(f"model {session.model}", verdict, text, figures, _mistake(decision, session))


def _noise(decision: Decision, evidence: Values, adapted: bool) -> dict[str, Figure]:
    """The noise that was estimated, beside that of a server in four bits, in nats."""
    at = decision.factor if adapted and decision.serves != "base" else None
    figures: dict[str, Figure] = {
        "noise": evidence.noise(at),
        "noise_of_four_bits": float(1.4826 * np.median(abs(evidence.coarse))),
        "oracle_rounding": evidence.least,
    }
    return figures | ({"effect": float(np.sqrt((evidence.effect**2).mean()))} if adapted else {})


def _text(
    decision: Decision,
    evidence: Evidence,
    figures: dict[str, Figure],
    session: Session,
    error: float,
) -> str:
    n, f = f"{decision.tokens} tokens", _interval(decision)
    rate = f"wrong with probability at most {error:g}"
    noise = ""
    if "noise" in figures:
        four = f"that of four bits {figures['noise_of_four_bits']:.2g}"
        noise = f"; noise {figures['noise']:.2g} nats, {four}"
    if decision.serves == "adapter":
        return f"serves the adapter: factor {f} of its scale ({n}{noise}; {rate})"
    if decision.serves == "base" and session.oracle.has_adapter:
        return f"serves the base without the adapter: factor {f} of its scale ({n}{noise}; {rate})"
    if decision.serves == "base":
        return f"serves the base, to within the rounding of four bits ({n}{noise}; {rate})"
    if decision.serves == "factor":
        known = _mistake(decision, session)
        why = f": {known}" if known else ""
        return f"serves the adapter at {f} of its scale{why} ({n}{noise}; {rate})"
    if decision.serves == "other":
        none = "the base, with or without the adapter at any scale"
        if isinstance(evidence, Choices):
            tried = ", ".join(f"{f:g}" for f in evidence.nodes)
            none = f"the base, or of the adapter at {tried} of its scale"
        if not session.oracle.has_adapter:
            none = "the base"
        return (
            f"serves something else: the answers are not those of {none}, not even rounded to "
            f"four bits ({n}{noise}; {rate})"
        )
    return f"cannot be told yet from {n}{noise}: {_needed(decision, figures, session)}"


def _needed(decision: Decision, figures: dict[str, Figure], session: Session) -> str:
    greatest = session.prompts.greatest
    if session.oracle.has_adapter and greatest <= session.least:
        return "the adapter changes nothing on these texts: no number of tokens tells"
    left = ""
    if decision.low is not None and decision.high is not None:
        left = f"factors from {decision.low:.3g} to {decision.high:.3g} are left; "
    if decision.more is None:
        effect = figures.get("effect")
        small = f", where the adapter's effect is {effect:.2g} nats" if effect is not None else ""
        return f"{left}the evidence does not grow on such texts{small}"
    return f"{left}about {decision.more} more tokens are needed"


def _interval(decision: Decision) -> str:
    f, low, high = decision.factor, decision.low, decision.high
    if f is None or low is None or high is None:
        return "0"
    width = high - low if math.isfinite(high - low) else 1.0
    digits = max(2, min(6, 1 - math.floor(math.log10(max(width, 1e-6)))))
    shown = [f"{end:.{digits}g}".replace("inf", "∞") for end in (f, low, high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _finite(x: float | None) -> float | None:
    """JSON has no infinity: an end that is open is none."""
    return x if x is not None and math.isfinite(x) else None


def _mistake(decision: Decision, session: Session) -> str:
    """The known mistake whose factor lies in the interval, if just one does."""
    config, low, high = session.oracle.model.config, decision.low, decision.high
    if decision.serves != "factor" or config is None or low is None or high is None:
        return ""
    r, alpha = float(config.r), float(config.lora_alpha)
    root = math.sqrt(r)
    s = alpha / (root if config.use_rslora else r)
    known = {
        "the scale is left out (1 in place of s)": 1 / s if s else math.inf,
        "the scale is applied twice": s,
        "alpha is not divided": alpha / s if s else math.inf,
        "the adapter is applied twice": 2.0,
        "the adapter is subtracted": -1.0,
        "half of the adapter is applied": 0.5,
    }
    if config.use_rslora:
        known["rsLoRA is ignored: alpha / r in place of alpha / √r"] = 1 / root
    else:
        known["alpha / √r (rsLoRA) in place of alpha / r"] = root
    fitting = [text for text, f in known.items() if low <= f <= high]
    return fitting[0] if len(fitting) == 1 else " or ".join(fitting)


def of_prompts(asked: Asked, session: Session) -> list[Entry]:
    """An entry for each prompt that was asked."""
    entries = []
    for k, answer in enumerate(asked.answers, 1):
        figures: dict[str, Figure] = {"tokens": int((~np.isnan(answer.logprobs)).sum())}
        if answer.chosen is not None:
            text = f"it goes on with {session.client.shown(answer.chosen)!r}"
            entries.append(Entry(f"prompt {k}", "told", text, figures))
            continue
        names = {"base": BASE} | ({"adapter": Setting(1.0)} if session.oracle.has_adapter else {})
        for name, setting in names.items():
            figures[name] = _distance(session.oracle, setting, answer.sequence, answer.logprobs)
        said = ", ".join(f"{figures[name]:.2g} from the {name}'s" for name in names)
        text = f"{figures['tokens']} tokens whose log-probabilities lie, in the median, {said}"
        entries.append(Entry(f"prompt {k}", "told", text, figures))
    return entries


def _distance(oracle: Oracle, setting: Setting, ids: tuple[int, ...], y: np.ndarray) -> float:
    (scored,) = oracle.score([ids], setting)
    return float(np.nanmedian(abs(scored.logprobs - y)))


def of_interface(asked: Asked, session: Session, listed: list[str], right: bool) -> list[Entry]:
    """What the server was asked for, its names for the model, and what could not be used.

    ``right``: it serves what it should.
    """
    form = asked.form
    weak = {"choice": "it gives no log-probabilities: the tokens that it takes are compared"}
    text = weak.get(form.scores, f"it gives log-probabilities: {form.name}")
    entries = [Entry("interface", "told", text, {"form": form.name})]
    if listed and session.model not in listed:
        names = ", ".join(listed[:5]) + ("" if len(listed) <= 5 else f" and {len(listed) - 5} more")
        text = f"the server does not list this model; it lists {names}"
        entries.append(Entry("name of the model", "told" if right else "doubtful", text))
    said = {session.client.shown(a.model) for a in asked.answers if a.model} - {session.model}
    if said:
        text = f"the answers name another model: {', '.join(sorted(said)[:3])}"
        entries.append(Entry("name of the model", "told", text))
    return entries + [Entry("unusable answer", "doubtful", why) for why in asked.unusable[:5]]
