# Sourced by the launch scripts: settings that must be there before Python starts.
# glibc gives big buffers back to the kernel after every op unless told otherwise; the page faults then cost more than
# the maths. cmd_jax.running.runtime does what it can of this where no launch script did.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=100000000000:glibc.malloc.arena_max=1}"
# TensorFlow only writes TensorBoard events here; it need not tell how it computes.
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}" TF_ENABLE_ONEDNN_OPTS="${TF_ENABLE_ONEDNN_OPTS:-0}"
