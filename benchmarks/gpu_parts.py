"""The parts of benchmarks/gpu.py in order of worth: what each runs, at full and at toy size, and what is expected."""

import importlib.util
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DATA = ("simplejpeg", "ftfy")  # what reading pairs takes
PIP_NAMES = {"open_clip": "open_clip_torch", "sklearn": "scikit-learn", "siglip_kernel": "siglip-kernel"}
IN_SUITE = ("pytest", "hypothesis", "webdataset", "datasets", "open_clip", "timm", "peft", "onnx", *DATA)


@dataclass(frozen=True)
class Places:
    """What is filled into the commands."""

    results: str
    """Folder of the rows."""
    work: str
    """Folder of the runs."""
    data: str
    """Folder with flickr8k/ and cifar10/."""
    pairs: str
    """Image-text pairs for single steps: Flickr8k's shards, or rendered scenes."""


@dataclass(frozen=True)
class Part:
    """One line of GPU.md, in a process of its own."""

    name: str
    what: str
    command: str
    """What `python` is given; {results}, {work}, {data} and {pairs} are filled in."""
    expected: str
    minutes: float
    """It is ended after so many."""
    toy: str
    """The same in seconds on a CPU."""
    rows: str = "gpu"
    """The file in results/ that it appends to."""
    told: tuple[str, ...] = ()
    """Fields of its rows to show beside what is expected, or how their names end after a slash: acc1."""
    needs: tuple[str, ...] = ()
    """Modules that may be missing."""
    gpus: int = 1
    after: str | None = None
    """The part whose run it goes on from."""
    data: str | None = None
    """Folder in the data's that it reads, at full size."""
    environment: tuple[tuple[str, str], ...] = ()

    def arguments(self, toy: bool, places: Places) -> list[str]:
        """The command without `python`, word by word."""
        return [word.format(**vars(places)) for word in shlex.split(self.toy if toy else self.command)]

    def missing(self, toy: bool, places: Places, gpus: Callable[[], int]) -> str | None:
        """Return what this machine lacks for it, or None."""
        if not toy and gpus() < self.gpus:
            return f"needs {self.gpus} GPUs, this machine has {gpus()}"
        if absent := [PIP_NAMES.get(name, name) for name in self.needs if importlib.util.find_spec(name) is None]:
            return f"not installed: {', '.join(absent)}"
        if self.data and not toy and not Path(places.data, self.data).is_dir():
            return f"there is no {places.data}/{self.data}; give --data"
        if self.after and not Path(places.work, self.after, "final").is_dir():
            return f"goes on from the run of '{self.after}', which is not there"
        return None

    def found(self, rows: list[dict]) -> str:
        """What the rows of a run say, in a line: '29.1 sigmoid ours; 40.2 softmax ours'."""
        return "; ".join(filter(None, (self._found(row) for row in rows)))

    def _found(self, row: dict) -> str:
        if "error" in row:
            return f"{row.get('rival', '')} failed"
        values = []
        for field in self.told:
            value = next((row[key] for key in row if f"/{key}".endswith(f"/{field}")), None)
            if value is not None:
                values.append(value if isinstance(value, str) else f"{field} {json.dumps(value)}")
        return " ".join(values)


TRAIN = "benchmarks/train.py {results}/gpu pretrain.py"
B16 = "--config configs/cc3m.yaml --data.train scenes --data.tokenizer bpe --model siglip_vit_b_16"
SIGLIP2 = (
    "--config configs/siglip2-b16.yaml --data.train scenes --data.tokenizer bpe --schedule.warmup_steps 20 "
    "--objectives.self_distill.start 0 --objectives.masked.start 0"
)
NATIVE = "--data.train scenes:wide --data.eval scenes:wide-val --model.image.native --data.native.patches 128 196"
TOY_OBJECTIVES = "--objectives caption masked --objectives.masked.hidden 8 --objectives.masked.prototypes 8"
LOSS = "benchmarks/loss.py --results {results}/loss"
STEP = "benchmarks/step.py --results {results}/step --data {pairs}"
CHECK = "benchmarks/gpu_checks.py --results {results}/gpu --work {work}"
TINY_PAIRS = "--model.embed_dim 16 --model.image.width 16 --model.image.depth 1 --model.image.mlp_dim 32"
TOY_RUN = f"--train.steps 4 --train.global_batch_size 8 --evaluation.every 4 --evaluation.limit 8 {TINY_PAIRS}"
TOY_TRAIN = f"{TRAIN} --launch none"
TOLD_LOSS = ("loss", "batch", "rival", "ms_median", "peak_bytes")
TOLD_STEP = ("model", "samples_per_second", "mfu", "ratio")
TOLD_RUN = ("wall_seconds", "samples_per_second_median", "data_wait_median", "final_loss")

PARTS = (
    Part(
        "losses",
        "the losses, B=65,536, D=768, bf16; siglip-kernel beside them where it is installed",
        f"{LOSS} --dtype bf16 --dim 768 --batch 65536",
        "sigmoid ≤ 35 ms (floor 25.1 on an H200), softmax ≤ 46.7 (1.4 × its floor of 33.4)",
        4,
        toy=f"{LOSS} --dim 16 --batch 32 --loss sigmoid --rivals ours --repeats 1 --device cpu",
        rows="loss",
        told=TOLD_LOSS,
    ),
    Part(
        "step",
        "a training step in bf16, compiled",
        f"{STEP} --models ViT-B-16 ViT-B-32 --sizes 224 --batch 256 --precision bf16 --compile ours --rivals ours",
        "B/16: MFU ≥ 0.45",
        4,
        toy=f"{STEP} --models ViT-Ti-16 --sizes 32 --batch 2 --rounds 1 --steps 1 --rivals ours",
        rows="step",
        told=TOLD_STEP,
        needs=DATA,
    ),
    Part(
        "kernels",
        "the losses' kernels on the device: all configurations, CUDA graphs",
        f"{CHECK} --check tests --files tests/losses/test_triton_tiles.py tests/losses/test_kernel_check.py",
        "all pass",
        5,
        toy=f"{CHECK} --check tests --files tests/losses/test_kernel_check.py::test_no_memory_is_not_the_kernels_fault",
        told=("said",),
        needs=("pytest",),
    ),
    Part(
        "step-open-clip",
        "a training step beside open_clip's, both compiled",
        f"{STEP} --models ViT-B-16 ViT-B-32 --sizes 224 --batch 256 --precision bf16 --compile both",
        "ratio ≥ 1.4 for B/16, ≥ 1.6 for B/32",
        8,
        toy=f"{STEP} --models ViT-Ti-16 --sizes 32 --batch 2 --rounds 1 --steps 1",
        rows="step",
        told=TOLD_STEP,
        needs=(*DATA, "open_clip"),
    ),
    Part(
        "losses-million",
        "the losses at a million",
        f"{LOSS} --dtype bf16 --dim 768 --batch 262144 1048576 --rivals ours siglip_kernel --repeats 2",
        "sigmoid ≤ 9 s (floor 6.4) and ≤ 12 GB at 1,048,576",
        5,
        toy=f"{LOSS} --dim 16 --batch 64 --loss sigmoid --rivals ours --repeats 1 --device cpu",
        rows="loss",
        told=TOLD_LOSS,
    ),
    Part(
        "train",
        "training in bf16, B/16, from data to weights",
        f"{TRAIN} {B16} --train.epochs 0.1 --run_folder {{work}}/train",
        "loss falls, data wait < 0.1, > 310 samples/s (published for open_clip on an A100)",
        6,
        toy=f"{TOY_TRAIN} --loss softmax {TOY_RUN} --run_folder {{work}}/train",
        told=TOLD_RUN,
        needs=DATA,
    ),
    Part(
        "objectives",
        "SigLIP 2's objectives in bf16, B/16 at 256, all of them from the start",
        f"{TRAIN} {SIGLIP2} --train.steps 100 --train.global_batch_size 256 --run_folder {{work}}/objectives",
        "all three losses fall; samples/s at least a fifth of `train`'s (its FLOPs are 4.4 times as many)",
        5,
        toy=f"{TOY_TRAIN} {TOY_RUN} {TOY_OBJECTIVES} --run_folder {{work}}/objectives",
        told=TOLD_RUN,
        needs=DATA,
    ),
    Part(
        "native",
        "images of any shape in bf16, B/16: packed, attention by torch's kernel for sequences of several lengths",
        f"{TRAIN} {B16} {NATIVE} --train.steps 200 --run_folder {{work}}/native",
        "loss falls; samples/s at least that of `train` times 0.9 · 196 / 162",
        5,
        toy=f"{TOY_TRAIN} {TOY_RUN} {NATIVE} --run_folder {{work}}/native",
        told=TOLD_RUN,
        needs=DATA,
    ),
    Part(
        "waits",
        "a step that waits for nothing: tests in torch's sync debug mode",
        f"{CHECK} --check tests --files tests/train/test_no_waiting.py",
        "all pass",
        4,
        toy=f"{CHECK} --check tests --files tests/train/test_no_waiting.py"
        "::test_batches_reach_the_device_in_order_and_not_ahead",
        told=("said",),
        needs=("pytest", *DATA),
    ),
    Part(
        "copies",
        "a step under torch.profiler: waits of the host, and the streams of copies",
        f"{CHECK} --check copies --data {{pairs}}",
        "no wait, copies on a stream of their own",
        3,
        toy=f"{CHECK} --check copies --data scenes --toy",
        told=("waits", "copy_streams", "kernel_streams"),
        needs=DATA,
    ),
    Part(
        "cifar10",
        "a ViT on CIFAR-10",
        "benchmarks/train.py {results}/gpu train_classifier.py --config configs/classifier-cifar10-gpu.yaml"
        " --data {data}/cifar10/train-*.parquet --data.eval {data}/cifar10/test.parquet --run_folder {work}/cifar10",
        "≥ 93 % in ≤ 5 minutes",
        8,
        toy="benchmarks/train.py {results}/gpu train_classifier.py --launch none --data digits --train.steps 4"
        " --train.global_batch_size 8 --evaluation.limit 8 --model.image.width 24 --model.image.depth 1"
        " --model.image.mlp_dim 32 --run_folder {work}/cifar10",
        told=(*TOLD_RUN, "acc1"),
        needs=DATA,
        data="cifar10",
    ),
    Part(
        "quickstart",
        "the quickstart",
        f"{TRAIN} --loss sigmoid --run_folder {{work}}/quickstart",
        "the CPU's accuracy (96.5 / 92.0 %) within 2 points",
        5,
        toy=f"{TOY_TRAIN} --loss sigmoid {TOY_RUN} --run_folder {{work}}/quickstart",
        told=(*TOLD_RUN, "scenes:test/acc1", "scenes:heldout/acc1"),
        needs=DATA,
    ),
    Part(
        "packed",
        "packed texts by torch's attention over sequences of several lengths, against padded ones",
        f"{CHECK} --check packed --data {{pairs}}",
        "× ≥ 1.4 for B/32, ≥ 1.1 for B/16",
        4,
        toy=f"{CHECK} --check packed --data scenes --toy",
        told=("model", "ratio"),
        needs=DATA,
    ),
    Part(
        "curriculum",
        "a curriculum of image sizes, blocks compiled",
        f"{CHECK} --check curriculum",
        "samples/s of the first stage well above the last's",
        5,
        toy=f"{CHECK} --check curriculum --toy",
        told=("samples_per_second_first", "samples_per_second_last"),
        needs=DATA,
    ),
    Part(
        "losses-fp32",
        "float32: Triton's products against cuBLAS's, and which blocks are chosen",
        f"{LOSS} --dtype fp32 --dim 768 --batch 16384",
        "if share_of_matmul is far below bf16's, AllPairs.tiles should leave float32 to plain torch",
        4,
        toy=f"{LOSS} --dtype fp32 --dim 16 --batch 32 --loss softmax --rivals ours --repeats 1 --device cpu",
        rows="loss",
        told=("loss", "rival", "ms_median", "share_of_matmul"),
        environment=(("TRITON_PRINT_AUTOTUNING", "1"),),
    ),
    Part(
        "encoder",
        "the image encoder in bf16, compiled by inductor at two sizes",
        f"{CHECK} --check encoder",
        "no graph break; cosine to fp32 ≥ 0.9995; layer=-2 no slower than the tower",
        4,
        toy=f"{CHECK} --check encoder --toy",
        told=("image_size", "cosine_min", "ms", "tower_ms"),
    ),
    Part(
        "captioner",
        "the captioner on the quickstart's encoder",
        f"{CHECK} --check captioner",
        "≥ 94 % of captions right on scenes:test in under two minutes",
        5,
        toy=f"{CHECK} --check captioner --toy",
        told=("wall_seconds", "named_right"),
        needs=DATA,
        after="quickstart",
    ),
    Part(
        "probe",
        "the linear probe's sweep",
        "benchmarks/probe.py --results {results}/probe --device cuda",
        "the CPU's accuracy, sweep under a second",
        3,
        toy="benchmarks/probe.py --results {results}/probe --samples 200 --dim 16 --rounds 1 --rivals ours",
        rows="probe",
        told=("rival", "seconds_sweep_median", "test_acc1"),
        needs=("sklearn",),
    ),
    Part(
        "resume",
        "the quickstart killed half-way and resumed, beside the undisturbed one",
        f"{CHECK} --check resume",
        "largest difference of the loss ≤ 1e-3 (atomic adds keep it from being bit-exact)",
        6,
        toy=f"{CHECK} --check resume --toy",
        told=("loss_difference", "resumed_at"),
        needs=DATA,
        after="quickstart",
    ),
    Part(
        "onnx",
        "ONNX float16 by onnxruntime's CUDA provider",
        f"{CHECK} --check onnx",
        "cosine to fp32 ≥ 0.999: on a CPU float16 is computed largely in float32",
        4,
        toy=f"{CHECK} --check onnx --toy",
        told=("cosine_image", "cosine_text"),
        needs=("onnx", "onnxscript", "onnxruntime", *DATA),
        after="quickstart",
    ),
    Part(
        "ring",
        "ring against gather over NCCL",
        f"{LOSS} --ranks 2 --dtype bf16 --dim 768 --batch 65536 1048576",
        "decides GATHER_BYTES in contrastive/distributed/collectives.py, now a guess",
        6,
        toy=f"{LOSS} --ranks 2 --dim 16 --batch 32 --loss sigmoid --rivals ours --repeats 1 --device cpu",
        rows="loss",
        told=TOLD_LOSS,
        gpus=2,
    ),
    Part(
        "fsdp",
        "FSDP2 over NCCL, B/16",
        f"{TRAIN} {B16} --train.steps 200 --run_folder {{work}}/fsdp"
        " '--launch=--multi_gpu --num_processes 2 --use_fsdp --fsdp_version 2'",
        "the loss of `train` at the same step, less memory a GPU",
        6,
        toy=f"{TRAIN} --loss softmax {TOY_RUN} --run_folder {{work}}/fsdp"
        " '--launch=--num_processes 2 --use_fsdp --fsdp_version 2'",
        told=TOLD_RUN,
        needs=DATA,
        gpus=2,
    ),
    Part(
        "tests",
        "the whole suite",
        f"{CHECK} --check tests",
        "all pass",
        25,
        toy=f"{CHECK} --check tests --files tests/test_config.py",
        told=("said",),
        needs=IN_SUITE,
    ),
)
