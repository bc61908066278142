"""The files of a set of vectors: written, read and checked.

A set is a folder: ``manifest.json`` says what each vector asks and how far an answer may lie from
the true one, and safetensors files hold the inputs, the true answers in float64 and their standard
deviations of rounding in each dtype. Nothing of NumPy is needed to judge by it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import numpy as np

from minilora import __version__
from minilora.io.atomic import write_files
from minilora.io.errors import FormatError
from minilora.io.files import pack, pack_json, read_json, read_tensors
from minilora.verify.checks.registry import LEVELS
from minilora.verify.core.errors import UsageError, tidy
from minilora.verify.implementation.contract import CONVENTIONS
from minilora.verify.vectors.tags import NOTES
from minilora.verify.vectors.vector import (
    Output,
    Vector,
    canonical,
    entry_of,
    fingerprint,
    folder_of,
    tensors,
)

Array = np.ndarray

VERSION = 1


MANIFEST, SCHEMA = "manifest.json", "manifest.schema.json"

README, LICENCE, SUMS = "README.md", "LICENSE", "SHA256SUMS"

MOMENT = (2020, 1, 1, 0, 0, 0)
"""The time of all that is in an archive: its bytes do not depend on when it is written."""


def _beside(name: str) -> dict[str, Any]:
    """A JSON file of this package."""
    return read_json(Path(__file__).parent / name)


def _text(name: str) -> str:
    """A text file of this package."""
    return (Path(__file__).parent / name).read_text("utf-8")


def schema() -> dict[str, Any]:
    """The JSON Schema of a manifest."""
    return _beside("schema.json")


def frozen() -> dict[str, str]:
    """The fingerprint of every vector that was ever made with the seed 0."""
    return _beside("frozen.json")


def files(made: Sequence[Vector], seed: int = 0) -> dict[str, bytes]:
    """The files of a set. Raises ArithmeticError where a vector is not what it was frozen as."""
    if seed == 0:
        _require_frozen(made)
    found = {SCHEMA: pack_json(schema()), LICENCE: _text("licence.txt").encode()}
    arrays: dict[str, dict[str, Array]] = {}
    for vector in made:
        arrays.setdefault(f"{vector.level}.safetensors", {}).update(tensors(vector))
        found |= {f"{folder_of(vector.id)}/{path}": data for path, data in vector.files.items()}
    found |= {name: pack(name, of_level) for name, of_level in arrays.items()}
    manifest: dict[str, Any] = {
        "$schema": SCHEMA,
        "format": "minilora vectors",
        "version": VERSION,
        "release": __version__,
        "licence": "MIT",
        "seed": seed,
        "judge": "An answer passes if |got - out| <= max_z * sigma for each element, and the root "
        "of the mean of ((got - out) / sigma)^2 is at most rms_z. Without a sigma, and where it is "
        "0, got == out.",
        "conventions": {name: list(values) for name, values in CONVENTIONS.items()},
        "notes": {f: NOTES[f] for f in NOTES if any(f in vector.flags for vector in made)},
        "vectors": [entry_of(vector) for vector in made],
        "absent": _absent(),
    }
    found[README] = _readme(manifest).encode()
    manifest["files"] = {name: sha256(data).hexdigest() for name, data in found.items()}
    manifest["hash"] = sha256(canonical(manifest)).hexdigest()
    found[MANIFEST] = _packed(manifest)
    return found | {SUMS: _sums(found)}


def _packed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest, a vector to a line."""
    around = pack_json({**manifest, "vectors": []})
    lines = b",\n".join(canonical(entry) for entry in manifest["vectors"])
    return around.replace(b'"vectors": []', b'"vectors": [\n' + lines + b"\n]")


def _sums(contents: Mapping[str, bytes]) -> bytes:
    """The SHA-256 of each file, for ``sha256sum -c``."""
    lines = (f"{sha256(data).hexdigest()}  {name}" for name, data in sorted(contents.items()))
    return ("\n".join(lines) + "\n").encode()


def _readme(manifest: Mapping[str, Any]) -> str:
    """What a set says of itself: how to judge by it, its levels, its flags, what is absent."""
    counts = Counter(entry["level"] for entry in manifest["vectors"])
    rows = {
        "levels": [f"| {level} | {count} |" for level, count in counts.items()],
        "flags": [
            f"| `{name}` | {note['description']} | {note['effect']} | {' '.join(note['links'])} |"
            for name, note in manifest["notes"].items()
        ],
        "absent": [f"| `{check}` | {why} |" for check, why in manifest["absent"].items()],
    }
    text = _text("readme.md").replace("JUDGE", manifest["judge"])
    for name in ("version", "release"):
        text = text.replace(name.upper(), str(manifest[name]))
    for name, lines in rows.items():
        text = text.replace(f"| {name.upper()} |", "\n".join(lines))
    return text


def _absent() -> dict[str, str]:
    """The checks of which no vector is made, and why."""
    pairs = (
        (check.id, level.without_vectors(check.id)) for level in LEVELS for check in level.checks
    )
    return {check: why for check, why in pairs if why}


def _require_frozen(made: Sequence[Vector]) -> None:
    """Raises ArithmeticError where a vector is not what it was frozen as."""
    known = frozen()
    for vector in made:
        now = fingerprint(vector)
        if known.get(vector.id, now) != now:
            raise ArithmeticError(
                f"{vector.id} differs from the frozen vector: {now[:12]}… here, "
                f"{known[vector.id][:12]}… frozen"
            )


def write(folder: Path | str, made: Sequence[Vector], seed: int = 0) -> dict[str, bytes]:
    """Writes a set, whole or not at all, and gives its files: a folder, or an archive NAME.zip.

    Raises FormatError, OSError, and the ArithmeticError of `files`.
    """
    written = files(made, seed)
    if Path(folder).suffix == ".zip":
        archive = Path(folder)
        write_files(archive.parent, {archive.name: lambda: _archive(written, archive.stem)})
        return written
    contents = {name: (lambda data=data: data) for name, data in written.items()}
    write_files(folder, contents, r".*\.safetensors")
    return written


def _archive(contents: Mapping[str, bytes], folder: str) -> bytes:
    """A ZIP archive of a folder with these files."""
    buffer = BytesIO()
    with ZipFile(buffer, "w", ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in sorted(contents.items()):
            entry = ZipInfo(f"{folder}/{name}", MOMENT)
            entry.compress_type, entry.external_attr = ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, data)
    return buffer.getvalue()


def read(folder: Path | str) -> tuple[dict[str, Any], list[Vector]]:
    """The manifest of a set and its vectors. Raises UsageError where it is not what was written."""
    folder = Path(folder)
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest.get("version") != VERSION:
            says = f"version {manifest.get('version')!r}, expected {VERSION}"
            raise UsageError(f"{folder / MANIFEST}: {says}; another minilora wrote it")
        if wrong := problems(manifest, schema()):
            raise UsageError(f"{folder / MANIFEST}: {wrong[0]}; write the set again")
        _unspoiled(folder, manifest)
        names = dict.fromkeys(entry["file"] for entry in manifest["vectors"])
        by_file = {name: read_tensors(folder / name) for name in names}
        return manifest, [
            _read(entry, by_file[entry["file"]], _files_in(folder, entry["folder"], manifest))
            for entry in manifest["vectors"]
        ]
    except FormatError as error:
        raise UsageError(str(error)) from None


def _unspoiled(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UsageError where a file is missing or is not the one that was written."""
    stated = {key: value for key, value in manifest.items() if key != "hash"}
    found = {MANIFEST: (manifest["hash"], sha256(canonical(stated)).hexdigest())}
    for name, digest in manifest["files"].items():
        try:
            found[name] = (digest, sha256((folder / name).read_bytes()).hexdigest())
        except OSError as error:
            raise UsageError(f"{folder / name}: {error.strerror}; write the set again") from None
    for name, (written, now) in found.items():
        if written != now:
            says = f"its hash is {now[:12]}…, and {written[:12]}… was written"
            raise UsageError(f"{folder / name} was changed: {says}; write the set again")


def _files_in(folder: Path, at: str, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a vector's folder."""
    names = [name for name in manifest["files"] if at and name.startswith(f"{at}/")]
    return {name.removeprefix(f"{at}/"): (folder / name).read_bytes() for name in names}


def _read(entry: Mapping[str, Any], arrays: Mapping[str, Array], files: dict[str, bytes]) -> Vector:
    own, dtypes = entry["id"], entry["dtypes"]

    def outputs(at: str, stated: Mapping[str, Any]) -> dict[str, Output]:
        sigma = {
            name: {d: arrays[at_d] for d in dtypes if (at_d := f"{at}.sigma.{d}.{name}") in arrays}
            for name in stated
        }
        return {
            name: Output(
                arrays[f"{at}.out.{name}"], sigma[name], v["max_z"], v["rms_z"], v["optional"]
            )
            for name, v in stated.items()
        }

    alternatives = entry["alternatives"]
    return Vector(
        **{k: entry[k] for k in ("id", "check", "level", "method", "settings", "drawn", "lane")},
        inputs={name: arrays[f"{own}.in.{name}"] for name in entry["inputs"]},
        dtypes=tuple(dtypes),
        outputs=outputs(own, entry["outputs"]),
        flags=tuple(entry["flags"]),
        result=entry["result"],
        alternatives={c: outputs(f"{own}.alt.{c}", v) for c, v in alternatives.items()},
        files=files,
    )


_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
}


def problems(document: Any, schema: Mapping[str, Any], at: str = "$") -> list[str]:
    """Where a document breaks a JSON Schema that has only the keywords of this package's."""
    kind = schema.get("type")
    if kind and not isinstance(document, _TYPES[kind]):
        return [f"{at} is {tidy(document, 40)}, expected a value of type {kind}"]
    found = []
    if "const" in schema and document != schema["const"]:
        found.append(f"{at} is {tidy(document, 40)}, expected {schema['const']}")
    if "enum" in schema and document not in schema["enum"]:
        found.append(f"{at} is {tidy(document, 40)}, expected one of {schema['enum']}")
    if isinstance(document, dict):
        found += _problems_of_object(document, schema, at)
    if isinstance(document, list):
        for i, value in enumerate(document):
            found += problems(value, schema.get("items", {}), f"{at}[{i}]")
    return found


def _problems_of_object(
    document: Mapping[str, Any], schema: Mapping[str, Any], at: str
) -> list[str]:
    """Names that are missing or unknown, and what is wrong below the others."""
    known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    found = [f"{at} has no {name!r}" for name in schema.get("required", ()) if name not in document]
    for name, value in document.items():
        inner = known.get(name, others)
        found += (
            [f"{at} has an unknown {name!r}"]
            if inner is False
            else problems(value, inner, f"{at}.{name}")
        )
    return found
