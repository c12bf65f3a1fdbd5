"""The benchmark: its worker takes steps of our real trainer, missing peers are left out, its plot is a valid SVG."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench  # noqa: E402
import bench_screen  # noqa: E402
from bench_plot import line_plot  # noqa: E402

# Speaks the protocol of bench.Contender: an answer at the start, and one for each `run N`.
FAKE_PEER = """#!{python}
import json, sys
print(json.dumps({{"times": [], "cpu": [], "rss_gib": 0.0}}), flush=True)
for line in sys.stdin:
    n = int(line.split()[1])
    print(json.dumps({{"times": [0.5] * n, "cpu": [[0.25, 0.5]] * n, "rss_gib": 1.0}}), flush=True)
"""


@pytest.mark.parametrize("shape", [("relu-sparse", "7"), ("batchtopk", "3")], ids=lambda s: s[0])
def test_the_worker_answers_with_the_time_of_each_step(shape: tuple[str, str]) -> None:
    command = [sys.executable, SCRIPTS / "bench_worker.py", "--variant", shape[0], "--l0", shape[1]]
    with subprocess.Popen(
        [*map(str, command), "--d-sae", "128", "--batch", "64"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        answers = [json.loads(process.stdout.readline())]
        for steps in (3, 1):
            process.stdin.write(f"run {steps}\n")
            process.stdin.flush()
            answers.append(json.loads(process.stdout.readline()))
        process.stdin.write("quit\n")
        process.stdin.flush()
        assert process.wait(timeout=60) == 0
    assert [len(answer["times"]) for answer in answers] == [0, 3, 1]
    assert [len(answer["cpu"]) for answer in answers] == [0, 3, 1]
    assert all(0 < seconds < 60 for answer in answers for seconds in answer["times"])
    assert answers[-1]["rss_gib"] > 0.05


def test_a_peer_without_its_environment_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = bench.python_of("dictlearn", tmp_path)
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PEER.format(python=sys.executable))
    python.chmod(0o755)
    who = "dictlearn,saelens"
    options = ["--variants", "topk", "--d-sae", "64", "--rounds", "3", "--who", who, "--json", str(tmp_path / "times")]
    monkeypatch.setattr(sys, "argv", ["bench.py", "--peers", str(tmp_path), *options])
    monkeypatch.setattr(bench, "choices", dict)
    assert bench.main() == 0
    said = capsys.readouterr()
    missing = bench.python_of("saelens", tmp_path)
    assert said.err == f"saelens: left out, its environment is missing ({missing})\n"
    assert "| dictlearn | 0.500 | 0.500 | 0.500 | 8,192 | 1.00 | 0.750 | 1.00 | 1.00 |" in said.out
    assert [r["who"] for r in json.loads((tmp_path / "times").read_text())["results"]] == ["dictlearn"]
    python.unlink()
    assert bench.main() == 0  # no peer is left to measure
    assert capsys.readouterr().err.count("left out") == 2


def test_lines_are_drawn_at_the_positions_of_their_numbers() -> None:
    lines = {"a <line>": [(1.0, 1.0), (10.0, 10.0), (100.0, 100.0)], "flat": [(1.0, 5.0), (100.0, 5.0)]}
    root = ElementTree.fromstring(line_plot([("one", lines), ("two", lines)]))
    drawn = [
        [tuple(map(float, point.split(","))) for point in element.attrib["points"].split()]
        for element in root.iter("{http://www.w3.org/2000/svg}polyline")
    ]
    assert len(drawn) == 4
    (x0, y0), (x1, y1), (x2, y2) = drawn[0]
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert y0 > y2  # upwards
    assert drawn[1][0][1] == drawn[1][1][1]
    assert drawn[2][0][0] > x2


def test_formats_of_the_screen_are_timed_and_their_exact_products_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_screen, "formats", lambda: ["float32", "int8"])
    monkeypatch.setattr(bench_screen.bench, "K", 3)
    options = ["--parts", "select", "--d-sae", "96", "--batch", "32", "--rounds", "2", "--json", str(tmp_path / "json")]
    monkeypatch.setattr(sys, "argv", ["bench_screen.py", *options])
    assert bench_screen.main() == 0
    exact, int8 = json.loads((tmp_path / "json").read_text())["select"]
    assert exact["exact_products_per_row"] == 3  # float32 leaves no doubt but for ties
    assert int8["exact_products_per_row"] > 3
    assert {len(times) for times in int8["times"].values()} == {2}
    assert "| int8 | product |" in capsys.readouterr().out


def test_ratios_of_steps_are_of_pairs() -> None:
    found = [
        {"who": who, "seconds": [2.0, 4.0, 9.0], "cpu_s": cpu} for who, cpu in (("a", [2, 4, 9]), ("b", [1, 1, 3]))
    ]
    assert bench_screen.step_table(found).splitlines()[-1].endswith("| 1000.0 | 1000.0 | 3000.0 | 3.00 |")
