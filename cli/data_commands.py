"""What `medct overview` and `medct prepare` do. Each takes the parsed arguments and returns the exit status."""

import argparse
import json
import warnings

from medct.common.errors import OK
from medct.common.lock import only_run
from medct.configuration_medct import MedCTConfig
from medct.data import ALL, open_source, open_splits
from medct.data.label_space import LabelTable, read_label_flags
from medct.data.overview import as_text, contact_sheet, sheet_format, summarize
from medct.data.prepare import prepare
from medct.data.prepared import MANIFEST
from medct.data.sources import DataError, Source, joined
from medct.data.tables import TUNE_SHARE
from medct.errors_medct import first_line
from medct.processing_medct import MedCTProcessor
from medct.publishing.loading import load_config
from medct.publishing.push import push_shards


def show_overview(args: argparse.Namespace) -> int:
    if not args.samples:
        return _show_overview(args)
    sheet_format(args.sheet)  # refuses, before anything is read, what is not a picture
    with only_run(args.sheet):
        return _show_overview(args)


def _show_overview(args: argparse.Namespace) -> int:
    config, mapping = _config_of(args)
    processor = None
    if args.model is not None:
        try:
            processor = MedCTProcessor.from_pretrained(args.model, revision=args.model_revision)
        except (OSError, ValueError) as error:
            raise DataError(f"{args.model}: no processor ({first_line(error)}) Pass a MedCT model.") from error
        if remark := processor.remark_on_words(config.label_prompts(), config.label_names):
            warnings.warn(remark, stacklevel=1)
    options = {"version": args.version, "revision": args.revision, "reconstructions": args.reconstructions}
    options["mapping"] = mapping
    splits: dict[str, Source] = {}
    if args.split == ALL:
        splits = open_splits(args.source, config, limit=args.limit, **options)
        source = joined(list(splits.values()), f"studies of {', '.join(splits)} of {args.source}")
    else:
        source = open_source(args.source, args.split, config, limit=args.limit, **options)
    counts = {split: each.num_studies for split, each in splits.items()}
    summary = summarize(source, processor and processor.tokenizer, counts)
    summary["unreadable_samples"] = {}
    if args.samples:
        unreadable = contact_sheet(source, config, args.sheet, args.samples, args.seed)
        summary["unreadable_samples"] = {study.id: study.reason for study in unreadable}
    print(json.dumps(summary, indent=2) if args.json else as_text(summary))
    if args.samples and not args.json:
        bad = len(summary["unreadable_samples"])
        print(f"\n{args.sheet}: {min(args.samples, summary['num_studies'])} samples, {bad} of them unreadable")
    return OK


def prepare_shards(args: argparse.Namespace) -> int:
    if args.rank >= args.world_size:
        raise DataError(f"--rank is {args.rank}, with --world_size {args.world_size}. Ranks count from 0.")
    config, mapping = _config_of(args)
    tune_share = TUNE_SHARE if args.tune_share is None else args.tune_share
    # All reconstructions of a scan are in its group, whichever of them are prepared.
    options = {"limit": args.limit, "version": args.version, "revision": args.revision}
    options |= {"mapping": mapping, "tune_share": tune_share}
    sources = {split: open_source(args.source, split, config, **options) for split in args.splits}
    settings = {"source": args.source, "tune_share": tune_share}
    names = ("limit", "version", "revision", "reconstructions", "studies_per_shard", "compression")
    settings |= {name: getattr(args, name) for name in names}
    work = (args.rank, args.world_size, args.retry_skipped, args.max_skipped_share)
    manifest = prepare(sources, config, args.output, settings, *work)
    if manifest is None:
        print(f"Done here; other processes are still at work. {args.output} is complete when it has a {MANIFEST}.")
        return OK
    counts = [f"{found['num_studies']} {split}" for split, found in manifest["splits"].items()]
    skipped = sum(len(found["skipped"]) for found in manifest["splits"].values())
    print(f"{args.output}: {', '.join(counts)} studies, {skipped} skipped, see {MANIFEST}.")
    if args.push_to_hub:
        print(f"Uploaded: {push_shards(args.output, args.push_to_hub)}")
    return OK


def _config_of(args: argparse.Namespace) -> tuple[MedCTConfig, LabelTable | None]:
    """The model's configuration with what it is asked, and what the data call it."""
    config = MedCTConfig() if args.model is None else load_config(args.model, revision=args.model_revision)
    return read_label_flags(config, args.labels, args.templates, args.mapping)
