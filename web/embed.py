"""Puts the page into thrum.py: its section 25 carries the files of this folder.

    python3 web/embed.py            write PAGE_FILES anew, if a file has changed
    python3 web/embed.py --check    exit with 1 when that has been forgotten

Each file is compressed on its own, so that a change to one leaves the lines of the others.  Whether something is stale goes
by the content, not by the compressed bytes: two versions of zlib may pack the same text differently.
"""

import base64
import hashlib
import re
import sys
import zlib
from pathlib import Path

WEB = Path(__file__).resolve().parent
THRUM = WEB.parent / "thrum.py"
KINDS = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
         ".svg": "image/svg+xml; charset=utf-8"}
LINE = 128                      # characters of base64 in a line: below the 140 of the style
TABLE = re.compile(r"^PAGE_FILES = \{.*?^\}$", re.M | re.S)


def sources() -> dict:
    """The files that the page is made of: name -> bytes."""
    return {path.name: path.read_bytes() for path in sorted(WEB.iterdir()) if path.suffix in KINDS}


def tag_of(data: bytes) -> str:
    """An ETag (RFC 9110, section 8.8.3), with its quotes."""
    return f'"{hashlib.sha256(data).hexdigest()[:16]}"'


def embedded(text: str) -> dict:
    """What thrum.py carries now: name -> (content type, ETag, bytes).  Raises ValueError where somebody has spoilt the table."""
    found = TABLE.search(text)
    if not found:
        raise ValueError(f"{THRUM.name} has no table PAGE_FILES")
    names = {}
    exec(found[0], names)       # our own file, which its users run whole
    return {name: (kind, tag, zlib.decompress(base64.b64decode(packed))) for name, (kind, tag, packed) in names["PAGE_FILES"].items()}


def table(files: dict) -> str:
    rows = []
    for name, data in files.items():
        packed = base64.b64encode(zlib.compress(data, 9)).decode()
        lines = "\n".join(packed[at:at + LINE] for at in range(0, len(packed), LINE))
        rows.append(f'    "{name}": ("{KINDS[Path(name).suffix]}", {tag_of(data)!r}, """\n{lines}\n"""),\n')
    return "PAGE_FILES = {\n" + "".join(rows) + "}"


def main(arguments) -> int:
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    text, files = THRUM.read_text(encoding="utf-8"), sources()
    try:
        stale = embedded(text) != {name: (KINDS[Path(name).suffix], tag_of(data), data) for name, data in files.items()}
    except (ValueError, SyntaxError, zlib.error):
        if not TABLE.search(text):
            raise
        stale = True            # a merge conflict, most likely
    if arguments:
        if stale:
            print("thrum.py does not carry web/ as it is; run: python3 web/embed.py", file=sys.stderr)
        return int(stale)
    if stale:
        THRUM.write_text(TABLE.sub(lambda _: table(files), text, count=1), encoding="utf-8")
    print(f"{sum(map(len, files.values())):,} bytes of page in {len(files)} files: {'written' if stale else 'up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
