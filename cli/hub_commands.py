"""What `medct convert` and `medct push` do. Each takes the parsed arguments and returns the exit status."""

import argparse

from medct.adapters_medct import CONFIG_FILE
from medct.common.errors import OK
from medct.publishing.cards import read_json
from medct.publishing.convert_ct_clip_to_hf import convert
from medct.publishing.push import PushError, left_out, push_adapter, push_model


def convert_checkpoint(args: argparse.Namespace) -> int:
    dropped = convert(args.checkpoint, args.output, args.tokenizer, args.sizes)
    for reason, keys in dropped.items():
        print(f"dropped {len(keys):4d}: {reason}")
        print("".join(f"    {key}\n" for key in keys), end="")
    config = read_json(args.output, "config.json")
    loaders = {code.split(".")[-1]: name for name, code in config["auto_map"].items()}
    load = f"{loaders[config['architectures'][0]]}.from_pretrained({str(args.output)!r}, trust_remote_code=True)"
    print(f"Wrote {args.output}. Load it with {load}.")
    return OK


def push_folder(args: argparse.Namespace) -> int:
    about = {"base": args.base, "base_revision": args.base_revision, "license": args.license}
    if (args.folder / CONFIG_FILE).is_file():
        url = push_adapter(args.folder, args.repo_id, private=args.private, **about)
    elif args.folder.is_dir() and (given := [f"--{name}" for name, value in about.items() if value]):
        flags = " and ".join(given)
        raise PushError(f"{args.folder} is not an adapter, and only adapters take {flags}. Leave out {flags}.")
    else:
        url = push_model(args.folder, args.repo_id, private=args.private)
    for name in left_out(args.folder):
        print(f"not pushed: {name}")
    print(url)
    return OK
