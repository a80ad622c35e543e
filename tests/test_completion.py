"""Completion scripts: made from the tables, driven in the real shells that are here, held to their structure in any case."""

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time

import pytest

import thrum
from conftest import CLEAN
from team import END_S, Team, error_line, one_document, raw_in

ROWS = {**thrum.COMMANDS, **thrum.HERE}
NAMES = [name for name, row in ROWS.items() if row.help]
SCRIPTS = {shell: make(True) for shell, make in thrum.SHELLS.items()}
# How a shell checks a script without running it; PowerShell's own parser reports to stdout.
CHECKS = {"bash": ["bash", "-n"], "zsh": ["zsh", "-n"], "fish": ["fish", "--no-execute"],
          "pwsh": ["pwsh", "-NoProfile", "-Command", "$e = $null; $null = [System.Management.Automation.Language.Parser]::ParseFile("
                   "$args[0], [ref]$null, [ref]$e); $e; exit $e.Count"]}


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    team = Team(tmp_path_factory.mktemp("team") / "with space")
    team.ada.ok("group", "create", "backend")
    (team.ada.path / "notes.txt").write_text("x")
    (team.ada.path / "sub").mkdir()
    yield team
    team.close()


def answered(team, shell, script, line, program="thrum", cwd=None, path=True):
    """What a shell offers for a command line of words that ends where the cursor is."""
    folder = team.folder / shell
    folder.mkdir(exist_ok=True)
    (folder / "script").write_text(SCRIPTS[shell])
    (folder / "drive").write_text(script)
    env = {**CLEAN, "HOME": str(folder), "WORDS": line}
    if path:
        env["PATH"] = f"{team.ada.path}/.thrum/bin:{CLEAN['PATH']}"
    done = subprocess.run([*DRIVERS[shell], str(folder / "drive"), str(folder / "script"), program, *line.split(" ")], env=env,
                          cwd=cwd or team.ada.path, capture_output=True, text=True, timeout=END_S)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return sorted(row.split("\t")[0] for row in done.stdout.splitlines())


# bash splits at = : and @ as well, and says in $2 what it is going to replace (seen in bash 5.2): `pieces` does what it does.
BASH = r"""
source "$1"; program=$2; shift 2
declare -f _thrum >/dev/null || exit 9
COMP_WORDS=("$program")
for word in "$@"; do
    [[ -z $word ]] && COMP_WORDS+=("")
    while [[ -n $word ]]; do
        if [[ $word =~ ^([=:@]+)(.*)$ || $word =~ ^([^=:@]+)(.*)$ ]]; then COMP_WORDS+=("${BASH_REMATCH[1]}"); word=${BASH_REMATCH[2]}; fi
    done
done
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
last=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} typed=${*: -1}
replaced=$last
[[ $before == *@ && $typed == *@"$last" ]] && replaced=@$last
[[ $last == *[=:] ]] && replaced=""
[[ $last == *@ ]] && replaced=@
_thrum "$program" "$replaced" "$before"
for word in "${COMPREPLY[@]}"; do printf '%s\n' "${typed%"$replaced"}$word"; done
"""
FISH = 'source $argv[1]; complete -C "$argv[2..-1]"'
# zsh's own functions offer only while a line is edited: here they print what the script gives them.
ZSH = r"""
compdef() { }
offer() { local word; for word in "$@"; do [[ $word == "$PREFIX"* ]] && print -r -- "$word"; done; return 0 }
_describe() { [[ $1 == -o ]] && shift; offer "${(@)${(@P)2}%%:*}" }
compadd() { offer "${(@P)2}" }
compset() { [[ $2 == 1 ]] && PREFIX=${PREFIX#*=} || PREFIX=${PREFIX##*,} }
_files() { if [[ $1 == -/ ]]; then offer *(N/); else offer *(N); fi }
source "$1"; shift
words=("$@"); CURRENT=$#words; PREFIX=$words[-1]
_thrum
exit 0
"""
DRIVERS = {"bash": ["bash", "--norc", "--noprofile"], "fish": ["fish", "--no-config"], "zsh": ["zsh", "-f"]}
DRIVES = {"bash": BASH, "fish": FISH, "zsh": ZSH}
HERE = [shell for shell in DRIVERS if shutil.which(shell)]

OFFERED = {
    "se": ["search", "send", "sent", "session", "setup"], "agent li": ["list"], "agent set-": ["set-intent", "set-task"], "sent ": ["show"],
    "--json agent li": ["list"], "--repo . con": ["config", "conflicts", "context"], "completion ": ["bash", "fish", "powershell", "zsh"],
    "help ses": ["session"], "send --th": ["--thread"], "daemon restart --fr": ["--from"], "--verb": ["--verbose"],
    "send --to @b": ["@backend", "@bob"], "send --mention @ad": ["@ada"],
    "send --from": [], "inbox --from @p": [], "inbox --from @": ["@ada", "@bob"], "wait --role pl": ["planner"],
    "group add ba": ["backend"], "group add backend @im": ["@implementer"], "config get daemon.au": ["daemon.autostart"],
    "config set daemon.autostart ": [], "send --body-file no": ["notes.txt"], "daemon restart --from no": ["notes.txt"],
    "send --format pl": ["plain"], "send hello --to @ad": ["@ada"], "help --role pl": ["planner"],
    "send --intent x": [], "nope ": [], "complet": ["completion"],
    "message get --he": ["--help"], "send -- --t": [], "daemon ru": [],
}


@pytest.mark.parametrize("shell", HERE)
def test_what_a_shell_offers(team, shell):
    """The script runs in the shell itself: commands, flags, names, files, settings; nothing where nothing fits."""
    assert "bash" in HERE
    for line, expected in OFFERED.items():
        assert answered(team, shell, DRIVES[shell], line) == expected, line
    every = answered(team, shell, DRIVES[shell], "")
    assert every == sorted({name.split(" ")[0] for name in NAMES})
    for name in NAMES:
        flags = {a.name for a in (*ROWS[name].arguments, *thrum.GLOBAL_FLAGS) if a.name.startswith("--")}
        if " " not in name or name in ("daemon restart", "group add"):      # each costs a process; the structure tests know all
            assert set(answered(team, shell, DRIVES[shell], f"{name} --")) == flags, name


def test_bash_and_the_characters_that_it_splits_at(team):
    for line, expected in {"send --to=@ba": ["--to=@backend"], "send --to=": ["--to=@ada", "--to=@backend", "--to=@bob",
                           "--to=@everyone", "--to=@implementer", "--to=@planner"], "send --to bo": ["@bob"],
                           "send --mention @bob,@a": ["@bob,@ada"], "send --mention=@bob,@a": ["--mention=@bob,@ada"],
                           "send --scope a:b --to @ad": ["@ada"], "send a@b.c --to @ad": ["@ada"],
                           "send --format=ma": ["--format=markdown"],
                           "send --body-file=no": ["--body-file=notes.txt"], "send --to @": ["@ada", "@backend", "@bob", "@everyone",
                           "@implementer", "@planner"]}.items():
        assert answered(team, "bash", BASH, line) == expected, line


def test_another_name_and_another_place(team):
    """The program that was typed is asked, also by a path with blanks, else `thrum`; without either there are no names and no noise."""
    launcher = str(team.ada.launcher)
    assert " " in launcher
    for program, path in ((launcher, False), ("/nowhere/thrum", True)):
        assert answered(team, "bash", BASH, "send --to @bo", program=program, path=path) == ["@bob"], program
    assert answered(team, "bash", BASH, "send --to @bo", path=False) == []
    assert answered(team, "bash", BASH, "send --to @bo", cwd="/", path=False) == []
    for shell, script in SCRIPTS.items():
        assert str(team.folder) not in script and "/thrum.py" not in script, shell


def test_bash_offers_folders_with_a_slash_to_follow(team):
    assert answered(team, "bash", BASH, "setup --main-repo s") == ["sub"]


@pytest.mark.parametrize("shell, program", [(shell, CHECKS[name]) for shell, name in zip(thrum.SHELLS, CHECKS) if shutil.which(name)],
                         ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("descriptions", [True, False])
def test_the_shell_accepts_the_script(tmp_path, shell, program, descriptions):
    path = tmp_path / "script"
    path.write_text(thrum.SHELLS[shell](descriptions))
    done = subprocess.run([*program, str(path)], env=CLEAN, capture_output=True, text=True, timeout=END_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---------------------------------------------------------------- structure, also of shells that are not here

@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_script_names_everything(shell):
    """Each visible command and each of its flags, with what they mean where the shell shows it; nothing hidden; how to load it."""
    script = SCRIPTS[shell]
    assert f"thrum completion {shell}" in "\n".join(script.splitlines()[:4]) and not raw_in(script)
    words = set(re.findall(r"[\w-]+", script))
    plain = script.replace("'\\''", "'").replace("\\'", "'").replace("''", "'")
    for name in NAMES:
        assert set(name.split(" ")) <= words, name
        for argument in ROWS[name].arguments:
            if argument.name[0] == "-":
                assert argument.name.lstrip("-") in script, (name, argument.name)
                assert shell == "bash" or argument.help in plain, argument.help
    assert "--ready-fd" not in script and "ready-fd" not in script
    for kind in ("names", "agents", "roles", "groups"):
        assert re.search(rf"(ask|__thrum_ask) {kind}\b", script), kind
    bare = thrum.SHELLS[shell](False)
    assert "show this help" not in bare and (shell == "bash") == (bare == script)


def balanced(script, escape, quotes):
    """Whether each quote that opens closes, and each bracket outside of quotes; `escape` is the escape character."""
    closing, stack, quote, index = {")": "(", "]": "[", "}": "{"}, [], "", 0
    while index < len(script):
        c = script[index]
        if c == escape and not (quote == "'" and escape == "`"):
            index += 1
        elif quote:
            quote = "" if c == quote else quote
        elif c == "#" and (index == 0 or script[index - 1] in " \n\t"):
            index = script.find("\n", index)
        elif c in quotes:
            quote = c
        elif c in "([{":
            stack.append(c)
        elif c in ")]}":
            if not stack or stack.pop() != closing[c]:
                return False
        index += 1
    return not stack and not quote


def test_the_scripts_are_balanced():
    """Of the shells that are rarely at hand: quotes and brackets match, whatever the help texts say."""
    assert balanced(SCRIPTS["powershell"], "`", "'\"") and balanced(SCRIPTS["fish"], "\\", "'\"")
    assert not balanced(SCRIPTS["powershell"] + "'", "`", "'\"") and not balanced(SCRIPTS["fish"] + "(", "\\", "'\"")
    words = re.findall(r"^(if|for|while|case|function|begin|switch|end)\b|; and (begin)$", SCRIPTS["fish"].replace("    ", ""), re.M)
    flat = [a or b for a, b in words]
    assert flat.count("end") == len(flat) - flat.count("end")


def test_help_texts_with_every_quote(monkeypatch, tmp_path):
    """Whatever somebody writes into a help text, it stays a text."""
    nasty = "it's \"$(touch x)\" `id` \\ $HOME ’; rm: [a] {b} #c"
    monkeypatch.setitem(thrum.COMMANDS, "nasty", thrum.Command(None, nasty, (thrum.Argument("--odd", nasty),)))
    for (shell, make), name in zip(thrum.SHELLS.items(), CHECKS):
        script = make(True)
        (tmp_path / shell).write_text(script)
        if shutil.which(name):
            done = subprocess.run([*CHECKS[name], str(tmp_path / shell)], env=CLEAN, capture_output=True, text=True, timeout=END_S)
            assert done.returncode == 0 and not done.stderr, (shell, done.stderr)
        if shell in ("fish", "powershell"):
            assert balanced(script, {"fish": "\\", "powershell": "`"}[shell], "'\""), shell
    assert "’’" in thrum.powershell_completion(True)


def test_flags_take_a_value_everywhere_or_nowhere():
    """fish reads a line without knowing the command of a flag: one that takes a value somewhere takes one everywhere."""
    valued, bare = set(), set()
    for name in NAMES:
        for argument in (*ROWS[name].arguments, *thrum.GLOBAL_FLAGS):
            if argument.name[0] == "-":
                (bare if argument.kind is bool else valued).add(argument.name)
    assert not valued & bare


def test_the_command(repo):
    """It needs no repository that is set up, prints the script alone, and bare it explains itself."""
    for shell in thrum.SHELLS:
        assert repo.ok("completion", shell) == SCRIPTS[shell]
        assert repo.ok("completion", shell, "--no-descriptions") == thrum.SHELLS[shell](False)
    assert one_document(repo.ok("completion", "bash", "--json")) == {"shell": "bash", "script": SCRIPTS["bash"]}
    assert repo.ok("completion") == repo.ok("help", "completion") and "thrum completion fish" not in repo.ok("completion").splitlines()[0]
    assert "did you mean 'bash'" in error_line(repo.run("completion", "bahs"))
    assert not (repo.path / ".thrum").exists()


# ---------------------------------------------------------------- names

def test_names_come_from_the_daemon(team):
    ada = team.ada
    assert ada.ok("complete", "agents").split() == ["@ada", "@bob"] and ada.ok("complete", "roles").split() == ["implementer", "planner"]
    assert ada.ok("complete", "groups").split() == ["backend", "everyone", "implementer", "planner"], "each role is a group"
    assert ada.ok("complete", "names").split() == ["@ada", "@backend", "@bob", "@everyone", "@implementer", "@planner"]
    assert team.bob.ok("complete", "agents") == ada.ok("complete", "agents")


def test_names_that_a_shell_could_take_for_more_are_left_out(tmp_path, make_repo):
    """Ids of old versions and whatever else came from elsewhere: only plain words are offered."""
    ids = ["ada", "agent:tester:ABC", "a b", "$(id)", "x'y", "\x1b[2J", "ü", "", "-x", "*", "a;b", "a`b"]
    reply = {"agents": [{"agent_id": name, "role": name} for name in ids]}
    repo, served = make_repo(), []
    thrum.initialize(str(repo.path))
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "fake"))
    server.listen(1)
    server.settimeout(END_S)

    def serve():
        for _ in range(2):
            connection, _ = server.accept()
            with connection, connection.makefile("rwb") as stream:
                served.append(json.loads(stream.readline()))
                stream.write(json.dumps({"jsonrpc": "2.0", "id": served[-1]["id"], "result": reply}).encode() + b"\n")
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for kind, mark in (("agents", "@"), ("roles", "")):
            done = repo.run("complete", kind, check=0, env={"THRUM_SOCKET": str(tmp_path / "fake")})
            assert (done.stdout, done.stderr) == (f"{mark}-x\n{mark}ada\n", "")
    finally:
        thread.join(END_S)
        server.close()
    assert [request["method"] for request in served] == ["agent.list"] * 2


def test_without_a_daemon_there_is_silence_and_no_daemon(make_repo):
    """Tab never starts a daemon, never waits for one, and never says anything."""
    repo = make_repo()
    assert repo.run("complete", "names", check=0).stderr == ""
    thrum.initialize(str(repo.path))
    before = sorted(os.listdir(repo.var))
    (repo.path / ".thrum/config.json").write_text("{")
    done = repo.run("complete", "names", check=0)
    assert done.stdout + done.stderr == "" and sorted(os.listdir(repo.var)) == before
    deaf = socket.socket(socket.AF_UNIX)
    try:
        deaf.bind(str(repo.path / "deaf"))
        deaf.listen(1)
        began = time.monotonic()
        done = repo.run("complete", "names", check=0, env={"THRUM_SOCKET": str(repo.path / "deaf")})
        assert done.stdout + done.stderr == "" and time.monotonic() - began < 5 * thrum.COMPLETE_S
    finally:
        deaf.close()
