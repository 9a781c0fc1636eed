"""The loss on clips that training does not see."""

from functools import partial

import jax
import numpy as np

from cmd_jax.data.pipeline import FixedPlan, batches
from cmd_jax.keys import derive
from cmd_jax.prepare import Prepared
from cmd_jax.sharding import replicated
from cmd_jax.state import measure


class Validation:
    """A stage's loss on the clips held out: by any parameters, on the same windows, timesteps and noise each time.

    program: the run's; of it stage, frozen, key and mesh count.
    """

    def __init__(self, program, prepared: Prepared, config):
        self.program, self.prepared, self.data = program, prepared, config.data
        held_out = prepared.split.validation
        count = min(config.train.validation_clips, len(held_out))
        spread = np.linspace(0, len(held_out), count, endpoint=False).astype(int)
        self.indices = held_out[spread]
        buckets = prepared.buckets_of(self.indices)
        self.plan = FixedPlan(self.indices, config.train.batch_size, config.seed, buckets)
        loss = partial(measure, loss_fn=program.stage.loss, accumulate=config.train.accumulate)
        self._measure = jax.jit(loss, out_shardings=replicated(program.mesh))

    def __call__(self, params) -> dict[str, float]:
        """{"loss", metrics...}, means over all batches; every process must call it."""
        self.prepared.fill(self.indices)
        data = batches(
            self.prepared.read, self.plan, self.program.mesh, start=0, stop=self.plan.batches,
            threads=self.data.threads, prefetch=self.data.prefetch, shelf=self.prepared.shelf,
        )  # fmt: skip
        values = []
        for number, batch in enumerate(data):
            key = derive(self.program.key, "validation", number)
            values.append(self._measure(params, self.program.frozen, batch, key))
            # One batch ahead of the devices, where all of them would else gather.
            values[-2:-1] = jax.device_get(values[-2:-1])
        values = jax.device_get(values)
        return {name: float(np.mean([x[name] for x in values])) for name in values[0]}
