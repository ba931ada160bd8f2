"""Names, summaries and options of the commands. The work is in the modules of their names."""

from __future__ import annotations

from ..recipe import DetectionRecipe, Recipe
from ..settings import (
    DETECTORS,
    EXPORT_FORMATS,
    TUNED_OPS,
    BenchSettings,
    ScaleSettings,
    SearchSettings,
    StudySettings,
    TuneSettings,
)
from .common import CIRCLE, DEVICE, IMAGES, IMG_SIZE, METRICS, QUIET, SCORING, SEED, WHAT
from .options import (
    Command,
    Option,
    bounds,
    choice,
    choices_per_dimension,
    flag,
    fraction,
    image_size,
    integer,
    keywords,
    milliseconds,
    number,
    numbers,
    options_of,
    positive,
    seed,
    strings,
    switch,
    text,
)

OUT = Option("out", text, None, "run directory, made or continued", "DIR", required=True)
JSON = Option("json", flag, False, "print strict JSON and nothing else", flag=True)
SCHEDULE = Option(
    "schedule",
    text,
    "1",
    "epochs:reduction of tokens per side, 40:4,30:2,230:1; fractions, 0.3:4,0.7:1; table6-40, -80, -120; "
    "1 = full tokens",
    "TEXT",
)
TRACKERS = (
    Option("log_wandb", flag, False, "report to Weights & Biases, project WANDB_PROJECT", flag=True),
    Option("log_mlflow", flag, False, "report to MLflow, at MLFLOW_TRACKING_URI", flag=True),
)
MODEL_KWARGS = Option(
    "model_kwargs",
    keywords,
    None,
    "further arguments of the network: --model-kwargs attn_scale=true; may be repeated",
    "NAME=VALUE",
    repeated=True,
)
SPACE = Option(
    "space",
    choices_per_dimension,
    {},
    "choices of a dimension (K1..K4, S1..S3, E1..E4, heads), instead of those of Table 1: --space K1=8 --space "
    "heads=16,32; may be repeated",
    "NAME=CHOICES",
    repeated=True,
)


def _what(name: str, help: str = WHAT) -> Option:
    return Option(name, text, None, help, positional=True, required=True)


ENV = Command(
    name="env",
    summary="Print versions, the build report, and every op with every backend: available, or the reason it is not.",
    options=(
        Option("json", flag, False, "print strict JSON on stdout", flag=True),
        Option("require", text, None, "exit with 1 unless this backend can run: cuda, triton, cpu, ...", "NAME"),
    ),
    epilog="example: asvit-fast env --require cuda && asvit-fast search ...",
)

SCORE = Command(
    name="score",
    summary="Score a network without training it: length distortion, curvature, NTK condition number.",
    options=(_what("what"), METRICS, *SCORING, JSON),
    epilog="example: asvit-fast score '8,2,3|4,1,2|4,1,4|4,1,6|32' --img-size 224 --repeats 5",
)

BENCH = Command(
    name="bench",
    summary="Measure how fast networks run here: as their library makes them, compiled, and through accelerate.",
    options=(
        Option(
            "what",
            strings,
            None,
            f"one or more of: {WHAT}; hf:NAME of transformers (hf:swin, nothing is downloaded), module:function; or op "
            f"and names of ops: {', '.join(TUNED_OPS)}",
            positional=True,
            required=True,
            several=True,
        ),
        *options_of(BenchSettings),
        Option(
            "shape",
            strings,
            (),
            "shape of an op: window_attention ROWSxCOLUMNSxHEAD_DIM, and a b for bias and shift (7x7x32b); patch_embed "
            "PATCHxCHANNELS (4x96); patch_merge KERNELxCHANNELSxOUTPUTSxSIDE (2x96x192x56); may be repeated",
            "TEXT",
            repeated=True,
        ),
        Option("csv", text, None, "add the rows to this file after every case", "FILE"),
        Option("json", text, None, "the same as JSON; - prints strict JSON and nothing else", "FILE"),
        QUIET,
    ),
    epilog="example: asvit-fast bench swin_tiny_patch4_window7_224 asvit_small --batch-sizes 1,8,64 --against "
    "source,compiled,sdpa --csv bench.csv\n"
    "         asvit-fast bench op window_attention --shape 7x7x32b --dtype bf16\n"
    "         asvit-fast report bench.csv",
)

SEARCH = Command(
    name="search",
    summary="Find a seed topology without training, by policy gradient on the scores.",
    options=(
        OUT,
        *options_of(SearchSettings),
        *SCORING,
        Option("params", bounds, None, "window of the number of parameters: LOW:HIGH, :10M or 1M:", "LO:HI"),
        Option("flops", bounds, None, "window of the number of multiply-adds per image: LOW:HIGH, :1G or 1M:", "LO:HI"),
        Option(
            "latency_ms",
            milliseconds,
            None,
            "window of the milliseconds of a forward pass of --batch-size images on --device, measured here: LOW:HIGH",
            "LO:HI",
        ),
        Option("max_params", number, None, "largest number of parameters: the high end of --params", "NUMBER"),
        SPACE,
        Option(
            "baseline",
            choice("random"),
            None,
            "random = also score as many topologies drawn uniformly, for comparison; a finished run may add them",
            "NAME",
        ),
        QUIET,
    ),
    epilog="example: asvit-fast search --out runs/search --images photos/ --steps 500",
    resumable=True,
)

SCALE = Command(
    name="scale",
    summary="Grow a topology in depth and width without training, up to a number of parameters.",
    options=(
        _what("topology", f"what has the topology to start from: {WHAT}"),
        OUT,
        *options_of(ScaleSettings),
        *SCORING,
        QUIET,
    ),
    epilog="example: asvit-fast scale '8,2,3|4,1,2|4,1,4|4,1,6|32' --out runs/scale --max-params 30M",
    resumable=True,
)

TRAIN = Command(
    name="train",
    summary="Train a network, coarse tokens first (progressive re-tokenization); also under torchrun.",
    options=(
        _what("what"),
        Option("data", text, None, "folder of images, a subfolder per class in train/ and val/", "DIR", required=True),
        OUT,
        SCHEDULE,
        Option("epochs", integer(1), 300, "epochs of the whole training; a run may go on with more", "N"),
        Option("img_size", image_size, 224, "image size in pixels: a side, or HEIGHTxWIDTH", "PIXELS"),
        Option("num_classes", integer(1), None, "number of classes; without it, as many as the data has", "N"),
        MODEL_KWARGS,
        Option(
            "initial_checkpoint",
            text,
            "",
            "weights to start from: a training's folder, or a file in timm's format",
            "PATH",
        ),
        Option("resume", text, "", "checkpoint of timm's train.py whose training this one continues", "FILE"),
        DEVICE,
        *options_of(Recipe),
        *TRACKERS,
        QUIET,
    ),
    epilog="example: asvit-fast train asvit_small --data imagenet/ --schedule 40:4,30:2,230:1 --out runs/train",
    resumable=True,
)

NOT_OF_A_STUDY = (  # whose trainings run alone, with full tokens, and keep accuracies only; their seed is the study's
    *("seed", "parallel", "phase_batch_sizes", "eval_interval", "log_interval"),
)
STUDY = Command(
    name="study",
    summary="Find out which measures of untrained networks predict accuracy on your data; also under torchrun.",
    options=(
        Option("data", text, None, "folder of images, a subfolder per class in train/ and val/", "DIR"),
        OUT,
        *options_of(StudySettings),
        Option("epochs", integer(1), 300, "epochs of each training", "N"),
        Option(
            "accuracies",
            text,
            None,
            "CSV of topology,accuracy of trainings done elsewhere, instead of --data; any unit, larger is better",
            "FILE",
        ),
        Option("candidates", text, None, "CSV with a column topology, such as a search's top.csv: no sample", "FILE"),
        SPACE,
        IMG_SIZE,
        *CIRCLE,
        IMAGES,
        SEED,
        DEVICE,
        *(option for option in options_of(Recipe) if option.name not in NOT_OF_A_STUDY),
        QUIET,
    ),
    epilog="example: asvit-fast study --data photos/ --topologies 87 --epochs 30 --out runs/study\n"
    "         asvit-fast study --accuracies trained.csv --img-size 224 --out runs/study",
    resumable=True,
)

EVAL = Command(
    name="eval",
    summary="Top-1, top-5 and loss of a trained network on labelled images, as timm's validation counts them.",
    options=(
        _what(
            "checkpoint",
            "a training's folder, a checkpoint in timm's format, an exported folder, or weights with --model",
        ),
        Option(
            "data",
            text,
            None,
            "folder that holds the split's folder, or where its library keeps it",
            "DIR",
            required=True,
        ),
        Option("dataset", text, "", "timm's name of the data set: folder, tar, hfds/NAME, wds/NAME, tfds/NAME", "NAME"),
        Option(
            "split", text, "validation", "split, or subfolder; '' for the folder itself", "NAME", parameter="val_split"
        ),
        Option(
            "class_map",
            text,
            "",
            "file that gives class folders their numbers: a name a line, or timm's mapping",
            "FILE",
        ),
        Option("batch_size", integer(1), 256, "number of images in a batch, per process", "N"),
        Option(
            "workers",
            integer(0),
            None,
            "number of processes that read images; 0: this one; without it, as training has it",
            "N",
        ),
        Option("img_size", image_size, None, "image size in pixels; without it, the checkpoint's", "PIXELS"),
        Option(
            "crop_pct",
            positive,
            None,
            "part of the image that is kept, a number up to 1; without it, the checkpoint's",
            "X",
        ),
        Option("crop_mode", text, "", "center, squash, border; without it, the checkpoint's", "NAME"),
        Option("interpolation", text, "", "bicubic, bilinear, ...; without it, the checkpoint's", "NAME"),
        *(
            Option(name, numbers, None, f"{what} of the pixels; without it, the checkpoint's", "X", several=True)
            for name, what in (("mean", "mean"), ("std", "standard deviation"))
        ),
        Option("amp", flag, False, "mixed precision", flag=True),
        Option("amp_dtype", choice("bfloat16", "float16"), "bfloat16", "half type of mixed precision", "NAME"),
        Option("use_ema", flag, False, "the moving average of the weights", flag=True),
        Option(
            "token_reduction",
            integer(1),
            1,
            "1, 2 or 4: how many times fewer tokens per side, the number that the network is measured at",
            "N",
        ),
        Option("model", text, "", "timm's name of the network, for a file of weights alone", "NAME"),
        Option(
            "model_kwargs",
            keywords,
            {},
            "argument of the network, text or number, such as topology=TEXT or depth=2; may be repeated",
            "NAME=VALUE",
            repeated=True,
        ),
        Option("num_classes", integer(1), None, "number of the network's outputs, for a file of weights alone", "N"),
        DEVICE,
        JSON,
        QUIET,
    ),
    epilog="example: asvit-fast eval runs/train --data imagenet --use-ema\n"
    "Under torchrun the processes share the images, and each image counts once.",
)

COCO = Option(
    "data", text, None, "folder in COCO's format: instances_NAME.json, or in annotations/; NAME/", "DIR", required=True
)
USE_EMA = Option("use_ema", flag, False, "the moving average of the weights", flag=True)

DETECT_TRAIN = Command(
    name="detect train",
    summary="Train a detector on COCO's format, also under torchrun; asvit-fast detect WHAT means the same.",
    options=(
        _what("what"),
        COCO,
        OUT,
        Option("detector", choice(*DETECTORS), DETECTORS[-1], f"one of {', '.join(DETECTORS)}", "NAME"),
        SCHEDULE,
        Option("epochs", integer(1), 36, "epochs of the whole training; a run may go on with more", "N"),
        Option("img_size", image_size, 224, "pixels that the backbone's weights are for: windows, embedding", "PIXELS"),
        Option("out_channels", integer(1), 256, "number of channels of the feature pyramid", "N"),
        Option("windows", choice("fixed", "split"), "fixed", "As-ViT's windows: fixed tokens, or split maps", "NAME"),
        Option("norm", switch, True, "a norm on each map before the pyramid", "true|false"),
        Option(
            "frozen_stages",
            integer(0, 4),
            0,
            "number of stages that keep their weights",
            "N",
        ),
        MODEL_KWARGS,
        Option(
            "detector_kwargs",
            keywords,
            None,
            "choices of the detector, as torchvision names them: --detector-kwargs box_score_thresh=0.01; may be "
            "repeated",
            "NAME=VALUE",
            repeated=True,
        ),
        Option(
            "initial_checkpoint",
            text,
            "",
            "weights to start from, of a classifier or a detector: a training's folder, or a file",
            "PATH",
        ),
        DEVICE,
        *options_of(DetectionRecipe),
        *TRACKERS,
        QUIET,
    ),
    epilog="example: asvit-fast detect train runs/train --data coco/ --out runs/detect\n"
    "See also: asvit-fast detect eval --help, asvit-fast detect show --help",
    resumable=True,
)

DETECT_EVAL = Command(
    name="detect eval",
    summary="COCO's average precision of a trained detector: boxes, and masks where it has them.",
    options=(
        _what("checkpoint", "the folder of asvit-fast detect train, or a checkpoint of one"),
        COCO,
        Option("split", text, "val", "NAME of instances_NAME*.json", "NAME", parameter="val_split"),
        Option("windows", choice("", "fixed", "split"), "", "As-ViT's windows; without it, the checkpoint's", "NAME"),
        Option("min_size", integer(32), None, "short side in pixels; without it, the checkpoint's", "N"),
        Option("max_size", integer(32), None, "longest side in pixels; without it, the checkpoint's", "N"),
        Option("workers", integer(0), None, "number of processes that read images; 0: this one", "N"),
        Option("amp", flag, False, "mixed precision", flag=True),
        Option("amp_dtype", choice("bfloat16", "float16"), "bfloat16", "half type of mixed precision", "NAME"),
        USE_EMA,
        Option("results", text, None, "write every detection there, in COCO's format of results", "FILE"),
        DEVICE,
        JSON,
        QUIET,
    ),
    epilog="example: asvit-fast detect eval runs/detect --data coco/\n"
    "Under torchrun the processes share the images, and each image counts once.",
)

DETECT_SHOW = Command(
    name="detect show",
    summary="Draw what a trained detector finds in images: boxes, masks, classes and scores, into PNG files.",
    options=(
        _what("checkpoint", "the folder of asvit-fast detect train, or a checkpoint of one"),
        Option("images", strings, None, "image files", positional=True, required=True, several=True),
        Option("out", text, "detections", "folder of the PNG files", "DIR"),
        Option("score", fraction, 0.5, "least score of what is drawn, a probability", "X"),
        USE_EMA,
        DEVICE,
        QUIET,
    ),
    epilog="example: asvit-fast detect show runs/detect photo.jpg --out pictures",
)

REPORT = Command(
    name="report",
    summary="Draw a run: PNG plots and one self-contained report.html inside its directory; prints the page's path.",
    options=(
        _what(
            "directory",
            "run directory of search, scale, train, study or detect; a folder of them named so; a folder of several "
            "searches or growths, which are compared by their rules; or the CSV or JSON file of bench",
        ),
    ),
    epilog="example: asvit-fast report runs/search",
)

EXPORT = Command(
    name="export",
    summary="Write a topology or a trained network for timm.create_model('local-dir:...'), ONNX or torch.export.",
    options=(
        _what("source"),
        Option("to", text, None, "folder to write, new or empty or an earlier export", "DIR", required=True),
        Option("format", choice(*EXPORT_FORMATS), "timm", f"one of {', '.join(EXPORT_FORMATS)}", "NAME"),
        Option("seed", seed, 0, "seed (a whole number) of fresh weights", "N"),
        Option(
            "num_classes", integer(0), None, "number of outputs, 0 = none; without it the training's, else 1000", "N"
        ),
        Option(
            "img_size",
            image_size,
            None,
            "image size in pixels: a side, or HEIGHTxWIDTH; without it the run's, else 224",
            "PIXELS",
        ),
        Option("use_ema", flag, False, "of a training, the moving average of the weights", flag=True),
        Option(
            "push_to_hub", text, "", "upload to the Hugging Face Hub as well, with the token kept there", "OWNER/NAME"
        ),
    ),
    epilog="example: asvit-fast export runs/scale --to model\n"
    "         asvit-fast export runs/train --to model --format onnx",
)

TUNE = Command(
    name="tune",
    summary="Refine the tiles of Triton kernels for the GPU at hand; models never tune anything themselves.",
    options=(
        *options_of(TuneSettings),
        IMG_SIZE,
        DEVICE,
        Option("again", flag, False, "tune what the table already has, too", flag=True),
        Option("dry_run", flag, False, "list what would be tuned, and stop; needs no GPU", flag=True),
        QUIET,
    ),
    epilog="example: asvit-fast tune --dtypes bf16 --topology '8,2,3,3|4,1,2,1|4,1,4,4|4,1,6,2|32,88'\n"
    "The table is in the user's cache folder, or in the folder that ASVIT_FAST_TILES names.",
    resumable=True,
)

COMMANDS = {
    command.name: command
    for command in (
        *(ENV, BENCH, SCORE, SEARCH, SCALE, TRAIN, STUDY, EVAL),
        *(DETECT_TRAIN, DETECT_EVAL, DETECT_SHOW, REPORT, EXPORT, TUNE),
    )
}
