"""The proof that the pages run: ``back`` against the derivative of ``f`` by a complex step."""

import numpy as np
from calculus import STEP, UNIT_ROUNDOFF, derivative


def by_name(given, arguments):
    """What ``back`` gave as {name: gradient}: by the arguments' order, or in a dict by name."""
    parts = given if isinstance(given, tuple) else (given,)
    named = [part for part in parts if isinstance(part, dict)]
    return dict(zip(arguments, parts[: len(parts) - len(named)], strict=False)) | dict(*named)


def prove(f, **arguments):
    """Assert that ``back`` is the derivative of ``f`` by its arguments; print how far it is off.

    A sum of n products is off by at most n u times the sum of their moduli, in any order (Higham
    2002, section 3.1); u is the unit roundoff of float64, and n counts all numbers that go in and
    come out, more than any entry has terms. So the bound is n u, and errors are relative to a sum
    of moduli: that of dyᵢ ∂yᵢ/∂x over i, for the entry x of all arguments where it is greatest. The
    gradients are no measure, since terms may cancel, and their rounding stays.
    """
    y, back = f(**arguments)
    dy = np.random.default_rng(1).standard_normal(np.shape(y))
    given = by_name(back(dy), arguments)
    moduli = []

    def along(point):
        terms = dy * f(**point)[0]
        moduli.append(abs(terms.imag).sum() / STEP)
        return terms.sum()

    wanted = derivative(along, arguments)
    assert given.keys() == wanted.keys(), f"gradients of {set(given)}, not of {set(wanted)}"
    assert all(given[name].shape == want.shape for name, want in wanted.items())

    error = {name: abs(given[name] - want).max() / max(moduli) for name, want in wanted.items()}
    bound = (np.size(y) + sum(a.size for a in arguments.values())) * UNIT_ROUNDOFF
    worst = max(error, key=error.get)
    what = ", ".join(f"d{name}" for name in error) if len(error) < 5 else f"{len(error)} gradients"
    print(f"{what}: greatest relative error {error[worst]:.1e}, bound {bound:.1e}")
    assert error[worst] <= bound, f"d{worst} is not the derivative"
