from __future__ import annotations

import math

import pytest

from flowception import errors


def test_one_except_clause_catches_every_error():
    raised = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(raised) >= 8
    assert all(issubclass(error, errors.FlowceptionError) for error in raised)


def test_require_returns_the_module():
    assert errors.require("math") is math


def test_require_names_the_extra_to_install():
    with pytest.raises(errors.MissingDependencyError, match=r"pip install 'flowception\[flash\]'"):
        errors.require("no_such_package.part", extra="flash")


def test_require_names_the_package_where_there_is_no_extra():
    with pytest.raises(errors.MissingDependencyError, match="pip install no-such-package"):
        errors.require("no_such_package.part")
