"""Which weights of a model are kept in few bits, and as what."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .codes import BLOCK, INT8, NF4, kept_bytes
from .tensor import Quantized

SMALL = 4096  # numbers of a weight that is not worth it


@dataclass(frozen=True)
class Plan:
    """`choice`: int8 or nf4; `dense`: paths of layers that stay as they are, such as the first and the last of a model."""

    choice: str
    dense: Sequence[str] = ()

    def codes(self, model: nn.Module) -> dict[str, str]:
        """Name of a parameter -> its code, for weights of Linear and Conv2d that are not small; the model may be on meta.

        nf4 is for matrices (Linear, 1x1 convolutions); larger kernels are kept as int8.
        """
        layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d)) and path not in self.dense}
        return {f"{path}.weight": self._code(layer.weight) for path, layer in layers.items() if layer.weight.numel() >= SMALL and layer.weight.numel() % BLOCK == 0}

    def _code(self, weight: Tensor) -> str:
        return INT8 if self.choice == INT8 or weight[0].numel() != weight.shape[1] else NF4

    def bytes(self, model: nn.Module) -> tuple[int, int]:
        """What the model's frozen parameters take when they are kept so, and as they would be dense; the model may be on meta, or be kept so already."""
        codes = self.codes(model)
        frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
        dense = {name: parameter.numel() * parameter.dtype.itemsize for name, parameter in frozen.items()}
        return sum(kept_bytes(frozen[name].numel(), codes[name]) if name in codes else size for name, size in dense.items()), sum(dense.values())

    def keeper(self, model: nn.Module) -> Callable[[str, Tensor], Tensor]:
        """(parameter's name, weight) -> what is kept of it, for a model whose weights are read one by one; it may be on meta now."""
        codes = self.codes(model)
        return lambda name, weight: Quantized.of(weight, codes[name], weight.dtype) if name in codes else weight


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers as they are kept."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(part.numel() * part.itemsize for tensor in tensors for part in (tensor.parts if isinstance(tensor, Quantized) else (tensor,)))
