"""A step of training beside the network: against its parts on the host."""

from typing import Any

import numpy as np
import pytest
from gpu_machine import GpuRoom as Room

from fpnumba import nn, tasks
from fpnumba.gpu import training


def philox(counter: Any, key: Any) -> Any:
    """Philox 4x32-10 of rows of four numbers, after the paper (Salmon et al., SC 2011)."""
    c = [np.asarray(counter[:, i], np.uint64) for i in range(4)]
    k, low = [np.uint64(v) for v in key], np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & low, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(c, axis=1)


def test_known_random_numbers() -> None:
    """Those that the authors' library lists, of zeros and of ones."""
    found = philox(np.zeros((1, 4)), (0, 0))[0]
    assert [int(v) for v in found] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    found = philox(np.full((1, 4), ones), (ones, ones))[0]
    assert [int(v) for v in found] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("identity_first", [False, True])
def test_words_and_their_products(gpu_room: Room, identity_first: bool) -> None:
    task, batch, steps, seed, step = (
        tasks.get("a5", identity_first=identity_first),
        300,
        7,
        12345678901,
        2**33,
    )
    table, at = (gpu_room.give(a) for a in (task.group.table.astype(np.int32), np.full(1, step)))
    tokens, targets = (gpu_room.give(np.zeros((batch, steps), np.int64)) for _ in range(2))
    training.word_problem(table, seed, at, tokens, targets, identity_first=identity_first)
    found = gpu_room.get(tokens)
    np.testing.assert_array_equal(gpu_room.get(targets), task.targets(found))
    for t in range(0, steps, 4):
        counter = np.array([(step & 0xFFFFFFFF, step >> 32, b, t // 4) for b in range(batch)])
        drawn = (philox(counter, (seed & 0xFFFFFFFF, seed >> 32)) * np.uint64(60)) >> np.uint64(32)
        wanted = drawn[:, : steps - t].astype(np.int64)
        if t == 0 and identity_first:
            wanted[:, 0] = 0
        np.testing.assert_array_equal(found[:, t : t + 4], wanted)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_loss(gpu_room: Room, dtype: str, rng: Any) -> None:
    logits = (3 * rng.standard_normal((5, 7, 61))).astype(dtype)
    targets = rng.integers(0, 61, (5, 7))
    targets[0, :3] = -1
    logits[1, 0] = logits[1, 0].max()  # a tie
    loss = training.Loss(gpu_room.give(logits), gpu_room.give(targets))
    value, bar = nn.cross_entropy_vjp(logits, targets, ignore=-1)
    told, count = gpu_room.get(loss.told).sum(0), int(gpu_room.get(loss.count)[0])
    assert count == 32
    assert told[0] / count == pytest.approx(value, rel=1e-12 if dtype == "float64" else 1e-6)
    assert told[1] / count == nn.accuracy(logits, targets, ignore=-1)
    tolerance = 1e-15 if dtype == "float64" else 1e-7
    np.testing.assert_allclose(gpu_room.get(loss.bar), bar, rtol=0, atol=tolerance)


def test_nothing_counts(gpu_room: Room) -> None:
    loss = training.Loss(gpu_room.give(np.ones((2, 3))), gpu_room.give(np.full(2, -1)))
    assert not gpu_room.get(loss.bar).any()
    assert not gpu_room.get(loss.told).any()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("clip", [None, 0.5, 1e3])
def test_optimiser(gpu_room: Room, dtype: str, clip: float | None, rng: Any) -> None:
    params = {
        "w": rng.standard_normal((70, 90)).astype(dtype),
        "b": rng.standard_normal(7).astype(dtype),
    }
    plain = nn.AdamW(nn.schedules.warmup_constant(1e-2, warmup=2), weight_decay=0.1, clip=clip)
    state = plain.init(params)
    rates = np.array([plain.rate(k) for k in range(3)])
    ours = training.AdamW(
        {k: gpu_room.give(v) for k, v in params.items()},
        {k: gpu_room.give(v) for k, v in state.items()},
        rates,
        {"w": True, "b": False},
        betas=plain.betas,
        eps=plain.eps,
        weight_decay=0.1,
        clip=clip or 0.0,
    )
    step = gpu_room.give(np.zeros(1, np.int64))
    for _ in range(3):
        grads = {k: rng.standard_normal(v.shape).astype(dtype) for k, v in params.items()}
        params, state = plain.update(params, grads, state)
        ours.update({k: gpu_room.give(v) for k, v in grads.items()}, step)
        assert gpu_room.get(ours.norm)[0] == pytest.approx(nn.global_norm(grads), rel=1e-6)
        step += 1
    tolerance = 1e-13 if dtype == "float64" else 2e-6
    for name, value in params.items():
        np.testing.assert_allclose(gpu_room.get(ours.params[name]), value, rtol=tolerance, atol=tolerance)
    for name, value in ours.state().items():
        np.testing.assert_allclose(gpu_room.get(value), state[name], rtol=10 * tolerance, atol=tolerance)


def test_what_is_told(gpu_room: Room, rng: Any) -> None:
    logits, targets = rng.standard_normal((9, 4)), rng.integers(0, 4, 9)
    log = training.Log(3, 4)
    loss = training.Loss(gpu_room.give(logits), gpu_room.give(targets))
    iterations, status = np.array([3, 9, 6]), np.array([0, 1, 0], np.int8)
    log.tell(loss, gpu_room.give(np.array([2.5])), gpu_room.give(iterations), gpu_room.give(status))
    assert gpu_room.get(log.step)[0] == 5
    row = gpu_room.get(log.rows)[4 % 3]
    wanted = (nn.cross_entropy(logits, targets), nn.accuracy(logits, targets), 2.5, 6, 9, 1 / 3)
    np.testing.assert_allclose(row, wanted, rtol=1e-12)
