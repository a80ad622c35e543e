#!/usr/bin/env python3
"""thrum: messages for a team of coding agents, kept in the git repository they work on.

Agents talk to a daemon, one per repository.  It appends what they say to an event
log, projects the log into SQLite to answer questions, and carries the log to other
machines on a branch of its own.  Read from the top: a section uses only those above.

    1  World         time, ids, randomness, environment: all that a test replaces
    2  Errors        what can go wrong, its JSON-RPC code and its exit status
    3  Values        records, names, durations, limits, canonical JSON
    4  Events        the event types: one table
    5  Places        where things lie: .thrum, the sync worktree, the config
    6  Git           the one place that runs git
    7  Identity      who is who, and who is calling
    8  Journal       the append-only files
    9  Store         the one place that speaks SQL
   10  Ledger        the one way to change anything
   11  Work          what agents are doing: git state, claims, conflicts, why
   12  Routing       who is told what: waiting, subscriptions, thread streams
   13  Sync          the branch that carries the log
   14  JSON-RPC      lines in, calls out (JSON-RPC 2.0)
   15  HTTP          requests in, responses out (RFC 9112, as much as a browser needs)
   16  WebSocket     bytes in, messages out (RFC 6455)
   18  Integrations  what is written into the user's tree: ignore files, git's hooks
   19  Operations    what is done to an installation: removal, migration
   20  Methods       what the daemon answers: one table
   21  Screen        what people see in a terminal
   22  Commands      what the shell accepts and the daemon runs: one table
   23  Daemon        sockets and threads: the only asyncio
   24  Client        one command, sent to the daemon
   25  Pages         the web page, generated from web/
   26  Main          what the shell accepts and this process runs

The numbers are those of the design; the missing ones belong to parts still to come.
"""

from __future__ import annotations

import os
import sys
import time

__version__ = "0.4.0"
__all__ = [
    "main", "connect", "read_log", "World", "ThrumError", "InvalidParams", "Unreachable",
    "decode_request", "Lines", "decode_head", "WebSocket",
]

TYPE_CHECKING = False           # type checkers read this name as True
if TYPE_CHECKING:
    import asyncio, base64, bisect, calendar, codecs, collections, concurrent.futures, difflib, errno, fcntl, hashlib, hmac  # noqa: E401
    import importlib.util, json, logging, marshal, queue, re, resource, select, shlex, shutil, signal, socket, sqlite3  # noqa: E401
    import struct, subprocess, threading, unicodedata, zlib  # noqa: E401


class _Lazy:
    """A module imported at its first use, which then takes this object's place.

    `thrum inbox` runs at every turn of every agent: what it does not use must not cost it.
    """

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        module = globals()[self._name] = __import__(self._name, fromlist=(attribute,))      # a package brings its module too
        return getattr(module, attribute)


LAZY_MODULES = (
    "asyncio base64 bisect calendar codecs collections concurrent difflib errno fcntl hashlib hmac importlib json logging marshal "
    "queue re resource select shlex shutil signal socket sqlite3 struct subprocess threading unicodedata zlib"
).split()
globals().update((name, _Lazy(name)) for name in LAZY_MODULES)


# ================================================================== 1  World
#
# Stamps are RFC 3339 in UTC with nine fractional digits, the last of them never 0, so that
# no reader trims one and the order of the texts is the order of the times.  Ids are a kind
# and a ULID (48 bits of milliseconds, 80 random bits, Crockford base32), so they sort too.

CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = []                     # all pairs of its digits, made at first use
NS = 1_000_000_000              # nanoseconds in a second
FAR = 1 << 62                   # later than all times that are accepted (in 2116); fits SQLite's integers


def crockford(number: int, length: int) -> str:
    """`number` in Crockford base32, most significant digit first, padded to `length`."""
    if not _PAIRS:
        _PAIRS.extend([a + b for a in CROCKFORD for b in CROCKFORD])
    digits = []
    for _ in range(length + 1 >> 1):    # two at a time: an id is made for each message
        digits.append(_PAIRS[number & 1023])
        number >>= 10
    return "".join(reversed(digits))[-length:]


def ulid_ms(id: str) -> int:
    """The milliseconds since the epoch in an id made of a ULID.  Raises ValueError for any other."""
    digits, number = id.rpartition("_")[2], 0
    if len(digits) != 26 or not set(CROCKFORD).issuperset(digits):
        raise ValueError(f"no ULID: {id[:64]!r}")
    for digit in digits[:10]:
        number = number << 5 | CROCKFORD.index(digit)
    return number


def hash32(text: str) -> str:
    """The SHA-256 of `text` in Crockford base32, 52 characters, without padding."""
    return crockford(int.from_bytes(hashlib.sha256(os.fsencode(text)).digest(), "big") << 4, 52)


def stamp_of(ns: int) -> str:
    """The stamp of a time in nanoseconds since the epoch."""
    seconds, fraction = divmod(ns, NS)
    t = time.gmtime(seconds)
    return "%04d-%02d-%02dT%02d:%02d:%02d.%09dZ" % (*t[:6], fraction)


def ns_of(stamp: str) -> int:
    """The time of an RFC 3339 stamp in nanoseconds since the epoch.

    Takes any number of fractional digits (more than nine are cut) and any offset, as other
    programs write them.  Raises ValueError for anything else.
    """
    global _minute
    if not isinstance(stamp, str):
        raise ValueError("not an RFC 3339 time: no text")
    minute = _minute            # one look: another thread may change it
    if len(stamp) == 30 and stamp[16] == ":" and stamp[19] == "." and stamp[29] == "Z" and stamp[:16] == minute[0] \
            and stamp[17] < "6" and (digits := stamp[17:19] + stamp[20:29]).isdigit() and digits.isascii():
        return minute[1] + int(digits)      # our own form, in the minute of the one before: a log is full of them
    if not 20 <= len(stamp) <= 64 or stamp[10] not in "Tt ":
        raise ValueError(f"not an RFC 3339 time: {str(stamp)[:64]!r}")
    try:
        date, clock, rest = stamp[:10], stamp[11:19], stamp[19:]
        fraction = ""
        if rest[0] == ".":
            end = 1
            while rest[end].isdigit():
                end += 1
            fraction, rest = rest[1:end], rest[end:]
            if not fraction:
                raise ValueError
        if rest in ("Z", "z"):
            offset = 0
        else:
            sign = {"+": 1, "-": -1}[rest[0]]
            if len(rest) != 6 or rest[3] != ":":
                raise ValueError
            offset = sign * (int(rest[1:3]) * 3600 + int(rest[4:6]) * 60)
            if abs(offset) > 86_340 or not (rest[1:3] + rest[4:6]).isdigit():
                raise ValueError
        digits = date[:4] + date[5:7] + date[8:] + clock[:2] + clock[3:5] + clock[6:]
        if date[4] + date[7] + clock[2] + clock[5] != "--::" or not (digits + fraction).isdigit() or not stamp.isascii():
            raise ValueError
        numbers = (*map(int, date.split("-")), *map(int, clock.split(":")))
        if not (numbers[3] < 24 and numbers[4] < 60 and numbers[5] <= 60) \
                or time.gmtime(calendar.timegm((*numbers[:5], 0)))[:3] != numbers[:3]:
            raise ValueError            # the calendar would take the 31st of February for a day in March
        seconds = calendar.timegm(numbers) - offset
        if seconds < 0:
            raise ValueError
        if offset == 0:
            _minute = stamp[:16], calendar.timegm((*numbers[:5], 0)) * NS
        return seconds * NS + int((fraction + "000000000")[:9])
    except (ValueError, KeyError, IndexError, OverflowError):
        raise ValueError(f"not an RFC 3339 time: {stamp!r}") from None


_minute = ("", 0)               # the minute of the last stamp that was read, and its time in ns


class World:
    """Time, ids, randomness and environment.  Nothing else reads a clock or makes an id."""

    def __init__(self, environ=None):
        self.environ = os.environ if environ is None else environ
        self._last_ns = 0
        self._last_ulid = 0

    def now_ns(self) -> int:
        """Nanoseconds since the epoch."""
        return time.time_ns()

    def monotonic(self) -> float:
        """Seconds on a clock that is never set back."""
        return time.monotonic()

    def random(self, count: int) -> bytes:
        """`count` random bytes, fit for secrets."""
        return os.urandom(count)

    def stamp_ns(self, after: int = 0) -> int:
        """A time later than every one given before and than `after` (ns, of what is referred to).

        So an answer is never older than its question, whatever the clock of the machine that asked.
        """
        ns = max(self.now_ns(), self._last_ns + 1, after + 1)
        if ns % 10 == 0:
            ns += 1
        self._last_ns = ns
        return ns

    def seen(self, ns: int) -> None:
        """Never stamp anything at or before `ns`: this daemon's own newest event in the log."""
        self._last_ns = max(self._last_ns, ns)

    def new_id(self, kind: str, above: str = "") -> str:
        """`kind_` and a ULID, greater than every one this process made before, and than `above`, an id of that kind."""
        ulid = self.now_ns() // 1_000_000 << 80 | int.from_bytes(self.random(10), "big")
        if ulid >> 80 <= self._last_ulid >> 80:
            ulid = self._last_ulid + 1
        self._last_ulid = ulid
        if kind + "_" + crockford(ulid, 26) <= above:       # of a clock that is ahead: the next millisecond, with our own randomness,
            ulid = ulid_ms(above) + 1 << 80 | ulid & (1 << 80) - 1      # because above + 1 is what another machine would make too
        return kind + "_" + crockford(ulid, 26)

    def hostname(self) -> str:
        """The name of this machine as agents registered here carry it."""
        name = self.environ.get("THRUM_HOSTNAME") or os.uname().nodename
        return name[:-6] if name.endswith(".local") else name


# ================================================================== 2  Errors


class ThrumError(Exception):
    """Something its caller can be told.  `code` goes on the wire, `status` to the shell."""

    code, status = -32000, 1

    def __init__(self, message: str, data=None):
        super().__init__(message)
        self.data = data


class ParseError(ThrumError):
    code = -32700               # JSON-RPC 2.0, section 5.1, as the four below


class InvalidRequest(ThrumError):
    code = -32600


class MethodNotFound(ThrumError):
    code = -32601


class InvalidParams(ThrumError):
    code = -32602


class InternalError(ThrumError):
    code = -32603


class Usage(ThrumError):
    """A command line that its row does not allow."""


class NotInitialized(ThrumError):
    """No `.thrum` here."""


class NoIdentity(ThrumError):
    """It cannot be told who is calling."""


class Unreachable(ThrumError):
    """The daemon does not answer."""


class NotFound(ThrumError):
    """What was asked for by its id is not there."""


class GitError(ThrumError):
    """git failed, was missing, or took too long."""


class Conflict(ThrumError):
    """Refused because somebody else was first.  `data` says who."""


def os_problem(error: OSError) -> str:
    """What went wrong with a file, in a few words: `No space left on device: /a/b`."""
    where = f": {os.fsdecode(error.filename)}" if error.filename else ""
    return f"{error.strerror or error}{where}"


# ================================================================== 3  Values

LINE_MAX = 65_535               # bytes of an event line: the reference cannot read a longer one
NAME_MAX = 64                   # characters: a name is also a file name, and must fit a screen
PAIR_MAX = 256                  # characters of each half of a scope or reference
TEXT_MAX = 4_096                # bytes of an intent, a task, a description: one or two paragraphs
LIST_MAX = 1_000                # items in a list that a caller sends: beyond is a mistake
PAGE_MAX = 100                  # messages on a page, as in the reference
TTL_MAX_S = 24 * 3600           # of a claim: who needs a path for longer is there to renew it
WILDCARDS_MAX = 4               # in the pattern of a claim, as `a/*/b/*_test.*` needs: the time to compare two grows with them
WILD_MAX = 64                   # characters of a pattern from its first wildcard on: and with these
UNCLAIMABLE = (".git", ".thrum")        # nobody edits what is in there
RESERVED_NAMES = ("daemon", "system", "thrum", "all", "broadcast")
EVERYONE = "everyone"           # the group of all agents; nobody creates or changes it

LOWER = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-")
WORD = LOWER | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


class Record:
    """An immutable value with named fields, like a frozen dataclass.

    Forty dataclasses would cost every start 30 ms, forty of these cost half of one.
    """

    _fields: tuple = ()

    def __init_subclass__(cls):
        cls._fields = (*cls._fields, *cls.__dict__.get("__annotations__", ()))
        cls._defaults = {field: getattr(cls, field) for field in cls._fields if hasattr(cls, field)}

    def __init__(self, *args, **named):
        values = self.__dict__
        values.update(zip(self._fields, args))
        if len(args) == len(self._fields) and not named:
            return
        values.update(named)
        if len(args) + len(named) != len(values) or len(args) > len(self._fields):
            raise TypeError(f"{type(self).__name__}: too many or repeated values")
        if len(values) != len(self._fields):
            values.update({**self._defaults, **values})
        if values.keys() != set(self._fields):
            raise TypeError(f"{type(self).__name__}: the fields are {', '.join(self._fields)}")

    def __setattr__(self, name, value):
        raise AttributeError(f"{type(self).__name__} is immutable")

    def __eq__(self, other):
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self):
        return hash(tuple(self.__dict__[field] for field in self._fields))

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(f'{k}={self.__dict__[k]!r}' for k in self._fields)})"


def compact(**fields) -> dict:
    """The fields that say something: without None, "", empty lists and objects."""
    return {k: v for k, v in fields.items() if v not in (None, "", [], {})}


def encode(value) -> bytes:
    """JSON without blanks, in ASCII, for clients."""
    global _encode_compact
    _encode_compact = _encode_compact or json.JSONEncoder(separators=(",", ":")).encode     # json.dumps makes one each time
    return _encode_compact(value).encode()


_encode_compact = None


def canonical(value) -> bytes:
    """JSON as the log holds it: keys sorted at every level, no blanks, UTF-8, no newline.

    `<`, `>`, `&`, U+2028 and U+2029 are escaped as Go's encoder does, so that a file written
    by either program is never rewritten by the other.  Raises ValueError for NaN and UnicodeEncodeError
    for half a surrogate pair.
    """
    global _encode
    if _encode is None:
        _encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True, allow_nan=False,
                                   separators=(",", ":")).encode
    text = _encode(value)
    for character, escape in _GO_ESCAPES:
        if character in text:
            text = text.replace(character, escape)
    return text.encode()


_encode = None
_GO_ESCAPES = (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029"))


def decode_object(data) -> dict:
    """The JSON object in `data` (bytes or str).  Raises ValueError for anything else, NaN included."""
    value = decode(data)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def decode(data):
    """The value of a JSON text (bytes in UTF-8, or str).  Raises ValueError, also for NaN and endless nesting."""
    global _decode
    if _decode is None:
        def refuse(word):
            raise ValueError(f"{word} is not JSON")

        def finite(text):
            number = float(text)
            return number if abs(number) < float("inf") else refuse(text)
        _decode = json.JSONDecoder(parse_constant=refuse, parse_float=finite).decode
    try:
        return _decode(data if isinstance(data, str) else data.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


_decode = None


def check_name(name: str, what: str = "agent name") -> str:
    """`name` itself when an agent or group may bear it; raises InvalidParams with the reason."""
    if not name:
        raise InvalidParams(f"{what} cannot be empty")
    if name in RESERVED_NAMES or name.startswith("user_"):
        raise InvalidParams(f"{what} '{name}' is reserved and cannot be used")
    if not LOWER.issuperset(name):
        raise InvalidParams(f"{what} {name!r} contains invalid characters; only lowercase letters (a-z), digits (0-9), "
                            "underscores (_), and hyphens (-) are allowed")
    if len(name) > NAME_MAX:
        raise InvalidParams(f"{what} '{name[:20]}…' is longer than {NAME_MAX} characters")
    return name


def check_word(word: str, what: str) -> str:
    """`word` when it may be a role: letters, digits, `_` and `-`.  It becomes part of file names."""
    if not word:
        raise ThrumError(f"{what} is required")
    if not WORD.issuperset(word) or len(word) > NAME_MAX:
        raise InvalidParams(f"{what} {word[:NAME_MAX]!r} is invalid; use up to {NAME_MAX} letters, digits, '_' and '-'")
    return word


def check_text(text: str, what: str, limit: int = TEXT_MAX) -> str:
    """`text` when it is valid Unicode of at most `limit` bytes without NUL."""
    if not is_unicode(text):
        raise InvalidParams(f"{what} is not valid UTF-8")
    if len(text) > limit // 4 and len(text.encode()) > limit:
        raise InvalidParams(f"{what} is {len(text.encode()):,} bytes long; the limit is {limit:,}")
    if "\0" in text:
        raise InvalidParams(f"{what} contains a NUL character")
    return text


def is_label(text: str) -> bool:
    """Whether `text` can be half of a scope or reference: short, not empty, without control characters."""
    return 0 < len(text) <= PAIR_MAX and text.isprintable()


def is_claimable(path: str) -> bool:
    """Whether `path` is what a claim may be on: `.`, or a normal path from the top of the repository, perhaps with wildcards."""
    return path == "." or (is_label(path) and not {"", ".", ".."} & set(path.split("/"))
                           and path.split("/")[0] not in UNCLAIMABLE and len(re.findall(r"[*]+|[?]", path)) <= WILDCARDS_MAX
                           and len(re.sub("^[^*?]+", "", path)) <= WILD_MAX)


def is_unicode(text: str) -> bool:
    """Whether `text` holds no half of a surrogate pair, as Python makes of bytes that are not UTF-8."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def printable(text):
    """`text` with `?` for what cannot be shown: names of directories, which may hold anything.

    (The launcher carries this function.)
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def parse_pair(text: str, what: str) -> dict:
    """`type:value`, split at the first colon, as a scope or reference."""
    kind, colon, value = text.partition(":")
    if not (colon and is_label(kind) and is_label(value)):
        raise InvalidParams(f"{what} must be in 'type:value' format, got: {text}")
    return {"type": kind, "value": value}


# Scripts that write without blanks, where each character counts as a word: Thai, Lao, Myanmar, Khmer, Kana, Han.
UNSPACED = ("\u0e00\u0eff", "\u1000\u109f", "\u1780\u17ff", "\u3040\u30ff", "\u3400\u4dbf", "\u4e00\u9fff", "\uf900\ufaff",
            "\U00020000\U0003ffff")


def words_of(text: str):
    """The words of a text as pairs of (start, end) and the word in the form in which words are compared.

    That is without case and accents: `Éclair`, `ECLAIR` and `eclair` are one word; `parse_line` is two.
    """
    if text.isascii():
        for match in re.finditer("[A-Za-z0-9]+", text):
            yield match.span(), match[0].lower()
        return
    for start, end in _word_spans(text):
        word = text[start:end]
        if word.isascii():
            yield (start, end), word.lower()
        else:
            bare = "".join(c for c in unicodedata.normalize("NFKD", word.casefold()) if not unicodedata.combining(c))
            for first, last in _word_spans(bare):       # ½ is two words
                yield (start, end), bare[first:last]


def _word_spans(text: str):
    """Where words begin and end: letters and digits with the marks that follow them (Unicode's category M)."""
    start, alone = -1, False
    for i, c in enumerate(text):
        if start >= 0 and not c.isalnum() and unicodedata.category(c)[0] == "M":
            continue
        single = c >= UNSPACED[0][0] and any(low <= c <= high for low, high in UNSPACED)
        if start >= 0 and (alone or single or not c.isalnum()):
            yield start, i
            start = -1
        if start < 0 and c.isalnum():
            start, alone = i, single
    if start >= 0:
        yield start, len(text)


def parse_query(text: str) -> list:
    """What somebody searches for, as phrases that must all occur: pairs of words, and whether the last is a beginning.

    `"two words"` is a phrase, `pars*` a beginning, everything else a word; whatever else is in it counts as a blank.
    """
    phrases = []
    for match in re.finditer(r'"([^"]*)"?(\*?)|([^\s"]+)', text):
        chunk = match[1] if match[3] is None else match[3]
        words = [word for _, word in words_of(chunk)]
        if words:
            phrases.append((words, bool(match[2]) or chunk.endswith("*")))
    return phrases


def find_phrases(text: str, phrases: list) -> list:
    """Where the phrases occur in a text, as (start, end) of each word in order; [] unless all of them occur."""
    words, spans = list(words_of(text)), []
    for phrase, beginning in phrases:
        size, found = len(phrase), False
        for i in range(len(words) - size + 1):
            last = words[i + size - 1][1]
            if all(words[i + n][1] == phrase[n] for n in range(size - 1)) and \
                    (last.startswith(phrase[-1]) if beginning else last == phrase[-1]):
                spans += [span for span, _ in words[i:i + size]]
                found = True
        if not found:
            return []
    return sorted(set(spans))


DURATION_UNITS = {"ns": 1, "us": 1_000, "µs": 1_000, "ms": 1_000_000, "s": NS, "m": 60 * NS, "h": 3_600 * NS, "d": 86_400 * NS}
DAYS_MAX = 36_500               # a century: before anything that there is
DURATION_MAX_S = 366 * 86_400   # a year: what is longer is a slip of the finger


def span(seconds: float) -> str:
    """A length of time as people say it: `45s`, `5m`, `2h30m`, `3d5h`."""
    seconds = max(0, int(seconds))
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m")):
        if seconds >= size:
            rest = seconds % size // small
            return f"{seconds // size}{unit}" + (f"{rest}{small_unit}" if rest else "")
    return f"{seconds // 60}m" if seconds >= 60 else f"{seconds}s"


def parse_duration(text: str, limit_s: int = DURATION_MAX_S) -> float:
    """Seconds of a Go duration, or one with days: `90s`, `1h30m`, `1d12h`, `-250ms`, `0`.  Raises ValueError."""
    sign = -1 if text[:1] == "-" else 1
    rest = text[1:] if text[:1] in "+-" and text else text
    if rest == "0":
        return 0.0
    total = 0.0
    if not rest:
        raise ValueError(f"invalid duration {text!r}")
    while rest:
        end = 0
        while end < len(rest) and rest[end] in "0123456789.":
            end += 1
        number, rest = rest[:end], rest[end:]
        unit = next((unit for unit in DURATION_UNITS if rest.startswith(unit)), "")
        if not unit or number.strip("0123456789") not in ("", ".") or number in ("", "."):
            raise ValueError(f"invalid duration {text!r}; use for example 30s, 5m or 1h30m")
        total += float(number) * DURATION_UNITS[unit]
        rest = rest[len(unit):]
    if total / NS > limit_s:
        raise ValueError(f"duration {text!r} is longer than {span(limit_s)}")
    return sign * total / NS


def parse_moment(text: str, now_ns: int) -> int:
    """A time in the past (ns): `2d`, `12h` (so long ago), `2026-03-15` (midnight UTC) or RFC 3339.  Raises ValueError."""
    if text[-1:] == "d" and text[:-1].lstrip("-+").isdigit() and text.isascii():
        if int(text[:-1]) <= 0:
            raise ValueError(f"day count must be positive, got {text[:-1]}")
        return max(0, now_ns - min(int(text[:-1]), DAYS_MAX) * 86_400 * NS)
    if text[-1:] == "d" and text[:1].isdigit():
        raise ValueError(f"invalid day count in {text!r}")
    try:
        seconds = parse_duration(text, DAYS_MAX * 86_400)
    except ValueError:
        for stamp in (text, text + "T00:00:00Z"):
            try:
                return ns_of(stamp)
            except ValueError:
                pass
        raise ValueError(f'unrecognized time specification "{text}"; accepted formats: 2d, 12h, 2026-03-15, '
                         "2026-03-15T09:00:00Z") from None
    if seconds <= 0:
        raise ValueError(f"duration must be positive, got {text}")
    return now_ns - int(seconds * NS)


def version_key(version: str) -> tuple:
    """A version such as `1.10.2` as numbers that compare; what is not a number counts as 0."""
    return tuple(int(part) if part.isdigit() and part.isascii() else 0 for part in version.split(".")[:4])


# ================================================================== 4  Events
#
# An event is a plain dict, the same in memory, in the log and on the wire; a field that a newer
# version added survives being read, projected and written again.  Common to all: `type`, `timestamp`,
# `event_id`, `v` (1), `origin_daemon`, and `sequence`, the number that its first daemon gave it.

COMMON_FIELDS = {"type": str, "timestamp": str, "event_id": str, "v?": int, "origin_daemon?": str, "sequence?": int}


class EventType(Record):
    """What an event holds and where its line goes.

    `fields` maps names to types, `?` marks optional ones.  `file` is `author` (the file of the message's author)
    or `events`; `shared` is False for what concerns this machine only and stays in the journal.  Optional fields
    are left out where they are empty, unless `empty` says that this means something.
    """

    fields: dict
    file: str = "events"
    shared: bool = True
    empty: bool = False


EVENTS = {
    "message.create": EventType({
        "message_id": str, "agent_id": str, "session_id?": str, "body": dict, "thread_id?": str, "scopes?": list,
        "refs?": list, "recipients?": list, "authored_by?": str, "disclosed?": bool, "send_key?": str}, "author"),
    "message.edit": EventType({"message_id": str, "body": dict, "agent_id?": str}, "author"),
    "message.delete": EventType({"message_id": str, "reason?": str}, "author"),
    "message.receipt": EventType({
        "message_id": str, "agent_id": str, "receipt_type": str, "session_id?": str}, "author"),
    # Messages that were archived or removed for good: their bytes are freed, on all machines.
    "message.remove": EventType({"message_ids": list, "reason?": str, "removed_by?": str}),
    "thread.create": EventType({"thread_id": str, "title?": str, "created_by?": str}),
    "agent.register": EventType({
        "agent_id": str, "kind": str, "role": str, "module": str, "name?": str, "worktree?": str, "display?": str,
        "hostname?": str}),
    "agent.session.start": EventType({"session_id": str, "agent_id": str}),
    "agent.session.end": EventType({"session_id": str, "reason?": str}),
    "agent.update": EventType({"agent_id": str, "work_contexts": list}),
    "agent.cleanup": EventType({"agent_id": str, "reason?": str, "method?": str}),
    "group.create": EventType({"group_id": str, "name": str, "created_by?": str, "description?": str}),
    "group.update": EventType({"group_id": str, "fields": dict, "updated_by?": str}),
    "group.delete": EventType({"group_id": str, "deleted_by?": str}),
    "group.member.add": EventType({"group_id": str, "member_type": str, "member_value": str, "added_by?": str}),
    "group.member.remove": EventType({"group_id": str, "member_type": str, "member_value": str, "removed_by?": str}),
    "purge.executed": EventType({"cutoff": str}),
    # Advisory leases: the id of the first of these is the claim's fencing number.
    "claim.take": EventType({
        "claim_id": str, "agent_id": str, "session_id?": str, "path": str, "shared?": bool, "ttl_s": int, "note?": str}),
    "claim.renew": EventType({"claim_id": str, "agent_id": str, "ttl_s": int, "note?": str}),
    "claim.release": EventType({"claim_id": str, "reason?": str, "agent_id?": str, "superseded_by?": str}),
    # On this machine the time of another's claim has passed since the grant or renewal with this event id.
    "claim.lapse": EventType({"claim_id": str, "renewal": str}, shared=False),
    # How messages were pushed to somebody: what this machine can vouch for.
    "message.route": EventType({"message_ids": list, "agent_id": str, "route": str}, shared=False),
    # Intent, task, scopes and references of a session: others learn of them by agent.update.
    "session.update": EventType({
        "session_id": str, "agent_id": str, "intent?": str, "current_task?": str, "scopes?": list, "refs?": list},
        shared=False, empty=True),
    # What a session wants to be told of; `topics` are keys of SUBSCRIPTION_TOPICS, `scopes` holds at most one pair.
    "subscription.add": EventType({
        "subscription_id": int, "session_id": str, "agent_id": str, "scopes?": list, "mention?": str, "all?": bool, "topics?": list},
        shared=False),
    "subscription.remove": EventType({"subscription_id": int, "session_id": str}, shared=False),
}


ID_FIELDS = frozenset(("message_id", "agent_id", "session_id", "event_id", "thread_id", "group_id", "type", "origin_daemon",
                       "authored_by", "send_key", "route", "claim_id", "superseded_by", "renewal"))
FENCE_AHEAD_S = 24 * 3600       # seconds for which the time in a fencing number may be ahead of its event: it rises with the fastest clock
SHAPES_MAX = 1_000              # shapes remembered: unknown fields can make any number of them
_shapes = {}                    # fields and types of events that were found well-formed -> their ids


def _checks_of(kind: str) -> list:
    """What is known of the fields of an event type: (field, its type, required, is an id)."""
    row = EVENTS.get(kind)
    fields = {**COMMON_FIELDS, **(row.fields if row else {})}
    return [(field.rstrip("?"), type_, field[-1] != "?", field.rstrip("?") in ID_FIELDS) for field, type_ in fields.items()]


def check_event(event: dict) -> int:
    """The stamp (ns) of a well-formed event; raises ValueError naming what is wrong.

    Everything read from a file, a remote or a peer passes here once.  Types that are not known are kept and
    relayed: a newer version wrote them.
    """
    kind = event.get("type")
    if type(kind) is not str:
        raise ValueError("type is missing, or not a text")
    shape = (kind, *event, *map(type, event.values()))
    ids = _shapes.get(shape)        # a log has a few dozen shapes, and hundreds of thousands of lines
    if ids is None:
        ids = []
        for name, type_, required, is_id in _checks_of(kind):
            value = event.get(name)
            if value is None:
                if required or name in event:
                    raise ValueError(f"{name} is missing")
            elif type(value) is not type_:
                raise ValueError(f"{name} is not of type {type_.__name__}")
            elif is_id:
                ids.append(name)
        if kind in EVENTS and len(_shapes) < SHAPES_MAX:
            _shapes[shape] = ids
    for name in ids:
        value = event[name]
        if not is_label(value):
            raise ValueError(f"{name} is not an id")
    fields = EVENTS[kind].fields if kind in EVENTS else ()
    if "body" in fields and type(event["body"].get("content", "")) is not str:
        raise ValueError("body.content is not of type str")
    for name in ("scopes", "refs"):
        for pair in event.get(name, ()) if name + "?" in fields else ():
            if type(pair) is not dict or type(pair.get("type")) is not str or type(pair.get("value")) is not str:
                raise ValueError(f"{name} holds what is not a pair of texts")
    for name in ("recipients?", "message_ids", "topics?"):
        if name in fields and any(type(one) is not str or not is_label(one) for one in event.get(name.rstrip("?"), ())):
            raise ValueError(f"{name.rstrip('?')} holds what is not an id")
    if "ttl_s" in fields and not 0 < event["ttl_s"] <= TTL_MAX_S:
        raise ValueError(f"ttl_s is not between 1 and {TTL_MAX_S}")
    if kind == "claim.take" and not is_claimable(event["path"]):
        raise ValueError("path is nothing that can be claimed")
    ns = ns_of(event["timestamp"])
    if kind == "claim.take" and not is_fence(event["event_id"], ns):
        raise ValueError("event_id is no fencing number")
    if ns >= FAR:
        raise ValueError("timestamp is later than 2116")
    return ns


def is_fence(event_id: str, ns: int) -> bool:
    """Whether the id of an event with that stamp can be a fencing number: all later ones have to be above it."""
    try:
        return event_id[:4] == "evt_" and ulid_ms(event_id) * 1_000_000 <= ns + FENCE_AHEAD_S * NS
    except ValueError:
        return False


def file_stem(agent_id: str) -> str:
    """The name of an agent's message file, without ending: `user:dana` is `user_dana`.

    Raises ValueError where an id from elsewhere would name a file outside of its folder.
    """
    stem = (agent_id[6:] if agent_id.startswith("agent:") else agent_id).replace(":", "_")
    if not stem or len(stem) > 2 * NAME_MAX or not WORD.issuperset(stem):
        raise ValueError(f"{agent_id[:80]!r} cannot be a file name")
    return stem


# ================================================================== 5  Places
#
#     <top>/.thrum/                    never committed; in a linked worktree only what has a *
#       config.json                    settings; unknown keys are kept
#       redirect *                     in a linked worktree: the absolute path of the .thrum in effect
#       identities/<name>.json *       who works in this worktree
#       context/<name>.md *            what an agent wrote down for its successor; before it is shown
#       context/<name>_preamble.md *   what changes little: who the agent is, and how to work here
#       bin/thrum, bin/thrum.py *      the launcher, and the copy that launcher and daemon run
#       var/                           0700; runtime state, of this machine only
#         thrum.sock  thrum.pid  thrum.lock  start.lock  stopped  clean.json  daemon.json  daemon.log
#         journal/<first>.jsonl        the log in the order of acceptance (section 8)
#         messages.db                  the projection (section 9); disposable
#         bad-lines.jsonl              lines of the log that could not be read
#         conflicts/                   git objects of work that is not committed, while the daemon runs
#     <common>/thrum-sync/a-sync/      worktree of the branch a-sync: events.jsonl, messages/<name>.jsonl

# Every variable that is read, and what it does.  The client forwards those marked * to the daemon; one that is started
# inherits those "of the daemon".
ENVIRONMENT = {
    "THRUM_HOME": "the worktree to act in, wherever the command is called",
    "THRUM_NAME": "* which identity of the worktree is calling; beats --name",
    "THRUM_AGENT_ID": "* the caller's agent id, taken as it is",
    "THRUM_ROLE": "* the role, over that of the identity file",
    "THRUM_MODULE": "* the module, over that of the identity file",
    "THRUM_DISPLAY": "* the display name, over that of the identity file",
    "THRUM_GUARD": "* what the guard does about others' claims: stop (if unset), warn or off",
    "THRUM_HOSTNAME": "of the daemon: the host name stored when an agent registers",
    "THRUM_SOCKET": "the daemon's socket, instead of the one under .thrum/var",
    "THRUM_AUTOSTART": "0: do not start the daemon when it is absent; beats daemon.autostart",
    "THRUM_LOCAL": "of the daemon: 1 or 0; beats daemon.local_only",
    "THRUM_SYNC_INTERVAL": "of the daemon: seconds; beats daemon.sync_interval",
    "THRUM_WS_PORT": "of the daemon: a port or auto; beats daemon.ws_port",
    "THRUM_WS_ECHO": "of the daemon: 1 opens /ws/echo, for suites that test WebSocket servers",
    "NO_COLOR": "* any value: no colour",
    "COLUMNS": "* the width of the output where it is not a terminal",
}
FORWARDED = tuple(name for name, meaning in ENVIRONMENT.items() if meaning[0] == "*")


def locate(start):
    """The root of the worktree around `start`, and the `.thrum` in effect there or "".

    The root is the nearest directory at or above `start` that holds `.thrum` or `.git`.  (The launcher carries
    this function's source, so it uses nothing but `os`.)
    """
    top = start
    while not os.path.isdir(top + "/.thrum") and not os.path.lexists(top + "/.git"):
        if len(top) < 2:
            return start, ""
        top = os.path.dirname(top)
    try:
        with open(top + "/.thrum/redirect", encoding="utf-8", errors="surrogateescape") as file:
            return top, file.read(4096).strip()
    except OSError:
        return top, top + "/.thrum" if os.path.isdir(top + "/.thrum") else ""


class Places(Record):
    """Where things lie for one caller.  All paths are absolute."""

    top: str                    # root of the caller's worktree
    thrum: str                  # the .thrum in effect: the main worktree's
    common: str                 # git's common directory, "" outside of git

    local = property(lambda self: self.top + "/.thrum")
    root = property(lambda self: os.path.dirname(self.thrum))
    var = property(lambda self: self.thrum + "/var")
    journal = property(lambda self: self.var + "/journal")
    database = property(lambda self: self.var + "/messages.db")
    log = property(lambda self: self.var + "/daemon.log")
    bad_lines = property(lambda self: self.var + "/bad-lines.jsonl")
    copy = property(lambda self: self.thrum + "/bin/thrum.py")
    sync = property(lambda self: self.common + "/thrum-sync/a-sync")
    config = property(lambda self: self.thrum + "/config.json")
    identities = property(lambda self: self.local + "/identities")


def git_dirs(top: str) -> tuple:
    """git's directory for the worktree `top` and the repository's common one, ("", "") outside of git.

    They differ in a linked worktree alone; that of a submodule is a main one, though its `.git` is a file too.
    Read from `.git` and `commondir` as gitrepository-layout(5) describes them: asking git costs a process.
    """
    path = top + "/.git"
    try:
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                text = file.read(8192)
            if not text.startswith("gitdir:"):
                return "", ""
            path = os.path.normpath(os.path.join(top, text[7:].strip()))
        elif not os.path.isdir(path):
            return "", ""
        try:
            with open(path + "/commondir", encoding="utf-8", errors="surrogateescape") as file:
                return path, os.path.normpath(os.path.join(path, file.read(8192).strip()))
        except FileNotFoundError:
            return path, path
    except OSError:
        return "", ""


def git_common_dir(top: str) -> str:
    """The common directory of the repository whose worktree is `top`, or ""."""
    return git_dirs(top)[1]


def registered_worktrees(common: str) -> list:
    """The linked worktrees that a repository knows, present or not: pairs of git's entry and the worktree's path."""
    found, folder = [], common + "/worktrees"
    try:
        for name in sorted(os.listdir(folder)):
            try:
                with open(f"{folder}/{name}/gitdir", encoding="utf-8", errors="surrogateescape") as file:
                    path = os.path.normpath(os.path.join(folder, name, file.read(8192).rstrip("\n")))
                found.append((f"{folder}/{name}", os.path.dirname(path)))
            except OSError:
                pass            # no entry, or one that is being made
    except OSError:
        pass
    return found


def worktrees_of(common: str) -> list:
    """The roots of a repository's worktrees that are there: the main one first, that of the branch a-sync left out.

    What has taken the place of one is none: it may be a repository of its own.
    """
    found = [os.path.dirname(common)] if os.path.basename(common) == ".git" else []
    return found + [top for _, top in registered_worktrees(common) if not top.startswith(common + "/")
                    and os.path.realpath(git_common_dir(top) or "/") == os.path.realpath(common)]


def is_connected(top: str, thrum: str) -> bool:
    """Whether a worktree has no installation but the one in `thrum`; where that is a link, its target is another one."""
    target = locate(top)[1]
    if target == thrum or os.path.realpath(target) == os.path.realpath(os.path.dirname(thrum)) + "/.thrum" or not os.path.isdir(target):
        return True
    return target == top + "/.thrum" and not os.path.isdir(target + "/var")


def find_places(start: str) -> Places:
    """The places for a caller in `start` (any directory).

    A linked worktree without a `.thrum` of its own uses the one of the main worktree.  Raises NotInitialized
    when there is none, with a `redirect` that leads nowhere, or outside of a repository.
    """
    top, thrum = locate(os.path.realpath(start))
    common = git_common_dir(top)
    if not thrum and common and os.path.basename(common) == ".git" and os.path.isdir(os.path.dirname(common) + "/.thrum"):
        thrum = os.path.dirname(common) + "/.thrum"
    if not thrum:
        if not common:
            raise NotInitialized(f"{start} is not in a git repository; run 'git init' first, or name one with --repo")
        raise NotInitialized(f"thrum is not initialized in {top}; run 'thrum init' or 'thrum quickstart'")
    if os.path.lexists(top + "/.thrum/redirect"):
        if not os.path.isabs(thrum) or not os.path.isdir(thrum):
            raise NotInitialized(f"{top}/.thrum/redirect leads to {thrum!r}, which is not there; run 'thrum setup'")
        if os.path.exists(thrum + "/redirect"):
            raise NotInitialized(f"{top}/.thrum/redirect leads to {thrum}, which is redirected itself; run 'thrum setup'")
    return Places(top, thrum, common or git_common_dir(os.path.dirname(thrum)))


PATH_MAX = 1_024                # characters of a path that a caller names: longer ones no system opens


def repo_path(path: str, top: str, cwd: str = "") -> str:
    """A path as git has it, from the top of its repository, with "/" between; "" is the top itself.

    `path` may be relative to `cwd`, or absolute below `top`; links in it are not followed, as git does not follow them, but
    one may lead to it.  Raises InvalidParams for what lies outside.
    """
    if not path or len(path) > PATH_MAX or "\0" in path:
        raise InvalidParams(f"{printable(path[:80])!r} cannot be a path" if path else "the path is empty; '.' is the whole repository")
    root = os.path.normpath(top or "/-")        # from the top of wherever it is
    full = os.path.normpath(os.path.join(root, cwd, path))
    if top and full != root and not full.startswith(root + "/"):
        full = os.path.join(os.path.realpath(os.path.dirname(full)), os.path.basename(full))
    found = "" if full == root else os.path.relpath(full, root)
    if found.split("/")[0] == "..":
        raise InvalidParams(f"{printable(path)} is outside of the repository {top}".rstrip())
    if found.split("/")[0].lower() == ".git":      # on a Mac .GIT is the same folder
        raise InvalidParams(f"{printable(path)} is in .git, which is git's own")
    return found


CONTEXT_MAX = 256 << 10         # bytes of a saved context or preamble: as much as a model's context window holds


def context_files(agent_id: str) -> tuple:
    """The names of an agent's context, its preamble, and the preamble's old name, below `.thrum/context/`.

    The context of an agent called `x_preamble` has a name of its own, lest it be the preamble of `x`.  Raises
    InvalidParams for what is not an agent's id.
    """
    try:
        stem = file_stem(agent_id)
    except ValueError:
        raise InvalidParams(f"invalid agent name: {agent_id[:80]!r}") from None
    return stem + (".context.md" if stem.endswith("_preamble") else ".md"), stem + "_preamble.md", stem + ".preamble.md"


def context_place(top, name):
    """The path of a file below `.thrum/context/` of a worktree, "" for one that lies elsewhere.  (The launcher carries this function.)"""
    folder = os.path.realpath(top + "/.thrum") + "/context"
    path = folder + "/" + name
    return path if "/" not in name and name.endswith(".md") and os.path.realpath(path) == path else ""


def context_path(top: str, file: str) -> str:
    """As `context_place`.  Raises ThrumError instead of giving ""."""
    path = context_place(top, file)
    if not path:
        raise ThrumError(f"{top}/.thrum/context/{file} is a link, or no file of a context")
    return path


def look(top, name):
    """A file below `.thrum/context/` of a worktree: (what is wrong, or "", its bytes or None, when it was changed in ns).

    (The launcher carries this function: an agent that begins asks for its context.)
    """
    path = context_place(top, name)
    if not path:
        return top + "/.thrum/context/" + name + " is a link, or no file of a context", None, 0
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)     # a FIFO stops nobody
        try:
            data, changed_ns = os.read(descriptor, 262145), os.fstat(descriptor).st_mtime_ns        # CONTEXT_MAX, and one more
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return "", None, 0
    except OSError as error:
        return "cannot read the context: " + error.strerror + ": " + path, None, 0
    if len(data) > 262144:
        return path + " is larger than 262,144 bytes", None, 0
    return "", data, changed_ns


def read_context(top: str, file: str) -> tuple | None:
    """The bytes of a file below `.thrum/context/` and the time of its last change (ns); None without one.

    Raises ThrumError for a link, a file that is too large, and what cannot be read.
    """
    problem, data, changed_ns = look(top, file)
    if problem:
        raise ThrumError(problem)
    return None if data is None else (data, changed_ns)


def file_bytes(path: str) -> bytes | None:
    """What a file holds, None where there is none."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def atomic_write(path: str, data: bytes, mode: int = 0o600) -> None:
    """Replace the file at `path`: whoever reads it sees the old or the new bytes, also after a power cut."""
    folder = os.path.dirname(path)
    # Of this call alone: two threads of the daemon may write the same file.
    temporary = f"{folder}/.{os.path.basename(path)}.{os.getpid()}.{os.urandom(4).hex()}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        try:
            write_all(descriptor, data)
            os.fchmod(descriptor, mode)
            durable_sync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
        sync_directory(folder)
    except OSError:
        remove(temporary)
        raise


def make_folder(path: str, mode: int = 0o750) -> None:
    """Make a folder unless it is there.  It brings no parent back: `init --remove` may have taken it away meanwhile."""
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        if not os.path.isdir(path):
            raise


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`; a short write (a full disk, a signal) goes on until done or failed."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view):]


def durable_sync(descriptor: int) -> None:
    """Wait until the file is on the medium.  fsync on macOS only reaches the drive's cache, hence F_FULLFSYNC."""
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(descriptor)


def remove(path: str) -> None:
    """Remove a file that may be gone already."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def remove_if_empty(*folders: str) -> None:
    """Remove folders, each of them inside the next, up to the first that holds something."""
    for folder in folders:
        try:
            os.rmdir(folder)
        except OSError:
            return


def sync_directory(path: str) -> None:
    """Make a file's creation or renaming in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Setting(Record):
    """A setting: what it may hold, and what counts where `config.json` is silent.

    `kind` is bool, int, str, "seconds" (an int), "port" (a text: a number or auto), "duration" (a text such as 24h)
    or "secret" (a text that is never shown whole).
    """

    kind: object
    default: object
    help: str
    least: int = 0
    most: int = 0
    variable: str = ""          # of the environment; it beats the file
    also: str = ""              # another place in the file where it is found
    restart: bool = False       # the daemon reads it when it starts
    later: bool = False         # the feature is still to come: nothing reads it in this version


INTERVAL_MAX_S = 86_400         # between exchanges with the remote: who wants fewer than one a day wants none
HOPS_MAX = 1_000                # of a chain of messages: far beyond any talk of agents with a point
KEEP_MAX = 3_650                # backups of one kind: ten years of daily ones
SECRET_SHOWN = 4                # characters of a secret that are shown, so that two can be told apart
SETTINGS = {                    # what is not listed here is kept as it is
    "daemon.local_only": Setting(bool, False, "messages never leave this machine", variable="THRUM_LOCAL", also="local_only",
                                 restart=True, later=True),
    "daemon.sync_interval": Setting("seconds", 60, "time from one exchange with the remote to the next", 1, INTERVAL_MAX_S,
                                    variable="THRUM_SYNC_INTERVAL", restart=True, later=True),
    "daemon.ws_port": Setting("port", "auto", "port of the WebSocket and the page", 1, 65_535, variable="THRUM_WS_PORT", restart=True),
    "daemon.ws_token": Setting("secret", "", "what clients of the WebSocket must present", restart=True),
    "daemon.autostart": Setting(bool, True, "commands start the daemon when it is absent", variable="THRUM_AUTOSTART"),
    "wake.max_hops": Setting(int, 12, "length of a chain of messages that wakes nobody any more", 1, HOPS_MAX, later=True),
    "peers.plaintext": Setting(bool, False, "peers may connect where the network is not encrypted", restart=True, later=True),
    "work.base": Setting(str, "", "the branch that work is compared with; empty: origin's default, main, master or trunk"),
    "runtime.primary": Setting(str, "cli-only", "the agent program that files are written for", later=True),
    "backup.dir": Setting(str, "", "where backups go; empty: .thrum/backup", later=True),
    "backup.schedule": Setting("duration", "", "time from one backup to the next; empty: none", restart=True, later=True),
    "backup.retention.daily": Setting(int, 5, "daily backups that are kept; -1: all", -1, KEEP_MAX, later=True),
    "backup.retention.weekly": Setting(int, 4, "weekly backups that are kept; -1: all", -1, KEEP_MAX, later=True),
    "backup.retention.monthly": Setting(int, -1, "monthly backups that are kept; -1: all", -1, KEEP_MAX, later=True),
}
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
CONFIG_WRITTEN = {"daemon.local_only": True, "daemon.sync_interval": 60, "daemon.ws_port": "auto"}     # by `init`


def _wanted(setting: Setting) -> str:
    numbers = f"from {setting.least:,} to {setting.most:,}"
    return {bool: "true or false", int: f"a whole number {numbers}", "seconds": f"a whole number of seconds {numbers}",
            "port": f"auto, or a port {numbers}", "duration": "a length of time such as 24h",
            "secret": f"a text of 1 to {TEXT_MAX:,} printable ASCII characters without blanks"}.get(setting.kind, "a text on one line")


def _fits(setting: Setting, value) -> bool:
    """Whether a value, as it stands in the file, is one that the setting may have."""
    kind = setting.kind
    if kind is bool:
        return type(value) is bool
    if kind in (int, "seconds"):
        return type(value) is int and setting.least <= value <= setting.most
    if type(value) is not str or not is_unicode(value) or not value.isprintable() or len(value) > TEXT_MAX:
        return False
    if kind == "port":
        return value == "auto" or (value.isascii() and value.isdigit() and len(value) < 6 and setting.least <= int(value) <= setting.most)
    if kind == "duration" and value:
        try:
            return parse_duration(value) > 0
        except ValueError:
            return False
    return kind != "secret" or (value.isascii() and " " not in value)


def _says_nothing(setting: Setting, value) -> bool:
    """Whether a value in the file stands for none: the reference writes "" and 0 seconds for what is not set."""
    return value is None or value == "" or (setting.kind == "seconds" and value == 0 and value is not False)


def parse_setting(name: str, text: str, source: str = "") -> object:
    """The value of a setting that somebody wrote as `text` (in `source`).  Raises ThrumError saying what it may be."""
    setting, value = SETTINGS[name], text.strip()
    try:
        if setting.kind is bool:
            value = _WORDS.get(value.lower(), value)
        elif setting.kind == "seconds" and value[-1:] in ("s", "m", "h"):
            seconds = parse_duration(value)
            value = int(seconds) if seconds == int(seconds) else value
        elif setting.kind in (int, "seconds") and value[value[:1] == "-":].isdigit() and value.isascii() and len(value) < 10:
            value = int(value)
    except ValueError:
        pass                    # stays a text, which is refused below
    if not value and type(value) is str or not _fits(setting, value):
        given = "" if setting.kind == "secret" else f", not {text[:80]!r}"
        raise ThrumError(f"{source or name} must be {_wanted(setting)}{given}")
    return value


def shown_setting(name: str, value) -> str:
    """A setting's value as people read it: `60s`, `true`; of a secret only the beginning."""
    kind = SETTINGS[name].kind if name in SETTINGS else "secret" if "token" in name else None
    if kind == "secret" and type(value) is str and value:
        return value[:SECRET_SHOWN if len(value) > 4 * SECRET_SHOWN else 0] + "..."
    if kind == "seconds":
        return f"{value}s"
    return value if type(value) is str else json.dumps(value, ensure_ascii=False)


def _read_config(thrum: str) -> dict:
    path = thrum + "/config.json"
    try:
        with open(path, "rb") as file:
            return decode_object(file.read())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ThrumError(f"cannot read the configuration: {os_problem(error)}") from None
    except ValueError as error:
        raise ThrumError(f"{path} is not valid JSON ({error}); correct it, or remove it for the defaults") from None


def _check_config(config: dict, path: str) -> dict:
    """`config` itself, when its known settings are what they must be; raises ThrumError naming file and key."""
    for name, setting in SETTINGS.items():
        for place in filter(None, (name, setting.also)):
            value, above = config, ""
            for key in place.split("."):
                if not isinstance(value, dict):
                    raise ThrumError(f"{path}: {above} must be an object, not {one_word(value)}")
                value, above = value.get(key), f"{above}.{key}".lstrip(".")
                if value is None:
                    break
            if not _says_nothing(setting, value) and not _fits(setting, value):
                quotes = "" if setting.kind in (bool, int, "seconds") or type(value) is str else ", in quotes"
                given = one_word(value) if setting.kind != "secret" else "what it is"
                raise ThrumError(f"{path}: {place} must be {_wanted(setting)}{quotes}, not {given}; 'thrum config set' corrects it")
    return config


def one_word(value) -> str:
    """A JSON value in a few characters, for a sentence."""
    text = json.dumps(value) if not isinstance(value, (dict, list)) else "an object" if isinstance(value, dict) else "a list"
    return text if len(text) <= 80 else text[:79] + "…"


def load_config(thrum: str) -> dict:
    """The settings in `config.json`, {} without one.  Raises ThrumError naming what is wrong with it."""
    return _check_config(_read_config(thrum), thrum + "/config.json")


def get_setting(config: dict, setting: str, default=None):
    """The value at a dotted path in a configuration; `default` where it or a part of the path is absent."""
    value = config
    for key in setting.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return default if value is None else value


def setting_in_effect(config: dict, name: str, environ: dict) -> tuple:
    """The value of a known setting and where it comes from: `env`, `config.json` or `default`.

    Raises ThrumError for a variable with a value that it cannot have.
    """
    setting = SETTINGS[name]
    text = environ.get(setting.variable, "") if setting.variable else ""
    if text.strip():
        return parse_setting(name, text, setting.variable), "env"
    for place in filter(None, (name, setting.also)):
        value = get_setting(config, place)
        if not _says_nothing(setting, value):
            return value, "config.json"
    return setting.default, "default"


def lock_directory(path: str) -> int:
    """A descriptor that holds an exclusive flock(2) on a directory until it is closed; no file is left behind."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def save_config(thrum: str, changes: dict) -> dict:
    """Set the settings in `changes` (dotted path to value; None removes one), keeping all others; gives their old values.

    A wrong value may be corrected this way, so the file is checked as it will be.
    """
    try:
        lock = lock_directory(thrum)        # two that change it at once lose nothing
    except OSError as error:
        raise ThrumError(f"cannot change the configuration: {os_problem(error)}") from None
    try:
        config, old = _read_config(thrum), {}
        for setting, value in changes.items():
            old[setting] = get_setting(config, setting)
            *path, last = setting.split(".")
            parents, section = [], config
            for key in path:
                if section.get(key) is None:
                    section[key] = {}
                parents.append((section, key))
                section = section[key]
                if not isinstance(section, dict):
                    raise ThrumError(f"{thrum}/config.json: {key} must be an object, not {one_word(section)}; correct it by hand")
            if value is not None:
                section[last] = value
                continue
            section.pop(last, None)
            for parent, key in reversed(parents):       # a section that is empty says nothing
                if not parent[key]:
                    del parent[key]
        text = json.dumps(_check_config(config, thrum + "/config.json"), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        # Half of a surrogate pair can only have come from an escape; it becomes one again.
        atomic_write(thrum + "/config.json", text.encode(errors="backslashreplace"))
        return old
    except RecursionError:
        raise ThrumError(f"{thrum}/config.json is nested too deeply; correct it by hand") from None
    except OSError as error:
        raise ThrumError(f"cannot change the configuration: {os_problem(error)}") from None
    finally:
        os.close(lock)


# ================================================================== 6  Git

GIT_LOCAL_S = 5                 # seconds for a command that stays on this machine
GIT_AT_ONCE = 8                 # processes of git at a time: more only wait for the disk and each other


class Git:
    """git in one directory.  Nothing else in this file starts it.

    One environment (no prompt, no pager, no hooks, no signing, no locale, nothing inherited that names
    another repository), bytes in and out, one error.
    """

    SETTINGS = ("-c", "core.hooksPath=/dev/null", "-c", "commit.gpgsign=false", "-c", "core.fsmonitor=false",
                "-c", "gc.auto=0", "-c", "maintenance.auto=false")      # when to repack is the user's affair
    ALONE = {**{f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in (
        ("NAME", "Thrum"), ("EMAIL", "thrum@local"))}, "GIT_OPTIONAL_LOCKS": "0", "GIT_LITERAL_PATHSPECS": "1", "LC_ALL": "C"}
    # A partial clone would fetch what it lacks, with the user's programs; before git 2.44 only refusing all transports stops that.
    OFFLINE = {"GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": ""}

    def __init__(self, directory: str):
        self.directory = directory

    def run(self, *args: str, input: bytes = b"", timeout_s: float = GIT_LOCAL_S, check: bool = True, statuses: tuple = (0,),
            environ: dict | None = None, as_user: bool = False, online: bool = False) -> bytes:
        """What git prints.  Raises GitError when it fails (unless `check` is False: then b""), is missing or too slow.

        Any of `statuses` is success.  `environ` comes on top; `as_user` leaves the user's hooks and settings in force, for
        what they asked for: what git prints then may be in their language, and their hooks inherit what is set here.  That, and
        `online`, lets a partial clone fetch what it lacks.
        """
        variables = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        variables.update({} if as_user else self.ALONE, **{} if as_user or online else self.OFFLINE)
        variables.update(GIT_TERMINAL_PROMPT="0", **environ or {})
        command = next((word for word in args if word[0] != "-" and "=" not in word), "")
        try:
            with subprocess.Popen(["git", *(() if as_user else self.SETTINGS), *args], cwd=self.directory, env=variables,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
                try:
                    out, err = process.communicate(input, timeout_s)
                except BaseException:
                    kill_group(process.pid)     # git's own children too: a filter, a hook
                    raise
        except FileNotFoundError as error:
            if error.filename == "git":
                raise GitError("git was not found; install it, or put it on the PATH") from None
            raise GitError(f"cannot run git in {self.directory}: {error.strerror}") from None
        except NotADirectoryError:
            raise GitError(f"cannot run git in {self.directory}: not a directory") from None
        except subprocess.TimeoutExpired:
            raise GitError(f"git {command} took longer than {timeout_s:g} s") from None
        if process.returncode not in statuses:
            if not check:
                return b""
            reason = [line for line in err.decode(errors="replace").splitlines() if line and not line.startswith("hint:")] \
                or [f"exit status {process.returncode}"]
            raise GitError(f"git {command} failed: {reason[-1]}")
        return out


def kill_group(pid: int) -> None:
    """End a process that leads a group, and all that it has started; they may have gone already."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError:
        pass


def together(jobs: list) -> list:
    """What each of some functions without arguments returns, in their order; they run side by side.  Raises what the first raises."""
    if len(jobs) < 2:
        return [job() for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(min(len(jobs), GIT_AT_ONCE), "thrum-git") as threads:
        return [outcome.result() for outcome in [threads.submit(job) for job in jobs]]


# ================================================================== 7  Identity
#
# An identity file, `identities/<name>.json`, says who works in a worktree.  The reference writes the keys under
# `agent` capitalised and reads any case, so both are read here and the capitalised form is written.  Unknown keys
# survive.  Of several files the one for this worktree counts, of several of those the latest.

IDENTITY_VERSION = 3
IDENTITY_MAX = 65_536           # bytes; a file that is larger is not one of ours
USER_MAX = 32                   # characters of a user name, as in the reference
IDENTITIES_MAX = 64             # files that are read: one worktree, a handful of agents


def normalize_origin(url: str) -> str:
    """The origin URL as all machines spell it, "" when there is none (storage contract, section 4.2).

    Odd cases are kept odd on purpose: the ids made from it must match those of the reference.
    """
    url = url.strip()
    if not url:
        return ""
    if url.startswith("git@"):
        host, _, path = url[4:].partition(":")
        return f"https://{host}/{path[:-4] if path.endswith('.git') else path}"
    scheme, separator, rest = url.partition("://")
    if not separator:
        # Go's url.Parse: `host.tld:path` has a scheme and an opaque part, `user@host:path` is an error
        head = url.split("/")[0].split(":")[0]
        if ":" in url.split("/")[0]:
            return "https://" if head[:1].isalpha() and all(c.isalnum() or c in "+-." for c in head) else ""
        host, path = "", url.split("?")[0].split("#")[0]
    else:
        rest = rest.split("#")[0].split("?")[0]
        host, slash, path = rest.partition("/")
        host, path = host.rpartition("@")[2].lower(), slash + path
        port = host.rpartition("]")[2].rpartition(":")[2] if ":" in host.rpartition("]")[2] else ""
        if port and not port.isdigit():
            return ""
    if not re.fullmatch(r"(?:[^%]|%[0-9A-Fa-f]{2})*", path):
        return ""
    path = re.sub(rb"%(..)", lambda m: bytes([int(m[1], 16)]), os.fsencode(path)).decode(errors="surrogateescape")
    return f"https://{host}{path[:-4] if path.endswith('.git') else path}"


def repo_id_of(text: str) -> str:
    """`r_` and 12 characters of the hash of a normalised origin URL, or of a root commit."""
    return "r_" + hash32(text)[:12]


def read_repo_id(git: Git) -> str:
    """The repository's id: of its origin, else of its root commit, else ""."""
    origin = normalize_origin(git.run("remote", "get-url", "origin", check=False).decode(errors="replace"))
    if origin:
        return repo_id_of(origin)
    roots = git.run("rev-list", "--max-parents=0", "HEAD", check=False).split()
    return repo_id_of(roots[-1].decode()) if roots else ""


def unnamed_agent_id(repo_id: str, role: str, module: str) -> str:
    """The id of an agent without a name: `{role}_{hash}`."""
    return f"{role}_{hash32(f'{repo_id}|{role}|{module}')[:10].lower()}"


def user_name_from_git(name: str) -> str:
    """The user name for somebody called `name` in git: `Jürgen Doe` is `jurgen-doe`; at most USER_MAX characters."""
    bare = unicodedata.normalize("NFKD", name.casefold()).encode("ascii", "ignore").decode()
    kept = "".join("-" if c in " -_" else c for c in bare if c.isalnum() or c in " -_")
    return kept[:USER_MAX].strip("-") or "user"


class Identity(Record):
    """Who works in a worktree: the content of an identity file."""

    name: str = ""
    role: str = ""
    module: str = ""
    display: str = ""
    kind: str = "agent"
    file: str = ""              # the file's name, "" when there was none
    data: dict = {}             # everything in the file

    def agent_id(self) -> str:
        return self.name or unnamed_agent_id(self.data.get("repo_id") or "", self.role, self.module)


def parse_identity(file: str, content: bytes) -> Identity:
    """The identity in a file's bytes.  Raises NoIdentity naming the file and what is wrong."""
    try:
        if len(content) > IDENTITY_MAX:
            raise ValueError(f"larger than {IDENTITY_MAX:,} bytes")
        data = decode_object(content)
        agent = data.get("agent")
        if not isinstance(agent, dict):
            raise ValueError("no object 'agent'")
        values = {key.lower(): value for key, value in agent.items()}
        fields = {}
        for key in ("name", "role", "module", "display", "kind"):
            value = values.get(key) or ""
            if not isinstance(value, str) or (value and not value.isprintable()):
                raise ValueError(f"agent.{key} is not a text")
            fields[key] = value
        if fields["name"] and ":" not in fields["name"]:
            file_stem(fields["name"])
        if not isinstance(data.get("repo_id", ""), str):
            raise ValueError("repo_id is not a text")
    except ValueError as error:
        raise NoIdentity(f"identity file {file} is damaged ({error}); correct or remove it, then run "
                         "'thrum quickstart --name <name> --role <role> --module <module>'") from None
    fields["kind"] = fields["kind"] or "agent"
    return Identity(**fields, file=file, data=data)


def read_identities(local):
    """The identity files below a `.thrum`, as pairs of name and bytes.  (The launcher carries this function.)"""
    files = []
    try:
        names = sorted(os.listdir(local + "/identities"))
    except OSError:
        names = ()
    for name in names:
        if name.endswith(".json") and name[0] != "." and len(files) < 64:       # IDENTITIES_MAX
            try:                # non-blocking: a FIFO of that name must stop nobody
                descriptor = os.open(local + "/identities/" + name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    files.append((name, os.read(descriptor, 65537)))            # IDENTITY_MAX, and one more
                finally:
                    os.close(descriptor)
            except OSError:
                pass            # a folder, or a link that leads nowhere
    return files


def render_identity(identity: Identity, stamp: str, **changes) -> bytes:
    """The bytes of an identity file; `changes` are keys of its top level, None removes one."""
    data = dict(identity.data)
    old = data.get("agent")
    agent = {k: v for k, v in (old if isinstance(old, dict) else {}).items()
             if k.lower() not in ("kind", "name", "role", "module", "display")}
    agent.update(Kind=identity.kind, Name=identity.name, Role=identity.role, Module=identity.module,
                 Display=identity.display)
    version = data.get("version")
    data.update(agent=agent, updated_at=stamp,
                version=max(version if type(version) is int else 0, IDENTITY_VERSION), **changes)
    data = {key: value for key, value in data.items() if value is not None}
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def choose_identity(files: list, environ: dict, worktree: str) -> Identity:
    """The identity that counts among `files` (pairs of name and bytes), before any override.

    Raises NoIdentity when THRUM_NAME has no file, a file is damaged, or none can be chosen; gives an empty
    Identity when there is no file at all.
    """
    wanted = environ.get("THRUM_NAME", "").strip()
    if wanted:
        try:
            check_name(wanted)
        except InvalidParams as error:
            raise NoIdentity(f"invalid THRUM_NAME: {error}") from None
        for file, content in files:
            if file == wanted + ".json":
                return parse_identity(file, content)
        raise NoIdentity(f"THRUM_NAME is '{wanted}', but this worktree has no identity of that name; run "
                         f"'thrum quickstart --name {wanted} --role <role> --module <module>'")
    found = [parse_identity(file, content) for file, content in files]
    if len(found) > 1:
        here = [identity for identity in found if identity.data.get("worktree") == worktree]
        if not here:
            names = ", ".join(sorted(identity.agent_id() for identity in found))
            raise NoIdentity(f"cannot auto-select identity: {len(found)} identity files found in "
                             f".thrum/identities/; set THRUM_NAME to one of: {names}")
        found = [max(here, key=lambda identity: str(identity.data.get("updated_at")))]
    return found[0] if found else Identity()


REGISTER_HINT = "register with 'thrum quickstart --name <name> --role <role> --module <module>'"


def resolve_caller(files: list, environ: dict, worktree: str, role: str = "", module: str = "") -> Identity:
    """Who is calling: the identity in effect after environment and flags.  Raises NoIdentity.

    With THRUM_AGENT_ID that id is taken as it is, and nothing has to exist here.
    """
    fixed = environ.get("THRUM_AGENT_ID", "").strip()
    if fixed:
        file_stem_or_refuse(fixed)
        return Identity(name=fixed, role=role or environ.get("THRUM_ROLE", ""),
                        module=module or environ.get("THRUM_MODULE", ""))
    identity = choose_identity(files, environ, worktree)
    merged = Identity(
        identity.name, role or environ.get("THRUM_ROLE", "") or identity.role,
        module or environ.get("THRUM_MODULE", "") or identity.module,
        environ.get("THRUM_DISPLAY", "") or identity.display, identity.kind, identity.file, identity.data)
    if not merged.name and not merged.role and not merged.module:
        raise NoIdentity(f"no agent identities registered in this worktree; {REGISTER_HINT}")
    for field in ("role", "module"):
        if not getattr(merged, field):
            raise NoIdentity(f"{field} not specified: set THRUM_{field.upper()}, use --{field}, or {REGISTER_HINT}")
    return merged


def file_stem_or_refuse(agent_id: str) -> None:
    try:
        file_stem(agent_id)
    except ValueError:
        raise NoIdentity(f"THRUM_AGENT_ID {agent_id[:80]!r} is not an agent id") from None


# ================================================================== 8  Journal
#
# The journal holds every event in the order in which this daemon accepted it.  A file of it is
#
#     {"epoch":"<16 hex>","first":<n>,"v":1}        and its name is <n>.jsonl
#     <event n>
#     <event n+1> …
#
# so an event's sequence is the file's `first` and the number of lines between.  A new epoch means that the
# sequences of before are no longer valid.  Lines are appended whole and synced before anybody is told, hence a
# crash leaves at most an unfinished last line that nobody was promised; it is cut off and set aside.  A line that
# is damaged later keeps its number, so that all others keep theirs.
# A line that was removed on purpose (purge) is left empty.
#
# The branch files hold the same lines for the exchange with other machines, one file per author and one for
# everything else.  They are written without sync, can be completed from the journal, and the journal can be
# made anew from them.

JOURNAL_FILE_MAX = 8 << 20      # bytes: the last file is read whole at each start
BRANCH_FILE_MAX = 256 << 10     # bytes: each commit stores a changed file whole
BAD_LINES_MAX = 4 << 20         # bytes of damaged lines kept for a look
MARK_EVERY = 256                # lines between two of which a reader remembers where they are: it reads at most so many in vain


def read_lines(path: str, offset: int = 0):
    """The complete lines of a file, without their newline; a line is held whole, however long."""
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if line.endswith(b"\n"):
                yield line[:-1]


def parse_line(line: bytes) -> tuple:
    """The event in a line of the log and its time in ns.  Raises ValueError with the reason."""
    event = decode_object(line)
    return event, check_event(event)


def read_log(path: str):
    """The events of a log, without a daemon: of one file, or of all files below a directory.

    Damaged lines are left out, and so are events that another file held already.  The order is that of the
    files by name, not of time.

    >>> for event in read_log(".git/thrum-sync/a-sync"):            # doctest: +SKIP
    ...     print(event["timestamp"], event["type"])
    """
    seen = set()
    for file in log_files(path) if os.path.isdir(path) else [path]:
        for line in read_lines(file):
            try:
                event, _ = parse_line(line)
            except ValueError:
                continue
            if event["event_id"] not in seen:
                seen.add(event["event_id"])
                yield event


def log_files(directory: str) -> list:
    """The regular `.jsonl` files below a journal or a sync worktree; links are not followed."""
    found = []
    for folder in (directory, directory + "/messages"):
        try:
            with os.scandir(folder) as entries:
                found += sorted(e.path for e in entries if e.name.endswith(".jsonl") and e.is_file(follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            pass
    return found


class BadLines:
    """The side file for lines that cannot be read: kept for a person to look at, never counted on."""

    def __init__(self, path: str):
        self.path = path
        self.count = 0

    def add(self, source: str, line: bytes, reason: str) -> None:
        self.count += 1
        entry = canonical({"file": source, "reason": reason[:200], "line": line[:LINE_MAX].decode(errors="replace")})
        try:
            with open(self.path, "ab") as file:
                if file.tell() < BAD_LINES_MAX:
                    file.write(entry + b"\n")
        except OSError:
            pass                # the line is still in its own file


class Journal:
    """The append-only log of one daemon.  Only the holder of the daemon's lock opens it."""

    def __init__(self, directory: str, world: World, bad_lines: BadLines):
        self.directory = directory
        self.world = world
        self.bad_lines = bad_lines
        self.epoch = ""
        self.last = 0           # sequence of the last event, 0 in an empty journal
        self.size = 0           # bytes in the current file
        self.mended = False     # whether events are, or may be, missing
        self._descriptor = -1

    def open(self) -> bool:
        """Open for appending, mending a torn tail.  False when there is no journal, or none that can be trusted."""
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        firsts = self.firsts()
        if not firsts:
            return False
        try:
            headers = [self._header(first) for first in firsts]
        except ValueError:
            return False
        if firsts[0] != 1:      # the beginning is missing, but the branch files have it
            return False
        self.epoch = headers[-1]["epoch"]
        path = self._path(firsts[-1])
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        with open(path, "rb") as file:
            data = file.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            self.mended = True
            self.bad_lines.add(path, data[end:], "torn at the end of the file")
            os.ftruncate(self._descriptor, end)
            durable_sync(self._descriptor)
        self.size = end
        self.last = firsts[-1] + data.count(b"\n") - 2
        return True

    def create(self, first: int = 1) -> None:
        """Begin a file; without any before it, also a new epoch."""
        if not self.epoch:
            self.epoch = self.world.random(8).hex()
            self.last = first - 1
        header = canonical({"epoch": self.epoch, "first": first, "v": 1}) + b"\n"
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        atomic_write(self._path(first), header)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = os.open(self._path(first), os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        self.size = len(header)

    def append(self, lines: list) -> None:
        """Append lines and wait until they are on the medium.  On an error nothing of them remains."""
        if self.size > JOURNAL_FILE_MAX:
            self.create(self.last + 1)
        data = b"\n".join(lines) + b"\n"
        present = os.fstat(self._descriptor).st_size
        if present < self.size:
            raise OSError(errno.EIO, "somebody cut the journal; 'thrum daemon restart' mends it", self.directory)
        if present > self.size:         # what a failed append could not take back
            os.ftruncate(self._descriptor, self.size)
        try:
            write_all(self._descriptor, data)
            durable_sync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, self.size)
            raise
        self.size += len(data)
        self.last += len(lines)

    def take_back(self, lines: list) -> None:
        """Undo the last append: the database could not be brought to the same state."""
        size = self.size - sum(map(len, lines)) - len(lines)
        os.ftruncate(self._descriptor, size)
        self.size = size
        self.last -= len(lines)
        durable_sync(self._descriptor)

    def read(self, after: int = 0):
        """Pairs of sequence and line for all events later than `after`, damaged ones included."""
        firsts = self.firsts()
        for index, first in enumerate(firsts):
            if index + 1 < len(firsts) and firsts[index + 1] <= after + 1:
                continue
            lines = read_lines(self._path(first))
            next(lines, None)   # the header
            sequence = first - 1
            for sequence, line in enumerate(lines, first):
                if sequence > after:
                    yield sequence, line
            if index + 1 < len(firsts) and sequence + 1 != firsts[index + 1]:
                self.mended = True      # a file between is missing, or this one was cut

    def rewrite(self, first: int, change) -> None:
        """Replace the lines of one file by what `change(lines)` makes of them; an empty line keeps the place of a removed one."""
        path = self._path(first)
        if first == self.firsts()[-1]:      # what a failed append could not take back was promised to nobody
            os.ftruncate(self._descriptor, self.size)
        header, *lines = read_lines(path)
        changed = change(lines)
        if changed == lines:
            return
        if first < self.firsts()[-1]:
            return atomic_write(path, b"\n".join([header, *changed, b""]))
        # What is appended from now on must go to the file that has the name, whatever fails: the new one is opened first.
        spare = f"{self.directory}/.{first}.new.tmp"
        atomic_write(spare, b"\n".join([header, *changed, b""]))
        descriptor = os.open(spare, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.rename(spare, path)
        except OSError:
            os.close(descriptor)
            remove(spare)
            raise
        os.close(self._descriptor)
        self._descriptor, self.size = descriptor, os.fstat(descriptor).st_size
        sync_directory(self.directory)

    def set_aside(self) -> None:
        """Move a journal that cannot be trusted out of the way; its readable lines are imported again."""
        aside = self.directory + ".damaged"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(self.directory, aside)
        self.mended = True

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def firsts(self) -> list:
        """The first sequence of each file."""
        names = (name[:-6] for name in os.listdir(self.directory) if name.endswith(".jsonl"))
        return sorted(int(name) for name in names if name.isdigit())

    def _path(self, first: int) -> str:
        return f"{self.directory}/{first}.jsonl"

    def _header(self, first: int) -> dict:
        with open(self._path(first), "rb") as file:
            line = file.readline(4096)
        if not line.endswith(b"\n"):
            raise ValueError(f"{self._path(first)} has no complete line")
        header = decode_object(line)
        if header.get("first") != first or type(header.get("epoch")) is not str:
            raise ValueError(f"{self._path(first)} has no valid first line")
        return header


class History:
    """A journal as other threads read it than the one that writes it.

    A file only grows, or gives way to one with the same numbers in which some lines are empty.  So a place that is remembered
    is right for as long as the same line is found there.
    """

    def __init__(self, journal: Journal):
        self.journal = journal
        self._marks = {}        # sequence -> (offset in its file, hash of its line)

    def read(self, after: int, last: int):
        """Pairs of sequence and line for the events later than `after`, up to `last`, which must have been reached before."""
        firsts = self.journal.firsts()
        for first, following in zip(firsts, [*firsts[1:], FAR]):
            if following <= after + 1:
                continue
            if first > last:
                return
            with open(self.journal._path(first), "rb") as file:
                sequence = self._seek(file, first, after + 1)
                offset = file.tell()
                for line in file:
                    if sequence > last:
                        return
                    if sequence % MARK_EVERY == 0 and len(line) > 1:
                        self._marks[sequence] = offset, hash(line)
                    if sequence > after:
                        yield sequence, line[:-1]
                    sequence, offset = sequence + 1, offset + len(line)

    def _seek(self, file, first: int, wanted: int) -> int:
        """Go to the last place that is known at or before an event in a file; the sequence of the line there."""
        for sequence in range(wanted - wanted % MARK_EVERY, first, -MARK_EVERY):
            offset, mark = self._marks.get(sequence, (0, 0))
            if offset:
                file.seek(offset)
                if hash(file.readline()) == mark:
                    file.seek(offset)
                    return sequence
        file.seek(0)
        file.readline()         # the header
        return first


def stem_of(event: dict, author: str | None) -> str:
    """The stem of the branch file for an event; `author` is who wrote the message that it is about."""
    kind = EVENTS.get(event["type"])
    try:
        return "messages/" + file_stem(author) if kind and kind.file == "author" and author else "events"
    except ValueError:
        return "events"


class Branch:
    """The files of the branch `a-sync`, below the sync worktree."""

    def __init__(self, root: str):
        self.root = root
        self._open = {}         # stem -> (number, size) of the file that is appended to
        self.dirty = set()     # paths written since the last sync

    def append(self, items) -> None:
        """Append (stem, line) pairs: complete lines, in order, not synced.  See `stem_of`."""
        by_stem = {}
        for stem, line in items:
            by_stem.setdefault(stem, []).append(line)
        for stem, lines in by_stem.items():
            number, size = self._open.get(stem) or self._last(stem)
            data = b"\n".join(lines) + b"\n"
            if size and size + len(data) > BRANCH_FILE_MAX:
                number, size = number + 1, 0
            path = self.path(stem, number)
            self._open.pop(stem, None)      # whatever happens now, look again next time
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                end = os.fstat(descriptor).st_size
                if end and os.pread(descriptor, 1, end - 1) != b"\n":
                    data = b"\n" + data     # a torn line must not swallow this one
                write_all(descriptor, data)
            finally:
                os.close(descriptor)
            self.dirty.add(path)
            self._open[stem] = number, end + len(data)

    def sync(self) -> None:
        """Make everything appended so far durable."""
        for path in sorted(self.dirty):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                durable_sync(descriptor)
            finally:
                os.close(descriptor)
        for folder in {os.path.dirname(path) for path in self.dirty}:
            sync_directory(folder)
        self.dirty.clear()

    def rewrite(self, path: str, change) -> None:
        """Replace the lines of a file by what `change(lines)` makes of them; without any line the file goes."""
        lines = list(read_lines(path))
        changed = [line for line in change(lines) if line]
        if changed != lines:
            self._open.clear()
            self.dirty.discard(path)
            stem, _, number = path[:-6].rpartition(".")
            followed = os.path.exists(f"{stem}.{int(number) + 1}.jsonl" if number.isdigit() else f"{path[:-6]}.2.jsonl")
            if changed or followed or path == self.path("events"):     # a gap would hide the files after it
                atomic_write(path, b"".join(line + b"\n" for line in changed))
            else:
                os.unlink(path)

    def measure(self) -> dict:
        """The files there are, and their bytes."""
        return {path[len(self.root) + 1:]: os.stat(path).st_size for path in log_files(self.root)}

    def path(self, stem: str, number: int = 1) -> str:
        """The path of the `number`-th file of a stem; no agent name has a dot, so none collides."""
        if number == 1:
            return f"{self.root}/{stem}.jsonl"
        return f"{self.root}/{'messages/events.log' if stem == 'events' else stem}.{number}.jsonl"

    def files(self, stem: str) -> list:
        """The existing files of a stem."""
        paths = []
        while os.path.isfile(self.path(stem, len(paths) + 1)):
            paths.append(self.path(stem, len(paths) + 1))
        return paths

    def _last(self, stem: str) -> tuple:
        files = self.files(stem)
        return (len(files), os.stat(files[-1]).st_size) if files else (1, 0)


# ================================================================== 9  Store
#
# The projection of the log.  What it holds is a function of the *set* of events: they may come in any order and
# any number of times.  Where two events disagree, the one with the greater (time, event id) wins, except that the
# first deletion, reading, creation and end of a thing count.  What needs a parent that has not come waits in `pending`.
#
# A message is known by `seq`, its number in the journal; lists are ordered by `at`, its time in ns.  Agents
# have small integer keys, because most rows are deliveries.  `delivered` (who got it) and `listed` (whom the event
# names) hold such keys as text; `wide` is 2 for a message to everybody, 1 for one to groups, roles or names that the
# list may lack, 0 for one that goes exactly to the list.
# A claim is `open` until it is released or its session ends: 1, or 2 when its time has passed here and its own machine
# has not said so.  `expires_at` is this machine's: it counts from when it has learned of the grant or renewal.
# What is of this machine alone is no event, is not rebuilt, and may be lost with the database: signs of life, what git says, how far
# clients of thread streams have acknowledged, and what was reported of tasks and processes.
# Page and counts of an inbox cost the same at a thousand and at a million messages: the rows of one agent lie
# together, an index holds only the unread, and the counts are kept with the agent.

SCHEMA_VERSION = 4
STORE_BATCH = 400               # events in a transaction of a rebuild; larger ones were slower
REPLIES_MAX = 1_000             # answers kept for clients that ask again: more than run at once
BUSY_S = 5                      # seconds for another connection to let go of the database
QUERY_S = 10                    # seconds for one query; then it is interrupted
SHRINK_MAX = 32 << 20           # bytes that are written anew at once: others wait half a second
REMOVED_MAX = 100_000           # removed messages and sessions that are remembered, because others may still write about them
PRESENCE_GAP_S = 300            # seconds between two signs of life within which an agent counts as here: a long tool call
PRESENCE_MAX = 64               # stretches of presence kept for an agent: more than a week of breaks
WORK_STALE_S = 24 * 3600        # seconds after which git facts without a commit of their own say nothing any more
WORK_ENDED_S = 7 * 24 * 3600    # seconds for which the work of a session is kept after its end
# What git says of somebody's work, and when it was asked.
WORK_FACTS = ("branch", "worktree_path", "unmerged_commits", "uncommitted_files", "changed_files", "file_changes", "git_updated_at")
SEARCH_TOTAL_MAX = 1_000        # hits that are counted and ranked, the newest: who gets more asks again with more words
ASKS = """instr(refs, '"type":"ask"')"""        # SQL: whether a message is a question, see `kind_of`
STREAM_ACKS_MAX = 10_000        # acknowledgements kept, the youngest: of clients that do not come again nobody tells us
TASKS_MAX = 1_000               # tasks that are known, the last reported ones
TASK_EVENTS_MAX = 1_000         # events kept of a task, the last: as many as a replay gives
TASK_ROWS_MAX = 50_000          # events kept of all tasks: some 100 MB if all of them hold what a tool has said
REPORTS_S = 7 * 24 * 3600       # seconds after its last report for which a task or a process is known
TELEMETRY_SLOT_S = 30           # seconds of which one report of a process is kept, the last
TELEMETRY_SLOTS = 120           # of them: an hour, as the page draws it
TELEMETRY_MAX = 20_000          # reports that are kept of all processes, the last

SCHEMA = """
create table schema_version(version integer not null, applied_at text not null);
create table meta(key text primary key, value) without rowid;
create table reached(one integer primary key check (one = 1), seq integer, event_id text, newest integer);
insert into reached values(1, 0, '', 0);
create table events(event_id text primary key, seq integer not null) without rowid;
create table agents(
    agent integer primary key, agent_id text not null unique, kind text, role text, module text, name text,
    display text, hostname text, worktree text, daemon text, registered_at integer, register_event text,
    removed_at integer not null default 0, last_seen_at integer not null default 0,
    inbox_total integer not null default 0, inbox_unread integer not null default 0);
create table presence(
    agent integer not null, began integer not null, ended integer not null, primary key(agent, began)) without rowid;
create table roster(
    agent integer not null, at integer not null, event_id text not null, role text,
    primary key(agent, at, event_id)) without rowid;
create table sessions(
    session_id text primary key, agent integer not null, started_at integer not null, ended_at integer,
    end_reason text, end_event text, last_seen_at integer not null, daemon text, scopes_at integer not null default 0,
    refs_at integer not null default 0, updates integer not null default 0);
create index sessions_of on sessions(agent, started_at);
create table session_scopes(
    session_id text, scope_type text, scope_value text, primary key(session_id, scope_type, scope_value)) without rowid;
create table session_refs(
    session_id text, ref_type text, ref_value text, primary key(session_id, ref_type, ref_value)) without rowid;
create table agent_work_contexts(
    session_id text primary key, agent integer not null, branch text, worktree_path text, unmerged_commits text,
    uncommitted_files text, changed_files text, file_changes text, git_updated_at text, current_task text,
    task_updated_at text, intent text, intent_updated_at text) without rowid;
create index agent_work_contexts_of on agent_work_contexts(agent);
create table messages(
    seq integer primary key, message_id text not null unique, at integer not null, author integer not null,
    session_id text, thread_id text, given_thread text, reply_to text, format text not null, content text not null, structured text,
    scopes text, refs text, listed text not null, delivered text not null, wide integer not null,
    unread_by integer not null,
    updated_at integer, edit_event text, deleted_at integer, delete_reason text, delete_event text,
    authored_by text, disclosed integer, send_key text, daemon text);
create index messages_at on messages(at);
create index messages_author on messages(author, at, unread_by);
create index messages_thread on messages(thread_id, at) where thread_id is not null;
create index messages_stream on messages(thread_id, seq, deleted_at) where thread_id is not null;
create index messages_asks on messages(thread_id, seq) where instr(refs, '"type":"ask"');
create index messages_deleted on messages(author) where deleted_at is not null;
create index messages_reply on messages(reply_to) where reply_to is not null;
create table removed(number integer primary key, id text not null unique);
create index messages_key on messages(send_key) where send_key is not null;
create index messages_wide on messages(wide, at) where wide;
create table message_scopes(
    scope_type text, scope_value text, at integer, seq integer,
    primary key(scope_type, scope_value, at, seq)) without rowid;
create table message_refs(
    ref_type text, ref_value text, at integer, seq integer, primary key(ref_type, ref_value, at, seq)) without rowid;
create table message_edits(
    seq integer, at integer, event_id text, editor text, format text, content text, structured text,
    primary key(seq, at, event_id)) without rowid;
create table deliveries(
    agent integer, at integer, seq integer, read_at integer, seen_at integer, hidden integer not null default 0,
    pushed_at integer, route text, primary key(agent, at, seq)) without rowid;
create index deliveries_unread on deliveries(agent, at, seq) where read_at is null and not hidden;
create view message_reads as
    select m.message_id, a.agent_id, d.read_at from deliveries d join messages m on m.seq = d.seq
    join agents a on a.agent = d.agent where d.read_at is not null;
create table threads(
    thread_id text primary key, title text, created_by text, created_at integer, create_event text) without rowid;
create table thread_aliases(thread_id text primary key, into_id text not null, given integer not null) without rowid;
create index thread_aliases_into on thread_aliases(into_id);
create table groups(
    group_id text primary key, name text, description text, created_by text, created_at integer, create_event text,
    deleted_at integer);
create index groups_name on groups(name);
create table group_updates(
    group_id text, field text, at integer, event_id text, value text,
    primary key(group_id, field, at, event_id)) without rowid;
create index group_updates_value on group_updates(value) where field = 'name';
create table group_members(
    group_id text, member_type text, member_value text, at integer, event_id text, present integer, by text,
    primary key(group_id, member_type, member_value, at, event_id)) without rowid;
create table claims(
    claim_id text primary key, agent integer not null, session_id text, path text not null, shared integer not null,
    granted_at integer not null, grant_event text not null, ttl_s integer not null, note text, renewed_at integer not null,
    renew_event text not null, expires_at integer not null, daemon text, released_at integer, release_event text,
    release_reason text, superseded_by text, open integer not null default 1) without rowid;
create index claims_open on claims(open) where open;
create index claims_session on claims(session_id);
create index claims_fence on claims(grant_event);
create table claim_lapses(claim_id text, renewal text, primary key(claim_id, renewal)) without rowid;
create table subscriptions(
    id integer primary key, session_id text not null, agent integer not null, scope_type text, scope_value text, mention_role text,
    everything integer not null, topics text not null, created_at integer not null, removed integer not null);
create index subscriptions_of on subscriptions(session_id);
create table replies(id integer primary key, key text not null unique, reply text not null);
create table stream_acks(
    instance_id text, thread_id text, seq integer not null, at integer not null, primary key(instance_id, thread_id)) without rowid;
create index stream_acks_at on stream_acks(at);
create table tasks(
    task_id text primary key, thread_id text, agent_id text, workspace text, directive text, source_type text, status text,
    tool_name text, turns integer not null, tokens_in integer not null, tokens_out integer not null, cost real not null,
    duration_sec integer not null, events integer not null, started_at integer not null, updated_at integer not null);
create index tasks_updated on tasks(updated_at);
create table task_events(
    id integer primary key, task_id text not null, event_seq integer not null, at integer not null, turn_num integer,
    stream_type text not null, data text not null, unique(task_id, event_seq));
create table telemetry(
    instance_id text, slot integer, at integer not null, data text not null, primary key(instance_id, slot)) without rowid;
create index telemetry_at on telemetry(at);
create table pending(parent text, event_id text, line text, primary key(parent, event_id)) without rowid;
"""


def _keys(text: str) -> list:
    """The agent keys in a text such as `3,17`."""
    return [int(key) for key in text.split(",")] if text else []


def _text(keys) -> str:
    return ",".join(map(str, sorted(keys)))


def parents_of(event: dict) -> list:
    """The messages, sessions or claims that an event hangs on; [] for one that stands alone."""
    if event["type"] == "agent.update":
        contexts = event.get("work_contexts")
        found = [context.get("session_id") for context in contexts if type(context) is dict] if type(contexts) is list else []
    else:
        found = [event.get("claim_id") or event.get("message_id") or event.get("session_id")]
    return [parent for parent in found if type(parent) is str]


def _index_text(content: str) -> str:
    """What the full-text index gets to see of a message."""
    return " ".join([word for _, word in words_of(content)])


def pairs_of(value) -> list:
    """The (type, value) tuples of a list of scopes or references, without repetitions, in order."""
    if not value:
        return []
    return list(dict.fromkeys([(pair["type"], pair["value"]) for pair in value]))


def pair_dicts(pairs) -> list:
    """What `pairs_of` was given: each of some (type, value) tuples once, as events and callers write them."""
    return [{"type": kind, "value": value} for kind, value in dict.fromkeys(pairs)]


def thread_of(message_id: str) -> str:
    """The thread that a reply to a message opens, if it has none: the same on all machines."""
    return "thr_" + (message_id[4:] if message_id.startswith("msg_") else message_id)


def audience_of(refs: list, scopes: list) -> tuple:
    """Whom a message with these pairs names: the mentioned and the groups, both in order; neither means everybody."""
    groups = [value for kind, value in refs if kind == "group"]
    groups += [value for kind, value in scopes if kind == "group" and value not in groups]
    return [value for kind, value in refs if kind == "mention"], groups


def kind_of(author: str, refs: list, asker: str) -> str:
    """What a message is for thread streams.  `asker` wrote the question that it replies to, "" when that is none.

    A question has a reference of type `ask`; an answer is what somebody else replies to it.
    """
    if any(kind == "ask" for kind, _ in refs):
        return "question"
    if asker not in ("", author):
        return "result"
    return "directive" if author.startswith("user:") else "status"


def stored_pairs(row: dict) -> tuple:
    """The references and the scopes in a row of `messages`, as `pairs_of` gives them."""
    return pairs_of(json.loads(row["refs"] or "[]")), pairs_of(json.loads(row["scopes"] or "[]"))


class Store:
    """A connection to the projection, and every question that is asked of it."""

    def __init__(self, path: str, world: World, *, writable: bool = False, own: str = ""):
        self.path = path
        self.world = world
        self.own = own          # the daemon whose events were made here
        self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_S,
                                  cached_statements=256)
        try:
            self.db.execute("pragma journal_mode=wal")
            # The journal is what is durable; the database only must not be torn, which WAL with NORMAL ensures.
            self.db.execute("pragma synchronous=normal")
            self.db.execute("pragma temp_store=memory")
            if writable:        # what is deleted is gone from the file, too
                self.db.execute("pragma secure_delete=on")
            self.db.execute(f"pragma query_only={0 if writable else 1}")
        except sqlite3.Error:
            self.db.close()
            raise
        self._deadline = FAR
        self._full_text = None  # whether there is FTS5; None: not tried yet
        self.untidy = False     # whether something was removed whose bytes are still to be freed
        self.watch()
        self._late = FAR        # the earliest change of roster or groups that came after younger messages
        self.joined = set()     # threads that were one and the other, and are one now, since the ledger has cleared it
        self.forget()

    def watch(self) -> None:
        """Look at the time now and then, as `limit` wants it."""
        self.db.set_progress_handler(self._late_query, 20_000)

    def meanwhile(self, progress) -> None:
        """Call `progress()` now and then while a query runs, instead of limiting its time."""
        def still() -> bool:
            progress()
            return False
        self.db.set_progress_handler(still, 5_000_000)

    def limit(self, seconds: float) -> None:
        """Interrupt whatever runs longer than that from now on."""
        self._deadline = self.world.monotonic() + seconds

    def _late_query(self) -> bool:
        return self.world.monotonic() > self._deadline

    def forget(self) -> None:
        """Drop what is remembered of the tables, and what was to be written to them, after a rollback."""
        self._known = {}        # agent id -> (key, removed_at)
        self._names = {}        # key -> agent id
        self._expanded = {}     # group, role or everybody -> keys, for times after `_settled`
        self._settled = -1      # the latest change of roster or groups; -1: not read yet
        self._newest = -1       # the newest message
        self._cutoff = -1       # the purge cutoff
        self._pending = None    # whether anything waits for its parent; None: not read yet
        self._counts = {}       # key -> [change of inbox_total, change of inbox_unread], until `flush`
        self._seen = {}         # key -> last_seen_at, until `flush`
        self._last_seen = {}    # key -> a last_seen_at that was read before
        self._read_by = {}      # seq -> how many have read it now, until `flush`
        self._sessions = {}     # agent id -> its open session
        self._removals = None   # whether messages were removed for good; None: not read yet
        self._indexed = None    # the last message in the full-text index; None: not read yet
        self._rows = {sql: [] for sql in (_EVENT_ROW, _SCOPE_ROW, _REF_ROW, _DELIVERY_ROW)}     # until `flush`
        self._unwritten = set() # ids of messages whose rows are among them

    def close(self) -> None:
        self.db.close()

    def checkpoint(self) -> bool:
        """Move the write-ahead log into the database and empty it; False while a reader needs what is in it."""
        self.db.execute("pragma busy_timeout=0")        # nobody waits for a reader
        try:
            return self.db.execute("pragma wal_checkpoint(truncate)").fetchone()[0] == 0
        finally:
            self.db.execute(f"pragma busy_timeout={BUSY_S * 1000}")

    # ---- transactions

    def begin(self) -> None:
        self.db.execute("begin immediate")

    def commit(self) -> None:
        self.db.execute("commit")

    def rollback(self) -> None:
        """Undo the transaction, if one is left: an error may have ended it."""
        if self.db.in_transaction:
            self.db.execute("rollback")
        self._late = FAR
        self.forget()

    def save_point(self) -> None:
        """Where `undo` goes back to; `keep` or `undo` ends it."""
        self.db.execute("savepoint request")

    def keep(self) -> None:
        self.flush()
        self.db.execute("release request")

    def undo(self) -> None:
        self.db.execute("rollback to request")
        self.db.execute("release request")
        self.forget()

    def write_rows(self) -> None:
        """Write the rows that nobody has asked for yet: many at once cost half."""
        for sql, rows in self._rows.items():
            if rows:
                self.db.executemany(sql, rows)
                rows.clear()
        self._unwritten.clear()

    def flush(self) -> None:
        """Write what waits: rows, and what was counted, once for many events that count for the same agents."""
        self.write_rows()
        by_change = {}
        for key, change in self._counts.items():
            by_change.setdefault(tuple(change), []).append(key)
        for change, keys in by_change.items():
            self.db.execute("update agents set inbox_total = inbox_total + ?, inbox_unread = inbox_unread + ? "
                            f"where agent in ({_text(keys)})", change)
        if self._seen:
            self.db.executemany("update agents set last_seen_at = max(last_seen_at, ?) where agent = ?",
                                [(ns, key) for key, ns in self._seen.items()])
        if self._read_by:
            self.db.executemany("update messages set unread_by = unread_by - ? where seq = ?",
                                [(count, seq) for seq, count in self._read_by.items()])
        self._counts, self._seen, self._read_by = {}, {}, {}

    def cutoff(self) -> int:
        """The time (ns) before which everything was purged."""
        if self._cutoff < 0:
            self._cutoff = self.meta("purge_cutoff", 0)
        return self._cutoff

    def removed_at(self, agent_id: str) -> int:
        """When an agent was last deleted (ns), 0 if never: the clock that said so may be ahead."""
        return self.value("select removed_at from agents where agent_id = ?", agent_id, default=0)

    def is_untidy(self) -> bool:
        """Whether files may hold events that were purged, archived or deleted."""
        return bool(self.meta("untidy", 0))

    def obsolete(self, events: list) -> set:
        """The ids of those of some events (at most STORE_BATCH) that are only about messages and sessions which were removed.

        What was never applied is none of them: it may have come from elsewhere, or be of a newer version.
        """
        known = self.known_events([event["event_id"] for event in events])
        about = {event["event_id"]: parents for event in events if event["event_id"] in known and (parents := parents_of(event))}
        ids = sorted({parent for parents in about.values() for parent in parents})
        left = set()
        for start in range(0, len(ids), STORE_BATCH):
            part = ids[start:start + STORE_BATCH]
            marks = ", ".join("?" * len(part))
            left.update(row[0] for row in self.db.execute(
                f"select message_id from messages where message_id in ({marks}) union all select session_id from sessions where "
                f"session_id in ({marks}) union all select claim_id from claims where claim_id in ({marks}) union all "
                f"select parent from pending where parent in ({marks})", part * 4))
        return {event_id for event_id, parents in about.items() if left.isdisjoint(parents)}

    def forget_events(self, event_ids) -> None:
        """Drop the ids of events that are no longer in the journal."""
        self.begin()
        self.db.executemany("delete from events where event_id = ?", [(event_id,) for event_id in event_ids])
        self.commit()

    def shrink(self) -> bool:
        """Give the space of removed rows back: True when what they held is no longer in any file.

        Where much is left the file is not written anew, which would take as long as there is data: SQLite has overwritten
        what was removed and uses the room again.  The full-text index is then built again, a little at a time.
        """
        self.db.execute("delete from removed where number <= (select max(number) from removed) - ?", (REMOVED_MAX,))
        pages, free = self.value("pragma page_count"), self.value("pragma freelist_count", default=0)
        small = (pages - free) * self.value("pragma page_size") < SHRINK_MAX
        if not small:
            self.begin()
            self._clear_index()
            self.commit()
        elif self.full_text():
            self.db.execute("insert into message_search(message_search) values('optimize')")
        if small:
            self.db.execute("vacuum")
        return self.checkpoint()

    def changes(self) -> int:
        """A number that rises with each row written."""
        return self.db.total_changes + len(self._rows[_EVENT_ROW])

    def careless(self, yes: bool) -> None:
        """Whether commits may be lost in a power cut: during a rebuild, which then starts over."""
        self.db.execute(f"pragma synchronous={'off' if yes else 'normal'}")

    def is_sound(self) -> bool:
        """Whether the tables are of this version and SQLite finds no damage in them; reads all pages."""
        return self.value("pragma quick_check(1)") == "ok" and self.is_current()

    def is_current(self) -> bool:
        return self.value("select version from schema_version") == SCHEMA_VERSION

    # ---- small questions

    def value(self, sql: str, *args, default=None):
        row = self.db.execute(sql, args).fetchone()
        return default if row is None or row[0] is None else row[0]

    def row(self, sql: str, *args) -> dict | None:
        cursor = self.db.execute(sql, args)
        row = cursor.fetchone()
        return None if row is None else dict(zip((c[0] for c in cursor.description), row))

    def rows(self, sql: str, *args) -> list:
        cursor = self.db.execute(sql, args)
        names = [c[0] for c in cursor.description]
        return [dict(zip(names, row)) for row in cursor]

    def meta(self, key: str, default=None):
        return self.value("select value from meta where key = ?", key, default=default)

    def reached(self) -> tuple:
        """How far the tables have got: the sequence, id of that event, and the newest time of this daemon's own (ns)."""
        return self.db.execute("select seq, event_id, newest from reached").fetchone()

    def set_reached(self, seq: int, event_id: str, newest: int) -> None:
        self.db.execute("update reached set seq = ?, event_id = ?, newest = ?", (seq, event_id, newest))

    def set_meta(self, **values) -> None:
        self.db.executemany("insert or replace into meta values(?, ?)", values.items())

    def within(self, seconds: float, question):
        """The result of `question()`, all of it on one snapshot, interrupted after `seconds`."""
        self._sessions.clear()  # the writer is another connection
        self._expanded.clear()
        self._settled = -1
        self.limit(seconds)
        self.db.execute("begin")
        try:
            return question()
        except sqlite3.OperationalError as error:
            if "interrupted" in str(error):
                raise ThrumError(f"the query took longer than {seconds:g} s; ask for less") from None
            raise
        finally:
            self.limit(FAR)
            self.db.execute("rollback")

    # ---- agents and sessions

    def agent(self, agent_id: str) -> dict | None:
        """The registered agent or user of that id."""
        return self.row("select * from agents where agent_id = ? and registered_at is not null", agent_id)

    def agents(self, role: str = "", module: str = "") -> list:
        """The registered agents and users, the newest registration first."""
        return self.rows("select * from agents where registered_at is not null and (? = '' or role = ?) and "
                         "(? = '' or module = ?) order by registered_at desc, agent_id", role, role, module, module)

    def agent_ids(self, keys) -> list:
        """The ids of agent keys, sorted."""
        unknown = [key for key in keys if key not in self._names]
        if unknown:
            self._names.update(self.db.execute(f"select agent, agent_id from agents where agent in ({_text(unknown)})"))
        return sorted(map(self._names.__getitem__, keys))

    def open_session(self, agent_id: str) -> dict | None:
        """The newest session of an agent that has not ended."""
        session = self._sessions.get(agent_id)
        if not session:
            session = self.row("select * from sessions where agent = ? and ended_at is null order by started_at desc limit 1",
                               self.key_of(agent_id))
            if session:         # anybody can make up agents that have none
                self._sessions[agent_id] = session
        return session

    def session(self, session_id: str) -> dict | None:
        return self.row("select s.*, a.agent_id from sessions s join agents a using(agent) where session_id = ?", session_id)

    def sessions(self, agent_id: str = "", active: bool = False, limit: int = LIST_MAX) -> list:
        """Sessions with their intent, the newest first."""
        return self.rows(
            "select s.*, a.agent_id, c.intent, (select ref_value from session_refs r where r.session_id = s.session_id and "
            "ref_type = 'worktree') worktree from sessions s join agents a using(agent) left join agent_work_contexts c "
            "using(session_id) where (? = '' or a.agent_id = ?) and (not ? or s.ended_at is null) "
            "order by s.started_at desc limit ?", agent_id, agent_id, active, limit)

    def work_context(self, session_id: str) -> dict | None:
        return self.row("select * from agent_work_contexts where session_id = ?", session_id)

    def work_contexts(self, agent_id: str = "", role: str = "", branch: str = "", file: str = "") -> list:
        """What is known of the work of each open session, the newest git facts first, then the newest session.

        `file` leaves out most of those that have not changed that path, given from the top of the repository.
        """
        path = canonical(file).decode() if file else ""     # as it stands in the lists: in quotes
        return self.rows(
            "select c.*, s.session_id, s.daemon, a.agent_id from sessions s join agents a using(agent) left join agent_work_contexts c "
            "on c.session_id = s.session_id where s.ended_at is null and (? = '' or a.agent_id = ?) and (? = '' or a.role = ?) "
            "and (? = '' or c.branch = ?) and (? = '' or instr(ifnull(c.changed_files, '') || ifnull(c.uncommitted_files, ''), ?)) "
            "order by ifnull(c.git_updated_at, '') desc, s.started_at desc limit ?",
            agent_id, agent_id, role, role, branch, branch, path, path, LIST_MAX)

    def contexts_elsewhere(self, daemon: str, since: str) -> list:
        """What each agent of another machine was working on when it was last heard of, if that is not older than a stamp."""
        found = {}
        for row in self.rows(
                "select c.*, a.agent_id, a.hostname from agent_work_contexts c join sessions s using(session_id) join agents a on "
                "a.agent = c.agent where s.daemon != ? and a.registered_at is not null and c.git_updated_at > ? order by "
                "c.git_updated_at desc limit ?", daemon, since, LIST_MAX):
            found.setdefault(row["agent_id"], row)
        return list(found.values())

    def note_work(self, session_id: str, facts: dict) -> None:
        """Keep what git says about the work of a session.  Of this machine only, like `touch`; others learn of it by agent.update."""
        self.db.execute("insert or ignore into agent_work_contexts(session_id, agent) select session_id, agent from sessions "
                        "where session_id = ?", (session_id,))
        values = [value if type(value) is str else canonical(value).decode() for value in facts.values()]
        self.db.execute(f"update agent_work_contexts set {' = ?, '.join(facts)} = ? where session_id = ? and "
                        "ifnull(git_updated_at, '') < ?", (*values, session_id, facts["git_updated_at"]))

    def team(self, offline: bool) -> list:
        """The agents and people, each with its newest open session and the work in it, the newest session first.

        `offline`: also those who have none.
        """
        return self.rows(
            "select c.*, a.*, s.session_id, s.started_at from agents a left join sessions s on s.session_id = (select session_id from "
            "sessions where agent = a.agent and ended_at is null order by started_at desc limit 1) left join agent_work_contexts c on "
            "c.session_id = s.session_id where a.registered_at is not null and (? or s.session_id is not null) "
            "order by s.started_at is null, s.started_at desc, a.agent_id", offline)

    def shared_messages(self) -> tuple:
        """How many messages are there for everyone, and for each group: a number and (group, number) pairs, the most first."""
        counts = dict(self.db.execute("select scope_value, count(*) from message_scopes where scope_type = 'group' group by scope_value"))
        for group in counts:    # an index counts all of them, so the few that were taken back come off
            counts[group] -= self.value(
                "select count(*) from messages m where deleted_at is not null and exists(select 1 from message_scopes where "
                "scope_type = 'group' and scope_value = ? and at = m.at and seq = m.seq)", group)
        everybody = self.value("select count(*) from messages where wide = 2") - \
            self.value("select count(*) from messages where deleted_at is not null and wide = 2")
        return everybody, sorted([pair for pair in counts.items() if pair[1]], key=lambda pair: (-pair[1], pair[0]))

    def newest_intent(self, agent_id: str) -> dict | None:
        """The agent's work context with the newest intent, of ended sessions too."""
        return self.row("select c.*, s.ended_at from agent_work_contexts c join agents a using(agent) join sessions s using(session_id) "
                        "where a.agent_id = ? and c.intent is not null order by c.intent_updated_at desc limit 1", agent_id)

    def session_pairs(self, session_id: str) -> tuple:
        """The scopes and the references of a session, as lists of tuples."""
        return tuple(list(self.db.execute(f"select {kind}_type, {kind}_value from session_{kind}s where session_id = ?",
                                          (session_id,))) for kind in ("scope", "ref"))

    def open_worktrees(self, daemon_id: str) -> list:
        """The open sessions of a daemon that name a worktree: (how they name it, agent id, session id), the oldest first."""
        return list(self.db.execute(
            "select r.ref_value, a.agent_id, s.session_id from session_refs r join sessions s using(session_id) join agents a using(agent) "
            "where r.ref_type = 'worktree' and s.ended_at is null and s.daemon = ? order by s.started_at, a.agent_id limit ?",
            (daemon_id, LIST_MAX)))

    def touch(self, session_id: str, ns: int) -> None:
        """Note that a session was seen.  Not an event: it must never cause a commit."""
        self.db.execute("update sessions set last_seen_at = ? where session_id = ?", (ns, session_id))
        self.db.execute("update agents set last_seen_at = max(last_seen_at, ?) where agent = "
                        "(select agent from sessions where session_id = ?)", (ns, session_id))

    def newest_act(self, agent_id: str) -> int:
        """The time (ns) of the newest message or session of an agent, 0 without any."""
        key = self.key_of(agent_id)
        return max(self.value("select max(at) from messages where author = ?", key, default=0),
                   self.value("select max(max(started_at, ifnull(ended_at, 0))) from sessions where agent = ?", key, default=0))

    def note_presence(self, seen: dict) -> None:
        """Note when agents (id -> ns) gave a sign of life.  Of this machine only, like `touch`."""
        for agent_id, ns in seen.items():
            key = self.key_of(agent_id)
            if not key:
                continue
            self._saw(key, ns)
            last = self.row("select began, ended from presence where agent = ? order by began desc limit 1", key)
            if last and ns - last["ended"] <= PRESENCE_GAP_S * NS:
                self.db.execute("update presence set ended = max(ended, ?) where agent = ? and began = ?", (ns, key, last["began"]))
            else:
                self.db.execute("insert or ignore into presence values(?, ?, ?)", (key, ns, ns))
                self.db.execute("delete from presence where agent = ? and began <= (select began from presence where agent = ? "
                                "order by began desc limit 1 offset ?)", (key, key, PRESENCE_MAX))
        self.flush()

    def idle_since(self, active_s: int) -> dict:
        """For each agent that was here for so long (seconds): its key -> the time (ns) after which it was."""
        found, spent = {}, {}
        for key, began, ended in self.db.execute("select agent, began, ended from presence order by agent, began desc"):
            spent[key] = spent.get(key, 0) + ended - began
            if key not in found and spent[key] >= active_s * NS:
                found[key] = began + spent[key] - active_s * NS
        return found

    def overdue(self, author: str, late: dict, since_ns: int, limit: int) -> list:
        """What an author wrote and nobody reads: {message_id, agent_id, at}, the newest of at most `limit` messages first.

        `late` says from `idle_since` up to when the mail of each reader is overdue; mail of readers that were deleted
        always is.  What is older than `since_ns` is left out.
        """
        gone = self.db.execute("select agent from agents where registered_at is null and removed_at > 0 and inbox_unread > 0")
        late, found = {**late, **{key: FAR for (key,) in gone.fetchall()}}, []
        if not late:
            return []
        for row in self.rows("select message_id, at, seq, delivered from messages where author = ? and unread_by > 0 and at > ? and "
                             "deleted_at is null order by at desc limit ?", self.key_of(author), since_ns, limit):
            waiting = [key for key in _keys(row["delivered"]) if row["at"] <= late.get(key, 0)]
            unread = self.db.execute(f"select agent from deliveries where agent in ({_text(waiting)}) and at = ? and seq = ? and "
                                     "read_at is null", (row["at"], row["seq"])) if waiting else ()
            found += [{"message_id": row["message_id"], "agent_id": agent_id, "at": row["at"]}
                      for agent_id in self.agent_ids([key for (key,) in unread])]
        return found

    def older_than(self, cutoff: int) -> dict:
        """How much a purge would remove: messages, their authors, ended sessions, and the events about them."""
        counts = self.row(      # each from an index alone, where there is one
            "select (select count(*) from messages where at < ?1) as messages, "
            "(select count(*) from agents a where exists(select 1 from messages where author = a.agent and at < ?1)) as authors, "
            "(select count(*) from messages where deleted_at is not null and at < ?1) as deleted, "
            "(select count(*) from sessions where started_at < ?1 and ended_at is not null) as sessions, "
            "(select ifnull(sum(updates), 0) from sessions where started_at < ?1 and ended_at is not null) as updates, "
            "(select count(read_at) + count(seen_at) from deliveries where at < ?1) as receipts, "
            "(select count(*) from message_edits e join messages n using(seq) where n.at < ?1 and e.event_id != '') as edits", cutoff)
        return {**counts, "events": sum(counts[what] for what in ("messages", "edits", "deleted", "receipts", "updates"))
                + 2 * counts["sessions"]}

    # ---- claims

    def claims(self) -> list:
        """The open claims, the first grant first, with those whose time has passed."""
        return self.rows(f"{_CLAIMS} c.open order by c.granted_at, c.grant_event")

    def claims_freed_by(self, session_id: str) -> list:
        """The claims that a session had when it ended: {claim_id, agent_id, path}."""
        return self.rows("select c.claim_id, a.agent_id, c.path from claims c join agents a using(agent) where c.session_id = ? and "
                         "c.released_at is null and c.superseded_by is null order by c.claim_id", session_id)

    def claim(self, claim_id: str) -> dict | None:
        return self.row(f"{_CLAIMS} c.claim_id = ?", claim_id)

    def last_fence(self) -> str:
        """What every fencing number has to be above, "" if there was none: of claims that were removed, the tombstones know."""
        return max(self.meta("fence", ""), self.value("select max(grant_event) from claims") or "")

    def _note_fence(self, event: dict, ns: int) -> None:
        """A tombstone was made above all fencing numbers that its machine knew, and outlives the claims that it removes."""
        if is_fence(event["event_id"], ns) and event["event_id"] > self.meta("fence", ""):
            self.set_meta(fence=event["event_id"])

    # ---- groups, roles, recipients

    def roles(self) -> set:
        return {row[0] for row in self.db.execute("select distinct role from agents where registered_at is not null "
                                                  "and kind = 'agent'")}

    def groups_named(self, name: str) -> list:
        """The ids of all groups of a name: two machines may have made it at once."""
        return [row[0] for row in self.db.execute("select group_id from groups where name = ? and created_at is not null and "
                                                  "deleted_at is null order by created_at, group_id", (name,))]

    def membership(self, group_id: str, kind: str, value: str) -> int:
        """When a member was added to a group (ns), 0 when it is none."""
        row = self.db.execute("select present, at from group_members where group_id = ? and member_type = ? and member_value = ? "
                              "order by at desc, event_id desc limit 1", (group_id, kind, value)).fetchone()
        return row[1] if row and row[0] else 0

    def role_group(self, role: str) -> dict | None:
        """The group that each role is, as `group` gives stored ones; None when no agent has it."""
        since = self.value("select min(registered_at) from agents where role = ? and kind = 'agent'", role)
        return since and {"group_id": "grp_role_" + role, "name": role, "description": f"All agents of the role {role}",
                          "created_by": "system", "created_at": since}

    def group_name(self, group_id: str) -> str:
        """What a group is called, or was before it was deleted."""
        return self.value("select name from groups where group_id = ?", group_id, default="")

    def group(self, name: str) -> dict | None:
        """The group of that name; of several, the first created."""
        return self.row("select * from groups where name = ? and created_at is not null and deleted_at is null "
                        "order by created_at, group_id limit 1", name)

    def groups(self) -> list:
        """All groups by name, each name once, with their count of members."""
        found = {}
        for group in self.rows("select * from groups where name is not null and created_at is not null and deleted_at is null "
                               "order by name, created_at, group_id"):
            found.setdefault(group["name"], {**group, "member_count": len(self.group_members(group["name"]))})
        return list(found.values())

    def group_members(self, name: str) -> list:
        """The members of a group as they were added: type, value, when, by whom."""
        last = {}
        for row in self.rows("select m.* from groups g join group_members m using(group_id) where g.name = ? and "
                             "g.deleted_at is null order by m.at, m.event_id", name):
            last[row["group_id"], row["member_type"], row["member_value"]] = row
        members = {(row["member_type"], row["member_value"]): row for row in last.values() if row["present"]}
        return [members[which] for which in sorted(members)]

    def expand(self, kind: str, name: str, ns: int = FAR) -> frozenset:
        """The keys of the agents behind a `group` (or role) or a `mention` (id, user or role) just before `ns`.

        Answers for times after the latest change are remembered.  A group inside itself adds nothing, and people
        have no role.
        """
        if self._settled < 0:
            self._settled = max(self.value("select max(at) from roster", default=0),
                                self.value("select max(at) from group_members", default=0),
                                self.value("select max(max(created_at), max(ifnull(deleted_at, 0))) from groups", default=0))
        known = ns > self._settled
        if known and (kind, name) in self._expanded:
            return self._expanded[kind, name]
        roster = self.db.execute("select r.agent, r.role, a.agent_id from roster r join agents a using(agent) where at < ? "
                                 "order by r.agent, at, event_id", (ns,))
        present = {agent: None if role is None else "" if agent_id.startswith("user:") else role for agent, role, agent_id in roster}
        present = {agent: role for agent, role in present.items() if role is not None}
        found, left, met = set(), [name], set()
        while left and kind == "group":     # all groups that are nested in it, each once
            group = left.pop()
            ids = self._groups_called(group, ns) if group not in met and group != EVERYONE else ()
            if group == EVERYONE:
                found.update(present)
            elif group == name and not ids and not met:
                found.update(agent for agent, role in present.items() if role == name)
            met.add(group)
            for group_id in ids:
                members = {(row[0], row[1]): row[2] for row in self.db.execute(
                    "select member_type, member_value, present from group_members where group_id = ? and at < ? "
                    "order by at, event_id", (group_id, ns))}
                for member_type, value in (which for which, is_in in members.items() if is_in):
                    if member_type == "role":
                        found.update(a for a, role in present.items() if value in ("*", role))
                    elif member_type == "group":
                        left.append(value)
                    elif member_type == "agent":
                        found.update(key for key in [self.key_of(value)] if key in present)
        if kind == "mention":
            found = {agent for agent, role in present.items() if role == name}
            found.update(key for key in (self.key_of(name), self.key_of("user:" + name)) if key in present)
        found = frozenset(found)
        if known:
            self._expanded[kind, name] = found
        return found

    def _groups_called(self, name: str, ns: int) -> list:
        """The ids of the groups that had that name just before `ns`."""
        found = self.db.execute(
            "select distinct group_id from group_updates u join groups g using(group_id) where field = 'name' and value = ? and "
            "g.created_at < ? and ifnull(g.deleted_at, ?) >= ?", (name, ns, FAR, ns)).fetchall()
        return [group for (group,) in found if self._group_field(group, "name", ns) == name]

    def _group_field(self, group_id: str, field: str, ns: int = FAR) -> str | None:
        """What the name or description of a group was just before `ns`."""
        return self.value("select value from group_updates where group_id = ? and field = ? and at < ? "
                          "order by at desc, event_id desc limit 1", group_id, field, ns)

    def resolve(self, name: str) -> tuple:
        """What a name in a mention stands for: group, agent, role or "" for nothing, and the keys of the recipients."""
        found = self._expanded.get(name)
        if not found:
            if self.group(name):
                found = "group", self.expand("group", name)
            elif self.agent(name):
                found = "agent", frozenset([self.key_of(name)])
            elif name and name in self.roles():
                found = "role", self.expand("group", name)
            elif self.agent("user:" + name):
                found = "agent", frozenset([self.key_of("user:" + name)])
            else:
                return "", frozenset()
            self._expanded[name] = found
        return found

    def key_of(self, agent_id: str) -> int:
        """The key of an agent id, 0 when it was never met."""
        known = self._known.get(agent_id)
        if known:
            return known[0]
        row = self.db.execute("select agent, removed_at from agents where agent_id = ?", (agent_id,)).fetchone()
        if row:
            self._known[agent_id] = row
            return row[0]
        return 0

    # ---- messages

    def message(self, message_id: str) -> dict | None:
        """One message with everything known of it."""
        return self.row(f"{_MESSAGES} message_id = ?",
                        message_id)

    def messages(self, message_ids: list) -> dict:
        """Some messages (at most STORE_BATCH), by id."""
        marks = ", ".join("?" * len(message_ids))
        return {row["message_id"]: row for row in self.rows(f"{_MESSAGES} message_id in ({marks})", *message_ids)}

    def message_by_key(self, agent_id: str, send_key: str, daemon: str = "") -> dict | None:
        """The message that a send with this key has made before, at a daemon or any."""
        return self.row(f"{_MESSAGES} send_key = ? and "
                        "a.agent_id = ? and ? in ('', m.daemon)", send_key, agent_id, daemon)

    def message_with(self, ref_type: str, value: str, author: str, daemon: str) -> dict | None:
        """The last message of an author that a daemon made with that reference."""
        self.flush()
        return self.row(f"select {_MESSAGE} from message_refs r join messages m using(seq) join agents a on a.agent = m.author where "
                        "r.ref_type = ? and r.ref_value = ? and a.agent_id = ? and m.daemon = ? order by r.at desc, r.seq desc limit 1",
                        ref_type, value, author, daemon)

    def recipients(self, message: dict) -> list:
        """The recipients of a message with what they did, by id.

        {agent_id, delivered_at: stored in the log, pushed_at? and route?: handed over by `wait` or a socket, seen_at?:
        printed for it (also as shown_at?), read_at?, answered_at? and answer?: its reply}.
        """
        self.flush()
        found, delivered_at = [], stamp_of(message["at"])
        answers = {author: (at, answer) for author, at, answer in self.db.execute(
            "select author, min(at), message_id from messages where reply_to = ? and deleted_at is null group by author",
            (message["message_id"],))}
        for key, agent_id, seen_at, read_at, pushed_at, route in self.db.execute(
                "select a.agent, a.agent_id, d.seen_at, d.read_at, d.pushed_at, d.route from agents a join deliveries d on "
                f"d.agent = a.agent and d.at = ? and d.seq = ? where a.agent in ({message['delivered']}) order by a.agent_id",
                (message["at"], message["seq"])):
            state = {"agent_id": agent_id, "delivered_at": delivered_at}
            if pushed_at:
                state["pushed_at"], state["route"] = stamp_of(pushed_at), route
            if seen_at or read_at:
                state["seen_at"] = stamp_of(min(seen_at or FAR, read_at or FAR))      # who has read it has seen it
            if seen_at:
                state["shown_at"] = stamp_of(seen_at)
            if read_at:
                state["read_at"] = stamp_of(read_at)
            if key in answers:
                state["answered_at"], state["answer"] = stamp_of(answers[key][0]), answers[key][1]
            found.append(state)
        return found

    def states(self, message: dict, reader: str) -> tuple:
        """What one reader did with a message ({read, seen, pushed}, None when it was not sent to it), and who else has read it."""
        self.flush()
        own, others, key = None, [], self.key_of(reader)
        for agent, agent_id, read_at, seen_at, pushed_at in self.db.execute(
                "select a.agent, a.agent_id, d.read_at, d.seen_at, d.pushed_at from agents a join deliveries d on d.agent = a.agent "
                f"and d.at = ? and d.seq = ? where a.agent in ({message['delivered']}) and (d.read_at is not null or a.agent = ?) "
                "order by a.agent_id", (message["at"], message["seq"], key)):
            if agent == key:
                own = {"read": bool(read_at), "seen": bool(seen_at), "pushed": bool(pushed_at)}
            elif read_at:
                others.append(agent_id)
        return own, others

    def edits(self, seq: int) -> int:
        """How often a message was edited."""
        return max(0, self.value("select count(*) from message_edits where seq = ?", seq) - 1)

    def versions(self, seq: int) -> list:
        """The versions of an edited message, the original first: {at, editor, content, structured}; [] without an edit."""
        return self.rows("select at, editor, content, structured from message_edits where seq = ? order by at, event_id", seq)

    def messages_with(self, limit: int, *, author: str = "", scope=None) -> tuple:
        """Messages of an author or with a scope (a pair), deleted ones too, the oldest first, and how many more there are."""
        condition, args = ("m.author = ?", [self.key_of(author)]) if author else (
            "m.seq in (select seq from message_scopes where scope_type = ? and scope_value = ?)", list(scope))
        found = self.rows(f"{_MESSAGES} {condition} "
                          "order by m.at, m.seq limit ?", *args, limit)
        return found, self.value(f"select count(*) from messages m where {condition}", *args) - len(found)

    def newest_of(self, thread_id: str, lone: str = "") -> dict | None:
        """The newest message of a thread that was not deleted; `lone` is a message that may have no thread yet."""
        return self.row(f"{_MESSAGES} (m.thread_id = ? or "
                        "m.message_id = ?) and m.deleted_at is null order by m.at desc, m.seq desc limit 1", thread_id, lone)

    def unseen(self, keys, since_ns: int) -> list:
        """Those of some agent keys that were not seen since a time: (agent id, last_seen_at), the longest first."""
        doubtful = [key for key in keys if self._last_seen.get(key, 0) < since_ns]
        if not doubtful:        # the common case, at every send
            return []
        found = self.db.execute(f"select agent_id, last_seen_at, agent from agents where agent in ({_text(doubtful)}) "
                                "order by last_seen_at, agent_id").fetchall()
        self._last_seen.update((key, ns) for _, ns, key in found)
        return [(agent_id, ns) for agent_id, ns, _ in found if ns < since_ns]

    # ---- search

    def full_text(self) -> bool:
        """Whether this SQLite can search the full-text index; without FTS5 the messages themselves are read."""
        if self._full_text is None:
            try:
                self.db.execute("select rowid from message_search limit 0")
                self._full_text = True
            except sqlite3.OperationalError:
                self._full_text = False
        return self._full_text

    def prepare_search(self) -> None:
        """Make the full-text index where it is missing.  It holds no text, only `words_of` it, separated by blanks."""
        try:
            self.db.execute("create virtual table if not exists message_search using fts5(text, content='', tokenize='ascii')")
        except sqlite3.OperationalError:
            pass                # no FTS5
        # What another SQLite has left there is out of date, and another Unicode has other words.
        unicode = unicodedata.unidata_version
        if not self.full_text() or self.meta("indexed_unicode", unicode) != unicode:
            self.set_meta(indexed=-1)
        self.set_meta(indexed_unicode=unicode)

    def index_messages(self, limit: int) -> bool:
        """Bring so many messages into the full-text index; whether some are left.

        Done when the writer has nothing else to do, and before each search: it would cost every send a fifth.
        """
        if not self.full_text():
            return False
        indexed = self._index_end()
        if indexed < 0:
            self._clear_index()
            indexed = 0
        found = self.db.execute("select seq, content, deleted_at from messages where seq > ? order by seq limit ?",
                                (indexed, limit)).fetchall()
        if found:
            self.db.executemany("insert into message_search(rowid, text) values(?, ?)",
                                [(seq, _index_text(content)) for seq, content, deleted_at in found if not deleted_at])
            self._indexed = found[-1][0]
            self.set_meta(indexed=self._indexed)
        return len(found) == limit

    def _index_end(self) -> int:
        if self._indexed is None:
            self._indexed = self.meta("indexed", 0)
        return self._indexed

    def _index(self, message: dict, content: str | None) -> None:
        """Replace the words of a message in the index (None: it is found no more)."""
        if not message["deleted_at"] and message["seq"] <= self._index_end() and self.full_text():
            self.db.execute("insert into message_search(message_search, rowid, text) values('delete', ?, ?)",
                            (message["seq"], _index_text(message["content"])))
            if content is not None:
                self.db.execute("insert into message_search(rowid, text) values(?, ?)", (message["seq"], _index_text(content)))

    def _clear_index(self) -> None:
        """Begin the index anew."""
        self._indexed = 0
        if self.full_text():
            self.db.execute("insert into message_search(message_search) values('delete-all')")
            self.set_meta(indexed=0)

    def search(self, phrases: list, *, author: str = "", to: str = "", thread_id: str = "", scope=None, after_ns: int = 0,
               limit: int = 10) -> dict:
        """Messages that hold all phrases (`parse_query`), the best first: {messages, total}.

        Of more than SEARCH_TOTAL_MAX hits only the newest count.  Without FTS5 the newest come first, and it takes longer.
        """
        where, args = [], []
        if author:
            where.append("m.author = ?")
            args.append(self.key_of(author))
        if to:
            condition, values = self._sent_to(to)
            where.append(condition)
            args += values
        if thread_id:
            where.append("m.thread_id = ?")
            args.append(self.thread(thread_id))
        if scope:
            where.append("exists(select 1 from message_scopes x where x.scope_type = ? and x.scope_value = ? and x.at = m.at and "
                         "x.seq = m.seq)")
            args += scope
        if after_ns:
            where.append("m.at > ?")
            args.append(after_ns)
        if self.full_text():
            tables = "message_search" + (" join messages m on m.seq = message_search.rowid" if where else "")
            seq, order = "message_search.rowid", "rank"
            where.insert(0, "message_search match ?")
            args.insert(0, " ".join('"' + " ".join(words) + '"' + ("*" if beginning else "") for words, beginning in phrases))
        else:
            self.db.create_function("holds", 1, lambda content: bool(find_phrases(content, phrases)))
            tables, seq, order = "messages m", "m.seq", "m.at desc"
            where += ["m.deleted_at is null", "holds(m.content)"]
        # Ranking takes its time for each hit, so of a common word only the newest are ranked.
        oldest = self.value(f"select {seq} from {tables} where {' and '.join(where)} order by {seq} desc limit 1 offset ?",
                            *args, SEARCH_TOTAL_MAX - 1) if self.full_text() else None
        if oldest:
            where.append(f"{seq} >= ?")
            args.append(oldest)
        condition = " and ".join(where)
        best = [row[0] for row in self.db.execute(f"select {seq} from {tables} where {condition} order by {order} limit ?",
                                                  (*args, limit))]
        total = len(best) if len(best) < limit else self.value(f"select count(*) from (select 1 from {tables} where {condition} limit ?)",
                                                               *args, SEARCH_TOTAL_MAX)
        found = {row["seq"]: row for row in self.rows(
            f"{_MESSAGES} m.seq in ({', '.join(map(str, best))})")}
        return {"messages": [found[seq] for seq in best if seq in found], "total": total}

    def page(self, *, receiver: str = "", unread: bool = False, reader: str = "", author: str = "", not_author: str = "",
             scope=None, ref=None, mention: str = "", thread_id: str = "", after_ns: int = 0, after_seq: int = -1, up_to_seq: int = FAR,
             by_update: bool = False, ascending: bool = False, limit: int = 10, offset: int = 0) -> dict:
        """Messages, newest first: {messages, total, unread}.

        `receiver` keeps what was delivered to that agent, `unread` of it what it has not read; `reader` is whose
        read state `is_read` tells.  What was deleted is left out.  `scope` and `ref` are pairs, `after_seq` is a
        sequence of the journal.
        """
        self.flush()
        key, reader_key = self.key_of(receiver), self.key_of(reader or receiver)
        tables, where, args, by_scope = "messages m", ["m.deleted_at is null"], [], False
        plain = not (unread or author or scope or ref or mention or thread_id or after_ns or after_seq >= 0 or up_to_seq < FAR)
        if receiver and key:
            tables = "deliveries d join messages m on m.seq = d.seq"
            where = ["d.agent = ?", "not d.hidden"]
            args.append(key)
            if unread:
                where.append("d.read_at is null")
            # Few messages are that young, of that author, or in that scope, and many were delivered: go by the message.
            few = after_seq >= 0 or bool(author and self._smaller(key, "messages where author = ?", self.key_of(author)))
            by_scope = not few and bool(scope) and self._smaller(key, "message_scopes where scope_type = ? and scope_value = ?", *scope)
            if few or by_scope:
                tables = "messages m cross join deliveries d on d.agent = ? and d.at = m.at and d.seq = m.seq"
                where = where[1:]
            if by_scope:
                tables = "message_scopes s cross join messages m on m.seq = s.seq " + tables[11:]
                where += ["s.scope_type = ?", "s.scope_value = ?"]
                args += scope
                scope = None
        elif receiver:          # somebody unknown sees what is addressed to everybody, all of it unread
            where.append("m.wide = 2")
        filters = []
        for condition, value in (
                ("m.author = ?", self.key_of(author) if author else None),
                ("m.author != ?", self.key_of(not_author) if not_author and not key else None),
                ("m.thread_id = ?", self.thread(thread_id) if thread_id else None),
                ("m.at > ?", after_ns or None), ("m.seq > ?", after_seq if after_seq >= 0 else None),
                ("m.seq <= ?", up_to_seq if up_to_seq < FAR else None)):
            if value is not None:
                filters.append(condition)
                args.append(value)
        short = mention[5:] if mention.startswith("user:") else mention        # a person is mentioned without the prefix too
        for table, kind, pair in (("message_scopes", "scope", scope), ("message_refs", "ref", ref),
                                  ("message_refs", "ref", ("mention", mention, short) if mention else None)):
            if pair:
                filters.append(f"exists(select 1 from {table} x where x.{kind}_type = ? and x.{kind}_value in "
                               f"({', '.join('?' * (len(pair) - 1))}) and x.at = m.at and x.seq = m.seq)")
                args += pair
        condition = " and ".join(where + filters)
        at = "d" if tables.startswith("deliveries") else "m"
        way = "" if ascending else " desc"
        order = f"m.updated_at{way}, m.at{way}, m.seq{way}" if by_update else f"{at}.at{way}, {at}.seq{way}"
        if after_seq >= 0 and ascending:
            order = "m.seq"
        found = self.rows(f"select {_MESSAGE} from {tables} join agents a on a.agent = m.author where {condition} "
                          f"order by {order} limit ? offset ?", *args, limit, offset)
        for message in found:
            row = self.db.execute("select read_at from deliveries where agent = ? and at = ? and seq = ?",
                                  (reader_key, message["at"], message["seq"])).fetchone()
            message["is_read"] = row[0] is not None if row else bool(reader_key)
        counted = self.row("select inbox_total, inbox_unread from agents where agent = ?", key) if key else None
        if plain and counted:
            total, left = counted["inbox_total"], counted["inbox_unread"]
        elif unread and counted and not filters and not by_scope:
            total = left = counted["inbox_unread"]
        elif plain and not receiver:    # everything that was said
            total = self._said() - (self._said(self.key_of(not_author)) if not_author else 0)
            left = self.value("select inbox_unread from agents where agent = ?", reader_key, default=0)
        elif key and reader_key == key:
            # The numbers are in the deliveries too, and to count in them alone is faster.
            alone = filters == ["m.seq > ?"] and not by_scope
            among = "deliveries d where d.agent = ? and not d.hidden and d.seq > ?" + " and d.read_at is null" * unread if alone \
                else f"{tables} where {condition}"
            total = self.value(f"select count(*) from {among}", *args)
            left = total if unread else self.value(f"select count(*) from {among} and d.read_at is null", *args)
        else:
            total = self.value(f"select count(*) from {tables} where {condition}", *args)
            left = total if unread or (receiver and not key) else self.value(
                f"select count(*) from {tables} join deliveries u on u.agent = ? and u.at = m.at and u.seq = m.seq "
                f"where {condition} and u.read_at is null and not u.hidden", reader_key, *args) if reader_key else 0
        return {"messages": found, "total": total, "unread": left}

    def _smaller(self, key: int, table: str, *args) -> bool:
        """Whether a selection has fewer rows than an agent has messages."""
        most = self.value("select inbox_total from agents where agent = ?", key, default=0)
        return self.value(f"select count(*) from (select 1 from {table} limit ?)", *args, most) < most

    def _said(self, author: int = 0) -> int:
        """How many messages there are, or of one author, that were not deleted; from the indices alone."""
        condition, args = ("author = ?", [author]) if author else ("1", [])
        return self.value(f"select count(*) from messages where {condition}", *args) - \
            self.value(f"select count(*) from messages where deleted_at is not null and {condition}", *args)

    def written(self, agent_id: str) -> int:
        """How many messages an agent has written, deleted ones too."""
        return self.value("select count(*) from messages where author = ?", self.key_of(agent_id))

    def outbox(self, agent_id: str, to: str = "", unread: bool = False, limit: int = 10, offset: int = 0, only=None) -> dict:
        """What an agent wrote, newest first: {messages, total}; `to` is an agent, role or group, or `everyone`.

        `only` is a list of message ids to choose from.
        """
        self.flush()
        where, args = ["m.author = ?"], [self.key_of(agent_id)]
        if to:
            sent_to, values = self._sent_to(to)
            where.append(sent_to)
            args += values
        if unread:
            where.append("m.unread_by > 0")
        if only is not None:
            where.append(f"m.message_id in ({', '.join('?' * len(only))})")
            args += only
        condition = " and ".join(where)
        found = self.rows(f"{_MESSAGES} {condition} "
                          "order by m.at desc, m.seq desc limit ? offset ?", *args, limit, offset)
        return {"messages": found, "total": self.value(f"select count(*) from messages m where {condition}", *args)}

    def _sent_to(self, to: str) -> tuple:
        """The condition for messages to an agent, role or group, or to `everyone`, and its values."""
        named = ("exists(select 1 from message_refs r where r.ref_type in ('mention', 'group') and r.ref_value = ? and "
                 "r.at = m.at and r.seq = m.seq)")
        if to == EVERYONE:
            return f"(m.wide = 2 or {named})", [to]
        return (f"(exists(select 1 from deliveries d where d.agent = ? and d.at = m.at and d.seq = m.seq) or {named})",
                [self.key_of(to), to])

    def went_to(self, message: dict, to: str) -> bool:
        """Whether a message went to an agent, role or group of that name, or to `everyone`."""
        mentions, groups = audience_of(*stored_pairs(message))
        return to in (*mentions, *groups) or (message["wide"] == 2 if to == EVERYONE else self.key_of(to) in _keys(message["delivered"]))

    def once(self, key: str, change):
        """What `change()` returns; with a key, what it returned the first time.  The latest REPLIES_MAX are kept."""
        if not key:
            return change()
        reply = self.value("select reply from replies where key = ?", key)
        if reply is not None:
            return json.loads(reply)
        reply = change()
        self.db.execute("insert into replies(key, reply) values(?, ?)", (key, canonical(reply).decode()))
        self.db.execute("delete from replies where id <= last_insert_rowid() - ?", (REPLIES_MAX,))
        return reply

    def first_since(self, ns: int) -> int:
        """The number of the first event that was made at a time or later, as the ids say; FAR without one."""
        return self.value("select min(seq) from events where event_id >= ?", "evt_" + crockford(ns // 1_000_000 << 80, 26), default=FAR)

    def known_events(self, event_ids: list) -> set:
        """Those of some event ids (at most STORE_BATCH) that were applied before."""
        self.flush()
        marks = ", ".join("?" * len(event_ids))
        return {row[0] for row in self.db.execute(f"select event_id from events where event_id in ({marks})", event_ids)}

    def counts(self) -> dict:
        """How many agents, messages and open sessions there are."""
        return self.row("select (select count(*) from agents where registered_at is not null) as agents, "
                        "(select count(*) from messages) as messages, "
                        "(select count(*) from sessions where ended_at is null) as sessions")

    def thread(self, thread_id: str) -> str:
        """The id a thread goes by; the same text unless it was joined with another."""
        return self.value("select into_id from thread_aliases where thread_id = ?", thread_id, default=thread_id)

    def thread_in_work(self, session: dict) -> str:
        """The thread that a session works in: of those that it refers to the one that was spoken in last, else the one in which
        the agent answered last; "" without any.
        """
        named = [self.thread(value) for kind, value in self.session_pairs(session["session_id"])[1] if kind == "thread"]
        return max(named, key=lambda thread: (self.newest_in(thread), thread)) if named else self.value(
            "select thread_id from messages where author = ? and at > ? and reply_to is not null and deleted_at is null "
            "order by at desc limit 1", session["agent"], session["started_at"], default="")

    def newest_in(self, thread_id: str) -> int:
        """The time of the newest message in a thread, 0 when there is none."""
        return self.value("select max(at) from messages where thread_id = ?", thread_id, default=0)

    def subscriptions(self, session_id: str = "") -> list:
        """The subscriptions of a session, or of all, the oldest first: with the id and the present role of the agent."""
        return self.rows("select s.*, a.agent_id, a.role from subscriptions s join agents a using(agent) where ? in ('', s.session_id) "
                         "and not s.removed order by s.id", session_id)

    def thread_facts(self, thread_id: str) -> tuple:
        """How many messages of a thread are not deleted, and the newest of them (None: there is none)."""
        return (self.value("select count(*) from messages where thread_id = ? and deleted_at is null", thread_id),
                self.newest_of(thread_id))

    def unread_in(self, thread_id: str, agent_id: str, length: int) -> int:
        """How many messages of a thread of that length an agent has not read."""
        self.flush()
        key = self.key_of(agent_id)
        # From the shorter side: what it has not read at all, or what is in the thread.
        few = self.value("select inbox_unread from agents where agent = ?", key, default=0) < length
        tables = "deliveries d cross join messages m" if few else "messages m cross join deliveries d"
        return self.value(f"select count(*) from {tables} where d.agent = ? and d.at = m.at and d.seq = m.seq and d.read_at is null "
                          "and not d.hidden and m.thread_id = ?", key, thread_id)

    # ---- threads as their streams show them

    def _thread_rows(self, thread_id: str) -> tuple | None:
        """The id that a thread goes by, and the condition for its messages with its value; None when there is no such thread.

        A lone message has a thread of its own, and one that has only been given a title holds nothing yet.
        """
        thread = self.thread(thread_id)
        if self.value("select 1 from messages where thread_id = ? limit 1", thread):
            return thread, "thread_id = ?", thread
        lone = self.value("select seq from messages where message_id = ? and thread_id is null", "msg_" + thread.partition("_")[2])
        if lone or self.value("select 1 from threads where thread_id = ? and created_at >= ?", thread, self.meta("purge_cutoff", 0)):
            return thread, "seq = ?", lone or 0
        return None

    def thread_named(self, thread_id: str) -> str:
        """The id that a thread goes by, "" when there is no such thread."""
        return (self._thread_rows(thread_id) or ("",))[0]

    def thread_title(self, thread_id: str) -> str:
        """The title of a thread that goes by that id."""
        return self.value("select title from threads where thread_id = ?", thread_id, default="")

    def thread_state(self, thread_id: str) -> dict | None:
        """Status, title and the time of the last change (ns) of a thread; None when there is no such thread."""
        rows = self._thread_rows(thread_id)
        if not rows:
            return None
        thread, where, value = rows
        asked, answered = self.db.execute(
            "select count(*), total(exists(select 1 from messages a where a.reply_to = m.message_id and a.author != m.author and "
            f"a.deleted_at is null)) from messages m where {where} and {ASKS} and deleted_at is null", (value,)).fetchone()
        newest = self.value(f"select max(at) from messages where {where}", value) or self.value(
            "select created_at from threads where thread_id = ?", thread)
        return {"status": "resolved" if asked and asked == answered else "active", "title": self.thread_title(thread),
                "updated_at": newest}

    def thread_place(self, thread_id: str, after: int, offset: int) -> tuple:
        """Where one gets to in a thread, so many messages after the one with a sequence, or before it: that sequence and how many.

        No further than to the last message, and to 0 before the first.
        """
        _, where, value = self._thread_rows(thread_id) or ("", "0 = ?", 1)
        if offset <= 0:
            return self.value(f"select seq from messages where {where} and seq <= ? order by seq desc limit 1 offset ?",
                              value, after, -offset, default=0), offset
        moved = self.value(f"select count(*) from (select 1 from messages where {where} and seq > ? limit ?)", value, after, offset)
        return self.value(f"select seq from messages where {where} and seq > ? order by seq limit 1 offset ?", value, after, moved - 1) \
            if moved else after, moved

    def thread_count(self, thread_id: str, up_to: int = FAR) -> int:
        """How many messages a thread has, deleted ones too."""
        _, where, value = self._thread_rows(thread_id) or ("", "0 = ?", 1)
        return self.value(f"select count(*) from messages where {where} and seq <= ?", value, up_to)

    def thread_page(self, thread_id: str, after: int, limit: int, size: int) -> dict | None:
        """The messages of a thread after a sequence that were not deleted, at most `limit` and some `size` characters; None without it.

        `rows` are pairs of a place (1 is the first after that sequence, deleted ones count) and a row, `passed` says to
        which place that leads, `after` to which sequence, `left` how many messages follow, `more` whether one is not deleted.
        """
        rows = self._thread_rows(thread_id)
        if not rows:
            return None
        _, where, value = rows
        places, found, passed, more, end = {}, [], 0, False, after
        cursor = self.db.execute(f"select seq, deleted_at from messages where {where} and seq > ? order by seq", (value, after))
        for seq, deleted_at in cursor:      # from the index alone
            if not deleted_at:
                more = len(places) == limit
                if more:
                    break
                places[seq] = passed + 1
            passed, end = passed + 1, seq
        cursor.close()          # one that is not at its end would keep its snapshot
        cursor = self.db.execute(f"{_MESSAGES} m.{where} and m.seq > ? and m.seq <= ? and m.deleted_at is null order by m.seq",
                                 (value, after, max(places, default=0)))
        names = [c[0] for c in cursor.description]
        for values in cursor:
            row = dict(zip(names, values))
            size -= len(row["content"])
            if found and size < 0:
                more, passed, end = True, found[-1][0], found[-1][1]["seq"]
                break
            found.append((places[row["seq"]], row))
        cursor.close()
        left = self.value(f"select count(*) from messages where {where} and seq > ?", value, end) if more else 0
        return {"rows": found, "passed": passed, "after": end, "left": left, "more": more}

    def message_at(self, seq: int) -> dict | None:
        """The message with a sequence of the journal."""
        return self.row(f"{_MESSAGES} m.seq = ?", seq)

    def askers(self, message_ids: list) -> dict:
        """Who asked: message id -> author, of those that are questions."""
        marks = ", ".join("?" * len(message_ids))
        return dict(self.db.execute(f"select m.message_id, a.agent_id from messages m join agents a on a.agent = m.author where "
                                    f"m.message_id in ({marks}) and {ASKS}", message_ids)) if message_ids else {}

    def readers(self, message: dict) -> list:
        """The ids of those who got a message."""
        return self.agent_ids(_keys(message["delivered"]))

    def stream_ack(self, instance_id: str, thread_id: str) -> int | None:
        """The sequence up to which a client has acknowledged a thread; None when it never followed it, or long ago."""
        return self.value("select seq from stream_acks where instance_id = ? and thread_id = ?", instance_id, thread_id)

    def note_stream_ack(self, instance_id: str, thread_id: str, seq: int) -> None:
        """Note that a client has acknowledged a thread so far; never less than before.  Of this machine only, like `touch`."""
        now = self.world.now_ns()
        if not self.db.execute("update stream_acks set seq = max(seq, ?), at = ? where instance_id = ? and thread_id = ?",
                               (seq, now, instance_id, thread_id)).rowcount:
            self.db.execute("insert into stream_acks values(?, ?, ?, ?)", (instance_id, thread_id, seq, now))
            self.db.execute("delete from stream_acks where at < (select at from stream_acks order by at desc limit 1 offset ?)",
                            (STREAM_ACKS_MAX - 1,))

    # ---- what was reported of tasks and processes: of this machine only, like `touch`

    def add_task_event(self, data: dict, ns: int) -> int:
        """Keep an event of a task (`TASK_FIELDS`); its number in the task, from 1."""
        task_id, kind = data["task_id"], data["stream_type"]
        task = self.task(task_id)
        if not task:
            late = self._too_old("tasks", "updated_at", TASKS_MAX, ns)
            self.db.execute("delete from task_events where task_id in (select task_id from tasks where updated_at <= ?)", (late,))
            self.db.execute("delete from tasks where updated_at <= ?", (late,))
            task = {"task_id": task_id, "tool_name": "", "turns": 0, "tokens_in": 0, "tokens_out": 0, "cost": 0, "duration_sec": 0,
                    "events": 0, "started_at": ns, "updated_at": 0}
        said = ["thread_id", "agent_id", "workspace", "directive", "source_type"]
        if kind == "status":    # it carries the totals
            said += ["status", "tokens_in", "tokens_out", "cost", "duration_sec"]
        task.update((field, data[field]) for field in said if field in data)
        if kind == "turn_start":
            task["status"] = "running"
        if kind in ("tool_use", "tool_result", "turn_end", "status"):
            task["tool_name"] = data.get("tool_name", "") if kind == "tool_use" else ""
        task.update(turns=max(task["turns"], data.get("turn_num", 0)), events=task["events"] + 1, updated_at=max(task["updated_at"], ns))
        self.db.execute(f"insert or replace into tasks({', '.join(task)}) values({', '.join('?' * len(task))})", tuple(task.values()))
        self.db.execute("insert into task_events(task_id, event_seq, at, turn_num, stream_type, data) values(?, ?, ?, ?, ?, ?)",
                        (task_id, task["events"], ns, data.get("turn_num"), kind, encode(data).decode()))
        self.db.execute("delete from task_events where id <= last_insert_rowid() - ?", (TASK_ROWS_MAX,))
        self.db.execute("delete from task_events where task_id = ? and event_seq <= ?", (task_id, task["events"] - TASK_EVENTS_MAX))
        return task["events"]

    def task(self, task_id: str) -> dict | None:
        """What is known of a task in all."""
        return self.row("select * from tasks where task_id = ?", task_id)

    def tasks(self, limit: int) -> list:
        """The tasks, the last reported first."""
        return self.rows("select * from tasks order by updated_at desc, task_id limit ?", limit)

    def task_events(self, task_id: str, limit: int, turn: int = 0, kind: str = "") -> list:
        """The last events of a task, of one turn and type or all, the oldest first: {event_seq, at, stream_type, data}."""
        return self.rows("select event_seq, at, stream_type, data from task_events where task_id = ? and (? = 0 or turn_num = ?) and "
                         "(? = '' or stream_type = ?) order by event_seq desc limit ?", task_id, turn, turn, kind, kind, limit)[::-1]

    def add_telemetry(self, data: dict, ns: int) -> None:
        """Keep what a process reports of itself, in the place of what it has said in the same half minute."""
        instance_id, slot = data["instance_id"], ns // (TELEMETRY_SLOT_S * NS)
        if not self.value("select 1 from telemetry where instance_id = ? and slot = ?", instance_id, slot):     # one row more
            self.db.execute("delete from telemetry where at <= ?", (self._too_old("telemetry", "at", TELEMETRY_MAX, ns),))
        self.db.execute("insert or replace into telemetry values(?, ?, ?, ?)", (instance_id, slot, ns, encode(data).decode()))
        self.db.execute("delete from telemetry where instance_id = ? and slot <= ?", (instance_id, slot - TELEMETRY_SLOTS))

    def telemetry(self, limit: int) -> dict:
        """What processes have reported, the last reported first: instance id -> [(ns, data)], the oldest report first."""
        found = {}
        for instance_id, at, data in self.db.execute(
                "select t.instance_id, t.at, t.data from (select instance_id, max(at) last from telemetry group by instance_id "
                "order by last desc, instance_id limit ?) l join telemetry t using(instance_id) order by l.last desc, t.instance_id, t.at",
                (limit,)):
            found.setdefault(instance_id, []).append((at, json.loads(data)))
        return found

    def _too_old(self, table: str, at: str, most: int, ns: int) -> int:
        """The time up to which rows have to go: so that there is room for one more, and because nobody has reported since."""
        return max(ns - REPORTS_S * NS, self.value(f"select {at} from {table} order by {at} desc limit 1 offset ?", most - 1, default=0))

    # ---- the projection

    def create(self) -> None:
        """Make the tables of an empty database, all or none."""
        self.db.execute("begin immediate")
        for statement in SCHEMA.strip().split(";\n"):
            self.db.execute(statement)
        self.db.execute("insert into schema_version values(?, ?)", (SCHEMA_VERSION, stamp_of(self.world.now_ns())))
        self.db.execute("commit")

    def apply(self, event: dict, seq: int, ns: int, *, fresh: bool = False) -> bool:
        """Bring the tables up to an event that `check_event` has found well-formed; False when it was applied before.

        `seq` is its number in the journal, `ns` its time; `fresh` says that it cannot have been applied before.  Types
        that are not known change nothing.
        """
        if not fresh and self.known_events([event["event_id"]]):
            return False
        self._rows[_EVENT_ROW].append((event["event_id"], seq))
        self._project(event, seq, ns)
        return True

    def settle(self) -> None:
        """Deliver what late registrations and memberships have changed; before each commit."""
        late, self._late = self._late, FAR
        self.flush()
        for message in self.rows("select * from messages where wide in (1, 2) and at > ?", late) if late < FAR else ():
            mentions, groups = audience_of(*stored_pairs(message))
            wanted = self._recipients(mentions, groups, _keys(message["listed"]), message["author"], message["at"])
            present = set(_keys(message["delivered"]))
            if wanted != present:
                self._deliver(message["message_id"], message["seq"], message["at"], wanted - present, bool(message["deleted_at"]))
                self._undeliver(message, present - wanted)
                self.db.execute("update messages set delivered = ?, unread_by = unread_by + ? where seq = ?",
                                (_text(wanted), len(wanted - present), message["seq"]))
                self._parent_came(message["message_id"])        # receipts of the new recipients
        self.flush()

    def _project(self, event: dict, seq: int, ns: int) -> None:
        project = _PROJECTIONS.get(event["type"])
        if project:
            project(self, event, seq, ns)

    def _is_removed(self, parent: str) -> bool:
        """Whether a message, session or claim was removed for good."""
        if self._removals is None:
            self._removals = self.value("select 1 from removed limit 1") is not None
        return self._removals and self.value("select 1 from removed where id = ?", parent) is not None

    def _note_untidy(self) -> None:
        self.untidy = True
        self.set_meta(untidy=1)

    def _gone(self, parent: str) -> None:
        """Remember that a message, session or claim is gone: what comes about it later waits for nothing, and its bytes are to be freed."""
        self.db.execute("insert or ignore into removed(id) values(?)", (parent,))
        self.db.execute("delete from pending where parent = ?", (parent,))
        self._note_untidy()
        self._removals = True

    def _wait_for(self, parent: str, event: dict) -> None:
        if self._is_removed(parent):
            return self._note_untidy()
        self._pending = True
        self.db.execute("insert or ignore into pending values(?, ?, ?)",
                        (parent, event["event_id"], canonical(event).decode()))

    def _parent_came(self, parent: str) -> None:
        if self._pending is None:
            self._pending = self.value("select 1 from pending limit 1") is not None
        waiting = self._pending and self.db.execute("select line from pending where parent = ?", (parent,)).fetchall()
        if waiting:
            self.db.execute("delete from pending where parent = ?", (parent,))
            for (line,) in waiting:
                event = json.loads(line)
                self._project(event, 0, ns_of(event["timestamp"]))

    def _agent(self, agent_id: str) -> tuple:
        """The key of an agent id, made at its first appearance, and when the agent was last removed."""
        known = self._known.get(agent_id)
        if not known:
            if not self.key_of(agent_id):
                self.db.execute("insert into agents(agent_id) values(?)", (agent_id,))
                self.key_of(agent_id)
            known = self._known[agent_id]
        return known

    def _roster_changed(self, ns: int) -> None:
        """Somebody came, went or changed groups at `ns`: younger messages may have other recipients now."""
        self._expanded.clear()
        self._settled = max(self._settled, ns) if self._settled >= 0 else -1
        if self._newest < 0:
            self._newest = self.value("select max(at) from messages", default=0)
        if ns < self._newest:
            self._late = min(self._late, ns)

    def _recipients(self, mentions: list, groups: list, listed, author: int, ns: int) -> set:
        """Everybody who gets a message (design, decision 19): the list in it, and whom the list should have had."""
        found = set(listed)
        for group in groups or (() if mentions else (EVERYONE,)):
            found |= self.expand("group", group, ns)
        for mention in mentions:
            found |= self.expand("mention", mention, ns)
        found.discard(author)
        return found

    def _deliver(self, message_id: str, seq: int, ns: int, keys, hidden: bool = False) -> None:
        """Give a message to agents."""
        self._unwritten.add(message_id)
        self._rows[_DELIVERY_ROW] += [(key, ns, seq, hidden) for key in keys]
        if not hidden:
            self._count(keys, 1, 1)

    def _undeliver(self, message: dict, keys) -> None:
        """Take a message back from agents who should not have had it; what they did with it is remembered."""
        for key in keys:
            which = (key, message["at"], message["seq"])
            row = self.db.execute("select read_at, seen_at, pushed_at, route from deliveries where agent = ? and at = ? and seq = ?",
                                  which).fetchone()
            self.db.execute("delete from deliveries where agent = ? and at = ? and seq = ?", which)
            if row[0] is None:
                self.db.execute("update messages set unread_by = unread_by - 1 where seq = ?", (message["seq"],))
            if not message["deleted_at"]:
                self._count([key], -1, -1 if row[0] is None else 0)
            agent_id = self.agent_ids([key])[0]
            for kind, at in (("read", row[0]), ("seen", row[1])):
                if at:
                    self._wait_for(message["message_id"], {
                        "type": "message.receipt", "timestamp": stamp_of(at), "message_id": message["message_id"],
                        "agent_id": agent_id, "receipt_type": kind, "event_id": f"{kind}:{agent_id}"})
            if row[2]:
                self._wait_for(message["message_id"], {
                    "type": "message.route", "timestamp": stamp_of(row[2]), "message_ids": [message["message_id"]],
                    "agent_id": agent_id, "route": row[3], "event_id": f"route:{agent_id}"})

    def _count(self, keys, total: int, unread: int) -> None:
        counts = self._counts
        for key in keys:
            change = counts.get(key)
            if change:
                change[0] += total
                change[1] += unread
            else:
                counts[key] = [total, unread]

    def _saw(self, key: int, ns: int) -> None:
        self._seen[key] = max(ns, self._seen.get(key, 0))

    def _hide(self, message: dict) -> None:
        """Take a message that is not deleted yet out of the counts and of the full-text index."""
        delivered = self.db.execute(f"select agent, read_at is null from deliveries where agent in ({message['delivered']}) and "
                                    "at = ? and seq = ?", (message["at"], message["seq"])).fetchall()
        for unread in (0, 1):
            self._count([key for key, is_unread in delivered if is_unread == unread], -1, -unread)
        self._index(message, None)

    def _drop(self, message: dict) -> None:
        """Remove a message and all that hangs on it; its bytes are still to be freed."""
        self.flush()
        if not message["deleted_at"]:
            self._hide(message)
        self.db.execute(f"delete from deliveries where agent in ({message['delivered']}) and at = ? and seq = ?",
                        (message["at"], message["seq"]))
        self._gone(message["message_id"])
        for kind in ("scope", "ref"):
            for pair in pairs_of(json.loads(message[kind + "s"] or "[]")):
                self.db.execute(f"delete from message_{kind}s where {kind}_type = ? and {kind}_value = ? and at = ? and seq = ?",
                                (*pair, message["at"], message["seq"]))
        self.db.execute("delete from message_edits where seq = ?", (message["seq"],))
        self.db.execute("delete from messages where seq = ?", (message["seq"],))

    def _thread_for(self, message_id: str, thread_id: str | None, reply_to: str | None) -> str | None:
        """The thread of a message.

        A thread has as many ids as events gave it, and one for each of its messages; all that turn out to be the same
        go by the smallest that was given, so that a program that knows nothing of this finds it too.
        """
        own = thread_of(message_id)
        if not thread_id and not reply_to:
            return self.value("select into_id from thread_aliases where thread_id = ?", own)
        labels = {own: 0}               # id -> whether an event gave it
        if reply_to:
            labels[thread_of(reply_to)] = 0
        if thread_id:
            labels[thread_id] = 1
        given = dict(labels)
        for label in labels:
            row = self.db.execute("select a.into_id, r.given from thread_aliases a join thread_aliases r on r.thread_id = a.into_id "
                                  "where a.thread_id = ?", (label,)).fetchone()
            if row:
                if not labels[label]:
                    given.pop(label, None)
                given[row[0]] = max(row[1], given.get(row[0], 0))
        thread = min(given, key=lambda label: (not given[label], label))
        for other in given:
            if other != thread:
                if self.db.execute("update messages set thread_id = ? where thread_id = ?", (thread, other)).rowcount:
                    self.joined.update((thread, other))
                self.db.execute("update thread_aliases set into_id = ? where into_id = ?", (thread, other))
        self.db.executemany("insert into thread_aliases values(?, ?, ?) on conflict(thread_id) do update set "
                            "into_id = excluded.into_id, given = max(given, excluded.given)",
                            [(label, thread, is_given) for label, is_given in labels.items()])
        named = {reply_to, "msg_" + thread_id[4:] if thread_id else None} - {None, ""}
        for name in sorted(named):
            if self.db.execute("update messages set thread_id = ? where message_id = ? and thread_id is null", (thread, name)).rowcount \
                    and self.value("select count(*) from (select 1 from messages where thread_id = ? limit 2)", thread) > 1:
                self.joined.update((thread, thread_of(name)))
        return thread

    def _rethread(self, threads) -> None:
        """Work out threads again, some of whose messages were removed: those that are left may no longer belong together."""
        joined = set(self.joined)       # what is put together again here was so before
        for thread in sorted(set(threads) - {None}):
            left = self.db.execute("select seq, message_id, given_thread, reply_to from messages where thread_id = ? order by seq",
                                   (thread,)).fetchall()
            self.db.execute("update messages set thread_id = null where thread_id = ?", (thread,))
            self.db.execute("delete from thread_aliases where into_id = ?", (thread,))
            for seq, message_id, given, reply_to in left:
                if given or reply_to:
                    self.db.execute("update messages set thread_id = ? where seq = ?",
                                    (self._thread_for(message_id, given, reply_to), seq))
            for seq, message_id, given, reply_to in left:       # the others, once all labels are known
                if not given and not reply_to:
                    self.db.execute("update messages set thread_id = ? where seq = ?", (self._thread_for(message_id, None, None), seq))
        self.joined = joined

    def _message_create(self, event: dict, seq: int, ns: int) -> None:
        db, message_id = self.db, event["message_id"]
        refs, scopes, body = pairs_of(event.get("refs")), pairs_of(event.get("scopes")), event["body"]
        reply_to = next((value for kind, value in refs if kind == "reply_to"), None)
        author, removed_at = self._agent(event["agent_id"])
        self._saw(self._agent(event["authored_by"])[0] if event.get("authored_by") else author, ns)
        if ns <= removed_at or ns < self.cutoff() or self._is_removed(message_id):
            self._gone(message_id)
            return              # purged, removed, or of an agent that was deleted later
        thread = self._thread_for(message_id, event.get("thread_id"), reply_to)
        ids, known = event.get("recipients") or (), self._known
        listed = {known[agent_id][0] if agent_id in known else self._agent(agent_id)[0] for agent_id in ids}
        listed.discard(author)
        mentions, groups = audience_of(refs, scopes)
        if not mentions and not groups:
            wide = 2
        elif groups:
            wide = 1
        else:                   # an agent that is mentioned is in the list, a role may have members that are not
            wide = int(any(name not in ids and "user:" + name not in ids for name in mentions))
        delivered = self._recipients(mentions, groups, listed, author, ns) if wide else listed
        listed_text = _text(listed)
        delivered_text = listed_text if delivered == listed else _text(delivered)
        structured = body.get("structured")
        done = db.execute(
            "insert or ignore into messages(seq, message_id, at, author, session_id, thread_id, given_thread, reply_to, format, content, "
            "structured, scopes, refs, listed, delivered, wide, unread_by, authored_by, disclosed, send_key, daemon) "
            "values(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (seq, message_id, ns, author, event.get("session_id"), thread, event.get("thread_id"), reply_to,
             str(body.get("format") or "markdown"), body.get("content", ""), structured if type(structured) is str else None,
             canonical(event["scopes"]).decode() if scopes else None, canonical(event["refs"]).decode() if refs else None,
             listed_text, delivered_text, wide, len(delivered), event.get("authored_by"), event.get("disclosed"),
             event.get("send_key"), event.get("origin_daemon")))
        if not done.rowcount:
            return
        self._newest = max(self._newest, ns) if self._newest >= 0 else -1
        self._rows[_SCOPE_ROW] += [(kind, value, ns, seq) for kind, value in scopes]
        self._rows[_REF_ROW] += [(kind, value, ns, seq) for kind, value in refs]
        self._deliver(message_id, seq, ns, delivered)
        self._parent_came(message_id)

    def _message_edit(self, event: dict, seq: int, ns: int) -> None:
        message = self.row("select * from messages where message_id = ?", event["message_id"])
        if not message:
            return self._wait_for(event["message_id"], event)
        content, structured = event["body"].get("content", ""), event["body"].get("structured")
        structured = structured if type(structured) is str else None
        insert = "insert or ignore into message_edits values(?, ?, ?, ?, ?, ?, ?)"
        if not message["updated_at"]:
            self.db.execute(insert, (message["seq"], message["at"], "", None, message["format"], message["content"],
                                     message["structured"]))
        self.db.execute(insert, (message["seq"], ns, event["event_id"], event.get("agent_id"), message["format"], content,
                                 structured))
        if (ns, event["event_id"]) > (message["updated_at"] or 0, message["edit_event"] or ""):
            self._index(message, content)
            self.db.execute("update messages set content = ?, structured = ?, updated_at = ?, edit_event = ? where seq = ?",
                            (content, structured, ns, event["event_id"], message["seq"]))

    def _message_delete(self, event: dict, seq: int, ns: int) -> None:
        self.flush()
        message = self.row("select * from messages where message_id = ?", event["message_id"])
        if not message:
            return self._wait_for(event["message_id"], event)
        if not message["deleted_at"]:
            self._hide(message)
            self.db.execute(f"update deliveries set hidden = 1 where agent in ({message['delivered']}) and at = ? and seq = ?",
                            (message["at"], message["seq"]))
        if (ns, event["event_id"]) < (message["deleted_at"] or FAR, message["delete_event"] or ""):
            self.db.execute("update messages set deleted_at = ?, delete_reason = ?, delete_event = ? where seq = ?",
                            (ns, event.get("reason"), event["event_id"], message["seq"]))

    def _message_receipt(self, event: dict, seq: int, ns: int) -> None:
        if event["message_id"] in self._unwritten:
            self.write_rows()
        key = self._agent(event["agent_id"])[0]
        row = self.db.execute("select d.at, d.seq, d.read_at, d.seen_at, d.hidden from messages m join deliveries d on "
                              "d.agent = ? and d.at = m.at and d.seq = m.seq where m.message_id = ?",
                              (key, event["message_id"])).fetchone()
        if not row:             # only a recipient reads; it may become one when a late registration arrives
            return self._wait_for(event["message_id"], event)
        if event["receipt_type"] not in ("read", "seen"):
            return              # of a newer version
        at, message, was_read, was_seen, hidden = row
        read_at = min(was_read or FAR, ns) if event["receipt_type"] == "read" else was_read
        seen_at = min(was_seen or FAR, ns) if event["receipt_type"] == "seen" else was_seen
        self.db.execute("update deliveries set read_at = ?, seen_at = ? where agent = ? and at = ? and seq = ?",
                        (read_at, seen_at, key, at, message))
        if read_at and not was_read:
            self._read_by[message] = self._read_by.get(message, 0) + 1
            if not hidden:
                self._count((key,), 0, -1)

    def _message_remove(self, event: dict, seq: int, ns: int) -> None:
        threads = set()
        for message_id in event["message_ids"]:
            self._gone(message_id)
            message = self.row("select * from messages where message_id = ?", message_id)
            if message:
                self._drop(message)
                threads.add(message["thread_id"])
        self._rethread(threads)

    def _message_route(self, event: dict, seq: int, ns: int) -> None:
        key = self._agent(event["agent_id"])[0]
        self.flush()
        for message_id in event["message_ids"]:
            if not self.db.execute(
                    "update deliveries set route = case when ifnull(pushed_at, ?) > ? then ? else route end, "
                    "pushed_at = min(ifnull(pushed_at, ?), ?) where (agent, at, seq) in (select ?, at, seq from messages where "
                    "message_id = ?)", (FAR, ns, event["route"], FAR, ns, key, message_id)).rowcount:
                self._wait_for(message_id, {**event, "message_ids": [message_id]})

    def _thread_create(self, event: dict, seq: int, ns: int) -> None:
        self.db.execute("insert into threads values(?, ?, ?, ?, ?) on conflict(thread_id) do update set title = excluded.title, "
                        "created_by = excluded.created_by, created_at = excluded.created_at, create_event = excluded.create_event "
                        "where (excluded.created_at, excluded.create_event) < (threads.created_at, threads.create_event)",
                        (event["thread_id"], event.get("title"), event.get("created_by"), ns, event["event_id"]))

    def _agent_register(self, event: dict, seq: int, ns: int) -> None:
        if event["agent_id"] in RESERVED_NAMES:
            return              # of a peer: nobody is to speak as the program
        key, removed_at = self._agent(event["agent_id"])
        self.db.execute("insert or ignore into roster values(?, ?, ?, ?)", (key, ns, event["event_id"], event["role"]))
        if ns > removed_at:
            self.db.execute(
                "update agents set kind = ?, role = ?, module = ?, name = ?, display = ?, hostname = ?, worktree = ?, daemon = ?, "
                "registered_at = ?, register_event = ? where agent = ? and (ifnull(registered_at, 0), ifnull(register_event, '')) "
                "< (?, ?)",
                (event["kind"], event["role"], event["module"], event.get("name"), event.get("display"), event.get("hostname"),
                 event.get("worktree"), event.get("origin_daemon"), ns, event["event_id"], key, ns, event["event_id"]))
            self._saw(key, ns)
        self._roster_changed(ns)

    def _agent_cleanup(self, event: dict, seq: int, ns: int) -> None:
        self._note_fence(event, ns)
        key, removed_at = self._agent(event["agent_id"])
        self.db.execute("insert or ignore into roster values(?, ?, ?, null)", (key, ns, event["event_id"]))
        self.db.execute("update agents set removed_at = max(removed_at, ?), registered_at = case when registered_at > ? then "
                        "registered_at end where agent = ?", (ns, ns, key))
        self._known.pop(event["agent_id"], None)
        threads = set()
        for message in self.rows("select * from messages where author = ? and at <= ?", key, ns):
            self._drop(message)
            threads.add(message["thread_id"])
        self._rethread(threads)
        for (session_id,) in self.db.execute("select session_id from sessions where agent = ? and started_at <= ?",
                                             (key, ns)).fetchall():
            self._drop_session(session_id)
        for (claim_id,) in self.db.execute("select claim_id from claims where agent = ? and granted_at <= ?", (key, ns)).fetchall():
            self._drop_claim(claim_id)
        self._roster_changed(ns)

    def _drop_session(self, session_id: str) -> None:
        self._sessions.clear()
        self._gone(session_id)
        for claim_id in self._claims_of(session_id):
            self._drop_claim(claim_id)
        for table in ("sessions", "session_scopes", "session_refs", "agent_work_contexts", "subscriptions"):
            self.db.execute(f"delete from {table} where session_id = ?", (session_id,))

    def _session_start(self, event: dict, seq: int, ns: int) -> None:
        self._sessions.clear()
        key, removed_at = self._agent(event["agent_id"])
        if ns <= removed_at or event["agent_id"] in RESERVED_NAMES or self._is_removed(event["session_id"]):
            return self._drop_session(event["session_id"])
        self.db.execute("insert or ignore into sessions(session_id, agent, started_at, last_seen_at, daemon) values(?, ?, ?, ?, ?)",
                        (event["session_id"], key, ns, ns, event.get("origin_daemon")))
        self._saw(key, ns)
        self._parent_came(event["session_id"])

    def _session_end(self, event: dict, seq: int, ns: int) -> None:
        self._sessions.clear()
        session = self.session(event["session_id"])
        if not session:
            return self._wait_for(event["session_id"], event)
        self.db.execute("update sessions set last_seen_at = max(last_seen_at, ?) where session_id = ?", (ns, event["session_id"]))
        if (ns, event["event_id"]) < (session["ended_at"] or FAR, session["end_event"] or ""):
            self.db.execute("update sessions set ended_at = ?, end_reason = ?, end_event = ? where session_id = ?",
                            (ns, event.get("reason") or "normal", event["event_id"], event["session_id"]))
        self.db.execute("delete from subscriptions where session_id = ?", (event["session_id"],))
        for claim_id in self._claims_of(event["session_id"]):
            self._judge_claim(claim_id)
        if session["started_at"] < self.cutoff():
            self._drop_session(event["session_id"])

    def _subscription_add(self, event: dict, seq: int, ns: int) -> None:
        scope = (pairs_of(event.get("scopes")) or [(None, None)])[0]
        self._subscription(event, *scope, event.get("mention"), event.get("all", False), ",".join(event.get("topics", ())), ns, 0)

    def _subscription_remove(self, event: dict, seq: int, ns: int) -> None:
        self._subscription(event, None, None, None, False, "", ns, 1)

    def _subscription(self, event: dict, *values) -> None:
        """Note that there is a subscription, or that there is none any more, until its session ends."""
        session = self.session(event["session_id"])
        if not session:
            return self._wait_for(event["session_id"], event)
        if not session["ended_at"]:
            what = "replace" if values[-1] else "ignore"
            self.db.execute(f"insert or {what} into subscriptions values(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                            (event["subscription_id"], event["session_id"], session["agent"], *values))

    def _session_update(self, event: dict, seq: int, ns: int) -> None:
        if not self.session(event["session_id"]):
            return self._wait_for(event["session_id"], event)
        key = self._agent(event["agent_id"])[0]
        self.db.execute("update sessions set updates = updates + 1 where session_id = ?", (event["session_id"],))
        self.db.execute("insert or ignore into agent_work_contexts(session_id, agent) values(?, ?)", (event["session_id"], key))
        for field, at in (("intent", "intent_updated_at"), ("current_task", "task_updated_at")):
            if field in event:
                self.db.execute(f"update agent_work_contexts set {field} = ?, {at} = ? where session_id = ? and "
                                f"ifnull({at}, '') < ?", (event[field] or None, stamp_of(ns), event["session_id"], stamp_of(ns)))
        for kind in ("scope", "ref"):
            if kind + "s" in event and self.db.execute(
                    f"update sessions set {kind}s_at = ? where session_id = ? and {kind}s_at < ?",
                    (ns, event["session_id"], ns)).rowcount:
                self.db.execute(f"delete from session_{kind}s where session_id = ?", (event["session_id"],))
                self.db.executemany(f"insert or ignore into session_{kind}s values(?, ?, ?)",
                                    [(event["session_id"], *pair) for pair in pairs_of(event[kind + "s"])])

    def _agent_update(self, event: dict, seq: int, ns: int) -> None:
        key = self._agent(event["agent_id"])[0]
        for context in event["work_contexts"]:
            if type(context) is not dict or type(context.get("session_id")) is not str:
                continue
            session_id = context["session_id"]
            if not self.session(session_id):
                self._wait_for(session_id, {**event, "work_contexts": [context]})
                continue
            if context is event["work_contexts"][0]:        # one event, whatever it holds
                self.db.execute("update sessions set updates = updates + 1 where session_id = ?", (session_id,))
            self.db.execute("insert or ignore into agent_work_contexts(session_id, agent) values(?, ?)", (session_id, key))
            for at, fields in (
                    ("git_updated_at", WORK_FACTS[:-1]),
                    ("intent_updated_at", ("intent",)), ("task_updated_at", ("current_task",))):
                try:
                    stamp = stamp_of(ns_of(context.get(at)))
                except ValueError:
                    continue
                values = [v if v is None or type(v) is str else canonical(v).decode() for v in map(context.get, fields)]
                self.db.execute(f"update agent_work_contexts set {' = ?, '.join(fields)} = ?, {at} = ? where session_id = ? "
                                f"and ifnull({at}, '') < ?", (*values, stamp, session_id, stamp))

    def _group_create(self, event: dict, seq: int, ns: int) -> None:
        self.db.execute(
            "insert into groups(group_id, created_by, created_at, create_event) values(?, ?, ?, ?) on conflict(group_id) do update "
            "set created_by = excluded.created_by, created_at = excluded.created_at, create_event = excluded.create_event "
            "where (excluded.created_at, excluded.create_event) < (ifnull(groups.created_at, ?), ifnull(groups.create_event, ''))",
            (event["group_id"], event.get("created_by"), ns, event["event_id"], FAR))
        self._group_fields(event, {"name": event["name"], "description": event.get("description", "")}, ns)

    def _group_update(self, event: dict, seq: int, ns: int) -> None:
        self.db.execute("insert or ignore into groups(group_id) values(?)", (event["group_id"],))
        if event["group_id"] != "grp_everyone":     # nobody changes it
            self._group_fields(event, event["fields"], ns)

    def _group_fields(self, event: dict, fields: dict, ns: int) -> None:
        for field in ("name", "description"):
            if type(fields.get(field)) is str:
                self.db.execute("insert or ignore into group_updates values(?, ?, ?, ?, ?)",
                                (event["group_id"], field, ns, event["event_id"], fields[field]))
                self.db.execute(f"update groups set {field} = ? where group_id = ?",
                                (self._group_field(event["group_id"], field), event["group_id"]))
        self._roster_changed(ns)

    def _group_delete(self, event: dict, seq: int, ns: int) -> None:
        if event["group_id"] == "grp_everyone":
            return              # nobody deletes it
        self.db.execute("insert into groups(group_id, deleted_at) values(?, ?) on conflict(group_id) do update set "
                        "deleted_at = min(ifnull(deleted_at, excluded.deleted_at), excluded.deleted_at)", (event["group_id"], ns))
        self._roster_changed(ns)

    def _group_member(self, event: dict, seq: int, ns: int) -> None:
        present = event["type"] == "group.member.add"
        self.db.execute("insert or ignore into group_members values(?, ?, ?, ?, ?, ?, ?)",
                        (event["group_id"], event["member_type"], event["member_value"], ns, event["event_id"], present,
                         event.get("added_by")))
        self._roster_changed(ns)

    def _purge_executed(self, event: dict, seq: int, ns: int) -> None:
        self._note_fence(event, ns)
        try:
            cutoff = min(ns_of(event["cutoff"]), ns)        # never in the future: it would swallow what is to come
        except ValueError:
            return
        if cutoff <= self.cutoff():
            return
        self.set_meta(purge_cutoff=cutoff)
        self._cutoff = cutoff
        for table, at in (("tasks", "updated_at"), ("task_events", "at"), ("telemetry", "at")):
            if self.db.execute(f"delete from {table} where {at} < ?", (cutoff,)).rowcount:
                self._note_untidy()
        self.flush()
        for key, total, unread in self.db.execute("select agent, count(*), sum(read_at is null) from deliveries where at < ? and "
                                                  "not hidden group by agent", (cutoff,)).fetchall():
            self._count([key], -total, -unread)
        self.db.execute("insert or ignore into removed(id) select message_id from messages where at < ? order by at desc limit ?",
                        (cutoff, REMOVED_MAX))
        self.db.execute("delete from pending where parent in (select message_id from messages where at < ?)", (cutoff,))
        self._removals = None
        self.db.execute("delete from message_edits where seq in (select seq from messages where at < ?)", (cutoff,))
        threads = {row[0] for row in self.db.execute("select distinct thread_id from messages where at < ?", (cutoff,))}
        for table in ("deliveries", "message_scopes", "message_refs", "messages"):
            dropped = self.db.execute(f"delete from {table} where at < ?", (cutoff,)).rowcount
        if dropped:
            self._rethread(threads)
            self._clear_index()             # one by one would take longer than to index what is left
            self._note_untidy()
        for (session_id,) in self.db.execute("select session_id from sessions where started_at < ? and ended_at is not null",
                                             (cutoff,)).fetchall():
            self._drop_session(session_id)
        for (claim_id,) in self.db.execute("select claim_id from claims where granted_at < ? and not open", (cutoff,)).fetchall():
            self._drop_claim(claim_id)

    def _claims_of(self, session_id: str) -> list:
        return [claim_id for (claim_id,) in self.db.execute("select claim_id from claims where session_id = ?", (session_id,))]

    def _judge_claim(self, claim_id: str) -> None:
        """Work out whether a claim is open; one that is not, from before the last purge, goes."""
        self.db.execute(
            "update claims set open = case when released_at is not null or exists(select 1 from sessions s where s.session_id = "
            "claims.session_id and s.ended_at is not null) then 0 when exists(select 1 from claim_lapses l where l.claim_id = "
            "claims.claim_id and l.renewal = claims.renew_event) then 2 else 1 end where claim_id = ?", (claim_id,))
        if self.value("select 1 from claims where claim_id = ? and not open and granted_at < ?", claim_id, self.cutoff()):
            self._drop_claim(claim_id)

    def _drop_claim(self, claim_id: str) -> None:
        self._gone(claim_id)
        for table in ("claims", "claim_lapses"):
            self.db.execute(f"delete from {table} where claim_id = ?", (claim_id,))

    def _expires(self, event: dict, ns: int) -> int:
        """When the time of a grant or renewal passes here: it runs from now, for one made here from then.

        A stamp may be ahead of the clock, because it is later than what it refers to.
        """
        now = self.world.now_ns()
        return (min(now, ns) if event.get("origin_daemon") == self.own else now) + event["ttl_s"] * NS

    def _claim_take(self, event: dict, seq: int, ns: int) -> None:
        claim_id, session_id = event["claim_id"], event.get("session_id")
        key, removed_at = self._agent(event["agent_id"])
        self._saw(key, ns)
        if ns <= removed_at or self._is_removed(claim_id) or (session_id and self._is_removed(session_id)):
            return self._gone(claim_id)
        self.db.execute(
            "insert or ignore into claims(claim_id, agent, session_id, path, shared, granted_at, grant_event, ttl_s, note, renewed_at, "
            "renew_event, expires_at, daemon) values(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (claim_id, key, session_id, event["path"], bool(event.get("shared")), ns, event["event_id"], event["ttl_s"],
             event.get("note"), ns, event["event_id"], self._expires(event, ns), event.get("origin_daemon")))
        self._judge_claim(claim_id)
        self._parent_came(claim_id)

    def _claim_renew(self, event: dict, seq: int, ns: int) -> None:
        claim = self.claim(event["claim_id"])
        if not claim:
            return self._wait_for(event["claim_id"], event)
        self._saw(self._agent(event["agent_id"])[0], ns)
        if (ns, event["event_id"]) > (claim["renewed_at"], claim["renew_event"]):
            self.db.execute("update claims set ttl_s = ?, note = ?, renewed_at = ?, renew_event = ?, expires_at = ? where claim_id = ?",
                            (event["ttl_s"], event.get("note"), ns, event["event_id"], self._expires(event, ns), event["claim_id"]))
            self._judge_claim(event["claim_id"])

    def _claim_release(self, event: dict, seq: int, ns: int) -> None:
        claim = self.claim(event["claim_id"])
        if not claim:
            return self._wait_for(event["claim_id"], event)
        if (ns, event["event_id"]) < (claim["released_at"] or FAR, claim["release_event"] or ""):
            self.db.execute("update claims set released_at = ?, release_event = ?, release_reason = ?, superseded_by = ? where "
                            "claim_id = ?", (ns, event["event_id"], event.get("reason"), event.get("superseded_by"), event["claim_id"]))
        self._judge_claim(event["claim_id"])

    def _claim_lapse(self, event: dict, seq: int, ns: int) -> None:
        if not self.claim(event["claim_id"]):
            return self._wait_for(event["claim_id"], event)
        self.db.execute("insert or ignore into claim_lapses values(?, ?)", (event["claim_id"], event["renewal"]))
        self._judge_claim(event["claim_id"])


_MESSAGE = ("m.seq, m.message_id, m.at, a.agent_id, m.session_id, m.thread_id, m.reply_to, m.format, m.content, m.structured, "
            "m.scopes, m.refs, m.delivered, m.wide, m.updated_at, m.deleted_at, m.delete_reason, m.authored_by, m.disclosed")
_MESSAGES = f"select {_MESSAGE} from messages m join agents a on a.agent = m.author where"
_CLAIMS = ("select c.*, a.agent_id, a.last_seen_at, case when a.registered_at is not null then a.hostname end as hostname from claims c "
           "join agents a on a.agent = c.agent where")
_EVENT_ROW = "insert into events values(?, ?)"
_SCOPE_ROW = "insert or ignore into message_scopes values(?, ?, ?, ?)"
_REF_ROW = "insert or ignore into message_refs values(?, ?, ?, ?)"
_DELIVERY_ROW = "insert or ignore into deliveries(agent, at, seq, hidden) values(?, ?, ?, ?)"
_PROJECTIONS = {
    "message.create": Store._message_create, "message.edit": Store._message_edit, "message.delete": Store._message_delete,
    "message.receipt": Store._message_receipt, "message.remove": Store._message_remove,
    "message.route": Store._message_route, "thread.create": Store._thread_create,
    "agent.register": Store._agent_register, "agent.cleanup": Store._agent_cleanup, "agent.update": Store._agent_update,
    "agent.session.start": Store._session_start, "agent.session.end": Store._session_end,
    "session.update": Store._session_update, "group.create": Store._group_create, "group.update": Store._group_update,
    "group.delete": Store._group_delete, "group.member.add": Store._group_member, "group.member.remove": Store._group_member,
    "purge.executed": Store._purge_executed, "claim.take": Store._claim_take, "claim.renew": Store._claim_renew,
    "claim.release": Store._claim_release, "claim.lapse": Store._claim_lapse,
    "subscription.add": Store._subscription_add, "subscription.remove": Store._subscription_remove,
}


# ================================================================== 10  Ledger
#
# Everything that changes goes through `commit`, which takes the requests that have come meanwhile as one batch:
#
#     BEGIN; for each request: decide, make events, apply them; append all lines to the journal; one sync;
#     COMMIT with the sequence reached; then tell everybody.
#
# What a crash leaves: before the sync, nothing that was promised; between sync and COMMIT, lines that the next
# start applies; after COMMIT, lines that the branch files may lack, which the next start adds.

BATCH_MAX = 256                 # requests in one batch: bounds how long the first of them waits
INDEX_STEP = 500                # messages brought into the full-text index at a time: others wait for some 20 ms
OVERDUE_S = 15 * 60             # seconds for which a recipient was here without reading its mail, before the sender is told
EXPORT_MAX = 512                # lines that may wait for their branch file
TIDY_AT_ONCE_S = 2              # seconds that a purge may hold up others; the rest is done when nothing else is
UNTIDY_SINCE = 2                # of the mark in the database: files are being rewritten; 1: something was removed
TOMBSTONES = ("purge.executed", "agent.cleanup", "message.remove")
ABOUT_REMOVABLE = ("message.create", "message.edit", "message.delete", "message.receipt", "agent.session.start",
                   "agent.session.end", "session.update", "agent.update", "claim.take", "claim.renew", "claim.release", "claim.lapse",
                   "subscription.add", "subscription.remove")


class Context:
    """What a method may touch: the store, and for one that changes something, `append`."""

    def __init__(self, world: World, store: Store, ledger: Ledger):
        self.world = world
        self.store = store
        self.ledger = ledger
        self.lines = []         # (line, event, ns) that this request has made
        self.afterwards = []    # what is to be done once that is durable
        self.prepared = None    # what the method's `prepare` has found out

    def append(self, kind: str, /, *, after: int = 0, above: str = "", **fields) -> dict:
        """Make an event, later than `after` (ns) and with an id above another one, and apply it; empty optional fields are left out.

        Raises InvalidParams for what JSON in UTF-8 cannot hold, ThrumError for a line longer than LINE_MAX.
        """
        row = EVENTS[kind]
        event = {k: v for k, v in fields.items()
                 if v is not None and (k in row.fields or row.empty or v not in ("", False, []))}
        if above:               # which may be of a clock that is ahead: `is_fence` holds for what is made here, too
            after = max(after, (ulid_ms(above) + 1) * 1_000_000 - FENCE_AHEAD_S * NS)
        ns = self.world.stamp_ns(max(after, self.store.cutoff()))      # who has purged may have a clock that is ahead of ours
        event.update(type=kind, timestamp=stamp_of(ns), event_id=self.world.new_id("evt", above), v=1,
                     origin_daemon=self.ledger.daemon_id, sequence=self.next_seq())
        try:
            line = canonical(event)
            check_event(event)  # what it refuses would be a bad line at the next start
        except UnicodeEncodeError:
            raise InvalidParams("the text is not valid UTF-8") from None
        except ValueError as error:
            raise InvalidParams(f"this cannot be stored: {error}") from None
        if len(line) > LINE_MAX:
            raise ThrumError(f"this is too large: {len(line):,} bytes with its envelope, the limit is {LINE_MAX:,}; "
                             "put the content into a file in the repository and send its path")
        self._apply(line, event, ns)
        return event

    def adopt(self, line: bytes) -> bool:
        """Take in a line of another daemon's log; False when it is known.  Raises ValueError for one that is damaged."""
        event, ns = parse_line(line)
        if self.store.known_events([event["event_id"]]):
            return False
        self._apply(line, event, ns)
        return True

    def _apply(self, line: bytes, event: dict, ns: int) -> None:
        if event["type"] in TOMBSTONES:
            self.store.limit(FAR)           # it takes as long as there is to remove: cut short, it would never succeed
        self.store.apply(event, self.next_seq(), ns, fresh=True)
        self.lines.append((line, event, ns))

    def next_seq(self) -> int:
        """The number in the journal that the next event gets."""
        return self.ledger.journal.last + len(self.ledger.batch) + len(self.lines) + 1


def _is_of_the_disk(error: Exception) -> bool:
    """Whether an error comes from the machine, not from the event or request that was looked at."""
    return isinstance(error, (OSError, MemoryError, sqlite3.OperationalError)) or type(error) is sqlite3.DatabaseError


class _Undo(Exception):
    """A request has to be undone, and there is no savepoint."""


class Ledger:
    """The log and its projection, and the one way to change them.  One per repository, under the daemon's lock."""

    def __init__(self, places: Places, world: World):
        self.places = places
        self.world = world
        self.facts = {}         # of the daemon: when it started (monotonic s), how to stop it
        self.progress = lambda: None
        self.batch = []         # (line, event, ns) of the batch in progress
        self.afterwards = []    # functions to call once it is durable
        self.appended = {}      # what its requests have appended to files of their own -> the size before
        self.seen = {}          # agent id -> when it was heard of (ns), until `note_presence`
        self.queue = set()      # the Tickets of those who wait for a claim: the daemon's loop puts them in and takes them out
        self.late = {}          # agent key -> the time (ns) up to which unread mail is overdue
        self.export = []        # (stem, line) that wait for their branch file
        self.incomplete = False # whether branch files lack lines since `branch_seq`
        self.export_problem = ""
        self._indexed_all = None    # what this batch has found out about that
        self._index_failed = False  # whether it could not be written
        self.unindexed = True   # whether messages may be missing in the full-text index
        self.untidy = False     # whether bytes of removed messages are still to be freed
        self._to_tidy = None    # the files that are still to be looked at for that
        self._shrunk = False    # whether the database is smaller already, and its write-ahead log is not empty yet
        self.generation = 0     # rises when the database was replaced: readers open it again
        self.bad_lines = BadLines(places.bad_lines)
        self.journal = Journal(places.journal, world, self.bad_lines)
        self.history = History(self.journal)
        self.branch = Branch(places.sync)
        self.store = None
        self.rebuilt = 0        # events that the last opening of the database had to project

    # ---- opening and closing

    def open(self, repo_id: str = "", progress=lambda: None) -> None:
        """Bring journal, database and branch files into one state, whatever a crash has left of them.

        Calls `progress()` now and then while that takes its time.
        """
        self.progress = progress
        os.makedirs(self.places.var, mode=0o700, exist_ok=True)
        clean = self._take_clean_mark()
        if not self.journal.open():
            if os.listdir(self.places.journal):
                self.journal.set_aside()
            self.journal.create()
            self.journal.mended = True
        self._read_ids(repo_id)
        self._open_store(clean)
        if self.journal.mended or not self.store.meta("imported"):
            self.store.set_meta(imported=0)     # a crash before the end: the next start begins again
            self._import_files()
            self.store.set_meta(imported=1)
        present = self.branch.measure()
        if any(present.get(path, -1) < size for path, size in json.loads(self.store.meta("branch_sizes", "{}")).items()):
            self.store.set_meta(branch_seq=0)       # somebody removed files, or their ends
            self.incomplete = True
        if not self.store.group(EVERYONE):
            self._create_everyone()
        self.flush(sync=True)
        self._remove_leftovers()
        self.untidy, self.late = self.store.is_untidy(), self.store.idle_since(OVERDUE_S)
        self.progress = lambda: None    # whoever wanted to know has gone

    def close(self) -> None:
        """Write everything out and leave a mark that nothing needs to be checked at the next start."""
        self.flush(sync=True)
        self.store.checkpoint()
        self.store.close()
        self.journal.close()
        if not self.incomplete:
            atomic_write(self.places.var + "/clean.json", canonical(self._clean_mark()))

    def _clean_mark(self) -> dict:
        database = os.stat(self.places.database)
        return {"epoch": self.journal.epoch, "last": self.journal.last, "journal_size": self.journal.size,
                "database_size": database.st_size, "database_mtime_ns": database.st_mtime_ns,
                "database_inode": database.st_ino}

    def _take_clean_mark(self) -> dict:
        path = self.places.var + "/clean.json"
        try:
            with open(path, "rb") as file:
                mark = decode_object(file.read(4096))
            os.unlink(path)
            sync_directory(self.places.var)
            return mark
        except (OSError, ValueError):
            return {}

    def _read_ids(self, repo_id: str) -> None:
        """This daemon's id, and the repository's where git has none: made once, kept in `daemon.json`."""
        path = self.places.var + "/daemon.json"
        try:
            with open(path, "rb") as file:
                ids = decode_object(file.read(4096))
        except (FileNotFoundError, ValueError):
            ids = {}
        before = dict(ids)
        if type(ids.get("daemon_id")) is not str:
            ids["daemon_id"] = "d_" + crockford(int.from_bytes(self.world.random(8), "big") >> 4, 12).lower()
        if not repo_id and type(ids.get("repo_id")) is not str:
            ids["repo_id"] = repo_id_of(self.world.random(16).hex())
        if ids != before:
            atomic_write(path, canonical(ids) + b"\n")
        self.daemon_id, self.repo_id = ids["daemon_id"], repo_id or ids["repo_id"]

    def _open_store(self, clean: dict) -> None:
        """Open the database if it agrees with the journal, else make it anew; then project what it lacks."""
        trusted = False
        try:
            trusted = bool(clean) and clean == self._clean_mark()
            self.store = Store(self.places.database, self.world, writable=True, own=self.daemon_id)
            self.store.meanwhile(self.progress)
            if not self._agrees(trusted):
                raise sqlite3.DatabaseError("does not agree with the journal")
        except (sqlite3.Error, OSError):
            trusted = False
            self._remove_database()
            self.store = Store(self.places.database, self.world, writable=True, own=self.daemon_id)
            self.store.create()
            self.store.set_meta(epoch=self.journal.epoch)
        os.chmod(self.places.database, 0o600)
        self.store.watch()
        self.store.prepare_search()
        self.rebuilt = self._project_from(self.store.reached()[0])
        self.world.seen(self.store.reached()[2])
        self.incomplete = not trusted   # the branch files may lack lines
        self.generation += 1            # only now: a reader that opens it reads all of it

    def _remove_database(self) -> None:
        if self.store:
            self.store.close()
        for suffix in ("", "-wal", "-shm"):
            remove(self.places.database + suffix)

    def _agrees(self, trusted: bool) -> bool:
        store = self.store
        if not (store.is_current() if trusted else store.is_sound()) or store.meta("epoch") != self.journal.epoch:
            return False
        seq, event_id, _ = store.reached()
        if trusted or seq == 0:
            return True
        found, line = next(self.journal.read(seq - 1), (0, b"")) if seq <= self.journal.last else (0, b"")
        return found == seq and (not line or event_id.encode() in line)         # or its bytes were freed

    def _project_from(self, after: int) -> int:
        """Apply the events after a sequence in transactions of STORE_BATCH; their count."""
        count, batch = 0, []
        self.store.careless(True)
        for sequence, line in self.journal.read(after):
            batch.append((sequence, line))
            if len(batch) == STORE_BATCH:
                self._project_batch(batch)
                self.progress()
                count, batch = count + len(batch), []
        if batch:
            self._project_batch(batch)
        self.store.careless(False)
        return count + len(batch)

    def _project_batch(self, batch: list) -> None:
        """One transaction of a rebuild; when an event in it breaks, again with each event on its own."""
        try:
            self._project_events(batch, careful=False)
        except Exception as error:
            if _is_of_the_disk(error):
                raise
            self.store.rollback()
            self._project_events(batch, careful=True)

    def _project_events(self, batch: list, careful: bool) -> None:
        store, own, events = self.store, self.daemon_id, []
        for sequence, line in batch:
            try:
                events.append((sequence, line, *parse_line(line)))
            except ValueError as error:
                if line and not careful:
                    self.bad_lines.add(f"journal:{sequence}", line, str(error))
        store.begin()
        _, event_id, newest = store.reached()
        known = store.known_events([event["event_id"] for _, _, event, _ in events])
        for sequence, line, event, ns in events:
            if event["event_id"] in known:
                continue
            known.add(event["event_id"])
            if careful:
                store.save_point()
                try:
                    store.apply(event, sequence, ns, fresh=True)
                    store.keep()
                except Exception as error:
                    if _is_of_the_disk(error):
                        raise
                    store.undo()
                    self.bad_lines.add(f"journal:{sequence}", line, f"cannot be projected: {error}")
            else:
                store.apply(event, sequence, ns, fresh=True)
            event_id = event["event_id"]
            if ns > newest and event.get("origin_daemon") == own:
                newest = ns
        store.settle()
        store.set_reached(batch[-1][0], event_id, newest)
        store.commit()

    def _import_files(self) -> None:
        """Take in what the branch files, or a journal set aside, hold and the journal does not."""
        found = {}              # event id -> (ns, line)

        def look(file, lines):
            self.progress()
            ids = {}
            for line in lines:
                match = re.search(rb'"event_id":"([^"\\]*)"', line)
                ids.setdefault(match[1].decode(errors="replace") if match else line, line)
            present = self.store.known_events([event_id for event_id in ids if type(event_id) is str])
            for event_id, line in ids.items():
                if event_id in present or event_id in found:
                    continue
                try:
                    event, ns = parse_line(line)
                    found.setdefault(event["event_id"], (ns, line))
                except ValueError as error:
                    if line and not line.startswith(b'{"epoch"'):
                        self.bad_lines.add(file, line, str(error))

        for file in log_files(self.places.journal + ".damaged") + log_files(self.places.sync):
            lines = []
            for line in read_lines(file):
                lines.append(line)
                if len(lines) == STORE_BATCH:
                    look(file, lines)
                    lines = []
            look(file, lines)
        known = self.store.known_events
        found = [(ns, event_id, line) for event_id, (ns, line) in found.items() if not known([event_id])]
        found.sort()
        for start in range(0, len(found), STORE_BATCH):
            before = self.journal.last
            self.journal.append([line for _, _, line in found[start:start + STORE_BATCH]])
            self._project_from(before)

    def _complete_branch(self) -> None:
        """Write what the branch files lack of the journal: they are not synced with each message."""
        events = {}
        for _, line in self.journal.read(self.store.meta("branch_seq", 0)):
            try:
                event, _ = parse_line(line)
            except ValueError:
                continue
            stem = self._stem(event)
            if stem:
                events.setdefault(stem, []).append((event["event_id"].encode(), line))
        for stem, lines in events.items():
            self.progress()
            present = set()
            for path in self.branch.files(stem):
                self._mend_tail(path)
                with open(path, "rb") as file:
                    present.update(re.findall(rb'"event_id":"([^"]*)"', file.read()))
            self.branch.append([(stem, line) for event_id, line in lines if event_id not in present])
        self.incomplete, self.export_problem = False, ""

    def _mend_tail(self, path: str) -> None:
        """Cut an unfinished last line off a branch file; its event is in the journal or was never acknowledged."""
        with open(path, "rb+") as file:
            data = file.read()
            end = data.rfind(b"\n") + 1
            if end < len(data):
                self.bad_lines.add(path, data[end:], "torn at the end of the file")
                file.truncate(end)

    def _stem(self, event: dict) -> str:
        """The stem of the branch file for an event, "" when it stays in the journal."""
        kind = EVENTS.get(event["type"])
        if kind and not kind.shared:
            return ""
        author = event.get("agent_id")
        if kind and kind.file == "author" and event["type"] != "message.create":
            message = self.store.message(event["message_id"])
            author = message and message["agent_id"]
        return stem_of(event, author)

    def _create_everyone(self) -> None:
        """The built-in group, as two events, because the reference wants to find them in the log."""
        def decide(context):
            event = context.append("group.create", group_id="grp_everyone", name=EVERYONE, description="All agents",
                                   created_by="system")
            context.append("group.member.add", after=ns_of(event["timestamp"]), group_id="grp_everyone", member_type="role",
                           member_value="*", added_by="system")
        (outcome,), _ = self.commit([decide])
        if isinstance(outcome, Exception):
            raise outcome

    # ---- changing

    def commit(self, requests: list, careful: bool = False, again: bool = False) -> tuple:
        """Carry out requests, functions of a Context, as one batch: (outcomes, events).

        An outcome is what the request returned, or the exception that it raised; a request that raises leaves
        nothing behind.  The events are pairs of sequence and event, durable when this returns.

        A request that raises after it has changed something is rare, so savepoints are only made when that has
        happened: the batch is then carried out once more, `careful`.  A damaged database is made anew, and the
        batch carried out `again`.
        """
        self.batch, self.afterwards, self._indexed_all, outcomes = [], [], None, []
        self.store.joined = set()
        for path, size in self.appended.items() if careful or again else ():
            os.truncate(path, size)     # what the requests have appended when they were carried out before
        self.appended = {}
        try:
            self.store.begin()
            for request in requests:
                outcomes.append(self._carry_out(request, careful))
            if self.batch:
                self.store.settle()
                last = self.journal.last + len(self.batch)
                own = [ns for _, event, ns in self.batch if event.get("origin_daemon") == self.daemon_id] or [self.store.reached()[2]]
                self.store.set_reached(last, self.batch[-1][1]["event_id"], own[-1])
                lines = [line for line, _, _ in self.batch]
                self.journal.append(lines)
                try:
                    self.store.commit()
                except sqlite3.Error:
                    self.journal.take_back(lines)
                    raise
            else:
                self.store.commit()
        except _Undo:
            self.store.rollback()
            return self.commit(requests, careful=True, again=again)
        except (OSError, sqlite3.Error) as error:
            self.batch = []
            if type(error) is sqlite3.DatabaseError and not again:      # malformed, or no database at all
                if not self.heal():
                    self.store.rollback()
                return self.commit(requests, careful, again=True)
            self.store.rollback()
            problem = ThrumError(f"nothing was stored: {os_problem(error) if isinstance(error, OSError) else error}")
            return [o if isinstance(o, ThrumError) else problem for o in outcomes] + \
                   [problem] * (len(requests) - len(outcomes)), []
        if self.batch:
            self.unindexed, self._index_failed = True, False
        elif self._indexed_all is not None:     # only now: whoever searches relies on what is committed
            self.unindexed = not self._indexed_all
        first = self.journal.last - len(self.batch) + 1
        events = [(first + i, event) for i, (_, event, _) in enumerate(self.batch)]
        try:
            stems = [(self._stem(event), line) for line, event, _ in self.batch]
            self.export += [(stem, line) for stem, line in stems if stem]
        except sqlite3.Error:   # it is stored; the files are completed from the journal
            self.incomplete = True
        self.batch = []
        if len(self.export) > EXPORT_MAX:
            self.flush()
        for function in self.afterwards:
            try:
                function()
            except Exception:   # what was asked for is done and durable; this was only the tidying up after it
                logging.getLogger("thrum").exception("tidying up after a request failed")
        if self.store.untidy:
            self.untidy, self._to_tidy, self._shrunk, self.store.untidy = True, None, False, False
            self.tidy(TIDY_AT_ONCE_S)   # so that whoever asked for it hears that it is done
        return outcomes, events

    def _carry_out(self, request, careful: bool):
        store, context = self.store, Context(self.world, self.store, self)
        if careful:
            store.save_point()
        before = store.changes()
        store.limit(QUERY_S)
        try:
            reply = request(context)
        except Exception as error:      # a bug in one request must not harm the others
            if type(error) is sqlite3.DatabaseError or not store.db.in_transaction:
                raise           # damaged, or the disk is full: this ends the batch
            if careful:
                store.undo()
            elif store.changes() != before:
                raise _Undo from None
            return ThrumError(f"nothing was stored: {error}") if isinstance(error, sqlite3.OperationalError) else error
        finally:
            store.limit(FAR)
        if careful:
            store.keep()
        self.batch += context.lines
        self.afterwards += context.afterwards
        return reply

    def note_presence(self) -> None:
        """Write down who was heard of, and work out whose unread mail is overdue.  In a transaction: a request calls it."""
        seen, self.seen = self.seen, {}
        self.store.note_presence(dict(seen))    # a copy: the loop's thread may still hold the old one
        self.late = self.store.idle_since(OVERDUE_S)

    def restless(self) -> bool:
        """Whether `idle` has something to do."""
        return bool(self.export or self.untidy or (self.unindexed and not self._index_failed))

    def idle(self) -> None:
        """A little of what can wait until nothing else is to be done."""
        self.flush()
        if self.untidy:
            self.tidy()
        elif self.unindexed and not self._index_failed:
            (outcome,), _ = self.commit([lambda context: self.index(INDEX_STEP)])
            if isinstance(outcome, Exception):
                self._index_failed = True   # a full disk: until the next message, or search
                raise outcome

    def index(self, limit: int) -> None:
        """Bring so many messages into the full-text index.  In a transaction: a request calls it."""
        self._indexed_all = not self.store.index_messages(limit)

    def flush(self, sync: bool = False) -> None:
        """Write waiting lines to the branch files; with `sync`, make them durable and remember how far.

        Where that fails (a full disk) nothing is lost: the journal has the lines, and the next flush that syncs, or
        the next start, completes the files from it.
        """
        export, self.export = self.export, []
        try:
            if self.incomplete and sync:
                self._complete_branch()
            elif export and not self.incomplete:
                self.branch.append(export)
            if sync:
                self.branch.sync()
                if self.store.meta("branch_seq", 0) != self.journal.last:
                    self.store.set_meta(branch_seq=self.journal.last, branch_sizes=canonical(self.branch.measure()).decode())
        except (OSError, sqlite3.Error) as error:
            self.incomplete = True
            self.export_problem = os_problem(error) if isinstance(error, OSError) else str(error)
            logging.getLogger("thrum").warning("the branch files are behind: %s", self.export_problem)
            if type(error) is sqlite3.DatabaseError:
                if self.store.db.in_transaction:
                    raise       # `commit` heals it and comes again
                if self.heal():
                    self.flush(sync)

    def tidy(self, seconds: float = 0) -> bool:
        """Free the bytes of what was purged, archived or deleted: one file, and more for so long; whether some are left.

        Each file is replaced whole, and what a crash leaves undone is done after the next start.
        """
        give_up_at = self.world.monotonic() + seconds
        try:
            if self._to_tidy is None:
                self.flush(sync=True)
                self.store.set_meta(untidy=UNTIDY_SINCE)    # what is removed from now on says so again
                self._remove_leftovers()
                shutil.rmtree(self.places.journal + ".damaged", ignore_errors=True)
                remove(self.places.bad_lines)   # it may hold halves of what is to be gone
                # The branch files first, because the journal's lines take their ids with them; of a stem the last file first,
                # because one that is empty goes unless another follows.
                files = sorted(log_files(self.places.sync), key=lambda path: (len(path), path), reverse=True)
                self._to_tidy = [*files, *self.journal.firsts()]
            while self._to_tidy:
                self._tidy_file(self._to_tidy.pop(0))
                if self.world.monotonic() > give_up_at:
                    return True
            self.store.set_meta(branch_sizes=canonical(self.branch.measure()).decode())
            if not self._shrunk and not self.store.shrink():
                self._shrunk = True             # a reader is in the middle of something; only the log is left to be emptied
                return True
            if self._shrunk and not self.store.checkpoint():
                return True
            self.unindexed = True
            again = self.store.meta("untidy") != UNTIDY_SINCE   # more was removed: some of it from files that were done already
            if not again:
                self.store.set_meta(untidy=0)
            self._to_tidy, self._shrunk, self.untidy = None, False, again
        except (OSError, sqlite3.Error) as error:       # a full disk: what was removed is removed, the bytes can wait
            self.store.rollback()
            self._to_tidy, self._shrunk, self.untidy = None, False, False   # until the next start, or the next purge
            logging.getLogger("thrum").warning("the space of removed messages was not freed: %s", error)
        return self.untidy

    def _remove_leftovers(self) -> None:
        """Remove the temporary files of writes that a crash has cut short: they hold all that the file held then."""
        for folder in (self.places.journal, self.places.sync, self.places.sync + "/messages"):
            for name in os.listdir(folder) if os.path.isdir(folder) else ():
                if name[0] == "." and name.endswith(".tmp"):
                    remove(f"{folder}/{name}")

    def _tidy_file(self, which) -> None:
        """Empty the lines of removed messages and sessions in a branch file (its path) or journal file (its first sequence)."""
        obsolete = set()

        def without(lines):
            kept = []
            for start in range(0, len(lines), STORE_BATCH):
                chunk, events = lines[start:start + STORE_BATCH], []
                for line in chunk:
                    try:
                        event = decode_object(line)
                    except ValueError:
                        event = {}          # damaged: for a person to look at
                    events.append(event if event.get("type") in ABOUT_REMOVABLE and type(event.get("event_id")) is str else {})
                gone = self.store.obsolete([event for event in events if event])
                kept += [b"" if event.get("event_id") in gone else line for line, event in zip(chunk, events)]
                obsolete.update(gone)
            return kept

        if type(which) is str:
            return self.branch.rewrite(which, without)
        self.journal.rewrite(which, without)
        self.store.forget_events(obsolete)      # only now: without their ids they would be taken for events of somebody else

    def unsynced(self) -> bool:
        """Whether branch files were written that a power cut could still take back."""
        return bool(self.export or self.incomplete or self.branch.dirty)

    def heal(self) -> bool:
        """Make the database anew if it is damaged; whether it was."""
        try:
            fresh = Store(self.places.database, self.world)     # our own connection may not have read the damaged pages
            try:
                if fresh.is_sound():
                    return False
            finally:
                fresh.close()
        except sqlite3.DatabaseError:
            pass
        self._remove_database()
        self._open_store({})
        return True


# ================================================================== 11  Work
#
# What agents do is read from git, and nothing is written to it.  `git status` says what is uncommitted; what a branch has
# that its base lacks depends on two commits alone, so that is remembered.  An agent that edits costs a status and a diff of
# the files it has changed.  Paths are bytes on the way to the disk, and text everywhere else.

WORK_FILES = 500                # files in a list of a work context: more are not work, but a forgotten ignore line
WORK_COMMITS = 200              # commits that are listed
COMMIT_FILES = 100              # files of one commit
SUBJECT_MAX = 200               # characters of its subject: git's own advice is fifty
PATHS_GIVEN = 200               # changed paths that git is asked about one by one; beyond, it looks at all
COUNTED_MAX = 1 << 20           # bytes of a new file whose lines are counted
AHEAD_KEPT = 100_000            # changed files that are remembered for pairs of commits: some tens of megabytes

# The branch that work is compared with, the first that there is.
BASES = (*(f"refs/remotes/origin/{name}" for name in ("HEAD", "main", "master", "trunk")),
         *(f"refs/heads/{name}" for name in ("main", "master", "trunk")))
# Of a submodule only which commit it is at: its settings lie in the worktree, and may name programs for git to run.
NO_SUBMODULES = ("--ignore-submodules=dirty",)
STATUS_WORDS = {"A": "added", "C": "added", "D": "deleted", "R": "renamed"}     # and "modified" for all others
_FIELDS_BEFORE_PATH = {"1": 8, "2": 9, "u": 10, "?": 1}     # git-status(1): changed, renamed, unmerged, untracked


class Entry(Record):
    """One path that is not committed as it stands."""

    raw: bytes
    status: str                 # added, deleted, modified or renamed
    tracked: bool = True
    before: bytes = b""         # what it was renamed from

    path = property(lambda self: path_text(self.raw))


class State(Record):
    """What `git status` says about a worktree."""

    head: str                   # the commit, "" before the first
    branch: str                 # "" when the head is detached
    entries: list


class Ahead(Record):
    """What a commit has that its base lacks."""

    since: str = ""             # the merge base, "" without one
    commits: list = []          # {sha, message, files}, the newest first
    changes: dict = {}          # path -> FileChange


def path_text(raw: bytes) -> str:
    """A path as JSON can hold it: what is not UTF-8 becomes U+FFFD."""
    return raw.decode(errors="replace")


def parse_status(data: bytes) -> State:
    """The output of `git status --porcelain=v2 --branch -z`."""
    branch, head, found, parts = "", "", [], iter(data.split(b"\0"))
    for part in parts:
        kind = part[:1].decode(errors="replace")
        if part.startswith(b"# branch.head "):
            branch = path_text(part[14:]) if part[14:] != b"(detached)" else ""
        elif part.startswith(b"# branch.oid "):
            head = part[13:].decode().replace("(initial)", "")
        elif kind in _FIELDS_BEFORE_PATH:
            fields = part.split(b" ", _FIELDS_BEFORE_PATH[kind])
            xy = "A" if kind == "?" else fields[1].decode()
            letter = next((c for c in "DRCA" if c in xy), "M") if kind != "u" else "M"
            found.append(Entry(fields[-1], STATUS_WORDS.get(letter, "modified"), kind != "?", next(parts) if kind == "2" else b""))
    return State(head, branch, found)


def parse_changes(data: bytes) -> dict:
    """The output of `git diff --raw --numstat -z`: path -> (status, additions, deletions, the path that it had or "")."""
    found, parts = {}, iter(data.split(b"\0"))
    for part in parts:
        if part[:1] == b":":
            letter = part.rpartition(b" ")[2][:1].decode()
            old = next(parts)
            new = next(parts) if letter in "RC" else old
            found[path_text(new)] = (STATUS_WORDS.get(letter, "modified"), 0, 0, path_text(old) if letter == "R" else "")
        elif part:
            added, deleted, path = part.split(b"\t", 2)
            if not path:        # renamed: the two names follow
                next(parts)
                path = next(parts)
            status, _, _, before = found.get(path_text(path), ("modified", 0, 0, ""))
            # "-" of a binary file
            found[path_text(path)] = (status, *(int(n) if n != b"-" else 0 for n in (added, deleted)), before)
    return found


def _file_change(path: str, ns: int, status: str, additions: int = 0, deletions: int = 0, before: str = "") -> dict:
    ns = max(0, min(ns, FAR - 1))       # a commit or a file may have any time
    return {"path": path, "last_modified": stamp_of(ns)[:19] + "Z", "additions": additions, "deletions": deletions, "status": status,
            **({"renamed_from": before} if before else {})}


def _line_count(path: bytes) -> int:
    """The lines of a new file; 0 for one that is large, binary, or no file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(COUNTED_MAX + 1)
    except OSError:
        return 0
    return 0 if len(data) > COUNTED_MAX or b"\0" in data else data.count(b"\n") + (data[-1:] not in (b"", b"\n"))


def is_below(path: str, folder: str) -> bool:
    """Whether a path is `folder`, or lies in it; all paths lie in ""."""
    return not folder or path == folder or path.startswith(folder + "/")


def worktree_label(top: str) -> str:
    """The path of a worktree as sessions refer to it."""
    return printable(top)[-PAIR_MAX:]


def is_whole_path(label: str) -> bool:
    """Whether a `worktree_label` is the path itself, neither cut off nor with something in it that cannot be shown."""
    return label[:1] == "/" and len(label) < PAIR_MAX and "?" not in label


class Work:
    """What git says about the worktrees of a repository.  Any thread may ask."""

    def __init__(self, places: Places, world: World):
        self.places = places
        self.world = world
        self._ahead = {}        # (base, head) -> Ahead
        self._root = ""         # the first commit

    def state(self, top: str, *paths: str) -> State:
        """What is not committed in a worktree, or of some paths in it.  Raises GitError."""
        only = ("--", *paths) if paths else ()
        # Looking at one path with several threads takes longer than with one.
        one = ("-c", "core.preloadIndex=false") if paths else ()
        return parse_status(Git(top).run(*one, "status", "--porcelain=v2", "--branch", "--no-ahead-behind", "-z", "--untracked-files=all",
                                         *NO_SUBMODULES, *only))

    def _branches(self) -> tuple:
        """The branches that work may be compared with, the first choice first ({ref: commit}), and the commit of the main worktree's."""
        wanted = setting_in_effect(load_config(self.places.thrum), "work.base", {})[0]
        main = (file_bytes(self.places.common + "/HEAD") or b"").decode(errors="replace").strip()
        main = [main[5:]] if main.startswith("ref: ") else []
        refs = [*(f"refs/{kind}/{wanted}" for kind in ("heads", "remotes") if wanted), *BASES]
        lines = Git(self.places.root).run("for-each-ref", "--format=%(objectname) %(refname)", *refs, *main).decode(errors="replace")
        commits = dict(line.split(" ", 1)[::-1] for line in lines.splitlines())
        return {ref: commits[ref] for ref in refs if ref in commits}, next((commits[ref] for ref in main if ref in commits), "")

    def bases(self) -> tuple:
        """The commits that work in linked worktrees and in the main one is compared with; "" where there are none.

        They differ only where there is no branch of a well-known name: then it is the branch of the main worktree for the
        others, and the first of all commits for that one itself.
        """
        branches, main = self._branches()
        for commit in branches.values():
            return commit, commit
        if not self._root:
            roots = Git(self.places.root).run("rev-list", "--max-parents=0", "HEAD", check=False).decode().split()
            self._root = roots[-1] if roots else ""
        return main or self._root, self._root

    def base_names(self) -> dict:
        """How the commits that work may be compared with are called: commit -> branch."""
        return {commit: printable(ref.split("/", 2)[2]) for ref, commit in reversed(self._branches()[0].items())
                if not ref.endswith("/HEAD")}

    def base(self, top: str, bases: tuple | None = None) -> str:
        """The commit that the work in a worktree is compared with; `bases` if they are known: they are the same for all."""
        return (bases or self.bases())[os.path.realpath(top) == os.path.realpath(self.places.root)]

    def ahead(self, top: str, base: str, head: str) -> Ahead:
        """What `head` has that `base` lacks; both are commits."""
        if not base or not head or base == head:
            return Ahead(since=head)
        known = self._ahead.get((base, head))
        if not known:
            known = self._compare(Git(top), base, head)
            while self._ahead and sum(len(one.changes) + 1 for one in list(self._ahead.values())) + len(known.changes) > AHEAD_KEPT:
                self._ahead.pop(next(iter(self._ahead)), None)
            self._ahead[base, head] = known
        return known

    def _compare(self, git: Git, base: str, head: str) -> Ahead:
        def differences():
            since = git.run("merge-base", base, head, check=False).decode().strip()
            return since, parse_changes(git.run("diff-tree", "-r", "-M", "--raw", "--numstat", "-z", since, head)) if since else {}
        log, (since, changes) = together([
            lambda: git.run("log", "-z", "-n", str(WORK_COMMITS), "--no-renames", "--name-only", "--no-show-signature", "--encoding=UTF-8",
                            "--format=%x00%H%x00%at%x00%s", f"{base}..{head}"), differences])
        commits, times, parts, first = [], {}, iter(log.split(b"\0")), False
        for part in parts:
            if not part:        # before each commit: no path is empty
                sha, at, subject = next(parts, b""), next(parts, b"0"), next(parts, b"")
                at, first = int(at or 0), True      # git says nothing of a time that it cannot read
                commits += [{"sha": sha.decode(), "message": path_text(subject)[:SUBJECT_MAX], "files": []}] if sha else []
                continue
            path, first = path_text(part[1:] if first else part), False     # a newline stands before the first
            times.setdefault(path, at)
            if len(commits[-1]["files"]) < COMMIT_FILES:
                commits[-1]["files"].append(path)
        if not since:           # histories without a common commit, or one that a shallow clone has cut off
            changes = dict.fromkeys(times, ("modified", 0, 0, ""))
        newest = max(times.values(), default=0)
        return Ahead(since, commits, {path: _file_change(path, times.get(path, newest) * NS, *change) for path, change in changes.items()})

    def _differences(self, top: str, since: str, *paths: str) -> dict:
        """What a worktree has changed since a commit, as `parse_changes` gives it; only some paths, if given."""
        only = ("--", *paths) if paths else ()
        return parse_changes(Git(top).run("diff", "--raw", "--numstat", "-z", "-M", "--no-ext-diff", "--no-textconv",
                                          *NO_SUBMODULES, since, *only))

    def uncommitted(self, top: str, state: State, ahead: Ahead, changes: dict | None = None) -> dict:
        """path -> FileChange of what is not committed, counted from where the branch began; `changes` if that is known."""
        tracked, since = [entry for entry in state.entries if entry.tracked], ahead.since or state.head
        if changes is None and tracked and since:
            paths = [os.fsdecode(raw) for entry in tracked for raw in (entry.raw, entry.before) if raw]
            paths += [ahead.changes[path]["renamed_from"] for path in paths if "renamed_from" in ahead.changes.get(path, ())]
            changes = self._differences(top, since, *paths if len(paths) <= PATHS_GIVEN else ())
        changes = changes or {}
        found, folder = {}, os.fsencode(top) + b"/"
        for entry in state.entries:
            if entry.path in found:     # taken out of the index, but still there
                continue
            there = folder + entry.raw
            while not os.path.lexists(there):       # deleted: the folder above it knows when
                there = os.path.dirname(there)
            changed_ns = os.lstat(there).st_mtime_ns
            if entry.tracked:
                change = changes.get(entry.path, (entry.status, 0, 0, path_text(entry.before)))
            else:
                change = ("added", _line_count(folder + entry.raw) if len(found) < WORK_FILES else 0)
            found[entry.path] = _file_change(entry.path, changed_ns, *change)
            if entry.before:    # from the base the diff may take it for another's, or for new
                found[entry.path]["renamed_from"] = path_text(entry.before)
        return found

    def facts(self, top: str, bases: tuple | None = None) -> dict:
        """The git part of a work context (storage contract, section 13); `bases` as for `base`.  Raises GitError."""
        at = stamp_of(self.world.now_ns())
        state, base = together([lambda: self.state(top), lambda: self.base(top, bases)])
        ahead = self.ahead(top, base, state.head)
        changes = {**ahead.changes, **self.uncommitted(top, state, ahead)}
        lists = {"uncommitted_files": list(dict.fromkeys(entry.path for entry in state.entries)), "changed_files": list(ahead.changes),
                 "file_changes": list(changes.values())}
        return {"branch": state.branch, "worktree_path": printable(top), "unmerged_commits": ahead.commits,
                **{name: items[:WORK_FILES] for name, items in lists.items()}, "git_updated_at": at}

    def changes_of(self, path: str, tops: list) -> dict:
        """What each of some worktrees has changed of a file, or below a folder: top -> (State, uncommitted, committed FileChanges).

        None for a worktree where git cannot tell.  In most worktrees nobody has touched the file: those are told apart by what
        their index says, which takes a hundredth of the time of a `git status`.
        """
        bases, heads = together([self.bases, self._heads])
        committed = self._committed_as(sorted({state.head for state in heads.values()} - {""}), path)

        def look(top):
            state = heads.get(os.path.realpath(top))
            entry = committed.get(state.head) if state else None
            base = self.base(top, bases)
            try:
                if entry is None or not _is_untouched(top, path, entry):
                    return self._changes_in(top, _own_part(top, path), base, state.head if state else "")
                return state, [], self._committed(top, path, base, state.head)
            except GitError as error:
                logging.getLogger("thrum").warning("%s: %s", top, error)
                return None
        return dict(zip(tops, together([lambda top=top: look(top) for top in tops])))

    def _committed_as(self, commits: list, path: str) -> dict:
        """What a path is in some commits: commit -> its mode and id as the index has them, b"" for nothing; left out if not certain."""
        folder, _, name = path.rpartition("/")
        if not name or "\n" in path:
            return {}
        wanted = "".join([f"{commit}:{folder}\n" for commit in commits]).encode()
        data, at, found = Git(self.places.root).run("cat-file", "--batch", input=wanted), 0, {}
        for commit in commits:
            end = data.index(b"\n", at)
            answer, at = data[at:end].rsplit(b" ", 2), end + 1
            if answer[-1] == b"missing":
                found[commit] = b""
                continue
            size = int(answer[-1])
            if answer[-2] == b"tree":
                found[commit] = tree_entry(data[at:at + size], name.encode(), len(commit) // 2)
            at += size + 1
        return found

    def _heads(self) -> dict:
        """What each worktree has checked out: its real path -> State without entries."""
        found = {}
        for block in Git(self.places.root).run("worktree", "list", "--porcelain").decode(errors="surrogateescape").split("\n\n"):
            facts = dict(line.partition(" ")[::2] for line in block.split("\n"))
            head = facts.get("HEAD", "")
            found[os.path.realpath(facts.get("worktree", ""))] = State(
                head if head.strip("0") else "", printable(facts.get("branch", "").replace("refs/heads/", "", 1)), [])
        return found

    def _changes_in(self, top: str, path: str, base: str, head: str) -> tuple:
        ahead, where = self.ahead(top, base, head), path or "."
        origins = [change["renamed_from"] for change in ahead.changes.values() if "renamed_from" in change and _concerns(change, path)]
        state, changes = together([lambda: self.state(top, where),
                                   lambda: self._differences(top, ahead.since or head, where, *origins[:PATHS_GIVEN]) if head else None])
        if any(entry.status in ("added", "deleted") and entry.tracked for entry in state.entries):
            state, changes = self.state(top), None      # of one path alone git does not see that it was renamed
        if state.head != head:
            ahead, changes = self.ahead(top, base, state.head), None
        uncommitted = self.uncommitted(top, state, ahead, changes) if state.entries else {}
        return state, [change for change in uncommitted.values() if _concerns(change, path)], \
            [change for change in self._committed(top, path, base, state.head) if change["path"] not in uncommitted]

    def _committed(self, top: str, path: str, base: str, head: str) -> list:
        return [change for change in self.ahead(top, base, head).changes.values() if _concerns(change, path)]


def tree_entry(tree: bytes, name: bytes, id_size: int) -> bytes:
    """Mode (4 bytes) and id of a name in a tree object of git, b"" if it is not there."""
    at = 0
    while at < len(tree):
        end = tree.index(b"\0", at)
        mode, _, found = tree[at:end].partition(b" ")
        if found == name:
            return int(mode, 8).to_bytes(4, "big") + tree[end + 1:end + 1 + id_size]
        at = end + 1 + id_size
    return b""


def _own_part(top: str, path: str) -> str:
    """Of a path in a submodule the submodule's own, which is all that the repository around it knows; else `path` itself."""
    parts = path.split("/")
    above = ("/".join(parts[:end]) for end in range(1, len(parts)))
    return next((folder for folder in above if os.path.lexists(f"{top}/{folder}/.git")), path)


def _concerns(change: dict, path: str) -> bool:
    """Whether a FileChange is about a file, or something below a folder."""
    return is_below(change["path"], path) or is_below(change.get("renamed_from", "\0"), path)


def _is_untouched(top: str, path: str, committed: bytes) -> bool:
    """Whether a path in a worktree is for certain what it is in the commit: its `tree_entry` there.

    It is when the index has the same, and the file's stat is the one that the index remembers, which is how git itself knows.
    Whatever is the least bit unusual is not certain, and left to git.  (gitformat-index(5), versions 2 and 3.)
    """
    raw, folder = os.fsencode(path), os.path.dirname(f"{top}/{path}")
    if os.path.realpath(folder) != os.path.join(os.path.realpath(top), os.path.dirname(path)).rstrip("/"):
        return False            # a link is in the way: what lies behind it is not the repository's
    try:
        stat = os.lstat(os.fsencode(top) + b"/" + raw)
    except OSError:
        stat = None
    try:
        own = git_dirs(top)[0]
        with open(own + "/index", "rb") as file:
            data, index_ns = file.read(), os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return False
    if data[:4] != b"DIRC" or data[4:8] not in (b"\0\0\0\2", b"\0\0\0\3"):
        return False
    fixed, at = 38 + len(committed), data.find(raw + b"\0")
    while at >= 0:
        entry = data[max(at - fixed, 0):at]
        if len(entry) == fixed and not (at - fixed - 12) % 8 and int.from_bytes(entry[-2:], "big") & 0xFFF == min(len(raw), 0xFFF):
            break
        at = data.find(raw + b"\0", at + 1)
    if at < 0 or not stat or not committed:     # nothing anywhere; an index may be split, or have longer entries
        return not stat and not committed and raw + b"\0" not in data and not any(name[:12] == "sharedindex." for name in os.listdir(own))
    (changed_s, changed_ns, modified_s, modified_ns, _, inode, mode, _, _, size), flags = struct.unpack(">10I", entry[:40]), entry[-2]
    modified = modified_s * NS + modified_ns
    return entry[24:28] + entry[40:-2] == committed and flags & 0xF0 == 0 and modified < index_ns \
        and (stat.st_mtime_ns - modified) % (NS << 32) == 0 and (stat.st_ctime_ns - changed_s * NS - changed_ns) % (NS << 32) == 0 \
        and stat.st_size & 0xFFFFFFFF == size and stat.st_ino & 0xFFFFFFFF == inode \
        and mode == (0o120000 if stat.st_mode & 0o170000 == 0o120000 else 0o100000 + (0o755 if stat.st_mode & 0o100 else 0o644)) \
        and stat.st_mode & 0o170000 in (0o100000, 0o120000)

# ---- claims
#
# A claim is on a path from the top of the repository and covers it and everything below it, file and folder alike.
# `?` stands for one character, `*` for any but `/`, `**` for any characters; a folder `**/` may also be missing.
# Brackets are themselves: there are files called `[id].tsx`.

CLAIM_TTL_S = 30 * 60           # of a claim for which nobody says: a task of an agent, and no more is lost when it dies
CLAIMS_PER_AGENT = 100          # live at once: who needs more means a folder
CLAIMS_MAX = 1_000              # live at once, of all agents, and waited for: bounds the time to compare them
WILD_WEIGHT = 10                # so many claims does one with wildcards count for: so much longer takes it to compare
WAITING_MAX = 100               # who wait for a claim at once
LAPSE_LEAD_S = 300              # seconds before a claim lapses at which its holder is told, at most
LAPSE_SHARE = 5                 # or so much of its time, if that is less
LAPSE_TTL_S = 60                # seconds below which nobody is told: it would come too late to matter
LAPSE_TOGETHER_S = 60           # seconds within which several claims of an agent make one notice
GONE_S = 15 * 60                # seconds without a sign of life after which a holder whose worktree is gone is gone too
CLAIMS_NAMED = 10               # claims named in a message
NOTE_SHOWN = 100                # characters of a note in a message or refusal, which also has to say the rest
PROGRAM = "thrum"               # the author of what the program itself writes; nobody can register under it
PATTERNS_MAX = 4 * CLAIMS_MAX   # patterns that are kept in the form in which they are compared
ONE, STAR, DEEP, MAYBE = range(4)       # in a pattern: `?`, `*`, `**`, and that the next two may be missing
_patterns = {}                  # patterns that were met -> Pattern


class Pattern:
    """What a claim covers, as a machine: a path is covered when its characters lead from state 0 to the last one.

    A set of states is an integer with a bit for each, so a step takes the same time from all of them.
    """

    def __init__(self, path: str):
        wild = r"(?<![^/])[*][*]+/|[*]+|[?]"
        literals = [""] if path == "." else re.split(wild, path)
        self.head = literals[0]                 # all that is covered begins so
        self.plain = self.head == path
        self.chunk = max(literals, key=len)     # and holds this
        self.tokens = []
        for word in re.findall(wild + "|.", "**" if path == "." else path):
            self.tokens += [MAYBE, DEEP, "/"] if word[0] == "*" and word[-1] == "/" else \
                [{"?": ONE, "*": STAR}.get(word, DEEP if word[0] == "*" else word)]
        self.tokens += [MAYBE, "/", DEEP]       # and what is below
        at = {}                                 # token -> its states
        for state, token in enumerate(self.tokens):
            at[token] = at.get(token, 0) | 1 << state
        self._one, self._maybe, self._slash = at.pop(ONE, 0), at.pop(MAYBE, 0), at.pop("/", 0)
        star, self._deep = at.pop(STAR, 0), at.pop(DEEP, 0)
        self._stays = star | self._deep         # by a character other than `/`
        self._goes = {letter: states | self._one for letter, states in at.items()}
        self._goes[ONE] = self._one | sum(at.values())
        self._loose = self._stays | self._maybe     # what can be left without a character
        self._inside = (1 << len(self.tokens)) - 1 & ~self._slash       # and with any or none but `/`

    def _free(self, states: int) -> int:
        """Some states, and those that are reached from them without a character."""
        while states & self._loose:
            maybe = states & self._maybe
            more = states | (states & self._loose) << 1 | maybe << 3
            if more == states:
                break
            states = more
        return states

    def _beside(self, states: int) -> int:
        """Some states, and those that are reached from them with any characters but `/`."""
        while True:
            # An addition carries from each state through all that can be left so, and sets the bit where it has to stop.
            more = states | (states & self._inside) + self._inside ^ self._inside
            more |= (more & self._maybe) << 3
            if more == states:
                return states
            states = more

    def meets(self, tokens, same: int) -> bool:
        """Whether some path fits this pattern and other tokens: those of a pattern, or the characters of one path.

        The first `same` of them are known to be the same characters here.
        """
        reached = [0] * (len(tokens) + 1)       # the states here, after so many tokens there
        reached[same] = self._free(1 << same)
        for index in range(same, len(tokens)):
            states = reached[index]
            if not states:
                continue
            token = tokens[index]
            if token == MAYBE:
                reached[index + 1] |= states
                reached[index + 3] |= states
            elif token == DEEP:                 # all from the lowest on
                reached[index + 1] |= (2 << len(self.tokens)) - (states & -states)
            elif token == STAR:
                reached[index + 1] |= self._beside(states)
            else:
                moved = (states & self._slash) << 1 | states & self._deep if token == "/" else \
                    (states & self._goes.get(token, self._one)) << 1 | states & self._stays
                reached[index + 1] |= self._free(moved) if moved & self._loose else moved
        return bool(reached[-1] >> len(self.tokens) & 1)


def _pattern(path: str) -> Pattern:
    found = _patterns.get(path)
    if not found:
        if len(_patterns) >= PATTERNS_MAX:
            _patterns.clear()
        found = _patterns[path] = Pattern(path)
    return found


def covers(pattern: str, path: str) -> bool:
    """Whether a claim on `pattern` covers one path."""
    claimed = _pattern(pattern)
    if claimed.plain:
        return path == pattern or path.startswith(pattern + "/")
    return path.startswith(claimed.head) and claimed.chunk in path and claimed.meets(path, len(claimed.head))


def overlap(a: str, b: str) -> bool:
    """Whether some path is covered by claims on both patterns."""
    one, two = _pattern(a), _pattern(b)
    if not (one.head.startswith(two.head) or two.head.startswith(one.head)):
        return False
    if one.plain and two.plain:
        return a == b or a.startswith(b + "/") or b.startswith(a + "/")
    if len(one.tokens) > len(two.tokens):       # the fewer steps, the better
        one, two = two, one
    return two.meets(one.tokens, min(len(one.head), len(two.head)))


def claim_path(text: str, top: str = "", cwd: str = "") -> str:
    """As `repo_path`, for what may hold wildcards; `.` is the whole repository.  Raises InvalidParams naming what cannot be claimed."""
    path, name = repo_path(text, top, cwd) or ".", printable(text[:PAIR_MAX])
    if path.split("/")[0] in UNCLAIMABLE:
        raise InvalidParams(f"{name} is in {path.split('/')[0]}, where nothing can be claimed")
    if len(path) > PAIR_MAX:
        raise InvalidParams(f"the path {name[:40]}… is longer than {PAIR_MAX} characters; claim a folder above it")
    if not path.isprintable():
        raise InvalidParams(f"the path {name} holds characters that cannot be shown; claim the folder, or use ? for them")
    if not is_claimable(path):
        raise InvalidParams(f"the path {name} has more than {WILDCARDS_MAX} wildcards, or {WILD_MAX} characters from the first on; "
                            "claim a folder above it")
    return path


def weight(paths) -> int:
    """How many claims some paths count for."""
    return sum(1 if _pattern(path).plain or path == "." else WILD_WEIGHT for path in paths)


class Waiting(Record):
    """Somebody who waits for a claim."""

    agent_id: str
    paths: list
    shared: bool
    since: int                  # when it asked first (ns): who came earlier comes first


class Ticket:
    """The place of a call in the queue for claims: `wish` is what it waits for (Waiting), None until it was refused once."""

    wish = None


def live_claims(claims: list, now_ns: int) -> list:
    """Those of the open claims whose time has not passed here."""
    return [claim for claim in claims if claim["open"] == 1 and claim["expires_at"] > now_ns]


def object_to(claim, agent_id: str, path: str, shared: bool) -> bool:
    """Whether a live claim (a row of the store) stands against one of an agent on a path."""
    return claim["agent_id"] != agent_id and not (shared and claim["shared"]) and overlap(claim["path"], path)


def holding(claims: list) -> list:
    """Those of the live claims that hold: by their first grants, each that agrees with all that hold before it.

    `claims` come in that order.  All machines that know the same claims agree on it.
    """
    found, by_head, heads = [], {}, []
    for claim in claims:
        head = _pattern(claim["path"]).head     # of what overlaps, one begins as the other does
        near = [other for end in range(len(head)) for other in by_head.get(head[:end], ())]
        near += [other for at in heads[bisect.bisect_left(heads, head):bisect.bisect_left(heads, head + "\U0010ffff")]
                 for other in by_head[at]]
        if not any(object_to(other, claim["agent_id"], claim["path"], claim["shared"]) for other in near):
            found.append(claim)
            if head not in by_head:
                bisect.insort(heads, head)
            by_head.setdefault(head, []).append(claim)
    return found


def _minute_of(ns: int, now_ns: int) -> str:
    stamp = stamp_of(ns)[:16].replace("T", " ") + "Z"
    return stamp[11:] if stamp[:10] == stamp_of(now_ns)[:10] else stamp


def until(claim: dict, now_ns: int) -> str:
    """When a claim ends on this machine: `until 09:45Z (in 18m)`, with the date if it is another day's."""
    return f"until {_minute_of(claim['expires_at'], now_ns)} (in {span((claim['expires_at'] - now_ns) / NS + 0.5)})"


def notice(context: Context, recipients: list, text: str, key: str, refs: list = (), structured: dict | None = None) -> dict | None:
    """A message of the program itself to those of some agents that are registered, once for each `key`; None if there is none.

    `refs` are pairs.
    """
    store = context.store
    agents = [agent for agent in map(store.agent, sorted(set(recipients))) if agent]
    if not agents or store.message_by_key(PROGRAM, key, context.ledger.daemon_id):
        return None
    ids = [agent["agent_id"] for agent in agents]
    body = {"format": "markdown", "content": text, **({"structured": canonical(structured).decode()} if structured else {})}
    return context.append("message.create", after=max(agent["registered_at"] for agent in agents), agent_id=PROGRAM,
                          message_id=context.world.new_id("msg"), body=body, recipients=ids,
                          refs=pair_dicts([*(("mention", agent_id) for agent_id in ids), *refs]), send_key=key)


def claims_step(context: Context) -> int:
    """Do what is due about claims, and say when (ns) there is more to do.  A request calls it.

    It frees claims whose time has passed or whose holder is gone, gives up those of this machine that another one's came
    before, and tells holders before theirs lapse.  Whether a holder is gone is judged by its own machine alone.
    """
    now, own = context.world.now_ns(), context.ledger.daemon_id
    due, live, gone, lost, late = FAR, [], {}, {}, {}

    def told(renewal):
        return context.store.message_with("lapse", renewal, PROGRAM, own)

    for claim in context.store.claims():
        if claim["open"] != 1:
            continue
        ours = claim["daemon"] == own
        if claim["expires_at"] <= now and ours:
            free_claim(context, claim, "expired")
            continue
        if claim["expires_at"] <= now:
            context.append("claim.lapse", after=claim["renewed_at"], claim_id=claim["claim_id"], renewal=claim["renew_event"])
            continue
        if ours and claim["session_id"] not in gone:
            gone[claim["session_id"]] = _gone_at(context, claim, now)
        if ours and gone[claim["session_id"]] <= now:
            free_claim(context, claim, "dead")
            continue
        due = min(due, claim["expires_at"], gone[claim["session_id"]] if ours else FAR)
        live.append(claim)
    holds = holding(live) if any(claim["daemon"] != own for claim in live) else live      # own ones were made one after the other
    held = {claim["claim_id"] for claim in holds}
    for claim in live:
        if claim["daemon"] != own:
            continue
        if claim["claim_id"] not in held:
            winner = next(c for c in holds if object_to(c, claim["agent_id"], claim["path"], claim["shared"]))
            free_claim(context, claim, "lost", superseded_by=winner["claim_id"])
            lost.setdefault(claim["agent_id"], []).append((claim, winner))
        elif claim["ttl_s"] >= LAPSE_TTL_S:
            at = claim["expires_at"] - min(LAPSE_LEAD_S, claim["ttl_s"] // LAPSE_SHARE) * NS
            if at > now:
                due = min(due, at)
            if at <= now + LAPSE_TOGETHER_S * NS and not told(claim["renew_event"]):
                late.setdefault(claim["agent_id"], []).append((at, claim))
    for agent_id, claims in lost.items():
        lines = [f"- `{claim['path']}`: @{winner['agent_id']}{_on_host(winner, own)} claimed `{winner['path']}` before you, "
                 f"{until(winner, now)}{_in_quotes(winner['note'])}" for claim, winner in claims]
        others = " and ".join(sorted({"@" + winner["agent_id"] for _, winner in claims}))
        notice(context, [agent_id], f"You have lost {_count_claims(claims)}: another machine, which had not heard of it, was first."
               f"\n{_first_lines(lines)}\nStop editing there and talk to {others}, or queue with `thrum claim … --wait 20m`.",
               "lost:" + claims[0][0]["claim_id"])
    for agent_id, found in late.items():
        if min(at for at, _ in found) > now:
            continue
        claims = [claim for _, claim in found]
        lines = [f"- `{claim['path']}` {until(claim, now)}{_in_quotes(claim['note'])}" for claim in claims]
        words = " ".join(shlex.quote(claim["path"]) for claim in claims[:CLAIMS_NAMED])
        notice(context, [agent_id], f"The time of {_count_claims(claims)} is nearly over:\n{_first_lines(lines)}\nTo go on, from "
               f"the top of the repository: `thrum claim {words}`. When you are done: `thrum release`.",
               "lapse:" + claims[0]["renew_event"], [("lapse", claim["renew_event"]) for claim in claims])
    return due


def free_claim(context: Context, claim: dict, reason: str, **more) -> None:
    context.append("claim.release", after=claim["renewed_at"], claim_id=claim["claim_id"], reason=reason,
                   agent_id=claim["agent_id"], **more)


def _gone_at(context: Context, claim: dict, now_ns: int) -> int:
    """When the holder of a claim may count as gone (ns): now, if its worktree is not there and nobody has heard of it."""
    silent_at = max(claim["last_seen_at"], context.ledger.seen.get(claim["agent_id"], 0)) + GONE_S * NS
    tops = [value for kind, value in context.store.session_pairs(claim["session_id"] or "")[1] if kind == "worktree"]
    known = tops and all(map(is_whole_path, tops))
    if silent_at > now_ns and known:
        return silent_at
    return now_ns if known and not any(map(os.path.isdir, tops)) else FAR


def _on_host(claim: dict, own: str) -> str:
    return f" on {claim['hostname'] or 'another machine'}" if claim["daemon"] != own else ""


def _in_quotes(note: str | None) -> str:
    text = " ".join((note or "").split())
    return f": “{text[:NOTE_SHOWN]}{'…' if len(text) > NOTE_SHOWN else ''}”" if text else ""


def _count_claims(claims: list) -> str:
    return "your claim" if len(claims) == 1 else f"{len(claims)} of your claims"


def _first_lines(lines: list) -> str:
    more = [f"- and {len(lines) - CLAIMS_NAMED} more"] if len(lines) > CLAIMS_NAMED else []
    return "\n".join(lines[:CLAIMS_NAMED] + more)


# ---- why

BLAME_S = 60                    # seconds for git to find the commit of a line: of a large file with a long history


def read_line(top: str, path: str, line: int) -> dict:
    """A line of a file, which is {text}, and of the commit that made it, if it is committed, {sha, author, date (in UTC), subject,
    message, agents, threads}, the last two from its trailers.  Raises ThrumError naming what is wrong.
    """
    full, git = f"{top}/{path}", Git(top)
    try:
        data = file_bytes(full) if os.path.isfile(full) and not os.path.islink(full) else None
    except OSError as error:
        raise ThrumError(f"cannot read {path}: {error.strerror}") from None
    if data is None:
        raise ThrumError(f"{path or top} is {'no file' if os.path.lexists(full) else 'not there'}")
    if b"\0" in data:
        raise ThrumError(f"{path} is a binary file, which has no lines")
    count = data.count(b"\n") + (data[-1:] not in (b"", b"\n"))
    if not 0 < line <= count:
        raise ThrumError(f"{path} has no line {line}; it has {count:,}" if count else f"{path} is empty")
    if not git.run("ls-files", "-z", "--", path):
        raise ThrumError(f"{path} was never committed: git does not track it")
    found = {"text": data.split(b"\n")[line - 1].decode(errors="replace")}
    if not git.run("rev-parse", "-q", "--verify", "HEAD", check=False):
        return found
    sha = git.run("blame", "--porcelain", "--no-textconv", "-L", f"{line},{line}", "--", path, timeout_s=BLAME_S,
                  online=True).split(b" ")[0]
    if not sha.strip(b"0"):
        return found
    trailers = [f"%(trailers:key=Thrum-{key},valueonly,unfold)" for key in ("Agent", "Thread")]
    form = "--format=" + "%x00".join(["%H", "%an", "%ad", "%s", *trailers, "%B"])
    fields = git.run("log", "--no-walk", "--no-show-signature", "--encoding=UTF-8", "--date=iso-strict-local", form, sha.decode(),
                     environ={"TZ": "UTC0"}).decode(errors="replace").split("\0")
    return {**found, "sha": fields[0], "author": fields[1], "date": fields[2], "subject": fields[3], "message": fields[6].strip("\n"),
            "agents": fields[4].split(), "threads": fields[5].split()}


# ---- conflicts
#
# Whether two worktrees would merge is what merge-tree(1) says of two commits.  The commit of a worktree with changes is made
# from a copy of its index; objects go to a folder of ours, behind which git finds those of the repository.  So no worktree,
# index, ref or object of the repository is touched (git renews the time of an object that it would have written again).
# Names, dates and parents are fixed: the same work is the same commit, and what was merged once is known.

MERGE_GIT = "2.38"              # the first git whose merge-tree can do a real merge
MERGE_S = 10                    # seconds for one merge: renames are looked for
PRESENT_FILE_MAX = 16 << 20     # bytes of an uncommitted file that is looked at: a larger one is no source
PRESENT_MAX = 256 << 20         # bytes of all of a worktree: more is a forgotten ignore line
OBJECTS_MAX = 512 << 20         # bytes of our objects; then the folder is emptied
MERGES_KEPT = 4_096             # pairs of commits whose conflicts are remembered: those of sixty worktrees
SETTLED_NS = 2 * NS             # a file changed later than that may change again within the resolution of its times (FAT's, 2 s)
RANGED_FILES = 100              # conflicting files of a pair whose lines are looked for
RANGED_MAX = 4 << 20            # bytes of all their versions: a second of a slow machine
_NO_TRACE = tuple(word for setting in (
    "core.splitIndex=false", "core.safecrlf=false", "merge.conflictStyle=merge", "filter.lfs.required=false",
    "filter.lfs.clean=", "filter.lfs.process=") for word in ("-c", setting))       # LFS would store into the repository


class Present(Record):
    """What a worktree holds, uncommitted work included."""

    commit: str
    branch: str
    base: str                   # the commit that its work is compared with
    skipped: list = []          # paths that were left out: too large, or no files


def parse_merge(data: bytes) -> tuple:
    """The output of `git merge-tree -z`: the tree, {path: {stage: (mode, object)}}, [(kind, paths)] of the conflicts."""
    parts = iter(data.split(b"\0"))
    tree, stages, found = next(parts).decode(), {}, []
    for part in iter(lambda: next(parts, b""), b""):
        info, path = part.split(b"\t", 1)
        mode, name, stage = info.decode().split(" ")
        stages.setdefault(path, {})[int(stage)] = mode, name
    for count in parts:
        if not count.isdigit():     # of submodules it goes on with advice
            break
        paths = [next(parts) for _ in range(int(count))]
        kind = re.fullmatch(r"CONFLICT \((.*)\)", next(parts).decode())       # else a note about a file that has merged
        next(parts)             # a sentence for people
        if kind:
            found.append((kind[1], paths))
    return tree, stages, found


def conflict_ranges(merged: bytes, names: tuple, versions: tuple) -> list:
    """Where the conflicts in a merged file lie in the two versions with those names: for each, [first, last] of its lines.

    Where a version has no lines of its own, `last` is the line before, and `first` the one after it.  [[], []] if that is
    not certain.
    """
    if any(b" " + name.encode() in version for name in names for version in versions):
        return [[], []]         # a merge of a merge, where renamed files meet: these are lines of neither
    sides, blocks, begin, middle = ([], []), [], None, 0
    for line in _lines(merged):
        marker = re.match(b"(<+|>+) (%s|%s)(:|$)" % tuple(name.encode() for name in names), line)
        if marker and marker[1][:1] == b"<":
            begin, middle, divider = [len(side) for side in sides], 0, b"=" * len(marker[1])
        elif marker and begin:
            blocks.append([(start, len(side) - start) for start, side in zip(begin, sides)])
            begin = None
        elif begin and line == divider:
            if middle:
                return [[], []]     # one of them is a line of the file
            middle = 1
        else:
            for side in (sides if not begin else sides[middle:middle + 1]):
                side.append(line)
    found = []
    for side, version, parts in zip(sides, map(_lines, versions), zip(*blocks)):
        places, ranges = _places(side, version), []
        for start, size in parts:
            first = places[start - 1] + 1 if not size and start and places[start - 1] >= 0 else places[start]
            if first < 0 or version[first:first + size] != side[start:start + size]:
                return [[], []]
            ranges.append([first + 1, first + size])
        found.append(ranges)
    return found or [[], []]


def _lines(data: bytes) -> list:
    return [line.rstrip(b"\r") for line in data.removesuffix(b"\n").split(b"\n")] if data else []


def _places(text: list, version: list) -> list:
    """For each line of a text, and for its end, the index in a version of it with other lines in between; -1 if not certain.

    Certain are lines that occur once in both, as far as they come in the same order (a patience diff), and equal ones next to
    them.  That takes n log n steps; difflib takes minutes for lines that repeat, and nobody else has the interpreter then.
    """
    def once(lines):
        found = {}
        for number, line in enumerate(lines):
            found[line] = -1 if line in found else number
        return found
    there, ends, piles, before = once(version), [], [], {}
    for place in ((number, there.get(line, -1)) for line, number in once(text).items()):
        if min(place) >= 0:     # the longest rising sequence: the smallest end for each length of one
            pile = bisect.bisect(ends, place[1])
            before[place] = piles[pile - 1] if pile else (-1, -1)
            ends[pile:pile + 1], piles[pile:pile + 1] = [place[1]], [place]
    certain = [(len(text), len(version)), *piles[-1:]]
    while certain[-1] in before:
        certain.append(before[certain[-1]])
    found = [-1] * len(text) + [len(version)]
    for (above, a), (below, b) in zip([(-1, -1), *certain[::-1]], certain[::-1]):
        found[below] = b
        while above + 1 < below and a + 1 < b and text[above + 1] == version[a + 1]:
            above, a = above + 1, a + 1
            found[above] = a
        while below - 1 > above and b - 1 > a and text[below - 1] == version[b - 1]:
            below, b = below - 1, b - 1
            found[below] = b
    return found


class Conflicts:
    """Which worktrees would not merge.  Any thread may ask; one looks at a time."""

    def __init__(self, work: Work):
        self.work = work
        self.folder = work.places.var + "/conflicts"
        self.known = {}         # (worktree, worktree) -> conflicting files, when they were last compared
        self.closed = False
        self._lock = threading.Lock()
        self._present = {}      # worktree -> what its commit was made from, Present
        self._merges = {}       # (commit, commit) -> conflicting files
        self._environs = {}     # worktree -> the environment of its merges, where merge drivers are configured
        self._checked = False   # whether git is new enough

    def close(self, for_good: bool = True) -> None:
        """Remove the objects; what is being looked at ends with an error."""
        self.closed = True
        with self._lock:
            self._present = {}
            shutil.rmtree(self.folder, ignore_errors=True)
            self.closed = for_good

    def look(self, tops: list, wanted) -> tuple:
        """Compare worktrees: {worktree: Present}, {(worktree, worktree or "" for the base): files}, {worktree: what is wrong}.

        `wanted(a, b)` chooses the pairs.  What cannot be compared is an error of its first worktree.
        """
        with self._lock:
            self._go_on()
            self._check()
            make_folder(self.folder, 0o700)
            if sum(os.lstat(f"{path}/{name}").st_size for path, _, names in os.walk(self.folder) for name in names) > OBJECTS_MAX:
                shutil.rmtree(self.folder + "/objects")
                self._present = {}
            make_folder(self.folder + "/objects", 0o700)
            errors = {}

            def tried(job, top):
                try:
                    return job()
                except (ThrumError, OSError) as error:
                    errors[top] = os_problem(error) if isinstance(error, OSError) else str(error)

            states = together([lambda top=top: tried(lambda: self.present(top), top) for top in tops])
            present = {top: state for top, state in zip(tops, states) if state}
            pairs = [(a, b) for i, a in enumerate(present) for b in [*list(present)[i + 1:], ""] if wanted(a, b)]
            sides = [(a, present[a].commit, present[b].commit if b else present[a].base) for a, b in pairs]
            new = list(dict.fromkeys(top for top, a, b in sides if a != b and (a, b) not in self._merges))
            environs = together([lambda top=top: tried(lambda: self._without_drivers(top), top) for top in new])
            self._environs = dict(zip(new, environs))
            found = together([lambda side=side: tried(lambda: self.conflicts(*side), side[0]) for side in sides])
            result = {pair: files for pair, files in zip(pairs, found) if files is not None}
            known = {pair: files for pair, files in {**self.known, **result}.items() if pair[0] in tops and pair[1] in tops}
            self.known = known      # at once: others read it meanwhile
            return present, result, errors

    def _check(self) -> None:
        if not self._checked:
            words = Git(self.work.places.root).run("version").decode(errors="replace").split()
            if version_key(words[2]) < version_key(MERGE_GIT):
                raise ThrumError(f"this is git {words[2]}; to find conflicts without touching a worktree takes git {MERGE_GIT} or newer")
            self._checked = True

    def _go_on(self) -> None:
        if self.closed:
            raise ThrumError("the daemon stops")

    def _run(self, top: str, *args: str, index: str = "", environ: dict | None = None, **more) -> bytes:
        """git with our folder for new objects."""
        self._go_on()
        objects = self.work.places.common + "/objects"
        quoted = '"' + objects.replace("\\", "\\\\").replace('"', '\\"') + '"'      # git(1): else a colon would end it
        return Git(top).run(*_NO_TRACE, *args, timeout_s=MERGE_S, environ={
            "GIT_OBJECT_DIRECTORY": self.folder + "/objects", "GIT_ALTERNATE_OBJECT_DIRECTORIES": quoted,
            "GIT_AUTHOR_DATE": "@0 +0000", "GIT_COMMITTER_DATE": "@0 +0000", **({"GIT_INDEX_FILE": index} if index else {}),
            **(environ or {})}, **more)

    def present(self, top: str) -> Present:
        """The present state of a worktree.  Raises GitError, and ThrumError for one with too much that is not committed."""
        state, base = together([lambda: self.work.state(top), lambda: self.work.base(top)])
        own = git_dirs(top)[0]
        merging = (file_bytes(own + "/MERGE_HEAD") or b"").decode(errors="replace").split()
        if state.head and not state.entries and not merging:
            return Present(state.head, state.branch, base or state.head)
        there, gone, skipped, traits, size, newest = [], [], [], [], 0, 0
        folder = os.fsencode(top) + b"/"
        for entry in state.entries:
            if entry.before and (entry.status == "renamed" or not os.path.lexists(folder + entry.before)):
                gone.append(entry.before)
            if entry.raw.endswith(b"/"):        # another repository, or another worktree of this one
                continue
            try:
                found = os.lstat(folder + entry.raw) if entry.status != "deleted" else None
            except OSError:
                found = None
            if not found:
                gone.append(entry.raw)
                continue
            kind = found.st_mode >> 12          # of stat(2), without the module
            if kind not in (0o10, 0o12, 0o04) or found.st_size > PRESENT_FILE_MAX:
                skipped.append(entry.path)
                continue
            there.append(entry.raw)
            size += found.st_size
            # Of a submodule the folder does not tell which commit it is at.
            newest = max(newest, FAR if kind == 0o04 else found.st_mtime_ns, found.st_ctime_ns)
            traits.append((entry.raw, found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_mode))
        if size > PRESENT_MAX:
            raise ThrumError(f"{len(there):,} uncommitted files of {size >> 20:,} MB are too much to compare; .gitignore should name "
                             "what is generated")
        traits = (state.head, merging, gone, traits)
        known = self._present.pop(top, None)
        if known and known[0] == traits:
            commit = known[1]
        else:
            commit = self._commit(top, own, [state.head] * bool(state.head) + merging, gone, there)
        if newest < self.work.world.now_ns() - SETTLED_NS:
            self._present[top] = traits, commit
        return Present(commit, state.branch, base or commit, skipped)

    def _commit(self, top: str, own: str, parents: list, gone: list, there: list) -> str:
        """The commit that all of this would make."""
        index = f"{self.folder}/{hash32(top)[:16]}.index"
        try:
            try:
                shutil.copyfile(own + "/index", index)
            except FileNotFoundError:
                remove(index)   # nothing was ever added
            # What is gone first: a file may have taken the place of a folder, or a link, in which it would be found again.
            for how, paths in (("--force-remove",), gone), (("--add", "--remove"), there):
                if paths:
                    self._run(top, "update-index", *how, "-z", "--stdin", index=index, input=b"\0".join(paths) + b"\0")
            tree = self._run(top, "write-tree", "--missing-ok", index=index).decode().strip()
            return self._run(top, "commit-tree", tree, *(word for parent in parents for word in ("-p", parent))).decode().strip()
        finally:
            remove(index)

    def _without_drivers(self, top: str) -> dict:
        """The environment of a merge that runs none of the user's merge drivers; their files are merged as text.

        Such a driver is a program that may do anything in the worktree, which is the folder of a merge, as its attributes are
        read there.  No setting takes one back: where there are any, git gets a folder of its own with all settings but these.
        """
        listed = Git(top).run("config", "--list", "-z").decode(errors="surrogateescape").split("\0")[:-1]
        settings = [setting.split("\n", 1) if "\n" in setting else (setting, "true") for setting in listed]
        if not any(re.match(r"merge\..*\.", key) for key, _ in settings):
            return {}
        folder, common = f"{self.folder}/{hash32(top)[:16]}.git", self.work.places.common
        shutil.rmtree(folder, ignore_errors=True)
        os.mkdir(folder)
        for name in os.listdir(common):
            if not name.startswith(("config", "HEAD", "worktrees")):
                os.symlink(f"{common}/{name}", f"{folder}/{name}")
        formats = "".join(f"{key[11:]} = {value}\n" for key, value in settings if key.startswith("extensions."))
        for name, text in (("HEAD", "ref: refs/heads/-\n"), ("config", f"[core]\nrepositoryFormatVersion = 1\n[extensions]\n{formats}")):
            with open(f"{folder}/{name}", "x", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)
        kept = [(key, value) for key, value in settings if not re.match(r"merge\..*\.|include|extensions\.|core\.(bare|worktree)$", key)]
        return {"GIT_DIR": folder, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_COUNT": str(len(kept)), **{
            f"GIT_CONFIG_{what}_{n}": text for n, setting in enumerate(kept) for what, text in zip(("KEY", "VALUE"), setting)}}

    def conflicts(self, top: str, a: str, b: str) -> list:
        """The files in which two commits conflict: [{path, kind, ranges, names}]; the attributes are those of a worktree."""
        if a == b:
            return []
        found = self._merges.get((a, b))
        if found is None:
            found = self._merge(top, a, b)
            while len(self._merges) >= MERGES_KEPT:
                self._merges.pop(next(iter(self._merges)), None)
            self._merges[a, b] = found
        return found

    def _merge(self, top: str, a: str, b: str) -> list:
        tree, stages, found = parse_merge(self._run(
            top, "merge-tree", "--write-tree", "-z", "--allow-unrelated-histories", a, b, statuses=(0, 1), environ=self._environs.get(top)))
        # Without --messages there are some only if it does not merge; then there are also those of what was resolved.
        found = [(kind, paths) for kind, paths in found if not stages.keys().isdisjoint(paths)] or found
        files = {}

        def own(path):          # a file in the way of a folder of that name is put aside as `name~commit`
            return path_text(re.sub(rb"~(%s|%s)(_\d+)?$" % (a.encode(), b.encode()), b"", path))
        for kind, paths in found:
            if kind == "contents" and 1 not in stages.get(paths[0], {1: ""}):
                kind = "add/add"
            if paths[0] not in files or files[paths[0]]["kind"] in ("contents", "add/add"):
                names = [name for name in map(own, paths[1:]) if name != own(paths[0])]
                files[paths[0]] = {"path": own(paths[0]), "kind": kind, **({"names": names} if names else {})}
        texts = {path: [tree.encode() + b":" + path, *(name.encode() for _, name in sides)] for path in files
                 if len(sides := [stages[path][stage] for stage in (2, 3) if stage in stages.get(path, ())]) == 2
                 and all(mode.startswith("100") for mode, _ in sides)}
        for path, (merged, *versions) in self._blobs(top, dict(list(texts.items())[:RANGED_FILES])):
            self._go_on()
            ranges = conflict_ranges(merged, (a, b), versions)
            if ranges[0]:
                files[path]["ranges"] = ranges
        return sorted(files.values(), key=lambda file: file["path"])

    def _blobs(self, top: str, wanted: dict):
        """For each of {path: names of objects} the path and their contents, where they are small enough."""
        def ask(names, how):
            return self._run(top, "cat-file", how, "-z", input=b"".join(name + b"\0" for name in names))
        if not wanted:
            return
        sizes = iter(ask((name for names in wanted.values() for name in names), "--batch-check=%(objectsize)").split())
        small, left = [], RANGED_MAX
        for path, names in wanted.items():
            size = sum(int(next(sizes)) for _ in names)
            if size <= left:
                small, left = [*small, path], left - size
        data, at = ask((name for path in small for name in wanted[path]), "--batch=%(objectsize)") if small else b"", 0
        for path in small:
            texts = []
            for _ in wanted[path]:
                start = data.index(b"\n", at) + 1
                texts.append(data[start:start + int(data[at:start])])
                at = start + len(texts[-1]) + 1
            yield path, texts


# ================================================================== 12  Routing
#
# A subscription belongs to a session; what it matches is pushed over all connections that were used on behalf of that
# session's agent.  What a batch means for subscribers is worked out where it was written, in the order of the journal, so
# that no event falls between a subscription and its `after_seq`; then the loop hands it to the connections.  Who
# is behind is closed and comes again with the last `seq` that it has seen: the journal is the queue.

AGENTS_MAX = 64                 # agents that are reached over one connection: a page that acts for all of a team
PREVIEW_TOLD = 100              # characters of a message in a notification, as in the reference
RECEIPTS_TOLD = 200             # message ids in one notification: some 10 KiB
TOLD_TOGETHER = 16              # notes of a batch that a connection gets with one write: the write costs more than all the rest
THREADS_TOLD = 100              # threads of one batch whose counts are told: who has read more at once, asks
SUBSCRIPTION_TOPICS = {                      # what one can subscribe to beside messages, and the events that are told as they are
    "agents": ("agent.register", "agent.cleanup", "agent.session.start", "agent.session.end", "session.update", "agent.update"),
    "messages": ("message.delete", "message.remove", "purge.executed", "thread.create", "agent.cleanup"),     # it takes its mail along
    "receipts": ("message.receipt", "message.route"),
    "claims": ("claim.take", "claim.renew", "claim.release", "claim.lapse", "agent.cleanup"),
    "groups": ("group.create", "group.update", "group.delete", "group.member.add", "group.member.remove"),
    "presence": (), "work": (), "tasks": (), "sync": (),       # no events: `notification.presence` and so on
}
DOERS = ("created_by", "updated_by", "deleted_by", "added_by", "removed_by")    # fields of events that say whose doing they are
INTERNAL_FIELDS = frozenset(("event_id", "v", "origin_daemon", "sequence"))     # of an event, which are nothing to a listener
TOPICS_OF = {kind: tuple(topic for topic, kinds in SUBSCRIPTION_TOPICS.items() if kind in kinds)
             for kinds in SUBSCRIPTION_TOPICS.values() for kind in kinds}
# The same with the messages themselves: what a client that was away asks for.  The last three leave nothing to be asked for.
EVENT_TOPICS = {**SUBSCRIPTION_TOPICS, "messages": ("message.create", "message.edit", *SUBSCRIPTION_TOPICS["messages"])}
SUBSCRIPTION_CHANGES = frozenset((
    "subscription.add", "subscription.remove", "agent.session.end", "agent.register", "agent.cleanup", "purge.executed"))
EVERYTHING = object()           # what a subscription with `all` is found by

# What somebody waits for: that claims have ended, that any have changed.
CLAIM_ENDS = frozenset(("claim.release", "claim.lapse", "agent.session.end", "agent.cleanup"))
CLAIM_CHANGES = CLAIM_ENDS | {"claim.take", "claim.renew"}


def check_topics(topics) -> list:
    """The topics that a caller names, each once; `*` alone stands for all of them.  Raises InvalidParams."""
    for topic in () if topics == ["*"] else topics:
        if topic not in SUBSCRIPTION_TOPICS:
            raise InvalidParams(f"no topic {topic[:PAIR_MAX]!r}; there are {', '.join(SUBSCRIPTION_TOPICS)}, or * alone for all")
    return list(SUBSCRIPTION_TOPICS if topics == ["*"] else dict.fromkeys(topics))


def types_of(topics) -> frozenset:
    """The types of the events of some topics, messages included; of all topics when none is named."""
    return frozenset(kind for topic in check_topics(topics) or EVENT_TOPICS for kind in EVENT_TOPICS[topic])


class Waiters:
    """Who waits for a message or other events, and is to be woken.  No threads: the daemon calls it from one."""

    def __init__(self):
        self._waiting = {}      # token -> (agent id, "" for any message, or a frozenset of event types; function)
        self._next = 0

    def add(self, what, wake) -> int:
        """Call `wake()` once for each batch with a message to an agent ("": with any), or an event of some types (a frozenset).

        Gives a token for `remove`.
        """
        self._next += 1
        self._waiting[self._next] = (what, wake)
        return self._next

    def wake_all(self, what: frozenset) -> None:
        """Wake those who wait for just these types of events."""
        for wanted, wake in list(self._waiting.values()):
            if wanted is what:
                wake()

    def remove(self, token: int) -> None:
        self._waiting.pop(token, None)

    def publish(self, events: list) -> None:
        """Wake those whom (sequence, event) pairs concern; they then ask what has come."""
        types = {event["type"] for _, event in events}
        reached = {"", *(agent for _, event in events for agent in event.get("recipients", ()))} if "message.create" in types else ()
        for what, wake in list(self._waiting.values()):
            if what in reached if type(what) is str else not types.isdisjoint(what):
                wake()


def notification(method: str, params: bytes) -> bytes:
    """A JSON-RPC notification (JSON-RPC 2.0, section 4.1) with params that are encoded already."""
    return b'{"jsonrpc":"2.0","method":"notification.' + method.encode() + b'","params":' + params + b"}"


class Subscriptions:
    """Who wants to be told of what, and what to tell them of a batch.  The writer's thread keeps it.

    `listening` holds the agents that have a connection now; others are not worth a query.
    """

    def __init__(self, listening):
        self.listening = listening
        self._rows = {}         # subscription id -> row, with `keys` by which it is found
        self.stale = False      # it may not be what the store has
        self._found_by = {}     # EVERYTHING, ("scope", type, value), ("mention", value) or ("topic", name) -> {id: row}

    def load(self, store: Store) -> None:
        """Begin with what the store has; other threads see all of it at once."""
        fresh = Subscriptions(self.listening)
        for row in store.subscriptions():
            fresh._add(row)
        self._rows, self._found_by, self.stale = fresh._rows, fresh._found_by, False

    def _add(self, row: dict) -> None:
        keys = []
        if row["everything"]:
            keys.append(EVERYTHING)
        if row["scope_type"] is not None:
            keys.append(("scope", row["scope_type"], row["scope_value"]))
        if row["mention_role"]:
            keys += [("mention", name) for name in {row["mention_role"], row["agent_id"], row["role"]} - {None, ""}]
        if keys:                # it is about messages
            keys.append(("reader", row["agent_id"]))
        keys += [("agent", row["agent_id"])] + [("topic", topic) for topic in row["topics"].split(",") if topic]
        self._rows[row["id"]] = row = {**row, "keys": keys}
        for key in keys:
            self._found_by.setdefault(key, {})[row["id"]] = row

    def _drop(self, row: dict) -> None:
        for key in self._rows.pop(row["id"])["keys"]:
            found = self._found_by[key]
            del found[row["id"]]
            if not found:
                del self._found_by[key]

    def _follow(self, store: Store, event: dict) -> None:
        """Take in an event that changes who is subscribed, or by which role."""
        kind = event["type"]
        if kind in ("agent.cleanup", "purge.executed"):
            return self.load(store)     # rare, and it takes whole sessions away
        if kind == "subscription.remove":
            gone = [self._rows[event["subscription_id"]]] if event["subscription_id"] in self._rows else []
        elif kind == "agent.session.end":
            gone = [row for row in self._rows.values() if row["session_id"] == event["session_id"]]
        elif kind == "agent.register":
            gone = [row for row in self._rows.values() if row["agent_id"] == event["agent_id"]]
        else:
            gone = []
        for row in gone:
            self._drop(row)
        if gone and kind == "agent.register":
            for row in gone:
                self._add({**row, "role": event["role"]})
        if kind == "subscription.add":
            for row in store.subscriptions(event["session_id"]):
                if row["id"] not in self._rows:
                    self._add(row)

    def to_topics(self, *topics) -> list:
        """The agents with a subscription to one of some topics that have a connection.  Any thread may ask."""
        found = [row for topic in topics for row in list(self._found_by.get(("topic", topic), {}).values())]
        return list(dict.fromkeys(row["agent_id"] for row in found if row["agent_id"] in self.listening))

    def matching(self, refs: list, scopes: list) -> dict:
        """Whom a message with these pairs is to be pushed to, and by which of their subscriptions: agent id -> (its id, how)."""
        mentions, groups = audience_of(refs, scopes)
        found = {}
        for key in (EVERYTHING, *(("scope", *pair) for pair in scopes), *(("mention", name) for name in (*mentions, *groups))):
            how = "all" if key is EVERYTHING else key[0]
            for number, row in self._found_by.get(key, {}).items():
                agent_id = row["agent_id"]
                if agent_id in self.listening and (agent_id not in found or number < found[agent_id][0]):
                    found[agent_id] = number, how
        return found

    def news(self, store: Store, events: list) -> list:
        """What to push after a batch: [(head, [(agent id, tail), …])], where head + tail is one notification."""
        notes, receipts, threads = [], [], {}
        if self.stale:
            self.load(store)

        def tell_receipts():
            if receipts:
                told = {**told_of(store, *receipts[-1]), "message_ids": [one["message_id"] for _, one in receipts]}
                notes.append(_plain_note(told, self.to_topics("receipts")))
                receipts.clear()

        for seq, event in events:
            kind = event["type"]
            if kind in SUBSCRIPTION_CHANGES:
                self._follow(store, event)
            if not self._rows or not self.listening:
                continue
            if kind == "message.receipt" and self._hears(event["agent_id"]) \
                    and (row := store.message(event["message_id"])) and row["thread_id"]:
                threads.setdefault(row["thread_id"], {})[event["agent_id"]] = True      # whose unread count has changed
            if receipts and not (kind == "message.receipt" and len(receipts) < RECEIPTS_TOLD and all(
                    event.get(field) == receipts[0][1].get(field) for field in ("agent_id", "receipt_type"))):
                tell_receipts()
            topics = [topic for topic in TOPICS_OF.get(kind, ()) if ("topic", topic) in self._found_by]
            if kind in ("message.create", "message.edit"):
                notes += self._of_message(store, seq, event)
            elif topics:
                if kind == "message.receipt":
                    receipts.append((seq, event))
                else:
                    row = store.message(event["message_id"]) if "message_id" in event else None
                    notes.append(_plain_note(told_of(store, seq, event, row), self.to_topics(*topics)))
            if kind == "message.delete" and (row := store.message(event["message_id"])) and row["thread_id"]:
                notes += self._of_thread(store, seq, row["thread_id"], self.matching(*stored_pairs(row)))
            if kind == "agent.session.end" and ("topic", "claims") in self._found_by:      # it frees what the session has claimed
                notes += [_plain_note({"seq": seq, "type": "claim.release", "timestamp": event["timestamp"], **claim,
                                       "reason": "session ended"}, self.to_topics("claims"))
                          for claim in store.claims_freed_by(event["session_id"])]
        tell_receipts()
        for thread_id, readers in list(threads.items())[-THREADS_TOLD:]:
            notes += self._of_thread(store, events[-1][0], thread_id, readers)
        return notes

    def _of_message(self, store: Store, seq: int, event: dict) -> list:
        if event["type"] == "message.create":   # it says whom it is for itself: if nobody here, it takes no query to know that
            refs, scopes = pairs_of(event.get("refs")), pairs_of(event.get("scopes"))
        else:
            row = store.message(event["message_id"])
            refs, scopes = stored_pairs(row) if row else ([], [])
        found = self.matching(refs, scopes)
        row = store.message(event["message_id"]) if found else None
        if not row or row["deleted_at"]:
            return []
        preview, scopes = row["content"][:PREVIEW_TOLD], pair_dicts(scopes)
        params = {
            "seq": seq, "message_id": row["message_id"], "thread_id": row["thread_id"] or "", "agent_id": row["agent_id"],
            "author": author_of(store, row["agent_id"]), "preview": preview, "scopes": scopes, "timestamp": event["timestamp"],
            # What pages written for the reference read.
            "message": {"id": row["message_id"], "thread_id": row["thread_id"] or "", "agent_id": row["agent_id"],
                        "session_id": row["session_id"] or "", "body": {"content": preview}, "scopes": scopes,
                        "timestamp": event["timestamp"]}}
        if event["type"] == "message.edit":
            params["edited"] = True
        head = notification("message", encode(params)[:-1] + b',"matched_subscription":')[:-1]
        notes = [(head, [(agent_id, b'{"subscription_id":%d,"match_type":"%s"}}}' % (number, how.encode()))
                         for agent_id, (number, how) in found.items()])]
        if row["thread_id"] and event["type"] == "message.create":
            notes += self._of_thread(store, seq, row["thread_id"], found)
        return notes

    def _of_thread(self, store: Store, seq: int, thread_id: str, agents) -> list:
        """What to tell some agents that a thread has become."""
        if not agents:
            return []
        length, newest = store.thread_facts(thread_id)
        params = {"seq": seq, "thread_id": thread_id, "message_count": length,
                  "last_activity": stamp_of(newest["at"]) if newest else "", "last_sender": newest["agent_id"] if newest else "",
                  "preview": newest["content"][:PREVIEW_TOLD] if newest else None, "timestamp": stamp_of(store.world.now_ns())}
        head = notification("thread.updated", encode(params)[:-1] + b',"unread_count":')[:-1]
        return [(head, [(agent_id, b"%d}}" % store.unread_in(thread_id, agent_id, length)) for agent_id in agents])]

    def _hears(self, agent_id: str) -> bool:
        """Whether somebody has subscribed to messages, and listens."""
        return agent_id in self.listening and ("reader", agent_id) in self._found_by

    def any_of(self, agents) -> bool:
        """Whether one of some agents has a subscription.  Any thread may ask."""
        return any(("agent", agent_id) in self._found_by for agent_id in agents)


def author_of(store: Store, agent_id: str) -> dict:
    """Who wrote a message, as listeners are told."""
    agent = store.agent(agent_id) or {}
    return {"agent_id": agent_id, "name": agent_id, "role": agent.get("role") or "", "module": agent.get("module") or ""}


def told_of(store: Store, seq: int, event: dict, row: dict | None = None) -> dict:
    """An event as listeners are told: without what only logs need, and with what they would have to look up.

    That is who did it or whose it is, to what, in which thread; `row` is the message that it is about.
    """
    kind, about = event["type"], {}
    if row:
        about = {"agent_id": row["agent_id"], **compact(thread_id=row["thread_id"])}
    elif "claim_id" in event and (claim := store.claim(event["claim_id"])):
        about = {"agent_id": claim["agent_id"], "path": claim["path"]}
    elif kind == "agent.session.end" and (session := store.session(event["session_id"])):
        about = {"agent_id": session["agent_id"]}
    else:
        about = compact(agent_id=next((event[field] for field in DOERS if event.get(field)), ""),
                        name=store.group_name(event.get("group_id", "")))
    return {"seq": seq, "type": kind, "timestamp": event["timestamp"], **about,
            **{field: value for field, value in event.items() if field not in INTERNAL_FIELDS}}


def _plain_note(told: dict, agents: list) -> tuple:
    """The note that tells some agents of an event, as `told_of` has it."""
    return notification(told["type"], encode(told)), [(one, b"") for one in agents]


class Audience:
    """The connections over which agents are reached.  No threads: the daemon calls it from one."""

    def __init__(self):
        self.connections = {}   # agent id -> its connections, in the order in which they came

    def bind(self, connection, agent_id: str) -> None:
        """Reach an agent over a connection, too; the one for which it was used least lately goes when there are too many."""
        agents = connection.agents
        agents.pop(agent_id, None)
        agents[agent_id] = True
        self.connections.setdefault(agent_id, {})[connection] = True
        if len(agents) > AGENTS_MAX:
            self._unbind(connection, next(iter(agents)))

    def _unbind(self, connection, agent_id: str) -> None:
        del connection.agents[agent_id]
        own = self.connections[agent_id]
        del own[connection]
        if not own:
            del self.connections[agent_id]

    def leave(self, connection) -> None:
        """Forget a connection."""
        for agent_id in list(connection.agents):
            self._unbind(connection, agent_id)

    def dismiss(self, code: int) -> None:
        """Close all connections."""
        for connection in list({connection: True for own in self.connections.values() for connection in own}):
            connection.close(code)

    def tell(self, notes: list) -> None:
        """Push the notes of `Subscriptions.news`, each over a connection at most once."""
        for first in range(0, len(notes), TOLD_TOGETHER):
            some, held = notes[first:first + TOLD_TOGETHER], {}
            for head, receivers in some:
                for connection, tail in self._reached(receivers):
                    if len(some) == 1:
                        connection.push(head + tail)
                    else:
                        held.setdefault(connection, []).append((head, tail))
            for connection, own in held.items():
                connection.push(*[head + tail for head, tail in own])

    def _reached(self, receivers):
        """The connections over which some agents are reached, each once, with what the first of its agents is told."""
        found = set()
        for agent_id, tail in receivers:
            for connection in self.connections.get(agent_id, ()):
                if connection not in found:
                    found.add(connection)
                    yield connection, tail


# ---- thread streams
#
# What /ws/stream tells clients that follow threads: JSON objects of `type`, `timestamp` (ms) and `data`.  Where a client is in
# a thread, its cursor, is a sequence of the journal, which nothing can renumber.  What it sees are numbers from 1: the next
# message has the next number, whatever is purged from the thread meanwhile, and a new subscription counts anew.  The
# cursor moves when an event is on its way.  What does not fit the client's queue, its rate or its lag stays in the
# database and is read when there is room; who has everything gets new messages as they are written, without a query.

STREAM_BATCH = 50               # messages in one event
STREAM_BYTES = 256 << 10        # characters in one event, if it has two messages: so much may wait for each of a thousand clients
STREAM_RATE = 100               # messages to one connection at once, and each second on average
RATE_SPAN_S = 10                # seconds within which the average holds, too
STREAM_LAG, STREAM_RESUME = 1_000, 500          # messages without acknowledgement that pause a thread, and that let it go on
STREAM_RESERVE = 16             # places of the queue to the client that are kept for answers to it
STREAM_RETRY_S = 5              # seconds after a query that failed
FOLLOWED_MAX = 256              # threads that one connection follows: more than a page shows
INBOX_TITLE = 50                # characters of the first line of a message
TASK_FIELDS = {                 # of an event of a task, as they are told; `!` as in METHODS
    "task_id!": str, "thread_id": str, "stream_type!": str, "turn_num": int, "text": str, "tool_name": str, "tool_input": str,
    "tool_output": str, "error_msg": str, "status": str, "tokens_in": int, "tokens_out": int, "cost": float, "duration_sec": int,
    "workspace": str, "directive": str, "directive_full": str, "agent_id": str, "source_type": str}
TASK_CUT = {"text": 2_000, "tool_output": 2_000, "tool_input": 1_000}       # characters that are told live
TEXTS_RATE = 10                 # texts of a task that are told live in any second; all are stored
TEXTS_MAX = 1_000               # tasks whose texts are counted, the last ones


class Rate:
    """How many messages may go out now: a bucket of STREAM_RATE, as many again each second, and no more than that on average
    within RATE_SPAN_S.  Times in ns; a clock that was set only lets more out.
    """

    def __init__(self, now: int):
        self._at = now
        self._tokens = STREAM_RATE * NS         # as many of NS for one message
        self._spent = []        # [tenth of a second, messages], of RATE_SPAN_S
        self._sum = 0

    def room(self, now: int) -> int:
        """How many messages may go out."""
        self._tokens = min(STREAM_RATE * NS, self._tokens + max(0, now - self._at) * STREAM_RATE)
        self._at = now
        while self._spent and not 0 <= now * 10 // NS - self._spent[0][0] <= RATE_SPAN_S * 10:
            self._sum -= self._spent.pop(0)[1]
        return min(self._tokens // NS, STREAM_RATE * RATE_SPAN_S - self._sum)

    def spend(self, count: int, now: int) -> None:
        """Let messages out."""
        self.room(now)          # what flows over until now is lost
        self._tokens -= count * NS
        self._sum += count
        if self._spent and self._spent[-1][0] == now * 10 // NS:
            self._spent[-1][1] += count
        else:
            self._spent.append([now * 10 // NS, count])

    def wait(self, count: int, now: int) -> float:
        """Seconds until so many may go out, at most STREAM_RATE of them."""
        free, until = STREAM_RATE * RATE_SPAN_S - self._sum, now - (self._tokens - count * NS) // STREAM_RATE
        for tenth, spent in self._spent:
            if free >= count:
                break
            free += spent
            until = max(until, (tenth + RATE_SPAN_S * 10 + 1) * NS // 10)
        return max(0, until - now) / NS


def stream_event(kind: str, now: int, data: dict | None = None) -> bytes:
    """An event for clients of thread streams, at a time (ns)."""
    return encode({"type": kind, "timestamp": now // 1_000_000, **({} if data is None else {"data": data})})


def stream_message(store: Store, row: dict, title: str, asker: str) -> dict:
    """A message (a row) as it is told; `thread_id` and `message_seq` are each client's own.  `asker` as in `kind_of`."""
    refs, scopes = stored_pairs(row)
    readers = store.readers(row) if row["delivered"].isdigit() else []
    structured = row["structured"]
    try:
        structured = structured and decode(structured)
    except ValueError:          # of another program
        pass
    metadata = {"refs": pair_dicts(refs), "scopes": pair_dicts(scopes), "structured": structured}
    metadata = {name: value for name, value in metadata.items() if value}

    def side(agent_id):
        return "human" if agent_id.startswith("user:") else "agent"
    return {"id": row["message_id"], "thread_id": "", "message_seq": 0, "created_at": row["at"] // 1_000_000,
            "from_type": side(row["agent_id"]), "from_id": row["agent_id"],
            "to_type": side(readers[0]) if readers else "broadcast", "to_id": readers[0] if readers else "broadcast",
            "kind": kind_of(row["agent_id"], refs, asker), **({"subject": title} if title else {}), "content": row["content"],
            **({"metadata_json": canonical(metadata).decode()} if metadata else {})}


# What a stream asks for.  The first three are requests to the ledger, the last a question.

def stream_subscribe(context: Context, params: dict) -> dict:
    """Where a client begins that follows a thread: behind the message of a number, or with -1 behind what it has acknowledged."""
    store, thread, instance = context.store, params["thread_id"], params["instance_id"]
    goes_by = store.thread_named(thread)
    if not goes_by:
        raise NotFound(f"thread not found: {thread}")
    note_stream_acks(context, [(instance, thread, after, offset) for after, offset in params["acks"]])
    store.note_stream_ack(instance, thread, 0)
    if params["from_seq"] == -1:
        after = store.stream_ack(instance, thread)
        number = store.thread_count(thread, after)
    else:
        after, number = store.thread_place(thread, 0, max(0, params["from_seq"]))
    return {"thread": goes_by, "after": after, "number": number, "left": store.thread_count(thread) - number}


def stream_ack(context: Context, params: dict) -> None:
    """Note what a client acknowledges of a thread that it followed over another connection."""
    store, thread, instance = context.store, params["thread_id"], params["instance_id"]
    if store.stream_ack(instance, thread) is None:
        raise NotFound(f"subscription not found: instance={instance} thread={thread}")
    store.note_stream_ack(instance, thread, store.thread_place(thread, 0, max(0, params["ack_seq"]))[0])


def note_stream_acks(context: Context, acks: list) -> None:
    """Keep what `Streams.take_acks` gives."""
    for instance, thread, after, offset in acks:
        context.store.note_stream_ack(instance, thread, context.store.thread_place(thread, after, offset)[0])


def stream_rows(context: Context, params: dict) -> dict | None:
    """The messages of a thread after a sequence, without the first few, and if asked for its state; None when it is gone."""
    store, thread, after, skipped = context.store, params["thread_id"], params["after"], 0
    goes_by = store.thread_named(thread)
    if not goes_by:
        return None
    if params["skip"]:
        after, skipped = store.thread_place(thread, after, params["skip"])
    page = store.thread_page(thread, after, params["limit"], STREAM_BYTES)
    askers = store.askers([row["reply_to"] for _, row in page["rows"] if row["reply_to"]])
    title = store.thread_title(goes_by)
    rows = [(place, stream_message(store, row, title, askers.get(row["reply_to"], ""))) for place, row in page["rows"]]
    return {**page, "rows": rows, "thread": goes_by, "skipped": skipped, "reached": store.reached()[0],
            "state": store.thread_state(thread) if params["state"] else None}


class StreamNews(Record):
    """What a batch of events means for thread streams; worked out where it was written."""

    rows: list                  # (sequence, its thread, ids of that, the message or None when it was taken back at once)
    mail: list                  # (author, readers, `inbox_message` without `to_inbox`)
    stale: set                  # threads whose status or title may have changed
    joined: set                 # threads that were put together
    gone: str                   # "archived" or "deleted" when messages were removed for good


def stream_news(store: Store, events: list) -> StreamNews:
    """What to tell streams of (sequence, event) pairs that were just committed."""
    rows, mail, stale, gone = [], [], set(), ""
    created = {seq: event for seq, event in events if event["type"] == "message.create"}
    found = [row for row in map(store.message_at, created) if row]
    askers = store.askers([row["reply_to"] for row in found if row["reply_to"]])
    for row in found:
        asker, deleted = askers.get(row["reply_to"], ""), bool(row["deleted_at"])
        message = stream_message(store, row, store.thread_title(row["thread_id"]) if row["thread_id"] else "", asker)
        # The thread may go by another id since this message; whoever follows it under the one before is found by these.
        threads = {row["thread_id"], created[row["seq"]].get("thread_id"), row["reply_to"] and thread_of(row["reply_to"])} - {None, ""}
        if threads:
            rows.append((row["seq"], row["thread_id"], threads, None if deleted else message))
        if message["kind"] in ("question", "result"):
            stale |= threads
        if not deleted:
            mail.append((row["agent_id"], frozenset(store.readers(row)), _inbox_message(row, message)))
    for _, event in events:
        if event["type"] == "thread.create":
            stale |= {event["thread_id"], store.thread(event["thread_id"])}
        elif event["type"] == "message.delete":
            message = store.message(event["message_id"])
            if message and message["thread_id"]:
                stale.add(message["thread_id"])
        elif event["type"] in TOMBSTONES:
            gone = "archived" if event.get("reason") == "archived" else "deleted"
    return StreamNews(rows, mail, stale, set(store.joined), gone)


def _inbox_message(row: dict, message: dict) -> dict:
    content = row["content"]
    return {"id": row["message_id"], "message_id": row["message_id"], "correlation_id": row["thread_id"] or thread_of(row["message_id"]),
            "from_agent": row["agent_id"], "to_inbox": message["to_id"],
            "message_type": {"question": "request", "result": "response"}.get(message["kind"], "notification"),
            "title": content.strip().partition("\n")[0][:INBOX_TITLE], **({"payload": content} if content else {}),
            "status": "unread", "created_at": message["created_at"]}


class Ask(Record):
    """What a stream has to ask: `handler(context, params)`, and for whom."""

    handler: object
    params: dict
    followed: object = None


class Followed:
    """Where one client is in one thread."""

    def __init__(self, stream, thread_id: str, place: dict):
        self.stream = stream
        self.thread_id = thread_id      # as the client calls it
        self.goes_by = place["thread"]
        self.start = place["after"], place["number"]
        self.left = place["left"]       # messages that it has not got, as far as is known
        self.confirmed = False          # whether the answer to its `subscribe` is on its way
        self.asked = None               # the Ask that is out
        self.failing = False            # the last one failed
        self.not_before = 0             # and the next is not before this time
        self.stale = False              # its state may have changed
        self.told = None                # the status and title that it knows
        self.gone = ""                  # how messages were last removed
        self.anew = False               # it began anew unasked: acknowledgements may still be of the numbers before
        self.rewind()

    def rewind(self) -> None:
        """Begin anew where it began."""
        self.cursor, self.number = self.start   # of the last message that it got or that was deleted before it did
        self.sent = self.acked = self.number    # the numbers of the last that it got, and acknowledged
        self.ahead = 0                          # it has acknowledged up to here what it did not get
        self.paused, self.asked = False, None
        self.reached = self.latest = 0          # all is known up to this sequence; there is something with that one

    def lag(self) -> int:
        """How many messages it was sent and has not acknowledged."""
        return max(0, self.sent - self.acked)

    def wants(self) -> bool:
        """Whether there is something to ask for it."""
        return not self.asked and (self.stale or not self.confirmed or bool((self.left or self.ahead) and not self.paused))


class ThreadStream:
    """One connection's threads: takes what the client says, says what to ask next, and sends what comes of it.

    `send(payload, spare)` sends unless fewer than `spare` places would be left in the queue to the client, and says whether
    it did; `close(code)` ends the connection; `wake()` is called when `due` has something.  Times are in ns.
    """

    def __init__(self, streams: Streams, instance_id: str, now: int, send, close, wake):
        self.streams = streams
        self.instance_id = instance_id or "user"
        if not is_label(self.instance_id):
            raise InvalidParams(f"instance_id must be a text of at most {PAIR_MAX} printable characters")
        self.followed = {}      # thread id, as the client calls it -> Followed
        self.dropped = 0        # events that it may miss and did
        self._send, self._close, self._wake = send, close, wake
        self._rate = Rate(now)
        self._promised = 0      # messages that the present Ask may bring
        self._turns = {}        # the Followed for which there is something to ask, in turn

    # ---- what the client says

    def take(self, payload: bytes, now: int) -> Ask | None:
        """A message of the client, and what to ask the ledger about it; the next one has to wait for the answer."""
        try:
            event = decode(payload)
        except ValueError:
            return self._error("PARSE_ERROR", "this is not JSON", now)
        if not isinstance(event, (dict, type(None))):
            return self._error("PARSE_ERROR", "an event is an object", now)
        kind = (event or {}).get("type")
        if kind == "ping":
            self._answer(stream_event("pong", now))
        if kind in ("ping", "pong"):
            return None
        if kind not in ("subscribe", "unsubscribe", "ack"):
            return self._error("UNKNOWN_EVENT", "an event is subscribe, unsubscribe, ack or ping", now)
        data, field = event.get("data"), "ack_seq" if kind == "ack" else "from_seq"
        given = {"thread_id": "", field: 0}             # what is missing or null
        if type(data) is dict:
            given.update((name, data[name]) for name in given if data.get(name) is not None)
        thread_id, seq = given.values()
        if type(data) is not dict or type(thread_id) is not str or type(seq) is not int:
            return self._error("INVALID_ACK" if kind == "ack" else "INVALID_SUBSCRIBE",
                               f"the data of {kind} is an object of thread_id, a text, and {field}, an integer", now)
        followed, seq = self.followed.get(thread_id), min(seq, FAR)
        if kind == "unsubscribe":
            return self._leave(followed) if followed else None
        if kind == "ack" and followed:
            return self._ack(followed, seq)
        named = printable(thread_id[:PAIR_MAX])
        if kind == "ack" and not is_label(thread_id):
            return self._error("ACK_FAILED", f"subscription not found: instance={self.instance_id} thread={named}", now)
        if kind == "ack":
            return Ask(stream_ack, {"instance_id": self.instance_id, "thread_id": thread_id, "ack_seq": seq})
        if not is_label(thread_id):
            return self._error("SUBSCRIBE_FAILED", f"thread not found: {named}", now)
        if not followed and len(self.followed) >= FOLLOWED_MAX:
            return self._error("SUBSCRIBE_FAILED", f"a connection follows at most {FOLLOWED_MAX} threads; unsubscribe from one", now)
        return Ask(stream_subscribe, {"instance_id": self.instance_id, "thread_id": thread_id, "from_seq": seq,
                                      "acks": self.streams.acks_of(self.instance_id, thread_id)})

    def _ack(self, followed: Followed, number: int) -> None:
        if number > followed.number and followed.left:
            if followed.anew:
                return None
            followed.ahead, followed.paused = max(followed.ahead, number), False       # what lies between is skipped in its turn
            return self._queue(followed)
        if number >= followed.sent:
            number = followed.number        # it has everything, and what was deleted behind that it cannot know
        if number > followed.acked:
            followed.acked = number
            self.streams.note_ack(followed)
            self._resume(followed)

    def _resume(self, followed: Followed) -> None:
        """End a pause when what is next would be one of few without acknowledgement."""
        if followed.paused and followed.lag() + bool(followed.left) <= STREAM_RESUME:
            followed.paused = False
        self._queue(followed)

    # ---- what is asked

    def due(self, now: int):
        """What to ask next, an Ask; or the seconds until there may be something, None when only `wake` tells."""
        room, wait = self._rate.room(now), None
        late = {followed: followed.not_before - now for followed in self._turns if 0 < followed.not_before - now <= STREAM_RETRY_S * NS}
        ready = [followed for followed in self._turns if followed not in late]      # also when the clock was set back
        if late:
            wait = min(late.values()) / NS
        for followed in ready:          # a state costs nothing, and an empty thread is confirmed at once
            if followed.stale if followed.confirmed else not followed.left:
                return self._ask(followed, 0 if followed.confirmed else max(0, min(STREAM_BATCH, room)))
        if not ready:
            return wait
        followed = ready[0]
        free = STREAM_LAG if followed.ahead else STREAM_LAG - followed.lag()
        if free <= 0:
            return self._pause(followed, now)
        wanted = min(STREAM_BATCH, free, max(followed.left, 1))
        if room >= wanted:
            return self._ask(followed, min(STREAM_BATCH, free, room))
        return min(self._rate.wait(wanted, now), FAR if wait is None else wait)

    def _ask(self, followed: Followed, limit: int) -> Ask:
        del self._turns[followed]
        self._promised = limit
        followed.asked = Ask(stream_rows, {
            "thread_id": followed.thread_id, "after": followed.cursor, "skip": max(0, followed.ahead - followed.number) if limit else 0,
            "limit": limit, "state": followed.stale or not followed.confirmed}, followed)
        return followed.asked

    def _pause(self, followed: Followed, now: int) -> Ask:
        followed.paused = followed.stale = True
        followed.told = None                            # it is told once, changed or not
        self._error("LAG_EXCEEDED", f"thread {followed.thread_id} is paused: {followed.lag() + 1:,} messages are not acknowledged, "
                    f"the limit is {STREAM_LAG:,}; it goes on at {STREAM_RESUME}", now)
        return self._ask(followed, 0)

    def answered(self, ask: Ask, reply, now: int) -> None:
        """What came of an Ask: what its handler returned, or the exception that it raised."""
        followed = ask.followed
        if followed:
            self._promised = 0
            if followed.asked is ask and self.followed.get(followed.thread_id) is followed:    # else it was left or begins anew
                followed.asked = None
                self._take_rows(followed, ask.params, reply, now)
        elif isinstance(reply, Exception):
            self._error("ACK_FAILED" if ask.handler is stream_ack else "SUBSCRIBE_FAILED", _told(reply), now)
        elif ask.handler is stream_subscribe:
            thread_id = ask.params["thread_id"]
            if thread_id in self.followed:
                self._leave(self.followed[thread_id])
            followed = self.followed[thread_id] = Followed(self, thread_id, reply)
            self.streams.find_by(followed)
            self._queue(followed)

    def _take_rows(self, followed: Followed, params: dict, reply, now: int) -> None:
        if isinstance(reply, Exception):
            if not followed.failing:
                self._error("FETCH_FAILED", _told(reply), now)
            followed.failing, followed.not_before = True, now + STREAM_RETRY_S * NS
        elif reply is None:
            return self._lose(followed, now)
        else:
            followed.failing, followed.not_before = False, 0
            if reply["thread"] != followed.goes_by:
                self.streams.rename(followed, reply["thread"])
                return self._queue(followed)            # again: what was written under that name since then was not told
            at = followed.number + reply["skipped"]
            if followed.confirmed and not params["limit"]:      # only its state was asked for
                followed.reached, followed.left = reply["reached"], reply["passed"] + reply["left"] + (followed.latest > reply["reached"])
            elif self._give(followed, [(at + place, message) for place, message in reply["rows"]], reply["after"], at + reply["passed"],
                            reply["left"], reply["reached"], reply["more"], now) and followed.ahead:
                self._skipped(followed, at if params["skip"] else followed.ahead)
            if reply["state"] and followed.confirmed:
                self._tell_state(followed, reply["state"], now)
        self._queue(followed)

    def _skipped(self, followed: Followed, number: int) -> None:
        """It was brought to the number that it has acknowledged, or to the last that there is."""
        if number <= followed.number:
            followed.sent, followed.ahead = max(followed.sent, number), 0
            self._ack(followed, number)

    # ---- what is sent

    def _give(self, followed: Followed, rows: list, after: int, number: int, left: int, reached: int, more: bool, now: int,
              encoded: dict | None = None) -> bool:
        """Send messages, pairs of (number, message), and move to a sequence and number; False, and nothing, when there is no room.

        `encoded` holds the events that others were sent of the same news.
        """
        if rows or not followed.confirmed:
            key = followed.thread_id, followed.number, after, len(rows)
            payload = encoded.get(key) if encoded else None
            if not payload:
                told = [{**message, "thread_id": followed.thread_id, "message_seq": n} for n, message in rows]
                payload = stream_event("message", now, told[0]) if followed.confirmed and len(told) == 1 else stream_event(
                    "batch", now, {"thread_id": followed.thread_id, "messages": told, "has_more": more})
                if encoded is not None:
                    encoded[key] = payload
            if not (self._send(payload, STREAM_RESERVE) if followed.confirmed else self._answer(payload)):
                return False
            self._rate.spend(len(rows), now)
            followed.confirmed = True
        followed.cursor, followed.number, followed.reached = after, number, reached
        followed.left = left + (followed.latest > reached)
        followed.sent = rows[-1][0] if rows else followed.sent
        return True

    def came(self, followed: Followed, rows: list, now: int, encoded: dict) -> None:
        """Messages were written, pairs of (sequence, message): they go out at once if nothing is before them."""
        rows = [pair for pair in rows if pair[0] > followed.reached]
        if not rows:
            return
        followed.latest, count = rows[-1][0], len(rows)
        at_once = followed.confirmed and not (followed.left or followed.stale or self._turns) and count <= STREAM_BATCH \
            and followed.lag() + count <= STREAM_LAG and self._rate.room(now) - self._promised >= count
        told = [(followed.number + place, message) for place, (_, message) in enumerate(rows, 1) if message]
        if not at_once or not self._give(followed, told, followed.latest, followed.number + count, 0, followed.latest, False, now, encoded):
            followed.left += count
            self._queue(followed)

    def look_again(self, followed: Followed, gone: str = "") -> None:
        """Its thread may have another status or title, or be gone."""
        followed.stale, followed.gone = True, gone or followed.gone
        self._queue(followed)

    def begin_anew(self, followed: Followed) -> None:
        """Its thread was put together with another, whose messages may stand between those that it got: it gets them all again."""
        followed.rewind()
        followed.anew, followed.left = True, followed.left or 1
        self._queue(followed)

    def _tell_state(self, followed: Followed, state: dict, now: int) -> None:
        shown = state["status"], state["title"]
        followed.stale = shown != followed.told and not self._send(stream_event("thread_state", now, {
            "thread_id": followed.thread_id, "status": state["status"], "last_seq": followed.number + followed.left,
            "updated_at": state["updated_at"] // 1_000_000}), STREAM_RESERVE)
        if not followed.stale:
            followed.told = shown

    def _lose(self, followed: Followed, now: int) -> None:
        """Its thread is gone."""
        self._leave(followed)
        if not followed.confirmed:
            return self._error("SUBSCRIBE_FAILED", f"thread not found: {followed.thread_id}", now)
        self._answer(stream_event("thread_state", now, {
            "thread_id": followed.thread_id, "status": followed.gone or "deleted", "last_seq": followed.number,
            "updated_at": now // 1_000_000}))

    def offer(self, payload: bytes) -> None:
        """Send what may be missed, if there is room."""
        if not self._send(payload, STREAM_RESERVE):
            self.dropped += 1
            self.streams.dropped += 1

    def _answer(self, payload: bytes) -> bool:
        """Send what the client waits for; one that does not even read answers is closed."""
        sent = self._send(payload, 0)
        if not sent:
            self._close(1008)
        return sent

    def _error(self, code: str, message: str, now: int) -> None:
        self._answer(stream_event("error", now, {"code": code, "message": message}))

    def _queue(self, followed: Followed) -> None:
        """Give it a turn, behind the others, if there is something to ask for it."""
        if followed.wants():
            self._turns.setdefault(followed)
            self._wake()

    def _leave(self, followed: Followed) -> None:
        del self.followed[followed.thread_id]
        self._turns.pop(followed, None)
        self.streams.lose_by(followed)


def _told(error: Exception) -> str:
    """What a client learns of an error: what is not meant for it stays here."""
    return str(error) if isinstance(error, ThrumError) else "the daemon could not do this; its log says why"


class Streams:
    """All thread streams.  No threads: the daemon calls it from one.  `keep()` is called when there are acknowledgements to be kept."""

    def __init__(self, keep=lambda: None):
        self.streams = {}       # instance id -> its ThreadStreams, as keys in the order in which they came
        self.dropped = 0        # events that somebody missed
        self._followed = {}     # thread id -> the Followed that are found by it, as keys
        self._acks = {}         # Followed -> (sequence, places from there) that it has acknowledged and that is not kept yet
        self._keep = keep
        self._texts = {}        # task id -> when its last TEXTS_RATE texts were told

    def __len__(self) -> int:
        """How many there are."""
        return sum(map(len, self.streams.values()))

    def __bool__(self) -> bool:
        """Whether there are any.  Any thread may ask."""
        return bool(self.streams)

    def open(self, instance_id: str, now: int, send, close, wake) -> ThreadStream:
        """A new ThreadStream."""
        stream = ThreadStream(self, instance_id, now, send, close, wake)
        self.streams.setdefault(stream.instance_id, {})[stream] = True
        return stream

    def close(self, stream: ThreadStream) -> None:
        """Forget a stream; what it has acknowledged is kept."""
        for followed in stream.followed.values():
            self.lose_by(followed)
        own = self.streams[stream.instance_id]
        del own[stream]
        if not own:
            del self.streams[stream.instance_id]

    def find_by(self, followed: Followed) -> None:
        """Find it by the id that its client uses, and by the one that the thread goes by."""
        for thread in (followed.thread_id, followed.goes_by):
            self._followed.setdefault(thread, {})[followed] = True

    def lose_by(self, followed: Followed) -> None:
        """The reverse of `find_by`."""
        for thread in {followed.thread_id, followed.goes_by}:
            found = self._followed[thread]
            del found[followed]
            if not found:
                del self._followed[thread]

    def rename(self, followed: Followed, thread: str) -> None:
        """Its thread goes by that id now."""
        if thread != followed.goes_by:
            self.lose_by(followed)
            followed.goes_by = thread
            self.find_by(followed)

    # ---- acknowledgements

    def note_ack(self, followed: Followed) -> None:
        if not self._acks:
            self._keep()
        self._acks[followed] = followed.cursor, followed.acked - followed.number

    def acks_of(self, instance_id: str, thread_id: str) -> list:
        """What was acknowledged of a thread and is not kept yet."""
        return [ack for followed, ack in self._acks.items()
                if (followed.stream.instance_id, followed.thread_id) == (instance_id, thread_id)]

    def take_acks(self) -> list:
        """What was acknowledged since the last call, for `note_stream_acks`."""
        taken, self._acks = self._acks, {}
        return [(followed.stream.instance_id, followed.thread_id, *ack) for followed, ack in taken.items()]

    # ---- news

    def publish(self, news: StreamNews | None, now: int) -> None:
        """Tell of a batch of events, before its senders hear of it; None: something was written, and it is not known what."""
        if news is None or news.gone:
            for followed in [followed for streams in self.streams.values() for stream in streams for followed in stream.followed.values()]:
                followed.stream.look_again(followed, news.gone if news else "")
        if news is None:
            return
        for thread in news.joined:
            for followed in list(self._followed.get(thread, ())):
                followed.stream.begin_anew(followed)
        came, encoded = {}, {}
        for seq, goes_by, threads, message in news.rows:
            for followed in [followed for thread in threads for followed in self._followed.get(thread, ())]:
                self.rename(followed, goes_by)
                came.setdefault(followed, {})[seq] = message    # whatever ids led to it
        for followed, rows in came.items():
            followed.stream.came(followed, list(rows.items()), now, encoded)
        for followed in [followed for thread in news.stale for followed in self._followed.get(thread, ())]:
            followed.stream.look_again(followed)
        for author, readers, data in news.mail:
            self._tell_mail(author, readers, data, now)

    def _tell_mail(self, author: str, readers: frozenset, data: dict, now: int) -> None:
        """Tell of a message those who got it, its author, and people at their consoles."""
        payloads = {}
        for instance_id in [one for one in self.streams if one in readers or one == author or one == "user" or one.startswith("user:")]:
            inbox = instance_id if instance_id in readers else data["to_inbox"]
            if inbox not in payloads:
                payloads[inbox] = stream_event("inbox_message", now, {**data, "to_inbox": inbox})
            for stream in self.streams[instance_id]:
                stream.offer(payloads[inbox])

    def tell(self, kind: str, data: dict, now: int) -> dict | None:
        """Tell all of `telemetry`, or of an event of a task (`task_stream`): what is told, the beginnings of long texts.

        None: there were too many texts.
        """
        if kind == "task_stream":
            if data["stream_type"] == "text" and not self._may_tell_text(data["task_id"], now):
                return None
            data = {field: value[:TASK_CUT[field] - 3] + "..." if field in TASK_CUT and len(value) > TASK_CUT[field] else value
                    for field, value in data.items()}
        if self.streams:
            payload = stream_event(kind, now, data)
            for stream in [stream for streams in self.streams.values() for stream in streams]:
                stream.offer(payload)
        return data

    def _may_tell_text(self, task_id: str, now: int) -> bool:
        times = [at for at in self._texts.pop(task_id, ()) if 0 <= now - at < NS]
        self._texts[task_id] = times
        if len(self._texts) > TEXTS_MAX:
            del self._texts[next(iter(self._texts))]
        if len(times) < TEXTS_RATE:
            times.append(now)
            return True
        return False


async def hear_stream(stream: ThreadStream, payload: bytes, change, now) -> None:
    """Take a message of the client; `await change(handler, params)` is a request to the ledger, `now()` the time (ns)."""
    ask = stream.take(payload, now())
    if ask:
        stream.answered(ask, await _reply_to(change, ask), now())


async def serve_stream(stream: ThreadStream, ask, drained, wait, now) -> None:
    """Send what is due, for ever.

    `await ask(handler, params)` is a question, `await drained()` returns when the client has read enough for more,
    `await wait(seconds)` after so many, or when the stream has called `wake` since it returned last.
    """
    while True:
        await drained()
        due = stream.due(now())
        if isinstance(due, Ask):
            stream.answered(due, await _reply_to(ask, due), now())
        else:
            await wait(due)


async def _reply_to(ask, wanted: Ask):
    try:
        return await ask(wanted.handler, wanted.params)
    except Exception as error:
        if not isinstance(error, ThrumError):
            logging.getLogger("thrum").exception("%s failed", wanted.handler.__name__)
        return error


# ================================================================== 13  Sync

BRANCH = "a-sync"               # the orphan branch that carries the log


def ensure_branch(places: Places) -> bool:
    """Make the branch and its worktree where they are missing; whether they were.  Raises GitError.

    Nothing of the user's is touched: not HEAD, not the index, not the hooks.  A branch that is known from the
    remote is continued; an existing one is never replaced.
    """
    lock = lock_directory(places.common)    # agents that come at once
    try:
        return _ensure_branch(places)
    finally:
        os.close(lock)


def branch_problem(places: Places) -> str:
    """What of the branch has to be made: "branch", "worktree", or "" when both are in order."""
    if not Git(places.root).run("rev-parse", "--verify", "-q", "refs/heads/" + BRANCH, check=False):
        return "branch"
    entry, common = git_dirs(places.sync)       # of a repository that was moved or copied they lead elsewhere
    known = any(os.path.samefile(path, entry) and os.path.realpath(worktree) == os.path.realpath(places.sync)
                for path, worktree in registered_worktrees(places.common) if os.path.isdir(entry))
    return "" if known and os.path.realpath(common) == os.path.realpath(places.common) and os.path.isfile(entry + "/HEAD") \
        and not os.path.lexists(places.thrum + "/sync/.git") else "worktree"


def sync_entries(places: Places) -> list:
    """What git has registered as worktrees of the branch: ours, that of a place we were moved from, and the old layout's."""
    return [entry for entry, path in registered_worktrees(places.common)
            if path.endswith("/thrum-sync/a-sync") or path.endswith("/.thrum/sync")]


def _make_files(places: Places) -> bool:
    """Make what the worktree of the branch holds from the start; whether the file of events had to be made.

    A link in place of the folder came from a remote, and what we write would go elsewhere.
    """
    folder, events = places.sync + "/messages", places.sync + "/events.jsonl"
    if os.path.islink(folder):
        os.unlink(folder)
    make_folder(folder, 0o700)
    missing = not os.path.lexists(events)
    if missing:
        with open(events, "ab"):
            pass
    return missing


def _ensure_branch(places: Places) -> bool:
    git = Git(places.root)
    branch = "refs/heads/" + BRANCH
    problem = branch_problem(places)
    if not problem:
        _make_files(places)
        return False
    if problem == "branch":
        start = git.run("rev-parse", "--verify", "-q", "refs/remotes/origin/" + BRANCH, check=False).strip()
        if not start:
            tree = git.run("mktree").strip()
            start = git.run("commit-tree", tree.decode(), "-m", "Initialize Thrum sync").strip()
        git.run("update-ref", branch, start.decode())
    for entry in sync_entries(places):      # not `worktree prune`: it forgets the user's on a disk that is not mounted
        shutil.rmtree(entry)
    os.makedirs(os.path.dirname(places.sync), mode=0o700, exist_ok=True)
    for folder in (places.sync, places.thrum + "/sync"):        # left by a crash, by hand, by an older layout
        aside = places.sync + ".old"
        while os.path.lexists(aside):
            aside += "~"
        if os.path.lexists(folder):
            shutil.move(folder, aside)
    git.run("worktree", "add", "-f", places.sync, BRANCH, online=True)
    if _make_files(places):
        commit_branch(places, "Initialize Thrum sync data")
    for name in os.listdir(os.path.dirname(places.sync)):
        if name.startswith("a-sync.old"):
            _take_over(f"{os.path.dirname(places.sync)}/{name}", places)
    return True


def _take_over(folder: str, places: Places) -> None:
    """Take the lines of a worktree that was put aside into the present one; what is not ours stays in it."""
    files = log_files(folder)
    merge_lines(files, places)
    for path in (*files, folder + "/.git"):
        try:
            remove(path)
        except NotADirectoryError:
            return              # it is a file, and somebody's
    for path in (folder + "/messages", folder):
        try:
            os.rmdir(path)
        except OSError:
            pass                # it was never there, or holds what is not ours


def commit_branch(places: Places, message: str) -> None:
    """Commit what the files of the branch hold; nothing where that is committed already."""
    git = Git(places.sync)
    paths = [os.path.relpath(path, places.sync) for path in log_files(places.sync)]
    git.run("add", "-f", "--", *paths)      # *.jsonl may be ignored here
    if git.run("diff", "--cached", "--name-only"):
        git.run("commit", "--no-verify", "-q", "-m", message)


def merge_lines(files: list, places: Places) -> tuple:
    """Add the events in log files to those of the branch that lack them: as `missing_lines`, which is then done.

    Nothing is replaced: what the branch has stays.
    """
    items, damaged = missing_lines(files, places)
    for path, line, reason in damaged:
        BadLines(places.bad_lines).add(path, line, reason)
    branch = Branch(places.sync)
    branch.append(items)
    branch.sync()
    return items, damaged


def missing_lines(files: list, places: Places) -> tuple:
    """What log files hold and the branch does not: ([(stem, line)], [(file, damaged line, reason)]).

    Lines of before events had ids get those of the reference.
    """
    found, damaged, authors, present = {}, [], {}, set()
    for path in log_files(places.sync) if files else ():
        for line in read_lines(path):
            present.update(re.findall(rb'"event_id":"([^"]*)"', line)[:1])
    for path in files:
        for line in (file_bytes(path) or b"").split(b"\n"):
            if not line.strip():
                continue
            try:
                event = decode_object(line)
                if type(event.get("type")) is not str:
                    raise ValueError("type is missing, or not a text")
                if not event.get("event_id"):
                    event["event_id"] = backfilled_id(event)
                check_event(event)
                line = canonical(event)
                if len(line) > LINE_MAX:
                    raise ValueError(f"larger than {LINE_MAX:,} bytes")
            except (ValueError, KeyError, TypeError) as error:
                damaged.append((path, line, str(error)))
                continue
            if event["type"] == "message.create":
                authors[event["message_id"]] = event["agent_id"]
            if event["event_id"].encode() not in present:
                found.setdefault(event["event_id"], (event, line))
    return [(stem_of(event, authors.get(event.get("message_id"))), line) for event, line in found.values()], damaged


def backfilled_id(event: dict) -> str:
    """The id that every program gives to an event of before they had any (storage contract, section 9.1)."""
    kind, stamp = event["type"], event["timestamp"]
    of = "message_id" if kind.startswith("message.") else "agent_id" if kind in ("agent.register", "agent.update") \
        else "session_id" if kind.startswith("agent.") else "timestamp"
    digits = hashlib.sha256(f"{kind}:{stamp}:{event[of]}".encode()).hexdigest()[:10]
    return "evt_" + crockford(ns_of(stamp) // 1_000_000 << 80 | int.from_bytes(digits.encode(), "big"), 26)


# ================================================================== 14  JSON-RPC
#
# One JSON object, or an array of them, on each line (JSON-RPC 2.0).  A call without `id` is a notification and is
# never answered.  An error that cannot be assigned to a call has the id null, as section 5 asks.

REQUEST_MAX = 1 << 20           # bytes of one line: sixteen times the largest message
BATCH_CALLS_MAX = 100           # calls in one array


class Call(Record):
    """One request (JSON-RPC 2.0, section 4).  `error` is set instead of `method` when it is malformed."""

    method: str = ""
    params: object = None
    id: object = None
    answered: bool = True       # False for a notification
    error: object = None


def decode_request(line: bytes) -> tuple:
    """The calls in a line and whether they came as an array: ([Call, …], is_batch).  Never raises.

    >>> decode_request(b'{"jsonrpc":"2.0","id":1,"method":"health"}')[0][0].method
    'health'
    """
    try:
        value = decode(line)
    except ValueError as error:
        return [Call(error=ParseError("Parse error", str(error)[:200]))], False
    if not isinstance(value, list):
        return [_decode_call(value)], False
    if not value:
        return [Call(error=InvalidRequest("Invalid request", "batch request cannot be empty"))], False
    if len(value) > BATCH_CALLS_MAX:
        return [Call(error=InvalidRequest("Invalid request", f"more than {BATCH_CALLS_MAX} calls in a batch"))], False
    return [_decode_call(item) for item in value], True


def _decode_call(value) -> Call:
    def wrong(data, id=None):
        return Call(id=id, error=InvalidRequest("Invalid request", data))
    if not isinstance(value, dict):
        return wrong("a request must be an object")
    id = value.get("id")
    if not (id is None or (isinstance(id, (str, int, float)) and not isinstance(id, bool))):
        return wrong("id must be a string, a number or null")
    if value.get("jsonrpc") != "2.0":
        return wrong("jsonrpc field must be '2.0'", id)
    method = value.get("method")
    if not (method is None or isinstance(method, str)):
        return wrong("method must be a string", id)
    if not method and "id" not in value:
        return wrong("method is missing")
    params = value.get("params")
    if not (params is None or isinstance(params, (dict, list))):
        return Call(method or "", id=id, answered="id" in value, error=InvalidParams("invalid params: params must be an object"))
    return Call(method or "", params, id, "id" in value)


def encode_reply(call: Call, result=None, error: Exception | None = None) -> bytes:
    """The response object for a call (JSON-RPC 2.0, section 5), one line."""
    reply = {"jsonrpc": "2.0"}
    if error is None:
        reply["result"] = result
    else:
        reply["error"] = {"code": getattr(error, "code", InternalError.code), "message": str(error)}
        if getattr(error, "data", None) is not None:
            reply["error"]["data"] = error.data
    reply["id"] = call.id
    return encode(reply)


class Lines:
    """Splits a stream of bytes into lines of at most `limit` bytes.

    >>> Lines(80).feed(b'{"a":1}\\r\\n{"b"')
    [b'{"a":1}']
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._rest = bytearray()

    def feed(self, data: bytes) -> list:
        """The lines that are complete now, without their ends.  Raises InvalidRequest when one is too long."""
        self._rest += data
        end = self._rest.rfind(b"\n") + 1
        if not end:
            complete = []
        else:
            complete = [line.rstrip(b"\r") for line in bytes(self._rest[:end - 1]).split(b"\n")]
            del self._rest[:end]
        if len(self._rest) > self.limit or any(len(line) > self.limit for line in complete):
            raise InvalidRequest("Invalid request", f"a line is longer than {self.limit:,} bytes")
        return complete


# ================================================================== 15  HTTP
#
# Heads in, whole responses out (RFC 9112).  What two readers could understand in two ways is refused: a line that ends in a
# bare LF, a folded one, a blank before a colon, two lengths.  A body comes with Content-Length; nobody needs another way here.

HEAD_MAX = 16 << 10             # bytes of a head: twice what RFC 9112, section 3, asks for in the first line alone
HEADERS_MAX = 100               # its lines but the first: browsers send twenty
METHOD_MAX = 32                 # characters of a method: the longest that is registered has 17
REASONS = {
    100: "Continue", 101: "Switching Protocols", 200: "OK", 204: "No Content", 303: "See Other", 304: "Not Modified", 400: "Bad Request",
    401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout", 411: "Length Required",
    413: "Content Too Large", 414: "URI Too Long", 415: "Unsupported Media Type", 426: "Upgrade Required", 429: "Too Many Requests",
    431: "Request Header Fields Too Large", 500: "Internal Server Error", 501: "Not Implemented", 503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}
_TOKEN = rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+)"
_FIELD = _TOKEN + rb":([\t -~\x80-\xff]*)"
_REQUEST_LINE = _TOKEN + rb" ([!\"$-~]+) HTTP/([0-9])\.([0-9])"
_STATUS_LINE = rb"HTTP/1\.([0-9]) ([1-9][0-9]{2})(?: [\t -~\x80-\xff]*)?"


class HttpError(ThrumError):
    """A request that is answered with the status `http` and its reason phrase, which says all that the client learns."""

    def __init__(self, http: int, headers: dict | None = None):
        super().__init__(REASONS[http])
        self.http, self.headers = http, headers or {}


class Head(Record):
    """What stands before the body of a request or, with a `status`, of a response.  Names in `headers` are in lower case."""

    method: str
    target: str                 # a path and its query, or *
    version: str                # 1.1 or 1.0
    headers: dict
    status: int = 0

    @property
    def path(self) -> str:
        """The path of the target, percent-decoded."""
        return unquote(self.target.partition("?")[0])

    @property
    def query(self) -> dict:
        """The first value of each parameter, percent-decoded; `+` is a blank, as in forms."""
        pairs = [part.partition("=") for part in self.target.partition("?")[2].replace("+", " ").split("&") if part]
        return {unquote(name): unquote(value) for name, _, value in reversed(pairs)}

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return int(self.headers.get("content-length", 0))

    @property
    def keeps(self) -> bool:
        """Whether the connection stays open for another request (RFC 9112, section 9.3)."""
        return self.has_token("connection", "keep-alive") if self.version == "1.0" else not self.has_token("connection", "close")

    @property
    def upgrades(self) -> bool:
        """Whether it asks for a WebSocket; `accept_upgrade` tells whether it does so properly."""
        return self.has_token("upgrade", "websocket")

    def has_token(self, name: str, token: str) -> bool:
        """Whether `token` is an item in the list that a header holds, in any case of letters."""
        return token in [item.strip(" \t").lower() for item in self.headers.get(name, "").split(",")]


def unquote(text: str) -> str:
    """`text` with the byte for each %XX of it; what then is not UTF-8 becomes U+FFFD."""
    return re.sub(rb"%([0-9A-Fa-f]{2})", lambda match: bytes.fromhex(match[1].decode()), text.encode()).decode(errors="replace")


def decode_head(buffer: bytearray) -> Head | None:
    """Take the head of a request off the front of `buffer`; None while it is incomplete.

    >>> decode_head(bytearray(b"GET /health?a=1 HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")).query
    {'a': '1'}

    Raises HttpError for one that is wrong or, as soon as this is certain, too long.
    """
    lines = _take_lines(buffer)
    if lines is None:
        return None
    first = re.fullmatch(_REQUEST_LINE, lines[0])
    if not first:
        raise HttpError(400)
    method, target, major, minor = (part.decode() for part in first.groups())
    if major != "1":
        raise HttpError(505)
    if len(method) > METHOD_MAX:
        raise HttpError(501)
    headers = _decode_fields(lines[1:])
    version = "1.1" if minor != "0" else "1.0"
    if version == "1.1" and "host" not in headers:
        raise HttpError(400)
    if absolute := re.fullmatch("(?i:http)://([^/?@]+)([/?].*)?", target):
        headers["host"], target = absolute.groups("/")      # section 3.2.2: what Host says is to be ignored
        target = target if target[0] == "/" else "/" + target
    if target[0] != "/" and (method, target) != ("OPTIONS", "*"):
        raise HttpError(400)
    if "transfer-encoding" in headers:
        raise HttpError(400 if "content-length" in headers else 411)
    if not re.fullmatch("[0-9]{1,18}", headers.get("content-length", "0")):
        raise HttpError(400)
    return Head(method, target, version, headers)


def decode_response_head(buffer: bytearray) -> Head | None:
    """Take the head of a response off the front of `buffer`, as `decode_head` does that of a request."""
    lines = _take_lines(buffer)
    if lines is None:
        return None
    first = re.fullmatch(_STATUS_LINE, lines[0])
    if not first:
        raise HttpError(400)
    return Head("", "", "1.1" if first[1] != b"0" else "1.0", _decode_fields(lines[1:]), int(first[2]))


def _take_lines(buffer: bytearray) -> list | None:
    begin = 2 if buffer[:2] == b"\r\n" else 0               # section 2.2: an empty line before a request is ignored
    end = buffer.find(b"\r\n\r\n", begin, begin + HEAD_MAX)
    head = bytes(buffer[begin:end + 2 if end >= 0 else begin + HEAD_MAX])
    lines = head.split(b"\r\n")
    if len(lines) - 2 > HEADERS_MAX:
        raise HttpError(431)
    if end >= 0:
        del buffer[:end + 4]
        return lines[:-1]
    if len(head) == HEAD_MAX:
        raise HttpError(431 if len(lines) > 1 else 414)
    if head.count(b"\n") >= len(lines):                     # who ends lines like this waits for an answer already
        raise HttpError(400)
    return None


def _decode_fields(lines: list) -> dict:
    headers = {}
    for line in lines:
        field = re.fullmatch(_FIELD, line)
        if not field:
            raise HttpError(400)
        name, value = field[1].decode().lower(), field[2].strip(b" \t").decode("latin-1")
        if name in headers and name == "host":
            raise HttpError(400)
        headers[name] = f"{headers[name]}, {value}" if name in headers else value       # two lengths are no number then
    return headers


def encode_response(status: int, headers: dict, body: bytes = b"", *, head_only: bool = False) -> bytes:
    """A response; `head_only` is for HEAD, which is told the length of what it does not get."""
    if status < 200 or status in (204, 304):                # these have no body, and no length (RFC 9110, section 8.6)
        body = b""
    else:
        headers = {**headers, "Content-Length": len(body)}
    return encode_head(f"HTTP/1.1 {status} {REASONS[status]}", headers) + (b"" if head_only else body)


def encode_head(first: str, headers: dict) -> bytes:
    """A head from its first line and the others."""
    return "\r\n".join([first, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode("latin-1")


# ================================================================== 16  WebSocket
#
# A frame (RFC 6455, section 5.2): FIN, three reserved bits, opcode in four; a bit for the mask, the length in seven, or 126
# and two bytes, or 127 and eight; four bytes of mask, which every frame of a client has and none of a server; the payload.
# Control frames are short and whole, and may stand between the frames of a message.  A side that is given what section 5
# forbids sends a Close with 1002 (1007 for text that is not UTF-8, 1009 for a message that is too long) and reads no more.

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
CONTROL_MAX = 125               # bytes of a control frame's payload (section 5.5)
PONGS_MAX = 16                  # that wait to be sent: beyond, only the newest ping is answered (section 5.5.3)
TRANSLATED_FROM = 4096          # bytes from which masking by tables is faster: 1 MiB takes 2 ms instead of 6, 100 bytes 9 µs instead of 1
_STARTS = ({}, {})              # what `_decode_start` says to a server and to a client, of the 1,146 pairs that are valid
_ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"      # section 1.3


class ProtocolError(ThrumError):
    """What RFC 6455 forbids, and the code of the Close that answers it."""

    def __init__(self, message: str, close: int = 1002):
        super().__init__(message)
        self.close = close


def accept_upgrade(head: Head) -> bytes:
    """The response that opens a WebSocket (section 4.2).  Raises HttpError."""
    if head.method != "GET":
        raise HttpError(405, {"Allow": "GET"})
    if head.version != "1.1" or not head.upgrades or not head.has_token("connection", "upgrade") or head.length:
        raise HttpError(400)
    if head.headers.get("sec-websocket-version") != "13":
        raise HttpError(426, {"Upgrade": "websocket", "Sec-WebSocket-Version": "13"})
    key = head.headers.get("sec-websocket-key", "")
    try:
        if len(base64.b64decode(key, validate=True)) != 16:
            raise ValueError
    except ValueError:
        raise HttpError(400) from None
    return encode_response(101, {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Accept": _accept(key)})


def request_upgrade(host: str, target: str, key: str, headers: dict | None = None) -> bytes:
    """The request for a WebSocket; `key` is 16 random bytes in base64 (section 4.1)."""
    return encode_head(f"GET {target} HTTP/1.1", {"Host": host, "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": key,
                                                  "Sec-WebSocket-Version": "13", **(headers or {})})


def check_upgrade(head: Head, key: str) -> None:
    """Raises ProtocolError unless `head` accepts the upgrade that was asked for with `key`, and nothing else (section 4.1)."""
    if head.status != 101:
        raise ProtocolError(f"the server answers {head.status} instead of opening a WebSocket")
    if not head.upgrades or not head.has_token("connection", "upgrade") or head.headers.get("sec-websocket-accept") != _accept(key):
        raise ProtocolError("the server does not answer as a WebSocket does")
    if head.headers.keys() & {"sec-websocket-extensions", "sec-websocket-protocol"}:
        raise ProtocolError("the server chose an extension or a protocol that was not offered")


def _accept(key: str) -> str:
    return base64.b64encode(hashlib.sha1(key.encode() + _ACCEPT_GUID, usedforsecurity=False).digest()).decode()


def masked(data: bytes, mask: bytes) -> bytes:
    """`data` with each byte XORed with one of the four of `mask` in turn, which is undone by the same; without a mask as it is."""
    size = len(data)
    if not mask:
        return data
    if size < TRANSLATED_FROM:      # as two big integers: byte by byte, it takes ten times as long
        return (int.from_bytes(data, "big") ^ int.from_bytes((mask * (size // 4 + 1))[:size], "big")).to_bytes(size, "big")
    result = bytearray(data)
    for i in range(4):
        result[i::4] = result[i::4].translate(masked(bytes(range(256)), mask[i:i + 1] * 4))
    return bytes(result)


def encode_frame(opcode: int, payload: bytes, *, fin: bool = True, mask: bytes = b"") -> bytes:
    """One frame; that of a client has a `mask`.

    >>> encode_frame(TEXT, b"Hello").hex(" ")
    '81 05 48 65 6c 6c 6f'
    """
    size, first, bit = len(payload), opcode | (0x80 if fin else 0), 0x80 if mask else 0
    if size < 126:
        head = bytes((first, bit | size))
    elif size < 65_536:
        head = bytes((first, bit | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((first, bit | 127)) + size.to_bytes(8, "big")
    return head + mask + masked(payload, mask) if mask else head + payload


def _decode_start(start: bytes, client: bool) -> tuple:
    """What the first two bytes of a frame say to a side: (opcode, fin, length, bytes of a longer length, bytes of the whole header)."""
    opcode, fin, length = start[0] & 15, start[0] >= 0x80, start[1] & 0x7f
    if start[0] & 0x70 or opcode & 7 > 2:
        raise ProtocolError("a reserved bit or opcode")
    if (start[1] < 0x80) != client:
        raise ProtocolError("a frame of a server is masked" if client else "a frame of a client is not masked")
    if opcode >= CLOSE and not (fin and length <= CONTROL_MAX):
        raise ProtocolError("a control frame is fragmented or too long")
    wide = {126: 2, 127: 8}.get(length, 0)
    return opcode, fin, length, wide, 2 + wide + (0 if client else 4)


class WebSocket:
    """One side of a connection after the handshake.  `limit` is in bytes and counts all fragments of a message together.

    >>> browser, daemon = WebSocket(1024, client=True), WebSocket(1024)
    >>> browser.send(b"Hello")
    >>> daemon.feed(browser.output())
    >>> daemon.messages()
    [(1, b'Hello')]
    """

    def __init__(self, limit: int, *, client: bool = False, random=os.urandom):
        self.limit = limit
        self.closing = False        # a Close was sent or received
        self.closed = False         # nothing more may be sent or read, but what `output` still gives
        self.close_code = 1006      # as received; 1005: none was in the Close; 1006: there was no Close
        self.close_reason = ""
        self.failure = None         # the ProtocolError that ended it
        self.frames = 0             # that have come whole
        self._client = client
        self._random = random
        self._starts = _STARTS[client]
        self._rest = b""            # of a header or a control frame that is incomplete
        self._opcode = CONTINUATION             # of the message that is coming in
        self._message = bytearray()             # its payload so far
        self._frame = True, 0, b""  # of its present frame: whether it is the last, how many bytes are missing, the mask for them
        self._character = b""       # the beginning of the character that its text breaks off in
        self._messages = []
        self._pongs = []            # payloads of those that are sent first
        self._frames = []
        self._close = b""           # and this last
        self._silent = False        # once the Close has left, or the peer

    def feed(self, data: bytes) -> None:
        """Take what has arrived; b"" is the end of the stream."""
        if self.closed:
            return
        if not data:
            self._silent = True
            self._end()
            return
        try:
            self._read(self._rest + data)
        except ProtocolError as failure:
            self.failure = failure
            self.close(failure.close, str(failure))
            self._end()

    def _end(self) -> None:
        """Nothing more is read."""
        self.closing = self.closed = True
        self._rest, self._message = b"", bytearray()

    def _read(self, data: bytes) -> None:
        at, size, (fin, left, mask) = 0, len(data), self._frame
        while True:
            if not left:
                start = data[at:at + 2]
                if start not in self._starts:
                    if len(start) < 2:
                        break
                    self._starts[start] = _decode_start(start, self._client)
                opcode, fin, length, wide, header = self._starts[start]
                begin = at + header
                if begin > size:
                    break
                if wide:
                    length = int.from_bytes(data[at + 2:at + 2 + wide], "big")
                    if not (126 if wide == 2 else 65_536) <= length < 1 << 63:
                        raise ProtocolError("a length is not in its shortest form, or negative")
                mask = data[begin - 4:begin] if not self._client else b""
                if opcode >= CLOSE:
                    if begin + length > size:
                        break
                    at = begin + length
                    self.frames += 1
                    self._control(opcode, masked(data[begin:at], mask))
                    if self.closed:
                        return
                    continue
                if (opcode == CONTINUATION) == (self._opcode == CONTINUATION):
                    raise ProtocolError("a message begins within another" if opcode else "a message is continued that was not begun")
                if len(self._message) + length > self.limit:
                    raise ProtocolError(f"a message is longer than {self.limit:,} bytes", 1009)
                self._opcode, left, at = self._opcode or opcode, length, begin
            piece = masked(data[at:at + left], mask)
            at += len(piece)
            left -= len(piece)
            ends = fin and not left
            if self._opcode == TEXT and (self._character or not piece.isascii()):
                self._check_text(piece, ends)
            if self._message or not ends:
                self._message += piece
            if ends:
                self._messages.append((self._opcode, bytes(self._message) or piece))
                self._opcode = CONTINUATION
                self._message.clear()
            elif left:
                turn = len(piece) & 3
                mask = mask[turn:] + mask[:turn]
                break
            self.frames += 1
        self._rest, self._frame = data[at:], (fin, left, mask)

    def _check_text(self, piece: bytes, ends: bool) -> None:
        text = self._character + piece
        try:
            self._character = text[codecs.utf_8_decode(text, "strict", ends)[1]:]
            if b"\xed\xa0" <= self._character < b"\xee":        # half a surrogate pair: to Python, a character that is incomplete
                raise ValueError
        except ValueError:
            raise ProtocolError("a text is not UTF-8", 1007) from None

    def _control(self, opcode: int, payload: bytes) -> None:
        if opcode == PING:
            del self._pongs[PONGS_MAX - 1:]
            self._pongs.append(payload)
        elif opcode == CLOSE:
            code = int.from_bytes(payload[:2], "big") if payload else 1005
            if payload and not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):     # section 7.4 and IANA's list
                raise ProtocolError("an invalid close code")
            try:
                self.close_reason = payload[2:].decode()
            except UnicodeDecodeError:
                raise ProtocolError("a reason is not UTF-8", 1007) from None
            self.close_code = code
            self.close(code)
            self._end()

    def messages(self) -> list:
        """The messages that were completed since the last call: (TEXT or BINARY, payload).  A text is valid UTF-8."""
        messages, self._messages = self._messages, []
        return messages

    def send(self, payload: bytes, opcode: int = TEXT) -> None:
        """Queue a message: before a Close that still waits, so that who hangs up after a question is answered, else not at all."""
        if not self._silent:
            self._frames.append(self._encode(opcode, payload))

    def ping(self, payload: bytes = b"") -> None:
        """Queue a ping of at most 125 bytes."""
        self.send(payload, PING)

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Queue a Close, if there was none; 1005 is one without a code.  `reason` is cut to what fits."""
        if not self.closing:
            text = reason.encode()[:CONTROL_MAX - 2].decode(errors="ignore")
            self._close = self._encode(CLOSE, b"" if code == 1005 else code.to_bytes(2, "big") + text.encode())
            self.closing = True

    def output(self) -> bytes:
        """What is to be sent now."""
        if self._silent:
            return b""
        pongs = [self._encode(PONG, payload) for payload in self._pongs]
        frames, self._pongs, self._frames = [*pongs, *self._frames, self._close], [], []
        self._silent = self.closing
        return b"".join(frames)

    def _encode(self, opcode: int, payload: bytes) -> bytes:
        return encode_frame(opcode, payload, mask=self._random(4) if self._client else b"")


# ================================================================== 18  Integrations

# The programs that agents run in; `all` and `amp` are accepted beside them.
RUNTIMES = ("claude", "codex", "cursor", "gemini", "auggie", "cli-only", "all")


def check_runtime(name: str | None) -> None:
    """Raise Usage for the name of a runtime that nobody knows."""
    if name is not None and name not in (*RUNTIMES, "amp"):
        raise Usage(f'unknown runtime "{name}"; supported: {", ".join(RUNTIMES)}')


IGNORED = (".thrum/", ".thrum.*.json", "scripts/thrum-startup.sh")
IGNORED_BECAUSE = "# thrum: messages between agents, kept on the branch a-sync"


def _write_again(path: str, data: bytes) -> None:
    atomic_write(path, data, os.stat(path).st_mode & 0o7777)


def missing_ignore_lines(*paths: str) -> list:
    """Which of the lines that git is to ignore none of the ignore files holds."""
    present = {line.strip() for path in paths for line in (file_bytes(path) or b"").decode(errors="replace").splitlines()}
    return [line for line in IGNORED if line not in present]


def ignore_file(top: str, common: str, stealth: bool) -> str:
    """The file that says what git is to ignore: .gitignore, or the one that is not shared.

    The second also where it was taken before, and where .gitignore is a link, which git does not follow.
    """
    exclude, shared = common + "/info/exclude", top + "/.gitignore"
    stealth = stealth or os.path.islink(shared) or IGNORED_BECAUSE.encode() in (file_bytes(exclude) or b"")
    return exclude if stealth else shared


def add_ignore_lines(path: str) -> bool:
    """Append what git is to ignore to an ignore file, unless it is there; whether the file was changed.

    In a file of the user's exactly one newline goes before the block, whatever the file ends with, and in one that
    is made here none: so the block tells what has to go with it.
    """
    missing, before = missing_ignore_lines(path), file_bytes(path)
    if not missing:
        return False
    block = "\n".join([IGNORED_BECAUSE, *missing, ""]).encode()
    if before is None:
        make_folder(os.path.dirname(path), 0o755)
        atomic_write(path, block, 0o644)
    else:
        _write_again(path, before + b"\n" + block)
    return True


def remove_ignore_lines(path: str) -> bool:
    """Take out what `add_ignore_lines` has put in, and a file that it has made; whether there was something.

    Every other byte stays, also those that somebody has added or changed since.
    """
    data, changed = file_bytes(path), False
    lines = (data or b"").splitlines(keepends=True)
    created = lines[:1] != [] and lines[0].strip() == IGNORED_BECAUSE.encode()
    while any(line.strip() == IGNORED_BECAUSE.encode() for line in lines):
        start = end = next(n for n, line in enumerate(lines) if line.strip() == IGNORED_BECAUSE.encode())
        end += 1
        while end < len(lines) and lines[end].strip().decode(errors="replace") in IGNORED:
            end += 1
        if start and lines[start - 1] in (b"\n", b"\r\n"):
            start -= 1                  # the blank line that came with it
        elif start and end == len(lines):
            lines[start - 1] = lines[start - 1][:-1]        # the file had no newline at its end
        del lines[start:end]
        changed = True
    if changed and created and not lines:
        os.unlink(path)
    elif changed:
        _write_again(path, b"".join(lines))
    return changed


LAUNCHER = ".thrum/bin/thrum"   # how generated instructions call us, from the top of a worktree

ROLE_DUTIES = {                 # what an agent of a well-known role does for its team
    "coordinator": "You divide the work, give it to agents by name, answer their questions and bring results together.",
    "implementer": "You build what you were given, say when it is done or stuck, and leave the rest to its owners.",
    "planner": "You turn goals into pieces of work that others can take, and write down what was decided and why.",
    "researcher": "You find out what others need to know and report it with sources, without changing the code.",
    "reviewer": "You read what others have finished and send them what has to change, most important first.",
    "tester": "You try what others have finished, report failures with the way to repeat them, and keep the tests true.",
    "deployer": "You bring out what was released, watch it, and tell the team at once when something breaks.",
    "documenter": "You keep what users and agents read in step with the code, and ask its authors where it is unclear.",
    "monitor": "You watch builds, services and messages, and tell whom it concerns as soon as something is wrong.",
}


def default_preamble(name: str, role: str = "") -> str:
    """What an agent of a role finds before its saved context, until somebody writes something better."""
    duties = f"## Your Role: {role}\n\n{ROLE_DUTIES[role]}\n\n---\n\n" if role in ROLE_DUTIES else ""
    who = f"You are @{name}" + (f" ({role})" if role else "")
    return duties + f"""# Working with your team through thrum

{who}. Other agents work on this repository too; thrum carries your messages.
Call it as `{LAUNCHER}` from the top of the worktree.

## When you begin

1. `{LAUNCHER} prime`: who you are, who is here, what is unread
2. `{LAUNCHER} inbox`: read your messages, and answer those that ask something
3. `{LAUNCHER} session set-intent "…"`: say what you are going to do

## While you work

- Look for messages between two steps: `{LAUNCHER} inbox --unread`
- Write to an agent by its name; a role or a group reaches all of its members
- Before you change what others may be changing, ask `{LAUNCHER} who-has FILE` and `{LAUNCHER} claim FILE`; `release` it when you are done
- Say when you are done or stuck; silence helps nobody
- With nothing left to do, wait for the next message: `{LAUNCHER} wait --timeout 5m`
- Before your context runs out, write down where you are: `{LAUNCHER} context save --file NOTES.md`

## Commands

    {LAUNCHER} send "…" --to @NAME        write to an agent, a role or a group
    {LAUNCHER} reply MSG_ID "…"           answer, in the same thread
    {LAUNCHER} sent                       what you sent, and who has read it
    {LAUNCHER} team                       who is here, and at what
    {LAUNCHER} who-has FILE               who is changing a file
    {LAUNCHER} claim FILE --note "…"      say that you are going to: others keep off
    {LAUNCHER} conflicts                  whose present work would not merge
    {LAUNCHER} status                     you, your inbox and the daemon
    {LAUNCHER} context show               what you saved
"""


# ---- files of ours among the user's
#
# Such a file holds a line with `thrum-managed`, its version, and a sum of all the rest.  So the next version can replace
# it, and one that somebody has edited is told from ours and left alone.

MANAGED = "thrum-managed"


def sealed(text: str, version: int) -> bytes:
    """A text that holds the word `thrum-managed` once, as a file of ours."""
    text = text.replace(MANAGED, f"{MANAGED} {version}")
    return text.replace(MANAGED, f"{MANAGED} {hash32(text)[:12]}", 1).encode()


def seal_of(data: bytes | None) -> tuple | None:
    """Of a file of ours its version, and whether it is as we wrote it; None for any other."""
    found = re.search(rb"%s ([0-9A-Z]{12}) (\d{1,4})\b" % MANAGED.encode(), data or b"")
    if not found:
        return None
    text = data[:found.start(1)] + data[found.end(1) + 1:]
    return int(found[2]), hash32(os.fsdecode(text))[:12].encode() == found[1]


def managed_state(path: str, version: int) -> str:
    """What is at the place of a file of ours: "absent", "installed", "outdated", "edited", or "other" for what is not ours."""
    if not os.path.lexists(path):
        return "absent"
    seal = None if os.path.islink(path) or not os.path.isfile(path) else seal_of(file_bytes(path))
    return "other" if not seal else "edited" if not seal[1] else "outdated" if seal[0] < version else "installed"


def write_managed(path: str, text: str, version: int, mode: int = 0o644, force: bool = False) -> bool:
    """Write or renew a file of ours; whether it was.  What is not ours, or newer, stays, and an edited one unless `force`."""
    state, data = managed_state(path, version), sealed(text, version)
    if state == "other" or (state == "edited" and not force) or \
            (state == "installed" and (seal_of(file_bytes(path))[0] > version or os.stat(path).st_mode & 0o777 == mode)):
        return False
    atomic_write(path, data, mode)
    return True


# ---- the guard: git's hooks
#
# git asks a hook before it commits, and one when it has prepared the message.  Ours run what was there before, and then
# `thrum guard check` and `thrum guard message`; they hold no logic, so that they seldom change.  A commit is stopped by one
# exit status alone: whatever goes wrong on our side has another one, and lets it pass.
#
# git itself never runs what a branch holds, and neither do they: `.thrum` is ignored, so a checkout silently replaces what
# lies there by what the branch tracks under that name (in any case: some file systems see no difference).  So nothing below
# it may be tracked, neither in the worktree nor in the one that its redirect leads to.  Where git cannot tell, nothing runs.

GUARD_VERSION = 2
GUARD_STOPS = 3                 # none that a shell, a signal, or Python gives to a program that fails
GUARD_HOOKS = {"pre-commit": "check", "prepare-commit-msg": "message"}
BEFORE = ".before-thrum"        # what was there is kept under this name, beside ours: it may go by the files around it
GUARD_HOOK = """#!/bin/sh
# thrum-managed: do not edit; 'thrum guard remove' takes it away.  Folders made for it: {made}
if [ -x "$0{before}" ]; then "$0{before}" "$@" || exit; fi
top=.
[ -x .thrum/bin/thrum ] || top=$(git rev-parse --git-common-dir)/..
[ -x "$top/.thrum/bin/thrum" ] || exit 0
tracks() {{
    names=$(unset GIT_LITERAL_PATHSPECS $(git rev-parse --local-env-vars); git -C "$1" --icase-pathspecs ls-files -- .thrum 2>/dev/null)
    [ $? -ne 0 ] || [ -n "$names" ]
}}
if tracks "$top" || {{ led=$(cat "$top/.thrum/redirect" 2>/dev/null) && tracks "$(dirname "$led")"; }}; then
    [ {command} = message ] ||
        echo "thrum: claims were not checked, and the commit goes on: git tracks .thrum, and what a branch holds is not run" >&2
    exit 0
fi
"$top/.thrum/bin/thrum" guard {command} "$@" || [ $? -ne {stops} ]
"""


def hooks_folder(top: str) -> str:
    """Where git looks for the hooks of a worktree, whatever its settings say."""
    path = Git(top).run("rev-parse", "--git-path", "hooks", as_user=True)
    return os.path.realpath(os.path.join(top, os.fsdecode(path)[:-1]))


def guard_state(folder: str) -> list:
    """Our hooks in a folder: {hook, path, state as of `managed_state`, before: whether one is kept that was there before}."""
    paths = {name: f"{folder}/{name}" for name in GUARD_HOOKS}
    return [{"hook": name, "path": path, "state": managed_state(path, GUARD_VERSION), "before": os.path.lexists(path + BEFORE)}
            for name, path in paths.items()]


def _folders_made(found: list) -> int:
    """How many folders were made for the hooks of a `guard_state`: theirs, the one above it, and so on."""
    lines = [re.search(rb"made for it: (\d+)", file_bytes(hook["path"])) for hook in found if hook["state"] not in ("absent", "other")]
    return max((int(line[1]) for line in lines if line), default=0)


def place_guard(folder: str, force: bool = False) -> list:
    """Put our hooks into a folder; the `guard_state` before.  An edited hook of ours is left alone unless `force`."""
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise ThrumError(f"git's hooks are turned off here: core.hooksPath leads to {folder}, which is not a folder")
    if folder.endswith("/.husky/_"):
        raise ThrumError(f"husky writes {folder} anew each time; put '{LAUNCHER} guard check' into .husky/pre-commit, and "
                         f"'{LAUNCHER} guard message \"$@\"' into .husky/prepare-commit-msg")
    found = guard_state(folder)
    for hook in found:
        if hook["state"] == "other" and hook["before"]:
            raise ThrumError(f"{hook['path']} was replaced since the guard was installed; the hook of before is in "
                             f"{hook['path']}{BEFORE}: keep one of the two")
    missing, made = folder, _folders_made(found)
    while not os.path.isdir(missing):
        missing, made = os.path.dirname(missing), made + 1
    os.makedirs(folder, 0o755, exist_ok=True)
    for hook in found:
        path = hook["path"]
        if hook["state"] == "other":
            os.rename(path, path + BEFORE)
        try:
            write_managed(path, GUARD_HOOK.format(made=made, before=BEFORE, command=GUARD_HOOKS[hook["hook"]], stops=GUARD_STOPS),
                          GUARD_VERSION, 0o755, force)
        except OSError:
            if hook["state"] == "other":
                os.rename(path + BEFORE, path)
            raise
    return found


def guard_removal(folder: str, top: str, force: bool = False) -> list:
    """What has to be done to take our hooks out of a folder, as pairs of words and a function."""
    found, parents, steps = guard_state(folder), [folder], []
    while len(parents) < _folders_made(found):
        parents.append(os.path.dirname(parents[-1]))
    for hook in found:
        path, state = hook["path"], hook["state"]
        shown = path[len(top) + 1:] if path.startswith(top + "/") else path
        if state == "edited" and not force:
            steps.append((f"Left: {shown}, which was edited", lambda: None))
        elif state == "other" and hook["before"]:
            steps.append((f"Left: {shown}{BEFORE}; {shown} was replaced since", lambda: None))
        elif hook["before"]:
            steps.append((f"Restored: {shown}", lambda path=path: os.rename(path + BEFORE, path)))
        elif state not in ("absent", "other"):
            steps.append((f"Removed: {shown}", lambda path=path: remove(path)))
    return steps + [("", lambda: remove_if_empty(*parents))] * bool(_folders_made(found))


def staged_files(top: str) -> list:
    """The paths (bytes) that the commit which git is making changes, both names of a renamed file; ones that a merge takes over
    from the other side as they are do not count.
    """
    git = Git(top)
    environ = {name: value for name, value in os.environ.items() if name.startswith("GIT_")}    # `git commit FILE` has its own index

    def differing(*other):
        return set(git.run("diff", "--cached", "--name-only", "-z", "--no-renames", *other, environ=environ).split(b"\0")) - {b""}
    found = differing()
    if found and git.run("rev-parse", "-q", "--verify", "MERGE_HEAD", check=False, environ=environ):
        found &= differing("MERGE_HEAD")
    return sorted(found)


def add_trailers(top: str, path: str, **trailers) -> None:
    """Add trailers to the message of a commit (a file) that has not got them, unless it is empty: git is to refuse that one.

    git says what is a comment, and which trailers there are.  The lines are added here: `git interpret-trailers` would also
    run the commands of all trailers that the user has configured, which `git commit` does not.
    """
    git, text = Git(top), file_bytes(path) or b""
    words, mark, below = text.partition(b" ------------------------ >8 ------------------------\n")     # what the commit changes
    last = git.run("stripspace", "--strip-comments", input=words).rstrip(b"\n").rpartition(b"\n")[2]
    if not last:
        return
    present = git.run("interpret-trailers", "--only-trailers", "--only-input", "--no-divider", input=words.rstrip(b"\n") + b"\n")
    names = {line.partition(b":")[0].lower() for line in present.splitlines()}
    added = [f"{name.replace('_', '-')}: {value}".encode() for name, value in trailers.items()
             if name.replace("_", "-").lower().encode() not in names]
    lines = words.split(b"\n")
    end = next(n for n in range(len(lines), 0, -1) if lines[n - 1].rstrip() == last)
    lines[end:end] = [b""] * (not present) + added + [b""] * (end == len(lines))        # that of a merge ends without a newline
    if added:
        with open(path, "wb") as file:
            file.write(b"\n".join(lines) + mark + below)


# ================================================================== 19  Operations
#
# Removal leaves a repository as it was before `init`, byte for byte, `.git` included.  Each step finds for itself what
# is left to do, so that one that was cut short is completed by the next.

PRUNE_S = 60                    # seconds for git to walk all history: which objects does nobody else need?


def remove_tree(path: str) -> None:
    """Remove a folder and what is in it; of a link only the link.

    It is renamed first, so that nobody finds half of it; what an interrupted removal has left goes too.
    """
    aside = path + ".removed"
    if os.path.islink(path):
        os.unlink(path)
    for present in (aside, path):
        if os.path.isdir(present) and not os.path.islink(present):
            if present == path:
                os.rename(path, aside)
            try:
                shutil.rmtree(aside)
            except OSError as error:        # it names no more than the last part of the path
                raise OSError(error.errno, error.strerror, f"{aside} ({os.path.basename(os.fsdecode(error.filename or ''))})") from None


def is_there(path: str) -> bool:
    """Whether `remove_tree` has something to do."""
    return os.path.lexists(path) or os.path.isdir(path + ".removed")


def is_our_branch(places: Places) -> bool:
    """Whether there is a branch of the right name that holds a log; somebody else's is not touched."""
    return bool(Git(places.root).run("ls-tree", "-z", "refs/heads/" + BRANCH, "events.jsonl", check=False))


def is_tracked(top: str) -> bool:
    """Whether git tracks files below a worktree's `.thrum`, as the old layout had it."""
    return bool(Git(top).run("ls-files", "-z", "--", ".thrum", check=False))


def disconnection(places: Places) -> list:
    """As `removal`, of a worktree's own `.thrum` alone.  Raises ThrumError where git tracks what would go."""
    if is_tracked(places.top):
        raise ThrumError(f"git tracks files below {places.local}; run 'thrum migrate' first, or 'git rm -r --cached .thrum'")
    return [("Removed: .thrum/", lambda: remove_tree(places.local))] if is_there(places.local) else []


def removal(places: Places, branch: bool) -> list:
    """What has to be done to take thrum out of a repository, as pairs of words and a function; the daemon has stopped.

    `branch`: also that, and what only it keeps alive.
    """
    steps, common = disconnection(places), places.common
    for folder in sorted({hooks_folder(top) for top in {places.top, *worktrees_of(common)} if is_connected(top, places.local)}):
        steps += guard_removal(folder, places.top)
    sync, there, last = os.path.dirname(places.sync), is_our_branch(places), []
    if there and not branch and not branch_problem(places):
        steps.insert(0, ("", lambda: commit_branch(places, "Keep what was said")))
    for _, path in registered_worktrees(common):
        if is_there(path + "/.thrum") and is_connected(path, places.local) and not is_tracked(path):
            steps.append((f"Removed: {path}/.thrum/", lambda path=path: remove_tree(path + "/.thrum")))
    if is_there(sync) or sync_entries(places):
        steps.append((f"Removed: the worktree of {BRANCH}", lambda: remove_sync(places)))
    if there and branch:
        last.append((f"Removed: the branch {BRANCH}", lambda: remove_branch(places)))
    for path, name in ((places.top + "/.gitignore", ".gitignore"), (common + "/info/exclude", ".git/info/exclude")):
        if IGNORED_BECAUSE.encode() in (file_bytes(path) or b""):
            steps.append((f"Cleaned: {name}", lambda path=path: remove_ignore_lines(path)))
    return steps + last         # of a very large repository git may take too long to say what is unreached; its gc removes that


def remove_sync(places: Places) -> None:
    """Remove the worktree of the branch and what git knows about it."""
    for entry in sync_entries(places):
        shutil.rmtree(entry)
    remove_tree(os.path.dirname(places.sync))
    remove_if_empty(places.common + "/worktrees")


def remove_branch(places: Places) -> None:
    """Remove the branch with its reflog, and the loose objects that nothing else reaches."""
    git, ref = Git(places.root), "refs/heads/" + BRANCH
    tips = {git.run("rev-parse", "--verify", "-q", ref, check=False).decode().strip()}
    for line in (file_bytes(f"{places.common}/logs/{ref}") or b"").decode(errors="replace").splitlines():
        tips.update(line.split(" ")[:2])
    tips = "\n".join(tip for tip in tips if tip.strip("0")).encode()
    loose = {}
    try:
        objects = git.run("rev-list", "--objects", "--ignore-missing", "--stdin", input=tips, timeout_s=PRUNE_S, check=False)
        for line in objects.decode(errors="replace").splitlines():
            name = line.split(" ")[0]
            path = f"{places.common}/objects/{name[:2]}/{name[2:]}"
            if os.path.isfile(path):
                loose[name] = path
    finally:
        git.run("update-ref", "-d", ref)
    remove_if_empty(places.common + "/logs/refs/heads", places.common + "/logs/refs", places.common + "/logs")
    if loose:       # asked last: whatever a ref, a reflog, an index or a worktree of anybody reaches is not in this list
        unreached = git.run("prune", "-n", "--expire=now", timeout_s=PRUNE_S, check=False).decode().split()
        for name in loose.keys() & set(unreached):
            remove(loose[name])
            remove_if_empty(os.path.dirname(loose[name]))


def old_logs(thrum: str) -> list:
    """The log files of the old layout, which had them on the branch of the code."""
    return [path for path in log_files(thrum)
            if os.path.dirname(path) != thrum or os.path.basename(path) in ("events.jsonl", "messages.jsonl")]


OLD_PATHS = (".thrum/events.jsonl", ".thrum/messages.jsonl", ".thrum/messages", ".thrum/schema_version")
OLD_IGNORED = (b".thrum/var/", b".thrum/events.jsonl", b".thrum/messages/")


def tracked_logs(root: str) -> list:
    """What of the old layout git tracks on the branch of the code."""
    return [os.fsdecode(path) for path in Git(root).run("ls-files", "-z", "--", *OLD_PATHS).split(b"\0") if path]


def clean_gitignore(path: str) -> bool:
    """Take the lines of the old layout out of .gitignore; whether there were some."""
    return _drop_lines(path, lambda line, _: line.strip() in OLD_IGNORED)


def clean_gitattributes(path: str) -> bool:
    """Take the merge drivers of the old layout, and the comment above them, out of .gitattributes; whether there were some."""
    def ours(line):
        return line.startswith(b".thrum/") and b"merge=union" in line
    return _drop_lines(path, lambda line, following: ours(line) or (
        line.startswith(b"#") and b"thrum" in line.lower() and bool(following) and ours(following[0])))


def _drop_lines(path: str, unwanted) -> bool:
    """Write a file without the lines that are unwanted (asked with those that follow); whether there were some."""
    lines = (file_bytes(path) or b"").splitlines(keepends=True)
    kept = [line for n, line in enumerate(lines) if not unwanted(line, lines[n + 1:n + 2])]
    if len(kept) == len(lines) or os.path.islink(path):
        return False
    _write_again(path, b"".join(kept))
    return True


# ================================================================== 20  Methods
#
# A row says what may be asked, and dispatch holds callers to it.  Names end in `!` when a value must be given and
# not be empty.  A method that writes runs in the ledger's batch and may use `context.append`; all others read.

ACTIVE_S = 24 * 3600            # seconds after which somebody who was not seen is worth a warning
STALE_DAYS = 30                 # days after which an agent that was not seen counts as an orphan, as in the reference
WORK_SHARED = (WORK_FILES, 200, 50, 10, 0)      # items in the lists of a work context, until it fits an event
REMOVE_MAX = 20_000             # messages removed by one call: bounds the transaction that others wait for
REMOVE_BYTES = LINE_MAX // 2    # of ids in one event, which has to fit a line with its envelope and escapes
OVERDUE_DAYS = 7                # days after which mail that nobody has read is no longer worth a notice
NAME_IS_ROLE = 'agent name "{0}" cannot be the same as its role — use a distinct name (e.g., \'{0}_main\')'
SUBSCRIPTIONS_MAX = 100         # of one session: who wants more wants all
WAIT_DEFAULT_MS = 30_000        # as the command waits when nobody says
WAIT_MAX_MS = 600_000           # one `message.wait`; a caller that wants more asks again from where it was
SCAN_MAX = 10_000               # events that one `event.wait` looks at, where few are of the topics that it wants: some 10 ms
EVENTS_BYTES = 1 << 20          # bytes of events after which an answer is full
TOLD_OF_MESSAGES = ("seq", "type", "timestamp", "message_id", "thread_id", "agent_id", "session_id")     # as they stand in the log
BATCH_READ_MAX = 5_000          # messages marked at once: bounds the transaction that others wait for
INTEGER_MAX = 1 << 53           # what every JSON reader keeps exactly (RFC 8259, section 6)
PAIR = object()                 # {"type": …, "value": …}
PREVIEW_MAX = 200               # characters of a message in its trace
TASKS_LISTED = 50               # tasks when nobody says how many
SNIPPET = 160                   # characters of a message around what was searched for: two lines of a terminal
SEARCH_WORDS_MAX = 32           # words of a query: more is a text, not a question
AWAY_NAMES = 5                  # names in a warning
NOTICE_FILES = 20               # files that a part of a notice names
NOTICE_PATHS = LINE_MAX // 16   # characters of paths that it keeps for the next one: it has to fit a line, with escapes
NOTICE_PAIRS = 60               # agents whose conflicts it is about; the next look tells of the others
RANGES_SHOWN = 5                # places in a file that are named
DELIVERY_STATES = (("answered", "answered_at"), ("read", "read_at"), ("seen", "shown_at"), ("pushed", "pushed_at"),
                   ("delivered", "delivered_at"))      # the furthest first


ONE_BY_ONE = "one by one"       # slow, and has a thread for itself: calls that wait for each other keep no others waiting


class Method(Record):
    """What one JSON-RPC method takes and does."""

    handler: object
    params: dict
    help: str
    writes: bool = False
    waits: str = ""             # the handler gives None until there is something, in a list of this name
    queues: bool = False        # it raises Conflict until it can be done, which `wait_ms` waits for
    aliases: dict = {}          # other spellings of parameters (design, decision 23)
    preview: str = ""           # with this parameter, or without it if it begins with "!", it changes nothing and is a read
    indexes: bool = False       # every message has to be in the full-text index first
    prepare: object = None      # of one that writes: what takes long, done before it; its result is `context.prepared`
    elsewhere: str = ""         # it is for WebSocket clients only, and this is what others are told
    private: bool = False       # it is for the Unix socket only
    slow: object = False        # it asks git, or ONE_BY_ONE: threads of their own, so that it keeps no quick question waiting

    def takes_long(self) -> bool:
        """Whether what comes after it should not wait for it."""
        return bool(self.waits or self.queues or self.slow)


def check_params(method: Method, params) -> dict:
    """The parameters of a call as its row wants them; raises InvalidParams naming the field."""
    if params is None:
        params = {}
    if not isinstance(params, dict):
        raise InvalidParams("invalid params: params must be an object")
    checked, fields, aliases = {}, method.params, method.aliases
    for name, value in params.items():
        name = aliases.get(name, name)
        kind = fields.get(name) or fields.get(name + "!")
        if kind and value is not None:
            checked[name] = _check_value(name, kind, value)
    for field in fields:
        if field[-1] == "!" and checked.get(field[:-1], "") == "":
            raise ThrumError(f"{field[:-1]} is required")
    return checked


_KIND_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false", dict: "an object"}


def _check_value(name: str, kind, value):
    if isinstance(kind, list):
        if not isinstance(value, list) or len(value) > LIST_MAX:
            raise InvalidParams(f"invalid params: {name} must be an array of at most {LIST_MAX:,}")
        return [_check_value(f"{name}[{i}]", kind[0], item) for i, item in enumerate(value)]
    if kind is PAIR:
        if not isinstance(value, dict) or not all(isinstance(value.get(k), str) and is_label(value[k]) for k in ("type", "value")):
            raise InvalidParams(f"invalid params: {name} must be an object with the texts type and value")
        return {"type": value["type"], "value": value["value"]}
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise InvalidParams(f"invalid params: {name} must be {_KIND_NAMES[kind]}")
    if kind is str:
        check_text(value, name, REQUEST_MAX)
    if kind in (int, float) and not abs(value) <= INTEGER_MAX:      # NaN is not, either
        raise InvalidParams(f"invalid params: {name} is out of range")
    if kind is dict:
        try:
            canonical(value)
        except (ValueError, RecursionError):
            raise InvalidParams(f"invalid params: {name} holds what JSON in UTF-8 cannot") from None
    return value


def _stamp(ns) -> str:
    return stamp_of(ns) if ns else ""


# ---- who is calling

def caller_of(context: Context, params: dict) -> str:
    """The agent id of the caller: the one in the request, else the identity of the daemon's own worktree."""
    given = params.get("caller_agent_id")
    if given:
        return given
    places = context.ledger.places
    return resolve_caller(read_identities(places.root + "/.thrum"), {}, printable(os.path.basename(places.root))).agent_id()


def session_of(context: Context, agent_id: str) -> dict:
    """The open session that an agent needs for what it does."""
    session = context.store.open_session(agent_id)
    if not session:
        raise ThrumError(f"resolve agent and session: no active session found for agent {agent_id} "
                         "(you must start a session first)")
    return session


# ---- platform, agents, sessions

def health(context: Context, params: dict) -> dict:
    ledger = context.ledger
    return {
        "status": "ok", "uptime_ms": int((context.world.monotonic() - ledger.facts["started"]) * 1000), "version": __version__,
        "repo_id": ledger.repo_id, "sync_state": "error" if ledger.export_problem else "ok", "pid": os.getpid(),
        "epoch": ledger.journal.epoch, "last_seq": context.store.reached()[0], "bad_lines": ledger.bad_lines.count,
        "rebuilt_events": ledger.rebuilt, **context.store.counts(), **compact(ws_port=ledger.facts.get("port"))}


def page_link(context: Context, params: dict) -> dict:
    """The address of the page; where clients need a token, with a code that a browser can use once."""
    if not context.ledger.facts.get("port"):
        raise ThrumError("the daemon has no port for the page; see 'thrum daemon logs'")
    return {"url": context.ledger.facts["link"]()}


def stop(context: Context, params: dict) -> dict:
    context.ledger.facts["stop"]()
    return {"stopping": True, "pid": os.getpid()}


def _agent_info(row: dict) -> dict:
    info = {key: row[key] or "" for key in ("agent_id", "kind", "role", "module", "display")}
    info["registered_at"] = stamp_of(row["registered_at"])
    if row["last_seen_at"]:
        info["last_seen_at"] = stamp_of(row["last_seen_at"])
    return info


def _refuse_taken(store: Store, name: str, what: str, kinds: tuple) -> None:
    """Raise ThrumError when something else goes by a name: mail to it would go to one of the two."""
    taken = {"group": lambda: store.group(name), "agent": lambda: store.agent(name), "person": lambda: store.agent("user:" + name),
             "role": lambda: name in store.roles()}
    for kind in kinds:
        if taken[kind]():
            raise ThrumError(f'{what} "{name}" is taken: there is {"an" if kind[0] == "a" else "a"} {kind} of that name — choose another')


def agent_register(context: Context, params: dict) -> dict:
    store, role = context.store, check_word(params["role"], "role")
    module = params["module"]
    if role in RESERVED_NAMES:
        raise InvalidParams(f"role '{role}' is reserved and cannot be used")
    if not is_label(module):
        raise InvalidParams(f"module must be a text of at most {PAIR_MAX} printable characters")
    display = params.get("display", "")
    if display and not is_label(display):
        raise InvalidParams(f"display must be a text of at most {PAIR_MAX} printable characters")
    name, again = params.get("name", ""), params.get("re_register", False)
    if name:
        try:
            check_name(name)
        except InvalidParams as error:
            raise InvalidParams(f"invalid agent name: {error}") from None
        if name == role and not (again and store.agent(name)):
            raise ThrumError(NAME_IS_ROLE.format(name))
    agent_id = name or unnamed_agent_id(context.ledger.repo_id, role, module)
    if not (again and store.agent(agent_id)):
        if name and name in store.roles():
            raise ThrumError(f"agent name \"{name}\" conflicts with existing role '{name}' — choose a different name")
        if store.agent(role):
            raise ThrumError(f"role \"{role}\" conflicts with existing agent name '{role}' — choose a different role")
    known = store.agent(agent_id)
    _refuse_taken(store, agent_id, "agent name", ("group", "person"))
    if not (known and known["role"] == role):
        _refuse_taken(store, role, "role", ("group", "person"))
    force = params.get("force", False)
    if known and known["daemon"] != context.ledger.daemon_id and not force \
            and context.world.now_ns() - known["last_seen_at"] < ACTIVE_S * NS:
        raise Conflict(f"agent '{agent_id}' was registered on {known['hostname'] or 'another machine'} and last seen "
                       f"{_stamp(known['last_seen_at'])[:19]}Z; choose another name, or take it over with --force")
    elsewhere, session = params.get("worktree", ""), store.open_session(agent_id)
    if known and session and not force and known["worktree"] and elsewhere and known["worktree"] != elsewhere \
            and context.world.now_ns() - max(known["last_seen_at"], context.ledger.seen.get(agent_id, 0)) < PRESENCE_GAP_S * NS:
        raise Conflict(f"agent '{agent_id}' is active in the worktree {known['worktree']}; choose another name, or take it over "
                       "with --force")
    if known and (known["role"], known["module"]) == (role, module):
        if not again and not force and known["daemon"] == context.ledger.daemon_id:
            return {"agent_id": agent_id, "status": "registered"}
        status = "updated" if again else "registered"
    else:
        status = "registered"
        others = [row for row in store.agents(role, module) if row["agent_id"] != agent_id and row["kind"] == "agent"]
        if others and not (force or again):
            info = _agent_info(others[0])
            return {"agent_id": "", "status": "conflict", "conflict": {
                "existing_agent_id": info["agent_id"], "registered_at": info["registered_at"],
                "last_seen_at": info.get("last_seen_at", "")}}
    if params.get("dry_run"):
        return {"agent_id": agent_id, "status": status}
    if known and known["daemon"] != context.ledger.daemon_id:
        for session in store.sessions(agent_id, active=True):
            _end_session(context, session, "superseded", session["started_at"])
    context.append("agent.register", after=known["registered_at"] if known else store.removed_at(agent_id), agent_id=agent_id,
                   kind="agent", name=name, role=role, module=module, display=display, worktree=params.get("worktree", ""),
                   hostname=context.world.hostname())
    return {"agent_id": agent_id, "status": status}


def agent_delete(context: Context, params: dict) -> dict:
    name = params.get("name", "").lstrip("@")
    if not name:
        raise ThrumError("agent name is required")
    try:
        if (context.store.agent(name) or {}).get("kind") != "agent":    # one that there is may have an id that nobody would choose
            check_name(name)
    except InvalidParams as error:
        raise InvalidParams(f"invalid agent name: {error}") from None
    _delete_agent(context, name, "manual", "manual deletion")
    return {"agent_id": name, "deleted": True, "message": f"Agent {name} deleted successfully"}


def _our_worktrees(places: Places) -> list:
    """The worktrees of the repository that use this installation; another may have one of its own."""
    return [top for top in worktrees_of(places.common) or [places.root] if is_connected(top, places.thrum)]


def _identities_in(top: str) -> list:
    """The identities of a worktree that can be read: pairs of file name and Identity."""
    found = []
    for file, content in read_identities(top + "/.thrum"):
        try:
            found.append((file, parse_identity(file, content)))
        except NoIdentity:
            pass
    return found


def _delete_agent(context: Context, agent_id: str, method: str, reason: str) -> None:
    """Take an agent out, with everything that it wrote: a tombstone, so that it stays out on all machines."""
    agent = context.store.agent(agent_id)
    if not agent:
        raise ThrumError(f"agent not found: {agent_id}")
    context.append("agent.cleanup", after=max(agent["registered_at"], context.store.newest_act(agent_id)),
                   above=context.store.last_fence(), agent_id=agent_id, reason=reason, method=method)
    tops = _our_worktrees(context.ledger.places)

    def remove_files():         # by the id in it, not by its name: a file may be called as it likes
        for top in tops:
            own = [f"identities/{file}" for file, identity in _identities_in(top) if identity.agent_id() == agent_id]
            for file in (*own, *("context/" + name for name in context_files(agent_id))):
                try:
                    remove(f"{top}/.thrum/{file}")
                except OSError:
                    pass        # it is out of the team; a file that cannot be removed is the worktree's owner's
    context.afterwards.append(remove_files)


def _names_in(folder: str) -> list:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _orphans(context: Context, threshold: int) -> list:
    """The agents of this machine that nobody can be any more, each with the reason."""
    ledger, now, orphans = context.ledger, context.world.now_ns(), []
    tops = _our_worktrees(ledger.places)
    files = {identity.agent_id(): identity.data for top in reversed(tops) for _, identity in _identities_in(top)}
    named_files = [file for top in tops for file in _names_in(top + "/.thrum/identities")]      # also what cannot be read
    all_read = len(named_files) < IDENTITIES_MAX
    worktrees = {printable(os.path.basename(top)) for top in tops}
    named = {data.get("branch") for data in files.values() if type(data.get("branch")) is str} - {""}
    listed = Git(ledger.places.root).run("for-each-ref", "--format=%(refname:short)", "refs/heads", check=False) if named else b""
    gone = named - set(listed.decode(errors="replace").split("\n")) if listed else set()       # without a commit there is no branch
    for agent in context.store.agents():
        if agent["kind"] != "agent":
            continue
        seen = max(agent["last_seen_at"], ledger.seen.get(agent["agent_id"], 0))
        days = (now - seen) // (ACTIVE_S * NS) if seen else 9999
        data, reasons, missing = files.get(agent["agent_id"]), [], {"worktree_missing": False, "branch_missing": False}
        worktree = (data or {}).get("worktree") or agent["worktree"] or ""
        branch = (data or {}).get("branch") or ""
        if agent["daemon"] == ledger.daemon_id:     # of others only their own machine can know
            # An agent that no worktree was named for never had a file.
            if data is None and agent["worktree"] and all_read and agent["agent_id"] + ".json" not in named_files:
                reasons.append("no identity file")
                missing = {"worktree_missing": True, "branch_missing": True}
            elif data and type(worktree) is str and worktree and worktree not in worktrees and days:    # else it was renamed
                reasons.append(f"worktree {worktree} is gone")
                missing["worktree_missing"] = True
            # Somebody who works here may be on a branch that was merged and deleted, or that has no commit yet.
            if branch in gone and not context.store.open_session(agent["agent_id"]):
                reasons.append(f"branch {branch} is gone")
                missing["branch_missing"] = True
        if seen and days > threshold:
            reasons.append(f"not seen for {days} days")
        if reasons:
            orphans.append({
                "agent_id": agent["agent_id"], "name": agent["agent_id"], "role": agent["role"], "module": agent["module"],
                "worktree": str(worktree), "branch": branch if type(branch) is str else "", "last_seen_at": _stamp(seen), **missing,
                "days_since_last_seen": days, "reason": ", ".join(reasons),
                "message_count": context.store.written(agent["agent_id"])})
    return orphans


def agent_cleanup(context: Context, params: dict) -> dict:
    dry_run, force = params.get("dry_run", False), params.get("force", False)
    if dry_run and force:
        raise InvalidParams("dry_run and force are mutually exclusive")
    threshold = params.get("threshold", STALE_DAYS)
    if threshold < 0:
        raise InvalidParams("threshold must not be negative")
    orphans, deleted = _orphans(context, threshold), []
    for orphan in orphans if force else ():
        _delete_agent(context, orphan["agent_id"], "cleanup", orphan["reason"])
        deleted.append(orphan["agent_id"])
    if not orphans:
        message = ""
    elif deleted:
        message = f"Deleted {len(deleted)} orphaned agent(s)"
    else:
        message = f"Found {len(orphans)} orphaned agent(s)" if dry_run else "Use --force to delete all orphans without prompting"
    return {"orphans": orphans, "deleted": deleted, "deleted_count": len(deleted), "dry_run": dry_run, **compact(message=message)}


def user_identify(context: Context, params: dict) -> dict:
    git = Git(context.ledger.places.root)
    name, email = (git.run("config", "--get", key, check=False).decode(errors="replace").strip() for key in ("user.name", "user.email"))
    if not name:
        raise ThrumError("git config user.name not set: configure with 'git config user.name \"Your Name\"'")
    username = user_name_from_git(name)
    if username == "user":      # nothing of the name is left in ASCII
        username = user_name_from_git(email.partition("@")[0])
    return {"username": username, "email": email, "display": name}


def user_register(context: Context, params: dict) -> dict:
    """A person joins, as `user:<username>`; the token is for clients that expect one, and nothing rests on it."""
    username, display = params["username"], params.get("display", "")
    if username.startswith("agent:"):
        raise InvalidParams("username cannot start with 'agent:' prefix")
    if not WORD.issuperset(username) or len(username) > USER_MAX:
        raise InvalidParams(f"invalid username format: must be alphanumeric, underscore, or hyphen (1-{USER_MAX} chars)")
    if display and not is_label(display):
        raise InvalidParams(f"display must be a text of at most {PAIR_MAX} printable characters")
    user_id = "user:" + username
    known = context.store.agent(user_id)
    if not known:
        _refuse_taken(context.store, username, "username", ("group", "agent", "role"))
    if not known or (display and display != known["display"]):
        context.append("agent.register", after=known["registered_at"] if known else 0, agent_id=user_id, kind="user", role=username,
                       module="ui", display=display, hostname=context.world.hostname())
    return {"user_id": user_id, "username": username, **compact(display_name=display or (known or {}).get("display")),
            "token": context.world.new_id("tok"), "status": "existing" if known else "registered"}


def agent_list(context: Context, params: dict) -> dict:
    return {"agents": [_agent_info(row) for row in context.store.agents(params.get("role", ""), params.get("module", ""))]}


def agent_whoami(context: Context, params: dict) -> dict:
    agent_id = caller_of(context, params)
    agent, session = context.store.agent(agent_id) or {}, context.store.open_session(agent_id)
    work = context.store.newest_intent(agent_id) or {}
    if work and work["ended_at"] and work["ended_at"] < context.world.now_ns() - WORK_ENDED_S * NS:
        work = {}               # what it did then says nothing about now
    reply = {"agent_id": agent_id, "role": agent.get("role") or "", "module": agent.get("module") or "",
             "display": agent.get("display") or "", "source": "caller" if params.get("caller_agent_id") else "identity_file"}
    if session:
        reply.update(session_id=session["session_id"], session_start=stamp_of(session["started_at"]))
    return {**reply, **compact(branch=work.get("branch"), intent=work.get("intent"))}


# What the items of a work context hold; those of another machine may be anything.
COMMIT_SUMMARY = {"sha": "", "message": "", "files": []}
FILE_CHANGE = {"path": "", "last_modified": "", "additions": 0, "deletions": 0, "status": "modified"}


def _shaped(item: dict, shape: dict) -> dict:
    """An item with all fields of its shape, what is not of the right type replaced."""
    shaped = {**item, **{field: item[field] if type(item.get(field)) is type(empty) else empty for field, empty in shape.items()}}
    return {**shaped, "files": [file for file in shaped["files"] if type(file) is str]} if "files" in shape else shaped


def _work_now(context: Context, rows: list) -> dict:
    """What git says now of the work of some sessions: session id -> its facts, where it says something."""
    where = _sessions_at_work(context)
    ids = {row["session_id"] for row in rows}
    tops = list({where[session_id][0]: None for session_id in ids if session_id in where})
    try:
        bases = _work(context).bases() if len(tops) > 1 else None
    except GitError:            # then each says so for itself
        bases = None
    facts = dict(zip(tops, together([lambda top=top: _facts(context, top, bases) for top in tops])))
    return {session_id: facts[top] for session_id, (top, _) in where.items() if facts.get(top)}


def _work_context(context: Context, row: dict, now: dict | None = None) -> dict:
    """What is known of the work of a session, from a row of the store; `now` is what git says now.

    What git said a day ago of a worktree without a commit of its own says nothing any more (storage contract, section 13.3).
    """
    lists, stale = {}, stamp_of(context.world.now_ns() - WORK_STALE_S * NS)
    if (row.get("git_updated_at") or "") < stale and row.get("unmerged_commits") in (None, "[]"):
        row = {**row, **dict.fromkeys(WORK_FACTS)}
    for field, shape in (("unmerged_commits", COMMIT_SUMMARY), ("file_changes", FILE_CHANGE), ("uncommitted_files", ""),
                         ("changed_files", "")):
        try:
            found = decode(row.get(field) or "[]")
        except ValueError:
            continue
        found = [item for item in found if type(item) is type(shape)] if isinstance(found, list) else []
        lists[field] = [_shaped(item, shape) for item in found] if shape else found
    facts = now or {**lists, **{field: row.get(field) for field in ("branch", "worktree_path", "git_updated_at")}}
    return {"session_id": row["session_id"], "agent_id": row["agent_id"], **compact(**facts, **{
        field: row.get(field) for field in ("current_task", "task_updated_at", "intent", "intent_updated_at")})}


def agent_list_context(context: Context, params: dict) -> dict:
    """What agents with an open session do; `agent_id` is exact, `role` is additive to the reference."""
    file, branch, fresh = params.get("file", ""), params.get("branch", ""), params.get("fresh", False)
    rows = context.store.work_contexts(params.get("agent_id", ""), params.get("role", ""), *("", "") if fresh else (branch, file))
    now = _work_now(context, rows) if fresh else {}
    return {"contexts": [work for work in [_work_context(context, row, now.get(row["session_id"])) for row in rows]
                         if (not file or file in work.get("changed_files", []) + work.get("uncommitted_files", []))
                         and branch in ("", work.get("branch"))]}


def _work(context: Context) -> Work:
    return context.ledger.facts.setdefault("work", Work(context.ledger.places, context.world))


def _worktree_finder(context: Context):
    """A function that gives the worktree of this repository which a session names, "" for any other place: that is not looked at."""
    tops = _our_worktrees(context.ledger.places)
    names = {name: top for top in reversed(tops) for name in (os.path.realpath(top), worktree_label(top))}
    return lambda name: names.get(name) or (names.get(os.path.realpath(name), "") if os.path.isabs(name) else "")


def _sessions_at_work(context: Context) -> dict:
    """The open sessions of this machine that work in a worktree: session id -> (worktree, agent id)."""
    find, found = _worktree_finder(context), {}
    for name, agent_id, session_id in context.store.open_worktrees(context.ledger.daemon_id):
        top = find(name)
        if top:
            found.setdefault(session_id, (top, agent_id))
    return found


def _sessions_nowhere(context: Context) -> set:
    """The open sessions of this machine whose worktree is not there any more."""
    return {session_id for name, _, session_id in context.store.open_worktrees(context.ledger.daemon_id)
            if is_whole_path(name) and not os.path.isdir(name)}


def _facts(context: Context, top: str, bases: tuple | None = None) -> dict | None:
    """What git says about a worktree; None where it says nothing."""
    try:
        return _work(context).facts(top, bases)
    except GitError as error:
        logging.getLogger("thrum").warning("%s: %s", top, error)
        return None


def _look_at(context: Context, refs: list) -> dict | None:
    """What git says about the worktree that a session's references name; None where it says nothing."""
    find = _worktree_finder(context)
    top = next(filter(None, (find(value) for kind, value in refs if kind == "worktree")), "")
    return _facts(context, top) if top else None


def look_at_session(context: Context, params: dict) -> dict | None:
    """What git says about the work of the session that a call names, or begins."""
    refs = context.store.session_pairs(params["session_id"])[1] if "session_id" in params else []
    refs = [pair for pair in refs if pair not in pairs_of(params.get("remove_refs"))]
    return _look_at(context, refs + pairs_of(params.get("add_refs")) + pairs_of(params.get("refs")))


def session_start(context: Context, params: dict) -> dict:
    store, agent_id = context.store, params["agent_id"]
    agent = store.agent(agent_id)
    if not agent:
        raise ThrumError(f"agent not found: agent {agent_id} not registered")
    newest = agent["registered_at"]
    for session in store.sessions(agent_id, active=True):
        if session["daemon"] == context.ledger.daemon_id:
            newest = max(newest, session["started_at"])
            _end_session(context, session, "crash_recovered", newest)
    event = context.append("agent.session.start", after=newest, session_id=context.world.new_id("ses"), agent_id=agent_id)
    if params.get("scopes") or params.get("refs"):
        context.append("session.update", after=ns_of(event["timestamp"]), session_id=event["session_id"], agent_id=agent_id,
                       scopes=params.get("scopes"), refs=params.get("refs"))
    if context.prepared:
        store.note_work(event["session_id"], context.prepared)
    return {"session_id": event["session_id"], "agent_id": agent_id, "started_at": event["timestamp"],
            **compact(branch=(context.prepared or {}).get("branch"))}


def _open_session(context: Context, session_id: str) -> dict:
    session = context.store.session(session_id)
    if not session:
        raise ThrumError(f"session not found: {session_id}")
    if session["ended_at"]:
        raise ThrumError(f"session {session_id} has already ended")
    return session


def _end_session(context: Context, session: dict, reason: str, after: int) -> dict:
    """End a session, and tell the other machines what it did: its work context, as much as fits one event."""
    event = context.append("agent.session.end", after=after, session_id=session["session_id"], reason=reason)
    row = context.store.work_context(session["session_id"])
    work = _work_context(context, {**row, "agent_id": ""}) if row else {}
    work.pop("agent_id", None)
    for limit in WORK_SHARED:
        for field, value in work.items():
            if type(value) is list:
                work[field] = [{**item, "files": item["files"][:limit]} if "files" in item else item for item in value[:limit]]
        if len(canonical(work)) < LINE_MAX // 2:
            break
    if len(work) > 1:
        context.append("agent.update", after=ns_of(event["timestamp"]), agent_id=session["agent_id"], work_contexts=[work])
    return event


def session_end(context: Context, params: dict) -> dict:
    session = _open_session(context, params["session_id"])
    reason = check_text(params.get("reason") or "normal", "reason", PAIR_MAX)
    if context.prepared:
        context.store.note_work(session["session_id"], context.prepared)
    event = _end_session(context, session, reason, session["started_at"])
    return {"session_id": session["session_id"], "ended_at": event["timestamp"],
            "duration_ms": (ns_of(event["timestamp"]) - session["started_at"]) // 1_000_000}


def session_list(context: Context, params: dict) -> dict:
    rows = context.store.sessions(params.get("agent_id", ""), params.get("active_only", False))
    return {"sessions": [{
        "session_id": row["session_id"], "agent_id": row["agent_id"], "started_at": stamp_of(row["started_at"]),
        **compact(ended_at=_stamp(row["ended_at"]), end_reason=row["end_reason"]), "last_seen_at": stamp_of(row["last_seen_at"]),
        **compact(intent=row["intent"], worktree=row["worktree"]), "status": "ended" if row["ended_at"] else "active"} for row in rows]}


def session_thread(context: Context, params: dict) -> dict:
    """The caller's open session and the thread that it works in; {} where either is missing."""
    session = context.store.open_session(caller_of(context, params))
    thread = session and context.store.thread_in_work(session)
    return {"session_id": session["session_id"], "thread_id": thread} if thread else {}


def session_heartbeat(context: Context, params: dict) -> dict:
    session = _open_session(context, params["session_id"])
    before = context.store.session_pairs(session["session_id"])
    changed = {}
    for kind, pairs in zip(("scopes", "refs"), before):
        kept = [pair for pair in pairs if pair not in pairs_of(params.get("remove_" + kind))]
        kept += [pair for pair in pairs_of(params.get("add_" + kind)) if pair not in kept]
        if kept != pairs:
            changed[kind] = pair_dicts(kept)
    if changed:
        context.append("session.update", after=session["started_at"], session_id=session["session_id"],
                       agent_id=session["agent_id"], **changed)
    now = context.world.now_ns()
    context.store.touch(session["session_id"], now)
    if context.prepared:
        context.store.note_work(session["session_id"], context.prepared)
    work = _work_context(context, {"agent_id": "", **(context.store.work_context(session["session_id"]) or session)})
    git = {"unmerged_commits": len(work.get("unmerged_commits", [])), "file_changes": work.get("file_changes", [])}
    return {"session_id": session["session_id"], "last_seen_at": stamp_of(now), **compact(branch=work.get("branch")),
            **(git if "git_updated_at" in work else {})}


def _session_text(context: Context, params: dict, field: str, at: str) -> dict:
    session = _open_session(context, params["session_id"])
    text = check_text(params.get(field, ""), field)
    event = context.append("session.update", after=session["started_at"], session_id=session["session_id"],
                           agent_id=session["agent_id"], **{field: text})
    return {"session_id": session["session_id"], field: text, at: event["timestamp"]}


def session_set_intent(context: Context, params: dict) -> dict:
    return _session_text(context, params, "intent", "intent_updated_at")


def session_set_task(context: Context, params: dict) -> dict:
    return _session_text(context, params, "current_task", "task_updated_at")


def team_list(context: Context, params: dict) -> dict:
    """Everybody with an open session, or with `include_offline` everybody, and what is shared."""
    seen, members, claims, conflicts = context.ledger.seen, [], {}, known_conflicts(context)
    live, held = _live_and_held(context)
    for claim in live:
        if claim["claim_id"] in held:
            claims.setdefault(claim["agent_id"], []).append(claim["path"])
    rows = context.store.team(params.get("include_offline", False))
    now, gone = _work_now(context, rows), _sessions_nowhere(context)
    for row in rows:
        last_seen = max(row["last_seen_at"], seen.get(row["agent_id"], 0))
        work = _work_context(context, {**row, "session_id": row["session_id"] or ""}, now.get(row["session_id"]))
        members.append({
            "agent_id": row["agent_id"], "kind": row["kind"], "role": row["role"], "module": row["module"],
            **compact(display=row["display"], hostname=row["hostname"], worktree=row["worktree"], session_id=row["session_id"],
                      session_start=_stamp(row["started_at"]), last_seen=_stamp(last_seen), intent=work.get("intent"),
                      current_task=work.get("current_task"), branch=work.get("branch"), git_updated_at=work.get("git_updated_at")),
            "unmerged_commits": len(work.get("unmerged_commits", [])), "file_changes": work.get("file_changes", []),
            "uncommitted_files": work.get("uncommitted_files", []), "claims": claims.get(row["agent_id"], []),
            "conflicts": [{"with": pair["with"], "files": [file["path"] for file in pair["files"]]}
                          for pair in conflicts.get(row["agent_id"], [])],
            "inbox_total": row["inbox_total"], "inbox_unread": row["inbox_unread"], "status": "active" if row["session_id"] else "offline",
            **({"worktree_gone": True} if row["session_id"] in gone else {})})
    everybody, groups = context.store.shared_messages()
    shared = {"broadcast_total": everybody, "groups": [{"name": name, "total": total} for name, total in groups]}
    return {"members": members, **({"shared_messages": shared} if everybody or groups else {})}


def work_who_has(context: Context, params: dict) -> dict:
    """Who has changed a file, or something below a folder: asked from git now in the worktrees of this machine.

    Of other machines, and where git cannot tell, it is what was known last.  `unattended`: worktrees with uncommitted changes
    in which nobody has a session.
    """
    store, work, ledger = context.store, _work(context), context.ledger
    path, now_ns = repo_path(params["file"], ""), context.world.now_ns()
    try:
        answers = work.changes_of(path, _our_worktrees(ledger.places))
    except GitError as error:
        logging.getLogger("thrum").warning("who-has: %s", error)
        answers = {}
    found, where = [], _sessions_at_work(context)
    met = {top for top, _ in where.values()}
    for row in store.work_contexts():
        top, _ = where.get(row["session_id"], ("", ""))
        if answers.get(top):
            state, uncommitted, committed = answers[top]
            now = {"branch": state.branch, "worktree_path": printable(top), "git_updated_at": stamp_of(now_ns)}
            found.append({**_work_context(context, row, now), "live": True, "file_changes": uncommitted + committed,
                          "uncommitted_files": [change["path"] for change in uncommitted],
                          "changed_files": [change["path"] for change in committed]})
        elif row["daemon"] == ledger.daemon_id:
            found.append({**_known_changes(context, row, path), "live": False})
    for row in store.contexts_elsewhere(ledger.daemon_id, stamp_of(now_ns - WORK_ENDED_S * NS)):
        found.append({**_known_changes(context, row, path), "live": False, **compact(hostname=row["hostname"])})
    left = [{"worktree_path": printable(top), **compact(branch=answer[0].branch), "file_changes": answer[1],
             "agents": sorted(identity.agent_id() for _, identity in _identities_in(top))}
            for top, answer in answers.items() if top not in met and answer and answer[1]]
    found = [known for known in found if known["uncommitted_files"] or known["changed_files"]]
    live, held = _live_and_held(context)
    claims = [_claim_info(context, claim) for claim in live if claim["claim_id"] in held and overlap(claim["path"], path or ".")]
    return {"file": path, "contexts": found, "claims": claims, "unattended": left}


def _known_changes(context: Context, row: dict, path: str) -> dict:
    """A stored work context, and of its files only those at or below a path."""
    work = {"uncommitted_files": [], "changed_files": [], "file_changes": [], **_work_context(context, row)}
    for field in ("uncommitted_files", "changed_files", "file_changes"):
        work[field] = [item for item in work[field] if is_below(item["path"] if field == "file_changes" else item, path)]
    return work


# ---- groups

def _actor(params: dict) -> str:
    """Who is noted as having changed a group."""
    return params.get("caller_agent_id") or "system"


def group_create(context: Context, params: dict) -> dict:
    name, store = params["name"].lstrip("@"), context.store
    if not (WORD | {"."}).issuperset(name) or len(name) > NAME_MAX or name in RESERVED_NAMES or not name.strip("."):
        raise InvalidParams(f"group name {name[:NAME_MAX]!r} is invalid or reserved; use up to {NAME_MAX} letters, digits, "
                            "'_', '-' and '.'")
    if store.group(name):
        raise ThrumError(f'group "{name}" already exists')
    _refuse_taken(store, name, "group name", ("agent", "person", "role"))
    event = context.append("group.create", group_id=context.world.new_id("grp"), name=name,
                           description=check_text(params.get("description", ""), "description"),
                           created_by=_actor(params))
    return {"group_id": event["group_id"], "name": name, "created_at": event["timestamp"]}


def _group(store: Store, name: str) -> dict:
    """A stored group, or the one that a role is (design, decision 3)."""
    group = store.group(name) or store.role_group(name)
    if not group:
        raise ThrumError(f'group "{name}" not found')
    return group


def _group_for_change(context: Context, name: str) -> dict:
    name = name.lstrip("@")
    if name == EVERYONE:
        raise ThrumError("cannot modify members of built-in @everyone group")
    return _stored_group(context.store, name)


def _stored_group(store: Store, name: str) -> dict:
    if not store.group(name) and store.role_group(name):
        raise ThrumError(f'group "{name}" is made of the agents of that role; create a group of another name to choose its members')
    return _group(store, name)


def group_member_add(context: Context, params: dict) -> dict:
    store, kind = context.store, params.get("member_type") or "agent"
    value = params["member_value"].lstrip("@")
    if kind not in ("agent", "role", "group"):
        raise ThrumError(f"invalid member_type \"{kind}\" (must be 'agent', 'role' or 'group')")
    group = _group_for_change(context, params["group"])
    if kind == "agent" and not store.agent(value):
        hint = "; it is a group: use --group-member" if store.group(value) else \
            "; it is a role: use --role" if value in store.roles() else ""
        raise ThrumError(f'agent "{value}" not found — agent must be registered before being added to a group{hint}')
    if kind == "role" and value != "*" and value not in store.roles():
        raise ThrumError(f'role "{value}" not found — no registered agents with this role')
    if kind == "group":
        if not store.group(value):
            raise ThrumError(f'group "{value}" not found')
        if group["name"] in _groups_inside(store, value):
            raise ThrumError(f'group "{value}" contains "{group["name"]}": a group cannot be inside itself')
    members = store.group_members(group["name"])
    if not any((m["member_type"], m["member_value"]) == (kind, value) for m in members):
        context.append("group.member.add", after=max([group["created_at"], *(m["at"] for m in members)]),
                       group_id=group["group_id"], member_type=kind, member_value=value,
                       added_by=_actor(params))
    return {"group": group["name"], "member_type": kind, "member_value": value, "member": value}


def _groups_inside(store: Store, name: str) -> set:
    """The names of the group itself and of all that are nested in it."""
    found, left = set(), [name]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += [m["member_value"] for m in store.group_members(name) if m["member_type"] == "group"]
    return found


def group_member_remove(context: Context, params: dict) -> dict:
    store, kind = context.store, params.get("member_type") or "agent"
    value, group, removed = params["member_value"].lstrip("@"), _group_for_change(context, params["group"]), False
    for group_id in store.groups_named(group["name"]):
        added = store.membership(group_id, kind, value)
        if added:
            removed = True
            context.append("group.member.remove", after=added, group_id=group_id, member_type=kind, member_value=value,
                           removed_by=_actor(params))
    return {"group": group["name"], "member_type": kind, "member_value": value, "member": value, "removed": removed}


def group_delete(context: Context, params: dict) -> dict:
    name, by = params["name"].lstrip("@"), _actor(params)
    if name == EVERYONE:
        raise ThrumError("cannot delete built-in @everyone group")
    group = _stored_group(context.store, name)
    newest = max([group["created_at"], *(m["at"] for m in context.store.group_members(name))])
    for group_id in context.store.groups_named(name):
        event = context.append("group.delete", after=newest, group_id=group_id, deleted_by=by)
    if params.get("delete_messages"):
        _remove_messages(context, context.store.messages_with(FAR, scope=("group", name))[0], "group deleted", by)
    return {"name": name, "deleted_at": event["timestamp"], "deleted": True}


def _members(store: Store, name: str) -> list:
    if not store.group(name):
        return [{"member_type": "role", "member_value": name, "added_at": stamp_of(_group(store, name)["created_at"]),
                 "added_by": "system"}]
    return [{"member_type": row["member_type"], "member_value": row["member_value"], "added_at": stamp_of(row["at"]),
             **compact(added_by=row["by"])} for row in store.group_members(name)]


def group_info(context: Context, params: dict) -> dict:
    group = _group(context.store, params["name"].lstrip("@"))
    return {"group_id": group["group_id"], "name": group["name"], **compact(description=group["description"]),
            "created_at": stamp_of(group["created_at"]), "created_by": group["created_by"] or "system",
            "members": _members(context.store, group["name"])}


def group_members(context: Context, params: dict) -> dict:
    """The members as they were added; with `expand` also the agents that they come to now, by id."""
    store, name = context.store, params["name"].lstrip("@")
    _group(store, name)
    reply = {"name": name, "members": _members(store, name)}
    return {**reply, "expanded": store.agent_ids(store.expand("group", name))} if params.get("expand") else reply


def group_list(context: Context, params: dict) -> dict:
    store = context.store
    found = store.groups()
    found += [{**store.role_group(role), "member_count": 1} for role in store.roles() - {group["name"] for group in found}]
    return {"groups": [{"group_id": row["group_id"], "name": row["name"], **compact(description=row["description"]),
                        "member_count": row["member_count"], "created_at": stamp_of(row["created_at"])}
                       for row in sorted(found, key=lambda row: row["name"])]}


# ---- messages

def _body(row: dict) -> dict:
    return {"format": row["format"], "content": row["content"], **compact(structured=row["structured"])}


def _audiences(row: dict) -> list:
    return _named(*stored_pairs(row))


def _named(refs: list, scopes: list) -> list:
    """Whom a message with these pairs names, as callers are told."""
    mentions, groups = audience_of(refs, scopes)
    found = [{"type": "mention", "value": v} for v in mentions] + [{"type": "group", "value": v} for v in groups]
    return found or [{"type": "broadcast", "value": EVERYONE}]


def _via(row: dict) -> dict:
    """The person who wrote in an agent's name and said so."""
    return {"authored_by": row["authored_by"], "disclosed": True} if row["authored_by"] and row["disclosed"] else {}


def _summary(row: dict, **more) -> dict:
    return {"message_id": row["message_id"], **compact(thread_id=row["thread_id"], reply_to=row["reply_to"]),
            "agent_id": row["agent_id"], **_via(row), "body": _body(row), "created_at": stamp_of(row["at"]),
            **compact(updated_at=_stamp(row["updated_at"])), "deleted": bool(row["deleted_at"]),
            "is_read": row.get("is_read", False), "seq": row["seq"], **more}


def message_send(context: Context, params: dict) -> dict:
    store, content = context.store, params["content"]
    form = params.get("format") or "markdown"
    if form not in ("markdown", "plain", "json"):
        raise ThrumError(f"invalid format: {form} (must be 'markdown', 'plain', or 'json')")
    caller, target = caller_of(context, params), params.get("acting_as", "")
    author, key = target or caller, params.get("send_key", "")
    if key and len(key) > PAIR_MAX:
        raise InvalidParams(f"send_key is longer than {PAIR_MAX} characters")
    before = store.message_by_key(author, key) if key else None
    session = session_of(context, caller) if not before else None       # a repetition is answered after the session's end too
    if target:
        if not caller.startswith("user:"):
            raise ThrumError(f"only users can impersonate agents (caller: {caller})")
        if target.startswith("user:"):
            raise ThrumError(f"users can only impersonate agents, not other users (target: {target})")
        if not store.agent(target):
            raise ThrumError(f"target agent does not exist: {target}")
    if before:
        return _repeated(store, before)
    # Scopes and references of routing types are what they say, whether they come as mentions or not.
    given_scopes, given_refs = pairs_of(params.get("scopes")), pairs_of(params.get("refs"))
    wanted = [*params.get("mentions", []), *(v for k, v in given_refs if k in ("mention", "group")),
              *(v for k, v in given_scopes if k == "group")]
    wanted = dict.fromkeys(name[1:] if name.startswith("@") else name for name in wanted)
    scopes = [pair for pair in given_scopes if pair[0] != "group"]
    refs = [pair for pair in given_refs if pair[0] not in ("mention", "group", "reply_to")]
    refs += [("tag", check_text(tag, "tag", PAIR_MAX)) for tag in params.get("tags", [])]
    unknown, warnings, audiences, recipients, resolved = [], [], [], set(), 0
    for value in wanted:
        kind, keys = store.resolve(value)
        if not kind:
            unknown.append("@" + value)
            continue
        resolved += 1
        recipients |= keys
        if kind == "agent":
            refs.append(("mention", value))
        else:
            scopes.append(("group", value))
            refs.append(("group", value))
            if value != EVERYONE:
                warnings.append(f"@{value} resolved to a group, not an individual agent")
        audiences.append({"type": "agent" if kind == "agent" else "group", "value": value})
    if unknown:
        raise ThrumError(f"unknown recipients: {', '.join(unknown)} — no matching agent, role, or group found")
    if not audiences:
        audiences = [{"type": "broadcast", "value": EVERYONE}]
        recipients = store.expand("group", EVERYONE)
    after, thread, if_last = session["started_at"], params.get("thread_id", ""), params.get("if_last", "")
    if if_last:
        thread, newest = _unmoved_thread(store, if_last, thread)
        after = max(after, newest)
    elif thread:
        thread, newest = _thread_to_continue(store, thread)
        after = max(after, newest)
    reply_to = params.get("reply_to") or next((v for k, v in given_refs if k == "reply_to"), "")
    if reply_to:
        parent = store.message(reply_to)
        if not parent:
            raise ThrumError(f"reply_to message not found: {reply_to}")
        own = parent["thread_id"] or thread_of(reply_to)
        if thread and thread != own:
            raise ThrumError(f"{reply_to} is in thread {own}, not in {thread}")
        thread, after = own, max(after, parent["at"])
        refs.append(("reply_to", reply_to))
    structured = params.get("structured")
    ids = [agent_id for agent_id in store.agent_ids(recipients) if agent_id != author]
    event = context.append(
        "message.create", after=after, message_id=context.world.new_id("msg"), agent_id=author, session_id=session["session_id"],
        body={"format": form, "content": content,
              **({"structured": canonical(structured).decode()} if structured is not None else {})},
        thread_id=thread, scopes=pair_dicts(scopes), refs=pair_dicts(refs), recipients=ids, send_key=key,
        authored_by=caller if target else "", disclosed=bool(target) and params.get("disclose", False))
    if not ids:
        warnings.append("only you were named, so nobody received this" if resolved else
                        "nobody else is registered, so nobody received this")
    warnings += _away(context, recipients - {store.key_of(author)})
    return compact(
        message_id=event["message_id"], thread_id=thread, created_at=event["timestamp"], seq=event["sequence"],
        warnings=warnings, audiences=audiences,
        recipients=[{"agent_id": agent_id, "delivered_at": event["timestamp"]} for agent_id in ids]) | {"resolved_to": resolved}


def _away(context: Context, keys) -> list:
    """A warning when recipients were not seen for a day: what is sent to them waits."""
    now = context.world.now_ns()
    seen = context.ledger.seen
    away = [(agent_id, ns) for agent_id, ns in context.store.unseen(keys, now - ACTIVE_S * NS) if agent_id not in seen] if keys else []
    if not away:
        return []
    if len(keys) == 1:
        return [f"@{away[0][0]} was last seen {span((now - away[0][1]) / NS)} ago" if away[0][1] else f"@{away[0][0]} was never seen"]
    more = f" and {len(away) - AWAY_NAMES} more" if len(away) > AWAY_NAMES else ""
    return [f"{len(away)} of {len(keys)} recipients were not seen for 24 h: "
            f"{', '.join('@' + agent_id for agent_id, _ in away[:AWAY_NAMES])}{more}"]


def _unmoved_thread(store: Store, last: str, thread_id: str) -> tuple:
    """The thread whose newest message is `last`, and its time; raises Conflict with the newer one when it has moved on."""
    row = _message(store, last)
    thread = row["thread_id"] or thread_of(last)
    if thread_id and store.thread(thread_id) != thread:
        raise ThrumError(f"{last} is in thread {thread}, not in {thread_id}")
    newest = store.newest_of(thread, last)
    if newest and (newest["at"], newest["seq"]) > (row["at"], row["seq"]):
        raise Conflict(f"the thread has moved on: @{newest['agent_id']} wrote {newest['message_id']} after {last}; read it, then send "
                       f"again with --if-last {newest['message_id']}", {"newer": _summary(newest)})
    return thread, row["at"]


def _repeated(store: Store, row: dict) -> dict:
    """The reply to a send whose key was used before: of the message that was made then."""
    audiences = [{**a, "type": "agent" if a["type"] == "mention" else a["type"]} for a in _audiences(row)]
    return {**compact(message_id=row["message_id"], thread_id=row["thread_id"], created_at=stamp_of(row["at"]), seq=row["seq"],
                      audiences=audiences, recipients=store.recipients(row)),
            "resolved_to": sum(a["type"] != "broadcast" for a in audiences), "repeated": True}


def _thread_to_continue(store: Store, thread_id: str) -> tuple:
    """The id that a thread goes by and the time of its newest message; a lone message has a thread of its own."""
    thread_id = store.thread(thread_id)
    newest = store.newest_in(thread_id)
    if not newest:
        lone = store.message("msg_" + thread_id.partition("_")[2])
        newest = lone["at"] if lone else 0
    if not newest:
        raise ThrumError(f"thread not found: {thread_id}")
    return thread_id, newest


def _message(store: Store, message_id: str) -> dict:
    row = store.message(message_id)
    if not row:
        raise ThrumError(f"message not found: {message_id}")
    return row


def message_get(context: Context, params: dict) -> dict:
    store, row = context.store, _message(context.store, params["message_id"])
    history = [{"at": stamp_of(edit["at"]), **compact(editor=edit["editor"]),
                "body": _body({**edit, "format": row["format"]})} for edit in (store.versions(row["seq"]) if params.get("history") else ())]
    return {"message": {
        "message_id": row["message_id"], **compact(thread_id=row["thread_id"], reply_to=row["reply_to"]),
        "author": {"agent_id": row["agent_id"], "session_id": row["session_id"] or ""}, **_via(row), "body": _body(row),
        "scopes": json.loads(row["scopes"] or "[]"), "refs": json.loads(row["refs"] or "[]"),
        "metadata": compact(deleted_at=_stamp(row["deleted_at"]), delete_reason=row["delete_reason"]),
        "created_at": stamp_of(row["at"]), **compact(updated_at=_stamp(row["updated_at"])), "deleted": bool(row["deleted_at"]),
        **compact(audiences=_audiences(row), recipients=store.recipients(row), history=history), "seq": row["seq"]}}


def _overdue(context: Context, author: str) -> list:
    """What an author wrote that its readers leave unread: for OVERDUE_S of their own presence, or for ever."""
    return context.store.overdue(author, context.ledger.late, context.world.now_ns() - OVERDUE_DAYS * 24 * 3600 * NS, LIST_MAX)


def message_list(context: Context, params: dict) -> dict:
    store = context.store
    sort_by, order = params.get("sort_by") or "created_at", params.get("sort_order") or "desc"
    if sort_by not in ("created_at", "updated_at"):
        raise ThrumError(f"invalid sort_by: {sort_by} (must be 'created_at' or 'updated_at')")
    if order not in ("asc", "desc"):
        raise ThrumError(f"invalid sort_order: {order} (must be 'asc' or 'desc')")
    size, page = _paging(params)
    caller, receiver = params.get("caller_agent_id", ""), params.get("for_agent", "")
    after, unread = _from_where(store, params, params.get("unread", False), bool(caller))
    if params.get("exclude_self") or unread or params.get("mentions"):
        caller = caller_of(context, params)
    unread_for = params.get("unread_for_agent") or (caller if unread else "")
    mention = params.get("mention_role", "")
    if params.get("mentions") and not mention:
        mention = caller        # decision 16: mail that names the caller itself
    after_ns = _created_after(params)
    found = store.page(
        receiver=unread_for or receiver, unread=bool(unread_for), reader=unread_for or caller or receiver,
        author=params.get("author_id", ""), not_author=caller if params.get("exclude_self") else "",
        scope=_pair(params.get("scope")), ref=_pair(params.get("ref")), mention=mention.lstrip("@"),
        thread_id=params.get("thread_id", ""), after_ns=after_ns, after_seq=after,
        by_update=sort_by == "updated_at", ascending=order == "asc", limit=size, offset=(page - 1) * size)
    return {"messages": [_summary(row, **compact(audiences=_audiences(row) if params.get("audiences") else None))
                         for row in found["messages"]],
            "total": found["total"], "unread": found["unread"],
            "page": page, "page_size": size, "total_pages": -(-found["total"] // size),
            "last_seq": store.reached()[0], "epoch": store.meta("epoch", ""),
            **compact(overdue=len({row["message_id"] for row in _overdue(context, receiver)}) or None if receiver == caller else None)}


def _from_where(store: Store, params: dict, unread: bool, fallback: bool) -> tuple:
    """The number in the journal after which to begin (-1: at the first), and whether with what is unread.

    Numbers of another journal mean nothing here: who has one begins at the oldest unread.
    """
    if params.get("epoch", store.meta("epoch")) != store.meta("epoch"):
        return -1, fallback
    return min(params.get("after_seq", -1), store.reached()[0]), unread


def _created_after(params: dict) -> int:
    """The parameter of that name in ns, 0 without it."""
    try:
        return min(ns_of(params["created_after"]), FAR) if params.get("created_after") else 0
    except ValueError as error:
        raise InvalidParams(f"invalid params: created_after is {error}") from None


def _paging(params: dict) -> tuple:
    """The size and the number of the page that is asked for."""
    return min(max(params.get("page_size") or 10, 1), PAGE_MAX), max(params.get("page") or 1, 1)


def _pair(scope):
    return (scope["type"], scope["value"]) if scope else None


def message_outbox(context: Context, params: dict) -> dict:
    store, to = context.store, params.get("to", "")
    wanted = to.strip().lstrip("@")
    if to and not wanted:
        raise ThrumError("invalid to filter")
    if not store.resolve(wanted)[0]:
        wanted = wanted.lower()
    size, page = _paging(params)
    author = caller_of(context, params)
    late = {(row["message_id"], row["agent_id"]) for row in _overdue(context, author)}
    found = store.outbox(author, wanted, params.get("unread", False), size, (page - 1) * size,
                         only=sorted({message_id for message_id, _ in late}) if params.get("overdue") else None)
    messages = []
    for row in found["messages"]:
        recipients = _with_truth(context, row, late)
        messages.append(_summary(row, **compact(audiences=_audiences(row), recipients=recipients),
                                 read_count=sum("read_at" in state for state in recipients)))
    return {"messages": messages, "total": found["total"], "page": page, "page_size": size,
            "total_pages": -(-found["total"] // size)}


def _with_truth(context: Context, row: dict, late: set) -> list:
    """The states of a message's recipients, with `overdue` and `gone` where they are."""
    states = context.store.recipients(row)
    for state in states:
        if "read_at" not in state:
            if (row["message_id"], state["agent_id"]) in late:
                state["overdue"] = True
            if not context.store.agent(state["agent_id"]):
                state["gone"] = True
    return states


def message_trace(context: Context, params: dict) -> dict:
    """What became of a message, for each recipient in the order in which it happened."""
    row = _message(context.store, params["message_id"])
    late = {(found["message_id"], found["agent_id"]) for found in _overdue(context, row["agent_id"])}
    recipients = _with_truth(context, row, late)
    for state in recipients:
        agent = context.store.agent(state["agent_id"]) or {}
        seen = max(agent.get("last_seen_at") or 0, context.ledger.seen.get(state["agent_id"], 0))
        state["state"] = next(name for name, field in DELIVERY_STATES if field in state)
        state.update(compact(last_seen_at=_stamp(seen), host=agent.get("hostname") if agent.get("daemon") != context.ledger.daemon_id
                             else ""))
    return {"message_id": row["message_id"], **compact(thread_id=row["thread_id"]), "agent_id": row["agent_id"], **_via(row),
            "created_at": stamp_of(row["at"]), "deleted": bool(row["deleted_at"]), "seq": row["seq"],
            "content": row["content"][:PREVIEW_MAX], "audiences": _audiences(row), "recipients": recipients}


def message_search(context: Context, params: dict) -> dict:
    """Messages whose text holds all words of the query, the best first; see `parse_query`."""
    store, phrases = context.store, parse_query(check_text(params["query"], "the query"))
    limit = min(max(params.get("limit") or 10, 1), PAGE_MAX)
    if sum(len(words) for words, _ in phrases) > SEARCH_WORDS_MAX:
        raise InvalidParams(f"a query has at most {SEARCH_WORDS_MAX} words")
    found = {"messages": [], "total": 0}
    if phrases:
        found = store.search(phrases, author=params.get("from", "").lstrip("@"), to=params.get("to", "").lstrip("@"),
                             thread_id=params.get("thread_id", ""), scope=_pair(params.get("scope")),
                             after_ns=_created_after(params), limit=limit)
    messages = []
    for row in found["messages"]:
        text, spans = _snippet(row["content"], find_phrases(row["content"], phrases))
        messages.append(_summary(row, snippet=text, hits=spans))
    return {"messages": messages, "total": found["total"], "complete": found["total"] < SEARCH_TOTAL_MAX, "query": params["query"]}


def _snippet(content: str, spans: list) -> tuple:
    """The part of a text around its first hit, and where in it (start, end) the hits are."""
    first = spans[0][0] if spans else 0
    start = max(0, first - SNIPPET // 3)
    if start:
        blank = content.find(" ", start, first)
        start = blank + 1 if blank >= 0 else start
    end = start + SNIPPET
    text = ("…" if start else "") + content[start:end] + ("…" if end < len(content) else "")
    shift = start - bool(start)
    return text, [[a - shift, min(b, end) - shift] for a, b in spans if start <= a < end]


def _remove_messages(context: Context, rows: list, reason: str, by: str) -> int:
    """Remove messages for good, on all machines; their number."""
    part, size = [], 0
    for number, row in enumerate(rows, 1):
        part.append(row)
        size += len(canonical(row["message_id"])) + 1       # and the comma
        if size > REMOVE_BYTES or number == len(rows):
            context.append("message.remove", after=max(row["at"] for row in part), message_ids=[row["message_id"] for row in part],
                           reason=reason, removed_by=by)
            part, size = [], 0
    return len(rows)


def _left(count: int) -> dict:
    """How many more there are for the next call."""
    return {"remaining": count} if count else {}


def message_delete_by_scope(context: Context, params: dict) -> dict:
    if not params.get("scope_type") or not params.get("scope_value"):
        raise ThrumError("scope_type and scope_value are required")
    rows, left = context.store.messages_with(REMOVE_MAX, scope=(params["scope_type"], params["scope_value"]))
    return {"deleted_count": _remove_messages(context, rows, "deleted by scope", params.get("caller_agent_id", "")), **_left(left)}


def message_delete_by_agent(context: Context, params: dict) -> dict:
    rows, left = context.store.messages_with(REMOVE_MAX, author=params["agent_id"])
    return {"deleted_count": _remove_messages(context, rows, "deleted by agent", params.get("caller_agent_id", "")), **_left(left)}


def message_archive(context: Context, params: dict) -> dict:
    """Moves messages of an agent, or to a group, into a file below `.thrum/archive`: with all that is known of them."""
    store, kind, name = context.store, params.get("archive_type", ""), params.get("identifier", "")
    if kind not in ("agent", "group"):
        raise ThrumError(f'invalid archive_type: "{kind}" (must be "agent" or "group")')
    if not name:
        raise ThrumError("identifier is required")
    name = name.lstrip("@")
    try:
        stem = name if kind == "group" and (WORD | {"."}).issuperset(name) and name.strip(".") else file_stem(name)
    except ValueError:
        raise InvalidParams(f"identifier {name[:NAME_MAX]!r} cannot be a file name") from None
    path = f"{context.ledger.places.thrum}/archive/{stem}.jsonl"
    rows, left = store.messages_with(REMOVE_MAX, **({"author": name} if kind == "agent" else {"scope": ("group", name)}))
    if rows:
        lines = [canonical({
            **message_get(context, {"message_id": row["message_id"], "history": True})["message"], "agent_id": row["agent_id"]})
            for row in rows]
        try:
            folder = os.path.dirname(path)
            if os.path.islink(folder):
                raise ThrumError(f"cannot archive: {folder} is a link")
            os.makedirs(folder, mode=0o700, exist_ok=True)
            # A repetition after a crash adds lines twice, and loses none; an unfinished last line must not swallow the next.
            with open(path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)) as file:
                context.ledger.appended.setdefault(path, file.tell())
                file.write(b"\n" * (file.tell() > 0 and file_bytes(path)[-1:] != b"\n") + b"".join(line + b"\n" for line in lines))
                file.flush()
                durable_sync(file.fileno())
            for directory in (folder, os.path.dirname(folder)):
                sync_directory(directory)
        except OSError as error:
            raise ThrumError(f"cannot archive: {os_problem(error)}") from None
        _remove_messages(context, rows, "archived", params.get("caller_agent_id", ""))
    return {"archived_count": len(rows), "archive_path": path, **_left(left)}


def message_mark_shown(context: Context, params: dict) -> dict:
    """Notes that messages were shown to the caller; with a `route`, that they were pushed to it, and with `pushed`, no more than that."""
    store, reader, route = context.store, caller_of(context, params), params.get("route", "")
    if route and not is_label(route):
        raise InvalidParams(f"route must be a text of at most {PAIR_MAX} printable characters")
    session, pushed, marked = store.open_session(reader), [], 0
    for row in [row for row in map(store.message, dict.fromkeys(params["message_ids"])) if row]:
        own, _ = store.states(row, reader)
        if own and not own["pushed"] and route:
            pushed.append(row["message_id"])
        if own and not own["seen"] and not own["read"] and not params.get("pushed"):
            context.append("message.receipt", after=row["at"], message_id=row["message_id"], agent_id=reader, receipt_type="seen",
                           session_id=session and session["session_id"])
            marked += 1
    if pushed:
        context.append("message.route", message_ids=pushed, agent_id=reader, route=route)
    return {"marked_count": marked, "pushed_count": len(pushed)}


def purge_execute(context: Context, params: dict) -> dict:
    """Removes messages, and sessions that have ended, from before a time: of this daemon at once, of others when they hear of it."""
    before = params["before"]
    try:
        cutoff = min(ns_of(before), context.world.now_ns())
    except ValueError:
        raise InvalidParams(f'invalid before timestamp "{before[:64]}": must be RFC 3339') from None
    counts = context.store.older_than(cutoff)
    if not params.get("dry_run"):
        for claim in context.store.claims():
            if claim["open"] == 2 and claim["renewed_at"] < cutoff:     # its machine is gone; a release is final, whatever comes later
                free_claim(context, claim, "gone")
        context.append("purge.executed", cutoff=stamp_of(cutoff), after=cutoff - 1, above=context.store.last_fence())
    return {"before": before, "dry_run": params.get("dry_run", False), "messages_deleted": counts["messages"],
            "sessions_deleted": counts["sessions"], "events_deleted": counts["events"], "sync_message_files": counts["authors"],
            "sync_events_filtered": 2 * counts["sessions"]}


def _may_change(row: dict, params: dict, verb: str) -> None:
    """The author, a person, or a local caller without a name (decision 17); advisory within one user."""
    caller = params.get("caller_agent_id", "")
    if caller and caller != row["agent_id"] and not caller.startswith("user:"):
        raise ThrumError(f"only message author can {verb} (author: {row['agent_id']}, current: {caller})")


def message_edit(context: Context, params: dict) -> dict:
    content, structured = params.get("content", ""), params.get("structured")
    if not content and structured is None:
        raise ThrumError("at least one of content or structured must be provided")
    row = _message(context.store, params["message_id"])
    if row["deleted_at"]:
        raise ThrumError(f"cannot edit deleted message: {row['message_id']}")
    _may_change(row, params, "edit")
    structured = canonical(structured).decode() if structured is not None else row["structured"]
    event = context.append(
        "message.edit", after=max(row["at"], row["updated_at"] or 0), message_id=row["message_id"],
        agent_id=params.get("caller_agent_id"),
        body={"format": row["format"], "content": content or row["content"], **compact(structured=structured)})
    return {"message_id": row["message_id"], "updated_at": event["timestamp"], "version": context.store.edits(row["seq"])}


def message_delete(context: Context, params: dict) -> dict:
    row = _message(context.store, params["message_id"])
    if row["deleted_at"]:
        raise ThrumError(f"message already deleted: {row['message_id']}")
    _may_change(row, params, "delete")
    event = context.append("message.delete", after=row["at"], message_id=row["message_id"],
                           reason=check_text(params.get("reason", ""), "reason"))
    return {"message_id": row["message_id"], "deleted_at": event["timestamp"]}


def message_mark_read(context: Context, params: dict) -> dict:
    """Marks what the caller received and has not read; `all`: the newest BATCH_READ_MAX of it up to `up_to_seq`."""
    store, reader = context.store, caller_of(context, params)
    if params.get("all"):
        rows = store.page(receiver=reader, unread=True, up_to_seq=params.get("up_to_seq", FAR), limit=BATCH_READ_MAX)["messages"] \
            if store.key_of(reader) else []     # a stranger sees what is for everybody, but received nothing
    elif not params.get("message_ids"):
        raise ThrumError("message_ids is required and must not be empty")
    else:
        rows = [row for row in map(store.message, dict.fromkeys(params["message_ids"])) if row]
    session = store.open_session(reader)
    marked, others = 0, {}
    for row in rows:
        own, read_by = store.states(row, reader) if not params.get("all") else ({"read": False}, [])
        if not own:
            continue
        marked += 1
        if not own["read"]:
            context.append("message.receipt", after=row["at"], message_id=row["message_id"], agent_id=reader,
                           receipt_type="read", session_id=session and session["session_id"])
        if read_by:
            others[row["message_id"]] = read_by
    left = store.page(receiver=reader, limit=1)["unread"]
    return {"marked_count": marked, **compact(also_read_by=others), "remaining": left}


def message_wait(context: Context, params: dict) -> dict | None:
    """The messages after a point, oldest first, or None while there are none."""
    store, (limit, _) = context.store, _paging(params)
    agent_id = "" if params.get("all") else caller_of(context, params)
    after, unread = _from_where(store, params, params.get("unread", False), not params.get("all"))
    after_ns = _created_after(params)
    found = store.page(
        receiver=agent_id, reader=params.get("caller_agent_id", ""), unread=unread, author=params.get("from", "").lstrip("@"),
        not_author=params.get("caller_agent_id", ""), scope=_pair(params.get("scope")),
        mention=params.get("mention_role", "").lstrip("@"), thread_id=params.get("thread_id", ""), after_ns=after_ns,
        after_seq=after, ascending=True, limit=limit)
    if not found["messages"]:
        return None
    return {"messages": [_summary(row) for row in found["messages"]], "after_seq": found["messages"][-1]["seq"],
            "epoch": store.meta("epoch"), "remaining": found["total"] - len(found["messages"])}


def event_wait(context: Context, params: dict) -> dict | None:
    """What has happened after a point of the journal, oldest first, or None while there is nothing.

    `remaining` counts the numbers of the journal that were not looked at: who gets some goes on from `after_seq`, even when no
    event came with it.  The numbers of another journal say nothing, so after them it begins with the oldest message that the
    caller has not read, and with the first event when there is no caller.  What was removed is not told.
    """
    store, history, types = context.store, context.ledger.history, types_of(params.get("topics", []))
    last, epoch, since = store.reached()[0], store.meta("epoch"), _created_after(params)
    seq, caller, found, size = min(max(params.get("after_seq", 0), 0), last), params.get("caller_agent_id", ""), [], 0
    if params.get("epoch", epoch) != epoch:
        unread = store.page(receiver=caller, unread=True, after_seq=0, ascending=True, limit=1)["messages"] if caller else []
        seq = unread[0]["seq"] - 1 if unread else last if caller else 0
    if since and not seq:       # who has a number is past that place, and to find it takes long
        seq = min(store.first_since(since) - 1, last)
    begin, end, limit = seq, min(last, seq + SCAN_MAX), min(max(params.get("limit", PAGE_MAX), 1), STORE_BATCH)
    may_be = re.compile(b'"(?:%s)"' % "|".join(map(re.escape, sorted(types))).encode()).search
    for seq, line in history.read(begin, end):
        if not may_be(line):    # ruled out in a twentieth of the time that it takes to decode it
            continue
        try:
            event, ns = parse_line(line)
        except ValueError:
            continue            # damaged
        if event["type"] in types and ns > since:
            found.append((seq, event))
            size += len(line)
            if len(found) == limit or size > EVENTS_BYTES:
                break
    else:
        seq = max(begin, end)
    gone = store.obsolete([event for _, event in found if event["type"] in ABOUT_REMOVABLE])
    by, to, scope = params.get("from", "").lstrip("@"), params.get("to", "").lstrip("@"), _pair(params.get("scope"))
    rows = store.messages([event["message_id"] for _, event in found if "message_id" in event])
    events, authors = [], {}
    for number, event in found:
        if event["event_id"] in gone:
            continue
        row = rows.get(event.get("message_id"))
        told = _event_info(store, number, event, row, authors)
        if by in ("", told.get("agent_id")) and (not to or row and store.went_to(row, to)) \
                and (not scope or row and scope in stored_pairs(row)[1]):
            events.append(told)
    params.update(after_seq=seq, epoch=epoch)       # who is asked again goes on from there
    return {"events": events, "after_seq": seq, "epoch": epoch, "remaining": max(last - seq, 0)} if events or seq < last else None


def _event_info(store: Store, seq: int, event: dict, row: dict | None, authors: dict) -> dict:
    """An event as listeners are told, with what they would have to look up: who did it or whose it is, to what, in which thread.

    `row` is the message that it is about, `authors` what `author_of` has said before.  The text is that of its time, and none once
    the message was taken back.
    """
    told = told_of(store, seq, event, row)
    if event["type"] not in ("message.create", "message.edit"):
        return told
    body, deleted = event["body"], bool(row and row["deleted_at"])
    told = {field: told[field] for field in TOLD_OF_MESSAGES if field in told}
    told.update(format=str(body.get("format") or "markdown"), content="" if deleted else body.get("content", ""), deleted=deleted,
                **compact(structured=None if deleted else body.get("structured")))
    if row:
        refs, scopes = stored_pairs(row)
        authors[row["agent_id"]] = authors.get(row["agent_id"]) or author_of(store, row["agent_id"])
        told.update(author=authors[row["agent_id"]], scopes=pair_dicts(scopes), audiences=_named(refs, scopes),
                    **compact(reply_to=row["reply_to"]), **_via(row))
    return told


# ---- subscriptions

def _subscriber(context: Context, params: dict) -> tuple:
    """The caller and its open session, which subscriptions hang on."""
    agent_id = caller_of(context, params)
    session = context.store.open_session(agent_id)
    if not session:
        raise ThrumError(f"get current session: no active session found for agent {agent_id}")
    return agent_id, session


def subscribe(context: Context, params: dict) -> dict:
    """From the event after `after_seq` on, what matches is pushed; what was before it, lists and `message.wait` give."""
    scope, mention = params.get("scope"), params.get("mention_role", "").lstrip("@")
    everything, topics = params.get("all", False), check_topics(params.get("topics", []))
    if mention and not is_label(mention):
        raise InvalidParams("invalid params: mention_role must be the name of an agent or a role")
    if everything:
        scope, mention = None, ""
    if not (scope or mention or everything or topics):
        raise ThrumError("at least one of scope, mention_role, or all must be specified")
    agent_id, session = _subscriber(context, params)
    wanted = {"scope_type": (scope or {}).get("type"), "scope_value": (scope or {}).get("value"), "mention_role": mention or None,
              "everything": int(everything), "topics": ",".join(topics)}
    present = context.store.subscriptions(session["session_id"])
    if any(wanted == {field: row[field] for field in wanted} for row in present):
        # Who comes back follows from here as if it had subscribed now: its connection is reached already.
        number = next(row["id"] for row in present if wanted == {field: row[field] for field in wanted})
        raise ThrumError("subscribe: subscription already exists", {
            "subscription_id": number, "after_seq": context.next_seq() - 1, "epoch": context.ledger.journal.epoch})
    if len(present) >= SUBSCRIPTIONS_MAX:
        raise ThrumError(f"subscribe: this session has {SUBSCRIPTIONS_MAX} subscriptions; 'thrum unsubscribe' ends one")
    number = context.next_seq()         # it stays what it is, and is never used again
    event = context.append("subscription.add", after=session["started_at"], subscription_id=number, session_id=session["session_id"],
                           agent_id=agent_id, scopes=[scope] if scope else [], mention=mention, all=everything,
                           topics=topics)
    return {"subscription_id": number, "session_id": session["session_id"], "created_at": event["timestamp"], "after_seq": number,
            "epoch": context.ledger.journal.epoch}


def unsubscribe(context: Context, params: dict) -> dict:
    number = params.get("subscription_id")
    if not number:
        raise ThrumError("subscription_id is required")
    _, session = _subscriber(context, params)
    removed = any(row["id"] == number for row in context.store.subscriptions(session["session_id"]))
    if removed:
        context.append("subscription.remove", subscription_id=number, session_id=session["session_id"])
    return {"removed": removed}


def subscriptions_list(context: Context, params: dict) -> dict:
    rows = context.store.subscriptions(_subscriber(context, params)[1]["session_id"])
    return {"subscriptions": [
        {"id": row["id"], **compact(scope_type=row["scope_type"], scope_value=row["scope_value"], mention_role=row["mention_role"],
                                    all=bool(row["everything"]) or None, topics=row["topics"].split(",") if row["topics"] else []),
         "created_at": stamp_of(row["created_at"])} for row in reversed(rows)]}


# ---- worktrees and the files of agents

def _worktree(context: Context, params: dict) -> str:
    """The root of the worktree that a call is about, one of this repository; without `repo_path` the daemon's own."""
    places, path = context.ledger.places, params.get("repo_path") or ""
    if not path:
        return places.root
    real = os.path.realpath(path) if os.path.isabs(path) else ""
    if real not in map(os.path.realpath, [places.root, *worktrees_of(places.common)]):
        raise InvalidParams(f"repo_path {path} is not a worktree of this repository; 'git worktree list' shows them")
    return real


def worktree_status(context: Context, params: dict) -> dict:
    """The branch of a worktree, its uncommitted files, and how many commits its base lacks; `error` if git cannot tell."""
    top, work = _worktree(context, params), _work(context)
    try:
        state, base = together([lambda: work.state(top), lambda: work.base(top)])
        commits = work.ahead(top, base, state.head).commits
    except GitError as error:
        return {"unmerged_commits": 0, "error": str(error)}
    return {"branch": state.branch or "(detached)", "uncommitted_files": [entry.path for entry in state.entries][:WORK_FILES],
            "uncommitted_total": len(state.entries), "unmerged_commits": len(commits)}


def _agents_at_work(context: Context) -> dict:
    """The worktrees of this repository in which agents have open sessions, and who they are: {worktree: [agent id]}."""
    found = {}
    for top, agent_id in dict.fromkeys(_sessions_at_work(context).values()):
        found.setdefault(top, []).append(agent_id)
    return found


def _conflicts(context: Context) -> Conflicts:
    return context.ledger.facts.setdefault("conflicts", Conflicts(_work(context)))


def conflict_list(context: Context, params: dict) -> dict:
    """Which worktrees would not merge with each other, or with the base: those of active agents, with `all` all of them."""
    agents, places, chosen = _agents_at_work(context), context.ledger.places, set()
    for name in params.get("agents", []):
        agent_id = name.lstrip("@")
        if not context.store.agent(agent_id):
            raise ThrumError(f"no agent @{agent_id}; 'thrum agent list' shows who there is")
        worktrees = [top for top, ids in agents.items() if agent_id in ids]
        if not worktrees:
            raise ThrumError(f"@{agent_id} has no open session in a worktree of this repository on this machine")
        chosen.update(worktrees)
    tops = list(dict.fromkeys([places.root, *worktrees_of(places.common)])) if params.get("all") else list(agents)
    present, found, errors = _conflicts(context).look(sorted(tops), lambda a, b: not chosen or a in chosen or b in chosen)
    names = _work(context).base_names() if present else {}
    pairs, base = [], []
    for (a, b), files in found.items():
        here = [top for top in (a, b) if top]
        row = {"agents": [agents.get(top, []) for top in here], "worktree_paths": list(map(printable, here)),
               "branches": [present[top].branch for top in here], "clean": not files, "files": files}
        if b:
            pairs.append(row)
        else:
            base.append({**row, "base": present[a].base, **compact(base_branch=names.get(present[a].base))})
    return {"pairs": pairs, "base": base,
            "skipped": [{"worktree_path": printable(top), "paths": state.skipped} for top, state in present.items() if state.skipped],
            "errors": [{"worktree_path": printable(top), "error": error} for top, error in errors.items()],
            "checked_at": stamp_of(context.world.now_ns())}


def _by_agents(agents: dict, found: dict) -> dict:
    """Compared pairs of worktrees as pairs of their agents: {agent id: {other agent id: files}}, its own lines first."""
    seen = {}
    for (a, b), files in found.items():
        turned = [{**file, "ranges": file["ranges"][::-1]} if "ranges" in file else file for file in files]
        for one, other, own in ((a, b, files), (b, a, turned)):
            for agent_id, other_id in ((x, y) for x in agents.get(one, []) for y in agents.get(other, []) if x != y):
                known = seen.setdefault(agent_id, {}).setdefault(other_id, {})      # one may have several worktrees
                known.update((file["path"], file) for file in own if file["path"] not in known)
    return {agent_id: {other_id: list(files.values()) for other_id, files in pairs.items()} for agent_id, pairs in seen.items()}


def known_conflicts(context: Context) -> dict:
    """What the newest look has found, without another one: {agent id: [{with: agent id, files: [...]}]}, its own lines first."""
    return {agent_id: found for agent_id, pairs in _by_agents(_agents_at_work(context), _conflicts(context).known).items()
            if (found := [{"with": other_id, "files": files} for other_id, files in pairs.items() if files])}


def conflict_news(context: Context, params: dict) -> list:
    """Look at the worktrees of active agents; what has changed since they were told of their conflicts, as arguments of `notice`.

    Each agent gets one message of all others.  Of every pair, what an agent was told last is in the message that told it, so
    neither a restart nor a rebuild tells it again.
    """
    agents = _agents_at_work(context)
    found = _conflicts(context).look(sorted(agents), lambda a, b: b)[1] if len(agents) > 1 else {}
    return [news for agent_id, pairs in sorted(_by_agents(agents, found).items()) if (news := _news_for(context, agent_id, pairs))]


def tell_of_conflicts(context: Context, news: list) -> None:
    for arguments in news:
        notice(context, *arguments)


def _news_for(context: Context, agent_id: str, pairs: dict) -> tuple | None:
    appeared, grown, gone, state, key, left = {}, {}, {}, {}, f"conflict {agent_id}", NOTICE_PATHS
    for other_id, files in sorted(pairs.items()):
        last = context.store.message_with("conflict", f"{agent_id} {other_id}", PROGRAM, context.ledger.daemon_id) or {}
        try:
            told = decode_object(last.get("structured") or "{}").get(other_id)
        except ValueError:      # of another version
            told = None
        told = told if type(told) is dict else {}
        count = told["count"] if type(told.get("count")) is int else 0
        known = told["files"] if type(told.get("files")) is list else []
        new = [file for file in files if file["path"] not in known] if known or len(files) > count else []
        if (not new and (files or not count)) or len(state) == NOTICE_PAIRS:
            continue
        (grown if new and count else appeared if new else gone)[other_id] = new
        paths = [file["path"] for file in files]
        left -= sum(map(len, paths))
        state[other_id] = {"count": len(paths), **({"files": paths} if left >= 0 else {})}
        key += f" {other_id} {last.get('message_id', '')}"
    text = ""
    for others, how in ((appeared, "as it stands"), (grown, "in more files now")):
        where = {}              # path -> {with whom: file}
        for other_id, files in others.items():
            for file in files:
                where.setdefault(file["path"], {})[other_id] = file
        text += f"The work of @{agent_id} and {_agents_named(others)} would not merge {how}:\n" if others else ""
        for path, files in list(where.items())[:NOTICE_FILES]:
            what = [conflict_text(file, [f"@{agent_id}", f"@{other_id}"]) for other_id, file in files.items()][0]
            text += f"- {printable(path)[-PAIR_MAX:]}: {what if len(others) == 1 else 'with ' + _agents_named(files)}\n"
        text += f"- and {len(where) - NOTICE_FILES} more\n" if len(where) > NOTICE_FILES else ""
    text += "Agree on who changes what; `thrum conflicts` shows how it stands.\n" if text else ""
    text += f"The work of @{agent_id} and {_agents_named(gone)} would merge again: the conflict is gone.\n" if gone else ""
    refs = [("conflict", f"{agent_id} {other_id}") for other_id in state]
    return ([agent_id], text[:-1], hash32(key), refs, state) if state else None


def _agents_named(names) -> str:
    """`@ada, @bob and 37 more`."""
    more = len(names) - AWAY_NAMES
    return ", ".join(f"@{name}" for name in list(names)[:AWAY_NAMES]) + (f" and {more} more" if more > 0 else "")


def conflict_text(file: dict, names: list) -> str:
    """What is wrong with a file of two sides with those names: `lines 10-14 (@ada); 12-16 (@bob)`, or the kind of conflict."""
    if "ranges" not in file:
        return printable(file["kind"] + (f" ({', '.join(file['names'][:2])})" if "names" in file else ""))

    def lines(ranges):
        shown = [f"after {last}" if last < first else str(first) if first == last else f"{first}-{last}" for first, last in ranges]
        return ", ".join(shown[:RANGES_SHOWN]) + (f" and {len(shown) - RANGES_SHOWN} more" if len(shown) > RANGES_SHOWN else "")
    if file["ranges"][0] == file["ranges"][1]:
        here = lines(file["ranges"][0])
        return f"line{'s' * (not here.isdigit())} {here}"
    return "lines " + "; ".join(f"{lines(ranges)} ({name})" for name, ranges in zip(names, file["ranges"]))


def _content(params: dict, what: str) -> bytes:
    """The bytes of a request's `content`: base64, or plain with `text` (design, decision 23)."""
    content = params.get("content", "")
    if not params.get("text"):
        try:
            content = base64.b64decode(content, validate=True).decode(errors="surrogateescape")
        except ValueError:
            raise InvalidParams("invalid params: content must be base64; send plain text with text: true") from None
    return check_text(content, what, CONTEXT_MAX).encode()


def _coded(data: bytes, params: dict) -> str:
    """As `_content` takes it."""
    return data.decode(errors="replace") if params.get("text") else base64.b64encode(data).decode()


def _agent_and_worktree(context: Context, params: dict) -> tuple:
    """Whom a call is about, and in which worktree."""
    agent_id = params["agent_name"] if params.get("agent_name") else caller_of(context, params)
    context_files(agent_id)     # refuses what is not an id
    return agent_id, _worktree(context, params)


def _write_context(top: str, file: str, data: bytes) -> None:
    if not os.path.isdir(top + "/.thrum"):      # made by the way, it would hide the one of the main worktree
        raise ThrumError(f"{top} is not set up; run 'thrum setup' there first")
    try:
        make_folder(top + "/.thrum/context")
        atomic_write(context_path(top, file), data)
    except OSError as error:
        raise ThrumError(f"cannot write the context: {os_problem(error)}") from None


def _read_preamble(top: str, agent_id: str) -> tuple | None:
    """As `read_context`; under its old name too."""
    _, new, old = context_files(agent_id)
    return read_context(top, new) or read_context(top, old)


def _saved(context: Context, what: str, agent_id: str, data: bytes) -> dict:
    return {"agent_name": agent_id, "message": f"{what} saved for {agent_id} ({len(data)} bytes)",
            "saved_at": stamp_of(context.world.now_ns()), "size": len(data)}


def context_save(context: Context, params: dict) -> dict:
    agent_id, top = _agent_and_worktree(context, params)
    data = _content(params, "the context")
    _write_context(top, context_files(agent_id)[0], data)
    if not _read_preamble(top, agent_id):
        role = (context.store.agent(agent_id) or {}).get("role") or ""
        _write_context(top, context_files(agent_id)[1], default_preamble(agent_id, role).encode())
    return _saved(context, "Context", agent_id, data)


def context_show(context: Context, params: dict) -> dict:
    agent_id, top = _agent_and_worktree(context, params)
    data, changed_ns = read_context(top, context_files(agent_id)[0]) or (b"", 0)
    wanted = params.get("include_preamble", True) and not params.get("no_preamble")
    preamble = (_read_preamble(top, agent_id) or (b"", 0))[0] if wanted else b""
    reply = {"agent_name": agent_id, "content": _coded(data, params) if data else None, "has_context": bool(data),
             "has_preamble": bool(preamble)}
    if preamble:
        reply.update(preamble=_coded(preamble, params), preamble_size=len(preamble))
    if data:
        reply.update(size=len(data), updated_at=stamp_of(changed_ns))
    return reply


def context_clear(context: Context, params: dict) -> dict:
    agent_id, top = _agent_and_worktree(context, params)
    try:
        remove(context_path(top, context_files(agent_id)[0]))
    except OSError as error:
        raise ThrumError(f"cannot remove the context: {os_problem(error)}") from None
    return {"agent_name": agent_id, "message": f"Context cleared for {agent_id}", "cleared": True}


def context_preamble_show(context: Context, params: dict) -> dict:
    agent_id, top = _agent_and_worktree(context, params)
    data = (_read_preamble(top, agent_id) or (b"", 0))[0]
    return {"agent_name": agent_id, "content": _coded(data, params) if data else None, "has_preamble": bool(data)}


def context_preamble_save(context: Context, params: dict) -> dict:
    agent_id, top = _agent_and_worktree(context, params)
    data = _content(params, "the preamble")
    _write_context(top, context_files(agent_id)[1], data)
    return _saved(context, "Preamble", agent_id, data)


# ---- claims

def _claim_info(context: Context, row: dict, holds: bool = True) -> dict:
    """A claim as callers see it."""
    host = (row["hostname"] or "another machine") if row["daemon"] != context.ledger.daemon_id else ""
    return {"claim_id": row["claim_id"], "path": row["path"], "agent_id": row["agent_id"], **compact(session_id=row["session_id"]),
            "shared": bool(row["shared"]), "note": row["note"] or "", "granted_at": stamp_of(row["granted_at"]),
            **({"renewed_at": stamp_of(row["renewed_at"])} if row["renew_event"] != row["grant_event"] else {}),
            "expires_at": stamp_of(row["expires_at"]), "ttl_s": row["ttl_s"], "fence": row["grant_event"], **compact(host=host),
            "holds": holds}


def _waiting_info(waiting: Waiting) -> dict:
    return {"agent_id": waiting.agent_id, "paths": waiting.paths, "shared": waiting.shared, "since": stamp_of(waiting.since)}


def _queue(context: Context) -> list:
    """Who waits for a claim, with tickets, the first first."""
    return sorted([(ticket, ticket.wish) for ticket in context.ledger.queue.copy() if ticket.wish], key=lambda entry: entry[1].since)


def _refuse_claim(context: Context, wanted: Waiting, live: list, ticket) -> None:
    """Raise Conflict with those whose claims, or earlier wishes, stand against a claim; its ticket says so from then on.

    Who waits for something that the claimer itself holds is not before it: both would wait for ever.
    """
    def stands(claim, agent_id, paths, shared):
        return next((path for path in paths if object_to(claim, agent_id, path, shared)), None)

    wanted = ticket and ticket.wish or wanted
    mine = [claim for claim in live if claim["agent_id"] == wanted.agent_id]
    against = [(path, claim) for claim in live if (path := stands(claim, wanted.agent_id, wanted.paths, wanted.shared))]
    before = []
    for other, first in _queue(context):
        if other is ticket or first.since > wanted.since:
            break
        as_claims = [{"agent_id": first.agent_id, "path": path, "shared": first.shared} for path in first.paths]
        if not any(stands(claim, first.agent_id, first.paths, first.shared) for claim in mine):
            path = next((claim["path"] for claim in as_claims if stands(claim, wanted.agent_id, wanted.paths, wanted.shared)), None)
            before += [(path, first)] if path else []
    if not against and not before:
        return
    waiters = [first for _, first in _queue(context)]
    if ticket and not ticket.wish:
        if len(waiters) >= WAITING_MAX or sum(weight(first.paths) for first in waiters) + weight(wanted.paths) > CLAIMS_MAX:
            raise ThrumError(f"{len(waiters)} agents wait for claims already; try again later")
        ticket.wish = wanted
    now, rest = context.world.now_ns(), len(against or before) - 1
    if against:
        path, claim = min(against, key=lambda found: found[0] != found[1]["path"])
        since = min(claim["granted_at"], claim["expires_at"] - claim["ttl_s"] * NS, now)    # its stamp may be ahead of our clock
        as_what = f" as {claim['path']}" if claim["path"] != path else ""
        whom, kind = claim["agent_id"], " (shared)" if claim["shared"] else ""
        text = f"{path} is claimed{as_what} by @{whom}{_on_host(claim, context.ledger.daemon_id)}{kind}, " \
               f"since {_minute_of(since, now)} ({span((now - since) / NS)} ago) {until(claim, now)}{_in_quotes(claim['note'])}"
        more = f", and {rest} more claim{'s stand' if rest > 1 else ' stands'} in the way" if rest else ""
    else:
        path, whom = before[0][0], before[0][1].agent_id
        text = f"@{whom} waits for {path} already"
        more = f", and {rest} more" if rest else ""
    raise Conflict(f"{text}{more}; queue with --wait 20m, or ask @{whom}",
                   {"claims": [_claim_info(context, claim) for _, claim in against],
                    "waiting": [_waiting_info(first) for _, first in before]})


def _claimed_paths(params: dict) -> list:
    return list(dict.fromkeys(map(claim_path, params.get("paths", ()))))


def claim_take(context: Context, params: dict) -> dict:
    """Claim all of some paths or none; a claim that the caller has already is renewed and keeps its place."""
    store, agent_id, paths, shared = context.store, caller_of(context, params), _claimed_paths(params), params.get("shared", False)
    agent, ttl_s, note = store.agent(agent_id), params.get("ttl_s"), check_text(params.get("note", ""), "note")
    ticket = params.get("ticket")
    if not paths:
        raise InvalidParams("name at least one path to claim; '.' is the whole repository")
    too_many = ThrumError(f"@{agent_id} would have more than {CLAIMS_PER_AGENT} claims, of which one with wildcards counts for "
                          f"{WILD_WEIGHT}; release some, or claim the folder above them")
    if weight(paths) > CLAIMS_PER_AGENT:        # before they are compared
        raise too_many
    if ticket and ticket not in context.ledger.queue:
        raise ThrumError("whoever asked for the claim has gone")
    if ttl_s is not None and not 0 < ttl_s <= TTL_MAX_S:
        raise InvalidParams(f"ttl_s must be between 1 and {TTL_MAX_S} seconds")
    if not agent:
        raise ThrumError(f"agent not found: {agent_id} is not registered")
    session = store.open_session(agent_id)
    if not session and agent["kind"] != "user":
        raise ThrumError("no active session - start one with 'thrum session start'")
    session_id, now = session["session_id"] if session else None, context.world.now_ns()
    try:
        since = min(now, ns_of(params["queued_at"])) if "queued_at" in params else now
    except ValueError as error:
        raise InvalidParams(f"queued_at: {error}") from None
    known = store.claims()
    live = live_claims(known, now)
    own = {claim["path"]: claim for claim in live if claim["agent_id"] == agent_id}
    kept = {path: own[path] for path in paths
            if path in own and (bool(own[path]["shared"]), own[path]["session_id"]) == (shared, session_id)}
    asked = [path for path in paths if path not in kept]
    added = weight(path for path in asked if path not in own)
    if weight(own) + added > CLAIMS_PER_AGENT:
        raise too_many
    if added and weight(claim["path"] for claim in live) + added > CLAIMS_MAX:
        raise ThrumError(f"there would be more than {CLAIMS_MAX:,} claims; 'thrum claims' lists them")
    _refuse_claim(context, Waiting(agent_id, asked, shared, since), live, ticket)
    done = []
    for path in paths:
        before = own.get(path)
        if path in kept:
            context.append("claim.renew", after=before["renewed_at"], claim_id=before["claim_id"], agent_id=agent_id,
                           ttl_s=ttl_s or before["ttl_s"], note=note or before["note"])
            done.append(before["claim_id"])
            continue
        if before:
            free_claim(context, before, "replaced")
        # Later than all that it overlaps, also what has lapsed here and may come back: by its stamp it must not be before them.
        after = max([agent["registered_at"], session["started_at"] if session else 0,
                     *(claim["granted_at"] for claim in known
                       if now < claim["granted_at"] < now + FENCE_AHEAD_S * NS and overlap(claim["path"], path))])
        event = context.append("claim.take", after=after, above=store.last_fence(), claim_id=context.world.new_id("clm"),
                               agent_id=agent_id, session_id=session_id, path=path, shared=shared, ttl_s=ttl_s or CLAIM_TTL_S,
                               note=note)
        done.append(event["claim_id"])
    return {"claims": [_claim_info(context, store.claim(claim_id)) for claim_id in done], "scope": _claim_scope(context, params)}


def _claim_scope(context: Context, params: dict) -> str:
    """How far a grant has got.  Nothing is shared with other machines yet, so `confirm` has nothing to wait for."""
    return "this machine"


def claim_release(context: Context, params: dict) -> dict:
    """Give back the caller's claims on exactly these paths, all of them without any."""
    agent_id, paths, live = caller_of(context, params), _claimed_paths(params), live_claims(context.store.claims(), context.world.now_ns())
    mine = [claim for claim in live if claim["agent_id"] == agent_id]
    for path in paths:
        if all(claim["path"] != path for claim in mine):
            other = next((claim for claim in live if overlap(claim["path"], path)), None)
            hint = f"{'you have' if other['agent_id'] == agent_id else '@' + other['agent_id'] + ' has'} one on {other['path']}" \
                if other else "'thrum claims --mine' lists yours"
            raise ThrumError(f"you have no claim on {path}; {hint}")
    released = [claim for claim in mine if not paths or claim["path"] in paths]
    for claim in released:
        free_claim(context, claim, "released")
    return {"released": [_claim_info(context, claim) for claim in released], "count": len(released)}


def _live_and_held(context: Context) -> tuple:
    """The live claims, and the ids of those that hold."""
    live = live_claims(context.store.claims(), context.world.now_ns())
    return live, {claim["claim_id"] for claim in holding(live)}


def claim_list(context: Context, params: dict) -> dict:
    paths, agent_id = _claimed_paths(params), params.get("agent_id", "")
    live, held = _live_and_held(context)

    def wanted(whose, others):
        return agent_id in ("", whose) and (not paths or any(overlap(path, other) for path in paths for other in others))

    return {"claims": [_claim_info(context, claim, claim["claim_id"] in held) for claim in live
                       if wanted(claim["agent_id"], [claim["path"]])],
            "waiting": [_waiting_info(waiting) for _, waiting in _queue(context) if wanted(waiting.agent_id, waiting.paths)]}


def claim_check(context: Context, params: dict) -> dict:
    """Which exclusive claims of others cover some paths; `files` of each are those that it covers."""
    live, held = _live_and_held(context)
    files, found = sorted(set(params["paths"])), []
    for claim in live:
        if claim["shared"] or claim["claim_id"] not in held or claim["agent_id"] == params.get("caller_agent_id"):
            continue
        start = bisect.bisect_left(files, _pattern(claim["path"]).head)
        near = files[start:bisect.bisect_left(files, _pattern(claim["path"]).head + "\U0010ffff", start)]
        covered = [path for path in near if covers(claim["path"], path)]
        if covered:
            found.append({**_claim_info(context, claim), "files": covered})
    return {"claims": found}


# ---- tasks and processes: told live, and kept for a while on this machine

def _reported(params: dict, fields: dict) -> dict:
    """What a report says, in the order of the fields; raises InvalidParams, or ThrumError when it is too large."""
    data = {name: params[name] for name in [field.rstrip("!") for field in fields] if params.get(name)}
    for name, value in data.items():
        if type(value) is not str and value < 0:
            raise InvalidParams(f"invalid params: {name} must not be negative")
        if name in REPORT_LABELS and not is_label(value):
            raise InvalidParams(f"invalid params: {name} must be a text of at most {PAIR_MAX} printable characters")
    size = len(encode(data))
    if size > LINE_MAX:
        raise ThrumError(f"this is too large: {size:,} bytes, the limit is {LINE_MAX:,}; report less of it")
    return data


def _tell_live(context: Context, kind: str, data: dict) -> None:
    """Tell those who watch, once it is stored."""
    tell = context.ledger.facts.get("live")
    if tell:
        context.afterwards.append(lambda: tell(kind, data))


def _one_of(params: dict, name: str, values: tuple, default: str) -> str:
    value = params.get(name) or default
    if value not in (*values, default):
        raise InvalidParams(f"invalid params: {name} must be one of {', '.join(values)}")
    return value


def task_report(context: Context, params: dict) -> dict:
    _one_of(params, "stream_type", TASK_EVENTS, "")
    agent_id = params.get("agent_id") or params.get("caller_agent_id", "")
    data = _reported({**params, "agent_id": agent_id}, TASK_FIELDS)
    event_seq = context.store.add_task_event(data, context.world.now_ns())
    _tell_live(context, "task_stream", {**data, "event_seq": event_seq})
    return {"success": True, "event_seq": event_seq}


def telemetry_report(context: Context, params: dict) -> dict:
    data = _reported(params, TELEMETRY_FIELDS)
    data = {**{name: "" if kind is str else 0 for name, kind in TELEMETRY_FIELDS.items()}, "status": "running",
            "instance_id": params.get("caller_agent_id") or f"external_{data.get('pid', 0)}", **data}
    context.store.add_telemetry(data, context.world.now_ns())
    _tell_live(context, "telemetry", data)
    return {"status": "ok"}


def _limit(params: dict, default: int, most: int) -> int:
    return min(max(params.get("limit", default), 1), most)


def _task_info(row: dict) -> dict:
    """A task as `task.list` gives it; `tool_name` is in use now."""
    counts = {name: row[name] for name in ("turns", "tokens_in", "tokens_out", "cost", "duration_sec", "events")}
    return {"task_id": row["task_id"], "status": row["status"] or "", **compact(**{
        name: row[name] for name in ("agent_id", "thread_id", "workspace", "directive", "source_type", "tool_name")}),
        **counts, "started_at": stamp_of(row["started_at"]), "updated_at": stamp_of(row["updated_at"])}


def task_list(context: Context, params: dict) -> dict:
    return {"tasks": [_task_info(row) for row in context.store.tasks(_limit(params, TASKS_LISTED, TASKS_MAX))]}


def task_events(context: Context, params: dict) -> dict:
    """The last events of a task, the oldest first; as `text` for people to read, or only what they come to."""
    store, task_id = context.store, params["task_id"]
    task = store.task(task_id)
    if not task:
        raise NotFound(f"task not found: {task_id}")
    kind, form = _one_of(params, "type", TASK_EVENTS, ""), _one_of(params, "format", ("json", "text", "summary"), "json")
    rows = store.task_events(task_id, _limit(params, TASK_EVENTS_MAX // 2, TASK_EVENTS_MAX), max(0, params.get("turn", 0)), kind)
    events = [{**json.loads(row["data"]), "event_seq": row["event_seq"], "created_at": row["at"] // 1_000_000} for row in rows]
    if form == "json":
        return {"task_id": task_id, "events": events}
    if form == "text":
        return {"task_id": task_id, "text": "".join(_task_line(event) + "\n" for event in events)}
    tools = [event["tool_name"] for event in events if event["stream_type"] == "tool_use" and "tool_name" in event]
    return {"task_id": task_id, "summary": {
        **_task_info(task), "tools": {tool: tools.count(tool) for tool in sorted(set(tools))},
        "errors": [event.get("error_msg", "") for event in events if event["stream_type"] == "error"]}}


def _task_line(event: dict) -> str:
    """An event of a task for people to read."""
    kind, turn = event["stream_type"], event.get("turn_num", 0)
    if kind == "text":
        return event.get("text", "")
    if kind in ("turn_start", "turn_end"):
        return f"--- turn {turn}{' ends' if kind == 'turn_end' else ''} ---"
    if kind == "status":
        totals = f": {span(event.get('duration_sec', 0))}, {event.get('tokens_in', 0):,} tokens in, {event.get('tokens_out', 0):,} out, " \
                 f"${event.get('cost', 0):.4f}"
        return f"[{event.get('status', '')}]" + (totals if event.keys() & {"tokens_in", "tokens_out", "cost", "duration_sec"} else "")
    if kind == "error":
        return f"! {event.get('error_msg', '')}"
    mark, said = (">", "tool_input") if kind == "tool_use" else ("<", "tool_output")
    return f"{mark} {event.get('tool_name', '')} {event.get(said, '')}"


def telemetry_list(context: Context, params: dict) -> dict:
    """What processes have said last, and for each half minute of the hour before that."""
    return {"instances": [{
        **reports[-1][1], "updated_at": stamp_of(reports[-1][0]),
        "history": [{"at": stamp_of(at), **{name: data[name] for name in ("turns", "tokens_in", "tokens_out", "cost")}}
                    for at, data in reports]}
        for reports in context.store.telemetry(_limit(params, PAGE_MAX, LIST_MAX)).values()]}


TASK_EVENTS = ("status", "turn_start", "turn_end", "text", "tool_use", "tool_result", "error")
TELEMETRY_FIELDS = {"instance_id": str, "pid": int, "turns": int, "tokens_in": int, "tokens_out": int, "cost": float, "status": str,
                    "duration_sec": int}
REPORT_LABELS = ("task_id", "thread_id", "tool_name", "status", "agent_id", "source_type", "instance_id")
CALLER = {"caller_agent_id": str}
CONTEXT = {"agent_name": str, "repo_path": str, "text": bool, **CALLER}
PAGING = {"page_size": int, "page": int}
METHODS = {
    "health": Method(health, {}, "Whether the daemon is well, and how much it holds."),
    "page.link": Method(page_link, {}, "The address of the page, to be opened by a person's browser.", private=True),
    "daemon.stop": Method(stop, {}, "Stop the daemon after what is in flight.", private=True),
    "agent.register": Method(
        agent_register, {"role!": str, "module!": str, "name": str, "display": str, "force": bool, "re_register": bool,
                         "worktree": str, "dry_run": bool}, "Register an agent, or report who holds its role and module.", writes=True,
        preview="dry_run"),
    "agent.delete": Method(agent_delete, {"name": str, **CALLER}, "Delete an agent with everything that it wrote.", writes=True,
                           aliases={"agent_name": "name", "agent_id": "name"}),
    "agent.cleanup": Method(agent_cleanup, {"dry_run": bool, "force": bool, "threshold": int, **CALLER},
                            "Find agents that nobody can be any more; with force, delete them.", writes=True, preview="!force"),
    "user.register": Method(user_register, {"username!": str, "display": str}, "Join as a person.", writes=True,
                            elsewhere="User registration only available via WebSocket"),
    "user.identify": Method(user_identify, {}, "Who git says is working here."),
    "agent.list": Method(agent_list, {"role": str, "module": str}, "The registered agents, newest first."),
    "agent.whoami": Method(agent_whoami, {**CALLER}, "Who is calling, with session and intent."),
    "agent.listContext": Method(agent_list_context, {"agent_id": str, "role": str, "branch": str, "file": str, "fresh": bool},
                                "What the agents with an open session are working on; with fresh, git is asked now."),
    "team.list": Method(team_list, {"include_offline": bool}, "Who is here, at what, and how much mail waits for them.",
                        aliases={"all": "include_offline"}, slow=True),
    "work.whoHas": Method(work_who_has, {"file!": str}, "Who has changed a file, as git says now.", slow=True),
    "worktree.status": Method(worktree_status, {"repo_path": str}, "Branch and uncommitted files of a worktree of this repository.",
                              slow=True),
    "conflict.list": Method(conflict_list, {"agents": [str], "all": bool},
                            "Which worktrees of active agents would not merge, with each other or with the base branch.", slow=ONE_BY_ONE),
    # These write files of the caller's worktree, not events, so they are no changes to the ledger.
    "context.save": Method(context_save, {"content": str, **CONTEXT}, "Save what an agent wants its successor to know.", private=True),
    "context.show": Method(context_show, {"include_preamble": bool, "no_preamble": bool, **CONTEXT}, "What an agent has saved."),
    "context.clear": Method(context_clear, CONTEXT, "Remove what an agent has saved; its preamble stays.", private=True),
    "context.preamble.show": Method(context_preamble_show, CONTEXT, "What stands before an agent's context."),
    "context.preamble.save": Method(context_preamble_save, {"content": str, **CONTEXT}, "Replace what stands before it.", private=True),
    "session.start": Method(session_start, {"agent_id!": str, "scopes": [PAIR], "refs": [PAIR]},
                            "Start a session; ends what a crash left open.", writes=True, prepare=look_at_session),
    "session.end": Method(session_end, {"session_id!": str, "reason": str}, "End a session.", writes=True,
                          prepare=look_at_session),
    "session.list": Method(session_list, {"agent_id": str, "active_only": bool}, "Sessions, newest first.",
                           aliases={"active": "active_only"}),
    "session.thread": Method(session_thread, CALLER, "The thread that the caller's session works in."),
    "session.heartbeat": Method(
        session_heartbeat, {"session_id!": str, "add_scopes": [PAIR], "remove_scopes": [PAIR], "add_refs": [PAIR],
                            "remove_refs": [PAIR]}, "Say that a session is alive; change its scopes and references.", writes=True,
        prepare=look_at_session),
    "session.setIntent": Method(session_set_intent, {"session_id!": str, "intent": str}, "Say what a session is for.", writes=True),
    "session.setTask": Method(session_set_task, {"session_id!": str, "current_task": str}, "Say which task it works on.", writes=True),
    "claim.take": Method(
        claim_take, {"paths!": [str], "ttl_s": int, "note": str, "shared": bool, "wait_ms": int, "queued_at": str, "confirm": bool,
                     **CALLER}, "Claim paths, all or none; with wait_ms, as soon as they are free.", writes=True, queues=True),
    "claim.release": Method(claim_release, {"paths": [str], **CALLER}, "Give back claims; without paths, all of the caller's.",
                            writes=True),
    "claim.list": Method(claim_list, {"paths": [str], "agent_id": str}, "Who has claimed what, and who waits for it."),
    "claim.check": Method(claim_check, {"paths!": [str], **CALLER}, "Which exclusive claims of others cover some files."),
    "group.create": Method(group_create, {"name!": str, "description": str, **CALLER}, "Create a group.", writes=True),
    "group.member.add": Method(
        group_member_add, {"group!": str, "member_type": str, "member_value!": str, **CALLER},
        "Add an agent, a role or a group to a group.", writes=True, aliases={"member": "member_value"}),
    "group.member.remove": Method(
        group_member_remove, {"group!": str, "member_type": str, "member_value!": str, **CALLER},
        "Take a member out of a group.", writes=True, aliases={"member": "member_value"}),
    "group.delete": Method(group_delete, {"name!": str, "delete_messages": bool, **CALLER}, "Delete a group.", writes=True),
    "group.info": Method(group_info, {"name!": str}, "One group with its members."),
    "group.members": Method(group_members, {"name!": str, "expand": bool}, "The members of a group, and the agents they come to."),
    "group.list": Method(group_list, {}, "All groups with their size."),
    "message.send": Method(
        message_send, {"content!": str, "format": str, "structured": dict, "reply_to": str, "thread_id": str, "scopes": [PAIR],
                       "refs": [PAIR], "mentions": [str], "tags": [str], "send_key": str, "if_last": str, "acting_as": str,
                       "disclose": bool, **CALLER},
        "Send a message; the same send_key again gives the first one.", writes=True),
    "message.get": Method(message_get, {"message_id!": str, "history": bool}, "One message with everything known of it."),
    "message.trace": Method(message_trace, {"message_id!": str}, "What became of a message, recipient by recipient."),
    "message.search": Method(
        message_search, {"query!": str, "from": str, "to": str, "thread_id": str, "scope": PAIR, "created_after": str, "limit": int},
        "Full text over everything said, the best hits first.", indexes=True),
    "message.archive": Method(message_archive, {"archive_type": str, "identifier": str, **CALLER},
                              "Move the messages of an agent or group into a file.", writes=True),
    "message.deleteByScope": Method(message_delete_by_scope, {"scope_type": str, "scope_value": str, **CALLER},
                                    "Remove the messages with a scope for good.", writes=True),
    "message.deleteByAgent": Method(message_delete_by_agent, {"agent_id!": str, **CALLER},
                                    "Remove the messages of an agent for good.", writes=True),
    "message.markShown": Method(message_mark_shown, {"message_ids!": [str], "route": str, "pushed": bool, **CALLER},
                                "Note that messages were pushed or shown to the caller.", writes=True),
    "purge.execute": Method(purge_execute, {"before!": str, "dry_run": bool}, "Remove everything from before a time.", writes=True,
                            preview="dry_run", private=True),
    # Decision 16: `mentions` goes by the agent's id, so the roles that the reference wants to know have no effect.
    "message.list": Method(
        message_list, {"scope": PAIR, "ref": PAIR, "thread_id": str, "author_id": str, "mentions": bool, "mention_role": str,
                       "caller_mention_role": str, "unread": bool, "unread_for_agent": str, "exclude_self": bool,
                       "for_agent": str, "for_agent_role": str, "created_after": str, "after_seq": int, "epoch": str, "sort_by": str,
                       "sort_order": str, "audiences": bool, **PAGING, **CALLER}, "Messages, newest first."),
    "message.outbox": Method(message_outbox, {"to": str, "unread": bool, "overdue": bool, **PAGING, **CALLER},
                             "What the caller sent, with each recipient's state."),
    "message.edit": Method(message_edit, {"message_id!": str, "content": str, "structured": dict, **CALLER},
                           "Replace what one wrote.", writes=True),
    "message.delete": Method(message_delete, {"message_id!": str, "reason": str, **CALLER}, "Take back a message.", writes=True),
    "message.markRead": Method(message_mark_read, {"message_ids": [str], "all": bool, "up_to_seq": int, **CALLER},
                               "Mark received messages as read.", writes=True),
    "message.wait": Method(
        message_wait, {"after_seq": int, "epoch": str, "created_after": str, "timeout_ms": int, "all": bool, "unread": bool,
                       "from": str, "thread_id": str, "scope": PAIR, "mention_role": str, "page_size": int, **CALLER},
        "Wait for messages after a point of the journal; oldest first.", waits="messages"),
    "event.wait": Method(
        event_wait, {"after_seq": int, "epoch": str, "created_after": str, "topics": [str], "from": str, "to": str, "scope": PAIR,
                     "limit": int, "timeout_ms": int, **CALLER},
        "Wait for whatever happens after a point of the journal, of all topics or some; oldest first.", waits="events"),
    "subscribe": Method(
        subscribe, {"scope": PAIR, "mention_role": str, "all": bool, "topics": [str], **CALLER},
        "Be told over this connection of messages with a scope, to a name or role, or of all; and of other topics.", writes=True,
        aliases={"mention": "mention_role"}),
    "unsubscribe": Method(unsubscribe, {"subscription_id": int, **CALLER}, "End a subscription of the caller's session.", writes=True),
    "subscriptions.list": Method(subscriptions_list, CALLER, "The subscriptions of the caller's session, newest first."),
    # Of this machine only: neither events nor files of anybody.
    "task.report": Method(task_report, {**TASK_FIELDS, **CALLER}, "Say what happens in a task, for who watches it.", writes=True),
    "task.list": Method(task_list, {"limit": int}, "The tasks that were reported lately, the last first."),
    "task.events": Method(task_events, {"task_id!": str, "limit": int, "turn": int, "type": str, "format": str},
                          "What happened in a task, as events, as text or as a summary."),
    "telemetry.report": Method(telemetry_report, {**TELEMETRY_FIELDS, **CALLER}, "Say what a process has used so far.", writes=True),
    "telemetry.list": Method(telemetry_list, {"limit": int}, "What processes have used, with their last hour."),
}


# ================================================================== 21  Screen
#
# What others wrote is data: whatever could move a cursor, change a title or reverse a line is shown, not obeyed.

BOLD, NORMAL = "\x1b[1m", "\x1b[0m"     # ECMA-48, section 8.3.117
WIDTH_DEFAULT, WIDTH_MIN = 80, 40       # columns where nobody says, and below which nothing is wrapped
PREVIEW = 100                           # characters of a message on one line
PATH_SHOWN = 240                        # characters of a path: a name that is cut cannot be opened
ERROR_MAX = 400                         # characters of an error: five lines of a terminal


def _harmless() -> dict:
    """Control characters (C0, DEL, C1) and bidirectional overrides, as visible escapes."""
    hidden = [*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029]
    table = {c: f"\\x{c:02x}" if c < 256 else f"\\u{c:04x}" for c in hidden}
    del table[9], table[10]
    return table


def plain(text: str) -> str:
    """`text` safe for a terminal; line ends and tabs stay."""
    global _plain_table
    if text.isprintable():
        return text
    _plain_table = _plain_table or _harmless()
    return text.replace("\r\n", "\n").translate(_plain_table)


_plain_table = None


def one_line(text: str, limit: int = PREVIEW) -> str:
    """The beginning of `text` on one line, safe for a terminal."""
    text = plain(" ".join(text[:4 * limit].split()))
    return text if len(text) <= limit else text[:limit - 1] + "…"


def fitted(text: str, width: int) -> str:
    """`one_line` in so many columns of a terminal."""
    text = one_line(text, width)
    while columns(text) > width:
        text = text[:-2] + "…"
    return text


def path_shown(path: str, limit: int = PATH_SHOWN) -> str:
    """A path on one line, safe for a terminal; its blanks stay, so that it can be opened, and what is cut off is its beginning."""
    text = plain(path).replace("\n", "\\n").replace("\t", "\\t")
    return text if len(text) <= limit else "…" + text[1 - limit:]


def error_line(error: Exception) -> str:
    """What is said on stderr when a command fails: one line, whatever the words that it quotes."""
    text = plain(str(error)).replace("\n", "\\n").replace("\t", " ")
    return f"Error: {text if len(text) <= ERROR_MAX else text[:ERROR_MAX - 1] + '…'}\n"


SUGGESTED = 64                  # characters of a word that are compared with others: the time grows with the square


def did_you_mean(word: str, known) -> str:
    """`; did you mean 'inbox'?` for the names that resemble a word, "" where none does."""
    close = difflib.get_close_matches(word[:SUGGESTED], list(known), 2)
    return "; did you mean " + " or ".join(f"'{name}'" for name in close) + "?" if close else ";"


def wrapped(text: str, width: int, indent: str) -> str:
    """`text` broken at blanks to `width` columns, each line indented; long words are left whole."""
    lines = []
    for line in plain(text).split("\n"):
        lead = line[:len(line) - len(line.lstrip(" \t"))]       # code and nested lists keep their shape
        current = lead
        for word in line[len(lead):].split(" "):
            if current.strip() and len(current) + 1 + len(word) > width - len(indent):
                lines.append(current)
                current = lead + word
            else:
                current = f"{current} {word}" if current != lead else lead + word
        lines.append(current)
    return "\n".join((indent + line).rstrip() for line in lines)


def ago(stamp: str, now_ns: int) -> str:
    """How long ago a stamp is, in one unit; the stamp itself when it cannot be read."""
    try:
        seconds = (now_ns - ns_of(stamp)) / NS
    except ValueError:
        return plain(stamp)
    if seconds < 60:
        return "just now"
    size, unit = next(step for step in ((86400, "d"), (3600, "h"), (60, "m")) if seconds >= step[0])
    return f"{int(seconds // size)}{unit} ago"


def when(stamp: str) -> str:
    """A stamp to the second, in UTC: `2026-03-10 09:17:00`."""
    return plain(stamp[:19].replace("T", " "))


def handle(agent_id: str) -> str:
    """How an agent is written: `@name`, and `@role` for the ids of old versions."""
    if agent_id.startswith("agent:"):
        agent_id = agent_id.split(":")[1]
    return "@" + one_line(agent_id)


def to_json(value) -> str:
    """A document for programs: two blanks of indent, keys as they come, harmless on a terminal too."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if not text.isprintable():
        text = text.translate({c: f"\\u{c:04x}" for c in _harmless() if c >= 0x7F})
    return text + "\n"


def columns(text: str) -> int:
    """How many columns of a terminal a text takes (Unicode Standard Annex 11)."""
    if text.isascii():
        return len(text) if BOLD not in text else len(text.replace(BOLD, "").replace(NORMAL, ""))
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
               for c in text.replace(BOLD, "").replace(NORMAL, ""))


def rows_of(table: list, width: int = 0) -> str:
    """Lines with aligned columns, two blanks between them; the last column is broken to `width` columns, if given."""
    widths = [max(columns(row[i]) for row in table) for i in range(len(table[0]) - 1)]
    indent = " " * (sum(widths) + 2 * len(widths))
    return "".join("  ".join([*(cell + " " * (size - columns(cell)) for cell, size in zip(row, widths)),
                              wrapped(row[-1], width, indent).lstrip() if width else row[-1]]) + "\n" for row in table)


# ================================================================== 22  Commands
#
# A row says what the shell accepts and which function answers.  The function gets a Console: what is known of the
# caller, and the ways to answer.  It runs in the daemon, or in the caller's own process when that has to do.
#
# The parser is our own because argparse takes `--lim` for `--limit`, refuses `--after -30s`, and says other things
# than scripts written for the reference expect.


class Argument(Record):
    """A flag (`--name`) or a positional (`NAME`).  `kind` is str, int, bool, list, or "duration" (seconds)."""

    name: str
    help: str
    kind: object = str
    default: object = None
    required: bool = True       # of positionals
    short: str = ""
    many: bool = False          # of the last positional: takes all that follow


class Command(Record):
    """One command.  `here`: it runs in the caller's process; `offline`: it has something to say without a daemon.

    `failure` is the exit status of errors; `joins`: it initializes the repository first where needed; `does` says
    whether it reads, changes, or only tells, for whoever decides what an agent may call.
    """

    run: object
    help: str
    arguments: tuple = ()
    example: str = ""
    here: bool = False
    offline: bool = False
    joins: bool = False
    failure: int = 1
    does: str = "reads"
    hushed: bool = False        # --quiet leaves nothing to say


class Args:
    """The values of a command line; a flag `--page-size` is `page_size`."""

    def __init__(self, values: dict):
        self.__dict__.update(values)


GLOBAL_FLAGS = (
    Argument("--role", "act in this role"), Argument("--module", "act for this module"),
    Argument("--repo", "the repository to act in", default=""), Argument("--json", "answer with one JSON document", bool),
    Argument("--quiet", "only errors", bool), Argument("--verbose", "say more", bool),
    Argument("--help", "show this help", bool, short="-h"))


def _field(name: str) -> str:
    field = name.lstrip("-").replace("-", "_").lower()
    return "from_" if field == "from" else field


def parse_command(row: Command, tokens: list) -> Args:
    """The values for a row; raises Usage with the texts that scripts know (command line contract, section 1.3)."""
    flags = {argument.name: argument for argument in (*GLOBAL_FLAGS, *row.arguments) if argument.name[0] == "-"}
    short = {argument.short: argument for argument in flags.values() if argument.short}
    places = [argument for argument in row.arguments if argument.name[0] != "-"]
    values = {_field(a.name): [] if a.kind is list else False if a.kind is bool else a.default for a in (*flags.values(), *places)}
    words, left = [], list(tokens)
    while left:
        token = left.pop(0)
        if token == "--":
            words += left
            break
        if len(token) < 2 or token[0] != "-":
            words.append(token)
            continue
        name, equals, value = token.partition("=")
        argument = flags.get(name) if name.startswith("--") else short.get(name)
        if not argument:
            if name.startswith("--"):
                raise Usage(f"unknown flag: {name}")
            raise Usage(f"unknown shorthand flag: {name[1:2]!r} in {name}")
        if argument.kind is bool:
            if value not in ("", "true", "false", "1", "0"):
                raise Usage(f'invalid argument "{value}" for "{name}" flag: true or false')
            values[_field(argument.name)] = value not in ("false", "0")
            continue
        if not equals:
            if not left:
                raise Usage(f"flag needs an argument: {name}")
            value = left.pop(0)
        if argument.kind is list:
            values[_field(argument.name)] += [part for part in value.split(",") if part]
        else:
            values[_field(argument.name)] = _convert(name, argument.kind, value)
    if values["help"]:
        return Args(values)
    needed = sum(argument.required for argument in places)
    many = bool(places) and places[-1].many
    if places and (len(words) < needed or (len(words) > len(places) and not many)):
        exact = needed == len(places) or "--body-file" in flags         # a text may come from elsewhere
        accepts = str(len(places)) if exact else f"between {needed} and {len(places)}"
        hint = "; put the text in quotes" if len(words) > len(places) and places[-1].name in ("MESSAGE", "TEXT") else ""
        raise Usage(f"accepts {accepts} arg(s), received {len(words)}{hint}")
    for index, argument in enumerate(places):
        if argument.many:
            values[_field(argument.name)] = words[index:]
        elif index < len(words):
            values[_field(argument.name)] = words[index]
    return Args(values)


def _convert(name: str, kind, value: str):
    if kind is int:
        digits = value[1:] if value[:1] in "+-" else value
        if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
            raise Usage(f'invalid argument "{value}" for "{name}" flag: not a number')
        return int(value)
    if kind == "duration":
        try:
            return parse_duration(value)
        except ValueError as error:
            if name == "--after":
                raise Usage(f'invalid --after duration "{value}": {error} (examples: -30s, -5m, +60s)') from None
            raise Usage(f"invalid {name.lstrip('-')}: {error}") from None
    return value


class Console:
    """One run of a command: who called from where, and the ways to answer.  The daemon and the client derive theirs."""

    def __init__(self, world: World, *, top: str, cwd: str, argv: list, environ: dict, identities: list,
                 terminals: str = "", width: int = WIDTH_DEFAULT, program: str = "thrum", key: str = "", cursor: str = ""):
        self.world = world
        self.top, self.cwd, self.argv, self.environ, self.identities = top, cwd, argv, environ, identities
        self.worktree = printable(os.path.basename(top))
        self.terminals = terminals      # which of "012" are terminals
        self.width = max(WIDTH_MIN, min(width, 200))
        self.program = program          # how the caller calls us
        self.key = key                  # makes a repeated send the same send
        self.cursor = cursor            # where an interrupted run of this command had got to
        self.args = Args({})
        self.row = None

    async def call(self, method: str, **params):
        """The result of a JSON-RPC method."""
        raise NotImplementedError

    async def write(self, stream: str, text: str) -> None:
        """Send text to the caller's stdout (`O`) or stderr (`E`)."""
        raise NotImplementedError

    async def end(self, status: int) -> None:
        """Give the exit status and wait until all text has left the caller's process; what was shown can be marked.

        Whatever is written after it is not shown.
        """

    async def read(self, path: str) -> bytes:
        """The bytes of a file that the command line names, or of stdin for `-`."""
        raise NotImplementedError

    async def save(self, path: str, data: bytes | None) -> None:
        """Write a file below the caller's worktree (None removes it); raises ThrumError."""
        raise NotImplementedError

    async def load(self, file: str) -> tuple | None:
        """A file of the worktree's `.thrum/context/` and the time of its last change (ns); None without one."""
        raise NotImplementedError

    async def ask(self, question: str) -> str:
        """The line that the person at the terminal, or a pipe, gives as the answer; "" where there is none."""
        raise NotImplementedError

    async def resume_at(self, cursor: str) -> None:
        """Where to go on if the daemon goes away."""

    # ---- what all share

    async def out(self, text: str) -> None:
        await self.write("O", self.harmless(text))

    async def note(self, text: str) -> None:
        """A line on stderr, unless --quiet."""
        if not self.args.quiet:
            await self.write("E", self.harmless(text) + "\n")

    async def answer(self, value, text: str) -> None:
        """The result: `value` with --json, else `text` unless --quiet."""
        if self.args.json:
            await self.out(to_json(value))
        elif text and not (self.args.quiet and self.row.hushed):
            await self.out(text if text.endswith("\n") else text + "\n")

    def coloured(self) -> bool:
        return "1" in self.terminals and not self.environ.get("NO_COLOR")

    def bold(self, text: str) -> str:
        return f"{BOLD}{text}{NORMAL}" if self.coloured() else text

    def harmless(self, text: str) -> str:
        """Text as it may be sent to the caller, whatever was forgotten before: its only escapes are our own two."""
        if not self.coloured() or BOLD not in text:
            return plain(text)
        return NORMAL.join(BOLD.join(map(plain, part.split(BOLD))) for part in text.split(NORMAL))

    def identity(self) -> Identity:
        return resolve_caller(self.identities, self.environ, self.worktree, self.args.role or "", self.args.module or "")

    def me(self) -> str:
        try:
            return self.identity().agent_id()
        except NoIdentity as error:
            raise NoIdentity(f"failed to resolve agent identity: {error}") from None

    def ago(self, stamp: str) -> str:
        return ago(stamp, self.world.now_ns())

    async def text(self, given: str, file: str | None) -> str:
        """The body of a message: from the command line, from stdin (`-`) or from a file."""
        if file is not None:
            if given is not None:
                raise Usage("give the text or --body-file, not both")
            given = await _given(self, file, "cannot read the text")
        elif given == "-":
            given = await _given(self, "-", "cannot read the text")
        elif given is None:
            places = sum(argument.name[0] != "-" for argument in self.row.arguments)
            raise Usage(f"accepts {places} arg(s), received {places - 1}")
        if not given.strip():
            raise ThrumError("content is required")
        return check_text(given, "the message", REQUEST_MAX)

    async def session(self) -> str:
        """The id of the caller's open session."""
        who = await self.call("agent.whoami", caller_agent_id=self.me())
        if "session_id" not in who:
            raise ThrumError("no active session - start one with 'thrum session start'")
        return who["session_id"]


async def _given(console: Console, file: str, problem: str) -> str:
    """The text in a file that the command line names, or in stdin for `-`; it may hold what is not UTF-8."""
    try:
        return (await console.read(file)).decode(errors="surrogateescape")
    except ThrumError as error:
        raise ThrumError(f"{problem}: {error}") from None


# ---- orientation

DEFAULT_INTENTS = {
    "coordinator": "Coordinate agents and tasks in {}", "implementer": "Implement features and fixes in {}",
    "reviewer": "Review code and PRs in {}", "planner": "Plan architecture and design in {}",
    "tester": "Test and validate changes in {}"}


async def _chosen_name(console: Console, args: Args) -> str:
    """The name to register under, "" for none: THRUM_NAME counts more than --name (decision 5)."""
    name = console.environ.get("THRUM_NAME", "").strip() or args.name or ""
    if args.name and name != args.name:
        await console.note(f"Note: THRUM_NAME is '{name}' and counts, not --name {args.name}")
    if name:
        try:
            check_name(name)
        except InvalidParams as error:
            raise InvalidParams(f"invalid agent name: {error}") from None
    return name


def _continued(console: Console, name: str) -> Identity:
    """The identity of this worktree that an agent called `name`, or of no name, continues; an empty one where there is none."""
    files = [f for f in console.identities if not name or f[0] == name + ".json"]
    for file in files:
        parse_identity(*file)       # a damaged one is reported, not replaced unasked
    try:
        return choose_identity(files, {}, console.worktree)
    except NoIdentity:
        return Identity()       # several, none of them for this worktree


def _worktree_ref(console: Console) -> list:
    """The references of a session: which worktree it works in."""
    return [{"type": "worktree", "value": worktree_label(console.top)}]


async def quickstart(console: Console, args: Args) -> int:
    environ = console.environ
    check_runtime(args.runtime)
    name = await _chosen_name(console, args)
    old = Identity() if args.force else _continued(console, name)
    role = args.role or environ.get("THRUM_ROLE") or old.role
    module = args.module or environ.get("THRUM_MODULE") or old.module
    if not role or not module:
        raise Usage("--role and --module are required (or set THRUM_ROLE and THRUM_MODULE env vars)")
    own_words = None
    if args.preamble_file is not None:
        own_words = check_text(await _given(console, args.preamble_file, f'failed to read preamble file "{args.preamble_file}"'),
                               "the preamble", PREAMBLE_MAX)
    if args.dry_run:
        check_word(role, "role")
        plan = [f"register {handle(name or old.name or role)} ({role}, {module})", "start a session",
                f"set the intent: {one_line(_intent(console, old, role, args.intent))}"]
        await console.answer({"dry_run": True, "would": plan}, "".join(f"Would {step}\n" for step in plan))
        return 0
    register, session, done = await enrol(console, old, name or old.name, role, module, args.display, args.intent, args.force, own_words)
    unread = (await console.call("message.list", for_agent=register["agent_id"], page_size=1))["unread"]
    thrum = console.program
    await console.answer(
        {"register": register, "session": session, "intent": done, **compact(runtime=args.runtime)},
        (f"✓ Using runtime: {args.runtime}\n" if args.runtime else "")
        + f"✓ Registered as {handle(register['agent_id'])} ({role}, {module})\n✓ Session started: {session['session_id']}\n"
        f"✓ Intent set: {one_line(done['intent'])}\n" + ("" if args.quiet else "\nNext:\n" + rows_of([
            [f"  {thrum} inbox", f"read what was sent to you ({unread} unread)" if unread else "read what others send you"],
            [f'  {thrum} send "…" --to @NAME', "write to an agent, a role or a group; without --to, to everyone"],
            [f"  {thrum} team", "see who is here, and at what"],
            [f"  {thrum} claim FILE", "say what you are going to change, so that others keep off"],
            [f"  {thrum} wait --timeout 5m", "wait for the next message"]])))
    return 0


def _intent(console: Console, old: Identity, role: str, intent: str | None) -> str:
    before = old.data.get("intent") if old.role == role else ""         # who comes back goes on with what it was doing
    return intent or (before if type(before) is str else "") or DEFAULT_INTENTS.get(role, "Working in {}").format(console.worktree)


async def enrol(console: Console, old: Identity, name: str, role: str, module: str, display: str | None, intent: str | None,
                force: bool, own_words: str | None = None) -> tuple:
    """Register an agent of this worktree, write its files, open its session, set its intent: the three replies.

    `old` is the identity that it continues; `own_words` go into its preamble.
    """
    display = display or console.environ.get("THRUM_DISPLAY") or old.display or f"{role.capitalize()} ({module})"
    repository, intent = console.worktree, check_text(_intent(console, old, role, intent), "intent")
    repo_id = (await console.call("health"))["repo_id"]
    identity = Identity(name or unnamed_agent_id(repo_id, role, module), role, module, display, "agent", "", old.data)

    async def registered():
        reply = await console.call("agent.register", name=name or None, role=role, module=module, display=display,
                                   worktree=repository, force=force or None)
        if reply["status"] == "conflict":
            reply = await console.call("agent.register", name=name or None, role=role, module=module, display=display,
                                       worktree=repository, re_register=True)
        return reply

    register = await _with_identity_file(console, identity, repo_id, registered)
    session = await console.call("session.start", agent_id=register["agent_id"],
                                 refs=_worktree_ref(console))
    done = await console.call("session.setIntent", session_id=session["session_id"], intent=intent)
    await _save_identity(console, identity, repo_id, session_id=session["session_id"], intent=intent, branch=session.get("branch"),
                         context_file="context/" + context_files(identity.name)[0])
    await _lay_out_context(console, identity.name, role, own_words)
    return register, session, done


async def _with_identity_file(console: Console, identity: Identity, repo_id: str, register):
    """Register, with the identity file written first: where that fails, nobody is registered, and vice versa."""
    before = dict(console.identities).get(identity.name + ".json")
    await _save_identity(console, identity, repo_id)
    try:
        return await register()
    except ThrumError:
        await console.save(f".thrum/identities/{identity.name}.json", before)
        raise


async def _lay_out_context(console: Console, agent_id: str, role: str, own_words: str | None = None) -> None:
    """Make the files that an agent keeps its context in, where they are missing; `own_words` follow the preamble of everybody.

    The agent is registered by now, so what fails is a warning.
    """
    try:
        context, preamble, _ = context_files(agent_id)
        if not await console.load(context):
            await console.save(CONTEXT_FOLDER + context, b"")
        if own_words is not None:
            await console.save(CONTEXT_FOLDER + preamble, f"{default_preamble(agent_id, role)}\n---\n\n{own_words}".encode())
        elif not await _preamble_of(console, agent_id):
            await console.save(CONTEXT_FOLDER + preamble, default_preamble(agent_id, role).encode())
    except ThrumError as error:
        await console.write("E", f"Warning: {plain(str(error))}\n")


async def _save_identity(console: Console, identity: Identity, repo_id: str, **changes) -> None:
    data = render_identity(identity, stamp_of(console.world.now_ns()), repo_id=repo_id, worktree=console.worktree,
                           **changes)
    await console.save(f".thrum/identities/{identity.name}.json", data)


def _who_text(who: dict, console: Console) -> str:
    """The agent summary: who somebody is, in a block."""
    age = f" ({console.ago(who['session_start'])})" if "session_start" in who else ""       # without the daemon nobody knows
    session = who["session_id"] + age if who.get("session_id") \
        else "none (use 'thrum session start' to begin)"
    lines = [("Agent ID:", one_line(who["agent_id"])), ("Role:", "@" + one_line(who["role"])), ("Module:", one_line(who["module"])),
             ("Display:", one_line(who.get("display", ""))), ("Branch:", one_line(who.get("branch", ""))),
             ("Intent:", one_line(who.get("intent", ""))), ("Session:", session), ("Worktree:", one_line(who.get("worktree", ""))),
             ("Identity:", one_line(who.get("identity_file", "")))]
    return "".join(f"{label:<10} {value}\n" for label, value in lines if value)


async def whoami(console: Console, args: Args) -> int:
    identity = choose_identity(console.identities, console.environ, console.worktree)
    if not identity.file:
        raise NoIdentity(f"no agent identities registered in this worktree; {REGISTER_HINT}")
    data = identity.data
    summary = {"agent_id": identity.agent_id(), "role": identity.role, "module": identity.module,
               **compact(display=identity.display, branch=data.get("branch"), worktree=data.get("worktree"),
                         intent=data.get("intent"), repo_id=data.get("repo_id"), session_id=data.get("session_id"),
                         identity_file=f".thrum/identities/{identity.file}", updated_at=data.get("updated_at")), "source": "file"}
    try:
        live = await console.call("agent.whoami", caller_agent_id=summary["agent_id"])
        summary.pop("session_id", None)
        summary.update(compact(**{k: live.get(k) for k in ("session_id", "session_start", "intent", "branch")}), source="daemon")
    except Unreachable:
        pass                    # the file says who this is; only the session is not certain
    await console.answer(summary, _who_text(summary, console))
    return 0


def _caller_or_nobody(console: Console) -> str:
    """The caller's agent id, "" where nobody has registered; an identity that cannot be used is an error all the same."""
    try:
        return console.identity().agent_id()
    except NoIdentity:
        if console.identities:
            raise
        return ""


async def _own_claims(console: Console, me: str) -> list:
    """The paths that an agent has claimed."""
    return [claim["path"] for claim in (await console.call("claim.list", agent_id=me))["claims"]]


async def _standing(console: Console) -> dict:
    """How the daemon is, and of the caller, if there is one: who, at what work, with how much mail."""
    report = {"health": await console.call("health")}
    me = _caller_or_nobody(console)
    if me:
        report["agent"] = await console.call("agent.whoami", caller_agent_id=me)
        work = (await console.call("agent.listContext", agent_id=me, fresh=True))["contexts"]
        if work:
            report["work_context"] = work[0]
        counts = await console.call("message.list", for_agent=me, caller_agent_id=me, page_size=1)
        report["inbox"] = {"total": counts["total"], "unread": counts["unread"], **compact(overdue=counts.get("overdue"))}
        report.update(compact(claims=await _own_claims(console, me)))
    return {**report, **compact(websocket_port=report["health"].get("ws_port"))}


def _standing_text(report: dict, console: Console, nobody: str) -> str:
    """The agent summary and the task; `nobody` stands for an agent that is not registered."""
    agent = report.get("agent")
    if not agent:
        return nobody
    if not agent["role"]:
        return f"Agent:     {handle(agent['agent_id'])} is not registered (use 'thrum quickstart')\n"
    task, claims = report.get("work_context", {}).get("current_task"), report.get("claims")
    return _who_text(agent, console) + (f"Task:      {one_line(task)}\n" if task else "") \
        + (f"Claims:    {one_line(', '.join(claims))}\n" if claims else "")


def _sync_text(health: dict) -> str:
    return "local (not shared yet)" if health["sync_state"] == "ok" else one_line(health["sync_state"])


async def status(console: Console, args: Args) -> int:
    report = await _standing(console)
    state, work, inbox = report["health"], report.get("work_context", {}), report.get("inbox")
    text = _standing_text(report, console, "Agent:     not registered (use 'thrum quickstart')\n")
    if "git_updated_at" in work:
        text += f"Commits:   {len(work.get('unmerged_commits', []))} ahead\n" \
                f"Files:     {len(work.get('changed_files', []))} changed, {len(work.get('uncommitted_files', []))} uncommitted\n"
    saved = await _saved_context(console, report["agent"]["agent_id"]) if inbox else None
    if saved:
        report["context"] = saved
        text += f"Context:   {saved['size']} bytes (updated {console.ago(saved['updated_at'])})\n"
    if inbox:
        text += f"Inbox:     {inbox['total']} messages ({inbox['unread']} unread)\n"
        text += f"Overdue:   {inbox['overdue']} of the messages that you sent\n" if "overdue" in inbox else ""
    text += f"Sync:      {_sync_text(state)}\n"
    text += f"Daemon:    running ({span(state['uptime_ms'] / 1000)} uptime, v{state['version']}), {state['agents']} agents, " \
            f"{state['messages']} messages\n"
    if state["bad_lines"]:
        text += f"Warning:   {state['bad_lines']} damaged lines were set aside in .thrum/var/bad-lines.jsonl\n"
    await console.answer(report, text)
    return 0


TEAM_ROWS = 10                  # agents that a view lists before it says how many more there are


def _team_rows(console: Console, rows: list) -> str:
    """Lines of a table, the last column cut to the screen, and how many were left out."""
    more = f"  … and {len(rows) - TEAM_ROWS} more ('{console.program} team' shows all)\n" if len(rows) > TEAM_ROWS else ""
    rows = rows[:TEAM_ROWS]
    left = console.width - sum(max(len(row[i]) for row in rows) + 2 for i in range(len(rows[0]) - 1)) if rows else 0
    return (rows_of([[*row[:-1], one_line(row[-1], max(left, 20))] for row in rows]) if rows else "") + more


async def overview(console: Console, args: Args) -> int:
    report = await _standing(console)
    me = report.get("agent", {}).get("agent_id")
    others = [work for work in (await console.call("agent.listContext"))["contexts"] if work["agent_id"] != me]
    report["team"] = others
    text = _standing_text(report, console, "Not registered (use 'thrum quickstart' or 'thrum agent register')\n")
    work, inbox = report.get("work_context", {}), report.get("inbox")
    if "git_updated_at" in work:
        text += f"Branch info: {len(work.get('unmerged_commits', []))} commits, {len(_files_of(work))} files\n"
    conflicts = next((member["conflicts"] for member in (await console.call("team.list"))["members"] if member["agent_id"] == me), [])
    if conflicts:
        report["conflicts"] = conflicts
        text += "".join(f"Conflict: {_conflict_line(pair, console)}\n" for pair in conflicts[:TEAM_FILES])
    text += "\nTeam:\n" if others else "\nTeam: nobody else is active\n"
    text += _team_rows(console, [[f"  ● {handle(work['agent_id'])}", one_line(work.get("branch", ""), 30), _age_of(work, console),
                                 one_line(work.get("intent", ""))] for work in others])
    if inbox:
        text += f"\nInbox: {_inbox_text(inbox)}\n"
    await console.answer(report, text + f"Sync: {_sync_text(report['health'])}\n")
    return 0


def _inbox_text(inbox: dict) -> str:
    if inbox["unread"]:
        return f"{inbox['unread']} unread ({inbox['total']} total)"
    return f"{inbox['total']} messages (all read)" if inbox["total"] else "empty"


def _files_of(work: dict) -> list:
    """The files that somebody has changed, committed or not."""
    return sorted({*work.get("changed_files", []), *work.get("uncommitted_files", [])})


def _age_of(work: dict, console: Console) -> str:
    """When a work context last changed."""
    stamps = [work[field] for field in ("git_updated_at", "intent_updated_at", "task_updated_at") if field in work]
    return console.ago(max(stamps)) if stamps else "-"


def _by_agent(found: dict) -> dict:
    """The newest work context of each agent that has one."""
    works = {}
    for work in found["contexts"]:
        works.setdefault(work["agent_id"], work)
    return works


TEAM_FILES = 5                  # changed files of an agent that `team` names
TEAM_BRANCH = 30                # characters of a branch in a line that says more


async def team(console: Console, args: Args) -> int:
    """Everybody's work in view: a block for each agent."""
    found = await console.call("team.list", include_offline=args.all or None)
    nobody = "No agents are registered.\n" if args.all else "No active agents. Use --all to include offline agents.\n"
    text = "\n".join([_teammate_text(member, console) for member in found["members"]]) or nobody
    shared = found.get("shared_messages")
    if shared:
        text += f"\n--- Shared ---\nBroadcasts: {shared['broadcast_total']} messages\n" + "".join(
            f"@{one_line(group['name'])}: {group['total']} messages\n" for group in shared["groups"])
    await console.answer(found, text)
    return 0


def _teammate_text(member: dict, console: Console) -> str:
    active, left = member["status"] == "active", console.width - 12
    seen = console.ago(member["last_seen"]) if "last_seen" in member else "never"
    head = f"{'●' if active else '○'} {console.bold(handle(member['agent_id']))} ({one_line(member['module'])})"
    branch = f" [{one_line(member['branch'], TEAM_BRANCH)}]" if "branch" in member else ""
    head += (f" — {one_line(member['intent'], max(left - len(head) - len(branch), 20))}" if "intent" in member else "") + branch
    session = f"{member['session_id'][:16]}... (active {seen})" if active else f"offline (last seen {seen})"
    files, ahead = member["file_changes"], f"{member['unmerged_commits']} commit{'s' * (member['unmerged_commits'] != 1)} ahead"
    lines = [("Worktree:", one_line(member.get("worktree", "")) + " (gone)" * ("worktree_gone" in member)),
             ("Host:", one_line(member.get("hostname", ""))), ("Session:", session),
             ("Intent:", one_line(member.get("intent", ""), left)), ("Task:", one_line(member.get("current_task", ""), left)),
             ("Inbox:", f"{member['inbox_unread']} unread / {member['inbox_total']} total"),
             ("Branch:", f"{one_line(member['branch'])} ({ahead})" if "branch" in member else
              f"(detached, {ahead})" if "git_updated_at" in member else "")]
    text = head + "\n" + "".join(f"  {label:<9} {value}\n" for label, value in lines if value)
    if member["claims"]:
        text += f"  Claims:   {one_line(', '.join(member['claims']), left)}\n"
    text += "".join(f"  Conflict: {_conflict_line(pair, console)}\n" for pair in member["conflicts"][:TEAM_FILES])
    if "git_updated_at" in member and not files:
        text += "  Files:    (no changes)\n"
    newest = sorted(files, key=lambda change: change["last_modified"], reverse=True)[:TEAM_FILES]
    table = [[path_shown(change["path"], max(console.width - 34, 20)), console.ago(change["last_modified"]),
              f"+{change['additions']} -{change['deletions']}"] for change in newest]
    for n, line in enumerate(rows_of(table).splitlines() if table else ()):
        text += f"  {'' if n else 'Files:':<9} {line}\n"
    return text + (f"            … and {len(files) - TEAM_FILES} more\n" if len(files) > TEAM_FILES else "")


WHO_HAS_FILES = 10              # files of one agent that are named below a folder


def _conflict_line(pair: dict, console: Console) -> str:
    """With whom somebody's work would not merge, and where."""
    return console.bold(f"with {handle(pair['with'])}") + f": {one_line(', '.join(pair['files']), max(console.width - 40, 20))}"


async def who_has(console: Console, args: Args) -> int:
    path = repo_path(args.file, console.top, console.cwd)
    found = await console.call("work.whoHas", file=path or ".")
    shown, lines = path_shown(path) or "this repository", []
    for work in found["contexts"]:
        changes, who = work["file_changes"], handle(work["agent_id"])
        lines += [f"{who} {_change_text(change, work, console)}" for change in changes[:WHO_HAS_FILES]]
        if len(changes) > WHO_HAS_FILES:
            lines.append(f"{who} has changed {len(changes) - WHO_HAS_FILES} more files in {shown}")
    lines = lines or [f"No agents are currently editing {shown}"]
    for claim in found["claims"]:
        lines.append(f"{handle(claim['agent_id'])} has claimed {path_shown(claim['path'])}{' (shared)' if claim['shared'] else ''} until "
                     f"{_ends_text(claim, console)}" + (f": {one_line(claim['note'])}" if claim["note"] else ""))
    for left in found["unattended"]:
        who = f"of {', '.join(map(handle, left['agents']))}, who has no session" if left["agents"] else "where nobody has a session"
        files = path_shown(", ".join([change["path"] for change in left["file_changes"]]))
        lines.append(f"Uncommitted in {path_shown(left['worktree_path'])}, {who}: {files}")
    await console.answer(found, "\n".join(lines) + "\n")
    return 0


def _change_text(change: dict, work: dict, console: Console) -> str:
    """What somebody has done to a file, and how that is known."""
    editing = change["path"] in work["uncommitted_files"]
    verb = ("is editing" if work["live"] else "was editing") if editing else "has changed"
    facts = f"+{change['additions']} -{change['deletions']}, {change['status']}{'' if editing else ' and committed'} " \
            f"{console.ago(change['last_modified'])}"
    if change.get("renamed_from"):
        facts += f", from {path_shown(change['renamed_from'])}"
    known = "" if work["live"] else f", as of {console.ago(work.get('git_updated_at', ''))}"
    known += f" on {one_line(work['hostname'])}" if "hostname" in work else ""
    return f"{verb} {path_shown(change['path'])} ({facts}), branch: {one_line(work.get('branch', ''), TEAM_BRANCH) or '(detached)'}{known}"


async def prime(console: Console, args: Args) -> int:
    """Everything that an agent needs when it begins, or when its context was lost."""
    health = await console.call("health")
    me = _caller_or_nobody(console)
    report = {"repo_path": console.top, "sync_state": {
        "daemon_status": health["status"], **{key: health[key] for key in ("uptime_ms", "sync_state", "version")}}}
    contexts = _by_agent(await console.call("agent.listContext"))
    agents = (await console.call("agent.list"))["agents"]
    report["agents"] = {"total": len(agents), "active": sum(agent["agent_id"] in contexts for agent in agents), "list": agents}
    if me:
        who = report["identity"] = await console.call("agent.whoami", caller_agent_id=me)
        if "session_id" in who:
            report["session"] = {"session_id": who["session_id"],
                                 **compact(started_at=who.get("session_start"), intent=who.get("intent"))}
        found = await console.call("message.list", for_agent=me, caller_agent_id=me, exclude_self=True, page_size=PRIME_MESSAGES)
        counts = {"unread": found["unread"], "total": found["total"]}
        if found["unread"]:
            found = await console.call("message.list", caller_agent_id=me, exclude_self=True, unread=True, page_size=PRIME_MESSAGES)
        report["messages"] = {**counts, "recent": found["messages"]}
        report.update(compact(claims=await _own_claims(console, me)))
        saved = await _saved_context(console, me)
        if saved:
            report["context"] = saved
    try:
        report["work_context"] = await console.call("worktree.status", repo_path=console.top)
    except InvalidParams as error:
        report["work_context"] = {"unmerged_commits": 0, "error": str(error)}
    await console.answer(report, _prime_text(report, contexts, console))
    return 0


PRIME_MESSAGES = 5              # of the newest messages, a line each
PRIME_FILES = 8                 # uncommitted files that are named


def _prime_text(report: dict, contexts: dict, console: Console) -> str:
    """What `prime` says: less than a screen and a half, for an agent that knows nothing yet."""
    thrum, who, session = console.program, report.get("identity"), report.get("session")
    if who and who["role"]:
        text = f"Agent: {handle(who['agent_id'])} ({one_line(who['role'])})\nModule: {one_line(who['module'])}\n"
    else:
        text = f"Agent: not registered\n  Register: {thrum} quickstart --name NAME --role ROLE --module MODULE\n"
    if who:
        text += f"Session: {session['session_id']} ({console.ago(session['started_at'])})\n" if session else \
            f"Session: none (begin one: {thrum} session start)\n"
    if session and "intent" in session:
        text += f"Intent: {one_line(session['intent'])}\n"
    task = contexts.get(who["agent_id"], {}).get("current_task") if who else ""
    text += f"Task: {one_line(task)}\n" if task else ""
    text += f"Your claims: {one_line(', '.join(report['claims']))}\n" if "claims" in report else ""
    if "context" in report:
        text += f"Saved context: {report['context']['size']} bytes ({console.ago(report['context']['updated_at'])}); " \
                f"read it now: {thrum} context show\n"

    team = report["agents"]
    rows = [[f"  {'●' if agent['agent_id'] in contexts else '○'} {handle(agent['agent_id'])}", one_line(agent["role"], 20),
             one_line(agent["module"], 20), one_line(contexts.get(agent["agent_id"], {}).get("intent", ""))]
            for agent in sorted(team["list"], key=lambda agent: agent["agent_id"] not in contexts)
            if not who or agent["agent_id"] != who["agent_id"]]
    text += f"\nTeam: {team['total']} agents ({team['active']} active)\n" + _team_rows(console, rows)

    messages = report.get("messages")
    if messages:
        text += f"\nInbox: {_inbox_text(messages)}" + (f" — read them: {thrum} inbox\n" if messages["unread"] else "\n")
        text += "".join(f"  {handle(m['agent_id'])}: {one_line(m['body']['content'], 60)}  [{m['message_id']}]\n"
                        for m in messages["recent"])

    work = report["work_context"]
    if "error" in work:
        text += f"\nGit: {one_line(work['error'])}\n"
    else:
        files, total = work["uncommitted_files"], work["uncommitted_total"]
        text += f"\nBranch: {one_line(work['branch'])}\n"
        if work["unmerged_commits"]:
            text += f"Unmerged commits: {work['unmerged_commits']}\n"
        text += f"Uncommitted files: {total}\n" + "".join(f"  {one_line(file)}\n" for file in files[:PRIME_FILES])
        text += f"  … and {total - PRIME_FILES} more\n" if total > PRIME_FILES else ""

    state = report["sync_state"]
    text += f"Daemon: {state['daemon_status']} (v{state['version']}), up {span(state['uptime_ms'] / 1000)}\nSync: {_sync_text(state)}\n"
    return text + "\nCommands:\n" + rows_of([
        [f'  {thrum} send "…" --to @NAME', "write to an agent, a role or a group"],
        [f"  {thrum} inbox --unread", "what you have not read"],
        [f'  {thrum} reply MSG_ID "…"', "answer, in the same thread"],
        [f"  {thrum} message read --all", "mark everything as read"],
        [f"  {thrum} sent", "what you sent, and who has read it"],
        [f"  {thrum} wait --timeout 5m", "wait for the next message"],
        [f"  {thrum} status", "you, your inbox and the daemon"],
        [f"  {thrum} team", "who is here, and at what"],
        [f"  {thrum} who-has FILE", "who is changing a file"],
        [f"  {thrum} claim FILE", "say that you are going to; release gives it back"],
        [f"  {thrum} context save --file F", "keep what you know for later"],
        [f"  {thrum} <cmd> --help", "more about a command"]])


async def prime_without_daemon(console: Console, problem: str) -> int:
    """What `prime` says where nobody answers: a hook that calls it at each start must not fail."""
    thrum = console.program
    text = "Thrum not initialized (run: thrum init && thrum daemon start)\n" + wrapped(problem, console.width, "  ") + "\n\n" + rows_of([
        [f"  {thrum} init", "set thrum up in this repository"],
        [f"  {thrum} daemon start", "start the daemon"],
        [f"  {thrum} quickstart --name NAME --role ROLE --module MODULE", "join the team"]])
    await console.answer({"error": problem, "repo_path": console.top, "sync_state": {"daemon_status": "unreachable"}}, text)
    return 0


async def ping(console: Console, args: Args) -> int:
    wanted = args.agent.lstrip("@")
    agents = await console.call("agent.list")
    contexts = await console.call("agent.listContext")
    active = _by_agent(contexts)
    found = [agent for agent in agents["agents"] if wanted and wanted in (agent["agent_id"], agent["display"])]
    by_role = [] if found else [agent for agent in agents["agents"] if wanted and agent["role"] == wanted]
    text = ""
    for agent in sorted(found or by_role, key=lambda agent: agent["agent_id"] not in active):
        work, seen = active.get(agent["agent_id"]), agent.get("last_seen_at")
        name = f" ({handle(agent['agent_id'])})" if by_role or agent["agent_id"] != wanted else ""
        age = console.ago(seen) if seen else "never"
        text += f"{handle(wanted)}: " + (f"active, last heartbeat {age}" if work else f"offline (last seen {age})") + name + "\n"
        text += "".join(f"  {label:<8}{one_line(work[field], console.width - 10)}\n" for label, field in (
            ("Intent:", "intent"), ("Task:", "current_task"), ("Branch:", "branch")) if work and field in work)
    await console.answer({"agents": agents, "contexts": contexts},
                         text or f"@{one_line(wanted)}: not found (no agent registered with this name or role)\n")
    return 0


async def conflicts_command(console: Console, args: Args) -> int:
    found = await console.call("conflict.list", agents=args.agent, all=args.all)
    text, pairs, base = "", found["pairs"], found["base"]
    for row in pairs + base:
        sides = [" ".join(map(handle, ids)) or one_line(os.path.basename(top)) for ids, top in zip(row["agents"], row["worktree_paths"])]
        sides += [one_line(row.get("base_branch", "its base"))] * (len(sides) == 1)
        if not row["clean"]:
            text += console.bold(" ✗ ".join(sides)) + "\n"
            text += rows_of([["  " + one_line(file["path"]), one_line(conflict_text(file, sides), ERROR_MAX)]
                             for file in row["files"]]) + "\n"
    for row in found["skipped"]:
        text += f"Left out of {one_line(row['worktree_path'])}, as too large: {one_line(', '.join(row['paths']))}\n"
    for row in found["errors"]:
        text += f"Not compared: {one_line(row['worktree_path'])}: {one_line(row['error'], ERROR_MAX)}\n"
    bases, ends = {row.get("base_branch", "their base") for row in base}, []
    their_base = one_line(bases.pop()) if len(bases) == 1 else "their base"
    for rows, what, other in ((pairs, "pair", ""), (base, "worktree", f" with {their_base}")):
        bad, count = sum(not row["clean"] for row in rows), len(rows)
        if bad:
            ends.append((f"{bad} of {count} {what}s" if count > 1 else f"The {what}") + f" would not merge{other}.")
        elif rows:
            ends.append((f"All {count} {what}s merge" if count > 1 else f"The {what} merges") + f"{other}.")
    text += " ".join(ends) + "\n" * bool(ends)
    await console.answer(found, text or "Nobody has an open session in a worktree here; --all compares all worktrees.\n")
    return 0


# ---- what an agent keeps for later
#
# The client reads and writes these files: an agent may live in a sandbox that the daemon does not see into.

CONTEXT_FOLDER = ".thrum/context/"
PREAMBLE_MAX = CONTEXT_MAX - 8_192      # bytes of somebody's own words: the default preamble stands before them


def _context_owner(console: Console, args: Args) -> str:
    """Whose context a command is about."""
    agent_id = console.me() if args.agent is None else args.agent.lstrip("@")
    context_files(agent_id)     # refuses what is not an id
    return agent_id


async def _preamble_of(console: Console, agent_id: str) -> bytes:
    """An agent's preamble, also under its old name; b"" without one."""
    for file in context_files(agent_id)[1:]:
        found = await console.load(file)
        if found:
            return found[0]
    return b""


async def _saved_context(console: Console, agent_id: str) -> dict | None:
    """What is to be known of an agent's saved context; None without one."""
    try:
        found = await console.load(context_files(agent_id)[0])
    except ThrumError:          # the view shows the rest; 'context show' says what is wrong
        return None
    return {"has_context": True, "size": len(found[0]), "updated_at": stamp_of(found[1])} if found and found[0] else None


async def _role_of(console: Console, agent_id: str) -> str:
    """The role of an agent: as its identity file here says, else as the daemon knows it."""
    for file, content in console.identities:
        if parse_identity(file, content).agent_id() == agent_id:
            return parse_identity(file, content).role
    try:
        return (await console.call("agent.whoami", caller_agent_id=agent_id))["role"]
    except Unreachable:
        return ""


async def context_save_command(console: Console, args: Args) -> int:
    agent_id = _context_owner(console, args)
    given = await _given(console, *(("-", "read stdin") if args.file is None else (args.file, "read context file")))
    data = check_text(given, "the context", CONTEXT_MAX).encode()
    if not data:                # of a command in a pipe that failed, most likely
        raise Usage("there is nothing to save; 'thrum context clear' removes what was saved before")
    await console.save(CONTEXT_FOLDER + context_files(agent_id)[0], data)
    if not await _preamble_of(console, agent_id):
        await console.save(CONTEXT_FOLDER + context_files(agent_id)[1],
                           default_preamble(agent_id, await _role_of(console, agent_id)).encode())
    message = f"Context saved for {agent_id} ({len(data)} bytes)"
    await console.answer({"agent_name": agent_id, "message": message, "size": len(data),
                          "saved_at": stamp_of(console.world.now_ns())}, message)
    return 0


async def context_show_command(console: Console, args: Args) -> int:
    agent_id = _context_owner(console, args)
    file, preamble_file, _ = context_files(agent_id)
    data, changed_ns = await console.load(file) or (b"", 0)
    preamble = b"" if args.no_preamble else await _preamble_of(console, agent_id)
    content, before, at = data.decode(errors="replace"), preamble.decode(errors="replace"), stamp_of(changed_ns)
    if args.json:
        await console.answer({"agent_name": agent_id, "content": content or None, "has_context": bool(data),
                              "has_preamble": bool(preamble), **compact(preamble=before),
                              **({"size": len(data), "updated_at": at} if data else {})}, "")
    elif not data and not preamble:
        await console.out(f"No context saved for {agent_id}\n")
    elif args.raw:
        if preamble:
            content = f"<!-- preamble: {CONTEXT_FOLDER}{preamble_file} -->\n{_ended(before)}<!-- end preamble -->\n\n{content}"
        # To a file or a pipe exactly what was saved, also what a terminal must not be sent.
        await (console.out if "1" in console.terminals else lambda text: console.write("O", text))(content)
    else:
        head = f"# Context for {agent_id}" + (f" ({len(data)} bytes, updated {when(at)})" if data else "")
        await console.out("\n".join([head + "\n", *([_ended(before)] if before else []), *([_ended(content)] if content else [])]))
    return 0


def _ended(text: str) -> str:
    """`text` with a line end."""
    return text if text.endswith("\n") else text + "\n"


async def context_clear_command(console: Console, args: Args) -> int:
    agent_id = _context_owner(console, args)
    await console.save(CONTEXT_FOLDER + context_files(agent_id)[0], None)
    message = f"Context cleared for {agent_id}"
    await console.answer({"agent_name": agent_id, "message": message, "cleared": True}, message)
    return 0


async def context_preamble_command(console: Console, args: Args) -> int:
    agent_id = _context_owner(console, args)
    if not args.init and args.file is None:
        text = (await _preamble_of(console, agent_id)).decode(errors="replace")
        await console.answer({"agent_name": agent_id, "content": text or None, "has_preamble": bool(text)},
                             text or f"No preamble for {agent_id} (use --init to create default)")
        return 0
    given = default_preamble(agent_id, await _role_of(console, agent_id)) if args.init else \
        await _given(console, args.file, "read preamble file")
    data = check_text(given, "the preamble", CONTEXT_MAX).encode()
    if not data:
        raise Usage(f"{args.file} is empty; --init writes the default preamble")
    await console.save(CONTEXT_FOLDER + context_files(agent_id)[1], data)
    message = f"Preamble saved for {agent_id} ({len(data)} bytes)"
    await console.answer({"agent_name": agent_id, "message": message, "size": len(data),
                          "saved_at": stamp_of(console.world.now_ns())}, message)
    return 0


# ---- messages

SENT_NAMES, SENT_STATES = 8, 20         # recipients that are named after a send, and in a list: a line, and a few


async def send(console: Console, args: Args) -> int:
    if args.broadcast and (args.to or args.everyone):
        raise Usage("--broadcast and --to are mutually exclusive")
    if args.to == "":           # most likely a variable that is not set: this must not go to everyone
        raise Usage("--to needs a name; leave it out to write to everyone")
    scopes = [_pair_or_usage(text, "scope") for text in args.scope]
    refs = [_pair_or_usage(text, "ref") for text in args.ref]
    structured = None
    if args.structured:
        try:
            structured = decode_object(args.structured)
        except ValueError as error:
            raise Usage(f"invalid structured data: {error}") from None
    to = "@everyone" if args.everyone or args.broadcast else args.to
    mentions = ["@" + name.lstrip("@") for name in ([to] if to else []) + args.mention]
    content = await console.text(args.message, args.body_file)
    sent_ = await console.call("message.send", content=content, format=args.format, structured=structured, scopes=scopes,
                               refs=refs, mentions=mentions, thread_id=args.thread, if_last=args.if_last, caller_agent_id=console.me(),
                               acting_as=args.acting_as and args.acting_as.lstrip("@"), disclose=args.disclose or None,
                               send_key=args.key or console.key)
    return await _report_send(console, sent_, "Message sent")


def _pair_or_usage(text: str, what: str) -> dict:
    try:
        return parse_pair(text, what)
    except InvalidParams as error:
        raise Usage(f"invalid {what}: {error}") from None


async def _report_send(console: Console, sent_: dict, done: str) -> int:
    if not console.args.json:
        for warning in sent_.get("warnings", []):
            await console.note(f"  warning: {plain(warning)}")
    names = [handle(state["agent_id"]) for state in sent_.get("recipients", [])]
    more = f" and {len(names) - SENT_NAMES} more" if len(names) > SENT_NAMES else ""
    text = f"✓ {done}: {plain(sent_['message_id'])}\n"
    if "thread_id" in sent_:
        text += f"  Thread: {sent_['thread_id']}\n"
    text += "  To: " + (", ".join(names[:SENT_NAMES]) + more if names else "nobody") + "\n"
    await console.answer(sent_, text)
    return 0


async def reply(console: Console, args: Args) -> int:
    me, content = console.me(), await console.text(args.text, args.body_file)
    try:
        parent = (await console.call("message.get", message_id=args.msg_id))["message"]
    except ThrumError as error:
        if isinstance(error, Unreachable):
            raise
        raise ThrumError(f"failed to get parent message: {error}") from None
    mentions, groups = audience_of(pairs_of(parent["refs"]), pairs_of(parent["scopes"]))
    names = [name for name in mentions if name != me]
    author = parent["author"]["agent_id"]
    if author != me and author not in names:
        names.append(author)
    known = {agent["agent_id"] for agent in (await console.call("agent.list"))["agents"]}
    gone = [name for name in names if name not in known and "user:" + name not in known]
    if author in gone:
        await console.note(f"  warning: {handle(author)} is not registered any more")
    names = [name for name in names if name not in gone] + groups
    if gone and not names:      # without names it would go to everyone
        raise ThrumError(f"nobody is left to answer: {', '.join(map(handle, gone))} is not registered any more")
    sent_ = await console.call("message.send", content=content, format=args.format, reply_to=parent["message_id"],
                               if_last=args.if_last, mentions=["@" + name for name in names], caller_agent_id=me, send_key=console.key)
    try:
        await console.call("message.markRead", message_ids=[parent["message_id"]], caller_agent_id=me)
    except ThrumError:
        pass                    # the reply was sent, and that is what was asked for
    return await _report_send(console, sent_, "Reply sent")


def _pairs_text(pairs: list) -> str:
    """Scopes, references or audiences on one line."""
    return ", ".join(f"{one_line(pair['type'])}:{one_line(pair['value'])}" for pair in pairs)


def _via_text(message: dict) -> str:
    """The person behind a message, when it was written in an agent's name and says so."""
    return f" (by {handle(message['authored_by'])})" if message.get("authored_by") else ""


def _message_text(message: dict, console: Console, own: bool = False) -> str:
    """A message in a list: one line about it, then its text."""
    mark = "○" if message["is_read"] or own else console.bold("●")
    facts = [console.bold(handle(message["agent_id"])) + _via_text(message), console.ago(message["created_at"])]
    if message.get("updated_at"):
        facts.append("(edited)")
    if message.get("reply_to"):
        facts.append("↳ reply to " + plain(message["reply_to"]))
    head = f"{mark} {plain(message['message_id'])}  {'  '.join(facts)}\n"
    return head + wrapped(message["body"]["content"], console.width, "  ") + "\n"


async def inbox(console: Console, args: Args) -> int:
    page = max(args.page, 1)
    try:
        scope = parse_pair(args.scope, "scope") if args.scope else None
    except InvalidParams as error:
        raise Usage(str(error)) from None
    me = console.me()
    base = {"caller_agent_id": me, "for_agent": None if args.all else me, "exclude_self": True, "unread": args.unread or None}
    found = await console.call(
        "message.list", **base, mentions=args.mentions or None, scope=scope, author_id=(args.from_ or "").lstrip("@") or None,
        sort_order="asc" if args.oldest else None, page=page, page_size=args.limit if args.limit is not None else args.page_size)
    filters = [f"scope={args.scope}"] * bool(args.scope) + [f"from={args.from_}"] * bool(args.from_) + ["mentions"] * args.mentions
    if filters:
        whole = await console.call("message.list", **base, page_size=1)
        found["hidden"] = whole["total"] - found["total"]
    messages = found["messages"]
    text = "\n".join(_message_text(message, console) for message in messages)
    if messages:
        first = (page - 1) * found["page_size"] + 1
        text += f"\nShowing {first}-{first + len(messages) - 1} of {found['total']} messages ({found['unread']} unread)"
        text += "" if args.all else f" (filtered for {handle(me)})"
        text += f"; {found['hidden']} more hidden by the filter {', '.join(filters)}\n" if found.get("hidden") else "\n"
    elif filters and not found["total"]:
        flags = [f"--scope {args.scope}"] * bool(args.scope) + [f"--from {args.from_}"] * bool(args.from_) + ["--mentions"] * args.mentions
        text = f"No messages matching filter {plain(' '.join(flags))}\n" \
               f"Showing 0 of {whole['total']} total messages (filter: {plain(', '.join(filters))})\n"
    elif found["total"]:
        text = f"No messages on page {page}; there are {found['total_pages']} pages.\n"
    else:
        text = "No messages in inbox.\n" if args.all else \
            f"No {'unread ' if args.unread else ''}messages for {handle(me)}.\n"
    if found.get("overdue"):
        text += f"{found['overdue']} of the messages that you sent wait too long: {console.program} sent --overdue\n"
    await console.answer(found, text)
    unread = [message["message_id"] for message in messages if not message["is_read"]]
    if unread:
        await console.end(0)    # mail that never left the process stays unread
        if args.unread:
            await console.call("message.markShown", message_ids=unread, caller_agent_id=me)
        else:
            await console.call("message.markRead", message_ids=unread, caller_agent_id=me)
    return 0


async def sent(console: Console, args: Args) -> int:
    found = await console.call("message.outbox", caller_agent_id=console.me(), to=args.to, unread=args.unread or None,
                               overdue=args.overdue or None, page=args.page,
                               page_size=args.limit if args.limit is not None else args.page_size)
    blocks = []
    for message in found["messages"]:
        states = message.get("recipients", [])
        to = _pairs_text(message["audiences"])
        deleted = "  DELETED" if message["deleted"] else ""
        block = f"{console.bold(plain(message['message_id']))}{_via_text(message)}  {console.ago(message['created_at'])}  to {to}  " \
                f"{message['read_count']}/{len(states)} read{deleted}\n  {one_line(message['body']['content'], console.width - 2)}\n"
        if states:
            block += wrapped("Recipients: " + ", ".join(_state_text(state) for state in states[:SENT_STATES]), console.width, "  ")
            block += f" and {len(states) - SENT_STATES} more\n" if len(states) > SENT_STATES else "\n"
        blocks.append(block)
    text = "\n".join(blocks)
    if blocks:
        first = (found["page"] - 1) * found["page_size"] + 1
        text += f"\nShowing {first}-{first + len(blocks) - 1} of {found['total']} sent messages\n"
    nothing = f"No messages on page {found['page']}; there are {found['total_pages']} pages.\n" if found["total"] else \
        "No overdue messages.\n" if args.overdue else "No sent messages match.\n" if args.to or args.unread else "No sent messages.\n"
    await console.answer(found, text or nothing)
    return 0


def _state_text(state: dict) -> str:
    done = next(name for name, field in DELIVERY_STATES if field in state)
    trouble = ", gone" if state.get("gone") else ", overdue" if state.get("overdue") else ""
    return f"{handle(state['agent_id'])}({done}{trouble})"


def _detail_text(message: dict) -> str:
    """One message with everything about it."""
    def pairs(name):
        return _pairs_text(message.get(name) or [])
    lines = [("Message:", message["message_id"]), ("From:", handle(message["author"]["agent_id"]) + _via_text(message)),
             ("Time:", when(message["created_at"])), ("Thread:", message.get("thread_id", "")), ("To:", pairs("audiences")),
             ("Scopes:", pairs("scopes")), ("Refs:", pairs("refs")), ("Edited:", when(message.get("updated_at", "")))]
    text = "".join(f"{label:<11} {plain(value)}\n" for label, value in lines if value)
    if message.get("recipients"):
        text += "Recipients:\n" + "".join(f"  - {_state_text(state).replace('(', ' (')}\n" for state in message["recipients"])
    if message["deleted"]:
        reason = message["metadata"].get("delete_reason")
        text += "Status:     DELETED" + (f" ({plain(reason)})" if reason else "") + "\n"
    for number, version in enumerate(message.get("history", ())):
        by = f" by {handle(version['editor'])}" if version.get("editor") else ""
        text += f"\nVersion {number}, {when(version['at'])}{by}:\n{plain(version['body']['content'])}\n"
    return text if message.get("history") else text + "\n" + plain(message["body"]["content"]) + "\n"


async def message_get_command(console: Console, args: Args) -> int:
    found = await console.call("message.get", message_id=args.msg_id, history=args.history or None)
    await console.answer(found, _detail_text(found["message"]))
    try:
        me = console.identity().agent_id()
    except NoIdentity as error:
        await console.note(f"Warning: Could not mark as read (no identity): {error}")
        return 0
    if any(state["agent_id"] == me and "read_at" not in state for state in found["message"].get("recipients", [])):
        await console.end(0)
        await console.call("message.markRead", message_ids=[args.msg_id], caller_agent_id=me)
    return 0


async def sent_show(console: Console, args: Args) -> int:
    found = await console.call("message.get", message_id=args.msg_id)
    if found["message"]["author"]["agent_id"] != console.me():
        raise ThrumError(f"message {args.msg_id} was not authored by the current agent")
    await console.answer(found, _detail_text(found["message"]))
    return 0


async def message_edit_command(console: Console, args: Args) -> int:
    content = await console.text(args.text, args.body_file)
    done = await console.call("message.edit", message_id=args.msg_id, content=content, caller_agent_id=console.me())
    await console.answer(done, f"✓ Message edited: {done['message_id']} (version {done['version']})")
    return 0


async def message_delete_command(console: Console, args: Args) -> int:
    if not args.force:
        raise Usage("use --force to confirm deletion")
    try:
        me = console.identity().agent_id()
    except NoIdentity:
        me = None               # a local caller without a name may (decision 17)
    done = await console.call("message.delete", message_id=args.msg_id, reason=args.reason, caller_agent_id=me)
    await console.answer(done, f"✓ Message deleted: {done['message_id']}")
    return 0


async def message_read(console: Console, args: Args) -> int:
    if not args.msg_id and not args.all:
        raise Usage("requires at least 1 arg(s) or --all flag")
    done = await console.call("message.markRead", message_ids=args.msg_id or None, all=args.all or None, caller_agent_id=console.me())
    count = done["marked_count"]
    if args.all and not count:
        text = "No unread messages."
    else:
        text = f"✓ Marked {count} message{'' if count == 1 else 's'} as read"
        if args.all and done["remaining"]:
            text += f"\n{done['remaining']} unread messages remaining (run again to mark more)"
    await console.answer(done, text)
    return 0


WAIT_CALL_MS = 60_000           # one call; longer waits are several, so that a lost daemon is noticed
TIMED_OUT = "NO_MESSAGES_TIMEOUT — re-run thrum wait to continue listening"


async def wait(console: Console, args: Args) -> int:
    now = console.world.now_ns
    if args.timeout < 0:
        raise Usage("invalid timeout: it must not be negative")
    params = {"caller_agent_id": console.me(), "all": args.all or None, "unread": args.unread or None, "thread_id": args.thread,
              "from": args.from_, "mention_role": args.mention, "scope": _pair_or_usage(args.scope, "scope") if args.scope else None}
    if args.scope or args.mention:
        params["all"] = True    # what these name may be addressed to others
    deadline = now() + int(args.timeout * NS)
    if console.cursor:          # this wait began with another daemon: the same point, the same end
        began = json.loads(console.cursor)
        deadline = began.pop("deadline")
        params.update(began)
    else:
        if args.after_seq is not None:
            began = {"after_seq": args.after_seq}
        elif args.after is not None:
            began = {"after_seq": 0, "created_after": stamp_of(now() + int(args.after * NS))}
            if args.verbose:
                await console.note(f"waiting for messages after {began['created_after']}")
        elif args.unread:
            began = {}
        else:
            state = await console.call("health")
            began = {"after_seq": state["last_seq"], "epoch": state["epoch"]}
        params.update(began)
        await console.resume_at(json.dumps({**began, "deadline": deadline}))
    while True:
        left_ms = (deadline - now()) // 1_000_000
        found = await console.call("message.wait", timeout_ms=max(0, min(left_ms, WAIT_CALL_MS)), **params)
        if found["messages"]:
            break
        if left_ms <= WAIT_CALL_MS:
            if not args.json:
                await console.note(TIMED_OUT)
            return 1
    count = len(found["messages"]) + found["remaining"]
    text = "MESSAGES_RECEIVED\n" + "".join(
        f"  {handle(m['agent_id'])}{_via_text(m)}: {one_line(m['body']['content'])}  [{m['message_id']}]\n" for m in found["messages"])
    text += (f"  … and {found['remaining']} more\n" if found["remaining"] else "") + \
        f"Read with: {console.program} inbox --unread      Go on with: --after-seq {found['after_seq']}\n"
    await console.answer({
        "status": "received", "count": count, "after_seq": found["after_seq"], "epoch": found["epoch"],
        "action": "ACTION REQUIRED: You have unread messages. Run `thrum inbox --unread` to read them, answer them, and then "
                  "wait again.", "messages": found["messages"], "remaining": found["remaining"]}, text)
    await console.end(0)
    await console.call("message.markShown", message_ids=[m["message_id"] for m in found["messages"]], route="wait", pushed=True,
                       caller_agent_id=params["caller_agent_id"])
    return 0


async def search(console: Console, args: Args) -> int:
    since = args.since and stamp_of(_moment(console, args.since, "since"))
    found = await console.call("message.search", query=" ".join(args.query), **{"from": args.from_}, to=args.to, thread_id=args.thread,
                               scope=_pair_or_usage(args.scope, "scope") if args.scope else None, created_after=since, limit=args.limit)
    text = ""
    for message in found["messages"]:
        at, marked = 0, ""
        for start, end in message["hits"]:
            hit = message["snippet"][start:end]
            marked += message["snippet"][at:start] + (console.bold(hit) if console.coloured() else f"[{hit}]")
            at = end
        text += f"{plain(message['message_id'])}  {console.bold(handle(message['agent_id']))}{_via_text(message)}  " \
                f"{console.ago(message['created_at'])}\n  {' '.join((marked + message['snippet'][at:]).split())}\n"
    count = f"{found['total']}" if found["complete"] else f"more than {found['total'] - 1}"
    if found["messages"]:
        text += f"\nShowing {len(found['messages'])} of {count} message{'' if count == '1' else 's'}\n"
    await console.answer(found, text or f"No messages match {one_line(found['query'])!r}.\n")
    return 0


def _moment(console: Console, text: str, what: str) -> int:
    try:
        return parse_moment(text, console.world.now_ns())
    except ValueError as error:
        raise Usage(f"invalid --{what} value: {error}") from None


STATE_WORDS = {"delivered": "stored", "seen": "shown"}      # what the words of the protocol mean


async def trace(console: Console, args: Args) -> int:
    found = await console.call("message.trace", message_id=args.msg_id)
    to = _pairs_text(found["audiences"])
    text = f"{console.bold(found['message_id'])} from {handle(found['agent_id'])}{_via_text(found)} to {to}, " \
           f"{console.ago(found['created_at'])}{', DELETED' if found['deleted'] else ''}\n" \
           f"  {one_line(found['content'], console.width - 2)}\n\n"
    table = []
    for state in found["recipients"]:
        steps = sorted(((state[field], name) for name, field in reversed(DELIVERY_STATES) if field in state), key=lambda step: step[0])
        told = [f"{STATE_WORDS.get(name, name)} {when(at)[11 if at[:10] == found['created_at'][:10] else 0:]}"
                + (f" by {one_line(state['route'])}" if name == "pushed" else "") for at, name in steps]
        if state.get("gone"):
            told.append("GONE: it was deleted, and will not read this")
        elif state.get("overdue"):
            told.append("OVERDUE: it was here, and has not read this")
        elif "read_at" not in state and state.get("last_seen_at"):
            told.append(f"last seen {console.ago(state['last_seen_at'])}" + (f" on {one_line(state['host'])}" if state.get("host") else ""))
        table.append(["  " + handle(state["agent_id"]), " → ".join(told)])
    await console.answer(found, text + (rows_of(table, console.width) if table else "  nobody received it\n"))
    return 0


async def purge(console: Console, args: Args) -> int:
    if not args.before and not args.all:
        raise Usage("either --before or --all is required")
    if args.before and args.all:
        raise Usage("--before and --all are mutually exclusive")
    now = console.world.now_ns()
    moment = _moment(console, args.before, "before") if args.before else now + 3600 * NS
    if args.before and moment > now:
        raise Usage(f"--before {args.before} is in the future; --all purges everything")
    before = stamp_of(moment)
    done = await console.call("purge.execute", before=before, dry_run=not args.confirm)
    verb, gone = ("Purged", " deleted") if args.confirm else ("Purge preview", "")
    text = f"{verb} (before {when(before)}):\n" + "".join(f"  {label:<11}{done[key]}{gone}\n" for label, key in (
        ("Messages:", "messages_deleted"), ("Sessions:", "sessions_deleted"), ("Events:", "events_deleted")))
    text += f"  Sync files: {done['sync_message_files']} message files, {1 if done['sync_events_filtered'] else 0} events file" \
            f"{' filtered' if args.confirm else ''}\n"
    text += "Done. Older commits of the branch a-sync still hold it.\n" if args.confirm else "Run with --confirm to execute.\n"
    await console.answer(done, text)
    return 0


# ---- live

def _kind_text(row: dict) -> str:
    """What a subscription is to."""
    kinds = ["All messages (firehose)"] if row.get("all") else []
    if "scope_type" in row:
        kinds.append(f"Scope ({one_line(row['scope_type'])}:{one_line(row['scope_value'])})")
    if "mention_role" in row:
        kinds.append(f"Mention ({handle(row['mention_role'])})")
    if "topics" in row:
        kinds.append(f"Topics ({', '.join(map(one_line, row['topics']))})")
    return " and ".join(kinds)


async def subscribe_command(console: Console, args: Args) -> int:
    me = console.me()
    given = (args.scope is not None) + (args.mention is not None) + args.all
    if given > 1:
        raise Usage("--scope, --mention, and --all are mutually exclusive")
    if not given and not args.topic:
        raise Usage("must specify one of: --scope, --mention, or --all; or a --topic")
    try:
        scope = parse_pair(args.scope, "scope") if args.scope is not None else None
    except InvalidParams:
        raise Usage("invalid scope format, expected type:value") from None
    if args.mention is not None and not args.mention.lstrip("@"):
        raise Usage("invalid mention: it must name a role or an agent")
    done = await console.call("subscribe", scope=scope, mention_role=args.mention, all=args.all or None, topics=args.topic or None,
                              caller_agent_id=me)
    await console.answer(done, f"✓ Subscription created: #{done['subscription_id']}\n" + rows_of([
        ["  Session:", plain(done["session_id"])], ["  Created:", when(done["created_at"])]]))
    return 0


async def unsubscribe_command(console: Console, args: Args) -> int:
    me, number = console.me(), args.id
    if not (number.isascii() and number.isdigit() and 0 < int(number[:20]) <= INTEGER_MAX):
        raise Usage(f"invalid subscription ID: {one_line(number)}")
    done = await console.call("unsubscribe", subscription_id=int(number), caller_agent_id=me)
    if not done["removed"] and not args.json:
        raise ThrumError(f"Failed to remove subscription #{number}: your session has none of that number; 'thrum subscriptions' lists them")
    await console.answer(done, f"✓ Subscription #{number} removed")
    return 0 if done["removed"] else 1


async def subscriptions_command(console: Console, args: Args) -> int:
    found = await console.call("subscriptions.list", caller_agent_id=console.me())
    rows = found["subscriptions"]
    text = f"Active subscriptions ({len(rows)}):\n" + "".join(
        f"\nSubscription #{row['id']}\n" + rows_of([["  Type:", _kind_text(row)], ["  Created:", when(row["created_at"])]]) for row in rows)
    await console.answer(found, text if rows else "No active subscriptions.\n")
    return 0


WATCHED = tuple(topic for topic, types in EVENT_TOPICS.items() if types)     # the others leave nothing in the journal
RECEIVERS_SHOWN = 3             # of a message; then how many more there are
DOINGS = {                      # what somebody has done, or what has become of what is theirs; {} is a field of the event
    "message.delete": "took back {message_id}",
    "message.remove": "removed {messages} for good",
    "message.receipt": "{receipt_type} {message_id}",
    "message.route": "got {messages} by {route}",
    "thread.create": "opened the thread {title}",
    "agent.register": "registered as {role} for {module}",
    "agent.cleanup": "was deleted, with everything it wrote",
    "agent.session.start": "joined",
    "agent.session.end": "left",
    "claim.take": "claimed {path} for {ttl}",
    "claim.renew": "renewed the claim on {path} for {ttl}",
    "claim.release": "no longer claims {path}",
    "claim.lapse": "no longer claims {path}",
    "group.create": "created the group {name}",
    "group.update": "changed the group {name}",
    "group.delete": "deleted the group {name}",
    "group.member.add": "added {member} to {name}",
    "group.member.remove": "took {member} out of {name}",
}
RECEIPT_WORDS = {"read": "read", "seen": "saw"}
WHYS = {"normal": "", "manual deletion": "", "released": "", "crash_recovered": "its session had been left open",    # reasons in the log
        "expired": "the time is over", "dead": "gone", "gone": "the machine is gone", "lost": "another machine was first",
        "replaced": "claimed anew"}


def _doing(event: dict) -> str:
    """What has happened, but for who did it, in words; "" for what is nothing to a reader: what git says, scopes and references."""
    kind, messages = event["type"], event.get("message_ids", ())
    if kind == "session.update":
        return "; ".join(f"{words} {event[field]}" for field, words in (("intent", "intends:"), ("current_task", "is at task")) if
                         event.get(field))
    fields = {**event, "messages": messages[0] if len(messages) == 1 else f"{len(messages):,} messages",
              "ttl": span(event.get("ttl_s", 0)), "title": event.get("title") or event.get("thread_id"),
              "receipt_type": RECEIPT_WORDS.get(event.get("receipt_type"), "noted"),
              "member": _member_text(event.get("member_type", ""), event.get("member_value", ""))}
    words, why = DOINGS.get(kind, "").format_map(collections.defaultdict(lambda: "…", fields)), event.get("reason", "")
    why = event.get("note") or WHYS.get(why, why)
    return words + (f": {why}" if words and why else "")


def _happening(event: dict, console: Console) -> str:
    """An event on one line, "" for what is nothing to a reader."""
    who, time_of_day = handle(event["agent_id"]) if event.get("agent_id") else "thrum", event["timestamp"][11:19] + "Z  "
    room = console.width - len(time_of_day)
    if event["type"] == "purge.executed":
        return time_of_day + fitted(f"everything from before {when(event['cutoff'])} was purged", room)
    if event["type"] not in ("message.create", "message.edit"):
        words = _doing(event)
        return words and time_of_day + fitted(f"{who} {words}", room)
    names = ["@" + one_line(one["value"]) for one in event.get("audiences", ())]
    more = f" +{len(names) - RECEIVERS_SHOWN}" if len(names) > RECEIVERS_SHOWN else ""
    whom = f" → {', '.join(names[:RECEIVERS_SHOWN])}{more}" if names else ""
    head = fitted(who + _via_text(event) + whom + (" (edited)" if event["type"] == "message.edit" else ""), room * 2 // 3)
    text = "(taken back)" if event.get("deleted") else ("↳ " if "reply_to" in event else "") + event["content"]
    return f"{time_of_day}{console.bold(head)}: {fitted(text, room - columns(head) - 2)}"


async def watch(console: Console, args: Args) -> int:
    for topic in args.topic:
        if topic not in WATCHED:
            raise Usage(f"no topic {one_line(topic)!r} to watch; there are {', '.join(WATCHED)}")
    if args.limit is not None and args.limit < 1:
        raise Usage("invalid limit: it must be at least 1")
    wanted = {"topics": args.topic or [topic for topic in WATCHED if topic != "receipts"], "from": args.from_, "to": args.to,
              "scope": _pair_or_usage(args.scope, "scope") if args.scope else None}
    since = args.since if args.since and not args.since.isdecimal() else None
    since, now = since and stamp_of(_moment(console, since, "since")), stamp_of(console.world.now_ns())
    state = await console.call("health")
    if console.cursor:          # this watch began with another daemon
        at = json.loads(console.cursor)
        if at["epoch"] != state["epoch"]:       # and another journal, whose numbers say nothing: what is younger than all that was shown
            at.update(after_seq=0, epoch=state["epoch"], since=at["newest"])
    else:
        start = 0 if since else min(int(args.since), state["last_seq"]) if args.since else state["last_seq"]
        at = {"after_seq": start, "epoch": state["epoch"], "since": since, "newest": now, "day": now[:10], "left": args.limit or FAR}
        if "1" in console.terminals and not args.json:
            await console.note("Watching; Ctrl-C ends it.")
        await console.resume_at(json.dumps(at))
    while at["left"]:
        found = await console.call("event.wait", after_seq=at["after_seq"], epoch=at["epoch"], created_after=at["since"], limit=STORE_BATCH,
                                   timeout_ms=0 if at["since"] else WAIT_CALL_MS, **wanted)
        before, text = dict(at), ""
        for event in found["events"]:
            line = encode(event).decode() if args.json else _happening(event, console)
            if line and at["left"]:
                if event["timestamp"][:10] != at["day"] and not args.json:
                    at["day"] = event["timestamp"][:10]
                    text += console.bold(at["day"]) + "\n"
                text += line + "\n"
                at["left"] -= 1
                at["newest"] = max(at["newest"], event["timestamp"])
        at["after_seq"] = found["after_seq"]
        if not found["remaining"]:
            at["since"] = None      # from now on what comes counts, whenever it was made
        if at != before:
            await console.out(text)
            await console.resume_at(json.dumps(at))     # so that the text is shown now, and never again
    return 0


# ---- claims

CLAIM_NOTE = 16                 # columns that a note, and a path, have at least in the table


def _claim_paths(console: Console, args: Args) -> list:
    """The paths of a command line as claims have them: they were given from where the caller is."""
    return [claim_path(path, console.top, console.cwd) for path in args.path]


def _ends_text(claim: dict, console: Console) -> str:
    """When a claim ends: `09:45Z (in 18m)`."""
    now = console.world.now_ns()
    ends, same_day = when(claim["expires_at"]), claim["expires_at"][:10] == stamp_of(now)[:10]
    return f"{ends[11 if same_day else 0:16]}Z (in {span((ns_of(claim['expires_at']) - now) / NS + 0.5)})"


async def claim(console: Console, args: Args) -> int:
    for flag, seconds in (("ttl", args.ttl), ("wait", args.wait)):
        if seconds is not None and not 1 <= seconds <= TTL_MAX_S:
            raise Usage(f"invalid {flag}: it must be between 1s and {span(TTL_MAX_S)}")
    now = console.world.now_ns()
    began = json.loads(console.cursor) if console.cursor else {"queued_at": stamp_of(now), "deadline": now + int((args.wait or 0) * NS)}

    def take(wait_ms=None):
        return console.call("claim.take", paths=_claim_paths(console, args), ttl_s=int(args.ttl) if args.ttl else None, note=args.note,
                            shared=args.shared or None, confirm=args.confirm or None, queued_at=began["queued_at"], wait_ms=wait_ms,
                            caller_agent_id=console.me())

    try:
        done = await take()
    except Conflict as refusal:
        if args.wait is None:
            raise
        if not console.cursor:
            reason, _, _ = str(refusal).rpartition("; queue with")
            before = len(refusal.data["waiting"])
            await console.note(f"Waiting for {span(args.wait)} at most: {reason}" + (f" ({before} before you)" if before else ""))
            await console.resume_at(json.dumps(began))
        try:
            done = await take(max(1, (began["deadline"] - now) // 1_000_000))
        except Conflict as still:
            raise ThrumError(f"not free within {span(args.wait)}: {str(still).rpartition('; queue with')[0]}") from None
    if args.confirm:
        await console.note("Nothing is shared with other machines yet: only this one knows the claim, and there is nothing to wait for.")

    def remark(claim):
        path = claim["path"]
        new = _pattern(path).plain and not os.path.lexists(os.path.join(console.top, path))
        return (" (shared)" if claim["shared"] else "") + (" (no such file yet)" if new else "")

    text = "".join(f"✓ {'Renewed' if 'renewed_at' in c else 'Claimed'} {one_line(c['path'], PAIR_MAX)}{remark(c)} "
                   f"until {_ends_text(c, console)}, {done['scope']}\n" for c in done["claims"])
    await console.answer(done, text)
    return 0


async def release(console: Console, args: Args) -> int:
    done = await console.call("claim.release", paths=_claim_paths(console, args), caller_agent_id=console.me())
    text = "".join(f"✓ Released {one_line(c['path'], PAIR_MAX)}\n" for c in done["released"])
    await console.answer(done, text or "You have no claims.\n")
    return 0


async def claims(console: Console, args: Args) -> int:
    found = await console.call("claim.list", paths=_claim_paths(console, args), agent_id=console.me() if args.mine else None)
    table = [["PATH", "WHO", "KIND", "UNTIL", "NOTE"]] + [[
        plain(c["path"]), handle(c["agent_id"]) + (f" on {one_line(c['host'])}" if "host" in c else ""),
        ("shared" if c["shared"] else "exclusive") + ("" if c["holds"] else ", contested"), _ends_text(c, console),
        one_line(c["note"])] for c in found["claims"]]
    left = console.width - sum(max(len(row[i]) for row in table) + 2 for i in (1, 2, 3))    # for path and note
    room = max(min(max(len(row[0]) for row in table), left - 2 - min(max(len(row[4]) for row in table), CLAIM_NOTE)), CLAIM_NOTE)
    for row in table[1:]:
        row[0] = row[0] if len(row[0]) <= room else "…" + row[0][1 - room:]
        row[4] = one_line(row[4], max(left - room - 2, CLAIM_NOTE)) if row[4] else ""
    text = "".join(line.rstrip() + "\n" for line in rows_of(table).splitlines()) if found["claims"] else ""
    for waiting in found["waiting"]:
        text += f"{handle(waiting['agent_id'])} waits for {one_line(' '.join(waiting['paths']))}" \
                f"{' (shared)' if waiting['shared'] else ''} (asked {console.ago(waiting['since'])})\n"
    await console.answer(found, text or ("Nothing is claimed there.\n" if args.path else "Nothing is claimed.\n"))
    return 0


# ---- agents, sessions, groups

async def agent_register_command(console: Console, args: Args) -> int:
    name = await _chosen_name(console, args)
    role, module = args.role or console.environ.get("THRUM_ROLE"), args.module or console.environ.get("THRUM_MODULE")
    if not role or not module:
        raise Usage("role and module are required (use --role and --module flags or THRUM_ROLE and THRUM_MODULE env vars)")
    check_word(role, "role")
    repo_id = (await console.call("health"))["repo_id"]
    display = args.display or console.environ.get("THRUM_DISPLAY") or f"{role.capitalize()} ({module})"
    identity = Identity(name or unnamed_agent_id(repo_id, role, module), role, module, display)
    before = dict(console.identities).get(identity.name + ".json")
    if before is not None:
        identity = Identity(identity.name, role, module, display, data=parse_identity(identity.name + ".json", before).data)

    async def registered():
        return await console.call("agent.register", name=name or None, role=role, module=module, display=display,
                                  force=args.force or None, re_register=args.re_register or None,
                                  worktree=console.worktree)

    done = await _with_identity_file(console, identity, repo_id, registered)
    if done["status"] == "conflict":
        await console.save(f".thrum/identities/{identity.name}.json", before)
        other = done["conflict"]
        text = (f"✗ Registration conflict\n  Agent ID:   {one_line(other['existing_agent_id'])} has this role and module\n"
                f"  Registered: {when(other['registered_at'])}\n  Last seen:  {when(other['last_seen_at'])}\n"
                "  Use --force to register beside it, --re-register to return as this agent\n")
    else:
        await _lay_out_context(console, identity.name, role)
        text = f"✓ Agent {'re-registered' if done['status'] == 'updated' else 'registered'}: {done['agent_id']}"
    await console.answer(done, text)
    return done["status"] == "conflict"


async def agent_delete_command(console: Console, args: Args) -> int:
    name = args.name.lstrip("@")
    if not args.force and (await console.ask(f"Delete agent '{name}' and all associated data? [y/N] ")).lower() != "y":
        await console.answer({"agent_id": name, "deleted": False, "message": "Deletion canceled."},
                             "Deletion canceled." + ("" if "0" in console.terminals else " (--force deletes without asking)"))
        return 0
    done = await console.call("agent.delete", name=name)
    await console.answer(done, f"✓ Agent {done['agent_id']} deleted successfully")
    return 0


async def agent_cleanup_command(console: Console, args: Args) -> int:
    if args.dry_run and args.force:
        raise Usage("--dry-run and --force are mutually exclusive")
    found = await console.call("agent.cleanup", dry_run=args.dry_run or None, force=args.force or None, threshold=args.threshold)
    text = "Orphaned agents (dry-run mode):\n" if args.dry_run else "Agent cleanup results:\n"
    for orphan in found["orphans"]:
        lines = [("Why:", orphan["reason"]), ("Worktree:", f"{orphan['worktree']} [{'DELETED' if orphan['worktree_missing'] else 'exists'}]"
                                                if orphan["worktree"] else ""),
                 ("Last seen:", console.ago(orphan["last_seen_at"]) if orphan["last_seen_at"] else "never"),
                 ("Messages:", str(orphan["message_count"]))]
        text += f"\n  Agent: {one_line(orphan['agent_id'])} ({one_line(orphan['role'])}, module: {one_line(orphan['module'])})\n"
        text += "".join(f"    {label:<11}{one_line(value)}\n" for label, value in lines if value)
    if not found["orphans"]:
        text = "No orphaned agents found.\n"
    if found["deleted"]:
        text += f"\n✓ Deleted {len(found['deleted'])} orphaned agent(s): {', '.join(found['deleted'])}\n"
    elif found.get("message") and args.dry_run:
        text += f"\n{found['message']}\n"
    await console.answer(found, text)
    if not found["orphans"] or args.force or args.dry_run or args.json:
        return 0
    if (await console.ask("\nDelete these orphaned agents? [y/N] ")).lower() != "y":
        await console.out("Cleanup canceled.\n" if "0" in console.terminals else f"Cleanup canceled. {found['message']}\n")
        return 0
    count = 0
    for orphan in found["orphans"]:
        try:
            await console.call("agent.delete", name=orphan["agent_id"])
            count += 1
            await console.out(f"✓ Deleted {orphan['agent_id']}\n")
        except ThrumError as error:
            await console.out(f"✗ Failed to delete {one_line(orphan['agent_id'])}: {one_line(str(error))}\n")
    await console.out(f"✓ Deleted {count} orphaned agent(s)\n")
    return count < len(found["orphans"])


async def agent_list_command(console: Console, args: Args) -> int:
    contexts = await console.call("agent.listContext")
    if args.context:
        await console.answer(contexts, _contexts_table(contexts["contexts"], console))
        return 0
    found = await console.call("agent.list", role=args.role, module=args.module)
    active = _by_agent(contexts)
    text = f"Registered agents ({len(found['agents'])}):\n"
    for agent in found["agents"]:
        work = active.get(agent["agent_id"])
        text += f"\n{'●' if work else '○'} {console.bold(handle(agent['agent_id']))}  @{one_line(agent['role'])}  " \
                f"{one_line(agent['module'])}  ({'active' if work else 'offline'})\n"
        lines = [("Intent:", one_line(work.get("intent", ""), console.width - 14)),
                 ("Task:", one_line(work.get("current_task", ""), console.width - 14)),
                 ("Branch:", _branch_text(work)), ("Active:", console.ago(agent["last_seen_at"]) if agent.get("last_seen_at") else "")] \
            if work else [("Last seen:", console.ago(agent["last_seen_at"]) if agent.get("last_seen_at") else "")]
        text += "".join(f"    {label} {value}\n" for label, value in lines if value)
    await console.answer({"agents": found, "contexts": contexts}, text if found["agents"] else
                         "No agents with that role and module.\n" if args.role or args.module else "No agents registered.\n")
    return 0


def _branch_text(work: dict) -> str:
    commits = f" ({len(work.get('unmerged_commits', []))} commits)" if "git_updated_at" in work else ""
    return one_line(work["branch"]) + commits if "branch" in work else ""


SESSION_WIDTH = 11              # characters of a session's id in a table: its kind and the time, to half a minute


def _contexts_table(contexts: list, console: Console) -> str:
    """Work contexts, one to a line; what git says is `-` where nobody has asked it yet."""
    if not contexts:
        return "No active work contexts found.\n"
    table = [["AGENT", "SESSION", "BRANCH", "COMMITS", "FILES", "INTENT", "UPDATED"]]
    for work in contexts:
        known = "git_updated_at" in work
        table.append([one_line(handle(work["agent_id"]), max(console.width // 8, 10)), work["session_id"][:SESSION_WIDTH] + "...",
                      one_line(work.get("branch", "-"), max(console.width // 6, 12)),
                      str(len(work.get("unmerged_commits", []))) if known else "-", str(len(_files_of(work))) if known else "-",
                      work.get("intent", "-"), _age_of(work, console)])
    others = sum(max(len(row[i]) for row in table) + 2 for i in range(7) if i != 5)
    return rows_of([[*row[:5], one_line(row[5], max(console.width - others, 10)), row[6]] for row in table])


async def agent_context_command(console: Console, args: Args) -> int:
    wanted = (args.name or args.agent or "").lstrip("@")
    if not wanted and (args.name is not None or args.agent is not None):
        raise Usage("the agent's name is empty")
    filters = {"branch": args.branch, "file": args.file and repo_path(args.file, console.top, console.cwd), "fresh": True}
    found = await console.call("agent.listContext", agent_id=wanted or None, **filters)
    if wanted and not found["contexts"]:
        found = await console.call("agent.listContext", role=wanted, **filters)     # decision 27
    contexts = found["contexts"]
    if wanted and not contexts:
        agents = (await console.call("agent.list"))["agents"]
        if all(wanted not in (agent["agent_id"], agent["role"]) for agent in agents):
            raise ThrumError(f"no agent or role @{one_line(wanted)}; '{console.program} agent list' shows who there is")
    await console.answer(found, _context_text(contexts[0], console) if args.name and len(contexts) == 1
                         else _contexts_table(contexts, console))
    return 0


CONTEXT_ROWS = 20               # commits, and files, of an agent's work that are shown


def _context_text(work: dict, console: Console) -> str:
    """Everything that is known of the work of one session."""
    def set_at(field):
        return f" (set {console.ago(work[field])})" if field in work else ""
    lines = [("Agent:", f"{handle(work['agent_id'])} ({work['session_id']})"), ("Branch:", one_line(work.get("branch", ""))),
             ("Worktree:", one_line(work.get("worktree_path", ""))),
             ("Intent:", one_line(work["intent"]) + set_at("intent_updated_at") if "intent" in work else ""),
             ("Task:", one_line(work["current_task"]) + set_at("task_updated_at") if "current_task" in work else "")]
    text = "".join(f"{label} {value}\n" for label, value in lines if value)
    if "git_updated_at" not in work:
        return text
    commits = work.get("unmerged_commits", [])
    text += f"Unmerged Commits ({len(commits)}):\n" if commits else ""
    for commit in commits[:CONTEXT_ROWS]:
        files = f" [{one_line(', '.join(commit['files']))}]" if commit["files"] else ""
        text += f"  {one_line(commit['sha'])[:7]} {one_line(commit['message'])}{files}\n"
    text += f"  … and {len(commits) - CONTEXT_ROWS} more\n" if len(commits) > CONTEXT_ROWS else ""
    return text + f"Changed Files (vs main): {len(work.get('changed_files', []))}\nUncommitted: {len(work.get('uncommitted_files', []))}\n"


async def session_start_command(console: Console, args: Args) -> int:
    done = await console.call("session.start", agent_id=console.me(),
                              refs=_worktree_ref(console))
    await console.answer(done, f"✓ Session started: {done['session_id']}\n  Agent:   {handle(done['agent_id'])}\n"
                               f"  Started: {when(done['started_at'])}\n")
    return 0


async def session_end_command(console: Console, args: Args) -> int:
    session_id = args.session_id or console.cursor
    if not session_id:
        session_id = (await console.call("agent.whoami", caller_agent_id=console.me())).get("session_id")
        if not session_id:
            raise ThrumError("no active session to end")
        await console.resume_at(session_id)
    done = await console.call("session.end", session_id=session_id, reason=args.reason)
    await console.answer(done, f"✓ Session ended: {done['session_id']}\n  Ended:    {when(done['ended_at'])}\n"
                               f"  Duration: {span(done['duration_ms'] / 1000)}\n")
    return 0


async def session_list_command(console: Console, args: Args) -> int:
    found = await console.call("session.list", active_only=args.active or None, agent_id=(args.agent or "").lstrip("@") or None)
    text = f"Sessions ({len(found['sessions'])}):\n"
    for session in found["sessions"]:
        lines = [("Agent:", handle(session["agent_id"])), ("Started:", when(session["started_at"])),
                 ("Ended:", when(session.get("ended_at", ""))), ("Intent:", one_line(session.get("intent", ""))),
                 ("Reason:", one_line(session.get("end_reason", "")) if session.get("end_reason") != "normal" else "")]
        text += f"\n{session['session_id']} [{session['status']}]\n" + "".join(f"  {k:<9}{v}\n" for k, v in lines if v)
    await console.answer(found, text if found["sessions"] else "No sessions found.\n")
    return 0


async def heartbeat(console: Console, args: Args) -> int:
    changes = {}
    for flag in ("add_scope", "remove_scope", "add_ref", "remove_ref"):
        kind = flag.partition("_")[2]
        try:
            changes[flag + "s"] = [parse_pair(text, kind) for text in getattr(args, flag)] or None
        except InvalidParams as error:
            raise Usage(f'invalid {kind} format "{str(error).rpartition("got: ")[2]}", expected type:value') from None
    done = await console.call("session.heartbeat", session_id=await console.session(), **changes)
    context = [f"branch: {one_line(done['branch'])}"] if "branch" in done else []
    if "unmerged_commits" in done:
        context += [f"{done['unmerged_commits']} commits", f"{len(done['file_changes'])} files"]
    await console.answer(done, f"✓ Heartbeat sent: {done['session_id']}\n" + (f"  Context: {', '.join(context)}\n" if context else ""))
    return 0


async def set_intent(console: Console, args: Args) -> int:
    identity = console.identity()
    if identity.file:           # as it stands in the file, without what the environment says
        identity = choose_identity(console.identities, console.environ, console.worktree)
    done = await console.call("session.setIntent", session_id=await console.session(), intent=args.text)
    if identity.file:
        await console.save(f".thrum/identities/{identity.file}", render_identity(
            identity, stamp_of(console.world.now_ns()), intent=args.text or None))
    await console.answer(done, f"✓ Intent set: {one_line(args.text)}" if args.text else "✓ Intent cleared")
    return 0


async def set_task(console: Console, args: Args) -> int:
    done = await console.call("session.setTask", session_id=await console.session(), current_task=args.task)
    await console.answer(done, f"✓ Task set: {one_line(args.task)}" if args.task else "✓ Task cleared")
    return 0


async def group_create_command(console: Console, args: Args) -> int:
    done = await console.call("group.create", name=args.name, description=args.description, caller_agent_id=console.me())
    await console.answer(done, f"✓ Group created: {done['name']} ({done['group_id']})")
    return 0


def _member_argument(console: Console, args: Args) -> tuple:
    """What kind of member a command names, its value, how it is written, and who calls; `--role` is the member's here."""
    if not args.role and not args.member and not args.group_member:
        raise Usage("provide a member argument or --role flag")
    kind, value = ("role", args.role) if args.role else ("group", args.group_member.lstrip("@")) if args.group_member else \
        ("agent", args.member.lstrip("@"))
    caller = resolve_caller(console.identities, console.environ, console.worktree).agent_id()
    return kind, value, _member_text(kind, value), caller


def _member_text(kind: str, value: str) -> str:
    return handle(value) if kind == "agent" else "role:* (all agents)" if value == "*" else f"{one_line(kind)}:{one_line(value)}"


async def group_add_command(console: Console, args: Args) -> int:
    kind, value, shown, caller = _member_argument(console, args)
    done = await console.call("group.member.add", group=args.group, member_type=kind, member_value=value, caller_agent_id=caller)
    await console.answer(done, f"✓ Added {shown} to {one_line(done['group'])}")
    return 0


async def group_remove_command(console: Console, args: Args) -> int:
    kind, value, shown, caller = _member_argument(console, args)
    done = await console.call("group.member.remove", group=args.group, member_type=kind, member_value=value, caller_agent_id=caller)
    await console.answer(done, f"✓ Removed {shown} from {one_line(done['group'])}" if done["removed"] else
                         f"✓ {shown} was not a member of {one_line(done['group'])}")
    return 0


async def group_delete_command(console: Console, args: Args) -> int:
    done = await console.call("group.delete", name=args.name, caller_agent_id=console.me())
    await console.answer(done, f"✓ Group deleted: {done['name']}")
    return 0


def _members_text(members: list) -> str:
    return f"Members ({len(members)}):\n" + "".join(
        f"  {_member_text(m['member_type'], m['member_value'])}\n" for m in members)


async def group_info_command(console: Console, args: Args) -> int:
    found = await console.call("group.info", name=args.name)
    lines = [("Group:", found["name"]), ("Description:", found.get("description", "(no description)")), ("ID:", found["group_id"]),
             ("Created:", f"{when(found['created_at'])} by {handle(found['created_by'])}")]
    await console.answer(found, "".join(f"{label:<13}{one_line(value)}\n" for label, value in lines) + _members_text(found["members"]))
    return 0


async def group_members_command(console: Console, args: Args) -> int:
    found = await console.call("group.members", name=args.name, expand=args.expand or None)
    text = _members_text(found["members"])
    if args.expand:
        text += f"Expanded ({len(found['expanded'])} agents):\n" + "".join(f"  {handle(agent)}\n" for agent in found["expanded"])
    await console.answer(found, text)
    return 0


async def group_list_command(console: Console, args: Args) -> int:
    found = await console.call("group.list")
    table = [[one_line(group["name"]), one_line(group.get("description", "(no description)"), console.width // 2),
              f"{group['member_count']} member{'' if group['member_count'] == 1 else 's'}"] for group in found["groups"]]
    await console.answer(found, rows_of(table) if table else "No groups found.\n")
    return 0


BODY_FILE = Argument("--body-file", "take the text from this file")
MESSAGE_ID = Argument("MSG_ID", "the message")
IF_LAST = Argument("--if-last", "only if this message is still the newest of its thread")
FORMAT = Argument("--format", "markdown, plain or json", default="markdown")
CONTEXT_OF = Argument("--agent", "another agent's")
PAGES = (Argument("--page-size", "messages on a page, at most 100", int, 10), Argument("--limit", "the same", int),
         Argument("--page", "which page", int, 1))
MEMBERS = (Argument("--role", "a role instead: all its agents"), Argument("--group-member", "a group instead"))
COMMANDS = {
    "quickstart": Command(quickstart, "Join the team: register, start a session, say what you do.", (
        Argument("--name", "your name: a-z, 0-9, _ and -"), Argument("--display", "your name for people"),
        Argument("--intent", "what you are going to do"), Argument("--preamble-file", "what is to stand before your saved context"),
        Argument("--force", "ignore an identity that is here already", bool),
        Argument("--runtime", "the program that you run in: " + ", ".join(RUNTIMES[:-1])),
        Argument("--dry-run", "only say what would be done", bool), Argument("--no-init", "accepted for compatibility", bool)),
        'thrum quickstart --name ada --role planner --module core', joins=True, does="changes"),
    "prime": Command(prime, "Who you are, who is here, what is unread, how to go on: to begin with."),
    "overview": Command(overview, "You, your team and your inbox."),
    "status": Command(status, "You, your inbox and the daemon."),
    "team": Command(team, "Who is here, at what: worktree, branch, changed files, unread mail.", (
        Argument("--all", "also those who have no session", bool),)),
    "who-has": Command(who_has, "Who has changed a file, or something in a folder, as git says now.", (
        Argument("FILE", "the file, from here or from the top of the repository"),), "thrum who-has src/parser.py"),
    "ping": Command(ping, "Whether an agent is active, and at what.", (Argument("AGENT", "@agent or @role"),), "thrum ping @bob"),
    "conflicts": Command(conflicts_command, "Which active agents' work would not merge, uncommitted work included.", (
        Argument("AGENT", "only with these", required=False, many=True), Argument("--all", "every worktree, active or not", bool)),
        "thrum conflicts @bob"),
    "whoami": Command(whoami, "Who you are here; works without the daemon.", offline=True),
    "send": Command(send, "Send a message to an agent, a role or a group; without --to, to everyone.", (
        Argument("MESSAGE", "the text; - reads it from stdin", required=False), Argument("--to", "@agent, @role or @group"),
        Argument("--mention", "more recipients", list), Argument("--everyone", "to everyone", bool),
        Argument("--broadcast", "to everyone", bool, short="-b"), Argument("--scope", "type:value labels", list),
        Argument("--ref", "type:value references", list), Argument("--thread", "the thread to continue"), FORMAT,
        Argument("--structured", "a JSON object for programs"), BODY_FILE,
        IF_LAST, Argument("--key", "the same key again does not send again"),
        Argument("--acting-as", "for people: write in the name of this agent"), Argument("--disclose", "and say who wrote it", bool)),
        'thrum send "Parser is ready for review" --to @bob', does="changes", hushed=True),
    "reply": Command(reply, "Answer a message, to everyone it concerns.", (
        MESSAGE_ID, Argument("TEXT", "the answer; - reads it from stdin", required=False), FORMAT, IF_LAST, BODY_FILE),
        'thrum reply msg_01KABCDEFGHJKMNPQRSTVWXYZ0 "Looks good"', does="changes", hushed=True),
    "inbox": Command(inbox, "Messages for you, newest first; showing marks them as read.", (
        Argument("--unread", "only those you have not read, leaving them unread", bool),
        Argument("--all", "everybody's messages", bool, short="-a"), Argument("--scope", "only with this type:value"),
        Argument("--mentions", "only those that name you", bool),
        Argument("--from", "only from this agent"), Argument("--oldest", "oldest first", bool), *PAGES), "thrum inbox --unread"),
    "sent": Command(sent, "What you sent, and who has read it.", (
        Argument("--to", "only to this agent, role or group"), Argument("--unread", "only what somebody has not read", bool),
        Argument("--overdue", "only what waits although its reader is here, or gone", bool),
        *PAGES), "thrum sent --unread", hushed=True),
    "sent show": Command(sent_show, "One message that you sent.", (MESSAGE_ID,), "thrum sent show msg_01KABCDEFGHJKMNPQRSTVWXYZ0"),
    "wait": Command(wait, "Wait until a message comes. Exit status 0: one came, 1: timeout, 2: error.", (
        Argument("--timeout", "how long, such as 30s or 5m", "duration", 30.0), Argument("--scope", "only with this type:value"),
        Argument("--mention", "only naming this role or agent"), Argument("--from", "only from this agent"),
        Argument("--thread", "only in this thread"), Argument("--all", "anybody's messages", bool),
        Argument("--unread", "return at once when something is unread", bool),
        Argument("--after", "since then: -30s is half a minute ago", "duration"),
        Argument("--after-seq", "after this number of the journal", int)), "thrum wait --timeout 5m", failure=2, hushed=True),
    "search": Command(search, "Find messages by their words, the best hits first.", (
        Argument("QUERY", 'words; "a phrase"; a beginning*', many=True), Argument("--from", "only from this agent"),
        Argument("--to", "only to this agent, role or group"), Argument("--thread", "only in this thread"),
        Argument("--scope", "only with this type:value"), Argument("--since", "only since then: 2d, 12h, 2026-03-15"),
        Argument("--limit", "how many, at most 100", int, 10)), "thrum search parser gramm* --from @ada --since 2d"),
    "watch": Command(watch, "What happens, as it happens: messages, who joins and leaves, intents, claims, groups.", (
        Argument("--topic", f"only these: {', '.join(WATCHED)}", list), Argument("--from", "only what this agent does"),
        Argument("--to", "only messages to this agent, role or group"), Argument("--scope", "only messages with this type:value"),
        Argument("--since", "begin with what was before: 10m, 2d, or after a number of the journal"),
        Argument("--limit", "end after so many", int)), "thrum watch --since 1h"),
    "subscribe": Command(subscribe_command, "Have your session's connections told of messages, and of other things, as they come.", (
        Argument("--scope", "messages with this type:value"), Argument("--mention", "messages to this role or agent"),
        Argument("--all", "all messages", bool),
        Argument("--topic", f"also what happens in these: {', '.join(SUBSCRIPTION_TOPICS)}", list)),
        "thrum subscribe --scope module:parser", does="changes"),
    "unsubscribe": Command(unsubscribe_command, "End a subscription of your session.", (
        Argument("ID", "its number"),), "thrum unsubscribe 12", does="changes"),
    "subscriptions": Command(subscriptions_command, "What your session has subscribed to."),
    "trace": Command(trace, "What became of a message, recipient by recipient.", (MESSAGE_ID,),
                     "thrum trace msg_01KABCDEFGHJKMNPQRSTVWXYZ0"),
    "claim": Command(claim, "Say that you are going to edit files, so that others keep off; again, to renew it.", (
        Argument("PATH", "a file, a folder with all in it, or a pattern: * ? **", many=True),
        Argument("--ttl", "for how long (default 30m)", "duration"), Argument("--note", "what for"),
        Argument("--shared", "others may claim it shared, too", bool),
        Argument("--wait", "queue for so long when others have it", "duration"),
        Argument("--confirm", "return when other machines can know of it", bool)),
        'thrum claim src/parser.py tests/parser --ttl 1h --note "new lexer"', does="changes", hushed=True),
    "release": Command(release, "Give back what you have claimed; without a path, all of it.", (
        Argument("PATH", "as it was claimed", required=False, many=True),), "thrum release src/parser.py", does="changes",
                       hushed=True),
    "claims": Command(claims, "Who has claimed what, until when and why.", (
        Argument("PATH", "only what is on it, above it or below it", required=False, many=True),
        Argument("--mine", "only your own", bool)), "thrum claims src"),
    "purge": Command(purge, "Remove old messages and ended sessions for good, here and on all machines.", (
        Argument("--before", "older than 2d, 12h, 2026-03-15 or an RFC 3339 time"), Argument("--all", "everything", bool),
        Argument("--confirm", "do it; without this, only a preview", bool)), "thrum purge --before 30d --confirm", does="changes"),
    "message get": Command(message_get_command, "One message with everything about it.", (
        MESSAGE_ID, Argument("--history", "with all versions of its text", bool))),
    "message edit": Command(message_edit_command, "Replace the text of a message that you wrote.", (
        MESSAGE_ID, Argument("TEXT", "the new text; - reads it from stdin", required=False), BODY_FILE), does="changes", hushed=True),
    "message delete": Command(message_delete_command, "Take back a message.", (
        MESSAGE_ID, Argument("--force", "yes, delete it", bool), Argument("--reason", "why")), does="changes", hushed=True),
    "message read": Command(message_read, "Mark messages as read.", (
        Argument("MSG_ID", "which ones", required=False, many=True), Argument("--all", "all of them", bool)), does="changes", hushed=True),
    "agent register": Command(agent_register_command, "Register an agent without starting a session.", (
        Argument("--name", "its name"), Argument("--display", "its name for people"),
        Argument("--force", "register although another has this role and module", bool),
        Argument("--re-register", "return as the same agent", bool)),
        "thrum agent register --name bob --role reviewer --module core", joins=True, does="changes"),
    "agent delete": Command(agent_delete_command, "Delete an agent with everything that it wrote, on all machines.", (
        Argument("NAME", "the agent"), Argument("--force", "without asking", bool)), "thrum agent delete bob --force", does="changes"),
    "agent cleanup": Command(agent_cleanup_command, "Find agents that nobody can be any more, and delete them.", (
        Argument("--dry-run", "only list them", bool), Argument("--force", "delete them without asking", bool),
        Argument("--threshold", "days without a sign of life", int, STALE_DAYS)), "thrum agent cleanup --dry-run", does="changes"),
    "agent list": Command(agent_list_command, "Who is registered, and who is active; --role and --module narrow it.", (
        Argument("--context", "the work of those who are active, as a table", bool),), "thrum agent list --role tester"),
    "agent context": Command(agent_context_command, "What agents are working on.", (
        Argument("NAME", "only this agent, or this role", required=False), Argument("--agent", "the same"),
        Argument("--branch", "only on this branch"), Argument("--file", "only who has changed this file")), "thrum agent context @bob"),
    "context save": Command(context_save_command, "Save what you, or your successor, will need to know.", (
        Argument("--file", "take it from this file instead of stdin"), CONTEXT_OF), "thrum context save --file NOTES.md",
        offline=True, does="changes"),
    "context show": Command(context_show_command, "What was saved, after the preamble.", (
        Argument("--raw", "as it was saved, without a heading", bool), Argument("--no-preamble", "without the preamble", bool),
        CONTEXT_OF), "thrum context show", offline=True),
    "context clear": Command(context_clear_command, "Remove what was saved; the preamble stays.", (CONTEXT_OF,),
                             "thrum context clear", offline=True, does="changes"),
    "context preamble": Command(context_preamble_command, "Show or replace what stands before your saved context.", (
        Argument("--init", "write the default for your role", bool), Argument("--file", "take it from this file"), CONTEXT_OF),
        "thrum context preamble --init", offline=True, does="changes"),
    "session start": Command(session_start_command, "Start a session.", (), does="changes"),
    "session end": Command(session_end_command, "End your session.", (
        Argument("--reason", "why", default="normal"), Argument("--session-id", "another session than your own")), does="changes"),
    "session list": Command(session_list_command, "Sessions, newest first.", (
        Argument("--active", "only those that have not ended", bool), Argument("--agent", "only of this agent"))),
    "session heartbeat": Command(heartbeat, "Say that you are alive; change the scopes and references of your session.", (
        Argument("--add-scope", "type:value", list), Argument("--remove-scope", "type:value", list),
        Argument("--add-ref", "type:value", list), Argument("--remove-ref", "type:value", list)), does="changes"),
    "session set-intent": Command(set_intent, 'Say what you are doing; "" clears it.', (Argument("TEXT", "what"),),
                                  'thrum session set-intent "Review the lexer"', does="changes", hushed=True),
    "session set-task": Command(set_task, 'Say which task you are on; "" clears it.', (Argument("TASK", "which"),),
        does="changes", hushed=True),
    "group create": Command(group_create_command, "Create a group.", (
        Argument("NAME", "its name"), Argument("--description", "what it is for")), "thrum group create backend",
        does="changes", hushed=True),
    "group add": Command(group_add_command, "Add an agent or a role to a group.", (
        Argument("GROUP", "the group"), Argument("MEMBER", "@agent", required=False), *MEMBERS), "thrum group add backend @bob",
        does="changes", hushed=True),
    "group remove": Command(group_remove_command, "Take a member out of a group.", (
        Argument("GROUP", "the group"), Argument("MEMBER", "@agent", required=False), *MEMBERS), "thrum group remove backend @bob",
        does="changes", hushed=True),
    "group delete": Command(group_delete_command, "Delete a group.", (Argument("NAME", "its name"),), "thrum group delete backend",
                            does="changes", hushed=True),
    "group info": Command(group_info_command, "One group, and who is in it.", (Argument("NAME", "its name"),), "thrum group info backend",
                          hushed=True),
    "group members": Command(group_members_command, "Who is in a group.", (
        Argument("NAME", "its name"), Argument("--expand", "down to the agents", bool)), "thrum group members backend --expand",
        hushed=True),
    "group list": Command(group_list_command, "All groups.", hushed=True),
}
for _alias, _name in (("agent whoami", "whoami"), ("agent start", "session start"), ("agent end", "session end"),
                      ("agent heartbeat", "session heartbeat"), ("agent set-intent", "session set-intent"),
                      ("agent set-task", "session set-task"), ("context load", "context show"), ("context prime", "prime")):
    COMMANDS[_alias] = COMMANDS[_name]


def split_command(argv: list, rows: dict) -> tuple:
    """The name of the command in a command line ("" for none) and the other words; global flags may come first."""
    groups = {name.split(" ")[0] for name in rows if " " in name}
    valued = {flag.name for flag in GLOBAL_FLAGS if flag.kind is not bool}
    known = {flag.name for flag in GLOBAL_FLAGS} | {"-h"}
    name, rest, index = "", [], 0
    while index < len(argv):
        token = argv[index]
        flag = token.partition("=")[0]
        if flag in known:
            rest.append(token)
            if flag in valued and flag == token and index + 1 < len(argv):
                index += 1
                rest.append(argv[index])
        else:
            longer = f"{name} {token}" if name else token
            if longer not in rows and longer not in groups:
                break
            name = longer
        index += 1
    return name, rest + argv[index:]


async def run_command(console: Console, rows: dict) -> int:
    """Run the command line of a console; gives its exit status, and has said what went wrong."""
    name, rest = split_command(console.argv, rows)
    row = console.row = rows[name]
    try:
        console.args = parse_command(row, rest)
        if console.args.help:
            await console.out(help_text(name, row))
            return 0
        return int(await row.run(console, console.args))
    except ThrumError as error:
        await console.write("E", error_line(error))
        return row.failure


def help_text(name: str, row: Command) -> str:
    """The help of one command; it fits a screen."""
    places = [a for a in row.arguments if a.name[0] != "-"]
    usage = " ".join(a.name + ("…" if a.many else "") if a.required else f"[{a.name}{'…' if a.many else ''}]" for a in places)
    text = f"{wrapped(row.help, WIDTH_DEFAULT, '')}\n\nUsage: thrum {name} {usage}{' ' if usage else ''}[flags]\n"
    table = [["  " + a.name, a.help] for a in places]
    for flag in row.arguments:
        if flag.name[0] == "-" and flag.help:
            value = "" if flag.kind is bool else " TYPE:VALUE" if flag.kind is list and "type:value" in flag.help else \
                {int: " N", "duration": " D"}.get(flag.kind, " X")
            default = f" (default {flag.default:g}s)" if flag.kind == "duration" and flag.default else \
                f" (default {flag.default})" if flag.default else ""
            table.append([f"  {flag.short + ', ' if flag.short else ''}{flag.name}{value}", flag.help + default])
    if table:
        text += "\n" + rows_of(table, WIDTH_DEFAULT)
    text += "\nEverywhere: --json --quiet --verbose --repo PATH --role R --module M --help\n"
    below = ", ".join(f"thrum {other}" for other in COMMANDS if other.startswith(name + " "))
    text += f"See also:   {below}\n" if below else ""
    return f"{text}\nExample: {example_of(name, row)}\n"


def example_of(name: str, row: Command) -> str:
    """A command line that shows how a command is called."""
    return row.example or " ".join(["thrum", name, *(a.name.lower() for a in row.arguments if a.name[0] != "-")])


# ================================================================== 23  Daemon
#
# One thread runs the event loop and touches no disk; one, the writer, owns the ledger; a few answer questions, each
# with its own connection, and two more those that take git a while.  Requests that arrive while the writer syncs become its next batch.
#
# Commands come as records (kind, 4-byte length, bytes) instead of JSON-RPC; the first byte tells them apart.
#
#     to the daemon                                       to the client
#     C  a command line, see `describe`                   O E  text for stdout, stderr
#     I  what was asked for: "0" + bytes, "1" + why not   N    send the file of this name, or stdin for "-"
#                                                         N    behind a NUL: a file of the worktree's .thrum/context
#     A  all text so far has left this process            W    write a file: path, "1" + bytes, or "0" to remove it
#                                                         P    ask the person at the terminal
#                                                         S    where to go on if the daemon goes away
#                                                         U    the client is newer, H  it has to run this itself
#                                                         X    exit status
#
# The client holds text back until another kind of record follows.  So a run that was cut short has shown nothing
# that its repetition would show again.  After X it shows the text, says A, and waits until the daemon, which has now
# marked as read what was shown, closes the connection.

CONNECT_S = 5                   # seconds to be accepted by the daemon
ANSWER_S = 15                   # seconds without a word after which a client asks whether the daemon lives: over CALL_S
READERS = 4                     # threads that answer questions: sqlite3 releases the GIL while it works
SLOW_READERS = 4                # threads for methods that ask git: each starts up to GIT_AT_ONCE processes
CALL_S = 10                     # seconds for one method
SLOW_S = 120                    # seconds for a slow one: a look at a hundred worktrees
IDLE_S = 300                    # seconds after which a connection that says nothing is closed, as in the reference
WRITE_S = 10                    # seconds that a client may take to read what it asked for
STOP_S = 5                      # seconds for what is in flight when the daemon stops
LOCK_RETRY_S = 0.02             # seconds between tries: only a signal could end a blocking flock(2), and threads have none
FLUSH_S = 0.05                  # seconds without a request before branch files are written: a burst goes together
LOOK_S = 30                     # seconds between two looks for conflicts: each costs a `git status` in every worktree
SYNC_S = 60                     # seconds between making the branch files durable, when something came
CONNECTIONS_MAX = 2_000         # open at once; more are turned away
OWN_FILES = 40                  # descriptors that the daemon needs itself: databases, log, journal, git
BACKLOG = 512                   # of the listen queue
ACCEPTED_AT_ONCE = 8            # connections to the port that are let in before others have a turn: each takes half a millisecond
QUEUE_MAX = 256                 # frames on their way to a client; one that is so far behind is closed, and comes again where it was
QUEUE_BYTES = 1 << 20           # bytes of them
KERNEL_BYTES = 64 << 10         # that the kernel is to keep for a client of the port: by itself it keeps 2.6 MB of what nobody reads
ASIDE_MAX = 16                  # calls of a WebSocket that wait or ask git, while later ones are answered
AHEAD_MAX = 8                   # messages of a WebSocket that wait for their turn: then nothing more is read
HANDSHAKE_S = 10                # seconds for the head of a request, and for its body
PING_S, DEAD_S = 54, 60         # seconds without a frame from a WebSocket until it is pinged, and until it is given up
CLOSE_S = 2                     # seconds that a client has to answer a Close
OPENING_MAX = 512               # connections without a complete request yet; the oldest goes
UNIX_RESERVED = 200             # places that WebSockets cannot take: commands always get in
BODY_MAX = 128 << 10            # bytes of a request's body: twice the largest event
PORT_DEFAULT, PORTS_TRIED = 9999, 100   # the first port of the page, and how many above it are tried
NO_PAGES = ("/ws", "/api/", "/health")  # what a link on another page does not lead to
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY = 4, 20      # linux/netlink.h, linux/sock_diag.h
TEXT_TYPE = "text/plain; charset=utf-8"
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin"}
PAGE_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self' ws://{}; "
               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
STREAM_MESSAGE_MAX = 10 << 10   # bytes of one message of a thread stream's client
ACKS_S = 0.2                    # seconds for which acknowledgements are collected
ECHO_MAX = 64 << 20             # bytes of one message at the echo endpoint: four times what the suites send
LINK_S = 300                    # seconds for which a link to the page with its one-time code is good
PRESENCE_TELL_S = 30            # seconds between two notices of one agent's presence
ANSWERS_MAX = 16 << 20          # bytes of answers after which the rest of a batch is refused
LOOKS_MAX = 32                  # worktrees that are looked at unasked in one minute
SEEN_MAX = 10_000               # agents whose presence is remembered until it is noted: anybody can make up names
INDEX_AT_ONCE = 5_000           # messages indexed in one transaction before a search: others wait for some 200 ms
LOG_BYTES, LOG_FILES = 1 << 20, 3       # the log is rotated at a size, and so many old ones are kept


HEAL = object()                 # a request to the writer: check the database, make it anew if it is damaged


class Records:
    """Splits a stream of bytes into records, each a (kind, payload)."""

    def __init__(self, limit: int):
        self.limit = limit
        self._rest = b""

    def feed(self, data: bytes) -> list:
        """The records that are complete now.  Raises InvalidRequest when one is too long."""
        self._rest += data
        found = []
        while len(self._rest) >= 5:
            size = int.from_bytes(self._rest[1:5], "big")
            if size > self.limit:
                raise InvalidRequest(f"a record is longer than {self.limit:,} bytes")
            if len(self._rest) < 5 + size:
                break
            found.append((self._rest[:1], self._rest[5:5 + size]))
            self._rest = self._rest[5 + size:]
        return found


def record(kind: str, payload: bytes = b"") -> bytes:
    return kind.encode() + len(payload).to_bytes(4, "big") + payload


def pack(items) -> bytes:
    """Byte strings as one, each behind its 4-byte length.  (The launcher carries this function.)"""
    return b"".join(len(item).to_bytes(4, "big") + item for item in items)


def unpack(data: bytes) -> list:
    """The byte strings of `pack`.  Raises InvalidRequest for anything else."""
    items, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at:at + 4], "big")
        at += 4 + size
        if at > len(data):
            raise InvalidRequest("a record is damaged")
        items.append(data[at - size:at])
    return items


def loaded(answer: bytes) -> tuple | None:
    """What `Console.load` gives, from the answer to its record: nothing, or the file's time and bytes."""
    fields = unpack(answer)
    return (fields[1], int(fields[0])) if fields else None


def dial(var, answer_s=15):
    """A blocking socket to the daemon of a `var` directory.  Raises OSError.  (The launcher carries this function.)"""
    import _socket
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    # Connecting to a full queue honours these on Linux; settimeout() would fail at once instead.
    for option, seconds in ((_socket.SO_SNDTIMEO, 5), (_socket.SO_RCVTIMEO, answer_s)):    # CONNECT_S, ANSWER_S
        sock.setsockopt(_socket.SOL_SOCKET, option, seconds.to_bytes(8, sys.byteorder) + bytes(8))
    path = os.environ.get("THRUM_SOCKET") or var + "/thrum.sock"
    here = -1
    try:
        if len(os.fsencode(path)) > 100:    # sun_path holds 104 or 108 bytes: go there, and come back
            here = os.open(".", os.O_RDONLY)
            os.chdir(os.path.dirname(path))
            path = os.path.basename(path)
        sock.connect(path)
        return sock
    except OSError:
        sock.close()
        raise
    finally:
        if here >= 0:
            os.fchdir(here)
            os.close(here)


def alive(var):
    """Raise EOFError if the daemon accepts a connection, but no answer comes in 3 s.  (The launcher carries this function.)"""
    try:
        sock = dial(var, 3)
        sock.sendall(b'{"jsonrpc":"2.0","id":1,"method":"health"}\n')
        if not sock.recv(1):
            return              # it stops; the connection that waits will notice
    except BlockingIOError:
        raise EOFError("failed to read response (daemon may be unresponsive — try: thrum daemon restart)") from None
    except OSError:
        pass


def answers(var: str) -> bool:
    """Whether somebody accepts connections on the daemon's socket."""
    try:
        dial(var).close()
        return True
    except OSError:
        return False


class Outbox:
    """What is on its way to one client.  Nobody waits for it: what the kernel does not take is kept, so many frames of it."""

    def __init__(self, writer):
        self.writer = writer
        self.transport = writer.transport
        self._written = 0       # bytes in all, but for those that the kernel took at once
        self._ends = collections.deque()        # where those of the pushed frames end that are still here, and their size
        self._size = 0          # bytes of these
        self._watch = None      # the timer that looks whether the client reads

    def _left(self) -> int:
        """The bytes that have left this process."""
        return self._written - self.transport.get_write_buffer_size()

    def room(self) -> int:
        """How many frames may be added."""
        left = self._left()
        while self._ends and self._ends[0][0] <= left:
            self._size -= self._ends.popleft()[1]
        return QUEUE_MAX - len(self._ends) if self._size < QUEUE_BYTES else 0

    def put(self, frames: list) -> bool:
        """Send frames after those before them; False when there is not room for all, and then the first are sent.

        Who has everything is never behind, however many come at once.
        """
        room = self.room() if self.transport.get_write_buffer_size() else len(frames)
        if room > 0:
            before = self._written
            self.write(b"".join(frames[:room]))
            for frame in frames[:room] if self._written > before else ():
                before += len(frame)
                self._ends.append((before, len(frame)))
                self._size += len(frame)
        return len(frames) <= room

    def write(self, data: bytes) -> None:
        """Send what has to be sent, whether there is room or not: an answer, a Close."""
        if self.transport.is_closing():
            return
        self.transport.write(data)
        if self.transport.get_write_buffer_size():
            self._written += len(data)
            if not self._watch:
                self._watch = asyncio.get_running_loop().call_later(WRITE_S, self._look, self._left())

    def _look(self, left: int) -> None:
        """Give up a client that has read nothing for WRITE_S."""
        self._watch = None
        if self.transport.get_write_buffer_size():
            if self._left() == left:
                return self.transport.abort()
            self._watch = asyncio.get_running_loop().call_later(WRITE_S, self._look, self._left())

    async def send(self, data: bytes) -> None:
        """`write`, and wait until the client has read enough; raises ConnectionError when it is given up."""
        self.write(data)
        if self.transport.get_write_buffer_size():
            await self.writer.drain()

    def close(self) -> None:
        """End the watch, unless something is still on its way."""
        if self._watch and not self.transport.get_write_buffer_size():
            self._watch.cancel()


class Connection:
    """What the daemon knows of one client: the task that serves it, how to reach it, and whether that may be ended at once."""

    web = None                  # the WebSocket, after its handshake

    def __init__(self, task, now: float, writer):
        self.task = task
        self.since = now        # when it was last heard of (monotonic s)
        self.busy = 0           # requests that are being answered
        self.waiting = 0        # it waits for a message, which it can do again with the next daemon
        self.agent = ""         # who it called for last
        self.agents = {}        # all that it called for; what concerns them is pushed to it
        self.person = ""        # who calls when a request does not say so
        self.outbox = Outbox(writer)
        self.silent = False     # nothing more is sent: it was too far behind, or was said goodbye
        self.reader = None      # of JSON-RPC: what it sends while it waits is read ahead, to see it leave
        self.socket = None
        self.ahead = b""

    def push(self, *payloads) -> None:
        """Send notifications after those before them; who is too far behind is closed, and gets nothing more."""
        if not self.silent and not self.outbox.put([self.framed(payload) for payload in payloads]):
            self.close(1013)
            self.silent = True

    def framed(self, payload: bytes) -> bytes:
        return payload + b"\n"

    def close(self, code: int) -> None:
        """End it after what is on its way."""
        self.outbox.writer.close()

    def ended(self) -> None:
        """Nothing is left to be done."""
        self.outbox.close()

    def has_left(self) -> bool:
        """Whether nobody is at the other end; who only sends no more (shutdown(2) for writing) still reads."""
        poll = select.poll()
        poll.register(self.socket, 0)
        return bool(poll.poll(0))       # POLLHUP or POLLERR

    async def left(self) -> None:
        """Return when the other end has gone."""
        while len(self.ahead) < REQUEST_MAX:
            data = await self.reader.read(65536)
            if not data and self.has_left():
                return
            if not data:
                break
            self.ahead += data
        await asyncio.Event().wait()    # for ever: it reads on, or has sent so much that it has to wait itself


class WebConnection(Connection):
    """A client of the port: HTTP, until it asks for a WebSocket."""

    def upgrade(self, limit: int) -> None:
        """Be a WebSocket from now on, whose messages have at most `limit` bytes."""
        self.web = WebSocket(limit)
        self.loop = asyncio.get_running_loop()
        self.heard = self.loop.time()   # when the last frame was complete
        self._frames = 0        # that had come then
        self.reading = True     # False while it has sent more than we look at
        self.gone = asyncio.Event()     # set when nothing more comes from it
        self._draining = asyncio.Lock()         # one at a time: Python 3.9 has room for one who waits
        self._ping_at = self.heard + PING_S
        self._beat = self.loop.call_at(self._ping_at, self._look)

    def framed(self, payload: bytes) -> bytes:
        return encode_frame(TEXT, payload)

    async def left(self) -> None:
        await self.gone.wait()

    async def answer(self, payload: bytes, kind: int = TEXT) -> None:
        """Send a message, unless a Close went before it (RFC 6455, section 5.5.1)."""
        if not self.silent:
            self.outbox.write(encode_frame(kind, payload))
            async with self._draining:
                await self.outbox.writer.drain()

    def feed(self, data: bytes) -> list:
        """The messages that are complete with this data.  Pings are answered; a Close waits for `hang_up`, behind the answers."""
        self.web.feed(data)
        messages = self.web.messages()
        if self.web.frames != self._frames:
            self.heard, self._frames = self.loop.time(), self.web.frames
        if not self.web.closing and self.outbox.room():     # who does not read gets its pongs when it does
            self._flush()
        return messages

    def _flush(self) -> None:
        output = self.web.output()
        if output and not self.silent:
            self.outbox.write(output)

    def hang_up(self) -> None:
        """Send the Close that is due; nothing follows it."""
        self._flush()
        self.silent = True

    def _look(self) -> None:
        """Ping it when it is time; give it up when it does not even answer that."""
        now = self.loop.time()
        if self.outbox.writer.transport.is_closing() and not self.gone.is_set():
            return self.task.cancel()       # it reads no more, so that it has not noticed
        if now - self.heard >= DEAD_S and self.reading:
            return self.outbox.writer.transport.abort()
        if now >= self._ping_at and not self.web.closing:      # else the Close would go before the answers
            self._ping_at = now + PING_S
            self.web.ping()
            self._flush()
        self._beat = self.loop.call_at(min(self._ping_at, max(self.heard + DEAD_S, now + 1)), self._look)

    def close(self, code: int) -> None:
        if not self.web:
            return super().close(code)
        if not self.web.closing:
            self.web.close(code)
            self.hang_up()
            self.loop.call_later(CLOSE_S, self.outbox.writer.transport.abort)

    def ended(self) -> None:
        super().ended()
        if self.web:
            self._beat.cancel()


def _callable(program: str, top: str, cwd: str) -> str:
    """How a caller can repeat what it called, in the shortest way that a shell takes."""
    return shlex.quote(".thrum/bin/thrum" if program == top + "/.thrum/bin/thrum" and cwd == top else program)


async def send_bytes(writer, data: bytes) -> None:
    """Send to a client; one that does not read is given WRITE_S to begin, then TimeoutError."""
    writer.write(data)
    if writer.transport.get_write_buffer_size():        # most replies fit the socket at once
        await asyncio.wait_for(writer.drain(), WRITE_S)


class RemoteConsole(Console):
    """The console of a client at the other end of a socket."""

    def __init__(self, daemon, connection: Connection, writer, call: bytes):
        fields = unpack(call)
        if len(fields) != 11:
            raise InvalidRequest("this program is older than the daemon; 'thrum init' with the newer one renews the launcher")
        _, program, top, cwd, key, cursor, terminals, size, argv, environ, identities = fields
        words = [word.decode(errors="surrogateescape") for word in unpack(argv)]
        files = unpack(identities)
        variables = dict(item.decode(errors="replace").partition("=")[::2] for item in unpack(environ))
        width, _, self.encoding = size.decode(errors="replace").partition(" ")
        if width == "0":
            width = variables.get("COLUMNS", "")
        super().__init__(
            daemon.world, top=os.fsdecode(top), cwd=os.fsdecode(cwd), argv=words, environ=variables,
            identities=[(os.fsdecode(name), data) for name, data in zip(files[::2], files[1::2])],
            terminals=terminals.decode(errors="replace"), width=int(width) if width.isdecimal() else WIDTH_DEFAULT,
            program=_callable(os.fsdecode(program), os.fsdecode(top), os.fsdecode(cwd)), key=key.decode(errors="replace"),
            cursor=cursor.decode(errors="replace"))
        self.daemon, self.connection, self.writer = daemon, connection, writer
        self._shown = asyncio.Event()
        self._input = None
        self._calls = {}            # method -> how often this command has called it
        self.ended = False          # X was sent

    async def send(self, kind: str, payload: bytes = b"") -> None:
        await send_bytes(self.writer, record(kind, payload))

    async def call(self, method: str, **params):
        params = {name: value for name, value in params.items() if value is not None}
        count = self._calls[method] = self._calls.get(method, 0) + 1
        return await self.daemon.call(method, params, self.connection, f"{self.key} {method} {count}" if self.key else "")

    async def write(self, stream: str, text: str) -> None:
        try:
            data = text.encode(self.encoding or "utf-8", "backslashreplace")
        except LookupError:
            data = text.encode("utf-8", "backslashreplace")
        if data:
            await self.send(stream, data)

    async def end(self, status: int) -> None:
        if not self.ended:
            self.ended = True
            await self.send("X", str(status).encode())
            await self._shown.wait()

    async def _ask(self, kind: str, payload: bytes) -> bytes:
        self._input = asyncio.get_running_loop().create_future()
        await self.send(kind, payload)
        answer = await self._input
        if answer[:1] != b"0":
            raise ThrumError(answer[1:].decode(errors="replace"))
        return answer[1:]

    async def read(self, path: str) -> bytes:
        return await self._ask("N", os.fsencode(path))

    async def load(self, file: str) -> tuple | None:
        return loaded(await self._ask("N", b"\0" + os.fsencode(file)))

    async def save(self, path: str, data: bytes | None) -> None:
        await self._ask("W", pack([os.fsencode(path), b"0" if data is None else b"1" + data]))

    async def ask(self, question: str) -> str:
        return (await self._ask("P", plain(question).encode())).decode(errors="replace").strip()

    async def resume_at(self, cursor: str) -> None:
        self.cursor = cursor
        await self.send("S", cursor.encode())

    def take(self, kind: bytes, payload: bytes) -> None:
        """A record of the client."""
        if kind == b"A":
            self._shown.set()
        elif kind == b"I" and self._input and not self._input.done():
            self._input.set_result(payload)


class Daemon:
    """The process that everybody talks to.  `run` returns when it has stopped."""

    def __init__(self, places: Places, world: World, pages: dict, token: str = ""):
        self.places = places
        self.world = world
        self.pages = pages          # path -> (content type, bytes, ETag)
        self.token = token          # what clients of the port must present; "": nothing
        self.port = 0
        self.ledger = Ledger(places, world)
        self.waiters = Waiters()
        self.audience = Audience()
        self.subscriptions = Subscriptions(self.audience.connections)
        self.streams = Streams(lambda: self.loop.call_later(ACKS_S, self._keep_acks))
        self.connections = set()
        self._opening = {}          # connections to the port without a complete request yet, the oldest first
        self._links = {}            # one-time codes of links to the page -> until when they are good (monotonic s)
        self._told = {}             # agent id -> when its presence was told last (monotonic s)
        self._keeping = set()       # the tasks that write down what streams have acknowledged
        self._hosts = set()         # what clients of the port may call it
        self._sync_told = ""        # what was told of the exchange with the remote last
        self._full_told = -SYNC_S   # monotonic s
        self.log = logging.getLogger("thrum")
        self.stopping = None        # an event, set when the daemon is asked to stop
        self.last_seq = 0           # what readers can see; the journal may be one batch ahead
        self._writes = queue.SimpleQueue()      # lists of (request, future); None to end
        self._collected = []        # what has come in this turn of the loop
        self._pools = {}            # Method.slow -> threads that answer, and (generation, connection) for each of them
        self._acted = set()         # agents that have done something since their worktrees were looked at
        self._server = None
        self._works = {}            # worktree -> what git said about it when it was looked at last
        self._glancing = None       # the task that looks at the worktrees of `_acted`
        self._looking = None        # the task that looks for conflicts
        self._changed = False       # whether it has to look again
        self._looked_at = -LOOK_S   # monotonic s
        self._look_problem = ""
        self.room = CONNECTIONS_MAX

    # ---- from start to end

    async def run(self, listener, ports, ready) -> None:
        """Serve `listener`, and HTTP on the sockets `ports`, until SIGTERM, SIGINT or `daemon.stop`; calls `ready()` when it answers."""
        self.loop = asyncio.get_running_loop()
        self.stopping = asyncio.Event()
        self.last_seq = self.ledger.journal.last
        conflicts = self.ledger.facts["conflicts"] = Conflicts(self.ledger.facts.setdefault("work", Work(self.places, self.world)))
        await self.loop.run_in_executor(None, conflicts.close, False)      # what a crash has left
        self.ledger.facts["stop"] = lambda: self.loop.call_soon_threadsafe(self.stopping.set)
        self.ledger.facts["live"] = lambda kind, data: self.loop.call_soon_threadsafe(self._reported, kind, data)
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self.stopping.set)
        for slow, count in ((False, READERS), (True, SLOW_READERS), (ONE_BY_ONE, 1)):
            stores = queue.SimpleQueue()
            for _ in range(count):      # the slow ones connect when they are first asked
                stores.put((0, None) if slow else (self.ledger.generation, Store(self.places.database, self.world)))
            self._pools[slow] = concurrent.futures.ThreadPoolExecutor(count, "thrum-slow" if slow else "thrum-reader"), stores
        self.subscriptions.load(self.ledger.store)
        writer = threading.Thread(target=self._write_batches, name="thrum-writer")
        writer.start()
        self._server = await asyncio.start_unix_server(self._serve, sock=listener, backlog=BACKLOG)
        web = [await asyncio.start_server(self._serve_web, sock=port, backlog=ACCEPTED_AT_ONCE) for port in ports]
        for port in ports:      # asyncio takes one number for both
            port.listen(BACKLOG)
        if ports:
            self.port = self.ledger.facts["port"] = ports[0].getsockname()[1]
            self.ledger.facts["link"] = self._link
            self._hosts = {f"{name}:{self.port}" for name in LOOPBACK} | set(LOOPBACK if self.port == 80 else ())
            try:
                atomic_write(self.places.var + "/ws.port", b"%d\n" % self.port)
                await self._write(lambda context: context.store.set_meta(ws_port=self.port))
            except (ThrumError, OSError, sqlite3.Error) as error:       # the rest works without it
                self.log.warning("the port %d was not noted: %s", self.port, error)
        chores = [self.loop.create_task(chore) for chore in (self._housekeeping(), self._look_after_claims())]
        self.log.info("started: version %s, pid %d, %d events, %d projected at start, %d damaged lines", __version__, os.getpid(),
                      self.ledger.journal.last, self.ledger.rebuilt, self.ledger.bad_lines.count)
        ready()
        await self.stopping.wait()
        self.log.info("stopping")
        for chore in chores:
            chore.cancel()
        for task in filter(None, (self._looking, self._glancing)):
            task.cancel()
        for server in (self._server, *web):
            server.close()
        for connection in list(self.connections):
            if connection.web and connection.busy <= connection.waiting:
                connection.close(1001)
            elif connection.waiting or not connection.busy:
                connection.task.cancel()
        tasks = [connection.task for connection in self.connections]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=STOP_S)
            for task in late:
                task.cancel()
        try:
            acks = self.streams.take_acks()
            await self._write(lambda context: (self.ledger.note_presence(), note_stream_acks(context, acks)))
        except ThrumError as error:             # a full disk: who was here is not worth more
            self.log.warning("who was here was not noted: %s", error)
        self._writes.put(None)
        await self.loop.run_in_executor(None, writer.join)
        await self.loop.run_in_executor(None, conflicts.close)
        for threads, _ in self._pools.values():
            threads.shutdown(cancel_futures=True)

    async def _housekeeping(self) -> None:
        """What has to be done from time to time; nothing is done, and nothing wakes, more often than once a minute."""
        while not self.stopping.is_set():
            await asyncio.sleep(SYNC_S)
            try:
                await self._look_after()
            except Exception as error:      # a full or slow disk, most likely: it is tried again
                self.log.warning("housekeeping was cut short: %s", error)

    async def _look_after_claims(self) -> None:
        """Do what is due about claims when it is due; nothing wakes it but that, and that claims have changed."""
        wake = asyncio.Event()
        self.waiters.add(CLAIM_CHANGES, wake.set)
        while not self.stopping.is_set():
            wake.clear()
            try:
                due = await self._write(claims_step)
                left_s = min((due - self.world.now_ns()) / NS, SYNC_S) if due < FAR else None      # the clock may be set, or have slept
            except Exception as error:      # a full or slow disk, most likely: it is tried again
                self.log.warning("claims were not looked after: %s", error)
                left_s = SYNC_S
            try:
                await asyncio.wait_for(wake.wait(), left_s)
            except asyncio.TimeoutError:
                pass

    async def _look_after(self) -> None:
        now = self.world.monotonic()
        for connection in list(self.connections):
            if not (connection.busy or connection.web) and now - connection.since > IDLE_S \
                    and not self.subscriptions.any_of(connection.agents):
                connection.task.cancel()
            elif connection.waiting and connection.reader and connection.has_left():
                connection.task.cancel()    # it had only stopped to send when we looked last
            elif (connection.busy or connection.waiting) and connection.agent:      # whoever waits is here
                self.ledger.seen[connection.agent] = self.world.now_ns()
            for agent_id in list(connection.agents) if self.subscriptions.any_of(connection.agents) else ():
                self._heard_of(agent_id, connection)        # and so is who listens: a page, or an agent's program
        if not os.path.exists(self.places.var + "/thrum.pid") or read_pid(self.places) not in (0, os.getpid()):
            self.log.warning("%s is gone, or another daemon's: stopping", self.places.var)
            self.stopping.set()
            return
        if self.ledger.seen:
            await self._write(lambda context: self.ledger.note_presence())
        if self.ledger.unsynced():
            await self._write(lambda context: self.ledger.flush(sync=True))
        if self._acted and (not self._glancing or self._glancing.done()):
            self._glancing = self.loop.create_task(self._glance())

    async def _glance(self) -> None:
        """Look at the worktrees of those who have done something: whoever works need not send heartbeats."""
        for agent_id in sorted(self._acted)[:LOOKS_MAX]:
            self._acted.discard(agent_id)
            try:
                session_id = await self._read(_to_look_at, {"agent_id": agent_id})
                if session_id:
                    await self.call("session.heartbeat", {"session_id": session_id}, None)
            except ThrumError as error:     # it has ended meanwhile, or the disk is full
                self.log.info("%s was not looked at: %s", agent_id, error)

    def worktrees_changed(self) -> None:
        """Look for conflicts in the background, and tell those whom they concern; one look for all calls within LOOK_S."""
        self._changed = True
        if not self._looking or self._looking.done():
            self._looking = self.loop.create_task(self._look_for_conflicts())

    async def _look_for_conflicts(self) -> None:
        while self._changed:
            while (left := self._looked_at + LOOK_S - self.world.monotonic()) > 0:
                await asyncio.sleep(left)
            self._looked_at, self._changed, problem = self.world.monotonic(), False, ""
            try:
                news = await self._read(conflict_news, {}, slow=ONE_BY_ONE)
                if news:
                    await self._write(lambda context, news=news: tell_of_conflicts(context, news))
                    self._tell("work", "work", {"conflicts": True})
            except Exception as error:
                problem = str(error)
            if problem and problem != self._look_problem:       # git may be too old: once is enough
                self.log.warning("conflicts were not looked for: %s", problem)
            self._look_problem = problem

    # ---- the writer

    def _write_batches(self) -> None:
        """The writer's thread: takes what has come as one batch, until it is told to end."""
        going, waiting = True, []
        while going or waiting:
            try:
                while len(waiting) < BATCH_MAX:
                    came = self._writes.get(not waiting and going, FLUSH_S if self.ledger.restless() else None)
                    going = going and came is not None
                    waiting += came or ()
            except queue.Empty:
                pass
            if not waiting and going:
                self._idle()
            batch, waiting = waiting[:BATCH_MAX], waiting[BATCH_MAX:]
            if batch:
                try:
                    outcomes, events = self.ledger.commit([request for request, _ in batch if request is not HEAL])
                    outcomes = iter(outcomes)
                    outcomes = [self.ledger.heal() if request is HEAL else next(outcomes) for request, _ in batch]
                except Exception as error:      # whatever it is, nobody must wait for ever
                    self.log.exception("a batch failed")
                    outcomes, events = [InternalError(f"internal error: {error}")] * len(batch), []
                self.loop.call_soon_threadsafe(self._committed, batch, outcomes, events, self._news(events))
        try:
            self.ledger.close()
        except Exception:       # the next start finds no mark of a clean end, and looks at everything
            self.log.exception("closing failed")

    def _news(self, events: list) -> tuple:
        """What a batch means for subscribers and for streams; None: it is not known, and they have to look themselves."""
        notes = news = None
        try:
            notes = self.subscriptions.news(self.ledger.store, events)
            news = stream_news(self.ledger.store, events if self.streams else [])
        except Exception:       # it is stored, and who asks will find it
            self.log.exception("listeners were not told")
            if notes is None:
                self.subscriptions.stale = True
        return notes, news

    def _idle(self) -> None:
        try:
            self.ledger.idle()
        except Exception:       # whatever it is, the writer must go on
            self.log.exception("what can wait has failed")

    def _committed(self, batch: list, outcomes: list, events: list, news: tuple) -> None:
        """Tell everybody, listeners before senders."""
        if events:
            self.last_seq = events[-1][0]
        try:
            if news[0] is None:     # what it was, nobody knows: who listens comes again with its cursor
                self.audience.dismiss(1013)
            else:
                self.audience.tell(news[0])
            if self.streams:
                self.streams.publish(news[1], self.world.now_ns())
            self.waiters.publish(events)
        except Exception:           # what was asked for is done and durable
            self.log.exception("listeners were not told")
        if self.ledger.export_problem != self._sync_told:
            self._sync_told = self.ledger.export_problem
            self._tell("sync", "sync", {"sync_state": "error" if self._sync_told else "ok", "problem": self._sync_told})
        for (_, future), outcome in zip(batch, outcomes):
            if future.done():       # who asked has gone, or was told that it takes too long
                continue
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def _tell(self, topic: str, method: str, params: dict) -> None:
        """Push what is no event of the log to those who subscribed to a topic."""
        agents = self.subscriptions.to_topics(topic)
        if agents:
            self.audience.tell([(notification(method, encode(params)), [(agent_id, b"") for agent_id in agents])])

    def _reported(self, kind: str, data: dict) -> None:
        """Tell all who watch of an event of a task, or of telemetry."""
        told = self.streams.tell(kind, data, self.world.now_ns())
        if told:
            self._tell("tasks", kind, told)

    def _keep_acks(self) -> None:
        """Keep what streams have acknowledged; what a crash loses of it only repeats messages."""
        if self.stopping.is_set():
            return              # they are kept at the end
        acks = self.streams.take_acks()

        async def keep():
            try:
                await self._write(lambda context: note_stream_acks(context, acks))
            except Exception as error:          # a full or slow disk: the next ones say more
                self.log.warning("acknowledgements were not kept: %s", error)
        task = self.loop.create_task(keep())
        self._keeping.add(task)         # a task that nobody holds may be collected
        task.add_done_callback(self._keeping.discard)

    def _heard_of(self, agent_id: str, connection: Connection) -> None:
        """Note that somebody calls: it is here, and what concerns it can be pushed over this connection."""
        now = self.world.monotonic()
        connection.agent = agent_id
        if len(self.ledger.seen) < SEEN_MAX:
            self.ledger.seen[agent_id] = self.world.now_ns()
        if connection.reader or connection.web:
            self.audience.bind(connection, agent_id)
        if now - self._told.get(agent_id, -PRESENCE_TELL_S) >= PRESENCE_TELL_S:
            if len(self._told) >= SEEN_MAX:
                self._told.clear()
            self._told[agent_id] = now
            self._tell("presence", "presence", {"agent_id": agent_id, "last_seen_at": stamp_of(self.world.now_ns())})

    async def _write(self, request):
        """What a request to the ledger returns, or raises, once it is durable."""
        future = self.loop.create_future()
        if not self._collected:
            self.loop.call_soon(self._hand_over)
        self._collected.append((request, future))
        late = self.loop.call_later(CALL_S, self._too_late, future)     # wait_for() costs more than the call itself
        try:
            return await future
        finally:
            late.cancel()

    def _hand_over(self) -> None:
        """Give the writer what has come in this turn of the loop, as one batch."""
        collected, self._collected = self._collected, []
        self._writes.put(collected)

    def _too_late(self, future) -> None:
        if not future.done():
            future.set_exception(ThrumError(f"the disk did not answer within {CALL_S} s; the request may still be carried out"))

    # ---- questions

    async def _read(self, handler, params, slow: bool = False):
        threads, stores = self._pools[slow]
        limit_s = SLOW_S if slow else QUERY_S
        try:
            return await self.loop.run_in_executor(threads, self._read_now, stores, limit_s, handler, params)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            healed = await self._write(HEAL)
            self.log.error("the database is damaged (%s); made anew: %s", error, healed)
            return await self.loop.run_in_executor(threads, self._read_now, stores, limit_s, handler, params)

    def _read_now(self, stores, limit_s: float, handler, params):
        generation, store = stores.get()
        try:
            if generation != self.ledger.generation:    # the database was replaced
                if store:
                    store.close()
                generation, store = self.ledger.generation, Store(self.places.database, self.world)
            context = Context(self.world, store, self.ledger)
            return store.within(limit_s, lambda: handler(context, params))
        finally:
            stores.put((generation, store))

    async def _wait(self, method, params: dict, connection: Connection) -> dict:
        """Long-poll: ask, and ask again whenever something came, until there is an answer or the time is up."""
        timeout_s = min(max(params.pop("timeout_ms", WAIT_DEFAULT_MS), 0), WAIT_MAX_MS) / 1000
        if "after_seq" not in params and not params.get("unread"):
            params["after_seq"] = 0 if params.get("created_after") else self.last_seq
        what = types_of(params.get("topics", [])) if method.waits == "events" else \
            "" if params.get("all") else params.get("caller_agent_id", "")
        found = await self._until(lambda: self._read(method.handler, params), timeout_s, connection, what)
        return found or {method.waits: [], "timed_out": True, "after_seq": params.get("after_seq", self.last_seq),
                         "epoch": self.ledger.journal.epoch, "remaining": 0}

    async def _queue(self, change, params: dict, connection: Connection) -> dict:
        """Make a change that may have to wait for its turn; raises Conflict when that does not come in time."""
        timeout_s = min(max(params.pop("wait_ms", 0), 0), TTL_MAX_S * 1000) / 1000
        ticket, refusal = Ticket(), None
        if timeout_s:
            params["ticket"] = ticket
            self.ledger.queue.add(ticket)

        async def attempt():
            nonlocal refusal
            try:
                return await self._write(change)
            except Conflict as error:
                if ticket.wish and not refusal:
                    self._tell("claims", "claim.queue", {"agent_id": ticket.wish.agent_id, "paths": ticket.wish.paths, "waiting": True})
                refusal = error

        try:
            done = await self._until(attempt, timeout_s, connection, CLAIM_ENDS)
        finally:
            self.ledger.queue.discard(ticket)   # what the writer still has of it is refused then
            if ticket.wish:
                self._tell("claims", "claim.queue", {"agent_id": ticket.wish.agent_id, "paths": ticket.wish.paths, "waiting": False})
                self.waiters.wake_all(CLAIM_ENDS)       # whoever was behind may go now
        if not done:
            raise refusal
        return done

    async def _until(self, attempt, timeout_s: float, connection: Connection, what):
        """What `await attempt()` gives, again whenever `what` (see Waiters) has come, until it is something or the time is up.

        Raises ConnectionError when the client has gone.
        """
        deadline, wake = self.world.monotonic() + timeout_s, asyncio.Event()
        token = self.waiters.add(what, wake.set)
        connection.waiting += 1
        waking = self.loop.create_task(wake.wait())
        leaving = self.loop.create_task(connection.left()) if connection.reader or connection.web else None
        try:
            while True:
                if waking.done():       # before asking: what comes while we ask wakes us again
                    wake.clear()
                    waking = self.loop.create_task(wake.wait())
                found = await attempt()
                left = deadline - self.world.monotonic()
                if found:
                    return found
                if left > 0:
                    await asyncio.wait({waking, leaving} - {None}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                    if leaving and leaving.done():
                        raise ConnectionError("the client has gone")
                    if waking.done():
                        continue
                return None
        finally:
            connection.waiting -= 1
            self.waiters.remove(token)
            waking.cancel()
            if leaving:             # a stream has one reader at a time, so this one must have ended
                leaving.cancel()
                await asyncio.wait({leaving})

    async def call(self, name: str, params, connection: Connection, key: str = ""):
        """The result of a method; raises ThrumError.  The one way in for sockets and commands alike.

        A change that comes again with the same key (its client lost the answer) is not made again.
        """
        method = METHODS.get(name)
        if not method:
            raise MethodNotFound("Method not found", f"method '{name}' is not registered")
        web = connection is not None and connection.web
        if method.elsewhere and not web:
            raise ThrumError(method.elsewhere)
        if method.private and web:
            raise MethodNotFound("Method not found", f"method '{name}' is not registered on the WebSocket")
        checked = check_params(method, params)
        if web and connection.person and "caller_agent_id" in method.params:
            checked.setdefault("caller_agent_id", connection.person)
        if name == "subscribe" and not checked.get("caller_agent_id"):      # to be reached over this connection, it has to be known before
            checked["caller_agent_id"] = await self._read(caller_of, checked)
        caller = checked.get("caller_agent_id") or (name == "session.start" and checked["agent_id"])
        if caller and connection:
            self._heard_of(caller, connection)
            if not method.waits and len(self._acted) < SEEN_MAX:
                self._acted.add(caller)
        try:
            while method.indexes and self.ledger.unindexed:
                await self._write(lambda context: self.ledger.index(INDEX_AT_ONCE))
            if method.waits:
                return await self._wait(method, checked, connection)
            only_reads = method.preview and bool(checked.get(method.preview.lstrip("!"))) != (method.preview[0] == "!")
            if not method.writes or only_reads:
                return await self._read(method.handler, checked, method.slow or checked.get("fresh", False))
            prepared = await self._read(method.prepare, checked, slow=True) if method.prepare else None

            def change(context):
                context.prepared = prepared
                return context.store.once(key, lambda: method.handler(context, checked))
            done = await (self._queue(change, checked, connection) if method.queues else self._write(change))
            if prepared:
                work = {**prepared, "git_updated_at": ""}
                if self._works.get(work["worktree_path"]) != work:
                    self._works[work["worktree_path"]] = work
                    self.worktrees_changed()
                    self._tell("work", "work", {"worktree": work["worktree_path"]})
            if name == "user.register":
                connection.person = done["user_id"]
                self._heard_of(connection.person, connection)
            return done
        except (ThrumError, asyncio.CancelledError, ConnectionError):
            raise
        except Exception as error:
            self.log.exception("%s failed", name)
            raise InternalError(f"internal error in {name} ({type(error).__name__}); see 'thrum daemon logs'") from None

    # ---- connections

    async def _serve(self, reader, writer) -> None:
        """A client of the Unix socket, from its first byte to its last."""
        connection = Connection(asyncio.current_task(), self.world.monotonic(), writer)
        self.connections.add(connection)
        try:
            if not _same_user(writer.get_extra_info("socket")):
                return
            if self._is_full(self.room):
                return
            first = await reader.read(65536)
            if first[:1] == b"C":
                await self._serve_command(connection, reader, writer, first)
            elif first:
                await self._serve_calls(connection, reader, writer, first)
        except (ConnectionError, asyncio.CancelledError):
            pass                # it went away, or has to
        except asyncio.TimeoutError:
            writer.transport.abort()    # it does not read: what waits for it is dropped
        except Exception:
            self.log.exception("a connection failed")
        finally:
            self._forget(connection)

    def _is_full(self, room: int) -> bool:
        """Whether too many connections are open; the log says so once a minute."""
        full, now = len(self.connections) > room, self.world.monotonic()
        if full and now - self._full_told >= SYNC_S:
            self._full_told = now
            self.log.warning("a client was turned away: %d connections are open", room)
        return full

    def _forget(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self.audience.leave(connection)
        connection.outbox.writer.close()
        connection.ended()

    async def _serve_calls(self, connection: Connection, reader, writer, data: bytes) -> None:
        """JSON-RPC: one line after the other, each answered before the next is looked at."""
        lines = Lines(REQUEST_MAX)
        connection.reader, connection.socket = reader, writer.get_extra_info("socket")
        while data:
            try:
                complete = lines.feed(data)
            except InvalidRequest as error:
                return await connection.outbox.send(encode_reply(Call(), error=error) + b"\n")
            for line in complete:
                connection.busy = True
                reply = await self._answer(decode_request(line), connection)
                if reply:
                    await connection.outbox.send(reply + b"\n")
                connection.busy = False
                if self.stopping.is_set() or writer.transport.is_closing():
                    return
                if len(complete) > 1:
                    await asyncio.sleep(0)      # who sends thousands of lines at once must not keep others waiting
            connection.since = self.world.monotonic()
            data, connection.ahead = connection.ahead or await reader.read(65536), b""

    # ---- the port: HTTP and WebSocket

    async def _serve_web(self, reader, writer) -> None:
        """A client of the port, from its first byte to its last."""
        connection = WebConnection(asyncio.current_task(), self.world.monotonic(), writer)
        self.connections.add(connection)
        try:
            if not _same_user_behind(writer.get_extra_info("socket")):
                return writer.transport.abort()     # somebody else's process learns nothing, not even why
            if self._is_full(self.room - UNIX_RESERVED):
                return
            if len(self._opening) >= OPENING_MAX:
                oldest = next(iter(self._opening))
                del self._opening[oldest]           # at once: hundreds may come before it has noticed
                oldest.outbox.writer.transport.abort()
            self._opening[connection] = True
            await self._serve_http(connection, reader)
        except (ConnectionError, asyncio.CancelledError, asyncio.TimeoutError):
            pass                # it went away, has to, or says nothing
        except Exception:
            self.log.exception("a connection failed")
        finally:
            self._opening.pop(connection, None)
            self._forget(connection)

    async def _serve_http(self, connection: WebConnection, reader) -> None:
        """Requests, one after the other, until one asks for a WebSocket."""
        buffer, keeps = bytearray(), True
        while keeps and not self.stopping.is_set():
            self._opening[connection] = True
            head_only = False
            try:
                head = await asyncio.wait_for(_receive(reader, buffer, lambda: decode_head(buffer)), HANDSHAKE_S)
                if not head:
                    return
                connection.busy, head_only, keeps = True, head.method == "HEAD", head.keeps
                self._admit(head)
                work = self._socket_at(head)
                if work:
                    limit, serve = work
                    connection.outbox.write(accept_upgrade(head))
                    self._opening.pop(connection, None)
                    connection.upgrade(limit)
                    connection.busy = False
                    return await self._serve_socket(connection, reader, bytes(buffer), serve(head))
                body = await self._receive_body(connection, head, reader, buffer)
                self._opening.pop(connection, None)
                status, headers, body = await self._respond(head, body, connection)
            except HttpError as error:      # what was not read of it would be taken for the next request
                status, headers, body, keeps = error.http, {**error.headers, "Content-Type": TEXT_TYPE}, f"{error}\n".encode(), False
            headers = {**SECURITY_HEADERS, **headers, "Connection": "keep-alive" if keeps else "close"}
            await connection.outbox.send(encode_response(status, headers, body, head_only=head_only))
            connection.busy, connection.since = False, self.world.monotonic()
            if connection.outbox.transport.is_closing():
                return
            if buffer:
                await asyncio.sleep(0)      # who sends hundreds of requests at once must not keep others waiting

    async def _receive_body(self, connection: WebConnection, head, reader, buffer: bytearray) -> bytes:
        if head.length > BODY_MAX:
            raise HttpError(413)
        if head.headers.get("expect", "").lower() == "100-continue" and head.version == "1.1":     # RFC 9110, section 10.1.1
            connection.outbox.write(b"HTTP/1.1 100 Continue\r\n\r\n")

        def take():
            if len(buffer) < head.length:
                return None
            body = bytes(buffer[:head.length])
            del buffer[:head.length]
            return (body,)
        found = await asyncio.wait_for(_receive(reader, buffer, take), HANDSHAKE_S)
        if not found:
            raise ConnectionError("the client has gone")
        return found[0]

    def _admit(self, head) -> None:
        """Raise HttpError unless a request is from this machine's browser at our own page, from no browser, or has the token.

        The name in `Host` must be a loopback one (another that leads here is DNS rebinding), `Origin` our own.  A cookie
        stands for the token only where the page is ours: a browser sends it from other ports of localhost, too.
        """
        if head.headers.get("host", "").lower() not in self._hosts:
            raise HttpError(403)
        authorization = head.headers.get("authorization", "")
        given = head.query.get("token") or (authorization[7:].strip() if authorization[:7].lower() == "bearer " else "")
        proven = bool(self.token) and hmac.compare_digest(given.encode(), self.token.encode())
        origin, site = head.headers.get("origin"), head.headers.get("sec-fetch-site", "none").lower()
        foreign = origin is not None and origin.lower() not in {"http://" + host for host in self._hosts}
        visits = head.headers.get("sec-fetch-mode") == "navigate" and head.method == "GET" and not head.path.startswith(NO_PAGES)
        if (foreign or (site not in ("none", "same-origin") and not visits)) and not proven:
            raise HttpError(403)
        if self.token and not proven and (head.upgrades or head.path != "/" or "link" not in head.query):
            if not self._has_cookie(head):
                raise HttpError(401)

    def _has_cookie(self, head) -> bool:
        return hmac.compare_digest(_cookie(head, self._cookie_name()).encode(), self._cookie().encode())

    def _cookie_name(self) -> str:
        return "thrum_" + self.ledger.daemon_id[2:]     # the ports of a host share their cookies, and one may move to another port

    def _cookie(self) -> str:
        """What the browser of somebody with a link gets in place of the token."""
        return hmac.new(self.token.encode(), self.ledger.daemon_id.encode(), "sha256").hexdigest()

    def _link(self) -> str:
        """The address of the page; where there is a token, with a code that is good once, for LINK_S."""
        if not self.token:
            return f"http://localhost:{self.port}/"
        now, code = self.world.monotonic(), self.world.random(16).hex()
        for old, until in list(self._links.items()):
            if until < now or len(self._links) > LIST_MAX:
                self._links.pop(old, None)
        self._links[code] = now + LINK_S
        return f"http://localhost:{self.port}/?link={code}"

    def _socket_at(self, head) -> tuple | None:
        """For a request that asks for a WebSocket: its message limit, and what serves it; None for any other."""
        if not head.upgrades and head.path != "/ws" and not head.path.startswith("/ws/"):
            return None
        calls = REQUEST_MAX, self._work_calls
        found = {"/": calls, "/ws": calls, "/ws/stream": (STREAM_MESSAGE_MAX, self._work_stream)}.get(head.path)
        if head.path == "/ws/echo" and os.environ.get("THRUM_WS_ECHO") == "1":
            found = ECHO_MAX, self._work_echo
        if not found:
            raise HttpError(404)
        if not is_label(head.query.get("instance_id") or "user"):
            raise HttpError(400)
        return found

    async def _respond(self, head, body: bytes, connection: WebConnection) -> tuple:
        """(status, headers, body) for a request."""
        if head.path == "/health":
            _only(head, "GET", "HEAD")
            return _json_response({
                "status": "healthy", "connections": sum(bool(one.web) for one in self.connections),
                "timestamp": self.world.now_ns() // NS})
        if head.path.startswith("/api/"):
            return await self._respond_api(head, body, connection)
        _only(head, "GET", "HEAD")
        if head.path == "/" and self.token and "link" in head.query and head.method == "GET":      # a preview does not use it up
            if self._links.pop(head.query["link"], 0) < self.world.monotonic():
                if self._has_cookie(head):
                    return 303, {"Location": "/"}, b""
                raise HttpError(401)
            return 303, {"Location": "/", "Set-Cookie": f"{self._cookie_name()}={self._cookie()}; Path=/; HttpOnly; SameSite=Strict"}, b""
        found = self.pages.get(head.path) or (None if head.path.startswith("/assets/") else self.pages.get("/"))
        if not found:
            raise HttpError(404)
        kind, page, tag = found
        headers = {"Content-Type": kind, "ETag": tag, "Cache-Control": "no-cache",
                   "Content-Security-Policy": PAGE_POLICY.format(head.headers["host"])}
        if tag in head.headers.get("if-none-match", ""):
            return 304, headers, b""
        return 200, headers, page

    async def _respond_api(self, head, body: bytes, connection: WebConnection) -> tuple:
        """What agents report of their tasks, and its replay: the paths are those of the reference's coordinator."""
        method = {"/api/coordinator/events": "task.report", "/api/telemetry": "telemetry.report"}.get(head.path)
        replay = re.fullmatch("/api/coordinator/tasks/([^/]+)/events", head.target.partition("?")[0])      # an id may hold a %2F
        try:
            if method:
                _only(head, "POST")
                done = await self.call(method, decode_object(body), connection)
                return _json_response(done)
            if not replay:
                raise HttpError(404)
            _only(head, "GET", "HEAD")
            numbers = {name: decode(head.query[name]) for name in ("limit", "turn") if head.query.get(name)}
            texts = {name: head.query[name] for name in ("type", "format") if head.query.get(name)}
            found = await self.call("task.events", {"task_id": unquote(replay[1]), **numbers, **texts}, connection)
            if "text" in found:
                return 200, {"Content-Type": TEXT_TYPE, "Cache-Control": "no-store"}, found["text"].encode()
            return _json_response(found)
        except NotFound as error:
            return _json_response({"error": str(error)}, 404)
        except InternalError:
            raise HttpError(500) from None
        except HttpError:
            raise
        except ThrumError as error:
            return _json_response({"error": str(error)}, 400)
        except ValueError:
            return _json_response({"error": "the body must be a JSON object, limit and turn integers"}, 400)

    async def _serve_socket(self, connection: WebConnection, reader, data: bytes, work) -> None:
        """A WebSocket: reads what comes, while `work(connection, inbox)` answers one message after the other.

        What came before the end is still answered, and the Close follows.
        """
        inbox = asyncio.Queue(AHEAD_MAX)
        working = self.loop.create_task(work(connection, inbox))
        working.add_done_callback(lambda task: self._work_ended(connection, task))
        ending = None
        try:
            while not connection.web.closed:
                for message in connection.feed(data) if data else ():
                    connection.reading = not inbox.full()
                    await inbox.put(message)
                    if connection.outbox.transport.is_closing() and not connection.web.closed:
                        return          # it has gone without a word: thousands of calls may be left
                connection.reading = True
                if not connection.web.closed:
                    data = await reader.read(65536)
                    if len(data) == 65536:
                        await asyncio.sleep(0)      # there is more, and others wait, too
                    elif not data:
                        connection.web.feed(data)
            connection.gone.set()
            ending = self.loop.create_task(inbox.put(None))
            await asyncio.wait({working}, timeout=CALL_S)
            connection.hang_up()
        finally:
            for task in filter(None, (working, ending)):
                task.cancel()
            await asyncio.wait({working})

    def _work_ended(self, connection: WebConnection, task) -> None:
        """Close what a task served that has ended by itself."""
        if not task.cancelled():
            error = task.exception()
            if error and not isinstance(error, ConnectionError):
                self.log.error("a WebSocket failed", exc_info=error)
            connection.close(1011 if error else 1000)

    def _work_calls(self, head):
        async def work(connection: WebConnection, inbox) -> None:
            """JSON-RPC: one call, or a batch, in each message.  What waits, or asks git, is answered when it is done."""
            aside = set()

            async def answer(calls):
                connection.busy += 1
                try:
                    reply = await self._answer(calls, connection)
                    if reply:
                        await connection.answer(reply)
                except ConnectionError:     # nobody waits for it; what it has sent before it went is done all the same
                    pass
                finally:
                    connection.busy -= 1
                if self.stopping.is_set() and not connection.busy:
                    connection.close(1001)

            def answered(task):
                aside.discard(task)
                if not task.cancelled() and task.exception():
                    self._work_ended(connection, task)
            try:
                while (came := await inbox.get()) is not None:
                    calls = decode_request(came[1])
                    if len(aside) < ASIDE_MAX and any(call.method in METHODS and METHODS[call.method].takes_long() for call in calls[0]):
                        aside.add(task := self.loop.create_task(answer(calls)))
                        task.add_done_callback(answered)
                    else:
                        await answer(calls)
                if aside:
                    await asyncio.wait(aside)
            finally:
                for task in aside:
                    task.cancel()
        return work

    def _work_stream(self, head):
        async def work(connection: WebConnection, inbox) -> None:
            """Follows threads: one task hears the client, the other sends what is due."""
            outbox, woken = connection.outbox, asyncio.Event()
            outbox.writer.transport.set_write_buffer_limits(0)      # so that drain() waits until all has left

            def send(payload: bytes, spare: int) -> bool:
                return not connection.silent and outbox.room() > spare and outbox.put([connection.framed(payload)])

            async def drained() -> None:
                if outbox.room() <= STREAM_RESERVE:
                    await outbox.writer.drain()

            async def wait(seconds: float | None) -> None:
                timer = seconds is not None and self.loop.call_later(seconds, woken.set)
                try:
                    await woken.wait()      # wait_for() of Python 3.9 to 3.11 may swallow a cancellation
                finally:
                    timer and timer.cancel()
                    woken.clear()
            stream = self.streams.open(head.query.get("instance_id", ""), self.world.now_ns(), send, connection.close, woken.set)
            serving = self.loop.create_task(serve_stream(
                stream, lambda handler, params: self._read(handler, params), drained, wait, self.world.now_ns))
            serving.add_done_callback(lambda task: self._work_ended(connection, task))
            try:
                while (came := await inbox.get()) is not None:
                    await hear_stream(stream, came[1], lambda handler, params: self._write(lambda context: handler(context, params)),
                                      self.world.now_ns)
            finally:
                serving.cancel()
                self.streams.close(stream)
        return work

    def _work_echo(self, head):
        async def work(connection: WebConnection, inbox) -> None:
            """Gives back every message: what suites that test a WebSocket server want."""
            while (came := await inbox.get()) is not None:
                await connection.answer(came[1], came[0])
        return work

    async def _answer(self, request: tuple, connection: Connection) -> bytes:
        """The answer to what `decode_request` gives."""
        (calls, is_batch), replies, size = request, [], 0
        for call in calls:
            try:
                if call.error:
                    raise call.error
                if size > ANSWERS_MAX:
                    raise ThrumError(f"the answers to this batch are larger than {ANSWERS_MAX:,} bytes; ask for less at once")
                reply = encode_reply(call, await self.call(call.method, call.params, connection))
            except ThrumError as error:
                reply = encode_reply(call, error=error)
            if call.answered or (call.error and call.id is None and not call.method):
                replies.append(reply)
                size += len(reply)
        if is_batch and replies:
            return b"[" + b",".join(replies) + b"]"
        return b"".join(replies)

    async def _serve_command(self, connection: Connection, reader, writer, data: bytes) -> None:
        """A command: runs while its client is there; what it has queued is finished all the same."""
        connection.busy = True
        records = Records(2 * REQUEST_MAX)
        found = records.feed(data)
        while not found:
            data = await asyncio.wait_for(reader.read(65536), WRITE_S)
            if not data:
                return
            found = records.feed(data)
        version = b"".join(unpack(found[0][1])[:1])     # the first field for ever: the others may change
        if version_key(version.decode(errors="replace")) > version_key(__version__):
            return await send_bytes(writer, record("U"))
        try:
            console = RemoteConsole(self, connection, writer, found[0][1])
        except InvalidRequest as error:
            return await send_bytes(writer, record("E", error_line(error).encode()) + record("X", b"1"))
        running, reading = self.loop.create_task(self._run_command(console)), None
        try:
            while not running.done():
                reading = self.loop.create_task(reader.read(65536))
                await asyncio.wait((reading, running), return_when=asyncio.FIRST_COMPLETED)
                if not reading.done():
                    break
                data = reading.result()
                if not data:
                    break
                for kind, payload in records.feed(data):
                    console.take(kind, payload)
            if running.done():
                await running
        finally:
            running.cancel()
            if reading:
                reading.cancel()
            writer.close()

    async def _run_command(self, console: RemoteConsole) -> None:
        row = COMMANDS.get(split_command(console.argv, COMMANDS)[0])
        if not row:
            return await console.send("H")
        if not all(map(is_unicode, console.argv)):
            await console.write("E", "Error: the command line is not valid UTF-8\n")
            return await console.end(row.failure)
        try:
            status = await run_command(console, COMMANDS)
        except (ConnectionError, asyncio.TimeoutError, asyncio.CancelledError):
            raise
        except Exception:
            self.log.exception("%s failed", console.argv[:2])
            await console.write("E", "Error: internal error; see 'thrum daemon logs'\n")
            status = row.failure
        await console.end(status)


async def _receive(reader, buffer: bytearray, take):
    """What `take()` finds in the buffer as more and more arrives; None when the client ends before."""
    while True:
        found = take()
        if found is not None:
            return found
        data = await reader.read(65536)
        if not data:
            return None
        buffer += data


def _cookie(head, name: str) -> str:
    """A cookie of a request, "" without it (RFC 6265, section 4.2)."""
    for pair in head.headers.get("cookie", "").split(";"):
        key, _, value = pair.strip().partition("=")
        if key == name:
            return value
    return ""


def _only(head, *methods) -> None:
    if head.method not in methods:
        raise HttpError(405, {"Allow": ", ".join(methods)})


def _json_response(value, status: int = 200) -> tuple:
    return status, {"Content-Type": "application/json", "Cache-Control": "no-store"}, encode(value) + b"\n"


def _to_look_at(context: Context, params: dict) -> str | None:
    """The open session of an agent of this machine, if it is time to look at its work again."""
    session = context.store.open_session(params["agent_id"])
    if session and session["daemon"] == context.ledger.daemon_id:
        work = context.store.work_context(session["session_id"]) or {}
        if (work.get("git_updated_at") or "") <= stamp_of(context.world.now_ns() - SYNC_S * NS):
            return session["session_id"]
    return None


def _same_user(sock) -> bool:
    """Whether the process at the other end runs as this user (or as root)."""
    if sys.platform == "linux":
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return struct.unpack("3i", credentials)[1] in (os.getuid(), 0)
    if sys.platform == "darwin":            # struct xucred: version, uid
        return struct.unpack("II", sock.getsockopt(0, 1, 8))[1] in (os.getuid(), 0)
    return True


def _same_user_behind(sock) -> bool:
    """Whether the process at the other end of a loopback connection runs as this user (or as root).  Linux only.

    The kernel is asked for that one socket (sock_diag(7)); one that was closed has no owner any more, and counts as
    somebody else's.
    """
    if sys.platform != "linux":
        return True
    try:
        (host, port), (own_host, own_port) = sock.getpeername()[:2], sock.getsockname()[:2]
    except OSError:             # ENOTCONN: it has gone before we looked
        return False
    pad = bytes(12 if sock.family == socket.AF_INET else 0)
    ends = struct.pack(">HH", port, own_port) + b"".join(socket.inet_pton(sock.family, one) + pad for one in (host, own_host))
    # struct inet_diag_req_v2: family, protocol, ext, pad, states, then the ends, interface and two words of no cookie
    request = struct.pack("=BBBxI", sock.family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF) + ends + struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as kernel:
            kernel.setblocking(False)
            kernel.send(struct.pack("=IHHII", 16 + len(request), SOCK_DIAG_BY_FAMILY, 1, 1, 0) + request)
            answer = kernel.recv(4096)
        if struct.unpack_from("=H", answer, 4)[0] == SOCK_DIAG_BY_FAMILY and len(answer) >= 88:
            uid, inode = struct.unpack_from("=II", answer, 80)
            return bool(inode) and uid in (os.getuid(), 0)
        return False
    except OSError:             # a container that forbids netlink
        return _owner_in_proc(ends, sock.family) in (os.getuid(), 0)


def _owner_in_proc(ends: bytes, family: int) -> int:
    """The same from /proc/net/tcp, -1 when nobody owns it; reads through all connections of the machine."""
    def shown(port: bytes, address: bytes) -> str:
        size = 4 if family == socket.AF_INET else 16
        words = struct.unpack(f"={size // 4}I", address[:size])
        return "".join("%08X" % word for word in words) + ":%04X" % int.from_bytes(port, "big")

    wanted = [shown(ends[:2], ends[4:20]), shown(ends[2:4], ends[20:36])]
    try:
        with open("/proc/net/tcp" + "6" * (family == socket.AF_INET6), encoding="ascii") as file:
            for line in file:
                fields = line.split()
                if fields[1:3] == wanted:
                    return int(fields[7]) if int(fields[9]) else -1
    except (OSError, ValueError, IndexError):
        pass
    return -1


def open_port(wanted: list) -> list:
    """Listening sockets on one loopback port, the first of `wanted` that is free, else one above PORT_DEFAULT, else any."""
    for port in (*wanted, *range(PORT_DEFAULT, PORT_DEFAULT + PORTS_TRIED), 0):
        try:
            return _listen(port)
        except OSError:
            pass                # somebody else has it
    return []


def _listen(port: int) -> list:
    """Sockets on a port of 127.0.0.1 and ::1, where there is one: `localhost` is both, and nobody else shall have the other."""
    made = []
    try:
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            try:
                one = socket.socket(family, socket.SOCK_STREAM)
                made.append(one)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)       # of those that it accepts
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind((host, port))
                one.listen(BACKLOG)
                port = one.getsockname()[1]
            except OSError as error:
                if family == socket.AF_INET or error.errno == errno.EADDRINUSE:
                    raise
                made.pop().close()      # no IPv6 here
        return made
    except OSError:
        for one in made:
            one.close()
        raise


def take_lock(path: str, wait_s: float) -> int:
    """An exclusive flock(2) on a file, as a descriptor that holds it; -1 when another has it for `wait_s` seconds.

    The file stays: who unlinks it lets two processes hold "the" lock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    give_up_at = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                raise
        if time.monotonic() >= give_up_at:
            os.close(descriptor)
            return -1
        time.sleep(LOCK_RETRY_S)


def daemon_process(places: Places, report, pages: dict) -> int:
    """Be the daemon of a repository, which serves `pages`.

    `report(text)` is called with "..." while a rebuild goes on, then once with "" when it answers or with what is wrong.
    """
    world = World()
    try:
        os.umask(0o077)
        make_folder(places.var, 0o700)
        lock = take_lock(places.var + "/thrum.lock", 0)
        if lock < 0:
            if answers(places.var):
                raise Conflict(f"daemon is already running{_pid_text(places)} for repo {places.root}")
            lock = take_lock(places.var + "/thrum.lock", STOP_S)    # one that stops, or starts
            if lock < 0:
                raise Conflict(f"daemon lock held by another process{_pid_text(places)}; "
                               "'thrum daemon stop' ends it")
        os.chmod(places.var, 0o700)
        os.chdir(places.var)    # so that no path of a socket is too long
        handler = __import__("logging.handlers").handlers.RotatingFileHandler(
            places.log, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
        handler.formatter.converter = time.gmtime
        logging.getLogger("thrum").addHandler(handler)
        logging.getLogger("thrum").setLevel(logging.INFO)
        logging.getLogger("asyncio").addHandler(handler)
        git = Git(places.root)
        git.run("rev-parse", "--git-dir")
        ensure_branch(places)
        config = load_config(places.thrum)
        daemon = Daemon(places, world, pages, setting_in_effect(config, "daemon.ws_token", os.environ)[0])
        daemon.ledger.open(read_repo_id(git), lambda: report("..."))
        daemon.ledger.facts.update(started=world.monotonic())
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = CONNECTIONS_MAX + OWN_FILES
        if soft != resource.RLIM_INFINITY and soft < wanted:
            soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            daemon.room = min(CONNECTIONS_MAX, soft - OWN_FILES)
        remove("thrum.sock")            # we hold the lock, so whoever made it is gone
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind("thrum.sock")
        os.chmod("thrum.sock", 0o600)
        listener.listen(BACKLOG)
        remove("ws.port")               # of one that was killed
        asked = setting_in_effect(config, "daemon.ws_port", os.environ)[0]
        ports = open_port([int(port) for port in (asked, daemon.ledger.store.meta("ws_port", 0)) if str(port).isdecimal() and int(port)])
        if asked != "auto" and str(ports and ports[0].getsockname()[1]) != asked:
            logging.getLogger("thrum").warning("port %s is taken; another one is used", asked)
        atomic_write(places.var + "/thrum.pid", (json.dumps({
            "pid": os.getpid(), "repo_path": places.root, "started_at": stamp_of(world.now_ns()),
            "socket_path": places.var + "/thrum.sock"}, indent=2) + "\n").encode())
    except (ThrumError, OSError, sqlite3.Error) as error:
        report(os_problem(error) if isinstance(error, OSError) else str(error))
        return 1
    except Exception as error:
        logging.getLogger("thrum").exception("the start failed")
        report(f"internal error at start: {error!r}; see 'thrum daemon logs'")
        return 1
    try:
        asyncio.run(daemon.run(listener, ports, lambda: report("")))
    finally:
        if read_pid(places) == os.getpid():     # not another daemon's, in a .thrum that was made anew
            remove(places.var + "/thrum.sock")
            remove(places.var + "/thrum.pid")
            remove(places.var + "/ws.port")
    daemon.log.info("stopped")
    return 0


def _pid_text(places: Places) -> str:
    pid = read_pid(places)
    return f" (PID {pid})" if pid else ""


def read_pid(places: Places) -> int:
    """The process id in the daemon's pid file, 0 without one; a bare number is read too."""
    try:
        with open(places.var + "/thrum.pid", "rb") as file:
            value = json.loads(file.read(4096))
        pid = value.get("pid") if isinstance(value, dict) else value
        return pid if type(pid) is int and pid > 0 else 0
    except (OSError, ValueError):
        return 0


# ================================================================== 24  Client
#
# Most commands run in the daemon.  The launcher (`.thrum/bin/thrum`) carries the source of the functions in
# LAUNCHER_FUNCTIONS and imports this file only when something else is to be done, because an agent calls it at every
# turn: it takes one and a half times as long as an empty Python.  They use nothing but `os`, `sys` and each other.

NOTICE_S = 2                    # seconds of rebuilding after which the person is told why it takes time
START_S = 10                    # seconds that a daemon may take to start
AWAY_S = 60                     # seconds for which a command waits for a daemon that went away
ASK_PIPE_S = 1                  # seconds for which a pipe may take to answer a question
RETRY_S = 0.1                   # seconds between looking for a daemon that somebody else is to start: nothing tells
                                # a waiting process that a file was removed, without a dependency
TOLD_MAX = 1_000                # notifications that a Python program may leave unread: four times what the daemon keeps for it
STATE = {"key": b"", "cursor": b""}


def describe(argv, top, program, version, forwarded, state):
    """The bytes that tell the daemon about this command: who calls from where, and what."""
    encode = os.fsencode
    files = [part for name, data in read_identities(top + "/.thrum") for part in (encode(name), data)]
    if not state["key"]:
        state["key"] = os.urandom(12).hex().encode()
    terminals = "".join(str(n) for n in (0, 1, 2) if os.isatty(n))
    width = os.get_terminal_size(1).columns if "1" in terminals else 0
    environ = [encode(name + "=" + os.environ[name]) for name in forwarded if name in os.environ]
    encoding = sys.stdout.encoding if sys.stdout else "utf-8"
    return pack([version.encode(), encode(program), encode(top), encode(os.getcwd()), state["key"], state["cursor"],
                 terminals.encode(), f"{width} {encoding}".encode(), pack(map(encode, argv)),
                 pack(environ), pack(files)])


def hold_streams():
    """Occupy 0, 1 and 2 where the caller has closed them, lest a socket or file gets their number."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)    # writing to it fails, as it should


def show(descriptor, data):
    """Write all of `data`, also where a harness has made the pipe non-blocking.

    Raises EOFError when stdout takes no more: empty when whoever read it has gone, else with the reason.
    """
    while data:
        try:
            data = data[os.write(descriptor, data):]
        except BlockingIOError:
            import select
            select.select([], [descriptor], [])
        except OSError as error:
            if descriptor == 2:         # there is nobody left to be told
                return
            if error.errno in (9, 32):  # EBADF, EPIPE
                raise EOFError from None
            raise EOFError("cannot write the answer: " + error.strerror) from None


def forward(sock, var, call, state, other):
    """Run a command over a socket: its exit status, or None when the daemon went away or cannot do it.

    Raises EOFError when the answer cannot be shown, or the daemon of `var` does not answer any more: after ANSWER_S
    without a word it is asked whether it lives, then once a minute.
    `other(kind, payload)` gives the answer to a record that only the whole program understands.
    """
    sock.sendall(b"C" + len(call).to_bytes(4, "big") + call)
    rest, held, status, silences = b"", [], None, 0
    while True:
        try:
            data = sock.recv(65536)
        except BlockingIOError:         # nothing for ANSWER_S seconds: `wait` may take its time, a hung daemon not
            silences += 1
            if status is not None:
                return status
            if silences == 1 or silences % 4 == 0:
                alive(var)
            continue
        except ConnectionError:
            data = b""
        if not data:
            return status
        rest, silences = rest + data, 0
        while len(rest) > 4 and len(rest) >= 5 + int.from_bytes(rest[1:5], "big"):
            size = 5 + int.from_bytes(rest[1:5], "big")
            kind, payload, rest = rest[:1], rest[5:size], rest[size:]
            if kind in (b"O", b"E"):
                held.append((1 if kind == b"O" else 2, payload))
                continue
            for descriptor, text in held:
                show(descriptor, text)
            held = []
            if kind == b"X":
                status, answer = int(payload), b"A\0\0\0\0"
            elif kind == b"S":
                state["cursor"] = payload
                continue
            else:
                answer = other(kind, payload)
                if answer is None:
                    return None
                answer = b"I" + len(answer).to_bytes(4, "big") + answer
            try:
                sock.sendall(answer)
            except OSError:
                pass                    # it has gone; what it sent before is still to be read


def context_answer(top, payload):
    """The answer to `N` for a file of the worktree's context."""
    problem, data, changed_ns = look(top, os.fsdecode(payload[1:]))
    if problem:
        return b"1" + problem.encode(errors="replace")
    return b"0" if data is None else b"0" + pack([str(changed_ns).encode(), data])


def give_up(end, argv):
    """The exit status after `show` or `alive` has raised EOFError: a closed pipe is no failure, the rest is."""
    if not end.args:
        return 0
    show(2, ("Error: " + printable(end.args[0]) + "\n").encode(errors="backslashreplace"))
    return 2 if ([word for word in argv if word[:1] != "-"] or [""])[0] == "wait" else 1


def launch(argv, home, program, version, forwarded, words, state, whole):
    """What the launcher does: the exit status of a command; `whole()` is the whole program, imported."""
    hold_streams()
    try:
        if argv and argv[0] in words and "THRUM_HOME" not in os.environ and not any(a.startswith("--repo") for a in argv):
            try:
                top, thrum = locate(os.getcwd())
                if not thrum and not os.path.lexists(top + "/.git"):
                    top, thrum = locate(home)
                sock = dial(thrum + "/var")
                status = forward(sock, thrum + "/var", describe(argv, top, program, version, forwarded, state), state,
                                 lambda kind, payload: context_answer(top, payload) if kind + payload[:1] == b"N\0"
                                 else whole().answer_record(top, argv, kind, payload))
                if status is not None:
                    return status
            except OSError:
                pass            # absent, forbidden, gone: the whole program knows what to do
        return whole().main(argv, home, program, state)
    except EOFError as end:
        return give_up(end, argv)
    except KeyboardInterrupt:
        return 130


LAUNCHER_FUNCTIONS = (locate, context_place, look, read_identities, pack, dial, alive, hold_streams, describe, show, forward,
                      context_answer, printable, give_up, launch)


_stdin = None                   # what was read from it


def answer_record(top: str, argv: list, kind: bytes, payload: bytes) -> bytes | None:
    """The answer to a record other than text: "0" and what was asked for, or "1" and why not; None to end.

    The daemon is told nothing, and writes nothing, that the command line does not name or that lies outside of
    the worktree's `.thrum`.
    """
    if kind == b"N" and payload[:1] == b"\0":
        return context_answer(top, payload)
    if kind == b"N":
        name = os.fsdecode(payload)
        if name != "-" and not any(word == name or word.endswith("=" + name) for word in argv):
            return b"1the daemon asked for a file that the command does not name"
        global _stdin
        try:
            if name != "-" or _stdin is None:   # stdin can be read once, but a command may have to be repeated
                with open(0 if name == "-" else name, "rb", closefd=name != "-") as file:
                    data = file.read(REQUEST_MAX + 1)
                if name == "-":
                    _stdin = data
            else:
                data = _stdin
        except OSError as error:
            return b"1" + os_problem(error).encode(errors="replace")
        if len(data) > REQUEST_MAX:
            return f"1{name} is larger than {REQUEST_MAX:,} bytes".encode(errors="replace")
        return b"0" + data
    if kind == b"W":
        name, data = unpack(payload)
        parts = os.fsdecode(name).split("/")
        if parts[0] != ".thrum" or ".." in parts or len(parts) < 3:
            return b"1the daemon wanted to write outside of .thrum"
        if not os.path.isdir(top + "/.thrum"):      # made by the way, it would hide the one of the main worktree
            return b"1this worktree is not set up; run 'thrum setup' first"
        path = top + "/" + "/".join(parts)
        try:
            if parts[1] == "context":
                path = context_path(top, "/".join(parts[2:]))
            make_folder(os.path.dirname(path))
            if data[:1] == b"1":
                atomic_write(path, data[1:])
            else:
                remove(path)
            return b"0"
        except OSError as error:
            return b"1cannot write: " + os_problem(error).encode(errors="replace")
        except ThrumError as error:
            return b"1" + str(error).encode(errors="replace")
    if kind == b"P":
        show(2, payload)
        try:
            if not os.isatty(0) and not select.select([0], [], [], ASK_PIPE_S)[0]:
                return b"0"                     # a harness that leaves the pipe open will not answer
            return b"0" + os.read(0, 1024).partition(b"\n")[0]
        except OSError as error:
            return b"1cannot read the answer: " + os_problem(error).encode(errors="replace")
    return None                 # U and H: the whole program goes on


class Client:
    """A connection to a repository's daemon for Python programs; see `connect`.

    Once it has called on behalf of an agent, what that agent has subscribed to comes over it, between the replies:

    >>> team.call("subscribe", all=True, topics=["claims"], caller_agent_id="ci")      # doctest: +SKIP
    >>> for method, params in team.notifications():                                    # doctest: +SKIP
    ...     print(params["seq"], method, params.get("preview"))
    """

    def __init__(self, sock, answer_s: float = ANSWER_S):
        self._sock = sock
        self._answer_s = answer_s
        self._lines = Lines(64 * REQUEST_MAX)
        self._ready = []
        self._id = 0
        self._told = collections.deque(maxlen=TOLD_MAX)
        self.missed = 0         # notifications that had to be dropped, the oldest first: `event.wait` gives them again

    def call(self, method: str, **params):
        """The result of a method; raises ThrumError with the daemon's words, Unreachable when it went away."""
        self._id += 1
        line = json.dumps({"jsonrpc": "2.0", "id": self._id, "method": method, "params": params}).encode() + b"\n"
        if len(line) > REQUEST_MAX:
            raise InvalidRequest(f"{method}: the request is larger than {REQUEST_MAX:,} bytes")
        row = METHODS.get(method)
        waits_s = params.get("timeout_ms", params.get("wait_ms", WAIT_DEFAULT_MS if row and row.waits else 0)) / 1000
        limit_s, reply = self._answer_s + (SLOW_S if row and row.slow else waits_s), {}
        give_up_at = time.monotonic() + limit_s
        self._sock.settimeout(limit_s)
        try:
            self._sock.sendall(line)
            while reply.get("id") != self._id:      # another one answers a call that was given up
                reply = self._receive(give_up_at)
        except OSError as error:
            raise Unreachable(f"failed to read response (daemon may be unresponsive — try: thrum daemon restart): "
                              f"{os_problem(error)}") from None
        if "error" in reply:
            kind = {MethodNotFound.code: MethodNotFound, InvalidParams.code: InvalidParams}.get(reply["error"]["code"], ThrumError)
            raise kind(reply["error"]["message"], reply["error"].get("data"))
        return reply["result"]

    def _receive(self, give_up_at: float) -> dict:
        """What the daemon says next until a time (monotonic s); a notification is kept as well.  Raises OSError, Unreachable."""
        while not self._ready:
            self._sock.settimeout(max(give_up_at - time.monotonic(), 0.001))
            data = self._sock.recv(65536)
            if not data:
                raise Unreachable("the daemon closed the connection")
            self._ready += self._lines.feed(data)
        said = json.loads(self._ready.pop(0))
        if "method" in said:
            self.missed += len(self._told) == TOLD_MAX
            self._told.append((said["method"], said["params"]))
        return said

    def next(self, timeout_s: float | None = None) -> tuple | None:
        """The next notification as (method, params), None when none has come in time; raises Unreachable when the daemon went away."""
        give_up_at = FAR if timeout_s is None else time.monotonic() + timeout_s
        while not self._told:
            try:
                self._receive(min(give_up_at, time.monotonic() + ANSWER_S))
            except socket.timeout:      # in Python 3.9 another one than TimeoutError
                if time.monotonic() >= give_up_at:
                    return None
            except OSError as error:
                raise Unreachable(f"the connection to the daemon broke: {os_problem(error)}") from None
        return self._told.popleft()

    def notifications(self, timeout_s: float | None = None):
        """The notifications as they come, each (method, params); ends when none has come for so long."""
        while (told := self.next(timeout_s)) is not None:
            yield told

    def close(self) -> None:
        self._sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *what):
        self.close()


def connect(path: str = ".") -> Client:
    """A client of the daemon for the repository around `path`; starts the daemon when it is absent.

    >>> team = thrum.connect()                                          # doctest: +SKIP
    >>> team.call("message.send", mentions=["@lead"], content="tests are green", caller_agent_id="ci")  # doctest: +SKIP
    """
    places = find_places(path)
    return Client(reach(places))


def reach(places: Places, start: bool = True):
    """A socket to the daemon, started where it is absent and may be.  Raises Unreachable with the way on."""
    try:
        return dial(places.var)
    except OSError as error:
        path = os.environ.get("THRUM_SOCKET") or places.var + "/thrum.sock"
        text = f"failed to connect to daemon at {path}: {error.strerror or error}"
        if error.errno in (errno.EPERM, errno.EACCES):
            raise Unreachable(f"{text}: a sandbox forbids this socket; allow it, or run the command outside") from None
        if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
            raise Unreachable(f"{text}; try 'thrum daemon restart'") from None
        if os.environ.get("THRUM_SOCKET"):
            raise Unreachable(f"{text}; THRUM_SOCKET names it, so it is not started from here") from None
        if not start or not setting_in_effect(load_config(places.thrum), "daemon.autostart", os.environ)[0]:
            raise Unreachable(f"{text}; 'thrum daemon start' starts it") from None
    if os.path.exists(places.var + "/stopped"):
        raise Unreachable("failed to connect to daemon: it was stopped; 'thrum daemon start' starts it again")
    start_daemon(places)
    try:
        return dial(places.var)
    except OSError as error:
        raise Unreachable(f"the daemon started, but does not answer ({error.strerror}); see 'thrum daemon logs'") from None


def start_daemon(places: Places) -> bool:
    """Start the daemon and wait until it answers; False when it runs already.  Raises ThrumError with its words.

    Callers that come at once wait for each other, so that one starts it and the others find it.
    """
    removed = NotInitialized(f"{places.thrum} has gone: thrum was removed; 'thrum init' sets it up again")
    try:
        make_folder(places.var, 0o700)
        lock = take_lock(places.var + "/start.lock", START_S)
    except FileNotFoundError:
        raise removed from None
    except OSError as error:
        raise ThrumError(f"cannot start the daemon: {os_problem(error)}") from None
    if lock >= 0 and not os.path.isdir(places.var):     # while we waited for the lock
        os.close(lock)
        raise removed
    if lock < 0:
        raise ThrumError("timeout waiting for daemon to start: another process has been starting it for "
                         f"{START_S} s; see 'thrum daemon logs'")
    try:
        if answers(places.var):
            return False
        read_end, write_end = os.pipe()
        # Identity is the caller's, not the daemon's: a variable of this agent must not name all others.
        environ = {name: value for name, value in os.environ.items()
                   if not name.startswith(("THRUM_", "GIT_")) or ENVIRONMENT.get(name, "").startswith("of the daemon")}
        code = f"import sys; sys.path.insert(0, {os.path.dirname(places.copy)!r}); import thrum; thrum.main(sys.argv[1:])"
        try:
            process = subprocess.Popen(
                [sys.executable or "python3", "-IS", "-c", code, "daemon", "run", "--repo", places.root, "--ready-fd", str(write_end)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(write_end,),
                start_new_session=True, cwd="/", env=environ)
        finally:
            os.close(write_end)
        said, told, began = "...", False, time.monotonic()
        with os.fdopen(read_end, "rb", 0) as pipe:
            while said == "...":        # it works on its database: as long as it says so, it is alive
                if not select.select([pipe], [], [], START_S)[0]:
                    said = f"no answer within {START_S} s"
                    break
                said = pipe.readline().decode(errors="replace").strip()
                if said == "..." and not told and time.monotonic() - began > NOTICE_S:
                    told = True
                    show(2, b"thrum: the database is made anew from the log; this may take a moment\n")
        if said != "ok":
            kill_group(process.pid)     # the daemon has detached itself from what we started
            process.wait()
            raise ThrumError(f"the daemon did not start: {said or 'it ended'}")
        process.wait()          # the one that detached itself
        return True
    finally:
        os.close(lock)


class LocalConsole(Console):
    """The console of a command that runs in this process."""

    def __init__(self, world: World, places: Places | None, top: str, argv: list, program: str):
        environ = {name: os.environ[name] for name in FORWARDED if name in os.environ}
        terminals = "".join(str(n) for n in (0, 1, 2) if os.isatty(n))
        columns = os.environ.get("COLUMNS", "")
        width = os.get_terminal_size(1).columns if "1" in terminals else int(columns) if columns.isdecimal() else WIDTH_DEFAULT
        super().__init__(world, top=top, cwd=os.getcwd(), argv=argv, environ=environ, identities=read_identities(top + "/.thrum"),
                         terminals=terminals, width=width, program=program)
        self.places = places
        self._client = None

    async def call(self, method: str, **params):
        if not self._client:
            self._client = Client(reach(self.places, start=False))
        return self._client.call(method, **{k: v for k, v in params.items() if v is not None})

    async def write(self, stream: str, text: str) -> None:
        encoding = (sys.stdout.encoding if sys.stdout else None) or "utf-8"
        show(1 if stream == "O" else 2, text.encode(encoding, "backslashreplace"))

    def _ask(self, kind: bytes, payload: bytes) -> bytes:
        answer = answer_record(self.top, self.argv, kind, payload)
        if answer[:1] != b"0":
            raise ThrumError(answer[1:].decode(errors="replace"))
        return answer[1:]

    async def read(self, path: str) -> bytes:
        return self._ask(b"N", os.fsencode(path))

    async def load(self, file: str) -> tuple | None:
        return loaded(self._ask(b"N", b"\0" + os.fsencode(file)))

    async def save(self, path: str, data: bytes | None) -> None:
        self._ask(b"W", pack([os.fsencode(path), b"0" if data is None else b"1" + data]))

    async def ask(self, question: str) -> str:
        return self._ask(b"P", plain(question).encode()).decode(errors="replace").strip()


def run_now(coroutine):
    """The result of a command that never waits for anything but blocking calls."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("a command that runs here has waited")


# ================================================================== 25  Pages
#
# The web page, one file, too: the table below is written by `python3 web/embed.py` from the files in web/.  Edit those,
# never this; a test fails when it is stale.  Only the daemon decodes it.  Every start of this script compiles it: 200 KB
# of page cost 0.6 ms in this form and 1.4 ms as plain text, which would make this file a quarter longer.  Base64, because
# b85decode() is Python and would take the daemon's start 10 ms to save 6 % of the size.

PAGE_FILES = {
    "app.css": ("text/css; charset=utf-8", '"cbee04a039f4484c"', """
eNq9WW1v4zYS/p5fwUsQwM5aWkm2/Io7FNjtAcWhe0C3vS9FP1ASZfEiiYIoJXEX+e83Q4p6s+VkcYfrook1GpOcmWeemWE+PpBfE0YKemRExKRKyjqzCfkkUlGXktCS
kZxmLCKxKMlzQitQYSci6elAUn5MKkLziES0fASNNBXP+J7Ik6wYrPPw8WZfClGRbzeEWNaxFHUe7cldvIr9eHsAUUFzlqIkjvGR54/w4O7c0PPwOasrhl/w6Xq5UZKU
5wwEzGUrRlFAw5DlFYiWgR9EwUHvJAR+zQk2dMlQ65ly1NnCvo6DgoCiAmzje/6h+YYlRYxazIt9vTh+zUjjKHajTfPdTsjWbK03rQQebeXdo45MaCSe98QhbvFCPPi/
PAYzzyGeT1YO+UjW9/MFvMU32/O3q/u5XjQTudiTmqsPsqAhW5Dbr38nP8PjLXz8RGVII06N4GeWp2IBAcylSKkEjc/s3/RfNflKc2mU2rVwj1ig+1zHuf/o2n4TO6vm
C2LRokiZpSW4LTsKRn77CVb4RQSign1uv8AvtTYIJfyyJCt5bNa1JP8TfBKmNCtmrl+8LIiLFn8gtuc9PS+IB0/zA9H/fXwgrk/gdV0QWJWSlBaVKEDLQSmAb/UPxNTr
zQ8ASbB5VpQsZqW0QsBrackwYRlsh3CcK8x16Bvgz2Gu6677+HM3bqAhpyHINozGTh+Cuy31gmUPgt7Gi5bbAQR3Lt3EyvgeCH03jLduD4SxF+yWUQfCON7SLR2D0HWX
jhuPQbj0Peo6IxAuA5e6kdlWw3C9HsAwByEqvILzHsg3EogXjA3Pj3v4XEastEB0gPe/JzyKWP4HKEVcFik96W+Tv/CsEGVF8wrVAhGdQCWj5ZHnAPMDyXhuJQw5QaHp
KTmQgIaPxulPtJyZEEDEVcSMFHwOIvHEyhgoxHouabEHYjk9J6xkuFviLkjiLQhgQaQLUqfDrQsaRcoUB5VbjZRLcFx1SlnjAHi5j0VYS+uJSx6kDJREXemAIi4hZ3jU
HEpHFc+lNSwRx5JVSvFgnFZC7tUSsr5QzgtFhGvqlLJ3HsuaxTDj5lcdohfcK7roHwO3nl/erzXbdnzYyV7CTzyFXeeSsRwOUgjJKy7ASzSARQHKB/LMoypR+xxIGy98
MP7fEw0BCFLKC0gRVOewZDXzHeAlqAO8AlpAAkHHYrjUtvKRFxObpgyRavslnhByek+slfr8JwQ/Yi97suzbg3rEVQrnLlM5O4ZQG63mHDrOcBq1WbPx681Nwij4UVFC
d05Z8fDx1BzM6R0KGKFNgjhl4CQKVS+3wP4MooBbsvJAjohXe6326IzAZ0DpywwNWRDfeXomFtQHeFLkPm1Zm5FVJbIpSEAmN8bw7AiGmrjaG21sG1sjwDRqwNnwsmu7
+lXKKjBEhVSd3bIdV3/lLkNAD1ytGHGuE77Z1JkAxTmkKvZSWZ2YpQAxyaXaSla0Yio0OrctjRpaV+J74rDyR4FQRkI8tHyUSQplw3JlHKZEz40b175z7ieVeCMkIl1f
TPWWx1XstLX7fcCgtdI+BiOQN25v2yS1h6G0L1oASTncLqzLElZSp+oc+3tEK2qpj3+9/fTPL19+/PTrj59v/xiHF4vQZaoy1Wk+sejnn75eWRcK1sVlTSHTq+YCcpFd
y8+QpuHMs3cqqB8wOea9jHUxliOs4M+mqGhYXgHPUkFlO0KQ7393Lvei/e58NtYHNSgq/m4Lm6GXPkx3htTuwNF1lst+zT6WHHoM/GmBnSCD7GzU9pi6ypiVssZz0Awj
dKBHi8t54xBP7QFyk+rbdSNpqm+Tnu1JXdtr2ZusDPF4Q+JpHPyeBFurioGsUZXQX0KygAfromBlSCU7TFCT5g/j8MZ3UBpCCFFlzmJ2XjkXdnbOdzU9xF3FaAaLaBhJ
lsYIUVpCYzSB2aXtDbxmKe9Y9mqIMyVthOhyk/cK8qqnAtDptfr90slwpAxLGMICWppgVQnP1YljBjPct7NWpq2LNkCkOk0xfXtAr1+ZlXuUD7ok6ncxEZUJu97GdKXp
xs5YFkAvfwHDtF/BGz3FEO8DO/pmBO7GX2rlNrUussKYA+xNUy/eqt7v7eSMC1RH3nTrWl8/KWIwRtsxDSt0kTJVWwhRgYHRcofcsNWrXgznW/Ro3LIZudzmqkK9Z/vd
+KswAsrkcknoaQF8J9uNC9adZ/GgcbAN/dgwJ0qWY135jj5i6Z8x7mY77dWprtjs/b8r9QZftt8ibFzy211tHKEmSvxYrXfCa+0Ejn77hMrZmy3AnPQ9f9Frr+3onws1
Uz6C6yQ4UxAuiTo8CHDqtwNg4jAx5B3TjKen/XC+GkCwmYYiVlGeynZitPREsG2wIesM5JPUB8ZLlBaCa2yMS4s/WZbvgGUx50lLWQO36mrST3tTX7DplpIe2SQZrrv0
Uor/HRt2GT/ue7Yt2//fGQ+YTpvV5Idnu4MEMc/jxbVrRr6AzyEbZ/l59zHdZsA5GngkMp3p0yY1m5O1c98cHu9d5qMO97oy8KarLvqGBM8Gw9x4lrto9DkIt229xPvb
ccejrIV3OECec+L1fjkAf2BgO9S0W6nlbMDXVLI3KhVXR7ow5b3N/F5nKmhxCr/zOmMlD6HdoUGdQvcDAjlNyBhldHH/NdCUpRUGJOGOu9+NHyYHUuccb3qsgEd8j+BC
bnip2tXtVORHZWDXw7mqkT0fiDMqHy2eQRLvCboVjn/EuAJIZ3eO48CW9wuiQFnQsr3jgGM+yneEblDKBrZdKG9Xqluz5Wgm6Rep96a/26DFDDntFTTPge55NXWxc4k7
v4t2xtcC/VFvTPM35nz7BEOmbkzVapOXTgpVH7rR7U1fn91S6EuKtnik6p6qC3CQivCxGyGUuiJz59olGTIplGAsmzQHmDUXc2XJnxjQyVoSBvlswWCAuj88slNcAmFI
owLEUYrsLfv7VO6of8vmbxrrNdntiLf0gew8715V/PP7+5JFdcgiKOP6fPp5Dts+DA9+dhOtEoNPvNTzkBWwhD5xPLby1+AiW40eQM4O7KNYGposFKPM7WTe1gi9Trhq
hctOuG2/vuqE7soxUr8nXW81J9Zs3ZPuPKO76R3AbaXbnnTZ7rbrSdetrtuzy9u1h3B7pi2Xqha0Memxna8mTZWivSuG63cKw56iuQ3o43ynxyg1TS0btMP6zUzdH6Ah
5uFwENZ5P3nzD8vAfKRh+z5ibCaEtgnt9Z0LICSCiDqmFNt39ZdNSKUKFSDFKRZpSFEAGV62Q4fabd91fJ3dnt8mePug7b/WqbU/znm0bYDOO8jeSZqG4tIgMdDD0WvR
PepRbzFYBybPv5F9LqqZHufm478R6SW7prRn/aZHtsOxe/CVs/5nO+p/TNv+evMfSpvysA==
"""),
    "app.js": ("text/javascript; charset=utf-8", '"740557269cda775d"', """
eNqtXO9y20aS/+6nGKN8WcCmIWmTXF2RkXVeR5v4zrFTkbeclOMVIWJIIgIBBgCtcGVW7ad7gPt893L7JNe/7pnBDEg5yda5tjbE/Onp6en/06OjI/V6qdU6W2hVz1W3
bDarsbpZ1qpo1VI3eqSyKqeGrKNOvVVttlVdrXQ2W6qaWpqRKov3Or13dET/U68qrd7oq4t6dq27VKmn8043MnpWV5WeMRhZry0WVauKaqTazVU7a4or3cpydVVuMa5S
WXvdqnndCAZFp8psdk2j2pr6qaUiHIpqgaXnWVm26kp3N1pXE5Wp9aZdAt9Whrb1SvNgtcxawmZl9gZ82myl1c8b3XZFXamrhkYRZtjAdLZp2rqZgh4YWW1WV7SjosKS
aMgzvaqrP7Tqp3rTVFmpNmsQ6GZZ0J7dXq+r+qZVhKFa6ballnaipnpdz5ZTVdHiAtyCkK3xSoKpmjf1CjRWb9DFhG/VTVN3mnaMEQRA/wJ65PQT2zKUUbps6XTuEfXb
Tn379Ktzdao+P56oA/8IvMVO0Srzomk7oRFOgA8xqstcN5EB9+zp62dfX/7lWwJ5crwH0wdXVHSommC1N7oZh4SrbyrioVXRGagXX7968/Lym6ffM6ZDsD7Ua73uAJrB
1bPNSlcdKF/SOdVXdU7sOmtqZgtiG/DEIlsTCzULOkIiciWUvtKLogLV9I1B4bvz19/9cPnNhWzseGQbnn4vjZ9S4/HEDP76/Ltzaf5cPVT/ekz/h0kThy84j7FZ6qzJ
IWc3BQ5HVu8KOl8jbQbi6/On3/SrH6ArTVvVNBA0Lev6Wol4Eg9kK+UDHkNmWIgWjr6vz79/ffni1cuvAP9z7O7F85fnF67p3yaWXa62z3NqiYs8UadPHInThe7OS42f
f6IR6KYpRw8fqqcV8ZuWY6AtEsFnZdYKQ87oXPIGoglObQ3femybqodH9+abasZCuMquddxlixHLB2ERRSOVpqkFk6jbe0oJnnbN0x7FWaOzThssAYdQVKqYqxjgEjsl
ZfxeygrowSjbl63Xuspjb9F0XpSk0OKYG5go/EvdP6XpGxLvTz7xWqIo4WUb3ZFgW7iTeztL4HZZN51Z3VK5yNNGr0nP6fjor5uWxOVoBEiGxFDX7c+brNGGxBUdeNEV
pDautkbtgC06Db5f63pN0pCts6abELVK0jBgtkq/ZxHQomuhikPyz7E+MAKVS91BaS4Jy2PsB+oglh1QFzQ88TQGm0Ex//eh+vREPTIj0hkd8bd1UXVPu/g4SdSTJ08E
2PAI+eCjdp1VdOBT4KGWG/3glmH+izr54246Um/pUBzxgOe7t8fv1NmZis6iJDjDpsi+LvKcbAmdR9dsdHTHibitZ4s6XrU+f62KatORvjlV32TdMp2TyDU0RB2RtNM/
/4zt0C/UiSJsSO1Hauy1kno4U9MHt6Zlh65pMOLks8/MGH8x040Vk51aYspdIwCAxuRTj9GevXj17D/B4vpGPa+6Mv2SpOM1KYg/180q6+JNlet5Uel8pG6XxCNjFf3x
cV6Q0qBDENBe0y6xuu/Lpz/8Rqh5tiUIZNR0U8wAtK66JbXwKdL371n1zdevXpz/5nU7fdFtS0Cak4QSZChG27TSebFZMeyeAzDg1Txuu2y19vkAsMyyWNEMuJuJASca
seaKMTft6i8ZHTgYMUn7qQcsGfaemVMbg8pJOpe9AU4SsHhuNk/LMkJ+X1d0JTqYYgGIO6QAPsZj+se6wbhsRBLiI1bkz8iFOW8auAO/dKQcWyVftztjmXrLTk5VATfE
zHxB9uqjM8lQzepNyZ4LGQdYLZ1b/i3pNGkbty07lmPWtWQZCNRYnYwU9DQRbczU/CZbxwmdclPodqyO5bwb/pVv6MyPd/5Zt7q76MxhElkOWhXYQVJJGBA5O+KRPyMg
KXez2vcgBafkDTODJsEQmMJnJBayqBuww7lA9cO5ZkJc6bK+YVKTR0H+2ETp1brbGsPaEe+x2b/JtqFSJ8oWpNZJd8IeGBUnm5OuKLG255mxeP3gyf7YpVWs93lIWupq
0S1DbTojjonhedckjTQsW0GP3u5kccOBOLZvycUtWh3HjW7r8j15543+ibiPjaLQEmQHAVJhgzNCNsu3F47wfeTx6tvzl4mFLnBiLOK4kHdhGVznxlArpm9q2Cml85L1
wGikSwaY7fw5ghJNIY/hPy5evaSDhhwX8218+1NbV816Bl2WHpMyKPKxcnAfPSJdF9BnJ8gAvE/JRs80hVo55DcLzJP4w0RWXpiAEBl5kOVVMyKVdRxhcJDzgiCG/Z7/
ISNmGRD4MRVHZGQXTAVdTwHeZOSJUNBxGtKR/EW3BDuLAzrnJAEkgYMhPuIaZ5ZY+Dh4d6ROJYWDU/NldWWr/dl8jm4CfW/KbkBuwxuxoXRJvju0bL0xPMFapd8Lf1oH
ySmV6Nmrly/Pn71+/vKryKOTMIslk/vCdhwPx9Obdnx09OC2rIX+6ZKYd3d0005lVZpSEwU1XHQKflviy3VTX5EyYW+Z8RCmrKueRWLy/CoRKsdQ3JQ6jnGzAJ6mZO22
mqnYE0S3LhwqEYKu2ZpOBc1TmLAqNjJiqQSlbKmEf3uUOv8yMlN2pDs68mZjc/gWer9J7iD3l1RlNdPkg/ZGhnwvOF4BK7g1ZX+zsiY5sYtB4ILNc/fB3Xvu763RBHCA
A5Z+n5Ub3cZJcof26U0rBXBtd1j/MNNZDHtKffn8Yo9YvfxZL5X8p9jFsQ/VHxVZkP4MoHX8oDahITHcdZ7bUMBWr2jPR+ozHzHL5ISLlQWzkRGvnUxshMoZg/cwu5lk
QFbZFiZty7xDe65cDF6QzRKXoV+IDDUtA3coJReaEHnE8CfODNw3LEjxlnBbo+cULOWguCcFXX2tq8gQMNu+EQ0QmxGiZifWvr5ZaiRWfB9Gsj6NlixYVhGqmWKgbmOI
psiUdHWJPNmWt+OEmASzKHXOZlgYyVPnBmHmql58jG6OZVtzTSIQR0dk6MtuSbbjdpbNlvBcq/px29WNJt81Ya9i07JD+dnxCW/LSE8AlNWE8yl6H2ifMjyPCe0pOwOm
12PZIisq5+5ebbqurozDG72mHSH8IXtR6vkgsvN0ITl97O8YCePBA1do+hJJApCIVjNRzyr7JSbPj3+TGivj2DHOY49xwMJIoiQUEbXpdCJCznin3XbNiQWDd98B4S9m
19RnuFv07fxwOBkkZmyCkDMwM2Jv5Kk4ddZqApb37AIfF/6Lyigozw21HeueOuZNrNsWBMZC4mVhRWfInM2mUgiieA5ibzuHU7zORWe2wRFFLLEZpO86jTyjedfiFtMP
H4CHE5i81rJBSfWl9vhHQlpz7nTisccCtMK1uA2kWCig0w2pz1gYwjO2EHY+haJ9Zh03UvQGHGl71pduvoGaEAYnEqUbOb8oFlWYdzZZTsiaZJpvspYC0LY9LLrGsnku
2LJgRhWZRTblubF8Vop1zl7GSvvNSNdR85x6lnEyGWb5KG4iuuFcPI0kdOWMKos0EEdCmxiKIiZO8ynP0QdisvPBHiySLsGDpD855sg4IRFGGmaBhDgddV605A8ifP+K
W3bwAEd2z2/fTQL9JXBkg+z8RwBJTh3JMnnDIvqHbTuHVXfa9ATXExT38AhR6RaFfdH4od4o5MhEebfqH3//H97OP/7+v2MQyWTkq5qzfqn67g55+cOC49JqXiwU74Oz
kQDfKOSeoj9AeEZyW9FQXJblxPPvRMf6ZOH4fI8qDXFSS/wKxd5TnkiY2i+P/Gg2H7t/mooQWB++qBo56t9D4elHKfzgNvC8dulUaPL76HA3ByaWwBKRrhCNhjaDDtXM
uuRt0rapycLGdJKwp6Rw2rYQQ98uaTs5sqi4p+myqxZeHVl5Ere6EhVB9Gw4wkGKlbMYkkNFTE6CSji3taRfsysk5TNOPni3WjdMLvEp2BSQcuvDAmDgTKHTTrFB/NIE
RkK9uMreF4uMXICUIoTrljThoIWoyndasSj9xxD5xwUOkBeCxuQfcZClxokfVBgOHeDy3KSG2ReG+mDK9LHIRE0sP/qRgVnDP38HF2dPLWMOKkii6nUxa8fqbfQwerf7
lZgAPH+UlZwPUPoX4qX2iBiC9j4IBl3ouynLiTfZok9scv+ItEJGm36vLXvcAWtPWlS4M5mcMmze3YJ48xLRv5Bw54Kjnnp9RLXzcz9P+TozVer1EmEJMaa7BRO+QtIH
vAhTMzL3AHzxQ/wsPgnzZqauNg2xWtEym9o7T+FQcsbrJpd0ftY0BVlRx6R7iSROHMBY2rRF7zOyCWW9YpAkzcImcIZsvZc1YA/j4AyTE4hEXQ07GzKF7wHVBGSAzf5F
7MdpytpdDDbL2tOjU2hxX/B2r/mdOxTrNAsQz2tBbiZlRowbva6bzmjjA9tZbxpkJH7Rsw3STOF2mB84yqs2a0sjfx9maVgVEtL9JQ8tSM6ErpCeE/eC7xxfze32LQva
Q0vhZFy2WleXWefSLkd/jXngB8PCH2ZlVqySH9MPf72pm+sHRh6wamLWEV83j5P9NLLlVJvMxa7gaiDaXtY3VZC2vftSWhW5ekxnaz5HfGsIIeF79DFbJbmtR66X2pd1
U/ytrqRH3XHjjZt1whKBHnLowtx8c16IC0g/J6b8gGQG19/sHUIcIWmk/3A8+EmOfKVpXZBobPOZLtnk743W9aXPtxS2siEzezFXdQv41bjFBnyJ1cYm63MPtoxUxJfG
8jDyGRdesHGCscHdN/IMXkpfzFfR9VUQyEbKNT30Bq7DWepNVBR31GwlztyH1JyVB/VSbDqFFyTjTFLI9vDVLGkR4WAjpFb9GTnDAJYj3pGvKjzHxnCtzgsSJ6fN39dF
Lov50sMNmzWuO/al/5A4yRKCtNDYD3ntdlyO00t+DZe2Cmgww8Xf3rZ5CKPyl7WsLQc/Yvgf0zdMJxtVBAfT6p+RZcMtKUNkMXM5qXcUPK/j2ArSjjG2qpWmhseytzdB
koWOfI4AfZd4CvaBu1pCSFYFfPZu9M8UqJ8kycjae+xWjQWg03neTu3tN/Gl7rPe7QihEOer2WyVpnyGHTrs2rAwOzMWbECsOSn2fOCUWmqUBfuft8j0XLbF38jBQw3N
Lsi6OUtsYZB/XeqY4VqOa32JEMSC7J71Y2XwgXsYf77Q/lQwly+v1+gN220U/M/eCKMY3RC7bJp18eOT5MxUT+RkEvhOPRrgHh/alNhHAdjVXVYOju6pV/xk1JPNlkyk
lGG6bjaVno6ctmU6mdSbySpQCLyAslpx0HtFdkuJp5AT8Kzi4p/gyC1r8orQdRVhONN+znxTuc+QM1YuK3+hnemHs0suBcnDUAtI5VHsOnv39LczGqOJ4xorgzGdZXfJ
bhkZsqzF3bnHjbYEq3clocI8xuCLMY9ryAHxzkg98cqtHjloSSD8VmomvlJjPvDZXeh4NmApEugBj9kSmtteF4sGuu/JBh1u7OvqpD85h4afhvdgQQsMRA8HmWZ57oPs
tXB/lCFhBnjby03j5zMDn3rTzw4LE1SfI0Ioi0N5dXnNQHvySt4thU0UErUTez7s4A60/bXesq639DblRfdBC5CXyerJb9cUK3vGJj0lwD3HV6RZBMsYVlsj5NnO/gix
xh3s8tY7szG5drt3yd4S7G05bQ3Bkyjb+hyyEARhJAQW7PN6IHjI9VQfs4dDngxNoqcNn5wGGjQZcMU/YUpEmsd+ZZGge8TduPk42f2K6P2/SFi4xj9pInZWCQ7Oh2MT
c3iffGJg8vXJF77UXa5/j1UJTNG+ag91OcjvSjl6O0uMg+yry2MGasUGHl60ndzBWt5+/dtuj8ISr+BOgQIyOyDQ2mHom/dLqVDO94H3MSvjRd7mxrmZuyHrVFzXsA9k
NAytHFB8pf0V8uA6FagzGXyEuSHlicaTeUMmPkbDb8AVos7RyCmfW8qlyKaYkz0if20eAc3qDwCXFe2LDIJwcEDq9trnc8ySfm7IsDP3eCDx/TEI6Mb/mRUviqsScaS7
CieEiqrVTfcnlgmmi9QzBRzhbJ5HWaYp11S9ABiYtYh5OPIIyw0pYtQ9TtsNLIkMFT2WcNnoS33TSnMQZzDzFbkTAU9QilwqQD3xGAgECcCZZQcGtK/SKlsH4qzzLnAg
/1w3BEliWjIMuO5G0t3czza4Yq62I7WpStpxX3RNfiTSgoX4jY31DsXcHTZdrLG+OA1cIy6dJ+dJKsp/IP+goEi6+VoXi2UXhokfVTiBqzhc0/PGDlLSEOijDJ0ecHIO
TwhPYncoPnjrf4/UxxfuTcK7FF5rnLw9eTe06c6fsNnhXsvHv9FsnuDGe2gMBIS0GtBCemSbHnPv3h2BeHpn8l+C+KKmtfsCzLEzawJJ3j54ZW97x2dA+pO4Mu+jk2wx
TDh+GP9FL+v+9QrHPVxfucUzm4MXV3LRi3o0FS1Jqmu5qoI8ZHKDCbc1jSwNd67s3yg5XERkI3UlQX/mW3y25oELoDJ2dJ9Qszi8wfgnwWhbyv6NjRE4+iPhLCgk3OQF
0pcTk8uSQHCBDxffoYVLCupNd+h6Vpyipr4JirhD38xm54jXKLbrSp3zhDAz4hynkCVJC0WjIOYw3pMR/JoFX3yWeVHlBJD23tbVzpRd4ffhK06bgAUMe7+A36lM8q5p
LHjj6slNvizgFYOg5JnGlKhwNHtjr1cG8s+0NxBBFbw5iFdzZ0E8YuIOjZ+GWJrY4ZJUf2cXQ4nFSHlLxlJ0AdSuGooqZ6RMIlRrIcu5pWNG1db03x/c9tX9PDvZTYNb
KkbAWC1ir8+kYl5a2xKX38cj9WmS/lQXJDvE98mOEwl2jJn5WH26UyuywCiol55+xrCQ1XPbPFJkm27J4VtPCjR4mfaZdykpQ2CYUtvs3GdTDCEuhAj0mks2qCVyYJgK
aErzAstGtF7tzUdJsJufF+8BAW1OSdhLXGyX7wItoQVxirXlojYYTEuM1PQf//XfRMEDrEGnM7Jl8/vmwJeOVdZcc26yv8tZl9vLrgYT8O9IScbeDpBA06iZSDK/wzGC
Og262oITbpqiI1rh7svnpAOjCXMBxXum+NANamf1umdnJ2jgX2Fl5mR+5rNoatzf3MXzxJg8C9fi0jztY84/1TXufzwKsdcyOEA8kKAzHPHBOy1hOKIXg/5pF3kqtrdd
l0UXRz9WUdKP7J98hWGS1ELdUdJ1QVYLGVbrxUjvoToq14eCqfNfiIly1hcRR2Y2nwgmHniyKAwcgO+rscLcuikf27AlD0F19WJBJiCA1qMb+ACYf+ZtDdzAH/Aio8HU
wW6Mp3CfYFgnymAO+TbPx2SqK1jgQA8y4Fxuf7An9TxI3rzJeOYu/JTkRCCeaGYBp94kUJQyrix4lLmNHcnzLiPvI8ZAtB0Cr02F60Ap0pV6qWwrRWpyVWQeXMrTEq6Q
ML7NmoMhttmrrCjdO9vw7thFGGFIbWxn1np60mYbvKcHNPFAqUeQoiPuPjGPrMKOHadybeOUT2qM4kLXKLeBvsoAQkONnrAkc4+vyHu7c3J8THrFSql7kyhkSiyBH+1h
zvXH2fY1KBsPzE/fzuRyQO0LHwOU9h0/uJWPXSIPulnD8a9o/3IWl7fW8ePno3Ixu9L8+nhMys9/QIPHpjrn+1XPozcFbL5HLwODGl4vq2Ogs4fp+fx8kWwd/oLEfpPr
y3o+RwmglIXA8zeTPXDkH3OiMLxweMEPY3FxNSJncqalwtHeDy1Z4lr7FNc8uTXBobvM9rckNYgfPgTlzweu+4KXAB6OhkqHrh13oz75+zleLHkkfOSeAwd1rd5m7RU/
fA3vzVp/i8EVqacB6a1janlaLJX9YgfNxY9cBizzwosB785fSrswpK8o8B+k3XlStiVA2VTf7KH8K86uTENSzzDN74Fw34fgB/JSEjMIhhylvqDQxn2cqccnJGwnwaWe
hXnoaZX0SbTM64gTIfg+o2NNAlBmW4dhmc7fDAzSdkdgbNAy+vRs8M3F5za3gpRKECXj2VnwNszi5afK+6GPWYHtYUDaO5y3s2c69eLV/rW422NsGbU3KoYX99jzzH9g
YIRLHk8NhyIX8Lya46H11ve0G93DPcCIyBjySl/YPxLQT7Z1OsMXzwz0rK/jEQKD5q6ypx9k+2SHtLJFkt8ec+EIuiJ5LYyHzbybHd44T/0afPxdgtOBr4BdWVfB7NFZ
wEMhwl48sTdpMKEhz5d9eB52XVSid7gilGNCqbzkB9QyBjNwF2hJ4W0hr+UO7yOncWY7C+EyLgnlhtmmaYAkSldc2kdsN9/jgj4HXDSBg/pUHhZEOdWW3/R3etWOUBEk
t2/ScNZL1n5d7YNbHuPY/sEtZu/CZuPjRK0EQhRQKHkU6+FAB9e1v0aRt77mvmqyaraPlTT3JyXfdsURb9YeNmlYfWnePdBUfPKLQW8I15Khk39EiR96yYC6IkkH8n4u
YZ0VzQHPF04/cJvyD5tM8l0446VjforOhHMJewGYGpsrIE6Kg3bOQ7/j+HmQeOj8M/C7MSf0tti3ZMlF9qfDE402eN4Jh8AvbGW7+7GC+Lufhuw9gfRdSTgWcb/Enn/a
57L9UCB0Tb3HuOZtkHsvOTlQZeey8VibvErU3aMKEH8ph/w/oBfmWIdB3+HSSHNBvOdTuS1RTHmOx42ICnVFY6P3RVtcFRQRb4VLI3FqadL+2Lpia+tG7L9OGdAOKsU8
6hCvZmT/QoQlRPQp/rAB9G/k/nLPZxPV21N59t4T897/AQS9nuw=
"""),
    "icon.svg": ("image/svg+xml; charset=utf-8", '"e0be07126f94f680"', """
eNpdz8EOgjAMANC7X9HUs2xjRIlhHLz7EQhjW5xAxtz4fEdUEk3apH1p2rSag4LlYYdZoPZ+OhMSY8wiz0anSE4pJWkCIRgZL+MikAIFnqfAunKy9RBN57XABKClUdq/
a5dmS4TeWCtwX+RHLm9I6krB7N14lwn7vsdPd/hu2cCaQbbNJNCNz6FLx6bGa+gEXktgPBzXXRsxnnEoA/vTMjsBY4HRH84LYEUoViMqZfqv3r0AcbRNSw==
"""),
    "index.html": ("text/html; charset=utf-8", '"88c098d9a528bd41"', """
eNqNVL1u3DAM3vMUrDo2d0YyZbBvSYMiBZoUyC0ddRbvrEY/hiT74i0P0r5cnqS0JPuctEU72SQ/Uh8/kSrffby/3n77egNN0GpzVo4fUNwcKoaGjQ7kYnMGUGoMHOqG
O4+hYl3Yr67YKWC4xor1Eo+tdYFBbU1AQ8CjFKGpBPayxlU0zkEaGSRXK19zhdXFb2Vqq6yjaIMaF6WUPDQBBHePKSPIoHATGtfpskjG6FbSPIJDVTFJqQwah/uKFaOx
9v2BQRhaOkRqfsCCHB+etGJvMn0YFPoGMcz5vG3XtfcJ6Wsn25AraSs6RUS9qzPuO8HKIoFIwyKJWO6sGGI6Cam493TOo2ynE97vEQXbPJALgoXQIGj0nlj6suAxb6yD
bvwlQ+pDPvLUGlekE4MkOru8oto4qhb/c15zMWlGf8nlW25ACmoFI3Eyc6SNbh94oAadpeuKRucZXUTgqxip2PX93d3N9fb27hPbnP7Loo20ixPvUsg+ljQ20ES8rdlI
IdAQBYJFuLFZRWKSNUPdhoFtto300JI6QF8lewRuBBjS0MNn3vOHmLeGWwMcAjotDVfn8PL8I3ZPQ7izTy/PP8E39uhhsJ0DzaVaj6zLYj54SZoGs9PGT0p6rIO0SbmA
XJP+TvKV4jtUCsVuSO5VnM2cNF7A5Zwxhbb0v7iGGKptZ8ZNSl0na7ockvRyrtepmMSJTI9zgka9QxcHsVMzVtCWSeVTwpEPs+QZMHbVac3dMEMmjvf7PS0IEoMEWKRk
BjYh/kGhyByyiEVWMZt0BUmDuA0Q+E4agU8VW138Qd4R9Bd5l6EveY8WEsfwf0uc1iBN3us5PI1sO6OtysuUTh1L2lP/uy6EPDRW0VpMD1LyzwUfaCwhAhbPQMJMyo1a
pQWb1iXxNHj0M83OeKSn/PWiJbpUL75I1Gp8/X8B0vbsJw==
"""),
}


def pages() -> dict:
    """What the daemon serves: path -> (content type, bytes, ETag).  `/` is index.html."""
    found = {"/" + name: (kind, zlib.decompress(base64.b64decode(text)), tag) for name, (kind, tag, text) in PAGE_FILES.items()}
    return {"/": found["/index.html"], **found}


# ================================================================== 26  Main

REPOSITORY_URL = "https://github.com/leonletto/thrum"
WEBSITE_URL = "https://leonletto.github.io/thrum"
BEGAN = time.time()
COMPILE_S = 5                   # at most between the opening of this file and BEGAN: ten times what a slow machine took
BUILD_DIGITS = 7                # of the file's SHA-256: tells one copy from another, as git's short ids do

# ---- the private copy and the launcher

def read_version(path: str) -> str:
    """The version of a copy of this file, "" when there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("__version__"):
                    return line.split('"')[1]
    except (OSError, IndexError):
        pass
    return ""


def install_copy(places: Places, source: str = "", force: bool = False, dry: bool = False) -> bool:
    """Put this file (or `source`) where launcher and daemon run it; whether the copy is another one now, or would be.

    One with a higher version replaces the copy; an equal or lower one is left to be served, so that two worktrees
    with different vendored files do not take turns.
    """
    source = source or os.path.abspath(__file__)
    version, present = read_version(source), read_version(places.copy)
    if not version:
        raise ThrumError(f"{source} is not a copy of thrum.py")
    if present and not force and version_key(version) <= version_key(present):
        return False
    with open(source, "rb") as file:
        data = file.read()
    if dry or data == file_bytes(places.copy):
        return data != file_bytes(places.copy)
    make_folder(os.path.dirname(places.copy))
    before = int(os.stat(places.copy).st_mtime) if present else 0
    atomic_write(places.copy, data, 0o644)
    # Python takes cached bytecode for that of a source with the same size and the same second.
    later = max(int(time.time()), before + 1)
    os.utime(places.copy, (later, later))
    try:        # what certainly runs here: not what somebody saved in the meantime, nor what -O has shortened
        if os.path.samefile(source, __file__) and os.stat(source).st_ctime < BEGAN - COMPILE_S and not sys.flags.optimize:
            cache_copy(places, later, len(data))
    except (OSError, ImportError, SyntaxError, ValueError):
        pass                    # whoever starts first compiles it
    return True


def cache_copy(places: Places, mtime: int, size: int) -> None:
    """Leave this program's bytecode where Python looks for that of the copy, a file of that time and size (PEP 552).

    To get here it was compiled as a whole; the daemon would do it again while `init` or `quickstart` waits for it.
    """
    frame = sys._getframe()         # a script's module has not ended; that of an import has, but it is cached
    while frame and (frame.f_code.co_name != "<module>" or frame.f_globals is not globals()):
        frame = frame.f_back
    code = frame.f_code if frame else __loader__.get_code(__name__)
    folder = os.path.dirname(places.copy) + "/__pycache__"      # launcher and daemon run with -I: no variable moves it
    make_folder(folder)
    atomic_write(f"{folder}/thrum.{sys.implementation.cache_tag}.pyc",
                 importlib.util.MAGIC_NUMBER + struct.pack("<III", 0, mtime, size) + marshal.dumps(code), 0o644)


def source_of(text: str, function) -> str:
    """The source of a top-level function in the text of this file."""
    start = text.index(f"\ndef {function.__name__}(") + 1
    return text[start:text.index("\n\n\n", start)] + "\n"


def write_launcher(places: Places, dry: bool = False) -> bool:
    """Write `.thrum/bin/thrum` for the caller's worktree: the client's own source, run by the interpreter in use.

    Gives whether there was none, or another one; `dry` leaves it at that.
    """
    with open(places.copy, encoding="utf-8") as file:
        text = file.read()
    python = os.path.realpath(sys.executable) if sys.executable else ""
    if not python or any(c in python for c in "\"'`$\\\n"):
        python = "python3"
    words = sorted({name.split(" ")[0] for name, row in COMMANDS.items()} - {name.split(" ")[0] for name in HERE})
    launcher = f"""#!/bin/sh
''':'
# The launcher of thrum {read_version(places.copy)}, written by 'thrum init': what an agent calls at every turn.
for python in "{python}" python3; do
    command -v "$python" >/dev/null 2>&1 && exec "$python" -IS "$0" "$@"
done
echo "thrum: no python3 was found; install Python 3.9 or newer" >&2
exit 127
'''
import os
import sys


{(chr(10) * 2).join(source_of(text, function) for function in LAUNCHER_FUNCTIONS)}

def whole():
    sys.path.insert(0, locate(home)[1] + "/bin")
    try:
        import thrum
    except ImportError:
        problem = "/.thrum holds no thrum.py; run 'python3 thrum.py init' with one at hand"
        if os.path.lexists(home + "/.thrum/redirect"):      # whatever is typed here ends here
            problem = ("/.thrum leads to no installation; in the main worktree, 'git worktree repair' and "
                       "'.thrum/bin/thrum setup --all' connect it again")
        raise EOFError(home + problem) from None
    return thrum


try:
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(sys.argv[0]))))
except OSError:         # the working directory has gone
    home = ""
os._exit(launch(sys.argv[1:], home, sys.argv[0], {read_version(places.copy)!r}, {FORWARDED!r},
                {tuple(words)!r}, {STATE!r}, whole))
"""
    path = places.local + "/bin/thrum"
    data = launcher.encode()
    if dry or file_bytes(path) == data:
        return file_bytes(path) != data
    make_folder(places.local + "/bin")
    atomic_write(path, data, 0o755)
    return True


# ---- init and setup



class _Steps:
    """What is done to an installation, in sentences; of a dry run what would be.  `undo` takes it back, last first."""

    def __init__(self, dry: bool):
        self.dry, self.done, self._back = dry, [], []

    def take(self, words: str, needed, make, back=None) -> None:
        """Do a step that is needed.  `make` gives False where somebody else was first; without words it is not told."""
        if needed:
            if back and not self.dry:
                self._back.append(back)
            if not self.dry and make() is False:
                return
            self.done += [words] if words else []

    def undo(self) -> None:
        for step in reversed(self._back):
            try:
                step()
            except (OSError, ThrumError):
                pass            # the first error is what the caller has to know


def initialize(start: str, force: bool = False, stealth: bool = False, dry: bool = False) -> tuple:
    """Make or mend the installation for the worktree around `start`: (places, what was done, whether it is new).

    Overwrites nothing but what is ours; what a failing first run has made is removed again.  `force` installs this
    program whatever its version and puts missing settings back; `dry` only says what would be done.
    """
    top, thrum = locate(os.path.realpath(start))
    own, common = git_dirs(top)
    if not common:
        raise NotInitialized(f"{start} is not in a git repository; run 'git init' first")
    redirect = top + "/.thrum/redirect"
    led = os.path.lexists(redirect)
    if led and os.path.isabs(thrum) and os.path.isdir(thrum) and not os.path.lexists(thrum + "/redirect"):
        return set_up_worktree(top, os.path.dirname(thrum), dry)
    if own != common:
        return set_up_worktree(top, main_worktree(top, common), dry)
    for folder in (top, common):
        if not os.access(folder, os.W_OK):
            raise ThrumError(f"cannot initialize thrum: {folder} is not writable")
    places, steps = Places(top, top + "/.thrum", common), _Steps(dry)
    fresh, path = False, ignore_file(top, common, stealth)
    shown = ".gitignore" if path == top + "/.gitignore" else ".git/info/exclude (stealth mode)"
    try:
        try:
            if not dry:
                os.mkdir(places.thrum, 0o750)       # of several that come at once one is the first, and only that one may undo
            fresh = not dry or not os.path.lexists(places.thrum)
        except FileExistsError:
            pass
        if fresh:
            steps.take("Created: .thrum/ directory structure", True, lambda: None, lambda: shutil.rmtree(places.thrum))
        elif not os.path.isdir(places.thrum):
            raise ThrumError(f"cannot initialize thrum: {places.thrum} is in the way, and not a directory")

        def mended(words):      # a first run tells only what it has to do with the repository
            return "" if fresh else words
        for name, mode in (("identities", 0o750), ("context", 0o750), ("bin", 0o750), ("var", 0o700)):
            folder = f"{places.thrum}/{name}"
            steps.take(mended(f"Mended: .thrum/{name}/"), not os.path.isdir(folder), lambda f=folder, m=mode: make_folder(f, m))
        steps.take("Removed: .thrum/redirect, which led nowhere", led, lambda: remove(redirect))
        missing = missing_ignore_lines(top + "/.gitignore", common + "/info/exclude") if not stealth else missing_ignore_lines(path)
        steps.take(f"Updated: {shown}", missing, lambda: add_ignore_lines(path), lambda: remove_ignore_lines(path))
        steps.take(mended("Mended: .thrum/schema_version"), not os.path.exists(places.thrum + "/schema_version"),
                   lambda: atomic_write(places.thrum + "/schema_version", b"1\n"))
        config = load_config(places.thrum)
        absent = {name: value for name, value in CONFIG_WRITTEN.items() if get_setting(config, name) is None}
        steps.take(mended("Mended: .thrum/config.json (default settings)"), absent and (force or not os.path.exists(places.config)),
                   lambda: save_config(places.thrum, absent))
        problem = branch_problem(places)
        steps.take(f"Created: {BRANCH} branch for message sync" if problem == "branch" else f"Mended: the worktree of {BRANCH}" if not fresh
                   else f"Continued: the branch {BRANCH}, which was there", problem, lambda: ensure_branch(places),
                   None if os.path.lexists(places.sync) else lambda: (remove_sync(places), problem == "branch" and remove_branch(places)))
        if not problem and not dry:
            ensure_branch(places)       # its files
        due = install_copy(places, force=force, dry=True)
        version = read_version(os.path.abspath(__file__))
        steps.take(f"{INSTALLED} (version {version})", due, lambda: install_copy(places, force=force))
        steps.take("" if due else "Mended: .thrum/bin/thrum", due or write_launcher(places, dry=True), lambda: write_launcher(places))
    except (OSError, ThrumError) as error:
        if fresh:
            steps.undo()
        if isinstance(error, OSError):
            raise ThrumError(f"cannot initialize thrum: {os_problem(error)}") from None
        raise
    return places, steps.done, fresh


INSTALLED = "Installed: .thrum/bin/thrum"


def main_worktree(top: str, common: str) -> str:
    """The main worktree of the repository that `top` is a linked worktree of.  Raises ThrumError where it has none."""
    if os.path.basename(common) == ".git":
        return os.path.dirname(common)
    path = Git(top).run("config", "--file", common + "/config", "core.worktree", check=False)       # of a submodule
    if not path:
        raise NotInitialized(f"{top} is a linked worktree of {common}, which does not say where its main one is; "
                             "name an initialized one with 'thrum setup --main-repo PATH'")
    return os.path.normpath(os.path.join(common, os.fsdecode(path).rstrip("\n")))


def set_up_worktree(top: str, main: str, dry: bool = False) -> tuple:
    """Connect a linked worktree with the installation in the main one; as `initialize`."""
    thrum = main + "/.thrum"
    if os.path.realpath(top) == os.path.realpath(main):
        raise ThrumError("cannot setup redirect to self — this is the main repo; 'thrum setup PATH' connects a linked worktree, "
                         "'thrum setup --all' all of them")
    if not os.path.lexists(thrum):
        raise NotInitialized(f"this is a git worktree, but the main repo ({main}) is not initialized; run 'thrum init' there first")
    if not os.path.isdir(thrum):
        raise NotInitialized("main repo .thrum/ is not a directory")
    places, steps = Places(top, thrum, git_common_dir(top)), _Steps(dry)
    if not os.path.isdir(places.common):        # one of the two was moved
        raise ThrumError(f"git finds no repository for {top}; run 'git worktree repair' in {main}")

    def folders():
        make_folder(places.local)
        make_folder(places.identities)
    try:
        steps.take("", not os.path.isdir(places.identities), folders)
        steps.take(f"Redirect: .thrum/redirect → {thrum}", locate(top)[1] != thrum or not os.path.lexists(places.local + "/redirect"),
                   lambda: atomic_write(places.local + "/redirect", os.fsencode(thrum) + b"\n"))
        steps.take("Updated: .git/info/exclude", not Git(top).run("check-ignore", ".thrum/redirect", check=False),
                   lambda: add_ignore_lines(places.common + "/info/exclude"))
        steps.take("", not os.path.exists(places.copy), lambda: install_copy(places))
        steps.take("", True, lambda: write_launcher(places))
    except OSError as error:
        raise ThrumError(f"cannot set up this worktree: {os_problem(error)}") from None
    return places, steps.done, bool(steps.done)


async def init(console: Console, args: Args) -> int:
    if args.remove:
        return await _remove(console, args)
    if args.yes:
        raise Usage("--yes goes with --remove")
    check_runtime(args.runtime)
    wanted = [args.agent_name, args.agent_role, args.agent_module]
    if args.agent_name:
        check_name(args.agent_name, "agent name")
    if args.agent_role:
        check_word(args.agent_role, "role")
    if args.agent_name and args.agent_name == (args.agent_role or "implementer"):       # known before anything is made
        raise ThrumError("agent setup: " + NAME_IS_ROLE.format(args.agent_name))
    if args.agent_module and not is_label(args.agent_module):
        raise InvalidParams(f"module must be a text of at most {PAIR_MAX} printable characters")
    places, done, fresh = initialize(start_directory(args), args.force, args.stealth, args.dry_run)
    linked = places.top != places.root
    if args.runtime and (args.dry_run or save_config(places.thrum, {"runtime.primary": args.runtime}) != {
            "runtime.primary": args.runtime}):
        done.append(f"Runtime saved to .thrum/config.json (primary: {args.runtime})")
    renewed = any(line.startswith(INSTALLED) for line in done)
    report = {"initialized": fresh, "repository": places.root, "worktree": places.top, "done": done}
    if args.dry_run:
        if not answers(places.var) or renewed:
            done.append("Daemon started")
        if any(wanted):
            done.append("Agent registered")
        del report["initialized"]
        report["would"] = report.pop("done")
        await console.answer({"dry_run": True, **report}, "\n".join(done) or "Nothing to do")
        return 0
    lines = []
    if linked:
        lines.append("✓ Worktree detected — set up redirect to main repo" if fresh else "✓ Worktree is set up already; nothing to do")
        lines.append(f"  Main repo: {places.root}")
    elif fresh:
        lines += ["✓ Thrum initialized successfully", f"  Repository: {places.top}"]
    elif args.force:
        lines.append(f"✓ Thrum initialized again in {places.top}; messages, identities and settings are kept")
    else:
        lines.append(f"✓ Thrum is initialized already in {places.top}; nothing was overwritten")
    lines += ["✓ " + line if line.startswith("Runtime") else "  " + line for line in done]
    if renewed and not fresh:
        stop_daemon(places)
    started = _allow_and_start(places)
    lines.append("✓ Daemon started" if started else "✓ Daemon already running")
    report["daemon"] = "started" if started else "running"
    if any(wanted):
        lines += await _enrol_here(console, args, places, report)
    elif not linked:
        lines.append(f"  Messages stay on this machine (daemon.local_only in {places.config})")
        lines.append('\nNext: .thrum/bin/thrum quickstart --name <name> --role <role> --module <module> --intent "<what>"')
    await console.answer(report, "\n".join(lines) + "\n")
    return 0


async def _enrol_here(console: LocalConsole, args: Args, places: Places, report: dict) -> list:
    """Register the agent that `init --agent-…` names, as `quickstart` does; what to say about it."""
    inner = LocalConsole(console.world, places, places.top, console.argv, _program(places))
    inner.args, inner.row = args, console.row
    try:
        args.name = args.agent_name
        name = await _chosen_name(inner, args)
        old = _continued(inner, name)
        role = args.agent_role or old.role or "implementer"
        branch = Git(places.top).run("symbolic-ref", "--short", "-q", "HEAD", check=False).decode(errors="replace").strip()
        name = name or old.name or f"{role}_{_sanitised(args.agent_module or branch)}"[:NAME_MAX].lower()
        register, session, intent = await enrol(inner, old, name, role, args.agent_module or old.module or "main", None, None, args.force)
        who = await inner.call("agent.whoami", caller_agent_id=register["agent_id"])
    except ThrumError as error:
        raise ThrumError(f"agent setup: {error}") from None
    report.update(register=register, session=session, intent=intent)
    return [f"✓ Agent registered: {register['agent_id']}", f"✓ Session started: {session['session_id']}", "✓ Intent set", "",
            _who_text(who, inner).rstrip("\n")]


def _sanitised(text: str) -> str:
    """A text as part of an agent's name."""
    text = "".join(c if c in LOWER else "_" for c in text.lower())
    while "__" in text:
        text = text.replace("__", "_")
    return text.strip("_-") or "main"


async def _remove(console: LocalConsole, args: Args) -> int:
    """`init --remove`: everything out, or in a linked worktree only its connection."""
    top, _ = locate(os.path.realpath(start_directory(args)))
    own, common = git_dirs(top)
    if not common:
        raise NotInitialized(f"{top} is not in a git repository")
    places = Places(top, top + "/.thrum", common)
    if own != common:
        steps = disconnection(places)
    else:
        steps = removal(places, args.yes)
        if not args.yes and not args.dry_run and is_our_branch(places) \
                and (await console.ask(f"Remove the branch {BRANCH} too, with all messages on it? [y/N] ")).lower() in ("y", "yes"):
            args.yes, steps = True, removal(places, True)
        if steps and not args.dry_run and os.path.isdir(places.var) and not os.path.islink(places.local):
            pid, lock = _stop_for_good(places, complete=not args.yes)
            steps = [(f"Stopped: the daemon (PID {pid})", lambda: None)] * bool(pid) + steps + [("", lambda: os.close(lock))]
    for _, step in steps if not args.dry_run else ():
        try:
            step()
        except OSError as error:
            raise ThrumError(f"cannot remove thrum: {os_problem(error)}; 'thrum init --remove' goes on from here") from None
    done = [words for words, _ in steps if words]
    kept = own == common and not args.yes and is_our_branch(places)
    indent, what = ("", "") if args.dry_run else ("  ", "Thrum removed from" if own == common else "Worktree disconnected:")
    lines = ([f"✓ {what} {top}"] if what else []) + [indent + words for words in done]
    if not done:
        lines = ["Nothing to do" if args.dry_run else f"✓ Nothing to remove: thrum is not in {top}"]
    if kept:
        lines.append(f"{indent}Kept: the branch {BRANCH}, with all messages; 'thrum init --remove --yes' removes it too")
    await console.answer({"repository": top, "would" if args.dry_run else "removed": done, "branch_kept": kept}, "\n".join(lines))
    return 0


def _stop_for_good(places: Places, complete: bool) -> tuple:
    """Stop the daemon so that nobody starts it again: (its pid, a lock that keeps starters waiting).

    `complete`: what only the journal of a daemon that was killed holds is brought to the branch first.
    """
    try:
        if complete and os.path.isdir(places.journal) and not os.path.exists(places.var + "/clean.json"):
            start_daemon(places)
    except ThrumError:
        pass                    # the installation is damaged, and that may be why it goes
    try:
        lock = take_lock(places.var + "/start.lock", START_S)
        if lock < 0:
            raise ThrumError("another process is starting the daemon; run 'thrum init --remove' again")
    except OSError as error:
        raise ThrumError(f"cannot remove thrum: {os_problem(error)}") from None
    return stop_daemon(places), lock


async def setup(console: Console, args: Args) -> int:
    start = start_directory(args)
    if args.worktree is not None:
        start = os.path.join(start, args.worktree)
        if args.all:
            raise Usage("give a worktree or --all, not both")
        if not os.path.isdir(start):
            raise NotInitialized(f"{start} is not a directory")
    top, _ = locate(os.path.realpath(start))
    common = git_common_dir(top)
    if args.main_repo:
        main = os.path.realpath(args.main_repo)
    elif not common:
        raise NotInitialized(f"{top} is not in a git repository")
    else:
        main = top if git_dirs(top)[0] == common else main_worktree(top, common)
    if args.all:
        return await _set_up_all(console, main)
    places, done, _ = set_up_worktree(top, main)
    reachable = answers(places.var)
    await console.answer({"worktree": top, "main": places.root, "done": done}, "".join(f"  {line}\n" for line in done)
                         + ("Connected to daemon\n" if reachable else "Daemon not running; it starts with the first command\n")
                         + f"✓ Thrum worktree setup complete: {top}\n")
    return 0


async def _set_up_all(console: Console, main: str) -> int:
    """Connect every linked worktree of a repository; one that cannot be is named, and the others are connected."""
    places = find_places(main)
    if places.top != places.root:
        raise ThrumError(f"{main} is connected to {places.root}; run 'thrum setup --all' there")
    found, failed = [], 0
    own = sync_entries(places)
    for entry, path in registered_worktrees(places.common):
        if entry in own:
            continue
        state, done = "missing", []
        if os.path.isdir(path):
            try:
                _, done, changed = set_up_worktree(path, main)
                state = "connected" if changed else "already connected"
            except ThrumError as error:
                state, failed = str(error), 1
        found.append({"worktree": path, "state": state, "done": done})
    words = {"connected": "✓ {}: connected", "already connected": "✓ {}: already connected",
             "missing": "  {}: missing; 'git worktree prune' forgets it"}
    lines = [words.get(item["state"], "✗ {}: " + item["state"].replace("{", "{{").replace("}", "}}")).format(item["worktree"])
             for item in found] or ["There is no linked worktree to connect"]
    await console.answer({"main": main, "worktrees": found}, "\n".join(lines))
    return failed


async def migrate(console: LocalConsole, args: Args) -> int:
    places = Places(console.places.root, console.places.thrum, console.places.common)
    tracked, files = tracked_logs(places.root), old_logs(places.thrum)
    relocated = os.path.lexists(places.thrum + "/sync/.git")
    items, damaged = missing_lines(files, places)
    needed = bool(tracked or relocated or items)
    names, lines = [os.path.relpath(path, places.root) for path in files], []
    if needed:
        lines = ["Migration needed. Found old-layout data:", *("  " + name for name in names), *["  .thrum/sync"] * relocated,
                 "Migration complete:"]
        ran = bool(stop_daemon(places))
        try:
            make_folder(places.var, 0o700)
            lock = take_lock(places.var + "/thrum.lock", STOP_S)
            if lock < 0:
                raise Conflict("another process is starting the daemon; run 'thrum migrate' again")
            try:
                for suffix in ("", "-wal", "-shm"):     # the projection: it is made anew, from all files that are there then
                    remove(places.database + suffix)
                initialize(places.root)
                items, damaged = merge_lines(files, places)
                commit_branch(places, "migrate: import data from main branch")
                cleaned = [clean_gitignore(places.root + "/.gitignore"), clean_gitattributes(places.root + "/.gitattributes")]
                if tracked:     # last: until then the next run finds that there is something to do
                    Git(places.root).run("rm", "-r", "-q", "--cached", "--", *tracked)
            finally:
                os.close(lock)
        except OSError as error:
            raise ThrumError(f"the migration is not complete: {os_problem(error)}; run 'thrum migrate' again") from None
        if ran:
            start_daemon(places)
        lines += [f"  Copied: {len(items)} event{'s' * (len(items) > 1)} from {', '.join(names)}"] * bool(items)
        lines += [f"  Relocated: .thrum/sync to {places.sync}"] * relocated
        lines += [f"  Untracked from main: {', '.join(tracked)}"] * bool(tracked)
        lines += ["  Updated .gitignore"] * cleaned[0] + ["  Cleaned .gitattributes"] * cleaned[1]
    bad = {}
    for path, _, _ in damaged:
        name = os.path.relpath(path, places.root)
        bad[name] = bad.get(name, 0) + 1
    lines += [f"  Damaged: {count} line{'s' * (count > 1)} of {name}, kept there" for name, count in bad.items()]
    await console.answer({"needed": needed, "copied": len(items), "relocated": relocated, "untracked": tracked, "damaged": bad},
                         "\n".join(lines if needed else ["No migration needed.", *lines]))
    return 0


def _allow_and_start(places: Places) -> bool:
    """Start the daemon also when it was stopped on purpose; whether it had to be."""
    remove(places.var + "/stopped")
    return start_daemon(places)


# ---- worktrees

WORKTREE_ADD_S = 600            # seconds for git to fill a worktree: a large repository on a slow disk, with hooks of its user's
WORKTREE_LOOK_S = 60            # seconds for git to say what would be lost: it may have to read every file
WORKTREE_NAME = WORD | {"."}
LIST_S = 3                      # seconds that `worktree list` waits for the daemon: the rest it can tell without


class Worktree(Record):
    """A worktree of the repository, present or gone, as git's own files and the identity files in it tell."""

    path: str
    entry: str                  # what git keeps about it: the common directory for the main one
    branch: str                 # "" where HEAD is detached
    commit: str                 # of a detached HEAD
    locked: str | None          # why, if it is
    gone: bool                  # without `.git`, as `git worktree prune` judges
    agents: list                # an Identity for each that lies there

    name = property(lambda self: printable(os.path.basename(self.path)))
    label = property(lambda self: worktree_label(self.path))
    head = property(lambda self: printable(self.branch) or f"detached at {self.commit[:7]}")


def worktrees(places: Places) -> list:
    """The worktrees of the repository, the main one first; that of the branch a-sync left out."""
    own = sync_entries(places)
    found = [(places.common, places.root)] * (git_common_dir(places.root) == places.common)
    found += [item for item in registered_worktrees(places.common) if item[0] not in own]

    def look_at(entry, path):
        git = Git(entry)
        head = os.fsdecode(git.run("--git-dir=" + entry, "symbolic-ref", "-q", "HEAD", check=False)).strip()
        commit = "" if head else git.run("--git-dir=" + entry, "rev-parse", "-q", "--verify", "HEAD", check=False).decode().strip()
        reason = file_bytes(entry + "/locked")
        return Worktree(path, entry, head.replace("refs/heads/", "", 1), commit,
                        None if reason is None else reason.decode(errors="replace").strip(),
                        not os.path.lexists(path + "/.git"), [identity for _, identity in _identities_in(path)])
    return together([lambda item=item: look_at(*item) for item in found])


def _take_away(world: World, places: Places, path: str) -> None:
    """Remove the folder of a linked worktree, if it is there, and what git keeps about it.  Raises OSError.

    `git worktree remove` stops at the first file that it may not remove, with half of the others gone; a rename
    happens or does not.
    """
    aside = f"{path}.{world.new_id('removed')}"
    if os.path.lexists(path):
        os.rename(path, aside)
    for entry, registered in registered_worktrees(places.common):
        if registered == path:
            shutil.rmtree(entry)
    remove_if_empty(places.common + "/worktrees")
    if os.path.lexists(aside):
        try:
            shutil.rmtree(aside)
        except OSError as error:        # it names no more than the last part of the path
            raise OSError(error.errno, error.strerror, aside) from None


def _sessions_in(tree: Worktree, found: list, sessions: list) -> list:
    """Those of some open sessions that belong to a worktree: they name it, or are its agents' and name none that there is."""
    ids, labels = [identity.agent_id() for identity in tree.agents], [other.label for other in found]
    return [session for session in sessions if session.get("worktree") == tree.label
            or session["agent_id"] in ids and session.get("worktree") not in labels]


async def worktree_create(console: LocalConsole, args: Args) -> int:
    places, found, git = console.places, worktrees(console.places), Git(console.top)
    if not args.name or args.name[0] in "-." or not WORKTREE_NAME.issuperset(args.name) or len(args.name) > NAME_MAX:
        raise InvalidParams(f"worktree name {args.name[:NAME_MAX]!r} is invalid; use up to {NAME_MAX} letters, digits, '_', '-' "
                            "and '.', the first one neither '-' nor '.'")
    if not args.agent and (args.role or args.module):
        raise Usage("--role and --module go with --agent")
    path = os.path.abspath(os.path.join(console.cwd, args.path)) if args.path else f"{places.root}-{args.name}"
    parent, name = os.path.realpath(os.path.dirname(path)), os.path.basename(path)
    path = os.path.join(parent, name)
    for tree in found:
        if path == tree.path and tree.gone:
            raise ThrumError(f"git still knows a worktree {path}, which has gone; 'thrum worktree remove {tree.name}' forgets it")
        if path == tree.path or printable(name) == tree.name:       # sessions and identities go by the name of the folder
            raise ThrumError(f"there is a worktree {tree.name} already: {tree.path}; choose another name or --path")
    if os.path.lexists(path):
        raise ThrumError(f"{path} is in the way; choose another name or --path")
    if not os.path.isdir(parent):
        raise ThrumError(f"{parent} is not a directory; make it first, or choose another --path")
    branch, base = args.branch or args.name, args.base or "HEAD"
    if branch == BRANCH:
        raise ThrumError(f"the branch {BRANCH} carries what agents say; choose another name or --branch")
    for tree in found:
        if branch == tree.branch:
            raise ThrumError(f"branch {branch} is checked out in {tree.path}" + (
                f", which has gone; 'thrum worktree remove {tree.name}' forgets it" if tree.gone else "; choose another --branch"))

    if git.run("check-ref-format", "--branch", branch, check=False) != os.fsencode(branch) + b"\n":      # `main~1`, `-`, `@{-1}`
        raise ThrumError(f"{branch!r} is not a valid branch name; choose another --branch")

    def commit_of(revision):
        return git.run("rev-parse", "-q", "--verify", revision + "^{commit}", check=False).decode().strip()
    commit = commit_of("refs/heads/" + branch)
    new = not commit
    if args.base and not new:
        raise ThrumError(f"there is a branch {branch} already, at {commit[:7]}; leave out --base to take it, or choose another --branch")
    commit = commit or "" if base[0] == "-" else commit or commit_of(base)
    if not commit:
        raise ThrumError(f"--base {base!r} is no commit of this repository" if args.base else
                         "there is no commit yet that a worktree could hold; commit something, or name one with --base")
    here = next((tree.head for tree in found if tree.path == console.top), "HEAD")
    origin = f"new, from {args.base or here} at {commit[:7]}" if new else f"as it was, at {commit[:7]}"
    report = {"name": printable(name), "path": path, "main": places.root, "branch": branch, "branch_created": new,
              **compact(base=(args.base or here) if new else ""), "commit": commit}
    if args.agent:
        await _foresee_agent(console, args, found, name)
    def settings():
        names = git.run("config", "--local", "-z", "--name-only", "--get-regexp", r"^branch\.", check=False)
        return {name for name in os.fsdecode(names).split("\0") if name.startswith(f"branch.{branch}.")}

    def forget_settings():
        if not settings_before:
            git.run("config", "--remove-section", "branch." + branch)
        for name in settings() - settings_before:
            git.run("config", "--unset-all", name)
    steps, settings_before = _Steps(False), settings()
    try:
        os.mkdir(path)          # of two that come at once the second one fails here or at the branch, with nothing to take back
    except OSError as error:
        raise ThrumError(f"cannot make the worktree: {os_problem(error)}") from None
    try:
        steps.take("", True, lambda: None, lambda: _take_away(console.world, places, path))
        steps.take("", new, lambda: git.run("branch", "-q", "--", branch, base, as_user=True))
        steps.take("", new, lambda: None, forget_settings)
        steps.take("", new, lambda: None, lambda: git.run("update-ref", "-d", "refs/heads/" + branch))
        try:
            git.run("worktree", "add", "-q", path, branch, as_user=True, timeout_s=WORKTREE_ADD_S)
        except GitError as error:
            _, failed, reason = str(error).partition(" failed: ")
            if failed and os.path.lexists(path + "/.git"):      # else git has taken it back: its hook comes when all is done
                raise GitError(f"a hook of the repository stopped it: {reason}; 'git rev-parse --git-path hooks/post-checkout' "
                               "tells where it is") from None
            raise
        connected, _, _ = set_up_worktree(path, places.root)
        inner = LocalConsole(console.world, connected, path, console.argv, _program(connected))
        if args.agent:
            report["agent"] = await _settle_agent(inner, args)
    except BaseException:       # also Ctrl-C
        steps.undo()
        raise
    begin = "session start" if args.agent else "quickstart --name NAME --role ROLE --module MODULE"
    await console.answer(report, f"✓ Worktree created: {path}\n  Branch: {branch} ({origin})\n"
                         + (f"  Agent:  {handle(args.agent)} ({report['agent']['role']}, {report['agent']['module']}), registered\n"
                            if args.agent else "")
                         + f"\nTo begin there:\n  cd {shlex.quote(path)} && {LAUNCHER} {begin}\n")
    return 0


def _registration(args: Args, worktree: str) -> dict:
    """The parameters with which `worktree create --agent` registers; who has the same role and module stays (decision 6)."""
    role, module = args.role or "implementer", args.module or "main"
    return {"name": args.agent, "role": role, "module": module, "display": f"{role.capitalize()} ({module})",
            "worktree": printable(worktree), "re_register": True}


async def _foresee_agent(console: LocalConsole, args: Args, found: list, worktree: str) -> None:
    """Raise what registering an agent for a new worktree would raise, before the worktree is there.  Starts the daemon if it must."""
    args.agent = args.agent.lstrip("@")
    for tree in found:
        if args.agent in [identity.agent_id() for identity in tree.agents]:
            raise Conflict(f"agent '{args.agent}' works in {tree.path}; choose another name")
    reach(console.places).close()
    try:
        await console.call("agent.register", **_registration(args, worktree), dry_run=True)
    except ThrumError as error:
        more = " of 'thrum agent register', once the worktree is there" if str(error).endswith("--force") else ""
        raise ThrumError(f"{error}{more}") from None


async def _settle_agent(console: LocalConsole, args: Args) -> dict:
    """Register an agent in its new worktree, without a session: nobody works there yet."""
    wanted = _registration(args, console.worktree)
    identity = Identity(*(wanted[field] for field in ("name", "role", "module", "display")))
    done = await _with_identity_file(console, identity, (await console.call("health"))["repo_id"],
                                     lambda: console.call("agent.register", **wanted))
    await _lay_out_context(console, identity.name, identity.role)
    return {**done, "role": identity.role, "module": identity.module}


def _daemon_problem(error: Exception) -> str:
    """Why something went on without the daemon, in words that name the way on."""
    if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ECONNREFUSED) and not error.filename:     # of a socket
        return "the daemon is not running; 'thrum daemon start' starts it"
    if isinstance(error, (Unreachable, BlockingIOError)):
        return "the daemon does not answer; try 'thrum daemon restart'"
    return os_problem(error) if isinstance(error, OSError) else str(error)


async def worktree_list(console: LocalConsole, args: Args) -> int:
    places, found, sessions, problem = console.places, worktrees(console.places), [], ""
    try:
        with Client(dial(places.var, LIST_S), LIST_S) as client:
            sessions = client.call("session.list", active_only=True)["sessions"]
    except (Unreachable, OSError) as error:
        problem = _daemon_problem(error)
    running = not problem

    def state_of(tree):
        if not running or tree.gone:
            return {}
        try:
            with Client(reach(places, start=False)) as client:
                state = client.call("worktree.status", repo_path=tree.path)
        except ThrumError as error:
            return {"error": str(error)}
        return compact(error=state.get("error")) or {"unmerged_commits": state["unmerged_commits"],
                                                     "uncommitted": state["uncommitted_total"]}
    items = []
    for tree, state in zip(found, together([lambda tree=tree: state_of(tree) for tree in found])):
        busy = {session["agent_id"]: session["session_id"] for session in _sessions_in(tree, found, sessions)}
        items.append({
            "name": tree.name, "path": tree.path, **compact(branch=printable(tree.branch), detached=tree.commit),
            "main": tree.entry == places.common, "current": tree.path == console.top, "locked": tree.locked is not None,
            **compact(reason=tree.locked), "gone": tree.gone,
            "set_up": not tree.gone and os.path.realpath(locate(tree.path)[1]) == os.path.realpath(places.thrum), "agents": [{
                "agent_id": identity.agent_id(), "role": identity.role, "module": identity.module,
                **({"active": identity.agent_id() in busy, **compact(session_id=busy.get(identity.agent_id()))} if running else {})}
                for identity in tree.agents], **state})
    text = f"Worktrees ({len(items)}):\n"
    for tree, item in zip(found, items):
        marks = [mark for mark, shown in (("main", item["main"]), ("this one", item["current"]), ("locked", item["locked"]),
                                          ("gone", item["gone"]), ("not set up", not item["set_up"] and not item["gone"])) if shown]
        active = [agent for agent in item["agents"] if agent.get("active")]
        text += f"\n{'●' if active else '○'} {console.bold(one_line(tree.name))}" + f"  ({', '.join(marks)})" * bool(marks) + "\n"
        lines = [("Path:", plain(tree.path)), ("Branch:", one_line(tree.head)),
                 ("Agents:", ", ".join(handle(agent["agent_id"]) + " (active)" * (agent in active) for agent in item["agents"])),
                 ("Work:", _work_text(item))]
        text += "".join(f"    {label:<7} {value}\n" for label, value in lines if value)
    if problem:
        text += f"\nWho is active, and what is not committed, is left out: {one_line(problem)}.\n"
    await console.answer({"daemon": "running" if running else "unresponsive" if "not answer" in problem else "stopped",
                          "worktrees": items}, text)
    return 0


def _work_text(item: dict) -> str:
    if "uncommitted" not in item:
        return one_line(item.get("error", ""))
    return " and ".join(words for words in (
        _counted(item["unmerged_commits"], "commit", " ahead"), _counted(item["uncommitted"], "uncommitted file")) if words)


def _counted(count: int, what: str, more: str = "") -> str:
    """`2 commits ahead`; "" for none."""
    return f"{count:,} {what}{'s' * (count > 1)}{more}" if count else ""


async def worktree_remove(console: LocalConsole, args: Args) -> int:
    places, found = console.places, worktrees(console.places)
    tree = _named_worktree(console, found, args.name)
    path, ids = tree.path, [identity.agent_id() for identity in tree.agents]
    if tree.entry == places.common:
        raise ThrumError(f"{path} is the main worktree, which stays; 'thrum init --remove' takes thrum out of it")
    if (os.path.realpath(console.cwd) + "/").startswith(os.path.realpath(path) + "/"):
        raise ThrumError(f"you are in {path}; change to another directory first, such as {places.root}")
    if tree.locked is not None:
        raise ThrumError(f"worktree {tree.name} is locked{': ' * bool(tree.locked)}{one_line(tree.locked)}; "
                         f"'git worktree unlock {shlex.quote(path)}' unlocks it")
    inside = [other.path for other in found if other.path.startswith(path + "/")]
    if inside:
        raise ThrumError(f"another worktree lies in {path}: {inside[0]}; remove that one first")
    if not is_connected(path, places.thrum):
        raise ThrumError(f"{path} has a thrum of its own; run 'thrum init --remove' there first")
    losses = [] if args.force else _losses(tree, Work(places, console.world))
    if losses:
        raise ThrumError(f"worktree {tree.name} has {' and '.join(losses)}; --force removes the worktree all the same")
    who = ", ".join(map(handle, ids)) or "its agent"
    sessions, problems, kept, ended, left = [], [], [], [], False
    if not args.keep_agent and (ids or tree.gone):
        try:
            reach(places).close()
            sessions = _sessions_in(tree, found, (await console.call("session.list", active_only=True))["sessions"])
        except ThrumError as error:
            problems.append(f"a session of {who} may stay open ('thrum session list --active' tells, 'thrum session end --session-id ID' "
                            f"ends it): {error}")
    stays = tree.gone and os.path.lexists(path)
    try:
        if stays:
            shutil.rmtree(tree.entry)
            remove_if_empty(places.common + "/worktrees")
        else:
            _keep_context(tree, places, kept)
            _take_away(console.world, places, path)
    except (OSError, ThrumError) as error:
        left, reason = not os.path.lexists(path), os_problem(error) if isinstance(error, OSError) else str(error)
        if not left:
            for copy in kept:
                remove(copy)
            raise ThrumError(f"cannot remove {path}, nothing was changed: {reason}") from None
        problems.append(f"not all of its files could be deleted: {reason}")
    for session in sessions:
        try:
            await console.call("session.end", session_id=session["session_id"], reason="worktree removed")
            ended.append({"agent_id": session["agent_id"], "session_id": session["session_id"]})
        except ThrumError as error:
            problems.append(str(error))
    lines = [f"✓ Worktree forgotten: {path}, which had gone" if tree.gone else f"✓ Worktree removed: {path}",
             f"  Kept: {path}, which is no worktree any more" if stays else "",
             f"  Kept: the branch {tree.branch}" if tree.branch else "",
             *(f"  Kept: the context that was saved there, in {copy}" for copy in kept),
             *(f"  Ended: the session of {handle(session['agent_id'])}" for session in ended),
             f"  Kept: the session of {who}, if there is one" if args.keep_agent and (ids or tree.gone) else ""]
    await console.answer({"name": tree.name, "path": path, **compact(branch=printable(tree.branch)), "kept": kept, "ended": ended,
                          **compact(problems=problems)}, "\n".join(plain(line) for line in lines if line))
    for problem in problems:
        await console.write("E", f"Warning: {plain(problem)}\n")
    return left


def _named_worktree(console: LocalConsole, found: list, word: str) -> Worktree:
    """The worktree that goes by a word: its path, the name of its folder or of its branch, with which it was made, or its agent's."""
    path, wanted = os.path.realpath(os.path.join(console.cwd, word)), word.lstrip("@")
    names = (wanted, f"{os.path.basename(console.places.root)}-{wanted}")
    hits = [tree for tree in found if path == os.path.realpath(tree.path) or tree.name in names
            or wanted in (tree.branch, *(identity.agent_id() for identity in tree.agents))]
    if not hits:
        known = {name for tree in found for name in (tree.name, tree.branch)}
        raise ThrumError(f"no worktree {one_line(word)!r}{did_you_mean(wanted, known)} 'thrum worktree list' shows them")
    if len(hits) > 1:
        raise ThrumError(f"{one_line(word)!r} may be each of {', '.join(tree.path for tree in hits)}; give the path")
    return hits[0]


def _losses(tree: Worktree, work: Work) -> list:
    """What speaks against removing a worktree, in words: changes, and commits that neither its base nor another branch holds.

    Its own branch stays, but who removes a worktree takes its work for merged; of one that has gone only a detached
    HEAD is lost.
    """
    files = 0 if tree.gone else Git(tree.path).run(
        "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--ignore-submodules=none",
        timeout_s=WORKTREE_LOOK_S).count(b"\0")
    git, own, commits, submodule = Git(tree.entry), ("--git-dir=" + tree.entry,), 0, 0
    if (tree.commit or not tree.gone) and git.run(*own, "rev-parse", "-q", "--verify", "HEAD", statuses=(0, 1)):
        others = [f"--exclude={tree.branch}"] * bool(tree.branch) + ["--branches", "--remotes", work.base(work.places.root)]
        commits = int(git.run(*own, "rev-list", "--count", "HEAD", "--not", *others, timeout_s=WORKTREE_LOOK_S))
    for folder, names, present in os.walk(tree.entry + "/modules"):         # the repositories of submodules go with it
        if "HEAD" in present and "objects" in names:
            names[:] = [name for name in names if name == "modules"]
            submodule += int(Git(folder).run("--git-dir=" + folder, "rev-list", "--count", "--all", "--not", "--remotes",
                                             timeout_s=WORKTREE_LOOK_S))
    return [words for words in (
        _counted(files, "uncommitted file"), _counted(commits, "commit", " on no other branch" + (
            f" ({'they stay' if commits > 1 else 'it stays'} on the branch {printable(tree.branch)})" if tree.branch else "")),
        _counted(submodule, "commit", " of submodules that no remote has")) if words]


def _keep_context(tree: Worktree, places: Places, kept: list) -> None:
    """Copy what the agents of a worktree have written down to the main one; the paths of the copies go into `kept`.

    A preamble that nobody has changed is not worth keeping.  The name that is taken where the file's own is not
    free is no agent's, so that nobody finds what is not theirs.
    """
    made = [default_preamble(identity.agent_id(), identity.role).encode() for identity in tree.agents]
    folder = tree.path + "/.thrum/context"
    for file in sorted(_names_in(folder)):
        source = f"{folder}/{file}"
        data = file_bytes(source) if file.endswith(".md") and os.path.isfile(source) and not os.path.islink(source) else None
        if not data or data in made:
            continue
        target, count = context_path(places.root, file), 1
        while os.path.lexists(target) and file_bytes(target) != data:
            suffix = f"from-{tree.name}{f'-{count}' * (count > 1)}"
            target, count = context_path(places.root, f"{file[:-3]}.{suffix}.md"), count + 1
        if not os.path.lexists(target):
            make_folder(os.path.dirname(target))
            kept.append(target)
            atomic_write(target, data)


# ---- the daemon's commands

def is_our_daemon(pid: int, places: Places) -> bool:
    """Whether a process is the daemon of this repository: its number alone may have been given to another since."""
    wanted = [b"daemon", b"run", b"--repo", os.fsencode(places.root)]
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(65536).split(b"\0")
            return any(words[i:i + 4] == wanted for i in range(len(words)))
    except OSError:
        pass
    try:                        # macOS
        line = subprocess.run(["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, timeout=CONNECT_S).stdout
        return b" ".join(wanted) in line
    except (OSError, subprocess.TimeoutExpired):
        return False


def stop_daemon(places: Places) -> int:
    """Stop the daemon and wait until it has let go of everything: its pid, 0 when none ran.  Raises ThrumError.

    Asked over its socket; only one that holds the lock, does not answer, and is this repository's is signalled.
    """
    lock_path, give_up_at = places.var + "/thrum.lock", time.monotonic() + START_S
    if not os.path.isdir(places.var):
        return 0
    while True:
        try:
            with Client(dial(places.var), STOP_S) as client:
                pid = client.call("daemon.stop")["pid"]
            break
        except (OSError, ThrumError):
            lock = take_lock(lock_path, 1)      # it may be ending, or starting
            if lock >= 0:
                os.close(lock)
                return 0        # nobody holds it, so nobody is there, whatever the pid file says
        pid = read_pid(places)
        if pid and is_our_daemon(pid, places):
            os.kill(pid, signal.SIGTERM)
            break
        if time.monotonic() > give_up_at:
            raise ThrumError(f"the daemon does not answer, and {places.var}/thrum.pid does not name it; "
                             "find the process that holds thrum.lock and end it")
    for number in (signal.SIGKILL, 0):
        give_up_at = time.monotonic() + STOP_S + 2
        while time.monotonic() < give_up_at:
            lock = take_lock(lock_path, RETRY_S)
            if lock >= 0:
                os.close(lock)
            if lock >= 0 or read_pid(places) not in (0, pid):   # free, or the next one has it already
                return pid
        if number and is_our_daemon(pid, places):
            os.kill(pid, number)
    raise ThrumError(f"timeout waiting for daemon to stop (PID {pid} still running)")


async def daemon_start(console: Console, args: Args) -> int:
    places = console.places
    if args.local:
        save_config(places.thrum, {"daemon.local_only": True})
    refresh(places)
    if not _allow_and_start(places):
        raise Conflict(f"daemon is already running{_pid_text(places)} for repo {places.root}")
    await console.answer({"status": "running", "pid": read_pid(places)}, "✓ Daemon started successfully")
    return 0


def refresh(places: Places) -> None:
    """Bring copy and launcher up to this file, where it is newer or they are missing."""
    try:
        if install_copy(places) or not os.path.exists(places.local + "/bin/thrum"):
            write_launcher(places)
    except OSError as error:
        raise ThrumError(f"cannot install thrum into {places.thrum}: {os_problem(error)}") from None


async def daemon_stop(console: Console, args: Args) -> int:
    places = console.places
    stopped_before = os.path.exists(places.var + "/stopped")
    try:
        atomic_write(places.var + "/stopped", b"by 'thrum daemon stop'\n")
    except OSError as error:
        raise ThrumError(f"cannot note that the daemon is stopped: {os_problem(error)}") from None
    pid = stop_daemon(places)
    if not pid:
        if not stopped_before:
            remove(places.var + "/stopped")
        raise ThrumError("daemon is not running")
    await console.answer({"status": "stopped", "pid": pid}, "✓ Daemon stopped successfully")
    return 0


async def daemon_restart(console: Console, args: Args) -> int:
    places = console.places
    if args.from_:
        source = os.path.abspath(args.from_)
        if not os.path.isfile(source):
            raise ThrumError(f"{args.from_} is not a file")
        check = subprocess.run([sys.executable, "-IS", "-c", "import sys; compile(open(sys.argv[1], 'rb').read(), sys.argv[1], 'exec')",
                                source], capture_output=True)
        if check.returncode:
            raise ThrumError(f"{args.from_} cannot be compiled by this Python")
        install_copy(places, source, force=True)
        write_launcher(places)
    stop_daemon(places)
    _allow_and_start(places)
    await console.answer({"status": "running", "pid": read_pid(places)}, "✓ Daemon restarted successfully")
    return 0


async def daemon_status(console: Console, args: Args) -> int:
    places = console.places
    try:
        state = await console.call("health")
    except ThrumError as error:
        if not isinstance(error, Unreachable) or "sandbox" in str(error) or answers(places.var):
            raise
        await console.answer({"running": False, "status": "stopped", "repo_path": places.root}, "")
        if not args.json:
            await console.out("Daemon:   not running\n")
        return 0 if args.json else 1
    uptime = span(state["uptime_ms"] / 1000)
    report = {"running": True, "status": "running", "pid": state["pid"], "repo_path": places.root, "uptime": uptime,
              "version": state["version"], "sync_state": state["sync_state"], "events": state["last_seq"],
              "bad_lines": state["bad_lines"]}
    if "ws_port" in state:
        report.update(ws_port=state["ws_port"], page=(await console.call("page.link"))["url"])
    await console.answer(report, f"Daemon:   running (PID {state['pid']})\nUptime:   {uptime}\nVersion:  {state['version']}\n"
                         f"Repo:     {places.root}\nStore:    {state['messages']} messages of {state['agents']} agents, "
                         f"{state['last_seq']} events\nSync:     {state['sync_state']}\n"
                         f"Page:     {report.get('page', 'no port was free')}\n"
                         + (f"Damaged:  {state['bad_lines']} lines, see {places.bad_lines}\n" if state["bad_lines"] else ""))
    return 0


async def daemon_logs(console: Console, args: Args) -> int:
    places = console.places
    lines = []
    for path in [f"{places.log}.{n}" for n in range(LOG_FILES, 0, -1)] + [places.log]:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                lines += file.readlines()
        except FileNotFoundError:
            pass
    if not lines:
        raise ThrumError(f"there is no log yet: {places.log}")
    count = max(args.tail, 0)
    lines = lines[-count:] if count else []
    await console.answer({"log": places.log, "lines": [line.rstrip("\n") for line in lines]}, plain("".join(lines)))
    return 0


async def daemon_run(console: Console, args: Args) -> int:
    places = console.places
    if args.ready_fd is None:
        def report(problem):
            if problem != "...":
                text = f"Error: {problem}" if problem else f"thrum daemon: serving {places.root} (PID {os.getpid()}); Ctrl-C ends it"
                show(2, (text + "\n").encode())
    else:
        os.set_inheritable(args.ready_fd, False)
        if os.fork():           # the starter waits for this one only, and the daemon is nobody's child
            os._exit(0)

        def report(problem):
            try:
                os.write(args.ready_fd, (problem.replace("\n", " ") or "ok").encode() + b"\n")
            except BrokenPipeError:
                pass            # the starter did not wait; whoever comes next finds the daemon
            if problem != "...":
                os.close(args.ready_fd)
    return daemon_process(places, report, pages())


# ---- the guard

GUARD_S = 2                     # seconds that a commit may wait for the daemon, before it and for its message
GUARD_AT_ONCE = 200             # paths in a call: of the longest that there are, as many as a request holds
REPLAYING = ("rebase-merge", "rebase-apply", "CHERRY_PICK_HEAD")       # of git's directory, while it makes commits once more
GUARD_SHOWN = 5                 # files of a claim that are named


def _hooks_shown(folder: str, places: Places) -> tuple:
    """A folder of hooks as it is written, and what has to be said about its place, "" for nothing."""
    git = Git(places.top)
    relative = git.run("config", "--type=path", "core.hooksPath", check=False, as_user=True)[:1] not in (b"", b"/")
    if folder.startswith(places.top + "/") and not folder.startswith(places.common + "/"):
        changed = git.run("status", "--porcelain", "-z", "-uall", "--", folder, check=False)
        return folder[len(places.top) + 1:], " ".join(
            ["core.hooksPath is relative: the guard is only in this worktree."] * relative
            + ["It lies in the working tree: git shows the change."] * bool(changed))
    inside = (places.common, *worktrees_of(places.common))
    return folder.replace(places.top + "/", "", 1), "" if any(folder.startswith(place + "/") for place in inside) else \
        "It lies outside of the repository, and serves others too; where there is no thrum, our hooks do nothing."


async def guard_install(console: LocalConsole, args: Args) -> int:
    places = console.places
    folder = hooks_folder(places.top)
    before = place_guard(folder, args.force)
    shown, remark = _hooks_shown(folder, places)
    hooks, lines = guard_state(folder), []
    for old, hook in zip(before, hooks):
        word = "was edited, and is left; --force replaces it" if hook["state"] == "edited" else \
            "is there already" if old["state"] == "installed" else "installed" if old["state"] in ("absent", "other") else "renewed"
        lines.append([f"  {hook['hook']}", word + ("; the hook that was there comes first" if hook["before"] else "")])
    await console.answer({"folder": folder, "hooks": hooks, **compact(remark=remark)},
                         f"✓ Guard in {shown}\n" + rows_of(lines) + (f"  {remark}\n" if remark else "")
                         + "A commit that touches somebody else's claim is stopped now; THRUM_GUARD=warn only warns.")
    return 0


async def guard_remove(console: LocalConsole, args: Args) -> int:
    places = console.places
    folder = hooks_folder(places.top)
    steps = guard_removal(folder, places.top, args.force)
    for _, step in steps:
        step()
    done = [words for words, _ in steps if words]
    left = any(words.startswith("Left") and "edited" in words for words in done)
    lines = [("  " if words.startswith("Left") else "✓ ") + words for words in done]
    lines += ["  'thrum guard remove --force' removes it all the same"] * left
    await console.answer({"folder": folder, "done": done}, "\n".join(
        lines or [f"Nothing to remove: the guard is not in {_hooks_shown(folder, places)[0]}"]))
    return 0


async def guard_status(console: LocalConsole, args: Args) -> int:
    places = console.places
    folder = hooks_folder(places.top)
    hooks, (shown, remark), mode = guard_state(folder), _hooks_shown(folder, places), _guard_mode(console)
    words = {"absent": "not installed", "other": "not installed; there is another hook", "outdated": "of an older version; 'thrum guard "
             "install' renews it", "edited": "installed, and edited since", "installed": "installed"}
    present = [hook for hook in hooks if hook["state"] not in ("absent", "other")]
    await console.answer(
        {"folder": folder, "installed": len(present) == len(hooks), "mode": mode, "hooks": hooks, **compact(remark=remark)},
        f"Guard in {shown}\n" + rows_of([[f"  {hook['hook']}", words[hook["state"]] + (
            "; the hook of before comes first" if hook["before"] and hook in present else "")] for hook in hooks])
        + (f"  {remark}\n" if remark and present else "") + (f"THRUM_GUARD is {mode}.\n" if mode != "stop" else "")
        + ("" if present else "'thrum guard install' places it.\n"))
    return 0


def _guard_mode(console: Console) -> str:
    """What the guard is to do: "stop", "warn" or "off"."""
    mode = console.environ.get("THRUM_GUARD", "").strip().lower()
    return mode if mode in ("warn", "off") else "stop"


def _committer(console: LocalConsole, args: Args) -> tuple:
    """The places of the worktree in which git commits, and whose commit it is, "" for a person's."""
    places = find_places(args.repo or ".")      # whatever THRUM_HOME says: git is here
    inner = LocalConsole(console.world, places, places.top, console.argv, console.program)
    inner.args = args
    return places, _caller_or_nobody(inner)


async def guard_check(console: LocalConsole, args: Args) -> int:
    """What the hook pre-commit runs: GUARD_STOPS for a commit that is to stop.  What goes wrong here lets it pass, with a line."""
    given, mode, claims = console.environ.get("THRUM_GUARD", "").strip(), _guard_mode(console), {}
    if mode == "off":
        return 0
    if given and given.lower() not in ("stop", "warn"):
        await console.note(f"thrum: THRUM_GUARD is {one_line(given)!r}, not stop, warn or off; it counts as stop")
    try:
        places, me = _committer(console, args)
        paths = [path.decode(errors="surrogateescape") for path in staged_files(places.top)]
        readable = [path for path in paths if is_unicode(path)]
        lost = len(paths) - len(readable)
        if readable:
            until = console.world.monotonic() + GUARD_S
            with Client(dial(places.var, GUARD_S), GUARD_S) as client:
                for first in range(0, len(readable), GUARD_AT_ONCE):
                    if console.world.monotonic() > until:
                        raise Unreachable(f"the daemon takes longer than {GUARD_S} s")
                    for claim in client.call("claim.check", paths=readable[first:first + GUARD_AT_ONCE],
                                             **compact(caller_agent_id=me))["claims"]:
                        claims.setdefault(claim["claim_id"], {**claim, "files": []})["files"] += claim["files"]
    except (ThrumError, OSError) as error:
        await console.note(f"thrum: claims were not checked, and the commit goes on: {one_line(_daemon_problem(error), ERROR_MAX)}")
        return 0
    if lost:
        await console.note(f"thrum: {lost} of the files {'was' if lost == 1 else 'were'} not checked: "
                           f"{'its name is' if lost == 1 else 'their names are'} not UTF-8")
    if args.json:
        await console.answer({"claims": list(claims.values()), "checked": len(readable)}, "")
    elif claims:
        await console.write("E", console.harmless(_claims_text(list(claims.values()), console, mode == "warn")))
    return GUARD_STOPS if claims and mode == "stop" else 0


def _claims_text(claims: list, console: Console, passes: bool) -> str:
    """Which claims a commit touches: whose, on what, until when, why, and what to do about it."""
    holders = sorted({claim["agent_id"] for claim in claims})
    table = []
    for claim in claims:
        files = [one_line(path) for path in claim["files"][:GUARD_SHOWN]]
        more = len(claim["files"]) - len(files)
        where = f" on {one_line(claim['host'])}" if claim.get("host") else ""
        note = f": {one_line(claim['note'])}" if claim.get("note") else ""
        table.append([f"  {handle(claim['agent_id'])}", f"{', '.join(files)}{f' and {more} more' if more else ''}\n"
                      f"until {_ends_text(claim, console)}{where}{note}"])
    return ("thrum: this commit touches what others have claimed\n" if passes
            else "thrum: the commit was stopped; it touches what others have claimed\n") + rows_of(table, console.width) \
        + f"Ask: {LAUNCHER} send \"May I change …?\" --to {handle(holders[0])}\n" \
        + ("" if passes else "Commit all the same: THRUM_GUARD=warn git commit …\n")


async def guard_message(console: LocalConsole, args: Args) -> int:
    """What the hook prepare-commit-msg runs: it adds the trailers that `why` follows, and never fails.

    A message that the editor is to begin with, empty or from a template, is left alone: with a trailer in it, git would no
    longer see that nothing was written, and commit.  Nor gets an amended one another thread: its lines came from the first.
    What a rebase or cherry-pick replays was written in another conversation, if in any.
    """
    if args.source not in ("message", "merge", "squash", "commit") or _guard_mode(console) == "off":
        return 0
    try:
        places, me = _committer(console, args)
        if me and not any(os.path.exists(f"{git_dirs(places.top)[0]}/{name}") for name in REPLAYING):
            with Client(dial(places.var, GUARD_S), GUARD_S) as client:
                thread = client.call("session.thread", caller_agent_id=me).get("thread_id")
            if thread:
                add_trailers(places.top, args.file, Thrum_Thread=thread, Thrum_Agent=me)
    except (ThrumError, OSError):
        pass                    # the hook before this one has said what is wrong
    return 0


# ---- why

async def why(console: LocalConsole, args: Args) -> int:
    name, _, number = args.line.rpartition(":")
    if not name or not (number.isascii() and number.isdigit() and len(number) < 10):
        raise Usage(f"{one_line(args.line)!r} names no line; write FILE:LINE, such as src/main.c:42")
    places = console.places
    path = repo_path(name, places.top, console.cwd)
    commit = read_line(places.top, path, int(number))
    report = {"file": path, "line": int(number), "commit": None}
    text = _line_text(report, commit["text"]) + "It is not committed yet.\n"
    if "sha" in commit:
        agent, thread = (next(iter(commit.pop(names)), "") for names in ("agents", "threads"))
        report["commit"] = {key: commit[key] for key in ("sha", "author", "date", "message")}
        problem, found = "", {"messages": [], "total": 0}
        try:
            with Client(reach(places)) as client:
                for work in client.call("agent.listContext", fresh=True)["contexts"] if not agent else ():
                    if any(known.get("sha") == commit["sha"] for known in work.get("unmerged_commits", ())):
                        agent = work["agent_id"]
                if thread:
                    found = client.call("message.list", thread_id=thread, page_size=max(1, min(args.limit, PAGE_MAX)))
        except Unreachable as error:
            problem = str(error)
        report.update(compact(agent_id=agent, thread_id=thread, problem=problem), messages=found["messages"][::-1], total=found["total"])
        text = _line_text(report, commit["text"]) + _why_text(report, commit["subject"], console)
    await console.answer(report, text)
    return 0


def _line_text(report: dict, text: str) -> str:
    return f"{one_line(report['file'])}:{report['line']}: {one_line(text)}\n"


def _why_text(report: dict, subject: str, console: Console) -> str:
    commit, messages, thread = report["commit"], report["messages"], report.get("thread_id")
    text = rows_of([
        ["Commit:", f"{commit['sha'][:7]}  {console.bold(one_line(subject))}"],
        ["", f"{when(commit['date'])[:16]} by {one_line(commit['author'])}"],
        ["Agent:", handle(report["agent_id"]) if report.get("agent_id") else "not known"],
        *([["Thread:", one_line(thread)]] if thread else [])])
    if not thread:
        return text + "The commit names no conversation: it has no trailer Thrum-Thread.\n"
    if report.get("problem"):
        return text + f"Its messages cannot be read: {one_line(report['problem'], ERROR_MAX)}\n"
    if not messages:
        return text + "It is not known here: it was removed, or is on another machine.\n"
    earlier = report["total"] - len(messages)
    return text + (f"\n{earlier:,} earlier message{'s' * (earlier > 1)} left out; --limit N shows more\n" if earlier else "") + "\n" \
        + "\n".join(_message_text(message, console, own=True) for message in messages)


# ---- what only tells

async def version(console: Console, args: Args) -> int:
    python = "python" + ".".join(map(str, sys.version_info[:3]))
    with open(__file__, "rb") as file:
        build = hashlib.sha256(file.read()).hexdigest()[:BUILD_DIGITS]
    await console.answer({"version": __version__, "build": build, "path": os.path.abspath(__file__), "python_version": python,
                          "go_version": python, "repo_url": REPOSITORY_URL, "website_url": WEBSITE_URL},
                         f"thrum v{__version__} (build: {build}, {python})\n{REPOSITORY_URL}\n{WEBSITE_URL}")
    return 0


# ---- help

FIRST = ("quickstart", "send", "inbox", "reply", "wait", "status")      # what an agent needs to begin with
TOPICS = {                      # where the others stand in the overview; what is named nowhere stands under "More"
    "Messages": "message search sent subscribe subscriptions trace unsubscribe watch",
    "Team": "agent claim claims conflicts group guard overview ping release session team who-has whoami why",
    "Memory": "context prime",
    "Setup": "completion config init migrate setup worktree",
    "Upkeep": "daemon purge version help",
}
GROUPS = {                      # what the commands of a group are for
    "agent": "Agents: who is registered, and who you are.",
    "completion": "Scripts with which a shell completes thrum's commands, flags and names.",
    "config": "The settings in .thrum/config.json.",
    "context": "What an agent writes down for its successor.",
    "daemon": "The daemon of this repository; it starts by itself.",
    "group": "Groups: names that stand for several agents.",
    "guard": "Git hooks that hold commits to what others have claimed.",
    "message": "Single messages.",
    "session": "Sessions: what you work on, and since when.",
    "worktree": "Worktrees: a folder and a branch for each agent, with one thrum for all.",
}


def visible_rows() -> dict:
    """The rows of both tables that people are told of."""
    return {name: row for name, row in {**COMMANDS, **HERE}.items() if row.help}


def unknown_command(word: str, group: str = "") -> Usage:
    """The error for a word that is no command; it names those that resemble it."""
    start = f"{group} " if group else ""
    known = {name[len(start):].split(" ")[0] for name in visible_rows() if name.startswith(start)}
    return Usage(f'unknown command "{word}" for "{f"thrum {group}".rstrip()}"{did_you_mean(word, sorted(known))} '
                 f"'{f'thrum help {group}'.rstrip()}' lists them")


async def help_command(console: Console, args: Args) -> int:
    name = " ".join(args.command)
    rows = {**COMMANDS, **HERE}
    if not name:
        await console.out(root_help())
    elif name in rows:
        await console.out(help_text(name, rows[name]))
    elif any(row.startswith(name + " ") for row in rows):
        await console.out(group_help(name))
    else:
        word = args.command[0]
        inside = len(args.command) > 1 and word not in rows and any(row.startswith(word + " ") for row in rows)
        raise unknown_command(args.command[1], word) if inside else unknown_command(name)
    return 0


def first_clause(text: str) -> str:
    """The beginning of a help text, for lists: up to the first semicolon or the end of the first sentence."""
    return text.split(";")[0].split(". ")[0].rstrip(".")


def root_help() -> str:
    """All commands, on one screen."""
    rows = visible_rows()
    left = sorted({name.split(" ")[0] for name in rows} - set(FIRST))
    table = []
    for topic, names in {**TOPICS, "More": " ".join(sorted(set(left) - set(" ".join(TOPICS.values()).split())))}.items():
        shown = [name if name in rows else name + "*" for name in sorted(names.split()) if name in left]
        if shown:
            table.append([f"  {topic}", "  ".join(shown)])
    return "thrum: messages for a team of coding agents, kept in their git repository\n\nUsage: thrum COMMAND [flags]\n\n" \
        + rows_of([[f"  {name}", first_clause(rows[name].help) + "."] for name in FIRST]) + "\n" + rows_of(table, WIDTH_DEFAULT) \
        + "\n'thrum help COMMAND' tells more; a name with * is a group of commands.\n" \
        + f"\nExample: {rows['quickstart'].example}\n"


def group_help(word: str) -> str:
    """The commands that begin with a word."""
    rows = {name: row for name, row in visible_rows().items() if name.startswith(word + " ")}
    example = next((row.example for row in rows.values() if row.example), None) or example_of(*next(iter(rows.items())))
    about = f"{GROUPS[word]}\n\n" if word in GROUPS else ""
    return f"{about}Usage: thrum {word} COMMAND [flags]\n\n" \
        + rows_of([[f"  {name}", row.help] for name, row in rows.items()], WIDTH_DEFAULT) + f"\nExample: {example}\n"


# ---- completion
#
# Each script holds what the tables say (commands, flags, what they mean) and asks `thrum complete KIND` for names.  In
# each, a command line is read the same way: words that are commands lead on, a flag with a value takes the next word,
# and what is left is counted.  `_VALUES` says what completes a value: `ask KIND`, files, folders, or words to choose from.

COMPLETE_S = 1                  # seconds that a pressed Tab may wait for the daemon
_VALUES = {                     # "command argument" counts before "argument"
    "--to": "ask names", "--mention": "ask names", "--from": "ask agents", "--agent": "ask agents", "--role": "ask roles",
    "--group": "ask groups", "--repo": "folders", "--main-repo": "folders", "--dir": "folders", "--body-file": "files",
    "--file": "files", "daemon restart --from": "files", "GROUP": "ask groups", "MEMBER": "ask names", "AGENT": "ask agents",
    "PATH": "files", "FILE": "files", "agent context NAME": "ask names",
    "--format": "words markdown plain json", "KEY": "words " + " ".join(SETTINGS),
    "group delete NAME": "ask groups", "group info NAME": "ask groups", "group members NAME": "ask groups",
    "watch --topic": "words " + " ".join(WATCHED), "subscribe --topic": "words " + " ".join(SUBSCRIPTION_TOPICS),
    "agent delete NAME": "ask agents", "ping NAME": "ask agents", "worktree create --path": "folders",
    "worktree create --agent": "", "worktree remove NAME": "ask worktrees", "why LINE": "files",
}


def _completions() -> tuple:
    """What the tables say: {command: {next word: meaning}}, {command: {flag: (meaning, short form, values)}},
    {command: [values of its words]}.  Values are None for a flag that takes none, "" where nothing completes them.
    """
    rows = visible_rows()
    words, flags, places = {}, {}, {}
    for name, row in sorted(rows.items()):
        *above, _ = parts = name.split(" ")
        for depth, part in enumerate(parts):
            full = " ".join(parts[:depth + 1])
            meaning = first_clause(rows[full].help if full in rows else GROUPS.get(full, ""))
            words.setdefault(" ".join(parts[:depth]), {})[part] = meaning
        flags[name] = {a.name: (a.help, a.short, _values(name, a)) for a in row.arguments if a.name[0] == "-" and a.help}
        places[name] = [_values(name, a) + ("…" if a.many else "") for a in row.arguments if a.name[0] != "-"]
    flags["*"] = {a.name: (a.help, a.short, _values("", a)) for a in GLOBAL_FLAGS}
    places["help"] = ["words " + " ".join(words[""])]
    return words, flags, places


def _values(name: str, argument: Argument) -> str | None:
    if argument.kind is bool:
        return None
    return _VALUES.get(f"{name} {argument.name}", _VALUES.get(argument.name, ""))


def _cases(flags: dict, places: dict, line: str) -> str:
    """The patterns of a shell's `case` that lead from "command flag" or "command number" to the values, one line each."""
    own, common = {}, {}        # a command's own flags come first: --role is a filter in some
    for name, row in flags.items():
        for flag, (_, _, values) in row.items():
            if values is not None and name == "*":
                common.setdefault(values or "text", []).append(f'*" {flag}"')
            elif values is not None:
                own.setdefault(values or "text", []).append(f'"{name} {flag}"')
    for name, row in places.items():
        for index, values in enumerate(row):
            if values.rstrip("…"):
                own.setdefault(values.rstrip("…"), []).append(f'"{name} "[0-9]*' if values[-1] == "…" else f'"{name} {index}"')
    return "\n".join(line % ("|".join(patterns), values) for found in (own, common) for values, patterns in found.items())


def _quoted(text: str) -> str:
    """`text` in single quotes, for sh, bash and zsh."""
    return "'" + text.replace("'", "'\\''") + "'"


BASH = r"""# Completion of thrum for bash 3.2 or newer, written by 'thrum completion bash'.
#   now:       source <(thrum completion bash)           (bash 3.2: eval "$(thrum completion bash)")
#   for ever:  thrum completion bash > ~/.local/share/bash-completion/completions/thrum
#              or the line above in ~/.bashrc

_thrum_words() {        # the commands that may follow a command
    case "$1" in
@WORDS@
    esac
}

_thrum_flags() {        # the flags of a command
    case "$1" in
@FLAGS@
    esac
    printf '%s\n' @GLOBAL@
}

_thrum_values() {       # what completes the value of "command flag", or the word "command number"
    case "$1" in
@VALUES@
    esac
}

_thrum_join() {         # bash splits at = : and @; into $joined as it was typed
    local piece before=" "
    joined=()
    for piece in "$@"; do
        if [[ $piece == [=:]* && ${#joined[@]} -gt 1 || $before == [=:@] || $before == =@ || $piece == @* && $before == *, ]]; then
            joined[${#joined[@]}-1]+=$piece
        else
            joined[${#joined[@]}]=$piece
        fi
        before=$piece
    done
}

_thrum() {
    local command="" flag="" count=0 rest="" word cur head="" kind="" list="" joined=() i last
    _thrum_join "${COMP_WORDS[@]:0:COMP_CWORD+1}"
    last=$((${#joined[@]} - 1))
    cur=${joined[last]}
    local replaced=${2-$cur}
    for ((i = 1; i < last; i++)); do
        word=${joined[i]}
        if [[ -n $flag ]]; then flag=""
        elif [[ -z $rest && $word == -- ]]; then rest=1
        elif [[ -z $rest && $word == -* ]]; then
            [[ $word != *=* && -n $(_thrum_values "$command $word") ]] && flag=$word
        elif [[ $count == 0 && $'\n'$(_thrum_words "$command")$'\n' == *$'\n'"$word"$'\n'* ]]; then
            command="${command:+$command }$word"
        else count=$((count + 1))
        fi
    done
    if [[ -z $flag && -z $rest && $cur == --*=* ]]; then
        flag=${cur%%=*} head=${cur%%=*}=
    fi
    if [[ -n $flag ]]; then kind=$(_thrum_values "$command $flag")
    elif [[ -z $rest && $cur == -* ]]; then list=$(_thrum_flags "$command")
    else
        [[ $count == 0 && -z $rest ]] && list=$(_thrum_words "$command")
        kind=$(_thrum_values "$command $count")
    fi
    COMPREPLY=()
    local found=${cur#"$head"}
    case "$kind" in
    ask*)
        [[ $found == *,* ]] && head+=${found%,*}, && found=${found##*,}
        list+=$'\n'$("$1" complete "${kind#ask }" 2>/dev/null || thrum complete "${kind#ask }" 2>/dev/null) ;;
    words*) list+=$'\n'${kind#words }; list=${list// /$'\n'} ;;
    files | folders)
        type compopt >/dev/null 2>&1 && compopt -o filenames 2>/dev/null
        list+=$'\n'$(if [[ $kind == files ]]; then compgen -f -- "$found"; else compgen -d -- "$found"; fi) ;;
    esac
    # What bash replaces is only the end of what was typed: the rest is left out of the answers.
    local typed=${cur%"$replaced"}
    while IFS= read -r word; do
        if [[ -n $word && ($word == "$found"* || $word == "@$found"*) ]]; then
            word=$head$word
            COMPREPLY[${#COMPREPLY[@]}]=${word#"$typed"}
        fi
    done <<< "$list"
}

complete -F _thrum thrum
"""


def bash_completion(descriptions: bool) -> str:
    """The script for bash, which shows no descriptions."""
    words, flags, places = _completions()
    return BASH.replace("@WORDS@", "\n".join(f'    "{name}") printf \'%s\\n\' {" ".join(row)} ;;' for name, row in words.items())) \
        .replace("@FLAGS@", "\n".join(f'    "{name}") printf \'%s\\n\' {" ".join(row)} ;;' for name, row in flags.items()
                                      if row and name != "*")) \
        .replace("@GLOBAL@", " ".join(flags["*"])).replace("@VALUES@", _cases(flags, places, "    %s) echo '%s' ;;"))


ZSH = r"""#compdef thrum
# Completion of thrum for zsh, written by 'thrum completion zsh'.
#   now:       source <(thrum completion zsh)            (after compinit)
#   for ever:  thrum completion zsh > "${fpath[1]}/_thrum", and start a new shell

_thrum_words() {        # the commands that may follow a command, into $reply
    reply=()
    case "$1" in
@WORDS@
    esac
}

_thrum_flags() {        # the flags of a command, into $reply
    reply=()
    case "$1" in
@FLAGS@
    esac
    reply+=(@GLOBAL@)
}

_thrum_values() {       # what completes the value of "command flag", or the word "command number", into $REPLY
    REPLY=""
    case "$1" in
@VALUES@
    esac
}

_thrum() {
    local command="" flag="" rest="" kind="" word REPLY
    local -a reply found
    local -i count=0 i
    for ((i = 2; i < CURRENT; i++)); do
        word=${(Q)words[i]}
        _thrum_words "$command"
        found=(${reply%%:*})
        if [[ -n $flag ]]; then flag=""
        elif [[ -z $rest && $word == -- ]]; then rest=1
        elif [[ -z $rest && $word == -* ]]; then
            _thrum_values "$command $word"
            [[ $word != *=* && -n $REPLY ]] && flag=$word
        elif (( count == 0 && ${found[(Ie)$word]} )); then
            command="${command:+$command }$word"
        else (( count += 1 ))
        fi
    done
    if [[ -z $flag && -z $rest && $PREFIX == --*=* ]]; then
        flag=${PREFIX%%=*}
        compset -P 1 '*='
    fi
    if [[ -n $flag ]]; then
        _thrum_values "$command $flag"; kind=$REPLY
    elif [[ -z $rest && $PREFIX == -* ]]; then
        _thrum_flags "$command"
        _describe -o 'flag' reply
        return
    else
        _thrum_words "$command"
        (( count == 0 && ${#reply} )) && [[ -z $rest ]] && _describe 'command' reply
        _thrum_values "$command $count"; kind=$REPLY
    fi
    case "$kind" in
    ask*)
        compset -P '*,'
        found=(${(f)"$("${(Q)words[1]/#\~\//$HOME/}" complete ${kind#ask } 2>/dev/null || thrum complete ${kind#ask } 2>/dev/null)"})
        compadd -a found ;;
    words*) found=(${=kind#words }); compadd -a found ;;
    files) _files ;;
    folders) _files -/ ;;
    esac
}

if [[ ${funcstack[1]} == _thrum ]]; then _thrum "$@"; else compdef _thrum thrum; fi
"""


def zsh_completion(descriptions: bool) -> str:
    words, flags, places = _completions()

    def items(row, meaning):
        return " ".join(_quoted(f"{word}:{meaning(value)}" if descriptions and meaning(value) else word) for word, value in row.items())

    def helped(value):
        return value[0]
    return ZSH.replace("@WORDS@", "\n".join(f'    "{name}") reply=({items(row, str)}) ;;' for name, row in words.items())) \
        .replace("@FLAGS@", "\n".join(f'    "{name}") reply=({items(row, helped)}) ;;' for name, row in flags.items()
                                      if row and name != "*")) \
        .replace("@GLOBAL@", items(flags["*"], helped)).replace("@VALUES@", _cases(flags, places, "    %s) REPLY='%s' ;;"))


FISH = r"""# Completion of thrum for fish, written by 'thrum completion fish'.
#   now:       thrum completion fish | source
#   for ever:  thrum completion fish > ~/.config/fish/completions/thrum.fish

function __thrum_line   # the command so far, and how many words follow it
    set -l command
    set -l count 0
    set -l skip 0
    set -l words (commandline -opc)
    for word in $words[2..-1]
        if test $skip = 1
            set skip 0
        else if contains -- $word @VALUED@
            set skip 1
        else if string match -q -- '-*' $word
        else if test $count = 0; and contains -- (string join ' ' $command $word) @PATHS@
            set command $command $word
        else
            set count (math $count + 1)
        end
    end
    echo (string join ' ' $command)
    echo $count
end

function __thrum_at     # whether the command is $argv[1], and as many words follow as $argv[2] says
    set -l line (__thrum_line)
    test "$line[1]" = "$argv[1]"; and begin
        test (count $argv) = 1; or test "$line[2]" = "$argv[2]"
    end
end

function __thrum_ask    # names that the daemon knows
    for program in (string replace -r '^~/' "$HOME/" -- (commandline -opc)[1]) thrum
        if command -q $program
            $program complete $argv[1] 2>/dev/null
            return
        end
    end
end

complete -c thrum -f
"""


def fish_completion(descriptions: bool) -> str:
    words, flags, places = _completions()

    def quoted(text):
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    def about(meaning):
        return f" -d {quoted(meaning)}" if descriptions and meaning else ""

    def values(kind):
        return {"files": " -r -F", "folders": " -x -a '(__fish_complete_directories)'", "": " -x"}.get(kind) \
            or (f" -x -a '(__thrum_ask {kind[4:]})'" if kind[:3] == "ask" else f" -x -a {quoted(kind[6:])}")

    lines = []
    for name, row in words.items():
        lines += [f"complete -c thrum -n '__thrum_at \"{name}\" 0' -a {word}{about(meaning)}" for word, meaning in row.items()]
    for name, row in places.items():
        for index, kind in enumerate(row):
            if kind.rstrip("…"):
                where = f"\"{name}\"" + ("" if kind[-1] == "…" else f" {index}")
                lines.append(f"complete -c thrum -n '__thrum_at {where}'{values(kind.rstrip('…')).replace(' -x', '').replace(' -r', '')}")
    for name, row in flags.items():
        where = "" if name == "*" else f" -n '__thrum_at \"{name}\"'"
        lines += [f"complete -c thrum{where} -l {flag[2:]}{f' -s {short[1:]}' if short else ''}"
                  f"{'' if kind is None else values(kind)}{about(meaning)}" for flag, (meaning, short, kind) in row.items()
                  if name == "*" or row[flag] != flags["*"].get(flag)]
    valued = sorted({flag for row in flags.values() for flag, (_, _, kind) in row.items() if kind is not None})
    paths = sorted(f"{name} {word}".strip() for name, row in words.items() for word in row)
    return FISH.replace("@VALUED@", " ".join(valued)).replace("@PATHS@", " ".join(map(quoted, paths))) + "\n".join(lines) + "\n"


POWERSHELL = r"""# Completion of thrum for PowerShell 5 or newer, written by 'thrum completion powershell'.
#   now:       thrum completion powershell | Out-String | Invoke-Expression
#   for ever:  put that line into the file that $PROFILE names

Register-ArgumentCompleter -Native -CommandName thrum -ScriptBlock {
    param($wordToComplete, $commandAst, $cursorPosition)
    $words = @{
@WORDS@
    }
    $flags = @{
@FLAGS@
    }
    $values = @{
@VALUES@
    }
    $command = ''; $flag = ''; $count = 0; $rest = $false; $list = @(); $found = @(); $head = ''
    $cur = "$wordToComplete".Trim("'", '"')
    $typed = @($commandAst.CommandElements | Select-Object -Skip 1 |
        Where-Object { $_.Extent.EndOffset -lt $cursorPosition -or ($_.Extent.EndOffset -eq $cursorPosition -and $cur -eq '') } |
        ForEach-Object { $_.Extent.Text.Trim("'", '"') })
    foreach ($word in $typed) {
        if ($flag) { $flag = '' }
        elseif (-not $rest -and $word -ceq '--') { $rest = $true }
        elseif (-not $rest -and $word -like '-*') {
            if ($values.ContainsKey("$command $word") -or $values.ContainsKey("* $word")) { $flag = $word }
        }
        elseif ($count -eq 0 -and $words.ContainsKey($command) -and $words[$command].Contains($word)) {
            $command = "$command $word".Trim()
        }
        else { $count += 1 }
    }
    if (-not $flag -and -not $rest -and $cur -match '^(--[^=]+=)(.*)$') {
        $head = $Matches[1]; $flag = $head.TrimEnd('='); $cur = $Matches[2]
    }
    $kind = ''
    if ($flag) {
        $kind = if ($values.ContainsKey("$command $flag")) { $values["$command $flag"] } else { $values["* $flag"] }
    }
    elseif (-not $rest -and $cur -like '-*') {
        foreach ($row in $flags[$command], $flags['*']) {
            if ($row) { $list += $row.GetEnumerator() | ForEach-Object { [pscustomobject]@{ Word = $_.Key; About = $_.Value } } }
        }
    }
    else {
        if ($count -eq 0 -and -not $rest -and $words.ContainsKey($command)) {
            $list += $words[$command].GetEnumerator() | ForEach-Object { [pscustomobject]@{ Word = $_.Key; About = $_.Value } }
        }
        $kind = if ($values.ContainsKey("$command $count")) { $values["$command $count"] } else { $values["$command ..."] }
    }
    if ($kind -like 'ask *') {
        $program = $commandAst.CommandElements[0].Extent.Text.Trim("'", '"')
        try { $found = & $program complete $kind.Substring(4) 2>$null } catch { }
    }
    elseif ($kind -like 'words *') { $found = $kind.Substring(6).Split(' ') }
    $list += $found | ForEach-Object { [pscustomobject]@{ Word = $_; About = '' } }
    $list | Where-Object { $_.Word -and ($_.Word.StartsWith($cur) -or $_.Word.StartsWith("@$cur")) } | ForEach-Object {
        $text = $head + $_.Word
        if ($text -like '*@*') { $text = "'$text'" }       # else @ada would be a variable
        $about = if ($_.About) { $_.About } else { $_.Word }
        [System.Management.Automation.CompletionResult]::new($text, $_.Word, 'ParameterValue', $about)
    }
}
"""


def powershell_completion(descriptions: bool) -> str:
    """The script for PowerShell, which completes file names by itself where it gets no answer."""
    words, flags, places = _completions()

    def quoted(text):
        for mark in "'‘’‚‛":            # PowerShell takes each of them for the end of the text
            text = text.replace(mark, mark * 2)
        return f"'{text}'"

    def table(rows):
        return "\n".join(f"        {quoted(name)} = [ordered]@{{ " + "; ".join(
            f"{quoted(word)} = {quoted(meaning if descriptions else '')}" for word, meaning in row.items()) + " }"
            for name, row in rows.items() if row)
    values = {f"{name} {flag}": kind for name, row in flags.items() for flag, (_, _, kind) in row.items() if kind is not None}
    values.update((f"{name} {'...' if kind[-1] == '…' else index}", kind.rstrip("…"))
                  for name, row in places.items() for index, kind in enumerate(row) if kind.rstrip("…"))
    return POWERSHELL.replace("@WORDS@", table(words)) \
        .replace("@FLAGS@", table({name: {flag: entry[0] for flag, entry in row.items()} for name, row in flags.items()})) \
        .replace("@VALUES@", "\n".join(f"        {quoted(name)} = {quoted(kind)}" for name, kind in values.items()))


SHELLS = {"bash": bash_completion, "zsh": zsh_completion, "fish": fish_completion, "powershell": powershell_completion}


async def completion(console: Console, args: Args) -> int:
    shell = next(name for name in SHELLS if console.row is HERE[f"completion {name}"])
    script = SHELLS[shell](not args.no_descriptions)
    await console.answer({"shell": shell, "script": script}, script)
    return 0


COMPLETED = {"agents": (("agent", "agent_id"),), "roles": (("agent", "role"),), "groups": (("group", "name"),)}
COMPLETED["names"] = sum(COMPLETED.values(), ())        # of a kind: which methods list it, under which key


async def complete(console: Console, args: Args) -> int:
    """Names for the shells, one a line.  Silent whatever is wrong, starts nothing, and lets nobody wait."""
    found = set()
    try:
        places = find_places(start_directory(args))
        if args.kind == "worktrees":
            own = sync_entries(places)
            names = [os.path.basename(path) for entry, path in registered_worktrees(places.common) if entry not in own]
            await console.out("".join(f"{name}\n" for name in names if WORKTREE_NAME.issuperset(name)))
            return 0
        with Client(dial(places.var, COMPLETE_S), COMPLETE_S) as client:
            for what, key in COMPLETED.get(args.kind, ()):
                found |= {row[key] for row in client.call(what + ".list")[what + "s"]}
    except (ThrumError, OSError):
        return 0
    mark = "@" if args.kind in ("names", "agents") else ""
    await console.out("".join(f"{mark}{name}\n" for name in sorted(found) if name and WORD.issuperset(name)))
    return 0


# ---- settings

def unknown_keys(config: dict, above: str = "") -> list:
    """The dotted paths in a configuration that are no known setting, nor lead to one."""
    known = [place for name, setting in SETTINGS.items() for place in (name, setting.also) if place]
    found = []
    for key, value in config.items():
        path = above + (key if WORD.issuperset(key) and key else json.dumps(key))
        if isinstance(value, dict) and any(place.startswith(path + ".") for place in known):
            found += unknown_keys(value, path + ".")
        elif path not in known:
            found.append(path)
    return sorted(found)


def unknown_setting(key: str, thrum: str) -> ThrumError:
    return ThrumError(f"unknown setting {one_line(key)!r} for {thrum}/config.json{did_you_mean(key, SETTINGS)} "
                      "'thrum config show' lists them")


async def config_show(console: Console, args: Args) -> int:
    places, environ = console.places, console.world.environ
    config = load_config(places.thrum)
    found = {name: setting_in_effect(config, name, environ) for name in SETTINGS}
    shown = {name: shown_setting(name, value) for name, (value, _) in found.items()}
    try:
        with open(places.var + "/ws.port", encoding="ascii") as file:
            shown["daemon.ws_port"] = f"{int(file.read(16))} (active)"
    except (OSError, ValueError):
        pass
    running = answers(places.var)
    daemon = {name: {"value": shown[f"daemon.{name}"], "source": found[f"daemon.{name}"][1]}
              for name in ("local_only", "sync_interval", "ws_port")}
    daemon["status"] = f"running (PID {read_pid(places)})" if running else "not running"
    if running:
        daemon.update(pid=read_pid(places), socket=environ.get("THRUM_SOCKET") or places.var + "/thrum.sock")
    try:
        who = console.identity()
        identity = compact(agent=who.agent_id(), role=who.role, module=who.module,
                           file=f".thrum/identities/{who.file}" if who.file else None)
        nobody = ""
    except NoIdentity as error:
        identity, nobody = {}, str(error)
    overrides = [{"env_var": name, "value": environ[name]} for name in ENVIRONMENT
                 if name.startswith("THRUM_") and environ.get(name, "").strip()]
    unknown = unknown_keys(config)
    primary, source = found["runtime.primary"]
    report = {"config_file": places.config, "runtime": {"primary": primary, "source": source}, "daemon": daemon, "identity": identity,
              "overrides": overrides,
              "settings": [{"key": name, "value": shown[name], "source": found[name][1]} for name in SETTINGS],
              **compact(unknown=unknown)}

    def section(title, rows):
        return f"\n{console.bold(title)}\n" + rows_of([[f"  {label}", value] for label, value in rows]) if rows else ""

    def sourced(name):
        return f"{one_line(shown[name]) or 'unset'} ({found[name][1]})"

    text = section("Thrum Configuration", [("Config file:", plain(places.config))]).lstrip("\n")
    text += section("Runtime", [("Primary:", sourced("runtime.primary"))])
    text += section("Daemon", [("Local-only:", sourced("daemon.local_only")), ("Sync interval:", sourced("daemon.sync_interval")),
                               ("WS port:", sourced("daemon.ws_port")), ("Status:", daemon["status"]),
                               *([("Socket:", plain(daemon["socket"]))] if running else [])])
    text += section("Identity", [(f"{key.capitalize()}:", one_line(value)) for key, value in identity.items()]
                    or [("Agent:", f"none: {one_line(nobody, ERROR_MAX)}")])
    text += section("Overrides (environment)", [(override["env_var"], one_line(override["value"])) for override in overrides])
    text += f"\n{console.bold('All settings')} (* has no effect in this version)\n" + rows_of(
        [[f"  {name}{'*' if setting.later else ''}", sourced(name), *([setting.help] if args.verbose else [])]
         for name, setting in SETTINGS.items()], console.width if args.verbose else 0)
    if unknown:
        text += f"\n{console.bold('Kept, but not known to this version')}\n" + "".join(f"  {one_line(key)}\n" for key in unknown)
    await console.answer(report, text)
    return 0


def _kept_value(config: dict, key: str, thrum: str):
    """The value of a key that is no known setting; raises ThrumError where the file has none, or a whole section."""
    value = get_setting(config, key)
    if value is None:
        raise unknown_setting(key, thrum)
    if isinstance(value, dict):
        raise ThrumError(f"{one_line(key)!r} is a section of {thrum}/config.json; name one of its settings")
    return value


async def config_get(console: Console, args: Args) -> int:
    config, key = load_config(console.places.thrum), args.key
    if key in SETTINGS:
        value, source = setting_in_effect(config, key, console.world.environ)
    else:
        value, source = _kept_value(config, key, console.places.thrum), "config.json"
    if type(value) is str:
        value = shown_setting(key, value)
    await console.answer({"key": key, "value": value, "source": source},
                         (value if type(value) is str else json.dumps(value, ensure_ascii=False)) + "\n")
    return 0


async def config_set(console: Console, args: Args) -> int:
    if args.key not in SETTINGS:
        raise unknown_setting(args.key, console.places.thrum)
    return await _change_setting(console, args.key, parse_setting(args.key, args.value))


async def config_unset(console: Console, args: Args) -> int:
    if args.key not in SETTINGS:
        _kept_value(load_config(console.places.thrum), args.key, console.places.thrum)
    return await _change_setting(console, args.key, None)


async def _change_setting(console: Console, key: str, value) -> int:
    """Write a setting (None removes it), and say what it was, what it is, and what has to be done."""
    places, environ = console.places, console.world.environ
    setting = SETTINGS.get(key) or Setting(None, None, "")
    changes = {key: value, **({setting.also: None} if setting.also else {})}
    before = save_config(places.thrum, changes)
    old = next((before[place] for place in changes if before[place] is not None), None)
    restart = setting.restart and not setting.later and old != value
    hide = {name: shown_setting(key, given) if type(given) is str else given for name, given in (("old", old), ("value", value))}
    if key in SETTINGS:
        default = f"{shown_setting(key, setting.default) or 'unset'} (default)"
        was, now = (default if given is None else shown_setting(key, given) for given in (old, value))
    else:
        was, now = shown_setting(key, old), "removed"
    text = f"✓ {key}: {one_line(was)} → {one_line(now)}" if old != value else f"✓ {key} is {one_line(now)} already"
    if setting.later:
        text += "\n  It has no effect in this version."
    if restart:
        text += "\n  The daemon reads it when it starts" + ("; 'thrum daemon restart' applies it now." if answers(places.var) else ".")
    if setting.variable and environ.get(setting.variable, "").strip():
        await console.note(f"Note: {setting.variable} is set and counts, not the file")
    await console.answer({"key": key, **hide, "restart": restart}, text)
    return 0



SETTING = Argument("KEY", "the setting, such as daemon.autostart")
HERE = {
    "init": Command(init, "Set thrum up in this repository, or mend it; overwrites nothing.", (
        Argument("--force", "install this program whatever its version; put missing settings back", bool),
        Argument("--stealth", "ignore .thrum in .git/info/exclude, not in .gitignore", bool),
        Argument("--dry-run", "only say what would be done", bool),
        Argument("--runtime", "the runtime that is used most: " + ", ".join(RUNTIMES)),
        Argument("--agent-name", "register an agent of this name"), Argument("--agent-role", "… in this role (implementer)"),
        Argument("--agent-module", "… for this module (main)"),
        Argument("--remove", "take everything out again; asks about the branch", bool),
        Argument("--yes", "with --remove: the branch too, without asking", bool)), "thrum init", here=True, does="changes", hushed=True),
    "setup": Command(setup, "Connect this git worktree with the main one.", (
        Argument("WORKTREE", "the worktree to connect, instead of this one", required=False),
        Argument("--all", "every linked worktree", bool), Argument("--main-repo", "where the main worktree is")),
        "thrum setup --all", here=True, does="changes", hushed=True),
    "worktree create": Command(worktree_create, "Make a git worktree on a branch of its own and connect it, for an agent if you like.", (
        Argument("NAME", "its name: the folder is called REPOSITORY-NAME"), Argument("--branch", "its branch, instead of NAME"),
        Argument("--base", "where a new branch begins, instead of HEAD"), Argument("--path", "its folder"),
        Argument("--agent", "register this agent there, in --role (implementer) for --module (main)")),
        "thrum worktree create login --agent bob --role implementer", here=True, does="changes", hushed=True),
    "worktree list": Command(worktree_list, "The worktrees of this repository: who works there, and what is not merged or committed.", (),
                             "thrum worktree list", here=True),
    "worktree remove": Command(worktree_remove, "Remove a worktree in which nothing would be lost; its branch stays, sessions end.", (
        Argument("NAME", "its name, path or branch, or its agent"), Argument("--force", "whatever would be lost", bool),
        Argument("--keep-agent", "sessions go on", bool)), "thrum worktree remove login", here=True, does="changes", hushed=True),
    "migrate": Command(migrate, "Move a log that git tracks beside the code to the branch a-sync.", (), "thrum migrate", here=True,
                       does="changes"),
    "guard install": Command(guard_install, "Have git stop a commit that touches somebody else's claim.", (
        Argument("--force", "replace hooks of ours that somebody has edited", bool),), "thrum guard install", here=True, does="changes"),
    "guard remove": Command(guard_remove, "Take the hooks out again; those of before return.", (
        Argument("--force", "also hooks of ours that somebody has edited", bool),), "thrum guard remove", here=True, does="changes"),
    "guard status": Command(guard_status, "Which hooks are installed, and where.", (), "thrum guard status", here=True),
    "guard check": Command(guard_check, f"Whether staged files are claimed by others; exit status {GUARD_STOPS} if so.", (),
                           "thrum guard check", here=True, failure=0),
    "guard message": Command(guard_message, "", (Argument("FILE", ""), Argument("SOURCE", "", required=False),
                                                 Argument("SHA", "", required=False)), here=True, failure=0),
    "why": Command(why, "Which commit, agent and conversation a line of a file came from.", (
        Argument("LINE", "FILE:LINE"), Argument("--limit", "how many messages, at most 100", int, 10)),
        "thrum why src/parser.py:42", here=True),
    "version": Command(version, "The version of this program.", here=True, does="tells"),
    "help": Command(help_command, "Help on a command.", (Argument("COMMAND", "which", required=False, many=True),),
                    "thrum help send", here=True, does="tells"),
    "config show": Command(config_show, "Every setting, its value, and where it comes from; --verbose explains them.", (),
                           "thrum config show --verbose", here=True),
    "config get": Command(config_get, "The value of a setting that counts now.", (SETTING,),
                          "thrum config get daemon.autostart", here=True),
    "config set": Command(config_set, "Change a setting; the others in the file are kept.", (
        SETTING, Argument("VALUE", "its new value; after -- if it begins with -")), "thrum config set daemon.autostart false", here=True,
        does="changes", hushed=True),
    "config unset": Command(config_unset, "Remove a setting, so that its default counts.", (SETTING,),
                            "thrum config unset daemon.autostart", here=True, does="changes", hushed=True),
    **{f"completion {_name}": Command(completion, f"Print the script for {_name}, which says how to load it.", (
        Argument("--no-descriptions", "leave out what the words mean", bool),), f"thrum completion {_name}", here=True, does="tells")
       for _name in SHELLS},
    "complete": Command(complete, "", (Argument("KIND", ""),), here=True),
    "daemon start": Command(daemon_start, "Start the daemon.", (Argument("--local", "nothing leaves this machine", bool),),
                            "thrum daemon start", here=True, does="changes", hushed=True),
    "daemon stop": Command(daemon_stop, "Stop the daemon until 'daemon start' or 'init'.", here=True, does="changes", hushed=True),
    "daemon restart": Command(daemon_restart, "Stop and start the daemon; waiting commands go on.", (
        Argument("--from", "use this thrum.py from now on"),), "thrum daemon restart --from thrum.py", here=True,
        does="changes", hushed=True),
    "daemon status": Command(daemon_status, "Whether the daemon runs, and how it is.", here=True),
    "daemon logs": Command(daemon_logs, "What the daemon wrote into its log.", (
        Argument("--tail", "how many lines", int, 50),), "thrum daemon logs --tail 20", here=True),
    "daemon run": Command(daemon_run, "", (Argument("--ready-fd", "", int),), here=True, does="changes"),
}
HERE["setup worktree"] = HERE["setup"]
UNPLACED = ("init", "setup", "setup worktree", "version", "help", "complete",          # these need no installation
            "guard check", "guard message", *(f"completion {_name}" for _name in SHELLS))


def start_directory(args: Args) -> str:
    """Where to look for the repository: --repo, else THRUM_HOME, else here."""
    start = args.repo or os.environ.get("THRUM_HOME", "").strip() or "."
    if not os.path.isdir(start):
        raise NotInitialized(f"{start} is not a directory")
    return start


def run_remote(console: LocalConsole, row: Command, state: dict) -> int:
    """Run a command in the daemon, and again with the next daemon if this one goes away; its exit status."""
    places, argv, lost_at, asked, upgraded = console.places, console.argv, None, [], False
    waits = row.run in (wait, watch)
    patience_s = min(AWAY_S, max(console.args.timeout, 0)) if row.run is wait else AWAY_S

    def lose():
        nonlocal lost_at
        if lost_at is None:
            lost_at = time.monotonic()
            if not console.args.quiet and not console.args.json and waits:
                show(2, b"Lost connection to daemon, reconnecting...\n")

    if state["cursor"]:         # the launcher has been that far
        lose()

    def other(kind, payload):
        answer = answer_record(places.top, argv, kind, payload)
        if answer is None:
            asked.append(kind)
        return answer

    while True:
        try:
            sock = reach(places, start=not row.offline)
        except ThrumError as error:
            if row.offline and isinstance(error, Unreachable):
                return run_now(run_command(console, COMMANDS))
            if lost_at is None or not os.path.isdir(places.thrum):      # with `init --remove` nothing comes back
                raise
            if time.monotonic() - lost_at > patience_s:
                if patience_s < AWAY_S:
                    show(2, b"" if console.args.quiet or console.args.json else TIMED_OUT.encode() + b"\n")
                    return 1
                raise
            time.sleep(RETRY_S)
            continue
        began = time.monotonic()
        try:
            status = forward(sock, places.var, describe(argv, places.top, console.program, __version__, FORWARDED, state), state, other)
        except OSError:
            status = None
        finally:
            sock.close()
        if status is not None:
            return status
        if b"U" in asked:
            if upgraded:
                raise ThrumError("the running daemon is older than this program and could not be replaced; run "
                                 "'thrum daemon restart --from <this thrum.py>'")
            upgraded = True
            asked.clear()
            upgrade(places)
            continue
        if b"H" in asked:
            raise ThrumError("the running daemon does not know this command; 'thrum daemon restart' renews it")
        if time.monotonic() - began > START_S:
            lost_at = None      # it was well in between
        if lost_at is not None and time.monotonic() - lost_at > patience_s:
            raise Unreachable("the daemon went away while it answered; see 'thrum daemon logs'")
        lose()
        time.sleep(RETRY_S)


def upgrade(places: Places) -> None:
    """This program is newer than the daemon: put it in its place.  Who comes second finds it done."""
    refresh(places)
    try:
        with Client(dial(places.var)) as client:
            current = client.call("health")["version"]
    except (OSError, ThrumError):
        current = ""
    if version_key(current) < version_key(__version__):
        stop_daemon(places)
    start_daemon(places)


def main(argv: list | None = None, home: str = "", program: str = "", state: dict | None = None) -> int:
    """Run a command line; its exit status.

    The launcher says which worktree is its own, how it was called, and what it has done already.
    """
    hold_streams()
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return _main(argv, home, program, state or dict(STATE))
    except ThrumError as error:
        show(2, error_line(error).encode(errors="backslashreplace"))
        return error.status
    except OSError as error:
        return give_up(EOFError(os_problem(error)), argv)
    except EOFError as end:
        return give_up(end, argv)
    except KeyboardInterrupt:
        return 130


def _main(argv: list, home: str, program: str, state: dict) -> int:
    if os.name != "posix":
        raise ThrumError("thrum needs Linux or macOS: it speaks over Unix sockets")
    if sys.version_info < (3, 9):       # noqa: UP036 - somebody copies this file next to an older Python
        raise ThrumError(f"thrum needs Python 3.9 or newer; this is {sys.version.split()[0]}")
    if argv and argv[0] in ("--version", "-v"):
        argv = ["version", *argv[1:]]
    rows = {**COMMANDS, **HERE}
    name, rest = split_command(argv, rows)
    world = World()
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ThrumError("the working directory has gone; change to one that exists") from None
    if not name and "--version" in rest:
        name = "version"
    if name not in rows:
        if name:
            if rest and rest[0][:1] != "-":
                raise unknown_command(rest[0], name)
            show(1, group_help(name).encode())
            return 0
        known = {flag.name for flag in GLOBAL_FLAGS}
        if not rest or "--help" in rest or "-h" in rest:
            show(1, root_help().encode())
            return 0
        if rest[0][:1] == "-":
            raise Usage(f"unknown flag: {rest[0]}" if rest[0] not in known else "a command is missing; 'thrum help' lists them")
        raise unknown_command(rest[0])
    row = rows[name]
    rest = [word for word in rest if word != "--version"] if name == "version" else rest
    try:
        args = parse_command(row, rest)
        if args.help:
            show(1, help_text(name, row).encode())
            return 0
        places = None
        if row.run is quickstart and args.dry_run:      # before anything is made, also where nothing is yet
            console = LocalConsole(world, None, locate(os.path.realpath(start_directory(args)))[0], argv, program)
            console.args, console.row = args, row
            return run_now(row.run(console, args))
        if name not in UNPLACED:
            places = _find(args, home, row)
        top = places.top if places else os.getcwd()
        if program in ("", sys.argv[0]) and not home:
            program = _program(places)
        console = LocalConsole(world, places, top, argv, program)
        console.args, console.row = args, row
        if row.here:
            return int(run_now(row.run(console, args)))
        return run_remote(console, row, state)
    except ThrumError as error:
        if row.run is prime and not isinstance(error, Usage):
            console = LocalConsole(world, places, places.top if places else os.getcwd(), argv, program or _program(places))
            console.args, console.row = args, row
            return run_now(prime_without_daemon(console, str(error)))
        error.status = row.failure
        raise


def _find(args: Args, home: str, row: Command) -> Places:
    """The places for a command; initializes them for one that joins."""
    start = start_directory(args)
    try:
        places = find_places(start)
    except NotInitialized:
        if home and start == "." and not git_common_dir(locate(os.getcwd())[0]):
            return find_places(home)
        if not row.joins:
            raise
        places, done, _ = initialize(start)
        if not args.quiet and not args.json:
            show(1, f"✓ Thrum initialized in {places.root}\n".encode(errors="backslashreplace"))
        return places
    if row.joins:
        if not os.path.isdir(places.local):
            places, _, _ = set_up_worktree(places.top, places.root)
        else:
            refresh(places)
    return places


def _program(places: Places | None) -> str:
    """How to call thrum from here, for hints: the launcher when there is one, else what was called."""
    if places and os.path.exists(places.local + "/bin/thrum"):
        return ".thrum/bin/thrum" if os.path.realpath(os.getcwd()) == places.top else places.local + "/bin/thrum"
    name = os.path.basename(sys.argv[0])
    return "thrum" if name == "thrum" else "python3 -m thrum" if name == "__main__.py" else f"python3 {sys.argv[0]}"


if __name__ == "__main__":
    # Under its own name too, so that what the file defines exists once.
    sys.modules.setdefault("thrum", sys.modules["__main__"])
    sys.exit(main())
