"""``setfit-kd export``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from setfit_kd.cli.options import SHARE, output_options, passed_settings, pickle_option, setting_options
from setfit_kd.config import BUNDLE_FORMATS, RunConfig
from setfit_kd.errors import DataError

logger = logging.getLogger(__name__)

_STAND_IN = "bundled:newswire"


@click.command()
@click.argument("model", metavar="RUN_OR_MODEL")
@click.option("--output-dir", required=True, type=click.Path(path_type=Path), metavar="FOLDER",
              help="Folder that the bundle is written to.")  # fmt: skip
@click.option("--format", "format_", type=click.Choice(BUNDLE_FORMATS), default=None,
              help="ONNX in single precision, ONNX in 8 bits, or token vectors. [static for static students, "
              "onnx-int8 for others]")  # fmt: skip
@click.option("--min-agreement", type=SHARE, default=None, metavar="X",
              help="Least share of texts that the bundle must label as the model does. [0.98 for onnx-int8, 0.999 for "
              "the others]")  # fmt: skip
@setting_options("unlabeled", "text_column")
@pickle_option
@output_options
def export(
    model: str,
    output_dir: Path,
    format_: str | None,
    min_agreement: float | None,
    trust_pickle: bool,
    **flags: Any,
) -> None:
    """Write a classifier as a bundle: one folder that runs without torch.

    RUN_OR_MODEL is a run's folder, one of its students, a SetFit model or a transformer. The bundle is checked on texts
    of the run's pool, or on those of --unlabeled, against the model that it is made of.
    """
    config = RunConfig.of(**passed_settings(flags))

    from setfit_kd.cli.output import echo
    from setfit_kd.export import export_bundle
    from setfit_kd.models import load

    classifier = load(model, device="cpu", trust_pickle=trust_pickle)
    texts = _texts(model, config)
    title = Path(model).resolve().name
    bundle = export_bundle(
        classifier, output_dir, texts=texts, format=format_, min_agreement=min_agreement, title=title
    )
    parity = bundle.parity
    echo(f"{bundle.format} bundle in {output_dir}: {bundle.megabytes:.1f} MB.")
    echo(
        f"It labels {parity.agreement:.1%} of {parity.texts:,} texts as the model does; probabilities differ by "
        f"{parity.largest_difference:.2g} at most."
    )
    echo(f'To use it, there or anywhere: python {output_dir}/classify.py "..."')


def _texts(model: str, config: RunConfig) -> list[str]:
    """Texts to check the bundle on: those named, the pool of the run that the model is of, or a stand-in's."""
    from setfit_kd.data import read
    from setfit_kd.run_folder import CONFIG, RUN, SCORED, SIGNALS, RunFolder
    from setfit_kd.signals import TeacherSignals, read_signals

    if config.unlabeled is not None:
        return read(config.unlabeled, text_column=config.text_column).texts
    path = Path(model).absolute()
    for folder in (path, *path.parents[:2]):
        if not all((folder / file).is_file() for file in (CONFIG, RUN)):
            continue
        kept = [kept for kept in (folder / SIGNALS, *(folder / SCORED).glob("*")) if kept.is_dir()]
        others = RunFolder.settings(folder).get("signals")
        if kept or others:
            try:
                return TeacherSignals.load(kept[0]).texts if kept else read_signals(str(others)).texts
            except DataError as error:
                raise DataError(error.message, hint="Name other texts to check the bundle on: --unlabeled.") from None
    logger.warning(
        "%s is in no run: the bundle is checked on the texts of %s. Name better ones by --unlabeled.", model, _STAND_IN
    )
    return read(_STAND_IN).texts
