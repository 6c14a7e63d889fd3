"""Import every module of a package: `python -P tools/import_all.py titan_config`. Does what it declares suffice?"""

import importlib
import pkgutil
import sys

package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
