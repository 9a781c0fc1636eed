"""Every config key there is, with its default. Config files start from these and set what differs."""

from ml_collections import ConfigDict

CLIP_BY_SPACE = -1.0
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


def data(**changes) -> ConfigDict:
    """Where clips come from, and their shape [frames, height, width, 3]."""
    config = ConfigDict(
        dict(
            source="shapes",  # "shapes" (generated) or "folder"
            frames=16,
            height=64,
            width=64,
            clips=20_000,  # shapes: how many
            seed=0,  # shapes: which
            root="",  # folder: where
            layout="auto",  # folder: "auto", "ucf101", "classes", "metadata" or "webvid"
            fold=1,  # ucf101: split files 1, 2 or 3
            split="train",  # "train" or "test"; folder: "val" and "all" too, as far as it has them
            stride=1,  # folder: take every n-th frame
            max_bad_fraction=0.05,  # folder: more unreadable files than this is an error
            probe_timeout=20.0,  # folder: seconds without a further frame after which a file under test hangs
            probe_cap=3600.0,  # folder: seconds that the test of a file may take; 0: any
            threads=2,  # clips that are read at a time
            prefetch=2,  # batches read ahead
        )
    )
    config.update(changes)
    return config


def _common(stage: str) -> ConfigDict:
    mesh = dict(
        preset="",  # "dp", "fsdp", "tp", "fsdp_tp"; empty: the sizes below
        data=-1,  # -1: whatever fills the devices
        fsdp=1,
        tensor=1,
        slices=1,  # TPU slices, or hosts with a fast network each; the data axis spans them
        report_above=1_000_000,  # name parameters of more values that no axis splits
    )
    processes = dict(
        expected=0,  # so many must have started; 0: any number
        start_timeout=300.0,  # seconds for all of them to connect
        peer_timeout=60.0,  # a process silent for so long is lost, and the job ends
        stall_timeout=1800.0,  # so long without a finished step is a stall, and the job ends; 0: never
    )
    pretrained = dict(
        path="",  # folder of a Stable Diffusion model; empty: frames are pixels, conditions are classes
        dtype="float32",  # of its VAE and text encoder
        vae_frames=1,  # frames of each clip that the VAE takes at once
    )
    return ConfigDict(dict(stage=stage, seed=0, mesh=mesh, processes=processes, rules=RULES, pretrained=pretrained))


def _training(stage: str) -> ConfigDict:
    config = _common(stage)
    config.data = data()
    config.train = ConfigDict(
        dict(
            steps=1000,
            batch_size=256,
            ema_decay=0.999,
            accumulate=1,  # microbatches of one step
            log_every=20,
            checkpoint_every=500,
            keep=2,  # checkpoints
            preview_every=500,  # pictures while training; 0: none
        )
    )
    config.optimizer = ConfigDict(
        dict(learning_rate=1e-4, b1=0.9, b2=0.999, eps=1e-8, warmup_steps=0, decay="constant", clip_norm=0.0)
    )
    config.optimizer.steps = config.train.get_ref("steps")
    return config


def autoencoder() -> ConfigDict:
    """Stage 1 (paper section 3.1, appendix B)."""
    config = _training("autoencoder")
    config.model = ConfigDict(
        dict(
            channels=3,
            patch=2,
            width=384,
            depth=8,
            heads=8,
            head_dim=48,
            motion_channels=8,
            mode="pixel",
            position="rotary",
            rotary_base=10000.0,
            content="weighted",
            remat="none",
            dtype="float32",
        )
    )
    config.loss = ConfigDict(
        dict(
            l1=4.0,
            l2=0.0,
            lpips=4.0,  # where `vgg` is given
            vgg="",  # file of LPIPS on VGG16: of ours, the lpips package's state dict, or torchvision's VGG16
            lpips_heads="",  # with torchvision's: lpips/weights/v0.1/vgg.pth of the package lpips
            adversarial=0.0,
            feature_matching=4.0,  # times `adversarial`
            discriminator_channels=64,
            discriminator_layers=3,
        )
    )
    config.latents = ConfigDict(dict(cache_clips=0))  # VAE latents of that many clips, made once; 0: of every batch
    config.optimizer.update(learning_rate=1e-5, b1=0.5, b2=0.9)
    return config


def _denoiser(stage: str) -> ConfigDict:
    config = _training(stage)
    config.model = ConfigDict(
        dict(
            patch=2,
            width=1024,
            depth=24,
            heads=16,
            condition="class",  # or "text"
            position="sincos",
            label_init=0.02,  # standard deviation of the label table at first
            remat="none",
            dtype="float32",
        )
    )
    config.latents = ConfigDict(
        dict(
            autoencoder="",  # folder or weights file of stage 1; empty: WORKDIR/autoencoder
            normalize=False,  # diffuse latents of zero mean and unit variance
            cache_clips=0,  # encode that many clips once, before training; 0: encode every batch anew
        )
    )
    config.diffusion = ConfigDict(
        dict(
            kind="gaussian",  # or "flow"
            schedule="linear",  # or "scaled_linear"
            timesteps=1000,
            prediction="eps",  # or "v", "x0"
            learned_range=True,
            clip=CLIP_BY_SPACE,  # hold x0 within +-clip while sampling; 0: off; -1: 1 for pixels, off for latents
            time_mean=0.0,  # flow: logit-normal training times
            time_std=1.0,
        )
    )
    config.guidance = ConfigDict(dict(label_dropout=0.1))
    config.optimizer.clip_norm = 1.0
    return config


def content() -> ConfigDict:
    """Stage 2: p(content | class), by a DiT from scratch (paper section 3.2)."""
    return _denoiser("content")


def fine_tuned_content() -> ConfigDict:
    """Stage 2: p(content | text), by the UNet of `pretrained.path`, whose files say what it predicts and how."""
    config = _denoiser("content")
    config.model = ConfigDict(dict(remat="none", dtype="float32"))
    del config.diffusion, config.latents.normalize
    config.optimizer.clip_norm = 0.0
    return config


def fine_tunes(config) -> bool:
    """Whether a config is one of `fine_tuned_content`."""
    return config.stage == "content" and "diffusion" not in config


def motion() -> ConfigDict:
    """Stage 3: p(motion | content, class or text) (paper section 3.2)."""
    config = _denoiser("motion")
    config.model.content_patch = 4
    return config


def sample() -> ConfigDict:
    """Sampling and scoring (paper section 3.3, appendix B)."""
    config = _common("sample")
    config.data = data(split="test", clips=256)
    config.weights = ""  # folder of autoencoder/content/motion.safetensors; empty: the workdir's stages
    config.sampling = ConfigDict(
        dict(
            mode="generate",  # "reconstruct", "vary-motion", "animate"
            num=8,  # videos; with prompts: of each
            batch_size=8,
            classes="",  # names or numbers, separated by commas; empty: all in turn
            prompt="",  # for models conditioned on texts
            prompts_file="",  # many of them: .txt, .csv, .jsonl or MSR-VTT's .json
            negative="",  # what guidance leads away from, instead of the empty text
            guidance=4.0,
            content_steps=50,
            content_solver="",  # ddim, ddpm, dpmpp; for flow euler, heun; empty: the first of them
            motion_steps=100,
            motion_solver="",
            eta=0.0,
            motions=4,  # vary-motion: motions for each content frame
            image="",  # animate: an image file; empty: content frames of clips of `data`
            fps=8,
            output="samples",  # folder of the workdir
            title="",  # of the videos on a page; empty: the mode, or where the weights come from
        )
    )
    config.evaluation = ConfigDict(dict(videos=256, clips=256, shown=24))  # generated, reconstructed, in the gallery
    return config


def stage(name: str) -> ConfigDict:
    """The defaults of a stage, locked: setting an undeclared key raises. "fine_tuned_content" is a content stage."""
    makers = (autoencoder, content, fine_tuned_content, motion, sample)
    return {maker.__name__: maker for maker in makers}[name]().lock()


def like(config) -> ConfigDict:
    """The defaults that a config started from."""
    return stage("fine_tuned_content" if fine_tunes(config) else config.stage)
