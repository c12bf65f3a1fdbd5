"""SAEDashboard's side of scripts/check_peers.py: reads feature pages into its own classes, which write them again.

Neuronpedia takes these files. `<directory>.read.json` holds what the classes hold; the other side compares.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig

if __name__ == "__main__":
    for directory in sorted(p for p in (Path(sys.argv[1]) / "pages").glob("*") if p.is_dir()):
        settings = json.loads((directory / "run_settings.json").read_text(encoding="utf-8"))
        NeuronpediaRunnerConfig(**settings, outputs_dir=str(directory))
        batches = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(directory.glob("batch-*.json"))]
        read = [NeuronpediaDashboardBatch(**batch).to_dict() for batch in batches]
        directory.with_name(f"{directory.name}.read.json").write_text(json.dumps(read), encoding="utf-8")
    print(json.dumps({"version": version("sae-dashboard"), "torch": "–", "python": platform.python_version()}))
