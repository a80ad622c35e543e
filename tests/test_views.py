"""What agents look at: prime, overview, status, ping, agent list, agent context, heartbeat, and the methods behind them."""

import json
import re
import shlex
import shutil
import subprocess

import pytest

import thrum
from conftest import CLEAN
from shapes import shaped
from team import Team, error_line, one_document, raw_in, script
from test_methods import Team as Core
from test_screen import run

pytestmark = pytest.mark.slow

AWAY = {"THRUM_SOCKET": "/nowhere/thrum.sock"}


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    """@ada (planner), @bob (implementer) and @tess (tester), each in a worktree of its own."""
    made = Team(tmp_path_factory.mktemp("views") / "three – agents")
    made.tess = made.ada.worktree("tess")
    made.tess.join("tess", "tester", "e2e")
    yield made
    made.close()


@pytest.fixture
def nobody(team):
    """A worktree that is set up, with nobody in it."""
    repo = team.ada.worktree("nobody")
    script(repo, "setup", check=0)
    yield repo
    team.ada.git("worktree", "remove", "--force", str(repo.path))
    team.ada.git("branch", "-D", "nobody")


# ---------------------------------------------------------------- shapes (contract, section 2)

HEALTH = {"status": ("ok",), "uptime_ms": int, "version": str, "repo_id": str, "sync_state": str}
WHOAMI = {"agent_id": str, "role": str, "module": str, "display": str, "source": str, "session_id?": str, "session_start?": str,
          "branch?": str, "intent?": str}
AGENT = {"agent_id": str, "kind": str, "role": str, "module": str, "display": str, "registered_at": str, "last_seen_at?": str}
COMMIT = {"sha": str, "message": str, "files?": [str]}
CHANGE = {"path": str, "last_modified": str, "additions": int, "deletions": int, "status": ("modified", "added", "deleted", "renamed")}
WORK = {"session_id": str, "agent_id": str, "branch?": str, "worktree_path?": str, "unmerged_commits?": [COMMIT],
        "uncommitted_files?": [str], "changed_files?": [str], "file_changes?": [CHANGE], "git_updated_at?": str, "current_task?": str,
        "task_updated_at?": str, "intent?": str, "intent_updated_at?": str}
CONTEXTS = {"contexts": [WORK]}
BODY = {"format": str, "content": str, "structured?": str}
LISTED = {"message_id": str, "thread_id?": str, "reply_to?": str, "agent_id": str, "body": BODY, "created_at": str, "updated_at?": str,
          "deleted": bool, "is_read": bool}
INBOX = {"total": int, "unread": int}
LIST = {"agents": {"agents": [AGENT]}, "contexts": CONTEXTS}
SAVED = {"has_context": (True,), "size?": int, "updated_at?": str}
SHAPES = {
    "prime": {"identity": WHOAMI, "session": {"session_id": str, "started_at?": str, "intent?": str},
              "agents": {"total": int, "active": int, "list": [AGENT]}, "messages": {**INBOX, "recent?": [LISTED]},
              "work_context": {"branch?": str, "uncommitted_files?": [str], "unmerged_commits": int, "error?": str},
              "sync_state": {"daemon_status": str, "uptime_ms?": int, "sync_state?": str, "version?": str}, "repo_path": str,
              "context?": SAVED},
    "overview": {"health": HEALTH, "agent": WHOAMI, "work_context?": WORK, "team?": [WORK], "inbox": INBOX, "websocket_port": int},
    "status": {"health": HEALTH, "agent": WHOAMI, "work_context?": WORK, "context?": SAVED, "inbox": INBOX, "websocket_port": int},
    "ping @ada": LIST, "ping nobody": LIST, "agent list": LIST, "agent list --context": CONTEXTS,
    "agent context": CONTEXTS, "agent context @ada": CONTEXTS, "agent context --branch nope": CONTEXTS,
    "session heartbeat": {"session_id": str, "last_seen_at": str, "branch?": str, "unmerged_commits?": int, "file_changes?": [CHANGE]},
}
SHAPES["context prime"] = SHAPES["prime"]


@pytest.mark.parametrize("words", SHAPES)
def test_json_has_the_shape_of_the_contract(team, words):
    team.mail()
    team.bob.ok("context", "save", input="notes")
    value = one_document(team.bob.ok(*words.split(), "--json", "--quiet"))
    shaped(value, SHAPES[words])
    assert set(value) <= {key.rstrip("?") for key in SHAPES[words]}
    assert team.bob.ok(*words.split(), "--quiet"), "--quiet takes nothing from who asked (contract 1.9)"
    team.bob.ok("context", "clear")


# ---------------------------------------------------------------- prime

def test_prime_tells_everything(team):
    """Who, session, team, mail, saved context, branch and files; it marks nothing as read."""
    team.clear()
    bob = team.bob
    try:
        bob.ok("session", "set-task", "thrum-7")
        bob.ok("context", "save", input="where I was")
        (bob.path / "new file.txt").write_text("x")
        for n in range(7):
            team.mail(f"mail {n}\nwith a second line that is longer than what one line of a list can hold, by far")
        text = bob.ok("prime")
        session = bob.json("status")["agent"]["session_id"]
        for line in ("Agent: @bob (implementer)", "Module: core", f"Session: {session} (just now)", "Task: thrum-7",
                     "Team: 3 agents (3 active)", "Branch: bob", "Uncommitted files: 1", "  new file.txt", "Commands:"):
            assert f"{line}\n" in text, line
        assert re.search(r"Saved context: 11 bytes \(just now\); read it now: \.thrum/bin/thrum context show\n", text)
        assert re.search(r"^Intent: Implement features and fixes in bob$", text, re.M)
        assert re.search(r"^  ● @tess +tester +e2e +Test and validate", text, re.M) and "● @bob" not in text
        assert re.search(r"^Inbox: 7 unread \(\d+ total\) — read them: \.thrum/bin/thrum inbox$", text, re.M), "contract, 77"
        assert re.findall(r"^  @ada: (mail \d) with .*…  \[msg_\w{26}\]$", text, re.M) == ["mail 6", "mail 5", "mail 4", "mail 3", "mail 2"]
        assert re.search(r"^Daemon: ok \(v[\d.]+\), up \d+", text, re.M) and "\nSync: " in text
        assert text.count("\n") < 60 and not raw_in(text) and not [line for line in text.splitlines() if len(line) > 110]
        assert bob.ok("context", "prime").count("\n") == text.count("\n")
        found = bob.json("prime")
        assert found["messages"]["unread"] == 7 and len(found["messages"]["recent"]) == 5
        assert found["work_context"] == {"branch": "bob", "uncommitted_files": ["new file.txt"], "uncommitted_total": 1,
                                         "unmerged_commits": 0}
        assert found["repo_path"] == str(bob.path) and found["session"]["session_id"] == session
        assert len(team.unread()) == 7, "a glance is not a reading"
        bob.ok("inbox")
        bob.ok("message", "read", "--all")
        assert re.search(r"^Inbox: \d+ messages \(all read\)\n  @ada: mail 6", bob.ok("prime"), re.M)
    finally:
        (bob.path / "new file.txt").unlink()
        bob.ok("context", "clear")
        bob.ok("session", "set-task", "")


def test_prime_stays_short(team):
    """Twenty agents, thirty changed files, long words everywhere: still less than sixty lines, and it says what it left out."""
    with team.ada.client() as client:
        for n in range(17):
            client.call("agent.register", name=f"extra{n}", role="extra", module="m" * 200, force=True)
        for n in range(17):
            session = client.call("session.start", agent_id=f"extra{n}")["session_id"]
            client.call("session.setIntent", session_id=session, intent="words " * 600)
    folder = team.bob.path / "many"
    folder.mkdir()
    try:
        for n in range(30):
            (folder / f"{n}{'x' * 150}").write_text("")
        team.bob.git("add", "many")
        for _ in range(6):
            team.mail("w" * 5_000)
        text = team.bob.ok("prime", env={"COLUMNS": "80"})
        assert text.count("\n") < 60 and "Team: 20 agents (20 active)" in text and "  … and 9 more" in text
        assert "Uncommitted files: 30\n" in text and "  … and 22 more\n" in text
        assert max(map(len, text.splitlines())) <= 111
    finally:
        team.bob.git("rm", "-rqf", "--cached", "many")
        shutil.rmtree(folder)
        with team.ada.client() as client:
            for session in client.call("session.list", active_only=True)["sessions"]:
                if session["agent_id"].startswith("extra"):
                    client.call("session.end", session_id=session["session_id"])


def test_the_commands_that_prime_names_exist(team):
    lines = team.bob.ok("prime").partition("Commands:\n")[2].splitlines()
    assert len(lines) == 12
    for line in lines:
        words = shlex.split(re.split(r"  +", line.strip())[0].replace("…", "x").replace("<cmd>", "send"))
        assert words[0] == ".thrum/bin/thrum"
        name, rest = thrum.split_command(words[1:], thrum.COMMANDS)
        thrum.parse_command(thrum.COMMANDS[name], rest)


def test_prime_from_elsewhere_names_the_launcher_by_its_path(team):
    (team.bob.path / "sub dir").mkdir(exist_ok=True)
    text = team.bob.ok("prime", cwd=team.bob.path / "sub dir")
    assert f"  '{team.bob.launcher}' status" in text, "in quotes, as a shell takes it"
    (team.bob.path / "sub dir").rmdir()


def test_prime_without_a_daemon_ends_well(team, tmp_path):
    """A hook that calls it at each start of an agent must not fail: exit 0, what to do, and why; JSON stays JSON (extras E4)."""
    plain = tmp_path / "plain"
    plain.mkdir()
    subprocess.run(["git", "init", "-q", str(plain)], check=True, env=CLEAN)
    for runner, reason in ((lambda *a: team.bob.run(*a, env=AWAY), "failed to connect to daemon at /nowhere"),
                           (lambda *a: script(team.bob, *a, cwd=plain), "thrum is not initialized in")):
        for words in (["prime"], ["context", "prime"], ["prime", "--quiet"]):
            done = runner(*words)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.startswith("Thrum not initialized (run: thrum init && thrum daemon start)\n  " + reason[:20])
            for command in (" init", " daemon start", " quickstart --name NAME --role ROLE --module MODULE"):
                assert re.search(rf"^  \S.*{command}  ", done.stdout, re.M), command
        value = one_document(runner("prime", "--json").stdout)
        assert reason in value["error"] and value["sync_state"] == {"daemon_status": "unreachable"}
    assert error_line(team.bob.run("prime", "--nope", env=AWAY)) == "unknown flag: --nope"
    assert not (plain / ".thrum").exists()


def test_without_an_identity(team, nobody):
    """Nobody has registered here: the views say so and show the rest; an identity that cannot be used is an error."""
    for words, said in (("prime", "Agent: not registered\n  Register: "), ("overview", "Not registered (use 'thrum quickstart'"),
                        ("status", "Agent:     not registered (use 'thrum quickstart')")):
        assert nobody.ok(*words.split()).startswith(said), words
        value = nobody.json(*words.split())
        assert not {"identity", "agent", "session", "inbox", "messages"} & set(value), value.keys()
    text = nobody.ok("prime")
    assert "@ada" in text and "Branch: nobody" in text and "Commands:" in text
    for words in ("ping @ada", "agent list", "agent context"):
        assert nobody.ok(*words.split())
    for words in ("prime", "overview", "status"):
        assert "THRUM_NAME is 'ghost'" in error_line(team.bob.run(words, env={"THRUM_NAME": "ghost"}))
    for words in ("prime", "overview", "status"):
        assert "egistered" in nobody.ok(words, env={"THRUM_AGENT_ID": "stranger"}), "an id that nobody has registered"


def test_prime_where_git_fails(team):
    """What git cannot tell is named, and costs nothing else."""
    head = team.ada.path / ".git/worktrees/tess/HEAD"
    before = head.read_bytes()
    try:
        head.write_bytes(b"damaged\n")
        done = team.tess.run("prime", check=0)
        assert re.search(r"^Git: git status failed: ", done.stdout, re.M) and "Commands:" in done.stdout
        assert team.tess.json("prime")["work_context"]["unmerged_commits"] == 0
    finally:
        head.write_bytes(before)


# ---------------------------------------------------------------- worktree.status

def test_worktree_status(team, tmp_path):
    """Changed, staged, renamed, conflicting, untracked and odd names; commits that the main branch lacks; a detached head."""
    tess = team.tess

    def state():
        with team.ada.client() as client:
            return client.call("worktree.status", repo_path=str(tess.path))

    try:
        assert state() == {"branch": "tess", "uncommitted_files": [], "uncommitted_total": 0, "unmerged_commits": 0}
        for name in ("a b.txt", "old.txt", "gone.txt"):
            (tess.path / name).write_text(name * 20)
        tess.git("add", ".")
        tess.git("commit", "-qm", "second")
        assert state()["unmerged_commits"] == 1 and not state()["uncommitted_files"]
        (tess.path / "a b.txt").write_text("changed")
        tess.git("mv", "old.txt", "new ü.txt")
        tess.git("rm", "-q", "gone.txt")
        (tess.path / "un\x1btracked").write_text("")
        (tess.path / "folder").mkdir()
        (tess.path / "folder" / "x").write_text("")
        assert sorted(state()["uncommitted_files"]) == ["a b.txt", "folder/x", "gone.txt", "new ü.txt", "un\x1btracked"]
        tess.git("checkout", "-q", "-f", "--detach")
        assert state()["branch"] == "(detached)" and state()["unmerged_commits"] == 1
        tess.git("update-ref", "refs/remotes/origin/main", "HEAD")
        assert state()["unmerged_commits"] == 0, "the remote's main branch counts before the local one"
        for n in range(thrum.WORK_FILES):
            (tess.path / f"{n}.txt").write_text("")
        assert len(state()["uncommitted_files"]) == thrum.WORK_FILES < state()["uncommitted_total"]
    finally:
        tess.git("clean", "-qfdx", "-e", ".thrum")
        tess.git("checkout", "-q", "-f", "tess")
        tess.git("reset", "-q", "--hard", "main")
        tess.git("update-ref", "-d", "refs/remotes/origin/main")


def test_the_worktrees_of_a_repository(team, tmp_path):
    """As git lists them, those with relative links too; what is half removed or gone counts for nothing."""
    listed = re.findall(r"^worktree (.+)$", team.ada.git("worktree", "list", "--porcelain"), re.M)
    found = thrum.worktrees_of(str(team.ada.path / ".git"))
    assert found[0] == str(team.ada.path)
    assert sorted(found) == sorted(path for path in listed if "/.git/" not in path), "without the one of the branch a-sync"
    fake = tmp_path / "main" / ".git"
    (fake / "worktrees" / "half").mkdir(parents=True)
    for name, link in (("relative", "../../../../other/.git\n"), ("gone", f"{tmp_path}/gone/.git\n")):
        (fake / "worktrees" / name).mkdir()
        (fake / "worktrees" / name / "gitdir").write_text(link)
    (tmp_path / "other").mkdir()
    assert thrum.worktrees_of(str(fake)) == [str(tmp_path / "main")], "what has taken its place is no worktree"
    (fake / "worktrees" / "relative" / "commondir").write_text("../..\n")
    (tmp_path / "other" / ".git").write_text("gitdir: ../main/.git/worktrees/relative\n")
    assert thrum.worktrees_of(str(fake)) == [str(tmp_path / "main"), str(tmp_path / "other")]
    assert thrum.worktrees_of(str(tmp_path / "bare.git")) == []


# ---------------------------------------------------------------- overview, status, ping

def test_overview_and_status(team):
    """Oneself, the others, the inbox: assertions 11, 27, 28, 30, 54, 57 to 60 of the contract."""
    team.clear()
    bob, tess = team.bob, team.tess
    tess.ok("session", "set-intent", "Test and validate")
    team.mail("for you")
    text = bob.ok("overview")
    assert text.startswith("Agent ID:  bob\nRole:      @implementer\n") and re.search(r"\nInbox: 1 unread \(\d+ total\)\nSync: ", text)
    assert re.search(r"\nTeam:\n(  ● @.*\n)*  ● @tess .*Test and validate", text) and "● @bob" not in text
    assert {work["agent_id"] for work in bob.json("overview")["team"]} == {"ada", "tess"}
    assert "coordinator" not in bob.ok("status") and "implementer" in bob.ok("status"), "contract, 11"
    assert re.search("(?i)intent", bob.ok("agent", "set-intent", "Working on authentication module"))
    assert re.search("task", bob.ok("agent", "set-task", "thrum-test").lower())
    text = bob.ok("status")
    assert "authentication" in text and "Task:      thrum-test\n" in text and "agent" in text.lower() and "daemon" in text.lower()
    found = bob.json("status")
    assert found["health"]["status"] == "ok" and found["agent"]["role"] == "implementer"
    assert found["work_context"]["current_task"] == "thrum-test" and found["work_context"]["task_updated_at"]
    assert "context" not in found and "Context:" not in text
    bob.ok("context", "save", input="12345")
    try:
        assert "Context:   5 bytes (updated just now)\n" in bob.ok("status")
        shaped(bob.json("status")["context"], {"has_context": (True,), "size": (5,), "updated_at": str})
    finally:
        bob.ok("context", "clear")
        bob.ok("agent", "set-task", "")
    assert "session" in tess.ok("session", "start").lower() and "Session:" in tess.ok("status")
    tess.ok("session", "end")
    assert re.search("(?i)no.*session|inactive|ended|stopped", tess.ok("status"))
    assert "work_context" not in tess.json("status") and "@tess" not in team.bob.ok("overview")
    tess.ok("session", "start")
    assert "session" in tess.ok("session", "list").lower(), "contract, 30"


def test_alone(make_repo):
    """The only agent of a repository, and one whose session has ended."""
    repo = make_repo()
    out = repo.ok("quickstart", "--name", "ada", "--role", "coordinator", "--module", "core", "--display", "Ada L.", "--intent", "lead")
    assert re.search("Registered as @ada", out) and "Session started" in out and "Display:   Ada L." in repo.ok("status"), "contract, 24"
    assert "Team: nobody else is active\n" in repo.ok("overview") and "Inbox: empty\n" in repo.ok("overview")
    text = repo.ok("prime")
    assert "Team: 1 agents (1 active)\n" in text and "Inbox: empty\n" in text
    assert "coordinator" in repo.ok("status"), "contract, 11"
    assert repo.ok("agent", "list", "--context").count("\n") == 2
    repo.ok("session", "end")
    assert repo.ok("agent", "list", "--context") == repo.ok("agent", "context") == "No active work contexts found.\n"


def test_ping(team):
    """By name, by display name and by role: contract, 51 and 82; nobody is no failure."""
    bob, tess = team.bob, team.tess
    bob.ok("session", "set-intent", "think")
    bob.ok("session", "set-task", "t-1")
    tess.ok("session", "set-intent", "test")
    assert bob.ok("ping", "@bob") == bob.ok("ping", "bob") == \
        "@bob: active, last heartbeat just now\n  Intent: think\n  Task:   t-1\n  Branch: bob\n"
    assert bob.ok("ping", "@tester").startswith("@tester: active, last heartbeat just now (@tess)\n  Intent: ")
    assert bob.ok("ping", "Tester (e2e)").startswith("@Tester (e2e): active, last heartbeat just now (@tess)\n")
    tess.ok("session", "end")
    try:
        assert bob.ok("ping", "@tess") == "@tess: offline (last seen just now)\n"
        bob.ok("agent", "register", "--name", "tim", "--role", "tester", "--module", "web", "--force")
        with bob.client() as client:
            client.call("session.start", agent_id="tim")
        lines = bob.ok("ping", "@tester").splitlines()
        assert lines == ["@tester: active, last heartbeat just now (@tim)", "@tester: offline (last seen just now) (@tess)"]
        with bob.client() as client:
            client.call("session.end", session_id=client.call("agent.whoami", caller_agent_id="tim")["session_id"])
    finally:
        tess.ok("session", "start")
        (bob.path / ".thrum/identities/tim.json").unlink()
    for ghost in ("@ghost", "ghost", "@", "", "a\x1b[2J"):
        text = bob.ok("ping", ghost)
        assert text.endswith(": not found (no agent registered with this name or role)\n") and not raw_in(text)
    assert error_line(bob.run("ping")) == "accepts 1 arg(s), received 0"


# ---------------------------------------------------------------- agent list and agent context

def test_agent_list(team):
    """Filters, who is active, what they do; and --context, which is a table of the active alone."""
    bob = team.bob
    bob.ok("session", "set-intent", "a very long intent " * 10)
    assert re.search("active|online|last.seen", bob.ok("agent", "list")), "contract, 29"
    assert re.search("(?i)heartbeat|ok|updated", bob.ok("agent", "heartbeat")), "contract, 55"
    for words in (["--role", "tester", "--module", "e2e"], ["--module", "e2e"]):
        found = bob.json("agent", "list", *words)
        assert [agent["agent_id"] for agent in found["agents"]["agents"]] == ["tess"], words
        assert bob.ok("agent", "list", *words).startswith("Registered agents (1):\n\n● ")
    assert bob.ok("agent", "list", "--role", "tester", "--module", "nope") == "No agents with that role and module.\n"
    for line in bob.ok("agent", "list", env={"COLUMNS": "80"}).splitlines():
        assert len(line) <= 80 or not line.startswith("    "), line
    team.tess.ok("session", "end")
    try:
        text = bob.ok("agent", "list")
        assert re.search(r"○ @tess .*\(offline\)\n    Last seen: just now\n", text)
        assert re.search(r"● @bob .*\(active\)\n    Intent: .*…\n(    Task: .*\n)?    Branch: bob \(0 commits\)\n"
                         r"    Active: just now\n", text)
        table = bob.ok("agent", "list", "--context", env={"COLUMNS": "80"}).splitlines()
        assert table[0].split() == ["AGENT", "SESSION", "BRANCH", "COMMITS", "FILES", "INTENT", "UPDATED"]
        assert sorted(line.split()[0] for line in table[1:]) == ["@ada", "@bob"]
        assert all(len(line) <= 80 for line in table) and all(line.endswith("just now") for line in table[1:])
    finally:
        team.tess.ok("session", "start")


def test_agent_context(team):
    """One agent by name: everything about it; --agent, a role, a branch, a file: the table (decision 27)."""
    bob = team.bob
    bob.ok("session", "set-intent", "think")
    assert re.fullmatch(rf"Agent: @bob \(ses_\w{{26}}\)\nBranch: bob\nWorktree: {re.escape(str(bob.path))}\n"
                        r"Intent: think \(set just now\)\n(Task: .*\n)?Changed Files \(vs main\): 0\nUncommitted: 0\n",
                        bob.ok("agent", "context", "@bob"))
    assert bob.ok("agent", "context", "tester").startswith("Agent: @tess (ses_"), "a role"
    for words in (["--agent", "tess"], ["--agent", "@tester"]):
        assert bob.ok("agent", "context", *words).startswith("AGENT ")
        assert [work["agent_id"] for work in bob.json("agent", "context", *words)["contexts"]] == ["tess"]
    assert [w["agent_id"] for w in bob.json("agent", "context", "bob", "--agent", "tess")["contexts"]] == ["bob"], "the positional wins"
    assert error_line(bob.run("agent", "context", "ghost")).startswith("no agent or role @ghost; ")
    for words in (["--branch", "nope"], ["--file", "nope.py"], ["bob", "--branch", "nope"]):
        assert bob.ok("agent", "context", *words) == "No active work contexts found.\n"
        assert bob.json("agent", "context", *words) == {"contexts": []}
    for words in (["@"], [""], ["--agent", ""]):
        assert error_line(bob.run("agent", "context", *words)) == "the agent's name is empty"


FACTS = {"branch": "feature", "worktree_path": "/w",
         "unmerged_commits": [{"sha": "0123456789abcdef", "message": "Second", "files": ["a.py"]}],
         "uncommitted_files": ["b%c.py"], "changed_files": ["a.py", "sub/ü \"q\".py"],
         "file_changes": [{"path": "a.py", "last_modified": "2026-03-10T09:00:00Z", "additions": 3, "deletions": 1, "status": "modified"}],
         "git_updated_at": "2026-03-10T09:14:00.000000001Z"}


@pytest.fixture
def core(tmp_path):
    """Three agents on a ledger in this process; git is known of `a`'s session, nonsense of `b`'s."""
    made = Core(tmp_path)
    made.sessions = {"a": made.agent("a", "x"), "b": made.agent("b", "y"), "c": made.agent("c", "y")}

    def facts(agent, **context):
        made.ledger.commit([lambda context_: context_.append("agent.update", agent_id=agent, work_contexts=[
            {"session_id": made.sessions[agent], **context}])])

    facts("a", **FACTS)
    facts("b", branch="feature", git_updated_at="2026-03-10T09:10:00Z", unmerged_commits="{broken", uncommitted_files={"a": 1},
          changed_files=[1, None, "x.py"], file_changes=5)
    yield made
    made.close()


def test_list_context(core):
    """rpc.md 6.5: open sessions only, newest git facts first; filters are exact and combine; no character is a wildcard."""
    def found(**filters):
        return [work["agent_id"] for work in core.call("agent.listContext", **filters)["contexts"]]
    contexts = core.call("agent.listContext")
    shaped(contexts, CONTEXTS)
    assert contexts["contexts"][0] == {"session_id": core.sessions["a"], "agent_id": "a", **FACTS}
    assert contexts["contexts"][1] == {"session_id": core.sessions["b"], "agent_id": "b", "branch": "feature", "changed_files": ["x.py"],
                                       "git_updated_at": "2026-03-10T09:10:00.000000000Z"}, "what is no list of the kind is left out"
    assert contexts["contexts"][2] == {"session_id": core.sessions["c"], "agent_id": "c"}, "a session of which nothing is known"
    assert (found(agent_id="a"), found(agent_id="A"), found(agent_id="x")) == (["a"], [], [])
    assert (sorted(found(role="y")), found(role="x")) == (["b", "c"], ["a"])
    assert (found(branch="feature"), found(branch="feat"), found(branch="feature", role="y")) == (["a", "b"], [], ["b"])
    for path in ("a.py", "b%c.py", "sub/ü \"q\".py"):
        assert found(file=path) == ["a"], path
    for path in ("a", ".py", "b_c.py", "%", "A.py", "sub/", '"', "a.py\",\"sub"):
        assert found(file=path) == [], path
    core.call("session.end", session_id=core.sessions["a"])
    assert found() == ["b", "c"]


def test_heartbeat_with_what_git_says(core):
    done = core.call("session.heartbeat", session_id=core.sessions["a"])
    assert done == {"session_id": core.sessions["a"], "last_seen_at": done["last_seen_at"], "branch": "feature", "unmerged_commits": 1,
                    "file_changes": FACTS["file_changes"]}
    assert set(core.call("session.heartbeat", session_id=core.sessions["c"])) == {"session_id", "last_seen_at"}


def test_the_forms_of_what_git_says():
    """The tokens of the contract where git's facts are known: context, list, overview, status and heartbeat."""
    work = {"session_id": "ses_1", "agent_id": "ada", **FACTS, "intent": "think", "intent_updated_at": "2026-03-10T09:00:00Z"}
    who = {"agent_id": "ada", "role": "planner", "module": "core", "display": "", "source": "caller"}
    replies = {
        "health": {"status": "ok", "uptime_ms": 5, "version": "1", "sync_state": "ok", "agents": 1, "messages": 1, "bad_lines": 0},
        "agent.whoami": {**who, "session_id": "ses_1", "session_start": "2026-03-10T09:00:00Z"},
        "agent.listContext": {"contexts": [work]}, "team.list": {"members": []}, "claim.list": {"claims": []},
        "message.list": {"total": 3, "unread": 0, "messages": []},
        "agent.list": {"agents": [{**who, "kind": "agent", "registered_at": "2026-03-10T09:00:00Z"}]},
        "session.heartbeat": {"session_id": "ses_1", "last_seen_at": "2026-03-10T09:00:00Z", "branch": "feature", "unmerged_commits": 1,
                              "file_changes": FACTS["file_changes"]}}

    def shown(words):
        status, out, err = run(words.split(), replies=replies)
        assert (status, err) == (0, ""), err
        return out
    text = shown("agent context ada")
    for line in ("Agent: @ada (ses_1)", "Branch: feature", "Worktree: /w", "Unmerged Commits (1):", "  0123456 Second [a.py]",
                 "Changed Files (vs main): 2", "Uncommitted: 1"):
        assert f"{line}\n" in text, line
    assert re.search(r"^@ada +ses_1\.\.\. +feature +1 +3 +think +\d+d ago$", shown("agent context"), re.M)
    assert "    Branch: feature (1 commits)\n" in shown("agent list")
    assert "Branch info: 1 commits, 3 files\n" in shown("overview") and "Inbox: 3 messages (all read)\n" in shown("overview")
    assert "Commits:   1 ahead\nFiles:     2 changed, 1 uncommitted\n" in shown("status")
    assert shown("session heartbeat") == "✓ Heartbeat sent: ses_1\n  Context: branch: feature, 1 commits, 1 files\n"
    assert json.loads(run(["session", "heartbeat", "--json"], replies=replies)[1])["file_changes"] == FACTS["file_changes"]
    assert "  Branch: feature\n" in shown("ping ada")
