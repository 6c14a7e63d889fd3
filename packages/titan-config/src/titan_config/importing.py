"""Import paths of classes and functions ("module:qualname"), and the way back, through a list of what may be imported.

A class of the script that runs as `__main__` goes by the script's name: "llama3_debug:Experiment.Config".
"""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Sequence
from typing import Any

from titan_config.configurable import Config, Configurable
from titan_config.errors import ConfigError

DEFAULT_ALLOW: tuple[str, ...] = ("titan_", "torch.nn.init", "torch.nn.functional")
"""What may be loaded unless a caller says otherwise. The script that runs as `__main__` may always be.

"pkg" allows the config classes and enums of `pkg` and its submodules, and the functions of `pkg` itself (those of a
submodule need it listed: "pkg.inits"). "family_" allows all of every package whose name begins so. "folder/recipe.py"
allows that file, loaded by its path.
"""

_CALLABLES = (types.FunctionType, types.BuiltinFunctionType, type)


def path_of(value: Any) -> str | None:
    """Return "module:qualname" for a class or function that can be found there again, None for any other."""
    if isinstance(value, types.BuiltinFunctionType):  # torch's name the private module they come from
        for public in ("torch.nn.functional", "torch"):
            if _lookup(sys.modules.get(public), value.__name__) is value:
                return f"{public}:{value.__name__}"
    module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module and qualname and _lookup(sys.modules.get(module), qualname) is value:
        return f"{_script_name() if module == '__main__' else module}:{qualname}"
    return None


def find_class(path: str, allow: Sequence[str]) -> type:
    """Return the Config class or the enum at `path`. Raises ConfigError where it is not allowed, or another thing."""
    found = _find(path, allow, _allowed(path, allow))
    if not (isinstance(found, type) and issubclass(found, (Config, enum.Enum)) and _says(found, path)):
        raise _lie(path, found, "a Config class or an enum")
    return found


def find_config(path: str, allow: Sequence[str]) -> type[Config]:
    """Return the Config class at `path`, or that of the Configurable class there. Raises as `find_class` does."""
    found = _find(path, allow, _allowed(path, allow))
    if isinstance(found, type) and issubclass(found, (Configurable, Config)) and _says(found, path):
        return found.Config if issubclass(found, Configurable) else found
    raise _lie(path, found, "a component")


def find_function(path: str, allow: Sequence[str]) -> Any:
    """Return the function (or the class used as one) at `path`. Raises as `find_class` does."""
    found = _find(path, allow, _listed(path, allow))
    module, _, name = path.partition(":")
    is_public_builtin = isinstance(found, types.BuiltinFunctionType) and path_of(found) == f"{module}:{name}"
    if not (is_public_builtin or (isinstance(found, _CALLABLES) and _says(found, path))):
        raise _lie(path, found, "a function")
    return found


def _find(path: str, allow: Sequence[str], allowed: bool) -> Any:
    if isinstance(allow, str):
        raise ConfigError(
            f"Got allow={allow!r}. It is a list of names, each of them allowed. Write allow=({allow!r},)."
        )
    module, _, qualname = path.partition(":")
    plain = module.replace("-", "_")  # scripts and folders may have names with a dash
    if not all(part.isidentifier() for part in [*plain.split("."), *qualname.split(".")]):
        raise ConfigError(
            f'Got the import path {path!r}. An import path is "module:name". Write it as "package.module:Class".'
        )
    if not allowed:
        raise ConfigError(
            f"Got the import path {path}, which the allow-list does not hold. Only what is listed may be imported: "
            f'{", ".join(_listing(allow))}. If you trust that code, pass allow=(..., "{module}").'
        )
    return _lookup(_import(module, allow), qualname)


def _matches(module: str, entry: str) -> bool:
    return module.startswith(entry) if entry.endswith("_") else module == _module_of(entry)


def _listed(path: str, allow: Sequence[str]) -> bool:
    module = path.partition(":")[0]
    return module == _script_name() or any(_matches(module, entry) for entry in allow)


def _allowed(path: str, allow: Sequence[str]) -> bool:
    module = path.partition(":")[0]
    return _listed(path, allow) or any(module.startswith(f"{_module_of(entry)}.") for entry in allow)


def _listing(allow: Sequence[str]) -> list[str]:
    return [f"{entry}*" if entry.endswith("_") else entry for entry in [*allow, _script_name()]]


def _module_of(entry: str) -> str:
    return _stem(entry) if entry.endswith(".py") else entry


def _stem(file: str) -> str:
    return file.replace("\\", "/").rpartition("/")[2].removesuffix(".py")


def _script_name() -> str:
    return _stem(getattr(sys.modules["__main__"], "__file__", None) or "__main__")


def _import(module: str, allow: Sequence[str]) -> types.ModuleType:
    import importlib.util

    if module == _script_name():
        return sys.modules["__main__"]
    scripts = [entry for entry in allow if entry.endswith(".py") and _stem(entry) == module]
    if scripts and module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, scripts[0])
        if spec is None or spec.loader is None:
            raise ConfigError(f"Got {scripts[0]}, which Python cannot load. A recipe is a .py file. Correct allow.")
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"Got the module {module}, which cannot be imported: {error}. Loading needs the code that the config was "
            "made with. Install the package, or run from where it can be found."
        ) from error


def _lookup(root: Any, qualname: str) -> Any:
    """Follow a dotted name through namespaces as they are: no `__getattr__` runs."""
    for part in qualname.split("."):
        root = getattr(root, "__dict__", {}).get(part)
    return root


def _says(found: Any, path: str) -> bool:
    module, _, qualname = path.partition(":")
    home = "__main__" if module == _script_name() else module
    return found.__module__ == home and found.__qualname__ == qualname


def _lie(path: str, found: Any, need: str) -> ConfigError:
    module, _, name = path.partition(":")
    got = f"is {getattr(found, '__module__', '')}:{getattr(found, '__qualname__', type(found).__qualname__)}"
    return ConfigError(
        f"Got the import path {path}, which {'does not exist' if found is None else got}. It must be {need} that is "
        f"defined in {module} under the name {name}. Correct the path."
    )
