"""How fast `sample.py` and `eval.py` are: against the algorithms that others publish, with and without caches.

    python bench_sampling.py                                      # all parts, some twenty minutes on two CPU cores → results/sampling_cpu.md
    python bench_sampling.py --parts=masked --vocab=257

The parts: `masked` (against the published algorithm at 256 tokens, 64 steps, batch 8, temperature 0, where both write the same),
`cache` (blocks of a masked model with and without cache, 256 tokens), `ar` (with and without keys and values kept, 512 tokens),
`answers` (multiple choice with 128 masks: one request after the other as published, and requests batched together).
Random weights: speed depends on shapes alone. Rivals take turns, and ratios are medians of the rounds' ratios.
"""

import platform
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import configurator
import diffusion
from configurator import setting
from evaluation import likelihood
from evaluation.likelihood import Question, Scorer
from model import ModelConfig, Transformer
from sampling import decode
from sampling.decode import DecodeConfig
from training import update

PARTS = ("masked", "cache", "ar", "answers")


@dataclass
class Config:
    parts: str = setting(",".join(PARTS), "of: masked, cache, ar, answers")
    vocab: int = setting(50_257, "text tokens of the parts `masked` and `answers` (GPT-2's, as the published models have)", low=2)
    n_layer: int = setting(4, "blocks of the network", low=1)
    d_model: int = setting(128, "its width", low=32)
    batch: int = setting(8, "rows", low=1)
    rounds: int = setting(1, "turns of each rival, after one to warm up", low=1)
    device: Literal["cpu", "cuda"] = setting("cpu", "where to run")
    out: str = setting("results/sampling_cpu.md", "file to write (empty: only print)")

    def problems(self):
        unknown = set(configurator.split(self.parts)) - set(PARTS)
        return [f"parts: choose from {', '.join(PARTS)}, not {', '.join(sorted(unknown))}"] if unknown else []


# ------------------------------------------------------------------------------- the algorithm that others publish


@torch.no_grad()
def as_published(model, prompt, steps, new, block, temperature=0.0, remasking="low_confidence", cfg=0.0, seed=0):
    """Sampling as LLaDA and the Quokka backend publish it, said in our words: the whole head at every position, softmax in float64,
    Gumbel noise in float64, and a loop over rows that picks each one's surest positions. prompt (B, P) → (B, P + new).

    One thing differs: the mask and padded rows of the head are excluded, as in everything here.
    """
    c = model.config
    generator = torch.Generator(prompt.device).manual_seed(seed)
    x = torch.cat((prompt, prompt.new_full((len(prompt), new), c.mask_id)), dim=1)
    given, P = x != c.mask_id, prompt.shape[1]
    if new % block or steps % (new // block):
        raise ValueError("the published algorithm wants whole blocks, each with the same number of steps")
    each = steps // (new // block)
    for start in range(P, P + new, block):
        here = x[:, start : start + block] == c.mask_id
        base, over = here.sum(1) // each, here.sum(1) % each
        for i in range(each):
            masked = x == c.mask_id
            rows = torch.cat((x, torch.where(given, c.mask_id, x))) if cfg else x
            logits = torch.nn.functional.linear(model(rows), model.head).float()  # (B, L, V) all of it
            if cfg:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + (cfg + 1) * (conditional - unconditional)
            logits[..., c.n_vocab :] = float("-inf")
            noisy = logits
            if temperature > 0:
                noise = -torch.rand(logits.shape, dtype=torch.float64, generator=generator, device=x.device).log()
                noisy = logits.double().exp() / noise**temperature
            guess = noisy.argmax(-1)
            if remasking == "low_confidence":
                sure = logits.double().softmax(-1).gather(-1, guess[..., None])[..., 0]
            else:
                sure = torch.rand(guess.shape, generator=generator, device=x.device, dtype=torch.float64)
            sure[:, start + block :] = float("-inf")
            guess, sure = torch.where(masked, guess, x), torch.where(masked, sure, float("-inf"))
            opened = torch.zeros_like(masked)
            for b in range(len(x)):
                _, places = sure[b].topk(int(base[b] + (i < over[b])))
                opened[b, places] = True
            x[opened] = guess[opened]
    return x


@torch.no_grad()
def answer_as_published(model, context, answer, samples=128, batch=32, generator=None):
    """log p(answer | context) as LLaDA's evaluation has it, said in our words: one request at a time, `batch` copies of it in a pass, evenly spaced numbers of
    masks from a random one on, the whole head at every position; the mean over passes of Σ CE·length/k."""
    c, device = model.config, model.embed.weight.device
    ids, n = torch.tensor([context + answer], device=device).expand(batch, -1), len(answer)
    total = 0.0
    for _ in range(samples // batch):
        first = float(torch.randint(1, n + 1, (), generator=generator))
        count = (torch.linspace(first, first + (batch - 1) * (n / batch), batch).round().long() - 1) % n + 1
        masked = torch.arange(n) < count[:, None]
        masked = torch.stack([row[torch.randperm(n, generator=generator)] for row in masked])
        masked = torch.cat((torch.zeros(batch, len(context), dtype=torch.bool), masked), dim=1).to(device)
        logits = torch.nn.functional.linear(model(torch.where(masked, c.mask_id, ids)), model.head).float()  # (B, T, V) all of it
        logits[..., c.n_vocab :] = float("-inf")
        weight = (n / count).to(device)[:, None].expand_as(masked)
        total += float((torch.nn.functional.cross_entropy(logits[masked], ids[masked], reduction="none") * weight[masked]).sum()) / batch
    return -total / (samples // batch)


# ------------------------------------------------------------------------------------------------------- the parts


def network(cfg, n_vocab, length, causal):
    """A network with random weights, large enough that the likeliest token leads clearly."""
    heads = max(1, cfg.d_model // 32)
    config = ModelConfig(n_layer=cfg.n_layer, n_head=heads, n_kv_head=heads, head_dim=32, d_model=cfg.d_model, d_ff=64 * (8 * cfg.d_model // 3 // 64),
                         n_vocab=n_vocab, mask_id=n_vocab, seq_len=length, causal=causal, tied=False, init_std=0.1)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0)).eval().requires_grad_(False).to(cfg.device)
    model.lm_head.weight *= 4
    return model


def turns(cfg, rivals, warm_up=True):
    """Seconds of each rival at each round, {name: [seconds]}, and what each returned last."""
    times, said = {name: [] for name in rivals}, {}
    for number in range(cfg.rounds + warm_up):
        for name, run in rivals.items():
            start = time.perf_counter()
            said[name] = run()
            if cfg.device == "cuda":
                torch.cuda.synchronize()
            if number >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times, said


def ratio(times, slow, fast):
    """(median, smallest, largest) of slow/fast within rounds."""
    ratios = [a / b for a, b in zip(times[slow], times[fast])]
    return statistics.median(ratios), min(ratios), max(ratios)


def said_as(name, values, digits=2):
    middle, low, high = values
    return f"{name}: {middle:.{digits}f} × ({low:.{digits}f} … {high:.{digits}f})"


def prompts(cfg, n_vocab, length):
    ids = np.random.default_rng(0).integers(0, n_vocab, (cfg.batch, length))
    return torch.from_numpy(ids).to(cfg.device)


def masked(cfg):
    new, steps = 256, 64
    model, given = network(cfg, cfg.vocab, new + 16, False), prompts(cfg, cfg.vocab, 16)
    rows, linear = [row + [cfg.vocab] * new for row in given.tolist()], diffusion.schedule("linear")

    def rivals(steps, temperature):
        how = DecodeConfig(order="low_confidence", steps=steps, temperature=temperature)
        return dict(published=lambda: as_published(model, given, steps, new, new, temperature).tolist(),
                    ours=lambda: decode.generate(model, rows, how, -1, linear).rows,
                    ancestral=lambda: decode.generate(model, rows, how._replace(order="ancestral"), -1, linear).rows)

    turns(replace(cfg, rounds=1), rivals(2, 0), False)  # allocations; a published run of 64 steps takes minutes
    times, said = turns(cfg, rivals(steps, 0), False)
    sampled, _ = turns(cfg, rivals(steps // 4, 1.0), False)
    equal = np.mean(np.array(said["published"])[:, 16:] == np.array(said["ours"])[:, 16:])
    speed = {name: cfg.batch * new / statistics.median(seconds) for name, seconds in times.items()}
    return [f"### masked: {new} tokens, {steps} steps, batch {cfg.batch}, vocabulary {cfg.vocab:,}", "",
            f"Temperature 0: published {speed['published']:.1f} tokens/s, ours {speed['ours']:.1f}; " + said_as("faster", ratio(times, "published", "ours"))
            + f"; {equal:.2%} of the tokens are equal. Ancestral instead: " + said_as("faster", ratio(times, "published", "ancestral")) + ".", "",
            f"Temperature 1, {steps // 4} steps: " + said_as("low_confidence is faster", ratio(sampled, "published", "ours")) + "; "
            + said_as("ancestral", ratio(sampled, "published", "ancestral")) + ".", ""]


def cache(cfg):
    new, block = 256, 32
    model, linear = network(cfg, 257, new, False), diffusion.schedule("linear")
    rows = [[257] * new] * cfg.batch

    def by(name, **more):
        return lambda: decode.generate(model, rows, DecodeConfig(block=block, cache=name, **more), 256, linear)

    lines = [f"### cache: {new} tokens in blocks of {block}, one token per step, batch {cfg.batch}, vocabulary 257", ""]
    for order, settings in (("first_hitting", {}), ("low_confidence", {})):
        times, _ = turns(cfg, {name: by(name, order=order, **settings) for name in ("no", "prefix", "dual")})
        speed = {name: cfg.batch * new / statistics.median(seconds) for name, seconds in times.items()}
        lines += [f"{order}: no cache {speed['no']:.0f} tokens/s; " + said_as("prefix is faster", ratio(times, "no", "prefix")) + "; "
                  + said_as("dual", ratio(times, "no", "dual")) + ".", ""]
    return lines


def ar(cfg):
    new = 512
    model = network(cfg, 257, new, True)
    rows = [[257] * new] * cfg.batch
    times, said = turns(cfg, {name: lambda name=name: decode.generate(model, rows, DecodeConfig(cache=name), 256) for name in ("no", "prefix")})
    speed = {name: cfg.batch * new / statistics.median(seconds) for name, seconds in times.items()}
    return [f"### ar: {new} tokens, batch {cfg.batch}, vocabulary 257", "",
            f"Without keys and values kept {speed['no']:.0f} tokens/s, with them {speed['prefix']:.0f}; " + said_as("faster", ratio(times, "no", "prefix"))
            + f"; texts {'equal' if said['no'].rows == said['prefix'].rows else 'DIFFERENT'}.", ""]


def answers(cfg):
    """Four choices a question; contexts of 60 to 120 tokens."""
    model, rng, lines = network(cfg, cfg.vocab, 256, False), np.random.default_rng(0), [f"### answers: 128 masks, vocabulary {cfg.vocab:,}, four choices, contexts of 60 to 120 tokens", ""]
    scorer = Scorer(update.Objective(model, False), diffusion.Process("masked", cfg.vocab, cfg.vocab, 256), torch.device(cfg.device))
    for shortest, longest, questions in ((15, 30, 3), (2, 4, 6), (1, 1, 24)):
        asked = []
        for q in range(questions):
            context = rng.integers(0, cfg.vocab, rng.integers(60, 121)).tolist()
            asked += [Question(context, rng.integers(0, cfg.vocab, rng.integers(shortest, longest + 1)).tolist(), str(q)) for _ in range(4)]
        few = asked[::4]  # one of each question, where a pass holds a single copy: minutes otherwise

        def published(some, batch):
            return [answer_as_published(model, a.context, a.answer, batch=batch) for a in some]

        def ours(asked=asked):
            return likelihood.answers(scorer, asked, 0)[0]

        def one_by_one(asked=asked):
            return [likelihood.answers(scorer, [a], 0)[0][0] for a in asked]

        ours(few)
        times, _ = turns(cfg, {"32": lambda asked=asked: published(asked, 32), "1": lambda few=few: published(few, 1), "ours": ours, "one": one_by_one}, False)
        times["1"] = [seconds * sum(len(a.context) + len(a.answer) for a in asked) / sum(len(a.context) + len(a.answer) for a in few) for seconds in times["1"]]
        lines += [f"Answers of {shortest} to {longest} tokens: {len(asked) / statistics.median(times['ours']):.2f} answers/s. " + said_as("Faster than the published loop with 32 copies a pass", ratio(times, "32", "ours"))
                  + "; " + said_as("with one", ratio(times, "1", "ours")) + "; " + said_as("than ours one request after the other", ratio(times, "one", "ours")) + ".", ""]
    return lines


def main():
    cfg = configurator.load(Config, about=__doc__)
    parts = [part for part in PARTS if part in configurator.split(cfg.parts)]
    processor = platform.processor() or platform.machine()
    lines = ["# Sampling speed", "", f"`python bench_sampling.py --parts={','.join(parts)} --vocab={cfg.vocab} --batch={cfg.batch} --rounds={cfg.rounds}`, "
             f"{cfg.device}, {torch.get_num_threads()} threads, {processor}, torch {torch.__version__}, {cfg.n_layer} layers, {cfg.d_model} wide, fp32, not compiled. "
             "Medians of the rounds' ratios (smallest … largest).", ""]
    for part in parts:
        said = globals()[part](cfg)
        lines += said
        print("\n".join(said), flush=True)
    if cfg.out:
        Path(cfg.out).parent.mkdir(exist_ok=True)
        Path(cfg.out).write_text("\n".join(lines))
        print(f"written to {cfg.out}")


if __name__ == "__main__":
    main()
