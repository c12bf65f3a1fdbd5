"""What the pages show, as JSON: read-only addresses below `api/`, for the same hosts as the app."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import pandas as pd
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from browser import catalogue, data, export, state
from browser.data import SaeEntry
from browser.live import search
from browser.named_lists import Lists
from browser.refusals import BASE_PATH_VARIABLE, HOSTS_VARIABLE
from store.common import StoreError
from store.features import FeatureIndex
from store.notes import Notes

Answer = dict[str, Any]
FILTERS = ("list", "flag", "domain", "q")
ADDRESSES = {
    "dictionaries": "every dictionary below the root, with its configuration",
    "features?sae=ID": f"the table of its features; filters: {', '.join(FILTERS)}; ranked by meaning: meaning",
    "feature?sae=ID&feature=N": f"what the page of a feature shows; N,M,… for several, up to {export.MAX_FEATURES}",
    "notes?sae=ID": "your labels, notes, bookmarks and lists",
}


class ApiError(ValueError):
    """A request that cannot be answered: the status and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def routes() -> list[Route]:
    """The addresses, below the base path of the app if it has one."""
    base = os.environ.get(BASE_PATH_VARIABLE, "")
    prefix = f"/{base}/api" if base else "/api"
    answers = {
        "": (_index, ()),
        "/": (_index, ()),
        "/dictionaries": (_dictionaries, ()),
        "/features": (_features, ("sae", *FILTERS, "meaning")),
        "/feature": (_feature, ("sae", "feature")),
        "/notes": (_notes, ("sae",)),
    }
    known = [
        Route(prefix + name, _endpoint(answer, parameters), methods=["GET"])
        for name, (answer, parameters) in answers.items()
    ]
    return [*known, Route(prefix + "/{name:path}", _endpoint(_unknown), methods=["GET"])]


def allowed_host(header: str, hosts: Sequence[str]) -> bool:
    """Whether a Host header names one of `hosts`, which may be `*.example.org`."""
    name = header.rpartition(":")[0] if header.rpartition(":")[2].isdecimal() else header
    return any(fnmatchcase(name.casefold(), host.casefold()) for host in hosts)


def _endpoint(
    answer: Callable[[Request], Answer], parameters: Sequence[str] | None = None
) -> Callable[[Request], Response]:
    """Checks the host and the names of the parameters (None: any), and turns errors into answers.

    It runs in a thread of its own, apart from the app's loop.
    """

    @wraps(answer)
    def endpoint(request: Request) -> Response:
        hosts = os.environ.get(HOSTS_VARIABLE, "localhost").split()
        try:
            if not allowed_host(request.headers.get("host", ""), hosts):
                raise ApiError(403, f"this app accepts requests for {', '.join(hosts)}; see `sae browse --allow-host`")
            _require_known(request, parameters)
            return _json(answer(request), 200)
        except ApiError as error:
            return _json({"error": str(error)}, error.status)
        except ValueError as error:  # no index, damaged notes
            return _json({"error": str(error)}, 409)

    return endpoint


def _require_known(request: Request, parameters: Sequence[str] | None) -> None:
    """Raises: ApiError for a misspelt filter, without which the answer would be of all features."""
    unknown = [] if parameters is None else sorted(set(request.query_params) - set(parameters))
    if unknown:
        there = ", ".join(parameters or ()) or "none"
        raise ApiError(400, f"unknown parameter {', '.join(unknown)}; this address has {there}")


def _json(content: Answer, status: int) -> Response:
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
    return JSONResponse(content, status, headers)


def _index(request: Request) -> Answer:
    return {"addresses": ADDRESSES}


def _unknown(request: Request) -> Answer:
    raise ApiError(404, f"no such address; there are {', '.join(ADDRESSES)}")


def _dictionaries(request: Request) -> Answer:
    found = data.scan(state.root())
    return {
        "dictionaries": [
            {"id": each.id, "indexed": each.has_index, "unfinished": each.unfinished, "config": each.config}
            for each in found
        ]
    }


def _features(request: Request) -> Answer:
    entry = _entry(request)
    index = _open(entry)
    asked = request.query_params
    name = asked.get("list")
    lists = Lists(entry.path).all() if name is not None else {}
    if name is not None and name not in lists:
        raise ApiError(404, f"{entry.id} has no list “{name}”; it has {', '.join(lists) or 'none'}")
    _require_choice("flag", asked.get("flag", ""), catalogue.FLAGS)
    _require_choice("domain", asked.get("domain", ""), index.domains)
    table = catalogue.with_labels(_table(index.path, _stamp(entry)), Notes(entry.path).all())
    shown = catalogue.select_features(
        table,
        flag=asked.get("flag", ""),
        domain=asked.get("domain", ""),
        text=asked.get("q", ""),
        features=lists[name] if name is not None else None,
    )
    meaning = asked.get("meaning", "").strip()
    middle = {}
    if meaning:
        found = search.similarities(index, entry.path, meaning)
        shown, middle = catalogue.by_similarity(shown, found), {"median_similarity": search.median(found)}
    return {"sae": entry.id, **middle, "features": json.loads(shown.to_json(orient="records", double_precision=15))}


def _require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value and value not in choices:
        raise ApiError(404, f"{name}={value}: expected one of {', '.join(choices)}")


def _feature(request: Request) -> Answer:
    entry = _entry(request)
    index, notes = _open(entry), Notes(entry.path)
    asked = request.query_params.get("feature", "")
    parts = asked.split(",")
    if not all(part.isascii() and part.isdecimal() and int(part[:20]) < index.d_sae for part in parts):
        raise ApiError(404, f"feature={asked}: the features of {entry.id} are 0 to {index.d_sae - 1}")
    if len(parts) > export.MAX_FEATURES:
        raise ApiError(400, f"{len(parts)} features; expected at most {export.MAX_FEATURES} in one request")
    numbers = list(map(int, parts))
    provenance = f"{entry.id} · {index.d_sae:,} features · {index.kept_tokens:,} tokens"
    described = [export.describe(index, number, notes.get(number)) for number in numbers]
    content: Answer = json.loads(export.to_json(provenance, described))
    return content


def _notes(request: Request) -> Answer:
    entry = _entry(request)
    return {"sae": entry.id, "notes": Notes(entry.path).export(), "lists": Lists(entry.path).all()}


def _entry(request: Request) -> SaeEntry:
    asked = request.query_params.get("sae", "")
    for entry in data.scan(state.root()):
        if entry.id == asked:
            return entry
    raise ApiError(404, f"sae={asked}: no dictionary below this root has that name; see api/dictionaries")


def _open(entry: SaeEntry) -> FeatureIndex:
    return _index_at(entry.index_path, _stamp(entry))


def _stamp(entry: SaeEntry) -> int:
    try:
        return (entry.index_path / "zarr.json").stat().st_mtime_ns
    except OSError as error:
        if entry.is_crosscoder:
            raise StoreError(f"{entry.id} is a crosscoder, of several sites: it has no feature index") from error
        raise StoreError(f"{entry.id} has no feature index; build it with `sae index`") from error


@lru_cache(maxsize=4)
def _index_at(path: Path, stamp: int) -> FeatureIndex:
    return FeatureIndex.open(path)


@lru_cache(maxsize=2)
def _table(path: Path, stamp: int) -> pd.DataFrame:
    return catalogue.feature_table(_index_at(path, stamp))
