"""Answers of a model that was trained on question-answer pairs: to one question, or in a chat."""

import sys

from corpus import chat


class Conversation:
    """Messages so far, and a Generator that answers them through its chat template.

    length: new tokens of an answer at most (0: as many as fit), of block diffusion to the end of a block. Old
    turns are dropped when less than that, or a quarter of the context, is left for the next one.
    """

    def __init__(self, generator, template, decoding, length=0, system=""):
        self.generator, self.template, self.length = generator, template, length
        self.ends = template.end_of_turn()
        self.decoding = decoding._replace(stop=True, stop_ids=tuple(sorted(self.ends)))
        self.messages = [dict(role="system", content=system)] if system else []
        self.n_first = len(self.messages)  # messages that are never dropped
        self.n_asked = 0
        # trained with separators to the row's end, it takes what room it is given for the answer's length
        self.fills_row = generator.record["settings"].get("eos_padding") == "row"

    def ask(self, question):
        """The model's answer to a question, as text. Raises ValueError where the question has no room."""
        messages, row = self.next_row([*self.messages, dict(role="user", content=question)])
        result = self.generator.generate([row], self.decoding, self.n_asked)
        self.n_asked += 1
        tokenizer = self.generator.tokenizer
        start = row.index(tokenizer.mask_id)
        ids = result.rows[0][start : start + self.length if self.length and self.fills_row else None]
        answer = read_answer(ids, self.ends, tokenizer)
        self.messages = [*messages, dict(role="assistant", content=answer)]
        return answer

    def next_row(self, messages):
        """(messages, their ids and masks for the answer), without old turns where these leave no room.

        Raises ValueError if there is none for the question alone.
        """
        mask_id, seq_len = self.generator.tokenizer.mask_id, self.generator.seq_len
        least, wanted = self.length or 1, self.length or seq_len // 4
        while True:
            prompt = self.template.encode_prompt(messages).tolist()
            is_first = len(messages) - self.n_first < 3
            if len(prompt) + (least if is_first else wanted) <= seq_len:
                stop = len(prompt) + self.length if self.length and not self.fills_row else seq_len
                if block := self.generator.block:  # whole blocks, as in training
                    stop = min(-(-stop // block) * block, seq_len)
                return messages, prompt + [mask_id] * (stop - len(prompt))
            if is_first:
                raise ValueError(f"the question has {len(prompt)} tokens and the model's context {seq_len}: "
                                 f"no room for an answer of {least}")
            messages = messages[: self.n_first] + messages[self.n_first + 2 :]


def read_answer(ids, ends, tokenizer):
    """The text of an answer's ids, up to the first token that ends it."""
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return tokenizer.decode(ids[:stop], continues=True)


def open_template(generator):
    """The ChatTemplate that a run or converted model has beside its tokenizer; plain, and said, without one.

    Raises ValueError or OSError.
    """
    folders = (generator.folder.parent, generator.folder)
    template = chat.own_template(generator.tokenizer, folders)
    if template is None:
        print(f"[{generator.folder.parent} has no chat template: every message stands on a line]",
              file=sys.stderr)
    return template or chat.ChatTemplate(chat.PLAIN, generator.tokenizer)


def run_chat(conversation):
    """Ask what comes on standard input, line by line, and print the answers, until it ends."""
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            question = input("> " if is_terminal else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not question.strip():
            continue
        try:
            print(conversation.ask(question), flush=True)
        except ValueError as problem:
            print(f"sample.py: {problem}", file=sys.stderr, flush=True)
