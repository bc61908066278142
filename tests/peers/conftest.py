"""What a finding's test does in another release than its own."""

import pytest
from releases import changed_since


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    try:
        return (yield)
    except (Exception, pytest.fail.Exception) as error:
        if pyfuncitem.path.name == "test_findings.py":
            changed = changed_since(pyfuncitem.function.__doc__)
            if changed:
                pytest.xfail(f"no longer so: {'; '.join(changed)}; {error}")
        raise
