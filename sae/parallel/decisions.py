"""What ranks must agree on before any work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sae.parallel.mesh import FailedElsewhere, Mesh


def refuse_different_settings(mesh: Mesh, settings: Mapping[str, Any]) -> None:
    """Raises: ValueError on rank 0 naming each setting that differs between ranks; FailedElsewhere on the others."""
    theirs = mesh.everyones(json.loads(json.dumps(settings)))
    differing = [
        f"{name} is {theirs[0].get(name)!r} on rank 0 and {other.get(name)!r} on rank {rank}"
        for name in theirs[0]
        for rank, other in list(enumerate(theirs))[1:]
        if other.get(name) != theirs[0].get(name)
    ]
    if differing:
        message = f"the ranks were started with different settings: {'; '.join(differing[:4])}. Start all alike."
        raise ValueError(message) if mesh.is_first else FailedElsewhere(message)
