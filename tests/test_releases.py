import numpy as np
from releases import changed_since


def test_a_finding_is_pinned_to_the_release_that_it_was_seen_in():
    assert changed_since(f"Seen in numpy {np.__version__}.") == []
    assert changed_since("Seen in numpy 1.0.0.") == [f"numpy is {np.__version__}"]
    assert changed_since("No release at all.") == []
