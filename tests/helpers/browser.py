"""A page in a real browser: its width, its pictures and what it asks for, at several widths."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

CHROMIUM = shutil.which("chromium")
_MEASURE = """
const frames = [...document.querySelectorAll("iframe")];
addEventListener("load", () => {
  const found = frames.map(frame => {
    const inside = frame.contentDocument;
    return {
      width: frame.contentWindow.innerWidth,
      scroll_width: inside.documentElement.scrollWidth,
      pictures: [...inside.images].map(image => image.complete ? image.naturalWidth : 0),
      requests: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name),
    };
  });
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
"""


class Measured(NamedTuple):
    """A page at one width, in CSS pixels.

    width: of the viewport.
    scroll_width: of the content; more than `width` scrolls sideways.
    pictures: natural width of each picture, 0 if it could not be loaded.
    requests: addresses that were asked for; pictures inside the page are `data:` or not listed.
    """

    width: int
    scroll_width: int
    pictures: list[int]
    requests: list[str]


def measure(page: str, widths: tuple[int, ...], folder: Path) -> list[Measured]:
    """Open a page in headless Chromium, in a frame of each width.

    Args:
      page: HTML.
      widths: of the viewports. Chromium's own windows cannot be as narrow as a telephone.
      folder: for the wrapper and the browser's profile.
    """
    frames = "".join(
        f'<iframe width={width} height=800 style="border:0" srcdoc="{html.escape(page)}"></iframe>'
        for width in widths
    )
    wrapper = folder / "wrapper.html"
    wrapper.write_text(f"<!doctype html><meta charset=utf-8>{frames}<script>{_MEASURE}</script>")
    command = [
        str(CHROMIUM),
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *(
            "--disable-background-networking",
            "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND",
        ),
        *(f"--user-data-dir={folder / 'profile'}", "--dump-dom", wrapper.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return [Measured(**values) for values in json.loads(html.unescape(found[1]))]
