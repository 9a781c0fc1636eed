import importlib.util
import json
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "launch" / "measure_attention.py"
spec = importlib.util.spec_from_file_location("measure_attention", SCRIPT)
measure_attention = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measure_attention)


def test_it_measures_each_kernel_and_how_near_it_comes(tmp_path, capsys):
    out = tmp_path / "new" / "attention.jsonl"
    measure_attention.main(["--tiny", "--out", str(out), "--only", "DiT XL;UNet, to"])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    ours = [record for record in records if record["kernel"] != "PyTorch"]
    assert [(r["name"], r["kernel"], r["chosen"]) for r in ours] == [
        ("DiT XL, 1,280 tokens", "plain", False), ("DiT XL, 1,280 tokens", "blocked", True),
        ("UNet, to a text", "plain", True), ("UNet, to a text", "blocked", False),
    ]  # fmt: skip
    assert all(0 < r["forward"] < 1e5 and 0 < r["backward"] < 1e5 for r in records)
    assert all(r["difference"] < 1e-6 and (r["psnr"] is None or r["psnr"] > 120) for r in ours)
    assert capsys.readouterr().out.count("\n| ") == len(records) + 1  # and the title
