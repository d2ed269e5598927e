"""A training plan as text: what `ldm train RECIPE --dry-run` prints."""

from collections.abc import Iterator

from ldm_core.backbones.diffusers_config import DiffusersConfig
from ldm_core.planning.accelerators import ACCELERATORS, USABLE, Accelerator
from ldm_core.planning.memory import GIB, Memory, memory_for, memory_of
from ldm_core.planning.search import fits
from ldm_core.planning.step import Sample, Step
from ldm_core.planning.step_time import LINK_SHARE, UTILISATION, step_time
from pipelines.recipes.sections import TrainSection
from pipelines.text_tables import Cell, print_table
from pipelines.train_plan import TrainingPlan


def print_plan(plan: TrainingPlan, section: TrainSection, next_command: str) -> None:
    """Print parameters, tokens, FLOPs, memory, and time and cost on accelerators."""
    for label, text in _lines(plan, section):
        print(f"  plan     {label:<12} {text}")
    step = plan.step
    print_table("samples", *_samples(step))
    print_table(f"memory of a device, GiB: {step.layout}", *_memory(step))
    if plan.on is not None or section.workers.gpus:
        print_table(
            f"{step.layout.world} devices, {step.samples[0].bucket}", *_times(plan, section)
        )
        for text in _assumptions():
            print(f"  assumed  {text}")
    else:
        print("  plan     time         is predicted for accelerators: --accelerator H100-80")
    print(f"  next     {'run':<12} {next_command}", flush=True)


def _lines(plan: TrainingPlan, section: TrainSection) -> Iterator[tuple[str, str]]:
    step, weights = plan.step, plan.step.weights
    whose: str = section.backbone
    if isinstance(plan.backbone, DiffusersConfig):
        whose = f"{plan.backbone.class_name} of diffusers"
    kinds = weights.by_kind()
    rest = kinds.pop("")[1]
    parts = [f"{count} {kind} {_millions(total)}" for kind, (count, total) in kinds.items()]
    total = ", ".join([*parts, f"the rest {_millions(rest)}"])
    yield "parameters", f"{_millions(weights.total)} of a {whose}: {total}"
    if step.adapters is not None:
        yield (
            "adapters",
            f"{_millions(step.adapters)} of rank {section.lora_rank}: they alone are trained, by "
            "AdamW, and have gradients, moments and averages",
        )
    yield (
        "step",
        f"{step.micro_batches} micro-batches, {step.rounds} one after another on a device; "
        f"checkpointing {step.checkpointing}, {step.optimizer}, averages {step.averages}, "
        f"{'bfloat16 on float32 weights' if step.compute_bytes == 2 else 'float32'}",
    )
    if section.snapshots:
        size = 4 * section.snapshots * step.trained / 1e9
        yield (
            "snapshots",
            f"{section.snapshots:,} of {len(section.ema_lengths)} averages in all, every "
            f"{section.snapshot_steps:,} steps: {size:,.3g} GB, which stay (train.snapshot_every)",
        )


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M" if count < 1e8 else f"{count / 1e6:,.0f} M"


def _samples(step: Step) -> tuple[list[str], list[list[Cell]]]:
    columns = ["bucket", "tokens", "caption", "forward", "training", "micro-batch", "a step", "all"]

    def row(sample: Sample) -> list[Cell]:
        count = step.per_step(sample)
        return [
            sample.bucket,
            sample.tokens,
            sample.text_tokens,
            _flops(sample.forward.flops),
            _flops(step.flops(sample)),
            step.micro_samples[sample.bucket],
            count,
            _flops(count * step.flops(sample)),
        ]

    return columns, [row(sample) for sample in step.samples]


def _flops(count: float) -> str:
    for unit in ("M", "G", "T", "P"):
        if count < 1e9 if unit == "M" else count < 999.5e6:
            break
        count /= 1000
    return f"{count / 1e6:.3g} {unit}FLOP"


def _memory(step: Step) -> tuple[list[str], list[list[Cell]]]:
    def row(name: str, memory: Memory) -> list[Cell]:
        sizes = [*memory.parts().values(), memory.total]
        return [name, *(f"{size / GIB:.2f}" if size > GIB / 100 else _mib(size) for size in sizes)]

    first = memory_for(step, step.samples[0])
    columns = ["bucket", *first.parts(), "together"]
    return columns, [row(each.bucket, memory_for(step, each)) for each in step.samples]


def _mib(size: float) -> str:
    return f"{size / 2**20:.2g} Mi"


def _times(plan: TrainingPlan, section: TrainSection) -> tuple[list[str], list[list[Cell]]]:
    columns = ["on", "GiB", "fits", "s/step", "samples/s", "TFLOP/s", "MFU", "$/hour",
               "$/1M samples", "days", "$ in all"]  # fmt: skip
    named = [plan.on] if plan.on else []
    others = [each for each in ACCELERATORS.values() if each not in named]
    return columns, [_time(plan, section, on) for on in [*named, *others]]


def _time(plan: TrainingPlan, section: TrainSection, on: Accelerator) -> list[Cell]:
    step = plan.step
    time = step_time(step, step.samples[0], on)
    price = section.worker_hour_price if on == plan.on else 0
    price = price or on.hour_price
    million = time.cost_per_million(price)
    return [
        on.name,
        f"{on.usable_bytes / GIB:.1f}",
        "yes" if fits(step, on) else f"no, {memory_of(step).total / GIB:.0f}",
        f"{time.seconds:.3g}",
        f"{time.samples_per_second:,.4g}",
        f"{time.tflops:.0f}",
        f"{100 * time.mfu:.0f} %",
        f"{price:g}",
        f"{million:,.0f}" if million > 100 else f"{million:.3g}",
        f"{section.steps * time.seconds / 86400:.3g}",
        f"{section.steps * time.samples * million / 1e6:,.0f}",
    ]


def _assumptions() -> Iterator[str]:
    yield (
        f"a device computes at {100 * UTILISATION:g} % of its dense bfloat16 peak; MFU is what is "
        "left of it after recomputation,"
    )
    yield (
        f"         communication at {100 * LINK_SHARE:g} % of the links and the optimiser. A "
        "multiply-add is 2 FLOPs, a backward pass two"
    )
    yield (
        f"         forward passes. {100 * USABLE:g} % of the memory is usable. Prices are typical "
        "rent: --set train.worker_hour_price=…"
    )
