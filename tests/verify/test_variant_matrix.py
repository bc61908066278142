"""The table of variants and kinds of layers: what a cell shows, and that it shows what is wrong."""

import json
from dataclasses import replace

import numpy as np
import pytest

from minilora.cli.console import FAILED, USAGE
from minilora.cli.main import main
from minilora.io.formats.peft import layers as layouts
from minilora.spec import lora, variants
from minilora.verify.properties import exact_numbers, laws, variant_matrix

ENTRIES, KINDS = ["lora", "dora", "alora"], ["linear", "embedding", "conv1"]


@pytest.fixture(scope="module")
def cells():
    return list(variant_matrix.cells(ENTRIES, KINDS, library=False))


@pytest.mark.slow
def test_no_cell_is_empty_without_a_reason(cells):
    assert len(cells) == len(ENTRIES) * len(KINDS)
    lines, notes = variant_matrix.rows_of(cells)
    assert all(all(line) for line in lines)
    assert all(notes.numbers)  # no reason is an empty sentence
    for c in cells:
        assert c.lacks or (c.laws.keys() == laws.LAWS.keys() and c.step is not None)
        assert c.lacks or (c.file is None) == (c.no_file is not None)
        assert c.lacks or (c.deviation is None) == (c.no_library is not None)


@pytest.mark.slow
def test_all_is_as_the_registry_says(cells):
    assert all(c.good for c in cells)
    assert {c.kind for c in cells if c.lacks} == {"embedding", "conv1"}
    (broken,) = ({k for k, v in c.laws.items() if v is False} for c in cells[3:4])
    assert (cells[3].entry, cells[3].kind) == ("dora", "linear")
    assert broken == set(variants.REGISTRY["dora"].breaks)


@pytest.mark.slow
def test_every_form_of_the_table_has_every_cell_and_reason(cells):
    text, markdown = variant_matrix.as_text(cells), variant_matrix.as_markdown(cells)
    _, notes = variant_matrix.rows_of(cells)
    for c in cells:
        assert any(line.split()[:2] == [c.entry, c.kind] for line in text.splitlines())
        assert f"| {c.entry} | {c.kind} |" in markdown
    assert all(reason in markdown for reason in notes.numbers)
    read = json.loads(variant_matrix.as_json(cells))
    assert read["schema"] == 1
    assert [(c["entry"], c["kind"]) for c in read["cells"]] == [(c.entry, c.kind) for c in cells]
    assert variant_matrix.summary(cells) == text.splitlines()[-1] == markdown.splitlines()[-1]


def test_a_law_that_does_not_hold_is_shown(monkeypatch):
    wrong = replace(lora.LORA, linear=lambda *a: lora.lora_linear(*a[:5], 2 * a[5], *a[6:]))
    entry = replace(variants.REGISTRY["lora"], variant=wrong)
    monkeypatch.setitem(variants.REGISTRY, "lora", entry)
    cell = variant_matrix.cell("lora", "linear", library=False)
    assert cell.unexpected == ["merge"]
    assert not cell.good
    assert "UNEXPECTED" in variant_matrix.as_text([cell])
    assert "lora on linear: merge" in variant_matrix.summary([cell])


def test_a_law_that_holds_against_the_registry_is_shown(monkeypatch):
    entry = replace(variants.REGISTRY["lora"], breaks={"balance": "a reason that is none"})
    monkeypatch.setitem(variants.REGISTRY, "lora", entry)
    cell = variant_matrix.cell("lora", "transposed", library=False)
    assert cell.unexpected == ["balance"]
    assert not cell.good


def test_a_figure_beyond_the_promise_is_not_good():
    cell = variant_matrix.cell("lora", "linear", library=False)
    assert cell.good
    assert not replace(cell, step=2 * variant_matrix.PROMISE).good
    assert not replace(cell, deviation=2 * variant_matrix.PROMISE).good


def test_other_bits_from_the_file_are_an_error(monkeypatch):
    def halved(*arguments):
        return [tuple(v / 2 for v in P) for P in layouts.from_tensors(*arguments)]

    monkeypatch.setattr(variant_matrix, "from_tensors", halved)
    with pytest.raises(AssertionError, match="lora on linear: other bits came back"):
        variant_matrix.cell("lora", "linear", library=False)


def test_the_command_prints_and_writes_the_table(tmp_path, capsys):
    files = {kind: tmp_path / kind for kind in ("json", "markdown")}
    options = [option for kind, path in files.items() for option in (f"--{kind}", str(path))]
    chosen = ["variants", "--variant", "lora,vera", "--layer", "linear", "--no-library"]
    assert main([*chosen, *options]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("variant")
    assert "2 cells, 0 that do not go together" in printed
    assert len(json.loads(files["json"].read_text())["cells"]) == 2
    assert "| vera | linear |" in files["markdown"].read_text()


def test_the_summary_of_a_step_is_written_on_and_another_file_anew(tmp_path, monkeypatch):
    summary, other = tmp_path / "summary.md", tmp_path / "other.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    chosen = ["variants", "--variant", "lora", "--layer", "linear", "--no-library"]
    for page in (summary, other):
        page.write_text("| before |\n")
        assert main([*chosen, "--markdown", str(page)]) == 0
    assert other.read_text().startswith("| variant | kind |")
    assert summary.read_text() == f"| before |\n\n{other.read_text()}"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--variant", "lora,dor"], "--variant dor: expected one or more of lora, gaussian"),
        (["--layer", "conv3"], "--layer conv3: expected one or more of linear, transposed"),
        (["--json", "no/such/folder/t.json"], "cannot write"),
    ],
)
def test_the_command_refuses_what_it_does_not_know(options, why, capsys):
    assert main(["variants", "--no-library", *options]) == USAGE
    assert f"minilora variants: {why}" in capsys.readouterr().err


def test_the_command_fails_where_something_is_not_as_it_should_be(monkeypatch, capsys):
    entry = replace(variants.REGISTRY["lora"], breaks={"rank": "a reason that is none"})
    monkeypatch.setitem(variants.REGISTRY, "lora", entry)
    chosen = ["variants", "--variant", "lora", "--layer", "linear", "--no-library"]
    assert main(chosen) == FAILED
    assert "lora on linear: rank" in capsys.readouterr().out


def test_an_irrational_root_is_refused():
    assert exact_numbers.SqrtFraction(9, 4).sqrt() == exact_numbers.SqrtFraction(3, 2)
    assert type(exact_numbers.SqrtFraction(1, 2) * 3 + 1) is exact_numbers.SqrtFraction
    with pytest.raises(ArithmeticError, match="the root of 1/2 is irrational"):
        exact_numbers.SqrtFraction(1, 2).sqrt()


def test_a_float_among_rationals_is_noticed():
    exact = np.array([exact_numbers.SqrtFraction(1, 2)])
    assert exact_numbers.same(exact, exact)
    assert not exact_numbers.same(exact * 1.0, exact)
    assert not exact_numbers.same(exact, exact[None])
    assert not exact_numbers.same(None, exact)
