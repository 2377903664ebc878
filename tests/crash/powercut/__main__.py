"""`python -m tests.crash.powercut DIRECTORY`: recovers a kept image again, in a copy which stays to be looked at.

`serve FD` is the worker's process.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from tests.crash.powercut.machine import Run
from tests.crash.powercut.worker import Found, Worker, serve


def again(kept: Path) -> int:
    """Returns the exit status: 1 when it fails again."""
    told = json.loads((kept / "cut.json").read_text())
    run = Run(kept, json.loads((kept / "history.json").read_text()))
    image = Path(tempfile.mkdtemp(prefix="hlfs-powercut-")) / "image"
    shutil.copytree(kept / "image", image)
    worker = Worker()
    try:
        found: Found = worker.call("recover", image, 1)
    finally:
        worker.close()
    print(f"recovered {image}, after {told['cut']} events ({run.oracle.operation_at(told['cut'])})")
    for path, (kind, node_id, _) in found.names.items():
        print(f"{path.decode()}: {kind} {node_id:016x} {found.digests.get(node_id, '')}")
    complaint = found.trouble or (run.oracle.complaint(told["cut"], found) if told["again"] is None else "")
    print(complaint or "this is as it should be")
    return int(bool(complaint))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        sys.exit(again(Path(sys.argv[1])))
