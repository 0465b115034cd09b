"""Loss per element between prediction and target, in the target's dtype (fp32)."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F

LossFunction = Callable[[Tensor, Tensor], Tensor]


def make_loss(type: str, delta: float) -> LossFunction:
    """(pred, target) -> unreduced loss of the same shape, in target's dtype; `delta` is the threshold of huber and smooth_l1."""
    functions = {
        "mse": F.mse_loss,
        "l1": F.l1_loss,
        "huber": partial(F.huber_loss, delta=delta),
        "smooth_l1": partial(F.smooth_l1_loss, beta=delta),
    }
    function = functions[type]
    return lambda pred, target: function(pred.to(target.dtype), target, reduction="none")
