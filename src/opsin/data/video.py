"""A video file as frames, through PyAV.

Opening reads the packets' time stamps only. A frame is decoded when asked for: the next one goes on from where the
decoder stands, any other seeks to the key frame before it.
"""

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
    """

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
        wanted = self.stamps[range(len(self))[index]]
        try:
            frame = self._decode(wanted)
        except (av.FFmpegError, OSError) as error:
            self.close()
            raise BadInput(f"frame {index} of the video {self.path} cannot be read: {_reason(error)}") from error
        image = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1).float() / 255
        return (luma(image) if self.channels == 1 else image), 0

    def _decode(self, wanted: int) -> Any:
        """The frame shown at the time stamp: the last one that is not later."""
        if self.container is None:
            self.container, self.current, self.following = av.open(str(self.path)), None, None
            self.container.streams.video[0].thread_type = "AUTO"
            self.decoder = self.container.decode(video=0)
        if self.current is None or wanted < self.current.pts or wanted > self._horizon():
            self.container.seek(wanted, stream=self.container.streams.video[0])
            self.decoder = self.container.decode(video=0)
            self.current, self.following = next(self.decoder), None
        while self.current.pts < wanted:
            upcoming = self.following or next(self.decoder, None)
            if upcoming is None or upcoming.pts > wanted:
                self.following = upcoming
                break
            self.current, self.following = upcoming, None
        return self.current

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
