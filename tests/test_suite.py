"""Assumptions of the test suite."""

import pytest


@pytest.mark.xdist_group("groups")
def test_tests_of_a_group_go_to_one_worker(request):
    """pytest 9.2 ignores how xdist 3.8 marks them: each worker then rebuilds every shared fixture."""
    if not request.config.getoption("loadgroup", default=False):
        pytest.skip("not run by xdist with --dist loadgroup")
    assert request.node.nodeid.endswith("@groups")
