"""Loss per element between prediction and target, always in fp32."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F

LossFunction = Callable[[Tensor, Tensor], Tensor]


def make_loss(type: str, delta: float) -> LossFunction:
    """(pred, target) -> unreduced fp32 loss of the same shape; `delta` is the threshold of huber and smooth_l1."""
    functions = {
        "mse": F.mse_loss,
        "l1": F.l1_loss,
        "huber": partial(F.huber_loss, delta=delta),
        "smooth_l1": partial(F.smooth_l1_loss, beta=delta),
    }
    function = functions[type]
    return lambda pred, target: function(pred.float(), target.float(), reduction="none")
