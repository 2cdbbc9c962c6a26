"""Our models in lm-evaluation-harness: AR, masked and uniform checkpoints, as its model class `nanoquokka`.

Importing this registers the class. `python eval.py --tasks=hellaswag` uses it; so may a script of yours:

    from evaluation import harness
    import lm_eval
    lm_eval.simple_evaluate("nanoquokka", "run_dir=runs/quickstart", tasks=["hellaswag"])

Needs the package lm-eval: pip install '.[eval]'.
"""

import hashlib
import itertools
from typing import NamedTuple

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from evaluation import answers
from evaluation.answers import Question, Scorer
from evaluation.likelihood import eval_mode
from sampling.decode import DecodeConfig
from sampling.generator import Generator
from training import distributed
from training.objective import Objective


class TextRequest(NamedTuple):
    """A text to be written for the harness."""

    number: int  # of the request
    config: DecodeConfig
    row: list  # ids of the prompt, then masks
    prompt_length: int
    stop_sequences: list


@register_model("nanoquokka")
class NanoQuokka(TemplateLM):
    """A run or a checkpoint as a model of the harness. All ranks must ask for the same: they share the work.

    masks: noisy copies of an answer that has more masks than that. tokens: per forward pass (0: 16384 on a
    CPU, 131072 on a GPU). order, steps, block: how masked models write (steps 0: one per token). The
    checkpoint may come opened, as `generator` and `objective`.
    """

    def __init__(self, run_dir="runs/quickstart", device="auto", dtype="float32", masks=128, tokens=0, seed=0,
                 order="low_confidence", steps=0, block=0, max_gen_toks=256, batch_size=None,
                 max_batch_size=None, generator=None, objective=None, ranks=distributed.SINGLE):
        super().__init__()
        generator = generator or Generator.from_checkpoint(run_dir, device or "auto", dtype).load_weights()
        objective = objective or Objective(generator.model, generator.posterior).eval()
        default_tokens = 131_072 if generator.device.type == "cuda" else 16_384
        self.generator, self.tokenizer = generator, None
        self.scorer = Scorer(objective, generator.process, generator.device, generator.autocast, ranks,
                             int(masks), int(tokens) or default_tokens, int(seed))
        if int(block) and generator.process.block:
            raise ValueError(f"block={block} has no meaning for a model of block diffusion: it writes in "
                             f"blocks of its own, {generator.process.block} tokens each")
        config = DecodeConfig(steps=int(steps), seed=int(seed), stop=True, cache=generator.exact_cache)
        if generator.objective == "masked":
            config = config._replace(order=order, block=int(block))
        self.decode_config, self.max_gen_toks = config, int(max_gen_toks)
        self._device = generator.device  # TemplateLM's name

    @property
    def eot_token_id(self):
        return self.generator.tokenizer.eos_id

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self.generator.tokenizer.encode(string).tolist()

    # -------------------------------------------------------------------------------------------- likelihoods

    def score(self, questions, disable_tqdm=False, greedy=True):
        """Score Questions: [(log p, whether greedy decoding writes the answer)].

        Raises ValueError if ranks ask for different things.
        """
        digest = hashlib.sha256(repr(questions).encode()).hexdigest()
        if len(set(distributed.all_gather(self.scorer.ranks, digest))) > 1:
            raise ValueError("the ranks read different questions: the task's data or its examples are drawn "
                             "by chance, and not by the same")
        silent = disable_tqdm or self.scorer.ranks.rank > 0
        with tqdm(total=len(questions), desc="answers", disable=silent) as bar:

            def show(done, total):
                bar.total = total
                bar.update(done - bar.n)

            values, hits = answers.score(self.scorer, questions, self.eot_token_id, show, greedy)
        return [(float(value), bool(hit)) for value, hit in zip(values, hits)]

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        questions = [Question(context, answer, text) for (text, _), context, answer in requests]
        return self.score(questions, disable_tqdm)

    def loglikelihood(self, requests, disable_tqdm=False):
        """log p(continuation | context): exact for AR, the bound for diffusion models.

        The choices of a question share their random numbers. Tokens as for every model of the harness: spaces
        at the context's end go with the continuation; an empty context is the separator of documents.
        """
        scores = self.score([self.question(request) for request in requests], disable_tqdm)
        for request, answer in zip(requests, scores):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return scores

    def question(self, request):
        """The Question of a request for a loglikelihood."""
        context, continuation = request.args
        # the choices have the question's number in common; where there is none, their context
        key = context if request.doc_id is None else f"{request.task_name} {request.doc_id}"
        if context:
            before, after = self._encode_pair(context, continuation)
            if continuation and not after:  # a tokenizer joined it to the context's last token
                after = self.generator.tokenizer.encode(continuation, continues=True).tolist()
            return Question(before, after, key)
        ids = [self.eot_token_id, *self.tok_encode(continuation)]
        if ids[1:2] == ids[:1]:  # it begins with a separator
            ids = ids[1:]
        return Question(ids[:1], ids[1:], key)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """log p of whole texts after a separator, in windows of the model's length."""
        questions, owners = [], []
        for number, request in enumerate(requests):
            text, = request.args
            pairs = answers.windows(self.tok_encode(text), self.eot_token_id, self.scorer.max_length)
            for part, (context, answer) in enumerate(pairs):
                questions.append(Question(context, answer, f"{text[:64]} {part}"))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self.score(questions, disable_tqdm, greedy=False)):
            totals[number] += value
        for request, value in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return totals

    # ------------------------------------------------------------------------------------------------ writing

    def generate_until(self, requests, disable_tqdm=False):
        """Write after each context, up to the first of its stop sequences, greedily by default."""
        ranks = self.scorer.ranks
        batches = self.text_batches(requests)[ranks.rank :: ranks.world]
        texts = {}
        with eval_mode(self.scorer.objective):
            for first, batch in tqdm(batches, desc="writing", disable=disable_tqdm or ranks.rank > 0):
                rows = self.generator.generate([text.row for text in batch], batch[0].config, first).rows
                for text, row in zip(batch, rows):
                    written = self.generator.tokenizer.decode(row[text.prompt_length :], continues=True)
                    texts[text.number] = postprocess_generated_text(written, text.stop_sequences, None)
        for part in distributed.all_gather(ranks, texts):
            texts |= part
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[number])
        return [texts[number] for number in range(len(requests))]

    def text_batches(self, requests):
        """[(number of the first, TextRequests that are decoded alike)]: texts of similar length share one."""
        texts = [self.text_request(number, request) for number, request in enumerate(requests)]
        texts.sort(key=lambda text: (str(text.config), len(text.row), text.number))
        size = max(1, self.scorer.pass_tokens // self.generator.seq_len)
        batches = []
        for _, group in itertools.groupby(enumerate(texts), lambda pair: pair[1].config):
            group = list(group)
            for start in range(0, len(group), size):
                part = group[start : start + size]
                batches.append((part[0][0], [text for _, text in part]))
        return batches

    def text_request(self, number, request):
        """The TextRequest of a request. Where both don't fit, the new text gets half of the context."""
        context, settings = request.args
        settings = normalize_gen_kwargs(settings, self.max_gen_toks)
        prompt = self.tok_encode(context) or [self.eot_token_id]
        seq_len = self.generator.seq_len
        n = min(settings["max_gen_toks"], max(seq_len - len(prompt), seq_len // 2))
        excess = max(0, len(prompt) + n - seq_len)
        prompt = prompt[excess:]
        config = self.decode_config._replace(
            temperature=float(settings.get("temperature") or 0.0),
            top_k=int(settings.get("top_k") or 0),
            top_p=float(settings.get("top_p") or 1.0),
        )
        row = prompt + [self.generator.tokenizer.mask_id] * n
        stop_sequences = handle_stop_sequences(settings.get("until"), None)
        return TextRequest(number, config, row, len(prompt), stop_sequences)
