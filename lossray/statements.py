"""The top-level statements of a module: which names each defines and uses, and its text without comments.

Importing a module runs all of them. Most only define a name: a function, a class, a value. The others may do
anything, such as setting torch's default dtype, so they matter to whoever imports the module.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

COMPUTED_NAMES = frozenset(  # through which code reaches what it does not name
    {
        "globals",
        "vars",
        "eval",
        "exec",
        "getmembers",
        "attrgetter",
        "__subclasses__",
        "__globals__",
        "__dict__",
    }
)
OUTSIDE = sys.stdlib_module_names | {
    "numpy",
    "scipy",
    "torch",
}  # whose members are no functions of the user's
HOOKS = frozenset({"__getattr__", "__init_subclass__"})  # run where nothing calls them by name
AT_DEFINITION = frozenset({"__init_subclass__", "__set_name__"})  # run where a class is defined
PLAIN_DECORATORS = frozenset(  # of the standard library and torch: they note nothing elsewhere
    {
        "abstractmethod",
        "cache",
        "compile",
        "contextmanager",
        "dataclass",
        "enable_grad",
        "inference_mode",
        "lru_cache",
        "no_grad",
        "script",
        "total_ordering",
        "wraps",
    }
)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
EFFECTS = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)
ASSIGNMENTS = (ast.Assign, ast.AnnAssign)


@dataclass(frozen=True)
class Statement:
    """One top-level statement, or one name of an import statement.

    Attributes:
        defines: the names; none where the statement runs for its effects.
        uses: every identifier in it, and every string that could be one.
        open_ended: whether it may use names that it computes.
        node: its syntax tree.
        text: its source without comments, docstrings and blank lines.
    """

    defines: frozenset[str]
    uses: frozenset[str]
    open_ended: bool
    node: ast.stmt
    text: str

    @property
    def runs(self) -> bool:
        """Whether an import runs all of it; of a function or class only the header."""
        return not isinstance(self.node, DEFINITIONS)


def statements(source: bytes) -> list[Statement]:
    """The top-level statements of a module's source; what runs only as a script is left out.

    Raises:
        SyntaxError: it does not parse.
        ValueError: likewise (null bytes).
    """
    tree = ast.parse(source)
    encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    lines = _Lines(io.TextIOWrapper(io.BytesIO(source), encoding).read(), tree)
    outside = frozenset(_bound_by_imports(tree))
    kept: list[Statement] = []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            kept += _imports(node)
        elif _is_script(node):
            kept += [_statement(inner, lines, outside) for inner in getattr(node, "orelse", [])]
        elif not _is_docstring(node):
            kept.append(_statement(node, lines, outside))
    return kept


def _statement(node: ast.stmt, lines: "_Lines", outside: frozenset[str]) -> Statement:
    defined = frozenset(_defined(node, outside))
    return Statement(
        defines=defined,
        uses=frozenset(_identifiers(node)),
        open_ended=bool(defined & HOOKS) or any(_is_open_ended(below, outside) for below in ast.walk(node)),
        node=node,
        text=lines.segment(node),
    )


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[Statement]:
    """Each name that an import binds. The import itself runs in any case; see `Statement.runs`."""
    future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
    start = f"from {'.' * node.level}{node.module or ''} " if isinstance(node, ast.ImportFrom) else ""
    for alias in node.names:
        bound = alias.asname or alias.name.partition(".")[0]
        always = future or alias.name == "*"
        yield Statement(
            defines=frozenset() if always else frozenset({bound}),
            uses=frozenset({alias.name.rpartition(".")[2]}),
            open_ended=False,
            node=node,
            text=f"{start}import {alias.name} as {bound}",
        )


def _defined(node: ast.stmt, outside: frozenset[str]) -> Iterator[str]:
    """The names that a statement defines and does nothing else; none where it may do more."""
    if isinstance(node, ast.ClassDef):
        yield from [node.name] if _only_defines(node, outside) else []
    elif isinstance(node, DEFINITIONS):
        plain = node.name not in HOOKS and _are_plain(node.decorator_list, outside)
        yield from [node.name] if plain else []
    elif isinstance(node, ASSIGNMENTS):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [name for target in targets for name in _target_names(target)]
        if all(names) and not (node.value and _has_effects(node.value)):
            yield from filter(None, names)


def _only_defines(node: ast.ClassDef, outside: frozenset[str]) -> bool:
    """Whether the definition of a class does nothing to what stands outside it."""
    if node.keywords or not _are_plain(node.decorator_list, outside):
        return False
    for inner in node.body:
        if isinstance(inner, DEFINITIONS):
            if inner.name in AT_DEFINITION:
                return False
        elif isinstance(inner, ASSIGNMENTS):
            targets = inner.targets if isinstance(inner, ast.Assign) else [inner.target]
            if not all(name for target in targets for name in _target_names(target)):
                return False
        elif not (isinstance(inner, ast.Pass) or (isinstance(inner, ast.Expr) and not _has_effects(inner))):
            return False
    return True


def _are_plain(decorators: Sequence[ast.expr], outside: frozenset[str]) -> bool:
    """Whether all are of PLAIN_DECORATORS, with arguments that call nothing."""
    for decorator in decorators:
        called = isinstance(decorator, ast.Call)
        function = decorator.func if isinstance(decorator, ast.Call) else decorator
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
        arguments = [*decorator.args, *decorator.keywords] if isinstance(decorator, ast.Call) else []
        if _root(function) not in outside or name not in PLAIN_DECORATORS:
            return False
        if called and any(map(_has_effects, arguments)):
            return False
    return True


def _target_names(target: ast.expr) -> Iterator[str | None]:
    """The names of an assignment's target; None for an attribute or an item of something."""
    if isinstance(target, ast.Tuple | ast.List):
        for element in target.elts:
            yield from _target_names(element)
    else:
        yield target.id if isinstance(target, ast.Name) else None


def _has_effects(node: ast.AST) -> bool:
    """Whether evaluating an expression calls something; the body of a lambda is not evaluated."""
    if isinstance(node, ast.Lambda):
        return False
    return isinstance(node, EFFECTS) or any(map(_has_effects, ast.iter_child_nodes(node)))


def _identifiers(node: ast.AST) -> Iterator[str]:
    for below in ast.walk(node):
        if isinstance(below, ast.Name):
            yield below.id
        elif isinstance(below, ast.Attribute):
            yield below.attr
        elif isinstance(below, ast.alias):
            yield below.name.rpartition(".")[2]
        elif isinstance(below, ast.Global):
            yield from below.names
        elif isinstance(below, ast.Constant) and isinstance(below.value, str) and below.value.isidentifier():
            yield below.value


def _is_open_ended(node: ast.AST, outside: frozenset[str]) -> bool:
    """Whether an expression may reach names that stand nowhere in the code."""
    if isinstance(node, ast.Name):
        return node.id in COMPUTED_NAMES
    if isinstance(node, ast.Attribute):
        return node.attr in COMPUTED_NAMES or (node.attr == "modules" and _root(node) == "sys")
    if isinstance(node, DEFINITIONS):
        return node.name in HOOKS or bool(getattr(node, "keywords", []))  # a metaclass
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        computed = len(node.args) > 1 and not isinstance(node.args[1], ast.Constant)
        return computed and _root(node.args[0]) not in outside | {"self"}
    return False


def _root(node: ast.expr) -> str | None:
    """The name at which a chain of attributes starts."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _bound_by_imports(tree: ast.Module) -> Iterator[str]:
    """Names that stand for members of the standard library, torch and the like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots = [(alias.asname or alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            roots = [(alias.asname or alias.name, node.module or "") for alias in node.names]
        else:
            continue
        yield from (bound.partition(".")[0] for bound, name in roots if name.partition(".")[0] in OUTSIDE)


def _is_script(node: ast.stmt) -> bool:
    """``if __name__ == "__main__":``, which an import does not run."""
    if not (isinstance(node, ast.If) and isinstance(node.test, ast.Compare)):
        return False
    sides = [node.test.left, *node.test.comparators]
    values = {getattr(side, "id", getattr(side, "value", None)) for side in sides}
    return values == {"__name__", "__main__"} and isinstance(node.test.ops[0], ast.Eq)


def _is_docstring(node: ast.AST) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


# ---- text


class _Lines:
    """The lines of a source in UTF-8; comments and docstrings are blanks, so that positions stay.

    Attributes:
        lines: them.
        in_strings: the rows (from 1) whose end belongs to a string: their blanks count.
    """

    def __init__(self, text: str, tree: ast.Module) -> None:
        self.lines = [line.encode() for line in io.StringIO(text)]
        self.in_strings: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                start = len(token.line[:column].encode())
                self._blank((row, start), (row, start + len(token.string.encode())))
            self.in_strings |= set(range(token.start[0], token.end[0]))
        for node in ast.walk(tree):
            for inner in getattr(node, "body", []) if isinstance(node, (ast.Module, *DEFINITIONS)) else []:
                if _is_docstring(inner):
                    last = inner.end_lineno or inner.lineno
                    self._blank((inner.lineno, inner.col_offset), (last, inner.end_col_offset or 0))
                    self.in_strings -= set(range(inner.lineno, last))

    def segment(self, node: ast.stmt) -> str:
        """The text of a statement, its decorators included, without blank lines and trailing blanks."""
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        last = node.end_lineno or node.lineno
        lines = self.lines[first - 1 : last]
        lines[-1] = lines[-1][: node.end_col_offset]
        if first == node.lineno:
            lines[0] = lines[0][node.col_offset :]
        rows = zip(range(first, last + 1), (line.decode() for line in lines), strict=True)
        kept = [(row, line if row in self.in_strings else line.rstrip()) for row, line in rows]
        return "\n".join(line.rstrip("\n") for row, line in kept if line)

    def _blank(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        """Put blanks between two positions (row from 1, byte)."""
        for row in range(start[0], end[0] + 1):
            line = self.lines[row - 1]
            a = start[1] if row == start[0] else 0
            b = end[1] if row == end[0] else len(line)
            self.lines[row - 1] = line[:a] + b" " * (b - a) + line[b:]
