"""Each method straight from its equations: plain torch, float64 noise, nothing shared with the library's optimizers."""

import torch
from torch import Tensor
from zo_core.kernels import reference


class Twin:
    """Float32 weights; noise from the specification; one loop a tensor."""

    def __init__(self, params, seed, distribution="gaussian"):
        self.params = list(params)
        self.seed, self.distribution, self.stream = seed, distribution, 0

    def z(self, i: int, stream: int) -> Tensor:
        element = torch.arange(self.params[i].numel())
        noise = reference.DISTRIBUTIONS[self.distribution](element, tensor_id=i, stream=stream, seed=self.seed)
        return noise.view(self.params[i].shape)

    def at(self, loss, c: float, stream: int) -> float:
        saved = [p.detach().clone() for p in self.params]
        with torch.no_grad():
            for i, p in enumerate(self.params):
                p.copy_((p.double() + c * self.z(i, stream)).to(p.dtype))
            value = float(loss())
            for p, s in zip(self.params, saved, strict=True):
                p.copy_(s)
        return value


class TwinMeZO(Twin):
    """theta <- theta - lr (g z + wd theta), g = (l+ - l-) / (2 eps), averaged over n directions."""

    def step(self, loss, lr, eps, weight_decay=0.0, probes=1, decay_vectors=False):
        streams = range(self.stream, self.stream + probes)
        self.stream += probes
        pairs = [(self.at(loss, eps, s), self.at(loss, -eps, s)) for s in streams]
        with torch.no_grad():
            for i, p in enumerate(self.params):
                rate = lr[i] if isinstance(lr, list) else lr
                wd = weight_decay[i] if isinstance(weight_decay, list) else weight_decay
                g = sum((a - b) / (2 * eps) * self.z(i, s) for (a, b), s in zip(pairs, streams, strict=True)) / probes
                shrink = wd * p.double() if p.ndim > 1 or decay_vectors else 0.0
                p.copy_((p.double() - rate * (g + shrink)).to(p.dtype))
        return sum(a + b for a, b in pairs) / (2 * probes)
