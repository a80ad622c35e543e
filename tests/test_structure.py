"""The promises of the file itself: sections in order, light to import, complete tables."""

import ast
import re
import subprocess
import symtable
import sys

import thrum
from conftest import ROOT, THRUM

TEXT = THRUM.read_text()
TREE = ast.parse(TEXT)
BANNER = re.compile(r"^# =+ {1,2}(\d+)  (.+)$", re.M)


SECTIONS = [(TEXT[:match.start()].count("\n") + 1, int(match[1]), match[2]) for match in BANNER.finditer(TEXT)]


def section_at(line):
    """The number of the section that a line stands in; 0 is what comes before the first."""
    return max((number for start, number, _ in SECTIONS if start <= line), default=0)


def defined():
    """Where each top-level name is bound first: name -> line."""
    found = {}
    for node in TREE.body:
        names = []
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [(alias.asname or alias.name).split(".")[0] for alias in node.names]
        for name in names:
            found.setdefault(name, node.lineno)
    return found


def scopes(table):
    yield table
    for child in table.get_children():
        yield from scopes(child)


def test_contents_are_the_banners():
    listed = re.findall(r"^ {3,4}(\d+)  (\S.*?)  ", thrum.__doc__, re.M)
    assert [(int(number), title.strip()) for number, title in listed] == [(number, title) for _, number, title in SECTIONS]


def test_banners_rise():
    numbers = [number for _, number, _ in SECTIONS]
    assert numbers == sorted(set(numbers))


def test_a_section_uses_only_those_above():
    places = defined()
    wrong = []
    for scope in scopes(symtable.symtable(TEXT, "thrum.py", "exec")):
        if scope.get_type() == "module" or scope.get_name() in ("annotations", "__annotate__"):
            continue
        here = section_at(scope.get_lineno())
        for symbol in scope.get_symbols():
            if symbol.is_global() and symbol.get_name() in places and section_at(places[symbol.get_name()]) > here \
                    and symbol.get_name() not in ANNOTATION_ONLY.get(scope.get_lineno(), ()):
                wrong.append(f"line {scope.get_lineno()}: {scope.get_name()} (section {here}) uses {symbol.get_name()}")
    assert not wrong


def annotation_only():
    """Names that a scope mentions in annotations alone, which are never evaluated: line -> names."""
    found = {}
    for node in ast.walk(TREE):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            noted, used = set(), set()
            skip = set()
            for inner in ast.walk(node):
                for part in (getattr(inner, "annotation", None), getattr(inner, "returns", None)):
                    if part is not None:
                        skip.update(map(id, ast.walk(part)))
                        noted.update(n.id for n in ast.walk(part) if isinstance(n, ast.Name))
            used.update(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and id(n) not in skip)
            found[node.lineno] = noted - used
    return found


ANNOTATION_ONLY = annotation_only()
LAZY = set(thrum.LAZY_MODULES)


def test_every_global_exists():
    """What ruff cannot see because of the lazy modules: a name that nobody defines."""
    import builtins
    known = set(defined()) | LAZY | set(dir(builtins)) | {"__file__", "__doc__", "__name__", "__loader__"}
    known |= {"_name", "_alias"}        # of the loop that fills a table
    known |= {name.id for node in TREE.body if isinstance(node, ast.Assign) for inner in ast.walk(node)      # 3.12 counts these
              if isinstance(inner, ast.comprehension) for name in ast.walk(inner.target) if isinstance(name, ast.Name)}
    unknown = {f"{symbol.get_name()} in {scope.get_name()} (line {scope.get_lineno()})"
               for scope in scopes(symtable.symtable(TEXT, "thrum.py", "exec"))
               for symbol in scope.get_symbols()
               if symbol.is_global() and symbol.is_referenced() and symbol.get_name() not in known}
    assert not unknown


def test_nothing_is_defined_twice():
    """The second would silently take the place of the first."""
    names = [node.name for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    names += [target.id for node in TREE.body if isinstance(node, ast.Assign) for target in node.targets
              if isinstance(target, ast.Name) and target.id.isupper()]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_import_loads_nothing_heavy():
    heavy = LAZY | {"argparse", "dataclasses", "typing", "email", "http", "inspect", "urllib", "tempfile"}
    code = ("import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules); import thrum; "
            "print(' '.join(sorted(set(sys.modules) - before)))")
    loaded = subprocess.run([sys.executable, "-IS", "-c", code, str(ROOT)], check=True, capture_output=True, text=True).stdout.split()
    assert "thrum" in loaded
    assert not heavy & set(loaded), heavy & set(loaded)
    assert len(loaded) < 25, loaded


def test_only_the_standard_library():
    names = LAZY
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "__import__" and isinstance(node.args[0], ast.Constant):
            names.add(node.args[0].value.split(".")[0])
    assert all(isinstance(name, str) for name in names)
    allowed = set(getattr(sys, "stdlib_module_names", names)) | {"thrum"}
    assert names <= allowed, names - allowed


def test_one_door_to_git_and_one_to_sql():
    """`subprocess` starts git in one place, and SQL is spoken in Store alone."""
    lines = TEXT.splitlines()
    assert sum('["git"' in line for line in lines) == 1
    store = next(node for node in TREE.body if isinstance(node, ast.ClassDef) and node.name == "Store")
    for node in ast.walk(TREE):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and section_at(node.lineno) != 9:
            assert not re.match(r"(?i)\s*(select .* from|insert (or \w+ )?into|delete from|update \w+ set|create table)\b", node.value), \
                f"SQL outside of the store, line {node.lineno}"
    assert store


def test_the_tables_are_complete():
    for name, row in thrum.METHODS.items():
        assert row.help.endswith("."), name
        assert not (row.writes and row.waits), name
        assert set(row.aliases.values()) <= {field.rstrip("!") for field in row.params}, name
    for name, row in {**thrum.COMMANDS, **thrum.HERE}.items():
        assert row.does in ("reads", "changes", "tells"), name
        assert row.help or name in ("daemon run", "complete", "guard message"), name
        seen = [argument.name for argument in row.arguments]
        assert len(seen) == len(set(seen)), name
        many = [argument.many for argument in row.arguments if argument.name[0] != "-"]
        assert not any(many[:-1]), name
    for name, kind in thrum.EVENTS.items():
        assert kind.file in ("author", "events"), name
        assert name in thrum._PROJECTIONS, name


def test_the_launcher_functions_stand_alone():
    """The launcher carries their source, so they may use nothing but each other, os and sys."""
    import builtins
    names = {function.__name__ for function in thrum.LAUNCHER_FUNCTIONS}
    source = "\n\n\n".join(thrum.source_of(TEXT, function) for function in thrum.LAUNCHER_FUNCTIONS)
    assert "'''" not in source
    for scope in scopes(symtable.symtable(source, "launcher", "exec")):
        if scope.get_type() == "function":
            used = {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_global()}
            assert used <= names | {"os", "sys"} | set(dir(builtins)), (scope.get_name(), used)
