"""Findings in PEFT."""

from minilora.findings.finding import Library
from minilora.findings.peft import (
    adalora,
    combining,
    dora,
    files,
    layers,
    merging,
    names,
    sessions,
    starts,
    training,
)
from minilora.findings.peft.release import SEEN

LIBRARY = Library(
    "peft",
    "PEFT",
    "peft",
    (
        *names.FINDINGS,
        *files.FINDINGS,
        *merging.FINDINGS,
        *combining.FINDINGS,
        *sessions.FINDINGS,
        *layers.FINDINGS,
        *dora.FINDINGS,
        *starts.FINDINGS,
        *adalora.FINDINGS,
        *training.FINDINGS,
    ),
    release=SEEN,
    reads=("peft",),
    files="https://github.com/huggingface/peft/blob/v{release}/src/{file}#L{line}",
)
