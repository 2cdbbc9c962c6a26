"""Write text with a trained model.

    python sample.py --run_dir=runs/quickstart --prompt="Return the " --length=40 --show
    python sample.py --run_dir=runs/quickstart --text="def [MASK:20](self):[MASK:30]" --order=threshold
    python sample.py --run_dir=runs/sft --chat              # questions, line by line; --prompt= asks one
"""

import terminal  # isort: skip  # first: Ctrl-C during the imports

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import configurator
from configurator import setting
from sampling import conversation, film
from sampling.decode import DecodeConfig
from sampling.generator import Generator
from sampling.prompts import read_rows
from training import compiler

# names of the same settings in MegaDLMs' and LLaDA's `generate`
ALIASES = dict(
    sample_steps="steps", inference_block_size="block", max_new_tokens="length", cfg="guidance",
    remasking="order", verbose="show",
    gen_length="length", block_length="block", cfg_scale="guidance", sampler="order",
)  # fmt: skip

Order = Literal["ancestral", "first_hitting", "random", "low_confidence", "entropy", "margin", "threshold"]


@dataclass
class Config:
    run_dir: str = setting(
        "runs/quickstart", "a run folder (its newest checkpoint is used) or one checkpoint folder")

    # the prompt
    prompt: str = setting("", "text to continue; [MASK] is nothing special in it (that is text=)")
    prompt_file: str = setting("", "a UTF-8 file with the text to continue")
    prompts: str = setting(
        "", "a file of many: a prompt per line, or .jsonl with prompt, suffix and length, or text, per line")
    suffix: str = setting("", "text that follows after the new tokens (needs length)")
    text: str = setting("", "text with holes to fill: [MASK] is one token, [MASK:12] is twelve")
    chat: bool = setting(
        False, "answer questions from the terminal, or the prompt alone, through the chat template that the "
        "model was trained with")
    system: str = setting("", "of chat: the system message before the first question")
    length: int = setting(0, "new tokens after the prompt (0: as many as fit)", low=0)
    max_length: int = setting(
        0, "tokens of prompt, new text and suffix together (0: the model's context)", low=0)
    stop: bool = setting(
        True, "a text that nothing follows ends at its first separator of documents; holes get no separator")
    min_length: int = setting(0, "new tokens before it may end", low=0)
    batch: int = setting(1, "samples of each prompt", low=1, high=10**6)
    micro_batch: int = setting(64, "rows decoded at once; makes no difference to any of them", low=1)
    seed: int = setting(0, "of the samples", low=0, high=2**62)

    # WHICH positions of a diffusion model change at a step
    order: Order = setting(
        "ancestral", "the reverse process; the same one token at a time; at random; surest first by "
        "probability, entropy or lead; all that are sure enough")
    steps: int = setting(
        0, "denoising steps (0: one per new token; of blocks each takes at least one)", low=0, high=10**6)
    threshold: float = setting(
        0.9, "of order=threshold: a position is unmasked above this probability of its likeliest token",
        above=0, high=1)
    fallback: Literal["random", "surest"] = setting(
        "random", "of order=threshold: what is unmasked besides: one position at random, as in the reverse "
        "process; or, where none is above the threshold, the surest (Fast-dLLM)")
    block: int = setting(
        0, "positions, from the first hole on, that are finished before the next ones begin (0: all at once)",
        low=0)
    remask: Literal["no", "capped", "rescaled", "confidence"] = setting(
        "no", "mask again what was written (ReMDM), so that more steps than tokens pay")
    eta: float = setting(0.04, "of remask=capped and rescaled: how much", above=0, high=1)

    # WHAT they become
    temperature: float = setting(1.0, "of the softmax; 0 takes the likeliest token", low=0)
    top_k: int = setting(0, "keep the k likeliest tokens (0: all)", low=0)
    top_p: float = setting(
        1.0, "keep the likeliest tokens that hold this probability together", above=0, high=1)
    guidance: float = setting(
        0.0, "classifier-free: w in un + (w + 1)·(cond − un), un with the prompt masked", low=0)

    # how fast
    cache: Literal["auto", "no", "prefix", "dual"] = setting(
        "auto", "keep keys and values of what is before the block, or of all but it (approximate; "
        "AR and block diffusion: exact, and auto)")
    refresh: int = setting(0, "passes after which a cache is written anew (0: at each block)", low=0)
    compile: bool = setting(False, "torch.compile the passes: pays for long outputs")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of the blocks' matrix products (auto: bfloat16 on a GPU); the head's are float32")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    weights: Literal["auto", "ema", "raw"] = setting(
        "auto", "the averaged ones of a run with ema, those of training, or the first that it has")

    # what is seen of it
    show: bool = setting(
        False, "draw the first sample in the terminal, pass by pass, coloured by when tokens appeared")
    gif: str = setting("", "write that as an animated GIF")
    html: str = setting("", "write that as a page with a slider")
    out: str = setting("", "write all samples as .jsonl, too")

    NEEDS = {
        "system": "chat",
        "min_length": "stop=True",
        "threshold": "order=threshold",
        "fallback": "order=threshold",
        "remask": "order=ancestral",
        "eta": "remask=capped|rescaled",
        "guidance": "prompt or prompt_file or prompts or text or chat",
        "refresh": "block, cache=prefix|dual",
    }

    def problems(self):
        """Other settings that do not go together, one line each."""
        problems, changed = [], set(configurator.changed(self))
        if len(changed & {"prompt", "prompt_file", "prompts", "text"}) > 1:
            problems.append("give one of prompt, prompt_file, prompts and text")
        of_texts = {"prompts", "text", "suffix", "max_length", "stop", "min_length", "batch", "micro_batch",
                    "show", "gif", "html", "out"}
        if self.chat and changed & of_texts:
            names = ", ".join(sorted(changed & of_texts))
            problems.append(f"chat answers questions one by one: leave {names} out")
        of_prompts = sorted(changed & {"length", "suffix", "max_length"})
        if self.text and of_prompts:
            names = ", ".join(of_prompts)
            problems.append(f"{names} belongs to a prompt; with text the holes say how much is new")
        if self.length and self.max_length:
            problems.append("give length or max_length: one follows from the other")
        if self.suffix and not changed & {"length", "max_length", "text"}:
            problems.append("suffix needs length: how many tokens come before it")
        if self.min_length and self.suffix:
            problems.append("min_length is of a text with an open end, and suffix closes it")
        if self.length and self.min_length > self.length:
            problems.append(f"min_length={self.min_length} is more than length={self.length}")
        if self.steps and self.order in ("threshold", "first_hitting"):
            problems.append(f"order={self.order} takes as many steps as it needs; leave steps out")
        if self.temperature == 0 and changed & {"top_k", "top_p"}:
            problems.append("top_k and top_p change nothing at temperature=0: it takes the likeliest token")
        if self.device == "cuda" and not torch.cuda.is_available():
            problems.append("device=cuda, but this machine has no usable GPU; use --device=cpu")
        for name in sorted(changed & {"gif", "html", "out"}):
            problem = file_problem(getattr(self, name))
            if problem:
                problems.append(f"{name}={getattr(self, name)}: {problem}")
        if self.gif and Path(self.gif).suffix != ".gif":
            problems.append(f"gif={self.gif}: the name has to end in .gif")
        return problems


def file_problem(path):
    """Why nothing can be written to `path`, or None."""
    if Path(path).is_dir():
        return "that is a folder"
    if not Path(path).resolve().parent.is_dir():
        return "there is no such folder"
    return None


# settings without meaning for an objective
MEANINGLESS = {
    "ar": {"steps", "order", "threshold", "fallback", "block", "remask", "eta", "guidance", "refresh",
           "suffix"},
    "uniform": {"order", "threshold", "fallback", "block", "remask", "eta", "guidance", "refresh", "cache"},
    "masked": set(),
}


def check_objective(cfg, generator):
    """Raises ValueError if a setting means nothing to the model."""
    objective, size = generator.objective, generator.process.block
    configurator.check_meaning(cfg, MEANINGLESS[objective] - ({"cache"} if size else set()), objective)
    if size and (cfg.block or cfg.refresh or cfg.cache == "dual"):
        name = "block" if cfg.block else "refresh" if cfg.refresh else "cache"
        raise ValueError(f"{name}={getattr(cfg, name)} has no meaning for a model of block diffusion: it "
                         f"writes in blocks of its own, {size} tokens each, and its cache is exact")
    if objective == "ar" and cfg.cache == "dual":
        raise ValueError("cache=dual has no meaning for objective=ar: nothing follows after a new token")
    if objective == "masked" and cfg.cache in ("prefix", "dual") and not cfg.block and not size:
        raise ValueError(f"cache={cfg.cache} needs block: what is outside of it is kept")
    if generator.is_shifted and cfg.cache not in ("auto", "no"):
        raise ValueError(f"cache={cfg.cache} is not for a shifted model, whose predictions stand one position"
                         " before what is written; leave it out")


def decode_config(cfg, generator):
    """The DecodeConfig of sample.py's settings for a Generator."""
    values = {name: getattr(cfg, name) for name in DecodeConfig._fields if hasattr(cfg, name)}
    if cfg.cache == "auto":
        values["cache"] = generator.exact_cache
    return DecodeConfig(**values)


def open_run(cfg):
    """Open the Generator of cfg.run_dir, the rows of the prompts or else the chat template.

    Exits with a line if one can't be.
    """
    try:
        generator = Generator.from_checkpoint(cfg.run_dir, cfg.device, cfg.dtype, cfg.weights)
        check_objective(cfg, generator)
        template = rows = None
        if cfg.chat:
            template = conversation.open_template(generator)
        else:
            rows = read_rows(cfg, generator.tokenizer, generator.seq_len, generator.block)
        if cfg.compile:
            compiler.check(generator.device)
        return generator.load_weights(), rows, template
    except UnicodeDecodeError as problem:
        configurator.fail(f"{cfg.prompt_file or cfg.prompts} is not UTF-8: {problem}")
    except (ValueError, OSError) as problem:
        configurator.fail(str(problem))


def print_samples(cfg, samples, tokenizer):
    """Print every sample under a line that says which it is; the first one may have been drawn already."""
    n_prompts = len(samples) // cfg.batch
    if cfg.show and not sys.stdout.isatty():
        print()  # rich ends its last picture without
    for number, ids in enumerate(samples):
        if len(samples) > 1:
            of_prompt = f" of prompt {number // cfg.batch + 1}" if n_prompts > 1 else ""
            print(f"--- sample {number % cfg.batch + 1}{of_prompt}")
        if number or not cfg.show:
            print(tokenizer.decode(ids))


def save_samples(path, samples, rows, batch, tokenizer):
    """Write a .jsonl: the prompt's and the sample's number, all text, the new text, and the ids of both."""
    with open(path, "w", encoding="utf-8") as file:
        for number, (ids, row) in enumerate(zip(samples, rows)):
            new_ids = [new for new, old in zip(ids, row) if old == tokenizer.mask_id]
            new = tokenizer.decode(new_ids, continues=row[0] != tokenizer.mask_id)
            line = dict(prompt=number // batch, sample=number % batch, text=tokenizer.decode(ids),
                        new=new, ids=ids, new_ids=new_ids)
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def print_cache_gap(cache, gaps):
    """Print how far predictions from the cache were from those without, over the CacheGaps of all batches."""
    count = sum(gap.positions for gap in gaps)
    kl = sum(gap.kl * gap.positions for gap in gaps) / count
    other = sum(gap.other * gap.positions for gap in gaps) / count
    print(f"[cache={cache} against no cache, at {count} positions: KL {kl:.2g} nats, "
          f"{other:.1%} other likeliest tokens]", file=sys.stderr)


def chat(cfg, generator, template, decoding):
    """Answer the prompt, or questions from standard input; exit with a line where one can't be."""
    try:
        answering = conversation.Conversation(generator, template, decoding, cfg.length, cfg.system)
        if not (cfg.prompt or cfg.prompt_file):
            return conversation.run_chat(answering)
        question = cfg.prompt or Path(cfg.prompt_file).read_text(encoding="utf-8-sig")
        print(answering.ask(question))
    except UnicodeDecodeError as problem:
        configurator.fail(f"{cfg.prompt_file} is not UTF-8: {problem}")
    except (ValueError, OSError) as problem:
        configurator.fail(str(problem))


def main():
    if "--frontier" in sys.argv:
        configurator.fail("speed against quality is now: python eval.py frontier --run_dir=… --judge=…")
    cfg = configurator.load(Config, about=__doc__, aliases=ALIASES)
    if cfg.out or cfg.gif or cfg.html:
        terminal.keep_going()
    generator, prompt_rows, template = open_run(cfg)
    tokenizer, decoding = generator.tokenizer, decode_config(cfg, generator)
    if cfg.chat:
        return chat(cfg, generator, template, decoding)
    rows = [row for row in prompt_rows for _ in range(cfg.batch)]
    recording = film.Recording(rows[0], tokenizer) if cfg.show or cfg.gif or cfg.html else None

    # write, cfg.micro_batch rows at once; the first one is recorded
    samples, gaps, seconds, n_new, n_passes, row_passes = [], [], 0.0, 0, 0, 0
    for first in range(0, len(rows), cfg.micro_batch):
        batch = rows[first : first + cfg.micro_batch]
        start = time.perf_counter()
        with film.view(recording if first == 0 else None, cfg.show) as on_step:
            result = generator.generate(batch, decoding, first, on_step)
            if recording and first == 0 and result.rows[0] != recording.frames[-1]:
                on_step(torch.tensor(result.rows[:1]))  # tokens after the end are gone
        seconds += time.perf_counter() - start
        samples += result.rows
        n_new, n_passes = n_new + result.n_new, n_passes + result.n_passes
        row_passes += result.n_passes * len(batch)
        gaps.append(result.cache_gap())

    problem = None
    try:
        if cfg.out:
            save_samples(cfg.out, samples, rows, cfg.batch, tokenizer)
        if cfg.gif:
            recording.save_gif(cfg.gif)
        if cfg.html:
            recording.save_html(cfg.html)
    except OSError as error:  # then the samples are at least printed
        problem = str(error)
    print_samples(cfg, samples, tokenizer)
    print(f"[{n_new / seconds:.0f} new tokens/s, {n_passes} forward passes, "
          f"{n_new / row_passes:.2f} tokens per pass]", file=sys.stderr)
    gaps = [gap for gap in gaps if gap]
    if gaps:
        print_cache_gap(decoding.cache, gaps)
    if problem:
        configurator.fail(problem)


if __name__ == "__main__":
    terminal.run(main)
