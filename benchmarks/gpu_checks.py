"""What benchmarks/gpu.py measures beyond the other benchmarks, one check a call; rows go to results/gpu.jsonl.

    python benchmarks/gpu_checks.py --check encoder

tests       pytest on `--files`; none: the whole suite
copies      steps under torch.profiler: how often the host waits for the device, and which streams copy and compute
packed      a step with packed texts beside one with padded texts
curriculum  samples a second of small images, then of whole ones, in one run
encoder     the image encoder in bf16, compiled in one piece, beside float32 and beside the whole tower
captioner   examples/vlm on the run in WORK/quickstart
resume      the quickstart killed half-way and resumed, beside the run in WORK/quickstart
onnx        that run's float16 graphs by onnxruntime's CUDA provider, beside float32

At toy size the run is not killed, but goes on from a copy of the one in WORK/quickstart without its last checkpoints,
and onnxruntime computes on the CPU.
"""

import json
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rows import append, in_a_copy, run_benchmark
from torch.nn.functional import cosine_similarity

from contrastive.errors import UserError
from contrastive.log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
CheckName = Literal["tests", "copies", "packed", "curriculum", "encoder", "captioner", "resume", "onnx"]
QUICKSTART = ("--loss", "sigmoid")  # the flags of gpu_parts.py's quickstart
LAUNCH = ("-m", "accelerate.commands.accelerate_cli", "launch")


@dataclass(frozen=True)
class Options:
    check: CheckName
    """What to measure."""
    work: str = "runs/gpu"
    """Folder of the runs."""
    data: str = "scenes"
    """Image-text pairs."""
    files: tuple[str, ...] = ()
    """Of `tests`."""
    toy: bool = False
    """In seconds on a CPU, to see that it runs."""
    results: str = "gpu"
    """Rows go to benchmarks/results/NAME.jsonl; an absolute NAME is a path of its own."""


def main(options: Options) -> None:
    for row in CHECKS[options.check](options):
        row = {"what": options.check, **row}
        append(options.results, row, shlex.join(["python", "benchmarks/gpu_checks.py", *sys.argv[1:]]))
        print(row, flush=True)


def tests(options: Options) -> Iterator[dict]:
    started, said = time.perf_counter(), ""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options.files]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            said = line.strip() or said
    yield {"files": options.files, "said": said, "wall_seconds": round(time.perf_counter() - started, 1)}
    if process.returncode:
        raise UserError(said)


def copies(options: Options) -> Iterator[dict]:
    from torch.profiler import ProfilerActivity, profile, record_function

    step = _pair("ViT-B-16", options).ours(compiled=False)
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled, record_function("all steps"):
        for _ in range(2 if options.toy else 10):
            step()
    with tempfile.TemporaryDirectory() as folder:
        profiled.export_chrome_trace(str(Path(folder, "trace.json")))
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    span = next(event for event in events if event.get("name") == "all steps" and event.get("cat") == "user_annotation")
    inside = [event for event in events if span["ts"] <= event.get("ts", -1) <= span["ts"] + span["dur"]]
    yield {
        "waits": sum("Synchronize" in event["name"] for event in inside if event.get("cat") == "cuda_runtime"),
        "copy_streams": sorted({e["args"]["stream"] for e in events if "HtoD" in e.get("name", "") and "args" in e}),
        "kernel_streams": sorted({e["args"]["stream"] for e in events if e.get("cat") == "kernel"}),
    }


def packed(options: Options) -> Iterator[dict]:
    """Both take turns; the padded ones are what `TextTower.pack` returns when it leaves them as they are."""
    from step import _seconds

    from contrastive.models import TextTower

    pack, rounds = TextTower.pack, 1 if options.toy else 5
    ways = {"packed": pack, "padded": lambda self, tokens: tokens}
    for model in ("ViT-B-32",) if options.toy else ("ViT-B-32", "ViT-B-16"):
        pair = _pair(model, options)
        seconds = {way: [] for way in ways}
        steps = {way: pair.ours(compiled=not options.toy) for way in ways}
        for turn in range(1 + rounds):  # the first compiles
            for way, step in steps.items():
                TextTower.pack = ways[way]
                seconds[way] += [_seconds(step, 1 if options.toy else 5, pair.runtime.device)] * (turn > 0)
        TextTower.pack = pack
        median = {way: statistics.median(times) for way, times in seconds.items()}
        rates = {way: round(pair.options.batch / time, 1) for way, time in median.items()}
        ratio = round(median["padded"] / median["packed"], 3)
        yield {"model": pair.name, "batch": pair.options.batch, "samples_per_second": rates, "ratio": ratio}


def _pair(model: str, options: Options):
    from step import Options as StepOptions
    from step import Pair

    from contrastive.data.sources import open_source
    from contrastive.distributed.runtime import Runtime

    precision = "fp32" if options.toy else "bf16"
    how = StepOptions(data=options.data, batch=2 if options.toy else 256, precision=precision)
    name, size = ("ViT-Ti-16", 32) if options.toy else (model, 224)
    return Pair(name, size, open_source(options.data), how, Runtime(precision))


def curriculum(options: Options) -> Iterator[dict]:
    folder = Path(options.work, "curriculum")
    flags = "--config configs/cc3m.yaml --model siglip_vit_b_16 --train.steps 300 --curriculum until=0.6,image_size=112"
    if options.toy:
        flags = "--model.image.width 16 --model.image.depth 1 --model.image.mlp_dim 32 --train.global_batch_size 8"
        flags += " --model.embed_dim 16 --train.steps 4 --evaluation.limit 8 --curriculum until=0.5,image_size=16"
    same = f"--data.train scenes --data.tokenizer bpe --train.log_every 1 --run_folder {shlex.quote(str(folder))}"
    _call(options, "scripts/pretrain.py", *shlex.split(f"{flags} {same}"))
    rates = [row["samples_per_second"] for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "train"]
    end = int(len(rates) * (0.5 if options.toy else 0.6))
    late = end // 2  # what compiles at the start of a stage is not its speed
    yield {
        "samples_per_second_first": round(statistics.median(rates[late:end]), 1),
        "samples_per_second_last": round(statistics.median(rates[end + (len(rates) - end) // 2 :]), 1),
        "slowest_step_last": round(min(rates[end:]), 1),
    }


def encoder(options: Options) -> Iterator[dict]:
    from contrastive.models import ImageTower, ImageTowerConfig
    from contrastive.models.image_encoder import ImageEncoder
    from contrastive.models.presets import model_config

    torch.manual_seed(0)
    device, config = ("cpu", None) if options.toy else ("cuda", model_config("siglip_vit_b_16").image)
    config = config or ImageTowerConfig(image_size=32, patch_size=8, width=32, depth=3, num_heads=2, mlp_dim=64)
    tower = ImageTower(config, config.width).to(device).eval()
    exact = ImageEncoder(tower, layer=-2).eval()
    rounded, rounded_tower = ImageEncoder(tower, layer=-2).eval().bfloat16(), ImageTower(config, config.width)
    rounded_tower = rounded_tower.to(device).eval().bfloat16()
    how = {"fullgraph": True, "backend": "eager" if options.toy else "inductor"}  # a graph break is an error
    ours, whole = torch.compile(rounded, **how), torch.compile(rounded_tower, **how)
    for size in (config.image_size, config.image_size + 7 * config.patch_size):
        pixels = torch.randn(2 if options.toy else 64, 3, size, size, device=device)
        with torch.no_grad():
            found, expected = ours(pixels.bfloat16()).float(), exact(pixels)
            cosines = cosine_similarity(found, expected, dim=-1)
            row = {"image_size": size, "cosine_min": round(cosines.min().item(), 6)}
            row |= {"ms": _milliseconds(lambda pixels=pixels: ours(pixels.bfloat16()), device)}
            if size == config.image_size:  # the tower takes no other
                row["tower_ms"] = _milliseconds(lambda pixels=pixels: whole(pixels.bfloat16()), device)
        yield row


def _milliseconds(call, device: str) -> float:
    """The median of ten calls, after two that compile."""
    times = []
    for _ in range(12):
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return round(statistics.median(times[2:]), 2)


def captioner(options: Options) -> Iterator[dict]:
    out = Path(options.work, "captioner")
    flags = "--steps 2000 --batch-size 256"
    if options.toy:
        flags = "--steps 2 --batch-size 4 --eval-images 4 --layer -1"
    run = Path(options.work, "quickstart")
    started = time.perf_counter()
    launch = (*LAUNCH, "--mixed_precision", "bf16")
    _call(options, "examples/vlm/train.py", str(run), *flags.split(), "--out", str(out), launch=launch)
    seconds = time.perf_counter() - started
    results = json.loads((out / "results.json").read_text())
    right = {result["data"]: round(100 * result["named_right"], 2) for result in results}
    yield {"wall_seconds": round(seconds, 1), "named_right": right}


def resume(options: Options) -> Iterator[dict]:
    first, folder = Path(options.work, "quickstart"), Path(options.work, "resume")
    undisturbed, flags = _losses(first), [*QUICKSTART, "--run_folder", str(folder)]
    at = max(undisturbed) // 2
    if options.toy:
        shutil.copytree(first, folder)
        shutil.rmtree(folder / "final")
        for checkpoint in (folder / "checkpoints").iterdir():
            if checkpoint.name > f"step-{at:08d}":
                shutil.rmtree(checkpoint)
        flags = flags[-2:]
    else:
        process = subprocess.Popen([sys.executable, "scripts/pretrain.py", *flags], cwd=ROOT)
        while process.poll() is None and max(_losses(folder), default=0) < at:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)  # it saves, and exits
        process.wait()
        at = max(_losses(folder), default=0)
    if not 0 < at < max(undisturbed):
        raise UserError(f"{folder}: the run was over before it could be killed half-way; it may have said why above")
    _call(options, "scripts/pretrain.py", *flags, "--resume")
    after = _losses(folder)
    difference = max(abs(after[step] / undisturbed[step] - 1) for step in undisturbed)
    yield {"resumed_at": at, "steps": max(after), "loss_difference": float(f"{difference:.1e}")}


def _losses(folder: Path) -> dict[int, float]:
    path = folder / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def onnx(options: Options) -> Iterator[dict]:
    import onnxruntime

    from contrastive.interop.export import export

    provider = "CPUExecutionProvider" if options.toy else "CUDAExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise UserError("onnxruntime has no CUDA provider here: pip install onnxruntime-gpu")
    folder, run = Path(options.work, "onnx"), Path(options.work, "quickstart")
    export(str(run), "onnx", folder)
    config, generator = json.loads((folder / "config.json").read_text()), torch.Generator().manual_seed(0)
    size, tokenizer = config["preprocess"]["size"], json.loads((folder / "tokenizer.json").read_text())
    batch, words = 2 if options.toy else 256, tokenizer["padding"]["strategy"]["Fixed"]
    inputs = {
        "image": {"pixels": torch.randn((batch, 3, *size), generator=generator).numpy()},
        "text": {"tokens": torch.randint(1, 200, (batch, words), generator=generator).numpy()},
    }
    row = {}
    for tower, given in inputs.items():
        half, exact = (
            torch.from_numpy(onnxruntime.InferenceSession(str(path), providers=[where]).run(None, given)[0]).float()
            for path, where in (
                (folder / f"{tower}_tower_fp16.onnx", provider),
                (folder / f"{tower}_tower.onnx", "CPUExecutionProvider"),
            )
        )
        row[f"cosine_{tower}"] = round(cosine_similarity(half, exact, dim=-1).min().item(), 6)
    yield row


def _call(options: Options, script: str, *args: str, launch: tuple[str, ...] = ()) -> None:
    """Run a script of the repository. Raises UserError where it fails: it has said why."""
    if options.toy:
        status = in_a_copy(ROOT / script, args)
    else:
        status = subprocess.run([sys.executable, *launch, script, *args], cwd=ROOT).returncode
    if status:
        raise UserError(f"{script} failed; what it said is above")


CHECKS = {check.__name__: check for check in (tests, copies, packed, curriculum, encoder, captioner, resume, onnx)}


if __name__ == "__main__":
    run_benchmark("gpu_checks.py", Options, __doc__, main)
