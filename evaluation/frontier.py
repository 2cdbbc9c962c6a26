"""Speed against quality of a model's sampling: every order, number of steps and temperature, judged by another model.

    python sample.py --frontier --run_dir=runs/quickstart --judge=runs/quickstart_ar
    python sample.py --frontier --run_dir=runs/quickstart --judge=runs/quickstart_ar --orders=low_confidence,threshold --block=16 --caches=no,dual

For each way of decoding: tokens/s, tokens per pass that a sample alone would have needed (in a batch all wait for the slowest), the judge's exact NLL of the samples in nats per token with its standard error, and
the samples' entropy, without which the NLL says nothing: a sampler that repeats itself has a low one. Held-out text and
samples of the judge itself, which it likes best, stand beside. Writes frontier.json and frontier.png into the run folder.
"""

import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import configurator
import data
from configurator import setting, split
from corpus import tokenfiles
from sampling.decode import CONFIDENT, PLANNED, DecodeConfig


@dataclass
class Config:
    run_dir: str = setting("runs/quickstart", "the run or checkpoint that writes")
    judge: str = setting("", "the autoregressive run or checkpoint that judges; same tokenizer, best never seen by the writer")
    corpus: str = setting("", "where the held-out text beside the samples comes from (empty: the writer's corpus, none: without)")
    orders: str = setting("", "of decoding, with commas; ancestral:capped, :rescaled and :confidence mask again (empty: all that suit the model)")
    steps: str = setting("", "with commas (empty: 1/16, 1/8, 1/4, 1/2 of the tokens and all of them; with remasking twice as many, too)")
    thresholds: str = setting("0.3,0.5,0.7,0.9", "of order=threshold, with commas")
    beside: Literal["random", "surest"] = setting("random", "of order=threshold: what opens beside what is sure enough")
    temperatures: str = setting("1.0", "with commas")
    caches: str = setting("no", "of no, prefix and dual, with commas; they need block")
    block: int = setting(0, "new tokens that are finished before the next ones begin (0: all at once)", low=0)
    eta: float = setting(0.04, "of capped and rescaled remasking", above=0, high=1)
    top_k: int = setting(0, "keep the k likeliest tokens (0: all)", low=0)
    top_p: float = setting(1.0, "keep the likeliest tokens that hold this probability together", above=0, high=1)
    length: int = setting(0, "tokens of a sample (0: the smaller of the two contexts)", low=0)
    prompt: int = setting(0, "tokens of held-out text in front of each sample, which are not judged", low=0)
    samples: int = setting(64, "of each way of decoding", low=2)
    micro_batch: int = setting(64, "rows decoded at once", low=1)
    seed: int = setting(0, "of the samples", low=0, high=2**62)
    compile: bool = setting(False, "torch.compile the passes")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "of the writer's matrix products")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    out: str = setting("", "folder for frontier.json and frontier.png (empty: the writer's)")

    def problems(self):
        wrong = []
        for name, kind, fits, wanted in (("steps", int, lambda x: x >= 1, "whole numbers of at least 1"), ("temperatures", float, lambda x: 0 <= x < math.inf, "numbers of at least 0"),
                                         ("thresholds", float, lambda x: 0 < x <= 1, "numbers in (0, 1]")):
            try:
                good = all(fits(kind(part)) for part in split(getattr(self, name)))
            except ValueError:
                good = False
            if not good or (name == "temperatures" and not split(self.temperatures)):
                wrong.append(f"{name}={getattr(self, name)}: expected {wanted}, with commas between")
        known = [*PLANNED, *CONFIDENT, *(f"ancestral:{kind}" for kind in ("capped", "rescaled", "confidence"))]
        wrong += [f"orders: there is no '{order}'; choose from {', '.join(known)}" for order in split(self.orders) if order not in known]
        wrong += [f"caches: there is no '{cache}'; choose from no, prefix, dual" for cache in split(self.caches) if cache not in ("no", "prefix", "dual")]
        if set(split(self.caches)) - {"no"} and not self.block:
            wrong.append("caches need block: what is outside of it is kept")
        if not self.judge:
            wrong.append("judge: name an autoregressive run that says how likely the samples are")
        return wrong


def ways(cfg, objective, n):
    """The ways of decoding n tokens that are asked for, as {name: How}; raises ValueError."""
    shared = DecodeConfig(top_k=cfg.top_k, top_p=cfg.top_p, seed=cfg.seed, compile=cfg.compile)
    heats = [float(t) for t in split(cfg.temperatures)]
    if objective == "ar":
        if cfg.orders or cfg.steps or cfg.block:
            raise ValueError("an autoregressive model has no orders, steps or blocks to compare")
        return {named("left to right", temperature=t, heats=heats): shared._replace(temperature=t, cache="prefix") for t in heats}
    orders = split(cfg.orders) or (["ancestral"] if objective == "uniform" else [*PLANNED, *CONFIDENT, "ancestral:rescaled"])
    if objective == "uniform" and (orders != ["ancestral"] or cfg.block):
        raise ValueError("a uniform model decodes in its reverse process only: orders=ancestral, without block")
    steps = [int(part) for part in split(cfg.steps)]
    if not steps:
        steps = sorted({max(1, n // part) for part in (16, 8, 4, 2, 1)})
    found = {}
    for text in orders:
        order, _, remask = text.partition(":")
        for cache in split(cfg.caches):
            for t in heats:
                how = shared._replace(order=order, beside=cfg.beside, remask=remask or "no", eta=cfg.eta, temperature=t, block=cfg.block, cache=cache)
                if order == "threshold":
                    several = {f"above {part}": how._replace(threshold=float(part)) for part in split(cfg.thresholds)}
                elif order == "first_hitting":
                    several = {"": how}
                else:
                    more = [] if cfg.steps or not remask else [2 * n]
                    several = {f"{count} steps": how._replace(steps=count) for count in steps + more}
                found |= {named(text, what, cache, t, heats): way for what, way in several.items()}
    return found


def named(order, what="", cache="no", temperature=1.0, heats=()):
    return ", ".join(filter(None, (order, what, f"{cache} cache" * (cache != "no"), f"T={temperature:g}" * (len(heats) > 1 or temperature != 1))))


# -------------------------------------------------------------------------------------------------- what is measured


@torch.no_grad()
def judged(judge, rows, skip, micro_batch=32):
    """The judge's exact NLL of each row's tokens after the first `skip`, in nats per token. rows: lists of one length → (N,)."""
    ids = torch.tensor(rows, device=judge.device)
    read = torch.nn.functional.pad(ids[:, :-1], (1, 0), value=judge.tokens.eos_id)  # documents begin after a separator
    nats = []
    for x, y in zip(read.split(micro_batch), ids.split(micro_batch)):
        logits = judge.model.logits(judge.model(x))
        nats.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none")[:, skip:].double().mean(1))
    return torch.cat(nats).cpu().numpy()


def entropy(row):
    """Entropy in nats of the tokens' frequencies within a sample."""
    counts = np.array(list(Counter(row).values()))
    return float(-(counts / len(row) * np.log(counts / len(row))).sum())


def measured(judge, rows, skip, seconds=None, passes=None):
    """What is said of samples: NLL with standard error, perplexity and entropy, in one dict; speed where it was taken."""
    nll, entropies = judged(judge, rows, skip), np.array([entropy(row[skip:]) for row in rows])
    new = len(rows[0]) - skip
    said = dict(nll=float(nll.mean()), nll_error=float(nll.std(ddof=1) / math.sqrt(len(nll))), perplexity=float(np.exp(nll.mean())),
                entropy=float(entropies.mean()), entropy_error=float(entropies.std(ddof=1) / math.sqrt(len(entropies))), samples=len(rows), length=new)
    if seconds:
        said |= dict(tokens_per_s=len(rows) * new / seconds, passes=passes, tokens_per_pass=new / passes)
    return said


def decoded(writer, rows, how, micro_batch):
    """(rows, seconds, passes that a row by itself needs, gap) of decoding `rows`."""
    out, passes, gap = [], 0, None
    start = time.perf_counter()
    for first in range(0, len(rows), micro_batch):
        part = writer.generate(rows[first : first + micro_batch], how, first)
        out, passes, gap = out + part.rows, passes + part.own * len(part.rows), gap or part.gap
    return out, time.perf_counter() - start, passes / len(rows), gap()


def draw(found, beside, path, title):
    """NLL against speed and against entropy, as a PNG; the frontier is what nothing beats in both speed and NLL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (fast, rich) = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    orders = list(dict.fromkeys(line["order"] for line in found))
    for k, order in enumerate(orders):
        lines = [line for line in found if line["order"] == order]
        for axes, key in ((fast, "tokens_per_s"), (rich, "entropy")):
            axes.errorbar([line[key] for line in lines], [line["nll"] for line in lines], [line["nll_error"] for line in lines], fmt="os^Dvp*X"[k % 8],
                          color=f"C{k % 10}", label=order, alpha=0.8, capsize=2)
    best, level = [], math.inf
    for line in sorted(found, key=lambda line: -line["tokens_per_s"]):
        if line["nll"] < level:
            best.append(line)
            level = line["nll"]
    fast.step([line["tokens_per_s"] for line in best], [line["nll"] for line in best], where="post", color="0.6", zorder=0)
    for line, style in zip(beside, ("--", ":")):
        fast.axhline(line["nll"], color="k", linestyle=style, linewidth=1)
        rich.plot(line["entropy"], line["nll"], "k*" if style == "--" else "kx", markersize=10, label=line["name"])
    fast.set(xscale="log", xlabel="tokens/s", ylabel="NLL under the judge, nats per token")
    rich.set(xlabel="entropy of the tokens of a sample, nats (low: it repeats itself)")
    rich.legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv):
    from sampling.generator import Generator

    cfg = configurator.load(Config, argv, about=__doc__)
    try:
        writer, judge = Generator.of(cfg.run_dir, cfg.device, cfg.dtype), Generator.of(cfg.judge, cfg.device, "float32")
        if judge.objective != "ar":
            raise ValueError(f"judge={cfg.judge} is a {judge.objective} model; its NLL would not be exact, so name an autoregressive one")
        if (judge.tokens.name, judge.tokens.n_vocab) != (writer.tokens.name, writer.tokens.n_vocab):
            raise ValueError(f"the judge reads tokens of '{judge.tokens.name}', the writer writes those of '{writer.tokens.name}'")
        most = min(writer.seq_len, judge.seq_len)
        n = cfg.length or most - cfg.prompt
        if not 0 < n <= most - cfg.prompt:
            raise ValueError(f"prompt and length are {cfg.prompt + n} tokens together, and the smaller context is {most}")
        if set(split(cfg.caches)) - {"no"} and writer.record["model"].get("shift"):
            raise ValueError("caches are not for a shifted model, whose predictions stand one position before what is written")
        asked = ways(cfg, writer.objective, n)
        corpus = cfg.corpus or writer.record["settings"]["corpus"]
        held_out = None
        if corpus != "none":
            try:
                stream = tokenfiles.load_corpus(corpus, writer.record["settings"].get("tokenizer", ""), writer.record["settings"].get("val_share", 0.0)).val
                held_out = data.Sequences(stream, cfg.prompt + n, cfg.seed, n_vocab=writer.tokens.n_vocab, what="validation").rows(np.arange(cfg.samples))[:, 1:].tolist()
            except (ValueError, OSError) as problem:
                raise ValueError(f"corpus={corpus}: {problem} (or say --corpus=none, without held-out text)") from None
        elif cfg.prompt:
            raise ValueError("prompts are held-out text, so they need a corpus")
        out = Path(cfg.out or (cfg.run_dir if Path(cfg.run_dir).is_dir() else "."))
        out.mkdir(parents=True, exist_ok=True)
        writer.load(), judge.load()
    except (ValueError, OSError) as problem:
        configurator.fail(str(problem))
    hole = [writer.tokens.mask_id] * n
    rows = [row[: cfg.prompt] + hole for row in held_out] if held_out else [hole] * cfg.samples
    beside = [dict(name="held-out text", **measured(judge, held_out, cfg.prompt))] if held_out else []
    own = decoded(judge, rows, DecodeConfig(seed=cfg.seed, cache="prefix"), cfg.micro_batch)
    beside.append(dict(name="the judge's own samples", **measured(judge, own[0], cfg.prompt, *own[1:3])))
    width = max(map(len, [*asked, *(line["name"] for line in beside)]))
    print(f"{cfg.samples} samples of {n} tokens; NLL is {cfg.judge}'s, entropy that of a sample's tokens")
    print(f"{'':{width}}  tokens/s  per pass    NLL, nats/token  perplexity  entropy, nats")

    def show(line):
        speed = f"{line['tokens_per_s']:8.0f}  {line['tokens_per_pass']:8.2f}" if "tokens_per_s" in line else " " * 18
        print(f"{line['name']:{width}}  {speed}  {line['nll']:8.3f} ± {line['nll_error']:.3f}  {line['perplexity']:10.2f}  {line['entropy']:6.3f} ± {line['entropy_error']:.3f}", flush=True)

    for line in beside:
        show(line)
    found = []
    for name, how in asked.items():
        if cfg.compile or not found:  # once in vain: what is set up by the first pass is no part of the speed
            decoded(writer, rows[: cfg.micro_batch], how, cfg.micro_batch)
        written, seconds, passes, gap = decoded(writer, rows, how, cfg.micro_batch)
        line = dict(name=name, order=named(name.split(",")[0], cache=how.cache), how=how._asdict(), **measured(judge, written, cfg.prompt, seconds, passes))
        line |= dict(cache_kl=gap[0], cache_other=gap[1]) if gap else {}
        found.append(line)
        show(line)
    report = dict(run=str(cfg.run_dir), judge=str(cfg.judge), settings=vars(cfg), device=str(writer.device), threads=torch.get_num_threads(),
                  torch=torch.__version__, beside=beside, ways=found)
    (out / "frontier.json").write_text(json.dumps(report, indent=2))
    draw(found, beside, out / "frontier.png", f"{cfg.run_dir}: {cfg.samples} samples of {n} tokens, judged by {cfg.judge}")
    print(f"written to {out / 'frontier.json'} and {out / 'frontier.png'}")
