"""The `cmd-jax` command: verb, distributed start, one-line errors and the end of the process; nothing else."""

import json
import logging
import os
import sys
import traceback
from importlib import import_module

from cmd_jax.errors import Stopped, UserError, exit_code, of_file, tell, with_remedy
from cmd_jax.files import as_path
from cmd_jax.running.runtime import check_devices, keep_freed_memory
from cmd_jax.verbs.flags import parse


def run(flags, overrides: dict[str, str]) -> int:
    """Do what the verb says -> exit code. Modules are imported here, since they start JAX."""
    verb = flags.verb
    if verb in ("convert", "doctor"):
        check_devices()
    if verb == "convert":
        from cmd_jax.verbs.convert import convert

        return convert(flags)
    if verb == "ingest" and not flags.encode:
        from cmd_jax.verbs.ingest import ingest

        return ingest(flags, overrides)
    workdir = as_path(flags.workdir).absolute() if flags.workdir else None
    if verb == "doctor":
        from cmd_jax.verbs.doctor import doctor
        from cmd_jax.verbs.doctor_data import doctor_data

        return (doctor_data if flags.data else doctor)(flags.config, overrides, workdir)
    if verb == "verify-resume":
        from cmd_jax.verbs.verify_resume import verify_resume

        return verify_resume(flags.config, overrides, workdir, flags.kills, device_counts(flags.devices))
    from cmd_jax.config import load, to_json
    from cmd_jax.running import distributed

    name, more, shapes_only = verb, {}, False
    if verb == "ingest":
        from cmd_jax.verbs.ingest import encode_overrides

        name, more, overrides = "encode", {"listed": bool(flags.source)}, encode_overrides(flags, overrides)
    elif verb == "bench":
        from cmd_jax.bench.options import Options

        more = {"specification": flags.config, "overrides": overrides, "options": Options.of(flags)}
        shapes_only = True
    elif verb == "calibrate":
        more = {"speedup": flags.speedup, "out": flags.out}
    config = load(flags.config, overrides, shapes_only)
    check_stage(flags.measured if verb == "bench" else verb, config.stage)
    cluster = flags.distributed, flags.coordinator, flags.num_processes, flags.process_id
    distributed.start(*cluster, config.processes, end_process)
    from cmd_jax.files import versions

    remedy = "start every process with the same command and the same installation"
    distributed.agree({f"versions.{name}": version for name, version in versions().items()}, remedy)
    distributed.agree({"verb": verb, "workdir": str(workdir), **flat(to_json(config))}, remedy)
    done = getattr(import_module(f"cmd_jax.verbs.{name}"), name)(config, workdir, end_process, **more)
    return done if verb == "bench" else 0


def flat(text: str) -> dict[str, str]:
    """A config's JSON as {"group.key": "value"}."""
    from flax.traverse_util import flatten_dict

    return {key: str(value) for key, value in flatten_dict(json.loads(text), sep=".").items()}


def device_counts(text: str | None) -> tuple[int, ...]:
    words = text.split(",") if text else ()
    for word in words:
        if not word.strip().isdigit() or int(word) == 0:
            raise UserError("--devices", text, "not device counts separated by commas", "write it like 8,4,8")
    return tuple(map(int, words))


def check_stage(verb: str, stage: str):
    training = verb in ("train", "ingest", "data")
    if training == (stage == "sample"):
        wanted = "autoencoder, content or motion" if training else "sample"
        raise UserError("config", stage, f"`{verb}` takes another stage", f"use FILE:{wanted}")


def fail(error: UserError, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    tell(with_remedy(error))
    return exit_code(error)


def main(arguments: list[str] | None = None) -> int:
    try:
        code = command(arguments)
    except Exception:
        if one_of_several():
            leave(1, traceback.format_exc())
        raise
    if code and one_of_several():
        leave(code)
    return code


def one_of_several() -> bool:
    """Whether peers would be kept waiting; asked without starting JAX."""
    return "cmd_jax.running.distributed" in sys.modules and sys.modules["cmd_jax.running.distributed"].several()


def leave(code: int, last_words: str = ""):
    """End this process of several at once: an orderly end would wait for peers that may be gone."""
    if last_words:
        tell(last_words.rstrip("\n"))
    sys.modules["cmd_jax.running.distributed"].linger()
    end_process(code)


def end_process(code: int, last_words: str = ""):
    """At once, from any thread, whatever the others are stuck in."""
    if last_words:
        tell(last_words)
    os._exit(code)


def command(arguments: list[str] | None) -> int:
    keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("cmd_jax").setLevel(logging.INFO)
    debug = "--debug" in (sys.argv if arguments is None else arguments)
    try:
        flags, overrides = parse(sys.argv[1:] if arguments is None else arguments)
        return run(flags, overrides)
    except UserError as error:
        return fail(error, debug)
    except Stopped:
        return 0
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return fail(of_file(error), debug)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):  # XLA's name for it
            raise
        remedy = "lower train.batch_size or sampling.batch_size, set model.remat=full, or raise mesh.fsdp"
        return fail(UserError("memory", "full", " ".join(str(error).split())[:200], remedy), debug)


if __name__ == "__main__":
    sys.exit(main())
