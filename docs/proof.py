"""The proof that the pages run: ``back`` against the derivative of ``f`` by a complex step."""

import numpy as np
from calculus import UNIT_ROUNDOFF, derivative


def by_name(given, arguments):
    """What ``back`` gave as {name: gradient}: by the arguments' order, or in a dict by name."""
    parts = given if isinstance(given, tuple) else (given,)
    named = [part for part in parts if isinstance(part, dict)]
    return dict(zip(arguments, parts[: len(parts) - len(named)], strict=False)) | dict(*named)


def prove(f, **arguments):
    """Assert that ``back`` is the derivative of ``f`` by its arguments; print how far it is off.

    Errors are relative to the greatest entry of all gradients, and the bound is n u. A sum of n
    products is off by at most n u times the sum of their moduli, in any order (Higham 2002, section
    3.1); u is the unit roundoff of float64, and n counts all numbers that go in and come out, more
    than any entry has terms. An entry whose terms cancel keeps their rounding, so its own size is
    no measure: the gradient of BERT's key bias is 0.
    """
    y, back = f(**arguments)
    dy = np.random.default_rng(1).standard_normal(np.shape(y))
    given = by_name(back(dy), arguments)
    wanted = derivative(lambda point: (dy * f(**point)[0]).sum(), arguments)
    assert given.keys() == wanted.keys(), f"gradients of {set(given)}, not of {set(wanted)}"
    assert all(given[name].shape == want.shape for name, want in wanted.items())

    scale = max(abs(want).max() for want in wanted.values())
    error = {name: abs(given[name] - want).max() / scale for name, want in wanted.items()}
    bound = (np.size(y) + sum(a.size for a in arguments.values())) * UNIT_ROUNDOFF
    worst = max(error, key=error.get)
    what = ", ".join(f"d{name}" for name in error) if len(error) < 5 else f"{len(error)} gradients"
    print(f"{what}: greatest relative error {error[worst]:.1e}, bound {bound:.1e}")
    assert error[worst] <= bound, f"d{worst} is not the derivative"
