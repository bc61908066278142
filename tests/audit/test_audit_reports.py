"""The forms of an audit's report, from reports made by hand."""

import io
import json
import math
import re
import sys
import types
import xml.etree.ElementTree as ET
from functools import partial
from html.parser import HTMLParser

import pytest
import tqdm
from colours import contrast
from extras import optional
from sarif_schema import SARIF

import minilora.audit
from minilora.audit.report.document import schema
from minilora.audit.report.forms import rendered
from minilora.audit.report.groups import groups, headline
from minilora.audit.report.places import place, places, ranges
from minilora.audit.report.text import text
from minilora.audit.result import SEVERITIES, VERDICTS, Entry, Report
from minilora.cli import console
from minilora.cli.commands import audits
from minilora.cli.main import main
from minilora.cli.progress import bytes_bar
from minilora.forms.markdown import MARKDOWN_BYTES
from minilora.io import reference_models

LAYERS = 40
CAUSE = "the scale is alpha / r where alpha / sqrt(r) was asked for"


def entry(layer, module, verdict, mistake="", **figures):
    name = f"model.layers.{layer}.{module}"
    said = f"factor {figures['factor']:.4f}" if "factor" in figures else VERDICTS[verdict][1]
    return Entry(f"{name}.weight", verdict, said, {"layer": layer, **figures}, mistake)


@pytest.fixture(scope="module")
def wrong():
    """A report of 40 layers: two modules by a wrong factor, one layer without, one rounded away."""
    entries = []
    for i in range(LAYERS):
        for module in ("self_attn.q_proj", "self_attn.v_proj"):
            factor = 0.25 + i / 10000
            entries.append(entry(i, module, "factor", "rslora", factor=factor, survived=0.97))
        entries.append(entry(i, "mlp.up_proj", "exact", rounding="float32, then cast", survived=1))
        entries.append(entry(i, "mlp.down_proj", "rounded-away", survived=0.03))
        entries.append(entry(i, "mlp.gate_proj", "not-applied" if i == 3 else "within", factor=1.0))
        entries.append(entry(i, "input_layernorm", "unchanged"))
    entries.append(Entry("config.json: rope_theta", "told", "10000 in both"))
    entries.append(Entry("lm_head.weight", "undecided", "Q4_K needs the library gguf"))
    inputs = {"base": "B", "adapter": ["A"], "merged": "a folder/M"}
    return Report("merged", inputs, tuple(entries), CAUSE, "Merge again.", 1.25, 540_000_000)


RIGHT = Report("merged", {"base": "B", "merged": "M"}, (Entry("t.weight", "exact", "same bits"),))

HOSTILE = "<script>alert(1)</script> | ` \x1b[31m \ud800 & \"'\n## x"


@pytest.fixture(scope="module")
def hostile():
    """A report whose words are markup, codes of a terminal and no numbers."""
    figures = {"factor": math.nan, "survived": math.inf, "rounding": HOSTILE}
    entries = (Entry(HOSTILE, "factor", HOSTILE, figures, HOSTILE), Entry("t", "exact", HOSTILE))
    return Report("merged", {"merged": HOSTILE}, entries, HOSTILE, HOSTILE)


# Words


def test_numbers_are_ranges():
    assert ranges([5, 0, 2, 1, 1]) == "0-2, 5"
    assert ranges([]) == ""


def test_names_that_differ_in_a_layer_or_a_module_are_one():
    names = [f"m.layers.{i}.a.{p}.weight" for i in (0, 1, 2, 5) for p in ("q", "v")]
    assert places(Entry(name, "exact", "") for name in names) == [
        "m.layers.[0-2, 5].a.{q,v}.weight"
    ]
    experts = [f"h.{i}.experts.{j}.w" for i in (0, 1) for j in range(8)]
    assert places(Entry(name, "exact", "") for name in experts) == ["h.[0-1].experts.[0-7].w"]
    assert places([Entry("norm", "exact", "")]) == ["norm"]
    modules = [Entry(f"layers.{i}.attn.{name}", "fine", "") for i in (0, 1) for name in "qkv"]
    assert places(modules) == ["layers.[0-1].attn.{q,k,v}"]
    tables = [Entry(name, "exact", "") for name in ("lm_head.weight", "norm.weight")]
    assert places(tables) == ["lm_head.weight", "norm.weight"]


def test_modules_that_differ_in_other_layers_are_not_one():
    names = ["layers.0.q.weight", "layers.1.q.weight", "layers.3.v.weight"]
    assert places(Entry(name, "exact", "") for name in names) == [
        "layers.[0-1].q.weight",
        "layers.3.v.weight",
    ]


def test_a_version_is_no_layer():
    assert place(Entry("SGLang 0.5.23", "wrong", "")) == ("SGLang 0.5.23", None)
    assert place(Entry("model.layers.5.q.weight", "exact", "")) == ("model.layers.*.q.weight", 5)
    assert place(Entry("block", "exact", "", {"layer": 7})) == ("block", 7)


def test_the_largest_group_of_the_worst_severity_is_first(wrong):
    found = groups(wrong.entries)
    assert (found[0].id, len(found[0].entries)) == ("factor/rslora", 2 * LAYERS)
    order = [SEVERITIES.index(group.severity) for group in found]
    assert order == sorted(order)
    assert sum(len(group.entries) for group in found) == len(wrong.entries)


# Text


def test_the_result_and_the_cause_are_the_first_lines(wrong):
    first, second, third = text(wrong, width=200).splitlines()[:3]
    assert first == (
        "merged  WRONG: of 242 tensors 81 deviate, 1 cannot be decided, 40 with a warning, "
        "1 to note"
    )
    assert second == f"PROBABLE CAUSE  {CAUSE}"
    assert third == "WHAT TO DO  Merge again."


def test_hundreds_of_tensors_make_a_page_and_verbose_lists_each(wrong):
    short, long = text(wrong), text(wrong, verbose=True)
    assert len(short.splitlines()) < 50
    assert "model.layers.[0-39].self_attn.{q_proj,v_proj}.weight" in short
    assert "factor 0.25 to 0.2539" in short
    assert "40 exact (float32, then cast)" in short
    assert [e.subject for e in wrong.entries if e.subject not in long] == []


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(wrong, width):
    lines = [line for line in text(wrong, width=width).splitlines() if " " in line.strip()]
    assert max(map(len, lines)) <= width


def test_colours_are_added_where_asked_for_and_change_no_word(wrong):
    plain, coloured = text(wrong), text(wrong, colours=True)
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain != coloured


def test_what_is_right_is_said_in_a_line():
    assert headline(RIGHT) == "right: all 1 tensors"
    assert "ok  1 exact" in text(RIGHT)
    assert "CAUSE" not in text(RIGHT)
    assert headline(Report("merged", {}, ())).startswith("CANNOT BE DECIDED")


def test_no_code_of_a_terminal_comes_from_a_file(hostile):
    assert "\x1b" not in text(hostile)
    assert "\x1b" not in re.sub(r"\x1b\[\d+m", "", text(hostile, colours=True))


# JSON, SARIF, JUnit


FINE = {"subject": "t", "verdict": "exact", "severity": "ok", "mistake": "", "text": ""}
BROKEN = (
    {"exit_status": 2},
    {"entries": [{}]},
    {"entries": [FINE | {"figures": {"factor": [1]}}]},
    {"entries": [FINE | {"figures": {}, "verdict": "good"}]},
    {"entries": [FINE | {"figures": {}, "severity": "bad"}]},
    {"verdicts": {"good": 1}},
)


def test_the_json_is_as_its_schema_says(wrong, hostile):
    jsonschema = optional("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema())
    for report in (wrong, hostile, RIGHT):
        document = json.loads(rendered(report, "json"), parse_constant=pytest.fail)
        jsonschema.validate(document, schema())
    for broken in BROKEN:  # the last is short
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document | broken, schema())
    document = json.loads(rendered(wrong, "json"))
    assert document["summary"]["deviation"] == 81
    assert len(document["entries"]) == 242
    assert document["entries"][0]["figures"]["factor"] == 0.25


def test_the_sarif_is_as_the_standard_says(wrong, hostile):
    jsonschema = optional("jsonschema")
    for report in (wrong, hostile, RIGHT):
        log = json.loads(rendered(report, "sarif"), parse_constant=pytest.fail)
        jsonschema.validate(log, SARIF)
        (run,) = log["runs"]
        rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
        assert [rules[r["ruleIndex"]] for r in run["results"]] == [
            r["ruleId"] for r in run["results"]
        ]
        assert len(run["results"]) == sum(e.severity != "ok" for e in report.entries)
    log = json.loads(rendered(wrong, "sarif"))
    undecided = [r for r in log["runs"][0]["results"] if r["kind"] == "open"]
    assert len(undecided) == 1
    uri = undecided[0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri == "a%20folder/M"
    log["runs"][0]["results"][-1]["level"] = "error"  # of an entry that is no failure
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(log, SARIF)


def test_a_result_whose_severity_was_given_has_its_level():
    odd = Report("adapter", {"adapter": "A"}, (Entry("r", "doubtful", "", severity="note"),))
    (run,) = json.loads(rendered(odd, "sarif"))["runs"]
    assert run["results"][0]["kind"] == "informational"


def test_junit_counts_what_it_holds(wrong, hostile):
    for report in (wrong, hostile, RIGHT):
        (suite,) = ET.fromstring(rendered(report, "junit"))
        assert int(suite.get("tests")) == len(suite.findall("testcase")) == len(report.entries)
        assert int(suite.get("failures")) == len(suite.findall("testcase/failure"))
        assert int(suite.get("errors")) == len(suite.findall("testcase/error"))
    (suite,) = ET.fromstring(rendered(wrong, "junit"))
    assert (suite.get("failures"), suite.get("errors")) == ("81", "1")
    assert suite.find("properties/property[@name='probable cause']").get("value") == CAUSE


# Markdown, HTML


def test_markdown_keeps_to_its_limit_and_its_table_to_its_columns(wrong, hostile):
    for report in (wrong, hostile, RIGHT):
        page = rendered(report, "markdown", MARKDOWN_BYTES)
        rows = [line for line in page.splitlines() if line.startswith("|")]
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} <= {6}
        assert "<script>" not in page
    full = rendered(wrong, "markdown", MARKDOWN_BYTES)
    assert full.splitlines()[0].startswith("## minilora audit merged: WRONG")
    assert f"**PROBABLE CAUSE** {CAUSE}" in full
    short = rendered(wrong, "markdown", 4000)
    assert len(short.encode()) <= 4000
    assert "are left out here" in short
    assert "are left out here" not in full


class Page(HTMLParser):
    """The text of a page, its elements, and whether all that is opened is closed."""

    VOID = ("meta", "br", "wbr")

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open += [tag] * (tag not in self.VOID)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += [data] if "style" not in self.open else []


def test_the_page_needs_nothing_else_and_takes_no_markup_from_a_file(wrong, hostile):
    for report in (wrong, hostile, RIGHT):
        page = Page(rendered(report, "html"))
        tags = {tag for tag, _ in page.elements}
        assert not tags & {"script", "link", "img", "iframe"}
        assert all("href" not in at or at["href"].startswith("#") for _, at in page.elements)
    assert "url(" not in rendered(wrong, "html")
    links = {at["href"][1:] for _, at in Page(rendered(wrong, "html")).elements if "href" in at}
    ids = [at["id"] for _, at in Page(rendered(wrong, "html")).elements if "id" in at]
    assert links <= {*ids}
    assert len(ids) == len({*ids})


def cells(page):
    """The picture: {(layer, heading): (class, share, words)}."""
    table = re.search(r'<table class="picture">(.*?)</table>', page, re.S)[1].replace("<wbr>", "")
    heads = re.findall(r'<th scope="col">(.*?)</th>', table)[1:]
    found = {}
    for layer, row in re.findall(r'<tr><th scope="row">(\d+)</th>(.*?)</tr>', table):
        drawn = re.findall(r'<td class="(\w+)" style="--s:([\d.]+)" title="[^"]*">(.*?)</td>', row)
        found |= {(int(layer), head): cell for head, cell in zip(heads, drawn, strict=True)}
    return found


def test_the_picture_has_a_cell_for_each_layer_and_module_that_is_changed(wrong):
    found = cells(rendered(wrong, "html"))
    heads = ["self_attn.q_proj", "self_attn.v_proj"]
    heads += ["mlp.up_proj", "mlp.down_proj", "mlp.gate_proj"]
    assert [*found] == [(layer, head) for layer in range(LAYERS) for head in heads]
    assert found[0, "self_attn.q_proj"] == ("fail", "0.97", "✗ ×0.25")
    assert found[0, "mlp.up_proj"] == ("pass", "1", "✓ 100%")
    assert found[9, "mlp.down_proj"] == ("loose", "0.03", "≈ 3%")
    assert found[3, "mlp.gate_proj"][0] == "fail"


def test_of_several_experts_the_worst_is_drawn():
    names = [f"layers.0.experts.{i}.up.weight" for i in range(4)]
    entries = [Entry(name, "exact", "", {"survived": 0.9}) for name in names]
    entries[2] = Entry(names[2], "factor", "", {"survived": 0.9, "factor": 2.0})
    page = rendered(Report("merged", {"merged": "M"}, tuple(entries)), "html")
    assert [*cells(page).values()] == [("fail", "0.9", "✗ ×2")]


def test_where_no_adapter_is_known_the_rank_is_drawn():
    entries = [Entry(f"layers.{i}.up.weight", "low-rank", "", {"rank": 8}) for i in range(3)]
    page = rendered(Report("find", {"merged": "M"}, tuple(entries)), "html")
    assert [*cells(page).values()] == [("soft", "0", "i r 8")] * 3


def test_no_picture_without_layers():
    assert 'class="picture"' not in rendered(RIGHT, "html")


def test_words_stand_out_from_the_bars_by_day_and_by_night(wrong):
    palettes = re.findall(r":root \{(.*?)\}", rendered(wrong, "html"), re.S)
    pages, bars = palettes[:2], palettes[2:]
    for page, bar in zip(pages, bars, strict=True):
        ink = re.search(r"--ink: (#\w+)", page)[1]
        grounds = re.findall(r"--b-\w+: (#\w+)", bar)
        assert len(grounds) == 5
        assert min(contrast(ink, ground) for ground in grounds) >= 4.5


# The command line


@pytest.fixture
def toy(monkeypatch, capsys, tmp_path, wrong):
    """Runs ``minilora audit toy``, whose report is ``wrong``: status, output, errors."""
    module = types.ModuleType("minilora.cli.commands.audits.toy")
    error = []

    def run(arguments, progress):
        if error:
            raise error[0]
        return wrong

    module.add = lambda commands: audits.add_audit(commands, "toy", "try it", "Try it.", run)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("minilora.cli.commands.audit.NAMES", ("toy",))
    monkeypatch.chdir(tmp_path)

    def command(*words, fails=None):
        error[:] = [fails] if fails else []
        try:
            status = main(["audit", *words])
        except SystemExit as left:
            status = left.code
        return status, *capsys.readouterr()

    return command


def test_an_audit_prints_its_report_and_writes_each_form(toy, wrong, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    files = [word for form in audits.FORMS for word in (f"--{form}", f"report.{form}")]
    status, out, err = toy("toy", *files)
    assert (status, out, err) == (1, text(wrong, width=100), "")
    for form in audits.FORMS:
        assert (tmp_path / f"report.{form}").read_text() == rendered(wrong, form)


def test_what_cannot_be_read_is_exit_status_3_and_no_deviation(toy):
    for fails in (PermissionError(13, "Permission denied", "x"), MemoryError("10 TB")):
        status, out, err = toy("toy", fails=fails)
        assert (status, out) == (3, "")
        assert err.startswith("minilora audit toy: ")
    assert toy("toy", fails=ValueError("weights: 1 for 2 adapters"))[0] == 2
    assert toy("toy", "--json", "no/such/\0file")[0] in (2, 3)


def test_audit_alone_shows_its_help(toy):
    status, out, _ = toy()
    assert status == 2
    assert "try it" in out
    assert toy("unknown")[0] == 2
    status, out, _ = toy("--schema")
    assert (status, json.loads(out)) == (0, schema())


@pytest.mark.parametrize("plain", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_are_for_a_terminal_where_nobody_asked_for_none(monkeypatch, plain):
    terminal = types.SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(console.sys, "stdout", terminal)
    for name, value in {"NO_COLOR": "", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    assert console.has_colours()
    for name, value in plain.items():
        monkeypatch.setenv(name, value)
    assert not console.has_colours()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console.sys, "stdout", types.SimpleNamespace(isatty=lambda: False))
    assert not console.has_colours()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_tells_bytes_and_the_tensor_on_a_terminal_alone(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with bytes_bar() as progress:
        assert progress is None
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(tqdm, "tqdm", partial(tqdm.tqdm, mininterval=0, miniters=1))
    with bytes_bar() as progress:
        for read in range(0, 3 * 10**8, 10**8):
            progress(read, 2 * 10**8, f"layers.{read // 10**8}.weight")
        shown = sys.stderr.getvalue()
    assert shown.startswith("\r  0%")
    assert re.search(r"100% .* 200MB of 200MB, 00:00 left  layers.2.weight", shown)


LLAMA = reference_models.folder() / "llama"
AUDITS = {
    "merged": lambda: minilora.audit.merged(LLAMA / "base", LLAMA / "adapter", LLAMA / "base"),
    "find": lambda: minilora.audit.find(LLAMA / "base", LLAMA / "base", LLAMA / "adapter"),
    "adapter": lambda: minilora.audit.adapter(LLAMA / "adapter", LLAMA / "base"),
    "converted": lambda: minilora.audit.converted(LLAMA / "adapter", LLAMA / "adapter"),
}


@pytest.mark.parametrize("name", AUDITS)
def test_every_form_takes_what_each_audit_reports(name):
    report = AUDITS[name]()
    assert report.audit == name
    assert report.exit_status == (name == "merged")
    for form in audits.FORMS:
        assert rendered(report, form)
    assert text(report, verbose=True).count("\n") > len(report.entries)
    jsonschema = optional("jsonschema")
    jsonschema.validate(json.loads(rendered(report, "json")), schema())
    jsonschema.validate(json.loads(rendered(report, "sarif")), SARIF)
