"""The reference backend's TensorBoard logs as a CSV of runs, for `scaling.py fit --data=FOLDER_OF_LOGS`.

Every folder with event files is a run. Its arguments are in them, too (Megatron writes each as a text), and
give N and the tokens of a step. What the logs lack stands in a `runs.csv` in the folder of logs, with the
columns run, unique_tokens and, without the arguments, params and tokens_per_step. A run without
unique_tokens is one point, its last; with them it is a curve over epochs.
"""

from pathlib import Path

import numpy as np

from corpus.files import list_folder
from laws.runs import read_rows, smooth_losses, write_csv

LOSS, VALIDATION = "lm loss", "lm loss validation"  # the backend's names for both


def write_points(logs, path):
    """Write the runs below the folder `logs` as a CSV for runs.read_csv. Raises ValueError naming the run."""
    logs = Path(logs)
    known = read_known(logs / "runs.csv")
    rows = []
    for folder in sorted({file.parent for file in list_folder(logs, "**/events.out.tfevents*")}):
        name = folder.relative_to(logs).as_posix()
        rows += run_points(folder, name, known.get(name, {}), logs / "runs.csv")
    if not rows:
        raise ValueError(f"{logs}: no logs with any step")
    write_csv(rows, path)
    return path


def read_known(path):
    """What runs.csv says of each run: {name: row}."""
    if not path.is_file():
        return {}
    rows = [row for _, row in read_rows(path)]
    if "run" not in rows[0]:
        raise ValueError(f"{path} has no column run; it has {', '.join(rows[0])}")
    return {row["run"]: row for row in rows}


def run_points(folder, name, known, known_path):
    """The rows of one run; `known` is its row in runs.csv."""
    arguments, scalars = read_logs(folder)
    if LOSS not in scalars and VALIDATION not in scalars:
        tags = ", ".join(scalars) or "no scalars"
        raise ValueError(f"{folder} has no '{LOSS}' or '{VALIDATION}'; it has {tags}")
    try:
        N = float(known.get("params") or count_params(arguments))
        tokens_per_step = float(known.get("tokens_per_step") or step_tokens(arguments))
        unique = float(known.get("unique_tokens") or 0)
    except ValueError as problem:
        raise ValueError(f"{known_path}: run {name}: {problem}") from None
    except KeyError as missing:
        raise ValueError(f"{folder} does not log the argument {missing}; "
                         f"give params and tokens_per_step in {known_path}") from None

    if VALIDATION in scalars:
        steps, losses = scalars[VALIDATION]
    else:
        steps, losses = scalars[LOSS][0], smooth_losses(scalars[LOSS][1])
    if not unique:
        steps, losses = steps[-1:], losses[-1:]

    rows = []
    for step, loss in zip(steps, losses):
        if step > 0:
            row = dict(run=name, params=f"{N:.0f}", tokens=f"{step * tokens_per_step:.0f}")
            row["unique_tokens"] = f"{unique:.0f}" if unique else ""
            row["epochs"] = f"{step * tokens_per_step / unique:.6g}" if unique else ""
            rows.append(row | dict(loss=f"{loss:.6g}"))
    return rows


def read_logs(folder):
    """One run's arguments as text, and {tag: (steps, values)}. Raises ValueError without tensorboard."""
    try:
        from tensorboard.backend.event_processing import event_accumulator
    except ImportError:
        raise ValueError("reading TensorBoard logs needs: pip install '.[logs]'") from None
    everything = {event_accumulator.SCALARS: 0, event_accumulator.TENSORS: 0}  # 0: not a sample
    log = event_accumulator.EventAccumulator(str(folder), size_guidance=everything)
    log.Reload()

    arguments = {}
    for tag in log.Tags()["tensors"]:
        texts = log.Tensors(tag)[-1].tensor_proto.string_val
        if tag.endswith("/text_summary") and texts:
            arguments[tag.removesuffix("/text_summary")] = texts[0].decode()

    scalars = {tag: newest_values(log.Scalars(tag)) for tag in log.Tags()["scalars"]}
    return arguments, scalars


def newest_values(points):
    """(steps, values) of a tag's events, one value per step: after a restart the newest."""
    newest = {point.step: point.value for point in sorted(points, key=lambda point: point.wall_time)}
    steps = sorted(newest)
    return np.array(steps), np.array([newest[step] for step in steps])


def step_tokens(arguments):
    return int(arguments["global_batch_size"]) * int(arguments["seq_length"])


def count_params(arguments):
    """N from Megatron's arguments, by the paper's count: embeddings once if tied, no norms."""
    width, layers = int(arguments["hidden_size"]), int(arguments["num_layers"])
    n_head, head_dim = int(arguments["num_attention_heads"]), int(arguments["kv_channels"])
    grouped = arguments.get("group_query_attention") == "True"
    n_kv_head = int(arguments["num_query_groups"]) if grouped else n_head
    attention = width * head_dim * (2 * n_head + 2 * n_kv_head)

    matrices = 3 if arguments.get("swiglu") == "True" else 2
    mlp = width * int(arguments["ffn_hidden_size"]) * matrices

    untied = arguments.get("untie_embeddings_and_output_weights") == "True"
    embeddings = int(arguments["padded_vocab_size"]) * width * (2 if untied else 1)
    return embeddings + layers * (attention + mlp)
