"""What ``pytest --pyargs minilora.verify --minilora-implementation TARGET`` collects."""

import pytest

from minilora.verify.core.errors import UsageError
from minilora.verify.pytest_suite import OneCheck, check_tests, from_options


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each check and dtype."""
    implementation, options = from_options(metafunc.config)
    try:
        checks = list(check_tests(implementation, **options))
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None
    metafunc.parametrize(
        ("implementation", "check"), [pytest.param(implementation, c, id=c.id) for c in checks]
    )


def test_equations(implementation: object, check: OneCheck) -> None:
    """The check's own, in the report's words."""
    check(implementation)
