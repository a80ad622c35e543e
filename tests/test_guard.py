"""The guard: git's hooks beside those of the user, commits that touch others' claims, and the trailer (sections 18, 26)."""

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest

import thrum
from conftest import CLEAN, Repo
from team import END_S, Team, error_line
from test_init import changed, snapshot

pytestmark = pytest.mark.slow

NAMES = tuple(thrum.GUARD_HOOKS)
ODD = ("a b", "quo'te", 'dou"ble', "back\\slash", "new\nline", "tab\there", "-dash", "ü€🦊", "*star?[x]", ":colon", "$HOME", " lead",
       "trail ")


# ---------------------------------------------------------------- the files

@pytest.fixture
def plain(tmp_path):
    """A repository with an installation whose daemon nobody starts."""
    path = tmp_path / "plain"
    path.mkdir()
    repo = Repo(path)
    repo.git("init", "-q", "-b", "main")
    repo.git("commit", "-q", "--allow-empty", "-m", "first")
    thrum.initialize(str(path))
    (repo.var / "stopped").write_bytes(b"")
    repo.ok("version")          # makes the cache of bytecode
    return repo


def states(repo, **more):
    return {hook["hook"]: hook["state"] for hook in repo.json("guard", "status", **more)["hooks"]}


def write(path, text, mode=0o755):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def commit(repo, *args, env=None, input=""):
    """`git commit` as a user runs it: status and stderr."""
    done = subprocess.run(["git", "-c", "user.name=Test", "-c", "user.email=test@localhost", "commit", "-q", *args], cwd=repo.path,
                          env={**CLEAN, **(env or {})}, capture_output=True, text=True, input=input, timeout=END_S)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


SCRIPT = "#!/bin/sh\necho kept >&2\n"
KINDS = {
    "none": lambda path: None,
    "script": lambda path: write(path, SCRIPT),
    "private": lambda path: write(path, SCRIPT, 0o700),
    "not executable": lambda path: write(path, SCRIPT, 0o644),
    "no shebang": lambda path: write(path, "echo kept >&2\n"),
    "python": lambda path: write(path, f"#!{sys.executable}\nimport sys\nprint('kept', file=sys.stderr)\n"),
    "link": lambda path: path.symlink_to("real.sh"),
    "absolute link": lambda path: path.symlink_to(path.parent / "real.sh"),
    "broken link": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_of_the_user_is_kept_run_and_restored(plain, kind):
    folder = plain.path / ".git" / "hooks"
    write(folder / "real.sh", SCRIPT)
    for name in NAMES:
        KINDS[kind](folder / name)
    before = snapshot(folder)
    assert set(states(plain).values()) == {"absent" if kind == "none" else "other"}
    report = plain.json("guard", "install")
    assert [(hook["state"], hook["before"]) for hook in report["hooks"]] == [("installed", kind != "none")] * 2
    for name in NAMES if kind != "none" else ():
        assert snapshot(folder)[str(folder / name) + thrum.BEFORE] == before[str(folder / name)]
    installed = snapshot(folder)
    assert "there already" in plain.ok("guard", "install")
    assert not changed(installed, snapshot(folder))
    runs = kind not in ("none", "not executable", "broken link")
    status, text = commit(plain, "--allow-empty", "-m", "second")
    assert status == 0 and text.count("kept") == 2 * runs, text
    assert plain.ok("guard", "remove").count("Removed" if kind == "none" else "Restored") == 2
    assert not changed(before, snapshot(folder))
    assert "Nothing to remove" in plain.ok("guard", "remove")


@pytest.mark.parametrize("where", ["hooks", ".githooks", "a/b/c", "../outside", "~/hooks"])
@pytest.mark.parametrize("present", [False, True])
def test_core_hooks_path_is_gits_own_answer(plain, tmp_path, where, present):
    home = {"HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    if where == "hooks":        # none is set, and git was told to make no folder
        shutil.rmtree(plain.path / ".git" / "hooks")
        folder = plain.path / ".git" / "hooks"
    else:
        subprocess.run(["git", "config", "--global", "core.hooksPath", where], env={**CLEAN, **home}, check=True)
        folder = tmp_path / "home" / "hooks" if where[0] == "~" else plain.path / where
    if present:
        folder.mkdir(parents=True)
    before = snapshot(tmp_path)
    text = plain.ok("guard", "install", env=home)
    assert (folder / "pre-commit").exists() and os.access(folder / "pre-commit", os.X_OK)
    assert ("working tree" in text) == (where in (".githooks", "a/b/c")), text
    assert ("core.hooksPath is relative: the guard is only in this worktree." in text) == (where in (".githooks", "a/b/c")), text
    assert ("outside of the repository" in text) == (where in ("../outside", "~/hooks")), text
    status, said = commit(plain, "--allow-empty", "-m", "second", env=home)
    assert status == 0 and said == ""
    plain.ok("guard", "remove", env=home)
    plain.git("reset", "-q", "--hard", "HEAD")
    assert not [path for path in changed(before, snapshot(tmp_path)) if "/.git/" not in path]
    assert folder.exists() == present


def test_a_folder_in_the_tree_that_git_ignores_shows_no_change(plain):
    plain.git("config", "core.hooksPath", ".husky-like")
    with open(plain.path / ".git" / "info" / "exclude", "a") as file:
        file.write(".husky-like\n")
    assert "working tree" not in plain.ok("guard", "install")


def test_a_folder_for_several_repositories_disturbs_the_others_not(plain, tmp_path):
    """Where there is no thrum, the hook runs what was there before, and says nothing."""
    write(tmp_path / "shared" / "pre-commit", SCRIPT)
    other = Repo(tmp_path / "other")
    other.path.mkdir()
    other.git("init", "-q")
    for repo in (plain, other):
        repo.git("config", "core.hooksPath", str(tmp_path / "shared"))
    plain.ok("guard", "install")
    assert commit(other, "--allow-empty", "-m", "x") == (0, "kept\n")
    status, text = commit(plain, "--allow-empty", "-m", "x")
    assert status == 0 and text.startswith("kept\n")


@pytest.mark.parametrize("path, words", [("/dev/null", "turned off"), (".husky/_", "husky writes")])
def test_folders_that_cannot_be_used(plain, path, words):
    plain.git("config", "core.hooksPath", path)
    before = snapshot(plain.path)
    assert words in error_line(plain.run("guard", "install"))
    assert not changed(before, snapshot(plain.path))


def test_an_edited_hook_is_left_alone(plain):
    folder = plain.path / ".git" / "hooks"
    before = snapshot(folder)
    plain.ok("guard", "install")
    with open(folder / "pre-commit", "a") as file:
        file.write("echo mine\n")
    edited = snapshot(folder)
    assert states(plain) == {"pre-commit": "edited", "prepare-commit-msg": "installed"}
    assert "edited" in plain.ok("guard", "install") and not changed(edited, snapshot(folder))
    assert "Left: .git/hooks/pre-commit, which was edited" in plain.ok("guard", "remove")
    assert [os.path.basename(path) for path in changed(before, snapshot(folder))] == ["pre-commit"]
    plain.ok("guard", "install", "--force")
    assert set(states(plain).values()) == {"installed"}
    with open(folder / "pre-commit", "a") as file:
        file.write("echo mine\n")
    plain.ok("guard", "remove", "--force")
    assert not changed(before, snapshot(folder))


def test_an_older_version_is_renewed_and_a_newer_one_stays(plain):
    path = plain.path / ".git" / "hooks" / "pre-commit"
    write(path, thrum.sealed("#!/bin/sh\n# thrum-managed: old\n", 0).decode())
    write(path.parent / "prepare-commit-msg", thrum.sealed("#!/bin/sh\n# thrum-managed: new\n", 99).decode())
    assert states(plain) == {"pre-commit": "outdated", "prepare-commit-msg": "installed"}
    assert "renewed" in plain.ok("guard", "install")
    assert set(states(plain).values()) == {"installed"} and "guard check" in path.read_text()
    assert "new" in (path.parent / "prepare-commit-msg").read_text()
    path.chmod(0o644)           # git would pass it over
    plain.ok("guard", "install")
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_a_hook_that_took_the_place_of_ours_is_nobodys_to_decide(plain):
    folder = plain.path / ".git" / "hooks"
    write(folder / "pre-commit", SCRIPT)
    plain.ok("guard", "install")
    (folder / "pre-commit").unlink()
    write(folder / "pre-commit", "#!/bin/sh\necho other\n")
    before = snapshot(plain.path)
    assert "keep one of the two" in error_line(plain.run("guard", "install"))
    assert not changed(before, snapshot(plain.path))
    assert "was replaced since" in plain.ok("guard", "remove")
    assert (folder / "pre-commit").read_text() == "#!/bin/sh\necho other\n" and (folder / ("pre-commit" + thrum.BEFORE)).exists()


def test_what_cannot_be_written_changes_nothing(plain, monkeypatch):
    folder = plain.path / ".git" / "hooks"
    write(folder / "pre-commit", SCRIPT)
    before = snapshot(plain.path)

    def full(path, *more):
        raise OSError(28, "No space left on device", path)
    monkeypatch.setattr(thrum, "atomic_write", full)
    with pytest.raises(OSError):
        thrum.place_guard(str(folder))
    assert not changed(before, snapshot(plain.path))


def test_half_an_installation_is_completed_and_taken_back(plain):
    """A crash between the two steps leaves a hook under its second name alone."""
    folder = plain.path / ".git" / "hooks"
    write(folder / "pre-commit", SCRIPT)
    before = snapshot(folder)
    (folder / "pre-commit").rename(folder / ("pre-commit" + thrum.BEFORE))
    half = snapshot(folder)
    plain.ok("guard", "remove")
    assert not changed(before, snapshot(folder))
    (folder / "pre-commit").rename(folder / ("pre-commit" + thrum.BEFORE))
    assert not changed(half, snapshot(folder))
    plain.ok("guard", "install")
    assert commit(plain, "--allow-empty", "-m", "x")[1].startswith("kept\n")
    plain.ok("guard", "remove")
    assert not changed(before, snapshot(folder))


@pytest.mark.parametrize("hooks_path", ["", ".githooks"])
def test_init_remove_takes_the_guard_along(make_repo, hooks_path):
    repo = make_repo()
    if hooks_path:
        repo.git("config", "core.hooksPath", hooks_path)
    else:
        write(repo.path / ".git" / "hooks" / "pre-commit", SCRIPT, 0o750)
    before = snapshot(repo.path)
    thrum.initialize(str(repo.path))
    repo.ok("guard", "install")
    assert changed(before, snapshot(repo.path))
    assert "hooks/pre-commit" in repo.ok("init", "--remove", "--yes")
    assert not changed(before, snapshot(repo.path))


def test_a_hook_gets_what_git_gives_and_decides_as_before(plain, tmp_path):
    folder, seen = plain.path / ".git" / "hooks", tmp_path / "seen"
    for name in NAMES:
        write(folder / name, f'#!/bin/sh\necho "{name} $# $1 $2 $GIT_INDEX_FILE $EXTRA" >> {seen}\nexit ${{FAIL:-0}}\n')
    args = ("--allow-empty", "-m", "x")
    assert commit(plain, *args, env={"EXTRA": "e"})[0] == 0
    expected = seen.read_text()
    assert expected.count("\n") == 2
    plain.ok("guard", "install")
    seen.unlink()
    assert commit(plain, *args, env={"EXTRA": "e"})[0] == 0
    assert seen.read_text() == expected
    head = plain.git("rev-parse", "HEAD")
    for code in ("1", "3", "77"):
        assert commit(plain, *args, env={"FAIL": code})[0] == 1
    assert plain.git("rev-parse", "HEAD") == head


def test_managed_files_know_themselves(tmp_path):
    path = str(tmp_path / "file")
    for text in ("thrum-managed\n", "# thrum-managed: ü\nx\n", '{"thrum-managed": 1}'):
        assert thrum.write_managed(path, text, 3)
        assert thrum.seal_of(thrum.file_bytes(path)) == (3, True)
        assert not thrum.write_managed(path, text, 3) and thrum.write_managed(path, text, 4)
        data = thrum.file_bytes(path)
        for at in range(len(data)):     # whatever byte is changed, it is ours no more, or edited
            assert thrum.seal_of(data[:at] + b"~" + data[at + 1:]) in (None, (4, False)), at
        os.unlink(path)
    write(tmp_path / "file", "theirs\n", 0o644)
    assert not thrum.write_managed(path, "thrum-managed\n", 1, force=True) and (tmp_path / "file").read_text() == "theirs\n"
    (tmp_path / "link").symlink_to("file")
    assert not thrum.write_managed(str(tmp_path / "link"), "thrum-managed\n", 1, force=True)


# ---------------------------------------------------------------- claims

@pytest.fixture(scope="module")
def team(tmp_path_factory):
    made = Team(tmp_path_factory.mktemp("guard") / "team")
    made.ada.ok("guard", "install")
    yield made
    made.close()


def claim(repo, name, *paths, note=None):
    """The only claims are these, of an agent; "" for none."""
    with repo.client() as client:
        for row in client.call("agent.list")["agents"]:
            client.call("claim.release", caller_agent_id=row["agent_id"])
        if name and not client.call("session.list", agent_id=name)["sessions"]:
            client.call("agent.register", name=name, role="someone", module="core", force=True)
            client.call("session.start", agent_id=name)
        if name:
            client.call("claim.take", paths=paths, ttl_s=1130, caller_agent_id=name, **({"note": note} if note else {}))


@pytest.fixture
def tree(team):
    """Clean worktrees on the same commit, in which @bob has claimed held/ and held.txt."""
    for repo in (team.ada, team.bob):
        repo.git("reset", "-q", "--hard")
        repo.git("clean", "-qfd")
    for name in ("held/a", "held/b", "held.txt", "free"):
        write(team.ada.path / name, "one\ntwo\nthree\n", 0o644)
    claim(team.ada, "")
    team.ada.git("add", "-A")
    if team.ada.git("status", "--porcelain"):
        team.ada.git("commit", "-q", "--no-verify", "-m", "base")
    team.bob.git("reset", "-q", "--hard", "main")
    claim(team.ada, "bob", "held", "held.txt", note="Rewriting it")
    return team


def stopped(repo, *args, **more):
    """A commit that has to be stopped; what is said."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repo.path, env=CLEAN, capture_output=True, text=True).stdout
    status, text = commit(repo, *args, **more)
    assert status == 1, text
    assert "thrum: the commit was stopped" in text and "@bob" in text
    assert subprocess.run(["git", "rev-parse", "HEAD"], cwd=repo.path, env=CLEAN, capture_output=True, text=True).stdout == head
    return text


def passes(repo, *args, **more):
    assert commit(repo, *args, **more) == (0, "")


def change(repo, name):
    with open(repo.path / name, "a") as file:
        file.write("more\n")


def test_a_commit_on_somebody_elses_claim_is_stopped(tree):
    change(tree.ada, "held/a")
    tree.ada.git("add", ".")
    text = stopped(tree.ada, "-m", "x")
    assert text.splitlines()[1].split() == ["@bob", "held/a"]
    assert "Z (in 18m): Rewriting it" in text and "--to @bob" in text and "THRUM_GUARD=warn git commit" in text
    assert len(text.splitlines()) == 5 and max(map(len, text.splitlines())) <= 80
    report = json.loads(tree.ada.run("guard", "check", "--json", check=thrum.GUARD_STOPS).stdout)
    assert report["checked"] == 1 and [claim["files"] for claim in report["claims"]] == [["held/a"]]


def test_what_one_has_claimed_oneself_passes(tree):
    change(tree.bob, "held/a")
    passes(tree.bob, "-a", "-m", "x")
    claim(tree.ada, "ada", "held")
    stopped_for_bob = commit(tree.bob, "-a", "--allow-empty", "-m", "nothing")
    assert stopped_for_bob == (0, "")
    change(tree.bob, "held/a")
    status, text = commit(tree.bob, "-a", "-m", "x")
    assert status == 1 and "@ada" in text, "the hooks are shared, and each worktree has its own identity"


def test_free_files_pass(tree):
    change(tree.ada, "free")
    change(tree.ada, "held/a")
    tree.ada.git("add", "free")
    passes(tree.ada, "-m", "only what is staged counts")


def test_all_ways_to_commit(tree):
    ada = tree.ada
    change(ada, "held/a")
    change(ada, "free")
    stopped(ada, "-a", "-m", "x")
    stopped(ada, "held/a", "-m", "x")
    assert ada.git("diff", "--cached", "--name-only") == ""
    ada.git("add", "held/a")
    passes(ada, "free", "-m", "the claimed file is staged, but not in this commit")
    stopped(ada, "-m", "x")
    stopped(ada, "--amend", "--no-edit")
    ada.git("reset", "-q", "--hard")
    passes(ada, "--amend", "-m", "another message")
    ada.git("rm", "-q", "held/a")
    assert "held/a" in stopped(ada, "-m", "deleted")
    ada.git("reset", "-q", "--hard")
    ada.git("mv", "held/a", "moved")
    assert "held/a" in stopped(ada, "-m", "renamed away")
    ada.git("reset", "-q", "--hard")
    ada.git("mv", "free", "held/new")
    assert "held/new" in stopped(ada, "-m", "renamed into")
    ada.git("reset", "-q", "--hard")
    (ada.path / "held" / "b").chmod(0o755)
    assert "held/b" in stopped(ada, "-a", "-m", "mode")
    (ada.path / "held" / "b").unlink()
    (ada.path / "held" / "b").symlink_to("a")
    assert "held/b" in stopped(ada, "-a", "-m", "type")


def test_from_a_folder_below(tree):
    change(tree.ada, "held/a")
    done = subprocess.run(["git", "-c", "user.name=T", "-c", "user.email=t@x", "commit", "-qm", "x", "a"], cwd=tree.ada.path / "held",
                          env=CLEAN, capture_output=True, text=True)
    assert done.returncode == 1 and "held/a" in done.stderr


def test_a_first_commit(make_repo):
    repo = make_repo(commit=False)
    repo.join("ada", "planner")
    repo.ok("guard", "install")
    claim(repo, "bob", "held")
    write(repo.path / "held" / "a", "x")
    repo.git("add", "held")
    stopped(repo, "-m", "x")
    repo.git("rm", "-rq", "--cached", "held")
    repo.git("add", ".gitignore")
    passes(repo, "-m", "x")


def test_a_merge_may_take_over_what_the_other_side_did(tree):
    """Only what a merge itself decides is its author's change."""
    ada, bob = tree.ada, tree.bob
    change(bob, "held/a")
    change(bob, "free")
    passes(bob, "-a", "-m", "bob's")
    ada.git("reset", "-q", "--hard")
    write(ada.path / "free", "other\n", 0o644)
    passes(ada, "-a", "-m", "ada's")
    assert subprocess.run(["git", *"-c user.name=T -c user.email=t@x merge -q bob".split()], cwd=ada.path, env=CLEAN,
                          capture_output=True).returncode == 1
    write(ada.path / "free", "both\n", 0o644)
    ada.git("add", "free")
    change(ada, "held/a")
    ada.git("add", "held/a")
    assert "held/a" in stopped(ada, "-m", "merged, and more")
    ada.git("checkout", "-q", "bob", "--", "held/a")
    status, text = commit(ada, "-m", "merged")
    assert (status, text) == (0, "")


def test_a_person_has_no_claims_of_their_own(tree):
    other = tree.ada.worktree("person")
    try:
        change(other, "held/a")
        stopped(other, "-a", "-m", "x")
        shutil.rmtree(other.path / ".thrum", ignore_errors=True)        # also where `setup` never was
        stopped(other, "-a", "-m", "x")
    finally:
        tree.ada.git("worktree", "remove", "--force", str(other.path))
        tree.ada.git("branch", "-q", "-D", "person")


@pytest.mark.parametrize("value, status, words", [
    ("warn", 0, "thrum: this commit touches"), (" WARN ", 0, "@bob"), ("off", 0, ""), ("", 1, "was stopped"), ("stop", 1, "was stopped"),
    ("wran", 1, "THRUM_GUARD is 'wran', not stop, warn or off; it counts as stop"), ("\x1b[2J", 1, "counts as stop")])
def test_thrum_guard(tree, value, status, words):
    change(tree.ada, "held/a")
    done, text = commit(tree.ada, "-a", "-m", "x", env={"THRUM_GUARD": value})
    assert done == status and words in text and (text == "") == (words == "") and "\x1b" not in text
    if status == 0 and words:
        assert "Rewriting it" in text and "Commit all the same" not in text


def test_names_of_all_kinds(tree):
    for name in ODD:
        write(tree.ada.path / "held" / name, "x")
    tree.ada.git("add", "-A")
    text = stopped(tree.ada, "-m", "x")
    assert f"and {len(ODD) - thrum.GUARD_SHOWN} more" in " ".join(text.split())
    claims = json.loads(tree.ada.run("guard", "check", "--json").stdout)["claims"]
    assert sorted(claims[0]["files"]) == sorted("held/" + name for name in ODD)
    claim(tree.ada, "bob", "held/new?line")
    assert "held/new line" in stopped(tree.ada, "-m", "x")


def test_a_name_that_is_no_text_is_left_out_and_said(tree):
    path = os.fsencode(tree.ada.path) + b"/held/\xff\xfe"
    with open(path, "wb"):
        pass
    tree.ada.git("add", "-A")
    status, text = commit(tree.ada, "-m", "x")
    assert status == 0 and text == "thrum: 1 of the files was not checked: its name is not UTF-8\n"
    tree.ada.git("reset", "-q", "--soft", "HEAD~1")
    change(tree.ada, "held/a")
    tree.ada.git("add", "-A")
    assert "was not checked" in stopped(tree.ada, "-m", "x")


def test_five_thousand_files(tree):
    for n in range(5000):
        write(tree.ada.path / ("held" if n % 2 else "more") / f"a-file-with-quite-a-long-name-{n:05}", "")
    tree.ada.git("add", "-A")
    text = stopped(tree.ada, "-m", "x")
    assert f"and {2500 - thrum.GUARD_SHOWN:} more" in " ".join(text.split()) and text.count("@bob") == 2
    claim(tree.ada, "bob", "elsewhere")
    passes(tree.ada, "-m", "x")


def test_settings_of_the_user_do_not_hide_a_file(tree):
    settings = {"diff.renames": "copies", "diff.noprefix": "true", "diff.relative": "true", "core.quotePath": "true",
                "diff.external": "false", "color.ui": "always", "status.relativePaths": "true", "diff.orderFile": "/dev/null"}
    for key, value in settings.items():
        tree.ada.git("config", key, value)
    try:
        tree.ada.git("mv", "held/a", "ü")
        assert "held/a" in stopped(tree.ada, "-m", "x")
    finally:
        for key in settings:
            tree.ada.git("config", "--unset", key)


# ---------------------------------------------------------------- without us

def warned(repo, *args, **more):
    """A commit that has to pass with one line of warning; the line."""
    status, text = commit(repo, *args, **more)
    assert status == 0, text
    assert text.startswith("thrum: claims were not checked, and the commit goes on: ") and text.count("\n") == 1, text
    return text


@contextlib.contextmanager
def restored(path):
    """A file that a test damages is as before afterwards."""
    data, mode = path.read_bytes(), path.stat().st_mode
    try:
        yield
    finally:
        path.write_bytes(data)
        path.chmod(mode)


def test_without_a_daemon_a_commit_passes_and_starts_none(tree):
    change(tree.ada, "held/a")
    tree.ada.ok("daemon", "stop")
    try:
        assert warned(tree.ada, "-a", "-m", "x").endswith(": the daemon is not running; 'thrum daemon start' starts it\n")
        assert not (tree.ada.var / "thrum.sock").exists()
        change(tree.ada, "held/a")
        assert commit(tree.ada, "-a", "-m", "x", env={"THRUM_GUARD": "off"}) == (0, "")
        (tree.ada.var / "stopped").unlink()         # it might be started, but a commit does not wait for that
        change(tree.ada, "held/a")
        warned(tree.ada, "-a", "-m", "x")
        assert not (tree.ada.var / "thrum.sock").exists()
    finally:
        tree.ada.ok("daemon", "start")


def test_a_daemon_that_hangs_delays_a_commit_a_little(tree):
    change(tree.ada, "held/a")
    os.kill(tree.ada.pid(), signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert warned(tree.ada, "-a", "-m", "x").endswith(": the daemon does not answer; try 'thrum daemon restart'\n")
        assert time.monotonic() - began < 2 * thrum.GUARD_S + 4
    finally:
        os.kill(tree.ada.pid(), signal.SIGCONT)


def test_a_damaged_identity(tree):
    change(tree.ada, "held/a")
    with restored(tree.ada.path / ".thrum" / "identities" / "ada.json"):
        (tree.ada.path / ".thrum" / "identities" / "ada.json").write_bytes(b"{")
        assert "damaged" in warned(tree.ada, "-a", "-m", "x")
    change(tree.ada, "held/a")
    assert "THRUM_NAME is 'ghost'" in warned(tree.ada, "-a", "-m", "x", env={"THRUM_NAME": "ghost"})


def test_an_installation_that_has_gone_stops_nobody(tree):
    ada, copy = tree.ada, tree.ada.path / ".thrum" / "bin" / "thrum.py"
    for data in (b"import nothing_of_that_name\n", b"def (\n", b"raise SystemExit(1)\n", b"import os; os.kill(os.getpid(), 9)\n"):
        with restored(copy):
            copy.write_bytes(data)
            os.utime(copy, (1, 1))
            change(ada, "held/a")
            assert commit_quietly(ada) == 0, data
    aside = ada.path / ".thrum-aside"
    (ada.path / ".thrum").rename(aside)
    try:
        change(ada, "held/a")
        passes(ada, "-a", "-m", "x")
    finally:
        aside.rename(ada.path / ".thrum")
    change(ada, "held/a")
    stopped(ada, "-a", "-m", "x")


def commit_quietly(repo):
    """The status of a commit, whatever is said: a program that cannot even begin has words of its own."""
    return subprocess.run(["git", *"-c user.name=T -c user.email=t@x commit -qam x".split()], cwd=repo.path, env=CLEAN,
                          capture_output=True, timeout=END_S).returncode


FOREIGN = "#!/bin/sh\necho run >&2\nexit 3\n"


@pytest.mark.parametrize("how", ["launcher", "program", "link", "redirect", "other case", "in the main worktree", "no repository"])
def test_what_a_branch_holds_is_not_run(make_repo, how, tmp_path):
    """`.thrum` is ignored, so that a checkout replaces what lies there without a word: the hook runs nothing of it."""
    repo = make_repo()
    repo.join("ada", "planner")
    repo.ok("guard", "install")
    at, path = repo, repo.path
    if how in ("redirect", "in the main worktree"):
        at = repo.worktree("bob")
        at.join("bob", "implementer")
        path = at.path if how == "redirect" else repo.path
    tree = Repo(path, repo)
    tree.git("checkout", "-q", "-b", "stranger")
    names = {"launcher": ".thrum/bin/thrum", "program": ".thrum/bin/thrum.py", "redirect": ".thrum/redirect",
             "other case": ".Thrum/bin/thrum", "in the main worktree": ".thrum/bin/thrum.py"}
    if how in names:
        target = path / names[how].replace(".Thrum", ".thrum")
        before = target.read_bytes()
        target.write_text(str(tmp_path) if how == "redirect" else "import os; os.write(2, b'run'); os._exit(3)\n"
                          if names[how].endswith(".py") else FOREIGN)
        blob = tree.git("hash-object", "-w", str(target)).strip()
        tree.git("update-index", "--add", "--cacheinfo", f"100755,{blob},{names[how]}")
    elif how == "link":
        (path / ".thrum").rename(path / "aside")
        write(path / "tools" / "bin" / "thrum", FOREIGN)
        (path / ".thrum").symlink_to("tools")
        tree.git("add", "-f", ".thrum", "tools")
    else:
        at = repo.worktree("bob")
        at.join("bob", "implementer")
        (at.path / ".thrum" / "redirect").write_text(f"{tmp_path}/.thrum\n")
        write(tmp_path / ".thrum" / "bin" / "thrum.py", "import os; os.write(2, b'run'); os._exit(3)\n")
    if how == "in the main worktree":       # however it is written
        (at.path / ".thrum" / "redirect").write_text(f"{path}/.thrum/")
    said = "thrum: claims were not checked, and the commit goes on: git tracks .thrum, and what a branch holds is not run\n"
    assert commit(at, "--allow-empty", "-m", "x") == (0, said)
    assert commit(at, "--allow-empty", "-m", "x", env={"GIT_LITERAL_PATHSPECS": "1"}) == (0, said)
    if how == "link":
        (path / ".thrum").unlink()
        (path / "aside").rename(path / ".thrum")
    elif how in names:          # and back on a branch of one's own, the guard is there again
        target.write_bytes(before)
        tree.git("rm", "-qf", "--cached", names[how])
        at.ok("setup") if at is not repo else None
        assert commit(at, "--allow-empty", "-m", "x", env={"GIT_LITERAL_PATHSPECS": "1"}) == (0, "")


# ---------------------------------------------------------------- the trailer

@pytest.fixture
def talk(tree):
    """@bob has answered @ada in a thread, in a new session; the thread's id."""
    claim(tree.ada, "")
    tree.bob.ok("session", "start")
    asked = tree.mail("How?")
    return tree, tree.bob.json("reply", asked, "So.")["thread_id"]


def trailers(repo, ref="HEAD"):
    return repo.git("log", "-1", "--format=%(trailers:only,unfold)", ref).strip().splitlines()


def both(thread, name="bob"):
    return [f"Thrum-Thread: {thread}", f"Thrum-Agent: {name}"]


def editor(tmp_path, text):
    """A GIT_EDITOR that runs a line of sh on the file `$1`."""
    write(tmp_path / "editor", f"#!/bin/sh\n{text}\n")
    return {"GIT_EDITOR": str(tmp_path / "editor")}


def test_a_commit_names_its_conversation(talk, tmp_path):
    team, thread = talk
    bob = team.bob
    passes(bob, "--allow-empty", "-m", "Subject", "-m", "Body.")
    assert trailers(bob) == both(thread)
    assert bob.git("log", "-1", "--format=%B").startswith("Subject\n\nBody.\n\nThrum-Thread: ")
    write(tmp_path / "message", "Subject\n---\nnot a patch\n")
    passes(bob, "--allow-empty", "-F", str(tmp_path / "message"))
    assert trailers(bob) == both(thread)
    assert "---\nnot a patch\n" in bob.git("log", "-1", "--format=%B")
    passes(bob, "--allow-empty", "-s", "-m", "x")
    assert trailers(bob) == ["Signed-off-by: Test <test@localhost>", *both(thread)]
    passes(bob, "--allow-empty", "--no-verify", "-m", "x")
    assert trailers(bob) == both(thread)
    passes(bob, "--allow-empty", "-m", "x", env={"THRUM_GUARD": "off"})
    assert trailers(bob) == []


def test_trailers_that_the_user_has_configured_are_not_run(talk, tmp_path):
    """`git commit` would not run them either; what git counts as a trailer stays its own answer."""
    team, thread = talk
    bob = team.bob
    settings = {"trailer.Auto.command": f"touch {tmp_path}/ran; echo v", "trailer.Other.cmd": f"touch {tmp_path}/ran; echo w",
                "trailer.Ticket.key": "Ticket: ", "trailer.where": "start"}
    for key, value in settings.items():
        bob.git("config", key, value)
    try:
        for text, expected in (
                ("x", "x\n\n{}"), ("fix: one line", "fix: one line\n\n{}"),
                ("x\n\nText: of some\nmore.", "x\n\nText: of some\nmore.\n\n{}"),
                ("x\n\nTicket: 7", "x\n\nTicket: 7\n{}"), ("x\n\nA-b: c\n  d", "x\n\nA-b: c\n  d\n{}"),
                ("x\n\na\rb", "x\n\na\nb\n\n{}"), ("x\n\nsame\n\nsame  \n\n# said\n\n", "x\n\nsame\n\nsame\n\n{}"),
                ("x\n\nTHRUM-AGENT: me", "x\n\nTHRUM-AGENT: me\n" + both(thread)[0])):
            passes(bob, "--allow-empty", "--cleanup=strip", "-F", "-", input=text)
            assert bob.git("log", "-1", "--format=%B").rstrip("\n") == expected.format("\n".join(both(thread))), text
    finally:
        for key in settings:
            bob.git("config", "--unset", key)
    assert not (tmp_path / "ran").exists()


def test_an_amended_commit_keeps_its_first_conversation(talk):
    team, thread = talk
    bob = team.bob
    passes(bob, "--allow-empty", "-m", "x")
    other = bob.json("reply", team.mail("And this?"), "So too.")["thread_id"]
    assert other != thread
    for more in (("--no-edit",), ("-m", "y", "-m", "\n".join(both(thread))), ("-C", "HEAD")):
        passes(bob, "--allow-empty", "--amend", *more)
        assert trailers(bob) == both(thread), more
    passes(bob, "--allow-empty", "-m", "next")
    assert trailers(bob) == both(other)


def test_merge_and_squash(talk, tmp_path):
    team, thread = talk
    bob = team.bob
    team.ada.git("checkout", "-q", "-B", "side")
    change(team.ada, "free")
    team.ada.git("commit", "-qam", "side", "--no-verify")
    team.ada.git("checkout", "-q", "main")
    bob.git("-c", "core.editor=true", "merge", "-q", "--no-ff", "side")
    assert trailers(bob) == both(thread) and "Merge branch" in bob.git("log", "-1", "--format=%s")
    bob.git("reset", "-q", "--hard", "HEAD~1")
    bob.git("merge", "-q", "--squash", "side")
    passes(bob, env=editor(tmp_path, ":"))
    assert trailers(bob) == both(thread) and "Squashed" in bob.git("log", "-1", "--format=%s")


def test_an_editor_that_writes_nothing_still_stops_the_commit(talk, tmp_path):
    """What begins empty, or from a template, gets no trailer: git is to see that nothing was written."""
    team, thread = talk
    bob = team.bob
    head = bob.git("rev-parse", "HEAD")
    template = tmp_path / "template"
    template.write_text("Ticket:\n")
    for args in ((), ("-v",), ("-e", "-m", ""), ("-m", ""), ("-e", "-m", "# only a comment"), ("-t", str(template))):
        status, text = commit(bob, "--allow-empty", *args, env=editor(tmp_path, ":"))
        assert status == 1 and "bort" in text, (args, text)
        assert bob.git("rev-parse", "HEAD") == head
    passes(bob, "--allow-empty", "-t", str(template), env=editor(tmp_path, 'echo words >> "$1"'))
    assert trailers(bob) == []
    passes(bob, "--allow-empty", env=editor(tmp_path, 'echo words > "$1"'))
    assert trailers(bob) == []
    change(bob, "free")
    passes(bob, "-a", "-v", "-e", "-m", "words", env=editor(tmp_path, 'grep -q "^Thrum-Agent: bob" "$1"'))
    assert trailers(bob) == both(thread)
    status, text = commit(bob, "--allow-empty", "-e", "-m", "words", env=editor(tmp_path, ': > "$1"'))
    assert status == 1 and "bort" in text


def test_a_session_that_names_a_thread(talk):
    team, thread = talk
    bob = team.bob
    with bob.client() as client:
        assert client.call("session.thread", caller_agent_id="bob")["thread_id"] == thread
        bob.ok("session", "heartbeat", "--add-ref", "thread:thr_OTHER")
        assert client.call("session.thread", caller_agent_id="bob")["thread_id"] == "thr_OTHER"
        bob.ok("session", "heartbeat", "--add-ref", f"thread:{thread}")
        assert client.call("session.thread", caller_agent_id="bob")["thread_id"] == thread, "the one in which somebody spoke last"
        bob.ok("session", "start")
        assert client.call("session.thread", caller_agent_id="bob") == {}, "an answer of an earlier session is over"
        assert client.call("session.thread", caller_agent_id="nobody") == {}
    passes(bob, "--allow-empty", "-m", "x")
    assert trailers(bob) == []
    passes(team.ada, "--allow-empty", "-m", "who has only asked")
    assert trailers(team.ada) == []


def test_a_hung_or_absent_daemon_adds_nothing_and_says_nothing_twice(talk):
    team, thread = talk
    team.ada.ok("daemon", "stop")
    try:
        change(team.bob, "free")
        warned(team.bob, "-a", "-m", "x")
        assert commit(team.bob, "--allow-empty", "--no-verify", "-m", "x") == (0, "")
        assert trailers(team.bob) == []
    finally:
        team.ada.ok("daemon", "start")


def test_commits_that_are_made_once_more_keep_what_they_have(talk, tmp_path):
    """A rebase and a cherry-pick run the hook too, for what somebody wrote elsewhere."""
    team, thread = talk
    bob = team.bob
    bob.git("checkout", "-q", "-B", "work")
    for n in (1, 2):
        write(bob.path / f"new{n}", "x")
        bob.git("add", "-A")
        passes(bob, "-m", f"old {n}", env={"THRUM_GUARD": "off"})
    bob.git("checkout", "-q", "bob")
    passes(bob, "--allow-empty", "-m", "on")
    bob.git("cherry-pick", "work~1")
    assert bob.git("log", "-1", "--format=%s").strip() == "old 1" and trailers(bob) == []
    bob.git("reset", "-q", "--hard", "HEAD~1")
    bob.git("checkout", "-q", "work")
    bob.git("rebase", "-q", "--no-ff", "bob")
    assert bob.git("log", "-2", "--format=%s").split("\n")[:2] == ["old 2", "old 1"]
    assert trailers(bob) == trailers(bob, "HEAD~1") == [] and trailers(bob, "HEAD~2") == both(thread)
    bob.git("revert", "--no-edit", "HEAD")
    assert trailers(bob) == both(thread), "to take back is a new decision"
    bob.git("checkout", "-q", "bob")
    bob.git("branch", "-q", "-D", "work")
