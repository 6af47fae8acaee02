"""Parameter types of targets, read from their source without importing them.

Importing a target takes many seconds (torch), which submitting a training does not need. Only plain
values are understood; annotations of modules, callables and tensors are left to the call itself.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, reduce
from importlib.util import find_spec, resolve_name
from operator import or_
from pathlib import Path

_PLAIN = {"bool", "int", "float", "str", "None"}
_LISTS = {"Sequence", "Iterable", "Collection", "list", "tuple", "set"}
_MAPPINGS = {"Mapping", "dict"}


@dataclass(frozen=True)
class Type:
    """The values of a configuration that a parameter takes.

    Args:
        plain: names of the plain types: bool, int, float, str (which includes paths) and None.
        items: types of a list's items: one for each place, or one for all.
        values: the type of a mapping's values.
        fields: the class or function whose parameters are the keys of a mapping.
        more: special numbers that are accepted as well ("inf", "nan").
        anything: nothing is known of the parameter.
    """

    plain: frozenset[str] = frozenset()
    items: tuple["Type", ...] | None = None
    values: "Type | None" = None
    fields: str | None = None
    more: frozenset[str] = frozenset()
    anything: bool = False

    def __or__(self, other: "Type") -> "Type":
        return Type(
            self.plain | other.plain,
            self.items or other.items,
            self.values or other.values,
            self.fields or other.fields,
            self.more | other.more,
            self.anything or other.anything,
        )


ANYTHING = Type(anything=True)


@cache
def parameters(target: str) -> Mapping[str, Type]:
    """The types of a function's or class's parameters, or of a class's fields, by name.

    Args:
        target: a dotted name. Without its source, no parameter is known.
    """
    name, _, last = target.rpartition(".")
    found = _definition(name, last)
    return {} if found is None else dict(_annotated(*found))


def _annotated(module: str, node: ast.AST) -> Iterator[tuple[str, Type]]:
    if isinstance(node, ast.ClassDef):
        of = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not of:
            for base in node.bases:
                if found := _found(module, base):
                    yield from _annotated(*found)
            for line in node.body:
                if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
                    continue
                if not ast.unparse(line.annotation).startswith("ClassVar"):
                    yield line.target.id, _type(module, line.annotation)
            return
        node = of[0]
    if isinstance(node, ast.FunctionDef):
        for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            yield arg.arg, _type(module, arg.annotation) if arg.annotation else ANYTHING


def _type(module: str, node: ast.expr) -> Type:
    """The type that an annotation in a module declares."""
    if isinstance(node, ast.BinOp):
        return _type(module, node.left) | _type(module, node.right)
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return _subscripted(module, ast.unparse(node.value).rpartition(".")[2], inner)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _type(module, ast.parse(node.value, mode="eval").body)
    name = ast.unparse(node)
    if name in _PLAIN:
        return Type(frozenset({name}))
    if name == "Path":
        return Type(frozenset({"str"}))
    if name == "Any":
        return ANYTHING
    if name in _LISTS | _MAPPINGS:
        return Type(items=(ANYTHING,)) if name in _LISTS else Type(values=ANYTHING)
    if (found := _found(module, node)) is None:
        return Type()
    where, of = found
    if isinstance(of, ast.expr):
        return _type(where, of)
    return Type(fields=f"{where}.{of.name}")


def _subscripted(module: str, name: str, inner: list[ast.expr]) -> Type:
    if name == "Annotated":
        return _type(module, inner[0]) | Type(
            more=frozenset(ast.literal_eval(n) for n in inner[1:])
        )
    if name in ("Union", "Optional"):
        types = [_type(module, part) for part in inner]
        types += [Type(frozenset({"None"}))] if name == "Optional" else []
        return reduce(or_, types, Type())
    if name == "Literal":
        return Type(frozenset(type(ast.literal_eval(part)).__name__ for part in inner))
    if name in _LISTS:
        places = [part for part in inner if ast.unparse(part) != "..."]
        return Type(items=tuple(_type(module, part) for part in places))
    if name in _MAPPINGS:
        return Type(values=_type(module, inner[-1]))
    return Type()


def _found(module: str, node: ast.expr) -> tuple[str, ast.AST] | None:
    """Resolves a name, or a dotted name, as a module would."""
    name = ast.unparse(node)
    if name.startswith("cascade."):
        module, _, name = name.rpartition(".")
    return _definition(module, name) if name.isidentifier() else None


@cache
def _definition(module: str, name: str) -> tuple[str, ast.AST] | None:
    """Follows imports to a definition; returns the module that holds it, and its node."""
    for node in _source(module):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return module, node.value
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(_absolute(module, node), alias.name)
    return None


def _absolute(module: str, node: ast.ImportFrom) -> str:
    path = _path(module)
    package = module if path and path.name == "__init__.py" else module.rpartition(".")[0]
    return resolve_name("." * node.level + (node.module or ""), package)


@cache
def _source(module: str) -> list[ast.stmt]:
    path = _path(module)
    return ast.parse(path.read_bytes()).body if path else []


@cache
def _path(module: str) -> Path | None:
    """The path of a module's source. Of other packages, not even the parents are imported."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(module if top == "cascade" else top)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin:
        return None
    if top == "cascade" or not rest:
        return Path(spec.origin) if spec.origin.endswith(".py") else None
    base = Path(spec.origin).parent.joinpath(*rest)
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)
