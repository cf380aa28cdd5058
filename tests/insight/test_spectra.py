"""The oracle is the dense SVD of numpy on the whole ΔW, and matrices whose spectra are known by hand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from hf_lora.insight import spectra
from hf_lora.insight.spectra import Spectrum


def factors(seed: int, rank: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)


def dense(A: Tensor, B: Tensor, scaling: float) -> np.ndarray:
    return scaling * (B.double().numpy() @ A.double().numpy())


def spectrum_of(*values: float) -> Spectrum:
    """A spectrum with these singular values."""
    size = torch.eye(len(values), dtype=torch.float64)
    return Spectrum(size, torch.tensor(values, dtype=torch.float64), size)


def orthogonal(seed: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


@given(
    st.integers(0, 99), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.sampled_from([2.0, -0.5])
)
@settings(max_examples=40, deadline=None)
def test_triplets_are_those_of_the_dense_matrix(seed, rank, inputs, outputs, scaling):
    A, B = factors(seed, rank, inputs, outputs)
    U, S, Vh = Spectrum.of(A, B, scaling)
    delta = dense(A, B, scaling)
    expected = np.linalg.svd(delta, compute_uv=False)
    assert len(S) == min(rank, inputs, outputs)
    np.testing.assert_allclose(S.numpy(), expected[: len(S)], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose((U * S @ Vh).numpy(), delta, atol=1e-12)
    assert_close(U.T @ U, torch.eye(len(S), dtype=torch.float64))
    assert_close(Vh @ Vh.T, torch.eye(len(S), dtype=torch.float64))


def test_directions_that_are_rounding_are_none():
    A, B = factors(0, 3, 7, 5)
    doubled = Spectrum.of(torch.cat([A, A]), torch.cat([B, B], dim=1), 1.0)
    assert len(doubled.S) == 3
    assert_close(doubled.S, 2 * Spectrum.of(A, B, 1.0).S)
    cancelled = Spectrum.of(torch.cat([A, A]), torch.cat([B, -B], dim=1), 1.0)
    assert len(cancelled.S) == 0 and cancelled.U.shape == (5, 0) and cancelled.Vh.shape == (0, 7)
    assert len(Spectrum.of(A, torch.zeros_like(B), 1.0).S) == 0


def test_a_spectrum_known_by_hand():
    # (4, 2, 2, 0): norm sqrt(24), shares 1/2, 1/4, 1/4 with entropy (3/2) log 2, stable rank 24 / 16.
    spectrum = spectrum_of(4.0, 2.0, 2.0)
    assert spectrum.norm == pytest.approx(24**0.5)
    assert spectrum.effective_rank == pytest.approx(2**1.5)
    assert spectrum.stable_rank == pytest.approx(1.5)
    assert [spectrum.energy(rank) for rank in range(1, 5)] == pytest.approx([16 / 24, 20 / 24, 1, 1])
    assert spectrum_of(1.0, 1.0).rank_for(0.5) == 1  # in spite of rounding
    assert [spectrum.rank_for(share) for share in (0.5, 16 / 24, 0.7, 0.9, 1.0)] == [1, 1, 2, 3, 3]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_equal_singular_values_have_their_number_as_rank(count):
    spectrum = spectrum_of(*[0.7] * count)
    assert spectrum.effective_rank == pytest.approx(count) and spectrum.stable_rank == pytest.approx(count)


def test_an_update_of_zero():
    spectrum = spectrum_of()
    assert (spectrum.norm, spectrum.effective_rank, spectrum.stable_rank) == (0.0, 0.0, 0.0)
    assert spectrum.energy(1) == 1.0 and spectrum.rank_for(0.9) == 0
    A, B = factors(0, 2, 4, 4)
    assert spectra.amplification(Spectrum.of(A, 0 * B, 1.0), torch.ones(4, 4)) is None


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("directions", [None, 1, 2, 50])
def test_amplification_is_table_7_of_the_paper(shape, directions):
    outputs, inputs = shape
    A, B = factors(1, 3, inputs, outputs)
    W = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(2))
    found = spectra.amplification(Spectrum.of(A, B, 2.0), W, directions)
    r = min(directions or 3, 3)
    delta, weight = dense(A, B, 2.0), W.double().numpy()
    U, _, Vh = np.linalg.svd(delta)
    inside = np.linalg.norm(U[:, :r].T @ weight @ Vh[:r].T)
    own_U, _, own_Vh = np.linalg.svd(weight)
    assert found.directions == r
    assert found.update == pytest.approx(np.linalg.norm(delta))
    assert found.weight == pytest.approx(np.linalg.norm(weight))
    assert found.in_update == pytest.approx(inside)
    assert found.in_weight == pytest.approx(np.linalg.norm(own_U[:, :r].T @ weight @ own_Vh[:r].T))
    assert found.factor == pytest.approx(np.linalg.norm(delta) / inside)
    assert found.relative == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(weight))


def test_random_directions_are_a_root_mean_square():
    # Over all choices of r coordinates on each side the mean square is that of uniform subspaces, exactly.
    r, outputs, inputs = 2, 4, 5
    A, B = factors(3, r, inputs, outputs)
    W = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    blocks = [
        W[list(rows)][:, list(columns)].square().sum().item()
        for rows in combinations(range(outputs), r)
        for columns in combinations(range(inputs), r)
    ]
    found = spectra.amplification(Spectrum.of(A, B, 1.0), W)
    assert found.in_random == pytest.approx(np.mean(blocks) ** 0.5)


def test_an_update_of_what_is_there_amplifies_by_the_scaling():
    # ΔW = 3 * (the two leading triplets of W): U' W V is the leading part of W, and the factor is 3.
    U, V = orthogonal(5, 6), orthogonal(6, 6)
    S = torch.tensor([5.0, 4.0, 1.0, 0.5, 0.2, 0.1], dtype=torch.float64)
    update = Spectrum.of(V[:, :2].T, U[:, :2] * S[:2], 3.0)
    found = spectra.amplification(update, U * S @ V.T)
    assert found.factor == pytest.approx(3.0)
    assert found.in_update == pytest.approx(found.in_weight) == pytest.approx(41**0.5)
    # Where W has nothing, there is nothing to amplify.
    assert spectra.amplification(update, torch.zeros(6, 6)).factor is None
    assert spectra.amplification(update, torch.zeros(6, 6)).relative is None


def test_similarity_is_that_of_the_dense_definition():
    first, second = (
        spectra.right_directions(factors(seed, rank, 9, 1)[0]) for seed, rank in ((0, 4), (1, 3))
    )
    found = spectra.subspace_similarity(first, second)
    assert found.shape == (4, 3)
    for i in range(1, 5):
        for j in range(1, 4):
            product = first[:, :i].T.numpy() @ second[:, :j].numpy()
            assert found[i - 1, j - 1].item() == pytest.approx(np.linalg.norm(product) ** 2 / min(i, j))
    assert (found <= 1).all() and (found >= 0).all()


def test_similarity_of_known_subspaces():
    Q = orthogonal(0, 5)
    e = torch.eye(5, dtype=torch.float64)
    assert_close(spectra.subspace_similarity(Q[:, :3], Q[:, :3]), torch.ones(3, 3, dtype=torch.float64))
    assert_close(spectra.subspace_similarity(Q[:, :2], Q[:, 3:]), torch.zeros(2, 2, dtype=torch.float64))
    # Between e0 and a line at 60 degrees the squared cosine is 1/4.
    tilted = (0.5 * e[:, 0] + 0.75**0.5 * e[:, 1])[:, None]
    assert_close(
        spectra.subspace_similarity(e[:, :2], tilted), torch.tensor([[0.25], [1.0]], dtype=torch.float64)
    )


def test_directions_of_the_factors_are_their_singular_vectors():
    A, B = factors(7, 3, 8, 6)
    for found, matrix in ((spectra.right_directions(A), A), (spectra.right_directions(B.T), B.T)):
        _, _, Vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
        assert_close(found.abs(), torch.from_numpy(Vh.T).abs())
    assert spectra.right_directions(torch.cat([A, A])).shape == (8, 3)


def test_similarity_of_random_subspaces_is_the_larger_dimension_over_that_of_the_space():
    # Coordinate subspaces again: an i-subset and a j-subset of d share i * j / d on average.
    d, i, j = 5, 2, 3
    e = torch.eye(d, dtype=torch.float64)
    values = [
        spectra.subspace_similarity(e[:, list(a)], e[:, list(b)])[-1, -1].item()
        for a in combinations(range(d), i)
        for b in combinations(range(d), j)
    ]
    assert max(i, j) / d == pytest.approx(np.mean(values))
