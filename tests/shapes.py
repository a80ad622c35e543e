"""The golden shapes of tests/shapes.json, and the one checker of shapes.

A shape is one of:

    {"key": shape, "optional?": shape}    an object with at least these keys; `"*"` is the shape of every other key
    ["shape"]                             a list of any length
    "Body|null|'text'"                    alternatives: names of shapes, kinds (below), and literal texts in quotes
    dict, list, str, int, ...             a Python type, in shapes that a test writes down itself
    ("a", "b")                            one of these values, there too

A key that is absent must be optional; keys that are not named are allowed, since replies may grow.
"""

import json
import re
from pathlib import Path

SHAPES = json.loads(Path(__file__).with_name("shapes.json").read_text())

ULID = "[0-7][0-9A-HJKMNP-TV-Z]{25}"
KINDS = {
    "str": lambda v: isinstance(v, str), "text": lambda v: isinstance(v, str) and v != "",
    "int": lambda v: type(v) is int, "count": lambda v: type(v) is int and v >= 0, "bool": lambda v: type(v) is bool,
    "null": lambda v: v is None, "object": lambda v: isinstance(v, dict), "any": lambda v: True,
}
PATTERNS = {
    # what the daemon stamps: RFC 3339 in UTC with nine digits, so that text order is time order (design, section 4)
    "stamp": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z",
    # what comes from elsewhere, such as a file's time
    "time": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)",
    "name": "[a-z0-9_-]+|user:[A-Za-z0-9_-]{1,32}|agent:[^:]+:[^:]+",
    "base64": "([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?",
    "msg": "msg_" + ULID, "thr": "thr_" + ULID, "ses": "ses_" + ULID, "evt": "evt_" + ULID, "tok": "tok_" + ULID,
    "clm": "clm_" + ULID,
    "grp": f"grp_({ULID}|everyone|role_.+)", "repo": "r_[0-9A-Z]{12}",
}


def shape(name):
    """A golden shape by its name, such as `Body`, `rpc message.send` or `cli inbox`."""
    kind, _, rest = name.partition(" ")
    return SHAPES[kind][rest] if rest else SHAPES["shared"][kind]


def fits(value, name):
    """Whether a value is of one of the simple kinds or a literal text."""
    if name[0] == "'":
        return value == name[1:-1]
    if name in PATTERNS:
        return isinstance(value, str) and re.fullmatch(PATTERNS[name], value, re.ASCII) is not None
    return KINDS[name](value)


def shaped(value, wanted, where="$"):
    """Hold a JSON value to a shape."""
    if isinstance(wanted, dict):
        assert isinstance(value, dict), f"{where} is {value!r}, not an object"
        for key, inner in wanted.items():
            name = key.rstrip("?")
            if key == "*":
                for other in value.keys() - {k.rstrip("?") for k in wanted}:
                    shaped(value[other], inner, f"{where}.{other}")
            elif name in value:
                shaped(value[name], inner, f"{where}.{name}")
            else:
                assert key.endswith("?"), f"{where} has no {name}: {sorted(value)}"
    elif isinstance(wanted, list):
        assert isinstance(value, list), f"{where} is {value!r}, not a list"
        for index, item in enumerate(value):
            shaped(item, wanted[0], f"{where}[{index}]")
    elif isinstance(wanted, str):
        problems = []
        for name in wanted.split("|"):
            if not (name[0].isupper() or " " in name and name[0] != "'"):
                if fits(value, name):
                    return
                continue
            try:
                return shaped(value, shape(name), where)
            except AssertionError as problem:
                problems.append(str(problem))
        raise AssertionError("; ".join(problems) or f"{where} is {value!r}, not {wanted}")
    elif isinstance(wanted, tuple):
        assert value in wanted, f"{where} is {value!r}, not one of {wanted}"
    else:
        assert type(value) is wanted, f"{where} is {value!r}, not of type {wanted.__name__}"
