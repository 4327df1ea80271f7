"""Run a recipe's script as it is, and write down what its training steps took.

    cd examples/moderation
    python ../../bench/watched.py --to steps.json train.py --config configs/quickstart.yaml

The script knows nothing of it: a callback that every Trainer gets looks on. It counts the tokens
that go into the model, and takes the time, the losses and the peak of memory.
"""

import argparse
import math
import runpy
import statistics
import sys
import time
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from arithmetic import memory_gb, training_flops
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from common.run import device, is_main_process, write_json

WARM_UP = 2  # first steps, which take memory and start threads
SEEN = ("input_ids", "attention_mask", "position_ids")
KERNELS = 10
Batch = dict[str, torch.Tensor]


def main() -> None:
    args = parse()
    transformers.trainer.DEFAULT_CALLBACKS.append(Watch(args))
    script = Path(args.script[0]).absolute()
    sys.argv = list(args.script)
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


def parse() -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=kind,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--to", type=Path, required=True, help="a JSON file")
    about = "bytes a parameter and a hidden value, by docs/scaling.md, to set beside the peak"
    add("--bytes", type=float, nargs=2, help=about)
    about = "bytes a parameter of embeddings and output layer, where they are kept otherwise"
    add("--outside", type=float, help=about)
    add("--profile", action="store_true", help="the kernels of the last step")
    add("--stop", action="store_true", help="end with the training: nothing is saved")
    add("--falls", action="store_true", help="the loss must fall: the rows are the same again")
    about = "the script, and its flags"
    add("script", nargs=argparse.REMAINDER, help=about)
    args = parser.parse_args()
    args.to = args.to.absolute()
    if not args.script:
        parser.error("which script?")
    return args


class Watch(TrainerCallback):
    """Looks on while a Trainer trains."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.model: Any = None
        self.hook: Any = None
        self.profiler: Any = None
        self.kernels: list[dict[str, Any]] = []
        self.losses: list[float | None] = []  # None where it was no number
        self.seconds: list[float] = []
        self.passes: list[Batch] = []  # of the step that runs
        # of each step, the tokens that were processed, and the lengths of its rows
        self.steps: list[tuple[int, list[int]]] = []
        self.longest = 0  # tokens of a pass, with padding
        self.started = 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model = model
        args.logging_nan_inf_filter = False  # which logs 0 where a loss is no number
        self.hook = model.register_forward_pre_hook(self._keep_inputs, with_kwargs=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def _keep_inputs(self, module, args, inputs):
        """Copies of the inputs, to be counted when the clock stands."""
        kept = {}
        for name in SEEN:
            if inputs.get(name) is not None:
                kept[name] = inputs[name].detach()
        self.passes.append(kept)

    def on_step_begin(self, args, state, control, **kwargs):
        is_last = state.global_step == state.max_steps - 1
        if self.args.profile and is_last:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self.profiler = profile(activities=activities)
            self.profiler.start()
        wait()
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        wait()
        took = time.perf_counter() - self.started
        self.seconds.append(took)
        if self.profiler is not None:
            self.profiler.stop()
            self.kernels = longest_kernels(self.profiler)
            self.profiler = None
        processed = 0
        lengths = []
        for inputs in self.passes:
            tokens = inputs["input_ids"].numel()
            processed += tokens
            self.longest = max(self.longest, tokens)
            lengths += row_lengths(inputs)
        self.steps.append((processed, lengths))
        self.passes.clear()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            loss = float(logs["loss"])
            self.losses.append(loss if math.isfinite(loss) else None)

    def on_train_end(self, args, state, control, **kwargs):
        self.hook.remove()
        if is_main_process():
            figures = self.figures(args.world_size)
            found = {"figures": figures, "failures": self.failures()}
            write_json(self.args.to, found)
        if self.args.stop:
            sys.exit(0)

    def figures(self, processes: int) -> dict[str, Any]:
        """What was measured, of this process."""
        # the profiled step is slow
        end = len(self.seconds) - bool(self.kernels)
        first = min(WARM_UP, end - 1)
        seconds = self.seconds[first:end]
        took = sum(seconds)
        processed = 0
        useful = 0
        flops = 0.0
        config = self.model.config.get_text_config()
        trained = [weight.requires_grad for weight in self.model.parameters()]
        whole = all(trained)
        for count, lengths in self.steps[first:end]:
            processed += count
            useful += sum(lengths)
            flops += training_flops(config, lengths, whole)
        found = {
            "tokens_per_s": useful / took * processes,
            "useful_token_share": useful / processed,
            "model_tflops": flops / took / 1e12,  # a process's
            "step_s": statistics.median(seconds),
            "losses": self.losses,
            "attention": config._attn_implementation,
        }
        if torch.cuda.is_available():
            found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if self.args.bytes:
            names = [name for name, _ in self.model.named_modules()]
            has_head = any(name.endswith("lm_head") for name in names)
            outside = self.args.outside
            counted = memory_gb(config, self.longest, *self.args.bytes, outside, has_head)
            found["arithmetic_gb"] = counted
        if self.kernels:
            found["kernels"] = self.kernels
        return found

    def failures(self) -> list[str]:
        """What should have come out, and did not."""
        failed = []
        if None in self.losses:
            failed.append("a loss is no number")
        elif self.args.falls:
            first, *_, last = self.losses
            if last >= first:
                failed.append(f"the loss does not fall: {first:.4f}, {last:.4f}")
        return failed


def wait() -> None:
    """Until the accelerator has done what it was told."""
    if device().type != "cpu":
        torch.accelerator.synchronize()


def row_lengths(inputs: Batch) -> list[int]:
    """The tokens of each row of a batch: padded, end to end with positions, or a tree."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return mask.sum(1).tolist()
    positions = inputs.get("position_ids")
    if positions is None or mask is not None:
        rows, width = inputs["input_ids"].shape
        return [width] * rows
    places = positions.flatten().tolist()
    lengths: list[int] = []
    for position in places:
        if position == 0:  # a row begins
            lengths.append(0)
        lengths[-1] += 1
    return lengths


def longest_kernels(profiler: profile) -> list[dict[str, Any]]:
    """What took most of a step: kernels of the accelerator, or a CPU's operators."""
    kind = DeviceType.CPU
    name = "self_cpu_time_total"
    if torch.cuda.is_available():
        # an operator has the time of its kernels, too: these alone are counted
        kind = DeviceType.CUDA
        name = "self_device_time_total"
    events = []
    for event in profiler.key_averages():
        if event.device_type == kind and not event.is_user_annotation:
            events.append(event)
    time_of = attrgetter(name)
    events.sort(key=time_of, reverse=True)
    total = sum(map(time_of, events))
    found = []
    for event in events[:KERNELS]:
        took = time_of(event)
        kernel = {
            "kernel": event.key[:60],
            "ms": took / 1e3,
            "share": took / total,
        }
        found.append(kernel)
    return found


if __name__ == "__main__":
    main()
