"""The published layer as torch would differentiate it: written from section 5 of docs/mathematics.md, for
tests.

Functions of a state dict of float64 tensors, so that autograd has nothing to do with the library's own
adjoints.
"""

import math

import torch
import torch.nn.functional as F

CONVS = ("x", "b", "mixer", "lambda")


def weight(state, name):
    if f"{name}.weight" in state:
        return state[f"{name}.weight"]
    magnitude = state[f"{name}.parametrizations.weight.original0"]
    direction = state[f"{name}.parametrizations.weight.original1"]
    return magnitude * direction / direction.norm(dim=1, keepdim=True)


def linear(state, name, x):
    if not any(key.startswith(f"{name}.0.") for key in state):
        return F.linear(x, weight(state, name), state.get(f"{name}.bias"))
    return linear(state, f"{name}.1", linear(state, f"{name}.0", x))


def upper(p, size):
    rows, columns = torch.triu_indices(size, size)
    return (
        p.new_zeros(*p.shape[:-1], size, size).index_put((..., rows, columns), p)
        if p.ndim == 1
        else _upper(p, size)
    )


def _upper(p, size):
    rows, columns = torch.triu_indices(size, size)
    out = p.new_zeros(*p.shape[:-1], size * size)
    out = out.index_copy(-1, rows * size + columns, p)
    return out.reshape(*p.shape[:-1], size, size)


def gram(p, size):
    triangle = _upper(p, size)
    return triangle @ triangle.mT


def low_rank(state, prefix, p, v, *, rank, eps, product):
    dim = v.shape[-1]
    u = F.silu(linear(state, f"{prefix}u_proj", p)).reshape(*v.shape[:-1], rank, dim)
    u = F.normalize(u, dim=-1, eps=eps)
    alpha = 2 * torch.sigmoid(linear(state, f"{prefix}alpha_proj", p))
    out = v
    for i in range(rank):
        seen = out if product else v
        out = out - (alpha[..., i] * (u[..., i, :] * seen).sum(-1))[..., None] * u[..., i, :]
    return out


def alternate(matrix, dim):
    """The largest eigenvalue by 16 steps that go back and forth between two vectors."""
    a = matrix.new_full((*matrix.shape[:-1], 1), 1 / math.sqrt(dim))
    b = a
    for i in range(16):
        if i % 2:
            a = F.normalize(matrix @ b, dim=-2)
        else:
            b = F.normalize(matrix @ a, dim=-2)
    return b.mT @ matrix @ a


def kronecker(state, prefix, p, v, *, eps, spectral):
    dim = v.shape[-1]
    d1 = max(a for a in range(1, math.isqrt(dim) + 1) if dim % a == 0)
    d2 = dim // d1
    entries = F.silu(linear(state, f"{prefix}uv_project", p))
    diagonal = torch.sigmoid(linear(state, f"{prefix}diag", p))
    cut = d1 * (d1 + 1) // 2
    factors = []
    for entry, diag, size in (
        (entries[..., :cut], diagonal[..., :d1], d1),
        (entries[..., cut:], diagonal[..., d1:], d2),
    ):
        m = F.normalize(gram(entry, size), dim=-1, eps=eps)
        if spectral:
            m = m / (alternate(m, dim) + eps)
        factors.append(torch.diag_embed(diag) @ m)
    mixed = factors[1] @ v.reshape(*v.shape[:-1], d1, d2).mT @ factors[0]
    return v - 2 * mixed.mT.reshape(v.shape)


def monarch(state, p, v, *, block, eps):
    count = v.shape[-1] // block
    entries = F.silu(linear(state, "mixer.uv_project", p)).reshape(*v.shape[:-1], count, -1)
    m = gram(entries, block)
    m = m / (m.norm(dim=-2, keepdim=True).amax(dim=-1, keepdim=True) + eps)
    alpha = torch.sigmoid(linear(state, "mixer.alpha", p))
    mixed = (m @ v.reshape(*v.shape[:-1], count, block, 1))[..., 0]
    return v - (alpha[..., None] * mixed).reshape(v.shape)


def dense(state, p, v, *, eps):
    m = gram(F.silu(linear(state, "mixer.proj", p)), v.shape[-1])
    vector = m.new_full((*m.shape[:-1], 1), 1 / math.sqrt(v.shape[-1]))
    for _ in range(32):
        vector = m @ vector
        length = vector.norm(dim=-2, keepdim=True)
        vector = vector / (length + eps)
    return ((m / (length + eps)) @ v[..., None])[..., 0]


def orthogonal(state):
    x = state["mixer.q_proj.parametrizations.weight.original"].tril()
    return state["mixer.q_proj.parametrizations.weight.0.base"] @ torch.matrix_exp(x - x.mT)


def mix(config, state, p, v, spectral=True):
    kind, rank, eps = config["mixer_type"], config["mixer_rank"], config["norm_eps"]
    if kind in ("householderproduct", "dplr"):
        product = kind == "householderproduct"
        return low_rank(state, "mixer.", p, v, rank=rank, eps=eps, product=product)
    if kind == "kronecker":
        return kronecker(state, "mixer.", p, v, eps=eps, spectral=spectral)
    if kind == "monarch":
        return monarch(state, p, v, block=rank, eps=eps)
    if kind == "selectivedense":
        return dense(state, p, v, eps=eps)
    if kind == "nonselective":
        return F.linear(v, orthogonal(state))
    for i in range(rank):
        prefix = f"mixer.mixers.{i}."
        if i % 2:
            v = kronecker(state, prefix, p, v, eps=1e-5, spectral=False)
        else:
            v = low_rank(state, prefix, p, v, rank=1, eps=1e-5, product=True)
    return v


def conv(state, name, x):
    taps = state[f"conv1d_{name}.weight"]
    padded = F.pad(x.mT, (taps.shape[-1] - 1, 0))
    return F.silu(F.conv1d(padded, taps, state[f"conv1d_{name}.bias"], groups=len(taps))).mT


def shift(h):
    return F.pad(h, (0, 0, 1, 0))[:, :-1]


def forward(meta, state, x):
    """Output of the layer, and the number of iterations."""
    config = meta["config"]
    inner = state["lambda_proj.bias"].shape[0]
    x, z = (x @ state["input_trans.weight"].T).split(inner, dim=-1)
    branches = dict.fromkeys(CONVS, x)
    if config["use_short_conv"]:
        branches = {name: conv(state, name, x) for name in CONVS}
    x = branches["x"]
    b = F.silu(linear(state, "b_proj", branches["b"]))
    lam = torch.sigmoid(linear(state, "lambda_proj", branches["lambda"]))

    def step(h):
        p = branches["mixer"]
        if config["mixer_h_dep"] and config["symm_mixer"]:
            p = p + shift(h)
        elif config["mixer_h_dep"]:
            p = torch.cat([p, shift(h)], dim=-1)
        u = (1 - lam) * (mix(config, state, p, b * x - h) + h)
        out, last = [], torch.zeros_like(u[:, 0])
        for t in range(u.shape[1]):
            last = lam[:, t] * last + u[:, t]
            out.append(last)
        return torch.stack(out, dim=1)

    with torch.no_grad():
        h, count = iterate(meta, step, torch.zeros_like(x))
    for _ in range(config["n_backwards"]):
        h = step(h)
    seen = torch.cat([x, h], dim=-1)
    seen = conv(state, "c", seen) if config["use_short_conv"] else torch.cat([x, shift(h)], dim=-1)
    y = F.silu(z) * F.silu(linear(state, "c_proj", seen)) * h
    y = F.rms_norm(y, (inner,), state["output_norm.weight"], config["norm_eps"])
    return y @ state["output_trans.weight"].T, count


def iterate(meta, step, h, *, damping=1.0, decay=1.0, level=0.9):
    """The published loop: the lowest residual of each sequence, a quantile over the batch, step sizes that decay after
    15 iterations without a lower one."""
    train, config = meta["train"], meta["config"]
    limit, level = (config["max_iter"], level) if train else (1000, 1.0)
    lowest = torch.full((len(h),), math.inf, dtype=h.dtype)
    sizes, patience = torch.full_like(lowest, damping), torch.full_like(lowest, 15)
    count = 0
    while True:
        new = step(h)
        residual = ((h - new).abs().amax(-1) / (new.abs().amax(-1) + 1e-8)).amax(-1)
        patience = torch.where(residual < lowest, 15, patience - 1)
        h, count = h + sizes[:, None, None] * (new - h), count + 1
        lowest = torch.minimum(lowest, residual)
        sizes = torch.where(patience == 0, sizes * decay, sizes)
        patience = torch.where(patience == 0, 15, patience)
        done = torch.quantile(lowest, level) < config["convergence_threshold"] or sizes.max() < 1e-3
        if done or count >= limit:
            return h, count


def forward_mamba(meta, state, x):
    """The same of the layer with a matrix state, which keeps some numbers in single precision."""
    config, eps = meta["config"], meta["config"]["norm_eps"]
    inner, size = state["A_log"].shape
    x, z = F.linear(x, state["in_proj.weight"], state.get("in_proj.bias")).split(inner, dim=-1)
    if config["use_short_conv"]:
        x = conv({f"conv1d_.{n}": state[f"conv1d.{n}"] for n in ("weight", "bias")}, "", x)
    rank = state["dt_proj.weight"].shape[1]
    dt, b_x, c_x = (x @ state["x_proj.weight"].T).split([rank, size, size], dim=-1)
    delta = F.softplus(dt @ state["dt_proj.weight"].T + state["dt_proj.bias"].float().double())
    A, skip = -torch.exp(state["A_log"].float()).double(), state["D"].float().double()

    def step(y):
        p = x
        if config["mixer_h_dep"] and config["symm_mixer"]:
            p = p + shift(y)
        elif config["mixer_h_dep"]:
            p = torch.cat([p, shift(y)], dim=-1)
        u = mix(config, state, p, x - y, spectral=False) + y
        b_y, c_y = linear(state, "bc_y_proj", shift(y)).split(size, dim=-1)
        b, c = F.normalize(b_x + b_y, dim=-1, eps=eps), F.normalize(c_x + c_y, dim=-1, eps=eps)
        held, out = torch.zeros_like(u[:, 0, :, None] * b[:, 0, None]), []
        for t in range(u.shape[1]):
            drive = (delta[:, t] * u[:, t])[..., None] * b[:, t, None]
            held = torch.exp(delta[:, t, :, None] * A) * held + drive
            out.append((held * c[:, t, None]).sum(-1) + skip * u[:, t])
        o = torch.stack(out, dim=1)
        if config["glu_in_loop"]:
            o = o * F.silu(z)
        return F.layer_norm(o, (inner,), state["out_norm.weight"], state["out_norm.bias"], eps)

    with torch.no_grad():
        y, count = iterate(meta, step, torch.zeros_like(x), damping=0.99, decay=0.9, level=0.75)
    for _ in range(config["n_backwards"]):
        y = step(y)
    if not config["glu_in_loop"]:
        y = F.silu(z + linear(state, "z_y_proj", shift(y))) * y
    return F.linear(y, state["out_proj.weight"], state.get("out_proj.bias")), count


def case(meta, state, x, cotangent):
    """Output, one-step gradients and iterations, as NumPy arrays."""
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in state.items()}
    x = torch.tensor(x, requires_grad=True)
    y, count = (forward if meta["cls"] == "FPRNN" else forward_mamba)(meta, tensors, x)
    y.backward(torch.tensor(cotangent))
    grads = {name: tensor.grad for name, tensor in tensors.items()}
    return (
        y.detach().numpy(),
        x.grad.numpy(),
        {name: grad.numpy() for name, grad in grads.items() if grad is not None},
        count,
    )
