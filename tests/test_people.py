"""Who is there: groups, people, agents that join, are taken over, deleted and cleaned up.

Most run in this process on a ledger, as in test_methods; a few go through the daemon and the command line.
"""

import json
import os
import pty
import random
import shutil
import subprocess
from pathlib import Path

import pytest

import team as teams
import test_methods
import thrum
from conftest import CLEAN
from team import END_S, error_line

NS = thrum.NS
DAY = 86_400 * NS
ELSEWHERE = "d_elsewhere000"


class Team(test_methods.Team):
    """A ledger that events of other machines can reach and whose database can be taken away."""

    def arrive(self, kind, /, *, at=0, daemon=ELSEWHERE, **fields):
        """An event of another machine comes; gives the event."""
        def request(context):
            ns = at or context.world.stamp_ns(0)
            seq = context.ledger.journal.last + 1
            event = {**fields, "type": kind, "timestamp": thrum.stamp_of(ns), "event_id": context.world.new_id("evt"), "v": 1,
                     "origin_daemon": daemon, "sequence": seq}
            thrum.check_event(event)
            context.store.apply(event, seq, ns)
            context.lines.append((thrum.canonical(event), event, ns))
            return event

        (outcome,), _ = self.ledger.commit([request])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def again(self, rebuild=False):
        """Close and open; `rebuild` removes the database in between."""
        self.close()
        if rebuild:
            for end in ("", "-wal", "-shm"):
                thrum.remove(self.places.database + end)
        self.open()

    def expanded(self, name):
        return self.call("group.members", name=name, expand=True)["expanded"]

    def members(self, name):
        return [(m["member_type"], m["member_value"]) for m in self.call("group.members", name=name)["members"]]

    def add(self, group, kind, value):
        return self.call("group.member.add", group=group, member_type=kind, member_value=value)

    def holds(self, text):
        """The files below the repository in which a text occurs."""
        self.ledger.flush(sync=True)
        return sorted(os.path.relpath(os.path.join(folder, file), self.places.root) for folder, _, files in os.walk(self.places.root)
                      for file in files if text.encode() in Path(folder, file).read_bytes())


@pytest.fixture
def team(tmp_path):
    made = Team(tmp_path)
    yield made
    made.close()


@pytest.fixture
def abc(team):
    """a with role x, b and c with role y, all with sessions; the person user:leon."""
    team.sessions = {"a": team.agent("a", "x"), "b": team.agent("b", "y"), "c": team.agent("c", "y")}
    team.leon = team.person("leon", display="Leon")
    return team


# ---------------------------------------------------------------- groups

def test_a_group_from_its_creation_to_its_end(abc):
    made = abc.call("group.create", name="g", description="what for", caller_agent_id="a")
    assert set(made) == {"group_id", "name", "created_at"} and made["group_id"].startswith("grp_") and made["name"] == "g"
    assert abc.add("g", "agent", "@b") == {"group": "g", "member_type": "agent", "member_value": "b", "member": "b"}
    info = abc.call("group.info", name="@g")
    assert {k: info[k] for k in ("group_id", "name", "description", "created_at", "created_by")} == {
        **made, "description": "what for", "created_by": "a"}
    (member,) = info["members"]
    assert (member["member_type"], member["member_value"], member["added_by"]) == ("agent", "b", "system")
    assert member["added_at"] > made["created_at"]
    assert abc.call("group.members", name="g") == {"name": "g", "members": info["members"]}
    assert abc.call("group.members", name="g", expand=True)["expanded"] == ["b"]
    (listed,) = [g for g in abc.call("group.list")["groups"] if g["name"] == "g"]
    assert listed == {**made, "description": "what for", "member_count": 1}
    gone = abc.call("group.delete", name="@g", caller_agent_id="a")
    assert (gone["name"], gone["deleted"]) == ("g", True) and gone["deleted_at"] > member["added_at"]
    for method in ("group.info", "group.members", "group.delete"):
        assert str(abc.refused(method, name="g")) == 'group "g" not found'
    for method in ("group.member.add", "group.member.remove"):
        assert str(abc.refused(method, group="g", member_value="b")) == 'group "g" not found'
    assert "unknown recipients: @g" in str(abc.refused("message.send", content="x", mentions=["@g"], caller_agent_id="a"))
    again = abc.call("group.create", name="g")
    assert again["group_id"] != made["group_id"] and abc.expanded("g") == [], "a new group, not the old one's members"


def test_the_one_who_adds_is_remembered_over_a_rebuild(abc):
    abc.call("group.create", name="g", caller_agent_id="c")
    abc.call("group.member.add", group="g", member="b", caller_agent_id="a")      # the seeds' spelling, agent by default
    before = abc.call("group.info", name="g")
    assert before["members"][0]["added_by"] == "a" and before["created_by"] == "c"
    abc.again(rebuild=True)
    assert abc.call("group.info", name="g") == before


@pytest.mark.parametrize("params, text", [
    ({"member_type": "robot", "member_value": "b"}, "invalid member_type \"robot\" (must be 'agent'"),
    ({"member_type": "agent", "member_value": "ghost"}, 'agent "ghost" not found — agent must be registered before being added to a group'),
    ({"member_type": "role", "member_value": "ghost"}, 'role "ghost" not found — no registered agents with this role'),
    ({"member_type": "role", "member_value": "a"}, 'role "a" not found'),
    ({"member_type": "agent", "member_value": "y"}, 'agent "y" not found'),
    ({"member_type": "group", "member_value": "ghost"}, 'group "ghost" not found'),
    ({"member_type": "group", "member_value": "g"}, 'group "g" contains "g"'),
    ({"member_type": "agent", "member_value": "*"}, 'agent "*" not found'),
    ({"member_type": "group", "member_value": "*"}, 'group "*" not found'),
])
def test_members_that_cannot_be(abc, params, text):
    abc.call("group.create", name="g")
    assert str(abc.refused("group.member.add", group="g", **params)).startswith(text)


def test_adding_twice_and_removing_who_is_not_in_it_change_nothing(abc):
    abc.call("group.create", name="g")
    abc.add("g", "agent", "b")
    before = abc.ledger.journal.last
    abc.add("g", "agent", "b")
    assert abc.call("group.member.remove", group="g", member_value="c")["removed"] is False
    assert abc.call("group.member.remove", group="g", member_type="role", member_value="b")["removed"] is False
    assert abc.call("group.member.remove", group="g", member_type="whatever", member_value="none")["removed"] is False
    assert abc.ledger.journal.last == before
    assert abc.call("group.member.remove", group="@g", member_value="@b") == {
        "group": "g", "member_type": "agent", "member_value": "b", "member": "b", "removed": True}
    assert abc.members("g") == [] and abc.ledger.journal.last == before + 1
    abc.add("g", "agent", "b")
    assert abc.members("g") == [("agent", "b")], "and back"


def test_everyone_is_protected(abc):
    """Vector 31."""
    for name in ("everyone", "@everyone"):
        assert str(abc.refused("group.delete", name=name)) == "cannot delete built-in @everyone group"
        for method in ("group.member.add", "group.member.remove"):
            assert str(abc.refused(method, group=name, member_value="a")) == "cannot modify members of built-in @everyone group"
        assert "already exists" in str(abc.refused("group.create", name=name))
    info = abc.call("group.info", name="everyone")
    assert info["created_by"] == "system" and [(m["member_type"], m["member_value"]) for m in info["members"]] == [("role", "*")]
    assert abc.expanded("everyone") == ["a", "b", "c", "user:leon"]
    abc.arrive("group.delete", group_id="grp_everyone", deleted_by="somebody")
    abc.arrive("group.member.remove", group_id="grp_everyone", member_type="role", member_value="*")
    assert abc.expanded("everyone") == ["a", "b", "c", "user:leon"], "whatever another machine says"


def test_role_groups_are_derived(abc):
    """Decision 3: there as long as the role is; nothing about them is stored, hence nothing can be changed."""
    info = abc.call("group.info", name="y")
    assert [(m["member_type"], m["member_value"]) for m in info["members"]] == [("role", "y")]
    assert info["created_by"] == "system" and abc.expanded("@y") == ["b", "c"]
    listed = {g["name"]: g for g in abc.call("group.list")["groups"]}
    assert set(listed) == {"everyone", "x", "y"} and list(listed) == sorted(listed)
    assert listed["y"]["member_count"] == 1 and listed["y"]["group_id"] == info["group_id"]
    for method, params in (("group.member.add", {"group": "y", "member_value": "a"}), ("group.delete", {"name": "y"}),
                           ("group.member.remove", {"group": "y", "member_type": "role", "member_value": "y"})):
        assert str(abc.refused(method, **params)) == ('group "y" is made of the agents of that role; create a group of another name '
                                                      "to choose its members")
    assert "is taken: there is a role of that name" in str(abc.refused("group.create", name="y"))
    abc.call("agent.delete", name="b")
    abc.call("agent.delete", name="c")
    assert str(abc.refused("group.info", name="y")) == 'group "y" not found'
    assert "y" not in [g["name"] for g in abc.call("group.list")["groups"]]
    abc.call("group.create", name="y")
    assert abc.expanded("y") == []


def test_a_role_group_has_agents_only(abc):
    """A person whose name is that of a role neither gets the role's mail nor takes it."""
    try:
        abc.person("y")
    except thrum.ThrumError:
        return                  # refusing the name is as good
    assert abc.expanded("y") == ["b", "c"]
    abc.call("group.create", name="g")
    abc.add("g", "role", "y")
    assert abc.expanded("g") == ["b", "c"]
    assert [r["agent_id"] for r in abc.send("a", mentions=["@y"])["recipients"]] == ["b", "c"]


def test_an_agent_cannot_bring_a_role_that_a_group_hides(abc):
    """Names cannot shadow (decision 3), whoever comes second."""
    abc.call("group.create", name="g")
    assert "g" in str(abc.refused("agent.register", name="d", role="g", module="m"))


def test_a_group_and_a_person_do_not_share_a_name(abc):
    """@leon is the person; a group of that name would take the person's mail."""
    assert "leon" in str(abc.refused("group.create", name="leon"))
    abc.call("group.create", name="mia")
    assert "mia" in str(abc.refused("user.register", username="mia"))


@pytest.mark.parametrize("name", [
    "a", "x", "daemon", "system", "all", "broadcast", "thrum", "a b", "a/b", "..\n", "ü", "@", "a" * 65, "a\x1bb"])
def test_names_that_a_group_cannot_have(abc, name):
    text = str(abc.refused("group.create", name=name))
    assert len(text) < 250 and thrum.plain(text) == text


def test_a_nested_group_that_was_deleted_brings_nobody(abc):
    """Also when an agent later has a role of its name, which nobody put into the outer group."""
    for name in ("outer", "inner"):
        abc.call("group.create", name=name)
    abc.add("outer", "group", "inner")
    abc.add("inner", "agent", "b")
    assert abc.expanded("outer") == ["b"]
    abc.call("group.delete", name="inner")
    assert abc.expanded("outer") == []
    abc.agent("d", "inner")
    assert abc.expanded("outer") == [], "the role was never a member"


def test_cycles_are_refused_however_long(abc):
    names = [f"g{n}" for n in range(6)]
    for name in names:
        abc.call("group.create", name=name)
    for outer, inner in zip(names, names[1:]):
        abc.add(outer, "group", inner)
    for i, inner in enumerate(names):
        for outer in names[i:]:
            assert "inside itself" in str(abc.refused("group.member.add", group=outer, member_type="group", member_value=inner))
    abc.add("g0", "group", "g5")            # a second way down is none
    abc.add("g5", "agent", "b")
    assert abc.expanded("g0") == ["b"]


def test_a_cycle_that_two_machines_made_ends(abc):
    """Each added the other's group, neither saw a cycle: the members are those of both."""
    for name in ("g", "h"):
        abc.call("group.create", name=name)
    ids = {name: abc.call("group.info", name=name)["group_id"] for name in ("g", "h")}
    abc.add("g", "group", "h")
    abc.add("g", "agent", "a")
    abc.add("h", "agent", "b")
    abc.arrive("group.member.add", group_id=ids["h"], member_type="group", member_value="g")
    abc.arrive("group.member.add", group_id=ids["h"], member_type="group", member_value="h")
    assert abc.expanded("g") == abc.expanded("h") == ["a", "b"]
    assert [r["agent_id"] for r in abc.send("c", mentions=["@h"])["recipients"]] == ["a", "b"]


def test_nesting_costs_what_there_is_and_not_every_way_through_it(abc):
    """Twelve storeys of two groups each, both holding both below: 4,096 ways down, 24 groups."""
    for storey in range(12):
        for side in "lr":
            abc.call("group.create", name=f"{side}{storey}")
            for below in "lr" if storey else ():
                abc.add(f"{side}{storey}", "group", f"{below}{storey - 1}")
    abc.add("l0", "agent", "b")
    statements = []
    abc.reading.db.set_trace_callback(statements.append)
    assert abc.expanded("l11") == ["b"]
    assert len(statements) < 1_000, f"{len(statements)} statements for 24 groups"


def test_two_machines_made_a_group_of_the_same_name(abc):
    """They are one to everybody: what is removed is gone from it, and so is the group when it is deleted."""
    abc.call("group.create", name="g")
    abc.add("g", "agent", "b")
    abc.arrive("group.create", group_id="grp_01KTHEIRS", name="g", created_by="z")
    abc.arrive("group.member.add", group_id="grp_01KTHEIRS", member_type="agent", member_value="b")
    abc.arrive("group.member.add", group_id="grp_01KTHEIRS", member_type="agent", member_value="c")
    assert abc.expanded("g") == ["b", "c"] and [g["name"] for g in abc.call("group.list")["groups"]].count("g") == 1
    assert abc.call("group.member.remove", group="g", member_value="b")["removed"] is True
    assert abc.members("g") == [("agent", "c")] and abc.expanded("g") == ["c"]
    abc.call("group.delete", name="g")
    assert str(abc.refused("group.info", name="g")) == 'group "g" not found'


def test_membership_counts_from_the_moment_it_began(abc):
    """Decision 19: mail goes to who was in the group; later members get nothing, those removed keep theirs."""
    abc.call("group.create", name="g")
    abc.add("g", "agent", "b")
    first = abc.send("a", "first", mentions=["@g"])["message_id"]
    abc.add("g", "role", "y")
    abc.call("group.member.remove", group="g", member_value="b")
    abc.send("a", "second", mentions=["@g"])
    assert abc.inbox("c") == ["second"] and abc.inbox("b") == ["second", "first"]
    abc.call("group.delete", name="g")
    assert abc.inbox("b") == ["second", "first"] and abc.get(first)["scopes"] == [{"type": "group", "value": "g"}]
    abc.again(rebuild=True)
    assert abc.inbox("c") == ["second"] and abc.inbox("b") == ["second", "first"]


def test_the_wildcard_is_everybody_people_too(abc):
    abc.call("group.create", name="g")
    abc.add("g", "role", "*")
    assert abc.expanded("g") == ["a", "b", "c", "user:leon"]
    abc.agent("d", "z")
    assert "d" in abc.expanded("g")
    abc.call("agent.delete", name="a")
    assert abc.expanded("g") == ["b", "c", "d", "user:leon"]


def test_a_group_goes_with_its_messages_when_that_is_wanted(abc):
    for name in ("g", "h"):
        abc.call("group.create", name=name)
        abc.add(name, "agent", "b")
    abc.send("a", "wordforg", mentions=["@g"])
    abc.send("a", "wordforboth", mentions=["@g", "@h"])
    kept = abc.send("a", "wordforh", mentions=["@h"])["message_id"]
    gone = abc.call("group.delete", name="h", delete_messages=False)
    assert abc.inbox("b") == ["wordforh", "wordforboth", "wordforg"]
    abc.call("group.delete", name="g", delete_messages=True, caller_agent_id="a")
    assert abc.inbox("b") == ["wordforh"] and abc.get(kept) and gone["deleted"]
    assert abc.call("health")["messages"] == 1
    assert abc.holds("wordforg") == abc.holds("wordforboth") == [] and abc.holds("wordforh")
    abc.again(rebuild=True)
    assert abc.inbox("b") == ["wordforh"]


@pytest.mark.parametrize("seed", range(6))
def test_groups_are_what_a_model_of_sets_says(team, seed):
    """Random groups, nestings, roles, removals, deletions: members, counts, expansion and recipients."""
    rng = random.Random(seed)
    agents, groups = {"w": "boss"}, {}          # id -> role; name -> set of (type, value)
    team.agent("w", "boss")
    names = [f"g{n}" for n in range(6)]

    def inside(name, seen=()):
        below = {v for k, v in groups.get(name, ()) if k == "group" and v in groups} - set(seen)
        return {name}.union(*(inside(v, (*seen, name)) for v in below))

    def expand(name):
        found = set()
        for one in inside(name):
            for kind, value in groups[one]:
                found |= {a for a, r in agents.items() if (kind, value) in (("agent", a), ("role", r), ("role", "*"))}
        return sorted(found)

    def check():
        listed = {g["name"]: g["member_count"] for g in team.call("group.list")["groups"]}
        assert {k: v for k, v in listed.items() if k in names} == {k: len(v) for k, v in groups.items()}
        for name in groups:
            assert team.members(name) == sorted(groups[name]) and team.expanded(name) == expand(name), name

    for step in range(70):
        what, name = rng.choice(["agent", "leave", "create", "delete", "add", "add", "add", "add", "remove"]), rng.choice(names)
        if what == "agent":
            who, role = f"a{rng.randrange(8)}", f"r{rng.randrange(3)}"
            team.call("agent.register", name=who, role=role, module="m", force=True)
            agents[who] = role
        elif what == "leave" and len(agents) > 4:
            who = rng.choice(sorted(set(agents) - {"w"}))
            team.call("agent.delete", name=who)
            del agents[who]
        elif what == "create" and name not in groups:
            team.call("group.create", name=name)
            groups[name] = set()
        elif what == "delete" and name in groups and rng.random() < .4:
            team.call("group.delete", name=name)
            del groups[name]
        elif what == "add" and name in groups:
            kind, value = rng.choice([("agent", rng.choice(sorted(agents))), ("role", rng.choice(sorted(set(agents.values())))),
                                      ("group", rng.choice(sorted(groups))), ("role", "*") if rng.random() < .1 else ("agent", "w")])
            if kind == "group" and name in inside(value):
                team.refused("group.member.add", group=name, member_type=kind, member_value=value)
            else:
                team.add(name, kind, value)
                groups[name].add((kind, value))
        elif what == "remove" and groups.get(name):
            kind, value = rng.choice(sorted(groups[name]))
            assert team.call("group.member.remove", group=name, member_type=kind, member_value=value)["removed"]
            groups[name].discard((kind, value))
        if step % 10 == 9:
            check()
            for name in groups:
                sent = team.send("w", mentions=["@" + name])
                assert [r["agent_id"] for r in sent.get("recipients", [])] == [a for a in expand(name) if a != "w"]
    team.again(rebuild=True)
    check()


# ---------------------------------------------------------------- people

@pytest.fixture
def in_git(team):
    """A team in a real repository whose git configuration is only its own."""
    subprocess.run(["git", "init", "-q", team.places.root], check=True, env=CLEAN)
    return team


def configure(team, key, value):
    subprocess.run(["git", "config", key, value], cwd=team.places.root, check=True, env=CLEAN)


@pytest.mark.parametrize("name, username", [
    ("Leon", "leon"), ("Leon Richter", "leon-richter"), ("leon_b", "leon-b"), ("Ada L. O'Neil (work)", "ada-l-oneil-work"),
    ("Jürgen Groß", "jurgen-gross"), ("山田 太郎", "taro"), ("Zoë 山", "zoe"), (" -x- ", "x"),
    ("!!!", "taro"), ("--", "taro"),       # nothing of the name is left: the local part of the address
     ("x" * 100, "x" * 32),
    ("a" * 31 + "é", "a" * 31 + "e"), ("é" * 40, "e" * 32), ("a" * 31 + " b", "a" * 31), ("🎉 Ann", "ann"), ("tab\there", "tabhere"),
    ("A\u202eB", "ab"),
])
def test_identify_says_who_git_says(in_git, name, username):
    configure(in_git, "user.name", name)
    configure(in_git, "user.email", "taro@example.org")
    found = in_git.call("user.identify")
    assert found == {"username": username, "email": "taro@example.org", "display": name.strip()}
    assert len(found["username"].encode()) <= 32


def test_identify_without_a_name(in_git, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("HOME", in_git.places.root)
    for value in (None, "", "  "):
        if value is not None:
            configure(in_git, "user.name", value)
        assert str(in_git.refused("user.identify")) == "git config user.name not set: configure with 'git config user.name \"Your Name\"'"


def test_who_git_names_can_register(in_git):
    """The page does identify → register → session.start for everybody, wherever they were born."""
    for name in ("Jürgen Größe", "山田 太郎", "x" * 100, "Ünal", "!"):
        configure(in_git, "user.name", name)
        username = in_git.call("user.identify")["username"]
        assert in_git.call("user.register", username=username)["user_id"] == "user:" + username


def test_register_makes_a_person(team):
    joined = team.call("user.register", username="Leon_1", display="Léon")
    assert {k: v for k, v in joined.items() if k != "token"} == {
        "user_id": "user:Leon_1", "username": "Leon_1", "display_name": "Léon", "status": "registered"}
    assert joined["token"].startswith("tok_") and len(joined["token"]) > 12
    (person,) = team.call("agent.list")["agents"]
    assert {k: person[k] for k in ("agent_id", "kind", "role", "module", "display")} == {
        "agent_id": "user:Leon_1", "kind": "user", "role": "Leon_1", "module": "ui", "display": "Léon"}
    assert [g["name"] for g in team.call("group.list")["groups"]] == ["everyone"], "no role group is made"
    before = team.ledger.journal.last
    again = team.call("user.register", username="Leon_1")
    assert (again["status"], again["display_name"], team.ledger.journal.last) == ("existing", "Léon", before)
    assert again["token"] != joined["token"] and team.holds(joined["token"]) == []
    assert team.call("user.register", username="Leon_1", display="Leo")["display_name"] == "Leo"
    assert team.call("agent.list")["agents"][0]["display"] == "Leo"


@pytest.mark.parametrize("params, text", [
    ({"username": ""}, "username is required"), ({}, "username is required"),
    ({"username": "agent:x"}, "username cannot start with 'agent:' prefix"),
    ({"username": "a b"}, "invalid username format: must be alphanumeric, underscore, or hyphen (1-32 chars)"),
    ({"username": "a" * 33}, "invalid username format: must be alphanumeric, underscore, or hyphen (1-32 chars)"),
    ({"username": "user:x"}, "invalid username format: must be alphanumeric, underscore, or hyphen (1-32 chars)"),
    ({"username": "../x"}, "invalid username format: must be alphanumeric, underscore, or hyphen (1-32 chars)"),
])
def test_register_refuses_what_is_no_user_name(team, params, text):
    assert str(team.refused("user.register", **params)) == text


def test_people_read_and_write_like_agents(abc):
    assert [r["agent_id"] for r in abc.send("a", "to you", mentions=["@leon"])["recipients"]] == ["user:leon"]
    assert [r["agent_id"] for r in abc.send("a", "to you too", mentions=["@user:leon"])["recipients"]] == ["user:leon"]
    assert abc.inbox("user:leon") == ["to you too", "to you"]
    sent = abc.send(abc.leon, "hello agents")
    assert [r["agent_id"] for r in sent["recipients"]] == ["a", "b", "c"]
    assert abc.get(sent["message_id"])["author"]["agent_id"] == "user:leon"
    assert abc.call("message.edit", message_id=abc.send("b", "mine")["message_id"], content="better", caller_agent_id="user:leon")
    assert "invalid agent name" in str(abc.refused("agent.delete", name="user:leon"))


def test_a_person_without_a_session_cannot_write(abc):
    abc.call("user.register", username="mia")
    for more in ({}, {"acting_as": "a"}):
        assert str(abc.refused("message.send", content="x", caller_agent_id="user:mia", **more)) == (
            "resolve agent and session: no active session found for agent user:mia (you must start a session first)")


# ---------------------------------------------------------------- in the name of another

@pytest.mark.parametrize("caller, target, text", [
    ("a", "b", "only users can impersonate agents (caller: a)"), ("a", "a", "only users can impersonate agents (caller: a)"),
    ("a", "user:leon", "only users can impersonate agents (caller: a)"),
    ("a", "ghost", "only users can impersonate agents (caller: a)"),
    ("user:leon", "user:mia", "users can only impersonate agents, not other users (target: user:mia)"),
    ("user:leon", "user:leon", "users can only impersonate agents, not other users (target: user:leon)"),
    ("user:leon", "user:ghost", "users can only impersonate agents, not other users (target: user:ghost)"),
    ("user:leon", "ghost", "target agent does not exist: ghost"),
    ("user:leon", "leon", "target agent does not exist: leon"), ("user:leon", "y", "target agent does not exist: y"),
])
@pytest.mark.parametrize("more", [{}, {"disclose": True}, {"mentions": ["@nobody"]}])
def test_who_may_write_in_whose_name(abc, caller, target, text, more):
    """Vector 27 and the rules of §10 in their order; the caller is checked before the mentions."""
    abc.person("mia")
    assert str(abc.refused("message.send", content="x", caller_agent_id=caller, acting_as=target, **more)) == text


def test_a_gone_agent_lends_its_name_to_nobody(abc):
    abc.call("agent.delete", name="b")
    assert "target agent does not exist: b" == str(abc.refused("message.send", content="x", caller_agent_id=abc.leon, acting_as="b"))


def test_a_repeated_key_tells_nobody_about_the_mail_of_others(abc):
    """The rules come first: a key that b used gives a caller who may not write in b's name nothing."""
    abc.send("b", "secret", send_key="k", mentions=["@c"])
    assert str(abc.refused("message.send", content="x", caller_agent_id="a", acting_as="b", send_key="k")) == \
        "only users can impersonate agents (caller: a)"


def views(team, message_id, word):
    """The message in every view, as (name, what the view says of it)."""
    found = {"get": team.get(message_id), "trace": team.call("message.trace", message_id=message_id)}
    for name, method, params in (
            ("inbox", "message.list", {"for_agent": "b"}), ("all", "message.list", {}),
            ("sent", "message.outbox", {"caller_agent_id": "a"}), ("search", "message.search", {"query": word}),
            ("wait", "message.wait", {"after_seq": 0, "caller_agent_id": "b"})):
        found[name] = next(m for m in team.call(method, **params)["messages"] if m["message_id"] == message_id)
    return found.items()


def test_a_disclosed_message_says_in_every_view_who_wrote_it(abc):
    message = abc.send(abc.leon, "disclosedword", acting_as="a", disclose=True, mentions=["@b"])["message_id"]
    for _ in range(2):
        for name, seen in views(abc, message, "disclosedword"):
            assert (seen["authored_by"], seen["disclosed"]) == ("user:leon", True), name
        abc.again(rebuild=True)


@pytest.mark.parametrize("more", [{}, {"disclose": False}])
def test_an_undisclosed_message_says_it_nowhere(abc, more):
    """Vector 26."""
    sent = abc.send(abc.leon, "hiddenword", acting_as="a", mentions=["@b"], **more)
    assert "leon" not in json.dumps(sent)
    for name, seen in views(abc, sent["message_id"], "hiddenword"):
        assert "authored_by" not in seen and "disclosed" not in seen and "leon" not in json.dumps(seen), name


def test_a_message_in_another_name_is_that_agents(abc):
    """Author, sent list, file and rights are the target's; the session is the person's; the person may receive it."""
    sent = abc.send(abc.leon, "acted", acting_as="a", disclose=True)
    assert [r["agent_id"] for r in sent["recipients"]] == ["b", "c", "user:leon"], "the target is left out, not the person"
    (create,) = [event for _, event in abc.events]
    assert (create["agent_id"], create["authored_by"], create["disclosed"]) == ("a", "user:leon", True)
    assert create["session_id"] == abc.call("agent.whoami", caller_agent_id="user:leon")["session_id"]
    assert [os.path.basename(path) for path in abc.holds('"acted"') if "messages/" in path] == ["a.jsonl"]
    assert abc.call("message.outbox", caller_agent_id="a")["total"] == 1
    assert abc.call("message.outbox", caller_agent_id="user:leon")["total"] == 0
    assert abc.inbox("a") == [] and abc.inbox("user:leon") == ["acted"]
    assert "(author: a, current: b)" in str(abc.refused("message.edit", message_id=sent["message_id"], content="x", caller_agent_id="b"))
    abc.call("message.edit", message_id=sent["message_id"], content="mine", caller_agent_id="a")


def test_an_agent_lends_its_name_but_no_life(abc):
    """What a person writes says nothing about when the agent was here."""
    before = abc.reading.agent("a")["last_seen_at"]
    abc.world.at += DAY
    abc.send(abc.leon, "acted", acting_as="a")
    assert abc.reading.agent("a")["last_seen_at"] == before
    assert abc.reading.agent("user:leon")["last_seen_at"] > before + DAY


def test_disclose_alone_is_nothing(abc):
    message = abc.send("a", "plain", disclose=True)["message_id"]
    assert "authored_by" not in abc.get(message) and "disclosed" not in abc.get(message)
    assert "disclosed" not in abc.events[0][1]


# ---------------------------------------------------------------- agents join

def test_everybody_keeps_its_row_when_others_force(abc):
    """Decision 6."""
    for n, way in enumerate(({"force": True}, {"re_register": True})):
        assert abc.call("agent.register", name="d", role="y", module="core")["status"] == "conflict"
        assert abc.call("agent.register", name=f"n{n}", role="y", module="core", **way)["status"] == "registered"
    assert {agent["agent_id"] for agent in abc.call("agent.list", role="y")["agents"]} == {"b", "c", "n0", "n1"}
    assert abc.call("session.list", active_only=True)["sessions"][0]["status"] == "active"
    assert {s["agent_id"] for s in abc.call("session.list", active_only=True)["sessions"]} == {"a", "b", "c", "user:leon"}


def test_an_agent_returns_with_another_role(abc):
    """A new role is a registration of the same agent: the old role's mail stays, the new role's mail comes."""
    abc.send("a", "for y", mentions=["@y"])
    assert abc.call("agent.register", name="b", role="z", module="core")["status"] == "registered"
    assert abc.expanded("y") == ["c"] and abc.expanded("z") == ["b"]
    abc.send("a", "for z", mentions=["@z"])
    assert abc.inbox("b") == ["for z", "for y"]


def elsewhere(team, name, role="y", at=0, module="core", session="ses_01KELSEWHERE", **more):
    """An agent registers and works on another machine."""
    at = at or team.world.now_ns()
    team.arrive("agent.register", at=at, agent_id=name, kind="agent", role=role, module=module, name=name, hostname="farbox", worktree="wt",
                **more)
    if session:
        team.arrive("agent.session.start", at=at + 1, session_id=session, agent_id=name)


def test_a_name_of_another_machine_is_a_conflict_for_a_day(team):
    """Decision 7: with host and time, whether role and module are the same or not, also for --re-register."""
    elsewhere(team, "d")
    for more in ({}, {"re_register": True}, {"role": "other"}, {"module": "other"}):
        error = team.refused("agent.register", **{"name": "d", "role": "y", "module": "core", **more})
        assert "farbox" in str(error) and thrum.stamp_of(team.world.at)[:10] in str(error) and "--force" in str(error), more
    team.world.at += DAY
    assert team.call("agent.register", name="d", role="y", module="core")["status"] == "registered"


def test_force_moves_a_name_here_and_ends_its_sessions(team):
    elsewhere(team, "d")
    elsewhere(team, "e", role="z", session="ses_01KOTHER")
    assert team.call("agent.register", name="d", role="y", module="core", force=True)["status"] == "registered"
    (ended,) = team.call("session.list", agent_id="d")["sessions"]
    assert (ended["status"], ended["end_reason"]) == ("ended", "superseded") and ended["ended_at"] > ended["started_at"]
    assert team.call("session.list", agent_id="e")["sessions"][0]["status"] == "active", "of nobody else"
    assert team.call("agent.register", name="d", role="y", module="core")["status"] == "registered", "it is ours now"
    mine = team.call("session.start", agent_id="d")["session_id"]
    team.call("agent.register", name="d", role="y", module="core", force=True)
    assert team.call("agent.whoami", caller_agent_id="d")["session_id"] == mine, "a second --force is no theft from oneself"


def test_a_name_that_was_quiet_for_a_day_moves_as_well(team):
    """Its sessions end too: two machines must not both hold it."""
    elsewhere(team, "d")
    team.world.at += 2 * DAY
    team.call("agent.register", name="d", role="y", module="core", force=True)
    assert team.call("session.list", agent_id="d", active_only=True)["sessions"] == []


def test_a_quiet_name_comes_here_without_force(team):
    """The same registration as on the other machine must be written, or the name stays theirs."""
    elsewhere(team, "d")
    team.world.at += 2 * DAY
    team.call("agent.register", name="d", role="y", module="core")
    team.call("session.start", agent_id="d")
    assert team.reading.agent("d")["daemon"] == team.ledger.daemon_id


def test_a_session_ends_only_sessions_of_its_own_machine(team):
    elsewhere(team, "d")
    team.call("session.start", agent_id="d")
    states = {s["session_id"]: s["status"] for s in team.call("session.list", agent_id="d")["sessions"]}
    assert states["ses_01KELSEWHERE"] == "active" and len(states) == 2
    team.call("session.start", agent_id="d")
    states = [s.get("end_reason") for s in team.call("session.list", agent_id="d")["sessions"]]
    assert states == [None, "crash_recovered", None]


# ---------------------------------------------------------------- agents leave

def worktree(team, name):
    """A linked worktree as git leaves it on the disk."""
    top = os.path.join(os.path.dirname(team.places.root), name)
    os.makedirs(top + "/.thrum/identities", exist_ok=True)
    os.makedirs(f"{team.places.common}/worktrees/{name}", exist_ok=True)
    for path, text in ((f"{team.places.common}/worktrees/{name}/gitdir", top + "/.git"),
                       (f"{team.places.common}/worktrees/{name}/commondir", "../.."),
                       (top + "/.git", f"gitdir: {team.places.common}/worktrees/{name}")):
        with open(path, "w") as file:
            file.write(text + "\n")
    return top


def identity(top, name, file="", **more):
    """An identity file in a worktree; its path."""
    path = f"{top}/.thrum/identities/{file or name + '.json'}"
    with open(path, "w") as out:
        json.dump({"version": 3, "agent": {"Kind": "agent", "Name": name, "Role": "r", "Module": "m", "Display": ""},
                   "worktree": os.path.basename(top), **more}, out)
    return path


def test_delete_takes_an_agent_out_of_everything(abc, tmp_path_factory):
    """Files in all worktrees, messages with all that hangs on them, sessions; what others wrote stays."""
    tops = [abc.places.root, worktree(abc, "side" + os.path.basename(abc.places.root))]
    files = []
    for top in tops:
        os.makedirs(top + "/.thrum/context", exist_ok=True)
        files += [identity(top, "b"), top + "/.thrum/context/b.md", top + "/.thrum/context/b_preamble.md"]
        for path in files[-2:]:
            with open(path, "w") as file:
                file.write("context")
    spared = [identity(tops[0], "a"), identity(tops[1], "bb")]
    mine = abc.send("b", "droppedword", mentions=["@a"], scopes=[{"type": "s", "value": "droppedscope"}])["message_id"]
    abc.call("message.edit", message_id=mine, content="droppedagain", caller_agent_id="b")
    abc.call("message.markRead", message_ids=[mine], caller_agent_id="a")
    kept = abc.send("a", "keptword", mentions=["@b", "@c"])["message_id"]
    answer = abc.send("c", "answerword", reply_to=mine)["message_id"]
    done = abc.call("agent.delete", name="@b", caller_agent_id="a")
    assert done == {"agent_id": "b", "deleted": True, "message": "Agent b deleted successfully"}
    (tombstone,) = [event for _, event in abc.events]
    assert {k: tombstone[k] for k in ("type", "agent_id", "method", "reason")} == {
        "type": "agent.cleanup", "agent_id": "b", "method": "manual", "reason": "manual deletion"}
    assert tombstone["timestamp"] and tombstone["v"] == 1
    assert not [path for path in files if os.path.exists(path)] and all(map(os.path.exists, spared))
    for again in (False, True):
        for word in ("droppedword", "droppedagain", "droppedscope"):
            assert abc.holds(word) == [], word
            assert abc.call("message.search", query=word)["total"] == 0
        assert str(abc.refused("message.get", message_id=mine)) == f"message not found: {mine}"
        assert abc.get(kept) and abc.get(answer) and abc.inbox("a") == ["answerword"] and abc.inbox("c") == ["keptword"]
        assert [a["agent_id"] for a in abc.call("agent.list")["agents"]] == ["user:leon", "c", "a"]
        assert abc.call("session.list", agent_id="b")["sessions"] == []
        assert [p for p in abc.holds("keptword") if "journal" in p] and abc.call("message.search", query="keptword")["total"] == 1
        events = Path(abc.places.sync + "/events.jsonl").read_text().splitlines()
        (line,) = [json.loads(line) for line in events if '"agent.cleanup"' in line]
        assert line == tombstone
        assert not os.path.exists(abc.places.sync + "/messages/b.jsonl")
        assert str(abc.refused("agent.delete", name="b")) == "agent not found: b"
        assert "unknown recipients: @b" in str(abc.refused("message.send", content="x", mentions=["@b"], caller_agent_id="a"))
        assert "no active session" in str(abc.refused("message.send", content="x", caller_agent_id="b"))
        abc.again(rebuild=not again)


def test_deletion_goes_by_agent_and_not_by_file(abc):
    """Lesson 11: the identity of another agent in a file of that name stays, the agent's own under another name goes."""
    own = identity(abc.places.root, "b", "main.json")
    other = identity(worktree(abc, "far" + os.path.basename(abc.places.root)), "c", "b.json")
    abc.call("agent.delete", name="b")
    assert os.path.exists(other), "the file is another's"
    assert not os.path.exists(own), "an identity of an agent that was deleted would speak for it again"


@pytest.mark.parametrize("name, text", [
    ("ghost", "agent not found: ghost"), ("", "agent name is required"), ("user:leon", "invalid agent name: "),
    ("Bad", "invalid agent name: "),
    ("../b", "invalid agent name: "), ("agent:y:ABCDEFGHIJ", "invalid agent name: "), ("daemon", "invalid agent name: "),
    ("y", "agent not found: y"),
    ("b_", "agent not found: b_"), ("_", "agent not found: _")])
def test_delete_refuses(abc, name, text):
    assert str(abc.refused("agent.delete", name=name)).startswith(text)


def test_a_name_that_was_deleted_can_be_taken_again(abc):
    """Its messages stay gone; the tombstone of before does not reach what comes after, also in a rebuild."""
    old = abc.send("b", "oldword")["message_id"]
    abc.call("agent.delete", name="b")
    assert abc.call("agent.register", name="b", role="fresh", module="core")["status"] == "registered"
    abc.call("session.start", agent_id="b")
    new = abc.send("b", "newword", mentions=["@a"])["message_id"]
    for rebuild in (True, False):
        assert abc.get(new) and str(abc.refused("message.get", message_id=old)) and abc.expanded("fresh") == ["b"]
        assert abc.call("message.search", query="newword")["total"] == 1 and abc.holds("oldword") == []
        abc.again(rebuild=rebuild)


def test_a_message_of_a_deleted_agent_that_comes_late_stays_out(abc):
    """Sync brings what the agent wrote on another machine before it was deleted; what it wrote later counts."""
    at = abc.world.now_ns()
    abc.world.at += DAY
    abc.call("agent.delete", name="b")
    late = {"agent_id": "b", "session_id": "ses_x", "recipients": ["a"]}
    abc.arrive("message.create", at=at, message_id="msg_01KLATE", body={"format": "plain", "content": "latecomer"}, **late)
    assert abc.inbox("a") == [] and abc.call("message.search", query="latecomer")["total"] == 0
    assert str(abc.refused("message.get", message_id="msg_01KLATE"))
    abc.again(rebuild=True)
    assert abc.inbox("a") == []


def test_deleting_holds_against_a_clock_that_is_ahead(abc):
    """What the agent wrote on a machine an hour ahead goes too: messages that were taken back, and sessions."""
    ahead = abc.world.now_ns() + 3600 * NS
    abc.arrive("agent.session.start", at=ahead, session_id="ses_01KAHEAD", agent_id="b")
    abc.arrive("message.create", at=ahead + 1, message_id="msg_01KAHEAD", agent_id="b", session_id="ses_01KAHEAD", recipients=["a"],
               body={"format": "plain", "content": "aheadword"})
    abc.arrive("message.delete", at=ahead + 2, message_id="msg_01KAHEAD")
    abc.call("agent.delete", name="b")
    assert abc.holds("aheadword") == []
    assert abc.call("session.list", agent_id="b")["sessions"] == []


def test_what_was_sent_to_a_deleted_agent_says_so(abc):
    message = abc.send("a", "hello?", mentions=["@b", "@c"])["message_id"]
    abc.call("agent.delete", name="b")
    (row,) = abc.call("message.outbox", caller_agent_id="a")["messages"]
    assert [(r["agent_id"], r.get("gone", False)) for r in row["recipients"]] == [("b", True), ("c", False)]
    traced = abc.call("message.trace", message_id=message)["recipients"]
    assert [(r["agent_id"], r.get("gone", False)) for r in traced] == [("b", True), ("c", False)]


# ---------------------------------------------------------------- cleanup

@pytest.fixture
def old(in_git):
    """A repository with a commit and agents in every state."""
    run = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run([*run, "commit", "-q", "--allow-empty", "-m", "1"], cwd=in_git.places.root, check=True, env=CLEAN)
    subprocess.run([*run, "branch", "-M", "main"], cwd=in_git.places.root, check=True, env=CLEAN)
    return in_git


def orphans(team, **more):
    return {o["agent_id"]: o for o in team.call("agent.cleanup", dry_run=True, **more)["orphans"]}


def test_cleanup_finds_each_reason(old):
    here = os.path.basename(old.places.root)
    for name in ("fine", "nofile", "notree", "nobranch", "nothing"):
        old.agent(name, "r" + name, session=False, **({} if name == "nothing" else {"worktree": here}))
    identity(old.places.root, "fine", branch="main")
    identity(old.places.root, "notree", worktree="vanished", branch="main")
    identity(old.places.root, "nobranch", branch="merged-and-deleted")
    old.person("leon")
    assert "notree" not in orphans(old), "seen a moment ago: the folder was renamed"
    old.world.at += DAY + NS
    found = orphans(old)
    assert set(found) == {"nofile", "notree", "nobranch"}, "without a worktree it never had a file; people are left alone"
    base = {"role", "module", "worktree", "branch", "last_seen_at", "worktree_missing", "branch_missing", "days_since_last_seen",
            "message_count", "agent_id", "name", "reason"}
    assert all(set(orphan) == base for orphan in found.values())
    assert {name: (o["reason"], o["worktree_missing"], o["branch_missing"]) for name, o in found.items()} == {
        "nofile": ("no identity file", True, True), "notree": ("worktree vanished is gone", True, False),
        "nobranch": ("branch merged-and-deleted is gone", False, True)}
    old.world.at += 31 * DAY
    found = orphans(old)
    assert set(found) == {"fine", "nofile", "notree", "nobranch", "nothing"}
    assert found["fine"]["reason"] == "not seen for 32 days" and found["fine"]["days_since_last_seen"] == 32
    assert found["nofile"]["reason"] == "no identity file, not seen for 32 days"


def test_the_threshold_is_in_whole_days(old):
    old.agent("d", "r", session=False)
    seen = old.call("agent.list")["agents"][0]["last_seen_at"]
    for days, threshold, stale in ((30, None, False), (31, None, True), (1, 0, True), (0, 0, False), (3, 2, True), (3, 3, False)):
        old.world.at = thrum.ns_of(seen) + days * DAY
        assert bool(orphans(old, **({} if threshold is None else {"threshold": threshold}))) is stale, (days, threshold)
    assert "threshold" in str(old.refused("agent.cleanup", threshold=-1))
    assert "mutually exclusive" in str(old.refused("agent.cleanup", dry_run=True, force=True))


def test_an_identity_in_any_worktree_counts(old):
    top = worktree(old, "linked" + os.path.basename(old.places.root))
    old.agent("d", "r", session=False, worktree=os.path.basename(top))
    identity(top, "d", branch="main")
    assert orphans(old) == {}
    shutil.rmtree(top)
    assert orphans(old)["d"]["worktree_missing"] is True


def test_agents_of_other_machines_are_judged_by_age_alone(old):
    elsewhere(old, "far", session="")
    assert orphans(old) == {}
    old.world.at += 40 * DAY
    assert orphans(old)["far"]["reason"] == "not seen for 40 days"


def test_who_was_seen_a_moment_ago_is_no_orphan_of_a_branch(old):
    """An agent that merged its branch, deleted it and works on must not be deleted with all it wrote."""
    identity(old.places.root, "d", branch="merged-and-deleted")
    old.agent("d", "r", worktree=os.path.basename(old.places.root))
    old.send("d", "still here")
    assert orphans(old) == {}


def test_a_repository_without_commits_has_no_gone_branches(in_git):
    subprocess.run(["git", "symbolic-ref", "HEAD", "refs/heads/main"], cwd=in_git.places.root, check=True, env=CLEAN)
    identity(in_git.places.root, "d", branch="main")
    in_git.agent("d", "r", session=False, worktree=os.path.basename(in_git.places.root))
    assert orphans(in_git) == {}


def test_cleanup_says_what_it_did(old):
    nobody = old.call("agent.cleanup")
    assert nobody == {"orphans": [], "deleted": [], "deleted_count": 0, "dry_run": False}
    for name in ("d", "e"):
        old.agent(name, "r" + name, worktree="here")
    old.send("d", "orphanword", mentions=["@e"])
    before = old.ledger.journal.last
    for params, message in (({"dry_run": True}, "Found 2 orphaned agent(s)"), ({}, "Use --force to delete all orphans without prompting")):
        found = old.call("agent.cleanup", **params)
        assert (found["message"], found["deleted"], old.ledger.journal.last) == (message, [], before)
        assert [(o["agent_id"], o["message_count"]) for o in sorted(found["orphans"], key=lambda o: o["agent_id"])] == [("d", 1), ("e", 0)]
    done = old.call("agent.cleanup", force=True)
    assert done["message"] == "Deleted 2 orphaned agent(s)" and sorted(done["deleted"]) == ["d", "e"] and done["deleted_count"] == 2
    assert {(event["type"], event["method"], event["reason"]) for _, event in old.events} == {
        ("agent.cleanup", "cleanup", "no identity file")}
    assert old.call("agent.list")["agents"] == [] and old.holds("orphanword") == []


# ---------------------------------------------------------------- from the command line

@pytest.fixture(scope="module")
def cli(tmp_path_factory):
    made = teams.Team(tmp_path_factory.mktemp("people"))
    yield made
    made.close()


def at_terminal(repo, typed, *args):
    """Run a command whose stdin is a terminal at which something was typed: (status, stdout, stderr)."""
    master, slave = pty.openpty()
    try:
        process = subprocess.Popen(repo.command(*args), cwd=repo.path, env=CLEAN, stdin=slave, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, start_new_session=True)
        os.write(master, typed)
        out, err = process.communicate(timeout=END_S)
        return process.returncode, out.decode(), err.decode()
    finally:
        os.close(slave)
        os.close(master)


def spare(cli, name, **more):
    """An agent that can be spared, of this machine and without an identity file."""
    with cli.ada.client() as client:
        client.call("agent.register", name=name, role="spare", module="m", force=True, **more)


def agents(cli):
    with cli.ada.client() as client:
        return {agent["agent_id"] for agent in client.call("agent.list")["agents"]}


@pytest.mark.parametrize("typed, gone", [(b"y\n", True), (b"Y\n", True), (b"n\n", False), (b"\n", False), (b"\x04", False),
                                         (b"yes\n", False)], ids=["y", "Y", "n", "empty", "eof", "yes"])
def test_delete_asks(cli, typed, gone):
    spare(cli, "extra")
    status, out, err = at_terminal(cli.ada, typed, "agent", "delete", "@extra")
    assert status == 0 and "Delete agent 'extra' and all associated data? [y/N] " in out + err
    assert ("✓ Agent extra deleted successfully" in out) is gone and ("Deletion canceled." in out) is not gone
    assert ("extra" in agents(cli)) is not gone


def test_delete_of_an_agent_that_worked_here(cli):
    """As scripts check it: files, list and tombstone (cli.md 20, 64 and 65); its shell is told the way on."""
    own = {"THRUM_NAME": "extra", "THRUM_ROLE": "spare", "THRUM_MODULE": "m"}
    ada = cli.ada
    ada.ok("quickstart", "--name", "extra", "--role", "spare", "--module", "m", env=own)
    ada.ok("send", "farewellword", "--to", "@bob", env=own)
    log = ada.path / ".git/thrum-sync/a-sync"
    identity_file = ada.path / ".thrum/identities/extra.json"
    assert identity_file.exists() and cli.unread() == ["farewellword"]
    assert ada.ok("agent", "delete", "extra", "--force") == "✓ Agent extra deleted successfully\n"
    assert not identity_file.exists() and not (log / "messages/extra.jsonl").exists()
    assert '"extra"' not in ada.ok("agent", "list", "--json") and cli.unread() == []
    tombstones = [json.loads(line) for line in (log / "events.jsonl").read_text().splitlines() if "agent.cleanup" in line]
    (event,) = [event for event in tombstones if event["agent_id"] == "extra" and event["reason"] == "manual deletion"][-1:]
    assert event["timestamp"] and event["method"] == "manual"
    left = [str(path) for path in ada.path.rglob("*") if path.is_file() and b"farewellword" in path.read_bytes()]
    assert left == [], "also the database has let go of it"
    assert "extra" in error_line(ada.run("send", "x", "--to", "@bob", env=own))


def test_delete_without_a_terminal_needs_force(cli):
    spare(cli, "extra")
    seq = cli.seq()
    assert "Deletion canceled." in cli.ada.ok("agent", "delete", "extra") and cli.seq() == seq
    assert cli.ada.json("agent", "delete", "extra") == {"agent_id": "extra", "deleted": False, "message": "Deletion canceled."}
    assert cli.ada.json("agent", "delete", "extra", "--force")["deleted"] is True
    text = error_line(cli.ada.run("agent", "delete", "extra", "--force"))
    assert "agent not found: extra" in text
    assert "invalid agent name: " in error_line(cli.ada.run("agent", "delete", "No/Name", "--force"))


@pytest.mark.parametrize("typed, gone", [(b"y\n", True), (b"n\n", False), (b"\n", False), (b"\x04", False)], ids=["y", "n", "empty", "eof"])
def test_cleanup_asks(cli, typed, gone):
    spare(cli, "stray", worktree="nowhere")
    status, out, err = at_terminal(cli.ada, typed, "agent", "cleanup")
    assert status == 0, err
    assert "Agent cleanup results:" in out and "  Agent: stray (spare, module: m)" in out and "no identity file" in out
    assert "nowhere [DELETED]" in out and "Messages:" in out and "Delete these orphaned agents? [y/N] " in out + err
    assert ("✓ Deleted stray" in out and "✓ Deleted 1 orphaned agent(s)" in out) is gone
    assert ("Cleanup canceled." in out) is not gone and ("stray" in agents(cli)) is not gone
    cli.ada.ok("agent", "cleanup", "--force")


def test_cleanup_without_a_terminal_only_tells(cli):
    assert cli.ada.ok("agent", "cleanup") == "No orphaned agents found.\n"
    spare(cli, "stray", worktree="nowhere")
    assert "Use --force to delete all orphans without prompting" in cli.ada.ok("agent", "cleanup")
    text = cli.ada.ok("agent", "cleanup", "--dry-run")
    assert text.startswith("Orphaned agents (dry-run mode):") and "Found 1 orphaned agent(s)" in text
    assert [o["agent_id"] for o in cli.ada.json("agent", "cleanup", "--dry-run", "--threshold", "5")["orphans"]] == ["stray"]
    assert "stray" in agents(cli)
    assert error_line(cli.ada.run("agent", "cleanup", "--force", "--dry-run")) == "--dry-run and --force are mutually exclusive"
    assert "✓ Deleted 1 orphaned agent(s): stray" in cli.ada.ok("agent", "cleanup", "--force")
    assert agents(cli) == {"ada", "bob"}


def test_cleanup_of_a_repository_without_commits(make_repo):
    """Whoever joined a moment ago, in a repository that was made a moment ago, is no orphan."""
    repo = make_repo(commit=False)
    repo.join("ada", "planner")
    assert repo.ok("agent", "cleanup") == "No orphaned agents found.\n"


def test_groups_from_the_command_line(cli):
    ada = cli.ada
    assert ada.ok("group", "create", "crew", "--description", "all hands") .startswith("✓ Group created")
    assert ada.ok("group", "add", "crew", "@bob") == "✓ Added @bob to crew\n"
    assert ada.ok("group", "add", "crew", "--role", "planner") == "✓ Added role:planner to crew\n"
    assert ada.ok("group", "create", "whole")
    assert ada.ok("group", "add", "whole", "--group-member", "@crew") == "✓ Added group:crew to whole\n"
    assert ada.ok("group", "add", "whole", "--role", "*") == "✓ Added role:* (all agents) to whole\n"
    info = ada.ok("group", "info", "crew")
    assert "Group:" in info and "all hands" in info and "by @ada" in info and "Members (2):" in info and "  @bob\n" in info
    text = ada.ok("group", "members", "whole", "--expand")
    assert text == "Members (2):\n  group:crew\n  role:* (all agents)\nExpanded (2 agents):\n  @ada\n  @bob\n"
    assert ada.json("group", "members", "crew", "--expand")["expanded"] == ["ada", "bob"]
    assert "inside itself" in error_line(ada.run("group", "add", "crew", "--group-member", "whole"))
    assert error_line(ada.run("group", "add", "crew")) == "provide a member argument or --role flag"
    assert ada.ok("group", "remove", "crew", "bob") == "✓ Removed @bob from crew\n"
    assert "was not a member" in ada.ok("group", "remove", "crew", "bob")
    assert ada.json("group", "remove", "crew", "bob")["removed"] is False
    assert ada.ok("group", "delete", "@crew") == "✓ Group deleted: crew\n"
    assert 'group "crew" not found' in error_line(ada.run("group", "info", "crew"))
    assert error_line(ada.run("group", "delete", "everyone")) .endswith("cannot delete built-in @everyone group")
    ada.ok("group", "delete", "whole")


def test_the_seeds_other_names_of_commands(cli):
    """`agent whoami|start|end|heartbeat|set-intent|set-task` do what the commands without `agent` do."""
    ada = cli.ada
    assert ada.json("agent", "whoami")["agent_id"] == ada.json("whoami")["agent_id"] == "ada"
    started = ada.json("agent", "start")
    assert started["session_id"] != ada.json("session", "start")["session_id"]
    ada.ok("agent", "set-intent", "think")
    ada.ok("agent", "set-task", "t-1")
    assert ada.json("whoami")["intent"] == "think"
    assert "last_seen_at" in ada.json("agent", "heartbeat")
    assert ada.json("agent", "end")["session_id"] != started["session_id"]
    ada.ok("session", "start")


def test_only_people_write_in_other_names(cli):
    seq = cli.seq()
    text = error_line(cli.ada.run("send", "x", "--to", "@ada", "--acting-as", "@bob", "--disclose"))
    assert text.endswith("only users can impersonate agents (caller: ada)") and cli.seq() == seq
    with cli.ada.client() as client:
        with pytest.raises(thrum.ThrumError) as caught:
            client.call("user.register", username="leon")
        assert (caught.value.code, str(caught.value)) == (-32000, "User registration only available via WebSocket")
        assert client.call("user.identify")["username"]


def test_who_wrote_in_an_agents_name_is_on_every_screen(tmp_path):
    """Disclosed mail of a person, as another machine brings it: inbox, message get, sent, search, trace and wait show it."""
    made = teams.Team(tmp_path)
    try:
        made.mail("warm up")
        made.ada.ok("daemon", "stop")
        log, stamp = made.ada.path / ".git/thrum-sync/a-sync", thrum.stamp_of(thrum.World({}).now_ns())
        base = {"timestamp": stamp, "v": 1, "origin_daemon": ELSEWHERE}
        with open(log / "events.jsonl", "ab") as file:
            file.write(thrum.canonical({**base, "type": "agent.register", "event_id": "evt_01KLEON", "agent_id": "user:leon",
                                        "kind": "user", "role": "leon", "module": "ui"}) + b"\n")
        with open(log / "messages/ada.jsonl", "ab") as file:
            for n, disclosed in enumerate((True, False)):
                file.write(thrum.canonical({
                    **base, "type": "message.create", "event_id": f"evt_01KACTED{n}", "message_id": f"msg_01KACTED{n}", "agent_id": "ada",
                    "session_id": "ses_x", "body": {"format": "plain", "content": f"actedword number {n}"}, "recipients": ["bob"],
                    "refs": [{"type": "mention", "value": "bob"}], "authored_by": "user:leon", "disclosed": disclosed}) + b"\n")
        shutil.rmtree(made.ada.path / ".thrum/var/journal")
        made.ada.ok("daemon", "start")
        for repo, words in ((made.bob, "inbox --unread"), (made.bob, "wait --unread"), (made.ada, "sent"), (made.bob, "search actedword"),
                            (made.bob, "inbox --all")):
            text = repo.ok(*words.split())
            assert text.count("(by @user:leon)") + text.count("(by @leon)") == 1 and text.count("number") == 2, (words, text)
        for n, shown in enumerate((1, 0)):
            for words in ("trace", "message get", "sent show"):
                assert made.ada.ok(*words.split(), f"msg_01KACTED{n}").count("leon") == shown, words
        person = {"THRUM_AGENT_ID": "user:leon"}
        made.ada.ok("session", "start", env=person)
        third = made.ada.json("send", "third", "--to", "@bob", "--acting-as", "@ada", "--disclose", env=person)["message_id"]
        assert made.bob.json("message", "get", third)["message"]["authored_by"] == "user:leon"
    finally:
        made.close()
