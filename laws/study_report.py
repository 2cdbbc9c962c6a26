"""What came out of a study: a table beside the paper's final values, and the paper's panels."""

import csv
import math
from dataclasses import asdict
from datetime import date

import numpy as np

import configurator
from configurator.format import plot_text
from evaluation.report import NOT_TASKS
from laws import drawing
from laws.forms import QUOKKA
from laws.runs import smooth_losses
from sampling.decode import DecodeConfig
from sampling.generator import Generator
from training.log import read_metrics

PAPER_NOISE = 0.005  # nats: the paper's are single runs, too


# ----------------------------------------------------------------------------------------------- final values


def series(metrics, key):
    """The tokens and the values of one key of a run's metrics, as two arrays."""
    return np.array([(m["tokens"], m[key]) for m in metrics if key in m], float).reshape(-1, 2).T


def task_keys(metrics):
    """The keys of benchmark scores among a run's metrics, eval/TASK/METRIC."""
    keys = {key for m in metrics for key in m if key.startswith("eval/")}
    return sorted(key for key in keys if key.split("/")[1] not in NOT_TASKS)


def final_values(metrics):
    """Where our curves end, by the paper's names of them: {name: value}, as far as they are there."""
    # of its own uniform loss, as the paper's figures show it
    val_key = "val_paper" if any("val_paper" in m for m in metrics) else "val_loss"
    keys = dict(train_loss="loss", val_loss_c4=val_key, bound="val_loss", val_loss_noisy="val_noisy",
                val_loss_clean="val_clean", params_norm="param_norm")
    for key in sorted(task_keys(metrics), key=len, reverse=True):  # mmlu after mmlu_stderr
        if "hellaswag" in key:
            keys["hellaswag"] = key
        if "mmlu" in key:
            keys["mmlu_val"] = key

    values = {}
    for name, key in keys.items():
        tokens, curve = series(metrics, key)
        if not len(curve):
            continue
        values[name] = curve[-1]
        if key.startswith("eval/") and curve.max() <= 1:  # a share, not per cent
            values[name] *= 100
        if name == "train_loss":  # the mean over the last billion tokens, or over a twentieth of a short run
            values[name] = curve[tokens > tokens[-1] - min(1e9, tokens[-1] / 20)].mean()
        if name == "val_loss_c4":
            values["best"] = curve.min()
    return values


def paper_values():
    """{(figure, kind, curve): {metric: value}}: where the paper's curves end (results/quokka/README.md)."""
    values = {}
    text = (QUOKKA / "ablation_final_values.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(text.splitlines()):
        run = values.setdefault((int(row["figure"]), row["model_type"], row["series"]), {})
        run[row["metric"]] = float(row["mean_last_1B"] or row["last"])
        if row["metric"] == "val_loss_c4":
            run["best"] = float(row["best"])
    return values


# -------------------------------------------------------------------------------------------------- the table


def write_table(study, rows, cfg, runs, how):
    """A study's table in Markdown: where our curves and the paper's end. how: the command that made it."""
    paper = paper_values()
    lines = [
        f"# {study}, scale {cfg.scale}",
        "",
        f"`{how}`, {date.today()}. Each cell: ours / the paper's (1086M parameters, C4).",
        "Losses are nats per token of the own tokenizer and corpus: compare differences, not values. They",
        "are to the first run, of validation losses (of training losses where the paper shows no validation:",
        "MaskGIT's is another quantity). Training losses are means over the last billion tokens, or the last",
        f"twentieth of a short run. Differences below {cfg.noise:g} (the paper's: {PAPER_NOISE:g}) are not",
        "called a direction.",
    ]
    notes = []
    for row in rows:
        ours = {curve: final_values(read_metrics(runs[words].folder)) for curve, words in row.runs.items()}
        theirs = {curve: paper.get((row.figure, row.kind, curve), {}) for curve in row.runs}
        source = f"the paper's Figure {row.figure}" if row.figure else "not in the paper"
        lines += ["", f"## {row.title} ({source})", ""]
        lines += write_rows(row, runs, ours, theirs, cfg)
        first = next(iter(ours))
        for curve in row.runs:
            if "val_loss_noisy" in ours[curve]:
                notes = ["", uniform_note(curve, ours[curve], theirs[curve], ours[first])]
    return "\n".join(lines + notes) + "\n"


def write_rows(row, runs, ours, theirs, cfg):
    """The Markdown table of one Row; ours and theirs: {curve: final values}.

    Of a study that the paper has not, how many tokens a pass writes comes last.
    """
    head = ["the paper's curve", "ours", "training loss", "validation loss", "difference", "direction",
            "parameter norm", "HellaSwag", "MMLU"]
    if not row.figure:
        head = ["curve", *head[1:], "tokens per pass"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    differing, first = describe_settings(row, runs), next(iter(row.runs))
    judged = "val_loss_c4" if "val_loss_c4" in theirs[first] or not row.figure else "train_loss"
    for curve, words in row.runs.items():
        cells = [curve, differing[words]]
        for name in ("train_loss", "val_loss_c4"):
            cells.append(format_pair(ours[curve], theirs[curve], name))
        if curve != first and judged in ours[curve] and judged in ours[first]:
            change = ours[curve][judged] - ours[first][judged]
            if row.figure:
                their_change = theirs[curve][judged] - theirs[first][judged]
                cells.append(f"{change:+.3f} / {their_change:+.3f}")
                cells.append(describe_direction(change, their_change, cfg.noise))
            else:
                cells += [f"{change:+.3f}", ""]
        else:
            cells += ["", ""]
        for name in ("params_norm", "hellaswag", "mmlu_val"):
            cells.append(format_pair(ours[curve], theirs[curve], name, ".1f"))
        if not row.figure:
            cells.append(tokens_per_pass(runs[words].folder))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def tokens_per_pass(folder, n_rows=8):
    """How many tokens a pass writes, of texts as long as a row, as a cell.

    A masked model's with order=threshold, as sample.py has it.
    """
    try:
        generator = Generator.from_checkpoint(folder).load_weights()
    except (ValueError, OSError):  # not trained yet
        return "—"
    if generator.device.type == "cpu" and generator.model.n_params() > 1e8:
        return "—"  # hours
    length = generator.model.config.seq_len
    order = "threshold" if generator.objective == "masked" else "ancestral"
    decoding = DecodeConfig(order, cache=generator.exact_cache)
    rows = [[generator.tokenizer.mask_id] * length] * n_rows
    return f"{length / generator.generate(rows, decoding).passes_per_row:.2f}"


def uniform_note(curve, ours, theirs, first):
    """A sentence on the loss `paper`, which is no bound."""
    noisy, clean = (format_pair(ours, theirs, name) for name in ("val_loss_noisy", "val_loss_clean"))
    change = ours["bound"] - first.get("bound", np.nan)
    return (f"The validation loss of {curve} is ½(noisy + clean), inferred to be the paper's: {noisy} and "
            f"{clean}. That is no bound; our bound is {ours['bound']:.3f}, {change:+.3f} to the first run's.")


def format_pair(ours, theirs, name, form=".3f"):
    """'ours / theirs' of one value; with the best on the way where validation ended well above it."""
    cells = []
    for values in (ours, theirs):
        cell = format(values[name], form) if name in values else "—"
        if name == "val_loss_c4" and name in values and values[name] > values["best"] + 0.01:
            cell += f" (best {values['best']:{form}})"
        cells.append(cell)
    return " / ".join(cells)


def describe_direction(ours, theirs, noise):
    """Whether our difference points where the paper's does, in words."""
    if math.isnan(ours):
        return "ours diverged"
    if abs(theirs) < PAPER_NOISE:
        return "none in either" if abs(ours) < noise else "none in the paper"
    if abs(ours) < noise:
        return "ours within noise"
    return "same" if (ours > 0) == (theirs > 0) else "**opposite**"


def describe_settings(row, runs):
    """What distinguishes the runs of a row: {words: 'lr=0.002'}."""
    settings = {words: asdict(runs[words].settings) for words in row.runs.values()}
    first, *others = settings.values()
    neutral = configurator.neutral_settings(next(iter(runs.values())).settings)
    names = []
    for name, value in first.items():
        if name not in neutral and any(other[name] != value for other in others):
            names.append(name)
    return {words: format_settings(values, names) for words, values in settings.items()}


def format_settings(values, names):
    parts = []
    for name in names:
        value = values[name]
        parts.append(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}")
    return ", ".join(parts)


# ------------------------------------------------------------------------------------------------- the panels


def draw_panels(rows, runs, out):
    """Draw the paper's panels, against tokens, as panels.png and panels.pdf.

    Training loss, validation loss, parameter norm and whatever was evaluated: a row of panels for each Row.
    """
    import matplotlib

    metrics = {words: read_metrics(run.folder) for words, run in runs.items()}
    columns = dict(loss="training loss", val_loss="validation loss", param_norm="parameter norm")
    for key in task_keys([m for records in metrics.values() for m in records]):
        columns[key] = plot_text(key.removeprefix("eval/"))

    with matplotlib.rc_context({"font.size": 7}):
        figure, axes = drawing.panels(len(rows) * len(columns), columns=len(columns), width=3.6, height=3)
        for row, line in zip(rows, axes):
            names = describe_settings(row, runs)
            for ax, (key, title) in zip(line, columns.items()):
                draw_panel(ax, key, [(names[words], metrics[words]) for words in row.runs.values()])
                ax.set(title=f"{row.title}: {title}" if len(rows) > 1 else title)
        for name in ("panels.png", "panels.pdf"):
            figure.savefig(out / name, dpi=80)


def draw_panel(ax, key, metrics):
    """Draw one key of several runs' metrics, [(name, metrics), …], against tokens."""
    late = []
    for i, (name, records) in enumerate(metrics):
        name = plot_text(name)
        lines = {key: ("-", name)}
        if key == "val_loss" and len(series(records, "val_paper")[1]):
            lines = dict(val_paper=("-", name), val_loss=("--", f"{name} (bound)"))
        for line_key, (style, label) in lines.items():
            tokens, values = series(records, line_key)
            if key == "loss":
                values = smooth_losses(values)
            ax.plot(tokens, values, style, color=f"C{i}", lw=1.2, label=label)
            is_shown = (tokens > tokens.max(initial=0) / 10) & np.isfinite(values)  # not: diverged
            late += list(values[is_shown])

    is_loss = "loss" in key
    if is_loss and late:  # the first tenth falls too far to show the rest
        margin = 0.05 * (max(late) - min(late)) or 1
        ax.set_ylim(min(late) - margin, max(late) + margin)
    ax.set(xlabel="tokens", ylabel="nats per token" if is_loss else "")
    ax.grid(alpha=0.3)
    ax.legend()
