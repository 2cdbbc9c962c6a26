"""sample.py end to end, on checkpoints that the trainer wrote."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, call_main
from PIL import Image
from runs import TINY

import data
import sample
import train
from corpus import tokenfiles, tokenizers


@pytest.fixture(scope="module")
def run_of(corpus, tmp_path_factory):
    """The folder of a run of three steps with these flags of train.py; each is trained once."""
    runs = {}

    def call(*flags):
        if flags not in runs:
            runs[flags] = tmp_path_factory.mktemp("runs") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train, "draw_losses", lambda run_dirs, picture: None)  # as long as the run
                call_main(patch, *TINY, "--steps=3", f"--corpus={corpus}", f"--run_dir={runs[flags]}", *flags)
        return runs[flags]

    return call


@pytest.fixture
def run(run_of):
    """A run of a masked model."""
    return run_of()


@pytest.fixture
def write(monkeypatch, capsys):
    """Call sample.main(); returns (stdout, stderr)."""

    def call(run, *flags):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--run_dir={run}", "--device=cpu", *flags])
        sample.main()
        return capsys.readouterr()

    return call


@pytest.fixture
def refusal(write, capsys):
    """Call sample.main(), which has to end with exit code 2; returns its stderr."""

    def call(run, *flags):
        with pytest.raises(SystemExit) as exit_:
            write(run, *flags)
        assert exit_.value.code == 2
        return capsys.readouterr().err

    return call


def samples(path):
    """The lines of --out."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# prompts ----------------------------------------------------------------------------------------------------

MODELS = (["--objective=ar"], [], ["--objective=uniform"], ["--objective=uniform", "--loss=paper"])


@pytest.mark.parametrize("flags", MODELS)
def test_prompts_are_kept_and_seeds_decide(run_of, write, flags):
    run, prompt = run_of(*flags), "--prompt=12 squared"
    first = write(run, prompt, "--length=9", "--batch=3")
    texts = first.out.split("--- sample ")[1:]
    assert len(texts) == 3 and all("\n12 squared" in text for text in texts)
    assert ("9 forward passes" if flags else " forward passes") in first.err
    assert write(run, prompt, "--length=9", "--batch=3").out == first.out
    assert write(run, prompt, "--length=9", "--batch=3", "--micro_batch=2").out == first.out
    assert write(run, prompt, "--length=9", "--batch=3", "--seed=1").out != first.out
    shown = write(run, prompt, "--length=5", "--top_k=3", "--top_p=0.9", "--temperature=0.7", "--show")
    assert "12 squared" in shown.out


@pytest.mark.parametrize("order", ("ancestral", "low_confidence", "threshold"))
@pytest.mark.parametrize("steps", (1, 3, 50))
def test_holes_are_filled_anywhere_and_nothing_else_changes(run, write, order, steps):
    flags = [f"--order={order}", f"--temperature={int(steps != 3)}"]
    if order != "threshold":
        flags.append(f"--steps={steps}")
    out = write(run, "--text=ab[MASK:4]cd[MASK]ef", *flags)
    if order == "low_confidence":
        assert f"{min(steps, 5)} forward passes" in out.err
    assert "░" not in out.out and out.out.startswith("ab") and out.out.endswith("ef\n")


def test_many_prompts(run, write, tmp_path):
    """Of unequal lengths, from lines or .jsonl; with suffixes and holes; written to a file, too."""
    lines, jsonl, out = tmp_path / "p.txt", tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts = "a", "12 squared is", "longer than that"
    lines.write_text("\n".join(prompts), encoding="utf-8")
    printed = write(run, f"--prompts={lines}", "--length=6", "--batch=2", "--stop=False", f"--out={out}").out
    found = samples(out)
    assert [(s["prompt"], s["sample"]) for s in found] == [(p, s) for p in range(3) for s in range(2)]
    assert all(s["text"].startswith(prompts[s["prompt"]]) and s["text"].endswith(s["new"]) for s in found)
    assert printed.count("--- sample 2 of prompt 3") == 1 and len({s["text"] for s in found}) == 6

    rows = [dict(prompt="ab", suffix="yz", length=3), dict(text="x[MASK:5]y"), dict(prompt="cd")]
    jsonl.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    write(run, f"--prompts={jsonl}", "--length=4", "--stop=False", f"--out={out}", "--order=entropy")
    first, second, third = (s["text"] for s in samples(out))
    assert first.startswith("ab") and first.endswith("yz")
    assert second.startswith("x") and second.endswith("y") and third.startswith("cd")


def test_suffix_and_max_length(run, write):
    out = write(run, "--prompt=ab", "--suffix=yz", "--length=4", f"--out={os.devnull}")
    assert out.out.startswith("ab") and out.out.endswith("yz\n") and "[" in out.err
    longer = write(run, "--prompt=abc", "--max_length=10", "--stop=False", "--order=random")
    assert "7 forward passes" in longer.err


def test_the_end_of_a_text(run_of, write, monkeypatch):
    """stop and min_length reach the decoder; tests/sampling/test_decode.py tests what they do there."""
    seen, generate = [], sample.Generator.generate

    def spy(generator, rows, cfg, *rest):
        seen.append((cfg.stop, cfg.min_length))
        return generate(generator, rows, cfg, *rest)

    monkeypatch.setattr(sample.Generator, "generate", spy)
    for flags in ([], ["--stop=False"], ["--min_length=4"]):
        write(run_of("--objective=ar"), "--prompt=12", "--length=5", *flags)
    assert seen == [(True, 0), (False, 0), (True, 4)]


def test_a_trained_model_writes_what_it_read(run_of, write, corpus):
    """One row by heart: the AR model at temperature 0 continues it exactly."""
    run = run_of("--objective=ar", "--unique_tokens=32", "--steps=0", "--epochs=3000", "--lr=5e-3",
                 "--weight_decay=0")
    rows = data.Sequences(tokenfiles.load_corpus(corpus).train, 32, 1337, 32).rows(np.zeros(1, np.int64))
    # from the first token on, as it was trained
    text = tokenizers.ByteTokenizer().decode(rows[0, :-1].tolist())
    assert write(run, f"--prompt={text[:20]}", "--length=12", "--temperature=0").out == text + "\n"


# other names ------------------------------------------------------------------------------------------------

NAMES = (
    ("--sample_steps=4", "--steps=4"),
    ("--inference_block_size=4", "--block=4"),
    ("--max_new_tokens=7", "--length=7"),
    ("--cfg=1.5", "--guidance=1.5"),
    ("--remasking=low_confidence", "--order=low_confidence"),
    ("--remasking=random", "--order=random"),
)


@pytest.mark.parametrize("theirs, ours", NAMES)
def test_names_of_the_reference_backend(run, write, theirs, ours):
    """MegaDLMs' option by its name there does what it does by ours, and something."""
    both = ["--prompt=12 squared is", "--stop=False"]
    both += ["--length=12"] * ("length" not in ours) + ["--order=low_confidence"] * ("order" not in ours)
    assert write(run, *both, theirs).out == write(run, *both, ours).out != write(run, *both).out


def test_the_reference_backends_other_options(run, write):
    """temperature, top_p and verbose, which have the same names or meaning here."""
    both = ["--prompt=12 squared is", "--length=12"]
    flags = "--temperature=0", "--temperature=1", "--temperature=0.5", "--top_p=0.5", "--top_k=2"
    assert len({write(run, *both, flag).out for flag in flags}) == 5
    assert write(run, *both, "--top_k=1").out == write(run, *both, "--top_p=0.0001").out
    assert write(run, *both, "--verbose").out == write(run, *both, "--show").out


def test_the_old_name_of_the_fallback(run, write):
    flags = ["--prompt=12", "--length=12", "--order=threshold", "--threshold=1", "--stop=False"]
    old, new = write(run, *flags, "--beside=surest").out, write(run, *flags, "--fallback=surest").out
    assert old == new != write(run, *flags).out


# recordings -------------------------------------------------------------------------------------------------


def test_recordings(run, write, tmp_path):
    """A GIF with a picture per pass, and a page that holds every frame; both of the text that is printed."""
    flags = ["--text=12 squ[MASK:6]d <b>&", "--order=low_confidence"]
    gif_path, page_path = tmp_path / "a.gif", tmp_path / "a.html"
    plain = write(run, *flags)
    assert write(run, *flags, f"--gif={gif_path}", f"--html={page_path}").out == plain.out
    with Image.open(gif_path) as gif:
        assert gif.n_frames == 7
    page = page_path.read_text(encoding="utf-8")
    head, script = page.split("const frames")
    frames = json.loads(re.search(r" = (.*), colours = ", script)[1])
    first, last = ("".join(piece for piece, _ in frame) for frame in (frames[0], frames[-1]))
    assert first == "12 squ░░░░░░d <b>&" and last == plain.out.rstrip("\n")
    assert [sum(appeared == -2 for _, appeared in frame) for frame in frames] == [6, 5, 4, 3, 2, 1, 0]
    assert {-1, 5} <= {appeared for _, appeared in frames[-1]} <= {-1, 0, 1, 2, 3, 4, 5}
    assert 'max="6" value="6"' in head and "@" not in head.replace("@media", "")
    assert "<b>" not in script.split("</script>")[0]


# wrong settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", (
    (["--prompt=" + "x" * 32], "the prompt has 32 tokens, and the model's context is 32"),
    (["--prompt=a", "--text=b[MASK]"], "give one of prompt, prompt_file, prompts and text"),
    (["--text=a[MASK]", "--suffix=b"], "suffix belongs to a prompt"),
    (["--prompt=a", "--length=3", "--max_length=9"], "give length or max_length"),
    (["--suffix=b"], "suffix needs length"),
    (["--min_length=3", "--stop=False"], "min_length=3 needs stop=True"),
    (["--min_length=3", "--suffix=a", "--length=5"], "suffix closes it"),
    (["--min_length=9", "--length=5"], "min_length=9 is more than length=5"),
    (["--threshold=0.5"], "threshold=0.5 needs order=threshold"),
    (["--fallback=surest"], "fallback=surest needs order=threshold"),
    (["--order=threshold", "--steps=4"], "order=threshold takes as many steps as it needs"),
    (["--order=first_hitting", "--steps=4"], "order=first_hitting takes as many steps as it needs"),
    (["--remask=capped", "--order=entropy"], "remask=capped needs order=ancestral"),
    (["--eta=0.5"], "eta=0.5 needs remask=capped or rescaled"),
    (["--remask=confidence", "--eta=0.5"], "eta=0.5 needs remask=capped or rescaled"),
    (["--cache=dual"], "cache=dual needs block"),
    (["--cache=prefix"], "cache=prefix needs block"),
    (["--refresh=3"], "refresh=3 needs block"),
    (["--refresh=3", "--block=4"], "refresh=3 needs cache=prefix or dual"),
    (["--temperature=0", "--top_k=3"], "change nothing at temperature=0"),
    (["--guidance=2"], "guidance=2.0 needs prompt"),
    (["--gif=nowhere/a.gif"], "there is no such folder"),
    (["--html=tests"], "html=tests: that is a folder"),
    (["--prompt_file=BINARY"], "BINARY is not UTF-8"),
    (["--gif=a.png"], "has to end in .gif"),
    (["--sample_steps=3", "--steps=4"], "'steps' and 'sample_steps' are one setting"),
    (["--prompts=nowhere.txt"], "nowhere.txt"),
    (["--prompt_file=nowhere.txt"], "nowhere.txt"),
    (["--top_p=0"], "must be above 0"),
    (["--temperatur=1"], "did you mean 'temperature'?"),
    (["--frontier", "--judge=runs/ar"], "python eval.py frontier"),
))
def test_bad_input(run, refusal, monkeypatch, tmp_path, flags, message):
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe")
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    assert message in refusal(run, *flags)


def test_ar_cannot_fill_in_the_middle(run_of, refusal):
    assert "can't fill holes before other text" in refusal(run_of("--objective=ar"), "--text=a[MASK]b")


@pytest.mark.parametrize("objective, flag, message", (
    ("ar", "--steps=3", "steps=3 has no meaning for objective=ar"),
    ("ar", "--block=3", "block=3 has no meaning"),
    ("uniform", "--block=3", "block=3 has no meaning"),
    ("uniform", "--cache=prefix", "cache=prefix has no meaning"),
    ("uniform", "--sampler=low_confidence", "order=low_confidence has no meaning"),
))
def test_settings_without_meaning_are_refused(run_of, refusal, objective, flag, message):
    assert message in refusal(run_of(f"--objective={objective}"), flag)


def test_samples_are_kept_before_they_are_printed(run, write, monkeypatch, tmp_path):
    def nobody_reads(*_):
        raise SystemExit(141)

    monkeypatch.setattr(sample, "print_samples", nobody_reads)
    with pytest.raises(SystemExit):
        write(run, "--length=4", f"--out={tmp_path / 'samples.jsonl'}", f"--html={tmp_path / 'film.html'}")
    (line,) = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["ids"] and (tmp_path / "film.html").is_file()


def test_samples_that_can_t_be_kept_are_printed(run, write, monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample, "save_samples", fail)
    with pytest.raises(SystemExit) as stop:
        write(run, "--prompt=1 squared", "--length=4", f"--out={tmp_path / 'samples.jsonl'}")
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out.startswith("1 squared") and "No space left" in printed.err


def test_no_run_no_traceback():
    command = [sys.executable, "sample.py", "--run_dir=nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "sample.py: no usable checkpoint in 'nowhere': there is no such folder"
