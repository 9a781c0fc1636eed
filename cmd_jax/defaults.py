"""Every config key there is, declared once: default, meaning and range. Config files start from `stage(name)`."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from cmd_jax.data.codecs import CODECS
from cmd_jax.declare import Key, changed, choice, fraction, key, path, walk
from cmd_jax.diffusion.flow import Flow
from cmd_jax.diffusion.gaussian import PREDICTIONS, Gaussian
from cmd_jax.diffusion.schedules import BETAS
from cmd_jax.errors import choose
from cmd_jax.interop.sd_known import ARCHITECTURES
from cmd_jax.models import autoencoder, dit
from cmd_jax.models.attention import KERNELS
from cmd_jax.models.layers import REMAT_POLICIES
from cmd_jax.sharding import PRESETS

CLIP_BY_SPACE = -1.0
DTYPES = ("float32", "bfloat16")
SEEDS = 2**32  # jax.random.key takes a seed modulo this
SOLVERS = ("", *Gaussian.solvers, *Flow.solvers)
MODES = ("generate", "reconstruct", "vary-motion", "animate")
# What no clip or model has more of: numbers beyond are slips, and arrays of them would fill the memory.
SIDE, WIDE, DEEP = 2**14, 2**12, 2**10
RULES = (  # logical axis of a parameter or activation -> mesh axes
    ("act_batch", ("data", "fsdp")),
    ("act_time", ()),
    ("act_token", ()),
    ("act_embed", ()),
    ("layers", ()),
    ("embed", ("fsdp",)),
    ("embed_out", ()),
    ("heads", ("tensor",)),
    ("mlp", ("tensor",)),
    ("modulation", ("tensor",)),
    ("norm", ()),
    ("patch", ()),
    ("channels", ()),
    ("motion", ()),
    ("timestep", ()),
    ("classes", ()),
    ("token", ()),
    ("conv_height", ()),
    ("conv_width", ()),
    ("conv_time", ()),
    ("conv_in", ("fsdp",)),
    ("conv_out", ("tensor",)),
)

# Groups of all stages.

MESH = dict(
    preset=choice("", "how the devices are used; empty: as the next three say", ("", *PRESETS)),
    data=key(-1, "devices that split the batch; -1: all that are left", at_least=1, besides=-1),
    fsdp=key(1, "devices that split batch and parameters; -1: all that are left", at_least=1, besides=-1),
    tensor=key(1, "devices that split heads and hidden channels; -1: all that are left", at_least=1, besides=-1),
    slices=key(1, "TPU slices, or hosts with a fast network each; the data axis spans them", at_least=1),
    report_above=key(1_000_000, "name parameters of more values that no axis splits", at_least=0),
)
SAMPLING_MESH = MESH | dict(
    guidance=key(1, "2: one device draws a clip as it is asked, another without the condition", at_least=1, at_most=2)
)
PROCESSES = dict(
    expected=key(0, "so many must have started; 0: any number", at_least=0),
    start_timeout=key(300.0, "seconds for all of them to connect", above=0),
    peer_timeout=key(60.0, "a process silent for so many seconds is lost, and the job ends", above=0),
    stall_timeout=key(1800.0, "seconds without a finished step after which the job ends; 0: never", at_least=0),
)
PRETRAINED = dict(
    path=path("folder of a Stable Diffusion model; empty: frames are pixels, conditions are classes"),
    architecture=choice("", "without a folder: whose shapes to bench and to show", ("", *ARCHITECTURES)),
    dtype=choice("float32", "of its VAE and text encoder", DTYPES),
    vae_frames=key(1, "frames of each clip that the VAE takes at once", at_least=1),
)
DATA = dict(
    source=choice("shapes", "clips are generated, files, or what ingest made", ("shapes", "folder", "dataset")),
    frames=key(16, "frames of a clip", at_least=1, at_most=SIDE),
    height=key(64, "pixels, rows", at_least=1, at_most=SIDE),
    width=key(64, "pixels, columns", at_least=1, at_most=SIDE),
    buckets=key("", "further sizes, HxW,HxW: a clip takes that nearest to its aspect, a batch is of one"),
    clips=key(20_000, "shapes: how many", at_least=1),
    seed=key(0, "shapes: which", at_least=0),
    root=path("folder, dataset: where"),
    layout=choice("auto", "folder: how it is laid out", ("auto", "ucf101", "classes", "metadata", "webvid")),
    fold=key(1, "ucf101: number of the lists of its split", at_least=1),
    split=choice("train", "shapes: train or test; folder, dataset: what it has", ("train", "val", "test", "all")),
    stride=key(1, "folder, dataset: take every n-th frame", at_least=1),
    fps=key(0.0, "frames a second that clips of a folder are brought to; 0: as they are", at_least=0, at_most=240),
    max_bad_fraction=fraction(0.05, "folder, dataset: more unusable clips than this are an error"),
    probe_timeout=key(20.0, "folder, ingest: seconds without a further frame after which a file hangs", above=0),
    probe_cap=key(3600.0, "folder, ingest: seconds that decoding a whole file may take; 0: any", at_least=0),
    threads=key(2, "clips that are read at a time", at_least=1),
    prefetch=key(2, "batches read ahead", at_least=1),
    cache_dir=path("folder of a local disk for copies of a bucket's shards; empty: $CMD_JAX_CACHE or ~/.cache/cmd_jax"),
    cache_gib=key(64.0, "GiB of it that they take, the longest unused going first; 0: any number", at_least=0),
)
INGEST = dict(
    codec=choice("raw", "how a dataset keeps frames: as they are, or each as a picture", CODECS),
    quality=key(95, "of jpeg, whose colours are kept at full size", at_least=1, at_most=100),
    frames=key(512, "most of a record, the middle ones of a longer clip; 0: all", at_least=0),
    shard_clips=key(0, "clips of a shard; 0: 256, or fewer for 64 shards", at_least=0),
    pixels=key(2**25, "of a frame of a file: larger ones are refused", at_least=1, at_most=SIDE**2),
    description=key("", "of the dataset, for those who get it"),
    citation=key("", "what to cite for it"),
)

# Groups of training.

HELD_OUT = dict(
    validation=key(
        0.0, "part of the clips that training does not see; scenes of UCF-101 go whole", at_least=0, below=1
    ),
    validation_seed=key(0, "which ones; the same in all stages", at_least=0),
)

TRAIN = dict(
    steps=key(1000, "updates", at_least=1),
    batch_size=key(256, "clips of one update, all devices together", at_least=1),
    ema_decay=fraction(0.999, "what the averaged parameters keep of themselves at each update"),
    accumulate=key(1, "microbatches of one update", at_least=1),
    log_every=key(20, "updates between lines of the log", at_least=1),
    checkpoint_every=key(500, "updates between checkpoints", at_least=1),
    keep=key(2, "newest checkpoints that stay", at_least=1),
    preview_every=key(500, "updates between pictures; 0: none", at_least=0),
    validate_every=key(0, "updates between measurements of the loss on clips held out; 0: none", at_least=0),
    validation_clips=key(1024, "of these at most so many, up to whole batches", at_least=1),
    profile=key("", "updates, counted from 0, of which a JAX trace is written", span=True),
)
START = dict(
    init=path("a trained stage whose weights to start from, folder or weights file; empty: random ones"),
    init_skip=key("", "parameters of it to leave out, patterns like label/* separated by commas"),
)
OPTIMIZER = dict(
    learning_rate=key(1e-4, "of Adam", above=0),
    b1=key(0.9, "decay of Adam's mean of gradients", at_least=0, below=1),
    b2=key(0.999, "decay of Adam's mean of squared gradients", at_least=0, below=1),
    eps=key(1e-8, "added to the root of the latter", above=0),
    warmup_steps=key(0, "updates until the whole learning rate, below train.steps", at_least=0),
    decay=choice("constant", "of the learning rate after the warm-up, to 0 at the end", ("constant", "cosine")),
    clip_norm=key(0.0, "largest norm of the gradients; 0: any", at_least=0),
    steps=key(1000, "where the decay ends", follows="train.steps"),
)
COMPUTATION = dict(
    remat=choice("none", "the backward pass recomputes: nothing, all, or all but matrix products", REMAT_POLICIES),
    dtype=choice("float32", "of matrix products; norms, softmax and losses are float32", DTYPES),
)
CONDITION = "what samples are drawn for: classes, or texts by the encoder of `pretrained`"
AUTOENCODER_MODEL = dict(
    channels=key(3, "of a frame: 3 of pixels, or those of the VAE's latents", at_least=1, at_most=SIDE),
    patch=key(2, "cells of a frame that make a token, to a side", at_least=1, at_most=WIDE),
    width=key(384, "channels of a token", at_least=1, at_most=SIDE),
    depth=key(8, "blocks of the encoder, and of the decoder", at_least=1, at_most=DEEP),
    heads=key(8, "of attention", at_least=1, at_most=DEEP),
    head_dim=key(48, "channels of a head, a multiple of 4 with rotary positions", at_least=1, at_most=WIDE),
    motion_channels=key(8, "of the motion latent", at_least=1, at_most=SIDE),
    mode=choice("pixel", "what a frame is: pixels, or latents of the VAE of `pretrained`", autoencoder.MODES),
    position=choice("rotary", "how attention knows of positions", autoencoder.POSITIONS),
    rotary_base=key(10000.0, "the wavelengths of rotary positions grow up to 2 pi times it", above=0, at_most=1e12),
    content=choice("weighted", "the content frame: by learned weights, the mean, or the first", autoencoder.CONTENTS),
    **COMPUTATION,
)
LOSS = dict(
    l1=key(4.0, "weight of the absolute error", at_least=0),
    l2=key(0.0, "weight of the squared error", at_least=0),
    lpips=key(4.0, "weight of LPIPS, where `vgg` is given", at_least=0),
    vgg=path("LPIPS on VGG16: a file of ours, the lpips package's state dict, or torchvision's VGG16"),
    lpips_heads=path("with torchvision's: lpips/weights/v0.1/vgg.pth of the package lpips"),
    adversarial=key(0.0, "weight of a discriminator's hinge loss; 0: no discriminator", at_least=0),
    feature_matching=key(4.0, "weight of the difference of its features, times `adversarial`", at_least=0),
    discriminator_channels=key(64, "of its first layer", at_least=1, at_most=WIDE),
    discriminator_layers=key(3, "hidden ones of it", at_least=1, at_most=16),
)
CONTENT_MODEL = dict(
    patch=key(2, "cells of the latent that make a token, to a side", at_least=1, at_most=WIDE),
    width=key(1024, "channels of a token, a multiple of 4 and of heads", at_least=1, at_most=SIDE),
    depth=key(24, "blocks", at_least=1, at_most=DEEP),
    heads=key(16, "of attention", at_least=1, at_most=DEEP),
    condition=choice("class", CONDITION, dit.CONDITIONS),
    position=choice("sincos", "table of positions: computed, or stored with the parameters", dit.POSITIONS),
    label_init=key(0.02, "standard deviation of the label table at first", above=0),
    **COMPUTATION,
)
MOTION_MODEL = CONTENT_MODEL | dict(
    content_patch=key(4, "cells of the content frame that make a token, to a side", at_least=1, at_most=WIDE)
)
STORE = dict(
    starts=key(0, "windows of a clip, from random starts, that are encoded once and kept; 0: every batch anew",
               at_least=0, at_most=WIDE),
    store=path("folder of them; empty: WORKDIR/latents"),
    store_dtype=choice("float32", "of the latents in it", ("float32", "float16")),
    store_seed=key(0, "of the starts of its windows", at_least=0, at_most=SEEDS - 1),
    store_shard=key(512, "windows in a file of it", at_least=1, at_most=2**20),
)  # fmt: skip
LATENTS = dict(autoencoder=path("folder or weights file of stage 1; empty: WORKDIR/autoencoder"), **STORE)
SCALED_LATENTS = LATENTS | dict(normalize=key(False, "diffuse latents of zero mean and unit variance"))
DIFFUSION = dict(
    kind=choice("gaussian", "the process: Gaussian diffusion, or flow matching", ("gaussian", "flow")),
    schedule=choice("linear", "gaussian: how betas grow", BETAS),
    timesteps=key(1000, "gaussian: of the schedule", at_least=1, at_most=10**6),
    prediction=choice("eps", "gaussian: what the network predicts", PREDICTIONS),
    learned_range=key(True, "gaussian: the network says the variance too"),
    clip=key(
        CLIP_BY_SPACE, "hold x0 within +-clip while sampling; 0: off; -1: 1 for pixels, off for latents",
        at_least=0, besides=CLIP_BY_SPACE,
    ),
    time_mean=key(0.0, "flow: mean of the logits of training times"),
    time_std=key(1.0, "flow: their standard deviation", above=0),
)  # fmt: skip
GUIDANCE = dict(label_dropout=fraction(0.1, "of conditions left out in training, for classifier-free guidance"))

# Groups of sampling.

SOLVER = "of {}; empty: ddim, euler for flow, or that of `pretrained`"
SHIFT = "flow: odds of noise at each step of {} times this; above 1 steps are shorter near noise"
REUSE = "evaluations, like 3,4,6 (0: the noisiest), that reuse what is deep in the network; `calibrate` finds them"
QUALITY = "quality"  # the preset that every config has, and that changes nothing
SAMPLING = dict(
    preset=key(QUALITY, "values of keys of this group by name, those of `presets`; quality: as the keys say"),
    presets=key((), "name -> keys and their values; flags win over them"),
    mode=choice("generate", "new videos, reconstructions, new motions of content frames, or those of an image", MODES),
    num=key(8, "videos; with prompts: of each", at_least=1),
    batch_size=key(8, "videos drawn at a time, all devices together", at_least=1),
    classes=key("", "names or numbers, separated by commas; empty: all in turn"),
    prompt=key("", "for models conditioned on texts"),
    prompts_file=path("many prompts: .txt, .csv, .jsonl or MSR-VTT's .json"),
    negative=key("", "what guidance leads away from, instead of the empty text"),
    guidance=key(4.0, "scale of classifier-free guidance; 1: none", at_least=0),
    guidance_from=fraction(0.0, "guide only from this level of noise t/T on, where one evaluation is not two"),
    guidance_to=fraction(1.0, "and up to this one"),
    content_steps=key(50, "of the solver of content frames", at_least=1),
    content_solver=choice("", SOLVER.format("content frames"), SOLVERS),
    content_shift=key(1.0, SHIFT.format("content frames"), above=0),
    content_reuse=key("", REUSE),
    motion_steps=key(100, "of the solver of motion latents", at_least=1),
    motion_solver=choice("", SOLVER.format("motion latents"), SOLVERS),
    motion_shift=key(1.0, SHIFT.format("motion latents"), above=0),
    motion_reuse=key("", REUSE),
    reuse=path("what `cmd-jax calibrate` wrote for this run: the two lists, checked against it"),
    dtype=choice(
        "", "of weights and matrix products, those of `pretrained` too; empty: as they were trained", ("", *DTYPES)
    ),
    executable=path("folder to which compiled programs are written, and from which they are read; trust it as code"),
    eta=fraction(0.0, "ddim: noise that each step adds, as a part of ddpm's"),
    motions=key(4, "vary-motion: motions for each content frame", at_least=1),
    image=path("animate: an image file; empty: content frames of clips of `data`"),
    fps=key(8, "frames a second of the written videos", at_least=1),
    output=key("samples", "folder of the workdir"),
    title=key("", "of the videos on a page; empty: the mode, or where the weights come from"),
)
EVALUATION = dict(
    videos=key(256, "generated", at_least=1),
    clips=key(256, "held out, and reconstructed", at_least=1),
    shown=key(24, "videos in the gallery", at_least=1),
)


def presets(**named: dict) -> tuple:
    """{name: {key of `sampling`: value}} as a config holds it."""
    return tuple((name, tuple(values.items())) for name, values in named.items())


def _stage(name: str, **groups: Key | dict[str, Key]) -> dict:
    common = dict(
        stage=choice(name, "what is trained, or sample; the config file sets it", (name,)),
        seed=key(0, "of all that is random", at_least=0, at_most=SEEDS - 1),
        rules=key(RULES, "logical axes of parameters and activations -> mesh axes"),
        attention=choice("auto", "its kernel; auto: by device, tokens, dtype and width of heads", KERNELS),
    )
    groups = dict(data=DATA | HELD_OUT, ingest=INGEST, mesh=MESH, processes=PROCESSES, pretrained=PRETRAINED) | groups
    return common | groups


def _denoiser(default: str, choices=("dit",)) -> Key:
    return choice(default, "the network: a DiT, or the UNet of `pretrained`; the config file sets it", choices)


DECLARED = {  # stage -> {denoiser, of those that have one: declarations}
    "autoencoder": {  # paper section 3.1, appendix B
        "": _stage(
            "autoencoder",
            **START,
            train=TRAIN,
            optimizer=changed(OPTIMIZER, learning_rate=1e-5, b1=0.5, b2=0.9),
            model=AUTOENCODER_MODEL,
            loss=LOSS,
            latents=STORE,
        )
    },
    "content": {  # section 3.2: a DiT from scratch, or a pretrained UNet, whose files say what it predicts and how
        "dit": _stage(
            "content",
            **START,
            train=TRAIN,
            optimizer=changed(OPTIMIZER, clip_norm=1.0),
            denoiser=_denoiser("dit", ("dit", "unet")),
            model=CONTENT_MODEL,
            latents=SCALED_LATENTS,
            diffusion=DIFFUSION,
            guidance=GUIDANCE,
        ),
        "unet": _stage(
            "content",
            **START,
            train=TRAIN,
            optimizer=OPTIMIZER,
            denoiser=_denoiser("unet", ("dit", "unet")),
            model=dict(condition=choice("text", CONDITION, ("text",)), **COMPUTATION),
            latents=LATENTS,
            guidance=GUIDANCE,
        ),
    },
    "motion": {  # section 3.2
        "dit": _stage(
            "motion",
            **START,
            train=TRAIN,
            optimizer=changed(OPTIMIZER, clip_norm=1.0),
            denoiser=_denoiser("dit"),
            model=MOTION_MODEL,
            latents=SCALED_LATENTS,
            diffusion=DIFFUSION,
            guidance=GUIDANCE,
        )
    },
    "sample": {  # section 3.3, appendix B
        "": _stage(
            "sample",
            mesh=SAMPLING_MESH,
            data=changed(DATA, split="test", clips=256),
            weights=path("folder of autoencoder/content/motion.safetensors; empty: the workdir's stages"),
            sampling=SAMPLING,
            evaluation=EVALUATION,
        )
    },
}


def declared(stage: str, denoiser: str | None = None) -> dict:
    """All that a config of a stage has: {name: Key, group: {name: Key}}. The arguments are those of `stage`."""
    kinds = DECLARED[choose("stage", stage, DECLARED)]
    return kinds[next(iter(kinds)) if denoiser is None else choose("denoiser", denoiser, kinds)]


def stage(name: str, denoiser: str | None = None) -> ConfigDict:
    """The defaults of a stage, locked: setting an undeclared key raises.

    name: autoencoder, content, motion or sample. denoiser: of the content stage, "dit" (the default) or "unet".
    """
    declarations = declared(name, denoiser)
    config = ConfigDict(_defaults(declarations))
    for dotted, declaration in walk(declarations):
        if declaration.follows:
            (group, _, name), (leading, _, led) = dotted.partition("."), declaration.follows.partition(".")
            config[group][name] = config[leading].get_ref(led)
    return config.lock()


def of(config: ConfigDict) -> dict:
    """What the stage of a config declares."""
    return declared(config.stage, config.get("denoiser"))


def _defaults(declarations: dict) -> dict:
    return {name: _defaults(x) if isinstance(x, dict) else x.default for name, x in declarations.items()}


def table(stage: str, denoiser: str | None = None) -> Iterator[tuple[str, str, str, str]]:
    """(key, default, range, meaning) of every key of a stage, for people. The arguments are those of `stage`."""
    for dotted, x in walk(declared(stage, denoiser)):
        yield dotted, "" if isinstance(x.default, tuple) else str(x.default), x.range, x.meaning
