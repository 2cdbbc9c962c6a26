"""How good a trained model is: likelihoods with error bars, the standard benchmarks, and what it writes.

    python eval.py --run_dir=runs/quickstart                                      # the bound (AR: the exact NLL) on the validation split
    python eval.py --run_dir=runs/quickstart --passes=4 --ordered=left_to_right,confidence
    python eval.py --run_dir=runs/quickstart --tasks=hellaswag,mmlu --limit=100   # lm-evaluation-harness; tasks=paper: as the Quokka paper
    python eval.py --run_dir=runs/quickstart --samples=64 --judge=runs/quickstart_ar
    python eval.py compare runs/quickstart runs/quickstart_ar

Writes eval.json (everything measured so far of this checkpoint), evaluation.npz (row by row, for compare), noise.csv and noise.png (the loss
against the noise ratio) into eval_<step> in the run folder. By torchrun on several ranks: the same figures, sooner.
"""

import contextlib
import csv
import json
import math
import os
import sys
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

import configurator
import data
import kernels
import train
from configurator import setting, split
from evaluation import frontier, likelihood, texts
from sampling import decode
from sampling.generator import Generator
from training import checks, distributed
from training.log import read_metrics, write_rows
from training.objective import Objective

ORDERS = ("left_to_right", "confidence", "random")


@dataclass
class Config:
    run_dir: str = setting("runs/quickstart", "a run folder (its newest checkpoint is used) or one checkpoint folder")
    corpus: str = setting("", "whose validation split is scored (empty: the run's own)")
    # the bound
    rows: int = setting(0, "blocks of the validation split (0: as many as in training, -1: all)", low=-1)
    passes: int = setting(1, "times that each is scored, with fresh noise; the first is the validation of training", low=1)
    bins: int = setting(20, "noise ratios of the curve (0: no curve)", low=0)
    bound: bool = setting(True, "score the validation split")
    # the exact likelihood of a masked model's samplers
    ordered: str = setting("", "orders, with commas: left_to_right, confidence, random; each takes as many passes as a block has tokens")
    ordered_rows: int = setting(64, "of the validation blocks, for these", low=1)
    # benchmarks
    tasks: str = setting("", "of lm-evaluation-harness, with commas; paper: HellaSwag and MMLU as the Quokka paper's figures have them")
    limit: int = setting(0, "examples of each task (0: all)", low=0)
    fewshot: int = setting(-1, "worked examples before each question (-1: as the task says)", low=-1)
    masks: int = setting(128, "noisy copies of each answer (one of few tokens needs fewer, and is exact)", low=1)
    task_path: str = setting("", "folder with tasks of your own, as .yaml")
    task_data: str = setting("", "folder with data sets called as on the hub (hellaswag, mmlu): nothing is downloaded for these")
    # what it writes
    samples: int = setting(0, "texts to write and to measure", low=0)
    texts: str = setting("", "measure these instead: what sample.py --out wrote")
    judge: str = setting("", "an autoregressive run of the same tokenizer, for their NLL")
    length: int = setting(0, "tokens of a text (0: the model's context)", low=0)
    order: Literal["auto", "ancestral", "first_hitting", "random", "low_confidence", "entropy", "margin"] = setting("auto", "in which masked models write: auto is ancestral, and low_confidence in tasks")
    steps: int = setting(0, "denoising steps (0: one per token)", low=0)
    block: int = setting(0, "of masked models: tokens that are finished before the next ones begin (0: all at once)", low=0)
    temperature: float = setting(1.0, "of the softmax; tasks have their own", low=0)
    match: str = setting("8,16,32,64,128", "lengths of passages that are looked for in the training text, with commas (empty: none)")
    # the machine
    micro_batch: int = setting(32, "blocks per rank and forward pass; makes no difference but to memory and speed", low=1)
    pass_tokens: int = setting(0, "tokens per forward pass of tasks (0: 16384 on a CPU, 131072 on a GPU)", low=0)
    dtype: Literal["float32", "bfloat16"] = setting("float32", "of the matrix products; bfloat16 is faster on a GPU and rounds the figures in their third decimal")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    compile: bool = setting(False, "torch.compile the scoring of blocks")
    seed: int = setting(0, "of what is written and of the noise on answers; the bound has noise of its own", low=0, high=2**62)
    timeout: float = setting(3600.0, "of several ranks: seconds that one waits for another", above=0, high=1e6)
    out: str = setting("", "folder for what is written (empty: eval_<step> in the run's, with the corpus's name where the text is another)")

    def problems(self):
        wrong = [f"ordered: there is no '{order}'; choose from {', '.join(ORDERS)}" for order in split(self.ordered) if order not in ORDERS]
        wrong += [f"match: '{n}' is no length; write whole numbers from 1 on, with commas between" for n in split(self.match) if not (n.isascii() and n.isdecimal() and int(n))]
        if self.samples and self.texts:
            wrong.append("give samples (to be written) or texts (that are there)")
        if self.judge and not (self.samples or self.texts):
            wrong.append("judge needs samples or texts")
        if not (self.bound or self.ordered or self.tasks or self.samples or self.texts):
            wrong.append("nothing to do: bound=False, and neither ordered, tasks, samples nor texts")
        if self.texts and not Path(self.texts).is_file():
            wrong.append(f"texts={self.texts}: no such file")
        if self.samples == 1:
            wrong.append("samples=1: one text has no error; write at least two")
        for name in ("task_path", "task_data"):
            if getattr(self, name) and not Path(getattr(self, name)).is_dir():
                wrong.append(f"{name}={getattr(self, name)}: no such folder")
        if self.steps and self.order == "first_hitting":
            wrong.append("order=first_hitting takes as many steps as it needs; leave steps out")
        if self.device == "cuda" and not torch.cuda.is_available():
            wrong.append("device=cuda, but this machine has no usable GPU; use --device=cpu")
        return wrong


@contextlib.contextmanager
def progress(what, ranks):
    """A function (done, of) that draws a bar, where somebody looks at the terminal; it leaves nothing behind."""
    if ranks.rank or not sys.stderr.isatty():
        yield lambda done, of: None
        return
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task(what)
        yield lambda done, of: bar.update(task, completed=done, total=of)


# ------------------------------------------------------------------------------------------------- likelihoods


def open_text(cfg, writer):
    """(training settings, corpora, validation blocks) for a checkpoint; raises ValueError or OSError."""
    known = {k: v for k, v in writer.record["settings"].items() if k in train.Config.__dataclass_fields__}
    settings = train.Config(**known | ({"corpus": cfg.corpus} if cfg.corpus else {}))
    corpora = checks.open_corpora(settings)
    meta = corpora[0].meta
    if differ := [f"{k} {writer.record['corpus'][k]} and {meta[k]}" for k in checks.VOCABULARY if writer.record["corpus"][k] != meta[k]]:
        raise ValueError(f"checkpoint and corpus don't go together: {', '.join(differ)}")
    return settings, corpora, checks.validation_sequences(corpora, settings.seq_len)


def reader(settings, eos_id):
    """What `likelihood.evaluate` reads batches with."""
    return partial(data.read_batch, settings, eos_id)


def bound(cfg, writer, settings, corpora, blocks, objective, ranks):
    """The bound on the validation split, its errors and the noise curve: a dict, and likelihood.Measured."""
    process = likelihood.validation_process(writer.process, settings.schedule)
    rows = min(cfg.rows if cfg.rows > 0 else blocks.available if cfg.rows else settings.eval_rows or blocks.available, blocks.available)
    exact = writer.objective == "ar"
    passes = 1 if exact else cfg.passes

    def measure(process):
        with progress("bound", ranks) as show:
            return likelihood.evaluate(objective, process, blocks, rows, cfg.micro_batch, ranks, writer.device, writer.autocast, reader(settings, writer.tokens.eos_id), passes, show)

    if cfg.compile:
        objective = Objective(writer.model, writer.posterior).eval()  # the others' passes are of many shapes
        objective.nats_at_positions = torch.compile(objective.nats_at_positions, dynamic=False)
    measured = measure(process)
    nats, (error, noise) = sum(measured.parts), likelihood.standard_error(measured, exact)
    bytes_per_token = float(np.mean([corpora[0].token_bytes[blocks.read(ids)[:, 1:]].mean() for ids in measured.blocks]))
    per_byte = 1 / (math.log(2) * bytes_per_token)
    found = dict(kind="exact NLL" if exact else "NELBO (upper bound)", nats_per_token=nats, error=error, noise_error=noise, bits_per_byte=nats * per_byte,
                 bits_per_byte_error=error * per_byte, perplexity=math.exp(min(nats, 700.0)), bytes_per_token=bytes_per_token, rows=rows, passes=passes,
                 seq_len=settings.seq_len, text=checks.text_digest(corpora, "val"))
    found["own_text"] = found["text"] == writer.record["corpus"].get("val_sha256")  # that of training
    if cfg.bins and not exact:
        curve = likelihood.noise_curve(measured, process, cfg.bins)
        found["curve"] = [dict(zip(("noise_ratio", "nats", "error", "rows"), line)) for line in curve.values()]
        if writer.objective == "uniform":  # the bound's integrand is no cross-entropy: those stand beside it
            both = likelihood.entropy_curves(measure(process._replace(loss="paper", time="uniform")), process, cfg.bins)
            for line, k in zip(found["curve"], curve):
                line |= {name: ce[k][1] if k in ce else math.nan for name, ce in zip(("noisy_ce", "clean_ce"), both)}
    return found, measured


def ordered(cfg, writer, settings, corpora, blocks, objective, ranks):
    """The exact likelihoods of the samplers that write in an order, and the bound on the same blocks: {order: dict}."""
    n, eos = min(cfg.ordered_rows, blocks.available), writer.tokens.eos_id
    ids = data.validation_ids(n, blocks.available)
    mine, found = np.array_split(np.arange(n), ranks.world)[ranks.rank], {}
    process = likelihood.validation_process(writer.process, settings.schedule)
    measured = likelihood.evaluate(objective, process, blocks, n, cfg.micro_batch, ranks, writer.device, writer.autocast, reader(settings, eos), max(8, cfg.passes))
    mean = dict(zip(*(part.tolist() for part in measured.rows)))  # of each block over passes
    bound = np.array([mean[block] for block in ids.tolist()])
    found["bound"] = dict(nats_per_token=float(bound.mean()), error=likelihood.standard_error(measured)[0], rows=n, values=bound.tolist())
    for order in split(cfg.ordered):
        nats = np.zeros(n)
        for start in range(0, len(mine), cfg.micro_batch):
            some = mine[start : start + cfg.micro_batch]
            rows = blocks.read(ids[some])
            documents = blocks.documents(ids[some], rows, eos, False) if settings.document_attention else None
            positions = data.positions_within(documents) if settings.reset_positions else None
            with progress(f"{order}, rows {start + 1} to {start + len(some)} of {len(mine)}", ranks) as show:
                nats[some] = likelihood.chain(objective, rows[:, 1:], order, writer.tokens.mask_id, writer.device, writer.autocast, cfg.seed, some, documents, positions, show).mean(1)
        nats = likelihood.summed(ranks, nats)
        below = nats - bound
        found[order] = dict(nats_per_token=float(nats.mean()), error=error_of(nats), rows=n, below_bound=float(-below.mean()), below_bound_error=error_of(below), values=nats.tolist())
    return found


def error_of(values):
    """Standard error of the mean of independent values, over those that are finite."""
    values = np.asarray(values)[np.isfinite(values)]
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


# ------------------------------------------------------------------------------------------------- what it writes


def written(cfg, writer, most):
    """(ids of the new tokens, ids of all, where the new ones begin) of each text: written here, or read from sample.py's file; of all the last `most`."""
    tokens = writer.tokens
    if not cfg.texts:
        n = cfg.length or most
        order = "ancestral" if cfg.order == "auto" else cfg.order
        how = decode.DecodeConfig(order=order, steps=cfg.steps, block=cfg.block, temperature=cfg.temperature,
                         seed=cfg.seed, cache="prefix" if writer.objective == "ar" else "no")
        rows = []
        for first in range(0, cfg.samples, cfg.micro_batch):
            rows += writer.generate([[tokens.mask_id] * n] * min(cfg.micro_batch, cfg.samples - first), how, first).rows
        return [(row, row, 0) for row in rows]
    found = []
    for number, line in enumerate(filter(str.strip, Path(cfg.texts).read_text(encoding="utf-8").split("\n")), 1):
        try:
            record = json.loads(line)
            text, new = record["text"], record.get("new", record["text"])
            whole, ids = record.get("ids") or tokens.encode(text).tolist(), record.get("new_ids") or tokens.encode(new).tolist()  # bytes that are no UTF-8 lie in the ids only
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{cfg.texts}, line {number}: expected what sample.py --out writes: {{\"text\": …, \"new\": …}}, or the first alone") from None
        if max(whole + ids, default=0) >= tokens.n_vocab:
            raise ValueError(f"{cfg.texts}, line {number}: ids of another tokenizer")
        ids = ids if whole[len(whole) - len(ids) :] == ids else whole  # holes stand anywhere: then the whole text is judged
        if ids:
            found.append((ids, whole[-most:], max(0, min(len(whole), most) - len(ids))))
    if len(found) < 2:
        raise ValueError(f"{cfg.texts} holds fewer than two texts")
    return found


def stated(values):
    """Mean and standard error, of what is finite."""
    values = np.asarray(values)
    return dict(mean=float(np.nanmean(values)), error=error_of(values))


def of_texts(cfg, writer, settings, corpora, judge):
    """What is measured of texts: repetition, entropy, the judge's NLL, and copies of the training text."""
    found = written(cfg, writer, min(writer.seq_len, judge.seq_len if judge else writer.seq_len))
    rows = [new for new, _, _ in found]
    said = dict(texts=len(rows), tokens=sum(map(len, rows)), entropy=stated([frontier.entropy(row) for row in rows]), distinct={n: texts.distinct(rows, n) for n in (1, 2, 3, 4)},
                repetition={n: stated([texts.repetition(row, n) for row in rows]) for n in (2, 3, 4) if max(map(len, rows)) >= n})
    if judge:
        nll = np.empty(len(found))
        for length, skip in sorted({(len(whole), skip) for _, whole, skip in found}):
            some = [i for i, (_, whole, first) in enumerate(found) if (len(whole), first) == (length, skip)]
            nll[some] = frontier.judged(judge, [found[i][1] for i in some], skip)
        said |= dict(judge=cfg.judge, nll=stated(nll), pairs=[[frontier.entropy(row), float(value)] for row, value in zip(rows, nll)])
    if cfg.match:
        blocks = checks.validation_sequences(corpora, writer.seq_len)
        held_out = blocks.read(data.validation_ids(min(len(rows), blocks.available), blocks.available))[:, 1:].tolist()
        held_out = [text[: len(row)] for text, row in zip(held_out, rows)]  # how much of any text stands in the training text
        said["own_text"] = checks.text_digest(corpora, "train") == writer.record["corpus"].get("train_sha256")
        said["copies"] = copied(checks.training_text(settings, corpora), rows, held_out, sorted(map(int, split(cfg.match))))
    return said


def copied(streams, rows, held_out, lengths):
    """How much of texts and of held-out text stands in the training text: for passages of each length the share of all that do, and the share of rows with
    one; and the longest passage. Of what no shorter passage of was found, no longer one is looked for."""
    both, lines = rows + held_out, {name: dict(lengths={}, longest=0) for name in ("texts", "held_out")}
    parts = dict(texts=slice(0, len(rows)), held_out=slice(len(rows), None))
    for n in lengths:
        if max(map(len, both)) < n:
            break
        found = [texts.search(stream, both, n) for stream in streams]
        inside = [np.any(some, axis=0) for some in zip(*(here.inside for here in found))]
        for name, part in parts.items():
            if windows := [w for w in inside[part] if len(w)]:
                lines[name]["lengths"][n] = dict(windows=float(np.concatenate(windows).mean()), rows=float(np.mean([w.any() for w in windows])))
                own = range(*part.indices(len(both)))
                longest = [texts.longest_copy(stream, both, here._replace(places=[p for p in here.places if p[0] in own]), n)[0] for stream, here in zip(streams, found)]
                lines[name]["longest"] = max(lines[name]["longest"], *longest)
        if not any(w.any() for w in inside):
            break
    return lines


# ------------------------------------------------------------------------------------------------- what is shown and kept


def draw_noise(curve, path, title):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4.3))
    axes.errorbar([line["noise_ratio"] for line in curve], [line["nats"] for line in curve], [line["error"] for line in curve], marker="o", ms=3, capsize=2,
                  label="the bound's integrand" if "noisy_ce" in curve[0] else "cross-entropy of masked tokens")
    for name in ("noisy_ce", "clean_ce"):
        if name in curve[0]:
            axes.plot([line["noise_ratio"] for line in curve], [line[name] for line in curve], ".--", label=f"cross-entropy, {name[:5]} tokens")
    axes.set(xlabel="noise ratio r", ylabel="nats per token", title=title, xlim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pm(mean, error, digits=4):
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")


def show(found, run, step):
    """What was measured, in words."""
    if b := found.get("bound"):
        print(f"{b['kind']:<22}{pm(b['nats_per_token'], b['error'])} nats/token   {pm(b['bits_per_byte'], b['bits_per_byte_error'])} bits/byte   perplexity {b['perplexity']:.2f}"
              + (f"   (noise alone ± {b['noise_error']:.4f})" if b["passes"] > 1 else ""))
        logged = [m for m in read_metrics(run) if m.get("step") == step and "val_loss" in m]
        print(f"{'':<22}{b['rows']:,} blocks of {b['seq_len']}" + (f", {b['passes']} passes" if b["passes"] > 1 else "")
              + (f"; train.py logged {logged[-1]['val_loss']:.4f}" if logged and b["own_text"] else "" if b["own_text"] else "; another text than in training"))
    for order, line in found.get("ordered", {}).items():
        print(f"{'exact, ' + order if order != 'bound' else 'bound of these blocks':<22}{pm(line['nats_per_token'], line['error'])} nats/token   "
              + (f"{pm(abs(line['below_bound']), line['below_bound_error'])} {'below' if line['below_bound'] >= 0 else 'above'} their bound" if "below_bound" in line else f"({line['rows']} blocks)"))
    if tasks := found.get("tasks"):
        print(f"{'task':<34}{'shots':>5} {'examples':>8}   score")
        for name, line in tasks.items():
            scores = [f"{key} {pm(value, line.get(f'{key}_stderr', math.nan))}" for key, value in line.items() if isinstance(value, float) and not key.endswith("_stderr")]
            print(f"{name:<34}{line['shots'] if line['shots'] is not None else '':>5} {line['examples'] or '':>8}   {'   '.join(scores)}")
    if t := found.get("texts"):
        print(f"{t['texts']} texts, {t['tokens']:,} tokens: entropy {pm(**digits(t['entropy']))} nats"
              + (f", NLL under {t['judge']} {pm(**digits(t['nll']))} nats/token" if "nll" in t else ""))
        print("   distinct-n   " + "   ".join(f"{n}: {value:.3f}" for n, value in t["distinct"].items()) + "      repeated n-grams within a text   "
              + "   ".join(f"{n}: {value['mean']:.3f}" for n, value in t["repetition"].items()))
        for name, copies in t.get("copies", {}).items():
            whose = "copied from the training text" if t["own_text"] else "in the corpus's training text"  # not this run's
            print(f"   {whose if name == 'texts' else 'of held-out text as long':<30} " + "   ".join(f"{n} tokens: {c['windows']:.1%}" for n, c in copies["lengths"].items())
                  + f"   (longest {copies['longest'] or 'below these'})")


def digits(stated):
    return dict(mean=stated["mean"], error=stated["error"], digits=3)


def main():
    if sys.argv[1:2] == ["compare"]:
        from evaluation import compare

        return compare.main(sys.argv[2:])
    cfg = configurator.load(Config, about=__doc__)
    harness = None
    if cfg.tasks:
        try:
            from evaluation import harness
        except ImportError as problem:
            configurator.fail(f"tasks need lm-evaluation-harness ({problem}): pip install '.[eval]'")
    device = torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    ranks = distributed.init_distributed(device, cfg.timeout)
    code = 1
    try:
        with kernels.prefer_cudnn_attention(device):
            evaluate(cfg, ranks, harness)
        code = 0
    except SystemExit as problem:
        code = problem.code
        raise
    except KeyboardInterrupt:
        print("eval.py: interrupted; nothing was written", file=sys.stderr)
        code = 130
    except Exception:
        if ranks.world == 1:
            raise
        traceback.print_exc()
    finally:
        if ranks.world > 1:
            distributed.shut_down(ranks, code or 0)
    if code:
        raise SystemExit(code)


def evaluate(cfg, ranks, harness):
    """Measure what is asked for, print it and keep it."""
    say = print if ranks.rank == 0 else lambda *_, **__: None
    found, measured, judge = {}, None, None
    try:
        writer = Generator.of(cfg.run_dir, cfg.device, cfg.dtype)
        if cfg.ordered and writer.objective != "masked":
            raise ValueError("ordered: " + ("a uniform model has no chain rule: every position stays uncertain to the end" if writer.objective == "uniform"
                                            else "an autoregressive model has one order, and its exact NLL is what is measured anyway"))
        meaningless = [name for name in ("order", "block") + ("steps",) * (writer.objective == "ar") if getattr(cfg, name) != getattr(Config, name)]
        if meaningless and writer.objective != "masked":
            raise ValueError(f"{', '.join(meaningless)} has no meaning for objective={writer.objective}")
        needs_text = cfg.bound or cfg.ordered or (cfg.samples or cfg.texts) and cfg.match
        settings, corpora, blocks = open_text(cfg, writer) if needs_text else (None, None, None)
        if cfg.judge:
            judge = Generator.of(cfg.judge, cfg.device, "float32")
            if judge.objective != "ar" or (judge.tokens.name, judge.tokens.n_vocab) != (writer.tokens.name, writer.tokens.n_vocab):
                raise ValueError(f"judge={cfg.judge} must be an autoregressive run that reads the same tokens")
            judge.load()
        if cfg.length > min(writer.seq_len, judge.seq_len if judge else writer.seq_len):
            raise ValueError(f"length={cfg.length} is more than the model's context of {writer.seq_len}" + (f", or the judge's of {judge.seq_len}" if judge else ""))
        opened = harness.open_tasks(split(cfg.tasks), cfg.task_path, cfg.task_data, partial(say, file=sys.stderr)) if cfg.tasks else None
        step = writer.record["step"]
        own = not needs_text or checks.text_digest(corpora, "val") == writer.record["corpus"].get("val_sha256")
        out = Path(cfg.out or writer.folder.parent / (f"eval_{step:08d}" + ("" if own else "_" + "_".join(corpus.folder.name for corpus in corpora))))
        if ranks.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
        writer.load()
        objective = Objective(writer.model, writer.posterior).eval()
        say(f"{writer.folder}: {writer.objective}, {writer.model.n_params():,} parameters, step {step}, {cfg.dtype} on {ranks.world} × {writer.device.type}", flush=True)
        with torch.no_grad():
            if cfg.bound:
                found["bound"], measured = bound(cfg, writer, settings, corpora, blocks, objective, ranks)
            if cfg.ordered:
                found["ordered"] = ordered(cfg, writer, settings, corpora, blocks, objective, ranks)
            if cfg.tasks:
                order = "low_confidence" if cfg.order == "auto" else cfg.order
                model = harness.NanoQuokka(writer=writer, objective=objective, ranks=ranks, masks=cfg.masks, tokens=cfg.pass_tokens, seed=cfg.seed,
                                           order=order, steps=cfg.steps, block=cfg.block)
                found["tasks"] = harness.run_tasks(model, opened, cfg.limit, cfg.fewshot) or {}
                for line in found["tasks"].values():
                    line |= dict(limit=cfg.limit or None, masks=cfg.masks)
            if (cfg.samples or cfg.texts) and ranks.rank == 0:
                found["texts"] = of_texts(cfg, writer, settings, corpora, judge)
    except (ValueError, OSError) as problem:
        configurator.fail(str(problem), everywhere=ranks.rank > 0)
    if ranks.rank:
        return
    show(found, writer.folder.parent, step)
    try:
        keep(cfg, found, measured, out, writer, step)
    except OSError as problem:
        configurator.fail(str(problem))


def finite(thing):
    """The same for JSON, which knows no nan: null."""
    if isinstance(thing, dict):
        return {key: finite(value) for key, value in thing.items()}
    if isinstance(thing, list):
        return [finite(value) for value in thing]
    return None if isinstance(thing, float) and not math.isfinite(thing) else thing


def keep(cfg, found, measured, out, writer, step):
    """eval.json, in which other things that were measured of the same checkpoint stay, evaluation.npz, and the noise curve."""
    path, before = out / "eval.json", {}
    with contextlib.suppress(OSError, ValueError):
        before = json.loads(path.read_text())
    if not isinstance(before, dict) or before.get("checkpoint") != str(writer.folder.resolve()):
        before = {}
    was, b = before.get("bound"), found.get("bound")
    if was and b and was["text"] == b["text"] and was["rows"] * was["passes"] > b["rows"] * b["passes"]:  # a passing look doesn't cost the better measurement
        print(f"kept in {path}: the bound from {was['rows']:,} rows in {was['passes']} passes; with --out, this one has a place of its own")
        del found["bound"]
        measured = None
    about = dict(checkpoint=str(writer.folder.resolve()), step=step, objective=writer.objective, parameters=writer.model.n_params(), device=str(writer.device), torch=torch.__version__)
    report = before | about | found | dict(settings=before.get("settings", {}) | {name: vars(cfg) for name in found})
    for name in {"tasks", "ordered"} & set(found):  # each task and order for itself
        report[name] = before.get(name, {}) | found[name]
    path.with_suffix(".tmp").write_text(json.dumps(finite(report), indent=1))
    path.with_suffix(".tmp").replace(path)
    names = [path.name]
    if measured:
        b = found["bound"]
        write_rows(out / "evaluation.npz", measured, step=step, **{name: b[name] for name in ("text", "seq_len", "passes", "error", "bytes_per_token")})
        names.append("evaluation.npz")
    if curve := found.get("bound", {}).get("curve"):
        with open(out / "noise.csv", "w", newline="") as file:
            table = csv.DictWriter(file, list(curve[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(curve)
        draw_noise(curve, out / "noise.png", f"{writer.folder.parent.name}, step {step}")
        names += ["noise.csv", "noise.png"]
    print(f"written to {out}: {', '.join(names)}")


if __name__ == "__main__":
    main()
