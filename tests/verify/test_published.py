"""What is promised to readers outside: schemas and transcripts keep their meaning."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from extras import optional
from fake_checks import CHECKS, Right, WrongScale
from safetensors.numpy import load, save

import minilora.verify
from minilora.verify.checks.registry import CHECKS as REAL_CHECKS
from minilora.verify.core.errors import Skip
from minilora.verify.engine import run
from minilora.verify.implementation.guard import GuardedImplementation
from minilora.verify.implementation.protocol import Driver
from minilora.verify.report.load_report import from_json
from minilora.verify.vectors.vector import canonical
from minilora.verify.vectors.vector_answers import replayed
from minilora.verify.vectors.vectors import vectors

PACKAGE = Path(minilora.verify.__file__).parent
HERE = Path(__file__).parent / "published"
DRIVERS = Path(__file__).parents[2] / "docs" / "drivers"
SCHEMAS = {
    "report": PACKAGE / "report" / "schema.json",
    "protocol": PACKAGE / "implementation" / "schema.json",
    "known": PACKAGE / "known.schema.json",
    "vectors": PACKAGE / "vectors" / "schema.json",
}
PUBLISHED = json.loads((HERE / "digests.json").read_text())


def read(name):
    return json.loads(SCHEMAS[name].read_text())


def meaning(value):
    """A schema without what is for readers alone."""
    if isinstance(value, dict):
        # A property may be called description, too: then it is no text.
        return {
            k: meaning(v)
            for k, v in value.items()
            if not (k in ("description", "title") and isinstance(v, str))
        }
    return [meaning(v) for v in value] if isinstance(value, list) else value


def digest(document):
    return hashlib.sha256(canonical(meaning(document))).hexdigest()


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_published_schema_keeps_its_meaning(name):
    """What changes gets another version, and a line in digests.json: no line there is changed."""
    schema = read(name)
    assert PUBLISHED[name].get(schema["version"]) == digest(schema), (
        f"{name}: a meaning changed. Until the first release: write {digest(schema)} to "
        f"digests.json. After it: give the schema another version as docs/verify/formats.md says"
    )


def test_a_changed_meaning_is_seen_and_another_text_is_not():
    schema = read("report")
    before = digest(schema)
    schema["properties"]["minilora"]["description"] = "another text"
    assert digest(schema) == before
    schema["properties"]["results"]["items"]["required"].remove("note")
    assert digest(schema) != before


def reports():
    known = {"sigma.merge": {"reason": "why", "seen": {"arrays": "W'"}, "until": "9"}}
    yield run(CHECKS, Right())
    yield run(CHECKS, WrongScale(), known=known)
    yield run(CHECKS, object())


def test_reports_keep_their_schema():
    jsonschema = optional("jsonschema")
    validator = jsonschema.Draft202012Validator(read("report"))
    validator.check_schema(read("report"))
    stored = json.loads((HERE / "report-1.0.json").read_text())
    for document in (*(r.to_json() for r in reports()), stored):
        assert list(validator.iter_errors(document)) == []
    del stored["results"][0]["status"]
    assert list(validator.iter_errors(stored))


def test_a_report_of_each_version_is_read():
    stored = json.loads((HERE / "report-1.0.json").read_text())
    assert [r.status for r in from_json(stored, "it").results] == ["pass", "fail"]


def test_known_files_keep_their_schema():
    jsonschema = optional("jsonschema")
    validator = jsonschema.Draft202012Validator(read("known"))
    validator.check_schema(read("known"))
    page = (DRIVERS.parent / "how-to-verify.md").read_text()
    shown = json.loads(page.partition("```json\n")[2].partition("```")[0])
    assert list(validator.iter_errors(shown)) == []
    for wrong in ({"reason": "no check"}, {"check": "a.b", "reason": ""}, {"check": "a", "x": 1}):
        assert list(validator.iter_errors([wrong]))


# ---- the protocol

ASKED = (
    "linear.forward.bias",
    "linear.vjp",
    "merge.weight.rslora",
    "merge.unmerge",
    "combine.weighted",
)


def listed(data):
    """The tensors of a safetensors file as JSON."""
    dtypes = {"float64": "F64", "int64": "I64", "bool": "BOOL"}
    return {
        name: {"dtype": dtypes[v.dtype.name], "shape": list(v.shape), "data": v.ravel().tolist()}
        for name, v in sorted(load(data).items())
    }


class Recording(Driver):
    """A driver without a program, which answers what a vector says and keeps the messages."""

    def _start(self):
        self.log = [{"send": {"seq": 0, "cmd": "start", "protocol": 1}}]
        self.log[0]["receive"] = {"seq": 0, "protocol": 1, "implementation": {"name": "a name"}}
        return {"name": "recorded", "methods": [*{v.method for v in self.given}]}

    def _exchange(self, method, message, outcomes=()):
        self.log.append({"send": message | {"in": "IN", "out": "OUT"}})
        self.log[-1]["in"] = listed(Path(message["in"]).read_bytes())
        receive = {"seq": message["seq"], **self.answer}
        self.log[-1]["receive"] = receive
        if "ok" in receive:
            wanted = {n: np.array(o.want, order="C") for n, o in self.vector.outputs.items()}
            Path(message["out"]).write_bytes(save(wanted))
            self.log[-1]["out"] = listed(save(wanted))
        return receive


def transcript():
    """Exchanges of questions that nothing rounds, of one that is skipped, and the end."""
    Recording.given = [v for c in ASKED for v in vectors(checks=[c]) if v.lane == "exact"]
    smallest = {}
    for v in sorted(Recording.given, key=lambda v: sum(a.size for a in v.inputs.values())):
        smallest.setdefault(v.check, v)
    driver = Recording("none", REAL_CHECKS)
    driver._children.append(None)
    subject = GuardedImplementation(driver)
    driver.answer = {"ok": True}
    for check in ASKED:
        driver.vector, driver.check = smallest[check], check
        replayed(subject, driver.vector, "float64")
    driver.answer = {"skipped": {"reason": "a text"}}
    arguments = [smallest["linear.vjp"].inputs[name] for name in ("x", "W", "A", "B")]
    with pytest.raises(Skip):
        driver.lora_linear(*arguments, alpha=2.0, r=2, none_has_this=True)
    driver._children.clear()
    log = [*driver.log, {"send": {"seq": -1, "cmd": "stop"}}]
    return {"protocol": 1, "exchanges": log}


@pytest.mark.slow
def test_the_recorded_messages_are_those_of_today():
    recorded = json.loads((DRIVERS / "transcript.json").read_text())
    assert transcript() == recorded


def test_the_recorded_messages_keep_their_schema():
    jsonschema = optional("jsonschema")
    validator = jsonschema.Draft202012Validator(read("protocol"))
    validator.check_schema(read("protocol"))
    exchanges = json.loads((DRIVERS / "transcript.json").read_text())["exchanges"]
    lines = [e[way] for e in exchanges for way in ("send", "receive") if way in e]
    assert all(not list(validator.iter_errors(line)) for line in lines)
    for wrong in ({"seq": 1}, {"seq": 1, "ok": False}, {**exchanges[1]["send"], "method": "fly"}):
        assert list(validator.iter_errors(wrong))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mjs", "cpp"])
def test_a_transcript_is_replayed_to_a_driver(kind, tmp_path):
    command = ["node", str(DRIVERS / "lora.mjs")]
    if not shutil.which("node" if kind == "mjs" else "g++"):
        pytest.skip("node or g++ is not installed")
    if kind == "cpp":
        command = [str(tmp_path / "lora")]
        compiler = ["g++", "-std=c++17", "-o", command[0], str(DRIVERS / "lora.cpp")]
        subprocess.run(compiler, check=True)
    replay = [sys.executable, str(DRIVERS / "replay.py"), str(DRIVERS / "transcript.json")]
    right = subprocess.run([*replay, *command], capture_output=True, text=True)
    assert (right.returncode, right.stdout) == (0, "8 of 8 as recorded\n")
    wrong = subprocess.run([*replay, *command, "scale"], capture_output=True, text=True)
    assert wrong.returncode == 1
