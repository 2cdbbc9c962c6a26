"""Questions about words: what GCIDE's entries become, and a corpus of them from its package."""

import pytest
from conftest import prepared
from test_debian import dictionary as make_dictionary
from test_debian import write_package
from test_pairs import pairs_in

from corpus import dictionary
from corpus.tokenfiles import load_corpus

ENTRIES = {
    'Aceric \\A*cer"ic\\, a. [L. acer maple.]\n   Pertaining to, or obtained from, the maple;\n'
    "   as, aceric acid.  --Ure.\n   [1913 Webster]":
        ("aceric", "Pertaining to, or obtained from, the maple; as, aceric acid."),
    'Serpolet \\Ser"po*let\\, n. [F.] (Bot.)\n   Wild thyme of some kind.\n   [1913 Webster]':
        ("serpolet", "Wild thyme of some kind."),
    "Haminoea \\Haminoea\\ n.\n   A common genus of marine bubble shells.\n\n   Syn: genus {Haminoea}.\n"
    "        [WordNet 1.5]": ("haminoea", "A common genus of marine bubble shells."),
    'Goosander \\Goos"an*der\\, n. [OE. gossander, a dubious word\n   formed fr. goose + gander.] (Zool.)\n'
    "   A species of {merganser}.\n   [1913 Webster]": ("goosander", "A species of merganser."),
    'Choregraphy \\Cho*reg"ra*phy\\, n.\n   1. The art of representing dancing by signs.\n'
    "      [1913 Webster]\n\n   2. Another sense.":
        ("choregraphy", "The art of representing dancing by signs."),
    "1 \\1\\ adj.\n   1. used of a single unit or thing; not two or more.": None,
    "Whilk \\Whilk\\, pron.\n   Which of all these words. [Obs. or Scot.]": None,
    "Short \\Short\\, a.\n   Too little.": None,
    "Greek \\Greek\\, n.\n   What is written with ? and other letters that were lost.": None,
    "No pronunciation\n   A definition that has no head.": None,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_entries(entry):
    record = dictionary.question(entry)
    if ENTRIES[entry] is None:
        assert record is None
        return
    word, answer = ENTRIES[entry]
    assert record["answer"] == answer
    assert record["prompt"] in [question.format(word) for question in dictionary.QUESTIONS]


def test_a_dictionary_becomes_pairs(tmp_path):
    words = [f"Word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(80)]
    entries = [f"{word} \\Word\\, n.\n   The thing that has the number {i}.\n"
               for i, word in enumerate(words)]
    packed, index = make_dictionary(entries)
    package = write_package(tmp_path / "words.deb", {"usr/share/dictd/words.dict.dz": packed,
                                                      "usr/share/dictd/words.index": index})
    prepared(tmp_path / "out", package, sft=True, val=0.2)
    found = pairs_in(load_corpus(tmp_path / "out"), "train") + pairs_in(load_corpus(tmp_path / "out"), "val")
    assert sorted(answer for _, answer in found) == sorted(
        f"The thing that has the number {i}.$" for i in range(80))


def test_other_packages_have_no_questions(tmp_path):
    package = write_package(tmp_path / "text.deb", {"usr/share/a.txt": b"Some text.\n"})
    with pytest.raises(ValueError, match="no dictionary with entries like GCIDE's"):
        prepared(tmp_path / "out", package, sft=True)
