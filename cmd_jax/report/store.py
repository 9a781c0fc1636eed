"""What `cmd-jax ingest --encode` tells in the end: what went into a store of latents, and what did not."""

from rich.console import Console

from cmd_jax.data.store import LatentStore
from cmd_jax.files import write_json
from cmd_jax.report.gallery import Section, write_gallery
from cmd_jax.report.ingest import quarantine_section


def summary_of(store: LatentStore, bad: dict[str, str]) -> dict:
    """What went in and what did not, as JSON. bad: what the listing already found unusable: name -> reason."""
    facts = store.all_facts()
    return {
        "clips": store.plan["clips"],
        "windows": sum(fact["records"] for fact in facts),
        "windows_left_out": sum(len(fact["left_out"]) for fact in facts),
        "held_out": store.plan["held_out"],
        "shards": len(facts),
        "bytes": sum(fact["bytes"] for fact in facts),
        "quarantined": dict(sorted((bad | {name: why for fact in facts for name, why in fact["bad"].items()}).items())),
        "made_of": store.plan["made_of"],
        "made_with": store.plan["made_with"],
    }


def report(store: LatentStore, bad: dict[str, str], console: Console) -> dict:
    """Print it, and write ingest.json and ingest.html beside the store's version -> the summary."""
    summary, folder = summary_of(store, bad), store.shards.folder.parent
    write_json(folder / "ingest.json", summary)
    numbers = [(name.replace("_", " "), x) for name, x in summary.items() if isinstance(x, int)]
    sections = [
        Section("Numbers", (), table=[("", ""), *numbers]),
        Section("Made of", (), table=[("", ""), *((name, str(x)) for name, x in summary["made_of"].items())]),
    ]
    if summary["quarantined"]:
        sections.append(quarantine_section(summary["quarantined"]))
    write_gallery(folder / "ingest.html", f"Latents: {store.shards.name}", sections, note=str(store.shards.folder))
    console.print(
        f"{summary['windows']:,} windows of {summary['clips']:,} clips, {summary['bytes'] / 2**20:,.1f} MiB, "
        f"{len(summary['quarantined']):,} files left out: {folder / 'ingest.html'}"
    )
    return summary
