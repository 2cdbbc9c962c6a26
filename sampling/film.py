"""Watch a model write: in the terminal while it happens, or recorded as a GIF or a page.

A token's colour tells the pass at which it appeared, from blue (early) to red (late). The prompt is bold,
positions that are still masked are blocks.
"""

import colorsys
import contextlib
import json
from html import escape

BLOCK = "░"
PROMPT = -1  # the pass at which a prompt token appeared


class Recording:
    """One sample after every pass, and the pass at which each of its tokens appeared."""

    def __init__(self, row, tokenizer):
        """row: the ids with which the sample begins, the mask's where they are new."""
        self.tokenizer, self.mask_id = tokenizer, tokenizer.mask_id
        self.frames = [list(row)]
        self.passes = [[None if i == self.mask_id else PROMPT for i in row]]  # None: still masked

    def add(self, z):
        """Add the first row of z (B, L) after a pass; rows are right-aligned."""
        before, number = self.frames[-1], len(self.frames) - 1
        ids = z[0, -len(before) :].tolist()
        passes = []
        for old, new, appeared in zip(before, ids, self.passes[-1]):
            if appeared != PROMPT and new == self.mask_id:
                appeared = None
            elif appeared != PROMPT and new != old:
                appeared = number
            passes.append(appeared)
        self.frames.append(ids)
        self.passes.append(passes)

    def pieces(self, number):
        """Frame `number` as (text, pass; PROMPT; None for a block) each.

        A character of several tokens appears with its last one.
        """
        pieces, pending, latest = [], [], PROMPT
        ids = self.frames[number]
        for place, (token, appeared) in enumerate(zip(ids, self.passes[number])):
            if token == self.mask_id:
                pieces.append((BLOCK, None))
                continue
            pending.append(token)
            latest = max(latest, appeared)
            text = self.tokenizer.decode(pending, continues=bool(pieces))
            is_last = place + 1 == len(ids) or ids[place + 1] == self.mask_id
            is_whole = not text.endswith("\N{REPLACEMENT CHARACTER}") or len(pending) == 4
            if is_whole or is_last:
                pieces.append((text, latest))
                pending, latest = [], PROMPT
        return pieces

    def color(self, number):
        """(r, g, b) of tokens that appeared at pass `number`."""
        share = number / max(1, len(self.frames) - 2)
        return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(0.6 * (1 - share), 0.75, 0.85))

    def rich_text(self, number):
        """Frame `number` for the terminal."""
        from rich.text import Text

        text = Text()
        for piece, appeared in self.pieces(number):
            if appeared is None:
                style = "dim"
            elif appeared == PROMPT:
                style = "bold"
            else:
                style = "rgb({},{},{})".format(*self.color(appeared))
            text.append(piece, style=style)
        return text

    def save_gif(self, path, width=80, size=18, most=200):
        """Write an animated GIF of `width` columns; of many passes every n-th, at most `most` pictures."""
        import matplotlib
        from PIL import Image, ImageDraw, ImageFont

        font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", size)
        column_width, line_height = font.getlength("M"), round(size * 1.3)
        last = len(self.frames) - 1
        every = max(1, -(-last // most))
        pages = [self.wrap(number, width) for number in sorted({*range(0, last, every), last})]
        n_lines = 1 + max((line for page in pages for _, line, _, _ in page), default=0)
        images = []
        for page in pages:
            image = Image.new("RGB", (round(column_width * width) + 16, n_lines * line_height + 16), "white")
            draw = ImageDraw.Draw(image)
            for column, line, character, appeared in page:
                place = 8 + column * column_width, 8 + line * line_height
                draw.text(place, character, fill=self.ink(appeared), font=font)
            images.append(image)
        each = max(20, min(200, 6000 // len(images)))  # ms: six seconds in all, then the last picture stays
        durations = [each] * (len(images) - 1) + [3000]
        images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)

    def ink(self, appeared):
        """The colour of a character on paper."""
        if appeared is None:
            return 190, 190, 190
        return (0, 0, 0) if appeared == PROMPT else self.color(appeared)

    def wrap(self, number, width):
        """The characters of a frame as (column, line, character, pass), in lines of `width` columns."""
        page, column, line = [], 0, 0
        for piece, appeared in self.pieces(number):
            for character in piece:
                if character == "\n" or column == width:
                    column, line = 0, line + 1
                if character == "\n":
                    continue
                if character.isspace() or not character.isprintable():
                    character = " "
                page.append((column, line, character, appeared))
                column += 1
        return page

    def save_html(self, path):
        """Write one page that needs nothing else: a slider over the passes, and a button that plays them."""
        frames = []
        for number in range(len(self.frames)):
            pieces = self.pieces(number)
            frames.append([[piece, -2 if appeared is None else appeared] for piece, appeared in pieces])
        last = len(frames) - 1
        values = {
            "@TITLE@": escape(f"{last} passes"),
            "@LAST@": str(last),
            "@COLOURS@": json.dumps([f"rgb{self.color(number)}" for number in range(max(1, last))]),
            "@FRAMES@": json.dumps(frames, ensure_ascii=False).replace("<", "\\u003c"),
        }
        page = PAGE
        for key, value in values.items():
            page = page.replace(key, value)
        with open(path, "w", encoding="utf-8") as file:
            file.write(page)


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>@TITLE@</title>
<style>
  body { font: 16px/1.5 ui-monospace, monospace; max-width: 80ch; margin: 2em auto; padding: 0 1em }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit }
  b { color: #000 } i { color: #bbb; font-style: normal }
  input { width: 60ch; max-width: 70% }
</style>
<p>
  <button id="play">play</button>
  <input id="at" type="range" min="0" max="@LAST@" value="@LAST@"> <span id="n"></span>
</p>
<pre id="text"></pre>
<script>
const frames = @FRAMES@, colours = @COLOURS@;
const at = document.getElementById("at"), text = document.getElementById("text");
function show() {
  text.replaceChildren(...frames[at.value].map(([piece, when]) => {
    const e = document.createElement(when == -2 ? "i" : when == -1 ? "b" : "span");
    e.textContent = piece;
    if (when >= 0) { e.style.color = colours[when]; e.title = "pass " + (when + 1); }
    return e;
  }));
  document.getElementById("n").textContent = at.value + "/" + at.max;
}
let timer = null;
document.getElementById("play").onclick = () => {
  clearInterval(timer);
  at.value = 0;
  timer = setInterval(() => {
    show();
    if (+at.value >= +at.max) clearInterval(timer);
    else at.value = +at.value + 1;
  }, 60);
};
at.oninput = () => { clearInterval(timer); show(); };
show();
</script>
"""


@contextlib.contextmanager
def view(recording, in_terminal):
    """A context with a function on_step(z) that adds a pass to a Recording, and may draw it.

    Without a recording (None) it does nothing.
    """
    if recording is None:
        yield lambda z: None
    elif not in_terminal:
        yield recording.add
    else:
        from rich.live import Live

        with Live(recording.rich_text(0), auto_refresh=False, vertical_overflow="visible") as live:

            def on_step(z):
                recording.add(z)
                live.update(recording.rich_text(-1), refresh=True)

            yield on_step
