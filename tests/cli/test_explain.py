"""`minilora explain` and `minilora doctor`."""

import sys

import pytest

from minilora import __version__
from minilora.cli.commands.doctor import FOR, Requirement, required, requirements, version_of
from minilora.cli.commands.explain import names
from minilora.cli.main import main
from minilora.verify.peers import PEERS


def test_every_name_has_a_page():
    kinds = names()
    assert all(kinds.values())
    for known in kinds.values():
        for name, page in known.items():
            title, _, rest = page().partition("\n")
            assert title.startswith(f"{name}: ")
            assert rest.strip()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scale-alpha", "s = α"),
        ("linear.vjp:float32", "dA = du xᵀ"),
        ("rounded-away", "a verdict"),
        ("peft.safe", ""),
    ],
)
def test_a_name_is_explained_and_an_unknown_one_has_suggestions(capsys, name, words):
    status = main(["explain", name])
    out, err = capsys.readouterr()
    assert (status, words in out) == (2 if not words else 0, True)
    assert ("did you mean peft." in err) == (not words)


def test_without_a_name_all_are_listed(capsys):
    assert main(["explain"]) == 0
    out = capsys.readouterr().out
    assert {kind for kind in names() if kind in out} == names().keys()


def test_the_doctor_tells_versions_and_what_is_required(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"minilora {__version__}" in out
    assert (f"numpy {version_of('numpy')}" in out) == bool(required())


def test_of_a_checkout_that_is_not_installed_nothing_is_required(capsys, monkeypatch):
    monkeypatch.setattr("minilora.cli.commands.doctor.required", list)
    assert main(["doctor"]) == 0
    assert "is not installed" in capsys.readouterr().out


def test_what_is_missing_or_too_old_is_told():
    needed = requirements(
        ["numpy>=2.0", "no-such-thing>=1; extra == 'x'", "numpy>=99 ; extra=='y'"]
    )
    assert needed == {
        "": [Requirement("numpy", "2.0", "")],
        "x": [Requirement("no-such-thing", "1", "x")],
        "y": [Requirement("numpy", "99", "y")],
    }
    assert [each.lack for (each,) in needed.values()] == [
        "",
        "no-such-thing is missing",
        f"numpy is {version_of('numpy')}, expected 99 or newer",
    ]


def test_what_is_for_another_system_is_not_missed():
    here, there = f"sys_platform == '{sys.platform}'", f"sys_platform != '{sys.platform}'"
    needed = requirements([f"one; {here} and extra == 'x'", f"two; {there} and extra == 'x'"])
    assert needed == {"": [], "x": [Requirement("one", "0", "x")]}


def test_the_doctor_names_every_extra_and_the_command_that_completes_it(capsys, monkeypatch):
    monkeypatch.setattr("minilora.cli.commands.doctor.version_of", lambda name: None)
    assert main(["doctor"]) == (1 if required() else 0)
    out = capsys.readouterr().out
    assert "no library to verify is installed" in out
    for extra in requirements(required()).keys() - {""}:
        assert f"python -m pip install 'minilora[{extra}]'" in out or extra == "peers"
    listed = {extra for peer in PEERS.values() for extra in peer.extra.split(",")}
    assert not FOR.keys() & listed
