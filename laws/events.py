"""The reference backend's TensorBoard logs as a CSV of runs, for `python scaling.py fit --data=<folder of logs>`.

Every folder with event files is a run. Its arguments are in them, too (Megatron writes each as a text), and give N and the tokens of a
step; a `runs.csv` in the folder of logs (columns run, unique_tokens and, where the logs lack the arguments, params and tokens_per_step)
says what they do not know. A run without unique_tokens is one point, its last; with them it is a curve over epochs.
"""

import csv
from pathlib import Path

import numpy as np

from laws.laws import smooth

LOSS, VALIDATION = "lm loss", "lm loss validation"  # the backend's names for both


def read(folder):
    """One run's logs: its arguments as text, {tag: (steps, values)}. Raises ValueError."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator
    except ImportError:
        raise ValueError("reading TensorBoard logs needs: pip install '.[logs]'") from None
    log = EventAccumulator(str(folder), size_guidance={SCALARS: 0, TENSORS: 0})  # 0: all, not a sample
    log.Reload()
    arguments = {}
    for tag in log.Tags()["tensors"]:
        values = log.Tensors(tag)[-1].tensor_proto.string_val
        if tag.endswith("/text_summary") and values:
            arguments[tag.removesuffix("/text_summary")] = values[0].decode()
    return arguments, {tag: tuple(np.array(column) for column in zip(*((s.step, s.value) for s in log.Scalars(tag)))) for tag in log.Tags()["scalars"]}


def parameters(a):
    """N from Megatron's arguments, by the paper's count: embeddings once if tied, no norms."""
    width, layers, f = int(a["hidden_size"]), int(a["num_layers"]), int(a["ffn_hidden_size"])
    inner = int(a["num_attention_heads"]) * int(a["kv_channels"])
    groups = int(a["num_query_groups"]) if a.get("group_query_attention") == "True" else int(a["num_attention_heads"])
    attention = width * (2 * inner + 2 * groups * int(a["kv_channels"]))
    mlp = width * f * (3 if a.get("swiglu") == "True" else 2)
    vocabulary = int(a["padded_vocab_size"]) * width * (2 if a.get("untie_embeddings_and_output_weights") == "True" else 1)
    return vocabulary + layers * (attention + mlp)


def write_csv(logs, path):
    """The runs below the folder `logs` as a CSV that scaling.py's read_csv takes. Raises ValueError naming the run."""
    logs, rows, known = Path(logs), [], {}
    if (logs / "runs.csv").is_file():
        with open(logs / "runs.csv", newline="", encoding="utf-8-sig") as file:
            rows_known = list(csv.DictReader(file))
        if rows_known and "run" not in rows_known[0]:
            raise ValueError(f"{logs / 'runs.csv'} has no column run; it has {', '.join(map(str, rows_known[0]))}")
        known = {row["run"]: row for row in rows_known}
    for folder in sorted({file.parent for file in logs.rglob("events.out.tfevents*")}):
        name = folder.relative_to(logs).as_posix()
        arguments, scalars = read(folder)
        given = known.get(name, {})
        if LOSS not in scalars and VALIDATION not in scalars:
            raise ValueError(f"{folder} has no '{LOSS}' or '{VALIDATION}'; it has {', '.join(scalars) or 'no scalars'}")
        try:
            N = float(given.get("params") or parameters(arguments))
            tokens_per_step = float(given.get("tokens_per_step") or int(arguments["global_batch_size"]) * int(arguments["seq_length"]))
            unique = float(given.get("unique_tokens") or 0)
        except ValueError as problem:
            raise ValueError(f"{logs / 'runs.csv'}: run {name}: {problem}") from None
        except KeyError as missing:
            raise ValueError(f"{folder} does not log the argument {missing}; give params and tokens_per_step in {logs / 'runs.csv'}") from None
        if VALIDATION in scalars:
            steps, losses = scalars[VALIDATION]
        else:
            steps, losses = scalars[LOSS][0], smooth(scalars[LOSS][1])
        points = zip(steps, losses) if unique else [(steps[-1], losses[-1])]
        rows += [dict(run=name, params=f"{N:.0f}", tokens=f"{step * tokens_per_step:.0f}", unique_tokens=f"{unique:.0f}" if unique else "",
                      epochs=f"{step * tokens_per_step / unique:.6g}" if unique else "", loss=f"{loss:.6g}") for step, loss in points if step > 0]
    if not rows:
        raise ValueError(f"{logs}: no logs with any step")
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
