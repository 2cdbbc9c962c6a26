"""Make the small old run that tests resume, sample and evaluate; only a checkout of 48006ab can make it.

    python tests/golden/fixture.py /tmp/base

Writes run_48006ab/ (stopped by SIGTERM after 20 of 40 steps), corpus_48006ab/, and expected.json: the
commands, to be run in a folder with copies of both, and what they gave at 48006ab.
"""

import json
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import golden_cases
import record
from golden_texts import word_texts

NAME = "48006ab"
SETTINGS = (
    "--objective=masked --estimator=ratio --schedule=poly2 --time=moving_gaussian --time_sigma=0.3"
    " --time_correction=False --anneal=10 --document_attention --reset_positions --short_rows=0.2"
    " --n_layer=2 --n_head=4 --n_kv_head=2 --head_dim=4 --d_model=16 --d_ff=32 --block_len=32"
    " --rope_base=100 --dropout=0.1 --init_std=0.06 --scaled_init=False --local_init --steps=40"
    " --batch_size=8 --micro_batch=4 --lr=1e-2 --min_lr=1e-4 --lr_schedule=wsd --warmup=5 --decay=0.3"
    " --beta1=0.8 --beta2=0.99 --weight_decay=0.05 --clip=0.5 --log_every=1 --eval_every=19 --eval_rows=0"
    " --save_every=1000 --save_at=30 --keep=2 --keep_every=15 --seed=7 --skip_norm=100 --max_skips=4"
    " --device=cpu --dtype=float32 --compile=no"
)
TRAIN = f"train.py {SETTINGS} --corpus=corpus_{NAME} --run_dir=run_{NAME}"
COMMANDS = {
    "corpus": rf"data.py words.txt --separator='\n===\n' --out=. --name=corpus_{NAME} --val=0.2",
    "train": TRAIN,
    "resume": f"{TRAIN} --resume=yes",
    "sample": f"sample.py --run_dir=run_{NAME} --prompt='the cat ' --length=20 --batch=2 --seed=11"
    " --device=cpu --out=sample.jsonl",
    "infill": f"sample.py --run_dir=run_{NAME} --text='a [MASK:5] sees [MASK:6]. the dog' --order=margin"
    " --block=8 --cache=dual --device=cpu --out=infill.jsonl",
    "eval": f"eval.py --run_dir=run_{NAME} --passes=2 --bins=5 --ordered=left_to_right,confidence"
    " --ordered_rows=4 --samples=4 --match=4 --seed=5 --device=cpu --out=eval",
}


def stopped_at(box, wanted):
    """Train until SIGTERM; returns whether the run stopped after the wanted step."""
    run_dir = f"run_{NAME}"
    shutil.rmtree(box["work"] / run_dir, ignore_errors=True)
    golden_cases.run_until(
        box, shlex.split(COMMANDS["train"]), run_dir, wanted
    )  # a validation before, so many lines at step wanted - 1
    return (box["work"] / run_dir / f"step_{wanted:08d}").is_dir()


def write(about, **found):
    """Write expected.json: a line for each command and figure."""
    lines = [f'"about": {json.dumps(about)}', f'"environment": {json.dumps(record.FIXED)}']
    for name, values in dict(commands=COMMANDS, **found).items():
        inner = [
            f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()
        ]
        lines.append(f"{json.dumps(name)}: {{\n" + ",\n".join(inner) + "\n}")
    (golden_cases.HERE / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main():
    checkout = Path(sys.argv[1]).resolve()
    record.set_up()
    about = dict(commit=record.commit_of(checkout), **record.machine())
    if about["commit"] != NAME:
        sys.exit(f"{checkout} is {about['commit']}, not {NAME}")
    work = Path(tempfile.mkdtemp(prefix="golden_"))
    box = dict(checkout=checkout, work=work, fresh=False, case="fixture")
    (work / "logs").mkdir()
    (work / "words.txt").write_text("\n===\n".join(word_texts(80)), encoding="utf-8")
    golden_cases.run(box, shlex.split(COMMANDS["corpus"]))
    while not stopped_at(box, 20):
        print("stopped too late: once more")
    for folder in (f"corpus_{NAME}", f"run_{NAME}"):
        shutil.rmtree(golden_cases.HERE / folder, ignore_errors=True)
        shutil.copytree(
            work / folder, golden_cases.HERE / folder, ignore=shutil.ignore_patterns(".lock", "loss.png")
        )
    write(about)
    twice = []
    for number in range(2):
        inside = dict(box, work=work / f"copy_{number}")
        twice.append(golden_cases.do_old_run(inside))
    if twice[0] != twice[1]:
        sys.exit("two runs that were resumed alike differ")
    write(about, **twice[0])
    shutil.rmtree(work)


if __name__ == "__main__":
    os.environ.update(record.FIXED)
    main()
