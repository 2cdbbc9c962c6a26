"""The text in Debian packages: `python data.py debian:dict-gcide debian:anarchism`, or the path of a .deb.

A package is downloaded and read, not installed. A document is an entry of a dictionary (dictd's), a page of
HTML, reStructuredText, POD, Markdown or plain text, a chapter of bible-kjv-text, or a book of
r-cran-janeaustenr. Read so far: these, dict-gcide, anarchism, python3.11-doc, linux-doc-6.1, perl-doc.
"""

import contextlib
import gzip
import io
import itertools
import lzma
import os
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
import zlib
from html.parser import HTMLParser
from pathlib import Path

from corpus.files import no_empty_parents

PREFIX = "debian:"
PACKAGE = r"[a-z0-9][a-z0-9+.-]+"
LEFT_OUT = re.compile(  # what a package says about itself, and pages that list others
    r"(copyright|changelog|readme|news|genindex|00index|py-modindex|search|contents\.html)", re.I)


# ------------------------------------------------------------------------------------------------ the package


def package_of(name):
    """The package in 'debian:PACKAGE'; None of another name. Raises ValueError."""
    if not name.startswith(PREFIX):
        return None
    package = name.removeprefix(PREFIX)
    if not re.fullmatch(PACKAGE, package):
        raise ValueError(f"{name}: no name of a package")
    return package


def download(package, folder):
    """The path of a package's .deb in `folder`, to which apt-get downloads it unless it is there.

    Raises ValueError or OSError.
    """
    there = sorted(folder.glob(f"{package}_*.deb"), key=os.path.getmtime)
    if there:
        return there[-1]
    if shutil.which("apt-get") is None:
        raise ValueError(f"debian:{package} needs apt-get; elsewhere, download the package from "
                         "packages.debian.org and give the path of the .deb")
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_empty_parents(folder / package))
        folder.mkdir(parents=True, exist_ok=True)
        partial = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        command = ["apt-get", "-qq", "download", package]
        done = subprocess.run(command, cwd=partial, capture_output=True, text=True)
        found = list(Path(partial).glob("*.deb"))
        if done.returncode or not found:
            lines = [line for line in done.stderr.splitlines() if line.startswith("E:")]
            reason = lines[0].removeprefix("E: ") if lines else f"apt-get ended with {done.returncode}"
            raise ValueError(f"debian:{package}: {reason}")
        path = folder / found[0].name
        os.replace(found[0], path)
    return path


def read_files(path):
    """Yield (name, bytes) of the files in a package, in its order. Raises ValueError if it is none."""
    try:
        with tarfile.open(fileobj=io.BytesIO(read_archive(path))) as archive:
            for member in archive:
                if member.isfile():
                    yield member.name.removeprefix("./"), archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as problem:
        raise ValueError(f"{path}: no whole Debian package: {problem}") from None


def read_archive(path):
    """The bytes of data.tar, as it is compressed: a .deb is an `ar` archive of three files."""
    with open(path, "rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise ValueError(f"{path}: no Debian package")
        while header := file.read(60):
            if len(header) < 60 or not header[48:58].strip().isdigit():
                break
            name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
            if name.startswith("data.tar"):
                if name.endswith(".zst"):
                    raise ValueError(f"{path}: compressed with zstd, which is not read here")
                raw = file.read(size)
                if len(raw) < size:
                    break
                return raw
            file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError(f"{path}: no whole Debian package: its data.tar is cut, or missing")


def licences(path):
    """What the package's copyright file calls its licences, as one line."""
    for name, raw in read_files(path):
        if name.endswith("/copyright"):
            text = raw.decode("utf-8", "replace")
            names = re.findall(r"^License: *(\S.*)$", text, re.M)
            shown = ", ".join(dict.fromkeys(names))
            return shown or " ".join(text.split())[:200]
    return "not said"


# ------------------------------------------------------------------------------------------------- documents


def documents(path):
    """All texts in a package, as a list. Raises ValueError if there is none of a known kind."""
    files, texts = {}, []
    for name, raw in read_files(path):
        is_packed, name = name.endswith(".gz"), name.removesuffix(".gz")
        if name.endswith((*READERS, ".index")):
            with explain_damage(path, name):
                files[name] = gzip.decompress(raw) if is_packed else raw
    for name in files:
        if not LEFT_OUT.match(Path(name).name) and not is_made_of_another(name, files):
            with explain_damage(path, name):
                texts += texts_of(name, files)
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path}: no text of a kind that is read here ({', '.join(READERS)})")
    return texts


def is_made_of_another(name, files):
    """Whether a page was made of a file that is there, too: Sphinx's html/X.html, anarchism's html/X.html.

    Of Sphinx's own copies, html/_sources/X.rst.txt, too, if the package has Documentation/X.rst.
    """
    before, _, page = name.rpartition("html/")
    if page.startswith("_sources/"):
        return f"{before}Documentation/{page.removeprefix('_sources/').removesuffix('.txt')}" in files
    stem = page.removesuffix(".html")
    sources = f"{before}html/_sources/{stem}.rst.txt", f"{before}markdown/{stem}.md"
    return name.endswith(".html") and any(source in files for source in sources)


@contextlib.contextmanager
def explain_damage(path, name):
    """Turn what readers raise into a ValueError of one line."""
    try:
        yield
    except (EOFError, OSError, OverflowError, ValueError, struct.error, zlib.error,
            subprocess.CalledProcessError):
        raise ValueError(f"{path}: {name} in it can't be read") from None


def texts_of(name, files):
    """The texts in the file of this name; none if it is of another kind."""
    for ending, read in READERS.items():
        if name.endswith(ending):
            return read(files[name], name, files)
    return []


def decode(raw):
    """Bytes as text: UTF-8, or else Latin-1."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def plain_text(raw, *_):
    return [decode(raw).replace("\r\n", "\n")]


def dictionary_entries(raw, name, files):
    """The entries of a dictd dictionary: where they are says its index, in digits of base 64."""
    text, places = gzip.decompress(raw), set()  # dictzip is gzip
    for line in files.get(name.removesuffix(".dict.dz") + ".index", b"").splitlines():
        fields = line.split(b"\t")
        if len(fields) == 3 and not fields[0].startswith((b"00-database", b"00database")):
            places.add((base64_number(fields[1]), base64_number(fields[2])))
    return [decode(text[start : start + size]) for start, size in sorted(places)]


def base64_number(digits):
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    number = 0
    for digit in digits:
        number = 64 * number + alphabet.index(digit)
    return number


def html_page(raw, *_):
    page = Page()
    page.feed(decode(raw))
    page.close()
    return [page.text()]


class Page(HTMLParser):
    """The text of a page, with blocks on lines of their own."""

    BLOCKS = set("p div br hr li ul ol dl dt dd tr table h1 h2 h3 h4 h5 h6 pre blockquote section article "
                 "main figure figcaption details summary header aside".split())
    SILENT = {"script", "style", "head", "nav", "footer"}

    def __init__(self):
        super().__init__()
        self.parts, self.silent, self.verbatim = [], 0, 0

    def handle_starttag(self, tag, _):
        self.silent = 0 if tag == "body" else self.silent + (tag in self.SILENT)  # </head> may be left out
        self.verbatim += tag == "pre"
        self.open_block(tag)
        if tag in ("td", "th"):
            self.parts.append(" ")

    def handle_startendtag(self, tag, _):
        self.open_block(tag)

    def handle_endtag(self, tag):
        self.silent = max(0, self.silent - (tag in self.SILENT))
        self.verbatim = max(0, self.verbatim - (tag == "pre"))
        if tag != "br":
            self.open_block(tag)

    def open_block(self, tag):
        """Go to a new line, if the tag is a block's."""
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data):
        if self.silent:
            return
        if not self.verbatim:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1][-1].isspace():
                data = data.lstrip()
        if data:
            self.parts.append(data)

    def text(self):
        text = re.sub(r"[ \t]+\n", "\n", "".join(self.parts))
        return re.sub(r"\n{3,}", "\n\n", text)


def pod_page(raw, *_):
    """Perl's documentation without its commands and formatting codes; indented paragraphs are code."""
    paragraphs, is_read = [], True
    for paragraph in re.split(r"\n\s*\n", decode(raw)):
        command, _, rest = paragraph.partition(" ")
        if paragraph.startswith("="):
            is_read = command != "=cut" and command != "=begin" and (is_read or command != "=for")
            if command in ("=begin", "=end", "=for", "=encoding", "=over", "=back", "=cut", "=pod"):
                continue
        if is_read and paragraph.startswith((" ", "\t")):
            paragraphs.append(paragraph)
        elif is_read:
            paragraphs.append(without_codes(rest if paragraph.startswith("=") else paragraph))
    return ["\n\n".join(filter(None, paragraphs))]


CODE = re.compile(r"([A-Z])(?:<{2,}\s+((?:(?![A-Z]<).)*?)\s+>{2,}|<((?:(?![A-Z]<)[^>])*)>)", re.S)


def without_codes(text):
    """A paragraph of POD without formatting codes: B<bold>, C<< a < b >>, L<text|target>, E<lt>, X<index>."""
    before = ""
    while text != before:  # codes hold others: from the inside out
        before, text = text, CODE.sub(shown_code, text)
    return text.replace("\0lt", "<").replace("\0gt", ">")


def shown_code(match):
    """What a reader sees of a formatting code. Its angle brackets become \\0lt and \\0gt: no other code's."""
    kind, content = match[1], match[2] if match[2] is not None else match[3]
    if kind == "E":
        number = re.fullmatch(r"\d+", content)
        return chr(int(content)) if number else {"lt": "\0lt", "gt": "\0gt", "sol": "/", "verbar": "|",
                                                 "quot": '"', "amp": "&"}.get(content, content)
    if kind in "XZ":
        return ""
    shown = content.split("|")[0] if kind == "L" else content
    return shown.replace("<", "\0lt").replace(">", "\0gt")


def bible_chapters(raw, *_):
    """The chapters of bible-kjv-text: blocks by compress(1), without its header; a verse is a line."""
    (n_blocks,) = struct.unpack(">I", raw[0x58:0x5C])
    starts = struct.unpack(f">{n_blocks + 1}I", raw[0x5C : 0x60 + 4 * n_blocks])
    text = b""
    for start, stop in itertools.pairwise(starts):
        block = b"\x1f\x9d\x90" + raw[start:stop]
        text += subprocess.run(["gzip", "-dc"], input=block, capture_output=True, check=True).stdout
    verses = [line for line in decode(text).splitlines() if re.match(r"\w+?\d+:\d+ ", line)]
    chapters = itertools.groupby(verses, key=lambda line: line.split(":")[0])
    return ["\n".join(verse.split(" ", 1)[1] for verse in chapter) for _, chapter in chapters]


def r_texts(raw, *_):
    """The texts in an R package's data: its longest vectors of strings, as lines."""
    texts, start = [], 0
    while start + 4 < len(raw):
        inflated = zlib.decompressobj()
        vectors = string_vectors(inflated.decompress(raw[start + 4 :]))
        texts += ["\n".join(lines) for lines in vectors if len(lines) > 1000]
        start = len(raw) - len(inflated.unused_data)
    return texts


def string_vectors(raw):
    """The vectors of strings in R's binary serialization: type 16, a count, and strings of type 9."""
    vectors, start = [], 0
    while (start := raw.find(b"\0\0\0\x10", start)) >= 0:
        (count,) = struct.unpack(">i", raw[start + 4 : start + 8].ljust(4, b"\0"))
        place, strings = start + 8, []
        while len(strings) < count and raw[place + 3 : place + 4] == b"\x09":
            (size,) = struct.unpack(">i", raw[place + 4 : place + 8])
            strings.append(decode(raw[place + 8 : place + 8 + max(0, size)]))
            place += 8 + max(0, size)
        start = place if len(strings) == count > 0 else start + 4
        if len(strings) == count > 0:
            vectors.append(strings)
    return vectors


READERS = {
    ".dict.dz": dictionary_entries,
    ".html": html_page,
    ".rst": plain_text,
    ".txt": plain_text,
    ".md": plain_text,
    ".pod": pod_page,
    "bible.data": bible_chapters,
    "data/Rdata.rdb": r_texts,
}
