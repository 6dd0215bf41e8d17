"""Self-contained pages of HTML: dark and light, for narrow and wide screens, nothing asked for from
anywhere."""

import base64
import contextlib
import html
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.system.errors import InputError
from data_prep.system.files import folder_written_whole, remove_tree

TILES_PER_PAGE = 400
_THUMBNAIL = 128  # pixels of a side
_JPEG_QUALITY = 80
_GENERATOR = '<meta name="generator" content="ctssl_jax">'
_STYLE = """
:root { color-scheme: light dark; --text: #222; --back: #fff; --line: #ddd; --soft: #f5f5f5;
  --faint: #666; --note: #fff3cd; --edge: #e0c060; --bar: #5b8fc9; --one: #1f6fbf; --two: #c4501b;
  --three: #25845a }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e6; --back: #16181a; --line: #3a3d40;
  --soft: #222528; --faint: #a0a4a8; --note: #40360f; --edge: #8a7420; --bar: #4a78ab;
  --one: #6db3f2; --two: #f2935f; --three: #6fcf9f } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere }
a { color: var(--one) }
img { max-width: 100%; height: auto } .on-white { background: #fff }
table { border-collapse: collapse }
.wide { overflow-x: auto }
td, th { padding: .3rem .8rem; text-align: left; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; vertical-align: top }
@media (max-width: 30rem) { td, th { padding: .2rem .35rem; font-size: .9rem } }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; overflow-wrap: normal }
small { color: var(--faint) }
.banner { background: var(--note); border: 1px solid var(--edge); padding: .5rem .8rem }
"""
# Pages of tiles, and the keys that turn them.
_SHEET_STYLE = """
body { max-width: none }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.6rem, 1fr)); gap: .6rem;
  padding: 0; list-style: none }
.tiles li { font-size: .75rem; line-height: 1.3; background: var(--soft); padding: .25rem;
  min-width: 0 }
.tiles img, .tiles .unseen { width: 100%; aspect-ratio: 1; display: block; object-fit: contain;
  background: #000 }
.tiles .unseen { display: grid; place-content: center; text-align: center; color: var(--faint);
  background: none; border: 1px dashed var(--line); box-sizing: border-box }
"""
_SHEET_KEYS = """<script>
addEventListener("keydown", event => {
  const turn = {ArrowLeft: "prev", ArrowRight: "next"}[event.key];
  const link = turn && document.querySelector(`a[rel=${turn}]`);
  if (link) location.href = link.href;
});
</script>"""


def page(title: str, body: str, style: str = "") -> str:
    """A whole page.

    Args:
      title: plain text.
      body: HTML.
      style: further CSS.
    """
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
{_GENERATOR}<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}{style}</style>
{body}
</html>
"""


def picture(content: bytes, alternative: str, kind: str = "png", on_white: bool = False) -> str:
    """A picture inside the page.

    Args:
      content: the bytes of the picture.
      alternative: what it shows, for readers who do not see it.
      kind: `png` or `jpeg`.
      on_white: whether it has dark lines that need a white ground.
    """
    return (
        f'<img{" class=on-white" if on_white else ""} alt="{html.escape(alternative)}" '
        f'src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'
    )


def jpeg_thumbnail(grey: np.ndarray) -> bytes:
    """Grey values [h, w] uint8 as JPEG of at most 128 pixels a side."""
    image = Image.fromarray(np.ascontiguousarray(grey))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def table(rows: Iterable[Iterable[str]], head: Sequence[str] = ()) -> str:
    """A table of plain texts that scrolls inside itself where it is too wide; long names break at
    their underscores."""
    cells = [("th", head)] if head else []
    cells += [("td", row) for row in rows]
    lines = [
        f"<tr>{''.join(f'<{kind}>{breakable(text)}</{kind}>' for text in row)}</tr>"
        for kind, row in cells
    ]
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def breakable(text: str) -> str:
    """A plain text as HTML that may break at its underscores."""
    return html.escape(text).replace("_", "_<wbr>")


def sheet_name(name: str, number: int) -> str:
    """File name of a page of tiles, counted from 1."""
    return f"{name}-{number:04d}.html"


def sheet(title: str, name: str, number: int, num_tiles: int, tiles: Sequence[str]) -> str:
    """A page of a series of pages of tiles beside its `index.html`; the arrow keys turn them.

    Args:
      title: of the series, plain text.
      name: of its files (`sheet_name`).
      number: of this page, from 1.
      num_tiles: of all pages.
      tiles: HTML of at most `TILES_PER_PAGE` tiles.
    """
    first = (number - 1) * TILES_PER_PAGE + 1
    ways = [] if first == 1 else [f'<a rel=prev href="{sheet_name(name, number - 1)}">back</a>']
    ways += ['<a href="index.html">overview</a>']
    if first + len(tiles) <= num_tiles:
        ways += [f'<a rel=next href="{sheet_name(name, number + 1)}">next</a>']
    turning = f"<p>{' &middot; '.join(ways)}</p>"
    named = f"{title}: {first} to {first + len(tiles) - 1} of {num_tiles}"
    grid = "".join(f"<li>{tile}</li>\n" for tile in tiles)
    body = f"<h1>{breakable(named)}</h1>\n{turning}\n<ul class=tiles>\n{grid}</ul>\n{turning}"
    return page(named, body + _SHEET_KEYS, _SHEET_STYLE)


def num_sheets(num_tiles: int) -> int:
    """Pages that hold so many tiles."""
    return -(-num_tiles // TILES_PER_PAGE)


def sheet_links(name: str, num_tiles: int) -> str:
    """Links to all pages of a series."""
    return " &middot; ".join(
        f'<a href="{sheet_name(name, number)}">{first + 1} to '
        f"{min(first + TILES_PER_PAGE, num_tiles)}</a>"
        for number, first in enumerate(range(0, num_tiles, TILES_PER_PAGE), 1)
    )


@contextlib.contextmanager
def folder_of_pages(folder: Path, flag: str) -> Iterator[Path]:
    """A folder to fill with an `index.html` and more, which takes the place of an earlier one at
    the end of the block.

    Raises:
      InputError: the folder, which `flag` names, holds something else.
    """
    index = folder / "index.html"
    ours = index.is_file() and _GENERATOR in index.read_text(errors="replace")[:1000]
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{flag}: {folder} holds other files, which pages would replace; move them, or choose "
            "another folder"
        )
    with folder_written_whole(folder, folder.with_name(f".{folder.name}.writing")) as temporary:
        yield temporary
        remove_tree(folder)
