"""Small errors put into the source, one at a time, and the tests that see them.

``python source_mutants.py ops lora`` prints, as JSON, the mutants of these modules of the
specification that no test notices. A mutant changes one place in one function; its code takes the
place of the function's own, so that every module that has imported the function runs it. The
tests are those of the specification, without the peers; each mutant meets those that call it.
"""

import ast
import importlib
import inspect
import json
import os
import sys
import time
import types
import warnings
from pathlib import Path

import pytest

FILES = (
    "spec/test_ops",
    "spec/test_lora",
    "spec/test_initialization",
    "spec/test_variants",
    "spec/test_layers",
    "verify/test_laws",
    "spec/test_target_modules",
    "spec/test_optim",
    "spec/test_models",
    "spec/test_guards",
    "training/test_attention",
    "training/test_checkpointing",
    "training/test_chunked_head",
    "training/test_fused_adamw",
    "training/test_gradients",
    "training/test_kernels",
    "io/test_lazy_weights",
    "training/test_generate",
)
SLOW = (
    *("allows", "entry_by_entry", "twelfth_digit", "beyond_rounding", "quotients", "is_linear"),
    "peft",
    "test_formats_variants",
)
"""Parts of the names of tests that take long, or a peer; what they see is seen by others too."""

OTHER = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
NAMES = {
    "sum": "mean", "mean": "sum", "max": "min", "min": "max", "any": "all", "all": "any",
    "cos": "sin", "sin": "cos", "minimum": "maximum", "triu": "tril", "zeros": "ones",
    "zeros_like": "ones_like",
}  # fmt: skip

COMMUTATIVE = {
    "min", "max", "np.minimum", "np.result_type", "np.array_equal", "total",
}  # fmt: skip
"""Functions whose arguments are not exchanged, since their order is no matter."""


def variants(node):
    """What may stand in place of a node."""
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.MatMult):
            yield ast.BinOp(node.right, node.op, node.left)
        elif type(node.op) in OTHER:
            yield ast.BinOp(node.left, OTHER[type(node.op)](), node.right)
        if isinstance(node.op, ast.Sub | ast.Div | ast.Pow):
            yield node.left
        if isinstance(node.op, ast.Add | ast.Mult | ast.BitAnd | ast.BitOr):
            yield node.left
            yield node.right
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value)
        elif isinstance(node.value, int):
            yield ast.Constant(node.value + 1)
            if node.value:
                yield ast.Constant(node.value - 1)
        elif isinstance(node.value, float):
            yield ast.Constant(node.value * 1.001 if node.value else 1e-3)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
        yield ast.Compare(node.left, [OTHER[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(OTHER[type(node.op)](), node.values)
        yield from node.values
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        if node.attr in ("T", "mT", "real"):
            yield node.value
        if node.attr in NAMES:
            yield ast.Attribute(node.value, NAMES[node.attr], node.ctx)
    elif isinstance(node, ast.Call):
        commutes = ast.unparse(node.func) in COMMUTATIVE
        for i in range(0 if commutes else len(node.args) - 1):
            swapped = [*node.args[:i], node.args[i + 1], node.args[i], *node.args[i + 2 :]]
            yield ast.Call(node.func, swapped, node.keywords)
        for keyword in node.keywords:
            kept = [k for k in node.keywords if k is not keyword]
            yield ast.Call(node.func, node.args, kept)
        if isinstance(node.func, ast.Name) and node.func.id in NAMES:
            name = ast.Name(NAMES[node.func.id], ast.Load())
            yield ast.Call(name, node.args, node.keywords)
    elif isinstance(node, ast.Tuple | ast.List) and isinstance(node.ctx, ast.Load):
        for i in range(len(node.elts) - 1):
            swapped = [*node.elts[:i], node.elts[i + 1], node.elts[i], *node.elts[i + 2 :]]
            yield type(node)(swapped, node.ctx)
    elif isinstance(node, ast.If):
        yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif (
        (isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant))
        or (isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name))
        or isinstance(node, ast.AugAssign)
    ):
        yield ast.Pass()


def places(node):
    """Every node below that may be mutated, as (parent, field, index); messages are left alone."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "exc", "type_comment"):
            continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.AST):
                yield node, name, i if isinstance(value, list) else None
                yield from places(child)


def functions(tree):
    """(qualified name, node) of the module's functions and of its classes' methods."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            inner = (f for f in node.body if isinstance(f, ast.FunctionDef))
            yield from ((f"{node.name}.{f.name}", f) for f in inner)


def mutants(source):
    """(function, description, the module's tree with one place changed until the next is drawn)."""
    tree = ast.parse(source)
    seen = {}
    for qualname, function in functions(tree):
        for parent, field, i in places(function):
            value = getattr(parent, field)
            node = value if i is None else value[i]
            for variant in variants(node):
                before, after = (ast.unparse(n).split("\n")[0] for n in (node, variant))
                if before == after:
                    continue
                key = f"{qualname}: {before} -> {after}"
                seen[key] = seen.get(key, 0) + 1
                if seen[key] > 1:
                    key += f" ({seen[key]})"
                put(parent, field, i, ast.fix_missing_locations(ast.copy_location(variant, node)))
                yield qualname, key, tree
                put(parent, field, i, node)


def put(parent, field, i, node):
    if i is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[i] = node


def code_of(tree, function):
    """The function's code in the mutated module."""
    waiting = [compile(tree, "mutant", "exec")]
    while waiting:
        code = waiting.pop()
        if code.co_qualname == function.__qualname__:
            return code
        waiting += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    raise LookupError(function.__qualname__)


class Mutator:
    """A pytest plugin that, instead of running the tests once, runs them on every mutant."""

    def __init__(self, names):
        self.names, self.results = names, {}

    def pytest_collection(self):
        from hypothesis import Phase, settings  # pytest wants to be the first to import its plugins

        settings.register_profile(
            "mutants", derandomize=True, database=None, deadline=None, phases=[Phase.generate]
        )
        settings.load_profile("mutants")

    def pytest_runtestloop(self, session):
        modules = {name: module_of(name) for name in self.names}
        sources = {name: Path(module.__file__).read_text() for name, module in modules.items()}
        found = {
            (name, qualname): function_of(modules[name], qualname)
            for name, source in sources.items()
            for qualname, _ in functions(ast.parse(source))
        }
        covering = tests_of(found.values(), session.items)
        for name, source in sources.items():
            count, survivors = 0, []
            for qualname, key, tree in mutants(source):
                function = found[name, qualname]
                count += 1
                if not killed(function, tree, covering[function]):
                    survivors.append(key)
            self.results[name] = {"count": count, "survivors": survivors}
        return True


def module_of(name):
    """The module of that name in spec, or with a package's name before it, in that package."""
    return importlib.import_module(f"minilora.{name}" if "." in name else f"minilora.spec.{name}")


CACHES = []
"""What empties the caches of the functions that have one."""


def function_of(module, qualname):
    thing = module
    for part in qualname.split("."):
        thing = vars(thing)[part]
    if hasattr(thing, "cache_clear"):
        CACHES.append(thing.cache_clear)
    return inspect.unwrap(thing.fget if isinstance(thing, property) else thing)


def tests_of(found, items):
    """The tests that call each function: first those that bear its name, then the quickest."""
    codes = {function.__code__: function for function in found}
    covering = {function: [] for function in found}
    for item in items:
        called = set()

        def profile(frame, event, argument, called=called):
            if event == "call" and frame.f_code in codes:
                called.add(codes[frame.f_code])

        start = time.perf_counter()
        sys.setprofile(profile)
        try:
            passes = run(item)
        finally:
            sys.setprofile(None)
        assert passes, f"{item.nodeid} fails without any mutant"
        seconds = time.perf_counter() - start
        for function in called:
            other = function.__name__ not in item.nodeid
            covering[function].append((other, seconds, item.nodeid, item))
    return {function: [item for *_, item in sorted(tests)] for function, tests in covering.items()}


def killed(function, tree, items):
    """Whether a test fails while the mutated code stands in the place of the function's own."""
    node = dict(functions(tree))[function.__qualname__]
    code = code_of(tree, function)
    if code.co_freevars != function.__code__.co_freevars:
        return True  # the call of super is gone, and with it what a class's function must have
    defaults = [ast.fix_missing_locations(ast.Expression(d)) for d in node.args.defaults]
    values = [eval(compile(d, "default", "eval"), function.__globals__) for d in defaults]
    kept = function.__code__, function.__defaults__
    function.__code__, function.__defaults__ = code, tuple(values)
    try:
        return not all(run(item) for item in items)
    finally:
        function.__code__, function.__defaults__ = kept


def run(item):
    """Whether the test passes."""
    for clear in CACHES:  # what another mutant has left there
        clear()
    item._initrequest()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            item.session._setupstate.setup(item)
            item.runtest()
    except KeyboardInterrupt:
        raise
    except BaseException:  # pytest's own failures are no Exceptions
        return False
    finally:
        item.session._setupstate.teardown_exact(None)
    return True


if __name__ == "__main__":
    os.environ["MINILORA_TEST_EFFORT"] = "2"
    mutator = Mutator(sys.argv[1:])
    files = [str(Path(__file__).parent / f"{name}.py") for name in FILES]
    options = ["-q", "-n0", "-p", "no:cacheprovider", "-k", f"not ({' or '.join(SLOW)})"]
    status = pytest.main([*options, *files], plugins=[mutator])
    print(json.dumps(mutator.results))
    raise SystemExit(status)
