"""Heterogeneous complementary distillation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.functional.options import Count, Positive, Share
from fedkd.functional.precision import full
from fedkd.knowledge.kinds import Kind, Logits, Pooled, Stage
from fedkd.losses import LOSSES
from fedkd.losses.base import DistillationLoss, TeacherWeights, Tensors
from fedkd.losses.ce import ce_loss
from fedkd.losses.inputs import check_batch, class_numbers, loss_function
from fedkd.losses.kd import divergence, kl_to_teacher


@loss_function("hcd")
def hcd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    shared: Sequence[Tensor],
    *,
    temperature: Positive = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 1.0,
    sub_weight: float = 1.0,
    orthogonality: float = 1.0,
    threshold: float = 0.5,
    label_smoothing: Share = 0.1,
    student_share: float = 1.0,
    teacher_share: float = 1.0,
    detach: bool = True,
    over_stages: Literal["mean", "sum"] = "mean",
    orthogonal: Literal["fused", "sub"] = "fused",
    label_entry: float = 0.0,
) -> Tensor:
    """All terms but the cross entropy of the student's own logits, per sample, (B,).

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        targets: (B,).
        shared: Sub-logits of each stage before fusion, (B, k, C).
        temperature: Softness of all distributions.
        kd_weight: Weight of KL(teacher || student); 0 leaves it out.
        ce_weight: Weight of the sub-logits' cross entropy, which trains the mapper.
        sub_weight: Weight of KL(sub-logits || student). A description of the official code has 6,
            which outweighs the labels where the mapper is still poor.
        orthogonality: Weight of the penalty on sub-logits that agree beside the target.
        threshold: Cosine from which they agree.
        label_smoothing: Of the sub-logits' cross entropy.
        student_share: Factor of the mapper's output in the sub-logits.
        teacher_share: Factor of the teacher's logits in them.
        detach: Whether KL(sub-logits || student) leaves the sub-logits alone. The official code is
            reported not to, and training then to diverge.
        over_stages: "mean", or "sum", which makes everything `stages` times as heavy.
        orthogonal: Whether the penalty looks at the sub-logits with the teacher's logits ("fused")
            or without ("sub").
        label_entry: What stands in for the target's entry in the penalty.
    """
    check_batch("hcd", student_logits, teacher_logits, classes=student_logits.shape[-1])
    check_batch("hcd", student_logits, *shared)
    targets = class_numbers("hcd", targets, student_logits)
    loss = kd_weight * kl_to_teacher(student_logits, teacher_logits, temperature)
    part = 1.0 if over_stages == "sum" else 1 / len(shared)
    for stage in shared:
        stage = full(stage)
        fused = sub_logits(
            stage, teacher_logits, student_share=student_share, teacher_share=teacher_share
        )
        count = fused.shape[1]
        entropy = ce_loss(
            fused.flatten(0, 1), targets.repeat_interleave(count), label_smoothing=label_smoothing
        )
        target = fused.detach() if detach else fused
        divergence = _divergence(target, student_logits, temperature)
        overlap = orthogonality_loss(
            fused if orthogonal == "fused" else stage,
            targets,
            threshold=threshold,
            label_entry=label_entry,
        )
        loss = loss + part * (
            ce_weight * entropy.view(-1, count).mean(dim=1)
            + sub_weight * divergence
            + orthogonality * overlap
        )
    return loss


def sub_logits(
    shared: Tensor,
    teacher_logits: Tensor,
    *,
    student_share: float = 1.0,
    teacher_share: float = 1.0,
) -> Tensor:
    """Shared logits rectified by the teacher's, (B, k, C) x (B, C) -> (B, k, C)."""
    teacher_logits = teacher_logits.detach().to(shared.dtype)
    return student_share * shared + teacher_share * teacher_logits[:, None]


def orthogonality_loss(
    vectors: Tensor, targets: Tensor, *, threshold: float = 0.5, label_entry: float = 0.0
) -> Tensor:
    """Mean of relu(cosine - threshold)^2 over pairs of sub-logits, per sample, (B, k, C) -> (B,).

    Args:
        vectors: Sub-logits.
        targets: (B,); the sub-logits agree on them, so their entries are overwritten first.
        threshold: Cosine that costs nothing.
        label_entry: What is written; an early port used -1e6, which makes all vectors alike.
    """
    count = vectors.shape[1]
    if count == 1:
        return vectors.sum(dim=(1, 2)) * 0
    index = targets[:, None, None].expand(-1, count, 1)
    unit = F.normalize(vectors.scatter(2, index, label_entry), dim=2)
    excess = F.relu(unit @ unit.transpose(1, 2) - threshold).square()
    others = 1 - torch.eye(count, dtype=excess.dtype, device=excess.device)
    return (excess * others).sum(dim=(1, 2)) / (count * (count - 1))


@LOSSES.register("hcd")
class HCDLoss(DistillationLoss, formula=hcd_loss):
    """Lets student and teacher features speak together as several sub-heads. Needs labels.

    Each of the student's stages is projected and joined with the teacher's pooled feature; a small
    mapper makes k sub-logits of both, to which the teacher's logits are added. Cross entropy of
    the student's own logits, part of the published sum, is left to the loss `ce`.

    The authors' code could not be read. Formulas follow a third party's description of it, and
    where that is in doubt an option says so.

    Args:
        stages: How many of the student's deepest stages.
        sub_heads: Sub-logits per stage (k).
        formula: Options of `hcd_loss`.

    References:
        Xu et al., "Heterogeneous Complementary Distillation", AAAI 2026,
            https://arxiv.org/abs/2511.10942
    """

    needs = (Logits(), Pooled())
    needs_targets = True

    def __init__(self, *, stages: Count = 3, sub_heads: Count = 4, **formula: Any) -> None:
        super().__init__(**formula)
        self.stages = tuple(Stage(index) for index in range(-stages, 0))
        self.sub_heads = sub_heads
        self.projectors = nn.ModuleList()
        self.mappers = nn.ModuleList()

    @property
    def reads(self) -> tuple[Kind, ...]:
        """The student's logits and maps."""
        return (Logits(), *self.stages)

    def adapted(self, student: Tensors, teacher: Tensors) -> Self:
        """With projectors and mappers for the widths of the two."""
        theirs, classes = teacher[Pooled()].shape[1], teacher[Logits()].shape[1]
        width = max(student[self.stages[-1]].shape[1], theirs)
        ready = copy.deepcopy(self)
        ready.projectors = nn.ModuleList(
            _projector(student[stage].shape[1], width, blocks=len(self.stages) - number - 1)
            for number, stage in enumerate(self.stages)
        )
        ready.mappers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width + theirs, theirs),
                nn.ReLU(),
                nn.Linear(theirs, self.sub_heads * classes),
            )
            for _ in self.stages
        )
        for module in (*ready.projectors.modules(), *ready.mappers.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        return ready

    def forward(
        self, student: Tensors, teacher: Tensors, targets: Tensor | None, weights: TeacherWeights
    ) -> Tensor:
        """Losses (B,)."""
        assert targets is not None
        assert len(self.mappers) == len(self.stages), "adapt it to student and teacher first"
        check_batch("hcd", student[Logits()], teacher[Logits()], classes=student[Logits()].shape[1])
        check_batch("hcd", student[Logits()], teacher[Pooled()])
        dtype = next(self.mappers.parameters()).dtype
        feature = teacher[Pooled()].detach().to(dtype)
        shared = [
            mapper(torch.cat([projector(student[stage].to(dtype)), feature], dim=1))
            for stage, projector, mapper in zip(self.stages, self.projectors, self.mappers)
        ]
        return hcd_loss(
            student[Logits()],
            teacher[Logits()],
            targets,
            [stage.unflatten(1, (self.sub_heads, -1)) for stage in shared],
            **vars(self.options),
        )


def _divergence(target: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(target || student), mean over sub-logits, (B, k, C) x (B, C) -> (B,)."""
    log_target = F.log_softmax(target / temperature, dim=2)
    log_student = F.log_softmax(student_logits.to(target.dtype) / temperature, dim=1)[:, None]
    return temperature**2 * divergence(log_student, log_target).mean(dim=1)


def _projector(channels: int, width: int, blocks: int) -> nn.Sequential:
    """A map (B, channels, h, w) to a vector (B, width), each block halving the map."""
    layers: list[nn.Module] = [] if blocks else [nn.Conv2d(channels, width, 1)]
    for number in range(blocks):
        wider = width if number == blocks - 1 else 2 * channels
        layers += _separable(channels, wider)
        channels = wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _separable(channels: int, wider: int) -> list[nn.Module]:
    """Two depthwise separable convolutions, the first with stride 2."""
    layers: list[nn.Module] = []
    for stride, out in ((2, channels), (1, wider)):
        layers += [
            nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
            nn.Conv2d(channels, out, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        ]
    return layers
