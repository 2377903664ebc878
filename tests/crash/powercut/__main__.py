"""`python -m tests.crash.powercut DIRECTORY`: cuts a kept trace again where it failed, and leaves the image to look at.

`serve FD` is the worker's process.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.crash.powercut.machine import Failure, Machine, Run
from tests.crash.powercut.worker import Worker, serve
from tests.store.power_loss import Fate


def again(kept: Path) -> int:
    """Returns the exit status: 1 when it fails again."""
    told = json.loads((kept / "cut.json").read_text())
    fate = Fate()
    fate.lost = {int(index): [(begin, end) for begin, end in parts] for index, parts in told["fate"]["lost"].items()}
    fate.lengths = {int(node): count for node, count in told["fate"]["lengths"].items()}
    run = Run(kept, json.loads((kept / "history.json").read_text()))
    directory = Path(tempfile.mkdtemp(prefix="hlfs-powercut-"))
    worker = Worker()
    print(f"recovered in {directory}/image")
    try:
        print(Machine(worker, directory, 0).check(run, told["cut"], fate).digests)
    except Failure as failure:
        print(failure)
        return 1
    finally:
        worker.close()
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        sys.exit(again(Path(sys.argv[1])))
