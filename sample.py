"""Write text with a trained model.

    python sample.py --run_dir=runs/quickstart --prompt="Return the " --length=40 --show
    python sample.py --run_dir=runs/quickstart --text="def [MASK:20](self):[MASK:30]" --order=threshold
    python sample.py --frontier --run_dir=runs/quickstart --judge=runs/quickstart_ar   # speed against quality: --frontier --help
"""

import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import configurator
from configurator import setting
from sampling import film
from sampling.generator import Generator, decode_config

# what the same thing is called in the seeds' and LLaDA's `generate`
ALIASES = dict(sample_steps="steps", inference_block_size="block", max_new_tokens="length", cfg="guidance", remasking="order", verbose="show",
               gen_length="length", block_length="block", cfg_scale="guidance", sampler="order")


@dataclass
class Config:
    run_dir: str = setting("runs/quickstart", "a run folder (its newest checkpoint is used) or one checkpoint folder")
    # what is given
    prompt: str = setting("", "text to continue; [MASK] is nothing special in it (that is text=)")
    prompt_file: str = setting("", "a UTF-8 file with the text to continue")
    prompts: str = setting("", "a file of many: a prompt per line, or .jsonl with prompt, suffix and length, or text, in each line")
    suffix: str = setting("", "text that is to follow after what is written (needs length)")
    text: str = setting("", "text with holes to fill: [MASK] is one token, [MASK:12] is twelve")
    length: int = setting(0, "new tokens after the prompt (0: as many as fit)", low=0)
    max_length: int = setting(0, "tokens of prompt, new text and suffix together (0: the model's context)", low=0)
    stop: bool = setting(True, "a text that nothing follows ends at its first separator of documents; holes get no separator")
    min_length: int = setting(0, "new tokens before it may end", low=0)
    batch: int = setting(1, "samples of each prompt", low=1)
    micro_batch: int = setting(64, "rows decoded at once; makes no difference to any of them", low=1)
    seed: int = setting(0, "of the samples", low=0, high=2**62)
    # which positions of a diffusion model change
    order: Literal["ancestral", "first_hitting", "random", "low_confidence", "entropy", "margin", "threshold"] = setting(
        "ancestral", "the reverse process; the same one token at a time; at random; surest first by probability, entropy or lead; all that are sure enough")
    steps: int = setting(0, "denoising steps (0: one per new token)", low=0, high=10**6)
    threshold: float = setting(0.9, "of order=threshold: a position opens above this probability of its likeliest token", above=0, high=1)
    beside: Literal["random", "surest"] = setting("random", "of order=threshold: what opens beside these: one at random, as in the reverse process; or, where there are none, the surest (Fast-dLLM)")
    block: int = setting(0, "positions, from the first hole on, that are finished before the next ones begin (0: all at once)", low=0)
    remask: Literal["no", "capped", "rescaled", "confidence"] = setting("no", "mask again what was written (ReMDM), so that more steps than tokens pay")
    eta: float = setting(0.04, "of remask=capped and rescaled: how much", above=0, high=1)
    # what they become
    temperature: float = setting(1.0, "of the softmax; 0 takes the likeliest token", low=0)
    top_k: int = setting(0, "keep the k likeliest tokens (0: all)", low=0)
    top_p: float = setting(1.0, "keep the likeliest tokens that hold this probability together", above=0, high=1)
    guidance: float = setting(0.0, "classifier-free: w in un + (w + 1)·(cond − un), un with the prompt masked", low=0)
    # how fast
    cache: Literal["auto", "no", "prefix", "dual"] = setting("auto", "keep keys and values of what is before the block, or of all but it (approximate; AR: exact, and auto)")
    refresh: int = setting(0, "passes after which a cache is written anew (0: at each block)", low=0)
    compile: bool = setting(False, "torch.compile the passes: pays for long outputs")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "of the blocks' matrix products (auto: bfloat16 on a GPU); the head's are float32")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    # what is seen of it
    show: bool = setting(False, "draw the first sample in the terminal, pass by pass, coloured by when tokens appeared")
    gif: str = setting("", "write that as an animated GIF")
    html: str = setting("", "write that as a page with a slider")
    out: str = setting("", "write all samples as .jsonl, too")

    def problems(self):
        wrong, changed = [], {name for name, field in self.__dataclass_fields__.items() if getattr(self, name) != field.default}
        if len(given := [name for name in ("prompt", "prompt_file", "prompts", "text") if getattr(self, name)]) > 1:
            wrong.append("give one of prompt, prompt_file, prompts and text")
        if "text" in given and {"length", "suffix", "max_length"} & changed:
            wrong.append(f"{', '.join(sorted({'length', 'suffix', 'max_length'} & changed))} belongs to a prompt; with text the holes say how much is new")
        if self.length and self.max_length:
            wrong.append("give length or max_length: one follows from the other")
        if self.suffix and not (self.length or self.max_length or self.text):
            wrong.append("suffix needs length: how many tokens come before it")
        if self.min_length and not self.stop:
            wrong.append("min_length needs stop=True: without it nothing ends early")
        if self.min_length and self.suffix:
            wrong.append("min_length is of a text with an open end, and suffix closes it")
        if self.length and self.min_length > self.length:
            wrong.append(f"min_length={self.min_length} is more than length={self.length}")
        if self.order != "threshold":
            wrong += [f"{name} needs order=threshold" for name in ("threshold", "beside") if name in changed]
        if self.steps and self.order in ("threshold", "first_hitting"):
            wrong.append(f"order={self.order} takes as many steps as it needs; leave steps out")
        if self.remask != "no" and self.order != "ancestral":
            wrong.append(f"remask={self.remask} changes the reverse process, so it needs order=ancestral, not {self.order}")
        if "eta" in changed and self.remask not in ("capped", "rescaled"):
            wrong.append("eta needs remask=capped or rescaled")
        if self.cache == "dual" and not self.block:
            wrong.append("cache=dual needs block: what is outside of it is kept")
        if self.refresh and not self.block:
            wrong.append("refresh needs a cache, and block")
        if self.temperature == 0 and {"top_k", "top_p"} & changed:
            wrong.append("top_k and top_p change nothing at temperature=0, which takes the likeliest token")
        if self.guidance and not given:
            wrong.append("guidance needs a prompt or text: it is what guides")
        if self.device == "cuda" and not torch.cuda.is_available():
            wrong.append("device=cuda, but this machine has no usable GPU; use --device=cpu")
        for name in ("gif", "html", "out"):
            if getattr(self, name) and (Path(getattr(self, name)).is_dir() or not Path(getattr(self, name)).resolve().parent.is_dir()):
                wrong.append(f"{name}={getattr(self, name)}: " + ("that is a folder" if Path(getattr(self, name)).is_dir() else "there is no such folder"))
        if self.gif and Path(self.gif).suffix != ".gif":
            wrong.append(f"gif={self.gif}: the name has to end in .gif")
        return wrong


DIFFUSION_ONLY = ("steps", "order", "threshold", "beside", "block", "remask", "eta", "guidance", "refresh", "suffix")
MASKED_ONLY = ("order", "threshold", "beside", "block", "remask", "eta", "refresh", "cache", "guidance")


def check_meaning(cfg, objective, shifted=False):
    """Raises ValueError if a setting says nothing to a model of this objective."""
    for name in {"ar": DIFFUSION_ONLY, "uniform": MASKED_ONLY, "masked": ()}[objective]:
        if getattr(cfg, name) != cfg.__dataclass_fields__[name].default:
            raise ValueError(f"{name}={getattr(cfg, name)} has no meaning for objective={objective}")
    if objective == "ar" and cfg.cache == "dual":
        raise ValueError("cache=dual has no meaning for objective=ar: there is nothing after the position that is written")
    if objective == "masked" and cfg.cache == "prefix" and not cfg.block:
        raise ValueError("cache=prefix needs block: what is before it is kept")
    if shifted and cfg.cache != "auto" and cfg.cache != "no":
        raise ValueError(f"cache={cfg.cache} is not for a shifted model, whose predictions stand one position before what is written; leave it out")
    if cfg.refresh and cfg.cache in ("auto", "no"):
        raise ValueError("refresh needs cache=prefix or dual")


# ------------------------------------------------------------------------------------------------- what is given


def holes(text, tokens):
    """Ids of a text in which [MASK] is one token to be written, [MASK:12] twelve; raises ValueError."""
    ids = []
    for part in re.split(r"(\[MASK(?::\d+)?\])", text):
        hole = re.fullmatch(r"\[MASK(?::(\d+))?\]", part)
        if wrong := re.search(r"\[MASK:([^\]]*)\]", "" if hole else part):
            raise ValueError(f"{wrong[0]}: '{wrong[1]}' is not a number; write [MASK] or [MASK:12]")
        if hole and not 1 <= int(hole[1] or 1) <= 10**6:
            raise ValueError(f"{part}: a hole has between 1 and a million tokens")
        ids += [tokens.mask_id] * int(hole[1] or 1) if hole else tokens.encode(part).tolist()
    if tokens.mask_id not in ids:
        raise ValueError("nothing to write: the text has no [MASK]")
    return ids


def template(cfg, tokens, seq_len, causal, prompt="", suffix="", length=0, text=""):
    """Token ids with the mask's id wherever something is to be written; raises ValueError if it can't be."""
    if text:
        ids = holes(text, tokens)
        if len(ids) > seq_len:
            raise ValueError(f"the text has {len(ids)} tokens with its holes, more than the model's context of {seq_len}")
    else:
        if cfg.max_length > seq_len:
            raise ValueError(f"max_length={cfg.max_length} is more than the model's context of {seq_len}")
        most = cfg.max_length or seq_len
        before, after = (tokens.encode(part).tolist() for part in (prompt, suffix))
        if len(before) + len(after) >= most:
            raise ValueError(f"the prompt has {len(before) + len(after)} tokens, and "
                             + (f"max_length is {most}" if cfg.max_length else f"the model's context is {seq_len}") + ": no room for a new one")
        ids = before + [tokens.mask_id] * (length or most - len(before) - len(after)) + after
        if len(ids) > most:
            raise ValueError(f"prompt and new tokens are {len(ids)} together, more than " + (f"max_length={most}" if cfg.max_length else f"the model's context of {seq_len}"))
    first = ids.index(tokens.mask_id)
    if causal and any(i != tokens.mask_id for i in ids[first:]):
        raise ValueError("an autoregressive model can't fill holes before given text; put [MASK] at the end")
    return ids


def templates(cfg, tokens, seq_len, causal):
    """One list of ids for each prompt; raises ValueError, for a file of them with the line."""
    if not cfg.prompts:
        prompt = Path(cfg.prompt_file).read_text(encoding="utf-8-sig") if cfg.prompt_file else cfg.prompt
        return [template(cfg, tokens, seq_len, causal, prompt, cfg.suffix, cfg.length, cfg.text)]
    rows = []
    with open(cfg.prompts, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                asked = json.loads(line) if cfg.prompts.endswith(".jsonl") else dict(prompt=line.rstrip("\r\n"))
                if not isinstance(asked, dict) or set(asked) - {"prompt", "suffix", "length", "text"} or not {"prompt", "text"} & set(asked):
                    raise ValueError('expected {"prompt": "…"}, also with "suffix" and "length", or {"text": "… [MASK:12] …"}')
                if "text" in asked and (len(asked) > 1 or not asked["text"]):
                    raise ValueError("text stands alone, and has a [MASK]: its holes say how much is new")
                if not all(isinstance(value, int if name == "length" else str) for name, value in asked.items()) or asked.get("length", 0) < 0:
                    raise ValueError("prompt, suffix and text are text, length is a whole number of at least 0")
                rows.append(template(cfg, tokens, seq_len, causal, **({"suffix": cfg.suffix, "length": cfg.length} if "prompt" in asked else {}) | asked))
            except ValueError as problem:  # json's errors are ValueErrors
                raise ValueError(f"{cfg.prompts}, line {number}: {problem}") from None
    if not rows:
        raise ValueError(f"{cfg.prompts} holds no prompt")
    return rows


# ------------------------------------------------------------------------------------------------- what writes


def save(path, written, given, batch, tokens):
    """All samples as .jsonl: which prompt, which sample of it, the text, and of it what is new; both as token ids, too."""
    with open(path, "w", encoding="utf-8") as file:
        for number, (row, template) in enumerate(zip(written, given)):
            fresh = [i for i, was in zip(row, template) if was == tokens.mask_id]
            line = dict(prompt=number // batch, sample=number % batch, text=tokens.decode(row), new=tokens.decode(fresh), ids=row, new_ids=fresh)
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def main():
    if "--frontier" in sys.argv:
        from evaluation import frontier

        return frontier.main([arg for arg in sys.argv[1:] if arg != "--frontier"])
    cfg = configurator.load(Config, about=__doc__, aliases=ALIASES)
    try:
        writer = Generator.of(cfg.run_dir, cfg.device, cfg.dtype)
        check_meaning(cfg, writer.objective, writer.record["model"].get("shift", False))
        asked = templates(cfg, writer.tokens, writer.seq_len, writer.causal)
        writer.load()
    except UnicodeDecodeError as problem:
        configurator.fail(f"{cfg.prompt_file or cfg.prompts} is not UTF-8: {problem}")
    except (ValueError, OSError) as problem:
        configurator.fail(str(problem))
    how, tokens = decode_config(cfg, writer.objective), writer.tokens
    rows = [row for row in asked for _ in range(cfg.batch)]
    reel = film.Reel(rows[0], tokens) if cfg.show or cfg.gif or cfg.html else None
    written, new, seconds, row_passes, passes, gaps = [], 0, 0.0, 0, 0, []
    for first in range(0, len(rows), cfg.micro_batch):
        part = rows[first : first + cfg.micro_batch]
        start = time.perf_counter()
        with film.playing(reel, cfg.show and first == 0) as watch:
            result = writer.generate(part, how, first, watch if first == 0 else lambda z: None)
            if reel and first == 0 and result.rows[0] != reel.frames[-1]:
                watch(torch.tensor(result.rows[:1]))  # what came after the end is gone
        seconds += time.perf_counter() - start
        written += result.rows
        new, passes, row_passes = new + result.new, passes + result.passes, row_passes + result.passes * len(part)
        gaps += [gap] if (gap := result.gap()) else []
    if cfg.show and not sys.stdout.isatty():
        print()  # rich ends its last picture without
    for number, row in enumerate(written):
        if len(rows) > 1:
            print(f"--- sample {number % cfg.batch + 1}" + (f" of prompt {number // cfg.batch + 1}" if len(asked) > 1 else ""))
        if not cfg.show or number:
            print(tokens.decode(row))
    try:
        if cfg.out:
            save(cfg.out, written, rows, cfg.batch, tokens)
        if cfg.gif:
            reel.gif(cfg.gif)
        if cfg.html:
            reel.html(cfg.html)
    except OSError as problem:
        configurator.fail(str(problem))
    print(f"[{new / seconds:.0f} new tokens/s, {passes} forward passes, {new / row_passes:.2f} tokens per pass]", file=sys.stderr)
    if gaps:
        kl, other, count = (sum(gap[i] * gap[2] for gap in gaps) / sum(gap[2] for gap in gaps) for i in range(3))
        print(f"[cache={how.cache} against no cache, at {sum(gap[2] for gap in gaps)} positions: KL {kl:.2g} nats, {other:.1%} other likeliest tokens]", file=sys.stderr)


if __name__ == "__main__":
    main()
