"""What distillation, fake quantization and edits add to training, against a plain training step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from common import Row, finish, options, ratios, training_step

from compress.distill import freeze
from compress.models import ResNet
from compress.prune import find_groups, plan_removal, replay_prune
from compress.quantize import prepare
from compress.surgery import Edit


def main() -> None:
    arguments = options(__doc__ or "")
    torch.manual_seed(0)
    batch = 64 if arguments.quick else 256
    x = torch.randn(batch, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,))
    student = ResNet(in_channels=1, width=16, blocks=(1, 1, 1))
    teacher = freeze(ResNet(in_channels=1, width=32, blocks=(2, 2, 2)))
    inputs = (x[:2].contiguous(),)
    pruned = copy.deepcopy(student)
    groups = find_groups(pruned, inputs)
    plan = plan_removal(pruned, inputs, {group.name: group.width // 2 for group in groups})
    assert plan is not None
    replay_prune(pruned, Edit("prune", plan))
    captured = prepare(copy.deepcopy(student).train(), inputs, "int8").train()
    calls: dict[str, Callable[[], object]] = {
        "plain step": training_step(copy.deepcopy(student), x, y),
        "with a teacher": training_step(copy.deepcopy(student), x, y, teacher=teacher),
        "pruned by half": training_step(pruned, x, y),
        "fake quantised": training_step(captured, x, y),
        "plan one removal": lambda: plan_removal(student, inputs, {group.name: group.width // 2 for group in groups}),
        "capture and prepare": lambda: prepare(copy.deepcopy(student), inputs, "int8"),
    }
    rows: list[Row] = ratios(f"batch {batch}, bf16", calls, seconds=1.0 if arguments.quick else 10.0, min_runs=4)
    finish(arguments, rows)


if __name__ == "__main__":
    main()
