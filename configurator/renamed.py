"""Names that have changed: old flags, override files, run folders and checkpoints stay usable.

Whatever reads settings or records passes them through here; nothing else knows an old name. A setting that is
gone is refused with a line that says what does its work now.
"""

# of settings, in flags, override files and records
SETTINGS = {
    "block_len": "seq_len",
    "beside": "fallback",
}

# of what a checkpoint records beside its settings
RECORD = {
    "samples": "next_sample",
    "passed": "passed_samples",
    "streak": "bad_in_a_row",
}

# settings that are gone, and what does their work now
GONE = {
    **dict.fromkeys(
        ("eval_tasks", "eval_tasks_every", "eval_tasks_limit", "eval_tasks_masks", "task_path", "task_data"),
        "benchmarks during training are a process beside it: python eval.py --watch=RUN --tasks=…",
    ),
}


def renamed(values, names):
    """A dict with the keys that `names` lists under their new names; what is no dict stays as it is."""
    if not isinstance(values, dict):
        return values
    return {names.get(key, key): value for key, value in values.items()}


def renamed_record(record):
    """A checkpoint's record of any version, a dict, with today's names; it need not have been checked."""
    record = dict(exact_up_to=0) | renamed(record, RECORD)  # before data.EXACT_UP_TO, no order was exact
    for part in ("settings", "model"):
        if part in record:
            record[part] = renamed(record[part], SETTINGS)
    if isinstance(record.get("pending"), list):
        record["pending"] = [named_figures(row) for row in record["pending"]]
    return record


def named_figures(row):
    """A step's figures by name; once they were a list, the halves of the loss (or the loss) and the norm."""
    is_old = isinstance(row, list) and row and all(isinstance(value, int | float) for value in row)
    if not is_old:
        return row
    *parts, norm = row
    figures = {"loss": sum(parts)}
    if len(parts) == 2:
        figures |= {"noisy": 2 * parts[0], "clean": 2 * parts[1]}
    return figures | {"grad_norm": norm}
