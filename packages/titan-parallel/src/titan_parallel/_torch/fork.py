"""Private torch APIs that a forked child needs to leave the process groups of its parent.

`dist.destroy_process_group()` would join threads that a forked child does not have, and hang. So the child clears the
registry of groups (`torch.distributed.distributed_c10d._world`) instead, and keeps the groups themselves alive. Tried
with torch 2.11 and 2.13; `test_a_rank_can_make_a_dry_run_of_a_larger_group` fails if the registry changes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

_inherited_groups: list[Any] = []  # never freed: their destructors join threads that the child does not have


def forget_process_groups() -> None:
    """Leave all process groups, in a forked child, without destroying those of the parent."""
    world = dist.distributed_c10d._world
    _inherited_groups.extend([*world.pg_map, world.default_pg])
    world.default_pg = None
    for table in (
        world.pg_map,
        world.pg_names,
        world.pg_group_ranks,
        world.pg_backend_config,
        world.pg_to_tag,
        world.tags_to_pg,
        world.pg_coalesce_state,
    ):
        table.clear()
    world.group_count = 0
    torch._C._distributed_c10d._unregister_all_process_groups()
