"""Seeing a diffusion model write: in the terminal while it happens, or recorded as a GIF or a page.

A token's colour says at which pass it appeared, from blue (early) to red (late); what was given is bold, holes are blocks.
"""

import colorsys
import contextlib
import json
from html import escape

HOLE = "░"
GIVEN = -1


class Reel:
    """The first sample after every pass, and at which pass each of its tokens appeared."""

    def __init__(self, template, tokens):
        self.tokens, self.mask_id = tokens, tokens.mask_id
        self.frames = [list(template)]
        self.when = [[None if i == self.mask_id else GIVEN for i in template]]

    def record(self, z):
        """Take z (B, L) after a pass; rows are right-aligned."""
        ids, now = z[0, -len(self.frames[0]) :].tolist(), len(self.frames) - 1
        self.when.append([w if w == GIVEN else None if i == self.mask_id else now if i != old else w
                          for i, old, w in zip(ids, self.frames[-1], self.when[-1])])
        self.frames.append(ids)

    def pieces(self, number):
        """Frame `number` as (text, pass or GIVEN or None for a hole). A character of several tokens appears with its last one."""
        out, pending, latest = [], [], GIVEN
        ids, when = self.frames[number], self.when[number]
        for place, (i, w) in enumerate(zip(ids, when)):
            if i == self.mask_id:
                out.append((HOLE, None))
                continue
            pending.append(i)
            latest = max(latest, w)
            text = self.tokens.decode(pending)
            more = place + 1 < len(ids) and ids[place + 1] != self.mask_id
            if not (text.endswith("\N{REPLACEMENT CHARACTER}") and more and len(pending) < 4):
                out.append((text, latest))
                pending, latest = [], GIVEN
        return out

    def colour(self, when):
        """(r, g, b) of what appeared at pass `when`."""
        part = when / max(1, len(self.frames) - 2)
        return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(0.6 * (1 - part), 0.75, 0.85))

    def readable(self, number):
        """Frame `number` for the terminal."""
        from rich.text import Text

        text = Text()
        for piece, when in self.pieces(number):
            style = "dim" if when is None else "bold" if when == GIVEN else "rgb({},{},{})".format(*self.colour(when))
            text.append(piece, style=style)
        return text

    def gif(self, path, width=80, size=18, most=200):
        """An animated GIF of `width` columns; of many passes every n-th, so that there are at most `most` pictures."""
        import matplotlib
        from PIL import Image, ImageDraw, ImageFont

        font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", size)
        wide, high = font.getlength("M"), round(size * 1.3)
        last = len(self.frames) - 1
        numbers = sorted({*range(0, last, -(-last // most)), last}) if last else [0]
        pages = [self.laid_out(number, width) for number in numbers]
        height = (max(y for page in pages for _, y, _, _ in page) + 1) * high if any(pages) else high
        images = []
        for page in pages:
            image = Image.new("RGB", (round(wide * width) + 16, height + 16), "white")
            draw = ImageDraw.Draw(image)
            for x, y, character, when in page:
                colour = (190, 190, 190) if when is None else (0, 0, 0) if when == GIVEN else self.colour(when)
                draw.text((8 + x * wide, 8 + y * high), character, fill=colour, font=font)
            images.append(image)
        each = max(20, min(200, 6000 // len(images)))  # ms: about six seconds in all, then the last picture stays
        images[0].save(path, save_all=True, append_images=images[1:], duration=[each] * (len(images) - 1) + [3000], loop=0)

    def laid_out(self, number, width):
        """The characters of a frame as (column, line, character, when), wrapped."""
        page, x, y = [], 0, 0
        for piece, when in self.pieces(number):
            for character in piece:
                if character == "\n" or x == width:
                    x, y = 0, y + 1
                if character != "\n":
                    page.append((x, y, " " if character.isspace() or not character.isprintable() else character, when))
                    x += 1
        return page

    def html(self, path):
        """One page that needs nothing else: a slider over the passes, and a button that plays them."""
        frames = [[[piece, -2 if when is None else when] for piece, when in self.pieces(n)] for n in range(len(self.frames))]
        colours = [f"rgb{self.colour(n)}" for n in range(max(1, len(frames) - 1))]
        page = PAGE.replace("@TITLE@", escape(f"{len(frames) - 1} passes")).replace("@LAST@", str(len(frames) - 1))
        page = page.replace("@COLOURS@", json.dumps(colours)).replace("@FRAMES@", json.dumps(frames, ensure_ascii=False).replace("<", "\\u003c"))
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
<p><button id="play">play</button> <input id="at" type="range" min="0" max="@LAST@" value="@LAST@"> <span id="n"></span></p>
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
  timer = setInterval(() => { show(); if (+at.value >= +at.max) clearInterval(timer); else at.value = +at.value + 1; }, 60);
};
at.oninput = () => { clearInterval(timer); show(); };
show();
</script>
"""


@contextlib.contextmanager
def playing(reel, visible):
    """What `decode.generate` is to call after each pass; drawn in the terminal if `visible`."""
    if reel is None or not visible:
        yield reel.record if reel else lambda z: None
        return
    from rich.live import Live

    with Live(reel.readable(0), auto_refresh=False, vertical_overflow="visible") as live:

        def watch(z):
            reel.record(z)
            live.update(reel.readable(-1), refresh=True)

        yield watch
