"""Adapters in a model: loaded, switched, scaled and removed, so that it scores with the weights that one expects.

transformers does all of this for plain LoRA adapters, one beside the other; the methods here refuse what would leave
other weights than one expects.
"""

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapters_medct import (
    DESCRIPTION_FILE,
    AdapterMismatchError,
    adapter_fingerprint,
    adapters_in_use,
    changes_base,
    check_fit,
    loadable_tensors,
    own_module,
    refuse_to_share_base,
    refuse_to_swap,
    without_choices,
)
from .snapshots_medct import Snapshot

# Roots and quotients of scales are rounded.
_STRENGTH_ROUNDING = 1e-6
OF_PUSHES = ("commit_message", "create_pr", "private", "repo_id")
_REPORTS = logging.getLogger("transformers.integrations.peft")


class MedCTAdapterMixin:
    """What models here do with adapters besides what transformers' own mixin does, which comes after this one."""

    _described: dict[str, tuple[Snapshot, dict]] = {}

    @property
    def is_gradient_checkpointing(self) -> bool:
        """What PEFT asks each model that it adapts, by a name that transformers has changed, with a warning."""
        return self.is_activation_checkpointing

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, *args, **kwargs) -> Any:
        """As in transformers, but an adapter that does not fit this model is refused; see `check_fit`.

        What the adapter remembers is kept, see `adapter_description`.

        Args:
            peft_model_id: Hub id or folder of the adapter.
            adapter_name: Name to load it under; "default" by default.
            args: As for transformers' method.
            kwargs: Likewise.

        Raises:
            AdapterMismatchError: If the adapter was trained on another model or another preprocessing, or is not whole.
        """
        description, name = None, adapter_name or "default"
        self._refuse_name_of_a_part(name)
        if peft_model_id is not None:
            load_config, adapter_kwargs = kwargs.get("load_config"), kwargs.get("adapter_kwargs") or {}
            downloads = kwargs if load_config is None else load_config.download_kwargs
            hub = {**downloads, **adapter_kwargs}
            description = check_fit(self, peft_model_id, **hub)
            if name in getattr(self, "peft_config", ()):
                refuse_to_swap(self.peft_config[name], peft_model_id, **hub)
            # The second argument is `adapter_state_dict`; beside offloaded layers transformers reads files only.
            if len(args) < 2 and not any(weight.is_meta for weight in self.parameters()):
                kwargs.setdefault("adapter_state_dict", loadable_tensors(peft_model_id, **hub))
        else:
            refuse_to_share_base(self, args[0] if args else kwargs.get("peft_config"))
        conversions = vars(self).get("_weight_conversions")
        with without_load_report():
            loaded = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        # transformers would leave the adapter's, and save the base under such names once the adapter is deleted.
        self._weight_conversions = conversions
        self._refuse_adapter_without_values(name)
        # transformers counts the base's tensors as missing where the adapter's name stands in theirs.
        missing = {key for key in loaded.missing_keys if name in key.split(".")}
        if astray := missing | loaded.unexpected_keys:
            kind = self.peft_config[name].peft_type.value
            self._delete(name)
            raise AdapterMismatchError(
                f"{len(astray)} tensors of the adapter were not loaded, such as {min(astray)}; transformers loads no "
                f"{kind} adapter whole. Use `peft.PeftModel.from_pretrained`, after `check_fit`."
            )
        for layer in self._lora_layers(name):
            if not math.isclose(_strength_of(layer, name), 1, rel_tol=_STRENGTH_ROUNDING):  # of what lay here before
                layer.set_scale(name, 1)
        self._end_disabling()
        self._described = {**self._described, name: (Snapshot(_tensors_of(self, name)), description or {})}
        return loaded

    def add_adapter(self, adapter_config: Any, *args, **kwargs) -> None:
        """As in transformers, but an adapter that would change the base under others is refused; see `check_fit`."""
        refuse_to_share_base(self, adapter_config)
        super().add_adapter(adapter_config, *args, **kwargs)

    def disable_adapters(self) -> None:
        """As in transformers, but refused where that would not restore the base; see `check_fit`."""
        self._refuse_to_do_without_adapters()
        super().disable_adapters()

    def enable_adapters(self) -> None:
        """transformers' own, and whole modules, which it would leave disabled: the base's would take their place."""
        super().enable_adapters()
        for module in self.modules():
            if hasattr(module, "modules_to_save"):
                module.enable_adapters(True)

    def _end_disabling(self) -> None:
        """Enable all adapters once one is named: layers that were disabled would stay so, beside its other ones."""
        if not adapters_in_use(self):
            self.enable_adapters()

    def delete_adapter(self, *args, **kwargs) -> None:
        """As in transformers, but refused where that would not restore the base; see `check_fit`.

        Without the last adapter the model is what it was before the first; transformers would leave PEFT's layers, and
        save their weights under names by which no model loads them.
        """
        self._refuse_to_do_without_adapters()
        if any(getattr(module, "merged", False) for module in self.modules()):
            raise AdapterMismatchError(
                "The adapter is merged into the weights of its base, which would stay so. Unmerge it first."
            )
        self._delete(*args, **kwargs)

    def _delete(self, *args, **kwargs) -> None:
        super().delete_adapter(*args, **kwargs)
        if not self._hf_peft_config_loaded:
            _unwrap(self)

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """As in transformers, but also where one adapter has whole modules and another has none, or all are disabled.

        Args:
            adapter_name: Name of the adapter to use from now on, or several.

        Raises:
            ValueError: If it is not loaded.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if not getattr(self, "_hf_peft_config_loaded", False) or not set(names) <= set(self.peft_config):
            return super().set_adapter(adapter_name)  # says what is wrong
        self._end_disabling()
        return _switch(self, adapter_name)

    def adapter_description(self, name: str) -> dict:
        """What the adapter of a name remembers of its training; see `describe_adapter`.

        Empty if nothing is known, or the adapter has become another since it was loaded: replaced, swapped, trained. In
        another precision (`model.bfloat16()`) it is the same.
        At another strength than the stored one it is the same adapter, but operating points and calibration do not hold
        there and are left out.
        """
        snapshot, description = self._described.get(name, (None, {}))
        if snapshot is None or not snapshot.equals_rounded(_tensors_of(self, name)):
            return {}
        strengths = [_strength_of(layer, name) for layer in self._lora_layers(name)]
        if all(math.isclose(strength, 1, rel_tol=_STRENGTH_ROUNDING) for strength in strengths):
            return description
        return without_choices(description)

    def adapter_strength(self, name: str = "default") -> float:
        """How much of a LoRA adapter is in use: 1 as it was loaded, 0 nothing of it; NaN if its layers differ.

        Raises:
            ValueError: If there is no LoRA adapter of that name.
        """
        strengths = [_strength_of(layer, name) for layer in self._known_lora_layers(name)]
        is_one = math.isclose(min(strengths), max(strengths), rel_tol=_STRENGTH_ROUNDING)
        return strengths[0] if is_one else math.nan

    def set_adapter_strength(self, name: str = "default", strength: float = 1.0) -> None:
        """Use this much of a LoRA adapter in all calls that follow. Nothing that is saved changes.

        The adapter's operating points and calibration hold for strength 1 and are left out at any other; see
        `adapter_description`.

        Args:
            name: Name of the adapter, as in `load_adapter`.
            strength: 1 is the adapter as it was loaded, 0 the base, 0.5 half of what was learned.

        Raises:
            ValueError: If there is no LoRA adapter of that name, the strength is negative or not finite, or the adapter
                has parts that do not scale: it is merged, or has DoRA's magnitudes or whole modules.
        """
        if not 0 <= strength < math.inf:
            raise ValueError(f"`strength` is {strength}. Pass a number, 0 or more; 1 is the adapter as it was loaded.")
        layers = self._known_lora_layers(name)
        has_modules = any(name in (getattr(module, "modules_to_save", None) or ()) for module in self.modules())
        if has_modules or any(layer.merged or layer.use_dora.get(name) for layer in layers):
            raise ValueError(
                f"The adapter {name!r} is merged, or has DoRA's magnitudes or modules that were trained whole, so its "
                "strength cannot be set. `medct train --strength auto` chooses it when an adapter is made."
            )
        for layer in layers:
            layer.set_scale(name, strength)

    def _refuse_name_of_a_part(self, name: str) -> None:
        """Refuse a name for an adapter by which its tensors could not be told from the model's own."""
        parts = {part for key, _ in self.named_parameters() for part in key.split(".")}
        if name in parts - set(getattr(self, "peft_config", ())):
            raise AdapterMismatchError(f"A part of the model is called {name!r}. Load the adapter under another name.")

    def _refuse_adapter_without_values(self, name: str) -> None:
        """Take an adapter out again if the library could not put its values beside offloaded layers."""
        own = [tensor for key, tensor in self.named_parameters() if name in key.split(".")]
        if any(tensor.is_meta for tensor in own):
            self._delete(name)
            raise AdapterMismatchError(
                "The adapter belongs to layers that are offloaded, where its weights cannot be loaded. Merge it "
                "into the model before (`PeftModel.merge_and_unload`, `save_pretrained`), or offload other layers."
            )

    def _refuse_to_do_without_adapters(self) -> None:
        """Refuse to go on without an adapter that has changed the base: what is left is not the base."""
        if any(map(changes_base, getattr(self, "peft_config", {}).values())):
            raise AdapterMismatchError(
                "The adapter has changed weights of its base (PiSSA, OLoRA and the like, or biases), so that without "
                "it this is not the base. Load the base again."
            )

    def save_pretrained(self, *args, **kwargs) -> Any:
        """As in transformers, but what an adapter remembers is saved and pushed with it."""
        if not getattr(self, "_hf_peft_config_loaded", False):
            return super().save_pretrained(*args, **kwargs)
        # An adapter is saved, and nothing else; transformers would push it before all that belongs to it is there.
        is_pushed = kwargs.pop("push_to_hub", False) and kwargs.get("is_main_process", True)
        pushing = {name: kwargs.pop(name) for name in OF_PUSHES if name in kwargs}
        saved = super().save_pretrained(*args, **kwargs)
        folder = Path(args[0] if args else kwargs["save_directory"])
        self._write_description(folder)
        if is_pushed:
            self.push_to_hub(pushing.pop("repo_id", folder.name), token=kwargs.get("token"), **pushing)
        return saved

    def _write_description(self, folder: Path) -> None:
        """Write down again what the saved adapter remembers, beside its weights; nothing of one that has changed.

        Nor is left what lies there of another.
        """
        name = self.active_adapters()[0]  # which transformers saves
        snapshot, description = self._described.get(name, (None, {}))
        path = folder / DESCRIPTION_FILE
        if description and snapshot.equals_rounded(_tensors_of(self, name)):
            description = {**description, "adapter_fingerprint": adapter_fingerprint(folder)}
            path.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        else:
            path.unlink(missing_ok=True)

    def _lora_layers(self, name: str) -> list[nn.Module]:
        return [module for module in self.modules() if name in getattr(module, "lora_alpha", ())]

    def _known_lora_layers(self, name: str) -> list[nn.Module]:
        layers = self._lora_layers(name)
        if not layers:
            known = sorted({each for module in self.modules() for each in getattr(module, "lora_alpha", ())})
            raise ValueError(f"There is no LoRA adapter {name!r}. Loaded: {', '.join(known) or 'none'}.")
        return layers


def _switch(model: nn.Module, names: list[str] | str) -> None:
    """Use these adapters wherever a model has them."""
    try:
        from peft.functional import set_adapter
    except ImportError:  # then there are none
        return
    # transformers' own stops half way at a whole module that one adapter has and another has not.
    set_adapter(model, names)
    # Where tokens are adapted, a layer lies within such a module, and has just been told a name that it may not have.
    set_adapter(model, names, layer_cls=())


def _unwrap(module: nn.Module) -> None:
    """Put a model's own modules back into the places of PEFT's."""
    for name, child in module.named_children():
        if (own := own_module(child)) is not child:
            setattr(module, name, own)
        _unwrap(own)


def _strength_of(layer: nn.Module, name: str) -> float:
    """Scale of an adapter in a layer of PEFT, as a share of the configured one; 1 if that is 0, and stays so."""
    root, alpha = 0.5 if layer.use_rslora.get(name) else 1, layer.lora_alpha[name]
    return layer.scaling[name] * layer.r[name] ** root / alpha if alpha else 1.0


def _tensors_of(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The weights of the adapter of a name, on the CPU."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {key: tensor.detach().cpu() for key, tensor in named if name in key.split(".") and not tensor.is_meta}


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """Hold back transformers' report on an adapter's weights, unless loading fails, and PEFT's remark of each loading.

    The report calls all weights missing that are the base's, or an earlier adapter's; which are, says
    `MedCTModel.load_adapter`. PEFT remarks on a second adapter.
    """
    held: list[logging.LogRecord] = []

    def passes(record: logging.LogRecord) -> bool:
        if is_report := "LOAD REPORT" in record.getMessage():
            held.append(record)
        return not is_report

    _REPORTS.addFilter(passes)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            yield
    except BaseException:
        _REPORTS.removeFilter(passes)
        for record in held:
            _REPORTS.handle(record)
        raise
    finally:
        _REPORTS.removeFilter(passes)
