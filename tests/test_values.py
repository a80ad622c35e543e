"""Sections 1 to 4: stamps, ids, canonical JSON, durations, names, Records, and what a well-formed event is."""

import json
import random

import pytest

import thrum
from conftest import FakeWorld
from generate import go_stamp, history, large_log

# ---- stamps

STAMPS = [
    # stamp, ns since the epoch
    ("1970-01-01T00:00:00.000000000Z", 0),
    ("2026-03-10T09:17:00.204117003Z", 1_773_134_220_204_117_003),
    ("2026-12-31T23:59:59.999999999Z", 1_798_761_599_999_999_999),
    ("2000-02-29T00:00:00.000000001Z", 951_782_400_000_000_001),
]
OTHER_SPELLINGS = [
    ("2026-03-10T09:17:00Z", "2026-03-10T09:17:00.000000000Z"),
    ("2026-03-10T09:17:00.2Z", "2026-03-10T09:17:00.200000000Z"),
    ("2026-03-10T09:17:00.123456789987Z", "2026-03-10T09:17:00.123456789Z"),
    ("2026-03-10t09:17:00z", "2026-03-10T09:17:00.000000000Z"),
    ("2026-03-10 09:17:00Z", "2026-03-10T09:17:00.000000000Z"),
    ("2026-03-10T09:17:00+02:00", "2026-03-10T07:17:00.000000000Z"),
    ("2026-03-10T09:17:00.5-05:30", "2026-03-10T14:47:00.500000000Z"),
    ("2026-12-31T23:59:60Z", "2027-01-01T00:00:00.000000000Z"),
]
NO_STAMPS = [
    "", "x", "2026", "2026-03-10", "2026-03-10T09:17:00", "2026-03-10T09:17Z", "2026-13-10T09:17:00Z", "2026-00-10T09:17:00Z",
    "2026-03-32T09:17:00Z", "2026-03-10T24:17:00Z", "2026-03-10T09:60:00Z", "2026-03-10T09:17:61Z", "2026-03-10T09:17:00.Z",
    "2026-03-10T09:17:00+2:00", "2026-03-10T09:17:00+0200", "2026-03-10T09:17:00Zx", "1969-12-31T23:59:59Z", "20260310T091700Z ...",
    "2026-03-10T09:17:00.1234567890123456789012345678901234567890123456Z",
    "2026-02-31T00:00:00Z", "2026-3-010T00:00:00Z", "2026-03-10T+1:00:00Z", "2026-03-10T 1: 2: 3Z", "2026-03-10T09:17:00+99:99",
    "1970-01-01T00:00:00+14:00", "2026-03-10X09:17:00Z", "2026-03-10T09:17:00,5Z",
]


@pytest.mark.parametrize("stamp, ns", STAMPS)
def test_stamps_both_ways(stamp, ns):
    assert (thrum.ns_of(stamp), thrum.stamp_of(ns)) == (ns, stamp)


@pytest.mark.parametrize("other, stamp", OTHER_SPELLINGS)
def test_stamps_of_other_programs(other, stamp):
    assert thrum.stamp_of(thrum.ns_of(other)) == stamp


@pytest.mark.parametrize("text", NO_STAMPS, ids=repr)
def test_what_is_not_a_stamp_is_refused(text):
    with pytest.raises(ValueError, match="not an RFC 3339 time"):
        thrum.ns_of(text)


def test_any_time_survives_both_spellings():
    rng = random.Random(1)
    for _ in range(500):
        ns = rng.randrange(thrum.FAR)
        assert thrum.ns_of(thrum.stamp_of(ns)) == thrum.ns_of(go_stamp(ns)) == ns


def test_the_order_of_stamps_is_the_order_of_times():
    """That is why a stamp has nine digits, never a 0 as the last: no reader trims one."""
    world = FakeWorld()
    rng, stamps = random.Random(2), []
    for _ in range(500):
        world.at += rng.choice((0, 1, 9, 10, -1_000_000, 10**9, 7))
        stamps.append(thrum.stamp_of(world.stamp_ns(rng.choice((0, world.at + rng.randrange(100))))))
    assert stamps == sorted(set(stamps))
    assert all(stamp[-2] != "0" and len(stamp) == 30 for stamp in stamps)


def test_a_stamp_is_later_than_what_it_answers_and_what_was_seen(world):
    for after in (0, world.at - 1, world.at, world.at + 9, world.at + 10**12):
        assert world.stamp_ns(after) > after
    world.seen(world.at + 10**15)
    assert world.stamp_ns() > world.at + 10**15
    world.seen(5)
    assert world.stamp_ns() > world.at + 10**15


# ---- ids

def test_crockford():
    for number, length, text in ((0, 1, "0"), (31, 1, "Z"), (32, 2, "10"), (0, 26, "0" * 26), (2**130 - 1, 26, "Z" * 26),
                                 (2**128 - 1, 26, "7" + "Z" * 25), (17, 3, "00H")):
        assert thrum.crockford(number, length) == text
    assert not set("ILOU") & set(thrum.CROCKFORD)


def test_hash32_is_the_whole_hash():
    """SHA-256 in 52 characters, first bits first: decoding gives the digest back."""
    import hashlib
    for text in ("", "x", "https://github.com/acme/widgets", "ü"):
        value = 0
        for character in thrum.hash32(text):
            value = value * 32 + thrum.CROCKFORD.index(character)
        assert len(thrum.hash32(text)) == 52
        assert (value >> 4).to_bytes(32, "big") == hashlib.sha256(text.encode()).digest()


def test_ids_rise_whatever_the_clock_does(world):
    ids = []
    for step in (0, 0, 1_000_000, -5_000_000, 0, 10_000_000):
        world.at += step
        ids.append(world.new_id("msg"))
    assert ids == sorted(set(ids))
    assert all(id[:4] == "msg_" and len(id) == 30 and set(id[4:]) <= set(thrum.CROCKFORD) for id in ids)


def test_an_id_begins_with_its_time(world):
    world.at = thrum.ns_of("2026-03-10T09:17:00.000Z")
    assert world.new_id("msg")[4:14] == thrum.crockford(world.at // 1_000_000, 10) == "01KKBGJ29Z"[:8] + world.new_id("x")[10:12]


def test_hostname():
    for name, expected in (("box", "box"), ("box.local", "box"), ("box.locale", "box.locale"), ("a.local.local", "a.local")):
        assert thrum.World({"THRUM_HOSTNAME": name}).hostname() == expected
    assert thrum.World({}).hostname()


# ---- canonical JSON

CANONICAL = [
    ({}, b"{}"),
    ({"b": 1, "a": 2}, b'{"a":2,"b":1}'),
    ({"a": {"z": 1, "b": [{"y": 1, "x": 2}]}}, b'{"a":{"b":[{"x":2,"y":1}],"z":1}}'),
    ({"a": "<b> & </b>"}, b'{"a":"\\u003cb\\u003e \\u0026 \\u003c/b\\u003e"}'),
    ({"<&>": "<"}, b'{"\\u003c\\u0026\\u003e":"\\u003c"}'),
    ({"a": "\u2028\u2029"}, b'{"a":"\\u2028\\u2029"}'),
    ({"a": "naïve 漢字 😀 \x7f"}, '{"a":"naïve 漢字 😀 \x7f"}'.encode()),
    ({"a": 'quote " back \\ tab \t nl \n cr \r'}, b'{"a":"quote \\" back \\\\ tab \\t nl \\n cr \\r"}'),
    ({"a": "\x01\x1f"}, b'{"a":"\\u0001\\u001f"}'),
    ({"a": "\\u003c"}, b'{"a":"\\\\u003c"}'),
    ({"a": [True, False, None, 0, -1, 10**20]}, b'{"a":[true,false,null,0,-1,100000000000000000000]}'),
    ({"Z": 1, "a": 2, "_": 3, "ä": 4}, '{"Z":1,"_":3,"a":2,"ä":4}'.encode()),
]


@pytest.mark.parametrize("value, line", CANONICAL, ids=[str(line) for _, line in CANONICAL])
def test_canonical_both_ways(value, line):
    assert thrum.canonical(value) == line
    assert thrum.decode_object(line) == value
    assert thrum.decode_object(line.decode()) == value


SPEC_LINES = [      # of spec/storage.md, section 5.4: what the reference writes
    '{"agent_id":"otter","body":{"content":"Lexer is green; a\\u003cb \\u0026 c\\u003ed cases pass","format":"markdown"},'
    '"event_id":"evt_01KKBGJ2XC2688XTB1CCQDXX64","message_id":"msg_01KKBGJ2Q0S86Z5JATM52C3M7Z","origin_daemon":"d_hbm4mexrttv5",'
    '"recipients":["heron","wren"],"refs":[{"type":"group","value":"parsers"},{"type":"mention","value":"heron"}],'
    '"scopes":[{"type":"group","value":"parsers"}],"sequence":8,"session_id":"ses_01KKBGFATGX2Y1CF42XVGRECS8",'
    '"timestamp":"2026-03-10T09:17:00.204117Z","type":"message.create","v":1}',
    '{"agent_id":"heron","authored_by":"user:dana","body":{"content":"Thanks","format":"plain","structured":"{\\"ack\\":true}"},'
    '"disclosed":true,"event_id":"evt_01KKBGKXGCTRGT7CHNF7J7ET4Z","message_id":"msg_01KKBGKXA0570V52F7A8GSBCV2",'
    '"origin_daemon":"d_hbm4mexrttv5","recipients":["otter"],"refs":[{"type":"reply_to","value":"msg_01KKBGJ2Q0S86Z5JATM52C3M7Z"},'
    '{"type":"mention","value":"otter"}],"sequence":9,"session_id":"ses_01KKBGFBSRNMS8GHNA32SJMCTR",'
    '"thread_id":"thr_01KKBGKXA0CA5MKPBDSQMQMGRD","timestamp":"2026-03-10T09:18:00.204117Z","type":"message.create","v":1}',
    '{"agent_id":"user:dana","display":"Dana","event_id":"evt_01KKBGEKJWJ4CGJPJZACWEYQY9","kind":"user","module":"ui",'
    '"origin_daemon":"d_hbm4mexrttv5","role":"dana","sequence":2,"timestamp":"2026-03-10T09:15:06.9Z","type":"agent.register","v":1}',
    '{"event_id":"evt_01KKBGGB842D0RWRGGZ4P7W5QN","fields":{"description":"Parser and lexer crew"},'
    '"group_id":"grp_01KKBGG840E4A31XGP9T9R0FCK","origin_daemon":"d_hbm4mexrttv5","sequence":7,'
    '"timestamp":"2026-03-10T09:16:03.204117Z","type":"group.update","updated_by":"otter","v":1}',
    '{"cutoff":"2026-03-01T00:00:00Z","event_id":"evt_01KKBH0QNC4K52R2QAYF16B3SJ","origin_daemon":"d_hbm4mexrttv5","sequence":17,'
    '"timestamp":"2026-03-10T09:25:00.204117Z","type":"purge.executed","v":1}',
]


@pytest.mark.parametrize("line", SPEC_LINES, ids=[json.loads(line)["type"] for line in SPEC_LINES])
def test_lines_of_the_reference_are_read_and_written_unchanged(line):
    event, ns = thrum.parse_line(line.encode())
    assert thrum.canonical(event) == line.encode()
    assert go_stamp(ns) == event["timestamp"]


def test_any_value_survives():
    rng = random.Random(3)
    alphabet = 'a<>&"\\\u2028\u2029\n\0é漢😀/'

    def value(depth):
        kind = rng.randrange(7 if depth else 4)
        if kind < 2:
            return "".join(rng.choice(alphabet) for _ in range(rng.randrange(8)))
        if kind < 4:
            return rng.choice((None, True, False, rng.randrange(-10**18, 10**18)))
        if kind == 4:
            return [value(depth - 1) for _ in range(rng.randrange(4))]
        return {str(value(0)): value(depth - 1) for _ in range(rng.randrange(4))}

    for _ in range(500):
        some = {"x": value(3)}
        line = thrum.canonical(some)
        assert thrum.decode_object(line) == some
        assert not set(b"<>&\n") & set(line) and b"\xe2\x80\xa8" not in line and b"\xe2\x80\xa9" not in line
        assert thrum.canonical(thrum.decode_object(line)) == line


@pytest.mark.parametrize("value, error", [({"a": float("nan")}, ValueError), ({"a": float("inf")}, ValueError),
                                          ({"a": "\ud800"}, UnicodeEncodeError)])
def test_what_cannot_be_canonical(value, error):
    with pytest.raises(error):
        thrum.canonical(value)


@pytest.mark.parametrize("data", [b"", b"[]", b"1", b'"x"', b"null", b"{", b"{}x", b'{"a":NaN}', b'{"a":Infinity}', b'{"a":-Infinity}',
                                  b"\xff\xfe{}", b'{"a":"\xff"}', b"{'a':1}", b"[" * 100_000, b'{"a":' * 100_000, b"{}\0"])
def test_what_is_not_an_object_is_refused(data):
    with pytest.raises(ValueError):
        thrum.decode_object(data)


# ---- durations, versions

@pytest.mark.parametrize("text, seconds", [
    ("0", 0), ("5s", 5), ("30m", 1800), ("1h30m", 5400), ("1h1m1s", 3661), ("250ms", 0.25), ("-250ms", -0.25), ("+5s", 5), ("1.5h", 5400),
    (".5s", 0.5), ("1.s", 1), ("100us", 0.0001), ("100µs", 0.0001), ("1000ns", 0.000001), ("-1h", -3600), ("24h", 86400), ("0s", 0),
    ("1m0.5s", 60.5), ("8784h", 366 * 86400), ("1d", 86400), ("1d12h", 129_600),
])
def test_durations(text, seconds):
    assert thrum.parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "s", "5x", "5 s", " 5s", "5s ", "d", "1.d.", "--5s", "-", "+", ".s", "1..5s", "1.5.2s", "1e3s",
                                  "5sm", "5S",
                                  "1h-30m", "٣s", "8785h", "9" * 400 + "h", "nan", "infs"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match="duration"):
        thrum.parse_duration(text)


def test_versions_compare():
    texts = ["0", "0.1.0", "0.1.9", "0.1.10", "0.2", "1.0.0", "1.10.2"]
    assert sorted(texts, key=thrum.version_key) == texts
    assert thrum.version_key("1.x.3") == (1, 0, 3)
    assert thrum.version_key("1.²") == (1, 0)
    assert len(thrum.version_key("1.2.3.4.5.6")) == 4


# ---- names, words, pairs, texts

@pytest.mark.parametrize("name", ["a", "ada", "agent_1", "a-b", "-", "_", "0", "a" * 64, "everyone"])
def test_names(name):
    assert thrum.check_name(name) == name


@pytest.mark.parametrize("name", ["", "../x", "a/b", "Ada", "a b", "a.b", "ä", "a\n", "a\0", "daemon", "system", "thrum", "all",
                                  "broadcast",
                                  "user_dana", "a" * 65, "a:b", "@a", "²", "a\u200b"])
def test_names_that_are_refused(name):
    with pytest.raises(thrum.InvalidParams, match="agent name"):
        thrum.check_name(name)


def test_words():
    for word in ("planner", "QA-1", "a_b", "x" * 64):
        assert thrum.check_word(word, "role") == word
    for word in ("../x", "a b", "ä", "x" * 65, "a.b", "*"):
        with pytest.raises(thrum.InvalidParams, match="role"):
            thrum.check_word(word, "role")
    with pytest.raises(thrum.ThrumError, match="role is required"):
        thrum.check_word("", "role")


@pytest.mark.parametrize("text, pair", [
    ("module:core", ("module", "core")), ("file:a:b", ("file", "a:b")), ("a:ü 漢", ("a", "ü 漢")), ("x" * 256 + ":y", ("x" * 256, "y")),
    ("", None), ("a", None), (":", None), ("a:", None), (":b", None), ("a:\n", None), ("a:\x1b", None), ("x" * 257 + ":y", None),
    ("a:" + "y" * 257, None),
])
def test_pairs(text, pair):
    if pair:
        assert thrum.parse_pair(text, "scope") == {"type": pair[0], "value": pair[1]}
    else:
        with pytest.raises(thrum.InvalidParams, match="scope must be"):
            thrum.parse_pair(text, "scope")


def test_texts_are_limited_in_bytes():
    assert thrum.check_text("é" * 5, "intent", 10) == "é" * 5
    for text, reason in (("é" * 6, "12 bytes"), ("a\0", "NUL"), ("\udc80", "UTF-8")):
        with pytest.raises(thrum.InvalidParams, match=reason):
            thrum.check_text(text, "intent", 10)


# ---- Records

class Point(thrum.Record):
    x: int
    y: int = 5


class Point3(Point):
    z: int = 7


def test_records_behave_like_frozen_dataclasses():
    assert (Point(1).y, Point(1, 2).y, Point(y=3, x=1).x, Point3(1, z=9).z, Point3(1, 2, 3).z) == (5, 2, 1, 9, 3)
    assert Point(1) == Point(1, 5) != Point(1, 6)
    assert Point3(1) != Point(1)
    assert len({Point(1), Point(1, 5), Point(2)}) == 2
    assert hash(Point(x=1, y=2)) == hash(Point(y=2, x=1)), "equal Records have one hash"
    assert repr(Point(1)) == "Point(x=1, y=5)"
    with pytest.raises(AttributeError):
        Point(1).x = 2


@pytest.mark.parametrize("args, named", [((), {}), ((), {"y": 1}), ((1, 2, 3), {}), ((1,), {"x": 1}), ((1,), {"q": 1})])
def test_records_refuse_wrong_values(args, named):
    with pytest.raises((TypeError, AttributeError)):
        Point(*args, **named)


# ---- events

def test_every_generated_event_is_well_formed_and_canonical():
    """The histories of the other tests are what daemons write: `check_event` takes each, its text is a fixed point."""
    kinds = set()
    for seed in range(60):
        for event in history(seed):
            assert thrum.check_event(event) == thrum.ns_of(event["timestamp"])
            assert thrum.decode_object(thrum.canonical(event)) == event
            kinds.add(event["type"])
    assert set(thrum.EVENTS) <= kinds, set(thrum.EVENTS) - kinds
    last = ""
    for line in large_log(300, agents=12):
        event, _ = thrum.parse_line(line.encode())
        assert thrum.canonical(event) == line.encode()
        assert event["timestamp"] > last and event["timestamp"][-2] != "0"
        last = event["timestamp"]


SAMPLES = {str: "x", dict: {}, list: [], bool: True, int: 1}
COMMON = {"timestamp": "2026-03-10T09:15:00Z", "event_id": "evt_01KKBQ0D3R0000000000000001"}


def sample(kind, optional=True):
    event = dict(COMMON, type=kind)
    for field, wanted in thrum.EVENTS[kind].fields.items():
        if optional or field[-1] != "?":
            event[field.rstrip("?")] = SAMPLES[wanted]
    return event


@pytest.mark.parametrize("kind", thrum.EVENTS)
def test_check_event_wants_each_field_and_its_type(kind):
    assert thrum.check_event(sample(kind)) == thrum.check_event(sample(kind, False)) == thrum.ns_of(COMMON["timestamp"])
    for field, wanted in {**thrum.EVENTS[kind].fields, **thrum.COMMON_FIELDS}.items():
        name = field.rstrip("?")
        for other in SAMPLES.values():
            if type(other) is not wanted:
                with pytest.raises(ValueError, match=f"{name} is not|{name} is missing, or not|time"):
                    thrum.check_event({**sample(kind), name: other})
        without = {k: v for k, v in sample(kind).items() if k != name}
        if field[-1] == "?":
            thrum.check_event(without)
        else:
            with pytest.raises(ValueError, match=f"{name} is missing"):
                thrum.check_event(without)
    assert thrum.check_event({**sample(kind), "from_a_newer_version": {"a": 1}})


@pytest.mark.parametrize("change", [
    {"body": {"content": 5}}, {"body": {"content": None}}, {"scopes": ["x"]}, {"scopes": [{"type": "a"}]}, {"refs": [{"type": "a",
    "value": 1}]},
    {"refs": [{"type": ["a"], "value": "b"}]}, {"recipients": ["a", 5]}, {"message_id": ""[:0] + "a\nb"}, {"agent_id": "x" * 257},
    {"session_id": "\x1b[31m"}, {"timestamp": "yesterday"}, {"timestamp": "2200-01-01T00:00:00Z"}, {"event_id": "a\0"},
], ids=str)
def test_check_event_refuses(change):
    with pytest.raises(ValueError):
        thrum.check_event({**sample("message.create"), **change})


@pytest.mark.parametrize("change", [
    {"ttl_s": 0}, {"ttl_s": -5}, {"ttl_s": 86_401}, {"path": ""}, {"path": "/etc"}, {"path": "../x"}, {"path": "a//b"}, {"path": "a/"},
    {"path": "./a"}, {"path": "a/../b"}, {"path": ".git/config"}, {"path": ".thrum"}, {"path": "a\nb"}, {"path": "x" * 257},
    {"path": "*a" * 17}, {"event_id": "evt_1"}, {"event_id": "evt_" + "Z" * 26}, {"event_id": "evt_01kkbq0d3r0000000000000001"},
    {"event_id": "evt_01KKBQ0D3R000000000000000U"}, {"claim_id": "a\tb"},
], ids=str)
def test_check_event_refuses_claims_that_nobody_could_make(change):
    assert thrum.check_event(sample("claim.take"))
    with pytest.raises(ValueError):
        thrum.check_event({**sample("claim.take"), **change})


def test_check_event_takes_types_that_are_not_known():
    assert thrum.check_event({**COMMON, "type": "lock.granted", "paths": ["a"], "agent_id": "ada"})


def test_check_event_never_fails_otherwise():
    """Whatever JSON object somebody pushes: a time or ValueError, since a line from elsewhere must not stop a start."""
    rng = random.Random(4)
    odd = [None, 5, -1, 1.5, True, "", "x", "\ud800", [], [5], [None], ["x"], [[]], [{}], [{"type": "a"}], [{"type": 5, "value": 5}], {},
           {"a": 1},
           {"content": 5}, {"content": {}}, 10**400, "x" * 300]
    names = ["type", "timestamp", "event_id", "v", "origin_daemon", "sequence", "body", "scopes", "refs", "recipients", "message_id",
             "agent_id",
             "thread_id", "group_id", "session_id", "work_contexts", "fields", "receipt_type", "cutoff", "role", "kind"]
    wrong = set()
    for _ in range(6000):
        event = sample(rng.choice(list(thrum.EVENTS)), rng.random() < 0.5)
        if rng.random() < 0.3:
            event["type"] = "not.known"
        for _ in range(rng.randrange(1, 4)):
            event[rng.choice(names)] = rng.choice(odd)
        try:
            assert type(thrum.check_event(event)) is int
        except ValueError:
            pass
        except Exception as error:
            wrong.add(f"{type(error).__name__}: {error}")
    assert not wrong


@pytest.mark.parametrize("agent_id, stem", [
    ("ada", "ada"), ("user:dana", "user_dana"), ("agent:planner:AB12", "planner_AB12"), ("planner_4fmw1ewxgy", "planner_4fmw1ewxgy"),
    ("a-b", "a-b"), ("", None), ("agent:", None), ("../x", None), ("a/b", None), ("a.b", None), ("ä", None), ("a b", None), ("x" * 129,
     None),
    ("a\n", None), ("a\0", None), (".", None),
])
def test_the_file_of_an_agent(agent_id, stem):
    """An id never names a file outside of its folder."""
    if stem:
        assert thrum.file_stem(agent_id) == stem
    else:
        with pytest.raises(ValueError, match="file name"):
            thrum.file_stem(agent_id)
