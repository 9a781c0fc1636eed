"""Results as a table for people."""

from rich.table import Table

COLUMNS = ("component", "batch", "p50 s", "p95 s", "clips/s", "compile s", "warm", "T MACs", "TFLOP", "TFLOP/s", "MFU",
           "program GiB", "dtype")  # fmt: skip


def number(value, digits: int = 3) -> str:
    """Three significant digits, never in exponent notation; "" for None."""
    if value is None:
        return ""
    whole = f"{float(f'{value:.{digits}g}'):.6f}".rstrip("0").rstrip(".")
    return whole or "0"


def table(records: list[dict]) -> Table:
    shown = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        shown.add_column(name, justify="left" if name in ("component", "dtype") else "right", no_wrap=True)
    for r in records:
        tera = [r.get(name) and r[name] / 1e12 for name in ("layers_macs", "operations")]
        names = "p50_seconds", "p95_seconds", "clips_per_second", "cold_compile_seconds", "warm_compile_seconds"
        values = *map(r.get, names), *tera, r.get("tflops_per_device")
        share = "" if r.get("mfu") is None else f"{100 * r['mfu']:.1f} %"
        words = *map(number, values), share, number(r.get("program_gib"))
        shown.add_row(r["component"], str(r["batch"]), *words, r["dtype"])
    return shown
