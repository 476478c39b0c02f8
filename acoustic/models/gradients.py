"""Functions that are the identity in the forward pass and change what flows back."""

import torch


def scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """x, with its gradient times `factor`; at 0 there is none."""
    if factor == 1:
        return x
    return x.detach() if factor == 0 else ScaleGradient.apply(x, factor)


class ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def leave_out(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x, past a module whose parameters get gradients of zero.

    DistributedDataParallel waits for a gradient of every parameter; and one process then does what many do. Under FSDP
    the module is not gathered: its parameters are shards (DTensors) here, and so are the zeros.
    """
    return LeaveOut.apply(x, *[parameter for parameter in module.parameters() if parameter.requires_grad])


class LeaveOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.parameters = parameters
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, *[torch.zeros_like(parameter) for parameter in ctx.parameters]
