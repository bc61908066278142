"""The probable cause of what deviates, in one sentence, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from minilora.audit.mistakes import MISTAKES
from minilora.audit.result import VERDICTS, Entry
from minilora.audit.scales import WRONG_SCALES
from minilora.io.errors import listed

CAUSES = {
    **{mistake.id: mistake.text for mistake in MISTAKES},
    **{wrong.id: wrong.text for wrong in WRONG_SCALES},
    "not-merged": "the folder holds the adapter beside the base: nothing is merged",
    "other-base": "the adapter was merged into another base, or another revision of it",
    "other-change": "another adapter was merged, or another step of its training",
    "another-change": "there is another change of low rank beside the adapter's",
    "exchanged": "tensors hold what others of their shape are to hold",
    "lora-bias-lost": "the base has no bias that the adapter's could be added to",
    "wrapped-names": "the tensors have the names of a wrapped module, and nothing loads them",
    "adapter-beside": "an adapter lies beside the merged weights, and is added again on loading",
    "stale-weights": "weights that are out of date lie beside the others",
    "applied-elsewhere": "the change is applied to other modules too",
    "after-merge": "all of the change is in it, and small differences beside it",
    "overflow": "the merged numbers are larger than the dtype's largest",
    "norm-factor": "DoRA's rows are longer or shorter than the magnitude says",
    "tied-head": "embedding and head are tied, and with the adapter the two differ",
}
"""What each mistake is, in one sentence."""

_AGAIN = "merge again with a current release of the library, and audit the result"

_REMEDIES = {
    "not-merged": "load base and adapter, call merge_and_unload() and save what it returns",
    "tied-head": "untie the head before merging: give it weights of its own, and set "
    "tie_word_embeddings to false",
    "other-base": "give the base that was merged into, at the same revision",
    "other-change": "find it: minilora audit merged --find FOLDER_OF_ADAPTERS --base … --merged …",
    "another-change": "name every adapter that was merged, each by --adapter",
    "lora-bias-lost": "keep the adapter beside the base, or give these modules a bias",
    "norm-factor": "compare lora_magnitude_vector, and the norm that divides, with what the merge "
    "read, and merge again",
    "not-applied": "check that the adapter's names fit the model's when it is loaded, and save "
    "what merge_and_unload() returns",
    "adapter-beside": "move the adapter's files out of the merged model's folder",
    "stale-weights": "remove the weights that the index does not name",
    "applied-elsewhere": "match modules by their whole names, and merge again",
    "after-merge": "merge into the base as it was published, once, and save it before any training",
    "overflow": "merge and save in bfloat16 or float32",
    "layers": "merge again, and write every shard; check layers_to_transform and the adapter's "
    "names in these layers",
    "corrupt": "fetch or write the file again",
    "missing": "fetch or write the file again",
    "extra": "is it the merged model of this base?",
    "changed": "give the base that the adapter was trained on, at the same revision; or name every "
    "adapter and module that was trained",
    "other-adapter": "merge the adapter that was meant",
    "wrong": "correct what is named, and merge again",
    "factor": "compare lora_alpha, r, use_rslora and the patterns with what the merge read, and "
    "merge again",
}


def remedy_of(kind: str, verdict: str) -> str:
    """What to do about a mistake, or about a verdict that has none."""
    return _REMEDIES.get(kind, _REMEDIES.get(verdict, _AGAIN))


def cause_of(entries: Sequence[Entry], changed: Collection[str] = ()) -> tuple[str, str]:
    """The cause and the remedy; two empty texts where nothing deviates.

    ``changed``: the tensors that an adapter changes.
    """
    wrong = [entry for entry in entries if entry.severity == "deviation"]
    if not wrong:
        return "", ""
    tensors = [entry for entry in entries if entry.subject in changed]
    lacking = [entry for entry in tensors if entry.verdict == "not-applied"]
    if lacking and len(lacking) == len(tensors):
        return _is_base(lacking), _REMEDIES["not-applied"]
    if lacking and len(lacking) == len(wrong) and (where := _whole(lacking, tensors)):
        return f"not-applied: the adapter is not applied in {where}", _REMEDIES["layers"]
    if cause := _other_base(wrong):
        return cause, _REMEDIES["other-base"]
    counts = Counter(entry.mistake or entry.verdict for entry in wrong)
    kind, count = counts.most_common(1)[0]
    first = next(entry for entry in wrong if kind in (entry.mistake, entry.verdict))
    text = CAUSES.get(kind, VERDICTS[first.verdict][1])
    if kind == "wrong":  # of a setting, which says more than its verdict
        kind, text = first.subject, first.text
    share = f"in {count} of {len(wrong)} deviations" if len(wrong) > 1 else f"in {first.subject}"
    return f"{kind}: {text}, {share}", remedy_of(kind, first.verdict)


def _is_base(lacking: Sequence[Entry]) -> str:
    """That no tensor has its change."""
    gone = all(entry.mistake == "taken-out" for entry in lacking)
    how = ": it was merged and taken out again" if gone else ""
    text = f"the merged model is the base: none of the {len(lacking)} tensors that the adapter"
    return f"{text} changes has its change{how}"


def _other_base(wrong: Sequence[Entry]) -> str:
    """That it is another base, if most tensors say so and what no adapter changes differs too."""
    names = ("other-base", "base-quantized", "base-coarse", "mismatch")
    own = sum((entry.mistake or entry.verdict) in names for entry in wrong)
    beside = sum(entry.verdict == "changed" and not entry.mistake for entry in wrong)
    if not own or not beside or 2 * (own + beside) <= len(wrong):
        return ""
    text = f"other-base: {CAUSES['other-base']}: {own} tensors differ by more than the adapter's"
    return f"{text} change, and {beside} that no adapter changes differ too"


def _whole(lacking: Sequence[Entry], tensors: Sequence[Entry]) -> str:
    """The layers or the one file that lack all of their changes, and no others; else ""."""
    files = {str(entry.figures.get("file", "")) for entry in lacking}
    if files != {""} and len(files) == 1:
        (file,) = files
        if sum(entry.figures.get("file") == file for entry in tensors) == len(lacking):
            return f"{file}, and in all other files it is: this file is the base's"
    return _whole_layers(lacking, tensors)


def _whole_layers(lacking: Sequence[Entry], tensors: Sequence[Entry]) -> str:
    """The layers that lack all of their changes, in words; "" if any lacks only some."""

    def by_layer(entries: Sequence[Entry]) -> Counter[str]:
        return Counter(str(entry.figures.get("layer", "")) for entry in entries)

    found, every = by_layer(lacking), by_layer(tensors)
    if not all(layer.isdecimal() and every[layer] == count for layer, count in found.items()):
        return ""
    numbers = sorted(map(int, found))
    runs = numbers == list(range(numbers[0], numbers[-1] + 1))
    names = f"{numbers[0]} to {numbers[-1]}" if runs and len(numbers) > 1 else listed(found)
    last = (
        " (the last)"
        if runs and numbers[-1] == max(int(layer) for layer in every if layer.isdecimal())
        else ""
    )
    return f"layer{'s' * (len(numbers) > 1)} {names}{last}, and in all others it is"
