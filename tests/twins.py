"""Each method straight from its equations: plain torch in float64, nothing shared with the library's optimizers.

``loss`` of a step is a function, or a list of them, one for each probe.
"""

import torch
from torch import Tensor
from zo_core.kernels import reference


class Twin:
    """Values in float64, rounded into the parameters; noise from the specification; one loop a tensor."""

    def __init__(self, params, seed, distribution="gaussian"):
        self.params, self.seed, self.distribution, self.stream = [], seed, distribution, 0
        self.values, self.hessians = [], []
        self.left_out = set()  # numbers of tensors that this step does not touch
        self.scales = None  # sigma of each tensor's probe, 1 unless given
        self.decay_vectors = False  # whether biases and norms decay too
        self.momentum, self.window, self.past = 0.0, 1, []  # past: this step and those before, the last one first
        self.add(params)

    def add(self, params):
        for p in params:
            self.params.append(p)
            self.values.append(p.detach().double().clone())
            self.hessians.append(torch.ones_like(self.values[-1]))
            for step in self.past:  # which were not about this tensor
                for _, z in step:
                    z.append(torch.zeros_like(self.values[-1]))

    def z(self, i: int, stream: int) -> Tensor:
        element = torch.arange(self.params[i].numel())
        key = {"tensor_id": i, "stream": stream, "seed": self.seed}
        if self.distribution == "factored":
            key["columns"] = reference.columns_of([self.params[i]])[0]
        noise = reference.DISTRIBUTIONS[self.distribution](element, **key)
        return noise.view(self.params[i].shape).double() * (i not in self.left_out)

    def sigma(self, i: int) -> float:
        """The scale of tensor i: all are multiplied by one number, so that the sum of d_i sigma_i^2 is that of d_i."""
        if self.scales is None:
            return 1.0
        d = [p.numel() for p in self.params]
        return self.scales[i] * (sum(d) / sum(n * x * x for n, x in zip(d, self.scales, strict=True))) ** 0.5

    def put(self, values):
        with torch.no_grad():
            for p, value in zip(self.params, values, strict=True):
                p.copy_(value)

    def at(self, loss, c: float, stream: int = 0) -> float:
        self.put(
            [
                v + c * h**-0.5 * self.sigma(i) * self.z(i, stream)
                for i, (v, h) in enumerate(zip(self.values, self.hessians, strict=False))
            ]
        )
        value = float(loss().detach())
        self.put(self.values)
        return value

    def draw(self, n):
        self.stream += n
        return range(self.stream - n, self.stream)

    def move(self, directions, lr, weight_decay=0.0):
        """theta <- theta - lr (direction + wd theta) of each tensor; lr and wd may be lists, one number a tensor."""
        for i, (v, p, direction) in enumerate(zip(self.values, self.params, directions, strict=True)):
            rate = lr[i] if isinstance(lr, list) else lr
            wd = weight_decay[i] if isinstance(weight_decay, list) else weight_decay
            if i not in self.left_out:
                self.values[i] = v - rate * (direction + (wd * v if p.ndim > 1 or self.decay_vectors else 0.0))
        self.put(self.values)

    def along(self, coeffs, streams):
        """sum over steps i of the window, this one with i = 0, of momentum^i sum_k coeffs[k] H^-1/2 sigma z_k, of each tensor.

        z_k is 0 in tensors that the step left out.
        """
        steps = self.remember(coeffs, streams)
        return [
            sum(self.momentum**i * c * h**-0.5 * self.sigma(n) * z[n] for i, step in enumerate(steps) for c, z in step)
            for n, h in enumerate(self.hessians)
        ]

    def remember(self, coeffs, streams):
        """Pairs of each coefficient and its noise, all tensors', of the steps of the window."""
        noise = [[self.z(i, s) for i in range(len(self.params))] for s in streams]
        self.past = [list(zip(coeffs, noise, strict=True)), *self.past][: self.window]
        return self.past


def each(loss, probes: int) -> list:
    """The loss of each probe."""
    return loss if isinstance(loss, list) else [loss] * probes


class TwinMeZO(Twin):
    """g = (l+ - l-) / (2 eps), averaged over n directions. LeZO is the same with tensors left out."""

    def step(self, loss, lr, eps, weight_decay=0.0, probes=1):
        streams = self.draw(probes)
        pairs = [(self.at(x, eps, s), self.at(x, -eps, s)) for x, s in zip(each(loss, probes), streams, strict=True)]
        self.move(self.along([(a - b) / (2 * eps) / probes for a, b in pairs], streams), lr, weight_decay)
        return sum(a + b for a, b in pairs) / (2 * probes)


class TwinHiZOO(Twin):
    """H' = (1 - a) H + a |l+ + l- - 2 l0| / (2 eps^2) H z^2, clamped; theta <- theta - lr g H'^-1/2 z."""

    def step(self, loss, lr, eps, weight_decay=0.0, probes=1, smoothing=1e-6, factored=False):
        streams, clean = self.draw(probes), [self.at(x, 0.0) for x in each(loss, probes)]
        pairs = [(self.at(x, eps, s), self.at(x, -eps, s)) for x, s in zip(each(loss, probes), streams, strict=True)]
        for i, h in enumerate(self.hessians):
            if i in self.left_out:
                continue
            new = (1 - smoothing) * h
            for (a, b), l0, s in zip(pairs, clean, streams, strict=True):
                new = new + smoothing * abs(a + b - 2 * l0) / (2 * eps**2) * h * self.z(i, s) ** 2 / probes
            if factored and new.ndim > 1:  # row means times column means over the mean
                new = new.mean(1, keepdim=True) * new.mean(0, keepdim=True) / new.mean()
            self.hessians[i] = new.clamp(1e-8, 1e8)
        self.move(self.along([(a - b) / (2 * eps) / probes for a, b in pairs], streams), lr, weight_decay)
        return sum(clean) / probes


class TwinFZOO(Twin):
    """theta <- theta - lr / (N s) sum_i (l_i - l0) u_i, s the unbiased standard deviation of the l_i.

    With a loss for each probe, l0 is of each too, and s is the standard deviation of the l_i - l0. With beta s^2 is a mean over
    all steps, in which a step counts beta times as much as the next.
    """

    before = ()
    variances = ()

    def step(self, loss, lr, eps, weight_decay=0.0, probes=8, reuse=False, beta=0.0):
        streams, clean = self.draw(probes), [self.at(x, 0.0) for x in each(loss, probes)]
        side = [self.at(x, eps, s) for x, s in zip(each(loss, probes), streams, strict=True)]
        rises = [x - l0 for x, l0 in zip(side, clean, strict=True)]
        now = rises if isinstance(loss, list) else side
        among = [*now, *self.before] if reuse else now
        self.before = now
        mean = sum(among) / len(among)
        self.variances = [*self.variances, sum((x - mean) ** 2 for x in among) / (len(among) - 1)]
        powers = [beta**i for i in reversed(range(len(self.variances)))]
        s = (sum(p * v for p, v in zip(powers, self.variances, strict=True)) / sum(powers)) ** 0.5
        self.move(self.along([x / (probes * s) for x in rises], streams), lr, weight_decay)
        return sum(clean) / probes


class TwinSPSA(Twin):
    """c_i = |l+ - 2 l0 + l-| / eps^2, w_i = 1 / max(c_i^alpha, lambda), theta <- theta - lr/n sum_i w_i g_i u_i."""

    def step(self, loss, lr, eps, weight_decay=0.0, probes=8, alpha=0.1, floor=1.0):
        streams, clean = self.draw(probes), [self.at(x, 0.0) for x in each(loss, probes)]
        coeffs = []
        for x, l0, s in zip(each(loss, probes), clean, streams, strict=True):
            a, b = self.at(x, eps, s), self.at(x, -eps, s)
            weight = 1 / max((abs(a - 2 * l0 + b) / eps**2) ** alpha, floor)
            coeffs.append(weight * (a - b) / (2 * eps) / probes)
        self.move(self.along(coeffs, streams), lr, weight_decay)
        return sum(clean) / probes


class TwinAdaMeZO(Twin):
    """m = sum_i beta1^i g_i z_i, v = sum_i beta2^i g_i^2 z_i^2 over the last h steps, theta <- theta - lr m / (sqrt(v) + 1e-5).

    Of n probes a step each is taken with g / n.
    """

    def step(self, loss, lr, eps, weight_decay=0.0, probes=1, momentum=0.7, beta2=0.9, window=10):
        self.window = window
        streams = self.draw(probes)
        pairs = [(self.at(x, eps, s), self.at(x, -eps, s)) for x, s in zip(each(loss, probes), streams, strict=True)]
        steps = self.remember([(a - b) / (2 * eps) / probes for a, b in pairs], streams)
        directions = []
        for n in range(len(self.params)):
            m = sum(momentum**i * g * z[n] for i, step in enumerate(steps) for g, z in step)
            v = sum(beta2**i * g**2 * z[n] ** 2 for i, step in enumerate(steps) for g, z in step)
            directions.append(self.sigma(n) * m / (v**0.5 + 1e-5))
        self.move(directions, lr, weight_decay)
        return sum(a + b for a, b in pairs) / (2 * probes)


class TwinMEAZO(Twin):
    """v = beta v + (1 - beta) g^2, g the mean of the g_k; theta <- theta - lr / (sqrt(v / (1 - beta^t)) + zeta) 1/n sum_k g_k z_k."""

    v, t = 0.0, 0

    def step(self, loss, lr, eps, weight_decay=0.0, probes=1, beta=0.99, zeta=1e-8):
        streams = self.draw(probes)
        pairs = [(self.at(x, eps, s), self.at(x, -eps, s)) for x, s in zip(each(loss, probes), streams, strict=True)]
        gradients = [(a - b) / (2 * eps) for a, b in pairs]
        self.t += 1
        self.v = beta * self.v + (1 - beta) * (sum(gradients) / probes) ** 2
        divisor = (self.v / (1 - beta**self.t)) ** 0.5 + zeta
        self.move(self.along([g / divisor / probes for g in gradients], streams), lr, weight_decay)
        return sum(a + b for a, b in pairs) / (2 * probes)


class TwinBSZO(Twin):
    """Kalman's filter in its matrix form: K = S d / (d^T S d + r), m <- m + K (y - d^T m), S <- S - K d^T S, d = e_k."""

    r = None

    def step(self, loss, lr, eps, weight_decay=0.0, probes=2, prior=1.0, noise=1.0, alpha=0.1, repeats=1):
        streams, clean = self.draw(probes), [self.at(x, 0.0) for x in each(loss, probes)]
        y = [(self.at(x, eps, s) - l0) / eps for x, l0, s in zip(each(loss, probes), clean, streams, strict=True)]
        m, covariance = torch.zeros(probes, dtype=torch.float64), torch.eye(probes, dtype=torch.float64) * prior**2
        self.r = noise**2 if self.r is None else self.r
        for i in range(probes + repeats):
            axis = i if i < probes else int(torch.linalg.eigh(covariance).eigenvectors[:, -1].abs().argmax())
            d = torch.eye(probes, dtype=torch.float64)[axis]
            self.r = (1 - alpha) * self.r + alpha * float(y[axis] - d @ m) ** 2
            gain = covariance @ d / (d @ covariance @ d + max(self.r, (0.1 * noise) ** 2))
            m = m + gain * (y[axis] - d @ m)
            covariance = covariance - torch.outer(gain, d @ covariance)
        self.move(self.along(m.tolist(), streams), lr, weight_decay)
        return sum(clean) / probes
