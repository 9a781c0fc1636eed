"""`cmd-jax convert`: files of weights from PyTorch's names and layouts to ours, and back.

What the CMD release holds becomes stages, one file each in a folder that `cmd-jax sample --config.weights=FOLDER`
takes. Other models become files as cmd_jax.interop.converted has them. Either goes back without being told anything
again. Here are the command line and its errors, without JAX; convert_weights.py does what it says.
"""

import json
from pathlib import Path

from cmd_jax.buckets import BucketPath
from cmd_jax.errors import UserError, choose
from cmd_jax.files import as_path, is_remote, read_json
from cmd_jax.interop.folders import TORCH_SUFFIXES
from cmd_jax.verbs.convert_kinds import KINDS, STABLE_DIFFUSION, TAKEN

DTYPES = ("float32", "bfloat16", "float16")
DIRECTIONS = ("cmd-jax", "torch")


def add_flags(parser):
    """The command line of the verb, on an argparse parser."""
    kinds = "; ".join(f"{name}: {what}" for name, what in KINDS.items())
    parser.add_argument("kind", metavar="KIND", help=kinds)
    parser.add_argument(
        "input", metavar="INPUT", help=f"file of PyTorch weights, .safetensors, {', '.join(TORCH_SUFFIXES)}; with"
        " --to=torch a file of ours, or for cmd-* a stage's folder of a workdir; stable-diffusion: a folder, dit: that"
        " of diffusers too",
    )  # fmt: skip
    parser.add_argument(
        "output", metavar="OUTPUT", help="a new .safetensors file; stable-diffusion: a new folder. cmd-content wants"
        " its autoencoder.safetensors in the same folder, cmd-motion also its content.safetensors",
    )  # fmt: skip
    parser.add_argument("--to", metavar="|".join(DIRECTIONS), help="whose names and layout to write (default cmd-jax)")
    parser.add_argument(
        "--architecture", metavar="FILE.json|KEY=VALUE,...", help="what the tensors don't tell: cmd-autoencoder: heads,"
        " mode, frames, image_size; other cmd-* and dit: heads of unusual sizes; i3d: epsilon",
    )  # fmt: skip
    parser.add_argument("--classes", metavar="FILE", help="cmd-content: names of the classes, one a line, in order")
    parser.add_argument(
        "--pretrained", metavar="DIR", help="cmd-autoencoder of mode latent: diffusers folder of its VAE"
    )
    parser.add_argument("--heads", metavar="FILE", help="lpips: its heads, where INPUT is torchvision's VGG16")
    parser.add_argument("--dtype", metavar="|".join(DTYPES), default=DTYPES[0], help="of OUTPUT (default float32)")
    parser.add_argument("--key", metavar="ENTRY", help="of a torch file that holds several (default ema)")
    parser.add_argument(
        "--unet", metavar="STAGE", help=f"{STABLE_DIFFUSION}: workdir/content or its weights, in place of INPUT's UNet"
    )


def convert(flags) -> int:
    """Do what the command line says -> exit code 0. Raises UserError with the flags' names."""
    choose("KIND", flags.kind, KINDS)
    choose("--dtype", flags.dtype, DTYPES)
    target = choose("--to", flags.to or DIRECTIONS[0], DIRECTIONS)
    source, output = as_path(flags.input), as_path(flags.output)
    _check_output(output, folder=flags.kind == STABLE_DIFFUSION)
    _refuse_idle(flags, target)
    from cmd_jax.verbs import convert_weights  # which starts JAX

    try:
        if flags.kind == STABLE_DIFFUSION:
            convert_weights.convert_pipeline(source, output, flags.dtype, flags.unet)
        elif target == "torch":
            convert_weights.to_torch(flags.kind, source, output, flags.dtype)
        else:
            convert_weights.to_ours(flags, given_architecture(flags.architecture), source, output)
    except UserError as error:
        raise on_the_command_line(error, flags) from error
    return 0


def _check_output(output: Path | BucketPath, folder: bool):
    if output.exists() or (not is_remote(output) and output.is_symlink()):
        raise UserError("OUTPUT", output, "exists already", "give the path of a new one")
    if not is_remote(output) and not output.parent.is_dir():
        raise UserError("OUTPUT", output, f"there is no folder {output.parent}", "make it first")
    if not folder and output.suffix != ".safetensors":
        raise UserError("OUTPUT", output, "not the name of a safetensors file", "let it end in .safetensors")
    if folder and output.suffix in (".safetensors", *TORCH_SUFFIXES):
        raise UserError("OUTPUT", output, "the name of a file, but it becomes a folder", "leave its ending out")


def _refuse_idle(flags, target: str):
    """Flags that would change nothing."""
    for flag, kinds in TAKEN.items():
        value = getattr(flags, flag)
        if value is not None and flags.kind not in kinds:
            raise UserError(f"--{flag}", value, f"only for {', '.join(kinds)}", "leave it out")
        if value is not None and target == "torch" and flag != "to":
            raise UserError(f"--{flag}", value, "INPUT says it already", "leave it out")


def given_architecture(text: str | None) -> dict:
    """What --architecture says: a file, or key=value separated by commas."""
    if text is None:
        return {}
    path, remedy = as_path(text), "write it like heads=8,mode=pixel, or give a file with a JSON object"
    if "=" in text and not path.exists():
        pairs = [pair.partition("=") for pair in text.split(",")]
        if any(not key.strip() or not value.strip() for key, _, value in pairs):
            raise UserError("--architecture", text, "not key=value separated by commas", remedy)
        return {key.strip(): _value(value.strip()) for key, _, value in pairs}
    return read_json(path, "--architecture", missing=remedy, remedy=remedy)


def _value(text: str):
    """A number, true, false, null, sides like 64x96, or the text itself."""
    sides = text.split("x")
    if len(sides) == 2 and all(side.isdecimal() for side in sides):
        return [int(side) for side in sides]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def on_the_command_line(error: UserError, flags) -> UserError:
    """The error with the names that the user gave: library code speaks of paths, keys and configs."""
    field, value = error.field, error.value
    flagged = {f"--{name}": getattr(flags, name) for name in ("unet", "pretrained", "heads")}
    places = {"OUTPUT": flags.output, **flagged, "INPUT": flags.input}
    inside = [flag for flag, path in places.items() if path and str(value).startswith(str(as_path(path)))]
    names = {"key": "--key", "config": "--architecture", "classes": "--classes", "i3d": "INPUT", "lpips": "INPUT"}
    if field in ("path", "weights", "pipeline", "workdir", "pretrained.path") and inside:
        field = inside[0]
    elif field == "weights":
        field, value = "INPUT", flags.input
    elif field.startswith("weights/"):
        field = field.replace("weights", "INPUT", 1)
    elif field == "autoencoder":  # whose place is settled by that of the other files
        value = as_path(flags.input if flags.to == "torch" else flags.output).with_name("autoencoder.safetensors")
    elif field == "kind":
        field, value = "KIND", flags.kind
    elif field.startswith("config."):
        field = field.replace("config.", "--architecture: ", 1)
    return UserError(names.get(field, field), value, error.problem, error.remedy)
