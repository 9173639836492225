"""What `medct app` does."""

import argparse
import os

from accelerate import PartialState

from medct.app.page import import_gradio, serve
from medct.app.scans import Engine
from medct.cli.commands import MODEL_VARIABLE, load_pipeline, model_of
from medct.common.errors import OK
from medct.publishing.loading import PHANTOM_BASE
from medct.reporting.findings import algorithm_of


def run_app(args: argparse.Namespace) -> int:
    import_gradio()  # refuses at once
    if args.adapter is None and not (args.model or os.environ.get(MODEL_VARIABLE)):
        args.model = str(PHANTOM_BASE)
    pipe = load_pipeline(args, PartialState(cpu=args.cpu).device)
    algorithm = algorithm_of(pipe, model_of(args), args.adapter, args.adapter_revision)
    serve(Engine(pipe, algorithm), args.host, args.port, args.max_file_mb * 2**20)
    return OK
