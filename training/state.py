"""A run's two halves: what is fixed when it starts (`Run`), and where it stands (`RunState`)."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from corpus.tokenfiles import Corpus
from data import Mixture, PairRows, Sequences
from diffusion import Process
from model import ModelConfig
from training.distributed import Ranks


class Run(NamedTuple):
    """All of a run that never changes: settings, ranks, data, process, and the numbers derived from them."""

    cfg: Any  # train.Config
    ranks: Ranks
    device: torch.device
    folder: Path
    init_checkpoint: tuple | None  # (its weights' folder, record) of what init_from names
    corpora: list[Corpus]
    sequences: Sequences | PairRows | Mixture
    val_sequences: Sequences | PairRows | Mixture
    corpus_record: dict  # what a checkpoint keeps of the corpus
    process: Process
    model_config: ModelConfig
    dtype: torch.dtype  # of the matrix products
    on_gpu: bool  # also for a dry run that plans for one
    steps: int
    kept_steps: set  # whose checkpoints stay whatever `keep` says
    eval_rows: int
    bytes_per_token: float  # of exactly the validation tokens that are scored

    @property
    def eos_id(self):
        return self.corpora[0].meta["eos_id"]

    @property
    def has_documents(self):
        """Whether attention has to stay within documents, or out of padding."""
        has_padding = self.cfg.short_rows > 0 and self.cfg.objective != "ar"
        return self.cfg.document_attention or has_padding or self.sequences.has_pairs

    @property
    def tokens_per_step(self):
        return self.cfg.batch_size * self.cfg.seq_len

    @property
    def micro_batch(self):
        """Rows per rank and forward pass."""
        return self.cfg.micro_batch or self.cfg.batch_size // self.cfg.world()

    @property
    def accumulation(self):
        """Forward and backward passes per rank and step."""
        return self.cfg.batch_size // (self.micro_batch * self.cfg.world())

    def autocast(self):
        """A context in which matrix products are of `dtype`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def is_due(self, every, step):
        """Whether something done every so many steps (0: never), and after the last, is due after `step`."""
        return step == self.steps or every > 0 and step % every == 0


@dataclass
class RunState:
    """Where a run stands: what a checkpoint keeps beside the weights and the optimizer's state."""

    step: int = 0  # optimizer steps done
    next_sample: int = 0  # from which the data go on
    passed_samples: int = 0  # of those before, the ones that were given up when the run went back
    bad_in_a_row: int = 0  # steps up to this one whose gradient was refused
    pending: list = field(default_factory=list)  # figures of good steps that are in no line of the log yet

    def advance(self, batch_size):
        """Count one step more, and its samples."""
        self.step += 1
        self.next_sample += batch_size

    def samples_at(self, step, batch_size):
        """The first sample after another step of this run."""
        return self.next_sample - (self.step - step) * batch_size

    def record(self):
        """Return the state as a checkpoint's record holds it."""
        return asdict(self)

    def restore(self, record, figure_names):
        """Take over the state of a record; pending figures of another loss, with other names, are dropped."""
        for name in asdict(self):
            setattr(self, name, record[name])
        self.pending = [figures for figures in self.pending if list(figures) == figure_names]
