"""Run-time checks of the shapes that signatures promise, while tests run.

jaxtyping binds the names of dimensions over one call (`d_in` is one number in all arguments and in the result) and
beartype does the checking. Only array annotations are checked: mypy knows the rest, and fakes may stand in for
protocols. Importing this module turns the checks on for every module of `sae` that is imported after it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parent.parent
ARRAY = re.compile(r"\b(Float|Int|Bool|UInt|Integer|Shaped|Num)(8|16|32|64)?\[")
strictly = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its array annotations checked, the others taken out."""
    if isinstance(function, type):
        return function
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if ARRAY.search(_text(hint))}
    return strictly(function) if function.__annotations__ else function


def _text(hint: Any) -> str:
    return hint if isinstance(hint, str) else repr(hint)


def checked_modules() -> list[str]:
    """All modules of `sae` but those that are compiled: numba and Triton read the source of functions themselves."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "sae").rglob("*.py"))]
    return [".".join(path.parts) for path in paths if not path.name.startswith(("cpu_loops", "triton_", "__"))]


install_import_hook(checked_modules(), "shape_checks.check_arrays")
