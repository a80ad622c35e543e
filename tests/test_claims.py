"""Claims, from the comparison of two patterns to two machines that claim at once and a daemon that is killed meanwhile."""

import itertools
import json
import os
import random
import re
import signal
import time
from functools import lru_cache

import pytest

import thrum
from conftest import FakeWorld
from team import END_S, Team, error_line, finish, raw_in, start
from test_methods import Team as Ledgers

MINUTE = 60 * thrum.NS
HOUR = 60 * MINUTE


# ---- paths and patterns

COVERS = [      # pattern, what it covers, what it does not
    ("src", ["src", "src/a.py", "src/a/b"], ["srcs", "sr", "a/src", "src.py"]),
    (".", ["a", "a/b", ".hidden", "["], []),
    ("src/*.py", ["src/a.py", "src/.py", "src/a.py/x"], ["src/a/b.py", "src/a.pyc", "a.py", "xsrc/a.py"]),
    ("src/?", ["src/a", "src/a/b", "src/é"], ["src/ab", "src", "src/"]),
    ("**/b.py", ["b.py", "a/b.py", "a/c/b.py"], ["ab.py", "a/xb.py", "b.pyc"]),
    ("src/**/b", ["src/b", "src/x/b", "src/x/y/b"], ["src/xb", "srcb", "src"]),
    ("src/**", ["src/a", "src/a/b"], ["src", "srcs"]),
    ("a**z", ["az", "a/z", "ab/c/z"], ["a/b", "ba/z"]),
    ("app/[id].tsx", ["app/[id].tsx"], ["app/i.tsx", "app/d.tsx"]),
    ("a.b+(c)", ["a.b+(c)", "a.b+(c)/d"], ["axb+(c)", "a.bb(c)"]),
    ("*", ["a", "a/b"], []),
]


@pytest.mark.parametrize("pattern, inside, outside", COVERS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_a_claim_covers(pattern, inside, outside):
    assert [path for path in inside + outside if thrum.covers(pattern, path)] == inside


@lru_cache(None)
def fits(pattern, path):
    """The same by trying everything."""
    if pattern == ".":
        return True
    words = re.findall(r"(?<![^/])[*]{2,}/|[*]+|.", pattern)

    def match(i, j):
        if i == len(words):
            return j == len(path) or path[j] == "/"
        word = words[i]
        if word[0] == "*" and word[-1] == "/":
            return match(i + 1, j) or any(path[k] == "/" and match(i + 1, k + 1) for k in range(j, len(path)))
        if word[0] == "*":
            end = path.find("/", j) if word == "*" else -1
            return any(match(i + 1, k) for k in range(j, (len(path) if end < 0 else end) + 1))
        return j < len(path) and (path[j] != "/" if word == "?" else path[j] == word) and match(i + 1, j + 1)

    return match(0, 0)


PATHS = ["".join(letters) for size in range(8) for letters in itertools.product("ab/", repeat=size)]


@pytest.mark.parametrize("seed", range(4))
def test_overlap_and_covers_agree_with_trying_all_paths(seed):
    rng, met = random.Random(seed), set()

    def pattern():
        while True:
            made = "".join(rng.choice(("a", "a", "b", "/", "?", "*", "**", "**/")) for _ in range(rng.randrange(1, 4)))
            if thrum.is_claimable(made):
                return made

    for _ in range(40):
        a, b = pattern(), pattern()
        both = any(fits(a, path) and fits(b, path) for path in PATHS)
        assert thrum.overlap(a, b) == thrum.overlap(b, a) == both, (a, b)
        met.add(both)
        for path in rng.sample(PATHS, 40):
            assert thrum.covers(a, path) == fits(a, path), (a, path)
    assert met == {True, False}


def test_what_a_pattern_may_have():
    for path in ("src/**/*.py", "a/*/b/*_test.*", "x/" * 60 + "*" + "a" * 63, "?" * 4):
        assert thrum.is_claimable(path), path
    for path in ("?" * 5, "*a" * 5, "*" + "a" * 64):
        assert not thrum.is_claimable(path), path


@pytest.mark.parametrize("text, folder, path", [
    ("a", "", "a"), ("./a/", "", "a"), ("a//b/./c", "", "a/b/c"), ("../b", "a", "b"), (".", "", "."), ("..", "a", "."), (".", "a/b", "a/b"),
    ("*.py", "src", "src/*.py"), ("/top/x/y", "a", "x/y"), ("/top", "a", "."), (".github", "", ".github"), ("ü ß", "", "ü ß"),
])
def test_a_path_is_taken_from_where_the_caller_is(text, folder, path):
    assert thrum.claim_path(text, "/top", "/top/" + folder) == path


@pytest.mark.parametrize("text, why", [
    ("", "empty"), ("../x", "outside"), ("a/../../x", "outside"), ("/etc/passwd", "outside"), ("/", "outside"), ("/topper", "outside"),
    (".git", "in .git"), ("a/../.git/config", "in .git"), (".thrum/var", "in .thrum"), ("a\nb", "cannot be shown"),
    ("\x1b[2J", "cannot be"), ("a\0b", "cannot be"), ("x" * 257, "256"), ("*a" * 5, "4 wildcards"), ("\udcff", "cannot be"),
    ("*" + "a" * 64, "64 characters"),
])
def test_what_cannot_be_claimed_is_named(text, why):
    for top in ("/top", ""):
        with pytest.raises(thrum.InvalidParams, match=why) as caught:
            thrum.claim_path(text, top)
        assert not raw_in(str(caught.value)) and len(str(caught.value)) < 400


def test_which_claims_hold():
    """The quick way finds what comparing each with each finds; who holds does not disagree, and who does not has a reason."""
    rng = random.Random(5)
    for _ in range(60):
        claims = [{"agent_id": rng.choice("abc"), "shared": rng.random() < 0.3, "claim_id": str(n), "path": rng.choice((
            ".", "a", "a/b", "a/b/c", "a*", "a/*", "**/c", "b", "b/c", "ab", "*/b"))} for n in range(rng.randrange(12))]
        held = []
        for claim in claims:
            if not any(thrum.object_to(other, claim["agent_id"], claim["path"], claim["shared"]) for other in held):
                held.append(claim)
        assert thrum.holding(claims) == held


# ---- ids

def test_an_id_above_another_is_of_the_next_millisecond_and_its_own():
    one, two = FakeWorld(), FakeWorld()
    two.drawn = 1 << 40
    ahead = "evt_" + thrum.crockford((one.at // 1_000_000 + 3_600_000) << 80 | (1 << 80) - 1, 26)
    first, second = one.new_id("evt", ahead), two.new_id("evt", ahead)
    assert first > ahead and second > ahead and first != second
    assert thrum.ulid_ms(first) == thrum.ulid_ms(second) == thrum.ulid_ms(ahead) + 1
    assert one.new_id("evt", first) > first
    assert thrum.ulid_ms(one.new_id("evt")) == one.at // 1_000_000      # others are not dragged along
    behind = "evt_" + thrum.crockford(5 << 80, 26)
    assert thrum.ulid_ms(one.new_id("evt", behind)) == one.at // 1_000_000


# ---- the tables

def event(number, kind, at, daemon="d_1", /, **fields):
    return {"type": kind, "event_id": "evt_" + thrum.crockford(number, 26), "timestamp": thrum.stamp_of(at * MINUTE + 1), "v": 1,
            "origin_daemon": daemon, **fields}


def take(number, at, path="src", agent="ada", **more):
    return event(number, "claim.take", at, claim_id=f"clm_{number}", agent_id=agent, path=path, ttl_s=600, **more)


STORIES = {     # what happens to claim 1, and whether it is open in the end (1), has lapsed (2), is closed (0) or gone (None)
    "taken": ([], 1),
    "released": ([event(8, "claim.release", 9, claim_id="clm_1", reason="released")], 0),
    "session ended": ([event(8, "agent.session.end", 9, session_id="ses_1")], 0),
    "lapsed": ([event(8, "claim.lapse", 9, claim_id="clm_1", renewal=take(1, 5)["event_id"])], 2),
    "lapsed, then renewed": ([event(8, "claim.lapse", 9, claim_id="clm_1", renewal=take(1, 5)["event_id"]),
                              event(9, "claim.renew", 8, claim_id="clm_1", agent_id="ada", ttl_s=60)], 1),
    "renewal lapsed": ([event(9, "claim.renew", 8, claim_id="clm_1", agent_id="ada", ttl_s=60, note="more"),
                        event(10, "claim.renew", 7, claim_id="clm_1", agent_id="ada", ttl_s=80, note="less"),
                        event(11, "claim.lapse", 9, claim_id="clm_1", renewal=event(9, "", 0)["event_id"])], 2),
    "agent deleted": ([event(8, "agent.cleanup", 9, agent_id="ada")], None),
    "purged while it is open": ([event(8, "purge.executed", 9, cutoff=thrum.stamp_of(8 * MINUTE))], 1),
    "purged and released": ([event(8, "purge.executed", 9, cutoff=thrum.stamp_of(8 * MINUTE)),
                             event(9, "claim.release", 10, claim_id="clm_1")], None),
    "purged and ended": ([event(8, "purge.executed", 9, cutoff=thrum.stamp_of(8 * MINUTE)),
                          event(9, "agent.session.end", 10, session_id="ses_1")], None),
    "purged before": ([event(8, "purge.executed", 3, cutoff=thrum.stamp_of(2 * MINUTE)),
                       event(9, "claim.release", 10, claim_id="clm_1")], 0),
    "released twice": ([event(8, "claim.release", 11, claim_id="clm_1", reason="expired"),
                        event(9, "claim.release", 9, claim_id="clm_1", reason="lost", superseded_by="clm_9")], 0),
}


@pytest.mark.parametrize("story", STORIES)
def test_the_tables_are_the_same_in_any_order(story):
    more, state = STORIES[story]
    events = [event(0, "agent.register", 0, agent_id="ada", kind="agent", role="planner", module="core"),
              event(3, "agent.session.start", 3, session_id="ses_1", agent_id="ada"), take(1, 5, session_id="ses_1"), *more]
    found = set()
    for order in itertools.permutations(events[1:]):
        store = thrum.Store(":memory:", FakeWorld(), writable=True)
        store.create()
        store.begin()
        for seq, one in enumerate([events[0], *order, *order], 1):
            store.apply(one, seq, thrum.check_event(one))
        store.settle()
        store.commit()
        claim = store.claim("clm_1")
        found.add((claim and claim["open"], json.dumps({k: v for k, v in (claim or {}).items() if k != "agent"}),
                   len(store.claims()), store.value("select count(*) from pending")))
        store.close()
    assert len(found) == 1, found
    assert found.pop()[0] == state


def test_live_claims_are_found_without_the_old_ones(tmp_path):
    store = thrum.Store(":memory:", FakeWorld(), writable=True)
    store.create()
    plan = " ".join(row[3] for row in store.db.execute(
        f"explain query plan {thrum._CLAIMS} c.open order by c.granted_at"))
    assert "claims_open" in plan, plan
    store.close()


# ---- methods, on one machine and on two

class Machine(Ledgers):
    """A ledger with a clock of its own, and @ada or whoever in a session."""

    def __init__(self, folder, number=1, at="2026-03-10T09:15:00.000000001Z"):
        world = FakeWorld(at)
        world.drawn = number << 40
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder, world)

    def take(self, who, *paths, **more):
        return self.call("claim.take", paths=list(paths), caller_agent_id=who, **more)["claims"]

    def step(self):
        """What the daemon does when something is due; when (ns) it wants to come again."""
        (due,), self.events = self.ledger.commit([thrum.claims_step])
        assert isinstance(due, int), due
        return due

    def held(self):
        return sorted((c["agent_id"], c["path"]) for c in self.call("claim.list")["claims"] if c["holds"])

    def live(self):
        return sorted((c["agent_id"], c["path"]) for c in self.call("claim.list")["claims"])

    def notices(self, who):
        return self.inbox(who, page_size=100, author_id="thrum")

    def lines(self):
        return [line for _, line in self.ledger.journal.read(0) if line and thrum.EVENTS[json.loads(line)["type"]].shared]

    def hear(self, lines):
        outcomes, self.events = self.ledger.commit([lambda context, line=line: context.adopt(line) for line in lines])
        assert all(outcome in (True, False) for outcome in outcomes), outcomes

    def rebuild(self):
        """Another start, with a database made anew."""
        self.close()
        os.unlink(self.places.database)
        self.open()

    def reasons(self):
        return [json.loads(line).get("reason") for line in self.lines() if b'"claim.release"' in line]


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path / "one")
    made.agent("ada", "planner")
    made.agent("bob", "implementer")
    yield made
    made.close()


@pytest.fixture
def pair(tmp_path):
    """Makes two machines whose clocks are some hours apart, with @ada on one and @bob on the other, who know of each other."""
    made = []

    def make(hours):
        for number in (1, 2):
            at = thrum.stamp_of(thrum.ns_of("2026-03-10T09:15:00.000000001Z") + (number == 2) * int(hours * HOUR))
            made.append(Machine(tmp_path / f"machine{len(made)}", number, at))
        one, two = made[-2:]
        one.agent("ada", "planner")
        two.agent("bob", "implementer")
        exchange(one, two)
        return one, two

    yield make
    for machine in made:
        machine.close()


def exchange(one, two):
    first, second = one.lines(), two.lines()
    one.hear(second)
    two.hear(first)


def pass_time(*machines, seconds):
    for machine in machines:
        machine.world.at += int(seconds * thrum.NS)


def test_a_claim_is_taken_refused_renewed_and_released(machine):
    (claim,) = machine.take("ada", "src", ttl_s=1200, note="lexer")
    assert claim["path"] == "src" and claim["holds"] and not claim["shared"] and claim["fence"][:4] == "evt_"
    assert thrum.ns_of(claim["expires_at"]) - thrum.ns_of(claim["granted_at"]) == 1200 * thrum.NS and "renewed_at" not in claim
    error = machine.refused("claim.take", paths=["docs", "src/a.py"], caller_agent_id="bob")
    assert re.fullmatch(r"src/a\.py is claimed as src by @ada, since 09:1\dZ \(\d+s ago\) until 09:3\dZ \(in \d+m\): “lexer”; "
                        "queue with --wait 20m, or ask @ada", str(error)), error
    assert error.code == -32000 and [c["claim_id"] for c in error.data["claims"]] == [claim["claim_id"]]
    assert machine.live() == [("ada", "src")]                   # all or none
    (again,) = machine.take("ada", "./src/", ttl_s=60)
    assert (again["claim_id"], again["fence"], again["note"], again["ttl_s"]) == (claim["claim_id"], claim["fence"], "lexer", 60)
    assert again["renewed_at"] > again["granted_at"] == claim["granted_at"]
    (again,) = machine.take("ada", "src", note="parser")
    assert (again["ttl_s"], again["note"]) == (60, "parser")
    machine.take("ada", "src/a.py", "*.md")                      # who has the folder may name a file in it
    assert "you have no claim on src/b.py; you have one on src" in str(machine.refused("claim.release", paths=["src", "src/b.py"],
                                                                                         caller_agent_id="ada"))
    assert "@ada has one on src" in str(machine.refused("claim.release", paths=["src"], caller_agent_id="bob"))
    assert machine.call("claim.release", paths=["src", "*.md"], caller_agent_id="ada")["count"] == 2
    assert machine.live() == [("ada", "src/a.py")]
    assert machine.call("claim.release", caller_agent_id="ada")["count"] == 1
    assert machine.call("claim.release", caller_agent_id="ada") == {"released": [], "count": 0}


def test_shared_claims_go_together_and_change_their_kind_only_when_nobody_minds(machine):
    (first,) = machine.take("ada", "src", shared=True)
    machine.take("bob", "src/*.py", shared=True)
    machine.refused("claim.take", paths=["src"], caller_agent_id="ada")
    machine.take("ada", "src", shared=True, note="x\n" * 500)
    error = str(machine.refused("claim.take", paths=["src/x"], caller_agent_id="bob"))
    assert "by @ada (shared), since" in error and "x …”; queue with --wait" in error and len(error) < 400
    machine.call("claim.release", caller_agent_id="bob")
    (second,) = machine.take("ada", "src")
    assert second["fence"] > first["fence"] and second["claim_id"] != first["claim_id"] and machine.live() == [("ada", "src")]
    (third,) = machine.take("ada", "src", shared=True)
    assert third["shared"] and third["fence"] > second["fence"]


@pytest.mark.parametrize("params, text", [
    ({"paths": []}, "name at least one path"), ({"paths": ["a", "../b"]}, "outside"), ({"paths": ["a"], "ttl_s": 86_401}, "ttl_s"),
    ({"paths": ["a"], "caller_agent_id": "eve"}, "eve is not registered"), ({"paths": ["a"], "queued_at": "now"}, "queued_at"),
    ({"paths": ["a"], "caller_agent_id": "cleo"}, "no active session"), ({"paths": ["a"], "note": "x" * 5000}, "note"),
    ({"paths": [f"f{n}" for n in range(101)]}, "more than 100 claims"),
])
def test_a_claim_that_cannot_be_is_refused_whole(machine, params, text):
    machine.agent("cleo", "reviewer", session=False)
    assert text in str(machine.refused("claim.take", **{"caller_agent_id": "ada", **params}))


def test_no_more_claims_than_can_be_compared(machine, monkeypatch):
    monkeypatch.setattr(thrum, "CLAIMS_MAX", 3)
    machine.take("ada", "a", "b", "c")
    machine.take("ada", "c", "b")                                # renewals are no more
    assert "more than 3 claims" in str(machine.refused("claim.take", paths=["d"], caller_agent_id="bob"))


def test_the_claim_that_fits_best_is_named(machine):
    machine.take("ada", ".", "noted", "*.md")
    error = str(machine.refused("claim.take", paths=["noted"], caller_agent_id="bob"))
    assert error.startswith("noted is claimed by @ada, since") and ", and 1 more claim stands in the way; queue" in error
    pass_time(machine, seconds=86_400 - 60)
    machine.call("claim.release", caller_agent_id="ada")
    machine.take("ada", "noted", ttl_s=86_400)
    error = str(machine.refused("claim.take", paths=["noted/x"], caller_agent_id="bob"))
    assert re.search(r"as noted by @ada, since 09:\d\dZ \(\d+s ago\) until 2026-03-12 09:\d\dZ \(in [^)]+\)", error), error


def test_a_person_needs_no_session(machine):
    machine.call("user.register", username="dana")
    machine.take("user:dana", "docs")
    assert "@user:dana" in str(machine.refused("claim.take", paths=["docs"], caller_agent_id="ada"))


def test_the_list_is_of_what_is_asked_for(machine):
    machine.take("ada", "src", "tests/**")
    machine.take("bob", "docs", shared=True)
    listed = [c["path"] for c in machine.call("claim.list", paths=["tests/a.py", "docs/x"])["claims"]]
    assert listed == ["tests/**", "docs"]
    assert [c["path"] for c in machine.call("claim.list", paths=["*"], agent_id="bob")["claims"]] == ["docs"]


def test_the_check_names_others_exclusive_claims_and_the_files(machine):
    machine.take("ada", "src", "*.md")
    machine.take("bob", "docs", shared=True)
    files = ["src/a.py", "README.md", "docs/x", "srcs", "a\nb", "src"]
    found = machine.call("claim.check", paths=files, caller_agent_id="bob")["claims"]
    assert {c["path"]: c["files"] for c in found} == {"src": ["src", "src/a.py"], "*.md": ["README.md"]}
    assert machine.call("claim.check", paths=files, caller_agent_id="ada")["claims"] == []
    assert len(machine.call("claim.check", paths=files)["claims"]) == 2


def test_a_thousand_files_and_a_thousand_claims_are_compared_at_once(machine, monkeypatch):
    """By comparing each with each in full it would take a minute."""
    monkeypatch.setattr(thrum, "CLAIMS_PER_AGENT", 10_000)
    monkeypatch.setattr(thrum, "CLAIMS_MAX", 10_000)
    patterns = [f"pkg{n % 50}/mod{n}" if n % 2 else f"**/test_{n}_*.py" for n in range(1_000)]
    machine.take("ada", *patterns[:999])
    files = [f"pkg{n % 50}/mod{n}/file.py" if n % 2 else f"tests/deep/test_{n}_x.py" for n in range(1_000)]
    began = time.process_time()
    found = machine.call("claim.check", paths=files, caller_agent_id="bob")["claims"]
    assert sorted(path for c in found for path in c["files"]) == sorted(files[:999])
    assert time.process_time() - began < 5


@pytest.mark.parametrize("new, live", [(["*"], []), ([], ["*"]), (["*"], ["*"])])
def test_the_worst_that_the_limits_allow_takes_no_time(machine, new, live):
    """The writer compares a hundred new paths with a thousand claims, all as alike as they can be."""
    def paths(wild, count, letter):
        weight = thrum.WILD_WEIGHT if wild else 1
        return [f"{'*a' * 4 if wild else 'a' * 200}{letter}{n:04}".ljust(55 if wild else 255, "b") for n in range(count // weight)]

    for n in range(9):
        machine.agent(f"a{n}", "implementer")
        machine.take(f"a{n}", *paths(live, 100, f"q{n}"))
    began = time.process_time()
    assert len(machine.take("ada", *paths(new, 100, "r"))) == (10 if new else 100)
    took_s = time.process_time() - began
    assert took_s < 2, took_s                                    # below 1 s where nothing else runs


def test_what_is_too_much_is_refused_before_it_is_compared(machine, monkeypatch):
    machine.take("ada", "src")
    monkeypatch.setattr(thrum, "overlap", None)
    for paths in ([f"f{n}" for n in range(101)], [f"f{n}*" for n in range(11)]):
        assert "would have more than 100 claims" in str(machine.refused("claim.take", paths=paths, caller_agent_id="bob"))


# ---- when a claim ends

def test_the_time_of_a_claim_passes(machine):
    (claim,) = machine.take("ada", "src", ttl_s=30)
    assert machine.step() == thrum.ns_of(claim["expires_at"])
    pass_time(machine, seconds=31)
    machine.take("bob", "src")                                   # whether or not anybody has said so
    machine.step()
    assert machine.reasons() == ["expired"] and machine.live() == [("bob", "src")]
    last = machine.ledger.journal.last
    machine.step()
    assert machine.ledger.journal.last == last


@pytest.mark.parametrize("end", ["session.end", "session.start", "agent.delete"])
def test_a_claim_ends_with_its_session(machine, end):
    machine.take("ada", "src")
    session = machine.call("agent.whoami", caller_agent_id="ada")["session_id"]
    params = {"session.end": {"session_id": session}, "session.start": {"agent_id": "ada"}, "agent.delete": {"name": "ada"}}
    machine.call(end, **params[end])
    assert machine.live() == []
    machine.take("bob", "src")
    machine.rebuild()
    assert machine.live() == [("bob", "src")]


def test_a_purge_keeps_the_claims_that_are_held(machine):
    machine.take("ada", "src", "docs")
    machine.call("claim.release", paths=["docs"], caller_agent_id="ada")
    machine.call("purge.execute", before=thrum.stamp_of(machine.world.at + thrum.NS))
    assert machine.live() == [("ada", "src")]
    assert not [line for line in machine.lines() if b'"docs"' in line]
    machine.rebuild()
    assert machine.live() == [("ada", "src")]
    (claim,) = machine.take("ada", "src")
    assert "renewed_at" in claim
    machine.call("claim.release", caller_agent_id="ada")
    machine.rebuild()
    assert machine.reading.value("select count(*) from claims") == 0


def test_the_holder_is_told_once_before_a_claim_lapses(machine):
    """Once for each grant or renewal, in one message for what lapses together, whatever happens to daemon and database."""
    for path in ("src", "my docs"):
        machine.take("ada", path, ttl_s=1200, note="lexer")
    machine.take("ada", "late", ttl_s=3600)
    machine.take("bob", "short", ttl_s=59)
    told_at = machine.step() - 59 * thrum.NS
    pass_time(machine, seconds=60)
    told_at = machine.step()
    machine.world.at = told_at - 1
    machine.step()
    assert machine.notices("ada") == machine.notices("bob") == []
    machine.world.at = told_at
    machine.step()
    (text,) = machine.notices("ada")
    assert "`src`" in text and "`my docs`" in text and "late" not in text and "lexer" in text and "in 4m" in text
    assert "`thrum claim src 'my docs'`" in text
    for again in (machine.step, machine.rebuild, machine.step):
        again()
    assert len(machine.notices("ada")) == 1 and machine.notices("bob") == []
    machine.take("ada", "src", "my docs")
    machine.world.at = machine.step()
    machine.step()
    assert len(machine.notices("ada")) == 2
    machine.world.at += 20 * MINUTE
    machine.step()
    machine.step()
    assert len(machine.notices("ada")) == 2 and ("ada", "src") not in machine.live()


def test_a_holder_whose_worktree_has_gone_is_dead_after_a_while(machine, tmp_path):
    """Both have to be so: a worktree that is there may be quiet, and one that is not may have been moved."""
    there, gone = tmp_path / "there", tmp_path / "gone"
    there.mkdir()
    for name, top in (("cleo", there), ("dan", gone), ("eve", tmp_path / "odd?")):
        machine.agent(name, "reviewer", session=False)
        machine.call("session.start", agent_id=name, refs=[{"type": "worktree", "value": str(top)}])
        machine.take(name, name, ttl_s=7200)
    seen = machine.world.at
    machine.step()
    pass_time(machine, seconds=thrum.GONE_S - 10)
    assert machine.step() <= seen + thrum.GONE_S * thrum.NS
    machine.ledger.seen["dan"] = machine.world.at
    pass_time(machine, seconds=20)
    again = machine.step()
    assert ("dan", "dan") in machine.live()
    machine.world.at = again
    machine.step()
    assert machine.reasons() == ["dead"] and machine.live() == [("cleo", "cleo"), ("eve", "eve")]


# ---- the fencing number

@pytest.mark.parametrize("hours", [-1, 0, 1])
def test_the_fencing_number_always_rises(pair, hours):
    """From hand to hand between machines whose clocks disagree, also over a rebuild."""
    one, two = pair(hours)
    fences = []
    for turn in range(6):
        machine, who = ((one, "ada"), (two, "bob"))[turn % 2]
        fences.append(machine.take(who, "src/a.py" if turn % 3 else "src", shared=turn == 4)[0]["fence"])
        machine.call("claim.release", caller_agent_id=who)
        exchange(one, two)
        if turn == 3:
            one.rebuild()
    assert fences == sorted(set(fences))


def foreign(machine, kind, ahead_ms=0, number=5, /, **fields):
    """The line of an event of another machine, stamped now, with an id so much ahead."""
    now = machine.world.at
    return thrum.canonical({"type": kind, "timestamp": thrum.stamp_of(now + 1), "v": 1, "origin_daemon": "d_other", "sequence": number,
                            "event_id": "evt_" + thrum.crockford((now // 1_000_000 + ahead_ms << 80) | number, 26), **fields})


CLAIMED = {"claim_id": "clm_1", "agent_id": "eve", "path": "b", "ttl_s": 60}


def test_a_fencing_number_far_ahead_is_refused_and_all_that_are_made_are_good(machine):
    """One event of a peer must not make all later claims bad lines."""
    day_ms = thrum.FENCE_AHEAD_S * 1_000
    for ahead in (day_ms + 1, thrum.FAR // 1_000_000 - machine.world.at // 1_000_000 - 1):
        outcomes, _ = machine.ledger.commit([lambda context, ahead=ahead: context.adopt(foreign(machine, "claim.take", ahead, **CLAIMED))])
        assert "fencing number" in str(outcomes[0])
    line = foreign(machine, "claim.take", day_ms - 1, **CLAIMED)
    machine.hear([line])
    fences = [machine.take("ada", path)[0]["fence"] for path in ("x", "y", "z")]
    assert fences == sorted(fences) and fences[0] > json.loads(line)["event_id"]
    machine.rebuild()
    assert machine.ledger.bad_lines.count == 0 and {("ada", "x"), ("ada", "y"), ("ada", "z")} < set(machine.live())


@pytest.mark.parametrize("remove", ["purge", "delete"])
def test_a_fencing_number_stays_the_greatest_when_its_claim_is_removed(machine, remove):
    machine.agent("eve", "reviewer")
    machine.hear([foreign(machine, "claim.take", 3_600_000, **CLAIMED),
                  foreign(machine, "claim.release", 3_600_000, 6, claim_id="clm_1")])
    highest = machine.take("eve", "c")[0]["fence"]
    machine.call("claim.release", caller_agent_id="eve")
    if remove == "purge":
        machine.call("purge.execute", before=thrum.stamp_of(machine.world.at + thrum.NS))
    else:
        machine.call("agent.delete", name="eve")
        machine.call("purge.execute", before=thrum.stamp_of(machine.world.at + thrum.NS))
    assert machine.reading.value("select count(*) from claims") == 0
    live = machine.ledger.store.last_fence()
    machine.rebuild()
    assert machine.ledger.store.last_fence() == live > highest
    assert machine.take("ada", "b")[0]["fence"] > live


def test_claims_of_a_machine_that_is_gone_are_purged(machine):
    machine.hear([foreign(machine, "claim.take", **CLAIMED)])
    pass_time(machine, seconds=100)
    machine.step()
    assert [c["open"] for c in machine.ledger.store.claims()] == [2]
    machine.call("purge.execute", before=thrum.stamp_of(machine.world.at))
    assert machine.ledger.store.claims() == []
    machine.rebuild()
    assert machine.ledger.store.claims() == []


@pytest.mark.parametrize("name", thrum.RESERVED_NAMES)
def test_nobody_is_called_as_the_program(machine, name):
    """Neither here, by name or role, nor by what a peer says, in whatever order it comes."""
    for params in ({"name": name, "role": "x"}, {"role": name}, {"name": "zoe", "role": name}):
        assert "reserved" in str(machine.refused("agent.register", module="m", **params))
    known = machine.call("agent.list")["agents"]
    lines = [foreign(machine, "agent.session.start", 0, 7, session_id="ses_9", agent_id=name),
             foreign(machine, "agent.register", 0, 8, agent_id=name, kind="agent", role="x", module="m")]
    machine.hear(lines)
    assert machine.call("agent.list")["agents"] == known
    assert "not registered" in str(machine.refused("session.start", agent_id=name))
    machine.refused("message.send", content="x", mentions=["@ada"], caller_agent_id=name)
    machine.rebuild()
    assert machine.call("agent.list")["agents"] == known


def test_a_message_of_somebody_else_silences_no_notice(machine):
    """Neither one with the same reference, nor one of a peer that calls itself the program."""
    (claim,) = machine.take("ada", "src", ttl_s=600)
    refs = [{"type": "lapse", "value": claim["fence"]}]
    machine.call("message.send", content="x", mentions=["@bob"], refs=refs, caller_agent_id="bob")
    machine.hear([foreign(machine, "message.create", 0, 9, message_id="msg_9", agent_id="thrum", recipients=["bob"], refs=refs,
                          body={"format": "markdown", "content": "x"}, send_key="lapse:" + claim["fence"])])
    pass_time(machine, seconds=550)
    machine.step()
    assert len([text for text in machine.notices("ada") if "nearly over" in text]) == 1


# ---- two machines

@pytest.mark.parametrize("hours", [-1, 0, 1])
def test_a_claim_that_both_know_is_lost_by_nobody(pair, hours):
    """Whatever the clocks say: it is refused to others, renewed, outlasts what came after it, and ends with its time."""
    one, two = pair(hours)
    one.take("ada", "src", ttl_s=600)
    exchange(one, two)
    error = two.refused("claim.take", paths=["src/x"], caller_agent_id="bob")
    assert re.search(r"in (9|10)m", str(error)) and "@ada on" in str(error)
    two.take("bob", "docs", ttl_s=600)
    exchange(one, two)
    for _ in range(4):
        for machine in (one, two):
            pass_time(machine, seconds=400)
        one.take("ada", "src")
        two.take("bob", "docs")
        exchange(one, two)
        for machine in (one, two):
            machine.step()
            assert machine.held() == machine.live() == [("ada", "src"), ("bob", "docs")]
        assert not [text for who, machine in (("ada", one), ("bob", two)) for text in machine.notices(who) if "lost" in text]
    pass_time(one, two, seconds=601)
    one.step()
    two.step()
    assert one.live() == two.live() == []
    exchange(one, two)
    assert {"lost"}.isdisjoint(one.reasons() + two.reasons())


@pytest.mark.parametrize("hours", [-1, 0, 1])
@pytest.mark.parametrize("first", [0, 1])
def test_two_machines_that_claim_at_once_agree(pair, hours, first):
    one, two = pair(hours)
    one.take("ada", "src/a.py", "tests", note="lexer")
    two.take("bob", "src", "docs")
    lines = [one.lines(), two.lines()]
    (one, two)[first].hear(lines[1 - first])
    (one, two)[first].step()
    (one, two)[1 - first].hear(lines[first])
    (one, two)[1 - first].step()
    assert one.held() == two.held()
    exchange(one, two)
    for machine in (one, two):
        machine.step()
        machine.rebuild()
        machine.step()
    winner, loser = ("bob", "ada") if hours < 0 else ("ada", "bob")
    lost = {"ada": ("ada", "src/a.py"), "bob": ("bob", "src")}
    assert one.live() == two.live() == one.held() == sorted({("ada", "src/a.py"), ("ada", "tests"), ("bob", "src"), ("bob", "docs")}
                                                            - {lost[loser]})
    exchange(one, two)
    texts = {who: {machine: [text for text in machine.notices(who) if "lost" in text] for machine in (one, two)} for who in lost}
    assert [len(found) for found in texts[winner].values()] == [0, 0]
    for found in texts[loser].values():
        (text,) = found
        assert f"`{lost[loser][1]}`" in text and f"@{winner} on " in text and f"`{lost[winner][1]}`" in text and "until" in text
    assert one.reasons() == two.reasons() == ["lost"]


def test_a_claim_lapses_elsewhere_when_its_machine_says_nothing_and_comes_back_with_it(pair):
    one, two = pair(0)
    one.take("ada", "src", ttl_s=600)
    exchange(one, two)
    pass_time(one, two, seconds=599)
    one.take("ada", "src")                                       # a renewal that the other does not hear of
    pass_time(two, seconds=10)
    two.step()
    assert two.live() == [] and b"claim.lapse" in b"".join(line for _, line in two.ledger.journal.read(0))
    two.rebuild()
    assert two.live() == []                                      # its time does not begin anew
    two.take("bob", "src/x")
    exchange(one, two)
    for machine in (one, two):
        machine.step()
    exchange(one, two)
    assert one.live() == two.live() == [("ada", "src")]          # the first grant counts, and it was renewed in time
    assert len([text for text in two.notices("bob") if "lost" in text]) == 1


def test_a_stamp_that_is_ahead_makes_no_claim_longer(pair):
    """After mail from a machine an hour ahead all our stamps are an hour ahead; the time of a claim runs by the clock."""
    one, two = pair(1)
    two.take("bob", "src")
    two.call("claim.release", caller_agent_id="bob")
    two.take("bob", "src", shared=True)
    exchange(one, two)
    (claim,) = one.take("ada", "src", shared=True, ttl_s=600)
    assert thrum.ns_of(claim["granted_at"]) > one.world.at + HOUR // 2
    assert thrum.ns_of(claim["expires_at"]) <= one.world.at + 600 * thrum.NS


def test_adopting_is_taking_in_once(pair):
    one, two = pair(0)
    last, lines = two.ledger.journal.last, one.lines()
    two.hear(lines + lines)
    assert two.ledger.journal.last == last
    one.take("ada", "src")
    two.hear([one.lines()[-1]] * 2)
    assert two.ledger.journal.last == last + 1 and two.live() == [("ada", "src")]
    outcomes, _ = two.ledger.commit([lambda context: context.adopt(b'{"type":"claim.take"}')])
    assert isinstance(outcomes[0], ValueError)
    newest = two.ledger.store.reached()[2]
    assert newest < one.world.at + HOUR and newest == max(
        thrum.ns_of(e["timestamp"]) for e in map(json.loads, two.lines()) if e["origin_daemon"] == two.ledger.daemon_id)


# ---- through the daemon, as agents call it

@pytest.fixture
def team(tmp_path):
    made = Team(tmp_path / "team")
    yield made
    made.close()


def waiting(repo, *args, **more):
    """A `claim --wait` that has said what it waits for."""
    process = start(repo, "claim", *args, **more)
    line = process.stderr.readline().decode()
    assert line.startswith("Waiting for "), line
    return process


def settle(team, count):
    """Return when so many wait."""
    give_up_at = time.monotonic() + END_S
    with team.ada.client() as client:
        while len(client.call("claim.list")["waiting"]) != count:
            assert time.monotonic() < give_up_at


def test_the_commands(team):
    text = team.ada.ok("claim", "src/a.py", "--ttl", "20m", "--note", "x")
    assert re.fullmatch(r"✓ Claimed src/a\.py \(no such file yet\) until [^\n]*\d\d:\d\dZ \(in 20m\), this machine\n", text), text
    assert "(shared)" in team.ada.ok("claim", "docs", "--shared")
    (team.ada.path / "there").write_text("x")
    assert "✓ Claimed there until" in team.ada.ok("claim", "there") and "yet" not in team.ada.ok("claim", "'*'.x")
    team.ada.ok("release", "there", "'*'.x")
    assert team.ada.ok("claim", "src/a.py").startswith("✓ Renewed src/a.py (no such file yet) until")
    text = team.bob.ok("claims")
    assert re.search(r"^PATH +WHO +KIND +UNTIL +NOTE\nsrc/a\.py +@ada +exclusive +.*\(in 20m\) +x\ndocs +@ada +shared +", text), text
    error = error_line(team.bob.run("claim", "src"))
    assert error.startswith("src is claimed as src/a.py by @ada, since ") and "--wait" in error
    assert team.bob.ok("claims", "--mine") == "Nothing is claimed.\n" and team.bob.ok("claims", "x") == "Nothing is claimed there.\n"
    (team.bob.path / "docs").mkdir()
    assert [c["path"] for c in team.bob.json("claim", "x.md", "../README.md", "--shared", cwd=team.bob.path / "docs")["claims"]] \
        == ["docs/x.md", "README.md"]
    assert team.bob.json("claims", "--mine", "docs")["claims"][0]["agent_id"] == "bob"
    assert team.bob.json("claim", "y", "--confirm")["scope"] == "this machine"
    assert "Nothing is shared with other machines yet" in team.bob.run("claim", "y", "--confirm", check=0).stderr
    assert team.bob.ok("release", "y", "README.md").count("✓ Released") == 2
    assert team.bob.ok("release") == "✓ Released docs/x.md\n" and team.bob.ok("release") == "You have no claims.\n"


BAD_CLAIMS = [
    (["../x"], "../x is outside"), ([""], "empty"), ([".git/x"], "in .git"), ([], "accepts 1 arg"), (["a", "--ttl", "0s"], "ttl"),
    (["a", "--ttl", "25h"], "ttl"), (["a", "--ttl", "soon"], "ttl"), (["a", "--wait", "-1s"], "wait"), (["ok", "a\x1b[2J"], "cannot be"),
]


def test_a_bad_claim_leaves_no_trace(team):
    before = team.trace()
    for words, text in BAD_CLAIMS:
        assert text in error_line(team.bob.run("claim", *words)), words
        assert team.trace() == before, words


def test_the_table_fits_the_width(team):
    team.ada.ok("claim", "src/deep_folder_name/" * 5 + "file.py", "--ttl", "1d", "--note", "word " * 60)
    team.ada.ok("claim", "x")
    for width in (80, 120):
        lines = team.bob.ok("claims", env={"COLUMNS": str(width)}).splitlines()
        assert len(lines) == 3 and all(len(line) <= width and line == line.rstrip() for line in lines), lines
        assert lines[1].startswith("…") and "/file.py  @ada" in lines[1] and lines[1].endswith("…")


def test_a_waiter_gets_the_claim_when_it_is_free(team):
    team.ada.ok("claim", "src")
    process = waiting(team.bob, "src/a.py", "--wait", "30s")
    settle(team, 1)
    assert "@bob waits for src/a.py" in team.ada.ok("claims")
    team.ada.ok("release")
    status, out, err = finish(process)
    assert (status, err) == (0, "") and out.startswith("✓ Claimed src/a.py")
    settle(team, 0)


def test_a_waiter_that_waits_in_vain_says_so_in_one_line(team):
    team.ada.ok("claim", "src")
    done = team.bob.run("claim", "src", "--wait", "1s", check=1)
    lines = done.stderr.splitlines()
    assert done.stdout == "" and len(lines) == 2 and lines[1].startswith("Error: not free within 1s: src is claimed by @ada"), lines
    settle(team, 0)


def test_who_came_first_is_first(team):
    """A later claim does not slip past an earlier waiter, even where the path is free; who leaves the queue lets others pass."""
    team.ada.ok("claim", "src")
    first = waiting(team.bob, "src", "docs", "--wait", "60s")
    settle(team, 1)
    cleo = team.ada.worktree("cleo")
    cleo.join("cleo", "reviewer")
    assert "@bob waits for docs already" in error_line(cleo.run("claim", "docs/x"))
    second = waiting(cleo, "docs/x", "--wait", "60s")
    settle(team, 2)
    team.ada.ok("claim", "docs/y")                               # @ada has what @bob waits for: she is not behind him
    team.ada.ok("release", "docs/y")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert finish(second)[0] == 0
    third = waiting(team.bob, "src", "--wait", "60s")
    team.ada.ok("session", "end")
    assert finish(third)[0] == 0


def test_a_waiter_keeps_its_place_when_the_daemon_is_killed(team):
    team.ada.ok("claim", "src")
    first = waiting(team.bob, "src", "--wait", "60s")
    settle(team, 1)
    with team.ada.client() as client:
        since = client.call("claim.list")["waiting"][0]["since"]
    team.ada.kill()
    cleo = team.ada.worktree("cleo")
    cleo.join("cleo", "reviewer")                                # starts the next daemon
    second = waiting(cleo, "src", "--wait", "60s")
    settle(team, 2)
    with team.ada.client() as client:
        queue = client.call("claim.list")["waiting"]
    assert [w["agent_id"] for w in queue] == ["bob", "cleo"] and queue[0]["since"] == since
    team.ada.ok("release")
    assert finish(first)[0] == 0
    settle(team, 1)
    team.bob.ok("release")
    assert finish(second)[0] == 0


def test_a_claim_is_freed_by_itself_when_its_time_has_passed(team):
    """Its holder is killed and nobody asks: the daemon says so when it is due, and the next in line has it."""
    process = start(team.ada, "claim", "src", "--ttl", "2s")
    assert finish(process)[0] == 0
    assert finish(waiting(team.bob, "src", "--wait", "60s"))[0] == 0
    reasons = [event["reason"] for event in thrum.read_log(str(team.ada.var / "journal")) if event["type"] == "claim.release"]
    assert reasons == ["expired"]


def test_a_claim_ends_in_time_over_a_restart(team):
    team.ada.ok("claim", "src", "--ttl", "1s")
    team.ada.ok("daemon", "stop")
    team.ada.ok("daemon", "start")
    give_up_at = time.monotonic() + END_S
    while not any(event["type"] == "claim.release" for event in thrum.read_log(str(team.ada.var / "journal"))):
        assert time.monotonic() < give_up_at


def test_a_call_that_waits_ends_with_its_client(team):
    """Over JSON-RPC: it waits, gets it, or is refused with who holds it; who hangs up is out of the queue."""
    team.ada.ok("claim", "src")
    with team.bob.client() as client, pytest.raises(thrum.ThrumError) as caught:
        client.call("claim.take", paths=["src"], caller_agent_id="bob", wait_ms=50)
    assert caught.value.code == -32000 and caught.value.data["claims"][0]["agent_id"] == "ada"
    sock = thrum.dial(str(team.ada.var))
    sock.sendall(b'{"jsonrpc":"2.0","id":1,"method":"claim.take","params":{"paths":["src"],"caller_agent_id":"bob","wait_ms":60000}}\n')
    settle(team, 1)
    sock.close()
    settle(team, 0)


def test_a_caller_that_has_gone_leaves_nothing(machine):
    """Its ticket is out of the queue before the writer gets to its request: it neither waits nor claims then."""
    machine.take("ada", "src")
    for path in ("src", "free"):
        ticket = thrum.Ticket()
        (outcome,), _ = machine.ledger.commit([lambda context, ticket=ticket, path=path: thrum.claim_take(
            context, {"paths": [path], "caller_agent_id": "bob", "ticket": ticket})])
        assert "has gone" in str(outcome) and not ticket.wish
    assert machine.live() == [("ada", "src")] and machine.call("claim.list")["waiting"] == []


def test_a_python_client_waits_as_long_as_its_call(team):
    team.ada.ok("claim", "src")
    with team.bob.client() as client:
        client._answer_s = 0.5
        with pytest.raises(thrum.ThrumError, match="is claimed by @ada"):
            client.call("claim.take", paths=["src"], caller_agent_id="bob", wait_ms=1500)
