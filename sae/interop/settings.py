"""A peer's settings: which are known, which a user left out on purpose, and refusal of all others.

A setting that is not known here may change what a dictionary computes. So it refuses the import, unless its value says
that it is off, or the user leaves it out by name; that is recorded in the imported dictionary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sae.interop.files import InteropError

# May be left out although the file does not say it: some releases lack it.
IMPLIED = ("center_writing_weights", "fold_ln", "fold_value_biases")


def names(text: str) -> frozenset[str]:
    """The words of a text, as names of settings."""
    return frozenset(text.split())


def is_off(value: object) -> bool:
    """Whether a value says that its setting is not used."""
    return value is None or value is False or (isinstance(value, str | list | dict | tuple) and value in _OFF)


_OFF: tuple[object, ...] = ("", "none", "None", [], {}, [None])


def without(config: Mapping[str, Any], ignore: Collection[str]) -> dict[str, Any]:
    """The configuration without these settings, at any depth."""
    return {
        key: without(value, ignore) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ignore
    }


def require_mentioned(config: Mapping[str, Any], ignore: Collection[str]) -> None:
    """Raises: InteropError for a setting to leave out that the configuration does not have."""
    there = set(_keys(config))
    if missing := sorted(set(ignore) - there - set(IMPLIED)):
        raise InteropError(
            f"--ignore {missing[0]}: the dictionary's configuration has no such setting; it has "
            f"{', '.join(sorted(there)) or 'none'}."
        )


def _keys(config: Mapping[str, Any]) -> list[str]:
    inner = [_keys(value) for value in config.values() if isinstance(value, dict)]
    return [*config, *(key for keys in inner for key in keys)]


def refuse_unknown(config: Mapping[str, Any], known: Collection[str], where: Path) -> None:
    """Raises: InteropError naming the settings that are neither known nor off."""
    unknown = [f"{key} = {str(value)[:60]}" for key, value in config.items() if key not in known and not is_off(value)]
    if unknown:
        raise InteropError(
            f"{where} cannot be imported: it has settings that are not known here and may change what the dictionary "
            f"computes: {'; '.join(unknown[:8])}. If one does not, leave it out: --ignore NAME (recorded)."
        )
