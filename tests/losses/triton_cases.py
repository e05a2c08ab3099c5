"""TritonTiles against the same tiles in plain torch and float64.

test_triton_tiles.py runs this file in processes of its own. Triton decides when a kernel is
defined whether it is interpreted or compiled, by TRITON_INTERPRET.
"""

import math
from dataclasses import replace

import pytest
import torch
import triton

from contrastive.losses import kernel_check, triton_kernels
from contrastive.losses.all_pairs import Tile
from contrastive.losses.sigmoid import sigmoid_tile
from contrastive.losses.softmax import gradient_tile, statistics_tile
from contrastive.losses.triton_tiles import KERNELS as KERNEL_OF
from contrastive.losses.triton_tiles import TritonTiles

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
KERNELS = (
    triton_kernels.sigmoid_kernel,
    triton_kernels.softmax_statistics_kernel,
    triton_kernels.softmax_gradient_kernel,
)
DUPLICATES = ("negative", "ignore", "positive")
# r, c, E, diagonal: inside the tile, partly outside it, wholly outside it; blocks are 16 x 32 x 16 when interpreted.
SHAPES = [
    (1, 1, 1, 0),
    (17, 33, 5, 3),
    (17, 33, 5, 40),
    (64, 64, 32, 0),
    (64, 64, 32, -50),
    (64, 64, 32, -64),
    (50, 70, 48, -20),
]
needs_numbers = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU")
needs_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def one_configuration(monkeypatch):
    """Use the last configuration alone, so that few kernels are compiled."""
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "configs", kernel.configs[-1:])
    if INTERPRETED:  # its blocks are smaller, and slower
        monkeypatch.setattr(kernel_check, "ROWS", 40)
        monkeypatch.setattr(kernel_check, "COLUMNS", 70)


def features(rows, columns, dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=1).to(DEVICE, dtype)
        for n in (rows, columns)
    ]


def tile_of(rows, columns, dim, diagonal, duplicates, dtype=torch.float32):
    # Row i and its column i + diagonal have one caption, as pairs of a data set do.
    row_ids, column_ids = torch.arange(rows, device=DEVICE), torch.arange(columns, device=DEVICE) - diagonal
    return Tile(*features(rows, columns, dim, dtype), diagonal, duplicates, row_ids % 7, column_ids % 7)


def scalar(value):
    return torch.tensor(value, device=DEVICE)


def oracle(function, tile, *arguments):
    """Return what plain torch answers in float64."""
    x, y = tile.x.double(), tile.y.double()
    arguments = [a.double() if torch.is_tensor(a) else a for a in arguments]
    return function(replace(tile, x=x, y=y, buffers=[]), *arguments)


def both(function, tile, *arguments):
    """Return what TritonTiles, on buffers that hold rubbish before, and plain torch in float64 answer."""
    ours = TritonTiles(tile.x, len(tile.x) + 3, len(tile.y) + 5)
    ours._gradient.fill_(torch.nan)
    return function(replace(tile, kernels=ours), *arguments), oracle(function, tile, *arguments)


def check_norm(ours, expected, tolerance=1e-6):
    error = torch.linalg.vector_norm(ours.double() - expected)
    assert error <= tolerance * torch.linalg.vector_norm(expected), error


def check_gradient(ours, expected, dtype):
    assert ours.dtype == dtype and ours.shape == expected.shape
    if dtype == torch.bfloat16:  # converted once: a GPU rounds, the interpreter cuts off
        torch.testing.assert_close(ours.double(), expected, rtol=2**-7 if INTERPRETED else 2**-8, atol=1e-6)
    else:
        check_norm(ours, expected)


def check_statistics(ours, expected):
    for mine, right in zip(ours, expected, strict=True):
        if right is None:
            assert mine is None
            continue
        assert mine.dtype == torch.float64 and mine.shape == right.shape
        finite = right.isfinite()
        assert torch.equal(mine[~finite], right[~finite])
        check_norm(mine[finite], right[finite])


@needs_numbers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("duplicates", DUPLICATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sigmoid(shape, duplicates, dtype):
    tile = tile_of(*shape, duplicates, dtype)
    (loss, total, gradient), expected = both(sigmoid_tile, tile, scalar(10.0), scalar(-4.0), True)
    assert loss.dtype == total.dtype == torch.float64 and loss.shape == total.shape == ()
    check_norm(loss, expected[0])
    # Positives and negatives cancel in the sum: its error is held against the sum of magnitudes.
    assert abs(total - expected[1]) <= 1e-6 * expected[2].abs().sum()
    check_gradient(gradient, expected[2], dtype)


@needs_numbers
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_sigmoid_without_gradient(duplicates):
    tile = tile_of(17, 33, 5, 3, duplicates)
    (loss, *rest), expected = both(sigmoid_tile, tile, scalar(10.0), scalar(-4.0), False)
    assert loss.dtype == torch.float64 and rest == [None, None]
    check_norm(loss, expected[0])


@needs_numbers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("duplicates", DUPLICATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax(shape, duplicates, dtype):
    tile = tile_of(*shape, duplicates, dtype)
    ours, expected = both(statistics_tile, tile, scalar(14.0))
    check_statistics(ours, expected)
    # The rest of the batch adds to each sum, so that none is empty.
    lse = [torch.logaddexp2(o, torch.ones_like(o)).float() for o in ours[:2]]
    matched = torch.linspace(-1, 1, len(tile.x), device=DEVICE)
    gradient, expected = both(gradient_tile, tile, scalar(14.0), *lse, matched)
    check_gradient(gradient, expected, dtype)


@needs_numbers
def test_extreme_logits_keep_their_digits():
    # z = 100·x·y − 10 reaches −60 and 60: tails as small as e⁻⁶⁰ are right, of positives as of negatives. Rounding z
    # itself, of magnitude up to 70·log₂e, is worth 2⁻²⁴·100 of what it is the exponent of.
    x = torch.linspace(-0.5, 0.7, 40, device=DEVICE)[:, None]
    y = torch.ones(40, 1, device=DEVICE)
    for duplicates in DUPLICATES:
        tile = Tile(x, y, 0, duplicates, torch.arange(40, device=DEVICE) // 2, torch.arange(40, device=DEVICE) // 2)
        ours, expected = both(sigmoid_tile, tile, scalar(100.0), scalar(-10.0), True)
        check_norm(ours[0], expected[0])
        torch.testing.assert_close(ours[2].double(), expected[2], rtol=2e-5, atol=0)
        check_statistics(*both(statistics_tile, tile, scalar(100.0)))


@needs_numbers
@pytest.mark.parametrize("bias", [-20.0, -15.0, -8.0, 0.0, 15.0])
def test_small_losses_keep_their_digits(bias):
    x, y = torch.zeros(64, 4, device=DEVICE), torch.zeros(64, 4, device=DEVICE)
    loss = TritonTiles(x, 64, 64).sigmoid_tile(Tile(x, y, 100), scalar(10.0), scalar(bias), False)[0]
    expected = 64 * 64 * (max(bias, 0) + math.log1p(math.exp(-abs(bias))))
    assert abs(loss.item() - expected) <= 3e-6 * expected  # rounding a base-2 logit of 29 is worth 1.3e-6 of e^z


@needs_numbers
def test_rows_and_columns_wholly_left_out():
    x, y = features(20, 40, 8)
    ids = torch.arange(20, device=DEVICE)
    tile = Tile(x, y, 100, "ignore", ids, torch.full((40,), 5, device=DEVICE))
    rows, columns, _ = TritonTiles(x, 20, 40).statistics_tile(tile, scalar(10.0))
    assert rows[5] == -torch.inf and torch.equal(rows.isfinite(), ids != 5) and columns.isfinite().all()
    lse = rows.clamp(min=0).float(), columns.float()
    gradient, expected = both(gradient_tile, tile, scalar(10.0), *lse, torch.ones_like(lse[0]))
    assert not expected[5].any() and not gradient[5].any()
    check_norm(gradient, expected)
    nobody = replace(tile, row_ids=torch.full((20,), 5, device=DEVICE))
    rows, columns, _ = TritonTiles(x, 20, 40).statistics_tile(nobody, scalar(10.0))
    assert (rows == -torch.inf).all() and (columns == -torch.inf).all()
    results = TritonTiles(x, 20, 40).sigmoid_tile(nobody, scalar(10.0), scalar(-4.0), True)
    assert all(not r.any() for r in results)


@needs_numbers
def test_features_may_be_slices():
    wide = [f.repeat(1, 2) for f in features(40, 50, 24)]
    x, y = wide[0][3:, 5:29], wide[1][:, 1:25]
    results, expected = both(sigmoid_tile, Tile(x, y, 2), scalar(10.0), scalar(-4.0), True)
    check_norm(results[0], expected[0])
    check_norm(results[2], expected[2])


@needs_numbers
def test_calls_share_one_buffer():
    x, y = features(40, 50, 24)
    tiles, corner = TritonTiles(x, 40, 50), Tile(x[:9], y[:7], 0)
    arguments = (scalar(10.0), scalar(-4.0), True)
    vector = torch.zeros(50, device=DEVICE)
    softmax = tiles.gradient_tile(Tile(x, y, 0), scalar(10.0), vector[:40], vector, vector[:40])
    whole = tiles.sigmoid_tile(Tile(x, y, 0), *arguments)[2]
    part = tiles.sigmoid_tile(corner, *arguments)[2]
    assert whole.data_ptr() == part.data_ptr() == softmax.data_ptr()
    check_norm(part, oracle(sigmoid_tile, corner, *arguments)[2])


@needs_numbers
def test_nan_reaches_the_results():
    x, y = features(20, 40, 8)
    x[3, 2] = torch.nan
    tile = Tile(x, y, 0)
    loss, total, gradient = TritonTiles(x, 20, 40).sigmoid_tile(tile, scalar(10.0), scalar(-4.0), True)
    assert loss.isnan() and total.isnan() and gradient[3].isnan().all() and not gradient[4].isnan().any()
    rows, columns, _ = TritonTiles(x, 20, 40).statistics_tile(tile, scalar(10.0))
    assert rows[3].isnan() and columns.isnan().sum() == 39  # all but its own, which is left out


@needs_numbers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("duplicates", DUPLICATES)
@pytest.mark.parametrize("function", [sigmoid_tile, statistics_tile, gradient_tile])
def test_the_check_finds_nothing_wrong(function, duplicates, dtype):
    assert kernel_check._problem(function, features(4, 4, 20, dtype)[0], duplicates, True) is None


@needs_numbers
@pytest.mark.parametrize("function", [sigmoid_tile, statistics_tile, gradient_tile])
def test_the_check_finds_what_does_not_compile(function, monkeypatch):
    wrong = triton.Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 12})  # no power of two
    monkeypatch.setattr(KERNEL_OF[function.__name__], "configs", [wrong])
    problem = kernel_check._problem(function, features(4, 4, 20)[0], "negative", True)
    assert problem.startswith(f"{function.__name__}: ") and "\n" not in problem


@pytest.mark.skipif(not INTERPRETED, reason="compiled code keeps its constants")
@pytest.mark.parametrize("function", [sigmoid_tile, statistics_tile, gradient_tile])
def test_the_check_finds_wrong_numbers(function, monkeypatch):
    monkeypatch.setattr(triton_kernels, "LOG2_E", triton.language.constexpr(1.0))
    problem = kernel_check._problem(function, features(4, 4, 20)[0], "negative", True)
    assert problem.startswith(f"{function.__name__} gives wrong numbers with BLOCK_M: 16")


@pytest.mark.skipif(not INTERPRETED, reason="is about the interpreter")
def test_the_interpreter_ran_the_kernels(monkeypatch):
    from triton.runtime import interpreter

    ran = []
    call = interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", lambda self, *a, **k: ran.append(self.fn.__name__) or call(self, *a, **k)
    )
    x, y = features(20, 40, 8)
    tiles, tile = TritonTiles(x, 20, 40), Tile(x, y, 0)
    tiles.sigmoid_tile(tile, scalar(10.0), scalar(-4.0), True)
    rows, columns, _ = tiles.statistics_tile(tile, scalar(10.0))
    tiles.gradient_tile(tile, scalar(10.0), rows.float(), columns.float(), rows.float())
    merge = "merge_log_sum_exp_kernel"
    assert ran == ["sigmoid_kernel", "softmax_statistics_kernel", merge, merge, "softmax_gradient_kernel"]


def compiled(function, constants, **options):
    """Compile a kernel for Hopper, which takes no GPU, and return its PTX."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(("x", "y", "gradient"), "*bf16") | dict.fromkeys(("row_ids", "column_ids"), "*i64")
    types |= dict.fromkeys(("rows", "columns", "diagonal", "size_class", "blocks", "length"), "i32")
    types |= {"lse": "*fp64"} | dict.fromkeys(("x_stride", "y_stride", "gradient_stride"), "i32")
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*fp32") for name in function.arg_names}
    constants = {name: value for name, value in constants.items() if name in signature}
    aligned = [n for n, name in enumerate(signature) if name in ("x", "y", "gradient") or name.endswith("stride")]
    source = ASTSource(function, signature, constants, {(n,): [["tt.divisibility", 16]] for n in aligned})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


@pytest.mark.skipif(INTERPRETED, reason="is about the compiler")
@pytest.mark.parametrize("duplicates", DUPLICATES)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.base_fn.__name__)
def test_kernels_compile_for_hopper(kernel, duplicates):
    configuration = next(c for c in triton_kernels.CONFIGURATIONS[::-1] if c.kwargs["BLOCK_K"] == 64)
    constants = {"DUPLICATES": duplicates, "GRADIENT": True, "EMBED_DIM": 64, "PRECISION": "ieee"}
    if duplicates == "negative":
        constants |= {"row_ids": None, "column_ids": None}
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    ptx = compiled(kernel.fn, constants | configuration.kwargs, **options)
    assert "wgmma.mma_async" in ptx
    entries = configuration.kwargs["BLOCK_M"] * configuration.kwargs["BLOCK_N"] // (32 * configuration.num_warps)
    assert ptx.count("ex2.approx") + ptx.count("rsqrt.approx") == 2 * entries  # what the epilogue is bound by
    assert ptx.count("div.full") <= entries / 8  # one a logarithm, which 16 entries share


@pytest.mark.skipif(INTERPRETED, reason="is about the compiler")
def test_the_merge_compiles():
    assert "ex2.approx" in compiled(triton_kernels.merge_log_sum_exp_kernel, {"BLOCKS": 16, "BLOCK": 128})


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", range(len(triton_kernels.CONFIGURATIONS)))
def test_every_configuration(number, dtype, monkeypatch):
    configuration = triton_kernels.CONFIGURATIONS[number]
    if configuration.kwargs["BLOCK_K"] * dtype.itemsize != triton_kernels.SWIZZLE_BYTES:
        pytest.skip("is for the other type")
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "configs", [configuration])
    test_sigmoid((300, 700, 96, 20), "negative", dtype)
    test_softmax((300, 700, 96, 20), "negative", dtype)


@needs_gpu
def test_calls_can_be_captured_in_a_graph():
    x, y = features(300, 700, 96, torch.bfloat16)
    tiles, tile, arguments = TritonTiles(x, 300, 700), Tile(x, y, 0), (scalar(10.0), scalar(-4.0), True)
    tiles.sigmoid_tile(tile, *arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, _, gradient = tiles.sigmoid_tile(tile, *arguments)
    x.neg_()
    graph.replay()
    expected = oracle(sigmoid_tile, tile, *arguments)
    check_norm(loss, expected[0])
    check_gradient(gradient, expected[2], torch.bfloat16)
