"""Write a task for eval.py and lm-evaluation-harness: bits per byte of 24 chapters of the King James Bible.

    python results/kjv.py FOLDER        makes FOLDER/kjv.yaml and FOLDER/kjv.jsonl, from debian:bible-kjv-text
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from corpus import debian  # noqa: E402

TASK = """task: kjv
dataset_path: json
dataset_kwargs:
  data_files:
    test: "{path}"
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
metadata:
  version: 1
"""
N_PAGES, LENGTH = 24, 3000  # evenly spread documents, and the characters of each

if len(sys.argv) != 2:
    raise SystemExit("kjv.py: give a folder")
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
pages = list(debian.documents(debian.download("bible-kjv-text", folder / ".debian")))
lines = [json.dumps(dict(page=pages[i * len(pages) // N_PAGES][:LENGTH])) + "\n" for i in range(N_PAGES)]
(folder / "kjv.jsonl").write_text("".join(lines), encoding="utf-8")
(folder / "kjv.yaml").write_text(TASK.format(path=(folder / "kjv.jsonl").resolve()), encoding="utf-8")
