"""What only a CUDA card can show, in three parts of nine minutes at the most.

    python docs/benchmarks/prove.py right    # the same numbers as on a CPU, and nothing waits
    python docs/benchmarks/prove.py memory   # what benchmark=plan predicts, against what is taken
    python docs/benchmarks/prove.py speed    # milliseconds of the device and of the host
    make prove                               # all three

Each stage is a process with a time limit. What it finds, and what about it is off, is written to outputs/prove.json at once;
called again, the script continues with what is missing or failed. The last lines say what passed and what is off. `--toy` runs everything at toy sizes, also on a CPU: to see that the script works.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from prove import stages, verdicts

MINUTES = {"right": 8, "memory": 8, "speed": 9}


def main() -> int:
    """Run the stages of a part that have no result yet; return 1 if any failed or is off."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=MINUTES)
    parser.add_argument("--toy", action="store_true", help="tiny models and pictures, on a CPU too")
    parser.add_argument("--out", type=Path, default=Path("outputs/prove.json"))
    parser.add_argument("--stage", help="run this one in the present process and print its result")
    options = parser.parse_args()
    if options.stage:
        name, _, case = options.stage.partition(" ")
        print("\n" + json.dumps(stages.run(options.part, name, json.loads(case), options.toy)))
        return 0
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    part = found.setdefault(options.part, {})
    patience = 10 if options.toy else 1  # a slow machine proves nothing, but gets through
    end = time.monotonic() + 60 * MINUTES[options.part] * patience
    for name, limit, case in stages.of(options.part, options.toy):
        label = f"{name} {json.dumps(case)}"
        if part.get(label, {}).get("ok"):
            continue
        limit = min(limit * patience, end - time.monotonic())
        part[label] = one = run(options.part, label, limit, options.toy)
        one["off"] = verdicts.off(name, one["result"]) if one["ok"] else []
        print(f"{options.part}: {label}: {json.dumps(part[label])[:300]}", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    for line in summary(options.part, part):
        print(line)
    return int(any(one.get("off") or not one["ok"] for one in part.values()))


def summary(name: str, part: dict[str, Any]) -> list[str]:
    """Return what became of a part's stages: a line for each that is off or has no result, and the sum."""
    off = {label: one["off"] for label, one in part.items() if one.get("off")}
    failed = {label: one["error"] for label, one in part.items() if not one["ok"]}
    lines = [f"  off: {label}: {text}" for label, texts in off.items() for text in texts]
    lines += [f"  no result: {label}: {text.strip()[-200:]}" for label, text in failed.items()]
    passed, more = len(part) - len(off) - len(failed), ""
    if off or failed:
        more = (
            f" {len(off)} are off, {len(failed)} have no result: see above, and outputs/prove.json."
        )
    return [*lines, f"{name}: {passed} of {len(part)} stages passed.{more}"]


def run(part: str, label: str, limit: float, toy: bool) -> dict[str, Any]:
    """Run a stage in a process of its own; return its result, or what became of it."""
    if limit <= 0:
        return {"ok": False, "error": f"no time left of {MINUTES[part]} minutes: call again"}
    start = time.monotonic()
    command = [sys.executable, __file__, part, "--stage", label, *["--toy"] * toy]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"took longer than {limit:.0f} s"}
    if done.returncode:
        return {"ok": False, "error": done.stderr.strip()[-1500:]}
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return {"ok": True, "seconds": round(time.monotonic() - start, 1), "result": result}


if __name__ == "__main__":
    sys.exit(main())
