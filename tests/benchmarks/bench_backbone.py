"""How much faster the transformers here are than diffusers' of the same shape and weights.

    make bench-backbone [ARGS="--models dit --tokens 64 256"]

Both networks are timed in turn, round by round, on the same inputs; a row is the median of the
rounds' ratios, so that what else the machine does falls on both. Compiled means both are, mixed
that only ours is. FLOPs are those of the matrix products, a multiply-add counted as 2, as torch's
counter finds them in our network; MFU divides them by time and by --peak, the device's dense peak
in the dtype. The last column is the ratio that a network of the same products and attention would
have if all else, norms, gates, activations and copies, cost nothing: they are run alone, in the
same rounds.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ldm_core.backbones.diffusers_adapter import DiffusersNetwork
from ldm_core.backbones.diffusers_weights import class_dit_from, mmdit_from_flux, mmdit_from_sd3
from ldm_core.conditioning.text import TextCondition

TEXT_TOKENS, TEXT_WIDTH, POOLED_WIDTH = 77, 512, 512
MODES = {"eager": (False, False), "compiled": (True, True), "mixed": (True, False)}  # ours, theirs
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dit(args: argparse.Namespace, side: int) -> tuple[nn.Module, nn.Module]:
    """DiT with adaLN-zero."""
    model = DiTTransformer2DModel(
        num_attention_heads=args.heads,
        attention_head_dim=args.width // args.heads,
        out_channels=4,
        num_layers=args.depth,
        sample_size=side,
    )
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return class_dit_from(model), model


def sd3(args: argparse.Namespace, side: int) -> tuple[nn.Module, nn.Module]:
    """Joint blocks without norms of queries and keys."""
    model = SD3Transformer2DModel(
        sample_size=side,
        num_layers=args.depth,
        attention_head_dim=args.width // args.heads,
        num_attention_heads=args.heads,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=args.width,
        pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=max(96, side),
    )
    return mmdit_from_sd3(model), model


def flux(args: argparse.Namespace, side: int) -> tuple[nn.Module, nn.Module]:
    """A third joint blocks, two thirds single ones; rotary positions."""
    head = args.width // args.heads
    model = FluxTransformer2DModel(
        num_layers=max(1, args.depth // 3),
        num_single_layers=max(1, args.depth - args.depth // 3),
        attention_head_dim=head,
        num_attention_heads=args.heads,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        axes_dims_rope=(head - 4 * (head // 6), 2 * (head // 6), 2 * (head // 6)),
    )
    return mmdit_from_flux(model), model


MODELS = {"dit": dit, "sd3": sd3, "flux": flux}


def inputs(name: str, args: argparse.Namespace, side: int, dtype: torch.dtype) -> tuple:
    """Latents, times and conditions of a batch."""
    channels = 4 if name == "dit" else 16
    options = {"dtype": dtype, "device": args.device}
    x_t = torch.randn(args.batch, channels, side, side, **options)
    t = torch.rand(args.batch, device=args.device)
    if name == "dit":
        return x_t, t, torch.randint(1000, (args.batch,), device=args.device)
    cond = TextCondition(
        torch.randn(args.batch, TEXT_TOKENS, TEXT_WIDTH, **options),
        torch.ones(args.batch, TEXT_TOKENS, dtype=torch.bool, device=args.device),
        torch.randn(args.batch, POOLED_WIDTH, **options),
    )
    return x_t, t, cond


def forward(network: nn.Module, batch: tuple) -> None:
    """Without a graph."""
    with torch.no_grad():
        network(*batch)


def both(network: nn.Module, batch: tuple) -> None:
    """Forward, and backward to every weight."""
    network(*batch).square().mean().backward()
    network.zero_grad(set_to_none=True)


PASSES = {"forward": forward, "both": both}


def seconds(run: Callable[[], None], device: str) -> float:
    """Wall-clock time of one run."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Products(TorchDispatchMode):
    """Remembers every matrix product, convolution and attention, to run them again alone."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm") or "convolution" in name or "_dot_" in name:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def again(self) -> None:
        """All of them, with the tensors they had."""
        with torch.no_grad():
            for func, args, kwargs in self.calls:
                func(*args, **kwargs)


def compare(runs: list[Callable[[], None]], args: argparse.Namespace) -> dict:
    """Medians over rounds, after a warm-up; `runs` are ours, theirs, and our products alone."""
    for run in runs * 2:
        seconds(run, args.device)
    rounds = []
    for index in range(args.rounds):
        turn = [(index + k) % len(runs) for k in range(len(runs))]
        times = {k: seconds(runs[k], args.device) for k in turn}
        rounds.append([times[k] for k in range(len(runs))])
    return {
        "ours": statistics.median(ours for ours, _, _ in rounds),
        "theirs": statistics.median(theirs for _, theirs, _ in rounds),
        "ratio": statistics.median(theirs / ours for ours, theirs, _ in rounds),
        "most": statistics.median(theirs / products for _, theirs, products in rounds),
    }


def flops(run: Callable[[], None]) -> int:
    """Of the matrix products, multiply-add = 2; attention in its plain form, to be counted."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def difference(ours: nn.Module, theirs: nn.Module, batch: tuple) -> float:
    """Largest difference of the outputs over their spread: the work is the same."""
    with torch.no_grad():
        a, b = (network(*batch) for network in (ours, theirs))
    return float((a - b).abs().max() / b.std())


def main() -> None:
    """Print one row per setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s, for MFU on CUDA")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads; multiply-add = 2")
    print(f"width {args.width}, depth {args.depth}, heads {args.heads}, batch {args.batch}")
    print(
        "model tokens dtype mode     pass    ours/ms theirs/ms  ratio  difference  TFLOP/s", end=""
    )
    print("  MFU  at most")
    settings = itertools.product(args.models, args.tokens, args.dtypes, args.modes)
    for model, tokens, dtype, mode in settings:
        row(args, model, tokens, dtype, mode)


def row(args: argparse.Namespace, model: str, tokens: int, dtype: str, mode: str) -> None:
    """Build both networks and time every pass."""
    torch._dynamo.reset()
    side = 2 * int(tokens**0.5)
    ours, theirs = MODELS[model](args, side)
    networks = [ours, DiffusersNetwork(theirs)]
    networks = [network.to(args.device, DTYPES[dtype]).train() for network in networks]
    batch = inputs(model, args, side, DTYPES[dtype])
    apart = difference(*networks, batch)
    compile_ours, compile_theirs = MODES[mode]
    runs = [torch.compile(networks[0]) if compile_ours else networks[0], networks[1]]
    if compile_theirs:
        networks[1].model = torch.compile(networks[1].model)
    for name in args.passes:
        run = PASSES[name]
        work = flops(lambda run=run: run(networks[0], batch))
        with Products() as products:
            run(networks[0], batch)
        both_runs = [lambda run=run, network=network: run(network, batch) for network in runs]
        result = compare([*both_runs, products.again], args)
        speed = work / result["ours"] / 1e12
        mfu = f"{speed / args.peak:.1%}" if args.device == "cuda" else "-"
        print(
            f"{model:5} {tokens:6} {dtype:5} {mode:8} {name:7} {1e3 * result['ours']:8.2f} "
            f"{1e3 * result['theirs']:9.2f} {result['ratio']:6.2f}  {apart:10.1e} {speed:8.3f}  "
            f"{mfu}  {result['most']:7.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
