"""GridsModule: train a policy, dense or with K visual tokens, on demonstrations."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import lightning
import torch
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.configuration_grids import base_config
from lerobot_policy_grids.errors import GridsError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.modeling_grids import dense_policy

from ..data import POSITIONS, unit_images
from ..policies import parse_tokens, start
from ..seeds import seed_of
from .augmentation import add_state_noise, jitter_images
from .callbacks import CoordinateMonitor, TokenScheduler
from .distillation import Distillation, choose_teacher
from .finite import require_finite_gradients, require_finite_loss
from .flow import OneStep, biased_time
from .identity import identity_of, require_same_run
from .looking import learn_to_look
from .optimisation import parameter_groups, warmup_cosine
from .position_loss import PositionLoss
from .trainable import TrainableChoice, choose_trainable, device_memory, train_only

# Policies draw noise and time of the flow themselves; this seed makes them equal in every validation.
VALIDATION_SEED = 0
# Only the first batches of a validation compare action chunks, because they take all denoising steps.
CHUNK_BATCHES = 2


class GridsModule(lightning.LightningModule):
    """LightningModule that trains a policy.

    Args:
        meta: Metadata of the dataset (linked from the data module on the command line).
        policy: Policy to start from: a family's name, such as tiny, a checkpoint folder, or a Hub id.
        tokens: Visual tokens per camera, or "dense" to train with all tokens. Defaults to 16, or to the value of a
            grids checkpoint.
        reducer: How tokens are reduced: the reducer's name, "grids" by default, or the name with options
            {"type": "grids", "condition_on": ["language"], "num_tokens_max": 64}.
        schedule: K over the training steps: constant; linear, cosine or exponential (from the reducer's num_tokens_max
            down to `tokens`); steps:0=144,500=64,1000=16; elastic (a random K at each step, for a checkpoint that
            works at any budget), elastic:4,8,16 (one of a set) or elastic:4-64 (a range).
        position_ids: How the trunk numbers visual tokens: "consecutive", or "dense" for their numbers among all tokens.
            Defaults to "dense".
        resolution: Side in pixels of the square to which images are resized. Defaults to the policy's own.
        base: Options of a policy that starts without a checkpoint, by LeRobot's names: {"chunk_size": 50}.
        train: Weights to train: "all" that the policy leaves trainable, the "reducer" and low-rank adaptation of the
            base ("reducer+lora"), or only the "reducer". "auto" takes all if they fit into memory, else LoRA.
        distill: Weight of the distance to the dense teacher's prediction in the loss, from 0 to 1. Defaults to 0, no
            teacher.
        distill_end: The same weight at the end of the run; it changes linearly. Defaults to `distill`.
        teacher: Dense policy to imitate, a checkpoint folder or Hub id. Defaults to the policy to start from: if its
            weights stay frozen, the same network is the teacher, otherwise a frozen copy.
        distill_temperature: Temperature of the teacher's distribution, for policies that decode action tokens.
        distill_features: Weight of the distance between the last hidden states of the trunks.
        distill_map: Where tokens are sampled inside the vision tower, weight of the distance between what its later
            layers make of them and the dense tower's final map at the same coordinates.
        distill_saliency: Weight of the squared distance in cells between the points of a sampler and the visual tokens
            that the teacher's prediction depends on. It takes a backward pass of the teacher's trunk.
        look_first: Number of frames on which the sampler alone learns this distance before the training begins, such as
            2048. What the teacher depends on is then computed once for each of them.
        time_bias: More than 1 draws more of the flow's training times near the noise, as t ** (1 / time_bias), so that
            few integration steps become enough (arXiv 2606.05737).
        one_step: Weight of a loss that makes one integration step from noise arrive where the teacher's steps arrive,
            or without --distill those of the policy itself (after SnapFlow, arXiv 2604.05656).
        freeze_vision: Whether the vision tower and its projector stay frozen, so that only later weights are trained.
            Some families freeze them by default.
        gradient_checkpointing: Whether to compute activations again in the backward pass, to save memory.
        accelerator: Lightning's accelerator; "auto" in `train` uses its memory (linked from the trainer).
        lora_rank: Rank of the low-rank adaptation.
        lr: Peak learning rate. Defaults to the family's recipe.
        reducer_lr: Peak learning rate of the reducer. Defaults to `lr`.
        warmup_steps: Steps of linear warm-up before the cosine decay. Defaults to the family's recipe.
        auxiliary_weight: Weight of the position loss, if the dataset has object positions.
        jitter: Strength of random brightness and contrast, 0 for none.
        state_noise: Standard deviation of the noise on the normalised robot state, 0 for none.
        rename_map: Names of dataset features -> names of the policy's features, where they differ.
        seed: Seed of the augmentation, and of noise and time of the flow. Each step is seeded by this seed, its number
            and the process, so a resumed run continues exactly.
    """

    def __init__(
        self,
        meta: LeRobotDatasetMetadata,
        policy: str = "tiny",
        tokens: int | str | None = None,
        reducer: str | dict[str, Any] | None = None,
        schedule: str = "constant",
        position_ids: Literal["consecutive", "dense"] | None = None,
        resolution: int | None = None,
        base: dict[str, Any] | None = None,
        train: Literal["auto", "all", "reducer+lora", "reducer"] = "auto",
        distill: float = 0.0,
        distill_end: float | None = None,
        teacher: str | None = None,
        distill_temperature: float | None = None,
        distill_features: float = 0.0,
        distill_map: float = 0.0,
        distill_saliency: float = 0.0,
        look_first: int = 0,
        time_bias: float = 1.0,
        one_step: float = 0.0,
        freeze_vision: bool = False,
        gradient_checkpointing: bool = False,
        accelerator: str = "auto",
        lora_rank: int = 16,
        lr: float | None = None,
        reducer_lr: float | None = None,
        warmup_steps: int | None = None,
        auxiliary_weight: float = 1.0,
        jitter: float = 0.15,
        state_noise: float = 0.02,
        rename_map: dict[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # Lightning saves them in the training state; a resumed run must have the same.
        self.save_hyperparameters(ignore=["meta", "accelerator"], logger=False)
        self.loaded = start(
            policy,
            None if tokens is None else parse_tokens(tokens),
            meta,
            reducer=reducer,
            schedule=schedule,
            position_ids=position_ids,
            rename_map=rename_map,
            gradient_checkpointing=gradient_checkpointing,
            resolution=resolution,
            base=base,
        )
        self.policy = self.loaded.policy
        self.family = get_family(base_config(self.policy.config).type)
        self.recipe = self.family.recipe
        self.lr = self.recipe.lr if lr is None else lr
        self.reducer_lr = self.lr if reducer_lr is None else reducer_lr
        self.warmup_steps = warmup_steps
        self.auxiliary_weight = auxiliary_weight
        self.jitter = jitter
        self.state_noise = state_noise
        self.seed = seed
        self.distill = (distill, distill if distill_end is None else distill_end)
        if not all(0 <= share <= 1 for share in self.distill):
            raise GridsError(f"distill={distill}, distill_end={distill_end}; give shares of the loss, from 0 to 1")
        only: dict[str, Any] = {"--model.distill_map": distill_map, "--model.distill_saliency": distill_saliency}
        if look_first == 0:
            only["--teacher"] = teacher
        for option, value in only.items():
            if value and max(self.distill) == 0:
                raise GridsError(f"{option} {value} without --distill would teach nothing; give --distill, such as 0.5")
        has_teacher = max(self.distill) > 0 or look_first > 0
        self.trainable = self._choose_trainable(train, accelerator, lora_rank, has_teacher)
        # A blind policy never runs its vision tower, and distributed training would wait for its gradients.
        if freeze_vision or getattr(self.policy, "num_tokens", 1) == 0:
            self._freeze_vision()
        self.distillation: Distillation | None = None
        self.look_first = look_first
        # A teacher that only says where to look is not kept for the training steps.
        self.looking: Distillation | None = None
        if has_teacher:
            teaching = Distillation(
                self.policy,
                choose_teacher(teacher, policy, self.loaded, self.trainable.train),
                distill_temperature,
                distill_features,
                distill_map,
                distill_saliency,
            )
            if look_first > 0:
                teaching.require_points(f"look_first={look_first}")
                self.looking = teaching
            if max(self.distill) > 0:
                self.distillation = teaching
        self.time_bias = time_bias
        if time_bias <= 0 or one_step < 0:
            raise GridsError(f"time_bias={time_bias}, one_step={one_step}; give a bias above 0, and a weight from 0 on")
        if time_bias != 1:
            self.family.flow(dense_policy(self.policy))
        self.one_step_weight = one_step
        self.one_step: OneStep | None = None
        if one_step > 0:
            self.one_step = OneStep(self.policy, None if self.distillation is None else self.distillation.teacher)
        self.position_loss: PositionLoss | None = None
        self._visual_tokens: list[Tensor] = []
        if POSITIONS in meta.features and auxiliary_weight > 0 and getattr(self.policy, "num_tokens", 1) > 0:
            self._add_position_loss(meta)

    def _choose_trainable(self, train: str, accelerator: str, lora_rank: int, has_teacher: bool) -> TrainableChoice:
        if not isinstance(self.policy, GridsPolicy):
            if train not in ("auto", "all"):
                raise GridsError(f"train={train}, but the dense policy has no reducer; give --tokens a number")
            return TrainableChoice("all", "training everything")
        if train == "auto":
            choice = choose_trainable(self.policy, *device_memory(accelerator), has_teacher)
        else:
            choice = TrainableChoice(train, f"training {train}")  # type: ignore[arg-type]
        if train_only(self.policy, choice.train, lora_rank):
            choice = replace(choice, reason=f"{choice.reason}; frozen weights in bfloat16")
        return choice

    def _freeze_vision(self) -> None:
        stages = self.family.stages(dense_policy(self.policy))
        stages.vision.requires_grad_(False)
        stages.projector.requires_grad_(False)

    def _add_position_loss(self, meta: LeRobotDatasetMetadata) -> None:
        base, source = dense_policy(self.policy), getattr(self.policy, "reducer", None)
        width = self.family.layout(base).width
        self.position_loss = PositionLoss(width, meta.stats[POSITIONS], len(meta.tasks))
        # The tokens that the trunk gets: those of the reducer, or what the vision tower gives, which is all of them in
        # a dense policy, and in one that samples inside the tower those that went through its last layers.
        if source is None or self.policy.seam.inside is not None:
            source = self.family.feature_source(base)
        source.register_forward_hook(self._keep_visual_tokens)

    def _keep_visual_tokens(self, module: nn.Module, inputs: Any, output: Any) -> None:
        seam = getattr(self.policy, "seam", None)
        if seam is not None and seam.inside is not None and seam.between is None:
            return  # of a teacher that is the same network, with every token
        if isinstance(output, Tensor):
            self.family.change_features(dense_policy(self.policy), output, self._keep_tokens)
        else:
            self._visual_tokens.append(output.tokens)

    def _keep_tokens(self, tokens: Tensor) -> Tensor:
        self._visual_tokens.append(tokens)
        return tokens

    def configure_callbacks(self) -> list[lightning.Callback]:
        return [TokenScheduler(), CoordinateMonitor()] if isinstance(self.policy, GridsPolicy) else []

    def on_fit_start(self) -> None:
        self.loaded.to(str(self.device))
        if self.distillation is not None:
            self.distillation.teacher.to(self.device)
        if self.looking is not None and self.trainer.ckpt_path is None:
            self._look_first(self.looking)
        self.looking = None

    def _look_first(self, teaching: Distillation) -> None:
        """The sampler learns to look where the teacher looks, in one process, and the others get its weights."""
        trainer: Any = self.trainer
        if isinstance(trainer.strategy, FSDPStrategy):
            raise GridsError("--model.look_first needs whole weights, and fsdp shards them; drop one of the two")
        if trainer.is_global_zero:
            teaching.teacher.to(self.device)
            torch.manual_seed(seed_of(self.seed))
            loader, steps = trainer.datamodule.train_dataloader(), int(trainer.estimated_stepping_batches)
            batches = (self._prepare(trainer.strategy.batch_to_device(batch), augment=True) for batch in loader)
            with trainer.precision_plugin.train_step_context():
                learn_to_look(
                    teaching,
                    batches,
                    math.ceil(self.look_first / loader.batch_sampler.batch_size),
                    lambda share: self.policy.follow_schedule(int(share * steps)),
                )
        for weight in self.policy.reducer.parameters():
            weight.data.copy_(trainer.strategy.broadcast(weight.data))

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        self._visual_tokens.clear()
        micro_batch = batch_index % self.trainer.accumulate_grad_batches
        torch.manual_seed(seed_of(self.seed, self.global_step, micro_batch, self.global_rank))
        prepared = self._prepare(batch, augment=True)
        size = len(batch["task_index"])
        total: Tensor
        with self._biased_time():
            forward = self.policy.forward if self.distillation is None else self.distillation.losses
            loss, distance = forward(prepared)
        total = loss
        if self.distillation is not None:
            share = self._distill_share()
            self.log("train/distillation", distance.detach(), batch_size=size)
            self.log("train/distill_share", share, batch_size=size)
            total = (1 - share) * loss + share * distance
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        if self.position_loss is not None:
            position_loss = self._position_loss(batch)
            self.log("train/position_loss", position_loss.detach(), prog_bar=True, batch_size=size)
            total = total + self.auxiliary_weight * position_loss
        if self.one_step is not None:
            one_step = self.one_step.loss(prepared)
            self.log("train/one_step", one_step.detach(), batch_size=size)
            total = total + self.one_step_weight * one_step
        require_finite_loss(total.detach(), batch, self.global_step)
        return total

    @contextmanager
    def _biased_time(self) -> Iterator[None]:
        """In this block student and teacher draw their times with the bias."""
        with ExitStack() as stack:
            if self.time_bias != 1:
                others = [] if self.distillation is None else [self.distillation.teacher.separate]
                for policy in filter(None, (self.policy, *others)):
                    stack.enter_context(biased_time(policy, self.time_bias))
            yield

    def _distill_share(self) -> float:
        first, last = self.distill
        return first + (last - first) * min(1.0, self.global_step / int(self.trainer.estimated_stepping_batches))

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        self._visual_tokens.clear()
        size = len(batch["task_index"])
        # This does not affect training, because each training step sets its own seed.
        torch.manual_seed(VALIDATION_SEED + batch_index)
        prepared = self._prepare(batch, augment=False)
        if self.distillation is None:
            loss, _ = self.policy.forward(prepared)
        else:
            loss, distance = self.distillation.losses(prepared)
            self.log("val/distillation", distance, batch_size=size, sync_dist=True)
        self.log("val/loss", loss, prog_bar=True, batch_size=size, sync_dist=True)
        if self.position_loss is not None:
            self.log("val/position_loss", self._position_loss(batch), batch_size=size, sync_dist=True)
        if self.distillation is not None and batch_index < CHUNK_BATCHES:
            chunk_distance = self.distillation.chunk_distance(prepared)
            self.log("val/chunk_distance", chunk_distance, batch_size=size, sync_dist=True)
        if self.one_step is not None and batch_index < CHUNK_BATCHES:
            self.log("val/one_step", self.one_step.loss(prepared), batch_size=size, sync_dist=True)

    def _position_loss(self, batch: dict[str, Any]) -> Tensor:
        assert self.position_loss is not None
        size = len(batch["task_index"])
        # Families call the module per camera or once for all: [cameras * b, n, c] to [b, cameras * n, c].
        tokens = torch.cat([part for kept in self._visual_tokens for part in kept.split(size)], dim=1)
        loss: Tensor = self.position_loss(tokens.float(), batch[POSITIONS], batch["task_index"])
        return loss

    def _prepare(self, batch: dict[str, Any], augment: bool) -> dict[str, Any]:
        """Scale images to [0, 1], augment, and apply the policy's own pre-processor."""
        batch = jitter_images(unit_images(batch), self.jitter if augment else 0.0)
        prepared: dict[str, Any] = self.loaded.preprocessor(batch)
        return add_state_noise(prepared, self.state_noise if augment else 0.0)

    def configure_optimizers(self) -> Any:
        preset = self.policy.config.get_optimizer_preset()
        groups = parameter_groups(self.named_parameters(), self.lr, self.reducer_lr, preset.weight_decay)
        optimizer = torch.optim.AdamW(groups, betas=preset.betas, eps=preset.eps)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = round(self.recipe.warmup * steps) if self.warmup_steps is None else self.warmup_steps
        scheduler = warmup_cosine(optimizer, warmup, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        # With a loss scaler such gradients are expected, and their step is skipped.
        if self.trainer.precision != "16-mixed":
            require_finite_gradients(self.named_parameters(), self.global_step)
        self.log("train/lr", optimizer.param_groups[0]["lr"], batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["identity"] = identity_of(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        require_same_run(checkpoint.get("identity", {}), identity_of(self))

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val is None:
            gradient_clip_val = self.policy.config.get_optimizer_preset().grad_clip_norm
        sharded: Any = self.trainer.model
        if hasattr(sharded, "clip_grad_norm_"):
            # Only FSDP's wrapper can compute the norm over all shards; Lightning does not support it.
            sharded.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm or "norm")
