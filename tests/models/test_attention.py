import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from meshes import mesh_config

from cmd_jax import defaults
from cmd_jax.errors import UserError
from cmd_jax.models.attention import FUSED, KERNELS, WHOLE_TOKENS, WHOLE_TOKENS_CPU, Case, Device, asked, attend, choice
from cmd_jax.models.attention_kernels import FEW_KEYS, KEY_TILE, QUERY_TILE, blocked, cudnn, flash, plain
from cmd_jax.sharding import make_mesh, partitioning

UNEVEN = 2 * QUERY_TILE + 7  # 1,031, a prime: tiles are padded


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def arguments(outer, queries, keys, heads=2, width=4, dtype=jnp.float32):
    return [draw(*outer, n, heads, width, seed=i, dtype=dtype) for i, n in enumerate((queries, keys, keys))]


def whole(query, key, value):
    logits = jnp.einsum("...qhd,...khd->...hqk", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits / query.shape[-1] ** 0.5, axis=-1).astype(value.dtype)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)


def with_gradients(function):
    """(query, key, value) -> the result and the gradients of each argument."""

    def loss(*args):
        out = function(*args)
        return (out.astype(jnp.float32) ** 3).sum(), out

    def run(*args):
        gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*args)
        return out, *gradients

    return jax.jit(run)


def assert_same(function, args, tolerance, expected=whole):
    for a, b, like in zip(
        with_gradients(function)(*args), with_gradients(expected)(*args), (args[0], *args), strict=True
    ):
        assert (a.shape, a.dtype) == (like.shape, like.dtype)
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("in_turn", [True, False])
@pytest.mark.parametrize(
    "outer, queries, keys, dtype, tolerance",
    [
        ((), UNEVEN, 2 * KEY_TILE + 1, jnp.float32, 1e-5),  # tiles of both are padded
        ((2, 1), 2 * QUERY_TILE, 77, jnp.float32, 1e-5),
        ((2,), 2 * QUERY_TILE, 5 * KEY_TILE // 2, jnp.bfloat16, 2e-2),
    ],
)
def test_tiles_give_what_the_whole_gives_forward_and_backward(outer, queries, keys, dtype, tolerance, in_turn):
    assert_same(lambda *args: blocked(*args, in_turn), arguments(outer, queries, keys, dtype=dtype), tolerance)


def test_plain_gives_what_the_formula_gives_forward_and_backward():
    assert_same(plain, arguments((2, 3), 16, 9), 1e-5)
    assert_same(plain, arguments((2,), 16, FEW_KEYS + 1, dtype=jnp.bfloat16), 2e-2)


def test_the_kernels_of_gpus_and_tpus_are_called_for_the_same_function():
    """cuDNN's by JAX's own reference for it, Pallas' by its interpreter: with padding of tokens, and without."""
    assert_same(lambda *args: cudnn(*args, implementation="xla"), arguments((2, 3), 9, 7), 1e-5)
    assert_same(lambda *args: flash(*args, interpret=True), arguments((2, 1), 100, 77, heads=1), 1e-5)
    assert_same(lambda *args: flash(*args, interpret=True), arguments((), 128, 256, dtype=jnp.bfloat16), 2e-2)


H100, A100, TPU, CPU = Device("cuda", 9.0), Device("cuda", 8.0), Device("tpu"), Device("cpu")


@pytest.mark.parametrize(
    "device, dtype, queries, keys, width, kernel",
    [
        (H100, "bfloat16", 1280, 1280, 72, "cudnn"),
        (H100, "float16", 4096, FUSED["cuda"][1] + 13, 40, "cudnn"),
        (H100, "bfloat16", 16, 16, 48, "plain"),  # frames
        (H100, "bfloat16", 8192, 8192, 512, "blocked"),  # the VAE's one head
        (H100, "bfloat16", 1024, 1024, 160, "cudnn"),
        (A100, "bfloat16", 1024, 1024, 160, "plain"),  # its cuDNN takes narrower heads
        (H100, "float32", WHOLE_TOKENS, WHOLE_TOKENS, 64, "plain"),
        (H100, "float32", 1280, 1280, 64, "blocked"),
        (Device("rocm"), "bfloat16", 1280, 1280, 64, "blocked"),
        (TPU, "bfloat16", 1280, 1280, 72, "flash"),
        (TPU, "float32", 8192, 8192, 512, "flash"),
        (TPU, "bfloat16", 8192, 77, 64, "plain"),
        (CPU, "float32", WHOLE_TOKENS_CPU + 1, WHOLE_TOKENS_CPU + 1, 64, "blocked"),
        (CPU, "float32", 4096, 77, 64, "plain"),
    ],
)
def test_what_is_chosen(device, dtype, queries, keys, width, kernel):
    assert choice("auto", Case(device, dtype, queries, keys, width))[0] == kernel


@pytest.mark.parametrize(
    "kernel, device, dtype, width",
    [("cudnn", H100, "float32", 64), ("cudnn", H100, "bfloat16", 44), ("cudnn", A100, "bfloat16", 160),
     ("cudnn", TPU, "bfloat16", 64), ("flash", H100, "bfloat16", 64)],
)  # fmt: skip
def test_a_kernel_that_cannot_is_refused_in_one_line(kernel, device, dtype, width):
    with pytest.raises(UserError) as error:
        choice(kernel, Case(device, dtype, 16, 16, width))
    assert str(error.value).startswith(f"attention={kernel}: ") and "\n" not in str(error.value)
    for other in ("auto", "plain", "blocked"):
        choice(other, Case(device, dtype, 16, 16, width))


def test_a_kernel_of_another_device_is_refused_before_anything_is_traced():
    for kernel in KERNELS:
        if kernel in ("cudnn", "flash"):
            with pytest.raises(UserError, match=f"^attention={kernel}: "), asked(kernel, jax.devices("cpu")[0]):
                pass
    with pytest.raises(UserError, match="^attention=flsh: "), asked("flsh", jax.devices("cpu")[0]):
        pass


def test_what_is_asked_for_is_taken_by_a_function_that_was_traced_for_another_and_told_once(caplog):
    args, function = arguments((1,), 24, 41, heads=3, width=20), jax.jit(attend)
    caplog.set_level("INFO", "cmd_jax")
    found = {}
    for kernel in ("auto", "blocked", "plain", "blocked"):
        with asked(kernel, jax.devices("cpu")[0]):
            found[kernel] = function(*args), "while" in function.lower(*args).as_text()
    assert {kernel: loops for kernel, (_, loops) in found.items()} == {"auto": False, "blocked": True, "plain": False}
    np.testing.assert_allclose(found["blocked"][0], found["plain"][0], atol=1e-5)
    told = [record.getMessage() for record in caplog.records if "24x41" in record.getMessage()]
    assert len(told) == 2 and ": plain, " in told[0] and ": blocked, " in told[1]


def test_great_logits_neither_overflow_nor_vanish():
    """Logits of some hundreds, of which the greatest are in the last tile."""
    query, key, value = arguments((), 300, 2 * KEY_TILE)
    key = key.at[:KEY_TILE].multiply(1e-2) * 200
    assert_same(lambda *args: blocked(*args, True), (query, key, value), 1e-4)
    np.testing.assert_allclose(plain(query, key, value), whole(query, key, value), atol=1e-4)


def test_tiles_in_a_scan_with_recomputed_blocks():
    """As models stack their blocks: scanned, each under jax.checkpoint."""
    query, key, value = arguments((), 2 * QUERY_TILE, KEY_TILE)

    def stacked(attention, query, key, value):
        block = jax.checkpoint(lambda x, scale: (attention(x * scale, key, value), None), prevent_cse=False)
        return jax.lax.scan(block, query, jnp.array([1.0, 2.0]))[0]

    def by_tiles(*args):
        return stacked(lambda *a: blocked(*a, True), *args)

    assert_same(by_tiles, (query, key, value), 1e-5, lambda *args: stacked(whole, *args))


@pytest.mark.parametrize("queries, keys, tiled", [(2048, 77, False), (128, 2048, False), (256, 256, True)])
def test_few_queries_or_few_keys_are_taken_whole(queries, keys, tiled):
    assert WHOLE_TOKENS_CPU == 128
    shapes = [jax.ShapeDtypeStruct((n, 2, 4), jnp.float32) for n in (queries, keys, keys)]
    assert ("while" in jax.jit(attend).lower(*shapes).as_text()) == tiled


def test_memory_grows_with_the_tokens_not_with_their_square():
    """64x128 latents: 5 heads of 64, 8,192 tokens, whose scores would be 1.3 GB."""
    shapes = [jax.ShapeDtypeStruct((1, 8192, 5, 64), jnp.float32)] * 3
    arrays = 8192 * 5 * 64 * 4
    scores = QUERY_TILE * KEY_TILE * 4

    def bytes_of(function):
        return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    for function, heads in ((attend, 1), (lambda *args: blocked(*args, False), 5)):
        assert bytes_of(function) < 3 * heads * scores + 6 * arrays
        assert bytes_of(with_gradients(function)) < 5 * heads * scores + 14 * arrays
    assert bytes_of(whole) > 5 * 8192**2 * 4


def check_eight_devices():
    """Tiles of each device's own clips, heads or queries; what does not divide stays whole."""
    by_tokens = [(name, ("tensor",) if name == "act_token" else axes) for name, axes in defaults.RULES]
    for rules, clips, heads, spec in (
        (defaults.RULES, 3, 2, PartitionSpec(None, None, "tensor")),
        (by_tokens, 4, 3, PartitionSpec(("data", "fsdp"), "tensor")),
    ):
        args = arguments((clips,), 2 * WHOLE_TOKENS_CPU, WHOLE_TOKENS_CPU + 7, heads)
        expected = with_gradients(whole)(*args)
        with partitioning(make_mesh(mesh_config(data=2, fsdp=2, tensor=2)), rules):
            found = with_gradients(attend)(*args)
        assert found[0].sharding.is_equivalent_to(NamedSharding(found[0].sharding.mesh, spec), 4), found[0].sharding
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
