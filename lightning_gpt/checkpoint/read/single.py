"""Read Lightning's checkpoint file, as training on one device or under DDP writes it."""

import copy

from torch import Tensor

from lightning_gpt.checkpoint.base import PREFIX, Checkpoint, as_state, meta
from lightning_gpt.checkpoint.read.mapped import MappedFile
from lightning_gpt.config import UserError

TRAINED = "current_model_state"  # Lightning's name for the weights of a run whose state_dict is their average


class SingleFileCheckpoint(Checkpoint):
    """A file that ``Trainer.save_checkpoint`` wrote.

    Args:
        file: The opened file.

    Raises:
        UserError: It is not one of our checkpoints.
    """

    kind = "lightning"

    def __init__(self, file: MappedFile) -> None:
        self._file = file
        path, content = file.path, file.content
        if not isinstance(content, dict) or "state_dict" not in content:
            raise UserError(f"{path} is not a checkpoint that train.py wrote")
        # Copied, because any tensor that is kept would keep the whole file mapped.
        tensors = ("state_dict", TRAINED, "optimizer_states")
        rest = {key: value for key, value in content.items() if key not in tensors}
        super().__init__(path, copy.deepcopy(rest))
        self._keys = {key.removeprefix(PREFIX): key for key in content["state_dict"]}
        self.stored = {name: meta(content["state_dict"][key]) for name, key in self._keys.items()}
        self.has_average = TRAINED in content
        if self.has_average and _shapes(content[TRAINED]) != _shapes(content["state_dict"]):
            raise UserError(f"{path} is damaged: its average has other tensors than its weights")
        self.moments = {}
        self._indices: dict[str, int] = {}
        optimizers = content.get("optimizer_states") or [{"state": {}, "param_groups": []}]
        for group in optimizers[0]["param_groups"]:
            self._indices |= dict(zip(group.get("param_names", ()), group["params"], strict=False))
        for name, index in self._indices.items():
            state = optimizers[0]["state"].get(index)
            if state:
                self.moments[name] = {key: meta(as_state(value)) for key, value in state.items()}

    def _read(self, name: str) -> Tensor:
        return self._file.read(lambda content: content["state_dict"][self._keys[name]])

    def _read_moment(self, name: str, key: str) -> Tensor:
        index = self._indices[name]
        return self._file.read(lambda content: as_state(content["optimizer_states"][0]["state"][index][key]))

    def trained_weight(self, name: str) -> Tensor:
        """Read a weight that training continues from."""
        found = self.stored_name(name, self.stored)
        if not self.has_average or found is None:
            return self.weight(name)
        return self._file.read(lambda content: content[TRAINED][self._keys[found]])


def _shapes(state_dict: dict[str, Tensor]) -> dict[str, tuple[object, ...]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state_dict.items()}
