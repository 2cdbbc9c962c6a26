"""Speed against quality of a model's sampling: each order, number of steps and temperature, under a judge.

    python eval.py frontier --run_dir=runs/quickstart --judge=runs/quickstart_ar
    python eval.py frontier --judge=runs/quickstart_ar --orders=margin,threshold --block=16 --caches=no,dual

For each way of decoding: tokens/s; tokens per pass that a sample alone would have needed (in a batch all
wait for the slowest); the judge's exact NLL of the samples in nats per token with its standard error; and
the samples' entropy, without which the NLL says nothing: a sampler that repeats itself has a low one.
Held-out text and samples of the judge itself, which it likes best, stand beside. Writes frontier.json and
frontier.png into the run folder.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

import configurator
import terminal
from configurator import setting, split
from configurator.format import plot_text
from corpus.files import check_no_pipes
from evaluation.measure import mean_and_error, open_validation
from evaluation.texts import entropy, judge_nll, open_judge
from sampling.decode import CONFIDENCE_ORDERS, PLANNED_ORDERS, DecodeConfig
from sampling.generator import Generator
from sampling.predictor import CacheGap
from training import compiler
from training.corpora import validation_sequences

REMASKING = ("capped", "rescaled", "confidence")
CACHES = ("no", "prefix", "dual")


@dataclass
class Config:
    # who writes, who judges
    run_dir: str = setting("runs/quickstart", "the run or checkpoint that writes")
    judge: str = setting(
        "", "the autoregressive run or checkpoint that judges; same tokenizer, best never seen by the writer")
    corpus: str = setting(
        "", "of the held-out text beside the samples (empty: the writer's, none: without)")
    # ways of decoding
    orders: str = setting(
        "", "of decoding, with commas; ancestral:capped, :rescaled and :confidence mask again "
        "(empty: all that suit the model)")
    steps: str = setting(
        "", "with commas (empty: 1/16, 1/8, 1/4, 1/2 of the tokens and all of them; "
        "with remasking twice as many, too)")
    thresholds: str = setting("0.3,0.5,0.7,0.9", "of order=threshold, with commas")
    fallback: Literal["random", "surest"] = setting(
        "random", "of order=threshold: which position is unmasked in any case")
    temperatures: str = setting("1.0", "with commas")
    caches: str = setting("no", "of no, prefix and dual, with commas; they need block")
    block: int = setting(0, "new tokens that are finished before the next ones begin (0: all at once)", low=0)
    eta: float = setting(0.04, "of capped and rescaled remasking", above=0, high=1)
    top_k: int = setting(0, "keep the k likeliest tokens (0: all)", low=0)
    top_p: float = setting(
        1.0, "keep the likeliest tokens that hold this probability together", above=0, high=1)
    # the samples
    length: int = setting(0, "tokens of a sample (0: the smaller of the two contexts)", low=0)
    prompt: int = setting(0, "tokens of held-out text in front of each sample, which are not judged", low=0)
    samples: int = setting(64, "of each way of decoding", low=2, high=10**6)
    seed: int = setting(0, "of the samples", low=0, high=2**62)
    # the machine
    micro_batch: int = setting(64, "rows decoded at once", low=1)
    compile: bool = setting(False, "torch.compile the passes")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "of the writer's matrix products")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    weights: Literal["auto", "ema", "raw"] = setting(
        "auto", "the averaged ones of a run with ema, those of training, or the first that it has")
    out: str = setting("", "folder for frontier.json and frontier.png (empty: the writer's)")

    NEEDS = {"caches": "block"}

    def problems(self):
        """Settings that cannot be, one line each."""
        problems = []
        for name, kind, fits, expected in (
            ("steps", int, lambda x: x >= 1, "whole numbers of at least 1"),
            ("temperatures", float, lambda x: 0 <= x < math.inf, "numbers of at least 0"),
            ("thresholds", float, lambda x: 0 < x <= 1, "numbers in (0, 1]"),
        ):
            text = getattr(self, name)
            is_missing = name == "temperatures" and not split(text)
            if is_missing or not are_numbers(text, kind, fits):
                problems.append(f"{name}={text}: expected {expected}, with commas between")
        known = [*PLANNED_ORDERS, *CONFIDENCE_ORDERS, *(f"ancestral:{kind}" for kind in REMASKING)]
        for order in split(self.orders):
            if order not in known:
                problems.append(f"orders: there is no '{order}'; choose from {', '.join(known)}")
        for cache in split(self.caches):
            if cache not in CACHES:
                problems.append(f"caches: there is no '{cache}'; choose from {', '.join(CACHES)}")
        if not self.judge:
            problems.append("judge: name an autoregressive run that says how likely the samples are")
        return problems


def are_numbers(text, kind, fits):
    """Whether the parts of a list setting are numbers of a `kind` that are as `fits` says."""
    try:
        return all(fits(kind(part)) for part in split(text))
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------- ways of decoding


def decode_configs(cfg, objective, n, diffusion_block=0):
    """The ways of decoding n tokens that the settings ask for: {name: DecodeConfig}; raises ValueError."""
    shared = DecodeConfig(top_k=cfg.top_k, top_p=cfg.top_p, seed=cfg.seed, compile=cfg.compile)
    temperatures = [float(part) for part in split(cfg.temperatures)]
    several = len(temperatures) > 1
    if objective == "ar":
        if cfg.orders or cfg.steps or cfg.block:
            raise ValueError("an autoregressive model has no orders, steps or blocks to compare")
        configs = [shared._replace(temperature=t, cache="prefix") for t in temperatures]
        return {name_of("left to right", "", "no", config.temperature, several): config for config in configs}

    default = [*PLANNED_ORDERS, *CONFIDENCE_ORDERS, "ancestral:rescaled"]
    orders = split(cfg.orders) or (["ancestral"] if objective == "uniform" else default)
    if objective == "uniform" and (orders != ["ancestral"] or cfg.block):
        raise ValueError("a uniform model decodes in its reverse process only: "
                         "orders=ancestral, without block")
    if diffusion_block and (cfg.block or "dual" in split(cfg.caches)):
        raise ValueError("a model of block diffusion writes in blocks of its own, and its cache is exact: "
                         "leave block and caches out")
    caches = ["prefix"] if diffusion_block else split(cfg.caches)
    configs = {}
    for name in orders:
        order, _, remask = name.partition(":")
        config = shared._replace(
            order=order, fallback=cfg.fallback, remask=remask or "no", eta=cfg.eta, block=cfg.block)
        for cache in caches:
            for t in temperatures:
                for budget, config_of_budget in with_budgets(cfg, config, n).items():
                    full_name = name_of(name, budget, cache, t, several)
                    configs[full_name] = config_of_budget._replace(cache=cache, temperature=t)
    return configs


def with_budgets(cfg, config, n):
    """A DecodeConfig with each number of steps, or each threshold: {name: DecodeConfig}."""
    if config.order == "threshold":
        return {f"above {part}": config._replace(threshold=float(part)) for part in split(cfg.thresholds)}
    if config.order == "first_hitting":
        return {"": config}
    steps = [int(part) for part in split(cfg.steps)]
    if not steps:
        steps = sorted({max(1, n // part) for part in (16, 8, 4, 2, 1)})
        if config.remask != "no":
            steps.append(2 * n)
    return {f"{count} steps": config._replace(steps=count) for count in steps}


def name_of(order, budget="", cache="no", temperature=1.0, several=False):
    """The name of a way of decoding; `several`: temperatures differ, so it says its own."""
    parts = [order, budget]
    if cache != "no":
        parts.append(f"{cache} cache")
    if several or temperature != 1:
        parts.append(f"T={temperature:g}")
    return ", ".join(part for part in parts if part)


# ----------------------------------------------------------------------------------------------- measurements


class Decoding(NamedTuple):
    """Rows that a model has written, and what that cost."""

    rows: list
    seconds: float
    passes: float  # that a row by itself needs
    cache_gap: CacheGap | None


def decode(generator, rows, config, micro_batch):
    """Write what is masked in `rows`: a Decoding."""
    results = []
    start = time.perf_counter()
    for first in range(0, len(rows), micro_batch):
        results.append(generator.generate(rows[first : first + micro_batch], config, first))
    seconds = time.perf_counter() - start
    passes = sum(result.passes_per_row * len(result.rows) for result in results) / len(rows)
    all_rows = [row for result in results for row in result.rows]
    return Decoding(all_rows, seconds, passes, results[0].cache_gap())


def measure(judge, rows, skip):
    """NLL, perplexity and entropy of each row's tokens after the first `skip`, with errors, as a dict."""
    nll = judge_nll(judge, rows, skip)
    nll, entropies = mean_and_error(nll), mean_and_error([entropy(row[skip:]) for row in rows])
    return dict(
        nll=nll["mean"],
        nll_error=nll["error"],
        perplexity=float(np.exp(nll["mean"])),
        entropy=entropies["mean"],
        entropy_error=entropies["error"],
        samples=len(rows),
        length=len(rows[0]) - skip,
    )


def measure_decoding(judge, decoding, skip):
    """`measure` and the speed of a Decoding, as a dict."""
    new = len(decoding.rows[0]) - skip
    speed = dict(tokens_per_s=len(decoding.rows) * new / decoding.seconds, passes=decoding.passes,
                 tokens_per_pass=new / decoding.passes)
    return measure(judge, decoding.rows, skip) | speed


def print_line(line, width):
    speed = " " * 18
    if "tokens_per_s" in line:
        speed = f"{line['tokens_per_s']:8.0f}  {line['tokens_per_pass']:8.2f}"
    nll = f"{line['nll']:8.3f} ± {line['nll_error']:.3f}"
    entropy = f"{line['entropy']:6.3f} ± {line['entropy_error']:.3f}"
    print(f"{line['name']:{width}}  {speed}  {nll}  {line['perplexity']:10.2f}  {entropy}", flush=True)


def draw(lines, references, path, title):
    """Draw NLL against speed and against entropy, as .png; the step line is what nothing beats in both."""
    from matplotlib.figure import Figure  # it takes half a second

    figure = Figure(figsize=(13, 5.5), layout="tight")
    by_speed, by_entropy = figure.subplots(1, 2, sharey=True)
    for k, order in enumerate(dict.fromkeys(line["order"] for line in lines)):
        members = [line for line in lines if line["order"] == order]
        nll, error = [line["nll"] for line in members], [line["nll_error"] for line in members]
        for axes, key in ((by_speed, "tokens_per_s"), (by_entropy, "entropy")):
            axes.errorbar([line[key] for line in members], nll, error, fmt="os^Dvp*X"[k % 8],
                          color=f"C{k % 10}", label=order, alpha=0.8, capsize=2)

    frontier, lowest = [], math.inf
    for line in sorted(lines, key=lambda line: -line["tokens_per_s"]):
        if line["nll"] < lowest:
            frontier.append(line)
            lowest = line["nll"]
    by_speed.step([line["tokens_per_s"] for line in frontier], [line["nll"] for line in frontier],
                  where="post", color="0.6", zorder=0)
    for line, style, marker in zip(references, ("--", ":"), ("k*", "kx")):
        by_speed.axhline(line["nll"], color="k", linestyle=style, linewidth=1)
        by_entropy.plot(line["entropy"], line["nll"], marker, markersize=10, label=line["name"])
    by_speed.set(xscale="log", xlabel="tokens/s", ylabel="NLL under the judge, nats per token")
    by_entropy.set(xlabel="entropy of the tokens of a sample, nats (low: it repeats itself)")
    by_entropy.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------------------- main


def sample_length(cfg, generator, judge):
    """New tokens of each sample; raises ValueError where they don't fit into both contexts."""
    max_length = min(generator.seq_len, judge.seq_len)
    n = cfg.length or max_length - cfg.prompt
    if not 0 < n <= max_length - cfg.prompt:
        raise ValueError(f"prompt and length are {cfg.prompt + n} tokens together, "
                         f"and the smaller context is {max_length}")
    return n


def held_out_rows(cfg, generator, length):
    """Rows of held-out text, or None without; raises ValueError."""
    if cfg.corpus == "none":
        if cfg.prompt:
            raise ValueError("prompts are held-out text, so they need a corpus")
        return None
    try:
        validation = open_validation(generator, cfg.corpus)
        validation.settings.seq_len = length
        sequences = validation_sequences(validation.settings, validation.corpora)
        sequences.seed = cfg.seed
        return sequences.rows(np.arange(cfg.samples))[:, 1:].tolist()
    except (ValueError, OSError) as problem:
        corpus = cfg.corpus or generator.record["settings"]["corpus"]
        hint = "or say --corpus=none, without held-out text"
        raise ValueError(f"corpus={corpus}: {problem} ({hint})") from None


class Inputs(NamedTuple):
    """Who writes, who judges, what is written how, and the folder for what is measured."""

    generator: Generator
    judge: Generator
    configs: dict  # {name: DecodeConfig}
    held_out: list | None  # rows of text
    rows: list  # to be written: a prompt and masks
    n: int  # masks of a row
    out: Path


def open_inputs(cfg):
    """Open what the settings name and make the folder; exit with a line if something is wrong with them."""
    try:
        generator = Generator.from_checkpoint(cfg.run_dir, cfg.device, cfg.dtype, cfg.weights)
        judge = open_judge(cfg.judge, cfg.device, generator)
        n = sample_length(cfg, generator, judge)
        if set(split(cfg.caches)) - {"no"} and generator.is_shifted:
            raise ValueError("caches are not for a shifted model, whose predictions stand one position "
                             "before what is written")
        configs = decode_configs(cfg, generator.objective, n, generator.process.block)
        held_out = held_out_rows(cfg, generator, cfg.prompt + n)
        if cfg.compile:
            compiler.check(generator.device)
        out = Path(cfg.out or (cfg.run_dir if Path(cfg.run_dir).is_dir() else "."))
        out.mkdir(parents=True, exist_ok=True)
        check_no_pipes(out)
        generator.load_weights()
        judge.load_weights()
    except (ValueError, OSError) as problem:
        configurator.fail(str(problem))
    holes = [generator.tokenizer.mask_id] * n
    rows = [row[: cfg.prompt] + holes for row in held_out] if held_out else [holes] * cfg.samples
    return Inputs(generator, judge, configs, held_out, rows, n, out)


def measure_references(cfg, inputs):
    """Held-out text, if there is any, and the judge's own samples, which it likes best: a list of dicts."""
    references = []
    if inputs.held_out:
        references.append(dict(name="held-out text", **measure(inputs.judge, inputs.held_out, cfg.prompt)))
    config = DecodeConfig(seed=cfg.seed, cache="prefix")
    own_samples = decode(inputs.judge, inputs.rows, config, cfg.micro_batch)
    figures = measure_decoding(inputs.judge, own_samples, cfg.prompt)
    return [*references, dict(name="the judge's own samples", **figures)]


def measure_config(cfg, inputs, name, config, is_first):
    """What one way of decoding costs and gives, as a dict."""
    if cfg.compile or is_first:  # once in vain: what the first pass sets up is no part of the speed
        decode(inputs.generator, inputs.rows[: cfg.micro_batch], config, cfg.micro_batch)
    decoding = decode(inputs.generator, inputs.rows, config, cfg.micro_batch)
    order = name_of(name.split(",")[0], cache=config.cache)
    figures = measure_decoding(inputs.judge, decoding, cfg.prompt)
    line = dict(name=name, order=order, how=config._asdict(), **figures)
    if decoding.cache_gap:
        line |= dict(cache_kl=decoding.cache_gap.kl, cache_other=decoding.cache_gap.other)
    return line


def write_report(cfg, inputs, references, lines):
    """Write frontier.json and frontier.png, and print their names."""
    report = dict(run=str(cfg.run_dir), judge=str(cfg.judge), settings=vars(cfg),
                  device=str(inputs.generator.device), threads=torch.get_num_threads(),
                  torch=torch.__version__, beside=references, ways=lines)
    out = inputs.out
    (out / "frontier.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    title = f"{cfg.run_dir}: {cfg.samples} samples of {inputs.n} tokens, judged by {cfg.judge}"
    with terminal.optional(f"{out / 'frontier.png'} can't be drawn"):
        draw(lines, references, out / "frontier.png", plot_text(title))
    print(f"written to {out / 'frontier.json'} and {out / 'frontier.png'}")


def main(argv):
    cfg = configurator.load(Config, argv, about=__doc__)
    terminal.keep_going()
    inputs = open_inputs(cfg)
    references = measure_references(cfg, inputs)
    width = max(map(len, [*inputs.configs, *(line["name"] for line in references)]))
    print(f"{cfg.samples} samples of {inputs.n} tokens; NLL is {cfg.judge}'s, "
          "entropy that of a sample's tokens")
    print(f"{'':{width}}  tokens/s  per pass    NLL, nats/token  perplexity  entropy, nats")
    for line in references:
        print_line(line, width)
    lines = []
    for name, config in inputs.configs.items():
        lines.append(measure_config(cfg, inputs, name, config, is_first=not lines))
        print_line(lines[-1], width)
    write_report(cfg, inputs, references, lines)
