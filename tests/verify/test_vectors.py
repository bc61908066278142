"""Test vectors: the same bytes everywhere, true, and judged as verify judges."""

import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from extras import optional
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import others_slow
from safetensors.numpy import load_file, save_file

from minilora.cli.main import main
from minilora.io.atomic import write_files
from minilora.spec.lora import merge_weight
from minilora.spec.variants import DORA_FULL
from minilora.verify.checks.names import MEANINGLESS
from minilora.verify.checks.registry import CHECKS, LEVELS
from minilora.verify.core.bigfloat import BITS, Exact, Shake, _exact, exact, rounded
from minilora.verify.core.errors import Fault, Skip, UsageError
from minilora.verify.core.types import Case
from minilora.verify.diagnosis.answers import Direct
from minilora.verify.implementation import minilora_impl
from minilora.verify.implementation.minilora_impl import Minilora
from minilora.verify.mutants import MUTANTS
from minilora.verify.mutants.references.linear import Linear
from minilora.verify.mutants.references.optimizer import Optimizer
from minilora.verify.vectors.call import SIGMA_BITS, coarse
from minilora.verify.vectors.files import (
    MANIFEST,
    SUMS,
    _archive,
    files,
    frozen,
    problems,
    read,
    schema,
    write,
)
from minilora.verify.vectors.tags import NOTES
from minilora.verify.vectors.vector import fingerprint, gathered
from minilora.verify.vectors.vector_answers import Answered, _checks, answer, compared, judge
from minilora.verify.vectors.vectors import HOLD, INVALID, LISTS, draws, name_of, vectors

DOCS = Path(__file__).parents[2] / "docs" / "vectors"
CHOSEN = [
    *("linear.*", "merge.*", "combine.*", "multi.*", "variants.dora.vjp", "optimizer.clip"),
    *("names.targets.list", "names.trainable.plain", "lifecycle.save", "lifecycle.unknown"),
    *("module.linear.*", "init.*", "files.load.patterns"),
]


class Reference(Linear, Optimizer):
    """A layer and an optimizer that are right, written unlike minilora's."""


@pytest.fixture(scope="module")
def made():
    """Vectors of every level; not all of those whose sigma is sampled, which takes seconds."""
    return vectors(checks=CHOSEN)


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    target = tmp_path_factory.mktemp("vectors")
    write(target, made)
    return target


@pytest.fixture(scope="module")
def few(made):
    """Vectors of two levels, which a command reads at once."""
    return [v for v in made if v.check in ("linear.forward", "linear.vjp", "merge.weight")]


@pytest.fixture(scope="module")
def small(few, tmp_path_factory):
    target = tmp_path_factory.mktemp("few")
    write(target, few)
    return target


def put(target, contents):
    write_files(target, {name: (lambda data=data: data) for name, data in contents.items()})
    return target


@pytest.fixture(scope="module")
def answered(made, tmp_path_factory):
    """minilora's own answers."""
    return put(tmp_path_factory.mktemp("answers"), answer(made, Minilora()))


@pytest.fixture
def changed(answered, tmp_path):
    """Those answers in a folder of one's own, with the answers in a dtype changed."""

    def change(dtype="float64", **new):
        target = tmp_path / "answers"
        shutil.copytree(answered, target, dirs_exist_ok=True)
        arrays = load_file(target / f"{dtype}.safetensors")
        for name, array in new.items():
            if array is None:
                del arrays[name]
            else:
                arrays[name] = array(arrays[name]) if callable(array) else array
        save_file(arrays, target / f"{dtype}.safetensors")
        return target

    return change


# ---- numbers that are the same everywhere

dyadic = st.integers(-(2**60), 2**60).map(float) | st.floats(1e-9, 1e3) | st.floats(-1e3, -1e-9)


@given(dyadic, dyadic)
@settings(max_examples=50)
def test_exact_numbers_are_the_rationals(a, b):
    x, y, p, q = _exact(a), _exact(b), Fraction(a), Fraction(b)
    for mine, right in ((x + y, p + q), (x - b, p - q), (a - y, p - q), (x * y, p * q), (-x, -p)):
        assert Fraction(mine.n) * Fraction(2) ** mine.e == right
        assert float(mine) == float(right)
    assert (x < y, x == y, x <= b) == (p < q, p == q, p <= q)
    assert float(x**3) == float(p**3)
    if b:
        quotient = x / y
        error = Fraction(quotient.n) * Fraction(2) ** quotient.e - p / q
        assert abs(error) <= abs(p / q) / 2 ** (BITS - 2)
        assert float(a / y) == float(p / q)


@given(st.integers(1, 2**200), st.integers(-300, 300))
@settings(max_examples=50)
def test_a_root_is_cut_after_its_digits(n, e):
    root = Exact(n, e).sqrt()
    below, above = Exact(root.n, root.e), Exact(root.n + 1, root.e)
    assert below * below <= Exact(n, e) < above * above
    assert root.n.bit_length() >= BITS


def test_an_answer_in_exact_numbers_is_rounded_once():
    W, A, B = np.array([[1.0]]), np.array([[1.0, 1.0]]), np.array([[2.0**-53, 2.0**-53]])
    true = rounded(
        merge_weight(exact(W), exact(A.T).T @ exact([[1.0], [0.0]]), exact(B[:, :1]), 2.0)
    )
    assert true == 1 + 2.0**-52
    assert (W + B[:, :1]) + B[:, :1] == 1  # in float64, in this order


def test_draws_are_those_of_the_hash():
    data = hashlib.shake_128(b"a name/1").digest(24)
    words = [int.from_bytes(data[i : i + 8], "little") >> 11 for i in (0, 8, 16)]
    assert Shake("a name").random(3).tolist() == [w / 2**53 for w in words]
    again, other = Shake("a name"), Shake("another")
    first = again.random(3)
    assert (first != again.random(3)).all()
    assert (first != other.random(3)).all()


def test_draws_are_distributed_as_they_should():
    """Means of n = 10⁵ draws, off by more than 6 standard errors once in 10⁸ names."""
    n, rng = 100_000, Shake("distribution")
    z = rng.standard_normal(n)
    whole = rng.integers(-2, 3, n)
    for sample, mean, variance in ((z, 0, 1), (z * z, 1, 2), (rng.random(n), 0.5, 1 / 12)):
        assert abs(sample.mean() - mean) < 6 * (variance / n) ** 0.5
    assert abs(whole.mean()) < 6 * (2 / n) ** 0.5
    assert set(whole.tolist()) == {-2, -1, 0, 1, 2}
    assert sorted(rng.permutation(7)) == list(range(7))


def test_a_sigma_that_floating_point_could_round_either_way_is_refused():
    middle = (2**SIGMA_BITS - 1.5) / 2**SIGMA_BITS
    assert coarse(np.array(middle * (1 + 1e-6))) > coarse(np.array(middle * (1 - 1e-6)))
    for near in (middle, middle * (1 + 1e-12)):
        with pytest.raises(ArithmeticError, match="another machine"):
            coarse(np.array(near))


SAME = """
import hashlib, numpy as np
from threadpoolctl import threadpool_info
from minilora.verify.vectors.files import files
from minilora.verify.vectors.vectors import vectors
made = vectors(checks=["linear.vjp", "combine.weighted", "variants.dora.unbatched"])
found = files(made)
x = np.random.default_rng(0).standard_normal((40, 40))
print("and".join({i.get("architecture", "one") for i in threadpool_info()} or {"one"}),
      hashlib.sha256((x @ x).tobytes()).hexdigest(),
      hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest())
"""


@pytest.mark.slow
def test_a_set_has_the_same_bytes_whatever_processor_the_products_are_for():
    """In other processes: OpenBLAS chooses its kernels when it is loaded."""
    asked = [{}, {"OPENBLAS_CORETYPE": "Nehalem", "NPY_DISABLE_CPU_FEATURES": ""}]
    running = [
        subprocess.Popen([sys.executable, "-c", SAME], env=os.environ | more, stdout=-1, text=True)
        for more in asked
    ]
    (here, product, bytes_), (there, other, same) = (p.communicate()[0].split() for p in running)
    assert bytes_ == same
    if here == there:
        pytest.skip("this NumPy has products for one kind of processor")
    assert product != other  # and so are those of float64 not


@pytest.mark.slow
def test_nothing_of_a_vector_is_drawn_by_numpy(made, monkeypatch):
    """Whose generators may give other numbers in another version."""
    monkeypatch.setattr(np.random, "default_rng", lambda *_: None)
    checks = ["merge.weight", "combine.weighted", "combine.zero-weight", "optimizer.clip"]
    again = vectors(checks=checks)
    known = {v.id: fingerprint(v) for v in made}
    assert all(known[v.id] == fingerprint(v) for v in again)
    with pytest.raises(AttributeError):
        next(c for c in CHECKS if c.id == "merge.weight").run(
            Direct(Minilora()), Case("merge.weight", "float64", 1, 0)
        ).__next__()


# ---- the truth, by other code


def of(array, number):
    """Numbers of another kind, tokens in rows."""
    rows = np.atleast_2d(array).reshape(-1, array.shape[-1])
    return np.array([[number(v) for v in row] for row in rows.tolist()], object)


@pytest.mark.slow
def test_the_truth_of_a_layer_is_the_nearest_to_the_rational(made):
    """s and the multiplier of dropout are the floats that are nearest, all else is in fractions."""
    own = [v for v in made if v.check in ("linear.vjp", "linear.vjp.all") and v.lane == "rounding"]
    assert len(own) >= 6
    for vector in own:
        a = {name: of(array, Fraction) for name, array in vector.inputs.items()}
        alpha, r = vector.settings["alpha"], vector.settings["r"]
        s = Fraction(alpha / (r**0.5 if vector.settings.get("use_rslora") else r))
        K = a["keep"] * Fraction(1 / (1 - vector.settings["p"])) if "keep" in a else 1
        h, dh = a["x"] * K, s * (a["dy"] @ a["B"])
        truth = {
            "y": a["x"] @ a["W"].T + a.get("bias", 0) + s * (h @ a["A"].T @ a["B"].T),
            "dx": a["dy"] @ a["W"] + dh @ a["A"] * K,
            "dA": dh.T @ h,
            "dB": s * (a["dy"].T @ (h @ a["A"].T)),
        }
        for name, array in truth.items():
            want = vector.outputs[name].want
            assert (rounded(array).reshape(want.shape) == want).all()
            off = array * (1 + Fraction(1, 2**50))
            assert (rounded(off).reshape(want.shape) != want).any()


@pytest.mark.slow
def test_the_truth_with_roots_is_the_nearest_to_sixty_digits(made):
    mpmath = optional("mpmath")
    root = np.frompyfunc(mpmath.sqrt, 1, 1)
    with mpmath.workdps(60):
        vector = next(v for v in made if v.check == "variants.dora.vjp")
        a = {name: of(array, mpmath.mpf) for name, array in vector.inputs.items()}
        V = a["W"] + vector.settings["alpha"] / vector.settings["r"] * (a["B"] @ a["A"])
        V = a["magnitude"].T * V / root((V * V).sum(1, keepdims=True))
        y, want = a["x"] @ V.T + a["bias"], vector.outputs["y"].want
        assert (rounded(y).reshape(want.shape) == want).all()

        vector = next(v for v in made if v.check == "optimizer.clip")
        a = {name: of(array, mpmath.mpf) for name, array in vector.inputs.items()}
        own = vector.settings
        p, u = {name: a[f"params.{name}"] for name in vector.outputs}, {}
        for k in range(len(own["gradients"])):
            g = {name: a[f"gradients.{k}.{name}"] for name in p}
            norm = root(sum((array * array).sum() for array in g.values()))
            factor = min(own["max_grad_norm"] / (norm + mpmath.mpf(1e-6)), 1)
            for name in p:
                v = g[name] * factor + own["weight_decay"] * p[name]
                u[name] = own["momentum"] * u[name] + v if name in u else v
                p[name] = p[name] - own["lr"] * u[name]
                assert (rounded(p[name]) == vector.outputs[name].want[k]).all()


# ---- ids that never change their meaning


def test_no_vector_has_changed_since_it_was_frozen(made):
    known = frozen()
    changed = [v.id for v in made if known.get(v.id) != fingerprint(v)]
    assert not changed, "see 'Add vectors' in docs/contributing.md"


@pytest.fixture(scope="module")
def whole():
    """The whole set, which takes a minute."""
    return vectors()


@pytest.mark.slow
def test_the_whole_set_is_as_it_was_frozen_and_small(whole):
    assert {v.id: fingerprint(v) for v in whole} == frozen()
    assert len(_archive(files(whole), "vectors")) < 3e6


def test_every_frozen_id_is_made_again():
    ids = {name_of(c.id, drawn, n, 0) for c in CHECKS for drawn, n in draws(c.id)}
    for check, flag, _ in INVALID:
        ids.add(f"{name_of(check, *draws(check)[0], 0)}-{flag}")
    for check in LISTS:
        first = name_of(check, *draws(check)[0], 0)
        ids |= {f"{first}-Meaningless-{i}" for i in range(len(MEANINGLESS))}
    assert ids == frozen().keys(), "what is new: python -m minilora.verify.vectors"


def test_a_changed_meaning_is_seen(made):
    vector = next(v for v in made if v.lane == "rounding")
    y = vector.outputs["y"]
    off = replace(y, want=np.nextafter(y.want, np.inf))
    for other in (
        replace(vector, settings=vector.settings | {"alpha": 8.0}),
        replace(vector, outputs=vector.outputs | {"y": off}),
        replace(vector, inputs=vector.inputs | {"x": -vector.inputs["x"]}),
        replace(vector, dtypes=vector.dtypes[:1]),
    ):
        assert fingerprint(other) != fingerprint(vector)
        with pytest.raises(ArithmeticError, match=vector.id):
            files([other])
    assert fingerprint(replace(vector, flags=())) == fingerprint(vector)


def test_every_check_has_vectors_or_a_reason_for_none():
    absent = json.loads(files([])[MANIFEST])["absent"]
    assert absent.keys() == {c.id for c in CHECKS if not draws(c.id)}
    assert all(absent.values())
    stale = [
        f"{level.name}.{pattern}"
        for level in LEVELS
        for pattern in (*level.no_vectors, *level.vectors)
        if not fnmatch.filter([c.id for c in level.checks], f"{level.name}.{pattern}")
    ]
    assert stale == []


def test_another_seed_gives_other_vectors_under_other_ids():
    first, other = vectors(checks=["merge.weight"]), vectors(checks=["merge.weight"], seed=3)
    assert not {v.id for v in first} & {v.id for v in other}
    assert all((a.inputs["A"] != b.inputs["A"]).any() for a, b in zip(first, other, strict=True))


# ---- what is in a set


@pytest.mark.slow
def test_a_set_comes_back_from_its_files(made, folder):
    manifest, again = read(folder)
    assert list(map(fingerprint, again)) == list(map(fingerprint, made))
    assert manifest["vectors"][0]["id"] == made[0].id


def test_an_archive_is_the_folder_with_its_checksums(few, small, tmp_path):
    written = write(tmp_path / "set.zip", few)
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        names = {name.removeprefix("set/") for name in archive.namelist()}
        archive.extractall(tmp_path)
    assert names == written.keys() == {p.name for p in small.iterdir()}
    sums = dict(line.split("  ")[::-1] for line in (small / SUMS).read_text().splitlines())
    for name in names:
        data = (tmp_path / "set" / name).read_bytes()
        assert data == (small / name).read_bytes()
        assert name == SUMS or hashlib.sha256(data).hexdigest() == sums[name]
    again = (tmp_path / "set.zip").read_bytes()
    write(tmp_path / "set.zip", few)
    assert (tmp_path / "set.zip").read_bytes() == again
    assert (small / "LICENSE").read_text() == (DOCS.parents[1] / "LICENSE").read_text()


def test_masks_are_true_or_false(made):
    kinds = {v.inputs["keep"].dtype for v in made if "keep" in v.inputs}
    assert kinds == {np.dtype(bool)}


def test_the_manifest_keeps_its_schema(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    shipped = json.loads((folder / manifest["$schema"]).read_text())
    assert problems(manifest, shipped) == []
    assert shipped == schema()
    for spoil, where in (
        (lambda m: m.pop("judge"), "$ has no 'judge'"),
        (lambda m: m.update(version=2), "$.version is 2"),
        (lambda m: m.update(more=1), "$ has an unknown 'more'"),
        (lambda m: m["vectors"][1].update(result="maybe"), "$.vectors[1].result is maybe"),
        (lambda m: m["vectors"][0].update(dtypes=["float8"]), "$.vectors[0].dtypes[0] is float8"),
        (lambda m: m["vectors"][0]["outputs"]["y"].update(max_z="6"), "outputs.y.max_z is 6"),
    ):
        spoiled = json.loads(json.dumps(manifest))
        spoil(spoiled)
        (problem,) = problems(spoiled, shipped)
        assert where in problem


def test_the_schema_means_the_same_to_a_library(folder):
    jsonschema = optional("jsonschema")
    manifest = json.loads((folder / MANIFEST).read_text())
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(manifest, schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest | {"version": 2}, schema())


def test_every_input_is_exact_in_every_dtype_that_it_is_put_to(made):
    widths = {"float64": np.float64, "float32": np.float32, "float16": np.float16}
    for vector in made:
        assert vector.dtypes
        assert set(vector.dtypes) <= set(HOLD[vector.drawn])
        for dtype in widths.keys() & set(vector.dtypes):
            for array in vector.inputs.values():
                assert (array.astype(widths[dtype]) == array).all()


def test_every_flag_has_its_note_and_every_note_a_vector(made):
    used = {flag for vector in made for flag in vector.flags}
    assert used <= NOTES.keys()
    others = {"Schedule", "LoRAPlus", "Accumulation", "Training"}
    assert NOTES.keys() - used == others  # of the checks that are not made here


def test_half_of_the_arguments_put_together_again_are_the_arguments():
    given = gathered(
        {"adapters": [{"r": 1}, {"r": 2}], "params": {}, "gradients": [{}, [[5, {}]]]},
        {"adapters.1.A": 7, "params.layers.0.q.A": 8, "gradients.1.0.1.b.c": 9, "x": 6},
    )
    assert given == {
        "adapters": [{"r": 1}, {"r": 2, "A": 7}],
        "params": {"layers.0.q.A": 8},
        "gradients": [{}, [[5, {"b.c": 9}]]],
        "x": 6,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", [MANIFEST, "merge.safetensors", "manifest.schema.json"])
def test_a_changed_file_is_noticed(folder, answered, tmp_path, name, capsys):
    target = tmp_path / "set"
    shutil.copytree(folder, target)
    data = (target / name).read_bytes()
    at = data.index(b"alpha") if name == MANIFEST else len(data) - 3
    (target / name).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert main(["vectors", "check", str(target), str(answered)]) == 2
    assert f"{name} was changed" in capsys.readouterr().err
    (target / name).unlink()
    with pytest.raises(UsageError, match=name):
        read(target)


# ---- judging


def status(report):
    return {(r.check, r.dtype): r.status for r in report.results}


@pytest.mark.slow
def test_minilora_s_own_answers_hold_in_every_dtype(made, folder, answered, capsys):
    assert main(["vectors", "check", str(folder), str(answered)]) == 0
    assert "0 failed" not in (text := capsys.readouterr().out)
    assert "vectors v1" in text
    assert set(status(judge(made, Answered(answered))).values()) == {"pass"}
    found = status(judge(made, Reference()))
    own = ("linear.", "merge.", "optimizer.")
    assert {s for (check, _), s in found.items() if check.startswith(own)} == {"pass"}
    assert set(found.values()) == {"pass", "skip"}


def test_a_method_that_is_absent_is_skipped(made):
    class Forward:
        lora_linear = Minilora.lora_linear
        _layer = Minilora._layer

    found = status(judge(made, Forward()))
    assert {s for (check, _), s in found.items() if check.startswith("linear.forward")} == {"pass"}
    assert {s for (check, _), s in found.items() if "vjp" in check or "merge" in check} == {"skip"}


def test_one_bit_is_seen_where_nothing_rounds_and_none_where_it_does(made, changed):
    lanes = {v.lane: v for v in made if v.check == "linear.forward" and v.outputs}
    for lane, expected in (("exact", "fail"), ("rounding", "pass")):
        target = changed(**{f"{lanes[lane].id}.out.y": lambda y: np.nextafter(y, np.inf)})
        found = judge([lanes[lane]], Answered(target))
        assert status(found)["linear.forward", "float64"] == expected


def test_a_missing_answer_is_skipped_and_half_an_answer_is_an_error(made, changed):
    vjp = [v for v in made if v.check == "linear.vjp"]
    names = [f"{vjp[1].id}.out.{name}" for name in ("y", "dx", "dA", "dB")]
    result = judge(vjp, Answered(changed(**dict.fromkeys(names)))).results[0]
    assert (result.status, result.skipped_cases, result.reason) == ("pass", 1, "no answer")
    result = judge(vjp[1:2], Answered(changed(**dict.fromkeys(names)))).results[0]
    assert (result.status, result.skipped_cases) == ("skip", 1)
    name = f"{vjp[2].id}.out.dA"
    result = judge(vjp, Answered(changed(**{name: None}))).results[0]
    assert result.status == "error"
    assert name in result.faults[0].message


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda y: y.astype(np.float32), "dtype"),
        (lambda y: y[..., :-1].copy(), "shape"),
        (lambda y: y.T.copy(), "shape"),
        (lambda y: y * np.nan, "nan"),
    ],
)
def test_an_answer_of_another_kind_is_named(made, changed, change, kind):
    vector = next(v for v in made if v.check == "linear.forward" and v.outputs["y"].want.ndim == 2)
    target = changed(**{f"{vector.id}.out.y": change})
    result = judge(made, Answered(target)).results[0]
    assert (result.status, result.faults[0].kind) == ("error", kind)
    assert result.faults[0].case == vector.id
    assert "--case" not in result.reproduce


def test_an_answer_to_nothing_that_was_asked_is_mentioned(made, changed):
    target = changed(**{"linear.foward-bfloat16-0.out.y": np.ones(3)})
    (note,) = judge(made, Answered(target)).notes
    assert "linear.foward-bfloat16-0" in note


SEVERAL_CALLS = (
    *("state-", "merge-piled-up", "merge-unlike-forward", "combine-negative-absolute"),
    *("combine-all-zero", "multi-call-before"),
)
NOT_SHOWN = {
    *("combined-tile-64", "combined-ranks-beyond-64", "combined-tokens-beyond-512"),
    *("multi-rows-beyond-256", "optimizer-beyond-1024", "optimizer-decay-ends"),
    *("combined-stored-in-out-alpha-over-r", "combine-rank-for-alpha", "dropout-first-call"),
    *("bias-b-vector-first", "bias-b-vector-dc-summed", "optimizer-one-not-clipped"),
    *("multi-none-off", "multi-none-and-one", "names-layers-pattern-ignored"),
    *("module-one-over-p", "module-pointwise-one-over-p", "init-base-rounded-tall"),
    *("lifecycle-gradients-merged", "lifecycle-merged-alone", "lifecycle-fused-outer"),
    *("lifecycle-gradients-off", "lifecycle-delete-unmerges", "module-gap-closed"),
    *("module-merged-in-out-turned", "module-merged-rescaled"),
}
"""What needs sizes, or settings together, that vectors lack: they are small, and few."""


def seen_by_vectors(m):
    """Whether one call shows it; what is kept from call to call does not show in any order."""
    return bool(not m.id.startswith(SEVERAL_CALLS) and draws(m.caught_by) and m.id not in NOT_SHOWN)


def holds(given, implementation):
    """Whether all is right in float32, without the report and the diagnosis."""
    subject = Direct(implementation)
    for vector in given:
        if "float32" in vector.dtypes:
            try:
                found = list(compared(subject, vector, "float32", subject.conventions))
            except Skip:
                continue
            except Fault:
                return False
            if any(each.judge().verdict != "pass" for each in found):
                return False
    return True


WITH_VECTORS = [level.name for level in LEVELS if level.vectors]
HERE = ["linear", "merge", "combine", "multi", "variants", "optimizer", "names"]


@pytest.mark.slow
@pytest.mark.parametrize("level", others_slow(HERE, "merge"))
def test_mutants_are_refused_and_what_only_looks_wrong_is_not(made, level):
    """Some of each level, evenly from all that a check of these vectors shows best."""
    own = [v for v in made if v.level == level and v.result != "invalid"]
    known = [m for m in MUTANTS if m.level == level]
    shown = {v.check for v in own}
    wrong = [m for m in known if m.caught_by in shown and seen_by_vectors(m)]
    for m in wrong[:: max(1, len(wrong) // 30)]:
        assert not holds(own, m.make()), m.id
    for m in known:
        assert not m.equivalent or holds(own, m.make()), m.id
    assert wrong


@pytest.mark.slow
def test_the_whole_set_shows_the_whole_catalogue(whole):
    for level in WITH_VECTORS:
        own = [v for v in whole if v.level == level and v.result != "invalid"]
        for m in (m for m in MUTANTS if m.level == level and (m.equivalent or seen_by_vectors(m))):
            first = sorted(own, key=lambda v: v.check != m.caught_by)
            assert holds(first, m.make()) == m.equivalent, m.id
        for m in (m for m in MUTANTS if m.level == level and m.id in NOT_SHOWN):
            assert holds(own, m.make()), m.id


class FloatsOnly:
    """An implementation in float32 alone, to save time."""

    dtypes = ("float32",)

    def __init__(self, implementation):
        self.implementation = implementation

    def __getattr__(self, name):
        return getattr(self.implementation, name)


@pytest.mark.slow
def test_wrong_answers_get_the_name_of_the_mutant(few, small, tmp_path, capsys):
    m = next(m for m in MUTANTS if m.id == "scale-alpha")
    target = put(tmp_path, answer(few, FloatsOnly(m.make())))
    wanted = ["vectors", "check", str(small), str(target), "--check", "linear.vjp"]
    assert main([*wanted, "--json", str(tmp_path / "r.json")]) == 1
    text = capsys.readouterr().out
    assert "scale-alpha" in text
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert result["diagnosis"][0]["id"] == "scale-alpha"
    case = result["counterexample"]["case"]
    assert result["reproduce"].endswith(f"--case {case}")
    assert main([*wanted[:4], "--case", case]) == 1


# ---- conventions, and what is invalid


@pytest.mark.slow
def test_dora_s_norm_may_be_held_or_differentiated_and_not_both(made, monkeypatch):
    dora = [v for v in made if v.check == "variants.dora.vjp"]
    monkeypatch.setattr(minilora_impl, "DORA", DORA_FULL)
    full = Minilora()
    full.conventions = {}
    report = judge(dora, full)
    assert set(status(report).values()) == {"pass"}
    assert report.conventions == {"dora_norm": "differentiated", "dora_dropout": "difference"}
    assert "not declared" in report.notes[-1]
    full.conventions = {"dora_norm": "detached"}
    assert "fail" in status(judge(dora, full)).values()

    class Mixed(Minilora):
        conventions = {}  # noqa: RUF012
        calls = 0

        def lora_linear_vjp(self, *args, **options):
            self.calls += 1
            monkeypatch.setattr(
                minilora_impl, "DORA", (minilora_impl.DORA_FULL, DORA_HELD)[self.calls % 2]
            )
            return super().lora_linear_vjp(*args, **options)

    monkeypatch.setattr(minilora_impl, "DORA_FULL", DORA_FULL, raising=False)
    assert "fail" in status(judge(dora, Mixed())).values()


DORA_HELD = minilora_impl.DORA


@pytest.mark.slow
def test_dora_s_dropout_may_be_on_the_branch_alone():
    dropped = vectors(checks=["variants.dora.vjp.dropout"])
    (same,) = (m for m in MUTANTS if m.id == "same-variants-dropout-on-branch")
    branch, silent = same.make(), same.make()
    silent.conventions = {}
    assert set(status(judge(dropped, branch)).values()) <= {"pass", "skip"}
    report = judge(dropped, silent)
    assert set(status(report).values()) <= {"pass", "skip"}
    assert report.notes == ("assumed: dora_dropout branch, which is not declared",)
    branch.conventions = {"dora_dropout": "difference"}
    assert "fail" in status(judge(dropped, branch)).values()


def test_what_is_invalid_is_to_be_refused(made, changed):
    meaningless = [v for v in made if "Meaningless" in v.flags]
    assert len(meaningless) == len(LISTS) * len(MEANINGLESS)
    invalid = [v for v in made if v.result == "invalid" and v not in meaningless]
    assert len(invalid) == len(INVALID)
    refusing = Direct(Minilora())
    for vector in meaningless:
        (only,) = compared(refusing, vector, "float32", {})
        assert only.judge().verdict == "pass"
    for vector in invalid:
        (only,) = compared(refusing, vector, "float64", {"dora_norm": "detached"})
        assert only.judge().verdict == "pass"
        target = changed(**{f"{vector.id}.out.y": np.ones((4, 5))})
        said = json.loads((target / "answers.json").read_text())
        for refused, end in (([vector.id], None), ([], Fault)):
            (target / "answers.json").write_text(json.dumps(said | {"refused": refused}))
            subject = Direct(Answered(target))
            ask = compared(subject, vector, "float64", {"dora_norm": "detached"})
            if end is None:
                assert [each.judge().verdict for each in ask] == ["pass"]
            else:
                with pytest.raises(end, match="accepts what is invalid"):
                    list(ask)


def test_a_valid_vector_that_is_refused_is_skipped(made, answered, tmp_path):
    target = tmp_path / "answers"
    shutil.copytree(answered, target)
    vector = next(v for v in made if v.check == "linear.forward")
    (target / "answers.json").write_text(json.dumps({"refused": [vector.id]}))
    with pytest.raises(Skip, match="refused"):
        list(compared(Direct(Answered(target)), vector, "float64", {"dora_norm": "detached"}))


def test_a_check_of_vectors_has_one_case_for_each(made):
    for check in _checks(made, {"dora_norm": "detached"}):
        for dtype in HOLD["bfloat16"]:
            mine = [v for v in made if v.check == check.id and dtype in v.dtypes]
            assert check.cases("ci", dtype) == len(mine)


# ---- the command line


def test_a_set_is_written_by_the_command(tmp_path, capsys):
    target = tmp_path / "set"
    assert main(["vectors", str(target), "--check", "merge.weight*", "--level", "merge"]) == 0
    assert "vectors of 4 checks" in capsys.readouterr().out
    _, again = read(target)
    assert {v.check for v in again} == {
        "merge.weight",
        "merge.weight.rslora",
        "merge.weight.conv1d",
        "merge.weight.all",
    }


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["one", "two"], 2, "expected one folder"),
        (["check", "one"], 2, "check DIR ANSWERS"),
        (["x", "--level", "linaer"], 2, "did you mean 'linear'"),
        (["x", "--check", "linear.forwards"], 2, "did you mean 'linear.forward'"),
        (["x", "--seed", "-1"], 2, "expected 0 or more"),
        (["check", "nowhere", "nowhere"], 2, "manifest.json"),
    ],
)
def test_wrong_usage_is_refused_and_nothing_is_written(
    words, status, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["vectors", *words]) == status
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        (None, b"", "has no answers"),
        ("float8.safetensors", b"", "'float8'"),
        ("float32.safetensors", b"cut", "safetensors file"),
        ("answers.json", b"[]", "expected a JSON object"),
        ("answers.json", b'{"refused": "all"}', "expected a list"),
        ("answers.json", b'{"conventions": {"dora_norm": "free"}}', "expected some of"),
    ],
)
def test_answers_that_cannot_be_read_end_with_three(small, tmp_path, name, data, says, capsys):
    if name:
        (tmp_path / name).write_bytes(data)
    assert main(["vectors", "check", str(small), str(tmp_path)]) == 3
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_answers_to_other_levels_only_end_with_three(few, small, tmp_path):
    own = [v for v in few if v.level == "merge"]
    target = put(tmp_path, answer(own, Linear()))
    wanted = ["vectors", "check", str(small), str(target)]
    assert main(wanted) == 0
    assert main([*wanted, "--level", "linear"]) == 3
    assert main([*wanted, "--level", "nothing"]) == 2


# ---- the consumers of the docs

RUN = {"py": [sys.executable], "mjs": ["node"]}
COMPILED = {"cpp": ["g++", "-std=c++17", "-O1"], "rs": ["rustc", "-O", "--edition", "2021"]}
CONSUMERS = {
    "consumer.py": ("alpha / (r**0.5 if use_rslora else r)", "alpha"),
    "plain.py": ("alpha / (r**0.5 if use_rslora else r)", "alpha"),
    "consumer.mjs": ("alpha / (use_rslora ? Math.sqrt(r) : r)", "alpha"),
    "consumer.cpp": ("alpha / (use_rslora ? std::sqrt(r) : r)", "alpha"),
    "consumer.rs": ("l.alpha / if l.use_rslora { r.sqrt() } else { r }", "l.alpha"),
}
NAN = {"py": 'float("nan")', "mjs": "NaN", "cpp": 'std::nan("")', "rs": "f64::NAN"}
WRITES_NONE = ("plain.py", "consumer.cpp", "consumer.rs")


def consume(script, *words):
    kind = script.suffix[1:]
    command = [*RUN.get(kind, ()), str(script)]
    if kind in COMPILED:
        command = [str(script.with_suffix(".run"))]
        subprocess.run([*COMPILED[kind], "-o", command[0], str(script)], check=True)
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True)


@pytest.mark.parametrize("name", others_slow(CONSUMERS, "plain.py"))
def test_a_consumer_judges_without_minilora_and_its_answers_hold(name, small, tmp_path, capsys):
    kind = name.rpartition(".")[2]
    if (tool := (RUN | COMPILED)[kind][0]) and not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    right, wrong = CONSUMERS[name]
    text = (DOCS / name).read_text()
    (tmp_path / f"right.{kind}").write_text(text)
    done = consume(tmp_path / f"right.{kind}", small, tmp_path / "answers")
    assert (done.returncode, done.stderr) == (0, "")
    spoiled = tmp_path / name
    assert right in text
    spoiled.write_text(text.replace(right, wrong))
    done_wrong = consume(spoiled, small, tmp_path / "wrong")
    assert done_wrong.returncode == 1
    assert done_wrong.stdout != done.stdout
    spoiled.write_text(text.replace(right, NAN[kind]))
    assert consume(spoiled, small).stdout.startswith("0 of ")
    if name not in WRITES_NONE:
        for answers, status in (("answers", 0), ("wrong", 1)):
            wanted = ["vectors", "check", str(small), str(tmp_path / answers)]
            assert main([*wanted, "--check", "linear.forward"]) == status
        assert "DIAGNOSIS  scale-alpha" in capsys.readouterr().out
