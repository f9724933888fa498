"""The hardened mode: exact integers, the same bits in any batch, no block that can be left out, spot checks."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparkray.config.poc import ModelParams
from sparkray.errors import InputError
from sparkray.poc.hardened import tables
from sparkray.poc.hardened.commitment import Opening, challenge_layer, path_leads_to, spot_check
from sparkray.poc.hardened.draws import draw_hardened_input, draw_weight, weight_shapes
from sparkray.poc.hardened.integers import (
    MAX_FAN_IN,
    exact_bmm,
    isqrt,
    matmul,
    normalise,
    requantise,
    shift_for,
)
from sparkray.poc.hardened.model import HardenedTransformer
from sparkray.poc.hardened.proof import HardenedProver
from sparkray.poc.statistics import share_z_score

PARAMS = ModelParams(
    dim=64, n_layers=5, n_heads=4, n_kv_heads=2, vocab_size=1021, ffn_dim_multiplier=2.0, multiple_of=64,
    rope_theta=1e4, seq_len=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def prover() -> HardenedProver:
    return HardenedProver("0xabc", "key", PARAMS)


def test_tables_are_the_functions_rounded() -> None:
    silu = tables.silu_table().tolist()
    for step in range(-128, 128):
        value = step / 16
        assert abs(silu[step + 128] - 16 * value / (1 + math.exp(-value))) <= 0.5 + 1e-9
    assert tables.exp2_table().tolist() == [round(2**15 * 2 ** (-index / 32)) for index in range(32)]
    cos, sin = tables.rope_tables(300, 8, 1e4)
    angles = np.arange(300)[:, None] * 1e4 ** (-np.arange(4) / 4)
    assert np.abs(cos.numpy() - 2**14 * np.cos(angles)).max() <= 0.5 + 1e-6
    assert np.abs(sin.numpy() - 2**14 * np.sin(angles)).max() <= 0.5 + 1e-6


@given(st.lists(st.integers(0, 2**52), min_size=1, max_size=20))
def test_isqrt_is_exact(values: list[int]) -> None:
    near = [max(0, math.isqrt(value) ** 2 + step) for value in values for step in (-1, 0, 1)]
    assert isqrt(torch.tensor(near)).tolist() == [math.isqrt(value) for value in near]


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (3, 7, 5), (17, 64, 24), (40, 4096, 8), (2, 100_000, 8)])
def test_products_are_exact_at_the_extremes(m: int, k: int, n: int) -> None:
    rng = np.random.default_rng(k)
    left, right = (rng.integers(-127, 128, (rows, k), dtype=np.int8) for rows in (m, n))
    left[0], right[0] = 127, 127
    found = matmul(torch.from_numpy(left), torch.from_numpy(right)).numpy()
    assert (found == left.astype(np.int64) @ right.astype(np.int64).T).all()
    assert found[0, 0] == 127 * 127 * k


def test_float32_counts_exactly_where_it_is_used() -> None:
    full = torch.full((1, 1024), 127, dtype=torch.int8)
    assert exact_bmm(full, full.T).item() == 127 * 127 * 1024


@given(st.integers(1, MAX_FAN_IN))
def test_the_shift_is_the_power_of_two_nearest_to_the_growth(fan_in: int) -> None:
    rms = math.sqrt(sum(value * value for value in range(-127, 128)) / 255)
    assert abs(shift_for(fan_in) - math.log2(rms * math.sqrt(fan_in))) < 0.51


@given(st.lists(st.integers(-4095, 4095), min_size=2, max_size=40))
def test_normalise_rounds_as_fractions_do(values: list[int]) -> None:
    found = normalise(torch.tensor([values])).tolist()[0]
    root = max(1, math.isqrt(sum(value * value for value in values) << 4))
    scale = (32 * math.isqrt(len(values) << 16) << 18) // root
    for value, scaled in zip(values, found, strict=True):
        exact = Fraction(value * scale, 1 << 24)
        assert scaled == max(-127, min(127, math.floor(exact + Fraction(1, 2))))


def test_requantise_saturates_and_rounds_halves_up() -> None:
    values = torch.tensor([6, 5, -6, -5, 10_000, -10_000], dtype=torch.int32)
    assert requantise(values, 2).tolist() == [2, 1, -1, -1, 127, -127]


def plain_logits(block_hash: str, key: str, nonce: int, p: ModelParams) -> list[int]:
    """The whole model in numpy's int64, head by head, all positions."""
    w = {name: draw_weight(block_hash, name, shape).astype(np.int64) for name, shape in weight_shapes(p).items()}
    cos, sin = (part.numpy().astype(np.int64) for part in tables.rope_tables(p.seq_len, p.head_dim, p.rope_theta))
    silu, exp2 = tables.silu_table().numpy().astype(np.int64), tables.exp2_table().numpy().astype(np.int64)

    def down(x: np.ndarray, bits: int, limit: int = 127) -> np.ndarray:
        return np.clip((x + (1 << bits >> 1)) >> bits, -limit, limit)

    def norm(x: np.ndarray) -> np.ndarray:
        roots = np.array([max(1, math.isqrt(int((row * row).sum()) << 4)) for row in x])
        return down(x * ((32 * math.isqrt(p.dim << 16) << 18) // roots)[:, None], 24)

    def turn(x: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        out[:, 0::2] = x[:, 0::2] * cos - x[:, 1::2] * sin
        out[:, 1::2] = x[:, 1::2] * cos + x[:, 0::2] * sin
        return down(out, 14)

    to_state, to_wide = shift_for(p.dim), shift_for(p.ffn_hidden, 3)
    spread = int(math.log2(32 * 32 * math.sqrt(p.head_dim) / 96))
    x = norm(draw_hardened_input(block_hash, key, nonce, p).astype(np.int64))
    for layer in range(p.n_layers):
        a, f = f"layers.{layer}.attention", f"layers.{layer}.feed_forward"
        q, k, v = (down(x @ w[f"{a}.w{part}.weight"].T, to_state) for part in "qkv")
        mixed = np.zeros_like(x)
        for head in range(p.n_heads):
            shared = head // (p.n_heads // p.n_kv_heads)
            own, kv = (slice(at * p.head_dim, (at + 1) * p.head_dim) for at in (head, shared))
            scores = turn(q[:, own]) @ turn(k[:, kv]).T
            for row in range(p.seq_len):
                steps = (scores[row, : row + 1].max() - scores[row, : row + 1]) >> spread
                weights = exp2[steps % 32] >> np.minimum(steps // 32, 31)
                shares = (254 * weights + weights.sum()) // (2 * weights.sum())
                mixed[row, own] = down(shares @ v[: row + 1, kv], 6)
        attended = (mixed @ w[f"{a}.wo.weight"].T + (1 << to_state >> 1)) >> to_state
        x = norm(x + 2 * attended)
        gate, up = (down(x @ w[f"{f}.{part}.weight"].T, to_state) for part in ("w1", "w3"))
        opened = down(silu[gate + 128] * up, 5)
        x = norm(down(opened @ w[f"{f}.w2.weight"].T, to_wide, 4095))
    return (w["output.weight"] @ x[-1]).tolist()


@pytest.mark.parametrize(
    "params",
    [PARAMS, PARAMS.model_copy(update={"n_heads": 2, "seq_len": 13, "vocab_size": 40, "n_layers": 2})],
    ids=["grouped", "wide heads"],
)
def test_the_model_is_the_plain_one(params: ModelParams) -> None:
    model = HardenedTransformer("0x5", params, torch.device("cpu"))
    inputs = torch.from_numpy(np.stack([draw_hardened_input("0x5", "key", nonce, params) for nonce in range(3)]))
    found = model.last_logits(inputs).tolist()
    assert found == [plain_logits("0x5", "key", nonce, params) for nonce in range(3)]


def test_the_same_bits_for_any_batch_and_any_number_of_threads(prover: HardenedProver) -> None:
    threads = torch.get_num_threads()
    found = {}
    try:
        # Batches of one are many calls, so they prove fewer nonces.
        for num_threads, size, count in ((1, 1, 16), (1, 7, 64), (1, 64, 64), (2, 1, 4), (2, 7, 64), (2, 64, 64)):
            torch.set_num_threads(num_threads)
            batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
            found[num_threads, size] = [proof for batch in batches for proof in prover.prove(batch)]
    finally:
        torch.set_num_threads(threads)
    reference = found[1, 64]
    assert all(proofs == reference[: len(proofs)] for proofs in found.values())
    assert len({proof.digest for proof in reference}) == 64
    # The bits are consensus: a change of this digest is a change of the protocol.
    assert reference[0].digest == "ef18026262953e3cbebc7e9f126c9e09704e2fcd78e2ed79420a3f1f86e2deba"


def test_distances_follow_the_law_of_random_directions(prover: HardenedProver) -> None:
    dist = [proof.distance for proof in prover.prove(range(800))]
    assert abs(share_z_score(sum(value < 1.39 for value in dist), 800, 1.39, PARAMS.vocab_size)) < 4.0


def test_no_block_can_be_left_out(prover: HardenedProver) -> None:
    nonces = range(500)
    true = [proof.distance for proof in prover.prove(nonces)]
    shortcuts = [[layer for layer in range(PARAMS.n_layers) if layer != gone] for gone in range(PARAMS.n_layers)]
    for layers in [*shortcuts, []]:
        proofs = prover.prove(nonces, layers)
        assert abs(np.corrcoef(true, [proof.distance for proof in proofs])[0, 1]) < 0.2, layers
        assert not any(prover.verify(proofs[:20])), layers


def test_a_proof_is_verified_by_equality(prover: HardenedProver) -> None:
    proofs = prover.prove([3, 4])
    forged = replace(proofs[1], distance=math.nextafter(proofs[1].distance, 2))
    other_nonce = replace(proofs[1], nonce=5)
    assert prover.verify([*proofs, forged, other_nonce]) == [True, True, False, False]


def test_one_block_is_checked_against_the_commitment(prover: HardenedProver) -> None:
    commitment, states = prover.commit(9)
    assert len(commitment.leaves) == PARAMS.n_layers + 2
    where = ("0xabc", "key", 9, PARAMS)
    for layer in range(PARAMS.n_layers):
        opening = Opening.of(commitment, states, layer)
        assert spot_check(commitment.root, opening, *where)
        flipped = bytes([opening.state[0] ^ 1]) + opening.state[1:]
        assert not spot_check(commitment.root, replace(opening, state=flipped), *where)
        assert not spot_check(commitment.root, replace(opening, leaf_after=commitment.leaves[0]), *where)
        assert not spot_check(b"\0" * 32, opening, *where)
    # The first state is made from the nonce, so another nonce's commitment does not pass for it.
    assert not spot_check(commitment.root, Opening.of(commitment, states, 0), "0xabc", "key", 8, PARAMS)
    with pytest.raises(InputError, match="block 5"):
        spot_check(commitment.root, replace(Opening.of(commitment, states, 0), layer=5), *where)
    with pytest.raises(InputError, match="512 are expected"):
        spot_check(commitment.root, replace(Opening.of(commitment, states, 0), state=b"1"), *where)


def test_a_skipped_block_is_caught_when_it_is_asked_for(prover: HardenedProver) -> None:
    commitment, states = prover.commit(9)
    # The cheat repeats the state before block 2 as the state after it and goes on from there.
    lied = replace(commitment, leaves=(*commitment.leaves[:3], commitment.leaves[2], *commitment.leaves[4:]))
    openings = [Opening.of(lied, states, layer) for layer in range(PARAMS.n_layers)]
    caught = [not spot_check(lied.root, opening, "0xabc", "key", 9, PARAMS) for opening in openings]
    assert caught[2] and caught[3] and not caught[0]


@given(st.integers(1, 20), st.data())
def test_paths_lead_to_the_root_from_their_own_leaf_alone(count: int, data: st.DataObject) -> None:
    from sparkray.poc.hardened.commitment import Commitment, leaf

    tree = Commitment(tuple(leaf(index, b"x") for index in range(count)))
    index = data.draw(st.integers(0, count - 1))
    assert path_leads_to(tree.root, index, tree.leaves[index], tree.path(index))
    other = data.draw(st.integers(0, count - 1))
    if other != index:
        assert not path_leads_to(tree.root, other, tree.leaves[index], tree.path(index))


def test_challenges_reach_every_block() -> None:
    asked = {challenge_layer(b"root", secret.to_bytes(2, "big"), 7) for secret in range(200)}
    assert asked == set(range(7))


def test_a_model_too_wide_for_exact_sums_is_refused() -> None:
    wide = PARAMS.model_copy(update={"ffn_dim_multiplier": 64.0, "multiple_of": 65_536, "dim": 4096})
    with pytest.raises(InputError, match="sums exactly up to a width"):
        HardenedTransformer("0x1", wide, torch.device("cpu"))
