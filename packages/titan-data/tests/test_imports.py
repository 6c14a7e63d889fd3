from __future__ import annotations

import subprocess
import sys


def test_import_loads_no_heavy_library() -> None:
    heavy = {"datasets", "tiktoken", "tokenizers", "pyarrow", "regex", "tyro"}
    code = f"import sys, titan_data; print(sorted({heavy!r} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
