"""The pixel codec and patches: exact inverses where they must be, and what they average and enlarge."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lct.data.latents import PixelCodec, patchify, unpatchify

edges = st.integers(1, 3)


def test_encode_is_the_area_mean_in_minus_one_to_one():
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), np.uint8)
    latents = PixelCodec(4).encode(frames)
    expected = frames.reshape(2, 2, 4, 3, 4, 3).mean((2, 4)) / 127.5 - 1
    assert latents.shape == (2, 2, 3, 3) and latents.dtype == torch.float32
    np.testing.assert_allclose(latents, expected, atol=1e-6)


def test_black_and_white_are_the_ends_of_the_range_and_survive():
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    frames[1] = 255
    codec = PixelCodec(8)
    latents = codec.encode(frames)
    assert latents[0].eq(-1).all() and latents[1].eq(1).all()
    assert np.array_equal(codec.decode(latents), frames)


def test_decode_clamps_and_a_ramp_comes_back():
    codec = PixelCodec(4)
    ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None, None, :, None], 3, axis=3).repeat(16, axis=1)
    back = codec.decode(codec.encode(ramp)).numpy().astype(int)
    assert np.abs(back - ramp)[:, :, 8:-8].max() <= 1
    assert codec.decode(torch.full((1, 2, 2, 3), 9.0)).eq(255).all()


def test_an_image_is_a_video_of_one_frame():
    frames = np.random.default_rng(1).integers(0, 256, (2, 16, 8, 3), np.uint8)
    codec = PixelCodec(8)
    assert torch.equal(codec.encode_images(frames)[1], codec.encode(frames[1:])[0])
    assert (codec.channels, codec.stride, codec.time_stride, codec.name) == (3, 8, 1, "pixel/8")


@given(video=st.tuples(edges, edges, edges), patch=st.tuples(edges, edges, edges), channels=edges)
def test_unpatchify_inverts_patchify(video, patch, channels):
    sizes = [count * edge for count, edge in zip(video, patch, strict=True)]
    latents = torch.arange(np.prod(sizes) * channels, dtype=torch.float32).reshape(*sizes, channels)
    rows = patchify(latents, patch)
    assert rows.shape == (np.prod(video), np.prod(patch) * channels)
    assert torch.equal(unpatchify(rows, video, patch), latents)


def test_rows_go_frame_height_width():
    latents = torch.arange(2 * 4 * 6).reshape(2, 4, 6, 1)
    rows = patchify(latents, (1, 2, 3))
    row = 1 * (2 * 2) + 1 * 2 + 0  # frame 1, second row of patches, first patch
    assert rows[row].tolist() == latents[1, 2:4, 0:3, 0].flatten().tolist()


def test_gradients_pass_through():
    latents = torch.randn(2, 4, 4, 3, requires_grad=True)
    unpatchify(patchify(latents, (2, 2, 2)), (1, 2, 2), (2, 2, 2)).square().sum().backward()
    assert torch.equal(latents.grad, 2 * latents.detach())


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: PixelCodec(0), "stride: expected a positive"),
        (lambda: PixelCodec(8).encode(np.zeros((1, 8, 12, 3), np.uint8)), "8 divides"),
        (lambda: PixelCodec(8).encode(np.zeros((1, 8, 8, 3), np.float32)), "expected uint8"),
        (lambda: PixelCodec(8).encode_images(np.zeros((1, 8, 8), np.uint8)), r"\[T, H, W, 3\]"),
        (lambda: PixelCodec(8).decode(torch.zeros(4, 12)), "unpatchify first"),
        (lambda: patchify(torch.zeros(3, 4, 4, 1), (2, 2, 2)), "divides"),
        (lambda: patchify(torch.zeros(4, 4, 1), (1, 2, 2)), r"expected \[T, H, W, C\]"),
        (lambda: unpatchify(torch.zeros(5, 8), (1, 2, 2), (1, 2, 2)), r"expected \[4, "),
        (lambda: unpatchify(torch.zeros(4, 6), (1, 2, 2), (1, 2, 2)), "a multiple of 4"),
    ],
)
def test_wrong_sizes_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
