"""The same documents as sources of every kind: files of all formats, packed or not, folders, datasets.

Each as_… function writes texts into a folder and gives (names for the command line, settings that they need).
"""

import bz2
import gzip
import itertools
import json
import lzma

import pytest
from corpus_examples import stories
from hypothesis import strategies as st

# Everything that pre-tokenizers treat in a way of its own, and characters of one to four bytes.
ALPHABET = "aZſİ1٣é世🙂\u0301\u200b\u200d\ufeff\ufffd\0 .'!/_\t\r\x0b\x1c\x85\u00a0\u2028\u3000\n\n\n"
WORDS = ["to be", " or", "\n", "\n\n", " \n", "\r\n", "n't", "'S", "'ſ", "!", "/", "123", "<|endoftext|>",
         "a\nb"]
TEXT = st.one_of(st.text(st.sampled_from(ALPHABET), max_size=60),
                 st.lists(st.sampled_from(WORDS)).map("".join),
                 st.text())

NO_MARK = TEXT.filter(lambda text: not text.startswith("\ufeff"))  # which at a file's start is no text

TEXTS = [*stories(12), "", "\n", " a\r\nb\r\n", "x\ufeff\0y", "2 \u2028 lines", "café — 世界 🙂",
         stories(3)[1]]
LONG_TEXT = "\n".join(stories(9))  # with small tasks a document of many pieces


def write_txt(path, text):
    path.write_bytes(text.encode("utf-8"))
    return path


def write_folder(path, texts):
    path.mkdir()
    for i, text in enumerate(texts):
        write_txt(path / f"{i:03}.txt", text)
    return path


def compressed(ending, raw):
    """Bytes packed as a file of this ending, in two frames or members, as parallel packers write them."""
    if not ending:
        return raw
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(ending)
    if ending == ".zst":
        pack = pytest.importorskip("zstandard").ZstdCompressor().compress
    middle = len(raw) // 3
    return pack(raw[:middle]) + pack(raw[middle:])


def jsonl(texts, field="text", **options):
    """The bytes of a .jsonl file with more fields than one."""
    records = [{"id": i, field: text, "after": [1]} for i, text in enumerate(texts)]
    return "".join(json.dumps(record, **options) + "\n" for record in records).encode()


def write_parquet(path, texts, field="text", **options):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": range(len(texts)), field: texts})
    parquet.write_table(table, path, row_group_size=5, **options)
    return path


def write_bpe(path, eos="<|endoftext|>", **options):
    """Write a small byte-level BPE, trained here, as a tokenizer.json. Returns its tokenizers.Tokenizer."""
    hf = pytest.importorskip("tokenizers")
    byte_level = hf.pre_tokenizers.ByteLevel
    inner = hf.Tokenizer(hf.models.BPE())
    inner.pre_tokenizer = byte_level(**(dict(add_prefix_space=False) | options))
    inner.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(vocab_size=400, special_tokens=[eos],
                                     initial_alphabet=byte_level.alphabet(), show_progress=False)
    inner.train_from_iterator(stories(100), trainer)
    inner.save(str(path))
    return inner


def write_llama(path):
    """Write a tokenizer.json like Llama 2's: its normalizer writes a space in front of each text."""
    hf = pytest.importorskip("tokenizers")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += sorted(set("".join(stories(20))) - set(" \n"))
    model = hf.models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>", fuse_unk=True,
                          byte_fallback=True)
    inner = hf.Tokenizer(model)
    inner.normalizer = hf.normalizers.Sequence([
        hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")])
    inner.decoder = hf.decoders.Sequence([
        hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse(),
        hf.decoders.Strip(" ", 1, 0)])
    inner.add_special_tokens([hf.AddedToken(text, special=True, normalized=False)
                              for text in ("<unk>", "<s>", "</s>")])
    inner.save(str(path))
    return path


# ----------------------------------------------------------------------------------------------- formats


def as_separated(folder, ending, texts):
    path = folder / f"x.txt{ending}"
    path.write_bytes(compressed(ending, "\n%%\t\n".join(texts).encode()))
    return [path], dict(separator=r"\n%%\t\n")


def as_texts(folder, ending, texts):
    (folder / "texts").mkdir()
    for i, text in enumerate(texts):
        (folder / "texts" / f"{i:03}.txt{ending}").write_bytes(compressed(ending, text.encode()))
    return [folder / "texts"], {}


def as_jsonl(folder, ending, texts):
    path = folder / f"x{ending}"
    packing = path.suffix if path.suffix not in (".jsonl", ".ndjson") else ""
    path.write_bytes(compressed(packing, jsonl(texts)))
    return [path], {}


def as_parquet(folder, compression, texts):
    return [write_parquet(folder / "x.parquet", texts, compression=compression)], {}


def as_other_field(folder, ending, texts):
    """The text is in a field of another name; lines end with \\r\\n, and some are blank."""
    raw = jsonl(texts[:9], "body", ensure_ascii=False).replace(b"\n", b"\r\n\n")
    (folder / "x.jsonl").write_bytes(raw)
    return [folder / "x.jsonl", write_parquet(folder / "y.parquet", texts[9:], "body")], dict(field="body")


def as_mixture(folder, ending, texts):
    """A folder of all formats, with folders in it, files that are none of ours, and hidden ones."""
    folder = folder / "all"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(jsonl(texts[:5]))
    (folder / "b.ndjson.gz").write_bytes(gzip.compress(jsonl(texts[5:9])))
    write_txt(folder / "c.txt", texts[9])
    (folder / "deep" / "a.txt.xz").write_bytes(lzma.compress(texts[10].encode()))
    write_parquet(folder / "deep" / "b.parquet", texts[11:])
    for name in ("readme.md", ".hidden.txt", "deep/a.png"):
        (folder / name).write_bytes(b"not this\xff")
    return [folder], {}


def as_pattern(folder, ending, texts):
    """Two patterns: files that both match are taken once, where the first one has them."""
    write_folder(folder / "some", texts)
    write_txt(folder / "some" / "other.txt", "not this")
    return [folder / "some" / "0?[0-4].txt", folder / "some" / "0[0-9]*.txt"], {}


def as_any_files(folder, ending, texts):
    (folder / "odd").mkdir()
    for i, text in enumerate(texts):
        suffix = ["", ".md", ".jsonl", ".py"][i % 4]
        write_txt(folder / "odd" / f"{i:03}{suffix}", text)
    return [folder / "odd"], dict(format="txt")


def as_dataset(folder, variant, texts):
    """What save_to_disk writes."""
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts})
    if variant == "of a dict":
        dataset = datasets.DatasetDict(test=dataset.select([0]), train=dataset)
    dataset.save_to_disk(folder / "saved")
    return [f"hf:{folder / 'saved'}" if variant == "hf:" else folder / "saved"], {}


def as_dataset_files(folder, ending, texts):
    pytest.importorskip("datasets")
    (folder / "files").mkdir()
    (folder / "files" / "train.jsonl").write_bytes(jsonl(texts))
    return [f"hf:{folder / 'files'}"], {}


PACKED = ("", ".gz", ".zst", ".bz2", ".xz")
FORMATS = [
    *((as_separated, ending) for ending in PACKED),
    *((as_texts, ending) for ending in PACKED),
    *((as_jsonl, kind + ending) for kind in (".jsonl", ".ndjson") for ending in PACKED),
    *((as_parquet, compression) for compression in ("none", "snappy", "zstd")),
    (as_other_field, ""), (as_mixture, ""), (as_pattern, ""), (as_any_files, ""),
    (as_dataset, "by its folder"), (as_dataset, "hf:"), (as_dataset, "of a dict"), (as_dataset_files, ""),
]


# ------------------------------------------------- sources whose tasks begin and end in every possible way

KINDS = {
    "jsonl": (as_jsonl, ".jsonl"),
    "gz": (as_jsonl, ".jsonl.gz"),
    "texts": (as_texts, ""),
    "texts.xz": (as_texts, ".xz"),
    "alone": None,
    "alone.gz": None,
    "separated": (as_separated, ".zst"),
    "parquet": (as_parquet, "snappy"),
    "dataset": (as_dataset, ""),
    "docs": None,
    "mixed": None,
}


def write_kind(kind, folder):
    """(names, settings) of sources of a kind: long and short documents, of both some twice."""
    folder.mkdir(exist_ok=True)
    texts = [*stories(5), LONG_TEXT, "", *stories(8)[3:], LONG_TEXT, LONG_TEXT.upper(), "\n\n",
             LONG_TEXT.upper(), *stories(11)[7:]]
    if kind == "docs":
        return ["docs"], {}
    if kind == "alone":
        return [write_txt(folder / "x.txt", "\n".join(texts))], {}
    if kind == "alone.gz":
        (folder / "x.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
        return [folder / "x.txt.gz"], {}
    if kind == "mixed":
        parts = [write_kind(k, folder / k)[0] for k in ("gz", "texts", "jsonl", "parquet", "texts.xz")]
        return [*itertools.chain(*parts), "docs"], {}
    write, variant = KINDS[kind]
    return write(folder, variant, texts)


