"""What to type next after an error.

The core names a remedy and the facts that its text needs; the texts, with commands and options, are here.
A fact called `setting` is the name of an option.
"""

from scala_cli.errors import ScalaError

REMEDIES = {
    # options
    "try": "Try --{setting} {value}",
    "example": "For example: --{setting} {value}",
    "leave_out": "Leave out --{setting}.",
    "leave_out_one": "Leave out --{setting}, or {other}.",
    "see_options": "See scala finetune -h",
    "report": "Please report this with the output of: scala env",
    # where to write
    "other_file": "Choose another name: -o FILE",
    "other_file_or_force": "Choose another name with -o FILE, or replace it: --force",
    "other_directory": "Choose another one: -o DIR",
    "other_directory_or_force": "Choose another one with -o DIR, or replace it: --force",
    "directory_within": "Name a directory in it: -o DIR",
    "other_place": "Choose another directory: --output DIR",
    "name_file": "Use this name: -o {file}",
    # models and their weights
    "convert_first": "Convert it first: scala convert {model}",
    "convert_directory": "Leave out the file: scala convert {model}",
    "convert_example": "For example: scala convert deit_s",
    "make_checkpoint": "Make one: scala convert deit_s -o DIR",
    "other_weights": (
        "Convert a file you have: scala convert MODEL --weights FILE; "
        "or random weights: scala convert --scratch"
    ),
    "name_weights": "Name the file: --weights FILE",
    "name_architecture": "Name it: scala convert deit_s --weights FILE",
    "name_heads": "Give the number: scala convert FILE --num-heads N",
    "leave_as_it_is": "Leave out --num-classes, --img-size, --patch-size and --layout.",
    "keep_sizes": "Leave out --weights, --img-size and --patch-size, or name the model it came from.",
    "image_size": "Try --img-size {size}, or another --patch-size.",
    "add_classes": "Add one: scala convert MODEL --num-classes N",
    "normalise_yourself": "Normalise the images yourself: leave out --with-preprocess.",
    # widths
    "several_ratios": "Several widths are --ratio 0.25 --ratio 0.5, in training --ratios 0.25,0.5.",
    "trained_ratio": "Try --ratio {trained}, or train it: scala finetune ... --ratios {wanted},...",
    "closest_ratio": "Relax the limit, take that one (--ratio {ratio}), or give a family other --ratios.",
    # images
    "data_dir": "Name its directory: --data-dir DIR",
    "known_data": (
        "Give a folder (to train and judge a classifier: class folders in train/ and val/), "
        "torch/cifar10 with --data-dir, or digits."
    ),
    "tar_files": "Give tar files as --data 'DIR/{{000..010}}.tar' or --data DIR.",
    "hold_out": "Give a folder with train/ and val/; or, to train, hold out some images: --holdout 0.1",
    "no_classes": "Give images of two classes or more; or --probe recall, which needs none.",
    "larger_holdout": "Give more images, or a larger --holdout.",
    "skip_corrupt": "Repair or remove it, or pass --on-corrupt skip.",
    "train_head": "Train a head: scala finetune CKPT --data DIR --task classification",
    "same_classes": (
        "Train a head for them: scala finetune CKPT --data {data}; "
        "or, if they are the same classes under other names: scala convert MODEL --labels FILE"
    ),
    # memory and processes
    "smaller_batch": "Give a smaller --batch-size (-b).",
    "smaller_step": (
        "Try --grad-accum-steps 2, --grad-checkpointing, or in a new run a smaller --batch-size (-b)."
    ),
    "other_runtime": "Leave that runtime out, or try a smaller --batch-size.",
    "fewer_workers": "Use fewer of them: --workers 1, or 0 to read in the main process.",
    "shared_memory": (
        "Read in the main process: --workers 0. "
        "Under docker, allow more shared memory: docker run --shm-size 1g."
    ),
    "one_process": "Start it without torchrun: scala compare ...",
    # training
    "name_or_train": "Name one, or train one: scala finetune deit_s --data DIR",
    "start_run": "Start it: scala finetune MODEL --data DIR",
    "train_family": "Use it as it is: scala finetune {model} --data DIR",
    "from_weights": "Start a new run from its weights: scala finetune {weights} --data DIR",
    "resume": "Resume it: scala finetune --resume {run}",
    "resume_or_slice": "Resume it: scala finetune --resume {run}; or cut it: scala slice {run}",
    "resume_together": "Then resume: torchrun ... -m scala_cli finetune --resume RUN",
    "slim_tokens": "Slim its tokens first: scala finetune MODEL --data DIR --method sit",
    "distilled": "Leave out --teacher-model, or start from a model that has one: deit_s_distilled.",
    "lower_rate": "Lower --lr (now {rate:g}). Earlier saves are intact.",
    "whole_method": "Leave it out of a method that has it: --methods paper has all of the paper's parts.",
    "learn_classes": (
        "Learn them once: scala finetune MODEL --data DIR --ratios 1 --method {method} --order none "
        "-o full; then scala compare full/last --ratios 0.25,0.5,0.75,1"
    ),
    # the Hub
    "name_repository": "Name it as in: scala push [CKPT] org/name",
    "log_in": "Log in: hf auth login; or set HF_TOKEN",
    "check_token": "Check its name, and that your token may write there: hf auth whoami",
    "mend_card": "Write the folder with --dry-run, correct its README.md, and upload it: hf upload",
    "upload_later": "Write the folder with --dry-run, and upload it later: hf upload",
}
"""Text of each remedy by name; braces hold the facts of the error."""


def advice(error: ScalaError) -> str:
    """Returns an error's hint, followed by the text of its remedy."""
    text = REMEDIES[error.remedy].format(**error.facts) if error.remedy else ""
    return " ".join(part for part in (error.hint, text) if part)
