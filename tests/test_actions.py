"""The actions and workflows for GitHub: their shell steps, taken from the files and run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from minilora.verify.peers import PEERS

ROOT = Path(__file__).parent.parent
ACTIONS = sorted((ROOT / ".github/actions").glob("*/action.yml"))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))

RIGHT = """
class Mine:
    def merge(self, W, A, B, *, alpha, r, use_rslora=False, **settings):
        if settings:
            raise NotImplementedError("no other settings")
        return W + alpha / r ** (0.5 if use_rslora else 1) * (B @ A)
"""


def step(path, name):
    document = yaml.safe_load(path.read_text())
    jobs = document.get("jobs", {}).values()
    steps = [s for j in jobs for s in j["steps"]] or document["runs"]["steps"]
    return next(each for each in steps if each.get("name") == name)


def run_step(path, name, folder, **inputs):
    """Run a step of an action as GitHub does; its status and what it printed."""
    action = yaml.safe_load(path.read_text())
    declared = action.get("inputs", {}).items()
    given = {key: value.get("default", "") for key, value in declared} | inputs
    found = step(path, name)
    environment = {
        key: re.sub(r"\$\{\{ (?:inputs|matrix)\.(\w+) \}\}", lambda m: given[m[1]], value)
        for key, value in found.get("env", {}).items()
    }
    shim = folder / "bin/minilora"
    shim.parent.mkdir(exist_ok=True)
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m minilora "$@"\n')
    shim.chmod(0o755)
    environment |= {
        "PATH": f"{shim.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
    }
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", found["run"]]
    ran = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    return ran.returncode, ran.stdout + ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("edit", "status", "colour"), [("", 0, "yellow"), ("alpha * 2", 1, "red")])
def test_the_action_verifies_and_writes_every_report(tmp_path, edit, status, colour):
    (tmp_path / "mine.py").write_text(RIGHT.replace("alpha / r", edit + " / r") if edit else RIGHT)
    path = ROOT / ".github/actions/verify/action.yml"
    inputs = {"target": "mine.py:Mine", "level": "merge", "profile": "quick"}
    found, printed = run_step(path, "Verify", tmp_path, **inputs)
    assert (found, "::error title=LoRA" in printed) == (status, bool(status)), printed
    reports = tmp_path / "minilora-reports"
    assert json.loads((reports / "badge.json").read_text())["color"] == colour
    assert json.loads((reports / "report.json").read_text())["summary"]["exit_status"] == status
    assert {path.name for path in reports.iterdir()} == {
        "report.json",
        "report.html",
        "junit.xml",
        "badge.json",
    }
    assert "merge" in (tmp_path / "summary.md").read_text()


@pytest.mark.slow
def test_the_weekly_run_fails_where_something_is_new_since_last_week(tmp_path):
    path, mine = ROOT / ".github/workflows/peers.yml", tmp_path / "mine.py"
    wrong = RIGHT.replace("alpha / r", "alpha * 2 / r")
    for text, status in ((RIGHT, 0), (wrong, 1), (wrong, 0), (RIGHT, 0)):
        mine.write_text(text)
        name = "Verify it and compare with last week"
        found, printed = run_step(path, name, tmp_path, peer="mine.py:Mine")
        assert found == status, printed
        assert json.loads((tmp_path / "last/report.json").read_text())["results"]


@pytest.mark.parametrize("path", [*ACTIONS, *WORKFLOWS], ids=lambda path: path.as_posix()[-24:])
def test_no_step_puts_an_expression_into_its_script(path):
    """What stands in an input would be executed: it comes as a variable."""
    document = yaml.safe_load(path.read_text())
    jobs = document.get("jobs", {}).values()
    steps = [s for j in jobs for s in j["steps"]] or document["runs"]["steps"]
    assert all("${{" not in each.get("run", "") for each in steps)
    assert all(each.get("shell") == "bash" for each in steps if "run" in each and not jobs)


def test_the_weekly_run_has_every_peer_that_an_index_installs():
    jobs = yaml.safe_load((ROOT / ".github/workflows/peers.yml").read_text())["jobs"]
    listed = {each["peer"] for each in jobs["peer"]["strategy"]["matrix"]["include"]}
    assert listed == PEERS.keys() - {"adapters", "axolotl", "sglang", "unsloth", "vllm"}
