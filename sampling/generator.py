"""A checkpoint that writes: its network, its tokenizer, and the settings it was trained with."""

import torch

import diffusion
from corpus import tokenizers
from kernels import has_bf16
from sampling import decode
from training.checkpoint import load_model, open_checkpoint, weights_folder


class Generator:
    """A network that writes text, with its tokenizer and the record of its checkpoint.

    It has its network from the start (`model`), or reads it from the checkpoint's `folder` (`load_weights`).
    Raises ValueError if the record was made with another vocabulary than the tokenizer's.
    """

    def __init__(self, record, tokenizer, device, bf16, model=None, folder=None, weights="auto"):
        settings, shape = record["settings"], record["model"]
        if (tokenizer.n_vocab, tokenizer.mask_id) != (shape["n_vocab"], shape["mask_id"]):
            raise ValueError(f"the checkpoint's vocabulary is not that of tokenizer '{tokenizer.name}'")
        self.record, self.tokenizer, self.model, self.folder = record, tokenizer, model, folder
        self.weights_folder = folder and weights_folder(folder, record, weights)
        self.device, self.bf16 = device, bf16
        self.objective, self.seq_len = settings["objective"], shape["seq_len"]
        self.is_shifted = shape.get("shift", False)
        # tokens that see each other while they are written, and nothing after; 0: the whole row
        self.block = 1 if shape["causal"] else shape.get("diffusion_block", 0)
        self.posterior = settings["loss"] == "paper"  # a uniform model whose logits are not leave-one-out
        self.schedule = diffusion.schedule(settings["schedule"])
        self.process = diffusion.Process(self.objective, tokenizer.n_vocab, tokenizer.mask_id, self.seq_len,
                                         schedule=settings["schedule"], block=shape.get("diffusion_block", 0))

    @property
    def is_averaged(self):
        """Whether its weights are a run's moving average."""
        return self.weights_folder != self.folder

    @property
    def exact_cache(self):
        """DecodeConfig's cache that changes nothing but the time: where no token sees a later block."""
        return "prefix" if self.block else "no"

    @classmethod
    def from_checkpoint(cls, path, device="auto", dtype="auto", weights="auto"):
        """Open a run's newest checkpoint, or one checkpoint folder; `load_weights` reads the weights.

        weights: ema, raw or auto, as in `checkpoint.weights_folder`. Raises ValueError or OSError.
        """
        folder, record = open_checkpoint(path)
        tokenizer = tokenizers.load_tokenizer(record["corpus"]["tokenizer"], (folder.parent, folder))
        on_gpu = device != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda" if on_gpu else "cpu")
        bf16 = dtype == "bfloat16" or (dtype == "auto" and on_gpu and has_bf16(device))
        return cls(record, tokenizer, device, bf16, folder=folder, weights=weights)

    def load_weights(self):
        """Build the network and read its weights. Returns self."""
        self.model = load_model(self.weights_folder, self.record, self.device).eval()
        return self

    def autocast(self):
        """The context in which the blocks' matrix products are in bfloat16, if they are to be."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def generate(self, rows, cfg, first_row=0, on_step=lambda z: None, allowed=()):
        """`decode.generate` with this model.

        Of its special tokens only those that end a text and `allowed` ones are written.
        """
        specials = {i for i in self.tokenizer.specials.values() if i < self.tokenizer.n_vocab}
        suppressed = specials - {self.tokenizer.eos_id, *cfg.stop_ids, *allowed}
        cfg = cfg._replace(suppress_tokens=tuple(sorted(suppressed)))
        with self.autocast():
            return decode.generate(self.model, rows, cfg, self.tokenizer.eos_id, self.schedule,
                                   self.posterior, first_row, on_step)
