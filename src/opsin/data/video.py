"""A video file as frames, through PyAV.

Opening reads the packets' time stamps only. A frame is decoded when asked for: the next one goes on from where the
decoder stands, any other seeks to the key frame before it.
"""

import os
from pathlib import Path
from typing import Any

import av
import torch
from jaxtyping import Float
from torch import Tensor

from opsin.data.images import luma
from opsin.errors import BadInput

VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"})


class Frames:
    """Every `stride`-th frame of a video, in order, as a split of the task "images".

    Raises BadInput: not a video, or without a frame. A damaged frame shows as the last one that could be decoded.
    `in_order`: one reader at a time, and fastest from front to back.
    """

    in_order = True
    process: int
    current: Any
    following: Any

    def __init__(self, path: Path, channels: int = 3, stride: int = 1):
        self.path, self.channels, self.stride = path, channels, stride
        self.container: Any = None
        try:
            with av.open(str(path)) as container:
                if not container.streams.video:
                    raise BadInput(f"the file {path} holds no video stream")
                self.rate = float(container.streams.video[0].average_rate or 0)
                stamps = sorted(p.pts for p in container.demux(video=0) if p.pts is not None and not p.is_discard)
        except (av.FFmpegError, OSError) as error:
            raise BadInput(f"the video {path} cannot be read: {_reason(error)}") from error
        self.stamps = stamps[::stride]
        if not self.stamps:
            raise BadInput(f"the video {path} holds no frames")

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
        """The frame shown at the time stamp: the last one that is not later."""
        if self.container is None or self.process != os.getpid():
            self.container, self.process = av.open(str(self.path)), os.getpid()
            self.container.streams.video[0].thread_type = "AUTO"
            self._restart(0)
        elif wanted < self.current.pts or wanted > self._horizon():
            self._restart(wanted)
        while self.current.pts < wanted:
            upcoming = self.following or self._next()
            if upcoming is None or upcoming.pts > wanted:
                self.following = upcoming
                break
            self.current, self.following = upcoming, None
        return self.current

    def _restart(self, wanted: int) -> None:
        """Stands on the key frame at or before a time stamp."""
        self.container.seek(wanted, stream=self.container.streams.video[0])
        self.decoder = self.container.decode(video=0)
        self.current, self.following = next(self.decoder), None

    def _next(self) -> Any:
        return next((frame for frame in self.decoder if frame.pts is not None), None)

    def _horizon(self) -> int:
        """Up to this time stamp, decoding on is cheaper than seeking: one key frame interval, about 64 frames."""
        step = (self.stamps[-1] - self.stamps[0]) // max(1, len(self.stamps) - 1)
        return self.current.pts + 64 * max(1, step // self.stride)

    def close(self) -> None:
        """Closes the file; the next access opens it again."""
        if self.container is not None:
            self.container.close()
        self.container = None

    def __getstate__(self) -> dict[str, Any]:
        kept = ("path", "channels", "stride", "stamps", "rate")
        return {name: self.__dict__[name] for name in kept} | {"container": None}


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or " ".join(str(error).split())[:120]).lower()
