"""`init` in full, its removal, `setup` and `migrate`, in real repositories (command line contract, 3.1, 3.3, 3.5)."""

import json
import marshal
import os
import pty
import shutil
import stat
import sys
import time
from importlib.util import cache_from_source
from pathlib import Path

import pytest

import thrum
from conftest import QUICK, SCRIPT, THRUM, Repo
from team import END_S, confined, error_line, finish, script, start

pytestmark = pytest.mark.slow


def snapshot(*folders):
    """Everything below folders, git's own included: path -> (type and mode, bytes or target of a link); times do not count."""
    found = {}
    for folder in folders:
        for path in [folder, *folder.rglob("*")]:
            mode = path.lstat().st_mode
            content = path.read_bytes() if stat.S_ISREG(mode) else os.readlink(path) if stat.S_ISLNK(mode) else b""
            found[str(path)] = stat.filemode(mode), content
    return found


def changed(before, after):
    """What differs between two snapshots, to be read in a failure."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


# ---------------------------------------------------------------- init

def everything(folder):
    """Each file and directory below a folder, but not what git keeps for itself."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))
            if ".git" not in path.relative_to(folder).parts[:1]}


def branches(repo):
    return repo.git("for-each-ref", "--format=%(refname)"), repo.git("worktree", "list").count("\n")


def test_init(make_repo):
    """The first makes everything, the second nothing; a setting of the user's and an edited ignore file survive (contract, 13 and 14)."""
    repo = make_repo()
    (repo.path / ".gitignore").write_text("mine")
    sub = repo.path / "a" / "b"
    sub.mkdir(parents=True)
    out = repo.ok("init", cwd=sub)
    assert "✓ Thrum initialized successfully" in out and "daemon.local_only" in out and not list(sub.iterdir())
    for name in (".thrum/identities", ".thrum/var", ".git/thrum-sync/a-sync/events.jsonl", ".git/thrum-sync/a-sync/messages"):
        assert (repo.path / name).exists(), name
    ignored = (repo.path / ".gitignore").read_text()
    assert ignored.startswith("mine\n") and ".thrum/\n" in ignored
    assert repo.git("status", "--porcelain").split() == ["??", ".gitignore"]
    config = repo.path / ".thrum/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "theirs": {"x": 1}}))
    before, refs = config.read_bytes(), branches(repo)
    for command in (repo.command(), SCRIPT):
        done = repo.run("init", command=command, check=0)
        assert "initialized already" in done.stdout and "nothing was overwritten" in done.stdout and not done.stderr
    assert (config.read_bytes(), (repo.path / ".gitignore").read_text(), branches(repo)) == (before, ignored, refs)
    (repo.path / ".thrum/bin/thrum").unlink()
    script(repo, "init", check=0)
    assert repo.ok("inbox", "--help"), "init mends what is missing"


def test_init_in_a_linked_worktree(make_repo):
    """Before the main one it says what to do and leaves nothing; after it, a redirect; `setup` does the same (contract, 11 and 79)."""
    repo = make_repo("main repo")
    other, third = repo.worktree("other"), repo.worktree("third")
    before = everything(other.path)
    text = error_line(other.run("init"))
    assert text.startswith("this is a git worktree, but the main repo") and str(repo.path) in text
    error_line(other.run("setup"))
    assert everything(other.path) == before
    repo.ok("init")
    out = other.ok("init")
    assert "✓ Worktree detected — set up redirect to main repo" in out and str(repo.path) in out
    assert (other.path / ".thrum/redirect").read_text().strip() == str(repo.path / ".thrum")
    assert not (other.path / ".thrum/var").exists() and not other.git("status", "--porcelain")
    assert "already" in other.ok("init")
    out = script(third, "setup", check=0).stdout
    assert "Connected to daemon" in out and "✓ Thrum worktree setup complete" in out
    assert (third.path / ".thrum/redirect").read_text() == f"{repo.path}/.thrum\n"
    assert third.launcher.exists() and not third.git("status", "--porcelain")
    assert error_line(repo.run("setup")).startswith("cannot setup redirect to self — this is the main repo")
    assert "'thrum setup PATH' connects a linked worktree" in error_line(repo.run("setup"))


def test_a_redirect_by_hand(make_repo):
    """A hand-written redirect without a newline is enough for quickstart (contract, 5); one that leads nowhere is named."""
    repo = make_repo()
    repo.ok("init")
    other = repo.worktree("other")
    (other.path / ".thrum").mkdir()
    redirect = other.path / ".thrum/redirect"
    redirect.write_text(str(repo.path / ".thrum"))
    assert script(other, "quickstart", "--name", "by-hand", "--role", "implementer", "--module", "main").returncode == 0
    assert "by-hand" in repo.ok("agent", "list")
    for bad in ("/nowhere/.thrum", ".thrum", "", str(other.path / ".thrum")):
        redirect.write_text(bad)
        assert str(other.path) in error_line(other.run("inbox")), bad
    assert repo.pid()


def test_init_outside_of_git(tmp_path):
    """Nothing is left where there is no repository (contract, 15)."""
    for words in ("init", "setup", "quickstart --name a --role b --module c", "inbox", "whoami", "daemon start"):
        done = Repo(tmp_path).run(*words.split())
        assert "git" in error_line(done), words
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["init", "quickstart --name a --role b --module c"])
@pytest.mark.parametrize("shut", [".", ".git", ".git/refs/heads"])
def test_init_where_nothing_may_be_written(make_repo, words, shut):
    """A directory that cannot be written: one line, and not a byte left behind, in the tree or in git."""
    command = confined(*QUICK)
    if not command:
        pytest.skip("no setpriv, and root may write everywhere")
    repo = make_repo()
    before, refs = everything(repo.path), branches(repo)
    (repo.path / shut).chmod(0o555)
    try:
        error_line(repo.run(*words.split(), command=command))
    finally:
        (repo.path / shut).chmod(0o755)
    assert everything(repo.path) == before
    assert branches(repo) == refs and not (repo.path / ".git/thrum-sync/a-sync").exists()


def test_init_where_a_file_is_in_the_way(make_repo):
    """A file named .thrum is not ours to remove."""
    repo = make_repo()
    (repo.path / ".thrum").write_text("keep me")
    before = everything(repo.path)
    for words in ("init", "quickstart --name a --role b --module c"):
        assert ".thrum" in error_line(repo.run(*words.split())), words
    error_line(repo.run("inbox"))
    assert everything(repo.path) == before


def test_without_git(make_repo, tmp_path):
    """No git on the PATH is said so, and nothing is begun."""
    repo = make_repo()
    before = everything(repo.path)
    (tmp_path / "bin").mkdir()
    assert "git was not found" in error_line(repo.run("init", env={"PATH": str(tmp_path / "bin")}))
    assert everything(repo.path) == before


@pytest.mark.parametrize("name", ["n\u00a0b\u202fspace", "quote'\"$(x)`\\", "line\nend", os.fsdecode(b"latin\xe9"),
                                  "deep/" * 30 + "path-" * 20],
                         ids=["no-break space", "quotes", "newline", "not UTF-8", "300 characters"])
def test_any_path(make_repo, name):
    """Whatever the directory is called: join, send to oneself's group, read, by launcher."""
    repo = make_repo(name)
    repo.join("ada")
    other = Repo(repo.path)
    repo.ok("agent", "register", "--name", "zoe", "--role", "tester", "--module", "m")
    other.ok("send", "hi", "--to", "@zoe", env={"THRUM_NAME": "ada"})
    assert "  hi\n" in repo.ok("inbox", env={"THRUM_NAME": "zoe"})
    assert repo.json("daemon", "status")["running"] is True


def test_init_undoes_a_first_run_that_fails(make_repo):
    """An ignore file of the user's gets its bytes and its mode back, and git has nothing new."""
    command = confined(*QUICK)
    if not command:
        pytest.skip("no setpriv, and root may write everywhere")
    repo = make_repo()
    ignore = repo.path / ".gitignore"
    ignore.write_bytes(b"mine")
    ignore.chmod(0o640)
    heads = repo.path / ".git/refs/heads"
    heads.chmod(0o555)
    before = snapshot(repo.path)
    error_line(repo.run("init", command=command))
    after = snapshot(repo.path)
    heads.chmod(0o755)
    assert all("/.git/objects/" in path for path in changed(before, after)), "an object that no ref names is git's to remove"
    assert stat.S_IMODE(ignore.stat().st_mode) == 0o640


def test_a_failed_init_removes_only_what_it_made(make_repo, monkeypatch):
    """Where only .thrum was lost, a first run that fails leaves the log that git's directory holds."""
    repo = make_repo()
    repo.join("ada")
    repo.close()
    shutil.rmtree(repo.path / ".thrum")
    before = snapshot(repo.path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(thrum, "install_copy", full)
    with pytest.raises(thrum.ThrumError, match="No space left"):
        thrum.initialize(str(repo.path))
    assert not changed(before, snapshot(repo.path))


def broken(repo):
    """Ways in which an installation can be half made: what is done to it, and what `init` says that it has mended."""
    local, sync = repo.path / ".thrum", repo.path / ".git/thrum-sync/a-sync"

    def plain():
        shutil.rmtree(sync)
        sync.mkdir()
        (sync / "note.txt").write_text("keep")
    return {
        "no var": (lambda: shutil.rmtree(local / "var"), "Mended: .thrum/var/"),
        "no identities": (lambda: shutil.rmtree(local / "identities"), "Mended: .thrum/identities/"),
        "no bin": (lambda: shutil.rmtree(local / "bin"), "Installed: .thrum/bin/thrum"),
        "no launcher": (lambda: (local / "bin/thrum").unlink(), "Mended: .thrum/bin/thrum"),
        "an edited launcher": (lambda: (local / "bin/thrum").write_text("#!/bin/sh"), "Mended: .thrum/bin/thrum"),
        "no copy": (lambda: (local / "bin/thrum.py").unlink(), "Installed: .thrum/bin/thrum"),
        "no version": (lambda: (local / "schema_version").unlink(), "Mended: .thrum/schema_version"),
        "no config": (lambda: (local / "config.json").unlink(), "Mended: .thrum/config.json"),
        "no ignore file": (lambda: (repo.path / ".gitignore").unlink(), "Updated: .gitignore"),
        "no branch": (lambda: repo.git("update-ref", "-d", "refs/heads/a-sync"), "Created: a-sync branch"),
        "no worktree": (lambda: shutil.rmtree(sync), "Mended: the worktree of a-sync"),
        "a plain directory": (plain, "Mended: the worktree of a-sync"),
        "a file in its place": (lambda: (shutil.rmtree(sync), sync.write_text("keep")), "Mended: the worktree of a-sync"),
        "no entry": (lambda: shutil.rmtree(repo.path / ".git/worktrees/a-sync"), "Mended: the worktree of a-sync"),
        "an entry without HEAD": (lambda: (repo.path / ".git/worktrees/a-sync/HEAD").unlink(), "Mended: the worktree of a-sync"),
        "no events": (lambda: (sync / "events.jsonl").unlink(), ""),
        "no messages": (lambda: shutil.rmtree(sync / "messages"), ""),
        "a dangling redirect": (lambda: (local / "redirect").write_text("/nowhere/.thrum"), "Removed: .thrum/redirect"),
        "a redirect to itself": (lambda: (local / "redirect").write_text(str(local)), "Removed: .thrum/redirect"),
        "nothing but .thrum": (lambda: [shutil.rmtree(path) if path.is_dir() else path.unlink() for path in local.iterdir()],
                               "Mended: .thrum/bin/"),
    }


def test_init_mends_what_is_missing(make_repo):
    """Each piece of an installation may be missing or damaged: init says what it mended, once; mail and settings stay."""
    repo = make_repo()
    repo.join("ada")
    stale = repo.worktree("stale")
    shutil.rmtree(stale.path)       # as on a disk that is not mounted: what git knows about it is not ours to forget
    for name, (damage, words) in broken(repo).items():
        repo.close()
        damage()
        foretold = thrum.initialize(str(repo.path), dry=True)[1]
        first = script(repo, "init", check=0)
        assert words in first.stdout and "fatal" not in first.stdout + first.stderr, (name, first.stdout, first.stderr)
        assert all(line in first.stdout for line in foretold), (name, foretold, first.stdout)
        assert thrum.initialize(str(repo.path), dry=True)[1] == [], name
        env = {"THRUM_AGENT_ID": "ada"}
        repo.ok("send", f"after {name}", "--to", "@ada", env=env)
    texts = [message["body"]["content"] for message in repo.json("sent", "--limit", "100", env=env)["messages"]]
    assert texts == [f"after {name}" for name in reversed(broken(repo))]
    assert (repo.path / ".git/worktrees/stale/HEAD").exists()
    kept = list((repo.path / ".git/thrum-sync").glob("a-sync.old*"))
    assert sorted(path.name for folder in kept for path in [folder, *folder.rglob("*")] if path.is_file()) == ["a-sync.old~", "note.txt"]


def test_init_after_the_repository_was_moved_or_copied(make_repo, tmp_path):
    """The worktree of the branch is remade for the new place; what was not committed there comes along, and the copy is on its own."""
    repo = make_repo()
    repo.join("ada")
    repo.ok("send", "before", "--to", "@ada")
    repo.ok("daemon", "stop")
    shutil.copytree(repo.path, tmp_path / "copy", symlinks=True)
    shutil.rmtree(tmp_path / "copy/.thrum/var")
    before = snapshot(repo.path)
    copy = Repo(tmp_path / "copy")
    try:
        assert "Mended: the worktree of a-sync" in script(copy, "init", check=0).stdout
        assert [message["body"]["content"] for message in copy.json("sent")["messages"]] == ["before"]
        assert str(tmp_path / "copy") in (copy.path / ".git/worktrees/a-sync/gitdir").read_text()
    finally:
        copy.close()
    assert not changed(before, snapshot(repo.path))


@pytest.mark.parametrize(("how", "kept"), [
    ([], True), (["-c", "import sys, thrum; sys.exit(thrum.main(sys.argv[2:]))"], True), (["-O"], False), (["just saved"], False)])
def test_init_leaves_bytecode(make_repo, tmp_path, how, kept):
    """What runs `init` is compiled already: the daemon starts from that, unless it may be another program than the copy."""
    repo, program = make_repo(), tmp_path / "thrum.py"
    just_saved = how == ["just saved"] and how.pop()
    program.write_text(THRUM.read_text().replace("\nCOMPILE_S = 5 ", f"\nCOMPILE_S = {5 if just_saved else -600} "))
    repo.run("init", command=[sys.executable, *how, str(program)], env={"PYTHONPATH": str(tmp_path)}, check=0)
    copy = repo.path / ".thrum/bin/thrum.py"
    cache = Path(cache_from_source(str(copy)))
    before = cache.read_bytes()
    # The import system puts another file in its place when it does not accept this one, and that names the copy.
    assert marshal.loads(before[16:]).co_filename == str(program if kept else copy)
    assert repo.json("version")["path"] == str(copy) and cache.read_bytes() == before


def test_init_without_room_for_bytecode(make_repo):
    """A cache that cannot be written stops nothing."""
    repo = make_repo()
    repo.ok("init")
    copy = repo.path / ".thrum/bin/thrum.py"
    copy.unlink()
    shutil.rmtree(copy.parent / "__pycache__")
    (copy.parent / "__pycache__").write_text("mine")
    assert "Installed" in script(repo, "init", check=0).stdout
    assert repo.ok("status") and (copy.parent / "__pycache__").read_text() == "mine"


def test_init_force(make_repo):
    """`--force` replaces a copy of a higher version and restarts its daemon, puts missing settings back, and loses nothing."""
    repo = make_repo()
    repo.join("ada")
    repo.ok("send", "kept", "--to", "@ada")
    copy = repo.path / ".thrum/bin/thrum.py"
    copy.write_text(THRUM.read_text().replace(f'__version__ = "{thrum.__version__}"', '__version__ = "99.0"'))
    repo.ok("daemon", "restart")
    assert repo.json("daemon", "status")["version"] == "99.0"
    config = repo.path / ".thrum/config.json"
    config.write_text('{"daemon": {"ws_port": "7000"}, "theirs": [1]}')
    pid, identity = repo.pid(), (repo.path / ".thrum/identities/ada.json").read_bytes()
    assert "nothing was overwritten" in script(repo, "init", check=0).stdout and repo.pid() == pid
    assert json.loads(config.read_text()) == {"daemon": {"ws_port": "7000"}, "theirs": [1]}
    out = script(repo, "init", "--force", check=0).stdout
    assert "initialized" in out and "Installed: .thrum/bin/thrum" in out and "fatal" not in out
    assert copy.read_bytes() == THRUM.read_bytes() and repo.json("daemon", "status")["version"] == thrum.__version__
    assert json.loads(config.read_text()) == {
        "daemon": {"ws_port": "7000", "local_only": True, "sync_interval": 60}, "theirs": [1]}
    assert repo.json("sent")["messages"][0]["body"]["content"] == "kept"
    assert (repo.path / ".thrum/identities/ada.json").read_bytes() == identity
    pid = repo.pid()
    assert "initialized" in repo.ok("init", "--force") and repo.pid() == pid, "nothing to replace, nothing to restart"


def test_init_stealth(make_repo):
    """The tree shows nothing, and a later plain init keeps it so; a .gitignore that is a link is not written through."""
    repo = make_repo()
    assert "Updated: .git/info/exclude (stealth mode)" in repo.ok("init", "--stealth")
    assert ".gitignore" not in repo.ok("init") and repo.git("status", "--porcelain") == ""
    assert not (repo.path / ".gitignore").exists()
    other, target = make_repo("other"), make_repo("target").path / "file"
    target.write_text("theirs")
    (other.path / ".gitignore").symlink_to(target)
    assert "stealth" in other.ok("init")
    assert target.read_text() == "theirs" and (other.path / ".gitignore").is_symlink()


def test_init_dry_run(make_repo):
    """What would be done, one step on a line, in the words of the real run; nothing is touched or started."""
    repo = make_repo()
    linked = repo.worktree("linked")
    before = snapshot(repo.path, linked.path)
    lines = repo.ok("init", "--dry-run", "--runtime", "codex", "--agent-role", "tester").splitlines()
    assert lines[0] == "Created: .thrum/ directory structure" and lines[-2:] == ["Daemon started", "Agent registered"]
    assert repo.json("init", "--dry-run", "--runtime", "codex", "--agent-role", "tester")["would"] == lines
    assert not changed(before, snapshot(repo.path, linked.path))
    out = repo.ok("init", "--runtime", "codex")
    assert all(line in out for line in lines[:-1]), out
    before = snapshot(linked.path)
    assert linked.ok("init", "--dry-run").splitlines() == [f"Redirect: .thrum/redirect → {repo.path}/.thrum", "Updated: .git/info/exclude"]
    assert not changed(before, snapshot(linked.path))
    before = snapshot(repo.path)
    lines = repo.ok("init", "--remove", "--dry-run", "--yes").splitlines()
    assert not [path for path in changed(before, snapshot(repo.path)) if "/.thrum/var/" not in path] and repo.pid()
    out = repo.ok("init", "--remove", "--yes")
    assert all(line in out for line in lines), out


def test_init_runtime(make_repo):
    """A runtime is checked before anything is done, and kept in the settings; its own settings are not touched (contract, 80)."""
    repo = make_repo()
    settings = repo.path / ".claude/settings.json"
    settings.parent.mkdir()
    settings.write_text("{}")
    before = snapshot(repo.path)
    text = error_line(repo.run("init", "--runtime", "emacs"))
    assert text == 'unknown runtime "emacs"; supported: claude, codex, cursor, gemini, auggie, cli-only, all'
    for words in (["--agent-name", "Bad Name"], ["--agent-role", "a b"], ["--yes"], ["--agent-module", "a\tb"]):
        error_line(repo.run("init", *words))
    assert not changed(before, snapshot(repo.path))
    assert "✓ Runtime saved to .thrum/config.json (primary: auggie)" in repo.ok("init", "--runtime", "auggie")
    assert json.loads((repo.path / ".thrum/config.json").read_text())["runtime"] == {"primary": "auggie"}
    repo.ok("init", "--runtime", "claude", "--force")
    assert settings.read_text() == "{}"
    repo.ok("init", "--runtime", "auggie")
    assert "Runtime" not in repo.ok("init", "--runtime", "auggie") and "primary: amp" in repo.ok("init", "--runtime", "amp")


def test_init_registers_an_agent(make_repo):
    """Only where one is named: with the defaults of the contract, and as quickstart does; in a linked worktree too."""
    repo = make_repo()
    repo.git("checkout", "-q", "-b", "Feature/Größe--x_")
    assert repo.json("init")["done"] and not list((repo.path / ".thrum/identities").iterdir())
    value = repo.json("init", "--agent-role", "reviewer")
    assert value["register"]["agent_id"] == "reviewer_feature_gr_e--x" and value["intent"]["intent"] == "Review code and PRs in repo"
    who = repo.json("whoami")
    assert (who["role"], who["module"], who["display"]) == ("reviewer", "main", "Reviewer (main)")
    assert who["session_id"] == value["session"]["session_id"] and who["source"] == "daemon"
    out = repo.ok("init", "--agent-module", "core")         # the identity that is there goes on
    assert "✓ Agent registered: reviewer_feature_gr_e--x" in out and "✓ Session started: ses_" in out and "✓ Intent set" in out
    assert repo.json("whoami")["module"] == "core"
    linked = repo.worktree("linked")
    assert "✓ Agent registered: zoe" in linked.ok("init", "--agent-name", "zoe")
    assert linked.json("whoami")["role"] == "implementer"
    env = {"THRUM_NAME": "eve"}
    done = linked.run("init", "--agent-name", "adam", env=env, check=0)
    assert "✓ Agent registered: eve" in done.stdout and "THRUM_NAME" in done.stderr
    assert error_line(linked.run("init", "--agent-name", "tester", "--agent-role", "tester")).startswith("agent setup: ")
    assert not (linked.path / ".thrum/identities/tester.json").exists()


@pytest.mark.parametrize("kind", ["submodule", "separate git dir"])
def test_init_where_dot_git_is_a_file(make_repo, tmp_path, kind):
    """A submodule, and a repository with its git directory elsewhere, are no linked worktrees: each is one of its own."""
    outer = make_repo("outer")
    if kind == "submodule":
        outer.git("-c", "protocol.file.allow=always", "submodule", "add", "-q", str(make_repo("inner").path), "lib")
        repo, common = Repo(outer.path / "lib"), outer.path / ".git/modules/lib"
    else:
        repo, common = Repo(tmp_path / "lib"), tmp_path / "elsewhere"
        outer.git("clone", "-q", "--separate-git-dir", str(common), str(outer.path), str(repo.path))
    try:
        before = snapshot(repo.path, common)
        assert "✓ Thrum initialized successfully" in repo.ok("init")
        repo.join("ada")
        repo.ok("send", "hello", "--to", "@ada")
        assert (common / "thrum-sync/a-sync/events.jsonl").exists() and not (outer.path / ".thrum").exists()
        linked = repo.worktree("linked")
        if kind == "submodule":
            assert "Worktree detected" in linked.ok("init")
        else:
            assert "thrum setup --main-repo" in error_line(linked.run("init"))
            script(linked, "setup", "--main-repo", str(repo.path), check=0)
        assert linked.ok("sent", env={"THRUM_AGENT_ID": "ada"}).count("hello")
        repo.git("worktree", "remove", "--force", str(linked.path))
        repo.git("branch", "-q", "-D", "linked")
        repo.ok("init", "--remove", "--yes")
        assert not [path for path in changed(before, snapshot(repo.path, common)) if "/logs" not in path]
    finally:
        repo.close()


# ---------------------------------------------------------------- init --remove

IGNORES = [None, b"", b"\n", b"mine", b"mine\n", b"a\n\n", b"x\n   ", b"mine\r\n", b"mine\r", b".thrum/\n", b"caf\xe9\n"]


@pytest.mark.parametrize("before", IGNORES)
def test_ignore_lines_leave_no_trace(tmp_path, before):
    """What goes in comes out again, whatever the file ends with; a second time adds and removes nothing."""
    path = tmp_path / "ignore"
    if before is not None:
        path.write_bytes(before)
        path.chmod(0o604)
    assert thrum.add_ignore_lines(str(path)) and not thrum.add_ignore_lines(str(path))
    assert not thrum.missing_ignore_lines(str(path))
    assert thrum.remove_ignore_lines(str(path)) and not thrum.remove_ignore_lines(str(path))
    assert (path.read_bytes() if path.exists() else None) == before
    assert before is None or stat.S_IMODE(path.stat().st_mode) == 0o604


@pytest.mark.parametrize("before,edit,after", [
    (None, lambda data: data + b"more\n", b"more\n"),
    (None, lambda data: b"first\n" + data, b"first"),
    (b"mine\n", lambda data: data + b"more\n", b"mine\nmore\n"),
    (b"mine", lambda data: data + b"more", b"mine\nmore"),
    (b"mine\n", lambda data: data.replace(b".thrum.*.json\n", b""), b"mine\n"),
    (b"mine\n", lambda data: data.replace(b".thrum.*.json\n", b"!x\n"), b"mine\n!x\nscripts/thrum-startup.sh\n"),
    (b"mine\n", lambda data: data.replace(b"mine\n\n", b"mine\n") + b"more\n", b"mine\nmore\n"),
])
def test_ignore_lines_that_were_edited_since(tmp_path, before, edit, after):
    """Every byte that somebody else has written stays."""
    path = tmp_path / "ignore"
    if before is not None:
        path.write_bytes(before)
    thrum.add_ignore_lines(str(path))
    path.write_bytes(edit(path.read_bytes()))
    assert thrum.remove_ignore_lines(str(path))
    assert path.read_bytes() == after


@pytest.mark.parametrize("kind", ["plain", "stealth", "no commit", "shared objects", "packed"])
def test_remove_leaves_no_trace(make_repo, kind):
    """After use by two agents in two worktrees the repository is as before `init`, byte for byte, git's own files included."""
    repo = make_repo(commit=kind != "no commit")
    trees = [repo.path]
    if kind == "plain":
        (repo.path / ".gitignore").write_bytes(b"mine")
        (repo.path / ".gitignore").chmod(0o600)
        (repo.path / "staged").write_text("staged")
        repo.git("add", "staged")
    if kind == "shared objects":    # the empty file is in history, but in no tree that a tip names
        (repo.path / "empty").touch()
        repo.git("add", "empty")
        repo.git("commit", "-q", "-m", "an empty file")
        repo.git("rm", "-q", "empty")
        repo.git("commit", "-q", "--allow-empty", "-m", "gone")
    if kind == "packed":
        repo.git("gc", "-q")
    if kind != "no commit":
        other = repo.worktree("other")
        trees.append(other.path)
    before = snapshot(*trees)
    repo.ok("init", *(["--stealth"] if kind == "stealth" else []))
    repo.join("ada")
    repo.ok("send", "hello", "--to", "@ada")
    if kind != "no commit":
        other.join("bob")
        repo.ok("send", "hello", "--to", "@bob")
    pid = repo.pid()
    out = repo.ok("init", "--remove", "--yes")
    assert "✓ Thrum removed from" in out and f"(PID {pid})" in out
    assert not changed(before, snapshot(*trees))
    assert "Nothing to remove" in script(repo, "init", "--remove", "--yes", check=0).stdout
    assert not changed(before, snapshot(*trees))
    repo.git("fsck", "--full", "--strict")


def test_remove_keeps_the_branch_unless_told(make_repo):
    """Without a terminal and without --yes the branch stays, with all that was said, also by a daemon that was killed."""
    repo = make_repo()
    before = snapshot(repo.path)
    repo.join("ada")
    repo.ok("send", "one", "--to", "@ada")
    repo.kill()
    shutil.rmtree(repo.path / ".git/thrum-sync/a-sync/messages")
    value = repo.json("init", "--remove")
    assert value["branch_kept"] and "Removed: .thrum/" in value["removed"]
    out = script(repo, "init", "--remove", check=0).stdout
    assert "Nothing to remove" in out and "Kept: the branch a-sync" in out and "--remove --yes" in out
    assert '"one"' in repo.git("show", "a-sync:messages/ada.jsonl")
    assert not (repo.path / ".thrum").exists() and not (repo.path / ".git/thrum-sync").exists()
    assert "Continued: the branch a-sync" in repo.ok("init")
    assert [message["body"]["content"] for message in repo.json("sent", env={"THRUM_AGENT_ID": "ada"})["messages"]] == ["one"]
    repo.ok("init", "--remove", "--yes")
    assert not changed(before, snapshot(repo.path))


@pytest.mark.parametrize("answer,kept", [("y", False), ("n", True), ("", True)])
def test_remove_asks_on_a_terminal(make_repo, answer, kept):
    repo = make_repo()
    repo.ok("init")
    ours, theirs = pty.openpty()
    try:
        process = start(repo, "init", "--remove", stdin=theirs)
        os.write(ours, answer.encode() + b"\n")
        status, out, err = finish(process)
    finally:
        os.close(ours)
        os.close(theirs)
    assert status == 0 and "Remove the branch a-sync too" in err and ("Kept" in out) is kept
    assert ("a-sync" in repo.git("branch")) is kept


def test_remove_in_a_linked_worktree(make_repo):
    """Only that one is disconnected; everybody else goes on."""
    repo = make_repo()
    linked = repo.worktree("linked")
    before = snapshot(linked.path)
    repo.join("ada")
    linked.join("bob")
    assert "✓ Worktree disconnected" in linked.ok("init", "--remove", "--yes")
    assert not changed(before, snapshot(linked.path))
    assert "Nothing to remove" in linked.ok("init", "--remove")
    repo.ok("send", "still here", "--to", "@bob")


def test_remove_touches_nothing_of_others(make_repo, tmp_path):
    """Other installations that a redirect leads to, links, a branch that only bears the name, what git tracks."""
    home, repo = make_repo("home"), make_repo()
    home.join("ada")
    other = repo.worktree("other")
    script(other, "setup", "--main-repo", str(home.path), check=0)
    (repo.path / ".thrum").mkdir()
    (repo.path / ".thrum/redirect").write_text(f"{home.path}/.thrum\n")
    before = snapshot(home.path), snapshot(other.path)
    repo.ok("init", "--remove", "--yes")
    assert not (repo.path / ".thrum").exists()
    (repo.path / ".thrum").symlink_to(home.path / ".thrum")
    repo.git("branch", "a-sync")
    out = repo.ok("init", "--remove", "--yes")
    assert not (repo.path / ".thrum").is_symlink() and "branch" not in out and "a-sync" in repo.git("branch")
    assert not changed(before[0], snapshot(home.path)) and not changed(before[1], snapshot(other.path))
    assert home.json("daemon", "status")["running"]
    (repo.path / ".thrum").mkdir()
    (repo.path / ".thrum/events.jsonl").write_text("")
    repo.git("add", "-f", ".thrum/events.jsonl")
    before = snapshot(repo.path)
    assert "thrum migrate" in error_line(repo.run("init", "--remove", "--yes"))
    assert not changed(before, snapshot(repo.path))


def test_remove_that_cannot_is_one_line_and_goes_on_later(make_repo):
    """A folder that may not be emptied: the error names it; once it may, the next removal completes the first."""
    command = confined(*QUICK)
    if not command:
        pytest.skip("no setpriv, and root may write everywhere")
    repo = make_repo()
    before = snapshot(repo.path)
    repo.ok("init")
    shut = repo.path / ".thrum/context/shut"
    shut.mkdir()
    (shut / "file").touch()
    shut.chmod(0o555)
    assert f"{repo.path}/.thrum.removed (file)" in error_line(repo.run("init", "--remove", "--yes", command=command))
    (repo.path / ".thrum.removed/context/shut").chmod(0o755)
    repo.ok("init", "--remove", "--yes")
    assert not changed(before, snapshot(repo.path))


def connections(repo):
    """How many sockets the daemon has open."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    folder = f"/proc/{repo.pid()}/fd"
    return sum(os.readlink(f"{folder}/{name}").startswith("socket:") for name in os.listdir(folder) if os.path.lexists(f"{folder}/{name}"))


def test_remove_ends_those_who_wait(make_repo):
    """Agents that wait, by launcher and by script, are told; none of them brings a piece of it back."""
    repo = make_repo()
    linked = repo.worktree("linked")
    before = snapshot(repo.path, linked.path)
    repo.join("ada")
    linked.join("bob")
    present = connections(repo)
    waiting = [start(where, "wait", "--timeout", "60s", command=command) for where in (repo, linked)
               for command in (None, QUICK)]
    try:
        give_up_at = time.monotonic() + END_S
        while connections(repo) < present + len(waiting):      # nothing tells us but the daemon's own table
            assert time.monotonic() < give_up_at
            time.sleep(0.02)
        repo.ok("init", "--remove", "--yes")
        for process in waiting:
            status, _, err = finish(process)
            assert status == 2 and err.splitlines()[-1].startswith("Error: "), err
            assert ("thrum init" in err or "thrum setup" in err) and "Traceback" not in err, err
    finally:
        for process in waiting:
            process.kill()
            process.communicate()
    assert not changed(before, snapshot(repo.path, linked.path))


# ---------------------------------------------------------------- setup

def test_setup_all(make_repo):
    """Every linked worktree is connected once; those that are missing or cannot be are named, the branch's own is not one."""
    repo = make_repo()
    one, two, gone, shut = (repo.worktree(name) for name in ("one", "two", "gone", "shut"))
    shutil.rmtree(gone.path)
    (shut.path / ".thrum").write_text("in the way")
    repo.ok("init")
    done = repo.run("setup", "--all", check=1)
    assert f"✓ {one.path}: connected\n" in done.stdout and f"✓ {two.path}: connected\n" in done.stdout
    assert f"  {gone.path}: missing" in done.stdout and f"✗ {shut.path}: cannot set up" in done.stdout and "a-sync" not in done.stdout
    assert one.launcher.exists() and not one.git("status", "--porcelain")
    (shut.path / ".thrum").unlink()
    before = snapshot(one.path, two.path)
    states = {item["worktree"]: item["state"] for item in one.json("setup", "--all")["worktrees"]}
    assert states == {str(one.path): "already connected", str(two.path): "already connected", str(gone.path): "missing",
                      str(shut.path): "connected"}
    assert not changed(before, snapshot(one.path, two.path))
    fifth = repo.worktree("fifth")
    assert repo.ok("setup", "../fifth").endswith(f"✓ Thrum worktree setup complete: {fifth.path}\n") and fifth.launcher.exists()
    assert "not a directory" in error_line(repo.run("setup", "../nowhere"))


# ---------------------------------------------------------------- migrate

OLD = {
    ".thrum/events.jsonl": [
        {"type": "agent.register", "agent_id": "furiosa", "kind": "agent", "role": "implementer", "module": "m",
         "timestamp": "2026-01-15T10:30:00.25Z"}],
    ".thrum/messages.jsonl": [
        {"type": "message.create", "message_id": "msg_01KGJ6T3T0QK9V7R2M4N8P5XYZ", "agent_id": "furiosa", "session_id": "ses_1",
         "body": {"format": "markdown", "content": "from before"}, "timestamp": "2026-02-03T18:02:10Z", "recipients": ["max"]}],
    ".thrum/messages/max.jsonl": [
        {"type": "message.create", "message_id": "msg_01KGJ6T3T0QK9V7R2M4N8P5XYA", "agent_id": "max", "session_id": "ses_2",
         "event_id": "evt_01KGJAPH6GCRVP2CV670VP6CAA", "body": {"format": "markdown", "content": "draft"},
         "timestamp": "2026-02-03T18:03:10Z", "v": 1},
        {"type": "message.edit", "message_id": "msg_01KGJ6T3T0QK9V7R2M4N8P5XYA", "event_id": "evt_01KGJAPH6GCRVP2CV670VP6CAB",
         "body": {"format": "markdown", "content": "final"}, "timestamp": "2026-02-03T18:04:10Z", "v": 1}],
}


def old_layout(repo):
    for name, events in OLD.items():
        path = repo.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(event) + "\n" for event in events))
    with open(repo.path / ".thrum/events.jsonl", "a") as file:
        file.write("not an event\n")
    (repo.path / ".thrum/schema_version").write_text("1\n")
    (repo.path / ".gitignore").write_text("build/\n.thrum/var/\n")
    (repo.path / ".gitattributes").write_text("*.png binary\n# Thrum logs\n.thrum/events.jsonl merge=union\n"
                                              ".thrum/messages/*.jsonl merge=union\n")
    repo.git("add", "-A")
    repo.git("commit", "-q", "-m", "the old layout")


@pytest.mark.parametrize("daemon", [False, True])
def test_migrate(make_repo, daemon):
    """A tracked log moves to the branch; the originals stay on disk, damaged lines are named, and a second run adds nothing."""
    repo = make_repo()
    old_layout(repo)
    if daemon:                              # one that has run on the old files before, and has mail of its own
        repo.join("nux")
        repo.ok("send", "newer", "--to", "@nux")
    originals = {name: (repo.path / name).read_bytes() for name in OLD}
    out = script(repo, "migrate", check=0).stdout
    for words in ("Migration needed. Found old-layout data:", "  .thrum/messages/max.jsonl", "Migration complete:", "Copied: 4 events",
                  "Untracked from main: .thrum/events.jsonl", "Updated .gitignore", "Cleaned .gitattributes",
                  "Damaged: 1 line of .thrum/events.jsonl"):
        assert words in out, out
    assert {name: (repo.path / name).read_bytes() for name in OLD} == originals
    assert not repo.git("ls-files", ".thrum")
    ignored = (repo.path / ".gitignore").read_text()
    assert ignored.startswith("build/\n") and ".thrum/\n" in ignored and ".thrum/var/" not in ignored
    assert (repo.path / ".gitattributes").read_text() == "*.png binary\n"
    sync = repo.path / ".git/thrum-sync/a-sync"
    assert [event["event_id"] for event in thrum.read_log(str(sync / "messages/furiosa.jsonl"))] == ["evt_01KGJAPH6GCRVP2CV670VP6CHH"]
    assert "evt_01KF0K8Y9T6MR3GCHQ65JK6DK2" in (sync / "events.jsonl").read_text()
    assert "final" in repo.git("show", "a-sync:messages/max.jsonl")
    texts = {m["body"]["content"] for who in ("furiosa", "max", "nux") for m in
             repo.json("sent", env={"THRUM_AGENT_ID": who})["messages"]}
    assert texts == {"from before", "final"} | ({"newer"} if daemon else set())
    repo.ok("message", "delete", "msg_01KGJ6T3T0QK9V7R2M4N8P5XYA", "--force", env={"THRUM_AGENT_ID": "max"})
    repo.ok("daemon", "stop")
    before = snapshot(sync)
    again = script(repo, "migrate", check=0).stdout
    assert again == "No migration needed.\n  Damaged: 1 line of .thrum/events.jsonl, kept there\n"
    assert not changed(before, snapshot(sync))
    repo.ok("daemon", "start")
    assert [m["deleted"] for m in repo.json("sent", env={"THRUM_AGENT_ID": "max"})["messages"]] == [True], "what was deleted stays so"


def test_migrate_relocates_the_old_worktree(make_repo):
    """A worktree of the branch at .thrum/sync moves to git's directory, with the lines that were not committed."""
    repo = make_repo()
    repo.ok("init")
    repo.close()
    repo.git("worktree", "remove", "--force", str(repo.path / ".git/thrum-sync/a-sync"))
    shutil.rmtree(repo.path / ".thrum/var")
    old = repo.path / ".thrum/sync"
    repo.git("worktree", "add", "-q", str(old), "a-sync")
    (old / "messages").mkdir(exist_ok=True)
    (old / "messages/max.jsonl").write_text("".join(json.dumps(event) + "\n" for event in OLD[".thrum/messages/max.jsonl"]))
    assert "Relocated: .thrum/sync" in script(repo, "migrate", check=0).stdout
    assert not old.exists() and repo.git("worktree", "list").count("a-sync") == 2       # one line: its path and its branch
    assert repo.json("sent", env={"THRUM_AGENT_ID": "max"})["messages"][0]["body"]["content"] == "final"
    assert script(repo, "migrate", check=0).stdout == "No migration needed.\n"


def test_migrate_where_nothing_is_old(make_repo):
    repo = make_repo()
    assert "not initialized" in error_line(repo.run("migrate"))
    repo.ok("init")
    pid = repo.pid()
    assert repo.ok("migrate") == "No migration needed.\n" and repo.pid() == pid
    value = repo.json("migrate")
    assert value == {"needed": False, "copied": 0, "relocated": False, "untracked": [], "damaged": {}}


def test_a_main_worktree_that_was_moved(make_repo):
    """Each line names what helps where it is typed."""
    repo = make_repo()
    thrum.initialize(str(repo.path))
    linked = repo.worktree("one")
    repo.ok("setup", "--all")
    moved = Repo(repo.path.parent / "moved")
    repo.path.rename(moved.path)
    text = error_line(linked.run("setup"))
    assert text == f"{linked.path}/.thrum leads to no installation; in the main worktree, 'git worktree repair' and " \
                   "'.thrum/bin/thrum setup --all' connect it again"
    before = (linked.path / ".thrum" / "redirect").read_bytes()
    done = moved.run("setup", "--all")
    assert done.returncode == 1 and f"git finds no repository for {linked.path}; run 'git worktree repair' in {moved.path}" in done.stdout
    assert (linked.path / ".thrum" / "redirect").read_bytes() == before
    moved.git("worktree", "repair")
    moved.ok("setup", "--all")
    linked.ok("version")
    (moved.path / ".thrum" / "bin" / "thrum.py").unlink()
    assert error_line(moved.run("setup")) == f"{moved.path}/.thrum holds no thrum.py; run 'python3 thrum.py init' with one at hand"
