"""A video file as frames: random access equals decoding from front to back."""

import pickle
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import opsin.data
from opsin.data.video import Frames
from opsin.errors import BadInput


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """90 frames whose brightness counts up, a key frame every 20, B-frames between them."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size, stream.bit_rate = 48, 32, "yuv420p", 20, 4_000_000
        stream.codec_context.max_b_frames = 2
        for number in range(90):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 30 + 2 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def decoded(clip) -> list[torch.Tensor]:
    with av.open(str(clip)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        arrays = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return [torch.from_numpy(a).permute(2, 0, 1).float() / 255 for a in arrays]


def test_open(clip, decoded):
    data = opsin.data.open(clip)
    assert (data.name, data.task, data.size, data.channels) == ("clip", "images", (32, 48), 3)
    assert len(data.train) == len(decoded) == 90 and data.val is data.train
    assert data.train.rate == 25
    mean = torch.stack(decoded).mean((0, 2, 3))
    assert torch.allclose(torch.tensor(data.mean), mean, atol=1e-4)


def test_any_order_equals_front_to_back(clip, decoded):
    frames = Frames(clip)
    for index in [0, 1, 2, 50, 51, 3, 89, 0, 88, 20, 19, 40, 39, 41, 41, -1]:
        image, target = frames[index]
        assert target == 0
        assert torch.equal(image, decoded[index])
    with pytest.raises(IndexError):
        frames[90]


def test_a_misleading_index_falls_back_to_the_start(clip, decoded):
    frames = Frames(clip)
    frames.decoding = {shown: frames.stamps[-1] for shown in frames.decoding} | {frames.keys[0]: 0}
    assert torch.equal(frames[50][0], decoded[50])


def test_counts_up(clip):
    """The frames are where they belong in time, also with frames that are coded out of order."""
    levels = [float(image.mean()) for image, _ in (Frames(clip)[i] for i in range(90))]
    assert levels == sorted(set(levels))


def test_stride_limit_grey(clip, decoded):
    data = opsin.data.open(clip, stride=7, limit=5, channels=1)
    assert len(data.train) == 5 and data.train[4][0].shape == (1, 32, 48)
    luma = (decoded[28] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    assert torch.allclose(data.train[4][0][0], luma, atol=1e-6)


def test_frames_travel_to_workers(clip, decoded):
    frames = Frames(clip)
    frames[5]
    assert torch.equal(pickle.loads(pickle.dumps(frames))[33][0], decoded[33])
    loader = torch.utils.data.DataLoader(frames, batch_size=30, num_workers=1)
    assert torch.equal(torch.cat([images for images, _ in loader]), torch.stack(decoded))


def test_damage_shows_as_an_earlier_frame(clip, tmp_path):
    content = bytearray(clip.read_bytes())
    start = len(content) // 2
    content[start : start + 300] = bytes(300)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(content)
    frames = Frames(broken)
    images = [frames[i][0] for i in range(len(frames))]
    assert all(image.shape == (3, 32, 48) and torch.isfinite(image).all() for image in images)


def test_degraded_and_cropped_frames(clip):
    data = opsin.data.open(clip, degrade="bicubic:2", crop=16, limit=4)
    assert data.train[3][0].shape == (3, 8, 8) and data.train[3][1].shape == (3, 16, 16)


@pytest.mark.parametrize(("content", "words"), [(b"", "cannot be read"), (b"no video at all" * 50, "cannot be read")])
def test_what_is_no_video_is_named(tmp_path, content, words):
    path = tmp_path / "x.mp4"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=words) as error:
        opsin.data.open(path)
    assert "x.mp4" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(BadInput, match="size=8 does not apply to a video"):
        opsin.data.open(path, size=8)


def test_sound_alone_is_no_video(tmp_path):
    path = tmp_path / "tone.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(BadInput, match="no video stream"):
        opsin.data.open(path)


def test_real_clips(opsin_data):
    for path in [opsin_data / "video" / "demo_demo_spatiotemporal_det.mp4"]:
        data = opsin.data.open(path, stride=20)
        with av.open(str(path)) as container:
            expected = [f.to_ndarray(format="rgb24") for i, f in enumerate(container.decode(video=0)) if i % 20 == 0]
        assert len(data.train) == len(expected)
        last = torch.from_numpy(expected[-1]).permute(2, 0, 1).float() / 255
        assert torch.equal(data.train[len(expected) - 1][0], last)
