"""How fast sample.py and eval.py are: against the algorithms that others publish, with and without caches.

    python bench.py sampling                                # some twenty minutes on two CPU cores
    python bench.py sampling --parts=masked --vocab=257

The parts: `masked` (against the published algorithm at 256 tokens, 64 steps, batch 8, temperature 0, where
both write the same), `cache` (blocks of a masked model with and without cache, 256 tokens), `ar` (with and
without keys and values kept, 512 tokens), `answers` (multiple choice with 128 masks: one request after the
other as published, and requests batched together). Random weights: speed depends on shapes alone. Writes
results/sampling_cpu.md.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import configurator
import diffusion
import terminal
from benchmarks.common import processor, speedup, take_turns
from benchmarks.training import model_shape
from configurator import setting
from evaluation.answers import Question, Scorer, score
from model import Transformer
from sampling import decode
from sampling.decode import DecodeConfig
from training.objective import Objective


@dataclass
class Config:
    parts: str = setting("masked,cache,ar,answers", "of: masked, cache, ar, answers")
    vocab: int = setting(50_257, "text tokens of `masked` and `answers` (GPT-2's, as in the papers)", low=2)
    n_layer: int = setting(4, "blocks of the network", low=1)
    d_model: int = setting(128, "its width", low=32)
    batch: int = setting(8, "rows", low=1)
    rounds: int = setting(1, "turns of each rival, after one to warm up", low=1)
    device: Literal["cpu", "cuda"] = setting("cpu", "where to run")
    out: str = setting("results/sampling_cpu.md", "file to write (empty: only print)")

    def problems(self):
        unknown = sorted(set(configurator.split(self.parts)) - set(PARTS))
        if unknown:
            yield f"parts: choose from {', '.join(PARTS)}, not {', '.join(unknown)}"
        if self.device == "cuda" and not torch.cuda.is_available():
            yield "device=cuda, but this machine has no usable GPU; use --device=cpu"


# ------------------------------------------------------------------------- the algorithms that others publish


@torch.no_grad()
def sample_as_published(model, prompt, steps, length, block, temperature=0.0, remasking="low_confidence",
                        guidance=0.0, seed=0):
    """Sample as LLaDA and MegaDLMs publish it, in our words. prompt (B, P) → (B, P + length).

    The whole head at every position, softmax and Gumbel noise in float64, and a loop over rows that picks
    each one's most confident positions. One thing differs: the mask and padded rows of the head are excluded,
    as in everything here. Raises ValueError if blocks are not equally long or have different numbers of
    steps.
    """
    c, P = model.config, prompt.shape[1]
    if length % block or steps % (length // block):
        raise ValueError("the published algorithm wants whole blocks, each with the same number of steps")
    generator = torch.Generator(prompt.device).manual_seed(seed)
    random = dict(dtype=torch.float64, generator=generator, device=prompt.device)
    x = torch.cat((prompt, prompt.new_full((len(prompt), length), c.mask_id)), dim=1)
    in_prompt = x != c.mask_id
    block_steps = steps // (length // block)
    for start in range(P, P + length, block):
        n_masked = (x[:, start : start + block] == c.mask_id).sum(1)
        base, extra = n_masked // block_steps, n_masked % block_steps
        for step in range(block_steps):
            masked = x == c.mask_id
            logits = published_logits(model, x, in_prompt, guidance)

            # What the masked positions would become
            noisy = logits
            if temperature > 0:
                u = torch.rand(logits.shape, **random)
                noisy = logits.double().exp() / (-u.log()) ** temperature
            guess = noisy.argmax(-1)

            # Which of them are unmasked
            if remasking == "low_confidence":
                confidence = logits.double().softmax(-1).gather(-1, guess[..., None])[..., 0]
            else:
                confidence = torch.rand(guess.shape, **random)
            confidence[:, start + block :] = float("-inf")
            confidence = torch.where(masked, confidence, float("-inf"))
            unmasked = torch.zeros_like(masked)
            for b in range(len(x)):
                _, columns = confidence[b].topk(int(base[b] + (step < extra[b])))
                unmasked[b, columns] = True
            x[unmasked] = guess[unmasked]
    return x


def published_logits(model, x, in_prompt, guidance):
    """Logits at all positions in fp32, (B, L, V_padded); guidance compares with a masked prompt."""
    c = model.config
    rows = torch.cat((x, torch.where(in_prompt, c.mask_id, x))) if guidance else x
    logits = F.linear(model(rows), model.head).float()
    if guidance:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + (guidance + 1) * (conditional - unconditional)
    logits[..., c.n_vocab :] = float("-inf")
    return logits


@torch.no_grad()
def score_as_published(model, context, answer, samples=128, batch=32, generator=None):
    """log p(answer | context) in nats as LLaDA's evaluation estimates it, in our words.

    One request at a time, `batch` copies of it in a pass, evenly spaced numbers of masks from a random one
    on, the whole head at every position; the mean over passes of Σ CE·length/k.
    """
    c, device = model.config, model.embed.weight.device
    ids, length = torch.tensor([context + answer], device=device).expand(batch, -1), len(answer)
    in_context = torch.zeros(batch, len(context), dtype=torch.bool)
    total = 0.0
    for _ in range(samples // batch):
        first = float(torch.randint(1, length + 1, (), generator=generator))
        last = first + (batch - 1) * (length / batch)
        count = (torch.linspace(first, last, batch).round().long() - 1) % length + 1
        sorted_masks = torch.arange(length) < count[:, None]
        shuffled = torch.stack([row[torch.randperm(length, generator=generator)] for row in sorted_masks])
        masked = torch.cat((in_context, shuffled), dim=1).to(device)

        logits = F.linear(model(torch.where(masked, c.mask_id, ids)), model.head).float()  # (B, L, V_padded)
        logits[..., c.n_vocab :] = float("-inf")
        nats = F.cross_entropy(logits[masked], ids[masked], reduction="none")
        weights = (length / count).to(device)[:, None].expand_as(masked)[masked]
        total += float((nats * weights).sum()) / batch
    return -total / (samples // batch)


# ------------------------------------------------------------------------------------------------------ parts


def random_network(cfg, n_vocab, seq_len, causal):
    """A network with random weights, large enough that the likeliest token leads clearly."""
    config = model_shape(cfg.n_layer, cfg.d_model // 32, cfg.d_model, n_vocab, seq_len, causal, tied=False)
    config = replace(config, head_dim=32, init_std=0.1)
    network = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    network = network.eval().requires_grad_(False).to(cfg.device)
    network.lm_head.weight *= 4
    return network


def per_second(count, milliseconds):
    """`count` things in the median of some times, per second."""
    return 1e3 * count / np.median(milliseconds)


def masked(cfg, device):
    """Masked diffusion against the published algorithm."""
    length, steps = 256, 64
    network = random_network(cfg, cfg.vocab, length + 16, False)
    linear = diffusion.schedule("linear")
    ids = np.random.default_rng(0).integers(0, cfg.vocab, (cfg.batch, 16))
    prompt = torch.from_numpy(ids).to(device)
    rows = [row + [cfg.vocab] * length for row in prompt.tolist()]

    def published(steps, temperature):
        return sample_as_published(network, prompt, steps, length, length, temperature).tolist()

    def ours(order, steps, temperature):
        settings = DecodeConfig(order=order, steps=steps, temperature=temperature)
        return decode.generate(network, rows, settings, -1, linear).rows

    def rivals(steps, temperature):
        return {
            "published": partial(published, steps, temperature),
            "ours": partial(ours, "low_confidence", steps, temperature),
            "ancestral": partial(ours, "ancestral", steps, temperature),
        }

    take_turns(rivals(2, 0), device, 1, warmup=0)  # allocations; a published run of 64 steps takes minutes
    texts = {}
    greedy = take_turns(rivals(steps, 0), device, cfg.rounds, warmup=0, outputs=texts)
    sampled = take_turns(rivals(steps // 4, 1.0), device, cfg.rounds, warmup=0)

    equal = np.mean(np.array(texts["published"])[:, 16:] == np.array(texts["ours"])[:, 16:])
    speed = {name: per_second(cfg.batch * length, t) for name, t in greedy.items()}
    return [
        f"### masked: {length} tokens, {steps} steps, batch {cfg.batch}, vocabulary {cfg.vocab:,}",
        "",
        f"Temperature 0: published {speed['published']:.1f} tokens/s, ours {speed['ours']:.1f}; "
        f"faster: {speedup(greedy['published'], greedy['ours'])}; {equal:.2%} of the tokens are equal. "
        f"Ancestral instead: {speedup(greedy['published'], greedy['ancestral'])}.",
        "",
        f"Temperature 1, {steps // 4} steps: "
        f"low_confidence is faster: {speedup(sampled['published'], sampled['ours'])}; "
        f"ancestral: {speedup(sampled['published'], sampled['ancestral'])}.",
        "",
    ]


def cache(cfg, device):
    """Masked diffusion in blocks, with and without keys and values kept."""
    length, block = 256, 32
    network, linear = random_network(cfg, 257, length, False), diffusion.schedule("linear")
    rows = [[257] * length] * cfg.batch

    def write(order, kept):
        settings = DecodeConfig(block=block, cache=kept, order=order)
        return decode.generate(network, rows, settings, 256, linear)

    title = f"### cache: {length} tokens in blocks of {block}, one token per step"
    lines = [f"{title}, batch {cfg.batch}, vocabulary 257", ""]
    for order in ("first_hitting", "low_confidence"):
        rivals = {kept: partial(write, order, kept) for kept in ("no", "prefix", "dual")}
        times = take_turns(rivals, device, cfg.rounds, warmup=1)
        lines.append(
            f"{order}: no cache {per_second(cfg.batch * length, times['no']):.0f} tokens/s; "
            f"prefix is faster: {speedup(times['no'], times['prefix'])}; "
            f"dual: {speedup(times['no'], times['dual'])}."
        )
        lines.append("")
    return lines


def ar(cfg, device):
    """Autoregressive models, with and without keys and values kept."""
    length = 512
    network = random_network(cfg, 257, length, True)
    rows = [[257] * length] * cfg.batch

    def write(kept):
        return decode.generate(network, rows, DecodeConfig(cache=kept), 256).rows

    texts = {}
    rivals = {kept: partial(write, kept) for kept in ("no", "prefix")}
    times = take_turns(rivals, device, cfg.rounds, warmup=1, outputs=texts)
    without, kept = (per_second(cfg.batch * length, times[name]) for name in ("no", "prefix"))
    equality = "equal" if texts["no"] == texts["prefix"] else "DIFFERENT"
    return [
        f"### ar: {length} tokens, batch {cfg.batch}, vocabulary 257",
        "",
        f"Without keys and values kept {without:.0f} tokens/s, with them {kept:.0f}; "
        f"faster: {speedup(times['no'], times['prefix'])}; texts {equality}.",
        "",
    ]


def answers(cfg, device):
    """Four choices a question; contexts of 60 to 120 tokens."""
    network, rng = random_network(cfg, cfg.vocab, 256, False), np.random.default_rng(0)
    process = diffusion.Process("masked", cfg.vocab, cfg.vocab, 256)
    scorer = Scorer(Objective(network, False), process, device)

    def published(questions, batch):
        return [score_as_published(network, q.context, q.answer, batch=batch) for q in questions]

    def ours(questions):
        return score(scorer, questions, 0)[0]

    def one_by_one(questions):
        return [ours([question])[0] for question in questions]

    lines = [
        f"### answers: 128 masks, vocabulary {cfg.vocab:,}, four choices, contexts of 60 to 120 tokens",
        "",
    ]
    for shortest, longest, count in ((15, 30, 3), (2, 4, 6), (1, 1, 24)):
        questions = random_questions(rng, cfg.vocab, count, shortest, longest)
        first_choices = questions[::4]  # for rivals whose passes hold a single copy: minutes otherwise
        ours(first_choices)
        rivals = {
            "32 copies": partial(published, questions, 32),
            "one copy": partial(published, first_choices, 1),
            "ours": partial(ours, questions),
            "one by one": partial(one_by_one, questions),
        }
        times = take_turns(rivals, device, cfg.rounds, warmup=0)
        times["one copy"] *= n_tokens(questions) / n_tokens(first_choices)

        speed = per_second(len(questions), times["ours"])
        lines.append(
            f"Answers of {shortest} to {longest} tokens: {speed:.2f} answers/s. "
            "Faster than the published loop with 32 copies a pass: "
            f"{speedup(times['32 copies'], times['ours'])}; "
            f"with one: {speedup(times['one copy'], times['ours'])}; "
            f"than ours one request after the other: {speedup(times['one by one'], times['ours'])}."
        )
        lines.append("")
    return lines


def random_questions(rng, n_vocab, count, shortest, longest):
    """`count` multiple-choice questions of four choices each, contexts of 60 to 120 tokens."""
    questions = []
    for number in range(count):
        context = rng.integers(0, n_vocab, rng.integers(60, 121)).tolist()
        for _ in range(4):
            answer = rng.integers(0, n_vocab, rng.integers(shortest, longest + 1)).tolist()
            questions.append(Question(context, answer, str(number)))
    return questions


def n_tokens(questions):
    return sum(len(question.context) + len(question.answer) for question in questions)


PARTS = dict(masked=masked, cache=cache, ar=ar, answers=answers)


def main(argv):
    cfg = configurator.load(Config, argv, about=__doc__)
    if cfg.out:
        terminal.keep_going()
    device = torch.device(cfg.device)
    chosen = [name for name in PARTS if name in configurator.split(cfg.parts)]
    command = (
        f"python bench.py sampling --parts={','.join(chosen)} --vocab={cfg.vocab} --batch={cfg.batch} "
        f"--rounds={cfg.rounds}"
    )
    lines = [
        "# Sampling speed",
        "",
        f"`{command}`, {cfg.device}, {torch.get_num_threads()} threads, {processor()}, "
        f"torch {torch.__version__}, {cfg.n_layer} layers, {cfg.d_model} wide, fp32, not compiled. "
        "Medians of the rounds' ratios [smallest, largest].",
        "",
    ]
    for name in chosen:
        section = PARTS[name](cfg, device)
        lines += section
        print("\n".join(section), flush=True)
    if cfg.out:
        Path(cfg.out).parent.mkdir(exist_ok=True)
        Path(cfg.out).write_text("\n".join(lines), encoding="utf-8")
        print(f"written to {cfg.out}")
