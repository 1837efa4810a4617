"""The settings of the method and of training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from clora.config.fields import Count, Few, FrozenModel, NotNegative, Positive, PositiveFloat, Rate, Share


class ObjectiveWeights(FrozenModel):
    """Weight of each part of the student's loss."""

    backward_simulation: NotNegative = 1.0
    target_simulation: NotNegative = 1.0
    trajectory_anchoring: NotNegative = 1.0


class ObjectiveConfig(FrozenModel):
    """The method; every component can be switched off on its own (docs/method.md sections 4 and 5).

    Attributes:
        dual_stream: train on general instructions too, with the base as teacher.
        switch_probability: probability of each row to be of the effect stream.
        switch_every: updates between two draws of the stream.
        orthogonal_prompting: student and critic see the student's prompts; off, they see the teacher's.
        backward_simulation: distribution matching on the student's own samples.
        target_simulation: distribution matching from noised targets.
        trajectory_anchoring: flow matching on the targets.
        weights: weight of each of the three.
        weighting: of the three in a batch of both streams. ``per_term``: each is the mean over its own rows, so that
            target simulation and anchoring weigh as if all rows were effect rows. ``per_sample``: each is divided by all
            rows of the batch, so that each sample has the sum of its own terms, as in the released code.
        anchor_noise: noise levels of trajectory anchoring.
        norm_rescale: rescale guided predictions of the teachers that score to the norm of the conditional one.
    """

    dual_stream: bool = True
    switch_probability: Share = 0.5
    switch_every: Positive = 1
    orthogonal_prompting: bool = True
    backward_simulation: bool = True
    target_simulation: bool = True
    trajectory_anchoring: bool = True
    weights: ObjectiveWeights = ObjectiveWeights()
    weighting: Literal["per_term", "per_sample"] = "per_term"
    anchor_noise: Literal["unrestricted", "released"] = "unrestricted"
    norm_rescale: bool = False

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        # The three parts have the same names as switches and as weights.
        parts = tuple(ObjectiveWeights.model_fields)
        if not any(getattr(self, part) and getattr(self.weights, part) > 0 for part in parts):
            raise ValueError(f"nothing left to train on: switch on (weight above 0) one of {', '.join(parts)}")
        return self


class TrainConfig(FrozenModel):
    """Training.

    Attributes:
        updates: updates of the student.
        anchor_share: share of the run, at its beginning, with trajectory anchoring only; 0 where that is off.
        anchor_learning_rate: of the student in that share; by default learning_rate.
        critic_ratio: critic updates per student update.
        batch_size: samples per update.
        optimizer: of the student; the critic's is AdamW.
        optimizer_bits: of AdamW's states; 8, by bitsandbytes, takes a quarter of their memory.
        learning_rate: of the student.
        critic_learning_rate: of the critic.
        schedule: of both rates: ``constant``, or they fall to a fiftieth, linearly or by a cosine, over each of the two
            phases, anchoring and what follows.
        warmup_updates: first updates of the run, over which both rates rise linearly from 0.
        weight_decay: of both optimizers, as AdamW decouples it.
        ema_decay: of a moving average of the student's factors; None for no average.
        export: ``student`` or ``ema``, its average, goes into the collection; by default the average if there is one.
        clip: largest norm of a gradient.
        gradient_rows: most rows whose gradient is prepared at once, to bound memory; an update adds up as many passes as
            it needs. A sample is up to three rows of the student's and one of the critic's. Below two rows for each
            sample, the student predicts once more for its critic. ``auto``: as many as fill the products and fit the free
            memory (`clora.training.memory`), chosen once for a run. None for no bound.
        forward_rows: most rows of one pass without gradients, likewise: scoring, and rendering of targets. None for twice
            the rows of a pass with gradients in scoring, and for 32 to 48 in rendering.
            Both change the result in its last digits, since other batches round differently.
        teacher_memory_gb: most memory of the device (10^9 bytes) for the teachers. The others wait in the host's memory
            and are copied when they are needed, ahead of time where possible. None keeps all on the device.
        gradient_checkpointing: keep only the inputs of the transformer's blocks and compute the rest again for the
            gradient: much less memory, about a third more time in the passes that learn.
        compile: compile the transformer's blocks by torch.compile, which takes minutes at the start of a run, and again
            where a run first meets other kinds of batches. It changes the result in its last digits. In compiled blocks
            nothing is merged: on a CPU it does not pay. Not measured on a GPU yet.
        cuda_graphs: run the blocks by CUDA graphs in passes without gradients, simulation and scoring: fewer calls of the
            host, which count at small pictures and batches. Only on NVIDIA GPUs, with all teachers and weights on the GPU.
            It changes the result in its last digits; nothing is merged. Not measured yet.
        checkpoint_every: updates between two checkpoints.
        preview_every: updates between two previews, what the student makes of fixed pictures; ``auto`` draws them as often as
            takes 2 % of the time, 0 never.
        tracker: where the numbers of a run go besides its report: a tracker that accelerate knows (``tensorboard``, ``wandb``,
            ``trackio``, ``mlflow``, ...), which takes its key from its own environment; ``auto`` is TensorBoard where that is
            installed, None is none.
        keep_checkpoints: number of the newest checkpoints that are kept; if one is damaged, the one before is continued.
        minutes: end the training, and write the collection, after this time; None for no limit.
        stop_after: stop the run, with a checkpoint and the exit code 75, after this number of minutes since its start, to be
            continued by the same command; None for no limit.
    """

    updates: Positive
    anchor_share: Share = 0.0
    anchor_learning_rate: Rate | None = None
    critic_ratio: Positive = 5
    batch_size: Few = 8
    optimizer: Literal["adamw", "muon"] = "adamw"
    optimizer_bits: Literal[32, 8] = 32
    learning_rate: Rate = 1e-4
    critic_learning_rate: Rate = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_updates: Count = 0
    weight_decay: NotNegative = 0.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    export: Literal["student", "ema"] = Field(default_factory=lambda data: "ema" if data["ema_decay"] else "student")
    clip: PositiveFloat = 10.0
    gradient_rows: Positive | Literal["auto"] | None = "auto"
    forward_rows: Positive | None = None
    teacher_memory_gb: PositiveFloat | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    checkpoint_every: Positive = 500
    preview_every: Count | Literal["auto"] = "auto"
    tracker: str | None = "auto"
    keep_checkpoints: Positive = 2
    minutes: PositiveFloat | None = None
    stop_after: PositiveFloat | None = None

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.compile and self.cuda_graphs:
            raise ValueError("compile and cuda_graphs: expected at most one of them, found both; switch one off")
        if self.export == "ema" and self.ema_decay is None:
            raise ValueError("export: ema needs ema_decay, such as 0.999")
        if self.warmup_updates >= self.updates:
            raise ValueError(
                f"warmup_updates: expected fewer than updates, {self.updates}, found {self.warmup_updates}"
            )
        # A step of AdamW multiplies the weights by 1 - rate * decay.
        rate = max(self.learning_rate, self.anchor_learning_rate or 0.0, self.critic_learning_rate)
        if rate * self.weight_decay >= 1:
            raise ValueError(
                f"weight_decay: expected below {1 / rate:g}, 1 / the highest learning rate, found {self.weight_decay:g}"
            )
        return self

    @property
    def stated_rows(self) -> int | None:
        """The number of `gradient_rows`; None where it has no bound, or is yet to be chosen."""
        return None if self.gradient_rows == "auto" else self.gradient_rows

    def progress(self, update: int, seconds: float) -> float:
        """Returns the share of the run that is done, by updates or by time, whichever is more."""
        passed = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return max(update / self.updates, passed)
