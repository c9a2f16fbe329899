"""Which rank of how many this process is."""

from typing import TYPE_CHECKING, Any, TypeAlias

from torch import distributed

from loaders.arguments import integer
from shardify.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ProcessGroup: TypeAlias = "distributed.ProcessGroup | DeviceMesh | None"


def place_of(rank: int | None, world_size: int | None, group: ProcessGroup = None) -> tuple[int, int]:
    """This process's rank and the number of ranks that share the data.

    Args:
        rank: given by the user, together with `world_size`.
        world_size: likewise.
        group: the ranks that share the data: a process group, or a device mesh of one dimension. Ranks that differ only in other
            dimensions (tensor or pipeline parallel ones) then get the same batches.

    Raises:
        UsageError: they contradict each other, or this process is not in the group.
    """
    if (rank is None) != (world_size is None):
        raise UsageError(
            f"rank={rank}, world_size={world_size}: give both, or none to take torch.distributed's"
        )
    if group is not None:
        if rank is not None:
            raise UsageError("process_group= says which rank this is; leave rank= and world_size= out")
        return _place_in(group)
    if rank is not None and world_size is not None:
        if not 0 <= integer("rank", rank) < integer("world_size", world_size):
            raise UsageError(f"rank={rank}, world_size={world_size}: 0 <= rank < world_size is needed")
        return integer("rank", rank), integer("world_size", world_size)
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _place_in(group: Any) -> tuple[int, int]:
    # what torch gives to those that a new group leaves out
    if group == distributed.GroupMember.NON_GROUP_MEMBER:
        raise UsageError("process_group: this process is not in it")
    if not isinstance(group, distributed.ProcessGroup):
        if group.ndim != 1:
            names = group.mesh_dim_names or ()
            raise UsageError(
                f"process_group is a device mesh of {group.ndim} dimensions {names}; give the one that shares the data, such as mesh['dp']"
            )
        return int(group.get_local_rank()), int(group.size())
    rank = distributed.get_rank(group)
    if rank < 0:
        raise UsageError("process_group: this process is not in it")
    return rank, distributed.get_world_size(group)
