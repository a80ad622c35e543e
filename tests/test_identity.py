"""Section 7: ids that all machines agree on, identity files, and who is calling."""

import json

import pytest

import thrum

# ---- ids: every worked example of spec/storage.md, sections 4.2 and 4.3

ORIGINS = [
    # origin, normalised, repository id
    ("git@github.com:acme/widgets.git", "https://github.com/acme/widgets", "r_DR3Z0XEPBMS3"),
    ("ssh://git@github.com/acme/widgets.git", "https://github.com/acme/widgets", "r_DR3Z0XEPBMS3"),
    ("https://u:tok@github.com/acme/widgets", "https://github.com/acme/widgets", "r_DR3Z0XEPBMS3"),
    ("ssh://git@git.example.org:2222/team/proj.git", "https://git.example.org:2222/team/proj", "r_ZQ5WPEVPFZQQ"),
    ("file:///srv/git/proj.git", "https:///srv/git/proj", "r_052EGEPBMFBS"),
    ("https://github.com/acme/widgets/", "https://github.com/acme/widgets/", "r_ZCGCPEBCN199"),
    ("https://GitHub.com/Acme/Widgets.git", "https://github.com/Acme/Widgets", "r_0QHZZMHWEWFP"),
    ("git@GitHub.com:Acme/Widgets.git", "https://GitHub.com/Acme/Widgets", "r_HAW7MHR4K5T9"),
    ("example.com:foo/bar.git", "https://", "r_CVFYXVDBY7R2"),
    ("other.example.com:x.git", "https://", "r_CVFYXVDBY7R2"),
]
OTHER_ORIGINS = [
    # by the rules of 4.2
    ("", ""), ("  \n", ""), ("deploy@example.com:foo/bar.git", ""), ("\tgit@github.com:acme/widgets.git\n",
     "https://github.com/acme/widgets"),
    ("git@host:a:b.git", "https://host/a:b"), ("git@host:x.git.git", "https://host/x.git"),
    ("https://host/x.git?a=1#f", "https://host/x"), ("https://host/x.git/", "https://host/x.git/"),
    ("https://host/a%20b.git", "https://host/a b"), ("https://host/%c3%bc", "https://host/ü"), ("https://host/ü%20b", "https://host/ü b"),
    ("https://host/%zz", ""), ("https://host/a%2", ""), ("https://host/%+1", ""),
    ("https://a@b@host/x", "https://host/x"), ("/srv/git/proj.git", "https:///srv/git/proj"), ("../proj.git", "https://../proj"),
    ("HTTPS://HOST.EXAMPLE/X", "https://host.example/X"), ("1host:x", ""), (":x", ""), ("user_x@host:path", ""),
    ("https://example.com:abc/x", ""),
]


@pytest.mark.parametrize("origin, normalised, repo_id", ORIGINS)
def test_worked_examples_of_repository_ids(origin, normalised, repo_id):
    assert thrum.normalize_origin(origin) == normalised
    assert thrum.repo_id_of(normalised) == repo_id


@pytest.mark.parametrize("origin, normalised", OTHER_ORIGINS, ids=[origin for origin, _ in OTHER_ORIGINS])
def test_other_origins(origin, normalised):
    assert thrum.normalize_origin(origin) == normalised


@pytest.mark.parametrize("repo_id, role, module, agent_id", [
    ("r_DR3Z0XEPBMS3", "implementer", "auth", "implementer_4fmw1ewxgy"),
    ("widgets", "implementer", "auth", "implementer_hpxw6md548"),
    ("widgets", "coordinator", "all", "coordinator_7ske7n5zz4"),
])
def test_worked_examples_of_agent_ids(repo_id, role, module, agent_id):
    assert thrum.unnamed_agent_id(repo_id, role, module) == agent_id


def test_worked_examples_of_users_and_daemons():
    assert thrum.file_stem("user:dana") == "user_dana"
    assert "d_" + thrum.hash32("build-box")[:12].lower() == "d_hbm4mexrttv5"


@pytest.mark.parametrize("name, user", [
    ("Dana", "dana"), ("Dana Q. Smith", "dana-q-smith"), ("a_b-c d", "a-b-c-d"), ("", "user"), ("!!!", "user"), ("--x--", "x"),
    ("x" * 40, "x" * 32), ("Ünal", "unal"), ("é" * 40, "e" * 32), ("a" * 31 + "é", "a" * 31 + "e"),
    ("  ", "user"), ("漢字", "user"),       # what user.register accepts: it takes ASCII only
])
def test_user_names_from_git(name, user):
    assert thrum.user_name_from_git(name) == user
    assert len(user.encode()) <= 32


def test_the_repository_id_from_git(repo):
    """Of the origin; without one, of the root commit, the same in a clone; without a commit, none."""
    git = thrum.Git(str(repo.path))
    root = repo.git("rev-list", "--max-parents=0", "HEAD").strip()
    assert thrum.read_repo_id(git) == thrum.repo_id_of(root)
    repo.git("commit", "-q", "--allow-empty", "-m", "second")
    assert thrum.read_repo_id(git) == thrum.repo_id_of(root)
    repo.git("remote", "add", "origin", "git@github.com:acme/widgets.git")
    assert thrum.read_repo_id(git) == "r_DR3Z0XEPBMS3"


def test_no_commit_no_repository_id(make_repo):
    assert thrum.read_repo_id(thrum.Git(str(make_repo(commit=False).path))) == ""


# ---- identity files

REFERENCE = (   # the file of spec/storage.md, section 4.5
    b'{"version":3,"repo_id":"r_DR3Z0XEPBMS3","agent":{"Kind":"agent","Name":"otter","Role":"implementer","Module":"parser",'
    b'"Display":"Implementer (parser)"},"worktree":"widgets","branch":"feature/lexer","intent":"Finish lexer",'
    b'"session_id":"ses_01KKBGFATGX2Y1CF42XVGRECS8","context_file":"context/otter.md","updated_at":"2026-03-10T09:16:00.2Z"}')
OTTER = ("otter", "implementer", "parser", "Implementer (parser)", "agent")


def fields(identity):
    return identity.name, identity.role, identity.module, identity.display, identity.kind


@pytest.mark.parametrize("spelling", [str.capitalize, str.lower, str.upper])
def test_both_spellings_are_read(spelling):
    data = json.loads(REFERENCE)
    data["agent"] = {spelling(key): value for key, value in data["agent"].items()}
    identity = thrum.parse_identity("otter.json", json.dumps(data).encode())
    assert fields(identity) == OTTER
    assert identity.agent_id() == "otter"


def test_an_unnamed_agent_has_the_id_of_its_role():
    data = {"repo_id": "r_DR3Z0XEPBMS3", "agent": {"role": "implementer", "module": "auth"}}
    identity = thrum.parse_identity("implementer_auth.json", json.dumps(data).encode())
    assert (identity.agent_id(), identity.kind) == ("implementer_4fmw1ewxgy", "agent")


def test_a_file_is_written_as_the_reference_does_and_keeps_what_is_not_known():
    data = json.loads(REFERENCE)
    data.update(listener={"agent_id": "otter", "heartbeat": [1, None]}, confirmed_by="x")
    data["agent"]["Extra"] = {"a": 1}
    identity = thrum.parse_identity("otter.json", json.dumps(data).encode())
    stamp = "2026-03-10T10:00:00.000000001Z"
    written = thrum.render_identity(identity, stamp, intent="New ü", branch=None)
    again = json.loads(written)
    expected = {**data, "updated_at": stamp, "intent": "New ü"}
    del expected["branch"]
    assert again == expected
    assert written.startswith(b'{\n  "') and written.endswith(b"}\n") and "New ü".encode() in written
    assert fields(thrum.parse_identity("otter.json", written)) == OTTER


@pytest.mark.parametrize("version, after", [(None, 3), (1, 3), (3, 3), (7, 7), ("x", 3)])
def test_the_version_only_rises(version, after):
    data = {"version": version, "agent": {"name": "ada", "role": "r", "module": "m"}}
    identity = thrum.parse_identity("ada.json", json.dumps(data).encode())
    again = json.loads(thrum.render_identity(identity, "s"))
    assert again["version"] == after
    assert set(again["agent"]) == {"Kind", "Name", "Role", "Module", "Display"}, "one spelling, not two"


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"\xff", b"{}", b'{"agent":5}', b'{"agent":{"Name":5}}', b'{"agent":{"Name":"../x"}}', b'{"agent":{"Name":"a/b"}}',
    b'{"agent":{"Name":"a\\u001b[31m"}}', b'{"agent":{"Role":["x"]}}', b'{"agent":{"Role":"a\\nb"}}', b'{"agent":{},"repo_id":5}',
    b'{"agent":{"Name":"a\\u0000"}}', b" " * (thrum.IDENTITY_MAX + 1), b"[" * 50_000,
], ids=lambda content: repr(content[:40]))
def test_a_damaged_file_is_named(content):
    with pytest.raises(thrum.NoIdentity, match="bad.json"):
        thrum.parse_identity("bad.json", content)


# ---- who is calling

def file(name, role="implementer", module="core", worktree="here", updated="2026-03-10T09:00:00Z", **more):
    return f"{name}.json", json.dumps({"agent": {"Name": name, "Role": role, "Module": module}, "worktree": worktree,
                                       "updated_at": updated, **more}).encode()


ADA, BOB = file("ada"), file("bob", "reviewer", "web", updated="2026-03-10T10:00:00Z")
EVE, MAX = file("eve", worktree="there"), file("max", worktree="elsewhere")
BAD = ("bad.json", b"{")
CHAIN = [
    # files, environment, flags (role, module), outcome: (name, role, module) or a part of the error
    ([ADA], {}, (), ("ada", "implementer", "core")),
    ([EVE], {}, (), ("eve", "implementer", "core")),                                        # one file counts wherever it says it is
    ([ADA, EVE], {}, (), ("ada", "implementer", "core")),                                   # of several, the one for this worktree
    ([ADA, BOB, EVE], {}, (), ("bob", "reviewer", "web")),                                  # of several of those, the latest
    ([BOB, ADA], {}, (), ("bob", "reviewer", "web")),
    ([EVE, MAX], {}, (), "cannot auto-select identity.*eve, max"),
    ([ADA, BOB], {"THRUM_NAME": "ada"}, (), ("ada", "implementer", "core")),
    ([ADA, BOB], {"THRUM_NAME": " ada "}, (), ("ada", "implementer", "core")),
    ([ADA], {"THRUM_NAME": ""}, (), ("ada", "implementer", "core")),
    ([ADA], {"THRUM_NAME": "eve"}, (), "THRUM_NAME is 'eve'"),                              # no falling back
    ([ADA], {"THRUM_NAME": "../ada"}, (), "THRUM_NAME"),
    ([ADA, BAD], {"THRUM_NAME": "ada"}, (), ("ada", "implementer", "core")),                # another file's damage is not ours
    ([ADA, BAD], {}, (), "bad.json is damaged"),
    ([BAD], {"THRUM_NAME": "bad"}, (), "bad.json is damaged"),
    ([ADA], {"THRUM_ROLE": "planner"}, (), ("ada", "planner", "core")),
    ([ADA], {"THRUM_MODULE": "docs"}, (), ("ada", "implementer", "docs")),
    ([ADA], {"THRUM_ROLE": "planner"}, ("tester", "qa"), ("ada", "tester", "qa")),          # flag > environment > file
    ([ADA], {"THRUM_ROLE": "", "THRUM_MODULE": ""}, ("", ""), ("ada", "implementer", "core")),
    ([], {}, (), "no agent identities registered"),
    ([], {"THRUM_ROLE": "planner"}, (), "module not specified"),
    ([], {"THRUM_MODULE": "core"}, (), "role not specified"),
    ([], {"THRUM_ROLE": "planner", "THRUM_MODULE": "core"}, (), ("", "planner", "core")),
    ([], {}, ("planner", "core"), ("", "planner", "core")),
    ([file("ada", role="")], {}, (), "role not specified"),
    ([], {"THRUM_AGENT_ID": "eve"}, (), ("eve", "", "")),                                   # taken as it is
    ([ADA, BAD], {"THRUM_AGENT_ID": "user:dana", "THRUM_NAME": "nobody"}, (), ("user:dana", "", "")),
    ([ADA], {"THRUM_AGENT_ID": "agent:planner:AB12", "THRUM_ROLE": "r"}, (), ("agent:planner:AB12", "r", "")),
    ([ADA], {"THRUM_AGENT_ID": "  "}, (), ("ada", "implementer", "core")),
    ([ADA], {"THRUM_AGENT_ID": "../x"}, (), "THRUM_AGENT_ID"),
    ([ADA], {"THRUM_AGENT_ID": "a\nb"}, (), "THRUM_AGENT_ID"),
]


@pytest.mark.parametrize("files, environ, flags, outcome", CHAIN, ids=range(len(CHAIN)))
def test_resolution_chain(files, environ, flags, outcome):
    if isinstance(outcome, str):
        with pytest.raises(thrum.ThrumError, match=outcome):
            thrum.resolve_caller(files, environ, "here", *flags)
    else:
        identity = thrum.resolve_caller(files, environ, "here", *flags)
        assert (identity.name, identity.role, identity.module) == outcome


def test_display_and_data_of_the_file_go_along():
    identity = thrum.resolve_caller([("otter.json", REFERENCE)], {"THRUM_DISPLAY": "Otto"}, "widgets")
    assert (identity.display, identity.file, identity.data["intent"]) == ("Otto", "otter.json", "Finish lexer")


def test_identity_files_are_read_from_the_worktree(tmp_path):
    """Only `*.json`, in order, and no more than there can be sensibly."""
    folder = tmp_path / "identities"
    assert thrum.read_identities(str(tmp_path)) == []
    folder.mkdir()
    for name, content in (("b.json", b"2"), ("a.json", b"1"), (".a.json.9.tmp", b"x"), (".hidden.json", b"x"), ("notes.txt", b"x")):
        (folder / name).write_bytes(content)
    assert thrum.read_identities(str(tmp_path)) == [("a.json", b"1"), ("b.json", b"2")]
    for number in range(thrum.IDENTITIES_MAX + 5):
        (folder / f"x{number}.json").write_bytes(b"x")
    assert len(thrum.read_identities(str(tmp_path))) == thrum.IDENTITIES_MAX
