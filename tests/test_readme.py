"""The README does what it says: its commands are those that .ci/run runs, and its example holds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci" / "run").read_text()


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands(text=README):
    return [line for block in blocks("bash", text) for line in block.splitlines()]


def commands_that_ci_reads(readme):
    """The commands by the very expression of .ci/run, from a file README.md in the folder."""
    (reads,) = re.findall(r"^mapfile -t readme < <\((.*)\)$", CI, re.M)
    done = subprocess.run(["bash", "-c", reads], cwd=readme, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_two_commands_do_all_the_set_up():
    assert commands()[:2] == [
        "python -m pip install . && minilora verify",
        "python -m pip install '.[test]' && python -m pytest",
    ]


def test_ci_runs_the_commands_of_the_readme():
    assert commands_that_ci_reads(ROOT) == commands()
    run = {int(number) for number in re.findall(r"\breadme (\d)", CI)}
    by_a_test_here = {commands().index("minilora verify mine:Mine")}
    assert run | by_a_test_here == set(range(len(commands())))


def test_ci_would_see_a_changed_command(tmp_path):
    changed = README.replace("python -m pytest", "python -m pytest --version")
    (tmp_path / "README.md").write_text(changed)
    assert commands_that_ci_reads(tmp_path) == commands(changed) != commands()


def verify_example(folder, source, *options):
    """The exit status of the README's command on its example, and what it printed."""
    (folder / "mine.py").write_text(source)
    (command,) = [line for line in commands() if "mine:Mine" in line]
    program, *arguments = command.split()
    assert program == "minilora"
    done = subprocess.run(
        [sys.executable, "-m", "minilora", *arguments, *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_the_example_is_short_and_passes(tmp_path):
    (source,) = blocks("python")
    assert len(source.splitlines()) <= 15
    status, printed = verify_example(tmp_path, source)
    assert status == 0, printed


@pytest.mark.slow
def test_the_example_with_its_scale_wrong_fails(tmp_path):
    (source,) = blocks("python")
    wrong = source.replace("return alpha / (r**0.5 if use_rslora else r)", "return alpha")
    assert wrong != source
    status, printed = verify_example(tmp_path, wrong, "--case", "linear.forward:float64:0")
    assert status == 1, printed


def test_the_packages_are_listed():
    listed = re.findall(r"^- \[`(\w+)/`\]\(minilora/\1\)", README, re.M)
    packages = {path.parent.name for path in ROOT.glob("minilora/*/__init__.py")}
    assert len(listed) == len(set(listed))
    assert set(listed) == packages


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_to_files(link):
    assert (ROOT / link).exists()
