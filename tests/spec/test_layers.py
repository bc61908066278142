"""Every kind of layer by its plain definition: loops, dense matrices, padding by hand; exact."""

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from marks import examples

from minilora import testing as draw
from minilora.spec import layers, lora, ops, variants
from minilora.spec.layers import Geometry, unfold
from minilora.spec.lora import lora_linear
from minilora.spec.ops import OneHot
from minilora.verify.properties import exact_numbers, layer_kinds

FEW = examples(5)


def whole(rng, *shape):
    """Small whole numbers in float64: every sum of products is exact."""
    return rng.integers(-4, 5, shape).astype(float)


def dense(ids, v):
    M = np.zeros((v, len(ids)))
    M[ids, np.arange(len(ids))] = 1
    return M


def products_are_dense(one_hot, rng, v=5, t=7, n=3):
    ids = rng.integers(0, v, t)
    x, M = one_hot(ids, v), dense(ids, v)
    assert x.shape == M.shape
    assert x.T.shape == M.T.shape
    assert x.T.T.shape == M.shape
    high, wide = whole(rng, v, n), whole(rng, t, n)
    for found, wanted in (
        (high.T @ x, high.T @ M),
        (x @ wide, M @ wide),
        (wide.T @ x.T, wide.T @ M.T),
        (x.T @ high, M.T @ high),
    ):
        assert found.shape == wanted.shape
        assert found.dtype == wanted.dtype
        assert (found == wanted).all()


@FEW
@given(rng=draw.generators())
def test_columns_with_a_single_1_multiply_as_the_matrix_of_them_does(rng):
    products_are_dense(OneHot, rng)


class Once(OneHot):
    """A number that comes twice counts once: what plain indexing makes of a sum."""

    @property
    def T(self):
        return Once(self.ids, self.v, not self.transposed)

    def _sum(self, N):
        total = np.zeros((self.v, N.shape[1]), N.dtype)
        total[self.ids] += N
        return total


def test_a_number_that_comes_twice_is_counted_twice():
    with pytest.raises(AssertionError):
        products_are_dense(Once, np.random.default_rng(0))


@FEW
@given(rng=draw.generators())
def test_an_embeddings_adapter_is_a_change_of_its_table(rng):
    """For each factor: y's column j is factor · (E + s (B A)ᵀ)'s row ids_j."""
    E, A, B, dy = whole(rng, 5, 3), whole(rng, 2, 5), whole(rng, 3, 2), whole(rng, 3, 7)
    ids = rng.integers(0, 5, 7)
    for factor in (None, 1.5):
        y, back = layers.adapted_embedding(lora_linear, ids, E, (A, B), 0.5, factor)
        table = (E + 0.5 * (B @ A).T) * (factor or 1)
        assert (y == table[ids].T).all()
        dtable = ops.embedding(ids, E)[1](dy).T * (factor or 1)
        dA, dB = back(dy)
        assert (dA == 0.5 * B.T @ dtable).all()
        assert (dB == 0.5 * dtable @ A.T).all()


@FEW
@given(rng=draw.generators(), biased=st.booleans())
def test_fused_parts_are_the_parts_and_one_adapter_by_fuse(rng, biased):
    rows, n, t = (4, 1, 2), 3, 5
    W, x, dy = whole(rng, 7, n), whole(rng, n, t), whole(rng, 7, t)
    b = whole(rng, 7, 1) if biased else None
    P = [(whole(rng, r, n), whole(rng, m, r)) for r, m in zip((2, 1, 3), rows, strict=True)]
    y, back = layers.adapted_fused(lora_linear, x, W, b, P, rows, 0.5)
    A, B = layers.fuse(P)
    one, back_one = lora_linear(x, W, b, A, B, 0.5)
    assert (y == one).all()
    (dx, *parts), (dx_one, dA, dB) = back(dy), back_one(dy)
    assert (dx == dx_one).all()
    assert (np.concatenate([part[0] for part in parts]) == dA).all()
    row = column = 0
    for (m, r), part in zip(zip(rows, (2, 1, 3), strict=True), parts, strict=True):
        assert (part[1] == dB[row : row + m, column : column + r]).all()
        row, column = row + m, column + r

    y, back = layers.adapted_fused(lora_linear, x, W, b, (P[0], None, P[2]), rows, 0.5)
    assert (y[4:5] == W[4:5] @ x + (0 if b is None else b[4:5])).all()
    assert len(back(dy)) == 3


def test_rows_that_do_not_add_up_and_parts_without_an_adapter_or_none_are_refused():
    W, x = np.ones((7, 3)), np.ones((3, 2))
    for P, rows in (((None, None), (4, 2)), ((None,), (4, 3)), ((None,) * 3, (3, 4))):
        with pytest.raises(
            ValueError, match=rf"{len(P)} adapters for rows .* of a weight \(7, 3\)"
        ):
            layers.adapted_fused(lora_linear, x, W, None, P, rows, 1.0)
    layers.adapted_fused(lora_linear, x, W, None, (None, None), (4, 3), 1.0)


def through_experts(adapted_experts, rng, only, index, biased=True):
    """A column at a time through its own expert."""
    e, m, n, r, t = 4, 2, 3, 2, len(index)
    W, b, A, B = (whole(rng, e, *shape) for shape in ((m, n), (m, 1), (r, n), (m, r)))
    x, dy = whole(rng, n, t), whole(rng, m, t)
    b = b if biased else None
    y, back = adapted_experts(lora_linear, x, W, b, (A, B), index, 0.5, only)
    dx, *given = back(dy)
    assert y.shape == (m, t)
    wanted = [np.zeros_like(A), np.zeros_like(B)]
    for j, i in enumerate(index):
        P = (A[i], B[i], 0.5) if only is None or i in only else (A[i], 0 * B[i], 0.5)
        own = None if b is None else b[i]
        column, back_column = lora_linear(x[:, [j]], W[i], own, *P)
        assert (y[:, [j]] == column).all()
        dxj, *dP = back_column(dy[:, [j]])
        assert (dx[:, [j]] == dxj).all()
        for sum_, d in zip(wanted, dP, strict=True):
            sum_[i] += d if only is None or i in only else 0
    assert all((g == w).all() for g, w in zip(given, wanted, strict=True))


@FEW
@given(
    rng=draw.generators(),
    only=st.sampled_from((None, (), (1,), (0, 2, 3))),
    t=st.integers(0, 6),
    biased=st.booleans(),
)
def test_each_column_goes_through_its_expert(rng, only, t, biased):
    through_experts(layers.adapted_experts, rng, only, rng.integers(0, 4, t), biased)


def test_columns_left_in_the_order_of_experts_are_noticed():
    def sorted_only(f, x, W, b, P, index, s, only):
        return layers.adapted_experts(f, x, W, b, P, np.sort(index), s, only)

    index = np.array([3, 0, 3, 1, 0])
    through_experts(layers.adapted_experts, np.random.default_rng(0), None, index)
    with pytest.raises(AssertionError):
        through_experts(sorted_only, np.random.default_rng(0), None, index)


@pytest.mark.parametrize(("index", "found"), [([0, 4], "0 to 4"), ([-1, 2], "-1 to 2")])
def test_an_index_that_names_no_expert_is_refused(index, found):
    W, P = np.ones((4, 2, 3)), (np.ones((4, 1, 3)), np.ones((4, 2, 1)))
    with pytest.raises(ValueError, match=f"index from {found}: "):
        layers.adapted_experts(lora_linear, np.ones((3, 2)), W, None, P, np.array(index), 1.0)


MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
GEOMETRIES = [
    Geometry((3,), (2,), ((1, 2),), (1,)),
    Geometry((2,), (1,), ((0, 2),), (3,)),
    Geometry((1,), (3,), ((0, 0),), (1,)),
    Geometry((2, 3), (2, 1), ((1, 0), (2, 1)), (1, 2)),
    Geometry((2, 1, 2), (1, 2, 2), ((1, 1), (0, 1), (2, 0)), (2, 1, 1)),
]


def patches(x, geometry):
    """What NumPy's padding makes of x, cut out a place and a kernel's place at a time."""
    pad = [(0, 0), (0, 0), *geometry.padding]
    wide = np.pad(x, pad, mode=MODES[geometry.mode])
    last = [
        n - apart * (k - 1)
        for n, k, apart in zip(wide.shape[2:], geometry.kernel, geometry.dilation, strict=True)
    ]
    corners = list(
        itertools.product(
            *(range(0, n, step) for n, step in zip(last, geometry.stride, strict=True))
        )
    )
    rows = []
    for c, *k in np.ndindex(len(x), *geometry.kernel):
        moves = [i * apart for i, apart in zip(k, geometry.dilation, strict=True)]
        rows.append(
            [
                wide[(c, b, *(i + move for i, move in zip(corner, moves, strict=True)))]
                for b in range(x.shape[1])
                for corner in corners
            ]
        )
    return np.array(rows)


def unfolds_to_its_patches(unfold, geometry, rng):
    """The columns are the patches, and ``back`` is the transpose: ⟨unfold x, y⟩ = ⟨x, back y⟩."""
    x = whole(rng, 2, 3, *(6, 5, 4)[: len(geometry.kernel)])
    y, back = unfold(x, geometry)
    wanted = patches(x, geometry)
    assert y.shape == wanted.shape
    assert (y == wanted).all()
    dy = whole(rng, *y.shape)
    assert back(dy).shape == x.shape
    assert (y * dy).sum() == (x * back(dy)).sum()


EVERY_MOVE = pytest.mark.parametrize(
    ("mode", "i"), [*itertools.product(MODES, range(len(GEOMETRIES)))]
)


@EVERY_MOVE
def test_a_kernel_meets_what_stands_in_the_padded_input(mode, i):
    geometry = replace(GEOMETRIES[i], mode=mode)
    for seed in range(3):
        unfolds_to_its_patches(unfold, geometry, np.random.default_rng(seed))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_another_mode_or_move_is_noticed(mode):
    geometry = replace(GEOMETRIES[3], mode=mode)
    changes = [{"mode": other} for other in MODES if other != mode]
    changes += [{"dilation": (1, 1)}, {"stride": (1, 1)}, {"padding": ((0, 1), (1, 2))}]
    for change in changes:
        with pytest.raises(AssertionError):
            unfolds_to_its_patches(
                lambda x, g, change=change: unfold(x, replace(g, **change)),
                geometry,
                np.random.default_rng(0),
            )


def test_a_transpose_that_forgets_what_came_twice_is_noticed():
    def wrong(x, geometry):
        y, back = unfold(x, geometry)
        return y, lambda dy: back(dy) / np.maximum(back(np.ones_like(dy)), 1)

    with pytest.raises(AssertionError):
        unfolds_to_its_patches(wrong, GEOMETRIES[0], np.random.default_rng(0))


def test_a_mode_that_is_unknown_and_a_kernel_that_does_not_fit_are_refused():
    x = np.ones((1, 1, 4))
    with pytest.raises(
        ValueError, match="padding mode 'same': expected one of zeros, reflect, rep"
    ):
        unfold(x, Geometry((2,), (1,), ((0, 0),), (1,), "same"))
    with pytest.raises(ValueError, match=r"kernel 3 with dilation 2 .* 4$"):
        unfold(x, Geometry((3,), (1,), ((0, 0),), (2,)))
    assert unfold(x, Geometry((3,), (1,), ((0, 1),), (2,)))[0].shape == (3, 1)


def test_a_geometry_of_other_dimensions_than_the_input_is_refused():
    for moves in (GEOMETRIES[3], replace(GEOMETRIES[0], dilation=(1, 1))):
        with pytest.raises(ValueError, match="zip"):
            unfold(np.ones((1, 1, 6)), moves)


@FEW
@given(rng=draw.generators(), groups=st.sampled_from((1, 2, 4)), of_group=st.integers(1, 3))
def test_groups_are_convolutions_side_by_side(rng, groups, of_group):
    """Each over its own channels; the transpose takes the blocks out again."""
    moves = GEOMETRIES[0]
    x, W, b = whole(rng, groups * 2, 2, 5), whole(rng, groups * of_group, 2, 3), None
    y, back = layers.conv(x, W, b, moves, groups)
    dy = whole(rng, *y.shape)
    dx = back(dy)
    for j in range(groups):
        own, channels = slice(j * of_group, (j + 1) * of_group), slice(2 * j, 2 * j + 2)
        part, back_part = layers.conv(x[channels], W[own], b, moves)
        assert (y[own] == part).all()
        assert (dx[channels] == back_part(dy[own])).all()
    flat = W.reshape(len(W), -1)
    apart, back_blocks = layers.block_diagonal(flat, groups)
    assert (back_blocks(apart) == flat).all()
    assert (apart != 0).sum() == (flat != 0).sum()


def test_rows_that_do_not_divide_by_their_groups_are_refused():
    with pytest.raises(ValueError, match="5 rows in 2 groups: expected a multiple"):
        layers.block_diagonal(np.ones((5, 3)), 2)


@FEW
@given(rng=draw.generators(), groups=st.sampled_from((1, 2)))
def test_a_convolutions_adapter_is_two_convolutions_and_merges_into_one(rng, groups):
    """A moves as W does, B over single places; what merges has left its groups."""
    moves = replace(GEOMETRIES[3], mode="reflect")
    x, W, b = whole(rng, 4, 2, 6, 5), whole(rng, 6, 4 // groups, 2, 3), whole(rng, 6, 1)
    A, B = whole(rng, 2, 4 * 6), whole(rng, 6, 2 // groups)
    y, _ = layers.adapted_conv(lora_linear, x, W, b, (A, B), 0.5, None, moves, groups)
    single = Geometry((1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1))
    low, _ = layers.conv(x, A.reshape(2, 4, 2, 3), None, moves)
    high, _ = layers.conv(low, B.reshape(6, -1, 1, 1), None, single, groups)
    base, _ = layers.conv(x, W, b, moves, groups)
    assert (y == base + 0.5 * high).all()
    merged, bias = layers.merge_conv(lora.LORA, W, b, (A, B), 0.5, groups)
    assert merged.shape == (6, 4, 2, 3)
    assert (layers.conv(x, merged, bias, moves)[0] == y).all()
    apart, _ = layers.block_diagonal(B, groups)
    back_again, _ = layers.merge_conv(lora.LORA, merged, bias, (A, apart), -0.5)
    flat, _ = layers.block_diagonal(W.reshape(6, -1), groups)
    assert (back_again == flat.reshape(merged.shape)).all()
    assert (back_again == merged).all() == (not (apart @ A).any())


@pytest.mark.parametrize("entry", ["lora", "lora-bias", "dora", "vera", "adalora"])
@pytest.mark.parametrize("kind", ["conv1", "conv2"])
def test_a_convolution_merges_by_its_variant(entry, kind):
    case = layer_kinds.draw_case(entry, kind, np.random.default_rng(1))
    groups, wanted = case.extra["groups"], case.merged()
    W, b = layers.merge_conv(case.variant, case.W, case.b, case.P[0], case.s, groups)
    assert exact_numbers.same(W, wanted.W)
    assert exact_numbers.same(b, wanted.b)
    W, _ = layers.merge_conv(lora.LORA, case.W, case.b, case.P[0][:2], case.s + 1, groups)
    assert not exact_numbers.same(W, wanted.W)


def test_places_beside_the_input_are_marked_by_minus_one():
    """Whichever of the dimensions they lie beside."""
    sizes, flat = GEOMETRIES[4].places((6, 5, 4))
    assert flat.shape == (int(np.prod(sizes)), 4)
    assert set(flat[flat < 0].tolist()) == {-1}
    assert flat.max() < 6 * 5 * 4


def test_dropout_of_a_convolution_drops_entries_of_its_input_not_of_its_patches():
    """An entry that is dropped is so wherever the kernel meets it."""
    rng = np.random.default_rng(0)
    moves = GEOMETRIES[0]
    x, W, A, B = whole(rng, 1, 1, 5), whole(rng, 2, 1, 3), whole(rng, 2, 3), whole(rng, 2, 2)
    K = np.array([[[0.0, 2.0, 0.0, 2.0, 2.0]]])
    y, _ = layers.adapted_conv(lora_linear, x, W, None, (A, B), 0.5, K, moves)
    base, _ = layers.conv(x, W, None, moves)
    branch, _ = layers.adapted_conv(lora_linear, K * x, 0 * W, None, (A, B), 0.5, None, moves)
    assert (y == base + branch).all()
    assert not (
        y == layers.adapted_conv(lora_linear, x, W, None, (A, B), 0.5, None, moves)[0]
    ).all()


@FEW
@given(A=draw.fractions((2, 5)), B=draw.fractions((3, 2)))
def test_a_twin_is_the_transposed_change_and_its_twin_is_the_first(A, B):
    A2, B2 = lora.twin(A, B)
    assert (B2 @ A2 == (B @ A).T).all()
    assert all((one == two).all() for one, two in zip(lora.twin(A2, B2), (A, B), strict=True))
    table, head = whole(np.random.default_rng(0), 5, 3), Fraction(7, 3)
    merged = lora.merge_weight(table, A2, B2, head)
    assert (merged == lora.merge_weight(table.T, A, B, head).T).all()


@pytest.mark.parametrize("entry", ["lora-bias", "dora", "dora-full", "vera", "adalora"])
def test_a_variant_needs_nothing_of_a_kind_but_its_matrix_and_columns(entry):
    """An embedding by rows is the linear by columns with a single 1, with every part's gradient."""
    case = layer_kinds.draw_case(entry, "linear", np.random.default_rng(0))
    ids = np.array([3, 0, 3, 1])
    f = variants.REGISTRY[entry].variant.linear
    y, back = layers.adapted_embedding(f, ids, case.W.T, case.P[0], case.s)
    columns = exact_numbers.exactly(dense(ids, case.W.shape[1]))
    wanted, wanted_back = f(columns, case.W, None, *case.P[0], case.s)
    assert exact_numbers.same(y, wanted)
    for found, want in zip(back(case.dy), wanted_back(case.dy)[1:], strict=True):
        assert exact_numbers.same(found, want)
