"""What a link asks for, and what to say when that does not exist; no Streamlit here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

from browser.data import SaeEntry


@dataclass(frozen=True)
class Missing:
    """A part of a link that does not exist: what is missing, what there is instead, and links to it (text, address)."""

    title: str
    text: str
    links: list[tuple[str, str]]


def link(**parameters: object) -> str:
    """A relative address of the app, e.g. `?sae=a%2Ftm&view=Feature&feature=4`."""
    return "?" + urlencode(parameters)


def missing_dictionary(asked: str, entries: Mapping[str, SaeEntry]) -> Missing | None:
    """None if `asked` is one of the dictionaries."""
    if asked in entries:
        return None
    text = "No dictionary below this root has that name. It may have been moved, renamed or deleted. These exist:"
    return Missing(f"There is no dictionary “{asked}”", text, [])


def view_named(asked: str, titles: Mapping[str, str]) -> str | None:
    """The name of the view that a link means, by its title or name in any case; None if there is no such view."""
    wanted = asked.casefold()
    return next((name for name, title in titles.items() if wanted in (name.casefold(), title.casefold())), None)


def missing_view(asked: str, titles: Iterable[str], same_place: Mapping[str, object]) -> Missing:
    """What to say about an unknown view; the links open each view at `same_place` (dictionary, feature)."""
    links = [(title, link(**{**same_place, "view": title})) for title in titles]
    return Missing(f"There is no view “{asked}”", "These views exist:", links)


def missing_feature(asked: str, entry: SaeEntry, view: str) -> Missing | None:
    """None if `asked` is the number of a feature of the dictionary; the links open the nearest one that exists."""
    last = entry.d_sae - 1
    number = _whole_number(asked)
    if number is not None and 0 <= number <= last:
        return None
    title = f"“{asked}” is not a feature number" if number is None else f"{entry.id} has no feature {number}"
    nearest = 0 if number is None else min(max(number, 0), last)
    links = [
        (f"Feature {nearest:,}", link(sae=entry.id, view=view, feature=nearest)),
        (f"All features of {entry.id}", link(sae=entry.id, view="Features")),
    ]
    return Missing(title, f"The features of {entry.id} are numbered 0 to {last:,}.", links)


def _whole_number(text: str) -> int | None:
    digits = text.strip().removeprefix("-")
    return int(text) if digits.isascii() and digits.isdecimal() and len(digits) < 20 else None
