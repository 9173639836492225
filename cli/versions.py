"""What `medct evaluate` scores: the model with its adapter and, beside it, what it is compared with."""

import argparse
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from medct.adapters_medct import adapter_fingerprint, as_described, fingerprint
from medct.configuration_medct import MedCTConfig
from medct.data.label_space import LabelTable, also_asked
from medct.evaluation.operating_points import YOUDEN, Points
from medct.evaluation.predictions import short_names
from medct.evaluation.scoring import Texts, about_model, prompts_for
from medct.pipeline_medct import CTPipeline

BASE = "base"


@dataclass(frozen=True)
class Version:
    """A version of the model that is scored.

    Args:
        become: Turns the model into it.
        prompts: What it is asked.
        about: Where it came from.
        points: Operating points that it brings along.
        calibration: Likewise, slope and intercept by label.
        asks: The prompts as sentences.
    """

    become: Callable[[], None]
    prompts: list[Texts]
    about: dict[str, Any]
    points: Points = field(default_factory=dict)
    calibration: dict[str, list[float]] = field(default_factory=dict)
    asks: list[list[str]] = field(default_factory=list)

    @classmethod
    def of(
        cls, pipe: CTPipeline, config: MedCTConfig, become: Callable[[], None], about: dict[str, Any], **chosen: Any
    ) -> "Version":
        """A version that is asked what a configuration says.

        Args:
            pipe: Holds the model and its processor.
            config: Has the labels and prompts.
            become, about: See `Version`.
            chosen: Its `points` and `calibration`.
        """
        prompts = prompts_for(pipe.model, pipe.processor, config)
        return cls(become, prompts, about, asks=config.label_prompts() if prompts else [], **chosen)


def versions_of(
    args: argparse.Namespace, pipe: CTPipeline, config: MedCTConfig, mappings: Mapping[str, LabelTable | None]
) -> dict[str, Version]:
    """What is scored, by name: the model with its adapter and, first, what it is compared with.

    Args:
        args: Parsed and settled.
        pipe: Holds the model, with the adapter.
        config: What is asked, but where an adapter was trained to be asked for the same labels in other words.
        mappings: Of the sources; what they have prompts for, an adapter is asked in these.
    """
    base = {"model": args.model, "revision": args.revision, "fingerprint": fingerprint(pipe.model)}
    base |= about_model(pipe.model, config)
    if args.against not in (None, BASE):
        pipe.model.load_adapter(
            args.against, adapter_name="against", adapter_kwargs={"revision": args.against_revision}
        )
    adapters = {"against": (args.against, args.against_revision), "default": (args.adapter, args.adapter_revision)}
    wanted = [key for key, (adapter, _) in adapters.items() if adapter is not None]
    if args.adapter is None:
        wanted = [*wanted, BASE]
    titles = args.names or short_names([adapters.get(key, (base["model"],))[0] for key in wanted])
    found = {}
    for title, key in zip(titles, wanted, strict=True):
        adapter, revision = adapters.get(key, (BASE, None))
        if adapter == BASE:
            found[title] = Version.of(pipe, config, functools.partial(_without_adapter, pipe), base)
        else:
            own = as_described(pipe.model.config, pipe.model.adapter_description(key))
            mapped = functools.reduce(also_asked, filter(None, mappings.values()), own)
            is_asked_anew = args.labels or args.templates or mapped.label_names != config.label_names
            about = {"adapter": adapter, "adapter_revision": revision}
            about["adapter_fingerprint"] = adapter_fingerprint(adapter, revision=revision)
            found[title] = _adapted(pipe, key, config if is_asked_anew else mapped, base | about)
    return found


def _adapted(pipe: CTPipeline, key: str, asks: MedCTConfig, about: dict[str, Any]) -> Version:
    """The model with one of its adapters, and of what was chosen for that one what holds for the words it is asked.

    Args:
        pipe: Holds the model, with the adapter.
        key: Name of the adapter in the model.
        asks: What it is asked.
        about: What there is to tell of base and adapter.
    """
    described = pipe.model.adapter_description(key)
    own = as_described(pipe.model.config, described)
    holds = {name for name in asks.label_names if own.label_prompts([name]) == asks.label_prompts([name])}

    def held(by_label: Mapping[str, Any] | None) -> dict[str, Any]:
        return {label: each for label, each in (by_label or {}).items() if label in holds}

    points = {YOUDEN: described.get("thresholds"), **(described.get("operating_points") or {})}
    return Version.of(
        pipe,
        asks,
        functools.partial(_with_adapter, pipe, key),
        about | about_model(pipe.model, asks),
        points={name: kept for name, each in points.items() if (kept := held(each))},
        calibration=held(described.get("calibration")),
    )


def _with_adapter(pipe: CTPipeline, key: str) -> None:
    pipe.model.enable_adapters()
    pipe.model.set_adapter(key)


def _without_adapter(pipe: CTPipeline) -> None:
    if getattr(pipe.model, "_hf_peft_config_loaded", False):
        pipe.model.disable_adapters()
