"""Fully sharded data parallelism: PyTorch's FSDP2 through Lightning's ModelParallelStrategy."""

from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_gpt.strategies.saving import WholeFolders


class FSDP(WholeFolders, ModelParallelStrategy):
    """Each rank holds a shard of every parameter, gradient and moment; a block is gathered when it runs.

    ``FSDPGPTModule`` shards itself in ``configure_model``, over this strategy's device mesh.
    """

    def __init__(self, *, world_size: int, accelerator: str) -> None:
        # Set explicitly, because "auto" uses all devices of a node for tensor parallelism.
        super().__init__(
            data_parallel_size=world_size,
            tensor_parallel_size=1,
            process_group_backend="gloo" if accelerator == "cpu" else None,
        )
