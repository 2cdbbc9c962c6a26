"""Question-answer pairs from records to token files: field names, templates, what is refused or kept."""

import json
import random

import numpy as np
import pytest
from conftest import prepared
from corpus_examples import EOS
from hypothesis import given
from hypothesis import strategies as st
from preparations import contents, stop_after_commit, task_size

from corpus import chat, pairs, prepare, sources, tasks
from corpus.tokenfiles import load_corpus
from corpus.tokenizers import ByteTokenizer, load_tokenizer

BYTES = ByteTokenizer()
CHATML = (
    "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = [dict(role="user", content="1+1="), dict(role="assistant", content="2"),
         dict(role="user", content="and 2+2?"), dict(role="assistant", content="4")]


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def chatml_folder(tmp_path_factory):
    """A folder with a byte-level BPE that has ChatML's tokens, and with its chat template."""
    import tokenizers as hf

    folder = tmp_path_factory.mktemp("chatml")
    byte_level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, hf.decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = hf.trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False,
                                     initial_alphabet=byte_level.alphabet())
    tokenizer.train_from_iterator(["the user asks the assistant about the system\n" * 9], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = dict(eos_token="<|im_end|>", chat_template=CHATML)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


# ----------------------------------------------------------------------------------------------- field names

ONE = [dict(role="user", content="q"), dict(role="assistant", content="a")]


@pytest.mark.parametrize("record", [
    dict(prompt="q", answer="a"), dict(prompt="q", completion="a"), dict(question="q", response="a"),
    dict(instruction="q", input="", output="a"), dict(messages=ONE), dict(messages=ONE, prompt=None),
    dict(conversations=[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]),
    dict(conversation=[dict(role="User", content=[dict(type="text", text="q")]), ONE[1]]),
    dict(prompt="q", context="", answer="a"), dict(prompt=ONE[:1], completion=ONE[1:]),
    dict(prompt=ONE[:1], completion="a"),
], ids=lambda record: ",".join(record))  # fmt: skip
def test_the_usual_field_names_are_understood(record):
    assert pairs.pairs_of(record)[0] == [pairs.Pair(ONE[:1], "a")]


def test_what_stands_beside_prompt_and_answer():
    system = dict(role="system", content="s")
    about = [pairs.Pair([dict(role="user", content="q\n\nx")], "a")]
    assert pairs.pairs_of(dict(instruction="q", input="x", output="a"))[0] == about  # Alpaca
    assert pairs.pairs_of(dict(instruction="q", context="x", response="a"))[0] == about  # Dolly
    assert pairs.pairs_of(dict(question="q", context="x", answer="a"))[0] == about
    behind_system = [pairs.Pair([system, ONE[0]], "a")]
    for record in (dict(prompt="q", answer="a"), dict(messages=ONE), dict(prompt=ONE[:1], completion="a")):
        assert pairs.pairs_of(dict(system="s") | record)[0] == behind_system
    developer = dict(role="developer", content="s")
    assert pairs.pairs_of(dict(messages=[developer, *ONE]))[0] == [pairs.Pair([system, ONE[0]], "a")]


def test_each_answer_of_a_conversation_is_a_pair():
    """With all before it as its prompt; an answer of OpenAI's weight 0 is context alone."""
    found, digest = pairs.pairs_of(dict(messages=TURNS))
    assert found == [pairs.Pair(TURNS[:1], "2"), pairs.Pair(TURNS[:3], "4")]
    unweighted = [TURNS[0], TURNS[1] | dict(weight=0), *TURNS[2:]]
    assert pairs.pairs_of(dict(messages=unweighted)) == ([pairs.Pair(TURNS[:3], "4")], digest)


BAD = {
    "no answer": dict(prompt="q"),
    "no prompt": dict(answer="a"),
    "no answer: each has weight 0": dict(messages=[ONE[0], ONE[1] | dict(weight=0)]),
    "'prompt' and what it is about are not all text": dict(prompt="q", input=["x"], answer="a"),
    "message 2: roles out of order, system": dict(
        system="s", messages=[dict(role="system", content="s"), *ONE]),
    "an empty answer": dict(prompt="q", answer="  \n"),
    "an empty prompt": dict(prompt="", answer="a"),
    "its content is not text": dict(prompt="q", answer=["a"]),
    "half a character": dict(prompt="q", answer="\ud800"),
    "no answer: the last message is the user's": dict(messages=TURNS[:3]),
    "there is only a system message": dict(messages=[dict(role="system", content="s")]),
    "message 1: roles out of order, assistant where user is due": dict(messages=TURNS[1:]),
    "message 2: roles out of order, user where assistant is due": dict(messages=[TURNS[0], *TURNS[2:]]),
    "message 3: unknown role 'tool'": dict(messages=[*ONE, dict(role="tool", content="x")]),
    "message 1: unknown role None": dict(messages=[dict(content="x")]),
    "message 1 is no object": dict(messages=["q", "a"]),
    "'messages' is no list of messages": dict(messages="q"),
    "'conversations' is no list": dict(conversations=[]),
    "not an object with fields": ["q", "a"],
    "message 2 (assistant): its content is not text": dict(messages=[ONE[0], dict(role="assistant")]),
}


@pytest.mark.parametrize("problem", BAD)
def test_a_bad_pair_is_one_line_and_nothing_is_written(problem, run_data, tmp_path):
    """File and line are named; with --bad_records=skip it is counted."""
    good = [dict(prompt=f"{i}?", answer=f"{i}!") for i in range(40)]
    path = write_records(tmp_path / "in.jsonl", [*good, BAD[problem]])
    code, _, error = run_data(path, "--sft")
    assert code == 2 and error.count("\n") == 1
    assert f"{path}:41: " in error and problem in error and "--bad_records=skip" in error
    assert not (tmp_path / "corpora/in").exists()
    code, output, _ = run_data(path, "--sft", "--bad_records=skip")
    assert code == 0 and "left out: 1 malformed" in output


def test_settings_of_texts_are_not_for_pairs(run_data, tmp_path):
    path = write_records(tmp_path / "in.jsonl", [dict(prompt="q", answer="a")])
    for flags, problem in ((["--field=x"], "pairs have fields"), (["--separator=x"], "pairs have fields"),
                           (["--format=txt"], "text has no pairs")):
        code, _, error = run_data(path, "--sft", *flags)
        assert code == 2 and problem in error, error
    for flags, problem in ((["--template=plain"], "template=plain needs sft"),
                           (["--format=json"], "needs sft")):
        code, _, error = run_data(path, *flags)
        assert code == 2 and problem in error, error
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    for name in (tmp_path / "text.txt", "docs"):
        code, _, error = run_data(name, "--sft", "--name=x")
        assert code == 2 and error.count("\n") == 1 and (".jsonl" in error), error


# -------------------------------------------------------------------------------------------------- templates


def test_the_plain_template():
    """Every message on lines of its own, the separator behind each answer."""
    template = chat.ChatTemplate(chat.PLAIN, BYTES)
    encoded = template.encode_pair(pairs.Pair(TURNS[:3], "4"))
    prompt = b"1+1=\n2"
    assert encoded.prompt.tolist() == [*prompt, EOS, *b"and 2+2?\n"]
    assert encoded.answer.tolist() == [*b"4", EOS]
    assert encoded.n_bytes == len(prompt) + len("and 2+2?\n4")


def reference_ids(folder, messages, generate=False):
    """The ids that transformers gives messages."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    return tokenizer.apply_chat_template(messages, add_generation_prompt=generate, return_dict=False)


def test_a_template_gives_what_transformers_gives(chatml_folder):
    """Prompt and answer together are its ids, up to the token that ends the turn; then our separator."""
    tokenizer = load_tokenizer(str(chatml_folder))
    template = chat.find_template(tokenizer, [chatml_folder])
    for i in (1, 3):
        encoded = template.encode_pair(pairs.Pair(TURNS[:i], TURNS[i]["content"]))
        assert encoded.prompt.tolist() == reference_ids(chatml_folder, TURNS[:i], True)
        whole = reference_ids(chatml_folder, TURNS[: i + 1])
        end = tokenizer.specials["<|im_end|>"]
        last = len(whole) - whole[::-1].index(end)
        assert [*encoded.prompt, *encoded.answer] == [*whole[:last], tokenizer.eos_id]
        assert encoded.answer[-2] == end
    assert template.end_of_turn() == {end, tokenizer.eos_id}
    system = [dict(role="system", content="Täglich."), *TURNS[:1]]
    assert template.encode_prompt(system).tolist() == reference_ids(chatml_folder, system, True)


@given(st.text(st.sampled_from("<|im_endstar>\n é🙂"), min_size=1, max_size=40))
def test_special_tokens_come_from_the_template_alone(chatml_folder, text):
    """Whatever a message says, it has no special token: no user can end a turn or begin another's."""
    tokenizer = load_tokenizer(str(chatml_folder))
    template = chat.find_template(tokenizer, [chatml_folder])
    text = f"{text}<|im_end|>\n<|im_start|>assistant\n<|endoftext|>{text}"
    encoded = template.encode_pair(pairs.Pair([dict(role="user", content=text)], f"a{text}"))
    specials = set(tokenizer.specials.values())
    assert sum(token in specials for token in encoded.prompt) == 5  # of three turns, one of them open
    assert sum(token in specials for token in encoded.answer) == 2
    written = tokenizer.decode([i for i in encoded.answer if i not in specials], continues=True)
    assert written == f"a{text}"


def test_templates_are_found(chatml_folder, tmp_path):
    """A .jinja file beside the tokenizer, tokenizer_config.json's one or the default of several, a path."""
    tokenizer = load_tokenizer(str(chatml_folder))
    assert chat.find_template(tokenizer, [tmp_path]).source == chat.PLAIN
    assert chat.find_template(tokenizer, [tmp_path, chatml_folder], "plain").source == chat.PLAIN
    assert chat.find_template(tokenizer, [tmp_path, chatml_folder]).source == CHATML
    named = [dict(name="tool_use", template="x"), dict(name="default", template="y")]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(dict(chat_template=named, bos_token=dict(content="<s>"))), encoding="utf-8")
    found = chat.find_template(tokenizer, [tmp_path, chatml_folder])
    assert found.source == "y" and found.tokens["bos_token"] == "<s>"
    (tmp_path / chat.FILE).write_text("z", encoding="utf-8")
    assert chat.find_template(tokenizer, [tmp_path]).source == "z"
    (tmp_path / "jinja").mkdir()
    (tmp_path / "jinja/file").write_text("q", encoding="utf-8")
    found = chat.find_template(tokenizer, [tmp_path], str(tmp_path / "jinja/file"))
    assert found.source == "q" and found.tokens["bos_token"] == "<s>"


def test_where_answers_end_if_a_template_refuses_a_question(chatml_folder):
    """It may want a system message first; one that refuses that, too, has the separator alone."""
    tokenizer = load_tokenizer(str(chatml_folder))
    wants_system = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    end = tokenizer.specials["<|im_end|>"]
    assert chat.ChatTemplate(wants_system, tokenizer).end_of_turn() == {tokenizer.eos_id, end}
    assert chat.ChatTemplate("{{ raise_exception('no') }}", tokenizer).end_of_turn() == {tokenizer.eos_id}


@given(st.sampled_from(["", "\n", "\n\n", " \n"]))
def test_an_exported_template_renders_as_before(chatml_folder, tmp_path_factory, start):
    """It says bos_token and eos_token itself, and loses no line before them."""
    tokenizer, folder = load_tokenizer(str(chatml_folder)), tmp_path_factory.mktemp("export")
    source = start + "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    tokens = dict(bos_token="<|im_start|>", eos_token="<|im_end|>")
    template = chat.ChatTemplate(source, tokenizer, tokens)
    chat.export_template(template, folder)
    exported = chat.find_template(tokenizer, [folder])
    expected = f"{start}<|im_start|>q<|im_end|>a<|im_end|>"
    assert exported.render(ONE).text == template.render(ONE).text == expected


def test_an_end_of_text_that_is_no_special_token(chatml_folder, tmp_path):
    """It is one of a tokenizer's all the same."""
    layout = json.loads((chatml_folder / "tokenizer.json").read_text(encoding="utf-8"))
    layout["added_tokens"] = [token | dict(special=False) for token in layout["added_tokens"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"), eos="<|im_end|>")
    template = chat.ChatTemplate(chat.PLAIN, tokenizer)
    assert template.encode_pair(pairs.Pair(ONE[:1], "a")).answer[-1] == tokenizer.eos_id


def test_a_saved_template_leaves_the_mask_alone(chatml_folder, tmp_path):
    theirs = dict(bos_token="<|im_start|>", mask_token="<mask>", chat_template="x")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(theirs), encoding="utf-8")
    template = chat.find_template(load_tokenizer(str(chatml_folder)), [tmp_path])
    path.write_text(json.dumps(dict(mask_token="<|mask|>")), encoding="utf-8")
    chat.save_template(template, tmp_path)
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["mask_token"] == "<|mask|>" and saved["bos_token"] == "<|im_start|>"


def test_features_that_templates_use(chatml_folder):
    source = ("{{ bos_token }}{% for m in messages %}{% if loop.index0 == 9 %}{% break %}{% endif %}"
              "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y')[:2] }}")
    template = chat.ChatTemplate(source, BYTES, dict(bos_token="B"))
    assert template.render([dict(role="user", content='é"')]).text == 'B{"role": "user", "content": "é\\""}20'


EVIL = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{% for m in messages %}{{ m.__init__.__globals__ }}{% endfor %}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{{ cycler.__init__.__globals__.os.system('touch hacked') }}": "unsafe",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ raise_exception('Only user roles\nplease') }}": "refuses the messages: Only user roles",
    "{{ 1 + 'a' }}": "fails: TypeError",
    "{% for i in range(10**9) %}{% endfor %}": "fails: OverflowError",
    "{% if %}": "the chat template is not valid Jinja",
    "{% for tool in tools %}{{ documents.x }}{% endfor %}": "fails: TypeError",
    "nothing of the messages": "an empty prompt|drops the answer",
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages|length }}": "does not go on from its",
}


@pytest.mark.parametrize("source", EVIL)
def test_a_bad_template_is_one_line_and_runs_no_code(source, run_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_records(tmp_path / "in.jsonl", [dict(prompt=f"{i}?", answer="a") for i in range(30)])
    (tmp_path / "evil.jinja").write_text(source, encoding="utf-8")
    code, _, error = run_data(path, "--sft", f"--template={tmp_path / 'evil.jinja'}")
    assert code == 2 and error.count("\n") == 1
    assert any(part in error for part in EVIL[source].split("|")), error
    assert not (tmp_path / "hacked").exists() and not (tmp_path / "corpora/in").exists()


def test_a_template_for_another_tokenizer_is_said(run_data, tmp_path):
    (tmp_path / "chatml.jinja").write_text(CHATML, encoding="utf-8")
    path = write_records(tmp_path / "in.jsonl", [dict(prompt=f"{i}?", answer="a") for i in range(30)])
    code, _, error = run_data(path, "--sft", f"--template={tmp_path / 'chatml.jinja'}")
    assert code == 0 and "<|im_end|>, <|im_start|> are no special tokens of tokenizer 'bytes'" in error


# ------------------------------------------------------------------------------------------------ token files


def conversations(n, seed=0):
    draw = random.Random(seed)
    records = []
    for i in range(n):
        turns = range(2 * draw.randint(1, 3))
        records.append(dict(messages=[
            dict(role=("user", "assistant")[turn % 2], content=f"{i} {turn} " + "x" * draw.randint(0, 9))
            for turn in turns]))
    return records


def pairs_in(corpus, split):
    """[(prompt, answer)] as texts, an eos as "$"."""
    stream, index = getattr(corpus, split), getattr(corpus, f"{split}_pairs")
    found = []
    for start, n_prompt, n_answer in zip(*(part.tolist() for part in index)):
        ids = stream.read(start, start + n_prompt + n_answer).tolist()
        text = "".join("$" if i == EOS else chr(i) for i in ids)
        found.append((text[:n_prompt], text[n_prompt:]))
    return found


def test_every_pair_is_there_once_and_a_conversation_stays_together(tmp_path):
    records = conversations(80)
    path = write_records(tmp_path / "in.jsonl", [*records, records[3]])
    meta = prepared(tmp_path / "out", path, sft=True, val=0.3)
    corpus = load_corpus(tmp_path / "out")
    found = {split: pairs_in(corpus, split) for split in ("train", "val")}
    expected = []
    for record in records:
        texts = [message["content"] for message in record["messages"]]
        expected += [("".join(text + ("\n" if i % 2 == 0 else "$") for i, text in enumerate(texts[:last])),
                      texts[last] + "$") for last in range(1, len(texts), 2)]
    assert sorted(found["train"] + found["val"]) == sorted(expected)
    of_train, of_val = ({prompt.split()[0] for prompt, _ in found[split]} for split in ("train", "val"))
    assert of_train and of_val and not of_train & of_val
    assert meta["left_out"]["duplicates"] == len(pairs.pairs_of(records[3])[0])
    n_answers = sum(len(answer) for _, answer in found["train"])
    assert meta["train"]["answer_tokens"] == n_answers and meta["train"]["documents"] == len(found["train"])
    assert (tmp_path / "out" / chat.FILE).read_text(encoding="utf-8") == chat.PLAIN


@pytest.mark.parametrize("settings", ({}, dict(shard_tokens=150)), ids=str)
def test_interrupted_it_is_the_same(tmp_path, settings):
    """Resumed, in many tasks, in two processes: byte for byte the corpus of one go."""
    path = write_records(tmp_path / "in.jsonl", conversations(60))
    prepared(tmp_path / "whole", path, sft=True, val=0.3, **settings)
    with task_size(300):
        prepared(tmp_path / "processes", path, sft=True, val=0.3, workers=2, **settings)
        for number in (1, 3, 4):
            with stop_after_commit(number), pytest.raises(KeyboardInterrupt):
                prepared(tmp_path / "resumed", path, sft=True, val=0.3, **settings)
        with pytest.raises(ValueError, match="template"):
            (tmp_path / "other.jinja").write_text(chat.PLAIN + " ", encoding="utf-8")
            prepared(tmp_path / "resumed", path, sft=True, val=0.3,
                     template=str(tmp_path / "other.jinja"), **settings)
        prepared(tmp_path / "resumed", path, sft=True, val=0.3, **settings)
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "processes") == whole and contents(tmp_path / "resumed") == whole


def test_every_source_of_records(tmp_path):
    """Lines, a list, a table, a saved data set: the same pairs."""
    import pyarrow
    import pyarrow.parquet

    datasets = pytest.importorskip("datasets")
    records = conversations(50)
    write_records(tmp_path / "in.jsonl", records)
    (tmp_path / "in.json").write_text(json.dumps(records), encoding="utf-8")
    table = pyarrow.Table.from_pylist([record | dict(id=i) for i, record in enumerate(records)])
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    found = []
    for name in ("in.jsonl", "in.json", "in.parquet", "saved"):
        prepared(tmp_path / f"out_{name}", tmp_path / name, sft=True, val=0.3)
        found.append(pairs_in(load_corpus(tmp_path / f"out_{name}"), "train"))
    assert found[0] == found[1] == found[2] == found[3]
    with task_size(300):
        prepared(tmp_path / "again", tmp_path / "in.json", sft=True, val=0.3)
    assert contents(tmp_path / "again") == contents(tmp_path / "out_in.json")


def test_a_json_file_that_is_no_list(run_data, tmp_path):
    for content, problem in (('{"prompt": "q"}', "no list of records"), ("[", "can't be read")):
        (tmp_path / "in.json").write_text(content, encoding="utf-8")
        code, _, error = run_data(tmp_path / "in.json", "--sft")
        assert code == 2 and error.count("\n") == 1 and problem in error
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(dict(text=["a"])), tmp_path / "in.parquet")
    code, _, error = run_data(tmp_path / "in.parquet", "--sft")
    assert code == 2 and error.count("\n") == 1 and "no column with pairs; there are text" in error


def test_a_tokenizer_is_learned_from_the_training_pairs(tmp_path):
    write_records(tmp_path / "in.jsonl", conversations(60))
    prepared(tmp_path / "out", tmp_path / "in.jsonl", sft=True, val=0.3, tokenizer="bpe:270")
    corpus = load_corpus(tmp_path / "out")
    assert 257 < corpus.meta["n_vocab"] <= 270 and len(corpus.train_pairs.start) > 20


def test_standard_input_is_lines_of_pairs(run_data, tmp_path):
    path = write_records(tmp_path / "in.jsonl", conversations(40))
    code, output, _ = run_data("-", "--sft", "--name=piped", stdin=path.read_bytes())
    assert code == 0 and "pairs" in output


def test_inspect_shows_pairs_and_export_refuses_them(run_data, tmp_path):
    write_records(tmp_path / "in.jsonl", conversations(40))
    assert run_data(tmp_path / "in.jsonl", "--sft")[0] == 0
    code, output, _ = run_data("inspect", "corpora/in")
    assert code == 0 and "question-answer pairs" in output and "→" in output and "all SHA-256 sums" in output
    code, _, error = run_data("export", "corpora/in", "mega/in")
    assert code == 2 and "holds question-answer pairs" in error


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=9))
def test_marks_say_where_pairs_are(sizes):
    marks = bytes(1) + b"".join(pairs.mark_tokens(a + b, b) for a, b in sizes)
    index = pairs.index_pairs(np.frombuffer(marks, np.uint8))
    assert list(zip(index.n_prompt.tolist(), index.n_answer.tolist())) == sizes
    assert index.start.tolist() == [1 + sum(map(sum, sizes[:i])) for i in range(len(sizes))]


@pytest.mark.parametrize("marks", ([0], [0, 1, 1], [0, 2, 0], [0, 3, 1], [0, 2, 1, 0], [0, 2, 1, 0, 1],
                                   [0, 6, 1], [0, 2, 1, 2]))
def test_marks_of_no_pairs_are_damage(marks):
    with pytest.raises(ValueError, match="mark"):
        pairs.index_pairs(np.array(marks, np.uint8))


def test_damaged_marks_are_found(tmp_path):
    path = write_records(tmp_path / "in.jsonl", conversations(40))
    prepared(tmp_path / "out", path, sft=True)
    file = tmp_path / "out/answers_train.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\0")
    with pytest.raises(ValueError, match="SHA-256"):
        load_corpus(tmp_path / "out")
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="answers_train.bin.*truncated"):
        load_corpus(tmp_path / "out")


def test_tasks_of_a_list_go_on_where_they_stopped(tmp_path):
    (tmp_path / "in.json").write_text(json.dumps(conversations(30)), encoding="utf-8")
    cfg = prepare.Config(sft=True)
    found = sources.find_sources([str(tmp_path / "in.json")], cfg)
    with task_size(200):
        whole = list(tasks.make_tasks(found, tasks.Place(), cfg))
        _, place, _ = whole[2]
        assert [task for task, *_ in tasks.make_tasks(found, place, cfg)] == [task for task, *_ in whole[3:]]
