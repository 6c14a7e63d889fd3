"""Import paths of classes and functions ("module:qualname"), and importing by path, restricted by an allow-list.

The path of a class that a package re-exports in its `__all__` has the name of the package, whatever its module:
"titan_models:RMSNorm.Config". The path of a class of the script that runs as `__main__` has the name of the script:
"llama3_debug:Run.Config".
"""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import Any

from titan_config.configurable import Config, Configurable
from titan_config.errors import ConfigError, NotAllowed

DEFAULT_ALLOW: tuple[str, ...] = (
    *("titan_ckpt.*", "titan_config.*", "titan_data.*", "titan_ft.*", "titan_models.*", "titan_parallel.*"),
    *("titan_trainer.*", "torch.nn.init", "torch.nn.functional"),
)
"""The default allow-list of config files: Titan's seven installed packages and functions of torch.

Packages on this list are never imported from the current folder. The script that runs as `__main__` is always allowed.
A caller may add entries of these forms:

- "pkg": the config classes and enums of `pkg` and its submodules, and the functions of `pkg` itself, also those that it
  re-exports from a submodule in its `__all__` (for other functions of a submodule, list the submodule: "pkg.inits").
- "pkg.*": also the functions of all submodules.
- "prefix_": everything in every package whose name begins with "prefix_", so a file may name any such module that
  Python finds.
- "folder/recipe.py": that file, loaded by its path.
- "pkg.losses:ZLoss": that one class with its config, or that one function.

A module that is not yet imported is imported only if its source defines the requested name, or re-exports it from a
submodule in `__all__`.
"""

_CALLABLES = (types.FunctionType, types.BuiltinFunctionType, type)


def path_of(value: Any) -> str | None:
    """Return "module:qualname" of a class or function, or None if that path does not lead back to `value`."""
    if isinstance(value, types.BuiltinFunctionType):  # those of torch have the name of a private module
        for public in ("torch.nn.functional", "torch"):
            if _lookup(sys.modules.get(public), value.__name__) is value:
                return f"{public}:{value.__name__}"
    module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module and qualname and _lookup(sys.modules.get(module), qualname) is value:
        return f"{_script_name() if module == '__main__' else _public(module, qualname, value)}:{qualname}"
    return None


def _public(module: str, qualname: str, value: Any) -> str:
    """Return the outermost package around `module` that exports `value` in `__all__`, else `module`."""
    names = module.split(".")
    for depth in range(1, len(names)):
        package = sys.modules.get(".".join(names[:depth]))
        first = qualname.partition(".")[0]
        exported = first in getattr(package, "__all__", ()) and _lookup(package, qualname) is value
        if exported and _reexported(".".join(names[:depth]), first) is not None:  # so that the path can be read again
            return ".".join(names[:depth])
    return module


def find_class(path: str, allow: Sequence[str]) -> type:
    """Return the Config class or enum at `path`.

    Raises ConfigError if `path` is not allowed, cannot be imported, or does not name a Config class or enum defined
    there.
    """
    found = _find(path, allow, _allowed(path, allow))
    if not (isinstance(found, type) and issubclass(found, (Config, enum.Enum)) and _is_defined_at(found, path)):
        raise _wrong_target(path, found, "a Config class or an enum")
    return found


def find_config(path: str, allow: Sequence[str]) -> type[Config]:
    """Return the Config class at `path`, or the Config of the Configurable class there. Raises as `find_class` does."""
    found = _find(path, allow, _allowed(path, allow))
    if isinstance(found, type) and issubclass(found, (Configurable, Config)) and _is_defined_at(found, path):
        return found.Config if issubclass(found, Configurable) else found
    raise _wrong_target(path, found, "a component")


def find_function(path: str, allow: Sequence[str]) -> Any:
    """Return the function at `path`, or the class there for use as a function. Raises as `find_class` does."""
    found = _find(path, allow, _listed(path, allow))
    module, _, name = path.partition(":")
    is_public_builtin = isinstance(found, types.BuiltinFunctionType) and path_of(found) == f"{module}:{name}"
    if not (is_public_builtin or (isinstance(found, _CALLABLES) and _is_defined_at(found, path))):
        raise _wrong_target(path, found, "a function")
    return found


def _find(path: str, allow: Sequence[str], allowed: bool) -> Any:
    if isinstance(allow, str):
        raise ConfigError(f"allow must be a sequence of strings, got a string. Write allow=({allow!r},).")
    module, _, qualname = path.partition(":")
    plain = module.replace("-", "_")  # names of scripts and folders may contain dashes
    names = plain.split(".")
    if not all(part.isidentifier() for part in [*names, *qualname.split(".")]) or "__main__" in names[1:]:
        raise ConfigError(f'An import path must have the form "package.module:Name", got {path!r}.')
    if not allowed:
        error = NotAllowed(
            f"The import path {path} is not on the allow-list ({', '.join(_listing(allow))}). "
            f'If you trust that code, pass allow=(..., "{module}").'
        )
        error.import_path = path
        raise error
    return _lookup(_import(module, allow, qualname), qualname)


def _matches(module: str, entry: str) -> bool:
    if entry.endswith(".*"):
        return f"{module}.".startswith(entry[:-1])
    return module.startswith(entry) if entry.endswith("_") else module == _module_of(entry)


def _listed(path: str, allow: Sequence[str]) -> bool:
    module = path.partition(":")[0]
    if path in allow or path.removesuffix(".Config") in allow:
        return True
    if module == _script_name() or any(_matches(module, entry) for entry in allow):
        return True
    home = _home(path, allow)
    return home is not None and _listed(home, allow)


def _allowed(path: str, allow: Sequence[str]) -> bool:
    module = path.partition(":")[0]
    if _listed(path, allow) or any(module.startswith(f"{_module_of(entry)}.") for entry in allow):
        return True
    home = _home(path, allow)
    return home is not None and _allowed(home, allow)


def _home(path: str, allow: Sequence[str]) -> str | None:
    """Return the path at which a re-export is defined, if an entry names a submodule of the package; else None."""
    module, _, qualname = path.partition(":")
    if not any(entry.startswith(f"{module}.") for entry in allow):
        return None
    first, dot, rest = qualname.partition(".")
    try:
        home = _reexported(module, first)
    except SyntaxError:
        return None
    return None if home is None else f"{home}:{first}{dot}{rest}"


def _listing(allow: Sequence[str]) -> list[str]:
    modules = [entry for entry in allow if ":" not in entry]
    return [f"{entry}*" if entry.endswith("_") else entry for entry in modules] + [_script_name()]


def _module_of(entry: str) -> str:
    return _stem(entry) if entry.endswith(".py") else entry


def _stem(file: str) -> str:
    return file.replace("\\", "/").rpartition("/")[2].removesuffix(".py")


def _script_name() -> str:
    return _stem(getattr(sys.modules["__main__"], "__file__", None) or "__main__")


def _import(module: str, allow: Sequence[str], qualname: str) -> types.ModuleType | None:
    """Return the module, importing it if necessary; None if it is not yet imported and does not define the name."""
    import importlib.util

    if module == _script_name():
        return sys.modules["__main__"]
    scripts = [entry for entry in allow if entry.endswith(".py") and _stem(entry) == module]
    if scripts and module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, scripts[0])
        if spec is None or spec.loader is None:
            raise ConfigError(f"A file in allow must be a .py file that Python can load, got {scripts[0]}.")
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    try:
        if module not in sys.modules:
            _check_installed(module.partition(".")[0])
            if not _defines(module, qualname.partition(".")[0]):
                return None
        return importlib.import_module(module)
    except SyntaxError as error:
        raise ConfigError(f"The module {module} must be valid Python, got {error}.") from error
    except ImportError as error:
        raise ConfigError(
            f"The module {module} cannot be imported: {error}. "
            "Install its package, or run from the folder that contains it."
        ) from error


def _check_installed(package: str) -> None:
    """Raise ConfigError for a package of `DEFAULT_ALLOW` that Python would import from the current folder."""
    import importlib.util
    import os

    defaults = {entry.partition(".")[0] for entry in DEFAULT_ALLOW}
    spec = importlib.util.find_spec(package) if package in defaults and package not in sys.modules else None
    if spec is None:
        return
    here, own = os.path.realpath(os.curdir), os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    folders = spec.submodule_search_locations or [os.path.splitext(spec.origin or "")[0]]
    if here != own and any(os.path.dirname(os.path.realpath(folder)) == here for folder in folders):
        raise ConfigError(
            f"{package} must be an installed package, got {folders[0]} in the current folder. Run from another folder."
        )


def _defines(module: str, name: str) -> bool:
    """Return whether a module's source defines `name` or re-exports it; True if there is no source."""
    import ast
    import importlib.util

    nodes = _nodes_of(importlib.util.find_spec(module))
    return (
        nodes is None
        or _reexported(module, name) is not None
        or any(
            (isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name)
            or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == name)
            for node in nodes
        )
    )


def _reexported(package: str, name: str) -> str | None:
    """Return the submodule from which a package's source re-exports `name` in a literal `__all__`; None if it does not.

    Only imports at the top level of the source count. Raises SyntaxError.
    """
    import ast
    import importlib.util

    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    nodes = _nodes_of(spec)
    if spec is None or not nodes or not spec.submodule_search_locations or not isinstance(nodes[0], ast.Module):
        return None
    body = nodes[0].body
    exported = {
        element.value
        for node in body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
        for element in (node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else ())
        if isinstance(element, ast.Constant)
    }
    imports = [node for node in body if isinstance(node, ast.ImportFrom)] if name in exported else []
    for node in imports:
        for alias in node.names:
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            if (alias.name, alias.asname or name) == (name, name) and source.startswith(f"{package}."):
                return source
    return None


def _imported_from(module: str, qualname: str) -> str | None:
    """Return the import path from which a module's source imports `qualname`; None if the source does not import it."""
    import ast
    import importlib.util

    first, dot, rest = qualname.partition(".")
    try:
        spec = importlib.util.find_spec(module)
        nodes = _nodes_of(spec)
    except (ImportError, ValueError, SyntaxError):
        return None
    for node in nodes or ():
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if spec is not None and (alias.asname or alias.name) == first:
                package = module if spec.submodule_search_locations else module.rpartition(".")[0]
                source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                return f"{source}:{alias.name}{dot}{rest}"
    return None


def _nodes_of(spec: ModuleSpec | None) -> list[Any] | None:
    """Return the nodes of the syntax tree of a module's source; None if there is no source. Raises SyntaxError."""
    import ast
    from importlib.abc import InspectLoader

    if spec is None or not isinstance(spec.loader, InspectLoader):
        return None
    try:
        source = spec.loader.get_source(spec.name)
        return None if source is None else list(ast.walk(ast.parse(source)))
    except ValueError as error:  # undecodable bytes or null bytes
        raise SyntaxError(str(error)) from error


def _lookup(root: Any, qualname: str) -> Any:
    """Return the object at a dotted name, None if absent; reads `__dict__` only, so that no `__getattr__` runs."""
    for part in qualname.split("."):
        root = getattr(root, "__dict__", {}).get(part)
    return root


def _is_defined_at(found: Any, path: str) -> bool:
    """Return whether `__module__` and `__qualname__` of `found` agree with the import path that led to it."""
    module, _, qualname = path.partition(":")
    home = "__main__" if module == _script_name() else module
    return found.__qualname__ == qualname and (found.__module__ == home or path_of(found) == path)


def _wrong_target(path: str, found: Any, need: str) -> ConfigError:
    module, _, name = path.partition(":")
    must = f"The import path {path} must name {need} defined in {module}"
    if found is not None:
        kind = "class" if isinstance(found, type) else "function" if callable(found) else type(found).__qualname__
        name = getattr(found, "__qualname__", type(found).__qualname__)
        return ConfigError(f"{must}, got the {kind} {getattr(found, '__module__', '')}:{name}.")
    home = _imported_from(module, name)
    if home is not None:
        return ConfigError(f"{must}, got a name that {module} only imports. Write {home}.")
    return ConfigError(f"{must}, got a name that does not exist in {module}.")
