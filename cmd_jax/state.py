"""What training carries from step to step, its sharded initialisation and the pure update."""

from functools import partial

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from cmd_jax.keys import derive
from cmd_jax.sharding import abstract, replicated


@flax.struct.dataclass
class TrainState:
    """step: updates done, int32 []. params, ema: trees of float32 arrays. opt_state: optax's."""

    step: jax.Array
    params: dict
    ema: dict
    opt_state: optax.OptState


def learning_rate(config, update):
    """Of update 0, 1, ...: it rises to learning_rate in `warmup_steps` equal steps, of which the first is no zero, and
    from there with decay "cosine" falls to zero at update `steps`."""
    warmup = config.warmup_steps
    rate = config.learning_rate * jnp.minimum((update + 1) / max(warmup, 1), 1.0)
    if config.decay == "cosine":
        past = jnp.clip((update - warmup) / (config.steps - warmup), 0.0, 1.0)
        rate *= 0.5 * (1.0 + jnp.cos(jnp.pi * past))
    return rate


def make_optimizer(config) -> optax.GradientTransformation:
    """Adam with warm-up, optional cosine decay to zero at `steps`, and optional clipping by global norm."""
    adam = optax.adam(partial(learning_rate, config), b1=config.b1, b2=config.b2, eps=config.eps)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam) if config.clip_norm else adam


def _boxed(stage, optimizer, key) -> TrainState:
    """A fresh state of random parameters, with their logical axes."""
    params = stage.init(key)
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def abstract_state(stage, optimizer, mesh, rules) -> TrainState:
    """What `init_state` would make, as ShapeDtypeStructs laid out on the mesh."""
    return abstract(partial(_boxed, stage, optimizer), mesh, rules)


def overlay(params: dict, given: dict) -> dict:
    """A tree of parameters with those of another one, which has a part of its names, in their place."""
    inner = {name: overlay(x, given[name]) for name, x in params.items() if isinstance(x, dict) and name in given}
    return params | given | inner


def init_state(stage, optimizer, seed: int, mesh, rules, given=None) -> TrainState:
    """A fresh state, born sharded: no device ever holds more than its part of a split parameter.

    given: parameters to start from, or a part of them, laid out by the rules; all others are random.
    """

    def make(key, given):
        state = nn.unbox(_boxed(stage, optimizer, key))
        if given is None:
            return state
        params = overlay(state.params, given)
        return state.replace(params=params, ema=jax.tree.map(jnp.copy, params))

    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(stage, optimizer, mesh, rules))
    key = derive(jax.random.key(seed), "parameters")
    return jax.jit(make, out_shardings=shardings)(key, given)


def _split(batch, count: int, index):
    """Microbatch `index` of `count`: every count-th clip, so that the sharded batch axis stays outermost."""

    def one(x):
        return jax.lax.dynamic_index_in_dim(
            x.reshape(x.shape[0] // count, count, *x.shape[1:]), index, 1, keepdims=False
        )

    return jax.tree.map(one, batch)


def train_step(state: TrainState, frozen, batch, step, key, *, loss_fn, optimizer, ema_decay, accumulate=1):
    """One optimiser update; pure, so a resumed run repeats it bit for bit.

    loss_fn(params, frozen, batch, key) -> (loss, metrics); the key of a step is derived from `key`, that of the run.
    `step` is the step this batch is meant for. If loss or gradient is not finite, or an earlier step was refused, the
    state comes back unchanged and metrics["applied"] is 0.
    """
    key = derive(key, "step", state.step)
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate == 1:
        (loss, metrics), grads = gradient(state.params, frozen, batch, key)
    else:

        def microstep(total, i):
            return jax.tree.map(jnp.add, total, one(i)), None

        def one(i):
            return gradient(state.params, frozen, _split(batch, accumulate, i), derive(key, "microbatch", i))

        total, _ = jax.lax.scan(microstep, one(0), jnp.arange(1, accumulate))
        (loss, metrics), grads = jax.tree.map(lambda x: x / accumulate, total)

    norm = optax.tree.norm(grads)
    applied = jnp.isfinite(loss) & jnp.isfinite(norm) & (step == state.step)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update(params, state.ema, 1.0 - ema_decay)
    new = TrainState(state.step + 1, params, ema, opt_state)
    state = jax.tree.map(partial(jnp.where, applied), new, state)
    return state, {"loss": loss, "gradient_norm": norm, "applied": applied, **metrics}


def measure(params, frozen, batch, key, *, loss_fn, accumulate=1) -> dict:
    """{"loss", metrics...} of a batch, without an update; in as many microbatches as a training step takes."""

    def one(i):
        loss, metrics = loss_fn(params, frozen, _split(batch, accumulate, i), derive(key, "microbatch", i))
        return {"loss": loss, **metrics}

    return jax.tree.map(partial(jnp.mean, axis=0), jax.lax.map(one, jnp.arange(accumulate)))


def make_step(stage, optimizer, options, mesh, state: TrainState):
    """The jitted program of a training step: (state, frozen, batch, step, key, asked) -> (state, metrics).

    As `train_step`, with the state donated. asked int32 [devices], split over the mesh: 1 where a process was asked to
    stop; metrics["stop"] says to all whether any was. options: the config's `train` group. Of `state` only the
    shardings are read: shapes will do, for this and for the program's `lower`.
    """
    update = partial(
        train_step, loss_fn=stage.loss, optimizer=optimizer,
        ema_decay=options.ema_decay, accumulate=options.accumulate,
    )  # fmt: skip

    def step(state, frozen, batch, index, key, asked):
        state, metrics = update(state, frozen, batch, index, key)
        return state, metrics | {"stop": jnp.max(asked)}

    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
