"""Check that a model trains on a device mesh as it does in one process."""

from titan_parallel.check.check_parallel import check_parallel
from titan_parallel.check.mesh_names import meshes
from titan_parallel.check.report import CheckReport, Finding, MeshReport

__all__ = ["CheckReport", "Finding", "MeshReport", "check_parallel", "meshes"]
