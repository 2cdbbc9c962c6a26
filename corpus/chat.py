"""Chat templates: from messages to tokens, as a tokenizer's folder says (Jinja) or plainly.

A template is somebody's program. It runs in Jinja's sandbox, where it can reach neither Python's own names
nor files. Special tokens come from the template alone: what looks like one in a message is text.
"""

import datetime
import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corpus.files import check_file
from corpus.tokenizers import read_json

FILE = "chat_template.jinja"
# Every message on lines of its own, and the separator behind each answer.
PLAIN = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)
MAX_TEMPLATE = 1 << 20  # bytes; the longest in use have a hundredth of it
SPECIAL = re.compile(r"<\|[^|<>\s]{1,40}\|>")  # what a special token looks like in most vocabularies


class Encoded(NamedTuple):
    """The tokens of a pair."""

    prompt: np.ndarray
    answer: np.ndarray  # closed by the separator
    n_bytes: int  # of text, which special tokens have none of


class ChatTemplate:
    """A Jinja template for one tokenizer.

    source: its text; tokens: what it calls bos_token, eos_token and the like. Raises ValueError where it is
    no template.
    """

    def __init__(self, source, tokenizer, tokens=()):
        import jinja2

        self.source, self.tokenizer = source, tokenizer
        # without the mask, which no text has
        self.ids = {text: i for text, i in tokenizer.specials.items() if i < tokenizer.n_vocab}
        if hasattr(tokenizer, "eos"):  # a tokenizer.json's, which need not be among its special tokens
            self.ids[tokenizer.eos] = tokenizer.eos_id
        eos = next(text for text, i in self.ids.items() if i == tokenizer.eos_id)
        self.tokens = {"bos_token": "", "eos_token": eos} | dict(tokens)
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)))
        try:
            self.template = sandbox().from_string(source)
        except jinja2.TemplateError as problem:
            raise ValueError(f"the chat template is not valid Jinja: {first_line(problem)}") from None

    @property
    def missing_tokens(self):
        """What looks like a special token in the template, and is none of the tokenizer's."""
        return sorted(set(SPECIAL.findall(self.source)) - set(self.ids))

    def render(self, messages, generate=False):
        """The text of messages, [{"role", "content"}]; generate: up to where an answer begins.

        Special tokens' names within the messages are broken by a character that stands in no text. Raises
        ValueError where the template fails.
        """
        import jinja2

        gap = noncharacter(messages)
        messages = [message | dict(content=self.break_specials(message["content"], gap))
                    for message in messages]
        try:
            text = self.template.render(messages=messages, add_generation_prompt=generate, tools=None,
                                        documents=None, **self.tokens)
        except jinja2.TemplateError as problem:
            raise ValueError(f"the chat template refuses the messages: {first_line(problem)}") from None
        except Exception as problem:  # whatever its own mistakes raise
            name = type(problem).__name__
            raise ValueError(f"the chat template fails: {name}: {first_line(problem)}") from None
        return Rendered(text, gap)

    def break_specials(self, content, gap):
        """A message's text with `gap` behind the first character of what reads like a special token."""
        return self.special.sub(lambda match: match[0][0] + gap + match[0][1:], content)

    def encode(self, rendered, continues=False):
        """The ids of a rendered text, and the bytes of its text without special tokens."""
        ids, n_bytes, start = [], 0, 0
        for match in [*self.special.finditer(rendered.text), None]:
            stop = match.start() if match else len(rendered.text)
            text = rendered.text[start:stop].replace(rendered.gap, "")
            if text:
                ids.append(self.tokenizer.encode(text, continues=continues or start > 0))
                n_bytes += len(text.encode("utf-8"))
            if match:
                ids.append([self.ids[match[0]]])
                start = match.end()
        return np.concatenate([np.empty(0, np.int64), *ids]).astype(np.int64), n_bytes

    def encode_prompt(self, messages):
        """The ids of messages, up to where an answer to them begins. Raises ValueError."""
        ids, _ = self.encode(self.render(messages, generate=True))
        return ids

    def encode_pair(self, pair):
        """A pairs.Pair as Encoded: exactly what a chat reads and writes. Raises ValueError.

        The answer is what the template adds to the prompt for it, up to its last special token; what follows
        (a line's end) is no part of it. A separator closes it, the template's or one more.
        """
        prompt = self.render(pair.messages, generate=True)
        whole = self.render([*pair.messages, dict(role="assistant", content=pair.answer)])
        head = prompt.text.replace(prompt.gap, whole.gap)
        if not whole.text.startswith(head):
            raise ValueError("the chat template does not go on from its prompt when the answer is there")
        tail = whole.text[len(head) :]
        specials = list(self.special.finditer(tail))
        if specials and not tail[specials[-1].end() :].strip():
            tail = tail[: specials[-1].end()]
        prompt_ids, n_prompt_bytes = self.encode(prompt)
        answer_ids, n_answer_bytes = self.encode(Rendered(tail, whole.gap), continues=True)
        if not len(prompt_ids):
            raise ValueError("an empty prompt")
        if not n_answer_bytes:
            raise ValueError("the chat template drops the answer")
        if answer_ids[-1] != self.tokenizer.eos_id:
            answer_ids = np.append(answer_ids, self.tokenizer.eos_id)
        return Encoded(prompt_ids, answer_ids, n_prompt_bytes + n_answer_bytes)

    def end_of_turn(self):
        """The ids behind which an answer is over: the separator, and the token that the template closes with.

        Of a template that refuses a question, also one with a system message before it: the separator alone.
        """
        system, question = dict(role="system", content="s"), dict(role="user", content="q")
        tail = ""
        for messages in ([question], [system, question]):
            try:
                head = self.render(messages, generate=True).text
                whole = self.render([*messages, dict(role="assistant", content="a")]).text
            except ValueError:
                continue
            tail = whole[len(head) :] if whole.startswith(head) else ""
            break
        closing = [self.ids[match[0]] for match in self.special.finditer(tail)]
        return {self.tokenizer.eos_id, *closing[-1:]}


class Rendered(NamedTuple):
    """A template's text, and the character in it that stands for nothing."""

    text: str
    gap: str


def noncharacter(messages):
    """A character that stands in no text by Unicode's own rules, nor in these messages."""
    used = set("".join(message["content"] for message in messages))
    for char in map(chr, range(0xFDD0, 0xFDF0)):
        if char not in used:
            return char
    raise ValueError("the messages hold all 32 characters that Unicode keeps for programs' own use")


def first_line(problem):
    """The first line of an exception's message."""
    return next(iter(str(problem).splitlines()), type(problem).__name__)


def sandbox():
    """Jinja's sandbox with what templates made for transformers expect."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} … {% endgeneration %}, which marks answers, as what is in it."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


# ------------------------------------------------------------------------------------------------ where it is


def find_template(tokenizer, folders, choice="auto"):
    """The ChatTemplate for a tokenizer. Raises ValueError or OSError.

    choice: the path of a Jinja file; plain; or auto, for the first of `folders` that has one, else plain.
    """
    if choice not in ("auto", "plain"):
        return read_template(Path(choice), tokenizer, folders)
    found = own_template(tokenizer, folders) if choice == "auto" else None
    return found or ChatTemplate(PLAIN, tokenizer)


def own_template(tokenizer, folders):
    """The ChatTemplate in the first of `folders` that has one, or None. Raises ValueError or OSError."""
    for folder in map(Path, folders):
        if (folder / FILE).is_file():
            return read_template(folder / FILE, tokenizer)
        path = folder / "tokenizer_config.json"
        source = read_json(path).get("chat_template")
        if isinstance(source, list):  # several, by names
            named = {part.get("name"): part.get("template") for part in source if isinstance(part, dict)}
            source = named.get("default")
        if isinstance(source, str):
            try:
                return ChatTemplate(source, tokenizer, special_tokens(folder))
            except ValueError as problem:
                raise ValueError(f"{path}: {problem}") from None
    return None


def template_of(cfg, tokenizer):
    """The ChatTemplate of a preparation: --template's, that of the tokenizer's folder, or plain."""
    folders = [tokenizer.path.parent] if hasattr(tokenizer, "path") else []
    return find_template(tokenizer, folders, cfg.template)


def read_template(path, tokenizer, folders=()):
    """The ChatTemplate in a file, with the tokens that the files beside it, or else in `folders`, name."""
    check_file(path)
    raw, tokens = path.read_bytes(), {}
    for folder in (*reversed(folders), path.parent):
        tokens |= special_tokens(folder)
    try:
        if len(raw) > MAX_TEMPLATE:
            raise ValueError(f"{len(raw):,} bytes are too many for a chat template")
        return ChatTemplate(raw.decode("utf-8-sig"), tokenizer, tokens)
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None


def special_tokens(folder):
    """{bos_token: its text, …} as the tokenizer_config.json of a folder says; not the mask, which is ours."""
    settings = read_json(Path(folder) / "tokenizer_config.json")
    named = {name: value.get("content") if isinstance(value, dict) else value
             for name, value in settings.items() if name.endswith("_token") and name != "mask_token"}
    return {name: text for name, text in named.items() if isinstance(text, str)}


def save_template(template, folder):
    """Write a template, and the tokens that it calls by name, where `find_template` finds them."""
    (Path(folder) / FILE).write_text(template.source, encoding="utf-8")
    path = Path(folder) / "tokenizer_config.json"
    settings = read_json(path)
    if settings | template.tokens != settings:
        path.write_text(json.dumps(settings | template.tokens) + "\n", encoding="utf-8")


def export_template(template, folder):
    """Write a template that says itself what it calls bos_token and the like.

    An exported tokenizer's own eos_token ends a document, and its bos_token begins one: other programs take
    likelihoods behind it.
    """
    tokens = [f"{{% set {name} = {json.dumps(text, ensure_ascii=False)} %}}\n"  # a newline that Jinja drops
              for name, text in template.tokens.items()
              if name in template.source and f"{{% set {name} = " not in template.source]
    (Path(folder) / FILE).write_text("".join([*tokens, template.source]), encoding="utf-8")


def copy_template(folder, out):
    """Copy a folder's template and the tokens that it calls by name, as far as they are there."""
    for name in (FILE, "tokenizer_config.json"):
        if (Path(folder) / name).is_file():
            shutil.copyfile(Path(folder) / name, Path(out) / name)
