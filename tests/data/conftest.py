import pytest
from data.clip_files import write_clip


@pytest.fixture(scope="module")
def clip_bytes(tmp_path_factory):
    """A good avi of 20 frames, to be copied."""
    return write_clip(tmp_path_factory.mktemp("clip") / "a.avi").read_bytes()


@pytest.fixture
def put(tmp_path, clip_bytes):
    """put("data/x.avi", ...): good clips at these places below tmp_path. Returns the root, tmp_path/data."""

    def put(*names):
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(clip_bytes)
        return tmp_path / "data"

    return put


@pytest.fixture
def ucf(put, tmp_path):
    """Three classes, two folds, the lists beside the root; files by number, a class in the order of classInd."""
    root = put(*(f"{c}/v_{c}_g01_c0{i}.avi" for c in ("Apple", "Pear", "Fig") for i in (1, 2)))
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_bytes(b"1 Pear\r\n2 Apple\r\n3 Fig\r\n")
    for fold, (train, test) in {1: (1, 2), 2: (2, 1)}.items():
        rows = [(c, n) for n, c in enumerate(("Pear", "Apple", "Fig"), 1)]
        (lists / f"trainlist0{fold}.txt").write_text("".join(f"{c}/v_{c}_g01_c0{train}.avi {n}\n" for c, n in rows))
        (lists / f"testlist0{fold}.txt").write_text("".join(f"{c}/v_{c}_g01_c0{test}.avi\n" for c, _ in rows))
    return root
