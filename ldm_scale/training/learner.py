"""A module and the AdamW that moves it, where every rank holds both whole.

What an engine trains on one process or under DDP is one; what learns beside it (a discriminator, a weight of the loss)
is another. Knows no engine, no loss and no file.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm_scale.training.masters import plain_masters
from ldm_scale.training.optimizer import OptimizerConfig, clip_and_step


class Learner:
    """Parameters that move together; their gradients are whatever lies in `grad`."""

    def __init__(
        self, module: nn.Module, optimizer: OptimizerConfig, *, prefix: str = "", learning_rate_ratio: float = 1.0
    ) -> None:
        """Take over every parameter of `module`, which lies on its device.

        prefix               of the parameters' names in `masters`
        learning_rate_ratio  what the learning rate of a step is multiplied by
        """
        self._parameters, self._adam = list(module.parameters()), optimizer.build(module)
        self._ratio = learning_rate_ratio
        self.masters = plain_masters(module, self._adam, prefix)

    @property
    def has_gradients(self) -> bool:
        """Whether anything was learned since the last step."""
        return any(parameter.grad is not None for parameter in self._parameters)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, (), to these parameters, and to no others that it depends on."""
        loss.backward(inputs=self._parameters)

    def average(self) -> None:
        """Make the gradients their mean over all ranks, in one collective."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view(grad.shape) / dist.get_world_size())

    def grad_norm(self) -> Tensor:
        """The norm of the gradients, () on the device."""
        return nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])

    def step(self, learning_rate: float, grad_norm: Tensor, max_norm: float) -> None:
        """Move by the gradients, clipped to `max_norm` (0: never), and clear them; see `clip_and_step`."""
        for group in self._adam.param_groups:
            group["lr"] = self._ratio * learning_rate
        clip_and_step(self._adam, grad_norm, max_norm)
        self._adam.zero_grad()
