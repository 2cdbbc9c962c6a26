"""Debian packages: made here, of every kind that is read; downloaded by an apt-get of the test's."""

import gzip
import io
import os
import stat
import struct
import sys
import tarfile
import zlib

import pytest
from conftest import prepared
from corpus_examples import stories
from preparations import by_split, contents, stop_after_commit, task_size, texts_in

from corpus import debian, prepare, sources

HTML = b"""<html><head><title>no</title><script>var no;</script></head><body><nav>no</nav>
<h1>A  title</h1><p>Some <b>bold</b>
text &amp; more.</p><pre>  kept
    as it is</pre><ul><li>one</li><li>two</li></ul></body></html>"""
POD = b"""=encoding utf8

=head1 NAME E<lt>perlE<gt>

perl - B<bold I<and> more> C<< $a->{b} >>, C<<< a << b >>>, L<text|target/x>, trE<sol>aE<sol>, X<no>E<233>,
S<<-- HERE>, C<(?<=x)>

=begin html

no

=for text no

no

=end html

=over 4

=item * yes

    $a<$b and $c>3;  X<kept>

=back

=cut

no

=pod

again
"""
POD_TEXT = """NAME <perl>

perl - bold and more $a->{b}, a << b, text, tr/a/, é,
<-- HERE, (?<=x)

* yes

    $a<$b and $c>3;  X<kept>

again"""


def archive(files, compression="xz"):
    """A data.tar of {name: bytes}, and a link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as tar:
        for name, raw in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
        link = tarfile.TarInfo("./usr/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return buffer.getvalue()


def write_package(path, files, compression="xz"):
    """A .deb as dpkg-deb writes it."""
    members = {"debian-binary": b"2.0\n", "control.tar.xz": archive({}), f"data.tar.{compression}": b""}
    members[f"data.tar.{compression}"] = archive(files, compression)
    content = b"!<arch>\n"
    for name, raw in members.items():
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(raw):<10}`\n".encode() + raw
        content += b"\n" * (len(raw) % 2)
    path.write_bytes(content)
    return path


def base64_digits(number):
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    digits = alphabet[number % 64]
    while number := number // 64:
        digits = alphabet[number % 64] + digits
    return digits


def dictionary(entries):
    """(dictionary, index) in dictd's format: an entry has two headwords."""
    text, lines, start = "".join(entries).encode(), ["00-database-info\tA\tB"], 0
    for entry in entries:
        place = f"{base64_digits(start)}\t{base64_digits(len(entry.encode()))}"
        lines += [f"{entry.split()[0]}\t{place}", f"also {entry.split()[0]}\t{place}"]
        start += len(entry.encode())
    return gzip.compress(text), "\n".join(lines).encode()


def compressed_block(text):
    """compress(1)'s output for a short ASCII text, without its header: codes of 9 bits, least bit first."""
    bits = sum(code << 9 * i for i, code in enumerate(text.encode()))
    return bits.to_bytes((9 * len(text) + 7) // 8, "little")


def bible(blocks):
    blocks = [compressed_block(block) for block in blocks]
    starts = [0x60 + 4 * len(blocks)]
    for block in blocks:
        starts.append(starts[-1] + len(block))
    head = b"EC02Compressed Data File".ljust(0x54, b"\0") + struct.pack(">II", 65536, len(blocks))
    return head + struct.pack(f">{len(starts)}I", *starts) + b"".join(blocks)


def r_data(*vectors):
    """An R package's data: each object compressed behind its length."""
    raw = b""
    for strings in vectors:
        inner = b"X\n\0\0\0\x02" + struct.pack(">ii", 16, len(strings))
        for string in strings:
            inner += struct.pack(">ii", 0x40009, len(string.encode())) + string.encode()
        raw += struct.pack(">I", len(inner)) + zlib.compress(inner)
    return raw


LINES = [f"line {i}" for i in range(1001)]
EVERY_KIND = {
    "usr/share/doc/x/copyright": b"Files: *\nLicense: GPL-2\n\nFiles: y\nLicense: MIT\n",
    "usr/share/doc/x/changelog.gz": gzip.compress(b"no"),
    "usr/share/doc/x/README.md": b"no",
    "usr/share/doc/x/html/genindex.html": b"<p>no</p>",
    "usr/bin/x": b"\x7fELF no",
    "a/page.html": HTML,
    "b/other.html.gz": gzip.compress(b"<p>na\xefve Latin-1</p>"),
    "c/html/twice.html": b"<p>no</p>",
    "c/markdown/twice.md": b"# Once\r\n",
    "c/data.bin.gz": b"not read",
    "d/words.dict.dz": dictionary(["apple a fruit", "Bär a bear", "cat\n  a pet"])[0],
    "d/words.index": dictionary(["apple a fruit", "Bär a bear", "cat\n  a pet"])[1],
    "e/perl.pod": POD,
    "f/bible.data": bible(["Holy\nGe1:1 In the\nGe1:2 be", "ginning\nGe2:1 Thus\n1Co1:1 Paul\n"]),
    "g/data/Rdata.rdb": r_data(["short"], LINES),
}  # fmt: skip
ITS_TEXTS = [
    "A title\n\nSome bold text & more.\n\n  kept\n    as it is\n\none\n\ntwo", "naïve Latin-1", "# Once",
    "apple a fruit", "Bär a bear", "cat\n  a pet", POD_TEXT,
    "In the\nbeginning", "Thus", "Paul", "\n".join(LINES)]  # fmt: skip


@pytest.mark.parametrize("compression", ("xz", "gz"))
def test_every_kind(tmp_path, compression):
    path = write_package(tmp_path / "x_1_all.deb", EVERY_KIND, compression)
    assert debian.documents(path) == ITS_TEXTS
    assert debian.licences(path) == "GPL-2, MIT"


def test_sphinx_s_sources_instead_of_its_pages(tmp_path):
    files = {"html/a.html": b"<p>no</p>", "html/_sources/a.rst.txt": b"Title\n=====\n",
             "html/other.html": b"<p>other</p>", "AUTHORS.rst.gz": gzip.compress(b"me"),
             "notes/other.md": b"note",
             "Documentation/b.rst": b"once", "html/_sources/b.rst.txt": b"once"}
    texts = debian.documents(write_package(tmp_path / "x.deb", files))
    assert texts == ["Title\n=====", "other", "me", "note", "once"]


@pytest.mark.parametrize("page, text", [
    ("<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>", "a b\n\n c"),
    ("a<br/>b<br>c", "a\nb\nc"),
    ("<p>a <b> b</b></p><p> <b> x</b>", "a b\n\nx"),
    ("<article>a</article><article>b</article>", "a\n\nb"),
    ("<html><head><title>no</title><body><p>all", "all"),
])  # fmt: skip
def test_pages(page, text):
    assert debian.html_page(page.encode())[0].strip() == text


def test_a_corpus_of_packages(tmp_path):
    """Interrupted anywhere, it is the same; a package is a source like any file."""
    texts = stories(30)
    entries, index = dictionary(texts)
    path = write_package(tmp_path / "x_1_all.deb", {"x.dict.dz": entries, "x.index": index})
    cfg = prepare.Config(val=0.3)
    found = sources.find_sources([str(path)], cfg)
    with task_size(200):
        prepare.prepare(found, tmp_path / "whole", cfg)
        for commit in (3, 2):
            with stop_after_commit(commit), pytest.raises(KeyboardInterrupt):
                prepare.prepare(found, tmp_path / "out", cfg)
        prepare.prepare(found, tmp_path / "out", cfg)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    expected = by_split([text.strip() for text in texts], 0.3)
    assert texts_in(tmp_path / "out") == expected


@pytest.fixture
def apt_get(tmp_path, monkeypatch):
    """An apt-get that knows the packages in a folder, which is returned."""
    packages, programs = tmp_path / "packages", tmp_path / "bin"
    packages.mkdir(), programs.mkdir()
    script = programs / "apt-get"
    script.write_text(
        f'#!/bin/sh\necho called >> "{tmp_path}/calls"\nfor last; do :; done\n'
        f'cp "{packages}/$last"_*.deb . 2> /dev/null && exit\n'
        'echo "W: no matter" >&2; echo "E: Unable to locate package $last" >&2; exit 100\n', encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return packages


def run_data(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, argv)])
    code = 0
    try:
        prepare.main()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_downloaded_once(apt_get, tmp_path, monkeypatch, capsys):
    write_package(apt_get / "python3.11-x_1_all.deb", EVERY_KIND)
    flags = f"--out={tmp_path / 'out'}", "--val=0.3"
    code, out, _ = run_data(monkeypatch, capsys, "debian:python3.11-x", *flags)
    assert code == 0 and "python3.11-x: GPL-2, MIT" in out
    texts = texts_in(tmp_path / "out/python3.11-x")
    assert sorted(texts["train"] + texts["val"]) == sorted(ITS_TEXTS)
    code, *_ = run_data(monkeypatch, capsys, "debian:python3.11-x", *flags, "--name=again")
    assert code == 0 and (tmp_path / "calls").read_text(encoding="utf-8").count("called") == 1


@pytest.mark.parametrize("name, message", [
    ("debian:nothing", "debian:nothing: Unable to locate package nothing"),
    ("debian:../x", "debian:../x: no name of a package"),
    ("debian:", "debian:: no name of a package"),
])  # fmt: skip
def test_packages_that_are_not_there(apt_get, tmp_path, monkeypatch, capsys, name, message):
    code, _, error = run_data(monkeypatch, capsys, name, f"--out={tmp_path / 'out'}")
    assert code == 2 and error == f"data.py: {message}\n"
    assert not (tmp_path / "out").exists()


def test_without_apt_get(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, error = run_data(monkeypatch, capsys, "debian:x1", f"--out={tmp_path / 'out'}")
    assert code == 2 and "debian:x1 needs apt-get; elsewhere, download the package" in error


@pytest.mark.parametrize("files, message", [
    ({"usr/bin/x": b"no text"}, "no text of a kind that is read here (.dict.dz, .html, "),
    ({"a.txt.gz": gzip.compress(b"text" * 99)[:15]}, "a.txt in it can't be read"),
    ({"a.dict.dz": EVERY_KIND["d/words.dict.dz"][:20]}, "a.dict.dz in it can't be read"),
    ({"a.dict.dz": EVERY_KIND["d/words.dict.dz"], "a.index": b"x\t?\tB"}, "a.dict.dz in it can't be read"),
    ({"a.pod": b"E<99999999999999999999>"}, "a.pod in it can't be read"),
    ({"bible.data": EVERY_KIND["f/bible.data"][:0x58]}, "bible.data in it can't be read"),
    ({"data/Rdata.rdb": EVERY_KIND["g/data/Rdata.rdb"][5:]}, "data/Rdata.rdb in it can't be read"),
])  # fmt: skip
def test_damaged_files(tmp_path, files, message):
    with pytest.raises(ValueError) as problem:
        prepared(tmp_path / "out", write_package(tmp_path / "x.deb", files))
    assert message in str(problem.value) and "\n" not in str(problem.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", (0, 4, 30, 90, 300, -40))
def test_damaged_packages(tmp_path, cut):
    path = write_package(tmp_path / "x.deb", EVERY_KIND)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="no (whole )?Debian package"):
        debian.documents(path)


def test_a_damaged_stream(tmp_path):
    path = write_package(tmp_path / "x.deb", EVERY_KIND)
    raw = bytearray(path.read_bytes())
    for i in range(len(raw) - 600, len(raw) - 500):
        raw[i] ^= 255
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="no whole Debian package"):
        debian.documents(path)


def test_a_package_whatever_its_ending_and_the_format(tmp_path):
    """--format= is of what comes beside it."""
    path = write_package(tmp_path / "X.DEB", EVERY_KIND)
    prepared(tmp_path / "out", path, val=0.3, format="jsonl")
    texts = texts_in(tmp_path / "out")
    assert sorted(texts["train"] + texts["val"]) == sorted(ITS_TEXTS)
