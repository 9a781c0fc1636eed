"""What `cmd-jax convert` can convert, the flags that are for each, and the tensors that tell of it."""

STABLE_DIFFUSION = "stable-diffusion"
KINDS = {
    "cmd-autoencoder": "the CMD release's autoencoder",
    "cmd-content": "its content DiT",
    "cmd-motion": "its motion DiT",
    "dit": "facebook's DiT, or diffusers' folder of it",
    "i3d": "I3D-400, for FVD",
    "lpips": "LPIPS on VGG16, of the lpips package or torchvision",
    STABLE_DIFFUSION: "a diffusers folder, to another one",
}
FILES = tuple(KINDS)[:-1]  # kinds that are a file each
TAKEN = {  # flag -> the kinds that it is for
    "to": FILES,
    "key": FILES,
    "architecture": tuple(kind for kind in FILES if kind != "lpips"),
    "classes": ("cmd-content",),
    "pretrained": ("cmd-autoencoder",),
    "heads": ("lpips",),
    "unet": (STABLE_DIFFUSION,),
}
STAGES = {"cmd-autoencoder": "autoencoder", "cmd-content": "content", "cmd-motion": "motion"}
# Tensors that tell of a model; a motion DiT has that of the other DiTs too.
MARKERS = {
    "keyframe_embedder.proj.weight": ("cmd-motion",),
    "x_embedder.proj.weight": ("cmd-content", "dit"),
    "pos_embed.proj.weight": ("dit",),  # in diffusers' names
    "to_patch_embedding_xy.weight": ("cmd-autoencoder",),
    "Conv3d_1a_7x7.conv3d.weight": ("i3d",),
    "lin0.model.1.weight": ("lpips",),
    "features.0.weight": ("lpips",),  # torchvision's VGG16
    "net.slice1.0.weight": ("lpips",),
    "down_blocks.0.resnets.0.conv1.weight": (STABLE_DIFFUSION,),
    "encoder.down_blocks.0.resnets.0.conv1.weight": (STABLE_DIFFUSION,),
    "text_model.embeddings.token_embedding.weight": (STABLE_DIFFUSION,),
}
