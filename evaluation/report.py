"""What eval.py shows and keeps: lines for people, eval.json, evaluation.npz and the noise curve."""

import contextlib
import csv
import json
import math
import sys

import torch
from rich.console import Console
from rich.progress import Progress

import terminal
from configurator.format import plot_text, with_error
from corpus.records import read_record, whole
from evaluation.likelihood import ORDERS
from training.log import read_metrics, write_rows


@contextlib.contextmanager
def progress_bar(title, ranks):
    """Yield a function (done, total) that draws a bar on a terminal; in the end it is gone."""
    if ranks.rank or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# ------------------------------------------------------------------------------------------------- for people


def print_report(report, generator):
    """Print what was measured of a Generator's checkpoint."""
    if "bound" in report:
        print_bound(report["bound"], generator)
    for order, line in report.get("ordered", {}).items():
        print_ordered(order, line)
    if "answers" in report:
        line = report["answers"]
        share = f"{line['exact_match']:.1%} ± {line['error']:.1%}"
        print(f"{line['answers']:,} answers written: {share} exactly right")
    if report.get("tasks"):
        print_tasks(report["tasks"])
    if "texts" in report:
        print_texts(report["texts"])


def print_bound(bound, generator):
    nats = with_error(bound["nats_per_token"], bound["error"])
    bits = with_error(bound["bits_per_byte"], bound["bits_per_byte_error"])
    several = bound["passes"] > 1
    noise = f"   (noise alone ± {bound['noise_error']:.4f})" if several else ""
    print(f"{bound['kind']:<22}{nats} nats/token   {bits} bits/byte   "
          f"perplexity {bound['perplexity']:.2f}{noise}")

    if "answers" in bound:
        print(f"{'':<22}of answers given their prompts: {bound['nats_per_answer']:.4f} nats each, "
              f"{bound['answer_tokens']:.1f} tokens on average")

    passes = f", {bound['passes']} passes" if several else ""
    note = ""
    if not bound["own_text"]:
        note = "; another text than in training"
    else:
        step, key = generator.record["step"], "val_ema" if generator.is_averaged else "val_loss"
        metrics = read_metrics(generator.folder.parent)
        logged = [m[key] for m in metrics if m.get("step") == step and key in m]
        if logged:
            note = f"; train.py logged {logged[-1]:.4f}"
    print(f"{'':<22}{bound['rows']:,} rows of {bound['seq_len']}{passes}{note}")


def print_ordered(order, line):
    nats = with_error(line["nats_per_token"], line["error"])
    if order == "bound":
        print(f"{'bound of these rows':<22}{nats} nats/token   ({line['rows']} rows)")
        return
    difference = with_error(abs(line["below_bound"]), line["below_bound_error"])
    side = "below" if line["below_bound"] >= 0 else "above"
    print(f"{'exact, ' + order:<22}{nats} nats/token   {difference} {side} their bound")


def print_tasks(tasks):
    print(f"{'task':<34}{'shots':>5} {'examples':>8}   score")
    for name, line in tasks.items():
        scores = []
        for metric, value in line.items():
            if isinstance(value, float) and not metric.endswith("_stderr"):
                scores.append(f"{metric} {with_error(value, line.get(f'{metric}_stderr', math.nan))}")
        shots = "" if line["shots"] is None else line["shots"]
        print(f"{name:<34}{shots:>5} {line['examples'] or '':>8}   {'   '.join(scores)}")


def print_texts(texts):
    nll = ""
    if "nll" in texts:
        value = with_error(texts["nll"]["mean"], texts["nll"]["error"], digits=3)
        nll = f", NLL under {texts['judge']} {value} nats/token"
    entropy = with_error(texts["entropy"]["mean"], texts["entropy"]["error"], digits=3)
    print(f"{texts['texts']} texts, {texts['tokens']:,} tokens: entropy {entropy} nats{nll}")
    distinct = "   ".join(f"{n}: {value:.3f}" for n, value in texts["distinct"].items())
    repetition = "   ".join(f"{n}: {value['mean']:.3f}" for n, value in texts["repetition"].items())
    print(f"   distinct-n   {distinct}      repeated n-grams within a text   {repetition}")
    for name, copies in texts.get("copies", {}).items():
        title = "of held-out text as long"
        if name == "texts":
            title = "copied from the training text" if texts["own_text"] else "in the corpus's training text"
        shares = "   ".join(f"{n} tokens: {line['windows']:.1%}" for n, line in copies["lengths"].items())
        print(f"   {title:<30} {shares}   (longest {copies['longest'] or 'below these'})")


# -------------------------------------------------------------------------------------------------- for files


REPORT = {  # eval.json, as far as it is read again
    "checkpoint": str,
    "settings?": {str: {}},
    "bound?": {"rows": whole(), "passes": whole(), "text": str},
    "ordered?": {},
    "tasks?": {},
}
NOT_TASKS = ("bound", "answers", "texts", *ORDERS)  # names of measurements beside those of benchmarks


def figures(report):
    """The report's figures as a line of metrics.jsonl has them: {"eval/<measurement>/<figure>": value}."""
    line = {}
    for name in ("nats_per_token", "error", "bits_per_byte"):
        if "bound" in report:
            line[f"eval/bound/{name}"] = report["bound"][name]
    for order, measured in report.get("ordered", {}).items():
        if order != "bound":
            line[f"eval/{order}/nats_per_token"] = measured["nats_per_token"]
            line[f"eval/{order}/error"] = measured["error"]
    if "answers" in report:
        line["eval/answers/exact_match"] = report["answers"]["exact_match"]
    for task, metrics in report.get("tasks", {}).items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                line[f"eval/{task}/{metric}"] = value
    for name in ("entropy", "nll"):
        if name in report.get("texts", {}):
            line[f"eval/texts/{name}"] = report["texts"][name]["mean"]
    return line


def finite(value):
    """Replace what is not finite, inside of dicts and lists, by None: JSON knows no nan."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_report(folder, report, losses, generator, settings):
    """Write eval.json, evaluation.npz and the noise curve into `folder`; returns what is to be said of that.

    Other measurements of the same checkpoint stay in eval.json, each with its settings, and a bound from
    more rows is not replaced by one from fewer. losses: likelihood.RowLosses of the bound, or None. Raises
    OSError.
    """
    path, kept = folder / "eval.json", ""
    before = read_report(path, generator)
    old, bound = before.get("bound"), report.get("bound")
    if old and bound and is_better(old, bound):
        kept = (f"kept in {path}: the bound from {old['rows']:,} rows in {old['passes']} passes; "
                "with --out, this one has a place of its own\n")
        report = {name: part for name, part in report.items() if name != "bound"}
        bound = losses = None

    step = generator.record["step"]
    about = dict(checkpoint=str(generator.weights_folder.resolve()), step=step, objective=generator.objective,
                 parameters=generator.model.n_params(), device=str(generator.device), torch=torch.__version__)
    all_settings = before.get("settings", {}) | {name: settings for name in report}
    merged = before | about | report | dict(settings=all_settings)
    for name in {"tasks", "ordered"} & set(report):  # each task and order for itself
        merged[name] = before.get(name, {}) | report[name]
    path.with_suffix(".tmp").write_text(json.dumps(finite(merged), indent=1), encoding="utf-8")
    path.with_suffix(".tmp").replace(path)
    names = [path.name]

    if losses:
        about = {name: bound[name] for name in ("text", "seq_len", "passes", "error", "bytes_per_token")}
        write_rows(folder / "evaluation.npz", losses, step=step, averaged=generator.is_averaged, **about)
        names.append("evaluation.npz")
    if bound and bound.get("curve"):
        write_curve(folder / "noise.csv", bound["curve"])
        title = f"{plot_text(generator.folder.parent.name)}, step {step}"
        names.append("noise.csv")
        with terminal.optional(f"{folder / 'noise.png'} can't be drawn"):
            draw_curve(folder / "noise.png", bound["curve"], title)
            names.append("noise.png")
    return f"{kept}written to {folder}: {', '.join(names)}"


def read_report(path, generator):
    """The eval.json of the same checkpoint, {} where there is none; raises ValueError or OSError."""
    if not path.exists():
        return {}
    try:
        report = read_record(path, REPORT)
    except ValueError as problem:
        raise ValueError(f"{problem}; move it away, or give --out") from None
    return report if report["checkpoint"] == str(generator.weights_folder.resolve()) else {}


def is_better(one, other):
    """Whether one bound is of the same text as another, from more rows and passes."""
    return one["text"] == other["text"] and one["rows"] * one["passes"] > other["rows"] * other["passes"]


def write_curve(path, curve):
    """Write the noise curve, a list of dicts, as .csv."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(curve[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(curve)


def draw_curve(path, curve, title):
    """Draw the noise curve as .png, with error bars."""
    from matplotlib.figure import Figure  # it takes half a second

    def column(name):
        return [line[name] for line in curve]

    uniform = "noisy_ce" in curve[0]
    figure = Figure(figsize=(6.5, 4.3), layout="tight")
    axes = figure.subplots()
    axes.errorbar(column("noise_ratio"), column("nats"), column("error"), marker="o", ms=3, capsize=2,
                  label="the bound's integrand" if uniform else "cross-entropy of masked tokens")
    for name in ("noisy_ce", "clean_ce") if uniform else ():
        axes.plot(column("noise_ratio"), column(name), ".--", label=f"cross-entropy, {name[:5]} tokens")
    axes.set(xlabel="noise ratio r", ylabel="nats per token", title=title, xlim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
