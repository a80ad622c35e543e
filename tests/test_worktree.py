"""`worktree create`, `list` and `remove`: a folder, a branch and an identity in one step, and nothing lost when it goes."""

import json
import os
import shlex
import shutil
import signal
import time

import pytest

import thrum
from conftest import Repo
from team import RAW, confined, error_line, finish, start
from test_init import changed, snapshot

pytestmark = pytest.mark.slow


class Place:
    """A repository with @ada in it, whose folder is called as somebody likes."""

    def __init__(self, make, name="my repö", **more):
        self.repo = make(name, **more)
        self.repo.git("config", "user.name", "Test")
        self.repo.git("config", "user.email", "test@localhost")
        self.repo.join("ada", "planner")
        self.folder = self.repo.path.parent

    def path(self, name):
        return self.folder / f"{self.repo.path.name}-{name}"

    def at(self, name):
        return Repo(self.path(name), self.repo)

    def create(self, name, *more, **how):
        """A worktree made by the command."""
        self.repo.ok("worktree", "create", name, *more, **how)
        return self.at(name)

    def refused(self, *words, **how):
        """What a command says that is refused; it leaves no trace."""
        before, seq = self.trace()
        text = error_line((how.pop("by", None) or self.repo).run("worktree", *words, **how))
        after, now = self.trace()
        assert not changed(before, after) and seq == now, words
        return text

    def trace(self):
        own = {str(path): path.lstat().st_mode for path in self.folder.rglob("*") if ".git" not in path.parts and "var" not in path.parts}
        seq = None
        if (self.repo.var / "thrum.sock").exists():
            with self.repo.client() as client:
                seq = client.call("health")["last_seq"]
        # what the daemon writes from time to time is not the command's
        git = {path: content for path, content in snapshot(self.repo.path / ".git").items()
               if not any(part in path for part in ("a-sync", "/thrum-sync", "/objects/"))}
        return {**own, **git}, seq

    def listed(self, by=None, **how):
        """`worktree list` by the name of the folder."""
        found = (by or self.repo).json("worktree", "list", **how)
        return {item["name"].replace(self.repo.path.name, "R"): item for item in found["worktrees"]}

    def sessions(self, agent):
        return self.repo.json("session", "list", "--agent", agent)["sessions"]


def commit(repo, file="work.txt", text="x"):
    (repo.path / file).write_text(text)
    repo.git("add", "-A")
    repo.git("commit", "-q", "-m", f"change {file}")


@pytest.fixture
def place(make_repo):
    return Place(make_repo)


# ---------------------------------------------------------------- create

def test_create_with_an_agent(place):
    """The folder beside the main one, a branch from HEAD, connected, an identity and a registration, no session; what is printed works."""
    out = place.repo.ok("worktree", "create", "login", "--agent", "@bob", "--role", "tester", "--module", "ui")
    bob = place.at("login")
    head = place.repo.git("rev-parse", "HEAD")[:7]
    assert out.startswith(f"✓ Worktree created: {bob.path}\n  Branch: login (new, from main at {head})\n"
                          "  Agent:  @bob (tester, ui), registered\n")
    assert bob.git("symbolic-ref", "HEAD").strip() == "refs/heads/login" and not bob.git("status", "--porcelain")
    assert (bob.path / ".thrum/redirect").read_text().strip() == f"{place.repo.path}/.thrum"
    identity = json.loads((bob.path / ".thrum/identities/bob.json").read_text())
    assert identity["worktree"] == bob.path.name and identity["agent"]["Role"] == "tester" and identity["agent"]["Module"] == "ui"
    assert (bob.path / ".thrum/context/bob_preamble.md").read_text().startswith("## Your Role: tester")
    assert place.sessions("bob") == [] and "@bob" in place.repo.ok("agent", "list")
    begin = out.split("To begin there:\n")[1]
    done = place.repo.run(command=["sh", "-c", begin], cwd="/", check=0)
    assert "✓ Session started" in done.stdout and bob.json("whoami")["agent_id"] == "bob"
    place.repo.ok("send", "hello", "--to", "@bob")
    assert "hello" in bob.ok("inbox")


def test_create_without_an_agent_needs_no_daemon(place):
    place.repo.ok("daemon", "stop")
    reply = place.repo.json("worktree", "create", "docs")
    other = place.at("docs")
    assert reply == {"name": other.path.name, "path": str(other.path), "main": str(place.repo.path), "branch": "docs",
                     "branch_created": True, "base": "main", "commit": place.repo.git("rev-parse", "HEAD").strip()}
    assert other.launcher.exists() and not (place.repo.var / "thrum.sock").exists()
    assert place.repo.run("worktree", "create", "quiet", "--quiet", check=0).stdout == ""


def test_create_starts_the_daemon_for_an_agent(place):
    place.repo.kill()
    place.create("one", "--agent", "bob")
    place.repo.ok("daemon", "stop")
    text = place.refused("create", "two", "--agent", "cleo")
    assert "it was stopped; 'thrum daemon start' starts it again" in text and not place.path("two").exists()


def test_create_from_an_existing_branch_and_from_a_base(place):
    place.repo.git("branch", "old")
    commit(place.repo)
    place.repo.git("tag", "v1")
    commit(place.repo, "more.txt")
    reply = place.repo.json("worktree", "create", "a", "--branch", "old")
    assert reply["branch_created"] is False and "base" not in reply and place.at("a").git("branch", "--show-current") == "old\n"
    reply = place.repo.json("worktree", "create", "b", "--base", "v1", "--branch", "feature/löwe")
    assert (reply["base"], reply["branch"]) == ("v1", "feature/löwe") and not (place.path("b") / "more.txt").exists()
    place.repo.git("branch", "free")
    assert "there is a branch free already" in place.refused("create", "c", "--branch", "free", "--base", "v1")
    # HEAD is that of the worktree in which the command is called
    out = place.at("b").ok("worktree", "create", "d")
    assert "(new, from feature/löwe at" in out and place.path("d").is_dir() and not (place.path("d") / "more.txt").exists()
    place.at("d").git("checkout", "-q", "--detach")
    assert "(new, from detached at" in place.at("d").ok("worktree", "create", "e")


def test_bad_names(place):
    for name in ("-x", ".x", "a b", "a/b", "ö", "", "x" * 65, "..", "a\nb"):
        text = place.refused("create", "--", name)
        assert text.startswith("worktree name ") and "letters, digits" in text, name


def test_create_refuses_what_is_taken(place):
    """Everything is found before anything is made, and each line names the thing and the way on."""
    place.create("one", "--agent", "bob")
    assert place.refused("create", "one") == f"there is a worktree {place.path('one').name} already: {place.path('one')}; " \
                                             "choose another name or --path"
    assert f"branch one is checked out in {place.path('one')}" in place.refused("create", "two", "--branch", "one")
    assert f"branch main is checked out in {place.repo.path}" in place.refused("create", "main")
    assert "carries what agents say" in place.refused("create", "a-sync")
    assert "not a valid branch name" in place.refused("create", "x..y")
    commit(place.repo)
    for revision in ("main~1", "main^", "main@{0}", "main^{commit}", "@{-1}", "@{0}"):
        assert "not a valid branch name" in place.refused("create", "x", "--branch", revision), revision
    assert "not a valid branch name" in place.refused("create", "x", "--branch=-b")
    assert "--base 'nope' is no commit" in place.refused("create", "two", "--base", "nope")
    assert "--base '-n' is no commit" in place.refused("create", "two", "--base=-n")
    place.path("two").mkdir()
    assert f"{place.path('two')} is in the way" in place.refused("create", "two")
    assert "is not a directory; make it first" in place.refused("create", "three", "--path", str(place.folder / "no/where"))
    assert "--role and --module go with --agent" in place.refused("create", "three", "--role", "tester")
    # of the agent
    assert f"agent 'bob' works in {place.path('one')}" in place.refused("create", "three", "--agent", "bob")
    assert "cannot be the same as its role" in place.refused("create", "three", "--agent", "tester", "--role", "tester")
    assert "conflicts with existing role 'planner'" in place.refused("create", "three", "--agent", "planner")
    place.repo.ok("group", "create", "backend")
    assert "there is a group of that name" in place.refused("create", "three", "--agent", "backend")
    assert "invalid characters" in place.refused("create", "three", "--agent", "Bob")
    assert "role" in place.refused("create", "three", "--agent", "cleo", "--role", "not a role")


def test_create_elsewhere(place):
    """--path is as seen from the caller; the name of the folder has to be free, because agents go by it."""
    sub = place.repo.path / "sub"
    sub.mkdir()
    reply = place.repo.json("worktree", "create", "x", "--path", "../../else where", cwd=sub)
    assert reply["path"] == str(place.folder / "else where") and reply["branch"] == "x"
    (place.folder / "deep").mkdir()
    assert "there is a worktree else where already" in place.refused("create", "y", "--path", str(place.folder / "deep/else where"))
    place.repo.ok("worktree", "remove", "x")
    assert not (place.folder / "else where").exists()


def test_create_twice_the_same_role(place):
    """Several agents of one role and module are what worktrees are for."""
    place.create("one", "--agent", "bob")
    place.create("two", "--agent", "cleo")
    agents = {agent["agent_id"]: agent for agent in place.repo.json("agent", "list")["agents"]["agents"]}
    assert agents["bob"]["role"] == agents["cleo"]["role"] == "implementer" and agents["cleo"]["module"] == "main"


def test_create_does_not_take_the_callers_identity(place):
    """The environment says who is calling, not who is going to work there."""
    place.create("one", "--agent", "bob", env={"THRUM_NAME": "ada", "THRUM_ROLE": "planner", "THRUM_DISPLAY": "Ada"})
    identity = json.loads((place.path("one") / ".thrum/identities/bob.json").read_text())["agent"]
    assert (identity["Name"], identity["Role"], identity["Display"]) == ("bob", "implementer", "Implementer (main)")


def test_create_before_the_first_commit(make_repo):
    place = Place(make_repo, commit=False)
    assert place.refused("create", "one").startswith("there is no commit yet that a worktree could hold; commit something")
    items = place.listed()
    assert items["R"]["branch"] == "main" and list(items) == ["R"]


def test_create_without_thrum(make_repo):
    repo = make_repo()
    for words in ("create x", "list", "remove x"):
        assert "thrum is not initialized" in error_line(repo.run("worktree", *words.split()))
    assert not (repo.path.parent / "repo-x").exists()


@pytest.mark.parametrize("failing", ["hook", "tracked .thrum", "registration"])
def test_a_failure_takes_everything_back(place, failing):
    """Whatever step fails: no folder, no branch, nothing of git's, no agent."""
    place.create("other")                       # git ignores .thrum from now on, and that stays
    if failing == "hook":
        hook = place.repo.path / ".git/hooks/post-checkout"
        hook.parent.mkdir(exist_ok=True)
        hook.write_text("#!/bin/sh\necho 'no lfs here' >&2\nexit 3\n")
        hook.chmod(0o755)
        place.repo.git("config", "branch.autoSetupMerge", "always")         # git writes into its config too
        text = place.refused("create", "one", "--base", "main", "--agent", "bob")
        assert text.startswith("a hook of the repository stopped it: no lfs here; 'git rev-parse --git-path hooks/post-checkout'")
        place.repo.git("config", "branch.one.description", "mine")
        place.repo.git("config", "branch.one.x.description", "another's")
        place.refused("create", "one", "--base", "main")
        assert place.repo.git("config", "branch.one.description") == "mine\n"
        hook.write_text("#!/bin/sh\nexit 3\n")
        assert place.refused("create", "one", "--base", "main").startswith("a hook of the repository stopped it: exit status 3;")
    elif failing == "tracked .thrum":       # a branch on which that name is a file
        place.repo.git("checkout", "-q", "-b", "odd")
        blob = place.repo.run(command=["git", "hash-object", "-w", "--stdin"], input="x").stdout.strip()
        place.repo.git("update-index", "--add", "--cacheinfo", f"100644,{blob},.thrum")
        place.repo.git("commit", "-q", "-m", "odd")
        place.repo.git("symbolic-ref", "HEAD", "refs/heads/main")
        place.repo.git("reset", "-q")
        assert "cannot set up this worktree" in place.refused("create", "one", "--base", "odd", "--agent", "bob")
        assert "cannot set up this worktree" in place.refused("create", "one", "--branch", "odd")
        assert "odd" in place.repo.git("branch", "--list", "odd"), "one that was there stays"
    else:                                   # the hook of the user's takes the name, between the look and the registration
        hook = place.repo.path / ".git/hooks/post-checkout"
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(f"#!/bin/sh\ncd {shlex.quote(str(place.repo.path))} && .thrum/bin/thrum group create bob\n")
        hook.chmod(0o755)
        before, _ = place.trace()
        assert "there is a group of that name" in error_line(place.repo.run("worktree", "create", "one", "--agent", "bob"))
        assert not changed(before, place.trace()[0])
    assert "bob" not in {agent["agent_id"] for agent in place.repo.json("agent", "list")["agents"]["agents"]}
    assert not place.path("one").exists() and "one" not in place.repo.git("branch")


def test_hooks_of_the_user_run_in_their_own_environment(place):
    commit(place.repo, "file")
    hook = place.repo.path / ".git/hooks/post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text('#!/bin/sh\ngit ls-files "f*" >seen\necho "$LC_ALL $GIT_OPTIONAL_LOCKS $GIT_LITERAL_PATHSPECS" >>seen\n')
    hook.chmod(0o755)
    place.create("one", env={"LC_ALL": "C.UTF-8"})
    assert (place.path("one") / "seen").read_text() == "file\nC.UTF-8  \n"


def test_create_where_nothing_may_be_written(place):
    folder = place.folder / "shut"
    folder.mkdir()
    folder.chmod(0o555)
    command = confined(*place.repo.command())
    try:
        if command:
            text = place.refused("create", "one", "--path", str(folder / "one"), command=command)
            assert text.startswith("cannot make the worktree: Permission denied") and str(folder / "one") in text
    finally:
        folder.chmod(0o755)


def test_create_at_once(place):
    """Of several that want one name one gets it; the others take nothing away from it."""
    started = [start(place.repo, "worktree", "create", "one", "--branch", branch, "--agent", "bob")
               for branch in ("one", "one", "two", "three")]
    done = [finish(process) for process in started]
    assert sorted(status for status, _, _ in done) == [0, 1, 1, 1], done
    one = place.at("one")
    assert one.json("whoami")["agent_id"] == "bob" and not one.git("status", "--porcelain")
    branch = one.git("branch", "--show-current").strip()
    left = set(place.repo.git("branch", "--format=%(refname:short)").split())
    assert left == {"main", "a-sync", branch}, done


# ---------------------------------------------------------------- list

SHAPE = {"name", "path", "main", "current", "locked", "gone", "set_up", "agents"}


def test_list(place):
    """Branch or commit, agents and whether they are here, what is ahead and not committed, and every mark."""
    bob = place.create("bob", "--agent", "bob")
    commit(bob)
    (bob.path / "new ü.txt").write_text("x")
    bob.ok("session", "start")
    place.create("apart").git("checkout", "-q", "--detach")
    place.create("shut")
    place.repo.git("worktree", "lock", "--reason", "on a stick", str(place.path("shut")))
    shutil.rmtree(place.create("gone", "--agent", "gus").path)
    place.repo.git("worktree", "add", "-q", "-b", "bare", str(place.path("bare")))
    items = place.listed(bob)
    assert list(items)[0] == "R" and set(items) == {"R", "R-bob", "R-apart", "R-shut", "R-gone", "R-bare"}
    for item in items.values():
        facts = set() if item["gone"] else {"unmerged_commits", "uncommitted"}
        assert set(item) - {"branch", "detached", "reason"} == SHAPE | facts, item
        assert ("branch" in item) != ("detached" in item)
    assert items["R"]["main"] and not items["R"]["current"] and items["R"]["agents"][0]["agent_id"] == "ada"
    assert items["R-bob"]["current"] and items["R-bob"]["path"] == str(bob.path)
    assert (items["R-bob"]["unmerged_commits"], items["R-bob"]["uncommitted"]) == (1, 1)
    session = place.sessions("bob")[0]["session_id"]
    assert items["R-bob"]["agents"] == [{"agent_id": "bob", "role": "implementer", "module": "main", "active": True, "session_id": session}]
    assert items["R-apart"]["detached"] == place.repo.git("rev-parse", "HEAD").strip()
    assert items["R-shut"]["locked"] and items["R-shut"]["reason"] == "on a stick"
    assert items["R-gone"]["gone"] and items["R-gone"]["agents"] == [] and items["R-gone"]["branch"] == "gone"
    assert {name for name, item in items.items() if not item["set_up"]} == {"R-bare", "R-gone"}
    text = bob.ok("worktree", "list")
    head = place.repo.git("rev-parse", "HEAD")[:7]
    name = place.repo.path.name
    assert text.startswith("Worktrees (6):\n\n") and f"● {name}-bob  (this one)\n" in text and f"○ {name}-shut  (locked)\n" in text
    assert f"○ {name}-gone  (gone)\n" in text and f"○ {name}-bare  (not set up)\n" in text and f"Branch: detached at {head}\n" in text
    assert "    Agents: @bob (active)\n    Work:   1 commit ahead and 1 uncommitted file\n" in text


def test_list_without_the_daemon(place):
    """What the files tell is told, and what is left out is named; nothing is started."""
    place.create("one", "--agent", "bob")
    place.repo.kill()
    (place.repo.var / "thrum.sock").unlink()
    found = place.repo.json("worktree", "list")
    assert found["daemon"] == "stopped" and all(set(item) == SHAPE | {"branch"} for item in found["worktrees"])
    assert found["worktrees"][1]["agents"] == [{"agent_id": "bob", "role": "implementer", "module": "main"}]
    assert place.repo.ok("worktree", "list").endswith("\nWho is active, and what is not committed, is left out: the daemon is not running; "
                                                      "'thrum daemon start' starts it.\n")
    assert not (place.repo.var / "thrum.sock").exists()


def test_list_while_the_daemon_hangs(place):
    place.create("one", "--agent", "bob")
    os.kill(place.repo.pid(), signal.SIGSTOP)
    try:
        began = time.monotonic()
        found = place.repo.json("worktree", "list")
        assert time.monotonic() - began < thrum.LIST_S + 4
        assert found["daemon"] == "unresponsive" and all(set(item) == SHAPE | {"branch"} for item in found["worktrees"])
        assert place.repo.ok("worktree", "list").endswith("left out: the daemon does not answer; try 'thrum daemon restart'.\n")
    finally:
        os.kill(place.repo.pid(), signal.SIGCONT)


def test_list_is_harmless_on_a_terminal(make_repo):
    place = Place(make_repo, "a\x1b[2Jb\u202ec")
    place.create("one")
    out = place.repo.ok("worktree", "list") + place.repo.ok("worktree", "list", "--json")
    assert not RAW & set(out)
    assert not RAW & set(place.repo.ok("worktree", "remove", "one"))


# ---------------------------------------------------------------- remove

def test_remove_by_any_name(place):
    """The folder and git's entry go, the branch and the registration stay, the session ends; it can be made again."""
    (place.repo.path / "sub").mkdir()
    name = place.path("one").name
    for word in ("one", name, str(place.path("one")), f"../../{name}/", "bob", "@bob", "feature/x"):
        bob = place.create("one", "--agent", "bob", "--branch", "feature/x")
        session = bob.json("session", "start")["session_id"]
        reply = place.repo.json("worktree", "remove", word, cwd=place.repo.path / "sub")
        assert reply == {"name": name, "path": str(bob.path), "branch": "feature/x", "kept": [],
                         "ended": [{"agent_id": "bob", "session_id": session}]}, word
        assert sorted(path.name for path in place.folder.iterdir() if path.name.startswith("my")) == [place.repo.path.name], word
        assert "feature/x" in place.repo.git("branch") and str(bob.path) not in place.repo.git("worktree", "list"), word
        ended, = (each for each in place.sessions("bob") if each["session_id"] == session)
        assert ended["end_reason"] == "worktree removed" and "@bob" in place.repo.ok("agent", "list"), word
    assert "✓ Worktree created" in place.repo.ok("worktree", "create", "one", "--agent", "bob", "--branch", "feature/x"), "and comes back"


def test_remove_refuses_what_would_be_lost(place):
    """Staged, modified and untracked files, also where the user's settings hide them, and commits; ignored files are no work."""
    one = place.create("one")
    assert place.listed()["R-one"]["uncommitted"] == 0
    for key, value in (("status.showUntrackedFiles", "no"), ("diff.ignoreSubmodules", "all")):
        place.repo.git("config", key, value)
    (one.path / "untracked").write_text("x")
    assert place.refused("remove", "one") == f"worktree {one.path.name} has 1 uncommitted file; " \
                                               "--force removes the worktree all the same"
    one.git("add", "untracked")
    assert "has 1 uncommitted file;" in place.refused("remove", "one")
    one.git("commit", "-q", "-m", "one")
    assert place.refused("remove", "one").endswith("has 1 commit on no other branch (it stays on the branch one); "
                                                   "--force removes the worktree all the same")
    (one.path / "untracked").write_text("y")
    (one.path / "two").write_text("y")
    assert "has 2 uncommitted files and 1 commit on no other branch (it stays" in place.refused("remove", "one")
    one.git("checkout", "-q", "--detach")
    one.git("commit", "-q", "-a", "-m", "of no branch")
    (one.path / "two").unlink()
    assert "has 1 commit on no other branch;" in place.refused("remove", "one"), "the first one is on a branch that stays"
    one.git("checkout", "-q", "one")
    (one.path / "untracked").write_text("z")
    place.repo.ok("worktree", "remove", "one", "--force")
    assert not one.path.exists() and "one" in place.repo.git("branch")
    two = place.create("two")
    commit(two)
    place.repo.git("merge", "-q", "two")
    (place.repo.path / ".git/info/exclude").write_text(".thrum/\n*.o\n")
    (two.path / "x.o").write_text("ignored")
    assert "✓ Worktree removed" in place.repo.ok("worktree", "remove", "two")


def test_remove_counts_what_a_remote_has(place, tmp_path):
    place.repo.git("init", "-q", "--bare", str(tmp_path / "origin.git"))
    place.repo.git("remote", "add", "origin", str(tmp_path / "origin.git"))
    one = place.create("one")
    commit(one)
    assert "1 commit on no other branch" in place.refused("remove", "one")
    one.git("push", "-q", "origin", "one")
    assert "✓ Worktree removed" in place.repo.ok("worktree", "remove", "one")


def test_remove_of_the_base_branch_needs_no_merge(place):
    """A worktree with `main` in it, while the main one is on another branch."""
    place.repo.git("checkout", "-q", "-b", "dev")
    one = place.create("one", "--branch", "main")
    commit(one)
    assert "✓ Worktree removed" in place.repo.ok("worktree", "remove", "one")


def test_remove_refuses_places(place):
    one = place.create("one", "--agent", "bob")
    assert "is the main worktree" in place.refused("remove", place.repo.path.name, "--force")
    assert "is the main worktree" in place.refused("remove", "ada", "--force")
    (one.path / "sub").mkdir()
    for cwd in (one.path, one.path / "sub"):
        text = place.refused("remove", "one", "--force", cwd=cwd, by=one)
        assert text == f"you are in {one.path}; change to another directory first, such as {place.repo.path}"
    assert "no worktree 'onne'; did you mean 'one'? 'thrum worktree list'" in place.refused("remove", "onne")
    place.repo.git("worktree", "lock", "--reason", "on a stick", str(one.path))
    text = place.refused("remove", "one", "--force")
    assert text == f"worktree {one.path.name} is locked: on a stick; 'git worktree unlock {shlex.quote(str(one.path))}' unlocks it"
    place.repo.git("worktree", "unlock", str(one.path))
    two = place.create("two", "--branch", "bob")
    assert f"'bob' may be each of {one.path}, {two.path}; give the path" in place.refused("remove", "bob")
    place.repo.ok("worktree", "create", "inner", "--path", str(one.path / "inner"))
    assert f"another worktree lies in {one.path}: {one.path / 'inner'}" in place.refused("remove", str(one.path), "--force")
    own = place.create("own")
    shutil.rmtree(own.path / ".thrum")
    (own.path / ".thrum/var").mkdir(parents=True)
    assert "has a thrum of its own" in place.refused("remove", "own", "--force")


def test_remove_of_a_worktree_that_has_gone(place):
    """Only its entry is forgotten, that of another that has gone is not; the session of who worked there ends."""
    one, two = place.create("one", "--agent", "bob"), place.create("two")
    one.ok("session", "start")
    shutil.rmtree(one.path)
    shutil.rmtree(two.path)
    assert "which has gone; 'thrum worktree remove" in place.refused("create", "one", "--branch", "other")
    assert "which has gone; 'thrum worktree remove" in place.refused("create", "three", "--branch", "one")
    out = place.repo.ok("worktree", "remove", "one")
    assert out == f"✓ Worktree forgotten: {one.path}, which had gone\n  Kept: the branch one\n  Ended: the session of @bob\n"
    assert str(one.path) not in place.repo.git("worktree", "list") and str(two.path) in place.repo.git("worktree", "list")
    assert place.sessions("bob")[0]["status"] == "ended" and place.sessions("ada")[0]["status"] == "active"
    # the commits of a detached HEAD are reached by its entry alone; those of a branch stay with it
    apart = place.create("apart")
    commit(apart)
    shutil.move(apart.path, place.folder / "aside")
    place.repo.ok("worktree", "remove", "apart")
    apart = place.create("apart")
    apart.git("checkout", "-q", "--detach")
    commit(apart, "more.txt")
    shutil.rmtree(apart.path)
    assert place.refused("remove", apart.path.name).endswith("has 1 commit on no other branch; --force removes the worktree all the same")
    place.repo.ok("worktree", "remove", apart.path.name, "--force")
    # without `.git`, but with files that may be somebody's
    three = place.create("three")
    (three.path / ".git").unlink()
    (three.path / "mine").write_text("x")
    assert f"Kept: {three.path}, which is no worktree any more" in place.repo.ok("worktree", "remove", "three")
    assert (three.path / "mine").exists() and str(three.path) not in place.repo.git("worktree", "list")


def test_remove_keeps_what_agents_saved(place):
    """In the main worktree, under a name that is nobody's where the own one is taken; what is generated or empty is not worth it."""
    for round_, expected in enumerate(("bob.md", "bob.from-{}.md", "bob.from-{}-2.md")):
        one = place.create("one", "--agent", "bob")
        one.ok("context", "save", input=f"notes {round_}")
        out = place.repo.ok("worktree", "remove", "one")
        path = place.repo.path / ".thrum/context" / expected.format(one.path.name)
        assert f"  Kept: the context that was saved there, in {path}\n" in out
        assert path.read_text() == f"notes {round_}"
    assert not list((place.repo.path / ".thrum/context").glob("bob_preamble*"))
    one = place.create("one", "--agent", "bob")
    (one.path / ".thrum/context/bob_preamble.md").write_text("mine")
    (one.path / ".thrum/context/bob.md").write_text("notes 0")
    (one.path / ".thrum/context/link.md").symlink_to("/etc/hostname")
    assert place.repo.json("worktree", "remove", "one")["kept"] == [str(place.repo.path / ".thrum/context/bob_preamble.md")], \
        "the same text is there"


def test_remove_keep_agent(place):
    one = place.create("one", "--agent", "bob")
    one.ok("session", "start")
    out = place.repo.ok("worktree", "remove", "one", "--keep-agent")
    assert "  Kept: the session of @bob, if there is one\n" in out and place.sessions("bob")[0]["status"] == "active"


def test_remove_ends_only_the_sessions_of_that_worktree(place):
    """An agent that has moved on, with its identity left behind, goes on where it is."""
    one, two = place.create("one", "--agent", "bob"), place.create("two")
    shutil.copytree(one.path / ".thrum/identities", two.path / ".thrum/identities", dirs_exist_ok=True)
    two.ok("session", "start")
    assert place.repo.json("worktree", "remove", str(one.path))["ended"] == []
    assert place.sessions("bob")[0]["status"] == "active"
    assert [item["agent_id"] for item in place.repo.json("worktree", "remove", str(two.path))["ended"]] == ["bob"]


def test_remove_while_the_daemon_is_stopped(place):
    """The worktree goes; that a session may stay open is said, with what ends it."""
    one = place.create("one", "--agent", "bob")
    session = one.json("session", "start")["session_id"]
    place.repo.ok("daemon", "stop")
    done = place.repo.run("worktree", "remove", "one", check=0)
    assert "✓ Worktree removed" in done.stdout and done.stderr.startswith("Warning: a session of @bob may stay open") \
        and done.stderr.count("\n") == 1 and "'thrum daemon start'" in done.stderr
    place.repo.ok("daemon", "start")
    assert session in place.repo.ok("session", "list", "--active")
    assert "✓ Session ended" in place.repo.ok("session", "end", "--session-id", session)


def test_remove_that_cannot_changes_nothing(place):
    """Where the folder that holds it is shut, not even the context is copied."""
    one = place.create("one", "--agent", "bob")
    one.ok("context", "save", input="notes")
    session = one.json("session", "start")["session_id"]
    inner = place.folder / "inner"
    inner.mkdir()
    place.repo.git("worktree", "move", str(one.path), str(inner / "one"))
    inner.chmod(0o555)
    command = confined(*place.repo.command())
    try:
        if command:
            text = place.refused("remove", "one", command=command)
            assert text.startswith(f"cannot remove {inner / 'one'}, nothing was changed: Permission denied")
            assert place.sessions("bob")[0]["status"] == "active"
    finally:
        inner.chmod(0o755)
    assert place.repo.json("worktree", "remove", "one")["ended"] == [{"agent_id": "bob", "session_id": session}], "also after a move"


def test_remove_that_cannot_delete_every_file_says_what_is_left(place):
    """Git and the team know it no more; what is left stands aside, and its place is free."""
    one = place.create("one", "--agent", "bob")
    session = one.json("session", "start")["session_id"]
    shut = one.path / "shut"
    shut.mkdir()
    (shut / "kept").write_text("x")
    shut.chmod(0o555)
    command = confined(*place.repo.command())
    try:
        if command:
            done = place.repo.run("worktree", "remove", "one", "--force", command=command, check=1)
            assert "✓ Worktree removed" in done.stdout and "Ended: the session of @bob" in done.stdout
            assert done.stderr.startswith("Warning: not all of its files could be deleted: ") and f"{one.path}.removed_" in done.stderr
            assert str(one.path) not in place.repo.git("worktree", "list") and place.sessions("bob")[0]["session_id"] == session
            place.create("one", "--branch", "next")
    finally:
        for path in place.folder.rglob("shut"):
            path.chmod(0o755)


def test_remove_where_a_link_is_in_the_way_of_the_context(place, tmp_path):
    one = place.create("one", "--agent", "bob")
    one.ok("context", "save", input="notes")
    (one.path / ".thrum/context/a.md").write_text("before it")
    (place.repo.path / ".thrum/context/bob.md").symlink_to(tmp_path / "elsewhere")
    text = place.refused("remove", "one")
    assert "nothing was changed" in text and "is a link" in text and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("what", ["clean", "dirty", "unpushed"])
def test_remove_with_a_submodule(make_repo, what):
    """Git refuses to remove one with submodules; here only what is lost with them counts: their repositories go with the worktree."""
    inner = make_repo("inner")
    commit(inner)
    place = Place(make_repo)
    allow = ("-c", "protocol.file.allow=always", "submodule")
    place.repo.git(*allow, "add", "-q", str(inner.path), "lib")
    place.repo.git("commit", "-q", "-a", "-m", "with a submodule")
    one = place.create("one")
    one.git(*allow, "update", "-q", "--init")
    lib = Repo(one.path / "lib")
    if what == "dirty":
        (lib.path / "work.txt").write_text("changed")
        assert "has 1 uncommitted file;" in place.refused("remove", "one")
        lib.git("checkout", "-q", "work.txt")
    elif what == "unpushed":
        commit(lib, "more.txt")
        one.git("commit", "-q", "-a", "-m", "a newer one")
        place.repo.git("merge", "-q", "one")
        assert "has 1 commit of submodules that no remote has;" in place.refused("remove", "one")
        lib.git("push", "-q", "origin", "HEAD:refs/heads/next")
        lib.git("fetch", "-q")
    place.repo.ok("worktree", "remove", "one")
    assert not one.path.exists()
    place.repo.git("fsck")


def test_in_a_submodule_and_with_the_git_directory_elsewhere(make_repo, tmp_path):
    """Their main worktrees are found although `.git` is a file."""
    outer = make_repo("outer")
    outer.git("-c", "protocol.file.allow=always", "submodule", "add", "-q", str(make_repo("inner").path), "lib")
    apart = tmp_path / "apart"
    outer.git("clone", "-q", "--separate-git-dir", str(tmp_path / "elsewhere"), str(outer.path), str(apart))
    for path in (outer.path / "lib", apart):
        repo = Repo(path)
        try:
            repo.join("ada")
            repo.ok("worktree", "create", "one", "--agent", "bob")
            linked = Repo(path.parent / f"{path.name}-one", repo)
            linked.ok("session", "start")
            items = linked.json("worktree", "list")["worktrees"]
            assert [(item["path"], item["main"], item["set_up"]) for item in items] == [
                (str(path), True, True), (str(linked.path), False, True)]
            assert all(item["agents"][0]["active"] and item["uncommitted"] >= 0 for item in items)
            assert len(repo.json("worktree", "remove", "one")["ended"]) == 1 and not linked.path.exists()
        finally:
            repo.close()


def test_init_remove_leaves_the_worktrees(place):
    """They are the user's; only their .thrum goes, and the repository is as it was, but for their branches."""
    one = place.create("one", "--agent", "bob")
    place.repo.ok("init", "--remove", "--yes")
    assert one.path.is_dir() and not (one.path / ".thrum").exists() and not one.git("status", "--porcelain")
    assert str(one.path) in place.repo.git("worktree", "list") and not (place.repo.path / ".thrum").exists()
    assert not (place.repo.path / ".gitignore").exists()


def test_completion_offers_worktrees(make_repo, place):
    """The names of folders that a shell takes as they are, without the daemon too."""
    place.create("one.x")
    assert place.repo.ok("complete", "worktrees") == ""          # this one has a blank in it
    other = Place(make_repo, "plain")
    other.create("one.x")
    other.repo.ok("daemon", "stop")
    assert other.repo.ok("complete", "worktrees") == "plain-one.x\n"
