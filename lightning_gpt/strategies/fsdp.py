"""Fully sharded data parallelism: PyTorch's FSDP2 through Lightning's ModelParallelStrategy."""

from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_gpt.strategies.saving import WholeFolders


class FSDP(WholeFolders, ModelParallelStrategy):
    """Every rank holds its share of each parameter, gradient and moment; a block is gathered when it is its turn.

    The module form shards itself in ``configure_model``, over the device mesh that this strategy makes.
    """

    def __init__(self, *, world_size: int, accelerator: str) -> None:
        # Both sizes, since "auto" would put all devices of a node into tensor parallelism.
        super().__init__(
            data_parallel_size=world_size,
            tensor_parallel_size=1,
            process_group_backend="gloo" if accelerator == "cpu" else None,
        )
