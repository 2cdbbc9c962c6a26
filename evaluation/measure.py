"""What eval.py measures of a checkpoint: the bound, likelihoods in an order, benchmarks, its texts.

Each `measure_…` returns a dict for eval.json. `cfg` is eval.py's Config.
"""

import math
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

import data
from configurator import split
from evaluation import likelihood, texts
from evaluation.likelihood import error_of_mean
from evaluation.report import progress_bar
from sampling.decode import DecodeConfig
from sampling.generator import Generator
from training import distributed
from training.corpora import (
    VOCABULARY,
    mean_token_bytes,
    open_corpora,
    pair_layout,
    text_digest,
    training_text,
    validation_sequences,
)
from training.objective import Objective

# ------------------------------------------------------------------------------------------- what is measured

# Settings of a run that are needed here, for records of versions that lacked them.
DEFAULTS = dict(tokenizer="", val_share=0.0, eos="", eos_opens=False, unique_tokens=0, eval_rows=256,
                schedule="linear", document_attention=False, reset_positions=False, packing=True,
                long_pairs="cut", eos_padding="none")


class Validation(NamedTuple):
    """The validation split that a checkpoint is measured on."""

    settings: SimpleNamespace  # the run's
    corpora: list
    sequences: data.Sequences | data.PairRows | data.Mixture
    is_own: bool  # it is the text on which training validated
    layout: data.PairLayout  # of question-answer pairs


def open_validation(generator, corpus=""):
    """Open the Validation of a checkpoint, of its own corpus or of another; raises ValueError or OSError."""
    record = generator.record
    settings = SimpleNamespace(**DEFAULTS | record["settings"])
    settings.corpus = corpus or settings.corpus
    corpora = open_corpora(settings)
    meta = corpora[0].meta
    differences = [f"{key} {record['corpus'][key]} and {meta[key]}" for key in VOCABULARY
                   if record["corpus"][key] != meta[key]]
    if differences:
        raise ValueError(f"checkpoint and corpus don't go together: {', '.join(differences)}")
    is_own = text_digest(corpora, "val") == record["corpus"].get("val_sha256")
    sequences = validation_sequences(settings, corpora, generator.process.block)
    return Validation(settings, corpora, sequences, is_own, pair_layout(settings, generator.process.block))


class Subject(NamedTuple):
    """A checkpoint with its weights, ready to be measured, and the ranks that share the work."""

    generator: Generator
    objective: Objective
    validation: Validation | None
    ranks: distributed.Ranks

    def row_scorer(self, micro_batch, objective=None):
        """The likelihood.RowScorer of its validation split; `objective` may be a compiled one."""
        generator, validation = self.generator, self.validation
        read = partial(data.read_batch, validation.settings, generator.tokenizer.eos_id)
        return likelihood.RowScorer(objective or self.objective, validation.sequences, read, micro_batch,
                                    self.ranks, generator.device, generator.autocast)


def mean_and_error(values):
    """{mean, error} of the values that are numbers."""
    return dict(mean=float(np.nanmean(values)), error=error_of_mean(values))


# ------------------------------------------------------------------------------------------------ likelihoods


def measure_bound(cfg, subject):
    """The bound on the validation split, with its errors and the curve over noise ratios.

    Returns (a dict, likelihood.RowLosses).
    """
    generator, validation, ranks = subject.generator, subject.validation, subject.ranks
    settings, sequences = validation.settings, validation.sequences
    exact = not generator.process.has_noise
    passes = 1 if exact else cfg.passes
    rows = cfg.rows or settings.eval_rows or -1
    rows = sequences.available if rows < 0 else min(rows, sequences.available)

    objective = subject.objective
    if cfg.compile:  # an objective of its own: the other measurements' passes are of many shapes
        objective = Objective(generator.model, generator.posterior).eval()
        objective.nats_at_positions = torch.compile(objective.nats_at_positions, dynamic=False)
    scorer = subject.row_scorer(cfg.micro_batch, objective)

    def measure(process):
        with progress_bar("bound", ranks) as show:
            return likelihood.evaluate(scorer, process, rows, passes, show)

    process = likelihood.validation_process(generator.process, settings.schedule)
    losses = measure(process)
    nats = sum(losses.parts)
    error, noise_error = likelihood.standard_error(losses, exact)
    by_pass = [mean_token_bytes(validation.corpora, sequences, ids) for ids in losses.ids]
    bytes_per_token = float(np.mean(by_pass))
    bits_per_byte = 1 / (math.log(2) * bytes_per_token)  # of one nat per token
    bound = dict(
        kind="exact NLL" if exact else "NELBO (upper bound)",
        nats_per_token=nats,
        error=error,
        noise_error=noise_error,
        bits_per_byte=nats * bits_per_byte,
        bits_per_byte_error=error * bits_per_byte,
        perplexity=math.exp(min(nats, 700.0)),
        bytes_per_token=bytes_per_token,
        rows=rows,
        passes=passes,
        seq_len=settings.seq_len,
        text=text_digest(validation.corpora, "val"),
        own_text=validation.is_own,
    )
    if sequences.has_pairs:
        n_answers = float(np.mean([sequences.n_pairs(ids) for ids in losses.ids]))
        n_tokens = float(np.mean([levels.n_eligible.sum() for levels in losses.levels]))
        bound |= dict(answers=n_answers, nats_per_answer=nats * n_tokens / n_answers,
                      answer_tokens=n_tokens / n_answers)
    elif cfg.bins and not exact:
        curve = likelihood.noise_curve(losses, process, cfg.bins)
        bound["curve"] = [point._asdict() for point in curve.values()]
        if generator.objective == "uniform":  # the integrand of this bound is no cross-entropy
            paper = measure(process._replace(loss="paper", time="uniform"))
            noisy, clean = likelihood.cross_entropy_curves(paper, process, cfg.bins)
            for line, k in zip(bound["curve"], curve):
                line["noisy_ce"] = noisy[k].nats if k in noisy else math.nan
                line["clean_ce"] = clean[k].nats if k in clean else math.nan
    return bound, losses


def measure_ordered(cfg, subject):
    """The exact likelihoods of the samplers that write in an order, and the bound of the same rows.

    Returns {"bound" or order: dict}.
    """
    generator, validation, ranks = subject.generator, subject.validation, subject.ranks
    n = min(cfg.ordered_rows, validation.sequences.available)
    process = likelihood.validation_process(generator.process, validation.settings.schedule)
    passes = max(8, cfg.passes) if process.has_noise else 1
    losses = likelihood.evaluate(subject.row_scorer(cfg.micro_batch), process, n, passes)
    ids = data.validation_ids(n, validation.sequences.available)
    mean = dict(zip(*(part.tolist() for part in losses.by_sequence)))
    bound = np.array([mean[number] for number in ids.tolist()])
    error, _ = likelihood.standard_error(losses, exact=not process.has_noise)
    report = {"bound": dict(nats_per_token=float(bound.mean()), error=error, rows=n, values=bound.tolist())}

    own_rows = np.array_split(np.arange(n), ranks.world)[ranks.rank]
    for order in split(cfg.ordered):
        nats = np.zeros(n)
        for start in range(0, len(own_rows), cfg.micro_batch):
            rows = own_rows[start : start + cfg.micro_batch]
            title = f"{order}, rows {start + 1} to {start + len(rows)} of {len(own_rows)}"
            with progress_bar(title, ranks) as show:
                nats[rows] = ordered_nats(cfg, subject, order, ids[rows], rows, show)
        nats = likelihood.sum_over_ranks(ranks, nats)
        difference = nats - bound
        report[order] = dict(nats_per_token=float(nats.mean()), error=error_of_mean(nats), rows=n,
                             below_bound=float(-difference.mean()),
                             below_bound_error=error_of_mean(difference), values=nats.tolist())
    return report


def ordered_nats(cfg, subject, order, ids, row_numbers, on_progress):
    """The nats per token of the sequences `ids` (B,) in an order: (B,)."""
    generator, validation = subject.generator, subject.validation
    settings, device = validation.settings, generator.device
    tokens = validation.sequences.read(ids)
    documents = positions = None
    if settings.document_attention:
        documents = validation.sequences.documents(ids, tokens, generator.tokenizer.eos_id, False)
        if settings.reset_positions:
            positions = torch.as_tensor(data.positions_within(documents), device=device)
        documents = torch.as_tensor(documents, device=device)
    x = torch.as_tensor(tokens[:, 1:], dtype=torch.int64, device=device)
    nats = likelihood.chain_rule(subject.objective, x, order, generator.tokenizer.mask_id, generator.autocast,
                                 cfg.seed, row_numbers, documents, positions, generator.process.block,
                                 on_progress)
    return nats.mean(1)


# ------------------------------------------------------------------------------------------------- benchmarks


def measure_tasks(cfg, subject, opened):
    """The scores of the `opened` tasks: {task: {metric: …}}, empty on all ranks but the first."""
    from evaluation import harness, tasks  # they need lm-eval

    model = harness.NanoQuokka(
        generator=subject.generator, objective=subject.objective, ranks=subject.ranks, masks=cfg.masks,
        tokens=cfg.pass_tokens, seed=cfg.seed, order="low_confidence" if cfg.order == "auto" else cfg.order,
        steps=cfg.steps, block=cfg.block)
    scores = tasks.run_tasks(model, opened, cfg.limit, cfg.fewshot) or {}
    for line in scores.values():
        line |= dict(limit=cfg.limit or None, masks=cfg.masks)
    return scores


# ------------------------------------------------------------------------------------------------------ texts


def measure_texts(cfg, subject, judge):
    """Repetition and entropy of texts, a judge's NLL, and what they copy from the training text."""
    generator = subject.generator
    max_length = min(generator.seq_len, judge.seq_len) if judge else generator.seq_len
    if cfg.texts:
        samples = texts.read_texts(cfg.texts, generator.tokenizer, max_length)
    else:
        samples = write_texts(cfg, generator, cfg.length or max_length)
    rows = [text.new for text in samples]
    entropies = [texts.entropy(row) for row in rows]
    longest = max(map(len, rows))
    repetition = {}
    for n in (2, 3, 4):
        if longest >= n:
            repetition[n] = mean_and_error([texts.repetition(row, n) for row in rows])
    report = dict(
        texts=len(rows),
        tokens=sum(map(len, rows)),
        entropy=mean_and_error(entropies),
        distinct={n: texts.distinct(rows, n) for n in (1, 2, 3, 4)},
        repetition=repetition,
    )
    if judge:
        nll = judge_texts(judge, samples)
        pairs = [[entropy, float(value)] for entropy, value in zip(entropies, nll)]
        report |= dict(judge=cfg.judge, nll=mean_and_error(nll), pairs=pairs)
    if cfg.match:
        record, corpora = generator.record["corpus"], subject.validation.corpora
        streams = training_text(subject.validation.settings, corpora, generator.record["exact_up_to"])
        held_out = held_out_rows(corpora, generator.seq_len, rows)
        report["own_text"] = text_digest(corpora, "train") == record.get("train_sha256")
        report["copies"] = texts.copies(streams, rows, held_out, sorted(map(int, split(cfg.match))))
    return report


def write_texts(cfg, generator, length):
    """Write cfg.samples texts of `length` tokens: a list of texts.Text."""
    config = DecodeConfig(order="ancestral" if cfg.order == "auto" else cfg.order, steps=cfg.steps,
                          block=cfg.block, temperature=cfg.temperature, seed=cfg.seed,
                          cache=generator.exact_cache)
    rows = []
    for first in range(0, cfg.samples, cfg.micro_batch):
        count = min(cfg.micro_batch, cfg.samples - first)
        holes = [[generator.tokenizer.mask_id] * length] * count
        rows += generator.generate(holes, config, first).rows
    return [texts.Text(row, row, 0) for row in rows]


def judge_texts(judge, samples):
    """The judge's NLL of each text's new part: (N,) nats per token. Texts of one shape share passes."""
    shapes = [(len(text.ids), text.start) for text in samples]
    nll = np.empty(len(samples))
    for shape in sorted(set(shapes)):
        members = [i for i, other in enumerate(shapes) if other == shape]
        nll[members] = texts.judge_nll(judge, [samples[i].ids for i in members], skip=shape[1])
    return nll


def held_out_rows(corpora, seq_len, rows):
    """As many rows of the validation split, cut to the lengths of `rows`."""
    sequences = validation_sequences(SimpleNamespace(**DEFAULTS, seq_len=seq_len), corpora)
    ids = data.validation_ids(min(len(rows), sequences.available), sequences.available)
    held_out = sequences.read(ids)[:, 1:].tolist()
    return [text[: len(row)] for text, row in zip(held_out, rows)]
