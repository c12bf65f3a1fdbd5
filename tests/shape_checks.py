"""Run-time checks of the shapes that signatures promise, while tests run.

jaxtyping binds the names of dimensions over one call (`d_in` is one number in all arguments and in the result) and
beartype does the checking. Only array annotations are checked: mypy knows the rest, and fakes may stand in for
protocols. Importing this module turns the checks on for every module of `sae` that is imported after it.

A check costs more than a small training step, so each function is checked in its first calls of every test only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from beartype import BeartypeConf, beartype

ROOT = Path(__file__).resolve().parent.parent
ARRAY = re.compile(r"\b(Float|Int|Bool|UInt|Integer|Shaped|Num)(8|16|32|64)?\[")
CHECKED_CALLS = 10  # of a function, in one test
strictly = beartype(conf=BeartypeConf(is_pep484_tower=True))
jaxtyped = jaxtyping.jaxtyped
tests_begun = 0


def check_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its array annotations checked, the others taken out."""
    if isinstance(function, type):
        return function
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if _is_array(hint)}
    return strictly(function) if function.__annotations__ else function


def jaxtyped_at_first(*, typechecker: Any) -> Callable[[Any], Any]:
    """`jaxtyping.jaxtyped`, which the import hook puts on everything, for the first calls of what takes arrays."""

    def decorate(item: Any) -> Any:
        if isinstance(item, type):
            plain = item.__init__
            checked = jaxtyped(item, typechecker=typechecker)
            if checked.__init__ is not plain:  # a dataclass
                checked.__init__ = _at_first(checked.__init__, plain)
            return checked
        if not any(map(_is_array, getattr(item, "__annotations__", {}).values())):
            return item
        return _at_first(jaxtyped(item, typechecker=typechecker), item)

    return decorate


def _at_first(checked: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    if not callable(checked):  # a property or a class method
        return checked
    calls, test = 0, -1

    @wraps(plain)
    def call(*args: Any, **named: Any) -> Any:
        nonlocal calls, test
        if test != tests_begun:
            calls, test = 0, tests_begun
        calls += 1
        return (checked if calls <= CHECKED_CALLS else plain)(*args, **named)

    return call


def _is_array(hint: Any) -> bool:
    return bool(ARRAY.search(hint if isinstance(hint, str) else repr(hint)))


@pytest.fixture(autouse=True)
def check_shapes_again() -> None:
    """Every test has its own first calls."""
    global tests_begun
    tests_begun += 1


def checked_modules() -> list[str]:
    """All modules of `sae` but those that are compiled: numba and Triton read the source of functions themselves."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "sae").rglob("*.py"))]
    return [".".join(path.parts) for path in paths if not path.name.startswith(("cpu_loops", "triton_", "__"))]


jaxtyping.jaxtyped = jaxtyped_at_first
jaxtyping.install_import_hook(checked_modules(), "shape_checks.check_arrays")
