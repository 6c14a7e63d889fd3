"""Import every module of a package: `python -P tools/import_all.py titan_config`.

Run in an environment with only the declared dependencies, it fails if one is missing in pyproject.toml.
"""

import importlib
import pkgutil
import sys

package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
