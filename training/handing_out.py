"""What a finished run hands out besides its weights: pictures, a README, a table on the screen, a push."""

from pathlib import Path
from typing import Any

from medct.adapters_medct import CONFIG_FILE
from medct.evaluation.calibration import apply_calibration
from medct.evaluation.plots import calibration_plot, change_plot, roc_plot, save_plot
from medct.evaluation.scoring import ScoredStudies
from medct.publishing.cards import model_metadata, write_card
from medct.publishing.push import push_adapter, push_model
from medct.training.results import ADAPTED, BASE
from medct.training.settings import TrainingSettings


def draw_pictures(
    folder: Path, results: dict[str, Any], before: ScoredStudies, after: ScoredStudies, note: str, of_kept: str
) -> None:
    """Draw `roc.png` and `calibration.png`, and `learned.png` where something was to be kept.

    Args:
        folder: Folder to write to.
        results: What `results.json` holds.
        before: Held-out studies by the base.
        after: The same studies by the adapted model.
        note: What the studies are, for the titles.
        of_kept: What was to be kept, likewise; empty if nothing was.
    """
    models, what = {BASE: before.scores, ADAPTED: after.scores}, "score"
    save_plot(roc_plot(models, before.labels, before.names, note), folder / "roc.png")
    if results["calibration"] and len(results["calibration"]) == len(after.names):
        models["calibrated"] = apply_calibration(after.scores, results["calibration"], after.names)
        what = "score, or calibrated probability"
    save_plot(calibration_plot(models, before.labels, note, what=what), folder / "calibration.png")
    if results["kept"]:
        change = change_plot(results["comparison"], results["kept"], after.names, f"{note}{of_kept}")
        save_plot(change, folder / "learned.png")


def write_readme(folder: Path, results: dict[str, Any]) -> None:
    """Write README.md: an adapter's card or, for a whole model, its figures under what it takes over from its base.

    Args:
        folder: Holds the adapter or the model, and `train_config.json`.
        results: What `results.json` holds.
    """
    if (folder / CONFIG_FILE).is_file():
        write_card(folder)
        return
    metadata = f"---\n{model_metadata(folder, results)}\n---"
    parts = [metadata, "# MedCT", results["measured_on"], results["data"], results["table"], *results["remarks"]]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def tell(settings: TrainingSettings, results: dict[str, Any], folder: Path) -> None:
    """Show what a finished run found, and push it if that is wanted; the folder stays whatever happens.

    Args:
        settings: Of the run.
        results: What `results.json` holds.
        folder: Of the run.
    """
    print(f"\n{results['table']}\n\n{results['measured_on']}")
    print(f"Strength: {results['strength']:g} (the share of what was learned that is in the weights)")
    for remark in results["remarks"]:
        print(f"NOTE: {remark}")
    print(f"Saved: {folder}")
    if settings.push_to_hub and not (folder / CONFIG_FILE).is_file():
        print(f"Pushed: {push_model(folder, settings.hub_model_id, private=settings.hub_private)}")
    elif settings.push_to_hub:
        base = {"base": settings.hub_base, "base_revision": settings.hub_base_revision}
        print(f"Pushed: {push_adapter(folder, settings.hub_model_id, private=settings.hub_private, **base)}")
