"""Write text with a trained model.

    python sample.py --run_dir=runs/quickstart --prompt="Return the " --length=80 --show
    python sample.py --run_dir=runs/quickstart --text="def [MASK:20](self):[MASK:60]"
"""

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import configurator
import data
import diffusion
from checkpoint import load_model, load_newest, read_checkpoint
from configurator import setting
from kernels import linear_greedy


@dataclass
class Config:
    run_dir: str = setting("runs/quickstart", "a run folder (its newest checkpoint is used) or one checkpoint folder")
    prompt: str = setting("", "text to continue")
    prompt_file: str = setting("", "a UTF-8 file with the text to continue")
    text: str = setting("", "text with holes to fill: [MASK] is one token, [MASK:12] is twelve")
    length: int = setting(0, "new tokens after the prompt (0: as many as fit)", low=0)
    batch: int = setting(1, "samples", low=1)
    steps: int = setting(0, "denoising steps of a diffusion model (0: one per new token)", low=0)
    sampler: Literal["ancestral", "low_confidence"] = setting("ancestral", "order in which a masked model reveals: the reverse process, or surest first")
    temperature: float = setting(1.0, "of the softmax; 0 takes the likeliest token", low=0)
    top_k: int = setting(0, "keep the k likeliest tokens (0: all)", low=0)
    top_p: float = setting(1.0, "keep the likeliest tokens that hold this probability together", above=0, high=1)
    seed: int = setting(0, "of the samples", low=0, high=2**62)
    show: bool = setting(False, "draw the denoising in the terminal, step by step")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")

    def problems(self):
        wrong = []
        if sum(map(bool, (self.prompt, self.prompt_file, self.text))) > 1:
            wrong.append("give one of prompt, prompt_file and text")
        if self.text and self.length:
            wrong.append("length belongs to a prompt; with text the holes say how much is new")
        if self.device == "cuda" and not torch.cuda.is_available():
            wrong.append("device=cuda, but this machine has no usable GPU; use --device=cpu")
        return wrong


def check_meaning(cfg, objective):
    """Raises ValueError if a setting says nothing to a model of this objective."""
    for name in {"ar": ("steps", "sampler"), "uniform": ("sampler",), "masked": ()}[objective]:
        if getattr(cfg, name) != getattr(Config(), name):
            raise ValueError(f"{name}={getattr(cfg, name)} has no meaning for objective={objective}, which this checkpoint was trained with")


def template(cfg, tokens, block_len, causal):
    """Token ids with the mask id wherever something is to be written; raises ValueError if it can't be."""
    if cfg.text:
        ids = []
        for part in re.split(r"(\[MASK(?::\d+)?\])", cfg.text):
            hole = re.fullmatch(r"\[MASK(?::(\d+))?\]", part)
            if wrong := re.search(r"\[MASK:([^\]]*)\]", "" if hole else part):
                raise ValueError(f"{wrong[0]}: '{wrong[1]}' is not a number; write [MASK] or [MASK:12]")
            ids += [tokens.mask_id] * int(hole[1] or 1) if hole else tokens.encode(part).tolist()
    else:
        text = Path(cfg.prompt_file).read_text(encoding="utf-8") if cfg.prompt_file else cfg.prompt
        ids = tokens.encode(text).tolist()
        if len(ids) >= block_len:
            raise ValueError(f"the prompt has {len(ids)} tokens, and the model's context is {block_len}: no room for a new one")
        ids += [tokens.mask_id] * (cfg.length or block_len - len(ids))
    if len(ids) > block_len:
        raise ValueError(f"prompt and new tokens are {len(ids)} together, more than the model's context of {block_len}")
    first = ids.index(tokens.mask_id) if tokens.mask_id in ids else None
    if first is None:
        raise ValueError("nothing to write: the text has no [MASK]")
    if causal and any(i != tokens.mask_id for i in ids[first:]):
        raise ValueError("an autoregressive model can't fill holes before given text; put [MASK] at the end")
    return torch.tensor(ids)


@torch.no_grad()
def sample_ar(model, z, cfg, eos_id, generator, watch):
    """Fill the masked tail of z (B, L), left to right."""
    c = model.config
    context = torch.cat((torch.full_like(z[:, :1], eos_id), z), dim=1)  # documents begin after a separator
    for i in range(int((z[0] == c.mask_id).nonzero()[0]), z.shape[1]):
        logits = model.logits(model(context[:, : i + 1])[:, -1])
        token = diffusion.draw_tokens(diffusion.filter_logits(logits, cfg.temperature, cfg.top_k, cfg.top_p), cfg.temperature, generator)
        context[:, i + 1] = token
        watch(context[:, 1:])
    return context[:, 1:]


@torch.no_grad()
def sample_masked(model, z, cfg, steps, schedule, generator, watch):
    """Reveal the masked positions of z (B, L) in `steps` steps; what is given is never altered."""
    c = model.config
    for i in range(steps):
        masked = z == c.mask_id
        hidden = model(z)
        if cfg.temperature == 0:
            token, confidence = (t.view(z.shape) for t in linear_greedy(hidden.flatten(0, 1), model.head, model.config.n_vocab))
        else:
            logits = model.logits(hidden)
            token = diffusion.draw_tokens(diffusion.filter_logits(logits, cfg.temperature, cfg.top_k, cfg.top_p), cfg.temperature, generator)
            # the model's own probability: temperature, top-k and top-p choose tokens, not the order
            confidence = logits.softmax(-1).gather(-1, token[..., None])[..., 0]
        if cfg.sampler == "low_confidence":
            reveal = diffusion.reveal_confident(masked, confidence, steps - i)
        else:
            ratio, next_ratio = float(schedule.r(1 - i / steps)), float(schedule.r(1 - (i + 1) / steps))
            reveal = diffusion.reveal_ancestral(masked, ratio, next_ratio, generator)
        z = torch.where(reveal, token, z)
        watch(z)
    return z


@torch.no_grad()
def sample_uniform(model, z, cfg, steps, schedule, posterior, generator, watch):
    """Denoise the masked positions of z (B, L), which start as uniform noise; what is given stays clean."""
    c = model.config
    free = z == c.mask_id
    z = torch.where(free, torch.randint(c.n_vocab, z.shape, generator=generator, device=z.device), z)
    for i in range(steps):
        t, s = 1 - i / steps, 1 - (i + 1) / steps
        ratio, next_ratio = float(schedule.r(t)), float(schedule.r(s))
        logits = model.logits(model(z, torch.full((len(z),), t, device=z.device)))
        if posterior:
            logits = diffusion.leave_one_out(logits, z, ratio)
        new = diffusion.uniform_step(logits, z, ratio, next_ratio, generator, cfg.temperature, cfg.top_k, cfg.top_p)
        z = torch.where(free, new, z)
        watch(z)
    return z


def readable(ids, given, tokens, Text):
    """The first sample as rich text: what was given is bold, holes are blocks."""
    text, start = Text(), 0
    while start < len(ids):  # runs of one kind, so that multi-token characters decode
        kind, end = (ids[start] == tokens.mask_id, given[start]), start
        while end < len(ids) and (ids[end] == tokens.mask_id, given[end]) == kind:
            end += 1
        hole, fixed = kind
        text.append("░" * (end - start) if hole else tokens.decode(ids[start:end]), style="dim" if hole else "bold" if fixed else "cyan")
        start = end
    return text


def main():
    cfg = configurator.load(Config, about=__doc__)
    device = torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")
    try:
        run = Path(cfg.run_dir)
        if (run / "checkpoint.json").is_file():
            folder, record = run, read_checkpoint(run)
        else:
            folder, record = load_newest(run, lambda warning: print(f"warning: {warning}", file=sys.stderr))
        tokens = data.tokenizer(record["corpus"]["tokenizer"], (folder.parent, folder))
        if (tokens.n_vocab, tokens.mask_id) != (record["model"]["n_vocab"], record["model"]["mask_id"]):
            raise ValueError(f"the checkpoint's vocabulary is not that of tokenizer '{tokens.name}'")
        check_meaning(cfg, record["settings"]["objective"])
        ids = template(cfg, tokens, record["model"]["block_len"], record["model"]["causal"])
        model = load_model(folder, record, device).eval()
    except (ValueError, OSError) as problem:
        configurator.fail(str(problem))
    settings = record["settings"]
    schedule = diffusion.schedule(settings["schedule"])
    generator = torch.Generator(device).manual_seed(cfg.seed)
    z = ids.to(device).repeat(cfg.batch, 1)
    given = (ids != tokens.mask_id).tolist()
    new = given.count(False)
    steps = cfg.steps or new
    passes = 0

    def generate(watch):
        def counted(z):
            nonlocal passes
            passes += 1
            watch(z)

        if settings["objective"] == "ar":
            return sample_ar(model, z, cfg, tokens.eos_id, generator, counted)
        if settings["objective"] == "masked":
            return sample_masked(model, z, cfg, steps, schedule, generator, counted)
        return sample_uniform(model, z, cfg, steps, schedule, settings["loss"] == "paper", generator, counted)

    start = time.perf_counter()
    if cfg.show:
        from rich.live import Live
        from rich.text import Text

        with Live(readable(z[0].tolist(), given, tokens, Text), auto_refresh=False) as live:
            result = generate(lambda z: live.update(readable(z[0].tolist(), given, tokens, Text), refresh=True))
    else:
        result = generate(lambda z: None)
    seconds = time.perf_counter() - start
    for i, row in enumerate(result.tolist()):
        if cfg.batch > 1:
            print(f"--- sample {i + 1}")
        if not cfg.show or i:
            print(tokens.decode(row))
    print(f"[{cfg.batch * new / seconds:.0f} new tokens/s, {passes} forward passes, {new / passes:.2f} tokens per pass]", file=sys.stderr)


if __name__ == "__main__":
    main()
