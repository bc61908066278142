"""What keeps functions that return functions safe; each guard with a case that it must catch."""

import ast
import inspect
import math
import re
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from calculus import GRADIENT, greatest, same_bits
from hypothesis import given, settings
from marks import examples
from number_systems import Rounded, every_erf, propagated, to_objects
from zoo import MODELS

import minilora as ml
from minilora import testing as draw
from minilora.spec import blocks, initialization, layers, lora, models, multi_adapter, ops, variants
from minilora.spec.variants import adalora, alora, dora, lora_bias, vera
from minilora.spec.variants import entry as variant_entry
from minilora.training import attention, chunked_head
from minilora.training.kernels import loss

VARIANTS = (lora_bias, dora, vera, adalora, alora)
CORE = (ops, lora, initialization, variant_entry, *VARIANTS, layers, blocks, models)
OTHERS = {
    multi_adapter.combine, attention.by_queries, attention.keys_outermost, chunked_head.head_loss
}  # fmt: skip
FEW = examples(3)
CONFIGS = [MODELS[name] for name in ("Qwen2", "GPT-2", "BERT")]


def bindings(function):
    """How often each name can be bound in one call: branches count once, a loop's body twice."""
    counts = dict.fromkeys((a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)), 1)

    def add(names, times=1):
        for name in names:
            counts[name] = counts.get(name, 0) + times

    def targets(node):
        """The names that a statement or an expression binds itself, its inner scopes apart."""
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            return [node.name]
        if isinstance(
            node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
        ):
            return []
        here = [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []
        return here + [name for child in ast.iter_child_nodes(node) for name in targets(child)]

    def visit(statements, times):
        for node in statements:
            if isinstance(node, ast.If):
                before = dict(counts)
                branches = []
                for branch in (node.body, node.orelse):
                    counts.clear()
                    counts.update(before)
                    visit(branch, times)
                    branches.append(dict(counts))
                for name in branches[0].keys() | branches[1].keys():
                    counts[name] = max(branch.get(name, 0) for branch in branches)
            elif isinstance(node, ast.For | ast.While | ast.With | ast.Try):
                times_inside = 2 * times if isinstance(node, ast.For | ast.While) else times
                if isinstance(node, ast.For):
                    add(targets(node.target), times_inside)
                for item in getattr(node, "items", ()):
                    add(targets(item), times)
                for part in ("body", "orelse", "finalbody"):
                    visit(getattr(node, part, ()), times_inside)
                for handler in getattr(node, "handlers", ()):
                    visit(handler.body, times_inside)
            else:
                add(targets(node), times)

    visit(function.body if isinstance(function.body, list) else [], 1)
    return counts


def captured_and_bound_again(source):
    """(function, inner function, name) of every captured name that is bound more than once."""
    functions = {
        (node.lineno, getattr(node, "name", "<lambda>")): node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.Lambda)
    }
    found = set()

    def visit(code):
        for inner in code.co_consts:
            if not isinstance(inner, types.CodeType):
                continue
            outer = functions.get((code.co_firstlineno, code.co_name))
            if outer is not None and (inner.co_firstlineno, inner.co_name) in functions:
                counts = bindings(outer)
                again = {n for n in inner.co_freevars if n in code.co_cellvars and counts[n] > 1}
                found.update((code.co_name, inner.co_name, name) for name in again)
            visit(inner)

    visit(compile(source, "source", "exec"))
    return found


@pytest.mark.parametrize("module", CORE, ids=lambda module: module.__name__)
def test_a_name_that_an_inner_function_uses_is_bound_once(module):
    source = Path(module.__file__).read_text()
    assert "def back" in source or module in (initialization, variant_entry, alora)
    assert captured_and_bound_again(source) == set()


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("y = x\n y = 2 * y\n back = lambda dy: dy * y", "y"),
        ("x = 2 * x\n def back(dy):\n  return dy * x", "x"),
        ("y = x\n def back(dy):\n  return dy * y\n y = 2 * x", "y"),
        ("y = x\n def back(dy):\n  return dy * y\n y += 1", "y"),
        ("for y in x:\n  def back(dy):\n   return dy * y", "y"),
        ("while x:\n  y = x.pop()\n back = lambda dy: [dy * y for _ in '12']", "y"),
        ("y = 1\n if x:\n  y = 2\n back = lambda dy: dy * y", "y"),
        ("(y, z) = x\n if x:\n  pass\n else:\n  (z, y) = x\n back = lambda dy: dy * y", "y"),
        ("with x as y:\n  y = 1\n back = lambda dy: dy * y", "y"),
    ],
)
def test_a_name_bound_again_is_caught(body, name):
    found = captured_and_bound_again(f"def f(x):\n {body}\n return x, back\n")
    assert {captured for _, _, captured in found} == {name}


@pytest.mark.parametrize(
    "body",
    [
        "if x:\n  y = 1\n else:\n  y = 2\n def back(dy):\n  return dy * y",
        "y = x\n z = [y for y in x]\n def back(dy):\n  y = dy\n  y = 2 * y\n  return y * z",
        "y = x\n x = 2 * x\n back = lambda dy, x=x: dy * y * x",
    ],
)
def test_names_of_branches_and_of_inner_scopes_are_bound_once(body):
    assert captured_and_bound_again(f"def f(x):\n {body}\n return x, back\n") == set()


def arrays_held(back, apart):
    """How many arrays a function can reach through what it has captured."""
    seen, waiting, arrays = set(), [back], 0
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or id(thing) in apart:
            continue
        seen.add(id(thing))
        arrays += isinstance(thing, np.ndarray)
        if isinstance(thing, types.FunctionType):
            waiting += [cell.cell_contents for cell in thing.__closure__ or ()]
        elif isinstance(thing, list | tuple):
            waiting += thing
    return arrays


@pytest.mark.parametrize("c", CONFIGS, ids=lambda c: type(c).__name__)
def test_a_models_back_holds_no_blocks_activations_once_it_has_run(c):
    held = []
    for depth in (1, 4):
        model = draw.draw_model(replace(c, layers=depth), np.random.default_rng(0), 1, 3)
        apart = {id(model.W), id(model.tuning), id(model.batch), *map(id, model.W.values())}
        _, back = loss(model.batch, model.W, model.config, model.tuning)
        before = arrays_held(back, apart)
        back(1.0)
        held.append((before, arrays_held(back, apart)))
    (before_1, after_1), (before_4, after_4) = held
    assert before_4 > before_1 + 3 * 10
    assert after_4 == after_1 < before_1


def on_a_grid(rng, like):
    """Multiples of 2⁻²⁰, whose sums are exact."""
    return np.round(rng.standard_normal(np.shape(like)) * 2**20) / 2**20


def as_rounded(arguments):
    return {name: to_objects(a, Rounded) for name, a in arguments.items()}


def departure_from_linearity(operation, rng):
    """|Σ v (back(a) + back(b) - back(a + b))| over the rounding that it may have, v random."""
    a, b = on_a_grid(rng, operation.dy), on_a_grid(rng, operation.dy)
    weights = {name: rng.standard_normal(v.shape) for name, v in operation.varying.items()}

    def departure(operation, convert):
        _, back = operation()
        one, two, both = (operation.gradients(back, convert(dy)) for dy in (a, b, a + b))
        return [(w * (one[k] + two[k] - both[k])).ravel() for k, w in weights.items()]

    found = np.concatenate(departure(operation, np.asarray)).astype(np.longdouble).sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "erf", every_erf)
        varying, constant = as_rounded(operation.varying), as_rounded(operation.constant)
        rounded = replace(operation, varying=varying, constant=constant)
        numbers = np.concatenate(departure(rounded, lambda dy: to_objects(dy, Rounded)))
    bound = propagated(numbers, np.ones(numbers.size))
    return float(abs(found) / bound) if bound else float(found != 0)


@pytest.mark.parametrize("name", draw.OPERATIONS)
@FEW
@given(drawn=draw.operations(), rng=draw.generators())
def test_every_back_is_linear(name, drawn, rng):
    assert departure_from_linearity(drawn[name], rng) <= 1


@pytest.mark.parametrize("name", draw.OPERATIONS)
@FEW
@given(drawn=draw.operations())
def test_no_back_drops_an_imaginary_part(name, drawn):
    """back(i dy) = i back(dy) though the arguments are real."""
    operation = drawn[name]
    _, back = operation()
    real = operation.gradients(back, operation.dy)
    turned = operation.gradients(back, 1j * operation.dy)
    for name, g in real.items():
        assert turned[name].shape == g.shape
        assert greatest(turned[name] - 1j * g) <= GRADIENT * max(
            greatest(g), greatest(operation.dy)
        )


@pytest.mark.parametrize("name", draw.OPERATIONS)
@FEW
@given(drawn=draw.operations(), rng=draw.generators())
def test_every_back_is_pure(name, drawn, rng):
    is_pure(drawn[name], rng)


def is_pure(operation, rng):
    """The same bits however often it runs and whatever ran between; no argument is changed."""
    taken = (*operation.varying.values(), *operation.constant.values(), operation.dy)
    arrays = [a for a in taken if isinstance(a, np.ndarray)]
    before = [a.copy() for a in arrays]
    y, back = operation()
    value = np.array(y)
    once = {k: np.array(g) for k, g in operation.gradients(back, operation.dy).items()}
    operation.gradients(back, on_a_grid(rng, operation.dy))
    twice = operation.gradients(back, operation.dy)
    again, _ = operation()
    assert all(same_bits(once[k], twice[k]) for k in once)
    assert same_bits(value, y)
    assert same_bits(value, again)
    assert all(same_bits(a, b) for a, b in zip(arrays, before, strict=True))


def in_place(x):
    y = np.tanh(x)

    def back(dy):
        dy *= 1 - y * y
        return dy

    return y, back


def with_memory(x):
    y, runs = np.tanh(x), []

    def back(dy):
        runs.append(dy)
        return (1 - y * y) * dy * len(runs)

    return y, back


def bent(x):
    y = np.tanh(x)
    return y, lambda dy: (1 - y * y) * np.tanh(dy)


def test_a_back_with_side_effects_or_a_bend_is_caught():
    rng = np.random.default_rng(0)
    operation = draw.draw_operations(rng, 2, 3, 4, 1, 5)["tanh"]
    for wrong in (in_place, with_memory):
        with pytest.raises(AssertionError):
            is_pure(replace(operation, f=wrong), rng)
    assert departure_from_linearity(replace(operation, f=np_only(bent)), rng) > 1


def np_only(f):
    """f over float64 whatever comes in: numbers of other kinds are for their bound alone."""
    return lambda x: (f if x.dtype == np.float64 else ops.tanh)(x)


def cast(arguments, dtype):
    return {
        name: a.astype(dtype) if getattr(a, "dtype", None) == np.float64 else a
        for name, a in arguments.items()
    }


def dtypes_of(operation, dtype):
    varying = cast(operation.varying, dtype)
    narrow = replace(operation, varying=varying, constant=cast(operation.constant, dtype))
    y, back = narrow()
    gradients = narrow.gradients(back, operation.dy.astype(dtype) if operation.dy.ndim else 1.0)
    return {np.asarray(v).dtype for v in (y, *gradients.values())}


DTYPES = [np.float32, np.longdouble, np.complex64, np.complex128]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", draw.OPERATIONS)
def test_every_operation_keeps_the_dtype(name, dtype, monkeypatch):
    if dtype is np.longdouble:
        monkeypatch.setattr(ops, "erf", every_erf)
    drawn = draw.draw_operations(np.random.default_rng(0), 2, 3, 4, 1, 5)
    assert dtypes_of(drawn[name], dtype) == {np.dtype(dtype)}


def test_an_operation_that_widens_is_caught():
    drawn = draw.draw_operations(np.random.default_rng(0), 2, 3, 4, 1, 5)["tanh"]
    widens = replace(drawn, f=lambda x: (np.tanh(x) / np.sqrt(64), lambda dy: dy * 0.125))
    assert dtypes_of(widens, np.float32) == {np.dtype(np.float32), np.dtype(np.float64)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", CONFIGS, ids=lambda c: type(c).__name__)
def test_every_model_keeps_the_dtype(c, dtype, monkeypatch):
    if dtype is np.longdouble:
        monkeypatch.setattr(ops, "erf", every_erf)
    model = draw.draw_model(c, np.random.default_rng(0), train_base=True)
    tuning = replace(model.tuning, dropout_scale=cast(model.tuning.dropout_scale, dtype))
    L, back = replace(model, W=cast(model.W, dtype), tuning=tuning).loss()
    assert {L.dtype, *(g.dtype for g in back(1.0).values())} == {np.dtype(dtype)}


ITEM = re.compile(r"([^\s(){},]+) \(([^)]*)\)")


def shape_lines(docstring):
    """The alternatives of a ``Shapes:`` line, each as (name, dimensions) before and after ->."""
    line = re.search(r"Shapes: (.*?)\.?(\n *(?=\n|[A-Z]\w*:)|\s*$)", docstring, re.S)[1]
    sides = [alternative.split("->") for alternative in line.split(", or ")]
    return [
        [
            [
                (name, [d.strip() for d in dims.split(",") if d.strip()])
                for name, dims in ITEM.findall(side)
            ]
            for side in pair
        ]
        for pair in sides
    ]


def size_of(dimension, sizes):
    """The value of a dimension: 3, t, h*d, d/2, r+q or Σ rᵢ; None if a size is not known yet."""
    if dimension.startswith("Σ "):
        return sum(v for name, v in sizes.items() if re.fullmatch(dimension[2:] + r"\d+", name))
    if "+" in dimension:
        terms = [size_of(term, sizes) for term in dimension.split("+")]
        return None if None in terms else sum(terms)
    if "/" in dimension:
        whole, parts = dimension.split("/")
        known = size_of(whole, sizes), size_of(parts, sizes)
        return None if None in known else known[0] // known[1]
    factors = [int(f) if f.isdigit() else sizes.get(f) for f in dimension.split("*")]
    return None if None in factors else math.prod(factors)


def match(items, arrays, sizes):
    """Bind the sizes that the arrays show, and compare all others."""
    waiting = []
    for name, dims in items:
        several = arrays[name] if name.endswith("ᵢ") else [arrays[name]]
        for i, array in enumerate(several):
            own = [d.replace("ᵢ", f"ᵢ{i}") if "Σ" not in d else d for d in dims]
            shape = np.shape(array)
            if own and own[-1] == "…":  # any number of axes more
                shape, own = shape[: len(own) - 1], own[:-1]
            assert array is None or len(own) == len(shape), f"{name}: {own}, {np.shape(array)}"
            waiting += [] if array is None else zip(own, shape, strict=True)
    waiting.sort(key=lambda pair: len(re.split(r"[*/ ]", pair[0])))
    for dimension, found in waiting:
        if size_of(dimension, sizes) is None:
            unknown = [f for f in re.split(r"[*/]", dimension) if size_of(f, sizes) is None]
            assert len(unknown) == 1, f"{dimension} = {found}: which {unknown}?"
            known = size_of(dimension, sizes | {unknown[0]: 1}) if "*" in dimension else 1
            assert "/" not in dimension
            assert found % known == 0, f"{dimension} = {found}, and {known} divides it"
            sizes[unknown[0]] = found // known
        assert size_of(dimension, sizes) == found, f"{dimension} = {found} with {sizes}"


def check_shapes(docstring, arguments, results):
    """The results' sizes are what the line says they are, given the arguments."""
    failures = []
    for before, after in shape_lines(docstring):
        numbers = {k: v for k, v in arguments.items() if isinstance(v, int)}
        try:
            match(before, arguments, numbers)
            assert len(after) == len(results)
            match(after, dict(zip((n for n, _ in after), results, strict=True)), numbers)
        except (AssertionError, KeyError) as failure:
            failures.append(failure)
        else:
            return
    raise AssertionError(failures)


def calls(rng, sizes, model):
    """(function, arguments by name, results) for every function with a ``Shapes:`` line."""
    b, m, n, r, t = sizes

    def normal(*shape):
        return rng.standard_normal(shape)

    for operation in draw.draw_operations(rng, *sizes).values():
        y, back = operation()
        absent = dict.fromkeys(inspect.signature(operation.f).parameters)
        yield operation.f, absent | operation.varying | operation.constant, (y,)
        for name, g in operation.gradients(back, operation.dy).items():
            assert g.shape == operation.varying[name].shape
    positions, real = rng.integers(0, 9, (b, t)), rng.random((b, t)) < 0.5
    tables = ops.rope_tables(positions, 2 * n, 100.0, np.float64)
    yield ops.rope_tables, {"positions": positions, "d": 2 * n}, tables
    x = normal(r * n, b * t)
    heads = ops.split_heads(x, b, r)
    yield ops.split_heads, {"x": x, "b": b, "h": r}, (heads,)
    yield ops.join_heads, {"x": heads}, (ops.join_heads(heads),)
    for f in (ops.causal_mask, ops.padding_mask):
        yield f, {"real": real}, (f(real),)

    given = {"q": normal(b, 2 * r, n, t), "k": normal(b, r, n, m), "v": normal(b, r, n, m)}
    given["mask"] = np.ones((b, m, t), bool)
    o, _ = attention.by_queries(ops.attention, **given)
    yield attention.by_queries, given, (o,)
    groups = {"Kt": normal(b, r, 1, m, n), "Q": normal(b, r, 3, n, t)}
    yield attention.keys_outermost, groups, (attention.keys_outermost(**groups),)

    yield ops.outer, {"a": normal(m, t), "b": normal(n, t)}, (normal(m, t) @ normal(n, t).T,)
    yield (
        blocks.embed,
        {"ids": np.arange(t), "d": n},
        (blocks.embed(np.arange(t), "e", {"e.weight": normal(t, n)}, ml.TrainableSpec())[0],),
    )

    x = normal(n, t)
    yield ops.erf, {"x": x}, (ops.erf(x),)

    W, A, B = normal(m, n), normal(r, n), normal(m, r)
    merged = lora.merge_weight(W, A, B, 2.0)
    yield lora.merge_weight, {"W": W, "A": A, "B": B, "s": 2.0}, (merged,)
    ranks = [r, r + 2, 1]
    As, Bs = [normal(k, n) for k in ranks], [normal(m, k) for k in ranks]
    both = multi_adapter.combine([(A, B, 1.0) for A, B in zip(As, Bs, strict=True)], [1, 2, 3])
    yield multi_adapter.combine, {"Aᵢ": As, "Bᵢ": Bs}, both
    Bs = [normal(m + k, k) for k in ranks]
    yield layers.fuse, {"Aᵢ": As, "Bᵢ": Bs}, layers.fuse(list(zip(As, Bs, strict=True)))
    projected, _ = lora.project(x, "p", {"p.weight": W}, ml.TrainableSpec())
    yield lora.project, {"x": x, "m": m}, (projected,)
    factors = initialization.draw_factors(rng, "kaiming", r, m, n)
    yield initialization.draw_factors, {"r": r, "m": m, "n": n}, factors
    K = initialization.draw_dropout(rng, 0.1, {"p": (n, t)}, float)["p"]
    yield initialization.draw_dropout, {"name:": x}, (K,)

    yield from calls_of_variants(rng, sizes)
    yield from calls_of_layers(rng, sizes)

    c, batch = model.config, model.batch
    b, t = batch.ids.shape
    x = normal(c.d, b * t)
    arguments = {
        "x": x,
        "d": c.d,
        "b": b,
        "t": t,
        "v": c.vocab,
        "classes": getattr(c, "classes", 0),
    }
    common = x, "layers.0.", model.W, c, model.tuning
    if isinstance(c, ml.Llama):
        tables = ops.rope_tables(batch.position_ids, c.head_dim, c.theta, float)
        mask = ops.causal_mask(batch.real)
        block, forward = blocks.llama_block, models.llama
        y, back = block(*common, tables, mask, ops.attention)
    else:
        mask = (ops.causal_mask if c.causal else ops.padding_mask)(batch.real)
        block = blocks.gpt2_block if c.causal else blocks.bert_block
        forward = models.gpt2 if c.causal else models.bert
        y, back = block(*common, mask, ops.attention)
    assert back(normal(*y.shape))[0].shape == x.shape
    yield block, arguments | {"mask": mask}, (y,)
    yield blocks.stack, arguments, (blocks.stack(x, 2, lambda x, at: (x, None))[0],)
    z, _ = forward(batch, model.W, c, model.tuning)
    yield forward, arguments | {"ids": batch.ids}, (z,)
    z, _ = models.logits(batch, model.W, c, model.tuning)
    yield models.logits, arguments | {"ids": batch.ids}, (z,)
    yield (
        models.shifted_labels,
        arguments | {"labels": batch.labels},
        (models.shifted_labels(batch, c),),
    )
    yield models.loss, arguments, (model.loss()[0],)
    labels = models.shifted_labels(batch, c)
    given = {"x": normal(c.d, labels.size), "labels": labels}
    L, _ = chunked_head.head_loss(
        given["x"], "head", model.W, replace(model.tuning, dropout_scale={}), labels
    )
    yield chunked_head.head_loss, given, (L,)


def calls_of_variants(rng, sizes):
    """The merges, the starts and what else is no linear."""
    b, m, n, r, t = sizes
    W, bias = rng.standard_normal((m, n)), rng.standard_normal((m, 1))
    for variant in {entry.variant for entry in variants.REGISTRY.values()} - {lora.LORA}:
        shapes = variants.part_shapes(variant, r, m, n)
        P = {part: rng.standard_normal(shape) for part, shape in shapes.items()}
        given = {"W": W, "b": bias} | P | {"s": 2.0}
        yield variant.merge, given, variant.merge(**given)
        base, fresh = variants.start(variant, "kaiming", rng, W, r, 2.0)
        assert [p.shape for p in fresh] == list(shapes.values())
        yield variants.start, {"W": W, "r": r, "s": 2.0}, (base,)
        given = {"W": W, "A": P["A"], "B": P["B"], "s": 2.0}
        variants.fresh_parts(variant, **given)
        yield variants.fresh_parts, given, ()
    norms = {"magnitude": rng.standard_normal((m, 1)), "v": rng.random((m, 1))}
    rescaled = dora.rescaled_rows(W, **norms)
    yield dora.rescaled_rows, {"V": W} | norms, (rescaled,)
    ids, tokens = rng.integers(0, 2, (b, t)), rng.integers(0, 2, r)
    yield (
        variants.invocation,
        {"ids": ids, "tokens": tokens},
        (variants.invocation(ids, tokens),),
    )

    k = min(m, n)
    given = {"W": W, "r": k, "s": 2.0}
    yield initialization.pissa, given, initialization.pissa(W, k, 2.0)
    yield initialization.olora, given, initialization.olora(W, k, 2.0)
    yield initialization.loftq, given, initialization.loftq(W, k, 2.0, np.round)
    sizes = {"r": 2 * r, "m": m, "n": n}
    yield initialization.orthogonal, sizes, initialization.orthogonal(rng, 2 * r, m, n)
    A, B = initialization.draw_vera(rng, r, m + 1, n + 2)
    yield initialization.draw_vera, {"r": r, "m": m + 1, "n": n + 2}, (A, B)
    yield (
        initialization.shared_part,
        {"A": A, "B": B, "m": m, "n": n},
        initialization.shared_part(A, B, m, n),
    )
    A0, B0 = rng.standard_normal((t, n + 2)), rng.standard_normal((m + 1, t))
    given = {"A": A, "B": B, "A0": A0, "B0": B0}
    yield initialization.convert_to_lora, given, initialization.convert_to_lora(**given)


def calls_of_layers(rng, sizes):
    b, m, n, r, t = sizes

    def normal(*shape):
        return rng.standard_normal(shape)

    W, bias, A, B, x, K = (
        normal(*shape) for shape in ((m, n), (m, 1), (r, n), (m, r), (n, t), (n, t))
    )
    f = lora.lora_linear
    ids = rng.integers(0, n, t)
    y, _ = layers.adapted_embedding(f, ids, W.T, (A, B), 2.0)
    yield layers.adapted_embedding, {"ids": ids, "E": W.T}, (y,)

    fused = {"x": x, "W": np.concatenate([W, W]), "b": np.concatenate([bias, bias]), "K": K}
    y, back = layers.adapted_fused(f, P=((A, B), None), rows=(m, m), s=2.0, **fused)
    assert back(y)[0].shape == x.shape
    yield layers.adapted_fused, fused, (y,)

    P, index = (np.stack([A, A, A]), np.stack([B, B, B])), rng.integers(0, 3, t)
    experts = {"x": x, "W": np.stack([W, W, W]), "b": np.stack([bias] * 3), "index": index}
    y, back = layers.adapted_experts(f, P=P, s=2.0, **experts)
    assert [d.shape for d in back(y)] == [x.shape, *(p.shape for p in P)]
    yield layers.adapted_experts, experts, (y,)

    moves = layers.Geometry((2, 1), (2, 1), ((1, 0), (0, 1)), (3, 1))
    x = normal(2 * n, b, 5, t)
    kernels = {"x": x, "W": normal(2 * m, n, 2, 1), "b": normal(2 * m, 1), "groups": 2}
    P = normal(2 * r, 4 * n), normal(2 * m, r)
    y, back = layers.adapted_conv(f, P=P, s=2.0, K=None, geometry=moves, **kernels)
    assert [d.shape for d in back(y)] == [x.shape, *(p.shape for p in P)]
    yield layers.adapted_conv, kernels | {"c": 2 * n}, (y,)
    given = {name: kernels[name] for name in ("W", "b", "groups")}
    merged = layers.merge_conv(lora.LORA, P=P, s=2.0, **given)
    yield layers.merge_conv, given | {"c": 2 * n}, merged
    yield lora.twin, {"A": A, "B": B}, lora.twin(A, B)


def functions_with_shapes():
    return {
        f
        for module in CORE
        for f in vars(module).values()
        if inspect.isfunction(f)
        and f.__module__ == module.__name__
        and "Shapes:" in (f.__doc__ or "")
    }


@settings(max_examples=15)
@given(rng=draw.generators(), sizes=draw.sizes(5, greatest=5), model=draw.model_cases())
def test_every_shapes_line_is_true(rng, sizes, model):
    for f, arguments, results in calls(rng, sizes, model):
        check_shapes(f.__doc__, arguments, results)


def test_every_shapes_line_is_tested_and_names_its_functions_arguments():
    rng = np.random.default_rng(0)
    tested = {
        f for c in CONFIGS for f, _, _ in calls(rng, (2, 3, 4, 1, 5), draw.draw_model(c, rng))
    }
    assert tested == functions_with_shapes() | OTHERS
    for f in tested - {
        multi_adapter.combine,
        layers.fuse,
        initialization.draw_dropout,
    }:  # of each one of several
        if f.__module__ not in (blocks.__name__, models.__name__):
            before = {name for alternative in shape_lines(f.__doc__) for name, _ in alternative[0]}
            assert before <= inspect.signature(f).parameters.keys()


def test_every_operation_has_a_shapes_line():
    public = {
        f
        for name, f in vars(ops).items()
        if inspect.isfunction(f) and f.__module__ == ops.__name__ and not name.startswith("_")
    }
    assert public - {ops.python_scalar} <= functions_with_shapes()


@pytest.mark.parametrize(
    "line",
    [
        "x (n, t), W (m, n) -> y (t, m).",
        "x (n, t), W (m, n) -> y (m, t, 1).",
        "x (n, n), W (m, n) -> y (m, t).",
        "x (n, t), W (n, m) -> y (m, t).",
        "x (n, t), W (m, n) -> y (m*t, n).",
        "x (n, t), W (m, n) -> y (m, t), z (m, t).",
        "x (n, t), W (m, n), V (m, n) -> y (m, t).",
        "x (n, t), W (m/2, n) -> y (m, t).",
        "x (n, 3), W (m, n) -> y (m, 3).",
    ],
)
def test_a_wrong_shapes_line_is_caught(line):
    x, W = np.ones((2, 5)), np.ones((4, 2))
    check_shapes("Shapes: x (n, t), W (m, n) -> y (m, t).", {"x": x, "W": W}, (W @ x,))
    with pytest.raises(AssertionError):
        check_shapes(f"Shapes: {line}", {"x": x, "W": W}, (W @ x,))


def test_a_shapes_line_may_run_on_and_end_in_any_axes():
    x, W, y = np.ones((2, 5, 6)), np.ones((8, 1)), np.ones((7, 5, 6))
    given = {"x": x, "W": W, "groups": 2}
    right = "Shapes: x (c, b, …), W (m, c/groups) ->\n    y (q+b, b, …).\nErrors: none."
    check_shapes(right, given | {"q": 2}, (y,))
    wrongs = ("(q+b+b, b, …)", "(q+b, …, b)", "(b, q+b, …)", "(q+b, b)")
    for wrong in wrongs:
        with pytest.raises(AssertionError):
            check_shapes(right.replace("(q+b, b, …)", wrong), given | {"q": 2}, (y,))
    with pytest.raises(AssertionError):
        check_shapes(right, given | {"q": 2, "groups": 1}, (y,))
