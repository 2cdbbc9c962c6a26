"""data.py with small tasks, commits every 20 ms and a pause at each write, so that a test meets it at work.

    python tests/processes/prepare_slowly.py TASK_BYTES PAUSE_SECONDS ARGUMENTS OF DATA.PY …
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import terminal  # noqa: E402
from corpus import cutting, prepare, writer  # noqa: E402


def slow_write(self, raw, write=writer.ShardWriter.write):
    time.sleep(pause)
    write(self, raw)


if __name__ == "__main__":  # not in the processes that tokenize
    cutting.TASK_BYTES, pause = int(sys.argv[1]), float(sys.argv[2])
    prepare.COMMIT_SECONDS = 0.02
    if pause:
        writer.ShardWriter.write = slow_write
    sys.argv[:3] = ["data.py"]
    terminal.run(prepare.main)
