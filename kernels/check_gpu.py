"""Checks the GPU kernels on this machine's GPU and measures them, in one command and under ten minutes.

1. every op against its reference, every size and tile, the engine against the reference engine on weights by
   seed and on the embedded, trained model, twice the same output: the tests of `tests/` that need a GPU;
2. `dfqsam benchmark encoder --device cuda`, only when all of these pass.

Writes what was found, with the machine and the commit, as JSON. Exits with 1 when a check failed, with 2 when
nothing can be checked here; nothing is measured then.

    python kernels/check_gpu.py [FILE]      FILE is gpu-check.json unless given
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = ("tests/test_ops_cuda.py", "tests/test_engine_cutlass.py")
VARIANT, BATCHES = "sam_b_256", (1, 16)
ENGINES = ("torch-eager", "torch-compile", "torch-bf16", "torch-compile-bf16", "cutlass")
TEST_SECONDS, BENCHMARK_SECONDS = 270, 300


def main(target: Path) -> int:
    from monailabel_dfqsam.benchmark.machine import describe_run
    from monailabel_dfqsam.ops.cuda_library import why_unavailable

    reason = why_unavailable()
    if reason is not None:
        print(f"The GPU kernels cannot be checked here: {reason}.", file=sys.stderr)
        return 2
    result: dict[str, Any] = {**describe_run(), "tests": run_tests(), "benchmark": None}
    failed = [test["name"] for test in result["tests"] if test["outcome"] == "failed"]
    if not failed and result["tests"]:
        result["benchmark"] = run_benchmark()
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    passed = sum(test["outcome"] == "passed" for test in result["tests"])
    measured = result["benchmark"] is not None and result["benchmark"]["complete"]
    print(
        f"{passed} checks passed, {len(failed)} failed, benchmark {'complete' if measured else 'incomplete'}"
    )
    print(f"Written to {target}")
    return 0 if passed and not failed and measured else 1


def run_tests() -> list[dict[str, Any]]:
    """{name, outcome, properties} of every test that needs a GPU; one failed entry when they did not end."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-k", "gpu", *TESTS, f"--junit-xml={report}"]
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=TEST_SECONDS)
        except subprocess.TimeoutExpired:
            return [{"name": "all", "outcome": "failed", "properties": {"seconds": TEST_SECONDS}}]
        if not report.is_file():
            return [{"name": "all", "outcome": "failed", "properties": {"exit_status": done.returncode}}]
        return [_test(case) for case in ET.parse(report).iter("testcase")]


def run_benchmark() -> dict[str, Any] | None:
    """The benchmark's own JSON, or None when it did not end well."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "monailabel_dfqsam", "benchmark", "encoder", "--device", "cuda"]
        command += ["--variant", VARIANT, "--engines", ",".join(ENGINES), "--json", str(rows)]
        for batch in BATCHES:
            command += ["--batch", str(batch)]
        try:
            subprocess.run(command, cwd=ROOT, timeout=BENCHMARK_SECONDS, check=True)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            print(f"The benchmark did not end well: {error}", file=sys.stderr)
        if not rows.is_file():
            return None
        found: dict[str, Any] = json.loads(rows.read_text(encoding="utf-8"))
        return found


def _test(case: ET.Element) -> dict[str, Any]:
    outcomes = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    outcome = next((outcomes[child.tag] for child in case if child.tag in outcomes), "passed")
    properties = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
    return {"name": case.attrib["name"], "outcome": outcome, "properties": properties}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "gpu-check.json"))
