"""Reader of a folder of Hugging Face weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from titan_ckpt.errors import CheckpointError, join_names
from titan_ckpt.format.safetensors_reader import MappedFile
from titan_ckpt.format.strict_json import read_json, regular_file_exists
from titan_ckpt.hugging_face.adapter import WeightMapping
from titan_ckpt.hugging_face.weight_files import INDEX, folder_of, weight_files
from titan_ckpt.paths import local_path

CONFIG = "config.json"


class HFReader:
    """The tensors of the safetensors files in a folder, and its `config.json` (None if absent); a context manager.

    If the folder has an index, only the files in the index are read. `path` may also be a file that selects one of two
    sets of weights: an index, or a safetensors file.

    Raises:
        CheckpointError: if there is no set of weights or more than one, a file is incomplete, or a file lacks tensors
            that the index assigns to it.
    """

    def __init__(self, path: Path) -> None:
        path = local_path(path, "The folder of Hugging Face weights")
        config = folder_of(path) / CONFIG
        self.config: dict[str, Any] | None = read_json(config) if regular_file_exists(config) else None
        files, known = weight_files(path)
        self._stand_ins: dict[str, Tensor] = {}
        self._file_of: dict[str, MappedFile] = {}
        with ExitStack() as opened:
            for each in files:
                self._add(each, opened.enter_context(MappedFile(each)), known)
            self._stack = opened.pop_all()

    def _add(self, path: Path, file: MappedFile, known: Mapping[str, str]) -> None:
        found = file.meta_tensors()
        absent = [key for key, name in known.items() if name == path.name and key not in found]
        if absent or found.keys() & self._file_of.keys():
            raise CheckpointError(
                f"{path} must contain the tensors that {INDEX} assigns to it, and none of other files, got "
                f"{join_names(absent) or 'none'} missing and "
                f"{join_names(sorted(found.keys() & self._file_of.keys())) or 'none'} duplicated. Download or export "
                "the folder again."
            )
        self._stand_ins |= found
        self._file_of |= dict.fromkeys(found, file)

    def __enter__(self) -> HFReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def meta_tensors(self) -> dict[str, Tensor]:
        """Return all tensors on the meta device: names, shapes and dtypes."""
        return self._stand_ins

    def read(self, mapping: WeightMapping) -> list[Tensor]:
        """Return the tensors of a mapping; only accessed values are read from the files."""
        return [self._file_of[key].tensor(key) for key in mapping.hf_names]
