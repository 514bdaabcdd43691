"""What the tests under Accelerate, Lightning and Transformers share."""

import inspect
from dataclasses import replace

import pytest
import torch
import zoo

import prodigy


def lively(case):
    """The case with a d0, or a first phase, at which eight steps are more than rounding errors."""
    if case.name == "ScheduleFreeWrapper-prodigy.Prodigy":
        return zoo.wrapper_case("prodigy.Prodigy", prodigy.Prodigy, None, {"d0": 0.01})
    if case.cls is prodigy.RAdamScheduleFree:
        return replace(case, kwargs={**case.kwargs, "silent_sgd_phase": False, "lr": 0.1})
    if "d0" in inspect.signature(case.cls).parameters:
        return replace(case, kwargs={**case.kwargs, "d0": 0.01})
    return case


METHODS = [lively(case) for case in zoo.METHODS]
FREE = [case for case in METHODS if case.schedule_free]
every_method = pytest.mark.parametrize("case", METHODS, ids=str)
every_free_method = pytest.mark.parametrize("case", FREE, ids=str)


def values(module):
    """{name: a copy of the parameter}."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def average(module, optimizer):
    """{name: x}: what ``eval()`` would put into the parameters."""
    with optimizer.averaged():
        return values(module)


def assert_equal(a, b):
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_apart(a, b):
    """In every parameter."""
    assert a.keys() == b.keys()
    for name in a:
        assert not torch.equal(a[name], b[name]), name
