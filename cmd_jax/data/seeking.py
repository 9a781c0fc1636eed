"""Where in a video file decoding may begin, found out by trying, since no container can be trusted to seek exactly.

While a file is decoded once from its first frame, key frames at least APART frames apart are noted with digests of the
frames after them. Then the file is opened anew for each and decoded from there; it is kept if the same frames come out.
Time stamps that change after a seek, seeks that end elsewhere, and pictures that need one from before their key frame
(open groups of pictures, gradual refresh) show as other frames.
"""

import itertools
import zlib
from collections.abc import Callable

import av
from av.video.reformatter import VideoReformatter

from cmd_jax.data import video

APART = 48
COMPARED = 16  # frames; a picture refers to at most 16 others


class Candidates:
    """Notes packets and frames, in their order, of a file that is being decoded; see the module."""

    def __init__(self):
        self._targets: dict[int, int] = {}  # time stamp of a key packet -> when it is to be decoded
        self._reformatter = VideoReformatter()
        self._seen: list[tuple[int, int, list[int]]] = []  # index, time stamp, digests

    def see_packet(self, packet: av.Packet):
        if packet.is_keyframe and packet.pts is not None and packet.dts is not None:
            self._targets[packet.pts] = packet.dts

    def see_frame(self, index: int, frame: av.VideoFrame):
        last = self._seen[-1] if self._seen else (0, 0, [])
        if self._seen and index < last[0] + COMPARED:
            last[2].append(self._digest(frame))
            if index == last[0] + COMPARED - 1 and _repeats(last[2]):
                self._seen.pop()
        elif frame.key_frame and frame.pts is not None and index >= last[0] + APART:
            self._seen.append((index, frame.pts, [self._digest(frame)]))

    def tried(self, path: str, progress: Callable[[], None]) -> list[video.KeyFrame]:
        """The key frames at which decoding may begin, in order; `progress` is called as frames are compared."""
        kept, ways = [], (lambda pts: pts, self._targets.get)
        for index, pts, digests in self._seen:
            if _repeats(digests):
                continue
            for way in ways:  # MPEG's streams seek by the time of decoding, most other containers by that of showing
                key_frame = video.KeyFrame(index, pts, way(pts))
                if key_frame.target is not None and self._leads(path, key_frame, digests, progress):
                    kept.append(key_frame)
                    ways = (way,)
                    break
        return kept

    def _leads(self, path: str, key_frame: video.KeyFrame, digests: list[int], progress: Callable[[], None]) -> bool:
        """Whether the frames from the key frame on are those of the digests; if these end early, all there are."""
        with video.open_video(path) as (container, stream):
            frames = itertools.islice(video.decode_from(container, stream, key_frame), COMPARED)
            for expected, found in itertools.zip_longest(digests, frames):
                progress()
                if expected is None or found is None or self._digest(found[1]) != expected:
                    return False
        return True

    def _digest(self, frame: av.VideoFrame) -> int:
        return zlib.crc32(video.to_rgb(frame, self._reformatter))


def _repeats(digests: list[int]) -> bool:
    """Whether the frames are so alike that one could be taken for another: a still, or a loop."""
    return any(digests[shift:] == digests[:-shift] for shift in range(1, len(digests) // 2 + 1))
