"""The few pieces of HTML that pages are made of; every text in them is escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import streamlit as st

BRAND = '<div class="mono-brand"><a href="./" target="_self" title="All runs">mono<i>sem</i></a></div>'


def facts(values: Mapping[str, str], title: str = "", badge: str = "", help: str = "") -> str:
    """A line of names and values, after a `title` with a `badge`; `help` appears on hovering over a ? at its end."""
    head = f'<div class="mono-title">{_isolated(title)}{_badge(badge)}</div>' if title else ""
    cells = "".join(f"<div><span>{html.escape(name)}</span>{_isolated(value)}</div>" for name, value in values.items())
    mark = f'<div class="mono-help" title="{html.escape(help)}">?</div>' if help else ""
    return f'<div class="mono-facts">{head}{cells}{mark}</div>'


def _badge(text: str) -> str:
    return f' <span class="mono-flag">{html.escape(text)}</span>' if text else ""


def _isolated(text: str) -> str:
    """Escaped, and apart from its neighbours where it may run from right to left."""
    escaped = html.escape(text)
    return escaped if text.isascii() else f"<bdi>{escaped}</bdi>"


def source_line(text: str) -> str:
    """Where the numbers of a page come from, in small print."""
    return f'<div class="mono-source">{html.escape(text)}</div>'


def heading(text: str) -> None:
    """The heading of a part of a page."""
    st.html(f'<div class="mono-head">{html.escape(text)}</div>')


def explain(title: str, text: str, command: str = "", links: Sequence[tuple[str, str]] = ()) -> None:
    """A notice: what is wrong, the command that fixes it, links (text, address) to what there is instead."""
    code = f"<code>{html.escape(command)}</code>" if command else ""
    anchors = (f'<a href="{html.escape(address)}" target="_self">{html.escape(name)}</a>' for name, address in links)
    more = f'<div class="mono-links">{"".join(anchors)}</div>' if links else ""
    st.html(f'<div class="mono-notice"><b>{html.escape(title)}</b><div>{html.escape(text)}</div>{code}{more}</div>')
