"""A video file as frames, through PyAV.

Opening reads the packets' time stamps only. A frame is decoded when asked for: one soon after the last goes on from
where the decoder stands, any other starts at the key frame before it.
"""

import os
from bisect import bisect_right
from pathlib import Path
from typing import Any
from weakref import WeakSet

import av
import torch
from jaxtyping import Float
from torch import Tensor

from opsin.data.images import luma
from opsin.errors import BadInput

VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"})
NEAR = 16  # frames: decoding so many is cheaper than seeking

opened: "WeakSet[Frames]" = WeakSet()


def _close_all() -> None:
    for frames in list(opened):
        frames.close()


os.register_at_fork(before=_close_all)  # processes must not share a file's position


class Frames:
    """Every `stride`-th frame of a video, in order, as a split of the task "images".

    Raises BadInput: not a video, or without a frame. A damaged frame shows as the last one that could be decoded.
    `in_order`: one reader at a time, and fastest from front to back.
    """

    in_order = True
    decoder: Any
    current: Any  # the frame that the decoder stands on
    following: Any  # the one after it, if that has been decoded

    def __init__(self, path: Path, channels: int = 3, stride: int = 1):
        self.path, self.channels, self.stride = path, channels, stride
        self.container: Any = None
        try:
            with av.open(str(path)) as container:
                if not container.streams.video:
                    raise BadInput(f"the file {path} holds no video stream")
                self.rate = float(container.streams.video[0].average_rate or 0)
                packets = [
                    (p.pts, p.pts if p.dts is None else p.dts, p.is_keyframe)
                    for p in container.demux(video=0)
                    if p.pts is not None and not p.is_discard
                ]
        except (av.FFmpegError, OSError) as error:
            raise BadInput(f"the video {path} cannot be read: {_reason(error)}") from error
        if not packets:
            raise BadInput(f"the video {path} holds no frames")
        stamps = sorted(shown for shown, _, _ in packets)
        self.decoding = {shown: decoded for shown, decoded, key in packets if key} or {stamps[0]: stamps[0]}
        self.keys = sorted(self.decoding)
        self.near = NEAR * (stamps[-1] - stamps[0]) // len(stamps)
        self.stamps = stamps[::stride]

    def __len__(self) -> int:
        return len(self.stamps)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "c h w"], int]:
        index = range(len(self))[index]
        reason = ""
        for place in range(index, -1, -1):
            try:
                array = self._decode(self.stamps[place]).to_ndarray(format="rgb24")
            except (av.FFmpegError, OSError, StopIteration) as error:
                self.close()
                reason = reason or _reason(error)
                continue
            image = torch.from_numpy(array).permute(2, 0, 1).float() / 255
            return (luma(image) if self.channels == 1 else image), 0
        raise BadInput(f"frame {index} of the video {self.path} and those before it cannot be read: {reason}")

    def _decode(self, wanted: int) -> Any:
        """The frame shown at a time stamp: the last one that is not later."""
        if self.container is None:
            self.container = av.open(str(self.path))
            self.container.streams.video[0].codec_context.thread_count = 1  # its threads would not survive a fork
            opened.add(self)
            self._start_before(wanted)
        elif wanted < self.current.pts or (
            wanted > self.current.pts + self.near and self._key(wanted) > self.current.pts
        ):
            self._start_before(wanted)
        while self.current.pts < wanted:
            upcoming = self.following or self._next()
            if upcoming is None or upcoming.pts > wanted:
                self.following = upcoming
                break
            self.current, self.following = upcoming, None
        return self.current

    def _key(self, wanted: int) -> int:
        """The time stamp of the last key frame that is not later: all frames from there on can be decoded from it."""
        return self.keys[max(0, bisect_right(self.keys, wanted) - 1)]

    def _start_before(self, wanted: int) -> None:
        """Stands on a frame that is not later than wanted; files are searched by the time of decoding, not showing."""
        for place in (self.decoding[self._key(wanted)], min(self.decoding[self.keys[0]], 0)):
            self.container.seek(place, stream=self.container.streams.video[0])
            self.decoder = self.container.decode(video=0)
            self.following, first = None, self._next()
            if first is None:
                raise StopIteration("no frame could be decoded")
            self.current = first
            if first.pts <= wanted:
                return

    def _next(self) -> Any:
        return next((frame for frame in self.decoder if frame.pts is not None), None)

    def close(self) -> None:
        """Closes the file; the next access opens it again."""
        if self.container is not None:
            self.container.close()
        self.container = self.decoder = self.current = self.following = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | dict.fromkeys(("container", "decoder", "current", "following"))


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or " ".join(str(error).split())[:120]).lower()
