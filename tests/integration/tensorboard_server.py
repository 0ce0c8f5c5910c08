"""A real TensorBoard, read over HTTP."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

PATIENCE_SECONDS = 60
_OPENER = build_opener(ProxyHandler({}))  # a proxy of the machine knows nothing of localhost


@dataclass
class ReadBack:
    """What TensorBoard shows of a log folder.

    Args:
        scalars: run → tag → [(step, value)].
        images: run → tag → [(step, encoded image)].
        texts: run → tag → HTML of the last text.
        rows: run → {"hparams": …, "metrics": tag → value}, of the HPARAMS tab.
    """

    scalars: dict[str, dict[str, list[tuple[int, float]]]]
    images: dict[str, dict[str, list[tuple[int, bytes]]]]
    texts: dict[str, dict[str, str]]
    rows: dict[str, dict[str, dict[str, Any]]]


def read_back(logdir: Path, load_fast: str = "auto") -> ReadBack:
    """Start TensorBoard on a folder, read everything that a person would look at, stop it.

    Args:
        logdir: the folder.
        load_fast: which of TensorBoard's two readers: "false" its own, "auto" the faster one of
            tensorboard-data-server where that runs, as without the option.

    Raises:
        TimeoutError: if it is not up, or does not show all runs, within `PATIENCE_SECONDS`.
    """
    runs = {path.parent for path in logdir.rglob("events.out.tfevents.*")}
    deadline = time.monotonic() + PATIENCE_SECONDS
    with serve(logdir, load_fast) as server:
        before = None
        while time.monotonic() < deadline:
            now = ReadBack(_scalars(server), _images(server), _texts(server), _rows(server))
            # It answers while it still reads the files: what it says has to stay the same.
            if now == before and len(now.scalars) == len(runs):
                return now
            before = now
            time.sleep(0.5)
    raise TimeoutError(f"TensorBoard shows {sorted(now.scalars)} of {sorted(map(str, runs))}")


@contextmanager
def serve(logdir: Path, load_fast: str) -> Iterator[str]:
    """Run TensorBoard on a free port; give its address once it knows of a run."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
    # Port 0 lets the system choose: no race for a port that was free a moment ago.
    command += ["--host", "127.0.0.1", "--port", "0", "--load_fast", load_fast]
    log = logdir.parent / f"{logdir.name}-server-{load_fast}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        yield _wait_until_loaded(process, log)
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_loaded(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        address = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        # The address is printed before the folder has been read.
        if address and _get(address.group(), "runs"):
            return address.group()
        time.sleep(0.1)
    raise TimeoutError(f"TensorBoard is not up:\n{log.read_text()}")


def _fetch(server: str, path: str, body: dict[str, Any] | None = None, **query: Any) -> bytes:
    url = f"{server}/data/{path}" + (f"?{urlencode(query)}" if query else "")
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    try:
        with _OPENER.open(Request(url, data, headers), timeout=PATIENCE_SECONDS) as response:
            content: bytes = response.read()
            return content
    except HTTPError as error:
        raise AssertionError(f"{url}: {error} {error.read()!r}") from error


def _get(server: str, path: str, **query: Any) -> Any:
    return json.loads(_fetch(server, path, **query))


def _tags(server: str, plugin: str) -> Iterator[tuple[str, str]]:
    for run, tags in _get(server, f"plugin/{plugin}/tags").items():
        for tag in tags:
            yield run, tag


def _scalars(server: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for run, tag in _tags(server, "scalars"):
        points = _get(server, "plugin/scalars/scalars", run=run, tag=tag)
        found.setdefault(run, {})[tag] = [(step, value) for _, step, value in points]
    return found


def _images(server: str) -> dict[str, dict[str, list[tuple[int, bytes]]]]:
    found: dict[str, dict[str, list[tuple[int, bytes]]]] = {}
    for run, tag in _tags(server, "images"):
        entries = _get(server, "plugin/images/images", run=run, tag=tag, sample=0)
        found.setdefault(run, {})[tag] = [
            (entry["step"], _fetch(server, f"plugin/images/individualImage?{entry['query']}"))
            for entry in entries
        ]
    return found


def _texts(server: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for run, tag in _tags(server, "text"):
        texts = _get(server, "plugin/text/text", run=run, tag=tag)
        found.setdefault(run, {})[tag] = texts[-1]["text"]
    return found


def _rows(server: str) -> dict[str, dict[str, dict[str, Any]]]:
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    request = {
        "experimentName": "",
        "allowedStatuses": statuses,
        "colParams": [],
        "startIndex": 0,
        "sliceSize": 1000,
    }
    answer = json.loads(_fetch(server, "plugin/hparams/session_groups", request))
    return {
        group["name"]: {
            "hparams": group["hparams"],
            "metrics": {
                metric["name"]["tag"]: metric["value"] for metric in group.get("metricValues", [])
            },
        }
        for group in answer.get("sessionGroups", [])
    }
