"""A checkpoint that can write: its network, its tokenizer and how it was trained."""

import sys
from pathlib import Path

import torch

import diffusion
from corpus import tokenizers
from kernels import has_bf16
from sampling import decode
from training.checkpoint import load_model, load_newest, read_checkpoint


class Generator:
    """A network that can write, with its tokenizer and the `record` of its checkpoint. Raises ValueError."""

    def __init__(self, record, tokens, device, bf16, model=None):
        settings, model_settings = record["settings"], record["model"]
        if (tokens.n_vocab, tokens.mask_id) != (model_settings["n_vocab"], model_settings["mask_id"]):
            raise ValueError(f"the checkpoint's vocabulary is not that of tokenizer '{tokens.name}'")
        self.record, self.tokens, self.device, self.bf16, self.model = record, tokens, device, bf16, model
        self.objective, self.seq_len, self.causal = settings["objective"], model_settings["seq_len"], model_settings["causal"]
        self.posterior, self.schedule = settings["loss"] == "paper", diffusion.schedule(settings["schedule"])
        self.process = diffusion.Process(self.objective, tokens.n_vocab, tokens.mask_id, self.seq_len, schedule=settings["schedule"])

    @classmethod
    def of(cls, run_dir, device, dtype="auto"):
        """The newest checkpoint of a run, or the one in a folder; its weights are read by `load`. Raises ValueError or OSError."""
        run = Path(run_dir)
        if not run.is_dir():
            raise FileNotFoundError(f"no usable checkpoint in '{run}': there is no such folder")
        if (run / "checkpoint.json").is_file():
            folder, record = run, read_checkpoint(run)
        else:
            folder, record = load_newest(run, lambda warning: print(f"warning: {warning}", file=sys.stderr))
        tokens = tokenizers.load_tokenizer(record["corpus"]["tokenizer"], (folder.parent, folder))
        device = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        writer = cls(record, tokens, device, dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda" and has_bf16(device)))
        writer.folder = folder
        return writer

    def load(self):
        """Read the weights. Returns self."""
        self.model = load_model(self.folder, self.record, self.device).eval()
        return self

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def generate(self, rows, how, first=0, watch=lambda z: None):
        """`decode.generate` with this model."""
        special = {i for i in self.tokens.specials.values() if i < self.tokens.n_vocab and i != self.tokens.eos_id}
        with self.autocast():
            return decode.generate(self.model, rows, how._replace(banned=tuple(sorted(special))), self.tokens.eos_id, self.schedule,
                                   self.posterior, first, watch)


def decode_config(cfg, objective):
    """The settings that say how to decode."""
    shared = {name: getattr(cfg, name) for name in decode.DecodeConfig._fields if hasattr(cfg, name)}
    cache = ("prefix" if objective == "ar" else "no") if cfg.cache == "auto" else cfg.cache
    return decode.DecodeConfig(**shared | dict(cache=cache, end=cfg.stop))
