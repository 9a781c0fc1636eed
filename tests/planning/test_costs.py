import pytest

from cmd_jax.performance.flops import count
from cmd_jax.planning.costs import AUTOENCODER, MOTION, UNET, Clip, format_table, full_size, table


@pytest.fixture(scope="module")
def params():
    return full_size()


@pytest.mark.parametrize("height, width, cost", [(512, 512, 0.773), (512, 1024, 1.546)])
def test_autoencoder_of_the_paper(params, height, width, cost):
    video = Clip.of(height, width).video
    flops = count(lambda p, x: AUTOENCODER.apply({"params": p}, x)[0], params["autoencoder"], video)
    tokens = 16 * height * width // 256
    blocks = tokens * 16 * 20 * 384**2
    assert blocks < flops.layers < 1.003 * blocks and flops.layers / 1e12 == pytest.approx(cost, rel=0.002)
    # Queries with keys and weights with values, over 16 frames and over the cells of one.
    assert flops.attention == tokens * 16 * 2 * 384 * (16 + tokens // 16)
    assert flops.convolution == flops.other == 0


@pytest.mark.parametrize("height, width, tokens, cost", [(512, 512, 320, 0.143), (512, 1024, 512, 0.228)])
def test_motion_model_of_the_paper(params, height, width, tokens, cost):
    clip = Clip.of(height, width)
    flops = count(
        lambda p, x, t, c: MOTION.apply({"params": p}, x, t, None, c),
        params["motion"], clip.motion, clip.time, clip.content,
    )  # fmt: skip
    blocks = tokens * 28 * 12 * 1152**2
    assert blocks < flops.layers < 1.003 * blocks and flops.layers / 1e12 == pytest.approx(cost, rel=0.005)
    assert flops.attention == 28 * 2 * tokens**2 * 1152


def spared(height, width):
    """T multiply-adds of the UNet that are no longer there: 5/9 of the convolutions that follow an enlargement."""
    levels = zip((2, 4, 8), (640, 1280, 1280), strict=True)
    return sum(20 * height * width // (8 * half) ** 2 * channels**2 for half, channels in levels) / 1e12


@pytest.mark.parametrize("height, width, cost", [(512, 512, 0.34), (512, 1024, 0.68)])
def test_content_model_of_the_paper(params, height, width, cost):
    clip = Clip.of(height, width)
    flops = count(
        lambda p, x, t, c: UNET.apply({"params": p}, x, t, c),
        params["content"], clip.content, clip.time, clip.text,
    )  # fmt: skip
    assert flops.layers / 1e12 + spared(height, width) == pytest.approx(cost, rel=0.01)
    # By hand: the first convolution.
    assert flops.convolution > height * width // 64 * 9 * 4 * 320 and flops.other == 0


@pytest.mark.slow
def test_the_table_agrees_with_the_paper():
    rows = table()
    models = {"train at 512x512: content": spared(512, 512)}
    models |= {f"sample at 512x1024: {n} + {n} steps, CMD decoder": n * spared(512, 1024) for n in (50, 100)}
    for row in rows:
        # Half of the last of the two digits that the paper gives is more than 2% of 0.14.
        layers = row.layers + models.pop(row.what, 0)
        assert row.paper is None or layers == pytest.approx(row.paper, rel=0.02, abs=0.005), row
        assert row.total > row.layers
    told = {row.paper: row for row in rows if row.paper}
    fifty, hundred = told[46.8], told[92.1]
    assert not models
    assert hundred.layers - fifty.layers + 50 * spared(512, 1024) == pytest.approx(92.1 - 46.8, rel=0.005)
    # Guidance doubles both models, and a multiply-add is two operations; attention comes on top.
    assert fifty.total > 4 * (fifty.layers - 0.78)
    fast, balanced = (next(row for row in rows if f"preset {name}" in row.what) for name in ("fast", "balanced"))
    assert fast.layers < 16 < balanced.layers < fifty.layers / 1.8 and fast.total < fifty.total / 3
    text = format_table(rows)
    assert "| train at 512x512: motion | 0.14 T | 0.143 T |" in text and len(text.splitlines()) == len(rows) + 2
