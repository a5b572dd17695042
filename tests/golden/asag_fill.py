"""Weights and features of ASAG by formula, under the names of its published checkpoints."""

import torch

_MODULUS = 2147483647


def values(name, count):
    """Compute `count` numbers between -1 and 1 from a name."""
    j = torch.arange(1, count + 1, dtype=torch.int64)
    seed = 16807 * sum(map(ord, name))
    u = ((j * j % _MODULUS) * 1103515245 + j * 1299709 + seed) % _MODULUS
    return 2 * u.double() / _MODULUS - 1


def parameter(name, shape):
    """Compute the parameter of a published name."""
    count = int(torch.tensor(shape).prod())
    v = values(name, count).view(shape)
    if name.endswith(".weight") and (len(shape) == 1 or "layernorm." in name):
        return (1 + 0.1 * v).float()
    if len(shape) == 1 or "layernorm." in name or "embedding" in name:
        return (0.1 * v).float()
    fan_in = count // shape[0]
    return (1.6 * v * (3 / fan_in) ** 0.5).float()


def feature(level):
    """Compute P2 to P5 of two images of 256 x 320 pixels."""
    shape = (2, 256, 256 // 2**level, 320 // 2**level)
    return values(f"P{level}", int(torch.tensor(shape).prod())).view(shape).float()


def fill(module, prefix, pairs=()):
    """Load published parameters: their `prefix`, and pairs of a published and the local name."""

    def published(key):
        for name, local in pairs:
            if key.startswith(local):
                return prefix + name + key[len(local) :]
        return prefix + key

    state = {k: parameter(published(k), tuple(v.shape)) for k, v in module.state_dict().items()}
    module.load_state_dict(state)
    return module.eval()
