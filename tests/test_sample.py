"""sample.py end to end, on checkpoints that the trainer wrote."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import configurator
import data
import sample
from corpus import tokenfiles, tokenizers
from sampling import film


@pytest.fixture
def write(monkeypatch, capsys):
    """Call sample.main(); returns (stdout, stderr)."""

    def call(run, *flags):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--run_dir={run}", "--device=cpu", *flags])
        sample.main()
        return capsys.readouterr()

    return call


@pytest.mark.parametrize("flags", (["--objective=ar"], ["--objective=masked"], ["--objective=uniform"], ["--objective=uniform", "--loss=paper"]))
def test_prompts_are_kept_and_seeds_decide(run_main, write, flags):  # noqa: F811
    run = run_main("--steps=3", *flags)
    passes = "9 forward passes" if "--objective=masked" not in flags else " forward passes"
    first = write(run, "--prompt=12 squared", "--length=9", "--batch=3")
    texts = first.out.split("--- sample ")[1:]
    assert len(texts) == 3 and all("\n12 squared" in t for t in texts)
    assert passes in first.err
    assert write(run, "--prompt=12 squared", "--length=9", "--batch=3").out == first.out
    assert write(run, "--prompt=12 squared", "--length=9", "--batch=3", "--micro_batch=2").out == first.out
    assert write(run, "--prompt=12 squared", "--length=9", "--batch=3", "--seed=1").out != first.out
    assert "12 squared" in write(run, "--prompt=12 squared", "--length=5", "--top_k=3", "--top_p=0.9", "--temperature=0.7", "--show").out


@pytest.mark.parametrize("order", ("ancestral", "low_confidence", "threshold"))
@pytest.mark.parametrize("steps", (1, 3, 50))
def test_holes_are_filled_anywhere_and_nothing_else_changes(run_main, write, order, steps):  # noqa: F811
    run = run_main("--steps=3")
    text = "ab[MASK:4]cd[MASK]ef"
    flags = [f"--steps={steps}"] * (order != "threshold") + ["--temperature=0" if steps == 3 else "--temperature=1"]
    out = write(run, f"--text={text}", f"--order={order}", *flags)
    if order == "low_confidence":
        assert f"{min(steps, 5)} forward passes" in out.err
    assert "░" not in out.out and out.out.startswith("ab") and out.out.endswith("ef\n")
    ids = sample.holes(text, tokenizers.ByteTokenizer())
    assert ids.count(tokenizers.ByteTokenizer.mask_id) == 5 and len(ids) == 11


def test_many_prompts(run_main, write, tmp_path):  # noqa: F811
    """Of unequal lengths, from lines or .jsonl; with suffixes, holes and lengths of their own; written to a file, too."""
    run = run_main("--steps=3")
    (tmp_path / "p.txt").write_text("\ufeffa\n12 squared is\n\nlonger than that\n")
    out = write(run, f"--prompts={tmp_path / 'p.txt'}", "--length=6", "--batch=2", "--stop=False", f"--out={tmp_path / 'out.jsonl'}")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["sample"]) for line in lines] == [(p, s) for p in range(3) for s in range(2)]
    assert all(line["text"].startswith(("a", "12 squared is", "longer than that")[line["prompt"]]) for line in lines)
    assert out.out.count("--- sample 2 of prompt 3") == 1 and len({line["text"] for line in lines}) == 6
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["text"].endswith(lines[0]["new"])
    rows = [dict(prompt="ab", suffix="yz", length=3), dict(text="x[MASK:5]y"), dict(prompt="cd")]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write(run, f"--prompts={tmp_path / 'p.jsonl'}", "--length=4", "--stop=False", f"--out={tmp_path / 'out.jsonl'}", "--order=entropy")
    texts = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert texts[0].startswith("ab") and texts[0].endswith("yz") and texts[1].startswith("x") and texts[1].endswith("y") and texts[2].startswith("cd")
    for wrong, message in (("[1]", "line 1: expected {"), ('{"prompt": 3}', "line 1: prompt, suffix and text are text"), ('{"prompt": "a"\n', "line 1: "),
                           ('{"prompt": "a"}\n{"promt": "a"}', "line 2: expected {"), ('{"text": "a"}', "line 1: nothing to write"), ('{"text": "", "prompt": "a"}', "text stands alone"), ("", "holds no prompt")):
        (tmp_path / "p.jsonl").write_text(wrong)
        with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
            patch.setattr(configurator, "fail", lambda problem, message=message: (_ for _ in ()).throw(SystemExit(problem)) if message in problem else None)
            write(run, f"--prompts={tmp_path / 'p.jsonl'}")


def test_suffix_and_max_length(run_main, write):  # noqa: F811
    run = run_main("--steps=3")
    out = write(run, "--prompt=ab", "--suffix=yz", "--length=4", f"--out={os.devnull}")
    assert out.out.startswith("ab") and out.out.endswith("yz\n") and "[" in out.err
    longer = write(run, "--prompt=abc", "--max_length=10", "--stop=False", "--order=random")
    assert "7 forward passes" in longer.err


NAMES = (("--sample_steps=4", "--steps=4"), ("--inference_block_size=4", "--block=4"), ("--max_new_tokens=7", "--length=7"), ("--cfg=1.5", "--guidance=1.5"),
         ("--remasking=low_confidence", "--order=low_confidence"), ("--remasking=random", "--order=random"))


@pytest.mark.parametrize("theirs, ours", NAMES)
def test_names_of_the_seeds(run_main, write, theirs, ours):  # noqa: F811
    """Each option of their `generate` by its name there does what it does by ours, and something: what it does exactly, test_decode.py says."""
    run = run_main("--steps=3")
    both = ["--prompt=12 squared is", "--stop=False"] + ["--length=12"] * ("length" not in ours) + ["--order=low_confidence"] * ("order" not in ours)
    assert write(run, *both, theirs).out == write(run, *both, ours).out != write(run, *both).out


def test_the_seeds_other_options(run_main, write):  # noqa: F811
    """temperature, top_p and verbose, which have the same names or meaning here."""
    run = run_main("--steps=3")
    both = ["--prompt=12 squared is", "--length=12"]
    assert len({write(run, *both, flag).out for flag in ("--temperature=0", "--temperature=1", "--temperature=0.5", "--top_p=0.5", "--top_k=2")}) == 5
    assert write(run, *both, "--top_k=1").out == write(run, *both, "--top_p=0.0001").out
    assert write(run, *both, "--verbose").out == write(run, *both, "--show").out


def test_the_end_of_a_text(run_main, write, monkeypatch):  # noqa: F811
    """stop and min_length reach the decoder, where test_decode.py says what they do."""
    run, seen = run_main("--steps=3", "--objective=ar"), []
    real = sample.decode.generate
    monkeypatch.setattr(sample.decode, "generate", lambda model, rows, how, *rest: seen.append((how.end, how.min_length)) or real(model, rows, how, *rest))
    for flags in ([], ["--stop=False"], ["--min_length=4"]):
        write(run, "--prompt=12", "--length=5", *flags)
    assert seen == [(True, 0), (False, 0), (True, 4)]


def test_recordings(run_main, write, tmp_path):  # noqa: F811
    """A GIF with a picture per pass, and a page that holds every frame; both of the text that is printed."""
    run = run_main("--steps=3")
    flags = ["--text=12 squ[MASK:6]d <b>&", "--order=low_confidence"]
    plain = write(run, *flags)
    out = write(run, *flags, f"--gif={tmp_path / 'a.gif'}", f"--html={tmp_path / 'a.html'}")
    assert out.out == plain.out
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 7
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    frames = json.loads(re.search(r"const frames = (.*), colours = ", page)[1])
    assert ["".join(piece for piece, _ in frame) for frame in (frames[0], frames[-1])] == ["12 squ░░░░░░d <b>&", plain.out.rstrip("\n")]
    assert [sum(when == -2 for _, when in frame) for frame in frames] == [6, 5, 4, 3, 2, 1, 0]
    assert 'max="6" value="6"' in page and "@" not in page.split("const frames")[0].replace("@media", "")
    assert {-1, 5} <= {when for _, when in frames[-1]} <= {-1, 0, 1, 2, 3, 4, 5} and "<b>" not in page.split("const frames")[1].split("</script>")[0]


def test_a_character_of_several_tokens_is_drawn_whole():
    text = "aé→😀b"
    ids = list(text.encode())
    reel = film.Reel([257] * len(ids), tokenizers.ByteTokenizer())
    half = ids[:2] + [257] * (len(ids) - 2)
    for row in (half, ids):
        reel.record(torch.tensor([[0, 0, *row]]))  # right-aligned
    assert reel.pieces(2) == [("a", 0), ("é", 1), ("→", 1), ("😀", 1), ("b", 1)] and reel.pieces(0) == [("░", None)] * len(ids)


@pytest.mark.parametrize("flags, message", (
    (["--prompt=" + "x" * 32], "the prompt has 32 tokens, and the model's context is 32"),
    (["--prompt=abc", "--length=30"], "more than the model's context of 32"),
    (["--text=abc"], "the text has no [MASK]"),
    (["--text=" + "x" * 30 + "[MASK:9]"], "the text has 39 tokens with its holes"),
    (["--text=a[MASK:x]b[MASK]"], "[MASK:x]: 'x' is not a number; write [MASK] or [MASK:12]"),
    (["--text=a[MASK:-1]"], "[MASK:-1]: '-1' is not a number"),
    (["--prompt=a", "--text=b[MASK]"], "give one of prompt, prompt_file, prompts and text"),
    (["--text=a[MASK]", "--suffix=b"], "suffix belongs to a prompt"),
    (["--prompt=a", "--length=3", "--max_length=9"], "give length or max_length"),
    (["--prompt=abcdef", "--max_length=5"], "max_length is 5: no room"),
    (["--max_length=1000"], "max_length=1000 is more than the model's context of 32"),
    (["--suffix=b"], "suffix needs length"),
    (["--min_length=3", "--stop=False"], "min_length needs stop=True"),
    (["--min_length=3", "--suffix=a", "--length=5"], "suffix closes it"),
    (["--min_length=9", "--length=5"], "min_length=9 is more than length=5"),
    (["--threshold=0.5"], "threshold needs order=threshold"),
    (["--beside=surest"], "beside needs order=threshold"),
    (["--order=threshold", "--steps=4"], "order=threshold takes as many steps as it needs"),
    (["--order=first_hitting", "--steps=4"], "order=first_hitting takes as many steps as it needs"),
    (["--remask=capped", "--order=entropy"], "so it needs order=ancestral, not entropy"),
    (["--eta=0.5"], "eta needs remask"),
    (["--remask=confidence", "--eta=0.5"], "eta needs remask"),
    (["--cache=dual"], "cache=dual needs block"),
    (["--cache=prefix"], "cache=prefix needs block"),
    (["--refresh=3"], "refresh needs a cache, and block"),
    (["--refresh=3", "--block=4"], "refresh needs cache=prefix or dual"),
    (["--temperature=0", "--top_k=3"], "change nothing at temperature=0"),
    (["--guidance=2"], "guidance needs a prompt"),
    (["--gif=nowhere/a.gif"], "there is no such folder"),
    (["--html=tests"], "html=tests: that is a folder"),
    (["--text=a[MASK:0]"], "[MASK:0]: a hole has between 1 and a million tokens"),
    (["--text=a[MASK:99999999999]"], "a hole has between 1 and a million tokens"),
    (["--prompt_file=BINARY"], "BINARY is not UTF-8"),
    (["--gif=a.png"], "has to end in .gif"),
    (["--sample_steps=3", "--steps=4"], "'steps' and 'sample_steps' are one setting"),
    (["--prompts=nowhere.txt"], "nowhere.txt"),
    (["--prompt_file=nowhere.txt"], "nowhere.txt"),
    (["--top_p=0"], "must be above 0"),
    (["--temperatur=1"], "did you mean 'temperature'?"),
))
def test_bad_input(run_main, write, capsys, monkeypatch, flags, message):  # noqa: F811
    run = run_main("--steps=3")
    (run / "BINARY").write_bytes(b"\xff\xfe")
    (run / "tests").mkdir()
    monkeypatch.chdir(run)
    with pytest.raises(SystemExit) as exit_:
        write(run, *flags)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_ar_cannot_fill_in_the_middle(run_main, write, capsys):  # noqa: F811
    run = run_main("--steps=3", "--objective=ar")
    with pytest.raises(SystemExit):
        write(run, "--text=a[MASK]b")
    assert "can't fill holes before given text" in capsys.readouterr().err


@pytest.mark.parametrize("objective, flag, message", (("ar", "--steps=3", "steps=3 has no meaning for objective=ar"),
                                                      ("ar", "--block=3", "block=3 has no meaning"),
                                                      ("uniform", "--block=3", "block=3 has no meaning"),
                                                      ("uniform", "--cache=prefix", "cache=prefix has no meaning"),
                                                      ("uniform", "--sampler=low_confidence", "order=low_confidence has no meaning")))
def test_settings_without_meaning_are_refused(run_main, write, capsys, objective, flag, message):  # noqa: F811
    run = run_main("--steps=3", f"--objective={objective}")
    with pytest.raises(SystemExit):
        write(run, flag)
    assert message in capsys.readouterr().err


def test_no_run_no_traceback():
    done = subprocess.run([sys.executable, "sample.py", "--run_dir=nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip() == "sample.py: no usable checkpoint in 'nowhere': there is no such folder"


def test_a_trained_model_writes_what_it_read(run_main, write, corpus):  # noqa: F811
    """One block by heart: the AR model at temperature 0 continues it exactly."""
    run = run_main("--objective=ar", "--unique_tokens=32", "--epochs=3000", "--lr=5e-3", "--weight_decay=0")
    block = data.Sequences(tokenfiles.load_corpus(corpus).train, 32, 1337, 32).rows(np.zeros(1, np.int64))[0, :-1]  # from the first token on, as it was trained
    text = tokenizers.ByteTokenizer().decode(block.tolist())
    assert write(run, f"--prompt={text[:20]}", "--length=12", "--temperature=0").out == text + "\n"
