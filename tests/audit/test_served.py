"""What a server serves, asked over HTTP of a server that serves minilora's own model."""

import importlib
import re
from dataclasses import replace

import numpy as np
import pytest
from completions_server import Model, serving
from extras import needs

from minilora.audit.served import served
from minilora.audit.served.forms import FORMS, OtherTokens, Texts
from minilora.audit.served.prompts import Prompts, candidates, read_texts
from minilora.audit.served.reference import BASE, Oracle, Setting
from minilora.cli.main import main
from minilora.io.errors import FormatError
from minilora.io.loading import open_adapted, open_base
from minilora.io.reference_models import folder

pytestmark = pytest.mark.slow

LLAMA = "reference:llama"


@pytest.fixture(scope="module")
def models():
    """The server's models by their factor and rounding, made once."""
    made = {}

    def model(factor=1.0, **settings):
        key = (factor, *sorted(settings.items()))
        if key not in made:
            made[key] = Model(factor=factor, **settings)
        return made[key]

    return model


def audited(model, adapter=LLAMA, base=LLAMA, texts=None, tokens=2000, **behaviour):
    with serving(model, **behaviour) as (url, server):
        return served(url, "m", base, adapter, texts, tokens=tokens), server


def figures(report):
    return report.entries[0].figures


FACTORS = [
    1.0,
    None,
    1.2,
    *(pytest.param(f, marks=pytest.mark.slow) for f in (0.5, 2.0, -1.0, 3.1)),
]
VERDICT = {1.0: "fine", None: "not-applied"}


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(
    "forms",
    ["echo", *(pytest.param(f, marks=pytest.mark.slow) for f in ("prompt_logprobs", "bool"))],
)
def test_it_is_said_what_is_served_and_at_what_factor(models, factor, forms):
    report, _ = audited(models(factor), forms=(forms,))
    entry = report.entries[0]
    assert entry.verdict == VERDICT.get(factor, "factor")
    assert report.exit_status == (factor != 1.0)
    assert entry.figures["low"] <= (factor or 0) <= entry.figures["high"]
    assert entry.figures["noise"] < 1e-5
    assert report.cause.endswith(entry.text) if factor != 1.0 else not report.cause


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int", "bool", "echo"])
@pytest.mark.parametrize("factor", [1.0, None, 2.0])
def test_texts_are_sent_to_a_server_that_takes_no_ids(models, factor, form):
    report, server = audited(models(factor), forms=(form,), ids=False)
    assert report.entries[0].verdict == VERDICT.get(factor, "factor")
    assert isinstance(server.asked[-1][1]["prompt"], str)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, None, 0.5, 2.0])
def test_without_log_probabilities_the_tokens_that_it_takes_are_compared(models, factor):
    report, _ = audited(models(factor), forms=())
    assert report.entries[0].verdict == VERDICT.get(factor, "factor")
    assert "no log-probabilities" in report.entries[1].text
    low, high = figures(report)["low"], figures(report)["high"]
    assert low < (factor or 0)
    assert high is None or (factor or 0) < high  # none where greater factors are left


@pytest.mark.parametrize("factor", [1.0, None])
@pytest.mark.parametrize(
    "rounding",
    ["bfloat16", *(pytest.param(r, marks=pytest.mark.slow) for r in ("float16", "four bits"))],
)
def test_a_server_that_rounds_its_weights_is_no_other(models, factor, rounding):
    report, _ = audited(models(factor, rounding=rounding), tokens=3000)
    assert report.entries[0].verdict in (VERDICT[factor], "undecided")
    if rounding != "four bits":
        assert report.entries[0].verdict == VERDICT[factor]
        assert figures(report)["noise"] < figures(report)["noise_of_four_bits"]


@pytest.mark.parametrize("digits", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_rounded_log_probabilities_will_do(models, digits):
    report, _ = audited(models(), digits=digits)
    assert report.exit_status == 0
    assert figures(report)["noise"] > figures(report)["oracle_rounding"]


@pytest.mark.slow
def test_another_model_is_something_else(models):
    for factor in (1.0, None):
        report, _ = audited(models(factor, spoil=0.5))
        assert report.entries[0].verdict == "mismatch"
        assert "something else" in report.cause


def test_another_model_is_not_the_base(models):
    report, _ = audited(models(None, spoil=0.5), adapter=None)
    assert report.entries[0].verdict == "mismatch"


def test_without_an_adapter_the_base_is_expected(models):
    report, _ = audited(models(None), adapter=None)
    assert (report.exit_status, report.entries[0].verdict) == (0, "fine")
    assert "factor" not in figures(report)
    report, _ = audited(models(1.0), adapter=None)
    assert report.entries[0].verdict == "mismatch"


def test_too_few_tokens_are_undecided_and_it_says_how_many_more(models):
    report, _ = audited(models(), tokens=10)
    assert report.exit_status == 4
    entry = report.entries[0]
    assert entry.verdict == "undecided"
    assert re.search(rf"about {entry.figures['more_tokens']} more tokens are needed", entry.text)
    assert "--tokens" in report.remedy


def test_an_adapter_that_changes_nothing_cannot_be_told(models, monkeypatch):
    def untrained(base, adapter=None, dtype=np.float32):
        model = open_adapted(base, adapter, dtype)
        changed = {k: w * (not k.endswith(".B")) for k, w in model.changed.items()}
        return replace(model, changed=changed)

    module = importlib.import_module("minilora.audit.served")  # its name is the function's, too
    monkeypatch.setattr(module, "open_adapted", untrained)
    report, _ = audited(models(None), tokens=200)
    assert report.exit_status == 4
    assert "the adapter changes nothing on these texts" in report.entries[0].text


def test_those_texts_are_asked_first_on_which_the_models_differ_most(models):
    oracle = Oracle(open_adapted(open_base(LLAMA), LLAMA))
    sequences, raw = candidates(oracle, None, 0)
    prompts = Prompts(oracle, Texts(oracle.base.tokenizer), sequences, raw)
    echo = FORMS[0]
    means = []
    for prompt in prompts.of(echo):
        pair = [oracle.score([prompt.ids], s)[0].logprobs[1:] for s in (BASE, Setting(1.0))]
        means.append(abs(pair[0] - pair[1]).mean())
    assert means == sorted(means, reverse=True)


def test_the_texts_that_are_given_are_asked(models, tmp_path):
    texts = tmp_path / "texts"
    tokenizer = open_base(LLAMA).tokenizer
    given = [" ".join(tokenizer.symbols[i : i + 4]) for i in range(3, 10)]
    texts.write_text("\n\n".join(given))
    assert read_texts(texts) == given
    _, server = audited(models(), texts=given)
    sent = [body["prompt"] for _, body, _ in server.asked]
    assert all(tokenizer.decode(ids) in given for ids in sent)


@pytest.mark.parametrize("contents", [b"", b"\n \n", b"\xff\xfe\x00"])
def test_a_file_without_texts_is_told_of(contents, tmp_path):
    (tmp_path / "texts").write_bytes(contents)
    with pytest.raises(FormatError, match="name another file"):
        read_texts(tmp_path / "texts")


def test_texts_without_tokens_are_told_of(models):
    with pytest.raises(FormatError, match="none of"):
        audited(models(), texts=["words that it does not know"])


def test_an_encoder_has_no_next_tokens(models):
    with pytest.raises(FormatError, match="a language model"):
        audited(models(), base="reference:bert", adapter=None)


def test_the_oracle_at_factor_1_and_0_is_the_adapter_and_the_base():
    oracle = Oracle(open_adapted(open_base(LLAMA), LLAMA))
    ids = [(1, 5, 6, 7, 4), (1, 4)]
    server, base = Model(), Model(factor=None)
    for setting, model in ((Setting(1.0), server), (BASE, base), (Setting(0.0), base)):
        for sequence, scored in zip(ids, oracle.score(ids, setting), strict=True):
            p = model.logprobs(list(sequence))[:-1]
            expected = p[np.arange(len(p)), sequence[1:]]
            assert abs(scored.logprobs[1:] - expected).max() < 1e-4
            assert (scored.best[1:] == p.argmax(1)).all()
            top = np.sort(p, axis=1)
            assert abs(scored.margin[1:] - (top[:, -1] - top[:, -2])).max() < 1e-4


def test_what_was_scored_is_not_computed_again():
    oracle = Oracle(open_adapted(open_base(LLAMA), LLAMA))
    oracle.score([(1, 5, 6)], BASE)
    passes = oracle.passes
    oracle.score([(1, 5, 6)], BASE)
    assert oracle.passes == passes


def test_other_tokens_are_told_and_not_guessed():
    texts = Texts(open_base(LLAMA).tokenizer)
    symbols = texts.tokenizer.symbols
    assert texts.token({"token": symbols[5]}) == 5
    assert texts.token({"id": 7, "token": symbols[5]}) == 7
    assert texts.token({"token": "token_id:6"}) == 6
    assert texts.token({"token": "unknown"}) is None
    assert texts.is_text_of(f"Ġ{symbols[5]}", 5)
    assert not texts.is_text_of(symbols[6], 5)
    assert issubclass(OtherTokens, Exception)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_form_sends_only_what_it_says(form, models):
    """And none a stream, a stop or anything that changes what is computed."""
    allowed = {"max_tokens", "echo", "logprobs", "prompt_logprobs"}
    assert set(form.settings) <= allowed


@needs("jsonschema")
def test_the_report_has_the_audits_json(models, tmp_path):
    from json import loads
    from pathlib import Path

    import jsonschema

    import minilora.audit.report as reports

    out = tmp_path / "r.json"
    with serving(models(2.0)) as (url, _):
        options = ["--url", url, "--model", "m", "--base", LLAMA, "--adapter", LLAMA]
        assert main(["audit", "served", *options, "--json", str(out)]) == 1
    schema = loads((Path(reports.__file__).parent / "schema.json").read_text())
    jsonschema.validate(loads(out.read_text()), schema)


def test_the_command_says_what_is_served(models, capsys):
    base = str(folder() / "llama" / "base")
    with serving(models()) as (url, _):
        options = ["--url", url, "--model", "m", "--base", base, "--adapter", LLAMA]
        assert main(["audit", "served", *options]) == 0
    out = capsys.readouterr().out
    assert "serves the adapter" in out
    assert "wrong with probability at most 0.001" in " ".join(out.split())


@pytest.mark.parametrize(
    "option",
    [("--error", "0"), ("--error", "0.7"), ("--tokens", "0"), ("--timeout", "0"), ("--seed", "-1")],
)
def test_an_option_out_of_range_is_wrong_usage(option, capsys):
    options = ["--url", "http://127.0.0.1:9", "--model", "m", "--base", LLAMA]
    assert main(["audit", "served", *options, *option]) == 2
    assert option[0] in capsys.readouterr().err
